"""Game agents: deep Q-learning on machines whose physics differ from client to client.

A record is one machine: its physics, drawn from public ranges by a public seed. A client plays on its own machine only,
from the round's shared network, learns from its own replay memory, and sends how far that moved the network. What is
protected is the client: which machine it has, and everything that happened there.

The games are gymnasium's, with its dynamics, its limits and its start; only the constants of a machine vary. They are
written here for many machines at once, because a federation plays hundreds of them; a test plays both side by side and
holds every state equal to gymnasium's. ``tacit play`` uses gymnasium itself.

Two choices that make a short, noisy training work, both public and both old. The signal is that of Barto, Sutton &
Anderson (1983): nothing while the pole stands, -1 when it falls, so a network of zeros is right about every state that
is far from falling, and no update has to carry the height of all values. And a target network with double Q-learning
keeps the few steps of a round stable. A figure is always the plain return of the game, +1 (or -1) a step.

References:
    Mnih et al. (2015), "Human-level control through deep reinforcement learning"; van Hasselt, Guez & Silver (2016),
    "Deep reinforcement learning with double Q-learning"; Towers et al. (2024), "Gymnasium".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from models.shape import Shape
from models.task import Pace, Task

Floats = np.ndarray[Any, np.dtype[np.float64]]
# Physics are computed in double precision as gymnasium does, the network in its own.
Reals = np.ndarray[Any, np.dtype[np.floating[Any]]]
Actions = np.ndarray[Any, np.dtype[np.int64]]
Marks = np.ndarray[Any, np.dtype[np.bool_]]

# Machines with physics that no client has; public like all others, and drawn from other seeds.
UNSEEN: Final = 100
UNSEEN_SEED: Final = 2
MACHINES: Final = 200


class Game(Protocol):
    """A game on many machines at once."""

    @property
    def name(self) -> str:
        """Its name in gymnasium."""

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Public range of each of a machine's constants."""

    @property
    def actions(self) -> int:
        """Number of actions."""

    @property
    def inputs(self) -> int:
        """Length of what an agent sees of a state."""

    @property
    def limit(self) -> int:
        """Steps after which an episode ends anyway."""

    @property
    def reward(self) -> float:
        """What each step before the end returns."""

    def start(self, count: int, chance: np.random.Generator) -> Floats:
        """Returns first states as gymnasium draws them, shape ``(count, 4)``."""

    def seen(self, states: Floats) -> Floats:
        """Returns what an agent sees, scaled by public constants to about [-1, 1], shape ``(count, inputs)``."""

    def step(self, states: Floats, actions: Actions, physics: Floats) -> tuple[Floats, Marks]:
        """Returns the next states, and which episodes ended in them.

        Args:
            states: Shape ``(count, 4)``.
            actions: Shape ``(count,)``.
            physics: Constants of each machine, shape ``(count, len(ranges))``.
        """

    def potential(self, states: Floats) -> Floats | float:
        """Returns how promising states are, shape ``(count,)``, in [-1, 1]; 0 where nothing is known in public."""

    def configure(self, game: Any, physics: Floats) -> None:
        """Gives a game of gymnasium the constants of one machine, shape ``(len(ranges),)``."""


