"""Metrics of clients' own records in whole runs: asked for, charged, pooled, told, and part of every price."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord

import tacit
from clients.holder import Kept
from models.catalog import TASKS
from models.shape import Shape
from privacy.accounting import Event, best_order, pld_epsilon
from privacy.errors import BudgetExceeded, PlanError, RunError
from privacy.ledger import Book, Receipt
from privacy.plan import Metric
from server import app as server_app
from simulations import evidence
from simulations.evidence import facts_of
from simulations.run import render, simulate
from simulations.scenario import Scenario
from simulations.world import Settled, World, settle

CLIENTS, ROUNDS = 4, 3
SMALL = {"clients": CLIENTS, "rounds": ROUNDS, "steps-per-round": 1, "mode": "hooks", "seed": 5}


class Quiet:
    """Watches nothing."""

    def __getattr__(self, name):
        return lambda *_: None


def scenario_of(**keys):
    return Scenario.layered(None, SMALL | {key.replace("_", "-"): value for key, value in keys.items()})


def go(folder, **keys):
    return simulate(scenario_of(**keys), out=folder, observer=Quiet())


def report_of(folder):
    render(folder)
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics") / "run"
    summary = go(folder, metrics="loss,accuracy,count,label-histogram")
    return folder, summary


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- a run ------------------------------------------------------------------------------------------------------


def test_a_run_pools_what_its_clients_say_and_gives_each_figures_error(finished):
    folder, summary = finished
    for line in lines_of(folder):
        told = line["client_metrics"]
        assert list(told) == ["accuracy", "loss", "label-histogram", "count"]
        error = 20 * CLIENTS**0.5
        assert told["count"]["stderr"] == told["label-histogram"]["stderr"] == pytest.approx(error)
        # 1430 training records; six standard errors are never reached by chance.
        assert abs(told["count"]["value"] - 1430) < 6 * error
        assert abs(sum(told["label-histogram"]["value"]) - 1430) < 6 * error * 10**0.5
        assert len(told["label-histogram"]["value"]) == 10
        assert 0 <= told["accuracy"]["value"] <= 1
        assert 0 < told["loss"]["value"] < 5
    # The first round's model is all zeros: each class looks the same, and the loss is log 10.
    first = lines_of(folder)[0]["client_metrics"]["loss"]
    assert abs(first["value"] - np.log(10)) < 6 * first["stderr"]
    assert summary["client_metrics"] == lines_of(folder)[-1]["client_metrics"]


def test_g3_metrics_are_in_the_headline_and_in_every_accountants_figure(finished):
    folder, summary = finished
    plan, prices = Settled.load(folder).plan, facts_of(World.open(folder)).prices
    history = Event.all_of_schedule(plan)
    assert [event.steps for event in history] == [plan.joins * plan.steps, *[plan.joins] * 4]
    assert summary["epsilon"] == prices.pld == pytest.approx(pld_epsilon(history, plan.delta))
    assert prices.rdp == pytest.approx(best_order(history, plan.delta)[1])
    assert prices.gate <= 3.0 * (1 + 1e-9)
    assert prices.metrics == pytest.approx(pld_epsilon(history[1:], plan.delta))
    # Planted bug: a price of the updates alone is smaller, and would be a false headline.
    assert pld_epsilon(history[0], plan.delta) < prices.pld - 0.05
    bare = settle(scenario_of().resolved(1430), TASKS["digits"], Shape(inputs=(1, 8, 8), classes=10)).plan
    assert bare.noise_multiplier < plan.noise_multiplier


def test_the_ledgers_hold_one_charge_a_round_that_names_every_release(finished):
    folder, _ = finished
    plan = Settled.load(folder).plan
    with Book(folder / "ledgers") as book:
        for account in book.accounts.values():
            (job,) = account.jobs.values()
            assert (account.charges, job.events) == (ROUNDS, Event.all_of_round(plan))
    for line in (folder / "receipts.jsonl").read_text().splitlines():
        assert Receipt.from_json(json.loads(line)["receipt"]).events == Event.all_of_round(plan)


def test_the_report_lists_what_was_released_and_what_it_cost(finished):
    report = report_of(finished[0])
    words = report["mechanism"]["client_metrics"]
    for part in ("accuracy, loss, label-histogram, count", "noise 20", "at most 4 releases", "clipped to 5"):
        assert part.lower() in words.lower(), words
    assert isinstance(report["headline"]["epsilon"], float)
    assert report["rounds"][0]["client_metrics"]["count"]["stderr"] == 40.0
    (send,) = (row["words"] for row in report["assumptions"] if row["name"] == "send")
    assert "label-histogram" in send
    page = (finished[0] / "report.html").read_text()
    assert "accuracy, clients say" in page
    assert "&plusmn;" in page


def test_the_command_prints_them(finished, capsys):
    tacit._closing(finished[1])
    printed = capsys.readouterr().out
    assert "clients say" in printed
    assert "count" in printed
    tacit._closing({name: value for name, value in finished[1].items() if name != "client_metrics"})
    assert "clients say" not in capsys.readouterr().out


def test_a_run_without_metrics_has_no_trace_of_them(tmp_path):
    summary = go(tmp_path / "run", rounds=1)
    assert "client_metrics" not in summary
    assert "client_metrics" not in lines_of(tmp_path / "run")[0]
    for name in ("job.json", "ledgers/ledger.jsonl", "receipts.jsonl"):
        assert "metric" not in (tmp_path / "run" / name).read_text(), name
    report = report_of(tmp_path / "run")
    assert "client_metrics" not in report["mechanism"]
    assert "metrics" not in report["plan"]
    (send,) = (row["words"] for row in report["assumptions"] if row["name"] == "send")
    assert "no loss, no accuracy, no count" in send


@pytest.mark.slow
def test_worker_processes_and_this_process_measure_alike(tmp_path):
    go(tmp_path / "run", metrics="count", metric_noise=2.0, epsilon=20.0, workers=2, rounds=1)
    assert abs(lines_of(tmp_path / "run")[0]["client_metrics"]["count"]["value"] - 1430) < 6 * 2 * 2


def test_with_noise_given_epsilon_follows_with_the_metrics_in_it(tmp_path):
    summary = go(tmp_path / "run", noise_multiplier=2.0, metrics="accuracy", rounds=1)
    plan = Settled.load(tmp_path / "run").plan
    assert plan.epsilon == pytest.approx(best_order(Event.all_of_schedule(plan), plan.delta)[1])
    assert summary["epsilon"] <= plan.epsilon
    assert plan.epsilon > best_order(Event.of_schedule(plan), plan.delta)[1] + 1e-3


# -- contradictions are found -----------------------------------------------------------------------------------


def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


@pytest.mark.parametrize(
    "edit",
    [
        lambda plan: plan.pop("metrics"),
        lambda plan: plan["metrics"].update(noise=2000.0),
        lambda plan: plan["metrics"].update(words=["accuracy"]),
    ],
)
def test_g3_a_job_whose_metrics_were_edited_afterwards_is_not_what_the_ledgers_committed_to(finished, tmp_path, edit):
    folder = copied(finished, tmp_path)
    job = json.loads((folder / "job.json").read_text())
    edit(job["plan"])
    (folder / "job.json").write_text(json.dumps(job))
    headline = report_of(folder)["headline"]
    assert headline["epsilon"] == "unknown"
    assert any("another plan" in reason for reason in headline["reasons"])


def test_g3_planted_bug_pricing_the_updates_alone_is_caught_against_the_ledgers(finished, tmp_path, monkeypatch):
    folder = copied(finished, tmp_path)
    assert facts_of(World.open(folder)).committed
    monkeypatch.setattr(evidence, "rdp", lambda events, order: 0.5 * sum(e.steps for e in events))
    assert not facts_of(World.open(folder)).committed


# -- the server believes nothing --------------------------------------------------------------------------------


def _no_metrics(content):
    del content["metrics"]


def _nan(content):
    content["metrics"]["accuracy"] = Array(np.array([np.nan, 1.0], np.float32))


def _longer(content):
    content["metrics"]["accuracy"] = Array(np.zeros(3, np.float32))


def _another_record(content):
    content["metrics"] = MetricRecord({"accuracy": 1.0})


def _another_name(content):
    content["metrics"] = ArrayRecord({"median": Array(np.zeros(2, np.float32))})


FAULTS = (_no_metrics, _nan, _longer, _another_record, _another_name)


def test_a_reply_without_exactly_the_plans_metrics_counts_as_missing(tmp_path, monkeypatch):
    honest, believed = server_app.check, []

    def spoilt(reply, *rest):
        # The first reply stays as it is; each later one has a fault of its own.
        if believed:
            FAULTS[len(believed) - 1](reply.content)
        believed.append(not isinstance(found := honest(reply, *rest), str))
        return found

    monkeypatch.setattr(server_app, "check", spoilt)
    go(tmp_path / "run", metrics="accuracy", rounds=1, clients=1 + len(FAULTS))
    assert believed == [True] + [False] * len(FAULTS)
    (line,) = lines_of(tmp_path / "run")
    assert (line["replies"], line["missing"]) == (1, len(FAULTS))


def test_g14_a_receipt_that_names_no_metric_is_not_believed_beside_one(tmp_path, monkeypatch):
    # Planted bug: a client that charges for its update alone, and a last door that lets the rest out unpaid.
    update_alone = property(lambda request: (Event.of_round(request.plan),))
    monkeypatch.setattr("privacy.ledger.ChargeRequest.events", update_alone)
    monkeypatch.setattr("clients.app.require_allowed", lambda *_: None)
    go(tmp_path / "run", metrics="accuracy", rounds=1)
    (line,) = lines_of(tmp_path / "run")
    assert (line["replies"], line["missing"]) == (0, CLIENTS)
    assert line["client_metrics"]["accuracy"] == {"value": None, "stderr": None}


# -- resumed ----------------------------------------------------------------------------------------------------


class StopError(Exception):
    """The server's end before its checkpoint."""


