"""From a file to a record: what is asked about looks like what was trained on, and nothing else is taken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clients.question as question
from clients.data import breast_cancer_schema, load_source
from clients.question import preparation, public_record, read_record, schema_fields
from clients.tables import parse_schema
from models.catalog import TASKS
from models.task import Task
from privacy.errors import DataError

DIGITS = preparation(TASKS["digits"], "")


def test_an_image_of_a_digit_is_the_record_that_it_was_made_from(tmp_path: Path):
    source = load_source(TASKS["digits"])
    record = public_record(source, 5)
    Image.fromarray((record[0, 0].numpy() * 255).round().astype(np.uint8), "L").save(tmp_path / "five.png")
    again = read_record(str(tmp_path / "five.png"), source.shape.inputs, DIGITS)
    assert again.shape == record.shape
    assert (again - record).abs().max() <= 0.51 / 255


def test_an_image_folder_is_prepared_as_for_training(tmp_path: Path):
    for part in ("train", "test"):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            pixels = np.random.default_rng(1).integers(0, 256, (9, 9, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / label / "x.png")
    (tmp_path / "images.toml").write_text('size = 8\nmode = "RGB"\nclasses = ["a", "b"]\n')
    task = TASKS["image-folder"]
    source = load_source(task, data=str(tmp_path))
    made = preparation(task, str(tmp_path))
    assert json.loads(json.dumps(made)) == made
    record = read_record(str(tmp_path / "test" / "a" / "x.png"), source.shape.inputs, made)
    assert torch.allclose(record, source.test.inputs[:1], atol=1e-6)


def test_a_row_is_prepared_by_the_published_schema_and_its_class_need_not_be_known(tmp_path: Path):
    schema = breast_cancer_schema()
    fields = json.loads(json.dumps(schema_fields(schema)))
    assert dataclasses.replace(parse_schema(fields, "s"), records=schema.records) == schema
    rows = [{name: column.low + 0.25 * (column.high - column.low) for name, column in schema.columns.items()}]
    rows.append({name: column.high for name, column in schema.columns.items()})
    text = ",".join(rows[0]) + "\n" + "\n".join(",".join(str(cell) for cell in row.values()) for row in rows) + "\n"
    (tmp_path / "t.csv").write_text(text)
    made = {"kind": "table", "schema": fields}
    first, second = (read_record(f"{tmp_path}/t.csv:{row}", (30,), made) for row in (0, 1))
    assert torch.allclose(first, torch.full((1, 30), -0.5))
    assert torch.equal(second, torch.ones(1, 30))
    with pytest.raises(DataError, match="row below 2"):
        read_record(f"{tmp_path}/t.csv:2", (30,), made)


def test_an_array_is_read_and_never_unpickled(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.arange(64) / 64)
    assert read_record(str(tmp_path / "a.npy"), (1, 8, 8), DIGITS).shape == (1, 1, 8, 8)
    np.save(tmp_path / "o.npy", np.array([object()] * 64), allow_pickle=True)
    np.save(tmp_path / "n.npy", np.full(64, np.nan))
    np.save(tmp_path / "s.npy", np.zeros(63))
    for name in ("o", "n", "s"):
        with pytest.raises(DataError, match=r"^expected"):
            read_record(str(tmp_path / f"{name}.npy"), (1, 8, 8), DIGITS)


def test_other_files_are_refused_with_a_sentence(tmp_path: Path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (tmp_path / "x.txt").write_text("hello")
    for place in ("x.png", "x.txt", "gone.png", "x.csv:1"):
        with pytest.raises(DataError, match=r"^expected|: expected"):
            read_record(str(tmp_path / place), (1, 8, 8), DIGITS)
    with pytest.raises(DataError, match=r"kind|column|classes|target"):
        read_record(str(tmp_path / "x.txt").replace("txt", "csv"), (3,), {"kind": "table"})


def test_a_task_of_somebodys_own_says_that_arrays_are_asked_about():
    task = Task(
        name="own",
        summary="s",
        record="r",
        data=lambda: (_ for _ in ()).throw(AssertionError("no record is read")),
        build=TASKS["digits"].build,
        shape=load_source(TASKS["digits"]).shape,
    )
    assert preparation(task, "") == {"kind": "array"}
    assert preparation(TASKS["mnist-cnn"], "")["mean"] == [0.1307]


def test_an_image_goes_through_the_tasks_features_and_an_array_has_been(tmp_path):
    task = TASKS["cifar10-scattering"]
    made = preparation(task, "")
    assert made["size"] == 32
    pixels = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3) % 251
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "x.png")
    found = read_record(str(tmp_path / "x.png"), (243, 4, 4), made, task.features)
    plain = read_record(str(tmp_path / "x.png"), (3, 32, 32), made)
    torch.testing.assert_close(found, task.features(plain))
    np.save(tmp_path / "x.npy", found.numpy())
    assert read_record(str(tmp_path / "x.npy"), (243, 4, 4), made, task.features).equal(found)
    for size in (0, -1, 10**9, "32", None):
        with pytest.raises(DataError, match="square images"):
            read_record(str(tmp_path / "x.png"), (243, 4, 4), made | {"size": size}, task.features)


def test_a_head_with_other_channels_than_its_image_is_refused_before_any_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    monkeypatch.setattr(question, "image_of", lambda *_: pytest.fail("an image was read"))
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("an array was made"))
    for wrong in ([0.5] * 1_000_000, [0.5] * 3, [], [[0.5] * 1000], [float("nan")], [10**400], ["x"], [True], 0.5, {}):
        for name in ("mean", "deviation"):
            with pytest.raises(DataError, match="each channel"):
                read_record(str(tmp_path / "x.png"), (1, 8, 8), DIGITS | {name: wrong})
    with pytest.raises(DataError, match="each channel"):
        read_record(str(tmp_path / "x.png"), (1, 8, 8), {"kind": "image", "mode": "L"})


def test_what_is_said_of_a_published_schema_makes_a_terminal_do_nothing(tmp_path: Path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    columns = {"\x1b[2J": {"kind": "number", "min": 0, "max": 1}, "b": {"kind": "category", "values": ["x"]}}
    for schema in (
        {"target": "b", "classes": ["x", "y"], "columns": columns},
        {"target": "\x1b[2J", "classes": ["x", "y"], "columns": columns},
        {"\x1b[2J": 1},
    ):
        with pytest.raises(DataError) as told:
            read_record(f"{tmp_path}/t.csv:0", (1,), {"kind": "table", "schema": schema})
        assert str(told.value).isprintable()
