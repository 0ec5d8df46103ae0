"""The evidence of a run: what its ledgers and receipts say, as the facts that a report is made of.

One rule decides what is proven: every update that the run's log counts must have a receipt that its ledger contains,
and a charge whose update never arrived is spent all the same. Whatever the files of a run contradict each other in is
told to the report as a doubt, and the report then prints no finite figure (guarantees G6 and G14).
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from privacy.accounting import (
    Event,
    Grant,
    attacker_power,
    best_order,
    group_epsilon,
    pld_epsilon,
    prv_epsilon,
    rdp,
    unsampled,
    zcdp_rho,
)
from privacy.errors import LedgerError, RunError
from privacy.identity import COUNTERSIGN, Identity, Secret
from privacy.identity.many import Signed, first_signed_otherwise, first_unsigned
from privacy.ledger import Account, Book, Receipt
from privacy.matrix import Turns, matrix_of
from privacy.noise import SECURE_SOURCE
from privacy.plan import Adjacency, Plan, Unit
from privacy.replacement import replace_epsilon, replace_rdp_epsilon
from privacy.report import ClientSpend, Prices, RunFacts, Verdict, write
from privacy.transcript import iso
from privacy.wire import settings_digest
from server.app import CHECKPOINT, METRICS, RECEIPTS
from server.checkpoint import State, load
from simulations.world import JOB_FILE, World, now, population_words, vault_of

STATUS: Final = "status.json"
_PLD_EPSILON: Final = 100
SERVER_KEY: Final = "server.key"
AUDIT: Final = "audit.json"

_PACKAGES: Final = ("torch", "opacus", "flwr", "dp-accounting", "cryptography", "numpy")
# Scenario keys that hold paths of this machine, which are nobody else's business.
PATHS: Final = ("data", "ledgers", "out")


def render(folder: Path, persons: Sequence[int] = ()) -> Path:
    """Writes the report of a run folder anew, from its receipts and ledgers alone.

    Args:
        folder: The run folder.
        persons: Numbers of records of one person for which the schedule is priced too.

    Raises:
        TacitError: The folder is no run folder, or its ledgers or receipts are damaged.
    """
    if not (folder / JOB_FILE).exists():
        raise RunError(f"expected a run folder that has started, got {folder} without {JOB_FILE}; resume it first")
    # A long run's charges and receipts are a million small objects without a cycle among them; looking for one again
    # and again while they are read takes a tenth of the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        world = World.open(folder.resolve(), vouch=True)
        return write(facts_of(world, persons), folder, server_identity(world))[1]
    finally:
        if collects:
            gc.enable()


def server_identity(world: World) -> Identity | None:
    """Returns the identity that countersigned a run's receipts and signs its report; None before it first ran."""
    path = world.folder / SERVER_KEY
    return Secret.load_or_create(path).identity("server") if path.exists() else None


