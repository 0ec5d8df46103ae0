"""Whole runs at unit client (G16): they learn, are paid for, survive kill -9, and report a figure per adversary."""

import collections
import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from privacy.accounting import Event, Grant, pld_epsilon, rdp
from privacy.errors import BudgetExceeded, PlanError
from privacy.ledger import Book
from privacy.plan import Plan, Unit
from server.checkpoint import load
from simulations.run import simulate
from simulations.scenario import Scenario
from simulations.world import central_plan
from tests.apps.seeded import SeededSources

SMALL = {"unit": "client", "clients": 12, "rounds": 4, "client-rate": 0.5, "steps-per-round": 1}


class Watcher:
    """Stops a run after so many rounds, or never."""

    def __init__(self, stop_after=0):
        self.stop_after, self.lines, self.info = stop_after, [], {}

    def started(self, info):
        self.info = dict(info)

    def round(self, line):
        self.lines.append(dict(line))
        if len(self.lines) == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    def finished(self, summary):
        pass

    def note(self, text):
        pass


def scenario(**keys):
    return Scenario.layered(None, SMALL | {key.replace("_", "-"): value for key, value in keys.items()})


def go(folder, *, watcher=None, seeded=False, **keys):
    return simulate(scenario(**keys), out=folder, observer=watcher or Watcher(), **(SEEDED if seeded else {}))


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def model_of(folder):
    return np.concatenate([v.reshape(-1) for v in load(folder / "checkpoints/latest.ckpt").model.values()])


def test_g16_a_run_is_paid_for_turn_by_turn_and_its_report_has_a_figure_for_each_adversary(tmp_path):
    watcher = Watcher()
    summary = go(tmp_path / "run", watcher=watcher)
    plan = Plan.from_json(json.dumps(json.loads((tmp_path / "run/job.json").read_text())["plan"]))
    headline = report_of(tmp_path / "run")["headline"]
    figures = [entry["epsilon"] for entry in headline["adversaries"]]
    assert figures[0] == headline["epsilon"] == summary["epsilon"] == pld_epsilon(Event.of_schedule(plan), plan.delta)
    assert figures[1] == "infinity"
    assert figures[2] == pld_epsilon(Event.of_models(plan), plan.delta) < figures[0] <= 3.0
    assert (summary["unit"], summary["against"]) == ("client", "whoever sees who took part")
    state = load(tmp_path / "run/checkpoints/latest.ckpt")
    with Book(tmp_path / "run/ledgers") as book:
        for account in book.accounts.values():
            node = int(account.name.removeprefix("client-")) + 1
            assert account.grant.unit is Unit.CLIENT
            # Undisturbed, a client is charged as often as its coin counted, and never more than its turns.
            assert account.charges == state.central.counted.get(node, 0) <= plan.turns
    assert sum(line["replies"] for line in watcher.lines) == sum(state.central.counted.values())
    page = (tmp_path / "run/report.html").read_text()
    assert "whoever sees who took part" in page
    assert "The server is trusted" in page


def test_g16_a_run_with_little_noise_learns(tmp_path):
    summary = go(tmp_path / "run", clients=30, rounds=12, epsilon=0, noise_multiplier=0.3, steps_per_round=5, l2_clip=3)
    assert summary["metrics"]["accuracy"] > 0.75
    assert summary["epsilon"] > 20


def test_g16_a_clip_that_follows_a_quantile_moves_towards_the_updates_and_costs_the_same(tmp_path):
    watcher = Watcher()
    keys = {"epsilon": 0, "noise_multiplier": 0.5, "clients": 40, "rounds": 6, "l2_clip": 0.01}
    fixed = central_plan(scenario(**keys).resolved(1400))[0]
    summary = go(tmp_path / "run", watcher=watcher, clip_quantile=0.5, clip_lr=1.0, **keys)
    clips = [line["clip"] for line in watcher.lines]
    # Nobody's update is within 0.01, so the clip must grow: by about exp(0.5) a round.
    assert clips[0] == 0.01
    assert clips[-1] > 5 * clips[0]
    assert summary["epsilon"] == pld_epsilon(Event.of_schedule(fixed), fixed.delta)


def test_g11_a_test_source_at_the_server_is_infinity_in_the_report(tmp_path):
    summary = go(tmp_path / "run", seeded=True)
    assert summary["epsilon"] == float("inf")
    assert [entry["epsilon"] for entry in report_of(tmp_path / "run")["headline"]["adversaries"]] == ["infinity"] * 3


