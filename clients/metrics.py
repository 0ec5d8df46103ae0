"""What a model makes of each of a client's own records: the input of the metrics firewall (`privacy.metrics`).

One record at a time, each in a forward pass of its own: nothing about the other records, not even the size of a batch,
can reach a record's outcome, so the bound on what one record adds is a bound on what it changes (guarantee G10). That
is slower than batches; whoever asks for metrics pays for it, nobody else does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from clients.records import Records
from models.shape import Shape
from models.task import Task
from privacy.errors import PlanError
from privacy.metrics import Outcomes

_REHEARSED: Final = 6


class Judge:
    """Evaluates one task's model on records, one by one; built once, used for many clients and rounds."""

    def __init__(self, task: Task, shape: Shape, seed: int, device: str) -> None:
        """Makes the task's model, its frozen parameters from the public seed; the others come with each request.

        Args:
            task: What is learned.
            shape: Public shape of a record.
            seed: Public seed of the model.
            device: Where it runs.
        """
        self._task, self._shape, self._device = task, shape, device
        self._model: nn.Module = task.fresh(shape, seed).to(device).eval()
        self._trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._rehearsed = False

    @torch.no_grad()
    def rehearse(self, make_batch: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        """Tries the model on synthetic records, once; to be called before the charge and before any record is read.

        Guarantees:
            Alone: a model that remembers, so that one record's outcome depends on those before it, is refused.

        Args:
            make_batch: Makes synthetic public records of the private records' shape.

        Raises:
            PlanError: The model does not run on such records, or gives another result in another order.
        """
        if self._rehearsed:
            return
        inputs, targets = make_batch(_REHEARSED)
        before = [buffer.clone() for buffer in self._model.buffers()]
        # Its own error, and not a wrong answer: nothing private has been touched.
        forwards = [self._of_record(x, y) for x, y in zip(inputs, targets, strict=True)]
        backwards = [self._of_record(x, y) for x, y in zip(inputs.flip(0), targets.flip(0), strict=True)]
        # The texts, because a NaN does not equal itself.
        if repr(forwards) != repr(backwards[::-1]) or not all(map(torch.equal, before, self._model.buffers())):
            raise PlanError(
                "expected a model that judges each record by itself, got another result in another order; ask for no "
                "metrics, or use a model without memory"
            )
        self._rehearsed = True

    @torch.no_grad()
    def outcomes(self, start: Tensor, records: Records) -> Outcomes:
        """Returns what the model makes of each record. Secret.

        Guarantees:
            Total: a record on which the task fails counts as wrong, and its loss is NaN; no failure can reveal it.

        Args:
            start: The model's trainable parameters, flat float32 ``(P,)``.
            records: The client's records; N = 0 is legal.
        """
        pieces = torch.split(start.to(self._device), [parameter.numel() for parameter in self._trainable])
        for parameter, piece in zip(self._trainable, pieces, strict=True):
            parameter.copy_(piece.view(parameter.shape))
        right, losses = [], []
        for x, y in zip(records.inputs, records.targets, strict=True):
            try:
                hit, loss = self._of_record(x, y)
            except Exception:
                # Somebody's loss may choke on one record; that it did must not show, and costs this record its answer.
                hit, loss = False, math.nan
            right.append(hit)
            losses.append(loss)
        return Outcomes(
            torch.tensor(right, dtype=torch.bool),
            torch.tensor(losses, dtype=torch.float64),
            records.targets,
            records.valid,
            self._shape.classes,
        )

    def _of_record(self, x: Tensor, y: Tensor) -> tuple[bool, float]:
        """Returns whether the model's class is the record's, and its loss."""
        output = self._model(x[None].to(self._device))
        loss = self._task.loss(output, y[None].to(self._device))
        if output.ndim != 2 or len(output) != 1 or loss.numel() != 1:
            raise PlanError(
                f"expected logits of shape (1, classes) and one loss for one record, got {tuple(output.shape)} and "
                f"{tuple(loss.shape)}; ask for no metrics of this task"
            )
        # The largest of numbers that are none is no class.
        right = bool(output.isfinite().all()) and int(output.argmax(1)) == int(y)
        return right, float(loss)
