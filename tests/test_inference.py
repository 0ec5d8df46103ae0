"""Encrypted inference over the wire: the same predictions, and what a stranger, a member or a server can make of it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gc
import http.client
import json
import os
import random
import resource
import shutil
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal
import torch

import server.inference
from clients.data import load_source
from clients.inference import Asker, Reply, Service, backbone_of, load, save
from models.catalog import TASKS
from models.head import Split
from privacy.asking import (
    ANSWER_OVERHEAD,
    ASK,
    HEADS,
    OPEN,
    QUERY_OVERHEAD,
    REMEDIES,
    SKEW_S,
    Offer,
    Opening,
    Query,
    tell_answer,
)
from privacy.enrolment import Address
from privacy.errors import (
    DataError,
    HeadError,
    IdentityError,
    LedgerError,
    PlanError,
    RunError,
    SealError,
    TacitError,
    VaultError,
)
from privacy.he import EncryptedHead, HeadDescription, Parameters, QueryKey, Wire, plan_head, stream
from privacy.he.plain import filled
from privacy.hop import Refused
from privacy.identity import Secret
from privacy.plan import canonical
from privacy.vault import private, read_log
from privacy.vault.container import is_sealed
from server.checkpoint import load as load_state
from server.checkpoint import save as save_state
from server.enrol import revoke
from server.evaluator import Evaluator
from server.heads import Terms, planned
from server.home import ServerHome
from server.inference import Allowances
from simulations.deployment import keyring_of
from simulations.inference import federation, published_of
from tests.certificates import Authority as Foreign
from tests.inferring import QUICK, Staged, World, make_world, staged, with_terms

RECORDS = load_source(TASKS["digits"]).test.inputs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def stage(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Staged]:
    # Many tests share it, and each begins sessions.
    with pytest.MonkeyPatch.context() as patch, staged(world, tmp_path_factory.mktemp("service")) as on:
        patch.setattr(server.inference, "_OPEN_SESSIONS", 1000)
        yield on


def lines_of(on: Staged) -> list[dict[str, Any]]:
    """Returns the audit log's lines."""
    texts = read_log(on.folder / "queries.log", on.world.home.application_secret())
    return [json.loads(line) for text in texts for line in text.splitlines() if line.startswith("{")]


def word_of(on: Staged, asker: Asker, query: bytes) -> str:
    """Returns the word by which the service refuses a query, or "" where it answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clients.inference.refusal_of", RuntimeError)
        try:
            asker.service.post(ASK, query, 1 << 20)
        except RuntimeError as refusal:
            return str(refusal)
        return ""


def sealed(asker: Asker, **changes: object) -> bytes:
    """Returns a query of an honest record, signed after some of its fields were changed."""
    query = Query.read(asker.seal(asker.features(RECORDS[:1])[0]))
    assert query is not None
    return dataclasses.replace(query, **changes).to_bytes(asker._identity)  # type: ignore[arg-type]


# The flow.


def test_encrypted_answers_are_the_plaintext_integers_and_predict_the_same(stage: Staged):
    asker = stage.asker()
    count = 60
    replies = asker.ask_many(RECORDS[:count])
    parts = stage.world.published.split
    features = parts(RECORDS[:count])
    floats = features @ parts.weights.T + parts.bias
    # The head as integers, by arithmetic of this test's own.
    terms, bound = stage.world.published.terms, stage.world.published.offer.feature_range
    bits = json.loads(stage.world.published.loaded.plan)["feature-bits"]
    steps = (2 ** (bits - 1) - 1) / bound
    scale = (2 ** (terms.weight_bits - 1) - 1) / np.abs(parts.weights).max()
    whole = np.rint(features * steps) @ np.rint(parts.weights * scale).T + np.rint(parts.bias * steps * scale)
    logits = np.stack([reply.logits for reply in replies])
    assert np.array_equal(np.rint(logits * steps * scale), whole)
    assert np.abs(logits * steps * scale - whole).max() < 1e-6
    agree = (logits.argmax(1) == floats.argmax(1)).mean()
    assert agree >= 0.98
    assert all(reply.name == str(reply.label) for reply in replies)
    assert asker.left == stage.world.published.terms.queries - count


@pytest.mark.parametrize("change", [{"scheme": "float", "feature_bits": 20, "weight_bits": 20}, {"hide_weights": True}])
def test_the_other_modes_answer_too(world: World, tmp_path: Path, change: dict[str, Any]):
    terms, parts = dataclasses.replace(QUICK, **change), world.published.split
    loaded, description, plan = planned(parts, terms, world.published.offer.feature_range)
    offer = dataclasses.replace(
        world.published.offer,
        description=description,
        plan=plan.digest,
        query_bytes=plan.query_bytes,
        answer_bytes=plan.answer_bytes,
    )
    head = dataclasses.replace(world.published, offer=offer, loaded=loaded, terms=terms)
    with staged(world, tmp_path, [head]) as on:
        asker = on.asker()
        assert asker.approximate is ("scheme" in change)
        replies = asker.ask_many(RECORDS[:20])
    features = parts(RECORDS[:20])
    floats = features @ parts.weights.T + parts.bias
    error = np.abs(np.stack([reply.logits for reply in replies]) - floats).max()
    assert error < (1e-3 if "scheme" in change else 0.1)
    assert (np.stack([reply.logits for reply in replies]).argmax(1) == floats.argmax(1)).mean() >= 0.95


def test_every_query_is_in_the_log_with_its_cost_and_nothing_of_its_content(stage: Staged):
    asker = stage.asker(queries=5)
    before = len(lines_of(stage))
    replies = asker.ask_many(RECORDS[:3])
    lines = lines_of(stage)[before:]
    assert [line["kind"] for line in lines] == ["ask"] * 3
    offer = asker.offer
    for number, line in enumerate(lines, 1):
        assert line["client"] == "clinic-a"
        assert (line["head"], line["number"], line["verdict"]) == ("digits", number, "answered")
        assert line["bytes_in"] == offer.query_bytes + QUERY_OVERHEAD
        assert line["bytes_out"] == offer.answer_bytes + ANSWER_OVERHEAD
        assert 0 < line["cost_ms"] < 1000
        assert set(line) == {field.name for field in dataclasses.fields(server.inference.Line)}
    # Sealed: neither names nor numbers are readable without the server's secret.
    raw = (stage.folder / "queries.log").read_bytes()
    assert b"clinic" not in raw
    assert b"digits" not in raw
    with pytest.raises(LedgerError):
        list(read_log(stage.folder / "queries.log", Secret(bytes(32))))
    assert replies


def test_two_records_look_alike_to_the_service(stage: Staged):
    asker = stage.asker(queries=10)
    before = len(lines_of(stage))
    for record in (RECORDS[:1], torch.zeros(1, 1, 8, 8)):
        asker.ask(record)
    first, second = (
        {name: value for name, value in line.items() if name not in ("time", "number", "cost_ms")}
        for line in lines_of(stage)[before:]
    )
    assert first == second


# Who may ask.


def _status(on: Staged, certificate: tuple[Path, Path] | None) -> str:
    """Connects as somebody; returns "answered", or what stopped it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(on.world.home.folder / "relay" / "ca.pem")
    if certificate is not None:
        context.load_cert_chain(*certificate)
    try:
        with (
            socket.create_connection(("127.0.0.1", on.service.port), timeout=5) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as link,
        ):
            link.sendall(
                b"POST /v1/infer/heads HTTP/1.1\r\nhost: x\r\ncontent-type: application/tacit\r\n"
                b"content-length: 32\r\n\r\n" + bytes(32)
            )
            head = link.recv(4096)
            return head.split(b" ", 2)[1].decode() if head else "closed"
    except (ssl.SSLError, ConnectionError):
        return "refused"


