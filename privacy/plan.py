"""The plan of a job: one frozen, public value that says what may leave a data holder and how it is protected.

Every field is public: a plan never holds anything computed from records. Two neighbouring data sets give equal
plans, so the noise, the sampling rate and the divisor cannot tell them apart (guarantees G1 and G8). Learning
knobs without a bearing on privacy live in `Local`, so that nobody has to wonder which knob is which.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, Final, Self

from privacy.errors import PlanError


class Unit(StrEnum):
    """What a guarantee protects: one record, or all records of one client."""

    RECORD = "record"
    CLIENT = "client"


class Adjacency(StrEnum):
    """When two data sets are neighbours."""

    ADD_REMOVE = "add-remove"
    REPLACE_ONE = "replace-one"


class Mode(StrEnum):
    """How per-example gradients are computed; the results agree up to rounding."""

    AUTO = "auto"
    HOOKS = "hooks"
    FUNCTORCH = "functorch"
    GHOST = "ghost"


class Optimizer(StrEnum):
    """Local optimiser; it sees only noised gradients."""

    SGD = "sgd"
    ADAM = "adam"
    ADAMW = "adamw"


class Metric(StrEnum):
    """What a client may say about its own records beside its update; the list is closed, anything else is refused."""

    ACCURACY = "accuracy"
    LOSS = "loss"
    LABELS = "label-histogram"
    COUNT = "count"


# More steps, rounds or records than any job has; beyond it, products with a float would overflow or lose digits.
MOST: Final = 10**12
# A plan travels with every request, and each band is one more row of noise in the server's memory.
MOST_BANDS: Final = 64
# Beyond it the rounding of a sum of updates would no longer stay within the margin of `privacy.central`.
_MOST_IN_A_SUM: Final = 50_000

_CANONICAL: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical(value: Any) -> bytes:
    """Returns the one JSON text of a value, as bytes: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: The value holds a NaN or an infinity.
    """
    return _CANONICAL.encode(value).encode()


def require(condition: bool, message: str) -> None:
    """Raises PlanError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise PlanError(message)


def is_number(value: object) -> bool:
    """Says whether a value is a finite float, or a whole number that fits one; true and false are not numbers."""
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:
        return False


def _positive(name: str, value: float) -> None:
    require(
        is_number(value) and value > 0,
        f"expected a finite {name} > 0, got {value!r:.40}; choose a positive number",
    )


def _count(name: str, value: int, least: int = 1) -> None:
    require(
        type(value) is int and least <= value <= MOST,
        f"expected {name} to be a whole number from {least} to {MOST}, got {value!r:.40}",
    )


