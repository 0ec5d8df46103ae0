"""What the guesses of an attacker prove about epsilon: pure statistics, no data and no model.

An accountant bounds epsilon from above, an attack bounds it from below. If the lower bound passes the upper one, either
the accountant or the program is wrong (up to the stated confidence). A low lower bound proves nothing: the attack may
be weak. Every bound here has a *ceiling*, what it would say if every guess were right: a claim above the ceiling can
never be contradicted by that many guesses, so an audit says its ceiling.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Final

import numpy as np

from privacy.plan import require

_NORMAL: Final = NormalDist()
# Beyond this no attack of ours can say anything; searches end here.
_MOST_EPSILON: Final = 200.0
_PRECISION: Final = 1e-7


def _check(canaries: int, guesses: int, correct: int, significance: float, delta: float) -> None:
    require(
        1 <= canaries and 0 <= correct <= guesses <= canaries,
        f"expected 0 <= correct <= guesses <= canaries, got {correct}, {guesses} and {canaries}",
    )
    require(0 < significance < 1, f"expected 0 < significance < 1, got {significance!r:.40}; 0.05 is customary")
    require(0 <= delta < 1, f"expected 0 <= delta < 1, got {delta!r:.40}")


def _largest(refuted: Callable[[float], bool], most: float = _MOST_EPSILON) -> float:
    """Returns the largest value that is refuted, rounded down; 0 where none is, ``most`` where all are."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
        if low >= most:
            return most
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


# One run (many canaries in one training) ---------------------------------------------------------------------------


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Returns how likely so many right guesses are at most, if the training were (epsilon, delta)-DP.

    With ``q = e^epsilon / (1 + e^epsilon)`` and a binomial ``B(guesses, q)``::

        p = min{1, Pr[B >= correct] + 2 * canaries * delta * max_i (1/i) Pr[correct - i <= B < correct]}

    Args:
        canaries: How many records had a fair coin of their own, m.
        guesses: How many of these were guessed, r; on the others the attacker abstained.
        correct: How many guesses were right, v.
        epsilon: The claim, >= 0.
        delta: The claim, in [0, 1).

    References:
        Steinke, Nasr & Jagielski (2023), "Privacy auditing with one (1) training run", theorem 5.2.
    """
    from scipy.stats import binom

    _check(canaries, guesses, correct, 0.5, delta)
    if correct == 0:
        return 1.0
    rate = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, rate))
    if delta == 0:
        return min(1.0, beta)
    # below[i - 1] = Pr[correct - i <= B < correct]
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, rate))
    alpha = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, beta + 2 * canaries * delta * alpha)


def one_run_epsilon(canaries: int, guesses: int, correct: int, *, delta: float, significance: float) -> float:
    """Returns the largest epsilon that one run's guesses refute; 0 where they refute none.

    Guarantees:
        Confidence: if the training is (epsilon, delta)-DP, the result exceeds epsilon with probability at most
            ``significance``, over coins and training; ``guesses`` must be fixed before the coins are looked at.

    Args:
        canaries: Records with a fair coin of their own, m.
        guesses: Guessed canaries, r.
        correct: Right guesses, v.
        delta: At which epsilon is to hold, in [0, 1).
        significance: In (0, 1).

    References:
        Steinke, Nasr & Jagielski (2023).
    """
    _check(canaries, guesses, correct, significance, delta)
    return _largest(lambda epsilon: one_run_p_value(canaries, guesses, correct, epsilon, delta) < significance)


def ceiling(canaries: int, guesses: int, *, delta: float, significance: float) -> float:
    """Returns what `one_run_epsilon` would say if every guess were right: no higher claim can be contradicted."""
    return one_run_epsilon(canaries, guesses, guesses, delta=delta, significance=significance)


def _refutes_curve(
    inverse: Callable[[float], float], canaries: int, guesses: int, correct: int, significance: float
) -> bool:
    """Whether so many right guesses have probability below ``significance`` under a trade-off curve f.

    Args:
        inverse: Inverse of the blow-up ``x -> 1 - f(x)``, from [0, 1] to [0, 1], non-decreasing.
        canaries: m.
        guesses: r.
        correct: v.
        significance: In (0, 1).

    References:
        Mahloujifar, Melis & Chaudhuri (2024), algorithm 3, with two hypotheses for each canary.
    """
    right = significance * correct / canaries
    wrong = significance * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        raised = max(wrong, inverse(right))
        if raised == wrong:
            break
        right, wrong = min(1.0, right + i / (guesses - i) * (raised - wrong)), raised
    return right + wrong > guesses / canaries


def one_run_epsilon_fdp(canaries: int, guesses: int, correct: int, *, delta: float, significance: float) -> float:
    """Returns the largest epsilon that one run's guesses refute, by the recursion on (epsilon, delta)'s own curve.

    It assumes no more than `one_run_epsilon` does, and is the better of the two where delta counts.

    Args:
        canaries: m.
        guesses: r, fixed in advance.
        correct: v.
        delta: In [0, 1).
        significance: In (0, 1).

    References:
        Mahloujifar, Melis & Chaudhuri (2024), "Auditing f-differential privacy in one run", on the trade-off curve of
        Wasserman & Zhou (2010): ``f(x) = max(0, 1 - delta - e^epsilon x, e^-epsilon (1 - delta - x))``.
    """
    _check(canaries, guesses, correct, significance, delta)

    def refuted(epsilon: float) -> bool:
        odds = math.exp(epsilon)
        return _refutes_curve(
            lambda y: max(0.0, (y - delta) / odds, 1 - delta - odds * (1 - y)), canaries, guesses, correct, significance
        )

    return _largest(refuted)


def one_run_mu_fdp(canaries: int, guesses: int, correct: int, *, significance: float) -> float:
    """Returns the largest mu such that one run's guesses refute "no worse than a Gaussian with separation mu".

    Much stronger than the bounds for any (epsilon, delta): it may contradict a claim that the mechanism *is* such a
    Gaussian (all records in every step), and no other claim. `gaussian_epsilon` says what mu means.

    Args:
        canaries: m.
        guesses: r, fixed in advance.
        correct: v.
        significance: In (0, 1).

    References:
        Mahloujifar, Melis & Chaudhuri (2024); Dong, Roth & Su (2022), "Gaussian differential privacy".
    """
    _check(canaries, guesses, correct, significance, 0.0)

    def refuted(mu: float) -> bool:
        def inverse(y: float) -> float:
            return y if y <= 0 or y >= 1 else _NORMAL.cdf(_NORMAL.inv_cdf(y) - mu)

        return _refutes_curve(inverse, canaries, guesses, correct, significance)

    return _largest(refuted, most=40.0)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Returns the exact epsilon of a Gaussian mechanism with separation ``mu = sensitivity / sigma``, rounded down.

    References:
        Balle & Wang (2018), theorem 8.
    """
    require(mu >= 0 and 0 < delta < 1, f"expected mu >= 0 and 0 < delta < 1, got {mu!r:.40} and {delta!r:.40}")
    return two_gaussians_epsilon(1.0, mu, 1.0, delta) if mu > 0 else 0.0


