"""Planning: what a job would cost and how much noise it would carry, before anybody's data is touched.

Both ways round: from epsilon to noise, or from noise to epsilon. A plan is settled by `simulations.world.calibrate`, as
that of a run is, so what is printed here is what a run of the same scenario charges. Only public numbers enter: no
record is read, and a ledger is read without writing a byte beside it.

Every bound is rounded up where it is printed and every remainder down; what cannot be computed is None, and is printed
as "unknown", never as a small number (guarantee G6).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import html
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from clients.data import published
from models.catalog import find_task
from models.task import Task
from privacy.accounting import (
    Event,
    attacker_power,
    best_order,
    group_epsilon,
    pld_epsilon,
    prv_epsilon,
    rdp,
    repeated,
    zcdp_rho,
)
from privacy.errors import LedgerError, PlanError
from privacy.ledger import GUARDS, Account, Book
from privacy.matrix import matrix_of
from privacy.plan import Adjacency, Plan, Unit
from privacy.replacement import replace_epsilon, replace_rdp_epsilon
from server.app import joins_of
from simulations.scenario import Scenario
from simulations.world import calibrate

SCHEMA: Final = "tacit-plan/1"
# Above it, loss distributions take minutes and gigabytes for a figure that nobody needs exactly (as in reports).
_PLD_EPSILON: Final = 100
# One person's records in one data set, for which a plan is priced beside the single record.
_PERSONS: Final = (1, 2, 5)
_FPR: Final = (0.001, 0.01)
# Rounds and epsilon of the sweeps, relative to the plan's own.
_FACTORS: Final = (0.25, 0.5, 1.0, 2.0, 4.0)
_PRV_TIMEOUT_S: Final = 20.0


def plan(scenario: Scenario, *, ledgers: Path | None = None) -> dict[str, Any]:
    """Plans a job.

    Args:
        scenario: As for `simulations.run.simulate`, not resolved yet.
        ledgers: Folder of ledgers to ask how many more such jobs they afford, or None.

    Returns:
        A JSON-able mapping: ``plan``, ``schedule``, ``cost``, ``signal``, ``sweeps`` and, with ledgers, ``ledgers``.
        Every epsilon is infinity where nothing holds, and None where it is unknown.

    Raises:
        PlanError: The scenario is no plan, or a number that nobody published is missing.
        DataError: A schema is damaged.
        LedgerError: There is no ledger in ``ledgers``, or it is damaged.
    """
    task = _task(scenario.task)
    shape, records = published(task, scenario.data or None)
    resolved = scenario.resolved(records)
    settled, order = calibrate(resolved)
    history = Event.all_of_schedule(settled)
    parameters = None if shape is None else _trainable(task, shape, resolved.seed)
    # Where clients are protected the plan says how many turns one of them has: no cohort is asked for.
    turns = settled.turns or joins_of(resolved.rounds, resolved.clients, resolved.cohort)
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "task": task.name,
        "record": task.record,
        "clients": resolved.clients,
        "cohort": resolved.cohort or resolved.clients,
        "solved": "epsilon" if resolved.noise_multiplier else "noise",
        "plan": json.loads(settled.to_json()),
        "schedule": {
            "joins": turns,
            "spare": settled.joins - turns,
            "charges": settled.charges,
            "steps": history[0].steps,
            "records_per_client": resolved.records_per_client,
        },
        "cost": cost(history, settled.delta, order=order, multiplicity=resolved.multiplicity),
        "signal": signal(settled, resolved, parameters),
        "sweeps": {
            "rounds": _over_rounds(scenario, records, settled.noise_multiplier, parameters),
            "epsilon": _over_epsilon(scenario, records, settled.epsilon, parameters),
        },
    }
    if ledgers is not None:
        facts["ledgers"] = left_in(ledgers, settled, turns)
    return facts


def _task(name: str) -> Task:
    try:
        return find_task(name)
    except LookupError as error:
        raise PlanError(str(error.args[0] if error.args else error)) from None


def _trainable(task: Task, shape: Any, seed: int) -> int:
    """Returns how many trainable parameters a task's model has: the length of an update."""
    return sum(p.numel() for p in task.fresh(shape, seed).parameters() if p.requires_grad)


# -- what it costs --------------------------------------------------------------------------------------------------


