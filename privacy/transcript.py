"""A ledger as anybody may read it: every line of it checked with public keys alone, and what each line says.

A `Transcript` needs no secret and changes nothing: it is what ``tacit verify`` and ``tacit client ledger`` read. An
export is a transcript with a first line in which the holder's keys sign how long it is and what it says, so that a
copy that was cut at its end is told from a whole one.

    {"schema":"tacit-ledger-export/1","sha256":...,"bytes":...,"time":...,"signatures":{account:signature}}
    the lines of ledger.jsonl, unchanged

What no copy can show by itself is whether a later state of the same ledger exists; receipts that peers keep can.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from privacy.accounting import Event, Grant, best_affordable_order
from privacy.errors import LedgerError
from privacy.files import write_whole
from privacy.identity import verify
from privacy.ledger import PAID, Account, Book, Ledger, Receipt, events_of, receipt_of
from privacy.plan import canonical

EXPORT: Final = "tacit-ledger-export/1"
LEDGER_FILE: Final = "ledger.jsonl"
_HEADER_KEYS: Final = frozenset({"schema", "sha256", "bytes", "time", "signatures"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One charge as a person reads it.

    Attributes:
        account: Identity of the data set.
        name: The holder's own name of it.
        seq: Number of the entry in its account.
        time: Seconds since 1970 by the holder's clock.
        job: Job identity.
        round: Round of the job.
        events: What was released together.
        charged: Whether this entry paid for it; a later round of a matrix was paid for with its first.
        noise: Source of coins and noise.
        spent: Epsilon of everything charged until then, by the filter.
        granted: Budget at that time.
        delta: The holder's delta.
        public_key: The holder's key for the account.
        entry: The whole entry.
    """

    account: str
    name: str
    seq: int
    time: int
    job: str
    round: int
    events: tuple[Event, ...]
    charged: bool
    noise: str
    spent: float
    granted: float
    delta: float
    public_key: str
    entry: Mapping[str, Any]

    @property
    def receipt(self) -> Receipt | None:
        """The receipt that the entry stands for; None for an entry of version 1, which has no signature."""
        if self.entry["v"] == 1:
            return None
        return receipt_of(self.entry, granted=self.granted, delta=self.delta, public_key=self.public_key)

    @property
    def released(self) -> str:
        """What was released, in words."""
        return ", ".join(event.released for event in self.events)


class Transcript(Ledger):
    """A whole ledger, read without its secret.

    Guarantees:
        Checked: every line is in its chain, every account's last signature, which binds all before it, is of the key
            that its grant names, and nothing is of an unknown kind.

    Attributes:
        data: The bytes that were read, whole lines.
        lines: Every charge, in the order of the file.
        grants: The grant entry of each account, by its identity.
        commits: The commitment entries, by account and job.
        exported: When the holder signed this as an export, in seconds since 1970; None for a bare ledger.
    """

    def __init__(self, data: bytes, path: Path, population: str | None = None) -> None:
        """Reads and checks a ledger or an export.

        Args:
            data: Content of the file.
            path: Its name, for messages.
            population: Whose accounts `accounts` means, where there are several populations.

        Raises:
            LedgerError: It is damaged, cut, forged or of a newer version.
        """
        super().__init__(path, population)
        self.lines: list[Line] = []
        self.grants: dict[str, Mapping[str, Any]] = {}
        self.commits: dict[tuple[str, str], Mapping[str, Any]] = {}
        first, _, rest = data.partition(b"\n")
        header = _header(first)
        self.exported: int | None = None
        self.data = data if header is None else rest
        if not self.data.endswith(b"\n"):
            if self.data or header is None:
                raise self._damaged(self.data.count(b"\n") + 1, "a line without an end: it was cut")
        else:
            self._take(self.data)
        if header is not None:
            self._require_export(header)

    @property
    def everyone(self) -> Mapping[str, Account]:
        """All accounts of all populations, by their identities."""
        return self._accounts

    def tell(self) -> dict[str, Any]:
        """Returns what a person wants to know: every charge, every account, and what was found sound.

        An account's figures are those of `accounts`, one population's, where one was named; else of all.
        """
        shown = self._populations.get(self._population, {}).values() if self._population else self.everyone.values()
        chosen = {account.identity: account for account in shown}
        unsigned = sum(account.unsigned for account in chosen.values())
        back = sum(account.backwards for account in chosen.values())
        verdict = "Chains and signatures hold."
        if unsigned:
            verdict = f"Chains hold; {unsigned} entries of version 1 were never signed."
        if back:
            verdict += f" In {back} entries the clock was set back; their spend counts."
        return {
            "charges": [
                {
                    "time": iso(line.time),
                    "name": line.name,
                    "job": line.job,
                    "round": line.round,
                    "released": line.released,
                    "kind": line.events[0].kind.value,
                    "spent": line.spent,
                    "remaining": max(0.0, line.granted - line.spent),
                }
                for line in self.lines
                if line.account in chosen
            ],
            "accounts": [
                {
                    "name": account.name,
                    "account": account.identity,
                    "population": account.population,
                    "granted": float(account.grant.epsilon),
                    "spent": account.spent,
                    "remaining": max(0.0, account.grant.epsilon - account.spent),
                    "delta": account.grant.delta,
                    "order": float(account.grant.order),
                    "records_bound": account.grant.records_bound,
                    "charges": account.charges,
                    "jobs": len(account.jobs),
                    "test_noise": account.test,
                    "clock_set_back": account.backwards,
                    "unsigned": account.unsigned,
                    "head": account.heads[-1],
                    "key": account.public_key,
                    "changes": [
                        {
                            "time": iso(change.time),
                            "before": change.before,
                            "after": change.after,
                            "raised": change.after > change.before,
                        }
                        for change in account.changes
                    ],
                }
                for account in chosen.values()
            ],
            "verdict": verdict,
        }

    def _add(self, account: Account | None, entry: Mapping[str, Any]) -> None:
        super()._add(account, entry)
        identity, body = entry["account"], entry["body"]
        now = self._accounts[identity]
        if entry["kind"] == "grant":
            self.grants[identity] = entry
        elif entry["kind"] == "commit":
            self.commits[identity, body["job"]] = entry
        elif entry["kind"] in PAID:
            self.lines.append(
                Line(
                    account=identity,
                    name=now.name,
                    seq=entry["seq"],
                    time=entry["time"],
                    job=body["job"],
                    round=body["round"],
                    events=events_of(body["event"]),
                    charged=entry["kind"] == "charge",
                    noise=body["noise"],
                    spent=now.spent,
                    granted=float(now.grant.epsilon),
                    delta=float(now.grant.delta),
                    public_key=now.public_key,
                    entry=entry,
                )
            )

    def _require_export(self, header: Mapping[str, Any]) -> None:
        signed = canonical({name: header[name] for name in _HEADER_KEYS - {"signatures"}})
        if (header["sha256"], header["bytes"]) != (hashlib.sha256(self.data).hexdigest(), len(self.data)):
            raise LedgerError(
                f"expected the {header['bytes']} bytes that were exported in {self._path}, got {len(self.data)} or "
                "others; it was cut or changed, export it again"
            )
        if header["signatures"].keys() != self._accounts.keys():
            raise LedgerError(
                f"expected {self._path} to be signed by each of its accounts, got others; export it again"
            )
        for identity, account in self._accounts.items():
            verify(account.public_key, _EXPORT_MARK + signed, header["signatures"][identity])
        self.exported = header["time"]


