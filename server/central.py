"""A round at a server that is trusted with its clients' updates: it adds the noise that hides each client (G16).

    draw       each client by its own secret coin, and no second try; stored before the first message
    ask, check as `server.app`
    release    clip, sum, noise, divide by a constant (`privacy.central`), then the server's rule on the noised mean
    keep       the new model is stored before anything reads it: evaluation, log, screen, the next round
    tell       evaluate, write the line and the receipts, store that they are written

Why this order. Killed before the cohort is stored, nobody was asked: new coins are as good as the first. Killed after,
the same cohort is asked again, with the same bytes, and clients answer with what they kept. Killed between the noise
and its storage, the noise was seen by nobody, and the round gets another; killed after, the stored model is told. So of
one round one cohort is ever asked and one noised model ever leaves.

With banded noise (`privacy.matrix`) the cohort is the class whose turn it is, dealt once for the whole job, and the
noise is a row that is kept with its release before it is used: killed between the two, the same row is taken up again,
whoever replied meanwhile. The state of the noise is one of a kind. Where it is lost, or older than the checkpoint says,
the job has ended: nothing draws the rest of a matrix afresh.

A reply that is late, missing, declined or malformed adds nothing; noise and divisor stay. A job plays all its rounds,
also those that nobody answers: to stop early would tell about coins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from flwr.serverapp import Grid

from privacy import central
from privacy.central import BIT, Aggregate, Contribution, Vector, clipped_sum, mean_of
from privacy.errors import RunError
from privacy.ledger import Receipt
from privacy.matrix import CorrelatedNoise, Drawing, Mark, class_of_round, deal, matrix_of
from privacy.noise import SECURE_SOURCE, Keystream, RandomSource
from privacy.plan import require
from privacy.wire import model_digest, request_digest, write_float32
from server.aggregate import Arrays
from server.app import (
    CHECKPOINT,
    METRICS,
    RECEIPTS,
    Job,
    _identity_of,
    _model_of,
    ask,
    check,
    countersign,
    evaluate,
    write_lines,
)
from server.checkpoint import Central, Rows, State, save

# Where the state of banded noise lies in a job's folder, beside its lock; it is as secret as a key.
NOISE: Final = "noise"


def check_job(job: Job) -> None:
    """Refuses a job whose public constants are not the plan's.

    Raises:
        PlanError: The divisor is not the expected cohort of these clients, or the size of a class of them; or the
            state of banded noise would lie readable on a disk.
    """
    law, words = job.plan.banded, "client rate x clients"
    expected = job.plan.client_rate * job.nodes
    if law is not None:
        expected, words = job.nodes / law.separation, "clients / separation"
        require(
            law.separation <= job.nodes,
            f"expected at least one client in each of {law.separation} classes, got {job.nodes} clients; lower the "
            "separation",
        )
        require(
            job.safe is not None or job.simulated,
            "expected a safe for the state of banded noise, which takes the noise off the last models, got none; give "
            "the job one",
        )
    require(
        abs(job.plan.expected_batch - expected) <= 1e-9 * expected,
        f"expected the divisor {words} = {expected:g}, got {job.plan.expected_batch:g}; settle anew",
    )


@contextlib.contextmanager
def noise_of(job: Job, grid: Grid, state: State) -> Iterator[CorrelatedNoise | None]:
    """Opens the noise of a job with a matrix, beginning it before the first round; erases it after the last one.

    Guarantees:
        Once: a drawing is begun where no round was played, and in the checkpoint before anybody is asked. From then on
            it is only ever resumed, where exactly the checkpoint left it or one kept release further.

    Args:
        job: The job.
        grid: Whose nodes a new drawing deals into classes.
        state: Where it stands; a new drawing is written into it and stored.

    Yields:
        The noise; None where the plan has fresh noise in every round, or every row was released and used.

    Raises:
        RunError: The state of the noise is lost, older, or another one: the mechanism has ended.
    """
    law = job.plan.banded
    if law is None:
        yield None
        return
    if state.round >= job.plan.rounds:
        # Every row was used. What a crash left behind can only take noise off.
        yield None
        shutil.rmtree(job.folder / NOISE, ignore_errors=True)
        return
    memory = state.central = state.central or Central(clip=float(job.plan.l2_clip))
    kept: dict[str, Any] = {
        "job": job.id,
        "size": sum(value.size for value in state.model.values()),
        "noise_multiplier": job.plan.noise_multiplier,
        "l2_clip": job.plan.l2_clip,
        "safe": job.safe,
        "sources": _sources(job, state),
    }
    folder, matrix = job.folder / NOISE, matrix_of(job.plan)
    if memory.rows is None:
        if state.round:
            raise RunError(f"expected the drawing of {state.round} rounds that were played, got none; restore a backup")
        noise = CorrelatedNoise.begin(folder, matrix, **kept)
    else:
        drawing = Drawing(matrix=matrix, identity=memory.rows.identity)
        noise = CorrelatedNoise.resume(folder, drawing, Mark(row=memory.rows.row, digest=memory.rows.digest), **kept)
    with noise:
        if memory.rows is None:
            # On disk before the first message; a crash before that takes up the drawing, which has released nothing.
            dealt, mark = deal(sorted(grid.get_node_ids()), job.seed), noise.mark
            memory.rows = Rows(identity=noise.drawing.identity, dealt=dealt, row=mark.row, digest=mark.digest)
            save(state, job.folder / CHECKPOINT)
        yield noise
        if state.round >= job.plan.rounds and not is_pending(state):
            noise.erase()
            shutil.rmtree(folder, ignore_errors=True)


def _sources(job: Job, state: State) -> Callable[[], RandomSource]:
    """Returns what a drawing takes one fresh source a row from; only the production type gets its name (G11)."""
    if type(job.sources("noise", state.round + 1)) is Keystream:
        return Keystream

    def source() -> RandomSource:
        return job.sources("noise", state.round + 1)

    return source


def is_pending(state: State) -> bool:
    """Says whether a round's model is stored and its line is not written yet."""
    return state.central is not None and state.central.pending is not None


