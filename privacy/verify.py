"""Checks reports, receipts and ledgers from the files alone, for somebody who trusts none of those who made them.

Each question gives one `Check`: it holds, it does not hold, or it cannot be proven from these files. Nothing is taken
over that can be worked out anew: hashes, signatures and chains are checked, and every epsilon is computed again, by the
accountant that a report quotes and by a second implementation (RDP: dp-accounting beside Opacus; PLD: Opacus' PRV and
the RDP bound beside dp-accounting; PLD for replacing a record: `privacy.replacement`).

What no file can prove is said every time: that a holder ran this code on the data it says it has, and that a key is
whose it is said to be, unless the reader pins it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from privacy.accounting import (
    Event,
    Grant,
    Kind,
    attacker_power,
    best_order,
    events_from_json,
    group_epsilon,
    pld_epsilon,
    pld_is_loose,
    prv_epsilon,
    rdp,
    second_filter,
    unsampled,
    zcdp_rho,
)
from privacy.errors import LedgerError, TacitError
from privacy.identity import COUNTERSIGN, verify
from privacy.identity.many import Signed, first_unsigned
from privacy.ledger import Account, Law, Receipt, grant_of, require_signed_entry
from privacy.ledger_report import over_ledgers
from privacy.matrix import Turns, matrix_of
from privacy.noise import SECURE_SOURCE
from privacy.plan import Adjacency, Local, Plan, Unit, canonical
from privacy.replacement import replace_epsilon, replace_rdp_epsilon
from privacy.report import (
    INFINITY,
    SCHEMA,
    UNKNOWN,
    audit_holds,
    odds_of,
    protects_of,
    render,
    report_id,
    same_replace_one,
    sentence_of,
    signed_bytes,
    tier_words,
    to_json,
    tpr_bound,
)
from privacy.report_clients import AGAINST, PROTECTS, sentence_of_clients
from privacy.report_page import LEDGER_SCHEMA, figure_words, render_ledgers
from privacy.transcript import LEDGER_FILE, Line, Transcript, is_ledger, read_ledger
from privacy.wire import settings_digest

RECEIPTS_FILE: Final = "receipts.jsonl"
# What a folder stands for: whatever of these lies in it.
_IN_A_FOLDER: Final = ("report.json", "report.html", RECEIPTS_FILE, LEDGER_FILE, f"ledgers/{LEDGER_FILE}")

# What malformed content may raise on its way through a check; it is then a check that does not hold.
_FAULTS: Final = (
    TacitError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    ArithmeticError,
    RecursionError,
)

# Two computations of one figure by one library differ by rounding alone.
_SAME: Final = 1e-6
# PRV adds its own error of 0.01; see `privacy.report`.
_AGREEMENT: Final = 0.05
# Above it loss distributions take minutes, and nobody needs the figure exactly.
# A report prints three deltas and two rates; a curve of thousands would only keep its reader busy.
_MOST_POINTS: Final = 16
_PLD_EPSILON: Final = 100
# Reports of before these were printed lack them.
_LATER_PRICES: Final = ("saddle_replace_one", "rdp_replace_one")
# How many names a sentence gives.
_NAMES: Final = 3


class Result(StrEnum):
    """What a check says."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "cannot be proven"


@dataclasses.dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: What was asked, in a few words.
        result: The answer.
        words: Why, in one sentence.
    """

    name: str
    result: Result
    words: str


@dataclasses.dataclass(frozen=True)
class _Witnessed:
    receipt: Receipt
    peer: str


@dataclasses.dataclass
class _Files:
    """What was given, read.

    Attributes:
        report: The report; None where none was given or it cannot be read.
        text: Its text.
        pages: Pages by their names.
        overviews: Texts of reports over ledgers, by the files' names.
        receipts: Lines of receipts files that could be read.
        digests: SHA-256 and number of lines of each receipts file.
        ledgers: Ledgers that hold.
        keys: Public keys that the reader trusts.
    """

    report: dict[str, Any] | None = None
    text: str = ""
    pages: dict[str, str] = dataclasses.field(default_factory=dict)
    overviews: dict[str, str] = dataclasses.field(default_factory=dict)
    receipts: list[_Witnessed] = dataclasses.field(default_factory=list)
    digests: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    ledgers: list[Transcript] = dataclasses.field(default_factory=list)
    keys: frozenset[str] = frozenset()

    @property
    def clients(self) -> list[dict[str, Any]]:
        """The report's clients."""
        return list(self.report["clients"]) if self.report is not None else []

    def known(self) -> list[_Witnessed]:
        """All receipts, those inside the report included, each once; asked once all files are read."""
        return self._known

    def known_of(self, account: str) -> list[Receipt]:
        """The receipts of one account."""
        return self._by_account.get(account, [])

    @functools.cached_property
    def _by_account(self) -> dict[str, list[Receipt]]:
        found: dict[str, list[Receipt]] = {}
        for one in self._known:
            found.setdefault(one.receipt.account, []).append(one.receipt)
        return found

    @functools.cached_property
    def _known(self) -> list[_Witnessed]:
        inside = []
        for client in self.clients:
            proof = client.get("proof") or {}
            if proof.get("receipt"):
                inside.append(_Witnessed(Receipt.from_json(proof["receipt"]), proof["peer"]))
        return list({found.receipt.signature: found for found in (*self.receipts, *inside)}.values())


def passed(checks: Sequence[Check]) -> bool:
    """Whether there was something to check and nothing of it failed."""
    return bool(checks) and all(check.result is not Result.FAILS for check in checks)


def verify_files(places: Sequence[Path], keys: Collection[str] = ()) -> list[Check]:
    """Checks files against themselves and against each other.

    Args:
        places: Files (``report.json``, ``report.html``, ``receipts.jsonl``, ledgers, exports), or folders with such.
        keys: Public keys (64 hex digits) that the reader got another way: of the server, of the holders.

    Returns:
        One answer per question, in an order to be read from above. A file that cannot be read is an answer too.
    """
    files, checks = _Files(keys=frozenset(keys)), []
    for path in _expand(places):
        checks.append(_read(path, files))
    if files.ledgers and files.report is None and not files.receipts:
        checks.append(
            Check(
                "rollback", Result.OPEN, "a ledger alone cannot show that no later state exists; receipts of peers can"
            )
        )
    for question in _QUESTIONS:
        try:
            answers = list(question(files))
            checks += answers
            if question is _identity and not passed(answers or checks) and files.report is not None:
                # Whatever a changed report says, nobody said it.
                checks.append(Check("the report's figures", Result.OPEN, "not looked at: the report was changed"))
                files.report = None
        except _FAULTS as error:
            name = (question.__doc__ or "").partition("\n")[0].rstrip(".").lower()
            checks.append(
                Check(name, Result.FAILS, f"what is asked about is not whole: {type(error).__name__}: {error}")
            )
    return checks


# -- reading ---------------------------------------------------------------------------------------


