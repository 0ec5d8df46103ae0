"""Enrolment as it stands on the wire: the invitation, the messages, and the proof of a secret that is never sent.

The format is specified in ``docs/protocol-enrol.md``; this is the one implementation of it, used by both sides.

An invitation is one line of text that a person carries from the server to a data holder. In it are a secret of 128
bits and what the holder needs to know whom it talks to: the fingerprints of the certificate authority and of the server
*application's* key (guarantee G21). The secret is shown in SCRAM's way (RFC 5802) over a channel that is already
authenticated by the fingerprint:

    client key   = HMAC(secret, "client")
    stored key   = SHA-256(client key)
    server key   = HMAC(secret, "server")
    proof        = client key XOR HMAC(stored key, transcript)
    answer's MAC = HMAC(server key, transcript and answer)

The server keeps the stored key and the server key only. Whoever reads its disk can neither learn the secret nor redeem
the invitation; whoever does not know the server key cannot answer for it. The transcript binds the kind of message, the
server's greeting with a fresh nonce, the certificate that the server showed in TLS, and the whole request with all of
the client's public keys: a proof holds for exactly these keys on both sides, once.

Every message is canonical JSON, has a length in front of it and is `MOST_MESSAGE` bytes at most. Nothing here does
input or output.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import hmac
import ipaddress
import json
import math
import os
import re
import struct
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, NoReturn, Self

from privacy.errors import IdentityError
from privacy.plan import canonical

PROTOCOL: Final = 1
# Bytes of a message without its length; the longest of ours has about 3 KiB.
MOST_MESSAGE: Final = 16 * 1024
LENGTH: Final = struct.Struct(">I")
_PREFIX: Final = "tacit1-"
_BASE32: Final = "abcdefghijklmnopqrstuvwxyz234567"
_AS_NUMBER: Final = str.maketrans(_BASE32, "0123456789abcdefghijklmnopqrstuv")
_CHECK: Final = 4
_HEAD: Final = struct.Struct(">BH")
_FIXED: Final = struct.Struct(">16s32s32sQdd")
_DOMAIN: Final = b"tacit/enrol/1/"
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MOST_ADDRESSES: Final = 8


class Word(StrEnum):
    """Why the server refuses; what it says depends on nothing but this word."""

    MALFORMED = "malformed"
    BUSY = "busy"
    UNKNOWN = "unknown"
    EXPIRED = "expired"
    USED = "used"
    REVOKED = "revoked"
    CONFLICT = "conflict"
    OLD = "old"
    FAILED = "failed"


# What a person can do about each word; the sentences are the client's own, the server sends the word alone.
REMEDIES: Final[Mapping[Word, str]] = {
    Word.MALFORMED: "the server could not read our message; update Tacit on both sides",
    Word.BUSY: "the server refuses more attempts for now; try again in a minute",
    Word.UNKNOWN: "the server does not know this invitation, or it was forged; ask for a new one",
    Word.EXPIRED: "it has expired; ask for a new invitation",
    Word.USED: "it was redeemed already, by other keys than ours; if that was not you, tell the operator at once",
    Word.REVOKED: "the operator has revoked this name; ask for an invitation under another one",
    Word.CONFLICT: "the server knows one of our keys under another name; join with a fresh --home",
    Word.OLD: "the server wants a newer Tacit; update it here",
    Word.FAILED: "the server could not finish; try again, the same invitation is still good",
}


@dataclasses.dataclass(frozen=True, order=True)
class Address:
    """Where something answers.

    Attributes:
        host: Lower-case DNS name, or an IP address in its shortest form.
        port: TCP port, from 1 to 65535.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``HOST:PORT``; an IPv6 address stands in brackets.

        Raises:
            IdentityError: It is none.
        """
        host, colon, port = text.rpartition(":")
        fault = IdentityError(f"expected an address HOST:PORT such as hospital.example:9443, got {text[:80]!r}")
        bracketed = host.startswith("[") and host.endswith("]")
        if not colon or not re.fullmatch("[1-9][0-9]{0,4}", port) or int(port) > 65535:
            raise fault
        bare = host[1:-1] if bracketed else host
        try:
            number = ipaddress.ip_address(bare)
        except ValueError:
            labels = bare.split(".")
            named = all(_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdecimal()
            if bracketed or not named or len(bare) > 253:
                raise fault from None
            return cls(bare, int(port))
        if (number.version == 6) != bracketed or getattr(number, "scope_id", None):
            raise fault
        return cls(str(number), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


# -- the invitation ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invitation:
    """What one single-use token says.

    Attributes:
        secret: 16 random bytes; whoever has them may enrol under the name, once.
        authority: SHA-256 of the certificate authority's certificate.
        server: SHA-256 of the server application's public key, see `key_fingerprint`.
        expires: Seconds since 1970.
        epsilon: Budget that the operator asks for, or 0; the holder's own word decides (guarantee G21).
        delta: Delta that the operator asks for, or 0.
        name: Under which the holder is enrolled.
        addresses: Of the enrolment endpoint, at least one.
    """

    secret: bytes = dataclasses.field(repr=False)
    authority: bytes
    server: bytes
    expires: int
    epsilon: float = 0.0
    delta: float = 0.0
    name: str
    addresses: tuple[Address, ...]

    def token(self) -> str:
        """Returns the token's text. It is a secret."""
        body = _FIXED.pack(self.secret, self.authority, self.server, self.expires, self.epsilon, self.delta)
        texts = [_text(self.name), bytes([len(self.addresses)]), *(_text(str(address)) for address in self.addresses)]
        body = b"".join((body, *texts))
        whole = _HEAD.pack(PROTOCOL, len(body)) + body
        return _PREFIX + _base32(whole + _checksum(whole))

    @classmethod
    def parse(cls, token: str) -> Self:
        """Reads a token; white space and line breaks that a mail put into it, and its case, do not matter.

        Raises:
            IdentityError: It is cut, mistyped, of a newer version, or no token. Nothing of it is repeated.
        """
        text = "".join(token.split()).lower()
        if not text.startswith(_PREFIX):
            raise IdentityError(f"expected an invitation that begins with {_PREFIX!r}, got another text; copy it whole")
        digits = text.removeprefix(_PREFIX)
        for place, digit in enumerate(digits, start=len(_PREFIX) + 1):
            if digit not in _BASE32:
                raise IdentityError(
                    f"expected letters and the digits 2 to 7 in the invitation, got something else at place {place}; "
                    "it is mistyped, copy it again"
                )
        data = _unbase32(digits)
        if len(data) < _HEAD.size:
            raise _cut(len(text), None)
        version, length = _HEAD.unpack_from(data)
        if version != PROTOCOL:
            raise IdentityError(
                f"expected an invitation of version {PROTOCOL}, got {version}; it is mistyped, or this Tacit is too old"
            )
        whole = _HEAD.size + length + _CHECK
        wanted = len(_PREFIX) + math.ceil(whole * 8 / 5)
        if len(text) < wanted:
            raise _cut(len(text), wanted)
        if len(text) > wanted:
            raise IdentityError(f"expected {wanted} characters in the invitation, got {len(text)}; copy it alone")
        # The bits behind the last byte are compared too: a token has one text.
        if _checksum(data[:-_CHECK]) != data[-_CHECK:] or _base32(data) != digits:
            raise IdentityError("expected an invitation whose checksum holds, got one that is mistyped; copy it again")
        try:
            return cls._read(data[_HEAD.size : -_CHECK])
        except (ValueError, IndexError, struct.error, IdentityError):
            raise IdentityError(
                "expected an invitation, got one with a field out of range; ask for a new one"
            ) from None

    @classmethod
    def _read(cls, body: bytes) -> Self:
        secret, authority, server, expires, epsilon, delta = _FIXED.unpack_from(body)
        name, rest = _read_text(body[_FIXED.size :])
        count, rest = rest[0], rest[1:]
        addresses = []
        for _ in range(count):
            text, rest = _read_text(rest)
            addresses.append(Address.parse(text))
            if str(addresses[-1]) != text:
                raise ValueError("an address in another spelling")
        sound = math.isfinite(epsilon) and epsilon >= 0 and 0 <= delta < 1 and expires < 2**53
        if rest or not sound or not 1 <= count <= _MOST_ADDRESSES or not _LABEL.fullmatch(name):
            raise ValueError("out of range")
        return cls(
            secret=secret,
            authority=authority,
            server=server,
            expires=expires,
            epsilon=epsilon,
            delta=delta,
            name=name,
            addresses=tuple(addresses),
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("an invitation is neither copied nor pickled; it is a secret")


def _cut(got: int, wanted: int | None) -> IdentityError:
    of = f" of {wanted}" if wanted else ""
    return IdentityError(f"expected a whole invitation, got its first {got}{of} characters; it is cut, copy all of it")


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _unbase32(digits: str) -> bytes:
    """As many whole bytes as base32 digits hold, however many there are; `base64` refuses most numbers of them."""
    bits = 5 * len(digits)
    return (int(digits.translate(_AS_NUMBER) or "0", 32) >> bits % 8).to_bytes(bits // 8, "big")


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(_DOMAIN + b"checksum\n" + data).digest()[:_CHECK]


def _text(text: str) -> bytes:
    data = text.encode("ascii")
    return bytes([len(data)]) + data


def _read_text(data: bytes) -> tuple[str, bytes]:
    length = data[0]
    if len(data) <= length:
        raise ValueError("a text that is cut")
    return data[1 : 1 + length].decode("ascii"), data[1 + length :]


def key_fingerprint(public_key: str) -> bytes:
    """Returns the fingerprint of an application's public key (64 hex digits), 32 bytes."""
    return hashlib.sha256(_DOMAIN + b"application\n" + bytes.fromhex(public_key)).digest()


# -- the proof --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """What the server keeps of an invitation's secret, from which the secret cannot be learnt.

    Attributes:
        id: Names the invitation, 32 hex digits.
        stored_key: SHA-256 of the key that proofs are made with; 64 hex digits.
        server_key: Key of the answer's MAC; 64 hex digits.
    """

    id: str
    stored_key: str = dataclasses.field(repr=False)
    server_key: str = dataclasses.field(repr=False)


def new_secret() -> bytes:
    """Returns a fresh secret of an invitation."""
    return os.urandom(16)


def stored_of(secret: bytes) -> Stored:
    """Returns what may be kept of a secret."""
    return Stored(
        id=_derived(secret, b"invitation")[:16].hex(),
        stored_key=hashlib.sha256(_derived(secret, b"client")).hexdigest(),
        server_key=_derived(secret, b"server").hex(),
    )


def transcript(kind: str, hello: bytes, leaf: bytes, body: bytes) -> bytes:
    """Returns what every proof and signature of one exchange is made over, 32 bytes.

    Args:
        kind: "join" or "renew".
        hello: The server's greeting, as it came.
        leaf: The certificate that the server showed in TLS, DER.
        body: The request's first line, as it is sent: all public keys of the client are in it.
    """
    parts = (kind.encode(), hello, leaf, body)
    return hashlib.sha256(
        _DOMAIN + b"transcript\n" + b"".join(LENGTH.pack(len(part)) + part for part in parts)
    ).digest()


def prove(secret: bytes, over: bytes) -> str:
    """Returns the proof that one knows a secret, for one transcript; 64 hex digits."""
    key = _derived(secret, b"client")
    mask = hmac.new(hashlib.sha256(key).digest(), _DOMAIN + b"proof\n" + over, hashlib.sha256).digest()
    return bytes(one ^ other for one, other in zip(key, mask, strict=True)).hex()


def proves(stored_key: str, over: bytes, proof: str) -> bool:
    """Says whether a proof for a transcript was made with the secret that a stored key is of."""
    mask = hmac.new(bytes.fromhex(stored_key), _DOMAIN + b"proof\n" + over, hashlib.sha256).digest()
    key = bytes(one ^ other for one, other in zip(bytes.fromhex(proof), mask, strict=True))
    return hmac.compare_digest(hashlib.sha256(key).digest(), bytes.fromhex(stored_key))


def answer_mac(server_key: str, over: bytes, body: bytes) -> str:
    """Returns the MAC of an answer's first line, for one transcript; 64 hex digits."""
    return hmac.new(bytes.fromhex(server_key), _DOMAIN + b"answer\n" + over + body, hashlib.sha256).hexdigest()


def server_key_of(secret: bytes) -> str:
    """Returns the key under which the answer to a secret's proof is MACed."""
    return _derived(secret, b"server").hex()


def signed(what: str, over: bytes) -> bytes:
    """Returns what a client's key signs to show that it takes part: "application", "supernode" or "certificate"."""
    return _DOMAIN + what.encode() + b"\n" + over


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return hmac.new(secret, _DOMAIN + purpose, hashlib.sha256).digest()


# -- the messages -----------------------------------------------------------------------------------------------------

_HEX16: Final = "[0-9a-f]{32}"
_HEX32: Final = "[0-9a-f]{64}"
_ED25519: Final = "[0-9a-f]{128}"
_ECDSA: Final = "(?:[0-9a-f]{2}){8,110}"
_BASE64: Final = "(?:[A-Za-z0-9+/]{4}){1,1400}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
_NAME: Final = _LABEL.pattern
_VERSION: Final = r"[0-9]{1,4}(?:\.[0-9]{1,4}){0,3}"
_SUPERNODE: Final = r"ecdsa-sha2-nistp384 [A-Za-z0-9+/]{182}=="

# Fields of every kind of message: a pattern for text, or a type.
_FIELDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "hello": {
        "application": _HEX32,
        "authority": _BASE64,
        "federation": _NAME,
        "nonce": _HEX32,
        "oldest": _VERSION,
        "time": int,
    },
    "join": {
        "application": _HEX32,
        "invitation": _HEX16,
        "name": _NAME,
        "request": _BASE64,
        "supernode": _SUPERNODE,
        "tacit": _VERSION,
    },
    "renew": {"name": _NAME, "request": _BASE64, "serial": "[0-9a-f]{1,40}", "tacit": _VERSION},
    "enrolled": {"addresses": list, "certificate": _BASE64, "federation": _NAME, "name": _NAME},
    "refused": {"word": "|".join(Word)},
}
_PROOFS: Final[Mapping[str, Mapping[str, str]]] = {
    "hello": {},
    "join": {"application": _ED25519, "proof": _HEX32, "supernode": _ECDSA},
    "renew": {"application": _ED25519, "certificate": _ECDSA},
    "enrolled": {"mac": f"(?:{_HEX32})?"},
    "refused": {},
}


@dataclasses.dataclass(frozen=True)
class Message:
    """One message: its first line, which proofs cover, and its second, which holds them.

    Attributes:
        kind: "hello", "join", "renew", "enrolled" or "refused".
        fields: What the first line says beside version and kind.
        proofs: What the second line says.
        body: The first line as it stands on the wire.
    """

    kind: str
    fields: Mapping[str, Any]
    proofs: Mapping[str, str]
    body: bytes

    def to_bytes(self) -> bytes:
        """Returns the message without its length."""
        return self.body + b"\n" + canonical(dict(self.proofs))


def body_of(kind: str, **fields: Any) -> bytes:
    """Returns a message's first line."""
    return canonical({"v": PROTOCOL, "kind": kind, **fields})


def message(kind: str, proofs: Mapping[str, str] | None = None, **fields: Any) -> bytes:
    """Returns a whole message without its length."""
    return body_of(kind, **fields) + b"\n" + canonical(dict(proofs or {}))


def read_message(data: bytes, *kinds: str) -> Message:
    """Reads a message that came over the network.

    Args:
        data: Without its length; not trusted.
        kinds: Which kinds may come now.

    Raises:
        IdentityError: It is not exactly one message of one of these kinds, in its one spelling.
    """
    if len(data) > MOST_MESSAGE:
        raise IdentityError(f"expected a message of at most {MOST_MESSAGE} bytes, got {len(data)}")
    body, newline, rest = data.partition(b"\n")
    try:
        fields, proofs = _object(body), _object(rest)
        kind, version = fields.pop("kind"), fields.pop("v")
        # 1.0 and true are equal to 1, and another spelling of it.
        if type(version) is not int or version != PROTOCOL or kind not in kinds or not newline:
            raise ValueError("another version or kind")
        _require_fields(fields, _FIELDS[kind])
        _require_fields(proofs, _PROOFS[kind])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise IdentityError(f"expected a message {' or '.join(kinds)}, got other bytes") from None
    return Message(kind, fields, proofs, body)


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("ascii"))
    except RecursionError:
        raise ValueError("nested too deep") from None
    # The one spelling: with a repeated key or another order, two readers might read two things.
    if type(value) is not dict or canonical(value) != line:
        raise ValueError("not canonical")
    return value


