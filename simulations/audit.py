"""``tacit audit``: does what this program promises hold in practice, for one task and its plan?

Everything runs on synthetic records of the task's shape; membership inference, when asked for, on a public data set
that the task brings itself. A holder's records are not trained on, so nothing is charged (guarantee G18). A run's
folder adds its own plan and its ledgers, whose spend is priced again. Of a run that protects clients, the server's own
clip, noise and sum are audited; the cosines of synthetic canary clients give an estimate for one round besides, which
is printed, proves nothing and enters no report.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from clients.data import SourceName, load_source
from clients.holder import SecureSources, Sources
from models.catalog import find_task
from models.task import Shape, Task
from privacy import audit as audits
from privacy import central
from privacy.accounting import Event, best_order
from privacy.audit import Finding, Subject
from privacy.errors import PlanError, TacitError
from privacy.files import write_whole
from privacy.ledger import Book
from privacy.matrix import matrix_of
from privacy.plan import Local, Plan, Unit, require
from privacy.report import audit_holds
from simulations.evidence import render
from simulations.scenario import Scenario
from simulations.world import Settled, code_hash, now, settle

__all__ = ["AUDIT_FILE", "MOST_EPSILON", "audit"]

AUDIT_FILE: Final = "audit.json"
# A thousand guesses cannot contradict a claim above five or so, and need room for a bug to show below that.
MOST_EPSILON: Final = 4.0
# Records as tensors of canaries x canaries.
_CANARIES: Final = (100, 4000)
# All canary clients' updates are held at once, in float64: half a gigabyte.
_NUMBERS_HELD: Final = 2**26
_PUBLIC: Final = frozenset(
    {SourceName.DIGITS, SourceName.BREAST_CANCER, SourceName.MNIST, SourceName.FASHION_MNIST, SourceName.CIFAR10}
)

OnFinding = Callable[[str, Finding | None], None]
"""Told an audit's name when it starts, with None, and again with its finding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Audited:
    task: Task
    shape: Shape
    plan: Plan
    local: Local
    device: str
    ledgers: Path | None
    population: str
    code: str
    data: str
    records: int


def audit(
    run: Path | None = None,
    *,
    task: str = "digits",
    data: str = "",
    epsilon: float = 2.0,
    canaries: int = 1000,
    membership: bool = False,
    on_finding: OnFinding | None = None,
    sources: Sources | None = None,
) -> dict[str, Any]:
    """Audits a task under its plan, or a run's task under the run's plan.

    Args:
        run: Run folder; what a report may show is written there as ``audit.json``, at unit record.
        task: Where there is no run: name of the task, audited under its defaults.
        data: Where there is no run: where the task's data lies; only its public shape is used.
        epsilon: Of the audited configuration of the same code, in (0, 4]: at the run's own epsilon an audit of so few
            guesses could contradict little.
        canaries: Gradient canaries, 100 to 4,000; three times as many short trainings.
        membership: Whether to attack trained models by membership inference too; the result stays here.
        on_finding: Watches.
        sources: Randomness that is audited; the client's own by default.

    Returns:
        ``holds``, ``findings`` (all of them, with their figures), ``evidence`` (what may be told), ``notes``, ``task``,
        ``run``, ``plan`` and ``seconds``.

    Raises:
        TacitError: The task, its data's shape, its plan or the run folder cannot be read.
    """
    require(0 < epsilon <= MOST_EPSILON, f"expected 0 < epsilon <= {MOST_EPSILON:g} to audit at, got {epsilon!r:.40}")
    require(
        _CANARIES[0] <= canaries <= _CANARIES[1],
        f"expected {_CANARIES[0]} to {_CANARIES[1]} canaries, got {canaries!r:.40}; 1000 is customary",
    )
    began = time.perf_counter()
    what = _of_run(run) if run is not None else _of_task(task, data)
    subject = _subject(what, sources or SecureSources())
    watch = on_finding or (lambda name, finding: None)
    findings, seconds = [], {}
    for name, probe in _audits(what, subject, epsilon, canaries, membership).items():
        watch(name, None)
        start = time.perf_counter()
        finding = probe()
        seconds[name] = time.perf_counter() - start
        findings.append(finding)
        watch(name, finding)
    notes = []
    if run is not None and not what.code.endswith(code_hash()):
        notes.append("The run was made by another version of this program than the one that was audited.")
    if what.plan.unit is Unit.CLIENT:
        notes.append("Records are not what this plan protects: the audits of single records were not run.")
    evidence = audits.report_evidence(
        findings, date=now(), code_hash=code_hash(), records="synthetic records of the task's public shape"
    )
    if run is not None:
        audited, against = _earlier(run / AUDIT_FILE, evidence["code_hash"])
        if against:
            notes.append(
                f"Of {audited} earlier audits of this code on this run, {against} contradicted a promise; another try "
                f"does not take that back, and the report prints no figure until {AUDIT_FILE} is deleted."
            )
        evidence |= {"audits": audited + 1, "contradicted": against + (not evidence["holds"])}
        # Only what may be told is written down: a run's folder is sent to others as it is.
        write_whole(run / AUDIT_FILE, json.dumps(evidence, indent=2, allow_nan=False).encode() + b"\n")
        if evidence["contradicted"]:
            # The report that lies there claims a figure that was just contradicted.
            try:
                render(run)
                notes.append("The run's report was written anew, where this counts if the run was made by this code.")
            except TacitError as error:
                notes.append(f"The run's report could not be written anew and still claims what it did: {error}")
    return {
        "holds": all(finding.holds for finding in findings),
        "task": what.task.name,
        "run": str(run) if run is not None else None,
        "plan": what.plan.digest(),
        "findings": [
            {
                "audit": finding.audit,
                "holds": finding.holds,
                "estimate": finding.estimate,
                "verdict": finding.line,
                "stays_with_holder": finding.stays,
                "figures": dict(finding.figures),
                "seconds": seconds[name],
            }
            for name, finding in zip(seconds, findings, strict=True)
        ],
        "evidence": evidence,
        "notes": notes,
        "seconds": time.perf_counter() - began,
    }


