"""What the tests of DP-SGD share: a slow, obvious oracle, seeded randomness, small models, and planted bugs.

Nothing here is imported by the library. Each planted bug is a change that a tired person could make to
``privacy/dpsgd.py``; a check that does not fail on it checks nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from privacy import dpsgd
from privacy.plan import Local, Mode, Plan

MODES = (Mode.HOOKS, Mode.GHOST, Mode.FUNCTORCH)


class Seeded:
    """A test source: coins and noise from separate generators, so that the noise does not depend on N."""

    name = "seeded test source"

    def __init__(self, seed: int = 0) -> None:
        self._coins = torch.Generator().manual_seed(seed)
        self._noise = torch.Generator().manual_seed(seed + 1)

    def coins(self, n: int, rate: float) -> Tensor:
        return torch.rand(n, generator=self._coins, dtype=torch.float64) < rate

    def gaussian(self, n: int) -> Tensor:
        return torch.randn(n, generator=self._noise, dtype=torch.float64)

    def seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self._noise))


class Noiseless(Seeded):
    """A test source without noise: what is left is the clipped sum over the public divisor."""

    def gaussian(self, n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.float64)


class Stuck(Seeded):
    """Planted bug: the same noise in every draw."""

    def gaussian(self, n: int) -> Tensor:
        return torch.randn(n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, reduction="none")


def image_model() -> nn.Module:
    """Convolution, normalisation and linear layers over 16 numbers; three classes."""
    torch.manual_seed(31)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Sequential(nn.Linear(16, 6), nn.Tanh()),
        nn.Linear(6, 3),
    )


def image_batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 16, generator=generator)
    return inputs, torch.randint(3, (count,), generator=generator)


def make_plan(**changes: object) -> Plan:
    fields: dict[str, object] = {
        "sample_rate": 0.271828,
        "expected_batch": 7.3891,
        "l2_clip": 0.57721,
        "noise_multiplier": 1.1,
        "steps": 3,
        "rounds": 2,
        "joins": 2,
        "epsilon": 3.0,
        "delta": 1e-5,
        "records_bound": 1000,
        "mode": Mode.HOOKS,
    }
    return Plan(**(fields | changes))  # type: ignore[arg-type]


def make_trainer(
    model: nn.Module | None = None,
    loss: dpsgd.LossFn = cross_entropy,
    *,
    local: Local | None = None,
    augment: dpsgd.AugmentFn | None = None,
    **changes: object,
) -> dpsgd.PrivateTrainer:
    return dpsgd.PrivateTrainer(
        model or image_model(), loss, plan=make_plan(**changes), local=local or Local(), augment=augment
    )


def flat_parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def gradient(model: nn.Module, loss: dpsgd.LossFn, views: Tensor, target: Tensor) -> Tensor:
    """The gradient of one record's loss averaged over its views ``(K, ...)``, by plain autograd."""
    model = copy.deepcopy(model).train()
    loss(model(views), target.expand(len(views), *target.shape)).mean().backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters() if p.requires_grad]
    ).double()


def oracle(model: nn.Module, loss: dpsgd.LossFn, inputs: Tensor, targets: Tensor, l2_clip: float) -> Tensor:
    """The clipped sum, one record at a time, in float64."""
    total = torch.zeros_like(flat_parameters(model), dtype=torch.float64)
    for record, target in zip(inputs, targets, strict=True):
        one = gradient(model, loss, record[None], target)
        total += one * min(1.0, l2_clip / max(one.norm().item(), 1e-300))
    return total


# Planted bugs: each patches the clipper as a wrong edit would.

Patch = Callable[[object, str, object], None]


def without_clipping(patch: Patch) -> None:
    def clip_and_add(self: dpsgd._Clipper, parts: list[dpsgd._Part], valid: Tensor) -> Tensor:
        return add_up(self, parts, valid.double())

    patch(dpsgd._Clipper, "clip_and_add", clip_and_add)


def zero_times_infinity(patch: Patch) -> None:
    for part in (dpsgd._Dense, dpsgd._Factored):
        patch(part, "blank", lambda self, dropped: None)


def clipping_after_the_sum(patch: Patch) -> None:
    def clip_and_add(self: dpsgd._Clipper, parts: list[dpsgd._Part], valid: Tensor) -> Tensor:
        total = add_up(self, parts, valid.double())
        return total * min(1.0, self._bound / max(total.norm().item(), 1e-30))

    patch(dpsgd._Clipper, "clip_and_add", clip_and_add)


