"""The vault: what is stored opens only whole and in its place, and the log neither tells nor fails."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import hmac
import io
import logging
import multiprocessing
import os
import pickle
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from privacy.errors import LedgerError, RunError
from privacy.identity import Secret
from privacy.vault import Safe, SealedLog, private_logger, read_log
from privacy.vault import safe as vault

SECRET = Secret(bytes(range(32)))
OTHER = Secret(bytes(range(32, 64)))
TEXT = b"the weights of clinic 7, and its account 0123456789abcdef"


# -- the safe --------------------------------------------------------------------------------------------------------


def test_what_is_sealed_opens_under_its_name() -> None:
    safe = Safe(SECRET, "kept")
    for parts in ((TEXT,), (TEXT[:5], memoryview(TEXT)[5:]), (b"",), ()):
        assert safe.open("a", safe.seal("a", *parts)) == b"".join(parts)
    # After a restart too: nothing but the secret and the purpose is needed.
    assert Safe(Secret(bytes(range(32))), "kept").open("a", safe.seal("a", TEXT)) == TEXT


def test_the_construction_is_hkdf_sha_256_of_rfc_5869_and_aes_256_gcm() -> None:
    """Computed here from HMAC alone, by the formulas of RFC 5869, sections 2.2 and 2.3."""
    sealed = Safe(SECRET, "kept").seal("name", TEXT)
    magic = b"tacit/sealed/1\n"
    assert sealed.startswith(magic)
    salt, body = sealed[len(magic) : len(magic) + 32], sealed[len(magic) + 32 :]
    extracted = hmac.new(salt, SECRET.derive("tacit/safe/1/kept"), hashlib.sha256).digest()
    key = hmac.new(extracted, magic + b"\x01", hashlib.sha256).digest()
    assert AESGCM(key).decrypt(bytes(12), body, b"name") == TEXT
    with pytest.raises(InvalidTag):
        AESGCM(key).decrypt(bytes(12), body, b"other")


def test_nothing_of_a_message_shows_and_two_seals_of_it_have_nothing_in_common() -> None:
    safe = Safe(SECRET, "kept")
    first, second = safe.seal("a", TEXT), safe.seal("a", TEXT)
    body = len(b"tacit/sealed/1\n")
    for sealed in (first, second):
        assert not any(TEXT[at : at + 6] in sealed for at in range(len(TEXT) - 6))
    assert not any(first[at : at + 4] in second[body:] for at in range(body, len(first) - 4))


class _Seals(Protocol):
    def seal(self, name: str, *parts: bytes) -> bytes: ...
    def open(self, name: str, sealed: bytes) -> bytes: ...


class _CounterMode:
    """A planted bug: encrypts and does not authenticate, neither the text nor its name."""

    def __init__(self, secret: Secret, purpose: str) -> None:
        self._key = secret.derive(purpose)

    def seal(self, name: str, *parts: bytes) -> bytes:
        nonce = os.urandom(16)
        return nonce + Cipher(algorithms.AES256(self._key), modes.CTR(nonce)).encryptor().update(b"".join(parts))

    def open(self, name: str, sealed: bytes) -> bytes:
        if len(sealed) < 16:
            raise LedgerError("too short")
        return Cipher(algorithms.AES256(self._key), modes.CTR(sealed[:16])).decryptor().update(sealed[16:])


def _wrongly_opened(make: Callable[[Secret, str], _Seals]) -> set[str]:
    """Returns which alterations of sealed bytes are not refused."""
    safe = make(SECRET, "kept")
    sealed, another = safe.seal("a", TEXT), safe.seal("b", TEXT)
    cases: list[tuple[str, _Seals, str, bytes]] = [
        *(("cut", safe, "a", sealed[:length]) for length in range(len(sealed))),
        *(
            ("flipped", safe, "a", sealed[:at] + bytes([sealed[at] ^ bit]) + sealed[at + 1 :])
            for at in range(len(sealed))
            for bit in (1, 128)
        ),
        ("longer", safe, "a", sealed + b"\0"),
        ("shifted", safe, "a", b"\0" + sealed),
        ("spliced", safe, "a", sealed[:60] + another[60:]),
        ("another name", safe, "b", sealed),
        ("no name", safe, "", sealed),
        ("another purpose", make(SECRET, "log"), "a", sealed),
        ("another secret", make(OTHER, "kept"), "a", sealed),
        ("never sealed", safe, "a", TEXT * 3),
    ]
    found = set()
    for kind, opener, name, content in cases:
        try:
            opener.open(name, content)
        except LedgerError:
            continue
        found.add(kind)
    return found


def test_anything_but_the_exact_bytes_under_the_exact_name_is_refused() -> None:
    assert _wrongly_opened(Safe) == set()


def test_planted_bug_encryption_without_authentication_is_found() -> None:
    assert {"cut", "flipped", "longer", "another name"} <= _wrongly_opened(_CounterMode)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_and_nothing_worse(content: bytes) -> None:
    safe = Safe(SECRET, "kept")
    for sealed in (content, b"tacit/sealed/1\n" + content):
        with pytest.raises(LedgerError, match="sealed"):
            safe.open("a", sealed)


def test_a_safe_cannot_be_printed_pickled_or_copied() -> None:
    safe, key = Safe(SECRET, "kept"), SECRET.derive("tacit/safe/1/kept")
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="pickled"):
            way(safe)
    for text in (repr(safe), str(safe), f"{safe}"):
        assert key.hex() not in text
        assert repr(key)[2:-1] not in text
    with pytest.raises(TypeError):
        pickle.dumps(logging.LogRecord("n", 1, "p", 1, "m", (safe,), None))


# -- the log ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    made = private_logger("tacit.test-vault")
    yield made
    for handler in made.handlers[:]:
        made.removeHandler(handler)


def _log(folder: Path, *texts: str, limit: int = 1 << 20, name: str = "client.log") -> Path:
    """Writes texts through a log of its own and returns its path."""
    handler = SealedLog(folder / name, SECRET, limit=limit)
    for text in texts:
        handler.handle(logging.LogRecord("tacit.client", logging.ERROR, "", 0, text, None, None))
    assert handler.lost == 0
    return folder / name


def _read(path: Path, secret: Secret = SECRET) -> tuple[list[str], bool]:
    """Returns the last word of each record's first line, and whether the log was whole."""
    words: list[str] = []
    try:
        for text in read_log(path, secret):
            words.append(text.split("\n")[0].split()[-1])
    except LedgerError:
        return words, False
    return words, True