def facts_of(world: World, persons: Sequence[int] = ()) -> RunFacts:
    """Collects what a report is made of from a run folder.

    Args:
        world: The run.
        persons: Numbers of records of one person for which the schedule is priced too; each takes up to a minute.

    Raises:
        LedgerError: The ledgers or the receipts are damaged, or the server's key is missing.
        RunError: The log of the rounds or the checkpoint is damaged.
    """
    settled, folder, scenario = world.settled, world.folder, world.scenario
    rounds, state = read_rounds(folder), load(folder / CHECKPOINT, vault_of(scenario))
    lines = read_countersigned(folder, server_identity(world), world.book, folder / SERVER_KEY)
    receipts = [line.receipt for line in lines]
    countersigned = {line.receipt.head: line for line in lines}
    world.book.refresh()
    papers = _papers(world)
    by_account: dict[str, list[Receipt]] = defaultdict(list)
    for receipt in receipts:
        by_account[receipt.account].append(receipt)
    # An account without a charge but with receipts was rolled back.
    accounts = [a for a in world.book.accounts.values() if a.charges or a.identity in by_account]
    sound = {a.identity: [r for r in by_account[a.identity] if _contains(world, a, r)] for a in accounts}
    lost = _lost(rounds, [receipt for found in sound.values() for receipt in found])
    # A witness names the account that a node's receipts belong to: nodes themselves mean nothing outside the engine.
    heads = {receipt.head: receipt.account for receipt in receipts}
    declined = {heads.get(state.witnesses.get(node, ":").partition(":")[2], "") for node in state.declined}
    status = json.loads((folder / STATUS).read_text()) if (folder / STATUS).exists() else {}
    return RunFacts(
        job=settled.id,
        model=state.digest,
        task=world.task.name,
        task_summary=world.task.summary,
        record=world.task.record,
        started=settled.started,
        finished=str(status.get("finished", now())),
        status=str(status.get("status", "not finished")),
        config={key: Path(str(v)).name if key in PATHS else v for key, v in scenario.to_mapping().items()},
        plan=settled.plan,
        committed=all(_as_committed(a, settled.id, settled.plan) for a in accounts if settled.id in a.jobs),
        doubts=_doubts(world, state, rounds, receipts, lost),
        local=settled.local,
        rounds=rounds,
        clients=[
            dataclasses.replace(
                _spend(world, account, by_account[account.identity], sound[account.identity], lost, declined),
                account=account.identity,
                proof=_proof(account, settled.id, papers, sound[account.identity], countersigned),
                changes=tuple((iso(change.time), change.before, change.after) for change in account.changes),
                clock_set_back=account.backwards,
            )
            for account in accounts
        ],
        prices=prices_of(settled.plan, [account.grant for account in world.book.accounts.values()], persons),
        multiplicity=scenario.multiplicity,
        multiplicity_epsilon=composed_epsilon(accounts, scenario.multiplicity, settled.plan.delta),
        augmented=world.task.augment is not None,
        noise_source="a test source" if any(account.test for account in accounts) else SECURE_SOURCE,
        versions=versions(),
        code_hash=settled.code,
        witness="the server of this simulation, on the same machine",
        covers=f"all runs in {Path(settled.ledgers).name}" if settled.ledgers else "this run only",
        simulation=world.truth(),
        engine=f"{scenario.engine}, {scenario.workers} worker(s)",
        device=settled.device,
        hardware=f"{platform.machine()}, {os.cpu_count()} cores",
        receipts=receipts_file(folder),
        settings=settings_digest(world.task.name, settled.plan.digest(), settled.local.to_json(), world.scenario.seed),
        product={"curator": scenario.curator, "purpose": scenario.purpose, "data": scenario.data_domain},
        audit=_audit(folder),
    )


def versions() -> dict[str, str]:
    """Returns the versions of the packages that a guarantee rests on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}


# -- reading --------------------------------------------------------------------------------------------------------


def _whole_lines(path: Path) -> list[str]:
    """Returns the lines of a file that end; what a crash tore off comes after the last checkpoint."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """Returns the log of a run's rounds.

    Raises:
        RunError: A line of it is damaged.
    """
    rounds = []
    for number, text in enumerate(_whole_lines(folder / METRICS), start=1):
        try:
            line = json.loads(text)
            if type(line["round"]) is not int or type(line["replies"]) is not int:
                raise TypeError("not a round")
        except (ValueError, KeyError, TypeError):
            raise RunError(
                f"expected whole rounds in {folder / METRICS}, got a damaged one at line {number}; restore a backup"
            ) from None
        rounds.append(line)
    return rounds


def receipts_file(folder: Path) -> dict[str, Any]:
    """Returns name, number of lines and SHA-256 of a run's receipts; empty without any."""
    path = folder / RECEIPTS
    data = path.read_bytes() if path.exists() else b""
    data = data[: data.rfind(b"\n") + 1]
    lines = data.count(b"\n")
    return {"file": RECEIPTS, "lines": lines, "sha256": hashlib.sha256(data).hexdigest()} if lines else {}


def _audit(folder: Path) -> dict[str, Any] | None:
    """Returns what an audit of this run wrote down, or None.

    Raises:
        RunError: It is no JSON object; an audit that cannot be read is not an audit that found nothing.
    """
    path = folder / AUDIT
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RunError(f"expected an audit's findings in {path}, got something else; run the audit again")
    return found


@dataclasses.dataclass(frozen=True)
class Countersigned:
    """One line of a receipts file.

    Attributes:
        receipt: The holder's receipt.
        peer: Key of the server that countersigned it.
        countersignature: Its signature over the receipt's text.
    """

    receipt: Receipt
    peer: str
    countersignature: str


