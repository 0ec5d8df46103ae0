"""The report of a run: what it cost the data holders' privacy, for a reader who need not trust the operator.

`build` turns plain values into a JSON-able report (schema ``tacit-report/2``), `privacy.report_page.render`
turns that report, and nothing else, into one self-contained page, and `write` stores both. No record, count
or draw of a data holder enters: the only exact counts live under ``simulation_only``, a key that a
deployment never has (G12).

What makes a report checkable by somebody who distrusts whoever made it (`privacy.verify`):

* ``report_id`` is the SHA-256 of everything but itself and ``signature``; ``signature`` is the server's, over all the
  rest; the file is the one text of its content (`to_json`), so any changed byte is found.
* ``clients[i].proof`` holds what that client signed: its grant, its commitment to this job (plan, schedule, code,
  settings, sampling law), and its last receipt with the peer's countersignature. The figures of a client's line that
  its receipt signs are named in ``signed``.
* ``evidence`` names the receipts file beside the report by its number of lines and its SHA-256.

Which epsilon is the headline (G1, G3, G4, G6):

1. Infinity, where a client used a test noise source: the assumption is known to be false.
2. Unknown, where any client's spend is not proven by its receipts, or a rule of the chain was not kept.
3. One committed schedule in each ledger: the price of the *whole* schedule, by PLD where the second
   accountant agrees with it, by the RDP filter otherwise. Stopping early refunds nothing.
4. Several runs in one ledger, or a holder's delta below the plan's: the RDP filter's figure, the largest
   over clients.
5. Where one person may be in several data sets: the figure composed over that many clients, not 3 or 4.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from privacy.errors import RunError
from privacy.identity import Identity
from privacy.plan import Local, Plan, Unit, canonical, require
from privacy.report_clients import for_clients
from privacy.report_page import INFINITY, SCHEMA, UNKNOWN, figure_words, partition_picture, render

TOLD: Final = (
    "epsilon_lower",
    "epsilon_lower_binomial",
    "epsilon_lower_fdp",
    "epsilon_lower_gaussian",
    "epsilon_upper",
    "delta",
    "canaries",
    "guesses",
    "correct",
    "confidence",
    "tried",
    "ceiling",
    "attack",
    "threat_model",
    "schedule",
    "rounds",
)
"""Figures of a canary bound that may enter a report; whatever else an audit found stays with the holder (G18)."""
_TOLD_OF_AUDIT: Final = ("schema", "date", "code_hash", "records", "holds", "limits", "audits", "contradicted")

__all__ = [
    "INFINITY",
    "SCHEMA",
    "UNKNOWN",
    "ClientSpend",
    "Prices",
    "RunFacts",
    "Standing",
    "Verdict",
    "build",
    "partition_picture",
    "render",
    "to_json",
    "write",
]

# PRV adds its own error of 0.01 to every figure: two sound accountants differ by that and a little more.
_AGREEMENT: Final = 0.05

# PLD rounds losses up, and so lies a little above what the saddle-point integral gives; below it lies rounding alone.
_PLD_BELOW: Final = 1e-5
_PLD_ABOVE: Final = 0.01

# At most this many reasons are spelled out; the rest is in the per-client list.
_REASONS: Final = 8

# The fields of a client's line that its last receipt signs.
_SIGNED: Final = ("spent_epsilon", "granted_epsilon", "delta", "charges", "test_noise", "public_key", "ledger_head")

# What a round may say; anything else a caller puts into a round's record stays out of the report.
_ROUND_FIELDS: Final = ("round", "metrics", "client_metrics", "replies", "declined", "missing", "epsilon", "seconds")
_SIMULATION_FIELDS: Final = ("partition", "class_names", "sizes", "label_table", "truth")


class Verdict(StrEnum):
    """What proves a client's spend.

    ``VERIFIED``: a receipt of its last charge, which signs everything before it. ``LEDGER``: its ledger alone, because
    that charge was another run's or its update never arrived; every update that did arrive has its receipt.
    ``UNKNOWN``: nothing, because receipts are missing or contradict the ledger.
    """

    VERIFIED = "verified"
    LEDGER = "ledger only"
    UNKNOWN = "unknown"


class Standing(StrEnum):
    """Who answers for an assumption; with one that is not enforced, no finite epsilon is printed."""

    ENFORCED = "enforced"
    DECLARED = "declared by holder"
    BROKEN = "not enforced"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientSpend:
    """What one client's ledger and receipts say.

    Attributes:
        name: Pseudonym.
        granted_epsilon: The holder's budget for the lifetime of its data set, add/remove.
        delta: The holder's delta, at which all its spend is priced.
        spent_epsilon: RDP filter's figure over all runs in the ledger; None where it is unknown.
        rounds_joined: Rounds of this job with a release.
        charges: Charges in the ledger, retries after a crash included.
        declined: Rounds that this client declined with one of the fixed words.
        runs: Runs in the ledger, this one included.
        other_runs: How many of them are not this one.
        receipts_missing: Updates of this run that arrived, as far as one can tell, and have no receipt here.
        undelivered: Charges of this run whose update never arrived; they are spent all the same.
        test_noise: Whether the ledger was made with a test noise source; then every figure is infinity.
        history: (round, epsilon spent after it) of this job, rounds ascending.
        public_key: The client's signing key, in hex or base64; empty where it has none.
        ledger_head: Hash of the last ledger entry.
        verdict: What proves the spend.
        account: The data set's random identity.
        proof: What the client signed: ``grant`` and ``commit`` (ledger entries), ``receipt`` (text), its ``peer`` and
            ``countersignature``; None where there is nothing.
        changes: The holder's own changes of its budget: (ISO 8601 time, before, after).
        clock_set_back: Entries of the ledger whose time is before that of an earlier one; their spend counts.
    """

    name: str
    granted_epsilon: float
    delta: float
    spent_epsilon: float | None
    rounds_joined: int
    charges: int
    declined: int
    runs: int
    other_runs: int
    receipts_missing: int
    undelivered: int
    test_noise: bool
    history: tuple[tuple[int, float], ...]
    public_key: str
    ledger_head: str
    verdict: Verdict
    account: str = ""
    proof: Mapping[str, Any] | None = None
    changes: tuple[tuple[str, float, float], ...] = ()
    clock_set_back: int = 0

    def figure(self) -> float | None:
        """Returns the spend that may be printed: infinity under test noise, None where it is not proven."""
        if self.test_noise:
            return math.inf
        if self.verdict is Verdict.UNKNOWN or self.receipts_missing > 0 or self.spent_epsilon is None:
            return None
        return None if math.isnan(self.spent_epsilon) else self.spent_epsilon


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prices:
    """What the committed schedule costs a client that joins as often as it may, by several accountants.

    Attributes:
        schedule: In words, such as "Poisson q=0.1, sigma=1.2, 600 steps".
        steps: Steps of the whole schedule, ``plan.steps * plan.joins``; at unit client one for each join, and a single
            one for a whole matrix.
        gate: Epsilon at the plan's delta by the RDP filter that guards the ledgers.
        gate_order: The filter's order that gives ``gate``.
        pld: Epsilon by privacy loss distributions, add/remove; None where it could not be computed.
        pld_replace_one: The same for replacing one record.
        prv: Epsilon by Opacus' PRV accountant, add/remove; None where it could not be computed.
        prv_note: Why ``prv`` is missing, or what to know about it.
        rdp: Epsilon by RDP at the best order; always valid, looser.
        at_deltas: (delta, epsilon) by PLD at other deltas.
        tpr: (false positive rate, largest true positive rate) of any membership test, by PLD.
        accountant: Libraries and versions, in words.
        unamplified: Epsilon by RDP without any discount for sampling, for somebody who knows each record's coins.
        rho: zCDP of the schedule without that discount.
        persons: (records, epsilon) for a person with so many records in one data set, by mixture of Gaussians; empty
            where nobody asked.
        metrics: Epsilon by PLD of all the metrics of clients' own records by themselves; they are part of every other
            figure. None where none is asked, or it could not be computed.
        models_alone: Only where the plan protects clients: epsilon for somebody who sees the models of all rounds and
            nothing of who took part, by the coins' Poisson rate. It is no figure of this report's own readers.
        saddle_replace_one: Epsilon for replacing one record by an accountant that shares nothing with PLD; None where
            there is no such figure. See `privacy.replacement`.
        saddle_note: Why it is missing, or how it was found.
        rdp_replace_one: Epsilon for replacing one record by RDP at the best order; always valid, looser.
    """

    schedule: str
    steps: int
    gate: float
    gate_order: float
    pld: float | None
    pld_replace_one: float | None
    prv: float | None
    prv_note: str
    rdp: float
    at_deltas: tuple[tuple[float, float], ...]
    tpr: tuple[tuple[float, float], ...]
    accountant: str
    unamplified: float | None = None
    rho: float | None = None
    persons: tuple[tuple[int, float], ...] = ()
    metrics: float | None = None
    models_alone: float | None = None
    saddle_replace_one: float | None = None
    saddle_note: str = ""
    rdp_replace_one: float | None = None

    def replace_one_agrees(self) -> bool | None:
        """Returns whether the figures for replacing a record fit together; None where there is nothing to compare."""
        if self.pld_replace_one is None or self.saddle_replace_one is None:
            return None
        return same_replace_one(self.pld_replace_one, self.saddle_replace_one)

    def accountants_agree(self) -> bool | None:
        """Returns whether PLD, PRV and RDP fit together; None where there is nothing to compare with."""
        if self.pld is None or self.prv is None:
            return None
        slack = _AGREEMENT + 0.02 * self.pld
        # RDP bounds from above what PLD computes exactly: PLD above RDP means that one of them is wrong.
        return abs(self.prv - self.pld) <= slack and self.rdp >= self.pld - slack


def same_replace_one(pld: float, second: float) -> bool:
    """Says whether a PLD figure for replacing a record is the one that a second accountant gives.

    Never below it, where a figure would promise too much; above it by no more than PLD's rounding of many steps.
    """
    return -_PLD_BELOW * max(1.0, second) <= pld - second <= _PLD_ABOVE * max(1.0, second)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Everything a report is made of; the lead of a run assembles it from the run folder.

    Attributes:
        job: Job id, stable over resumption.
        task: Name of the task.
        task_summary: What is learned, in words.
        record: What one record is, in words.
        started: ISO 8601 time.
        finished: ISO 8601 time.
        status: In words, such as "completed".
        config: The resolved scenario, public.
        plan: The plan that every client ran.
        committed: Whether every ledger of this run committed to exactly this plan, and charged nothing else for it.
        doubts: Whatever else the run's files contradict each other in, one sentence each; the headline is then unknown.
        local: The learning knobs.
        rounds: One mapping per round: round, metrics, replies, declined, missing, epsilon (largest over
            clients, None where unknown), seconds. Metrics are those of the server's public test set; client_metrics,
            where the plan asks for any, what clients say about their own records, noised and pooled.
        clients: One entry per ledger.
        prices: What the committed schedule costs.
        multiplicity: In how many clients' data sets one person may be; 1 where the holders declare "in one".
        multiplicity_epsilon: Epsilon at the plan's delta composed over that many clients and all their runs,
            one record of the person in each; None where the ledgers' spend cannot be added up. Not used with
            ``multiplicity`` 1.
        augmented: Whether records are augmented at random.
        noise_source: Name of the source of coins and noise.
        versions: Package names and versions.
        code_hash: Hash of the code that ran.
        witness: Who countersigned the receipts, in words; empty where nobody did.
        covers: "this run only", or "all runs in DIR".
        simulation: None in a deployment; else label_table (clients x classes), class_names, sizes, partition
            (words) and truth. Shown in a section of its own only.
        engine: Which engine ran the job.
        device: Device words.
        hardware: Hardware words.
        receipts: ``file``, ``lines`` and ``sha256`` of the receipts that the report was made from; empty without any.
        settings: Digest that each client's ledger should name as the job's settings; see `privacy.wire`.
        product: Who is responsible, what for, and on what data, in the curator's words: curator, purpose, data.
        audit: What an empirical audit of this run found, as it wrote it down; None where there was none.
        model: SHA-256 of the model after the last of the rounds, in hex; empty where there is none.

    Raises:
        PlanError: ``multiplicity`` is below 1.
    """

    job: str
    task: str
    task_summary: str
    record: str
    started: str
    finished: str
    status: str
    config: Mapping[str, Any]
    plan: Plan
    committed: bool
    doubts: Sequence[str]
    local: Local
    rounds: Sequence[Mapping[str, Any]]
    clients: Sequence[ClientSpend]
    prices: Prices
    multiplicity: int
    multiplicity_epsilon: float | None
    augmented: bool
    noise_source: str
    versions: Mapping[str, str]
    code_hash: str
    witness: str
    covers: str
    simulation: Mapping[str, Any] | None
    engine: str
    device: str
    hardware: str
    receipts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: str = ""
    product: Mapping[str, str] = dataclasses.field(default_factory=dict)
    audit: Mapping[str, Any] | None = None
    model: str = ""

    def __post_init__(self) -> None:
        require(
            self.multiplicity >= 1,
            f"expected multiplicity >= 1, got {self.multiplicity}; 1 says that no person is in two data sets",
        )

    @property
    def test_noise(self) -> bool:
        """Whether any client's noise came from a test source."""
        return any(client.test_noise for client in self.clients)


