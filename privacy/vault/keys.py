"""Keys of the vault: what a file's data key is wrapped under, how a passphrase becomes a key, and how keys end.

A file is sealed under a random data key of its own. That key is *wrapped* once for each recipient:

    key          a random key-encryption key of a `Keyring`, named by its kid
    passphrase   a key-encryption key by Argon2id (RFC 9106) from a passphrase; parameters and salt stand in the file
    recovery     HPKE (RFC 9180, base mode) for a public key whose private half is kept elsewhere; ML-KEM-768 and
                 X25519 together, so that what is copied today is not opened by a quantum computer later

For the first two the wrap is itself a Cobblestone-256 message of 32 bytes. That gives a fresh salt for each wrap, so no
count of wraps under one key matters, and a commitment to the key: a wrap that opens under two passphrases, by which an
attacker who may submit files could try many of them at once (Len, Grubbs, Ristenpart, USENIX Security 2021), does not
exist. What a wrap is bound to is `Wrap.bound`.

A recovery wrap says nothing about who made it: everybody has the public key. What was opened with a recovery key is
what *somebody* sealed for it.

Guarantees:
    Closed: keys and passphrases do not print, copy or pickle. Python cannot wipe memory, so a dump of the process, or
    a swapped page of it, may hold them.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import os
import re
import time
import unicodedata
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, NoReturn, Protocol, Self, final

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from privacy.errors import VaultError
from privacy.plan import canonical

KEY_BYTES: Final = 32
# A Cobblestone-256 message of 32 bytes: salt, commitment, ciphertext, tag.
_WRAPPED: Final = 24 + 32 + KEY_BYTES + 16
# HPKE: an ML-KEM-768 ciphertext, an X25519 public key, ciphertext, tag.
_WRAPPED_RECOVERY: Final = 1088 + 32 + KEY_BYTES + 16
_HEX_16: Final = re.compile(r"[0-9a-f]{32}")
_PUBLIC: Final = re.compile(rf"tacit-recovery-1 ({_HEX_16.pattern}) ([A-Za-z0-9+/=]{{1,1700}})\n?")


def kid_of(identifier: str) -> str:
    """Returns the name that a file carries for a key: half of a SHA-256 of the key's random identifier (32 hex digits).

    Never a hash of the key itself, which would tell two holders that they share one, and be something to search with.
    """
    return hashlib.sha256(b"tacit/vault/1/kid\n" + bytes.fromhex(identifier)).hexdigest()[:32]


class Kind(StrEnum):
    """What a data key is wrapped under."""

    KEY = "key"
    PASSPHRASE = "passphrase"  # noqa: S105 -- the word, not one
    RECOVERY = "recovery"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """How Argon2id turns a passphrase into a key.

    The bounds hold before anything is run: the parameters of a file are the writer's, and whoever may write a file
    could otherwise ask for a terabyte. The least is OWASP's (19 MiB, 2 passes); the default is the second choice of
    RFC 9106, section 4 (64 MiB, 3 passes, 4 lanes).

    Attributes:
        salt: 16 random bytes.
        memory_kib: Memory, 19,456 to 262,144 KiB.
        passes: 2 to 8.
        lanes: 1 to 8.
    """

    salt: bytes
    memory_kib: int = 65_536
    passes: int = 3
    lanes: int = 4

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("salt", len(self.salt), 16, 16),
            ("memory_kib", self.memory_kib, 19_456, 262_144),
            ("passes", self.passes, 2, 8),
            ("lanes", self.lanes, 1, 8),
        ):
            if type(value) is not int or not least <= value <= most:
                raise VaultError(
                    f"expected Argon2id with {name} of {least} to {most}, got {value!r}; the file is foreign or altered"
                )

    def fields(self) -> dict[str, Any]:
        """Returns what a file says of it."""
        return {"lanes": self.lanes, "memory_kib": self.memory_kib, "passes": self.passes, "salt": self.salt.hex()}

    @classmethod
    def parse(cls, fields: object) -> Self:
        """Reads what a file says, exactly.

        Raises:
            VaultError: It is anything else, or out of bounds.
        """
        if not isinstance(fields, dict) or set(fields) != {"lanes", "memory_kib", "passes", "salt"}:
            raise _strange("Argon2id parameters")
        if not isinstance(fields["salt"], str) or not _HEX_16.fullmatch(fields["salt"]):
            raise _strange("an Argon2id salt")
        return cls(**fields | {"salt": bytes.fromhex(fields["salt"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrap:
    """A data key, wrapped for one recipient.

    Attributes:
        kind: For what kind of recipient.
        kid: Name of the key; empty for a passphrase.
        stretch: For a passphrase only.
        wrapped: The wrapped data key.
    """

    kind: Kind
    kid: str = ""
    stretch: Stretch | None = None
    wrapped: bytes = dataclasses.field(default=b"", repr=False)

    def _label(self) -> dict[str, Any]:
        label: dict[str, Any] = {"kind": self.kind.value}
        return label | ({"kdf": self.stretch.fields()} if self.stretch is not None else {"kid": self.kid})

    def bound(self, context: bytes) -> bytes:
        """Returns what the wrap is bound to: the file it is for, and everything that stands beside it."""
        return b"tacit/vault/1/wrap\n" + context + canonical(self._label())

    def fields(self) -> dict[str, Any]:
        """Returns what a file says of it."""
        return self._label() | {"wrapped": base64.b64encode(self.wrapped).decode()}

    @classmethod
    def parse(cls, fields: object) -> Self:
        """Reads what a file says, exactly; runs nothing.

        Raises:
            VaultError: It is anything else.
        """
        if not isinstance(fields, dict) or fields.get("kind") not in list(Kind):
            raise _strange("a wrapped key")
        kind = Kind(fields["kind"])
        name = "kdf" if kind is Kind.PASSPHRASE else "kid"
        if set(fields) != {"kind", name, "wrapped"} or not isinstance(fields["wrapped"], str):
            raise _strange("a wrapped key")
        try:
            wrapped = base64.b64decode(fields["wrapped"], validate=True)
        except (binascii.Error, ValueError):
            raise _strange("a wrapped key in base64") from None
        # One text for one wrap: base64 has several where its last bits are not zero.
        if base64.b64encode(wrapped).decode() != fields["wrapped"]:
            raise _strange("a wrapped key in base64")
        if len(wrapped) != (_WRAPPED_RECOVERY if kind is Kind.RECOVERY else _WRAPPED):
            raise _strange("a wrapped key of its length")
        if kind is Kind.PASSPHRASE:
            return cls(kind=kind, stretch=Stretch.parse(fields["kdf"]), wrapped=wrapped)
        if not isinstance(fields["kid"], str) or not _HEX_16.fullmatch(fields["kid"]):
            raise _strange("a key's name")
        return cls(kind=kind, kid=fields["kid"], wrapped=wrapped)

    def __str__(self) -> str:
        return self.kind.value if self.kind is Kind.PASSPHRASE else f"{self.kind.value} {self.kid[:8]}"


class Recipient(Protocol):
    """Whom a file is sealed for."""

    def wrap(self, data_key: bytes, context: bytes) -> Wrap:
        """Wraps a data key, bound to the hash of a file's header block."""
        ...


