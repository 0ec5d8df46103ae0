"""Asking a published head about a record that stays here: features, keys and logits never leave this machine.

    asker = Asker.begin(service, identity, "digits", queries=100)      a session: fresh keys, so many queries, an end
    reply = asker.ask(record)                                          encrypt, ask, decrypt
    replies = asker.ask_many(records)                                  the same, and nothing is decrypted before the end

What comes after an answer must tell the service nothing about what was in it. Whoever evaluates can send an answer of
its own making whose decryption depends on the secret key; a client that then asks again, complains, or merely pauses
differently, would tell it that key bit by bit (guarantee G25). So nothing is sent after an answer: no retry, no report,
no acknowledgement. `ask_many` sends every query before it decrypts the first answer. A secret key serves one session,
of at most so many queries.
"""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import http.client
import json
import os
import re
import ssl
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clients.home import ClientHome
from models.catalog import TASKS, find_task
from models.head import Split, split
from models.shape import Shape
from privacy.asking import (
    ANSWER_OVERHEAD,
    ASK,
    CONTENT,
    HEADS,
    MOST_HEADS,
    MOST_OPENING,
    NONCE_BYTES,
    OPEN,
    SESSION_BYTES,
    Offer,
    Opening,
    Query,
    read_answer,
    read_heads,
    read_opened,
    refusal_of,
)
from privacy.enrolment import Address
from privacy.errors import DataError, HeadError, IdentityError, LedgerError, PlanError, RunError, TacitError
from privacy.files import write_whole
from privacy.he import HeadDescription, QueryKey, Scheme, Wire, stream
from privacy.hop import REFUSAL, present, trust
from privacy.identity import Identity, Secret
from privacy.plan import canonical
from privacy.vault import Safe

_VERSION: Final = 1
_WAIT_S: Final = 30.0
_LENGTH: Final = re.compile(r"[0-9]{1,10}")
# The most that a key serves unless its owner wants more, whatever the service allows.
MOST_QUERIES: Final = 10_000
MOST_LIFE_S: Final = 86_400
# No honest head comes near: 16,384 features take half a megabyte, 1,000 classes of so many 25 MB.
_MOST_QUERY_BYTES: Final = 4 << 20
_MOST_ANSWER_BYTES: Final = 64 << 20
# The service stands this many ports above the gateway, unless told otherwise.
PORT_OFFSET: Final = 2


