"""A task's own local rule (G16): whatever it does, one clipped update of the usual length leaves."""

import dataclasses

import numpy as np
import pytest
import torch

import clients.plain
from clients.plain import PlainTrainer, check_unit
from clients.records import Records
from models.catalog import TASKS
from models.ratings import SHAPE as RATINGS
from models.shape import Shape
from models.task import Task
from privacy.errors import PlanError
from privacy.noise import Keystream
from privacy.plan import Local, Optimizer, Plan, Unit
from simulations.scenario import Scenario
from simulations.world import settle

SHAPE = Shape(inputs=(1, 8, 8), classes=10)


def towards(by):
    """Returns a rule that adds a number to every parameter in each step."""

    def rule(model, inputs, targets, pace):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(by * pace.lr * pace.steps)

    return rule


def break_shapes(model, inputs, targets, pace):
    next(model.parameters()).data = torch.zeros(len(inputs))


def fail(model, inputs, targets, pace):
    raise RuntimeError("a private number: 4711")


def task_of(rule) -> Task:
    return dataclasses.replace(TASKS["digits"], name="ruled", local=rule)


def plan(**changes):
    fields = {
        "unit": Unit.CLIENT,
        "sample_rate": 1.0,
        "expected_batch": 20.0,
        "client_rate": 0.2,
        "l2_clip": 0.5,
        "noise_multiplier": 2.0,
        "steps": 2,
        "rounds": 4,
        "joins": 4,
        "turns": 3,
        "epsilon": 50.0,
        "delta": 1e-5,
        "records_bound": 1000,
        "physical_batch": 16,
    }
    return Plan(**fields | changes)


def records(n=4):
    return Records(torch.rand(n, *SHAPE.inputs), torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool))


def update_of(rule, *, clip=0.5, given=None, simulated=False, local=None):
    task = task_of(rule)
    trainer = PlainTrainer(task.fresh(SHAPE, 1), task, plan=plan(), local=local or Local(lr=0.5))
    start = torch.cat([p.detach().flatten() for p in task.fresh(SHAPE, 1).parameters()])
    return trainer.update(start, given or records(), Keystream(), lr=0.5, clip=clip, simulated=simulated)


def test_a_rule_moves_the_model_by_the_pace_it_is_given():
    assert np.allclose(update_of(towards(0.25), clip=1e6), 0.25 * 0.5 * 2, atol=1e-6)


def require_bounded(rule):
    """Fails where what a rule did leaves unclipped, in another shape, or not at all."""
    sent = update_of(rule)
    assert (sent.shape, sent.dtype) == ((650,), np.float32)
    assert np.isfinite(sent).all()
    assert np.linalg.norm(sent.astype(np.float64)) <= 0.5 * (1 + 1e-6), "a rule went beyond the clip"


@pytest.mark.parametrize(
    "rule", [towards(1e-6), towards(1e30), towards(float("nan")), towards(float("inf")), break_shapes, fail]
)
def test_g16_whatever_a_rule_does_the_update_is_clipped_and_of_the_same_length(rule):
    require_bounded(rule)


def test_g16_planted_bug_a_rule_whose_outcome_is_not_clipped_is_caught(monkeypatch):
    monkeypatch.setattr(clients.plain, "clip_update", lambda update, clip: (update.astype(np.float64), True))
    with pytest.raises(AssertionError, match="beyond the clip"):
        require_bounded(towards(1.0))


def test_a_rules_fault_is_the_experimenters_in_a_simulation():
    with pytest.raises(RuntimeError):
        update_of(fail, simulated=True)
    with pytest.raises(ValueError, match="shapes"):
        update_of(break_shapes, simulated=True)


def test_a_rule_sees_valid_records_only_and_a_client_without_any_stays_where_it_is():
    seen = []

    def count(model, inputs, targets, pace):
        seen.append(len(inputs))
        towards(1.0)(model, inputs, targets, pace)

    some = records()
    some.valid[1:] = False
    update_of(count, given=some)
    some.valid[:] = False
    assert not update_of(count, given=some).any()
    assert seen == [1]


