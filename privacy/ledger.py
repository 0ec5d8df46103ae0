"""The ledger: what was spent on which data set, for ever, and the gate that refuses to overspend.

One `Book` is one file, ``ledger.jsonl``: an append-only list of JSON lines, each signed by the holder and bound to the
one before it in its account by a SHA-256 chain. An account is a data set of one holder under a random identity that is
made once; what the data set contains may change, its account and all its spend stay (guarantee G7). A deployed client's
book holds its own accounts; a simulation's book holds those of all its clients, so that a cohort is charged with one
fsync. Accounts belong to a population, the persons whose records they hold; a second population is let in only by the
holder's signed statement that no person is in both, because another split of the same records would hide their spend.

The signature in a charge entry is that of its `Receipt`, which names the entry's hash and so covers the chain: who
has the ledger has every receipt. Entries of version 1 were not signed; they are still read, and counted as unsigned.
Since version 3 the ``commit`` entry, with which a job begins, also names the code, the settings of the job and
the sampling law, and a ``budget`` entry is the holder's own change of its budget, which no job can make.

Order (guarantee G8): `Book.charge` returns only after the entries are on disk. Nothing may touch private data before.
A crash in between over-counts, never under-counts.

A matrix mechanism is one release, however many rounds it has: its first round is charged for all, and a later one is
a ``participation`` entry. That costs nothing, and is written, synced, signed and gated like a charge: the ledger admits
the committed drawing only, in ascending rounds as far apart as its price assumes, and no more of them (guarantee G16).

What is never written here: a bare hash of data, a number of records, a label count, a coin, a noise seed.

Crash safety: an append is one write and one sync of the ledger. Only after the sync, and before anybody is told, the
*mark* is overwritten in place: how long the ledger is and the SHA-256 of all of it, in one of the two slots of
``ledger.mark`` in turn, so that a torn slot leaves the other. The mark is not synced: a killed process loses no write
that it made, and a power cut may leave an older mark, never one ahead of the ledger. So what the mark covers is there
and is the same, or the book is refused: it was cut or edited, and is left as it is and never reset. What lies beyond
the mark was told to nobody, or is whole. Whole lines there that chain and are signed are kept and count as spent. A
line without an end, or with a NUL byte as a block that never reached the disk reads, was torn before anything was
released for it: it is dropped, with what comes after it. Any other line is an edit, and refused. A mark is made before
the first entry, so a ledger with entries and without one is refused too. Books that announced each append in an
*intent* are finished and checked by it once more when they are opened; the mark takes its place.

What cannot be seen from here: a cut back to an older mark where a power cut, or somebody, took the newer one away, and
a ledger and its mark rolled back or made anew together. The receipts that peers hold show both (guarantee G14).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, Final, Self

from privacy.accounting import Event, Grant, Kind, events_from_json, events_to_json, rdp, repeated
from privacy.errors import LedgerError, PlanError, TacitError
from privacy.files import sync_folder
from privacy.identity import Secret, verify
from privacy.matrix import Drawing, Turns, matrix_event, matrix_of
from privacy.noise import SECURE_SOURCE
from privacy.plan import Adjacency, Plan, Unit, canonical, require

_VERSION: Final = 3
_GENESIS: Final = "0" * 64
_MARK: Final = "ledger.mark"
# What books announced their appends in before there was a mark; they are still read, once.
_INTENTS: Final = ("ledger.intent", "ledger.intent-2")
# What guards a ledger's end; a copy of a book needs them beside it.
GUARDS: Final = (_MARK, *_INTENTS)
# The slots of a mark lie in different sectors, of 4 KiB at most: what tears the write of one leaves the other.
_SLOTS: Final = (0, 4096)
_SLOT: Final = re.compile(rb"(tacit/mark/1 (\d{20}) ([0-9a-f]{64}) )([0-9a-f]{64})\n")
# The filter forgives so much of rounding (see `Grant.affords`); a budget may be closed at what that let through.
_SLACK: Final = 1e-9
# An entry is well under 2 KiB; a longer line is not ours and is not parsed.
_LINE_BYTES: Final = 16 * 1024
# The kinds of entry under which something is released; their signature is that of their receipt.
PAID: Final = frozenset({"charge", "participation"})
_ENTRY_KEYS: Final = frozenset({"v", "account", "seq", "prev", "kind", "time", "body", "hash", "sig"})


class Word(StrEnum):
    """The fixed words with which a client declines; none depends on data (guarantee G12)."""

    DECLINED = "declined"
    CONFLICT = "conflict"
    BEHIND = "behind"
    MALFORMED = "malformed"
    UNAVAILABLE = "unavailable"


class Law(StrEnum):
    """How the records of a release are sampled: the law and where its coins come from, never a coin (guarantee G7)."""

    POISSON = "poisson, secret coins, keystream"
    TEST = "poisson, coins of a test source"
    NONE = "none, every record takes part"

    @classmethod
    def of(cls, event: Event, noise: str) -> Law:
        """Returns the law of an event whose coins and noise come from one source."""
        if event.sample_rate >= 1:
            return cls.NONE
        return cls.POISSON if noise == SECURE_SOURCE else cls.TEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """What one charge was, signed by the holder; the peer countersigns and keeps it (guarantee G14).

    Attributes:
        account: The data set's random identity, 32 hex digits.
        seq: Number of the charge entry in its account, from 0.
        head: SHA-256 of that entry, which chains all before it.
        job: Job identity, stable over resumption.
        round: Round of the job, from 1.
        request: SHA-256 of the whole request that was charged for.
        event: The update that is released under this charge.
        metrics: What else is released under it; empty in a plan without metrics.
        spent: Epsilon of everything ever charged to the account, by its filter, at the holder's delta.
        granted: The account's budget in epsilon.
        delta: The holder's delta.
        charges: How many charges the account holds.
        test: Whether any charge was made with a noise source other than the production one.
        public_key: The holder's Ed25519 key, 64 hex digits.
        signature: Over all fields above, 128 hex digits.
    """

    account: str
    seq: int
    head: str
    job: str
    round: int
    request: str
    event: Event
    spent: float
    granted: float
    delta: float
    charges: int
    test: bool
    public_key: str
    signature: str = ""
    metrics: tuple[Event, ...] = ()

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything that is released under this charge."""
        return (self.event, *self.metrics)

    def signed_bytes(self) -> bytes:
        """Returns the bytes that the signature covers."""
        # The text without its signature, which no other field can hold: quotes inside a text are escaped.
        return _RECEIPT_MARK + self.to_json().replace(f'"signature":"{self.signature}",', "", 1).encode()

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _RECEIPT_FIELDS} | {"event": events_to_json(self.events)}

    def to_json(self) -> str:
        """Returns the canonical JSON text."""
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        # Kept, because a receipt is kept, sent, checked and countersigned as the same text.
        return canonical(self._fields()).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads and verifies a receipt.

        Raises:
            LedgerError: It is not a receipt, or its signature does not match its own key.
        """
        receipt = cls.unverified(text)
        verify(receipt.public_key, receipt.signed_bytes(), receipt.signature)
        return receipt

    @classmethod
    def unverified(cls, text: str) -> Self:
        """Reads a receipt whose signature the caller has yet to check: many are checked faster together.

        Raises:
            LedgerError: It is not a receipt, or not the one text of it.
        """
        try:
            if len(text) > _LINE_BYTES:
                raise ValueError("too long")
            receipt = cls._from_own_text(text) or cls._from_any_text(text)
            if receipt.seq < 0 or receipt.round < 1 or receipt.charges < 1:
                raise ValueError("a count is too small")
            if not (0 <= receipt.spent < math.inf and 0 < receipt.granted < math.inf and 0 < receipt.delta < 1):
                raise ValueError("a figure is out of range")
        except (ValueError, TypeError, KeyError) as error:
            raise LedgerError(f"expected a receipt, got something else ({type(error).__name__})") from None
        return receipt

    @classmethod
    def _from_own_text(cls, text: str) -> Self | None:
        """Reads a text that is canonical by its shape, as this program's own is; None for any other, sound or not."""
        match = _RECEIPT_TEXT.fullmatch(text)
        if match is None:
            return None
        account, charges, delta, event, granted, head, job, key, request, number, seq, signature, spent, test = (
            match.groups()
        )
        figures = float(delta), float(granted), float(spent)
        events = _events_of_text(event)
        if events is None or tuple(map(repr, figures)) != (delta, granted, spent):
            return None
        receipt = cls(
            account=account,
            seq=int(seq),
            head=head,
            job=job,
            round=int(number),
            request=request,
            event=events[1][0],
            metrics=events[1][1:],
            spent=figures[2],
            granted=figures[1],
            delta=figures[0],
            charges=int(charges),
            test=test == "true",
            public_key=key,
            signature=signature,
        )
        return receipt._with_text(text)

    @classmethod
    def _from_any_text(cls, text: str) -> Self:
        fields = _loads(text)
        fields["event"], *metrics = events_from_json(fields["event"])
        for name, kind in _RECEIPT_TYPES.items():
            if type(fields[name]) is not kind:
                raise TypeError(f"{name} is not a {kind.__name__}")
        for name, digits in _RECEIPT_HEX.items():
            if not re.fullmatch(f"[0-9a-f]{{{digits}}}", fields[name]):
                raise ValueError(f"{name} is not {digits} hex digits")
        if "metrics" in fields:
            raise ValueError("metrics stand beside the event")
        receipt = cls(**fields, metrics=tuple(metrics))
        # A second text for the same receipt (a repeated key, other spacing) may be read differently elsewhere.
        if receipt.to_json() != text:
            raise ValueError("not the canonical text")
        return receipt

    def _with_text(self, text: str) -> Self:
        """Keeps a text that is known to be the canonical one."""
        self.__dict__["_text"] = text
        return self


