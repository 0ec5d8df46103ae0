"""One HTTP hop at the border: strict and bounded, the same for the gateway, the tunnel and what they dial.

A SuperNode speaks HTTP/1.1 with a SuperLink. Between the two stand our tunnel and our gateway, and neither passes bytes
on: each reads a whole request with one parser (h11), checks it against a short list of what may cross, and writes a
new one from the parts it kept. Where two parsers never read the same bytes, they cannot disagree about them, so there
is nothing to smuggle (CWE-444). The rules a peer must keep are in docs/protocol-gateway.md.

Everything is bounded: the head, the body, the time for each, and the memory that all bodies together may take.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final, final

import h11

from privacy.errors import PlanError
from privacy.vault import private

# What may cross, to the letter (Flower 1.41, `flwr.superlink.routers.fleet.router`). Not a prefix: a prefix would let
# /v1/fleet/../control pass whoever normalises paths behind us, and whatever Flower adds under it.
FLEET: Final = frozenset(
    f"/v1/fleet/{call}".encode()
    for call in (
        "register-node",
        "activate-node",
        "deactivate-node",
        "unregister-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
PULL: Final = b"/v1/fleet/pull-messages"
# Header fields that cross. Flower's peers read no others; hop-by-hop fields and the framing are made anew.
_ASKED: Final = frozenset(
    (
        b"accept",
        b"content-type",
        b"flwr-component-name",
        b"flwr-package-name",
        b"flwr-package-version",
        b"flwr-public-key",
        b"flwr-signature",
        b"flwr-timestamp",
    )
)
_ANSWERED: Final = frozenset((b"content-type",))
# Set by a gateway or tunnel that answers for itself; never copied from what stands behind it.
REFUSAL: Final = b"tacit-refusal"
_LENGTH: Final = re.compile(rb"0|[1-9][0-9]{0,11}")
_READ: Final = 1 << 18
_READ_HEAD: Final = 1 << 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one peer may take of us.

    Attributes:
        head_bytes: Longest request or status line with its header fields; one read of 4 KiB may come on top.
        body_bytes: Longest body. Flower cuts arrays into objects of 5 MiB, so 16 MiB lets everything of ours through.
        room_bytes: Bytes of all bodies together that are under way (each is held twice for a moment); whoever finds no
            room waits. The gateway allows twice as many for requests.
        head_s: Seconds from the first byte of a head to its last.
        idle_s: Seconds a connection may stay open between two requests.
        body_s: Seconds a body may take on top of one second per ``floor_bytes`` of it.
        floor_bytes: Slowest rate of a body, bytes per second.
        answer_s: Seconds to wait for the first byte of an answer.
    """

    head_bytes: int = 16 << 10
    body_bytes: int = 16 << 20
    room_bytes: int = 128 << 20
    head_s: float = 10.0
    idle_s: float = 75.0
    body_s: float = 10.0
    floor_bytes: int = 32 << 10
    answer_s: float = 30.0

    def body_time(self, size: int) -> float:
        """Returns the seconds in which a body of ``size`` bytes must have crossed."""
        return self.body_s + size / self.floor_bytes


@dataclasses.dataclass(frozen=True)
class Crossing:
    """What may cross a hop, to the letter.

    Attributes:
        paths: Paths that may be posted to.
        content: The content type that every request must have.
        fields: Header fields that cross, lower-case.
    """

    paths: frozenset[bytes]
    content: bytes
    fields: frozenset[bytes]


FLEET_CALLS: Final = Crossing(FLEET, b"application/protobuf", _ASKED)


