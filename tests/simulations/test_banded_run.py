"""Whole runs with banded noise (G16): they learn with less noise in the model, and report, verify and ledger agree."""

import dataclasses
import functools
import json
import math
import shutil

import numpy as np
import pytest

from privacy import verify as verify_module
from privacy.accounting import Event, Grant, Kind, best_order, pld_epsilon, prv_epsilon, rdp, solve_noise
from privacy.central import aggregate
from privacy.errors import PlanError
from privacy.identity import Secret
from privacy.ledger import Book
from privacy.ledger_report import over_ledgers
from privacy.matrix import CorrelatedNoise, matrix_event, matrix_of
from privacy.noise import Keystream
from privacy.plan import Banded, Plan, Unit
from privacy.report import odds_of, render, report_id, sign, tier_words, to_json
from privacy.report_clients import sentence_of_clients
from privacy.transcript import read_ledger
from privacy.verify import Result, verify_files
from simulations import planning
from simulations.run import simulate
from simulations.scenario import Scenario
from simulations.world import central_plan
from tests.apps.seeded import SeededSources
from tests.oracles import rechain
from tests.simulations.test_central_run import Watcher, model_of, report_of

SMALL = {"unit": "client", "noise": "banded", "clients": 12, "rounds": 6, "separation": 3, "steps-per-round": 1}
SEEDED = {"client": "tests.apps.seeded:client", "sources": SeededSources()}


def scenario(**keys):
    return Scenario.layered(None, SMALL | {key.replace("_", "-"): value for key, value in keys.items()})


def plan_of(folder):
    return Plan.from_json(json.dumps(json.loads((folder / "job.json").read_text())["plan"]))


