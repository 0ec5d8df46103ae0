"""Noise and coins: the right distribution, from the right place, never twice (guarantee G11).

Sizing: with 200 000 normal draws the variance has a standard error of sqrt(2 / 200 000) = 0.0032, so a band of
+-0.019 (six standard errors) gives a false alarm once in 5e8 runs, and a standard deviation that is off by 2 %
(variance off by 0.040) is rejected with probability above 0.9999999. All other bands are six standard errors too.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from privacy.noise import SECURE_SOURCE, Keystream, box_muller

DRAWS = 200_000
SIX = 6 / math.sqrt(DRAWS)

pytestmark = pytest.mark.statistical


def is_standard_normal(values: torch.Tensor) -> bool:
    """Mean, variance, kurtosis and the whole distribution function, each with a false-alarm rate below 3e-9."""
    draws = values.numpy()
    root = math.sqrt(draws.size)
    return bool(
        abs(draws.mean()) < 6 / root
        and abs(draws.var() - 1) < 6 * math.sqrt(2) / root
        and abs(stats.kurtosis(draws)) < 6 * math.sqrt(24) / root
        # Kolmogorov's tail: P(sqrt(n) D > 3.3) = 2 exp(-2 * 3.3**2) = 7e-10.
        and stats.kstest(draws, "norm").statistic * root < 3.3
    )


def are_independent(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Neither the numbers nor their squares are correlated; Box-Muller pairs share a radius, so squares matter."""
    bound = 6 / math.sqrt(left.numel())
    pairs = [(left, right), (left**2, right**2), (left, right**2)]
    return all(abs(float(np.corrcoef(a.numpy(), b.numpy())[0, 1])) < bound for a, b in pairs)


def has_rate(coins: torch.Tensor, rate: float) -> bool:
    """Whether the share of true coins lies within six standard errors of the rate."""
    return abs(float(coins.double().mean()) - rate) <= 6 * math.sqrt(rate * (1 - rate) / coins.numel())


def test_g11_noise_is_standard_normal() -> None:
    assert is_standard_normal(Keystream().gaussian(DRAWS))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * 1.02,
        lambda x: x * 0.98,
        lambda x: x * 0.5,
        lambda x: x + 0.02,
        lambda x: torch.cat((x[: len(x) // 2], torch.zeros(len(x) - len(x) // 2, dtype=x.dtype))),
        lambda x: torch.sign(x) * x.abs().clamp(max=2.0),
        lambda x: (torch.special.ndtr(x) - 0.5) * math.sqrt(12),
    ],
    ids=["2% more", "2% less", "half", "shifted", "half of it missing", "tail cut", "uniform"],
)
def test_g11_planted_wrong_noise_is_rejected(wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The bands above have power: each of these would weaken the guarantee."""
    assert not is_standard_normal(wrong(Keystream().gaussian(DRAWS)))


def test_noise_has_the_tail_of_a_normal_and_no_infinite_value() -> None:
    # 1e6 draws: 63.3 are expected beyond 4; the Poisson interval of mass 1 - 2e-9 around it.
    low, high = stats.poisson.interval(1 - 2e-9, 1_000_000 * 2 * stats.norm.sf(4))
    values = Keystream().gaussian(1_000_000).abs()
    assert low <= int((values > 4).sum()) <= high
    assert not low <= int((values.clamp(max=3.9) > 4).sum()) <= high
    assert torch.isfinite(values).all()


def test_the_extreme_words_of_the_keystream_give_finite_noise() -> None:
    """All-zero and all-one words are the ends of the uniform range, where a logarithm would be infinite."""
    words = np.array([0, 2**64 - 1, 0, 2**64 - 1, 2**63, 1, 2**64 - 1, 0], dtype=np.uint64)
    values = box_muller(words)
    assert torch.isfinite(values).all()
    assert float(values.abs().max()) <= 8.7


def test_noise_is_float64_of_the_length_asked_for() -> None:
    source = Keystream()
    for n in (0, 1, 2, 7, 1000):
        assert source.gaussian(n).shape == (n,)
        assert source.gaussian(n).dtype == torch.float64
        assert source.coins(n, 0.3).shape == (n,)
        assert source.coins(n, 0.3).dtype == torch.bool
    # A float32 value has no bits below 2**-24 of its size; nearly every float64 draw does.
    values = source.gaussian(1000)
    assert (values.float().double() != values).double().mean() > 0.99


def test_g11_noise_of_two_sources_and_of_two_rounds_is_independent() -> None:
    one, other = Keystream(), Keystream()
    first, second = one.gaussian(DRAWS), one.gaussian(DRAWS)
    assert are_independent(first, second)
    assert are_independent(first, other.gaussian(DRAWS))
    # The two halves of one draw come from the same radii and angles.
    assert are_independent(first[: DRAWS // 2], first[DRAWS // 2 :])


def test_g11_planted_dependence_is_rejected() -> None:
    values = Keystream().gaussian(DRAWS)
    radius = values[: DRAWS // 2].abs()
    sign = torch.from_numpy(np.sign(Keystream().gaussian(DRAWS // 2).numpy()))
    assert not are_independent(values, values)
    assert not are_independent(radius, radius * sign)
    assert not are_independent(values, values + 50 * Keystream().gaussian(DRAWS) / 1000)


def test_g11_no_two_keystreams_are_equal() -> None:
    starts = {Keystream().seed() for _ in range(2000)}
    # 2000 values of 63 bits collide by chance once in 4.6e12 runs.
    assert len(starts) == 2000


def test_g11_planted_reused_key_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one key for all, sources repeat each other; so the key does come from the operating system, each time."""
    with monkeypatch.context() as patch:
        patch.setattr("privacy.noise.os.urandom", lambda n: b"k" * n)
        one, other = Keystream(), Keystream()
    left, right = one.gaussian(DRAWS), other.gaussian(DRAWS)
    assert torch.equal(left, right)
    assert not are_independent(left, right)


def test_g11_a_key_is_32_fresh_bytes_of_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = os.urandom

    def spy(n: int) -> bytes:
        asked.append(n)
        return real(n)

    monkeypatch.setattr("privacy.noise.os.urandom", spy)
    Keystream(), Keystream()
    assert asked == [32, 32]


def test_torch_and_numpy_seeds_do_not_reach_the_noise() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        np.random.seed(7)
        source = Keystream()
        drawn.append((source.gaussian(4).tolist(), source.seed()))
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.01, 0.2, 0.5, 0.99, 1 - 1e-9])
def test_coins_have_their_rate(rate: float) -> None:
    n = 1_000_000
    coins = Keystream().coins(n, rate)
    # Where few coins are expected, the count is Poisson and the normal band would be too narrow.
    rare = min(rate, 1 - rate)
    if 0 < rare * n < 100:
        count = int(coins.sum()) if rate < 0.5 else n - int(coins.sum())
        assert count <= stats.poisson.isf(1e-9, rare * n)
    else:
        assert has_rate(coins, rate)