@dataclasses.dataclass(frozen=True)
class Request:
    """A request that may cross: POST to one of the paths of a `Crossing`.

    Attributes:
        path: One of its paths.
        fields: Header fields that cross, lower-case name to value.
        body: The body, whole.
    """

    path: bytes
    fields: Mapping[bytes, bytes]
    body: bytes


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        status: HTTP status, 200 to 599.
        fields: Header fields that cross.
        body: The body, whole.
    """

    status: int
    fields: Mapping[bytes, bytes]
    body: bytes


class Refused(Exception):  # noqa: N818 -- an answer, not a fault of ours
    """A peer broke a rule, or asked for what is not there.

    Attributes:
        status: HTTP status to answer with.
        word: One of a fixed list of words; never something the peer sent.
    """

    def __init__(self, status: int, word: str) -> None:
        super().__init__(f"{status} {word}")
        self.status = status
        self.word = word

    def answer(self) -> Answer:
        """Returns what to tell the peer."""
        return Answer(self.status, {b"content-type": b"text/plain", REFUSAL: self.word.encode()}, self.word.encode())


class Gone(Exception):  # noqa: N818 -- a peer may leave
    """The peer closed the connection, or took too long to read."""


@final
class Room:
    """Memory that bodies share: taken before a body is read, given back when it has been sent.

    Args:
        size: Bytes.
        within: A larger room that this one is a share of.
    """

    def __init__(self, size: int, within: Room | None = None) -> None:
        self._size = size
        self._used = 0
        self._within = within
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    def _fits(self, size: int) -> bool:
        # One body larger than the whole room may have it alone: limits on bodies are checked elsewhere.
        return self._used + size <= self._size or self._used == 0

    def _give_back(self, size: int) -> None:
        self._used -= size
        while self._waiting and (self._fits(self._waiting[0][0]) or self._waiting[0][1].done()):
            wanted, turn = self._waiting.popleft()
            if not turn.done():
                self._used += wanted
                turn.set_result(None)

    @contextlib.asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        """Holds ``size`` bytes of room for the body of the ``with`` statement; waits in turn while others hold it."""
        if self._waiting or not self._fits(size):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((size, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give_back(size)
                raise
        else:
            self._used += size
        try:
            if self._within is None:
                yield
            else:
                async with self._within.take(size):
                    yield
        finally:
            self._give_back(size)


def _checked(event: h11.Request, limits: Limits, crossing: Crossing) -> tuple[Request, int]:
    """Checks a head against the rules; returns the request without its body, and the body's size."""
    if event.method != b"POST":
        raise Refused(405, "method")
    if event.target not in crossing.paths:
        raise Refused(404, "path")
    if event.http_version != b"1.1":
        raise Refused(505, "version")
    fields: dict[bytes, bytes] = {}
    for name, value in event.headers:
        if name in fields:
            raise Refused(400, "repeated field")
        fields[name] = value
    # h11 follows the standard and merges equal lengths, prefers chunks and accepts HTTP upgrades; we need none of it.
    if b"transfer-encoding" in fields or b"upgrade" in fields or b"expect" in fields or b"te" in fields:
        raise Refused(400, "framing")
    if b"host" not in fields:
        raise Refused(400, "host")
    if fields.get(b"connection", b"keep-alive").lower() not in (b"keep-alive", b"close"):
        raise Refused(400, "framing")
    if fields.get(b"content-type") != crossing.content:
        raise Refused(415, "type")
    if fields.get(b"content-encoding", b"identity") != b"identity":
        raise Refused(415, "encoding")
    length = fields.get(b"content-length", b"")
    if not _LENGTH.fullmatch(length):
        raise Refused(411, "length")
    if int(length) > limits.body_bytes:
        raise Refused(413, "size")
    kept = {name: value for name, value in fields.items() if name in crossing.fields}
    return Request(event.target, kept, b""), int(length)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Writes in pieces: asyncio's TLS takes one write of any size at once, and holds back the next ones only."""
    view = memoryview(data)
    for start in range(0, len(view), _READ):
        writer.write(view[start : start + _READ])
        await writer.drain()


