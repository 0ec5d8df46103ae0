"""A door for enrolled clients: TLS 1.3 with certificates on both sides, bounded in everything, one request at a time.

What stands behind it differs: the gateway to a relay (`server.gateway`), the service that answers encrypted questions
(`server.inference`). Who comes in does not: whoever shows a certificate of our authority whose name is a member's, for
as long as it is, at every request and every second in between. What a stranger can use up is bounded before TLS ends:
connections, handshakes in progress, and half of those from one address.
"""

from __future__ import annotations

import abc
import asyncio
import collections
import contextlib
import dataclasses
import logging
import signal
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from privacy.errors import PlanError, RunError
from privacy.hop import FLEET_CALLS, Asked, Crossing, Gone, Limits, Refused, Request, Room, present, trust, watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where a door stands, and what a client may take of us.

    Attributes:
        host: Address to listen on; empty for all of IPv4, ``::`` for all of both.
        port: Port to listen on; 0 for any free one.
        certificate: Our certificate chain, PEM. When the file changes, new connections get the new one.
        key: Its private key, PEM; a file, or bytes from a vault.
        authority: The certificate authority of both sides, PEM.
        limits: Bounds on what a client may take.
        connections: Most connections at once; further ones are closed.
        per_client: Most connections of one client. A tunnel uses up to 4.
        handshakes: Most TLS handshakes in progress, and half of them from one address.
        handshake_s: Seconds that one may take.
        recheck_s: Seconds after which a revoked client's open connections are closed at the latest.
    """

    host: str
    port: int
    certificate: Path
    key: Path | bytes
    authority: Path
    limits: Limits = dataclasses.field(default_factory=Limits)
    connections: int = 1024
    per_client: int = 8
    handshakes: int = 64
    handshake_s: float = 5.0
    recheck_s: float = 1.0


@dataclasses.dataclass(eq=False)
class Visitor:
    """An open connection of an enrolled client.

    Attributes:
        name: The client's enrolled name.
        certificate: What it showed, DER.
        expires: When that ends, seconds since 1970.
        writer: The connection.
        task: What answers its request now; None between requests.
    """

    name: str
    certificate: bytes
    expires: float
    writer: asyncio.StreamWriter
    task: asyncio.Task[None] | None


class Doorway(abc.ABC):
    """Lets enrolled clients in, one request at a time.

    Args:
        door: Where it stands.
        is_member: Given a client's certificate (DER, already verified against the authority), returns the client's
            name, or None if it is revoked or unknown. Asked for every connection, every request, and every
            ``recheck_s`` seconds for connections that stand open, so it must be quick. An error counts as None.
    """

    crossing: ClassVar[Crossing] = FLEET_CALLS
    """What may be asked."""
    log: ClassVar[logging.Logger] = logging.getLogger("tacit.door")
    """Where words and names go; never what was asked."""

    def __init__(self, door: Threshold, is_member: Callable[[bytes], str | None]) -> None:
        self._threshold = door
        self._is_member = is_member
        self._context = self._make_context()
        self._stamp = self._stamped()
        self._open: set[Visitor] = set()
        self._greeting: collections.Counter[str] = collections.Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._rooms: dict[str, Room] = {}
        self._room: Room | None = None
        self._socket: socket.socket | None = None
        self._closing = False
        self.counters: collections.Counter[str] = collections.Counter()
        """How often what happened, by word: no names, no sizes."""

    def _make_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trust(context, self._threshold.authority)
        present(context, self._threshold.certificate, self._threshold.key)
        # No tickets: a resumed session would skip the check of the client's certificate.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
        return context

    def _stamped(self) -> tuple[int, ...]:
        files = [self._threshold.certificate, self._threshold.authority]
        with contextlib.suppress(OSError):
            return tuple(value for file in files for value in (file.stat().st_mtime_ns, file.stat().st_ino))
        return ()

    @property
    def port(self) -> int:
        """The port it listens on."""
        if self._socket is None:
            raise RunError("expected a started door, got one that does not listen; start it first")
        return int(self._socket.getsockname()[1])

    @property
    def clients(self) -> Mapping[str, int]:
        """Open connections by client."""
        return collections.Counter(client.name for client in self._open)

    async def start(self) -> None:
        """Listens.

        Raises:
            RunError: The address cannot be had.
        """
        door = self._threshold
        self._room = Room(2 * door.limits.room_bytes)
        try:
            family = socket.AF_INET6 if ":" in door.host else socket.AF_INET
            both = door.host == "::" and socket.has_dualstack_ipv6()
            self._socket = socket.create_server((door.host, door.port), family=family, backlog=128, dualstack_ipv6=both)
            self._socket.setblocking(False)
            await self._prepared()
        except OSError as error:
            raise RunError(
                f"expected to listen on {door.host}:{door.port}, got: {error.strerror}; is another one running?"
            ) from None
        self._begin(self._accept(self._socket))
        self._begin(self._sweep())

    async def _prepared(self) -> None:  # noqa: B027 -- a door may need nothing made ready
        """Makes ready what stands behind the door; called once, before the first connection."""

    @abc.abstractmethod
    async def _answer(self, client: Visitor, asked: Asked, request: Request) -> None:
        """Answers one request of a member.

        Raises:
            Refused: Broke a rule; it is answered, and the connection is closed.
            Gone: The client left.
        """

    def _begin(self, work: collections.abc.Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self, grace_s: float = 3.0) -> None:
        """Stops listening, lets answers that are under way finish, and closes every connection."""
        self._closing = True
        if self._socket is not None:
            self._socket.close()
        deadline = time.monotonic() + grace_s
        for client in list(self._open):
            if client.task is None:
                client.writer.close()
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Who comes in.

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError:
                if self._closing:
                    return
                # No descriptors left, most likely: wait until somebody leaves.
                self.counters["accept failed"] += 1
                await asyncio.sleep(0.1)
                continue
            door, source = self._threshold, str(address[0])
            full = len(self._open) + self._greeting.total() >= door.connections
            crowd = self._greeting.total() >= door.handshakes or self._greeting[source] >= max(1, door.handshakes // 2)
            if full or crowd or self._closing:
                self.counters["turned away"] += 1
                connection.close()
                continue
            self._greeting[source] += 1
            self._begin(self._greet(connection, source))

    async def _greet(self, connection: socket.socket, source: str) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        try:
            try:
                watch(connection)
                transport, _ = await loop.connect_accepted_socket(
                    lambda: protocol,
                    connection,
                    ssl=self._context,
                    ssl_handshake_timeout=self._threshold.handshake_s,
                    ssl_shutdown_timeout=self._threshold.handshake_s,
                )
            except (OSError, ssl.SSLError):
                self.counters["handshake failed"] += 1
                connection.close()
                return
            except BaseException:
                connection.close()
                raise
        finally:
            self._greeting[source] -= 1
            if not self._greeting[source]:
                del self._greeting[source]
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            await self._serve(reader, writer)
        except Exception:
            self.counters["fault"] += 1
            self.log.exception("a connection was closed by a fault of ours")
        finally:
            writer.close()

    def _member(self, certificate: bytes) -> str | None:
        try:
            return self._is_member(certificate)
        except Exception:
            self.log.exception("the registry of members failed; nobody is let in")
            return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) or b""
        expires = ssl.cert_time_to_seconds(str((tls.getpeercert() or {})["notAfter"]))
        name = self._member(certificate)
        door = self._threshold
        assert self._room is not None  # noqa: S101 -- set by start()
        if name is not None and name not in self._rooms:
            self._rooms[name] = Room(2 * door.limits.body_bytes, self._room)
        room = self._rooms[name] if name is not None else Room(0, self._room)
        asked = Asked(reader, writer, door.limits, room, self.crossing)
        crowded = self.clients.get(name, 0) >= door.per_client if name is not None else False
        if name is None or crowded:
            word = "not enrolled" if name is None else "too many connections"
            self.counters[word] += 1
            with contextlib.suppress(Gone):
                await asked.write(Refused(403 if name is None else 503, word).answer(), close=True)
            return
        client = Visitor(name, certificate, expires, writer, None)
        self._open.add(client)
        self.counters["connections"] += 1
        try:
            while not asked.closing and not self._closing:
                async with asked.next() as request:
                    if request is None:
                        return
                    client.task = asyncio.current_task()
                    await self._reply(client, asked, request)
                    client.task = None
        except Refused as refusal:
            self.counters[refusal.word] += 1
            self.log.info("%s: refused, %s", name, refusal.word)
            with contextlib.suppress(Gone):
                await asked.write(refusal.answer(), close=True)
        except (Gone, ConnectionError):
            self.counters["left"] += 1
            # Not closed in peace: that would wait for what the peer does not read.
            writer.transport.abort()
        finally:
            self._open.discard(client)
            if name not in self.clients:
                self._rooms.pop(name, None)

    async def _reply(self, client: Visitor, asked: Asked, request: Request) -> None:
        if self._member(client.certificate) != client.name or client.expires <= time.time():
            raise Refused(403, "not enrolled")
        await self._answer(client, asked, request)

    async def _sweep(self) -> None:
        """Closes connections of clients that are no longer enrolled, and takes up a renewed certificate."""
        while True:
            await asyncio.sleep(self._threshold.recheck_s)
            try:
                self._swept()
            except Exception:
                # Revocation hangs on this loop: it must outlive whatever goes wrong in it.
                self.counters["fault"] += 1
                self.log.exception("a sweep failed and is tried again")

    def _swept(self) -> None:
        now = time.time()
        for client in list(self._open):
            if client.expires <= now or self._member(client.certificate) != client.name:
                self.counters["closed as no longer enrolled"] += 1
                self.log.warning("%s: no longer enrolled, connection closed", client.name)
                client.writer.transport.abort()
        stamp = self._stamped()
        if stamp and stamp != self._stamp:
            self._stamp = stamp
            try:
                self._context = self._make_context()
                self.log.info("a renewed certificate is in use")
            except PlanError as error:
                self.log.error("the renewed certificate is not used: %s", error)


def run(doorway: Doorway, started: Callable[[], None] = lambda: None) -> None:
    """Runs a door until the process is told to stop (SIGINT or SIGTERM).

    Args:
        doorway: Not started yet.
        started: Called once it listens.
    """

    async def main() -> None:
        stop = asyncio.Event()
        for word in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(word, stop.set)
        await doorway.start()
        started()
        await stop.wait()
        await doorway.close()

    asyncio.run(main())