def cost(history: Sequence[Event], delta: float, *, order: float, multiplicity: int = 1) -> dict[str, Any]:
    """Prices a committed schedule by every accountant.

    Args:
        history: All that one client can be charged for in the job, spare charges included.
        delta: At which epsilon holds, in (0, 1).
        order: Renyi order of the filter that guards the ledgers.
        multiplicity: In how many clients' data sets one person may be, >= 1.

    Returns:
        ``filter``, ``pld``, ``prv``, ``replace_one`` (PLD), ``replace_one_second`` (another accountant; None where it
        has no figure, see ``replace_one_note``) and ``replace_one_rdp`` (a bound that always holds), ``at_deltas``,
        ``odds``, ``tpr``, ``persons``, ``federation``,
        and ``zcdp_rho`` and ``gdp_mu``, which are None under sampling, where no finite number says it all.
    """
    filtered = best_order(history, delta)[1]
    tight = filtered <= _PLD_EPSILON
    deltas = (delta, delta / 10, delta / 100)
    curve = [(at, _tightest(history, at)) for at in deltas]
    # PRV needs a loss worth integrating: at next to no cost it works for minutes.
    asked = tight and curve[0][1] > 1e-3
    why = "epsilon below 0.001" if tight else f"epsilon above {_PLD_EPSILON}"
    prv, note = prv_epsilon(history, delta, _PRV_TIMEOUT_S) if asked else (None, f"not asked: {why}")
    second, how = replace_epsilon(history, delta) if tight else (None, f"not asked: epsilon above {_PLD_EPSILON}")
    epsilon = curve[0][1]
    # What an attacker can do is said of the whole person, as the headline of a report is (guarantee G4).
    every = repeated(history, multiplicity)
    person = [(at, _tightest(every, at)) for at in deltas]
    whole = all(event.sample_rate == 1 for event in history)
    return {
        "filter": {"epsilon": filtered, "order": order},
        "pld": epsilon if tight else None,
        "prv": prv,
        "prv_note": note,
        "replace_one": pld_epsilon(history, delta, Adjacency.REPLACE_ONE) if tight else None,
        "replace_one_second": second,
        "replace_one_note": how,
        "replace_one_rdp": replace_rdp_epsilon(history, delta),
        "at_deltas": [{"delta": at, "epsilon": figure} for at, figure in curve],
        "odds": math.exp(person[0][1]) if person[0][1] < 700 else math.inf,
        "tpr": [{"fpr": fpr, "tpr": attacker_power(person, fpr)} for fpr in _FPR],
        # Where clients are protected, all records of a person at one of them are in the figure already.
        "persons": [
            {"records": k, "epsilon": _of_person(history, delta, k, epsilon)}
            for k in (_PERSONS if history[0].unit is Unit.RECORD else ())
        ],
        "federation": {"multiplicity": multiplicity, "epsilon": person[0][1]},
        "zcdp_rho": zcdp_rho(history) if whole else None,
        "gdp_mu": math.sqrt(2 * zcdp_rho(history)) if whole else None,
    }


def _of_person(history: Sequence[Event], delta: float, records: int, single: float) -> float | None:
    """Returns epsilon for all of one person's records in one data set, None where it is not computed."""
    if records == 1:
        return single
    # What is hopeless for one record is worse for several.
    if single * records > _PLD_EPSILON:
        return None
    # The finest grid takes half a minute; these cost less than 2 % of epsilon, on the safe side.
    steps = sum(event.steps for event in history)
    interval = 0.01 if steps <= 100 else 0.003 if steps <= 3000 else 0.001
    return group_epsilon(history, delta, records, interval)


def _tightest(history: Sequence[Event], delta: float) -> float:
    """Returns epsilon by PLD, or by RDP where PLD would take minutes."""
    filtered = best_order(history, delta)[1]
    return pld_epsilon(history, delta) if filtered <= _PLD_EPSILON else filtered


# -- how much noise -------------------------------------------------------------------------------------------------


