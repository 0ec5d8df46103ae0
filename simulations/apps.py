"""The two Flower apps of a simulation, the same objects under all three engines.

``server`` and ``client`` are what ``[tool.flwr.app.components]`` names. Under the local engine and under Ray, the run
folder stands in the run configuration. Under ``flwr run`` it does not: there the server makes one from the scenario
keys of the run configuration, under a name that every process can tell from the run's id.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp

from clients.app import client_app
from clients.holder import Holder, Sources
from privacy.errors import PlanError
from privacy.identity import Secret
from privacy.vault.unlock import keyring_at
from server.aggregate import Aggregator, Strategy
from server.app import Ending, Job, Schedule, server_app
from simulations.scenario import Scenario
from simulations.world import World

_worlds: dict[tuple[Path, type | None], World] = {}


@dataclasses.dataclass(eq=False, kw_only=True)
class Session:
    """A run that is driven from this process: who watches, and whether it should stop.

    Attributes:
        on_round: Called with each finished round's line.
        stopping: Whether the run should end after the current round.
        ending: How it ended, or None while it runs.
    """

    on_round: Callable[[Mapping[str, Any]], None] = lambda line: None
    stopping: Callable[[], bool] = lambda: False
    ending: Ending | None = None


sessions: dict[Path, Session] = {}


def run_folder(context: Context) -> Path:
    """Returns the run folder that a context belongs to."""
    if "run" in context.run_config:
        return Path(str(context.run_config["run"]))
    home = Path(os.environ.get("TACIT_RUNS") or Path.home() / ".cache" / "tacit" / "runs")
    return home / f"flower-{context.run_id}"


def world_of(folder: Path, sources: Sources | None = None) -> World:
    """Returns this process's view of a run folder; opened once."""
    key = (folder, type(sources) if sources is not None else None)
    if key not in _worlds:
        _worlds.clear()
        _worlds[key] = World.open(folder, sources)
    return _worlds[key]


def adopt(world: World) -> None:
    """Makes an open world the one that this process's clients use."""
    _worlds.clear()
    for kind in (None, type(world.sources)):
        _worlds[world.folder, kind] = world


def job_of(world: World, session: Session) -> Job:
    """Returns the server's job for an open world.

    Raises:
        PlanError: There is no public test set to evaluate on.
    """
    scenario, settled = world.scenario, world.settled
    if world.source is None or not len(world.source.test):
        raise PlanError("expected a public test set for the server, got none; add test data to the data set")
    sizes = scenario.sizes
    return Job(
        id=settled.id,
        plan=settled.plan,
        local=settled.local,
        task=world.task,
        shape=world.population.shape,
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
        weights=(lambda node: float(sizes[node - 1])) if sizes else (lambda node: 1.0),
        min_replies=scenario.min_replies,
        timeout_s=scenario.round_timeout or None,
        evaluate_every=scenario.evaluate_every,
        test=(world.source.test.inputs, world.source.test.targets),
        identity=Secret.load_or_create(world.folder / "server.key").identity("server"),
        folder=world.folder,
        device=settled.device,
        vault=keyring_at(scenario.vault),
        # A test source of the clients is one of the server too: every ledger then says so.
        sources=lambda use, round: world.sources(holder=f"server/{use}", job=settled.id, round=round),
        simulated=True,
        on_round=session.on_round,
        stopping=session.stopping,
    )


def _configure(context: Context) -> Job:
    folder = run_folder(context)
    if folder not in sessions:
        # Under flwr run nobody made the folder yet: the run configuration is the scenario.
        from models.catalog import find_task

        config = {key: value for key, value in context.run_config.items() if key != "run"}
        task = find_task(str(config.get("task", "digits")))
        scenario = Scenario.from_run_config(config, task.defaults)
        # Whoever started this run, it is not our engine: nodes have no fixed numbers, and none share a process.
        adopt(World.create(dataclasses.replace(scenario, engine="ray", workers=1), folder))
        sessions[folder] = Session(on_round=_print_round)
    return job_of(world_of(folder), sessions[folder])


def _finish(job: Job, ending: Ending) -> None:
    session = sessions[job.folder]
    session.ending = ending
    if session.on_round is _print_round:
        from simulations.run import conclude

        print(f"{ending}; report: {conclude(world_of(job.folder), ending)[1]}")


def _print_round(line: Mapping[str, Any]) -> None:
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in line["metrics"].items())
    print(
        f"round {line['round']}/{line['rounds']}  {metrics}  epsilon {line['epsilon'] or 0:.3f} of {line['budget']:g}"
    )


def simulated_client(sources: Sources | None = None) -> ClientApp:
    """Makes the client app of a simulation.

    Args:
        sources: Randomness of releases. Anything but the default marks every ledger it charges as a test ledger,
            and reports over it print infinity.
    """

    def find(context: Context) -> Holder:
        return world_of(run_folder(context), sources).holder(context)

    return client_app(find, simulated=True)


server = server_app(_configure, _finish)
client = simulated_client()
