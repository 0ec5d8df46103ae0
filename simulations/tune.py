"""A search over hyper-parameters, every candidate of which is charged in full (guarantee G5).

In a federated search each candidate's updates leave the clients, whether the candidate wins or loses. So a search costs
what all its candidates cost together: they share one folder of ledgers, the budget is that of the whole search, and
nothing is refunded for the losers. The candidates are written down before the first of them runs, so the schedule of
the whole search is committed and may be priced by PLD (guarantee G3). The final model is the winner's own.

On public or synthetic data there is no holder whose budget could be spent. Such a search is free and says why; each of
its candidates runs as the real job would, with throw-away ledgers in its own run folder.

A search folder holds ``search.json`` (candidates, price, results), ``search.txt``, ``ledgers/`` and one run folder a
candidate. Everything is resumable: a finished candidate is not run again, and one that was killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import random
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from clients.data import Source, SourceName, load_source, published
from clients.plain import check_unit
from models.catalog import find_task
from models.task import Task
from privacy.accounting import Event, Grant, best_order, merged, pld_epsilon, rdp, split_noise
from privacy.errors import BudgetExceeded, PlanError, RunError, TacitError
from privacy.files import write_whole
from privacy.ledger import Account, Book
from privacy.plan import Adjacency, Unit, require
from server.app import CHECKPOINT, METRICS, Ending
from server.checkpoint import load
from simulations.evidence import composed_epsilon, render
from simulations.planning import read_only
from simulations.run import _alone, simulate
from simulations.scenario import BY_NAME, CONFIG_FILE, DATA, FOLDERS, MACHINE, Scenario, nearest
from simulations.world import Settled, World, another_split, calibrate, code_hash, now, population_words, vault_of

SCHEMA: Final = "tacit-search/1"
SEARCH_FILE: Final = "search.json"
TEXT_FILE: Final = "search.txt"
_PLD_EPSILON: Final = 100
_MOST_CANDIDATES: Final = 1000

# Data sets that anybody can download, and that come from nowhere else: no holder has a budget for them.
_PUBLIC: Final = frozenset(
    {
        SourceName.DIGITS,
        SourceName.BREAST_CANCER,
        SourceName.MNIST,
        SourceName.FASHION_MNIST,
        SourceName.CIFAR10,
        SourceName.SST2,
        SourceName.SHAKESPEARE,
    }
)
# Settled for a whole search: whose data it is, what may be spent on it, and for whom.
_SETTLED: Final = frozenset(
    {"data", "clients", "seed", "epsilon", "delta", "records-per-client", "records-bound", "multiplicity", "persons"}
)


class Observer(Protocol):
    """Watches a search."""

    def planned(self, search: Mapping[str, Any]) -> None:
        """Called once, with the candidates and the price, before anything is charged."""

    def candidate(self, search: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
        """Called with each candidate that finished."""

    def note(self, text: str) -> None:
        """Called with anything else worth a sentence."""


class _Quiet:
    """Watches one candidate's run for the watcher of the search."""

    def __init__(self, observer: Observer) -> None:
        self.note = observer.note

    def started(self, info: Mapping[str, object]) -> None:
        pass

    def round(self, line: Mapping[str, object]) -> None:
        pass

    def finished(self, summary: Mapping[str, object]) -> None:
        pass


# -- candidates -----------------------------------------------------------------------------------------------------