def test_unknown_foreign_and_absent_certificates_are_not_answered(stage: Staged, tmp_path: Path):
    foreign = Foreign(tmp_path / "foreign")
    assert _status(stage, None) in ("refused", "closed")
    assert _status(stage, foreign.leaf("clinic-a")) in ("refused", "closed")
    member = tmp_path / "member.pem"
    # It is sealed at home.
    member.write_bytes(private.read(stage.world.clients[0].tls))
    assert _status(stage, (member, member)) == "200"


def test_a_revoked_member_is_refused_in_the_middle_of_a_session(tmp_path: Path, world: World):
    home, clients = federation(tmp_path, ("leaver",))
    own = World(world.run, home, clients, world.published)
    with staged(own, tmp_path / "service") as on:
        asker = on.asker()
        assert asker.ask(RECORDS[:1]).name
        revoke(home, "leaver")
        with pytest.raises((IdentityError, RunError)):
            asker.ask(RECORDS[:1])
        with pytest.raises((IdentityError, RunError)):
            on.way().heads()


def test_a_session_belongs_to_one_client(stage: Staged):
    mine, theirs = stage.asker(0, queries=5), stage.asker(1, queries=5)
    query = sealed(mine)
    assert word_of(stage, theirs, query) == "session"
    assert word_of(stage, mine, query) == ""


def test_an_opening_must_be_signed_by_the_member_that_connects(stage: Staged):
    other = stage.world.clients[1].identity()
    with pytest.raises(SealError):
        Asker.begin(stage.way(0), other)


# What is refused, and that each refusal is its own word.


def test_every_kind_of_wrong_query_gets_its_word_and_the_session_goes_on(stage: Staged):
    asker = stage.asker()
    offer = asker.offer
    good = sealed(asker)
    body = Query.read(good)
    assert body is not None
    cases: dict[str, list[bytes]] = {
        "syntax": [b"", b"x", good[:100], b"TACITQ2\n" + good[8:]],
        "session": [sealed(asker, session=os.urandom(16))],
        "head": [sealed(asker, head=bytes(32))],
        "plan": [sealed(asker, plan=bytes(32))],
        "length": [
            sealed(asker, ciphertexts=body.ciphertexts + b"\0"),
            sealed(asker, ciphertexts=body.ciphertexts[:-1]),
        ],
        "signature": [good[:-1] + bytes([good[-1] ^ 1]), body.to_bytes(Secret(bytes(32)).identity("session"))],
        "ciphertext": [
            sealed(asker, ciphertexts=b"\xff" * offer.query_bytes),
            sealed(asker, ciphertexts=bytes(offer.query_bytes)),
        ],
    }
    for word, queries in cases.items():
        for query in queries:
            if len(query) <= offer.query_bytes + QUERY_OVERHEAD:
                assert word_of(stage, asker, query) == word
    assert asker.ask(RECORDS[:1]).name
    verdicts = {line["verdict"] for line in lines_of(stage)}
    assert {"session", "signature"} <= verdicts | {line["verdict"] for line in lines_of(stage)}


def test_a_query_counts_once_and_never_again(stage: Staged):
    asker = stage.asker()
    first = asker.seal(asker.features(RECORDS[:1])[0])
    second = asker.seal(asker.features(RECORDS[1:2])[0])
    assert word_of(stage, asker, second) == ""
    assert word_of(stage, asker, second) == "replayed"
    # An older number too, though it was never seen: what is late is lost.
    assert word_of(stage, asker, first) == "replayed"


def test_planted_bug_a_service_that_forgets_numbers_answers_twice(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Forgetful(server.inference._Session):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, 0 if name == "number" else value)

    monkeypatch.setattr(server.inference, "_Session", Forgetful)
    with staged(world, tmp_path) as on, pytest.raises(AssertionError):
        test_a_query_counts_once_and_never_again(on)


def test_planted_bug_a_service_that_checks_no_signature_takes_a_strangers_query(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server.inference, "is_signed", lambda *_: True)
    with staged(world, tmp_path) as on, pytest.raises(AssertionError):
        test_every_kind_of_wrong_query_gets_its_word_and_the_session_goes_on(on)


def test_the_same_opening_opens_once(stage: Staged):
    client, offer = stage.world.clients[0], stage.way().heads()[0]
    opening = Opening(
        head=offer.version,
        plan=offer.plan,
        session=os.urandom(16).hex(),
        key=Secret(os.urandom(32)).identity("session").public_key,
        queries=1,
        time=int(time.time()),
    )
    way = stage.way()
    way.post(OPEN, opening.to_bytes(client.identity()), 4096)
    for changed, sentence in (
        ({}, "replayed"),
        ({"session": os.urandom(16).hex(), "time": 1}, "clock"),
        ({"session": os.urandom(16).hex(), "time": int(time.time()) + SKEW_S + 60}, "clock"),
        ({"session": os.urandom(16).hex(), "plan": "0" * 64}, "plan"),
        ({"session": os.urandom(16).hex(), "head": "0" * 64}, "head"),
        ({"session": os.urandom(16).hex(), "queries": 10_000}, "syntax"),
    ):
        with pytest.raises(TacitError) as told:
            way.post(OPEN, dataclasses.replace(opening, **changed).to_bytes(client.identity()), 4096)  # type: ignore[arg-type]
        assert str(told.value) == REMEDIES[sentence]


def test_an_opening_at_a_time_no_float_can_hold_is_refused_by_a_word(stage: Staged, monkeypatch: pytest.MonkeyPatch):
    offer = stage.way().heads()[0]
    opening = Opening(
        head=offer.version, plan=offer.plan, session=os.urandom(16).hex(), key="0" * 64, queries=1, time=10**400
    )
    # Whatever the parser lets through.
    monkeypatch.setattr(server.inference.Opening, "read", lambda *_: opening)
    with pytest.raises(Refused, match="clock"):
        stage.do(stage.service.reply("clinic-a", OPEN, b"x"))


