"""Client-level privacy at a trusted server: draw a cohort, clip, sum, add noise, divide (guarantee G16).

    draw the cohort    each client by its own secret coin at the public rate; stored before the first message
    clip               each update, again at the server, whatever the client did
    sum                in float64; a missing reply adds nothing
    add noise          once, ``noise multiplier x clip``, however many replied
    divide             by the public constant ``client_rate x number of clients``, never by who came
    keep               the noised aggregate is stored before anything else reads it (`server.central`)

What is protected is one client: everything that all its records together did to the models. Who is trusted is said
with every figure, because there are three of them:

* **The server: infinity.** It sees each update and adds the noise itself. A holder joins only where its own policy
  allows that.
* **Whoever sees who took part** (the relay, other clients, a reader of receipts or of the report): each round that a
  client took part in is one Gaussian mechanism, with no discount for the coin. That a client took part is no secret to
  them, what its records are is: the neighbour is the same client with nothing to say. This is the figure that ledgers
  charge, that noise is solved for and that a report's headline shows.
* **Somebody who sees the models alone**: Poisson sampling at the public rate over all rounds is a discount here,
  because the coins are secret. No report can show it as its headline: the report itself tells who took part.

Why there is a limit on turns, and why it harms neither figure. Under secret coins the number of rounds in which a
client takes part is random, and a budget needs a bound. A ledger that declines when it is empty would be one; but then
the plan would hope rather than say. So the plan fixes ``turns`` (as many as all but one client in a thousand would take
anyway), the server holds a client back whose coin has counted so often, and the ledger's ``joins`` pays for all turns
and for retries after a crash. What holds a client back is its own earlier coins and nothing else: never a record, a
norm, or whether it replied. The ledger's gate is the same bound once more at the holder, who need not believe the
server.

The figure for models alone survives the limit. Fix all other clients' coins, which are independent of this one's. Given
every model so far, this client's part in the next round has some chance p <= rate: the coin falls at the rate, and is
counted or not. The output is then the mixture (1 - p) P + p Q of "without it" and "with it", which is itself a mixture
of P and of (1 - rate) P + rate Q; divergences are convex, so every price at the rate holds for p. Rounds compose
adaptively. A reply that is late, lost or declined is the case Q = P. For the same reason a job ends after its rounds
and never because too few replied: an early end would tell about coins.

With banded noise (`privacy.matrix`) two steps differ. Nobody is drawn: classes of clients take turns in public, and no
figure has a discount. And the noise is a row of one matrix over all rounds, added by `privacy.matrix.CorrelatedNoise`,
which keeps it; the clipped sum and the divisor are those of here.

The noise is floating point with the caveat of `privacy.noise`. Clipping leaves a margin of 2^-20 below the bound, which
covers the rounding of sums of up to 65,000 updates.

References:
    McMahan et al. (2018), "Learning differentially private recurrent language models" (DP-FedAvg, fixed denominator);
    Andrew et al. (2021), "Differentially private learning with adaptive clipping".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from privacy.noise import RandomSource
from privacy.plan import Plan, Unit, require

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]
Sum = np.ndarray[tuple[int], np.dtype[np.float64]]

# The rounding of a float64 sum of n vectors of norm C moves it by less than 2 n^2 2^-53 C.
_MARGIN: Final = 1 - 2.0**-20
# The clip follows noisy bits; far beyond any use it must still be a finite number above zero.
_SPAN: Final = 2.0**40
_HELD_BACK: Final = 1e-3

# The array beside an update that says whether it was within the clip; no model of ours has a parameter of that name.
BIT: Final = "bit:within-the-clip"


@dataclasses.dataclass(frozen=True, eq=False)
class Contribution:
    """What one client sent.

    Attributes:
        update: Difference to the round's starting model, float32 ``(P,)``; nothing about it is trusted.
        bit: 1.0 where the client says that its update was within the clip before it clipped it. Anything but exactly 1
            counts as "beyond". Not read where the clip is fixed.
    """

    update: Vector
    bit: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Aggregate:
    """What a round releases.

    Attributes:
        mean: Noised sum of clipped updates over the public divisor, float32 ``(P,)``.
        clip: The next round's clip, > 0; the same one where it is fixed.
    """

    mean: Vector
    clip: float


def turns_of(rounds: int, rate: float) -> int:
    """Returns the limit on one client's turns: the least number that all but one client in a thousand stay within.

    Args:
        rounds: Rounds of the job, >= 1.
        rate: Public rate of the coins, in (0, 1].
    """
    if rate >= 1:
        return rounds
    tail, turns = 1.0, -1
    while tail > _HELD_BACK and turns < rounds:
        turns += 1
        ways = math.lgamma(rounds + 1) - math.lgamma(turns + 1) - math.lgamma(rounds - turns + 1)
        tail -= math.exp(ways + turns * math.log(rate) + (rounds - turns) * math.log1p(-rate))
    return max(1, turns)


def update_noise(plan: Plan) -> float:
    """Returns the noise multiplier of the update alone.

    Where the clip follows a quantile, a client changes two noised sums of a round: the clipped updates by at most
    C, and the bits, of which each counts as -1/2 or +1/2, by at most 1/2. Their Gaussian mechanisms compose to exactly
    one of the plan's noise multiplier: ``z^-2 = z_update^-2 + (2 bit_noise)^-2``.

    References:
        Andrew et al. (2021), theorem 1.
    """
    require(plan.banded is None, "expected a plan of fresh noise in every round, got one of a matrix; ask its matrix")
    if not plan.quantile:
        return float(plan.noise_multiplier)
    return float((plan.noise_multiplier**-2 - (2 * plan.bit_noise) ** -2) ** -0.5)


def draw_cohort(clients: Sequence[int], counted: Mapping[int, int], plan: Plan, source: RandomSource) -> list[int]:
    """Draws who takes part in a round: secret coins, one per client, and no second try.

    Guarantees:
        Poisson: every client has a coin of its own at the public rate, whatever the others' fall; no cohort is too
            small, none is drawn again, and an empty one is legal.
        Limit: nobody is drawn more often than ``plan.turns``, and only earlier coins decide that.

    Args:
        clients: All clients of the job, in a stable order.
        counted: How often each was drawn in earlier rounds; 0 where missing.
        plan: A plan at unit client.
        source: Fresh secret coins.
    """
    require(plan.unit is Unit.CLIENT, f"expected a plan that protects clients, got one that protects {plan.unit}s")
    require(plan.banded is None, "expected a plan with coins, got one of banded noise, where classes take turns")
    coins = source.coins(len(clients), plan.client_rate).tolist()
    return [client for client, coin in zip(clients, coins, strict=True) if coin and counted.get(client, 0) < plan.turns]


def clip_update(update: Vector, clip: float) -> tuple[Sum, bool]:
    """Returns an update within the clip, and whether it was within it before.

    Guarantees:
        Bound: the result's L2 norm is at most ``clip``, whatever came; what holds a NaN or an infinity is zero.
        Total: never raises; the zero vector stays zero.

    Args:
        update: float32 ``(P,)``.
        clip: L2 bound C > 0.

    Returns:
        The clipped update, float64 ``(P,)``, and the bit.
    """
    exact = np.asarray(update, dtype=np.float64)
    # In float64 no square of a float32 overflows, so a finite update has a finite norm.
    norm = float(np.sqrt(np.dot(exact, exact))) if np.isfinite(exact).all() else math.inf
    if not math.isfinite(norm):
        return np.zeros_like(exact), False
    bound = clip * _MARGIN
    return (exact if norm <= bound else exact * (bound / norm)), norm <= clip


def aggregate(
    contributions: Sequence[Contribution], size: int, plan: Plan, clip: float, source: RandomSource
) -> Aggregate:
    """Makes a round's one release from what came.

    Guarantees:
        Price: adding or removing a client is one Gaussian mechanism of ``plan.noise_multiplier``, the bit included.
        Never less noise: noise and divisor are those of the plan, however many replied, down to none.
        Order: the noise is drawn for the clip that clipped; only then does the clip move.

    Args:
        contributions: Of those who replied, in the order of the clients; at most one for each client.
        size: Length P of an update.
        plan: A plan at unit client.
        clip: This round's clip C > 0.
        source: Fresh noise.
    """
    require(plan.unit is Unit.CLIENT, f"expected a plan that protects clients, got one that protects {plan.unit}s")
    require(plan.banded is None, "expected a plan of fresh noise in every round, got one of a matrix; use its rows")
    total, bits = clipped_sum(contributions, size, clip)
    total += update_noise(plan) * clip * source.gaussian(size).numpy()
    mean = (total / plan.expected_batch).astype(np.float32)
    if not plan.quantile:
        return Aggregate(mean, clip)
    share = 0.5 + (bits + plan.bit_noise * float(source.gaussian(1)[0])) / plan.expected_batch
    return Aggregate(mean, next_clip(clip, share, plan))


def clipped_sum(contributions: Sequence[Contribution], size: int, clip: float) -> tuple[Sum, float]:
    """Returns the sum of a round's clipped updates and that of their bits: no noise yet, so it may not leave.

    Guarantees:
        Bound: one contribution moves the sum by at most ``clip`` (L2) and the bits by at most 1/2, whatever came.
        Total: never raises; the sum is finite. A reply that is missing is no contribution and adds nothing.

    Args:
        contributions: Of those who replied, in the order of the clients; at most one for each client.
        size: Length P of an update.
        clip: This round's clip C > 0.

    Returns:
        The sum, float64 ``(P,)``, and the sum of -1/2 and +1/2 over the contributions.
    """
    total, bits = np.zeros(size), 0.0
    for contribution in contributions:
        if contribution.update.shape != (size,):
            # Cannot be added, so it adds nothing; a raise would end the round over one client's reply.
            continue
        total += clip_update(contribution.update, clip)[0]
        bits += 0.5 if contribution.bit == 1.0 else -0.5
    return total, bits


def mean_of(released: np.ndarray[tuple[int, ...], np.dtype[np.float32]], plan: Plan) -> Vector:
    """Returns a row's noised sum over the public divisor, float32 ``(P,)``: post-processing of the release."""
    mean: Vector = (released.astype(np.float64) / plan.expected_batch).astype(np.float32)
    return mean


def next_clip(clip: float, share: float, plan: Plan) -> float:
    """Returns the clip of the next round: smaller where more updates were within it than the quantile asks.

    Args:
        clip: This round's clip.
        share: Noisy share of updates that were within it; a release, so any use of it is free.
        plan: Gives the quantile and how fast to follow it.

    References:
        Andrew et al. (2021), algorithm 1: ``C <- C exp(-lr (share - quantile))``.
    """
    step = min(20.0, max(-20.0, -plan.clip_lr * (share - plan.quantile)))
    return min(plan.l2_clip * _SPAN, max(plan.l2_clip / _SPAN, clip * math.exp(step)))
