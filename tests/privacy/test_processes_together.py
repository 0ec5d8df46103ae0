"""Processes that work together: one that ends is started again, and takes along what is of no use without it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from privacy import processes
from privacy.processes import Part, Processes

KEEPER = """
import sys
from pathlib import Path
from privacy import processes
from privacy.processes import Part, Processes
if sys.argv[2] == "planted":
    processes._leave_with_parent = lambda: None
part = Part(name="worker", command=[sys.executable, "-c", "import time; time.sleep(60)"])
kept = Processes([part], logs=Path(sys.argv[1]) / "logs", status=Path(sys.argv[1]) / "status.json")
kept.start()
print("started", flush=True)
kept.run()
"""

SLEEP = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(processes, "_FIRST_PAUSE_S", 0.02)


def pids(status: Path) -> dict[str, int]:
    return {name: part["pid"] for name, part in json.loads(status.read_bytes())["parts"].items() if part["running"]}


def after_a_death(folder: Path, parts: list[Part], victim: str) -> tuple[dict[str, int], dict[str, int]]:
    """Kills one part; returns the processes before it and after."""
    status = folder / "status.json"
    kept = Processes(parts, logs=folder / "logs", status=status)
    kept.start()
    thread = threading.Thread(target=kept.run)
    thread.start()
    try:
        before = pids(status)
        os.kill(before[victim], signal.SIGKILL)
        deadline = time.monotonic() + 20
        while (after := pids(status)).get(victim, before[victim]) == before[victim] or len(after) < len(parts):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # Longer than it takes to start another one.
        time.sleep(0.3)
        return before, pids(status)
    finally:
        kept.stop()
        thread.join()


def test_a_part_that_is_of_no_use_alone_is_started_again_with_the_one_that_died(tmp_path):
    parts = [Part(name=name, command=SLEEP, grace_s=0.1) for name in ("worker", "supernode", "courier")]
    parts[2] = dataclasses.replace(parts[2], takes_along=("supernode",))
    before, after = after_a_death(tmp_path / "courier", parts, "courier")
    assert [after[name] == before[name] for name in before] == [True, False, False]
    # It is no bond of both: nobody else dies with a SuperNode.
    before, after = after_a_death(tmp_path / "supernode", parts, "supernode")
    assert [after[name] == before[name] for name in before] == [True, False, True]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is of Linux")
@pytest.mark.parametrize("way", ["as it is", "planted"])
def test_a_keeper_that_is_killed_leaves_no_part_behind_and_a_planted_one_without_the_link_does(tmp_path, way):
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, str(tmp_path), way], stdout=subprocess.PIPE)
    assert keeper.stdout is not None
    assert keeper.stdout.readline() == b"started\n"
    (pid,) = pids(tmp_path / "status.json").values()
    keeper.kill()
    keeper.communicate()
    deadline = time.monotonic() + (10 if way == "as it is" else 1)
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive(pid) == (way == "planted")
    if way == "planted":
        os.kill(pid, signal.SIGKILL)


def test_a_part_gets_the_choice_of_threads_and_no_secret_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TACIT_PASSPHRASE", "correct horse")
    said = tmp_path / "said"
    code = f"import os, time; open({str(said)!r}, 'w').write(repr(dict(os.environ)) + '.'); time.sleep(60)"
    kept = Processes(
        [Part(name="worker", command=[sys.executable, "-c", code], ready=lambda: said.exists())],
        logs=tmp_path / "logs",
        status=tmp_path / "status.json",
    )
    kept.start()
    while not said.read_text().endswith("."):
        time.sleep(0.01)
    kept.end()
    assert "'OMP_NUM_THREADS': '3'" in said.read_text()
    assert "correct horse" not in said.read_text()
