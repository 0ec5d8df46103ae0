"""Recommenders: the user's part is a ridge regression, the shared part is dense (G17), figures are the usual ones."""

import copy
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import ndcg_score

from models.catalog import TASKS
from models.ratings import FILMS, MIDDLE, SHAPE, Part, figures, item_mean_rmse, ranking, solve_and_descend, stars
from models.task import Pace

NAMES = ("movielens-mf", "movielens-ncf", "movielens-context")
PACE = Pace(steps=1, sample_rate=1.0, lr=0.1, batch=8, seed=0)


def ratings(count=30, seed=0, name="movielens-mf"):
    return TASKS[name].synthetic(SHAPE, count, torch.Generator().manual_seed(seed))


def model_of(name):
    model = TASKS[name].fresh(SHAPE, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_users_part_is_scikit_learns_ridge_regression(name):
    model, (inputs, targets) = model_of(name), ratings()
    offset, features = (part.detach().double().numpy() for part in model.shared(inputs))
    # scikit-learn has one penalty for all weights: features over the root of theirs have weights times it.
    root = np.sqrt(model.penalty)
    wanted = Ridge(alpha=1.0, fit_intercept=False).fit(features / root, stars(targets).numpy() - MIDDLE - offset)
    assert np.allclose(model.own(inputs, targets).numpy(), wanted.coef_ / root, atol=1e-4)
    assert not model.own(inputs[:0], targets[:0]).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_round_descends_the_error_with_the_users_part_solved_away(name):
    model, (inputs, targets) = model_of(name), ratings()

    def error(of):
        own = of.own(inputs, targets)
        penalty = (torch.tensor(of.penalty) * own**2).sum()
        return float((((stars(targets) - of.predict(inputs, own)) ** 2).double().sum() + penalty).detach()) / 2

    before = error(model)
    moved = copy.deepcopy(model)
    solve_and_descend(moved, inputs, targets, Pace(steps=1, sample_rate=1.0, lr=1e-3, batch=8, seed=0))
    step = sum(
        float(((a - b) ** 2).sum().detach()) for a, b in zip(moved.parameters(), model.parameters(), strict=True)
    )
    # By the envelope theorem the gradient is that of the penalised error: a small step gains its squared norm / lr.
    assert error(moved) - before == pytest.approx(-step / 1e-3, rel=0.1)


def test_several_users_of_one_client_are_solved_each_alone():
    (one, a), (other, b) = ratings(20, 1), ratings(20, 2)
    other[:, 1] = 7.0
    together = model_of("movielens-mf")
    start = copy.deepcopy(together)
    solve_and_descend(together, torch.cat([one, other]), torch.cat([a, b]), PACE)
    apart = [copy.deepcopy(start), copy.deepcopy(start)]
    solve_and_descend(apart[0], one, a, PACE)
    solve_and_descend(apart[1], other, b, PACE)
    wanted = apart[0].factors + apart[1].factors - start.factors
    assert torch.allclose(together.factors, wanted, atol=1e-5)


def test_ranking_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores, liked = torch.rand(50, generator=generator), torch.rand(50, generator=generator) < 0.2
        ndcg, hit = ranking(scores, liked)
        assert ndcg == pytest.approx(ndcg_score(liked[None].numpy(), scores[None].numpy(), k=10))
        assert hit == float(liked[scores.argsort(descending=True)[:10]].any())


def test_the_figures_of_a_tiny_test_set_are_those_worked_out_by_hand():
    model = TASKS["movielens-mf"].fresh(SHAPE, 0)
    with torch.no_grad():
        model.factors.zero_()
        model.bias.zero_()
        model.bias[:3] = torch.tensor([1.0, 0.5, 2.0])
    rows = torch.zeros(6, *SHAPE.inputs)
    rows[:, 0] = torch.tensor([0.0, 1.0, 2.0, 0.0, 2.0, 1.0])
    rows[:3, 2], rows[4:, 2] = Part.FILM, Part.HELD_OUT
    targets = torch.tensor([0, 0, 0, 3, 4, 1])
    # The one known rating is 4 of film 0, 0.5 below 3.5 + 1: own = -0.5 / (1 + 5). Film 2 is cut to 5 stars.
    found = figures(model, rows, targets)
    second = 3.5 + 0.5 - 0.5 / 6
    assert found["rmse"] == pytest.approx(math.sqrt(((5 - 5) ** 2 + (second - 2) ** 2) / 2), abs=1e-5)
    # Film 0 was seen, so the list is 2, 1; film 2 was liked.
    assert (found["ndcg_at_10"], found["hit_rate_at_10"]) == (1.0, 1.0)
    assert item_mean_rmse(rows, targets) == pytest.approx(math.sqrt(((4 - 5) ** 2 + (4 - 2) ** 2) / 2))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_ratings_judges_each_row_alone(name):
    model, (inputs, _) = model_of(name), ratings(4)
    before = model(inputs)
    inputs[2] = 17.0
    assert torch.equal(before[[0, 1, 3]], model(inputs)[[0, 1, 3]])
    assert not list(model.buffers())


# -- G17 --------------------------------------------------------------------------------------------------------------


def update_of(model, inputs, targets, rule=solve_and_descend):
    """Returns a client's update as it would be sent, unclipped."""
    moved = copy.deepcopy(model)
    rule(moved, inputs, targets, PACE)
    pairs = zip(moved.parameters(), model.parameters(), strict=True)
    return [(a - b).detach() for a, b in pairs]


def require_dense(model, rule=solve_and_descend):
    """Fails where the shape of an update tells how many, or which, films a user rated."""
    few, many = ratings(1, 1), ratings(300, 2)
    shapes = [[tuple(part.shape) for part in update_of(model, *rated, rule)] for rated in (few, many)]
    assert shapes[0] == shapes[1], "an update's shape depends on what was rated"
    assert shapes[0][0] == (FILMS,)


@pytest.mark.parametrize("name", NAMES)
def test_g17_an_update_is_dense_and_has_the_same_shape_whatever_was_rated(name):
    require_dense(model_of(name))


def test_g17_planted_bug_an_update_of_rated_films_only_is_caught():
    def sparse(model, inputs, targets, pace):
        solve_and_descend(model, inputs, targets, pace)
        model.bias.data = model.bias.data[inputs[:, 0].long().unique()]

    def sent(model, inputs, targets, rule):
        moved = copy.deepcopy(model)
        rule(moved, inputs, targets, PACE)
        return list(moved.parameters())

    model = model_of("movielens-mf")
    shapes = {tuple(sent(model, *ratings(n, n), sparse)[0].shape) for n in (1, 300)}
    assert len(shapes) == 2
    with pytest.raises((AssertionError, RuntimeError)):
        require_dense(model, sparse)
