"""Plans: the same figures as a run, both ways round, and what ledgers afford."""

import dataclasses
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from models.catalog import TASKS
from privacy.accounting import Event, Grant, Repeats, best_only_epsilon, best_order, pld_epsilon, rdp
from privacy.errors import LedgerError, PlanError
from privacy.ledger import Book, ChargeRequest, Receipt
from simulations.planning import _points, left_in, picture, plan, read_only, signal
from simulations.scenario import Scenario
from simulations.world import calibrate, populate, settle
from tests.oracles import make_plan, remark

SMALL: dict[str, object] = {"clients": 4, "rounds": 3, "steps-per-round": 1, "mode": "hooks"}
# Plain Gaussian releases: every accountant answers at once.
QUICK: dict[str, object] = SMALL | {"sample-rate": 1.0}


def scenario(keys: dict[str, object]) -> Scenario:
    return Scenario.layered(None, keys)


def test_a_plan_is_what_a_run_of_the_same_scenario_settles():
    chosen = scenario(SMALL)
    source, population = populate(chosen, TASKS["digits"])
    resolved = chosen.resolved(source.declared_records)
    settled = settle(resolved, TASKS["digits"], population.shape)
    planned, order = calibrate(resolved)
    assert planned == settled.plan
    assert order == settled.order
    assert plan(chosen)["plan"] == json.loads(settled.plan.to_json())


def test_both_ways_round_meet():
    there = plan(scenario(QUICK))
    noise = there["plan"]["noise_multiplier"]
    back = plan(scenario(QUICK | {"noise-multiplier": noise}))
    assert (there["solved"], back["solved"]) == ("noise", "epsilon")
    # The noise is solved to a relative 1e-4, rounded up.
    assert back["cost"]["filter"]["epsilon"] == pytest.approx(3.0, rel=1e-3)
    assert back["cost"]["filter"]["epsilon"] <= 3.0


def test_a_plan_without_sampling_is_the_gaussian_mechanism():
    facts = plan(scenario(QUICK | {"noise-multiplier": 5.0}))
    steps = facts["schedule"]["steps"]
    assert steps == 3 + 1  # three rounds of one step, and one spare charge
    assert facts["cost"]["zcdp_rho"] == pytest.approx(steps / 50)
    assert facts["cost"]["gdp_mu"] == pytest.approx(math.sqrt(steps) / 5)
    sampled = plan(scenario(SMALL | {"epsilon": 200.0}))
    assert sampled["cost"]["zcdp_rho"] is None
    # Above epsilon 100 no loss distribution is asked, and nothing is made up in its place.
    assert sampled["cost"]["pld"] is None
    assert sampled["cost"]["persons"][2]["epsilon"] is None


def test_every_figure_is_ordered_as_it_must_be():
    cost = plan(scenario(QUICK))["cost"]
    assert cost["pld"] <= cost["filter"]["epsilon"] < cost["replace_one"]
    # Rounded up a little, and below the bound that always holds.
    assert -1e-6 < cost["replace_one"] - cost["replace_one_second"] < 0.01
    assert cost["replace_one_second"] < cost["replace_one_rdp"]
    assert [item["delta"] for item in cost["at_deltas"]] == pytest.approx([1e-5, 1e-6, 1e-7])
    epsilons = [item["epsilon"] for item in cost["at_deltas"]]
    assert epsilons == sorted(epsilons)
    persons = [item["epsilon"] for item in cost["persons"]]
    assert persons[0] < persons[1] < persons[2]
    assert cost["odds"] == pytest.approx(math.exp(cost["pld"]))
    assert 0.001 < cost["tpr"][0]["tpr"] < cost["tpr"][1]["tpr"] < 1


def test_g4_several_data_sets_a_person_are_composed():
    facts = plan(scenario(QUICK | {"multiplicity": 3, "noise-multiplier": 5.0}))
    event = Event(sample_rate=1.0, noise_multiplier=5.0, steps=3 * facts["schedule"]["steps"])
    assert facts["cost"]["federation"]["epsilon"] == pld_epsilon(event, 1e-5)
    assert facts["cost"]["federation"]["epsilon"] > facts["cost"]["pld"]
    # An attacker is up against the person, not against one of its records.
    assert facts["cost"]["odds"] == pytest.approx(math.exp(facts["cost"]["federation"]["epsilon"]))


def test_the_signal_to_noise_is_that_of_drawn_noise():
    import numpy as np

    chosen = scenario(QUICK | {"noise-multiplier": 5.0, "l2-clip": 0.5})
    found = plan(chosen)["signal"]
    assert found["parameters"] == 650  # softmax regression: 64 pixels and a bias, ten classes
    settled, _ = calibrate(chosen.resolved(1437))
    rng = np.random.default_rng(0)
    means = [rng.normal(0, 5.0 * 0.5, (4, 650)).__truediv__(settled.expected_batch).mean(axis=0) for _ in range(200)]
    # False alarm under 1e-6: the norm of 650 draws varies by 3 %, its mean over 200 by 0.2 %.
    assert found["noise_norm"] == pytest.approx(float(np.mean([np.linalg.norm(m) for m in means])), rel=0.01)
    assert found["ratio_of_a_step"] == pytest.approx(0.5 / found["noise_norm"])


