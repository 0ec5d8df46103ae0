"""One command, one federation: settles a job, runs it on an engine, leaves a run folder and a report.

A run folder holds ``config.json`` (resolved scenario), ``job.json`` (plan and identity), ``metrics.jsonl``,
``receipts.jsonl``, ``checkpoints/``, ``ledgers/``, ``kept/`` while it runs, ``partition.svg``, ``report.json`` and
``report.html``. ``tacit simulate --resume`` goes on from whatever a crash left there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from clients.holder import Sources
from privacy.accounting import Event, attacker_power, best_order, pld_epsilon, prv_epsilon, rdp
from privacy.errors import BudgetExceeded, LedgerError, RunError
from privacy.ledger import Account, Receipt
from privacy.noise import SECURE_SOURCE
from privacy.plan import Adjacency
from privacy.report import ClientSpend, Prices, RunFacts, Verdict, partition_picture, write
from server.app import CHECKPOINT, METRICS, RECEIPTS, Ending, server_app
from server.checkpoint import load
from simulations import apps
from simulations.scenario import BY_NAME, MACHINE, Scenario
from simulations.world import World, now, server_context

_STATUS_FILE: Final = "status.json"
# Whether a picture of the partition can still be read.
_PICTURE_CLIENTS: Final = 200


class Observer(Protocol):
    """Watches a run; see ``tacit.py`` for the one that draws the live display."""

    def started(self, info: Mapping[str, object]) -> None:
        """Called once, before the first round."""

    def round(self, line: Mapping[str, object]) -> None:
        """Called after every round with its line."""

    def finished(self, summary: Mapping[str, object]) -> None:
        """Called once, after the report is written."""

    def note(self, text: str) -> None:
        """Called with anything else worth a sentence."""


def simulate(
    scenario: Scenario,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    observer: Observer,
    client: str = "simulations.apps:client",
    sources: Sources | None = None,
) -> dict[str, object]:
    """Runs, or resumes, a simulated federation.

    Args:
        scenario: What to run; with ``resume``, the folder's own scenario (another machine set-up is allowed).
        out: Run folder to make; a new one under ``runs/`` by default.
        resume: Run folder to go on with.
        observer: Watches.
        client: Where worker processes find the client app.
        sources: Randomness of releases; anything but the default marks the ledgers as test ledgers.

    Returns:
        The summary: status, rounds, metrics, epsilon, epsilon_replace_one, delta, seconds, run, report.

    Raises:
        TacitError: The scenario cannot be run; nothing is left behind, or everything is resumable.
    """
    began = time.perf_counter()
    if resume is not None:
        _require_same(scenario, Scenario.from_run(resume))
        world = World.open(resume.resolve(), sources, scenario)
    else:
        folder = (out or _new_folder(scenario.task)).resolve()
        world = World.create(scenario, folder, sources)
    apps.adopt(world)
    _picture(world)
    plan, folder = world.settled.plan, world.folder
    observer.started(
        {
            "run": str(folder),
            "task": world.task.name,
            "clients": world.scenario.clients,
            "rounds": plan.rounds,
            "plan": dataclasses.asdict(plan),
            "engine": world.scenario.engine,
            "device": world.settled.device,
            "resumed": resume is not None,
        }
    )
    with _interruptible(observer) as interrupted:
        session = apps.Session(on_round=_watch(world, observer), stopping=interrupted)
        apps.sessions[folder] = session
        try:
            _run_engine(world, client)
        finally:
            apps.sessions.pop(folder, None)
    ending = session.ending
    if ending is None:
        raise RunError(f"expected the engine to finish the run, got an early end; resume it from {folder}")
    (folder / _STATUS_FILE).write_text(json.dumps({"status": str(ending), "finished": now()}) + "\n")
    if ending is not Ending.INTERRUPTED:
        # A finished job asks nothing again, so nothing needs to be sent again.
        shutil.rmtree(folder / "kept", ignore_errors=True)
    facts = facts_of(world)
    page = write(facts, folder)[1]
    summary: dict[str, object] = {
        "status": "interrupted" if ending is Ending.INTERRUPTED else str(ending),
        "rounds": len(facts.rounds),
        "metrics": next((dict(line["metrics"]) for line in reversed(facts.rounds) if line["metrics"]), {}),
        "epsilon": _headline(facts, facts.prices.pld if facts.prices.pld is not None else facts.prices.rdp),
        "epsilon_replace_one": _headline(facts, facts.prices.pld_replace_one),
        "epsilon_spent": max((c.spent_epsilon or 0.0 for c in facts.clients), default=0.0),
        "budget": plan.epsilon,
        "delta": plan.delta,
        "seconds": time.perf_counter() - began,
        "run": str(folder),
        "report": str(page),
    }
    observer.finished(summary)
    if ending is Ending.TOO_FEW and not any(line["replies"] for line in facts.rounds):
        raise BudgetExceeded(
            "expected ledgers with budget left for this job, got none that afford a round; every client declined; "
            "lower epsilon, or use ledgers of other data"
        )
    return summary


def _headline(facts: RunFacts, epsilon: float | None) -> float | None:
    """Returns the figure that may be printed: infinity under test noise, None where it is not one schedule's."""
    if facts.test_noise:
        return float("inf")
    return epsilon if all(client.runs <= 1 for client in facts.clients) else None


