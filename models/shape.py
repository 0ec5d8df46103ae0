"""The public description of one record, and what every family of models shares: the loss and the basic
metrics."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The public shape of one record: what a model may be built from.

    It is part of a task or of a schema and never measured on a data holder's records.

    A record may be a sequence: then its inputs are tokens, or it has a class at each of several places, or both.
    Every record of a data set has the same shape, so a length tells nothing.

    Attributes:
        inputs: Shape of one record's input, for example ``(1, 8, 8)``; every entry at least 1.
        classes: Number of classes, at least 2; targets lie in ``[0, classes)``.
        targets: Shape of one record's target: ``()`` for one class, ``(L,)`` for a class at each of L places.
        tokens: 0 where inputs are real numbers; else inputs are whole numbers in ``[0, tokens)``, at least 2 of them.

    Raises:
        ValueError: A size is not positive, or there are fewer than two classes or tokens.
    """

    inputs: tuple[int, ...]
    classes: int
    targets: tuple[int, ...] = ()
    tokens: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Type of the inputs: int64 for tokens, else float32."""
        return torch.int64 if self.tokens else torch.float32

    def __post_init__(self) -> None:
        if not self.inputs or min(self.inputs) < 1:
            raise ValueError(f"expected a non-empty input shape with sizes >= 1, got {self.inputs}")
        if self.classes < 2:
            raise ValueError(f"expected at least 2 classes, got {self.classes}; name every class a target may have")
        if self.targets and min(self.targets) < 1:
            raise ValueError(f"expected a target shape with sizes >= 1, got {self.targets}; () is one class")
        if self.tokens < 0 or self.tokens == 1:
            raise ValueError(
                f"expected at least 2 tokens, got {self.tokens}; 0 stands for inputs that are real numbers"
            )


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Returns each example's cross entropy in nats.

    Args:
        output: Logits, shape ``(B, classes)``.
        target: Classes, shape ``(B,)``, int64.

    Returns:
        Losses, shape ``(B,)``: one a record, so that nothing is averaged before the clip.
    """
    return functional.cross_entropy(output, target, reduction="none")


def sequence_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Returns each record's cross entropy in nats, the mean over its places.

    Args:
        output: Logits at each place, shape ``(B, L, classes)``.
        target: Classes, shape ``(B, L)``, int64.

    Returns:
        Losses, shape ``(B,)``: one a record, however long it is, so that the whole record is clipped as one.
    """
    places = functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
    return places.view(target.shape).mean(1)


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


def language(output: Tensor, target: Tensor) -> dict[str, float]:
    """Returns perplexity (first: the headline), loss in nats and accuracy, each per place of a public test set.

    Args:
        output: Logits of the next token at each place, shape ``(N, L, classes)``.
        target: The tokens that came next, shape ``(N, L)``, int64.

    Returns:
        ``perplexity`` >= 1: e to the mean loss; ``loss`` >= 0; ``accuracy`` in [0, 1].
    """
    # A record at a time: in float64 the whole set would be twice as large as the logits already are.
    losses = torch.stack(
        [sequence_cross_entropy(o[None].double(), t[None])[0] for o, t in zip(output, target, strict=True)]
    )
    loss = losses.mean().item()
    return {
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "loss": loss,
        "accuracy": (output.argmax(2) == target).double().mean().item(),
    }


def random_batch(shape: Shape, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns a random public batch in the range that preprocessed records have, for probes, timing and scale
    tests.

    Args:
        shape: The records to imitate.
        count: Number of records B >= 0.
        generator: Source of this public randomness.

    Returns:
        Inputs uniform in [-1, 1], float32, or uniform tokens, int64, shape ``(B, *inputs)``; targets, shape
        ``(B, *targets)``, int64.
    """
    if shape.tokens:
        inputs = torch.randint(shape.tokens, (count, *shape.inputs), generator=generator)
    else:
        inputs = torch.rand((count, *shape.inputs), generator=generator) * 2 - 1
    return inputs, torch.randint(shape.classes, (count, *shape.targets), generator=generator)