def _cut_up(path: Path) -> list[bytes]:
    """Returns the frames of a log file, lengths included; the head comes first."""
    content, frames = path.read_bytes(), []
    while content:
        length = 4 + int.from_bytes(content[:4], "big")
        frames.append(content[:length])
        content = content[length:]
    return frames


def test_g12_records_come_back_with_their_tracebacks_and_nothing_of_them_is_in_the_files(
    tmp_path: Path, logger: logging.Logger
) -> None:
    path = tmp_path / "logs" / "client.log"
    # Nothing else listens: pytest's own handler would pass on a text that its workers cannot send.
    logger.handlers[:] = [SealedLog(path, SECRET)]
    try:
        raise ValueError("row 7 of patients.csv")
    except ValueError:
        logger.exception("could not read")
    logger.warning("näher: %s \ud800", "ε")
    first, second = read_log(path, SECRET)
    assert "ERROR tacit.test-vault: could not read\nTraceback" in first
    assert first.endswith("ValueError: row 7 of patients.csv")
    assert second.endswith("näher: ε \\ud800")
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        for word in (b"patients", b"ValueError", b"Traceback", b"could not", b"ERROR"):
            assert word not in file.read_bytes()
    with pytest.raises(LedgerError):
        list(read_log(path, OTHER))


def test_a_log_goes_on_after_a_restart(tmp_path: Path) -> None:
    _log(tmp_path, "one", "two")
    assert _read(_log(tmp_path, "three")) == (["one", "two", "three"], True)


def test_a_folder_without_a_log_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="got none"):
        list(read_log(tmp_path / "client.log", SECRET))


def _lengths(folder: Path) -> list[int]:
    texts = ["x" * size for size in (1, 50, 900, 1100, 10_000, 70_000, 1_000_000)]
    return [len(frame) for frame in _cut_up(_log(folder, *texts))[1:]]


def test_lengths_of_records_are_multiples_of_a_block_and_bounded(tmp_path: Path) -> None:
    added = 4 + 15 + 32 + 16
    blocks = [divmod(length - added, 1024) for length in _lengths(tmp_path)]
    assert blocks == [(1, 0), (1, 0), (1, 0), (2, 0), (10, 0), (64, 0), (64, 0)]


def test_planted_bug_records_without_padding_tell_their_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault, "_padded", lambda text: vault._framed(text.encode()[:60_000]))
    assert len(set(_lengths(tmp_path)[:3])) == 3


def test_a_text_that_is_too_long_keeps_its_head_and_its_tail(tmp_path: Path) -> None:
    (text,) = read_log(_log(tmp_path, "what happened" + 100_000 * "ö" + "and why"), SECRET)
    assert "what happened" in text
    assert "[cut]" in text
    assert text.endswith("and why")
    assert len(text.encode()) <= 64 * 1024