def _new_folder(task: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = "".join(letter if letter.isalnum() else "-" for letter in task)
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        folder = Path("runs") / f"{stamp}-{name}{suffix}"
        if not folder.exists():
            return folder
    raise RunError("expected a free name under runs/, got none; use --out")


def _require_same(given: Scenario, stored: Scenario) -> None:
    """Refuses to resume under another configuration, machine set-up aside."""
    for name, key in BY_NAME.items():
        mine, theirs = getattr(given, key.field), getattr(stored, key.field)
        if key.group != MACHINE and mine != theirs:
            raise RunError(f"expected the run's own {name}={theirs}, got {name}={mine}; start a new run for that")


def _picture(world: World) -> None:
    truth = world.truth()
    if truth is not None and world.scenario.clients <= _PICTURE_CLIENTS:
        picture = partition_picture(truth["label_table"], truth["class_names"])
        (world.folder / "partition.svg").write_text(picture)


def _watch(world: World, observer: Observer) -> Callable[[Mapping[str, Any]], None]:
    began, first = time.perf_counter(), [0]

    def on_round(line: Mapping[str, Any]) -> None:
        first[0] = first[0] or line["round"]
        # The round's checkpoint is on disk: it will not be asked for again.
        world.kept.clear()
        pace = (time.perf_counter() - began) / (line["round"] - first[0] + 1)
        observer.round(dict(line) | {"left_s": pace * (line["rounds"] - line["round"])})

    return on_round


@contextlib.contextmanager
def _interruptible(observer: Observer) -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into "stop after this round"; the second stops at once, and is resumable too."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        observer.note("stopping after this round; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _run_engine(world: World, client: str) -> None:
    scenario, folder = world.scenario, world.folder
    if scenario.engine == "ray":
        from simulations.ray_engine import run_on_ray

        run_on_ray(
            "simulations.apps:server",
            client,
            nodes=scenario.clients,
            run_config={"run": str(folder)},
        )
        return
    from simulations.engine import LocalGrid

    grid = LocalGrid(
        client,
        nodes=scenario.clients,
        run_config={"run": str(folder)},
        workers=scenario.workers,
        threads=scenario.threads,
        devices=_devices(world.settled.device),
        prepare=world.charge_cohort,
    )
    with grid:
        job = apps.job_of(world, apps.sessions[folder])

        def on_round(line: Mapping[str, Any]) -> None:
            if line["round"] and not line["replies"] and grid.failures:
                # One failing client is a straggler; all of them failing is a fault of the task, to be told at once.
                raise RunError(f"expected updates, got only failures: {grid.failures[-1].reason}; see TACIT_TRACE=1")
            apps.sessions[folder].on_round(line)

        watched = dataclasses.replace(job, on_round=on_round)
        app = server_app(lambda context: watched, lambda done, ending: setattr(apps.sessions[folder], "ending", ending))
        app(grid=grid, context=server_context(folder, grid.run.run_id))


def _devices(device: str) -> tuple[str, ...]:
    if not device.startswith("cuda"):
        return ()
    import torch

    return (device,) if ":" in device else tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))


# -- report -----------------------------------------------------------------------------------------------------


def render(folder: Path) -> Path:
    """Writes the report of a run folder anew, from its receipts and ledgers alone.

    Raises:
        TacitError: The folder is no run folder, or its ledgers or receipts are damaged.
    """
    return write(facts_of(World.open(folder.resolve())), folder)[1]


