"""Small slices of the text tasks, trained under DP from the command line's own door, and text drawn from the result."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from clients.text import sst2
from models.catalog import TASKS
from privacy.errors import PlanError, RunError
from server.app import CHECKPOINT
from server.checkpoint import load, save
from simulations.generate import draw, generate
from simulations.run import simulate
from simulations.scenario import Scenario
from tests import tiny_gpt2
from tests.clients.test_text import play, real


class Silent:
    """An observer that has seen enough."""

    def started(self, info):
        pass

    def round(self, line):
        pass

    def finished(self, summary):
        pass

    def note(self, text):
        pass


def run(folder: Path, task: str, **keys):
    """Trains a task for two rounds; a few records of each client, in small passes."""
    few = {"rounds": 2, "sample-rate": 0.3, "physical-batch": 8, "evaluate-every": 1, "schedule": "constant"}
    mapping = dict(TASKS[task].defaults) | few | {"task": task} | keys
    scenario = Scenario.from_mapping(mapping)
    return simulate(scenario, out=folder, observer=Silent())


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    path = tmp_path_factory.mktemp("plays") / "play.txt"
    path.write_text(play(roles=("ROMEO", "JULIET"), least=10_000))
    return path


@pytest.fixture(scope="module")
def lstm(tmp_path_factory, plays):
    folder = tmp_path_factory.mktemp("lstm") / "run"
    keys = {"records-per-client": 100, "sample-rate": 0.1}
    return folder, run(folder, "shakespeare-lstm", data=str(plays), clients=2, **keys)


@pytest.mark.parametrize("task", ["sst2-embedding", "sst2-transformer"])
def test_a_slice_of_real_sst2_trains_under_dp(tmp_path, task):
    place = real("sst2.zip")
    with zipfile.ZipFile(place) as archive:
        for name in ("train.tsv", "dev.tsv"):
            lines = archive.read(f"sst2/{name}").decode().split("\n")[:121]
            (tmp_path / name).write_text("\n".join(lines))
    assert len(sst2(str(tmp_path), strict=True).train) > 20
    summary = run(
        tmp_path / "run", task, data=str(tmp_path), clients=3, **{"records-per-client": 36, "sample-rate": 0.3}
    )
    assert summary["status"] == "finished"
    assert 0 < summary["epsilon"] <= summary["budget"]
    assert set(summary["metrics"]) == {"accuracy", "loss", "macro_f1", "roc_auc"}


def test_a_slice_of_plays_trains_under_dp_and_writes(lstm):
    folder, summary = lstm
    assert summary["status"] == "finished"
    assert 0 < summary["epsilon"] <= summary["budget"]
    # Even two noised rounds know more than that there are 65 characters.
    assert summary["metrics"]["perplexity"] < 65
    assert json.loads((folder / "report.json").read_text())["simulation_only"]["class_names"] == ["records"]
    text = generate(folder, prompt="ROMEO:\n", length=80, temperature=0.8, seed=1)
    assert len(text) == 80
    assert text == generate(folder, prompt="ROMEO:\n", length=80, temperature=0.8, seed=1)
    assert text != generate(folder, prompt="ROMEO:\n", length=80, temperature=0.8, seed=2)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"prompt": ""}, "at least one character"),
        ({"prompt": "漢"}, "'漢'"),
        ({"length": 0}, "length"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_prompt_that_makes_no_sense_is_refused(lstm, asked, words):
    with pytest.raises(PlanError, match=words):
        generate(lstm[0], **({"prompt": "a", "length": 3, "temperature": 1.0, "seed": 0} | asked))


def test_another_models_checkpoint_is_refused(lstm, tmp_path):
    folder = shutil.copytree(lstm[0], tmp_path / "run")
    state = load(folder / CHECKPOINT)
    state.model.pop("recurrent")
    save(state, folder / CHECKPOINT)
    with pytest.raises(RunError, match="another model"):
        generate(folder, prompt="a", length=3, temperature=1.0, seed=0)


def test_a_task_that_writes_nothing_is_refused(tmp_path):
    simulate(Scenario.from_mapping({"rounds": 1, "clients": 2}), out=tmp_path / "run", observer=Silent())
    with pytest.raises(PlanError, match="writes text"):
        generate(tmp_path / "run", prompt="a", length=3, temperature=1.0, seed=0)


def test_roles_are_protected_as_wholes_at_unit_client(tmp_path, plays):
    keys = {"unit": "client", "records-per-client": 100, "client-rate": 1.0, "delta": 1e-5, "retries": 0, "lr": 0.5}
    summary = run(tmp_path / "run", "shakespeare-lstm", data=str(plays), clients=2, **keys)
    assert summary["unit"] == "client"
    assert summary["metrics"]["perplexity"] > 1


def test_a_small_gpt_trains_under_dp(tmp_path, plays):
    summary = run(
        tmp_path / "run",
        "shakespeare-gpt",
        data=str(plays),
        clients=2,
        **{"records-per-client": 100, "sample-rate": 0.1},
    )
    assert summary["metrics"]["perplexity"] < 65


def test_a_gpt2_folders_adapters_train_under_dp_and_write(tmp_path, plays, monkeypatch):
    monkeypatch.setenv("TACIT_GPT2", str(tiny_gpt2.write(tmp_path / "gpt2")))
    summary = run(
        tmp_path / "run",
        "shakespeare-gpt2",
        data=str(plays),
        clients=2,
        **{"records-per-client": 200, "sample-rate": 0.05},
    )
    assert summary["status"] == "finished"
    assert len(generate(tmp_path / "run", prompt="the", length=20, temperature=1.0, seed=0)) > 0
    (tmp_path / "gpt2" / "merges.txt").unlink()
    with pytest.raises(Exception, match=r"merges\.txt"):
        generate(tmp_path / "run", prompt="the", length=20, temperature=1.0, seed=0)


def test_drawing_follows_the_model():
    class Counting(torch.nn.Module):
        """Says that the next token is one more than the last, and nearly surely."""

        def forward(self, tokens):
            assert tokens.shape[1] <= 4
            return 50.0 * torch.nn.functional.one_hot((tokens + 1) % 7, 7).float()

    for temperature in (0.0, 1.0):
        assert draw(Counting(), [2], length=9, temperature=temperature, seed=0, context=4) == [
            3,
            4,
            5,
            6,
            0,
            1,
            2,
            3,
            4,
        ]
    drawn = draw(Counting(), [2], length=40, temperature=1e6, seed=0, context=4)
    assert len(set(drawn)) == 7

    class Lost(torch.nn.Module):
        def forward(self, tokens):
            return torch.full((1, tokens.shape[1], 7), float("nan"))

    with pytest.raises(RunError, match="diverged"):
        draw(Lost(), [2], length=1, temperature=1.0, seed=0, context=4)
