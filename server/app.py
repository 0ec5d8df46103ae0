"""The server application: one federated round, in one place.

    cohort        whose turn it is; every client's turns are counted in advance, so that its noise can be solved
    ask           one message per client: model, plan, round, learning rate, the last receipt we hold of it
    check         each reply: shape, finiteness, and a signed receipt for exactly this request
    aggregate     mean with public weights (`server.aggregate`)
    evaluate      on the server's own public test set; clients say about their own records what the plan's metrics say
    checkpoint    model, aggregator, receipts' heads; then the round counts

Rule for clients that do not deliver: whoever declines is not asked again in this job; an error, a late or a malformed
reply counts as missing. The mean runs over those who delivered; each update is private on its own, so this reveals
nothing. A round with fewer than ``min_replies`` updates leaves the model as it is. When fewer than ``min_replies``
clients are left that have not declined, the job ends there and keeps its model.

Where the plan protects clients, a round is played by `server.central` instead, and these last rules do not hold there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from models.task import Shape, Task
from privacy.accounting import Event
from privacy.central import BIT
from privacy.errors import LedgerError, PlanError, RunError
from privacy.files import write_whole
from privacy.identity import COUNTERSIGN, Identity
from privacy.ledger import Receipt
from privacy.metrics import Sums, pooled, widths
from privacy.noise import Keystream, RandomSource
from privacy.plan import Local, Plan, Unit, require
from privacy.vault import Safe
from privacy.vault.keys import Keyring
from privacy.wire import model_digest, read_float32, request_digest
from server.aggregate import Aggregator, Arrays
from server.checkpoint import Newest, State, load, save

CHECKPOINT: Final = "checkpoints/latest.ckpt"
METRICS: Final = "metrics.jsonl"
RECEIPTS: Final = "receipts.jsonl"


class Schedule(StrEnum):
    """How the learning rate changes over the rounds; public, fixed before the first."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"
    STEP = "step"

    def factor(self, round: int, rounds: int, warmup: int) -> float:
        """Returns the factor on the learning rate for a round, in (0, 1].

        Args:
            round: Round, from 1.
            rounds: Rounds of the job.
            warmup: Rounds of linear warm-up, >= 0.
        """
        if round <= warmup:
            return round / (warmup + 1)
        done = (round - 1 - warmup) / max(1, rounds - warmup)
        match self:
            case Schedule.CONSTANT:
                return 1.0
            case Schedule.COSINE:
                return 0.5 * (1 + math.cos(math.pi * done))
            case Schedule.LINEAR:
                return 1.0 - done
            case Schedule.STEP:
                return 0.1 ** int(done * 3)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """Everything the server needs to run, or resume, a job.

    Attributes:
        id: Random job identity, 32 hex digits, stable over resumption.
        plan: What may leave a client, and under which protection.
        local: How clients learn.
        task: What is learned.
        shape: Public shape of a record.
        aggregator: Server rule, fresh; its state is restored from a checkpoint.
        nodes: Clients that the job waits for before its first round.
        cohort: Clients asked per round.
        seed: Of the initial model and of whose turn it is; neither carries a guarantee.
        schedule: Learning-rate schedule.
        warmup: Rounds of warm-up.
        weights: Public weight of a node, > 0.
        min_replies: Fewest updates that change the model.
        timeout_s: Longest wait for a round's replies in seconds, or None.
        evaluate_every: Evaluate after every so many rounds, and after the last.
        test: The server's public test set: inputs ``(N, *shape)`` and classes ``(N,)``.
        identity: Countersigns receipts.
        folder: Where checkpoints, metrics and receipts go.
        device: Where evaluation runs.
        vault: Seals checkpoints; None leaves them in clear.
        newest: Remembers the newest sealed checkpoint, apart from the folder: an older one is refused.
        sources: Where the server's own coins and noise come from, where the plan protects clients: a fresh source for
            each use and round.
        safe: Seals the state of banded noise, which is as secret as a key; needed where the job is no simulation.
        simulated: Whether one machine plays every part, so that nothing on it is hidden from anybody anyway.
        on_round: Called with each finished round's line.
        stopping: Asked after each round; true ends the job there, to be resumed.
    """

    id: str
    plan: Plan
    local: Local
    task: Task
    shape: Shape
    aggregator: Aggregator
    nodes: int
    cohort: int
    seed: int
    schedule: Schedule
    warmup: int
    weights: Callable[[int], float]
    min_replies: int
    timeout_s: float | None
    evaluate_every: int
    test: tuple[torch.Tensor, torch.Tensor]
    identity: Identity
    folder: Path
    device: str = "cpu"
    vault: Keyring | None = None
    newest: Newest | None = None
    sources: Callable[[str, int], RandomSource] = lambda use, round: Keystream()
    safe: Safe | None = None
    simulated: bool = False
    on_round: Callable[[Mapping[str, Any]], None] = lambda line: None
    stopping: Callable[[], bool] = lambda: False


