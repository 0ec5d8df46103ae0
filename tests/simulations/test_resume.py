"""Kill -9 at any moment, resume, and look at what left, what was charged and what was kept.

A child process runs the job and kills itself (SIGKILL: no handler, no clean-up) at its n-th durable or revealing
operation: every write, sync, rename, and every training call. What a client sends is logged as it leaves.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
from collections import defaultdict
from pathlib import Path

import pytest

ROUNDS, CLIENTS = 3, 3


class Quiet:
    """Watches nothing."""

    def __getattr__(self, name):
        return lambda *_: None


def _child(folder: str, resume: bool, kill_at: int, sent: str, bug: str) -> None:
    """Runs or resumes the job; dies at the given operation; logs the number of operations at a clean end."""
    import torch

    from clients import app as clients_app
    from clients import holder as clients_holder
    from privacy.dpsgd import PrivateTrainer
    from simulations.run import simulate
    from simulations.scenario import Scenario

    torch.set_num_threads(1)
    operations = [0]

    def counted(function):
        def call(*args, **kwargs):
            operations[0] += 1
            if operations[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("write", "fsync", "replace", "open"):
        setattr(os, name, counted(getattr(os, name)))
    PrivateTrainer.train = counted(PrivateTrainer.train)

    answer = clients_app.answer

    def logged(request, holder):
        result = answer(request, holder)
        if isinstance(result, clients_holder.Release):
            line = {
                "head": result.receipt.head,
                "account": result.receipt.account,
                "round": result.receipt.round,
                "bytes": hashlib.sha256(result.parameters.tobytes()).hexdigest(),
            }
            with open(sent, "a") as file:
                file.write(json.dumps(line) + "\n")
        operations[0] += 1
        if operations[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    clients_app.answer = logged
    if bug == "retrained under the old charge":
        # A retry finds that it was charged and trains again without paying: two sends, one charge.
        receipts = Path(sent).with_suffix(".receipts")
        charge = clients_holder.Holder.charge

        def reuse(self, request):
            known = json.loads(receipts.read_text()) if receipts.exists() else {}
            key = f"{self.name}/{request.round}"
            if key in known:
                return clients_holder.Receipt.from_json(known[key])
            receipt = charge(self, request)
            receipts.write_text(json.dumps(known | {key: receipt.to_json()}))
            return receipt

        clients_holder.Holder.charge = reuse
        clients_holder.Kept.get = lambda *_: None
    scenario = Scenario.layered(
        None,
        {
            "clients": CLIENTS,
            "rounds": ROUNDS,
            "steps-per-round": 1,
            "mode": "hooks",
            "retries": 3,
            "seed": 5,
        },
    )
    path = Path(folder)
    if resume:
        scenario = Scenario.from_run(path)
    simulate(scenario, out=None if resume else path, resume=path if resume else None, observer=Quiet())
    with open(sent, "a") as file:
        file.write(json.dumps({"operations": operations[0]}) + "\n")


@pytest.fixture(scope="module")
def spawn():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["simulations.run", "clients.app", "privacy.dpsgd", "simulations.engine", "sklearn.datasets"]
    )

    def run(folder: Path, *, resume: bool, kill_at: int, sent: Path, bug: str = "") -> int:
        process = context.Process(target=_child, args=(str(folder), resume, kill_at, str(sent), bug))
        process.start()
        process.join(120)
        assert not process.is_alive(), "the job hangs"
        return process.exitcode

    return run


def _carry_to_the_end(spawn, folder: Path, sent: Path, kills: list[int], bug: str = "") -> None:
    """Starts the job, kills it at each given operation in turn, and lets the last resumption finish."""
    resume = False
    for kill_at in kills:
        if spawn(folder, resume=resume, kill_at=kill_at, sent=sent, bug=bug) == 0:
            return
        resume = (folder / "config.json").exists()
    assert spawn(folder, resume=resume, kill_at=0, sent=sent, bug=bug) == 0


def _check(folder: Path, sent: Path) -> None:
    from privacy.ledger import Book

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
    releases = [line for line in map(json.loads, sent.read_text().splitlines()) if "head" in line]
    bodies = defaultdict(set)
    for release in releases:
        bodies[release["head"]].add(release["bytes"])
    # No two sends under one charge unless they are byte-identical.
    assert all(len(different) == 1 for different in bodies.values())
    with Book(folder / "ledgers") as book:
        accounts = {account.identity: account for account in book.accounts.values()}
        assert len(accounts) == CLIENTS
        for identity, account in accounts.items():
            charged = {release["head"] for release in releases if release["account"] == identity}
            # Never under-charged: every different release has a charge of its own in the chain.
            assert charged <= set(account.heads)
            assert len(charged) <= account.charges
            assert account.charges >= ROUNDS
            assert account.spent <= account.grant.epsilon
    receipts = [
        json.loads(json.loads(line)["receipt"]) for line in (folder / "receipts.jsonl").read_text().splitlines()
    ]
    assert len({(receipt["account"], receipt["round"]) for receipt in receipts}) == ROUNDS * CLIENTS == len(receipts)


def _operations(spawn, tmp_path: Path) -> int:
    sent = tmp_path / "undisturbed.jsonl"
    assert spawn(tmp_path / "undisturbed", resume=False, kill_at=0, sent=sent) == 0
    _check(tmp_path / "undisturbed", sent)
    return json.loads(sent.read_text().splitlines()[-1])["operations"]


def test_g8_g9_killed_anywhere_a_resumed_run_is_whole_and_never_undercharged(spawn, tmp_path):
    total = _operations(spawn, tmp_path)
    for kill_at in random.Random(2718).sample(range(1, total + 1), 8):
        folder, sent = tmp_path / f"killed-at-{kill_at}", tmp_path / f"{kill_at}.jsonl"
        _carry_to_the_end(spawn, folder, sent, [kill_at])
        _check(folder, sent)


@pytest.mark.slow
def test_killed_at_every_operation_and_again_while_resuming(spawn, tmp_path):
    total = _operations(spawn, tmp_path)
    dice = random.Random(31415)
    for kill_at in range(1, total + 1):
        folder, sent = tmp_path / f"killed-at-{kill_at}", tmp_path / f"{kill_at}.jsonl"
        _carry_to_the_end(spawn, folder, sent, [kill_at, dice.randint(1, total)])
        _check(folder, sent)


def test_planted_bug_retraining_under_an_old_charge_is_caught(spawn, tmp_path):
    total = _operations(spawn, tmp_path)
    # Somewhere past the middle a client has sent and the round's checkpoint is not yet written.
    for kill_at in range(total // 2, total, 2):
        folder, sent = tmp_path / f"killed-at-{kill_at}", tmp_path / f"{kill_at}.jsonl"
        _carry_to_the_end(spawn, folder, sent, [kill_at], bug="retrained under the old charge")
        try:
            _check(folder, sent)
        except AssertionError:
            return
    pytest.fail("a release that was sent twice with fresh noise under one charge went unnoticed")
