"""The evidence of a run: what its ledgers and receipts say, as the facts that a report is made of."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Final

from privacy.accounting import Event, attacker_power, best_order, pld_epsilon, prv_epsilon, rdp
from privacy.errors import LedgerError
from privacy.ledger import Account, Receipt
from privacy.noise import SECURE_SOURCE
from privacy.plan import Adjacency
from privacy.report import ClientSpend, Prices, RunFacts, Verdict, write
from server.app import CHECKPOINT, METRICS, RECEIPTS
from server.checkpoint import load
from simulations.world import World, now

STATUS: Final = "status.json"


def render(folder: Path) -> Path:
    """Writes the report of a run folder anew, from its receipts and ledgers alone.

    Raises:
        TacitError: The folder is no run folder, or its ledgers or receipts are damaged.
    """
    return write(facts_of(World.open(folder.resolve())), folder)[1]


def facts_of(world: World) -> RunFacts:
    """Collects what a report is made of from a run folder."""
    settled, folder, scenario = world.settled, world.folder, world.scenario
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()] if _has(folder, METRICS) else []
    receipts = read_receipts(folder)
    state = load(folder / CHECKPOINT)
    # A witness names the account that a node's receipts belong to: nodes themselves mean nothing outside the engine.
    heads = {receipt.head: receipt.account for receipt in receipts}
    declined = {heads.get(state.witnesses.get(node, ":").partition(":")[2], "") for node in state.declined}
    world.book.refresh()
    joined = [account for account in world.book.accounts.values() if settled.id in account.jobs or account.jobs]
    clients = [_spend(world, account, receipts, account.identity in declined) for account in joined]
    noise = {receipt.test for receipt in receipts}
    status = json.loads((folder / STATUS).read_text()) if _has(folder, STATUS) else {}
    top = sorted((account.spent_rdp for account in joined), reverse=True)[: scenario.multiplicity]
    composed = joined[0].grant.epsilon_of(sum(top)) if joined and scenario.multiplicity > 1 else None
    return RunFacts(
        job=settled.id,
        task=world.task.name,
        task_summary=world.task.summary,
        record=world.task.record,
        started=settled.started,
        finished=str(status.get("finished", now())),
        status=str(status.get("status", "not finished")),
        config=scenario.to_mapping(),
        plan=settled.plan,
        local=settled.local,
        rounds=lines,
        clients=clients,
        prices=prices_of(world),
        multiplicity=scenario.multiplicity,
        multiplicity_epsilon=composed,
        noise_source="a test source" if True in noise else SECURE_SOURCE,
        versions={name: importlib.metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        code_hash=settled.code,
        witness="the server of this simulation, on the same machine",
        covers=f"all runs in {settled.ledgers}" if settled.ledgers else "this run only",
        simulation=world.truth(),
        engine=f"{scenario.engine}, {scenario.workers} worker(s)",
        device=settled.device,
        hardware=f"{platform.machine()}, {os.cpu_count()} cores",
    )


_PACKAGES: Final = ("torch", "opacus", "flwr", "dp-accounting", "cryptography", "numpy")


def _has(folder: Path, name: str) -> bool:
    return (folder / name).exists()


def read_receipts(folder: Path) -> list[Receipt]:
    """Reads and verifies every countersigned receipt of a run.

    Raises:
        LedgerError: One does not verify.
    """
    from privacy.identity import verify

    receipts = []
    path = folder / RECEIPTS
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else (), start=1):
        try:
            line = json.loads(text)
            receipt = Receipt.from_json(line["receipt"])
            verify(line["peer"], b"tacit/countersign/1\n" + line["receipt"].encode(), line["countersignature"])
        except (ValueError, KeyError, TypeError, LedgerError) as error:
            raise LedgerError(
                f"expected whole receipts in {path}, got a damaged one at line {number}: {error}"
            ) from None
        receipts.append(receipt)
    return receipts


def _spend(world: World, account: Account, receipts: list[Receipt], declined: bool) -> ClientSpend:
    mine = [receipt for receipt in receipts if receipt.account == account.identity]
    # A receipt that the ledger does not contain means that the ledger was rolled back, forked or signed again.
    sound = all(r.seq < len(account.heads) and account.heads[r.seq] == r.head for r in mine)
    return ClientSpend(
        name=account.name,
        granted_epsilon=account.grant.epsilon,
        delta=account.grant.delta,
        spent_epsilon=account.spent,
        rounds_joined=len({receipt.round for receipt in mine}),
        charges=account.charges,
        declined=int(declined),
        runs=len(account.jobs),
        receipts_missing=0,
        test_noise=account.test,
        history=tuple((receipt.round, receipt.spent) for receipt in sorted(mine, key=lambda r: r.round)),
        public_key=world.book.secret.identity(account.identity).public_key,
        ledger_head=account.heads[-1],
        verdict=Verdict.VERIFIED if sound else Verdict.UNKNOWN,
    )


def prices_of(world: World) -> Prices:
    """Prices the committed schedule with every accountant."""
    plan, order = world.settled.plan, world.settled.order
    event = Event.of_schedule(plan)
    # Three deltas are enough to see how epsilon moves; each costs a quarter of a second.
    curve = tuple((delta, pld_epsilon(event, delta)) for delta in (plan.delta, plan.delta / 10, plan.delta / 100))
    prv, note = prv_epsilon(event, plan.delta)
    grant = next((a.grant for a in world.book.accounts.values()), None)
    gate = grant.epsilon_of(rdp(event, grant.order)) if grant else best_order(event, plan.delta)[1]
    return Prices(
        schedule=f"Poisson q={plan.sample_rate:g}, sigma={plan.noise_multiplier:.4g}, {event.steps} steps",
        steps=event.steps,
        gate=gate,
        gate_order=grant.order if grant else order,
        pld=pld_epsilon(event, plan.delta),
        pld_replace_one=pld_epsilon(event, plan.delta, Adjacency.REPLACE_ONE),
        prv=prv,
        prv_note=note,
        rdp=best_order(event, plan.delta)[1],
        at_deltas=curve,
        tpr=tuple((fpr, attacker_power(curve, fpr)) for fpr in (0.001, 0.01)),
        accountant=f"dp-accounting {importlib.metadata.version('dp-accounting')} (PLD), "
        f"opacus {importlib.metadata.version('opacus')} (RDP, PRV)",
    )