@pytest.fixture(autouse=True, scope="module")
def one_price():
    """PRV's figure of one schedule takes a second and never changes: it is computed once for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "prv_epsilon", functools.lru_cache(prv_epsilon))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("banded") / "run"
    summary = simulate(scenario(), out=folder, observer=Watcher())
    return folder, summary


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def failures(folder):
    return {check.name for check in verify_files([folder]) if check.result is Result.FAILS}


# -- the plan ---------------------------------------------------------------------------------------------------


def test_a_banded_plan_says_its_whole_law_and_survives_json():
    plan, _ = central_plan(scenario().resolved(1400))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert matrix_of(again).rounds == 6
    assert (matrix_of(again).separation, matrix_of(again).participations, matrix_of(again).bands) == (3, 2, 3)
    others = [
        dataclasses.replace(plan, rounds=5),
        dataclasses.replace(plan, banded=Banded(separation=3, coefficients=plan.banded.coefficients[:2])),
        dataclasses.replace(plan, banded=Banded(separation=3, coefficients=(1.0, 0.5, 0.25))),
        dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier * 1.01),
    ]
    assert len({plan.digest(), *(other.digest() for other in others)}) == 5


def test_a_plan_of_coins_has_the_text_and_the_digest_that_it_always_had():
    plan, _ = central_plan(Scenario.layered(None, {"unit": "client", "noise-multiplier": 2.0}).resolved(1400))
    assert "banded" not in json.loads(plan.to_json())
    # Ledgers and jobs written before there was banded noise name this digest.
    assert plan.digest() == "3db15a3459803567df825967dc0a27cb9cc7b17aa7b770dd92518ffca07dd92a"


def _law(**changes):
    return {"separation": 3, "coefficients": [1.0, 0.5]} | changes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("banded", None),
        ("banded", [1]),
        ("banded", _law(coefficients=[])),
        ("banded", _law(coefficients=[0.5])),
        ("banded", _law(coefficients=[1.0, 1.1])),
        ("banded", _law(coefficients=[1.0, -0.1])),
        ("banded", _law(coefficients=[1.0, True])),
        ("banded", _law(coefficients=1.0)),
        ("banded", _law(coefficients=[1.0, 0.5, 0.4, 0.3])),
        ("banded", _law(separation=2.0)),
        ("banded", _law(separation=0)),
        # Turns of another separation than the law's: fewer would be another price.
        ("banded", _law(separation=2)),
        ("banded", _law(more=1)),
        ("joins", 3),
        ("turns", 1),
        ("client_rate", 0.5),
        ("quantile", 0.5),
        ("rounds", 1),
        ("unit", "record"),
    ],
)
def test_a_law_that_is_none_is_refused(field, value):
    plan, _ = central_plan(scenario().resolved(1400))
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(json.loads(plan.to_json()) | {field: value}))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"clip_quantile": 0.5}, "clip-quantile"),
        ({"metrics": "accuracy"}, "metrics"),
        ({"client_rate": 0.5}, "client-rate"),
        ({"client_turns": 2}, "client-turns"),
        ({"retries": 1}, "retries"),
        ({"separation": 13}, "separation <= clients"),
        ({"bands": 4}, "bands <= separation"),
        ({"bands": 9, "separation": 0}, "bands <= rounds"),
        ({"unit": "record"}, "noise"),
        ({"noise": "independent"}, "separation"),
    ],
)
def test_what_cannot_be_meant_with_banded_noise_is_refused_up_front(keys, words):
    with pytest.raises(PlanError, match=words):
        scenario(**keys)


def test_what_nobody_chose_fits_the_rounds_and_the_clients():
    for keys, expected in (
        ({"separation": 0}, (5, 5)),
        ({"separation": 0, "bands": 2}, (2, 2)),
        ({"separation": 4, "bands": 2}, (4, 2)),
        ({"separation": 0, "rounds": 3}, (3, 3)),
        ({"separation": 12, "rounds": 3}, (12, 3)),
    ):
        resolved = scenario(**keys).resolved(1400)
        assert (resolved.separation, resolved.bands) == expected
        plan, _ = central_plan(resolved)
        assert (plan.turns, plan.banded.bands) == (math.ceil(resolved.rounds / expected[0]), expected[1])


# -- less noise in the model, at the same price -----------------------------------------------------------------


def test_banded_noise_disturbs_the_sum_of_all_rounds_less_at_the_same_epsilon_and_schedule():
    """The oracle prices fresh noise as the ledger would: each of a client's turns is a Gaussian release."""
    epsilon, delta = 4.0, 1e-5
    resolved = scenario(clients=40, rounds=40, separation=8, epsilon=epsilon).resolved(1400)
    plan, _ = central_plan(resolved)
    fresh, _ = solve_noise(epsilon=epsilon, delta=delta, sample_rate=1.0, steps=plan.turns)
    assert best_order(Event.of_schedule(plan), delta)[1] == pytest.approx(epsilon, rel=1e-3)
    # Fresh noise in t rounds adds up to variance t.
    independent = fresh * math.sqrt(np.mean(np.arange(1, 41)))
    banded = plan.noise_multiplier * matrix_of(plan).error()
    assert 0.3 < banded / independent < 0.6
    # A matrix of one band is fresh noise, at exactly its price.
    one = dataclasses.replace(matrix_of(plan), coefficients=(1.0,))
    assert plan.noise_multiplier * one.error() == pytest.approx(independent, rel=2e-4)


@pytest.mark.statistical
def test_what_the_server_draws_disturbs_the_model_as_little_as_the_plan_says(tmp_path):
    """Both servers' own noise, 40 rounds of nobody's updates. False alarms below 1e-6 (10 % of 2000 parameters)."""
    size = 2000
    resolved = scenario(clients=40, rounds=40, separation=8).resolved(1400)
    plan, _ = central_plan(resolved)
    fresh, _ = solve_noise(epsilon=plan.epsilon, delta=plan.delta, sample_rate=1.0, steps=plan.turns)
    coins = dataclasses.replace(
        plan, banded=None, client_rate=1 / 8, joins=plan.turns, noise_multiplier=fresh, expected_batch=5.0
    )
    noise = CorrelatedNoise.begin(
        tmp_path,
        matrix_of(plan),
        job="ab" * 16,
        size=size,
        noise_multiplier=plan.noise_multiplier,
        l2_clip=plan.l2_clip,
    )
    with noise:
        rows = [noise.release(row, np.zeros(size), f"{row:064x}") for row in range(1, 41)]
    others = [aggregate([], size, coins, coins.l2_clip, Keystream()).mean * coins.expected_batch for _ in range(40)]
    banded, independent = (np.sqrt(np.mean(np.cumsum(moves, axis=0) ** 2)) for moves in (rows, others))
    assert banded == pytest.approx(plan.noise_multiplier * matrix_of(plan).error() * plan.l2_clip, rel=0.1)
    assert 0.3 < banded / independent < 0.6


