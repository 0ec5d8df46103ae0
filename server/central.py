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

A reply that is late, missing, declined or malformed adds nothing; noise and divisor stay. A job plays all its rounds,
also those that nobody answers: to stop early would tell about coins.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.serverapp import Grid

from privacy import central
from privacy.central import BIT, Contribution, Vector
from privacy.ledger import Receipt
from privacy.plan import require
from privacy.wire import model_digest
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
from server.checkpoint import Central, State, save


def check_job(job: Job) -> None:
    """Refuses a job whose public constants are not the plan's.

    Raises:
        PlanError: The divisor is not the expected cohort of these clients.
    """
    expected = job.plan.client_rate * job.nodes
    require(
        abs(job.plan.expected_batch - expected) <= 1e-9 * expected,
        f"expected the divisor client rate x clients = {expected:g}, got {job.plan.expected_batch:g}; settle anew",
    )


def is_pending(state: State) -> bool:
    """Says whether a round's model is stored and its line is not written yet."""
    return state.central is not None and state.central.pending is not None


def one_round(job: Job, grid: Grid, state: State, model: torch.nn.Module) -> dict[str, Any]:
    """Plays one round, or tells the one that a crash left untold. Advances ``state``; returns the round's line.

    Guarantees:
        Once: whatever is killed when, one cohort is asked for a round, and one noised model of it is ever used.
    """
    began = time.perf_counter()
    memory = state.central = state.central or Central(clip=float(job.plan.l2_clip))
    if memory.pending is None:
        cohort = _cohort(job, grid, state, memory)
        _release(job, grid, state, memory, cohort)
        memory.pending["line"]["seconds"] = time.perf_counter() - began  # type: ignore[index]
        # Keep: from here on this is the round's model, and everything that follows is post-processing of it.
        save(state, job.folder / CHECKPOINT)
    return _tell(job, state, memory, model)


def _cohort(job: Job, grid: Grid, state: State, memory: Central) -> list[int]:
    """Returns the round's cohort; drawn once, and on disk when it is first returned."""
    number = state.round + 1
    if memory.round != number:
        nodes = sorted(grid.get_node_ids())
        memory.cohort = central.draw_cohort(nodes, memory.counted, job.plan, job.sources("cohort", number))
        memory.round = number
        for node in memory.cohort:
            memory.counted[node] = memory.counted.get(node, 0) + 1
        save(state, job.folder / CHECKPOINT)
    return memory.cohort


def _release(job: Job, grid: Grid, state: State, memory: Central, cohort: Sequence[int]) -> None:
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
    # In the order of the nodes: float addition does not commute with the order in which replies came.
    replies = [updates[node] for node in sorted(updates)]
    size = sum(value.size for value in state.model.values())
    released = central.aggregate(
        [Contribution(_flat(update, state.model), _bit(update)) for update, _ in replies],
        size,
        job.plan,
        memory.clip,
        job.sources("noise", number),
    )
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
    tested = any(receipt.test for _, receipt in replies)
    line["epsilon"] = None if tested else max(state.spent.values(), default=None)
    state.round, state.declined, memory.clip = number, sorted(declined), released.clip
    receipts = [countersign(job.identity, receipt) for _, receipt in replies]
    memory.pending = {"line": line, "receipts": receipts}


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