# Two groups (many trainings, or members and others of one) -----------------------------------------------------------


def clopper_pearson_epsilon(
    true_positives: int,
    members: int,
    false_positives: int,
    others: int,
    *,
    delta: float,
    significance: float,
) -> float:
    """Returns the epsilon that one threshold's rates refute: ``ln((TPR - delta) / FPR)``, or its mirror image.

    Both rates are replaced by exact confidence limits, each at half the significance. The counted decisions must be
    independent, as of separate trainings are; within one training they are not, and `one_run_epsilon` is the bound.

    Args:
        true_positives: Members that were called members.
        members: How many there were, >= 1.
        false_positives: Others that were called members.
        others: How many there were, >= 1.
        delta: In [0, 1).
        significance: In (0, 1).

    References:
        Clopper & Pearson (1934); Jagielski, Ullman & Oprea (2020), "Auditing differentially private machine learning".
    """
    _check(1, 0, 0, significance, delta)
    hit, alarm = _rates(true_positives, members, false_positives, others, significance)
    bounds = [0.0]
    # The mirror image: calling nobody a member is as good a test, and uses the same two limits.
    for top, bottom in ((hit - delta, alarm), (1 - alarm - delta, 1 - hit)):
        if top > 0:
            bounds.append(math.log(top / bottom) if bottom > 0 else _MOST_EPSILON)
    return max(bounds)