def _interrupted(folder, monkeypatch, *, keep=True):
    """Runs until the server dies before its second checkpoint, then resumes; returns each client's sent metrics."""
    sent, save = [], server_app.save
    honest = server_app.metrics_of

    def watched(reply, job):
        found = honest(reply, job)
        sent.append((reply.content["receipt"]["receipt"], found["accuracy"].tobytes()))
        return found

    def dies(state, path):
        if state.round == 2:
            raise StopError
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(server_app, "metrics_of", watched)
        patch.setattr(server_app, "save", dies)
        if not keep:
            patch.setattr(Kept, "put", lambda self, release: None)
        with pytest.raises(StopError):
            go(folder, metrics="accuracy", retries=2)
        patch.setattr(server_app, "save", save)
        simulate(Scenario.from_run(folder), resume=folder, observer=Quiet())
    by_receipt = {}
    for receipt, data in sent:
        if json.loads(receipt)["round"] == 2:
            by_receipt.setdefault(receipt, set()).add(data)
    return by_receipt


def test_g9_a_resumed_round_sends_the_same_metrics_again_and_pays_once(tmp_path, monkeypatch):
    sent = _interrupted(tmp_path / "run", monkeypatch)
    assert len(sent) == CLIENTS
    assert all(len(data) == 1 for data in sent.values())
    with Book(tmp_path / "run" / "ledgers") as book:
        assert {account.charges for account in book.accounts.values()} == {ROUNDS}


