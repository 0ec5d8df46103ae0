"""The letter box between a courier and a worker: every frame that is not one is refused, and ends nothing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import stat
import threading
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clients import post
from clients.post import LOST, PIECES, Letter, answer_letter, hand_over, read_letter
from clients.worker import Doorway
from privacy.errors import RunError
from privacy.plan import canonical

BUNDLE = "b" * 64
LETTER = Letter(7, BUNDLE, {"message": b"m" * 1000, "wrap": b"", "broadcast": b"b" * 5000})


def framed(head: bytes, body: bytes = b"") -> bytes:
    return len(head).to_bytes(4, "big") + head + body


def frame_of(letter: Letter) -> bytes:
    head = canonical(
        {"run": letter.run, "bundle": letter.bundle, "pieces": [[n, len(p)] for n, p in letter.pieces.items()]}
    )
    return framed(head, b"".join(bytes(piece) for piece in letter.pieces.values()))


def head_of(**fields: Any) -> bytes:
    return json.dumps({"run": 7, "bundle": BUNDLE, "pieces": []} | fields).encode()


@contextmanager
def pair(patience_s: float = 0.2) -> Iterator[tuple[socket.socket, socket.socket]]:
    before = post._PATIENCE_S
    post._PATIENCE_S = patience_s  # type: ignore[misc]
    here, there = socket.socketpair()
    try:
        with here, there:
            yield here, there
    finally:
        post._PATIENCE_S = before  # type: ignore[misc]


def read(data: bytes, *, close: bool = True) -> Letter:
    with pair() as (here, there):
        here.sendall(data)
        if close:
            here.shutdown(socket.SHUT_WR)
        return read_letter(there)


def test_a_letter_arrives_as_it_was_written() -> None:
    assert read(frame_of(LETTER), close=False) == LETTER
    with pair() as (here, there):
        pieces = {name: os.urandom(number) for number, name in enumerate(sorted(PIECES))}
        writer = threading.Thread(target=answer_letter, args=(here, pieces))
        writer.start()
        assert post._read(there)[1] == pieces
        writer.join(5)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        framed(b""),
        framed(b"{}"),
        framed(b"[]"),
        framed(b"5"),
        framed(b"null"),
        framed(b"\xff\xfe"),
        framed(b"[" * 500),
        b"\xff\xff\xff\xff",
        framed(b" " * 513),
        framed(head_of(run=-1)),
        framed(head_of(run=2**64)),
        framed(head_of(run=True)),
        framed(head_of(run="7")),
        framed(head_of(run=None)),
        framed(head_of(bundle="B" * 64)),
        framed(head_of(bundle="b" * 63)),
        framed(head_of(bundle=BUNDLE + "\n")),
        framed(head_of(bundle=[BUNDLE])),
        framed(head_of(pieces=None)),
        framed(head_of(pieces=5)),
        framed(head_of(pieces={"message": 1})),
        framed(head_of(pieces=["message"])),
        framed(head_of(pieces=[["message"]])),
        framed(head_of(pieces=[["message", 1, 2]]), b"xx"),
        framed(head_of(pieces=[["secret", 1]]), b"x"),
        framed(head_of(pieces=[[["message"], 1]]), b"x"),
        framed(head_of(pieces=[[None, 1]]), b"x"),
        framed(head_of(pieces=[["message", -1]])),
        framed(head_of(pieces=[["message", True]]), b"x"),
        framed(head_of(pieces=[["message", 1.0]]), b"x"),
        framed(head_of(pieces=[["message", "1"]]), b"x"),
        framed(head_of(pieces=[["message", 1], ["message", 1]]), b"xx"),
        framed(head_of(pieces=[["message", 10**30]])),
        framed(head_of(pieces=[["message", post.MOST_BYTES], ["wrap", 1]])),
        framed(head_of(pieces=[["message", 2]]), b"x"),
        frame_of(LETTER)[:-1],
        frame_of(LETTER)[:100],
        frame_of(LETTER)[:3],
    ],
)
def test_what_is_no_letter_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, RecursionError)):
        read(data)


def test_a_half_written_letter_is_given_up_in_time() -> None:
    for data in (b"", b"\0", frame_of(LETTER)[:2000]):
        began = time.monotonic()
        with pytest.raises(OSError, match="timed out"):
            read(data, close=False)
        assert time.monotonic() - began < 5


def test_memory_grows_with_what_came_and_not_with_what_was_announced() -> None:
    def peak(sent: int) -> int:
        tracemalloc.start()
        try:
            with pair() as (here, there):

                def send() -> None:
                    here.sendall(framed(head_of(pieces=[["message", post.MOST_BYTES]])))
                    for _ in range(sent // 1024):
                        here.sendall(b"x" * 1024)
                    here.shutdown(socket.SHUT_WR)

                sender = threading.Thread(target=send)
                sender.start()
                with pytest.raises(ValueError, match="ends early"):
                    read_letter(there)
                sender.join(20)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(0) < 3 << 20
    assert peak(8 << 20) < 4 * (8 << 20)


def fuzzed(dice: random.Random) -> bytes:
    """Returns a frame with some faults in it, or bytes that never were one."""
    data = bytearray(frame_of(Letter(dice.randrange(2**63), BUNDLE, {"message": dice.randbytes(dice.randrange(40))})))
    match dice.randrange(5):
        case 0:
            return dice.randbytes(dice.randrange(80))
        case 1:
            return bytes(data[: dice.randrange(len(data))])
        case 2:
            return framed(dice.randbytes(dice.randrange(64)))
        case _:
            for _ in range(dice.randrange(1, 5)):
                data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_garbage_is_refused_or_is_a_letter_in_every_field(cases: int) -> None:
    dice = random.Random(5)
    for _ in range(cases):
        data = fuzzed(dice)
        try:
            letter = read(data)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        assert type(letter.run) is int
        assert 0 <= letter.run < 2**64
        assert len(letter.bundle) == 64
        assert set(letter.pieces) <= PIECES
        assert sum(map(len, letter.pieces.values())) <= len(data)


# -- the doorway ------------------------------------------------------------------------------------------------------


@contextmanager
def serving(path: Path, answer: Any, **options: Any) -> Iterator[Doorway]:
    stop = threading.Event()
    door = Doorway(path, **options)
    door._socket.settimeout(0.02)
    thread = threading.Thread(target=door.serve, args=(answer, stop.is_set))
    thread.start()
    try:
        yield door
    finally:
        stop.set()
        thread.join(30)
        door.close()
        assert not thread.is_alive()


def echo(letter: Letter) -> Mapping[str, Any]:
    return letter.pieces


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(post, "_PATIENCE_S", 0.2)
    return tmp_path / "run" / "worker.sock"


def test_the_worker_goes_on_whatever_is_handed_in(path: Path) -> None:
    dice = random.Random(6)
    with serving(path, echo):
        for _ in range(40):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
                channel.connect(str(path))
                with contextlib.suppress(ConnectionError):
                    channel.sendall(fuzzed(dice))
                    channel.shutdown(socket.SHUT_WR)
                    while channel.recv(4096):
                        pass
        # Nothing at all, and half a letter from somebody who stays.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as empty:
            empty.connect(str(path))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
            silent.connect(str(path))
            silent.sendall(frame_of(LETTER)[:200])
            assert hand_over(path, LETTER) == LETTER.pieces
    assert not path.exists()


def test_who_looks_in_while_a_round_is_answered_keeps_no_letter_out(path: Path) -> None:
    """Twin: with a line of eight that nobody looks after while it trains, the ninth caller is turned away."""
    begun, go_on = threading.Event(), threading.Event()

    def train(letter: Letter) -> Mapping[str, Any]:
        begun.set()
        assert go_on.wait(30)
        return letter.pieces

    def look() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(0.2)
            probe.connect(str(path))

    answers: list[Mapping[str, bytes]] = []
    with serving(path, train), contextlib.ExitStack() as stack:
        couriers = [threading.Thread(target=lambda: answers.append(hand_over(path, LETTER))) for _ in range(2)]
        couriers[0].start()
        assert begun.wait(10)
        for _ in range(300):
            look()
            time.sleep(0.001)
        # More who say nothing and stay than are heard at all.
        for _ in range(100):
            stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).connect(str(path))
        couriers[1].start()
        time.sleep(0.3)
        assert not answers
        go_on.set()
        for courier in couriers:
            courier.join(20)
    assert answers == [LETTER.pieces, LETTER.pieces]
    path.parent.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as alone:
        alone.bind(str(path))
        alone.listen(8)
        for _ in range(9):
            look()
        with pytest.raises(OSError, match=r"unavailable|timed out"):
            look()


def test_an_error_that_nobody_thought_of_does_not_end_the_doorway(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [MemoryError(), RecursionError(), UnicodeError(), AssertionError()]
    reading = post.read_letter

    def failing(channel: socket.socket) -> Letter:
        if errors:
            raise errors.pop()
        return reading(channel)

    monkeypatch.setattr("clients.worker.read_letter", failing)
    with serving(path, echo):
        for _ in range(4):
            with pytest.raises(RunError, match="expected an answer"):
                hand_over(path, LETTER)
        assert hand_over(path, LETTER) == LETTER.pieces


def test_a_courier_that_leaves_in_the_middle_ends_nothing(path: Path) -> None:
    with serving(path, lambda _: {"message": b"m" * (8 << 20)}):
        for _ in range(3):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
                channel.connect(str(path))
                channel.sendall(frame_of(LETTER))
        assert len(hand_over(path, LETTER)["message"]) == 8 << 20


@pytest.mark.parametrize(
    "answer",
    [b"", b"\0\0", framed(b"{}"), framed(b"[]"), framed(b'{"pieces":[["x",1]]}'), framed(b'{"pieces":[["lost",4]]}')],
)
def test_a_worker_that_answers_nonsense_is_one_error(path: Path, answer: bytes) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            channel, _ = listener.accept()
            with channel:
                read_letter(channel)
                channel.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(RunError, match="expected an answer from the worker"):
            hand_over(path, LETTER)
        thread.join(10)


def test_no_worker_and_a_slow_one_are_one_error_each(path: Path) -> None:
    with pytest.raises(RunError, match="start the worker"):
        hand_over(path, LETTER)

    def slow(letter: Letter) -> Mapping[str, Any]:
        time.sleep(0.5)
        return {LOST: b""}

    with serving(path, slow):
        with pytest.raises(RunError, match="timed out"):
            hand_over(path, LETTER, timeout_s=0.05)
        # Training may take as long as it takes.
        assert hand_over(path, LETTER) == {LOST: b""}


def test_g15_the_socket_is_for_this_user_alone_or_for_one_group_more(path: Path) -> None:
    with serving(path, echo):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    group = os.getgid()
    with serving(path, echo, group=group):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o660
        assert path.lstat().st_gid == group


def test_an_old_socket_is_replaced_and_nothing_else_is(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as old:
        old.bind(str(path))
    with serving(path, echo):
        assert hand_over(path, LETTER) == LETTER.pieces
    path.write_text("records")
    with pytest.raises(RunError, match="no socket"):
        Doorway(path)
    assert path.read_text() == "records"
    path.unlink()
    # A link, whatever it leads to: a socket of somebody else, a file, or nothing.
    (tmp_path / "file").write_text("records")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(tmp_path / "other.sock"))
        for target in ("other.sock", "file", "nothing"):
            path.symlink_to(tmp_path / target)
            with pytest.raises(RunError, match="no socket"):
                Doorway(path)
            path.unlink()
    path.mkdir()
    with pytest.raises(RunError, match="no socket"):
        Doorway(path)


def test_a_second_worker_is_refused_also_while_the_first_one_trains(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first:
        first.bind(str(path))
        first.listen(0)
        with pytest.raises(RunError, match="expected no worker"):
            Doorway(path)
        # Nobody takes what waits there, so that a connection is not even made.
        waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
        for one in waiting:
            one.setblocking(False)
            try:
                one.connect(str(path))
            except BlockingIOError:
                break
        began = time.monotonic()
        with pytest.raises(RunError, match="expected no worker"):
            Doorway(path)
        assert time.monotonic() - began < 10
        assert path.exists()
        for one in waiting:
            one.close()


def test_a_path_that_cannot_be_a_socket_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="too long"):
        Doorway(tmp_path / ("x" * 120) / "worker.sock")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="expected to make"):
        Doorway(tmp_path / "file" / "worker.sock")
