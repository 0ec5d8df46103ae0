"""What a release costs: one vocabulary of events, and independent accountants that price them.

Two questions, two answers that are never mixed (guarantee G3):

* *May this be charged?* is answered by a Renyi filter at one order, fixed when the budget is granted. It stays valid
  however later rounds depend on earlier results (Feldman & Zrnic 2021 prove this for a fixed order; choosing the
  best order afterwards would not be covered).
* *What did the whole schedule cost?* is answered by a privacy loss distribution, tight but only valid for a schedule
  that was committed before its first round. It is printed for all of it, even if the run stopped early.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, Self, TypeAlias

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


class Kind(StrEnum):
    """What kind of release an event is; each is priced from its own fields, and an unknown kind is refused."""

    POISSON_GAUSSIAN = "poisson-gaussian"
    MATRIX_GAUSSIAN = "matrix-gaussian"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """A release: what was released, under which sampling, for which unit and adjacency.

    The meaning of an event never changes; a new mechanism is a new kind, and an unknown kind is refused, never
    priced as zero.

    ``poisson-gaussian`` is ``steps`` sums over a Poisson sample, each bounded in L2 and noised on its own; at rate 1
    it is the Gaussian mechanism, as of a metric over all records. ``matrix-gaussian`` is one whole matrix mechanism:
    correlated noise over all rounds in which a unit may take part, with the matrix' sensitivity already divided out of
    the noise multiplier; it cannot be sampled, and its rounds are never priced one by one.

    Attributes:
        kind: Which mechanism.
        released: What left the holder, one public word, such as "update" or "metric:accuracy".
        unit: What the bound on one contribution is a bound for.
        adjacency: The neighbours that the bound speaks of.
        sample_rate: Public Poisson rate in (0, 1]; 1 for a matrix mechanism.
        noise_multiplier: Noise standard deviation divided by the L2 bound of one unit's contribution, > 0.
        steps: How many such releases, >= 1.
    """

    kind: Kind = Kind.POISSON_GAUSSIAN
    released: str = "update"
    unit: Unit = Unit.RECORD
    adjacency: Adjacency = Adjacency.ADD_REMOVE
    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        for name, words in (("kind", Kind), ("unit", Unit), ("adjacency", Adjacency)):
            value = getattr(self, name)
            if type(value) is not words:
                require(
                    isinstance(value, str) and value in set(words),
                    f"expected an event whose {name} is one of {[word.value for word in words]}, got {value!r:.40}",
                )
                object.__setattr__(self, name, words(value))
        require(
            isinstance(self.released, str) and _RELEASED.fullmatch(self.released) is not None,
            f"expected one public word for what was released, got {self.released!r:.40}",
        )
        require(
            is_number(self.sample_rate) and 0 < self.sample_rate <= 1,
            f"expected 0 < sample_rate <= 1, got {self.sample_rate!r:.40}",
        )
        require(
            self.kind is Kind.POISSON_GAUSSIAN or self.sample_rate == 1,
            f"expected a matrix mechanism without sampling, got sample_rate {self.sample_rate!r:.40}",
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
        """Returns what one client is charged for one round of a plan.

        At unit client that is the plain Gaussian event, with no discount for the coin that decides who takes part:
        the ledger prices what the holder's worst adversary sees, and the relay and the other clients see who took
        part (guarantee G16). Against the server, which adds the noise, no event has a price.

        With banded noise it is the whole matrix, one release however many rounds it has: the first round that a client
        joins is charged for it, and the receipts of later ones name it too. It is never multiplied by rounds.
        """
        if plan.banded is not None:
            return cls._gaussian(Kind.MATRIX_GAUSSIAN, plan.unit, plan.adjacency, 1.0, plan.noise_multiplier, 1)
        rate, steps = (1.0, 1) if plan.unit is Unit.CLIENT else (plan.sample_rate, plan.steps)
        return cls._gaussian(Kind.POISSON_GAUSSIAN, plan.unit, plan.adjacency, rate, plan.noise_multiplier, steps)

    @classmethod
    # Checked once: all rounds of a job are charged for the same. Typed: 2 and 2.0 are equal keys, but not equal texts.
    @functools.lru_cache(maxsize=1024, typed=True)
    def _gaussian(cls, kind: Kind, unit: Unit, adjacency: Adjacency, rate: float, noise: float, steps: int) -> Self:
        return cls(kind=kind, unit=unit, adjacency=adjacency, sample_rate=rate, noise_multiplier=noise, steps=steps)

    @classmethod
    def of_schedule(cls, plan: Plan) -> Self:
        """Returns the most that one client can release in the whole job: every join, retries included."""
        event = cls.of_round(plan)
        return dataclasses.replace(event, steps=event.steps * plan.charges)

    @classmethod
    def of_models(cls, plan: Plan) -> Self:
        """Returns what somebody learns of one client who sees the models of all rounds, and nothing of who took part.

        Only at unit client: the coins of `privacy.central` hide who took part from nobody else. With banded noise there
        are no coins, turns are public, and it is the same event as for everybody (guarantee G16).

        Raises:
            PlanError: The plan protects records; there no discount for the choice of clients is claimed.
        """
        require(plan.unit is Unit.CLIENT, f"expected a plan that protects clients, got one that protects {plan.unit}s")
        if plan.banded is not None:
            return cls.of_schedule(plan)
        return dataclasses.replace(cls.of_round(plan), sample_rate=float(plan.client_rate), steps=plan.rounds)

    @classmethod
    def all_of_round(cls, plan: Plan) -> tuple[Self, ...]:
        """Returns everything that one client releases in one round: its update, then each metric of the plan."""
        asked = plan.metrics
        update = cls.of_round(plan)
        if asked is None:
            return (update,)
        # Every record enters a metric, and moves its sums by at most 1.
        metric = dataclasses.replace(update, sample_rate=1.0, noise_multiplier=asked.noise, steps=1)
        return (update, *(dataclasses.replace(metric, released=f"metric:{word}") for word in asked.words))

    @classmethod
    def all_of_schedule(cls, plan: Plan, joins: int | None = None) -> tuple[Self, ...]:
        """Returns the most that one client can release in ``joins`` rounds; by default in the whole job."""
        times = plan.charges if joins is None or plan.banded is not None else joins
        return tuple(dataclasses.replace(event, steps=event.steps * times) for event in cls.all_of_round(plan))

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """Reads an event from parsed JSON.

        Raises:
            LedgerError: It is not exactly an event of a known kind.
        """
        try:
            # What an event does not say has its first meaning; there is one text for each event.
            if not _ALWAYS <= set(fields) <= _ALWAYS | _SOMETIMES.keys():
                raise PlanError(f"expected the fields of an event, got {sorted(fields)}")
            event = cls(**fields)
            if any(name in fields and fields[name] == first for name, first in _SOMETIMES.items()):
                raise PlanError("expected the one text of an event, got another")
            return event
        except (TypeError, ValueError) as error:
            raise LedgerError(f"expected an event of a known kind, got one that cannot be priced: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the event as a JSON object; what has its first meaning is left out, as in the first ledgers."""
        fields = {name: getattr(self, name) for name in ("kind", "sample_rate", "noise_multiplier", "steps")}
        later = {name: getattr(self, name) for name, first in _SOMETIMES.items() if getattr(self, name) != first}
        return {name: str(value) if isinstance(value, str) else value for name, value in (fields | later).items()}


