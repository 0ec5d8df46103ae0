"""The metrics firewall: bounded, noised, priced; each rule with a planted bug that it catches."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import metrics
from privacy.accounting import Event, best_order, events_from_json, events_to_json, pld_epsilon, rdp, solve_noise
from privacy.errors import LedgerError, PlanError
from privacy.ledger import Book, Receipt, Word
from privacy.metrics import Outcomes, Sums, pooled, release, rows, widths
from privacy.noise import Keystream
from privacy.plan import Adjacency, Metric, Metrics
from tests.oracles import ACCOUNT, gaussian_delta, make_grant, make_plan, make_request, open_book

CLASSES = 4
ALL = Metrics(words=tuple(Metric), noise=20.0, loss_bound=5.0)
WIDTH = 2 + 2 + CLASSES + 1

Release = Callable[[Metrics, Outcomes, Any], Sums]


class Silent:
    """No noise: shows what is under it."""

    name = "silent"

    def gaussian(self, n: int) -> torch.Tensor:
        return torch.zeros(n, dtype=torch.float64)


def outcomes(count: int, *, seed: int = 5, **changes: Any) -> Outcomes:
    dice = torch.Generator().manual_seed(seed)
    fields = {
        "right": torch.rand(count, generator=dice) < 0.7,
        "losses": torch.rand(count, generator=dice, dtype=torch.float64) * 3,
        "targets": torch.randint(CLASSES, (count,), generator=dice),
        "valid": torch.ones(count, dtype=torch.bool),
        "classes": CLASSES,
    }
    return Outcomes(**fields | changes)


HOSTILE = [math.nan, math.inf, -math.inf, 3e300, -3e300, 0.0, -0.0, 5.0, 4.9999999999, 1e-300]


def hostile() -> Outcomes:
    count = len(HOSTILE)
    targets = torch.tensor([0, 1, 2, 3, -1, CLASSES, 2**62, -(2**62), 1, 1])
    valid = torch.ones(count, dtype=torch.bool)
    valid[-1] = False
    return outcomes(count, losses=torch.tensor(HOSTILE, dtype=torch.float64), targets=targets, valid=valid)


def without(one: Outcomes, index: int) -> Outcomes:
    keep = torch.arange(len(one.valid)) != index
    parts = {name: getattr(one, name)[keep] for name in ("right", "losses", "targets", "valid")}
    return dataclasses.replace(one, **parts)


# -- bounded ----------------------------------------------------------------------------------------------------


def require_bounded(measure: Release, one: Outcomes) -> None:
    """Fails where removing a record moves what is under the noise by more than 1, or makes it other than a number."""
    for word in Metric:
        asked = Metrics(words=(word,), noise=20.0, loss_bound=5.0)
        whole = measure(asked, one, Silent()).astype(np.float64)
        assert np.isfinite(whole).all(), f"{word} is not finite"
        for index in range(len(one.valid)):
            moved = np.linalg.norm(whole - measure(asked, without(one, index), Silent()).astype(np.float64))
            assert moved <= 1 + 1e-5, f"one record moves {word} by {moved}"


@pytest.mark.parametrize("one", [outcomes(9), hostile(), outcomes(1), outcomes(0)], ids=["plain", "hostile", "1", "0"])
def test_g1_a_record_moves_no_metric_by_more_than_one_whatever_it_holds(one: Outcomes) -> None:
    require_bounded(release, one)


def unclamped(asked: Metrics, one: Outcomes, source: Any) -> Sums:
    """Planted bug: the sum of losses as they come."""
    share = one.losses / asked.loss_bound
    total = torch.stack((share, 1 - share), 1).sum(0)
    return np.asarray(total + asked.noise * source.gaussian(2), dtype=np.float32)


def right_and_count(asked: Metrics, one: Outcomes, source: Any) -> Sums:
    """Planted bug: two counts that one record moves together, under the noise for one."""
    total = torch.stack((one.right.double(), torch.ones(len(one.right), dtype=torch.float64)), 1).sum(0)
    return np.asarray(total + asked.noise * source.gaussian(2), dtype=np.float32)


@pytest.mark.parametrize("planted", [unclamped, right_and_count])
def test_g1_planted_bug_an_unbounded_metric_is_caught(planted: Release) -> None:
    with pytest.raises(AssertionError, match="moves"):
        require_bounded(planted, outcomes(9, losses=torch.full((9,), 80.0, dtype=torch.float64)))
    if planted is unclamped:
        with pytest.raises(AssertionError, match="not finite"):
            require_bounded(planted, hostile())


@settings(deadline=None, max_examples=200)
@given(losses=st.lists(st.floats(), max_size=12), bound=st.floats(1e-300, 1e300), word=st.sampled_from(list(Metric)))
def test_g1_no_row_is_longer_than_one_and_losses_lie_on_a_grid(losses: list[float], bound: float, word: Metric) -> None:
    one = outcomes(len(losses), losses=torch.tensor(losses, dtype=torch.float64))
    added = rows(word, one, bound)
    # Exactly, not up to rounding: the squares are of multiples of 2^-20 and fit a float64.
    assert bool((added.square().sum(1) <= 1).all())
    assert torch.equal((added * 2**20).round() / 2**20, added)
    for index in range(len(losses)):
        assert torch.equal(rows(word, without(one, index), bound), added[torch.arange(len(losses)) != index])


def test_what_is_no_number_counts_as_wrong_and_as_a_loss_at_the_bound() -> None:
    one = outcomes(3, losses=torch.tensor([math.nan, math.inf, -math.inf]), right=torch.tensor([False, False, True]))
    assert rows(Metric.LOSS, one, 5.0).tolist() == [[1, 0], [1, 0], [0, 1]]
    assert rows(Metric.ACCURACY, one, 5.0).tolist() == [[0, 1], [0, 1], [1, 0]]


def test_a_class_outside_the_public_ones_is_counted_as_none() -> None:
    one = outcomes(5, targets=torch.tensor([-1, CLASSES, 2**62, -(2**62), 2]))
    assert rows(Metric.LABELS, one, 5.0).tolist() == [[0.0] * CLASSES] * 4 + [[0, 0, 1, 0]]


def test_a_record_that_cannot_be_used_adds_nothing() -> None:
    one = outcomes(5, valid=torch.zeros(5, dtype=torch.bool))
    assert not release(ALL, one, Silent()).any()


def test_sums_are_right_where_records_come_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    one = outcomes(50)
    whole = release(ALL, one, Silent())
    monkeypatch.setattr(metrics, "_AT_A_TIME", 7)
    assert np.array_equal(release(ALL, one, Silent()), whole)
    assert whole[:2].tolist() == [int(one.right.sum()), 50 - int(one.right.sum())]
    assert whole[2] == pytest.approx(float(one.losses.sum()) / 5, abs=1e-4)
    assert whole[4:8].tolist() == torch.bincount(one.targets, minlength=CLASSES).tolist()
    assert whole[8] == 50


def test_outcomes_do_not_print() -> None:
    assert repr(outcomes(3)) == "Outcomes(secret)"


# -- noised -----------------------------------------------------------------------------------------------------


def require_noised(measure: Release, draws: int = 600) -> None:
    """Fails where the noise is not the public one, on every sum by itself, whatever the data and however many."""
    source = Keystream()
    for count in (0, 3, 900):
        one = outcomes(count)
        drawn = np.stack([measure(ALL, one, source) for _ in range(draws)]).astype(np.float64)
        assert drawn.shape == (draws, WIDTH)
        deviation = drawn.std(axis=0)
        # A standard deviation of n draws is off by 1 / sqrt(2 n); five of them are never reached by chance.
        assert np.all(np.abs(deviation / ALL.noise - 1) < 5 / math.sqrt(2 * draws)), f"noise {deviation} at {count}"
        mixed = np.corrcoef(drawn, rowvar=False) - np.eye(WIDTH)
        assert np.abs(mixed).max() < 5.5 / math.sqrt(draws), "one noise for several sums"
        centre = release(ALL, one, Silent()).astype(np.float64)
        assert np.all(np.abs(drawn.mean(axis=0) - centre) < 5.5 * ALL.noise / math.sqrt(draws)), "another sum"


def test_g11_every_sum_has_the_public_noise_whatever_the_data() -> None:
    require_noised(release)


def un_noised(asked: Metrics, one: Outcomes, source: Any) -> Sums:
    """Planted bug: the figures themselves."""
    return release(asked, one, Silent())


def ratio_by_count(asked: Metrics, one: Outcomes, source: Any) -> Sums:
    """Planted bug: means over a private number of records, with noise scaled to match."""
    return release(asked, one, source) / max(1, len(one.valid))


def one_noise_for_all(asked: Metrics, one: Outcomes, source: Any) -> Sums:
    """Planted bug: one draw, added to every sum; differences are then exact."""
    return release(asked, one, Silent()) + np.float32(asked.noise * float(source.gaussian(1)))


@pytest.mark.parametrize(
    ("planted", "caught"),
    [(un_noised, "noise"), (ratio_by_count, "noise"), (one_noise_for_all, "one noise")],
    ids=["un-noised", "ratio by private count", "one noise for all"],
)
def test_g1_planted_bugs_in_the_noise_are_caught(planted: Release, caught: str) -> None:
    with pytest.raises(AssertionError, match=caught):
        require_noised(planted, draws=300)


# -- priced -----------------------------------------------------------------------------------------------------

ASKED = Metrics(words=(Metric.ACCURACY, Metric.LOSS), noise=20.0, loss_bound=5.0)
PLAN = make_plan(metrics=ASKED)


def test_g1_metrics_cost_what_as_many_gaussian_releases_cost() -> None:
    """Against the closed form (Balle & Wang 2018), which knows nothing of our accountants."""
    events = Event.all_of_schedule(PLAN)[1:]
    mu = math.sqrt(2 * PLAN.joins) / 20
    assert sum(event.steps for event in events) == 2 * PLAN.joins
    assert [event.released for event in events] == ["metric:accuracy", "metric:loss"]
    epsilon = pld_epsilon(events, 1e-5)
    assert gaussian_delta(mu, epsilon) <= 1e-5 <= gaussian_delta(mu, epsilon - 0.02)
    assert best_order(events, 1e-5)[1] >= epsilon


def test_g3_the_noise_solved_beside_metrics_holds_the_whole_schedule_to_the_budget() -> None:
    beside = Event.all_of_schedule(PLAN)[1:]
    fixed = {"epsilon": 3.0, "delta": 1e-5, "sample_rate": 0.1, "steps": PLAN.steps * PLAN.joins}
    alone, _ = solve_noise(**fixed)
    noise, order = solve_noise(**fixed, beside=beside)
    assert noise > alone * 1.001
    history = Event.all_of_schedule(dataclasses.replace(PLAN, noise_multiplier=noise))
    assert 2.99 < best_order(history, 1e-5)[1] <= 3.0
    assert make_grant(order=order).affords(0.0, history)
    assert pld_epsilon(history, 1e-5) <= 3.0
    # Planted bug: the noise that the updates alone need overdraws the budget with the metrics beside them.
    planted = Event.all_of_schedule(dataclasses.replace(PLAN, noise_multiplier=alone))
    assert best_order(planted, 1e-5)[1] > 3.0


def test_metrics_that_leave_nothing_for_the_updates_are_refused() -> None:
    with pytest.raises(PlanError, match="metric-noise"):
        solve_noise(
            epsilon=1.0,
            delta=1e-5,
            sample_rate=0.1,
            steps=100,
            beside=[Event(sample_rate=1.0, noise_multiplier=1.0, steps=50)],
        )


def test_g8_the_ledger_charges_each_metric_with_the_update_and_its_receipt_names_them(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        receipt = book.charge([make_request(1, PLAN)])[0]
        assert isinstance(receipt, Receipt)
        spent = book.accounts[ACCOUNT].spent_rdp
        update, accuracy, _ = receipt.events
        assert (update, *receipt.metrics) == Event.all_of_round(PLAN)
        assert spent == pytest.approx(rdp(Event.of_round(PLAN), 8.0) + 2 * 8.0 / (2 * 20**2), rel=1e-12)
        assert (accuracy.noise_multiplier, accuracy.sample_rate, accuracy.steps) == (20.0, 1.0, 1)
        assert Receipt.from_json(receipt.to_json()) == receipt
    with Book(tmp_path) as again:
        assert again.accounts[ACCOUNT].spent_rdp == spent
    # One entry for the round, and every release in it.
    charges = [
        e for e in map(json.loads, (tmp_path / "ledger.jsonl").read_text().splitlines()) if e["kind"] == "charge"
    ]
    assert [[event.get("released", "update") for event in entry["body"]["event"]] for entry in charges] == [
        ["update", "metric:accuracy", "metric:loss"]
    ]


def test_g3_the_gate_counts_metrics(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, metrics=dataclasses.replace(ASKED, noise=5.0))
    price, free = (rdp(events, 8.0) for events in (Event.all_of_round(plan), Event.of_round(plan)))
    grant = make_grant()
    assert free < price
    affordable = int(grant.budget_rdp / price)
    assert 0 < affordable < min(plan.joins, int(grant.budget_rdp / free))
    with open_book(tmp_path, grant) as book:
        outcomes = [book.charge([make_request(number, plan)])[0] for number in range(1, affordable + 2)]
    assert [isinstance(outcome, Receipt) for outcome in outcomes] == [True] * affordable + [False]
    assert outcomes[-1] is Word.DECLINED


def test_g8_a_charge_that_pays_for_no_metric_releases_none(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        asked = make_request(1, PLAN)
        cheap = book.charge([dataclasses.replace(asked, plan=dataclasses.replace(PLAN, metrics=None))])[0]
        assert isinstance(cheap, Receipt)
        with pytest.raises(LedgerError, match="all that this round releases"):
            book.claim(cheap, asked)
        # Nor does one whose words alone were changed.
        with pytest.raises(LedgerError, match="all that this round releases"):
            book.claim(dataclasses.replace(cheap, metrics=Event.all_of_round(PLAN)[1:]), asked)


def test_a_program_that_knows_one_event_a_charge_refuses_several() -> None:
    several = events_to_json(Event.all_of_round(PLAN))
    assert isinstance(several, list)
    with pytest.raises(LedgerError, match="cannot be priced"):
        Event.from_dict(several)
    assert events_from_json(several) == Event.all_of_round(PLAN)
    one = events_to_json(Event.all_of_round(make_plan()))
    assert one == Event.of_round(make_plan()).to_dict()
    assert events_from_json(one) == (Event.of_round(make_plan()),)


@pytest.mark.parametrize("change", [lambda e: e[:1], lambda e: [], lambda e: [*e, e[1]], lambda e: [e[0], 7]])
def test_a_list_of_events_has_one_text(change: Callable[[Any], Any]) -> None:
    with pytest.raises(LedgerError):
        events_from_json(change(events_to_json(Event.all_of_round(PLAN))))


def test_replace_one_is_priced_with_the_metrics() -> None:
    history = Event.all_of_schedule(PLAN)
    assert pld_epsilon(history, 1e-5, Adjacency.REPLACE_ONE) > pld_epsilon(history, 1e-5)


# -- pooled -----------------------------------------------------------------------------------------------------


def test_pooled_metrics_and_their_errors_are_those_of_the_noise() -> None:
    source, clients = Keystream(), [outcomes(150, seed=seed) for seed in range(10)]
    shapes = widths(ALL, CLASSES)
    cuts = np.cumsum([shape[0] for shape in shapes.values()])[:-1]

    def told() -> dict[str, dict[str, Any]]:
        sheets = [dict(zip(shapes, np.split(release(ALL, one, source), cuts), strict=True)) for one in clients]
        return pooled(ALL, sheets)

    runs = [told() for _ in range(400)]
    truth = {
        "accuracy": torch.cat([one.right for one in clients]).double().mean().item(),
        "loss": torch.cat([one.losses for one in clients]).mean().item(),
        "count": 1500.0,
    }
    for name, true in truth.items():
        values = np.array([run[name]["value"] for run in runs])
        error = float(np.mean([run[name]["stderr"] for run in runs]))
        assert abs(values.mean() - true) < 5 * error / math.sqrt(len(runs)) + 0.003 * true, name
        assert values.std() == pytest.approx(error, rel=0.2), name
    histogram = np.array([run["label-histogram"]["value"] for run in runs])
    counts = torch.bincount(torch.cat([one.targets for one in clients]), minlength=CLASSES).numpy()
    assert np.abs(histogram.mean(0) - counts).max() < 5 * 63.3 / 20
    assert runs[0]["label-histogram"]["stderr"] == pytest.approx(20 * math.sqrt(10))


def test_g6_a_quotient_that_its_noise_drowns_is_unknown_and_never_a_small_number() -> None:
    sheet = {"accuracy": np.array([3.0, 90.0], np.float32)}
    asked = Metrics(words=(Metric.ACCURACY,), noise=20.0, loss_bound=5.0)
    assert pooled(asked, [sheet])["accuracy"] == {"value": None, "stderr": None}
    assert pooled(asked, [])["accuracy"] == {"value": None, "stderr": None}
    wide = {"accuracy": np.array([-30.0, 900.0], np.float32)}
    assert pooled(asked, [wide])["accuracy"]["value"] == 0.0
    assert pooled(asked, [{"accuracy": np.array([-500.0, -500.0], np.float32)}])["accuracy"]["value"] is None
