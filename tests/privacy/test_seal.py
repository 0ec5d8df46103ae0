"""Sealed sessions: nobody but the other end reads, writes, repeats, reorders or redirects a message."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import pickle
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import seal
from privacy.errors import SealError
from privacy.identity import Identity
from privacy.seal import (
    ACCEPT_BYTES,
    HELLO_BYTES,
    MOST_BYTES,
    OFFER_BYTES,
    Binding,
    ClientEpoch,
    ClientSession,
    ServerEpoch,
    ServerSession,
    Step,
    sealed_bytes,
    step_of,
)
from tests.vectors import make_seal as oracle

SERVER, CLIENT, FELLOW = (Identity(bytes((number,)) * 32) for number in (1, 2, 3))
JOB, BUNDLE, TERMS, RUN = "0a" * 16, "0b" * 32, "0c" * 32, 7
TEXT = b"the weights of clinic 7, and the receipt of their charge"


def server_epoch(**changed: Any) -> ServerEpoch:
    return ServerEpoch(SERVER, **{"job": JOB, "run": RUN, "bundle": BUNDLE, "terms": TERMS, **changed})


def client_epoch(identity: Identity = CLIENT, **changed: Any) -> ClientEpoch:
    return ClientEpoch(identity, SERVER.public_key, **{"run": RUN, "bundle": BUNDLE, **changed})


def joined(epoch: ServerEpoch, identity: Identity = CLIENT) -> tuple[ServerSession, ClientSession]:
    """Returns both ends of a new session."""
    client = client_epoch(identity, run=epoch._bound.run, bundle=epoch._bound.bundle)
    session, accept = epoch.accept(identity.public_key, client.offer(epoch.hello(identity.public_key)))
    return session, client.accept(accept)


@pytest.fixture
def ends() -> tuple[ServerSession, ClientSession]:
    return joined(server_epoch())


def flipped(data: bytes | memoryview, at: int, mask: int = 1) -> bytes:
    copied = bytearray(data)
    copied[at] ^= mask
    return bytes(copied)


# -- what works ------------------------------------------------------------------------------------------------------


def test_both_directions_carry_what_was_sealed(ends: tuple[ServerSession, ClientSession]) -> None:
    server, client = ends
    for parts in ((TEXT,), (TEXT[:9], memoryview(TEXT)[9:]), (b"",), (), (bytes(5000),)):
        assert client.open("round", 3, server.seal("round", 3, *parts)) == b"".join(parts)
        assert server.open("reply", 3, client.seal("reply", 3, *parts)) == b"".join(parts)
    assert client.read(server.seal("terms", 0, TEXT)) == ("terms", 0, TEXT)


def test_numbers_of_more_than_a_byte_are_sealed_as_their_memory(ends: tuple[ServerSession, ClientSession]) -> None:
    import numpy as np

    server, client = ends
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert client.open("round", 1, server.seal("round", 1, numbers.data, np.zeros((0, 3)).data)) == numbers.tobytes()


def test_the_lengths_are_those_that_the_protocol_says(ends: tuple[ServerSession, ClientSession]) -> None:
    epoch, client = server_epoch(), client_epoch()
    hello = epoch.hello(CLIENT.public_key)
    offer = client.offer(hello)
    _, accept = epoch.accept(CLIENT.public_key, offer)
    assert (len(hello), len(offer), len(accept)) == (HELLO_BYTES, OFFER_BYTES, ACCEPT_BYTES) == (264, 1360, 1280)
    for length in (0, 1, 1024, 1025):
        assert len(ends[0].seal("round", 1, bytes(length))) == sealed_bytes(length)


def test_bytes_say_what_they_claim_to_be() -> None:
    epoch, client = server_epoch(), client_epoch()
    hello = epoch.hello(CLIENT.public_key)
    offer = client.offer(hello)
    session, accept = epoch.accept(CLIENT.public_key, offer)
    broadcast = epoch.broadcast(1, TEXT)
    said = [hello, offer, accept, session.seal("round", 1), session.wrap(broadcast), broadcast.body]
    assert [step_of(data) for data in said] == list(Step)
    assert [step_of(data) for data in (b"", b"tacit/lost/1\n", hello[:13], flipped(hello, 13, 0x80))] == [None] * 4


def test_the_client_learns_job_and_terms_from_the_hello_and_compares_what_it_knows() -> None:
    _, client = joined(server_epoch())
    expected = Binding(job=JOB, run=RUN, server=SERVER.public_key, client=CLIENT.public_key, bundle=BUNDLE, terms=TERMS)
    assert client.binding == expected == Binding.from_bytes(expected.to_bytes())


# -- vectors from another path ---------------------------------------------------------------------------------------


def _bytes(value: Any) -> Any:
    """Undoes `make_seal.as_text`, but for words."""
    match value:
        case dict():
            return {key: one if key in ("kind", "step", "fault") else _bytes(one) for key, one in value.items()}
        case list():
            return [_bytes(one) for one in value]
        case str():
            return bytes.fromhex(value)
    return value


VECTORS = _bytes(json.loads((Path(__file__).parents[1] / "vectors" / "seal.json").read_text()))
V_SERVER, V_CLIENT = Identity(VECTORS["server_seed"]), Identity(VECTORS["client_seed"])


def _draws(monkeypatch: pytest.MonkeyPatch, *drawn: bytes) -> None:
    """Makes the next random bytes these."""
    queue = list(drawn)

    def draw(length: int) -> bytes:
        assert len(queue[0]) == length
        return queue.pop(0)

    monkeypatch.setattr(seal.os, "urandom", draw)


def _vector_epochs(monkeypatch: pytest.MonkeyPatch) -> tuple[ServerEpoch, ClientEpoch]:
    fields = {name: VECTORS[name].hex() for name in ("job", "bundle", "terms")}
    server = ServerEpoch(V_SERVER, run=VECTORS["run"], **fields)
    client = ClientEpoch(V_CLIENT, V_SERVER.public_key, run=VECTORS["run"], **fields)
    mlkem = MLKEM768PrivateKey.from_seed_bytes(VECTORS["mlkem_seed"])
    x25519 = X25519PrivateKey.from_private_bytes(VECTORS["x25519"])
    monkeypatch.setattr(seal, "_fresh_keys", lambda: (mlkem, x25519))
    return server, client


def _vector_ends(monkeypatch: pytest.MonkeyPatch) -> tuple[ServerSession, ClientSession]:
    """Both ends of the vectors' session; the server's from its secret, since encapsulation cannot be repeated."""
    _, client = _vector_epochs(monkeypatch)
    _draws(monkeypatch, VECTORS["offer_nonce"])
    client.offer(VECTORS["hello"])
    session = client.accept(VECTORS["accept"])
    keys = seal._Keys.of(*(VECTORS[name] for name in ("secret", "hello", "offer", "accept")))
    return ServerSession(session.binding, keys), session


def test_the_vectors_are_those_of_the_script() -> None:
    """But for what encapsulation draws, and all that follows from it."""
    made = oracle.vectors()
    for name in ("hello", "offer", "secret"):
        assert made[name] == VECTORS[name]
    assert made["broadcast"]["body"] == VECTORS["broadcast"]["body"]
    assert [one["fault"] for one in made["negative"]] == [one["fault"] for one in VECTORS["negative"]]


def test_the_handshake_is_that_of_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = _vector_epochs(monkeypatch)
    _draws(monkeypatch, VECTORS["hello_nonce"], VECTORS["offer_nonce"], VECTORS["secret"])
    hello = server.hello(V_CLIENT.public_key)
    assert hello == VECTORS["hello"]
    offer = client.offer(hello)
    assert offer == VECTORS["offer"]
    session, accept = server.accept(V_CLIENT.public_key, offer)
    # What the library encrypted opens by the formulas of RFC 9180.
    answered = hashlib.sha256(oracle.MAGIC + b"answered\n" + hello + offer).digest()
    opened = oracle.hpke_open(
        accept[48:-64], VECTORS["mlkem_seed"], VECTORS["x25519"], oracle.MAGIC + b"secret\n" + answered
    )
    assert opened == VECTORS["secret"]
    # Another accept, so other keys than the vectors': those that the formulas give for it.
    keys = oracle.keys(opened, hello, offer, accept)
    monkeypatch.undo()
    data = oracle.sealed(
        keys["to_server"],
        oracle.head(oracle.MESSAGE, oracle.TO_SERVER) + keys["session"],
        1,
        bytes(32),
        oracle.framed(b"reply", 1, TEXT),
    )
    assert session.open("reply", 1, data) == TEXT


def test_the_messages_are_those_of_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = _vector_ends(monkeypatch)
    keys = seal._Keys.of(*(VECTORS[name] for name in ("secret", "hello", "offer", "accept")))
    assert keys._asdict() == VECTORS["keys"]
    for sender, receiver, way in ((server, client, "to_client"), (client, server, "to_server")):
        for message in VECTORS[way]:
            # Some numbers are left out: those messages were lost.
            lane = sender._lanes[sender._out]
            lane._sent = message["number"] - 1
            _draws(monkeypatch, message["salt"])
            sealed = sender.seal(message["kind"], message["round"], message["content"], pad_to=message["pad_to"])
            assert sealed == message["sealed"]
            assert receiver.open(message["kind"], message["round"], message["sealed"]) == message["content"]
    assert len({len(message["sealed"]) for message in VECTORS["to_server"]}) == 1


def test_g20_the_broadcast_is_that_of_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    epoch, _ = _vector_epochs(monkeypatch)
    server, client = _vector_ends(monkeypatch)
    vector = VECTORS["broadcast"]
    _draws(monkeypatch, vector["key"], vector["salt"])
    broadcast = epoch.broadcast(vector["round"], vector["content"])
    assert broadcast.body == vector["body"]
    assert server.wrap(broadcast) == vector["wrapped"]
    assert client.unwrap(vector["round"], vector["wrapped"], vector["body"]) == vector["content"]


def _answer_to_fault(vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> object:
    """Feeds one negative vector to the end that it is meant for."""
    if vector["step"] in ("hello", "offer", "accept"):
        server, client = _vector_epochs(monkeypatch)
        if vector["step"] == "hello":
            return client.offer(vector["data"])
        _draws(monkeypatch, VECTORS["hello_nonce"], VECTORS["offer_nonce"], VECTORS["secret"])
        server.hello(V_CLIENT.public_key)
        client.offer(VECTORS["hello"])
        if vector["step"] == "offer":
            return server.accept(V_CLIENT.public_key, vector["data"])
        return client.accept(vector["data"])
    _, session = _vector_ends(monkeypatch)
    if vector["step"] == "message":
        return session.read(vector["data"])
    return session.unwrap(VECTORS["broadcast"]["round"], vector["wrapped"], vector["body"])


@pytest.mark.parametrize(
    "vector", VECTORS["negative"], ids=[f"{one['step']}: {one['fault']}" for one in VECTORS["negative"]]
)
def test_a_vector_with_one_fault_is_refused(vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SealError) as caught:
        _answer_to_fault(vector, monkeypatch)
    assert str(caught.value) == seal._REFUSED[Step[vector["step"].upper()]]


def test_the_same_vectors_without_the_fault_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: it is the fault that is refused, and not the path that the vectors took."""
    broadcast = VECTORS["broadcast"]
    good = [
        {"step": "hello", "data": VECTORS["hello"]},
        {"step": "offer", "data": VECTORS["offer"]},
        {"step": "accept", "data": VECTORS["accept"]},
        {"step": "message", "data": VECTORS["to_client"][0]["sealed"]},
        {"step": "broadcast", "wrapped": broadcast["wrapped"], "body": broadcast["body"]},
    ]
    for vector in good:
        with monkeypatch.context() as context:
            _answer_to_fault(vector, context)