_RELEASED: Final = re.compile(r"[a-z][a-z0-9:._-]{0,63}")
_ALWAYS: Final = frozenset({"kind", "sample_rate", "noise_multiplier", "steps"})
_SOMETIMES: Final[Mapping[str, str]] = {
    "released": "update",
    "unit": Unit.RECORD,
    "adjacency": Adjacency.ADD_REMOVE,
}

Releases: TypeAlias = Event | Sequence[Event]


def events_to_json(events: Sequence[Event]) -> dict[str, Any] | list[dict[str, Any]]:
    """Returns what one charge pays for as JSON: one event as it always was, several as a list.

    A program that knows one event a charge refuses the list; it never takes several releases for the first of them.
    """
    return events[0].to_dict() if len(events) == 1 else [event.to_dict() for event in events]


def events_from_json(value: Any) -> tuple[Event, ...]:
    """Reads what one charge pays for; the inverse of `events_to_json`.

    Raises:
        LedgerError: It is not exactly one event, or a list of several that release different things.
    """
    if not isinstance(value, list):
        return (Event.from_dict(value),)
    events = tuple(map(Event.from_dict, value))
    if len(events) < 2 or len({event.released for event in events}) < len(events):
        raise LedgerError("expected several events that release different things, got fewer; each has one text")
    return events


