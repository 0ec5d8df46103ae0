"""Game agents: our physics are gymnasium's, the gradient is autograd's, a client learns, figures are gymnasium's."""

import copy

import gymnasium
import numpy as np
import pytest
import torch

from models.catalog import TASKS
from models.games import GAMES, machines, returns, values_of
from models.task import Pace

NAMES = ("cartpole-dqn", "acrobot-dqn")


def made(game, physics):
    env = gymnasium.make(game.name)
    game.configure(env.unwrapped, physics.double().numpy())
    return env


def agent(name, seed=0):
    model = TASKS[name].fresh(TASKS[name].shape, seed)
    with torch.no_grad():
        model.value.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_every_state_is_gymnasiums_on_machines_of_any_physics(name):
    game, chance = GAMES[name], np.random.default_rng(0)
    some = machines(game, 8, seed=5)
    envs = [made(game, one) for one in some]
    for index, env in enumerate(envs):
        env.reset(seed=index)
    states = np.stack([np.asarray(env.unwrapped.state, dtype=np.float64) for env in envs])
    done = np.zeros(8, dtype=bool)
    for _ in range(60):
        actions = chance.integers(0, game.actions, 8)
        states, over = game.step(states, actions, some.double().numpy())
        for index, env in enumerate(envs):
            if not done[index]:
                seen, _, ended, _, _ = env.step(int(actions[index]))
                assert np.allclose(states[index], env.unwrapped.state, atol=1e-6)
                assert bool(over[index]) == ended
                if name == "acrobot-dqn":
                    assert np.allclose(game.seen(states[index : index + 1])[0, :4], seen[:4], atol=1e-5)
        done |= over
    assert name == "acrobot-dqn" or done.any()


def test_planted_bug_machines_with_one_physics_for_all_are_caught():
    game = GAMES["cartpole-dqn"]
    some = machines(game, 2, seed=5)
    env = gymnasium.make(game.name)
    env.reset(seed=0)
    start = np.asarray(env.unwrapped.state)[None]
    env.step(1)
    moved, _ = game.step(start, np.array([1]), some[:1].double().numpy())
    assert not np.allclose(moved[0], env.unwrapped.state, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_returns_are_those_of_gymnasiums_own_episodes(name):
    game, model = GAMES[name], agent(name)
    some = machines(game, 5, seed=9)
    found = returns(model, some, game=game, seed=3)
    starts = game.start(5, np.random.Generator(np.random.PCG64(3)))
    for index, one in enumerate(some):
        env = made(game, one)
        env.reset(seed=0)
        env.unwrapped.state = starts[index].copy()
        state, total, over = starts[index], 0.0, False
        while not over:
            action = int(values_of(model)(game.seen(state[None])).argmax(1)[0])
            _, reward, ended, cut, _ = env.step(action)
            state, total, over = np.asarray(env.unwrapped.state, dtype=np.float64), total + reward, ended or cut
        assert total == found[index]


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_autograds_and_the_values_are_the_networks(name):
    game, model = GAMES[name], agent(name).double()
    seen = torch.randn(12, game.inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actions, slope = np.arange(12) % game.actions, np.linspace(-1, 1, 12)
    values = values_of(model)
    assert np.allclose(values(seen.numpy()), model(seen).detach().numpy())
    chosen = model(seen)[torch.arange(12), torch.from_numpy(actions)]
    wanted = torch.autograd.grad((chosen * torch.from_numpy(slope)).sum(), list(model.parameters()))
    found = values.gradient(seen.numpy(), actions, slope)
    assert all(np.allclose(a, b.numpy()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_round_depends_on_its_seed_and_on_the_machine_and_on_nothing_else(name):
    task = TASKS[name]
    one, other = machines(GAMES[name], 2, seed=1).split(1)

    def moved(machine, seed):
        model = agent(name)
        pace = Pace(steps=5, sample_rate=1.0, lr=0.01, batch=8, seed=seed)
        task.local(model, machine, torch.zeros(1, dtype=torch.int64), pace)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(moved(one, 1), moved(one, 1))
    assert not torch.equal(moved(one, 1), moved(one, 2))
    assert not torch.equal(moved(one, 1), moved(other, 1))


def test_a_client_alone_learns_to_hold_its_pole():
    task = TASKS["cartpole-dqn"]
    model, machine = task.fresh(task.shape, 0), machines(GAMES["cartpole-dqn"], 1, seed=1)
    before = task.figures(copy.deepcopy(model), machine, torch.zeros(1))["return"]
    for seed in range(5):
        pace = Pace(steps=300, sample_rate=1.0, lr=0.005, batch=8, seed=seed)
        task.local(model, machine, torch.zeros(1, dtype=torch.int64), pace)
    assert before < 20
    assert task.figures(model, machine, torch.zeros(1))["return"] > 100


def test_unseen_machines_are_nobodys():
    train, test = TASKS["cartpole-dqn"].data()
    have = {tuple(machine.tolist()) for machine, _ in train}
    assert len(have) == 200
    assert not have & {tuple(machine.tolist()) for machine, _ in test}
