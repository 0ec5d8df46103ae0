"""Data sources, and what happens to bad records in a simulation and at a data holder."""

import copy
import dataclasses
import math
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from clients.data import Records, data_folder, faults, load_source, sanitize
from models.catalog import TASKS
from models.shape import Shape
from models.table import softmax_regression
from models.task import Task
from privacy.errors import DataError

SHAPE = Shape(inputs=(3,), classes=2)


def some_records(count: int = 4) -> Records:
    return Records(
        torch.full((count, 3), 0.25),
        torch.ones(count, dtype=torch.int64),
        torch.ones(count, dtype=torch.bool),
    )


def own_task(train: object, test: object | None = None, **changes) -> Task:
    fields = {"name": "own", "summary": "s", "record": "r", "build": softmax_regression, "shape": SHAPE}
    return Task(**(fields | changes), data=lambda: (train, test if test is not None else a_dataset()))


def a_dataset(count: int = 3) -> TensorDataset:
    return TensorDataset(torch.rand(count, 3), torch.zeros(count, dtype=torch.int64))


class Listed(Dataset):
    """A map-style dataset of given items; an exception among them is raised."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


# -- Records
# ---------------------------------------------------------------------------------------------------------


def test_records_show_nothing_when_printed():
    assert str(some_records()) == repr(some_records()) == "Records(secret)"


@pytest.mark.parametrize("leak", [pickle.dumps, copy.copy, copy.deepcopy])
def test_records_refuse_to_be_pickled_or_copied(leak):
    with pytest.raises(TypeError, match="stay in their process"):
        leak(some_records())


def test_taken_records_are_copies():
    records = some_records()
    taken = records.take(torch.tensor([2, 0]))
    taken.inputs.fill_(9)
    assert len(taken) == 2
    assert records.inputs.max() == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_record_is_a_fault_and_sanitised_alone(bad):
    records = some_records()
    records.inputs[2, 1] = bad
    [sentence] = faults(records, SHAPE)
    assert "1 record (first: index 2)" in sentence
    clean = sanitize(records, SHAPE)
    assert clean.valid.tolist() == [True, True, False, True]
    assert bool(clean.inputs.isfinite().all())
    assert torch.equal(clean.inputs[[0, 1, 3]], records.inputs[[0, 1, 3]])
    assert not faults(clean.take(clean.valid.nonzero()[:, 0]), SHAPE)


@pytest.mark.parametrize("label", [-1, 2, 2**40])
def test_a_label_out_of_range_is_a_fault_and_sanitised(label):
    records = some_records()
    records.targets[0] = label
    assert "labels in [0, 2)" in faults(records, SHAPE)[0]
    clean = sanitize(records, SHAPE)
    assert clean.valid.tolist() == [False, True, True, True]
    assert clean.targets.tolist() == [0, 1, 1, 1]


def test_empty_and_misshapen_records_are_faults_and_never_stop_a_holder():
    empty = some_records(0)
    assert "got none" in faults(empty, SHAPE)[0]
    assert len(sanitize(empty, SHAPE)) == 0
    assert "shape (4,)" in faults(some_records(), Shape(inputs=(4,), classes=2))[0]
    clean = sanitize(some_records(), Shape(inputs=(4,), classes=2))
    assert clean.inputs.shape == (4, 4)
    assert not clean.valid.any()


def test_sound_records_have_no_faults_and_are_left_as_they_are():
    records = some_records()
    assert faults(records, SHAPE) == []
    assert torch.equal(sanitize(records, SHAPE).inputs, records.inputs)


# -- Built-in sources
# ------------------------------------------------------------------------------------------------


def test_digits_are_split_as_documented():
    source = load_source(TASKS["digits"])
    assert source.shape == Shape(inputs=(1, 8, 8), classes=10)
    assert (len(source.train), len(source.test), source.declared_records) == (1437, 360, 1437)
    assert source.train.inputs.dtype == torch.float32
    assert (source.train.inputs.min(), source.train.inputs.max()) == (0, 1)
    # No record is on both sides: the two sides together hold every digit of the file once.
    from sklearn.datasets import load_digits

    every = torch.cat([source.train.inputs, source.test.inputs]).flatten(1) * 16
    assert sorted(every.int().tolist()) == sorted(load_digits().data.astype(int).tolist())
    assert faults(source.train, source.shape) == []


def test_the_test_set_of_digits_has_every_class_about_equally():
    counts = torch.bincount(load_source(TASKS["digits"]).test.targets)
    assert counts.min() >= 30
    assert counts.max() <= 42


def test_breast_cancer_lies_within_its_public_bounds_without_clipping():
    source = load_source(TASKS["breast-cancer"])
    assert source.shape == Shape(inputs=(30,), classes=2)
    assert (len(source.train), len(source.test), source.declared_records) == (455, 114, 455)
    every = torch.cat([source.train.inputs, source.test.inputs])
    assert every.min() >= -1
    assert every.max() <= 1
    # The bounds are rounded outwards: only measurements whose range starts at zero touch their bound.
    assert not (every == 1).any()
    targets = torch.cat([source.train.targets, source.test.targets])
    assert torch.bincount(targets).tolist() == [357, 212]
    assert source.classes == ("benign", "malignant")


@pytest.mark.parametrize("name", ["digits", "breast-cancer"])
def test_a_source_that_needs_no_path_refuses_one(name):
    with pytest.raises(DataError, match="brings its own"):
        load_source(TASKS[name], data="somewhere")


@pytest.mark.parametrize("name", ["table", "image-folder"])
def test_a_source_that_needs_a_path_asks_for_it_and_says_where_it_looked(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TACIT_DATA", str(tmp_path))
    with pytest.raises(DataError, match="data=PATH"):
        load_source(TASKS[name])
    with pytest.raises(DataError, match=f"nowhere or {tmp_path}"):
        load_source(TASKS[name], data="nowhere")


def test_an_unknown_source_lists_the_known_ones():
    task = dataclasses.replace(TASKS["digits"], data="digit")
    with pytest.raises(DataError, match="choose one of digits, breast-cancer"):
        load_source(task)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(DataError, match="did you mean 'size'"):
        load_source(TASKS["image-folder"], data=".", options={"sizes": "8"})
    with pytest.raises(DataError, match="takes none"):
        load_source(TASKS["digits"], options={"size": "8"})


def test_data_sets_are_looked_for_in_the_folder_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TACIT_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.delenv("TACIT_DATA")
    assert data_folder().parts[-2:] == (".cache", "tacit")


# -- torchvision
# -----------------------------------------------------------------------------------------------------


def write_idx(path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    )


def test_mnist_is_read_from_its_standard_layout_with_public_constants(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    images = np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28)
    for part, count in (("train", 4), ("t10k", 2)):
        write_idx(raw / f"{part}-images-idx3-ubyte", images[:count])
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.array([3, 1, 4, 1], dtype=np.uint8)[:count])
    source = load_source(TASKS["mnist-cnn"], data=str(tmp_path))
    assert source.train.inputs.shape == (4, 1, 28, 28)
    assert source.train.targets.tolist() == [3, 1, 4, 1]
    assert len(source.test) == 2
    assert source.train.inputs[0, 0, 0, 1].item() == pytest.approx((1 / 255 - 0.1307) / 0.3081)
    # A public number from the data set's documentation, not a count of what lies here.
    assert source.declared_records == 60_000


@pytest.mark.parametrize("name", ["mnist-cnn", "fashion-mnist-cnn", "cifar10-cnn"])
def test_offline_says_what_was_tried_and_where_to_put_the_files(name, tmp_path, monkeypatch):
    def offline(self):
        raise OSError("network is unreachable")

    monkeypatch.setenv("TACIT_DATA", str(tmp_path / "cache"))
    for dataset in (
        torchvision.datasets.MNIST,
        torchvision.datasets.FashionMNIST,
        torchvision.datasets.CIFAR10,
    ):
        monkeypatch.setattr(dataset, "download", offline)
    with pytest.raises(DataError, match=r"under .*cache.*network is unreachable.*connect to the internet, or put"):
        load_source(TASKS[name])


# -- Image folders
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for kind, colour in (("cat", 0), ("dog", 255)):
            place = tmp_path / part / kind
            place.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20, 12), (colour, 0, 0)).save(place / f"{index}.{'png' if index else 'jpg'}")
    return tmp_path


def test_an_image_folder_becomes_images_of_one_size_in_the_order_of_its_classes(folder):
    source = load_source(TASKS["image-folder"], data=str(folder))
    assert source.shape == Shape(inputs=(3, 32, 32), classes=2)
    assert source.classes == ("cat", "dog")
    assert source.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(source.test) == 4
    assert source.train.inputs[1].unique().tolist() == [-1]
    assert source.train.inputs[4, 0].unique().tolist() == [1]
    assert source.declared_records is None


def test_size_and_mode_come_from_the_options_over_the_folders_own_file(folder):
    (folder / "images.toml").write_text('size = 16\nmode = "L"\nrecords = 50\nclasses = ["dog", "cat", "cow"]\n')
    assert load_source(TASKS["image-folder"], data=str(folder)).shape == Shape(inputs=(1, 16, 16), classes=3)
    source = load_source(TASKS["image-folder"], data=str(folder), options={"size": "8"})
    assert source.shape == Shape(inputs=(1, 8, 8), classes=3)
    assert source.train.targets.tolist() == [1, 1, 1, 0, 0, 0]
    assert source.declared_records == 50


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("size = 2", "4 to 1024"),
        ('mode = "P"', "image mode"),
        ("records = 0", "whole number"),
        ("colour = 1", "'colour'"),
        ('classes = ["cat"]', "two classes"),
        ('classes = ["cat", "cow"]', "dog: expected a class among cat, cow"),
        ("size =", "TOML"),
    ],
)
def test_a_bad_description_of_images_is_refused(folder, text, what):
    (folder / "images.toml").write_text(text)
    with pytest.raises(DataError, match=what):
        load_source(TASKS["image-folder"], data=str(folder))


def damage(file, kind: str) -> None:
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif kind == "text":
        file.write_text("not an image")
    else:
        # A header that claims 100,000 x 100,000 pixels, over a body of a few bytes.
        header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
        file.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + struct.pack(">I", 13)
            + header
            + struct.pack(">I", zlib.crc32(header))
            + struct.pack(">I", 0)
            + b"IDAT"
            + struct.pack(">I", zlib.crc32(b"IDAT"))
        )


@pytest.mark.parametrize("kind", ["truncated", "text", "bomb"])
def test_a_damaged_image_is_named_in_a_simulation_and_silent_at_a_holder(folder, kind):
    damage(folder / "train" / "dog" / "1.png", kind)
    with pytest.raises(DataError, match=r"dog/1\.png: expected"):
        load_source(TASKS["image-folder"], data=str(folder))
    source = load_source(TASKS["image-folder"], data=str(folder), strict=False)
    assert len(source.train) == 6
    assert source.train.valid.tolist() == [True, True, True, True, False, True]
    assert source.train.inputs[4].abs().max() == 0


def test_an_image_larger_than_the_limit_is_refused_before_its_pixels_are_read(folder, monkeypatch):
    monkeypatch.setattr("clients.data._MOST_PIXELS", 100)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded an image over the limit"))
    with pytest.raises(DataError, match="at most 100 pixels"):
        load_source(TASKS["image-folder"], data=str(folder))


# -- Anybody's datasets
# ----------------------------------------------------------------------------------------------


def test_anybodys_dataset_is_stacked():
    train = Listed((torch.tensor([1.0, 2.0, 3.0]), 1), (np.array([4.0, 5.0, 6.0]), np.int64(0)))
    source = load_source(own_task(train, declared_records=77))
    assert source.train.inputs.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert source.train.targets.tolist() == [1, 0]
    assert source.declared_records == 77
    assert source.classes == ("0", "1")


@pytest.mark.parametrize(
    ("item", "what"),
    [
        ((torch.zeros(4), 0), r"shape \(3,\), got \(4,\)"),
        ((torch.zeros(3, dtype=torch.uint8), 0), "floating point inputs, got torch.uint8"),
        ((torch.zeros(3), 0.5), "whole number as class"),
        ((torch.zeros(3), True), "whole number as class"),
        ((torch.zeros(3), torch.zeros(2, dtype=torch.int64)), "whole number as class"),
        (torch.zeros(3), "pair"),
        ((object(), 0), "convert them"),
        (OSError("disk on fire"), "OSError: disk on fire"),
    ],
)
def test_a_bad_item_is_named_in_a_simulation_and_silent_at_a_holder(item, what):
    train = Listed((torch.ones(3), 1), item)
    with pytest.raises(DataError, match="training record 1: .*" + what):
        load_source(own_task(train))
    records = load_source(own_task(train), strict=False).train
    assert records.valid.tolist() == [True, False]


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(())


def test_a_dataset_that_cannot_be_indexed_says_what_to_do():
    with pytest.raises(DataError, match="collect them into a TensorDataset"):
        load_source(own_task(Streamed()))


def test_a_dataset_with_other_classes_than_the_shape_is_refused():
    train = a_dataset()
    train.classes = ["a", "b", "c"]
    with pytest.raises(DataError, match="2 classes"):
        load_source(own_task(train))


def test_a_loader_that_fails_or_gives_no_pair_says_so():
    task = dataclasses.replace(own_task(a_dataset()), data=lambda: 1 / 0)
    with pytest.raises(DataError, match="ZeroDivisionError"):
        load_source(task)
    task = dataclasses.replace(task, data=lambda: a_dataset())
    with pytest.raises(DataError, match="pair"):
        load_source(task)


@pytest.mark.parametrize("targets", [torch.zeros(4, dtype=torch.int64), torch.zeros((3, 1), dtype=torch.int64)])
def test_targets_of_another_length_or_shape_never_raise_at_a_holder_and_are_told_in_a_simulation(targets):
    shape = Shape(inputs=(2,), classes=2)
    odd = Records(torch.ones(3, 2), targets, torch.ones(3, dtype=torch.bool))
    clean = sanitize(odd, shape)
    assert len(clean) == len(targets)
    assert not clean.valid.any()
    assert "one class and one mark" in faults(odd, shape)[0]
