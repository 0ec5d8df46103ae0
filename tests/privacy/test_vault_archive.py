"""A folder in one file: everything comes back, nothing leads out of it, and what is no folder is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import VaultError
from privacy.plan import canonical
from privacy.vault import archive
from privacy.vault.archive import extract, listed, packed, unpacked


def content_of(entries: object, data: bytes = b"") -> memoryview:
    index = canonical(entries)
    return memoryview(b"tacit/folder/1\n" + len(index).to_bytes(4, "big") + index + data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "clinic"
    (place / "train" / "cat").mkdir(parents=True)
    (place / "schema.toml").write_text("x = 1")
    (place / "train" / "cat" / "ä 1.png").write_bytes(os.urandom(2_500_000))
    (place / "train" / "empty").write_bytes(b"")
    (place / "no files").mkdir()
    return place


def test_a_folder_comes_back(folder: Path, tmp_path: Path) -> None:
    packing = listed(folder)
    content = b"".join(packed(packing))
    assert len(content) == packing.content_bytes
    files = unpacked(memoryview(content))
    assert list(files) == ["schema.toml", "train/cat/ä 1.png", "train/empty"]
    extract(files, tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_bytes() for name in files} == {
        name: (folder / name).read_bytes() for name in files
    }
    assert (tmp_path / "back" / "schema.toml").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "back").stat().st_mode & 0o777 == 0o700
    with pytest.raises(VaultError, match="which is there"):
        extract(files, tmp_path / "back")
    # The same folder, the same bytes: nothing of when or where it was packed.
    assert b"".join(packed(listed(tmp_path / "back"))) == content
    (tmp_path / "nothing").mkdir()
    assert unpacked(memoryview(b"".join(packed(listed(tmp_path / "nothing"))))) == {}


@pytest.mark.parametrize("kind", ["link", "pipe", "name", "backslash"])
def test_links_devices_and_names_that_are_no_text_are_refused(folder: Path, kind: str) -> None:
    match kind:
        case "link":
            (folder / "x").symlink_to("/etc/passwd")
        case "pipe":
            os.mkfifo(folder / "x")
        case "name":
            (Path(os.fsdecode(os.fsencode(folder) + b"/\xff"))).write_bytes(b"")
        case _:
            (folder / "a\\b").write_bytes(b"")
    with pytest.raises(VaultError, match="expected file"):
        listed(folder)


@pytest.mark.parametrize("change", [b"", b"more than there was", b"x" * 5])
def test_a_file_that_changes_meanwhile_is_told(folder: Path, change: bytes) -> None:
    (folder / "schema.toml").write_bytes(b"y" * 5)
    packing = listed(folder)
    (folder / "schema.toml").write_bytes(change)
    if len(change) == 5:
        assert b"x" * 5 in b"".join(packed(packing))
        return
    with pytest.raises(VaultError, match="got a change"):
        list(packed(packing))


HOSTILE_NAMES = ["../x", "/etc/x", "a/../../x", "a//b", "", ".", "a/.", "a\\..\\x", "a\0b", "x" * 1025, "\ud800"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_could_lead_out_of_the_folder_is_refused(name: str) -> None:
    assert not archive._is_name(name)
    if name != "\ud800":
        with pytest.raises(VaultError, match="bytes of a folder"):
            unpacked(content_of([[name, 0]]))


def test_planted_bug_names_that_are_not_checked_lead_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_is_name", lambda name: True)
    extract(unpacked(content_of([["../out", 3]], b"bad")), tmp_path / "in")
    assert (tmp_path / "out").read_bytes() == b"bad"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"tacit/folder/1\n",
        b"tacit/folder/2\n" + bytes(content_of([]))[15:],
        b"tacit/folder/1\n\xff\xff\xff\xff[]",
        b"tacit/folder/1\n\0\0\0\0",
        b"tacit/folder/1\n\0\0\x0f\xff" + b"[" * 4095,
        b"tacit/folder/1\n\0\0\0\3[ ]",
        bytes(content_of({})),
        bytes(content_of([1])),
        bytes(content_of([["a"]])),
        bytes(content_of([["a", -1]])),
        bytes(content_of([["a", True]], b"x")),
        bytes(content_of([["a", 1.0]], b"x")),
        bytes(content_of([["a", 2]], b"x")),
        bytes(content_of([["a", 2**70]], b"x")),
        bytes(content_of([["a", 1]], b"xx")),
        bytes(content_of([["b", 0], ["a", 0]])),
        bytes(content_of([["a", 0], ["a", 0]])),
        bytes(content_of([["a", 0], ["a/b", 0]])),
        bytes(content_of([[1, 0]])),
    ],
)
def test_what_is_no_folder_is_refused(content: bytes) -> None:
    with pytest.raises(VaultError, match="bytes of a folder"):
        unpacked(memoryview(content))


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(content: bytes) -> None:
    for data in (content, b"tacit/folder/1\n" + content):
        try:
            assert sum(map(len, unpacked(memoryview(data)).values())) <= len(data)
        except VaultError:
            pass


def test_a_full_disk_leaves_no_half_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(VaultError, match="make room"):
        extract(unpacked(content_of([["a", 3]], b"abc")), tmp_path / "in")
    assert list(tmp_path.iterdir()) == []
