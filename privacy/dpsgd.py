"""Record-level DP-SGD: every record alone, clipped, summed, noised, divided by a public constant.

Per-example gradients come from Opacus' registered samplers (``Mode.HOOKS``), from the same samplers with
linear layers kept as factors (``Mode.GHOST``), or from PyTorch's ``vmap(grad)`` (``Mode.FUNCTORCH``). No
module is wrapped, no hook is registered and no gradient is stored on a parameter: whatever a pass computes
lives in local variables, so an interrupted pass leaves nothing behind that a later one could add to.

What keeps examples apart (guarantee G10) is, in this order: `check_model` refuses modules that are known to
mix or to remember examples; batched passes run only through layers on a written allow-list, and anything
else, an unknown loss included, runs under ``vmap``, one record at a time; `probe` tries the result on
synthetic records.

Floating point. Norms are float64 and the clipping factor is shrunk by a relative `SHRINK`; this covers the
three float32 roundings of a contribution (factor, scaled gradient, product: 3 * 2**-24 = 1.8e-7), so that
each record's contribution as computed has an L2 norm of at most C. What stays is the rounding of the sum
itself: its last bits, of the order of ``B * C * 2**-24`` for B sampled records, depend on which other records
are in it. The noise is added in float64 and the report carries the caveat (G11).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from privacy.errors import PlanError
from privacy.noise import RandomSource
from privacy.plan import Local, Mode, Optimizer, Plan

__all__ = ["SHRINK", "PrivateTrainer", "check_model", "choose_mode", "probe", "supported_modes"]

LossFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Per-example loss: outputs ``(B, ...)`` and targets ``(B, ...)`` to losses ``(B,)``."""

