"""The scattering transform against convolutions written out by hand, and what it promises."""

import math

import numpy as np
import pytest
import torch

from models.scattering import Scattering
from models.shape import Shape


def wavelet(side, octave, angle, angles):
    """A Morlet wavelet on a torus of odd or even side, in space, straight from its formula."""
    spread, frequency, slant = 0.8 * 2**octave, 3 * math.pi / 4 / 2**octave, 4 / angles
    bell, wave = np.zeros((side, side)), np.zeros((side, side), complex)
    for row in range(-3 * side, 4 * side):
        for column in range(-3 * side, 4 * side):
            along = row * math.cos(angle) + column * math.sin(angle)
            across = column * math.cos(angle) - row * math.sin(angle)
            height = math.exp(-(along**2 + (slant * across) ** 2) / (2 * spread**2))
            bell[row % side, column % side] += height
            wave[row % side, column % side] += height * np.exp(1j * frequency * along)
    return (wave - wave.sum() / bell.sum() * bell) * slant / (2 * math.pi * spread**2)


def around(field, kernel):
    """Circular convolution, sample by sample."""
    side = len(field)
    found = np.zeros((side, side), complex)
    for row in range(side):
        for column in range(side):
            found += field[row, column] * np.roll(kernel, (row, column), (0, 1))
    return found


def averages(field, scale, places):
    side = len(field)
    found = np.zeros((len(places), len(places)))
    for i, row in enumerate(places):
        for j, column in enumerate(places):
            total = weight = 0.0
            for down in range(side):
                for right in range(side):
                    apart = [((a - b + side / 2) % side) - side / 2 for a, b in ((down, row), (right, column))]
                    bell = math.exp(-(apart[0] ** 2 + apart[1] ** 2) / (2 * (0.8 * 2 ** (scale - 1)) ** 2))
                    total, weight = total + bell * field[down, right].real, weight + bell
            found[i, j] = total / weight
    return found


def test_coefficients_are_those_of_convolutions_written_out():
    scale, angles, side = 2, 2, 8
    image = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    found = Scattering(scale=scale, angles=angles, groups=0)(image)[0].numpy()
    padded = np.pad(image[0, 0].numpy(), 4, mode="reflect")
    places = [4, 8]
    turns = [math.pi * angle / angles for angle in range(angles)]
    first = {(o, t): np.abs(around(padded, wavelet(16, o, t, angles))) for o in range(scale) for t in turns}
    expected = [averages(padded, scale, places)]
    expected += [averages(first[o, t], scale, places) for o in range(scale) for t in turns]
    expected += [
        averages(np.abs(around(first[0, t], wavelet(16, 1, u, angles))), scale, places) for t in turns for u in turns
    ]
    assert found.shape == (9, 2, 2)
    # Wavelets are only nearly band-limited, so the coarser grids of the fast way cost a little.
    np.testing.assert_allclose(found, np.stack(expected), atol=0.05 * np.abs(expected[1:]).max())
    # Two wavelets of one octave differ by more than that, so the order of paths is checked too.
    assert np.abs(found[1] - found[2]).max() > 0.1 * np.abs(found[1]).max()


def test_g10_each_image_stands_alone():
    images = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    features = Scattering()
    before = features(images)
    images[3] = math.nan
    after = features(images)
    others = [index for index in range(20) if index != 3]
    assert torch.equal(before[others], after[others])
    assert after[3].isnan().any()


def test_groups_are_standardised_image_by_image():
    images = 700 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) + 3
    found = Scattering(pool=2)(images).reshape(2, 27, -1)
    torch.testing.assert_close(found.mean(2), torch.zeros(2, 27), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.var(2, unbiased=False), torch.ones(2, 27), atol=1e-2, rtol=0)


@pytest.mark.parametrize("pool", [1, 2])
def test_the_shape_is_known_before_any_record_is_read(pool):
    features = Scattering(pool=pool)
    shape = features.shape_of(Shape(inputs=(3, 32, 32), classes=10))
    assert shape == Shape(inputs=(243, 8 // pool, 8 // pool), classes=10)
    assert features(torch.zeros(1, 3, 32, 32)).shape == (1, *shape.inputs)


@pytest.mark.parametrize(
    ("inputs", "what"),
    [((7,), "images of shape"), ((3, 30, 32), "multiples of 4 pixels"), ((1, 32, 32), "27 groups to divide 81")],
)
def test_records_without_such_features_are_refused(inputs, what):
    groups = 27 if what != "27 groups to divide 81" else 28
    with pytest.raises(ValueError, match=what.replace("27", str(groups))):
        Scattering(groups=groups).shape_of(Shape(inputs=inputs, classes=2))


def test_names_differ_where_maps_do():
    assert len({Scattering().name, Scattering(pool=2).name, Scattering(angles=4).name, Scattering(scale=3).name}) == 4
