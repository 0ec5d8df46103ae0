"""The same scenario on separate machines: what the server application does, from a scenario to a report.

A scenario that was simulated can be deployed unchanged. What it says about one machine (partition, engine, workers,
ledgers) does not count: real clients bring their own data, machines and ledgers. What is solved is the same plan.

A run folder holds ``config.json``, ``job.json``, ``members.json`` (who takes part, fixed before the first round),
``metrics.jsonl``, ``receipts.jsonl``, ``checkpoints/``, ``papers.json`` (what each client's ledger says of its budget
and of this job, signed by it), ``status.json``, and the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from clients.data import load_source
from models.task import find_task
from privacy.accounting import Event, best_affordable_order, solve_noise
from privacy.errors import PlanError, RunError
from privacy.files import write_whole
from privacy.noise import Keystream
from privacy.plan import Unit, canonical
from privacy.terms import Terms
from server.aggregate import Aggregator, Strategy
from server.app import Ending, Job, Schedule, run
from server.gateway import ring
from server.home import ServerHome
from server.relay import Relay
from server.sealed import Member, SealedGrid
from server.services import Places, members_of
from simulations.run import Observer
from simulations.scenario import Scenario
from simulations.world import Settled, code_hash, now, settle

MEMBERS: Final = "members.json"
PAPERS: Final = "papers.json"
STATUS: Final = "status.json"
# Seconds to wait for a round's replies where the scenario gives no limit.
_ROUND_S: Final = 3600.0


def deploy(
    scenario: Scenario,
    home: ServerHome,
    folder: Path,
    *,
    resume: bool,
    wait_s: float,
    observer: Observer,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, object]:
    """Runs, or resumes, a job over a home's relay.

    Args:
        scenario: What to run.
        home: The server's home; its relay and gateway must run.
        folder: Run folder, new or to go on with.
        resume: Whether to go on.
        wait_s: Longest wait for the clients before the first round, in seconds.
        observer: Watches.
        stopping: Asked after each round; true ends the run there, to be resumed.

    Returns:
        The summary: status, rounds, metrics, clients, seconds, run.

    Raises:
        TacitError: The scenario cannot be run, the relay does not answer, or too few clients are ready.
    """
    began = time.perf_counter()
    places, identity = Places(home), home.application_identity()
    with _alone(home.folder / "application"):
        settled, scenario = _settled(scenario, folder, resume)
        task = find_task(scenario.task)
        source = load_source(task, data=scenario.data or None)
        if not len(source.test):
            raise PlanError("expected a public test set for the server, got none; add test data to the data set")
        terms = Terms(
            job=settled.id,
            task=task.name,
            code=settled.code[-64:],
            plan=settled.plan,
            local=settled.local,
            seed=scenario.seed,
            inputs=tuple(source.shape.inputs),
            classes=source.shape.classes,
            clients=scenario.clients,
            curator=scenario.curator,
            purpose=scenario.purpose,
        )
        observer.started(
            {
                "run": str(folder),
                "task": task.name,
                "clients": scenario.clients,
                "rounds": settled.plan.rounds,
                "plan": json.loads(settled.plan.to_json()),
                "engine": f"separate machines, relay at {places.address}",
                "device": settled.device,
                "resumed": resume,
            }
        )
        lines: list[Mapping[str, Any]] = []

        def on_round(line: Mapping[str, Any]) -> None:
            lines.append(line)
            observer.round(line)

        relay = Relay(
            places.address,
            places.secret.read_bytes(),
            identity,
            authority=places.loopback_authority,
            ring=lambda: ring(places.bell),
        )
        with relay:
            grid = SealedGrid(relay, _members(places, folder), identity, terms)
            observer.note(f"waiting for {scenario.clients} clients, at most {wait_s:g} s")
            chosen = grid.gather(scenario.clients, patience_s=wait_s, stopping=stopping)
            grid.keep(chosen)
            _fix(folder, grid)
            job = Job(
                id=settled.id,
                plan=settled.plan,
                local=settled.local,
                task=task,
                shape=source.shape,
                aggregator=Aggregator(
                    strategy=Strategy(scenario.strategy),
                    lr=scenario.server_lr or 1.0,
                    momentum=scenario.server_momentum,
                ),
                nodes=scenario.clients,
                cohort=scenario.cohort or scenario.clients,
                seed=scenario.seed,
                schedule=Schedule(scenario.schedule),
                warmup=scenario.warmup_rounds,
                weights=lambda node: 1.0,
                min_replies=scenario.min_replies,
                timeout_s=scenario.round_timeout or _ROUND_S,
                evaluate_every=scenario.evaluate_every,
                test=(source.test.inputs, source.test.targets),
                identity=identity,
                folder=folder,
                device=settled.device,
                sources=lambda use, round: Keystream(),
                on_round=on_round,
                stopping=stopping,
            )
            ending = run(job, grid)
            _keep_papers(folder, grid.papers())
        write_whole(folder / STATUS, json.dumps({"status": str(ending), "finished": now()}).encode())
    summary: dict[str, object] = {
        "status": "interrupted" if ending is Ending.INTERRUPTED else str(ending),
        "rounds": settled.plan.rounds if ending is Ending.FINISHED else (lines[-1]["round"] if lines else 0),
        "metrics": next((dict(line["metrics"]) for line in reversed(lines) if line["metrics"]), {}),
        "clients": {member.name: word for member, word in grid.words},
        "epsilon_spent": lines[-1]["epsilon"] if lines else None,
        "seconds": time.perf_counter() - began,
        "run": str(folder),
    }
    observer.finished(summary)
    return summary


def _settled(scenario: Scenario, folder: Path, resume: bool) -> tuple[Settled, Scenario]:
    """Settles a new job, or reads what was settled; a plan is never solved twice for one job."""
    if resume:
        settled = Settled.load(folder)
        if settled.code[-64:] != code_hash():
            raise RunError("expected the program that the job began with, got another; clients approved that one")
        return settled, Scenario.from_run(folder)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"expected a new run folder, got {folder} which is in use; choose another or --resume it")
    if scenario.weights == "declared" or scenario.unit == Unit.CLIENT:
        raise PlanError("expected uniform weights and unit record on separate machines, got others; they are to come")
    task = find_task(scenario.task)
    source = load_source(task, data=scenario.data or None)
    scenario = scenario.resolved(source.declared_records)
    settled = _at_holders_order(settle(scenario, task, source.shape), scenario)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    scenario.save(folder)
    settled.save(folder)
    return settled, scenario


def _at_holders_order(settled: Settled, scenario: Scenario) -> Settled:
    """Solves the noise anew at the order that holders' ledgers count at.

    Each fixed its order with its budget, before it knew any job. Who granted epsilon and delta of the job, at the order
    that `best_affordable_order` gives, can then pay for all of it.
    """
    plan = settled.plan
    if scenario.noise_multiplier:
        return settled
    order = best_affordable_order(plan.epsilon, plan.delta)
    update, *metrics = Event.all_of_schedule(plan)
    noise, _ = solve_noise(
        epsilon=plan.epsilon,
        delta=plan.delta,
        sample_rate=update.sample_rate,
        steps=update.steps,
        beside=metrics,
        order=order,
    )
    noise = max(noise, plan.noise_multiplier)
    return dataclasses.replace(settled, plan=dataclasses.replace(plan, noise_multiplier=noise), order=order)


def _members(places: Places, folder: Path) -> list[Member]:
    """Returns whom the job may be for: all enrolled members, or those that it began with."""
    enrolled = {member.name: (member, node) for member, node in members_of(places)}
    path = folder / MEMBERS
    if path.exists():
        fixed = json.loads(path.read_bytes())
        gone = [one["name"] for one in fixed if one["name"] not in enrolled]
        # A revoked member stays in the job's count, silent: the noise was solved for turns among all of them.
        return [
            Member(
                number=one["number"],
                name=one["name"],
                public_key=one["public_key"],
                node_id=0 if one["name"] in gone else enrolled[one["name"]][1],
            )
            for one in fixed
        ]
    return [
        Member(number=number, name=member.name, public_key=member.application, node_id=node)
        for number, (member, node) in enumerate(enrolled.values(), start=1)
    ]


def _fix(folder: Path, grid: SealedGrid) -> None:
    """Writes down who takes part, before the first round; it never changes."""
    path = folder / MEMBERS
    if not path.exists():
        fixed = [
            {"number": member.number, "name": member.name, "public_key": member.public_key} for member, _ in grid.words
        ]
        write_whole(path, canonical(fixed))


def _keep_papers(folder: Path, papers: Mapping[str, Mapping[str, Any]]) -> None:
    known = json.loads((folder / PAPERS).read_bytes()) if (folder / PAPERS).exists() else {}
    write_whole(folder / PAPERS, canonical({**known, **papers}))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a server application to one run at a time.

    Raises:
        RunError: Another run is on.
    """
    descriptor = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunError("expected no other run of this server, got one that is on; wait for it or stop it") from None
    try:
        yield
    finally:
        os.close(descriptor)