AugmentFn: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""One random view of a batch ``(B, ...)``, record by record."""

MakeBatch: TypeAlias = Callable[[int], tuple[Tensor, Tensor]]
"""Synthetic public records: a count n to inputs ``(n, ...)`` and targets ``(n, ...)``."""

SHRINK: Final = 1e-6
"""Relative part of the clipping bound given up to float32 rounding."""

# Below this a float32 factor is subnormal and may be off by more than SHRINK: such an example counts as
# non-finite.
_LEAST_FACTOR: Final = 2.0**-126
# Ghost mode multiplies scaled factors; beyond this magnitude their product could lose bits to subnormals.
_LARGEST_FACTOR_NORM: Final = 2.0**64
_CLIP_RANGE: Final = (2.0**-40, 2.0**40)
# Float64 norms are taken over slices of this many numbers, which stay in the processor's cache.
_SLICE: Final = 2**18


# What a model may contain -----------------------------------------------------------------------------------


def check_model(model: nn.Module) -> None:
    """Refuses models that mix examples or keep statistics of them, and says what to use instead.

    Args:
        model: Any module.

    Raises:
        PlanError: A module keeps running statistics, normalises over the batch, changes a buffer or a weight
            in its forward pass, or is lazy; or nothing is trainable; or a trainable parameter is not float32.
            The message names every refused module and its remedy.
    """
    faults = [
        f"{name or 'the model'} ({type(module).__name__}): {fault}"
        for name, module in model.named_modules()
        if (fault := _fault(module)) is not None
    ]
    if faults:
        raise PlanError("expected a model that treats every example alone, got " + "; ".join(faults))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise PlanError("expected a model with trainable parameters, got none; set requires_grad on some")
    for name, parameter in trainable:
        if parameter.dtype is not torch.float32:
            raise PlanError(f"expected float32 parameters, got {name} in {parameter.dtype}; call model.float()")


def _fault(module: nn.Module) -> str | None:
    """Returns why a module is refused and the fix, or None."""
    if isinstance(module, LazyModuleMixin) or any(is_lazy(p) for p in module.parameters(recurse=False)):
        return "its shape is not known yet; run one public batch through the model first"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return "keeps running statistics of the examples; use track_running_stats=False"
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    if isinstance(module, _BatchNorm) or any(getattr(module, name, None) is not None for name in statistics):
        # A frozen or affine=False BatchNorm too: in training it still averages the batch and updates its
        # statistics.
        features = getattr(module, "num_features", None)
        if not isinstance(features, int):
            return "keeps running statistics of the examples; use GroupNorm or LayerNorm"
        groups = next(n for n in (32, 16, 8, 4, 2, 1) if features % n == 0)
        return f"normalises over the batch or keeps running statistics; use GroupNorm({groups}, {features})"
    power_iteration = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    if isinstance(module, _SpectralNorm) or power_iteration:
        return "updates its buffers in every forward pass; remove spectral_norm and use GroupNorm or LayerNorm"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if module.max_norm is not None:
            return "rewrites its weight in the forward pass for the tokens it sees; use max_norm=None"
        if module.scale_grad_by_freq or module.sparse:
            return "scales by token counts or is sparse; use scale_grad_by_freq=False, sparse=False"
    return None


def _always(_: nn.Module) -> bool:
    return True


def _keeps_batch_dimension(module: nn.Module) -> bool:
    first = module.dim if isinstance(module, nn.Unflatten | nn.Softmax | nn.LogSoftmax) else module.start_dim
    return isinstance(first, int) and first >= 1


def _zero_padded(module: nn.Module) -> bool:
    return module.padding_mode == "zeros"


def _affine_bias(module: nn.Module) -> bool:
    # Opacus' LayerNorm sampler reads the bias without asking whether there is one.
    return module.weight is None or module.bias is not None


def _plain_embedding(module: nn.Module) -> bool:
    # Opacus' embedding sampler gives the padding row a gradient; autograd gives it none.
    return module.padding_idx is None


# Exact types whose batched pass keeps examples apart, and whose gradients Opacus 1.6 gets right (the oracle
# tests run every entry that has parameters). A subclass may override forward, so it does not inherit its
# parent's place here.
_ALLOWED: Final[Mapping[type[nn.Module], Callable[[nn.Module], bool]]] = {
    nn.Linear: _always,
    nn.Conv1d: _zero_padded,
    nn.Conv2d: _zero_padded,
    nn.Conv3d: _zero_padded,
    nn.GroupNorm: _always,
    nn.LayerNorm: _affine_bias,
    nn.RMSNorm: _always,
    nn.Embedding: _plain_embedding,
    nn.Flatten: _keeps_batch_dimension,
    nn.Unflatten: _keeps_batch_dimension,
    nn.Softmax: _keeps_batch_dimension,
    nn.LogSoftmax: _keeps_batch_dimension,
    **dict.fromkeys(
        (
            *(
                nn.Identity,
                nn.Dropout,
                nn.ReLU,
                nn.ReLU6,
                nn.LeakyReLU,
                nn.ELU,
                nn.CELU,
                nn.SELU,
                nn.GELU,
                nn.SiLU,
            ),
            *(
                nn.Mish,
                nn.Tanh,
                nn.Sigmoid,
                nn.Softplus,
                nn.Softsign,
                nn.Hardtanh,
                nn.Hardswish,
                nn.Hardsigmoid,
            ),
            *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
            *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
            *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        ),
        _always,
    ),
}

# PyTorch reads a tensor with one dimension less as a single unbatched example, which would make the batch a
# channel.
_DIMENSIONS: Final = {"1d": 3, "2d": 4, "3d": 5}


def _refused_by_batched_modes(model: nn.Module) -> str | None:
    """Returns the first reason why only one-at-a-time passes are safe or exact for this model, or None."""
    for name, module in model.named_modules():
        label = f"{name or 'the model'} ({type(module).__name__})"
        if any(
            (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        ):
            return f"{label} carries hooks"
        if "forward" in vars(module):
            return f"{label} overrides forward"
        if type(module) is nn.Sequential:
            if module._parameters or module._buffers:
                return f"{label} holds parameters of its own"
        elif type(module) not in _ALLOWED or not _ALLOWED[type(module)](module):
            return f"{label} is not on the allow-list"
        elif module._modules or module._buffers:
            return f"{label} holds modules or buffers of its own"
    if len(list(model.named_parameters(remove_duplicate=False))) != len(list(model.parameters())):
        return "two layers share a parameter"
    return None


def supported_modes(model: nn.Module, views: int = 1) -> tuple[Mode, ...]:
    """Returns the modes in which this model's examples stay alone.

    Guarantees:
        Alone: a batched mode is offered only if every module, containers included, is of a type on the
            allow-list; every other model runs one record at a time.

    Args:
        model: The model.
        views: Augmented views of a record whose gradients are averaged before clipping; more than one view
            needs the one-record path.

    Returns:
        ``Mode.FUNCTORCH`` always, before it ``Mode.HOOKS`` and ``Mode.GHOST`` where they apply.

    Raises:
        PlanError: As `check_model`.
    """
    check_model(model)
    if views > 1 or _refused_by_batched_modes(model) is not None:
        return (Mode.FUNCTORCH,)
    return (Mode.HOOKS, Mode.GHOST, Mode.FUNCTORCH)


# Per-example gradients --------------------------------------------------------------------------------------


class _Part(Protocol):
    """Per-example gradients of one or two parameters, in the parameters' order."""

    @property
    def width(self) -> int:
        """How many entries of the flat parameter vector these gradients are for."""

    def squares(self) -> Tensor:
        """Returns squared L2 norms, float64 ``(B,)``, non-finite where the gradient is."""

    def blank(self, dropped: Tensor) -> None:
        """Sets the rows where ``dropped`` bool ``(B,)`` holds to zero, so that no 0 * inf can arise."""

    def weighted_sum(self, factor: Tensor, out: Tensor) -> None:
        """Writes the sum over examples of ``factor`` float32 ``(B,)`` times gradient to ``out``, flat."""

    def rows(self) -> tuple[Tensor, ...]:
        """Returns tensors ``(B, ...)`` whose rows j determine the gradient of example j."""


