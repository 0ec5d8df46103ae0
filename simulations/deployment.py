"""The same scenario on separate machines: what the server application does, from a scenario to a report.

A scenario that was simulated can be deployed unchanged. What it says about one machine (partition, engine, workers,
ledgers) does not count: real clients bring their own data, machines and ledgers. What is solved is the same plan.

A run folder holds ``config.json``, ``job.json``, ``members.json`` (who takes part, fixed before the first round),
``metrics.jsonl``, ``receipts.jsonl``, ``checkpoints/``, ``papers.json`` (what each client's ledger says of its budget
and of this job, signed by it), ``status.json``, and the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from clients.data import load_source
from models.catalog import find_task
from privacy.accounting import Event, best_affordable_order, events_from_json, solve_noise
from privacy.errors import LedgerError, PlanError, RunError, TacitError
from privacy.files import write_whole
from privacy.ledger import grant_of, require_signed_entry
from privacy.noise import SECURE_SOURCE, Keystream
from privacy.plan import Unit, canonical
from privacy.report import ClientSpend, RunFacts, Verdict, write
from privacy.terms import Terms
from privacy.transcript import iso
from privacy.vault import private
from privacy.vault.keys import Keyring
from privacy.wire import settings_digest
from server.aggregate import Aggregator, Strategy
from server.app import CHECKPOINT, METRICS, RECEIPTS, Ending, Job, Schedule, run
from server.checkpoint import Newest, load
from server.gateway import ring
from server.home import ServerHome
from server.relay import Relay
from server.sealed import Member, RunOverError, SealedGrid
from server.services import Places, Progress, members_of, told_by
from simulations.evidence import (
    PATHS,
    Countersigned,
    prices_of,
    read_countersigned,
    read_rounds,
    receipts_file,
    versions,
)
from simulations.run import Observer
from simulations.scenario import Scenario
from simulations.world import MEMBERS, Settled, code_hash, now, settle

PAPERS: Final = "papers.json"
STATUS: Final = "status.json"
# Seconds to wait for a round's replies where the scenario gives no limit.
_ROUND_S: Final = 3600.0
# Seconds to wait for the papers of clients that answered in this round.
_PAPERS_S: Final = 5.0
# Longest wait for a relay that went away, in seconds; an operator may come back the next morning.
RELAY_WAIT_S: Final = 24 * 3600.0
# Longest wait for enrolled members to be let in at the relay, in seconds, and between two looks.
_LET_IN_S: Final = 15.0
_POLL_S: Final = 0.25
# Seconds between two attempts to begin another run.
_PAUSE_S: Final = 2.0
# Runs that a relay may end one after the other without a round in between.
_MOST_FRUITLESS: Final = 5


def deploy(
    scenario: Scenario,
    home: ServerHome,
    folder: Path,
    *,
    resume: bool,
    wait_s: float,
    observer: Observer,
    relay_wait_s: float = RELAY_WAIT_S,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, object]:
    """Runs, or resumes, a job over a home's relay.

    A relay that goes away is waited for, and a job whose run it has given up meanwhile goes on in another run, from the
    last checkpoint: the interrupted round is asked for again, and answered with what was kept (guarantee G9).

    Args:
        scenario: What to run.
        home: The server's home; its relay and gateway must run.
        folder: Run folder, new or to go on with.
        resume: Whether to go on.
        wait_s: Longest wait for the clients before the first round, in seconds.
        observer: Watches.
        relay_wait_s: Longest wait for a relay that went away, in seconds.
        stopping: Asked after each round; true ends the run there, to be resumed.

    Returns:
        The summary: status, rounds, metrics, clients, seconds, run.

    Raises:
        TacitError: The scenario cannot be run, the relay does not answer, or too few clients are ready.
        KeyboardInterrupt: It was told to stop while it waited; the job can be resumed.
    """
    began = time.perf_counter()
    places, identity = Places(home), home.application_identity()
    with _alone(home.folder / "application"):
        settled, scenario = _settled(scenario, places, folder, resume)
        task = find_task(scenario.task)
        source = load_source(task, data=scenario.data or None)
        if not len(source.test):
            raise PlanError("expected a public test set for the server, got none; add test data to the data set")
        terms = Terms(
            job=settled.id,
            task=task.name,
            code=settled.code[-64:],
            plan=settled.plan,
            local=settled.local,
            seed=scenario.seed,
            inputs=tuple(source.shape.inputs),
            classes=source.shape.classes,
            clients=scenario.clients,
            curator=scenario.curator,
            purpose=scenario.purpose,
        )
        observer.started(
            {
                "run": str(folder),
                "task": task.name,
                "clients": scenario.clients,
                "rounds": settled.plan.rounds,
                "plan": json.loads(settled.plan.to_json()),
                "relay": places.address,
                "device": settled.device,
                "resumed": resume,
            }
        )
        lines: list[Mapping[str, Any]] = []
        first = 0.0
        progress = Progress(places, job=settled.id, run=str(folder), task=task.name, rounds=settled.plan.rounds)

        def on_round(line: Mapping[str, Any]) -> None:
            lines.append(line)
            pace = (time.perf_counter() - first) / len(lines)
            # Who leaves later, or withdraws, has said by then what the report needs of it.
            known = _papers_in(folder)
            _keep_papers(
                folder,
                grid.papers(
                    patience_s=_PAPERS_S,
                    among=lambda member, word: word == "answered" and "commit" not in known.get(member.name, {}),
                ),
            )
            progress.tell(status="running", round=line["round"], members=said())
            observer.round(dict(line) | {"left_s": pace * (line["rounds"] - line["round"])})

        def said() -> dict[str, str]:
            return {member.name: word for member, word in grid.words}

        heard: list[str] = []

        def waiting() -> None:
            progress.tell(members=said())
            # In between they are neither ready nor kept from it by anybody.
            words = told_by({name: word for name, word in said().items() if word not in ("not reached", "in session")})
            if words and words not in heard[-1:]:
                heard.append(words)
                observer.note(words)

        def ring_all() -> None:
            for bell in places.bells:
                ring(bell)

        def begun() -> Relay:
            return Relay(
                places.address,
                private.read(places.secret),
                identity,
                authority=places.loopback_authority,
                ring=ring_all,
            )

        def play() -> Ending:
            """Plays the rounds that are left, in the run that is open."""
            observer.note(f"waiting for {scenario.clients} clients, at most {wait_s / 60:g} min")
            if (folder / MEMBERS).exists():
                # They are fixed. One that is gone for ever is missing in every round, and holds up nobody's job.
                grid.gather(scenario.min_replies or 1, patience_s=wait_s, seen=waiting)
            else:
                grid.keep(grid.gather(scenario.clients, patience_s=wait_s, seen=waiting))
                _fix(folder, grid)
            progress.tell(status="running", members=said())
            nonlocal first
            first = first or time.perf_counter()
            job = Job(
                id=settled.id,
                plan=settled.plan,
                local=settled.local,
                task=task,
                shape=source.shape,
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
                weights=lambda node: 1.0,
                min_replies=scenario.min_replies,
                timeout_s=scenario.round_timeout or _ROUND_S,
                evaluate_every=scenario.evaluate_every,
                test=(source.test.inputs, source.test.targets),
                identity=identity,
                folder=folder,
                device=settled.device,
                vault=keyring_of(home),
                newest=newest_of(home, settled.id),
                sources=lambda use, round: Keystream(),
                on_round=on_round,
                stopping=stopping,
            )
            ending = run(job, grid)
            progress.tell(status=str(ending), members=said())
            _keep_papers(folder, grid.papers())
            return ending

        fruitless, done = 0, -1
        with _ended(progress):
            while True:
                try:
                    with contextlib.ExitStack() as stack:
                        relay = _opened(stack, begun, relay_wait_s if fruitless else 0.0, stopping)
                        grid = SealedGrid(
                            relay,
                            _members(places, folder),
                            identity,
                            terms,
                            relay_wait_s=relay_wait_s,
                            stopping=stopping,
                        )
                        ending = play()
                    break
                except RunOverError as error:
                    fruitless, done = (fruitless + 1 if len(lines) == done else 1), len(lines)
                    if fruitless > _MOST_FRUITLESS:
                        raise
                    observer.note(f"{error}; it goes on by itself in another run, once the relay is there")
        write_whole(folder / STATUS, json.dumps({"status": str(ending), "finished": now()}).encode())
        page = render_deployed(folder, home)
    summary: dict[str, object] = {
        "status": "interrupted" if ending is Ending.INTERRUPTED else str(ending),
        "rounds": settled.plan.rounds if ending is Ending.FINISHED else (lines[-1]["round"] if lines else 0),
        "metrics": next((dict(line["metrics"]) for line in reversed(lines) if line["metrics"]), {}),
        "clients": {member.name: word for member, word in grid.words},
        "epsilon_spent": lines[-1]["epsilon"] if lines else None,
        "seconds": time.perf_counter() - began,
        "run": str(folder),
        "report": str(page),
    }
    observer.finished(summary)
    return summary


def keyring_of(home: ServerHome) -> Keyring:
    """Returns the keys that checkpoints of this home are sealed with; makes them where there are none.

    They lie beside the server application's key: a copy of a run folder alone, or of the relay's, opens nothing.

    Raises:
        VaultError: They are damaged, or were given a passphrase that the environment does not hold.
    """
    return private.make_ring(home.folder / "application")


def newest_of(home: ServerHome, job: str) -> Newest:
    """Returns what remembers a job's newest checkpoint: in the home, where a run folder that is put back leaves it.

    Raises:
        VaultError: It was altered, or does not open.
    """
    return Newest(home.folder / "application" / "newest", keyring_of(home), job)


def render_deployed(folder: Path, home: ServerHome, persons: Sequence[int] = ()) -> Path:
    """Writes the report of a deployed run, from its receipts and from what clients signed alone.

    Args:
        folder: Its run folder.
        home: The server's home, whose application countersigned the receipts and signs the report.
        persons: Numbers of records of one person for which the schedule is priced too.

    Raises:
        TacitError: The folder is no run folder of this home, or its receipts are damaged.
    """
    return write(facts_of_deployed(folder, home, persons), folder, home.application_identity())[1]


def facts_of_deployed(folder: Path, home: ServerHome, persons: Sequence[int] = ()) -> RunFacts:
    """Collects what the report of a deployed run is made of.

    The ledgers are elsewhere: at the data holders. Of each, here are the receipts of this job, which say what was spent
    on everything when they were signed, and the signed entries with which the budget and this job began. What a holder
    spent since its last receipt is not known here, and the report says so.

    Raises:
        TacitError: Something is damaged.
    """
    settled, scenario, identity = Settled.load(folder), Scenario.from_run(folder), home.application_identity()
    task = find_task(scenario.task)
    rounds, state = read_rounds(folder), load(folder / CHECKPOINT, [keyring_of(home)], newest_of(home, settled.id))
    lines = read_countersigned(folder, identity)
    papers, members = _papers_in(folder), _members_in(folder)
    # A node's account and its key are pinned by its first receipt; see `server.app.check`.
    pinned = {number: identity.partition(":")[::2] for number, identity in state.identities.items()}
    accounts = {number: account for number, (account, _) in pinned.items()}
    of_account: dict[str, list[Countersigned]] = {account: [] for account in accounts.values()}
    doubts = [] if state.job == settled.id else ["The checkpoint is that of another job."]
    for line in lines:
        if line.receipt.job != settled.id or line.receipt.account not in of_account:
            doubts.append("A receipt is of another job, or of an account that no client of this one has.")
            continue
        of_account[line.receipt.account].append(line)
    for what, found, name in (("rounds", rounds, METRICS), ("receipts", lines, RECEIPTS)):
        if len(found) < (wanted := state.lines.get(name, 0)):
            doubts.append(f"The checkpoint knows of {wanted:,} {what}, {len(found):,} are here.")
    arrived = Counter(round for _, round in {(line.receipt.account, line.receipt.round) for line in lines})
    if lost := {line["round"] for line in rounds if arrived[line["round"]] < line["replies"]}:
        doubts.append(f"In {len(lost):,} rounds more updates arrived than there are receipts.")
    clients, grants, committed = [], [], True
    for member in members:
        account, key = pinned.get(member.number, ("", ""))
        paper, mine = papers.get(member.name, {}), of_account.get(account, [])
        if not account:
            if isinstance(paper.get("commit"), dict):
                doubts.append(f"{member.name} has papers that it committed to this job, and no receipt of it is here.")
            continue
        sound = _is_of(paper, account, key, mine, settled)
        committed &= sound
        declined = int(member.number in state.declined)
        if not mine:
            doubts.append(f"No receipt of {member.name} is here, whose updates arrived.")
            continue
        if sound:
            grants.append(grant_of(paper["grant"]["body"]))
        clients.append(_spend_of(member.name, paper if sound else {}, mine, declined, bool(lost)))
    if len({*accounts.values()}) < len(accounts):
        doubts.append("Two clients have one account, so that one of them is not who it says.")
    if strangers := accounts.keys() - {member.number for member in members}:
        doubts.append(f"Updates of {len(strangers):,} clients arrived that are no members of this job.")
    if not committed:
        doubts.append("A client's commitment to this plan is not here: it did not send its papers, or sent others.")
    status = _json_in(folder / STATUS, dict) if (folder / STATUS).exists() else {}
    same = home.relay_is_server()
    return RunFacts(
        job=settled.id,
        model=state.digest,
        task=task.name,
        task_summary=task.summary,
        record=task.record,
        started=settled.started,
        finished=str(status.get("finished", now())),
        status=str(status.get("status", "not finished")),
        config={key: Path(str(v)).name if key in PATHS else v for key, v in scenario.to_mapping().items()},
        plan=settled.plan,
        committed=committed,
        doubts=doubts,
        local=settled.local,
        rounds=rounds,
        clients=clients,
        prices=prices_of(settled.plan, grants, persons),
        multiplicity=scenario.multiplicity,
        multiplicity_epsilon=None,
        augmented=task.augment is not None,
        noise_source="a test source" if any(client.test_noise for client in clients) else SECURE_SOURCE,
        versions=versions(),
        code_hash=settled.code,
        witness="the server application" + (", which is also the relay: relay = server" if same else ", not the relay"),
        covers="everything that each client had spent when it signed its last receipt of this job",
        simulation=None,
        engine="separate machines, by Flower's SuperLink and SuperNodes",
        device=settled.device,
        hardware=f"{platform.machine()}, {os.cpu_count()} cores (the server's)",
        receipts=receipts_file(folder),
        settings=settings_digest(task.name, settled.plan.digest(), settled.local.to_json(), scenario.seed),
        product={"curator": scenario.curator, "purpose": scenario.purpose, "data": scenario.data_domain},
    )


def _json_in(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"expected {path}, got {error.strerror}; is it the folder of a run on machines?") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise RunError(f"expected a whole {path.name} in {path.parent}, got a damaged one; restore a backup")
    return value


def _papers_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the papers of a run by member; none of them is trusted."""
    papers = _json_in(folder / PAPERS, dict) if (folder / PAPERS).exists() else {}
    return {name: paper for name, paper in papers.items() if isinstance(paper, dict)}


