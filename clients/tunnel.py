"""The tunnel: a SuperNode's way out, and the only one.

    SuperNode -> tunnel on loopback  == TLS 1.3, both sides with certificates of one authority ==>  gateway -> SuperLink

A SuperNode cannot present a client certificate. So it is told that its SuperLink is here, on loopback, and this process
speaks for it: to one gateway, under one pinned authority, with the certificate that enrolment gave the data holder. It
lets through what `privacy.hop` allows and nothing else, in either direction.

It also reads two answers. The app bundle of a run must be signed by a key that the data holder trusts, or the SuperNode
never gets it (guarantee G22); Flower's own check believes nobody but its hub.

When the gateway cannot be reached, a request waits here and is tried again, every second or so. Left to itself, a
SuperNode would wait up to 20 s after each failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import ssl
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from pathlib import Path
from typing import Final, final

from privacy.errors import LedgerError, PlanError, RunError
from privacy.hop import (
    PULL,
    REFUSAL,
    Answer,
    Asked,
    Gone,
    Limits,
    Pool,
    Refused,
    Request,
    Room,
    loopback,
    present,
    trust,
    watch,
)
from privacy.identity import verify_bundle

_log: Final = logging.getLogger("tacit.tunnel")
_RUN: Final = b"/v1/fleet/get-run"
_BUNDLE: Final = b"/v1/fleet/get-fab"
# The key of a run's configuration under which the bundle's signature travels.
SIGNATURE: Final = "bundle-signature"
# Words of a refusal that may be over soon: the gateway, or the SuperLink behind it, is starting again.
_PASSING: Final = (b"unreachable", b"cut")
# Runs whose signature is remembered; a SuperNode asks for the bundle right after the run.
_RUNS: Final = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """From where to where a tunnel leads.

    Attributes:
        gateway_host: The gateway's name or address; its certificate must say the same.
        gateway_port: Its port.
        authority: The certificate authority that enrolment pinned, PEM; no other is believed.
        certificate: The data holder's certificate chain, PEM. When the file changes, new connections use the new one.
        key: Its private key, PEM; a file, or bytes from a vault.
        trusted: Public keys (Ed25519, 64 hex digits) of whose app bundles may run here.
        host: Loopback address to listen on.
        port: Port to listen on; 0 for any free one.
        local_certificate: A certificate for the listener, PEM: a SuperNode that signs its requests insists on TLS.
            None for plain HTTP.
        local_key: Its private key.
        limits: Bounds on what crosses.
        connections: Most connections from the SuperNode at once.
        patience_s: Seconds to go on trying to reach the gateway for one request, with the ``hold_s`` of the gateway
            less than the 30 that a SuperNode waits.
    """

    gateway_host: str
    gateway_port: int
    authority: Path
    certificate: Path
    key: Path | bytes
    trusted: Collection[str]
    host: str = "127.0.0.1"
    port: int = 0
    local_certificate: Path | None = None
    local_key: Path | bytes = b""
    limits: Limits = dataclasses.field(default_factory=Limits)
    connections: int = 16
    patience_s: float = 8.0


@final
class Tunnel:
    """Carries a SuperNode's requests to the gateway.

    Args:
        way: From where to where.
    """

    def __init__(self, way: Way) -> None:
        if not loopback(way.host):
            raise PlanError(f"expected a loopback address to listen on, got {way.host}; the tunnel is for this machine")
        self._way = way
        self._context = self._make_context()
        self._stamp = self._stamped()
        self._local: ssl.SSLContext | None = None
        if way.local_certificate is not None:
            self._local = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._local.minimum_version = ssl.TLSVersion.TLSv1_3
            present(self._local, way.local_certificate, way.local_key)
        self._signatures: OrderedDict[int, str] = OrderedDict()
        self._server: asyncio.Server | None = None
        self._pool: Pool | None = None
        self._room: Room | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.counters: Counter[str] = Counter()
        """How often what happened, by word."""
        self.trouble: str = ""
        """The last thing that kept requests from crossing, in a few words; empty while they cross."""

    def _make_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust(context, self._way.authority)
        present(context, self._way.certificate, self._way.key)
        return context

    def _stamped(self) -> tuple[int, ...]:
        with contextlib.suppress(OSError):
            files = (self._way.certificate, self._way.authority)
            return tuple(value for file in files for value in (file.stat().st_mtime_ns, file.stat().st_ino))
        return ()

    @property
    def port(self) -> int:
        """The port it listens on."""
        if self._server is None:
            raise RunError("expected a started tunnel, got one that does not listen; start it first")
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Listens on loopback; the gateway need not be there yet.

        Raises:
            RunError: The address cannot be had.
        """
        way = self._way
        self._room = Room(way.limits.room_bytes)
        self._pool = Pool(self._dial, f"{way.gateway_host}:{way.gateway_port}", way.limits, most=4, keep_s=60.0)
        try:
            self._server = await asyncio.start_server(self._serve, way.host, way.port, ssl=self._local)
        except OSError as error:
            raise RunError(
                f"expected to listen on {way.host}:{way.port}, got: {error.strerror}; is another tunnel running?"
            ) from None

    async def close(self) -> None:
        """Stops listening and closes what is open."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._pool is not None:
            self._pool.close()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        way = self._way
        stamp = self._stamped()
        if stamp and stamp != self._stamp:
            try:
                self._context = self._make_context()
                self._stamp = stamp
            except PlanError as error:
                _log.error("the renewed certificate is not used yet: %s", error)
        try:
            async with asyncio.timeout(5.0):
                reader, writer = await asyncio.open_connection(
                    way.gateway_host,
                    way.gateway_port,
                    ssl=self._context,
                    server_hostname=way.gateway_host,
                    ssl_handshake_timeout=5.0,
                )
        except ssl.SSLCertVerificationError as error:
            self._trouble(f"the gateway's certificate is not the one we pinned: {error.verify_message}")
            raise
        except OSError as error:
            self._trouble(f"the gateway cannot be reached: {error.strerror or type(error).__name__}")
            raise
        watch(writer.get_extra_info("socket"))
        return reader, writer

    def _trouble(self, words: str) -> None:
        if words != self.trouble:
            _log.log(logging.WARNING if words else logging.INFO, "%s", words or "the gateway is there again")
        self.trouble = words

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._served(reader, writer))
        self._tasks.add(task)
        try:
            # Waited for, not awaited: asyncio reports a callback of its own that is cancelled as a fault.
            await asyncio.wait((task,))
            if not task.cancelled() and (fault := task.exception()) is not None:
                self.counters["fault"] += 1
                _log.error("a connection was closed by a fault of ours", exc_info=fault)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _served(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._room is not None  # noqa: S101 -- set by start()
        asked = Asked(reader, writer, self._way.limits, self._room)
        try:
            if len(self._tasks) > self._way.connections:
                await asked.write(Refused(503, "too many connections").answer(), close=True)
                return
            while not asked.closing:
                async with asked.next() as request:
                    if request is None:
                        return
                    async with contextlib.AsyncExitStack() as stack:
                        carried = self._carried(request)
                        if request.path == PULL:
                            answer = await self._while_there(asked, stack.enter_async_context(carried))
                        else:
                            answer = await stack.enter_async_context(carried)
                        self.counters[f"{request.path.rpartition(b'/')[2].decode()} {answer.status}"] += 1
                        await asked.write(answer)
        except Refused as refusal:
            self.counters[refusal.word] += 1
            with contextlib.suppress(Gone):
                await asked.write(refusal.answer(), close=True)
        except (Gone, ConnectionError):
            self.counters["left"] += 1
            writer.transport.abort()

    async def _while_there(self, asked: Asked, asking: Coroutine[None, None, Answer]) -> Answer:
        """Gives up a poll whose SuperNode has left: a message must not be fetched for nobody."""
        work = asyncio.ensure_future(asking)
        left = asyncio.ensure_future(asked.left())
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Gone
            asked.closing = asked.closing or left.done()
            return work.result()
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.wait((work, left))

    @contextlib.asynccontextmanager
    async def _carried(self, request: Request) -> AsyncIterator[Answer]:
        """Yields the gateway's answer to a request, or our own if there is none or the SuperNode may not have it."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                answer = await self._reached(request, stack)
                word = answer.fields.get(REFUSAL)
                if word is not None:
                    # To a SuperNode, 401 means "go away for ever" and 403 that the run is over. A gateway's refusal
                    # is neither: the certificate may be renewed, the place may be free again.
                    self._trouble(f"the gateway refuses us: {word.decode('ascii', 'replace')}")
                    answer = Refused(503, "gateway refuses").answer()
                else:
                    self._trouble("")
                    answer = self._inspected(request, answer)
            except Refused as refusal:
                if refusal.word == "cut":
                    self._trouble(
                        "the gateway hangs up on us; has our certificate expired, or is it of another authority?"
                    )
                answer = refusal.answer()
            yield answer

    async def _reached(self, request: Request, stack: contextlib.AsyncExitStack) -> Answer:
        assert self._pool is not None  # noqa: S101 -- set by start()
        clock = asyncio.get_running_loop()
        deadline, pause = clock.time() + self._way.patience_s, 0.1
        while True:
            try:
                async with contextlib.AsyncExitStack() as attempt:
                    answer = await attempt.enter_async_context(self._pool.exchange(request))
                    if answer.fields.get(REFUSAL) not in _PASSING or clock.time() + pause > deadline:
                        stack.push_async_exit(attempt.pop_all())
                        return answer
            except Refused as refusal:
                # A SuperNode would send it again too, whatever became of it, only later.
                if refusal.word.encode() not in _PASSING or clock.time() + pause > deadline:
                    raise
            self.counters["tried again"] += 1
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _inspected(self, request: Request, answer: Answer) -> Answer:
        """Lets an answer pass, or puts a refusal in place of a bundle that nobody we trust has signed (G22)."""
        if answer.status != 200 or request.path not in (_RUN, _BUNDLE):
            return answer
        from flwr.proto.fab_pb2 import GetFabRequest, GetFabResponse
        from flwr.proto.run_pb2 import GetRunResponse
        from google.protobuf.message import DecodeError

        try:
            if request.path == _RUN:
                run = GetRunResponse.FromString(answer.body).run
                signature = run.override_config[SIGNATURE].string if SIGNATURE in run.override_config else ""
                self._signatures[run.run_id] = signature
                while len(self._signatures) > _RUNS:
                    self._signatures.popitem(last=False)
                return answer
            bundle = GetFabResponse.FromString(answer.body).fab
            signature = self._signatures.get(GetFabRequest.FromString(request.body).run_id, "")
            verify_bundle(self._way.trusted, bundle.content, signature)
        except (LedgerError, DecodeError):
            self.counters["bundle refused"] += 1
            _log.error("an app bundle was refused: no key that is trusted here has signed it")
            # 403 makes a SuperNode drop the message and stay in the federation.
            raise Refused(403, "bundle") from None
        return answer


def run(tunnel: Tunnel, started: Callable[[], None] = lambda: None) -> None:
    """Runs a tunnel until the process is told to stop (SIGINT or SIGTERM).

    Args:
        tunnel: Not started yet.
        started: Called once it listens.
    """

    async def main() -> None:
        stop = asyncio.Event()
        for word in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(word, stop.set)
        await tunnel.start()
        started()
        await stop.wait()
        await tunnel.close()

    asyncio.run(main())