def read_countersigned(
    folder: Path, server: Identity | None, book: Book | None = None, key_file: Path | None = None
) -> list[Countersigned]:
    """Reads and verifies every receipt of a run, which its own server must have countersigned.

    Args:
        folder: The run folder.
        server: The identity that countersigned; None where its key is not there.
        book: The clients' ledgers where they are here, with their keys, opened to vouch. A receipt whose text is, byte
            for byte, the one that a chain in it stands for was vouched for by its holder: the account's last signature,
            which was checked when the chain was read, binds that text and the signature in it. Any other receipt's own
            signature is checked.
        key_file: Where the server's secret lies, if in a file of its own; many countersignatures are then made again
            by several processes.

    Raises:
        LedgerError: One does not verify, or was countersigned by somebody else, or the server's key is missing.
    """
    lines = _whole_lines(folder / RECEIPTS)
    if not lines:
        return []
    if server is None:
        raise LedgerError(f"expected the key that countersigned in {folder / SERVER_KEY}, got none; restore a backup")
    vouched: Mapping[str, str] = {}
    if book is not None:
        # After the receipts: what is charged meanwhile is in the ledgers first.
        book.refresh()
        vouched = book.vouched
    receipts: list[Countersigned] = []
    alone: list[tuple[int, Signed]] = []

    def damaged(number: int, why: object) -> LedgerError:
        return LedgerError(f"expected whole receipts in {folder / RECEIPTS}, got a damaged one at line {number}: {why}")

    def read() -> Iterator[Signed]:
        for number, text in enumerate(lines, start=1):
            try:
                line = json.loads(text)
                receipt, signature = Receipt.unverified(line["receipt"]), line["countersignature"]
                if line["peer"] != server.public_key:
                    raise LedgerError("expected this run's own server to have countersigned, got another one")
            except (ValueError, KeyError, TypeError, LedgerError) as error:
                raise damaged(number, error) from None
            receipts.append(Countersigned(receipt, server.public_key, signature))
            if vouched.get(receipt.head) != line["receipt"]:
                alone.append((number, (receipt.public_key, receipt.signed_bytes(), receipt.signature)))
            yield server.public_key, COUNTERSIGN + line["receipt"].encode(), signature

    place = first_signed_otherwise(read(), server, key_file, "server")
    if place is not None:
        raise damaged(place + 1, "expected this run's own server to have countersigned, got other bytes")
    if (place := first_unsigned(signed for _, signed in alone)) is not None:
        why = "expected a valid signature, got one that does not match its key and message"
        raise damaged(alone[place][0], why)
    return receipts


