"""Messages that only the other end can read: what server and client applications say through a relay they do not trust.

An epoch is one Flower run of one job (guarantee G19). In it, server and client make one session, in three messages:

    hello     server -> client    job, run, both identities, app hash, digest of the terms, a nonce; signed
    offer     client -> server    fresh ML-KEM-768 and X25519 keys, for this hello; signed
    accept    server -> client    a fresh secret, HPKE-encrypted to those keys, for this hello and offer; signed

Both derive their keys from the secret and from a hash of all three messages, so ends that differ in one byte of what
they believe share no key. Then come, in any number:

    message   either direction    a kind, a round and content, encrypted and padded, counted in each direction
    wrap      server -> client    the key of a broadcast, its digest and the server's signature; counted on its own
    broadcast the same bytes for every client, encrypted once under a key of their own (guarantee G20)

Layouts and rules are in docs/protocol-seal.md. In short: HPKE (RFC 9180) with the hybrid KEM MLKEM768-X25519, Ed25519
(RFC 8032), HKDF-SHA256 (RFC 5869), AES-256-GCM (NIST SP 800-38D). Confidentiality stands against a later quantum
computer, identities do not. Every message has a key of its own, derived under 32 random bytes, so that no nonce
repeats even where a machine's memory is restored from a snapshot.

A receiver takes any number that is larger than all it took before. It does not ask for the very next one: a relay that
loses a message must not end the session, and what was lost is asked for again. What the numbers give is that no message
is taken twice, nor after a newer one. That a request has one effect however often it is sent is not theirs to give:
ledger and kept releases do that, for each (job, round) and request (guarantee G9), and outlive every session.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import os
import re
import struct
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn, TypeAlias, final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy.errors import LedgerError, SealError
from privacy.identity import Identity, verify

Buffer: TypeAlias = bytes | bytearray | memoryview

# One version and one suite: with nothing to choose there is nothing to downgrade.
_MAGIC: Final = b"tacit/seal/1\n"
_SUITE: Final = 1
_HPKE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)

# A model of a billion float32 parameters.
MOST_BYTES: Final = 4 * 1024**3

_HEAD: Final = len(_MAGIC) + 3
_HASH: Final = 32
_NONCES: Final = 32
_SIGNATURE: Final = 64
_TAG: Final = 16
# A key encrypts one message, so a constant nonce is a unique one.
_NONCE: Final = bytes(12)
_MLKEM: Final = 1184
_SEALED_SECRET: Final = KEM.MLKEM768_X25519.enc_length() + 32 + _TAG

HELLO_BYTES: Final = _HEAD + 16 + 8 + 4 * 32 + _NONCES + _SIGNATURE
OFFER_BYTES: Final = _HEAD + _HASH + _NONCES + _MLKEM + 32 + _SIGNATURE
ACCEPT_BYTES: Final = _HEAD + _HASH + _SEALED_SECRET + _SIGNATURE

_SESSION: Final = 16
_SALT: Final = 32
_HEADER: Final = _HEAD + _SESSION + 8 + _SALT
_PREAMBLE: Final = 16 + 8 + 8
# Content comes in steps of this length, so that a digit more in a receipt does not show.
_BLOCK: Final = 1024
_ZEROS: Final = bytes(1024 * 1024)
_WRAP: Final = 8 + _HASH + 32 + _SIGNATURE
_BROADCAST_HEADER: Final = _HEAD + _HASH

_JOB: Final = re.compile(r"[0-9a-f]{32}")
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_KIND: Final = re.compile(r"[a-z][a-z-]{0,15}")
_BROADCAST: Final = "broadcast"


class Step(enum.IntEnum):
    """What a message is; the byte after its magic."""

    HELLO = 1
    OFFER = 2
    ACCEPT = 3
    MESSAGE = 4
    WRAP = 5
    BROADCAST = 6


class _Way(enum.IntEnum):
    """Where a message goes."""

    TO_SERVER = 1
    TO_CLIENT = 2


# One sentence for each step, whatever was wrong: a refusal tells its reader nothing about keys or content.
_REFUSED: Final = {
    Step.HELLO: "expected a hello of the pinned server to this client, run and app, got other bytes; wait for another",
    Step.OFFER: "expected an offer of a known client for its last hello, got other bytes; send it a hello again",
    Step.ACCEPT: "expected the pinned server's answer to the last offer, got other bytes; wait for its next hello",
    Step.MESSAGE: "expected a message of this session, newer than the last one, got other bytes; ask for it again",
    Step.WRAP: "expected the key of a broadcast in this session, got other bytes; ask for it again",
    Step.BROADCAST: "expected the broadcast that the server signed for this round, got other bytes; ask for it again",
}


def _refusal(step: Step) -> SealError:
    return SealError(_REFUSED[step])


def step_of(data: Buffer) -> Step | None:
    """Says what bytes claim to be, or None if they are no such message. It is a claim: nothing was authenticated."""
    if bytes(data[: len(_MAGIC)]) != _MAGIC or len(data) < _HEAD:
        return None
    try:
        return Step(data[len(_MAGIC)])
    except ValueError:
        return None


def sealed_bytes(length: int, pad_to: int = 0) -> int:
    """Returns the length of a sealed message with ``length`` bytes of content, padded to ``pad_to``."""
    return _HEADER + _PREAMBLE + _padded(length, pad_to) + _TAG


def _padded(length: int, pad_to: int) -> int:
    return -(-max(length, pad_to) // _BLOCK) * _BLOCK


def _head(step: Step, way: _Way) -> bytes:
    return _MAGIC + bytes((step, way, _SUITE))


def _flat(data: Buffer) -> memoryview:
    """Returns a view of single bytes, whatever the elements were."""
    view = memoryview(data)
    # An empty view of several dimensions cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")


def _fresh(length: int) -> memoryview:
    """Returns memory that nothing was written to yet; NumPy asks for large pages, which is twice as fast to fill."""
    return np.empty(length, np.uint8).data


def _check(public_key: str, label: bytes, message: bytes, signature: bytes, step: Step) -> None:
    try:
        verify(public_key, _MAGIC + label + b"\n" + message, signature.hex())
    except LedgerError:
        raise _refusal(step) from None


def _sign(identity: Identity, label: bytes, message: bytes) -> bytes:
    """Signs under a label that no other thing which this identity signs begins with."""
    return bytes.fromhex(identity.sign(_MAGIC + label + b"\n" + message))


def _derive(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(secret)


def _encrypt(key: bytes, header: bytes, parts: Sequence[Buffer], length: int) -> memoryview:
    """Returns ``header || ciphertext || tag``, the ciphertext of ``length`` bytes; zeros follow the parts."""
    sealed = _fresh(len(header) + length + _TAG)
    sealed[: len(header)] = header
    encryptor = Cipher(algorithms.AES256(key), modes.GCM(_NONCE)).encryptor()
    encryptor.authenticate_additional_data(header)
    at = len(header)
    for part in parts:
        at += encryptor.update_into(_flat(part), sealed[at:])
    end = len(header) + length
    while at < end:
        at += encryptor.update_into(memoryview(_ZEROS)[: end - at], sealed[at:])
    encryptor.finalize()
    sealed[end:] = encryptor.tag
    return sealed.toreadonly()


def _decrypt(key: bytes, data: memoryview, header: int) -> memoryview:
    """Returns what was encrypted after a header.

    Raises:
        InvalidTag: It was not encrypted like this under this key; nothing of it is returned.
    """
    content = _fresh(len(data) - header - _TAG)
    decryptor = Cipher(algorithms.AES256(key), modes.GCM(_NONCE)).decryptor()
    decryptor.authenticate_additional_data(bytes(data[:header]))
    decryptor.update_into(data[header:-_TAG], content)
    decryptor.finalize_with_tag(bytes(data[-_TAG:]))
    return content.toreadonly()


class _Live:
    """Something that holds keys in memory: not copied, not pickled, not shown, and of no use after a fork."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()

    def _require_here(self) -> None:
        # A forked process would count on from the same number, and both would be believed.
        if os.getpid() != self._process:
            raise SealError("expected the process that made this session, got a fork of it; make a new handshake there")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<keys>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a session is neither copied nor pickled; a lost one is replaced by a new handshake")