def build(facts: RunFacts) -> dict[str, Any]:
    """Builds the report of a run.

    Guarantees:
        Strict: the result holds only JSON types; infinities are the word "infinity", missing or NaN figures
            the word "unknown".
        Unknown is not small: no finite headline where any client's spend is unproven or any rule was not
        kept (G6). Separate: nothing of ``facts.simulation`` is outside the key ``simulation_only``, which is
        absent without it. Repeatable: equal facts give equal reports; ``report_id`` is the SHA-256 of all
        the rest.
    """
    reasons = _reasons(facts)
    report = {
        "schema": SCHEMA,
        "headline": _headline(facts, reasons),
        "run": {
            "job": facts.job,
            "task": facts.task,
            "summary": facts.task_summary,
            "record": facts.record,
            "started": facts.started,
            "finished": facts.finished,
            "status": facts.status,
            "covers": facts.covers,
            "setting": _setting(facts),
            "model": facts.model,
        },
        "product": {name: str(facts.product.get(name) or "not stated") for name in ("curator", "purpose", "data")},
        "warnings": _warnings(facts),
        "budget": _budget(facts),
        "rounds": _rounds(facts),
        "clients": [_client(client) for client in facts.clients],
        "prices": _prices(facts),
        "assumptions": _assumptions(facts),
        "covered": _covered(facts),
        "not_covered": _not_covered(facts),
        "adversaries": _adversaries(facts),
        "witness": _witness(facts),
        "mechanism": _mechanism(facts),
        "sampling": _sampling(facts),
        "empirical": _empirical(facts),
        "accesses": _accesses(facts),
        "limits": _limits(facts),
        "plan": json.loads(facts.plan.to_json()) | {"digest": facts.plan.digest()},
        "local": dataclasses.asdict(facts.local),
        "config": facts.config,
        "software": {
            "code_hash": facts.code_hash,
            "config_hash": hashlib.sha256(canonical(_plain(facts.config))).hexdigest(),
            "settings_hash": facts.settings,
            "engine": facts.engine,
            "device": facts.device,
            "hardware": facts.hardware,
            "versions": facts.versions,
        },
        "evidence": {"receipts": dict(facts.receipts)},
    }
    if facts.simulation is not None:
        report["simulation_only"] = {
            name: facts.simulation[name] for name in _SIMULATION_FIELDS if name in facts.simulation
        }
    if facts.plan.unit is Unit.CLIENT:
        report = for_clients(report, facts, whole=_one_schedule(facts))
    plain: dict[str, Any] = _plain(report)
    return {"schema": SCHEMA, "report_id": report_id(plain), "signature": None} | plain