# -- the handshake refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [("job", "1a" * 16), ("run", RUN + 1), ("bundle", "1b" * 32), ("terms", "1c" * 32)]
)
def test_g19_a_hello_for_another_job_run_app_or_terms_is_refused(name: str, value: Any) -> None:
    hello = server_epoch().hello(CLIENT.public_key)
    client = client_epoch(**{name: value})
    with pytest.raises(SealError):
        client.offer(hello)
    # Planted: an end that does not compare it answers.
    del client._expected[name]
    assert len(client.offer(hello)) == OFFER_BYTES


def test_a_hello_to_a_fellow_client_is_refused() -> None:
    """Else a fellow client could pass our offer on as its own: the server would talk to us, and think it was him."""
    client = client_epoch()
    hello = server_epoch().hello(FELLOW.public_key)
    with pytest.raises(SealError):
        client.offer(hello)
    del client._expected["client"]
    assert client.offer(hello)


def test_an_offer_signed_anew_by_a_fellow_client_gives_him_nothing() -> None:
    epoch, client = server_epoch(), client_epoch()
    hello, fellows = epoch.hello(CLIENT.public_key), epoch.hello(FELLOW.public_key)
    offer = client.offer(hello)
    stolen = oracle.offer(bytes((3,)) * 32, fellows, offer[48:80], offer[80:-64])
    # The keys are public, so the server answers the fellow. The answer fits no one: we refuse it, he cannot read it.
    _, accept = epoch.accept(FELLOW.public_key, stolen)
    with pytest.raises(SealError):
        client.accept(accept)


def _impostor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "_check", lambda *arguments: None)


