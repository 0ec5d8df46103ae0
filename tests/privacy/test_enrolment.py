"""The invitation, its proof and the messages: against vectors that an independent path made, and against liars."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import hmac
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import enrolment as module
from privacy.enrolment import (
    MOST_MESSAGE,
    REMEDIES,
    Address,
    Invitation,
    Word,
    answer_mac,
    body_of,
    from_base64,
    key_fingerprint,
    message,
    new_secret,
    older,
    prove,
    proves,
    read_message,
    server_key_of,
    signed,
    stored_of,
    to_base64,
    transcript,
)
from privacy.errors import IdentityError

VECTORS = Path(__file__).parents[1] / "vectors"
KNOWN: dict[str, Any] = json.loads((VECTORS / "enrol.json").read_text())
INVITATION = Invitation(
    secret=bytes(range(16)),
    authority=bytes(32),
    server=bytes(range(32)),
    expires=1_800_000_000,
    epsilon=3.0,
    delta=1e-5,
    name="hospital-a",
    addresses=(Address("server.example", 9444), Address("::1", 9444)),
)


def test_the_vectors_are_what_their_own_program_makes() -> None:
    made = subprocess.run([sys.executable, str(VECTORS / "enrol.py")], capture_output=True, check=True, text=True)
    assert json.loads(made.stdout) == KNOWN


def test_g21_the_token_is_that_of_the_vectors() -> None:
    known = KNOWN["invitation"]
    made = Invitation(
        secret=bytes.fromhex(known["secret"]),
        authority=bytes.fromhex(known["authority"]),
        server=key_fingerprint(known["application"]),
        expires=known["expires"],
        epsilon=known["epsilon"],
        delta=known["delta"],
        name=known["name"],
        addresses=tuple(Address.parse(one) for one in known["addresses"]),
    )
    assert made.server.hex() == known["server"]
    assert made.token() == known["token"]
    assert Invitation.parse(known["token"]) == made


@pytest.mark.parametrize("case", KNOWN["messages"], ids=lambda case: case["what"])
def test_a_message_is_what_the_vectors_say_and_one_with_a_fault_is_none(case: dict[str, str]) -> None:
    data, kinds = case["data"].encode(), ("hello", "join", "renew", "enrolled", "refused")
    if case["kind"]:
        read = read_message(data, *kinds)
        assert read.kind == case["kind"]
        assert read.to_bytes() == data
        assert message(read.kind, read.proofs, **read.fields) == data
    else:
        with pytest.raises(IdentityError, match="got other bytes"):
            read_message(data, *kinds)


@pytest.mark.parametrize("case", KNOWN["refused"], ids=lambda case: case["what"])
def test_a_token_with_one_fault_is_refused_and_the_fault_is_named(case: dict[str, str]) -> None:
    with pytest.raises(IdentityError, match=case["says"]) as caught:
        Invitation.parse(case["token"])
    # Nothing of a secret may reach a screen or a log through an error.
    assert not any(case["token"][at : at + 8] in str(caught.value) for at in range(8, len(case["token"]) - 7))


def test_g21_the_proof_and_the_mac_are_those_of_the_vectors() -> None:
    known = KNOWN["proof"]
    secret = bytes.fromhex(known["secret"])
    stored = stored_of(secret)
    assert (stored.id, stored.stored_key, stored.server_key) == (known["id"], known["stored_key"], known["server_key"])
    hello, leaf, body = (known[name].encode() for name in ("hello", "leaf", "body"))
    over = transcript(known["kind"], hello, leaf, body)
    assert over.hex() == known["transcript"]
    assert prove(secret, over) == known["proof"]
    assert proves(stored.stored_key, over, known["proof"])
    assert server_key_of(secret) == known["server_key"]
    assert answer_mac(stored.server_key, over, known["answer"].encode()) == known["mac"]
    assert signed("application", over).hex() == known["signed_application"]


def test_a_token_survives_mail_and_capitals() -> None:
    token = INVITATION.token()
    wrapped = "\n  ".join(token[at : at + 40] for at in range(0, len(token), 40))
    for text in (token, token.upper(), f"  {token}\n", wrapped, token.replace("a", "A")):
        assert Invitation.parse(text) == INVITATION


def test_every_cut_and_every_single_mistyped_character_is_told_apart() -> None:
    token = INVITATION.token()
    for end in range(7, len(token)):
        with pytest.raises(IdentityError, match="cut"):
            Invitation.parse(token[:end])
    for place in range(15, len(token)):
        other = "a" if token[place] != "a" else "b"
        with pytest.raises(IdentityError, match="mistyped"):
            Invitation.parse(token[:place] + other + token[place + 1 :])


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_garbage_is_no_invitation_and_nothing_else_happens(count: int) -> None:
    draw = random.Random(1)
    token = INVITATION.token()
    for _ in range(count):
        text = list(token)
        for _ in range(draw.randint(1, 8)):
            at = draw.randrange(max(1, len(text)))
            text = text or ["t"]
            match draw.randrange(4):
                case 0:
                    text[at] = chr(draw.randrange(1, 0x250))
                case 1:
                    del text[at]
                case 2:
                    text.insert(at, draw.choice("abcdefg234567\u0130\u212a\uff11"))
                case _:
                    text = text[: at + 1]
        changed = "".join(text)
        if "".join(changed.split()).lower() != token:
            with pytest.raises(IdentityError):
                Invitation.parse(changed)
    with pytest.raises(IdentityError):
        Invitation.parse("tacit1-" + "7" * 100_000)


def test_an_invitation_hides_its_secret_and_is_never_copied_or_pickled() -> None:
    assert INVITATION.secret.hex() not in repr(INVITATION)
    assert repr(INVITATION.secret) not in repr(INVITATION)
    stored = stored_of(INVITATION.secret)
    assert stored.stored_key not in repr(stored)
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            leak(INVITATION)
    assert len({new_secret() for _ in range(100)}) == 100


# -- the proof --------------------------------------------------------------------------------------------------------


def exchange(**changed: bytes) -> bytes:
    parts = {"kind": b"join", "hello": b"hello", "leaf": b"leaf", "body": b"body"} | changed
    return transcript(parts["kind"].decode(), parts["hello"], parts["leaf"], parts["body"])


def reusable(over_of: Any) -> list[str]:
    """Lists what of an exchange can be changed while a proof for the original still holds."""
    secret = new_secret()
    stored, proof = stored_of(secret), prove(secret, over_of())
    assert proves(stored.stored_key, over_of(), proof)
    return [
        part
        for part in ("kind", "hello", "leaf", "body")
        if proves(stored.stored_key, over_of(**{part: b"renew" if part == "kind" else b"other"}), proof)
    ]


def test_g21_a_proof_holds_for_these_keys_on_both_sides_and_this_greeting_only() -> None:
    assert reusable(exchange) == []


def test_planted_bug_a_proof_that_leaves_a_key_out_can_be_moved_to_another() -> None:
    def without(part: str) -> Any:
        return lambda **changed: exchange(**(changed | {part: b""}))

    for part in ("hello", "leaf", "body"):
        assert reusable(without(part)) == [part]


def test_the_parts_of_a_transcript_cannot_be_moved_into_each_other() -> None:
    assert exchange(hello=b"ab", leaf=b"c") != exchange(hello=b"a", leaf=b"bc")
    assert exchange(leaf=b"", body=b"x") != exchange(leaf=b"x", body=b"")


def redeemable(stored_key: str, server_key: str, verifier: Any) -> bool:
    """Whether a thief of the list of members can make a proof, with the uses of the two keys that are easily tried."""
    over = exchange()
    keys = [bytes.fromhex(stored_key), bytes.fromhex(server_key), hashlib.sha256(bytes.fromhex(stored_key)).digest()]
    tries = [
        hmac.new(key, purpose + over, "sha256").digest() for key in keys for purpose in (b"", b"tacit/enrol/1/proof\n")
    ]
    tries += [bytes(a ^ b for a, b in zip(key, mask, strict=True)) for key in keys for mask in list(tries)] + keys
    return any(verifier(stored_key, over, one.hex()) for one in tries)


def test_g21_who_reads_what_the_server_keeps_can_redeem_nothing() -> None:
    stored = stored_of(new_secret())
    assert not redeemable(stored.stored_key, stored.server_key, proves)


def test_planted_bug_a_mac_under_the_stored_hash_is_redeemed_by_its_thief() -> None:
    def naive(stored_key: str, over: bytes, proof: str) -> bool:
        return hmac.new(bytes.fromhex(stored_key), over, "sha256").hexdigest() == proof

    stored = stored_of(new_secret())
    assert redeemable(stored.stored_key, stored.server_key, naive)


def test_a_proof_by_another_secret_or_for_nothing_does_not_hold() -> None:
    stored, over = stored_of(new_secret()), exchange()
    for proof in (prove(new_secret(), over), "00" * 32, stored.stored_key, stored.server_key):
        assert not proves(stored.stored_key, over, proof)


# -- messages ---------------------------------------------------------------------------------------------------------


def test_a_message_comes_back_as_it_was_and_has_one_spelling() -> None:
    data = message("refused", word="used")
    read = read_message(data, "refused", "enrolled")
    assert (read.kind, read.fields, read.proofs, read.to_bytes()) == ("refused", {"word": "used"}, {}, data)
    for other in (
        b"",
        b"{}",
        b"{}\n{}",
        data + b"\n",
        data + b" ",
        data.replace(b":", b": "),
        data.replace(b'"used"', b'"used","word":"used"'),
        data.replace(b'"v":1', b'"v":2'),
        data.replace(b'"v":1', b'"v":1.0'),
        data.replace(b'"v":1', b'"v":true'),
        data.replace(b"used", b"maybe"),
        data.replace(b'"word"', b'"ward"'),
        data.replace(b"{}", b'{"mac":""}'),
        data.replace(b"\n", b""),
        data.replace(b"used", b"us\\u0065d"),
        b"[" * 9000 + b"\n{}",
        b'{"kind":["refused"],"v":1}\n{}',
        b"\xff\xfe",
        b"x" * (MOST_MESSAGE + 1),
        message("enrolled", {"mac": "00" * 32}, addresses=["A:1"], certificate="AAAA", federation="a", name="a"),
        message("enrolled", {"mac": "00" * 32}, addresses=[], certificate="AAAA", federation="a", name="a"),
        message("enrolled", {"mac": 7}, addresses=["a:1"], certificate="AAAA", federation="a", name="a"),  # type: ignore[dict-item]
    ):
        with pytest.raises(IdentityError):
            read_message(other, "refused", "enrolled")
    with pytest.raises(IdentityError):
        read_message(data, "join")


def test_planted_bug_a_reader_that_takes_any_spelling_takes_a_repeated_field(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = body_of("refused", word="used").replace(b'"word":', b'"word":"busy","word":') + b"\n{}"
    with pytest.raises(IdentityError):
        read_message(twice, "refused")
    monkeypatch.setattr(module, "_object", json.loads)
    assert read_message(twice, "refused").fields["word"] == "used"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_bytes_off_the_wire_are_a_message_or_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(IdentityError):
        read_message(data, "hello", "join", "renew", "enrolled", "refused")


def test_base64_has_one_spelling() -> None:
    for length in range(20):
        data = os.urandom(length)
        assert from_base64(to_base64(data)) == data
    for text in ("AB==", "AAA", "AA=A", "A A=", "AAAA\n", "ä"):
        with pytest.raises(IdentityError):
            from_base64(text)


@pytest.mark.parametrize(
    "text", ["10.0.0.1:9443", "server.example:1", "[::1]:65535", "[2001:db8::1]:443", "localhost:8000"]
)
def test_an_address_has_one_spelling(text: str) -> None:
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a:",
        ":1",
        "a:0",
        "a:65536",
        "a:01",
        "a:1:2",
        "A.example:1",
        "::1:9443",
        "[10.0.0.1]:1",
        "[a.example]:1",
        "300.1.1.1:1",
        "a b:1",
        "a_b:1",
        "-a:1",
        "[fe80::1%eth0]:1",
        "a:٣",
        "http://a:1",
        "a" * 64 + ":1",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(IdentityError):
        Address.parse(text)


def test_versions_are_compared_as_numbers() -> None:
    assert older("0.9", "0.10")
    assert older("0.1.0", "0.1.1")
    assert not older("0.1", "0.1.0")
    assert not older("1.0", "0.9.9")


def test_every_refusal_has_a_remedy() -> None:
    assert set(REMEDIES) == set(Word)
    assert dataclasses.is_dataclass(INVITATION)