def report_id(report: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a report's content, in hex: of everything but the id itself and the signature."""
    content = {name: value for name, value in report.items() if name not in ("report_id", "signature")}
    return hashlib.sha256(canonical(content)).hexdigest()


def signed_bytes(report: Mapping[str, Any]) -> bytes:
    """Returns what a report's signature covers: everything but the signature."""
    return b"tacit/report/2\n" + canonical({name: value for name, value in report.items() if name != "signature"})


def sign(report: Mapping[str, Any], identity: Identity) -> dict[str, Any]:
    """Returns a report with the signature of whoever answers for it, the server of the job."""
    signature = {"by": "server", "public_key": identity.public_key, "value": identity.sign(signed_bytes(report))}
    return {**report, "signature": signature}


def to_json(report: Mapping[str, Any]) -> str:
    """Returns the report as JSON text, one client, round or rule per line, without NaN or infinity.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    parts = []
    for name, value in report.items():
        if isinstance(value, list):
            items = ",\n  ".join(json.dumps(item, allow_nan=False) for item in value)
            text = f"[\n  {items}\n ]" if value else "[]"
        else:
            text = json.dumps(value, allow_nan=False, indent=1).replace("\n", "\n ")
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(facts: RunFacts, directory: Path, identity: Identity | None = None) -> tuple[Path, Path]:
    """Writes ``report.json`` and ``report.html`` into a run folder.

    Args:
        facts: What the report is made of.
        directory: Where.
        identity: Who signs it, the job's server; unsigned without, and `privacy.verify` then says so.

    Guarantees:
        Whole: each file is replaced in one step; a reader never finds half a report.

    Returns:
        The paths of the JSON file and of the page.

    Raises:
        RunError: A file could not be written; nothing partial is left behind.
    """
    report = build(facts) if identity is None else sign(build(facts), identity)
    contents = {"report.json": to_json(report), "report.html": render(report)}
    for name, text in contents.items():
        _replace(directory / name, text)
    return directory / "report.json", directory / "report.html"


def _replace(path: Path, text: str) -> None:
    """Writes a text file so that the path shows either the old content or all of the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"expected to write {path}, got {error.strerror or error}; make room there and ask again"
        ) from error


def _plain(value: Any) -> Any:
    """Returns a value made of JSON types only, with words in place of numbers that JSON does not have."""
    # Nearly all of a long report is one of these, and asking whether a value is some kind of number takes long.
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        # NumPy's numbers are numbers too, with a text of their own.
        value = float(value)
        if math.isnan(value):
            return UNKNOWN
        if math.isinf(value):
            return INFINITY if value > 0 else f"-{INFINITY}"
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    return str(value)


def _figure(value: float | None) -> float | str:
    """Returns an epsilon as the report prints it: None and NaN are unknown, never small."""
    plain: float | str = UNKNOWN if value is None else _plain(float(value))
    return plain


