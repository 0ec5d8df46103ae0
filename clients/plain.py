"""Training at a client whose update a trusted server will hide: plain steps, then a clip (guarantee G16).

A task may bring its own local rule instead of steps on its loss (`models.task.Task.local`): a ridge regression, games
played on the client's own machine. It changes nothing here: whatever a rule does, what leaves is the difference of the
parameters, of the same length always, clipped in the one place that clips plain steps too.

Nothing here is private by itself. The update goes to the server in the clear; what protects the client from everybody
else is the noise that `privacy.central` adds there, and it is added for an update of norm at most the clip. The server
clips again, so a mistake here can cost usefulness and never the guarantee.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from clients.records import Records
from models.task import Pace, Task
from privacy.central import Vector, clip_update
from privacy.dpsgd import Descent
from privacy.errors import PlanError
from privacy.noise import RandomSource
from privacy.plan import Local, Plan, Unit, require
from privacy.vault import private_logger

# Details of a fault stay with the holder; they reach only what a deployment attaches here, a `SealedLog`.
_log = private_logger("tacit.client")


def check_unit(task: Task, unit: Unit) -> None:
    """Refuses a plan that protects records for a task whose clients train by a rule of its own.

    Raises:
        PlanError: Such a rule has no gradient of one record that could be clipped.
    """
    require(
        task.local is None or unit is Unit.CLIENT,
        f"expected unit client for task {task.name}, whose clients train by a rule of its own, got unit {unit}; no "
        "bound on one record exists there, so use --unit client, at a server that is trusted to add the noise",
    )


class PlainTrainer:
    """Trains one model plainly under a client-level plan; built once, used for many clients and rounds.

    Attributes:
        names: Trainable parameters in the order of the flat vector.
        shapes: Their shapes.
        size: Length P of the flat vector.
    """

    def __init__(self, model: nn.Module, task: Task, *, plan: Plan, local: Local, device: str = "cpu") -> None:
        """Copies the model.

        Args:
            model: Checked by `privacy.dpsgd.check_model`; only trainable parameters move and travel.
            task: Its loss and augmentation, or its local rule.
            plan: At unit client: steps, and the rate of local batches.
            local: Learning knobs.
            device: Where gradients are computed.

        Raises:
            PlanError: A learning knob is given that the task's own local rule would ignore.
        """
        require(
            task.local is None or local == Local(lr=local.lr),
            f"expected no optimizer, momentum, weight-decay or proximal-mu for task {task.name}, whose clients train "
            "by a rule of its own that would ignore them, got one; drop it",
        )
        self._plan, self._local, self._task = plan, local, task
        self._model = copy.deepcopy(model).to(device).train()
        self._trainable = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._device = torch.device(device)
        self.names = tuple(self._trainable)
        self.shapes = tuple(tuple(p.shape) for p in self._trainable.values())
        self.size = sum(p.numel() for p in self._trainable.values())
        self._rehearsed = False

    def rehearse(self, make_batch: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        """Runs one pass on synthetic records, once for this trainer: what does not run fails before the charge.

        Raises:
            PlanError: The model does not run on such records, or they do not fit in memory.
        """
        if self._rehearsed:
            return
        try:
            inputs, targets = make_batch(self._plan.physical_batch)
            if self._task.local is None:
                self._gradient(inputs, targets)
            else:
                self._ruled(
                    torch.cat([p.detach().cpu().flatten() for p in self._trainable.values()]),
                    inputs,
                    targets,
                    1,
                    self._local.lr,
                    0,
                )
        except Exception as error:
            raise PlanError(
                f"expected the model to run on {self._plan.physical_batch} synthetic records, got {error}; check the "
                "records' shape, or lower physical_batch where memory is short"
            ) from error
        self._rehearsed = True

    def update(
        self, start: Tensor, records: Records, source: RandomSource, *, lr: float, clip: float, simulated: bool
    ) -> Vector:
        """Takes ``plan.steps`` plain steps from ``start`` and returns how far they led, clipped.

        Guarantees:
            Bound: norm at most ``clip`` before rounding to float32, and finite, whatever the records hold.
            Shape: the length depends on the plan alone. A real holder's faults give the zero update and stay there.

        Args:
            start: Parameters, float32 ``(P,)``.
            records: The client's records; those that are not valid are left out, and there may be none.
            source: Coins of the local batches, which carry no guarantee.
            lr: This round's learning rate > 0.
            clip: This round's clip C > 0.
            simulated: Whether faults are the experimenter's own and may be raised.

        Returns:
            The clipped update, float32 ``(P,)``; where the plan's clip follows a quantile, ``(P + 1,)`` with a last
            number 1 if the update was within the clip before, else 0.
        """
        try:
            moved = self._trained(start, records, source, lr) - start.cpu()
            update = moved.numpy()
        except Exception:
            if simulated:
                raise
            _log.exception("plain training failed and takes part as nothing; this stays on this machine")
            update = np.zeros(self.size, dtype=np.float32)
        clipped, within = clip_update(update, clip)
        sent: Vector = clipped.astype(np.float32)
        return np.append(sent, np.float32(within)) if self._plan.quantile else sent

    def _trained(self, start: Tensor, records: Records, source: RandomSource, lr: float) -> Tensor:
        """Returns the parameters after the steps, float32 ``(P,)`` on the CPU."""
        weights = start.to("cpu", torch.float32, copy=True)
        usable = records.valid.nonzero().squeeze(1)
        if self._task.local is not None:
            if not len(usable):
                return weights
            inputs, targets = records.inputs[usable], records.targets[usable]
            return self._ruled(weights, inputs, targets, self._plan.steps, lr, source.seed())
        descent = Descent(self._local, lr, start.to("cpu", torch.float32))
        for _ in range(self._plan.steps):
            chosen = usable[source.coins(len(usable), self._plan.sample_rate)]
            if not len(chosen):
                continue
            self._write(weights)
            seed = source.seed()
            total = torch.zeros(self.size)
            for rows in torch.split(chosen, self._plan.physical_batch):
                total += self._gradient(*self._views(records, rows, seed), seed=seed) * len(rows)
            with torch.no_grad():
                descent.move(weights, total / len(chosen))
        return weights

    def _ruled(self, start: Tensor, inputs: Tensor, targets: Tensor, steps: int, lr: float, seed: int) -> Tensor:
        """Returns where the task's own rule leads from ``start``, float32 ``(P,)`` on the CPU.

        Raises:
            ValueError: The rule changed a parameter's shape.
        """
        if self._task.local is None:
            raise ValueError("expected a task with a local rule, got one without")
        self._write(start)
        # A copy each time: what a rule leaves in the model may not reach the next client of this process.
        model = copy.deepcopy(self._model)
        plan = self._plan
        pace = Pace(steps=steps, sample_rate=plan.sample_rate, lr=lr, batch=plan.physical_batch, seed=seed)
        self._task.local(model, inputs.to(self._device), targets.to(self._device), pace)
        moved = dict(model.named_parameters())
        if any(tuple(moved[name].shape) != shape for name, shape in zip(self.names, self.shapes, strict=True)):
            raise ValueError("expected parameters of the shapes that the model has, got others from the local rule")
        return torch.cat([moved[name].detach().to("cpu", torch.float32).flatten() for name in self.names])

    @torch.no_grad()
    def _write(self, weights: Tensor) -> None:
        pieces = torch.split(weights, [math.prod(shape) for shape in self.shapes])
        for parameter, piece in zip(self._trainable.values(), pieces, strict=True):
            parameter.copy_(piece.view(parameter.shape))

    def _views(self, records: Records, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Returns the inputs and targets of some rows, each augmented by itself where the task augments."""
        inputs, targets = records.inputs[rows], records.targets[rows]
        if self._task.augment is not None:
            generator = torch.Generator().manual_seed(seed)
            inputs = torch.cat([self._task.augment(record[None].clone(), generator) for record in inputs])
        return inputs, targets

    def _gradient(self, inputs: Tensor, targets: Tensor, seed: int = 0) -> Tensor:
        """Returns the gradient of the mean loss at the model's parameters, float32 ``(P,)`` on the CPU."""
        accelerators = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(accelerators) if _draws(self._model) else contextlib.nullcontext():
            if _draws(self._model):
                torch.manual_seed(seed)
            with torch.enable_grad():
                outputs = self._model(inputs.to(self._device))
                loss = self._task.loss(outputs, targets.to(self._device)).mean()
                gradients = torch.autograd.grad(loss, list(self._trainable.values()))
        return torch.cat([gradient.detach().flatten() for gradient in gradients]).cpu()


def _draws(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