# -- what both ends must agree on ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binding:
    """What an epoch belongs to; public, signed by both ends, and part of every key.

    Attributes:
        job: Job identity, 32 hex digits, stable over resumption.
        run: Flower's run id, from 0 to 2**64 - 1.
        server: Key of the server application's identity, 64 hex digits.
        client: Key of the client application's identity, 64 hex digits.
        bundle: SHA-256 of the run's app bundle, 64 hex digits.
        terms: Digest of what the job asks, its plan included, 64 hex digits.
    """

    job: str
    run: int
    server: str
    client: str
    bundle: str
    terms: str

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            SealError: One is not of its form, or the two identities are one.
        """
        if not _JOB.fullmatch(self.job):
            raise SealError("expected a job identity of 32 hex digits, got something else; give the job's own")
        if type(self.run) is not int or not 0 <= self.run < 2**64:
            raise SealError("expected a run id from 0 to 2**64 - 1, got something else; give Flower's own")
        for name in ("server", "client", "bundle", "terms"):
            if not _HEX.fullmatch(getattr(self, name)):
                raise SealError(f"expected 64 hex digits as {name}, got something else; give the key or digest itself")
        if self.server == self.client:
            raise SealError("expected two identities, got one twice; give server and client keys of their own")

    def to_bytes(self) -> bytes:
        """Returns the one encoding of all fields: 16 + 8 + 4 * 32 bytes."""
        texts = bytes.fromhex(self.server + self.client + self.bundle + self.terms)
        return bytes.fromhex(self.job) + self.run.to_bytes(8, "big") + texts

    @classmethod
    def from_bytes(cls, data: bytes) -> Binding:
        """Reads what `to_bytes` wrote.

        Raises:
            SealError: The two identities are one.
        """
        texts = [data[at : at + 32].hex() for at in range(24, 152, 32)]
        server, client, bundle, terms = texts
        run = int.from_bytes(data[16:24], "big")
        return cls(job=data[:16].hex(), run=run, server=server, client=client, bundle=bundle, terms=terms)


class _Keys(NamedTuple):
    """Everything derived from one handshake."""

    session: bytes
    to_server: bytes
    to_client: bytes
    wrap: bytes

    @classmethod
    def of(cls, secret: bytes, hello: bytes, offer: bytes, accept: bytes) -> _Keys:
        """Derives the keys; another byte anywhere in the handshake gives other ones."""
        whole = hashlib.sha256(_MAGIC + b"transcript\n" + hello + offer + accept).digest()
        keys = _derive(secret, whole, _MAGIC + b"keys\n", 3 * 32 + _SESSION)
        return cls(keys[96:], keys[:32], keys[32:64], keys[64:96])


def _answered(hello: bytes, offer: bytes) -> bytes:
    """Returns the hash of the first two messages, which the third one names and its secret is encrypted for."""
    return hashlib.sha256(_MAGIC + b"answered\n" + hello + offer).digest()


# -- sessions --------------------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """One message as its sender sealed it.

    Attributes:
        kind: What it is, as the two ends call it.
        round: Which round it belongs to.
        body: Its content, without the padding; read-only.
    """

    kind: str
    round: int
    body: memoryview


@final
class _Lane:
    """Messages of one step in one direction: one key, one count of what was sent, one of what was taken."""

    def __init__(self, step: Step, way: _Way, session: bytes, key: bytes) -> None:
        self.step = step
        self._start = _head(step, way) + session
        self._key = key
        self._sent = 0
        self._taken = 0
        self._lock = threading.Lock()

    def _key_of(self, header: bytes) -> bytes:
        return _derive(self._key, header[-_SALT:], header[:-_SALT], 32)

    def seal(self, kind: str, round: int, parts: Sequence[Buffer], pad_to: int) -> memoryview:
        length = sum(memoryview(part).nbytes for part in parts)
        if not _KIND.fullmatch(kind) or type(round) is not int or not 0 <= round < 2**63:
            raise SealError("expected a kind of 1 to 16 small letters and a round from 0, got something else")
        if length > MOST_BYTES or pad_to > MOST_BYTES:
            raise SealError(f"expected at most {MOST_BYTES} bytes to seal, got more; send less in one message")
        if pad_to and length > pad_to:
            raise SealError("expected content no longer than what it is padded to, got more; its length would show")
        with self._lock:
            # Counted before it is made: a number is not used again, whatever happens next.
            self._sent += 1
            number = self._sent
        header = self._start + number.to_bytes(8, "big") + os.urandom(_SALT)
        preamble = struct.pack(">16sQQ", kind.encode(), round, length)
        return _encrypt(self._key_of(header), header, (preamble, *parts), _PREAMBLE + _padded(length, pad_to))

    def open(self, data: Buffer, max_bytes: int) -> Opened:
        view, fault = memoryview(data), _refusal(self.step)
        if not _HEADER + _PREAMBLE + _TAG <= view.nbytes <= sealed_bytes(min(max_bytes, MOST_BYTES)):
            raise fault
        view = view.cast("B")
        header = bytes(view[:_HEADER])
        number = int.from_bytes(header[-_SALT - 8 : -_SALT], "big")
        # What was taken before is not even decrypted.
        if not header.startswith(self._start) or number <= self._taken:
            raise fault
        try:
            content = _decrypt(self._key_of(header), view, _HEADER)
        except InvalidTag:
            raise fault from None
        with self._lock:
            # Again, now that it is known to be the sender's own: two threads may have opened two copies.
            if number <= self._taken:
                raise fault
            self._taken = number
        # From here on the bytes are the other end's own; that end may still be faulty.
        kind, round, length = struct.unpack(">16sQQ", content[:_PREAMBLE])
        text = kind.rstrip(b"\0").decode("latin-1")
        if not _KIND.fullmatch(text) or length > min(max_bytes, len(content) - _PREAMBLE):
            raise fault
        return Opened(text, round, content[_PREAMBLE : _PREAMBLE + length])


class Session(_Live):
    """One end of a session: keys and counts, in memory only.

    Guarantees:
        Once: no message is opened twice, nor after a newer one of its direction (guarantee G19).
        Bound: what opens was sealed by the other end, in this session and so for this job, run, app and these terms,
            in this direction, with this kind and round, and is whole.
        Unread: nothing of a message is looked at before all of it is authenticated.
    """

    def __init__(self, binding: Binding, keys: _Keys, out: _Way) -> None:
        super().__init__()
        self.binding = binding
        ways = {_Way.TO_SERVER: keys.to_server, _Way.TO_CLIENT: keys.to_client}
        self._lanes: dict[_Way, _Lane] = {way: _Lane(Step.MESSAGE, way, keys.session, key) for way, key in ways.items()}
        self._out, self._in = out, next(way for way in _Way if way is not out)
        self._wraps: _Lane | None = _Lane(Step.WRAP, _Way.TO_CLIENT, keys.session, keys.wrap)

    @property
    def closed(self) -> bool:
        """Whether the keys are gone."""
        return not self._lanes

    def close(self) -> None:
        """Forgets the keys; nothing is sealed or opened any more."""
        self._lanes, self._wraps = {}, None

    def _lane(self, way: _Way) -> _Lane:
        self._require_here()
        lane = self._lanes.get(way)
        if lane is None:
            raise SealError("expected a session that is open, got one that was closed; make a new handshake")
        return lane

    def _wrap_lane(self) -> _Lane:
        self._require_here()
        if self._wraps is None:
            raise SealError("expected a session that is open, got one that was closed; make a new handshake")
        return self._wraps

    def seal(self, kind: str, round: int, *parts: Buffer, pad_to: int = 0) -> memoryview:
        """Seals one message to the other end.

        Args:
            kind: What it is, 1 to 16 small letters and hyphens; hidden.
            round: Which round it belongs to, from 0; hidden.
            parts: The content, in order; not joined, so a large array is not copied.
            pad_to: Length to which the content is padded, in bytes. A reply gives the same one for a release and for a
                refusal, so that their lengths are equal (guarantee G12); see `privacy.wire.packed_bytes`. 0 pads to
                the next KiB: for content whose length is public.

        Returns:
            `sealed_bytes` many bytes, read-only.

        Raises:
            SealError: An argument is out of range, the content is longer than ``pad_to`` or `MOST_BYTES`, the session
                is closed or was forked.
        """
        return self._lane(self._out).seal(kind, round, parts, pad_to)

    def read(self, data: Buffer, *, max_bytes: int = MOST_BYTES) -> Opened:
        """Opens one message of the other end, for whoever cannot know its kind and round before.

        Args:
            data: What came; not trusted.
            max_bytes: Longest content; a longer one is refused before memory is taken for it.

        Raises:
            SealError: It is not a newer message of the other end in this session, or too long; always the same
                sentence. The session goes on.
        """
        return self._lane(self._in).open(data, max_bytes)

    def open(self, kind: str, round: int, data: Buffer, *, max_bytes: int = MOST_BYTES) -> memoryview:
        """Opens one message of the other end that must be of this kind and round.

        A genuine message of another kind or round is refused and counts as taken: it will not be opened later.

        Args:
            kind: What it must be.
            round: Which round it must belong to.
            data: What came; not trusted.
            max_bytes: Longest content; a longer one is refused before memory is taken for it.

        Returns:
            Its content, read-only.

        Raises:
            SealError: It is anything else; always the same sentence. The session goes on.
        """
        opened = self.read(data, max_bytes=max_bytes)
        if (opened.kind, opened.round) != (kind, round):
            raise _refusal(Step.MESSAGE)
        return opened.body


@final
class ServerSession(Session):
    """The server's end of a session with one client."""

    def __init__(self, binding: Binding, keys: _Keys) -> None:
        super().__init__(binding, keys, _Way.TO_CLIENT)

    def wrap(self, broadcast: Broadcast) -> memoryview:
        """Seals the key of a broadcast to this client, with its digest and the server's signature.

        Raises:
            SealError: The broadcast is of another epoch, or the session is closed or was forked.
        """
        statement = broadcast.statement
        bound = self.binding
        if (statement.job, statement.run, statement.bundle) != (bound.job, bound.run, bound.bundle):
            raise SealError("expected a broadcast of this session's epoch, got one of another; broadcast it anew")
        parts = (statement.length.to_bytes(8, "big"), statement.digest, broadcast.key, broadcast.signature)
        return self._wrap_lane().seal(_BROADCAST, statement.round, parts, 0)