def merged(releases: Releases) -> tuple[Event, ...]:
    """Returns a history with equal releases added up, in a fixed order: what it costs does not depend on the order.

    Args:
        releases: One event, or a history of them, which may differ in every field but the unit and the adjacency.

    Raises:
        PlanError: The history is empty, or mixes units or adjacencies, whose costs do not add up.
    """
    history = (releases,) if isinstance(releases, Event) else tuple(releases)
    require(len(history) > 0, "expected a history of at least one release, got none")
    units = {(event.unit, event.adjacency) for event in history}
    require(len(units) == 1, f"expected releases of one unit and adjacency, got {sorted(units)}; price each by itself")
    steps: Counter[tuple[Kind, float, float]] = Counter()
    for event in history:
        steps[event.kind, float(event.sample_rate), float(event.noise_multiplier)] += event.steps
    (unit, adjacency), *_ = units
    return tuple(
        Event(kind=kind, unit=unit, adjacency=adjacency, sample_rate=rate, noise_multiplier=noise, steps=count)
        for (kind, rate, noise), count in sorted(steps.items())
    )


def repeated(releases: Releases, times: int) -> tuple[Event, ...]:
    """Returns the same releases, each so many times."""
    history = (releases,) if isinstance(releases, Event) else releases
    return tuple(dataclasses.replace(event, steps=event.steps * times) for event in history)


def unsampled(releases: Releases) -> tuple[Event, ...]:
    """Returns the same releases without any discount for sampling, as for somebody who knows the coins."""
    history = (releases,) if isinstance(releases, Event) else releases
    return tuple(dataclasses.replace(event, sample_rate=1.0) for event in history)


def zcdp_rho(releases: Releases) -> float:
    """Returns the zero-concentrated divergence rho of releases without any discount for sampling.

    References:
        Bun & Steinke (2016): a Gaussian mechanism of noise multiplier z is 1 / (2 z^2)-zCDP, and rhos add up.
    """
    return sum(event.steps / (2 * event.noise_multiplier**2) for event in merged(releases))


@functools.lru_cache(maxsize=65536)
def _rdp_of_step(sample_rate: float, noise_multiplier: float, order: float) -> float:
    """Returns an upper bound on one step's divergence; never negative, never NaN, and never long in coming."""
    # So little noise overflows; no budget pays for it, so no price is the right one.
    if noise_multiplier < 0.01:
        return math.inf
    # Less sampling or more noise never costs more, so rounding towards the safe side is an upper bound.
    noise_multiplier = min(noise_multiplier, 1e6)
    # Beyond order 1024 binomials overflow and the series has as many terms as the order says.
    if sample_rate >= 1 - 2**-30 or order > 1024:
        return order / (2 * noise_multiplier**2)

    # Imported here: it takes seconds, and where nothing is sampled it is not needed.
    from opacus.accountants.analysis.rdp import compute_rdp

    def log_moment(at: float) -> float:
        value = float(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=at)) * (at - 1)
        # The series is cut at e^-30 and rounds; its error may have either sign, and 1e12 steps may repeat it.
        return max(0.0, value) + 1e-12 if math.isfinite(value) else math.inf

    low = math.floor(order)
    if order == low or (noise_multiplier <= 30 and order <= 20):
        return log_moment(order) / (order - 1)
    # At fractional orders the series needs millions of terms under much noise. At high ones it is cut before it has
    # begun: its first terms, such as (1 - rate)^order, may be below e^-30 where the largest ones are not, and what is
    # left is next to nothing. The log moment is convex in the order and zero at order 1, so the chord between whole
    # orders lies above it.
    below = log_moment(float(low)) if low > 1 else 0.0
    return (below + (order - low) * (log_moment(low + 1.0) - below)) / (order - 1)