def mean_instead_of_sum(patch: Patch) -> None:
    right = dpsgd._Clipper.clip_and_add

    def clip_and_add(self: dpsgd._Clipper, parts: list[dpsgd._Part], valid: Tensor) -> Tensor:
        return right(self, parts, valid) / len(valid)

    patch(dpsgd._Clipper, "clip_and_add", clip_and_add)


def trusting_inputs(patch: Patch) -> None:
    patch(dpsgd._Clipper, "_clean", lambda self, inputs, targets, valid: (inputs, targets, valid))
    zero_times_infinity(patch)


def keeping_a_running_sum(patch: Patch) -> None:
    right = dpsgd._Clipper.clip_and_add
    left: dict[int, Tensor] = {}

    def clip_and_add(self: dpsgd._Clipper, parts: list[dpsgd._Part], valid: Tensor) -> Tensor:
        left[id(self)] = left.get(id(self), 0) + right(self, parts, valid)
        return left[id(self)]

    patch(dpsgd._Clipper, "clip_and_add", clip_and_add)


def summing_in_float32(patch: Patch) -> None:
    def dense(self: dpsgd._Dense, factor: Tensor, total: Tensor) -> None:
        total += torch.mv(self._gradients.float().T, factor.float())

    def factored(self: dpsgd._Factored, factor: Tensor, total: Tensor) -> None:
        scaled = self._signals * factor.float()[:, None]
        if self._weight:
            total[: self._split] += (scaled.T @ self._inputs).flatten()
        if self._bias:
            total[self._split :] += scaled.sum(0)

    patch(dpsgd._Dense, "add_weighted", dense)
    patch(dpsgd._Factored, "add_weighted", factored)


def augmenting_the_batch(patch: Patch) -> None:
    def augmented(self: dpsgd._Clipper, augment: dpsgd.AugmentFn, inputs: Tensor, rows: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([augment(inputs, generator) for _ in range(self._view_count)], 1)

    patch(dpsgd._Clipper, "_augmented", augmented)


def seeding_views_by_place_in_the_pass(patch: Patch) -> None:
    right = dpsgd._Clipper._augmented

    def augmented(self: dpsgd._Clipper, augment: dpsgd.AugmentFn, inputs: Tensor, rows: Tensor, seed: int) -> Tensor:
        return right(self, augment, inputs, torch.arange(len(rows)), seed)

    patch(dpsgd._Clipper, "_augmented", augmented)


def dropping_the_whole_pass(patch: Patch) -> None:
    right = dpsgd._Clipper._attempt

    def attempt(
        self: dpsgd._Clipper, inputs: Tensor, targets: Tensor, valid: Tensor, rows: Tensor, seed: int
    ) -> Tensor:
        part = right(self, inputs, targets, valid, rows, seed)
        return torch.zeros_like(self.flat, dtype=torch.float64) if part is None else part

    patch(dpsgd._Clipper, "_attempt", attempt)


def keeping_the_callers_precision(patch: Patch) -> None:
    patch(dpsgd, "_full_float32", lambda device: contextlib.nullcontext())


def one_pass_for_the_whole_sample(patch: Patch) -> None:
    right = dpsgd._Clipper.sum

    def everything_at_once(self: dpsgd._Clipper, *records: Tensor, **_: object) -> Tensor:
        self.records_per_pass = max(1, len(records[3]))
        return right(self, *records)  # type: ignore[arg-type]

    patch(dpsgd._Clipper, "sum", everything_at_once)


def dividing_by_the_sample(patch: Patch) -> None:
    def private_gradient(
        self: dpsgd.PrivateTrainer, inputs: Tensor, targets: Tensor, valid: Tensor, source: Seeded
    ) -> Tensor:
        chosen = source.coins(len(inputs), self._plan.sample_rate).nonzero().squeeze(1)
        total = self._clipper.sum(inputs, targets, valid, chosen, source.seed())
        total += self._plan.noise_multiplier * self._plan.l2_clip * source.gaussian(self.size)
        return (total / max(1, len(chosen))).float()

    patch(dpsgd.PrivateTrainer, "_private_gradient", private_gradient)


def add_up(clipper: dpsgd._Clipper, parts: list[dpsgd._Part], factor: Tensor) -> Tensor:
    total = torch.zeros_like(clipper.flat, dtype=torch.float64)
    start = 0
    for part in parts:
        part.add_weighted(factor, total[start : start + part.width])
        start += part.width
    return total