def signal(settled: Plan, scenario: Scenario, parameters: int | None) -> dict[str, Any]:
    """Returns the expected norm of the noise in the cohort's mean update, beside the most that records can move it.

    Each client divides its clipped, noised sum by the public expected batch B, so one parameter of one client's step
    carries noise of deviation sigma C / B. The server's mean over n equal clients divides that by sqrt(n), and over P
    parameters its norm is sigma C sqrt(P) / (B sqrt(n)).  Records can move the mean by C at most, and only where the
    gradients of all of them reach the bound and point the same way; real signals are smaller. Over the L steps of a
    round the signal may add up to L C, while independent noise grows with sqrt(L).

    Args:
        settled: The plan.
        scenario: Resolved; its cohort and declared sizes say how many updates are averaged.
        parameters: Trainable parameters P, or None where nobody knows the model's shape.
    """
    # With unequal public weights the mean is as noisy as one over this many equal clients.
    sizes = scenario.sizes
    share = scenario.cohort / scenario.clients
    clients = share * sum(sizes) ** 2 / sum(size**2 for size in sizes) if sizes else float(scenario.cohort)
    if settled.unit is Unit.CLIENT:
        # One noise on the cohort's sum, and the divisor is the expected cohort itself.
        clients = 1.0
    # A client's update is clipped whole; of a record's gradients each step of a round adds one.
    steps = 1 if settled.unit is Unit.CLIENT else settled.steps
    per_parameter = settled.noise_multiplier * settled.l2_clip / settled.expected_batch / math.sqrt(clients)
    if settled.banded is not None:
        return _signal_of_matrix(settled, parameters, per_parameter)
    norm = None if parameters is None else per_parameter * math.sqrt(parameters)
    return {
        "parameters": parameters,
        "averaged_over": clients,
        "clip": settled.l2_clip,
        "noise_per_parameter": per_parameter,
        "noise_norm": norm,
        "ratio_of_a_step": None if norm is None else settled.l2_clip / norm,
        "ratio_of_a_round": None if norm is None else settled.l2_clip / norm * math.sqrt(steps),
        "formula": "noise norm = sigma * C * sqrt(P) / (B * sqrt(n)); signal at most C",
        "assumes": "every client's update at the clip and all pulling alike, so a real signal is smaller; the expected "
        "cohort replies"
        if settled.unit is Unit.CLIENT
        else "plain SGD steps; every record's gradient at the bound and all pulling alike, so a real signal is "
        "smaller; noise independent between clients and steps; all of the cohort replies",
    }


def _signal_of_matrix(settled: Plan, parameters: int | None, unit: float) -> dict[str, Any]:
    """Returns the noise of a round, and that of the sum of all rounds, which is the model and what a matrix is for.

    Args:
        settled: A plan of banded noise.
        parameters: As in `signal`.
        unit: Noise multiplier times clip over the divisor: what errors of a matrix are in units of.
    """
    matrix = matrix_of(settled)
    fresh = dataclasses.replace(matrix, coefficients=(1.0,))
    per_parameter = unit * matrix.sensitivity * matrix.growth
    norm = None if parameters is None else per_parameter * math.sqrt(parameters)
    return {
        "parameters": parameters,
        "averaged_over": 1.0,
        "clip": settled.l2_clip,
        "noise_per_parameter": per_parameter,
        "noise_norm": norm,
        "ratio_of_a_step": None if norm is None else settled.l2_clip / norm,
        "ratio_of_a_round": None if norm is None else settled.l2_clip / norm,
        "noise_of_the_sum": unit * matrix.error(),
        "noise_of_the_sum_if_fresh": unit * fresh.error(),
        "formula": "noise norm = sigma * C * sqrt(P) * sensitivity * norm of the inverse matrix' last row / B; signal "
        "at most C",
        "assumes": "every client's update at the clip and all pulling alike, so a real signal is smaller; the whole "
        "class replies",
    }


# -- sweeps ---------------------------------------------------------------------------------------------------------


def _over_rounds(
    scenario: Scenario, records: int | None, noise: float, parameters: int | None
) -> list[dict[str, float | int | None]]:
    """Returns what other numbers of rounds cost under the same noise."""
    rows: list[dict[str, float | int | None]] = []
    for rounds in sorted({max(1, round(scenario.rounds * factor)) for factor in _FACTORS}):
        rows.append(_row(_variant(scenario, rounds=rounds, noise_multiplier=noise, epsilon=0.0), records, parameters))
    return rows


def _over_epsilon(
    scenario: Scenario, records: int | None, epsilon: float, parameters: int | None
) -> list[dict[str, float | int | None]]:
    """Returns what noise other budgets need for the same schedule."""
    rows: list[dict[str, float | int | None]] = []
    for factor in _FACTORS:
        wanted = float(f"{epsilon * factor:.6g}")
        with contextlib.suppress(PlanError):  # No noise is enough for a budget that small.
            rows.append(_row(_variant(scenario, noise_multiplier=0.0, epsilon=wanted), records, parameters))
    return rows


def _variant(scenario: Scenario, **changes: Any) -> Scenario:
    rounds = changes.get("rounds", scenario.rounds)
    fitting = {"warmup_rounds": min(scenario.warmup_rounds, rounds), "bands": min(scenario.bands, rounds)}
    return dataclasses.replace(scenario, **fitting, **changes)


