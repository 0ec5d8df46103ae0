"""What replacing one record costs, by an accountant that shares nothing with the privacy loss distributions.

`privacy.accounting.pld_epsilon` prices replacing with dp-accounting. Here the same figure is computed another way, from
the densities themselves: no library of accounting, no grid of losses, no rounding of them.

**The pair.** One Poisson-sampled step, sensitivity 1 and noise s, one record replaced by another, is never easier to
tell apart than ::

    P = (1 - q) N(0, s^2) + q N(+1, s^2)    from    Q = (1 - q) N(0, s^2) + q N(-1, s^2)

Proof. Fix what else was sampled: both sides are mixtures over it with the same weights, and hockey-stick divergence is
jointly convex. Then the two records add g and h of length at most 1 to one sum. Let a test have probability f under
N(0). By Neyman and Pearson it has at most Phi(Phi^-1(f) + |g| / s) under N(g) and at least Phi(Phi^-1(f) - |h| / s)
under N(h), so for every gamma >= 0 what it gains, P(f) - gamma Q(f), is at most ::

    (1 - q) (1 - gamma) f + q (Phi(Phi^-1(f) + 1 / s) - gamma Phi(Phi^-1(f) - 1 / s))

A half line gains as much under the pair above, for every f. So the pair dominates at every gamma, hence for every Renyi
divergence and under adaptive composition (Zhu, Dong & Wang 2022, "Optimal accounting of differential privacy via
characteristic function"). At q = 1 it is a Gaussian of twice the sensitivity. A record may have length 0, so adding or
removing one is a kind of replacing, and never costs more.

**The figure.** With the loss L = log P / Q and its moments M(z) = E_P[e^(z L)], for any c > 0 ::

    delta(epsilon) = 1 / (2 pi i) * integral over c + i R of e^(K(z) - z epsilon) / (z (z + 1)) dz,  K = sum of log M

Integrand and moments are analytic, so trapezoids converge exponentially, and at the order that is best for RDP nothing
cancels.

References:
    Alghamdi et al. (2023), "The saddle-point method in differential privacy", for the contour.
    Trefethen & Weideman (2014), "The exponentially convergent trapezoidal rule", for its error.
    Balle & Wang (2018), theorem 8, where nothing is sampled.
"""

from __future__ import annotations

import functools
import math
from typing import Final, TypeAlias

import numpy as np

from privacy.accounting import Event, Releases, least_order, merged
from privacy.bounds import gaussian_epsilon
from privacy.plan import require

_Array: TypeAlias = np.ndarray

# Below this share of the largest term nothing is left that a float could add.
_SPAN: Final = 40.0
# Points of the one integral times points of the other: a second or two. Few steps at a low rate would need more.
_MOST_WORK: Final = 10**9
_MOST_HEIGHTS: Final = 2_000_000
_MOST_POINTS: Final = 400_000
# So many steps repeat the rounding of one step's moment to 1e-8.
_MOST_STEPS: Final = 10**7
# As in `privacy.accounting`: no budget pays for less noise.
_LEAST_NOISE: Final = 0.01
_MOST_NOISE: Final = 1e6
_MOST_SEPARATION: Final = 1000.0
# Two spacings of the contour must agree to this, relatively.
_RESOLVED: Final = 1e-6


def replace_rdp(releases: Releases, order: float) -> float:
    """Returns an upper bound on the Renyi divergence of releases between neighbours that differ in one whole record.

    Args:
        releases: What was released; the bounds of several events add up.
        order: Renyi order > 1.
    """
    history = (releases,) if isinstance(releases, Event) else releases
    return sum(event.steps * _log_moment(*_law(event), order - 1) for event in history) / (order - 1)


def replace_rdp_epsilon(releases: Releases, delta: float) -> float:
    """Returns an epsilon for replacing a record that always holds, by RDP at the best order; looser than the others.

    Args:
        releases: A schedule or history committed before its first release.
        delta: Probability in (0, 1).
    """
    history = merged(releases)
    return least_order(lambda order: replace_rdp(history, order), delta)[1]


def replace_epsilon(releases: Releases, delta: float) -> tuple[float | None, str]:
    """Returns the tight epsilon for replacing a record, and how it was found; None and the reason where it was not.

    Guarantees:
        Independent: of `privacy.accounting.pld_epsilon` it shares the releases alone.
        Resolved: the integral was computed with two spacings, whose epsilons agree to one millionth; otherwise there is
            no figure. It is a cross-check in floating point, no bound: `replace_rdp_epsilon` is one.

    Args:
        releases: A schedule or history committed before its first release.
        delta: Probability in (0, 1).
    """
    require(0 < delta < 1, f"expected 0 < delta < 1, got {delta!r:.40}")
    return _replace_epsilon(merged(releases), delta)