# How much may be asked.


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def test_a_session_ends_by_count_and_by_time(world: World, tmp_path: Path):
    clock = Clock()
    with staged(world, tmp_path, [with_terms(world.published, queries=2, session_s=60)], clock=clock) as on:
        asker = on.asker()
        asker.ask_many(RECORDS[:2])
        with pytest.raises(RunError, match="queries left"):
            asker.ask(RECORDS[:1])
        # A client that does not keep the rule itself is told by the service.
        asker.left, asker._key = 1, on.asker(1)._key
        assert word_of(on, asker, sealed(asker)) == "used up"
        other = on.asker()
        clock.now += 61
        assert word_of(on, other, sealed(other)) == "ended"


def test_one_client_cannot_take_the_room_of_all_sessions(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server.inference, "_OPEN_SESSIONS", 2)
    monkeypatch.setattr(server.inference, "_ALL_SESSIONS", 3)
    with staged(world, tmp_path) as on:
        # More sessions than there is room for, each used up at once: none of them is in anybody's way.
        for _ in range(5):
            used = on.asker(0, queries=1)
            used.ask(RECORDS[:1])
        assert on.asker(1).ask(RECORDS[:1]).name
        assert len(on.service._sessions) <= 2
        # A late query still gets its own word, and no other client learns of the session.
        used.left, used._key = 1, on.asker(1)._key
        query = sealed(used)
        assert word_of(on, used, query) == "used up"
        assert word_of(on, on.asker(0), query) == "used up"
        on.service._forget(time.time())
        assert word_of(on, dataclasses.replace(_Pair(used, on.way(1))), query) == "session"  # type: ignore[arg-type]


def test_names_of_ended_sessions_are_kept_and_bounded(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server.inference, "_ALL_SESSIONS", 1)
    with staged(world, tmp_path) as on:
        for _ in range(20):
            on.asker(0, queries=1).ask(RECORDS[:1])
        on.service._forget(time.time())
        assert (len(on.service._sessions), len(on.service._ended)) == (0, 16)


def test_a_client_keeps_within_its_share_of_open_sessions(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server.inference, "_OPEN_SESSIONS", 2)
    monkeypatch.setattr(server.inference, "_ALL_SESSIONS", 3)
    with staged(world, tmp_path) as on:
        on.asker(0)
        on.asker(0)
        with pytest.raises(TacitError, match="few open sessions"):
            on.asker(0)
        assert on.asker(1).ask(RECORDS[:1]).name


def test_a_client_that_asks_too_often_is_told_and_others_go_on(world: World, tmp_path: Path):
    clock = Clock()
    with staged(world, tmp_path, [with_terms(world.published, rate=3.0)], clock=clock) as on:
        eager, calm = on.asker(0), on.asker(1)
        words = [word_of(on, eager, sealed(eager)) for _ in range(10)]
        # Two seconds' worth at once; the list of heads and the opening counted too.
        assert words == [""] * 4 + ["too fast"] * 6
        assert calm.ask(RECORDS[:1]).name
        clock.now += 1
        assert [word_of(on, eager, sealed(eager)) for _ in range(4)] == [""] * 3 + ["too fast"]
        # What was refused for its pace was not charged to the session.
        (session,) = [one for one in on.service._sessions.values() if one.client == "clinic-a"]
        assert session.left == 1000 - 7


def test_an_allowance_outlives_the_service(world: World, tmp_path: Path):
    head = with_terms(world.published, queries=6, allowance=10)
    with staged(world, tmp_path, [head]) as on:
        assert on.asker(queries=6).left == 6
        with pytest.raises(RunError, match="allowance"):
            on.asker(queries=6)
        assert on.asker(queries=4).left == 4
        assert on.asker(1, queries=6).left == 6
    with staged(world, tmp_path, [head]) as on, pytest.raises(RunError, match="allowance"):
        on.asker(queries=1)


def test_allowances_are_on_disk_before_they_are_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept = Allowances(tmp_path / "granted.json")
    assert kept.grant("a", "h", 5, 10)

    def full(*_: object, **__: object) -> None:
        raise RunError("full")

    monkeypatch.setattr(server.inference, "write_whole", full)
    with pytest.raises(RunError):
        kept.grant("a", "h", 5, 10)
    monkeypatch.undo()
    assert kept.of("a", "h") == Allowances(tmp_path / "granted.json").of("a", "h") == 5
    assert not kept.grant("a", "h", 6, 10)
    (tmp_path / "granted.json").write_text("[1")
    with pytest.raises(RunError, match="restore"):
        Allowances(tmp_path / "granted.json")


def test_a_query_that_cannot_be_logged_is_not_answered(world: World, tmp_path: Path):
    with staged(world, tmp_path) as on:
        asker = on.asker()
        assert word_of(on, asker, sealed(asker)) == ""
        shutil.rmtree(tmp_path)
        tmp_path.write_text("no folder any more")
        assert word_of(on, asker, sealed(asker)) == "log"
        tmp_path.unlink()
        tmp_path.mkdir()
        assert word_of(on, asker, sealed(asker)) == ""


def test_two_services_on_one_folder_share_what_is_left(tmp_path: Path):
    path = tmp_path / "granted.json"
    one, other = Allowances(path), Allowances(path)
    assert one.grant("a", "h", 6, 10)
    assert not other.grant("a", "h", 6, 10)
    assert other.grant("a", "h", 4, 10)
    assert other.grant("b", "h", 1, 10)
    assert not one.grant("a", "h", 1, 10)
    assert one.grant("b", "h", 9, 10)
    assert json.loads(path.read_bytes()) == {"a": {"h": 10}, "b": {"h": 10}}
    # A file that is lost while a service runs grants nothing anew.
    path.unlink()
    assert not one.grant("a", "h", 1, 10)


