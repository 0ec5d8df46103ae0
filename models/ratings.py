"""Recommenders whose user part never leaves its client: shared films, and a ridge regression of every user's own.

A rating is predicted as ``3.5 + offset(film, user's features) + features(film) . own(user)``. What is in ``offset`` and
``features`` is shared and learned in the federation; ``own`` is the user's, solved in closed form from the user's
ratings each time it is needed, and kept nowhere. So the shared part is all that a client's update is about, and it is
dense: one number or vector for *every* film, of the same length for everybody, whatever was rated (guarantee G17). The
server's noise falls on every film too, those that nobody rated included.

Records are ratings. One row of inputs holds, in float32:

    film      its number from 0
    user      a number that tells users of one client or test set apart; it means nothing else
    part      of a test set: 0 = rated before, known to the user's own regression; 1 = held out; 2 = a film as such
    film's features      19 genres (0 or 1) and the year, (year - 1985) / 20
    user's features      (age - 33) / 20, gender -0.5 or 0.5, 21 occupations (0 or 1)

and its class is the number of stars - 1.

Evaluation. Judging held-out ratings needs the user's own regression and therefore the user's other ratings. A test set
holds both (``part``), so it has to be public: users who gave theirs away. **In a simulation the test users are the
clients themselves, which only an experimenter can do**; in a deployment it would be a release that nobody charged.

References:
    Koren, Bell & Volinsky (2009), "Matrix factorization techniques for recommender systems"; He et al. (2017), "Neural
    collaborative filtering"; `Jain, Rush, Smith, Song & Thakurta (2021) <https://arxiv.org/abs/2102.02392>`_: the user
    part local, the item part noised, is what makes private recommendation work.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor, nn

from models.shape import Shape
from models.task import Pace, Task

FILMS: Final = 1682  # Published: MovieLens 100K.
STARS: Final = 5
FILM_FEATURES: Final = 20
USER_FEATURES: Final = 23
SHAPE: Final = Shape(inputs=(3 + FILM_FEATURES + USER_FEATURES,), classes=STARS)
# The start of every prediction; a round number and not a mean of anybody's ratings.
MIDDLE: Final = 3.5
# A film counts as liked from this many stars on.
_LIKED: Final = 4
_TOP: Final = 10


class Part(IntEnum):
    """What a row of a test set is for."""

    KNOWN = 0
    HELD_OUT = 1
    FILM = 2


def film_features(inputs: Tensor) -> Tensor:
    """Returns the films' features of rows, shape ``(n, 20)``."""
    return inputs[:, 3 : 3 + FILM_FEATURES]


def user_features(inputs: Tensor) -> Tensor:
    """Returns the users' features of rows, shape ``(n, 23)``."""
    return inputs[:, 3 + FILM_FEATURES :]


