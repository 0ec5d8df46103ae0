"""What a release costs: one vocabulary of events, and independent accountants that price them.

Two questions, two answers that are never mixed (guarantee G3):

* *May this be charged?* is answered by a Renyi filter at one order, fixed when the budget is granted. It stays valid
  however later rounds depend on earlier results (Feldman & Zrnic 2021 prove this for a fixed order; choosing the
  best order afterwards would not be covered).
* *What did the whole schedule cost?* is answered by a privacy loss distribution, tight but only valid for a schedule
  that was committed before its first round. It is printed for all of it, even if the run stopped early.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, Final, Self

from privacy.errors import LedgerError, PlanError
from privacy.plan import MOST, Adjacency, Plan, Unit, check_delta, is_number, require

# Fractional orders matter for large epsilon, large ones for small epsilon. A grant picks exactly one of them.
ORDERS: Final = tuple(
    [1 + k / 20 for k in range(2, 20)]
    + [2 + k / 10 for k in range(50)]
    + [7 + k / 4 for k in range(37)]
    + [float(k) for k in range(17, 65)]
    + [80.0, 96.0, 128.0, 192.0, 256.0, 512.0]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """A release: Poisson-sampled, clipped sums with Gaussian noise, ``steps`` of them.

    The meaning of an event never changes; a new mechanism is a new kind, and an unknown kind is refused, never
    priced as zero.

    Attributes:
        sample_rate: Public Poisson rate in (0, 1].
        noise_multiplier: Noise standard deviation divided by the L2 bound of one record's contribution, > 0.
        steps: How many such sums were released, >= 1.
    """

    kind: str = "poisson-gaussian"
    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        require(
            self.kind == "poisson-gaussian",
            f"expected an event of kind 'poisson-gaussian', got {self.kind!r}",
        )
        require(
            is_number(self.sample_rate) and 0 < self.sample_rate <= 1,
            f"expected 0 < sample_rate <= 1, got {self.sample_rate!r:.40}",
        )
        require(
            is_number(self.noise_multiplier) and self.noise_multiplier > 0,
            f"expected a finite noise_multiplier > 0, got {self.noise_multiplier!r:.40}",
        )
        require(
            type(self.steps) is int and 1 <= self.steps <= MOST,
            f"expected steps to be a whole number from 1 to {MOST}, got {self.steps!r:.40}",
        )

    @classmethod
    def of_round(cls, plan: Plan) -> Self:
        """Returns what one client releases in one round of a plan."""
        return cls(sample_rate=plan.sample_rate, noise_multiplier=plan.noise_multiplier, steps=plan.steps)

    @classmethod
    def of_schedule(cls, plan: Plan) -> Self:
        """Returns the most that one client can release in the whole job: every join, retries included."""
        return cls(
            sample_rate=plan.sample_rate,
            noise_multiplier=plan.noise_multiplier,
            steps=plan.steps * plan.joins,
        )

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """Reads an event from parsed JSON.

        Raises:
            LedgerError: It is not exactly an event of a known kind.
        """
        try:
            if set(fields) != {"kind", "sample_rate", "noise_multiplier", "steps"}:
                raise PlanError(f"expected the four fields of an event, got {sorted(fields)}")
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise LedgerError(f"expected an event of a known kind, got one that cannot be priced: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the event as a JSON object."""
        return {
            "kind": self.kind,
            "sample_rate": self.sample_rate,
            "noise_multiplier": self.noise_multiplier,
            "steps": self.steps,
        }


@functools.lru_cache(maxsize=65536)
def _rdp_of_step(sample_rate: float, noise_multiplier: float, order: float) -> float:
    """Returns an upper bound on one step's divergence; never negative, never NaN, and never long in coming."""
    from opacus.accountants.analysis.rdp import compute_rdp

    # So little noise overflows; no budget pays for it, so no price is the right one.
    if noise_multiplier < 0.01:
        return math.inf
    # Less sampling or more noise never costs more, so rounding towards the safe side is an upper bound.
    noise_multiplier = min(noise_multiplier, 1e6)
    if sample_rate >= 1 - 2**-30:
        return order / (2 * noise_multiplier**2)

    def log_moment(at: float) -> float:
        value = float(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=at)) * (at - 1)
        # The series is cut at e^-30 and rounds; its error may have either sign, and 1e12 steps may repeat it.
        return max(0.0, value) + 1e-12 if math.isfinite(value) else math.inf

    low = math.floor(order)
    if order == low or noise_multiplier <= 30:
        return log_moment(order) / (order - 1)
    # At fractional orders the series needs millions of terms under much noise. The log moment is convex in the
    # order and zero at order 1, so the chord between whole orders lies above it.
    below = log_moment(float(low)) if low > 1 else 0.0
    return (below + (order - low) * (log_moment(low + 1.0) - below)) / (order - 1)