class Ending(StrEnum):
    """How a job ended."""

    FINISHED = "finished"
    TOO_FEW = "too few clients left"
    INTERRUPTED = "interrupted"


def turns(nodes: Sequence[int], cohort: int, seed: int, round: int) -> list[int]:
    """Returns the nodes whose turn it is, the same for the same arguments.

    Nodes are dealt like cards: a shuffled deck is dealt cohort by cohort, and shuffled anew when it cannot fill one.
    So no node is asked more often than `joins_of` says, which the noise is solved for; no amplification by client
    sampling is claimed, because participation is visible.

    Args:
        nodes: All nodes, in a stable order.
        cohort: Nodes per round, at most ``len(nodes)``.
        seed: Seed of the shuffles.
        round: Round, from 1.
    """
    if cohort >= len(nodes):
        return list(nodes)
    deal, hand = divmod(round - 1, len(nodes) // cohort)
    deck = _deck(len(nodes), seed, deal)
    return sorted(nodes[card] for card in deck[hand * cohort : (hand + 1) * cohort])


_decks: dict[tuple[int, int], tuple[int, list[int]]] = {}


def _deck(size: int, seed: int, deal: int) -> list[int]:
    if _decks.get((size, seed), (-1, []))[0] != deal:
        # Scheduling, not secrecy: whose turn it is protects nobody.
        deck = random.Random(f"{seed}/{deal}").sample(range(size), size)  # noqa: S311
        _decks.clear()
        _decks[size, seed] = deal, deck
    return _decks[size, seed][1]


def joins_of(rounds: int, clients: int, cohort: int) -> int:
    """Returns the most rounds that `turns` asks one client to join."""
    return rounds if cohort >= clients else math.ceil(rounds / (clients // cohort))


def trainable(model: torch.nn.Module) -> Arrays:
    """Returns a model's trainable parameters by name; only these travel."""
    parameters = model.named_parameters()
    return {name: value.detach().cpu().float().numpy().copy() for name, value in parameters if value.requires_grad}


def evaluate(job: Job, model: torch.nn.Module, arrays: Arrays) -> dict[str, float]:
    """Returns the task's metrics of a model on the public test set."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in arrays.items():
            parameters[name].copy_(torch.from_numpy(value))
    return job.task.figures(model, *job.test, device=job.device)


def run(job: Job, grid: Grid) -> Ending:
    """Runs a job to its end, from its last checkpoint where there is one.

    Guarantees:
        Same again: after a crash, the interrupted round's requests are equal to the first ones byte for byte, so
            clients can answer with what they kept.

    Raises:
        RunError: The checkpoint is damaged or of another job, or nothing can be written.
    """
    # Imported here, because it plays its rounds with the functions below.
    from server import central

    protects_clients = job.plan.unit is Unit.CLIENT
    if protects_clients:
        central.check_job(job)
    await_nodes(grid, job.nodes)
    model = job.task.fresh(job.shape, job.seed).to(job.device)
    first = trainable(model)
    path = job.folder / CHECKPOINT
    if path.exists():
        state = load(path, [job.vault] if job.vault is not None else (), job.newest)
        state.vault, state.newest = job.vault, job.newest
        require_same(job, state, first)
        if gone := set(state.witnesses) - set(grid.get_node_ids()):
            raise RunError(
                f"expected the nodes that the run began with, {len(gone)} of them are gone; resume it on the engine "
                "that it began on (under flwr run nodes get new numbers at every start: begin a new run there)"
            )
        _require_newest(job, state, stored=True)
        job.aggregator.moments, job.aggregator.updates = state.moments, state.updates
        for name in (METRICS, RECEIPTS):
            _cut(job.folder / name, state.lines.get(name, 0))
    else:
        if job.newest is not None and job.newest.generation:
            raise RunError(
                f"expected the checkpoint of a job that was stored {job.newest.generation} times at {path}, got none; "
                "restore the newest one, or start a new job"
            )
        state = State(job=job.id, round=0, model=first, vault=job.vault, newest=job.newest)
        _require_newest(job, state, stored=False)
        save(state, path)
    with central.noise_of(job, grid, state) as noise:
        while state.round < job.plan.rounds or central.is_pending(state):
            if protects_clients:
                line = central.one_round(job, grid, state, model, noise)
            else:
                line = one_round(job, grid, state, model)
            save(state, path)
            job.on_round(line)
            if not protects_clients and line["left"] < job.min_replies and state.round < job.plan.rounds:
                return Ending.TOO_FEW
            if job.stopping() and state.round < job.plan.rounds:
                return Ending.INTERRUPTED
    return Ending.FINISHED


def await_nodes(grid: Grid, wanted: int, patience_s: float = 15.0) -> None:
    """Waits until all clients of the job are there; the noise is solved for turns among exactly that many.

    Raises:
        RunError: Another number of nodes is there after ``patience_s``.
    """
    deadline = time.monotonic() + patience_s
    while (there := _count(grid.get_node_ids())) != wanted:
        if time.monotonic() > deadline:
            raise RunError(
                f"expected {wanted} nodes, got {there}; set clients to the number of nodes that the engine starts, or "
                f"start {wanted} (with flwr run: --federation-config num-supernodes={wanted})"
            )
        time.sleep(0.5)


def _count(nodes: Iterable[int]) -> int:
    return len(nodes) if isinstance(nodes, range) else len(list(nodes))


def one_round(job: Job, grid: Grid, state: State, model: torch.nn.Module) -> dict[str, Any]:
    """Runs one round: cohort, ask, check, aggregate, evaluate. Advances ``state``; returns the round's line."""
    began, number = time.perf_counter(), state.round + 1
    nodes = grid.get_node_ids()
    nodes = nodes if isinstance(nodes, range) else sorted(nodes)
    declined = set(state.declined)
    cohort = [node for node in turns(nodes, job.cohort, job.seed, number) if node not in declined]

    requests = {message.metadata.dst_node_id: message for message in ask(job, state, number, cohort)}
    shared = model_digest((n, f"{a.stype}/{a.dtype}", a.shape, a.data) for n, a in _model_of(requests).items())
    updates: list[tuple[int, Arrays, Receipt]] = []
    measured: dict[int, dict[str, Sums]] = {}
    words: list[str] = []
    for reply in grid.send_and_receive(requests.values(), timeout=job.timeout_s):
        node = reply.metadata.src_node_id
        match check(reply, job, state, requests.get(node), shared):
            case (update, receipt):
                updates.append((node, update, receipt))
                measured[node] = metrics_of(reply, job)
            case word:
                words.append(word)
                # Declining is about the budget, which never grows; whatever else went wrong may pass.
                if word == "declined":
                    declined.add(node)
    # In the order of the nodes: float addition does not commute with the order in which replies came.
    updates.sort(key=lambda update: update[0])

    if len(updates) >= job.min_replies:
        weighted = [(update, job.weights(node)) for node, update, _ in updates]
        state.model = job.aggregator.step(state.model, weighted)
    state.round, state.declined = number, sorted(declined)
    state.moments, state.updates = job.aggregator.moments, job.aggregator.updates
    for node, _, receipt in updates:
        state.witnesses[node] = f"{receipt.seq}:{receipt.head}"
        state.identities[node] = _identity_of(receipt)
        state.spent[receipt.account] = receipt.spent
    tested = any(receipt.test for *_, receipt in updates)
    due = number % job.evaluate_every == 0 or number == job.plan.rounds
    line = {
        "round": number,
        "rounds": job.plan.rounds,
        "metrics": evaluate(job, model, state.model) if due else {},
        # Test noise protects nothing: no figure is better than a small one.
        "epsilon": None if tested else max(state.spent.values(), default=None),
        "budget": job.plan.epsilon,
        "replies": len(updates),
        "declined": words.count("declined"),
        "missing": len(cohort) - len(updates) - words.count("declined"),
        "left": len(nodes) - len(declined),
        "thin": len(updates) < job.min_replies,
        "seconds": time.perf_counter() - began,
    }
    if job.plan.metrics is not None:
        # Of the round's incoming model, and of everybody who answered: pooling noised sums costs nothing.
        line["client_metrics"] = pooled(job.plan.metrics, [measured[node] for node, *_ in updates])
    write_lines(job.folder / RECEIPTS, [countersign(job.identity, receipt) for *_, receipt in updates])
    write_lines(job.folder / METRICS, [json.dumps(line)])
    state.lines[METRICS] = state.lines.get(METRICS, 0) + 1
    state.lines[RECEIPTS] = state.lines.get(RECEIPTS, 0) + len(updates)
    return line


def ask(job: Job, state: State, number: int, cohort: Sequence[int]) -> Iterator[Message]:
    """Yields one request per client; the model is written once and shared by all."""
    arrays = ArrayRecord({name: Array(value) for name, value in state.model.items()})
    common: dict[str, str | int | float] = {
        "job": job.id,
        "round": number,
        "task": job.task.name,
        "plan": job.plan.to_json(),
        "local": job.local.to_json(),
        # Frozen parameters do not travel: client and server make the same ones from this seed.
        "seed": job.seed,
        "lr": job.local.lr * job.schedule.factor(number, job.plan.rounds, job.warmup),
    }
    if state.central is not None:
        common["clip"] = state.central.clip
        if state.central.rows is not None:
            common["drawing"] = state.central.rows.identity
    shared = ConfigRecord()
    for key, value in common.items():
        shared[key] = value
    for node in cohort:
        config = shared.copy()
        config["witness"] = state.witnesses.get(node, "")
        content = RecordDict({"arrays": arrays, "job": config})
        yield Message(content, dst_node_id=node, message_type=MessageType.TRAIN, group_id=str(number))


def _model_of(requests: Mapping[int, Message]) -> ArrayRecord:
    """Returns the model that all requests of a round share."""
    for message in requests.values():
        arrays = message.content["arrays"]
        if isinstance(arrays, ArrayRecord):
            return arrays
    return ArrayRecord()


def check(reply: Message, job: Job, state: State, request: Message | None, model: str) -> tuple[Arrays, Receipt] | str:
    """Reads a reply, trusting none of it.

    Args:
        reply: What came.
        job: The job.
        state: Where it stands; the reply must answer its next round.
        request: What this node was asked, or None if nothing.
        model: Digest of the model in the request.

    Returns:
        What was released and its receipt; or the word that was answered; or "missing" for anything else.
    """
    if request is None or reply.has_error():
        return "missing"
    refusal = reply.content.get("refusal")
    if isinstance(refusal, ConfigRecord):
        return str(refusal.get("word", "missing"))[:16]
    arrays, record = reply.content.get("arrays"), reply.content.get("receipt")
    if not isinstance(arrays, ArrayRecord) or not isinstance(record, ConfigRecord):
        return "missing"
    shapes = {name: like.shape for name, like in state.model.items()} | ({BIT: (1,)} if job.plan.quantile else {})
    if list(arrays) != list(shapes):
        return "missing"
    try:
        update = {name: read_float32(arrays[name].data, shape, name) for name, shape in shapes.items()}
        metrics_of(reply, job)
        receipt = Receipt.from_json(str(record.get("receipt", "")))
    except (PlanError, LedgerError):
        return "missing"
    previous = state.witnesses.get(reply.metadata.src_node_id, "-1:").partition(":")
    asked = request.content["job"]
    fields = asked.items() if isinstance(asked, ConfigRecord) else ()
    digest = request_digest({key: value for key, value in fields if isinstance(value, str | int | float)}, model)
    if (receipt.job, receipt.round, receipt.request) != (job.id, state.round + 1, digest):
        return "missing"
    # A receipt for less than the plan asks would make the client's spend look smaller than it is.
    if receipt.events != Event.all_of_round(job.plan):
        return "missing"
    # The first receipt pins a node to one account and key: a fresh ledger would hide what the old one spent.
    pinned = state.identities.get(reply.metadata.src_node_id, _identity_of(receipt))
    if receipt.seq <= int(previous[0]) or pinned != _identity_of(receipt):
        return "missing"
    return update, receipt


def metrics_of(reply: Message, job: Job) -> dict[str, Sums]:
    """Reads a reply's noised sums by metric; empty where the plan asks for none, whatever the reply says unasked.

    Raises:
        PlanError: It does not hold exactly the plan's metrics.
    """
    shapes = widths(job.plan.metrics, job.shape.classes)
    record = reply.content.get("metrics") if shapes else ArrayRecord()
    if not isinstance(record, ArrayRecord) or list(record) != list(shapes):
        raise PlanError(f"expected the metrics {list(shapes)}, got something else")
    return {name: read_float32(record[name].data, shape, name) for name, shape in shapes.items()}


def _identity_of(receipt: Receipt) -> str:
    return f"{receipt.account}:{receipt.public_key}"


def countersign(identity: Identity, receipt: Receipt) -> str:
    """Returns one line of the receipts file: the holder's receipt with the server's signature over it."""
    text = receipt.to_json()
    signature = identity.sign(COUNTERSIGN + text.encode())
    return json.dumps({"receipt": text, "peer": identity.public_key, "countersignature": signature})


def require_same(job: Job, state: State, first: Arrays) -> None:
    """Refuses to resume a checkpoint of another job or another model.

    Raises:
        RunError: They differ.
    """
    if state.job != job.id or {n: v.shape for n, v in state.model.items()} != {n: v.shape for n, v in first.items()}:
        raise RunError("expected a checkpoint of this job, got one of another; resume it from its own run folder")


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Appends whole lines to a file.

    Raises:
        RunError: The disk is full or the file cannot be written.
    """
    try:
        with path.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise RunError(f"expected to write {path}, got {error.strerror}; free some space and resume the run") from None


def _require_newest(job: Job, state: State, *, stored: bool) -> None:
    """Refuses to go on from a checkpoint that is older than what the job has told already, or from none.

    A round that was told is over: its cohort, its noise and its requests may not be drawn again (guarantee G16).

    Raises:
        RunError: The log or the receipts go further than a crash can leave them.
    """
    # A crash leaves one round at most in the files; where clients are protected it was stored, as pending, before. The
    # first checkpoint is written before anybody is asked, so without one there is no round.
    pending = state.central is not None and state.central.pending is not None
    ahead = int(stored and (job.plan.unit is Unit.RECORD or pending))
    told = state.lines.get(METRICS, 0)
    found = (job.folder / METRICS).read_bytes().count(b"\n") if (job.folder / METRICS).exists() else 0
    if found > told + ahead:
        got = f"one of {told}" if stored else "none"
        raise RunError(
            f"expected the newest checkpoint of {found} rounds that were told, got {got}; restore it from a backup, an "
            "older one would ask for finished rounds anew"
        )


def _cut(path: Path, lines: int) -> None:
    """Drops what a crash left behind the last checkpoint; the round will write it again."""
    if not path.exists():
        return
    whole = path.read_bytes().splitlines(keepends=True)[:lines]
    write_whole(path, *whole)


def server_app(configure: Callable[[Context], Job], finish: Callable[[Job, Ending], None]) -> ServerApp:
    """Makes the server application.

    Args:
        configure: Builds the job that a context asks for.
        finish: Called with the job and how it ended.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        job = configure(context)
        require(job.cohort >= 1, f"expected a cohort of at least one client, got {job.cohort}")
        finish(job, run(job, grid))

    return app
