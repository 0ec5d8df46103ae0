"""The process that parses ciphertexts: it holds the heads, reads queries from strangers, and may die.

A homomorphic encryption library is a large piece of C++ that was written for friends. Whatever a hostile ciphertext
does to it happens here: in a process of its own, which is ended and started anew when it dies, hangs, grows or answers
at a length that no answer has. It is given no secret key, no name, no passphrase of our environment and no descriptor
but its pipes; its memory, its open files and the size of a file it writes are bounded.

It is not a sandbox. It runs as the service's own user, so that code which a ciphertext brought to run there could open
what that user may open, files and network alike. Who must rule that out runs the service as a user of its own under
the system's own limits.

    service -> evaluator     length | number of the head | ciphertexts
    evaluator -> service     status | microseconds | answer
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import resource
import struct
import sys
import time
from collections.abc import Sequence
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from privacy.errors import RunError

_ASKED: Final = struct.Struct(">IH")
_ANSWERED: Final = struct.Struct(">IBI")
_HEAD: Final = struct.Struct(">IIId")
_OK: Final = 0
_REFUSED: Final = 1
# The most that it may say about why it does not start.
_MOST_WORDS: Final = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """What an evaluator needs of a head.

    Attributes:
        plan: `privacy.he.HeadPlan`, as bytes.
        weights: Shape ``(c, d)``, float64.
        bias: Shape ``(c,)``, float64.
        feature_range: No feature is larger in absolute value.
    """

    plan: bytes
    weights: NDArray[np.float64]
    bias: NDArray[np.float64]
    feature_range: float

    def to_bytes(self) -> bytes:
        """Returns it for the pipe."""
        classes, features = self.weights.shape
        head = _HEAD.pack(len(self.plan), classes, features, self.feature_range)
        return head + self.plan + self.weights.astype("<f8").tobytes() + self.bias.astype("<f8").tobytes()

    @classmethod
    def parse(cls, data: bytes) -> Loaded:
        """Reads it; the pipe's other end is ours, so it is believed."""
        length, classes, features, feature_range = _HEAD.unpack_from(data)
        at = _HEAD.size + length
        numbers = np.frombuffer(data, dtype="<f8", offset=at).astype(np.float64)
        weights = numbers[: classes * features].reshape(classes, features)
        return cls(data[_HEAD.size : at], weights, numbers[classes * features :], feature_range)


class Evaluator:
    """One process that evaluates, started anew whenever it ended.

    Args:
        heads: What it evaluates, by number.
        memory_bytes: Most address space of the process.
        patience_s: Seconds that one query may take; a process that takes longer is ended.
        start_s: Seconds that a start may take.

    Raises:
        PlanError: A head's plan is none.
    """

    def __init__(
        self,
        heads: Sequence[Loaded],
        *,
        memory_bytes: int = 2 << 30,
        patience_s: float = 10.0,
        start_s: float = 60.0,
    ) -> None:
        from privacy.he import HeadPlan

        self._heads = [head.to_bytes() for head in heads]
        self._most = max(HeadPlan.from_bytes(head.plan).answer_bytes for head in heads)
        self._memory = memory_bytes
        self._patience, self._start_s = patience_s, start_s
        self._process: asyncio.subprocess.Process | None = None
        self._starting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._busy = asyncio.Lock()
        self._closed = False
        self.starts = 0
        """How often a process was started."""

    @property
    def ready(self) -> bool:
        """Whether it can be asked now."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """The process, or 0."""
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        """Starts the process and gives it the heads.

        Raises:
            RunError: It does not come up; the heads are not to its taking, or the memory is too small.
        """
        # Nothing of our environment but what finds our own packages: no keys, no passphrases.
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        environment |= {"PYTHONPATH": paths, "PATH": os.environ.get("PATH", ""), "TACIT_EVALUATOR": str(self._memory)}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "from server.evaluator import main; main()",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Whatever a library prints about a stranger's bytes fills nobody's log.
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            cwd="/",
        )
        self.starts += 1
        try:
            async with asyncio.timeout(self._start_s):
                # One write after the other: each ends when the process has taken it.
                words, status, _ = await _exchange(
                    process,
                    _MOST_WORDS,
                    _ASKED.pack(len(self._heads), 0),
                    *(_ASKED.pack(len(head), 0) + head for head in self._heads),
                )
        except (OSError, asyncio.IncompleteReadError):  # a time-out is an OSError
            await _end(process)
            raise RunError(
                "expected the evaluator to start, got none; give it more memory, and see that TenSEAL is installed"
            ) from None
        except BaseException:
            await _end(process)
            raise
        if status != _OK:
            await _end(process)
            raise RunError(f"expected heads that can be evaluated, got: {words.decode(errors='replace')[:500]}")
        self._process = process
        self._watching = asyncio.get_running_loop().create_task(self._watch(process))

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Starts another one as soon as this one has ended, whoever notices first."""
        await process.wait()
        await self._gone(process)

    async def _gone(self, process: asyncio.subprocess.Process) -> None:
        if self._process is process:
            self._process = None
            self._again()
        await _end(process)

    async def evaluate(self, head: int, ciphertexts: bytes) -> tuple[bytes, int] | None:
        """Evaluates one query; others wait meanwhile.

        Returns:
            The answer's ciphertexts and the microseconds that they took; None where the query holds no ciphertexts of
            the head's plan.

        Raises:
            RunError: The process died, hung or is not there; it is being started anew.
        """
        async with self._busy:
            process = self._process
            if process is None or process.returncode is not None:
                raise RunError("expected an evaluator, got one that is starting")
            try:
                async with asyncio.timeout(self._patience):
                    question = (_ASKED.pack(len(ciphertexts), head), ciphertexts)
                    answer, status, cost = await _exchange(process, self._most, *question)
            except (OSError, asyncio.IncompleteReadError):
                await self._gone(process)
                raise RunError("expected the evaluator to answer, got its end") from None
            except BaseException:
                # Cancelled in the middle: what it answers next would be this query's.
                await self._gone(process)
                raise
            return (answer, cost) if status == _OK else None

    def _again(self) -> None:
        if not self._closed and (self._starting is None or self._starting.done()):
            self._starting = asyncio.get_running_loop().create_task(self._restart())

    async def _restart(self) -> None:
        pause = 0.05
        while not self._closed:
            try:
                await self.start()
                return
            except (RunError, OSError):
                await asyncio.sleep(pause)
                pause = min(2 * pause, 5.0)

    async def close(self) -> None:
        """Ends the process."""
        self._closed = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait((self._starting,))
        process, self._process = self._process, None
        if process is not None:
            await _end(process)
        if self._watching is not None:
            await asyncio.wait((self._watching,))