def _row(scenario: Scenario, records: int | None, parameters: int | None) -> dict[str, float | int | None]:
    resolved = scenario.resolved(records)
    settled, _ = calibrate(resolved)
    history = Event.all_of_schedule(settled)
    filtered = best_order(history, settled.delta)[1]
    return {
        "rounds": settled.rounds,
        "noise_multiplier": settled.noise_multiplier,
        "epsilon": filtered,
        "pld": pld_epsilon(history, settled.delta) if filtered <= _PLD_EPSILON else None,
        "ratio_of_a_round": signal(settled, resolved, parameters)["ratio_of_a_round"],
    }


# -- what ledgers have left -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[tuple[Account, ...]]:
    """Reads the accounts of a folder of ledgers, all populations, without writing a byte into it.

    The book is copied, under its own lock, into a private folder that is removed afterwards; a torn charge is finished
    in the copy, so it counts as spent here too. The key stays where it is.

    Args:
        folder: A folder that holds ``ledger.jsonl``, or a run folder whose ``ledgers/`` does.

    Raises:
        LedgerError: There is no ledger, or it is damaged.
    """
    home = next((place for place in (folder, folder / "ledgers") if (place / "ledger.jsonl").is_file()), None)
    if home is None:
        raise LedgerError(
            f"expected a folder that holds a ledger, got {folder} without ledger.jsonl; name the folder that runs were "
            "given as --ledgers, or a run folder"
        )
    key = home / "ledger.key"
    if not key.is_file():
        raise LedgerError(f"expected the key of the ledger in {key}, got none; restore it from a backup")
    with tempfile.TemporaryDirectory(prefix="tacit-ledger-") as temporary:
        copy = Path(temporary)
        try:
            descriptor = os.open(home / "ledger.jsonl", os.O_RDONLY)
            with open(descriptor, "rb") as file:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                (copy / "ledger.jsonl").write_bytes(file.read())
                for name in GUARDS:
                    if (home / name).is_file():
                        (copy / name).write_bytes((home / name).read_bytes())
            (copy / "ledger.key").symlink_to(key.resolve())
        except OSError as error:
            raise LedgerError(f"expected a ledger that can be read in {home}, got: {error.strerror}") from None
        try:
            with Book(copy) as book:
                populations = sorted(book.populations)
            accounts: list[Account] = []
            for population in populations:
                with Book(copy, population) as book:
                    accounts += book.accounts.values()
        except LedgerError as error:
            raise LedgerError(str(error).replace(str(copy), str(home))) from None
        yield tuple(accounts)


def left_in(folder: Path, settled: Plan, turns: int) -> list[dict[str, Any]]:
    """Returns, for each ledger of a folder, what is spent, what is left, and how many more such jobs it affords.

    Args:
        folder: See `read_only`.
        settled: The plan of one job.
        turns: Rounds of it that one client joins; a job that needs no retry charges these.

    Raises:
        LedgerError: There is no ledger, or it is damaged.
    """
    rows = []
    with read_only(folder) as accounts:
        for account in accounts:
            grant = account.grant
            one = rdp(Event.all_of_round(settled), grant.order)
            fits = (settled.unit, settled.adjacency) == (grant.unit, grant.adjacency)
            rounds = _times(grant.budget_rdp, account.spent_rdp, one) if fits else 0
            # Test noise protects nothing: what such a ledger has spent is infinite, whatever it counts.
            spent = math.inf if account.test else account.spent
            rows.append(
                {
                    "name": account.name,
                    "population": account.population,
                    "epsilon": grant.epsilon,
                    "delta": grant.delta,
                    "spent": spent,
                    "remaining": max(0.0, grant.epsilon - spent),
                    # A matrix is charged once, for all its rounds.
                    "runs": 0 if account.test else rounds // settled.charges,
                    "runs_without_retries": 0 if account.test else rounds // min(turns, settled.charges),
                    "rounds": 0 if account.test else rounds,
                    "charges": account.charges,
                    "test": account.test,
                    "jobs": len(account.jobs),
                }
            )
    return rows


def _times(budget: float, spent: float, one: float) -> int:
    """Returns how often a price fits beside what was spent, as `privacy.accounting.Grant.affords` counts."""
    if not math.isfinite(one):
        return 0
    return max(0, math.floor((budget * (1 + 1e-9) - spent) / one))


# -- pictures -------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 22, 56, 48