def _some(names: Sequence[str]) -> str:
    """Returns a few names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more"


def _reasons(facts: RunFacts) -> list[str]:
    """Returns why no finite epsilon may be printed, one sentence each; empty where one may."""
    if not facts.clients:
        return [*facts.doubts, "No client's ledger was read."]
    if tested := [client.name for client in facts.clients if client.test_noise]:
        return [f"The noise of {_some(tested)} came from a test source, which is no protection."]
    reasons = list(facts.doubts)
    if _contradicted(facts):
        reasons.append("An audit of this code contradicts what it promises; see the empirical evidence.")
    if not facts.committed:
        reasons.append("The ledgers committed to another plan than the one given for this run.")
    for client in facts.clients:
        if client.receipts_missing > 0:
            reasons.append(f"{client.name}: {client.receipts_missing} of its receipts are missing.")
        elif client.verdict is Verdict.UNKNOWN:
            reasons.append(f"{client.name}: its receipts and its ledger contradict each other.")
        elif client.figure() is None:
            reasons.append(f"{client.name}: what it spent is unknown.")
        elif _overspent(client):
            reasons.append(f"{client.name}: more was spent than granted, so its ledger's gate did not hold.")
    if overrun := _overrun(facts):
        reasons.append(f"{_some(overrun)}: more charges than the {facts.plan.charges} that the plan allows.")
    if len(reasons) > _REASONS:
        reasons = [*reasons[: _REASONS - 1], f"And {len(reasons) - _REASONS + 1:,} more reasons like these."]
    if facts.multiplicity > 1 and (fault := _multiplicity_fault(facts)):
        reasons.append(fault)
    if math.isnan(_record_level(facts)[0]):
        reasons.append("The price of the committed schedule is unknown.")
    return reasons


def _overspent(client: ClientSpend) -> bool:
    """Whether a client's proven spend is above its budget by more than rounding."""
    return not client.test_noise and (client.figure() or 0.0) > client.granted_epsilon * (1 + 1e-9)


def _overrun(facts: RunFacts) -> list[str]:
    """Returns the clients whose only run made more charges than the committed schedule has."""
    return [client.name for client in facts.clients if not client.other_runs and client.charges > facts.plan.charges]


def _multiplicity_fault(facts: RunFacts) -> str:
    """Returns what is wrong with the figure for a person in several data sets, or nothing."""
    composed = facts.multiplicity_epsilon
    if composed is None or math.isnan(composed):
        return (
            f"The cost for a person in {facts.multiplicity} data sets was not composed: that needs ledgers which all "
            "count at one order and at the plan's delta."
        )
    known = [figure for client in facts.clients if (figure := client.figure()) is not None]
    if known and composed < max(known):
        return f"The cost given for a person in {facts.multiplicity} data sets is below that of one data set."
    return ""


def _one_schedule(facts: RunFacts) -> bool:
    """Whether every ledger holds this schedule and nothing else, at the plan's delta or a larger one."""
    return facts.committed and all(
        not client.other_runs and client.delta >= facts.plan.delta for client in facts.clients
    )


def _doubted(facts: RunFacts) -> bool:
    """Whether the run's files contradict each other, so that even what the ledgers say may not be all."""
    return bool(facts.doubts) or not facts.committed or not facts.clients


def _pld_holds(prices: Prices) -> bool:
    """Whether the PLD figure may be quoted: it is there, and no second accountant contradicts it."""
    return prices.pld is not None and not math.isnan(prices.pld) and prices.accountants_agree() is not False


def _record_level(facts: RunFacts) -> tuple[float, float, str]:
    """Returns epsilon, delta and the words for how they were found, for one record in one data set.

    It may only be quoted where there is no reason against it.
    """
    prices = facts.prices
    if _one_schedule(facts):
        if prices.pld is not None and _pld_holds(prices):
            basis = "the whole committed schedule, priced by PLD; no refund for stopping"
            return prices.pld, facts.plan.delta, basis
        basis = "the whole committed schedule, priced by the RDP filter; no refund for stopping"
        return prices.gate, facts.plan.delta, basis
    spent = max(client.figure() or 0.0 for client in facts.clients)
    return spent, max(client.delta for client in facts.clients), "the ledgers' RDP filter over all their runs"


def _headline(facts: RunFacts, reasons: list[str]) -> dict[str, Any]:
    """Returns the first thing a reader sees, numbers and words."""
    delta = max([facts.plan.delta, *(client.delta for client in facts.clients)])
    epsilon: float | None = math.inf if facts.test_noise else None
    one_data_set, basis = epsilon, "a test noise source was used" if facts.test_noise else "unknown"
    swap, swap_delta, swap_basis = epsilon, delta, basis
    # Under infinity any test may be perfect; where epsilon is unknown, so is what a test can do.
    tpr = [(fpr, 1.0 if facts.test_noise else None) for fpr in (0.001, 0.01)]
    if not reasons:
        one_data_set, delta, basis = _record_level(facts)
        epsilon = one_data_set
        if facts.multiplicity > 1 and facts.multiplicity_epsilon is not None:
            epsilon = facts.multiplicity_epsilon
            basis = f"composed over the {facts.multiplicity} data sets in which one person may be"
        # Removing and adding is two steps, so group privacy gives a bound, at a larger delta.
        swap, swap_delta = 2 * epsilon, delta * (1 + odds_of(epsilon))
        swap_basis = "group privacy: twice epsilon at delta (1 + e^epsilon)"
        if math.isinf(epsilon):
            swap_delta, swap_basis = delta, basis
        elif swap_delta >= 1:
            swap, swap_delta, swap_basis = None, delta, "group privacy gives no bound at this epsilon"
        tpr = [(fpr, tpr_bound(fpr, epsilon, delta)) for fpr in (0.001, 0.01)]
        if facts.multiplicity == 1 and _one_schedule(facts) and _pld_holds(facts.prices):
            tpr = list(facts.prices.tpr) or tpr
            if facts.prices.pld_replace_one is not None and facts.prices.replace_one_agrees() is not False:
                swap, swap_delta = facts.prices.pld_replace_one, delta
                swap_basis = "the same schedule, priced by PLD"
    odds = None if epsilon is None else odds_of(epsilon)
    return {
        "sentence": sentence_of(epsilon, delta, protects_of(facts.multiplicity), reasons),
        "protects": protects_of(facts.multiplicity),
        "person": _person(facts, epsilon),
        "unit": facts.plan.unit,
        "adjacency": facts.plan.adjacency,
        "epsilon": _figure(epsilon),
        "delta": delta,
        "basis": basis,
        "replace_one": {"epsilon": _figure(swap), "delta": swap_delta, "basis": swap_basis},
        "odds_factor": _figure(odds),
        "tpr": [{"fpr": fpr, "tpr": _figure(rate)} for fpr, rate in tpr],
        "tier": tier_words(_figure(epsilon)),
        "federation": {
            "epsilon": _figure(epsilon),
            "one_data_set": _figure(one_data_set),
            "multiplicity": facts.multiplicity,
            "rule": "largest over clients: the holders declare that no person is in two data sets"
            if facts.multiplicity == 1
            else f"composition over {facts.multiplicity} clients: one person may be in that many data sets",
        },
        "reasons": reasons,
    }