@functools.lru_cache(maxsize=4096)
def _replace_epsilon(history: tuple[Event, ...], delta: float) -> tuple[float | None, str]:
    laws = [(*_law(event), event.steps) for event in history]
    if min(noise for _, noise, _ in laws) < _LEAST_NOISE:
        return None, "not asked: so little noise has no price that matters"
    if all(rate == 1 for rate, _, _ in laws):
        # Gaussians compose to one, and replacing moves its mean by twice the sensitivity.
        mu = 2 * math.sqrt(sum(event.steps * (1 / event.noise_multiplier) ** 2 for event in history))
        if mu > _MOST_SEPARATION:
            return None, "not asked: so large a loss has no price that matters"
        return gaussian_epsilon(mu, delta), "closed form of a Gaussian at twice the sensitivity"
    if sum(event.steps for event in history) > _MOST_STEPS or max(noise for _, noise, _ in laws) >= _MOST_NOISE:
        return None, "not asked: more steps or more noise than floating point resolves"
    order, bound = least_order(lambda order: replace_rdp(history, order), delta)
    found = _on_the_contour(laws, math.log(delta), order - 1, bound)
    return (
        (None, "not resolved: few steps, a low rate or little noise")
        if found is None
        else (found, "saddle-point integral")
    )


def _law(event: Event) -> tuple[float, float]:
    """Returns an event's rate and noise, rounded where that only makes it dearer."""
    rate = float(event.sample_rate)
    return (1.0 if rate >= 1 - 2**-30 else rate), min(float(event.noise_multiplier), _MOST_NOISE)


def _points(rate: float, noise: float, c: float, height: float) -> _Array | None:
    """Returns the points at which one step's densities are added up; None where they would be too many.

    The tilted density P^(1+c) Q^-c has its mass between the means 0 and 1 + 2c. The trapezoid's frequency must exceed
    the fastest turn of e^(i height L), whose loss L has slopes up to 2 / s^2 (1 / s^2 at low rates), by what makes the
    rest vanish: e^-40 for a Gaussian of that deviation, and for a function that is analytic up to pi s^2 away from the
    real line, where a mixture has its zeros.
    """
    low, high = -1 - 12 * noise, 2 + 2 * c + 12 * noise
    slope = max(1.0, 2 * rate) / noise**2
    spacing = 2 * math.pi / (1.2 * slope * height + max(25 / noise, 19 / noise**2))
    count = (high - low) / spacing
    return np.linspace(low, high, math.ceil(count) + 1) if count <= _MOST_POINTS else None


def _tilted(rate: float, noise: float, c: float, points: _Array) -> tuple[float, _Array, _Array]:
    """Returns of P(x) e^(c L(x)) its largest logarithm, the shares of it at the points that count, and their losses."""
    shift, half = points / noise**2, 0.5 / noise**2
    none, some = math.log1p(-rate), math.log(rate)
    # Both densities divided by that of N(0).
    one, other = np.logaddexp(none, some + shift - half), np.logaddexp(none, some - shift - half)
    spacing = float(points[1] - points[0])
    scale = math.log(spacing / (noise * math.sqrt(2 * math.pi)))
    logs = scale - 0.5 * (points / noise) ** 2 + one + c * (one - other)
    top = float(logs.max())
    counts = logs > top - _SPAN
    return top, np.exp(logs[counts] - top), (one - other)[counts]


@functools.lru_cache(maxsize=65536)
def _log_moment(rate: float, noise: float, c: float) -> float:
    """Returns an upper bound on log E_P[e^(c L)] of one step, which is c times its divergence at order 1 + c."""
    if noise < _LEAST_NOISE:
        return math.inf
    whole = c * (c + 1) * 2 / noise**2
    points = None if rate == 1 else _points(rate, noise, c, 0.0)
    if points is None:
        # Divergence is quasi-convex, so a step in which every record takes part is the worst.
        return whole
    top, shares, _ = _tilted(rate, noise, c, points)
    # Rounding may have either sign, and many steps repeat it.
    return min(whole, max(0.0, top + math.log(float(shares.sum()))) + 1e-12)