class CartPole:
    """A pole on a cart, pushed left or right; an episode lasts while the pole stands, 500 steps at most."""

    name: Final = "CartPole-v1"
    ranges: Final = {
        "gravity": (7.0, 13.0),
        "masscart": (0.7, 1.5),
        "masspole": (0.05, 0.3),
        "length": (0.3, 0.8),
        "force_mag": (7.0, 13.0),
    }
    actions: Final = 2
    inputs: Final = 4
    limit: Final = 500
    reward: Final = 1.0
    _TAU: Final = 0.02
    _SCALE: Final = np.array([2.4, 3.0, 0.21, 3.0])

    def start(self, count: int, chance: np.random.Generator) -> Floats:
        """Returns states in [-0.05, 0.05]."""
        return chance.uniform(-0.05, 0.05, (count, 4))

    def seen(self, states: Floats) -> Floats:
        """Returns the states over the limits of position and angle, and typical speeds."""
        scaled: Floats = states / self._SCALE
        return scaled

    def step(self, states: Floats, actions: Actions, physics: Floats) -> tuple[Floats, Marks]:
        """One Euler step of gymnasium's equations, each machine with its own constants."""
        gravity, cart, pole, length, force = physics.T
        x, x_dot, theta, theta_dot = states.T
        push = np.where(actions == 1, force, -force)
        total, moment = cart + pole, pole * length
        cos, sin = np.cos(theta), np.sin(theta)
        temp = (push + moment * np.square(theta_dot) * sin) / total
        theta_acc = (gravity * sin - cos * temp) / (length * (4.0 / 3.0 - pole * np.square(cos) / total))
        x_acc = temp - moment * theta_acc * cos / total
        tau = self._TAU
        moved = np.stack(
            [x + tau * x_dot, x_dot + tau * x_acc, theta + tau * theta_dot, theta_dot + tau * theta_acc], axis=1
        )
        return moved, (np.abs(moved[:, 0]) > 2.4) | (np.abs(moved[:, 2]) > 12 * 2 * math.pi / 360)

    def potential(self, states: Floats) -> Floats | float:
        """Nothing is known: a pole that stands says little about how long it will."""
        return 0.0

    def configure(self, game: Any, physics: Floats) -> None:
        """Sets the attributes that gymnasium's step reads."""
        for name, value in zip(self.ranges, physics.tolist(), strict=True):
            setattr(game, name, value)
        game.total_mass = game.masscart + game.masspole
        game.polemass_length = game.masspole * game.length


class Acrobot:
    """Two links hanging from a joint, driven at the joint between them; an episode ends when the tip swings above."""

    name: Final = "Acrobot-v1"
    ranges: Final = {
        "LINK_LENGTH_1": (0.8, 1.2),
        "LINK_MASS_1": (0.8, 1.2),
        "LINK_MASS_2": (0.8, 1.2),
        "LINK_MOI": (0.8, 1.2),
    }
    actions: Final = 3
    inputs: Final = 6
    limit: Final = 500
    reward: Final = -1.0
    _DT: Final = 0.2
    _FASTEST: Final = (4 * math.pi, 9 * math.pi)

    def start(self, count: int, chance: np.random.Generator) -> Floats:
        """Returns states in [-0.1, 0.1]."""
        return chance.uniform(-0.1, 0.1, (count, 4))

    def seen(self, states: Floats) -> Floats:
        """Returns cosine and sine of both angles, and both speeds over half of their limits."""
        first, second, slow, fast = states.T
        return np.stack([np.cos(first), np.sin(first), np.cos(second), np.sin(second), slow / 6.0, fast / 12.0], axis=1)

    def step(self, states: Floats, actions: Actions, physics: Floats) -> tuple[Floats, Marks]:
        """One Runge-Kutta step of gymnasium's equations, each machine with its own constants."""
        torque: Floats = actions.astype(np.float64) - 1.0

        def slope(at: Floats) -> Floats:
            return self._slope(at, torque, physics)

        dt = self._DT
        k1 = slope(states)
        k2 = slope(states + dt / 2 * k1)
        k3 = slope(states + dt / 2 * k2)
        k4 = slope(states + dt * k3)
        moved = states + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        moved[:, :2] = (moved[:, :2] + math.pi) % (2 * math.pi) - math.pi
        for column, most in enumerate(self._FASTEST, 2):
            moved[:, column] = moved[:, column].clip(-most, most)
        return moved, -np.cos(moved[:, 0]) - np.cos(moved[:, 1] + moved[:, 0]) > 1.0

    def potential(self, states: Floats) -> Floats | float:
        """Returns the height of the tip over its largest."""
        height: Floats = -(np.cos(states[:, 0]) + np.cos(states[:, 0] + states[:, 1])) / 2
        return height

    @staticmethod
    def _slope(states: Floats, torque: Floats, physics: Floats) -> Floats:
        """The book's equations, as gymnasium has them: centres of mass at 0.5, gravity 9.8."""
        l1, m1, m2, moi = physics.T
        lc1 = lc2 = 0.5
        g = 9.8
        theta1, theta2, dtheta1, dtheta2 = states.T
        d1 = m1 * lc1**2 + m2 * (l1**2 + lc2**2 + 2 * l1 * lc2 * np.cos(theta2)) + moi + moi
        d2 = m2 * (lc2**2 + l1 * lc2 * np.cos(theta2)) + moi
        phi2 = m2 * lc2 * g * np.cos(theta1 + theta2 - math.pi / 2)
        phi1 = (
            -m2 * l1 * lc2 * dtheta2**2 * np.sin(theta2)
            - 2 * m2 * l1 * lc2 * dtheta2 * dtheta1 * np.sin(theta2)
            + (m1 * lc1 + m2 * l1) * g * np.cos(theta1 - math.pi / 2)
            + phi2
        )
        ddtheta2 = (torque + d2 / d1 * phi1 - m2 * l1 * lc2 * dtheta1**2 * np.sin(theta2) - phi2) / (
            m2 * lc2**2 + moi - d2**2 / d1
        )
        ddtheta1 = -(d2 * ddtheta2 + phi1) / d1
        return np.stack([dtheta1, dtheta2, ddtheta1, ddtheta2], axis=1)

    def configure(self, game: Any, physics: Floats) -> None:
        """Sets the attributes that gymnasium's step reads."""
        for name, value in zip(self.ranges, physics.tolist(), strict=True):
            setattr(game, name, value)


