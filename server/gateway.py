"""The gateway: the one door of the server's machine that data holders reach, and nothing behind it but the fleet.

    SuperNode -> tunnel  == TLS 1.3, both sides with certificates of our authority ==>  gateway -> SuperLink on loopback

A SuperLink serves its fleet, control and runtime interfaces on one port, the latter two without authentication, and
asks no client for a certificate. So it listens on loopback, and this process in front of it lets in who is enrolled,
for as long as it is, and lets through what `privacy.hop` allows: twelve paths, to the letter.

A SuperNode that finds no message sleeps 3 s. The gateway therefore answers an empty ``pull-messages`` late: it asks the
SuperLink again when somebody says that there is something (a datagram to ``wake``), or after a while, and gives up
before the SuperNode would. And it remembers the last message it handed out until the node shows that it came: a
SuperLink hands a message out once only, so one lost on the wire would be lost for the round.

What it sees: sealed messages, sizes, times, and who they are from. It logs the last three.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, final

from privacy.errors import PlanError, RunError
from privacy.hop import PULL, Answer, Asked, Gone, Limits, Pool, Refused, Request, Room, loopback, present, trust, watch

_log: Final = logging.getLogger("tacit.gateway")
_PUBLIC_KEY: Final = b"flwr-public-key"
_ACTIVATE: Final = b"/v1/fleet/activate-node"
_DEACTIVATE: Final = b"/v1/fleet/deactivate-node"
# Requests that only a node makes which has the message that it was handed.
_RECEIPTS: Final = frozenset(
    b"/v1/fleet/" + call for call in (b"get-run", b"get-fab", b"pull-object", b"confirm-message-received")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Door:
    """Where a gateway stands.

    Attributes:
        host: Address to listen on; empty for all of IPv4, ``::`` for all of both.
        port: Port to listen on; 0 for any free one.
        certificate: Our certificate chain, PEM. When the file changes, new connections get the new one.
        key: Its private key, PEM; a file, or bytes from a vault.
        authority: The certificate authority of both sides, PEM.
        upstream_host: Where the SuperLink listens; a loopback address.
        upstream_port: Its port.
        upstream_authority: The authority of the SuperLink's own certificate, PEM, where it has one: with its
            ``--enable-supernode-auth`` it insists on TLS, on loopback too. None for plain HTTP.
        wake: A path for a datagram socket; whatever arrives there says that the SuperLink may have messages. Only our
            own user can write to it. None to ask again on time alone.
        wake_group: A group that can write to it too, where the server application runs as another user, so that its
            keys are apart from the relay (guarantee G21).
        limits: Bounds on what a client may take.
        connections: Most connections at once; further ones are closed.
        per_client: Most connections of one client. A tunnel uses up to 4.
        handshakes: Most TLS handshakes in progress, and half of them from one address.
        handshake_s: Seconds that one may take.
        hold_s: Seconds to hold an empty ``pull-messages``; a SuperNode waits 30.
        again_s: Seconds after which a held one is asked again if nobody wakes us meanwhile. Every client costs the
            SuperLink a request in that time, some 10 ms of a core: with a hundred clients, 3 s cost a third of one.
        recheck_s: Seconds after which a revoked client's open connections are closed at the latest.
    """

    host: str
    port: int
    certificate: Path
    key: Path | bytes
    authority: Path
    upstream_host: str = "127.0.0.1"
    upstream_port: int = 8000
    upstream_authority: Path | None = None
    wake: Path | None = None
    wake_group: int | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)
    connections: int = 1024
    per_client: int = 8
    handshakes: int = 64
    handshake_s: float = 5.0
    hold_s: float = 20.0
    again_s: float = 3.0
    recheck_s: float = 1.0


@dataclasses.dataclass(eq=False)
class _Client:
    """An open connection of an enrolled client."""

    name: str
    certificate: bytes
    expires: float
    writer: asyncio.StreamWriter
    task: asyncio.Task[None] | None


@final
class Gateway:
    """Lets enrolled clients through to the fleet interface of a SuperLink.

    Args:
        door: Where it stands.
        is_member: Given a client's certificate (DER, already verified against the authority), returns the client's
            name, or None if it is revoked or unknown. Asked for every connection, every request, and every
            ``recheck_s`` seconds for connections that stand open, so it must be quick. An error counts as None.
        node_key: Given a client's name, returns the value that its ``flwr-public-key`` field must have, or None where
            any will do. It ties a client's certificate to its SuperNode's key: Flower itself does not know of both.
    """

    def __init__(
        self,
        door: Door,
        is_member: Callable[[bytes], str | None],
        node_key: Callable[[str], bytes | None] = lambda name: None,
    ) -> None:
        if not loopback(door.upstream_host):
            raise PlanError(
                f"expected the SuperLink on a loopback address, got {door.upstream_host}; its other interfaces are open"
            )
        self._door = door
        self._is_member = is_member
        self._node_key = node_key
        self._context = self._make_context()
        self._stamp = self._stamped()
        self._open: set[_Client] = set()
        self._greeting: collections.Counter[str] = collections.Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._kept: dict[tuple[str, bytes], tuple[float, Answer]] = {}
        # Per client the key of its SuperNode and its last poll, which names the node.
        self._nodes: dict[str, tuple[bytes, bytes]] = {}
        self._rooms: dict[str, Room] = {}
        self._room: Room | None = None
        self._pool: Pool | None = None
        self._socket: socket.socket | None = None
        self._bell: asyncio.DatagramTransport | None = None
        self._rung: asyncio.Event = asyncio.Event()
        self._closing = False
        self.counters: collections.Counter[str] = collections.Counter()
        """How often what happened, by word: no names, no sizes."""

    def _make_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trust(context, self._door.authority)
        present(context, self._door.certificate, self._door.key)
        # No tickets: a resumed session would skip the check of the client's certificate.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
        return context

    def _stamped(self) -> tuple[int, ...]:
        files = [self._door.certificate, self._door.authority]
        with contextlib.suppress(OSError):
            return tuple(value for file in files for value in (file.stat().st_mtime_ns, file.stat().st_ino))
        return ()

    @property
    def port(self) -> int:
        """The port it listens on."""
        if self._socket is None:
            raise RunError("expected a started gateway, got one that does not listen; start it first")
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
        door = self._door
        upstream: ssl.SSLContext | None = None
        if door.upstream_authority is not None:
            upstream = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            trust(upstream, door.upstream_authority)
        self._room = Room(2 * door.limits.room_bytes)
        self._pool = Pool(
            lambda: asyncio.wait_for(
                asyncio.open_connection(door.upstream_host, door.upstream_port, ssl=upstream), door.handshake_s
            ),
            f"{door.upstream_host}:{door.upstream_port}",
            door.limits,
        )
        try:
            family = socket.AF_INET6 if ":" in door.host else socket.AF_INET
            both = door.host == "::" and socket.has_dualstack_ipv6()
            self._socket = socket.create_server((door.host, door.port), family=family, backlog=128, dualstack_ipv6=both)
            self._socket.setblocking(False)
            if door.wake is not None:
                self._bell = await self._listen_for_the_bell(door.wake)
        except OSError as error:
            raise RunError(
                f"expected to listen on {door.host}:{door.port}, got: {error.strerror}; is another one running?"
            ) from None
        self._begin(self._accept(self._socket))
        self._begin(self._sweep())

    async def _listen_for_the_bell(self, path: Path) -> asyncio.DatagramTransport:
        path.unlink(missing_ok=True)
        bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        try:
            bell.bind(str(path))
        finally:
            os.umask(before)
        if self._door.wake_group is not None:
            os.chown(path, -1, self._door.wake_group)
            path.chmod(0o620)
        gateway = self

        class Ear(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, address: object) -> None:
                gateway.ring()

        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Ear, sock=bell)
        return transport

    def ring(self) -> None:
        """Asks the SuperLink again for everyone who waits; callable from this event loop alone."""
        self._rung.set()
        self._rung = asyncio.Event()

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
        self.ring()
        deadline = time.monotonic() + grace_s
        for client in list(self._open):
            if client.task is None:
                client.writer.close()
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._bell is not None and self._door.wake is not None:
            self._bell.close()
            self._door.wake.unlink(missing_ok=True)
        if self._pool is not None:
            self._pool.close()

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
            door, source = self._door, str(address[0])
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
                    ssl_handshake_timeout=self._door.handshake_s,
                    ssl_shutdown_timeout=self._door.handshake_s,
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
            _log.exception("a connection was closed by a fault of ours")
        finally:
            writer.close()

    def _member(self, certificate: bytes) -> str | None:
        try:
            return self._is_member(certificate)
        except Exception:
            _log.exception("the registry of members failed; nobody is let in")
            return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) or b""
        expires = ssl.cert_time_to_seconds(str((tls.getpeercert() or {})["notAfter"]))
        name = self._member(certificate)
        door = self._door
        assert self._room is not None  # noqa: S101 -- set by start()
        if name is not None and name not in self._rooms:
            self._rooms[name] = Room(2 * door.limits.body_bytes, self._room)
        room = self._rooms[name] if name is not None else Room(0, self._room)
        asked = Asked(reader, writer, door.limits, room)
        crowded = self.clients.get(name, 0) >= door.per_client if name is not None else False
        if name is None or crowded:
            word = "not enrolled" if name is None else "too many connections"
            self.counters[word] += 1
            with contextlib.suppress(Gone):
                await asked.write(Refused(403 if name is None else 503, word).answer(), close=True)
            return
        client = _Client(name, certificate, expires, writer, None)
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
            _log.info("%s: refused, %s", name, refusal.word)
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

    # What goes through.

    async def _reply(self, client: _Client, asked: Asked, request: Request) -> None:
        if self._member(client.certificate) != client.name or client.expires <= time.time():
            raise Refused(403, "not enrolled")
        key = self._node_key(client.name)
        if key is not None and request.fields.get(_PUBLIC_KEY) != key:
            raise Refused(403, "another node's key")
        started = time.monotonic()
        if request.path == PULL:
            answer = await self._pull(client, asked, request)
            await asked.write(answer)
        elif request.path == _ACTIVATE:
            answer = await self._activate(client, request)
            await asked.write(answer)
        else:
            if request.path in _RECEIPTS:
                for held in [held for held in self._kept if held[0] == client.name]:
                    del self._kept[held]
            assert self._pool is not None  # noqa: S101 -- set by start()
            async with self._ask(request) as answer:
                await asked.write(answer)
        call = request.path.rpartition(b"/")[2].decode()
        self.counters[f"{call} {answer.status}"] += 1
        _log.debug(
            "%s: %s, %d, %d bytes in, %d out, %.3f s",
            *(client.name, call, answer.status, len(request.body), len(answer.body), time.monotonic() - started),
        )

    @contextlib.asynccontextmanager
    async def _ask(self, request: Request) -> collections.abc.AsyncIterator[Answer]:
        """Asks the SuperLink; one that cannot be reached is an answer too, and no reason to hang up."""
        assert self._pool is not None  # noqa: S101 -- set by start()
        async with contextlib.AsyncExitStack() as stack:
            try:
                answer = await stack.enter_async_context(self._pool.exchange(request))
            except Refused as refusal:
                self.counters[f"upstream {refusal.word}"] += 1
                answer = refusal.answer()
            yield answer

    async def _activate(self, client: _Client, request: Request) -> Answer:
        """Lets a SuperNode that was killed come back at once.

        A SuperLink refuses (412) a node that it still counts as online, for up to a minute, and a SuperNode ends at
        that. It is the same client with the same key, so we sign the dead one off first. Its signature covers the time
        alone and holds for minutes, for any call.
        """
        async with self._ask(request) as answer:
            pass
        key, poll = self._nodes.get(client.name, (b"", b""))
        if answer.status != 412 or not key or key != request.fields.get(_PUBLIC_KEY):
            return answer
        from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PullMessagesRequest

        node = PullMessagesRequest.FromString(poll).node.node_id
        body = DeactivateNodeRequest(node_id=node).SerializeToString()
        async with self._ask(Request(_DEACTIVATE, request.fields, body)) as signed_off:
            self.counters[f"signed off a dead node {signed_off.status}"] += 1
        async with self._ask(request) as answer:
            pass
        return answer

    async def _pull(self, client: _Client, asked: Asked, request: Request) -> Answer:
        """Answers ``pull-messages``: at once if there is a message, else when there is one or ``hold_s`` is over."""
        place = (client.name, request.body)
        deadline = time.monotonic() + self._door.hold_s
        left = asyncio.ensure_future(asked.left())
        try:
            while True:
                # Looked up every time: the connection that the message was lost on may still hold a request of its own.
                until, kept = self._kept.get(place, (0.0, None))
                if kept is not None and until > time.monotonic():
                    self.counters["handed out again"] += 1
                    return kept
                rung = self._rung
                async with self._ask(request) as answer:
                    pass
                if answer.status == 200 and len(request.body) <= 64:
                    self._nodes[client.name] = (request.fields.get(_PUBLIC_KEY, b""), request.body)
                if answer.status == 200 and answer.body:
                    # Kept even if the client has left meanwhile: that is what it is for.
                    if len(answer.body) <= 1 << 20:
                        self._kept[place] = (time.monotonic() + 600, answer)
                        while len(self._kept) > 4096:
                            del self._kept[next(iter(self._kept))]
                    return answer
                remaining = deadline - time.monotonic()
                if answer.status != 200 or remaining <= 0 or self._closing:
                    return answer
                ring = asyncio.ensure_future(rung.wait())
                try:
                    await asyncio.wait(
                        (ring, left),
                        timeout=min(self._door.again_s, remaining),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                finally:
                    ring.cancel()
                if left.done():
                    raise Gone
                if self._member(client.certificate) != client.name:
                    raise Refused(403, "not enrolled")
        finally:
            # Whoever sent something before its answer came has broken the order of things, and lost a byte of it.
            asked.closing = asked.closing or left.done()
            left.cancel()
            await asyncio.wait((left,))

    async def _sweep(self) -> None:
        """Closes connections of clients that are no longer enrolled, and takes up a renewed certificate."""
        while True:
            await asyncio.sleep(self._door.recheck_s)
            try:
                self._swept()
            except Exception:
                # Revocation hangs on this loop: it must outlive whatever goes wrong in it.
                self.counters["fault"] += 1
                _log.exception("a sweep failed and is tried again")

    def _swept(self) -> None:
        now = time.time()
        for client in list(self._open):
            if client.expires <= now or self._member(client.certificate) != client.name:
                self.counters["closed as no longer enrolled"] += 1
                _log.warning("%s: no longer enrolled, connection closed", client.name)
                client.writer.transport.abort()
        for place, (until, _) in list(self._kept.items()):
            if until <= time.monotonic():
                del self._kept[place]
        stamp = self._stamped()
        if stamp and stamp != self._stamp:
            self._stamp = stamp
            try:
                self._context = self._make_context()
                _log.info("a renewed certificate is in use")
            except PlanError as error:
                _log.error("the renewed certificate is not used: %s", error)


def run(gateway: Gateway, started: Callable[[], None] = lambda: None) -> None:
    """Runs a gateway until the process is told to stop (SIGINT or SIGTERM).

    Args:
        gateway: Not started yet.
        started: Called once it listens.
    """

    async def main() -> None:
        stop = asyncio.Event()
        for word in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(word, stop.set)
        await gateway.start()
        started()
        await stop.wait()
        await gateway.close()

    asyncio.run(main())


def ring(path: Path) -> None:
    """Tells a gateway's ``wake`` socket that messages were pushed; one that is not there asks again by itself."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as bell:
        bell.sendto(b"\n", str(path))