SEEDED = {"client": "tests.apps.seeded:client", "sources": SeededSources()}


def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path):
    go(tmp_path / "whole", seeded=True)
    go(tmp_path / "stopped", seeded=True, watcher=Watcher(stop_after=2))
    assert load(tmp_path / "stopped/checkpoints/latest.ckpt").round == 2
    stored = Scenario.from_run(tmp_path / "stopped")
    simulate(stored, resume=tmp_path / "stopped", observer=Watcher(), **SEEDED)
    assert np.array_equal(model_of(tmp_path / "stopped"), model_of(tmp_path / "whole"))


@pytest.mark.slow
def test_a_run_on_two_workers_equals_one_on_one(tmp_path):
    go(tmp_path / "one", seeded=True)
    go(tmp_path / "two", seeded=True, workers=2)
    assert np.array_equal(model_of(tmp_path / "one"), model_of(tmp_path / "two"))


def test_a_run_that_began_before_plans_could_protect_clients_goes_on(tmp_path):
    keys = {"clients": 3, "rounds": 2, "steps-per-round": 1, "mode": "hooks"}
    folder = tmp_path / "run"
    simulate(Scenario.layered(None, keys), out=folder, observer=Watcher(stop_after=1))
    job, config = (json.loads((folder / name).read_text()) for name in ("job.json", "config.json"))
    for field in ("client_rate", "turns", "quantile", "clip_lr", "bit_noise"):
        job["plan"].pop(field, None)
    for name in ("unit", "client-rate", "client-turns", "clip-quantile", "clip-lr", "bit-noise"):
        del config[name]
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "config.json").write_text(json.dumps(config))
    # The ledgers committed to the plan's digest: they would decline another one.
    summary = simulate(Scenario.from_run(folder), resume=folder, observer=Watcher())
    assert summary["rounds"] == 2
    assert report_of(folder)["headline"]["reasons"] == []
    assert not {"turns", "client_rate"} & report_of(folder)["plan"].keys()


def test_g16_what_the_command_prints_names_the_adversary(capsys):
    import tacit

    tacit._closing({"unit": "client", "epsilon": 2.77, "epsilon_replace_one": 6.2, "delta": 1e-5})
    text = capsys.readouterr().out
    assert "2.77 at delta 1e-05 for each client, add or remove the client, against whoever sees who takes part" in text
    assert "infinite against the server" in text
    tacit._closing({"unit": "record", "epsilon": 2.77, "epsilon_replace_one": 6.2, "delta": 1e-5})
    assert "add or remove one record" in capsys.readouterr().out


def test_ledgers_are_shared_by_runs_of_one_unit_and_refuse_the_other_before_anything_is_charged(tmp_path):
    # At rate 1 every client has spent all its turns, whatever the coins.
    keys = {"ledgers": str(tmp_path / "ledgers"), "client_rate": 1.0}
    go(tmp_path / "first", **keys)
    before = (tmp_path / "ledgers/ledger.jsonl").read_bytes()
    with pytest.raises(BudgetExceeded, match="pay for the whole job"):
        go(tmp_path / "second", **keys)
    other = Scenario.layered(
        None, {"clients": 12, "rounds": 1, "mode": "hooks", "epsilon": 0.1, "ledgers": str(tmp_path / "ledgers")}
    )
    with pytest.raises(BudgetExceeded, match="granted for records, got ones for clients"):
        simulate(other, out=tmp_path / "third", observer=Watcher())
    assert (tmp_path / "ledgers/ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"weights": "declared", "declared_sizes": "1,2"}, "weights"),
        ({"multiplicity": 2}, "multiplicity"),
        ({"cohort": 3}, "cohort"),
        ({"min_replies": 3}, "min-replies"),
        ({"views": 2}, "views"),
        ({"mode": "ghost"}, "mode"),
        ({"client_turns": 5}, "client-turns"),
        ({"bit_noise": 3.0}, "clip-quantile"),
        ({"clip_lr": 0.1}, "clip-quantile"),
        ({"delta": 0.09, "records_bound": 2, "records_per_client": 2}, "clients"),
        ({"unit": "record"}, "client-rate"),
    ],
)
def test_what_cannot_be_meant_at_a_unit_is_refused(keys, words):
    with pytest.raises(PlanError, match=words):
        scenario(**keys)


def test_too_little_noise_on_the_bits_is_refused_at_the_start(tmp_path):
    with pytest.raises(PlanError, match="bit_noise"):
        go(tmp_path / "run", clip_quantile=0.5, bit_noise=0.5)
    assert not (tmp_path / "run").exists()


