"""What a client and an inference service say to each other: three questions, their answers, and fixed words.

    heads   what is published here?              signed by the server application, bound to the asker's nonce
    open    may I ask so many questions?         signed by the client application; brings the session's public key
    ask     one encrypted query                  signed by the session's key; answered with a signature over both

A query is one block of bytes whose length is known before it comes: a head, the ciphertexts, a signature. Everything
about it is looked at in the cheapest order - length, session, signature, number, limits - before anybody parses a
ciphertext. The session's number only grows, so that nothing counts twice. There is no encryption here: the ciphertexts
bring their own, and TLS is around all of it.

A signature on an answer says that this server application returned these bytes to that query. It does *not* say that
they are the head's value at the query's features: whoever evaluates may answer anything (guarantee G25).
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from typing import Any, Final, Self

from privacy.errors import DataError, IdentityError, LedgerError, RunError, SealError, TacitError
from privacy.hop import Crossing
from privacy.identity import Identity, verify
from privacy.identity.authority import valid_name
from privacy.plan import canonical

HEADS: Final = b"/v1/infer/heads"
OPEN: Final = b"/v1/infer/open"
ASK: Final = b"/v1/infer/ask"
CONTENT: Final = b"application/tacit"
QUESTIONS: Final = Crossing(frozenset((HEADS, OPEN, ASK)), CONTENT, frozenset())

_VERSION: Final = 1
NONCE_BYTES: Final = 32
SESSION_BYTES: Final = 16
_SIGNATURE_BYTES: Final = 64
_HEADS: Final = b"tacit/infer/heads/1\n"
_OPEN: Final = b"tacit/infer/open/1\n"
_OPENED: Final = b"tacit/infer/opened/1\n"
_QUERY: Final = b"tacit/infer/query/1\n"
_ANSWER: Final = b"tacit/infer/answer/1\n"
# Magic, session, version of the head, digest of the plan, number.
_ASKED: Final = struct.Struct(">8s16s32s32sQ")
_ASKED_MAGIC: Final = b"TACITQ1\n"
# Magic, session, number, SHA-256 of the query.
_ANSWERED: Final = struct.Struct(">8s16sQ32s")
_ANSWERED_MAGIC: Final = b"TACITA1\n"
QUERY_OVERHEAD: Final = _ASKED.size + _SIGNATURE_BYTES
ANSWER_OVERHEAD: Final = _ANSWERED.size + _SIGNATURE_BYTES
MOST_OPENING: Final = 4096
MOST_HEADS: Final = 4 << 20
# An offer has no more than this; `privacy.he` has the same bound on classes.
_MOST_CLASSES: Final = 1000
_MOST_AXES: Final = 8
_MOST_INPUTS: Final = 1 << 20
_MOST_TEXT: Final = 200
_MOST_WORDS: Final = 2000
# A session has no more queries, and ends no later: both are printed, and one is compared with a clock.
_MOST_QUERIES: Final = 1 << 30
_LAST_S: Final = 1 << 40
# A clock may differ from the server's by so much when a session is opened.
SKEW_S: Final = 120
_HEX16: Final = re.compile(r"[0-9a-f]{32}")
_HEX32: Final = re.compile(r"[0-9a-f]{64}")

# What a refusal means and what to do: every word that the service may say.
REMEDIES: Final[Mapping[str, str]] = {
    "not enrolled": "expected an enrolled certificate, got one that is unknown, revoked or expired; ask the operator",
    "too many connections": "expected few connections at a time, got too many; close some",
    "turned away": "expected a free place at the service, got none; try again later",
    "syntax": "expected a question of this protocol, got other bytes; use the same version of Tacit on both sides",
    "head": "expected a head that is published, got another or an older one; run keygen again",
    "plan": "expected the published plan, got another; run keygen again",
    "session": "expected a session of this client, got one that is unknown or was lost when the service restarted; "
    "run keygen again",
    "ended": "expected a session that is still good, got one that has expired; run keygen again",
    "used up": "expected a session with queries left, got one that is used up; run keygen again",
    "replayed": "expected a new number, got one that was used; a query is sent once only",
    "signature": "expected a query signed by its session's key, got another; run keygen again",
    "length": "expected a query of the plan's exact size, got another; use the same version of Tacit on both sides",
    "too fast": "expected fewer queries a second, got more than the service allows; slow down",
    "allowance": "expected queries within this client's allowance for the head, got more; ask the operator",
    "sessions": "expected few open sessions, got too many; let some expire",
    "clock": "expected clocks that agree within two minutes, got a larger difference; set this machine's clock",
    "ciphertext": "expected ciphertexts of the plan, got other bytes; use the same version of Tacit on both sides",
    "restarting": "expected the evaluator, got none while it restarts; ask again in a moment, with a new query",
    "log": "expected the service to write its log, got a full or missing disk there; tell the operator",
    "busy": "expected a free evaluator, got none in time; try again later",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
    """What a client must know of a published head; nothing of it is secret.

    Attributes:
        name: The head's name.
        task: Task whose model it is, as in a scenario: names the feature map's code.
        seed: Public seed of the model's frozen parts.
        inputs: Shape of a record.
        classes: Names of the classes, in the order of the logits.
        features: Digest of the frozen feature map (`models.head.digest_of`), 64 hex digits.
        feature_range: No feature may be larger in absolute value.
        prepare: Preprocessing from a file to a record: kind, and what the kind needs.
        description: What `privacy.he` needs to make keys and queries: no weights.
        plan: SHA-256 of the plan, 64 hex digits.
        query_bytes: Exact size of a query's ciphertexts.
        answer_bytes: Exact size of an answer's.
        model: SHA-256 of the head's weights and bias under a secret of the server, so that another model is another
            version and nobody can confirm a guess of the weights.
        privacy: What the run's report says: unit, epsilon, delta and words; or that there is no guarantee.
        job: Identity of the job that trained it.
        round: The round after which the model was taken.
        queries: Most queries of one session.
        session_s: Most seconds of one session.
        rate: Queries a second that the service allows one client.
    """

    name: str
    task: str
    seed: int
    inputs: tuple[int, ...]
    classes: tuple[str, ...]
    features: str
    feature_range: float
    prepare: Mapping[str, Any]
    description: bytes
    plan: str
    query_bytes: int
    answer_bytes: int
    model: str
    privacy: Mapping[str, Any]
    job: str
    round: int
    queries: int
    session_s: int
    rate: float

    def fields(self) -> dict[str, Any]:
        """Returns it as JSON."""
        told: dict[str, Any] = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return told | {
            "description": base64.b64encode(self.description).decode(),
            "inputs": list(self.inputs),
            "classes": list(self.classes),
            "prepare": dict(self.prepare),
            "privacy": dict(self.privacy),
        }

    @functools.cached_property
    def version(self) -> str:
        """SHA-256 of all of it, 64 hex digits: what a session and every query are bound to."""
        return hashlib.sha256(canonical(self.fields())).hexdigest()

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Reads it.

        Raises:
            ValueError, TypeError, KeyError: It holds something else, or more than a head can have. What is made of an
                offer later - arrays, lines on a terminal - is as large as it says, so it is bounded here.
        """
        kinds = {item.name: str(item.type) for item in dataclasses.fields(cls)}
        if set(fields) != set(kinds):
            raise ValueError("other fields")
        for name, kind in kinds.items():
            value = fields[name]
            wanted: Any = {"str": str, "int": int, "float": (int, float), "bytes": str}.get(kind)
            wanted = wanted or (list if kind.startswith("tuple") else dict)
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise TypeError(f"{name} of another type")
        inputs, classes = fields["inputs"], fields["classes"]
        if not (1 <= len(inputs) <= _MOST_AXES and 1 <= len(classes) <= _MOST_CLASSES):
            raise ValueError("sizes out of range")
        if not all(type(size) is int and 1 <= size <= _MOST_INPUTS for size in inputs):
            raise ValueError("sizes out of range")
        sizes = [fields[name] for name in ("query_bytes", "answer_bytes", "queries", "session_s")]
        if min(sizes) < 1 or max(sizes) > 1 << 30 or math.prod(inputs) > _MOST_INPUTS:
            raise ValueError("sizes out of range")
        if not (0 <= fields["seed"] < 1 << 63 and 0 <= fields["round"] < 1 << 31):
            raise ValueError("numbers out of range")
        valid_name(fields["name"])
        # A server's texts reach a terminal: no escape sequence does.
        texts = (*classes, fields["task"], fields["job"])
        if not all(isinstance(text, str) and len(text) <= _MOST_TEXT and text.isprintable() for text in texts):
            raise ValueError("texts that cannot be shown")
        for text in (value for value in fields["privacy"].values() if isinstance(value, str)):
            if len(text) > _MOST_WORDS or not text.isprintable():
                raise ValueError("words that cannot be shown")
        if not isinstance(fields["privacy"].get("words", ""), str):
            raise TypeError("words of another type")
        offer = cls(
            **dict(fields)
            | {
                "description": base64.b64decode(fields["description"], validate=True),
                "inputs": tuple(inputs),
                "classes": tuple(classes),
                "feature_range": float(fields["feature_range"]),
                "rate": float(fields["rate"]),
            }
        )
        # Written so that NaN is out of range too.
        if not (0 < offer.feature_range < 1e9 and 0 < offer.rate < 1e9):
            raise ValueError("numbers out of range")
        if not all(_HEX32.fullmatch(text) for text in (offer.features, offer.plan, offer.model)):
            raise ValueError("digests of another form")
        return offer


