"""The report of a data holder's own ledgers, without any run: what each data set has spent, by run and by round.

It is a pure function of the ledgers' bytes, so `privacy.verify` makes it again from the same ledgers and compares; it
needs no signature of its own, because every figure in it is signed in the ledger.

Two figures for each data set, never mixed (guarantee G3): the filter's, which holds for everything that was charged,
whatever led to it; and, where one committed schedule is alone in the ledger, the price of the whole of that schedule by
loss distributions, with PRV and RDP beside it.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from privacy.accounting import Event, best_order, events_to_json, pld_epsilon, prv_epsilon, rdp
from privacy.errors import LedgerError
from privacy.files import write_whole
from privacy.ledger import Account
from privacy.plan import Adjacency, canonical
from privacy.report import INFINITY, UNKNOWN, odds_of, tier_words, to_json
from privacy.report_page import LEDGER_SCHEMA, render_ledgers
from privacy.transcript import Line, Transcript, iso, read_ledger

# Above it loss distributions take minutes, and nobody needs the figure exactly.
_PLD_EPSILON: Final = 100


def write_over_ledgers(places: Sequence[Path], folder: Path) -> Path:
    """Writes ``report.json`` and ``report.html`` over ledgers, exports, or folders with them.

    Returns:
        The path of the page.

    Raises:
        LedgerError: A ledger is missing or damaged, or two hold the same data set.
        RunError: A file cannot be written.
    """
    report = over_ledgers([read_ledger(place) for place in places])
    page = folder / "report.html"
    write_whole(folder / "report.json", to_json(report).encode())
    write_whole(page, render_ledgers(report).encode())
    return page


def over_ledgers(ledgers: Sequence[Transcript]) -> dict[str, Any]:
    """Returns the report of ledgers, JSON types only.

    Guarantees:
        Small: a line of a data set's history names its run by its place in ``runs``.
        Unknown is not small: a data set whose noise came from a test source has infinity for every figure (G6, G11).

    Raises:
        LedgerError: Two ledgers hold the same data set; they could tell different stories of it.
    """
    data_sets, seen = [], set[str]()
    for ledger in ledgers:
        lines: dict[str, list[Line]] = defaultdict(list)
        for line in ledger.lines:
            lines[line.account].append(line)
        for identity, account in sorted(ledger.everyone.items(), key=lambda pair: (pair[1].population, pair[1].name)):
            if identity in seen:
                raise LedgerError(
                    f"expected each data set once, got two ledgers of {account.name}; give its latest one"
                )
            seen.add(identity)
            data_sets.append(_data_set(account, lines[identity], ledger))
    report: dict[str, Any] = {
        "schema": LEDGER_SCHEMA,
        "data_sets": data_sets,
        "meaning": "epsilon bounds by how much one record can change the odds of any conclusion from the releases",
        "not_covered": [
            "Use of the data outside these ledgers, and what its owner tells by other means.",
            "Whether a later state of a ledger exists: receipts that peers hold can show it, a ledger alone cannot.",
            "Whether the holder ran the code that a commitment names: no signature can show that.",
            "Persons with several records, or in several data sets: nothing here bounds how many.",
        ],
    }
    return {"schema": LEDGER_SCHEMA, "report_id": hashlib.sha256(canonical(report)).hexdigest()} | report


def _data_set(account: Account, lines: Sequence[Line], ledger: Transcript) -> dict[str, Any]:
    def figure(value: float) -> float | str:
        return INFINITY if account.test or math.isinf(value) else value

    spent, granted = account.spent, float(account.grant.epsilon)
    runs = {job: number for number, job in enumerate(account.jobs)}
    odds = odds_of(spent)
    return {
        "name": account.name,
        "account": account.identity,
        "population": account.population,
        "no_person_in_common_with": list(account.apart),
        "unit": account.grant.unit.value,
        "adjacency": account.grant.adjacency.value,
        "granted_epsilon": granted,
        "spent_epsilon": figure(spent),
        "remaining_epsilon": 0.0 if account.test else max(0.0, granted - spent),
        "delta": account.grant.delta,
        "order": float(account.grant.order),
        "records_bound": account.grant.records_bound,
        "odds_factor": figure(odds),
        "tier": tier_words(figure(spent)),
        "charges": account.charges,
        "test_noise": account.test,
        "unsigned_entries": account.unsigned,
        "clock_set_back": account.backwards,
        "public_key": account.public_key,
        "ledger_head": account.heads[-1],
        "budget_changes": [
            {
                "time": iso(change.time),
                "before": change.before,
                "after": change.after,
                "raised": change.after > change.before,
            }
            for change in account.changes
        ],
        "runs": [_run(account, job, lines, ledger) for job in account.jobs],
        "schedule": _schedule(account),
        "history": [[iso(line.time), runs[line.job], line.round, line.released, figure(line.spent)] for line in lines],
    }


def _run(account: Account, job: str, lines: Sequence[Line], ledger: Transcript) -> dict[str, Any]:
    """Returns what one job released, and what it would have cost alone, by the filter."""
    mine = [line for line in lines if line.job == job]
    terms = ledger.commits[account.identity, job]["body"]
    alone = account.grant.epsilon_of(sum(rdp(line.events, account.grant.order) for line in mine if line.charged))
    return {
        "job": job,
        "charges": sum(line.charged for line in mine),
        "rounds": sorted({line.round for line in mine}),
        "released": sorted({event.released for line in mine for event in line.events}),
        "first": iso(mine[0].time) if mine else "",
        "last": iso(mine[-1].time) if mine else "",
        "alone_epsilon": INFINITY if account.test else alone,
        "plan": terms["plan"],
        # Commitments of versions 1 and 2 do not name these.
        "code": terms.get("code") or "not named",
        "settings": terms.get("settings") or "not named",
        "sampling": terms.get("sampling") or "not named",
    }


def _schedule(account: Account) -> dict[str, Any] | None:
    """Returns the price of the one schedule that is in an account by every accountant; None where there is no such."""
    if len(account.jobs) != 1 or account.test:
        return None
    job = next(iter(account.jobs.values()))
    alone = math.isclose(account.spent_rdp, job.charges * rdp(job.events, account.grant.order), rel_tol=1e-9)
    if not alone or job.charges > job.joins or job.charges == 0:
        return None
    whole = job.whole
    return {"joins": job.joins, "charged": job.charges, **_price(whole, account.grant.delta)}


# Many data sets of one job have the same schedule: it is priced once.
@functools.lru_cache(maxsize=256)
def _price(whole: tuple[Event, ...], delta: float) -> dict[str, Any]:
    order, bound = best_order(whole, delta)
    tight = bound <= _PLD_EPSILON
    prv, note = prv_epsilon(whole, delta) if tight else (None, f"not asked: epsilon above {_PLD_EPSILON}")
    return {
        "event": events_to_json(whole),
        "rdp": bound if math.isfinite(bound) else INFINITY,
        "rdp_order": order,
        "pld": pld_epsilon(whole, delta) if tight else UNKNOWN,
        "pld_replace_one": pld_epsilon(whole, delta, Adjacency.REPLACE_ONE) if tight else UNKNOWN,
        "prv": UNKNOWN if prv is None else prv,
        "prv_note": note,
        "meaning": "the whole committed schedule, even if it was stopped early; no refund",
    }