class QNetwork(nn.Module):
    """Values of all actions from what is seen of a state: one hidden layer, and an output that starts at zero."""

    def __init__(self, shape: Shape, *, game: Game, hidden: int = 16) -> None:
        """Makes the network of a game.

        Args:
            shape: Of the records, which are machines: not of the network's inputs.
            game: Gives the numbers of inputs and actions.
            hidden: Width of the hidden layer.
        """
        super().__init__()
        self.game = game
        self.hidden = nn.Linear(game.inputs, hidden)
        self.value = nn.Linear(hidden, game.actions)
        nn.init.normal_(self.hidden.weight)
        nn.init.normal_(self.hidden.bias, std=0.5)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, seen: Tensor) -> Tensor:
        """Returns values ``(B, actions)`` of what is seen, shape ``(B, inputs)``."""
        values: Tensor = self.value(torch.tanh(self.hidden(seen)))
        return values


class _Values:
    """A `QNetwork` in NumPy, with its gradient: a step on 64 states costs a tenth of autograd's."""

    def __init__(self, weights: list[Reals]) -> None:
        self.weights = weights

    def __call__(self, seen: Reals) -> Reals:
        return self._hidden(seen.astype(self.weights[0].dtype, copy=False)) @ self.weights[2].T + self.weights[3]

    def _hidden(self, seen: Reals) -> Reals:
        hidden: Reals = np.tanh(seen @ self.weights[0].T + self.weights[1])
        return hidden

    def gradient(self, seen: Reals, actions: Actions, slope: Reals) -> list[Reals]:
        """Returns the gradient of ``sum(slope * value of action)`` by every weight."""
        hidden = self._hidden(seen)
        back = np.zeros((len(seen), len(self.weights[3])), dtype=self.weights[0].dtype)
        back[np.arange(len(seen)), actions] = slope
        inner = (back @ self.weights[2]) * (1 - np.square(hidden))
        return [inner.T @ seen, inner.sum(0), back.T @ hidden, back.sum(0)]

    def copy(self) -> _Values:
        return _Values([weight.copy() for weight in self.weights])


def values_of(model: nn.Module) -> _Values:
    """Returns a network in NumPy.

    Raises:
        TypeError: The model is no `QNetwork`.
    """
    if not isinstance(model, QNetwork):
        raise TypeError(f"expected a Q-network, got {type(model).__name__}")
    return _Values([p.detach().cpu().numpy().copy() for p in model.parameters()])