def test_another_server_than_the_pinned_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = Binding(job=JOB, run=RUN, server=SERVER.public_key, client=CLIENT.public_key, bundle=BUNDLE, terms=TERMS)
    forged = oracle.hello(bytes((3,)) * 32, bound.to_bytes(), bytes(32))
    with pytest.raises(SealError):
        client_epoch().offer(forged)
    # Under his own name he is not the pinned one either.
    honest = ServerEpoch(FELLOW, job=JOB, run=RUN, bundle=BUNDLE, terms=TERMS).hello(CLIENT.public_key)
    with pytest.raises(SealError):
        client_epoch().offer(honest)
    _impostor(monkeypatch)
    assert client_epoch().offer(forged)


def test_an_unknown_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = server_epoch()
    hello = epoch.hello(CLIENT.public_key)
    forged = oracle.offer(bytes((3,)) * 32, hello, bytes(32), oracle.ephemeral_public(bytes(64), bytes(32)))
    for name in (CLIENT.public_key, FELLOW.public_key):
        with pytest.raises(SealError):
            epoch.accept(name, forged)
    _impostor(monkeypatch)
    assert epoch.accept(CLIENT.public_key, forged)


def test_a_revoked_client_is_out_at_once() -> None:
    epoch = server_epoch()
    session, client = joined(epoch)
    late, sealed = epoch.hello(CLIENT.public_key), client.seal("reply", 1, TEXT)
    offer = client_epoch().offer(late)
    epoch.revoke(CLIENT.public_key)
    assert session.closed
    for act in (
        lambda: session.open("reply", 1, sealed),
        lambda: session.seal("round", 1),
        lambda: session.wrap(epoch.broadcast(1)),
        lambda: epoch.hello(CLIENT.public_key),
        lambda: epoch.accept(CLIENT.public_key, offer),
    ):
        with pytest.raises(SealError):
            act()
    # Others are not touched, and an end that forgets who was revoked takes it back.
    joined(epoch, FELLOW)
    epoch._revoked.clear()
    epoch._hellos[CLIENT.public_key] = late
    assert epoch.accept(CLIENT.public_key, offer)


def test_a_replayed_offer_is_refused_and_the_session_goes_on() -> None:
    epoch, client = server_epoch(), client_epoch()
    hello = epoch.hello(CLIENT.public_key)
    offer = client.offer(hello)
    server, accept = epoch.accept(CLIENT.public_key, offer)
    session = client.accept(accept)
    for _ in range(2):
        with pytest.raises(SealError):
            epoch.accept(CLIENT.public_key, offer)
        # A new hello asks for a new offer; the old one is not one for it.
        assert epoch.hello(CLIENT.public_key) != hello
    assert server.open("reply", 1, session.seal("reply", 1, TEXT)) == TEXT
    # Planted: a server that does not forget its hello makes a session that only the replayer profits from.
    epoch._hellos[CLIENT.public_key] = hello
    assert epoch.accept(CLIENT.public_key, offer)
    assert server.closed


def test_a_lost_hello_offer_or_answer_is_sent_again_as_it_was() -> None:
    epoch, client = server_epoch(), client_epoch()
    assert epoch.hello(CLIENT.public_key) == epoch.hello(CLIENT.public_key)
    offer = client.offer(epoch.hello(CLIENT.public_key))
    assert client.offer(epoch.hello(CLIENT.public_key)) == offer
    server, accept = epoch.accept(CLIENT.public_key, offer)
    session = client.accept(accept)
    assert client.accept(accept) is session
    assert server.open("reply", 1, session.seal("reply", 1, TEXT)) == TEXT


def test_g19_a_replayed_answer_does_not_set_the_numbers_back() -> None:
    epoch, client = server_epoch(), client_epoch()
    server, accept = epoch.accept(CLIENT.public_key, client.offer(epoch.hello(CLIENT.public_key)))
    keys = client._keys
    sealed = server.seal("round", 1, TEXT)
    assert client.accept(accept).open("round", 1, sealed) == TEXT
    # Forgotten: what is recorded today cannot be read with them tomorrow.
    assert client._keys is None
    with pytest.raises(SealError):
        client.accept(accept).open("round", 1, sealed)
    # Planted: an end that keeps the offer's keys and answers anew takes the message twice.
    client._keys, client._accept = keys, b""
    assert client.accept(accept).open("round", 1, sealed) == TEXT


def test_whatever_is_refused_or_replayed_the_older_session_goes_on() -> None:
    epoch, client = server_epoch(), client_epoch()
    old_hello = epoch.hello(CLIENT.public_key)
    server, accept = epoch.accept(CLIENT.public_key, client.offer(old_hello))
    session = client.accept(accept)
    another = server_epoch().hello(CLIENT.public_key)
    for hello in (flipped(another, 200), another, old_hello):
        try:
            offer = client.offer(hello)
        except SealError:
            continue
        with pytest.raises(SealError):
            epoch.accept(CLIENT.public_key, offer)
        with pytest.raises(SealError):
            client.accept(flipped(accept, 100))
        assert client.session is session
    assert session.open("round", 2, server.seal("round", 2, TEXT)) == TEXT


def test_g19_a_new_session_of_a_client_ends_its_old_one_at_both_ends() -> None:
    epoch, client = server_epoch(), client_epoch()
    server, accept = epoch.accept(CLIENT.public_key, client.offer(epoch.hello(CLIENT.public_key)))
    session, late = client.accept(accept), server.seal("round", 1, TEXT)
    newer, again = epoch.accept(CLIENT.public_key, client.offer(epoch.hello(CLIENT.public_key)))
    assert server.closed
    assert not session.closed
    fresh = client.accept(again)
    assert session.closed
    for act in (
        lambda: session.open("round", 1, late),
        lambda: fresh.open("round", 1, late),
        lambda: session.seal("x", 1),
    ):
        with pytest.raises(SealError):
            act()
    assert fresh.open("round", 1, newer.seal("round", 1, TEXT)) == TEXT


@pytest.mark.parametrize(
    "changed", [{"run": RUN + 1}, {}, {"job": "1a" * 16}, {"bundle": "1b" * 32}, {"terms": "1c" * 32}]
)
def test_g19_a_message_of_another_epoch_is_refused(changed: dict[str, Any]) -> None:
    """The same job resumed in another run, the same run with a server that was started anew, another job."""
    old_server, old_client = joined(server_epoch())
    server, client = joined(server_epoch(**changed))
    for receiver, data in ((client, old_server.seal("round", 1, TEXT)), (server, old_client.seal("reply", 1, TEXT))):
        with pytest.raises(SealError):
            receiver.read(data)
        with pytest.raises(SealError):
            # With this session's name on it, it is still under other keys.
            receiver.read(bytes(data[:16]) + bytes(receiver._lanes[receiver._in]._start[16:]) + bytes(data[32:]))