@final
class ClientSession(Session):
    """A client's end of a session with the server."""

    def __init__(self, binding: Binding, keys: _Keys) -> None:
        super().__init__(binding, keys, _Way.TO_SERVER)

    def unwrap(self, round: int, wrapped: Buffer, body: Buffer, *, max_bytes: int = MOST_BYTES) -> memoryview:
        """Opens a broadcast.

        Args:
            round: Which round it must belong to.
            wrapped: What `ServerSession.wrap` made for this client; not trusted.
            body: What `Broadcast.body` is; not trusted, and the same for every client.
            max_bytes: Longest content; a longer one is refused before memory is taken for it.

        Returns:
            What was broadcast, read-only.

        Raises:
            SealError: The wrap is not a newer one of this session, or the body is not the one that the server signed
                for this job, run, app and round, or too long. The session goes on.
        """
        kind, number, ticket = self._wrap_lane().open(wrapped, _BLOCK)
        fault = _refusal(Step.BROADCAST)
        if (kind, number, len(ticket)) != (_BROADCAST, round, _WRAP):
            raise fault
        length = int.from_bytes(ticket[:8], "big")
        digest, key, signature = (bytes(ticket[at:to]) for at, to in ((8, 40), (40, 72), (72, _WRAP)))
        view = memoryview(body)
        if length > min(max_bytes, MOST_BYTES) or view.nbytes != _BROADCAST_HEADER + length + _TAG:
            raise fault
        view = view.cast("B")
        bound = self.binding
        statement = Statement(bound.job, bound.run, bound.bundle, round, length, digest)
        _check(bound.server, b"broadcast", statement.to_bytes(), signature, Step.BROADCAST)
        header = bytes(view[:_BROADCAST_HEADER])
        # A key that opens two bodies is easy to find for this cipher; the commitment makes one body one content.
        encryption, commitment = _broadcast_keys(key)
        if _digest(view) != digest or header != _head(Step.BROADCAST, _Way.TO_CLIENT) + commitment:
            raise fault
        try:
            return _decrypt(encryption, view, _BROADCAST_HEADER)
        except InvalidTag:
            raise fault from None