def test_what_a_rule_leaves_in_the_model_does_not_reach_the_next_client():
    seen = []

    def remember(model, inputs, targets, pace):
        seen.append(getattr(model, "memory", None))
        model.memory = inputs

    task = task_of(remember)
    trainer = PlainTrainer(task.fresh(SHAPE, 1), task, plan=plan(), local=Local(lr=0.5))
    start = torch.cat([p.detach().flatten() for p in task.fresh(SHAPE, 1).parameters()])
    for _ in range(2):
        trainer.update(start, records(), Keystream(), lr=0.5, clip=0.5, simulated=True)
    assert seen == [None, None]


def test_a_rule_that_does_not_run_fails_in_the_rehearsal():
    task = task_of(fail)
    trainer = PlainTrainer(task.fresh(SHAPE, 1), task, plan=plan(), local=Local(lr=0.5))
    with pytest.raises(PlanError, match="expected the model to run"):
        trainer.rehearse(lambda count: task.synthetic(SHAPE, count, torch.Generator()))


@pytest.mark.parametrize("knob", [{"momentum": 0.9}, {"weight_decay": 0.1}, {"optimizer": Optimizer.ADAM}])
def test_a_knob_that_a_rule_would_ignore_is_refused(knob):
    with pytest.raises(PlanError, match="a rule of its own"):
        update_of(towards(1.0), local=Local(lr=0.5, **knob))


def test_g16_a_rule_is_refused_in_a_plan_that_protects_records():
    check_unit(TASKS["digits"], Unit.RECORD)
    with pytest.raises(PlanError, match="unit client"):
        check_unit(task_of(towards(1.0)), Unit.RECORD)
    with pytest.raises(PlanError, match="unit client"):
        settle(Scenario(unit="record").resolved(1437), task_of(towards(1.0)), SHAPE)


def test_a_task_may_judge_a_whole_test_set_by_itself():
    judged = dataclasses.replace(TASKS["digits"], evaluate=lambda model, inputs, targets: {"sum": inputs.sum()})
    inputs, targets = torch.ones(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
    assert judged.figures(judged.fresh(SHAPE, 0), inputs, targets) == {"sum": 192.0}
    assert set(TASKS["digits"].figures(judged.fresh(SHAPE, 0), inputs, targets)) == {"accuracy", "loss", "macro_f1"}


# -- G17: what a recommender's client sends ----------------------------------------------------------------------------


def sent_after(count, rule=None):
    """Returns what the client of a user with so many ratings sends, and the number of its films' parameters."""
    task = TASKS["movielens-mf"]
    task = task if rule is None else dataclasses.replace(task, local=rule)
    model = task.fresh(RATINGS, 1)
    inputs, targets = task.synthetic(RATINGS, count, torch.Generator().manual_seed(count))
    trainer = PlainTrainer(model, task, plan=plan(), local=Local(lr=0.5))
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    given = Records(inputs, targets, torch.ones(count, dtype=torch.bool))
    sent = trainer.update(start, given, Keystream(), lr=0.5, clip=0.5, simulated=rule is not None)
    return sent, sum(p.numel() for p in model.parameters())


def test_g17_a_users_update_is_as_long_whatever_and_however_much_was_rated():
    for count in (0, 1, 300):
        sent, size = sent_after(count)
        assert sent.shape == (size,)
        assert np.linalg.norm(sent) <= 0.5 * (1 + 1e-6)
        assert bool(sent.any()) == (count > 0)


def test_g17_planted_bug_a_rule_that_sends_rated_films_only_is_stopped_at_the_client():
    def sparse(model, inputs, targets, pace):
        TASKS["movielens-mf"].local(model, inputs, targets, pace)
        model.bias.data = model.bias.data[inputs[:, 0].long().unique()]

    with pytest.raises(ValueError, match="shapes"):
        sent_after(30, sparse)