def _on_the_contour(laws: list[tuple[float, float, int]], log_delta: float, c: float, bound: float) -> float | None:
    """Returns the epsilon at which delta(epsilon) is the one asked for; None where the integral is not resolved.

    Args:
        laws: Rate, noise and number of steps of each kind of step.
        log_delta: Of the delta that is asked for.
        c: Where the contour crosses the real axis, > 0.
        bound: An epsilon that is known to be enough.
    """
    variance = sum(steps * _variance(rate, noise, c) for rate, noise, steps in laws)
    if bound == 0 or variance < 1e-24:
        # Delta alone pays for it; what is left of so small a loss is rounding.
        return 0.0 if bound == 0 else None
    deviation = math.sqrt(variance)
    end = _end(laws, c, 4 / deviation)
    # The nearest pole is c away from the contour; half as many points must do as well.
    spacing = min(2 * math.pi * c / 36, 2 * math.pi / (24 * deviation))
    for _ in range(4):
        if end / spacing > _MOST_HEIGHTS:
            return None
        heights = np.arange(0.0, end + 2 * spacing, spacing)
        logs = _log_integrand(laws, c, heights)
        if logs is None:
            return None
        fine = _solve(logs, c, heights, log_delta, bound)
        coarse = _solve(logs[::2], c, heights[::2], log_delta, bound)
        if abs(fine - coarse) <= _RESOLVED * max(1e-3, fine):
            return fine
        spacing /= 2
    return None


def _variance(rate: float, noise: float, c: float) -> float:
    """Returns the variance of one step's loss under the tilted density."""
    points = None if rate == 1 else _points(rate, noise, c, 0.0)
    if points is None:
        return 4 / noise**2
    _, shares, losses = _tilted(rate, noise, c, points)
    mean = float(shares @ losses / shares.sum())
    return float(shares @ (losses - mean) ** 2 / shares.sum())


def _end(laws: list[tuple[float, float, int]], c: float, first: float) -> float:
    """Returns a height on the contour beyond which nothing is left that counts."""
    height = first
    while height < 1e12:
        # A single height might be a zero of the integrand.
        logs = _log_integrand(laws, c, np.concatenate([[0.0], height * np.linspace(1.0, 1.5, 7)]))
        if logs is None or float(logs[1:].real.max() - logs[0].real) < -_SPAN * 0.8:
            break
        height *= 1.5
    return height


def _log_integrand(laws: list[tuple[float, float, int]], c: float, heights: _Array) -> _Array | None:
    """Returns K(z) - log(z (z + 1)) at z = c + i t for each height t; None where that is too much work."""
    z = c + 1j * heights
    total = -np.log(z) - np.log(z + 1)
    for rate, noise, steps in laws:
        if rate == 1:
            total = total + steps * 2 * z * (z + 1) / noise**2
            continue
        points = _points(rate, noise, c, float(heights[-1]))
        if points is None:
            return None
        top, shares, losses = _tilted(rate, noise, c, points)
        if len(losses) * len(heights) > _MOST_WORK:
            return None
        # A zero of the moment stays below everything that counts.
        moments = _moments(shares, losses, heights) + 1e-300
        total = total + steps * (top + np.log(moments))
    return total


def _moments(shares: _Array, losses: _Array, heights: _Array) -> _Array:
    """Returns sum of shares * e^(i t losses) for each height t, heights being evenly spaced or few."""
    if len(heights) < 16:
        few: _Array = np.exp(1j * np.outer(heights, losses)) @ shares
        return few
    # t = t1 + t2: the exponentials of a few t1 and t2 give those of all sums by one product of matrices.
    step, width = float(heights[1] - heights[0]), math.isqrt(len(heights)) + 1
    blocks = -(-len(heights) // width)
    out = np.zeros((blocks, width), dtype=complex)
    for first in range(0, len(losses), 1024):
        part = losses[first : first + 1024]
        slow = np.exp(1j * np.outer(np.arange(blocks) * (step * width), part)) * shares[first : first + 1024]
        out += slow @ np.exp(1j * np.outer(part, np.arange(width) * step))
    return out.ravel()[: len(heights)]


def _solve(logs: _Array, c: float, heights: _Array, log_delta: float, bound: float) -> float:
    """Returns the epsilon between 0 and the bound at which the integral over the contour is delta, or NaN."""
    z = c + 1j * heights
    weights = np.full(len(heights), float(heights[1] - heights[0]) / math.pi)
    weights[0] /= 2

    def log_delta_at(epsilon: float) -> float:
        """NaN where the terms cancel to less than they were rounded by, as they may far below the saddle point."""
        exponents = logs - z * epsilon
        top = float(exponents[0].real)
        terms = np.exp(exponents - top)
        value = float(terms.real @ weights)
        return top + math.log(value) if value > 1e-9 * float(np.abs(terms) @ weights) else math.nan

    low, high = 0.0, bound
    if log_delta_at(low) <= log_delta:
        return 0.0
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        # What is not resolved lies below: the bound is next to the saddle point.
        low, high = (low, middle) if log_delta_at(middle) <= log_delta else (middle, high)
    # A bound that is none shows an integral that is not resolved, and so does one that jumps over delta.
    return high if abs(log_delta_at(high) - log_delta) < 1e-5 else math.nan