def test_g19_keys_that_depend_on_the_secret_alone_would_let_another_epochs_message_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: with one secret for two epochs, it is the transcript that keeps them apart."""
    monkeypatch.setattr(seal.os, "urandom", lambda length: bytes(length))
    (old, _), (_, client) = joined(server_epoch()), joined(server_epoch(run=RUN + 1))
    with pytest.raises(SealError):
        client.read(old.seal("round", 1, TEXT))
    of = seal._Keys.of
    monkeypatch.setattr(seal._Keys, "of", lambda secret, *transcript: of(secret, b"", b"", b""))
    (old, _), (_, client) = joined(server_epoch()), joined(server_epoch(run=RUN + 1))
    assert client.read(old.seal("round", 1, TEXT)).body == TEXT


def test_every_bit_of_the_handshake_counts() -> None:
    """One bit in each byte; the other bits of it are a fuzz test's."""
    hello = server_epoch().hello(CLIENT.public_key)
    for at in range(HELLO_BYTES):
        with pytest.raises(SealError):
            client_epoch(job=JOB, terms=TERMS).offer(flipped(hello, at, 1 << at % 8))
    epoch, client = server_epoch(), client_epoch()
    offer = client.offer(epoch.hello(CLIENT.public_key))
    # Signed as a whole: a sample of the long keys is enough.
    for at in (*range(90), *range(90, OFFER_BYTES - 64, 37), *range(OFFER_BYTES - 64, OFFER_BYTES)):
        with pytest.raises(SealError):
            epoch.accept(CLIENT.public_key, flipped(offer, at, 1 << at % 8))
    _, accept = epoch.accept(CLIENT.public_key, offer)
    for at in (*range(60), *range(60, ACCEPT_BYTES - 64, 37), *range(ACCEPT_BYTES - 64, ACCEPT_BYTES)):
        with pytest.raises(SealError):
            client.accept(flipped(accept, at, 1 << at % 8))
    assert client.accept(accept)


def test_an_older_version_or_another_suite_is_refused_even_with_a_good_signature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bound = Binding(job=JOB, run=RUN, server=SERVER.public_key, client=CLIENT.public_key, bundle=BUNDLE, terms=TERMS)
    hello = oracle.hello(bytes((1,)) * 32, bound.to_bytes(), bytes(32), start=oracle.head(1, 2, suite=0))
    with pytest.raises(SealError):
        client_epoch().offer(hello)
    # Planted: an end that has the other suite too would talk in it.
    monkeypatch.setattr(seal, "_SUITE", 0)
    assert client_epoch().offer(hello)


@pytest.mark.parametrize(
    "changed",
    [
        {"job": "0A" * 16},
        {"job": "0a" * 15},
        {"run": -1},
        {"run": 2**64},
        {"run": True},
        {"bundle": "0b" * 31},
        {"terms": "x" * 64},
    ],
)
def test_an_epoch_of_another_form_is_refused_at_once(changed: dict[str, Any]) -> None:
    with pytest.raises(SealError):
        server_epoch(**changed)
    with pytest.raises(SealError):
        client_epoch(**changed)


def test_one_identity_is_not_both_ends() -> None:
    with pytest.raises(SealError):
        server_epoch().hello(SERVER.public_key)
    with pytest.raises(SealError):
        ClientEpoch(SERVER, SERVER.public_key, run=RUN, bundle=BUNDLE)


def test_a_closed_epoch_does_nothing_more() -> None:
    epoch, client = server_epoch(), client_epoch()
    offer = client.offer(epoch.hello(CLIENT.public_key))
    server, accept = epoch.accept(CLIENT.public_key, offer)
    session = client.accept(accept)
    epoch.close()
    client.close()
    assert server.closed
    assert session.closed
    for act in (
        lambda: epoch.hello(CLIENT.public_key),
        lambda: epoch.accept(CLIENT.public_key, offer),
        lambda: epoch.broadcast(1),
        lambda: client.accept(accept),
        lambda: session.unwrap(1, b"", b""),
    ):
        with pytest.raises(SealError):
            act()


# -- messages --------------------------------------------------------------------------------------------------------


def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: the receiver does not keep the number of what it took."""
    original = seal._Lane.open

    def open(lane: seal._Lane, data: bytes, max_bytes: int) -> seal.Opened:
        opened = original(lane, data, max_bytes)
        lane._taken = 0
        return opened

    monkeypatch.setattr(seal._Lane, "open", open)


def _replay(server: ServerSession, client: ClientSession) -> None:
    data = server.seal("round", 1, TEXT)
    client.open("round", 1, data)
    client.open("round", 1, data)


def _reorder(server: ServerSession, client: ClientSession) -> None:
    first, second = server.seal("round", 1, b"first"), server.seal("round", 1, b"second")
    client.open("round", 1, second)
    client.open("round", 1, first)


def _replay_to_server(server: ServerSession, client: ClientSession) -> None:
    data = client.seal("reply", 1, TEXT)
    server.open("reply", 1, data)
    server.open("reply", 1, data)


@pytest.mark.parametrize("attack", [_replay, _reorder, _replay_to_server])
def test_g19_a_message_is_taken_once_and_never_after_a_newer_one(
    attack: Callable[[ServerSession, ClientSession], None],
    ends: tuple[ServerSession, ClientSession],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SealError):
        attack(*ends)
    _forgetful(monkeypatch)
    attack(*joined(server_epoch()))


def test_a_lost_message_costs_that_message_only(ends: tuple[ServerSession, ClientSession]) -> None:
    server, client = ends
    for _ in range(5):
        server.seal("round", 1, b"lost")
    assert client.open("round", 1, server.seal("round", 1, TEXT)) == TEXT


def test_a_forgery_with_a_high_number_does_not_lock_later_messages_out(
    ends: tuple[ServerSession, ClientSession],
) -> None:
    server, client = ends
    data = bytearray(server.seal("round", 1, TEXT))
    data[32:40] = b"\xff" * 8
    with pytest.raises(SealError):
        client.read(data)
    assert client.open("round", 1, server.seal("round", 1, TEXT)) == TEXT


def test_two_copies_that_are_opened_at_the_same_moment_are_one_message(
    ends: tuple[ServerSession, ClientSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = ends
    data, original = server.seal("round", 1, TEXT), seal._decrypt
    inner: list[bytes] = []

    def meanwhile(key: bytes, view: memoryview, header: int) -> memoryview:
        content = original(key, view, header)
        monkeypatch.setattr(seal, "_decrypt", original)
        inner.append(bytes(client.open("round", 1, data)))
        return content

    monkeypatch.setattr(seal, "_decrypt", meanwhile)
    with pytest.raises(SealError):
        client.open("round", 1, data)
    assert inner == [TEXT]


def _one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: one key for both directions, and a header that does not say which."""
    of, head = seal._Keys.of, seal._head
    monkeypatch.setattr(
        seal._Keys, "of", lambda *handshake: (keys := of(*handshake))._replace(to_client=keys.to_server)
    )
    monkeypatch.setattr(seal, "_head", lambda step, way: head(step, seal._Way.TO_CLIENT))


