"""The server: whose turn it is, what it believes of a reply, how updates meet, and what it keeps."""

import dataclasses
import json
import os
import random

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients.app import client_app
from clients.holder import Holder, Kept, SecureSources
from clients.records import Records
from models.catalog import TASKS
from models.shape import Shape
from privacy.accounting import Grant, solve_noise
from privacy.errors import PlanError, RunError
from privacy.identity import Secret, verify
from privacy.ledger import Book, ChargeRequest
from privacy.plan import Local, Mode, Plan
from privacy.vault import Safe
from privacy.wire import request_digest
from server.aggregate import Aggregator, Strategy
from server.app import CHECKPOINT, METRICS, RECEIPTS, Ending, Job, Schedule, joins_of, run, trainable, turns
from server.checkpoint import State, load, save
from simulations.engine import LocalGrid
from tests.apps.seeded import SeededSources

SHAPE = Shape(inputs=(1, 8, 8), classes=10)
TASK = TASKS["digits"]
CLIENTS, ROUNDS = 4, 3


@pytest.fixture(autouse=True)
def _identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


# -- turns ------------------------------------------------------------------------------------------------------


def require_turns(hands, clients, cohort):
    """Fails where a hand is not a cohort of different nodes, or a node is asked more often than its noise pays for."""
    joined = dict.fromkeys(range(1, clients + 1), 0)
    for hand in hands:
        assert len(set(hand)) == len(hand) == cohort
        for node in hand:
            joined[node] += 1
    most = joins_of(len(hands), clients, cohort)
    assert max(joined.values()) <= most, f"a node is asked {max(joined.values())} times, the noise is for {most}"


def hands_of(deal, clients, cohort, rounds):
    return [deal(range(1, clients + 1), cohort, 5, number) for number in range(1, rounds + 1)]


def fresh_random(nodes, cohort, seed, number):
    """Planted bug: a cohort drawn anew each round, as Flower's own strategies do."""
    return sorted(random.Random(f"{seed}/{number}").sample(list(nodes), cohort))


TURNS = [(10, 3, 40), (10, 10, 7), (7, 1, 30), (100, 33, 10), (5, 4, 9)]


@pytest.mark.parametrize(("clients", "cohort", "rounds"), TURNS)
def test_no_node_is_ever_asked_more_often_than_its_noise_was_solved_for(clients, cohort, rounds):
    require_turns(hands_of(turns, clients, cohort, rounds), clients, cohort)


# Where one client may join every round, no way to draw cohorts can be wrong.
@pytest.mark.parametrize(
    ("clients", "cohort", "rounds"),
    [(clients, cohort, rounds) for clients, cohort, rounds in TURNS if joins_of(rounds, clients, cohort) < rounds],
)
def test_planted_bug_a_fresh_random_cohort_each_round_asks_some_node_too_often(clients, cohort, rounds):
    hands = hands_of(fresh_random, clients, cohort, rounds)
    with pytest.raises(AssertionError, match="the noise is for"):
        require_turns(hands, clients, cohort)


def hands_of_a_job(folder, *, cohort, rounds):
    """Runs a job whose clients answer a word at no cost; returns whom the server asked, round by round."""
    job, _ = make_job(folder, cohort=cohort, rounds=rounds, min_replies=1, evaluate_every=rounds)
    hands = [[] for _ in range(rounds)]

    def busy(message, context):
        hands[message.content["job"]["round"] - 1].append(context.node_id)
        return Message(RecordDict({"refusal": ConfigRecord({"word": "unavailable"})}), reply_to=message)

    with LocalGrid(busy, nodes=CLIENTS, run_config={}) as grid:
        assert run(job, grid) is Ending.FINISHED
    return hands


def test_the_server_asks_no_node_more_often_than_its_noise_was_solved_for(tmp_path):
    require_turns(hands_of_a_job(tmp_path, cohort=1, rounds=12), CLIENTS, 1)


def test_planted_bug_a_server_that_draws_a_fresh_random_cohort_each_round_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr("server.app.turns", fresh_random)
    with pytest.raises(AssertionError, match="the noise is for"):
        require_turns(hands_of_a_job(tmp_path, cohort=1, rounds=12), CLIENTS, 1)


def test_turns_are_the_same_after_a_restart_and_differ_by_seed():
    nodes = range(1, 51)
    first = [turns(nodes, 5, 1, number) for number in range(1, 21)]
    assert first == [turns(nodes, 5, 1, number) for number in range(1, 21)]
    assert first != [turns(nodes, 5, 2, number) for number in range(1, 21)]


