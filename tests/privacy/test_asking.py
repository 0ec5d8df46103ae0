"""What client and inference service say to each other: whole, signed and bound, or refused."""

from __future__ import annotations

import dataclasses
import json
import os
import random

import pytest

import privacy.asking as module
from privacy.asking import (
    QUERY_OVERHEAD,
    REMEDIES,
    Offer,
    Opening,
    Query,
    is_signed,
    read_answer,
    read_heads,
    read_opened,
    refusal_of,
    tell_answer,
    tell_heads,
    tell_opened,
)
from privacy.errors import IdentityError, SealError, TacitError
from privacy.identity import Secret

SERVER = Secret(bytes(32)).identity("server")
CLIENT = Secret(bytes([1] * 32)).identity("client")
SESSION = Secret(bytes([2] * 32)).identity("session")
OFFER = Offer(
    name="digits",
    task="digits",
    seed=0,
    inputs=(1, 8, 8),
    classes=tuple("0123456789"),
    features="a" * 64,
    feature_range=8.0,
    prepare={"kind": "image", "mode": "L", "mean": [0.0], "deviation": [1.0]},
    description=b"\x00\xff",
    plan="b" * 64,
    query_bytes=100,
    answer_bytes=50,
    model="c" * 64,
    privacy={"guarantee": True, "epsilon": 3.0, "delta": 1e-5, "unit": "record", "words": "w"},
    job="d" * 32,
    round=3,
    queries=10,
    session_s=60,
    rate=5.0,
)
OPENING = Opening(head=OFFER.version, plan=OFFER.plan, session="e" * 32, key=SESSION.public_key, queries=10, time=1)
QUERY = Query(
    session=bytes.fromhex(OPENING.session),
    head=bytes.fromhex(OFFER.version),
    plan=bytes.fromhex(OFFER.plan),
    number=7,
    ciphertexts=os.urandom(100),
)


def mutated(data: bytes, coins: random.Random) -> bytes:
    """Returns other bytes: one bit flipped, cut, longer, or a part of it twice."""
    place = coins.randrange(len(data))
    return coins.choice(
        (
            data[:place] + bytes([data[place] ^ (1 << coins.randrange(8))]) + data[place + 1 :],
            data[:place],
            data + coins.randbytes(coins.randrange(1, 40)),
            data[:place] + data[place : place + 8] + data[place:],
        )
    )


def test_heads_are_told_whole_and_to_who_asked():
    nonce = bytes(range(32))
    told = tell_heads([OFFER], nonce, SERVER)
    assert read_heads(told, nonce, SERVER.public_key) == [OFFER]
    assert read_heads(told, nonce, SERVER.public_key)[0].version == OFFER.version
    for data, asked, key in (
        (told, bytes(32), SERVER.public_key),  # another question's answer
        (told, nonce, CLIENT.public_key),  # another server
        (tell_heads([OFFER], nonce, CLIENT), nonce, SERVER.public_key),
        (b"", nonce, SERVER.public_key),
    ):
        with pytest.raises(SealError):
            read_heads(data, asked, key)


def test_every_field_of_an_offer_is_in_its_version():
    changed: dict[str, object] = {
        "privacy": {"a": 1},
        "prepare": {"a": 1},
        "classes": ("x",),
        "inputs": (2,),
        "description": b"x",
    }
    for field in dataclasses.fields(Offer):
        value = getattr(OFFER, field.name)
        other = changed.get(field.name) or (value + "x" if isinstance(value, str) else value + 1)
        assert dataclasses.replace(OFFER, **{field.name: other}).version != OFFER.version, field.name


@pytest.mark.parametrize(
    "change",
    [
        {"query_bytes": 0},
        {"query_bytes": 1 << 40},
        {"feature_range": -1.0},
        {"feature_range": "x"},
        {"plan": "z" * 64},
        {"name": 5},
        {"seed": True},
        {"inputs": [0]},
        {"description": "&"},
        # What an array, a module or a clock would be made of.
        {"classes": ["x"] * 1001},
        {"classes": []},
        {"classes": {"a": 1}},
        {"inputs": [1 << 20, 2]},
        {"inputs": [1] * 9},
        {"inputs": []},
        {"inputs": [True]},
        {"inputs": [1.5]},
        {"seed": 10**400},
        {"round": -1},
        {"rate": 10**400},
        {"rate": float("inf")},
        {"rate": float("nan")},
        {"feature_range": float("nan")},
        {"feature_range": 10**400},
        # What a terminal would be made to do.
        {"name": "\x1b[2J"},
        {"name": "x" * 64},
        {"classes": ["a", "\x1b]0;x\x07"]},
        {"classes": ["a\nb"]},
        {"classes": ["x" * 201]},
        {"classes": [5]},
        {"task": "\x9b2J"},
        {"job": "\r"},
        {"privacy": {"words": "\x1b[2J"}},
        {"privacy": {"words": "x" * 2001}},
        {"privacy": {"words": ["\x1b[2J"]}},
        {"privacy": {"unit": "\x1b[2J"}},
    ],
)
def test_an_offer_that_cannot_be_is_refused_though_signed(change: dict[str, object]):
    with pytest.raises((ValueError, TypeError, OverflowError, IdentityError)):
        Offer.parse(OFFER.fields() | change)
    # By a client too, with one of our sentences and none of its words.
    body = json.dumps({"v": 1, "heads": [OFFER.fields() | change]}).encode()
    signed = body + b"\n" + SERVER.sign(module._HEADS + bytes(32) + body).encode()
    with pytest.raises(SealError, match=r"^expected a list of heads"):
        read_heads(signed, bytes(32), SERVER.public_key)
    with pytest.raises(ValueError, match="other fields"):
        Offer.parse(OFFER.fields() | {"weights": []})