def _members_in(folder: Path) -> list[Member]:
    """Returns those who take part in a run, as they were fixed before its first round; Flower's ids are not known.

    Raises:
        RunError: The file is missing or damaged.
    """
    try:
        return [Member(**one, node_id=0) for one in _json_in(folder / MEMBERS, list)]
    except TypeError:
        raise RunError(f"expected members in {folder / MEMBERS}, got something else; restore a backup") from None


def _is_of(paper: Mapping[str, Any], account: str, key: str, lines: Sequence[Countersigned], settled: Settled) -> bool:
    """Whether papers are those of an account that committed to exactly this plan; signed by the key of its receipts."""
    grant, commit, changes = paper.get("grant"), paper.get("commit"), paper.get("changes")
    if not lines or not isinstance(grant, dict) or not isinstance(commit, dict) or not isinstance(changes, list):
        return False
    plan = settled.plan
    try:
        for entry in (grant, commit, *changes):
            require_signed_entry(entry, key)
        grant_of(grant["body"])
        body, numbers = commit["body"], [change["seq"] for change in changes]
        return (
            (grant["account"], commit["account"], grant["kind"], commit["kind"])
            == (account, account, "grant", "commit")
            and (body["job"], body["plan"], body["joins"]) == (settled.id, plan.digest(), plan.joins)
            and events_from_json(body["event"]) == Event.all_of_round(plan)
            and {(change["account"], change["kind"]) for change in changes} <= {(account, "budget")}
            and numbers == sorted({*numbers})
            and {line.receipt.public_key for line in lines} == {key}
            and {line.receipt.events for line in lines} == {Event.all_of_round(plan)}
        )
    except (LedgerError, PlanError, KeyError, TypeError, ValueError):
        return False


