"""Models and augmentation for images: convolutional networks with GroupNorm.

GroupNorm instead of BatchNorm: a batch statistic mixes examples, so no per-example gradient, and no bound on
it, would exist (guarantee G10).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.scattering import Scattering
from models.shape import Shape
from models.table import Activation, softmax_regression
from models.task import Task


def cnn(
    shape: Shape,
    *,
    widths: tuple[int, ...] = (16, 32),
    hidden: tuple[int, ...] = (32,),
    activation: Activation = Activation.TANH,
    standardise: bool = False,
) -> nn.Sequential:
    """Returns a small convolutional network for images from 8x8 up.

    Each block is a 3x3 convolution, GroupNorm over groups of four channels, the activation and a 2x2 average
    pooling. What is left at the end is averaged to at most 4x4, so the head stays small for large images.

    Args:
        shape: Records of shape ``(channels, height, width)``.
        widths: Channels of each block, each a multiple of 4.
        hidden: Widths of the linear layers between the blocks and the classes.
        activation: Non-linearity after each normalisation and hidden layer.
        standardise: Whether each image is first brought to mean 0 and variance 1, by itself.

    Raises:
        ValueError: The records are not images, or too small to be halved by every block.
    """
    if len(shape.inputs) != 3:
        raise ValueError(f"expected images of shape (channels, height, width), got records of shape {shape.inputs}")
    channels, height, width = shape.inputs
    least = 2 ** len(widths)
    if min(height, width) < least:
        raise ValueError(
            f"expected images of at least {least} pixels a side for {len(widths)} blocks, "
            f"got {height}x{width}; use fewer blocks"
        )
    # One group without parameters is a fixed function of one image: nothing about it is learned or shared.
    layers: list[nn.Module] = [nn.GroupNorm(1, channels, affine=False)] if standardise else []
    for filters in widths:
        layers += [
            nn.Conv2d(channels, filters, 3, padding=1),  # (B, filters, H, W)
            nn.GroupNorm(filters // 4, filters),
            activation.layer(),
            nn.AvgPool2d(2),  # (B, filters, H/2, W/2)
        ]
        channels, height, width = filters, height // 2, width // 2
    if max(height, width) > 4:
        height, width = min(height, 4), min(width, 4)
        layers.append(nn.AdaptiveAvgPool2d((height, width)))
    layers.append(nn.Flatten())
    features = channels * height * width
    for units in hidden:
        layers += [nn.Linear(features, units), activation.layer()]
        features = units
    return nn.Sequential(*layers, nn.Linear(features, shape.classes))


def flip_and_shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns one view of each image: mirrored with probability one half and shifted by up to 4 pixels.

    Guarantees:
        Alone: each view depends on its own record and on the generator, never on another record.

    Args:
        images: Shape ``(B, C, H, W)``.
        generator: CPU source of this non-private randomness.

    Returns:
        Views, same shape; pixels shifted in from outside are zero, the middle of the normalised range.

    References:
        `De et al. (2022) <https://arxiv.org/abs/2204.13650>`_: average K views' gradients before clipping.
    """
    count, _, height, width = images.shape
    flip = torch.rand(count, generator=generator) < 0.5
    down, right = torch.randint(9, (2, count), generator=generator)
    padded = functional.pad(images, (4, 4, 4, 4))  # (B, C, H+8, W+8)
    rows = down[:, None] + torch.arange(height)  # (B, H)
    columns = (
        torch.where(flip[:, None], torch.arange(width - 1, -1, -1), torch.arange(width)) + right[:, None]
    )  # (B, W)
    device = images.device
    record = torch.arange(count, device=device)[:, None, None]
    # Indexing the padded (B, H, W, C) view picks every record's own window in one gather.
    picked = padded.permute(0, 2, 3, 1)[record, rows.to(device)[:, :, None], columns.to(device)[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


# For data sets of which a client holds thousands of records: a few hundred in each batch.
_LARGE: dict[str, float | int | str] = {
    "rounds": 30,
    "steps-per-round": 10,
    "sample-rate": 0.05,
    "l2-clip": 1.0,
    "lr": 1.0,
}

TASKS = (
    Task(
        name="digits-cnn",
        summary="convolutional network with GroupNorm on scikit-learn's handwritten digits; no download",
        record="one handwritten digit, 8x8 pixels",
        data="digits",
        build=functools.partial(cnn, widths=(16,), hidden=(), standardise=True),
        defaults={"rounds": 20, "steps-per-round": 2, "sample-rate": 0.5, "l2-clip": 2.0, "lr": 0.4},
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
        name="cifar10-scattering",
        summary="softmax regression on fixed wavelet features of CIFAR-10 (downloaded by torchvision, or data=PATH)",
        record="one colour photograph, 32x32 pixels",
        data="cifar10",
        features=Scattering(pool=2),
        build=softmax_regression,
        defaults=_LARGE,
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
