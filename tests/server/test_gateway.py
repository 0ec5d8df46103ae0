"""The gateway: who gets in, what gets through, and what a hostile peer can make of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import random
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node

import privacy.hop
import server.door
from privacy.errors import PlanError, RunError
from privacy.hop import FLEET, Limits
from server.gateway import Door, Gateway, ring
from tests.certificates import Authority, common_name

QUICK = Limits(head_s=0.5, idle_s=5.0, body_s=0.6, floor_bytes=1 << 22, answer_s=2.0)
BEAT = b"/v1/fleet/send-node-heartbeat"
PULL = b"/v1/fleet/pull-messages"


class Upstream:
    """A SuperLink that writes down every byte it gets and answers 200 with ``answers[path]``, or with an echo."""

    def __init__(self) -> None:
        self.requests: list[tuple[bytes, bytes, bytes]] = []  # target, head, body
        self.answers: dict[bytes, Callable[[bytes], bytes]] = {}
        self.statuses: dict[bytes, Callable[[], int]] = {}
        self.raw: bytes | None = None
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.partition(b":")[2])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length:")
                )
                body = await reader.readexactly(length)
                target = head.split(b" ")[1]
                self.requests.append((target, head, body))
                answer = self.answers.get(target, lambda body: body)(body)
                writer.write(
                    self.raw
                    if self.raw is not None
                    else b"HTTP/1.1 %d OK\r\nserver: uvicorn\r\nx-secret: 1\r\ncontent-type: application/protobuf\r\n"
                    b"content-length: %d\r\n\r\n%s" % (self.statuses.get(target, lambda: 200)(), len(answer), answer)
                )
                await writer.drain()
        writer.close()


@dataclasses.dataclass
class Stage:
    """A gateway in front of an upstream, and certificates to come with."""

    gateway: Gateway
    upstream: Upstream
    authority: Authority
    revoked: set[str]
    writers: list[asyncio.StreamWriter] = dataclasses.field(default_factory=list)

    def context(
        self, who: str | None = "hospital", *, most: ssl.TLSVersion | None = None, **leaf: Any
    ) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.authority.pem)
        if most is not None:
            context.maximum_version = most
        if who is not None:
            context.load_cert_chain(*leaf.pop("authority", self.authority).leaf(who, **leaf))
        return context

    async def connect(
        self, who: str | None = "hospital", **leaf: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await self.dial(self.context(who, **leaf))

    async def dial(self, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.gateway.port, ssl=context)
        self.writers.append(writer)
        return reader, writer


@contextlib.asynccontextmanager
async def stage(folder: Path, *, door: Callable[[Door], Door] = lambda door: door, **more: Any) -> AsyncIterator[Stage]:
    authority, upstream, revoked = Authority(folder), Upstream(), set[str]()
    await upstream.start()
    certificate, key = authority.leaf("gateway", server=True)

    def is_member(certificate: bytes) -> str | None:
        name = common_name(certificate)
        return None if name in revoked or name.startswith("stranger") else name

    settings = Door(
        host="127.0.0.1",
        port=0,
        certificate=certificate,
        key=key,
        authority=authority.pem,
        upstream_port=upstream.port,
        limits=QUICK,
        recheck_s=0.05,
        again_s=0.05,
        hold_s=0.3,
        handshake_s=1.0,
    )
    try:
        gateway = Gateway(door(settings), is_member, **more)
        await gateway.start()
    except BaseException:
        await upstream.stop()
        raise
    found = Stage(gateway, upstream, authority, revoked)
    try:
        yield found
    finally:
        for writer in found.writers:
            writer.transport.abort()
        await gateway.close(grace_s=0.2)
        await upstream.stop()
        await asyncio.sleep(0.05)  # for what is closed to be seen as closed


def post(path: bytes = BEAT, body: bytes = b"hello", fields: bytes = b"", length: bytes | None = None) -> bytes:
    size = b"%d" % len(body) if length is None else length
    return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\n%sContent-Length: %s\r\n\r\n%s" % (
        path,
        fields,
        size,
        body,
    )


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    """Reads one answer: status, head, body; status 0 if the connection was closed instead."""
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        length = next(
            int(line.partition(b":")[2]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
        )
        return int(head.split(b" ")[1]), head, await asyncio.wait_for(reader.readexactly(length), 10)
    except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
        return 0, b"", b""


async def ask(stage: Stage, data: bytes, who: str = "hospital") -> tuple[int, bytes, bytes]:
    reader, writer = await stage.connect(who)
    try:
        writer.write(data)
        return await answer(reader)
    finally:
        writer.close()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(bounded())


# Who gets in.


async def intruders(stage: Stage, folder: Path) -> dict[str, int]:
    """Tries everyone who must not get in; returns the status that each was answered with (0: not even that)."""
    foreign = Authority(folder / "foreign")
    tries: dict[str, Callable[[], ssl.SSLContext]] = {
        "nobody": lambda: stage.context(None),
        "foreign": lambda: stage.context("hospital", authority=foreign),
        "expired": lambda: stage.context("late", days=-1),
        "server certificate": lambda: stage.context("other", server=True),
        "stranger": lambda: stage.context("stranger"),
        "TLS 1.2": lambda: stage.context("old", most=ssl.TLSVersion.TLSv1_2),
    }
    found = {}
    for name, context in tries.items():
        try:
            reader, writer = await stage.dial(context())
            writer.write(post())
            found[name] = (await answer(reader))[0]
            writer.close()
        except (OSError, ssl.SSLError):
            found[name] = 0
    return found


def test_only_enrolled_clients_get_in(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            found = await intruders(on, tmp_path)
            # A certificate of our own authority that is not enrolled gets a word; the rest gets no HTTP at all.
            assert found.pop("stranger") == 403
            assert set(found.values()) == {0}
            assert on.upstream.requests == []
            assert (await ask(on, post()))[0] == 200

    run(scenario)


def test_a_gateway_that_asks_for_no_certificate_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(context: ssl.SSLContext, authority: Path) -> None:
        context.verify_mode = ssl.CERT_NONE

    monkeypatch.setattr(server.door, "trust", careless)
    monkeypatch.setattr(Gateway, "_serve", lambda self, reader, writer: _let_in(self, reader, writer), raising=True)

    async def _let_in(gateway: Gateway, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = privacy.hop.Asked(reader, writer, QUICK, privacy.hop.Room(1 << 20))
        async with asked.next() as request:
            assert request is not None
            await asked.write(privacy.hop.Answer(200, {}, b""))

    async def scenario() -> None:
        async with stage(tmp_path) as on:
            found = await intruders(on, tmp_path)
            assert {name for name, status in found.items() if status == 200} >= {"nobody", "foreign", "expired"}

    run(scenario)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command here")
def test_openssl_agrees_on_versions_and_certificates(tmp_path: Path) -> None:
    """An independent client: `openssl s_client`."""

    async def scenario() -> None:
        async with stage(tmp_path) as on:
            own, foreign = on.authority.leaf("hospital"), Authority(tmp_path / "foreign").leaf("hospital")
            late = on.authority.leaf("late", days=-1)

            async def client(*options: str) -> str:
                process = await asyncio.create_subprocess_exec(
                    "openssl", "s_client", "-connect", f"127.0.0.1:{on.gateway.port}", "-CAfile", str(on.authority.pem),
                    "-verify_return_error", "-ign_eof", *options,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )  # fmt: skip
                out, _ = await asyncio.wait_for(process.communicate(post(fields=b"Connection: close\r\n")), 20)
                return out.decode(errors="replace")

            def identity(pair: tuple[Path, Path]) -> tuple[str, ...]:
                return ("-cert", str(pair[0]), "-key", str(pair[1]))

            good = await client(*identity(own))
            assert "TLSv1.3" in good
            assert "HTTP/1.1 200" in good
            assert "Verify return code: 0 (ok)" in good
            for bad in (
                ("-tls1_2", *identity(own)),
                ("-tls1_1", *identity(own)),
                (),
                identity(foreign),
                identity(late),
            ):
                before = on.gateway.counters["handshake failed"]
                out = await client(*bad)
                assert "HTTP/1.1" not in out, bad
                assert on.gateway.counters["handshake failed"] == before + 1, (bad, out)
            assert "Cipher is (NONE)" in await client("-tls1_2", *identity(own))
            assert len(on.upstream.requests) == 1

    run(scenario)


def test_a_client_that_is_revoked_loses_its_open_connections(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path, door=lambda door: dataclasses.replace(door, hold_s=20.0)) as on:
            on.upstream.answers[PULL] = lambda body: b""
            idle, _idle = await on.connect()
            held, holding = await on.connect()
            stays, staying = await on.connect("bank")
            holding.write(post(PULL))
            await asyncio.sleep(0.2)
            on.revoked.add("hospital")
            began = time.monotonic()
            for reader in (idle, held):
                with contextlib.suppress(ConnectionError):
                    assert (await answer(reader))[0] in (0, 403)
            assert time.monotonic() - began < 2
            assert (await ask(on, post()))[0] == 403
            staying.write(post())
            assert (await answer(stays))[0] == 200

    run(scenario)


def test_a_gateway_that_looks_at_members_only_once_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[bytes, str | None] = {}

    def once(gateway: Gateway, certificate: bytes) -> str | None:
        if certificate not in known:
            known[certificate] = gateway._is_member(certificate)
        return known[certificate]

    monkeypatch.setattr(Gateway, "_member", once)

    async def scenario() -> None:
        async with stage(tmp_path) as on:
            reader, writer = await on.connect()
            writer.write(post())
            assert (await answer(reader))[0] == 200
            on.revoked.add("hospital")
            await asyncio.sleep(0.3)
            writer.write(post())
            assert (await answer(reader))[0] == 200  # what test_a_client_that_is_revoked_... must never see

    run(scenario)


def test_a_registry_that_fails_lets_nobody_in(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            on.gateway._is_member = lambda certificate: 1 // 0  # type: ignore[assignment,return-value]
            assert (await ask(on, post()))[0] == 403
            assert on.upstream.requests == []

    run(scenario)


def test_a_certificate_goes_with_its_nodes_key_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path, node_key={"hospital": b"AAAA", "bank": b"BBBB"}.get) as on:
            assert (await ask(on, post(fields=b"flwr-public-key: AAAA\r\n")))[0] == 200
            assert (await ask(on, post(fields=b"flwr-public-key: BBBB\r\n")))[0] == 403
            assert (await ask(on, post()))[0] == 403
            assert len(on.upstream.requests) == 1

    run(scenario)


def test_a_renewed_certificate_is_taken_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:

            async def serial() -> object:
                _, writer = await on.connect()
                writer.close()
                return writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]

            before = await serial()
            on.authority.leaf("gateway", server=True)
            await asyncio.sleep(0.3)
            assert await serial() != before
            (tmp_path / "gateway.crt").write_text("half a certif")
            await asyncio.sleep(0.3)
            assert await serial() != before

    run(scenario)


def test_sessions_are_not_resumed_past_the_check(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            context = on.context()
            reader, writer = await on.dial(context)
            writer.write(post())
            assert (await answer(reader))[0] == 200
            session = writer.get_extra_info("ssl_object").session
            assert session is None or not session.has_ticket

    run(scenario)


# What gets through.


def test_a_request_is_written_anew_with_what_may_cross(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            fields = (
                b"flwr-signature: c2ln\r\nflwr-package-version: 1.41.0\r\nCookie: a=b\r\nX-Forwarded-For: 9.9.9.9\r\n"
                b"flwr-task-token: t\r\nflwr-superexec-signature: s\r\naccept: application/protobuf\r\n"
            )
            status, head, body = await ask(
                on, post(b"/v1/fleet/push-object", b"\x00\r\n\r\nGET / HTTP/1.1\r\n\r\n", fields)
            )
            assert (status, body) == (200, b"\x00\r\n\r\nGET / HTTP/1.1\r\n\r\n")
            assert b"secret" not in head
            assert b"uvicorn" not in head
            ((target, sent, got),) = on.upstream.requests
            assert (target, got) == (b"/v1/fleet/push-object", body)
            names = {line.partition(b":")[0].lower() for line in sent.split(b"\r\n")[1:] if line}
            assert names == {
                b"host", b"content-type", b"content-length", b"accept", b"flwr-signature", b"flwr-package-version"
            }  # fmt: skip
            assert f"host: 127.0.0.1:{on.upstream.port}".encode() in sent.lower()

    run(scenario)


def test_every_fleet_path_gets_through_and_large_bodies_do(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path, door=lambda door: dataclasses.replace(door, limits=Limits())) as on:
            reader, writer = await on.connect()
            for path in sorted(FLEET):
                writer.write(post(path))
                assert await answer(reader) == (
                    200,
                    b"HTTP/1.1 200 \r\ncontent-type: application/protobuf\r\ncontent-length: 5\r\n"
                    b"connection: keep-alive\r\n\r\n",
                    b"hello",
                )
            large = random.Random(1).randbytes(6 << 20)
            writer.write(post(b"/v1/fleet/push-object", large))
            assert (await answer(reader))[2] == large

    run(scenario)


PATHS = [
    b"/",
    b"/docs",
    b"/openapi.json",
    b"/health",
    b"/v1/control/start-run",
    b"/v1/runtime/acquire-task",
    b"/v1/fleet",
    b"/v1/fleet/",
    b"/v1/fleet/unheard-of",
    b"/v1/fleet/../control/start-run",
    b"/v1/fleet/pull-messages/../../control/start-run",
    b"/v1/fleet/%2e%2e/control/start-run",
    b"/v1/fleet/..%2fcontrol%2fstart-run",
    b"/v1/fleet/..%252fcontrol",
    b"/v1/fleet/..;/control/start-run",
    b"/v1/fleet/./pull-messages",
    b"/v1/fleet//pull-messages",
    b"//v1/fleet/pull-messages",
    b"/v1/fleet/pull-messages/",
    b"/v1/fleet/pull-messages?x=1",
    b"/v1/fleet/pull-messages#x",
    b"/v1/fleet/pull-messages%00",
    b"/V1/FLEET/PULL-MESSAGES",
    b"/v1\\fleet\\pull-messages",
    b"/v1/fleet/pull\xc2\xadmessages",
    b"http://127.0.0.1:8000/v1/control/start-run",
    b"http://127.0.0.1:8000/v1/fleet/pull-messages",
    b"https://x/v1/fleet/pull-messages",
    b"127.0.0.1:8000",
    b"*",
]


async def strayed(stage: Stage) -> list[bytes]:
    """Returns the paths that must not get through and did."""
    for path in PATHS:
        status, _, _ = await ask(stage, post(path))
        assert status in (0, 200, 400, 404)
    return [target for target, _, _ in stage.upstream.requests]


def test_no_other_path_gets_through(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            assert await strayed(on) == []

    run(scenario)


def test_a_list_of_prefixes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Prefixes(frozenset[bytes]):
        def __contains__(self, path: object) -> bool:
            return isinstance(path, bytes) and path.startswith(b"/v1/fleet/")

    monkeypatch.setattr(Gateway, "crossing", dataclasses.replace(privacy.hop.FLEET_CALLS, paths=Prefixes()))

    async def scenario() -> None:
        async with stage(tmp_path) as on:
            assert b"/v1/fleet/../control/start-run" in await strayed(on)

    run(scenario)


# Two requests that look like one, and the other way round. The hidden one asks for the control interface.
HIDDEN = (
    b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\nContent-Length: 0\r\n\r\n"
)
HEAD = b"POST /v1/fleet/send-node-heartbeat HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\n"
SMUGGLED = {
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 0\r\n\r\nhello",
    "a signed length": HEAD + b"Content-Length: +5\r\n\r\nhello",
    "a negative length": HEAD + b"Content-Length: -5\r\n\r\nhello",
    "a length in hex": HEAD + b"Content-Length: 0x5\r\n\r\nhello",
    "a length with a zero": HEAD + b"Content-Length: 05\r\n\r\nhello",
    "an underscored length": HEAD + b"Content-Length: 1_0\r\n\r\nhello",
    "no length": HEAD + b"\r\n" + HIDDEN,
    "chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "chunks and a length": HEAD + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "a length and chunks": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n" + HIDDEN,
    "odd chunks": HEAD + b"Transfer-Encoding: \x0bchunked\r\nContent-Length: 5\r\n\r\nhello",
    "chunks twice": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "identity chunks": HEAD + b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello",
    "a space before the colon": HEAD + b"Content-Length : 5\r\n\r\nhello",
    "a folded field": HEAD + b"X: a\r\n Content-Length: 0\r\nContent-Length: 5\r\n\r\nhello" + HIDDEN,
    "a line feed alone": HEAD + b"X: a\nTransfer-Encoding: chunked\nContent-Length: 5\r\n\r\nhello",
    "a carriage return in a field": HEAD + b"X: a\rTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello",
    "a zero byte in a field": HEAD + b"X: a\x00b\r\nContent-Length: 5\r\n\r\nhello",
    "an upgrade": HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n",
    "hop-by-hop fields": HEAD + b"Connection: content-length\r\nContent-Length: 5\r\n\r\nhello",
    "an expectation": HEAD + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
    "two hosts": HEAD + b"Host: y\r\nContent-Length: 5\r\n\r\nhello",
    "no host": HEAD.replace(b"Host: x\r\n", b"") + b"Content-Length: 5\r\n\r\nhello",
    "HTTP/1.0": HEAD.replace(b"1.1", b"1.0") + b"Content-Length: 5\r\n\r\nhello",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "another method": HEAD.replace(b"POST", b"GET") + b"Content-Length: 0\r\n\r\n",
    "a tunnel": b"CONNECT 127.0.0.1:8000 HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN,
    "packed": HEAD + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
    "another type": HEAD.replace(b"application/protobuf", b"application/json") + b"Content-Length: 5\r\n\r\nhello",
}  # fmt: skip


@pytest.mark.parametrize("name", SMUGGLED)
def test_nothing_is_smuggled(tmp_path: Path, name: str) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            reader, writer = await on.connect()
            writer.write(SMUGGLED[name])
            status, _, _ = await answer(reader)
            assert status in (400, 404, 405, 411, 415, 505)
            # The connection ends: whatever follows is not read as a request.
            assert await asyncio.wait_for(reader.read(), 5) == b""
            assert on.upstream.requests == []

    run(scenario)


@pytest.mark.parametrize("lengths", [b"5\r\nContent-Length: 5", b"5, 5"])
def test_a_length_said_twice_is_said_once_behind_us(tmp_path: Path, lengths: bytes) -> None:
    """RFC 9110, 8.6 allows it. The parser merges them; the request is written anew."""

    async def scenario() -> None:
        async with stage(tmp_path) as on:
            assert (await ask(on, HEAD + b"Content-Length: " + lengths + b"\r\n\r\nhello"))[0] == 200
            ((_, head, body),) = on.upstream.requests
            assert (head.lower().count(b"content-length"), body) == (1, b"hello")

    run(scenario)


def test_a_request_in_a_body_stays_a_body_and_one_behind_it_ends_the_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            assert (await ask(on, post(body=HIDDEN)))[2] == HIDDEN
            assert (await ask(on, post() + HIDDEN))[0] == 400
            assert [target for target, _, _ in on.upstream.requests] == [BEAT]

    run(scenario)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 20000 + b"\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
        b"",
    ],
)
def test_an_upstream_that_breaks_the_rules_is_an_answer_502_or_504(tmp_path: Path, raw: bytes) -> None:
    async def scenario() -> None:
        door: Callable[[Door], Door] = lambda door: dataclasses.replace(  # noqa: E731
            door, limits=dataclasses.replace(QUICK, answer_s=0.3)
        )
        async with stage(tmp_path, door=door) as on:
            on.upstream.raw = raw
            status, head, _ = await ask(on, post())
            assert status in (502, 504)
            assert b"tacit-refusal" in head

    run(scenario)


def test_an_upstream_that_is_away_is_an_answer_and_it_may_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            reader, writer = await on.connect()
            writer.write(post())
            assert (await answer(reader))[0] == 200
            port = on.upstream.port
            await on.upstream.stop()
            other = socket.create_server(("127.0.0.1", 0))  # nobody answers here
            on.gateway._pool._dial = lambda: asyncio.open_connection("127.0.0.1", 1)  # type: ignore[union-attr]
            on.gateway._pool.close()  # type: ignore[union-attr]
            writer.write(post())
            status, head, _ = await answer(reader)
            assert (status, b"unreachable" in head) == (502, True)
            on.upstream.port = port
            await on.upstream.start()
            on.gateway._pool._dial = lambda: asyncio.open_connection("127.0.0.1", port)  # type: ignore[union-attr]
            writer.write(post())
            assert (await answer(reader))[0] == 200
            other.close()

    run(scenario)


# What it costs us.


def test_sizes_and_times_are_bounded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            assert (await ask(on, post(fields=b"X: " + b"y" * 21000 + b"\r\n")))[0] == 431
            assert (await ask(on, b"POST " + b"/" * 20000))[0] in (400, 431)
            assert (await ask(on, post(body=b"", length=b"%d" % ((16 << 20) + 1))))[0] == 413
            assert (await ask(on, post(body=b"", length=b"9" * 30)))[0] in (400, 411, 413)
            # A head, and a body, that trickle in.
            for start in (HEAD, post(length=b"1000")):
                reader, writer = await on.connect()
                began = time.monotonic()
                try:
                    writer.write(start)
                    for _ in range(30):
                        await asyncio.sleep(0.1)
                        writer.write(b"x")
                        await writer.drain()
                except (ConnectionError, ssl.SSLError):
                    pass
                assert (await answer(reader))[0] in (0, 408)
                assert time.monotonic() - began < 6
            assert on.upstream.requests == []

    run(scenario)


def test_a_half_closed_or_half_sent_request_goes_nowhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            for data in (HEAD, post()[:-2], b"", b"\r\n"):
                _, writer = await on.connect()
                writer.write(data)
                await writer.drain()
                writer.close()
            await asyncio.sleep(0.2)
            assert on.upstream.requests == []
            assert not on.gateway.clients

    run(scenario)


def test_a_client_that_does_not_read_is_left(tmp_path: Path) -> None:
    async def scenario() -> None:
        limits = dataclasses.replace(QUICK, floor_bytes=1 << 24)
        async with stage(tmp_path, door=lambda door: dataclasses.replace(door, limits=limits)) as on:
            on.upstream.answers[b"/v1/fleet/pull-object"] = lambda body: bytes(15 << 20)
            _, writer = await on.connect()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(post(b"/v1/fleet/pull-object"))
            # 15 MB at 16 MB/s and 0.6 s on top; then the gateway gives up and its memory is free again.
            began = time.monotonic()
            while on.gateway.counters["left"] == 0:
                await asyncio.sleep(0.1)
                assert time.monotonic() - began < 20
            assert (await ask(on, post()))[0] == 200

    run(scenario)


def test_connections_and_handshakes_are_bounded(tmp_path: Path) -> None:
    async def scenario() -> None:
        door: Callable[[Door], Door] = lambda door: dataclasses.replace(  # noqa: E731
            door, per_client=2, handshakes=4
        )
        async with stage(tmp_path, door=door) as on:
            kept = [await on.connect() for _ in range(2)]
            for reader, writer in kept:
                writer.write(post())
                assert (await answer(reader))[0] == 200
            assert (await ask(on, post()))[0] == 503
            assert (await ask(on, post(), "bank"))[0] == 200
            # Whoever says nothing holds a place for a handshake for 1 s; from one address, half of the places.
            silent = [socket.create_connection(("127.0.0.1", on.gateway.port)) for _ in range(6)]
            await asyncio.sleep(0.2)
            assert on.gateway.counters["turned away"] >= 4
            await asyncio.sleep(1.5)
            assert on.gateway.counters["handshake failed"] >= 2
            assert (await ask(on, post(), "bank"))[0] == 200
            for one in silent:
                one.close()

    run(scenario)


def test_room_is_shared_in_turn_and_given_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        room = privacy.hop.Room(10)
        order: list[str] = []

        async def body(name: str, size: int, hold: asyncio.Event) -> None:
            async with room.take(size):
                order.append(name)
                await hold.wait()

        first, go = asyncio.Event(), asyncio.Event()
        go.set()
        tasks = [
            asyncio.create_task(body("a", 8, first)),
            asyncio.create_task(body("b", 5, go)),
            asyncio.create_task(body("c", 1, go)),
        ]
        await asyncio.sleep(0.01)
        assert order == ["a"]  # c fits, but b was first
        tasks[1].cancel()
        await asyncio.sleep(0.01)
        first.set()
        await asyncio.wait(tasks)
        assert order == ["a", "c"]
        assert room._used == 0
        async with room.take(99):  # larger than all of it: alone
            assert room._used == 99

    run(scenario)


def test_a_connection_whose_other_end_vanishes_is_probed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            await on.connect()
            await asyncio.sleep(0.1)
            (client,) = on.gateway._open
            found = client.writer.get_extra_info("socket")
            assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            times = [
                found.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            ]
            assert times == [5, 3, 3, 15_000]

    run(scenario)


def test_a_sweep_outlives_its_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            reader, _ = await on.connect()
            monkeypatch.setattr(on.gateway, "_stamped", lambda: 1 // 0)
            await asyncio.sleep(0.2)
            assert on.gateway.counters["fault"] >= 1
            on.revoked.add("hospital")
            assert await asyncio.wait_for(reader.read(), 5) == b""

    run(scenario)


# Held polls.


def test_an_empty_poll_is_held_until_somebody_rings(tmp_path: Path) -> None:
    async def scenario() -> None:
        wake = tmp_path / "wake"
        door: Callable[[Door], Door] = lambda door: dataclasses.replace(  # noqa: E731
            door, wake=wake, hold_s=20.0, again_s=20.0
        )
        async with stage(tmp_path, door=door) as on:
            message: list[bytes] = []
            on.upstream.answers[PULL] = lambda body: message.pop() if message else b""
            assert wake.stat().st_mode & 0o777 == 0o600
            reader, writer = await on.connect()
            writer.write(post(PULL))
            await asyncio.sleep(0.3)
            assert len(on.upstream.requests) == 1
            message.append(b"train")
            began = time.monotonic()
            ring(wake)
            assert (await answer(reader))[2] == b"train"
            assert time.monotonic() - began < 2
            # The connection goes on, and other calls are not held.
            writer.write(post())
            assert (await answer(reader))[0] == 200
        ring(wake)  # nobody there: no error
        grouped: Callable[[Door], Door] = lambda door: dataclasses.replace(  # noqa: E731
            door, wake=wake, wake_group=os.getgid()
        )
        async with stage(tmp_path, door=grouped):
            assert (wake.stat().st_mode & 0o777, wake.stat().st_gid) == (0o620, os.getgid())
        assert not wake.exists()

    run(scenario)


def test_an_empty_poll_ends_before_the_node_gives_up_and_asks_again_meanwhile(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path) as on:
            on.upstream.answers[PULL] = lambda body: b""
            began = time.monotonic()
            assert (await ask(on, post(PULL)))[:1] == (200,)
            assert 0.25 < time.monotonic() - began < 3
            assert len(on.upstream.requests) > 1

    run(scenario)


def test_a_message_that_is_lost_on_the_way_is_handed_out_again_until_it_came(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path, door=lambda door: dataclasses.replace(door, hold_s=5.0)) as on:
            message = [b"train"]
            on.upstream.answers[PULL] = lambda body: message.pop() if message else b""
            gone: list[bytes] = []

            async def lost(writer: asyncio.StreamWriter) -> None:
                writer.write(post(PULL, b"node 1"))
                await writer.drain()
                writer.transport.abort()

            # Pulled, but the node never saw it: its connection is gone.
            assert (await ask(on, post(PULL, b"node 1")))[2] == b"train"
            _, writer = await on.connect()
            await lost(writer)
            assert (await ask(on, post(PULL, b"node 1")))[2] == b"train"
            # Another client, or another node, does not get it.
            assert on.upstream.answers[PULL](b"") == b""
            on.gateway._door = dataclasses.replace(on.gateway._door, hold_s=0.1)
            assert (await ask(on, post(PULL, b"node 1"), "bank"))[2] == b""
            assert (await ask(on, post(PULL, b"node 2")))[2] == b""
            # A heartbeat shows nothing; fetching what the message names does.
            assert (await ask(on, post()))[0] == 200
            assert (await ask(on, post(PULL, b"node 1")))[2] == b"train"
            assert (await ask(on, post(b"/v1/fleet/pull-object")))[0] == 200
            assert (await ask(on, post(PULL, b"node 1")))[2] == b""
            assert gone == []

    run(scenario)


def test_a_node_that_was_killed_is_signed_off_when_it_comes_back(tmp_path: Path) -> None:
    """A SuperLink answers 412 to a node that it takes for online; only the same client and key may change that."""
    poll = PullMessagesRequest(node=Node(node_id=77)).SerializeToString()

    async def scenario() -> None:
        async with stage(tmp_path, door=lambda door: dataclasses.replace(door, hold_s=0.0)) as on:
            online = True

            def deactivated(body: bytes) -> bytes:
                nonlocal online
                assert DeactivateNodeRequest.FromString(body).node_id == 77
                online = False
                return b""

            activate, deactivate = b"/v1/fleet/activate-node", b"/v1/fleet/deactivate-node"
            on.upstream.answers[deactivate] = deactivated
            on.upstream.answers[PULL] = lambda body: b""
            on.upstream.statuses[activate] = lambda: 412 if online else 200
            mine, other = b"flwr-public-key: mine\r\n", b"flwr-public-key: other\r\n"
            assert (await ask(on, post(activate, fields=mine)))[0] == 412  # never seen: nothing to sign off
            assert (await ask(on, post(PULL, poll, mine)))[0] == 200
            assert (await ask(on, post(activate, fields=other)))[0] == 412
            assert (await ask(on, post(activate, fields=mine), "bank"))[0] == 412
            assert online
            assert (await ask(on, post(activate, fields=mine)))[0] == 200
            assert not online
            assert (await ask(on, post(activate, fields=other)))[0] == 200
            assert [target for target, _, _ in on.upstream.requests].count(deactivate) == 1

    run(scenario)


def test_closing_answers_what_is_held(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(tmp_path, door=lambda door: dataclasses.replace(door, hold_s=20.0, again_s=20.0)) as on:
            on.upstream.answers[PULL] = lambda body: b""
            reader, writer = await on.connect()
            writer.write(post(PULL))
            await asyncio.sleep(0.2)
            closing = asyncio.create_task(on.gateway.close(grace_s=2.0))
            assert (await answer(reader))[0] == 200
            await closing

    run(scenario)


# The rest.


def test_logs_and_counters_hold_no_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tacit.gateway")

    async def scenario() -> None:
        async with stage(tmp_path) as on:
            await ask(on, post(body=b"MARKER", fields=b"flwr-signature: MARKER\r\n"))
            await ask(on, post(b"/MARKER"))
            assert "MARKER" not in caplog.text + repr(on.gateway.counters)
            assert "hospital: send-node-heartbeat, 200" in caplog.text
            assert on.gateway.counters["send-node-heartbeat 200"] == 1
            assert on.gateway.counters["path"] == 1

    run(scenario)


def test_a_superlink_elsewhere_or_a_port_in_use_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        for host in ("10.0.0.1", "127.0.0.1.example.org", "0.0.0.0", "", "::"):  # noqa: S104
            elsewhere: Callable[[Door], Door] = lambda door, host=host: dataclasses.replace(  # type: ignore[misc]  # noqa: E731
                door, upstream_host=host
            )
            with pytest.raises(PlanError, match="loopback"):
                async with stage(tmp_path, door=elsewhere):
                    pass
        assert all(privacy.hop.loopback(host) for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"))
        with pytest.raises(PlanError, match="certificate"):
            async with stage(tmp_path, door=lambda door: dataclasses.replace(door, certificate=tmp_path / "none")):
                pass
        async with stage(tmp_path) as on:
            with pytest.raises(RunError, match="another one"):
                async with stage(tmp_path / "b", door=lambda door: dataclasses.replace(door, port=on.gateway.port)):
                    pass

    run(scenario)


def mutated(source: random.Random) -> bytes:
    """A request with a few things wrong: bytes, lines and pieces of other requests."""
    data = bytearray(source.choice([post(), post(PULL), *SMUGGLED.values(), *(post(path) for path in PATHS)]))
    for _ in range(source.randrange(1, 6)):
        at = source.randrange(len(data) + 1)
        match source.randrange(5):
            case 0:
                data[at:at] = source.randbytes(source.randrange(1, 8))
            case 1:
                del data[at : at + source.randrange(1, 30)]
            case 2:
                data[at:at] = source.choice([b"\r\n", b"\n", b"\r\n\r\n", b" ", b"\t", b"\x00", b":", HIDDEN])
            case 3:
                data[at : at + 1] = source.randbytes(1)
            case _:
                data[at:at] = source.choice(list(SMUGGLED.values()))[: source.randrange(1, 200)]
    return bytes(data)


async def fuzzed(folder: Path, cases: int, seed: int) -> None:
    source = random.Random(seed)
    limits = dataclasses.replace(QUICK, head_s=0.02, body_s=0.02, idle_s=0.02)
    async with stage(
        folder, door=lambda door: dataclasses.replace(door, limits=limits, hold_s=0.0, per_client=64)
    ) as on:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: pytest.fail(repr(context)))
        context = on.context()

        async def one(data: bytes) -> None:
            reader, writer = await on.dial(context)
            writer.write(data)
            with contextlib.suppress(OSError, ssl.SSLError):
                await asyncio.wait_for(reader.read(), 10)
            writer.close()

        for _ in range(0, cases, 16):
            await asyncio.gather(*(one(mutated(source)) for _ in range(16)))
        assert {target for target, _, _ in on.upstream.requests} <= FLEET
        for _, head, _ in on.upstream.requests:
            names = [line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:] if line]
            assert len(names) == len(set(names))
            assert set(names) <= privacy.hop._ASKED | {b"host", b"content-length"}
        assert on.gateway.counters["fault"] == 0
        assert on.gateway._room is not None
        await asyncio.sleep(0.1)
        assert on.gateway._room._used == 0
        assert (await ask(on, post()))[0] in (200, 408)


def test_300_broken_requests(tmp_path: Path) -> None:
    asyncio.run(fuzzed(tmp_path, 300, 1))


@pytest.mark.slow
def test_10000_broken_requests(tmp_path: Path) -> None:
    asyncio.run(fuzzed(tmp_path, 10_000, 2))