def rdp(event: Event, order: float) -> float:
    """Returns the Renyi divergence bound of an event at one order.

    Args:
        event: What was released.
        order: Renyi order > 1.

    References:
        Mironov, Talwar & Zhang (2019), "Renyi differential privacy of the sampled Gaussian mechanism".
    """
    return event.steps * _rdp_of_step(float(event.sample_rate), float(event.noise_multiplier), float(order))


def _conversion(order: float, delta: float) -> float:
    """Returns what turning an RDP bound into epsilon adds (Canonne, Kamath & Steinke 2020, proposition 12)."""
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grant:
    """A holder's budget for one data set's lifetime, and the order at which its filter keeps count.

    Attributes:
        epsilon: Most that may ever be spent, > 0.
        delta: The holder's delta; every charge is priced at it, whatever a job says.
        order: Renyi order of the filter, > 1, chosen once, here.
        unit: What is protected.
        adjacency: When two data sets are neighbours.
        records_bound: Declared public upper bound on the number of records.
    """

    epsilon: float
    delta: float
    order: float
    unit: Unit = Unit.RECORD
    adjacency: Adjacency = Adjacency.ADD_REMOVE
    records_bound: int

    def __post_init__(self) -> None:
        require(
            is_number(self.epsilon) and self.epsilon > 0,
            f"expected a finite epsilon > 0, got {self.epsilon!r:.40}",
        )
        check_delta(self.delta, self.records_bound)
        require(
            is_number(self.order) and self.order > 1,
            f"expected a finite Renyi order > 1, got {self.order!r:.40}",
        )
        require(self.budget_rdp > 0, f"expected an order that can hold epsilon {self.epsilon}, got {self.order}")

    @property
    def budget_rdp(self) -> float:
        """The budget in Renyi divergence at ``order``."""
        return self.epsilon - _conversion(self.order, self.delta)

    def epsilon_of(self, spent_rdp: float) -> float:
        """Returns what a spend at ``order`` means as epsilon at the holder's delta; 0 for no spend."""
        return max(0.0, spent_rdp + _conversion(self.order, self.delta)) if spent_rdp > 0 else 0.0

    def affords(self, spent_rdp: float, event: Event) -> bool:
        """Says whether an event still fits beside what was spent.

        Guarantees:
            Filter: if every charge is admitted by this rule, then everything released together is
                (epsilon, delta)-DP, even if events are chosen in view of earlier results.
        """
        # A relative slack of 1e-9 forgives the rounding of a sum of equal terms; it is worth 3e-9 of epsilon 3.
        return spent_rdp + rdp(event, self.order) <= self.budget_rdp * (1 + 1e-9)


def best_order(event: Event, delta: float) -> tuple[float, float]:
    """Returns the order at which an event looks cheapest, and its epsilon there.

    Args:
        event: A schedule fixed in public, before any data is touched.
        delta: Probability in (0, 1).
    """

    # Epsilon falls and then rises in the order, so a ternary search finds the valley: 20 prices instead of 160.
    # Where the curve is flat or infinite the search may miss the least order; it then errs towards a higher figure.
    def cost(index: int) -> float:
        return rdp(event, ORDERS[index]) + _conversion(ORDERS[index], delta)

    low, high = 0, len(ORDERS) - 1
    while high - low > 2:
        left, right = low + (high - low) // 3, high - (high - low) // 3
        low, high = (low, right) if cost(left) <= cost(right) else (left, high)
    least = min(range(low, high + 1), key=cost)
    return ORDERS[least], cost(least)