def odds_of(epsilon: float) -> float:
    """Returns e^epsilon, infinity where a float cannot hold it."""
    return math.exp(epsilon) if epsilon < 700 else math.inf


def tpr_bound(fpr: float, epsilon: float, delta: float) -> float:
    """Returns the largest true positive rate that (epsilon, delta) allows any membership test at ``fpr``."""
    odds = odds_of(epsilon)
    return min(1.0, odds * fpr + delta, max(0.0, 1 - (1 - delta - fpr) / odds))


def protects_of(multiplicity: int) -> str:
    """Returns whose presence a headline hides, where one person may be in so many data sets."""
    return "one record" if multiplicity == 1 else f"one person (one record in each of up to {multiplicity} data sets)"


def sentence_of(epsilon: float | None, delta: float, protects: str, reasons: list[str]) -> str:
    """Returns the headline in plain words."""
    if epsilon is None:
        return f"What this cost in privacy is unknown, so no figure may be quoted. {reasons[0]}"
    if math.isinf(epsilon):
        return f"There is no privacy guarantee here: epsilon is infinity. {' '.join(reasons)}".strip()
    factor = figure_words(_plain(odds_of(epsilon)))
    return (
        f"Adding or removing {protects} changes the odds of any conclusion that anyone can draw from what "
        f"was released by at most a factor of {factor}, up to a slack of one in {1 / delta:,.0f} (epsilon "
        f"{figure_words(epsilon)} at delta {figure_words(delta)})."
    )


def tier_words(epsilon: float | str) -> str:
    """Returns how a figure is commonly read (Ponomareva et al. 2023); no threshold holds for every use."""
    if epsilon == UNKNOWN:
        return "unknown: no figure"
    if epsilon == INFINITY or isinstance(epsilon, str):
        return "none: no formal protection"
    if epsilon <= 1:
        return "tier 1, strong: epsilon at most 1"
    return "tier 2, reasonable: epsilon at most 10" if epsilon <= 10 else "tier 3, weak: epsilon above 10"


def _person(facts: RunFacts, epsilon: float | None) -> list[dict[str, Any]]:
    """Returns what the figure means for a person rather than a record; the first line of the page."""
    times = facts.multiplicity
    where = "in one data set only" if times == 1 else f"in each of up to {times} data sets"
    return [
        {"who": f"A person with one record {where}", "epsilon": _figure(epsilon)},
        {
            "who": "A person with several records in a data set",
            "epsilon": "none possible",
            "note": "nothing bounds how many records one person has, so no figure carries over",
        },
        *(
            {
                "who": f"A person with at most {records} records, all in one data set",
                "epsilon": _figure(figure if epsilon is not None and math.isfinite(epsilon) else epsilon),
                "note": "priced by mixture of Gaussians for this schedule; it holds only where that bound is kept",
            }
            for records, figure in (facts.prices.persons if times == 1 and _one_schedule(facts) else ())
        ),
    ]


def _setting(facts: RunFacts) -> str:
    """Returns who adds the noise and who is trusted."""
    words = "Each client clips and adds noise before anything leaves it; the server is trusted with no record."
    if facts.simulation is None:
        return words
    return words + " This was a simulation: one machine held all data sets and played every part."


def _warnings(facts: RunFacts) -> list[str]:
    """Returns what a reader must not overlook, beside the reasons for an unknown headline."""
    warnings = []
    if facts.simulation is not None:
        warnings.append(
            "A simulation: it shows what this plan would cost deployed; the machine that ran it saw all data."
        )
    agree = facts.prices.accountants_agree()
    if agree is False:
        warnings.append("The accountants disagree by more than their error: the looser RDP filter's figure is quoted.")
    if raised := [client.name for client in facts.clients if any(after > old for _, old, after in client.changes)]:
        warnings.append(
            f"The budget of {_some(raised)} was raised by its holder after it was first promised; the table says when. "
            "A figure holds for the raised budget only if that decision did not depend on what earlier releases showed."
        )
    if back := [client.name for client in facts.clients if client.clock_set_back]:
        warnings.append(f"The clock of {_some(back)} was set back between entries: times are not to be relied on.")
    if agree is None:
        note = facts.prices.prv_note.strip().rstrip(".") or "a second figure is missing"
        warnings.append(f"No cross-check of the accountants: {note}.")
    if facts.prices.replace_one_agrees() is False:
        warnings.append(
            f"The accountants disagree on what replacing a {facts.plan.unit} costs: group privacy's bound is quoted."
        )
    elif facts.prices.pld_replace_one is not None and facts.prices.saddle_replace_one is None:
        note = facts.prices.saddle_note.strip().rstrip(".") or "a second figure is missing"
        warnings.append(f"No cross-check of what replacing a {facts.plan.unit} costs, but for RDP's bound: {note}.")
    return warnings


def _budget(facts: RunFacts) -> dict[str, Any]:
    """Returns granted, spent and remaining over all clients, and what happens at the end of a budget."""
    figures = [client.figure() for client in facts.clients]
    known = [figure for figure in figures if figure is not None]
    complete = not _doubted(facts) and len(known) == len(figures)
    left = [_remaining(client) for client in facts.clients]
    known_left = [value for value in left if value is not None]
    return {
        "largest_spent": _figure(math.inf if facts.test_noise else max(known) if complete else None),
        "least_remaining": _figure(min(known_left) if complete else None),
        "granted": [_figure(value) for value in sorted({client.granted_epsilon for client in facts.clients})],
        "clients": len(facts.clients),
        "unproven": len(figures) - len(known),
        "charges": sum(client.charges for client in facts.clients),
        "undelivered": sum(client.undelivered for client in facts.clients),
        "declined": sum(client.declined for client in facts.clients),
        "filter": "RDP filter at orders fixed when the budget was granted, over all runs in the ledger",
        "at_exhaustion": "the client answers with a fixed word, whatever its data, and stays in the job",
    }