def picture(facts: Mapping[str, Any]) -> str:
    """Draws both sweeps of a plan as one SVG: epsilon over rounds, and noise over epsilon.

    Args:
        facts: What `plan` returned.

    Returns:
        A whole SVG file, without scripts, styles or links.
    """
    rounds, epsilons = facts["sweeps"]["rounds"], facts["sweeps"]["epsilon"]
    chosen, delta = facts["plan"], facts["plan"]["delta"]
    left = _panel(
        f"Epsilon over rounds, noise {chosen['noise_multiplier']:.4g}",
        ("rounds", f"epsilon at delta {delta:g}"),
        [
            ("RDP filter", "#0072b2", _points(rounds, "rounds", "epsilon")),
            ("PLD, the whole schedule", "#d55e00", _points(rounds, "rounds", "pld")),
        ],
        (chosen["rounds"], facts["cost"]["filter"]["epsilon"]),
    )
    right = _panel(
        f"Noise over epsilon, {chosen['rounds']} rounds",
        ("epsilon", "noise multiplier"),
        [("noise that the budget needs", "#0072b2", _points(epsilons, "epsilon", "noise_multiplier"))],
        (facts["cost"]["filter"]["epsilon"], chosen["noise_multiplier"]),
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * _WIDTH} {_HEIGHT}" role="img" '
        'aria-labelledby="plan-title plan-desc" font-family="system-ui, sans-serif" font-size="12">'
        f'<title id="plan-title">{html.escape("Plan of " + str(facts["task"]))}</title>'
        '<desc id="plan-desc">Left: what the schedule costs over other numbers of rounds, under the same noise. Right: '
        "the noise that other budgets need. The ring is the plan.</desc>"
        f'<rect width="100%" height="100%" fill="#ffffff"/>{left}'
        f'<g transform="translate({_WIDTH} 0)">{right}</g></svg>\n'
    )


def _points(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    pairs = [(row[x], row[y]) for row in rows if row[x] is not None and row[y] is not None]
    return sorted((float(a), float(b)) for a, b in pairs if math.isfinite(a) and math.isfinite(b))


def _panel(
    title: str,
    labels: tuple[str, str],
    curves: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    chosen: tuple[float, float],
) -> str:
    """Draws curves on axes that start at zero, with a ring around the chosen point."""
    points = [point for _, _, curve in curves for point in curve]
    base, end = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    if not points:
        return _words(_WIDTH / 2, _HEIGHT / 2, f"{title}: nothing finite to draw", "middle")
    xs, ys = (_ticks(max(point[axis] for point in points)) for axis in (0, 1))

    def at_x(value: float) -> float:
        return round(_LEFT + value / xs[-1] * (end - _LEFT), 1)

    def at_y(value: float) -> float:
        return round(base - value / ys[-1] * (base - _TOP), 1)

    parts = [_words(_LEFT, 18, title, "start", ' font-weight="600"')]
    for tick in ys:
        parts.append(f'<path d="M{_LEFT} {at_y(tick)}H{end}" stroke="#e3e1da"/>')
        parts.append(_words(_LEFT - 8, at_y(tick) + 4, f"{tick:,g}", "end"))
    for tick in xs:
        parts.append(f'<path d="M{at_x(tick)} {base}v5" stroke="#6b7280"/>')
        parts.append(_words(at_x(tick), base + 18, f"{tick:,g}", "middle"))
    parts.append(_words((_LEFT + end) / 2, _HEIGHT - 8, labels[0], "middle"))
    middle = (_TOP + base) / 2
    parts.append(_words(14, middle, labels[1], "middle", f' transform="rotate(-90 14 {middle:g})"'))
    start = float(_LEFT)
    for words, color, curve in curves:
        if not curve:
            continue
        path = "L".join(f"{at_x(x)} {at_y(y)}" for x, y in curve)
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{at_x(x)}" cy="{at_y(y)}" r="3" fill="{color}"/>' for x, y in curve]
        parts.append(f'<path d="M{start:g} 36h18" stroke="{color}" stroke-width="3"/>')
        parts.append(_words(start + 24, 40, words, "start"))
        start += 24 + 6.4 * len(words) + 16
    if all(map(math.isfinite, chosen)):
        ring = f'cx="{at_x(chosen[0])}" cy="{at_y(chosen[1])}" r="7"'
        parts.append(f'<circle {ring} fill="none" stroke="#1b2430" stroke-width="1.5"/>')
    return "".join(parts)


def _words(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="#4b5563"{more}>{html.escape(words)}</text>'


def _ticks(most: float) -> list[float]:
    """Returns about five round numbers from 0 that reach ``most``."""
    raw = most / 5 if most > 0 else 0.2
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    return [float(f"{index * step:.12g}") for index in range(math.ceil(most / step - 1e-9) + 1)] if most > 0 else [0, 1]


def bar(value: float | None, most: float, width: int, *, utf8: bool = True) -> str:
    """Draws one bar of the small plot on a terminal, of up to ``width`` characters."""
    if value is None or not math.isfinite(value) or most <= 0:
        return ""
    return ("█" if utf8 else "#") * max(1, round(value / most * width))