def one_round(
    job: Job, grid: Grid, state: State, model: torch.nn.Module, noise: CorrelatedNoise | None = None
) -> dict[str, Any]:
    """Plays one round, or tells the one that a crash left untold. Advances ``state``; returns the round's line.

    Args:
        job: The job.
        grid: Who is asked.
        state: Where it stands.
        model: What is evaluated; its parameters are overwritten.
        noise: From `noise_of`; None where the plan has fresh noise in every round.

    Guarantees:
        Once: whatever is killed when, one cohort is asked for a round, and one noised model of it is ever used.
    """
    began = time.perf_counter()
    memory = state.central = state.central or Central(clip=float(job.plan.l2_clip))
    if memory.pending is None:
        cohort = _cohort(job, grid, state, memory)
        _release(job, grid, state, memory, cohort, noise)
        memory.pending["line"]["seconds"] = time.perf_counter() - began  # type: ignore[index]
        # Keep: from here on this is the round's model, and everything that follows is post-processing of it.
        save(state, job.folder / CHECKPOINT)
    return _tell(job, state, memory, model)


def _cohort(job: Job, grid: Grid, state: State, memory: Central) -> list[int]:
    """Returns the round's cohort; drawn once, and on disk when it is first returned."""
    number = state.round + 1
    if memory.round != number:
        if memory.rows is None:
            nodes = sorted(grid.get_node_ids())
            memory.cohort = central.draw_cohort(nodes, memory.counted, job.plan, job.sources("cohort", number))
        else:
            drawing = Drawing(matrix=matrix_of(job.plan), identity=memory.rows.identity)
            memory.cohort = class_of_round(memory.rows.dealt, drawing.turns, number)
        memory.round = number
        for node in memory.cohort:
            memory.counted[node] = memory.counted.get(node, 0) + 1
        save(state, job.folder / CHECKPOINT)
    return memory.cohort