def _earlier(path: Path, code: str) -> tuple[int, int]:
    """Returns how many audits of this code a run had before, and how many of them contradicted a promise.

    Without that count a failed audit would be washed away by trying again until one holds, and the stated confidence
    would be that of the luckiest try.
    """
    try:
        found = json.loads(path.read_text())
        if found["code_hash"] != code:
            return 0, 0
        audited, against = int(found.get("audits", 1)), int(found.get("contradicted", 0))
        return max(1, audited), max(against, int(not audit_holds(found)))
    except FileNotFoundError:
        return 0, 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # What it said cannot be known; the report refuses such a file, and a new audit mends it.
        return 0, 0


def _of_task(name: str, data: str) -> _Audited:
    task = _find(name)
    flags = {"task": name} | ({"data": data} if data else {})
    source = load_source(task, data=data or None)
    scenario = Scenario.layered(None, flags).resolved(source.declared_records)
    return _audited(task, source.shape, scenario, settle(scenario, task, source.shape), None)


def _of_run(run: Path) -> _Audited:
    scenario, settled = Scenario.from_run(run), Settled.load(run)
    task = _find(scenario.task)
    ledgers = Path(settled.ledgers) if settled.ledgers else run / "ledgers"
    shape = load_source(task, data=scenario.data or None).shape
    return _audited(task, shape, scenario, settled, ledgers if ledgers.is_dir() else None)


def _audited(task: Task, shape: Shape, scenario: Scenario, settled: Settled, ledgers: Path | None) -> _Audited:
    return _Audited(
        task=task,
        shape=shape,
        plan=settled.plan,
        local=settled.local,
        device=settled.device if settled.device == "cpu" or torch.cuda.is_available() else "cpu",
        ledgers=ledgers,
        population=settled.population,
        code=settled.code,
        data=scenario.data,
        records=max(40, min(scenario.records_per_client, 1000)),
    )


def _find(name: str) -> Task:
    try:
        return find_task(name)
    except LookupError as error:
        raise PlanError(str(error.args[0] if error.args else error)) from None


def _subject(what: _Audited, sources: Sources) -> Subject:
    generator = torch.Generator().manual_seed(0)
    releases = iter(range(1, 10**9))
    return Subject(
        model=what.task.fresh(what.shape, 0),
        loss=what.task.loss,
        make_batch=lambda count: what.task.synthetic(what.shape, count, generator),
        plan=what.plan,
        augment=what.task.augment,
        device=what.device,
        sources=lambda: sources(holder="audit", job="audit", round=next(releases)),
    )


