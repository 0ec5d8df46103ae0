"""Many signatures at once: an Ed25519 check takes a tenth of a millisecond, and a long run has 100,000 receipts.

Where there are enough of them and more than one core, processes check them while the caller goes on reading. What is
found does not depend on how many there are, nor on whether any could be started: whatever they do not answer, the
caller checks itself. Nothing secret is handed to them, and their answer is about public values alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeAlias

from privacy.errors import LedgerError
from privacy.identity import verify

Signed: TypeAlias = tuple[str, bytes, str]
"""A public key (64 hex digits), what was signed, and the signature (128 hex digits)."""

# A process is ready after a third of a second, which is what 3,000 signatures take to check.
_WORTH: Final = 8000
_CHUNK: Final = 500
_MOST_PROCESSES: Final = 8
_PROGRAM: Final = "from privacy.identity.many import answer; answer()"


def first_unsigned(signed: Iterable[Signed]) -> int | None:
    """Checks signatures.

    Args:
        signed: Any number of them; they are taken as they are needed, and an error that this raises goes through.

    Guarantees:
        Complete: each one before the place that is returned was checked by `privacy.identity.verify`, and held.

    Returns:
        The place of the first one, from 0, that is not of its key over its message; None where all are.
    """
    items = iter(signed)
    start = list(itertools.islice(items, _WORTH))
    everything, processes = itertools.chain(start, items), _processes()
    if len(start) < _WORTH or processes < 2:
        return _first(everything)
    return _first_by_many(everything, processes)


def _first(signed: Iterable[Signed]) -> int | None:
    for place, one in enumerate(signed):
        try:
            verify(*one)
        except LedgerError:
            return place
    return None


def _first_by_many(signed: Iterator[Signed], processes: int) -> int | None:
    crew = _Crew(processes)
    waiting: deque[tuple[list[Signed], Future[int | None]]] = deque()
    done = 0
    try:
        while True:
            # So many chunks are under way that no process waits, and not so many that they fill the memory.
            while len(waiting) < 4 * processes and (chunk := list(itertools.islice(signed, _CHUNK))):
                waiting.append((chunk, crew.ask(chunk)))
            if not waiting:
                return None
            chunk, answered = waiting.popleft()
            try:
                place = answered.result()
            except (OSError, ValueError):
                place = _first(chunk)
            if place is not None:
                return done + place
            done += len(chunk)
    finally:
        crew.end()


class _Crew:
    """Processes that check signatures, each with a thread that speaks with it."""

    def __init__(self, processes: int) -> None:
        self._threads = ThreadPoolExecutor(processes)
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        self._started: list[subprocess.Popen[bytes]] = []
        for _ in range(processes):
            self._idle.put(None)

    def ask(self, chunk: Sequence[Signed]) -> Future[int | None]:
        """Has a chunk checked; the result raises OSError or ValueError where no process answered."""
        return self._threads.submit(self._asked, chunk)

    def _asked(self, chunk: Sequence[Signed]) -> int | None:
        process = self._idle.get()
        try:
            if process is None:
                process = self._start()
            if process.stdin is None or process.stdout is None:
                raise OSError("no pipes")
            question = [(key, message.decode("latin-1"), signature) for key, message, signature in chunk]
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            place = int(process.stdout.readline())
            if not -1 <= place < len(chunk):
                raise ValueError("not the place of one of them")
            return None if place < 0 else place
        finally:
            self._idle.put(process)

    def _start(self) -> subprocess.Popen[bytes]:
        # The same places as here, and none of its own: the folder that is worked in may hold anybody's files.
        places = os.pathsep.join(place for place in sys.path if place)
        process = subprocess.Popen(  # noqa: S603 -- this interpreter, with a constant program
            [sys.executable, "-P", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": places},
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        """Ends the processes, whatever they are at."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._started:
            process.kill()
        # A thread may be in the middle of a start.
        self._threads.shutdown(wait=True)
        for process in self._started:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    # What was not written yet is nobody's business any more.
                    with contextlib.suppress(OSError):
                        pipe.close()


def answer() -> None:
    """The life of one of the processes: a chunk a line, and for each the first place that does not hold, or -1."""
    for line in sys.stdin.buffer:
        place = _first((key, message.encode("latin-1"), signature) for key, message, signature in json.loads(line))
        print(-1 if place is None else place, flush=True)


def _processes() -> int:
    """Returns how many processes are worth starting: one for each core that this one may use."""
    return min(len(os.sched_getaffinity(0)), _MOST_PROCESSES) if sys.executable else 1
