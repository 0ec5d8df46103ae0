"""Reads MovieLens 100K as GroupLens publishes it: ``u.data``, ``u.item`` and ``u.user``, in a folder or the zip file.

Ratings become the rows that `models.ratings` describes. Each user's last fifth by time is held out; what is left is the
user's record. Films and users must be described (``u.item``, ``u.user``): a rating of a film that is not there is an
error for an experimenter, and an invalid record at a data holder.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from clients.places import Place, entries_of, place_of, stream_of
from clients.records import Records
from models.ratings import FILM_FEATURES, FILMS, SHAPE, STARS, USER_FEATURES, Part
from privacy.errors import DataError
from privacy.files import write_whole

_ADDRESS: Final = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
_FILES: Final = ("u.data", "u.item", "u.user")
_MOST_BYTES: Final = 2**28
_CONNECT_S: Final = 20.0
_GENRES: Final = 19
_HELD_OUT: Final = 0.2
# Published in u.occupation; its order is that of the inputs.
OCCUPATIONS: Final = (
    "administrator",
    "artist",
    "doctor",
    "educator",
    "engineer",
    "entertainment",
    "executive",
    "healthcare",
    "homemaker",
    "lawyer",
    "librarian",
    "marketing",
    "none",
    "other",
    "programmer",
    "retired",
    "salesman",
    "scientist",
    "student",
    "technician",
    "writer",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Films:
    """What is public about films.

    Attributes:
        titles: By film number from 0.
        features: Shape ``(films, 20)``: 19 genres and the year.
    """

    titles: tuple[str, ...]
    features: Tensor

    def rows(self) -> Tensor:
        """Returns a row of inputs for each film, shape ``(films, 46)``, as a test set holds them."""
        rows = torch.zeros((len(self.titles), *SHAPE.inputs))
        rows[:, 0] = torch.arange(len(self.titles))
        rows[:, 2] = float(Part.FILM)
        rows[:, 3 : 3 + FILM_FEATURES] = self.features
        return rows


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Rated:
    """A data set of ratings. Secret but for its films.

    Attributes:
        films: Public.
        train: Each user's ratings but the last fifth; at a data holder all of them.
        test: Films, known and held-out ratings, for who experiments; empty at a data holder.
        users: Of each training record, an index into ``names``.
        names: The users' numbers as the files have them.
    """

    films: Films
    train: Records
    test: Records
    users: Tensor
    names: tuple[str, ...]


def where(data: str | None, folder: Path) -> Place:
    """Returns where MovieLens 100K lies, after downloading it where it is nowhere.

    Args:
        data: A folder or a zip file; a relative one is looked for in the current folder, then in ``folder``.
        folder: Folder of data sets.

    Raises:
        DataError: It is not there, and cannot be downloaded.
    """
    if data:
        given = Path(data).expanduser()
        for path in (given, folder / given):
            if path.exists():
                return place_of(path)
        raise DataError(f"expected data at {given} or {folder / given}, found neither; check data=PATH")
    for path in (folder / "ml-100k", folder / "ml-100k.zip"):
        if path.exists():
            return place_of(path)
    target = folder / "ml-100k.zip"
    try:
        # The address is ours and fixed; GroupLens' terms are in the file's README.
        with urllib.request.urlopen(_ADDRESS, timeout=_CONNECT_S) as answer:
            content = answer.read(_MOST_BYTES)
        zipfile.ZipFile(io.BytesIO(content)).close()
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(target, content)
    except (TimeoutError, OSError, urllib.error.URLError, zipfile.BadZipFile) as error:
        raise DataError(
            f"expected MovieLens 100K at {target}, found none, and its download failed ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); connect to the internet, or put ml-100k.zip from grouplens.org there "
            "(TACIT_DATA=FOLDER chooses another place)"
        ) from None
    return place_of(target)


def load(place: Place, strict: bool) -> Rated:
    """Reads a data set of ratings.

    Args:
        place: A folder or a zip file.
        strict: True in a simulation: a bad rating is an error, the last fifth of each user is held out, and the test
            set holds it with everything that evaluation needs. False at a data holder: a bad rating is marked invalid,
            and nothing is held out.

    Raises:
        DataError: A file is missing or is no such table; or, if strict, a rating is out of range or of an unknown film
            or user, stands there twice, or a user has fewer than two.
    """
    texts = _texts(place)
    films = _films(texts["u.item"], f"{place}: u.item")
    people = _people(texts["u.user"], f"{place}: u.user")
    table = _table(texts["u.data"], films, people, f"{place}: u.data", strict)
    names = tuple(sorted(people, key=int))
    place_of_user = {name: index for index, name in enumerate(names)}
    users = torch.tensor([place_of_user.get(name, 0) for name in table.users], dtype=torch.int64)
    inputs = torch.zeros((len(users), *SHAPE.inputs))
    inputs[:, 0], inputs[:, 1] = table.films.float(), users.float()
    inputs[:, 3 : 3 + FILM_FEATURES] = films.features[table.films]
    inputs[:, 3 + FILM_FEATURES :] = torch.stack([people[name] for name in names])[users]
    every = Records(inputs, table.stars - 1, table.valid)
    if not strict:
        nothing = every.take(torch.empty(0, dtype=torch.int64))
        return Rated(films, every, nothing, users, names)
    # By user, then time, then film: the same order on every machine, whatever the file's is.
    order = np.lexsort((table.films.numpy(), table.times.numpy(), users.numpy()))
    held = np.zeros(len(order), dtype=bool)
    for mine in np.split(np.arange(len(order)), np.flatnonzero(np.diff(users.numpy()[order])) + 1):
        if len(mine) < 2:
            raise DataError(f"{place}: expected at least two ratings of each user, got {len(mine)}; drop the user")
        held[mine[-max(1, int(len(mine) * _HELD_OUT)) :]] = True
    known, late = torch.from_numpy(order[~held]), torch.from_numpy(order[held])
    train, last, rows = every.take(known), every.take(late), films.rows()
    last.inputs[:, 2] = float(Part.HELD_OUT)
    test = Records(
        torch.cat([rows, train.inputs, last.inputs]),
        torch.cat([torch.zeros(len(rows), dtype=torch.int64), train.targets, last.targets]),
        torch.ones(len(rows) + len(train) + len(last), dtype=torch.bool),
    )
    return Rated(films, train, test, users[known], names)


def films_at(place: Place) -> Films:
    """Returns what is public about the films of a data set; no rating is read.

    Raises:
        DataError: There is no list of films, or it is damaged.
    """
    return _films(_texts(place, ("u.item",))["u.item"], f"{place}: u.item")


def given_ratings(path: Path, films: Films, features: Tensor) -> Records:
    """Reads one user's ratings from a CSV file with the columns ``film`` and ``rating``.

    Args:
        path: The file. A film is a number as in ``u.item``, or a whole title.
        films: The films.
        features: The user's features, shape ``(23,)``.

    Raises:
        DataError: The file cannot be read, has other columns, or holds a rating out of range or of an unknown film.
    """
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
        columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"expected a CSV file of ratings at {path}, got {error}; check the path") from None
    if sorted(columns) != ["film", "rating"]:
        raise DataError(
            f"{path}: expected the columns film and rating, got {', '.join(columns) or 'none'}; name them so"
        )
    numbers = {title.casefold(): number for number, title in enumerate(films.titles)}
    seen: dict[int, int] = {}
    for line, row in enumerate(rows, 2):
        film, rating = (row["film"] or "").strip(), (row["rating"] or "").strip()
        number = int(film) - 1 if film.isdecimal() else numbers.get(film.casefold(), -1)
        if not 0 <= number < len(films.titles):
            raise DataError(
                f"{path}, line {line}: expected a film's number from 1 to {len(films.titles)} or its whole "
                f"title with the year, got {film!r:.60}; see u.item"
            )
        if rating not in ("1", "2", "3", "4", "5"):
            raise DataError(f"{path}, line {line}: expected a rating of 1 to {STARS} stars, got {rating!r:.20}")
        if number in seen:
            raise DataError(f"{path}, line {line}: expected one rating of each film, got a second of {film!r:.60}")
        seen[number] = int(rating) - 1
    inputs = films.rows()[list(seen)]
    inputs[:, 2] = float(Part.KNOWN)
    inputs[:, 3 + FILM_FEATURES :] = features
    return Records(
        inputs, torch.tensor(list(seen.values()), dtype=torch.int64), torch.ones(len(seen), dtype=torch.bool)
    )


def user_row(age: float, gender: str, occupation: str, where: str) -> Tensor:
    """Returns a user's features, shape ``(23,)``.

    Args:
        age: In years, 1 to 120.
        gender: "F" or "M".
        occupation: One of `OCCUPATIONS`.
        where: What an error names.

    Raises:
        DataError: One of them is something else.
    """
    if not 1 <= age <= 120:
        raise DataError(f"{where}: expected an age of 1 to 120 years, got {age:g}")
    if gender not in ("F", "M"):
        raise DataError(f"{where}: expected the gender F or M, as the data set has it, got {gender!r:.20}")
    if occupation not in OCCUPATIONS:
        raise DataError(f"{where}: expected an occupation among {', '.join(OCCUPATIONS)}, got {occupation!r:.40}")
    row = torch.zeros(USER_FEATURES)
    row[0], row[1] = (age - 33) / 20, 0.5 if gender == "M" else -0.5
    row[2 + OCCUPATIONS.index(occupation)] = 1.0
    return row


def _texts(place: Place, wanted: tuple[str, ...] = _FILES) -> dict[str, str]:
    """The files as text; film titles are in Latin-1, and every byte is a letter of it."""
    if not place.is_dir():
        raise DataError(f"expected a folder or a zip file at {place}, got another file; name ml-100k.zip or its folder")
    # The published archive has them in a folder of its own.
    if (place / "ml-100k").is_dir() and not (place / wanted[0]).exists():
        place = place / "ml-100k"
    inside = {entry.name: entry for entry in entries_of(place)}
    if missing := [name for name in wanted if name not in inside]:
        raise DataError(f"{place}: expected the files {', '.join(_FILES)}, found no {missing[0]}; unpack ml-100k.zip")
    return {name: str(_bytes(inside[name]), "latin-1") for name in wanted}


def _bytes(file: Place) -> bytes:
    with stream_of(file) as stream:
        content = stream.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise DataError(f"{file}: expected a file of at most {_MOST_BYTES} bytes, got a larger one")
    return content


def _lines(text: str, separator: str, columns: int, where: str) -> list[list[str]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line:
            continue
        cells = line.split(separator)
        if len(cells) != columns:
            raise DataError(
                f"{where}, line {number}: expected {columns} columns, got {len(cells)}; is it MovieLens 100K?"
            )
        rows.append(cells)
    return rows


def _films(text: str, where: str) -> Films:
    titles, features = [], []
    for number, cells in enumerate(_lines(text, "|", 5 + _GENRES, where), 1):
        flags = cells[5:]
        if cells[0] != str(number) or not set(flags) <= {"0", "1"}:
            raise DataError(f"{where}, line {number}: expected film {number} with genres of 0 and 1, got another line")
        year = cells[2][-4:]
        # A film without a date gets the middle, where the feature is next to nothing.
        features.append([*map(float, flags), (int(year) - 1985) / 20 if year.isdecimal() else 0.0])
        titles.append(cells[1])
    if not 1 <= len(titles) <= FILMS:
        raise DataError(f"{where}: expected 1 to {FILMS} films, got {len(titles)}; is it MovieLens 100K?")
    return Films(tuple(titles), torch.tensor(features))


def _people(text: str, where: str) -> dict[str, Tensor]:
    people: dict[str, Tensor] = {}
    for number, (name, age, gender, job, _) in enumerate(_lines(text, "|", 5, where), 1):
        if not name.isdecimal() or not age.isdecimal() or name in people:
            raise DataError(
                f"{where}, line {number}: expected a new user's number and age, got {name!r:.20}, {age!r:.20}"
            )
        people[name] = user_row(float(age), gender, job, f"{where}, line {number}")
    if not people:
        raise DataError(f"{where}: expected at least one user, got none")
    return people


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Table:
    """Ratings as columns; what is not valid is of the first film and user, with one star."""

    users: list[str]
    films: Tensor
    stars: Tensor
    times: Tensor
    valid: Tensor


def _table(text: str, films: Films, people: dict[str, Tensor], where: str, strict: bool) -> _Table:
    users, rows, valid = [], [], []
    seen: set[tuple[str, str]] = set()
    for line, (user, film, rating, moment) in enumerate(_lines(text, "\t", 4, where), 1):
        fault = ""
        if user not in people:
            fault = f"expected a user that u.user describes, got {user!r:.20}"
        elif not film.isdecimal() or not 1 <= int(film) <= len(films.titles):
            fault = f"expected a film from 1 to {len(films.titles)}, got {film!r:.20}"
        elif rating not in ("1", "2", "3", "4", "5"):
            fault = f"expected a rating of 1 to {STARS} stars, got {rating!r:.20}"
        elif not moment.isdecimal() or len(moment) > 15:
            fault = f"expected a time in seconds, got {moment!r:.20}"
        elif (user, film) in seen:
            fault = f"expected one rating of a film by a user, got a second of film {film} by user {user}"
        if fault and strict:
            raise DataError(f"{where}, line {line}: {fault}; correct or drop it")
        seen.add((user, film))
        users.append(user)
        rows.append((0, 1, 0) if fault else (int(film) - 1, int(rating), int(moment)))
        valid.append(not fault)
    columns = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
    return _Table(users, columns[:, 0], columns[:, 1], columns[:, 2], torch.tensor(valid, dtype=torch.bool))