def test_grants_of_many_services_at_a_time_are_never_more_than_the_allowance(tmp_path: Path):
    path = tmp_path / "granted.json"
    kept = [Allowances(path) for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        granted = list(pool.map(lambda index: kept[index % 4].grant("a", "h", 1, 30), range(80)))
    assert sum(granted) == json.loads(path.read_bytes())["a"]["h"] == 30


def test_a_clock_that_is_set_back_locks_nobody_out():
    pace = server.inference._Pace()
    assert pace.admits(2.0, 1e9)
    assert pace.admits(2.0, 1e9 - 86_400)
    assert [pace.admits(2.0, 1e9 - 86_400) for _ in range(3)] == [True, True, False]
    assert pace.admits(2.0, 1e9 - 86_399)


# The evaluator.


def test_a_killed_evaluator_costs_one_query_and_comes_back(world: World, tmp_path: Path):
    with staged(world, tmp_path) as on:
        asker = on.asker()
        assert asker.ask(RECORDS[:1]).name
        (evaluator,) = on.service.evaluators
        # Stopped first, so that it dies with a query in its hands.
        os.kill(evaluator.pid, signal.SIGSTOP)
        query, other = sealed(asker), on.asker(1)
        reply = asyncio.run_coroutine_threadsafe(on.service.reply("clinic-a", ASK, query), on.loop)
        time.sleep(0.2)
        assert not reply.done()
        os.kill(evaluator.pid, signal.SIGKILL)
        with pytest.raises(Refused, match="restarting"):
            reply.result(20)
        deadline = time.monotonic() + 60
        while not evaluator.ready and time.monotonic() < deadline:
            time.sleep(0.05)
        assert other.ask(RECORDS[:1]).name
        assert word_of(on, asker, query) == "replayed"
        assert asker.ask(RECORDS[:1]).name
        assert evaluator.starts == 2
        assert "restarting" in {line["verdict"] for line in lines_of(on)}


def test_an_evaluator_that_dies_while_nobody_asks_is_back_before_somebody_does(world: World):
    async def scenario() -> None:
        evaluator = Evaluator([world.published.loaded])
        await evaluator.start()
        first = evaluator.pid
        os.kill(first, signal.SIGKILL)
        while not evaluator.ready or evaluator.pid == first:
            await asyncio.sleep(0.05)
        assert await evaluator.evaluate(0, b"x" * 100) is None
        await evaluator.close()
        assert not evaluator.ready

    asyncio.run(scenario())


def test_an_evaluator_that_hangs_is_ended(world: World):
    async def scenario() -> None:
        evaluator = Evaluator([world.published.loaded], patience_s=0.3)
        await evaluator.start()
        first = evaluator.pid
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(RunError):
            await evaluator.evaluate(0, b"x" * 100)
        while not evaluator.ready:
            await asyncio.sleep(0.05)
        assert evaluator.pid != first
        assert await evaluator.evaluate(0, b"x" * 100) is None
        await evaluator.close()

    asyncio.run(scenario())


def test_an_evaluator_that_claims_a_longer_answer_than_there_is_is_ended_unread(world: World):
    async def scenario() -> None:
        evaluator = Evaluator([world.published.loaded], patience_s=5)
        await evaluator.start()
        first = evaluator.pid
        most = world.published.offer.answer_bytes
        assert await evaluator.evaluate(0, b"x") is None
        process = evaluator._process
        assert process is not None
        assert process.stdout is not None
        # As a process that was taken over would answer: a length, and then as many bytes as the reader takes.
        process.stdout.feed_data(struct.pack(">IBI", most + 1, 0, 0) + bytes(most + 1))
        with pytest.raises(RunError, match="got its end"):
            await evaluator.evaluate(0, b"x")
        while not evaluator.ready:
            await asyncio.sleep(0.05)
        assert evaluator.pid != first
        await evaluator.close()

    asyncio.run(scenario())


def test_an_evaluator_has_no_more_memory_than_it_was_given_and_no_secret_of_ours(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TACIT_VAULT_PASSPHRASE", "a secret of the service")

    async def scenario() -> None:
        evaluator = Evaluator([world.published.loaded], memory_bytes=1 << 30)
        await evaluator.start()
        limits = Path(f"/proc/{evaluator.pid}/limits").read_text()
        assert f"Max address space        {1 << 30}" in " ".join(limits.split()).replace(
            "Max address space", "Max address space       "
        )
        assert resource.prlimit(evaluator.pid, resource.RLIMIT_CORE) == (0, 0)
        assert b"a secret" not in Path(f"/proc/{evaluator.pid}/environ").read_bytes()
        opened = {os.readlink(link) for link in Path(f"/proc/{evaluator.pid}/fd").iterdir()}
        assert not any(str(world.home.folder) in place for place in opened)
        await evaluator.close()
        small = Evaluator([world.published.loaded], memory_bytes=1 << 26)
        with pytest.raises(RunError, match=r"expected (the evaluator|heads)"):
            await small.start()
        await small.close()

    asyncio.run(scenario())


# Mutations.


def _mutated(data: bytes, coins: random.Random) -> bytes:
    """Returns other bytes, of the same length more often than not: most others end at the check of length."""
    place, length = coins.randrange(len(data)), 1 << coins.randrange(1, 12)
    match coins.randrange(8):
        case 0:
            return data[:place] + bytes([data[place] ^ (1 << coins.randrange(8))]) + data[place + 1 :]
        case 1:
            return data[:place] + coins.randbytes(min(length, len(data) - place)) + data[place + length :]
        case 2:
            return (
                data[:place] + bytes([coins.choice((0, 255))]) * min(length, len(data) - place) + data[place + length :]
            )
        case 3:
            other = coins.randrange(len(data))
            piece = data[other : other + length]
            return (data[:place] + piece + data[place + len(piece) :])[: len(data)]
        case 4:
            return data[:place]
        case 5:
            return data + coins.randbytes(coins.randrange(1, 64))
        case 6:
            return coins.randbytes(len(data))
        case _:
            return data[place:] + data[:place]


def _attacked(on: Staged, count: int, seed: int = 3) -> dict[str, int]:
    """Sends mutated questions of every kind; returns how often which word came back ("" for an answer)."""
    coins, words = random.Random(seed), dict[str, int]()
    asker, way = on.asker(), on.way()
    client = on.world.clients[0].identity()
    features = asker.features(RECORDS[:8])
    pids = [evaluator.pid for evaluator in on.service.evaluators]

    async def ask(path: bytes, body: bytes) -> str:
        try:
            await on.service.reply("clinic-a", path, body)
            return ""
        except Refused as refusal:
            return refusal.word

    for index in range(count):
        if asker.left < 2:
            asker = on.asker()
        match index % 5:
            case 0:  # ciphertexts by a hostile member: signed, so that they reach the parser
                query = Query.read(asker.seal(features[index % 8]))
                assert query is not None
                changed = _mutated(query.ciphertexts, coins)[: asker.offer.query_bytes]
                path, body = ASK, dataclasses.replace(query, ciphertexts=changed).to_bytes(asker._identity)
            case 1:  # and with everything around them
                path, body = ASK, _mutated(asker.seal(features[index % 8]), coins)
            case 2:  # values that are residues, but not of a ciphertext
                query = Query.read(asker.seal(features[index % 8]))
                assert query is not None
                data = bytearray(query.ciphertexts)
                for _ in range(coins.randrange(1, 200)):
                    data[coins.randrange(20, len(data))] ^= 1 << coins.randrange(8)
                path, body = ASK, dataclasses.replace(query, ciphertexts=bytes(data)).to_bytes(asker._identity)
            case 3:  # openings
                opening = Opening(
                    head=asker.offer.version,
                    plan=asker.offer.plan,
                    session=coins.randbytes(16).hex(),
                    key="0" * 64,
                    queries=1,
                    time=int(time.time()),
                ).to_bytes(client)
                path, body = OPEN, _mutated(opening, coins)
            case _:  # questions after heads
                path, body = HEADS, _mutated(bytes(32), coins)
        # Every tenth over TLS and HTTP, the others behind them: what these refuse is the gateway's own test.
        if index % 10 == 0 and len(body) <= asker.offer.query_bytes + QUERY_OVERHEAD:
            word = word_of(on, dataclasses.replace(_Pair(asker, way)), body) if path == ASK else on.do(ask(path, body))  # type: ignore[arg-type]
        else:
            word = on.do(ask(path, body))
        words[word] = words.get(word, 0) + 1
    assert set(words) <= {"", *REMEDIES}
    assert [evaluator.pid for evaluator in on.service.evaluators] == pids, "an evaluator died"
    assert on.service.counters["fault"] == 0
    assert asker.ask(RECORDS[:1]).name
    return words


@dataclasses.dataclass
class _Pair:
    asker: Asker
    service: object


def test_mutated_questions_are_refused_with_words_and_nothing_dies(world: World, tmp_path: Path):
    with staged(world, tmp_path) as on:
        words = _attacked(on, 300)
    assert {"syntax", "length", "signature", "ciphertext", ""} <= set(words)


@pytest.mark.slow
def test_ten_thousand_mutated_questions_kill_nothing_and_fill_no_memory(world: World, tmp_path: Path):
    with staged(world, tmp_path) as on:
        _attacked(on, 500, seed=4)
        (evaluator,) = on.service.evaluators

        def held() -> int:
            pages = [Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in (os.getpid(), evaluator.pid)]
            return sum(int(one) for one in pages) * resource.getpagesize()

        before = held()
        words = _attacked(on, 10_000, seed=5)
        assert sum(words.values()) == 10_000
        assert held() - before < 100 << 20


# The client.


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (np.full((1, 64), np.nan), "finite"),
        (np.full((1, 64), np.inf), "finite"),
        (np.full((1, 64), 1e3), "within"),
        (np.zeros((1, 63)), "64 features"),
        (np.zeros(64), "64 features"),
    ],
)
def test_features_that_the_head_is_not_for_are_refused_before_anything_is_sent(
    stage: Staged, features: np.ndarray[Any, Any], words: str
):
    asker = stage.asker(queries=3)
    before = len(lines_of(stage))
    with pytest.raises(DataError, match=words):
        asker.ask_features(features)
    assert (asker.left, asker.number, len(lines_of(stage))) == (3, 0, before)
    with pytest.raises(DataError, match="shape"):
        asker.ask_many(torch.zeros(1, 1, 8, 9))