# -- the broadcast ---------------------------------------------------------------------------------------------------


class Statement(NamedTuple):
    """What the server signs of a broadcast (guarantee G20); public.

    Attributes:
        job: Job identity, 32 hex digits.
        run: Flower's run id.
        bundle: SHA-256 of the app bundle, 64 hex digits.
        round: The round.
        length: Bytes of the content.
        digest: SHA-256 of the body, which is encrypted; 32 bytes.
    """

    job: str
    run: int
    bundle: str
    round: int
    length: int
    digest: bytes

    def to_bytes(self) -> bytes:
        """Returns the one encoding of all fields: 16 + 8 + 32 + 8 + 8 + 32 bytes."""
        numbers = struct.pack(">QQ", self.round, self.length)
        return b"".join(
            (bytes.fromhex(self.job), struct.pack(">Q", self.run), bytes.fromhex(self.bundle), numbers, self.digest)
        )


def _digest(body: memoryview) -> bytes:
    """Returns what the server signs of a broadcast's body: SHA-256 of the whole, header included."""
    return hashlib.sha256(body).digest()


def _broadcast_keys(key: bytes) -> tuple[bytes, bytes]:
    """Returns the encryption key of a broadcast, and the commitment to it that its body shows."""
    both = _derive(key, bytes(_HASH), _MAGIC + b"broadcast key\n", 64)
    return both[:32], both[32:]


