"""Private files of a home: keys that a program keeps for itself, sealed for the keyring that lies beside them.

    FOLDER/vault.keys       the keyring; or a link to one that lies elsewhere: another folder, another disk, a token
    FOLDER/NAME             a container of purpose NAME (dots become dashes), sealed for that keyring

A folder with a keyring is one whose private files are sealed; in a folder without one they are in clear, mode 0600. A
file that is in clear beside a keyring, from before there was one, is read, and sealed by `seal`.

What it protects. The keyring is what opens everything, so it is worth what guards *it*. Under a passphrase, or on
another disk than the home, it makes a stolen disk or a backup worthless. In clear beside what it opens, which is what
is made where nobody gives a passphrase, it guards single files only: one that is copied, sent, backed up or thrown away
without its keyring opens nowhere. Nothing here protects from whoever runs as the same user while the program runs.

What is bound: a file opens under its own name only, so no two of a folder can be swapped. What is not: an older sealing
of the same file, put back, opens. Keys do not change, so that is the same key; of a certificate's file, an older one is
a certificate that was good, and expires.

Guarantees:
    Kept: a keyring is on disk before anything is sealed for it, and never made anew where something is sealed already;
        a sealed file takes the clear one's place in one step. Killed at any moment, every key can still be read.
    Never in clear on disk: what is opened for a program that takes only a file's name is in memory (`anonymous`).

Clear bytes that were on the disk before a file was sealed may still be in its free blocks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from privacy.errors import VaultError
from privacy.files import Buffer, write_whole
from privacy.vault.container import (
    MAGIC,
    Header,
    Wanted,
    inspect,
    is_sealed,
    open_bytes,
    sealed_bytes_of,
    write_file,
)
from privacy.vault.keyfiles import load_keyring, save_keys
from privacy.vault.keys import Keyring
from privacy.vault.unlock import passphrase_from, required

RING: Final = "vault.keys"
# A private file is a key, or a key and a chain of certificates.
MOST_BYTES: Final = 64 * 1024
# As the wraps need no more room than their own place, this is the longest sealed one.
MOST_SEALED: Final = sealed_bytes_of(MOST_BYTES)

# Argon2id takes a tenth of a second: a keyring is opened once by a process, as long as its file is the same one.
_opened: dict[tuple[int, int, int, int], Keyring] = {}


def ring_beside(path: Path) -> Keyring | None:
    """Returns the keyring of a private file's folder, or None where there is none.

    Of a link, the folder is that of the file behind it. A passphrase comes from the environment
    (`privacy.vault.unlock`).

    Raises:
        VaultError: It does not open, or a link leads nowhere.
    """
    ring = Path(os.path.realpath(path)).parent / RING
    return _ring(ring) if os.path.lexists(ring) else None


def _ring(path: Path) -> Keyring:
    try:
        facts = path.stat()
    except OSError as error:
        raise VaultError(
            f"expected a keyring at {path}, got: {error.strerror or error}; bring back what it links to, or a backup"
        ) from None
    key = (facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns)
    if key not in _opened:
        _opened[key] = load_keyring(path, lambda: required(passphrase_from(None)))
    return _opened[key]


def make_ring(folder: Path, environment: Mapping[str, str] = os.environ) -> Keyring:
    """Returns the keyring of a folder, made where there is none.

    A new one is sealed under the passphrase that the environment gives, if it gives one. Where the environment names a
    file of keys (TACIT_VAULT_KEYS), none is made, and the folder gets a link to that one.

    Args:
        folder: Where; it must be there.
        environment: The process's, unless told otherwise.

    Raises:
        VaultError: There was one, and it is lost; or none can be written.
    """
    ring = folder / RING
    if not os.path.lexists(ring):
        if lost := sorted(path.name for path in folder.iterdir() if is_sealed(path)):
            raise VaultError(
                f"expected {RING} in {folder}, which opens {', '.join(lost)}, got none; restore a backup of it: a new "
                "one would open nothing"
            )
        if named := environment.get("TACIT_VAULT_KEYS"):
            _link(ring, Path(named).expanduser().absolute())
        else:
            try:
                save_keys(ring, Keyring(), passphrase_from(None, environment=environment))
            except VaultError:
                # Another process may have made it meanwhile; that one counts.
                if not ring.exists():
                    raise
    return _ring(ring)


def link_ring(ring: Path, folder: Path) -> None:
    """Has a folder's private files sealed for a keyring that lies elsewhere, by a link; a keyring that is there stays.

    Raises:
        VaultError: The link cannot be made.
    """
    if not os.path.lexists(folder / RING):
        _link(folder / RING, ring)


def share_ring(folder: Path, other: Path) -> None:
    """Makes the keyring of one folder that of another one too, by a link; a keyring that is there stays.

    Raises:
        VaultError: The link cannot be made.
    """
    link_ring(Path(os.path.relpath(folder / RING, other)), other)


def _link(path: Path, aim: Path) -> None:
    try:
        with contextlib.suppress(FileExistsError):
            path.symlink_to(aim)
    except OSError as error:
        raise VaultError(f"expected to write {path}, got: {error.strerror or error}; look at its folder") from None


def purpose_of(path: Path) -> str:
    """Returns the purpose that a private file of this name is sealed for: no other file can take its place."""
    return path.name.replace(".", "-").lower()


def opened(path: Path, content: bytes) -> bytes:
    """Returns what a private file says, given its bytes: themselves, or what is sealed in them.

    Raises:
        VaultError: It is sealed, and its keyring is lost, does not open it, or it is that of another name.
    """
    if not content.startswith(MAGIC):
        return content
    ring = ring_beside(path)
    if ring is None:
        raise VaultError(f"expected {RING} beside {path}, which is sealed for it, got none; restore a backup of it")
    return bytes(open_bytes(content, [ring], Wanted(purpose=purpose_of(path)), name=str(path)))


def read(path: Path) -> bytes:
    """Returns what a private file says.

    Raises:
        OSError: It cannot be read.
        VaultError: As `opened`, or it is longer than any of ours.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        content = file.read(MOST_SEALED + 1)
    if len(content) > MOST_SEALED:
        raise VaultError(f"expected a private file of at most {MOST_BYTES} bytes at {path}, got more; restore a backup")
    return opened(path, content)


