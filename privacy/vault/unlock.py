"""Where keys and passphrases come from: files, the environment, a person. Never a command line, which others can read.

TACIT_VAULT_KEYS              a file of keys
TACIT_VAULT_PASSPHRASE_FILE   a private file whose first line is a passphrase
TACIT_VAULT_PASSPHRASE        a passphrase; whoever reads this process's environment reads it
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from privacy.errors import VaultError
from privacy.vault.keyfiles import load_keyring, load_keys
from privacy.vault.keys import Keyring, Opener, Passphrase

# What tells a process how to open what is sealed; see the module's text.
VARIABLES: Final = ("TACIT_VAULT_KEYS", "TACIT_VAULT_PASSPHRASE_FILE", "TACIT_VAULT_PASSPHRASE")


def handed_on(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns what a process of ours that opens sealed files needs of the environment; others must not get it."""
    return {name: environment[name] for name in VARIABLES if environment.get(name)}


def passphrase_in(path: Path) -> Passphrase:
    """Reads a passphrase from the first line of a private file.

    Raises:
        VaultError: It cannot be read, others may read it, or it is no passphrase.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(8192) if stat.S_ISREG(facts.st_mode) else b""
    except OSError as error:
        raise VaultError(f"expected a passphrase in {path}, got: {error.strerror or error}; check its name") from None
    if not stat.S_ISREG(facts.st_mode) or facts.st_mode & 0o077:
        raise VaultError(
            f"expected the passphrase file {path} to be private (0600), got mode {facts.st_mode & 0o777:04o}; "
            "chmod 600 it"
        )
    try:
        return Passphrase(content.partition(b"\n")[0].removesuffix(b"\r").decode())
    except UnicodeDecodeError:
        raise VaultError(f"expected a passphrase in UTF-8 in {path}, got other bytes; write it anew") from None


def passphrase_from(
    file: Path | None, ask: Callable[[], str] | None = None, environment: Mapping[str, str] = os.environ
) -> Passphrase | None:
    """Returns the passphrase that a file, the environment or a person gives, in this order; None where none does.

    Args:
        file: A private file that was named.
        ask: Asks a person.
        environment: The process's, unless told otherwise.

    Raises:
        VaultError: What was named gives none.
    """
    if file is not None:
        return passphrase_in(file)
    if named := environment.get("TACIT_VAULT_PASSPHRASE_FILE"):
        return passphrase_in(Path(named).expanduser())
    if text := environment.get("TACIT_VAULT_PASSPHRASE"):
        return Passphrase(text)
    return Passphrase(ask()) if ask is not None else None


def openers_from(
    keys: Path | None,
    passphrase: Callable[[], Passphrase | None] = lambda: passphrase_from(None),
    environment: Mapping[str, str] = os.environ,
) -> list[Opener]:
    """Returns what may open files here: the file of keys that was named, or the environment's; else a passphrase.

    Args:
        keys: A file of keys that was named.
        passphrase: Gives the passphrase, of the file of keys or of what is sealed.
        environment: The process's, unless told otherwise.

    Raises:
        VaultError: There is none, or it does not open.
    """
    if keys is None and (named := environment.get("TACIT_VAULT_KEYS")):
        keys = Path(named).expanduser()
    if keys is not None:
        return [load_keys(keys, lambda: required(passphrase()))]
    return [required(passphrase())]


def keyring_at(path: str) -> Keyring | None:
    """Returns the keyring that a setting names, None for an empty one; a passphrase comes from the environment.

    Raises:
        VaultError: There is none, or it does not open.
    """
    return load_keyring(Path(path).expanduser(), lambda: required(passphrase_from(None))) if path else None


def required(passphrase: Passphrase | None) -> Passphrase:
    """Returns a passphrase.

    Raises:
        VaultError: There is none.
    """
    if passphrase is None:
        raise VaultError(
            "expected keys to open what is sealed, got none; set TACIT_VAULT_KEYS to a file of keys, or "
            "TACIT_VAULT_PASSPHRASE_FILE to a private file with a passphrase"
        )
    return passphrase