@final
class Broadcast(_Live):
    """One encrypted body for every client, and what a wrap needs.

    Attributes:
        body: What every client gets, read-only; it tells the relay its length and nothing else.
        statement: What the server signed.
        signature: The server's signature, 64 bytes.
        key: Opens the body; it leaves only inside a wrap.
    """

    def __init__(self, body: memoryview, statement: Statement, signature: bytes, key: bytes) -> None:
        super().__init__()
        self.body, self.statement, self.signature, self.key = body, statement, signature, key


# -- the two ends of an epoch ----------------------------------------------------------------------------------------


@final
class ServerEpoch(_Live):
    """The server application's end of one epoch, for all its clients.

    Guarantees:
        Pinned: only a key that was given to `hello`, and not revoked since, gets a session.
        Fresh: a hello is answered once. A second offer for it, replayed or not, is refused and changes nothing.
        One: a client's new session closes its older one.
    """

    def __init__(self, identity: Identity, *, job: str, run: int, bundle: str, terms: str) -> None:
        """Opens an epoch.

        Args:
            identity: The server application's.
            job: Job identity, 32 hex digits.
            run: Flower's run id.
            bundle: SHA-256 of the run's app bundle, 64 hex digits.
            terms: Digest of what the job asks, its plan included, 64 hex digits.

        Raises:
            SealError: One of them is not of its form.
        """
        super().__init__()
        self._identity = identity
        # With no client yet: checks the fields now and not with the first one.
        self._bound = Binding(job=job, run=run, server=identity.public_key, client="0" * 64, bundle=bundle, terms=terms)
        self._hellos: dict[str, bytes] = {}
        self._sessions: dict[str, ServerSession] = {}
        self._revoked: set[str] = set()
        self._closed = False

    def _require_open(self) -> None:
        self._require_here()
        if self._closed:
            raise SealError("expected an epoch that is open, got one that was closed; open another")

    def hello(self, client: str) -> bytes:
        """Returns the hello to a client; the same one until it was answered, so that it can be sent again.

        Args:
            client: Pinned key of the client application, 64 hex digits.

        Raises:
            SealError: It is no key, or revoked.
        """
        with self._lock:
            self._require_open()
            if client in self._revoked:
                raise SealError("expected a client that may take part, got a revoked key; let it enrol anew")
            if client not in self._hellos:
                unsigned = (
                    _head(Step.HELLO, _Way.TO_CLIENT) + dataclasses.replace(self._bound, client=client).to_bytes()
                )
                unsigned += os.urandom(_NONCES)
                self._hellos[client] = unsigned + _sign(self._identity, b"hello", unsigned)
            return self._hellos[client]

    def accept(self, client: str, offer: Buffer) -> tuple[ServerSession, bytes]:
        """Answers a client's offer.

        Args:
            client: Pinned key of the client that it must be from.
            offer: What came; not trusted.

        Returns:
            The session, and the answer; it may be sent until the client's first message was opened.

        Raises:
            SealError: It is not this client's offer for its last hello. Hello and older session stay as they were.
        """
        self._require_open()
        fault = _refusal(Step.OFFER)
        if memoryview(offer).nbytes != OFFER_BYTES:
            raise fault
        data = bytes(offer)
        with self._lock:
            hello = self._hellos.get(client)
            if hello is None:
                raise fault
            if not data.startswith(_head(Step.OFFER, _Way.TO_SERVER) + hashlib.sha256(hello).digest()):
                raise fault
            _check(client, b"offer", hello + data[:-_SIGNATURE], data[-_SIGNATURE:], Step.OFFER)
            keys = data[-_SIGNATURE - _MLKEM - 32 : -_SIGNATURE]
            answered, secret = _answered(hello, data), os.urandom(32)
            try:
                mlkem = MLKEM768PublicKey.from_public_bytes(keys[:_MLKEM])
                both = MLKEM768X25519PublicKey(mlkem, X25519PublicKey.from_public_bytes(keys[_MLKEM:]))
                sealed = _HPKE.encrypt(secret, both, info=_MAGIC + b"secret\n" + answered)
            except ValueError:
                raise fault from None
            unsigned = _head(Step.ACCEPT, _Way.TO_CLIENT) + answered + sealed
            accept = unsigned + _sign(self._identity, b"accept", hello + data + unsigned)
            session = ServerSession(
                dataclasses.replace(self._bound, client=client), _Keys.of(secret, hello, data, accept)
            )
            del self._hellos[client]
            older = self._sessions.pop(client, None)
            if older is not None:
                older.close()
            self._sessions[client] = session
        return session, accept

    def broadcast(self, round: int, *parts: Buffer) -> Broadcast:
        """Encrypts once what every client gets in a round, and signs what it is.

        Args:
            round: The round, from 0.
            parts: The content, in order; not joined.

        Raises:
            SealError: The round is out of range, or the content is longer than `MOST_BYTES`.
        """
        self._require_open()
        length = sum(memoryview(part).nbytes for part in parts)
        if type(round) is not int or not 0 <= round < 2**63 or length > MOST_BYTES:
            raise SealError(f"expected a round from 0 and at most {MOST_BYTES} bytes, got something else")
        key = os.urandom(32)
        encryption, commitment = _broadcast_keys(key)
        body = _encrypt(encryption, _head(Step.BROADCAST, _Way.TO_CLIENT) + commitment, parts, length)
        bound = self._bound
        statement = Statement(bound.job, bound.run, bound.bundle, round, length, _digest(body))
        return Broadcast(body, statement, _sign(self._identity, b"broadcast", statement.to_bytes()), key)

    def revoke(self, client: str) -> None:
        """Ends a client's part in the epoch: its session is closed, and it gets no other one."""
        with self._lock:
            self._revoked.add(client)
            self._hellos.pop(client, None)
            session = self._sessions.pop(client, None)
            if session is not None:
                session.close()

    def close(self) -> None:
        """Ends the epoch: all sessions are closed."""
        with self._lock:
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()
            self._hellos.clear()
            self._closed = True