def _release(
    job: Job, grid: Grid, state: State, memory: Central, cohort: Sequence[int], noise: CorrelatedNoise | None
) -> None:
    """Asks the cohort and makes the round's one noised model, in memory only."""
    number, declined = state.round + 1, set(state.declined)
    asked = [node for node in cohort if node not in declined]
    requests = {message.metadata.dst_node_id: message for message in ask(job, state, number, asked)}
    shared = model_digest((n, f"{a.stype}/{a.dtype}", a.shape, a.data) for n, a in _model_of(requests).items())
    updates: dict[int, tuple[Arrays, Receipt]] = {}
    refusals = 0
    for reply in grid.send_and_receive(requests.values(), timeout=job.timeout_s) if requests else ():
        node = reply.metadata.src_node_id
        match check(reply, job, state, requests.get(node), shared):
            case (update, receipt):
                # One contribution a client: a second reply would be a second share of the sum.
                updates.setdefault(node, (update, receipt))
            case word:
                refusals += word == "declined"
                if word == "declined":
                    declined.add(node)
    _keep_one_each(updates)
    # In the order of the nodes: float addition does not commute with the order in which replies came.
    replies = [updates[node] for node in sorted(updates)]
    size = sum(value.size for value in state.model.values())
    contributions = [Contribution(_flat(update, state.model), _bit(update)) for update, _ in replies]
    if noise is None:
        released = central.aggregate(contributions, size, job.plan, memory.clip, job.sources("noise", number))
    else:
        released = _row(job, state, memory, contributions, noise)
    # The server's rule sees the noised mean only, as if it were one client's model: post-processing.
    state.model = job.aggregator.step(state.model, [(_moved(state.model, released.mean), 1.0)])
    state.moments, state.updates = job.aggregator.moments, job.aggregator.updates
    line = {
        "round": number,
        "rounds": job.plan.rounds,
        "metrics": {},
        "epsilon": None,
        "budget": job.plan.epsilon,
        "replies": len(replies),
        "declined": refusals,
        "missing": len(cohort) - len(replies) - refusals,
        "left": job.nodes - len(declined),
        "thin": False,
        "clip": memory.clip,
    }
    for node in sorted(updates):
        receipt = updates[node][1]
        state.witnesses[node] = f"{receipt.seq}:{receipt.head}"
        state.identities[node] = _identity_of(receipt)
        state.spent[receipt.account] = receipt.spent
    # Test noise protects nothing: no figure is better than a small one.
    tested = any(receipt.test for _, receipt in replies) or (noise is not None and noise.source != SECURE_SOURCE)
    line["epsilon"] = None if tested else max(state.spent.values(), default=None)
    state.round, state.declined, memory.clip = number, sorted(declined), released.clip
    receipts = [countersign(job.identity, receipt) for _, receipt in replies]
    memory.pending = {"line": line, "receipts": receipts}


def _keep_one_each(updates: dict[int, tuple[Arrays, Receipt]]) -> None:
    """Leaves one reply of each data set: two nodes with one ledger, or a relay that copies, would double its share.

    The first requests of all nodes are equal, so a reply to one of them fits the others too.
    """
    seen: set[str] = set()
    for node in sorted(updates):
        identity = _identity_of(updates[node][1])
        if identity in seen:
            del updates[node]
        seen.add(identity)


def _row(
    job: Job, state: State, memory: Central, contributions: Sequence[Contribution], noise: CorrelatedNoise
) -> Aggregate:
    """Makes a round's one release with its row of the matrix; on disk, with the state after it, when it is returned.

    The row belongs to round, model and cohort, not to who replied. So a round that is asked again after a crash gets
    the release that was kept, whoever replies then: two sums under one row would show their difference.
    """
    number, rows = state.round + 1, memory.rows
    if rows is None:
        raise RunError("expected a checkpoint that names the drawing of its noise, got none; restore a backup")
    total, _ = clipped_sum(contributions, sum(value.size for value in state.model.values()), memory.clip)
    model = model_digest((name, "float32", value.shape, write_float32(value)) for name, value in state.model.items())
    fields: dict[str, str | int | float] = {
        "job": job.id,
        "round": number,
        "plan": job.plan.digest(),
        "drawing": rows.identity,
        "cohort": ",".join(map(str, memory.cohort)),
    }
    released = noise.release(number, total, request_digest(fields, model))
    memory.rows = dataclasses.replace(rows, row=noise.mark.row, digest=noise.mark.digest)
    return Aggregate(mean_of(released, job.plan), memory.clip)


def _tell(job: Job, state: State, memory: Central, model: torch.nn.Module) -> dict[str, Any]:
    """Evaluates the stored model and writes the round's line and receipts; returns the line."""
    pending = memory.pending or {}
    line: dict[str, Any] = pending["line"]
    if line["round"] % job.evaluate_every == 0 or line["round"] == job.plan.rounds:
        line["metrics"] = evaluate(job, model, state.model)
    write_lines(job.folder / RECEIPTS, pending["receipts"])
    write_lines(job.folder / METRICS, [json.dumps(line)])
    state.lines[METRICS] = state.lines.get(METRICS, 0) + 1
    state.lines[RECEIPTS] = state.lines.get(RECEIPTS, 0) + len(pending["receipts"])
    memory.pending = None
    return line


def _flat(update: Arrays, model: Arrays) -> Vector:
    """Returns an update as one vector, float32 ``(P,)``, in the order of the model."""
    parts = [update[name].reshape(-1) for name in model]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _bit(update: Arrays) -> float:
    return float(update[BIT][0]) if BIT in update else 0.0


def _moved(model: Arrays, mean: Vector) -> Arrays:
    """Returns the model moved by a flat vector."""
    moved, start = {}, 0
    for name, value in model.items():
        moved[name] = value + mean[start : start + value.size].reshape(value.shape)
        start += value.size
    return moved