def _rates(
    true_positives: int, members: int, false_positives: int, others: int, significance: float
) -> tuple[float, float]:
    """Returns the least true-positive and the largest false-positive rate that the counts leave possible."""
    from scipy.stats import beta

    for some, total in ((true_positives, members), (false_positives, others)):
        require(0 <= some <= total and total >= 1, f"expected a count from 0 to {total} of at least one, got {some}")
    side = significance / 2
    hit = float(beta.ppf(side, true_positives, members - true_positives + 1)) if true_positives else 0.0
    missed = others - false_positives
    alarm = float(beta.ppf(1 - side, false_positives + 1, missed)) if missed else 1.0
    return hit, alarm


def clopper_pearson_mu(
    true_positives: int, members: int, false_positives: int, others: int, *, significance: float
) -> float:
    """Returns the separation that one threshold's rates refute, where the mechanism is claimed to be a Gaussian.

    ``mu = Phi^-1(TPR) - Phi^-1(FPR)`` with exact confidence limits, so that it is nearly tight after a few thousand
    independent trainings. `gaussian_epsilon` says what it means.

    Args:
        true_positives: Members that were called members.
        members: How many there were, >= 1.
        false_positives: Others that were called members.
        others: How many there were, >= 1.
        significance: In (0, 1).

    References:
        Nasr et al. (2023), "Tight auditing of differentially private machine learning".
    """
    _check(1, 0, 0, significance, 0.0)
    hit, alarm = _rates(true_positives, members, false_positives, others, significance)
    if not 0 < hit or not alarm < 1:
        return 0.0
    # Limits of 1 and 0 do not occur: both are exact for finitely many trainings.
    return max(0.0, _NORMAL.inv_cdf(hit) - _NORMAL.inv_cdf(alarm))


# Canary clients ------------------------------------------------------------------------------------------------------


def two_gaussians_epsilon(null_std: float, mean: float, std: float, delta: float) -> float:
    """Returns the exact epsilon between N(0, null_std^2) and N(mean, std^2) at delta, the larger of both directions.

    Args:
        null_std: > 0.
        mean: Any.
        std: > 0.
        delta: In (0, 1).

    References:
        Andrew et al. (2023), "One-shot empirical privacy estimation for federated learning", section 3.
    """
    require(null_std > 0 and std > 0 and 0 < delta < 1, "expected positive deviations and 0 < delta < 1, got others")
    pair = ((0.0, null_std), (mean, std))

    def above(epsilon: float) -> bool:
        return max(_hockey_stick(*pair, epsilon), _hockey_stick(*pair[::-1], epsilon)) > delta

    return _largest(above, most=1e6)


def _hockey_stick(one: tuple[float, float], other: tuple[float, float], epsilon: float) -> float:
    """Returns ``max over events E of Pr_one[E] - e^epsilon Pr_other[E]`` for two Gaussians (mean, deviation)."""
    from scipy.special import log_ndtr

    (m1, s1), (m2, s2) = one, other
    # The log of the density ratio, a x^2 + b x + c, exceeds epsilon on the best event.
    a = 0.5 * (s2**-2 - s1**-2)
    b = m1 / s1**2 - m2 / s2**2
    c = 0.5 * ((m2 / s2) ** 2 - (m1 / s1) ** 2) + math.log(s2 / s1) - epsilon
    # Relative to b: deviations that agree to rounding make a line, not a parabola.
    if abs(a) < 1e-12 * max(1e-300, abs(b)):
        if b == 0:
            return 0.0  # Equal laws: nothing tells them apart.
        edges = [(-c / b, math.inf)] if b > 0 else [(-math.inf, -c / b)]
    else:
        root = b * b - 4 * a * c
        if root <= 0:
            edges = [(-math.inf, math.inf)] if a > 0 else []
        else:
            # Without cancellation: the larger root first, the other from their product.
            half = -0.5 * (b + math.copysign(math.sqrt(root), b))
            low, high = sorted((half / a, c / half))
            edges = [(low, high)] if a < 0 else [(-math.inf, low), (high, math.inf)]

    def mass(mean: float, std: float, shift: float) -> float:
        total = 0.0
        for low, high in edges:
            left, right = (low - mean) / std, (high - mean) / std
            # Of the two tails the one that does not cancel.
            if left > 0:
                left, right = -right, -left
            top, bottom = float(log_ndtr(right)), float(log_ndtr(left))
            if top == -math.inf:
                continue
            total += math.exp(min(700.0, top + shift)) * -math.expm1(min(0.0, bottom - top))
        return total

    return max(0.0, mass(m1, s1, 0.0) - mass(m2, s2, epsilon))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineEstimate:
    """The canary-client estimate. An *estimate*, without confidence: it is not a lower bound.

    Attributes:
        epsilon: Estimated epsilon at ``delta``.
        delta: In (0, 1).
        mean: Mean cosine of the canaries that took part.
        std: Their standard deviation.
        canaries: How many took part.
        dimension: Length of an update, P.
    """

    epsilon: float
    delta: float
    mean: float
    std: float
    canaries: int
    dimension: int