def q_learning(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    pace: Pace,
    *,
    game: Game,
    discount: float = 0.97,
    worlds: int = 16,
    explore: float = 0.3,
    batch: int = 64,
    warm: int = 8,
    refresh: int = 25,
    spread: float = 6.0,
    goal: float = -1.0,
) -> None:
    """A client's round: double Q-learning with replay on the client's own machine, from the shared network.

    The replay memory is made anew in every round: between rounds a client keeps nothing.

    Args:
        model: A `QNetwork`; moved in place.
        inputs: The client's machines, shape ``(n, constants)``, n >= 1; games are shared out among them.
        targets: Not used; a machine has no class.
        pace: Steps (in each, every game moves once and the network takes one step), Adam's rate, and the seed.
        game: What is played.
        discount: Of a step.
        worlds: Games that a client plays side by side.
        explore: Probability of a random action.
        batch: Remembered moves in each step.
        warm: Moves of each game before the first step.
        refresh: Steps between two copies of the network to the target network.
        spread: Half of the games begin at states so many times as far from the middle as gymnasium's.
        goal: Signal at the end of an episode: -1 where the end is to be avoided, +1 where it is to be reached.
    """
    chance = np.random.Generator(np.random.PCG64(pace.seed))
    machines = inputs.cpu().double().numpy()
    physics = machines[np.arange(worlds) % len(machines)]
    values = values_of(model)
    frozen = values.copy()
    first = [np.zeros_like(weight) for weight in values.weights]
    second = [np.zeros_like(weight) for weight in values.weights]
    size = (pace.steps + warm) * worlds
    kind = values.weights[0].dtype
    before, after = np.empty((size, game.inputs), kind), np.empty((size, game.inputs), kind)
    taken, ended, shaped = np.empty(size, np.int64), np.empty(size, bool), np.zeros(size, kind)
    wide = np.where(np.arange(worlds) % 2 == 0, 1.0, spread)[:, None]
    states = game.start(worlds, chance) * wide
    for step in range(pace.steps + warm):
        here = slice(step * worlds, (step + 1) * worlds)
        seen = game.seen(states)
        random = chance.random(worlds) < explore
        actions = np.where(random, chance.integers(0, game.actions, worlds), values(seen).argmax(1))
        moved, over = game.step(states, actions, physics)
        before[here], after[here], taken[here], ended[here] = seen, game.seen(moved), actions, over
        # Shaping by a potential leaves the best policy what it was (Ng, Harada & Russell 1999).
        shaped[here] = discount * np.where(over, 0.0, game.potential(moved)) - game.potential(states)
        # Now and then an episode ends without a fall, so that not all of them grow old in one place.
        again = over | (chance.random(worlds) < 0.005)
        states = np.where(again[:, None], game.start(worlds, chance) * wide, moved)
        if step < warm:
            continue
        rows = chance.integers(0, (step + 1) * worlds, batch)
        best = values(after[rows]).argmax(1)
        ahead = kind.type(discount) * frozen(after[rows])[np.arange(batch), best]
        wanted = np.where(ended[rows], kind.type(goal), ahead) + shaped[rows]
        error = values(before[rows])[np.arange(batch), taken[rows]] - wanted
        count = step - warm + 1
        slopes = values.gradient(before[rows], taken[rows], np.clip(error, -1, 1) / batch)
        for weight, mean, square, slope in zip(values.weights, first, second, slopes, strict=True):
            mean += 0.1 * (slope - mean)
            square += 0.001 * (np.square(slope) - square)
            weight -= pace.lr * (mean / (1 - 0.9**count)) / (np.sqrt(square / (1 - 0.999**count)) + 1e-8)
        if count % refresh == 0:
            frozen = values.copy()
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), values.weights, strict=True):
            parameter.copy_(torch.from_numpy(weight))


