"""Uses what a run has trained: recommends films to a user, plays a game. Post-processing, so it costs no privacy.

A recommendation needs the user's own ratings, from which the user's part is solved here and kept nowhere: this belongs
on the user's own machine. To name a user of the data set instead of a file is for who simulates, and has the data.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn

from clients import ratings
from clients.data import data_folder, load_source, published
from clients.places import Place
from clients.records import Records
from models.catalog import find_task
from models.games import UNSEEN_SEED, Acrobot, Floats, Game, QNetwork, machines, values_of
from models.ratings import STARS, USER_FEATURES, Recommender, of_user, user_features
from models.task import Task
from privacy.errors import DataError, PlanError, RunError
from privacy.files import write_whole
from privacy.plan import require
from server.app import CHECKPOINT
from server.checkpoint import load
from simulations.scenario import Scenario
from simulations.world import vault_of

if TYPE_CHECKING:
    from PIL.Image import Image

# Of a picture, in pixels; and the most pictures of one film, which are kept in memory.
_WIDTH: Final = 240
_HEIGHT: Final = 160
_MOST_FRAMES: Final = 500


def trained(folder: Path) -> tuple[Task, Scenario, nn.Module]:
    """Returns what a run has trained so far, with its task and scenario.

    Args:
        folder: A run folder.

    Raises:
        DataError: Only the data says what a record looks like, and it cannot be read.
        RunError: It is no run folder, or its checkpoint is damaged or another task's.
        PlanError: Its task is not there any more.
    """
    scenario = Scenario.from_run(folder)
    try:
        task = find_task(scenario.task)
    except LookupError as error:
        raise PlanError(str(error.args[0] if error.args else error)) from None
    state = load(folder / CHECKPOINT, vault_of(scenario))
    place = scenario.data or None
    shape = published(task, place)[0] or load_source(task, data=place).shape
    model = task.fresh(shape, scenario.seed)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    if {name: value.shape for name, value in state.model.items()} != shapes:
        raise RunError(f"expected a checkpoint of task {scenario.task} in {folder}, got one of another; restore it")
    with torch.no_grad():
        for name, value in state.model.items():
            parameters[name].copy_(torch.from_numpy(value))
    return task, scenario, model.eval()


def recommend(
    folder: Path,
    user: str,
    *,
    top: int = 10,
    data: str | None = None,
    age: float | None = None,
    gender: str | None = None,
    occupation: str | None = None,
) -> dict[str, Any]:
    """Returns the films that a user has not rated and is predicted to give the most stars.

    Args:
        folder: A run of a recommender.
        user: A CSV file of the user's own ratings (columns film and rating), or the number of a user in the data set.
        top: Length of the list, at least 1.
        data: Where the films are described; by default where the run's data lies.
        age: In years; with a file only, as are gender and occupation. All three or none.
        gender: "F" or "M".
        occupation: One of `clients.ratings.OCCUPATIONS`.

    Returns:
        ``user``, ``ratings`` (how many are known), and ``films``: a list of ``film`` (number from 1), ``title`` and
        ``stars`` in [1, 5], the best first.

    Raises:
        PlanError: The run is of another kind of task, or ``top`` is below 1.
        DataError: The films or the ratings cannot be read, or there is no such user.
        RunError: The run folder is damaged.
    """
    task, scenario, model = trained(folder)
    if not isinstance(model, Recommender):
        raise PlanError(f"expected a run of a recommender, got one of task {task.name}; name another run")
    require(top >= 1, f"expected top >= 1, got {top}")
    place = ratings.where(data or scenario.data or None, data_folder())
    described = [age is not None, gender is not None, occupation is not None]
    if any(described) and not all(described):
        raise PlanError(
            "expected all of --age, --gender and --occupation, or none; a model by features needs all three"
        )
    if Path(user).is_file() or not user.isdecimal():
        films = ratings.films_at(place)
        features = torch.zeros(USER_FEATURES)
        if age is not None and gender is not None and occupation is not None:
            features = ratings.user_row(age, gender, occupation, "--age, --gender and --occupation")
        known = ratings.given_ratings(Path(user), films, features)
    else:
        if any(described):
            raise PlanError("expected no --age, --gender or --occupation for a user of the data set, which has them")
        films, known = _of_data_set(place, user)
        features = user_features(known.inputs)[0]
    with torch.no_grad():
        rows = of_user(films.rows(), features)
        own = model.own(known.inputs, known.targets)
        unseen = rows[~torch.isin(rows[:, 0], known.inputs[:, 0])]
        scores = model.predict(unseen, own)
    best = torch.sort(scores, descending=True, stable=True).indices[:top]
    return {
        "user": user,
        "ratings": len(known),
        "films": [
            {
                "film": int(unseen[index, 0]) + 1,
                "title": films.titles[int(unseen[index, 0])],
                "stars": float(scores[index].clamp(1, STARS)),
            }
            for index in best.tolist()
        ],
    }


def _of_data_set(place: Place, user: str) -> tuple[ratings.Films, Records]:
    """The films, and what a user of the data set had rated before the held-out ratings."""
    found = ratings.load(place, strict=True)
    if user not in found.names:
        raise DataError(
            f"expected a user from {found.names[0]} to {found.names[-1]} or a CSV file of ratings, got {user!r:.60}"
        )
    mine = (found.users == found.names.index(user)).nonzero().squeeze(1)
    return found.films, found.train.take(mine)


def play(
    folder: Path, *, episodes: int = 10, seed: int = UNSEEN_SEED, gif: Path | None = None, frames: Path | None = None
) -> dict[str, Any]:
    """Plays greedy episodes with gymnasium's own game, each on another machine.

    Args:
        folder: A run of a game agent.
        episodes: How many, at least 1.
        seed: Of the machines' physics and of the first states; by default machines that no client has.
        gif: Where to write the first episode as a moving picture, or None.
        frames: Folder to write its pictures to, one PNG file each, or None.

    Returns:
        ``game``, ``return`` (mean), ``returns``, ``frames`` (how many pictures were drawn).

    Raises:
        PlanError: The run is of another kind of task, or ``episodes`` is below 1.
        RunError: The run folder is damaged, or the pictures cannot be written.
    """
    import gymnasium

    task, _, model = trained(folder)
    if not isinstance(model, QNetwork):
        raise PlanError(f"expected a run of a game agent, got one of task {task.name}; name another run")
    require(episodes >= 1, f"expected at least one episode, got {episodes}")
    require(0 <= seed < 2**31, f"expected a seed from 0, got {seed}")
    game, values = model.game, values_of(model)
    returns: list[float] = []
    pictures: list[Image] = []
    for episode, physics in enumerate(machines(game, episodes, seed).double().numpy()):
        world = gymnasium.make(game.name)
        game.configure(world.unwrapped, physics)
        world.reset(seed=seed + episode)
        total, over = 0.0, False
        while not over:
            state = np.asarray(world.unwrapped.state, dtype=np.float64)  # type: ignore[attr-defined]
            if episode == 0 and (gif or frames) and len(pictures) < _MOST_FRAMES:
                pictures.append(picture(game, state, physics))
            action = int(values(game.seen(state[None])).argmax(1)[0])
            _, reward, ended, cut, _ = world.step(action)
            total, over = total + float(reward), ended or cut
        world.close()
        returns.append(total)
    if gif is not None:
        _write_gif(pictures, gif)
    if frames is not None:
        for number, image in enumerate(pictures):
            write_whole(frames / f"{number:04d}.png", _encoded(image, "PNG"))
    return {"game": game.name, "return": float(np.mean(returns)), "returns": returns, "frames": len(pictures)}


def picture(game: Game, state: Floats, physics: Floats) -> Image:
    """Draws one state of a game; lengths are those of the machine.

    Args:
        game: CartPole or Acrobot.
        state: Shape ``(4,)``.
        physics: The machine's constants, by the game's ranges.
    """
    from PIL import Image, ImageDraw

    constants = dict(zip(game.ranges, physics.tolist(), strict=True))
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    if isinstance(game, Acrobot):
        middle, unit = (_WIDTH / 2, _HEIGHT / 2), _HEIGHT / 5
        draw.line((0, middle[1] - unit, _WIDTH, middle[1] - unit), fill="grey")
        first, second = state[0], state[0] + state[1]
        elbow = (
            middle[0] + unit * constants["LINK_LENGTH_1"] * math.sin(first),
            middle[1] + unit * constants["LINK_LENGTH_1"] * math.cos(first),
        )
        tip = (elbow[0] + unit * math.sin(second), elbow[1] + unit * math.cos(second))
        draw.line((*middle, *elbow, *tip), fill="teal", width=6, joint="curve")
    else:
        ground, unit = _HEIGHT * 0.8, _WIDTH / 4.8
        x = _WIDTH / 2 + unit * state[0]
        length = 2 * constants["length"] * unit
        draw.line((0, ground, _WIDTH, ground), fill="black")
        draw.rectangle((x - 16, ground - 8, x + 16, ground + 8), fill="black")
        tip = (x + length * math.sin(state[2]), ground - 8 - length * math.cos(state[2]))
        draw.line((x, ground - 8, *tip), fill="chocolate", width=6)
    return image


def _write_gif(pictures: list[Image], path: Path) -> None:
    """Writes every second picture, 25 a second: as fast as the game."""
    shown = pictures[::2]
    write_whole(path, _encoded(shown[0], "GIF", save_all=True, append_images=shown[1:], duration=40, loop=0))


def _encoded(image: Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()