def rdp(releases: Releases, order: float) -> float:
    """Returns the Renyi divergence bound of one event, or of several together, at one order.

    Args:
        releases: What was released; the bounds of several events add up.
        order: Renyi order > 1.

    References:
        Mironov, Talwar & Zhang (2019), "Renyi differential privacy of the sampled Gaussian mechanism".
    """
    history = (releases,) if isinstance(releases, Event) else releases
    return sum(
        event.steps * _rdp_of_step(float(event.sample_rate), float(event.noise_multiplier), float(order))
        for event in history
    )


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

    def affords(self, spent_rdp: float, releases: Releases) -> bool:
        """Says whether a release, or several together, still fit beside what was spent.

        Guarantees:
            Filter: if every charge is admitted by this rule, then everything released together is
                (epsilon, delta)-DP, even if events are chosen in view of earlier results.
        """
        # A relative slack of 1e-9 forgives the rounding of a sum of equal terms; it is worth 3e-9 of epsilon 3.
        return spent_rdp + rdp(releases, self.order) <= self.budget_rdp * (1 + 1e-9)


def best_affordable_order(epsilon: float, delta: float) -> float:
    """Returns the order at which a budget affords most Gaussian sums, for a budget that is set before any job is known.

    A sum's divergence grows with the order and what is left after the conversion grows too; the best order makes their
    quotient largest. Sampled sums are cheaper at any order, so it is a sound choice for them, not always the best one.

    Args:
        epsilon: Budget > 0.
        delta: Probability in (0, 1).

    Raises:
        PlanError: A value is out of range, or no order can hold the budget.
    """
    require(is_number(epsilon) and epsilon > 0, f"expected a finite epsilon > 0, got {epsilon!r:.40}")
    require(is_number(delta) and 0 < delta < 1, f"expected 0 < delta < 1, got {delta!r:.40}; 1e-5 is customary")
    order = max(ORDERS, key=lambda order: (epsilon - _conversion(order, delta)) / order)
    require(epsilon > _conversion(order, delta), f"expected a budget that some order can hold, got epsilon {epsilon:g}")
    return order


def second_rdp(event: Event, order: float) -> float:
    """Returns an event's Renyi divergence by dp-accounting: another implementation of what `rdp` takes from Opacus.

    It checks a figure and admits none: the filter counts with `rdp`.

    Args:
        event: What was released.
        order: Renyi order > 1.
    """
    return event.steps * _second_rdp_of_step(float(event.sample_rate), float(event.noise_multiplier), float(order))


def second_filter(history: Sequence[Event], grant: Grant) -> tuple[float, float]:
    """Returns between which two figures a filter's epsilon lies by dp-accounting, its conversion included.

    At a whole order the two are one figure but for rounding. Between whole orders they are those of the whole orders
    beneath and above it, since divergence grows with the order; dp-accounting's own figure there is a bound from above,
    and the filter's may be the chord, which lies below that of the whole order above.

    Args:
        history: Everything that was charged.
        grant: The budget, whose order and delta count.
    """
    from dp_accounting.rdp import rdp_privacy_accountant

    def epsilon(order: float) -> float:
        spent = sum(second_rdp(event, order) for event in history)
        figure, _ = rdp_privacy_accountant.compute_epsilon([grant.order], [spent], grant.delta)
        return float(figure)

    below = float(math.floor(grant.order))
    # Order 1 is the mean, which dp-accounting does not give: nothing is claimed from below.
    high = max(epsilon(float(grant.order)), epsilon(float(math.ceil(grant.order))))
    return (epsilon(below) if below > 1 else 0.0), high