# -- a whole run ------------------------------------------------------------------------------------------------


def test_g16_a_banded_run_is_charged_once_and_report_verify_and_ledger_agree(finished):
    folder, summary = finished
    plan, report = plan_of(folder), report_of(folder)
    event = matrix_event(plan.noise_multiplier)
    assert Event.of_schedule(plan) == Event.of_round(plan) == event
    headline = report["headline"]
    assert headline["reasons"] == []
    assert headline["epsilon"] == summary["epsilon"] == pld_epsilon(event, plan.delta) <= 3.0
    # Whoever sees less gets no better figure: turns are public.
    assert [row["epsilon"] for row in headline["adversaries"]] == [headline["epsilon"], "infinity", headline["epsilon"]]
    assert report["prices"]["models_alone"]["epsilon"] == headline["epsilon"]
    assert report["prices"]["steps"] == 1
    assert "no discount for chance" in headline["basis"]
    with Book(folder / "ledgers") as book:
        for account in book.accounts.values():
            assert account.charges == 1
            assert account.spent_rdp == pytest.approx(rdp(event, account.grant.order))
            assert len(account.jobs[report["run"]["job"]].rounds) == 2
    assert [client["rounds_joined"] for client in report["clients"]] == [2] * 12
    assert {client["undelivered"] for client in report["clients"]} == {0}
    checks = {check.name: check.result for check in verify_files([folder])}
    assert Result.FAILS not in checks.values()
    for name in ("turns", "commitments", "headline", "adversaries", "spend, counted anew", "PLD price"):
        assert checks[name] is Result.HOLDS
    page = (folder / "report.html").read_text()
    assert "Turns are public" in page
    assert "Poisson, each client" not in page
    assert not (folder / "noise").exists()


def test_a_report_alone_with_its_receipts_counts_a_matrix_once(run):
    shutil.rmtree(run / "ledgers")
    checks = {check.name: check for check in verify_files([run])}
    assert checks["spend, counted anew"].result is Result.HOLDS
    assert checks["spend, counted anew"].words.startswith("12 accounts, 12 charges")
    assert not [name for name, check in checks.items() if check.result is Result.FAILS]


def test_a_report_over_the_ledgers_prices_the_one_event(run):
    plan = plan_of(run)
    report = over_ledgers([read_ledger(run / "ledgers/ledger.jsonl")])
    for row in report["data_sets"]:
        assert row["charges"] == 1
        assert row["schedule"]["pld"] == pld_epsilon(matrix_event(plan.noise_multiplier), plan.delta)
        assert row["runs"][0]["alone_epsilon"] == row["spent_epsilon"]


def test_g16_a_banded_run_with_little_noise_learns(tmp_path):
    keys = {"clients": 30, "rounds": 12, "epsilon": 0, "noise_multiplier": 0.25, "steps_per_round": 5, "l2_clip": 3}
    summary = simulate(scenario(**keys), out=tmp_path / "run", observer=Watcher())
    assert summary["metrics"]["accuracy"] > 0.7
    assert failures(tmp_path / "run") == set()


