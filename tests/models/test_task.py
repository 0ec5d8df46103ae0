"""Tasks, their models, losses and metrics."""

import math
import pickle
from importlib import import_module
from pathlib import Path

import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn

from models.catalog import TASKS, find_task
from models.image import cnn, flip_and_shift
from models.shape import Shape, classification, cross_entropy, random_batch
from models.table import mlp, roc_auc, softmax_regression, table_metrics
from models.task import Task

SHAPES = {
    "digits": Shape(inputs=(1, 8, 8), classes=10),
    "breast-cancer": Shape(inputs=(30,), classes=2),
    "mnist": Shape(inputs=(1, 28, 28), classes=10),
    "fashion-mnist": Shape(inputs=(1, 28, 28), classes=10),
    "cifar10": Shape(inputs=(3, 32, 32), classes=10),
    "table": Shape(inputs=(7,), classes=3),
    "image-folder": Shape(inputs=(1, 20, 31), classes=5),
    "movielens-100k": Shape(inputs=(46,), classes=5),
    "sst2": Shape(inputs=(3, 5), classes=2, targets=(3,), tokens=40),
    "shakespeare": Shape(inputs=(9,), classes=20, targets=(9,), tokens=20),
}
# A task that judges a whole test set by itself has a model that says more, or other things, than one logit a class; and
# GPT-2's weights are a local folder's: their own tests look at them.
PLAIN = [name for name, task in TASKS.items() if task.evaluate is None and name != "shakespeare-gpt2"]
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def shape_of(task: Task) -> Shape:
    """The shape of the records that a task trains on."""
    shape = task.shape or SHAPES[task.data]
    return shape if task.features is None else task.features.shape_of(shape)


def a_task(**changes) -> Task:
    fields = {"name": "t", "summary": "s", "record": "r", "data": "digits", "build": softmax_regression}
    return Task(**(fields | changes))


@pytest.mark.parametrize("name", PLAIN)
def test_every_task_builds_a_model_that_maps_records_to_a_logit_a_class(name):
    task = TASKS[name]
    shape = shape_of(task)
    inputs, targets = task.synthetic(shape, 3, torch.Generator().manual_seed(1))
    output = task.build(shape)(inputs)
    assert output.shape == (3, *shape.targets, shape.classes)
    assert task.loss(output, targets).shape == (3,)
    assert next(iter(task.metrics(output.detach(), targets))) in ("accuracy", "perplexity")


@pytest.mark.parametrize("name", PLAIN)
def test_the_same_seed_builds_the_same_model(name):
    task = TASKS[name]
    models = []
    for _ in range(2):
        torch.manual_seed(27)
        models.append(task.build(shape_of(task)).state_dict())
    assert all(torch.equal(first, second) for first, second in zip(*(m.values() for m in models), strict=True))


@pytest.mark.parametrize("name", PLAIN)
def test_no_model_mixes_examples_or_keeps_statistics(name):
    task = TASKS[name]
    shape = shape_of(task)
    model = task.build(shape)
    inputs, _ = task.synthetic(shape, 4, torch.Generator().manual_seed(2))
    before = model(inputs)
    inputs[2] = 17.0
    after = model(inputs)
    others = [0, 1, 3]
    assert torch.equal(before[others], after[others])
    assert not list(model.buffers())


def test_the_mixing_check_sees_batch_norm():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3))
    inputs = torch.rand(4, 3)
    before = model(inputs)
    inputs[2] = 17.0
    assert not torch.equal(before[[0, 1, 3]], model(inputs)[[0, 1, 3]])
    assert list(model.buffers())


def test_cross_entropy_gives_one_loss_a_record():
    output, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = torch.stack([-output[i].log_softmax(0)[target[i]] for i in range(6)])
    torch.testing.assert_close(cross_entropy(output, target), expected)


def test_metrics_agree_with_scikit_learn():
    generator = torch.Generator().manual_seed(3)
    output = torch.randn(200, 4, generator=generator)
    target = torch.randint(3, (200,), generator=generator)  # Class 3 occurs among the predictions only.
    found = classification(output, target)
    guess = output.argmax(1)
    assert found["accuracy"] == pytest.approx((guess == target).float().mean().item())
    assert found["macro_f1"] == pytest.approx(f1_score(target, guess, average="macro"))
    assert list(found) == ["accuracy", "loss", "macro_f1"]


def test_roc_auc_agrees_with_scikit_learn_with_many_ties():
    generator = torch.Generator().manual_seed(4)
    score = torch.randint(7, (300,), generator=generator).double()
    positive = torch.rand(300, generator=generator) < 0.3
    assert roc_auc(score, positive) == pytest.approx(roc_auc_score(positive, score), abs=1e-12)


def test_roc_auc_is_left_out_where_it_has_no_value():
    output = torch.randn(5, 2)
    assert "roc_auc" in table_metrics(output, torch.tensor([0, 1, 0, 1, 0]))
    assert "roc_auc" not in table_metrics(output, torch.zeros(5, dtype=torch.int64))
    assert "roc_auc" not in table_metrics(output * math.nan, torch.tensor([0, 1, 0, 1, 0]))


