"""A simulated federation on disk and in memory: who its clients are, and everything they bring.

A `World` is opened from a run folder by every process that needs it (this one, worker processes, Ray actors), and all
see the same: the partition and the tasks come from the scenario, the plan from ``job.json``, spend from the ledgers.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final, Self

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.app import parse_request
from clients.data import Source, load_source
from clients.holder import Holder, Kept, SecureSources, Sources, content_of, noise_name
from clients.metrics import Judge
from clients.plain import PlainTrainer, check_unit
from clients.records import Records, faults
from models.catalog import find_task
from models.task import Shape, Task
from privacy.accounting import Event, Grant, best_order, solve_noise
from privacy.dpsgd import PrivateTrainer, check_model, choose_mode, probe, supported_modes
from privacy.errors import BudgetExceeded, DataError, PlanError, RunError, TacitError
from privacy.files import write_whole
from privacy.ledger import Book, ChargeRequest, Receipt, Word, may_hold_charges
from privacy.matrix import Matrix, matrix_event
from privacy.plan import Banded, Local, Mode, Optimizer, Plan, Unit
from privacy.vault import Safe, private
from privacy.vault.keys import Opener
from privacy.vault.private import RING
from privacy.vault.unlock import keyring_at
from server.app import CHECKPOINT, joins_of
from simulations.partition import Population, Split, SplitPopulation, VirtualPopulation, label_table, split
from simulations.scenario import CONFIG_FILE, Scenario

# Who takes part in a run on separate machines; no simulation has it.
MEMBERS: Final = "members.json"
JOB_FILE: Final = "job.json"
# Beyond this many clients, accounts are opened when a client is first asked, and data is checked when first used.
_EAGER_CLIENTS: Final = 2000
_TICKET: Final = "tacit.ticket"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settled:
    """What a job has settled before its first round, for all its resumptions: the content of ``job.json``.

    Attributes:
        id: Random job identity, 32 hex digits.
        plan: The plan, its noise solved and its mode resolved.
        local: Learning knobs.
        order: Renyi order of new grants.
        device: Resolved device.
        ledgers: Folder of the ledgers.
        population: Public words for whose ledgers these are.
        started: ISO 8601 time.
        code: SHA-256 of this program's source.
    """

    id: str
    plan: Plan
    local: Local
    order: float
    device: str
    ledgers: str
    population: str
    started: str
    code: str

    def save(self, folder: Path) -> None:
        """Writes ``job.json``."""
        # A plan has one text, here too.
        fields = dataclasses.asdict(self) | {"plan": json.loads(self.plan.to_json())}
        write_whole(folder / JOB_FILE, json.dumps(fields, indent=2).encode())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads ``job.json``.

        Raises:
            RunError: It is missing or damaged.
        """
        try:
            fields = json.loads((folder / JOB_FILE).read_text())
            fields["plan"] = Plan.from_json(json.dumps(fields["plan"]))
            fields["local"] = Local.from_json(json.dumps(fields["local"]))
            return cls(**fields)
        except OSError as error:
            raise RunError(f"expected a run folder with {JOB_FILE} at {folder}, got {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"expected a whole {JOB_FILE} in {folder}, got a damaged one ({error})") from None


@dataclasses.dataclass(eq=False, kw_only=True)
class World:
    """One simulated federation.

    Attributes:
        folder: Run folder.
        scenario: Resolved scenario.
        settled: What the job settled.
        task: What is learned.
        source: The data set, or None for a virtual population.
        population: The clients' records.
        book: Ledgers of all clients.
        kept: Stored releases.
        sources: Randomness of releases.
        commitments: Keyed commitments to each checked client's records, by name.
    """

    folder: Path
    scenario: Scenario
    settled: Settled
    task: Task
    source: Source | None
    population: Population
    book: Book
    kept: Kept
    sources: Sources
    commitments: dict[str, str] = dataclasses.field(default_factory=dict)
    _paid: dict[tuple[str, str], Receipt | Word] = dataclasses.field(default_factory=dict)

    @classmethod
    def create(cls, scenario: Scenario, folder: Path, sources: Sources | None = None) -> Self:
        """Settles a job and makes its run folder; on any error nothing is left behind.

        Raises:
            TacitError: The scenario cannot be run; the message says why.
        """
        if folder.exists() and not _free(folder) and not _unsettled(folder):
            raise RunError(f"expected a new run folder, got {folder} which is in use; choose another or --resume it")
        sources = sources or SecureSources()
        task = _task(scenario.task)
        # A keyring that does not open must be found before a ledger pays for anything.
        vault_of(scenario)
        source, population = populate(scenario, task)
        published = source.declared_records if source is not None else None
        scenario = scenario.resolved(published)
        settled = settle(scenario, task, population.shape)
        made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # First the scenario, last the job: a start that was killed in between can be resumed from the scenario.
            scenario.save(folder)
            _share_vault(scenario, folder)
            world = cls._assemble(scenario, settled, task, source, population, folder, sources)
            world._preflight()
            world._require_budget()
            settled.save(folder)
        except OSError as error:
            _forget(folder, made)
            raise RunError(f"expected to make the run folder {folder}, got {error.strerror}; free some space") from None
        except Exception:
            _forget(folder, made)
            raise
        return world

    @classmethod
    def open(
        cls, folder: Path, sources: Sources | None = None, scenario: Scenario | None = None, *, vouch: bool = False
    ) -> Self:
        """Opens an existing run folder.

        Args:
            folder: A folder that `create` made.
            sources: Randomness; the production source by default.
            scenario: The folder's scenario, where it runs on another machine set-up; read from the folder by default.
            vouch: Whether the book keeps which receipts its chains stand for.

        Raises:
            TacitError: The folder is no run folder, or its ledgers are damaged.
        """
        # Its clients are elsewhere: simulated ones would go on with their job, and charge ledgers that are not theirs.
        if (folder / MEMBERS).exists():
            raise RunError(
                f"expected the folder of a simulation, got {folder}, whose clients are on separate machines; "
                "go on with: tacit server run --resume"
            )
        scenario = scenario or Scenario.from_run(folder)
        if _unsettled(folder):
            # Killed while it started, before anything could be charged.
            return cls.create(scenario, folder, sources)
        settled = Settled.load(folder)
        task = _task(scenario.task)
        source, population = populate(scenario, task)
        world = cls._assemble(
            scenario, settled, task, source, population, folder, sources or SecureSources(), vouch=vouch
        )
        world._preflight()
        return world

    @classmethod
    def _assemble(
        cls,
        scenario: Scenario,
        settled: Settled,
        task: Task,
        source: Source | None,
        population: Population,
        folder: Path,
        sources: Sources,
        *,
        vouch: bool = False,
    ) -> Self:
        ledgers = Path(settled.ledgers) if settled.ledgers else folder / "ledgers"
        book = Book(ledgers, settled.population, vouch=vouch)
        # Decided when the run begins: what is kept in one way is not found in the other, and would be charged again.
        sealed = os.path.lexists(folder / RING)
        return cls(
            folder=folder,
            scenario=scenario,
            settled=settled,
            task=task,
            source=source,
            population=population,
            book=book,
            kept=Kept(folder / "kept", durable=False, safe=Safe(book.secret, "kept") if sealed else None),
            sources=sources,
        )

    # -- clients ------------------------------------------------------------------------------------------------

    @staticmethod
    def name_of(index: int) -> str:
        """Returns the pseudonym of a client, from 0."""
        return f"client-{index:05d}"

    def _preflight(self) -> None:
        """Opens accounts and checks every client's records, before any charge; a simulation's faults are errors."""
        if self.population.clients > _EAGER_CLIENTS:
            return
        names = [self.name_of(index) for index in range(self.population.clients)]
        for index, name in enumerate(names):
            records = self.population.records_of(index)
            if found := faults(records, self.population.shape):
                raise DataError(f"expected sound records at {name}, got {found[0]}; repair the data set")
            self._require_bound(name, records)
            self.commitments[name] = self.book.secret.commitment(name, content_of(records))
        self._grant(names)

    def _require_bound(self, name: str, records: Records) -> None:
        """Refuses a client with more records than the plan declares: delta would mean less than it says (G2)."""
        bound = self.settled.plan.records_bound
        if len(records) > bound:
            raise DataError(
                f"expected at most records-bound = {bound} records at {name}, got {len(records)}; "
                "raise records-bound, or use more clients"
            )

    def _require_budget(self) -> None:
        """Refuses a job that too few ledgers can pay to its end; a start that must fail should cost nothing.

        Raises:
            BudgetExceeded: Fewer clients than ``min-replies`` have enough left.
        """
        plan = self.settled.plan
        turns = plan.turns or joins_of(plan.rounds, self.scenario.clients, self.scenario.cohort)
        whole = Event.all_of_schedule(plan, turns)
        accounts = self.book.accounts.values()
        # In a large population accounts are opened when a client is first asked: these have everything left.
        unopened = self.population.clients - len(accounts)
        able = unopened + sum(account.grant.affords(account.spent_rdp, whole) for account in accounts)
        if others := {account.grant.unit for account in accounts} - {plan.unit}:
            raise BudgetExceeded(
                f"expected ledgers that were granted for {plan.unit}s, got ones for {min(others)}s, which decline "
                "every charge of this job; use another folder of ledgers"
            )
        # At unit client no reply is needed for a round; a job that half of the clients cannot pay is a mistake anyway.
        wanted = self.scenario.min_replies or max(1, self.scenario.clients // 2)
        if accounts and able < wanted:
            richest = min(accounts, key=lambda account: account.spent)
            raise BudgetExceeded(
                f"expected at least {wanted} ledgers that can pay for the whole job, got {able}: "
                f"the least used has spent epsilon {richest.spent:.3g} of {richest.grant.epsilon:g}; "
                "another run on these data sets needs budget that was not granted"
            )

    def _grant(self, names: Sequence[str]) -> None:
        plan = self.settled.plan
        grant = Grant(
            epsilon=plan.epsilon,
            delta=plan.delta,
            order=self.settled.order,
            unit=plan.unit,
            records_bound=plan.records_bound,
        )
        apart = self.scenario.persons == "apart"
        if apart and (other := another_split(self.book.populations, self.scenario, self.task)):
            raise PlanError(
                f"expected data of other persons where persons is apart, got another split of the same: {other!r}; "
                "use its settings, or another folder of ledgers"
            )
        self.book.grant({name: grant for name in names}, population=self.settled.population, no_person_in_common=apart)

    def holder(self, context: Context) -> Holder:
        """Returns the data holder that a context belongs to."""
        index = int(str(context.node_config["partition-id"]))
        if not 0 <= index < self.population.clients:
            raise RunError(f"expected {self.population.clients} nodes, got one with partition {index}; set clients")
        name = self.name_of(index)

        def load() -> Records:
            records = self.population.records_of(index)
            self._require_bound(name, records)
            return records

        def pay(request: ChargeRequest) -> Receipt | Word:
            paid = self._paid.pop((name, request.request), None) or _ticket(context, request.request)
            if paid is not None:
                return paid
            if name not in self.book.accounts:
                self._grant([name])
            return self.book.charge([request])[0]

        return Holder(
            name=name,
            task=self.task,
            shape=self.population.shape,
            load=load,
            book=self.book,
            kept=self.kept,
            sources=self.sources,
            pay=pay,
            commitment=self.commitments.get(name, ""),
            # Where a resumed job goes on with other code, the newest is the one that runs.
            code=self.settled.code[-64:],
            device=self.settled.device,
            simulated=True,
            # Who simulates is every holder, and asks with the plan's own words.
            allow_metrics=frozenset(self.settled.plan.metrics.words if self.settled.plan.metrics else ()),
            # Whoever chose the scenario plays every holder of it, and chose their policy too.
            allow_central=self.scenario.unit == Unit.CLIENT,
        )

    def charge_cohort(self, pairs: Sequence[tuple[Message, Context]]) -> None:
        """Gates and charges a whole cohort with one sync, before any of its data is touched (guarantee G8).

        Args:
            pairs: Each client's message and context; the outcome waits for the client's own `Holder.charge`.
        """
        wanted: list[tuple[Context, ChargeRequest]] = []
        for message, context in pairs:
            holder, request = self.holder(context), parse_request(message)
            # What was kept is sent again, and must not be charged again (guarantee G9).
            if not holder.allows(request.plan):
                continue
            if self.kept.get(request.job, holder.account(), request.digest) is None:
                charge = request.charge_of(
                    holder.name, noise=noise_name(self.sources), commitment=holder.commitment, code=holder.code
                )
                wanted.append((context, charge))
        self._grant([charge.name for _, charge in wanted if charge.name not in self.book.accounts])
        outcomes = self.book.charge([charge for _, charge in wanted])
        self._paid.clear()
        for (context, charge), outcome in zip(wanted, outcomes, strict=True):
            if self.scenario.workers > 1:
                text = outcome.to_json() if isinstance(outcome, Receipt) else outcome.value
                context.state[_TICKET] = ConfigRecord({"request": charge.request, "outcome": text})
            else:
                self._paid[charge.name, charge.request] = outcome

    # -- what only a simulation knows -----------------------------------------------------------------------------

    def truth(self) -> dict[str, Any] | None:
        """Returns exact counts for the report's section "simulation only"; None for a virtual population."""
        if self.source is None or not isinstance(self.population, SplitPopulation):
            return None
        targets, names = self.source.train.targets, list(self.source.classes)
        if self.source.shape.targets:
            # A sequence has no one class to count it by.
            targets, names = torch.zeros(len(targets), dtype=torch.int64), ["records"]
        table = label_table(self.population.parts, targets, len(names))
        return {
            "label_table": table,
            "class_names": names,
            "sizes": [sum(row) for row in table],
            "partition": _partition_words(self.scenario),
            "truth": "Exact counts of every client; a deployment has no such section.",
        }


def _ticket(context: Context, request: str) -> Receipt | Word | None:
    """Takes the outcome that the engine's process left for a worker process; it serves one request, once."""
    ticket = context.state.get(_TICKET)
    if not isinstance(ticket, ConfigRecord):
        return None
    del context.state[_TICKET]
    if ticket["request"] != request:
        return None
    text = str(ticket["outcome"])
    return Receipt.from_json(text) if text.startswith("{") else Word(text)


def _free(folder: Path) -> bool:
    """Says whether a folder holds nothing but what a start left that was killed in its first write, or its clean-up."""
    return folder.is_dir() and all(
        _is_draft(entry) or (entry.name == "ledgers" and not _charged(folder) and all(map(_is_of_a_book, _in(entry))))
        for entry in folder.iterdir()
    )


def _unsettled(folder: Path) -> bool:
    """Says whether a start was killed here after its scenario was written and before anything could be charged."""
    if (folder / JOB_FILE).exists() or (folder / CHECKPOINT).exists() or _charged(folder):
        return False
    try:
        # Somebody else's config.json is not a run that was killed.
        Scenario.from_run(folder)
    except TacitError:
        return False
    return True


def _charged(folder: Path) -> bool:
    """Says whether a run folder's own ledgers hold a charge, or may have held one; such ledgers are never removed."""
    return may_hold_charges(folder / "ledgers")


def _is_draft(path: Path) -> bool:
    return path.name.startswith((f".{CONFIG_FILE}.", f".{JOB_FILE}.")) or _is_link_to_keys(path)


def _is_of_a_book(path: Path) -> bool:
    return (path.is_file() and path.name.startswith(("ledger.", ".ledger."))) or _is_link_to_keys(path)


def _is_link_to_keys(path: Path) -> bool:
    return path.name == RING and path.is_symlink()


def _in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _forget(folder: Path, made: bool) -> None:
    """Removes what a failed start wrote into a folder: its own few files, and ledgers only if they are unused."""
    if _charged(folder):
        return
    book = folder / "ledgers"
    for path in (folder / JOB_FILE, *filter(_is_draft, _in(folder)), *filter(_is_of_a_book, _in(book))):
        path.unlink(missing_ok=True)
    if book.is_dir() and not _in(book):
        book.rmdir()
    # Last, for a kill before this leaves a start that can be gone on with.
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    if made and folder.is_dir() and not _in(folder):
        folder.rmdir()


def _share_vault(scenario: Scenario, folder: Path) -> None:
    """Has the private files of a run sealed for the scenario's keyring, as a deployment's are; only where it names one.

    Those are the server's key, the ledgers' own key where they lie in the folder, and with it the releases that are
    kept. The folder gets a link to the keyring: a copy of it elsewhere opens nothing.
    """
    if not scenario.vault:
        return
    ring = Path(scenario.vault).expanduser().absolute()
    for place in (folder, folder / "ledgers"):
        if place == folder or not scenario.ledgers:
            place.mkdir(mode=0o700, exist_ok=True)
            private.link_ring(ring, place)


def vault_of(scenario: Scenario) -> list[Opener]:
    """Returns what opens a run's sealed checkpoints, by its scenario; empty where it names no keyring.

    Raises:
        VaultError: The keyring does not open.
    """
    ring = keyring_at(scenario.vault)
    return [] if ring is None else [ring]


def _task(name: str) -> Task:
    try:
        return find_task(name)
    except LookupError as error:
        raise PlanError(str(error.args[0] if error.args else error)) from None


def populate(scenario: Scenario, task: Task) -> tuple[Source | None, Population]:
    """Loads the data and splits it among the clients.

    Raises:
        DataError: The data cannot be read, holds a bad record, or leaves a client empty.
        PlanError: The partition does not fit the number of clients.
    """
    source = load_source(task, data=scenario.data or None)
    if scenario.partition == "virtual":
        if not scenario.records_per_client:
            raise PlanError("expected records-per-client with partition virtual, it is missing; 50 is a good start")
        virtual = VirtualPopulation(
            task=task,
            shape=source.shape,
            clients=scenario.clients,
            records=scenario.records_per_client,
            seed=scenario.seed,
        )
        return source, virtual
    parts = split(
        Split(scenario.partition),
        source.train.targets,
        source.keys,
        clients=scenario.clients,
        seed=scenario.seed,
        alpha=scenario.alpha,
    )
    return source, SplitPopulation(source, parts)


def calibrate(scenario: Scenario) -> tuple[Plan, float]:
    """Solves the plan of a resolved scenario on its public numbers alone: the one calibration that there is.

    Returns:
        The plan, whose mode is still the scenario's, and the Renyi order of new grants.

    Raises:
        PlanError: No noise is enough, or values contradict each other.
    """
    if scenario.unit == Unit.CLIENT:
        return central_plan(scenario)
    joins = joins_of(scenario.rounds, scenario.clients, scenario.cohort) + scenario.retries
    steps = scenario.steps_per_round * joins
    metrics = scenario.asked_metrics
    # Every word in every round joined, retries included: as `Event.all_of_schedule` charges them.
    beside = (
        [Event(sample_rate=1.0, noise_multiplier=metrics.noise, steps=joins * len(metrics.words))] if metrics else []
    )
    if scenario.noise_multiplier:
        event = Event(sample_rate=scenario.sample_rate, noise_multiplier=scenario.noise_multiplier, steps=steps)
        noise, (order, epsilon) = scenario.noise_multiplier, best_order((event, *beside), scenario.delta)
        if not math.isfinite(epsilon):
            raise PlanError(f"expected noise that protects at all, got noise-multiplier={noise:g}; 0.5 is little")
    else:
        epsilon = scenario.epsilon
        noise, order = solve_noise(
            epsilon=epsilon, delta=scenario.delta, sample_rate=scenario.sample_rate, steps=steps, beside=beside
        )
    plan = Plan(
        sample_rate=scenario.sample_rate,
        expected_batch=scenario.sample_rate * scenario.records_per_client,
        l2_clip=scenario.l2_clip,
        noise_multiplier=noise,
        steps=scenario.steps_per_round,
        rounds=scenario.rounds,
        joins=joins,
        epsilon=epsilon,
        delta=scenario.delta,
        records_bound=scenario.records_bound,
        mode=Mode(scenario.mode),
        physical_batch=scenario.physical_batch,
        views=scenario.views,
        metrics=metrics,
    )
    return plan, order


def settle(scenario: Scenario, task: Task, shape: Shape) -> Settled:
    """Solves the plan of a resolved scenario, on public values alone.

    Raises:
        PlanError: The model is refused, no noise is enough, or values contradict each other.
    """
    if scenario.weights == "declared" and scenario.engine != "local":
        raise PlanError("expected engine local with declared weights, got ray, where nodes have no fixed numbers")
    check_unit(task, Unit(scenario.unit))
    device = _device(scenario.device)
    if scenario.unit == Unit.CLIENT:
        return _settle_central(scenario, task, shape, device)
    plan, order = calibrate(scenario)
    model = task.fresh(shape, scenario.seed)
    check_model(model)
    generator = torch.Generator().manual_seed(scenario.seed)

    def make_batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return task.synthetic(shape, count, generator)

    expected, mode = plan.expected_batch, plan.mode
    if mode is Mode.AUTO:
        mode = choose_mode(
            model,
            task.loss,
            make_batch,
            expected_batch=expected,
            physical_batch=scenario.physical_batch,
            views=scenario.views,
            augment=task.augment,
            device=device,
        )
    elif mode not in supported_modes(model, scenario.views):
        legal = ", ".join(supported_modes(model, scenario.views))
        raise PlanError(f"expected a mode that is safe for this model ({legal}), got {mode}; leave mode on auto")
    probe(
        model,
        task.loss,
        make_batch,
        mode=mode,
        l2_clip=scenario.l2_clip,
        physical_batch=scenario.physical_batch,
        views=scenario.views,
        augment=task.augment,
        device=device,
    )
    plan = dataclasses.replace(plan, mode=mode)
    local = _local(scenario)
    # What does not run or fit in memory must fail before a ledger pays for it: an engine charges whole cohorts at once.
    PrivateTrainer(model, task.loss, plan=plan, local=local, augment=task.augment, device=device).rehearse(make_batch)
    if plan.metrics is not None:
        Judge(task, shape, scenario.seed, device).rehearse(make_batch)
    return _settled(scenario, task, plan, local, order, device)


def central_plan(scenario: Scenario) -> tuple[Plan, float]:
    """Solves the plan of a resolved scenario at unit client, on its public numbers alone.

    Epsilon is the figure against whoever sees who takes part: no discount for the coins, and the most turns that one
    client's coins may have, retries included, each of which its ledger charges. The smaller figure, of somebody who
    sees models alone, is what a report adds; it is never solved for, because nothing could enforce that nobody learns
    who took part.

    Returns:
        The plan, and the Renyi order of new grants.

    Raises:
        PlanError: No noise is enough, or values contradict each other.
    """
    if scenario.noise == "banded":
        return _banded_plan(scenario)
    joins = scenario.client_turns + scenario.retries
    if scenario.noise_multiplier:
        noise = scenario.noise_multiplier
        event = Event(unit=Unit.CLIENT, sample_rate=1.0, noise_multiplier=noise, steps=joins)
        order, epsilon = best_order(event, scenario.delta)
    else:
        epsilon = scenario.epsilon
        noise, order = solve_noise(epsilon=epsilon, delta=scenario.delta, sample_rate=1.0, steps=joins)
    cohort = scenario.client_rate * scenario.clients
    bit_noise = scenario.bit_noise or max(cohort / 20, 2 * noise)
    plan = Plan(
        unit=Unit.CLIENT,
        sample_rate=scenario.sample_rate,
        expected_batch=cohort,
        l2_clip=scenario.l2_clip,
        noise_multiplier=noise,
        steps=scenario.steps_per_round,
        rounds=scenario.rounds,
        joins=joins,
        epsilon=epsilon,
        delta=scenario.delta,
        records_bound=scenario.records_bound,
        physical_batch=scenario.physical_batch,
        client_rate=scenario.client_rate,
        turns=scenario.client_turns,
        quantile=scenario.clip_quantile,
        clip_lr=scenario.clip_lr if scenario.clip_quantile else 0.0,
        bit_noise=bit_noise if scenario.clip_quantile else 0.0,
    )
    return plan, order


def _banded_plan(scenario: Scenario) -> tuple[Plan, float]:
    """Solves the plan of banded noise: the whole matrix is one release without sampling, however many rounds it has.

    Raises:
        PlanError: No noise is enough, or the bands do not fit the rounds.
    """
    momentum = scenario.server_momentum if scenario.strategy == "fedavgm" else 0.0
    law = Banded(
        separation=scenario.separation,
        coefficients=_coefficients(scenario.rounds, scenario.separation, scenario.bands, momentum),
    )
    if scenario.noise_multiplier:
        noise = scenario.noise_multiplier
        order, epsilon = best_order(matrix_event(noise), scenario.delta)
        if not math.isfinite(epsilon):
            raise PlanError(f"expected noise that protects at all, got noise-multiplier={noise:g}; 0.5 is little")
    else:
        epsilon = scenario.epsilon
        noise, order = solve_noise(epsilon=epsilon, delta=scenario.delta, sample_rate=1.0, steps=1)
    turns = law.turns_of(scenario.rounds)
    plan = Plan(
        unit=Unit.CLIENT,
        sample_rate=scenario.sample_rate,
        expected_batch=scenario.clients / law.separation,
        l2_clip=scenario.l2_clip,
        noise_multiplier=noise,
        steps=scenario.steps_per_round,
        rounds=scenario.rounds,
        joins=turns,
        epsilon=epsilon,
        delta=scenario.delta,
        records_bound=scenario.records_bound,
        physical_batch=scenario.physical_batch,
        turns=turns,
        banded=law,
    )
    return plan, order


# A sweep plans the same rounds several times, and the search takes a second where there are many.
@functools.lru_cache(maxsize=64)
def _coefficients(rounds: int, separation: int, bands: int, momentum: float) -> tuple[float, ...]:
    """Returns the matrix whose noise disturbs the model least; whichever it is, the price is the same."""
    return Matrix.optimal(rounds=rounds, separation=separation, bands=bands, momentum=momentum).coefficients


def _settle_central(scenario: Scenario, task: Task, shape: Shape, device: str) -> Settled:
    """Settles a job at unit client: nothing is done example by example, so there is no mode to choose or to probe."""
    plan, order = central_plan(scenario)
    local = _local(scenario)
    model = task.fresh(shape, scenario.seed)
    check_model(model)
    generator = torch.Generator().manual_seed(scenario.seed)
    PlainTrainer(model, task, plan=plan, local=local, device=device).rehearse(
        lambda count: task.synthetic(shape, count, generator)
    )
    return _settled(scenario, task, plan, local, order, device)


def _local(scenario: Scenario) -> Local:
    return Local(
        optimizer=Optimizer(scenario.optimizer),
        lr=scenario.lr,
        momentum=scenario.momentum,
        weight_decay=scenario.weight_decay,
        proximal_mu=scenario.proximal_mu,
    )


def _settled(scenario: Scenario, task: Task, plan: Plan, local: Local, order: float, device: str) -> Settled:
    return Settled(
        id=os.urandom(16).hex(),
        plan=plan,
        local=local,
        order=order,
        device=device,
        ledgers=str(Path(scenario.ledgers).expanduser().resolve()) if scenario.ledgers else "",
        population=population_words(scenario, task),
        started=now(),
        code=code_hash(),
    )


def population_words(scenario: Scenario, task: Task) -> str:
    """Returns public words that differ whenever the same records, or the same persons, might be split in another way.

    They stand in every grant, so neither the split nor the multiplicity can be changed after the fact.
    """
    split = f"{_partition_words(scenario)} over {scenario.clients} clients, seed {scenario.seed}"
    return f"{_data_words(scenario, task)}, {split}, one person in at most {scenario.multiplicity} of them"


def another_split(populations: Collection[str], scenario: Scenario, task: Task) -> str:
    """Returns which of a book's populations is the same data set as a scenario's, split anew; or an empty string."""
    others = set(populations) - {population_words(scenario, task)}
    return next((other for other in sorted(others) if other.startswith(f"{_data_words(scenario, task)}, ")), "")


def _data_words(scenario: Scenario, task: Task) -> str:
    place = f" at {Path(scenario.data).expanduser().resolve()}" if scenario.data else ""
    return f"{task.data if isinstance(task.data, str) else task.name}{place}"


def _partition_words(scenario: Scenario) -> str:
    alpha = f" (alpha {scenario.alpha:g})" if scenario.partition in (Split.DIRICHLET, Split.QUANTITY) else ""
    return f"{scenario.partition}{alpha}"


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = wanted.partition(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available()}
    if not there.get(kind, False):
        raise PlanError(f"expected a device that this machine has, got {wanted}; use auto or cpu")
    return wanted


def now() -> str:
    """Returns the time as ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def code_hash() -> str:
    """Returns a SHA-256 over this program's own source files, in hex."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for room in ("clients", "models", "privacy", "server", "simulations"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\n{path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def server_context(folder: Path, run_id: int) -> Context:
    """Returns the server's context for a run folder."""
    return Context(run_id=run_id, node_id=0, node_config={}, state=RecordDict(), run_config={"run": str(folder)})
