"""Scenarios: one table of keys, three ways to say them, and a clear sentence for what cannot be meant."""

import dataclasses
import json
import math
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.errors import PlanError, RunError
from privacy.plan import Mode, Optimizer
from simulations.scenario import BY_NAME, GROUPS, KEYS, Scenario, read_toml

ROOT = Path(__file__).parents[2]


def refusal(**fields: object) -> str:
    with pytest.raises(PlanError) as caught:
        Scenario(**fields)  # type: ignore[arg-type]
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "job.toml"
    path.write_text(text)
    return path


# One table.


def test_the_fields_of_a_scenario_are_the_keys() -> None:
    assert [key.field for key in KEYS] == [field.name for field in dataclasses.fields(Scenario)]
    assert {key.group for key in KEYS} == set(GROUPS)
    for key in KEYS:
        assert key.name == key.name.lower()
        assert "_" not in key.name
        assert key.help
        assert not key.help.endswith(".")


def test_every_default_is_legal_and_of_its_own_type() -> None:
    for key in KEYS:
        assert key.read(key.default) == key.default
        assert type(getattr(Scenario(), key.field)) is key.kind


def test_the_run_configuration_of_the_flower_app_holds_exactly_the_defaults() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert config == {key.name: key.default for key in KEYS}
    # A float that reads back as a whole number would change its type on the way through Flower.
    assert {name: type(value) for name, value in config.items()} == {key.name: key.kind for key in KEYS}


def test_the_words_of_closed_sets_are_those_of_the_enums_behind_them() -> None:
    from server.aggregate import Strategy
    from simulations.partition import Split

    assert set(BY_NAME["mode"].choices) == set(Mode)
    assert set(BY_NAME["optimizer"].choices) == set(Optimizer)
    # A virtual population has no data set to split.
    assert set(BY_NAME["partition"].choices) == {*Split, "virtual"}
    assert set(BY_NAME["strategy"].choices) == set(Strategy)


# Reading and writing.


def test_a_mapping_reads_back_to_an_equal_scenario() -> None:
    scenario = Scenario(
        task="digits-mlp",
        clients=3,
        weights="declared",
        declared_sizes="5,6,7",
        partition="dirichlet",
        alpha=0.271828,
    )
    mapping = scenario.to_mapping()
    assert Scenario.from_mapping(mapping) == scenario
    assert Scenario.from_mapping(json.loads(json.dumps(mapping))) == scenario
    assert all(type(value) in (str, int, float) for value in mapping.values())


def test_a_run_folder_gives_its_scenario_back(tmp_path: Path) -> None:
    scenario = Scenario(rounds=7, epsilon=2.71828)
    scenario.save(tmp_path)
    assert Scenario.from_run(tmp_path) == scenario


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_that_holds_no_scenario_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"expected .*config\.json"):
        Scenario.from_run(tmp_path)


def test_a_scenario_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scenario().rounds = 5  # type: ignore[misc]


def test_tables_of_a_file_group_keys_and_mean_nothing_else(tmp_path: Path) -> None:
    flat = written(tmp_path, "rounds = 5\nepsilon = 2\ndelta = 1e-6\n")
    values = read_toml(flat)
    assert values == {"rounds": 5, "epsilon": 2.0, "delta": 1e-6}
    grouped = written(tmp_path, "[job]\nrounds = 5\n[whatever.deeper]\nepsilon = 2\ndelta = 1e-6\n")
    assert read_toml(grouped) == values


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epsilom = 3.0", "did you mean 'epsilon'"),
        ("[privacy]\nl2_clip = 1.0", "did you mean 'l2-clip'"),
        ("zzzz = 1", "'tacit simulate --help' lists them"),
        ("rounds = 5\n[more]\nrounds = 6", "expected rounds once"),
        ("epsilon = 3.0", "expected delta beside epsilon"),
        ("rounds = ", "to be TOML"),
        ("rounds = 5.0", "expected rounds to be a whole number"),
        ("rounds = true", "expected rounds to be a whole number"),
        ("task = 5", "expected task to be text"),
        ("rounds = [5]", "expected rounds to be a whole number"),
        ("lr = nan", "expected lr > 0"),
        ("epsilon = inf\ndelta = 1e-5", "expected epsilon >= 0, got epsilon=inf"),
        ("delta = 1979-05-27", "expected delta to be a number"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        read_toml(written(tmp_path, text))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value).strip()


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="expected a scenario file"):
        read_toml(tmp_path / "absent.toml")