def test_an_answer_decrypted_with_another_key_is_noise(stage: Staged):
    mine, other = stage.asker(queries=5), stage.asker(queries=5)
    query, answer = mine.exchange(mine.seal(mine.features(RECORDS[:1])[0]))
    right = mine.open(query, answer).logits
    mine._key = other._key
    try:
        wrong = mine.open(query, answer).logits
    except TacitError:
        return
    assert np.abs(wrong - right).max() > 1


def test_only_the_federations_server_is_believed(stage: Staged):
    asker = stage.asker(queries=5)
    query, answer = asker.exchange(asker.seal(asker.features(RECORDS[:1])[0]))
    for changed in (answer[:-1] + bytes([answer[-1] ^ 1]), answer[:100] + b"\0" + answer[101:], answer[:-1]):
        with pytest.raises(SealError, match="signed by the federation"):
            asker.open(query, changed)
    forged = tell_answer(query, asker.session, asker.number, answer[64:-64], Secret(bytes(32)).identity("server"))
    with pytest.raises(SealError):
        asker.open(query, forged)


def _answered(head: str, body: bytes, most: int = 100) -> bytes:
    """Returns what a client takes of an answer that a server writes as it likes, in clear."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            with listener.accept()[0] as link:
                link.recv(4096)
                # The client may hang up in the middle.
                with contextlib.suppress(OSError):
                    link.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + body)

        thread = threading.Thread(target=answer)
        thread.start()
        way = Service.__new__(Service)
        way.address, way.server = Address("127.0.0.1", port), ""
        way._link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)  # type: ignore[assignment]
        try:
            return way.post(ASK, b"", most)
        finally:
            way.close()
            thread.join(10)


def test_an_answer_is_read_up_to_its_bound_whatever_it_announces():
    assert _answered("content-length: 100", bytes(100)) == bytes(100)
    chunk = f"{1 << 20:x}\r\n".encode() + bytes(1 << 20) + b"\r\n"
    for head, body in (
        ("content-length: 5\r\ntransfer-encoding: chunked", chunk * 4 + b"0\r\n\r\n"),
        ("transfer-encoding: chunked", chunk + b"0\r\n\r\n"),
        ("content-length: " + "9" * 5000, b""),
        ("content-length: 101", bytes(101)),
        ("content-length: 50", bytes(49)),
        ("content-length: -1", b""),
        ("x: y", bytes(10)),
    ):
        with pytest.raises(RunError, match="inference service"):
            _answered(head, body)


def test_a_head_of_a_task_that_nobody_here_named_is_not_imported(stage: Staged, tmp_path: Path):
    offer = dataclasses.replace(stage.world.published.offer, task="evil.module:TASK")
    with pytest.raises(PlanError, match="built-in"):
        Asker(stage.way(), offer, None, bytes(32), bytes(16), left=1, until=1)  # type: ignore[arg-type]
    other = dataclasses.replace(stage.world.published.offer, features="0" * 64)
    with pytest.raises(PlanError, match="another one here"):
        Asker(stage.way(), other, None, bytes(32), bytes(16), left=1, until=1)  # type: ignore[arg-type]


def test_a_session_at_rest_is_sealed_and_private_and_counts_before_it_sends(stage: Staged, tmp_path: Path):
    home, path = stage.world.clients[0], tmp_path / "session"
    save(stage.asker(queries=3), path, home.secret())
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"digits" not in path.read_bytes()
    asker = load(path, home)
    assert asker.ask(RECORDS[:1]).name
    # The process ends between noting a query and sending it: it is lost, and its number is not used again.
    asker.seal(asker.features(RECORDS[:1])[0])
    asker.close()
    again = load(path, home)
    assert (again.left, again.number) == (1, 2)
    assert again.ask(RECORDS[:1]).name
    again.close()
    with pytest.raises(RunError, match="ended"):
        load(path, home)
    assert not path.exists()
    save(stage.asker(queries=3), path, home.secret())
    with pytest.raises(LedgerError):
        load(path, stage.world.clients[1])
    path.chmod(0o644)
    with pytest.raises(LedgerError, match="0600"):
        load(path, home)


def _asked_by_two(stage: Staged, path: Path) -> None:
    """Two processes open one session at a time: one lock for each, as for any two descriptors."""
    home = stage.world.clients[0]
    save(stage.asker(queries=3), path, home.secret())
    first = load(path, home)
    with pytest.raises(RunError, match="in use"):
        load(path, home)
    with pytest.raises(RunError, match="in use"):
        save(stage.asker(queries=3), path, home.secret())
    first.ask_many(RECORDS[:2])
    first.close()
    # Who let go of it does not count down what somebody else has now.
    with pytest.raises(RunError, match="closed"):
        first.seal(first.features(RECORDS[:1])[0])
    second = load(path, home)
    assert (second.left, second.number) == (1, 2)
    # Nobody has it any more, and so nobody holds it.
    del second
    gc.collect()
    load(path, home).close()


def test_g25_two_that_share_a_sessions_file_do_not_ask_twice_as_often(stage: Staged, tmp_path: Path):
    _asked_by_two(stage, tmp_path / "session")


def test_g25_planted_bug_a_session_without_a_lock_is_found(
    stage: Staged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        _asked_by_two(stage, tmp_path / "session")


# Guarantees by name.


def _republished(world: World, run: Path, **more: Any) -> Any:
    return published_of(run, world.home, terms=QUICK, **more)


def test_g23_a_head_that_no_report_vouches_for_is_refused_unless_forced(world: World, tmp_path: Path):
    report = json.loads((world.run / "report.json").read_text())
    cases: dict[str, Callable[[Path], None]] = {
        "no report": lambda run: (run / "report.json").unlink(),
        "changed": lambda run: (run / "report.json").write_text(
            json.dumps(report | {"headline": report["headline"] | {"epsilon": 0.1}})
        ),
        "another job's": lambda run: (run / "report.json").write_text(
            json.dumps(report | {"run": report["run"] | {"job": "0" * 32}})
        ),
    }
    for name, change in cases.items():
        run = tmp_path / name.replace(" ", "-")
        shutil.copytree(world.run, run)
        change(run)
        with pytest.raises(RunError):
            _republished(world, run)
        forced = _republished(world, run, force=True)
        assert forced.offer.privacy["guarantee"] is False
        assert "No privacy guarantee" in forced.offer.privacy["words"]
    assert world.published.offer.privacy["epsilon"] == pytest.approx(report["headline"]["epsilon"])


def test_g23_a_report_of_another_round_vouches_for_nothing(world: World, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(world.run, run)
    state = load_state(run / "checkpoints" / "latest.ckpt")
    state.round += 1
    save_state(state, run / "checkpoints" / "latest.ckpt")
    with pytest.raises(RunError, match="round 4"):
        _republished(world, run)


def test_g23_another_model_of_the_same_job_and_round_is_not_vouched_for(world: World, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(world.run, run)
    state = load_state(run / "checkpoints" / "latest.ckpt")
    name = next(iter(state.model))
    state.model[name].flat[0] = np.nextafter(state.model[name].flat[0], np.float32(1e3))
    save_state(state, run / "checkpoints" / "latest.ckpt")
    with pytest.raises(RunError, match="got another one"):
        _republished(world, run)
    # Clients are told whose keys these were.
    assert "simulation" in world.published.offer.privacy["words"]


def test_g23_planted_bug_a_publisher_that_believes_any_report_is_found(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("server.heads.passed", lambda checks: True)
    with pytest.raises(pytest.fail.Exception):
        test_g23_a_head_that_no_report_vouches_for_is_refused_unless_forced(world, tmp_path)


def test_g24_a_head_whose_numbers_break_the_bound_is_refused_when_it_is_published(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # What the report says is another test's.
    monkeypatch.setattr("server.heads.privacy_of", lambda *_, **__: dict(world.published.offer.privacy))
    run = tmp_path / "run"
    shutil.copytree(world.run, run)
    path = run / "checkpoints" / "latest.ckpt"
    for name, value, words in (("1.bias", 1e9, "expected integer logits"), ("weight", np.nan, "finite")):
        state = load_state(world.run / "checkpoints" / "latest.ckpt")
        for key in state.model:
            if key.endswith(name.rpartition(".")[2]):
                state.model[key][...] = value
        save_state(state, path)
        with pytest.raises((PlanError, RunError), match=words):
            _republished(world, run)
    with pytest.raises(PlanError, match="bits"):
        published_of(world.run, world.home, terms=dataclasses.replace(QUICK, feature_bits=2))


class Hostile:
    """A server that signs whatever it likes and sees whatever the client sends: the strongest evaluator there is."""

    def __init__(self, offer: Offer, craft: Callable[[int], bytes], key: Any) -> None:
        self.offer, self.craft, self.key = offer, craft, key
        self.server, self.address = key.public_key, "nowhere"
        self.seen: list[tuple[bytes, int]] = []

    def close(self) -> None:
        self.seen.append((b"close", 0))

    def post(self, path: bytes, body: bytes, most: int) -> bytes:
        self.seen.append((path, len(body)))
        query = Query.read(body)
        assert query is not None
        return tell_answer(body, query.session, query.number, self.craft(query.number - 1), self.key)


def _victim(world: World, craft: Callable[[int], bytes]) -> tuple[Asker, Hostile]:
    from privacy.he import HeadDescription, QueryKey

    offer = with_terms(world.published, queries=100_000).offer
    hostile = Hostile(offer, craft, Secret(bytes([7] * 32)).identity("server"))
    key = QueryKey.fresh(HeadDescription.from_bytes(offer.description), queries=100_000)
    asker = Asker(hostile, offer, key, bytes(32), bytes(16), left=100_000, until=1 << 40)  # type: ignore[arg-type]
    return asker, hostile


def _answer(world: World, second: np.ndarray[Any, Any]) -> bytes:
    """Builds an answer whose first part is zero and whose second is a polynomial of the server's choice."""
    from privacy.he import HeadDescription
    from privacy.he.wire import pack

    description = HeadDescription.from_bytes(world.published.offer.description)
    plan = description.plan
    assert plan.outputs == 1
    coefficients = second.astype(np.int64) % (1 << plan.answer_bits)
    values = np.concatenate((np.zeros(plan.classes, np.int64), coefficients))
    answer = description.mark + pack(values, plan.answer_bits)
    assert len(answer) == plan.answer_bytes
    return answer


