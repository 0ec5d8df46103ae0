"""Where a data set lies: in folders, in a zip archive, or sealed; a loader reads all through the same few calls.

A sealed data set is one file of ``tacit vault encrypt FOLDER``, or a folder in which some files are sealed by
themselves (``train.csv.sealed`` stands for ``train.csv``). Keys come from the environment (`privacy.vault.unlock`),
or from whoever asks: a client that has joined looks into its home.

Guarantees:
    Nothing in clear on disk: what is opened lives in this process's memory, and no temporary file is made.
    Verified: a parser sees a file's bytes after all of them were verified.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias, final

from privacy.errors import DataError, VaultError
from privacy.vault.archive import unpacked
from privacy.vault.container import Reader, Wanted, is_sealed, read_file
from privacy.vault.keys import Opener
from privacy.vault.unlock import openers_from

SUFFIX: Final = ".sealed"
# What a sealed file must be for: one that a keyring seals for something else is no data set.
_DATA: Final = Wanted(purpose="data")
# A member of an archive that unpacks to more is refused by what the archive says of it, and read no further than that.
_MOST_MEMBER_BYTES: Final = 2**30


@dataclasses.dataclass(frozen=True)
class _Tree:
    """A data set's files by name, and what each folder of it holds."""

    where: str
    files: Mapping[str, Callable[[], memoryview]]
    folders: dict[str, list[str]]

    @classmethod
    def of(cls, where: str, files: Mapping[str, Callable[[], memoryview]]) -> _Tree:
        folders: dict[str, list[str]] = {"": []}
        for name in files:
            inside = name
            while inside:
                folder, _, last = inside.rpartition("/")
                known = folder in folders
                folders.setdefault(folder, []).append(last)
                # A folder that was there before is in its own folder's list already.
                inside = "" if known else folder
        return cls(where, files, folders)


@final
class Held:
    """A file or a folder of a sealed data set; offers what loaders ask of a `pathlib.Path`."""

    def __init__(self, tree: _Tree, inside: str = "") -> None:
        """Takes a data set and which part of it this is; the whole folder by default."""
        self._tree, self._inside = tree, inside

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self._inside.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return Path(self._inside).suffix

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return Path(self._inside).stem

    @property
    def parent(self) -> Held:
        """The folder that it is in."""
        return Held(self._tree, self._inside.rpartition("/")[0])

    def __truediv__(self, name: str) -> Held:
        return Held(self._tree, f"{self._inside}/{name}" if self._inside else name)

    def __str__(self) -> str:
        return f"{self._tree.where}:{self._inside}" if self._inside else self._tree.where

    def __repr__(self) -> str:
        return f"Held({self})"

    def is_file(self) -> bool:
        """Says whether it is a file."""
        return self._inside in self._tree.files

    def is_dir(self) -> bool:
        """Says whether it is a folder."""
        return self._inside in self._tree.folders

    def exists(self) -> bool:
        """Says whether it is anything."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[Held]:
        """Yields what a folder holds."""
        yield from (self / name for name in self._tree.folders[self._inside])

    def content(self) -> memoryview:
        """Returns a file's bytes, verified.

        Raises:
            FileNotFoundError: It is no file.
            VaultError: It does not open, or was altered.
        """
        if not self.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return self._tree.files[self._inside]()

    def read_text(self, encoding: str) -> str:
        """Returns a file's text; raises as `content`, or UnicodeDecodeError."""
        return str(self.content(), encoding)

    def open(self, encoding: str, newline: str) -> io.TextIOWrapper:
        """Opens a file as text; raises as `content`."""
        return io.TextIOWrapper(stream_of(self), encoding=encoding, newline=newline)


Place: TypeAlias = Path | Held