def _unseen(folder: Path) -> set[str]:
    """Returns which alterations of a log's file the reader does not see."""
    path = _log(folder, "one", "two", "three", "four")
    head, *records = _cut_up(path)
    foreign_head, *foreign = _cut_up(_log(folder, "one", "two", "three", "four", name="other.log"))
    altered = {
        "first removed": [head, *records[1:]],
        "one removed": [head, records[0], *records[2:]],
        "head removed": records,
        "swapped": [head, records[1], records[0], *records[2:]],
        "repeated": [head, records[0], *records],
        "repeated at the end": [head, *records, records[-1]],
        "of another log": [head, *records[:2], foreign[2], records[3]],
        "first of another log": [head, foreign[0]],
        "head of another log": [foreign_head, *records],
        "torn": [head, *records[:3], records[3][:-1]],
        "something added": [head, *records, b"\0"],
        "a length of nothing": [head, *records, bytes(4)],
        "a length past the end": [head, b"\xff\xff\xff\xff", *records],
        "all removed": [b""],
    }
    missed = set()
    for kind, frames in altered.items():
        path.write_bytes(b"".join(frames))
        words, whole = _read(path)
        # Whatever is given out before the fault is true and in order.
        assert words == ["one", "two", "three", "four"][: len(words)] or whole
        if whole:
            missed.add(kind)
    sound = b"".join((head, *records))
    for at in range(0, len(sound), 61):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 4]) + sound[at + 1 :])
        if _read(path)[1]:
            missed.add("flipped")
    path.write_bytes(b"".join((head, *records[:2])))
    assert _read(path) == (["one", "two"], True), "what the docstring says cannot be seen"
    return missed


def test_a_record_that_was_altered_removed_or_moved_is_seen(tmp_path: Path) -> None:
    assert _unseen(tmp_path) == set()


def test_planted_bug_records_bound_to_nothing_can_be_removed_and_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vault, "_place", lambda number, tag: "record")
    assert {"one removed", "swapped", "repeated", "of another log"} <= _unseen(tmp_path)


def test_a_torn_append_costs_its_record_and_no_other(tmp_path: Path) -> None:
    path = _log(tmp_path, "one", "torn")
    head, one, torn = _cut_up(path)
    for length in (0, 1, 3, 4, 5, 4 + 15, 4 + 15 + 32, len(torn) // 2, len(torn) - 1):
        path.write_bytes(head + one + torn[:length])
        assert _read(path) == (["one"], length == 0)
        assert _read(_log(tmp_path, "next")) == (["one", "next"], True)


def test_what_a_torn_append_left_is_gone_after_a_shorter_record_and_from_a_file_that_is_renamed(tmp_path: Path) -> None:
    path = _log(tmp_path, "one", "x" * 10_000)
    torn = path.read_bytes()[:-1]
    path.write_bytes(torn)
    assert _read(_log(tmp_path, "next")) == (["one", "next"], True)
    path.write_bytes(torn)
    assert _read(_log(tmp_path, "next", limit=0)) == (["one", "next"], True)
    assert (tmp_path / "client.log.1").exists()


def test_the_log_of_a_long_life_is_bounded_and_its_newest_records_are_there(tmp_path: Path) -> None:
    limit, path = 20_000, tmp_path / "client.log"
    for start in range(0, 60, 20):
        _log(tmp_path, *(str(number) for number in range(start, start + 20)), limit=limit)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2 * limit
    words, whole = _read(path)
    assert whole
    assert 18 < len(words) < 60
    assert words == [str(number) for number in range(60 - len(words), 60)]
    assert {file.name for file in tmp_path.iterdir()} == {"client.log", "client.log.1", ".client.log.lock"}


def test_a_gap_between_the_two_files_of_a_log_is_seen(tmp_path: Path) -> None:
    path, older = tmp_path / "client.log", tmp_path / "client.log.1"
    _log(tmp_path, *map(str, range(20)), limit=20_000)
    full = older.read_bytes()
    in_older = len(_cut_up(older)) - 1
    older.write_bytes(b"".join(_cut_up(older)[:-1]))
    words, whole = _read(path)
    assert not whole
    assert words == [str(n) for n in range(20) if n != in_older - 1], "all that is there is given out first"
    older.unlink()
    assert _read(path) == ([str(n) for n in range(in_older, 20)], False)
    older.write_bytes(full)
    assert _read(path)[1]
    # Killed between the renaming and the new file: the older one is whole, and the log goes on from it.
    path.unlink()
    assert _read(_log(tmp_path, "20")) == ([*map(str, range(in_older)), "20"], True)


def test_a_record_larger_than_the_limit_is_still_written(tmp_path: Path) -> None:
    assert _read(_log(tmp_path, "one", "two", "three", limit=0)) == (["two", "three"], True)


def test_a_file_that_is_no_log_of_this_holder_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "client.log"
    for content in (b"", b"my own notes\n", _log(tmp_path / "other", "one").read_bytes()[:-1500]):
        path.write_bytes(content)
        with pytest.raises(LedgerError):
            SealedLog(path, SECRET if len(content) < 100 else OTHER)
        assert path.read_bytes() == content
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="folder"):
        SealedLog(tmp_path / "file" / "client.log", SECRET)


