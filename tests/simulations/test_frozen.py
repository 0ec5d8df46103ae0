"""A task with a frozen layer through both apps: what travels, what both sides make by themselves, and what it is for.

The job runs as any other does. Watchers note every message as it leaves, the client's model at every training call and
the server's at every evaluation; `require_frozen` compares them with what the public seed makes.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from clients import app as clients_app
from models.catalog import TASKS
from models.shape import Shape
from models.task import Task
from privacy.dpsgd import PrivateTrainer
from privacy.errors import RunError
from privacy.wire import read_float32
from server import app as server_app
from server.checkpoint import load
from simulations import apps, engine
from simulations import world as world_module
from simulations.run import simulate
from simulations.scenario import Scenario

SHAPE = Shape(inputs=(1, 8, 8), classes=10)
SEED = 5
CLIENTS, ROUNDS = 3, 2
FROZEN = {"1.weight", "1.bias", "3.bias"}
TRAINABLE = {"3.weight", "5.weight", "5.bias"}


def build(shape):
    """A random projection that stays as it is, a layer of which the bias does, and a head."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, shape.classes)
    )
    for name in FROZEN:
        model.get_parameter(name).requires_grad_(False)
    return model


TASK = dataclasses.replace(TASKS["digits"], name="projected digits", build=build)


@pytest.fixture(autouse=True)
def _no_models_of_other_tests(monkeypatch):
    # A process keeps its last model; one that a planted bug spoilt must not reach the next test.
    monkeypatch.setattr(clients_app, "_workers", {})


class Quiet:
    """Watches nothing."""

    def __getattr__(self, name):
        return lambda *_: None


@dataclasses.dataclass
class Seen:
    """What the watchers saw."""

    requests: list = dataclasses.field(default_factory=list)
    replies: list = dataclasses.field(default_factory=list)
    before_training: list = dataclasses.field(default_factory=list)
    after_training: list = dataclasses.field(default_factory=list)
    at_server: list = dataclasses.field(default_factory=list)
    metrics: list = dataclasses.field(default_factory=list)
    models: list = dataclasses.field(default_factory=list)
    checkpoint: bytes = b""


def frozen_of(model):
    return {name: model.get_parameter(name).detach().cpu().numpy().copy() for name in FROZEN}


def carry_out(folder, monkeypatch, mode="hooks", task=TASK):
    """Runs the job on the local engine and returns what was seen of it."""
    seen = Seen()
    monkeypatch.setattr(world_module, "find_task", lambda name: task)
    train, evaluate, exchange = PrivateTrainer.train, server_app.evaluate, engine.LocalGrid.send_and_receive

    def watched_train(self, *args, **kwargs):
        seen.before_training.append(frozen_of(self._clipper.model))
        result = train(self, *args, **kwargs)
        seen.after_training.append(frozen_of(self._clipper.model))
        return result

    def watched_evaluate(job, model, arrays):
        seen.models.append({name: value.copy() for name, value in arrays.items()})
        seen.metrics.append(evaluate(job, model, arrays))
        seen.at_server.append(frozen_of(model))
        return seen.metrics[-1]

    def watched_exchange(self, messages, *, timeout=None):
        sent = list(messages)
        seen.requests += [message.content for message in sent]
        replies = exchange(self, sent, timeout=timeout)
        seen.replies += [reply.content for reply in replies if not reply.has_error()]
        return replies

    monkeypatch.setattr(PrivateTrainer, "train", watched_train)
    monkeypatch.setattr(server_app, "evaluate", watched_evaluate)
    monkeypatch.setattr(engine.LocalGrid, "send_and_receive", watched_exchange)
    keys = {"clients": CLIENTS, "rounds": ROUNDS, "steps-per-round": 1, "mode": mode, "seed": SEED, "lr": 0.5}
    simulate(Scenario.layered(None, keys), out=folder, observer=Quiet())
    seen.checkpoint = (folder / server_app.CHECKPOINT).read_bytes()
    seen.models.append(load(folder / server_app.CHECKPOINT).model)
    return seen