def _squares(rows: Tensor) -> Tensor:
    """Returns squared L2 norms of rows ``(B, n)`` in float64, shape ``(B,)``."""
    # In float32 squares overflow from 2e19 and a long sum loses more than SHRINK.
    count, length = rows.shape
    if rows.numel() <= _SLICE or rows.device.type != "cpu":
        norm: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return norm.square()
    # In slices, or the float64 copy of all gradients would fall out of the cache.
    total = torch.zeros(count, dtype=torch.float64)
    width = max(1, _SLICE // count)
    for start in range(0, length, width):
        piece = rows[:, start : start + width]
        total += torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64).square()
    return total


@final
class _Dense:
    """Gradients ``(B, p)`` of one parameter."""

    def __init__(self, gradients: Tensor) -> None:
        self._gradients = gradients.flatten(1)
        self.width = self._gradients.shape[1]

    def squares(self) -> Tensor:
        return _squares(self._gradients)

    def blank(self, dropped: Tensor) -> None:
        self._gradients = self._gradients.masked_fill_(dropped[:, None], 0.0)

    def weighted_sum(self, factor: Tensor, out: Tensor) -> None:
        torch.mv(self._gradients.T, factor, out=out)

    def rows(self) -> tuple[Tensor, ...]:
        return (self._gradients,)


@final
class _Factored:
    """Gradients of a linear layer, never formed: the weight's is ``signal_j x input_j``, the bias's
    ``signal_j``.

    The norm of an outer product is the product of the norms, and the clipped sum is one matrix product, so
    that neither the second backward pass of ghost clipping nor ``(B, p)`` numbers of memory are needed.

    References:
        `Goodfellow (2015) <https://arxiv.org/abs/1510.01799>`_ (norms);
        `Bu et al. (2023) <https://arxiv.org/abs/2210.00038>`_ (book-keeping instead of a second pass).
    """

    def __init__(self, layer: nn.Linear, inputs: Tensor, signals: Tensor) -> None:
        self._inputs, self._signals = inputs, signals
        self._weight = layer.weight.requires_grad
        self._bias = layer.bias is not None and layer.bias.requires_grad
        self._split = layer.weight.numel() if self._weight else 0
        self.width = self._split + (signals.shape[1] if self._bias else 0)

    def squares(self) -> Tensor:
        inputs, signals = _squares(self._inputs), _squares(self._signals)
        squares = signals * (inputs * self._weight + float(self._bias))
        limit = _LARGEST_FACTOR_NORM**2
        return torch.where((inputs <= limit) & (signals <= limit), squares, math.nan)

    def blank(self, dropped: Tensor) -> None:
        self._inputs = torch.where(dropped[:, None], 0.0, self._inputs)
        self._signals = torch.where(dropped[:, None], 0.0, self._signals)

    def weighted_sum(self, factor: Tensor, out: Tensor) -> None:
        scaled = self._signals * factor[:, None]
        if self._weight:
            torch.mm(scaled.T, self._inputs, out=out[: self._split].view(scaled.shape[1], -1))
        if self._bias:
            torch.sum(scaled, 0, out=out[self._split :])

    def rows(self) -> tuple[Tensor, ...]:
        return (self._inputs, self._signals)


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the layers of an allow-listed model in the order in which they run."""
    if type(module) is nn.Sequential:
        for child in module._modules.values():
            if child is not None:
                yield from _leaves(child)
        return
    if getattr(module, "inplace", False):
        # Computing in place would overwrite the layer output whose gradient is asked for.
        module = copy.copy(module)
        vars(module)["inplace"] = False
    yield module


def _dimensions(layer: nn.Module) -> tuple[int, float]:
    """Returns the least and the most dimensions that a layer reads as a batch and not as one example."""
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return len(layer.normalized_shape) + 1, math.inf
    if isinstance(layer, nn.Embedding):
        return 1, math.inf
    exact = _DIMENSIONS.get(type(layer).__name__[-2:])
    return (exact, exact) if exact else (2, math.inf)


def _is_cross_entropy(loss: LossFn) -> bool:
    """Tells whether a loss is plain per-example cross entropy, so that a batched pass is known to be safe."""
    try:
        traced = torch.fx.symbolic_trace(lambda output, target: loss(output, target))
    except Exception:
        # Not traceable means not known: the loss then runs one example at a time, which is always right.
        return False
    nodes = list(traced.graph.nodes)
    if [node.op for node in nodes] != ["placeholder", "placeholder", "call_function", "output"]:
        return False
    output, target, call, result = nodes
    return (
        call.target is functional.cross_entropy
        and call.args == (output, target)
        and call.kwargs.get("reduction") == "none"
        and all(call.kwargs.get(name) is None for name in ("weight", "size_average", "reduce"))
        and result.args == (call,)
    )


def _losses(loss: LossFn, outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the losses of a batch, refusing a loss that is not one number an example."""
    losses = loss(outputs, targets)
    if losses.shape != outputs.shape[:1]:
        raise PlanError(
            f"expected a loss per example of shape {tuple(outputs.shape[:1])}, got {tuple(losses.shape)}; "
            'use reduction="none": a mean over the batch would not be clipped example by example'
        )
    return losses