_RECEIPT_MARK: Final = b"tacit/receipt/1\n"
# Metrics stand in the list of events.
_RECEIPT_FIELDS: Final = tuple(field.name for field in dataclasses.fields(Receipt) if field.name != "metrics")
_RECEIPT_HEX: Final[Mapping[str, int]] = {
    "account": 32,
    "head": 64,
    "job": 32,
    "request": 64,
    "public_key": 64,
    "signature": 128,
}
_RECEIPT_TYPES: Final[Mapping[str, type]] = {
    **dict.fromkeys(("account", "head", "job", "request", "public_key", "signature"), str),
    **dict.fromkeys(("seq", "round", "charges"), int),
    **dict.fromkeys(("spent", "granted", "delta"), float),
    "test": bool,
}


# What canonical JSON is made of, as far as this program's own receipts and charges need it: whole numbers, texts that
# are written as they stand, and one event or a list of them. A match is canonical but for floats and events, which
# have many texts: those are compared with the one that they have. What does not match is read the long way.
_WHOLE: Final = "(0|[1-9][0-9]{0,17})"
_FLOAT: Final = r"([0-9]+(?:\.[0-9]+)?(?:e[+-][0-9]+)?)"
_PLAIN: Final = r"([ !#-\[\]-~]*)"
_TRUTH: Final = "(true|false)"
_EVENTS: Final = r"(\{[^{}]*\}|\[[^\[\]]*\])"


def _hex(digits: int) -> str:
    return f"([0-9a-f]{{{digits}}})"


