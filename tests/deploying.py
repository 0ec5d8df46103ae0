"""A federation of real processes: a server's machine, data holders' machines, and the server application."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]
LOOPBACK = "127.0.0.1"
# Seconds; the machine may be shared, and a job of many rounds takes minutes there.
PATIENCE_S = 240.0
JOB_S = 1200.0


def environment() -> dict[str, str]:
    """Returns what every process here gets."""
    return {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def free_ports(count: int) -> list[int]:
    """Returns ports of loopback that nobody uses."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def until(holds: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> float:
    """Waits until something holds; returns how long that took, in seconds."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < patience_s, f"not within {patience_s:g} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - began


class Client:
    """A data holder's machine.

    Attributes:
        name: Under which it was invited.
        home: Its folder.
    """

    def __init__(self, federation: Federation, name: str) -> None:
        self._federation, self.name, self.home = federation, name, federation.folder / name
        self.process: subprocess.Popen[str] | None = None

    def tell(self, *arguments: object) -> dict[str, Any]:
        """Runs a verb of ``tacit client`` here."""
        where = () if arguments[0] == "join" and "--home" in arguments else ("--home", self.home)
        return self._federation.tell("client", *arguments, *where, at=self.name)

    def join(self, *words: object) -> None:
        """Redeems an invitation and accepts the task's jobs unasked."""
        token = self._federation.tell("server", "invite", self.name, "--home", self._federation.home)["token"]
        task = self._federation.task
        # Names of data sets differ, because test sources draw from them.
        self.tell("join", token, "--task", task, "--data-set", self.name, *words)
        self.tell("policy", "--accept", task, "--epsilon", 1000)

    def begin(self) -> None:
        """Starts its processes; `ready` waits for them."""
        seeded = [sys.executable, "-m", "tests.apps.seeded_client", str(self.home)]
        plain = self._federation.command("client", "start", "--home", self.home, "--json")
        self.process = self._federation.spawn(seeded if self._federation.seeded else plain, at=self.name)

    def ready(self) -> None:
        """Waits until its processes serve."""
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()
        assert json.loads(line)["started"]

    @property
    def pids(self) -> dict[str, int]:
        """The processes of this machine, by name."""
        return pids_of(self.home / "run" / "status.json")

    def vanish(self) -> None:
        """Kills everything here at once, as a power cut does."""
        assert self.process is not None
        pids = self.pids
        self.process.kill()
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()
        self.process = None

    def charges(self, job: str = "") -> Counter[int]:
        """Returns how often each round of a job was charged, as the ledger's file says."""
        lines = (self.home / "ledger" / "ledger.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return Counter(
            entry["body"]["round"]
            for entry in entries
            if entry["kind"] == "charge" and job in ("", entry["body"]["job"])
        )

    def log(self, part: str) -> str:
        """Returns the end of a part's log."""
        return (self.home / "logs" / f"{part}.log").read_text(errors="replace")[-3000:]


def pids_of(status: Path) -> dict[str, int]:
    """Returns the process ids in a status file, those of parts that run."""
    parts = json.loads(status.read_bytes())["parts"]
    return {name: int(part["pid"]) for name, part in parts.items() if part["running"]}


class Federation:
    """Everything, in one folder; a context that ends every process that it started."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str] = ("clinic-1", "clinic-2"),
        *,
        task: str = "digits",
        seeded: bool = False,
        host: str = LOOPBACK,
        at: Callable[[str], Sequence[str]] = lambda machine: (),
    ) -> None:
        """Prepares.

        Args:
            folder: Where the homes lie.
            names: Of the clients.
            task: What is learned.
            seeded: Whether workers draw reproducible noise.
            host: The server's address.
            at: Words to put before a command that is to run on a machine: "server", or a client's name.
        """
        self.folder, self.home, self.task, self.seeded = folder, folder / "server", task, seeded
        self.host, self._at = host, at
        self.clients = [Client(self, name) for name in names]
        self.server: subprocess.Popen[str] | None = None
        self._started: list[subprocess.Popen[str]] = []

    def command(self, *arguments: object) -> list[str]:
        """Returns a command line of ours."""
        return [sys.executable, "-m", "tacit", *map(str, arguments)]

    def spawn(self, command: Sequence[str], *, at: str = "server") -> subprocess.Popen[str]:
        """Starts a process on a machine."""
        with (self.folder / f"{at}-{len(self._started)}.err").open("w") as errors:
            process = subprocess.Popen(
                [*self._at(at), *command],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(),
                cwd=ROOT,
            )
        self._started.append(process)
        return process

    def tell(self, *arguments: object, at: str = "server") -> dict[str, Any]:
        """Runs a command to its end; returns its JSON."""
        done = subprocess.run(
            [*self._at(at), *self.command(*arguments, "--json")],
            capture_output=True,
            text=True,
            env=environment(),
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads(done.stdout))

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        gateway, enrol = (29443, 29444) if self.host != LOOPBACK else free_ports(2)
        address = f"{self.host}:{gateway}"
        where = ("--home", self.home, "--name", "demo", "--address", address, "--enrol-port", enrol)
        self.tell("server", "init", *where)
        self.begin()
        return self

    def begin(self) -> None:
        """Starts the server's machine and waits until it serves."""
        self.server = self.spawn(self.command("server", "start", "--home", self.home, "--json"))
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, self.server.communicate()
        assert json.loads(line)["started"]

    def start_clients(self) -> None:
        """Starts all clients, and waits for them."""
        for client in self.clients:
            client.begin()
        for client in self.clients:
            client.ready()

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._started):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self._started:
            try:
                process.communicate(timeout=90)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        for status in self.folder.glob("*/**/status.json"):
            if status.parent.name == "run" or status.parent == self.home:
                for pid in pids_of(status).values():
                    self._kill_ours(pid)

    def _kill_ours(self, pid: int) -> None:
        """Kills a process that an old status names, if it is still the one that was meant."""
        with contextlib.suppress(OSError):
            if str(self.folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    @property
    def pids(self) -> dict[str, int]:
        """The processes of the server's machine, by name."""
        return pids_of(self.home / "status.json")

    def run(self, name: str, *words: object, resume: bool = False) -> subprocess.Popen[str]:
        """Starts the server application with a job, or goes on with it."""
        folder = self.folder / name
        job = ("--resume", folder) if resume else ("--task", self.task, "--out", folder)
        where = ("--home", self.home, "--wait", "4m", "--json")
        return self.spawn(self.command("server", "run", *job, *words, *where))

    def finished(self, run: subprocess.Popen[str], *, code: int = 0, patience_s: float = JOB_S) -> dict[str, Any]:
        """Waits for the end of a job; returns its summary."""
        told, _ = run.communicate(timeout=patience_s)
        assert run.returncode == code, (told, self.log())
        return dict(json.loads(told)) if told.strip() else {}

    def rounds(self, name: str) -> list[dict[str, Any]]:
        """Returns the rounds of a job that are over."""
        path = self.folder / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def await_rounds(self, name: str, count: int, patience_s: float = PATIENCE_S) -> float:
        """Waits until so many rounds are over; returns how long, in seconds."""
        return until(lambda: len(self.rounds(name)) >= count, f"round {count} of {name}: {self.log()}", patience_s)

    def job_of(self, name: str) -> str:
        """Returns a job's identity."""
        return str(json.loads((self.folder / name / "job.json").read_bytes())["id"])

    def log(self) -> str:
        """Returns the ends of all standard errors."""
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.err")))