def _remaining(client: ClientSpend) -> float | None:
    """Returns what is left of a client's budget, None where the spend is unknown."""
    spent = client.figure()
    return None if spent is None else max(0.0, client.granted_epsilon - spent)


def _client(client: ClientSpend) -> dict[str, Any]:
    """Returns one client's line; its history follows the same rules as its spend."""
    figure = client.figure()
    finite = figure is not None and math.isfinite(figure)
    return {
        "name": client.name,
        "spent_epsilon": _figure(figure),
        "granted_epsilon": _figure(client.granted_epsilon),
        "remaining_epsilon": _figure(_remaining(client)),
        "delta": client.delta,
        "rounds_joined": client.rounds_joined,
        "charges": client.charges,
        "declined": client.declined,
        "runs": client.runs,
        "receipts_missing": client.receipts_missing,
        "undelivered": client.undelivered,
        "test_noise": client.test_noise,
        "verdict": client.verdict,
        "public_key": client.public_key,
        "ledger_head": client.ledger_head,
        "history": [[step, _figure(spent if finite else figure)] for step, spent in client.history],
        "account": client.account,
        "budget_changes": [
            {"time": when, "before": before, "after": after, "raised": after > before}
            for when, before, after in client.changes
        ],
        "clock_set_back": client.clock_set_back,
        "signed": list(_SIGNED) if client.verdict is Verdict.VERIFIED and client.proof else [],
        "proof": client.proof,
    }


def _rounds(facts: RunFacts) -> list[dict[str, Any]]:
    """Returns the rounds with the fields that may be told; no epsilon where a client's is unproven."""
    unproven = _doubted(facts) or any(client.figure() is None for client in facts.clients)
    rounds = []
    for record in facts.rounds:
        told = {name: record[name] for name in _ROUND_FIELDS if name in record}
        epsilon = math.inf if facts.test_noise else None if unproven else record.get("epsilon")
        rounds.append(told | {"epsilon": _figure(epsilon)})
    return rounds


def _prices(facts: RunFacts) -> dict[str, Any]:
    """Returns the price of the schedule by every accountant; infinity for all under test noise."""
    prices = facts.prices

    def price(value: float | None) -> float | str:
        # The price of a plan that nobody committed to is no price of this run.
        return INFINITY if facts.test_noise else _figure(value if facts.committed else None)

    return {
        "schedule": prices.schedule,
        "steps": prices.steps,
        "delta": facts.plan.delta,
        "gate": price(prices.gate),
        "gate_order": _figure(prices.gate_order),
        "rdp": price(prices.rdp),
        "pld": price(prices.pld),
        "pld_replace_one": price(prices.pld_replace_one),
        "saddle_replace_one": price(prices.saddle_replace_one),
        "saddle_note": prices.saddle_note,
        "rdp_replace_one": price(prices.rdp_replace_one),
        "prv": price(prices.prv),
        "prv_note": prices.prv_note,
        "accountants_agree": prices.accountants_agree(),
        "at_deltas": [{"delta": delta, "epsilon": price(epsilon)} for delta, epsilon in prices.at_deltas],
        "tpr": [{"fpr": fpr, "tpr": 1.0 if facts.test_noise else price(rate)} for fpr, rate in prices.tpr],
        "unamplified": price(prices.unamplified),
        "zcdp_rho": price(prices.rho),
        "delta_times_records": facts.plan.delta * facts.plan.records_bound,
        "persons": [{"records": records, "epsilon": price(figure)} for records, figure in prices.persons],
        "accountant": prices.accountant,
        "meaning": "what a client pays that joins as often as it may; for all of it, even if stopped early",
    }


def _assumptions(facts: RunFacts) -> list[dict[str, Any]]:
    """Returns the guarantee chain in order, then what the figures rest on, and who answers for each."""
    plan = facts.plan
    enforced, declared, broken = Standing.ENFORCED, Standing.DECLARED, Standing.BROKEN
    unproven = _doubted(facts) or any(client.figure() is None for client in facts.clients)
    by_ledger = any(client.verdict is Verdict.LEDGER for client in facts.clients)
    fault = facts.multiplicity > 1 and bool(_multiplicity_fault(facts))
    rows: list[tuple[str, str, Standing]] = [
        (
            "gate",
            "No charge passes that would exceed the holder's budget, over all runs in its ledger.",
            broken if any(map(_overspent, facts.clients)) else enforced,
        ),
        (
            "charge",
            "The charge is hash-chained and on disk before any record is touched; its receipt is signed.",
            enforced,
        ),
        (
            "sample",
            f"Each record enters each step by its own secret coin, at the public rate {plan.sample_rate:g}.",
            enforced,
        ),
        (
            "clip",
            f"Each record moves a step's sum by at most {plan.l2_clip:g} (L2), faulty records included.",
            enforced,
        ),
        (
            "add noise",
            f"Gaussian, {plan.noise_multiplier:g} times the clip bound. Source: {facts.noise_source}.",
            broken if facts.test_noise else enforced,
        ),
        (
            "divide",
            f"By the public constant {plan.expected_batch:g}, never by a count of records.",
            enforced,
        ),
        ("keep", "The finished release is stored before it leaves; a retry sends the same bytes.", enforced),
        (
            "send",
            "Only trainable parameters leave; no loss, no accuracy, no count of a client's data."
            if plan.metrics is None
            else f"Only trainable parameters leave, and of a client's own records {_metric_words(plan)}: sums to which "
            f"a record adds at most 1, under noise of {plan.metrics.noise:g}, charged with the update.",
            enforced,
        ),
        ("examples alone", _alone(facts), enforced),
        (
            "schedule",
            f"At most {plan.joins} charges of {plan.steps} steps per client, fixed before the first round.",
            broken if _overrun(facts) or not facts.committed else enforced,
        ),
        (
            "receipts",
            "Every update that arrived has a receipt that its ledger contains; it signs all that was spent before. "
            "What no receipt covers, here other runs and updates that never arrived, is counted by the ledger alone."
            if by_ledger
            else "Every update that arrived has a receipt that its ledger contains; each client's last one signs all "
            "that it ever spent.",
            broken if unproven else declared if by_ledger else enforced,
        ),
        (
            "one ledger",
            "All use of a data set is in one ledger; a second one needs the words 'no person in common'.",
            declared,
        ),
        (
            "size",
            f"A data set has at most {plan.records_bound:,} records; delta stays below one in that number.",
            declared,
        ),
        (
            "overlap",
            "No person is in two data sets."
            if facts.multiplicity == 1
            else f"No person is in more than {facts.multiplicity} data sets; the figure composes them.",
            broken if fault else declared,
        ),
        ("this code", "The holder ran this code, unchanged. No receipt can prove that.", declared),
    ]
    return [{"name": name, "words": words, "standing": standing} for name, words, standing in rows]