def _probes(world: World) -> tuple[list[tuple[int, int]], np.ndarray[Any, Any], Any]:
    """Which power of X to send in which query; where the logits then stand; the plan."""
    from privacy.he import HeadDescription

    plan = HeadDescription.from_bytes(world.published.offer.description).plan
    n, block = plan.parameters.ring, plan.block
    where = np.arange(plan.classes) * block + block - 1
    step = plan.classes * block
    powers = [(start + shift) % n for start in range(0, n, step) for shift in range(block)]
    return [(power, 1) for power in powers], where, plan


def _recovered(world: World, reported: Callable[[int], np.ndarray[Any, Any] | None]) -> np.ndarray[Any, Any]:
    """The key-recovery attack: with c1 = v X^j each logit is v times a coefficient of the secret key.

    Args:
        world: Of the head.
        reported: What the client let the server know of the logits of a query, as integers; None for nothing.

    Returns:
        The key that the attacker believes in, shape ``(N,)``.
    """
    probes, where, plan = _probes(world)
    n = plan.parameters.ring
    key = np.zeros(n, dtype=np.int64)
    for index, (power, _) in enumerate(probes):
        logits = reported(index)
        if logits is None:
            continue
        places = (where - power) % n
        signs = np.where(where - power < 0, -1, 1)
        key[places] = np.rint(logits).astype(np.int64) * signs
    return key


