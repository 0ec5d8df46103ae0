"""Many signatures are checked by several processes, and whatever becomes of these, the answer is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from privacy.identity import Identity, Secret, many
from privacy.identity.many import Signed, first_signed_otherwise, first_unsigned

SIGNER = Identity(b"k" * 32)
COUNT = 40


def signatures(bad: int | None = None) -> list[Signed]:
    signed = [(SIGNER.public_key, b"message %d \xff" % n, SIGNER.sign(b"message %d \xff" % n)) for n in range(COUNT)]
    if bad is not None:
        key, message, signature = signed[bad]
        signed[bad] = (key, message + b"!", signature)
    return signed


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a few signatures be enough for processes, two of them on any machine."""
    monkeypatch.setattr(many, "_WORTH", 10)
    monkeypatch.setattr(many, "_WORTH_SIGNING", 10)
    monkeypatch.setattr(many, "_CHUNK", 4)
    monkeypatch.setattr(many, "_processes", lambda: 2)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts what this process checks itself."""
    checked: list[int] = []
    check = many._is_signed

    def counting(one: Signed) -> bool:
        checked.append(1)
        return check(one)

    monkeypatch.setattr(many, "_is_signed", counting)
    return checked


def test_processes_answer_and_this_one_checks_none(shared: None, here: list[int]) -> None:
    assert first_unsigned(signatures()) is None
    assert not here


def test_few_signatures_start_no_process(here: list[int]) -> None:
    assert first_unsigned(signatures()) is None
    assert len(here) == COUNT


@pytest.mark.parametrize("bad", [0, 13, COUNT - 1])
def test_the_first_bad_one_is_found_and_checked_here_again(shared: None, here: list[int], bad: int) -> None:
    signed = signatures(bad)
    assert first_unsigned(signed) == bad
    assert many._first(signed, many._is_signed) == bad
    assert 0 < len(here) <= COUNT + 4


@pytest.mark.parametrize("one", [(1, b"m", "00" * 64), ("00" * 32, b"m", None), ("é", b"m", "\ud800")])
def test_what_is_no_key_and_no_signature_is_a_bad_one(shared: None, one: Signed) -> None:
    assert first_unsigned([*signatures()[:20], one]) == 20


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(1)",
        "print('?', flush=True); import time; time.sleep(60)",
        "import sys\nfor line in sys.stdin: print(99, flush=True)",
        # Whoever calls a sound signature bad is not believed.
        "import sys, json\nfor line in sys.stdin: print(json.loads(line)[0], 0, flush=True)",
        # Out of step by one line, as after a start-up file that prints: each answer is to the question before.
        "print('welcome', flush=True)\nfrom privacy.identity.many import answer; answer()",
        "print(0, -1, flush=True)\nfrom privacy.identity.many import answer; answer()",
        "print('1 -1', flush=True)\nimport time; time.sleep(60)",
    ],
)
@pytest.mark.parametrize("bad", [None, 13, COUNT - 1])
def test_processes_that_fail_or_talk_nonsense_change_nothing(
    shared: None, program: str, bad: int | None, here: list[int]
) -> None:
    assert many._first_of_many(signatures(bad), many._is_signed, program, 10) == bad
    assert here


def test_without_an_interpreter_to_start_this_process_checks_all(
    shared: None, here: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert first_unsigned(signatures(13)) == 13
    assert len(here) >= 14


def test_planted_bug_processes_that_hold_everything_would_be_believed(shared: None) -> None:
    """Shows that it is their answers that count: a program that says yes to all finds nothing."""
    program = "import sys, json\nfor line in sys.stdin: print(json.loads(line)[0], -1, flush=True)"
    assert many._first_of_many(signatures(13), many._is_signed, program, 10) is None


def test_a_folder_that_is_worked_in_brings_no_program(
    shared: None, here: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "privacy"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('run from the folder with the files to verify')")
    monkeypatch.chdir(tmp_path)
    assert first_unsigned(signatures()) is None
    assert not here


def test_an_error_of_whoever_reads_goes_through(shared: None) -> None:
    def read() -> Iterator[Signed]:
        yield from signatures()
        raise KeyError("damaged")

    with pytest.raises(KeyError, match="damaged"):
        first_unsigned(read())


@pytest.mark.parametrize("bad", [None, 13])
def test_own_signatures_are_made_again_by_processes_that_read_the_key_file(
    shared: None, tmp_path: Path, bad: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it's a key.key"
    identity = Secret.load_or_create(path).identity("server")
    signed = [(identity.public_key, message, identity.sign(message)) for _, message, _ in signatures()]
    if bad is not None:
        # Of the right key, over the right message, and still not what this key signs: nobody else may make it.
        signed[bad] = (*signed[bad][:2], signed[bad - 1][2])
    made: list[int] = []
    check = many._is_signed_by

    def counting(by: Identity, one: Signed) -> bool:
        made.append(1)
        return check(by, one)

    monkeypatch.setattr(many, "_is_signed_by", counting)
    assert first_signed_otherwise(signed, identity, path, "server") == bad
    assert len(made) <= 5
    assert first_signed_otherwise(signed, identity) == bad
    # Another key in the file: its processes deny everything, and are not believed.
    Secret.load_or_create(tmp_path / "other.key")
    assert first_signed_otherwise(signed, identity, tmp_path / "other.key", "server") == bad
