"""Audits: attacks and probes that try to contradict what the rest of this package promises.

An audit runs on public or synthetic records only; whoever calls it sees to that (guarantee G18). None of them makes a
release of private data, so none is charged. Where a probe has to see what noise would hide, it asks the same trainer,
with the same production randomness, for almost no noise: no source without noise exists outside the tests.

What may be told to others (`report_evidence`) are the lower bounds of canaries alone. What a probe without noise saw,
and what membership inference found, stays with the holder.

Probes are tests of distributions, so they can be wrong: each comparison is made at six standard deviations or at
p = 1e-9, so that all of them together raise a false alarm in fewer than one of 10^5 audits. A lower bound is wrong with
at most the stated probability; the tightest one, `many_runs`, is therefore stated at 99 % and not at 95 %.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from privacy import central
from privacy.accounting import Event, Grant, best_order, pld_epsilon, repeated, solve_noise
from privacy.bounds import (
    CosineEstimate,
    OneRunBound,
    clopper_pearson_epsilon,
    clopper_pearson_mu,
    cosine_estimate,
    gaussian_epsilon,
    one_run_bound,
)
from privacy.dpsgd import AugmentFn, LossFn, MakeBatch, PrivateTrainer, probe, supported_modes
from privacy.errors import PlanError, TacitError
from privacy.ledger import Account, Book, ChargeRequest, Receipt
from privacy.noise import Keystream, RandomSource
from privacy.plan import Local, Mode, Optimizer, Plan, require
from privacy.report import TOLD

__all__ = [
    "Finding",
    "Subject",
    "accountant_probe",
    "canary_clients",
    "ledger_check",
    "many_runs",
    "membership_inference",
    "neighbour_probe",
    "noise_probe",
    "one_run_clients",
    "one_run_examples",
    "one_run_gradients",
    "poisson_probe",
    "report_evidence",
    "sensitivity_probe",
    "server_clip_probe",
    "server_noise_probe",
]

EVIDENCE_SCHEMA: Final = "tacit-audit/1"

# Two-sided: a standard normal is beyond it once in 5e8; see the module's text.
_DEVIATIONS: Final = 6.0
_SMALLEST_P: Final = 1e-9
# So little noise that a clipped record shows; still drawn by the production source.
_ALMOST_NONE: Final = 1e-6
# A canary's gradient before clipping, in units of the clip: without clipping it would stand out by as much.
_LOUD: Final = 8.0
_NUMBERS_KEPT: Final = 2**20
# Float64 gradients of all example canaries are held at once: half a gigabyte.
_GRADIENTS_HELD: Final = 2**26
_FLAT: Final = Local(optimizer=Optimizer.SGD, lr=1.0)

Sources: TypeAlias = Callable[[], RandomSource]
"""Makes the randomness of one release, fresh every time."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """What is audited: this program's trainer, under one plan, on one task's model and loss.

    Attributes:
        model: The task's model.
        loss: Per-example loss.
        make_batch: Makes synthetic public records.
        plan: The plan of the job.
        augment: Random views of one record, or None.
        device: Where gradients are computed.
        sources: Randomness of one release; what is audited is the default, or what the client uses.
    """

    model: nn.Module
    loss: LossFn
    make_batch: MakeBatch
    plan: Plan
    augment: AugmentFn | None = None
    device: str = "cpu"
    sources: Sources = Keystream

    def trainer(self, **changes: Any) -> PrivateTrainer:
        """Returns the trainer of the task's own model, under the plan with changes."""
        plan = dataclasses.replace(self.plan, **changes)
        return PrivateTrainer(self.model, self.loss, plan=plan, local=_FLAT, augment=self.augment, device=self.device)

    def directions(self, count: int, **changes: Any) -> tuple[PrivateTrainer, Tensor, Tensor]:
        """Returns a trainer whose records have known, orthogonal gradients, and ``count`` such records.

        The model is linear with one output, which is also the loss: the gradient of record i is its input, 8 clips
        long and along axis i, whatever the weights are. Mode, clip, sampling, noise and divisor are the plan's.

        Returns:
            The trainer, inputs ``(count, count)`` and targets ``(count,)``.
        """
        plan = dataclasses.replace(self.plan, **{"views": 1, **changes})
        # Drawing initial weights would move torch's global generator, which is the caller's.
        model = nn.Linear(count, 1, bias=False, device="meta").to_empty(device="cpu")
        nn.init.zeros_(model.weight)
        trainer = PrivateTrainer(model, _first_output, plan=plan, local=_FLAT, device=self.device)
        return trainer, _LOUD * plan.l2_clip * torch.eye(count), torch.zeros(count, dtype=torch.int64)

    def release(self, trainer: PrivateTrainer, inputs: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
        """Returns one round's release as the sum of its steps' noised means, float64 ``(P,)``.

        The round starts at zero with learning rate 1, so nothing is lost to rounding; a gradient that depends on the
        weights is taken along.
        """
        valid = torch.ones(len(inputs), dtype=torch.bool) if valid is None else valid
        start = torch.zeros(trainer.size)
        return -trainer.train(start, inputs, targets, valid, self.sources(), lr=1.0).double()


def _first_output(output: Tensor, target: Tensor) -> Tensor:
    return output[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What one audit found.

    Attributes:
        audit: Name of the audit.
        holds: Whether nothing contradicts the promise.
        line: The verdict in one sentence.
        figures: JSON-able figures behind it.
        stays: Whether it stays with the holder (guarantee G18); only canary bounds do not.
        estimate: Whether it is a figure without confidence, which can neither hold nor fail: it proves nothing.
    """

    audit: str
    holds: bool
    line: str
    figures: Mapping[str, Any]
    stays: bool = True
    estimate: bool = False

    @property
    def word(self) -> str:
        """The verdict in one word: an estimate is never a pass."""
        if not self.holds:
            return "FAILS"
        return "estimate" if self.estimate else "holds"


# Probes ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sensitivity_probe(subject: Subject) -> Finding:
    """Adds and replaces one record without noise, in every mode the model allows: the sum moves by at most C, or 2 C.

    Hostile records included (huge, infinite, NaN), at the plan's clip and at a thousandth of it, where every gradient
    is clipped; and once with records whose gradient is 8 clips long by construction.
    """
    plan = subject.plan
    modes = supported_modes(subject.model, plan.views)
    moved = {}
    try:
        for mode in modes:
            for l2_clip in (plan.l2_clip, max(plan.l2_clip / 1024, 2.0**-40)):
                probe(
                    subject.model,
                    subject.loss,
                    subject.make_batch,
                    mode=mode,
                    l2_clip=l2_clip,
                    physical_batch=plan.physical_batch,
                    views=plan.views,
                    augment=subject.augment,
                    device=subject.device,
                )
            moved[mode.value] = max(_largest_move(subject, mode), _loud_move(subject, mode))
    except PlanError as error:
        return Finding(audit="sensitivity", holds=False, line=str(error), figures={"modes": [*map(str, modes)]})
    most = max(moved.values())
    return Finding(
        audit="sensitivity",
        holds=most <= 1 + 1e-5,
        line=f"adding one record moves the clipped sum by at most {most:.4f} C in {', '.join(moved)}",
        figures={"moved_in_clips": moved},
    )


def _largest_move(subject: Subject, mode: Mode) -> float:
    """Returns the largest move of the clipped sum by one added record of the task, in clips."""
    trainer = subject.trainer(mode=mode)
    inputs, targets = subject.make_batch(9)
    everyone, last = torch.ones(9, dtype=torch.bool), torch.arange(9) == 8
    before = trainer.clipped_sum(inputs, targets, everyone & ~last)
    most = 0.0
    for scale in (1.0, 1e3, 3e38, math.inf, math.nan) if inputs.is_floating_point() else (1.0,):
        changed = inputs.clone()
        changed[8] = changed[8] * scale if scale < 1e38 else torch.full_like(changed[8], scale)
        after = trainer.clipped_sum(changed, targets, everyone)
        most = max(most, _norm(after - before) / subject.plan.l2_clip)
    return most


def _loud_move(subject: Subject, mode: Mode) -> float:
    """Returns the move of the clipped sum by one added record whose gradient is 8 clips long, in clips."""
    trainer, inputs, targets = subject.directions(16, mode=mode)
    everyone = torch.ones(16, dtype=torch.bool)
    without = everyone.clone()
    without[3] = False
    difference = trainer.clipped_sum(inputs, targets, everyone) - trainer.clipped_sum(inputs, targets, without)
    return _norm(difference) / subject.plan.l2_clip


def _norm(vector: Tensor) -> float:
    norm = torch.linalg.vector_norm(vector).item()
    return math.inf if math.isnan(norm) else norm


@torch.no_grad()
def noise_probe(subject: Subject, *, numbers: int = 200_000) -> Finding:
    """Trains on no records: what is released must be fresh Gaussian noise of deviation ``sigma C / B`` for each step.

    Catches missing, halved and misscaled noise, noise of another shape, and noise that is used twice: in two steps of a
    round (the deviation grows), or in two releases (they are correlated).

    Args:
        subject: What is audited; a model of under 256 parameters is replaced by a linear one.
        numbers: At least how many numbers are drawn.
    """
    plan = subject.plan
    trainer = subject.trainer()
    empty = subject.make_batch(1)
    if trainer.size < 256:
        trainer, *empty = subject.directions(1024)  # type: ignore[assignment]
    inputs, targets = empty[0][:0], empty[1][:0]
    count = max(8, math.ceil(numbers / trainer.size))
    # Of a very large model every so many numbers are kept: eight whole releases need not fit in memory.
    stride = math.ceil(trainer.size / _NUMBERS_KEPT)
    drawn = torch.stack([subject.release(trainer, inputs, targets)[::stride].clone() for _ in range(count)])
    wanted = plan.noise_multiplier * plan.l2_clip / plan.expected_batch * math.sqrt(plan.steps)
    return _judge_noise("noise", drawn, wanted)


def _judge_noise(name: str, drawn: Tensor, wanted: float) -> Finding:
    """Compares releases without a record, float64 ``(R, P)``, with fresh Gaussian noise of a deviation."""
    from scipy import stats

    flat = (drawn / wanted).flatten().numpy()
    faults = []
    measured = float(flat.std())
    error = (measured - 1) * math.sqrt(2 * flat.size)
    if not abs(error) <= _DEVIATIONS:
        faults.append(f"its deviation is {measured:.4g} of sigma C / B")
    mean = float(flat.mean()) * math.sqrt(flat.size)
    if not abs(mean) <= _DEVIATIONS:
        faults.append(f"its mean is {mean:.1f} standard errors from zero")
    excess = 0.0
    p_value = 1.0
    if measured > 0:
        shape = (flat - flat.mean()) / measured
        excess = float((shape**4).mean() - 3)
        p_value = float(stats.kstest(shape[:: max(1, shape.size // 100_000)], "norm").pvalue)
        if not abs(excess) * math.sqrt(flat.size / 24) <= _DEVIATIONS or p_value < _SMALLEST_P:
            faults.append(f"it is not Gaussian (excess kurtosis {excess:.3g})")
    repeat = _closest_pair(drawn[:64])
    if repeat < _SMALLEST_P:
        faults.append("the noise of one release comes back in another")
    return Finding(
        audit=name,
        holds=not faults,
        line=f"expected fresh Gaussian noise of deviation sigma C / B, but {'; '.join(faults)}"
        if faults
        else f"fresh Gaussian noise of {measured:.4f} times the stated deviation in {len(drawn)} releases",
        figures={"deviation": measured, "excess_kurtosis": excess, "normality_p": p_value, "repeat_p": repeat},
    )


def _closest_pair(rows: Tensor) -> float:
    """Returns the p-value of the most correlated pair of releases, rows ``(R, P)``, corrected for all pairs."""
    from scipy import stats

    count, length = rows.shape
    centred = rows - rows.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(centred, dim=1)
    if not bool((norms > 0).all()):
        return 0.0
    unit = centred / norms[:, None]
    correlation = (unit @ unit.T).fill_diagonal_(0.0).abs().max().item()
    freedom = length - 2
    t = correlation * math.sqrt(freedom / max(1e-300, 1 - min(correlation, 1.0) ** 2))
    return min(1.0, float(2 * stats.t.sf(t, freedom)) * count * (count - 1) / 2)


@torch.no_grad()
def neighbour_probe(subject: Subject) -> Finding:
    """Trains with N and with N + 1 records: the divisor, the steps and the noise's scale must not notice.

    With every record in every step, each record's direction carries ``steps * C / B`` in the release, however many
    other records there are. With records that contribute nothing, the noise's deviation is the same for any number.
    """
    plan = subject.plan
    faults, shares = [], {}
    trainer, inputs, targets = subject.directions(64, sample_rate=1.0, noise_multiplier=_ALMOST_NONE)
    for count in (40, 41):
        release = subject.release(trainer, inputs[:count], targets[:count])
        share = release[:count] * plan.expected_batch / (plan.l2_clip * plan.steps)
        shares[str(count)] = float(share.mean())
        if not bool(((share - 1).abs() < 1e-3).all()):
            faults.append(f"with {count} records one weighs {float(share.mean()):.4g} times C / B a step")
    noisy, inputs, targets = subject.directions(1024)
    wanted = plan.noise_multiplier * plan.l2_clip / plan.expected_batch * math.sqrt(plan.steps)
    deviations = {}
    for count in (0, 1, 257):
        none = torch.zeros(count, dtype=torch.bool)
        drawn = torch.stack([subject.release(noisy, inputs[:count], targets[:count], none) for _ in range(16)])
        deviations[str(count)] = float(drawn.std(correction=0)) / wanted
        if not abs(deviations[str(count)] - 1) * math.sqrt(2 * drawn.numel()) <= _DEVIATIONS:
            faults.append(f"with {count} empty records the noise is {deviations[str(count)]:.4g} of what is stated")
    return Finding(
        audit="neighbours",
        holds=not faults,
        line=f"expected the same constants for N and N + 1 records, but {'; '.join(faults)}"
        if faults
        else "N and N + 1 records meet the same divisor, number of steps and noise",
        figures={"weight_of_a_record": shares, "noise_deviation": deviations},
    )


@torch.no_grad()
def poisson_probe(subject: Subject, *, records: int = 256, rounds: int = 256) -> Finding:
    """Counts how often each record is sampled: independent coins at the public rate, fresh for each step and record.

    Catches batches of fixed size, shuffled epochs, everyone in every step, and a sample that is used twice: each has
    counts that vary too little, too much, or together.

    Args:
        subject: What is audited.
        records: How many records are watched.
        rounds: How many rounds, each of two steps (of one, where the plan has one).
    """
    # All steps of a round are alike; two show whether a round's sample is drawn anew in each.
    plan = dataclasses.replace(subject.plan, steps=min(subject.plan.steps, 2))
    trainer, inputs, targets = subject.directions(records, noise_multiplier=_ALMOST_NONE, steps=plan.steps)
    seen = torch.stack([subject.release(trainer, inputs, targets) for _ in range(rounds)])
    exact = seen * plan.expected_batch / plan.l2_clip
    counts = exact.round()
    rate, steps = plan.sample_rate, plan.steps
    faults: list[str] = []
    deviations: dict[str, float] = {}
    if not bool(((exact - counts).abs() < 0.02 * steps).all()):
        faults.append("records weigh other than C / B, so that samples cannot be counted")
    if rate >= 1:
        if not bool((counts == steps).all()):
            faults.append("not every record is in every step, although the rate is 1")
    else:
        centred = (counts - steps * rate).numpy()
        variance = steps * rate * (1 - rate)
        total = rounds * records
        deviations["rate"] = float(centred.sum() / math.sqrt(total * variance))
        deviations["batch sizes"] = _dispersion(centred.sum(1), records * steps, rate)
        deviations["records' counts"] = _dispersion(centred.sum(0), rounds * steps, rate)
        deviations["counts in a round"] = _dispersion(centred.ravel(), steps, rate) if steps > 1 else 0.0
        both = (centred[1:] * centred[:-1]).sum() / variance
        deviations["rounds in a row"] = float(both / math.sqrt((rounds - 1) * records))
        faults += [
            f"{name} are {value:+.1f} standard deviations from independent coins"
            for name, value in deviations.items()
            if not abs(value) <= _DEVIATIONS
        ]
    found = float(counts.mean()) / steps
    return Finding(
        audit="poisson",
        holds=not faults,
        line=f"expected independent coins at rate {rate:g}, but {'; '.join(faults)}"
        if faults
        else f"{rounds * steps} samples of {records} records match independent coins: rate {found:.4f} for {rate:g}",
        figures={"rate": found, "deviations": deviations},
    )


def _dispersion(centred: np.ndarray, trials: int, rate: float) -> float:
    """Returns by how many standard deviations centred binomial counts vary more than they should."""
    variance = trials * rate * (1 - rate)
    # The square of a standardised binomial has variance 2 + (1 - 6 q (1 - q)) / variance.
    spread = 2 + (1 - 6 * rate * (1 - rate)) / variance
    # A single coin that is fair squares to a constant: there is nothing to vary.
    if spread < 1e-9:
        return 0.0
    return float(((centred**2 / variance).sum() - centred.size) / math.sqrt(centred.size * spread))


def accountant_probe(plan: Plan, folder: Path, *, rounds: int = 3) -> Finding:
    """Charges two jobs in a ledger that is closed in between; what it has spent must cover all of it, by another price.

    Catches an accountant that starts anew with each run or process, or that prices rounds instead of steps: the RDP
    filter's spend is compared with dp-accounting's loss distribution of the *whole* history.

    Args:
        plan: The plan of the job.
        folder: An empty folder for the ledger.
        rounds: Rounds charged in each of the two jobs, at most ``plan.joins``.
    """
    rounds = min(rounds, plan.joins)
    one = Event.all_of_round(plan)
    whole = repeated(one, 2 * rounds)
    order, price = best_order(whole, plan.delta)
    if not math.isfinite(price):
        return Finding(
            audit="accountant", holds=True, line="there is no budget to keep: the plan protects nothing", figures={}
        )
    grant = Grant(epsilon=2 * price + 10, delta=plan.delta, order=order, records_bound=plan.records_bound)
    spent: list[float] = []
    # What is spent may not depend on who reads it: receipts, this process, and one that opens the book later.
    said: list[float] = []
    for job in ("a" * 32, "b" * 32):
        with Book(folder) as book:
            if job[0] == "a":
                book.grant({"audited": grant}, population="an audit")
            for round in range(1, rounds + 1):
                request = ChargeRequest(name="audited", job=job, round=round, request=os.urandom(32).hex(), plan=plan)
                outcome = book.charge([request])[0]
                if not isinstance(outcome, Receipt):
                    return Finding(
                        audit="accountant",
                        holds=False,
                        line=f"expected a charge within the budget to be admitted, got {outcome.value!r}",
                        figures={"spent": spent},
                    )
                spent.append(outcome.spent)
                said.append(book.accounts["audited"].spent)
    with Book(folder) as book:
        said.append(book.accounts["audited"].spent)
    faults = []
    if any(later <= earlier for earlier, later in itertools.pairwise(spent)):
        faults.append("the spend does not grow with every charge")
    if not all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip([*spent, spent[-1]], said, strict=True)):
        faults.append("receipts and ledger say different things")
    prices = {}
    for charges in sorted({1, rounds, 2 * rounds}):
        prices[str(charges)] = tight = pld_epsilon(repeated(one, charges), plan.delta)
        # Loss distributions are rounded up to 3e-4 a step at most.
        if min(spent[charges - 1], said[charges - 1]) < tight - 3e-4 * charges * sum(event.steps for event in one):
            faults.append(f"after {charges} charges {spent[charges - 1]:.4g} is spent, which in truth cost {tight:.4g}")
    return Finding(
        audit="accountant",
        holds=not faults,
        line=f"expected the ledger to count everything, but {'; '.join(faults)}"
        if faults
        else f"after {2 * rounds} charges in two jobs the ledger counts {spent[-1]:.3f}, "
        f"the second accountant {prices[str(2 * rounds)]:.3f}",
        figures={"spent": spent, "second_accountant": prices},
    )


def ledger_check(accounts: Sequence[Account]) -> Finding:
    """Prices every account's whole history by the second accountant; none may have spent less than that.

    Args:
        accounts: Accounts of an open book.
    """
    prices: dict[tuple[tuple[Event, ...], float], float] = {}
    short = []
    for account in accounts:
        jobs = [job for _, job in sorted(account.jobs.items()) if job.charges]
        history = tuple(event for job in jobs for event in repeated(job.events, job.charges))
        if not history:
            continue
        key = (history, account.grant.delta)
        if key not in prices:
            # Where next to nothing is protected, loss distributions take minutes, for a figure nobody needs.
            loose = best_order(history, account.grant.delta)[1]
            prices[key] = pld_epsilon(history, account.grant.delta) if loose <= 100 else 0.0
        if account.spent < prices[key] - 3e-4 * sum(event.steps for event in history):
            short.append(account.name)
    charged = sum(account.charges > 0 for account in accounts)
    return Finding(
        audit="ledgers",
        holds=not short,
        line=f"expected ledgers that count everything, got {len(short)} that spent less than they charged: {short[0]}"
        if short
        else f"{charged} ledgers count at least what a second accountant makes of their whole history",
        figures={"ledgers": charged, "histories": len(prices), "short": len(short)},
    )


# Canaries ------------------------------------------------------------------------------------------------------------


def _low_epsilon(plan: Plan, *, epsilon: float, rounds: int, **changes: Any) -> Plan:
    """Returns the plan's own mechanism at a low epsilon: there an audit of a thousand guesses can contradict it."""
    rate, steps = changes.get("sample_rate", plan.sample_rate), changes.get("steps", plan.steps)
    noise, _ = solve_noise(epsilon=epsilon, delta=plan.delta, sample_rate=rate, steps=steps * rounds)
    return dataclasses.replace(plan, noise_multiplier=noise, epsilon=epsilon, rounds=rounds, joins=rounds, **changes)


@torch.no_grad()
def one_run_gradients(
    subject: Subject,
    *,
    canaries: int = 1000,
    epsilon: float = 2.0,
    rounds: int = 8,
    sampled: bool = True,
    significance: float = 0.05,
) -> Finding:
    """Audits several rounds of the trainer in one run, with gradient canaries, against whoever sees every release.

    Each canary is a record whose gradient is a known direction, 8 clips long, in the data set or not by a fair secret
    coin of its own. The attacker knows all canaries and sees the model after every round. Two attacks: *sum* adds up
    what the releases say along a canary's direction; *change* asks how much that varies from round to round, which
    shows who is in at once if two releases share their noise.

    Args:
        subject: What is audited; its plan's noise is replaced by what the lower epsilon needs.
        canaries: m.
        epsilon: Of the audited configuration, > 0.
        rounds: Rounds that the attacker sees, >= 2.
        sampled: With the plan's sampling rate; else every record is in every step, and the stronger bound for
            plain Gaussians applies.
        significance: Of all figures together.

    References:
        Steinke, Nasr & Jagielski (2023); Nasr et al. (2023), "Tight auditing of differentially private machine
        learning" (gradient canaries).
    """
    changes = {"views": 1} | ({} if sampled else {"sample_rate": 1.0})
    plan = _low_epsilon(subject.plan, epsilon=epsilon, rounds=rounds, **changes)
    trainer, inputs, targets = subject.directions(canaries, **_fields(plan))
    coins = Keystream().coins(canaries, 0.5)
    releases = torch.stack([subject.release(trainer, inputs[coins], targets[coins]) for _ in range(rounds)]).numpy()
    scores = {"sum": releases.sum(0)} | ({"change": releases.var(0)} if rounds > 1 else {})
    bound = one_run_bound(
        scores, coins.numpy(), delta=plan.delta, significance=significance, gaussian=plan.sample_rate >= 1
    )
    upper = pld_epsilon(Event.of_schedule(plan), plan.delta)
    name = "gradient canaries" if sampled else "gradient canaries, q=1"
    threat = "sees the model after every round, knows every canary and chose its gradient"
    return _bound_finding(name, bound, upper, plan, threat)


@torch.no_grad()
def many_runs(
    subject: Subject, *, trainings: int = 3000, epsilon: float = 2.0, rounds: int = 2, significance: float = 0.01
) -> Finding:
    """Audits many short trainings with one gradient canary each, every record in every step: the tightest audit.

    Each training flips its own coin for its canary; the attacker calls it a member where the releases' sum along its
    direction passes the middle between what a clipped canary leaves and nothing, a threshold fixed in advance.
    Decisions of separate trainings are independent, so both rates have exact confidence limits; and what is claimed is
    a plain Gaussian, so that they bound its separation.

    Args:
        subject: What is audited; its plan's noise is replaced by what the lower epsilon needs.
        trainings: How many, >= 20.
        epsilon: Of the audited configuration, > 0.
        rounds: Rounds of each training, each of one step.
        significance: Of both bounds together; less than elsewhere, because this bound lies close to the truth.

    References:
        Jagielski, Ullman & Oprea (2020); Nasr et al. (2023).
    """
    require(trainings >= 20, f"expected at least 20 trainings, got {trainings}; fewer prove nothing")
    plan = _low_epsilon(subject.plan, epsilon=epsilon, rounds=rounds, views=1, steps=1, sample_rate=1.0)
    trainer, inputs, targets = subject.directions(8, **_fields(plan))
    middle = 0.5 * plan.steps * rounds * plan.l2_clip / plan.expected_batch
    coins = Keystream().coins(trainings, 0.5)
    called = torch.zeros(trainings, dtype=torch.bool)
    for training, inside in enumerate(coins.tolist()):
        seen = sum(subject.release(trainer, inputs[:inside], targets[:inside])[0].item() for _ in range(rounds))
        called[training] = seen > middle
    members = int(coins.sum())
    counts = int((called & coins).sum()), members, int((called & ~coins).sum()), trainings - members
    mu, best = (
        clopper_pearson_mu(*cells, significance=significance / 2)
        for cells in (counts, (members, members, 0, counts[3]))
    )
    rigorous = clopper_pearson_epsilon(*counts, delta=plan.delta, significance=significance / 2)
    lower = max(gaussian_epsilon(mu, plan.delta), rigorous)
    upper = pld_epsilon(Event.of_schedule(plan), plan.delta)
    correct, holds = int((called == coins).sum()), lower <= upper
    top = gaussian_epsilon(best, plan.delta)
    words = f"({correct} of {trainings} guesses right, one canary each, ceiling {top:.2f})"
    return Finding(
        audit="many trainings, q=1",
        holds=holds,
        line=f"{_between(lower, upper)} {words if holds else 'cannot be ' + words}",
        figures={
            "epsilon_lower": lower,
            "epsilon_lower_binomial": rigorous,
            "epsilon_lower_gaussian": gaussian_epsilon(mu, plan.delta),
            "epsilon_upper": upper,
            "delta": plan.delta,
            "canaries": trainings,
            "guesses": trainings,
            "correct": correct,
            "confidence": 1 - significance,
            "tried": 2,
            "ceiling": top,
            "attack": "sum",
            "threat_model": "sees the model after every round, knows the canary and chose its gradient",
            "schedule": f"q=1, sigma={plan.noise_multiplier:.4g}, {plan.steps * rounds} steps",
            "rounds": rounds,
        },
        stays=False,
    )


def _fields(plan: Plan) -> dict[str, Any]:
    return {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}


def _between(lower: float, upper: float) -> str:
    """Returns both bounds in words: from below rounded down, from above rounded up, as everywhere."""
    return f"{math.floor(100 * lower) / 100:.2f} <= epsilon <= {math.ceil(100 * upper - 1e-6) / 100:.2f}"


def _bound_finding(name: str, bound: OneRunBound, upper: float, plan: Plan, threat: str) -> Finding:
    lower = max(bound.epsilon, bound.gaussian)
    holds = lower <= upper
    words = (
        f"({bound.correct} of {bound.guesses} guesses right, {bound.canaries} canaries, ceiling {bound.ceiling:.2f})"
        if holds
        else f"cannot be: {bound.correct} of {bound.guesses} guesses about {bound.canaries} canaries were right"
    )
    schedule = f"q={plan.sample_rate:g}, sigma={plan.noise_multiplier:.4g}, {plan.steps * plan.rounds} steps"
    return Finding(
        audit=name,
        holds=holds,
        line=f"{_between(lower, upper)} {words}",
        figures={
            "epsilon_lower": lower,
            "epsilon_lower_binomial": bound.binomial,
            "epsilon_lower_fdp": bound.fdp,
            "epsilon_lower_gaussian": bound.gaussian if plan.sample_rate >= 1 else None,
            "epsilon_upper": upper,
            "delta": bound.delta,
            "canaries": bound.canaries,
            "guesses": bound.guesses,
            "correct": bound.correct,
            "confidence": bound.confidence,
            "tried": bound.tried,
            "ceiling": bound.ceiling,
            "attack": bound.attack,
            "threat_model": threat,
            "schedule": schedule,
            "rounds": plan.rounds,
        },
        stays=False,
    )


@torch.no_grad()
def one_run_examples(
    subject: Subject,
    *,
    canaries: int = 300,
    epsilon: float = 2.0,
    rounds: int = 8,
    lr: float = 1.0,
    significance: float = 0.05,
) -> Finding:
    """Audits the task's own model in one run, with synthetic examples as canaries.

    Two attackers: one knows only the last model and a canary's loss under it (*black box*); one sees all releases and
    explains their sum by the canaries' clipped gradients at the first model, by the best linear estimate of who took
    part (*white box*). Examples of a task share their directions and hide each other, so that these bounds are weaker
    than those of gradient canaries; what they add is the task's own model and loss.

    Args:
        subject: What is audited.
        canaries: m, fewer (but at least 20) where so many of the model's gradients do not fit in memory; half of them
            are trained on.
        epsilon: Of the audited configuration.
        rounds: Rounds.
        lr: Learning rate > 0.
        significance: Of all figures together.

    References:
        Steinke, Nasr & Jagielski (2023), section 6.
    """
    plan = _low_epsilon(subject.plan, epsilon=epsilon, rounds=rounds)
    trainer = subject.trainer(**_fields(plan))
    # By the model's size alone, before any coin is tossed.
    canaries = max(20, min(canaries, _GRADIENTS_HELD // trainer.size))
    inputs, targets = subject.make_batch(canaries)
    coins = Keystream().coins(canaries, 0.5)
    start = _parameters(subject.model)
    alone = torch.stack([_one_clipped(trainer, inputs, targets, place) for place in range(canaries)])  # (m, P)
    weights = start
    everyone = torch.ones(int(coins.sum()), dtype=torch.bool)
    for _ in range(rounds):
        weights = trainer.train(weights, inputs[coins], targets[coins], everyone, subject.sources(), lr=lr)
    gained = _losses(subject, start, inputs, targets) - _losses(subject, weights, inputs, targets)
    aligned = _who_took_part(alone, (start - weights).double() / lr, plan)
    bound = one_run_bound(
        {"black box: loss": gained.numpy(), "white box: gradient": aligned.numpy()},
        coins.numpy(),
        delta=plan.delta,
        significance=significance,
    )
    upper = pld_epsilon(Event.of_schedule(plan), plan.delta)
    threat = "knows every canary, and either the last model alone or every release"
    return _bound_finding("example canaries", bound, upper, plan, threat)


def _who_took_part(alone: Tensor, moved: Tensor, plan: Plan) -> Tensor:
    """Returns the best linear estimate of each canary's coin from the sum of all releases, float64 ``(m,)``.

    Args:
        alone: Clipped gradients of the canaries, float64 ``(m, P)``.
        moved: Sum of all steps' noised means, float64 ``(P,)``.
        plan: What was trained under.
    """
    times = plan.sample_rate * plan.steps * plan.rounds
    # As if each canary in the data set were in exactly ``times`` of the sums, and fair coins had decided which are.
    centred = alone @ (moved * plan.expected_batch - times / 2 * alone.sum(0))
    noise = plan.steps * plan.rounds * (plan.noise_multiplier * plan.l2_clip) ** 2
    gram = times * (alone @ alone.T) + 4 * noise / times * torch.eye(len(alone), dtype=alone.dtype)
    taken: Tensor = torch.linalg.solve(gram, centred)
    return taken


def _parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).cpu().float()


def _one_clipped(trainer: PrivateTrainer, inputs: Tensor, targets: Tensor, place: int) -> Tensor:
    one = slice(place, place + 1)
    return trainer.clipped_sum(inputs[one], targets[one], torch.ones(1, dtype=torch.bool))


def _losses(subject: Subject, weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Returns each record's loss under a flat parameter vector, float64 ``(B,)``."""
    trainable = {name: p for name, p in subject.model.named_parameters() if p.requires_grad}
    pieces = torch.split(weights, [p.numel() for p in trainable.values()])
    parameters = {
        name: piece.view(p.shape).to(p.device) for (name, p), piece in zip(trainable.items(), pieces, strict=True)
    }
    # As it is used: without dropout.
    was_training = subject.model.training
    subject.model.eval()
    try:
        device = next(iter(trainable.values())).device
        outputs = torch.func.functional_call(subject.model, parameters, (inputs.to(device),))
        return subject.loss(outputs, targets.to(device)).double().cpu()
    finally:
        subject.model.train(was_training)


# Client-level runs and trained models ------------------------------------------------------------------------------


def _released(subject: Subject, plan: Plan, updates: Sequence[np.ndarray], size: int) -> Tensor:
    """Returns what the server releases of a round with these updates, float64 ``(size,)``."""
    sent = [central.Contribution(update, 1.0) for update in updates]
    return torch.from_numpy(central.aggregate(sent, size, plan, plan.l2_clip, subject.sources()).mean).double()


def server_clip_probe(subject: Subject) -> Finding:
    """Sends the server updates without bounds, at almost no noise: each may weigh C / B at most, however many come.

    Catches a server that does not clip, that clips after the sum, lets through what is no number, or divides by how
    many replied.

    Args:
        subject: What is audited; its plan is at unit client.
    """
    plan = dataclasses.replace(subject.plan, noise_multiplier=_ALMOST_NONE)
    axes = np.eye(64, dtype=np.float32) * np.float32(_LOUD * plan.l2_clip)
    unit = plan.l2_clip / plan.expected_batch
    before, faults, moved = _released(subject, plan, list(axes[:40]), 64), [], {}
    for name, scale in {"loud": 1.0, "huge": 1e30, "infinite": math.inf, "no number": math.nan}.items():
        hostile = axes[40].copy()
        hostile[40] *= np.float32(scale)
        # A server that lets it through adds what is no number; the probe then says so, and does not stop over it.
        with np.errstate(all="ignore"):
            moved[name] = _norm(_released(subject, plan, [*axes[:40], hostile], 64) - before) / unit
        if not moved[name] <= 1 + 1e-3:
            faults.append(f"one {name} update moves it by {moved[name]:.4g} C / B")
    shares = {}
    for count in (40, 41):
        share = _released(subject, plan, list(axes[:count]), 64)[:count] / unit
        shares[str(count)] = float(share.mean())
        if not bool(((share - 1).abs() < 1e-3).all()):
            faults.append(f"of {count} updates each weighs {shares[str(count)]:.4g} C / B")
    return Finding(
        audit="server's clip",
        holds=not faults,
        line=f"expected no update to weigh more than C / B, but {'; '.join(faults)}"
        if faults
        else f"one update moves the noised mean by at most {max(moved.values()):.4f} C / B, however many there are",
        figures={"moved_in_clips": moved, "weight_of_an_update": shares},
    )


def server_noise_probe(subject: Subject, *, numbers: int = 200_000) -> Finding:
    """Ends rounds in which nobody replied: what is released must be fresh Gaussian noise of deviation ``sigma C / B``.

    Args:
        subject: What is audited; its plan is at unit client.
        numbers: At least how many numbers are drawn.
    """
    plan = subject.plan
    # Written out here: an audit that asked the mechanism what it should do would agree with it.
    sigma = plan.noise_multiplier
    if plan.quantile:
        sigma = (plan.noise_multiplier**-2 - (2 * plan.bit_noise) ** -2) ** -0.5
    size = 4096
    drawn = torch.stack([_released(subject, plan, [], size) for _ in range(max(8, math.ceil(numbers / size)))])
    return _judge_noise("server's noise", drawn, sigma * plan.l2_clip / plan.expected_batch)


@torch.no_grad()
def one_run_clients(
    subject: Subject, *, canaries: int = 1000, epsilon: float = 2.0, rounds: int = 8, significance: float = 0.05
) -> Finding:
    """Audits several rounds of the server's own sum in one run, with canary clients, against who sees every model.

    Each canary is a client whose update is a known direction, 8 clips long; by a fair secret coin of its own it replies
    in every second round or in none. The sum is at a fixed clip and at the noise that the lower epsilon needs, for the
    rounds in which a canary may reply, without the discount for coins, as ledgers are charged. Two attacks: *sum* adds
    up what those rounds say along a canary's direction; *difference* takes away what the rounds say in which no canary
    replies, which shows who is in at once if releases share their noise. Unlike the cosine of `canary_clients`, this is
    a bound.

    Args:
        subject: What is audited; its plan is at unit client.
        canaries: m.
        epsilon: Of the audited configuration, > 0.
        rounds: Rounds in which a canary may reply, >= 1; the attacker sees twice as many.
        significance: Of all figures together.

    References:
        Steinke, Nasr & Jagielski (2023); Mahloujifar, Melis & Chaudhuri (2024).
    """
    fixed = {"sample_rate": 1.0, "steps": 1, "turns": rounds, "quantile": 0.0, "clip_lr": 0.0, "bit_noise": 0.0}
    plan = _low_epsilon(subject.plan, epsilon=epsilon, rounds=rounds, **fixed)
    coins = Keystream().coins(canaries, 0.5)
    axes = np.eye(canaries, dtype=np.float32) * np.float32(_LOUD * plan.l2_clip)
    replies = list(axes[coins.numpy()])
    taken, bare = torch.zeros(canaries, dtype=torch.float64), torch.zeros(canaries, dtype=torch.float64)
    for _ in range(rounds):
        taken += _released(subject, plan, replies, canaries)
        bare += _released(subject, plan, [], canaries)
    bound = one_run_bound(
        {"sum": taken.numpy(), "difference": (taken - bare).numpy()},
        coins.numpy(),
        delta=plan.delta,
        significance=significance,
        gaussian=True,
    )
    upper = pld_epsilon(Event(sample_rate=1.0, noise_multiplier=plan.noise_multiplier, steps=rounds), plan.delta)
    threat = "sees the model after every round, knows every canary client and chose its update"
    return _bound_finding("client canaries", bound, upper, plan, threat)


@torch.no_grad()
def canary_clients(
    run: Callable[[Tensor], Tensor],
    *,
    dimension: int,
    l2_clip: float,
    delta: float,
    claim: float,
    canaries: int = 200,
) -> Finding:
    """Estimates epsilon of a client-level run from canary clients that send random directions.

    It proves nothing (guarantee G18): the verdict is "estimate" whatever it says. A figure above the claim is named, as
    a reason to look closer; the bound of `one_run_clients` decides.

    Args:
        run: Runs the mechanism with canary updates, float32 ``(canaries, P)`` each of norm ``l2_clip``, among its
            clients' updates, and returns the final update (or the move of the model), ``(P,)``.
        dimension: P.
        l2_clip: Bound on one client's update.
        delta: In (0, 1).
        claim: Epsilon at delta that is claimed of what ``run`` does, from above.
        canaries: How many canary clients take part, >= 8.

    References:
        Andrew et al. (2023), "One-shot empirical privacy estimation for federated learning".
    """
    drawn = Keystream().gaussian(canaries * dimension).view(canaries, dimension)
    directions = drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
    final = run((directions * l2_clip).float()).double().cpu()
    norm = torch.linalg.vector_norm(final)
    require(bool(norm > 0), "expected a final update other than zero, got none; did the run take any step?")
    estimate: CosineEstimate = cosine_estimate((directions @ (final / norm)).tolist(), dimension, delta)
    above = estimate.epsilon > claim
    words = (
        f"above the {math.ceil(100 * claim - 1e-6) / 100:.2f} that is claimed: it speaks against the claim"
        if above
        else f"{math.ceil(100 * claim - 1e-6) / 100:.2f} is claimed; it proves nothing"
    )
    return Finding(
        audit="canary clients",
        # An estimate has no confidence, so that it contradicts nothing; nor is it ever a pass.
        holds=True,
        estimate=True,
        line=f"estimate: epsilon is about {estimate.epsilon:.2f}, {words} (no bound, no confidence; {canaries} canary "
        "clients)",
        figures=dataclasses.asdict(estimate) | {"kind": "estimate", "claim": claim, "above_claim": above},
    )


@torch.no_grad()
def membership_inference(
    subject: Subject, inputs: Tensor, targets: Tensor, *, lr: float, rounds: int, models: int = 16
) -> Finding:
    """Attacks models trained under the plan with the likelihood-ratio attack, each by the help of all others.

    Every model is trained on a random half of the records, so that for each record there are models that saw it and
    models that did not; their losses, on a log-odds scale, are fitted by two Gaussians with shared deviations.

    It stays with the holder (guarantee G18): it is about records, and it is no bound.

    Args:
        subject: What is audited.
        inputs: Public or synthetic records, or the holder's own where nothing leaves, ``(n, ...)``, n >= 20.
        targets: ``(n,)``.
        lr: Learning rate > 0.
        rounds: Rounds of each training.
        models: How many models, >= 8.

    References:
        Carlini et al. (2022), "Membership inference attacks from first principles" (LiRA).
    """
    count = len(inputs)
    require(count >= 20 and models >= 8, f"expected 20 records and 8 models at least, got {count} and {models}")
    trainer, start, secret = subject.trainer(), _parameters(subject.model), Keystream()
    inside = torch.stack([secret.coins(count, 0.5) for _ in range(models)])  # (K, n)
    scores = torch.empty(models, count, dtype=torch.float64)
    for row, member in enumerate(inside):
        weights, everyone = start, torch.ones(int(member.sum()), dtype=torch.bool)
        for _ in range(rounds):
            weights = trainer.train(weights, inputs[member], targets[member], everyone, subject.sources(), lr=lr)
        losses = _losses(subject, weights, inputs, targets)
        scores[row] = -torch.log(torch.expm1(losses.clamp(1e-12, 500.0))) if bool((losses >= 0).all()) else -losses
    ratios = _likelihood_ratios(scores, inside)
    member = inside.flatten()
    power = _power(ratios.flatten(), member)
    return Finding(
        audit="membership inference",
        holds=True,
        line=f"area under the curve {power['auc']:.3f} (a coin: 0.5), {100 * power['tpr_at_fpr_1_percent']:.1f} % of "
        "members found at 1 % false alarms; no bound, and it stays with the holder",
        figures=power | {"models": models, "records": count},
    )


def _likelihood_ratios(scores: Tensor, inside: Tensor) -> Tensor:
    """Returns log likelihood ratios "in" against "out", ``(K, n)``; each model's from all the others."""
    models = len(scores)
    result = torch.empty_like(scores)
    for row in range(models):
        others = torch.arange(models) != row
        s, i = scores[others], inside[others].double()
        fits = []
        for weight in (i, 1 - i):
            # A record that was never on this side is judged by the average record.
            total = weight.sum(0)
            mean = (s * weight).sum(0) / total.clamp(min=1)
            mean = torch.where(total > 0, mean, (s * weight).sum() / weight.sum().clamp(min=1))
            variance = (((s - mean) ** 2) * weight).sum() / weight.sum().clamp(min=1)
            fits.append((mean, variance.clamp(min=1e-12)))
        (mean_in, var_in), (mean_out, var_out) = fits
        result[row] = (
            (scores[row] - mean_out) ** 2 / (2 * var_out)
            + 0.5 * var_out.log()
            - (scores[row] - mean_in) ** 2 / (2 * var_in)
            - 0.5 * var_in.log()
        )
    return result


def _power(scores: Tensor, member: Tensor) -> dict[str, float]:
    """Returns the area under the curve, and true-positive rates at 0.1 % and 1 % false positives."""
    order = torch.argsort(scores, descending=True)
    hits = member[order].double()
    true, false = hits.cumsum(0) / hits.sum(), (1 - hits).cumsum(0) / (1 - hits).sum()
    found = {"auc": torch.trapezoid(true, false).item()}
    for name, rate in (("tpr_at_fpr_0.1_percent", 0.001), ("tpr_at_fpr_1_percent", 0.01)):
        within = true[false <= rate]
        found[name] = within.max().item() if len(within) else 0.0
    return found


# What may be told --------------------------------------------------------------------------------------------------


def report_evidence(findings: Sequence[Finding], *, date: str, code_hash: str, records: str) -> dict[str, Any]:
    """Returns what a report may carry under "empirical": lower bounds of canaries, and nothing else (G18).

    Guarantees:
        Canaries only: probes without noise, estimates, membership inference and every figure that is not about canaries
            stay out, whatever the findings hold; a finding is let in by its kind and a figure by its name.
        Never better than it is: ``holds`` is false where *any* finding failed, those that stay included, so that no
            report calls sound what its own audit contradicted. Which of those that stay it was is not said.

    Args:
        findings: Of one audit.
        date: ISO 8601.
        code_hash: SHA-256 of the audited program's source.
        records: In words, what it ran on, such as "synthetic records".

    Raises:
        TacitError: A figure is not finite, so that it would not survive as JSON.
    """
    rows = []
    for finding in findings:
        if finding.stays or finding.estimate:
            continue
        figures = {name: finding.figures[name] for name in TOLD if name in finding.figures}
        for name, value in figures.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise TacitError(f"expected finite figures of {finding.audit}, got {name} {value}; audit again")
        rows.append({"audit": finding.audit, "holds": finding.holds, "verdict": finding.line, **figures})
    return {
        "schema": EVIDENCE_SCHEMA,
        "date": date,
        "code_hash": code_hash,
        "records": records,
        "holds": all(finding.holds for finding in findings),
        "bounds": rows,
        "limits": "A lower bound shows what an attack achieved, not what a better one could. A claim above a ceiling "
        "cannot be contradicted by that many guesses. Bounds are those of a low-epsilon configuration of the same "
        "code, named beside them.",
    }