# -- which heads are there --------------------------------------------------------------------------------------------


def tell_heads(offers: list[Offer], nonce: bytes, identity: Identity) -> bytes:
    """Returns the answer to `HEADS`, signed."""
    body = canonical({"v": _VERSION, "heads": [offer.fields() for offer in offers]})
    return body + b"\n" + identity.sign(_HEADS + nonce + body).encode()


def read_heads(data: bytes, nonce: bytes, server: str) -> list[Offer]:
    """Reads the answer to `HEADS`.

    Args:
        data: As it came.
        nonce: As it was sent.
        server: Public key of the server application.

    Raises:
        SealError: It is not signed by it for this nonce, or damaged.
    """
    body, _, signature = data.rpartition(b"\n")
    try:
        verify(server, _HEADS + nonce + body, signature.decode("ascii", "replace"))
        fields = json.loads(body)
        if fields["v"] != _VERSION:
            raise ValueError("another version")
        return [Offer.parse(one) for one in fields["heads"]]
    except (LedgerError, IdentityError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise SealError(
            "expected a list of heads signed by the federation's server for this question, got something else"
        ) from None


# -- a session --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opening:
    """A client's wish for a session.

    Attributes:
        head: Version of the head, 64 hex digits.
        plan: SHA-256 of its plan, 64 hex digits.
        session: Random name of the session, 32 hex digits.
        key: Public key that will sign its queries, 64 hex digits.
        queries: How many will be asked at most; all of them are charged to the client's allowance.
        time: Seconds since 1970 by the client's clock.
    """

    head: str
    plan: str
    session: str
    key: str
    queries: int
    time: int

    def to_bytes(self, identity: Identity) -> bytes:
        """Returns the question `OPEN`, signed by the client application."""
        body = canonical({"v": _VERSION} | dataclasses.asdict(self))
        return body + b"\n" + identity.sign(_OPEN + body).encode()

    @classmethod
    def read(cls, data: bytes, client: str) -> Self:
        """Reads it.

        Args:
            data: As it came, at most `MOST_OPENING` bytes.
            client: Public key of the client application that the connection belongs to.

        Raises:
            SealError: It is not signed by it, or no opening.
        """
        body, _, signature = data.rpartition(b"\n")
        try:
            verify(client, _OPEN + body, signature.decode("ascii", "replace"))
            fields = json.loads(body)
            if fields.pop("v") != _VERSION or canonical({"v": _VERSION} | fields) != body:
                raise ValueError("another form")
            opening = cls(**fields)
            texts = {opening.session: _HEX16, opening.head: _HEX32, opening.plan: _HEX32, opening.key: _HEX32}
            if not all(isinstance(text, str) and form.fullmatch(text) for text, form in texts.items()):
                raise ValueError("names of another form")
            if type(opening.queries) is not int or type(opening.time) is not int:
                raise TypeError("numbers of another form")
            if not (1 <= opening.queries <= _MOST_QUERIES and 0 <= opening.time <= _LAST_S):
                raise ValueError("numbers out of range")
        except (LedgerError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise SealError("expected an opening signed by the client, got something else") from None
        return opening


def tell_opened(opening: bytes, queries: int, until: int, identity: Identity) -> bytes:
    """Returns the answer to `OPEN`: how many queries, until when (seconds since 1970), signed over the question."""
    body = canonical({"v": _VERSION, "queries": queries, "until": until})
    return body + b"\n" + identity.sign(_OPENED + hashlib.sha256(opening).digest() + body).encode()


def read_opened(data: bytes, opening: bytes, server: str) -> tuple[int, int]:
    """Reads the answer to `OPEN`; returns the number of queries and the end, seconds since 1970.

    Raises:
        SealError: It is not signed by the server for this opening, or damaged.
    """
    body, _, signature = data.rpartition(b"\n")
    try:
        verify(server, _OPENED + hashlib.sha256(opening).digest() + body, signature.decode("ascii", "replace"))
        fields = json.loads(body)
        queries, until = fields["queries"], fields["until"]
        if fields["v"] != _VERSION or type(queries) is not int or type(until) is not int:
            raise ValueError("another form")
        if not (1 <= queries <= _MOST_QUERIES and 0 <= until <= _LAST_S):
            raise ValueError("numbers out of range")
    except (LedgerError, ValueError, TypeError, KeyError, RecursionError):
        raise SealError("expected a session signed by the federation's server, got something else") from None
    return queries, until


# -- a query ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """One encrypted query, unsigned.

    Attributes:
        session: Name of the session, 16 bytes.
        head: Version of the head, 32 bytes.
        plan: SHA-256 of its plan, 32 bytes.
        number: Grows from query to query of a session, from 1.
        ciphertexts: What `privacy.he` made of the features.
    """

    session: bytes
    head: bytes
    plan: bytes
    number: int
    ciphertexts: bytes

    def to_bytes(self, identity: Identity) -> bytes:
        """Returns the question `ASK`, signed by the session's identity."""
        body = _ASKED.pack(_ASKED_MAGIC, self.session, self.head, self.plan, self.number) + self.ciphertexts
        return body + bytes.fromhex(identity.sign(_QUERY + hashlib.sha256(body).digest()))

    @classmethod
    def read(cls, data: bytes) -> Self | None:
        """Reads one without believing it, or returns None for something else; see `require_signed`."""
        if len(data) < QUERY_OVERHEAD:
            return None
        magic, session, head, plan, number = _ASKED.unpack_from(data)
        if magic != _ASKED_MAGIC:
            return None
        ciphertexts = data[_ASKED.size : -_SIGNATURE_BYTES]
        return cls(session=session, head=head, plan=plan, number=number, ciphertexts=ciphertexts)


def is_signed(data: bytes, key: str) -> bool:
    """Says whether a query, as it came, is signed by a session's key (64 hex digits)."""
    body, signature = data[:-_SIGNATURE_BYTES], data[-_SIGNATURE_BYTES:]
    try:
        verify(key, _QUERY + hashlib.sha256(body).digest(), signature.hex())
    except LedgerError:
        return False
    return True


def tell_answer(query: bytes, session: bytes, number: int, ciphertexts: bytes, identity: Identity) -> bytes:
    """Returns the answer to `ASK`, signed over the query and the ciphertexts."""
    body = _ANSWERED.pack(_ANSWERED_MAGIC, session, number, hashlib.sha256(query).digest()) + ciphertexts
    return body + bytes.fromhex(identity.sign(_ANSWER + hashlib.sha256(body).digest()))


def read_answer(data: bytes, query: bytes, answer_bytes: int, server: str) -> bytes:
    """Reads the answer to `ASK`; returns its ciphertexts.

    Nothing here depends on a secret: whether an answer passes tells whoever sent it what it knew.

    Args:
        data: As it came.
        query: As it was sent.
        answer_bytes: Exact size of the plan's answer.
        server: Public key of the server application.

    Raises:
        SealError: It is not signed by it for this query, or of another size.
    """
    fault = SealError("expected an answer signed by the federation's server for this query, got something else")
    sent = Query.read(query)
    if sent is None or len(data) != answer_bytes + ANSWER_OVERHEAD:
        raise fault
    body, signature = data[:-_SIGNATURE_BYTES], data[-_SIGNATURE_BYTES:]
    wanted = (_ANSWERED_MAGIC, sent.session, sent.number, hashlib.sha256(query).digest())
    if _ANSWERED.unpack_from(body) != wanted:
        raise fault
    try:
        verify(server, _ANSWER + hashlib.sha256(body).digest(), signature.hex())
    except LedgerError:
        raise fault from None
    return body[_ANSWERED.size :]


def refusal_of(word: str) -> TacitError:
    """Returns what a client is told about a refusal, by its word."""
    kinds: Mapping[str, type[TacitError]] = {
        "not enrolled": IdentityError,
        "length": SealError,
        "signature": SealError,
        "syntax": SealError,
        "ciphertext": SealError,
        "replayed": SealError,
    }
    sentence = REMEDIES.get(word)
    if sentence is None:
        # Only our own words are shown: the peer's bytes are not ours to print.
        return RunError("expected an answer, got a refusal by a word that this version does not know; update Tacit")
    return kinds.get(word, RunError)(sentence)


def to_text(data: bytes) -> str:
    """Returns bytes as base64 text."""
    return base64.b64encode(data).decode()


def from_text(text: str) -> bytes:
    """Returns the bytes of a base64 text.

    Raises:
        DataError: It is none.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError("expected base64 text, got something else") from None
