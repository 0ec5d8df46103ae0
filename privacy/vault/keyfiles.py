"""Files of keys: a keyring or a recovery key, sealed under a passphrase or private by its mode alone.

    sealed      a container of purpose ``keys`` for one passphrase
    private     "tacit/keys/1\\n", then the same content in clear; mode 0600, of the user who reads it

The content is canonical JSON: ``{"keyring": ...}`` or ``{"recovery": ...}``. A passphrase protects a copied disk or
backup; a private file protects against other users of the machine only, and is for where nobody is there to type.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from privacy.errors import VaultError
from privacy.plan import canonical
from privacy.vault.container import MAGIC, Header, Reader, Wanted, Writer
from privacy.vault.draft import Draft
from privacy.vault.keys import Keyring, Passphrase, RecoveryKey

_CLEAR: Final = b"tacit/keys/1\n"
_MOST: Final = 1024 * 1024

Keys = Keyring | RecoveryKey
Ask = Callable[[], Passphrase]


def save_keys(path: Path, keys: Keys, passphrase: Passphrase | None) -> None:
    """Writes a new file of keys, mode 0600, on disk before it returns: what it seals would be lost with it.

    Args:
        path: Where; nothing may be there.
        keys: What.
        passphrase: To seal it under; None for a private file.

    Raises:
        VaultError: Something is there, nothing can be written, or the passphrase is too short.
    """
    _write(path, keys, passphrase, Header(purpose="keys"), replace=False)


def load_keys(path: Path, ask: Ask) -> Keys:
    """Reads a file of keys.

    Args:
        path: The file.
        ask: Returns the passphrase; called only if the file is sealed.

    Raises:
        VaultError: It is no such file, it does not open, or others may read or own a private one.
    """
    return _read(path, ask)[0]


def load_keyring(path: Path, ask: Ask) -> Keyring:
    """Reads a file that must be a keyring; see `load_keys`."""
    return _ring(load_keys(path, ask), path)


@contextlib.contextmanager
def changing(path: Path, ask: Ask) -> Iterator[Keyring]:
    """Reads a keyring and, left without an error, writes it again, on disk; two at a time wait for each other.

    Yields:
        The keyring, to be changed.

    Raises:
        VaultError: As `load_keys`, or it cannot be written; the keyring that was there before stays.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise VaultError(f"expected to lock {path}, got: {error.strerror or error}; check its folder") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        keys, passphrase, header = _read(path, ask)
        ring = _ring(keys, path)
        yield ring
        following = Header(purpose="keys", object=header.object, generation=header.generation + 1)
        _write(path, ring, passphrase, following, replace=True)
    finally:
        os.close(descriptor)


def _ring(keys: Keys, path: Path) -> Keyring:
    if not isinstance(keys, Keyring):
        raise VaultError(f"expected a keyring at {path}, got a recovery key; name the file that keygen made")
    return keys


def _write(path: Path, keys: Keys, passphrase: Passphrase | None, header: Header, *, replace: bool) -> None:
    name = b"keyring" if isinstance(keys, Keyring) else b"recovery"
    content = b'{"%s":%s}' % (name, keys._export())
    if passphrase is None:
        with Draft(path, replace=replace) as draft:
            draft.write(_CLEAR + content)
    else:
        with Writer(path, header, [passphrase], replace=replace) as writer:
            writer.write(content)


def _read(path: Path, ask: Ask) -> tuple[Keys, Passphrase | None, Header]:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            facts = os.fstat(file.fileno())
            # A pipe might never end, and has no owner to trust.
            content = file.read(_MOST + 1) if stat.S_ISREG(facts.st_mode) else b""
    except OSError as error:
        raise VaultError(
            f"expected a file of keys at {path}, got: {error.strerror or error}; make one with tacit vault keygen"
        ) from None
    passphrase, header = None, Header(purpose="keys")
    if content.startswith(MAGIC):
        passphrase = ask()
        with Reader(path, [passphrase], Wanted(purpose="keys"), limit=_MOST) as reader:
            content, header = bytes(reader.read()), reader.header
    elif content.startswith(_CLEAR):
        if facts.st_mode & 0o077 or facts.st_uid not in (os.geteuid(), 0):
            raise VaultError(
                f"expected the keys at {path} to be private (0600, your own), got mode {facts.st_mode & 0o777:04o}; "
                "chmod 600 it"
            )
        content = content.removeprefix(_CLEAR)
    else:
        raise VaultError(f"expected a file of keys at {path}, got something else; make one with tacit vault keygen")
    try:
        fields = json.loads(content)
        if len(content) > _MOST or not isinstance(fields, dict) or canonical(fields) != content or len(fields) != 1:
            raise ValueError("another form")
        ((name, value),) = fields.items()
        if not isinstance(value, dict) or name not in ("keyring", "recovery"):
            raise ValueError(name)
    except (ValueError, RecursionError):
        raise VaultError(f"expected keys at {path}, got something else; restore a backup") from None
    return (Keyring if name == "keyring" else RecoveryKey)._import(value), passphrase, header