async def _exchange(process: asyncio.subprocess.Process, most: int, *parts: bytes) -> tuple[bytes, int, int]:
    """Sends one message and returns the answer, its status and its cost.

    Raises:
        OSError, asyncio.IncompleteReadError: The process is gone, or says that its answer is longer than ``most``: then
            it is no longer ours, and nothing of that answer is read.
    """
    if process.stdin is None or process.stdout is None:
        raise BrokenPipeError
    for part in parts:
        process.stdin.write(part)
    await process.stdin.drain()
    size, status, cost = _ANSWERED.unpack(await process.stdout.readexactly(_ANSWERED.size))
    if size > most:
        raise BrokenPipeError
    return await process.stdout.readexactly(size), status, cost


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
    # Its pipes' transports would otherwise be found by the collector, which warns.
    if process.stdin is not None:
        process.stdin.close()
    process._transport.close()  # type: ignore[attr-defined]


# -- inside the process -----------------------------------------------------------------------------------------------


def _read(stream: BinaryIO, size: int) -> bytes:
    """Reads exactly so many bytes; the service is gone where there are fewer, and so are we."""
    data = stream.read(size)
    if len(data) != size:
        os._exit(0)
    return data


def main() -> None:
    """Runs an evaluator on standard input and output, until the input ends."""
    # Our answers go out by a descriptor of their own: a library that prints must not speak for us.
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    stream = sys.stdin.buffer
    count, _ = _ASKED.unpack(_read(stream, _ASKED.size))
    given = [Loaded.parse(_read(stream, _ASKED.unpack(_read(stream, _ASKED.size))[0])) for _ in range(count)]
    _bounded(int(os.environ["TACIT_EVALUATOR"]))
    try:
        from privacy.he import EncryptedHead, HeadPlan

        heads = [
            EncryptedHead.load(
                HeadPlan.from_bytes(one.plan), one.weights, one.bias, (-one.feature_range, one.feature_range)
            )
            for one in given
        ]
    except Exception as error:
        words = (str(error) or type(error).__name__).encode()[:_MOST_WORDS]
        out.write(_ANSWERED.pack(len(words), _REFUSED, 0) + words)
        os._exit(1)
    out.write(_ANSWERED.pack(0, _OK, 0))
    while True:
        size, number = _ASKED.unpack(_read(stream, _ASKED.size))
        query = _read(stream, size)
        began = time.perf_counter_ns()
        try:
            answer, status = heads[number].answer(query), _OK
        except MemoryError:
            # Whatever is left of the heap, nobody should trust it.
            os._exit(1)
        except Exception:
            # Whatever the library said of these bytes is the sender's business alone, and it has our word.
            answer, status = b"", _REFUSED
        cost = min((time.perf_counter_ns() - began) // 1000, 0xFFFFFFFF)
        data = memoryview(_ANSWERED.pack(len(answer), status, cost) + answer)
        while data:
            data = data[out.write(data) or 0 :]


def _bounded(memory: int) -> None:
    """Bounds what this process may take: memory, open files; no core of it is ever written."""
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_FSIZE, 1 << 24),
    ):
        _, hard = resource.getrlimit(what)
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (bound, bound))