class Opener(Protocol):
    """What opens files."""

    def unwrap(self, wrap: Wrap, context: bytes) -> bytes | None:
        """Returns the data key, or None where this wrap is not for it or was altered."""
        ...

    def why_not(self, wrap: Wrap) -> str:
        """Says why a wrap that did not open did not; an empty string where it is for somebody else."""
        ...


class _Closed:
    """What never prints, copies or pickles."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is neither copied nor pickled; load it where it is needed")


@final
class Passphrase(_Closed):
    """A passphrase, as recipient and as what opens.

    Files that one object seals share a salt, and Argon2id runs once for all of them; another object draws another.
    """

    LEAST: Final = 12
    _MOST: Final = 1024

    def __init__(self, text: str, *, stretch: Stretch | None = None) -> None:
        """Takes a passphrase.

        Args:
            text: 1 to 1024 characters, by their Unicode normal form C, so that two keyboards mean the same.
            stretch: How it is stretched for what is sealed; its least length is not asked of what only opens.

        Raises:
            VaultError: It is empty or longer.
        """
        if not 1 <= len(text) <= self._MOST:
            raise VaultError(f"expected a passphrase of 1 to {self._MOST} characters, got {len(text)}; choose another")
        self.__text = unicodedata.normalize("NFC", text).encode()
        self.__stretch = stretch or Stretch(salt=os.urandom(16))
        self.__weak = len(text) < self.LEAST
        self.__keys: dict[Stretch, bytes] = {}

    def _key(self, stretch: Stretch) -> bytes:
        if stretch not in self.__keys:
            while len(self.__keys) >= 16:
                del self.__keys[next(iter(self.__keys))]
            self.__keys[stretch] = Argon2id(
                salt=stretch.salt,
                length=KEY_BYTES,
                iterations=stretch.passes,
                lanes=stretch.lanes,
                memory_cost=stretch.memory_kib,
            ).derive(self.__text)
        return self.__keys[stretch]

    def wrap(self, data_key: bytes, context: bytes) -> Wrap:
        """Wraps a data key.

        Raises:
            VaultError: The passphrase is shorter than `LEAST`: whoever copies the file may guess for ever.
        """
        if self.__weak:
            raise VaultError(
                f"expected a passphrase of at least {self.LEAST} characters to seal with, got a shorter one; "
                "five random words are a good one"
            )
        empty = Wrap(kind=Kind.PASSPHRASE, stretch=self.__stretch)
        return _wrapped(empty, self._key(self.__stretch), data_key, context)

    def unwrap(self, wrap: Wrap, context: bytes) -> bytes | None:
        """Returns the data key, or None; a passphrase is tried on each passphrase's wrap."""
        if wrap.kind is not Kind.PASSPHRASE or wrap.stretch is None:
            return None
        return _unwrapped(wrap, self._key(wrap.stretch), context)

    def why_not(self, wrap: Wrap) -> str:
        """Says why a wrap did not open."""
        return "the passphrase is another one, or the file was altered" if wrap.kind is Kind.PASSPHRASE else ""


