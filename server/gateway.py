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
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, final

from privacy.errors import PlanError
from privacy.hop import PULL, Answer, Asked, Gone, Pool, Refused, Request, loopback, trust
from server.door import Doorway, Threshold, Visitor, run

__all__ = ["Door", "Gateway", "ring", "run"]

_log: Final = logging.getLogger("tacit.gateway")
_PUBLIC_KEY: Final = b"flwr-public-key"
_ACTIVATE: Final = b"/v1/fleet/activate-node"
_DEACTIVATE: Final = b"/v1/fleet/deactivate-node"
# Requests that only a node makes which has the message that it was handed.
_RECEIPTS: Final = frozenset(
    b"/v1/fleet/" + call for call in (b"get-run", b"get-fab", b"pull-object", b"confirm-message-received")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Door(Threshold):
    """Where a gateway stands.

    Attributes:
        upstream_host: Where the SuperLink listens; a loopback address.
        upstream_port: Its port.
        upstream_authority: The authority of the SuperLink's own certificate, PEM, where it has one: with its
            ``--enable-supernode-auth`` it insists on TLS, on loopback too. None for plain HTTP.
        wake: A path for a datagram socket; whatever arrives there says that the SuperLink may have messages. Only our
            own user can write to it. None to ask again on time alone.
        wake_group: A group that can write to it too, where the server application runs as another user, so that its
            keys are apart from the relay (guarantee G21).
        hold_s: Seconds to hold an empty ``pull-messages``; a SuperNode waits 30.
        again_s: Seconds after which a held one is asked again if nobody wakes us meanwhile. Every client costs the
            SuperLink a request in that time, some 10 ms of a core: with a hundred clients, 3 s cost a third of one.
    """

    upstream_host: str = "127.0.0.1"
    upstream_port: int = 8000
    upstream_authority: Path | None = None
    wake: Path | None = None
    wake_group: int | None = None
    hold_s: float = 20.0
    again_s: float = 3.0


@final
class Gateway(Doorway):
    """Lets enrolled clients through to the fleet interface of a SuperLink.

    Args:
        door: Where it stands.
        is_member: As for `server.door.Doorway`.
        node_key: Given a client's name, returns the value that its ``flwr-public-key`` field must have, or None where
            any will do. It ties a client's certificate to its SuperNode's key: Flower itself does not know of both.
    """

    log = _log

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
        super().__init__(door, is_member)
        self._door = door
        self._node_key = node_key
        self._kept: dict[tuple[str, bytes], tuple[float, Answer]] = {}
        # Per client the key of its SuperNode and its last poll, which names the node.
        self._nodes: dict[str, tuple[bytes, bytes]] = {}
        self._pool: Pool | None = None
        self._bell: asyncio.DatagramTransport | None = None
        self._rung: asyncio.Event = asyncio.Event()

    async def _prepared(self) -> None:
        door = self._door
        upstream: ssl.SSLContext | None = None
        if door.upstream_authority is not None:
            upstream = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            trust(upstream, door.upstream_authority)
        self._pool = Pool(
            lambda: asyncio.wait_for(
                asyncio.open_connection(door.upstream_host, door.upstream_port, ssl=upstream), door.handshake_s
            ),
            f"{door.upstream_host}:{door.upstream_port}",
            door.limits,
        )
        if door.wake is not None:
            self._bell = await self._listen_for_the_bell(door.wake)

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

    async def close(self, grace_s: float = 3.0) -> None:
        """Stops listening, lets answers that are under way finish, and closes every connection."""
        self._closing = True
        # Whoever holds a poll answers it now.
        self.ring()
        await super().close(grace_s)
        if self._bell is not None and self._door.wake is not None:
            self._bell.close()
            self._door.wake.unlink(missing_ok=True)
        if self._pool is not None:
            self._pool.close()

    # What goes through.

    async def _answer(self, client: Visitor, asked: Asked, request: Request) -> None:
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

    async def _activate(self, client: Visitor, request: Request) -> Answer:
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

    async def _pull(self, client: Visitor, asked: Asked, request: Request) -> Answer:
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

    def _swept(self) -> None:
        for place, (until, _) in list(self._kept.items()):
            if until <= time.monotonic():
                del self._kept[place]
        super()._swept()


def ring(path: Path) -> None:
    """Tells a gateway's ``wake`` socket that messages were pushed; one that is not there asks again by itself."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as bell:
        bell.sendto(b"\n", str(path))
