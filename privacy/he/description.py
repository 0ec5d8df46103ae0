"""What a client needs to know of a head: its plan, its features' range and its scales; no weight, no bias."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any, Final, Self, final

import numpy as np
from numpy.typing import NDArray

from privacy.errors import DataError, HeadError
from privacy.he.planner import HEAD_BYTES, MARK, HeadPlan, Scheme, read_json
from privacy.he.ring import Floats, Integers
from privacy.plan import canonical, is_number, require

_FIELDS: Final = {"plan", "low", "high", "weight-scale"}


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadDescription:
    """The public side of a head; both ends hold the same one, and every message begins with its digest.

    Attributes:
        plan: How the head is evaluated.
        low: Smallest value a feature may have.
        high: Largest value a feature may have.
        weight_scale: Integer weights are the weights times this. It tells the largest weight, nothing else.

    Raises:
        PlanError: The range is empty or no number is finite.
    """

    plan: HeadPlan
    low: float
    high: float
    weight_scale: float

    def __post_init__(self) -> None:
        """Checks the range and the scale."""
        for name, value in (("low", self.low), ("high", self.high), ("weight-scale", self.weight_scale)):
            require(is_number(value), f"expected a finite {name}, got {value}; publish the head anew")
        require(self.low < self.high, f"expected a range of features, got {self.low} to {self.high}; give low and high")
        require(
            1e-100 < self.weight_scale < 1e100 and 1e-100 < self.high - self.low < 1e100,
            "expected a range and a scale that a float can hold, got others; scale the features",
        )

    @property
    def centre(self) -> float:
        """The middle of the range; what is encrypted is the distance from it."""
        return self.low + (self.high - self.low) / 2

    @property
    def feature_scale(self) -> float:
        """Integer features are the distances times this."""
        return self.plan.largest_feature / ((self.high - self.low) / 2)

    def quantise(self, features: object) -> Integers:
        """Turns features into the integers that are encrypted.

        Args:
            features: Numbers of shape ``(d,)`` if the plan's batch is 1, else ``(n, d)`` with n up to the batch.

        Returns:
            int64 of shape ``(n, d)``, at most ``plan.largest_feature`` in magnitude.

        Raises:
            DataError: The shape is another, or a value is not finite or outside the range; nothing was encrypted.
        """
        plan = self.plan
        try:
            values = np.asarray(features, dtype=np.float64)
        except (TypeError, ValueError):
            raise DataError("expected features as numbers, got something else; prepare the record first") from None
        if plan.batch == 1 and values.ndim == 1:
            values = values[np.newaxis]
        if values.ndim != 2 or values.shape[1] != plan.features or not 1 <= len(values) <= plan.batch:
            raise DataError(
                f"expected up to {plan.batch} samples of {plan.features} features, got an array of shape "
                f"{values.shape}; use the extractor that the head names"
            )
        # Written so that NaN is outside too.
        if not ((values >= self.low) & (values <= self.high)).all():
            raise DataError(
                f"expected features from {self.low:g} to {self.high:g}, got one outside or no number; clip them"
            )
        integers = np.rint((values - self.centre) * self.feature_scale).astype(np.int64)
        # A rounding of the centre must not carry a feature over the bound that everything rests on.
        return np.clip(integers, -plan.largest_feature, plan.largest_feature)

    def logits(self, phases: NDArray[Any]) -> Floats:
        """Turns decrypted integers (EXACT) or phases in units of q (FLOAT) into logits, float64 of the same shape."""
        return np.asarray(phases, dtype=np.float64) / (self.feature_scale * self.weight_scale)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the description's text, 64 hexadecimal digits."""
        return hashlib.sha256(b"tacit/he/head/1\n" + self.to_bytes()).hexdigest()

    @functools.cached_property
    def mark(self) -> bytes:
        """What every query and answer of this head begins with."""
        return MARK + bytes.fromhex(self.digest)[: HEAD_BYTES - len(MARK)]

    def to_bytes(self) -> bytes:
        """Returns the description's one canonical text."""
        return canonical(
            {
                "plan": self.plan.fields(),
                "low": float(self.low),
                "high": float(self.high),
                "weight-scale": float(self.weight_scale),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Reads a description, and checks all of it.

        Raises:
            PlanError: It is none, not in canonical form, or its plan is not safe.
        """
        fields = read_json(data)
        require(
            type(fields) is dict and fields.keys() == _FIELDS,
            "expected the description of a head, got other fields; take it from the server",
        )
        for name in ("low", "high", "weight-scale"):
            require(is_number(fields[name]), f"expected a number as {name}, got another; take it from the server")
        made = cls(
            plan=HeadPlan.from_fields(fields["plan"]),
            low=float(fields["low"]),
            high=float(fields["high"]),
            weight_scale=float(fields["weight-scale"]),
        )
        require(made.to_bytes() == data, "expected a description in canonical form, got another; take it anew")
        return made


def checked(data: object, size: int, description: HeadDescription, what: str) -> memoryview:
    """Checks a message's size and mark before anything of it is read; returns what follows the mark.

    Raises:
        HeadError: The size is not the exact one, or it is for another head, version or plan.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise HeadError(f"expected {what} as bytes, got {type(data).__name__}; send bytes")
    view = memoryview(data).cast("B")
    if len(view) != size:
        raise HeadError(f"expected {what} of exactly {size:,} bytes, got {len(view):,}; use the head's own plan")
    if view[:HEAD_BYTES] != description.mark:
        raise HeadError(f"expected {what} for this head and version, got one for another; fetch the description anew")
    return view[HEAD_BYTES:]


def wrapped(scheme: Scheme, phases: Integers, answer_bits: int, plain_bits: int) -> Integers:
    """Takes phases modulo the answer's modulus to the signed integers they stand for (EXACT) or to themselves (FLOAT).

    Args:
        scheme: EXACT or FLOAT.
        phases: int64 of any shape; only the low ``answer_bits`` count.
        answer_bits: log2 of the answer's modulus.
        plain_bits: log2 of the plaintext modulus.
    """
    if scheme is Scheme.FLOAT:
        width = answer_bits
        values = phases
    else:
        width = plain_bits
        step = answer_bits - plain_bits
        values = (phases + (np.int64(1) << np.int64(step - 1))) >> np.int64(step)
    half = np.int64(1) << np.int64(width - 1)
    return ((values + half) & ((np.int64(1) << np.int64(width)) - 1)) - half