class _View(io.RawIOBase):
    """A file object over bytes in memory, which it does not copy."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._at = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._content)}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._at = start + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # Whatever calls it brings one.
        piece = self._content[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def stream_of(place: Place) -> io.BufferedReader:
    """Opens a file's bytes.

    Raises:
        OSError: There is no such file.
        VaultError: It does not open, or was altered.
    """
    return io.BufferedReader(_View(place.content())) if isinstance(place, Held) else place.open("rb")


def entries_of(folder: Place) -> list[Place]:
    """Returns what a folder holds, in the order of names."""
    return sorted(folder.iterdir(), key=lambda place: place.name)


# Asked for keys only where something is sealed.
Opens: TypeAlias = Callable[[], Sequence[Opener]]


def from_environment() -> Sequence[Opener]:
    """Returns the keys that the environment names; raises VaultError where it names none."""
    return openers_from(None)


def place_of(path: Path, opens: Opens = from_environment) -> Place:
    """Returns where a data set is to be read: the path itself, or what it holds where it is sealed or a zip archive.

    Args:
        path: Where it lies.
        opens: Returns what may open it.

    Raises:
        VaultError: It is sealed and no key opens it, or it was altered; or it is named as a sealed
            one and is none.
        DataError: A sealed file stands for no folder, a file is there both sealed and in clear, or an archive is
            damaged.
    """
    if is_sealed(path):
        with Reader(path, opens(), _DATA) as reader:
            if reader.header.content != "folder":
                raise DataError(
                    f"expected a sealed folder at {path}, got a sealed file; seal the folder that it was in, or name "
                    "that folder"
                )
            files = unpacked(reader.read())
        return Held(_Tree.of(str(path), {name: _given(content) for name, content in files.items()}))
    if path.suffix == SUFFIX:
        # What was sealed and is in clear now was put there by somebody who needs no key for that.
        raise VaultError(f"expected a sealed data set at {path}, got one in clear; restore it, or rename it")
    if path.is_dir():
        return _partly(path, opens) if _has_sealed(path) else path
    if path.suffix == ".zip":
        return _zipped(path)
    # A schema that is named itself, in clear beside sealed tables.
    return _partly(path.parent, opens) / path.name if any(path.parent.glob(f"*{SUFFIX}")) else path


def _zipped(path: Path) -> Held:
    """The files of a zip archive, each unpacked into memory when it is read."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"expected a zip archive at {path}, got {error}; fetch it anew") from error
    members = [member for member in archive.infolist() if not member.is_dir()]
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # Others unpack without a bound.
            raise DataError(
                f"{path}: expected files that are stored or deflated, got another way of packing; repack it"
            )
        if not all(part not in ("", ".", "..") for part in member.filename.split("/")):
            raise DataError(f"{path}: expected names of files in folders, got {member.filename!r}; repack it")
        if member.file_size > _MOST_MEMBER_BYTES:
            raise DataError(
                f"{path}: expected files of at most {_MOST_MEMBER_BYTES} bytes, got {member.file_size} for "
                f"{member.filename}; unpack it and name the folder"
            )
    return Held(_Tree.of(str(path), {member.filename: _member(archive, member) for member in members}))


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Callable[[], memoryview]:
    def content() -> memoryview:
        try:
            # It unpacks hardly further than the size that was looked at; another checksum is an error.
            with archive.open(member) as stream:
                content = stream.read(member.file_size + 1)
            if len(content) != member.file_size:
                raise zipfile.BadZipFile(f"another size than {member.file_size} bytes")
            return memoryview(content)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            # Damaged, truncated, packed in an unknown way, or under a password.
            raise DataError(
                f"{archive.filename}: expected {member.filename} to unpack, got {error}; fetch the archive anew"
            ) from error

    return content


def _given(content: memoryview) -> Callable[[], memoryview]:
    return lambda: content


def _has_sealed(path: Path) -> bool:
    return any(name.endswith(SUFFIX) for _, _, names in os.walk(path) for name in names)


def _partly(folder: Path, opens: Opens) -> Held:
    """A folder with sealed files in it, each of which is opened when it is read, and gone afterwards.

    Nothing says which files such a folder must hold: whoever may write to it can swap two of them, take one away or add
    one in clear. Sealed as one file, a folder is whole or refused.
    """
    keys = opens()
    files: dict[str, Callable[[], memoryview]] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            inside = path.relative_to(folder).as_posix().removesuffix(SUFFIX)
            if inside in files:
                raise DataError(f"expected {folder / inside} sealed or in clear, got both; remove the one in clear")
            files[inside] = _sealed(path, keys) if name.endswith(SUFFIX) else _clear(path)
    return Held(_Tree.of(str(folder), files))


def _sealed(path: Path, keys: Sequence[Opener]) -> Callable[[], memoryview]:
    return lambda: read_file(path, keys, _DATA)


def _clear(path: Path) -> Callable[[], memoryview]:
    return lambda: memoryview(path.read_bytes())