def _spend_of(
    name: str, paper: Mapping[str, Any], lines: Sequence[Countersigned], declined: int, lost: bool
) -> ClientSpend:
    """Returns what a client's receipts of this job say."""
    ordered = sorted({line.receipt.seq: line for line in lines}.values(), key=lambda line: line.receipt.seq)
    first, last = ordered[0].receipt, ordered[-1].receipt
    changes = [entry for entry in paper.get("changes", []) if entry["seq"] <= last.seq]
    # An account's entries are its grant, the changes of its budget, its charges, and one commitment for each job. So
    # it shows if there is another job in it, whenever that began; a price that leaves it out would be too small.
    others = max(0, last.seq - len(changes) - last.charges - 1)
    unseen = last.charges if not others else last.charges - first.charges + 1
    return ClientSpend(
        name=name,
        granted_epsilon=last.granted,
        delta=last.delta,
        spent_epsilon=last.spent,
        rounds_joined=len({line.receipt.round for line in ordered}),
        charges=last.charges,
        declined=declined,
        runs=1 + others,
        other_runs=others,
        receipts_missing=0,
        undelivered=max(0, unseen - len(ordered)),
        test_noise=last.test,
        history=tuple((line.receipt.round, line.receipt.spent) for line in ordered),
        public_key=last.public_key,
        ledger_head=last.head,
        verdict=Verdict.UNKNOWN if lost else Verdict.VERIFIED,
        account=last.account,
        proof={
            "grant": paper.get("grant"),
            "commit": paper.get("commit"),
            "receipt": ordered[-1].receipt.to_json(),
            "peer": ordered[-1].peer,
            "countersignature": ordered[-1].countersignature,
        },
        changes=tuple((iso(change["time"]), change["body"]["before"], change["body"]["epsilon"]) for change in changes),
    )