def _expand(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        if place.is_dir():
            found = [place / name for name in _IN_A_FOLDER if (place / name).exists()]
            # A folder without any of them is answered like a file that is not there.
            yield from found or [place / LEDGER_FILE]
        else:
            yield place


def _read(path: Path, files: _Files) -> Check:
    name = f"file {path.name}"
    try:
        data = path.read_bytes()
        if is_ledger(data):
            return _read_a_ledger(name, path, files)
        text = data.decode()
        if text.startswith("<!doctype html>"):
            files.pages[path.name] = text
            return Check(name, Result.HOLDS, "a report's page; what it says is compared with the report below")
        if text.startswith('{"receipt"'):
            return _read_receipts(name, text, files)
        if text.lstrip().startswith("{"):
            return _read_a_report(name, text, files)
        return Check(name, Result.FAILS, "it is no report, receipts file, ledger or export of this program")
    except OSError as error:
        return Check(name, Result.FAILS, f"it cannot be read: {error.strerror}")
    except _FAULTS as error:
        return Check(name, Result.FAILS, f"it is damaged: {error}")


def _read_a_ledger(name: str, path: Path, files: _Files) -> Check:
    ledger = read_ledger(path)
    files.ledgers.append(ledger)
    accounts = ledger.everyone.values()
    words = f"{len(accounts):,} accounts, {len(ledger.lines):,} charges: chains and signatures are sound"
    if unsigned := sum(account.unsigned for account in accounts):
        return Check(name, Result.OPEN, f"{words}, but {unsigned:,} entries are of version 1, which nobody signed")
    if ledger.exported is not None:
        words += "; an export whose holder signed how long it is"
    if back := sum(account.backwards for account in accounts):
        words += f"; in {back:,} entries the holder's clock was set back, their spend counts"
    return Check(name, Result.HOLDS, words)


def _read_receipts(name: str, text: str, files: _Files) -> Check:
    if not text.endswith("\n"):
        return Check(name, Result.FAILS, "its last line has no end: it was cut")
    lines = text[:-1].split("\n")
    files.digests.append((hashlib.sha256(text.encode()).hexdigest(), len(lines)))
    found: list[_Witnessed] = []
    faults: list[BaseException] = []

    def read() -> Iterator[Signed]:
        for line in lines:
            try:
                fields = json.loads(line)
                receipt, peer, signature = (
                    Receipt.unverified(fields["receipt"]),
                    fields["peer"],
                    fields["countersignature"],
                )
                # A second text of the same line could be read differently elsewhere.
                if json.dumps({key: fields[key] for key in ("receipt", "peer", "countersignature")}) != line:
                    raise ValueError("another text")
            except _FAULTS as error:
                faults.append(error)
                return
            found.append(_Witnessed(receipt, peer))
            yield receipt.public_key, receipt.signed_bytes(), receipt.signature
            yield peer, COUNTERSIGN + fields["receipt"].encode(), signature

    # Each line has two signatures.
    place = first_unsigned(read())
    if place is not None:
        del found[place // 2 :]
        faults = [LedgerError("expected a valid signature, got one that does not match its key and message")]
    files.receipts += found
    if faults:
        words = f"line {len(found) + 1:,} is no countersigned receipt: {faults[0]}"
        return Check(name, Result.FAILS, words)
    return Check(name, Result.HOLDS, f"{len(lines):,} receipts, each signed by its client and countersigned")


def _read_a_report(name: str, text: str, files: _Files) -> Check:
    def no_number(word: str) -> None:
        raise ValueError(f"{word} is no number")

    report = json.loads(text, parse_constant=no_number)
    if report.get("schema") == LEDGER_SCHEMA:
        files.overviews[name] = text
        return Check(name, Result.HOLDS, "a report over ledgers; it is made again from them below")
    if report.get("schema") != SCHEMA:
        return Check(name, Result.FAILS, f"it is of schema {report.get('schema')!r:.40}; this program knows {SCHEMA}")
    if files.report is not None:
        return Check(name, Result.FAILS, "a second report; check one at a time")
    files.report, files.text = report, text
    if to_json(report) != text:
        return Check(name, Result.FAILS, "its text is not the one text of its content: a byte was changed")
    return Check(name, Result.HOLDS, "whole, and the one text of its content")


# -- the report itself -----------------------------------------------------------------------------


def _identity(files: _Files) -> Iterator[Check]:
    """Report id and signature."""
    report = files.report
    if report is None:
        return
    right = report["report_id"] == report_id(report)
    yield Check(
        "report id",
        Result.HOLDS if right else Result.FAILS,
        f"{report['report_id'][:16]}... is{'' if right else ' not'} the SHA-256 of the content",
    )
    signature = report["signature"]
    if signature is None:
        yield Check("report signature", Result.OPEN, "nobody signed it; only the receipts in it speak for its figures")
        return
    try:
        verify(signature["public_key"], signed_bytes(report), signature["value"])
    except TacitError:
        yield Check("report signature", Result.FAILS, "the signature does not match the content")
        return
    if set(signature) != {"by", "public_key", "value"} or signature["by"] != "server":
        yield Check("report signature", Result.FAILS, "the signature says something that nobody signed")
        return
    key = signature["public_key"]
    yield Check("report signature", Result.HOLDS, f"signed by key {key[:16]}...")
    pinned = key in files.keys
    yield Check(
        "report signer",
        Result.HOLDS if pinned else Result.OPEN,
        "the key is one that you trust" if pinned else "compare the key with the server's own, and name it with --key",
    )


def _overviews(files: _Files) -> Iterator[Check]:
    """Reports over ledgers."""
    for name, text in files.overviews.items():
        asked = f"made from its ledgers, {name.removeprefix('file ')}"
        wanted = {row["account"]: row["ledger_head"] for row in json.loads(text)["data_sets"]}
        sources = [ledger for ledger in files.ledgers if wanted.keys() & ledger.everyone.keys()]
        if wanted.keys() - {identity for ledger in sources for identity in ledger.everyone}:
            yield Check(asked, Result.OPEN, "some of its ledgers are not here; give them too")
            continue
        same = to_json(over_ledgers(sources)) == text
        words = "made again from the ledgers it comes out the same, byte for byte"
        yield Check(asked, Result.HOLDS if same else Result.FAILS, words if same else "the ledgers give another report")
        if same:
            yield from _replaced_in_overview(json.loads(text)["data_sets"])


def _replaced_in_overview(rows: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    """Compares what replacing a record costs in each committed schedule with a second accountant."""
    priced = {
        (row["schedule"]["pld_replace_one"], events_from_json(row["schedule"]["event"]), row["delta"])
        for row in rows
        if row["schedule"] is not None and not isinstance(row["schedule"]["pld_replace_one"], str)
    }
    found = [_replaced(*schedule) for schedule in priced]
    if found:
        sound, words, _ = min(found, key=lambda answer: answer[0])
        yield _checked("replace-one price", sound, f"{words} ({len(found):,} schedules)")


def _page(files: _Files) -> Iterator[Check]:
    """Pages."""
    for name, text in files.pages.items():
        overviews = [render_ledgers(json.loads(overview)) for overview in files.overviews.values()]
        if files.report is None and overviews:
            same = text in overviews
            words = "it is what the report gives, byte for byte" if same else "it is not what the report gives"
            yield Check(f"page {name}", Result.HOLDS if same else Result.FAILS, words)
        elif files.report is None:
            yield Check(f"page {name}", Result.OPEN, "without its report.json nothing can be compared")
        else:
            same = render(files.report) == text
            words = "it is what the report gives, byte for byte" if same else "it is not what the report gives"
            yield Check(f"page {name}", Result.HOLDS if same else Result.FAILS, words)


def _clients(files: _Files) -> Iterator[Check]:
    """What each client signed."""
    if files.report is None:
        return
    signer = (files.report["signature"] or {}).get("public_key")
    signed, alone, silent = 0, [], []
    known: dict[str, Receipt] = {}
    for found in files.known():
        best = known.get(found.receipt.account)
        if best is None or best.seq < found.receipt.seq:
            known[found.receipt.account] = found.receipt
    for client in files.clients:
        proof, name = client["proof"] or {}, client["name"]
        last = known.get(client["account"])
        if last is not None and (fault := _against(client, last, proof)):
            yield Check("client receipts", Result.FAILS, f"{name}: {fault}")
            return
        if not proof.get("receipt"):
            silent.append(name)
            continue
        receipt = Receipt.from_json(proof["receipt"])
        verify(proof["peer"], COUNTERSIGN + proof["receipt"].encode(), proof["countersignature"])
        if signer is not None and proof["peer"] != signer:
            yield Check("client receipts", Result.FAILS, f"{name}: countersigned by another key than signed the report")
            return
        if (receipt.account, receipt.public_key) != (client["account"], client["public_key"]):
            yield Check("client receipts", Result.FAILS, f"{name}: the receipt is of another account or key")
            return
        if client["verdict"] != "verified":
            alone.append(name)
            if not isinstance(client["spent_epsilon"], str) and client["spent_epsilon"] < receipt.spent * (1 - _SAME):
                yield Check("client receipts", Result.FAILS, f"{name}: less is printed than its receipt says")
                return
            continue
        spent = INFINITY if receipt.test else receipt.spent
        told = (
            client["charges"],
            client["test_noise"],
            client["ledger_head"],
            client["granted_epsilon"],
            client["delta"],
        )
        if told != (receipt.charges, receipt.test, receipt.head, receipt.granted, receipt.delta) or not (
            client["spent_epsilon"] == spent
            if isinstance(client["spent_epsilon"], str) or isinstance(spent, str)
            else math.isclose(client["spent_epsilon"], spent, rel_tol=1e-9)
        ):
            yield Check("client receipts", Result.FAILS, f"{name}: the report says something else than it signed")
            return
        signed += 1
    yield Check("client receipts", Result.HOLDS, f"{signed:,} of {len(files.clients):,} clients signed what is printed")
    if alone or silent:
        words = f"what {_some(alone + silent)} spent is told by its ledger or the operator alone"
        ledgers = {identity for ledger in files.ledgers for identity in ledger.everyone}
        missing = [c["name"] for c in files.clients if c["name"] in alone + silent and c["account"] not in ledgers]
        yield Check(
            "unsigned figures",
            Result.OPEN if missing else Result.HOLDS,
            f"{words}; give their ledgers" if missing else f"{words}, and that ledger is here",
        )
    pins = [client["name"] for client in files.clients if client["public_key"] not in files.keys]
    yield Check(
        "client keys",
        Result.OPEN if pins else Result.HOLDS,
        f"whose the keys of {_some(pins)} are; compare them with the holders' own and name them with --key"
        if pins
        else "every client's key is one that you trust",
    )


def _against(client: Mapping[str, Any], last: Receipt, proof: Mapping[str, Any]) -> str:
    """Returns how a client's row contradicts the last receipt that is known of it, or nothing."""
    spent = client["spent_epsilon"]
    if not isinstance(spent, str) and (last.test or spent < last.spent * (1 - _SAME)):
        return "less is printed than a receipt of it says"
    grant = _signed(proof.get("grant"))
    if grant is None:
        return ""
    # The holder's budget moves only by its own entries, and the report must list each of them.
    budget, passed_ = float(grant["body"]["epsilon"]), []
    for change in client["budget_changes"]:
        if change["before"] != budget or change["raised"] != (change["after"] > budget):
            return "its budget did not change as the report says"
        passed_.append(budget)
        budget = change["after"]
    if last.granted not in (budget, *passed_):
        return f"it signed a budget of {last.granted:g}, which its grant and the listed changes do not give"
    return "" if client["granted_epsilon"] == budget else "its budget is not what its grant and the changes give"


def _commitments(files: _Files) -> Iterator[Check]:
    """What each client committed to before its first round."""
    report = files.report
    if report is None:
        return
    plan, local = _plan(report), Local.from_json(canonical(report["local"]))
    settings = settings_digest(report["run"]["task"], plan.digest(), local.to_json(), report["config"]["seed"])
    codes = set(report["software"]["code_hash"].split(", then "))
    faults, old, count = [], [], 0
    if report["plan"]["digest"] != plan.digest() or report["software"]["settings_hash"] not in ("", settings):
        faults.append("the report's own plan and settings do not give the digests that it names")
    if report["software"]["config_hash"] != hashlib.sha256(canonical(report["config"])).hexdigest():
        faults.append("the scenario does not give the hash that the report names")
    for client in files.clients:
        proof, name = client["proof"] or {}, client["name"]
        if proof.get("commit") is None or proof.get("grant") is None:
            continue
        grant, commit = _grant_of(files, client), _commit_of(files, client)
        if grant is None or commit is None:
            # Version 1 was never signed: only a ledger's chain vouches for it.
            old.append(name)
            continue
        if (grant, commit) != (proof["grant"], proof["commit"]):
            faults.append(f"{name}: its papers are not those of its ledger")
            continue
        for entry in (grant, commit):
            if entry["v"] > 1:
                require_signed_entry(entry, client["public_key"])
        body = commit["body"]
        if grant["kind"] != "grant" or grant["body"]["key"] != client["public_key"] or commit["kind"] != "commit":
            faults.append(f"{name}: its papers are of another account")
        elif commit["account"] != client["account"] or grant["account"] != client["account"]:
            faults.append(f"{name}: its papers are of another account")
        elif body["job"] != report["run"]["job"]:
            faults.append(f"{name}: it committed to another job")
        elif (body["plan"], body["joins"], events_from_json(body["event"])) != (
            plan.digest(),
            plan.joins,
            Event.all_of_round(plan),
        ):
            faults.append(f"{name}: it committed to another plan")
        elif not _has_turns(body, plan):
            faults.append(f"{name}: it committed to other turns than those that the price is for")
        elif commit["v"] < 3:
            old.append(name)
        elif body["code"] not in {"", *codes} or body["settings"] not in ("", settings):
            faults.append(f"{name}: it names other code or other settings than the report")
        elif body["sampling"] != Law.of(Event.of_round(plan), SECURE_SOURCE if not client["test_noise"] else ""):
            faults.append(f"{name}: it names the sampling law {body['sampling']!r:.40}")
        else:
            count += 1
    job, released = report["run"]["job"], Event.all_of_round(plan)
    if any(found.receipt.job == job and found.receipt.events != released for found in files.known()):
        faults.append("receipts of this job are for other releases than those of the plan")
    unproven = _committed_otherwise(files)
    if faults or unproven:
        yield Check("commitments", Result.FAILS, f"{(faults + unproven)[0]} ({len(faults + unproven):,} such)")
    else:
        words = f"{count:,} clients signed this plan, its schedule, its sampling law, the code and the settings"
        yield Check("commitments", Result.HOLDS if count else Result.OPEN, words)
    if old:
        yield Check(
            "older ledgers", Result.OPEN, f"{_some(old)}: entries of an older version name no code and no settings"
        )


def _has_turns(body: Mapping[str, Any], plan: Plan) -> bool:
    """Whether a commitment names the turns of the plan's matrix, or none where the plan has none."""
    if plan.banded is None:
        return "matrix" not in body
    matrix, turns = matrix_of(plan), Turns(**body["matrix"])
    wanted = (matrix.rounds, matrix.separation, matrix.participations)
    return (turns.rounds, turns.separation, turns.participations) == wanted


def _drawings(files: _Files) -> Iterator[Check]:
    """One drawing of banded noise for all clients."""
    report = files.report
    if report is None or (law := _plan(report).banded) is None:
        return
    job = report["run"]["job"]
    rounds: dict[str, set[int]] = defaultdict(set)
    for found in files.known():
        if found.receipt.job == job:
            rounds[found.receipt.account].add(found.receipt.round)
    near = [
        account
        for account, joined in rounds.items()
        if any(later - earlier < law.separation for earlier, later in itertools.pairwise(sorted(joined)))
    ]
    if near:
        words = f"account {near[0][:8]} gave receipts for two rounds that are less than {law.separation} apart"
        yield Check("turns", Result.FAILS, words)
        return
    commits = [commit for client in files.clients if (commit := _commit_of(files, client)) is not None]
    digests = {str(commit["body"]["matrix"]["digest"]) for commit in commits if "matrix" in commit["body"]}
    if len(digests) > 1:
        words = f"clients committed to {len(digests):,} drawings of the noise: a row was drawn more than once"
        yield Check("turns", Result.FAILS, words)
        return
    words = f"any two rounds of a client are {law.separation} or more apart, and all committed to one drawing"
    yield Check("turns", Result.HOLDS if digests else Result.OPEN, words)


def _committed_otherwise(files: _Files) -> list[str]:
    """Returns clients of one run whose commitment to it is missing though a tight figure is claimed for all."""
    headline = files.report["headline"] if files.report is not None else {}
    if "committed schedule" not in headline["basis"]:
        return []
    return [
        f"{client['name']}: no commitment of it to this schedule is here"
        for client in files.clients
        if not (client["proof"] or {}).get("commit")
    ]


def _commit_of(files: _Files, client: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns a client's commitment to the report's job, where something vouches for it: its ledger, or a signature."""
    report = files.report or {}
    for ledger in files.ledgers:
        if (entry := ledger.commits.get((client["account"], report["run"]["job"]))) is not None:
            return entry
    return _signed((client["proof"] or {}).get("commit"))


def _grant_of(files: _Files, client: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns a client's grant, where something vouches for it: its ledger, or a signature."""
    for ledger in files.ledgers:
        if (entry := ledger.grants.get(client["account"])) is not None:
            return entry
    return _signed((client["proof"] or {}).get("grant"))


def _signed(entry: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return entry if entry is not None and type(entry["v"]) is int and entry["v"] > 1 else None


def _plan(report: Mapping[str, Any]) -> Plan:
    return Plan.from_json(canonical({name: value for name, value in report["plan"].items() if name != "digest"}))


# -- receipts and ledgers --------------------------------------------------------------------------


def _receipts(files: _Files) -> Iterator[Check]:
    """Receipts against the report and each other."""
    report = files.report
    if report is not None:
        named = report["evidence"]["receipts"]
        if not files.digests:
            words = (
                "the report's receipts file is not here: only each client's last receipt, in the report, was checked"
            )
            yield Check("receipts file", Result.OPEN, words)
        else:
            same = files.digests == [(named.get("sha256"), named.get("lines"))]
            words = "it is the one that the report was made from" if same else "the report was made from other receipts"
            yield Check("receipts file", Result.HOLDS if same else Result.FAILS, words)
            signer = (report["signature"] or {}).get("public_key")
            strange = signer is not None and any(found.peer != signer for found in files.receipts)
            words = "whoever signed the report countersigned every receipt"
            yield Check(
                "countersignatures",
                Result.FAILS if strange else Result.HOLDS if signer is not None else Result.OPEN,
                words if not strange and signer is not None else "another key countersigned than signed the report",
            )
            yield from _arrived(report, files)
    known = files.known()
    if not known:
        return
    by_place: dict[tuple[str, int], set[str]] = defaultdict(set)
    by_account: dict[str, list[Receipt]] = defaultdict(list)
    for found in known:
        by_place[found.receipt.account, found.receipt.seq].add(found.receipt.head)
        by_account[found.receipt.account].append(found.receipt)
    forked = [account for (account, _), heads in by_place.items() if len(heads) > 1]
    for account, receipts in by_account.items():
        receipts.sort(key=lambda receipt: receipt.seq)
        for earlier, later in itertools.pairwise(receipts):
            grows = earlier.seq < later.seq and (
                _is_turn(earlier, later) or (earlier.charges < later.charges and earlier.spent <= later.spent)
            )
            if not grows or earlier.public_key != later.public_key or earlier.test > later.test:
                forked.append(account)
    yield Check(
        "receipts agree",
        Result.FAILS if forked else Result.HOLDS,
        f"account {forked[0][:8]} gave receipts that contradict each other: its ledger was forked or signed again"
        if forked
        else f"{len(known):,} receipts of {len(by_account):,} accounts: each account's spend only grows, in one order",
    )
    if not files.ledgers:
        words = "without the clients' ledgers, a rollback or fork shows only when a holder shows its own receipts"
        yield Check("rollback", Result.OPEN, words)


def _is_turn(earlier: Receipt, later: Receipt) -> bool:
    """Whether a receipt is for a later round of a matrix that was paid for whole: its account spends nothing more."""
    return (
        all(event.kind is Kind.MATRIX_GAUSSIAN for event in later.events)
        and (earlier.charges, earlier.spent) == (later.charges, later.spent)
        and (earlier.job != later.job or earlier.round < later.round)
    )


def _arrived(report: Mapping[str, Any], files: _Files) -> Iterator[Check]:
    """Whether each update that a round counts has a receipt, and each history is that of the receipts."""
    told: dict[str, dict[int, float]] = defaultdict(dict)
    rounds: dict[int, set[str]] = defaultdict(set)
    for found in files.receipts:
        if found.receipt.job == report["run"]["job"]:
            told[found.receipt.account][found.receipt.round] = found.receipt.spent
            rounds[found.receipt.round].add(found.receipt.account)
    short = [line["round"] for line in report["rounds"] if len(rounds[line["round"]]) < line["replies"]]
    claimed = not isinstance(report["headline"]["epsilon"], str)
    if short and claimed:
        words = f"round {short[0]} counts more updates than there are receipts, and a figure is printed all the same"
        yield Check("every update has a receipt", Result.FAILS, words)
    else:
        words = (
            "no round counts more updates than there are receipts"
            if not short
            else "some lack one; no figure is claimed"
        )
        yield Check("every update has a receipt", Result.HOLDS, words)
    others = [
        client["name"]
        for client in files.clients
        for moment, spent in client["history"]
        if not isinstance(spent, str)
        and not math.isclose(told[client["account"]].get(moment, -1.0), spent, rel_tol=1e-9)
    ]
    strangers = told.keys() - {client["account"] for client in files.clients}
    if others or (strangers and claimed):
        words = (
            f"{_some(list(dict.fromkeys(others)))}: the spend by round is not that of the receipts"
            if others
            else f"{len(strangers):,} accounts gave receipts for this job and are not in the report"
        )
        yield Check("spend by round", Result.FAILS, words)
    else:
        yield Check("spend by round", Result.HOLDS, "each client's spend after each round is what its receipts say")


def _ledgers(files: _Files) -> Iterator[Check]:
    """Receipts and report against the ledgers."""
    heads: dict[str, Sequence[str]] = {}
    for ledger in files.ledgers:
        for identity, account in ledger.everyone.items():
            kept = heads.setdefault(identity, account.heads)
            both = min(len(kept), len(account.heads))
            if list(kept[:both]) != account.heads[:both]:
                yield Check(
                    "ledgers agree", Result.FAILS, f"two ledgers tell account {account.name} differently: a fork"
                )
                return
            heads[identity] = max(kept, account.heads, key=len)
    if not heads:
        return
    behind, forked, seen = [], [], 0
    for found in files.known():
        receipt = found.receipt
        if receipt.account in heads:
            seen += 1
            chain = heads[receipt.account]
            if receipt.seq >= len(chain):
                behind.append(receipt.account)
            elif chain[receipt.seq] != receipt.head:
                forked.append(receipt.account)
    if behind or forked:
        what = "ends before" if behind else "is not the one of"
        why = "it was rolled back" if behind else "it was forked or signed again"
        odd = (behind or forked)[0]
        yield Check("receipts and ledgers", Result.FAILS, f"the ledger of account {odd[:8]} {what} its receipts: {why}")
    elif seen:
        yield Check(
            "receipts and ledgers", Result.HOLDS, f"{seen:,} receipts stand in the ledgers, unchanged and in place"
        )
    if files.report is not None:
        yield from _report_and_ledgers(files, heads)


def _report_and_ledgers(files: _Files, heads: Mapping[str, Sequence[str]]) -> Iterator[Check]:
    report = files.report or {}
    lines: dict[str, list[Line]] = defaultdict(list)
    for ledger in files.ledgers:
        for line in ledger.lines:
            if not lines[line.account] or lines[line.account][-1].seq < line.seq:
                lines[line.account].append(line)
    rows = {client["account"]: client for client in files.clients}
    accounts: dict[str, Account] = {}
    for ledger in files.ledgers:
        for identity, account in ledger.everyone.items():
            if identity not in accounts or len(accounts[identity].heads) < len(account.heads):
                accounts[identity] = account
    job = report["run"]["job"]
    left_out = {
        identity: found[0].name
        for identity, found in lines.items()
        if identity not in rows and any(line.job == job for line in found)
    }
    if left_out:
        words = f"{_some(sorted(left_out.values()))} paid for this job and is not in the report"
        yield Check("report and ledgers", Result.FAILS, words)
        return
    compared = 0
    for identity, row in rows.items():
        if identity not in heads:
            continue
        if row["ledger_head"] not in heads[identity]:
            words = f"{row['name']}: the report names a state that its ledger never had"
            yield Check("report and ledgers", Result.FAILS, words)
            return
        last = list(heads[identity]).index(row["ledger_head"])
        past = [line for line in lines[identity] if line.seq <= last]
        tested = any(line.noise != SECURE_SOURCE for line in past)
        spent: float | str = INFINITY if tested else past[-1].spent if past else 0.0
        printed = row["spent_epsilon"]
        same = (
            printed in (spent, UNKNOWN)
            if isinstance(printed, str) or isinstance(spent, str)
            else math.isclose(printed, spent, rel_tol=1e-9)
        )
        runs = len({line.job for line in past})
        changes = [
            [change.before, change.after, change.after > change.before]
            for change in accounts[identity].changes
            if change.seq <= last
        ]
        told = [[change["before"], change["after"], change["raised"]] for change in row["budget_changes"]]
        charges = sum(line.charged for line in past)
        if not same or (row["charges"], row["runs"]) != (charges, runs) or told != changes:
            yield Check(
                "report and ledgers", Result.FAILS, f"{row['name']}: the report says something else than its ledger"
            )
            return
        compared += 1
    words = f"{compared:,} of {len(rows):,} clients: spend, charges, runs and budgets are what their ledgers say"
    yield Check("report and ledgers", Result.HOLDS if compared else Result.OPEN, words)


# -- figures, by two accountants -------------------------------------------------------------------


def _spends(files: _Files) -> Iterator[Check]:
    """What was spent, counted anew."""
    grants, histories = _histories(files)
    if not histories:
        if files.receipts or files.report is not None:
            words = "no client's whole history is here: neither its ledger nor all of its receipts and its grant"
            yield Check("spend, counted anew", Result.OPEN, words)
        return
    wrong, priced = [], {}
    for identity, history in histories.items():
        grant, total = grants[identity], 0.0
        for _, events, spent in history:
            total += rdp(events, grant.order)
            if not math.isclose(grant.epsilon_of(total), spent, rel_tol=1e-9):
                wrong.append(identity)
                break
        every = _counted([event for _, events, _ in history for event in events])
        key = (every, grant.order, grant.delta)
        if key not in priced:
            priced[key] = second_filter(every, grant)
        low, high = priced[key]
        if not low * (1 - _SAME) - _SAME <= history[-1][2] <= high * (1 + _SAME) + _SAME:
            wrong.append(identity)
    words = (
        f"account {wrong[0][:8]}: its releases do not cost what was printed"
        if wrong
        else f"{len(histories):,} accounts, {sum(map(len, histories.values())):,} charges: the filter's figure "
        "after each, and the last one by a second accountant (dp-accounting's RDP)"
    )
    yield Check("spend, counted anew", Result.FAILS if wrong else Result.HOLDS, words)


def _counted(events: Sequence[Event]) -> tuple[Event, ...]:
    """Returns events with equal ones added up."""
    steps: dict[Event, int] = defaultdict(int)
    for event in events:
        steps[dataclasses.replace(event, steps=1)] += event.steps
    return tuple(dataclasses.replace(event, steps=count) for event, count in steps.items())


def _histories(files: _Files) -> tuple[dict[str, Grant], dict[str, list[tuple[int, tuple[Event, ...], float]]]]:
    """Returns the grant and all charges of each account of which all are here: by its ledger, or by its receipts."""
    grants: dict[str, Grant] = {}
    histories: dict[str, list[tuple[int, tuple[Event, ...], float]]] = {}
    for ledger in files.ledgers:
        found: dict[str, list[tuple[int, tuple[Event, ...], float]]] = defaultdict(list)
        for line in ledger.lines:
            if line.charged:
                found[line.account].append((line.seq, line.events, line.spent))
        for identity, history in found.items():
            if len(history) > len(histories.get(identity, ())):
                grants[identity], histories[identity] = ledger.everyone[identity].grant, history
    by_account: dict[str, list[Receipt]] = defaultdict(list)
    for one in files.known():
        by_account[one.receipt.account].append(one.receipt)
    for client in files.clients:
        proof, receipts = client["proof"] or {}, by_account.get(client["account"], [])
        entry = proof.get("grant")
        if client["account"] in histories or entry is None or entry["v"] == 1 or not receipts:
            continue
        receipts.sort(key=lambda receipt: receipt.seq)
        # Later rounds of a matrix are receipts and no charges: what a receipt signs tells whether it paid.
        paid = [
            each
            for before, each in itertools.pairwise([None, *receipts])
            if each is not None and (before is None or not _is_turn(before, each))
        ]
        if receipts[-1].charges == len(paid):
            require_signed_entry(entry, client["public_key"])
            grants[client["account"]] = grant_of(entry["body"])
            histories[client["account"]] = [(each.seq, each.events, each.spent) for each in paid]
    return grants, histories


def _prices(files: _Files) -> Iterator[Check]:
    """What the schedule costs, computed anew."""
    report = files.report
    if report is None:
        return
    prices, plan = report["prices"], _plan(report)
    history, delta = Event.all_of_schedule(plan), plan.delta
    if (prices["steps"], prices["delta"]) != (history[0].steps, delta):
        yield Check("price of the schedule", Result.FAILS, "it is the price of other steps, or at another delta")
        return
    if isinstance(prices["gate"], str):
        words = f"no price is claimed: it says {prices['gate']}"
        names = [
            name
            for name in ("pld", "pld_replace_one", "prv", "rdp", "unamplified", *_LATER_PRICES)
            if not isinstance(prices.get(name, UNKNOWN), str)
        ]
        yield Check("price of the schedule", Result.FAILS if names else Result.HOLDS, words)
        return
    if max(len(prices["at_deltas"]), len(prices["tpr"]), len(prices["persons"])) > _MOST_POINTS:
        yield Check("price of the schedule", Result.FAILS, f"more than {_MOST_POINTS} points of a curve are printed")
        return
    order, best = best_order(history, delta)
    if best > _PLD_EPSILON and not isinstance(prices["pld"], str):
        # Loss distributions of next to no noise take hours; no honest report has them.
        yield Check("PLD price", Result.FAILS, f"a PLD figure is printed though RDP gives {best:.4g}")
        return
    at = Grant(epsilon=1e9, delta=delta, order=prices["gate_order"], records_bound=plan.records_bound)
    low, high = second_filter(history, at)
    gate = at.epsilon_of(rdp(history, at.order))
    sound = _near(prices["gate"], gate) and low * (1 - _SAME) - _SAME <= prices["gate"] <= high * (1 + _SAME) + _SAME
    yield _checked(
        "filter's price", sound, f"{prices['gate']:.4g} at order {at.order:g}, by Opacus' RDP and dp-accounting's"
    )
    whole = _near(prices["rdp"], best) and _near(prices["unamplified"], best_order(unsampled(history), delta)[1])
    whole = whole and _near(prices["zcdp_rho"], zcdp_rho(history))
    words = (
        f"{prices['rdp']:.4g} at the best order {order:g}; {prices['unamplified']:.4g} with no discount for sampling"
    )
    yield _checked("RDP price", whole, words)
    yield from _tight(prices, history, delta, best)


def _tight(prices: Mapping[str, Any], history: Sequence[Event], delta: float, best: float) -> Iterator[Check]:
    """Compares the PLD figures with PLD anew, and with PRV and RDP as second accountants."""
    curve = [(point["delta"], point["epsilon"]) for point in prices["at_deltas"]]
    if isinstance(prices["pld"], str):
        sound = best > _PLD_EPSILON and all(_near(epsilon, best_order(history, at)[1]) for at, epsilon in curve)
        words = "no PLD figure is claimed; what is printed at other deltas is RDP's"
        yield _checked("PLD price", sound or prices["pld"] == UNKNOWN, words)
    else:
        anew, (prv, note) = pld_epsilon(history, delta), prv_epsilon(history, delta)
        sound = _near(prices["pld"], anew, 1e-4) and prices["pld"] <= best * (1 + _SAME)
        second = f"Opacus' PRV says {prv:.4g}" if prv is not None else f"PRV was {note}"
        if prv is not None:
            slack = _AGREEMENT + 0.02 * prices["pld"]
            above = math.inf if pld_is_loose(history, delta) else slack
            sound = sound and -slack <= prices["pld"] - prv <= above
        words = f"{prices['pld']:.4g} by PLD anew; {second}; RDP bounds it by {best:.4g}"
        yield _checked("PLD price", sound, words)
        sound = all(_near(epsilon, pld_epsilon(history, at), 1e-4) for at, epsilon in curve)
        sound = sound and all(epsilon <= best_order(history, at)[1] * (1 + _SAME) for at, epsilon in curve)
        yield _checked("other deltas", sound, f"{len(curve)} deltas, by PLD anew, each at most what RDP gives")
    yield _replace_one(prices, history, delta)
    power = all(_near(point["tpr"], attacker_power(curve, point["fpr"]), 1e-4) for point in prices["tpr"])
    yield _checked("power of attackers", power and bool(prices["tpr"]), "true-positive rates follow from the epsilons")
    persons = prices["persons"]
    if persons:
        sound = all(_near(row["epsilon"], group_epsilon(history, delta, row["records"]), 1e-3) for row in persons)
        yield _checked("persons with several records", sound, f"{len(persons)} figures, by mixture of Gaussians anew")


def _replace_one(prices: Mapping[str, Any], history: Sequence[Event], delta: float) -> Check:
    """Compares what replacing a record costs with PLD anew, and with accountants that share nothing with PLD."""
    name, printed, unit = "replace-one price", prices["pld_replace_one"], history[0].unit
    second, bound = prices.get("saddle_replace_one"), prices.get("rdp_replace_one")
    # What reports did not have once, they need not have; what they have must be right.
    most = replace_rdp_epsilon(history, delta)
    sound = bound is None or (bound == INFINITY if math.isinf(most) else _near(bound, most))
    if isinstance(prices["pld"], str) or isinstance(printed, str):
        words = f"no tight figure for replacing a {unit} is claimed; RDP bounds it by {most:.4g}"
        sound = sound and isinstance(prices["pld"], str) and isinstance(printed, str)
        return _checked(name, sound and (second is None or isinstance(second, str)), words)
    right, words, other = _replaced(printed, history, delta)
    # Unknown promises nothing.
    sound = sound and right and (second in (None, UNKNOWN) or (other is not None and _near(second, other, 1e-5)))
    return _checked(name, sound, words + ("" if second is not None else "; the report is of before there were others"))


def _replaced(printed: float, history: Sequence[Event], delta: float) -> tuple[bool, str, float | None]:
    """Returns whether a PLD figure for replacing a record is right, in words why, and what a second accountant says."""
    least, anew = pld_epsilon(history, delta), pld_epsilon(history, delta, Adjacency.REPLACE_ONE)
    most = replace_rdp_epsilon(history, delta)
    other, note = replace_epsilon(history, delta)
    # Proven in `privacy.replacement`: adding or removing is a kind of replacing, and RDP is a bound.
    # At a tiny delta PLD's figures are bounds, which may be above the second one, and each in another measure.
    loose = pld_is_loose(history, delta)
    sound = _near(printed, anew, 1e-4) and printed <= most * (1 + _SAME) + _SAME
    sound = sound and (loose or least * (1 - _SAME) <= printed)
    sound = sound and (other is None or same_replace_one(printed, other) or (loose and printed > other))
    second = f"the {note} says {other:.4g}" if other is not None else f"a second tight figure was {note}"
    words = (
        f"{printed:.4g} for replacing a {history[0].unit}, by PLD anew; {second}; it lies between {least:.4g}, for "
        f"adding or removing one, and RDP's bound {most:.4g}"
    )
    return sound, words, other


def _near(printed: Any, computed: float, tolerance: float = _SAME) -> bool:
    return isinstance(printed, float | int) and math.isclose(printed, computed, rel_tol=tolerance, abs_tol=tolerance)


def _checked(name: str, sound: bool, words: str) -> Check:
    return Check(
        name, Result.HOLDS if sound else Result.FAILS, words if sound else f"it is not what comes out: {words}"
    )


def _headline(files: _Files) -> Iterator[Check]:
    """The headline, from the figures below it."""
    report = files.report
    if report is None:
        return
    headline = report["headline"]
    epsilon, delta = headline["epsilon"], headline["delta"]
    if isinstance(epsilon, str):
        quoted = [epsilon, headline["replace_one"]["epsilon"], headline["federation"]["epsilon"]]
        quoted += [line["epsilon"] for line in headline["person"][:1]]
        sound = epsilon in (UNKNOWN, INFINITY) and set(quoted) == {epsilon} and bool(headline["reasons"])
        yield _checked("headline", sound, f"it claims no finite figure: {epsilon}")
        return
    one, one_delta = _record_level(files)
    times = headline["federation"]["multiplicity"]
    if times == 1:
        right = one
    else:
        composed = _composed(files.clients, times)
        if composed is None:
            yield Check("headline", Result.FAILS, "a figure is printed for several data sets that do not add up")
            return
        right = composed
    swap = headline["replace_one"]
    by_price = times == 1 and swap["epsilon"] == report["prices"]["pld_replace_one"] and swap["delta"] == delta
    by_group = _near(swap["epsilon"], 2 * epsilon) and _near(swap["delta"], delta * (1 + odds_of(epsilon)))
    priced = {point["fpr"]: point["tpr"] for point in report["prices"]["tpr"]}
    powers = [
        _near(point["tpr"], tpr_bound(point["fpr"], epsilon, delta))
        or (times == 1 and one == report["prices"]["pld"] and point["tpr"] == priced.get(point["fpr"]))
        for point in headline["tpr"]
    ]
    sound = (
        _near(epsilon, right)
        and delta == one_delta
        and not headline["reasons"]
        and _near(headline["federation"]["one_data_set"], one)
        and headline["federation"]["epsilon"] == headline["person"][0]["epsilon"] == epsilon
        and _near(headline["odds_factor"], odds_of(epsilon))
        and headline["tier"] == tier_words(epsilon)
        and (headline["unit"], headline["adjacency"]) == (report["plan"]["unit"], report["plan"]["adjacency"])
        and (headline["protects"], headline["sentence"]) == _said(report, epsilon, delta, times)
        and (by_price or by_group or swap["epsilon"] == UNKNOWN)
        and all(powers)
    )
    yield _checked("headline", sound, f"epsilon {epsilon:.4g} at delta {delta:g} follows from the figures below it")
    if report["plan"]["unit"] == Unit.CLIENT:
        yield _adversaries(report)
    yield from _multiplicity(files, times)


def _audited(files: _Files) -> Iterator[Check]:
    """Whether a report claims a figure beside an audit of its own code that contradicts it."""
    report = files.report
    audit = report["empirical"].get("audit") if report is not None else None
    if report is None or audit is None:
        return
    if str(audit.get("code_hash", "")) not in report["software"]["code_hash"].split(", then "):
        yield Check("audit", Result.OPEN, "the audit in the report is of other code than ran")
        return
    claimed = not isinstance(report["headline"]["epsilon"], str)
    yield (
        Check("audit", Result.FAILS, "a figure is claimed beside an audit of the same code that contradicts it")
        if claimed and not audit_holds(audit)
        else Check("audit", Result.OPEN, "an audit can show a claim to be wrong, never to be right; nobody signed it")
    )


def _rows(files: _Files) -> Iterator[Check]:
    """Sums, remainders and rows that follow from figures which are checked elsewhere."""
    report = files.report
    if report is None:
        return
    faults = []
    rows, budget = files.clients, report["budget"]
    for row in rows:
        if not isinstance(row["spent_epsilon"], str):
            left = max(0.0, row["granted_epsilon"] - row["spent_epsilon"])
            if not _near(row["remaining_epsilon"], left):
                faults.append(f"{row['name']}: what remains is not what is granted less what is spent")
    if not isinstance(budget["largest_spent"], str):
        sums = [max(row["spent_epsilon"] for row in rows), min(row["remaining_epsilon"] for row in rows)]
        if not all(map(_near, (budget["largest_spent"], budget["least_remaining"]), sums)):
            faults.append("the largest spend or the least remainder is not that of any client")
    if budget["granted"] != sorted({row["granted_epsilon"] for row in rows}) or budget["clients"] != len(rows):
        faults.append("the budgets are not those of the clients")
    for name in ("charges", "undelivered", "declined"):
        if budget[name] != sum(row[name] for row in rows):
            faults.append(f"the number of {name} is not the sum over the clients")
    persons = report["headline"]["person"]
    limit = 3 if report["plan"]["unit"] == Unit.CLIENT else 1
    if persons[limit]["epsilon"] != "none possible":
        faults.append("a figure is printed for persons whose number of records nothing bounds")
    priced = [row["epsilon"] for row in report["prices"]["persons"]]
    if [line["epsilon"] for line in persons[limit + 1 :]] not in (
        priced,
        [report["headline"]["epsilon"]] * len(priced),
    ):
        faults.append("the figures for persons with several records are not those of the schedule")
    if budget["unproven"] != sum(isinstance(row["spent_epsilon"], str) and not row["test_noise"] for row in rows):
        faults.append("another number of clients is unproven")
    prices, plan = report["prices"], _plan(report)
    if not _near(prices["delta_times_records"], plan.delta * plan.records_bound):
        faults.append("delta times the bound on records is another number")
    rates = [[point["fpr"] for point in of["tpr"]] for of in (prices, report["headline"])]
    if any(fprs != [0.001, 0.01] for fprs in rates):
        faults.append("the power of attackers is given at other rates than 0.1 % and 1 %")
    faults += _told(files)
    yield Check(
        "sums and remainders",
        Result.FAILS if faults else Result.HOLDS,
        f"{faults[0]} ({len(faults):,} such)" if faults else "budgets, totals, rows of rounds and persons follow",
    )


def _told(files: _Files) -> list[str]:
    """Returns what rows say otherwise than the receipts file and the ledgers; nothing where neither is here."""
    report, faults = files.report or {}, []
    job = report["run"]["job"]
    by_round: dict[int, list[Receipt]] = defaultdict(list)
    joined: dict[str, set[int]] = defaultdict(set)
    kept: dict[str, set[int]] = defaultdict(set)
    for one in files.receipts:
        if one.receipt.job == job:
            by_round[one.receipt.round].append(one.receipt)
            joined[one.receipt.account].add(one.receipt.round)
            kept[one.receipt.account].add(one.receipt.seq)
    if files.digests:
        for row in files.clients:
            if row["verdict"] != "unknown" and row["rounds_joined"] != len(joined[row["account"]]):
                faults.append(f"{row['name']}: it joined another number of rounds")
        spent: dict[str, float] = {}
        for line in report["rounds"]:
            found = by_round[line["round"]]
            spent |= {receipt.account: receipt.spent for receipt in found}
            if len({receipt.account for receipt in found}) > line["replies"]:
                faults.append(f"round {line['round']} counts fewer updates than there are receipts")
            if not isinstance(line["epsilon"], str) and not _near(line["epsilon"], max(spent.values(), default=0.0)):
                faults.append(f"the spend after round {line['round']} is not that of the receipts")
    accounts = {identity: one for ledger in files.ledgers for identity, one in ledger.everyone.items()}
    for row in files.clients:
        account = accounts.get(row["account"])
        if account is not None and account.heads[-1] == row["ledger_head"]:
            if account.backwards != row["clock_set_back"]:
                faults.append(f"{row['name']}: its clock was set back another number of times")
            charges = len(account.jobs[job].entries) if job in account.jobs else 0
            unseen = max(0, charges - len(kept[row["account"]]))
            if files.digests and row["undelivered"] + row["receipts_missing"] != unseen:
                faults.append(f"{row['name']}: another number of its updates never arrived")
    return faults


def _said(report: Mapping[str, Any], epsilon: float, delta: float, times: int) -> tuple[str, str]:
    """Returns whom a finite headline must say that it protects, and its sentence."""
    if report["plan"]["unit"] == Unit.CLIENT:
        return PROTECTS, sentence_of_clients(epsilon, delta)
    protects = protects_of(times)
    return protects, sentence_of(epsilon, delta, protects, [])


def _adversaries(report: Mapping[str, Any]) -> Check:
    """Each adversary of a plan at unit client has its own figure: the trusted server's is infinity (guarantee G16)."""
    plan, headline = _plan(report), report["headline"]
    event = Event.of_models(plan)
    loose = best_order(event, plan.delta)[1]
    alone = pld_epsilon(event, plan.delta) if loose <= _PLD_EPSILON else loose
    rows = {row["who"]: row["epsilon"] for row in headline["adversaries"]}
    models = report["prices"]["models_alone"]["epsilon"]
    sound = (
        headline["against"] == AGAINST
        and list(rows.values()) == [headline["epsilon"], INFINITY, models]
        and [line["epsilon"] for line in headline["person"][:3]] == list(rows.values())
        and (models == UNKNOWN or plan.banded is not None or _is_of_models(report, models, alone, loose))
        and _who_sees(report, models)
    )
    if plan.banded is not None:
        # Turns are public: whoever sees less gets no discount, also where the headline is the filter's figure.
        sound = sound and models == headline["epsilon"]
        words = "infinity against the server, and no discount for anybody: turns are public"
        return _checked("adversaries", sound, words)
    words = f"infinity against the server, {alone:.4g} for somebody who sees the models alone, by PLD anew"
    return _checked("adversaries", sound, words)


def _is_of_models(report: Mapping[str, Any], models: Any, alone: float, loose: float) -> bool:
    """Whether the amplified figure is that of the coins, in a run where no round can have been drawn again."""
    undelivered = any(client["undelivered"] for client in report["clients"])
    return _near(models, alone, 1e-4) and models <= loose * (1 + _SAME) and not undelivered


def _who_sees(report: Mapping[str, Any], models: float | str) -> bool:
    """Whether the table of adversaries has the figures of the headline, each in its row and in its words."""
    epsilon = report["headline"]["epsilon"]
    relay = epsilon if "simulation_only" in report else INFINITY
    rows = [row for row in report["adversaries"] if "epsilon" in row]
    wanted = [INFINITY, relay, epsilon, epsilon, models]
    words = [f"epsilon {value if isinstance(value, str) else figure_words(value)}; " for value in wanted]
    return [row["epsilon"] for row in rows] == wanted and all(
        row["protected_by"].startswith(said) for row, said in zip(rows, words, strict=True)
    )


def _is_alone(files: _Files, client: Mapping[str, Any], plan: Plan) -> bool:
    """Whether everything that a client signed is this one schedule: nobody's word for it is taken."""
    report = files.report or {}
    commit, grant = _commit_of(files, client), _grant_of(files, client)
    if commit is None or grant is None or commit["seq"] > 1 + len(client["budget_changes"]):
        # What came between grant and commitment may have been another run's charges.
        return False
    filter_, cost = grant_of(grant["body"]), rdp(Event.all_of_round(plan), grant["body"]["order"])
    for receipt in files.known_of(client["account"]):
        fits = receipt.job == report["run"]["job"] and receipt.charges <= plan.charges
        if not fits or not _near(receipt.spent, filter_.epsilon_of(receipt.charges * cost)):
            return False
    whole = filter_.epsilon_of(plan.charges * cost)
    return bool(client["spent_epsilon"] <= whole * (1 + _SAME))


def _record_level(files: _Files) -> tuple[float, float]:
    """Returns the epsilon and delta that may be printed for one record, from a report's own rows.

    Raises:
        ValueError: None may, because a client's spend is not a number.
    """
    report = files.report or {}
    clients, prices, plan = report["clients"], report["prices"], report["plan"]
    figures = [client["spent_epsilon"] for client in clients]
    if not figures or any(isinstance(figure, str) for figure in figures):
        raise ValueError("a figure is printed although a client's spend is unknown")
    if any(client["verdict"] not in ("verified", "ledger only") or client["receipts_missing"] for client in clients):
        raise ValueError("a figure is printed although a client's receipts are missing or contradict its ledger")
    if any(client["charges"] > _plan(report).charges for client in clients if client["runs"] == 1):
        raise ValueError("a client was charged more often than the schedule allows")
    if any(client["spent_epsilon"] > client["granted_epsilon"] * (1 + 1e-9) for client in clients):
        raise ValueError("a client spent more than was granted")
    one_schedule = all(
        client["runs"] == 1 and client["delta"] >= plan["delta"] and _is_alone(files, client, _plan(report))
        for client in clients
    )
    if not one_schedule:
        return max(figures), max(client["delta"] for client in clients)
    pld, prv = prices["pld"], prices["prv"]
    agree = isinstance(prv, str) or abs(prv - pld) <= _AGREEMENT + 0.02 * pld if not isinstance(pld, str) else False
    return (pld if agree else prices["gate"]), plan["delta"]


def _composed(clients: Sequence[Mapping[str, Any]], times: int) -> float | None:
    """Returns epsilon over the dearest clients' spends, where they count at one order and delta."""
    grants = {grant_of(client["proof"]["grant"]["body"]) for client in clients}
    if len({(grant.order, grant.delta) for grant in grants}) != 1:
        return None
    grant = next(iter(grants))
    added = grant.epsilon - grant.budget_rdp
    top = sorted((client["spent_epsilon"] for client in clients), reverse=True)[:times]
    return float(sum(spent - added for spent in top if spent > 0) + added)


def _multiplicity(files: _Files, times: int) -> Iterator[Check]:
    """Whether the holders' signed grants say in how many data sets one person may be."""
    silent, more = [], []
    for client in files.clients:
        grant = (client["proof"] or {}).get("grant") or {"body": {}}
        said = re.search(r"one person in at most (\d+) of them", grant["body"].get("population", ""))
        if said is None:
            silent.append(client["name"])
        elif int(said[1]) > times:
            more.append(client["name"])
    if more:
        words = f"the grants of {_some(more)} let one person be in more data sets than the figure is for"
        yield Check("persons in several data sets", Result.FAILS, words)
        return
    yield Check(
        "persons in several data sets",
        Result.OPEN if silent else Result.HOLDS,
        f"the grants of {_some(silent)} do not say in how many data sets one person may be"
        if silent
        else f"every client's grant, which it signed, declares at most {times}",
    )


def _beyond(files: _Files) -> Iterator[Check]:
    """What no file can prove."""
    if files.report is not None or files.receipts or files.ledgers:
        yield Check(
            "this code", Result.OPEN, "no signature shows that a holder ran this code on the data it says it has"
        )
    if files.report is not None:
        words = "a holder whom the operator left out can show it: verify the report beside that holder's ledger"
        yield Check("all clients", Result.OPEN, words)
        words = "sentences and whatever no line above names are those of whoever signed; no receipt speaks for them"
        yield Check("words of the report", Result.OPEN, words)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES])
    return shown if len(names) <= _NAMES else f"{shown} and {len(names) - _NAMES:,} more"


_QUESTIONS: Final[tuple[Callable[[_Files], Iterator[Check]], ...]] = (
    _identity,
    _overviews,
    _page,
    _clients,
    _commitments,
    _drawings,
    _receipts,
    _ledgers,
    _spends,
    _prices,
    _headline,
    _audited,
    _rows,
    _beyond,
)
