"""The tunnel: whom it speaks to, what it does while nobody answers, and which app bundles it lets in."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.fab_pb2 import Fab, GetFabRequest, GetFabResponse
from flwr.proto.run_pb2 import GetRunResponse, Run
from flwr.proto.transport_pb2 import Scalar

import clients.tunnel
from clients.tunnel import SIGNATURE, Tunnel, Way
from privacy.errors import LedgerError, PlanError, RunError
from privacy.identity import Identity, sign_bundle, verify_bundle
from tests.certificates import Authority

BEAT = b"/v1/fleet/send-node-heartbeat"
OPERATOR, STRANGER = Identity(bytes(31) + b"\x01"), Identity(bytes(31) + b"\x02")


class Gate:
    """A gateway that answers ``answers[path]``, a status and a body; 200 and an echo else."""

    def __init__(self, authority: Authority, port: int = 0, **leaf: Any) -> None:
        self.answers: dict[bytes, tuple[bytes, bytes]] = {}
        self.fields = b""
        self.asked: list[bytes] = []
        self.connections = 0
        self.open = 0
        self.delay = 0.0
        self.port = port
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.load_verify_locations(authority.pem)
        self.context.load_cert_chain(*authority.leaf("gateway", server=True, **leaf))
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        await asyncio.sleep(0.05)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self.connections += 1
        self.open += 1
        try:
            await self._answer(reader, writer)
        finally:
            self.open -= 1

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
                body = await reader.readexactly(length)
                path = head.split(b" ")[1]
                self.asked.append(path)
                if self.delay:
                    await asyncio.wait_for(reader.readexactly(1), self.delay)  # ends when the peer leaves
                status, answer = self.answers.get(path, (b"200", body))
                writer.write(
                    b"HTTP/1.1 %s -\r\n%scontent-length: %d\r\n\r\n%s" % (status, self.fields, len(answer), answer)
                )


@dataclasses.dataclass
class Stage:
    gate: Gate
    tunnel: Tunnel
    authority: Authority

    async def ask(self, path: bytes = BEAT, body: bytes = b"hello", **options: Any) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.tunnel.port, **options)
        try:
            writer.write(
                b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\nContent-Length: %d\r\n\r\n%s"
                % (path, len(body), body)
            )
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            return int(head.split(b" ")[1]), await reader.readexactly(length)
        finally:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def stage(
    folder: Path, *, way: Callable[[Way], Way] = lambda way: way, gate: Callable[[Authority], Gate] = Gate
) -> AsyncIterator[Stage]:
    authority = Authority(folder)
    certificate, key = authority.leaf("hospital")
    other = gate(authority)
    await other.start()
    settings = Way(
        gateway_host="127.0.0.1",
        gateway_port=other.port,
        authority=authority.pem,
        certificate=certificate,
        key=key.read_bytes(),
        trusted=(OPERATOR.public_key,),
        patience_s=0.3,
    )
    try:
        tunnel = Tunnel(way(settings))
        await tunnel.start()
        try:
            yield Stage(other, tunnel, authority)
        finally:
            await tunnel.close()
    finally:
        await other.stop()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(bounded())


def test_a_request_crosses_on_a_connection_that_is_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            for _ in range(3):
                assert await on.ask() == (200, b"hello")
            assert (on.gate.connections, on.tunnel.trouble) == (1, "")
            assert (await on.ask(b"/v1/control/start-run"))[0] == 404
            assert on.gate.asked == [BEAT] * 3

    run(scenario)


@pytest.mark.parametrize("fault", ["another authority", "another name", "expired", "a client's", "TLS 1.2"])
def test_it_speaks_to_the_gateway_it_pinned_and_to_nobody_else(tmp_path: Path, fault: str) -> None:
    def gate(authority: Authority) -> Gate:
        match fault:
            case "another authority":
                found = Gate(Authority(tmp_path / "foreign"))
            case "another name":
                found = Gate(authority, address="127.0.0.9")
            case "expired":
                found = Gate(authority, days=-1)
            case _:
                found = Gate(authority)
        if fault == "a client's":
            found.context.load_cert_chain(*authority.leaf("client"))
        if fault == "TLS 1.2":
            found.context.maximum_version = ssl.TLSVersion.TLSv1_2
        return found

    async def scenario() -> None:
        async with stage(tmp_path, gate=gate) as on:
            assert (await on.ask())[0] == 502
            assert on.gate.asked == []
            assert on.tunnel.trouble

    run(scenario)


def test_a_tunnel_that_checks_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(context: ssl.SSLContext, authority: Path) -> None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE

    monkeypatch.setattr(clients.tunnel, "trust", careless)

    def gate(authority: Authority) -> Gate:
        found = Gate(Authority(tmp_path / "foreign"))
        found.context.verify_mode = ssl.CERT_NONE
        return found

    async def scenario() -> None:
        async with stage(tmp_path, gate=gate) as on:
            assert await on.ask() == (200, b"hello")

    run(scenario)


def test_a_gateway_that_restarts_is_waited_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path, way=lambda way: dataclasses.replace(way, patience_s=10.0)) as on:
            assert (await on.ask())[0] == 200
            await on.gate.stop()
            waiting = asyncio.create_task(on.ask())
            await asyncio.sleep(0.6)
            assert not waiting.done()
            assert "cannot be reached" in on.tunnel.trouble or "hangs up" in on.tunnel.trouble
            await on.gate.start()
            assert await waiting == (200, b"hello")
            assert on.tunnel.trouble == ""
            assert on.tunnel.counters["tried again"] >= 1

    run(scenario)


def test_patience_ends_with_an_answer_that_a_node_tries_again_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            await on.gate.stop()
            began = time.monotonic()
            assert (await on.ask())[0] == 502
            assert time.monotonic() - began < 5

    run(scenario)


def test_a_gateways_refusal_never_ends_a_node(tmp_path: Path) -> None:
    """Flower takes 401 for "go away for ever" and 403 for "that run is over"; a SuperLink may say so, a gateway not."""

    async def scenario() -> None:
        async with stage(tmp_path) as on:
            on.gate.answers[BEAT] = (b"403", b"not enrolled")
            on.gate.fields = b"tacit-refusal: not enrolled\r\n"
            assert (await on.ask())[0] == 503
            assert on.tunnel.trouble == "the gateway refuses us: not enrolled"
            on.gate.fields = b""
            assert (await on.ask())[0] == 403
            on.gate.answers.clear()
            assert (await on.ask())[0] == 200
            assert on.tunnel.trouble == ""

    run(scenario)


def test_a_poll_ends_with_its_node(tmp_path: Path) -> None:
    """A message must not be fetched for a SuperNode that has left."""

    async def scenario() -> None:
        async with stage(tmp_path) as on:
            on.gate.delay = 20.0
            polling = asyncio.create_task(on.ask(b"/v1/fleet/pull-messages"))
            while not on.gate.asked:
                await asyncio.sleep(0.01)
            assert on.gate.open == 1
            polling.cancel()
            async with asyncio.timeout(5):
                while on.gate.open:
                    await asyncio.sleep(0.01)

    run(scenario)


def test_a_renewed_certificate_is_taken_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path, way=lambda way: dataclasses.replace(way, key=tmp_path / "hospital.key")) as on:
            assert (await on.ask())[0] == 200
            before = on.tunnel._context
            on.authority.leaf("hospital")
            await on.gate.stop()
            await on.gate.start()
            on.tunnel._pool.close()  # type: ignore[union-attr]
            assert (await on.ask())[0] == 200
            assert on.tunnel._context is not before

    run(scenario)


def test_it_listens_on_loopback_alone_and_with_tls_where_asked(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "local")
    certificate, key = authority.leaf("local", server=True)

    async def scenario() -> None:
        with pytest.raises(PlanError, match="loopback"):
            async with stage(tmp_path, way=lambda way: dataclasses.replace(way, host="0.0.0.0")):  # noqa: S104
                pass
        with pytest.raises(PlanError, match="renew it or enrol again"):
            async with stage(tmp_path, way=lambda way: dataclasses.replace(way, key=b"no key")):
                pass
        tls: Callable[[Way], Way] = lambda way: dataclasses.replace(  # noqa: E731
            way, local_certificate=certificate, local_key=key
        )
        async with stage(tmp_path, way=tls) as on:
            context = ssl.create_default_context(cafile=str(authority.pem))
            assert await on.ask(ssl=context) == (200, b"hello")
            port = on.tunnel.port
            with pytest.raises(RunError, match="another tunnel"):
                async with stage(tmp_path / "b", way=lambda way: dataclasses.replace(way, port=port)):
                    pass

    run(scenario)


# App bundles.

BUNDLE = b"PK a bundle"


async def delivered(on: Stage, signature: str | None, bundle: bytes = BUNDLE, run_id: int = 7) -> tuple[int, bytes]:
    """Lets a node ask for a run and then for its bundle."""
    config = {} if signature is None else {SIGNATURE: Scalar(string=signature)}
    answer = GetRunResponse(run=Run(run_id=7, fab_hash=hashlib.sha256(bundle).hexdigest(), override_config=config))
    fab = Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
    on.gate.answers[b"/v1/fleet/get-run"] = (b"200", answer.SerializeToString())
    on.gate.answers[b"/v1/fleet/get-fab"] = (b"200", GetFabResponse(fab=fab).SerializeToString())
    assert (await on.ask(b"/v1/fleet/get-run"))[0] == 200
    return await on.ask(b"/v1/fleet/get-fab", GetFabRequest(run_id=run_id).SerializeToString())


async def bundles_let_in(on: Stage) -> set[str]:
    """Tries every bundle that must not get in; returns those that did."""
    good = sign_bundle(OPERATOR, BUNDLE)
    tries: dict[str, Callable[[], Awaitable[tuple[int, bytes]]]] = {
        "unsigned": lambda: delivered(on, None),
        "empty": lambda: delivered(on, ""),
        "garbage": lambda: delivered(on, "zz" * 64),
        "upper case": lambda: delivered(on, good.upper()),
        "a stranger's": lambda: delivered(on, sign_bundle(STRANGER, BUNDLE)),
        "another bundle": lambda: delivered(on, good, b"PK another"),
        "one byte more": lambda: delivered(on, good, BUNDLE + b" "),
        "the bare hash": lambda: delivered(on, OPERATOR.sign(hashlib.sha256(BUNDLE).digest())),
        "the bundle itself": lambda: delivered(on, OPERATOR.sign(BUNDLE)),
        "another run": lambda: delivered(on, good, run_id=8),
    }
    return {name for name, attempt in tries.items() if (await attempt())[0] == 200}


def test_g22_a_bundle_passes_only_with_a_trusted_signature(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            assert await bundles_let_in(on) == set()
            assert (await delivered(on, None))[0] == 403  # a SuperNode drops the message and stays
            assert b"PK" not in (await delivered(on, None))[1]
            status, body = await delivered(on, sign_bundle(OPERATOR, BUNDLE))
            assert (status, GetFabResponse.FromString(body).fab.content) == (200, BUNDLE)
            on.gate.answers[b"/v1/fleet/get-fab"] = (b"200", b"\xff\xff not a message")
            assert (await on.ask(b"/v1/fleet/get-fab"))[0] == 403

    run(scenario)


def test_g22_nobody_trusted_means_no_bundle(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path, way=lambda way: dataclasses.replace(way, trusted=())) as on:
            assert (await delivered(on, sign_bundle(OPERATOR, BUNDLE)))[0] == 403

    run(scenario)


@pytest.mark.parametrize("bug", ["no check", "any key", "hash of the hash's name"])
def test_g22_a_tunnel_that_skips_the_check_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    def planted(trusted: Any, bundle: bytes, signature: str) -> None:
        if bug == "any key":
            verify_bundle((OPERATOR.public_key, STRANGER.public_key), bundle, signature)
        if bug == "hash of the hash's name" and len(signature) != 128:
            raise LedgerError("short")

    monkeypatch.setattr(clients.tunnel, "verify_bundle", planted)

    async def scenario() -> None:
        async with stage(tmp_path) as on:
            assert "a stranger's" in await bundles_let_in(on)

    run(scenario)


def test_g22_signatures_over_bundles() -> None:
    signature = sign_bundle(OPERATOR, BUNDLE)
    verify_bundle((STRANGER.public_key, OPERATOR.public_key), BUNDLE, signature)
    for trusted, bundle, text in (
        ((STRANGER.public_key,), BUNDLE, signature),
        ((), BUNDLE, signature),
        ((OPERATOR.public_key,), BUNDLE + b"\n", signature),
        ((OPERATOR.public_key,), BUNDLE, ""),
        (("not a key",), BUNDLE, signature),
    ):
        with pytest.raises(LedgerError, match="signed by a trusted key"):
            verify_bundle(trusted, bundle, text)