def _parse(cls: type, kind: str, text: str | bytes, later: Iterable[str] = ()) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"expected a {kind} as JSON, got text that does not parse ({error})") from None
    names = {field.name for field in dataclasses.fields(cls)}
    require(isinstance(fields, dict), f"expected a {kind} as a JSON object, got {type(fields).__name__}")
    if extra := sorted(set(fields) - names):
        raise PlanError(f"expected only the fields of a {kind}, got the unknown field {extra[0]!r}")
    if missing := sorted(names - set(fields) - set(later)):
        raise PlanError(f"expected all fields of a {kind}, the field {missing[0]!r} is missing")
    return fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """The metrics that a job asks for in every round, of the round's incoming model on the client's own records.

    Guarantees:
        Public: no field depends on a record. Priced: each word is one more Gaussian release in every round joined,
            part of the schedule that the ledger commits to before the first round.

    Attributes:
        words: Which metrics; in the order of `Metric`, each once, at least one.
        noise: Standard deviation of the noise on each sum; one record moves each metric's sums by at most 1 (L2).
        loss_bound: A record's loss is clipped to [0, loss_bound], in units of the loss.

    Raises:
        PlanError: A word is not on the list, or a number is out of range.
    """

    words: tuple[Metric, ...]
    noise: float
    loss_bound: float

    def __post_init__(self) -> None:
        known = [word.value for word in Metric]
        for word in self.words:
            require(word in known, f"expected metrics among {', '.join(known)}, got {word!r:.40}")
        words = tuple(word for word in Metric if word in self.words)
        require(
            len(words) > 0 and tuple(self.words) == words,
            f"expected metrics in the order {', '.join(known)}, each once, got {', '.join(map(str, self.words))!r:.80}",
        )
        object.__setattr__(self, "words", words)
        for name in ("noise", "loss_bound"):
            _positive(f"metrics' {name}", getattr(self, name))

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """Reads the metrics of a plan from parsed JSON.

        Raises:
            PlanError: They are not exactly metrics.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        require(
            isinstance(fields, dict) and set(fields) == names and isinstance(fields["words"], list),
            f"expected metrics with the fields {sorted(names)}, got {fields!r:.80}",
        )
        return cls(**fields | {"words": tuple(fields["words"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Banded:
    """Noise that is correlated over the rounds of a job by one banded matrix: the law of `privacy.matrix`, in a plan.

    Clients are dealt into as many classes as rounds lie between two turns of one client. Whose turn it is is public,
    so no discount for chance is claimed; what is saved is noise in the sum of all rounds, which is the model.

    Attributes:
        separation: Any two rounds that one client joins are at least this far apart, s >= 1; s classes.
        coefficients: First column of the matrix from the diagonal down: 1 = c_0 >= c_1 >= ... >= 0, at most s of them.

    Raises:
        PlanError: A field is out of range.
    """

    separation: int
    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        _count("separation", self.separation)
        values = self.coefficients
        require(
            type(values) is tuple and 1 <= len(values) <= MOST_BANDS and all(map(is_number, values)),
            f"expected 1 to {MOST_BANDS} finite coefficients, got {values!r:.60}",
        )
        require(
            len(values) <= self.separation,
            f"expected at most {self.separation} bands, so that a client's rounds share no row, got {len(values)}; use "
            "fewer bands or a larger separation",
        )
        require(
            values[0] == 1 and values[-1] >= 0 and all(a >= b for a, b in itertools.pairwise(values)),
            "expected coefficients that start at 1 and never grow nor fall below 0, got others",
        )
        # One text for each plan: 1 and 1.0 are equal.
        object.__setattr__(self, "coefficients", tuple(map(float, values)))

    @property
    def bands(self) -> int:
        """Number of coefficients b; b - 1 rows of noise are kept."""
        return len(self.coefficients)

    def turns_of(self, rounds: int) -> int:
        """Returns the most rounds of a job that one client joins."""
        return -(-rounds // self.separation)

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """Reads the noise law of a plan from parsed JSON.

        Raises:
            PlanError: It is not exactly such a law.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        require(
            isinstance(fields, dict) and set(fields) == names and isinstance(fields["coefficients"], list),
            f"expected banded noise with the fields {sorted(names)}, got {fields!r:.80}",
        )
        return cls(**fields | {"coefficients": tuple(fields["coefficients"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one job may release, as every client must run it.

    At unit ``record`` it is DP-SGD at each client, and the server is trusted with nothing. At unit ``client`` it is
    the mechanism of `privacy.central`: the client trains plainly, and the server, which is trusted, clips, sums and
    adds the noise.

    Guarantees:
        Public: no field depends on a record; a plan may be printed, sent and stored.
        Priced: `privacy.accounting.Event.all_of_schedule` is the most that one client can be charged, metrics included.
        Lasting: a field that came later is left out of the text where it has its first meaning, so a plan that could
            be said before has the text and the digest that it had then.

    Attributes:
        unit: What is protected: one record, or all records of one client.
        adjacency: Add or remove one of them.
        sample_rate: Poisson rate q of each step, in (0, 1]; at unit client that of the local batches, which carry no
            guarantee.
        expected_batch: Public divisor B: in records, ``sample_rate`` times the declared number of records; at unit
            client in clients, ``client_rate`` times their number, or their number over ``banded.separation``.
        l2_clip: Bound C on the L2 norm of one record's gradient, in units of the gradient; at unit client on that of
            one client's update, in units of the parameters, and only the first where ``quantile`` is given.
        noise_multiplier: Standard deviation of the noise on the clipped sum, divided by ``l2_clip``. With a
            ``quantile``, that of the update and the bit together; with ``banded``, that of the whole matrix: divided
            by the matrix' sensitivity too.
        steps: Local steps in each round that a client joins; at unit client without a bearing on the price.
        rounds: Rounds of the job.
        joins: The most charges one client may make, retries after a crash included; at least 1.
        epsilon: Target that the noise was solved for (or what it costs, where the noise was given).
        delta: Probability at which epsilon holds, in (0, 1 / records_bound).
        records_bound: Declared public upper bound on one client's number of records.
        mode: How per-example gradients are computed; resolved before the first round.
        physical_batch: The most examples in memory at a time; never changes a result beyond rounding.
        views: Augmented views of a record whose gradients are averaged before clipping.
        metrics: What clients are asked about their own records in every round; None, the default, is nothing.
        client_rate: Unit client: probability with which a client takes part in a round, by a secret coin of its own.
        turns: Unit client: most rounds in which one client's coin counts, whatever falls; at most ``joins``, which
            also pays for retries. 0 at unit record. With ``banded`` how often a class comes round, and no retries.
        quantile: Unit client: share of the updates that the clip should leave whole, in (0, 1); 0 = a fixed clip.
        clip_lr: With a quantile: how fast the clip follows it, > 0.
        bit_noise: With a quantile: standard deviation of the noise on the sum of bits, in clients, more than half of
            ``noise_multiplier``.
        banded: Unit client: noise that is correlated over the rounds, and turns instead of coins; None, the default, is
            fresh noise in every round.

    Raises:
        PlanError: A field is out of range, or two fields contradict each other.
    """

    unit: Unit = Unit.RECORD
    adjacency: Adjacency = Adjacency.ADD_REMOVE
    sample_rate: float
    expected_batch: float
    l2_clip: float
    noise_multiplier: float
    steps: int
    rounds: int
    joins: int
    epsilon: float
    delta: float
    records_bound: int
    mode: Mode = Mode.AUTO
    physical_batch: int = 256
    views: int = 1
    metrics: Metrics | None = None
    client_rate: float = 1.0
    turns: int = 0
    quantile: float = 0.0
    clip_lr: float = 0.0
    bit_noise: float = 0.0
    banded: Banded | None = None

    def __post_init__(self) -> None:
        require(type(self.unit) is Unit, f"expected unit 'record' or 'client', got {self.unit!r:.40}")
        require(
            self.adjacency is Adjacency.ADD_REMOVE,
            f"expected adjacency 'add-remove', got {self.adjacency!r}; replace-one is printed beside it",
        )
        require(
            is_number(self.sample_rate) and 0 < self.sample_rate <= 1,
            f"expected 0 < sample_rate <= 1, got {self.sample_rate!r:.40}",
        )
        for name in ("expected_batch", "l2_clip", "noise_multiplier", "epsilon"):
            _positive(name, getattr(self, name))
        for name in ("steps", "rounds", "joins", "records_bound", "physical_batch", "views"):
            _count(name, getattr(self, name))
        check_delta(self.delta, self.records_bound)
        require(
            self.metrics is None or (isinstance(self.metrics, Metrics) and self.unit is Unit.RECORD),
            f"expected metrics only where records are protected, got unit {self.unit!r}; one record's bound is no "
            "bound for all records of a client",
        )
        if self.unit is Unit.CLIENT:
            self._check_central()
        else:
            for name, first in _AT_UNIT_CLIENT.items():
                require(
                    getattr(self, name) == first and type(getattr(self, name)) is type(first),
                    f"expected {name} only at unit client, got {getattr(self, name)!r:.40}; drop it",
                )

    def _check_central(self) -> None:
        require(
            is_number(self.client_rate) and 0 < self.client_rate <= 1,
            f"expected 0 < client_rate <= 1, got {self.client_rate!r:.40}",
        )
        _count("turns", self.turns)
        require(self.turns <= self.joins, f"expected turns <= joins, got {self.turns} > {self.joins}; raise joins")
        require(
            self.views == 1 and self.mode is Mode.AUTO,
            "expected one view and mode 'auto' at unit client, got others: nothing is done example by example there",
        )
        require(
            self.expected_batch <= _MOST_IN_A_SUM,
            f"expected a cohort of {_MOST_IN_A_SUM:,} clients at most, got {self.expected_batch:g}; lower client_rate",
        )
        # What is protected here is one of so many clients.
        check_delta(self.delta, max(1, round(self.expected_batch * self._classes / self.client_rate)), "clients")
        for name in ("quantile", "clip_lr", "bit_noise"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, f"expected a finite {name} >= 0, got {value!r:.40}")
        if self.banded is not None:
            self._check_banded(self.banded)
        require(self.quantile < 1, f"expected 0 <= quantile < 1, got {self.quantile}; 0.5 is the median")
        if self.quantile == 0:
            require(self.clip_lr == self.bit_noise == 0, "expected clip_lr and bit_noise only with a quantile")
            return
        require(0 < self.clip_lr <= 1, f"expected 0 < clip_lr <= 1, got {self.clip_lr}; 0.2 is customary")
        require(
            2 * self.bit_noise > self.noise_multiplier,
            f"expected bit_noise > {self.noise_multiplier / 2:g}, half the noise multiplier, got {self.bit_noise:g}: "
            "the bit alone would cost more than the plan says; raise it",
        )

    @property
    def _classes(self) -> int:
        return 1 if self.banded is None else self.banded.separation

    @property
    def charges(self) -> int:
        """The most charges of one client: one for each join, or a single one where a whole matrix is one release."""
        return self.joins if self.banded is None else 1

    def _check_banded(self, law: Banded) -> None:
        require(type(law) is Banded, f"expected the law of banded noise, got {law!r:.40}")
        require(
            self.quantile == 0,
            f"expected a fixed clip with banded noise, got a quantile of {self.quantile:g}: one matrix is one release, "
            "whose bound cannot move; drop the quantile",
        )
        require(
            self.client_rate == 1,
            f"expected no coins with banded noise, got client_rate {self.client_rate:g}: whose turn it is is public; "
            "drop it",
        )
        require(
            law.bands <= self.rounds,
            f"expected at most {self.rounds} bands in {self.rounds} rounds, got {law.bands}; use fewer",
        )
        turns = law.turns_of(self.rounds)
        require(
            self.turns == self.joins == turns,
            f"expected {turns} turns and joins in {self.rounds} rounds, {law.separation} apart, got {self.turns} and "
            f"{self.joins}; a row of the matrix is joined once, so there is nothing to retry",
        )

    def to_json(self) -> str:
        """Returns the canonical JSON text; ``Plan.from_json`` reads it back to an equal plan."""
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        fields = dataclasses.asdict(self)
        return canonical({k: v for k, v in fields.items() if k not in _LATER or v != _LATER[k]}).decode()

    @functools.cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self._text.encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads a plan from JSON.

        Raises:
            PlanError: The text is not exactly a plan.
        """
        fields = _parse(cls, "plan", text, _LATER)
        try:
            if "metrics" in fields:
                # One text for each plan: no metrics are no field, never null.
                fields["metrics"] = Metrics.from_fields(fields["metrics"])
            if "banded" in fields:
                fields["banded"] = Banded.from_fields(fields["banded"])
            return cls(
                **fields
                | {
                    "unit": Unit(fields["unit"]),
                    "adjacency": Adjacency(fields["adjacency"]),
                    "mode": Mode(fields["mode"]),
                }
            )
        except PlanError:
            raise
        except (TypeError, ValueError) as error:
            raise PlanError(f"expected a plan with fields of the right types, got {error}") from None

    def digest(self) -> str:
        """Returns the SHA-256 of the canonical JSON, in hex: the name under which a ledger commits to this plan."""
        return self._digest


_AT_UNIT_CLIENT: Final[Mapping[str, Any]] = {
    "client_rate": 1.0,
    "turns": 0,
    "quantile": 0.0,
    "clip_lr": 0.0,
    "bit_noise": 0.0,
    "banded": None,
}
# Fields that came after the first plans were committed to ledgers, and what their absence means.
_LATER: Final[Mapping[str, Any]] = {**_AT_UNIT_CLIENT, "metrics": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """How a client learns from noised gradients; nothing here can change what a release costs.

    Attributes:
        optimizer: SGD, Adam or AdamW (decoupled weight decay).
        lr: Base learning rate > 0; the server scales it by its schedule, round by round.
        momentum: SGD momentum, or Adam's beta1, in [0, 1).
        weight_decay: L2 penalty (SGD, Adam) or decoupled decay (AdamW), >= 0.
        proximal_mu: FedProx pull towards the round's starting model, >= 0; added after the noise.

    Raises:
        PlanError: A field is out of range.
    """

    optimizer: Optimizer = Optimizer.SGD
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal_mu: float = 0.0

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        require(
            is_number(self.momentum) and 0 <= self.momentum < 1,
            f"expected 0 <= momentum < 1, got {self.momentum!r:.40}",
        )
        for name in ("weight_decay", "proximal_mu"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, f"expected a finite {name} >= 0, got {value!r:.40}")

    def to_json(self) -> str:
        """Returns the canonical JSON text."""
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        return canonical(dataclasses.asdict(self)).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads the learning knobs from JSON.

        Raises:
            PlanError: The text is not exactly a ``Local``.
        """
        fields = _parse(cls, "local optimiser", text)
        try:
            return cls(**fields | {"optimizer": Optimizer(fields["optimizer"])})
        except PlanError:
            raise
        except (TypeError, ValueError) as error:
            raise PlanError(f"expected a local optimiser with fields of the right types, got {error}") from None


def check_delta(delta: float, bound: int, of: str = "records_bound") -> None:
    """Refuses a delta that could be met by publishing a random record, or client (guarantee G2).

    Args:
        delta: Probability in (0, 1).
        bound: Declared public upper bound on the number of what is protected, >= 1.
        of: What the bound is called.

    Raises:
        PlanError: ``delta`` is not in (0, 1), or is at least ``1 / bound``.
    """
    require(is_number(delta) and 0 < delta < 1, f"expected 0 < delta < 1, got {delta!r:.40}; 1e-5 is customary")
    _count(of, bound)
    require(
        delta < 1 / bound,
        f"expected delta < 1/{of} = {1 / bound:.3g}, got {delta:g}; "
        f"a delta this large allows one whole {'client' if of == 'clients' else 'record'} to be published",
    )