class Service:
    """A connection to an inference service, opened when it is first needed and kept.

    Args:
        address: Where it is.
        authority: The federation's authority, PEM.
        tls: Key and certificate of this client, one PEM file.
        server: Public key of the server application, 64 hex digits: what it did not sign is not believed.
    """

    def __init__(self, address: Address, authority: Path, tls: Path, server: str) -> None:
        self.address, self.server = address, server
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust(context, authority)
        present(context, tls, tls)
        self._link = http.client.HTTPSConnection(address.host, address.port, timeout=_WAIT_S, context=context)

    @classmethod
    def of(cls, home: ClientHome, address: Address | None = None) -> Self:
        """Returns the service of the federation that a client has joined.

        Raises:
            IdentityError: The client has not joined.
        """
        settings = home.settings
        first = settings.addresses[0]
        return cls(
            address or Address(first.host, first.port + PORT_OFFSET), home.authority_file, home.tls, settings.server
        )

    def post(self, path: bytes, body: bytes, most: int) -> bytes:
        """Asks one question, once: whatever goes wrong, nothing is sent again.

        Args:
            path: Of `privacy.asking`.
            body: The question.
            most: Most bytes of the answer.

        Raises:
            RunError: Nobody answers, or the connection breaks; and most refusals.
            IdentityError: The certificate is refused, on either side.
            SealError: The question is refused.
        """
        at = f"{self.address.host}:{self.address.port}"
        try:
            self._link.request("POST", path.decode(), body, {"Content-Type": CONTENT.decode()})
            answer = self._link.getresponse()
            length = answer.headers.get("content-length", "")
            # Nothing is read that was not announced, and nothing that is larger than it may be. A transfer encoding
            # would stand above the announced length.
            if "transfer-encoding" in answer.headers or not _LENGTH.fullmatch(length) or int(length) > most:
                raise http.client.HTTPException("an answer of a size that cannot be")
            data = answer.read(most + 1)
            if len(data) != int(length):
                raise http.client.HTTPException("an answer that ended early")
        except ssl.SSLCertVerificationError as error:
            self._link.close()
            raise IdentityError(
                f"expected the federation's certificate at {at}, got another one: {error.verify_message}"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            self._link.close()
            why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise RunError(
                f"expected an inference service at {at}, got: {why}; is it running (tacit infer serve), and is this "
                "client still enrolled?"
            ) from None
        if answer.status != 200:
            # It came whole, so the connection stays good.
            raise refusal_of(answer.headers.get(REFUSAL.decode(), ""))
        return data

    def heads(self) -> list[Offer]:
        """Returns what is published, as the server application signed it.

        Raises:
            TacitError: As `post`.
            SealError: It is not signed by the server's key.
        """
        nonce = os.urandom(NONCE_BYTES)
        return read_heads(self.post(HEADS, nonce, MOST_HEADS), nonce, self.server)

    def close(self) -> None:
        """Closes the connection."""
        self._link.close()


def backbone_of(offer: Offer, tasks: Collection[str] = ()) -> Split:
    """Returns the frozen feature map of a published head, made here and compared with the one that was published.

    Args:
        offer: The head.
        tasks: Tasks that may be used beside the built-in ones. A name in an offer is the server's word, and finding a
            task runs its module, so only names that somebody on this machine chose are looked for.

    Raises:
        PlanError: The task is not among these, or its feature map is another one here.
    """
    if offer.task not in TASKS and offer.task not in tasks:
        raise PlanError(
            f"expected a built-in task or one that was named here, got a head of task {offer.task[:80]!r}; if you "
            "trust its code, give --task"
        )
    shape = Shape(inputs=offer.inputs, classes=len(offer.classes))
    try:
        task = find_task(offer.task)
        parts = split(task.fresh(shape, offer.seed), shape, task.features)
    except (LookupError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        # PyTorch's word for shapes that do not fit, or do not fit in memory, is RuntimeError.
        raise PlanError(f"expected the feature map of task {offer.task!r}, got none: {_shown(error)}") from None
    if parts.digest != offer.features:
        raise PlanError(
            f"expected the published feature map of task {offer.task!r} ({offer.features[:16]}...), got another one "
            f"here ({parts.digest[:16]}...); install the server's version of Tacit and of the task"
        )
    return parts


def _shown(error: BaseException) -> str:
    """Returns the first line of an error's text, cut: it may be many lines of a library's, of sizes that came in."""
    return str(error).partition("\n")[0][:200] or type(error).__name__


@dataclasses.dataclass(frozen=True, eq=False)
class Reply:
    """What a head says of one record.

    Attributes:
        label: Index of the largest logit.
        name: That class's name.
        logits: Shape ``(c,)``, float64. They are as secret as the record: do not send them anywhere.
    """

    label: int
    name: str
    logits: NDArray[np.float64]


class Asker:
    """A session with one head: asks, and keeps the keys.

    Args:
        service: Where to ask.
        offer: The head.
        key: Keys of this session's ciphertexts.
        seed: 32 bytes from which the identity that signs its queries is made.
        session: Name of the session, 16 bytes.
        left: Queries that are left.
        until: End of the session, seconds since 1970.
        number: Number of the last query.
        tasks: As for `backbone_of`.
        keep: Called before each query is sent, with the state after it: whatever happens, no number is used twice.
    """

    def __init__(
        self,
        service: Service,
        offer: Offer,
        key: QueryKey,
        seed: bytes,
        session: bytes,
        *,
        left: int,
        until: int,
        number: int = 0,
        tasks: Collection[str] = (),
        keep: Callable[[Asker], None] = lambda asker: None,
    ) -> None:
        self.service, self.offer, self.left, self.until = service, offer, left, until
        self.number, self.session = number, session
        self.keep = keep
        # Lets go of the session's file; see `load`.
        self.held: weakref.finalize[..., Asker] | None = None
        self._key, self._seed = key, seed
        self._identity = Secret(seed).identity("session")
        self._head, self._plan = bytes.fromhex(offer.version), bytes.fromhex(offer.plan)
        self.backbone = backbone_of(offer, tasks)

    @classmethod
    def begin(
        cls,
        service: Service,
        identity: Identity,
        head: str = "",
        *,
        queries: int = 0,
        life_s: int = 0,
        tasks: Collection[str] = (),
        keep: Callable[[Asker], None] = lambda asker: None,
    ) -> Self:
        """Makes fresh keys and opens a session.

        Args:
            service: Where.
            identity: Of the client application, whose public key the server knows since enrolment.
            head: Name of the head; may be left out where there is one only.
            queries: How many will be asked, if the service allows so many; where it is 0, what the service allows, at
                most `MOST_QUERIES`: how long a key serves is this side's to say, as whoever evaluates gains by it.
            life_s: For how many seconds, in the same way; where it is 0, at most `MOST_LIFE_S`.
            tasks: As for `backbone_of`.
            keep: As for `Asker`.

        Raises:
            PlanError: There is no such head, or its feature map is not to be had.
            TacitError: The service refuses, or what it says is not signed by the server.
        """
        offers = {offer.name: offer for offer in service.heads()}
        if not head and len(offers) == 1:
            head = next(iter(offers))
        if head not in offers:
            raise PlanError(f"expected a published head, got {head or 'none'!r}; there are: {', '.join(offers)}")
        offer = offers[head]
        # Before the session: what cannot be asked should cost no allowance.
        width = backbone_of(offer, tasks).weights.shape[1]
        wanted, life = min(queries or MOST_QUERIES, offer.queries), min(life_s or MOST_LIFE_S, offer.session_s)
        key, seed, session = _fresh_key(offer, width, wanted, life), os.urandom(32), os.urandom(SESSION_BYTES)
        opening = Opening(
            head=offer.version,
            plan=offer.plan,
            session=session.hex(),
            key=Secret(seed).identity("session").public_key,
            queries=wanted,
            time=int(time.time()),
        ).to_bytes(identity)
        left, until = read_opened(service.post(OPEN, opening, MOST_OPENING), opening, service.server)
        left, until = min(left, wanted), min(until, int(key.expires))
        return cls(service, offer, key, seed, session, left=left, until=until, tasks=tasks, keep=keep)

    @property
    def approximate(self) -> bool:
        """Whether answers decrypt to approximate numbers: who sees these can solve for the key (Li & Micciancio)."""
        return self._key.public.plan.scheme is Scheme.FLOAT

    def features(self, records: Tensor) -> NDArray[np.float64]:
        """Returns the features of records: ``(n, *inputs)`` to ``(n, d)``, with the shared frozen map."""
        return self.backbone(records)

    def ask(self, record: Tensor) -> Reply:
        """Asks about one record, shape ``(1, *inputs)``; raises as `ask_many`."""
        return self.ask_many(record)[0]

    def ask_many(self, records: Tensor) -> list[Reply]:
        """Asks about records; raises as `ask_features`.

        Args:
            records: Shape ``(n, *inputs)``, float32.
        """
        if records.ndim != 1 + len(self.offer.inputs) or tuple(records.shape[1:]) != self.offer.inputs:
            raise DataError(f"expected records of shape {self.offer.inputs}, got {tuple(records.shape[1:])}")
        return self.ask_features(self.features(records))

    def ask_features(self, features: NDArray[np.float64]) -> list[Reply]:
        """Asks about features, all queries first; then closes the connection, and then decrypts all answers.

        Args:
            features: Shape ``(n, d)``; finite, none larger than the head's range in absolute value.

        Raises:
            DataError: They are something else. Nothing was sent.
            RunError: The session has ended or has too few queries left (nothing was sent), or the service refused one
                of them; those before it are lost, and were counted.
            SealError: An answer is not signed by the server for its query.
        """
        self.require_features(features)
        if len(features) > self.left or time.time() >= self.until:
            raise RunError(
                f"expected {len(features)} queries left in a session that is still good, got {self.left}; begin "
                "another one (tacit infer keygen)"
            )
        try:
            answers = [self.exchange(self.seal(row)) for row in features]
        finally:
            # Before anything is decrypted: when a connection ends, or that it ends, can be seen as well.
            self.service.close()
        return [self.open(*pair) for pair in answers]

    def require_features(self, features: NDArray[np.float64]) -> None:
        """Refuses features that the head is not for; raises DataError, and nothing was sent."""
        width = self.backbone.weights.shape[1]
        if features.ndim != 2 or features.shape[1] != width:
            raise DataError(f"expected {width} features a record, got an array of shape {features.shape}")
        if not np.isfinite(features).all():
            raise DataError("expected finite features, got NaN or infinity; correct the record")
        largest = float(np.abs(features).max(initial=0.0))
        if largest > self.offer.feature_range:
            raise DataError(
                f"expected features within {self.offer.feature_range:g}, got {largest:g}; is the record prepared as "
                "the head says?"
            )

    def seal(self, features: NDArray[np.float64]) -> bytes:
        """Encrypts the features of one record, shape ``(d,)``, and signs the query; its number is used from here on."""
        ciphertexts = self._key.encrypt(features)
        self.number, self.left = self.number + 1, self.left - 1
        self.keep(self)
        return Query(
            session=self.session, head=self._head, plan=self._plan, number=self.number, ciphertexts=ciphertexts
        ).to_bytes(self._identity)

    def exchange(self, query: bytes) -> tuple[bytes, bytes]:
        """Sends a query of `seal` and returns it with its answer, about which nothing was looked at yet."""
        return query, self.service.post(ASK, query, self.offer.answer_bytes + ANSWER_OVERHEAD)

    def open(self, query: bytes, answer: bytes) -> Reply:
        """Checks and decrypts an answer. Whatever comes of it, nothing is sent.

        Raises:
            SealError: It is not signed by the server for this query.
            HeadError: It is signed, and no answer of this head.
        """
        content = read_answer(answer, query, self.offer.answer_bytes, self.service.server)
        try:
            logits = np.asarray(self._key.decrypt(content), dtype=np.float64).reshape(-1)
        except TacitError:
            raise
        except (ValueError, TypeError, RuntimeError):
            # SEAL's own streams alone: a ciphertext of another form, such as one in its transformed domain.
            raise HeadError(
                "expected an answer of this head's plan, got another ciphertext; do not ask again"
            ) from None
        label = int(logits.argmax())
        return Reply(label, self.offer.classes[label], logits)

    # At rest.

    def close(self) -> None:
        """Closes the connection, and lets others use the session's file where there is one."""
        self.service.close()
        if self.held is not None:
            self.held()

    def to_bytes(self) -> bytes:
        """Returns the session with its secret keys; only a `Safe` should see this."""
        return canonical(
            {
                "v": _VERSION,
                "offer": self.offer.fields(),
                "key": base64.b64encode(self._key.save()).decode(),
                "seed": self._seed.hex(),
                "session": self.session.hex(),
                "left": self.left,
                "until": self.until,
                "number": self.number,
                "server": self.service.server,
                "address": str(self.service.address),
            }
        )


def _fresh_key(offer: Offer, width: int, queries: int, life_s: int) -> QueryKey:
    """Makes the keys of a session; what the server says of its plan is checked, not believed.

    Args:
        offer: The head.
        width: Its features, counted here.
        queries: How many the key will encrypt.
        life_s: For how many seconds.

    Raises:
        PlanError: The plan's parameters are below 128 bits of security, its messages are larger than any honest head's,
            it asks for SEAL's own streams where nobody needs them, or the description contradicts the offer.
        HeadError: More queries or seconds are asked for than a key may serve, or SEAL cannot make such a key.
    """
    description = HeadDescription.from_bytes(offer.description)
    plan = description.plan
    most = offer.feature_range
    if plan.query_bytes > _MOST_QUERY_BYTES or plan.answer_bytes > _MOST_ANSWER_BYTES:
        raise PlanError(
            f"expected queries of at most {_MOST_QUERY_BYTES:,} bytes and answers of at most {_MOST_ANSWER_BYTES:,}, "
            f"got a plan with {plan.query_bytes:,} and {plan.answer_bytes:,}; tell the operator"
        )
    described = (plan.digest, plan.query_bytes, plan.answer_bytes, description.low, description.high)
    shaped = (plan.features, plan.classes, plan.batch)
    if described != (offer.plan, offer.query_bytes, offer.answer_bytes, -most, most) or shaped != (
        width,
        len(offer.classes),
        1,
    ):
        raise PlanError("expected a description that fits its offer, got another; tell the operator")
    # SEAL's parser is the largest piece of code that a server's bytes could reach.
    if plan.wire is Wire.SEAL and stream.sound():
        raise PlanError(
            "expected a plan in the packed layout, which works here, got one that asks for SEAL's own streams; tell "
            "the operator to publish the head again"
        )
    try:
        return QueryKey.fresh(description, queries=queries, session_s=float(life_s))
    except TacitError:
        raise
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise HeadError(
            f"expected a plan that SEAL can make keys for, got: {_shown(error)}; tell the operator"
        ) from None


def _hold(path: Path) -> int:
    """Takes the lock of a session: a file beside it, as the session's own is replaced at every query.

    Two processes with one session would each count down from the same number, and one key would serve more queries
    than it may (guarantee G25).

    Returns:
        The descriptor whose closing ends the lock.

    Raises:
        RunError: Another process holds it, or it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise RunError(f"expected to lock the session {path}, got: {error.strerror}; choose another place") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RunError(
            f"expected a session that nobody uses at {path}, got one in use; wait until that has ended, or make "
            "another one (tacit infer keygen --out)"
        ) from None
    return descriptor


def require_free(path: Path) -> None:
    """Refuses a place whose session is in use, before another one is opened for it; raises RunError."""
    os.close(_hold(path))


def save(asker: Asker, path: Path, secret: Secret) -> None:
    """Writes a new session to a file that only this client's secret opens, 0600, whole or not at all.

    Raises:
        RunError: The disk is full, or the session that is there is in use.
    """
    held = _hold(path)
    try:
        _write(asker, path, secret)
    finally:
        os.close(held)


def _write(asker: Asker, path: Path, secret: Secret) -> None:
    write_whole(path, Safe(secret, "inference session").seal(path.name, asker.to_bytes()))


def load(path: Path, home: ClientHome, tasks: Sequence[str] = ()) -> Asker:
    """Reads a session; every query is noted in the file before it is sent. One that has ended is deleted.

    It is this process's alone until `Asker.close`, or until nobody has the asker any more.

    Raises:
        RunError: There is none, it has ended, or somebody else uses it.
        LedgerError: The file is not as this client wrote it.
    """
    held = _hold(path) if path.exists() else os.open(os.devnull, os.O_RDONLY)
    try:
        asker = _loaded(path, home, tasks)
    except BaseException:
        os.close(held)
        raise
    asker.held = weakref.finalize(asker, os.close, held)
    return asker


def _loaded(path: Path, home: ClientHome, tasks: Sequence[str]) -> Asker:
    secret = home.secret()

    def keep(asker: Asker) -> None:
        if asker.held is None or not asker.held.alive:
            raise RunError("expected a session that is in use here, got one that was closed; load it again")
        _write(asker, path, secret)

    try:
        sealed = path.read_bytes()
    except OSError as error:
        raise RunError(
            f"expected a session at {path}, got {error.strerror}; make one with: tacit infer keygen"
        ) from None
    if path.stat().st_mode & 0o077:
        raise LedgerError(f"expected the session {path} to be private (0600), got another mode; chmod 600 it")
    fields: dict[str, Any] = json.loads(Safe(secret, "inference session").open(path.name, sealed))
    if fields["until"] <= time.time() or fields["left"] <= 0:
        path.unlink(missing_ok=True)
        raise RunError(f"expected a session that is still good at {path}, got one that has ended; run keygen again")
    service = Service.of(home, Address.parse(fields["address"]))
    if service.server != fields["server"]:
        raise IdentityError("expected a session with this federation's server, got another's; run keygen again")
    return Asker(
        service,
        Offer.parse(fields["offer"]),
        QueryKey.restore(base64.b64decode(fields["key"])),
        bytes.fromhex(fields["seed"]),
        bytes.fromhex(fields["session"]),
        left=fields["left"],
        until=fields["until"],
        number=fields["number"],
        tasks=tasks,
        keep=keep,
    )