def _settled(scenario: Scenario, places: Places, folder: Path, resume: bool) -> tuple[Settled, Scenario]:
    """Settles a new job, or reads what was settled; a plan is never solved twice for one job."""
    if resume:
        settled = Settled.load(folder)
        if settled.code[-64:] != code_hash():
            raise RunError("expected the program that the job began with, got another; clients approved that one")
        if (folder / CHECKPOINT).exists() and not (folder / MEMBERS).exists():
            raise RunError(f"expected a run on separate machines in {folder}, got a simulation; simulate --resume it")
        return settled, Scenario.from_run(folder)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"expected a new run folder, got {folder} which is in use; choose another or --resume it")
    if scenario.weights == "declared" or scenario.unit == Unit.CLIENT:
        raise PlanError("expected uniform weights and unit record on separate machines, got others; they are to come")
    task = find_task(scenario.task)
    source = load_source(task, data=scenario.data or None)
    scenario = scenario.resolved(source.declared_records)
    settled = _at_holders_order(settle(scenario, task, source.shape), scenario)
    _require_joined(places, scenario.clients)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    scenario.save(folder)
    settled.save(folder)
    return settled, scenario


def _at_holders_order(settled: Settled, scenario: Scenario) -> Settled:
    """Solves the noise anew at the order that holders' ledgers count at.

    Each fixed its order with its budget, before it knew any job. Who granted epsilon and delta of the job, at the order
    that `best_affordable_order` gives, can then pay for all of it.
    """
    plan = settled.plan
    if scenario.noise_multiplier:
        return settled
    order = best_affordable_order(plan.epsilon, plan.delta)
    update, *metrics = Event.all_of_schedule(plan)
    noise, _ = solve_noise(
        epsilon=plan.epsilon,
        delta=plan.delta,
        sample_rate=update.sample_rate,
        steps=update.steps,
        beside=metrics,
        order=order,
    )
    noise = max(noise, plan.noise_multiplier)
    return dataclasses.replace(settled, plan=dataclasses.replace(plan, noise_multiplier=noise), order=order)