def test_g19_a_message_is_not_reflected_to_its_sender(
    ends: tuple[ServerSession, ClientSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    for session, kind in zip(ends, ("round", "reply"), strict=True):
        data = session.seal(kind, 1, TEXT)
        with pytest.raises(SealError):
            session.read(data)
        with pytest.raises(SealError):
            session.read(flipped(data, 14, 3))  # With the other direction in its header.
    _one_key(monkeypatch)
    server, _ = joined(server_epoch())
    assert server.read(server.seal("round", 1, TEXT)).body == TEXT


def test_keys_of_all_directions_and_uses_differ(ends: tuple[ServerSession, ClientSession]) -> None:
    def keys(session: ServerSession | ClientSession) -> list[bytes]:
        assert session._wraps is not None
        return [*(lane._key for lane in session._lanes.values()), session._wraps._key]

    server, client = ends
    assert keys(server) == keys(client)
    assert len(set(keys(server))) == 3
    others = [keys(one) for one in joined(server_epoch())]
    assert not {*keys(server)} & {*others[0]}


@pytest.mark.parametrize(("kind", "round"), [("reply", 1), ("round", 2), ("round-", 1), ("", 1), ("round", 0)])
def test_g19_another_round_or_kind_is_refused_and_stays_taken(kind: str, round: int) -> None:
    server, client = joined(server_epoch())
    data = server.seal("round", 1, TEXT)
    with pytest.raises(SealError):
        client.open(kind, round, data)
    with pytest.raises(SealError):
        client.open("round", 1, data)
    # Twin: whoever does not say what it must be is given it.
    assert client.read(server.seal("round", 1, TEXT)).body == TEXT


def _counter_mode(key: bytes, data: memoryview, header: int) -> memoryview:
    """A planted bug: decrypts what GCM encrypted and does not look at the tag."""
    decryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(12) + b"\0\0\0\2")).decryptor()
    return memoryview(decryptor.update(bytes(data[header:-16])))