@pytest.mark.parametrize("schedule", list(Schedule))
def test_schedules_stay_within_zero_and_one_and_warm_up(schedule):
    factors = [schedule.factor(number, 20, 4) for number in range(1, 21)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:4] == sorted(factors[:4])
    assert factors[4] == 1.0
    assert factors[4:] == sorted(factors[4:], reverse=True)


# -- aggregation ------------------------------------------------------------------------------------------------


def arrays(seed):
    dice = np.random.default_rng(seed)
    return {
        "w": dice.standard_normal((3, 2)).astype(np.float32),
        "b": dice.standard_normal(3).astype(np.float32),
    }


def oracle(strategy, model, rounds, weights, lr, momentum):
    """The papers' formulas, in float64, one parameter at a time."""
    model = {name: value.astype(np.float64) for name, value in model.items()}
    first = {name: np.zeros_like(value) for name, value in model.items()}
    second = {name: np.zeros_like(value) for name, value in model.items()}
    for number, updates in enumerate(rounds, start=1):
        for name in model:
            mean = sum(w * u[name] for w, u in zip(weights, updates, strict=True)) / sum(weights)
            delta = mean - model[name]
            if strategy is Strategy.FEDAVGM:
                first[name] = momentum * first[name] + delta
                model[name] = model[name] + lr * first[name]
            elif strategy is Strategy.FEDADAM:
                first[name] = momentum * first[name] + (1 - momentum) * delta
                second[name] = 0.99 * second[name] + 0.01 * delta**2
                rate = lr * np.sqrt(1 - 0.99**number) / (1 - momentum**number)
                model[name] = model[name] + rate * first[name] / (np.sqrt(second[name]) + 1e-3)
            else:
                model[name] = model[name] + lr * delta
    return model


@pytest.mark.parametrize("strategy", list(Strategy))
def test_strategies_equal_their_papers_and_a_restart_in_between_changes_nothing(strategy, tmp_path):
    lr = 0.7 if strategy in (Strategy.FEDAVGM, Strategy.FEDADAM) else 1.0
    rounds = [[arrays(10 * number + client) for client in range(3)] for number in range(1, 5)]
    weights = [1.0, 2.5, 0.5]
    model, aggregator = arrays(0), Aggregator(strategy=strategy, lr=lr, momentum=0.8)
    for number, updates in enumerate(rounds):
        model = aggregator.step(model, list(zip(updates, weights, strict=True)))
        if number == 1:
            state = State(job="j", round=2, model=model, moments=aggregator.moments, updates=aggregator.updates)
            save(state, tmp_path / "c")
            state = load(tmp_path / "c")
            model = state.model
            aggregator = Aggregator(
                strategy=strategy, lr=lr, momentum=0.8, moments=state.moments, updates=state.updates
            )
    expected = oracle(strategy, arrays(0), rounds, weights, lr, 0.8)
    for name, value in model.items():
        # Four rounds of float32 sums of three numbers of size 1: a few units in the seventh digit.
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=2e-5)


def test_a_clients_word_never_sets_its_weight(tmp_path):
    def loud(reply, message, context):
        reply.content["metrics"] = MetricRecord({"num-examples": 10**6, "public-weight": 10**6})
        return reply

    models = []
    for number, change in enumerate((lambda reply, *_: reply, loud)):
        folder = tmp_path / str(number)
        folder.mkdir()
        job, book = make_job(folder, rounds=1)
        with LocalGrid(swapped(honest(book, folder, SeededSources()), change), nodes=CLIENTS, run_config={}) as grid:
            run(job, grid)
        models.append(load(folder / CHECKPOINT).model)
    assert all(np.array_equal(models[0][name], models[1][name]) for name in models[0])


# -- checkpoints ------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was_and_any_changed_byte_is_found(tmp_path):
    state = State(job="j" * 32, round=3, model=arrays(1), moments={"m": arrays(2)}, updates=3)
    state.witnesses, state.declined, state.spent = {1: "4:aa"}, [2], {"x": 1.5}
    path = tmp_path / "c"
    save(state, path)
    again = load(path)
    assert dataclasses.replace(again, model={}, moments={}) == dataclasses.replace(state, model={}, moments={})
    assert all(np.array_equal(again.model[name], value) for name, value in state.model.items())
    content = path.read_bytes()
    for position in range(len(content) - 1, len(content) - 40, -3):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(RunError, match="damaged"):
            load(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match="damaged"):
        load(path)


