"""Who is who: Ed25519 identities for receipts and countersignatures (RFC 8032).

A data holder signs what it was charged; the peer countersigns. Private keys live in files of mode 0600 or are derived
from one; they never print, log or pickle. Encryption and enrolment of separate machines build on the same names.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Final, NoReturn, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from privacy.errors import LedgerError, VaultError

_KEY: Final = re.compile(r"[0-9a-f]{64}")
_SIGNATURE: Final = re.compile(r"[0-9a-f]{128}")
# What a peer signs before a receipt's text.
COUNTERSIGN: Final = b"tacit/countersign/1\n"


@final
class Secret:
    """A 32-byte secret in a file of mode 0600, from which a holder's keys are derived.

    Guarantees:
        Closed: it does not print, copy or pickle; only derived keys leave it.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 32:
            raise LedgerError(f"expected a secret of 32 bytes, got {len(seed)}; restore the key file from its backup")
        self.__seed = seed
        self.__identities: dict[str, Identity] = {}

    @classmethod
    def load_or_create(cls, path: Path) -> Secret:
        """Reads the secret at ``path``, or makes one there with mode 0600; sealed, if its folder has a keyring.

        Raises:
            LedgerError: The file can be read by others, or does not hold 32 bytes.
            VaultError: It is sealed, and does not open (`privacy.vault.private`).
        """
        # Here, because the vault is made of identities too.
        from privacy.vault import private

        if not path.exists() and private.ring_beside(path) is not None:
            try:
                private.write(path, os.urandom(32), replace=False)
            except VaultError:
                # Another process was first, and its key is there. Anything else must not end in a key in clear.
                if not path.exists():
                    raise
        if not path.exists():
            # Whole or not at all: a crash or a second process must never meet a key file that is still empty.
            draft = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(os.urandom(32))
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)
            finally:
                draft.unlink()
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise LedgerError(f"expected key file {path.name} to be private (0600), got {mode:04o}; chmod 600 it")
        return cls(private.opened(path, path.read_bytes()))

    def derive(self, purpose: str) -> bytes:
        """Returns 32 bytes that depend on the secret and a purpose (HMAC-SHA-256)."""
        return hmac.new(self.__seed, purpose.encode(), hashlib.sha256).digest()

    def identity(self, name: str) -> Identity:
        """Returns the signing identity of one name under this secret; made once, it costs as much as a signature."""
        if name not in self.__identities:
            self.__identities[name] = Identity(self.derive(f"tacit/identity/1/{name}"))
        return self.__identities[name]

    def commitment(self, name: str, content: bytes) -> str:
        """Returns a keyed commitment to content, in hex: equal content, equal value; nothing else can be learnt.

        A bare hash would let anyone who guesses a data set confirm the guess (guarantee G7).
        """
        return hmac.new(self.derive(f"tacit/commitment/1/{name}"), content, hashlib.sha256).hexdigest()

    def __repr__(self) -> str:
        return "Secret(<32 bytes>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is neither copied nor pickled; load it from its key file")


@final
class Identity:
    """An Ed25519 signing identity."""

    def __init__(self, seed: bytes) -> None:
        self.__key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key: str = self.__key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def sign(self, message: bytes) -> str:
        """Returns the 64-byte signature of a message, in hex."""
        return self.__key.sign(message).hex()

    def __repr__(self) -> str:
        return f"Identity({self.public_key[:16]})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a signing identity is neither copied nor pickled; derive it from its key file")


def verify(public_key: str, message: bytes, signature: str) -> None:
    """Checks a signature.

    Args:
        public_key: Raw Ed25519 public key, 64 hex digits.
        message: What was signed.
        signature: 128 hex digits.

    Raises:
        LedgerError: The signature does not belong to this key and message, or either is malformed.
    """
    # One text per signature: upper case or spaces would let a copy of a receipt pass for another one.
    if not (_KEY.fullmatch(public_key) and _SIGNATURE.fullmatch(signature)):
        raise LedgerError("expected a public key and a signature in lower-case hex, got something else")
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError, TypeError):
        raise LedgerError("expected a valid signature, got one that does not match its key and message") from None


# What a server signs before the hash of an app bundle.
BUNDLE: Final = b"tacit/bundle/1\n"


def sign_bundle(identity: Identity, bundle: bytes) -> str:
    """Returns a signature over an app bundle's SHA-256, in hex (guarantee G22)."""
    return identity.sign(BUNDLE + hashlib.sha256(bundle).digest())


def verify_bundle(trusted: Collection[str], bundle: bytes, signature: str) -> None:
    """Checks that one of the trusted keys has signed an app bundle, before any of it runs (guarantee G22).

    Args:
        trusted: Raw Ed25519 public keys, 64 hex digits each; none means that no bundle passes.
        bundle: The bundle as it came.
        signature: 128 hex digits; anything else passes no bundle.

    Raises:
        LedgerError: None of them has.
    """
    message = BUNDLE + hashlib.sha256(bundle).digest()
    for key in trusted:
        with contextlib.suppress(LedgerError):
            verify(key, message, signature)
            return
    raise LedgerError("expected an app bundle signed by a trusted key, got another one; ask the operator which it is")
