"""Processes of one machine that work together: started with nothing that they do not need, kept up, ended in order.

A deployment has parts that must not share memory, because they may not see the same things: the relay and the server
application, the courier and the worker (guarantee G15). Each part is a process. What starts them hands down a short
list of environment variables and no open file, so that no secret of the one leaks into the other that way.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

from privacy.errors import RunError, TacitError
from privacy.files import write_whole
from privacy.vault import private

# What a process needs of the environment; passphrases and tokens in it are nobody's business but ours.
_ENVIRONMENT: Final = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "SSL_CERT_DIR"),
    # How many cores torch takes: who shares a machine with others says so there.
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS"),
    # Which GPUs it takes, and where a driver's libraries lie that are not in the usual folders.
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LD_LIBRARY_PATH"),
)
_QUIET: Final = {
    # Flower tells its maker about every start otherwise.
    "FLWR_TELEMETRY_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}
# What a part gets to be ready: a worker reads all its data first, and a machine may be busy.
_START_S: Final = 600.0
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0
# A process that ran so long was well: the next failure is a new one.
_WELL_S: Final = 60.0
_TICK_S: Final = 0.1
# Of a log that has grown for months, only the end says how a process ended.
_TAIL_BYTES: Final = 4096
_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None
# What a part gets where somebody asked twice.
_HURRIED_S: Final = 10.0
# A log that is longer becomes NAME.log.1, in place of the one before.
MOST_LOG_BYTES: Final = 8 * 1024 * 1024
_LOG_LOOK_S: Final = 5.0

_ESCAPE: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

_log = logging.getLogger("tacit.processes")


def _leave_with_parent() -> None:
    """Lets the kernel end a child whose parent was killed: nobody would look after it, and a new one could not start.

    Runs in the child between fork and exec.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PDEATHSIG, signal.SIGTERM)


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
        opened: Private files among its arguments, which may be sealed: it gets each opened, in memory, under another
            name, because it reads keys in clear from files only.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ready: Callable[[], bool] | None = None
    grace_s: float = 10.0
    takes_along: tuple[str, ...] = ()
    opened: tuple[Path, ...] = ()


