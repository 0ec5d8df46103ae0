"""The same job played again in one process: which model do the clients' answers that came make, and no others?

With test sources a client's coins and noise depend on its data set's name and the round alone. So a job on machines,
whatever happened to them, must end with the model that this makes of the participation which its receipts record.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from clients.data import load_source
from clients.holder import Holder, Kept, content_of
from clients.jobs import Jobs, Policy
from clients.worker import Worker
from models.catalog import find_task
from privacy.accounting import Grant, best_affordable_order
from privacy.identity import Secret
from privacy.ledger import Book
from privacy.plan import canonical
from privacy.vault import Safe
from server import sealed
from server.app import CHECKPOINT
from server.checkpoint import load
from server.home import ServerHome
from server.sealed import SealedGrid
from simulations import deployment
from simulations.deployment import MEMBERS, PAPERS, deploy, keyring_of
from simulations.evidence import read_countersigned
from simulations.scenario import Scenario
from simulations.world import code_hash
from tests.apps.seeded import SeededSources
from tests.deploying import Federation
from tests.test_sealed_federation import FakeRelay

# By round, the names of those whose updates are in the model.
Played = Mapping[int, frozenset[str]]


def model_of(federation: Federation, name: str) -> dict[str, np.ndarray]:
    """Returns the last model of a job, opened with the server's keys."""
    return _model_in(federation.folder / name, ServerHome.open(federation.home))


def _model_in(folder: Path, home: ServerHome) -> dict[str, np.ndarray]:
    return dict(load(folder / CHECKPOINT, [keyring_of(home)]).model)


def distance(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Returns the largest difference between two models' numbers."""
    assert one
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def played(federation: Federation, name: str) -> dict[int, frozenset[str]]:
    """Returns whose updates are in each round of a job, as its countersigned receipts say."""
    folder, home = federation.folder / name, ServerHome.open(federation.home)
    papers = json.loads((folder / PAPERS).read_bytes())
    names = {paper["grant"]["account"]: member for member, paper in papers.items()}
    found: dict[int, set[str]] = {line["round"]: set() for line in federation.rounds(name)}
    for line in read_countersigned(folder, home.application_identity()):
        found[line.receipt.round].add(names[line.receipt.account])
    for line in federation.rounds(name):
        assert len(found[line["round"]]) == line["replies"], "receipts and rounds differ"
    return {number: frozenset(members) for number, members in found.items()}


def replay(federation: Federation, name: str, participation: Played, scratch: Path) -> dict[str, np.ndarray]:
    """Plays a job again, with fresh ledgers and keys, and returns the model after its last recorded round.

    Args:
        federation: Where it was run; no job may be on.
        name: Of the job.
        participation: Whose updates are in each round.
        scratch: A new folder.
    """
    home = ServerHome.open(federation.home)
    copy = scratch / "run"
    copy.mkdir(parents=True)
    for file in ("config.json", "job.json"):
        shutil.copy(federation.folder / name / file, copy / file)
    workers, numbers, nodes, members = {}, {}, {}, json.loads((federation.folder / name / MEMBERS).read_bytes())
    for member in members:
        worker = _worker(scratch / member["name"], member["name"], federation.task, home)
        nodes[member["name"]] = 500 + member["number"]
        workers[nodes[member["name"]]] = worker
        numbers[member["number"]] = member["name"]
        member["public_key"] = worker._identity.public_key
    (copy / MEMBERS).write_bytes(canonical(members))
    done: list[Any] = []

    class Replayed(SealedGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            asked = [
                message
                for message in messages
                if numbers[message.metadata.dst_node_id] in participation[int(message.metadata.group_id)]
            ]
            return super().send_and_receive(asked, timeout=timeout)

    class Opened(FakeRelay):
        def __enter__(self) -> FakeRelay:
            return self

        def __exit__(self, *_: object) -> None: ...

    class Watch:
        def started(self, facts: Any) -> None: ...
        def note(self, text: str) -> None: ...
        def finished(self, summary: Any) -> None: ...
        def round(self, line: Any) -> None:
            done.append(line)

    class Named:
        def __init__(self, name: str) -> None:
            self.name, self.application = name, workers[nodes[name]]._identity.public_key

    with pytest.MonkeyPatch.context() as patched:
        for constant in ("_POLL_S", "_PAUSE_S", "_WAITING_S"):
            patched.setattr(sealed, constant, 0.002)
        patched.setattr(deployment, "SealedGrid", Replayed)
        patched.setattr(deployment, "Relay", lambda *_, **__: Opened(workers, run_id=77))
        patched.setattr(deployment, "members_of", lambda places: [(Named(one), nodes[one]) for one in sorted(nodes)])
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        deploy(
            Scenario.from_run(copy),
            home,
            copy,
            resume=True,
            wait_s=60.0,
            observer=Watch(),
            stopping=lambda: len(done) >= len(participation),
        )
    assert len(done) == len(participation)
    assert [line["replies"] for line in done] == [len(participation[line["round"]]) for line in done]
    return _model_in(copy, home)


def _worker(folder: Path, name: str, task_name: str, home: ServerHome) -> Worker:
    """Returns a worker with the records and the test noise of the client of that name, and a ledger of its own."""
    folder.mkdir(parents=True)
    secret, book, task = Secret.load_or_create(folder / "client.key"), Book(folder / "ledger"), find_task(task_name)
    source = load_source(task, data=None, strict=False)
    grant = Grant(epsilon=60.0, delta=1e-5, order=best_affordable_order(60.0, 1e-5), records_bound=2000)
    book.grant({name: grant}, population=name)
    holder = Holder(
        name=name,
        task=task,
        shape=source.shape,
        load=lambda: source.train,
        book=book,
        kept=Kept(folder / "kept", durable=True, safe=Safe(book.secret, "kept")),
        sources=SeededSources(),
        commitment=book.secret.commitment(name, content_of(source.train)),
        code=code_hash(),
    )
    return Worker(
        holder,
        identity=secret.identity("client"),
        server=home.settings.application,
        jobs=Jobs(folder / "jobs"),
        policy=lambda: Policy(tasks=frozenset({task_name}), epsilon=1000.0),
        code=code_hash(),
    )