_RECEIPT_TEXT: Final = re.compile(
    rf'\{{"account":"{_hex(32)}","charges":{_WHOLE},"delta":{_FLOAT},"event":{_EVENTS},"granted":{_FLOAT},'
    rf'"head":"{_hex(64)}","job":"{_hex(32)}","public_key":"{_hex(64)}","request":"{_hex(64)}","round":{_WHOLE},'
    rf'"seq":{_WHOLE},"signature":"{_hex(128)}","spent":{_FLOAT},"test":{_TRUTH}\}}'
)
_PAID_LINE: Final = re.compile(
    rf'(\{{"account":"{_hex(32)}","body":\{{"charges":{_WHOLE},"commitment":"([0-9a-f]*)","event":{_EVENTS},'
    rf'"job":"{_PLAIN}","noise":"{_PLAIN}","nonce":"([0-9a-f]*)","request":"{_PLAIN}","round":{_WHOLE},'
    rf'"spent":{_FLOAT},"test":{_TRUTH}\}}),"hash":"{_hex(64)}",("kind":"(charge|participation)","prev":"{_hex(64)}",'
    rf'"seq":{_WHOLE}),"sig":"{_hex(128)}",("time":{_WHOLE},"v":([23])\}})'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChargeRequest:
    """What a holder is asked to pay for: one round of one job, bound to the whole request.

    Attributes:
        name: The holder's own name of the data set.
        job: Job identity.
        round: Round, from 1.
        request: SHA-256 of the whole request, in hex.
        plan: The job's plan; its digest is committed at the job's first charge and may never change.
        commitment: Keyed commitment to the data's content, or empty where it is not known yet.
        noise: Name of the source that will draw the noise.
        witness: Pair (seq, head) of the last receipt that the peer holds, or None.
        code: SHA-256 of the code that will run, in hex, or empty where the holder cannot name it.
        settings: SHA-256 of the job's settings as the client got them, in hex; see `privacy.wire.settings_digest`.
        matrix: The drawing whose noise the release will get, or None where each round's noise is its own. Its
            plan's round must then be one release without sampling, and its noise multiplier is the whole matrix'; where
            the plan names a matrix, it must be this one.
    """

    name: str
    job: str
    round: int
    request: str
    plan: Plan
    commitment: str = ""
    noise: str = SECURE_SOURCE
    witness: tuple[int, str] | None = None
    code: str = ""
    settings: str = ""
    matrix: Drawing | None = None

    @functools.cached_property
    def events(self) -> tuple[Event, ...]:
        """What is charged: all of one round of the plan, or the whole matrix, of which only the first round is."""
        if self.matrix is None or self.plan.banded is not None:
            return Event.all_of_round(self.plan)
        return (matrix_event(self.plan.noise_multiplier, unit=self.plan.unit, adjacency=self.plan.adjacency),)


@dataclasses.dataclass(frozen=True)
class BudgetChange:
    """A holder's own change of a budget: lowered at any time, raised only by an explicit word that every report shows.

    Attributes:
        seq: Number of the entry in its account.
        time: Seconds since 1970 by the holder's clock.
        before: Budget in epsilon until then.
        after: Budget in epsilon from then on.
    """

    seq: int
    time: int
    before: float
    after: float


@dataclasses.dataclass
class Account:
    """One data set's running state, rebuilt from its entries.

    Attributes:
        identity: Random data-set identity, 32 hex digits.
        grant: The budget and its order.
        population: What the grant says this data set is part of (public words).
        apart: Populations of which the holder's signed statement says that no person is in this one too.
        public_key: The holder's Ed25519 key for this account.
        heads: SHA-256 of every entry, by its number.
        link: What the next entry names as the one before it: SHA-256 of the last entry's hash and signature.
        unsigned: Number of entries of version 1, which are chained but not signed; all others are both.
        spent_rdp: Everything charged, in Renyi divergence at the grant's order.
        charges: Number of charges.
        test: Whether a test noise source was ever used.
        commitment: Last keyed commitment to the content.
        version: Version of the last entry; an account never goes back to an older one.
        time: Latest time of any entry, in seconds since 1970.
        backwards: Entries whose time is before that of an earlier one: the holder's clock was set back. They count.
        changes: The holder's own changes of the budget; the order of the filter never changes.
        jobs: Per job: plan digest, allowed joins, what each charge pays for, charges made, the request charged per
            round, the round of each charge entry by its number, and the number of each round's latest charge entry;
            participations in a matrix count as entries of their round, and their job as one charge.
    """

    identity: str
    name: str
    grant: Grant
    population: str
    apart: tuple[str, ...] = ()
    public_key: str = ""
    heads: list[str] = dataclasses.field(default_factory=list)
    link: str = _GENESIS
    unsigned: int = 0
    spent_rdp: float = 0.0
    charges: int = 0
    test: bool = False
    commitment: str = ""
    version: int = 1
    time: int = 0
    backwards: int = 0
    changes: list[BudgetChange] = dataclasses.field(default_factory=list)
    jobs: dict[str, _JobState] = dataclasses.field(default_factory=dict)

    @property
    def spent(self) -> float:
        """Epsilon of everything charged, at the holder's delta."""
        return self.grant.epsilon_of(self.spent_rdp)


@dataclasses.dataclass
class _JobState:
    plan: str
    joins: int
    events: tuple[Event, ...]
    turns: Turns | None = None
    cost: float = 0.0
    charges: int = 0
    rounds: dict[int, str] = dataclasses.field(default_factory=dict)
    entries: dict[int, int] = dataclasses.field(default_factory=dict)
    latest: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def whole(self) -> tuple[Event, ...]:
        """The most that the job may release, all its joins; a matrix is one release, however many rounds it has."""
        return self.events if self.turns is not None else repeated(self.events, self.joins)


class Ledger:
    """Accounts as their entries tell them: what is read is checked line by line, whoever reads it.

    Holds no secret: chains are checked by their hashes and signatures by the public keys in the grants, so a copy can
    be read by anybody. `Book` adds the holder's key, the file and the gate.
    """

    def __init__(self, path: Path, population: str | None = None) -> None:
        """Starts without an entry.

        Args:
            path: What the entries are read from, for messages.
            population: Whose accounts are meant; needed only where there are several populations.
        """
        self._path = path
        self._accounts: dict[str, Account] = {}
        self._populations: dict[str, dict[str, Account]] = {}
        self._population = population
        self._vouched: dict[str, str] | None = None

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def accounts(self) -> Mapping[str, Account]:
        """Accounts of the book's population by the holder's own names, as last read.

        Raises:
            LedgerError: The book holds several populations, and it was not opened for one of them.
        """
        if self._population is None:
            if len(self._populations) > 1:
                raise LedgerError(
                    f"expected to be told which of the populations in {self._path} is meant, got none; name one of "
                    f"{sorted(self._populations)}"
                )
            self._population = next(iter(self._populations), None)
        return self._populations.get(self._population or "", {})

    @property
    def populations(self) -> frozenset[str]:
        """The populations whose accounts the book holds."""
        return frozenset(self._populations)

    @property
    def vouched(self) -> Mapping[str, str]:
        """The text of the receipt that each paid entry stands for, by the entry's hash; empty where nobody asked.

        Each is what the chain says, with the budget that the chain gives at that place, and with the signature that
        stands in the chain: the account's last signature, which was checked, binds all of it. So a receipt of the very
        same text is one that its holder vouched for. Of any other text, nothing here proves anything. Entries of
        version 1 bind no signature and have none.
        """
        return self._vouched or {}

    def _damaged(self, line: int, why: str) -> LedgerError:
        return LedgerError(
            f"expected an unbroken ledger in {self._path}, got {why} at line {line}; restore it from a backup, "
            "it is never reset"
        )

    def _take(self, added: bytes) -> None:
        """Checks and adds whole lines, each with its line end."""
        last: dict[str, tuple[int, dict[str, Any]]] = {}
        for number, line in enumerate(added[:-1].split(b"\n"), start=1):
            entry = self._apply(line, number)
            last[entry["account"]] = number, entry
        # An account's last entry binds all before it, so its signature vouches for the whole chain.
        for number, entry in last.values():
            self._require_signed(entry, number)

    def _is_own(self, identity: str, key: str) -> bool:
        """Whether a key in a grant is its account's; without the holder's secret only its signatures can tell."""
        return True

    def _apply(self, line: bytes, number: int) -> dict[str, Any]:
        """Checks one line against its chain and adds it to its account; returns the entry."""
        if len(line) > _LINE_BYTES:
            raise self._damaged(number, "an overlong line")
        try:
            entry, unchanged, event = _entry_of(line)
            version, identity, seq, prev = entry["v"], entry["account"], entry["seq"], entry["prev"]
            if (type(version), type(identity), type(seq)) != (int, str, int):
                raise TypeError("another type")
            known = set(entry) == _ENTRY_KEYS - ({"sig"} if version == 1 else set())
        except (ValueError, TypeError, KeyError, AttributeError):
            raise self._damaged(number, "a line that is not an entry") from None
        if not 1 <= version <= _VERSION:
            raise self._damaged(number, f"an entry of version {version!r} (this program knows 1 to {_VERSION})")
        if not unchanged or not known:
            raise self._damaged(number, "an entry whose hash does not match it")
        account = self._accounts.get(identity)
        expected = (len(account.heads), account.link) if account else (0, _GENESIS)
        if (seq, prev) != expected:
            raise self._damaged(number, "an entry out of its chain")
        if version == 1 and account is not None and account.unsigned < len(account.heads):
            raise self._damaged(number, "an unsigned entry after signed ones")
        if account is not None and version < account.version:
            raise self._damaged(number, "an entry of an older version after a newer one")
        try:
            self._add(account, entry)
        except (KeyError, TypeError, ValueError, TacitError) as error:
            raise self._damaged(number, f"an entry that cannot be read ({error})") from None
        if self._vouched is not None and account is not None and version > 1 and entry["kind"] in PAID:
            self._vouched[entry["hash"]] = _receipt_text(account, entry, event)
        return entry

    def _require_signed(self, entry: dict[str, Any], number: int) -> None:
        """Refuses an entry that its account's key did not sign; entries of version 1 have no signature."""
        if entry["v"] == 1:
            return
        account = self._accounts[entry["account"]]
        try:
            if entry["kind"] in PAID:
                message = _receipt(account, entry).signed_bytes()
            else:
                message = _statement(entry["hash"])
            verify(account.public_key, message, entry["sig"])
        except (LedgerError, KeyError, TypeError, ValueError):
            raise self._damaged(number, "an entry without the holder's signature") from None

    def _add(self, account: Account | None, entry: Mapping[str, Any]) -> None:
        """Adds an entry that is known to be unbroken and in its place."""
        identity, kind, body = entry["account"], entry["kind"], entry["body"]
        if type(entry["time"]) is not int:
            raise TypeError("a time that is no whole number of seconds")
        if (kind == "grant") != (account is None):
            raise ValueError("an account starts with exactly one grant")
        if account is None:
            grant = grant_of(body)
            population, apart = body["population"], tuple(body["apart"]) if entry["v"] > 1 else ()
            if body["name"] in self._populations.get(population, {}):
                raise ValueError(f"a second account named {body['name']!r}")
            if not self._is_own(identity, body["key"]):
                raise ValueError("it belongs to another ledger.key")
            if not set(apart) >= self._populations.keys() - {population}:
                raise ValueError("another population without the statement that no person is in both")
            account = Account(
                identity=identity,
                name=body["name"],
                grant=grant,
                population=population,
                apart=apart,
                public_key=body["key"],
            )
            self._accounts[identity] = account
            self._populations.setdefault(population, {})[account.name] = account
        elif kind == "commit":
            if body["job"] in account.jobs:
                raise ValueError("a second commitment to one job")
            events, turns = events_of(body["event"]), Turns(**body["matrix"]) if "matrix" in body else None
            if entry["v"] > 2:
                _require_terms(body, events[0])
            whole = any(event.kind is Kind.MATRIX_GAUSSIAN for event in events)
            if (turns is not None) != whole or (turns is not None and (len(events), events[0].steps) != (1, 1)):
                raise ValueError("a matrix without its one event, or the other way round")
            if type(body["joins"]) is not int or body["joins"] < 1:
                raise ValueError("a commitment to no number of charges")
            if turns is not None and body["joins"] != turns.participations:
                raise ValueError("a matrix with another number of joins than its participations")
            account.jobs[body["job"]] = _JobState(
                plan=body["plan"],
                joins=body["joins"],
                events=events,
                turns=turns,
                cost=rdp(events, account.grant.order),
            )
        elif kind in PAID:
            job, events = account.jobs[body["job"]], events_of(body["event"])
            # What a job committed is the most it may release: reports price it whole, and `claim` releases no other.
            if events != job.events:
                raise ValueError("a charge for other releases than its job committed")
            if (job.charges if job.turns is None else len(job.entries)) >= job.joins:
                raise ValueError("more charges than its job committed")
            # Both are the same for all charges of a job.
            mine = (account.grant.unit, account.grant.adjacency)
            if not job.entries and {(event.unit, event.adjacency) for event in events} != {mine}:
                raise ValueError("a release for another unit or adjacency than the grant's")
            _require_turn(job, kind, events, body["round"])
            if kind == "charge":
                # What the job committed is what is paid for, and an account's order never changes.
                account.spent_rdp += job.cost
                account.charges += 1
                job.charges += 1
            account.test |= body["noise"] != SECURE_SOURCE
            account.commitment = body["commitment"] or account.commitment
            job.rounds[body["round"]] = body["request"]
            job.entries[entry["seq"]] = body["round"]
            job.latest[body["round"]] = entry["seq"]
            if entry["v"] > 1 and (body["charges"], body["test"]) != (account.charges, account.test):
                raise ValueError("it miscounts its account")
        elif kind == "budget" and entry["v"] > 2:
            changed = dataclasses.replace(account.grant, epsilon=body["epsilon"])
            if body["before"] != account.grant.epsilon or body["raised"] is not (
                changed.epsilon > account.grant.epsilon
            ):
                raise ValueError("a change of another budget")
            if changed.budget_rdp * (1 + _SLACK) < account.spent_rdp:
                raise ValueError("a budget below what was spent")
            account.changes.append(
                BudgetChange(entry["seq"], entry["time"], account.grant.epsilon, float(changed.epsilon))
            )
            account.grant = changed
        else:
            raise ValueError(f"the unknown kind {kind!r}")
        account.version = entry["v"]
        account.backwards += entry["time"] < account.time
        account.time = max(account.time, entry["time"])
        account.heads.append(entry["hash"])
        account.link = _link(entry)
        account.unsigned += entry["v"] == 1


class Book(Ledger):
    """An append-only file of accounts; see the module's text for its promises.

    Several processes may hold the same book: every charge takes the file's lock and first reads what others added.
    """

    def __init__(self, folder: Path, population: str | None = None, *, vouch: bool = False) -> None:
        """Opens the book in ``folder``, making an empty one where there is none.

        Args:
            folder: Where the book lies.
            population: Whose accounts are meant; needed only where the book holds several populations.
            vouch: Whether to keep in memory which receipts its chains stand for, see `vouched`.

        Raises:
            LedgerError: The book is damaged, cut, foreign, or of a newer version; it is left as it is.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise LedgerError(f"expected a folder for ledgers at {folder}, got {error.strerror}") from None
        super().__init__(folder / "ledger.jsonl", population)
        self._vouched = {} if vouch else None
        self._mark = _Mark(folder / _MARK)
        self._claimed: set[str] = set()
        # What was read so far: its length, and its digest that can be carried on.
        self._size = 0
        self._running = hashlib.sha256()
        self._process = os.getpid()
        self._threads = threading.RLock()
        try:
            self.secret = Secret.load_or_create(folder / "ledger.key")
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            # A synced file whose name is not on disk yet could be lost with all its spend.
            sync_folder(folder)
        except OSError as error:
            raise LedgerError(
                f"expected ledgers that can be read and written in {folder}, got {error.strerror}"
            ) from None
        self._file = descriptor
        self.close = weakref.finalize(self, _close, descriptor, self._mark)
        with self._locked():
            self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def refresh(self) -> None:
        """Reads what other processes appended."""
        with self._locked():
            self._catch_up()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # A forked child shares its parent's file lock, and a closed book's descriptor may already be another file's.
        if os.getpid() != self._process or not self.close.alive:
            raise LedgerError(f"expected {self._path} to be open in this process, got a closed book or a copy; open it")
        # Threads share the file lock too.
        with self._threads:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _open(self) -> None:
        """Reads the book from its start; makes the mark of an empty one, and of one that had intents.

        Raises:
            LedgerError: The ledger was cut or edited, or what could tell is gone or broken; it is left as it is.
        """
        intents = self._finish_by_intent()
        size = os.fstat(self._file).st_size
        found = self._mark.find()
        if not found and size and not intents:
            raise LedgerError(
                f"expected {_MARK} beside {self._path}, got none: without it nothing tells whether the ledger was cut; "
                "restore both from one backup, or move the ledger away and `tacit client import` it as a copy"
            )
        if found:
            self._recover()
        else:
            # Nothing was ever appended, or an intent vouches for the end.
            data = self._read(size, 0)
            self._count(data)
        try:
            if not found:
                os.fdatasync(self._file)
                self._mark.make(self._size, self._running.hexdigest())
            for path in intents:
                path.unlink()
            if intents:
                # An intent that came back after later appends might contradict them.
                sync_folder(self._path.parent)
        except OSError as error:
            raise LedgerError(f"expected to write {_MARK} beside {self._path}, got {error.strerror}") from None

    def _finish_by_intent(self) -> list[Path]:
        """Finishes what the newest whole intent announced, where a book still has one.

        Returns:
            The intents, the newest last: as long as any is there, that one is.

        Raises:
            LedgerError: The ledger was cut or edited, or what could tell is broken; it is left as it is.
        """
        paths = [self._path.with_name(name) for name in _INTENTS]
        found = [_Intent.read(path) for path in paths]
        if found == [None, None]:
            return []
        whole = [(intent.base, index, intent) for index, intent in enumerate(found) if intent and intent.whole]
        if not whole:
            raise LedgerError(f"expected an unbroken intent in {paths[0]}, got changed bytes; restore a backup")
        _, index, newest = max(whole, key=lambda of: of[:2])
        other = found[1 - index]
        size = os.fstat(self._file).st_size
        if size < newest.base:
            raise self._cut(newest.base, size)
        # A crash tears an intent only between two appends; at any other size the broken one was the newest.
        if other is not None and not other.whole and size != newest.end:
            raise LedgerError(f"expected an unbroken intent in {paths[1 - index]}, got changed bytes; restore a backup")
        # The older one was appended whole before the newest was announced.
        if other is not None and other.whole and self._read(len(other.batch), other.base) != other.batch:
            raise LedgerError(f"expected {self._path} to hold its older intent, got other bytes; restore a backup")
        tail = self._read(len(newest.batch), newest.base)
        if not newest.batch.startswith(tail):
            raise LedgerError(f"expected {self._path} to hold its intent, got other bytes; restore a backup")
        if len(tail) < len(newest.batch):
            # The crash may have come after the caller was promised nothing; finishing it over-counts at worst.
            try:
                # A killed process may have left it unsynced; a power cut here must not tear both files.
                _sync(paths[index])
                if os.write(self._file, newest.batch[len(tail) :]) != len(newest.batch) - len(tail):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fdatasync(self._file)
            except OSError as error:
                raise LedgerError(
                    f"expected to finish a torn charge in {self._path}, got {error.strerror}; free some space"
                ) from None
        return [path for at, path in enumerate(paths) if at != index and found[at]] + [paths[index]]

    def _cut(self, least: int, size: int) -> LedgerError:
        return LedgerError(
            f"expected at least {least} bytes in {self._path}, got {size}: it was cut; restore it from a backup"
        )

    def _recover(self) -> None:
        """Reads what is new, checks it against the mark, and drops what a crash tore beyond the mark.

        Raises:
            LedgerError: The ledger was cut or edited, or its mark is broken; it is left as it is.
        """
        if not self._mark.find():
            raise LedgerError(f"expected {_MARK} beside {self._path}, got none any more; restore it from a backup")
        mark, size = self._mark, os.fstat(self._file).st_size
        if size < mark.end:
            raise self._cut(mark.end, size)
        added = self._read(size - self._size, self._size)
        # What is beyond this book's own reading was told to somebody only if the mark covers it.
        covered = max(0, mark.end - self._size)
        before = self._running.copy()
        before.update(added[:covered])
        if mark.end >= self._size and before.hexdigest() != mark.digest:
            raise LedgerError(
                f"expected {self._path} to be what its mark says, got other bytes; restore both from one backup"
            )
        nul = added.find(b"\0", covered)
        # Up to the end of the last whole line before the first that is torn.
        kept = max(covered, added.rfind(b"\n", covered, nul if nul >= 0 else len(added)) + 1)
        # First, for a ledger that is refused is left as it is.
        self._count(added[:kept])
        try:
            if kept < len(added):
                os.ftruncate(self._file, self._size)
            if self._size > mark.end or kept < len(added):
                # A killed process may have left its lines unsynced, and the mark must not be ahead of the disk.
                os.fsync(self._file)
            if self._size > mark.end:
                mark.write(self._size, self._running.hexdigest())
        except OSError as error:
            raise LedgerError(
                f"expected to settle a torn charge in {self._path}, got {error.strerror}; free some space"
            ) from None

    def _read(self, count: int, start: int) -> bytes:
        return _pread(self._file, count, start)

    def _catch_up(self) -> None:
        size = os.fstat(self._file).st_size
        if size < self._size:
            raise LedgerError(f"expected {self._path} to grow only, got {size} bytes after {self._size}; it was cut")
        if size > self._size:
            # Another book wrote, or died while it did.
            self._recover()

    def _count(self, added: bytes) -> None:
        """Checks and counts the whole lines that follow what was read so far."""
        if not added:
            return
        if not added.endswith(b"\n"):
            raise self._damaged(added.count(b"\n") + 1, "a line without an end: it was cut")
        self._take(added)
        self._running.update(added)
        self._size += len(added)

    def _is_own(self, identity: str, key: str) -> bool:
        return key == self.secret.identity(identity).public_key

    # -- writing ------------------------------------------------------------------------------------------------

    def grant(self, grants: Mapping[str, Grant], *, population: str, no_person_in_common: bool = False) -> None:
        """Opens an account for each name that has none; existing accounts keep their budget and their spend.

        Args:
            grants: Budgets by the holder's own names of its data sets.
            population: Public words for the persons whose records these data sets are parts of.
            no_person_in_common: The holder's statement that nobody in this population is in any other that the book
                holds. It is written into the grant and signed with it; without it another population is refused.

        Raises:
            LedgerError: The book belongs to another population, and no statement was made.
        """
        with self._locked():
            self._catch_up()
            others = sorted(self._populations.keys() - {population})
            known = self._populations.get(population)
            if others and known is None and not no_person_in_common:
                raise LedgerError(
                    f"expected the ledgers of {population!r}, got those of {others[0]!r}: another split of the same "
                    "records would hide their spend; use a folder of its own, or the same settings, or state "
                    "no-person-in-common where nobody is in both"
                )
            apart = sorted(set(others).union(*(account.apart for account in (known or {}).values())))
            lines = []
            for name, grant in grants.items():
                if name not in (known or {}):
                    identity = os.urandom(16).hex()
                    key = self.secret.identity(identity)
                    fields = {"name": name, "population": population, "apart": apart, "key": key.public_key}
                    entry = _entry(identity, 0, _GENESIS, "grant", dataclasses.asdict(grant) | fields)
                    entry["sig"] = key.sign(_statement(entry["hash"]))
                    lines.append(entry)
            self._append(lines)
            self._population = population

    def set_budget(self, name: str, epsilon: float, *, may_raise: bool = False) -> Account:
        """Changes the budget of an account that exists: the holder's own act, out of any job's reach (guarantee G2).

        The delta and the order of the filter stay as they were granted. Lowering is always sound. Raising lets more be
        released than was promised when the earlier releases were made, so it needs a word of its own, is written down
        for ever, and every report shows it.

        Args:
            name: The holder's own name of the data set.
            epsilon: The new budget, not below what was spent.
            may_raise: The holder's explicit word that the budget may grow.

        Returns:
            The account as it is now; equal to before where the budget is already that.

        Raises:
            LedgerError: There is no such account, or more was spent already.
            PlanError: The new budget is none, or it is larger and may not be.
        """
        with self._locked():
            self._catch_up()
            account = self.accounts.get(name)
            if account is None:
                raise LedgerError(f"expected an account named {name!r}, got none; grant it a budget first")
            try:
                grant = dataclasses.replace(account.grant, epsilon=epsilon)
            except PlanError as error:
                raise PlanError(f"{error}; the order was fixed with the first budget and does not change") from None
            if epsilon == account.grant.epsilon:
                return account
            raised = epsilon > account.grant.epsilon
            require(
                may_raise or not raised,
                f"expected a budget of at most the {account.grant.epsilon:g} that was promised, got {epsilon:g}; "
                "raising it breaks that promise: say so with --raise, and every report will show it",
            )
            if grant.budget_rdp * (1 + _SLACK) < account.spent_rdp:
                raise LedgerError(
                    f"expected a budget of at least the {account.spent:.6g} that was spent, got {epsilon:g}; what is "
                    "spent cannot be taken back, the least that closes the account is that figure rounded up"
                )
            body = {"epsilon": epsilon, "before": account.grant.epsilon, "raised": raised}
            entry = _entry(account.identity, len(account.heads), account.link, "budget", body)
            entry["sig"] = self.secret.identity(account.identity).sign(_statement(entry["hash"]))
            self._append([entry])
            return account

    def content(self) -> bytes:
        """Returns the entries that were read so far, as they stand in the file; they hold no secret."""
        with self._locked():
            return self._read(self._size, 0)

    def absorb(self, data: bytes) -> int:
        """Continues this book with a copy of it that is longer; see `privacy.transcript.import_into`.

        Args:
            data: The lines of the copy, which were checked with public keys already.

        Returns:
            How many entries were added; 0 where the copy has nothing new.

        Raises:
            LedgerError: The copy is not this book's own continuation; nothing was changed.
        """
        with self._locked():
            self._catch_up()
            mine = self._read(self._size, 0)
            if mine.startswith(data):
                return 0
            if not data.startswith(mine):
                raise LedgerError(
                    f"expected a copy that goes on where {self._path} ends, got one that went another way; nothing was "
                    "imported, because spend would be lost. Whichever peers hold receipts of is the true one"
                )
            entries = [_loads(line) for line in data[len(mine) : -1].split(b"\n")]
            for entry in entries:
                if entry["kind"] == "grant" and not self._is_own(entry["account"], entry["body"]["key"]):
                    raise LedgerError(
                        f"expected a copy of this holder's own ledger, got one of another ledger.key than that beside "
                        f"{self._path}; put the key's backup there first"
                    )
            self._append(entries)
            return len(entries)

    def charge(self, requests: Sequence[ChargeRequest]) -> list[Receipt | Word]:
        """Charges a cohort: gates each request, writes all entries, and syncs once.

        Guarantees:
            Ahead: when this returns, every admitted charge is on disk.
            Gate: no account ever passes its budget, whatever is asked and by how many processes.
            Bound: a (job, round) is only ever charged for one request, and one plan; a job's charges never exceed the
                joins that its plan committed.
            Turns: a matrix is charged whole, once, before its first round is joined; its later rounds are admitted
                only as its price assumes (guarantee G16), each with an entry and a receipt of its own.

        Args:
            requests: At most one per account; accounts must have been granted.

        Returns:
            One receipt or one fixed word per request, in order.

        Raises:
            LedgerError: An account does not exist, the disk is full, or the book is damaged.
        """
        if len({request.name for request in requests}) < len(requests):
            raise LedgerError("expected at most one request per account, got two for one; charge them one by one")
        with self._locked():
            self._catch_up()
            entries: list[dict[str, Any]] = []
            outcomes: list[Receipt | Word] = []
            for request in requests:
                account = self.accounts.get(request.name)
                if account is None:
                    raise LedgerError(f"expected an account named {request.name!r}, got none; grant it a budget first")
                word = _gate(account, request)
                if word is None:
                    added, receipt = self._charge_entries(account, request)
                    entries += added
                outcomes.append(word or receipt)
            self._append(entries)
            return outcomes

    def _charge_entries(self, account: Account, request: ChargeRequest) -> tuple[list[dict[str, Any]], Receipt]:
        """Returns the signed entries of one charge, and its receipt, whose signature the charge entry carries."""
        key = self.secret.identity(account.identity)
        seq, prev = len(account.heads), account.link
        entries: list[dict[str, Any]] = []
        # One charge for all that a round's reply holds: both or none is paid for, and one receipt signs them together.
        events, matrix = request.events, request.matrix
        cost, kind = rdp(events, account.grant.order), "charge"
        if request.job not in account.jobs:
            body = {
                "job": request.job,
                "plan": request.plan.digest(),
                "joins": request.plan.joins,
                "event": events_to_json(events),
                "code": request.code,
                "settings": request.settings,
                "sampling": Law.of(events[0], request.noise).value,
            }
            if matrix is not None:
                body |= {"joins": matrix.turns.participations, "matrix": dataclasses.asdict(matrix.turns)}
            commit = _entry(account.identity, seq, prev, "commit", body)
            commit["sig"] = key.sign(_statement(commit["hash"]))
            entries.append(commit)
            seq, prev = seq + 1, _link(commit)
        elif matrix is not None:
            cost, kind = 0.0, "participation"
        body = {
            "job": request.job,
            "round": request.round,
            "request": request.request,
            "event": events_to_json(events),
            "commitment": request.commitment,
            "noise": request.noise,
            # A rolled-back ledger that charges the same request within the same second must still get another hash.
            "nonce": os.urandom(16).hex(),
            # What the receipt says is written down too: it must not change when an accountant's rounding does.
            "spent": account.grant.epsilon_of(account.spent_rdp + cost),
            "charges": account.charges + (kind == "charge"),
            "test": account.test or request.noise != SECURE_SOURCE,
        }
        charge = _entry(account.identity, seq, prev, kind, body)
        receipt = _receipt_fields(charge, float(account.grant.epsilon), float(account.grant.delta), account.public_key)
        # Signed once and made once: what is signed is all of it but the signature.
        charge["sig"] = key.sign(_RECEIPT_MARK + canonical(receipt | {"event": body["event"]}))
        entries.append(charge)
        return entries, Receipt(**receipt, event=events[0], metrics=events[1:], signature=charge["sig"])

    def claim(self, receipt: Receipt, request: ChargeRequest) -> None:
        """Takes the one release that a charge pays for.

        Guarantees:
            Once: no two releases are made under one charge by this process, whoever hands over its receipt; a charge
                that a later one for the same round has replaced pays for nothing any more (guarantee G9).

        Raises:
            LedgerError: The receipt is for another request, is not this book's latest for it, was claimed before, does
                not pay for everything that the plan releases, or does not name the test noise that is about to be used.
        """
        account = self.accounts.get(request.name)
        if account is None or receipt.seq >= len(account.heads):
            self.refresh()
            account = self.accounts.get(request.name)
        asked, got = ((of.job, of.round, of.request) for of in (request, receipt))
        if account is None or receipt.account != account.identity or asked != got:
            raise LedgerError("expected a receipt for this request, got another; nothing was released")
        job = account.jobs.get(request.job)
        if job is None or job.latest.get(request.round) != receipt.seq or account.heads[receipt.seq] != receipt.head:
            raise LedgerError("expected a receipt that this holder's ledger holds, got another; nothing was released")
        if not receipt.events == job.events == request.events:
            raise LedgerError("expected a charge for all that this round releases, got another; nothing was released")
        if request.noise != SECURE_SOURCE and not receipt.test:
            raise LedgerError("expected a charge that names its test noise, got one for the production source")
        with self._threads:
            if receipt.head in self._claimed:
                raise LedgerError("expected a charge that paid for nothing yet, got one already used; charge it anew")
            self._claimed.add(receipt.head)

    def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Writes signed entries with one sync, marks the new end, and then counts them."""
        if not entries:
            return
        lines = b"".join(map(_line, entries))
        size, running = self._size + len(lines), self._running.copy()
        running.update(lines)
        try:
            if self._mark.end < self._size:
                # The mark of the append before failed: it is never two appends behind.
                os.fdatasync(self._file)
                self._mark.write(self._size, self._running.hexdigest())
            if os.write(self._file, lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fdatasync(self._file)
        except OSError as error:
            # Nothing was promised yet, so nothing was touched: take the half-written lines back and refuse. What stays
            # all the same is beyond the mark, and is settled by whoever reads the book next.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
                os.fsync(self._file)
            raise LedgerError(
                f"expected to write a charge to {self._path}, got {error.strerror}; free some space, nothing was spent"
            ) from None
        # Not before the sync: a mark ahead of the disk would lock a sound ledger after a power cut. The entries are on
        # disk, and spent, whether or not it can be written.
        with contextlib.suppress(OSError):
            self._mark.write(size, running.hexdigest())
        for entry in entries:
            self._add(self._accounts.get(entry["account"]), entry)
        # Last: a book that is interrupted before reads the lines again, finds them out of its chain, and is refused.
        self._size, self._running = size, running


class _Mark:
    """Where a ledger ends and what it is up to there, in two slots that are overwritten in turn.

    Attributes:
        end: Bytes of the ledger that are covered, as last read or written.
        digest: SHA-256 of these bytes, in hex.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._turn = 0
        self.end = 0
        self.digest = ""

    def find(self) -> bool:
        """Reads the newest slot that is whole; False where there is no mark.

        Raises:
            LedgerError: Both slots are broken, which no crash explains, or the file cannot be read.
        """
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDWR)
            whole = _slots(_pread(self._file, _SLOTS[-1] + _SLOTS[1], 0))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise LedgerError(f"expected a mark that can be read in {self._path}, got {error.strerror}") from None
        if not whole:
            raise LedgerError(
                f"expected a whole slot in {self._path}, got changed bytes; restore it and the ledger from one backup, "
                "or move both away and `tacit client import` the ledger as a copy"
            )
        self.end, newest, self.digest = max(whole)
        self._turn = 1 - newest
        return True

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def make(self, end: int, digest: str) -> None:
        """Makes the file, with both slots, whole and synced before it takes its name; slots then change no size.

        Raises:
            OSError: The disk is full.
        """
        temporary = self._path.with_name("ledger.new")
        slot = _slot(end, digest)
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(b"".join(slot.ljust(_SLOTS[1], b"\0") for _ in _SLOTS))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(self._path.parent)
        self._file = os.open(self._path, os.O_RDWR)
        self.end, self.digest = end, digest

    def write(self, end: int, digest: str) -> None:
        """Overwrites the older slot. Not synced: the ledger must be, before.

        Raises:
            OSError: It could not be written whole; the newer slot stays.
        """
        slot = _slot(end, digest)
        if self._file is None or os.pwrite(self._file, slot, _SLOTS[self._turn]) != len(slot):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._turn = 1 - self._turn
        self.end, self.digest = end, digest


def _close(descriptor: int, mark: _Mark) -> None:
    os.close(descriptor)
    mark.close()


def _slot(end: int, digest: str) -> bytes:
    text = b"tacit/mark/1 %020d %s " % (end, digest.encode())
    return text + hashlib.sha256(text).hexdigest().encode() + b"\n"


def _slots(data: bytes) -> list[tuple[int, int, str]]:
    """Returns the end, the number and the digest of each slot of a mark that is whole."""
    matches = [(index, _SLOT.match(data, start)) for index, start in enumerate(_SLOTS)]
    return [
        (int(match[2]), index, match[3].decode())
        for index, match in matches
        if match and hashlib.sha256(match[1]).hexdigest().encode() == match[4]
    ]


def may_hold_charges(folder: Path) -> bool:
    """Says whether the book in a folder holds a charge, announces one, or was cut and may have held one.

    Only a book of which this is false may ever be removed by a program.
    """
    texts = {path.name: path.read_bytes() for path in map(folder.joinpath, ("ledger.jsonl", *GUARDS)) if path.is_file()}
    covered = max((slot[0] for slot in _slots(texts.get(_MARK, b""))), default=math.inf if _MARK in texts else 0)
    return covered > len(texts.get("ledger.jsonl", b"")) or any(b'"kind":"charge"' in text for text in texts.values())


@dataclasses.dataclass(frozen=True)
class _Intent:
    """A batch that was announced before its append, or what is left of one.

    Attributes:
        base: Where in the ledger it belongs, in bytes.
        batch: Its lines.
        whole: Whether it is as it was written; otherwise the other two say nothing.
    """

    base: int
    batch: bytes
    whole: bool

    @property
    def end(self) -> int:
        """Where the ledger ends once it holds the batch."""
        return self.base + len(self.batch)

    @staticmethod
    def _sealed(base: int, batch: bytes) -> str:
        # The place is sealed too: a torn header before an older batch must not move that batch.
        return hashlib.sha256(b"tacit/intent/2\n%d\n%d\n" % (base, len(batch)) + batch).hexdigest()

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Reads an intent of this format or of the first one (base and digest, then the batch); None without a file."""
        try:
            head, _, batch = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        try:
            base, *length, digest = _loads(head)
            if type(base) is not int or base < 0 or len(length) > 1:
                raise ValueError("not a position in a file")
            if not length:
                return cls(base, batch, hashlib.sha256(batch).hexdigest() == digest)
            if type(length[0]) is not int or length[0] < 0:
                raise ValueError("not a length")
            batch = batch[: length[0]]
            return cls(base, batch, len(batch) == length[0] and cls._sealed(base, batch) == digest)
        except (ValueError, TypeError):
            return cls(0, b"", whole=False)


def _pread(file: int, count: int, start: int) -> bytes:
    """Returns ``count`` bytes from ``start``, or as many as there are; one system call reads 2 GiB at most."""
    parts = []
    while count > 0 and (part := os.pread(file, count, start)):
        parts.append(part)
        count, start = count - len(part), start + len(part)
    return b"".join(parts)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _loads(text: str | bytes) -> Any:
    """Reads JSON.

    Raises:
        ValueError: It is not JSON, names a number that is none, or nests too deep.
    """
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError("nested too deep") from None


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is not a number")


# Made once: making one costs as much as reading a line with it.
_DECODER: Final = json.JSONDecoder(parse_constant=_no_number)


def _digest(entry: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of an entry without its hash and its signature."""
    return hashlib.sha256(canonical({key: entry[key] for key in entry if key not in ("hash", "sig")})).hexdigest()


def _entry_of(line: bytes) -> tuple[dict[str, Any], bool, str]:
    """Returns the entry that a line holds, and whether the line is the one text of it and its hash is its own.

    Third comes the text of its events, where the line is plain; see `_paid_entry`.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: It is no entry.
    """
    if (own := _paid_entry(line.decode())) is not None:
        entry, hashed, event = own
        return entry, hashlib.sha256(hashed).hexdigest() == entry["hash"], event
    entry = _loads(line)
    return entry, canonical(entry) == line and _digest(entry) == entry["hash"], ""


def _paid_entry(line: str) -> tuple[dict[str, Any], bytes, str] | None:
    """Reads a line that is a canonical charge by its shape, as nearly all lines of a long ledger are.

    Returns:
        The entry, the text that its hash is of, and the text of its events; None for any other line, sound or not.
    """
    match = _PAID_LINE.fullmatch(line)
    if match is None:
        return None
    groups = match.groups()
    start, account, charges, commitment, event, job, noise, nonce, request, number, spent, test = groups[:12]
    digest, middle, kind, prev, seq, signature, end, seconds, version = groups[12:]
    events, figure = _events_of_text(event), float(spent)
    if events is None or repr(figure) != spent:
        return None
    body = {
        "charges": int(charges),
        "commitment": commitment,
        "event": events[0],
        "job": job,
        "noise": noise,
        "nonce": nonce,
        "request": request,
        "round": int(number),
        "spent": figure,
        "test": test == "true",
    }
    entry = {
        "account": account,
        "body": body,
        "hash": digest,
        "kind": kind,
        "prev": prev,
        "seq": int(seq),
        "sig": signature,
        "time": int(seconds),
        "v": int(version),
    }
    return entry, f"{start},{middle},{end}".encode(), event


@functools.lru_cache(maxsize=1024)
def _events_of_text(text: str) -> tuple[Any, tuple[Event, ...]] | None:
    """Returns what a text pays for, as plain JSON and read, or None where it is not the one text of any events.

    A ledger has few such texts, each thousands of times.
    """
    try:
        value = _loads(text)
        events = events_from_json(value)
    except (LedgerError, ValueError, TypeError):
        return None
    return (value, events) if canonical(events_to_json(events)).decode() == text else None


class _Made(dict[str, Any]):
    """An entry of this program's own, with the canonical texts of its body and of its account, encoded once."""

    texts: tuple[str, str]


def _entry(identity: str, seq: int, prev: str, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an entry with its hash, to be signed in place."""
    entry = _Made(v=_VERSION, account=identity, seq=seq, prev=prev, kind=kind, time=int(time.time()), body=body)
    entry.texts = account, text = encode_basestring_ascii(identity), canonical(body).decode()
    # The canonical text of all of it, with its keys in order.
    whole = (
        f'{{"account":{account},"body":{text},"kind":"{kind}","prev":"{prev}","seq":{seq},"time":{entry["time"]},'
        f'"v":{_VERSION}}}'
    )
    entry["hash"] = hashlib.sha256(whole.encode()).hexdigest()
    return entry


def _line(entry: Mapping[str, Any]) -> bytes:
    """Returns one line of the book.

    Raises:
        LedgerError: It is too long. What could not be read back must not be written: it would lock the ledger.
    """
    if type(entry) is _Made:
        account, text = entry.texts
        line = (
            f'{{"account":{account},"body":{text},"hash":"{entry["hash"]}","kind":"{entry["kind"]}",'
            f'"prev":"{entry["prev"]}","seq":{entry["seq"]},"sig":"{entry["sig"]}","time":{entry["time"]},'
            f'"v":{entry["v"]}}}\n'
        ).encode()
    else:
        line = canonical(entry) + b"\n"
    if len(line) > _LINE_BYTES:
        raise LedgerError(f"expected an entry of at most {_LINE_BYTES} bytes, got {len(line)}; use shorter names")
    return line


def _link(entry: Mapping[str, Any]) -> str:
    """Returns what the entry after this one names it by; signatures are in it, or one could be changed unseen."""
    if entry["v"] == 1:
        return str(entry["hash"])
    return hashlib.sha256(f"{entry['hash']}{entry['sig']}".encode()).hexdigest()


def _statement(digest: str) -> bytes:
    """Returns what is signed for an entry that is not a charge."""
    return b"tacit/entry/2\n" + digest.encode()


def require_signed_entry(entry: Mapping[str, Any], key: str) -> None:
    """Checks a grant, a commitment or a change of budget that stands alone, outside its ledger.

    It shows that the holder of the key wrote this entry; only the whole ledger shows what came before and after.

    Raises:
        LedgerError: It was changed, or the key did not sign it, or it is of version 1, which was not signed.
    """
    try:
        sound = set(entry) == _ENTRY_KEYS and entry["kind"] not in PAID and _digest(entry) == entry["hash"]
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise LedgerError("expected a signed entry of a ledger, got another or a changed one")
    verify(key, _statement(entry["hash"]), entry["sig"])


def _require_terms(body: Mapping[str, Any], event: Event) -> None:
    """Refuses a commitment that does not say which code, which settings and which sampling law.

    Raises:
        ValueError: A term is missing, or the law is not one of the event's.
    """
    for name in ("code", "settings"):
        if not re.fullmatch("(?:[0-9a-f]{64})?", body[name]):
            raise ValueError(f"a {name} that is no SHA-256")
    if body["sampling"] not in {Law.of(event, noise).value for noise in (SECURE_SOURCE, "")}:
        raise ValueError(f"the unknown sampling law {body['sampling']!r:.40}")


def grant_of(body: Mapping[str, Any]) -> Grant:
    """Returns the budget that the body of a grant entry says.

    Raises:
        PlanError: It is no budget.
        KeyError, TypeError, ValueError: A field is missing or another word.
    """
    return Grant(
        epsilon=body["epsilon"],
        delta=body["delta"],
        order=body["order"],
        unit=Unit(body["unit"]),
        adjacency=Adjacency(body["adjacency"]),
        records_bound=body["records_bound"],
    )


def _receipt_text(account: Account, entry: Mapping[str, Any], event: str) -> str:
    """Returns the text of the receipt of a charge entry of an account whose budget is still what it was then.

    Args:
        account: The account, which holds the entry.
        entry: The entry.
        event: The text of its events where the entry's line is plain, as `_paid_entry` gives it; else empty.
    """
    if not event:
        return _receipt(account, entry).to_json()
    granted, delta, body = float(account.grant.epsilon), float(account.grant.delta), entry["body"]
    # What `canonical` would give; a plain line has nothing that is written otherwise.
    return (
        f'{{"account":"{account.identity}","charges":{body["charges"]},"delta":{delta!r},"event":{event},'
        f'"granted":{granted!r},"head":"{entry["hash"]}","job":"{body["job"]}","public_key":"'
        f'{account.public_key}","request":"{body["request"]}","round":{body["round"]},"seq":{entry["seq"]},"signature":"{entry["sig"]}",'
        f'"spent":{body["spent"]!r},"test":{"true" if body["test"] else "false"}}}'
    )


def _receipt(account: Account, entry: Mapping[str, Any]) -> Receipt:
    """Returns the receipt of a charge entry of an account whose budget is still what it was then."""
    return receipt_of(
        entry, granted=float(account.grant.epsilon), delta=float(account.grant.delta), public_key=account.public_key
    )


def receipt_of(entry: Mapping[str, Any], *, granted: float, delta: float, public_key: str) -> Receipt:
    """Returns the receipt that a charge entry stands for, with its signature where the entry has one.

    Args:
        entry: A charge entry of version 2 or later, with its hash.
        granted: The account's budget in epsilon when the entry was made.
        delta: The holder's delta.
        public_key: The holder's key for the account.
    """
    event, *metrics = events_of(entry["body"]["event"])
    fields = _receipt_fields(entry, granted, delta, public_key)
    return Receipt(**fields, event=event, metrics=tuple(metrics), signature=entry.get("sig", ""))


def _receipt_fields(entry: Mapping[str, Any], granted: float, delta: float, public_key: str) -> dict[str, Any]:
    """Returns a receipt's fields but for what is released under it and its signature."""
    body = entry["body"]
    return {
        "account": entry["account"],
        "seq": entry["seq"],
        "head": entry["hash"],
        "job": body["job"],
        "round": body["round"],
        "request": body["request"],
        "spent": body["spent"],
        "granted": granted,
        "delta": delta,
        "charges": body["charges"],
        "test": body["test"],
        "public_key": public_key,
    }


def events_of(value: Any) -> tuple[Event, ...]:
    """Returns what parsed JSON says one charge pays for; most entries of a ledger say the same, which is read once.

    Raises:
        LedgerError: It is not exactly one event, or a list of several that release different things.
        TypeError: It holds no plain values.
    """
    if type(value) is dict:
        return (_event(*itertools.chain.from_iterable(value.items())),)
    return events_from_json(value)


# Typed: 2 and 2.0 are equal keys, but only one of them is a number of steps.
@functools.lru_cache(maxsize=1024, typed=True)
def _event(*pairs: Any) -> Event:
    return Event.from_dict(dict(zip(pairs[::2], pairs[1::2], strict=True)))


def _gate(account: Account, request: ChargeRequest) -> Word | None:
    """Says which word declines a request, or None where it may be charged. Reads no data."""
    if request.witness is not None:
        seq, head = request.witness
        # The peer holds a later receipt than this ledger knows: the ledger was rolled back or forked.
        if not 0 <= seq < len(account.heads) or account.heads[seq] != head:
            return Word.BEHIND
    job = account.jobs.get(request.job)
    if job is not None:
        if job.plan != request.plan.digest() or job.rounds.get(request.round, request.request) != request.request:
            return Word.CONFLICT
        if (job.charges if job.turns is None else len(job.rounds)) >= job.joins:
            return Word.DECLINED
    if not _may_turn(job, request):
        return Word.CONFLICT
    if request.plan.unit is not account.grant.unit or request.plan.adjacency is not account.grant.adjacency:
        return Word.CONFLICT
    if job is not None and job.turns is not None:
        return None
    return None if account.grant.affords(account.spent_rdp, request.events) else Word.DECLINED


def _may_turn(job: _JobState | None, request: ChargeRequest) -> bool:
    """Whether a request keeps to the matrix that its job committed, or to none where that has none."""
    banded = request.plan.banded
    if request.matrix is None:
        # A plan of banded noise without its drawing has no turns that a ledger could hold anybody to.
        return (job is None or job.turns is None) and banded is None
    if banded is not None and request.matrix.matrix != matrix_of(request.plan):
        return False
    turns, joined = request.matrix.turns, () if job is None else tuple(job.rounds)
    alone = Event.of_round(request.plan)
    return (
        (job is None or job.turns == turns)
        and turns.admits(joined, request.round)
        # Sampling or several steps in a round would be another mechanism than the one that is priced.
        and (alone.sample_rate, alone.steps) == (1, 1)
        # So would be a metric beside the update, or a clip that moves with noised bits.
        and request.plan.metrics is None
        and request.plan.quantile == 0
    )


def _require_turn(job: _JobState, kind: str, events: tuple[Event, ...], round: int) -> None:
    """Refuses an entry that no gate of this program admits: a matrix charged twice, never, or out of turn.

    Raises:
        ValueError: It is such an entry.
    """
    if job.turns is None:
        if kind != "charge" or any(event.kind is Kind.MATRIX_GAUSSIAN for event in events):
            raise ValueError("a participation without its matrix")
    elif (kind == "charge") != (job.charges == 0) or events != job.events or not job.turns.admits([*job.rounds], round):
        raise ValueError("a participation out of turn")