def shorten(path: Path, most_bytes: int = MOST_LOG_BYTES) -> bool:
    """Puts a log that is too long aside as ``NAME.1`` and begins it anew; a full disk changes nothing.

    The process that writes it keeps it open, for appending: it goes on at the new beginning. What it writes in the
    moment between the two is lost.

    Returns:
        Whether it was too long.
    """
    try:
        if path.stat().st_size <= most_bytes:
            return False
        older = path.with_name(f"{path.name}.1")
        with open(path, "rb") as log, open(os.open(older, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            shutil.copyfileobj(log, file)
        os.truncate(path, 0)
    except OSError as error:
        _log.warning("the log %s could not be begun anew: %s", path.name, error.strerror)
        return False
    return True


def tail(path: Path, lines: int) -> list[str]:
    """Returns the last lines of a log, as a person can read them; none where there is no log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - lines * 400))
            content = file.read()
    except OSError:
        return []
    # No colours, and nothing that could move a terminal's cursor: some of it was said by others.
    text = _ESCAPE.sub("", content.decode(errors="replace"))
    return ["".join(c for c in line if c.isprintable() or c == "\t") for line in text.splitlines()[-lines:]]


def environment_of(part: Part) -> dict[str, str]:
    """Returns what a part gets of our environment, and its own variables."""
    common = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return common | _QUIET | dict(part.environment)


@contextlib.contextmanager
def _with_opened(part: Part) -> Iterator[tuple[list[str], list[int]]]:
    """Opens a part's private files; yields its command with their new names, and the descriptors that it must inherit.

    Raises:
        RunError: One cannot be read.
        VaultError: One is sealed, and does not open.
    """
    command, descriptors = list(part.command), []
    with contextlib.ExitStack() as stack:
        for path in part.opened:
            try:
                descriptor = stack.enter_context(private.anonymous(private.read(path)))
            except OSError as error:
                raise RunError(f"expected a private file at {path}, got: {error.strerror}; start it again") from None
            descriptors.append(descriptor)
            command = [f"/proc/self/fd/{descriptor}" if word == str(path) else word for word in command]
        yield command, descriptors


def become(part: Part) -> NoReturn:
    """Turns this process into a part, for whoever keeps parts up by other means than `Processes`.

    Raises:
        RunError: Its program is not there, or a private file of it.
        VaultError: A private file of it does not open.
    """
    try:
        with _with_opened(part) as (command, descriptors):
            for descriptor in descriptors:
                os.set_inheritable(descriptor, True)
            os.execve(command[0], command, environment_of(part))  # noqa: S606 -- our own commands
    except OSError as error:
        raise RunError(f"expected to run {part.command[0]}, got: {error.strerror}; install Tacit again") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chore:
    """Something to do every so often while the parts run, such as renewing a certificate.

    Attributes:
        name: What it is called in the status and in the log.
        do: Does it, or finds that it is not due. What it raises is logged, and it is tried again.
        every_s: Seconds between two times.
        again_s: Seconds until it is tried again after a failure.
    """

    name: str
    do: Callable[[], object]
    every_s: float = 3600.0
    again_s: float = 300.0


class Chores:
    """Does chores when they are due; a failure is logged and tried again, and never ends anything."""

    def __init__(self, chores: Sequence[Chore], clock: Callable[[], float] = time.monotonic) -> None:
        """Makes the first time of each one its ``every_s`` from now.

        Args:
            chores: What to do.
            clock: Seconds by a clock that never goes back.
        """
        self._chores, self._clock = list(chores), clock
        self._due = {chore.name: clock() + chore.every_s for chore in chores}
        self.faults: dict[str, str] = {}
        """What kept a chore from being done the last time, by name; those that were done have none."""

    def look(self) -> bool:
        """Does what is due; returns whether a fault came or went."""
        before = dict(self.faults)
        for chore in self._chores:
            if self._clock() < self._due[chore.name]:
                continue
            try:
                chore.do()
            except Exception as error:
                self.faults[chore.name] = str(error)[:500] or type(error).__name__
                _log.exception("%s failed; it is tried again in %g s", chore.name, chore.again_s)
                self._due[chore.name] = self._clock() + chore.again_s
            else:
                if self.faults.pop(chore.name, None) is not None:
                    _log.info("%s is done at last", chore.name)
                self._due[chore.name] = self._clock() + chore.every_s
        return self.faults != before


class Processes:
    """Keeps parts running until it is told to stop, and says in a file how they are.

    A part that ends is started again, after a pause that doubles with every failure. The status file says for each
    part: its process id, since when it runs, how often it was started again, and how it ended last. It holds a lock
    while it lives, so that no process id of an earlier start is ever taken for it.

    Asked to stop, it gives each part the time that the part needs to finish what it is at; asked twice, ten seconds.
    """

    def __init__(self, parts: Sequence[Part], *, logs: Path, status: Path, chores: Sequence[Chore] = ()) -> None:
        """Prepares the parts, in the order in which they are started; they are ended in the reverse order.

        Args:
            parts: What to run.
            logs: Folder of the logs, one ``NAME.log`` for each part, mode 0600.
            status: File that says how they are.
            chores: What to do every so often meanwhile, in a thread of its own: one that waits for an answer over the
                network must not keep a part from being started again.
        """
        self._chores = Chores(chores)
        self._parts, self._logs, self._status = list(parts), logs, status
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._began: dict[str, float] = {}
        self._restarts = dict.fromkeys((part.name for part in parts), 0)
        self._ended: dict[str, str] = {}
        self._due: dict[str, float] = {}
        self._pauses = dict.fromkeys((part.name for part in parts), _FIRST_PAUSE_S)
        self._stop, self._hurry = threading.Event(), threading.Event()
        self._lock = -1

    @property
    def restarts(self) -> Mapping[str, int]:
        """How often each part was started again, by its name."""
        return dict(self._restarts)

    @property
    def running(self) -> Mapping[str, bool]:
        """Which parts run, by their names."""
        return {name: child.poll() is None for name, child in dict(self._children).items()}

    @property
    def faults(self) -> Mapping[str, str]:
        """What kept chores from being done the last time, by their names."""
        return dict(self._chores.faults)

    def stop(self) -> None:
        """Asks the parts to end; `run` returns when they have. Asked again, they get ten seconds at most."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def start(self, patience_s: float = _START_S) -> None:
        """Starts all parts, each when the one before is ready.

        From here on SIGTERM and SIGINT end them in order, where this is the main thread.

        Raises:
            RunError: A part cannot be started, ended at once, or is not ready in time, or they run here already; the
                others are ended.
            KeyboardInterrupt: It was told to stop; what had begun is ended.
        """
        self._take()
        try:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, lambda *_: self.stop())
            for part in self._parts:
                self._spawn(part)
                self._await(part, patience_s)
            self._tell()
        except BaseException:
            self.end()
            raise

    def run(self) -> None:
        """Keeps the parts up until `stop`, SIGTERM or SIGINT; then ends them."""
        threading.Thread(target=self._do_chores, daemon=True).start()
        faults: Mapping[str, str] = {}
        try:
            looked = time.monotonic()
            while not self._stop.wait(_TICK_S):
                if time.monotonic() - looked >= _LOG_LOOK_S:
                    looked = time.monotonic()
                    for part in self._parts:
                        shorten(self._logs / f"{part.name}.log")
                if self._look_after() or self._chores.faults != faults:
                    faults = dict(self._chores.faults)
                    # A full disk is no reason to end what runs; the next change is told.
                    with contextlib.suppress(RunError):
                        self._tell()
        finally:
            self.end()

    def _do_chores(self) -> None:
        while not self._stop.wait(_TICK_S):
            self._chores.look()

    def _take(self) -> None:
        self._logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._status.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(_lock_of(self._status), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # Whoever only looks holds it for a moment.
        for _ in range(20):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._lock = lock
                return
            time.sleep(0.05)
        os.close(lock)
        raise RunError(f"expected nobody to run {self._status.parent} yet, got somebody; stop them first")

    def _spawn(self, part: Part) -> None:
        self._began[part.name] = time.time()
        try:
            self._logs.mkdir(parents=True, exist_ok=True, mode=0o700)
            log = open(os.open(self._logs / f"{part.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
            with log, _with_opened(part) as (command, descriptors):
                self._children[part.name] = subprocess.Popen(  # noqa: S603 -- our own commands
                    command,
                    env=environment_of(part),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=descriptors,
                    # A Ctrl-C in the terminal is ours to hand on, in order.
                    start_new_session=True,
                    # No thread of ours holds a lock that this one call would take.
                    preexec_fn=_leave_with_parent,
                )
        except OSError as error:
            raise RunError(f"expected to start {part.name} ({part.command[0]}), got: {error.strerror}") from None

    def _await(self, part: Part, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while True:
            if (code := self._children[part.name].poll()) is not None:
                raise RunError(f"expected {part.name} to run, it ended with {code}; its log: {self._log_tail(part)}")
            if part.ready is None or part.ready():
                return
            if self._stop.is_set():
                raise KeyboardInterrupt
            if time.monotonic() > deadline:
                raise RunError(
                    f"expected {part.name} to be ready within {patience_s:g} s; its log: {self._log_tail(part)}"
                )
            time.sleep(0.05)

    def _log_tail(self, part: Part) -> str:
        try:
            with (self._logs / f"{part.name}.log").open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = log.read(_TAIL_BYTES).decode(errors="replace").strip().splitlines()
        except OSError:
            lines = []
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
                self._restarts[part.name] += 1
                try:
                    self._spawn(part)
                    del self._due[part.name]
                except TacitError as error:
                    # No memory, or a program that is being upgraded: the others run on, and it is tried again.
                    self._due[part.name] = now + self._pauses[part.name]
                    self._pauses[part.name] = min(_LONGEST_PAUSE_S, 2 * self._pauses[part.name])
                    self._ended[part.name] = str(error)
                changed = True
        return changed

    def end(self) -> None:
        """Ends all parts, the last one first; one that does not end in its grace is killed."""
        for part in reversed(self._parts):
            child = self._children.get(part.name)
            if child is None or child.poll() is not None:
                continue
            child.terminate()
            began = time.monotonic()
            while child.poll() is None:
                waited = time.monotonic() - began
                if waited > (min(_HURRIED_S, part.grace_s) if self._hurry.is_set() else part.grace_s):
                    child.kill()
                    child.wait()
                    break
                time.sleep(0.02)
        self._children = {name: child for name, child in self._children.items() if child.poll() is None}
        self._status.unlink(missing_ok=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

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
        whole = {"pid": os.getpid(), "parts": told, "faults": dict(self._chores.faults)}
        write_whole(self._status, json.dumps(whole, indent=2).encode(), durable=False)


def _lock_of(status: Path) -> Path:
    return status.with_suffix(".lock")


def _is_held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def read_status(path: Path) -> dict[str, object] | None:
    """Returns what a status file says, or None where nothing runs: no file, or whoever wrote it is gone.

    A process id alone would not do: after a crash or a restart of the machine it can be somebody else's, and whoever
    is told to end it would end that.

    Raises:
        RunError: The file holds something else.
    """
    try:
        told: dict[str, object] = json.loads(path.read_bytes())
        if not isinstance(told["pid"], int) or told["pid"] <= 1 or not isinstance(told["parts"], dict):
            raise TypeError("no status")
        return told if _is_held(_lock_of(path)) else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError):
        raise RunError(f"expected a status in {path}, got something else; remove it and start again") from None