def write(path: Path, *parts: Buffer, replace: bool = True) -> None:
    """Writes a private file, mode 0600, whole or not at all and on disk: sealed, if its folder has a keyring.

    Args:
        path: Where.
        parts: The content, in order.
        replace: Whether a file that is there is replaced; asked only where it is sealed.

    Raises:
        RunError: The disk is full or the folder cannot be written; what was there before stays.
        VaultError: The same, of a sealed one; or its keyring does not open.
    """
    ring = ring_beside(path)
    if ring is None:
        write_whole(path, *parts)
        return
    header = Header(purpose=purpose_of(path))
    if is_sealed(path):
        before = inspect(path).header
        header = Header(purpose=header.purpose, object=before.object, generation=before.generation + 1)
    write_file(path, header, [ring], *parts, replace=replace)


def seal(path: Path) -> bool:
    """Seals a private file that is in clear beside a keyring.

    Only for a file that nobody writes meanwhile.

    Returns:
        Whether it did: False where there is no such file, or no keyring, or it is sealed already.

    Raises:
        VaultError: It cannot be read or written; what was there before stays.
    """
    if not path.exists() or is_sealed(path) or ring_beside(path) is None:
        return False
    try:
        content = read(path)
    except OSError as error:
        raise VaultError(f"expected a private file at {path}, got: {error.strerror or error}; make it yours") from None
    write(path, content)
    return True


@contextlib.contextmanager
def anonymous(content: bytes) -> Iterator[int]:
    """Puts a key where a program can read it that takes only a file's name: ``/proc/self/fd/N``, in memory.

    Yields:
        The descriptor N, of a file without a name, which is gone when everybody has closed it. No program that this
        process starts inherits it, unless it is told to.
    """
    descriptor = os.memfd_create("key", os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        yield descriptor
    finally:
        os.close(descriptor)
