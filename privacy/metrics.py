"""The metrics firewall: the only figures about a client's own records that may leave it, and how.

A metric is a sum over records. Each record adds a vector whose L2 norm is at most 1, whatever the record, the model or
the loss holds; Gaussian noise of a public standard deviation is added to every sum; the noised sums are the release:

    accuracy          (1, 0) for a record that the model gets right, (0, 1) for one that it gets wrong
    loss              (l, 1 - l), where l is the record's loss clipped to [0, loss_bound] and divided by that bound
    label-histogram   1 at the record's class, 0 elsewhere
    count             1

No ratio is ever formed at a client: a mean would need a denominator, and the number of records is private. Accuracy and
mean loss are quotients of noised sums, formed by whoever receives them. Right-and-wrong instead of right-and-count is
no detail: two counts move by (1, 1), hence by 1.41, and would need 1.41 times the noise for the same price.

What is not a number counts as wrong, and as a loss at its bound: a model that has diverged must not look good. A record
that cannot be used (not valid) adds nothing. Adding or removing one record moves each release by at most 1, so its
price is that of a Gaussian mechanism with the noise multiplier `Metrics.noise` (`privacy.accounting`).

Floating point: clipped losses are rounded down to multiples of 2**-20, so every sum of up to 2**33 records is exact and
moves by no more than the record's own vector; noise is added in float64 and the result is rounded to float32, as an
update's is. The caveat of `privacy.noise` holds here too.

References:
    Dwork & Roth (2014), "The algorithmic foundations of differential privacy", appendix A (Gaussian mechanism).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from privacy.plan import Metric, Metrics

if TYPE_CHECKING:
    import torch

    from privacy.noise import RandomSource

Sums = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

# Losses live on this grid: sums of multiples of 2**-20 are exact in float64 up to 2**33 records.
_GRID: Final = 2.0**20
_AT_A_TIME: Final = 65536
# A quotient is shown where its denominator is at least so many standard deviations of its own noise; closer to zero
# the quotient of two noised sums says nothing, and neither does its error.
_LEAST_DENOMINATOR: Final = 4.0


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Outcomes:
    """What a model makes of each record. **Secret**, like the records.

    Attributes:
        right: Whether the model's class is the record's, bool ``(N,)``.
        losses: Each record's loss in units of the loss, float64 ``(N,)``; anything is legal, NaN and infinities too.
        targets: Each record's class, int64 ``(N,)``.
        valid: Usable records, bool ``(N,)``; the others add nothing to any metric.
        classes: Public number of classes; a class outside ``[0, classes)`` adds nothing to the histogram.
    """

    right: torch.Tensor
    losses: torch.Tensor
    targets: torch.Tensor
    valid: torch.Tensor
    classes: int

    def __repr__(self) -> str:
        return "Outcomes(secret)"


def widths(asked: Metrics | None, classes: int) -> dict[str, tuple[int]]:
    """Returns the public shape of each metric's sums, by the metric's word and in order; empty where none is asked.

    Args:
        asked: The plan's metrics, or None.
        classes: Public number of classes, >= 2.
    """
    sizes = {Metric.ACCURACY: 2, Metric.LOSS: 2, Metric.LABELS: classes, Metric.COUNT: 1}
    return {word.value: (sizes[word],) for word in (asked.words if asked is not None else ())}


def rows(word: Metric, outcomes: Outcomes, loss_bound: float) -> torch.Tensor:
    """Returns what each record adds to a metric's sums, float64 ``(N, width)``. Secret.

    Guarantees:
        Bound: every row has an L2 norm of at most 1, whatever the outcomes hold.
        Alone: each row depends on that record's outcome only.

    Args:
        word: Which metric.
        outcomes: What the model makes of the records.
        loss_bound: Losses are clipped to [0, loss_bound].
    """
    import torch

    count = len(outcomes.valid)
    if word is Metric.ACCURACY:
        right = outcomes.right.to(torch.float64)
        added = torch.stack((right, 1 - right), 1)
    elif word is Metric.LOSS:
        losses = outcomes.losses.to(torch.float64).nan_to_num(nan=loss_bound, posinf=loss_bound, neginf=0.0)
        share = torch.floor((losses / loss_bound).clamp(0.0, 1.0) * _GRID) / _GRID
        # l^2 + (1 - l)^2 <= 1 for every l in [0, 1]; both are multiples of the grid, so the difference is exact.
        added = torch.stack((share, 1 - share), 1)
    elif word is Metric.LABELS:
        inside = (outcomes.targets >= 0) & (outcomes.targets < outcomes.classes)
        added = torch.zeros((count, outcomes.classes), dtype=torch.float64)
        added.scatter_(1, outcomes.targets.clamp(0, outcomes.classes - 1)[:, None], inside.to(torch.float64)[:, None])
    else:
        added = torch.ones((count, 1), dtype=torch.float64)
    return torch.where(outcomes.valid[:, None], added, torch.zeros_like(added))


def release(asked: Metrics, outcomes: Outcomes, source: RandomSource) -> Sums:
    """Returns the noised sums of every metric asked for, to be charged *before* the outcomes are computed.

    Guarantees:
        Price: each metric is one Gaussian mechanism over all records, with the noise multiplier ``asked.noise``:
            exactly ``Event.all_of_round(plan)[1:]`` of a plan with these metrics.
        Constant: length, noise and scale depend on the plan and the number of classes alone, never on the records or
            on how many there are; no records at all give pure noise.

    Args:
        asked: The plan's metrics.
        outcomes: What the model makes of each record.
        source: Fresh secret noise; what else it gave to this release was other words of the same keystream.

    Returns:
        The sums of all metrics one after another, float32 ``(M,)``, in the order and of the lengths of `widths`.
    """
    import torch

    sums = []
    for word in asked.words:
        total = torch.zeros(widths(asked, outcomes.classes)[word.value], dtype=torch.float64)
        for start in range(0, len(outcomes.valid), _AT_A_TIME):
            total += rows(word, _some(outcomes, start, start + _AT_A_TIME), asked.loss_bound).sum(0)
        sums.append(total)
    exact = torch.cat(sums)
    noised = exact + asked.noise * source.gaussian(len(exact))
    return np.asarray(noised.numpy(), dtype=np.float32)


def _some(outcomes: Outcomes, start: int, stop: int) -> Outcomes:
    parts = {name: getattr(outcomes, name)[start:stop] for name in ("right", "losses", "targets", "valid")}
    return Outcomes(**parts, classes=outcomes.classes)


def pooled(asked: Metrics, releases: Sequence[Mapping[str, Sums]]) -> dict[str, dict[str, Any]]:
    """Returns a cohort's metrics from its clients' noised sums: post-processing, which costs nothing.

    Args:
        asked: The plan's metrics.
        releases: Each client's sums by metric, shapes as in `widths`.

    Returns:
        For each metric ``value`` (a number, or a list of one number a class; None where the noise drowns it or
        nobody answered) and ``stderr``, the standard error that the noise alone causes, in the units of ``value``: a
        fraction for accuracy, units of the loss for loss (of losses clipped to ``loss_bound``), records otherwise.
        Counts are unbiased and may be negative; quotients are first-order, and clipped to their range.
    """
    told: dict[str, dict[str, Any]] = {}
    for word in asked.words:
        if not releases:
            told[word.value] = {"value": None, "stderr": None}
            continue
        sums = np.sum([np.asarray(one[word.value], dtype=np.float64) for one in releases], axis=0)
        noise = asked.noise * math.sqrt(len(releases))
        if word in (Metric.ACCURACY, Metric.LOSS):
            unit = asked.loss_bound if word is Metric.LOSS else 1.0
            told[word.value] = _quotient(float(sums[0]), float(sums[1]), noise, unit)
        else:
            value = [float(number) for number in sums]
            told[word.value] = {"value": value if word is Metric.LABELS else value[0], "stderr": noise}
    return told


def _quotient(part: float, rest: float, noise: float, unit: float) -> dict[str, float | None]:
    """Returns ``unit * part / (part + rest)`` and its standard error; both sums carry noise of deviation ``noise``."""
    whole = part + rest
    if whole < _LEAST_DENOMINATOR * math.sqrt(2) * noise:
        return {"value": None, "stderr": None}
    share = min(1.0, max(0.0, part / whole))
    # d(a/n) = ((1 - s) da - s db) / n, where a and b carry independent noise.
    return {"value": unit * share, "stderr": unit * noise * math.hypot(share, 1 - share) / whole}