@final
class Asked:
    """The answering end of one connection: reads requests, one at a time, and writes their answers."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limits: Limits,
        room: Room,
        crossing: Crossing = FLEET_CALLS,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._limits = limits
        self._room = room
        self._crossing = crossing
        self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head_bytes)
        self.closing = False

    async def _event(self, deadline: float) -> h11.Event | None:
        """Returns the next event, or None at a clean end; the deadline is a time of the loop's clock."""
        while True:
            try:
                event = self._parser.next_event()
            except h11.RemoteProtocolError as error:
                raise Refused(431 if error.error_status_hint == 431 else 400, "syntax") from None
            if isinstance(event, h11.ConnectionClosed):
                return None
            if event is h11.PAUSED:
                raise Refused(400, "pipelining")
            if event is not h11.NEED_DATA:
                assert isinstance(event, h11.Request | h11.Data | h11.EndOfMessage)  # noqa: S101 -- for the type checker
                return event
            try:
                async with asyncio.timeout_at(deadline):
                    # The parser bounds what is still incomplete, so a head must come in small pieces.
                    inside = self._parser.their_state is h11.SEND_BODY
                    data = await self._reader.read(_READ if inside else _READ_HEAD)
            except TimeoutError:
                raise Refused(408, "time") from None
            except (OSError, ssl.SSLError):
                return None
            if not data and self._parser.their_state is not h11.IDLE:
                raise Gone from None
            self._parser.receive_data(data)

    @contextlib.asynccontextmanager
    async def next(self) -> AsyncIterator[Request | None]:
        """Yields the next request, or None when the peer is done; room for its body is held meanwhile.

        Raises:
            Refused: The peer broke a rule; answer and close.
            Gone: It left in the middle.
        """
        clock = asyncio.get_running_loop()
        if self._parser.our_state is h11.DONE:
            self._parser.start_next_cycle()
        # Silence between two requests is no fault: it ends the connection without an answer.
        try:
            async with asyncio.timeout(self._limits.idle_s):
                data = await self._reader.read(_READ_HEAD)
        except OSError:  # a time-out is one too
            data = b""
        if not data:
            yield None
            return
        self._parser.receive_data(data)
        head = await self._event(clock.time() + self._limits.head_s)
        if not isinstance(head, h11.Request):
            yield None
            return
        request, size = _checked(head, self._limits, self._crossing)
        deadline = clock.time() + self._limits.body_time(size)
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout_at(deadline):
                    await stack.enter_async_context(self._room.take(size))
            except TimeoutError:
                raise Refused(503, "busy") from None
            body = bytearray()
            while not isinstance(event := await self._event(deadline), h11.EndOfMessage):
                if not isinstance(event, h11.Data):
                    raise Gone
                body += event.data
            if self._parser.trailing_data[0]:
                raise Refused(400, "pipelining")
            self.closing = self._parser.their_state is h11.MUST_CLOSE
            request = dataclasses.replace(request, body=bytes(body))
            del body  # not held twice while the answer is awaited
            yield request

    async def left(self) -> None:
        """Returns when the peer leaves, or sends something while its answer is still due (which it must not)."""
        with contextlib.suppress(OSError):
            await self._reader.read(1)

    async def write(self, answer: Answer, *, close: bool = False) -> None:
        """Sends an answer.

        Raises:
            Gone: The peer left, or does not read.
        """
        self.closing = self.closing or close
        fields = {
            **answer.fields,
            b"content-length": b"%d" % len(answer.body),
            b"connection": b"close" if self.closing else b"keep-alive",
        }
        try:
            head = self._parser.send(h11.Response(status_code=answer.status, headers=list(fields.items())))
            body = self._parser.send(h11.Data(data=answer.body))
            self._parser.send(h11.EndOfMessage())
            async with asyncio.timeout(self._limits.body_time(len(answer.body))):
                await _send(self._writer, (head or b"") + (body or b""))
        except (OSError, h11.LocalProtocolError):  # a time-out is an OSError
            raise Gone from None