def test_g9_where_nothing_was_kept_a_resumed_round_pays_again_and_draws_again(tmp_path, monkeypatch):
    sent = _interrupted(tmp_path / "run", monkeypatch, keep=False)
    assert len(sent) == 2 * CLIENTS
    assert all(len(data) == 1 for data in sent.values())
    assert len(set().union(*sent.values())) == 2 * CLIENTS
    with Book(tmp_path / "run" / "ledgers") as book:
        assert {account.charges for account in book.accounts.values()} == {ROUNDS + 1}


# -- the scenario -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"metrics": "acuracy"}, "did you mean 'accuracy'"),
        ({"metrics": "median"}, "accuracy, loss, label-histogram, count"),
        ({"metrics": "loss,loss"}, "each metric once"),
        ({"metrics": "loss", "metric_noise": 0.0}, "metric-noise > 0"),
        ({"metrics": "loss", "metric_loss_bound": -1.0}, "metric-loss-bound > 0"),
        ({"metric_noise": 5.0}, "only with metrics"),
        ({"metric_loss_bound": 2.0}, "only with metrics"),
    ],
)
def test_metrics_that_cannot_be_meant_are_refused_in_a_sentence(keys, sentence):
    with pytest.raises(PlanError, match=sentence):
        scenario_of(**keys)


def test_metrics_are_read_in_any_order_and_spacing():
    asked = scenario_of(metrics=" loss , accuracy").asked_metrics
    assert asked.words == (Metric.ACCURACY, Metric.LOSS)
    assert scenario_of().asked_metrics is None


def test_metrics_that_would_eat_the_whole_budget_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(PlanError, match="raise metric-noise"):
        go(tmp_path / "run", metrics="accuracy", metric_noise=0.5)
    assert not (tmp_path / "run").exists()


def test_ledgers_that_cannot_pay_for_the_metrics_too_are_refused_before_the_first_round(tmp_path):
    keys = {"ledgers": str(tmp_path / "shared"), "retries": 0}
    go(tmp_path / "one", rounds=1, epsilon=3.0, **keys)
    with pytest.raises(BudgetExceeded):
        go(tmp_path / "two", rounds=1, epsilon=3.0, metrics="accuracy", **keys)


def test_a_run_cannot_be_resumed_with_other_metrics(tmp_path):
    go(tmp_path / "run", rounds=1)
    other = dataclasses.replace(Scenario.from_run(tmp_path / "run"), metrics="accuracy")
    with pytest.raises(RunError, match="metrics"):
        simulate(other, resume=tmp_path / "run", observer=Quiet())
