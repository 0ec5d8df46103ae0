"""Tasks: everything that is specific to what is learned, and nothing about privacy, networks or where data
lives.

A `Task` is how people bring their own model and data: see ``docs/bring-your-own.md``. The tasks that come
with Tacit lie beside the models of their family, and `models.catalog` lists them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.shape import Shape, classification, cross_entropy, random_batch

__all__ = ["Codec", "Features", "Pace", "Shape", "Task"]

Pair = tuple[Dataset[Any], Dataset[Any]]


class Codec(Protocol):
    """Text as tokens and back, by a public rule: what a language model's numbers mean."""

    @property
    def size(self) -> int:
        """Number of tokens."""

    def encode(self, text: str) -> list[int]:
        """Returns tokens in ``[0, size)``; raises ValueError, with one sentence, for text that has none."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens."""


class Features(Protocol):
    """A fixed public map from a record to its features: nothing about it is learned from anybody's records.

    It is applied once, when records are loaded, so training sees features only. Each record's features depend on that
    record alone.
    """

    @property
    def name(self) -> str:
        """Says everything that the map depends on; two maps of one name are the same."""

    def shape_of(self, shape: Shape) -> Shape:
        """Returns the shape of the features of records of a shape; ValueError where there are none."""

    def bound_of(self, shape: Shape) -> float | None:
        """Returns what no feature exceeds in absolute value, given the shape of the features; None where unknown."""

    def __call__(self, inputs: Tensor, /) -> Tensor:
        """Returns the features, ``(B, *features)``, float32, of records ``(B, *inputs)``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How far one client goes in one round; what a local rule makes of it is its own affair.

    Attributes:
        steps: Local steps, at least 1.
        sample_rate: Rate of the local batches, in (0, 1].
        lr: This round's learning rate > 0.
        batch: The most records in memory at a time.
        seed: Fresh for every client and round, in [0, 2**63); all randomness of a rule comes from it.
    """

    steps: int
    sample_rate: float
    lr: float
    batch: int
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned: records, model, loss and metrics. Frozen, and public in every field.

    Attributes:
        name: Name on the command line and in reports.
        summary: One line for ``tacit tasks``.
        record: What one record is, in words: the unit that record-level privacy protects.
        data: Name of a built-in data source, or a callable that returns a training and a public test set as
            map-style torch datasets of ``(input, class)`` pairs, or ``(input, classes)`` of sequences.
        build: Makes the model for records of a shape. Its randomness comes from torch's global generator, so
            the same ``torch.manual_seed`` gives the same initial parameters.
        loss: Per-example loss: logits ``(B, classes)`` and classes ``(B,)`` to losses ``(B,)``; of sequences, logits
            ``(B, L, classes)`` and classes ``(B, L)`` to losses ``(B,)``, one a record.
        metrics: Figures over the whole public test set from logits ``(N, classes)`` and classes ``(N,)``; the
            first is the headline.
        synthetic: Random public records of a shape, for probes and timing: inputs ``(n, *inputs)``, classes
            ``(n,)``.
        features: Fixed public map that records go through when they are loaded; ``build`` and ``synthetic`` then get
            the shape of the features. None to train on the records as they are.
        augment: Random views of one record: gets it K times, shape ``(K, *inputs)`` on the CPU, and returns K views of
            it. It never sees two records, so it cannot mix them. None for no augmentation.
        local: How a client trains, where that is not plain steps on ``loss``: gets a copy of the round's model, the
            client's records, inputs ``(n, *inputs)`` and classes ``(n,)`` with n >= 1, and a `Pace`, and moves the
            model's parameters in place. What it does is not bounded, so such a task needs unit client, where the whole
            update is clipped afterwards, whatever the rule did. None for plain steps.
        evaluate: Figures of a model over the whole public test set, the headline first, where they are no function of
            one output a record; gets the model, inputs ``(N, *inputs)`` and classes ``(N,)``. None for ``metrics``.
        text: For a language model, whose inputs and classes are tokens of one text: makes its codec. None elsewhere.
        defaults: Scenario keys that this task sets, by their kebab-case names; flags and files override them.
        shape: Public shape of the records; required where ``data`` is a callable, ignored for built-in
            sources, which know their own.
        declared_records: Public number of training records where ``data`` is a callable, from the
            documentation of the data set and not from counting a private one; None where nobody declared it.

    Raises:
        ValueError: The name is empty, or ``data`` is a callable and ``shape`` is missing.
    """

    name: str
    summary: str
    record: str
    data: str | Callable[[], Pair]
    build: Callable[[Shape], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    metrics: Callable[[Tensor, Tensor], dict[str, float]] = classification
    synthetic: Callable[[Shape, int, torch.Generator], tuple[Tensor, Tensor]] = random_batch
    features: Features | None = None
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    local: Callable[[nn.Module, Tensor, Tensor, Pace], None] | None = None
    evaluate: Callable[[nn.Module, Tensor, Tensor], dict[str, float]] | None = None
    text: Callable[[], Codec] | None = None
    defaults: Mapping[str, float | int | str] = dataclasses.field(default_factory=dict)
    shape: Shape | None = None
    declared_records: int | None = None

    def fresh(self, shape: Shape, seed: int) -> nn.Module:
        """Returns a new model whose parameters, frozen ones included, are the same wherever the seed is the same.

        Args:
            shape: Public shape of a record.
            seed: Public seed in [0, 2**63).
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(shape)

    @torch.no_grad()
    def figures(self, model: nn.Module, inputs: Tensor, targets: Tensor, *, device: str = "cpu") -> dict[str, float]:
        """Returns the figures of a model over the whole public test set, the headline first.

        Args:
            model: On ``device``; put into evaluation mode.
            inputs: Shape ``(N, *inputs)``, on the CPU.
            targets: Classes, shape ``(N,)``.
            device: Where the model lies.
        """
        model.eval()
        if self.evaluate is not None:
            return {name: float(value) for name, value in self.evaluate(model, inputs, targets).items()}
        outputs = torch.cat([model(part.to(device)).cpu() for part in torch.split(inputs, 1024)])
        return {name: float(value) for name, value in self.metrics(outputs, targets).items()}

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("expected a task with a name, got an empty one; give it the name reports should show")
        if callable(self.data) and self.shape is None:
            # Measured on private records, the shape (a largest label, say) would be an uncharged release.
            raise ValueError(
                f"expected task {self.name!r} to declare the public shape of its records, got none; add "
                "shape=Shape(inputs=..., classes=...)"
            )
        if self.declared_records is not None and self.declared_records < 1:
            raise ValueError(f"expected declared_records >= 1, got {self.declared_records}")
        # A copy, so that nobody changes a frozen task through the mapping it was made from.
        object.__setattr__(self, "defaults", dict(self.defaults))
