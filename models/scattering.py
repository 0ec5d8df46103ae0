"""Fixed features of images by the wavelet scattering transform: nothing about them is learned, so they cost no privacy.

Two layers of convolutions with fixed wavelets, each followed by the modulus, then a local average. The map is the same
on every machine and depends on no data; a linear model on it is the strongest one known for small privacy budgets
without public training data (`Tramèr and Boneh 2021 <https://arxiv.org/abs/2011.11660>`_).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional

from models.shape import Shape

# Morlet wavelets as in Bruna and Mallat (2013): the coarsest average spreads over 0.8 * 2^scale / 2 pixels, the finest
# wavelet oscillates at three quarters of pi, and its envelope is half as wide along the wave as across it.
_SPREAD = 0.8
_FREQUENCY = 3 * math.pi / 4
_TOGETHER = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scattering:
    """The scattering transform of one image, up to order two, pooled and standardised image by image.

    Attributes:
        scale: Coefficients are averages over 2^scale pixels a side, and are read off that far apart; at least 1.
        angles: Wavelets a scale, evenly spread over half a turn; at least 1.
        pool: Neighbouring averages that are joined, a side; divides what is left of the image.
        groups: Standardise each image's coefficients in this many groups of equal size, or 0 for none.

    References:
        `Bruna and Mallat (2013) <https://arxiv.org/abs/1203.1513>`_; groups: Tramèr and Boneh (2021), section 2.2.
    """

    scale: int = 2
    angles: int = 8
    pool: int = 1
    groups: int = 27

    @property
    def name(self) -> str:
        """What reports call this map: it says everything that the map depends on."""
        return f"scattering(scale={self.scale}, angles={self.angles}, pool={self.pool}, groups={self.groups})"

    @property
    def paths(self) -> int:
        """Coefficients of one place and channel: orders zero, one and two."""
        return 1 + self.scale * self.angles + self.scale * (self.scale - 1) // 2 * self.angles**2

    def shape_of(self, shape: Shape) -> Shape:
        """Returns the public shape of the features of images of a shape.

        Raises:
            ValueError: The records are no images, or their sides do not divide as the map needs.
        """
        if len(shape.inputs) != 3:
            raise ValueError(f"expected images of shape (channels, height, width), got records of shape {shape.inputs}")
        channels, height, width = shape.inputs
        stride = 2**self.scale * self.pool
        if height % stride or width % stride:
            raise ValueError(
                f"expected images whose sides are multiples of {stride} pixels for {self.name}, got {height}x{width}"
            )
        count = channels * self.paths
        if self.groups and count % self.groups:
            raise ValueError(f"expected {self.groups} groups to divide {count} coefficients; choose another number")
        return dataclasses.replace(shape, inputs=(count, height // stride, width // stride))

    def bound_of(self, shape: Shape) -> float | None:
        """Returns what no feature exceeds, from the features' shape; None where they are not standardised.

        n values of mean 0 and mean square at most 1: the largest is at most sqrt(n - 1).
        """
        return math.sqrt(max(math.prod(shape.inputs) // self.groups - 1, 1)) if self.groups else None

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the features of images, each by itself.

        Args:
            images: Shape ``(B, C, H, W)``, float32.

        Returns:
            Shape ``(B, C * paths, H / stride, W / stride)``, float32.
        """
        count, channels, height, width = images.shape
        planes = images.reshape(count * channels, height, width)
        # A few at a time: their intermediate fields fit in a processor's cache, those of a batch do not.
        averages = torch.cat(
            [self._coefficients(some) for some in torch.split(planes, _TOGETHER)]
        )  # (B C, paths, h, w)
        if self.pool > 1:
            averages = functional.avg_pool2d(averages, self.pool)
        features = averages.reshape(count, channels * self.paths, *averages.shape[2:])
        return functional.group_norm(features, self.groups) if self.groups else features

    def _coefficients(self, planes: Tensor) -> Tensor:
        """Averages of orders zero, one and two of single-channel images: ``(n, H, W)`` to ``(n, paths, h, w)``."""
        margin = 2**self.scale
        # Mirrored edges, a margin the average does not see beyond; without it the left edge would meet the right one.
        padded = functional.pad(planes[:, None], (margin,) * 4, mode="reflect")[:, 0]
        height, width = padded.shape[-2:]
        bands = _wavelets(self.scale, self.angles, height, width, planes.device)

        def averaged(field: Tensor, octave: int) -> Tensor:
            """Local averages of a field with 2^octave pixels a sample, ``(..., h, w)``, margins left out."""
            down, right = (_averages(self.scale, octave, side, planes.device) for side in (height, width))
            return down @ field @ right.T

        spectrum = torch.fft.fft2(padded)
        found, second = [averaged(padded, 0)[:, None]], []
        for octave in range(self.scale):
            # What a wavelet of this octave leaves fits on a grid 2^octave times as coarse: (n, angles, H', W')
            first = torch.fft.ifft2(_folded(spectrum[:, None] * bands[octave][0], 2**octave)).abs()
            found.append(averaged(first, octave))
            if octave + 1 < self.scale:
                spectra = torch.fft.fft2(first)[:, :, None]
            for coarser in range(octave + 1, self.scale):
                # Every wavelet of this octave, then every one of a coarser: (n, angles, angles, H'', W'')
                fields = torch.fft.ifft2(_folded(spectra * bands[coarser][octave], 2 ** (coarser - octave))).abs()
                second.append(averaged(fields, coarser).flatten(1, 2))
        return torch.cat([*found, *second], dim=1)