def test_a_full_disk_leaves_the_last_checkpoint_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "c"
    save(State(job="j", round=1, model=arrays(1)), path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        save(State(job="j", round=2, model=arrays(2)), path)
    assert load(path).round == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


# -- rounds -----------------------------------------------------------------------------------------------------


def make_job(folder, *, cohort=CLIENTS, min_replies=2, rounds=ROUNDS, epsilon=3.0, joins=None, **changes):
    joins = joins or rounds + 1
    folder.mkdir(parents=True, exist_ok=True)
    noise, order = solve_noise(epsilon=3.0, delta=1e-5, sample_rate=0.2, steps=joins)
    plan = Plan(
        sample_rate=0.2,
        expected_batch=7.0,
        l2_clip=1.0,
        noise_multiplier=noise,
        steps=1,
        rounds=rounds,
        joins=joins,
        epsilon=3.0,
        delta=1e-5,
        records_bound=1000,
        mode=Mode.HOOKS,
    )
    generator = torch.Generator().manual_seed(1)
    test = TASK.synthetic(SHAPE, 50, generator)
    job = Job(
        id="ab" * 16,
        plan=plan,
        local=Local(lr=0.5),
        task=TASK,
        shape=SHAPE,
        aggregator=Aggregator(),
        nodes=CLIENTS,
        cohort=cohort,
        seed=0,
        schedule=Schedule.CONSTANT,
        warmup=0,
        weights=lambda node: 1.0,
        min_replies=min_replies,
        timeout_s=None,
        evaluate_every=1,
        test=test,
        identity=Secret.load_or_create(folder / "server.key").identity("server"),
        folder=folder,
    )
    book = Book(folder / "ledgers")
    names = {f"c{node}": epsilon for node in range(1, CLIENTS + 1)}
    book.grant(
        {name: Grant(epsilon=e, delta=1e-5, order=order, records_bound=1000) for name, e in names.items()},
        population="test",
    )
    return dataclasses.replace(job, **changes), book


def honest(book, folder, sources=None):
    def find(context):
        node = context.node_id
        generator = torch.Generator().manual_seed(node)
        x, y = TASK.synthetic(SHAPE, 40, generator)
        return Holder(
            name=f"c{node}",
            task=TASK,
            shape=SHAPE,
            load=lambda: Records(x, y, torch.ones(40, dtype=torch.bool)),
            book=book,
            kept=Kept(folder / "kept", durable=False, safe=Safe(Secret(bytes(32)), "kept")),
            sources=sources or SecureSources(),
        )

    return client_app(find)


def lines(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_a_job_runs_its_rounds_and_leaves_lines_receipts_and_a_checkpoint(tmp_path):
    job, book = make_job(tmp_path)
    with LocalGrid(honest(book, tmp_path), nodes=CLIENTS, run_config={}) as grid:
        assert run(job, grid) is Ending.FINISHED
    assert [line["round"] for line in lines(tmp_path)] == [1, 2, 3]
    assert all(line["replies"] == CLIENTS and not line["missing"] for line in lines(tmp_path))
    receipts = [json.loads(line) for line in (tmp_path / RECEIPTS).read_text().splitlines()]
    assert len(receipts) == ROUNDS * CLIENTS
    for line in receipts:
        verify(line["peer"], b"tacit/countersign/1\n" + line["receipt"].encode(), line["countersignature"])
    first = trainable(TASK.fresh(SHAPE, 0))
    assert set(load(tmp_path / CHECKPOINT).model) == set(first)


def swapped(app, change):
    """A client app whose replies pass through ``change`` before they leave."""

    def call(message, context):
        return change(app(message, context), message, context)

    return call


def drop_first(reply, message, context):
    if context.node_id == 1:
        raise RuntimeError("this client crashed")
    return reply


def nan_first(reply, message, context):
    if context.node_id == 1:
        name = next(iter(reply.content["arrays"]))
        spoilt = np.full(reply.content["arrays"][name].shape, np.nan, np.float32)
        reply.content["arrays"][name] = Array(spoilt)
    return reply


def other_shape(reply, message, context):
    if context.node_id == 1:
        reply.content["arrays"][next(iter(reply.content["arrays"]))] = Array(np.zeros((2, 2), np.float32))
    return reply


def no_receipt(reply, message, context):
    if context.node_id == 1:
        reply.content["receipt"] = ConfigRecord({"receipt": "{}"})
    return reply


def forged_receipt(reply, message, context):
    if context.node_id == 1:
        fields = json.loads(reply.content["receipt"]["receipt"])
        fields["spent"] = 0.0
        reply.content["receipt"] = ConfigRecord({"receipt": json.dumps(fields)})
    return reply


_memory = {}


def replayed(reply, message, context):
    if context.node_id == 1:
        first = _memory.setdefault("first", reply.content)
        return Message(first, reply_to=message)
    return reply


@pytest.mark.parametrize("fault", [drop_first, nan_first, other_shape, no_receipt, forged_receipt])
def test_a_faulty_reply_counts_as_missing_and_the_round_goes_on(tmp_path, fault):
    job, book = make_job(tmp_path)
    with LocalGrid(swapped(honest(book, tmp_path), fault), nodes=CLIENTS, run_config={}) as grid:
        assert run(job, grid) is Ending.FINISHED
    assert all((line["replies"], line["missing"]) == (CLIENTS - 1, 1) for line in lines(tmp_path))
    assert all(np.isfinite(value).all() for value in load(tmp_path / CHECKPOINT).model.values())


def test_a_replayed_reply_of_an_earlier_round_is_not_used(tmp_path):
    _memory.clear()
    job, book = make_job(tmp_path)
    with LocalGrid(swapped(honest(book, tmp_path), replayed), nodes=CLIENTS, run_config={}) as grid:
        run(job, grid)
    assert [line["replies"] for line in lines(tmp_path)] == [CLIENTS, CLIENTS - 1, CLIENTS - 1]


def _with_fresh_ledgers(tmp_path):
    """Runs a job whose first client makes itself a fresh ledger for every round after the first."""
    job, book = make_job(tmp_path)

    def app(message, context):
        number = message.content["job"]["round"]
        if context.node_id > 1 or number == 1:
            return honest(book, tmp_path)(message, context)
        folder = tmp_path / f"fresh-{number}"
        _, fresh = make_job(folder)
        for other in range(number):
            # Charged for other jobs, so that the sequence number grows as an honest one would.
            charge = ChargeRequest(name="c1", job=f"{other:032x}", round=1, request="0" * 64, plan=_cheap(job.plan))
            fresh.charge([charge])
        message.content["job"]["witness"] = ""
        return honest(fresh, folder)(message, context)

    with LocalGrid(app, nodes=CLIENTS, run_config={}) as grid:
        run(job, grid)
    return [line["replies"] for line in lines(tmp_path)]


def _cheap(plan):
    return dataclasses.replace(plan, noise_multiplier=100.0)


def test_g14_a_client_with_a_fresh_ledger_is_not_believed(tmp_path):
    assert _with_fresh_ledgers(tmp_path) == [CLIENTS, CLIENTS - 1, CLIENTS - 1]


def test_g14_planted_bug_without_pinned_identities_a_fresh_ledger_is_believed(tmp_path, monkeypatch):
    import server.app

    monkeypatch.setattr(server.app, "_identity_of", lambda receipt: "anyone")
    # The request it was paid for differs in the witness, which the receipt binds; ask without one to isolate the pin.
    monkeypatch.setattr(server.app, "request_digest", lambda fields, model: _digest_without_witness(fields, model))
    assert _with_fresh_ledgers(tmp_path) != [CLIENTS, CLIENTS - 1, CLIENTS - 1]


def _digest_without_witness(fields, model):
    return request_digest({**fields, "witness": ""}, model)


def test_a_round_with_too_few_replies_leaves_the_model_as_it_is(tmp_path):
    job, book = make_job(tmp_path, min_replies=CLIENTS)
    with LocalGrid(swapped(honest(book, tmp_path), drop_first), nodes=CLIENTS, run_config={}) as grid:
        assert run(job, grid) is Ending.FINISHED
    first = trainable(TASK.fresh(SHAPE, 0))
    assert all(np.array_equal(value, first[name]) for name, value in load(tmp_path / CHECKPOINT).model.items())
    assert all(line["thin"] for line in lines(tmp_path))


def test_clients_that_declined_are_not_asked_again_and_too_few_end_the_job_with_its_model_kept(tmp_path):
    asked = []

    def watch(reply, message, context):
        asked.append(context.node_id)
        return reply

    job, book = make_job(tmp_path, rounds=6, joins=3, epsilon=3.0)
    with LocalGrid(swapped(honest(book, tmp_path), watch), nodes=CLIENTS, run_config={}) as grid:
        assert run(job, grid) is Ending.TOO_FEW
    # Three joins are allowed; the fourth request is declined by all, and nobody is asked again.
    assert [line["replies"] for line in lines(tmp_path)] == [4, 4, 4, 0]
    assert asked.count(1) == 4
    first = trainable(TASK.fresh(SHAPE, 0))
    final = load(tmp_path / CHECKPOINT).model
    assert any(not np.array_equal(value, first[name]) for name, value in final.items())


def test_an_unanswered_round_and_an_error_reply_are_survived(tmp_path):
    job, book = make_job(tmp_path)
    app = honest(book, tmp_path)

    def silent(message, context):
        if context.node_id in (1, 2):
            return Message(Error(7, "gone"), reply_to=message)
        return app(message, context)

    with LocalGrid(silent, nodes=CLIENTS, run_config={}) as grid:
        run(job, grid)
    assert all((line["replies"], line["missing"]) == (2, 2) for line in lines(tmp_path))


def test_only_trainable_parameters_and_eight_words_travel_to_a_client(tmp_path):
    seen = []
    job, book = make_job(tmp_path, rounds=1)
    app = honest(book, tmp_path)

    def watch(message, context):
        seen.append(message.content)
        return app(message, context)

    with LocalGrid(watch, nodes=CLIENTS, run_config={}) as grid:
        run(job, grid)
    model = TASK.fresh(SHAPE, 0)
    for content in seen:
        assert set(content) == {"arrays", "job"}
        assert list(content["arrays"]) == [n for n, p in model.named_parameters() if p.requires_grad]
        assert set(content["job"]) == {"job", "round", "task", "plan", "local", "lr", "seed", "witness"}


def test_a_checkpoint_of_another_job_is_refused(tmp_path):
    job, book = make_job(tmp_path, rounds=1)
    with LocalGrid(honest(book, tmp_path), nodes=CLIENTS, run_config={}) as grid:
        run(job, grid)
        with pytest.raises(RunError, match="another"):
            run(dataclasses.replace(job, id="cd" * 16), grid)


def test_a_server_without_a_cohort_is_refused(tmp_path):
    from server.app import server_app

    job, book = make_job(tmp_path, cohort=0)
    app = server_app(lambda context: job, lambda *_: None)
    with (
        LocalGrid(honest(book, tmp_path), nodes=CLIENTS, run_config={}) as grid,
        pytest.raises(PlanError, match="cohort"),
    ):
        app(grid=grid, context=Context(1, 0, {}, RecordDict(), {}))


def test_a_wrong_number_of_nodes_is_told_with_the_remedy(tmp_path, monkeypatch):
    import server.app

    monkeypatch.setattr(server.app.time, "sleep", lambda _: None)
    monkeypatch.setattr(server.app.time, "monotonic", iter(range(0, 1000, 10)).__next__)
    job, book = make_job(tmp_path, rounds=1)
    with (
        LocalGrid(honest(book, tmp_path), nodes=2, run_config={}) as grid,
        pytest.raises(RunError, match="expected 4 nodes, got 2"),
    ):
        run(job, grid)


@pytest.mark.parametrize(("rounds", "clients", "cohort"), [(20, 10, 10), (40, 10, 3), (100, 1000, 50), (41, 7, 2)])
def test_spare_charges_follow_the_turns_of_one_client(rounds, clients, cohort):
    from simulations.scenario import Scenario

    scenario = Scenario(rounds=rounds, clients=clients, cohort=cohort).resolved(100 * clients)
    assert scenario.retries == max(1, -(-joins_of(rounds, clients, cohort) // 20))


def test_a_run_whose_nodes_got_other_numbers_is_not_resumed(tmp_path):
    job, book = make_job(tmp_path)
    with LocalGrid(honest(book, tmp_path), nodes=CLIENTS, run_config={}) as grid:
        run(dataclasses.replace(job, stopping=lambda: True), grid)
        monkey = lambda: [node + 1000 for node in range(1, CLIENTS + 1)]  # noqa: E731
        grid.get_node_ids = monkey
        with pytest.raises(RunError, match="new numbers"):
            run(job, grid)