def test_g11_a_test_source_is_infinity_in_a_banded_report_and_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path):
    whole = simulate(scenario(), out=tmp_path / "whole", observer=Watcher(), **SEEDED)
    simulate(scenario(), out=tmp_path / "stopped", observer=Watcher(stop_after=2), **SEEDED)
    assert (tmp_path / "stopped/noise/noise.state").exists()
    stored = Scenario.from_run(tmp_path / "stopped")
    simulate(stored, resume=tmp_path / "stopped", observer=Watcher(), **SEEDED)
    assert np.array_equal(model_of(tmp_path / "stopped"), model_of(tmp_path / "whole"))
    assert whole["epsilon"] == math.inf
    rows = report_of(tmp_path / "stopped")["headline"]["adversaries"]
    assert [row["epsilon"] for row in rows] == ["infinity"] * 3


@pytest.mark.slow
def test_two_workers_give_the_model_of_one(tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        simulate(scenario(workers=workers, rounds=3), out=tmp_path / name, observer=Watcher(), **SEEDED)
    assert np.array_equal(model_of(tmp_path / "one"), model_of(tmp_path / "two"))


def test_a_run_that_stopped_half_way_is_priced_whole(tmp_path):
    summary = simulate(scenario(), out=tmp_path / "run", observer=Watcher(stop_after=2))
    assert summary["epsilon"] == pld_epsilon(Event.of_schedule(plan_of(tmp_path / "run")), 1e-5)
    assert failures(tmp_path / "run") == set()


# -- under-counts -----------------------------------------------------------------------------------------------


def rewrite(folder, change):
    """The operator changes its report, and makes id, signature and page anew."""
    report = report_of(folder)
    change(report)
    report["report_id"] = report_id(report)
    signed = sign(report, Secret.load_or_create(folder / "server.key").identity("server"))
    (folder / "report.json").write_text(to_json(signed))
    (folder / "report.html").write_text(render(signed))


def by_rounds(plan):
    """The planted bug: each row's noise is taken for a Gaussian release of its own, and the rounds are added up.

    It forgets that a client moves as many rows as there are bands with each of its rounds.
    """
    noise = matrix_of(plan).stddev(plan.noise_multiplier, 1.0)
    return Event(unit=Unit.CLIENT, sample_rate=1.0, noise_multiplier=noise, steps=plan.turns)


def requote(report, event, delta):
    """Prices a report's headline by another event, with everything that follows from it."""
    epsilon = pld_epsilon(event, delta)
    headline, prices = report["headline"], report["prices"]
    best = best_order(event, delta)[1]
    grant = Grant(epsilon=1e9, delta=delta, order=prices["gate_order"], records_bound=1000)
    prices |= {"pld": epsilon, "rdp": best, "unamplified": best, "gate": grant.epsilon_of(rdp(event, grant.order))}
    prices["models_alone"]["epsilon"] = epsilon
    headline |= {"epsilon": epsilon, "odds_factor": odds_of(epsilon), "tier": tier_words(epsilon)}
    headline["sentence"] = sentence_of_clients(epsilon, delta)
    headline["federation"] |= {"epsilon": epsilon, "one_data_set": epsilon}
    headline["adversaries"][0]["epsilon"] = headline["adversaries"][2]["epsilon"] = epsilon
    headline["person"][0]["epsilon"] = headline["person"][2]["epsilon"] = epsilon


def test_g16_planted_report_that_prices_a_matrix_round_by_round_is_caught_by_verify(run):
    plan = plan_of(run)
    cheaper = pld_epsilon(by_rounds(plan), plan.delta)
    assert cheaper < 0.9 * report_of(run)["headline"]["epsilon"]
    rewrite(run, lambda report: requote(report, by_rounds(plan), plan.delta))
    assert {"filter's price", "PLD price", "RDP price"} <= failures(run)
    rewrite(run, lambda report: report["prices"].update(steps=plan.turns))
    assert "price of the schedule" in failures(run)


def test_g16_planted_program_that_prices_a_matrix_round_by_round_is_caught_by_verify(tmp_path, monkeypatch):
    """The whole program under-counts, clients, ledgers, receipts and report alike: a sound verifier finds its run."""
    sound = Event.of_round.__func__

    def cheaper(cls, plan):
        added_up = by_rounds(plan)
        return dataclasses.replace(
            sound(cls, plan), noise_multiplier=added_up.noise_multiplier / math.sqrt(added_up.steps)
        )

    with monkeypatch.context() as patch:
        patch.setattr(Event, "of_round", classmethod(cheaper))
        summary = simulate(scenario(), out=tmp_path / "run", observer=Watcher())
        assert failures(tmp_path / "run") == set()
    assert summary["epsilon"] < 0.9 * pld_epsilon(Event.of_schedule(plan_of(tmp_path / "run")), 1e-5)
    assert {"commitments", "filter's price", "PLD price", "RDP price"} <= failures(tmp_path / "run")


def test_g16_an_amplified_figure_beside_banded_noise_is_caught_by_verify(run):
    def amplify(report):
        for of in (
            report["prices"]["models_alone"],
            report["headline"]["adversaries"][2],
            report["headline"]["person"][2],
        ):
            of["epsilon"] = 0.5

    rewrite(run, amplify)
    assert "adversaries" in failures(run)


def forged(folder, change):
    """The holder signs a changed ledger anew; what its intents would tell is gone."""
    path = folder / "ledgers/ledger.jsonl"
    path.write_bytes(rechain(path.read_bytes().splitlines(), change, folder / "ledgers/ledger.key"))


def test_g16_a_holder_that_signs_wider_turns_than_were_priced_is_caught_by_verify(run):
    """More turns than the matrix was priced for are no fault of a ledger by itself, only of this plan's."""

    def wider(entry):
        if entry["kind"] == "commit":
            entry["body"]["matrix"].update(separation=1, participations=6)
            entry["body"]["joins"] = 6

    forged(run, wider)
    assert "commitments" in failures(run)


def test_g16_two_drawings_of_one_matrix_are_caught_by_verify(run):
    seen = []

    def redrawn(entry):
        if entry["kind"] == "commit":
            seen.append(entry)
            if len(seen) == 1:
                entry["body"]["matrix"]["digest"] = "0" * 64

    forged(run, redrawn)
    assert "turns" in failures(run)


# -- planning ---------------------------------------------------------------------------------------------------


def test_a_plan_of_banded_noise_is_the_one_that_a_run_settles(finished):
    facts = planning.plan(scenario())
    settled = plan_of(finished[0])
    assert facts["plan"] == json.loads(settled.to_json())
    assert facts["schedule"] | {"records_per_client": 0} == {
        "joins": 2,
        "spare": 0,
        "charges": 1,
        "steps": 1,
        "records_per_client": 0,
    }
    assert facts["cost"]["pld"] == pld_epsilon(Event.of_schedule(settled), settled.delta)
    assert facts["signal"]["noise_of_the_sum"] < 0.9 * facts["signal"]["noise_of_the_sum_if_fresh"]
    # More rounds of one matrix cost nothing, with as much noise.
    assert {row["epsilon"] for row in facts["sweeps"]["rounds"]} == {facts["cost"]["filter"]["epsilon"]}


def test_a_ledger_affords_whole_matrices(finished, tmp_path):
    settled = dataclasses.replace(plan_of(finished[0]), noise_multiplier=100.0)
    (row, *_) = planning.left_in(finished[0] / "ledgers", settled, settled.turns)
    with Book(finished[0] / "ledgers") as book:
        account = book.accounts[row["name"]]
        left = account.grant.budget_rdp * (1 + 1e-9) - account.spent_rdp
        assert (
            row["runs"]
            == row["runs_without_retries"]
            == math.floor(left / rdp(matrix_event(100.0), account.grant.order))
        )
    assert {event.kind for event in Event.all_of_schedule(settled)} == {Kind.MATRIX_GAUSSIAN}


def test_a_plan_of_coins_can_be_planned_too():
    facts = planning.plan(Scenario.layered(None, {"unit": "client", "rounds": 4, "clients": 20}))
    assert facts["schedule"]["joins"] == facts["plan"]["turns"]
    assert facts["schedule"]["spare"] == facts["plan"]["joins"] - facts["plan"]["turns"]