def grid(tries: Sequence[str]) -> list[dict[str, object]]:
    """Returns every combination of the values to try.

    Args:
        tries: ``key=value,value,...``, each key once.

    Raises:
        PlanError: A key is unknown, may not vary within a search, or has no values.
    """
    axes: dict[str, list[object]] = {}
    for text in tries:
        name, equals, values = text.partition("=")
        require(
            bool(equals) and bool(name), f"expected --try KEY=VALUE,VALUE, got {text!r}; write for example lr=0.5,1"
        )
        _require_free(name)
        require(name not in axes, f"expected each key to try once, got {name} twice; put all its values into one --try")
        words = [word.strip() for word in values.split(",")]
        require(all(words), f"expected values of {name} separated by commas, got {values!r}; drop the empty one")
        axes[name] = list(dict.fromkeys(BY_NAME[name].read(word) for word in words))
    require(bool(axes), "expected at least one key to try, got none; add for example --try lr=0.5,1,2")
    count = math.prod(map(len, axes.values()))
    require(
        count <= 10**6,
        f"expected a grid of at most {10**6:,} candidates, got {count:,}; try fewer values",
    )
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def listed(path: Path) -> list[dict[str, object]]:
    """Reads candidates from a TOML file of ``[[candidate]]`` tables.

    Raises:
        PlanError: The file cannot be read, holds anything else, or a key that may not vary.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise PlanError(f"expected a list of candidates, got {path} ({error.strerror}); check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"expected {path} to be TOML, got {error}; check that line") from None
    rows = content.get("candidate")
    if set(content) != {"candidate"} or not isinstance(rows, list) or not rows or not all(map(_is_table, rows)):
        raise PlanError(f"expected {path} to hold [[candidate]] tables and nothing else, got {sorted(content)}")
    found: list[dict[str, object]] = []
    for row in rows:
        for name in row:
            _require_free(name)
        settings: dict[str, object] = {name: BY_NAME[name].read(value) for name, value in row.items()}
        require(settings not in found, f"expected each candidate once in {path}, got {settings} twice; drop one")
        found.append(settings)
    return found


def _is_table(row: object) -> bool:
    return isinstance(row, dict)


def _require_free(name: str) -> None:
    """Refuses a key that may not differ between the candidates of one search."""
    require(name in BY_NAME, f"expected a scenario key to try, got {name!r}{nearest(name, tuple(BY_NAME))}")
    group = BY_NAME[name].group
    require(
        name not in _SETTLED and group not in (MACHINE, FOLDERS, DATA),
        f"expected a key that may vary within a search, got {name}; whose data it is, what may be spent and where it "
        "runs is settled once, for all candidates",
    )


def drawn(candidates: Sequence[dict[str, object]], count: int, seed: int) -> list[dict[str, object]]:
    """Returns a random subset in the order of the whole; which one depends on the public seed alone.

    Args:
        candidates: All of them.
        count: How many, >= 1; 0 for all.
        seed: Public seed.

    Raises:
        PlanError: There are too many, or fewer than ``count``.
    """
    require(
        0 <= count <= len(candidates),
        f"expected --candidates from 1 to {len(candidates)}, the size of the grid, got {count}",
    )
    # Which settings are tried is public, and no secret hangs on it.
    chosen = random.Random(seed).sample(range(len(candidates)), count or len(candidates))  # noqa: S311
    require(
        len(chosen) <= _MOST_CANDIDATES,
        f"expected at most {_MOST_CANDIDATES} candidates, got {len(chosen)}; each is charged in full, draw fewer with "
        "--candidates",
    )
    return [candidates[index] for index in sorted(chosen)]


# -- what it costs --------------------------------------------------------------------------------------------------


def prepare(
    file: Path | None,
    flags: Mapping[str, object],
    candidates: Sequence[Mapping[str, object]],
    *,
    public: bool = False,
    statement: str = "",
    metric: str = "",
    validation: float = 0.5,
) -> dict[str, Any]:
    """Settles a search before it starts: its candidates, their noise, and what all of them cost together.

    Args:
        file: Scenario file of what all candidates share, or None.
        flags: Scenario keys over it. Epsilon is that of the whole search, the final model included.
        candidates: Scenario keys of each candidate, over both.
        public: Whether the data is public or synthetic, so that no budget is spent.
        statement: Why it is, where the task does not say so itself; it is recorded.
        metric: The metric to choose by; empty for the task's first.
        validation: Share of the server's public test set to choose on, in [0, 1); the winner is then reported on the
            rest. 0 chooses on all of it.

    Returns:
        The content of ``search.json``, JSON-able.

    Raises:
        PlanError: A candidate is no scenario, the candidates do not share one data set, no noise is enough, or nobody
            says that the data is public.
    """
    require(0 <= validation < 1, f"expected 0 <= validation < 1, got {validation:g}; 0 chooses on the whole test set")
    require(not statement or public, "expected --public-because only with --public, got it alone; add --public")
    base = Scenario.layered(file, flags)
    for settings in candidates:
        if clash := sorted(set(settings) & set(flags)):
            raise PlanError(f"expected {clash[0]} either for all candidates or to try, got both; drop one of the two")
    scenarios = [Scenario.layered(file, {**flags, **settings}) for settings in candidates]
    task = _task(base.task)
    check_unit(task, Unit(base.unit))
    why = _why_public(base, task, statement) if public else ""
    populations = {population_words(each, _task(each.task)) for each in scenarios}
    require(
        len(populations) == 1,
        "expected candidates that learn from one data set, got several; try tasks that share their data",
    )
    records = published(task, base.data or None)[1]
    resolved = [each.resolved(records) for each in scenarios]
    given = {each.noise_multiplier > 0 for each in resolved}
    require(
        len(given) == 1,
        "expected epsilon or noise-multiplier for all candidates alike, got both; give one of them to all",
    )
    split = given == {False} and not public
    shared_order = 0.0
    if split:
        resolved, shared_order = _with_shares(resolved)
    plans = [calibrate(each)[0] for each in resolved]
    require(
        all(plan.unit is Unit.RECORD for plan in plans),
        "expected a search that protects records, got unit client, whose candidates this version cannot price together",
    )
    require(
        all(plan.metrics is None for plan in plans),
        "expected a search by the server's public metric alone, got metrics of clients' own records; drop --metrics",
    )
    names = _names(_task(base.task), base)
    require(
        not metric or metric in names,
        f"expected a metric of {base.task}, got {metric!r}{nearest(metric, tuple(names))}",
    )
    search: dict[str, Any] = {
        "schema": SCHEMA,
        "created": now(),
        "code": code_hash(),
        "status": "planned",
        "task": base.task,
        "clients": base.clients,
        "delta": base.delta,
        "multiplicity": base.multiplicity,
        "public": {"why": why, "stated": bool(statement)} if public else None,
        "metric": metric or names[0],
        "validation": validation,
        "scenario": base.to_mapping(),
        "candidates": [
            {
                "number": number,
                "settings": dict(settings),
                # The noise is written down, so that a resumed search is the one that was priced.
                "scenario": each.to_mapping(),
                "noise_multiplier": plan.noise_multiplier,
                "event": Event.of_schedule(plan).to_dict(),
                "epsilon": best_order(Event.of_schedule(plan), base.delta)[1],
                "result": None,
            }
            for number, (settings, each, plan) in enumerate(zip(candidates, resolved, plans, strict=True), start=1)
        ],
        "records_bound": resolved[0].records_bound,
        "winner": None,
        "held_out": None,
        "total": None,
    }
    search["price"] = price([Event.of_schedule(plan) for plan in plans], base, shared_order)
    search["budget"] = base.epsilon if split else search["price"]["epsilon"]
    return search


def _with_shares(resolved: Sequence[Scenario]) -> tuple[list[Scenario], float]:
    """Gives each candidate the noise of an equal share of the search's epsilon; returns the filter's order too."""
    events = [Event.of_schedule(calibrate(each)[0]) for each in resolved]
    noises, order = split_noise(
        epsilon=resolved[0].epsilon,
        delta=resolved[0].delta,
        schedules=[(event.sample_rate, event.steps) for event in events],
    )
    return [
        dataclasses.replace(each, epsilon=0.0, noise_multiplier=noise)
        for each, noise in zip(resolved, noises, strict=True)
    ], order


def price(events: Sequence[Event], base: Scenario, order: float = 0.0) -> dict[str, Any]:
    """Prices a whole committed search: every candidate, winners and losers, spare charges included.

    Args:
        events: What one client can be charged for in each candidate.
        base: The scenario that all share.
        order: Renyi order at which the budget was split; 0 chooses the cheapest.

    Returns:
        ``epsilon`` and ``order`` by the RDP filter (the budget that the ledgers grant), ``pld`` and ``replace_one``
        (None where they are not computed), and ``person``: PLD, or the filter, over ``multiplicity`` data sets.
    """
    history = merged(events)
    best, filtered = best_order(history, base.delta)
    if order:
        # The order of the split is the one at which the shares are known to fit.
        grant = Grant(epsilon=base.epsilon, delta=base.delta, order=order, records_bound=1)
        best, filtered = order, grant.epsilon_of(sum(rdp(event, order) for event in history))
    tight = filtered <= _PLD_EPSILON
    many = merged([dataclasses.replace(event, steps=event.steps * base.multiplicity) for event in history])
    person = best_order(many, base.delta)[1]
    return {
        "epsilon": filtered,
        "order": best,
        "pld": pld_epsilon(history, base.delta) if tight else None,
        "replace_one": pld_epsilon(history, base.delta, Adjacency.REPLACE_ONE) if tight else None,
        "person": pld_epsilon(many, base.delta) if person <= _PLD_EPSILON else person,
    }


def _why_public(base: Scenario, task: Task, statement: str) -> str:
    """Returns why a search is free, in words that are recorded.

    Raises:
        PlanError: Neither the task nor the person says so; or the budget of real holders was named.
    """
    require(
        not base.ledgers,
        f"expected no shared ledgers with --public, got {base.ledgers}; a search that costs nothing charges nobody",
    )
    if base.partition == "virtual":
        return "synthetic records, made from the public seed"
    if task.data in _PUBLIC and not base.data:
        return f"the public data set {task.data}"
    require(
        bool(statement),
        f"expected data that is known to be public with --public, got that of task {base.task}; say why it is with "
        "--public-because TEXT, which is recorded, or drop --public",
    )
    return f"by your statement: {statement}"


def _task(name: str) -> Task:
    try:
        return find_task(name)
    except LookupError as error:
        raise PlanError(str(error.args[0] if error.args else error)) from None


def _names(task: Task, base: Scenario) -> list[str]:
    """Returns the names of a task's metrics, from two random public records."""
    shape, _ = published(task, base.data or None)
    if shape is None:
        shape = load_source(task, data=base.data or None).shape
    inputs, targets = task.synthetic(shape, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return list(task.metrics(task.fresh(shape, base.seed).eval()(inputs), targets))


def require_budget(search: Mapping[str, Any], ledgers: Path) -> None:
    """Refuses a search that shared ledgers cannot pay for to its last candidate; nothing is charged or made.

    Args:
        search: What `prepare` returned.
        ledgers: The folder that the candidates will share; may be missing, or hold no ledger yet.

    Raises:
        BudgetExceeded: A ledger has too little left.
        PlanError: The folder holds another split of the same records.
    """
    if not (ledgers / "ledger.jsonl").is_file():
        return
    base = Scenario.from_mapping(search["scenario"])
    words = population_words(base, _task(base.task))
    left = [candidate for candidate in search["candidates"] if candidate["result"] is None]
    events = [Event.from_dict(candidate["event"]) for candidate in left]
    with read_only(ledgers) as accounts:
        if other := another_split({account.population for account in accounts}, base, _task(base.task)):
            if base.persons == "apart":
                raise PlanError(
                    f"expected data of other persons where persons is apart, got another split of the same: {other!r}; "
                    "use its settings, or another folder of ledgers"
                )
        poor = [account for account in accounts if account.population == words and not _pays(account, events)]
    if poor:
        poorest = max(poor, key=lambda account: account.spent / account.grant.epsilon)
        raise BudgetExceeded(
            f"expected ledgers that can pay for all {len(events)} candidates, got {len(poor)} that cannot: "
            f"{poorest.name} has spent epsilon {poorest.spent:.3g} of {poorest.grant.epsilon:g}; try fewer candidates, "
            "or a smaller epsilon for the search"
        )


def _pays(account: Account, events: Sequence[Event]) -> bool:
    """Whether a ledger affords all events together, as its own filter counts."""
    grant = account.grant
    needed = sum(rdp(event, grant.order) for event in events)
    return account.spent_rdp + needed <= grant.budget_rdp * (1 + 1e-9)


# -- running --------------------------------------------------------------------------------------------------------


def run(search: dict[str, Any], out: Path, observer: Observer) -> dict[str, Any]:
    """Runs a search in a new folder.

    Args:
        search: What `prepare` returned.
        out: Folder to make.
        observer: Watches.

    Returns:
        The search with its results; also in ``search.json``.

    Raises:
        TacitError: The ledgers cannot pay for all candidates (nothing is left behind), or a candidate cannot be run;
            what was finished is kept and the search can be resumed.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(
            f"expected a new folder for the search, got {out} which is in use; choose another or --resume it"
        )
    base = Scenario.from_mapping(search["scenario"])
    with _alone(out):
        if search["public"] is None:
            require_budget(search, _ledgers(base, out))
        _save(search, out)
        try:
            if search["public"] is None:
                _open_ledgers(search, base, _task(base.task), _ledgers(base, out))
        except TacitError:
            # Refused before anything ran: a start that failed leaves nothing to resume.
            (out / SEARCH_FILE).unlink()
            with contextlib.suppress(OSError):
                out.rmdir()
            raise
        return _go_on(search, out, observer)


def resume(out: Path, observer: Observer) -> dict[str, Any]:
    """Goes on with a search; finished candidates are not run again, and a killed one goes on where it was.

    Raises:
        TacitError: The folder holds no search, or as for `run`.
    """
    out = out.resolve()
    with _alone(out):
        return _go_on(read(out), out, observer)


def read(out: Path) -> dict[str, Any]:
    """Reads the search of a folder.

    Raises:
        RunError: There is none, or it is damaged.
    """
    path = out / SEARCH_FILE
    try:
        search = json.loads(path.read_text())
        if search["schema"] != SCHEMA or not search["candidates"]:
            raise ValueError("not a search of this version")
        if search["public"] is not None:
            base = Scenario.from_mapping(search["scenario"])
            why = _why_public(base, _task(base.task), "said" if search["public"]["stated"] else "")
            # A free search has no ledgers: one that has some was charged, whatever its file says now.
            if _ledgers(base, out).exists() or (why != search["public"]["why"] and not search["public"]["stated"]):
                raise ValueError("it says that it is free, and it is not")
        for candidate in search["candidates"]:
            event = Event.from_dict(candidate["event"])
            planned = calibrate(Scenario.from_mapping(candidate["scenario"]))[0]
            # A priced search gave the noise to each candidate, so nothing is solved anew and the two must agree.
            if search["public"] is None and event != Event.of_schedule(planned):
                raise ValueError(f"candidate {candidate['number']} is not the one that was priced")
        return dict(search)
    except OSError as error:
        raise RunError(
            f"expected a search in {out}, got no {SEARCH_FILE} ({error.strerror}); name a folder that 'tacit tune' made"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"expected a whole {path}, got a damaged one ({error}); restore a backup") from None


def _ledgers(base: Scenario, out: Path) -> Path:
    return Path(base.ledgers).expanduser().resolve() if base.ledgers else out / "ledgers"


def _folder(out: Path, candidate: Mapping[str, Any]) -> Path:
    return out / f"candidate-{candidate['number']:03d}"


def _save(search: Mapping[str, Any], out: Path) -> None:
    write_whole(out / SEARCH_FILE, json.dumps(_plain(search), indent=2, allow_nan=False).encode() + b"\n")


def _plain(value: Any) -> Any:
    """Returns a value that JSON can hold: an infinite figure is a word, as in reports."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "unknown" if math.isnan(value) else "infinity"
    return value


def _go_on(search: dict[str, Any], out: Path, observer: Observer) -> dict[str, Any]:
    base, free = Scenario.from_mapping(search["scenario"]), search["public"] is not None
    observer.planned(search)
    task = _task(base.task)
    ledgers = _ledgers(base, out)
    if not free:
        _open_ledgers(search, base, task, ledgers)
    source = load_source(task, data=base.data or None)
    search["status"] = "running"
    _save(search, out)
    for candidate in search["candidates"]:
        if candidate["result"] is None:
            try:
                summary = _run_one(candidate, _folder(out, candidate), None if free else ledgers, observer)
            except TacitError:
                # What was told before was paid for, and is said whatever stops the rest.
                search["status"] = "stopped"
                _settle_up(search, base, out, None if free else ledgers, source)
                raise
            if summary["status"] == "interrupted":
                search["status"] = "interrupted"
                break
            candidate["result"] = _result(search, candidate, _folder(out, candidate), summary, source)
            _save(search, out)
        observer.candidate(search, candidate)
    else:
        search["status"] = "finished"
    _settle_up(search, base, out, None if free else ledgers, source)
    return search


def _settle_up(search: dict[str, Any], base: Scenario, out: Path, ledgers: Path | None, source: Source) -> None:
    """Writes down what a search found and what it cost, finished or not."""
    _conclude(search, base, out, ledgers, source)
    _save(search, out)
    write_whole(out / TEXT_FILE, words(search).encode())
    if ledgers is not None:
        _tell_the_whole(search, out)


def _tell_the_whole(search: Mapping[str, Any], out: Path) -> None:
    """Writes each candidate's report anew, now that the ledgers hold the whole search (guarantee G5).

    A report was written when its candidate ended, before the later ones were charged: the first candidate's would say
    what one candidate costs, and if it wins, that is the report that goes with the model.
    """
    for candidate in search["candidates"]:
        folder = _folder(out, candidate)
        # A folder that somebody removed has no report that could say too little.
        if candidate["result"] is not None and (folder / CONFIG_FILE).exists():
            render(folder)


def _open_ledgers(search: Mapping[str, Any], base: Scenario, task: Task, folder: Path) -> None:
    """Grants every client the budget of the whole search, where its ledger has no budget yet.

    The first run of a folder sets its budgets. Left to the first candidate, they would be those of one candidate.
    """
    words = population_words(base, task)
    grant = Grant(
        epsilon=search["budget"],
        delta=base.delta,
        order=search["price"]["order"],
        records_bound=search["records_bound"],
    )
    names = [World.name_of(index) for index in range(base.clients)]
    with Book(folder, words) as book:
        book.grant(dict.fromkeys(names, grant), population=words, no_person_in_common=base.persons == "apart")


def _run_one(
    candidate: Mapping[str, Any], folder: Path, ledgers: Path | None, observer: Observer
) -> Mapping[str, object]:
    watcher = _Quiet(observer)
    if (folder / CONFIG_FILE).exists():
        return simulate(Scenario.from_run(folder), resume=folder, observer=watcher)
    scenario = Scenario.from_mapping(candidate["scenario"])
    # Resolved values are given values: the run must be the one that was priced.
    scenario = dataclasses.replace(scenario, out="", ledgers="" if ledgers is None else str(ledgers))
    return simulate(scenario, out=folder, observer=watcher)


def _result(
    search: Mapping[str, Any],
    candidate: Mapping[str, Any],
    folder: Path,
    summary: Mapping[str, Any],
    source: Source,
) -> dict[str, Any]:
    """Returns what a finished candidate is judged by."""
    scenario = Scenario.from_mapping(candidate["scenario"])
    chosen, _ = _halves(len(source.test), search["validation"], scenario.seed)
    return {
        "folder": folder.name,
        "job": Settled.load(folder).id,
        "status": summary["status"],
        "metrics": _metrics(folder, scenario, source, chosen),
        "updates": _updates(folder),
        "seconds": summary["seconds"],
    }


def _updates(folder: Path) -> int:
    """Returns how many updates of clients reached the server in a run, by its log."""
    lines = (folder / METRICS).read_text().splitlines() if (folder / METRICS).exists() else []
    return sum(int(json.loads(line)["replies"]) for line in lines)


def _halves(count: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits the public test set into records to choose on and records to report on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    edge = min(max(1, round(count * share)), count - 1) if share and count > 1 else count
    return order[:edge], order[edge:]


def _metrics(folder: Path, scenario: Scenario, source: Source, rows: torch.Tensor) -> dict[str, float]:
    """Returns a candidate's final metrics on some records of the public test set."""
    task = _task(scenario.task)
    model = task.fresh(source.shape, scenario.seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load(folder / CHECKPOINT, vault_of(scenario)).model.items():
            parameters[name].copy_(torch.from_numpy(value))
        model.eval()
        outputs = torch.cat([model(part) for part in torch.split(source.test.inputs[rows], 1024)])
        return {name: float(value) for name, value in task.metrics(outputs, source.test.targets[rows]).items()}


def less_is_better(metric: str) -> bool:
    """Says whether a metric counts faults: its name speaks of a loss or an error."""
    return any(word in metric.lower() for word in ("loss", "error", "perplexity", "rmse"))


def _conclude(search: dict[str, Any], base: Scenario, out: Path, ledgers: Path | None, source: Source) -> None:
    """Chooses the winner among what finished, and states what the whole search cost."""
    metric, sign = search["metric"], -1 if less_is_better(search["metric"]) else 1
    able = [
        candidate
        for candidate in search["candidates"]
        if candidate["result"] is not None
        and candidate["result"]["status"] == str(Ending.FINISHED)
        and _is_finite(candidate["result"]["metrics"].get(metric))
    ]
    best = max(able, key=lambda candidate: sign * candidate["result"]["metrics"][metric], default=None)
    search["winner"] = best["number"] if best is not None and search["status"] == "finished" else None
    _, rest = _halves(len(source.test), search["validation"], base.seed)
    # Of the winner alone, and only now: a choice that had seen these records would flatter itself.
    if best is not None and search["winner"] is not None and len(rest):
        scenario = Scenario.from_mapping(best["scenario"])
        search["held_out"] = _metrics(_folder(out, best), scenario, source, rest)
    if ledgers is None:
        search["total"] = {
            "epsilon": 0.0,
            "basis": f"nothing was charged to anybody: {search['public']['why']}",
            "spent": 0.0,
        }
        return
    with read_only(ledgers) as accounts:
        words = population_words(base, _task(base.task))
        search["total"] = total(search, [account for account in accounts if account.population == words])


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def total(search: Mapping[str, Any], accounts: Sequence[Account]) -> dict[str, Any]:
    """States what a search cost, from the ledgers that paid for it.

    Args:
        search: The search; its price was settled before the first candidate.
        accounts: The ledgers of its population, as they are now.

    Returns:
        ``epsilon``: for whoever the headline protects, all candidates together; infinity under test noise, NaN where it
        is unknown. ``basis`` says how it was found: by PLD only where the ledgers hold this committed search and
        nothing else. ``spent``: what the most-spent ledger counts. ``charged``: by candidate number, its charges alone,
        by the same filter.
    """
    jobs = {c["result"]["job"]: c["number"] for c in search["candidates"] if c["result"] is not None}
    if any(account.test for account in accounts):
        return {"epsilon": math.inf, "basis": "a test noise source was used", "spent": math.inf, "charged": {}}
    charged: dict[str, float] = {}
    for account in accounts:
        for job, number in jobs.items():
            if (state := account.jobs.get(job)) is not None:
                alone = state.charges * rdp(state.events, account.grant.order)
                at = _at(account.grant, search["delta"]).epsilon_of(alone)
                charged[str(number)] = max(charged.get(str(number), 0.0), at)
    spent = max((_spent(account, search["delta"]) for account in accounts), default=0.0)
    if unpaid := _unpaid(search, accounts):
        # An update that nobody paid for has a cost that nobody knows (guarantee G6).
        basis = f"the ledgers hold fewer charges than updates arrived of candidate {unpaid[0]}"
        return {"epsilon": math.nan, "basis": basis, "spent": spent, "charged": charged}
    many = search["multiplicity"]
    paid = [account for account in accounts if account.charges]
    across = composed_epsilon(paid, many, search["delta"]) if many > 1 else spent
    if _as_committed(search, accounts):
        # Priced anew from what the ledgers were just compared with: a stored figure proves nothing.
        events = [Event.from_dict(candidate["event"]) for candidate in search["candidates"]]
        cost = price(events, Scenario.from_mapping(search["scenario"]))
        tight = cost["pld"] is not None
        basis = f"all {len(search['candidates'])} candidates, priced by {'PLD' if tight else 'the RDP filter'} as one "
        epsilon = cost["person"] if many > 1 else cost["pld"] if tight else cost["epsilon"]
        return {
            "epsilon": epsilon,
            "basis": basis + "schedule that was committed before the first; no refund for stopping",
            "spent": spent,
            "charged": charged,
        }
    return {
        "epsilon": math.nan if across is None else across,
        "basis": "the ledgers' RDP filter over everything that they hold, this search and other runs",
        "spent": spent,
        "charged": charged,
    }


def _at(grant: Grant, delta: float) -> Grant:
    """Returns a holder's filter read at the search's delta, where the holder's own is larger.

    At a larger delta the same divergence is a smaller epsilon, which must not be printed beside the smaller delta. At a
    smaller one it is a larger epsilon, which holds at the larger delta too.
    """
    # Only read, never charged: a budget that no order could hold at that delta must not be in the way.
    return dataclasses.replace(grant, epsilon=1e9, delta=min(grant.delta, delta))


def _spent(account: Account, delta: float) -> float:
    """Returns what an account has spent, as epsilon that holds at the search's delta."""
    return _at(account.grant, delta).epsilon_of(account.spent_rdp)


def _unpaid(search: Mapping[str, Any], accounts: Sequence[Account]) -> list[int]:
    """Returns the candidates of which more updates arrived than the ledgers hold charges for."""
    found = []
    for candidate in search["candidates"]:
        if (result := candidate["result"]) is not None:
            states = [account.jobs.get(result["job"]) for account in accounts]
            if sum(state.charges for state in states if state is not None) < result["updates"]:
                found.append(candidate["number"])
    return found


def _as_committed(search: Mapping[str, Any], accounts: Sequence[Account]) -> bool:
    """Whether ledgers hold nothing but charges that the search committed to: each schedule once, and not exceeded."""
    for account in accounts:
        wanted = [Event.from_dict(candidate["event"]) for candidate in search["candidates"]]
        for state in account.jobs.values():
            whole, *more = state.whole
            if more or whole not in wanted or state.charges > state.joins:
                return False
            wanted.remove(whole)
    return True


def words(search: Mapping[str, Any]) -> str:
    """Returns a search in plain words: the candidates, the winner, and what all of it cost."""
    metric, found, delta = search["metric"], search["total"], search["delta"]
    epsilon = found["epsilon"]
    lines = [
        f"A search over {len(search['candidates'])} candidates for {search['task']}, {search['status']}.",
        "",
    ]
    if search["public"] is not None:
        lines.append(f"It cost no privacy: {found['basis']}.")
    else:
        shown = f"{math.ceil(100 * epsilon - 1e-6) / 100:.2f}" if _is_finite(epsilon) else str(_plain(epsilon))
        lines.append(f"The whole search cost epsilon {shown} at delta {delta:g} for each client: {found['basis']}.")
    lines += ["", *(_candidate_words(candidate, metric) for candidate in search["candidates"]), ""]
    lines += [*judgement(search), ""]
    return "\n".join(lines)


def _candidate_words(candidate: Mapping[str, Any], metric: str) -> str:
    result = candidate["result"]
    settings = ", ".join(f"{name} {value}" for name, value in candidate["settings"].items())
    value = "not run" if result is None else f"{metric} {figure(result['metrics'][metric])}"
    if result is not None and result["status"] != str(Ending.FINISHED):
        value += f" ({result['status']})"
    return f"{candidate['number']:>4}  {settings}: {value}"


def figure(value: object) -> str:
    """Returns a metric in four digits; what is no finite number stays a word."""
    return f"{value:.4f}" if _is_finite(value) else str(_plain(value))


def judgement(search: Mapping[str, Any]) -> list[str]:
    """Returns the sentences about the winner, and about how far its figure may be trusted."""
    metric = search["metric"]
    if search["winner"] is None:
        return ["No winner: the search is not finished, or no candidate is sound."]
    best = search["candidates"][search["winner"] - 1]
    settings = ", ".join(f"{name} {value}" for name, value in best["settings"].items())
    lines = [f"Candidate {best['number']} wins ({settings}); its model is in {best['result']['folder']}."]
    if search["held_out"] is not None:
        lines.append(
            f"It was chosen on {100 * search['validation']:g} % of the server's public test set; on the rest, which "
            f"the choice never saw, its {metric} is {figure(search['held_out'][metric])}."
        )
    else:
        lines.append(
            f"It was chosen on the test set itself, so its {metric} there flatters it; --validation 0.5 keeps half of "
            "that set out of the choice."
        )
    return lines
