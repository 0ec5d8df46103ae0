"""A folder as one stretch of bytes, so that neither names, nor how many files, nor their sizes show once it is sealed.

    "tacit/folder/1\\n" || length of the index (u32) || index || the files' bytes, in its order

The index is canonical JSON: ``[[name, bytes], ...]``, sorted by name. Nothing else about a file is kept: no times, no
modes, no links, no empty folders. Unpacking copies nothing; a name that could lead out of a folder is no name here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from privacy.errors import VaultError
from privacy.plan import canonical

_MAGIC: Final = b"tacit/folder/1\n"
_LENGTH: Final = 4
_MOST_INDEX: Final = 64 * 1024 * 1024
_PIECE: Final = 1024 * 1024


class Packing(NamedTuple):
    """A folder, listed and not yet read: its files' names and sizes, and how many bytes all of it will be."""

    folder: Path
    files: tuple[tuple[str, int], ...]
    content_bytes: int


def listed(folder: Path) -> Packing:
    """Lists the files of a folder.

    Raises:
        VaultError: It holds a link or a device, a name that is not text, or cannot be read.
    """
    files = tuple(sorted(_walk(folder, "")))
    size = len(_MAGIC) + _LENGTH + len(_index(files)) + sum(size for _, size in files)
    return Packing(folder, files, size)


def packed(packing: Packing) -> Iterator[bytes]:
    """Yields the bytes of a folder.

    Raises:
        VaultError: A file changed its size since it was listed, or cannot be read.
    """
    index = _index(packing.files)
    yield _MAGIC + len(index).to_bytes(_LENGTH, "big") + index
    for name, size in packing.files:
        path, left = packing.folder / name, size
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb", buffering=0) as file:
                # One byte more than is wanted, to see a file that grew.
                while piece := file.read(min(_PIECE, left + 1)):
                    left -= len(piece)
                    if left < 0:
                        break
                    yield piece
        except OSError as error:
            raise _unread(path, error) from None
        if left:
            raise VaultError(f"expected {path} to stay as it is while it is read, got a change; try again")


def unpacked(content: memoryview) -> dict[str, memoryview]:
    """Returns the files of a folder by name; each is a part of the content itself.

    Raises:
        VaultError: These are not exactly the bytes of a folder.
    """
    start = len(_MAGIC) + _LENGTH
    length = int.from_bytes(content[len(_MAGIC) : start], "big")
    if bytes(content[: len(_MAGIC)]) != _MAGIC or not 2 <= length <= min(_MOST_INDEX, len(content) - start):
        raise _strange()
    index = bytes(content[start : start + length])
    try:
        entries = json.loads(index)
        if not isinstance(entries, list) or canonical(entries) != index:
            raise ValueError("another form")
    except (ValueError, RecursionError):
        raise _strange() from None
    files: dict[str, memoryview] = {}
    at, last, folders = start + length, "", set[str]()
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and type(entry[1]) is int):
            raise _strange()
        name, size = entry
        if not last < name or not _is_name(name) or not 0 <= size <= len(content) - at:
            raise _strange()
        files[name] = content[at : at + size]
        at, last = at + size, name
        parts = name.split("/")
        folders |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}
    if at != len(content) or folders & files.keys():
        raise _strange()
    return files


def extract(files: Mapping[str, memoryview], path: Path, progress: Callable[[int], None] = lambda done: None) -> None:
    """Writes files into a new folder, which has its name only when all of them are in it; modes 0700 and 0600.

    Raises:
        VaultError: There is something of that name, or nothing can be written.
    """
    if path.exists() or path.is_symlink():
        raise VaultError(f"expected a free name for a folder, got {path}, which is there; choose another name")
    temporary, done = path.with_name(f".{path.name}.{os.urandom(8).hex()}.new"), 0
    try:
        temporary.mkdir(mode=0o700)
        for name, content in files.items():
            place = temporary / name
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(content)
            done += len(content)
            progress(done)
        os.rename(temporary, path)
    except OSError as error:
        raise VaultError(f"expected to write {path}, got: {error.strerror or error}; make room") from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
        for entry in found:
            facts, name = entry.stat(follow_symlinks=False), prefix + entry.name
            if stat.S_ISDIR(facts.st_mode):
                yield from _walk(Path(entry.path), f"{name}/")
            elif not stat.S_ISREG(facts.st_mode):
                raise VaultError(f"expected files and folders only, got {entry.path}, a link or a device; copy it here")
            elif not _is_name(name):
                raise VaultError(f"expected file names in UTF-8 of at most 1024 bytes, got {entry.path!r}; rename it")
            else:
                yield name, facts.st_size
    except OSError as error:
        raise _unread(folder, error) from None


def _is_name(name: str) -> bool:
    """Says whether a name leads to a file inside a folder, on every system."""
    try:
        short = len(name.encode()) <= 1024
    except UnicodeEncodeError:
        return False
    return short and "\0" not in name and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _index(files: tuple[tuple[str, int], ...]) -> bytes:
    index = canonical([list(file) for file in files])
    if len(index) > _MOST_INDEX:
        raise VaultError(f"expected a folder of fewer files, got {len(files)}; seal its parts by themselves")
    return index


def _strange() -> VaultError:
    return VaultError("expected the bytes of a folder, got something else; whoever sealed it did not use this program")


def _unread(path: Path, error: OSError) -> VaultError:
    return VaultError(f"expected to read {path}, got: {error.strerror or error}; check its permissions")