def _alone(facts: RunFacts) -> str:
    """Returns how one record's gradient is kept apart from all others, in words."""
    words = (
        "No record's gradient depends on another: modules on an allow-list, anything else is fed one record at a time"
    )
    if facts.augmented:
        words += "; augmentation gets one record at a time"
    if facts.simulation is not None:
        words += "; the simulation probed the model before the first round"
    return f"{words}."


def _covered(facts: RunFacts) -> list[str]:
    """Returns what the figures protect."""
    runs = (
        "This run, every round of it, retries after a crash included."
        if _one_schedule(facts)
        else "Every run in the clients' ledgers, every round, retries after a crash included."
    )
    metrics = ["Every metric of clients' own records, as each client released it and pooled: part of the same figures."]
    return [
        "Every update that a client released, seen one by one, by the server or by anyone it shows them to.",
        *(metrics if facts.plan.metrics is not None else []),
        "The model of every round, the final one, and anything computed from them later.",
        runs,
        "Any side knowledge: the figures hold against somebody who knows every other record.",
    ]


def _not_covered(facts: RunFacts) -> list[str]:
    """Returns what the figures do not protect."""
    gaps = [
        "Hyper-parameter search: settings chosen by earlier runs on this data are paid for only where "
        "those runs share this run's ledgers.",
        "Side channels: timing, memory and power of a client's machine, and whether and when it answered.",
        "Floating point: noise made of floats is not exactly Gaussian; no bound is claimed for its lowest bits.",
        "A holder that lies about its data, its bounds or its code, and a client that poisons the model.",
        "The data holder's own machine: whoever controls it sees the records.",
        "What is true of many people: a model may reveal facts about a group, with or without any one record.",
        "What is public by design: number of clients, who joined when, class names, schema, bounds, and "
        "every number in the plan.",
        "The accuracy shown: it is measured on the server's public test set, which no figure here protects.",
    ]
    if facts.simulation is None:
        gaps.append(
            "Flower's processes at a data holder: where they run under the user who owns its data, the guarantee "
            "depends on them; each holder's preflight says how its own run."
        )
    if facts.covers.strip().lower() == "this run only":
        gaps.insert(0, "Other runs on the same data: these ledgers live in the run folder and cover this run only.")
    return gaps


def _adversaries(facts: RunFacts) -> list[dict[str, str]]:
    """Returns who sees what, and what protects against them in this version."""
    same = "the headline figure: what leaves a client is already noised"
    simulated = facts.simulation is not None
    travel = "nothing travelled: a simulation on one machine"
    machine = (
        "the machine that ran this simulation" if facts.simulation is not None else "the client's own machine and user"
    )
    metrics = " and noised metrics" if facts.plan.metrics is not None else ""
    rows = [
        (
            "the network",
            travel if simulated else "ciphertext, its sizes and times",
            same if simulated else f"TLS 1.3 outside, sealed messages inside; beside it, {same}",
        ),
        (
            "the relay and its operator",
            travel if simulated else "sealed messages, who takes part, sizes and times",
            same if simulated else f"messages sealed between client and server application; beside it, {same}",
        ),
        (
            "the server",
            f"each client's released update{metrics}, who answered and when",
            f"{same}; no discount for not being in every cohort, since it sees who was",
        ),
        (
            "other clients",
            "the model of every round",
            "the headline figure, composed over every round and run",
        ),
        (
            "the public, users of the model",
            "the final model, at most every model",
            "the headline figure, or better",
        ),
        (
            "a thief of a disk",
            "ledgers, kept releases, models; at a holder, its records",
            "the headline figure for what was released; nothing for records: they are not encrypted yet",
        ),
        (
            "an operator who changes the code",
            "whatever that code reads",
            "nothing: the guarantee is that of this code",
        ),
        (machine, "all records it holds", "nothing"),
    ]
    return [{"who": who, "sees": sees, "protected_by": protection} for who, sees, protection in rows]


def _witness(facts: RunFacts) -> dict[str, str]:
    """Returns what the receipts prove and what they cannot."""
    if facts.witness.strip() and facts.simulation is not None:
        rollback = (
            "Detectable only against receipts that somebody keeps elsewhere: in a simulation every key and every file "
            "lies on one machine, and all of them rolled back together cannot be told apart from an earlier state."
        )
    elif facts.witness.strip():
        rollback = "Detectable: a ledger rolled back, forked or signed again contradicts a receipt held elsewhere."
    else:
        rollback = (
            "Not detectable without a witness: nobody else countersigned these receipts, so whoever holds "
            "the ledgers could have rolled them back, forked them or signed them again."
        )
    return {
        "countersigned_by": facts.witness.strip() or "nobody",
        "rollback": rollback,
        "cannot_prove": "No signature proves that a holder ran this code on the data it says it has.",
    }


def _mechanism(facts: RunFacts) -> dict[str, Any]:
    """Returns how noise was made and added."""
    plan = facts.plan
    views = "none"
    if facts.augmented:
        views = "each record by itself, at random"
        if plan.views > 1:
            views += f"; {plan.views} views of a record, averaged before clipping"
    told = {} if plan.metrics is None else {"client_metrics": _client_metrics(facts)}
    return told | {
        "mechanism": "DP-SGD at each client: clip gradients, sum, add Gaussian noise, divide by a constant",
        "clipping": f"flat, L2 norm at most {plan.l2_clip:g} per record; gradients by {plan.mode}",
        "noise": f"standard deviation {plan.noise_multiplier:g} x {plan.l2_clip:g} on the sum, each step",
        "noise_source": facts.noise_source + (" (test source: no protection)" if facts.test_noise else ""),
        "floating_point": (
            "The noise is floating point, not exactly Gaussian: somebody who sees the lowest bits of a "
            "noised sum could in principle use that (Mironov 2012; Jin et al. 2022). Releases are rounded "
            "to float32; no bound is claimed for what remains."
        ),
        "augmentation": views,
        "setting": _setting(facts),
    }


def _metric_words(plan: Plan) -> str:
    """Returns the metrics that a plan asks for, as words."""
    return ", ".join(plan.metrics.words) if plan.metrics is not None else "nothing"


