"""Record-level DP-SGD: every record alone, clipped, summed, noised, divided by a public constant.

Per-example gradients come from Opacus' registered samplers (``Mode.HOOKS``), from the same samplers with
linear layers kept as factors (``Mode.GHOST``), or from PyTorch's ``vmap(grad)`` (``Mode.FUNCTORCH``). No
module is wrapped, no hook is registered and no gradient is stored on a parameter: whatever a pass computes
lives in local variables, so an interrupted pass leaves nothing behind that a later one could add to.

What keeps examples apart (guarantee G10) is, in this order: `check_model` refuses modules that are known to
mix or to remember examples; batched passes run only through layers on a written allow-list, and anything
else, an unknown loss included, runs under ``vmap``, one record at a time; `probe` tries the result on
synthetic records. Augmentation is handed one record at a time, in every mode.

Floating point. Per-example gradients are float32; their norms, the clipping factors, the scaled gradients and the sum
are float64 (u = 2**-53), so that what one record adds is bounded as follows, for P <= 2**32 parameters.

- A norm is a sum of P squares, off by a relative P u / 2 + O(u) <= 2**-21 at most, so that one contribution has a norm
  of at most ``C (1 - SHRINK)(1 + 2**-21)``.
- A sum of n contributions in which each passes through at most d additions is off by at most ``d u n C``. One product
  reduces at most m = min(physical batch, 256) rows, and the products of n rows are added up, hence d <= m + n / m + 20.
  Adding one record may change every rounding in the sum, so both sums count: ``2 d u n C``. That is at most
  ``C 2**-20`` as long as ``d n <= 2**32``: up to a million sampled records at physical batches from 256, up to 65,000
  at physical batch 1.

`SHRINK` = 2**-19 pays for both, so that adding or removing one record moves the computed sum by at most C; beyond those
counts by at most ``C (1 + d n 2**-52)``. In float32 the same sum could move by many times C.

What stays: an example's gradient is taken for a function of that example, and the kernels of a batched pass may round
its last bits differently in another batch. The noise is added in float64 and the report carries the caveat (G11).
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from privacy.errors import PlanError, TacitError
from privacy.noise import RandomSource
from privacy.plan import Local, Mode, Optimizer, Plan

__all__ = [
    "MOST_EXAMPLES_IN_MEMORY",
    "SHRINK",
    "PrivateTrainer",
    "check_model",
    "choose_mode",
    "probe",
    "supported_modes",
]

LossFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Per-example loss: outputs ``(B, ...)`` and targets ``(B, ...)`` to losses ``(B,)``."""

AugmentFn: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""Random views of one record: K equal copies ``(K, ...)`` and a CPU generator to K views, same shape, on the CPU."""

MakeBatch: TypeAlias = Callable[[int], tuple[Tensor, Tensor]]
"""Synthetic public records: a count n to inputs ``(n, ...)`` and targets ``(n, ...)``."""

SHRINK: Final = 2.0**-19
"""Relative part of the clipping bound given up to rounding; the module's text derives it."""

MOST_EXAMPLES_IN_MEMORY: Final = 65_536
"""The largest physical batch and the most views of a record that a plan may ask for.

How many records a step samples is secret, so it must not decide what a pass allocates: a server that may ask for passes
of any size could find the one at which a client's memory fails, and read the count off it.
"""

_CLIP_RANGE: Final = (2.0**-40, 2.0**40)
# One product adds up this many rows; the bound on the rounding of a sum (module text) rests on it.
_ROWS: Final = 256
# Float64 copies are made in pieces of this many numbers: on a CPU they stay in the cache, elsewhere they are few.
_PIECE: Final = 2**18
_PIECE_ON_ACCELERATOR: Final = 2**24


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

    def add_weighted(self, factor: Tensor, total: Tensor) -> None:
        """Adds the sum over examples of ``factor`` ``(B,)`` times gradient to ``total``, flat, both float64."""

    def rows(self) -> tuple[Tensor, ...]:
        """Returns tensors ``(B, ...)`` whose rows j determine the gradient of example j."""