class KeyState(StrEnum):
    """What may be done with a key."""

    ACTIVE = "active"
    DECRYPT_ONLY = "decrypt-only"
    REVOKED = "revoked"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyFacts:
    """What may be shown of a key: its name, its state, and when it was made (seconds since 1970)."""

    kid: str
    state: KeyState
    created: int


@final
class Keyring(_Closed):
    """Key-encryption keys: one active, which seals; older ones, which open; revoked ones, which are gone.

    A revoked key's bytes are dropped; its name stays, so that a file that still needs it is told apart from a foreign
    one.
    """

    _FORMAT: Final = 1
    _MOST: Final = 1024

    def __init__(self) -> None:
        """Makes a keyring with one active key."""
        self.__keys: dict[str, tuple[str, KeyState, int, bytes]] = {}
        self.add()

    def add(self) -> str:
        """Makes a new active key; the one before opens from now on and seals no more.

        Returns:
            The new key's name.

        Raises:
            VaultError: The ring is full.
        """
        if len(self.__keys) >= self._MOST:
            raise VaultError(f"expected at most {self._MOST} keys in a keyring, got that many; begin another")
        for kid, (identifier, state, created, key) in self.__keys.items():
            if state is KeyState.ACTIVE:
                self.__keys[kid] = (identifier, KeyState.DECRYPT_ONLY, created, key)
        identifier = os.urandom(16).hex()
        self.__keys[kid_of(identifier)] = (identifier, KeyState.ACTIVE, int(time.time()), os.urandom(KEY_BYTES))
        return kid_of(identifier)

    def revoke(self, kid: str) -> None:
        """Forgets a key for good: what is wrapped under nothing else can never be opened again.

        Raises:
            VaultError: It is the active one, or not in the ring.
        """
        if kid not in self.__keys:
            raise VaultError(f"expected a key of this keyring, got {kid!r}; list them with inspect")
        identifier, state, created, _ = self.__keys[kid]
        if state is KeyState.ACTIVE:
            raise VaultError("expected a key that is no longer active, got the active one; make a new key first")
        self.__keys[kid] = (identifier, KeyState.REVOKED, created, b"")

    @property
    def active(self) -> str:
        """Name of the key that seals."""
        return next(facts.kid for facts in self.facts if facts.state is KeyState.ACTIVE)

    @property
    def facts(self) -> tuple[KeyFacts, ...]:
        """What may be shown of each key, the oldest first."""
        return tuple(KeyFacts(kid=kid, state=key[1], created=key[2]) for kid, key in self.__keys.items())

    def wrap(self, data_key: bytes, context: bytes) -> Wrap:
        """Wraps a data key under the active key."""
        kid = self.active
        return _wrapped(Wrap(kind=Kind.KEY, kid=kid), self.__keys[kid][3], data_key, context)

    def unwrap(self, wrap: Wrap, context: bytes) -> bytes | None:
        """Returns the data key, or None; a revoked key opens nothing."""
        if wrap.kind is not Kind.KEY or wrap.kid not in self.__keys:
            return None
        _, state, _, key = self.__keys[wrap.kid]
        return None if state is KeyState.REVOKED else _unwrapped(wrap, key, context)

    def why_not(self, wrap: Wrap) -> str:
        """Says why a wrap did not open."""
        if wrap.kind is not Kind.KEY or wrap.kid not in self.__keys:
            return ""
        if self.__keys[wrap.kid][1] is KeyState.REVOKED:
            return f"key {wrap.kid[:8]} was revoked"
        return "the file was altered"

    def _export(self) -> bytes:
        """Returns the whole ring as text, keys included; for the file of keys alone."""
        keys = [
            {"created": created, "id": identifier, "key": key.hex(), "state": state.value}
            for identifier, state, created, key in self.__keys.values()
        ]
        return canonical({"format": self._FORMAT, "keys": keys})

    @classmethod
    def _import(cls, content: Mapping[str, Any]) -> Self:
        """Reads what `_export` wrote.

        Raises:
            VaultError: It is anything else.
        """
        entries = content.get("keys")
        if content.get("format") != cls._FORMAT or set(content) != {"format", "keys"} or not isinstance(entries, list):
            raise _strange("a keyring")
        ring = cls.__new__(cls)
        found: dict[str, tuple[str, KeyState, int, bytes]] = {}
        for entry in entries:
            if not isinstance(entry, dict) or set(entry) != {"created", "id", "key", "state"}:
                raise _strange("a key of a keyring")
            identifier, key, created = entry["id"], entry["key"], entry["created"]
            if not (
                isinstance(identifier, str)
                and _HEX_16.fullmatch(identifier)
                and isinstance(key, str)
                and entry["state"] in list(KeyState)
                and re.fullmatch("" if entry["state"] == KeyState.REVOKED else r"[0-9a-f]{64}", key)
                and type(created) is int
            ):
                raise _strange("a key of a keyring")
            found[kid_of(identifier)] = (identifier, KeyState(entry["state"]), created, bytes.fromhex(key))
        if len(found) != len(entries) or [key[1] for key in found.values()].count(KeyState.ACTIVE) != 1:
            raise _strange("a keyring with one active key")
        ring.__keys = found
        return ring