def _papers(world: World) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the grant of each account, under no job, and its commitments by job, as its ledger has them."""
    found = {}
    for line in world.book.content().split(b"\n"):
        # Charges are by far the most lines, and their receipts say what they say.
        if line and b'"kind":"charge"' not in line and b'"kind":"participation"' not in line:
            entry = json.loads(line)
            if entry["kind"] in ("grant", "commit"):
                found[entry["account"], entry["body"].get("job", "")] = entry
    return found


def _proof(
    account: Account,
    job: str,
    papers: Mapping[tuple[str, str], dict[str, Any]],
    sound: Sequence[Receipt],
    countersigned: Mapping[str, Countersigned],
) -> dict[str, Any]:
    """Returns what a client signed: its grant, its commitment to this job, and its last receipt of it."""
    proof: dict[str, Any] = {
        "grant": papers.get((account.identity, "")),
        "commit": papers.get((account.identity, job)),
    }
    if sound:
        last = countersigned[max(sound, key=lambda receipt: receipt.seq).head]
        proof |= {
            "receipt": last.receipt.to_json(),
            "peer": last.peer,
            "countersignature": last.countersignature,
        }
    return proof


# -- judging --------------------------------------------------------------------------------------------------------


def _contains(world: World, account: Account, receipt: Receipt) -> bool:
    """Whether a ledger contains a receipt of this run; if not, it was rolled back, forked or signed again."""
    job = account.jobs.get(receipt.job)
    return (
        job is not None
        and receipt.job == world.settled.id
        and job.entries.get(receipt.seq) == receipt.round
        and account.heads[receipt.seq] == receipt.head
        and (receipt.request, receipt.events) == (job.rounds[receipt.round], job.events)
        and receipt.public_key == world.book.secret.identity(account.identity).public_key
        and receipt.charges <= account.charges
        and receipt.spent <= account.spent * (1 + 1e-9)
    )


def _lost(rounds: Sequence[Mapping[str, Any]], sound: Sequence[Receipt]) -> set[int]:
    """Returns the rounds in which more updates arrived than there are receipts."""
    arrived = Counter(round for _, round in {(receipt.account, receipt.round) for receipt in sound})
    return {line["round"] for line in rounds if arrived[line["round"]] < line["replies"]}


def _as_committed(account: Account, job: str, plan: Plan) -> bool:
    """Whether an account committed to exactly this plan for a job, and its charges are what it committed to."""
    state = account.jobs[job]
    priced = sum(other.charges * rdp(other.events, account.grant.order) for other in account.jobs.values())
    return (
        (state.plan, state.joins, state.events) == (plan.digest(), plan.joins, Event.all_of_round(plan))
        and state.charges <= plan.charges
        # A matrix is only worth its price in the turns that it was computed for: nobody's word for them is taken.
        and ((state.turns is not None) == (plan.banded is not None))
        and (state.turns is None or _turns_of(plan) == dataclasses.replace(state.turns, digest="0" * 64))
        and math.isclose(account.spent_rdp, priced, rel_tol=1e-9)
    )


def _turns_of(plan: Plan) -> Turns:
    """Returns the turns that a plan of banded noise pays for, without the name of their drawing."""
    matrix = matrix_of(plan)
    return Turns(
        digest="0" * 64,
        rounds=matrix.rounds,
        separation=matrix.separation,
        participations=matrix.participations,
    )


def _doubts(
    world: World,
    state: State,
    rounds: Sequence[Mapping[str, Any]],
    receipts: Sequence[Receipt],
    lost: Collection[int],
) -> list[str]:
    """Returns what the files of a run contradict each other in, one sentence each."""
    doubts = []
    granted = {account.population for account in world.book.accounts.values() if account.charges}
    if (granted | {world.settled.population}) - {population_words(world.scenario, world.task)}:
        doubts.append("The ledgers were granted for another split, or another multiplicity, than the scenario says.")
    if state.job != world.settled.id:
        doubts.append("The checkpoint is that of another job.")
    for what, found, name in (("rounds", rounds, METRICS), ("receipts", receipts, RECEIPTS)):
        if len(found) < (wanted := state.lines.get(name, 0)):
            doubts.append(f"The checkpoint knows of {wanted:,} {what}, {len(found):,} are here.")
    if lost:
        doubts.append(f"In {len(lost):,} rounds more updates arrived than there are receipts that the ledgers contain.")
    known = {account.identity for account in world.book.accounts.values()}
    if strangers := {receipt.account for receipt in receipts} - known:
        doubts.append(f"{len(strangers):,} ledgers are gone: receipts name accounts that no ledger here has.")
    return doubts


def _spend(
    world: World,
    account: Account,
    receipts: Sequence[Receipt],
    sound: Sequence[Receipt],
    lost: Collection[int],
    declined: Collection[str],
) -> ClientSpend:
    job = account.jobs.get(world.settled.id)
    received = {receipt.seq: receipt for receipt in sound}
    unseen = set(job.rounds).difference(receipt.round for receipt in sound) if job is not None else set()
    missing = len(unseen.intersection(lost))
    verdict = Verdict.VERIFIED if len(account.heads) - 1 in received else Verdict.LEDGER
    return ClientSpend(
        name=account.name,
        granted_epsilon=account.grant.epsilon,
        delta=account.grant.delta,
        spent_epsilon=account.spent,
        rounds_joined=len({receipt.round for receipt in sound}),
        charges=account.charges,
        declined=int(account.identity in declined),
        runs=len(account.jobs),
        other_runs=len(account.jobs.keys() - {world.settled.id}),
        receipts_missing=missing,
        # Every round that was paid for, the later ones of a matrix too.
        undelivered=max(0, len(job.entries) - len(received) - missing) if job is not None else 0,
        test_noise=account.test,
        history=tuple((receipt.round, receipt.spent) for _, receipt in sorted(received.items())),
        public_key=world.book.secret.identity(account.identity).public_key,
        ledger_head=account.heads[-1],
        verdict=verdict if len(sound) == len(receipts) and not missing else Verdict.UNKNOWN,
    )


# -- pricing --------------------------------------------------------------------------------------------------------


def composed_epsilon(accounts: Sequence[Account], multiplicity: int, delta: float) -> float | None:
    """Returns epsilon for a person with one record in each of several data sets, whichever they are.

    Args:
        accounts: All accounts with a charge.
        multiplicity: In how many data sets one person may be, >= 1.
        delta: At which the figure is to hold.

    Returns:
        The largest composition over that many accounts. None where there is nothing to compose, or accounts count at
        different orders, whose divergences do not add up, or at another delta.
    """
    grants = {(account.grant.order, account.grant.delta) for account in accounts}
    if multiplicity == 1 or len(grants) != 1 or accounts[0].grant.delta != delta:
        return None
    top = sorted((account.spent_rdp for account in accounts), reverse=True)[:multiplicity]
    return accounts[0].grant.epsilon_of(sum(top))


def prices_of(plan: Plan, grants: Collection[Grant], persons: Sequence[int] = ()) -> Prices:
    """Prices the committed schedule with every accountant.

    Args:
        plan: What was committed to.
        grants: Of the ledgers that counted it.
        persons: Numbers of records of one person to price it for too.
    """
    # Metrics are part of what was committed to, so they are part of every figure.
    update, *metrics = history = Event.all_of_schedule(plan)
    best = best_order(history, plan.delta)
    # Loss distributions of a schedule that protects next to nothing take minutes and gigabytes, for a figure that
    # nobody needs exactly.
    tight = best[1] <= _PLD_EPSILON
    # Three deltas are enough to see how epsilon moves.
    curve = tuple(
        (delta, pld_epsilon(history, delta) if tight else best_order(history, delta)[1])
        for delta in (plan.delta, plan.delta / 10, plan.delta / 100)
    )
    prv, note = prv_epsilon(history, plan.delta) if tight else (None, f"not asked: epsilon above {_PLD_EPSILON}")
    # Accounts may hold different orders. At another order every figure is valid too, but at a larger delta none is.
    filters = {
        grant.order: grant.epsilon_of(rdp(history, grant.order)) for grant in set(grants) if grant.delta <= plan.delta
    }
    order, gate = max(filters.items(), key=lambda item: item[1], default=best)
    saddle, how = replace_epsilon(history, plan.delta) if tight else (None, f"not asked: epsilon above {_PLD_EPSILON}")
    return Prices(
        schedule=(
            f"Poisson q={plan.sample_rate:g}, sigma={plan.noise_multiplier:.4g}, {update.steps} steps"
            + _metrics_words(plan)
            if plan.unit is Unit.RECORD
            else f"Gaussian, no sampling, sigma={plan.noise_multiplier:.4g}, {update.steps} rounds of one client"
            if plan.banded is None
            else f"one Gaussian release, no sampling, sigma={plan.noise_multiplier:.4g} times the sensitivity of the "
            f"matrix over {plan.turns} rounds of one client"
        ),
        steps=update.steps,
        gate=gate,
        gate_order=order,
        pld=curve[0][1] if tight else None,
        pld_replace_one=pld_epsilon(history, plan.delta, Adjacency.REPLACE_ONE) if tight else None,
        saddle_replace_one=saddle,
        saddle_note=how,
        rdp_replace_one=replace_rdp_epsilon(history, plan.delta),
        prv=prv,
        prv_note=note,
        rdp=best[1],
        metrics=pld_epsilon(metrics, plan.delta) if metrics and tight else None,
        at_deltas=curve,
        tpr=tuple((fpr, attacker_power(curve, fpr)) for fpr in (0.001, 0.01)),
        accountant=f"dp-accounting {importlib.metadata.version('dp-accounting')} (PLD), "
        f"opacus {importlib.metadata.version('opacus')} (RDP, PRV)",
        unamplified=best_order(unsampled(history), plan.delta)[1],
        rho=zcdp_rho(history),
        persons=tuple((records, group_epsilon(history, plan.delta, records)) for records in persons if tight)
        if plan.unit is Unit.RECORD
        else (),
        models_alone=_models_alone(plan) if plan.unit is Unit.CLIENT else None,
    )


def _metrics_words(plan: Plan) -> str:
    if plan.metrics is None:
        return ""
    return f", and {plan.joins} releases each of {', '.join(plan.metrics.words)} under noise {plan.metrics.noise:g}"


def _models_alone(plan: Plan) -> float:
    """Returns epsilon of one client for somebody who sees the models of all rounds and nothing of who took part."""
    event = Event.of_models(plan)
    loose = best_order(event, plan.delta)[1]
    return pld_epsilon(event, plan.delta) if loose <= _PLD_EPSILON else loose
