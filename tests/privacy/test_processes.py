"""Processes of one machine: kept up, ended in order, and with nothing of each other's."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from privacy import processes as module
from privacy.errors import RunError
from privacy.processes import Part, Processes, read_status

ROOT = Path(__file__).parents[2]
# Shells start in a few milliseconds, where Python takes a hundred.
SLEEP = ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done"]


def part(name: str, script: str = "", **fields: Any) -> Part:
    return Part(name=name, command=["/bin/sh", "-c", script] if script else SLEEP, **fields)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Puts back what a start did to the handlers of this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Fixture:
    """Parts that run while a test does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.status = folder, folder / "run" / "status.json"
        self.made: list[Processes] = []

    def make(self, *parts: Part) -> Processes:
        made = Processes(parts, logs=self.folder / "logs", status=self.status)
        self.made.append(made)
        return made

    def told(self) -> dict[str, Any]:
        found = read_status(self.status)
        assert found is not None
        return found  # type: ignore[return-value]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fixture]:
    monkeypatch.setattr(module, "_TICK_S", 0.01)
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.02)
    made = Fixture(tmp_path)
    yield made
    for one in made.made:
        one.stop()
        one.end()


def eventually(found: Callable[[], Any], seconds: float = 15) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def looked_after(processes: Processes) -> threading.Thread:
    thread = threading.Thread(target=processes.run)
    thread.start()
    return thread


def is_gone(pid: int) -> bool:
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True


# -- nothing leaks ----------------------------------------------------------------------------------------------------


def test_a_part_gets_what_says_which_gpu_it_takes_and_where_its_drivers_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "LD_LIBRARY_PATH": "/opt/cuda/lib64"}
    for name in gpu:
        monkeypatch.delenv(name, raising=False)
    # Not set is not the same as empty, which hides every GPU.
    assert not gpu.keys() & module.environment_of(part("worker")).keys()
    for name, value in (gpu | {"CUDA_PLANTED": "1"}).items():
        monkeypatch.setenv(name, value)
    given = module.environment_of(part("worker"))
    assert {name: given[name] for name in gpu} == gpu
    assert "CUDA_PLANTED" not in given


