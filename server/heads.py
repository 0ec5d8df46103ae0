"""Published heads: from a run's checkpoint to what an inference service may evaluate, and what it says of it.

A querier can learn a linear head: so many answers as it has features determine it, and one answer already tells much
(guarantee G23). What protects the people whose records trained it is therefore nothing that happens here but how it was
trained. So a head is published only where the run's own report, checked line by line, says a finite epsilon for exactly
the model in the checkpoint. Anything else is refused, unless the operator insists; then every client is told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from models.catalog import find_task
from models.head import Split, split
from models.shape import Shape
from models.task import Task
from privacy.asking import Offer
from privacy.errors import PlanError, RunError
from privacy.identity.authority import valid_name
from privacy.vault.keys import Opener
from privacy.verify import Result, passed, verify_files
from server.checkpoint import State, load
from server.evaluator import Loaded

# Guarantee G24 asks for ten at least.
_FEATURE_BITS: Final = (10, 11, 12)
_NO_GUARANTEE: Final = "No privacy guarantee: the operator published this head though no report vouches for it."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """How a head may be asked.

    Attributes:
        queries: Most queries of one session, and of one secret key (guarantee G25).
        session_s: Most seconds of one session.
        rate: Queries a second that one client may ask, on average.
        allowance: Queries that one client may ask of the head, ever; sessions are charged to it when they are opened.
        feature_bits: Bits of a feature's integer; 0 for as many, from 10 to 12, as cost no byte more than 10.
        weight_bits: Bits of a weight's.
        scheme: "exact" for integers, "float" for floating point.
        hide_weights: Whether answers are flooded, so that they tell the logits and nothing else; slower and larger.
    """

    queries: int = 1000
    session_s: int = 3600
    rate: float = 50.0
    allowance: int = 100_000
    feature_bits: int = 0
    weight_bits: int = 10
    scheme: str = "exact"
    hide_weights: bool = False

    def __post_init__(self) -> None:
        if not (1 <= self.queries <= 1_000_000 and 1 <= self.session_s <= 30 * 86400):
            raise PlanError(
                f"expected a session of 1 to 1,000,000 queries and 1 s to 30 days, got {self.queries} and "
                f"{self.session_s} s; choose others"
            )
        if not (0 < self.rate <= 1e6 and math.isfinite(self.rate)) or self.allowance < 1:
            raise PlanError(
                f"expected a rate and an allowance above 0, got {self.rate:g} and {self.allowance}; revoke a client "
                "who may not ask"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Published:
    """A head that may be asked.

    Attributes:
        offer: What clients are told.
        loaded: What the evaluator needs.
        terms: How it may be asked.
        split: The model's parts.
    """

    offer: Offer
    loaded: Loaded
    terms: Terms
    split: Split


def publish(
    folder: Path,
    *,
    shape: Shape,
    classes: Sequence[str],
    prepare: Mapping[str, Any],
    secret: bytes,
    name: str = "",
    terms: Terms | None = None,
    feature_range: float | None = None,
    keys: Sequence[Opener] = (),
    signer: str = "",
    force: bool = False,
) -> Published:
    """Publishes the head of a run's newest checkpoint.

    Args:
        folder: The run folder, simulated or deployed.
        shape: Public shape of a record.
        classes: Names of the classes, in their order.
        prepare: How a file becomes a record, for clients.
        secret: Of the server, 32 bytes: versions of a head are told apart under it.
        name: Of the head; the task's by default.
        terms: How it may be asked.
        feature_range: No feature is larger in absolute value; by default what the layers promise.
        keys: What opens a sealed checkpoint.
        signer: Public key that the run's report must be signed with; empty where the run has one of its own.
        force: Publishes a head that no report vouches for too; clients are told.

    Raises:
        RunError: The folder is no run folder, or its report does not vouch for the model (guarantee G23).
        PlanError: The model has no linear head over frozen features, or its weights exceed what the plan can hold.
        VaultError: The checkpoint is sealed, and does not open.
    """
    terms = terms or Terms()
    config = _json(folder / "config.json")
    state = load(folder / "checkpoints" / "latest.ckpt", keys)
    privacy = privacy_of(folder, state, signer=signer, force=force)
    try:
        task = find_task(str(config["task"]))
        seed = int(config["seed"])
    except (LookupError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"expected the task and seed of a run in {folder / 'config.json'}, got none: {error}") from None
    parts = split_of(task, shape, seed, state)
    bound = feature_range if feature_range is not None else parts.bound
    if bound is None or not (math.isfinite(bound) and bound > 0):
        raise PlanError(
            f"expected a bound on the features of task {task.name!r}, which its layers do not give, got {bound}; "
            "give --feature-range"
        )
    loaded, description, plan = planned(parts, terms, float(bound))
    numbers = np.concatenate((parts.weights.ravel(), parts.bias)).astype("<f8").tobytes()
    offer = Offer(
        name=valid_name(name or task.name.partition(":")[0].replace(".", "-")),
        task=str(config["task"]),
        seed=seed,
        inputs=shape.inputs,
        classes=tuple(classes),
        features=parts.digest,
        feature_range=float(bound),
        prepare=prepare,
        description=description,
        plan=str(plan.digest),
        query_bytes=int(plan.query_bytes),
        answer_bytes=int(plan.answer_bytes),
        model=hmac.new(secret, b"tacit/infer/model/1\n" + numbers, hashlib.sha256).hexdigest(),
        privacy=privacy,
        job=state.job,
        round=state.round,
        queries=terms.queries,
        session_s=terms.session_s,
        rate=terms.rate,
    )
    if len(offer.classes) != shape.classes:
        raise PlanError(f"expected a name for each of {shape.classes} classes, got {len(offer.classes)}")
    try:
        # One that clients refuse would cost them the whole list.
        Offer.parse(offer.fields())
    except (ValueError, TypeError, KeyError) as error:
        raise PlanError(f"expected a head that clients can read, got one that they refuse: {error}") from None
    return Published(offer, loaded, terms, parts)


def split_of(task: Task, shape: Shape, seed: int, state: State) -> Split:
    """Returns the model of a checkpoint, taken apart; its frozen parts are those that the task makes from the seed.

    Raises:
        PlanError: It has no linear head over frozen features.
        RunError: The checkpoint is of another model.
    """
    model = task.fresh(shape, seed)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    there = {name: tuple(value.shape) for name, value in state.model.items()}
    if there != {name: tuple(value.shape) for name, value in trained.items()}:
        raise RunError(
            f"expected the parameters of task {task.name!r} in the checkpoint, got others; was the task changed since?"
        )
    with torch.no_grad():
        for name, value in state.model.items():
            if not np.isfinite(value).all():
                raise RunError("expected finite parameters in the checkpoint, got NaN or infinity; train it again")
            trained[name].copy_(torch.from_numpy(value))
    try:
        return split(model, shape, task.features)
    except ValueError as error:
        raise PlanError(str(error)) from None


def privacy_of(folder: Path, state: State, *, signer: str = "", force: bool = False) -> dict[str, Any]:
    """Returns what a run's report promises about the model of a checkpoint (guarantee G23).

    The report is checked as ``tacit verify`` does: signatures, receipts, every epsilon anew. It must be of the same
    job, name these very numbers, and tell of exactly the rounds that the model saw, and its headline must be finite.

    Args:
        folder: The run folder.
        state: Its checkpoint.
        signer: Public key that must have signed the report; empty for any.
        force: Returns words that there is no guarantee, where there is none.

    Raises:
        RunError: The report does not vouch for the model, and ``force`` is not given.
    """
    try:
        return _vouched(folder, state, signer)
    except RunError:
        if force:
            return {"guarantee": False, "words": _NO_GUARANTEE}
        raise


def _vouched(folder: Path, state: State, signer: str) -> dict[str, Any]:
    remedy = (
        "a querier can learn a linear head, so it must have been trained with differential privacy; write the report "
        "(tacit report RUN), or publish it without any guarantee (--force-unprotected)"
    )
    report = _json(folder / "report.json")
    checks = verify_files([folder / "report.json", folder / "receipts.jsonl"], [signer] if signer else [])
    if not passed(checks):
        failed = next((check for check in checks if check.result is Result.FAILS), None)
        why = f"{failed.name}: {failed.words}" if failed else "nothing to check"
        raise RunError(f"expected a report that holds in {folder}, got one that does not ({why}); {remedy}")
    try:
        if signer and report["signature"]["public_key"] != signer:
            raise RunError(f"expected a report signed by this server in {folder}, got another's; {remedy}")
        job, rounds, headline = report["run"]["job"], report["rounds"], report["headline"]
        epsilon, delta = headline["epsilon"], headline["delta"]
        last = max((int(line["round"]) for line in rounds), default=0)
        model, simulated = report["run"].get("model"), "simulation_only" in report
        words, unit = str(headline["sentence"]), str(headline["unit"])
    except (KeyError, TypeError, ValueError):
        raise RunError(f"expected a whole report in {folder}, got a damaged one; {remedy}") from None
    if job != state.job or last != state.round:
        raise RunError(
            f"expected a report of the model of round {state.round} in {folder}, got one of another job or of round "
            f"{last}; {remedy}"
        )
    if model != state.digest:
        raise RunError(
            f"expected the model that the report in {folder} is of ({str(model)[:16] or 'none'}...), got another one "
            f"({state.digest[:16]}...); {remedy}"
        )
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not math.isfinite(epsilon):
        raise RunError(f"expected a finite epsilon in the report of {folder}, got {epsilon!r}; {remedy}")
    if simulated:
        words = f"Of a simulation on one machine, whose operator holds every key: {words}"
    return {"guarantee": True, "unit": unit, "epsilon": float(epsilon), "delta": float(delta), "words": words}


def planned(parts: Split, terms: Terms, bound: float) -> tuple[Loaded, bytes, Any]:
    """Plans and loads a head in this process, which holds the weights anyway; queries are parsed elsewhere.

    Args:
        parts: The model.
        terms: Precision, scheme and whether weights are hidden.
        bound: No feature is larger in absolute value.

    Returns:
        What the evaluator needs, what clients need, and the plan.

    Raises:
        PlanError: No safe parameters carry such a head, or its numbers break a bound (guarantee G24).
    """
    from privacy.he import EncryptedHead, HeadPlan, Scheme, plan_head

    classes, features = parts.weights.shape

    def of(bits: int) -> HeadPlan:
        return plan_head(
            features=features,
            classes=classes,
            batch=1,
            feature_bits=bits,
            weight_bits=terms.weight_bits,
            scheme=Scheme(terms.scheme),
            hide_weights=terms.hide_weights,
        )

    plan = of(terms.feature_bits or _FEATURE_BITS[0])
    for bits in () if terms.feature_bits else _FEATURE_BITS[1:]:
        with contextlib.suppress(PlanError):
            finer = of(bits)
            if (finer.query_bytes, finer.answer_bytes) == (plan.query_bytes, plan.answer_bytes):
                plan = finer
    head = EncryptedHead.load(plan, parts.weights, parts.bias, (-bound, bound))
    loaded = Loaded(plan.to_bytes(), parts.weights, parts.bias, bound)
    return loaded, head.public.to_bytes(), plan


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"expected {path.name} in {path.parent}, got {error.strerror}; is it a run folder?") from None
    except ValueError:
        raise RunError(f"expected JSON in {path}, got something else; restore a backup") from None