@functools.lru_cache(maxsize=4096)
def _second_rdp_of_step(sample_rate: float, noise_multiplier: float, order: float) -> float:
    from dp_accounting import dp_event
    from dp_accounting.rdp import rdp_privacy_accountant

    accountant = rdp_privacy_accountant.RdpAccountant(orders=[order])
    step = dp_event.GaussianDpEvent(noise_multiplier)
    accountant.compose(step if sample_rate >= 1 else dp_event.PoissonSampledDpEvent(sample_rate, step))
    return float(accountant.rdp[0])


def best_order(releases: Releases, delta: float) -> tuple[float, float]:
    """Returns the order at which releases look cheapest, and their epsilon there.

    Args:
        releases: A schedule, or a history of schedules, fixed in public before any data was touched.
        delta: Probability in (0, 1).

    Returns:
        The order, and epsilon >= 0: where delta alone pays for the releases, it is 0.
    """
    history = merged(releases)
    return least_order(lambda order: sum(rdp(event, order) for event in history), delta)


def least_order(divergence: Callable[[float], float], delta: float) -> tuple[float, float]:
    """Returns the order of `ORDERS` at which a curve of Renyi divergences gives the least epsilon, and that epsilon.

    Args:
        divergence: From an order > 1 to a bound on the divergence.
        delta: Probability in (0, 1).
    """

    # Epsilon falls and then rises in the order, so a ternary search finds the valley: 20 prices instead of 160.
    # Where the curve is flat or infinite the search may miss the least order; it then errs towards a higher figure.
    def cost(index: int) -> float:
        return divergence(ORDERS[index]) + _conversion(ORDERS[index], delta)

    low, high = 0, len(ORDERS) - 1
    while high - low > 2:
        left, right = low + (high - low) // 3, high - (high - low) // 3
        low, high = (low, right) if cost(left) <= cost(right) else (left, high)
    least = min(range(low, high + 1), key=cost)
    return ORDERS[least], max(0.0, cost(least))


def solve_noise(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    beside: Sequence[Event] = (),
    order: float | None = None,
) -> tuple[float, float]:
    """Finds the least noise with which a whole schedule passes the filter.

    The same filter later admits or refuses the charges, so a schedule solved here is never refused half-way.

    Args:
        epsilon: Budget > 0.
        delta: Probability in (0, 1).
        sample_rate: Public Poisson rate in (0, 1].
        steps: All steps one client can be charged for.
        beside: What is released beside them, over the whole schedule, with noise of its own.
        order: Renyi order of the filter, where holders have fixed it already; None for the best one.

    Returns:
        The noise multiplier (relative precision 1e-4, rounded up) and the Renyi order of the filter.

    Raises:
        PlanError: No noise multiplier up to 1e5 is enough.
    """
    require(math.isfinite(epsilon) and epsilon > 0, f"expected a finite epsilon > 0, got {epsilon}")
    require(0 < delta < 1, f"expected 0 < delta < 1, got {delta}")

    def price(history: Sequence[Event]) -> tuple[float, float]:
        if order is None:
            return best_order(history, delta)
        return order, max(0.0, rdp(history, order) + _conversion(order, delta))

    require(
        not beside or price(beside)[1] < epsilon,
        f"expected metrics that cost less than the whole epsilon {epsilon:g}, got some that leave nothing for updates; "
        "raise metric-noise, or ask for fewer",
    )

    def cost(noise_multiplier: float) -> float:
        return price((_schedule(sample_rate, noise_multiplier, steps), *beside))[1]

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
    return high, price((_schedule(sample_rate, high, steps), *beside))[0]