def _folded(spectrum: Tensor, step: int) -> Tensor:
    """The spectrum of a field of which only every ``step``-th sample is kept: the mean of the parts that alias."""
    if step == 1:
        return spectrum
    *front, height, width = spectrum.shape
    parts = spectrum.reshape(*front, step, height // step, step, width // step)
    # Whole slices added up: a reduction over two such dimensions takes ten times as long.
    total: Tensor = parts[..., 0, :, 0, :].clone()
    for row, column in itertools.product(range(step), repeat=2):
        if row or column:
            total += parts[..., row, :, column, :]
    return total.div_(step**2)


@functools.lru_cache(maxsize=32)
def _averages(scale: int, octave: int, side: int, device: torch.device) -> Tensor:
    """The average along one side, as a matrix: from ``side / 2^octave`` samples to the kept ``side / 2^scale - 2``.

    The two-dimensional bell is the product of two, so an average over the plane is one matrix from each side.
    """
    samples = torch.arange(side >> octave, dtype=torch.float64) * 2**octave
    centres = torch.arange(2**scale, side - 2**scale, 2**scale, dtype=torch.float64)
    apart = (samples - centres[:, None] + side / 2) % side - side / 2
    bell = torch.exp(-(apart**2) / (2 * (_SPREAD * 2 ** (scale - 1)) ** 2))
    return (bell / bell.sum(1, keepdim=True)).to(device, torch.float32)


@functools.lru_cache(maxsize=8)
def _wavelets(scale: int, angles: int, height: int, width: int, device: torch.device) -> list[list[Tensor]]:
    """Spectra ``(angles, H / 2^r, W / 2^r)`` of each octave's wavelets at each resolution r up to their own."""
    bands = []
    for octave in range(scale):
        waves = torch.stack(
            [_morlet(height, width, octave, math.pi * angle / angles, 4 / angles) for angle in range(angles)]
        )
        bands.append([_shrunk(waves, 2**coarse).to(device) for coarse in range(octave + 1)])
    return bands


def _shrunk(spectrum: Tensor, step: int) -> Tensor:
    """The same filter for fields sampled ``step`` times as coarsely: its spectrum's aliases, added up."""
    return _folded(spectrum, step) * step**2


def _morlet(height: int, width: int, octave: int, angle: float, slant: float) -> Tensor:
    """One wavelet's real spectrum: a wave under a bell, less as much of the bell as makes its mean zero."""
    spread, frequency = _SPREAD * 2**octave, _FREQUENCY / 2**octave
    # Several periods around the origin, which then wrap around.
    rows = torch.arange(-2 * height, 3 * height, dtype=torch.float64)[:, None]
    columns = torch.arange(-2 * width, 3 * width, dtype=torch.float64)
    along = rows * math.cos(angle) + columns * math.sin(angle)
    across = columns * math.cos(angle) - rows * math.sin(angle)
    bell = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * spread**2)).to(torch.complex128)
    wave = bell * torch.exp(1j * frequency * along)
    wavelet = (wave - wave.sum() / bell.sum() * bell) * (slant / (2 * math.pi * spread**2))
    spectrum: Tensor = torch.fft.fft2(wavelet.reshape(5, height, 5, width).sum((0, 2))).real
    return spectrum.to(torch.float32)
