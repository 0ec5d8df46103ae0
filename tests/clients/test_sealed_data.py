"""Sealed data sets: read as they are, equal to the clear ones, with nothing in clear on any disk."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import tacit
from clients import places
from clients.data import Source, load_source, published
from clients.places import Held, entries_of, place_of, stream_of
from models.catalog import TASKS
from privacy.errors import DataError, VaultError
from privacy.vault import command
from privacy.vault.keyfiles import save_keys
from privacy.vault.keys import Keyring, RecoveryKey

RING = Keyring()
MARK = "clinic-seven-marker"
SCHEMA = f"""
target = "outcome"
classes = ["well", "ill"]
test-fraction = 0.25
[columns.age]
kind = "number"
min = 0
max = 120
[columns.ward]
kind = "category"
values = ["{MARK}", "b"]
"""


def table_of(count: int) -> str:
    lines = [
        f"{30 + number},{MARK if number % 3 else 'b'},{'ill' if number % 2 else 'well'}" for number in range(count)
    ]
    return "\n".join(["age,ward,outcome", *lines, ""])


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "keys"
    save_keys(path, RING, None)
    for name in ("PASSPHRASE", "PASSPHRASE_FILE"):
        monkeypatch.delenv(f"TACIT_VAULT_{name}", raising=False)
    monkeypatch.setenv("TACIT_VAULT_KEYS", str(path))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    folder = tmp_path / "table"
    folder.mkdir()
    (folder / "schema.toml").write_text(SCHEMA)
    (folder / "train.csv").write_text(table_of(40))
    return folder


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    folder = tmp_path / "sites"
    folder.mkdir()
    (folder / "schema.toml").write_text(SCHEMA)
    (folder / "north.csv").write_text(table_of(20))
    rows = {"age": [40.5, 50.0], "ward": [MARK, "b"], "outcome": ["ill", "well"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "south.parquet")
    (folder / "test.csv").write_text(table_of(5))
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder, generator = tmp_path / "images", np.random.default_rng(1)
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            place = folder / part / kind
            place.mkdir(parents=True)
            for number in range(3):
                pixels = generator.integers(0, 256, (9, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number} ä.{'png' if number else 'jpg'}")
    (folder / "images.toml").write_text("size = 8\nrecords = 6\n")
    return folder


def seal(path: Path, out: Path | None = None) -> Path:
    told = command.encrypt(path, out, [RING], purpose="data", run="", replace=False, progress=lambda done, total: None)
    return Path(told["file"])


def each(folder: Path) -> Path:
    """Seals every file of a copy by itself, the schema excepted."""
    copy = folder.with_name(f"{folder.name} each")
    shutil.copytree(folder, copy)
    for path in [path for path in copy.rglob("*") if path.is_file() and path.suffix != ".toml"]:
        seal(path)
        path.unlink()
    return copy


def same(one: Source, other: Source) -> bool:
    return (
        all(
            torch.equal(getattr(getattr(one, part), name), getattr(getattr(other, part), name))
            for part in ("train", "test")
            for name in ("inputs", "targets", "valid")
        )
        and one.key_names == other.key_names
        and (one.keys is None if other.keys is None else torch.equal(one.keys, other.keys))
        and (one.classes, one.shape, one.declared_records) == (other.classes, other.shape, other.declared_records)
    )


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("name", "task"), [("table", "table"), ("sites", "table"), ("images", "image-folder")])
@pytest.mark.parametrize("way", [seal, each])
def test_a_sealed_data_set_is_the_clear_one(
    request: pytest.FixtureRequest, keys: Path, name: str, task: str, way: Any, strict: bool
) -> None:
    folder: Path = request.getfixturevalue(name)
    clear = load_source(TASKS[task], data=str(folder), strict=strict)
    assert len(clear.train) > 4
    sealed = load_source(TASKS[task], data=str(way(folder)), strict=strict)
    assert same(sealed, clear)


def test_what_is_public_is_read_from_a_sealed_schema(table: Path, keys: Path) -> None:
    assert published(TASKS["table"], str(seal(table))) == published(TASKS["table"], str(table))


def test_a_schema_in_clear_may_be_named_beside_sealed_tables(table: Path, keys: Path) -> None:
    clear = load_source(TASKS["table"], data=str(table / "schema.toml"))
    assert same(load_source(TASKS["table"], data=str(each(table) / "schema.toml")), clear)


def test_a_passphrase_opens_a_data_set_too(
    table: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privacy.vault.keys import Passphrase, Stretch

    phrase = Passphrase("correct horse battery", stretch=Stretch(salt=bytes(16), memory_kib=19_456, passes=2))
    command.encrypt(table, None, [phrase], purpose="data", run="", replace=False, progress=lambda done, total: None)
    clear = load_source(TASKS["table"], data=str(table))
    monkeypatch.delenv("TACIT_VAULT_KEYS")
    monkeypatch.setenv("TACIT_VAULT_PASSPHRASE", "correct horse battery")
    assert same(load_source(TASKS["table"], data=str(tmp_path / "table.sealed")), clear)


# -- nothing in clear ------------------------------------------------------------------------------------------------

_watched: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event == "open":
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or (isinstance(mode, str) and set(mode) & set("wax+")):
            _watched.append(str(path))


sys.addaudithook(_hook)


@pytest.fixture
def written(keys: Path) -> Iterator[list[str]]:
    """Every file that this process opens for writing while the fixture lives."""
    global _watched
    _watched = []
    yield _watched
    _watched = None


@pytest.mark.parametrize(("name", "task"), [("sites", "table"), ("images", "image-folder")])
def test_no_file_is_written_while_a_sealed_data_set_is_read(
    request: pytest.FixtureRequest, name: str, task: str, written: list[str]
) -> None:
    folder: Path = request.getfixturevalue(name)
    sealed, parts = seal(folder), each(folder)
    shutil.rmtree(folder)
    written.clear()
    for data in (sealed, parts):
        load_source(TASKS[task], data=str(data))
    assert written == []


def test_planted_bug_a_loader_with_a_temporary_file_is_found(
    table: Path, written: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = seal(table)
    written.clear()

    def through_a_file(place: Held) -> Any:
        (tmp_path / "temporary").write_bytes(place.content())
        return (tmp_path / "temporary").open("rb")

    monkeypatch.setattr(places, "stream_of", through_a_file)
    load_source(TASKS["table"], data=str(sealed))
    assert written == [str(tmp_path / "temporary")]


def test_a_run_on_a_sealed_data_set_leaves_nothing_of_it_in_clear(
    table: Path, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        (table / f"site-{number}.csv").write_text(table_of(30))
    (table / "train.csv").unlink()
    (table / "test.csv").write_text(table_of(9))
    sealed = seal(table)
    shutil.rmtree(table)
    flags = [
        "--partition",
        "natural",
        "--clients",
        "4",
        "--rounds",
        "1",
        "--epsilon",
        "8",
        "--records-per-client",
        "30",
    ]
    code = tacit.main(
        ["simulate", "--task", "table", "--data", str(sealed), *flags, "--out", str(tmp_path / "run"), "--json"]
    )
    assert code == 0, capsys.readouterr().err
    found = [path for path in tmp_path.rglob("*") if path.is_file() and MARK.encode() in path.read_bytes()]
    assert found == []


# -- what must not open ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_an_altered_data_set_is_refused_and_never_read_as_bad_records(images: Path, keys: Path, strict: bool) -> None:
    parts = each(images)
    victim = sorted((parts / "train" / "cat").iterdir())[0]
    for path in (seal(images), victim):
        data = bytearray(path.read_bytes())
        data[-30] ^= 1
        path.write_bytes(data)
    for data in (images.with_name("images.sealed"), parts):
        with pytest.raises(VaultError, match="altered"):
            load_source(TASKS["image-folder"], data=str(data), strict=strict)


def test_files_that_are_sealed_one_by_one_can_be_renamed_which_is_why_a_folder_is_one_file(
    images: Path, keys: Path
) -> None:
    """A limit, kept true: whoever may rename files may swap two records. In one sealed folder nobody can."""
    parts = each(images)
    before = load_source(TASKS["image-folder"], data=str(parts)).train
    first, second = sorted((parts / "train" / "cat").iterdir())[:2]
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    after = load_source(TASKS["image-folder"], data=str(parts)).train
    # Nobody noticed: the same records, the two of them in each other's place.
    assert torch.equal(after.targets, before.targets)
    moved = [n for n in range(len(before)) if not torch.equal(after.inputs[n], before.inputs[n])]
    assert len(moved) == 2
    assert torch.equal(after.inputs[moved], before.inputs[moved[::-1]])


def test_without_the_keys_nothing_is_read(table: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed, parts = seal(table), each(table)
    for data in (sealed, parts):
        save_keys(keys.with_name(f"other {data.name}"), Keyring(), None)
        monkeypatch.setenv("TACIT_VAULT_KEYS", str(keys.with_name(f"other {data.name}")))
        with pytest.raises(VaultError, match="expected a key"):
            load_source(TASKS["table"], data=str(data))
    monkeypatch.delenv("TACIT_VAULT_KEYS")
    with pytest.raises(VaultError, match="set TACIT_VAULT_KEYS"):
        load_source(TASKS["table"], data=str(sealed))


def test_what_is_sealed_for_something_else_is_no_data_set(table: Path, keys: Path, tmp_path: Path) -> None:
    for purpose, source, error, words in (
        ("checkpoint", table, VaultError, "purpose"),
        ("data", table / "train.csv", DataError, "sealed folder"),
    ):
        out = tmp_path / purpose
        command.encrypt(source, out, [RING], purpose=purpose, run="", replace=False, progress=lambda done, total: None)
        with pytest.raises(error, match=words):
            load_source(TASKS["table"], data=str(out))
    seal(table / "train.csv")
    with pytest.raises(DataError, match="got both"):
        load_source(TASKS["table"], data=str(table))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_named_as_sealed_and_lies_in_clear_is_refused(table: Path, keys: Path, kind: str) -> None:
    sealed = seal(table)
    sealed.unlink()
    if kind == "folder":
        shutil.copytree(table, sealed)
    else:
        sealed.write_text(SCHEMA)
    with pytest.raises(VaultError, match="got one in clear"):
        load_source(TASKS["table"], data=str(sealed))
    # A file beside others, under a sealed one's name.
    (table / "train.csv").rename(table / "train.csv.sealed")
    with pytest.raises(VaultError, match="expected a sealed file"):
        load_source(TASKS["table"], data=str(table))


def test_a_recovery_key_opens_a_data_set(table: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recovery = RecoveryKey()
    save_keys(keys.with_name("recovery"), recovery, None)
    recipients = [RING, recovery.recipient]
    command.encrypt(table, None, recipients, purpose="data", run="", replace=False, progress=lambda done, total: None)
    monkeypatch.setenv("TACIT_VAULT_KEYS", str(keys.with_name("recovery")))
    assert len(load_source(TASKS["table"], data=str(table.with_name("table.sealed"))).train)


# -- the places ------------------------------------------------------------------------------------------------------


def test_a_held_folder_looks_like_a_path(images: Path, keys: Path) -> None:
    held = place_of(seal(images))
    assert isinstance(held, Held)

    def listing(place: Any) -> list[tuple[str, str, str, bool, bool]]:
        rows = []
        for entry in entries_of(place):
            rows.append((entry.name, entry.stem, entry.suffix, entry.is_dir(), entry.is_file()))
            rows += listing(entry) if entry.is_dir() else []
        return rows

    assert listing(held) == listing(images)
    assert not (held / "absent").exists()
    assert str((held / "images.toml").parent) == str(held)
    for missing in (lambda: (held / "absent").content(), lambda: (held / "train").content()):
        with pytest.raises(FileNotFoundError):
            missing()
    with stream_of(held / "images.toml") as stream:
        assert stream.read() == (images / "images.toml").read_bytes()
        assert stream.seek(-3, os.SEEK_END) == stream.tell()
        assert stream.read(99) == b" 6\n"
        with pytest.raises(OSError, match="Invalid"):
            stream.seek(-1)