@final
class RecoveryRecipient:
    """The public half of a recovery key: seals, and opens nothing."""

    def __init__(self, identifier: str, key: bytes) -> None:
        """Takes the key's identifier (32 hex digits) and its bytes: ML-KEM-768 (1184), then X25519 (32).

        Raises:
            VaultError: These are no public key.
        """
        self.identifier, self.kid = identifier, kid_of(identifier)
        self._raw = key
        try:
            if len(key) != 1184 + 32:
                raise ValueError(len(key))
            self._key = MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(key[:1184]), X25519PublicKey.from_public_bytes(key[1184:])
            )
        except ValueError:
            raise _strange("a public recovery key") from None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the line that `to_text` returned.

        Raises:
            VaultError: It is anything else.
        """
        found = _PUBLIC.fullmatch(text)
        if found is None:
            raise _strange("a public recovery key")
        try:
            return cls(found[1], base64.b64decode(found[2], validate=True))
        except (binascii.Error, ValueError):
            raise _strange("a public recovery key") from None

    def to_text(self) -> str:
        """Returns the key as a line for a file that anybody may read."""
        return f"tacit-recovery-1 {self.identifier} {base64.b64encode(self._raw).decode()}\n"

    def wrap(self, data_key: bytes, context: bytes) -> Wrap:
        """Wraps a data key for whoever has the private half."""
        empty = Wrap(kind=Kind.RECOVERY, kid=self.kid)
        return dataclasses.replace(empty, wrapped=_suite().encrypt(data_key, self._key, empty.bound(context)))


@final
class RecoveryKey(_Closed):
    """A private recovery key, kept away from the machine whose files it opens."""

    _FORMAT: Final = 1

    def __init__(self) -> None:
        """Makes a new key."""
        self.__take(os.urandom(16).hex(), os.urandom(64), os.urandom(32))

    def __take(self, identifier: str, lattice: bytes, curve: bytes) -> None:
        first, second = MLKEM768PrivateKey.from_seed_bytes(lattice), X25519PrivateKey.from_private_bytes(curve)
        self.__raw, self.__key = (identifier, lattice, curve), MLKEM768X25519PrivateKey(first, second)
        public = first.public_key().public_bytes_raw() + second.public_key().public_bytes_raw()
        self.recipient = RecoveryRecipient(identifier, public)

    def unwrap(self, wrap: Wrap, context: bytes) -> bytes | None:
        """Returns the data key, or None."""
        if wrap.kind is not Kind.RECOVERY or wrap.kid != self.recipient.kid:
            return None
        try:
            data_key = bytes(_suite().decrypt(wrap.wrapped, self.__key, wrap.bound(context)))
        except (InvalidTag, ValueError):
            return None
        return data_key if len(data_key) == KEY_BYTES else None

    def why_not(self, wrap: Wrap) -> str:
        """Says why a wrap did not open."""
        known = wrap.kind is Kind.RECOVERY and wrap.kid == self.recipient.kid
        return "the file was altered" if known else ""

    def _export(self) -> bytes:
        identifier, lattice, curve = self.__raw
        return canonical({"format": self._FORMAT, "id": identifier, "mlkem768": lattice.hex(), "x25519": curve.hex()})

    @classmethod
    def _import(cls, content: Mapping[str, Any]) -> Self:
        patterns = {"id": r"[0-9a-f]{32}", "mlkem768": r"[0-9a-f]{128}", "x25519": r"[0-9a-f]{64}"}
        if set(content) != {*patterns, "format"} or content["format"] != cls._FORMAT:
            raise _strange("a recovery key")
        for name, pattern in patterns.items():
            if not isinstance(content[name], str) or not re.fullmatch(pattern, content[name]):
                raise _strange("a recovery key")
        key = cls.__new__(cls)
        key.__take(content["id"], bytes.fromhex(content["mlkem768"]), bytes.fromhex(content["x25519"]))
        return key


def _suite() -> Suite:
    return Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _wrapped(empty: Wrap, key: bytes, data_key: bytes, context: bytes) -> Wrap:
    encryptor = Cobblestone256Encryptor(key, empty.bound(context))
    return dataclasses.replace(empty, wrapped=encryptor.update(data_key) + encryptor.finalize())


def _unwrapped(wrap: Wrap, key: bytes, context: bytes) -> bytes | None:
    decryptor = Cobblestone256Decryptor(key, wrap.bound(context))
    try:
        return decryptor.update(wrap.wrapped) + decryptor.finalize()
    except InvalidTag:
        return None


def _strange(what: str) -> VaultError:
    return VaultError(f"expected {what}, got something else; the file is foreign or altered, restore a backup")