def _run_attack(world: World, leak: Callable[[Reply], np.ndarray[Any, Any] | None]) -> float:
    """Returns which share of an unseen answer's logits the attacker predicts, with what a client leaked to it."""
    from privacy.he import HeadDescription

    probes, where, plan = _probes(world)
    n, step = plan.parameters.ring, plan.answer_bits - plan.parameters.plain_bits
    one = 1 << step
    polynomials = []
    for power, value in probes:
        second = np.zeros(n, dtype=np.int64)
        second[power] = value * one
        polynomials.append(second)
    # A last answer with many terms, whose logits the attacker has to predict.
    coins = np.random.default_rng(9)
    last = np.zeros(n, dtype=np.int64)
    last[coins.choice(n, 200, replace=False)] = coins.choice((-one, one), 200)
    polynomials.append(last)
    asker, hostile = _victim(world, lambda index: _answer(world, polynomials[index]))
    description = HeadDescription.from_bytes(world.published.offer.description)
    unit = description.feature_scale * description.weight_scale
    features = np.zeros((len(polynomials), plan.features))
    replies = asker.ask_features(features)
    assert hostile.seen == [*[(ASK, hostile.seen[0][1])] * len(polynomials), (b"close", 0)]
    told = [leak(reply) for reply in replies[:-1]]
    key = _recovered(world, lambda index: None if told[index] is None else told[index] * unit)  # type: ignore[operator]
    product = np.zeros(n, dtype=np.int64)
    for power in np.flatnonzero(last):
        rolled = np.roll(key, power)
        rolled[:power] *= -1
        product += rolled * (last[power] // one)
    truth = np.rint(replies[-1].logits * unit).astype(np.int64)
    return float((product[where] == truth).mean())


def test_g25_a_client_that_reports_what_it_decrypted_gives_away_its_key(world: World):
    # The planted bug: "accuracy feedback", a DP metric of the logits, or a crash report with them in it.
    assert _run_attack(world, lambda reply: reply.logits) == 1.0


def test_g25_ours_sends_nothing_after_an_answer_and_the_attack_gains_nothing(world: World):
    # What our client lets the server know of the logits is what it sends afterwards: the assertion in the attack says
    # that this is the queries alone, all of one length, whatever was in the answers.
    assert _run_attack(world, lambda reply: None) <= 0.3


def test_g25_what_the_service_sees_is_the_same_whatever_the_answers_decrypt_to(world: World):
    plan = _probes(world)[2]
    n = plan.parameters.ring
    transcripts = []
    for craft in (lambda index: np.zeros(n), lambda index: np.full(n, index * 12345), lambda index: None):

        def answer(index: int, craft: Callable[[int], Any] = craft) -> bytes:
            second = craft(index)
            # The last one is no answer at all, though signed.
            return b"\xff" * plan.answer_bytes if second is None else _answer(world, second)

        asker, hostile = _victim(world, answer)
        try:
            asker.ask_features(np.zeros((20, plan.features)))
        except TacitError:
            pass
        transcripts.append(list(hostile.seen))
    assert transcripts[0] == transcripts[1] == transcripts[2]
    assert len(transcripts[0]) == 21
    assert transcripts[0][-1] == (b"close", 0)


def test_g25_the_connection_ends_before_anything_is_decrypted(world: World, monkeypatch: pytest.MonkeyPatch):
    plan = _probes(world)[2]
    asker, hostile = _victim(world, lambda _: _answer(world, np.zeros(plan.parameters.ring)))
    honest = Asker.open

    def noted(self: Asker, query: bytes, answer: bytes) -> Reply:
        hostile.seen.append((b"decrypted", 0))
        return honest(self, query, answer)

    monkeypatch.setattr(Asker, "open", noted)
    asker.ask_features(np.zeros((3, plan.features)))
    assert [what for what, _ in hostile.seen] == [ASK] * 3 + [b"close"] + [b"decrypted"] * 3


def test_g25_planted_bug_a_client_that_hangs_up_after_decrypting_is_seen(world: World, monkeypatch: pytest.MonkeyPatch):
    def late(self: Asker, features: np.ndarray[Any, Any]) -> list[Reply]:
        replies = [self.open(*pair) for pair in [self.exchange(self.seal(row)) for row in features]]
        self.service.close()
        return replies

    monkeypatch.setattr(Asker, "ask_features", late)
    with pytest.raises(AssertionError):
        test_g25_the_connection_ends_before_anything_is_decrypted(world, monkeypatch)


def test_g25_planted_bug_a_client_that_asks_again_after_a_bad_answer_is_seen(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    honest = Asker.ask_features

    def retrying(self: Asker, features: np.ndarray[Any, Any]) -> list[Reply]:
        try:
            return honest(self, features)
        except TacitError:
            return honest(self, features)

    monkeypatch.setattr(Asker, "ask_features", retrying)
    with pytest.raises(AssertionError):
        test_g25_what_the_service_sees_is_the_same_whatever_the_answers_decrypt_to(world)


def test_g25_one_secret_key_serves_one_session_of_so_many_queries(stage: Staged):
    first, second = stage.asker(queries=3), stage.asker(queries=3)
    assert first._key.save() != second._key.save()
    assert first.session != second.session
    first.ask_many(RECORDS[:3])
    with pytest.raises(RunError, match="queries left"):
        first.ask(RECORDS[:1])
    first.left = 5
    # The key itself refuses too, whatever the session says.
    with pytest.raises(HeadError, match="spent"):
        first.ask(RECORDS[:1])


def test_terms_out_of_range_are_refused():
    for changes in ({"queries": 0}, {"session_s": 0}, {"rate": 0.0}, {"rate": float("nan")}, {"allowance": 0}):
        with pytest.raises(PlanError):
            Terms(**changes)  # type: ignore[arg-type]


def test_a_service_without_heads_or_with_two_of_one_name_is_refused(world: World, tmp_path: Path):
    for heads in ([world.published, world.published],):
        with pytest.raises(PlanError, match="differ"), staged(world, tmp_path, heads):
            pass


def test_a_client_is_not_talked_into_weaker_parameters(stage: Staged, monkeypatch: pytest.MonkeyPatch):
    honest = stage.world.published.offer
    told = json.loads(honest.description)

    def offered(**changes: Any) -> Offer:
        return dataclasses.replace(honest, **changes)

    def described(**changes: Any) -> bytes:
        return canonical(told | {"plan": told["plan"] | {"parameters": told["plan"]["parameters"] | changes}})

    def begun(offer: Offer) -> None:
        way = stage.way()
        monkeypatch.setattr(way, "heads", lambda: [offer])
        before = len(lines_of(stage))
        with pytest.raises((PlanError, DataError), match="expected"):
            Asker.begin(way, stage.world.clients[0].identity())
        # Refused before anything was opened.
        assert len(lines_of(stage)) == before
        monkeypatch.undo()

    ring = told["plan"]["parameters"]["ring"]
    for changed in (described(ring=ring // 2), described(primes=[*told["plan"]["parameters"]["primes"]] * 2)):
        begun(offered(description=changed))
    begun(offered(description=b"{}"))
    begun(offered(feature_range=honest.feature_range / 2))
    begun(offered(query_bytes=honest.query_bytes + 1))
    begun(offered(inputs=(1, 8, 7)))
    # Where the packed layout works, nobody needs the parser of SEAL's own streams; and no honest query is so large.
    parts = stage.world.published.split
    begun(_planned(honest, parts, wire=Wire.SEAL))
    small = HeadDescription.from_bytes(honest.description)
    wide = dataclasses.replace(small.plan, parameters=Parameters.widest(32768, 1, 28), block=1)
    assert wide.query_bytes > 4 << 20
    huge = _with_description(honest, dataclasses.replace(small, plan=wide))
    begun(huge)


def _with_description(offer: Offer, description: HeadDescription) -> Offer:
    plan = description.plan
    return dataclasses.replace(
        offer,
        description=description.to_bytes(),
        plan=plan.digest,
        query_bytes=plan.query_bytes,
        answer_bytes=plan.answer_bytes,
    )


def _planned(offer: Offer, parts: Split, **wanted: Any) -> Offer:
    """Returns the offer of the same head under another plan."""
    plan = plan_head(features=parts.weights.shape[1], classes=len(parts.weights), **wanted)
    bound = offer.feature_range
    head = EncryptedHead.load(plan, parts.weights.tolist(), parts.bias.tolist(), (-bound, bound))
    return _with_description(offer, head.public)


def test_how_long_a_key_serves_is_the_clients_to_say(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    generous = with_terms(world.published, queries=500_000, session_s=30 * 86400)
    with staged(world, tmp_path, [generous]) as on:
        identity = world.clients[0].identity()
        asker = Asker.begin(on.way(), identity)
        assert (asker.left, asker._key.remaining) == (10_000, 10_000)
        assert asker._key.expires <= time.time() + 86_400
        assert asker.until <= time.time() + 86_400
        longer = Asker.begin(on.way(), identity, queries=20_000, life_s=2 * 86400)
        assert (longer.left, longer._key.remaining) == (20_000, 20_000)
        assert time.time() + 86_400 < longer.until <= time.time() + 2 * 86_400
        # A session that is longer than was asked for is not.
        monkeypatch.setattr("clients.inference.read_opened", lambda *_: (1 << 20, 1 << 40))
        asker = Asker.begin(on.way(), identity, queries=5, life_s=60)
        assert asker.left == 5
        assert asker.until <= time.time() + 60


def test_whatever_seal_says_of_an_answer_is_one_of_our_errors(world: World):
    offer = _planned(world.published.offer, world.published.split, wire=Wire.SEAL)
    description = HeadDescription.from_bytes(offer.description)
    plan, of = description.plan, stream.context(description.plan.parameters)
    key = seal.KeyGenerator(of).secret_key()
    transformed = seal.Ciphertext()
    seal.Encryptor(of, key).encrypt_symmetric(seal.Plaintext("1"), transformed)
    seal.Evaluator(of).transform_to_ntt_inplace(transformed)
    assert transformed.is_ntt_form()
    slot = (plan.answer_bytes - len(description.mark)) // plan.outputs
    answer = description.mark + filled(stream.dumps(transformed), slot) * plan.outputs
    hostile = Hostile(offer, lambda _: answer, Secret(bytes([7] * 32)).identity("server"))
    asker = Asker(
        hostile,  # type: ignore[arg-type]
        offer,
        QueryKey.fresh(description),
        bytes(32),
        bytes(16),
        left=9,
        until=1 << 40,
    )
    with pytest.raises(HeadError, match="another ciphertext"):
        asker.ask_features(np.zeros((1, plan.features)))


def test_a_feature_map_that_pytorch_cannot_build_is_refused_with_a_sentence(
    stage: Staged, monkeypatch: pytest.MonkeyPatch
):
    def fresh(shape: object, seed: int) -> torch.nn.Module:
        torch.zeros(1, 2) @ torch.zeros(3, 1)  # PyTorch's own RuntimeError for layers that do not fit a shape
        raise AssertionError

    monkeypatch.setattr("clients.inference.find_task", lambda _: SimpleNamespace(fresh=fresh, features=None))
    with pytest.raises(PlanError, match="feature map of task"):
        backbone_of(stage.world.published.offer)


def test_a_deployed_run_is_published_by_its_own_server_alone(world: World, tmp_path: Path):
    # As a deployed run leaves it: signed by the home's application, sealed by the home's keys, no key inside.
    run, folder = tmp_path / "run", tmp_path / "server"
    shutil.copytree(world.run, run)
    shutil.copytree(world.home.folder, folder)
    key = folder / "application" / "server.key"
    (run / "server.key").replace(key)
    application = Secret.load_or_create(key).identity("server").public_key
    home = ServerHome(folder, dataclasses.replace(world.home.settings, application=application))
    state = load_state(run / "checkpoints" / "latest.ckpt")
    state.vault = keyring_of(home)
    save_state(state, run / "checkpoints" / "latest.ckpt")
    assert is_sealed(run / "checkpoints" / "latest.ckpt")
    made = published_of(run, home, terms=QUICK)
    assert made.offer.privacy == world.published.offer.privacy
    assert made.offer.model != world.published.offer.model, "versions are told apart under each server's own secret"
    # Another server that has the keys, of a copy of the home, has not signed it.
    with pytest.raises(RunError, match="signed by this server"):
        published_of(run, world.home, terms=QUICK)
    # Whoever has no keys cannot put a model of his own in its place.
    shutil.copy(world.run / "checkpoints" / "latest.ckpt", run / "checkpoints" / "latest.ckpt")
    with pytest.raises(VaultError, match="got one in clear"):
        published_of(run, home, terms=QUICK)
