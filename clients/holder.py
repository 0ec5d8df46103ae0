"""A data holder as the client application sees it: its data, its ledger, its kept releases, its randomness.

The same class serves a real holder and a simulated one. They differ in two ways, both named here: a simulated holder
turns data faults and crashes into plain errors (they are the experimenter's own), where a real holder keeps them to
itself and looks on the wire like any other (guarantee G12).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, final

import numpy as np

from clients.data import Records, faults, sanitize
from models.task import Shape, Task
from privacy.errors import DataError, LedgerError, PlanError
from privacy.files import Buffer, write_whole
from privacy.ledger import Book, ChargeRequest, Receipt, Word
from privacy.noise import SECURE_SOURCE, Keystream, RandomSource
from privacy.plan import Metric, Plan, Unit
from privacy.vault import Safe, private_logger

# Details of a fault stay with the holder; they reach only what a deployment attaches here, a `SealedLog`.
_log = private_logger("tacit.client")


class Sources(Protocol):
    """Makes one fresh random source per release."""

    def __call__(self, *, holder: str, job: str, round: int) -> RandomSource:
        """Returns the source for one release of one holder."""


@final
class SecureSources:
    """The production source: a keystream of its own for every release."""

    def __call__(self, *, holder: str, job: str, round: int) -> RandomSource:
        """Returns a fresh keystream; nothing about the release enters its key."""
        return Keystream()


def noise_name(sources: Sources) -> str:
    """Returns what the ledger calls these sources; only the production type gets the production name.

    Guarantees:
        Honest: no other object can pass for the production source, whatever it calls itself (guarantee G11).
    """
    return SECURE_SOURCE if type(sources) is SecureSources else f"test:{type(sources).__name__}"


@dataclasses.dataclass(frozen=True, eq=False)
class Release:
    """What may leave a holder for one round: the new parameters, the plan's metrics, the receipt of their charge.

    Attributes:
        parameters: Trainable parameters after local training, flat float32 of shape ``(P,)``; at unit client what
            `clients.plain.PlainTrainer.update` returns, for the server's eyes only.
        receipt: The signed receipt of the charge that paid for all of it.
        metrics: Noised sums of the plan's metrics, flat float32 of shape ``(M,)``; M = 0 where none was asked.
    """

    parameters: np.ndarray[tuple[int], np.dtype[np.float32]]
    receipt: Receipt
    metrics: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.float32)
    )


class Kept:
    """Finished releases, stored before any byte leaves (guarantee G8).

    A retry of the same request is answered with these bytes and costs nothing (guarantee G9). Losing a kept release
    is safe: the retry is then charged anew and drawn with fresh coins and noise.

    A real holder keeps them in a `Safe`: the files then hold only ciphertext, each bound to its name, and one that was
    altered or swapped counts as lost.
    """

    _MAGIC: Final = b"tacit/kept/1\n"

    def __init__(self, folder: Path, *, durable: bool, safe: Safe | None = None) -> None:
        """Keeps releases under ``folder``.

        Args:
            folder: Where; made when the first one is kept.
            durable: Whether each is synced to disk, so that a power cut loses none.
            safe: What seals them; None leaves them readable, for a simulation.
        """
        self._folder, self._durable, self._safe = folder, durable, safe
        self._spares: list[str] = []

    @property
    def sealed(self) -> bool:
        """Whether the files hold only ciphertext."""
        return self._safe is not None

    def _path(self, job: str, account: str, request: str) -> Path:
        return self._folder / f"{job}-{account}-{request[:16]}.release"

    def put(self, release: Release) -> None:
        """Stores a release whole or not at all.

        Raises:
            RunError: The disk is full or the folder cannot be written.
        """
        receipt = release.receipt
        path = self._path(receipt.job, receipt.account, receipt.request)
        count, numbers = len(release.metrics), release.parameters
        if count:
            numbers = np.concatenate((release.parameters, release.metrics))
        body = np.ascontiguousarray(numbers, dtype="<f4").view(np.uint8).data
        # Against a rotten file, not against an attacker: that takes a safe.
        header = json.dumps({"receipt": receipt.to_json(), "sum": _sum(body)} | ({"metrics": count} if count else {}))
        parts: tuple[Buffer, ...] = (self._MAGIC, header.encode(), b"\n", body)
        if self._safe is not None:
            parts = (self._safe.seal(path.name, *parts),)
        write_whole(path, *parts, durable=self._durable, spare=self._spare())

    def _spare(self) -> Path | None:
        """Takes a file that an earlier round left, if there is one; other processes take theirs from the same ones."""
        self._spares = self._spares or [str(path) for path in self._folder.glob("*.spare")]
        mine = self._folder / f".{os.getpid()}.{threading.get_ident()}.new"
        while self._spares:
            try:
                os.rename(self._spares.pop(), mine)
            except OSError:
                continue
            return mine
        return None

    def get(self, job: str, account: str, request: str) -> Release | None:
        """Returns the kept release of exactly this request, or None."""
        path = self._path(job, account, request)
        try:
            content = path.read_bytes()
            if self._safe is not None:
                content = self._safe.open(path.name, content)
        except (OSError, LedgerError):
            return None
        header, _, body = content.removeprefix(self._MAGIC).partition(b"\n")
        try:
            fields = json.loads(header)
            receipt = Receipt.from_json(fields["receipt"])
            whole = _sum(body) == fields["sum"]
            numbers = np.frombuffer(body, dtype="<f4")
            last = len(numbers) - operator.index(fields.get("metrics", 0))
            whole = whole and 0 <= last <= len(numbers)
        except (ValueError, KeyError, TypeError, LedgerError):
            return None
        if not whole or (receipt.job, receipt.account, receipt.request) != (job, account, request):
            return None
        return Release(numbers[:last], receipt, numbers[last:])

    def clear(self) -> None:
        """Forgets all kept releases: for when their round is over and nobody will ask for it again."""
        for path in self._folder.glob("*.release"):
            path.replace(path.with_suffix(".spare"))


def _sum(body: bytes | memoryview) -> int:
    # Eight bytes at a time, modulo 2^64: four times as fast as over the numbers themselves.
    whole = len(body) // 8
    total = int(np.frombuffer(body, dtype="<u8", count=whole).sum(dtype=np.uint64))
    return (total + int.from_bytes(body[8 * whole :], "little")) % 2**64


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Holder:
    """One data holder.

    Attributes:
        name: The holder's own name of its data set; the name of its account.
        task: What may be learned on it; a request for another task is declined.
        shape: Public shape of a record.
        load: Reads the records; called only after a charge.
        book: The ledger.
        kept: Stored releases.
        sources: Randomness, one fresh source per release.
        pay: Gates and charges; by default one synced charge in the book.
        commitment: Keyed commitment to the records as last seen in the preflight; empty before.
        code: SHA-256 of the code that runs here, in hex; the ledger names it. Empty where it is not known.
        device: Where training runs.
        simulated: Whether faults are the experimenter's own and may be raised.
        allow_metrics: Metrics of its own records that this holder lets a plan ask for; none by default.
        allow_central: Whether this holder trusts the server with its updates in the clear, for a plan that protects
            clients (guarantee G16); never by default.
    """

    name: str
    task: Task
    shape: Shape
    load: Callable[[], Records]
    book: Book
    kept: Kept
    sources: Sources
    pay: Callable[[ChargeRequest], Receipt | Word] | None = None
    commitment: str = ""
    code: str = ""
    device: str = "cpu"
    simulated: bool = False
    allow_metrics: frozenset[Metric] = frozenset()
    allow_central: bool = False

    def __post_init__(self) -> None:
        if not self.simulated and not self.kept.sealed:
            raise PlanError("expected a real holder's releases to be kept in a safe, got none; give its Kept a Safe")

    def allows(self, plan: Plan) -> bool:
        """Says whether this holder's own policy lets it take part in a plan; asked before anything is charged."""
        if plan.metrics is not None and not self.allow_metrics.issuperset(plan.metrics.words):
            return False
        return plan.unit is Unit.RECORD or self.allow_central

    def charge(self, request: ChargeRequest) -> Receipt | Word:
        """Gates and charges one request; on disk when it returns a receipt.

        Guarantees:
            Checked: whoever paid, the receipt is for exactly this request, stands in this holder's own ledger, and
                has paid for nothing yet.

        Raises:
            LedgerError: A receipt was handed over that does not pay for this release; see `Book.claim`.
        """
        outcome = self.pay(request) if self.pay is not None else self.book.charge([request])[0]
        if isinstance(outcome, Receipt):
            self.book.claim(outcome, request)
        return outcome

    def account(self) -> str:
        """Returns the data set's random identity, or an empty string before its grant."""
        if self.name not in self.book.accounts:
            # Another process may have opened it meanwhile.
            self.book.refresh()
        account = self.book.accounts.get(self.name)
        return account.identity if account is not None else ""

    def records(self) -> Records:
        """Returns the records, every one of them fit for training.

        Raises:
            DataError: Only in a simulation: a record is faulty, or there is none.
        """
        if self.simulated:
            records = self.load()
            if found := faults(records, self.shape):
                raise DataError(f"expected sound records at {self.name}, got {found[0]}; repair the data set")
            return records
        # A real holder must look the same on the wire whatever its data: faulty records take part as nothing, and so
        # does a data set that cannot be read. The preflight tells its owner; nobody else may learn of it.
        try:
            return sanitize(self.load(), self.shape)
        except (Exception, SystemExit):
            _log.exception("the records could not be read and take part as nothing; this stays on this machine")
            return Records.blank(self.shape, 0)


def content_of(records: Records) -> bytes:
    """Returns a digest of records, to be used only inside a keyed commitment (guarantee G7)."""
    digest = hashlib.sha256()
    for tensor in (records.inputs, records.targets, records.valid):
        digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.digest()
