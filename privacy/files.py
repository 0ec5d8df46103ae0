"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from privacy.errors import RunError

Buffer: TypeAlias = bytes | memoryview


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on disk; a synced file without its name would be lost by a power cut all the same."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, *parts: Buffer, durable: bool = True, spare: Path | None = None) -> None:
    """Writes a file so that a reader, or a crash at any moment, sees the old one or the new one, never a part.

    Args:
        path: Where; its folder is made if it is missing.
        parts: The content, in order; not joined, so a large array is not copied.
        durable: Whether to sync it and its name to disk, so that a power cut cannot undo it either.
        spare: A file in the same folder that is this process's alone and that nobody needs: filling it again and giving
            it the name costs a tenth of making a file.

    Raises:
        RunError: The disk is full or the folder cannot be written; what was there before stays.
    """
    temporary = spare or path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600)
        with open(descriptor, "wb") as file:
            file.writelines(parts)
            file.truncate()
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"expected to write {path}, got: {error.strerror}; free some space and resume the run") from None