def test_an_opening_is_the_clients_own():
    data = OPENING.to_bytes(CLIENT)
    assert Opening.read(data, CLIENT.public_key) == OPENING
    with pytest.raises(SealError):
        Opening.read(data, SERVER.public_key)
    for change in (
        {"queries": 0},
        {"queries": 2.5},
        {"key": "x"},
        {"session": "E" * 32},
        {"time": 10**400},
        {"time": -1},
    ):
        with pytest.raises(SealError):
            Opening.read(dataclasses.replace(OPENING, **change).to_bytes(CLIENT), CLIENT.public_key)  # type: ignore[arg-type]


def test_a_session_is_granted_for_one_opening():
    data = OPENING.to_bytes(CLIENT)
    told = tell_opened(data, 10, 99, SERVER)
    assert read_opened(told, data, SERVER.public_key) == (10, 99)
    with pytest.raises(SealError):
        read_opened(told, dataclasses.replace(OPENING, queries=9).to_bytes(CLIENT), SERVER.public_key)
    with pytest.raises(SealError):
        read_opened(told, data, CLIENT.public_key)
    for queries, until in ((0, 99), (10**400, 99), (10, 10**400), (10, -1)):
        with pytest.raises(SealError):
            read_opened(tell_opened(data, queries, until, SERVER), data, SERVER.public_key)


def test_a_query_is_bound_to_all_of_its_head():
    data = QUERY.to_bytes(SESSION)
    assert len(data) == 100 + QUERY_OVERHEAD
    assert Query.read(data) == QUERY
    assert is_signed(data, SESSION.public_key)
    for change in (
        {"number": 8},
        {"head": bytes(32)},
        {"plan": bytes(32)},
        {"session": bytes(16)},
        {"ciphertexts": bytes(100)},
    ):
        other = dataclasses.replace(QUERY, **change).to_bytes(SESSION)  # type: ignore[arg-type]
        assert not is_signed(other[:-64] + data[-64:], SESSION.public_key), change


def test_an_answer_is_bound_to_its_query():
    data = QUERY.to_bytes(SESSION)
    told = tell_answer(data, QUERY.session, QUERY.number, bytes(50), SERVER)
    assert read_answer(told, data, 50, SERVER.public_key) == bytes(50)
    later = dataclasses.replace(QUERY, number=8).to_bytes(SESSION)
    for query, size, key in (
        (later, 50, SERVER.public_key),
        (data, 51, SERVER.public_key),
        (data, 50, CLIENT.public_key),
    ):
        with pytest.raises(SealError):
            read_answer(told, query, size, key)


def test_no_mutation_of_anything_signed_passes():
    coins, nonce = random.Random(5), bytes(32)
    query, opening = QUERY.to_bytes(SESSION), OPENING.to_bytes(CLIENT)
    heads, opened = tell_heads([OFFER], nonce, SERVER), tell_opened(opening, 5, 9, SERVER)
    answer = tell_answer(query, QUERY.session, QUERY.number, bytes(50), SERVER)
    for _ in range(300):
        assert not is_signed(mutated(query, coins), SESSION.public_key)
        for read in (
            lambda: read_heads(mutated(heads, coins), nonce, SERVER.public_key),
            lambda: Opening.read(mutated(opening, coins), CLIENT.public_key),
            lambda: read_opened(mutated(opened, coins), opening, SERVER.public_key),
            lambda: read_answer(mutated(answer, coins), query, 50, SERVER.public_key),
        ):
            with pytest.raises(SealError):
                read()


def test_planted_bug_a_reader_that_checks_no_signature_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "verify", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        test_an_answer_is_bound_to_its_query()
    with pytest.raises(AssertionError):
        test_a_query_is_bound_to_all_of_its_head()


def test_every_word_has_a_remedy_and_no_other_word_is_shown():
    for word, sentence in REMEDIES.items():
        told = refusal_of(word)
        assert isinstance(told, TacitError)
        assert str(told) == sentence
        assert sentence.startswith("expected ")
        assert ";" in sentence
    assert "\x1b[2J" not in str(refusal_of("\x1b[2J"))