def test_planted_coins_off_by_two_percent_are_rejected() -> None:
    # Ten standard errors away: 0.204 against 0.2 +- 0.0004.
    assert not has_rate(Keystream().coins(1_000_000, 0.204), 0.2)
    assert not has_rate(Keystream().coins(1_000_000, 0.196), 0.2)


@pytest.mark.parametrize("rate", [2**-64, 1e-17, 1e-9, 1e-4, 0.1, 0.5, 0.9, 1 - 2**-53])
def test_a_coin_is_true_for_exactly_its_share_of_words(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    threshold = int(rate * 2**64)
    words = np.array([0, threshold - 1, threshold, 2**64 - 1], dtype=np.uint64)
    monkeypatch.setattr(Keystream, "_words", lambda self, n: words)
    assert Keystream().coins(4, rate).tolist() == [True, True, False, False]
    # The planted bug: a float32 uniform has 2**24 values, so no rate below 6e-8 can be right.
    float32 = (words >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    if rate < 2**-24:
        assert (float32 < rate).tolist() == [True, True, True, False]


@pytest.mark.parametrize("rate", [1, 1.0, 1 - 1e-17])
def test_coins_of_rate_one_are_all_true(rate: float) -> None:
    assert Keystream().coins(10_000, rate).all()


@pytest.mark.parametrize("rate", [math.nan, -0.1])
def test_a_rate_that_is_none_draws_no_coins(rate: float) -> None:
    with pytest.raises((ValueError, OverflowError)):
        Keystream().coins(3, rate)


def test_coins_are_independent_of_each_other_and_of_the_noise() -> None:
    source = Keystream()
    coins = source.coins(DRAWS, 0.3).double()
    assert are_independent(coins[1:], coins[:-1])
    assert are_independent(coins, source.coins(DRAWS, 0.3).double())
    assert are_independent(coins, Keystream().coins(DRAWS, 0.3).double())
    assert are_independent(coins, source.gaussian(DRAWS))
    assert not are_independent(coins, coins)


def test_g11_a_keystream_cannot_be_pickled_copied_or_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    key = bytes(range(32))
    monkeypatch.setattr("privacy.noise.os.urandom", lambda n: key[:n])
    source = Keystream()
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"single-use|pickle"):
            way(source)
    for text in (repr(source), str(source), f"{source}", repr(vars(source))):
        assert key.hex() not in text
        assert repr(key)[2:-1] not in text
    assert source.name == SECURE_SOURCE


def test_g11_planted_pickled_source_repeats_itself() -> None:
    """Why the lock is there: a source that may be copied gives the same noise twice."""
    generator = torch.Generator().manual_seed(3)
    twin = copy.deepcopy(generator)
    draws = [torch.randn(DRAWS, generator=g, dtype=torch.float64) for g in (generator, twin)]
    assert not are_independent(*draws)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_g11_a_forked_child_cannot_draw_its_parents_noise() -> None:
    source = Keystream()

    def child(pipe: multiprocessing.connection.Connection) -> None:
        try:
            pipe.send(source.seed())
        except RuntimeError as error:
            pipe.send(str(error))

    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    answer = here.recv()
    process.join()
    assert "forked copy" in str(answer)
    assert answer != source.seed()