def facts_of(world: World) -> RunFacts:
    """Collects what a report is made of from a run folder."""
    settled, folder, scenario = world.settled, world.folder, world.scenario
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()] if _has(folder, METRICS) else []
    receipts = read_receipts(folder)
    state = load(folder / CHECKPOINT)
    # A witness names the account that a node's receipts belong to: nodes themselves mean nothing outside the engine.
    heads = {receipt.head: receipt.account for receipt in receipts}
    declined = {heads.get(state.witnesses.get(node, ":").partition(":")[2], "") for node in state.declined}
    world.book.refresh()
    joined = [account for account in world.book.accounts.values() if settled.id in account.jobs or account.jobs]
    clients = [_spend(world, account, receipts, account.identity in declined) for account in joined]
    noise = {receipt.test for receipt in receipts}
    status = json.loads((folder / _STATUS_FILE).read_text()) if _has(folder, _STATUS_FILE) else {}
    top = sorted((account.spent_rdp for account in joined), reverse=True)[: scenario.multiplicity]
    composed = joined[0].grant.epsilon_of(sum(top)) if joined and scenario.multiplicity > 1 else None
    return RunFacts(
        job=settled.id,
        task=world.task.name,
        task_summary=world.task.summary,
        record=world.task.record,
        started=settled.started,
        finished=str(status.get("finished", now())),
        status=str(status.get("status", "not finished")),
        config=scenario.to_mapping(),
        plan=settled.plan,
        local=settled.local,
        rounds=lines,
        clients=clients,
        prices=prices_of(world),
        multiplicity=scenario.multiplicity,
        multiplicity_epsilon=composed,
        noise_source="a test source" if True in noise else SECURE_SOURCE,
        versions={name: importlib.metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        code_hash=settled.code,
        witness="the server of this simulation, on the same machine",
        covers=f"all runs in {settled.ledgers}" if settled.ledgers else "this run only",
        simulation=world.truth(),
        engine=f"{scenario.engine}, {scenario.workers} worker(s)",
        device=settled.device,
        hardware=f"{platform.machine()}, {os.cpu_count()} cores",
    )


_PACKAGES: Final = ("torch", "opacus", "flwr", "dp-accounting", "cryptography", "numpy")


def _has(folder: Path, name: str) -> bool:
    return (folder / name).exists()


def read_receipts(folder: Path) -> list[Receipt]:
    """Reads and verifies every countersigned receipt of a run.

    Raises:
        LedgerError: One does not verify.
    """
    from privacy.identity import verify

    receipts = []
    path = folder / RECEIPTS
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else (), start=1):
        try:
            line = json.loads(text)
            receipt = Receipt.from_json(line["receipt"])
            verify(line["peer"], b"tacit/countersign/1\n" + line["receipt"].encode(), line["countersignature"])
        except (ValueError, KeyError, TypeError, LedgerError) as error:
            raise LedgerError(
                f"expected whole receipts in {path}, got a damaged one at line {number}: {error}"
            ) from None
        receipts.append(receipt)
    return receipts


def _spend(world: World, account: Account, receipts: list[Receipt], declined: bool) -> ClientSpend:
    mine = [receipt for receipt in receipts if receipt.account == account.identity]
    # A receipt that the ledger does not contain means that the ledger was rolled back, forked or signed again.
    sound = all(r.seq < len(account.heads) and account.heads[r.seq] == r.head for r in mine)
    return ClientSpend(
        name=account.name,
        granted_epsilon=account.grant.epsilon,
        delta=account.grant.delta,
        spent_epsilon=account.spent,
        rounds_joined=len({receipt.round for receipt in mine}),
        charges=account.charges,
        declined=int(declined),
        runs=len(account.jobs),
        receipts_missing=0,
        test_noise=account.test,
        history=tuple((receipt.round, receipt.spent) for receipt in sorted(mine, key=lambda r: r.round)),
        public_key=world.book.secret.identity(account.identity).public_key,
        ledger_head=account.heads[-1],
        verdict=Verdict.VERIFIED if sound else Verdict.UNKNOWN,
    )


def prices_of(world: World) -> Prices:
    """Prices the committed schedule with every accountant."""
    plan, order = world.settled.plan, world.settled.order
    event = Event.of_schedule(plan)
    # Three deltas are enough to see how epsilon moves; each costs a quarter of a second.
    curve = tuple((delta, pld_epsilon(event, delta)) for delta in (plan.delta, plan.delta / 10, plan.delta / 100))
    prv, note = prv_epsilon(event, plan.delta)
    grant = next((a.grant for a in world.book.accounts.values()), None)
    gate = grant.epsilon_of(rdp(event, grant.order)) if grant else best_order(event, plan.delta)[1]
    return Prices(
        schedule=f"Poisson q={plan.sample_rate:g}, sigma={plan.noise_multiplier:.4g}, {event.steps} steps",
        steps=event.steps,
        gate=gate,
        gate_order=grant.order if grant else order,
        pld=pld_epsilon(event, plan.delta),
        pld_replace_one=pld_epsilon(event, plan.delta, Adjacency.REPLACE_ONE),
        prv=prv,
        prv_note=note,
        rdp=best_order(event, plan.delta)[1],
        at_deltas=curve,
        tpr=tuple((fpr, attacker_power(curve, fpr)) for fpr in (0.001, 0.01)),
        accountant=f"dp-accounting {importlib.metadata.version('dp-accounting')} (PLD), "
        f"opacus {importlib.metadata.version('opacus')} (RDP, PRV)",
    )