def split_noise(
    *, epsilon: float, delta: float, schedules: Sequence[tuple[float, int]]
) -> tuple[tuple[float, ...], float]:
    """Finds the noise with which several schedules together pass one filter, each with an equal share of the budget.

    For equal schedules it is the noise that `solve_noise` finds for all their steps.

    Args:
        epsilon: Budget of all schedules together, > 0.
        delta: Probability in (0, 1).
        schedules: Of each, the public Poisson rate in (0, 1] and all steps that one client can be charged for.

    Returns:
        One noise multiplier a schedule (relative precision 1e-4, rounded up), and the Renyi order of the filter.

    Raises:
        PlanError: There is no schedule, or no noise up to 1e5 is enough.
    """
    require(is_number(epsilon) and epsilon > 0, f"expected a finite epsilon > 0, got {epsilon!r:.40}")
    require(0 < delta < 1, f"expected 0 < delta < 1, got {delta}")
    require(len(schedules) > 0, "expected at least one schedule, got none")

    @functools.cache
    def noise(sample_rate: float, steps: int, order: float) -> float:
        share = (epsilon - _conversion(order, delta)) / len(schedules)
        low, high = 0.1, 1.0
        while rdp(_schedule(sample_rate, high, steps), order) > share:
            low, high = high, high * 2
            if high >= 1e5:
                return math.inf
        while high / low > 1 + 1e-4:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if rdp(_schedule(sample_rate, middle, steps), order) <= share else (middle, high)
        return high

    def total(index: int) -> float:
        return sum(math.log(noise(rate, steps, ORDERS[index])) for rate, steps in schedules)

    # As in `best_order`: the valley of a curve that falls and then rises. A miss costs noise, never privacy.
    first, last = 0, len(ORDERS) - 1
    while last - first > 2:
        left, right = first + (last - first) // 3, last - (last - first) // 3
        # Low orders may hold no such budget at all; there the curve is infinite, and its valley lies higher.
        first, last = (first, right) if total(left) <= total(right) < math.inf else (left, last)
    order = ORDERS[min(range(first, last + 1), key=total)]
    found = tuple(noise(rate, steps, order) for rate, steps in schedules)
    require(
        all(map(math.isfinite, found)),
        f"expected schedules that some noise can hold to epsilon {epsilon:g} together, got {len(schedules)} of them; "
        "try fewer, or raise epsilon",
    )
    return found, order


def _schedule(sample_rate: float, noise_multiplier: float, steps: int) -> Event:
    return Event(sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=steps)


@functools.lru_cache(maxsize=256)
def _pld(history: tuple[Event, ...], adjacency: Adjacency, records: int = 1, interval: float | None = None) -> Any:
    """Returns dp-accounting's accountant after a history, of a unit that is one record or a group of several."""
    from dp_accounting import dp_event, privacy_accountant
    from dp_accounting.pld import pld_privacy_accountant

    relation = privacy_accountant.NeighboringRelation
    # Each step is rounded up to the interval: a coarser one is as good for few steps (measured: 1e-5 of epsilon at 500
    # steps, 7e-4 at 14,000) and four times faster.
    accountant = pld_privacy_accountant.PLDAccountant(
        relation.ADD_OR_REMOVE_ONE if adjacency is Adjacency.ADD_REMOVE else relation.REPLACE_ONE,
        value_discretization_interval=interval or (1e-4 if sum(event.steps for event in history) > 2000 else 3e-4),
    )
    for event in history:
        # One matrix mechanism, or one metric over all records, is one Gaussian release.
        step: dp_event.DpEvent = dp_event.GaussianDpEvent(event.noise_multiplier / records)
        if event.sample_rate < 1:
            step = dp_event.PoissonSampledDpEvent(event.sample_rate, dp_event.GaussianDpEvent(event.noise_multiplier))
            if records > 1:
                # More noise never costs more; under much of it the library's search recurses without end.
                noise = min(event.noise_multiplier, 1e3)
                step = dp_event.MixtureOfGaussiansDpEvent(
                    noise, range(records + 1), _binomial(records, event.sample_rate)
                )
        accountant.compose(step, event.steps)
    return accountant


