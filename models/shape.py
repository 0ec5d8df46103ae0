"""The public description of one record, and what every family of models shares: the loss and the basic
metrics."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The public shape of one record: what a model may be built from.

    It is part of a task or of a schema and never measured on a data holder's records.

    Attributes:
        inputs: Shape of one record's input, for example ``(1, 8, 8)``; every entry at least 1.
        classes: Number of classes, at least 2; targets lie in ``[0, classes)``.

    Raises:
        ValueError: A size is not positive, or there are fewer than two classes.
    """

    inputs: tuple[int, ...]
    classes: int

    def __post_init__(self) -> None:
        if not self.inputs or min(self.inputs) < 1:
            raise ValueError(f"expected a non-empty input shape with sizes >= 1, got {self.inputs}")
        if self.classes < 2:
            raise ValueError(f"expected at least 2 classes, got {self.classes}; name every class a target may have")


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Returns each example's cross entropy in nats.

    Args:
        output: Logits, shape ``(B, classes)``.
        target: Classes, shape ``(B,)``, int64.

    Returns:
        Losses, shape ``(B,)``: one a record, so that nothing is averaged before the clip.
    """
    return functional.cross_entropy(output, target, reduction="none")


def classification(output: Tensor, target: Tensor) -> dict[str, float]:
    """Returns accuracy (first: the headline), mean loss in nats and macro F1 over a public test set.

    Args:
        output: Logits of the whole test set, shape ``(N, classes)``.
        target: Classes, shape ``(N,)``, int64.

    Returns:
        ``accuracy`` in [0, 1], ``loss`` >= 0, ``macro_f1`` in [0, 1]: the mean over classes that occur in the
        test set or among the predictions.
    """
    guess = output.argmax(1)
    classes = output.shape[1]
    hits = torch.bincount(target[guess == target], minlength=classes).double()
    # 2 TP / (2 TP + FP + FN), and its denominator is simply how often the class was predicted plus how often
    # it occurs.
    counts = (torch.bincount(guess, minlength=classes) + torch.bincount(target, minlength=classes)).double()
    seen = counts > 0
    return {
        "accuracy": (guess == target).double().mean().item(),
        "loss": cross_entropy(output.double(), target).mean().item(),
        "macro_f1": (2 * hits[seen] / counts[seen]).mean().item(),
    }


def random_batch(shape: Shape, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns a random public batch in the range that preprocessed records have, for probes, timing and scale
    tests.

    Args:
        shape: The records to imitate.
        count: Number of records B >= 0.
        generator: Source of this public randomness.

    Returns:
        Inputs uniform in [-1, 1], shape ``(B, *inputs)``, float32; targets, shape ``(B,)``, int64.
    """
    inputs = torch.rand((count, *shape.inputs), generator=generator) * 2 - 1
    return inputs, torch.randint(shape.classes, (count,), generator=generator)
