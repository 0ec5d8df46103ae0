"""Files that are private while they are written, and there whole or not at all; sealed ones, keys, opened content.

`privacy.files.write_whole` is for a run's own folder. Here a name may be anybody's choice, in a folder that others may
write to: nothing is followed, nothing is written over by chance, and nobody else can read a byte at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self, final

from privacy.errors import VaultError
from privacy.files import sync_folder

_DRAFT: Final = re.compile(r"\.(.+)\.[0-9a-f]{16}\.new", re.DOTALL)
_FLUSH: Final = 4 * 2**20


@final
class Draft:
    """A file of mode 0600 under another name, ``.NAME.RANDOM.new``, until it is published.

    It is locked while its process lives: what a killed process left is unlocked, and the next draft of the same name
    removes it.
    """

    def __init__(self, path: Path, *, replace: bool, sync: bool = True) -> None:
        """Begins a file.

        Args:
            path: The name it shall get; the folder must be there.
            replace: Whether a file of that name is replaced; never a link, a folder or a device.
            sync: Whether to put it and its name on disk.

        Raises:
            VaultError: There is such a file, or none can be written there.
        """
        self._path, self._replace, self._sync = path, replace, sync
        self._at = self._told = 0
        self._refuse_occupied()
        try:
            _sweep(path)
            self._temporary, descriptor = _begin(path)
        except OSError as error:
            raise self._unwritten(error) from None
        self._file = open(descriptor, "wb", buffering=0)

    def write(self, part: bytes | memoryview) -> None:
        """Appends bytes.

        Raises:
            VaultError: The disk is full or failed.
        """
        view = memoryview(part)
        try:
            while view:
                written = self._file.write(view)
                if not written:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                view = view[written:]
                self._at += written
            if self._sync and self._at - self._told >= _FLUSH and hasattr(os, "posix_fadvise"):
                # Has the disk begin now, while the next pieces are encrypted, instead of all at once in `fsync`.
                os.posix_fadvise(self._file.fileno(), self._told, self._at - self._told, os.POSIX_FADV_DONTNEED)
                self._told = self._at
        except OSError as error:
            raise self._unwritten(error) from None

    def publish(self) -> None:
        """Gives the file its name.

        Raises:
            VaultError: Somebody took the name meanwhile, or the disk failed.
        """
        try:
            if self._sync:
                os.fsync(self._file.fileno())
            self._refuse_occupied()
            if self._replace:
                os.replace(self._temporary, self._path)
            else:
                self._link()
            if self._sync:
                sync_folder(self._path.parent)
        except FileExistsError:
            raise self._occupied("a file that is there") from None
        except OSError as error:
            raise self._unwritten(error) from None

    def _link(self) -> None:
        """Gives the name, unless it appeared meanwhile: `link` fails where `rename` would write over it."""
        try:
            os.link(self._temporary, self._path, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            # A file system without links: the name is taken first. Killed in between, an empty file is there.
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            os.replace(self._temporary, self._path)

    def drop(self) -> None:
        """Closes the file and removes its other name; a published one stays."""
        self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.publish()
        finally:
            self.drop()

    def _refuse_occupied(self) -> None:
        try:
            mode = self._path.lstat().st_mode
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unwritten(error) from None
        if not stat.S_ISREG(mode):
            raise self._occupied("a link, a folder or a device")
        if not self._replace:
            raise self._occupied("a file that is there")

    def _occupied(self, what: str) -> VaultError:
        hint = "choose another name" if what.startswith("a link") else "choose another name, or allow replacing it"
        return VaultError(f"expected a free name to write to, got {self._path}, {what}; {hint}")

    def _unwritten(self, error: OSError) -> VaultError:
        return VaultError(
            f"expected to write {self._path}, got: {error.strerror or error}; make room or choose another place, what "
            "was there before stays"
        )


def is_draft(name: str) -> bool:
    """Says whether a file name is one that a draft has before it is published."""
    return _DRAFT.fullmatch(name) is not None


def _left(path: Path) -> Iterator[Path]:
    for entry in path.parent.iterdir():
        found = _DRAFT.fullmatch(entry.name)
        if found is not None and found[1] == path.name:
            yield entry


def _begin(path: Path) -> tuple[Path, int]:
    """Makes a file that is only ours, and says so by a lock that ends with this process."""
    while True:
        temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the two, another draft may have taken it for one that was left behind.
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Removes what killed processes left of a file."""
    for entry in _left(path):
        with contextlib.suppress(OSError):
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry.unlink()
            finally:
                os.close(descriptor)
