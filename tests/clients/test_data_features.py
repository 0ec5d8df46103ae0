"""Fixed features of records, and data sets in zip archives."""

import dataclasses
import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from clients.data import load_source, published
from models.catalog import TASKS
from models.scattering import Scattering
from models.shape import Shape
from models.table import softmax_regression
from models.task import Task
from privacy.errors import DataError

TASK = TASKS["cifar10-scattering"]


def picture(shade):
    stream = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), shade, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "cifar.zip"
    with zipfile.ZipFile(path, "w") as writer:
        writer.mkdir("train")
        for part, name, shade in (
            ("train", "airplane", 0),
            ("train", "airplane", 255),
            ("train", "truck", 51),
            ("test", "cat", 102),
        ):
            writer.writestr(f"{part}/{name}/{shade}.png", picture(shade))
    return path


def test_cifar_is_read_from_an_archive_of_images_with_its_public_constants(archive):
    source = load_source(dataclasses.replace(TASK, features=None), data=str(archive))
    assert source.train.inputs.shape == (3, 3, 32, 32)
    assert source.train.targets.tolist() == [0, 0, 9]
    assert source.test.targets.tolist() == [3]
    assert source.declared_records == 50_000
    grey = (torch.tensor([0.4, 0.4, 0.4]) - torch.tensor([0.4914, 0.4822, 0.4465])) / torch.tensor(
        [0.2470, 0.2435, 0.2616]
    )
    torch.testing.assert_close(source.test.inputs[0, :, 5, 9], grey)


def test_records_go_through_the_features_once_and_their_shape_follows(archive):
    plain = load_source(dataclasses.replace(TASK, features=None), data=str(archive))
    source = load_source(TASK, data=str(archive))
    assert source.shape == Shape(inputs=(243, 4, 4), classes=10)
    assert published(TASK) == (source.shape, 50_000)
    torch.testing.assert_close(source.train.inputs, Scattering(pool=2)(plain.train.inputs))
    assert source.train.targets.equal(plain.train.targets)


def test_features_that_do_not_fit_the_records_are_refused_with_a_sentence():
    task = dataclasses.replace(TASKS["digits"], features=Scattering(pool=4))
    with pytest.raises(DataError, match="task 'digits': expected images whose sides are multiples of 16"):
        load_source(task)
    with pytest.raises(DataError, match="multiples of 16"):
        published(task)


def test_g12_a_holders_faulty_record_stays_one_record_after_features():
    inputs = torch.rand(3, 3, 32, 32)
    inputs[1, 0, 0, 0] = torch.inf
    task = Task(
        name="own",
        summary="s",
        record="r",
        data=lambda: (TensorDataset(inputs, torch.zeros(3, dtype=torch.int64)),) * 2,
        shape=Shape(inputs=(3, 32, 32), classes=2),
        features=Scattering(pool=2),
        build=softmax_regression,
    )
    found = load_source(task, strict=False).train
    assert len(found) == 3
    assert found.inputs[[0, 2]].isfinite().all()
    assert not found.inputs[1].isfinite().all()  # What `sanitize` then makes a zero that counts as one.


def test_a_damaged_archive_is_an_error_that_names_it(archive, tmp_path):
    content = archive.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"expected a zip archive at .*cut\.zip"):
        load_source(TASK, data=str(tmp_path / "cut.zip"))
    with zipfile.ZipFile(archive) as reader:
        offset = reader.getinfo("train/truck/51.png").header_offset
    flipped = bytearray(content)
    flipped[offset + 70] ^= 1
    (tmp_path / "flipped.zip").write_bytes(flipped)
    with pytest.raises(DataError, match=r"expected train/truck/51\.png to unpack"):
        load_source(TASK, data=str(tmp_path / "flipped.zip"))


def test_a_member_that_would_unpack_to_more_than_the_limit_is_refused_unread(archive, monkeypatch):
    monkeypatch.setattr("clients.places._MOST_MEMBER_BYTES", 50)
    with pytest.raises(DataError, match="expected files of at most 50 bytes"):
        load_source(TASK, data=str(archive))


def test_an_archive_unpacks_no_further_than_it_says_and_has_plain_names(tmp_path):
    for name, packing in (("b", zipfile.ZIP_BZIP2), ("l", zipfile.ZIP_LZMA)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", packing) as writer:
            writer.writestr("train/cat/1.png", bytes(10**6))
        with pytest.raises(DataError, match="stored or deflated"):
            load_source(TASK, data=str(tmp_path / f"{name}.zip"))
    for number, name in enumerate(("/train/cat/1.png", "train/../cat/1.png", "train//1.png")):
        path = tmp_path / f"{number}.zip"
        with zipfile.ZipFile(path, "w") as writer:
            writer.writestr(name, b"")
        with pytest.raises(DataError, match="names of files in folders"):
            load_source(TASK, data=str(path))


def test_a_member_that_lies_about_its_size_is_refused(tmp_path):
    path = tmp_path / "lies.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.mkdir("train")
        writer.writestr("train/cat/1.png", bytes(10**6))
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")  # The last entry of the central directory; its size is at 24.
    content[at + 24 : at + 28] = (10).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match="to unpack"):
        load_source(TASK, data=str(path))