@final
class _Link:
    """The asking end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limits: Limits) -> None:
        self._reader = reader
        self.writer = writer
        self._limits = limits
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=limits.head_bytes)
        self.used = 0.0
        self.answered = False

    async def exchange(
        self, request: Request, host: bytes, wait_s: float, room: Room, stack: contextlib.AsyncExitStack
    ) -> Answer:
        """Sends a request and returns its answer; room for the answer is held until ``stack`` is closed."""
        self.answered = False
        fields = {**request.fields, b"host": host, b"content-length": b"%d" % len(request.body)}
        head = h11.Request(method=b"POST", target=request.path, headers=list(fields.items()))
        clock = asyncio.get_running_loop()
        async with asyncio.timeout(self._limits.body_time(len(request.body))):
            data = (self._parser.send(head) or b"") + (self._parser.send(h11.Data(data=request.body)) or b"")
            self._parser.send(h11.EndOfMessage())
            await _send(self.writer, data)
        body: bytearray | None = None
        got: h11.Response | None = None
        deadline = clock.time() + wait_s
        while True:
            event = self._parser.next_event()
            if event is h11.NEED_DATA:
                async with asyncio.timeout_at(deadline):
                    data = await self._reader.read(_READ)
                self.answered = self.answered or bool(data)
                self._parser.receive_data(data)
            elif isinstance(event, h11.Response):
                got = event
                length = dict(event.headers).get(b"content-length", b"")
                if not _LENGTH.fullmatch(length) or int(length) > self._limits.body_bytes:
                    raise Refused(502, "answer")
                deadline = clock.time() + self._limits.body_time(int(length))
                async with asyncio.timeout_at(deadline):
                    await stack.enter_async_context(room.take(int(length)))
                body = bytearray()
            elif isinstance(event, h11.Data) and body is not None:
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and got is not None and body is not None:
                break
            elif not isinstance(event, h11.InformationalResponse):
                raise ConnectionResetError
        self.used = time.monotonic()
        if self._parser.our_state is h11.DONE and self._parser.their_state is h11.DONE:
            self._parser.start_next_cycle()
        else:
            self.close()
        crossing = {name: value for name, value in got.headers if name in _ANSWERED or name == REFUSAL}
        return Answer(got.status_code, crossing, bytes(body))

    def fresh(self, keep_s: float) -> bool:
        """Says whether it may be used again."""
        idle = time.monotonic() - self.used
        return not self.writer.is_closing() and not self._reader.at_eof() and idle < keep_s

    def close(self) -> None:
        self.writer.close()


@final
class Pool:
    """Connections to one place, used one request at a time and kept for the next.

    Args:
        dial: Opens a connection.
        host: Value of the Host field.
        limits: Bounds on what comes back.
        most: Most connections at once; more requests wait.
        keep_s: Seconds to keep an idle one; less than the other side does (uvicorn: 5).
    """

    def __init__(
        self,
        dial: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]],
        host: str,
        limits: Limits,
        most: int = 16,
        keep_s: float = 4.0,
    ) -> None:
        self._keep_s = keep_s
        self._dial = dial
        self._host = host.encode("ascii")
        self._limits = limits
        self._turn = asyncio.Semaphore(most)
        self._idle: list[_Link] = []
        self._room = Room(limits.room_bytes)

    @contextlib.asynccontextmanager
    async def exchange(self, request: Request, wait_s: float | None = None) -> AsyncIterator[Answer]:
        """Sends a request and yields the answer; room for the answer is held meanwhile.

        A kept connection that turns out to be dead before the first byte of an answer is replaced once.

        Raises:
            Refused: 502 if nothing can be reached, the connection breaks or the answer is against the rules; 504 if
                none comes in time.
        """
        wait_s = self._limits.answer_s if wait_s is None else wait_s
        async with contextlib.AsyncExitStack() as stack:
            async with self._turn:
                answer = await self._exchange(request, wait_s, stack)
            yield answer

    async def _exchange(self, request: Request, wait_s: float, stack: contextlib.AsyncExitStack) -> Answer:
        link: _Link | None = None
        done = False
        try:
            while True:
                while self._idle and link is None:
                    link = self._idle.pop()
                    if not link.fresh(self._keep_s):
                        link.close()
                        link = None
                reused = link is not None
                if link is None:
                    try:
                        reader, writer = await self._dial()
                    except OSError:
                        raise Refused(502, "unreachable") from None
                    link = _Link(reader, writer, self._limits)
                try:
                    answer = await link.exchange(request, self._host, wait_s, self._room, stack)
                except TimeoutError:
                    raise
                except (OSError, h11.ProtocolError):
                    if reused and not link.answered:
                        link.close()
                        link = None
                        continue
                    raise
                done = True
                if link.fresh(self._keep_s):
                    self._idle.append(link)
                return answer
        except TimeoutError:
            raise Refused(504, "time") from None
        except (OSError, h11.ProtocolError):
            raise Refused(502, "cut") from None
        finally:
            if link is not None and not done:
                link.close()

    def close(self) -> None:
        """Closes what is kept."""
        while self._idle:
            self._idle.pop().close()


def loopback(host: str) -> bool:
    """Says whether a host is this machine: ``localhost``, or an address and not a name that looks like one."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def watch(connection: socket.socket) -> None:
    """Makes a connection whose other end has vanished fail after some 15 s, also while nobody sends.

    A held poll is silent for longer than that, and a cut link says nothing to either side.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 5),
        ("TCP_KEEPINTVL", 3),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 15_000),  # milliseconds
    ):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def present(context: ssl.SSLContext, certificate: Path, key: Path | bytes) -> None:
    """Gives a TLS context our certificate and key.

    Args:
        context: TLS context.
        certificate: Chain in PEM; with the key in the same file, it may be sealed.
        key: Private key in PEM: a file, sealed or not, or bytes. OpenSSL reads keys from files only, so what is not in
            clear on disk goes through an anonymous file in memory; it never touches a disk.

    Raises:
        PlanError: They cannot be read, or do not belong together.
        VaultError: They are sealed, and do not open.
    """
    try:
        content = key if isinstance(key, bytes) else private.read(key)
        with private.anonymous(content) as descriptor:
            name = f"/proc/self/fd/{descriptor}"
            context.load_cert_chain(name if certificate == key else certificate, name)
    except (OSError, ssl.SSLError):
        raise PlanError(
            f"expected a certificate and its private key at {certificate}, got something else; renew it or enrol again"
        ) from None


def trust(context: ssl.SSLContext, authority: Path) -> None:
    """Makes one certificate authority the only one that a TLS context believes, and TLS 1.3 its only version.

    Raises:
        PlanError: The file holds no certificate.
    """
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError):
        raise PlanError(f"expected a certificate authority in PEM at {authority}, got something else") from None