def test_g15_no_secret_of_the_environment_and_no_open_file_reaches_a_part(
    run: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TACIT_PASSPHRASE", "correct horse")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    monkeypatch.setenv("LD_PRELOAD", "")
    (tmp_path / "open").write_text("planted")
    descriptor = os.open(tmp_path / "open", os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    processes = run.make(part("alone"), part("given", environment={"TACIT_PASSPHRASE": "correct horse"}))
    try:
        processes.start()
        pids = {name: one["pid"] for name, one in run.told()["parts"].items()}

        def environment(name: str) -> str:
            return Path(f"/proc/{pids[name]}/environ").read_bytes().decode()

        for name in pids:
            assert "planted" not in environment(name)
            assert "LD_PRELOAD" not in environment(name)
            assert "FLWR_TELEMETRY_ENABLED=0" in environment(name)
            files = {os.readlink(f"/proc/{pids[name]}/fd/{number}") for number in (0, 1, 2)}
            assert files == {"/dev/null", str(tmp_path / "logs" / f"{name}.log")}
            every = [os.readlink(path) for path in Path(f"/proc/{pids[name]}/fd").iterdir()]
            assert str(tmp_path / "open") not in every
            assert not any(link.endswith(".lock") for link in every)
        assert "correct horse" not in environment("alone")
        # Twin: the same search finds what one part was meant to get.
        assert "correct horse" in environment("given")
    finally:
        os.close(descriptor)


def test_logs_and_status_are_for_this_user_alone(run: Fixture, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run.make(part("one", "echo something; exec sleep 60")).start()
    finally:
        os.umask(before)
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "logs" / "one.log", run.status, run.status.with_suffix(".lock")):
        assert path.stat().st_mode & 0o777 == 0o600


# -- kept up ----------------------------------------------------------------------------------------------------------


def test_a_part_that_ends_is_started_again_later_and_later(run: Fixture, tmp_path: Path) -> None:
    times = tmp_path / "times"
    processes = run.make(part("steady"), part("failing", f"date +%s.%N >> {times}; sleep 0.1; echo why; exit 3"))
    processes.start()
    steady = run.told()["parts"]["steady"]["pid"]
    thread = looked_after(processes)
    eventually(lambda: times.exists() and len(times.read_text().splitlines()) >= 5)
    told = eventually(lambda: (found := run.told()["parts"]["failing"])["restarts"] >= 4 and found)
    assert told["last_end"] == "ended with 3: why / why / why"
    processes.stop()
    thread.join(20)
    assert not thread.is_alive()
    moments = [float(line) for line in times.read_text().splitlines()]
    pauses = [later - earlier - 0.1 for earlier, later in itertools.pairwise(moments)]
    # 0.02, 0.04, 0.08, 0.16 at least; other processes can only make them longer.
    assert all(pause > 0.8 * 0.02 * 2**number for number, pause in enumerate(pauses))
    assert is_gone(steady)
    assert read_status(run.status) is None


def test_a_part_that_ran_well_begins_with_a_short_pause_again(run: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = run.make(part("one"))
    processes.start()
    processes._pauses["one"] = 30.0
    monkeypatch.setattr(module, "_WELL_S", 0.0)
    os.kill(run.told()["parts"]["one"]["pid"], signal.SIGKILL)
    eventually(lambda: processes._look_after())
    assert processes._pauses["one"] == pytest.approx(2 * 0.02)


def test_a_part_that_cannot_be_started_again_for_now_does_not_end_the_others(run: Fixture, tmp_path: Path) -> None:
    """A program that is being upgraded, or no memory for a moment."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    processes = run.make(part("steady"), Part(name="upgraded", command=[str(program)]))
    processes.start()
    before = run.told()["parts"]
    thread = looked_after(processes)
    program.rename(tmp_path / "away")
    os.kill(before["upgraded"]["pid"], signal.SIGKILL)
    eventually(lambda: "No such file" in run.told()["parts"]["upgraded"]["last_end"])
    assert thread.is_alive()
    assert run.told()["parts"]["steady"] == before["steady"]
    (tmp_path / "away").rename(program)
    eventually(lambda: run.told()["parts"]["upgraded"]["running"])
    processes.stop()
    thread.join(20)


def test_a_full_disk_and_a_lost_log_do_not_end_what_runs(run: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = run.make(part("steady"), part("failing", "sleep 0.05; exit 1"))
    processes.start()

    def full(*_: Any, **__: Any) -> None:
        raise RunError("expected to write, got: No space left on device")

    monkeypatch.setattr(module, "write_whole", full)
    for log in (run.folder / "logs").iterdir():
        log.unlink()
    thread = looked_after(processes)
    eventually(lambda: processes._restarts["failing"] >= 2)
    assert thread.is_alive()
    processes.stop()
    thread.join(20)


def test_of_a_log_that_has_grown_only_the_end_is_read(run: Fixture) -> None:
    (run.folder / "logs").mkdir()
    with (run.folder / "logs" / "one.log").open("wb") as log:
        log.truncate(1 << 32)
    with pytest.raises(RunError, match=r"its log: .*the reason"):
        run.make(part("one", "echo; echo the reason; exit 1", ready=lambda: False)).start()
    with (run.folder / "logs" / "one.log").open("wb"):
        pass


# -- ended ------------------------------------------------------------------------------------------------------------


def test_parts_end_in_the_reverse_order_and_one_that_does_not_is_killed(run: Fixture, tmp_path: Path) -> None:
    ends = tmp_path / "ends"
    said = f"trap 'echo $NAME >> {ends}; exit 0' TERM; while :; do sleep 0.02; done"
    parts = [part(name, said, environment={"NAME": name}) for name in ("first", "second", "third")]
    stubborn = part("stubborn", "trap '' TERM; while :; do sleep 0.02; done", grace_s=0.2)
    processes = run.make(*parts, stubborn)
    processes.start()
    time.sleep(0.3)  # The shells set their traps.
    pids = [one["pid"] for one in run.told()["parts"].values()]
    began = time.monotonic()
    processes.end()
    assert time.monotonic() - began < 10
    assert ends.read_text().split() == ["third", "second", "first"]
    assert all(map(is_gone, pids))
    assert read_status(run.status) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_start_that_is_interrupted_ends_what_it_began(run: Fixture, number: signal.Signals) -> None:
    pids = []

    def never() -> bool:
        if not pids:
            pids.extend(child.pid for child in processes._children.values())
            os.kill(os.getpid(), number)
        return False

    processes = run.make(part("one"), part("two", ready=never), part("three"))
    with pytest.raises(KeyboardInterrupt):
        processes.start()
    assert len(pids) == 2
    assert all(map(is_gone, pids))
    assert read_status(run.status) is None
    # The place is free again.
    run.make(part("one")).start()


def test_a_start_that_fails_says_why_and_ends_what_it_began(run: Fixture) -> None:
    cases = [
        (part("bad", "echo one; echo the reason; exit 7"), "ended with 7; its log: .*the reason"),
        (Part(name="bad", command=["/nowhere/program"]), "expected to start bad .*No such file"),
        (part("bad", ready=lambda: False), "ready within 0.2 s"),
    ]
    for bad, words in cases:
        processes = run.make(part("good", ready=lambda: len(processes._children) == 1), bad)  # noqa: B023
        bad_ready = bad.ready or (lambda: processes._children["bad"].wait(10) is None)  # noqa: B023
        processes._parts[1] = Part(name="bad", command=bad.command, ready=bad_ready)
        with pytest.raises(RunError, match=words):
            processes.start(patience_s=0.2)
        assert processes._children == {}
        assert read_status(run.status) is None


SUPERVISOR = """
import sys, time
from pathlib import Path
from privacy.processes import Part, Processes
folder = Path(sys.argv[1])
loop = "trap 'exit 0' TERM; while :; do sleep 0.05; done"
parts = [Part(name=name, command=["/bin/sh", "-c", loop]) for name in ("one", "two")]
made = Processes(parts, logs=folder / "logs", status=folder / "run" / "status.json")
made.start()
print("started", flush=True)
made.run()
"""


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    yield process
    process.kill()
    process.wait(20)
    process.stdout.close()


def test_what_a_killed_supervisor_started_ends_and_its_status_is_none(
    run: Fixture, supervisor: subprocess.Popen[str]
) -> None:
    told = run.told()
    assert told["pid"] == supervisor.pid
    pids = [one["pid"] for one in told["parts"].values()]
    with pytest.raises(RunError, match="expected nobody to run"):
        run.make(part("one")).start()
    assert not any(map(is_gone, pids))
    supervisor.kill()
    supervisor.wait(20)
    assert run.status.exists()
    assert read_status(run.status) is None
    eventually(lambda: all(map(is_gone, pids)))
    run.make(part("one")).start()


def test_a_supervisor_that_is_told_to_stop_ends_its_parts(run: Fixture, supervisor: subprocess.Popen[str]) -> None:
    pids = [one["pid"] for one in run.told()["parts"].values()]
    supervisor.terminate()
    assert supervisor.wait(20) == 0
    assert all(map(is_gone, pids))
    assert not run.status.exists()


# -- the status -------------------------------------------------------------------------------------------------------


def test_a_process_id_that_has_become_somebody_elses_is_not_taken_for_a_supervisor(run: Fixture) -> None:
    """Whoever is told to stop it would stop that one."""
    run.status.parent.mkdir()
    run.status.write_text(json.dumps({"pid": os.getpid(), "parts": {}}))
    assert read_status(run.status) is None
    # Twin: by its process id alone it would be there.
    os.kill(os.getpid(), 0)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"5", b"null", b"\xff", b"{}", b'{"pid": 5}', b'{"pid": "x", "parts": {}}']
    + [json.dumps({"pid": pid, "parts": {}}).encode() for pid in (0, -1, 1, None, 2.5)],
)
def test_a_damaged_status_is_one_sentence_and_never_a_process_to_end(run: Fixture, content: bytes) -> None:
    assert read_status(run.status) is None
    run.status.parent.mkdir()
    run.status.write_bytes(content)
    with pytest.raises(RunError, match="expected a status"):
        read_status(run.status)