class _Full(io.FileIO):
    """A file on a disk with room for 100 more bytes."""

    def write(self, data: Any) -> int:
        return super().write(data[:100])


class _WorseError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("an exception that cannot even be printed: patient 4711")


def test_g12_a_log_that_cannot_be_written_is_silent_and_says_later_what_it_lost(
    tmp_path: Path, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "logs" / "client.log"
    handler = SealedLog(path, SECRET)
    # Without pytest's own handlers, which raise what they cannot format.
    monkeypatch.setattr(logger, "handlers", [handler])
    logger.error("first")
    before = path.read_bytes()
    assert logging.raiseExceptions, "as it is by default"
    with monkeypatch.context() as patch:
        patch.setattr(vault, "open", lambda file, mode, **_: _Full(file, mode), raising=False)
        logger.error("patient 4711")
    assert path.read_bytes() == before, "what was written in part was taken back"
    os.rename(path.parent, tmp_path / "away")
    (tmp_path / "logs").touch()
    logger.error("patient 4711")
    os.unlink(tmp_path / "logs")
    os.rename(tmp_path / "away", path.parent)
    logger.error("broken %d", "patient 4711")
    assert handler.lost == 3
    logger.error("worse", exc_info=_WorseError())
    assert handler.lost == 0
    logger.error("last")
    first, worse, last = read_log(path, SECRET)
    assert "[records lost before this one: 3]" in worse
    assert "lost" not in first + last
    assert capfd.readouterr() == ("", "")


class _NoRoom(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError("no space left on device")


def test_g12_planted_bug_a_plain_handler_prints_what_it_could_not_write(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(_NoRoom())])
    logger.error("patient 4711")
    assert "4711" in capfd.readouterr().err


def _write_ten(folder: Path, name: str) -> None:
    _log(folder, *(f"{name}{number}" for number in range(10)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_write_one_log_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_ten, args=(tmp_path, name)) for name in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    words, whole = _read(tmp_path / "client.log")
    assert whole
    for name in "abcd":
        assert [word for word in words if word.startswith(name)] == [f"{name}{number}" for number in range(10)]


def test_an_append_reads_the_file_only_where_somebody_else_wrote_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, read = Secret(bytes(range(32))), []
    end_of = vault._end_of

    def counted(safe: Safe, path: Path) -> Any:
        read.append(path)
        return end_of(safe, path)

    first, second = (SealedLog(tmp_path / "log", secret) for _ in range(2))
    monkeypatch.setattr(vault, "_end_of", counted)

    def say(log: SealedLog, text: str) -> int:
        read.clear()
        log.emit(logging.LogRecord("x", logging.INFO, "", 0, text, None, None))
        return len(read)

    assert [say(first, "1"), say(first, "2"), say(second, "3"), say(second, "4"), say(first, "5")] == [1, 0, 1, 0, 1]
    # Remembered or read anew, the chain is one: each record binds the one before it.
    assert [line[-1] for line in read_log(tmp_path / "log", secret)] == list("12345")


def test_a_lock_that_is_never_given_back_costs_records_and_half_a_second(tmp_path: Path) -> None:
    handler = SealedLog(tmp_path / "client.log", SECRET)
    with open(tmp_path / ".client.log.lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = time.monotonic()
        handler.handle(logging.LogRecord("n", logging.ERROR, "", 0, "text", None, None))
        assert time.monotonic() - start < 5
    assert handler.lost == 1


# -- the logger ------------------------------------------------------------------------------------------------------


def test_g12_a_private_logger_prints_nothing_where_nobody_listens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As in a plain program: without this, pytest's own handlers keep Python from printing.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for _ in range(2):
        private_logger("tacit.test-silent").error("patient 4711")
    assert [type(handler) for handler in logging.getLogger("tacit.test-silent").handlers] == [logging.NullHandler]
    assert capsys.readouterr().err == ""
    # The planted bug: an ordinary logger, which Python's handler of last resort prints.
    logging.getLogger("tacit.test-ordinary").error("patient 4711")
    assert "4711" in capsys.readouterr().err


def test_a_private_logger_writes_whatever_level_the_program_around_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = private_logger("tacit.test-level")
    monkeypatch.setattr(made, "handlers", [SealedLog(tmp_path / "client.log", SECRET)])
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        made.error("there")
    finally:
        root.setLevel(level)
    assert _read(tmp_path / "client.log") == (["there"], True)