def _pieces(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields rows and columns of the pieces in which ``rows`` ``(B, n)`` is read in float64."""
    count, length = rows.shape
    height = max(1, min(count, _ROWS))
    width = (_PIECE if rows.device.type == "cpu" else _PIECE_ON_ACCELERATOR) // height
    for top in range(0, count, height):
        for left in range(0, length, width):
            yield slice(top, top + height), slice(left, left + width)


def _squares(rows: Tensor) -> Tensor:
    """Returns squared L2 norms of rows ``(B, n)`` in float64, shape ``(B,)``."""
    # In float32 squares overflow from 2e19 and a long sum loses more than SHRINK.
    if rows.numel() <= _PIECE:
        norm: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return norm.square()
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for some, columns in _pieces(rows):
        total[some] += torch.linalg.vector_norm(rows[some, columns], dim=1, dtype=torch.float64).square()
    return total


@final
class _Dense:
    """Gradients ``(B, p)`` of one parameter."""

    def __init__(self, gradients: Tensor) -> None:
        self._gradients = gradients.flatten(1)
        if gradients.numel() <= _PIECE:
            # Read twice, converted once; where it is larger, a second copy would fall out of the cache.
            self._gradients = self._gradients.double()
        self.width = self._gradients.shape[1]

    def squares(self) -> Tensor:
        return _squares(self._gradients)

    def blank(self, dropped: Tensor) -> None:
        self._gradients = self._gradients.masked_fill_(dropped[:, None], 0.0)

    def add_weighted(self, factor: Tensor, total: Tensor) -> None:
        for some, columns in _pieces(self._gradients):
            total[columns].addmv_(self._gradients[some, columns].double().T, factor[some])

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
        # In float64 neither this product nor those of the sum can overflow: their factors are float32.
        inputs, signals = _squares(self._inputs), _squares(self._signals)
        return signals * (inputs * self._weight + float(self._bias))

    def blank(self, dropped: Tensor) -> None:
        self._inputs = torch.where(dropped[:, None], 0.0, self._inputs)
        self._signals = torch.where(dropped[:, None], 0.0, self._signals)

    def add_weighted(self, factor: Tensor, total: Tensor) -> None:
        for inputs, signals, some in zip(
            *(torch.split(rows, _ROWS) for rows in (self._inputs, self._signals, factor)), strict=True
        ):
            scaled = signals * some[:, None]  # (256, out) float64
            if self._weight:
                total[: self._split].view(scaled.shape[1], -1).addmm_(scaled.T, inputs.double())
            if self._bias:
                total[self._split :].add_(scaled.sum(0))

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


@contextlib.contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Computes float32 in float32: no autocast, no TF32, no bfloat16; afterwards everything is as it was.

    A process-wide setting that a caller made for speed would cost three or more of a gradient's seven digits.
    """
    backends: Any = torch.backends
    operations = (
        (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        if device.type == "cuda"
        else (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
    )
    # Only what differs is touched: a setting written back by name no longer follows the more general one above it.
    reduced = [(operation, operation.fp32_precision) for operation in operations]
    reduced = [(operation, precision) for operation, precision in reduced if precision not in ("ieee", "none")]
    try:
        for operation, _ in reduced:
            operation.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for operation, precision in reduced:
            operation.fp32_precision = precision


class _Use(IntEnum):
    """What random bits are for; two uses of one seed must not see the same bits."""

    DROPOUT = 0
    VIEWS = 1


def _seed_of(seed: int, use: _Use, row: int) -> int:
    """Returns a seed for one row, in [0, 2**64), that looks unrelated to that of any other row, use or seed.

    References:
        `Steele et al. (2014) <https://doi.org/10.1145/2660193.2660195>`_: SplitMix64's finaliser.
    """
    # PyTorch's CPU generator takes the low 32 bits only, so neighbours must differ in all of them.
    for word in (use, row):
        seed = (seed + (word + 1) * 0x9E3779B97F4A7C15) % 2**64
        seed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        seed = (seed ^ (seed >> 27)) * 0x94D049BB133111EB % 2**64
        seed ^= seed >> 31
    return seed


class _ShapeError(PlanError):
    """About public shapes: raised for every record or for none, so it may be seen."""


def _losses(loss: LossFn, outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the losses of a batch, refusing a loss that is not one number an example."""
    losses = loss(outputs, targets)
    if losses.shape != outputs.shape[:1]:
        raise _ShapeError(
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
        if max(physical_batch, views) > MOST_EXAMPLES_IN_MEMORY:
            raise PlanError(
                f"expected physical_batch and views of at most {MOST_EXAMPLES_IN_MEMORY}, got {physical_batch} and "
                f"{views}; a smaller physical_batch changes no result"
            )
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
        self.records_per_pass = max(1, physical_batch // views)
        self._view_count, self._augment = views, augment
        if mode is Mode.FUNCTORCH:
            self.draws_randomness = True
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
        self.draws_randomness = any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer, *_ in self._layers)
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
                raise _ShapeError(
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

    def examples(
        self, inputs: Tensor, targets: Tensor, valid: Tensor, rows: Tensor, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns views ``(B, K, ...)`` and targets on the device, unusable rows zero, and which rows are usable."""
        inputs, targets, valid = self._clean(inputs[rows], targets[rows], valid[rows])
        if self._augment is None:
            stacked = inputs[:, None].expand(-1, self._view_count, *inputs.shape[1:])
        else:
            stacked, valid = _zeroed(self._augmented(self._augment, inputs.cpu(), rows, seed), valid.cpu())
        return stacked.to(self._device), targets.to(self._device), valid.to(self._device)

    def _augmented(self, augment: AugmentFn, inputs: Tensor, rows: Tensor, seed: int) -> Tensor:
        """Returns views ``(B, K, ...)`` of records on the CPU.

        Guarantees:
            Alone: augmentation gets one record and random bits that follow from the seed and from that record's row, so
                a record's views do not depend on which others were sampled, nor on what they hold.
        """
        generator = torch.Generator()
        views = []
        for record, row in zip(inputs, rows.tolist(), strict=True):
            generator.manual_seed(_seed_of(seed, _Use.VIEWS, row))
            # Copies, because augmentation may work in place.
            seen = augment(record.repeat(self._view_count, *[1] * record.dim()), generator)
            if len(seen) != self._view_count:
                raise RuntimeError(f"expected {self._view_count} views of {self._view_count} copies, got {len(seen)}")
            views.append(seen)
        return torch.stack(views)

    def parts(self, stacked: Tensor, targets: Tensor, seed: int) -> list[_Part]:
        """Returns the per-example gradients of a non-empty batch of usable or zero examples on the device."""
        if not self.draws_randomness:
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
        """Returns the sum of clipped gradients, float64 ``(P,)``; the one place where gradients meet.

        Guarantees:
            Bound: each row contributes a vector of L2 norm at most C, whatever its content.
            Nothing: a row that is not valid, or whose gradient or norm is not finite, contributes exactly
                zero.
        """
        norm = torch.stack([part.squares() for part in parts]).sum(0).sqrt()  # (B,) float64
        finite = torch.isfinite(norm)
        counted = valid & finite
        # A zero norm divides to infinity, which the clamp turns into 1.
        factor = torch.where(counted, (self._bound / norm).clamp(max=1.0), 0.0)
        if not finite.all():
            for part in parts:
                part.blank(~counted)
        total = torch.zeros(self.flat.shape[0], dtype=torch.float64, device=self._device)
        start = 0
        for part in parts:
            part.add_weighted(factor, total[start : start + part.width])
            start += part.width
        return total

    def sum(self, inputs: Tensor, targets: Tensor, valid: Tensor, chosen: Tensor, seed: int) -> Tensor:
        """Returns the clipped sum over the rows ``chosen`` in physical batches, float64 ``(P,)``, CPU.

        Guarantees:
            Bound: as `clip_and_add`. A row that makes the model raise, run by itself, contributes exactly zero.
            Memory: no pass is larger than the one that `rehearse` makes.
        """
        total = torch.zeros(self.flat.shape[0], dtype=torch.float64)
        with _full_float32(self._device):
            for rows in torch.split(chosen, self.records_per_pass) if len(chosen) else ():
                total += self._sum_of_pass(inputs, targets, valid, rows, seed)
        return total

    def _sum_of_pass(self, inputs: Tensor, targets: Tensor, valid: Tensor, rows: Tensor, seed: int) -> Tensor:
        """Returns the clipped sum over the rows of one pass, float64 ``(P,)``, CPU; halves it where the model raises.

        Only the rows that raise by themselves are left out: to drop the pass would let one record remove all the
        others' contributions. Halves, because that keeps both the passes and the additions in a row few.
        """
        total = self._attempt(inputs, targets, valid, rows, seed)
        if total is not None:
            return total
        if len(rows) == 1:
            return torch.zeros(self.flat.shape[0], dtype=torch.float64)
        halves = torch.tensor_split(rows, 2)
        return self._sum_of_pass(inputs, targets, valid, halves[0], seed).add_(
            self._sum_of_pass(inputs, targets, valid, halves[1], seed)
        )

    def _attempt(self, inputs: Tensor, targets: Tensor, valid: Tensor, rows: Tensor, seed: int) -> Tensor | None:
        """Returns the clipped sum over the rows of one pass, float64 ``(P,)``, CPU; None where the model raised."""
        try:
            stacked, labels, usable = self.examples(inputs, targets, valid, rows, seed)
            parts = self.parts(stacked, labels, _seed_of(seed, _Use.DROPOUT, int(rows[0])))
            return self.clip_and_add(parts, usable).cpu()
        except (_ShapeError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
            # About public shapes, or about the machine: running fewer rows would hide it and not help.
            raise
        except Exception:
            # What a record's content makes the task raise may not be seen outside, whatever the task calls it.
            return None

    def rehearse(self, make_batch: MakeBatch) -> None:
        """Runs the largest pass that `sum` can make, on synthetic records.

        Raises:
            torch.OutOfMemoryError: The device's memory does not suffice.
            PlanError: The model does not run on such records, or the CPU's memory does not suffice.
        """
        count = self.records_per_pass
        try:
            inputs, targets = make_batch(count)
            valid = torch.ones(count, dtype=torch.bool)
            with _full_float32(self._device):
                stacked, labels, usable = self.examples(inputs, targets, valid, torch.arange(count), 0)
                parts = self.parts(stacked, labels, 0)
                # What records that are not finite need on top.
                for part in parts:
                    part.blank(~usable)
                self.clip_and_add(parts, usable).cpu()
        except (TacitError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise PlanError(
                f"expected the model to run on {count} synthetic records in mode {self._mode.value}, got {error}; "
                "check the records' shape, or lower physical_batch where memory is short"
            ) from error

    def _clean(self, inputs: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a batch in which every unusable row is zero, and which rows are usable."""
        if inputs.is_floating_point():
            inputs = inputs.float()
        if targets.is_floating_point():
            targets, valid = _zeroed(targets.float(), valid)
        inputs, valid = _zeroed(inputs, valid)
        return inputs, torch.where(_like(valid, targets), targets, 0), valid


def _zeroed(rows: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``rows`` ``(B, ...)`` with zeros where a row is not finite or not valid, and which rows are."""
    # Before the pass: inside it one NaN could reach other rows through a shared matrix product.
    if rows.is_floating_point():
        valid = valid & torch.isfinite(rows).view(len(rows), -1).all(1)
    return torch.where(_like(valid, rows), rows, 0), valid


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    """Returns ``rows`` ``(B,)`` in a shape that broadcasts over ``tensor`` ``(B, ...)``."""
    return rows.view(-1, *[1] * (tensor.dim() - 1))


# Training ---------------------------------------------------------------------------------------------------


@final
class Descent:
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
            `clipped_sum` by a vector of norm at most ``plan.l2_clip``, rounding of the sum included (module
            docstring, with the number of records up to which that holds).
        Memory: no pass holds more examples than the plan's physical batch, however many records are sampled.
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
            model: Checked by `check_model`; only trainable parameters move, the whole copy runs in training mode.
            loss: Per-example loss.
            plan: Public constants; ``plan.mode`` must be resolved.
            local: Learning knobs.
            augment: Random views of one record; called for each record by itself. None for the records as they are.
            device: Where gradients are computed; noise is always drawn and added on the CPU.

        Raises:
            PlanError: The model is refused, ``plan.mode`` is not among its `supported_modes`, or ``plan`` asks for more
                than `MOST_EXAMPLES_IN_MEMORY`.
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
        self._rehearsed = False

    @torch.no_grad()
    def rehearse(self, make_batch: MakeBatch) -> None:
        """Runs one pass of the largest size on synthetic records, once for this trainer; later calls return at once.

        To be called before the charge and before any record is read: what does not run, or does not fit in memory, then
        fails here, for a reason that no record has a part in. The passes of `train` are never larger.

        Args:
            make_batch: Makes synthetic public records of the private records' shape.

        Raises:
            PlanError: The pass does not fit in memory, or the model does not run on such records.
        """
        if self._rehearsed:
            return
        try:
            self._clipper.rehearse(make_batch)
        except torch.OutOfMemoryError as error:
            raise PlanError(
                f"expected {self._clipper.records_per_pass} records at a time to fit in memory, they do not; lower "
                "physical_batch"
            ) from error
        self._rehearsed = True

    @torch.no_grad()
    def clipped_sum(self, inputs: Tensor, targets: Tensor, valid: Tensor, *, seed: int = 0) -> Tensor:
        """Returns the sum of clipped gradients at the current parameters. Secret: no noise is added.

        Guarantees:
            Bound: each row contributes norm at most ``plan.l2_clip``; rows that are not valid, hold a
                non-finite number, have a non-finite gradient or make the model raise (an unknown token or class)
                contribute exactly zero and change no other row beyond rounding.
            Views: a row's augmented views follow from ``seed`` and its place in ``inputs`` alone.

        Args:
            inputs: Records, shape ``(B, ...)``, float32 or integer tokens; B = 0 is legal and gives zeros. On CUDA an
                unknown token or class ends the process' use of the device, so rows that hold one must not be valid.
            targets: Shape ``(B, ...)``.
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
        descent = Descent(self._local, lr, anchor.to("cpu", torch.float32))
        for _ in range(self._plan.steps):
            self._clipper.flat.copy_(weights)
            descent.move(weights, self._private_gradient(records_inputs, records_targets, records_valid, source))
        return weights


# Choosing and probing, on synthetic records only ------------------------------------------------------------

_REPEATS: Final = 5
_PROBED: Final = 8
_SEEDS: Final = 8


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
        augment: Random views of one record.
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
    everyone = torch.ones(count, dtype=torch.bool)
    clippers: dict[Mode, _Clipper] = {}
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for mode in modes:
        # Gradients in float32 and as much again for temporaries; ghost keeps most of them as factors.
        if mode is not Mode.GHOST and 8 * physical_batch * parameters > _free_bytes(place):
            continue
        clipper = _Clipper(
            model,
            loss,
            mode=mode,
            l2_clip=1.0,
            physical_batch=physical_batch,
            views=views,
            augment=augment,
            device=place,
        )
        # Every client rehearses a full pass, whatever is expected: what does not fit here would fail there.
        with contextlib.suppress(torch.OutOfMemoryError):
            clipper.rehearse(make_batch)
            clippers[mode] = clipper
    times = dict.fromkeys(clippers, math.inf)
    everything = torch.arange(count)
    # Interleaved, and the best of several: another process on the machine must not decide.
    for _ in range(_REPEATS):
        for mode, clipper in clippers.items():
            begin = time.perf_counter()
            clipper.sum(inputs, targets, everyone, everything, 0)
            times[mode] = min(times[mode], time.perf_counter() - begin)
    if not times:
        raise PlanError(
            f"expected {physical_batch} examples' gradients to fit on {place}, they do not; lower physical_batch"
        )
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
    C and C. Where randomness is involved, several times, under different seeds. A probe can find a fault and cannot
    prove that there is none: the allow-list and the one-record paths are the guarantee.

    Args:
        model: The model.
        loss: Per-example loss.
        make_batch: Makes synthetic public records; never given private ones.
        mode: The mode that the plan will fix.
        l2_clip: Bound C.
        physical_batch: The most examples in memory at a time.
        views: Augmented views of a record.
        augment: Random views of one record.
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
        with _full_float32(torch.device(device)):
            for seed in range(_SEEDS if augment is not None or clipper.draws_randomness else 1):
                _probe_examples(clipper, inputs, targets, others, seed)
                _probe_sensitivity(clipper, inputs, targets, others, l2_clip, seed)
    except (RuntimeError, IndexError, TypeError) as error:
        raise PlanError(
            f"expected the model to run on synthetic records in mode {mode.value}, got {error}; check the "
            "records' shape, and that the model changes no buffer and branches on no value"
        ) from error


def _probe_examples(
    clipper: _Clipper, inputs: Tensor, targets: Tensor, others: tuple[Tensor, Tensor], seed: int
) -> None:
    """Changes one example at a time and compares everything that belongs to the others."""
    clean = torch.ones(_PROBED, dtype=torch.bool)

    def rows(batch: Tensor, labels: Tensor) -> list[Tensor]:
        stacked, labels, _ = clipper.examples(batch, labels, clean, torch.arange(_PROBED), seed)
        return [tensor for part in clipper.parts(stacked, labels, seed) for tensor in part.rows()]

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
    clipper: _Clipper, inputs: Tensor, targets: Tensor, others: tuple[Tensor, Tensor], l2_clip: float, seed: int
) -> None:
    """Replaces and removes one record, without noise, and compares the sums with the sensitivity."""
    everything, clean = torch.arange(_PROBED), torch.ones(_PROBED, dtype=torch.bool)
    full = clipper.sum(inputs, targets, clean, everything, seed)
    without = clipper.sum(inputs, targets, everything != 0, everything, seed)
    # In all three sums the same kernels see the same shapes; what is left is room for their last bits.
    rounding = 1e-5 * l2_clip
    replacements = [others[0][0]]
    if inputs.is_floating_point():
        ones = torch.ones_like(inputs[0])
        replacements += [value * ones for value in (1e3, 3e38, math.inf, math.nan)]
    moves = [(full - without, 1)]
    for replacement in replacements:
        batch, labels = inputs.clone(), targets.clone()
        batch[0], labels[0] = replacement, others[1][0]
        replaced = clipper.sum(batch, labels, clean, everything, seed)
        moves += [(replaced - full, 2), (replaced - without, 1)]
    for difference, bounds in moves:
        norm = torch.linalg.vector_norm(difference).item()
        if not norm <= bounds * l2_clip + rounding:
            raise PlanError(
                f"expected one record to move the clipped sum by at most {bounds * l2_clip:g}, it moved by "
                f"{norm:.4g}; use layers and a loss that treat every example alone"
            )
