"""Many signatures at once: an Ed25519 check takes a tenth of a millisecond, and a long run has 100,000 receipts.

Where there are enough of them and more than one core, processes check them while the caller goes on reading. What is
found does not depend on how many there are, nor on whether any could be started: whatever they do not answer, the
caller checks itself. No secret is handed to them; one that must sign anew is told the key file and reads it itself.
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeAlias

from privacy.errors import LedgerError
from privacy.identity import Identity, Secret, verify

Signed: TypeAlias = tuple[str, bytes, str]
"""A public key (64 hex digits), what was signed, and the signature (128 hex digits)."""

# A process is ready after a third of a second, which is what 3,000 signatures take to check.
_WORTH: Final = 8000
# Signing takes a third of checking.
_WORTH_SIGNING: Final = 3 * _WORTH
_CHUNK: Final = 500
_MOST_PROCESSES: Final = 8
# A chunk takes a twentieth of a second; whoever needs longer than this hangs.
_PATIENCE_S: Final = 60.0


def first_unsigned(signed: Iterable[Signed]) -> int | None:
    """Checks signatures.

    Args:
        signed: Any number of them; they are taken as they are needed, and an error that this raises goes through.

    Guarantees:
        Complete: each one before the place that is returned was checked by `privacy.identity.verify`, and held.

    Returns:
        The place of the first one, from 0, that is not of its key over its message; None where all are.
    """
    return _first_of_many(signed, _is_signed, "from privacy.identity.many import answer; answer()", _WORTH)


def first_signed_otherwise(
    signed: Iterable[Signed], identity: Identity, key_file: Path | None = None, name: str = ""
) -> int | None:
    """Checks signatures of the caller's own by making them again, which is three times as fast.

    Ed25519 signs the same bytes the same way always (RFC 8032), so an own signature comes out the same or is none.

    Args:
        signed: As for `first_unsigned`.
        identity: Who signed them all.
        key_file: Where the secret lies from which the identity is derived, for other processes to read; None where
            there is no such file, and this process signs them all.
        name: Under which it is derived.

    Returns:
        The place of the first one, from 0, that the identity would sign otherwise; None where there is none.
    """

    def same(one: Signed) -> bool:
        return _is_signed_by(identity, one)

    program = ""
    if key_file is not None and key_file.exists():
        program = f"from privacy.identity.many import answer_as; answer_as({str(key_file.resolve())!r}, {name!r})"
    return _first_of_many(signed, same, program, _WORTH_SIGNING)


def answer() -> None:
    """The life of a process that checks signatures: a chunk a line, for each the first place that fails, or -1."""
    _answer(_is_signed)


def answer_as(key_file: str, name: str) -> None:
    """The life of a process that makes an identity's signatures again."""
    identity = Secret.load_or_create(Path(key_file)).identity(name)
    _answer(lambda one: _is_signed_by(identity, one))


def _answer(holds: Callable[[Signed], bool]) -> None:
    # Whatever else prints in this process (a start-up file, a library) must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        number, signed = json.loads(line)
        chunk = [(key, message.encode("latin-1"), signature) for key, message, signature in signed]
        place = _first(chunk, holds)
        print(number, -1 if place is None else place, file=answers, flush=True)


def _is_signed(one: Signed) -> bool:
    try:
        verify(*one)
    except (LedgerError, TypeError):
        # Parsed JSON may hold anything where a key or a signature should be.
        return False
    return True


def _is_signed_by(identity: Identity, one: Signed) -> bool:
    key, message, signature = one
    return key == identity.public_key and identity.sign(message) == signature


def _first(signed: Iterable[Signed], holds: Callable[[Signed], bool]) -> int | None:
    return next((place for place, one in enumerate(signed) if not holds(one)), None)


def _first_of_many(signed: Iterable[Signed], holds: Callable[[Signed], bool], program: str, worth: int) -> int | None:
    """Returns the first place that does not hold, with the help of processes where there is a program for them."""
    items = iter(signed)
    start = list(itertools.islice(items, worth))
    everything, processes = itertools.chain(start, items), _processes()
    if len(start) < worth or processes < 2 or not program:
        return _first(everything, holds)
    crew = _Crew(processes, program)
    waiting: deque[tuple[list[Signed], Future[int | None]]] = deque()
    done = 0
    try:
        while True:
            # So many chunks are under way that no process waits, and not so many that they fill the memory.
            while len(waiting) < 4 * processes and (chunk := list(itertools.islice(everything, _CHUNK))):
                waiting.append((chunk, crew.ask(chunk)))
            if not waiting:
                return None
            chunk, answered = waiting.popleft()
            try:
                place = answered.result(_PATIENCE_S)
                wrong = place is not None and holds(chunk[place])
            except (OSError, ValueError):
                wrong = True
            if wrong:
                place = _first(chunk, holds)
            if place is not None:
                return done + place
            done += len(chunk)
    finally:
        crew.end()


class _Crew:
    """Processes that check signatures, each with a thread that speaks with it."""

    def __init__(self, processes: int, program: str) -> None:
        self._program = program
        self._threads = ThreadPoolExecutor(processes)
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        self._started: list[subprocess.Popen[bytes]] = []
        self._numbers = itertools.count(1)
        for _ in range(processes):
            self._idle.put(None)

    def ask(self, chunk: Sequence[Signed]) -> Future[int | None]:
        """Has a chunk checked; the result raises OSError or ValueError where no process answered."""
        try:
            return self._threads.submit(self._asked, chunk)
        except RuntimeError as error:
            # No thread could be started.
            nobody: Future[int | None] = Future()
            nobody.set_exception(OSError(str(error)))
            return nobody

    def _asked(self, chunk: Sequence[Signed]) -> int | None:
        process = self._idle.get()
        sound = False
        try:
            if process is None:
                process = self._start()
            if process.stdin is None or process.stdout is None:
                raise OSError("no pipes")
            question = [(key, message.decode("latin-1"), signature) for key, message, signature in chunk]
            number = next(self._numbers)
            process.stdin.write(json.dumps([number, question]).encode() + b"\n")
            process.stdin.flush()
            # The number says that this answers this question: an answer to an earlier one is nothing.
            answered, place = map(int, process.stdout.readline().split())
            if answered != number or not -1 <= place < len(chunk):
                raise ValueError("no answer to this question")
            sound = True
            return None if place < 0 else place
        finally:
            # One that failed once is out of step, and is asked no more.
            if process is not None and not sound:
                process.kill()
            self._idle.put(process if sound else None)

    def _start(self) -> subprocess.Popen[bytes]:
        # The same places as here, and none of its own: the folder that is worked in may hold anybody's files.
        places = os.pathsep.join(place for place in sys.path if place)
        process = subprocess.Popen(  # noqa: S603 -- this interpreter, with a program of our own
            [sys.executable, "-P", "-c", self._program],
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


def _processes() -> int:
    """Returns how many processes are worth starting: one for each core that this one may use."""
    return min(len(os.sched_getaffinity(0)), _MOST_PROCESSES) if sys.executable else 1