def _fresh_keys() -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    return MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()


@final
class ClientEpoch(_Live):
    """A client application's end of one epoch.

    Guarantees:
        Pinned: only the server that was named at the start gets an answer.
        Forward secret: the keys of an offer are used once and forgotten; who learns the identities' keys later reads
            nothing of what was said before.
        Steady: whatever is refused, replayed or never answered, a session lasts until a newer one was made.
    """

    def __init__(
        self,
        identity: Identity,
        server: str,
        *,
        run: int,
        bundle: str,
        job: str | None = None,
        terms: str | None = None,
    ) -> None:
        """Prepares to answer.

        Args:
            identity: The client application's.
            server: Pinned key of the server application, 64 hex digits.
            run: Flower's run id, as Flower says it.
            bundle: SHA-256 of the run's app bundle as the client computed it, 64 hex digits.
            job: The job that it must be, or None where the hello is the first that a client hears of it; then `job` is
                what the server signed.
            terms: Digest of the terms that they must be, or None likewise. The client compares it with the digest of
                the terms themselves before it does what they ask.

        Raises:
            SealError: One of them is not of its form.
        """
        super().__init__()
        self._identity = identity
        self._expected = {"server": server, "run": run, "bundle": bundle, "client": identity.public_key}
        self._expected |= {name: value for name, value in (("job", job), ("terms", terms)) if value is not None}
        Binding(
            job="0" * 32 if job is None else job,
            run=run,
            server=server,
            client=identity.public_key,
            bundle=bundle,
            terms="0" * 64 if terms is None else terms,
        )
        self._hello = self._offer = self._accept = b""
        self._keys: tuple[MLKEM768PrivateKey, X25519PrivateKey] | None = None
        self._session: ClientSession | None = None

    @property
    def session(self) -> ClientSession | None:
        """The session, if there is one."""
        return self._session

    def offer(self, hello: Buffer) -> bytes:
        """Answers the server's hello; the same hello gets the same answer.

        A replayed hello gets an answer too, which no server accepts: the nonce in it was used.

        Args:
            hello: What came; not trusted.

        Raises:
            SealError: It is not the pinned server's, or names another client, run, app, job or terms than expected.
        """
        self._require_here()
        fault = _refusal(Step.HELLO)
        if memoryview(hello).nbytes != HELLO_BYTES:
            raise fault
        data = bytes(hello)
        with self._lock:
            if data == self._hello:
                return self._offer
            _check(str(self._expected["server"]), b"hello", data[:-_SIGNATURE], data[-_SIGNATURE:], Step.HELLO)
            if not data.startswith(_head(Step.HELLO, _Way.TO_CLIENT)):
                raise fault
            bound = dataclasses.asdict(Binding.from_bytes(data[_HEAD:]))
            if any(bound[name] != value for name, value in self._expected.items()):
                raise fault
            self._keys = mlkem, x25519 = _fresh_keys()
            public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
            head = _head(Step.OFFER, _Way.TO_SERVER) + hashlib.sha256(data).digest()
            unsigned = head + os.urandom(_NONCES) + public
            self._hello, self._offer = data, unsigned + _sign(self._identity, b"offer", data + unsigned)
            return self._offer

    def accept(self, accept: Buffer) -> ClientSession:
        """Takes the server's answer to the last offer; the same answer again returns the same session, as it stands.

        Args:
            accept: What came; not trusted.

        Raises:
            SealError: It is not the pinned server's answer to the last offer. An older session goes on.
        """
        self._require_here()
        fault = _refusal(Step.ACCEPT)
        if memoryview(accept).nbytes != ACCEPT_BYTES:
            raise fault
        data = bytes(accept)
        with self._lock:
            if self._session is not None and data == self._accept:
                return self._session
            answered = _answered(self._hello, self._offer)
            if self._keys is None or not data.startswith(_head(Step.ACCEPT, _Way.TO_CLIENT) + answered):
                raise fault
            signed = self._hello + self._offer + data[:-_SIGNATURE]
            _check(str(self._expected["server"]), b"accept", signed, data[-_SIGNATURE:], Step.ACCEPT)
            try:
                both = MLKEM768X25519PrivateKey(*self._keys)
                secret = _HPKE.decrypt(data[_HEAD + _HASH : -_SIGNATURE], both, info=_MAGIC + b"secret\n" + answered)
            except (InvalidTag, ValueError):
                raise fault from None
            binding = Binding.from_bytes(self._hello[_HEAD:])
            session = ClientSession(binding, _Keys.of(secret, self._hello, self._offer, data))
            if self._session is not None:
                self._session.close()
            # Forgotten: from here on nobody can open what was encrypted to them.
            self._session, self._accept, self._keys = session, data, None
            return session

    def close(self) -> None:
        """Ends the epoch: its session is closed, and no answer makes another one until the next hello."""
        with self._lock:
            if self._session is not None:
                self._session.close()
            self._session, self._keys = None, None
            self._hello = self._offer = self._accept = b""
