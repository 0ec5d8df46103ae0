"""What guesses prove: published values, exact laws, and bounds that hold as often as they say."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privacy.accounting import Event, pld_epsilon
from privacy.bounds import (
    GRID,
    ceiling,
    clopper_pearson_epsilon,
    clopper_pearson_mu,
    cosine_estimate,
    count_correct,
    gaussian_epsilon,
    one_run_bound,
    one_run_epsilon,
    one_run_epsilon_fdp,
    one_run_mu_fdp,
    one_run_p_value,
    two_gaussians_epsilon,
)
from privacy.errors import PlanError
from tests.oracles import gaussian_delta


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_one_run_gives_the_published_values(
    canaries: int, guesses: int, correct: int, delta: float, published: float
) -> None:
    found = one_run_epsilon(canaries, guesses, correct, delta=delta, significance=0.05)
    assert found == pytest.approx(published, abs=1e-3)


def test_the_second_published_value_to_five_digits() -> None:
    assert one_run_epsilon(100_000, 1510, 1439, delta=1e-5, significance=0.05) == pytest.approx(2.67585, abs=1e-5)


@pytest.mark.parametrize(
    ("canaries", "ceilings"),
    [
        (100, {10: 1.05, 50: 2.78, 100: 3.49}),
        (1000, {10: 1.01, 50: 2.76, 100: 3.47, 500: 5.09, 1000: 5.78}),
        (10_000, {10: 0.61, 50: 2.48, 100: 3.20, 500: 4.83, 1000: 5.53}),
    ],
)
def test_ceilings(canaries: int, ceilings: dict[int, float]) -> None:
    for guesses, epsilon in ceilings.items():
        assert ceiling(canaries, guesses, delta=1e-5, significance=0.05) == pytest.approx(epsilon, abs=0.005)


def slow_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The formula, term by term, at 40 digits."""
    with mpmath.workdps(40):
        q = mpmath.exp(epsilon) / (1 + mpmath.exp(epsilon))
        mass = [mpmath.binomial(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)]
        beta = mpmath.fsum(mass[correct:])
        alpha = max(mpmath.fsum(mass[correct - i : correct]) / i for i in range(1, correct + 1))
        return float(min(mpmath.mpf(1), beta + 2 * canaries * delta * alpha))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.data(), st.floats(0, 6), st.sampled_from([0.0, 1e-6, 1e-3, 0.3]))
def test_the_p_value_is_the_formula(guesses: int, data: st.DataObject, epsilon: float, delta: float) -> None:
    correct = data.draw(st.integers(0, guesses))
    expected = 1.0 if correct == 0 else slow_p_value(guesses + 9, guesses, correct, epsilon, delta)
    assert one_run_p_value(guesses + 9, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9)


def test_without_delta_the_two_one_run_bounds_are_close_and_delta_costs_both() -> None:
    binomial, curve = (
        bound(1000, 200, 170, delta=0.0, significance=0.05) for bound in (one_run_epsilon, one_run_epsilon_fdp)
    )
    assert curve == pytest.approx(binomial, abs=0.15)
    assert one_run_epsilon(1000, 200, 170, delta=1e-3, significance=0.05) < binomial
    assert one_run_epsilon_fdp(1000, 200, 170, delta=1e-3, significance=0.05) < curve