def test_the_noise_is_solved_for_the_unamplified_figure_and_all_turns():
    plan, order = central_plan(scenario(epsilon=2.0).resolved(1400))
    assert plan.joins == plan.turns + 1
    grant = Grant(epsilon=2.0, delta=plan.delta, order=order, unit=Unit.CLIENT, records_bound=plan.records_bound)
    # The least noise that the ledger's own filter admits for every turn and every retry.
    assert 0.999 < rdp(Event.of_schedule(plan), order) / grant.budget_rdp <= 1
    assert pld_epsilon(Event.of_models(plan), plan.delta) < pld_epsilon(Event.of_schedule(plan), plan.delta) <= 2.0


# -- kill -9 ----------------------------------------------------------------------------------------------------


def _child(folder, resume, kill_at, log):
    """Runs or resumes a job and dies at the given operation; logs who is asked, and each model that is told."""
    import hashlib

    import torch

    from server import central
    from simulations.engine import LocalGrid

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

    def note(**line):
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\n")

    ask, evaluate = LocalGrid.send_and_receive, central.evaluate

    def asked(self, messages, *, timeout=None):
        sent = list(messages)
        note(round=sent[0].content["job"]["round"], cohort=[m.metadata.dst_node_id for m in sent])
        return ask(self, sent, timeout=timeout)

    def told(job, model, arrays):
        # What is evaluated is what everybody will see.
        number = load(Path(folder) / "checkpoints/latest.ckpt").round
        note(round=number, model=hashlib.sha256(b"".join(v.tobytes() for v in arrays.values())).hexdigest())
        return evaluate(job, model, arrays)

    LocalGrid.send_and_receive, central.evaluate = asked, counted(told)
    path = Path(folder)
    given = Scenario.from_run(path) if resume else scenario(retries=3)
    simulate(given, out=None if resume else path, resume=path if resume else None, observer=Watcher())
    note(operations=operations[0])


@pytest.fixture(scope="module")
def spawn():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simulations.run", "clients.app", "simulations.engine", "sklearn.datasets"])

    def run(folder, *, resume, kill_at, log):
        process = context.Process(target=_child, args=(str(folder), resume, kill_at, str(log)))
        process.start()
        process.join(120)
        assert not process.is_alive(), "the job hangs"
        return process.exitcode

    return run


def _whole(spawn, folder, log, kills):
    """Starts a job, kills it at each operation in turn, resumes it to its end, and looks at all its lives."""
    resume = False
    for kill_at in kills:
        if spawn(folder, resume=resume, kill_at=kill_at, log=log) == 0:
            break
        resume = (folder / "config.json").exists()
    else:
        assert spawn(folder, resume=resume, kill_at=0, log=log) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    cohorts, models = collections.defaultdict(set), collections.defaultdict(set)
    for line in lines:
        if "cohort" in line:
            cohorts[line["round"]].add(tuple(line["cohort"]))
        if "model" in line:
            models[line["round"]].add(line["model"])
    assert all(len(drawn) == 1 for drawn in cohorts.values()), "a cohort was drawn again"
    assert all(len(seen) == 1 for seen in models.values()), "two noised models of one round left"
    told = [json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert told == list(range(1, SMALL["rounds"] + 1))
    counted = load(folder / "checkpoints/latest.ckpt").central.counted
    with Book(folder / "ledgers") as book:
        for account in book.accounts.values():
            node = int(account.name.removeprefix("client-")) + 1
            assert counted.get(node, 0) <= account.charges
            assert account.spent <= account.grant.epsilon
    assert report_of(folder)["headline"]["reasons"] == []
    return lines[-1]["operations"]


def test_g16_killed_a_resumed_run_asks_one_cohort_and_tells_one_model_a_round(spawn, tmp_path):
    # tests/server kills a server at every step of its own; here the whole program dies, in the middle of its rounds.
    _whole(spawn, tmp_path / "run", tmp_path / "log.jsonl", [120])


@pytest.mark.slow
def test_g16_killed_anywhere_and_again_while_resuming(spawn, tmp_path):
    total = _whole(spawn, tmp_path / "undisturbed", tmp_path / "undisturbed.jsonl", [])
    assert total > 150
    dice = random.Random(1618)
    for kill_at in range(1, total + 1, 3):
        _whole(spawn, tmp_path / str(kill_at), tmp_path / f"{kill_at}.jsonl", [kill_at, dice.randint(1, total)])
