"""Recommenders and game agents as whole runs at unit client: paid for, judged, and noised at every film (G17)."""

import json

import numpy as np
import pytest

import privacy.central
import tacit
from privacy.errors import PlanError
from server.checkpoint import load
from simulations.run import simulate
from simulations.scenario import Scenario
from tests.movielens import FILMS, small_movielens

QUICK = {"clients": 6, "rounds": 2, "evaluate-every": 1}


class Watcher:
    """Remembers a run's lines."""

    def __init__(self):
        self.lines = []

    def started(self, info):
        pass

    def round(self, line):
        self.lines.append(dict(line))

    def finished(self, summary):
        pass

    def note(self, text):
        pass


def go(folder, task, **keys):
    watcher = Watcher()
    scenario = Scenario.layered(None, QUICK | {"task": task} | keys)
    return simulate(scenario, out=folder, observer=watcher), watcher.lines


def model_of(folder):
    return load(folder / "checkpoints/latest.ckpt").model


def ratings_in(tmp_path):
    data = small_movielens(tmp_path / "data", users=6, each=10)
    return {"data": str(data), "records-per-client": 8}


@pytest.mark.parametrize("task", ["movielens-mf", "movielens-ncf", "movielens-context"])
def test_a_recommender_trains_under_dp_and_is_judged(tmp_path, task):
    summary, lines = go(tmp_path / "run", task, **ratings_in(tmp_path))
    assert summary["unit"] == "client"
    assert 0 < summary["epsilon"] <= 8.0
    assert [line["replies"] for line in lines] == [6, 6]
    assert set(summary["metrics"]) == {"rmse", "ndcg_at_10", "hit_rate_at_10"}
    headline = json.loads((tmp_path / "run/report.json").read_text())["headline"]
    assert [entry["epsilon"] for entry in headline["adversaries"]][1] == "infinity"


def test_a_recommender_with_little_noise_learns_what_is_liked(tmp_path):
    keys = {"epsilon": 0, "noise-multiplier": 0.01, "rounds": 8, "l2-clip": 100.0, "lr": 1.0}
    _, lines = go(tmp_path / "run", "movielens-mf", **ratings_in(tmp_path), **keys)
    bias = model_of(tmp_path / "run")["bias"][:FILMS]
    assert bias[1::2].mean() > bias[0::2].mean() + 0.5
    assert lines[-1]["metrics"]["rmse"] < lines[0]["metrics"]["rmse"] - 0.2


def require_noise_on_every_film(folder, **keys):
    """Fails where a film that nobody rated has no noise: its parameters would tell that nobody did."""
    go(folder, "movielens-mf", **keys)
    model = model_of(folder)
    assert model["bias"].all(), "a film without noise"
    nobodys = model["bias"][FILMS:].astype(np.float64)
    # 1642 films that do not exist: what they have is noise alone, of two rounds.
    plan = json.loads((folder / "job.json").read_text())["plan"]
    wanted = np.sqrt(2) * plan["noise_multiplier"] * plan["l2_clip"] / plan["expected_batch"]
    assert 0.9 < nobodys.std() / wanted < 1.1


@pytest.mark.statistical  # The ratio's standard error is 1.7 %: a false alarm in 10^8.
def test_g17_every_film_gets_noise_those_that_nobody_rated_too(tmp_path):
    require_noise_on_every_film(tmp_path / "run", **ratings_in(tmp_path))


def test_g17_planted_bug_noise_on_rated_films_only_is_caught(tmp_path, monkeypatch):
    def sparse(contributions, size, plan, clip, source):
        made = aggregate(contributions, size, plan, clip, source)
        rated = np.any([one.update != 0 for one in contributions], axis=0)
        return privacy.central.Aggregate(np.where(rated, made.mean, np.float32(0)), made.clip)

    aggregate = privacy.central.aggregate
    monkeypatch.setattr(privacy.central, "aggregate", sparse)
    with pytest.raises(AssertionError, match="without noise"):
        require_noise_on_every_film(tmp_path / "run", **ratings_in(tmp_path))


@pytest.mark.parametrize("task", ["cartpole-dqn", "acrobot-dqn"])
def test_a_game_agent_trains_under_dp_and_is_judged_on_machines_that_no_client_has(tmp_path, task):
    summary, lines = go(tmp_path / "run", task, **{"steps-per-round": 20})
    assert 0 < summary["epsilon"] <= 8.0
    assert [line["replies"] for line in lines] == [6, 6]
    assert set(summary["metrics"]) == {"return", "worst_return"}
    low, high = (1, 500) if task == "cartpole-dqn" else (-500, 0)
    assert low <= summary["metrics"]["worst_return"] <= summary["metrics"]["return"] <= high


def test_g16_such_a_task_is_refused_at_unit_record_with_a_sentence_and_nothing_is_left(tmp_path):
    with pytest.raises(PlanError, match="expected unit client for task cartpole-dqn"):
        go(tmp_path / "run", "cartpole-dqn", unit="record")
    assert not (tmp_path / "run").exists()


def test_a_search_over_such_a_task_is_refused_with_a_sentence_too(capsys, tmp_path):
    for unit, sentence in (("record", "expected unit client for task"), ("client", "got unit client")):
        words = [
            "tune",
            "--task",
            "acrobot-dqn",
            "--unit",
            unit,
            "--try",
            "lr=0.1,0.2",
            "--out",
            str(tmp_path / "search"),
        ]
        assert tacit.main(words) == 2
        assert sentence in capsys.readouterr().err
