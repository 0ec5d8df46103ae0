"""A model taken apart: what is a linear head over frozen features, what is not, and who computes the same features."""

import math

import pytest
import torch
from torch import nn

from models.catalog import TASKS
from models.head import digest_of, split
from models.scattering import Scattering
from models.shape import Shape
from models.table import mlp, softmax_regression

DIGITS = Shape(inputs=(1, 8, 8), classes=10)


def frozen(seed: int = 0, classes: int = 4) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Flatten(), nn.Linear(64, 96), nn.Tanh()]
        for layer in layers:
            layer.requires_grad_(False)
        return nn.Sequential(*layers, nn.Linear(96, classes))


def test_the_parts_of_softmax_regression_are_the_whole():
    model = softmax_regression(DIGITS, standardise=True)
    nn.init.normal_(model[-1].weight)
    nn.init.normal_(model[-1].bias)
    parts = split(model, DIGITS)
    records = torch.rand(20, 1, 8, 8)
    whole = model(records).detach().double().numpy()
    assert abs(parts(records) @ parts.weights.T + parts.bias - whole).max() < 1e-5
    assert parts.weights.shape == (10, 64)
    assert parts.bound == math.sqrt(63)


def test_no_record_exceeds_the_bound():
    parts = split(softmax_regression(DIGITS, standardise=True), DIGITS)
    spike = torch.zeros(1, 1, 8, 8)
    spike[0, 0, 3, 3] = 1.0
    largest = abs(parts(torch.cat([spike, -spike, torch.rand(100, 1, 8, 8) ** 20]))).max()
    # The spike comes within a thousandth of it: a smaller bound would be wrong.
    assert 0.999 * parts.bound < largest <= parts.bound


def test_frozen_layers_are_features_and_their_numbers_are_in_the_digest():
    shape = Shape(inputs=(1, 8, 8), classes=4)
    first, same, other = (split(frozen(seed), shape) for seed in (1, 1, 2))
    assert first.digest == same.digest != other.digest
    assert first.bound == 1.0
    assert first(torch.rand(3, 1, 8, 8)).shape == (3, 96)


def test_the_fixed_map_before_a_model_is_in_the_digest_and_gives_the_bound():
    through = Scattering(pool=2)
    shape = through.shape_of(Shape(inputs=(3, 16, 16), classes=4))
    parts = split(softmax_regression(shape), shape, through)
    assert parts.digest != split(softmax_regression(shape), shape).digest
    assert parts.digest != split(softmax_regression(shape), shape, Scattering(pool=2, angles=4)).digest
    spike = torch.zeros(1, 3, 16, 16)
    spike[0, :, 7, 7] = 1e4
    largest = abs(parts(through(torch.cat([spike, 100 * torch.rand(20, 3, 16, 16)])))).max()
    assert 0.3 * parts.bound < largest <= parts.bound == math.sqrt(9 * 4 - 1)
    assert split(softmax_regression(shape), shape, Scattering(pool=2, groups=0)).bound is None


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(64, 10), "got Linear"),
        (nn.Sequential(), "got Sequential"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh()), "ends in Tanh"),
        (mlp(DIGITS), "trains 2 other parameter array"),
        (softmax_regression(Shape(inputs=(1, 8, 8), classes=3)), "10 classes"),
        (nn.Sequential(nn.Linear(8, 8, bias=False).requires_grad_(False), nn.Linear(8, 10)), "features of shape"),
    ],
)
def test_other_models_are_refused_with_a_sentence(model, words):
    with pytest.raises(ValueError, match=r"^expected ") as told:
        split(model, DIGITS)
    assert words in str(told.value)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.data in ("digits", "breast-cancer")])
def test_which_built_in_tasks_can_be_asked(name):
    shape = DIGITS if TASKS[name].data == "digits" else Shape(inputs=(30,), classes=2)
    model = TASKS[name].fresh(shape, 0)
    if name in ("digits", "digits-features", "breast-cancer"):
        assert split(model, shape).bound is not None
    else:
        with pytest.raises(ValueError, match="freeze"):
            split(model, shape)


def test_a_map_of_other_settings_is_another_map():
    plain, eps = (
        nn.Sequential(nn.LayerNorm(4, elementwise_affine=False)),
        nn.Sequential(nn.LayerNorm(4, elementwise_affine=False, eps=1e-3)),
    )
    shape = Shape(inputs=(4,), classes=2)
    assert digest_of(plain, shape) != digest_of(eps, shape)
    assert digest_of(plain, shape) != digest_of(plain, Shape(inputs=(4,), classes=3))


def test_layers_that_promise_no_bound_have_none():
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.ReLU(), nn.Linear(4, 2))
    assert split(model, Shape(inputs=(4,), classes=2)).bound is None
