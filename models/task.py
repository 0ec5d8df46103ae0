"""Tasks: everything that is specific to what is learned, and nothing about privacy, networks or where data
lives.

A `Task` is how people bring their own model and data: see ``docs/bring-your-own.md``. The tasks that come
with Tacit are in `TASKS`; `find_task` finds these by name and everybody else's as
``package.module:attribute``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.image import cnn, flip_and_shift
from models.shape import Shape, classification, cross_entropy, random_batch
from models.table import mlp, random_features, softmax_regression, table_metrics

__all__ = ["TASKS", "Shape", "Task", "find_task"]

Pair = tuple[Dataset[Any], Dataset[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned: records, model, loss and metrics. Frozen, and public in every field.

    Attributes:
        name: Name on the command line and in reports.
        summary: One line for ``tacit tasks``.
        record: What one record is, in words: the unit that record-level privacy protects.
        data: Name of a built-in data source, or a callable that returns a training and a public test set as
            map-style torch datasets of ``(input, class)`` pairs.
        build: Makes the model for records of a shape. Its randomness comes from torch's global generator, so
            the same ``torch.manual_seed`` gives the same initial parameters.
        loss: Per-example loss: logits ``(B, classes)`` and classes ``(B,)`` to losses ``(B,)``.
        metrics: Figures over the whole public test set from logits ``(N, classes)`` and classes ``(N,)``; the
            first is the headline.
        synthetic: Random public records of a shape, for probes and timing: inputs ``(n, *inputs)``, classes
            ``(n,)``.
        augment: Random views of one record: gets it K times, shape ``(K, *inputs)`` on the CPU, and returns K views of
            it. It never sees two records, so it cannot mix them. None for no augmentation.
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
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
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


# The defaults of the digits and breast cancer tasks were found by an uncharged search on these public data
# sets, at epsilon 3 for ten clients: on random splits first, then among a few finalists on the test set
# itself, so figures on that test set flatter them a little. Calibration fits the noise to whatever they
# become.

# For data sets of which a client holds thousands of records: a few hundred in each batch.
_LARGE: dict[str, float | int | str] = {
    "rounds": 30,
    "steps-per-round": 10,
    "sample-rate": 0.05,
    "l2-clip": 1.0,
    "lr": 1.0,
}
# For a table nobody has seen yet: large batches, few steps, which forgive a learning rate that is not tuned.
_TABLE: dict[str, float | int | str] = {
    "rounds": 20,
    "steps-per-round": 1,
    "sample-rate": 0.5,
    "l2-clip": 1.0,
    "lr": 1.0,
}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="digits",
            summary="softmax regression on scikit-learn's handwritten digits; no download",
            record="one handwritten digit, 8x8 pixels",
            data="digits",
            # Its defaults are those of the scenario keys themselves.
            build=functools.partial(softmax_regression, standardise=True),
        ),
        Task(
            name="digits-mlp",
            summary="multilayer perceptron on scikit-learn's handwritten digits; no download",
            record="one handwritten digit, 8x8 pixels",
            data="digits",
            build=functools.partial(mlp, standardise=True),
            defaults={"rounds": 30, "steps-per-round": 1, "sample-rate": 0.5, "l2-clip": 1.0, "lr": 1.7},
        ),
        Task(
            name="digits-features",
            summary="softmax regression on 512 public random features of the same digits; no download",
            record="one handwritten digit, 8x8 pixels",
            data="digits",
            build=functools.partial(random_features, standardise=True),
            defaults={"lr": 1.0},
        ),
        Task(
            name="digits-cnn",
            summary="convolutional network with GroupNorm on scikit-learn's handwritten digits; no download",
            record="one handwritten digit, 8x8 pixels",
            data="digits",
            build=functools.partial(cnn, widths=(16,), hidden=(), standardise=True),
            defaults={"rounds": 20, "steps-per-round": 2, "sample-rate": 0.5, "l2-clip": 2.0, "lr": 0.4},
        ),
        Task(
            name="breast-cancer",
            summary="softmax regression on scikit-learn's breast cancer table; no download",
            record="one tumour, 30 measurements",
            data="breast-cancer",
            build=softmax_regression,
            metrics=table_metrics,
            defaults={"rounds": 20, "steps-per-round": 1, "sample-rate": 0.5, "l2-clip": 2.0, "lr": 0.9},
        ),
        Task(
            name="breast-cancer-mlp",
            summary="multilayer perceptron on scikit-learn's breast cancer table; no download",
            record="one tumour, 30 measurements",
            data="breast-cancer",
            build=functools.partial(mlp, hidden=(16,)),
            metrics=table_metrics,
            defaults={"rounds": 20, "steps-per-round": 1, "sample-rate": 0.5, "l2-clip": 2.0, "lr": 0.9},
        ),
        Task(
            name="mnist-cnn",
            summary="convolutional network on MNIST (downloaded by torchvision)",
            record="one handwritten digit, 28x28 pixels",
            data="mnist",
            build=cnn,
            defaults=_LARGE,
        ),
        Task(
            name="fashion-mnist-cnn",
            summary="convolutional network on FashionMNIST (downloaded by torchvision)",
            record="one picture of a garment, 28x28 pixels",
            data="fashion-mnist",
            build=cnn,
            defaults=_LARGE,
        ),
        Task(
            name="cifar10-cnn",
            summary="convolutional network on CIFAR-10 (downloaded by torchvision), with flips and shifts",
            record="one colour photograph, 32x32 pixels",
            data="cifar10",
            build=functools.partial(cnn, widths=(32, 64, 64), hidden=(128,)),
            augment=flip_and_shift,
            defaults=_LARGE,
        ),
        Task(
            name="table",
            summary="softmax regression on your CSV or Parquet table with a schema (data=PATH)",
            record="one row of the table",
            data="table",
            build=softmax_regression,
            metrics=table_metrics,
            defaults=_TABLE,
        ),
        Task(
            name="table-mlp",
            summary="multilayer perceptron on your CSV or Parquet table with a schema (data=PATH)",
            record="one row of the table",
            data="table",
            build=mlp,
            metrics=table_metrics,
            defaults=_TABLE,
        ),
        Task(
            name="image-folder",
            summary="convolutional network on your folder of images, one folder a class (data=PATH)",
            record="one image and its class",
            data="image-folder",
            build=cnn,
            defaults=_LARGE,
        ),
    )
}


def find_task(name: str) -> Task:
    """Returns a built-in task by its name, or anybody's as ``package.module:attribute``.

    Modules are looked for where Python looks, and then in the current folder.

    Raises:
        LookupError: No such task; one sentence that names the nearest built-in name or says what failed to
            import.
    """
    if name in TASKS:
        return TASKS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, TASKS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(TASKS)}"
        raise LookupError(f"expected a task, got {name!r}; {hint} (your own task is written package.module:attribute)")
    module_name, _, attribute = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        # Last, so that a file lying in the current folder never shadows an installed module.
        sys.path.append(folder)
    try:
        task = getattr(importlib.import_module(module_name), attribute)
    except AttributeError as error:
        raise LookupError(
            f"expected a task {name!r}, got an AttributeError ({error}); check the attribute's name"
        ) from error
    except Exception as error:  # Somebody else's module may fail in any way; the caller needs one sentence.
        raise LookupError(
            f"expected a task {name!r}, but importing {module_name!r} failed with {type(error).__name__}: "
            f"{error}; "
            "run from the folder that holds it, or install it"
        ) from error
    if not isinstance(task, Task):
        raise LookupError(
            f"expected {name!r} to be a models.task.Task, got {type(task).__name__}; export the Task itself"
        )
    return task