def _require_joined(places: Places, wanted: int) -> None:
    """Finds before a run folder is made that a job cannot begin.

    Raises:
        RunError: Too few clients are enrolled, or the relay does not answer.
    """
    joined = [member.name for member, _ in members_of(places)]
    if len(joined) < wanted:
        raise RunError(
            f"expected {wanted} clients that have joined, got {len(joined)} ({', '.join(joined) or 'nobody'}); invite "
            "more (tacit server invite NAME), or ask for fewer with --clients"
        )


def _members(places: Places, folder: Path) -> list[Member]:
    """Returns whom the job may be for: all enrolled members, or those that it began with."""
    # The gateway lets a new member in at the relay within a second; and all of them, where the relay was made anew.
    deadline = time.monotonic() + _LET_IN_S
    there = members_of(places)
    while not all(node for _, node in there) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        there = members_of(places)
    enrolled = {member.name: (member, node) for member, node in there}
    if (folder / MEMBERS).exists():
        # A revoked member stays in the job's count, silent: the noise was solved for turns among all of them.
        return [
            dataclasses.replace(one, node_id=enrolled[one.name][1] if one.name in enrolled else 0)
            for one in _members_in(folder)
        ]
    return [
        Member(number=number, name=member.name, public_key=member.application, node_id=node)
        for number, (member, node) in enumerate(enrolled.values(), start=1)
    ]


