"""tacit recommend and tacit play: what a trained model is used for, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

import tacit
from models.games import GAMES, machines, returns
from simulations.run import simulate
from simulations.scenario import Scenario
from simulations.use import trained
from tests.movielens import small_movielens

QUICK = {"clients": 6, "rounds": 2, "epsilon": 0.0}


class Nobody:
    """Watches nothing."""

    def __getattr__(self, name):
        return lambda *_: None


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    data = small_movielens(folder / "data", users=6, each=10)
    keys = {"data": str(data), "records-per-client": 8, "noise-multiplier": 0.01, "l2-clip": 100.0, "rounds": 6}
    scenario = Scenario.layered(None, QUICK | {"task": "movielens-context", "lr": 1.0} | keys)
    simulate(scenario, out=folder / "run", observer=Nobody())
    return folder


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    folder = tmp_path_factory.mktemp("game")
    keys = {"task": "cartpole-dqn", "noise-multiplier": 1.0, "steps-per-round": 5}
    simulate(Scenario.layered(None, QUICK | keys), out=folder / "run", observer=Nobody())
    return folder


def run(capsys, *words):
    code = tacit.main([str(word) for word in words])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_films_that_are_liked_are_recommended_and_none_that_was_rated(films, capsys):
    code, out, _ = run(capsys, "recommend", films / "run", "--user", "3", "--top", "5", "--json")
    told = json.loads(out)
    lines = [line.split("\t") for line in (films / "data/u.data").read_text().splitlines()]
    rated = sorted((int(moment), int(film)) for user, film, _, moment in lines if user == "3")[:-2]
    assert (code, told["ratings"], len(told["films"])) == (0, 8, 5)
    assert not {film["film"] for film in told["films"]} & {film for _, film in rated}
    stars = [film["stars"] for film in told["films"]]
    assert stars == sorted(stars, reverse=True)
    assert 1 <= min(stars) <= max(stars) <= 5
    # In the small data set films of even number are liked.
    assert sum(film["film"] % 2 == 0 for film in told["films"]) >= 4


def test_a_file_of_ratings_gives_what_its_user_would_get(films, capsys, tmp_path):
    lines = [line.split("\t") for line in (films / "data/u.data").read_text().splitlines()]
    mine = sorted((int(moment), film, stars) for user, film, stars, moment in lines if user == "2")[:-2]
    path = tmp_path / "mine.csv"
    path.write_text("film,rating\n" + "".join(f"{film},{stars}\n" for _, film, stars in mine))
    who = ["--age", "22", "--gender", "F", "--occupation", "student"]
    by_file = run(capsys, "recommend", films / "run", "--user", path, "--json", *who)
    by_number = run(capsys, "recommend", films / "run", "--user", "2", "--json")
    assert json.loads(by_file[1])["films"] == json.loads(by_number[1])["films"]


def test_a_user_without_ratings_gets_a_list_too(films, capsys, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("film,rating\n")
    code, out, _ = run(capsys, "recommend", films / "run", "--user", path)
    assert code == 0
    assert len(out.splitlines()) == 11


def test_who_a_user_is_counts_in_a_model_by_features(films, capsys, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("film,rating\n")
    lists = [
        run(
            capsys,
            "recommend",
            films / "run",
            "--user",
            path,
            "--json",
            "--age",
            "30",
            "--gender",
            gender,
            "--occupation",
            job,
        )[1]
        for gender, job in (("F", "student"), ("M", "retired"))
    ]
    assert lists[0] != lists[1]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--user", "99"], 3, "expected a user from 1 to 6"),
        (["--user", "nowhere.csv"], 3, "expected a CSV file of ratings"),
        (["--user", "1", "--top", "0"], 2, "expected top >= 1"),
        (["--user", "1", "--data", "/nowhere"], 3, "found neither"),
        (["--user", "1", "--age", "30"], 2, "expected all of --age"),
        (["--user", "x.csv", "--age", "30", "--gender", "F", "--occupation", "wizard"], 3, "expected an occupation"),
    ],
)
def test_what_is_no_user_is_refused(films, capsys, words, code, sentence):
    found, _, error = run(capsys, "recommend", films / "run", *words)
    assert (found, sentence in error) == (code, True), error


def test_episodes_are_gymnasiums_and_their_pictures_are_written(game, capsys, tmp_path):
    gif, frames = tmp_path / "a.gif", tmp_path / "frames"
    code, out, _ = run(capsys, "play", game / "run", "--episodes", "3", "--gif", gif, "--frames", frames, "--json")
    told = json.loads(out)
    assert (code, told["game"], len(told["returns"])) == (0, "CartPole-v1", 3)
    assert told["return"] == pytest.approx(np.mean(told["returns"]))
    assert told["frames"] == told["returns"][0]
    with Image.open(gif) as image:
        assert image.n_frames >= 2
    assert len(list(frames.iterdir())) == told["frames"]
    _, _, model = trained(game / "run")
    # Other first states, the same machines: an agent that knows next to nothing falls as soon in both.
    ours = returns(model, machines(GAMES["cartpole-dqn"], 3, 2), game=GAMES["cartpole-dqn"]).mean()
    assert abs(ours - told["return"]) < 60


@pytest.mark.parametrize("words", [["--episodes", "0"], ["--seed", "-1"]])
def test_episodes_that_cannot_be_are_refused(game, capsys, words):
    assert run(capsys, "play", game / "run", *words)[0] == 2


def test_a_run_of_another_kind_of_task_is_refused(films, game, capsys):
    code, _, error = run(capsys, "play", films / "run")
    assert (code, "expected a run of a game agent" in error) == (2, True)
    code, _, error = run(capsys, "recommend", game / "run", "--user", "1")
    assert (code, "expected a run of a recommender" in error) == (2, True)


def test_a_checkpoint_of_another_task_and_no_run_at_all_are_refused(films, game, capsys, tmp_path):
    import shutil

    mixed = tmp_path / "mixed"
    shutil.copytree(game / "run", mixed)
    shutil.copy(films / "run/checkpoints/latest.ckpt", mixed / "checkpoints/latest.ckpt")
    code, _, error = run(capsys, "play", mixed)
    assert (code, "of another" in error) == (6, True)
    assert run(capsys, "play", tmp_path / "nowhere")[0] == 6
