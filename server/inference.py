"""The inference service: answers encrypted queries about published heads; it sees no record, no feature, no logit.

    client  == TLS 1.3, enrolled certificates ==>  service  -- pipe -->  evaluator
      keys, features, logits                       sessions, limits      ciphertexts, weights

A query is looked at in the cheapest order, and parsed last of all: its length, its session, its head and plan, its end,
its signature, its number, what is left of the session, the client's rate. Each number passes once, so that a query that
is sent again costs nothing and gets nothing. Then an evaluator (`server.evaluator`) parses it, in a process of its own
that may die: its client is told "restarting", everyone else's queries go on when it is back.

No secret key of a client ever comes here. Sessions live in memory and end with the service; what each client was
granted of each head outlives it, on disk before a session's first query is answered. Every query, its cost and what
became of it stands in a sealed log before its answer leaves; its content stands nowhere.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

from privacy.asking import (
    ANSWER_OVERHEAD,
    CONTENT,
    HEADS,
    MOST_OPENING,
    NONCE_BYTES,
    OPEN,
    QUERY_OVERHEAD,
    QUESTIONS,
    SKEW_S,
    Opening,
    Query,
    is_signed,
    tell_answer,
    tell_heads,
    tell_opened,
)
from privacy.errors import PlanError, RunError, SealError
from privacy.files import write_whole
from privacy.hop import Answer, Asked, Limits, Refused, Request
from privacy.identity import Identity, Secret
from privacy.vault import SealedLog, private_logger
from server.door import Doorway, Threshold, Visitor
from server.evaluator import Evaluator
from server.heads import Published

# Open sessions of one client and of all: one client never holds more than a small part of the room.
_OPEN_SESSIONS: Final = 16
_ALL_SESSIONS: Final = 4096
# The longest that a query may wait for an evaluator.
_PATIENCE_S: Final = 5.0
_AUDIT_BYTES: Final = 64 << 20
# Lines of the log that are written together, in one record of at most 64 KiB.
_TOGETHER: Final = 128


def limits_of(published: Sequence[Published]) -> Limits:
    """Returns bounds on questions that fit the published heads and nothing larger."""
    largest = max(one.offer.query_bytes for one in published) + QUERY_OVERHEAD
    return Limits(body_bytes=max(largest, MOST_OPENING), room_bytes=64 << 20)


@dataclasses.dataclass
class _Session:
    """An open session of a client."""

    client: str
    head: int
    key: str
    until: float
    left: int
    number: int = 0


class _Pace:
    """How fast one client may ask: on average ``rate`` a second, two seconds' worth at once."""

    def __init__(self) -> None:
        self._at, self._spare = 0.0, 1.0

    def admits(self, rate: float, now: float) -> bool:
        """Says whether one more may pass, and counts it if so."""
        most = max(1.0, 2 * rate)
        # A clock that was set back gives nothing and takes nothing.
        self._spare = min(most, self._spare + max(0.0, now - self._at) * rate if self._at else most)
        self._at = now
        if self._spare < 1:
            return False
        self._spare -= 1
        return True