def _binomial(count: int, rate: float) -> list[float]:
    """Returns the probabilities of 0 to ``count`` records of a group in one sample."""
    return [math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(count + 1)]


def pld_epsilon(releases: Releases, delta: float, adjacency: Adjacency = Adjacency.ADD_REMOVE) -> float:
    """Returns the tight epsilon of a committed schedule or history, by Google's privacy loss distributions.

    Guarantees:
        Pessimistic: losses are rounded up, to 1e-4 (3e-4 up to 2000 steps), so the figure is never below the true one.
            Where delta is so small that the rounding of probabilities counts, it is priced at what that leaves of
            delta, or by RDP where it leaves nothing.
        Committed: it is a price of releases that were all settled before the first; never a stopping rule (G3).

    References:
        Koskela et al. (2020); Doroshenko et al. (2022), "Connect the dots".
    """
    return _pld_epsilon(merged(releases), delta, adjacency)


@functools.lru_cache(maxsize=4096)
def _pld_epsilon(
    history: tuple[Event, ...],
    delta: float,
    adjacency: Adjacency,
    records: int = 1,
    interval: float | None = None,
) -> float:
    # The masses of one step add up to 1 but for rounding, and k steps repeat it k times: measured, 1e-11 of delta at a
    # million steps, which made a figure at delta 1e-10 too small by 0.02.
    lost = _lost(history)
    if lost < 1e-5 * delta:
        return float(_pld(history, adjacency, records, interval).get_epsilon(delta))
    bound = _rdp_bound(history, delta, adjacency) if records == 1 else math.inf
    if lost >= delta:
        return bound
    return min(bound, float(_pld(history, adjacency, records, interval).get_epsilon(delta - lost)))


def _lost(history: Sequence[Event]) -> float:
    """How much of delta the rounding of probability masses may cost a schedule."""
    return sum(event.steps if event.sample_rate < 1 else 1 for event in history) * 2.0**-52


def pld_is_loose(history: Sequence[Event], delta: float) -> bool:
    """Says whether delta is so small that `pld_epsilon` pays for its own rounding: a bound then, and not tight."""
    return _lost(history) >= 1e-5 * delta


def _rdp_bound(history: tuple[Event, ...], delta: float, adjacency: Adjacency) -> float:
    if adjacency is Adjacency.ADD_REMOVE:
        return best_order(history, delta)[1]
    from privacy.replacement import replace_rdp_epsilon

    return replace_rdp_epsilon(history, delta)


def group_epsilon(releases: Releases, delta: float, records: int, interval: float | None = None) -> float:
    """Returns the epsilon for all records of one person, of whom at most ``records`` are in the data set.

    Args:
        releases: A schedule or history committed before its first release.
        delta: Probability in (0, 1).
        records: Enforced bound on one person's records in the data set, >= 1.
        interval: Losses are rounded up to multiples of it, > 0; None for the finest that is used anywhere. A coarser
            one is as valid, a little higher, and faster in proportion.

    Raises:
        PlanError: ``records`` is no such bound, or the releases do not protect records.

    References:
        Ganesh (2024), "Tight group-level DP guarantees for DP-SGD with sampling via mixture of Gaussians mechanisms".
    """
    history = merged(releases)
    require(type(records) is int and 1 <= records <= 1000, f"expected 1 to 1000 records a person, got {records!r:.40}")
    require(
        all((event.kind, event.unit) == (Kind.POISSON_GAUSSIAN, Unit.RECORD) for event in history),
        "expected releases that protect records, got others; a group of records means nothing to them",
    )
    return _pld_epsilon(history, delta, Adjacency.ADD_REMOVE, records, interval)