def _require_fields(fields: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if fields.keys() != wanted.keys():
        raise ValueError("other fields")
    for name, rule in wanted.items():
        value = fields[name]
        if rule is int:
            sound = type(value) is int and 0 <= value < 2**53
        elif rule is list:
            sound = type(value) is list and 1 <= len(value) <= _MOST_ADDRESSES
            sound = sound and all(type(item) is str and str(_address(item)) == item for item in value)
        else:
            sound = type(value) is str and re.fullmatch(rule, value) is not None
        if not sound:
            raise ValueError(f"another {name}")


def _address(text: str) -> Address:
    try:
        return Address.parse(text)
    except IdentityError:
        raise ValueError("another address") from None


def to_base64(data: bytes) -> str:
    """Returns bytes as base64 text."""
    return base64.b64encode(data).decode()


def from_base64(text: str) -> bytes:
    """Returns the bytes of base64 text.

    Raises:
        IdentityError: It is not their one spelling.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if to_base64(data) != text:
        raise IdentityError("expected base64, got another text")
    return data


def older(version: str, least: str) -> bool:
    """Says whether a version of Tacit is older than another; both are numbers with dots."""

    def numbers(text: str) -> list[int]:
        # Zeros at the end say nothing: 1.2 is 1.2.0.
        parts = [int(part) for part in text.split(".")]
        while parts and parts[-1] == 0:
            parts.pop()
        return parts

    return numbers(version) < numbers(least)