class Allowances:
    """What each client was granted of each head, for as long as the folder lasts: a restart grants nothing anew.

    Two services on one folder share what is left: each reads the file again, under a lock, before it grants.

    Args:
        path: The file.

    Raises:
        RunError: It is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._granted = self._read()

    def _read(self) -> dict[str, dict[str, int]]:
        try:
            told: Any = json.loads(self._path.read_bytes()) if self._path.exists() else {}
            return {
                str(client): {str(head): int(count) for head, count in heads.items()} for client, heads in told.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            raise RunError(f"expected a list of grants in {self._path}, got something else; restore a backup") from None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps every other service out of the file while the block lasts."""
        lock = self._path.with_name(f".{self._path.name}.lock")
        try:
            lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise RunError(f"expected to lock {lock}, got: {error.strerror}; see that the folder can be used") from None
        try:
            # Waits as long as another service's write takes; closing the file gives the lock back.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def of(self, client: str, head: str) -> int:
        """Returns what a client was granted of a head."""
        return self._granted.get(client, {}).get(head, 0)

    def grant(self, client: str, head: str, queries: int, allowance: int) -> bool:
        """Grants queries, on disk when it returns; or says that there are not so many left.

        Raises:
            RunError: The disk is full, or the file damaged; nothing was granted.
        """
        with self._alone():
            # Grants only grow: whichever of the file and our own memory has more of them is right.
            granted = self._read()
            for name, heads in self._granted.items():
                known = granted.setdefault(name, {})
                for version, count in heads.items():
                    known[version] = max(count, known.get(version, 0))
            self._granted = granted
            before = self.of(client, head)
            if before + queries > allowance:
                return False
            more = granted | {client: granted.get(client, {}) | {head: before + queries}}
            write_whole(self._path, json.dumps(more, sort_keys=True).encode())
            self._granted = more
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the audit log: who asked what of which head, what it cost, and what became of it.

    There is no field for content, and no field depends on what was encrypted.

    Attributes:
        time: Seconds since 1970.
        client: Enrolled name.
        kind: "open" or "ask".
        head: Name of the head; empty where the question named none that is published.
        version: Its version's first 16 hex digits.
        session: The session's first 8 hex digits.
        number: The query's number.
        cost_ms: Evaluation, in milliseconds.
        bytes_in: Size of the question.
        bytes_out: Size of the answer.
        verdict: "answered", or the word of the refusal.
        unlogged: How many refusals of the same client before it were not written one by one.
    """

    time: float
    client: str
    kind: str
    head: str = ""
    version: str = ""
    session: str = ""
    number: int = 0
    cost_ms: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    verdict: str = "answered"
    unlogged: int = 0


class Audit:
    """Writes lines to a sealed log, many at a time where many come at once; who waits for one waits for its batch.

    Args:
        path: The log; `privacy.vault.read_log` reads it.
        secret: What opens it.
    """

    def __init__(self, path: Path, secret: Secret) -> None:
        self._log = SealedLog(path, secret, limit=_AUDIT_BYTES)
        self._log.setFormatter(logging.Formatter("%(message)s"))
        self._waiting: list[tuple[Line, asyncio.Future[bool]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def write(self, line: Line) -> bool:
        """Writes a line; returns whether it is in the file."""
        loop = asyncio.get_running_loop()
        written = loop.create_future()
        self._waiting.append((line, written))
        if self._writer is None or self._writer.done():
            self._writer = loop.create_task(self._drain())
        return await asyncio.shield(written)

    async def _drain(self) -> None:
        # This task starts in the loop's next turn: by then everything that came in this one is waiting too.
        while self._waiting:
            batch, self._waiting = self._waiting[:_TOGETHER], self._waiting[_TOGETHER:]
            text = "\n".join(json.dumps(vars(line), separators=(",", ":")) for line, _ in batch)
            record = logging.LogRecord("tacit.infer", logging.INFO, "", 0, "%s", (text,), None)
            # In this thread: an append is a tenth of a millisecond, less than handing it to another one takes, and
            # no answer would leave before it anyway.
            self._log.emit(record)
            for _, written in batch:
                if not written.done():
                    written.set_result(self._log.lost == 0)


@final
class Service(Doorway):
    """Answers encrypted queries about published heads to enrolled clients.

    Args:
        door: Where it stands; its limits should be `limits_of` the heads.
        is_member: As for `server.door.Doorway`.
        key_of: Given a client's name, returns the public key of its application (64 hex digits), or None.
        published: The heads; their names differ.
        identity: The server application's, which signs.
        folder: Where allowances and the log are kept.
        secret: Opens the log.
        evaluators: Number of processes that evaluate.
        memory_bytes: Most address space of each.
        clock: Seconds since 1970.

    Raises:
        PlanError: There is no head, or two of one name.
        RunError: The folder cannot be used.
    """

    crossing = QUESTIONS
    log = private_logger("tacit.infer")

    def __init__(
        self,
        door: Threshold,
        is_member: Callable[[bytes], str | None],
        key_of: Callable[[str], str | None],
        published: Sequence[Published],
        identity: Identity,
        folder: Path,
        secret: Secret,
        *,
        evaluators: int = 1,
        memory_bytes: int = 2 << 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        names = [one.offer.name for one in published]
        if not names or len(set(names)) < len(names):
            raise PlanError(
                f"expected at least one head, and names that differ, got {', '.join(names) or 'none'}; give --name"
            )
        super().__init__(door, is_member)
        self._published = list(published)
        self._offers = [one.offer for one in published]
        self._versions = {one.offer.version: index for index, one in enumerate(published)}
        self._identity, self._key_of, self._clock = identity, key_of, clock
        self._sessions: dict[str, _Session] = {}
        # Of each ended session: whose it was, and the word that a late query of it gets.
        self._ended: collections.OrderedDict[str, tuple[str, str]] = collections.OrderedDict()
        self._paces: dict[str, _Pace] = {}
        self._noise: dict[str, tuple[_Pace, int]] = {}
        self._allowances = Allowances(folder / "granted.json")
        self._audit = Audit(folder / "queries.log", secret)
        self._evaluators = [
            Evaluator([one.loaded for one in published], memory_bytes=memory_bytes) for _ in range(evaluators)
        ]
        self._free: asyncio.Queue[Evaluator] = asyncio.Queue()

    async def _prepared(self) -> None:
        try:
            for evaluator in self._evaluators:
                await evaluator.start()
                self._free.put_nowait(evaluator)
        except BaseException:
            await self._end_evaluators()
            raise

    async def close(self, grace_s: float = 3.0) -> None:
        """Stops listening, lets answers that are under way finish, and ends the evaluators."""
        await super().close(grace_s)
        await self._end_evaluators()

    async def _end_evaluators(self) -> None:
        for evaluator in self._evaluators:
            await evaluator.close()

    @property
    def evaluators(self) -> Sequence[Evaluator]:
        """The processes that evaluate."""
        return self._evaluators

    async def _answer(self, client: Visitor, asked: Asked, request: Request) -> None:
        # A refusal here is an answer like any other: the connection stays, and the client learns one fixed word.
        try:
            body = await self.reply(client.name, request.path, request.body)
            answer = Answer(200, {b"content-type": CONTENT}, body)
        except Refused as refusal:
            self.counters[refusal.word] += 1
            answer = refusal.answer()
        await asked.write(answer)
        self.counters[f"{request.path.rpartition(b'/')[2].decode()} {answer.status}"] += 1

    async def reply(self, client: str, path: bytes, body: bytes) -> bytes:
        """Answers one question of an enrolled client.

        Args:
            client: Its name, by its certificate.
            path: `HEADS`, `OPEN` or `ASK`.
            body: The question.

        Raises:
            Refused: By a fixed word.
        """
        if path == HEADS:
            if len(body) != NONCE_BYTES:
                raise Refused(400, "syntax")
            self._keep_pace(client, max(offer.rate for offer in self._offers))
            return tell_heads(self._offers, body, self._identity)
        line: dict[str, Any] = {"client": client, "kind": "open" if path == OPEN else "ask", "bytes_in": len(body)}
        try:
            answer = await self._opened(client, body, line) if path == OPEN else await self._asked(client, body, line)
        except Refused as refusal:
            await self._note_refusal(client, line | {"verdict": refusal.word})
            raise
        if not await self._audit.write(Line(time=self._clock(), bytes_out=len(answer), **line)):
            raise Refused(503, "log")
        return answer

    async def _note_refusal(self, client: str, line: Mapping[str, Any]) -> None:
        """Writes a refusal to the log; of a flood of them the first of every second, and how many there were."""
        pace, unlogged = self._noise.get(client) or (_Pace(), 0)
        if pace.admits(8.0, self._clock()):
            self._noise[client] = (pace, 0)
            await self._audit.write(Line(time=self._clock(), unlogged=unlogged, **line))
        else:
            self._noise[client] = (pace, unlogged + 1)

    def _keep_pace(self, client: str, rate: float) -> None:
        if client not in self._paces and len(self._paces) > _ALL_SESSIONS:
            self._paces.clear()
        if not self._paces.setdefault(client, _Pace()).admits(rate, self._clock()):
            raise Refused(429, "too fast")

    # A session.

    async def _opened(self, client: str, body: bytes, line: dict[str, Any]) -> bytes:
        now = self._clock()
        key = self._key_of(client)
        if len(body) > MOST_OPENING or key is None:
            raise Refused(400, "syntax")
        self._keep_pace(client, max(offer.rate for offer in self._offers))
        try:
            opening = Opening.read(body, key)
        except SealError:
            raise Refused(403, "signature") from None
        index = self._versions.get(opening.head)
        if index is None:
            raise Refused(404, "head")
        offer, terms = self._offers[index], self._published[index].terms
        line |= {"head": offer.name, "version": offer.version[:16], "session": opening.session[:8]}
        if opening.plan != offer.plan:
            raise Refused(409, "plan")
        # Whole numbers: a client's may be too large for a float.
        if abs(opening.time - int(now)) > SKEW_S:
            raise Refused(400, "clock")
        if opening.session in self._sessions or opening.session in self._ended:
            raise Refused(409, "replayed")
        self._forget(now)
        mine = sum(session.client == client for session in self._sessions.values())
        if mine >= _OPEN_SESSIONS or len(self._sessions) >= _ALL_SESSIONS:
            raise Refused(429, "sessions")
        if opening.queries > terms.queries:
            raise Refused(400, "syntax")
        try:
            if not self._allowances.grant(client, offer.model, opening.queries, terms.allowance):
                raise Refused(429, "allowance")
        except RunError:
            raise Refused(503, "log") from None
        until = int(now + terms.session_s)
        self._sessions[opening.session] = _Session(client, index, opening.key, until, opening.queries)
        return tell_opened(body, opening.queries, until, self._identity)

    def _forget(self, now: float) -> None:
        """Forgets sessions that have ended, by time or by count, but for their names: none comes back while clocks err.

        A session without queries left takes no room: who opens and uses up many of them keeps nobody else out.
        """
        for name in [name for name, session in self._sessions.items() if session.until <= now or not session.left]:
            session = self._sessions.pop(name)
            self._ended[name] = (session.client, "ended" if session.until <= now else "used up")
        while len(self._ended) > 16 * _ALL_SESSIONS:
            self._ended.popitem(last=False)

    # A query.

    async def _asked(self, client: str, body: bytes, line: dict[str, Any]) -> bytes:
        query = Query.read(body)
        if query is None:
            raise Refused(400, "syntax")
        name = query.session.hex()
        line |= {"session": name[:8], "number": min(query.number, 1 << 62)}
        session = self._sessions.get(name)
        # Another client's session is an unknown one: whether it exists is nobody else's business.
        if session is None or session.client != client:
            owner, word = self._ended.get(name, ("", ""))
            if owner == client:
                raise Refused(403 if word == "ended" else 429, word)
            raise Refused(404, "session")
        offer = self._offers[session.head]
        line |= {"head": offer.name, "version": offer.version[:16]}
        if query.head.hex() != offer.version:
            raise Refused(409, "head")
        if query.plan.hex() != offer.plan:
            raise Refused(409, "plan")
        if len(query.ciphertexts) != offer.query_bytes:
            raise Refused(400, "length")
        if session.until <= self._clock():
            raise Refused(403, "ended")
        if not is_signed(body, session.key):
            raise Refused(403, "signature")
        if query.number <= session.number:
            raise Refused(409, "replayed")
        if not session.left:
            raise Refused(429, "used up")
        # From here on the number is used, whatever becomes of the query: it will not be evaluated twice.
        session.number = query.number
        self._keep_pace(client, offer.rate)
        session.left -= 1
        answer, cost = await self._evaluated(session.head, query.ciphertexts)
        line["cost_ms"] = cost / 1000
        if len(answer) != offer.answer_bytes:
            # A fault of ours, and every answer must look alike.
            self.log.error("an answer of %d bytes where the plan says %d", len(answer), offer.answer_bytes)
            raise Refused(503, "restarting")
        told = tell_answer(body, query.session, query.number, answer, self._identity)
        assert len(told) == offer.answer_bytes + ANSWER_OVERHEAD  # noqa: S101 -- the wire's own arithmetic
        return told

    async def _evaluated(self, head: int, ciphertexts: bytes) -> tuple[bytes, int]:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                evaluator = await self._free.get()
        except TimeoutError:
            raise Refused(503, "busy") from None
        try:
            found = await evaluator.evaluate(head, ciphertexts)
        except RunError:
            self.counters["evaluator gone"] += 1
            raise Refused(503, "restarting") from None
        finally:
            self._free.put_nowait(evaluator)
        if found is None:
            raise Refused(400, "ciphertext")
        return found
