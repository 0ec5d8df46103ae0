"""A model as a frozen feature map and a linear head: what can be asked without showing the record.

Encrypted inference evaluates one linear layer. Everything before it is computed by whoever holds the record, so it must
be the same for everybody and learned from nobody's records: a fixed function, or layers whose parameters were public
before training and stayed as they were. `split` takes a model apart where that holds and refuses it where it does not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.shape import Shape
from models.task import Features

_DOMAIN: Final = b"tacit/features/1\n"
# Layers that pass on each value, or some of them, or means of them: no output lies outside the range of the inputs.
_WITHIN: Final = (nn.Flatten, nn.Identity, nn.Unflatten, nn.Dropout, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d)
# What preprocessing leaves of a record: see `models.shape.random_batch`.
_RECORD_RANGE: Final = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A model, taken apart.

    Attributes:
        features: The frozen map from records ``(B, *inputs)`` to features ``(B, d)``, in evaluation mode.
        weights: Of the head, shape ``(c, d)``, float64.
        bias: Of the head, shape ``(c,)``, float64; zeros where it has none.
        digest: SHA-256 of the map's structure, parameters and buffers and of the record's shape, 64 hex digits.
        bound: No feature of a preprocessed record is larger in absolute value; None where that is not known.
    """

    features: nn.Module
    weights: NDArray[np.float64]
    bias: NDArray[np.float64]
    digest: str
    bound: float | None

    def __call__(self, records: Tensor) -> NDArray[np.float64]:
        """Returns the features of records: ``(B, *inputs)`` to ``(B, d)``."""
        with torch.inference_mode():
            found: NDArray[np.float64] = self.features(records).double().cpu().numpy()
        return found


def split(model: nn.Module, shape: Shape, through: Features | None = None) -> Split:
    """Takes a model apart into its frozen features and its linear head.

    Args:
        model: An ``nn.Sequential`` that ends in ``nn.Linear``, of which nothing before that is trained.
        shape: Public shape of what the model gets.
        through: The fixed map that records go through before the model sees them, whose name is part of the digest.

    Raises:
        ValueError: It is another kind of model; one sentence that says what stands in the way.
    """
    what = "a model that ends in one linear layer over features that nobody trained"
    if not isinstance(model, nn.Sequential) or not len(model):
        raise ValueError(f"expected {what} (nn.Sequential(..., nn.Linear)), got {type(model).__name__}")
    *earlier, head = model
    if not isinstance(head, nn.Linear):
        raise ValueError(f"expected {what}, got one that ends in {type(head).__name__}")
    before = nn.Sequential(*earlier)
    trained = [name for name, parameter in before.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"expected {what}, got one that trains {len(trained)} other parameter array(s), {trained[0]} first; freeze "
            "what comes before the head, or train a linear head on fixed features"
        )
    if any(parameter is head.weight or parameter is head.bias for parameter in before.parameters()):
        raise ValueError(f"expected {what}, got a head that shares parameters with its features")
    features = before.eval()
    with torch.inference_mode():
        probe = features(torch.zeros((1, *shape.inputs)))
    if tuple(probe.shape) != (1, head.in_features) or head.out_features != shape.classes:
        raise ValueError(
            f"expected {head.in_features} features and {shape.classes} classes, got features of shape "
            f"{tuple(probe.shape[1:])} and {head.out_features} classes; the model is of another task"
        )
    weights = head.weight.detach().double().cpu().numpy()
    bias = np.zeros(head.out_features) if head.bias is None else head.bias.detach().double().cpu().numpy()
    bound = _RECORD_RANGE if through is None else through.bound_of(shape)
    return Split(features, weights, bias, digest_of(features, shape, through), _bound_of(features, bound))


def digest_of(features: nn.Module, shape: Shape, through: Features | None = None) -> str:
    """Returns the identity of a feature map: SHA-256 over its layers, their settings, every number in them, the shape
    of what they get, and the name of the fixed map before them.

    Two maps of one digest compute the same function where their layers' code is the same: code is not hashed, the
    package that brings it must be the same on both sides.
    """
    digest = hashlib.sha256(_DOMAIN + repr(shape).encode())
    if through is not None:
        digest.update(f"\n{through.name}".encode())
    for name, module in features.named_modules():
        digest.update(f"\n{name}:{type(module).__module__}.{type(module).__qualname__}({module.extra_repr()})".encode())
    for name, value in sorted(features.state_dict().items()):
        array = value.detach().cpu().contiguous().numpy()
        digest.update(f"\n{name}:{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _bound_of(features: nn.Module, bound: float | None) -> float | None:
    """Returns a bound on every feature that follows from the layers and from one on what they get, by no look at a
    record.
    """
    for layer in features.children():
        if isinstance(layer, nn.LayerNorm) and layer.weight is None:
            # n values of mean 0 and mean square at most 1: the largest is at most sqrt(n - 1).
            bound = math.sqrt(max(math.prod(layer.normalized_shape) - 1, 1))
        elif isinstance(layer, nn.Tanh | nn.Sigmoid):
            bound = 1.0
        elif not isinstance(layer, _WITHIN):
            bound = None
    return bound