class Recommender(nn.Module):
    """What is shared, and how a user's own part is solved from it."""

    def __init__(self, films: int, penalty: list[float]) -> None:
        """Takes the number of films and the ridge penalty of each own weight, the constant's first."""
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(films))
        self.penalty = penalty

    def shared(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what is shared about rows: offsets ``(n,)`` and features ``(n, d)``, the first of which is 1."""
        raise NotImplementedError

    def own(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Solves one user's own weights from the user's ratings; no gradient flows through them.

        Args:
            inputs: The user's rows, shape ``(n, 46)``, n >= 0.
            targets: Their classes, shape ``(n,)``.

        Returns:
            Shape ``(d,)``; zero without a rating.
        """
        with torch.no_grad():
            offset, features = self.shared(inputs)
            gram = features.T @ features + torch.diag(features.new_tensor(self.penalty))
            solved: Tensor = torch.linalg.solve(gram, features.T @ (stars(targets) - MIDDLE - offset))
        return solved

    def predict(self, inputs: Tensor, own: Tensor) -> Tensor:
        """Returns the stars that one user is predicted to give, shape ``(n,)``; not cut to 1 to 5."""
        offset, features = self.shared(inputs)
        return MIDDLE + offset + features @ own

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns logits of the star classes for a user without ratings, shape ``(n, 5)``."""
        offset, _ = self.shared(inputs)
        distance = (MIDDLE + offset)[:, None] - torch.arange(1, STARS + 1, device=inputs.device)
        return -(distance**2)

    def film_of(self, inputs: Tensor) -> Tensor:
        """Returns the films' numbers, shape ``(n,)``, int64; what is no film of this model counts as the first."""
        found = inputs[:, 0].long()
        return torch.where((found >= 0) & (found < len(self.bias)), found, torch.zeros_like(found))


class Factors(Recommender):
    """Matrix factorisation: a bias and a vector for every film."""

    def __init__(self, shape: Shape, *, films: int = FILMS, rank: int = 2, scale: float = 0.1) -> None:
        """Starts from small random vectors and no bias.

        Args:
            shape: Of the records; not used beyond `Task.build`'s contract.
            films: Number of films.
            rank: Length of a film's vector.
            scale: Standard deviation of the first vectors.
        """
        super().__init__(films, [5.0] + [10.0] * rank)
        self.factors = nn.Parameter(torch.empty(films, rank))
        nn.init.normal_(self.factors, std=scale)

    def shared(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the films' biases, and 1 beside their vectors."""
        film = self.film_of(inputs)
        return self.bias[film], torch.cat([torch.ones(len(film), 1, device=inputs.device), self.factors[film]], 1)


class Context(Recommender):
    """A bias for every film; genres and year, which each user weighs alone; and what users' features say about both.

    The user's own weights are shrunk towards what the shared matrix expects of somebody of that age, gender and
    occupation.
    """

    def __init__(self, shape: Shape, *, films: int = FILMS, gain: float = 0.2) -> None:
        """Starts at zero; ``gain`` scales the shared matrix, and by it its share of the clip."""
        super().__init__(films, [5.0] + [20.0] * FILM_FEATURES)
        self.taste = nn.Parameter(torch.zeros(USER_FEATURES, 1 + FILM_FEATURES))
        self._gain = gain

    def shared(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns biases with what the user's features add, and 1 beside the films' features."""
        film = self.film_of(inputs)
        features = torch.cat([torch.ones(len(film), 1, device=inputs.device), film_features(inputs)], 1)
        expected = (user_features(inputs) @ self.taste * features).sum(1)
        return self.bias[film] + self._gain * expected, features


class Neural(Recommender):
    """A network turns a film (its learned vector, its genres and year) into features; each user has an own last layer.

    The network of He et al. with the user's half taken out of what is shared: instead of a user's vector among its
    inputs, which would have to be trained by many local steps, a user has the last layer, which is solved.
    """

    def __init__(self, shape: Shape, *, films: int = FILMS, rank: int = 4, hidden: int = 16, gain: float = 0.2) -> None:
        """Starts from random layers, and from no bias and no vector of any film."""
        super().__init__(films, [5.0] + [10.0] * hidden)
        self.factors = nn.Parameter(torch.zeros(films, rank))
        self.tower = nn.Sequential(
            nn.Linear(rank + FILM_FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
        )
        self._gain = gain

    def shared(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the films' biases, and 1 beside the network's features."""
        film = self.film_of(inputs)
        features = self.tower(torch.cat([self._gain * self.factors[film], film_features(inputs)], 1))
        return self.bias[film], torch.cat([torch.ones(len(film), 1, device=inputs.device), features], 1)


def stars(targets: Tensor) -> Tensor:
    """Returns classes as numbers of stars, float32."""
    return targets.float() + 1


def solve_and_descend(model: nn.Module, inputs: Tensor, targets: Tensor, pace: Pace) -> None:
    """A client's round: solve each user's own part, then one gradient step on what is shared; ``pace.steps`` times.

    The gradient is that of the summed squared error, at the solved own part. By the envelope theorem that is the
    gradient of the error with the user's part optimised away.

    Args:
        model: A `Recommender`; moved in place.
        inputs: The client's rows, shape ``(n, 46)``, n >= 1; of one user, or of several.
        targets: Their classes, shape ``(n,)``.
        pace: Steps and learning rate are used.

    Raises:
        TypeError: The model is no recommender.
    """
    if not isinstance(model, Recommender):
        raise TypeError(f"expected a recommender, got {type(model).__name__}")
    users = [inputs[:, 1] == user for user in sorted(set(inputs[:, 1].tolist()))]
    parameters = list(model.parameters())
    for _ in range(pace.steps):
        error = torch.zeros((), device=inputs.device)
        for mine in users:
            rows, classes = inputs[mine], targets[mine]
            own = model.own(rows, classes)
            error = error + 0.5 * ((stars(classes) - model.predict(rows, own)) ** 2).sum()
        gradients = torch.autograd.grad(error, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient, alpha=pace.lr)


def ranking(scores: Tensor, liked: Tensor, top: int = _TOP) -> tuple[float, float]:
    """Returns NDCG and hit rate of one full ranking.

    Args:
        scores: Of every film that the user had not rated before, shape ``(n,)``; equal scores rank in their order.
        liked: Which of them the user liked afterwards, shape ``(n,)``, bool, at least one.
        top: Length K of the list.

    Returns:
        NDCG@K with gains of 0 and 1, and 1.0 where any liked film is among the first K, else 0.0.

    References:
        Järvelin & Kekäläinen (2002); Krichene & Rendle (2020), "On sampled metrics for item recommendation", on why the
        ranking is full and not of a sample.
    """
    order = torch.sort(scores, descending=True, stable=True).indices[:top]
    discounts = 1 / torch.log2(torch.arange(2, top + 2, dtype=torch.float64))
    gains = liked[order].double()
    best = discounts[: min(top, int(liked.sum()))].sum()
    return float((gains * discounts[: len(gains)]).sum() / best), float(gains.any())


@torch.no_grad()
def figures(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Returns RMSE in stars (first: the headline), and NDCG@10 and hit rate@10 by full ranking over unseen films.

    Predictions are cut to 1 to 5 stars for the RMSE. A held-out film of 4 or 5 stars is liked; users without one are
    left out of the ranking figures, which are missing where nobody has one.

    Args:
        model: A `Recommender`.
        inputs: Rows of a test set, of all three parts, shape ``(N, 46)``.
        targets: Classes, shape ``(N,)``; without a meaning for films as such.

    Raises:
        TypeError: The model is no recommender.
    """
    if not isinstance(model, Recommender):
        raise TypeError(f"expected a recommender, got {type(model).__name__}")
    device = model.bias.device
    inputs, targets = inputs.to(device), targets.to(device)
    films = inputs[inputs[:, 2] == Part.FILM]
    rated = (inputs[:, 2] != Part.FILM).nonzero().squeeze(1)
    # Users' rows lie in any order; sorted once, each user's are one slice.
    rated = rated[torch.sort(inputs[rated, 1], stable=True).indices]
    counts = torch.unique_consecutive(inputs[rated, 1], return_counts=True)[1].tolist()
    squared, number = 0.0, 0
    ranks: list[tuple[float, float]] = []
    for rows in torch.split(rated, counts):
        mine, classes = inputs[rows], targets[rows]
        held = mine[:, 2] == Part.HELD_OUT
        own = model.own(mine[~held], classes[~held])
        guess = model.predict(mine[held], own).clamp(1, STARS)
        squared += float(((guess - stars(classes[held])) ** 2).double().sum())
        number += int(held.sum())
        liked = mine[held][stars(classes[held]) >= _LIKED, 0]
        if not len(liked) or not len(films):
            continue
        unseen = films[~torch.isin(films[:, 0], mine[~held, 0])]
        scores = model.predict(of_user(unseen, user_features(mine[:1])), own)
        ranks.append(ranking(scores.cpu(), torch.isin(unseen[:, 0], liked).cpu()))
    found = {"rmse": math.sqrt(squared / number) if number else math.nan}
    if ranks:
        found |= {
            f"ndcg_at_{_TOP}": sum(ndcg for ndcg, _ in ranks) / len(ranks),
            f"hit_rate_at_{_TOP}": sum(hit for _, hit in ranks) / len(ranks),
        }
    return found


def of_user(films: Tensor, features: Tensor) -> Tensor:
    """Returns films' rows with a user's features, shape ``(n, 46)``.

    Args:
        films: Rows of films, shape ``(n, 46)``.
        features: The user's, shape ``(23,)`` or ``(1, 23)``.
    """
    rows = films.clone()
    rows[:, 3 + FILM_FEATURES :] = features
    return rows


def item_mean_rmse(inputs: Tensor, targets: Tensor) -> float:
    """Returns the RMSE of the usual baseline: every film's mean over the known ratings. **Not private.**

    A film that nobody rated gets the mean of all known ratings. It is computed centrally, for comparison only.

    Args:
        inputs: Rows of a test set, shape ``(N, 46)``.
        targets: Classes, shape ``(N,)``.
    """
    film, value = inputs[:, 0].long(), stars(targets).double()
    known, held = inputs[:, 2] == Part.KNOWN, inputs[:, 2] == Part.HELD_OUT
    films = int(film.max()) + 1
    count = torch.bincount(film[known], minlength=films)
    total = torch.bincount(film[known], value[known], minlength=films)
    mean = torch.where(count > 0, total / count.clamp(min=1), value[known].mean())
    return float((mean[film[held]] - value[held]).square().mean().sqrt())


def random_ratings(shape: Shape, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns random public ratings of one user in the range that real ones have.

    Args:
        shape: Of the records.
        count: Number of ratings >= 0.
        generator: Source of this public randomness.
    """
    inputs = torch.zeros((count, *shape.inputs))
    inputs[:, 0] = torch.randint(FILMS, (count,), generator=generator).float()
    inputs[:, 3:22] = (torch.rand((count, 19), generator=generator) < 0.1).float()
    inputs[:, 22] = torch.rand(count, generator=generator)
    inputs[:, 23:25] = torch.rand(2, generator=generator) - 0.5
    return inputs, torch.randint(shape.classes, (count,), generator=generator)


# Every client in every round: a user is small, and what chance would save is less than what it would waste.
_DEFAULTS: dict[str, float | int | str] = {
    "unit": "client",
    "clients": 943,
    "partition": "natural",
    "epsilon": 8.0,
    "rounds": 20,
    "client-rate": 1.0,
    "steps-per-round": 1,
    "sample-rate": 1.0,
    "l2-clip": 20.0,
    "lr": 5.0,
    "evaluate-every": 10,
}
_RECORD = "one rating of a film by a user; what is protected is the user, with all ratings"

TASKS = (
    Task(
        name="movielens-mf",
        summary="matrix factorisation on MovieLens 100K; a user's factors stay at the user's client",
        record=_RECORD,
        data="movielens-100k",
        build=Factors,
        local=solve_and_descend,
        evaluate=figures,
        synthetic=random_ratings,
        defaults=_DEFAULTS,
    ),
    Task(
        name="movielens-ncf",
        summary="neural recommender on MovieLens 100K: a shared network of films, each user's own last layer",
        record=_RECORD,
        data="movielens-100k",
        build=Neural,
        local=solve_and_descend,
        evaluate=figures,
        synthetic=random_ratings,
        defaults=_DEFAULTS,
    ),
    Task(
        name="movielens-context",
        summary="recommender by features of film and user (genres, year; age, gender, occupation) on MovieLens 100K",
        record=_RECORD,
        data="movielens-100k",
        build=Context,
        local=solve_and_descend,
        evaluate=figures,
        synthetic=random_ratings,
        defaults=_DEFAULTS,
    ),
)