def metrics_with(frozen_seed, trained):
    """Evaluates by hand, on the public test set, with frozen parameters from a seed."""
    model = TASK.fresh(SHAPE, frozen_seed)
    parameters = dict(model.named_parameters())
    source = world_module.load_source(TASK, data=None)
    with torch.no_grad():
        for name, value in trained.items():
            parameters[name].copy_(torch.from_numpy(value))
        outputs = model.eval()(source.test.inputs)
    return TASK.metrics(outputs, source.test.targets)


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def require_frozen(seen):
    """Fails where a frozen parameter travels, moves, differs between the two sides, or is not the one in use."""
    assert len(seen.requests) == len(seen.replies) == len(seen.before_training) == CLIENTS * ROUNDS
    assert len(seen.metrics) == ROUNDS
    made = frozen_of(TASK.fresh(SHAPE, SEED))
    # Biases of zeros, say, would be equal whatever made them.
    assert all(value.std() > 0 for value in made.values())

    for content in (*seen.requests, *seen.replies):
        assert set(content["arrays"]) == TRAINABLE, "frozen parameters travel"
    assert all(set(model) == TRAINABLE for model in seen.models), "a checkpoint or model holds frozen parameters"
    for value in made.values():
        assert value.tobytes() not in seen.checkpoint
        assert not any(
            value.tobytes() in array.data for content in seen.requests for array in content["arrays"].values()
        )

    assert all(equal(made, there) for there in seen.at_server), "the server's frozen layer is not the seed's"
    assert all(equal(made, there) for there in seen.before_training), "a client's frozen layer is not the seed's"
    assert all(equal(made, there) for there in seen.after_training), "training moved the frozen layer"

    # The trainable ones did move, in every round and at every client.
    sent = [{n: read_float32(a.data, tuple(a.shape), n) for n, a in c["arrays"].items()} for c in seen.requests]
    returned = [{n: read_float32(a.data, tuple(a.shape), n) for n, a in c["arrays"].items()} for c in seen.replies]
    for before, after in zip(sent, returned, strict=True):
        assert not any(np.array_equal(before[name], after[name]) for name in TRAINABLE), "nothing was trained"

    *evaluated, final = seen.models
    assert equal(evaluated[-1], final)
    for metrics, model in zip(seen.metrics, evaluated, strict=True):
        # Batches of another size add floats in another order; another projection changes the second digit.
        assert metrics == pytest.approx(metrics_with(SEED, model), rel=1e-5), "evaluation uses another frozen layer"
        assert metrics != pytest.approx(metrics_with(SEED + 1, model), rel=1e-2)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "functorch"])
def test_a_frozen_layer_never_travels_never_moves_and_is_used_on_both_sides(tmp_path, monkeypatch, mode):
    require_frozen(carry_out(tmp_path / "run", monkeypatch, mode))


# -- planted bugs -------------------------------------------------------------------------------------------------


class FromAnotherSeed(Task):
    """Makes its models from another seed than it is told."""

    def fresh(self, shape, seed):
        return super().fresh(shape, seed + 1)


def astray(task):
    return FromAnotherSeed(**{field.name: getattr(task, field.name) for field in dataclasses.fields(task)})


def server_builds_from_another_seed(monkeypatch):
    job_of = apps.job_of

    def wrong(world, session):
        job = job_of(world, session)
        return dataclasses.replace(job, task=astray(job.task))

    monkeypatch.setattr(apps, "job_of", wrong)


def client_builds_from_another_seed(monkeypatch):
    parse = clients_app.parse_request
    monkeypatch.setattr(
        clients_app, "parse_request", lambda message: dataclasses.replace(parse(message), seed=SEED + 1)
    )


def training_moves_it(monkeypatch):
    train = PrivateTrainer.train

    def moving(self, *args, **kwargs):
        with torch.no_grad():
            self._clipper.model.get_parameter("1.bias").add_(1e-3)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(PrivateTrainer, "train", moving)


def evaluation_uses_another_model(monkeypatch):
    evaluate = server_app.evaluate
    monkeypatch.setattr(
        server_app, "evaluate", lambda job, model, arrays: evaluate(job, job.task.fresh(job.shape, 99), arrays)
    )


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (server_builds_from_another_seed, "server's frozen layer"),
        (client_builds_from_another_seed, "client's frozen layer"),
        (training_moves_it, "client's frozen layer|training moved"),
        (evaluation_uses_another_model, "evaluation uses another"),
    ],
)
def test_planted_bug_a_frozen_layer_that_differs_somewhere_is_noticed(tmp_path, monkeypatch, plant, words):
    plant(monkeypatch)
    seen = carry_out(tmp_path / "run", monkeypatch)
    with pytest.raises(AssertionError, match=words):
        require_frozen(seen)


def test_planted_bug_a_layer_that_both_sides_forget_to_freeze_is_seen_to_travel(tmp_path, monkeypatch):
    forgetful = dataclasses.replace(TASK, build=lambda shape: build(shape).requires_grad_(True))
    seen = carry_out(tmp_path / "run", monkeypatch, task=forgetful)
    with pytest.raises(AssertionError, match="frozen parameters travel"):
        require_frozen(seen)


def test_planted_bug_a_server_that_sends_frozen_parameters_is_refused_by_the_clients(tmp_path, monkeypatch):
    def everything(model):
        return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}

    monkeypatch.setattr(server_app, "trainable", everything)
    with pytest.raises(RunError, match="expected the parameters"):
        carry_out(tmp_path / "run", monkeypatch)
