"""One command, one federation: settles a job, runs it on an engine, leaves a run folder and a report.

A run folder holds ``config.json`` (resolved scenario), ``job.json`` (plan and identity), ``metrics.jsonl``,
``receipts.jsonl``, ``checkpoints/``, ``ledgers/``, ``kept/`` while it runs, ``partition.svg``, ``report.json`` and
``report.html``. ``tacit simulate --resume`` goes on from whatever a crash left there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from clients.holder import Sources
from privacy.errors import BudgetExceeded, RunError
from privacy.files import write_whole
from privacy.report import RunFacts, build, partition_picture, write
from server.app import Ending, server_app
from simulations import apps
from simulations.evidence import STATUS, facts_of, render, server_identity
from simulations.scenario import BY_NAME, MACHINE, Scenario
from simulations.world import World, code_hash, now, server_context

__all__ = ["Observer", "conclude", "facts_of", "render", "simulate"]

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
        The summary: status, rounds, metrics, epsilon, epsilon_replace_one, delta, seconds, run, report; and
            client_metrics where the plan asks for any.

    Raises:
        TacitError: The scenario cannot be run; nothing is left behind, or everything is resumable.
    """
    folder = (resume or out or _new_folder(scenario.task)).resolve()
    if resume is not None:
        _require_same(scenario, Scenario.from_run(resume))
    with _alone(folder):
        return _simulate(scenario, folder, resume is not None, observer, client, sources)


def _simulate(
    scenario: Scenario, folder: Path, resumed: bool, observer: Observer, client: str, sources: Sources | None
) -> dict[str, object]:
    began = time.perf_counter()
    if resumed:
        world = World.open(folder, sources, scenario)
        _note_code(world)
    else:
        world = World.create(scenario, folder, sources)
    apps.adopt(world)
    _picture(world)
    plan = world.settled.plan
    observer.started(
        {
            "run": str(folder),
            "task": world.task.name,
            "clients": world.scenario.clients,
            "rounds": plan.rounds,
            "plan": dataclasses.asdict(plan),
            "engine": world.scenario.engine,
            "device": world.settled.device,
            "resumed": resumed,
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
    facts, page = conclude(world, ending)
    headline = build(facts)["headline"]
    summary: dict[str, object] = {
        "status": "interrupted" if ending is Ending.INTERRUPTED else str(ending),
        "rounds": len(facts.rounds),
        "metrics": next((dict(line["metrics"]) for line in reversed(facts.rounds) if line["metrics"]), {}),
        **_client_metrics(facts),
        "unit": headline["unit"],
        "against": headline.get("against", "everybody"),
        "epsilon": _figure(headline["epsilon"]),
        "epsilon_replace_one": _figure(headline["replace_one"]["epsilon"]),
        "delta_replace_one": headline["replace_one"]["delta"],
        "epsilon_spent": _most_spent(facts),
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


def conclude(world: World, ending: Ending) -> tuple[RunFacts, Path]:
    """Notes how a run ended, clears what only a running job needs, and writes the report.

    Returns:
        What the report is made of, and where its page lies.
    """
    folder = world.folder
    write_whole(folder / STATUS, json.dumps({"status": str(ending), "finished": now()}).encode())
    if ending is not Ending.INTERRUPTED:
        # A finished job asks nothing again, so nothing needs to be sent again.
        shutil.rmtree(folder / "kept", ignore_errors=True)
    facts = facts_of(world)
    return facts, write(facts, folder, server_identity(world))[1]


def _client_metrics(facts: RunFacts) -> dict[str, object]:
    """Returns what clients last said about their own records, where the plan asks for it; else no key at all."""
    told = next((line["client_metrics"] for line in reversed(facts.rounds) if line.get("client_metrics")), None)
    return {} if told is None else {"client_metrics": told}


def _most_spent(facts: RunFacts) -> float | None:
    """Returns the largest spend that may be printed: infinity under test noise, None where one is not proven."""
    figures = [client.figure() for client in facts.clients]
    return None if None in figures else max((figure for figure in figures if figure is not None), default=0.0)


def _figure(printed: float | str) -> float | None:
    """Returns a figure as the report prints it: a number, infinity, or None for "unknown"."""
    return None if printed == "unknown" else float(printed)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a run folder to one process; the lock lies beside it, because a start that fails leaves no folder.

    Raises:
        RunError: Another process works in the folder.
    """
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise RunError(f"expected to write beside {folder}, got: {error.strerror}; choose another folder") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunError(f"expected {folder} to be free, got one that another process runs in; wait for it") from None
    try:
        yield
    finally:
        # Removed while it is still locked: whoever waits to open it makes a new one.
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _note_code(world: World) -> None:
    """Adds the code that goes on with a run to the code that began it, where they differ; the report prints both."""
    if not world.settled.code.endswith(code_hash()):
        world.settled = dataclasses.replace(world.settled, code=f"{world.settled.code}, then {code_hash()}")
        world.settled.save(world.folder)


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
            if line["missing"] and not line["replies"] and not line["declined"] and grid.failures:
                # One failing client is a straggler; all of them failing is a fault of the task, to be told at once.
                kind, _, text = grid.failures[-1].reason.partition(">:<")
                raise RunError(
                    f"expected updates, got only failures; the last was {kind.rpartition('.')[2].strip(chr(39))}: "
                    f"{text.strip('<>').strip(chr(39))}; mend the task or its data, then resume"
                )
            apps.sessions[folder].on_round(line)

        watched = dataclasses.replace(job, on_round=on_round)
        app = server_app(lambda context: watched, lambda done, ending: setattr(apps.sessions[folder], "ending", ending))
        app(grid=grid, context=server_context(folder, grid.run.run_id))


def _devices(device: str) -> tuple[str, ...]:
    if not device.startswith("cuda"):
        return ()
    import torch

    return (device,) if ":" in device else tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