@given(st.sampled_from(KEYS), st.text(max_size=8))
def test_text_is_read_to_a_legal_value_or_refused_with_the_name_of_its_key(key, text) -> None:
    try:
        value, refused = key.read(text), ""
    except PlanError as error:
        value, refused = key.default, str(error)
    assert type(value) is key.kind
    assert key.read(value) == value
    assert not refused or key.name in refused


# Layers.


def test_flags_win_over_the_file_over_the_task_over_the_defaults() -> None:
    scenario = Scenario.merge({"rounds": 4, "lr": 0.4, "l2-clip": 4.0}, {"rounds": 5, "lr": 0.5}, {"rounds": "6"})
    assert (scenario.rounds, scenario.lr, scenario.l2_clip) == (6, 0.5, 4.0)
    assert scenario.clients == Scenario().clients


def test_given_noise_replaces_a_default_epsilon_and_the_other_way_round() -> None:
    noisy = Scenario.merge({"epsilon": 8.0}, {}, {"noise-multiplier": 1.1})
    assert (noisy.epsilon, noisy.noise_multiplier) == (0.0, 1.1)
    solved = Scenario.merge({"noise-multiplier": 1.1, "epsilon": 0.0}, {}, {"epsilon": 2.0})
    assert (solved.epsilon, solved.noise_multiplier) == (2.0, 0.0)


@pytest.mark.parametrize(
    "layers", [({"epsilon": 3.0}, {"noise-multiplier": 1.0}), ({}, {"epsilon": 3.0, "noise-multiplier": 1.0})]
)
def test_epsilon_and_noise_given_together_are_refused(
    layers: tuple[dict[str, object], dict[str, object]],
) -> None:
    with pytest.raises(PlanError, match="expected epsilon or noise-multiplier, got both"):
        Scenario.merge({}, *layers)