@final
class _Clipper:
    """The sum of clipped per-example gradients of one model; everything but noise and optimiser.

    Args as `PrivateTrainer`. ``flat`` is the parameter vector: writing to it moves the model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFn,
        *,
        mode: Mode,
        l2_clip: float,
        physical_batch: int,
        views: int,
        augment: AugmentFn | None,
        device: torch.device,
    ) -> None:
        modes = supported_modes(model, views)
        if mode not in modes:
            why = "several views" if views > 1 else _refused_by_batched_modes(model) or "auto is not resolved"
            raise PlanError(
                f"expected a mode out of {', '.join(modes)} for this model, got {mode.value} ({why}); "
                "let choose_mode pick one"
            )
        if not _CLIP_RANGE[0] <= l2_clip <= _CLIP_RANGE[1]:
            # Outside, float32 gradients at the bound come near its smallest or largest numbers.
            raise PlanError(f"expected 1e-12 <= l2_clip <= 1e12, got {l2_clip:g}; rescale the loss")
        # A copy: the caller's model is never moved, and no caller can hang a hook on ours.
        self.model = copy.deepcopy(model).to(device).train()
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.names = tuple(trainable)
        self.shapes = tuple(tuple(p.shape) for p in trainable.values())
        self.flat = torch.cat([p.detach().flatten() for p in trainable.values()])
        self._views: dict[str, Tensor] = {}
        for (name, parameter), piece in zip(
            trainable.items(), torch.split(self.flat, [p.numel() for p in trainable.values()]), strict=True
        ):
            parameter.data = self._views[name] = piece.view(parameter.shape)
        self._loss, self._mode, self._device = loss, mode, device
        self._bound = l2_clip * (1.0 - SHRINK)
        self._records_per_pass = max(1, physical_batch // views)
        self._view_count, self._augment = views, augment
        if mode is Mode.FUNCTORCH:
            self._draws_randomness = True
            self._one_at_a_time = torch.func.vmap(
                torch.func.grad(self._record_loss), in_dims=(None, 0, 0), randomness="different"
            )
        else:
            self._prepare_layers()

    def _prepare_layers(self) -> None:
        """Finds each layer's sampler; Opacus is imported only where it is used, for it takes seconds."""
        from opacus.grad_sample import GradSampleModule

        self._layers = [
            (layer, [p for p in layer.parameters() if p.requires_grad], *_dimensions(layer))
            for layer in _leaves(self.model)
        ]
        self._sampler = GradSampleModule.GRAD_SAMPLERS
        self._draws_randomness = any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer, *_ in self._layers)
        self._loss_is_known = _is_cross_entropy(self._loss)
        self._loss_gradient = torch.func.vmap(
            torch.func.grad(lambda output, target: _losses(self._loss, output[None], target[None])[0]),
            randomness="different",
        )

    def _record_loss(self, parameters: Mapping[str, Tensor], views: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of one record, averaged over its views ``(K, ...)``."""
        outputs = torch.func.functional_call(self.model, dict(parameters), (views,))
        return _losses(self._loss, outputs, target.expand(views.shape[0], *target.shape)).mean()

    def _batched(self, inputs: Tensor, targets: Tensor) -> list[_Part]:
        """Runs one forward and one backward pass and turns each layer's record of it into gradients."""
        trace: list[tuple[nn.Module, list[nn.Parameter], Tensor]] = []
        outputs: list[Tensor] = []
        for layer, trainable, least, most in self._layers:
            if not least <= inputs.dim() <= most:
                # Shapes are public: this raises for every record or for none.
                raise PlanError(
                    f"expected a batch of {least} or more dimensions before {type(layer).__name__}, got "
                    f"{inputs.dim()}, which it would read as one example; put nn.Unflatten before it"
                )
            if trainable:
                trace.append((layer, trainable, inputs.detach()))
            # Nothing before the first trainable layer needs a gradient, nor does any weight.
            with torch.set_grad_enabled(bool(outputs)):
                inputs = layer(inputs)
            if trainable:
                outputs.append(inputs if outputs else inputs.requires_grad_())
        if self._loss_is_known:
            with torch.enable_grad():
                signals = torch.autograd.grad(_losses(self._loss, inputs, targets).sum(), outputs)
        else:
            # An unknown loss could average over the batch; alone with one output and one target it cannot.
            signals = torch.autograd.grad(inputs, outputs, self._loss_gradient(inputs.detach(), targets))
        parts: list[_Part] = []
        for (layer, trainable, activations), signal in zip(trace, signals, strict=True):
            if self._mode is Mode.GHOST and isinstance(layer, nn.Linear) and activations.dim() == 2:
                parts.append(_Factored(layer, activations, signal))
                continue
            # Opacus' strided unfold reads memory as if it were contiguous.
            gradients = self._sampler[type(layer)](layer, [activations.contiguous()], signal.contiguous())
            parts += [_Dense(gradients[p]) for p in trainable]
        return parts

    def parts(self, inputs: Tensor, targets: Tensor, seed: int) -> list[_Part]:
        """Returns the per-example gradients of a non-empty batch of clean records on the device."""
        if self._augment is None:
            stacked = inputs[:, None].expand(-1, self._view_count, *inputs.shape[1:])  # (B, K, ...)
        else:
            generator = torch.Generator().manual_seed(seed)
            stacked = torch.stack([self._augment(inputs, generator) for _ in range(self._view_count)], 1)
        if not self._draws_randomness:
            return self._parts(stacked, targets)
        accelerators = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(accelerators):
            torch.default_generator.manual_seed(seed)
            if accelerators:
                torch.cuda.manual_seed(seed)
            return self._parts(stacked, targets)

    def _parts(self, stacked: Tensor, targets: Tensor) -> list[_Part]:
        if self._mode is not Mode.FUNCTORCH:
            return self._batched(stacked[:, 0], targets)
        return [_Dense(g) for g in self._one_at_a_time(self._views, stacked, targets).values()]

    def clip_and_add(self, parts: Sequence[_Part], valid: Tensor) -> Tensor:
        """Returns the sum of clipped gradients, float32 ``(P,)``; the one place where gradients meet.

        Guarantees:
            Bound: each row contributes a vector of L2 norm at most C, whatever its content.
            Nothing: a row that is not valid, or whose gradient or norm is not finite, contributes exactly
                zero.
        """
        norm = torch.stack([part.squares() for part in parts]).sum(0).sqrt()  # (B,) float64
        # A zero norm divides to infinity, which the clamp turns into 1; NaN and infinity fail the test below.
        factor = (self._bound / norm).clamp(max=1.0).float()
        counted = valid & torch.isfinite(norm) & (factor >= _LEAST_FACTOR)
        factor = torch.where(counted, factor, 0.0)
        total = torch.empty_like(self.flat)
        finite = bool(torch.isfinite(norm).all())
        start = 0
        for part in parts:
            if not finite:
                part.blank(~counted)
            part.weighted_sum(factor, total[start : start + part.width])
            start += part.width
        return total

    def sum(self, inputs: Tensor, targets: Tensor, valid: Tensor, chosen: Tensor, seed: int) -> Tensor:
        """Returns the clipped sum over the rows ``chosen`` in physical batches, float64 ``(P,)``, CPU."""
        total = torch.zeros(self.flat.shape[0], dtype=torch.float64)
        if not len(chosen):
            return total
        for number, rows in enumerate(torch.split(chosen, self._records_per_pass)):
            batch, labels, clean = self._clean(inputs[rows], targets[rows], valid[rows])
            parts = self.parts(batch, labels, (seed + number) % 2**63)
            total += self.clip_and_add(parts, clean).to("cpu", torch.float64)
        return total

    def _clean(self, inputs: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a batch on the device in which every unusable row is zero, and which rows are usable."""
        device = self._device
        inputs, targets, valid = inputs.to(device), targets.to(device), valid.to(device)
        if inputs.is_floating_point():
            inputs = inputs.float()
            valid = valid & torch.isfinite(inputs).view(len(inputs), -1).all(1)
        if targets.is_floating_point():
            targets = targets.float()
            valid = valid & torch.isfinite(targets).view(len(targets), -1).all(1)
        # Before the pass: inside it one NaN could reach other rows through a shared matrix product.
        inputs = torch.where(_like(valid, inputs), inputs, 0)
        return inputs, torch.where(_like(valid, targets), targets, 0), valid


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    """Returns ``rows`` ``(B,)`` in a shape that broadcasts over ``tensor`` ``(B, ...)``."""
    return rows.view(-1, *[1] * (tensor.dim() - 1))


# Training ---------------------------------------------------------------------------------------------------


@final
class _Descent:
    """The optimisers of ``torch.optim`` on one flat vector; sees released gradients only.

    Flat arithmetic instead of ``torch.optim``: equal results, one call a step instead of one a parameter, and
    no import of the compiler, which costs seconds at the first step.

    References:
        `Kingma & Ba (2015) <https://arxiv.org/abs/1412.6980>`_ (Adam);
        `Loshchilov & Hutter (2019) <https://arxiv.org/abs/1711.05101>`_ (decoupled decay);
        `Li et al. (2020) <https://arxiv.org/abs/1812.06127>`_ (FedProx).
    """

    _BETA2: Final = 0.999
    _EPS: Final = 1e-8

    def __init__(self, local: Local, lr: float, anchor: Tensor) -> None:
        self._local, self._lr, self._anchor = local, lr, anchor
        self._step = 0
        self._mean = torch.zeros_like(anchor)
        self._square = torch.zeros_like(anchor)

    def move(self, weights: Tensor, gradient: Tensor) -> None:
        """Takes one step on ``weights`` in place, both float32 ``(P,)``."""
        local = self._local
        self._step += 1
        if local.proximal_mu:
            gradient = gradient + local.proximal_mu * (weights - self._anchor)
        if local.optimizer is Optimizer.ADAMW:
            weights.mul_(1 - self._lr * local.weight_decay)
        elif local.weight_decay:
            gradient = gradient + local.weight_decay * weights
        if local.optimizer is Optimizer.SGD:
            if local.momentum:
                gradient = self._mean.mul_(local.momentum).add_(gradient)
            weights.sub_(gradient, alpha=self._lr)
            return
        self._mean.lerp_(gradient, 1 - local.momentum)
        self._square.mul_(self._BETA2).addcmul_(gradient, gradient, value=1 - self._BETA2)
        correction = math.sqrt(1 - self._BETA2**self._step)
        scale = (self._square.sqrt() / correction).add_(self._EPS)
        weights.addcdiv_(self._mean, scale, value=-self._lr / (1 - local.momentum**self._step))


@final
class PrivateTrainer:
    """Trains one model with DP-SGD under a fixed plan; built once, used for many clients and rounds.

    Guarantees:
        Bound: whatever a record holds (NaN, infinities, 3e38, zeros), adding or removing it changes
            `clipped_sum` by a vector of norm at most ``plan.l2_clip``, rounding of the sum aside (module
            docstring).
        Public: noise, divisor and number of steps come from the plan alone; an empty batch is a legal step.
        Stateless: nothing of one call is left for the next; the same source gives the same bytes on one
            thread.

    Attributes:
        names: Trainable parameters in the order of the flat vector.
        shapes: Their shapes.
        size: Length P of the flat vector.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFn,
        *,
        plan: Plan,
        local: Local,
        augment: AugmentFn | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Copies the model and prepares its per-example gradients.

        Args:
            model: Checked by `check_model`; only trainable parameters move, the whole copy runs in training
            mode. loss: Per-example loss.
            plan: Public constants; ``plan.mode`` must be resolved.
            local: Learning knobs.
            augment: One random view of a batch, record by record; None for the records as they are.
            device: Where gradients are computed; noise is always drawn and added on the CPU.

        Raises:
            PlanError: The model is refused, or ``plan.mode`` is not among its `supported_modes`.
        """
        self._plan, self._local = plan, local
        self._clipper = _Clipper(
            model,
            loss,
            mode=plan.mode,
            l2_clip=plan.l2_clip,
            physical_batch=plan.physical_batch,
            views=plan.views,
            augment=augment,
            device=torch.device(device),
        )
        self.names = self._clipper.names
        self.shapes = self._clipper.shapes
        self.size = self._clipper.flat.shape[0]

    @torch.no_grad()
    def clipped_sum(self, inputs: Tensor, targets: Tensor, valid: Tensor, *, seed: int = 0) -> Tensor:
        """Returns the sum of clipped gradients at the current parameters. Secret: no noise is added.

        Guarantees:
            Bound: each row contributes norm at most ``plan.l2_clip``; rows that are not valid, hold a
                non-finite number or have a non-finite gradient contribute exactly zero and change no other
                row.

        Args:
            inputs: Records, shape ``(B, ...)``, float32 or integer tokens; B = 0 is legal and gives zeros.
                A valid row's tokens must be ones that the model knows.
            targets: Shape ``(B, ...)``; a valid row's class must be one that the loss accepts.
            valid: Usable rows, bool ``(B,)``.
            seed: Seed of augmentation and dropout, in [0, 2**63).

        Returns:
            Flat sum, float64 ``(P,)`` on the CPU.
        """
        return self._clipper.sum(inputs, targets, valid, torch.arange(len(inputs)), seed)

    def _private_gradient(self, inputs: Tensor, targets: Tensor, valid: Tensor, source: RandomSource) -> Tensor:
        """Returns the noised mean gradient of one Poisson sample, float32 ``(P,)`` on the CPU: a release.

        The order carries the guarantee: sample, clip, noise, divide.
        """
        plan = self._plan
        chosen = source.coins(len(inputs), plan.sample_rate).nonzero().squeeze(1)
        # Clip before the sum: afterwards no bound on one record's share could be enforced any more.
        total = self._clipper.sum(inputs, targets, valid, chosen, source.seed())
        # Noise before anything else reads the sum, fresh for every step, its scale from the plan and never
        # from data.
        total += plan.noise_multiplier * plan.l2_clip * source.gaussian(self.size)
        # A public divisor: the number of records sampled is secret, and so is the number that there are.
        return (total / plan.expected_batch).float()

    @torch.no_grad()
    def train(
        self,
        start: Tensor,
        records_inputs: Tensor,
        records_targets: Tensor,
        records_valid: Tensor,
        source: RandomSource,
        *,
        lr: float,
        start_global: Tensor | None = None,
    ) -> Tensor:
        """Takes ``plan.steps`` noised steps from ``start``; the result is a release.

        Guarantees:
            Price: as many subsampled Gaussian mechanisms as ``plan.steps``, each with ``plan.sample_rate``
                and ``plan.noise_multiplier``; everything after the noise is post-processing.
            Count: the number of steps does not depend on the records, nor does any noise or divisor.

        Args:
            start: Parameters, float32 ``(P,)``.
            records_inputs: All records of the client, shape ``(N, ...)``; N = 0 is legal.
            records_targets: Shape ``(N, ...)``.
            records_valid: Usable records, bool ``(N,)``.
            source: Fresh secret coins and noise.
            lr: This round's learning rate > 0.
            start_global: FedProx anchor, float32 ``(P,)``; ``start`` where None.

        Returns:
            Parameters after the steps, float32 ``(P,)`` on the CPU.

        Raises:
            PlanError: ``start`` or the anchor is not a vector of P numbers, or ``lr`` is not positive.
        """
        anchor = start if start_global is None else start_global
        for vector in (start, anchor):
            if vector.shape != (self.size,):
                raise PlanError(f"expected a flat vector of {self.size} parameters, got shape {tuple(vector.shape)}")
        if not (math.isfinite(lr) and lr > 0):
            raise PlanError(f"expected a finite lr > 0, got {lr}")
        weights = start.to("cpu", torch.float32, copy=True)
        descent = _Descent(self._local, lr, anchor.to("cpu", torch.float32))
        for _ in range(self._plan.steps):
            self._clipper.flat.copy_(weights)
            descent.move(weights, self._private_gradient(records_inputs, records_targets, records_valid, source))
        return weights


# Choosing and probing, on synthetic records only ------------------------------------------------------------

_REPEATS: Final = 5
_PROBED: Final = 8


def _free_bytes(device: torch.device) -> float:
    """Returns the memory that gradients may use, infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    # Allocating more than this succeeds on Linux and gets the process killed later.
    return next((1024.0 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")), math.inf)


@torch.no_grad()
def choose_mode(
    model: nn.Module,
    loss: LossFn,
    make_batch: MakeBatch,
    *,
    expected_batch: float,
    physical_batch: int = 256,
    views: int = 1,
    augment: AugmentFn | None = None,
    device: str | torch.device = "cpu",
) -> Mode:
    """Picks the fastest mode that is safe for the model and fits in memory, by timing it on synthetic
    records.

    Args:
        model: The model.
        loss: Per-example loss.
        make_batch: Makes synthetic public records; never given private ones.
        expected_batch: Public expected batch in records.
        physical_batch: The most examples in memory at a time.
        views: Augmented views of a record.
        augment: One random view of a batch.
        device: Where to time.

    Returns:
        One of `supported_modes`; the only one, where there is one, without timing it.

    Raises:
        PlanError: The model is refused, or no mode fits in memory.
    """
    modes = supported_modes(model, views)
    if len(modes) == 1:
        return modes[0]
    place = torch.device(device)
    if place.type == "cpu":
        # On a CPU one record at a time never won in our measurements (0.8 to 0.9 of Opacus' hooks against 0.5 to 0.6),
        # and the first use of torch.func imports its compiler for two seconds: it is not even tried.
        modes = tuple(mode for mode in modes if mode is not Mode.FUNCTORCH)
    count = max(1, min(physical_batch, math.ceil(expected_batch)))
    inputs, targets = make_batch(count)
    clippers: dict[Mode, _Clipper] = {}
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for mode in modes:
        # Gradients in float32 and as much again for temporaries; ghost keeps most of them as factors.
        if mode is not Mode.GHOST and 8 * count * parameters > _free_bytes(place):
            continue
        clippers[mode] = _Clipper(
            model,
            loss,
            mode=mode,
            l2_clip=1.0,
            physical_batch=physical_batch,
            views=views,
            augment=augment,
            device=place,
        )
    times = dict.fromkeys(clippers, math.inf)
    everything = torch.arange(count)
    # Interleaved, and the best of several: another process on the machine must not decide.
    for _ in range(_REPEATS + 1):
        for mode, clipper in list(clippers.items()):
            begin = time.perf_counter()
            try:
                clipper.sum(inputs, targets, torch.ones(count, dtype=torch.bool), everything, 0)
            except torch.OutOfMemoryError:
                del clippers[mode], times[mode]
                continue
            times[mode] = min(times[mode], time.perf_counter() - begin)
    if not times:
        raise PlanError(f"expected {count} examples' gradients to fit on {place}, they do not; lower physical_batch")
    return min(times, key=lambda mode: times[mode])


@torch.no_grad()
def probe(
    model: nn.Module,
    loss: LossFn,
    make_batch: MakeBatch,
    *,
    mode: Mode,
    l2_clip: float = 1.0,
    physical_batch: int = 256,
    views: int = 1,
    augment: AugmentFn | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Tries on synthetic records whether examples stay alone and the clipped sum keeps its bound (guarantee
    G10).

    Changes one example and expects every other example's gradient, and every buffer, to stay the same; then
    replaces and removes one example, hostile ones included, and expects the clipped sum to move by at most 2
    C and C. A probe can find a fault and cannot prove that there is none: the allow-list and the one-record
    path are the guarantee.

    Args:
        model: The model.
        loss: Per-example loss.
        make_batch: Makes synthetic public records; never given private ones.
        mode: The mode that the plan will fix.
        l2_clip: Bound C.
        physical_batch: The most examples in memory at a time.
        views: Augmented views of a record.
        augment: One random view of a batch.
        device: Where to run.

    Raises:
        PlanError: An example moved another one's gradient, a buffer changed, the bound broke, or the model
            does not run on such records.
    """
    clipper = _Clipper(
        model,
        loss,
        mode=mode,
        l2_clip=l2_clip,
        physical_batch=physical_batch,
        views=views,
        augment=augment,
        device=torch.device(device),
    )
    inputs, targets = make_batch(_PROBED)
    others = make_batch(_PROBED)
    try:
        _probe_examples(clipper, inputs, targets, others)
        _probe_sensitivity(clipper, inputs, targets, others, l2_clip)
    except (RuntimeError, IndexError, TypeError) as error:
        raise PlanError(
            f"expected the model to run on synthetic records in mode {mode.value}, got {error}; check the "
            "records' shape, and that the model changes no buffer and branches on no value"
        ) from error


def _probe_examples(clipper: _Clipper, inputs: Tensor, targets: Tensor, others: tuple[Tensor, Tensor]) -> None:
    """Changes one example at a time and compares everything that belongs to the others."""
    clean = torch.ones(_PROBED, dtype=torch.bool)

    def rows(batch: Tensor, labels: Tensor) -> list[Tensor]:
        batch, labels, _ = clipper._clean(batch, labels, clean)
        return [tensor for part in clipper.parts(batch, labels, 1) for tensor in part.rows()]

    buffers = {name: buffer.clone() for name, buffer in clipper.model.named_buffers()}
    before = rows(inputs, targets)
    rows(*others)
    for old, new in zip(before, rows(inputs, targets), strict=True):
        _expect_equal(old, new, "gradients must not depend on the examples seen before")
    for changed in (0, _PROBED // 2, _PROBED - 1):
        kept = torch.arange(_PROBED) != changed
        replacements = [others[0][changed], inputs[changed] * 0]
        if inputs.is_floating_point():
            replacements.append(inputs[changed] * 100 + 1)
        for replacement in replacements:
            batch, labels = inputs.clone(), targets.clone()
            batch[changed], labels[changed] = replacement, others[1][changed]
            for old, new in zip(before, rows(batch, labels), strict=True):
                _expect_equal(old[kept], new[kept], "changing one example must not move another one's gradient")
    for name, buffer in clipper.model.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            raise PlanError(f"expected the buffer {name} to stay as it is in training, it changed; remove it")


def _expect_equal(old: Tensor, new: Tensor, rule: str) -> None:
    # The same shapes run the same kernels, so that a difference beyond rounding has another example as its
    # cause.
    allowed = 1e-5 * old.abs().max().item() + 1e-12
    moved = (old - new).abs().max().item()
    if not moved <= allowed:
        raise PlanError(
            f"{rule}; expected a difference of at most {allowed:.1e}, got {moved:.1e}; use layers "
            "that treat every example alone, such as GroupNorm"
        )


def _probe_sensitivity(
    clipper: _Clipper, inputs: Tensor, targets: Tensor, others: tuple[Tensor, Tensor], l2_clip: float
) -> None:
    """Replaces and removes one record, without noise, and compares the sums with the sensitivity."""
    everything, clean = torch.arange(_PROBED), torch.ones(_PROBED, dtype=torch.bool)
    full = clipper.sum(inputs, targets, clean, everything, 1)
    without = clipper.sum(inputs, targets, everything != 0, everything, 1)
    # Each of the sum's B additions rounds a partial sum of norm at most B C to 2**-24; twice, for the
    # difference.
    rounding = 2 * _PROBED**2 * l2_clip * 2.0**-24
    replacements = [others[0][0]]
    if inputs.is_floating_point():
        ones = torch.ones_like(inputs[0])
        replacements += [value * ones for value in (1e3, 3e38, math.inf, math.nan)]
    moves = [(full - without, 1)]
    for replacement in replacements:
        batch, labels = inputs.clone(), targets.clone()
        batch[0], labels[0] = replacement, others[1][0]
        replaced = clipper.sum(batch, labels, clean, everything, 1)
        moves += [(replaced - full, 2), (replaced - without, 1)]
    for difference, bounds in moves:
        norm = torch.linalg.vector_norm(difference).item()
        if not norm <= bounds * l2_clip + rounding:
            raise PlanError(
                f"expected one record to move the clipped sum by at most {bounds * l2_clip:g}, it moved by "
                f"{norm:.4g}; use layers and a loss that treat every example alone"
            )