def test_unequal_weights_average_less_noise_away():
    even = scenario(QUICK).resolved(1437)
    odd = scenario(QUICK | {"weights": "declared", "declared-sizes": "1,1,1,97"}).resolved(1437)
    settled, _ = calibrate(even)
    assert signal(settled, odd, 650)["noise_norm"] > 1.8 * signal(settled, even, 650)["noise_norm"]
    assert signal(settled, even, None)["ratio_of_a_round"] is None


def test_the_sweeps_hold_the_plan_and_move_as_they_must():
    facts = plan(scenario(QUICK | {"rounds": 8}))
    rounds, epsilons = facts["sweeps"]["rounds"], facts["sweeps"]["epsilon"]
    assert [row["rounds"] for row in rounds] == [2, 4, 8, 16, 32]
    assert rounds[2]["epsilon"] == pytest.approx(facts["cost"]["filter"]["epsilon"])
    assert [row["epsilon"] for row in rounds] == sorted(row["epsilon"] for row in rounds)
    noise = [row["noise_multiplier"] for row in epsilons]
    assert noise == sorted(noise, reverse=True)
    assert noise[2] == facts["plan"]["noise_multiplier"]


def test_the_picture_is_whole_and_draws_every_point():
    facts = plan(scenario(QUICK))
    root = ElementTree.fromstring(picture(facts))  # noqa: S314 -- our own picture
    circles = [node for node in root.iter() if node.tag.endswith("circle")]
    drawn = sum(len(_points(facts["sweeps"]["rounds"], "rounds", y)) for y in ("epsilon", "pld"))
    assert len(circles) == drawn + len(facts["sweeps"]["epsilon"]) + 2
    assert "script" not in picture(facts)
    assert "&lt;b&gt;" in picture(facts | {"task": "<b>"})
    assert "nothing finite" in picture(facts | {"sweeps": {"rounds": [], "epsilon": []}})


def test_a_plan_of_data_that_nobody_published_says_what_is_unknown():
    with pytest.raises(PlanError, match="records-per-client"):
        plan(scenario(QUICK | {"task": "image-folder"}))
    facts = plan(scenario(QUICK | {"task": "image-folder", "records-per-client": 400}))
    assert facts["signal"]["noise_norm"] is None
    assert facts["signal"]["noise_per_parameter"] > 0
    # Nothing is downloaded for a plan.
    assert plan(scenario(QUICK | {"task": "mnist-cnn", "delta": 1e-6}))["schedule"]["records_per_client"] == 15_000


def test_a_table_is_planned_from_its_schema_alone(tmp_path: Path):
    (tmp_path / "schema.toml").write_text(
        'target = "y"\nclasses = ["a", "b"]\nrecords = 800\n[columns.x]\nkind = "number"\nmin = 0\nmax = 1\n'
    )
    facts = plan(scenario(QUICK | {"task": "table", "data": str(tmp_path)}))
    assert facts["schedule"]["records_per_client"] == 200
    assert facts["signal"]["parameters"] > 0


@pytest.mark.parametrize("noise", [1e9, 1e5])
def test_enormous_noise_has_a_price_and_no_trouble(noise: float):
    for rate in (0.5, 1.0):
        cost = plan(scenario(SMALL | {"noise-multiplier": noise, "sample-rate": rate}))["cost"]
        assert 0 <= cost["pld"] <= cost["filter"]["epsilon"] < 0.02
        assert cost["persons"][1]["epsilon"] < 0.2


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"delta": 0}, "delta > 0"),
        ({"delta": 1.0}, "0 < delta < 1"),
        ({"epsilon": 0.0, "noise-multiplier": 0.0}, "no training without noise"),
        ({"noise-multiplier": 1e-3}, "noise that protects at all"),
        ({"rounds": 0}, "rounds >= 1"),
        ({"epsilom": 3}, "did you mean 'epsilon'"),
        ({"epsilon": 1e-3}, "some noise"),
        ({"delta": 1e-3}, "1/records_bound"),
    ],
)
def test_bad_input_is_one_sentence(keys: dict[str, object], words: str):
    with pytest.raises(PlanError, match=re.escape(words)):
        plan(scenario(QUICK | keys))


# -- what is left -------------------------------------------------------------------------------------------------


def ledger(folder: Path, *, epsilon: float = 3.0, rounds: int = 0, noise: str = "os-aes") -> Grant:
    """Makes a book of two accounts, of which the first is charged for some rounds of `make_plan`."""
    from privacy.noise import SECURE_SOURCE

    job = make_plan(rounds=rounds or 1, joins=rounds or 1)
    grant = Grant(epsilon=epsilon, delta=1e-5, order=best_order(Event.of_round(job), 1e-5)[0], records_bound=1000)
    with Book(folder) as book:
        book.grant({"a": grant, "b": grant}, population="people")
        for number in range(1, rounds + 1):
            (outcome,) = book.charge(
                [
                    ChargeRequest(
                        name="a",
                        job="0" * 32,
                        round=number,
                        request=f"{number:064x}",
                        plan=job,
                        noise=SECURE_SOURCE if noise == "os-aes" else noise,
                    )
                ]
            )
            assert isinstance(outcome, Receipt)
    return grant


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir())
    }