def cosine_estimate(cosines: Sequence[float], dimension: int, delta: float) -> CosineEstimate:
    """Estimates epsilon of a client-level run from the cosines between canary clients' updates and the final update.

    A canary client's update is a direction uniform on the sphere, scaled to the clip. Of canaries that took no part the
    cosine is known: its square root of the dimension is nearly standard normal; below 1,000 dimensions the exact law,
    ``(1 + cosine) / 2 ~ Beta((P - 1) / 2, (P - 1) / 2)``, is used. Those that took part are fitted by a Gaussian.

    Args:
        cosines: Cosines of canaries that took part, each in [-1, 1], at least 8.
        dimension: Length of an update, P >= 2.
        delta: In (0, 1).

    References:
        Andrew et al. (2023), algorithm 1.
    """
    require(len(cosines) >= 8, f"expected the cosines of at least 8 canary clients, got {len(cosines)}")
    require(all(-1.000001 <= cosine <= 1.000001 for cosine in cosines), "expected cosines in [-1, 1], got others")
    require(dimension >= 2 and 0 < delta < 1, f"expected dimension >= 2 and 0 < delta < 1, got {dimension} and {delta}")
    mean, std = fmean(cosines), stdev(cosines)
    # Equal cosines would be a perfect canary; a deviation of zero only means too few digits.
    std = max(std, 1e-9)
    if dimension >= 1000:
        epsilon = two_gaussians_epsilon(dimension**-0.5, mean, std, delta)
    else:
        epsilon = _small_dimension_epsilon(mean, std, dimension, delta)
    return CosineEstimate(epsilon=epsilon, delta=delta, mean=mean, std=std, canaries=len(cosines), dimension=dimension)


def _small_dimension_epsilon(mean: float, std: float, dimension: int, delta: float) -> float:
    """Returns the largest epsilon that any threshold on the cosine implies, under the exact law of unseen canaries."""
    from scipy.stats import beta, norm

    law = beta((dimension - 1) / 2, (dimension - 1) / 2, loc=-1, scale=2)
    # Up to where even the seen canaries stay below with all but delta: beyond, a threshold says nothing.
    edge = min(1.0, float(norm.isf(delta, mean, std)))
    thresholds = np.linspace(float(law.ppf(delta)), max(edge, -1.0), 10_001)
    seen, unseen = norm.logsf(thresholds, mean, std), law.logsf(thresholds)
    miss, rest = norm.logcdf(thresholds, mean, std), law.logcdf(thresholds)
    best = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        for top, bottom in ((seen, unseen), (rest, miss)):
            gain = np.log(np.maximum(np.exp(top) - delta, 0.0)) - bottom
            best = max(best, float(np.nanmax(np.where(np.isfinite(gain), gain, -np.inf))))
    return best


# From scores to guesses ----------------------------------------------------------------------------------------------


