"""What the supervisor does beside keeping parts up: chores by the clock, and an end that waits for work."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from pathlib import Path

import pytest

from privacy.errors import RunError
from privacy.processes import Chore, Chores, Part, Processes, read_status, shorten, tail


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_chore_is_done_every_so_often() -> None:
    clock, done = Clock(), []
    chores = Chores([Chore(name="one", do=lambda: done.append(clock.now), every_s=60)], clock)
    for clock.now in range(0, 200, 10):
        chores.look()
    assert done == [60, 120, 180]
    assert chores.faults == {}


def test_a_chore_that_fails_is_logged_tried_again_sooner_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    clock, tried = Clock(), []

    def do() -> None:
        tried.append(clock.now)
        if len(tried) < 3:
            raise RunError("expected a server, got none; start it")

    other: list[float] = []
    chores = Chores(
        [
            Chore(name="renewal", do=do, every_s=100, again_s=10),
            Chore(name="other", do=lambda: other.append(clock.now), every_s=100),
        ],
        clock,
    )
    changes = []
    with caplog.at_level(logging.INFO, "tacit.processes"):
        for clock.now in range(0, 300, 5):
            if chores.look():
                changes.append((clock.now, dict(chores.faults)))
    assert tried == [100, 110, 120, 220]
    assert other == [100, 200]
    assert changes == [(100, {"renewal": "expected a server, got none; start it"}), (120, {})]
    assert "renewal failed; it is tried again in 10 s" in caplog.text
    assert "renewal is done at last" in caplog.text


def started(tmp_path: Path, *parts: Part, chores: list[Chore]) -> tuple[Processes, threading.Thread]:
    processes = Processes(parts, logs=tmp_path / "logs", status=tmp_path / "status.json", chores=chores)
    processes.start()
    thread = threading.Thread(target=processes.run)
    thread.start()
    return processes, thread


def until(what: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


SLEEP = Part(name="sleeper", command=[sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_chore_that_hangs_keeps_no_part_from_its_restart_and_a_fault_is_in_the_status(tmp_path: Path) -> None:
    held = threading.Event()

    def fail() -> None:
        raise ValueError("no")

    chores = [
        Chore(name="fails", do=fail, every_s=0),
        Chore(name="hangs", do=lambda: held.wait(20), every_s=0),
    ]
    ends = Part(name="ends", command=[sys.executable, "-c", "import time; time.sleep(0.2)"])
    processes, thread = started(tmp_path, ends, chores=chores)
    try:
        until(lambda: processes.restarts["ends"] >= 1)
        until(lambda: json.loads((tmp_path / "status.json").read_bytes())["faults"] == {"fails": "no"})
    finally:
        held.set()
        processes.stop()
        thread.join(20)
    assert not thread.is_alive()
    assert read_status(tmp_path / "status.json") is None


# Ends by itself a while after it was told to, as a courier that waits for a round.
BUSY = """
import signal, time, sys, pathlib
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
pathlib.Path(sys.argv[1]).write_text("ready")
while not told: time.sleep(0.01)
time.sleep(float(sys.argv[2]))
pathlib.Path(sys.argv[1]).write_text("finished")
"""


def busy(tmp_path: Path, seconds: float, grace_s: float) -> Part:
    file = tmp_path / "file"
    command = [sys.executable, "-c", BUSY, str(file), str(seconds)]
    return Part(name="busy", command=command, ready=file.exists, grace_s=grace_s)


def test_the_round_that_is_on_is_finished_before_the_end(tmp_path: Path) -> None:
    processes, thread = started(tmp_path, SLEEP, busy(tmp_path, 1.0, 30.0), chores=[])
    processes.stop()
    thread.join(20)
    assert (tmp_path / "file").read_text() == "finished"


def test_a_part_that_takes_longer_than_its_grace_or_when_asked_twice_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privacy.processes._HURRIED_S", 0.2)
    for grace_s, twice in ((0.2, False), (60.0, True)):
        (tmp_path / "file").unlink(missing_ok=True)
        processes, thread = started(tmp_path, busy(tmp_path, 30.0, grace_s), chores=[])
        processes.stop()
        if twice:
            processes.stop()
        thread.join(10)
        assert not thread.is_alive()
        assert (tmp_path / "file").read_text() == "ready"


# -- logs --------------------------------------------------------------------------------------------------------------

WRITES = """
import sys, time
for number in range(400):
    print(f"line {number} " + 90 * "x", flush=True)
    time.sleep(0.005)
time.sleep(60)
"""


def test_a_log_that_grows_too_long_begins_anew_while_its_process_goes_on_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privacy.processes._LOG_LOOK_S", 0.1)
    monkeypatch.setattr("privacy.processes.shorten.__defaults__", (10_000,))
    processes, thread = started(tmp_path, Part(name="writer", command=[sys.executable, "-c", WRITES]), chores=[])
    log = tmp_path / "logs" / "writer.log"
    try:
        until(lambda: "line 399" in log.read_text(), 20)
        kept = sum(path.stat().st_size for path in log.parent.iterdir())
        assert kept < 40_000
        assert log.with_name("writer.log.1").stat().st_mode & 0o777 == 0o600
        # It goes on at the new beginning: no hole where the old lines were.
        assert b"\0" not in log.read_bytes()
    finally:
        processes.stop()
        thread.join(20)


def test_a_short_log_stays_and_a_tail_is_plain_text(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert not shorten(log)
    assert tail(log, 3) == []
    log.write_bytes(b"one\n\x1b[92mtwo\x1b[0m\nthr\x07ee\nfour\n")
    assert not shorten(log)
    assert tail(log, 3) == ["two", "three", "four"]
    assert shorten(log, 5)
    assert log.read_bytes() == b""
    assert b"four" in (tmp_path / "a.log.1").read_bytes()