def test_ledgers_say_how_many_more_runs_they_afford_and_the_gate_agrees(tmp_path: Path):
    grant = ledger(tmp_path, epsilon=8.0, rounds=3)
    job = make_plan(rounds=2, joins=3)
    first, second = left_in(tmp_path, job, 2)
    assert (first["charges"], second["charges"]) == (3, 0)
    assert second["rounds"] == first["rounds"] + 3
    assert second["remaining"] == 8.0
    assert first["remaining"] == pytest.approx(8.0 - first["spent"])
    # The gate's own arithmetic: one by one, until it refuses.
    event, spent, count = Event.of_round(job), 0.0, 0
    while grant.affords(spent, event):
        spent, count = spent + rdp(event, grant.order), count + 1
    assert second["rounds"] == count
    assert second["runs"] == count // 3
    assert second["runs_without_retries"] == count // 2


def test_planning_reads_ledgers_and_writes_nothing(tmp_path: Path):
    ledger(tmp_path, rounds=2)
    before = fingerprint(tmp_path)
    tmp_path.chmod(0o500)
    try:
        left_in(tmp_path, make_plan(), 1)
    finally:
        tmp_path.chmod(0o700)
    assert fingerprint(tmp_path) == before
    empty = tmp_path / "empty"
    empty.mkdir()
    for place in (empty, tmp_path / "missing"):
        with pytest.raises(LedgerError, match=r"without ledger\.jsonl"):
            left_in(place, make_plan(), 1)
    assert not list(empty.iterdir())
    assert not (tmp_path / "missing").exists()


def test_a_torn_charge_is_spent_for_a_reader_too(tmp_path: Path):
    ledger(tmp_path, rounds=2)
    whole = left_in(tmp_path, make_plan(), 1)
    path = tmp_path / "ledger.jsonl"
    data = path.read_bytes()
    *lines, last = data.splitlines(keepends=True)
    # A crash left the last charge unmarked, which counts, and one behind it torn, which was told to nobody.
    path.write_bytes(b"".join(lines))
    remark(tmp_path)
    path.write_bytes(data + last[:-30])
    before = fingerprint(tmp_path)
    assert left_in(tmp_path, make_plan(), 1) == whole
    assert fingerprint(tmp_path) == before


def test_a_damaged_ledger_or_a_missing_key_is_refused(tmp_path: Path):
    ledger(tmp_path, rounds=1)
    path = tmp_path / "ledger.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"round":1', '"round":2'))
    with pytest.raises(LedgerError, match=re.escape(str(tmp_path))), read_only(tmp_path):
        pass
    path.write_text(text)
    (tmp_path / "ledger.key").unlink()
    with pytest.raises(LedgerError, match=r"ledger\.key"), read_only(tmp_path):
        pass
    assert not (tmp_path / "ledger.key").exists()


def test_g11_a_test_ledger_has_nothing_left(tmp_path: Path):
    ledger(tmp_path, rounds=1, noise="test:seeded")
    first, second = left_in(tmp_path, make_plan(), 1)
    assert (first["spent"], first["remaining"], first["rounds"]) == (math.inf, 0.0, 0)
    assert second["rounds"] > 0


# -- the price of a search whose losers never leave ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "repeats", "printed"),
    [
        (10, Repeats.GEOMETRIC, 5.06),
        (30, Repeats.GEOMETRIC, 5.73),
        (30, Repeats.LOGARITHMIC, 4.72),
        (100, Repeats.GEOMETRIC, 6.38),
        (10, Repeats.POISSON, 5.76),
    ],
)
def test_g5_best_only_prices_match_the_printed_table(mean: float, repeats: Repeats, printed: float):
    one = Event(sample_rate=256 / 60_000, noise_multiplier=1.1, steps=14_100)
    figure = best_only_epsilon(one, 1e-5, mean, repeats)
    assert figure == pytest.approx(printed, abs=0.006)
    # It lies between one candidate and all of them, which is what a federated search costs.
    assert best_order(one, 1e-5)[1] < figure < best_order(dataclasses.replace(one, steps=10 * one.steps), 1e-5)[1]


@pytest.mark.parametrize("mean", [0.5, 1, -1, math.nan, math.inf])
def test_a_number_of_candidates_that_cannot_be_drawn_is_refused(mean: float):
    with pytest.raises(PlanError, match="mean number of candidates"):
        best_only_epsilon(Event(sample_rate=0.1, noise_multiplier=1.0, steps=10), 1e-5, mean, Repeats.GEOMETRIC)
