"""A data holder as the client application sees it: its data, its ledger, its kept releases, its randomness.

The same class serves a real holder and a simulated one. They differ in two ways, both named here: a simulated holder
turns data faults and crashes into plain errors (they are the experimenter's own), where a real holder keeps them to
itself and looks on the wire like any other (guarantee G12).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, final

import numpy as np
import torch

from clients.data import Records, faults, sanitize
from models.task import Shape, Task
from privacy.errors import DataError, LedgerError
from privacy.files import write_whole
from privacy.ledger import Book, ChargeRequest, Receipt, Word
from privacy.noise import SECURE_SOURCE, Keystream, RandomSource

_log = logging.getLogger("tacit.client")


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
    """What may leave a holder for one round: the new parameters, and the receipt of their charge.

    Attributes:
        parameters: Trainable parameters after local training, flat float32 of shape ``(P,)``.
        receipt: The signed receipt of the charge that paid for them.
    """

    parameters: np.ndarray[tuple[int], np.dtype[np.float32]]
    receipt: Receipt


class Kept:
    """Finished releases, stored before any byte leaves (guarantee G8).

    A retry of the same request is answered with these bytes and costs nothing (guarantee G9). Losing a kept release
    is safe: the retry is then charged anew and drawn with fresh coins and noise.
    """

    _MAGIC: Final = b"tacit/kept/1\n"

    def __init__(self, folder: Path, *, durable: bool) -> None:
        """Keeps releases under ``folder``; ``durable`` syncs each to disk (a power cut then loses none)."""
        self._folder, self._durable = folder, durable

    def _path(self, job: str, account: str, request: str) -> Path:
        # A name of its own for each request: replacing a file in place makes some file systems write it out at once.
        return self._folder / f"{job}-{account}-{request[:16]}.release"

    def put(self, release: Release) -> None:
        """Stores a release whole or not at all.

        Raises:
            RunError: The disk is full or the folder cannot be written.
        """
        receipt = release.receipt
        path = self._path(receipt.job, receipt.account, receipt.request)
        body = np.ascontiguousarray(release.parameters, dtype="<f4").data
        # Against a torn or rotten file, not against an attacker: who can write here can also read the ledger's key.
        header = json.dumps({"receipt": receipt.to_json(), "crc32": zlib.crc32(body)})
        write_whole(path, self._MAGIC, header.encode(), b"\n", body, durable=self._durable)

    def get(self, job: str, account: str, request: str) -> Release | None:
        """Returns the kept release of exactly this request, or None."""
        try:
            content = self._path(job, account, request).read_bytes()
        except OSError:
            return None
        header, _, body = content.removeprefix(self._MAGIC).partition(b"\n")
        try:
            fields = json.loads(header)
            receipt = Receipt.from_json(fields["receipt"])
            whole = zlib.crc32(body) == fields["crc32"]
        except (ValueError, KeyError, TypeError, LedgerError):
            return None
        if not whole or (receipt.job, receipt.account, receipt.request) != (job, account, request):
            return None
        return Release(np.frombuffer(body, dtype="<f4"), receipt)

    def clear(self) -> None:
        """Forgets all kept releases: for when their round is over and nobody will ask for it again."""
        for path in self._folder.glob("*.release"):
            path.unlink(missing_ok=True)


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
        device: Where training runs.
        simulated: Whether faults are the experimenter's own and may be raised.
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
    device: str = "cpu"
    simulated: bool = False

    def charge(self, request: ChargeRequest) -> Receipt | Word:
        """Gates and charges one request; on disk when it returns a receipt.

        Guarantees:
            Checked: whoever paid, the receipt is for exactly this request and stands in this holder's own ledger.

        Raises:
            LedgerError: A receipt was handed over that the ledger does not hold, or for another source of noise.
        """
        outcome = self.pay(request) if self.pay is not None else self.book.charge([request])[0]
        if isinstance(outcome, Receipt):
            self._require_charged(outcome, request)
        return outcome

    def _require_charged(self, receipt: Receipt, request: ChargeRequest) -> None:
        account = self.book.accounts.get(self.name)
        if account is None or receipt.seq >= len(account.heads):
            self.book.refresh()
            account = self.book.accounts.get(self.name)
        stands = account is not None and account.heads[receipt.seq : receipt.seq + 1] == [receipt.head]
        same = (receipt.job, receipt.round, receipt.request) == (request.job, request.round, request.request)
        if account is None or not stands or not same or receipt.account != account.identity:
            raise LedgerError("expected a receipt that this holder's ledger holds, got another; nothing was released")
        if request.noise != SECURE_SOURCE and not receipt.test:
            raise LedgerError("expected a charge that names its test noise, got one for the production source")

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
        except Exception:
            _log.exception("the records could not be read and take part as nothing; this stays on this machine")
            return Records(
                torch.zeros((0, *self.shape.inputs)),
                torch.zeros(0, dtype=torch.int64),
                torch.zeros(0, dtype=torch.bool),
            )


def content_of(records: Records) -> bytes:
    """Returns a digest of records, to be used only inside a keyed commitment (guarantee G7)."""
    digest = hashlib.sha256()
    for tensor in (records.inputs, records.targets, records.valid):
        digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.digest()
