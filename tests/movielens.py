"""A tiny data set in the format of MovieLens 100K, and where the real one lies."""

import os
import random
from pathlib import Path

import pytest

FILMS = 40


def small_movielens(folder: Path, users: int = 4, each: int = 10) -> Path:
    """Writes ``u.data``, ``u.item`` and ``u.user``: films of even number are liked by all, the others by nobody."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    lines = [
        f"{user}\t{film}\t{4 + chance.randrange(2) if film % 2 == 0 else 1 + chance.randrange(2)}\t{moment}"
        for user in range(1, users + 1)
        for moment, film in enumerate(chance.sample(range(1, FILMS + 1), each), 880_000_000)
    ]
    chance.shuffle(lines)
    (folder / "u.data").write_text("\n".join(lines) + "\n")
    genres = ["|".join(str(int(place == film % 19)) for place in range(19)) for film in range(1, FILMS + 1)]
    items = [f"{film}|Film {film} (1980)|01-Jan-1980|||{genres[film - 1]}" for film in range(1, FILMS + 1)]
    (folder / "u.item").write_text("\n".join(items) + "\n")
    people = [f"{user}|{20 + user}|{'FM'[user % 2]}|student|12345" for user in range(1, users + 1)]
    (folder / "u.user").write_text("\n".join(people) + "\n")
    return folder


def shared_data(name: str) -> Path:
    """Returns where a real data set lies, or skips the test."""
    for folder in (os.environ.get("TACIT_DATA"), Path(__file__).parents[2] / "shared" / "data"):
        if folder and (path := Path(folder) / name).exists():
            return path
    pytest.skip(f"needs {name} in $TACIT_DATA or ../shared/data, which is not there")