def _client_metrics(facts: RunFacts) -> str:
    """Returns what clients say about their own records, how it is protected and what it costs, in words."""
    plan, alone = facts.plan, facts.prices.metrics
    if plan.metrics is None:
        return "none"
    cost = "unknown"
    if facts.test_noise:
        cost = "infinity"
    elif alone is not None and facts.committed:
        cost = figure_words(_figure(alone))
    loss = f"; a record's loss is clipped to {plan.metrics.loss_bound:g}" if "loss" in plan.metrics.words else ""
    return (
        f"{_metric_words(plan)} of each round's incoming model, beside the update; sums to which each record adds a "
        f"vector of length at most 1{loss}; noise {plan.metrics.noise:g} on every sum; no quotient leaves a client. "
        f"At most {plan.joins} releases of each. By themselves they cost epsilon {cost} at delta {plan.delta:g}, which "
        "is part of the figures above"
    )


def _sampling(facts: RunFacts) -> list[dict[str, str]]:
    """Returns what the accountants assume about sampling beside what the code does."""
    plan = facts.plan
    rows = [
        (
            "batches",
            f"Poisson: each record with probability {plan.sample_rate:g} per step, independently",
            "a coin per record and step from the noise source; coins are never stored, fixed-size batches do not exist",
        ),
        ("empty batches", "allowed", "a step without records still adds noise and still counts"),
        (
            "expected batch",
            "a public constant",
            f"{plan.expected_batch:g} records, from declared numbers; not computed from data",
        ),
        (
            "steps",
            f"{facts.prices.steps:,} per client at most",
            f"{plan.steps} per round joined, at most {plan.joins} charges, counted by the ledger",
        ),
        (
            "choice of clients",
            "no discount claimed",
            "the server sees who takes part, so chance there protects nobody",
        ),
    ]
    return [{"what": what, "assumed": assumed, "actual": actual} for what, assumed, actual in rows]


def _ran(facts: RunFacts) -> list[str]:
    """Returns the hashes of all code that ran: a resumed run may have been begun by another version."""
    return facts.code_hash.split(", then ")


def _contradicted(facts: RunFacts) -> bool:
    """Whether an audit of code that ran, were it for a part of the run, contradicts a promise; then no figure holds."""
    if facts.audit is None or str(facts.audit.get("code_hash", "")) not in _ran(facts):
        return False
    return not audit_holds(facts.audit)


def audit_holds(audit: Mapping[str, Any]) -> bool:
    """Says whether an audit found nothing against the code, by its own word and by each of its bounds.

    An audit that cannot be read in full has not held.

    Args:
        audit: As `privacy.audit.report_evidence` made it, and as a run's folder may hold it since.
    """
    bounds = audit.get("bounds", [])
    return (
        audit.get("holds") is True
        and audit.get("contradicted", 0) == 0
        and isinstance(bounds, Sequence)
        and all(isinstance(row, Mapping) and _bound_holds(row) for row in bounds)
    )


def _bound_holds(row: Mapping[str, Any]) -> bool:
    lower, upper = row.get("epsilon_lower", 0.0), row.get("epsilon_upper", math.inf)
    numeric = all(isinstance(figure, numbers.Real) for figure in (lower, upper))
    # Worked out again: a verdict beside figures that say otherwise is no verdict. NaN compares as false.
    return row.get("holds") is True and numeric and bool(lower <= upper)


def _told(audit: Mapping[str, Any]) -> dict[str, Any]:
    """Returns of an audit's file what may enter a report, name by name: bounds of canaries and nothing else (G18).

    The file lies in the run's folder, where anything may have been written into it.
    """
    bounds = audit.get("bounds", [])
    rows = bounds if isinstance(bounds, list | tuple) else []
    return {name: audit[name] for name in _TOLD_OF_AUDIT if name in audit} | {
        "bounds": [
            {name: row[name] for name in ("audit", "holds", "verdict", *TOLD) if name in row}
            for row in rows
            if isinstance(row, Mapping) and "epsilon_lower" in row
        ]
    }


def _empirical(facts: RunFacts) -> dict[str, Any]:
    """Returns what an audit found, beside whether it audited the code that ran."""
    if facts.audit is None:
        return {
            "status": "not audited",
            "words": "No empirical audit of this run was made; the figures are proofs alone.",
        }
    ran = _ran(facts)
    same = str(facts.audit.get("code_hash", "")) in ran
    words = (
        "An audit gives a lower bound on epsilon by attacking; it can show a claim to be wrong, never to be right."
        if same
        else "An audit is here, of other code than ran: it says nothing about this run."
    )
    status = "audited" if same else "audit of other code"
    if same and len(set(ran)) > 1:
        status = "audited in part"
        words += " Several versions of the code made this run, and only one of them was audited."
    if same and not audit_holds(facts.audit):
        words += " It did: a promise of this code is contradicted, so no figure of this report holds."
    return {"status": status, "words": words, "audit": _told(facts.audit)}


def _accesses(facts: RunFacts) -> list[dict[str, str]]:
    """Returns every use of private data and whether the figures account for it."""
    shared = "yes, where those runs share these ledgers" if facts.covers.lower() != "this run only" else "no"
    rows = [
        ("training", "yes", "every step of every round that a client joined, crashes and retries included"),
        ("preprocessing and normalisation", "not used", "constants are public; none is computed from records"),
        ("choosing hyper-parameters", shared, "settings tried on this data in runs with other ledgers are not counted"),
        ("stopping early", "yes", "the whole committed schedule is priced; stopping refunds nothing"),
        ("evaluation", "not used", "the model is measured on the server's public test set"),
        ("earlier releases on the same data", shared, "only what these ledgers hold is counted"),
    ]
    return [{"access": access, "accounted": accounted, "words": words} for access, accounted, words in rows]


def _limits(facts: RunFacts) -> list[str]:
    """Returns what would void the figures, and what is known of the parts they rest on."""
    return [
        "Void where a holder ran other code, used the data outside this ledger, or declared bounds that do not hold.",
        "Void where a noise source is not secret; a test source makes every figure infinity.",
        "Opacus' engine, loaders and checkpointed accountants are not used; of it only gradients, RDP and PRV are.",
        "Epsilon bounds what is learnt from the releases; it says nothing of the size of a harm or of its chance.",
        f"Accountants: {facts.prices.accountant}; PLD rounds losses up to 1e-4, or 3e-4 up to 2,000 steps; the filter "
        f"counts at the order {facts.prices.gate_order:g}.",
    ]
