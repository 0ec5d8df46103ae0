"""The terms of a job: one text, bounds, and nothing that a hostile text can do to its reader."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest

from privacy.errors import PlanError
from privacy.plan import Local
from privacy.terms import Terms
from tests.clients.test_jobs import PLAN, make_terms


def test_terms_have_one_text_and_one_digest() -> None:
    terms = make_terms(purpose="für alle", curator="A. N. Other")
    text = terms.to_json()
    assert Terms.from_json(text) == Terms.from_json(text.encode()) == terms
    assert Terms.from_json(text).digest() == terms.digest()
    assert text == text.strip()
    assert dataclasses.replace(terms, seed=2).digest() != terms.digest()
    fields = {field.name for field in dataclasses.fields(Terms)}
    # Every field is part of what a session is bound to.
    changed: dict[str, Any] = {
        "job": "f" * 32,
        "task": "other",
        "code": "d" * 64,
        "plan": dataclasses.replace(PLAN, l2_clip=2.0),
        "local": Local(lr=0.25),
        "seed": 2,
        "inputs": (64,),
        "classes": 11,
        "clients": 3,
        "curator": "another",
        "purpose": "another",
    }
    assert fields == changed.keys()
    digests = {dataclasses.replace(terms, **{name: value}).digest() for name, value in changed.items()}
    assert len(digests | {terms.digest()}) == len(fields) + 1


@pytest.mark.parametrize(
    "changed",
    [
        {"job": "F" * 32},
        {"job": "f" * 33},
        {"job": 5},
        {"code": "c" * 63},
        {"code": None},
        {"task": "a\nb"},
        {"task": "x" * 501},
        {"purpose": "\x1b[2J"},
        {"curator": "\u202e"},
        {"purpose": "\ud800"},
        {"inputs": ()},
        {"inputs": [1, 8, 8]},
        {"inputs": (1,) * 9},
        {"inputs": (0,)},
        {"inputs": (True,)},
        {"inputs": (2**24 + 1,)},
        {"inputs": (8.0,)},
        {"classes": 1},
        {"classes": True},
        {"classes": 2**24 + 1},
        {"clients": 0},
        {"clients": 10**6 + 1},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 1.0},
    ],
)
def test_what_is_out_of_range_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="expected"):
        make_terms(**changed)


TEXT = make_terms().to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "null",
        "[]",
        "{}",
        '"text"',
        "[" * 10_000,
        '{"a":' * 5_000,
        b"\xff\xfe\x00",
        TEXT.encode("utf-16"),
        TEXT.encode("utf-32"),
        b"\xef\xbb\xbf" + TEXT.encode(),
        TEXT + " ",
        " " + TEXT,
        TEXT.replace(":", ": ", 1),
        TEXT.replace('"seed":1', '"seed":1,"seed":1'),
        TEXT.replace('"seed":1', '"seed":1.0'),
        TEXT.replace('"seed":1', '"seed":1e400'),
        TEXT.replace('"seed":1', '"seed":NaN'),
        TEXT.replace('"seed":1', f'"seed":{"9" * 5_000}'),
        TEXT.replace('"digits"', '"d\\u0069gits"'),
        TEXT.replace('"digits"', '"\\ud800"'),
        json.dumps(sorted(json.loads(TEXT))),
        json.dumps(json.loads(TEXT) | {"more": 1}),
        json.dumps({k: v for k, v in json.loads(TEXT).items() if k != "seed"}),
        *(
            json.dumps(json.loads(TEXT) | {name: value}, sort_keys=True, separators=(",", ":"))
            for name in ("plan", "local", "inputs", "job", "task")
            for value in (None, 5, [], {}, [[]], True)
        ),
        TEXT + "x" * 32 * 1024,
    ],
)
def test_hostile_text_is_refused_with_one_error_and_nothing_else(text: str | bytes) -> None:
    with pytest.raises(PlanError):
        Terms.from_json(text)


def test_a_long_text_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.terms.json.loads", lambda *_: pytest.fail("it was read"))
    with pytest.raises(PlanError, match="at most"):
        Terms.from_json("[" * 40_000)


@pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_terms_with_a_fault_are_refused_or_are_other_terms(cases: int) -> None:
    dice, terms = random.Random(4), make_terms()
    for _ in range(cases):
        text = bytearray(TEXT.encode())
        for _ in range(dice.randrange(1, 4)):
            at = dice.randrange(len(text))
            match dice.randrange(3):
                case 0:
                    text[at] = dice.randrange(256)
                case 1:
                    del text[at : at + dice.randrange(1, 9)]
                case _:
                    text[at:at] = bytes(dice.randrange(32, 127) for _ in range(dice.randrange(1, 5)))
        try:
            read = Terms.from_json(bytes(text))
        except PlanError:
            continue
        # What is read back is exactly what came, so a session bound to the one is never served under the other.
        assert read.to_json().encode() == bytes(text)
        assert (read.digest() == terms.digest()) == (bytes(text) == TEXT.encode())