def _audits(
    what: _Audited, subject: Subject, epsilon: float, canaries: int, membership: bool
) -> Mapping[str, Callable[[], Finding]]:
    """Returns the audits of a command by name, in the order in which they run."""
    lr = what.local.lr

    def accountant() -> Finding:
        with tempfile.TemporaryDirectory(prefix="tacit-audit-") as folder:
            return audits.accountant_probe(what.plan, Path(folder))

    def ledgers() -> Finding:
        with Book(what.ledgers or Path(), what.population) as book:
            return audits.ledger_check(list(book.accounts.values()))

    def attack() -> Finding:
        inputs, targets = _public_records(what)
        return audits.membership_inference(subject, inputs, targets, lr=lr, rounds=what.plan.rounds)

    if what.plan.unit is Unit.CLIENT:
        # Nothing is done example by example there, so that the probes of one record have nothing to probe; what is
        # promised is what the server does, so that is what is attacked.
        clients: dict[str, Callable[[], Finding]] = {
            "server's clip": lambda: audits.server_clip_probe(subject),
            "server's noise": lambda: audits.server_noise_probe(subject),
            "client canaries": lambda: audits.one_run_clients(subject, canaries=canaries, epsilon=epsilon),
            "canary clients": lambda: _canary_clients(what, subject),
        }
        return clients | ({"ledgers": ledgers} if what.ledgers is not None else {})
    found: dict[str, Callable[[], Finding]] = {
        "sensitivity": lambda: audits.sensitivity_probe(subject),
        "noise": lambda: audits.noise_probe(subject),
        "neighbours": lambda: audits.neighbour_probe(subject),
        "poisson": lambda: audits.poisson_probe(subject),
        "accountant": accountant,
        "gradient canaries": lambda: audits.one_run_gradients(subject, canaries=canaries, epsilon=epsilon),
        "gradient canaries, q=1": lambda: audits.one_run_gradients(
            subject, canaries=canaries, epsilon=epsilon, sampled=False
        ),
        "many trainings, q=1": lambda: audits.many_runs(subject, trainings=3 * canaries, epsilon=epsilon),
        "example canaries": lambda: audits.one_run_examples(
            subject, canaries=max(20, min(canaries, 300)), epsilon=epsilon, lr=lr
        ),
    }
    if what.ledgers is not None:
        found["ledgers"] = ledgers
    if membership:
        found["membership inference"] = attack
    return found


def _canary_clients(what: _Audited, subject: Subject) -> Finding:
    """Estimates epsilon of one round of the server's own aggregation, from synthetic clients that send directions."""
    size = sum(value.numel() for value in subject.model.parameters() if value.requires_grad)

    def one_round(updates: torch.Tensor) -> torch.Tensor:
        sent = [central.Contribution(row, 1.0) for row in updates.numpy()]
        if what.plan.banded is not None:
            # The first row of the matrix; each later one has at least its noise, and takes off what was seen before.
            total, _ = central.clipped_sum(sent, size, what.plan.l2_clip)
            stddev = matrix_of(what.plan).stddev(what.plan.noise_multiplier, what.plan.l2_clip)
            noised = total + stddev * subject.sources().gaussian(size).numpy()
            return torch.from_numpy(central.mean_of(noised.astype(np.float32), what.plan))
        return torch.from_numpy(central.aggregate(sent, size, what.plan, what.plan.l2_clip, subject.sources()).mean)

    found = audits.canary_clients(
        one_round,
        dimension=size,
        l2_clip=what.plan.l2_clip,
        delta=what.plan.delta,
        claim=best_order(Event(sample_rate=1.0, noise_multiplier=what.plan.noise_multiplier, steps=1), what.plan.delta)[
            1
        ],
        canaries=max(8, min(200, _NUMBERS_HELD // size)),
    )
    return dataclasses.replace(found, line=f"one round, {found.line}")


def _public_records(what: _Audited) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns as many records as one client has, of a public data set that the task brings itself, or synthetic ones.

    Records from a place that somebody named are that person's, whatever the task's data is called: they would be
    trained on uncharged (guarantee G18).
    """
    if what.task.data not in _PUBLIC or what.data:
        return what.task.synthetic(what.shape, what.records, torch.Generator().manual_seed(1))
    train = load_source(what.task).train
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[: what.records]
    return train.inputs[chosen], train.targets[chosen]
