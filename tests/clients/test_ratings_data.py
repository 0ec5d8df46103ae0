"""MovieLens 100K: what is read, split and refused."""

import zipfile

import pytest
import torch

from clients import ratings
from clients.data import load_source
from clients.records import faults
from models.catalog import TASKS
from models.ratings import Part, item_mean_rmse
from privacy.errors import DataError
from tests.movielens import shared_data, small_movielens

TASK = TASKS["movielens-mf"]


def load(folder, **keys):
    return load_source(TASK, data=str(folder), **keys)


def test_each_users_last_fifth_by_time_is_held_out(tmp_path):
    source = load(small_movielens(tmp_path, users=4, each=10))
    assert (len(source.train), source.key_names) == (32, ("1", "2", "3", "4"))
    assert not faults(source.train, source.shape)
    parts = source.test.inputs[:, 2].int().bincount().tolist()
    assert parts == [32, 8, 40]
    lines = [line.split("\t") for line in (tmp_path / "u.data").read_text().splitlines()]
    for user in range(4):
        mine = sorted((int(time), int(film), int(stars)) for who, film, stars, time in lines if who == str(user + 1))
        held = source.test.inputs[(source.test.inputs[:, 2] == Part.HELD_OUT) & (source.test.inputs[:, 1] == user)]
        assert sorted(film - 1 for _, film, _ in mine[-2:]) == sorted(held[:, 0].int().tolist())
        known = source.train.targets[source.keys == user].tolist()
        assert sorted(stars - 1 for _, _, stars in mine[:-2]) == sorted(known)


def test_a_zip_file_is_read_as_its_folder_is(tmp_path):
    folder = small_movielens(tmp_path / "ml-100k")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        for file in folder.iterdir():
            packed.write(file, f"ml-100k/{file.name}")
    one, other = load(folder), load(tmp_path / "a.zip")
    assert torch.equal(one.train.inputs, other.train.inputs)
    assert torch.equal(one.test.targets, other.test.targets)


BAD = {
    "stars": ("1\t1\t6\t5", "rating of 1 to 5 stars"),
    "half a star": ("1\t1\t3.5\t5", "rating of 1 to 5 stars"),
    "unknown film": ("1\t41\t3\t5", "film from 1 to 40"),
    "film zero": ("1\t0\t3\t5", "film from 1 to 40"),
    "unknown user": ("99\t1\t3\t5", "user that u.user describes"),
    "time": ("1\t1\t3\tnoon", "time in seconds"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_rating_is_an_error_for_an_experimenter_and_an_invalid_record_at_a_holder(tmp_path, name):
    line, words = BAD[name]
    folder = small_movielens(tmp_path)
    with (folder / "u.data").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=words):
        load(folder)
    source = load(folder, strict=False)
    assert (~source.train.valid).nonzero().flatten().tolist() == [len(source.train) - 1]
    assert not len(source.test)


def test_a_rating_given_twice_is_refused(tmp_path):
    folder = small_movielens(tmp_path)
    first = (folder / "u.data").read_text().splitlines()[0]
    with (folder / "u.data").open("a") as file:
        file.write(f"{first}\n")
    with pytest.raises(DataError, match="a second of film"):
        load(folder)


@pytest.mark.parametrize("strict", [True, False])
def test_other_columns_a_missing_file_or_nothing_there_is_an_error_for_everybody(tmp_path, strict):
    folder = small_movielens(tmp_path / "one")
    (folder / "u.data").write_text("1,1,3,5\n")
    with pytest.raises(DataError, match="expected 4 columns, got 1"):
        load(folder, strict=strict)
    (folder / "u.item").unlink()
    with pytest.raises(DataError, match=r"found no u\.item"):
        load(folder, strict=strict)
    (tmp_path / "b.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match="expected a zip archive"):
        load(tmp_path / "b.zip", strict=strict)
    with pytest.raises(DataError, match="found neither"):
        load(tmp_path / "nowhere", strict=strict)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("film,rating\n1,9\n", "rating of 1 to 5"),
        ("film,rating\n41,3\n", "number from 1 to 40"),
        ("film,rating\nNo such film,3\n", "number from 1 to 40"),
        ("film,rating\n1,3\n1,4\n", "one rating of each film"),
        ("film,stars\n1,3\n", "columns film and rating"),
        ("", "columns film and rating"),
    ],
)
def test_a_file_of_ones_own_ratings_is_checked(tmp_path, text, words):
    films = ratings.films_at(small_movielens(tmp_path))
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        ratings.given_ratings(path, films, torch.zeros(23))


def test_films_may_be_named_by_number_or_title(tmp_path):
    films = ratings.films_at(small_movielens(tmp_path))
    path = tmp_path / "mine.csv"
    path.write_text("film,rating\n3,5\nfilm 7 (1980),2\n")
    found = ratings.given_ratings(path, films, torch.zeros(23))
    assert (found.inputs[:, 0].tolist(), found.targets.tolist()) == ([2.0, 6.0], [4, 1])


def test_the_published_data_set_has_its_published_size_and_baseline():
    source = load(shared_data("ml-100k.zip"))
    assert (len(source.train), len(source.key_names)) == (80_367, 943)
    assert int((source.test.inputs[:, 2] == Part.HELD_OUT).sum()) == 19_633
    assert item_mean_rmse(source.test.inputs, source.test.targets) == pytest.approx(1.0754, abs=1e-4)