def _fix(folder: Path, grid: SealedGrid) -> None:
    """Writes down who takes part, before the first round; it never changes."""
    path = folder / MEMBERS
    if not path.exists():
        fixed = [
            {"number": member.number, "name": member.name, "public_key": member.public_key} for member, _ in grid.words
        ]
        write_whole(path, canonical(fixed))


def _keep_papers(folder: Path, papers: Mapping[str, Mapping[str, Any]]) -> None:
    if not papers:
        return
    known = _papers_in(folder)
    # Papers that came earlier are not lost to a member that has none now.
    kept = {name: dict(paper) for name, paper in papers.items() if paper or name not in known}
    write_whole(folder / PAPERS, canonical({**known, **kept}))


def _opened(
    stack: contextlib.ExitStack, begun: Callable[[], Relay], patience_s: float, stopping: Callable[[], bool]
) -> Relay:
    """Opens a run; where there is patience, as soon as the relay is back.

    Raises:
        RunError: The relay does not answer in time.
        KeyboardInterrupt: It was told to stop meanwhile.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return stack.enter_context(begun())
        except RunError:
            if time.monotonic() >= deadline:
                raise
        if stopping():
            raise KeyboardInterrupt
        time.sleep(_PAUSE_S)


@contextlib.contextmanager
def _ended(progress: Progress) -> Iterator[None]:
    """Says in the job's progress why it ended, where it ended by a failure."""
    try:
        yield
    except KeyboardInterrupt:
        progress.tell(status="interrupted")
        raise
    except TacitError as error:
        progress.tell(status="failed", words=str(error))
        raise
    except BaseException as error:
        progress.tell(status="failed", words=type(error).__name__)
        raise


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a server application to one run at a time.

    Raises:
        RunError: Another run is on.
    """
    descriptor = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunError("expected no other run of this server, got one that is on; wait for it or stop it") from None
    try:
        yield
    finally:
        os.close(descriptor)
