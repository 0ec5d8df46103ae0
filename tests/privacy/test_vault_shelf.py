"""A shelf: the newest file under each name, whatever is swapped, put back, removed or killed."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privacy.errors import VaultError
from privacy.vault import shelf as shelf_module
from privacy.vault.container import Header, Wanted, inspect, rewrap, write_file
from privacy.vault.keys import Keyring, RecoveryKey
from privacy.vault.rotation import sealed_files, to_active
from privacy.vault.shelf import Shelf

RING = Keyring()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shelf"


def filled(folder: Path) -> Shelf:
    shelf = Shelf(folder, [RING])
    shelf.put("model", b"first", purpose="checkpoint", run="run-1")
    shelf.put("client 3", b"three", purpose="state")
    shelf.put("client 7", b"seven", purpose="state")
    return shelf


def file_of(folder: Path, shelf: Shelf, name: str) -> Path:
    entry = shelf._entries()[name]
    return folder / f"{entry['object']}-{entry['generation']}.sealed"


def test_what_is_put_is_read_again_and_names_do_not_show(folder: Path) -> None:
    shelf = filled(folder)
    assert shelf.put("model", b"second ", b"one", purpose="checkpoint", run="run-1") == 2
    again = Shelf(folder, [RING])
    assert again.names() == ["client 3", "client 7", "model"]
    assert again.read("model", purpose="checkpoint") == b"second one"
    assert again.generation == shelf.generation == 4
    assert len(list(folder.glob("*.sealed"))) == 4
    assert not any(b"client" in path.read_bytes() or "client" in path.name for path in folder.iterdir())
    again.remove("client 3")
    assert shelf.names() == ["client 7", "model"]
    assert len(list(folder.glob("*.sealed"))) == 3
    again.check()
    for act in (lambda: again.read("client 3", purpose="state"), lambda: again.remove("client 3")):
        with pytest.raises(VaultError, match="no such name"):
            act()
    for name in ("", "x" * 201):
        with pytest.raises(VaultError, match="characters"):
            again.put(name, b"", purpose="state")
    with pytest.raises(VaultError, match="purpose"):
        again.read("model", purpose="state")


def test_recovery_opens_a_shelf_and_strangers_do_not(folder: Path) -> None:
    recovery = RecoveryKey()
    Shelf(folder, [RING], beside=[recovery.recipient]).put("a", b"x", purpose="state")
    with pytest.raises(VaultError, match="expected a key"):
        Shelf(folder, [Keyring()])
    assert all(len(inspect(path).wraps) == 2 for path in folder.glob("*.sealed"))


def _unnoticed(folder: Path, make: Callable[[Path], Shelf] = filled) -> set[str]:
    """Does to a shelf what somebody without its keys can do; returns what a reader does not notice."""

    def older_file(shelf: Shelf) -> None:
        old = file_of(folder, shelf, "model").read_bytes()
        shelf.put("model", b"second", purpose="checkpoint", run="run-1")
        file_of(folder, shelf, "model").write_bytes(old)

    def swapped(shelf: Shelf) -> None:
        one, other = file_of(folder, shelf, "client 3"), file_of(folder, shelf, "client 7")
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)

    def twin(shelf: Shelf) -> None:
        # The holder's own: an earlier write of the same generation that a put back manifest let happen.
        entry = shelf._entries()["model"]
        header = Header(purpose="checkpoint", run="run-1", object=entry["object"], generation=entry["generation"])
        write_file(file_of(folder, shelf, "model"), header, [RING], b"twin", replace=True)

    def removed(shelf: Shelf) -> None:
        file_of(folder, shelf, "model").unlink()

    def older_manifest(shelf: Shelf) -> None:
        manifest = folder / "manifest.sealed"
        old = manifest.read_bytes()
        shelf.put("client 9", b"nine", purpose="state")
        manifest.write_bytes(old)

    def older_folder(shelf: Shelf) -> None:
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        shelf.put("model", b"second", purpose="checkpoint", run="run-1")
        shutil.rmtree(folder)
        copy.rename(folder)

    def no_manifest(shelf: Shelf) -> None:
        (folder / "manifest.sealed").unlink()

    def other_shelf(shelf: Shelf) -> None:
        shutil.rmtree(folder)
        other = make(folder)
        for _ in range(9):
            other.put("model", b"other", purpose="checkpoint", run="run-1")

    found = set()
    for attack in (older_file, swapped, twin, removed, older_manifest, older_folder, no_manifest, other_shelf):
        shutil.rmtree(folder, ignore_errors=True)
        shelf = make(folder)
        attack(shelf)
        for reader in ("the same", "another"):
            try:
                if reader == "another":
                    if attack is other_shelf:
                        continue  # Nothing tells a stranger which shelf it should be.
                    least = 4 if attack in (older_manifest, older_folder, older_file) else 3
                    shelf = Shelf(folder, [RING], at_least=least)
                shelf.check()
                shelf.read("model", purpose="checkpoint")
            except VaultError:
                continue
            found.add(f"{attack.__name__} by {reader}")
    return found


def test_files_that_are_swapped_put_back_or_removed_are_noticed(folder: Path) -> None:
    assert _unnoticed(folder) == set()


def test_planted_bug_tags_that_are_not_compared_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = Shelf._entries

    class Equal(str):
        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = str.__hash__

    def loose(shelf: Shelf) -> dict[str, dict[str, Any]]:
        return {name: entry | {"tag": Equal(entry["tag"])} for name, entry in entries(shelf).items()}

    monkeypatch.setattr(Shelf, "_entries", loose)
    assert _unnoticed(folder) == {"twin by the same", "twin by another"}


def test_planted_bug_generations_that_are_not_compared_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Wanted.check

    def loose(wanted: Wanted, header: Header, name: str) -> None:
        check(Wanted(purpose=wanted.purpose), header, name)

    monkeypatch.setattr(Wanted, "check", loose)
    assert {"older_folder by the same", "older_folder by another", "other_shelf by the same"} <= _unnoticed(folder)


class _Killed(BaseException):
    pass


def test_a_put_that_is_killed_anywhere_leaves_the_old_or_the_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = ("fsync", "replace", "open", "unlink")
    real = {name: getattr(os, name) for name in calls}
    for begun in (False, True):
        seen, finished = set[bytes](), False
        for step in range(60):
            shutil.rmtree(folder, ignore_errors=True)
            shelf = Shelf(folder, [RING])
            if begun:
                shelf.put("a", b"old", purpose="state")
            left = [step]
            with monkeypatch.context() as patch:
                for name in calls:

                    def killed(*arguments: Any, name: str = name, left: list[int] = left, **more: Any) -> Any:
                        left[0] -= 1
                        if left[0] < 0:
                            raise _Killed
                        return real[name](*arguments, **more)

                    patch.setattr(os, name, killed)
                try:
                    shelf.put("a", b"new", purpose="state")
                    finished = True
                except _Killed:
                    pass
            after = Shelf(folder, [RING])
            seen.add(bytes(after.read("a", purpose="state")) if after.names() else b"nothing")
            assert after.put("a", b"next", purpose="state") >= 1
            assert after.read("a", purpose="state") == b"next"
            assert len(list(folder.glob("*.sealed"))) == 2
            if finished:
                break
        assert finished
        assert seen == ({b"old", b"new"} if begun else {b"nothing", b"new"})


def test_two_who_put_at_once_lose_nothing(folder: Path) -> None:
    def work(number: int) -> None:
        shelf = Shelf(folder, [RING])
        for turn in range(8):
            shelf.put(f"{number} {turn}", b"x", purpose="state")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shelf = Shelf(folder, [RING])
    assert len(shelf.names()) == 24
    shelf.check()


def test_keys_of_a_whole_shelf_change_and_nothing_else_does(folder: Path) -> None:
    ring = Keyring()
    shelf = Shelf(folder, [ring])
    for name in "abc":
        shelf.put(name, name.encode(), purpose="state")
    old = ring.active
    ring.add()
    assert [rewrap(path, [ring], to_active(ring)) for path in sealed_files([folder])] == [True] * 4
    ring.revoke(old)
    shelf.check()
    assert shelf.generation == 3


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 9999, b'{"entries":{"a":1},"format":1}', b"\xff"])
def test_a_manifest_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    filled(folder)
    write_file(folder / "manifest.sealed", Header(purpose="manifest", generation=9), [RING], content, replace=True)
    with pytest.raises(VaultError, match="got something else"):
        Shelf(folder, [RING])
    assert shelf_module._FILE.fullmatch("ab" * 16 + "-1.sealed")


def test_a_reader_is_not_disturbed_by_who_puts_the_same_name(folder: Path) -> None:
    shelf = filled(folder)
    done = threading.Event()

    def putting() -> None:
        for number in range(60):
            shelf.put("model", b"%d" % number, purpose="checkpoint", run="run-1")
        done.set()

    writer = threading.Thread(target=putting)
    writer.start()
    reads = 0
    while not done.is_set():
        assert bytes(Shelf(folder, [RING]).read("model", purpose="checkpoint"))
        reads += 1
    writer.join()
    assert reads