def prv_epsilon(releases: Releases, delta: float, timeout_s: float = 60.0) -> tuple[float | None, str]:
    """Returns Opacus' PRV figure as a cross-check, or None and the reason why there is none.

    It adds its own error bound of 0.01, so it lies up to about 0.02 above the tight value. Where noise is low it
    needs minutes or fails; there it is not asked.

    Args:
        releases: A schedule or history committed before its first release.
        delta: Probability in (0, 1).
        timeout_s: After so many seconds it is given up; only the main thread can be interrupted.
    """
    history = merged(releases)
    if any(event.noise_multiplier < 0.5 for event in history):
        return None, "not asked: outside the range where Opacus' PRV accountant is quick and stable"
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(event.noise_multiplier, event.sample_rate, event.steps) for event in history]
    try:
        with warnings.catch_warnings(), _time_limit(timeout_s):
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta)), "Opacus PRV, error bound 0.01 included"
    except TimeoutError:
        return None, f"given up after {timeout_s:g} s; the RDP figure stands in for it"
    except (RuntimeError, ValueError, OverflowError) as error:
        return None, f"failed: {type(error).__name__}; the RDP figure stands in for it"


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after some seconds, where that can be done: in the main thread, on POSIX."""
    # A timer of somebody else's must not be lost.
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Repeats(StrEnum):
    """Law of the secret, random number of candidates in a search of which only the best is ever released."""

    GEOMETRIC = "geometric"
    LOGARITHMIC = "logarithmic"
    POISSON = "poisson"


def best_only_epsilon(releases: Releases, delta: float, mean: float, repeats: Repeats) -> float:
    """Returns what a search costs where its losing candidates never leave a trusted server (guarantee G5).

    It is no price of a federated search, in which every candidate's updates leave the client. Nor is it one where the
    number of candidates is fixed or known: it must be drawn at random, and kept secret.

    Args:
        releases: What one candidate releases, the same for each, committed before the search.
        delta: Probability in (0, 1).
        mean: Mean number of candidates, >= 1; above 1 where the law is not ``POISSON``.
        repeats: Law of that number.

    Raises:
        PlanError: The mean is no such number, or the releases cannot be repeated.

    References:
        Papernot & Steinke (2022), "Hyperparameter tuning with Renyi differential privacy", theorems 2 and 6.
    """
    from dp_accounting import dp_event
    from dp_accounting.rdp import rdp_privacy_accountant

    require(0 < delta < 1, f"expected 0 < delta < 1, got {delta}")
    law = Repeats(repeats)
    least = 1 if law is Repeats.POISSON else 1 + 1e-9
    require(is_number(mean) and mean >= least, f"expected a mean number of candidates > 1, got {mean!r:.40}")
    history = merged(releases)
    shape = {Repeats.GEOMETRIC: 1.0, Repeats.LOGARITHMIC: 0.0, Repeats.POISSON: math.inf}[law]
    one = [
        dp_event.SelfComposedDpEvent(
            dp_event.PoissonSampledDpEvent(event.sample_rate, dp_event.GaussianDpEvent(event.noise_multiplier)),
            event.steps,
        )
        for event in history
    ]
    accountant = rdp_privacy_accountant.RdpAccountant()
    accountant.compose(dp_event.RepeatAndSelectDpEvent(dp_event.ComposedDpEvent(one), float(mean), shape))
    return float(accountant.get_epsilon(delta))


def attacker_power(curve: Sequence[tuple[float, float]], fpr: float) -> float:
    """Returns the highest true-positive rate any membership test can have at a false-positive rate.

    Args:
        curve: Pairs (delta, epsilon) that all hold; an infinite epsilon bounds nothing.
        fpr: False-positive rate in [0, 1].

    References:
        Kairouz, Oh & Viswanath (2015): every (epsilon, delta) bounds the trade-off curve by two lines.
    """
    bounds = [
        min(
            math.exp(epsilon) * fpr + delta if epsilon < 700 else 1.0,
            1 - math.exp(-epsilon) * (1 - delta - fpr),
        )
        for delta, epsilon in curve
    ]
    return min(1.0, *bounds)
