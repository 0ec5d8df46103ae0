"""Records as tensors: the most secret value there is, which therefore does not print and does not pickle."""

from __future__ import annotations

import dataclasses
from typing import NoReturn, Self

import torch
from torch import Tensor

from models.shape import Shape


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Records:
    """A data holder's records. **Secret**: shows nothing when printed and refuses to be pickled or copied.

    Attributes:
        inputs: Shape ``(N, *shape)``, float32; int64 where they are tokens.
        targets: Class of each record, shape ``(N,)``, int64, or of each place of it, shape ``(N, L)``.
        valid: False for a record that could not be read, shape ``(N,)``, bool. Such a record still counts as
            one; its gradient is zero.
    """

    inputs: Tensor
    targets: Tensor
    valid: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        return "Records(secret)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("expected records to stay in their process, got an attempt to pickle them; load them there")

    @classmethod
    def blank(cls, shape: Shape, count: int) -> Self:
        """Returns ``count`` records of a shape that hold zeros and are marked invalid."""
        return cls(
            torch.zeros((count, *shape.inputs), dtype=shape.dtype),
            torch.zeros((count, *shape.targets), dtype=torch.int64),
            torch.zeros(count, dtype=torch.bool),
        )

    def take(self, indices: Tensor) -> Self:
        """Returns a copy of some records, in the order of ``indices``, shape ``(n,)``, int64."""
        return type(self)(self.inputs[indices], self.targets[indices], self.valid[indices])


def faults(records: Records, shape: Shape) -> list[str]:
    """Says in sentences what is wrong with records.

    A simulation raises these; a data holder keeps them to itself and trains on `sanitize`'s result (guarantee
    G12).

    Args:
        records: The records of one client or data set.
        shape: What they should be.

    Returns:
        One sentence a fault, empty where there is none. They hold counts and positions, so they are secret
        too.
    """
    if len(records) == 0:
        return ["expected at least one record, got none; leave this client out, or give it data"]
    if tuple(records.inputs.shape[1:]) != shape.inputs:
        return [f"expected records of shape {shape.inputs}, got {tuple(records.inputs.shape[1:])}"]
    if shape.tokens and records.inputs.is_floating_point():
        return [f"expected whole numbers as tokens, got {records.inputs.dtype}; encode the text first"]
    if not len(records.inputs) == len(records.valid) == len(records) or records.targets.shape[1:] != shape.targets:
        return [f"expected one class and one mark for each of {len(records)} records, got other numbers of them"]
    found = []
    for bad, what in (
        (~records.valid, "expected readable records, got {} that could not be read"),
        (~_finite(records), "expected finite inputs, got {} with NaN or infinity; correct or drop these"),
        (
            _outside(records, shape),
            f"expected labels in [0, {shape.classes}), got {{}} outside; correct these, or declare more classes",
        ),
        (
            _unknown(records, shape),
            f"expected tokens in [0, {shape.tokens}), got {{}} with others; encode them with the task's own vocabulary",
        ),
    ):
        if bool(bad.any()):
            count = int(bad.sum())
            first = int(bad.nonzero()[0])
            found.append(what.format(f"{count} record{'s' * (count > 1)} (first: index {first})"))
    return found


def sanitize(records: Records, shape: Shape) -> Records:
    """Replaces faulty records by zeros that are marked invalid.

    Guarantees:
        Total: never raises, whatever the records hold, so that no failure can reveal them.
        Clean: all inputs are finite, all tokens known and all targets in ``[0, classes)``.
        Alone: each record's result depends on that record only, and their number stays.

    Args:
        records: The records of one client.
        shape: What they should be.
    """
    count = len(records)
    if (
        tuple(records.inputs.shape) != (count, *shape.inputs)
        or tuple(records.targets.shape) != (count, *shape.targets)
        or records.valid.shape != (count,)
        or (shape.tokens and records.inputs.is_floating_point())
    ):
        return Records.blank(shape, count)
    good = records.valid & _finite(records) & ~_outside(records, shape) & ~_unknown(records, shape)
    return Records(_where(good, records.inputs), _where(good, records.targets), good)


def _finite(records: Records) -> Tensor:
    return records.inputs.isfinite().flatten(1).all(1)


def _outside(records: Records, shape: Shape) -> Tensor:
    return ((records.targets < 0) | (records.targets >= shape.classes))[:, None].flatten(1).any(1)


def _unknown(records: Records, shape: Shape) -> Tensor:
    if not shape.tokens:
        return torch.zeros(len(records), dtype=torch.bool)
    return ((records.inputs < 0) | (records.inputs >= shape.tokens)).flatten(1).any(1)


def _where(good: Tensor, values: Tensor) -> Tensor:
    """Returns values ``(N, ...)`` with zeros where a record is not good."""
    return torch.where(good.view(-1, *[1] * (values.dim() - 1)), values, torch.zeros_like(values))