def _highest(canaries: int, guesses: int, delta: float, significance: float, gaussian: bool) -> float:
    """Returns what the best bound would say if every guess were right, the Gaussian's own included where it is one."""
    tops = [
        ceiling(canaries, guesses, delta=delta, significance=significance),
        one_run_epsilon_fdp(canaries, guesses, guesses, delta=delta, significance=significance),
    ]
    if gaussian and delta > 0:
        tops.append(gaussian_epsilon(one_run_mu_fdp(canaries, guesses, guesses, significance=significance), delta))
    return max(tops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneRunBound:
    """What the canaries of one training prove.

    Attributes:
        canaries: m.
        guesses: r of the best grid point.
        correct: v of the best grid point.
        epsilon: The better of the two rigorous lower bounds, each corrected for everything that was tried.
        binomial: Lower bound by `one_run_epsilon`, best of the grid.
        fdp: Lower bound by `one_run_epsilon_fdp`, best of the grid.
        gaussian: `one_run_mu_fdp` as epsilon: a bound only where every record is in every step; 0 where not asked.
        mu: The refuted separation behind ``gaussian``.
        ceiling: What the best of these bounds would say at most, were every guess right; never below any of them.
        delta: At which the figures hold.
        confidence: Of all figures together.
        tried: How many figures the significance was divided by.
        attack: Name of the score that gave ``epsilon``.
    """

    canaries: int
    guesses: int
    correct: int
    epsilon: float
    binomial: float
    fdp: float
    gaussian: float
    mu: float
    ceiling: float
    delta: float
    confidence: float
    tried: int
    attack: str


GRID: Final = (0.1, 0.3, 1.0)
"""Shares of the canaries that are guessed; fixed here, so that no result had a part in choosing them."""


def count_correct(scores: np.ndarray, included: np.ndarray, guesses: int) -> int:
    """Returns how many of ``guesses`` guesses are right: the upper half of them "in", the lower half "out".

    Args:
        scores: One a canary, higher where it looks included, float ``(m,)``.
        included: The coins, bool ``(m,)``; they decide which guesses were right, never which are made.
        guesses: r in [2, m]; an odd one has its extra guess among the highest.
    """
    # Stable, and by place where scores are equal: places know nothing of coins.
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    highest, lowest = guesses - guesses // 2, guesses // 2
    picked = np.asarray(included, dtype=bool)[order]
    return int(picked[:highest].sum() + (~picked[len(picked) - lowest :]).sum())


def one_run_bound(
    scores: dict[str, np.ndarray],
    included: np.ndarray,
    *,
    delta: float,
    significance: float = 0.05,
    gaussian: bool = False,
    grid: Sequence[float] = GRID,
) -> OneRunBound:
    """Returns what the scores of one training prove, corrected for everything that was tried (Bonferroni).

    Args:
        scores: Attacks by name; each one score a canary, float ``(m,)``, from the output of the training alone.
        included: The independent fair coins, bool ``(m,)``, m >= 20.
        delta: In [0, 1).
        significance: Of all figures together, in (0, 1).
        gaussian: Whether the mechanism is a plain Gaussian, so that `one_run_mu_fdp` is a bound as well.
        grid: Shares of the canaries that are guessed, fixed in advance, each in (0, 1].
    """
    canaries = len(included)
    require(canaries >= 20, f"expected at least 20 canaries, got {canaries}; fewer prove nothing")
    require(len(scores) >= 1 and len(grid) >= 1, "expected at least one attack and one share of guesses, got none")
    tried = len(scores) * len(grid) * (3 if gaussian else 2)
    each = significance / tried
    counts = sorted({max(2, min(canaries, round(share * canaries))) for share in grid})
    best: tuple[float, int, int, str] | None = None
    binomial = fdp = mu = 0.0
    for name, score in scores.items():
        require(np.shape(score) == (canaries,), f"expected one score for each of {canaries} canaries, got others")
        # A score that is not a number knows nothing; left in, it would decide the order.
        clean = np.nan_to_num(np.asarray(score, dtype=np.float64), nan=0.0, posinf=1e300, neginf=-1e300)
        for guesses in counts:
            correct = count_correct(clean, included, guesses)
            one = one_run_epsilon(canaries, guesses, correct, delta=delta, significance=each)
            two = one_run_epsilon_fdp(canaries, guesses, correct, delta=delta, significance=each)
            binomial, fdp = max(binomial, one), max(fdp, two)
            if gaussian:
                mu = max(mu, one_run_mu_fdp(canaries, guesses, correct, significance=each))
            # Where nothing is refuted, the most significant guesses are shown.
            rank = max(one, two) or (correct / guesses - 1.0) * 1e-3
            if best is None or rank > best[0]:
                best = (rank, guesses, correct, name)
    if best is None:
        raise ValueError("unreachable: the grid is not empty")
    return OneRunBound(
        canaries=canaries,
        guesses=best[1],
        correct=best[2],
        epsilon=max(binomial, fdp),
        binomial=binomial,
        fdp=fdp,
        gaussian=gaussian_epsilon(mu, delta) if gaussian and delta > 0 else 0.0,
        mu=mu,
        ceiling=max(_highest(canaries, guesses, delta, each, gaussian) for guesses in counts),
        delta=delta,
        confidence=1 - significance,
        tried=tried,
        attack=best[3],
    )