_EXPORT_MARK: Final = b"tacit/export/1\n"


def _header(line: bytes) -> dict[str, Any] | None:
    """Returns the first line of an export; None where the file is a bare ledger."""
    if not line.startswith(b'{"bytes":'):
        return None
    try:
        header: dict[str, Any] = json.loads(line)
        sound = (
            header.keys() == _HEADER_KEYS
            and canonical(header) == line
            and header["schema"] == EXPORT
            and (type(header["bytes"]), type(header["time"]), type(header["sha256"])) == (int, int, str)
            and all(type(text) is str for text in header["signatures"].values())
        )
    except (ValueError, AttributeError, RecursionError, TypeError):
        sound = False
    if not sound:
        raise LedgerError("expected the first line of a ledger's export, got another; export it again") from None
    return header


def read_ledger(place: Path, population: str | None = None) -> Transcript:
    """Reads a ledger without its key, and without changing a byte.

    Args:
        place: A ``ledger.jsonl``, an export, or a folder with a ledger in it.
        population: Whose accounts are meant, where there are several populations.

    Raises:
        LedgerError: There is none, or it is damaged. What a crash tore is settled when its holder opens it.
    """
    path = place / LEDGER_FILE if place.is_dir() else place
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"expected a ledger at {path}, got {error.strerror}; name its folder or file") from None
    return Transcript(data, path, population)


def iso(seconds: int) -> str:
    """Returns a time as ISO 8601, UTC, to the second; times beyond the calendar as they are."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s"


def is_ledger(text: bytes) -> bool:
    """Says whether bytes begin as a ledger or an export does; no promise that they are sound."""
    return text.startswith((b'{"account":"', b'{"bytes":'))


def export(book: Book, path: Path) -> Transcript:
    """Writes a signed, self-contained copy of a book: entries and public keys, no secret.

    Returns:
        What was written, read back and checked.

    Raises:
        LedgerError: The book is damaged.
        RunError: The file cannot be written.
    """
    book.refresh()
    data = book.content()
    fields = {
        "schema": EXPORT,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "time": int(time.time()),
    }
    accounts = Transcript(data, path).everyone if data else {}
    signed = _EXPORT_MARK + canonical(fields)
    header = fields | {"signatures": {identity: book.secret.identity(identity).sign(signed) for identity in accounts}}
    text = canonical(header) + b"\n" + data
    copy = Transcript(text, path)
    write_whole(path, text)
    return copy


def import_into(folder: Path, copy: Transcript) -> int:
    """Continues the book in a folder with what a copy of the same book has beyond it.

    Guarantees:
        Nothing is lost and nothing forks: the book's entries must be the beginning of the copy, byte for byte, or the
        copy a beginning of the book; an entry is never taken away, reset or put in another order.

    Args:
        folder: Where the book lies, or is to lie again; its ``ledger.key`` must be there, for no copy holds it.
        copy: The copy, read and checked.

    Returns:
        How many entries were added.

    Raises:
        LedgerError: The two went different ways, or the copy belongs to another holder's key.
    """
    if not (folder / "ledger.key").exists():
        raise LedgerError(
            f"expected the holder's ledger.key in {folder}, got none; put its backup there first: a copy has none, "
            "and under another key the ledger could never be charged again"
        )
    with Book(folder) as book:
        return book.absorb(copy.data)


def holders_grant(*, epsilon: float, delta: float, records_bound: int, order: float = 0.0) -> Grant:
    """Returns a budget for a data set before any job is known.

    Args:
        epsilon: Most that may ever be spent, > 0.
        delta: The holder's delta, in (0, 1 / records_bound).
        records_bound: Declared public bound on the number of records.
        order: Order of the filter, fixed from now on; 0 chooses the one that affords most noised sums.

    Raises:
        PlanError: A value is out of range.
    """
    # Checked at an order that holds any budget, before one is looked for.
    order = order or best_affordable_order(epsilon, delta)
    return Grant(epsilon=epsilon, delta=delta, order=order, records_bound=records_bound)
