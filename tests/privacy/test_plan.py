"""The plan: exactly what it says, public, and refused when it cannot mean what it says."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import PlanError
from privacy.plan import Adjacency, Local, Metric, Metrics, Mode, Optimizer, Plan, Unit, canonical, check_delta
from tests.oracles import make_plan

NUMBERS = ("sample_rate", "expected_batch", "l2_clip", "noise_multiplier", "epsilon", "delta")
COUNTS = ("steps", "rounds", "joins", "records_bound", "physical_batch", "views")
METRICS = Metrics(words=(Metric.ACCURACY, Metric.COUNT), noise=20.0, loss_bound=5.0)


def test_a_plan_survives_json() -> None:
    plan = make_plan(mode=Mode.GHOST, views=3, physical_batch=17)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.digest() == plan.digest()
    assert (again.unit, again.adjacency, again.mode) == (Unit.RECORD, Adjacency.ADD_REMOVE, Mode.GHOST)


def test_every_field_of_a_plan_is_in_its_digest() -> None:
    changes: dict[str, Any] = dict.fromkeys(NUMBERS, 1e-6) | dict.fromkeys(COUNTS, 3) | {"mode": Mode.FUNCTORCH}
    changes["metrics"] = METRICS
    plan = make_plan()
    digests = {dataclasses.replace(plan, **{name: value}).digest() for name, value in changes.items()}
    assert len(digests | {plan.digest()}) == len(changes) + 1
    # Adjacency has one legal value, unit two with fields of their own (below); together these are all fields, so a new
    # one must be added here.
    central = {"client_rate", "turns", "quantile", "clip_lr", "bit_noise", "banded"}
    assert set(changes) | {"unit", "adjacency"} | central == {field.name for field in dataclasses.fields(Plan)}


def test_a_plan_with_metrics_survives_json_and_each_of_their_fields_is_in_the_digest() -> None:
    plan = make_plan(metrics=METRICS)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.metrics is not None
    assert all(isinstance(word, Metric) for word in again.metrics.words)
    others = [{"words": (Metric.COUNT,)}, {"noise": 20.5}, {"loss_bound": 6.0}]
    digests = {make_plan(metrics=dataclasses.replace(METRICS, **other)).digest() for other in others}
    assert len(digests | {plan.digest(), make_plan().digest()}) == 5


def test_a_plan_without_metrics_has_the_text_and_the_digest_that_it_always_had() -> None:
    # Ledgers and jobs written before there were metrics name this digest.
    fields = dataclasses.asdict(make_plan())
    for later in ("metrics", "client_rate", "turns", "quantile", "clip_lr", "bit_noise", "banded"):
        del fields[later]
    old = canonical(fields).decode()
    assert make_plan().to_json() == old
    assert Plan.from_json(old) == make_plan()
    assert make_plan().digest() == "769710404a55989cf5818f9812201676252f2f93c69db214edc60cf3028eefea"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m | {"words": []},
        lambda m: m | {"words": ["accuracy", "accuracy"]},
        lambda m: m | {"words": ["count", "accuracy"]},
        lambda m: m | {"words": ["accuracy", "median"]},
        lambda m: m | {"words": "accuracy"},
        lambda m: m | {"words": [["accuracy"]]},
        lambda m: m | {"noise": 0.0},
        lambda m: m | {"noise": math.inf},
        lambda m: m | {"noise": True},
        lambda m: m | {"loss_bound": -1.0},
        lambda m: m | {"more": 1},
        lambda m: {name: m[name] for name in ("words", "noise")},
        lambda m: [m],
        lambda m: None,
    ],
)
def test_metrics_that_are_not_exactly_those_of_the_list_are_refused(change: Any) -> None:
    fields = json.loads(make_plan(metrics=METRICS).to_json())
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(fields | {"metrics": change(fields["metrics"])}))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0, -1.5, math.nan, math.inf, -math.inf, True, "0.5", None, [0.5], 10**400])
def test_a_number_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(PlanError, match="expected"):
        make_plan(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -3, 2.0, 2.5, math.nan, True, "3", None, 10**13, 10**400])
def test_a_count_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(PlanError, match="expected"):
        make_plan(**{name: value})


@pytest.mark.parametrize("rate", [1.0000001, 2, 1e9])
def test_a_sampling_rate_above_one_is_refused(rate: float) -> None:
    with pytest.raises(PlanError, match="sample_rate"):
        make_plan(sample_rate=rate)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f | {"noise_multiplier": "1.3"},
        lambda f: f | {"steps": 2.0},
        lambda f: f | {"steps": True},
        lambda f: f | {"mode": "turbo"},
        lambda f: f | {"unit": "client"},
        lambda f: f | {"adjacency": "replace-one"},
        lambda f: f | {"unit": ["record"]},
        lambda f: f | {"extra": 1},
        lambda f: {k: v for k, v in f.items() if k != "joins"},
        lambda f: list(f),
        lambda f: "plan",
        lambda f: None,
    ],
)
def test_json_that_is_not_exactly_a_plan_is_refused(change: Any) -> None:
    fields = json.loads(make_plan().to_json())
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(change(fields)))


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 400, "true", '"1.3"'])
def test_json_numbers_that_are_none_are_refused(literal: str) -> None:
    text = make_plan().to_json().replace('"noise_multiplier":1.3', f'"noise_multiplier":{literal}')
    assert literal in text
    with pytest.raises(PlanError):
        Plan.from_json(text)


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe", "[" * 100_000, "1" * 5000, "{}"])
def test_text_that_is_no_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


@settings(deadline=None, max_examples=200)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=4))
def test_no_value_of_any_type_in_any_field_crashes_the_reader(value: Any) -> None:
    fields = json.loads(make_plan().to_json())
    for name in fields:
        try:
            plan = Plan.from_json(json.dumps(fields | {name: value}))
        except PlanError:
            continue
        assert canonical(json.loads(plan.to_json())[name]) == canonical(value)


def test_g2_a_delta_that_would_publish_a_record_is_refused() -> None:
    check_delta(0.999 / 5000, 5000)
    for delta in (1 / 5000, 1.5 / 5000, 0.5):
        with pytest.raises(PlanError, match="records_bound"):
            check_delta(delta, 5000)
        with pytest.raises(PlanError, match="records_bound"):
            make_plan(delta=delta)


@pytest.mark.parametrize("bound", [0, -1, 0.5, True, 1.0, "5000", None])
def test_g2_a_bound_on_records_that_is_none_cannot_excuse_a_delta(bound: Any) -> None:
    """A bound of 0.5 records would allow any delta; the planted bug is to compare without looking."""
    with pytest.raises(PlanError):
        check_delta(0.9, bound)
    assert 0.9 < 1 / 0.5


CENTRAL: dict[str, Any] = {
    "unit": Unit.CLIENT,
    "expected_batch": 20.0,
    "client_rate": 0.2,
    "turns": 10,
    "joins": 11,
    "mode": Mode.AUTO,
}
FOLLOWING = CENTRAL | {"quantile": 0.5, "clip_lr": 0.2, "bit_noise": 5.0}


def test_a_plan_for_clients_survives_json_and_every_field_of_its_own_is_in_its_digest() -> None:
    plan = make_plan(**FOLLOWING)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.digest() == plan.digest()
    changes = {"client_rate": 0.3, "turns": 9, "quantile": 0.4, "clip_lr": 0.1, "bit_noise": 4.0}
    digests = {dataclasses.replace(plan, **{name: value}).digest() for name, value in changes.items()}
    assert len(digests | {plan.digest()}) == len(changes) + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"client_rate": 0.0},
        {"client_rate": 1.5},
        {"client_rate": math.nan},
        {"turns": 0},
        {"turns": 12},
        {"turns": True},
        {"views": 2},
        {"mode": Mode.HOOKS},
        {"quantile": 1.0},
        {"quantile": -0.5},
        {"clip_lr": 0.0},
        {"clip_lr": 1.5},
        {"bit_noise": 0.65},
        {"bit_noise": math.inf},
        {"quantile": 0.0},
        {"expected_batch": 50_001.0, "delta": 1e-9},
        # One of 100 clients could be published whole.
        {"delta": 0.01, "records_bound": 50},
    ],
)
def test_a_plan_for_clients_that_cannot_mean_what_it_says_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="expected"):
        make_plan(**FOLLOWING | changes)


@pytest.mark.parametrize(
    "changes", [{"client_rate": 0.2}, {"client_rate": 1}, {"turns": 3}, {"quantile": 0.5}, {"bit_noise": 1.0}]
)
def test_what_only_a_plan_for_clients_has_is_refused_in_one_for_records(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="only at unit client"):
        make_plan(**changes)


# As the version before plans for clients wrote it into ledgers and job.json.
BEFORE = (
    '{"adjacency":"add-remove","delta":1e-05,"epsilon":3.0,"expected_batch":27.1828,"joins":50,"l2_clip":0.7,'
    '"mode":"hooks","noise_multiplier":1.3,"physical_batch":256,"records_bound":5000,"rounds":9,"sample_rate":0.1,'
    '"steps":2,"unit":"record","views":1}'
)


def test_a_plan_for_records_keeps_the_text_and_the_digest_that_it_had_before_plans_for_clients() -> None:
    plan = make_plan()
    assert plan.to_json() == BEFORE
    assert plan.digest() == "769710404a55989cf5818f9812201676252f2f93c69db214edc60cf3028eefea"
    assert Plan.from_json(BEFORE) == plan
    # A text that spells out fields of unit client is the same plan.
    fields = dataclasses.asdict(plan)
    del fields["metrics"], fields["banded"]
    assert Plan.from_json(json.dumps(fields)).digest() == plan.digest()


def test_local_knobs_survive_json_and_refuse_nonsense() -> None:
    local = Local(optimizer=Optimizer.ADAMW, lr=0.0271828, momentum=0.9, weight_decay=0.01, proximal_mu=0.2)
    assert Local.from_json(local.to_json()) == local
    for name, values in {
        "lr": (0, -1, math.nan, math.inf, "1", True),
        "momentum": (1, -0.1, math.nan, "0", None),
        "weight_decay": (-1, math.inf, math.nan, "0"),
        "proximal_mu": (-1, math.inf, math.nan, [0]),
    }.items():
        for value in values:
            with pytest.raises(PlanError):
                Local(**{name: value})
    with pytest.raises(PlanError):
        Local.from_json(local.to_json().replace("adamw", "lion"))


def test_canonical_text_has_one_form() -> None:
    assert canonical({"b": 1, "a": [1.5, "é"]}) == b'{"a":[1.5,"\\u00e9"],"b":1}'
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical(value)


def test_planning_for_another_adjacency_is_refused() -> None:
    with pytest.raises(PlanError, match="adjacency"):
        make_plan(adjacency=Adjacency.REPLACE_ONE)
