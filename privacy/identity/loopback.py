"""Certificates for two processes of one machine: Flower authenticates SuperNodes over TLS only, on loopback too.

A new authority is made for every start, signs one certificate for loopback, and is forgotten: there is no key that
could sign another. Nothing rests on it but that Flower agrees to ask a SuperNode for its key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from privacy.files import write_whole
from privacy.identity.authority import Authority, pem_of
from privacy.vault import private

HOSTS: Final = ["127.0.0.1", "localhost"]
# Flower reads its certificate once, at its start. One as short-lived as those of clients would end a relay that runs
# longer, and there is nobody on loopback for whom it should be short.
_DAYS: Final = 4 * 365


def write_loopback(folder: Path, *, now: float) -> tuple[Path, Path]:
    """Makes a certificate for loopback.

    Args:
        folder: Where its files go; earlier ones are replaced.
        now: Seconds since 1970.

    Returns:
        A PEM file with key and certificate, mode 0600, sealed if there is a keyring; and one with the authority that
        signed it.

    Raises:
        RunError: The folder cannot be written.
    """
    authority = Authority.create("loopback", HOSTS, now=now)
    own, root = folder / "loopback.pem", folder / "loopback-ca.pem"
    private.write(own, authority.server_leaf("loopback", HOSTS, now=now, days=_DAYS))
    write_whole(root, pem_of(authority.certificate))
    return own, root