def returns(model: nn.Module, physics: Tensor, *, game: Game, seed: int = 0) -> Floats:
    """Plays one greedy episode on each machine; returns their returns, shape ``(n,)``.

    Args:
        model: A `QNetwork`.
        physics: Machines, shape ``(n, constants)``.
        game: What is played.
        seed: Of the first states.
    """
    values = values_of(model)
    machines = physics.cpu().double().numpy()
    chance = np.random.Generator(np.random.PCG64(seed))
    states, playing = game.start(len(machines), chance), np.ones(len(machines), dtype=bool)
    total = np.zeros(len(machines))
    for _ in range(game.limit):
        states, over = game.step(states, values(game.seen(states)).argmax(1), machines)
        # In gymnasium the step that ends CartPole still returns 1, and the one that ends Acrobot 0.
        total += np.where(playing & (~over | (game.reward > 0)), game.reward, 0.0)
        playing &= ~over
        if not playing.any():
            break
    return total


def figures(model: nn.Module, inputs: Tensor, targets: Tensor, *, game: Game) -> dict[str, float]:
    """Returns the mean return of one greedy episode on each machine of a test set (first: the headline), and the worst.

    Args:
        model: A `QNetwork`.
        inputs: Machines, shape ``(N, constants)``.
        targets: Not used.
        game: What is played.
    """
    found = returns(model, inputs, game=game)
    return {"return": float(found.mean()), "worst_return": float(found.min())}


def machines(game: Game, count: int, seed: int) -> Tensor:
    """Returns machines whose constants are drawn uniformly from the public ranges, shape ``(count, constants)``."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.tensor([low for low, _ in game.ranges.values()])
    high = torch.tensor([high for _, high in game.ranges.values()])
    return low + (high - low) * torch.rand((count, len(low)), generator=generator)


def _data(game: Game) -> tuple[Dataset[Any], Dataset[Any]]:
    """200 machines for the clients, and 100 others that no client has."""
    sets = [machines(game, count, seed) for count, seed in ((MACHINES, 1), (UNSEEN, UNSEEN_SEED))]
    train, test = (TensorDataset(one, torch.zeros(len(one), dtype=torch.int64)) for one in sets)
    return train, test


def _synthetic(shape: Shape, count: int, generator: torch.Generator, *, game: Game) -> tuple[Tensor, Tensor]:
    seed = int(torch.randint(2**31, (1,), generator=generator))
    return machines(game, count, seed), torch.zeros(count, dtype=torch.int64)


# Every client in every round: with 200 of them, what chance would save is less than what it would waste.
_EVERYBODY: Final[dict[str, float | int | str]] = {
    "unit": "client",
    "clients": MACHINES,
    "epsilon": 8.0,
    "client-rate": 1.0,
    "sample-rate": 1.0,
}


def _task(
    name: str, game: Game, summary: str, rule: Callable[..., None], defaults: dict[str, float | int | str]
) -> Task:
    return Task(
        name=name,
        summary=summary,
        record="one machine: its physics and everything that is played on it",
        data=functools.partial(_data, game),
        shape=Shape(inputs=(len(game.ranges),), classes=2),
        declared_records=MACHINES,
        build=functools.partial(QNetwork, game=game),
        local=functools.partial(rule, game=game),
        evaluate=functools.partial(figures, game=game),
        synthetic=functools.partial(_synthetic, game=game),
        defaults={**_EVERYBODY, **defaults},
    )


GAMES: Final[dict[str, Game]] = {"cartpole-dqn": CartPole(), "acrobot-dqn": Acrobot()}

TASKS = (
    _task(
        "cartpole-dqn",
        GAMES["cartpole-dqn"],
        "deep Q-learning on gymnasium's CartPole; every client's machine has its own physics",
        q_learning,
        {"rounds": 10, "steps-per-round": 100, "l2-clip": 0.7, "lr": 0.005, "schedule": "cosine"},
    ),
    _task(
        "acrobot-dqn",
        GAMES["acrobot-dqn"],
        "deep Q-learning on gymnasium's Acrobot; every client's machine has its own physics",
        functools.partial(q_learning, goal=1.0, discount=0.98, spread=10.0),
        {"rounds": 20, "steps-per-round": 300, "l2-clip": 0.7, "lr": 0.003, "schedule": "cosine"},
    ),
)