def refuted_as_printed(epsilon: float, delta: float, m: int, r: int, v: int, significance: float) -> bool:
    """Algorithm 3 of Mahloujifar, Melis & Chaudhuri (2024) for two hypotheses, array by array and to the end."""
    odds = math.exp(epsilon)
    wrong, right = [0.0] * (r + 1), [0.0] * (r + 1)
    right[v], wrong[v] = significance * v / m, significance * (r - v) / m
    for i in range(v - 1, -1, -1):
        blown = [0.0, (right[i + 1] - delta) / odds, 1 - delta - odds * (1 - right[i + 1])]
        wrong[i] = max(wrong[i + 1], *blown)
        right[i] = min(1.0, right[i + 1] + i / (r - i) * (wrong[i] - wrong[i + 1]))
    return right[0] + wrong[0] > r / m


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.data(), st.sampled_from([0.0, 1e-5, 1e-2]), st.sampled_from([0.01, 0.05, 0.3]))
def test_the_f_dp_bound_is_the_printed_algorithm(guesses: int, data: st.DataObject, delta: float, alpha: float) -> None:
    correct = data.draw(st.integers(guesses // 2, guesses))
    found = one_run_epsilon_fdp(60, guesses, correct, delta=delta, significance=alpha)
    assert found == 0 or refuted_as_printed(found, delta, 60, guesses, correct, alpha)
    assert not refuted_as_printed(found + 1e-5, delta, 60, guesses, correct, alpha)


def test_g18_every_attack_every_share_and_every_bound_is_paid_for() -> None:
    coins, scores = np.arange(100) % 2 == 0, np.random.default_rng(1).random(100)
    for attacks, gaussian, tried in ((1, False, 6), (2, False, 12), (2, True, 18), (5, True, 45)):
        names = {str(number): scores for number in range(attacks)}
        assert one_run_bound(names, coins, delta=1e-5, gaussian=gaussian).tried == tried
    # What is printed is what was divided by: the same guesses prove less beside other attempts.
    right = {"right": coins.astype(float)}
    alone, beside = (one_run_bound(names, coins, delta=0.0) for names in (right, right | {"other": scores}))
    assert beside.epsilon < alone.epsilon


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
def test_gaussian_epsilon_is_exact_and_agrees_with_the_accountant(mu: float) -> None:
    epsilon = gaussian_epsilon(mu, 1e-5)
    assert gaussian_delta(mu, epsilon) == pytest.approx(1e-5, rel=1e-4)
    event = Event(sample_rate=1.0, noise_multiplier=1 / mu, steps=1)
    assert pld_epsilon(event, 1e-5) == pytest.approx(epsilon, abs=1e-3)
    assert two_gaussians_epsilon(2.0, 2 * mu, 2.0, 1e-5) == pytest.approx(epsilon, abs=1e-6)


@pytest.mark.parametrize(("null_std", "mean", "std"), [(1.0, 0.7, 1.3), (1.0, 2.0, 0.6), (0.01, 0.05, 0.011)])
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_two_gaussians_against_direct_integration(null_std: float, mean: float, std: float, delta: float) -> None:
    epsilon = two_gaussians_epsilon(null_std, mean, std, delta)

    def excess(one: tuple[float, float], other: tuple[float, float]) -> float:
        x = np.linspace(-30 * max(null_std, std), mean + 30 * max(null_std, std), 2_000_001)
        gap = stats.norm.pdf(x, *one) - math.exp(epsilon) * stats.norm.pdf(x, *other)
        return float(np.trapezoid(np.maximum(gap, 0), x))

    pair = (0.0, null_std), (mean, std)
    assert max(excess(*pair), excess(*pair[::-1])) == pytest.approx(delta, rel=2e-3)


@pytest.mark.parametrize(("count", "published"), [(1000, 5.6), (10_000, 7.9)])
def test_two_runs_right_every_time(count: int, published: float) -> None:
    found = clopper_pearson_epsilon(count, count, 0, count, delta=1e-5, significance=0.05)
    assert found == pytest.approx(published, abs=0.05)


def test_two_runs_use_the_mirror_image_and_say_nothing_of_a_coin() -> None:
    left = clopper_pearson_epsilon(60, 100, 0, 100, delta=0.0, significance=0.05)
    right = clopper_pearson_epsilon(100, 100, 40, 100, delta=0.0, significance=0.05)
    assert left == pytest.approx(right)
    assert left > 2
    assert clopper_pearson_epsilon(50, 100, 50, 100, delta=0.0, significance=0.05) == 0
    assert clopper_pearson_epsilon(0, 1, 1, 1, delta=0.0, significance=0.05) == 0


def test_g18_two_runs_grant_delta_in_both_directions() -> None:
    # (0, 0.2)-DP exactly: a fifth of the members, or of the others, gives itself away, and the rest looks alike.
    for counts in ((200, 1000, 0, 1000), (1000, 1000, 800, 1000)):
        assert clopper_pearson_epsilon(*counts, delta=0.2, significance=0.05) == 0
        assert clopper_pearson_epsilon(*counts, delta=0.0, significance=0.05) > 2
    # Limits by inversion of the tails themselves.
    hit, alarm = stats.beta.ppf(0.025, 90, 11), stats.beta.ppf(0.975, 11, 90)
    assert stats.binom.sf(89, 100, hit) == pytest.approx(0.025)
    assert stats.binom.cdf(10, 100, alarm) == pytest.approx(0.025)
    found = clopper_pearson_epsilon(90, 100, 10, 100, delta=0.01, significance=0.05)
    assert found == pytest.approx(math.log((hit - 0.01) / alarm))


def test_two_runs_of_a_claimed_gaussian_are_nearly_tight() -> None:
    # Counts as expected of mu = 1 and a threshold in the middle.
    hit = round(20_000 * stats.norm.cdf(0.5))
    assert 0.95 < clopper_pearson_mu(hit, 20_000, 20_000 - hit, 20_000, significance=0.05) < 1.0
    assert clopper_pearson_mu(0, 10, 0, 10, significance=0.05) == 0
    assert clopper_pearson_mu(10, 10, 10, 10, significance=0.05) == 0
    assert 1 < clopper_pearson_mu(10, 10, 0, 10, significance=0.05) < 2


def laplace_like(m: int, epsilon: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coins, and answers of randomised response: exactly epsilon-DP, and as telling as that can be."""
    coins = rng.random(m) < 0.5
    honest = rng.random(m) < 1 / (1 + math.exp(-epsilon))
    return coins, np.where(honest, coins, ~coins) + rng.random(m) * 1e-3


@pytest.mark.statistical
@pytest.mark.parametrize("bound", [one_run_epsilon, one_run_epsilon_fdp])
def test_bounds_are_wrong_as_rarely_as_they_say(bound: object) -> None:
    # 200 audits of a mechanism that is exactly as bad as claimed, at 5 %: more than 24 false alarms has p < 1e-4.
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(200):
        coins, scores = laplace_like(400, 1.0, rng)
        correct = count_correct(scores, coins, 400)
        alarms += bound(400, 400, correct, delta=0.0, significance=0.05) > 1.0  # type: ignore[operator]
    assert alarms <= 24


def test_choosing_the_best_of_many_thresholds_would_be_wrong_and_the_grid_pays_for_its_choice() -> None:
    rng = np.random.default_rng(9)
    cheating = honest = 0
    for _ in range(60):
        coins, scores = rng.random(100) < 0.5, rng.random(100)  # scores that know nothing
        best = max(
            one_run_epsilon(100, r, count_correct(scores, coins, r), delta=0.0, significance=0.3)
            for r in range(4, 101, 4)
        )
        cheating += best > 0
        honest += one_run_bound({"nothing": scores}, coins, delta=0.0, significance=0.3).epsilon > 0
    assert cheating > 24  # far beyond the 30 % that it claims
    assert honest <= 24


@pytest.mark.statistical
def test_a_gaussian_is_audited_from_below_and_the_f_dp_bound_is_the_tighter() -> None:
    rng = np.random.default_rng(3)
    coins = rng.random(1000) < 0.5
    scores = coins + 1.0 * rng.standard_normal(1000)
    bound = one_run_bound({"scores": scores}, coins, delta=1e-5, gaussian=True)
    truth = gaussian_epsilon(1.0, 1e-5)
    assert 1.0 < bound.epsilon < bound.gaussian < truth < bound.ceiling
    assert bound.tried == 9
    # A claim of half the noise is contradicted by the Gaussian's own bound where the general one says nothing.
    louder = coins + 0.5 * rng.standard_normal(1000)
    assert one_run_bound({"scores": louder}, coins, delta=1e-5, gaussian=True).gaussian > truth


@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_g18_no_bound_is_above_the_ceiling_that_is_printed_beside_it(delta: float) -> None:
    coins = np.arange(300) % 2 == 0
    for gaussian in (False, True):
        bound = one_run_bound({"all right": coins.astype(float)}, coins, delta=delta, gaussian=gaussian)
        assert bound.correct == bound.guesses
        assert max(bound.epsilon, bound.gaussian) <= bound.ceiling
        # Planted: the ceiling of one bound beside the figure of another.
        binomial = max(
            ceiling(300, r, delta=delta, significance=0.05 / bound.tried) for r in (round(300 * g) for g in GRID)
        )
        assert max(bound.epsilon, bound.gaussian) > binomial


def revealing(m: int, delta: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Exactly (0, delta)-DP for each record: in a few runs many coins are told at once, else nothing is."""
    coins, scores = rng.random(m) < 0.5, rng.random(m) - 0.5
    if rng.random() < 4 * delta:
        told = rng.choice(m, m // 4, replace=False)
        scores[told] = np.where(coins[told], 1.0, -1.0)
    return coins, scores


@pytest.mark.statistical
@pytest.mark.parametrize("bound", [one_run_epsilon, one_run_epsilon_fdp])
def test_g18_delta_is_paid_for_where_it_falls_on_many_records_at_once(bound: Callable[..., float]) -> None:
    # 400 audits at 5 %: more than 42 false alarms has p < 1e-5.
    rng = np.random.default_rng(17)
    drawn = [revealing(40, 0.03, rng) for _ in range(400)]
    right = [count_correct(scores, coins, 10) for coins, scores in drawn]
    assert sum(bound(40, 10, v, delta=0.03, significance=0.05) > 0 for v in right) <= 42
    # Planted: the same guesses with delta left out are wrong three times as often as is said.
    assert sum(bound(40, 10, v, delta=0.0, significance=0.05) > 0 for v in right) > 42


@pytest.mark.statistical
def test_g18_all_that_one_run_says_of_a_gaussian_is_wrong_as_rarely_as_stated() -> None:
    # Two attacks, three shares and three bounds: 150 audits at 10 % in all; more than 33 has p < 1e-5.
    rng, truth, alarms = np.random.default_rng(23), gaussian_epsilon(0.6, 1e-2), 0
    for _ in range(150):
        coins = rng.random(100) < 0.5
        scores = {"sum": 0.6 * coins + rng.standard_normal(100), "nothing": rng.random(100)}
        found = one_run_bound(scores, coins, delta=1e-2, significance=0.1, gaussian=True)
        alarms += max(found.epsilon, found.gaussian) > truth
    assert alarms <= 33


@pytest.mark.statistical
def test_g18_confidence_limits_of_two_groups_are_wrong_as_rarely_as_stated() -> None:
    # At 20 %, so that half the significance on each side shows: 4,000 audits of a Gaussian at its best threshold.
    rng, mu, alarms = np.random.default_rng(29), 1.0, 0
    truth = stats.norm.cdf(mu / 2)
    for hit, alarm in zip(rng.binomial(200, truth, 4000), rng.binomial(200, 1 - truth, 4000), strict=True):
        alarms += clopper_pearson_mu(int(hit), 200, int(alarm), 200, significance=0.2) > mu
    # Both sides together are wrong far less often than 20 %, at their full significance each more often than that.
    assert 20 < alarms < 300


def test_mu_is_monotone_in_the_right_guesses() -> None:
    found = [one_run_mu_fdp(1000, 200, correct, significance=0.05) for correct in (100, 130, 160, 190, 200)]
    assert found == sorted(found)
    assert found[0] == 0 < found[1]


def test_guesses_look_at_scores_only_and_equal_scores_say_nothing() -> None:
    coins = np.array([True, False] * 50)
    assert count_correct(np.zeros(100), coins, 100) == 50
    assert count_correct(coins.astype(float), coins, 100) == 100
    assert count_correct(-coins.astype(float), coins, 100) == 0
    bound = one_run_bound({"broken": np.full(100, np.nan)}, coins, delta=1e-5)
    assert bound.epsilon == 0


def test_canary_cosines_of_a_known_gaussian_mechanism() -> None:
    # k canaries of norm 1 in P dimensions under noise sigma: the cosine of one with the sum has mean 1 / |sum|.
    rng, size, canaries, sigma = np.random.default_rng(2), 20_000, 100, 0.5
    units = rng.standard_normal((canaries, size))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    final = units.sum(0) + sigma * rng.standard_normal(size)
    final /= np.linalg.norm(final)
    estimate = cosine_estimate((units @ final).tolist(), size, 1e-5)
    assert estimate.mean == pytest.approx(1 / math.sqrt(canaries + sigma**2 * size), rel=0.1)
    # Other canaries are noise too: sigma_effective^2 = sigma^2 + canaries / P.
    truth = gaussian_epsilon(1 / math.sqrt(sigma**2 + canaries / size), 1e-5)
    assert estimate.epsilon == pytest.approx(truth, rel=0.25)
    unseen = rng.standard_normal((canaries, size))
    unseen /= np.linalg.norm(unseen, axis=1, keepdims=True)
    assert cosine_estimate((unseen @ final).tolist(), size, 1e-5).epsilon < 2 < estimate.epsilon


def test_canary_cosines_use_the_exact_law_in_few_dimensions_and_the_two_laws_meet() -> None:
    spread = 0.03 * np.linspace(-1, 1, 50)
    few = cosine_estimate((0.15 + spread).tolist(), 999, 1e-5).epsilon
    many = cosine_estimate((0.15 + spread).tolist(), 1000, 1e-5).epsilon
    assert few == pytest.approx(many, rel=0.1)
    assert cosine_estimate((0.9 + spread).tolist(), 4, 1e-2).epsilon > 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: one_run_epsilon(10, 11, 3, delta=0.0, significance=0.05),
        lambda: one_run_epsilon(10, 5, 6, delta=0.0, significance=0.05),
        lambda: one_run_epsilon(10, 5, 5, delta=0.0, significance=0.0),
        lambda: one_run_epsilon(10, 5, 5, delta=1.0, significance=0.05),
        lambda: clopper_pearson_epsilon(3, 2, 0, 2, delta=0.0, significance=0.05),
        lambda: one_run_bound({"a": np.zeros(5)}, np.zeros(5, dtype=bool), delta=0.0),
        lambda: one_run_bound({"a": np.zeros(5)}, np.zeros(50, dtype=bool), delta=0.0),
        lambda: cosine_estimate([0.1] * 3, 100, 1e-5),
        lambda: cosine_estimate([1.5] * 9, 100, 1e-5),
    ],
)
def test_figures_that_mean_nothing_are_refused(call: object) -> None:
    with pytest.raises(PlanError, match="expected"):
        call()  # type: ignore[operator]
