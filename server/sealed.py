"""A grid whose messages only their receiver can read: the server application's end of every sealed session.

`SealedGrid` is Flower's ``Grid`` to the server application, and hands sealed bytes to a relay. Its nodes are the job's
members, by numbers that stay when Flower's run, the relay or a client's machine is started anew.

With each member one conversation, always in this order:

    hello       our identity, the job, Flower's run and the hash of the terms, signed
    offer       the member's fresh keys, signed; now both can make a session
    terms       what the job asks; answered with one fixed word: ready, waiting, or why not
    round       a request of the server application; answered with whatever its client application answers

Whatever is lost is said again: a reply that does not come in time, a worker that has forgotten the session, a relay
that restarted. That costs no privacy: a client answers the same request with the release that it kept (guarantee G9).
What does not open, or opens as something else than what was asked, is treated as lost.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from privacy.errors import PlanError, RunError, SealError
from privacy.identity import Identity
from privacy.plan import canonical
from privacy.seal import MOST_BYTES, Broadcast, ServerEpoch, ServerSession
from privacy.terms import Terms
from privacy.wire import Floats, Packet, array_of, floats_of, pack, unpack

# The records of a message; see `clients.courier`.
SEALED: Final = "sealed"
LONG: Final = "long"
SHARED: Final = "shared"
_SHORT_BYTES: Final = 1 << 20
# The word of a client on which nothing could open a message; see `clients.post`.
LOST: Final = "lost"

# Seconds. Asking a relay on loopback costs a few milliseconds.
_POLL_S: Final = 0.05
# A member that is silent so long is asked again, later and later; one that trains gets the same request twice.
_FIRST_PATIENCE_S: Final = 20.0
_LONGEST_PATIENCE_S: Final = 600.0
# Between two attempts with a member that answered, but not what was asked.
_PAUSE_S: Final = 1.0
# Between two looks at who is there: a node that came anew has lost what it was carrying.
_LOOK_S: Final = 1.0
# A round does not wait for a member that has not been connected for so long; a relay notices after up to a minute.
_MOST_AWAY_S: Final = 60.0
# Between two words about a relay that is still away.
_STILL_AWAY_S: Final = 30.0
# Between two questions to a member whose holder has not decided yet.
_WAITING_S: Final = 5.0
# A relay that keeps what nobody fetches would fill its disk.
_TTL_S: Final = 3600.0

_log = logging.getLogger("tacit.server")


class RunOverError(RunError):
    """The relay has ended the run; the job can go on in another one."""


class Relay(Protocol):
    """What carries sealed bytes; see `server.relay.Relay`."""

    run_id: int
    bundle: str

    def nodes(self) -> Mapping[int, str]:
        """Returns the ids of the nodes that are connected, each with a word that changes when it comes anew."""

    def push(self, messages: Sequence[Message]) -> list[str]:
        """Hands messages over; returns their ids."""

    def pull(self, ids: Collection[str]) -> list[Message]:
        """Returns those replies that have come, each once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One data holder as the server knows it from its enrolment.

    Attributes:
        number: Its number in the federation, from 1; never used again for another.
        name: The name under which it was invited.
        public_key: Key of its application identity, 64 hex digits.
        node_id: Flower's id of its SuperNode.
    """

    number: int
    name: str
    public_key: str
    node_id: int


# The kinds of sealed messages.
TERMS: Final = "terms"
ROUND: Final = "round"
WORD: Final = "word"
REPLY: Final = "reply"
PAPERS: Final = "papers"
# Words after which a member is asked no more.
_FINAL: Final = frozenset({"refused", "other-program", "other-task"})
_MOST_PAPERS_BYTES: Final = 64 * 1024


@dataclasses.dataclass
class _Line:
    """The conversation with one member."""

    member: Member
    agreed: bool = False
    refused: bool = False
    session: ServerSession | None = None
    accept: bytes = b""
    # Messages that may still be answered, by Flower's id, and what was asked by each.
    asked: dict[str, str] = dataclasses.field(default_factory=dict)
    # When its node came, as it was when something was asked last.
    came: str = ""
    # Since when its node is not connected, by our clock; None while it is.
    away: float | None = None
    due: float = 0.0
    patience: float = _FIRST_PATIENCE_S
    word: str = "not reached"

    def forget(self) -> None:
        """Starts over: the session is gone."""
        self.session, self.accept, self.agreed = None, b"", False
        self.asked.clear()
        self.due = time.monotonic() + _PAUSE_S


class _Shared:
    """A broadcast, and the record that carries it to everybody."""

    def __init__(self, broadcast: Broadcast) -> None:
        self.broadcast, body = broadcast, bytes(broadcast.body)
        short = len(body) <= _SHORT_BYTES
        self.record = ConfigRecord({"broadcast": body}) if short else ArrayRecord({"broadcast": _row(body)})


class SealedGrid(Grid):
    """Flower's grid over sealed sessions with the members of one job."""

    def __init__(
        self,
        relay: Relay,
        members: Sequence[Member],
        identity: Identity,
        terms: Terms,
        *,
        relay_wait_s: float = math.inf,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Opens a new epoch: no session of an earlier run is ever used again (guarantee G19).

        Args:
            relay: Carries the sealed bytes.
            members: Whom the job is for.
            identity: The server application's.
            terms: What the job asks.
            relay_wait_s: Longest wait for a relay that does not answer, in seconds.
            stopping: Asked while nothing can go on; true ends the wait.
        """
        self._relay, self._terms = relay, terms
        self._relay_wait_s, self._stopping = relay_wait_s, stopping
        # Since when the relay does not answer, and when that was said last; None while it does.
        self._silent: float | None = None
        self._told = 0.0
        self._epoch = ServerEpoch(identity, job=terms.job, run=relay.run_id, bundle=relay.bundle, terms=terms.digest())
        self._lines = {member.number: _Line(member) for member in members}
        self._run = Run.create_empty(relay.run_id)
        self._there: Mapping[int, str] = {}
        self._look = 0.0
        # Where papers are collected, while they are asked for.
        self._papers: dict[str, dict[str, Any]] | None = None

    # -- who is there -------------------------------------------------------------------------------------------

    @property
    def words(self) -> list[tuple[Member, str]]:
        """Each member, and what it last said, or why it said nothing."""
        return [(line.member, line.word) for line in self._lines.values()]

    def gather(self, wanted: int, *, patience_s: float, seen: Callable[[], object] = lambda: None) -> list[int]:
        """Waits until enough members are ready; asks the others again and again.

        Args:
            wanted: How many.
            patience_s: Longest wait in seconds.
            seen: Is called again and again meanwhile; `words` says then who said what.

        Returns:
            The numbers of those that are ready, at most ``wanted``, the lowest first.

        Raises:
            RunError: Too few are ready in time.
            KeyboardInterrupt: It was told to stop.
        """
        deadline = time.monotonic() + patience_s
        while True:
            self._turn({number: None for number in self._lines})
            ready = [number for number, line in sorted(self._lines.items()) if line.agreed and line.session]
            if len(ready) >= wanted:
                return ready[:wanted]
            seen()
            if self._stopping():
                raise KeyboardInterrupt
            left = sum(not line.refused for line in self._lines.values())
            if time.monotonic() > deadline or left < wanted:
                said = ", ".join(f"{line.member.name}: {line.word}" for line in self._lines.values())
                raise RunError(f"expected {wanted} clients to be ready, got {len(ready)} ({said}); start them")
            time.sleep(_POLL_S)

    def papers(
        self, *, patience_s: float = 10.0, among: Callable[[Member, str], bool] = lambda member, word: True
    ) -> dict[str, dict[str, Any]]:
        """Asks the members what their ledgers say of their budgets and of this job, for the report.

        Args:
            patience_s: Longest wait in seconds.
            among: Says of a member and its last word whether it is asked.

        Returns:
            Ledger entries as the holders signed them, by member: ``grant``, ``commit``. Nothing here is trusted: who
            reads the report checks the signatures. A member that does not answer in time has none.
        """
        found: dict[str, dict[str, Any]] = {}
        self._papers = found
        deadline = time.monotonic() + patience_s
        lines = [line for line in self._lines.values() if among(line.member, line.word)]
        for line in lines:
            line.due, line.patience = 0.0, patience_s
        while time.monotonic() < deadline:
            open_ = [line for line in lines if line.member.name not in found and not line.refused]
            if not open_:
                break
            self._turn({line.member.number: None for line in open_})
            time.sleep(_POLL_S)
        self._papers = None
        return found

    def keep(self, numbers: Iterable[int]) -> None:
        """Makes these members the job's, for all its rounds; others are asked nothing any more."""
        self._lines = {number: self._lines[number] for number in sorted(numbers)}

    def get_node_ids(self) -> list[int]:
        """Returns the numbers of the job's members, whether they are connected or not."""
        return list(self._lines)

    def get_nodes(self) -> list[NodeInfo]:
        """Returns what is known about each member: that it belongs to the job."""
        return [NodeInfo(node_id=number, status="online") for number in self._lines]

    def set_run(self, run: Run) -> None:
        """Takes another run's identity; an epoch belongs to the relay's own run, so this changes nothing."""

    @property
    def run(self) -> Run:
        """What Flower calls the run: here only its id means anything."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Builds a message; Flower's older way of writing ``Message(...)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Not offered: a sealed conversation needs its replies.

        Raises:
            RunError: Always.
        """
        raise RunError("expected send_and_receive on a sealed grid, got push_messages; send and receive together")

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Not offered; raises as `push_messages`."""
        raise RunError("expected send_and_receive on a sealed grid, got pull_messages; send and receive together")

    # -- messages -----------------------------------------------------------------------------------------------

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Sends each member its message and waits for the replies.

        Args:
            messages: At most one for each member; their nodes are members' numbers.
            timeout: Seconds after which no further reply is waited for; None waits for all.

        Returns:
            The replies that came, in the order of the messages; a member that refused the job has none, nor has one
            that has not been connected for a minute where others answered. While the relay is away nobody is late:
            that time does not count.

        Raises:
            RunOverError: The relay has ended the run, or was started anew.
            RunError: The relay did not answer for longer than ``relay_wait_s``.
            KeyboardInterrupt: It was told to stop while the relay was away.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        asked = {message.metadata.dst_node_id: message for message in messages}
        replies: dict[int, Message] = {}
        broadcast = self._broadcast(asked)
        for number in asked:
            # A new request has its own patience, and no answer to an older one is an answer to it.
            self._lines[number].asked.clear()
            self._lines[number].due, self._lines[number].patience = 0.0, _FIRST_PATIENCE_S
        self._look = 0.0
        while open_ := {n: asked[n] for n in asked if n not in replies and not self._lines[n].refused}:
            began = time.monotonic()
            if heard := self._turn(open_, broadcast):
                replies |= heard
                continue
            if self._silent is not None:
                deadline = None if deadline is None else deadline + time.monotonic() - began
                continue
            # If nobody is there, it is the relay or the gateway that is away: then all of them are waited for.
            if replies and all(self._is_gone(self._lines[number]) for number in open_):
                break
            if deadline is not None and time.monotonic() > deadline:
                break
            # A relay that answers slowly has work to do; asking it takes half of its time at most.
            time.sleep(min(10 * _POLL_S, max(_POLL_S, time.monotonic() - began)))
        return [replies[number] for number in asked if number in replies]

    def _broadcast(self, asked: Mapping[int, Message]) -> _Shared | None:
        """Encrypts what all requests share, once (guarantee G20)."""
        shared = {id(message.content.get("arrays")): message for message in asked.values()}
        if len(shared) != 1:
            return None
        (message,) = shared.values()
        arrays = {name: record for name, record in _parts_of(message.content)[1].items() if name == "arrays"}
        return _Shared(self._epoch.broadcast(_round_of(message), *pack({}, arrays))) if arrays else None

    def _turn(self, wanted: Mapping[int, Message | None], broadcast: _Shared | None = None) -> dict[int, Message]:
        """Hears what has come, and says what is due, to each member that something is wanted of.

        Args:
            wanted: The request for each member, or None where it only has to get ready.
            broadcast: What the requests share.

        Returns:
            The replies that came.
        """
        replies: dict[int, Message] = {}
        try:
            lines = {message_id: self._lines[number] for number in wanted for message_id in self._lines[number].asked}
            for reply in self._relay.pull(list(lines)):
                line = lines.get(reply.metadata.reply_to_message_id)
                if line is None:
                    _log.warning("the relay handed over a reply to nothing that was asked")
                    continue
                answer = self._hear(line, reply, wanted[line.member.number])
                if answer is not None:
                    replies[line.member.number] = answer
            rest = [self._lines[number] for number in wanted if number not in replies]
            self._see(rest)
            said = []
            for line in [line for line in rest if self._is_due(line, wanted[line.member.number])]:
                if line.member.node_id in self._there:
                    said.append((line, *self._say(line, wanted[line.member.number], broadcast)))
                else:
                    line.word, line.due = "not connected", time.monotonic() + _PAUSE_S
            # All at once: what they share crosses to the relay once.
            ids = self._relay.push([message for *_, message in said]) if said else []
            for (line, kind, _), message_id in zip(said, ids, strict=False):
                if message_id:
                    line.asked[message_id] = kind
            self._hear_relay()
        except RunOverError:
            raise
        except (httpx.HTTPError, OSError, RunError) as error:
            # The relay is away. Half of what was said may be lost with it, so all of it is said again.
            self._miss_relay(error)
            for number in wanted:
                self._lines[number].due = 0.0
            self._look = 0.0
            time.sleep(_PAUSE_S)
        return replies

    def _hear_relay(self) -> None:
        if self._silent is None:
            return
        away, self._silent = time.monotonic() - self._silent, None
        _log.warning("the relay answers again, after %.0f s; the job goes on", away)
        # Nobody could be connected meanwhile.
        for line in self._lines.values():
            line.away = None if line.away is None else line.away + away

    def _miss_relay(self, error: Exception) -> None:
        now = time.monotonic()
        if self._silent is None:
            self._silent, self._told = now, -math.inf
        silent = now - self._silent
        if self._stopping():
            raise KeyboardInterrupt
        if silent > self._relay_wait_s:
            raise RunError(
                f"expected the relay to answer within {self._relay_wait_s:g} s, got silence ({error}); start it (tacit "
                "server start), then go on with the job: tacit server run --resume"
            ) from None
        if now - self._told >= _STILL_AWAY_S:
            self._told = now
            _log.warning(
                "the relay has not answered for %.0f s (%s); waiting for it: is tacit server start on?", silent, error
            )

    def _see(self, lines: Iterable[_Line]) -> None:
        """Looks who is there, now and then; a node that has come anew is told again at once what it is to do."""
        now = time.monotonic()
        if now < self._look:
            return
        self._there, self._look = self._relay.nodes(), now + _LOOK_S
        for line in self._lines.values():
            connected = line.member.node_id in self._there
            line.away = None if connected else now if line.away is None else line.away
        for line in lines:
            came = self._there.get(line.member.node_id, "")
            if line.asked and came and came != line.came:
                line.due, line.patience = 0.0, _FIRST_PATIENCE_S

    def _is_gone(self, line: _Line) -> bool:
        return line.away is not None and time.monotonic() - line.away > _MOST_AWAY_S

    def _is_due(self, line: _Line, request: Message | None) -> bool:
        silent = request is None and self._papers is None
        if line.refused or (line.agreed and line.session is not None and silent):
            return False
        return time.monotonic() >= line.due

    def _say(self, line: _Line, request: Message | None, broadcast: _Shared | None) -> tuple[str, Message]:
        """Returns what comes next in a member's conversation: its kind, and the message."""
        session, pieces = line.session, dict[str, bytes]()
        shared: ArrayRecord | ConfigRecord | None = None
        if session is None:
            kind, pieces["hello"] = "hello", self._epoch.hello(line.member.public_key)
        else:
            if line.accept:
                pieces["accept"] = line.accept
            if line.agreed and request is None:
                kind = PAPERS
                pieces["message"] = bytes(session.seal(PAPERS, 0))
            elif not line.agreed or request is None:
                kind = TERMS
                pieces["message"] = bytes(session.seal(TERMS, 0, self._terms.to_json().encode()))
            else:
                kind, number = ROUND, _round_of(request)
                configs, arrays = _parts_of(request.content)
                if broadcast is not None:
                    arrays.pop("arrays", None)
                    pieces["wrap"], shared = bytes(session.wrap(broadcast.broadcast)), broadcast.record
                pieces["message"] = bytes(session.seal(ROUND, number, *pack(configs, arrays)))
        short = {name: piece for name, piece in pieces.items() if len(piece) <= _SHORT_BYTES}
        content = RecordDict({SEALED: ConfigRecord(dict(short))})
        if long := {name: _row(piece) for name, piece in pieces.items() if name not in short}:
            content[LONG] = ArrayRecord(long)
        if shared is not None:
            content[SHARED] = shared
        message = Message(content, line.member.node_id, "train", ttl=_TTL_S)
        line.came = self._there.get(line.member.node_id, "")
        line.due, line.patience = time.monotonic() + line.patience, min(_LONGEST_PATIENCE_S, 2 * line.patience)
        return kind, message

    def _hear(self, line: _Line, reply: Message, request: Message | None) -> Message | None:
        """Takes a reply, trusting none of it; returns the answer to the request if it is one."""
        kind = line.asked.pop(reply.metadata.reply_to_message_id, "")
        try:
            pieces = _pieces_of(reply.content) if reply.has_content() else {}
            if kind == "hello" and line.session is None:
                line.session, line.accept = self._epoch.accept(line.member.public_key, pieces.get("offer", b""))
                # Older answers belong to an older session.
                line.asked.clear()
                line.word, line.due, line.patience = "in session", 0.0, _FIRST_PATIENCE_S
                return None
            if line.session is None or not kind:
                return None
            if LOST in pieces or "message" not in pieces:
                line.word = "lost the session"
                line.forget()
                return None
            opened = line.session.read(pieces["message"])
            # It has opened something of ours, so it has the session.
            line.accept, line.patience = b"", _FIRST_PATIENCE_S
            if (opened.kind, kind) == (WORD, TERMS):
                line.word = bytes(opened.body[:16]).decode(errors="replace")
                line.agreed, line.refused = line.word == "ready", line.word in _FINAL
                line.due = 0.0 if line.agreed else time.monotonic() + _WAITING_S
                return None
            if opened.kind == kind == PAPERS and self._papers is not None:
                self._papers[line.member.name] = _papers_of(opened.body)
                return None
            if (opened.kind, kind) == (REPLY, ROUND) and request is not None and opened.round == _round_of(request):
                line.word = "answered"
                packet = unpack(opened.body, max_bytes=MOST_BYTES)
                return Message(_records_of(packet), reply_to=request)
        except (SealError, PlanError, ValueError, TypeError, RecursionError) as error:
            # What does not open was lost, or was never its: the next attempt is another message.
            line.word, line.due = "said something else", min(line.due, time.monotonic() + _PAUSE_S)
            _log.warning("a reply of %s was not taken: %s", line.member.name, error)
        return None


def _papers_of(body: bytes | memoryview) -> dict[str, Any]:
    """Returns a member's papers, which nothing later can choke on; whether they are true is seen in the report.

    Papers that are none are none: the member is not asked again, and the report says that they are missing.
    """
    try:
        papers = json.loads(bytes(body)) if len(body) <= _MOST_PAPERS_BYTES else {}
        return papers if isinstance(papers, dict) and canonical(papers) == bytes(body) else {}
    except (ValueError, RecursionError):
        return {}


def _round_of(message: Message) -> int:
    return int(message.metadata.group_id or 0)


def _pieces_of(content: RecordDict) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for record in content.values():
        if isinstance(record, ConfigRecord):
            found |= {name: piece for name, piece in record.items() if isinstance(piece, bytes)}
        elif isinstance(record, ArrayRecord):
            found |= {name: array.data for name, array in record.items()}
    return found


def _row(piece: bytes | memoryview) -> Array:
    return Array("uint8", (len(piece),), "numpy.ndarray", bytes(piece))


def _parts_of(content: RecordDict) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Floats]]]:
    configs = {name: dict(record) for name, record in content.items() if isinstance(record, ConfigRecord)}
    arrays = {
        name: {key: floats_of(array.data, tuple(array.shape), key) for key, array in record.items()}
        for name, record in content.items()
        if isinstance(record, ArrayRecord)
    }
    return configs, arrays


def _records_of(packet: Packet) -> RecordDict:
    content = RecordDict({name: ConfigRecord(dict(record)) for name, record in packet.configs.items()})
    for name, record in packet.arrays.items():
        content[name] = ArrayRecord(
            {key: Array("float32", floats.shape, "numpy.ndarray", array_of(floats)) for key, floats in record.items()}
        )
    return content