def test_a_default_that_another_choice_makes_idle_is_dropped() -> None:
    task = {"strategy": "fedavgm", "server-momentum": 0.5, "server-lr": 0.7}
    assert Scenario.merge(task, {}, {}).server_momentum == 0.5
    plain = Scenario.merge(task, {}, {"strategy": "fedavg"})
    assert (plain.server_momentum, plain.server_lr) == (Scenario().server_momentum, Scenario().server_lr)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"alpha": 0.5}, "expected alpha only with partition dirichlet or quantity"),
        ({"declared-sizes": "1,2"}, "expected declared-sizes only with weights declared"),
        ({"proximal-mu": 0.1}, "expected proximal-mu only with strategy fedprox"),
        ({"server-lr": 1.0}, "expected server-lr only with strategy fedavgm or fedadam"),
        ({"server-momentum": 0.9}, "expected server-momentum only with strategy fedavgm or fedadam"),
        ({"engine": "ray", "workers": 1}, "expected workers only with engine local"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused_even_at_its_default(flags: dict[str, object], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        Scenario.merge({}, {}, flags)


def test_an_unknown_key_of_any_layer_names_the_layer() -> None:
    for layers, where in [
        (({"x": 1}, {}, {}), "task"),
        (({}, {"x": 1}, {}), "file"),
        (({}, {}, {"x": 1}), "command line"),
    ]:
        with pytest.raises(PlanError, match=where):
            Scenario.merge(*layers)


def test_flowers_run_configuration_leaves_room_for_the_tasks_own_defaults() -> None:
    config = {key.name: key.default for key in KEYS} | {"rounds": 3}
    scenario = Scenario.from_run_config(config, {"lr": 0.123, "rounds": 99})
    assert (scenario.rounds, scenario.lr) == (3, 0.123)


# What cannot be meant.


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"epsilon": 0.0}, "expected epsilon > 0"),
        ({"epsilon": -1.0}, "expected epsilon >= 0, got epsilon=-1.0"),
        ({"delta": 0.0}, "expected delta > 0"),
        ({"delta": 1.0}, "expected 0 < delta < 1"),
        ({"delta": float("nan")}, "expected delta > 0"),
        ({"delta": 1e-3, "records_bound": 1000}, "expected delta < 1/records_bound"),
        ({"delta": 1e-3, "records_per_client": 100}, "expected delta < 1/records_bound"),
        ({"records_per_client": 101, "records_bound": 100}, "expected records-per-client <= records-bound"),
        ({"clients": 10, "cohort": 11}, "expected cohort <= clients"),
        ({"clients": 0}, "expected clients >= 1"),
        ({"cohort": -1}, "expected cohort >= 0"),
        ({"clients": 10, "cohort": 5, "min_replies": 6}, "expected min-replies <= cohort"),
        ({"rounds": 3, "warmup_rounds": 4}, "expected warmup-rounds <= rounds"),
        ({"clients": 2, "multiplicity": 3}, "expected multiplicity <= clients"),
        ({"strategy": "fedprox"}, "expected proximal-mu with strategy fedprox, it is missing"),
        ({"weights": "declared"}, "expected declared-sizes with weights declared, it is missing"),
        ({"weights": "declared", "declared_sizes": "1,2"}, "expected one declared size per client"),
        ({"clients": 2, "weights": "declared", "declared_sizes": "1,-2"}, "as whole numbers >= 1"),
        ({"clients": 2, "weights": "declared", "declared_sizes": "1,x"}, "as whole numbers >= 1"),
        ({"engine": "ray", "workers": 4}, "expected workers only with engine local"),
        ({"partition": "iid", "alpha": 0.3}, "expected alpha only with partition"),
        ({"sample_rate": 1.4}, "expected 0 < sample-rate <= 1, got sample-rate=1.4"),
        ({"sample_rate": 0.0}, "expected 0 < sample-rate <= 1"),
        ({"optimizer": "adamx"}, "did you mean 'adam'"),
        ({"partition": "dirchlet"}, "did you mean 'dirichlet'"),
        ({"device": "gpu"}, "expected device to be auto, cpu"),
        ({"retries": -2}, "expected retries >= -1"),
    ],
)
def test_a_scenario_that_cannot_be_meant_is_refused(fields: dict[str, object], sentence: str) -> None:
    message = refusal(**fields)
    assert sentence in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "beyond"),
    [
        ({"clients": 10, "cohort": 10}, {"cohort": 11}),
        ({"clients": 10, "cohort": 10, "min_replies": 10}, {"min_replies": 11}),
        ({"clients": 10, "multiplicity": 10}, {"multiplicity": 11}),
        ({"rounds": 3, "warmup_rounds": 3}, {"warmup_rounds": 4}),
        ({"sample_rate": 1.0}, {"sample_rate": math.nextafter(1.0, 2.0)}),
        ({"delta": math.nextafter(1e-3, 0.0), "records_bound": 1000}, {"delta": 1e-3}),
        ({"engine": "ray", "workers": 1}, {"workers": 2}),
        ({"clients": 2, "weights": "declared", "declared_sizes": "1,2"}, {"declared_sizes": "1,0"}),
        ({"device": "cuda:1"}, {"device": "cuda:x"}),
        ({"retries": -1}, {"retries": -2}),
    ],
)
def test_values_on_the_edge_of_what_can_be_meant_are_accepted(
    fields: dict[str, object], beyond: dict[str, object]
) -> None:
    scenario = Scenario(**fields)  # type: ignore[arg-type]
    # Kept as given, not moved to where it is safe.
    assert {name: getattr(scenario, name) for name in fields} == fields
    assert Scenario.from_mapping(scenario.to_mapping()) == scenario
    # And it is the edge: one step further is refused.
    assert refusal(**fields | beyond).startswith("expected")


# What stands for 'by itself'.


def test_a_resolved_scenario_says_every_number_and_resolves_to_itself() -> None:
    scenario = Scenario(clients=10, rounds=41, strategy="fedadam").resolved(1437)
    assert (scenario.cohort, scenario.records_per_client, scenario.records_bound) == (10, 143, 1430)
    assert (scenario.retries, scenario.min_replies, scenario.server_lr) == (3, 5, 0.1)
    assert scenario.resolved(None) == scenario
    assert Scenario.from_mapping(scenario.to_mapping()) == scenario


def test_resolving_keeps_what_is_given() -> None:
    scenario = Scenario(cohort=3, retries=0, min_replies=1, records_per_client=50, records_bound=60).resolved(1437)
    assert (scenario.cohort, scenario.retries, scenario.min_replies) == (3, 0, 1)
    assert (scenario.records_per_client, scenario.records_bound) == (50, 60)


def test_data_whose_size_nobody_published_needs_a_declared_one() -> None:
    with pytest.raises(PlanError, match="expected records-per-client"):
        Scenario().resolved(None)


def test_a_delta_too_large_for_the_published_number_of_records_is_refused() -> None:
    with pytest.raises(PlanError, match="expected delta < 1/records_bound"):
        Scenario(delta=1e-3).resolved(1437)


def test_the_servers_rate_is_never_zero() -> None:
    assert Scenario().server_rate == 1.0
    assert Scenario(strategy="fedadam").server_rate == 0.1
    assert Scenario(strategy="fedavgm", server_lr=0.3).server_rate == 0.3