def solve_noise(*, epsilon: float, delta: float, sample_rate: float, steps: int) -> tuple[float, float]:
    """Finds the least noise with which a whole schedule passes the filter.

    The same filter later admits or refuses the charges, so a schedule solved here is never refused half-way.

    Args:
        epsilon: Budget > 0.
        delta: Probability in (0, 1).
        sample_rate: Public Poisson rate in (0, 1].
        steps: All steps one client can be charged for.

    Returns:
        The noise multiplier (relative precision 1e-4, rounded up) and the Renyi order of the filter.

    Raises:
        PlanError: No noise multiplier up to 1e5 is enough.
    """
    require(math.isfinite(epsilon) and epsilon > 0, f"expected a finite epsilon > 0, got {epsilon}")
    require(0 < delta < 1, f"expected 0 < delta < 1, got {delta}")

    def cost(noise_multiplier: float) -> float:
        return best_order(_schedule(sample_rate, noise_multiplier, steps), delta)[1]

    low, high = 0.1, 1.0
    while cost(high) > epsilon:
        low, high = high, high * 2
        require(
            high < 1e5,
            f"expected a schedule that some noise can hold to epsilon {epsilon}, got {steps} steps",
        )
    while high / low > 1 + 1e-4:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= epsilon else (middle, high)
    return high, best_order(_schedule(sample_rate, high, steps), delta)[0]


def _schedule(sample_rate: float, noise_multiplier: float, steps: int) -> Event:
    return Event(sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=steps)


@functools.lru_cache(maxsize=256)
def _pld(event: Event, adjacency: Adjacency) -> Any:
    from dp_accounting import dp_event, privacy_accountant
    from dp_accounting.pld import pld_privacy_accountant

    relation = privacy_accountant.NeighboringRelation
    # Each step is rounded up to the interval: a coarser one is as good for few steps (measured: 1e-5 of epsilon at 500
    # steps, 7e-4 at 14,000) and four times faster.
    accountant = pld_privacy_accountant.PLDAccountant(
        relation.ADD_OR_REMOVE_ONE if adjacency is Adjacency.ADD_REMOVE else relation.REPLACE_ONE,
        value_discretization_interval=1e-4 if event.steps > 2000 else 3e-4,
    )
    step: dp_event.DpEvent = dp_event.GaussianDpEvent(event.noise_multiplier)
    if event.sample_rate < 1:
        step = dp_event.PoissonSampledDpEvent(event.sample_rate, step)
    accountant.compose(step, event.steps)
    return accountant


def pld_epsilon(event: Event, delta: float, adjacency: Adjacency = Adjacency.ADD_REMOVE) -> float:
    """Returns the tight epsilon of a committed schedule, by Google's privacy loss distributions.

    Guarantees:
        Pessimistic: losses are rounded up, to 1e-4 (3e-4 up to 2000 steps), so the figure is never below the true one.

    References:
        Koskela et al. (2020); Doroshenko et al. (2022), "Connect the dots".
    """
    return float(_pld(event, adjacency).get_epsilon(delta))


def prv_epsilon(event: Event, delta: float) -> tuple[float | None, str]:
    """Returns Opacus' PRV figure as a cross-check, or None and the reason why there is none.

    It adds its own error bound of 0.01, so it lies up to about 0.02 above the tight value. Where noise is low it
    needs minutes or fails; there it is not asked.
    """
    if event.noise_multiplier < 0.5 or event.sample_rate >= 1:
        return None, "not asked: outside the range where Opacus' PRV accountant is quick and stable"
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(event.noise_multiplier, event.sample_rate, event.steps)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta)), "Opacus PRV, error bound 0.01 included"
    except (RuntimeError, ValueError, OverflowError) as error:
        return None, f"failed: {type(error).__name__}"


def attacker_power(curve: Sequence[tuple[float, float]], fpr: float) -> float:
    """Returns the highest true-positive rate any membership test can have at a false-positive rate.

    Args:
        curve: Pairs (delta, epsilon) that all hold.
        fpr: False-positive rate in [0, 1].

    References:
        Kairouz, Oh & Viswanath (2015): every (epsilon, delta) bounds the trade-off curve by two lines.
    """
    bounds = [
        min(
            math.exp(min(epsilon, 700.0)) * fpr + delta,
            1 - math.exp(-min(epsilon, 700.0)) * (1 - delta - fpr),
        )
        for delta, epsilon in curve
    ]
    return min(1.0, *bounds)