def test_views_come_from_their_own_record_only():
    images = torch.rand(5, 3, 32, 32)
    first = flip_and_shift(images, torch.Generator().manual_seed(5))
    images[1] = -1.0
    second = flip_and_shift(images, torch.Generator().manual_seed(5))
    assert first.shape == images.shape
    assert torch.equal(first[[0, 2, 3, 4]], second[[0, 2, 3, 4]])
    assert not torch.equal(first[1], second[1])


def test_a_view_is_a_shifted_and_perhaps_mirrored_copy():
    images = torch.rand(40, 2, 9, 9) + 1  # No pixel is zero, so zeros are the border.
    views = flip_and_shift(images, torch.Generator().manual_seed(6))
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    mirrored = 0
    for image, view in zip(padded, views, strict=True):
        windows = [image[:, down : down + 9, right : right + 9] for down in range(9) for right in range(9)]
        matches = [
            flip
            for window in windows
            for flip in (False, True)
            if torch.equal(window.flip(2) if flip else window, view)
        ]
        assert matches
        mirrored += matches[0]
    assert 0 < mirrored < 40


def test_models_refuse_records_they_are_not_made_for():
    with pytest.raises(ValueError, match="images of shape"):
        cnn(Shape(inputs=(30,), classes=2))
    with pytest.raises(ValueError, match="at least 4 pixels"):
        cnn(Shape(inputs=(1, 3, 8), classes=2))


def test_the_head_of_a_large_image_stays_small():
    parameters = sum(p.numel() for p in cnn(Shape(inputs=(3, 256, 256), classes=10)).parameters())
    assert parameters == sum(p.numel() for p in cnn(Shape(inputs=(3, 32, 32), classes=10)).parameters())


def test_softmax_regression_starts_at_zero_and_an_mlp_has_the_widths_asked_for():
    shape = Shape(inputs=(2, 3), classes=4)
    assert softmax_regression(shape)(torch.rand(5, 2, 3)).abs().max() == 0
    widths = [layer.out_features for layer in mlp(shape, hidden=(8, 5)) if isinstance(layer, nn.Linear)]
    assert widths == [8, 5, 4]


@pytest.mark.parametrize("inputs", [(), (0,), (3, -1)])
def test_a_shape_needs_positive_sizes(inputs):
    with pytest.raises(ValueError, match="input shape"):
        Shape(inputs=inputs, classes=2)


def test_a_shape_needs_two_classes():
    with pytest.raises(ValueError, match="at least 2 classes"):
        Shape(inputs=(3,), classes=1)


def test_a_task_with_its_own_data_must_declare_its_shape():
    with pytest.raises(ValueError, match="public shape"):
        a_task(data=lambda: (None, None))


def test_the_defaults_of_a_task_do_not_change_with_the_mapping_they_came_from():
    mine = {"rounds": 3}
    task = a_task(defaults=mine)
    mine["rounds"] = 4
    assert task.defaults["rounds"] == 3


def test_built_in_tasks_can_be_sent_to_workers():
    for name, task in TASKS.items():
        assert name.encode() in pickle.dumps(task)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(LookupError, match="did you mean 'digits-cnn'"):
        find_task("digit-cnn")
    with pytest.raises(LookupError, match="choose one of digits"):
        find_task("zzzzzz")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("no_such_module_here:TASK", "importing 'no_such_module_here' failed"),
        ("models.catalog:NOTHING", "AttributeError"),
        ("models.catalog:TASKS", "to be a models.task.Task, got dict"),
        (":TASK", "importing ''"),
    ],
)
def test_a_task_that_cannot_be_had_says_why(name, what):
    with pytest.raises(LookupError, match=what):
        find_task(name)


def test_a_task_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "task_of_a_test.py").write_text(
        "import dataclasses\nfrom models.catalog import TASKS\n"
        "TASK = dataclasses.replace(TASKS['digits'], name='mine')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert find_task("task_of_a_test:TASK").name == "mine"


def test_a_random_batch_depends_on_its_generator_only():
    shape = Shape(inputs=(2, 2), classes=3)
    first, second = (random_batch(shape, 50, torch.Generator().manual_seed(8)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[0].abs().max() <= 1
    assert set(first[1].tolist()) == {0, 1, 2}


def test_the_worked_example_trains(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    task = import_module("own_task").TASK
    train, test = task.data()
    torch.manual_seed(0)
    model = task.build(task.shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    inputs, targets = train.tensors
    for _ in range(200):
        optimizer.zero_grad()
        task.loss(model(inputs), targets).mean().backward()
        optimizer.step()
    # Two half moons with this noise are at most about 97 % separable; a line reaches about 87 %.
    with torch.no_grad():
        assert task.metrics(model(test.tensors[0]), test.tensors[1])["accuracy"] > 0.9
    assert task.declared_records == len(train)
    assert tuple(inputs.shape[1:]) == task.shape.inputs
