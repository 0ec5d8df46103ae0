"""Processes of one machine that work together: started with nothing that they do not need, kept up, ended in order.

A deployment has parts that must not share memory, because they may not see the same things: the relay and the server
application, the courier and the worker (guarantee G15). Each part is a process. What starts them hands down a short
list of environment variables and no open file, so that no secret of the one leaks into the other that way.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from privacy.errors import RunError
from privacy.files import write_whole

# What a process needs of the environment; passphrases and tokens in it are nobody's business but ours.
_ENVIRONMENT: Final = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "SSL_CERT_DIR"),
    # How many cores torch takes: who shares a machine with others says so there.
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS"),
)
_QUIET: Final = {
    # Flower tells its maker about every start otherwise.
    "FLWR_TELEMETRY_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0
# A process that ran so long was well: the next failure is a new one.
_WELL_S: Final = 60.0
_TICK_S: Final = 0.1
# prctl(2): the signal that a process gets when its parent has died.
_PR_SET_PDEATHSIG: Final = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One process.

    Attributes:
        name: What it is called in the status and in the name of its log.
        command: Program and arguments; no secret among them, because every user of the machine can read them.
        environment: Variables that it gets beside the common ones.
        ready: Says whether it serves; None where it is ready as soon as it runs.
        grace_s: Seconds that it gets to end by itself.
        takes_along: Names of parts that are of no use to anybody once this one has ended: they are ended, and started
            again, with it.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ready: Callable[[], bool] | None = None
    grace_s: float = 10.0
    takes_along: tuple[str, ...] = ()


def _linked() -> Callable[[], None] | None:
    """Returns what a new process does first, so that it does not outlive the one that looks after it; None off Linux.

    Nobody could end, or find, parts whose keeper was killed; and others could not be started in their place.
    """
    with contextlib.suppress(OSError, AttributeError):
        call = ctypes.CDLL(None).prctl

        def link() -> None:
            call(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

        return link
    return None


class Processes:
    """Keeps parts running until it is told to stop, and says in a file how they are.

    A part that ends is started again, after a pause that doubles with every failure. The status file says for each
    part: its process id, since when it runs, how often it was started again, and how it ended last.
    """

    def __init__(self, parts: Sequence[Part], *, logs: Path, status: Path) -> None:
        """Prepares the parts, in the order in which they are started; they are ended in the reverse order.

        Args:
            parts: What to run.
            logs: Folder of the logs, one ``NAME.log`` for each part, mode 0600.
            status: File that says how they are.
        """
        self._parts, self._logs, self._status = list(parts), logs, status
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._began: dict[str, float] = {}
        self._restarts = dict.fromkeys((part.name for part in parts), 0)
        self._ended: dict[str, str] = {}
        self._due: dict[str, float] = {}
        self._pauses = dict.fromkeys((part.name for part in parts), _FIRST_PAUSE_S)
        self._stop = threading.Event()
        self._link = _linked()

    def stop(self) -> None:
        """Asks the parts to end; `run` returns when they have."""
        self._stop.set()

    def start(self, patience_s: float = 60.0) -> None:
        """Starts all parts, each when the one before is ready.

        Raises:
            RunError: A part cannot be started, ended at once, or is not ready in time; the others are ended.
        """
        try:
            for part in self._parts:
                self._spawn(part)
                self._await(part, patience_s)
        except BaseException:
            self.end()
            raise
        self._tell()

    def run(self) -> None:
        """Keeps the parts up until `stop`, or SIGTERM or SIGINT where this is the main thread; then ends them."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self.stop())
        try:
            while not self._stop.wait(_TICK_S):
                if self._look_after():
                    self._tell()
        finally:
            self.end()

    def _spawn(self, part: Part) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with open(os.open(self._logs / f"{part.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)) as log:
                self._children[part.name] = subprocess.Popen(  # noqa: S603 -- our own commands
                    list(part.command),
                    env=environment | _QUIET | dict(part.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # A Ctrl-C in the terminal is ours to hand on, in order.
                    start_new_session=True,
                    # No thread of ours holds a lock that this one call would take.
                    preexec_fn=self._link,
                )
        except OSError as error:
            raise RunError(f"expected to start {part.name} ({part.command[0]}), got: {error.strerror}") from None
        self._began[part.name] = time.time()

    def _await(self, part: Part, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while True:
            if (code := self._children[part.name].poll()) is not None:
                raise RunError(f"expected {part.name} to run, it ended with {code}; its log: {self._log_tail(part)}")
            if part.ready is None or part.ready():
                return
            if time.monotonic() > deadline:
                raise RunError(
                    f"expected {part.name} to be ready within {patience_s:g} s; its log: {self._log_tail(part)}"
                )
            time.sleep(0.05)

    def _log_tail(self, part: Part) -> str:
        lines = (self._logs / f"{part.name}.log").read_text(errors="replace").strip().splitlines()
        return " / ".join(line.strip()[:200] for line in lines[-3:]) or "empty"

    def _look_after(self) -> bool:
        """Starts again what ended; returns whether anything changed."""
        changed, now = False, time.monotonic()
        for part in self._parts:
            code = self._children[part.name].poll()
            if code is None:
                continue
            if part.name not in self._due:
                if time.time() - self._began[part.name] > _WELL_S:
                    self._pauses[part.name] = _FIRST_PAUSE_S
                self._due[part.name] = now + self._pauses[part.name]
                self._pauses[part.name] = min(_LONGEST_PAUSE_S, 2 * self._pauses[part.name])
                self._ended[part.name] = f"ended with {code}: {self._log_tail(part)}"
                for name in part.takes_along:
                    # Killed: it waits for what will never come, and may not hear a kinder word.
                    if name not in self._due and self._children[name].poll() is None:
                        self._children[name].kill()
                        self._children[name].wait()
                changed = True
            elif now >= self._due[part.name]:
                del self._due[part.name]
                self._restarts[part.name] += 1
                self._spawn(part)
                changed = True
        return changed

    def end(self) -> None:
        """Ends all parts, the last one first; one that does not end in its grace is killed."""
        for part in reversed(self._parts):
            child = self._children.get(part.name)
            if child is None or child.poll() is not None:
                continue
            child.terminate()
            try:
                child.wait(part.grace_s)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children = {name: child for name, child in self._children.items() if child.poll() is None}
        self._status.unlink(missing_ok=True)

    def _tell(self) -> None:
        told = {
            part.name: {
                "pid": self._children[part.name].pid,
                "running": self._children[part.name].poll() is None,
                "since": int(self._began[part.name]),
                "restarts": self._restarts[part.name],
                "last_end": self._ended.get(part.name, ""),
            }
            for part in self._parts
        }
        write_whole(self._status, json.dumps({"pid": os.getpid(), "parts": told}, indent=2).encode(), durable=False)


def read_status(path: Path) -> dict[str, object] | None:
    """Returns what a status file says, or None where nothing runs: no file, or its process is gone.

    Raises:
        RunError: The file holds something else.
    """
    try:
        told: dict[str, object] = json.loads(path.read_bytes())
        os.kill(int(str(told["pid"])), 0)
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:
        pass
    except (ValueError, KeyError, TypeError, OSError):
        raise RunError(f"expected a status in {path}, got something else; remove it and start again") from None
    return told