def test_every_bit_of_a_message_counts(
    ends: tuple[ServerSession, ClientSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = ends
    server.seal("round", 1)
    data = server.seal("round", 1, TEXT)
    places = [*range(200), *range(200, len(data), 53), *range(len(data) - 16, len(data))]
    for at in places:
        for mask in (1, 0x80):
            with pytest.raises(SealError):
                client.read(flipped(data, at, mask))
    assert client.read(data).body == TEXT
    # Planted: keys that the header has no part in, nobody who looks at it, and no tag.
    monkeypatch.setattr(seal._Lane, "_key_of", lambda lane, header: lane._key)
    monkeypatch.setattr(seal, "_decrypt", _counter_mode)
    _forgetful(monkeypatch)
    server, client = joined(server_epoch())
    server.seal("round", 1)
    data = server.seal("round", 1, TEXT)
    client._lanes[client._in]._start = b""
    # All but kind and length, which the content's form lets no bit of go unseen.
    for at in (*range(72), *range(72 + 16, 72 + 24), *range(72 + 32, len(data))):
        assert client.read(flipped(data, at)).kind == "round"


def test_truncated_extended_and_joined_messages_are_refused(
    ends: tuple[ServerSession, ClientSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = ends
    data = bytes(server.seal("round", 1, bytes(3000)))
    for length in (0, 1, 13, 16, 71, 72, 104, 119, 120, len(data) - 1024, len(data) - 16, len(data) - 1):
        with pytest.raises(SealError):
            client.read(data[:length])
    for longer in (data + b"\0", data + data, data + bytes(1024), b"\0" + data):
        with pytest.raises(SealError):
            client.read(longer)
    monkeypatch.setattr(seal, "_decrypt", _counter_mode)
    assert client.read(data + bytes(1024)).body == bytes(3000)


def test_a_message_that_is_too_long_is_refused_before_memory_is_taken(
    ends: tuple[ServerSession, ClientSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = ends
    data = server.seal("round", 1, bytes(100_000))
    taken: list[int] = []
    fresh = seal._fresh
    monkeypatch.setattr(seal, "_fresh", lambda length: taken.append(length) or fresh(length))
    with pytest.raises(SealError):
        client.read(data, max_bytes=90_000)
    assert taken == []
    assert client.read(data, max_bytes=100_000).body == bytes(100_000)
    assert len(taken) == 1
    # A replay is refused before, too.
    del taken[:]
    with pytest.raises(SealError):
        client.read(data)
    assert taken == []
    # Padding rounds up; the limit does not.
    with pytest.raises(SealError):
        client.read(server.seal("round", 1, bytes(11)), max_bytes=10)


def test_nothing_is_looked_at_before_it_is_authenticated(
    ends: tuple[ServerSession, ClientSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = ends
    looked: list[object] = []
    unpack = struct.unpack
    monkeypatch.setattr(seal.struct, "unpack", lambda *arguments: looked.append(arguments) or unpack(*arguments))
    data = server.seal("round", 1, TEXT)
    with pytest.raises(SealError):
        client.read(flipped(data, len(data) - 1))
    assert looked == []
    client.read(data)
    assert looked


@pytest.mark.parametrize(
    ("kind", "round", "parts", "pad_to"),
    [
        ("", 1, (), 0),
        ("x" * 17, 1, (), 0),
        ("Round", 1, (), 0),
        ("round", -1, (), 0),
        ("round", True, (), 0),
        ("round", 2**63, (), 0),
        ("round", 1, (b"secret",), 5),
        ("round", 1, (), MOST_BYTES + 1),
    ],
)
def test_what_cannot_be_sealed_is_refused_and_costs_nothing(
    kind: str, round: int, parts: tuple[bytes, ...], pad_to: int, ends: tuple[ServerSession, ClientSession]
) -> None:
    server, client = ends
    with pytest.raises(SealError) as caught:
        server.seal(kind, round, *parts, pad_to=pad_to)
    assert "secret" not in str(caught.value)
    assert client.open("round", 1, server.seal("round", 1, TEXT)) == TEXT


def test_g12_a_refusal_is_as_long_as_a_release(ends: tuple[ServerSession, ClientSession]) -> None:
    _, client = ends
    release, receipts = bytes(40_000), [b"x" * length for length in (200, 431, 1024)]
    replies = [client.seal("reply", 1, release, receipt, pad_to=42_000) for receipt in receipts]
    words = [client.seal("reply", 1, word, pad_to=42_000) for word in (b"declined", b"unavailable")]
    assert len({len(data) for data in (*replies, *words)}) == 1
    # Twin: without it the lengths tell a word from a release.
    assert len(client.seal("reply", 1, release)) != len(client.seal("reply", 1, b"declined"))
    # What would show its length is not sealed.
    with pytest.raises(SealError):
        client.seal("reply", 1, bytes(42_001), pad_to=42_000)


def test_nothing_of_a_message_shows_and_two_seals_of_it_have_nothing_in_common(
    ends: tuple[ServerSession, ClientSession],
) -> None:
    _, client = ends
    first, second = (bytes(client.seal("reply", 77, TEXT, pad_to=4096)) for _ in range(2))
    for data in (first, second):
        assert not any(TEXT[at : at + 6] in data for at in range(len(TEXT) - 6))
        assert b"reply" not in data
        # Nor the padding: nothing repeats.
        assert len({data[at : at + 8] for at in range(72, len(data) - 8, 8)}) == len(range(72, len(data) - 8, 8))
    # Header but for number and salt; nothing behind it.
    assert first[:39] == second[:39]
    assert not any(first[at : at + 4] in second[40:] for at in range(40, len(first) - 4, 4))


def test_a_number_that_comes_again_still_gets_another_key(ends: tuple[ServerSession, ClientSession]) -> None:
    """As after a machine's memory was restored from a snapshot: two messages under one key would be read."""
    _, client = ends
    first = client.seal("reply", 1, bytes(1024))
    client._lanes[client._out]._sent = 0
    second = client.seal("reply", 1, TEXT.ljust(1024, b"\0"))
    assert first[32:40] == second[32:40]
    mixed = bytes(a ^ b for a, b in zip(first[104:], second[104:], strict=True))
    assert TEXT not in mixed
    # Planted: with the salt always the same, the difference of the two is the text.
    salt = bytes(32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal.os, "urandom", lambda length: salt)
        both = []
        for content in (bytes(1024), TEXT.ljust(1024, b"\0")):
            client._lanes[client._out]._sent = 0
            both.append(client.seal("reply", 1, content))
    assert TEXT in bytes(a ^ b for a, b in zip(both[0][104:], both[1][104:], strict=True))


# -- in memory only --------------------------------------------------------------------------------------------------


def test_g19_sessions_and_epochs_are_neither_copied_nor_pickled_nor_shown() -> None:
    epoch, client = server_epoch(), client_epoch()
    server, accept = epoch.accept(CLIENT.public_key, client.offer(epoch.hello(CLIENT.public_key)))
    session = client.accept(accept)
    for one in (epoch, client, server, session, epoch.broadcast(1, TEXT)):
        for act in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="neither copied nor pickled"):
                act(one)
        assert repr(one) == f"{type(one).__name__}(<keys>)"
    # Twin: an object without that rule is copied.
    assert copy.deepcopy(dataclasses.replace(server.binding)) == server.binding


def test_g19_a_fork_neither_seals_nor_opens(ends: tuple[ServerSession, ClientSession]) -> None:
    server, client = ends
    data = server.seal("round", 1, TEXT)

    def fails(act: Callable[[], object]) -> bool:
        try:
            act()
        except SealError:
            return True
        return False

    child = os.fork()
    if not child:
        acts = (
            lambda: client.read(data),
            lambda: client.seal("reply", 1),
            lambda: server.wrap(server_epoch().broadcast(1)),
        )
        os._exit(7 if all(fails(act) for act in acts) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    # Twin: here it opens.
    assert client.read(data).body == TEXT


def test_no_error_says_anything_of_a_message_or_a_key(ends: tuple[ServerSession, ClientSession]) -> None:
    server, client = ends
    data = server.seal("round", 1, TEXT)
    for at in (0, 20, 50, 90):
        with pytest.raises(SealError) as caught:
            client.read(flipped(data, at))
        assert str(caught.value) == seal._REFUSED[Step.MESSAGE]
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert all(" got other bytes; " in text for text in seal._REFUSED.values())


# -- the broadcast ---------------------------------------------------------------------------------------------------


def test_g20_one_body_serves_every_client() -> None:
    epoch = server_epoch()
    ends = [joined(epoch, identity) for identity in (CLIENT, FELLOW)]
    broadcast = epoch.broadcast(4, TEXT[:5], memoryview(TEXT)[5:])
    assert TEXT[:6] not in bytes(broadcast.body)
    for server, client in ends:
        assert client.unwrap(4, server.wrap(broadcast), broadcast.body) == TEXT
    server, client = ends[0]
    empty = epoch.broadcast(0)
    assert client.unwrap(0, server.wrap(empty), empty.body) == b""


def test_g20_a_fellow_client_cannot_substitute_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """He knows the key of the broadcast, and so makes another body that opens under it."""
    epoch = server_epoch()
    server, client = joined(epoch)
    broadcast = epoch.broadcast(1, TEXT)
    planted = oracle.broadcast(broadcast.key, b"P" * len(TEXT))
    with pytest.raises(SealError):
        client.unwrap(1, server.wrap(broadcast), planted)
    assert client.unwrap(1, server.wrap(broadcast), broadcast.body) == TEXT
    # Planted: wraps that name no digest let him.
    monkeypatch.setattr(seal, "_digest", lambda body: bytes(32))
    broadcast = epoch.broadcast(1, TEXT)
    planted = oracle.broadcast(broadcast.key, b"P" * len(TEXT))
    assert client.unwrap(1, server.wrap(broadcast), planted) == b"P" * len(TEXT)


def test_g20_a_statement_that_the_server_did_not_sign_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = server_epoch()
    server, client = joined(epoch)
    broadcast = epoch.broadcast(1, TEXT)
    broadcast.signature = flipped(broadcast.signature, 3)
    with pytest.raises(SealError):
        client.unwrap(1, server.wrap(broadcast), broadcast.body)
    _impostor(monkeypatch)
    assert client.unwrap(1, server.wrap(broadcast), broadcast.body) == TEXT


def test_g20_a_wrap_is_for_one_client_one_round_and_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = server_epoch()
    (server, client), (_, fellow) = joined(epoch), joined(epoch, FELLOW)
    broadcast = epoch.broadcast(1, TEXT)
    with pytest.raises(SealError):
        fellow.unwrap(1, server.wrap(broadcast), broadcast.body)
    with pytest.raises(SealError):
        client.unwrap(2, server.wrap(broadcast), broadcast.body)
    wrapped = server.wrap(broadcast)
    assert client.unwrap(1, wrapped, broadcast.body) == TEXT
    with pytest.raises(SealError):
        client.unwrap(1, wrapped, broadcast.body)
    # Nor does it pass for a message, or a message for it.
    with pytest.raises(SealError):
        client.read(server.wrap(broadcast))
    with pytest.raises(SealError):
        client.unwrap(1, server.seal("broadcast", 1, bytes(136)), broadcast.body)
    _forgetful(monkeypatch)
    wrapped = server.wrap(broadcast)
    assert client.unwrap(1, wrapped, broadcast.body) == client.unwrap(1, wrapped, broadcast.body)


def test_g20_a_wrap_inside_a_message_opens_after_it() -> None:
    """Wraps and messages are counted apart, so that one may be made before the other and carried in it."""
    epoch = server_epoch()
    server, client = joined(epoch)
    for round in (1, 2):
        broadcast = epoch.broadcast(round, TEXT)
        outer = client.open("round", round, server.seal("round", round, server.wrap(broadcast)))
        assert client.unwrap(round, outer, broadcast.body) == TEXT


def test_g20_a_broadcast_of_another_epoch_is_not_wrapped() -> None:
    server, _ = joined(server_epoch())
    for changed in ({"run": RUN + 1}, {"job": "1a" * 16}, {"bundle": "1b" * 32}):
        with pytest.raises(SealError):
            server.wrap(server_epoch(**changed).broadcast(1, TEXT))


def test_g20_every_bit_of_a_broadcast_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = server_epoch()
    server, client = joined(epoch)
    broadcast = epoch.broadcast(1, TEXT)
    for at in range(len(broadcast.body)):
        with pytest.raises(SealError):
            client.unwrap(1, server.wrap(broadcast), flipped(broadcast.body, at))
    for body in (b"", broadcast.body[:-1], bytes(broadcast.body) + b"\0"):
        with pytest.raises(SealError):
            client.unwrap(1, server.wrap(broadcast), body)
    # Planted: without digest and tag, a flip in the content is taken.
    monkeypatch.setattr(seal, "_digest", lambda body: bytes(32))
    monkeypatch.setattr(seal, "_decrypt", lambda key, view, header: _decrypted(key, view, header))
    broadcast = epoch.broadcast(1, TEXT)
    assert client.unwrap(1, server.wrap(broadcast), flipped(broadcast.body, 50)) != TEXT


def _decrypted(key: bytes, view: memoryview, header: int) -> memoryview:
    """A planted bug that lets sessions be: only a broadcast's tag is not looked at."""
    if header == seal._BROADCAST_HEADER:
        return _counter_mode(key, view, header)
    return memoryview(AESGCM(key).decrypt(bytes(12), bytes(view[header:]), bytes(view[:header])))


def test_g20_one_body_has_one_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends clients different keys for one body cannot show them different models.

    Here the second key opens nothing at all; it is refused by its commitment before anything is decrypted, which is
    what would stop keys that are made to open the body to something else.
    """
    epoch = server_epoch()
    server, client = joined(epoch)
    broadcast = epoch.broadcast(1, TEXT)
    decrypted: list[int] = []
    original = seal._decrypt

    def watched(key: bytes, view: memoryview, header: int) -> memoryview:
        decrypted.append(header)
        return original(key, view, header)

    monkeypatch.setattr(seal, "_decrypt", watched)
    other = seal.Broadcast(broadcast.body, broadcast.statement, broadcast.signature, bytes(32))
    with pytest.raises(SealError):
        client.unwrap(1, server.wrap(other), broadcast.body)
    assert seal._BROADCAST_HEADER not in decrypted
    assert client.unwrap(1, server.wrap(broadcast), broadcast.body) == TEXT
    assert seal._BROADCAST_HEADER in decrypted


def test_a_broadcast_that_is_too_long_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = server_epoch()
    server, client = joined(epoch)
    broadcast = epoch.broadcast(1, bytes(5000))
    with pytest.raises(SealError):
        client.unwrap(1, server.wrap(broadcast), broadcast.body, max_bytes=4999)
    assert client.unwrap(1, server.wrap(broadcast), broadcast.body, max_bytes=5000) == bytes(5000)
    for round in (-1, True, 2**63):
        with pytest.raises(SealError):
            epoch.broadcast(round, TEXT)


# -- whatever comes --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["send", "deliver", "again"]), st.integers(0, 7)), max_size=60))
def test_g19_what_arrives_is_an_increasing_part_of_what_was_sent(steps: list[tuple[str, int]]) -> None:
    """Any relay: it drops, delays, reorders and repeats as it likes."""
    server, client = _SHARED
    sent: list[tuple[int, memoryview]] = []
    arrived: list[int] = []
    for act, pick in steps:
        if act == "send":
            number = len(sent)
            sent.append((number, server.seal("round", number, b"%d" % number)))
        elif sent:
            number, data = sent[pick % len(sent)]
            try:
                opened = client.read(data)
            except SealError:
                # Refused only because it, or a newer one, came before.
                assert arrived
                assert number <= arrived[-1]
            else:
                assert opened == ("round", number, b"%d" % number)
                arrived.append(number)
    assert arrived == sorted(set(arrived))


_SHARED = joined(server_epoch())


class _World:
    """Two ends, what the relay ever saw, and everything that each end took."""

    def __init__(self) -> None:
        self.epoch, self.client = server_epoch(), client_epoch()
        self.server: ServerSession | None = None
        self.seen: list[tuple[str, bytes]] = []
        self.sealed = 0
        self.taken: list[bytes] = []

    def hello(self) -> None:
        self.seen.append(("client", self.epoch.hello(CLIENT.public_key)))

    def request(self) -> None:
        if self.server is not None:
            self._seal(self.server, "client")

    def reply(self) -> None:
        if self.client.session is not None:
            self._seal(self.client.session, "server")

    def _seal(self, session: ServerSession | ClientSession, to: str) -> None:
        self.seen.append((to, bytes(session.seal("round", 1, b"%s %d" % (to.encode(), self.sealed)))))
        self.sealed += 1

    def restart(self) -> None:
        self.client = client_epoch()

    def deliver(self, to: str, data: bytes) -> None:
        """Whoever gets a message does with it what it claims to be."""
        step = step_of(data)
        if to == "server" and step is Step.OFFER:
            self.server, accept = self.epoch.accept(CLIENT.public_key, data)
            self.seen.append(("client", accept))
        elif step is Step.HELLO:
            self.seen.append(("server", self.client.offer(data)))
        elif step is Step.ACCEPT:
            self.client.accept(data)
        else:
            session = self.server if to == "server" else self.client.session
            if session is not None:
                body = bytes(session.read(data).body)
                assert body.startswith(to.encode())
                self.taken.append(body)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["hello", "request", "reply", "restart", *["deliver"] * 6]), st.integers(0, 40)))
)
def test_g19_no_relay_makes_ends_take_a_message_twice_or_keeps_them_apart_for_ever(
    steps: list[tuple[str, int]],
) -> None:
    """Any order of hellos, offers, answers, messages, their repetitions and restarts; then the relay gives up."""
    world = _World()
    for act, pick in steps:
        if act != "deliver":
            getattr(world, act)()
        elif world.seen:
            to, data = world.seen[-1 - pick % len(world.seen)]
            with contextlib.suppress(SealError):
                world.deliver(to, data)
    assert len(set(world.taken)) == len(world.taken)
    server, accept = world.epoch.accept(CLIENT.public_key, world.client.offer(world.epoch.hello(CLIENT.public_key)))
    client = world.client.accept(accept)
    assert client.open("round", 1, server.seal("round", 1, TEXT)) == TEXT
    assert server.open("reply", 1, client.seal("reply", 1, TEXT)) == TEXT


def test_the_relay_above_gets_as_far_as_messages_and_would_find_a_receiver_that_forgets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = _World()
    world.hello()
    for _ in range(3):
        world.deliver(*world.seen[-1])
    world.request()
    world.deliver(*world.seen[-1])
    assert world.taken == [b"client 0"]
    _forgetful(monkeypatch)
    world.request()
    world.deliver(*world.seen[-1])
    world.deliver(*world.seen[-1])
    assert len(set(world.taken)) < len(world.taken)


def _fuzz(cases: int) -> None:
    """Feeds every entry with bytes that are almost right; then the session goes on as if nothing had been."""
    dice = random.Random(20)
    epoch, client = server_epoch(), client_epoch()
    server, accept = epoch.accept(CLIENT.public_key, client.offer(epoch.hello(CLIENT.public_key)))
    session = client.accept(accept)
    hello = epoch.hello(CLIENT.public_key)
    offer = client.offer(hello)
    broadcast = epoch.broadcast(1, TEXT)
    message, reply, wrapped = server.seal("round", 1, TEXT), session.seal("reply", 1, TEXT), server.wrap(broadcast)
    seeds = [bytes(one) for one in (hello, offer, accept, message, reply, wrapped, broadcast.body)]
    entries: list[Callable[[bytes], object]] = [
        client_epoch().offer,
        lambda data: epoch.accept(CLIENT.public_key, data),
        client.accept,
        session.read,
        server.read,
        lambda data: session.unwrap(1, data, broadcast.body),
        lambda data: session.unwrap(1, server.wrap(broadcast), data),
    ]

    def mutated(data: bytes) -> bytes:
        match dice.randrange(6):
            case 0:
                return data[: dice.randrange(len(data))]
            case 1:
                return data + dice.randbytes(dice.choice((1, 16, 1024)))
            case 2:
                at = dice.randrange(len(data))
                return data[:at] + dice.randbytes(dice.randrange(1, 9)) + data[at:]
            case 3:
                other, at = dice.choice(seeds), dice.randrange(len(data))
                return data[:at] + other[at:]
            case 4:
                return dice.randbytes(dice.choice((0, 1, len(data))))
        copied = bytearray(data)
        for _ in range(dice.randrange(1, 4)):
            copied[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        return bytes(copied)

    for _ in range(cases):
        index = dice.randrange(len(entries))
        data = mutated(seeds[index])
        if data in seeds:
            continue
        with pytest.raises(SealError):
            entries[index](data)
    assert session.open("round", 1, message) == TEXT
    assert server.open("reply", 1, reply) == TEXT
    newer, again = epoch.accept(CLIENT.public_key, offer)
    assert client.accept(again).open("round", 2, newer.seal("round", 2, TEXT)) == TEXT


def test_garbage_is_refused_and_the_session_goes_on() -> None:
    _fuzz(500)


@pytest.mark.slow
def test_ten_thousand_pieces_of_garbage_are_refused_and_the_session_goes_on() -> None:
    _fuzz(10_000)


# -- speed, as ratios within one run ---------------------------------------------------------------------------------


def _fastest(act: Callable[[], object], times: int = 7) -> float:
    """Shortest processor time of several, in seconds: neighbours on the machine do not count."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        act()
        taken.append(time.process_time() - began)
    return min(taken)


def test_sealing_and_opening_cost_little_more_than_the_cipher(ends: tuple[ServerSession, ClientSession]) -> None:
    import numpy as np

    server, client = ends
    content, cipher = os.urandom(8_000_000), AESGCM(bytes(32))

    def plain() -> None:
        sealed, opened = np.empty(len(content) + 16, np.uint8).data, np.empty(len(content), np.uint8).data
        cipher.encrypt_into(bytes(12), content, b"", sealed)
        cipher.decrypt_into(bytes(12), sealed, b"", opened)

    def ours() -> None:
        server.open("reply", 1, client.seal("reply", 1, content))

    assert _fastest(ours) < 1.5 * _fastest(plain)
    # Twin: joining and copying once more would be seen.
    assert _fastest(lambda: (ours(), bytes(bytearray(content) + content))) > 1.5 * _fastest(plain)


def test_g20_a_broadcast_to_a_hundred_clients_costs_no_more_than_twice_one() -> None:
    epoch = server_epoch()
    server, _ = joined(epoch)
    content = os.urandom(8_000_000)

    def to(clients: int) -> None:
        broadcast = epoch.broadcast(1, content)
        for _ in range(clients):
            server.wrap(broadcast)

    assert _fastest(lambda: to(100), 5) < 2 * _fastest(lambda: to(1), 5)
    # Twin: sealing the body for each of even four clients is dearer.
    assert _fastest(lambda: [server.seal("round", 1, content) for _ in range(4)], 3) > 2 * _fastest(
        lambda: server.seal("round", 1, content), 5
    )


def test_a_handshake_costs_little_more_than_its_primitives() -> None:
    from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey

    def primitives() -> None:
        from privacy.identity import verify

        for identity in (SERVER, CLIENT, SERVER):
            verify(identity.public_key, TEXT, identity.sign(TEXT))
        mlkem, x25519 = seal._fresh_keys()
        sealed = seal._HPKE.encrypt(bytes(32), MLKEM768X25519PublicKey(mlkem.public_key(), x25519.public_key()))
        seal._HPKE.decrypt(sealed, MLKEM768X25519PrivateKey(mlkem, x25519))

    epoch = server_epoch()
    assert _fastest(lambda: [joined(epoch) for _ in range(5)]) < 2.5 * _fastest(
        lambda: [primitives() for _ in range(5)]
    )


def test_the_counter_mode_of_the_planted_bugs_is_gcms() -> None:
    """Else a twin that accepts nothing would look like a check that works."""
    sealed = AESGCM(bytes(32)).encrypt(bytes(12), TEXT, b"")
    assert _counter_mode(bytes(32), memoryview(sealed), 0) == TEXT
    with pytest.raises(InvalidTag):
        AESGCM(bytes(32)).decrypt(bytes(12), flipped(sealed, 3), b"")
