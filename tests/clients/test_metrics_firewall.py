"""The metrics firewall at a client: what may leave, under which charge, and what a watcher of the wire can see.

`require_firewall` walks everything in a reply. Whatever is neither the update, the receipt, a fixed word nor the noised
sums of a metric that the plan committed to is a leak.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from clients import app as clients_app
from clients import metrics as clients_metrics
from clients.app import client_app
from clients.holder import Holder, Kept, SecureSources
from clients.metrics import Judge
from clients.records import Records
from models.catalog import TASKS
from models.shape import Shape
from privacy import metrics as privacy_metrics
from privacy.accounting import Event, Grant, best_order, rdp
from privacy.errors import PlanError
from privacy.identity import Secret
from privacy.ledger import Book, Receipt, Word
from privacy.plan import Local, Metric, Metrics, Mode, Plan
from privacy.vault import Safe
from privacy.wire import read_float32

SHAPE = Shape(inputs=(1, 8, 8), classes=10)
TASK = TASKS["digits"]
ASKED = Metrics(words=(Metric.ACCURACY, Metric.LOSS, Metric.LABELS), noise=20.0, loss_bound=5.0)
SHAPES = {"accuracy": (2,), "loss": (2,), "label-histogram": (10,)}
PLAN = Plan(
    sample_rate=0.2,
    expected_batch=7.0,
    l2_clip=1.0,
    noise_multiplier=2.0,
    steps=2,
    rounds=4,
    joins=5,
    epsilon=3.0,
    delta=1e-5,
    records_bound=1000,
    mode=Mode.HOOKS,
    metrics=ASKED,
)
BARE = dataclasses.replace(PLAN, metrics=None)
ORDER, _ = best_order(Event.all_of_schedule(PLAN), 1e-5)
JOB = "0123456789abcdef" * 2
SECRET = Secret(bytes(range(32)))
EVERY = frozenset(Metric)


@pytest.fixture(autouse=True)
def _identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def records(n=40, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return Records(
        torch.rand(n, *SHAPE.inputs, generator=generator),
        torch.randint(0, 10, (n,), generator=generator),
        torch.ones(n, dtype=torch.bool),
    )


def holder(folder, *, load=records, epsilon=3.0, allow=EVERY, task=TASK, pay=None):
    book = Book(folder / "ledgers")
    book.grant({"mine": Grant(epsilon=epsilon, delta=1e-5, order=ORDER, records_bound=1000)}, population="mine")
    return Holder(
        name="mine",
        task=task,
        shape=SHAPE,
        load=load,
        book=book,
        kept=Kept(folder / "kept", durable=False, safe=Safe(SECRET, "kept")),
        sources=SecureSources(),
        pay=pay,
        **({} if allow is None else {"allow_metrics": allow}),
    )


def request(round=1, *, plan=PLAN):
    model = TASK.fresh(SHAPE, 1)
    arrays = ArrayRecord({n: Array(p.detach().numpy()) for n, p in model.named_parameters()})
    config = {
        "job": JOB,
        "round": round,
        "task": "digits",
        "plan": plan.to_json(),
        "local": Local(lr=0.5).to_json(),
        "lr": 0.5,
        "seed": 1,
        "witness": "",
    }
    return Message(RecordDict({"arrays": arrays, "job": ConfigRecord(config)}), dst_node_id=2, message_type="train")


def send(holder, message):
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    reply = client_app(lambda _: holder)(message, context)
    assert not context.state, "something of the data stays where the courier can read it"
    return reply


def word_of(reply):
    return reply.content["refusal"]["word"]


def spent(holder):
    return holder.book.accounts["mine"].spent_rdp


def receipt_of(reply):
    return Receipt.from_json(reply.content["receipt"]["receipt"])


def sums_of(reply):
    return {name: array.numpy() for name, array in reply.content["metrics"].items()}


# -- the firewall -----------------------------------------------------------------------------------------------


def require_firewall(reply, asked):
    """Fails where a reply to ``asked`` holds anything that was not paid for, by walking all that is in it."""
    plan = Plan.from_json(asked.content["job"]["plan"])
    assert not reply.has_error(), "an error's text leaves"
    content = dict(reply.content.items())
    if "refusal" in content:
        assert set(content) == {"refusal"}, "more than a word"
        assert type(content["refusal"]) is ConfigRecord, "a word in another record"
        assert set(content["refusal"]) == {"word"}, "more than a word"
        assert content["refusal"]["word"] in set(Word), "a word that is not fixed"
        return
    shapes = {"arrays": {name: tuple(array.shape) for name, array in asked.content["arrays"].items()}}
    if plan.metrics is not None:
        shapes["metrics"] = {word: SHAPES[word] for word in plan.metrics.words}
    assert set(content) == {*shapes, "receipt"}, f"the records {sorted(content)}"
    for name, parts in shapes.items():
        assert type(content[name]) is ArrayRecord, f"{name} in another record"
        assert {part: tuple(array.shape) for part, array in content[name].items()} == parts, f"other arrays in {name}"
        for part, array in content[name].items():
            assert (array.dtype, array.stype) == ("float32", "numpy.ndarray"), f"another type in {name}"
            read_float32(array.data, parts[part], part)
    assert type(content["receipt"]) is ConfigRecord, "a receipt in another record"
    assert set(content["receipt"]) == {"receipt"}, "more than a receipt"
    receipt = receipt_of(reply)
    assert receipt.events == Event.all_of_round(plan), "not charged for"
    assert reply.metadata.message_type == asked.metadata.message_type


REPLIES = {
    "an update": (BARE, {}),
    "an update and metrics": (PLAN, {}),
    "not allowed": (PLAN, {"allow": None}),
    "too dear": (PLAN, {"epsilon": 1.2}),
    "no records": (PLAN, {"load": lambda: records(0)}),
    "unreadable": (PLAN, {"load": lambda: 1 / 0}),
}


@pytest.mark.parametrize("kind", REPLIES)
def test_g12_nothing_leaves_but_the_update_the_receipt_a_fixed_word_and_the_plans_metrics(tmp_path, kind):
    plan, how = REPLIES[kind]
    asked = request(plan=plan)
    reply = send(holder(tmp_path, **how), asked)
    require_firewall(reply, asked)
    assert ("refusal" in reply.content) == (kind in ("not allowed", "too dear"))


def _metric_record(content):
    content["metrics"] = MetricRecord({"accuracy": 0.93})


def _more_beside_the_receipt(content):
    content["receipt"]["examples"] = 143


def _another_record(content):
    content["log"] = ConfigRecord({"text": "patient 4711"})


def _another_array(content):
    content["arrays"]["sizes"] = Array(np.zeros(3, np.float32))


def _longer_array(content):
    name = next(iter(content["arrays"]))
    true = content["arrays"][name]
    content["arrays"][name] = Array("float32", true.shape, "numpy.ndarray", true.data + b"patient 4711")


def _another_metric(content):
    content["metrics"] = ArrayRecord({"median": Array(np.zeros(2, np.float32))})


def _exact(content):
    content["metrics"] = ArrayRecord({"accuracy": Array(np.array([31.0, 9.0]))})


LEAKS = [
    _metric_record,
    _more_beside_the_receipt,
    _another_record,
    _another_array,
    _longer_array,
    _another_metric,
    _exact,
]


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("plan", [BARE, PLAN], ids=["no metrics", "metrics"])
def test_g12_a_reply_with_anything_else_in_it_does_not_leave(tmp_path, monkeypatch, leak, plan):
    honest = clients_app.reply_of

    def leaky(*arguments):
        content = honest(*arguments)
        leak(content)
        return content

    monkeypatch.setattr(clients_app, "reply_of", leaky)
    asked = request(plan=plan)
    reply = send(holder(tmp_path), asked)
    require_firewall(reply, asked)
    assert word_of(reply) == "unavailable"
    # Planted bug: without its last door the client sends it, and the walk over the reply finds it.
    monkeypatch.setattr(clients_app, "require_allowed", lambda *_: None)
    reply = send(holder(tmp_path), asked)
    assert "receipt" in reply.content
    with pytest.raises((AssertionError, PlanError)):
        require_firewall(reply, asked)


def test_g12_by_default_a_holder_answers_no_metric_and_reads_nothing_for_one(tmp_path):
    def never():
        raise AssertionError("data was read")

    mine = holder(tmp_path, load=never, allow=None)
    assert word_of(send(mine, request())) == "conflict"
    assert spent(mine) == 0
    assert not mine.allow_metrics
    assert Plan.from_json(BARE.to_json()).metrics is None


@pytest.mark.parametrize("allow", [frozenset(), {Metric.ACCURACY}, EVERY - {Metric.LABELS}])
def test_g12_a_metric_that_the_holder_does_not_allow_is_refused_whole_before_any_charge(tmp_path, allow):
    mine = holder(tmp_path, allow=frozenset(allow))
    assert word_of(send(mine, request())) == "conflict"
    assert spent(mine) == 0
    # The same holder still trains.
    assert "arrays" in send(mine, request(plan=BARE)).content


def test_g12_a_holder_that_stops_allowing_a_metric_does_not_even_repeat_it(tmp_path):
    mine = holder(tmp_path)
    assert "metrics" in send(mine, request()).content
    assert word_of(send(dataclasses.replace(mine, allow_metrics=frozenset()), request())) == "conflict"


def test_g3_a_metric_that_the_plan_did_not_commit_to_is_refused_later(tmp_path):
    mine = holder(tmp_path)
    send(mine, request(1, plan=BARE))
    cost = spent(mine)
    for more in (PLAN, dataclasses.replace(PLAN, metrics=dataclasses.replace(ASKED, noise=1000.0))):
        assert word_of(send(mine, request(2, plan=more))) == "conflict"
    assert spent(mine) == cost
    assert "arrays" in send(mine, request(2, plan=BARE)).content


def test_a_request_cannot_name_a_metric_outside_the_plan(tmp_path):
    mine = holder(tmp_path)
    for change in ({"metrics": "accuracy"}, {"metric-noise": 0.1}):
        message = request(plan=BARE)
        for key, value in change.items():
            message.content["job"][key] = value
        assert word_of(send(mine, message)) == "malformed"
    forged = json.loads(PLAN.to_json())
    forged["metrics"]["words"] = ["accuracy", "targets"]
    message = request()
    message.content["job"]["plan"] = json.dumps(forged)
    assert word_of(send(mine, message)) == "malformed"
    assert spent(mine) == 0


HOSTILE = {
    "clean": records,
    "empty": lambda: records(0),
    "one record": lambda: records(1),
    "unreadable": lambda: 1 / 0,
    "NaN": lambda: _spoil(math.nan),
    "huge": lambda: _spoil(3e38),
    "label out of range": lambda: dataclasses.replace(records(), targets=torch.full((40,), 99)),
}


def _spoil(value):
    spoilt = records()
    spoilt.inputs[7] = value
    return spoilt


def _wire(reply):
    shape = {name: (type(record).__name__, sorted(record)) for name, record in reply.content.items()}
    sizes = {
        f"{name}/{part}": len(array.data)
        for name in ("arrays", "metrics")
        for part, array in reply.content[name].items()
    }
    return shape, sizes, len(reply.content["receipt"]["receipt"]) // 16


def test_g12_metrics_of_hostile_data_look_on_the_wire_like_any_other(tmp_path):
    seen = {}
    for number, (kind, load) in enumerate(HOSTILE.items()):
        reply = send(holder(tmp_path / str(number), load=load), request())
        seen[kind] = _wire(reply)
        assert all(np.isfinite(sums).all() for sums in sums_of(reply).values()), kind
    assert all(wire == seen["clean"] for wire in seen.values()), seen


def test_g12_planted_bug_a_client_without_records_that_leaves_its_metrics_out_shows(tmp_path, monkeypatch):
    honest = clients_app.reply_of

    def shy(asked, release, classes):
        content = honest(asked, release, classes)
        if number:
            del content["metrics"]
        return content

    monkeypatch.setattr(clients_app, "reply_of", shy)
    monkeypatch.setattr(clients_app, "require_allowed", lambda *_: None)
    seen = []
    for number, load in enumerate((records, lambda: records(0))):
        seen.append(sorted(send(holder(tmp_path / str(number), load=load), request()).content))
    assert seen[0] != seen[1]


# -- charged ----------------------------------------------------------------------------------------------------


def test_g8_update_and_metrics_are_charged_on_disk_before_any_record_is_read_and_kept_before_they_leave(tmp_path):
    seen = []

    def load():
        text = (tmp_path / "ledgers/ledger.jsonl").read_text().splitlines()
        charges = [entry["body"]["event"] for entry in map(json.loads, text) if entry["kind"] == "charge"]
        seen.append(("load", [[event.get("released", "update") for event in events] for events in charges]))
        return records()

    mine = holder(tmp_path, load=load)
    put = mine.kept.put
    mine.kept.put = lambda release: (seen.append(("keep", len(release.metrics))), put(release))
    reply = send(mine, request())
    words = ["update", "metric:accuracy", "metric:loss", "metric:label-histogram"]
    assert seen == [("load", [words]), ("keep", 14)]
    assert spent(mine) == pytest.approx(rdp(Event.of_round(PLAN), ORDER) + 3 * ORDER / (2 * 20**2), rel=1e-12)
    assert receipt_of(reply).charges == 1


def require_paid(folder, monkeypatch=None):
    """Fails where the ledger does not hold what left."""
    mine = holder(folder)
    reply = send(mine, request())
    if "metrics" in reply.content:
        paid = {event.released for event in mine.book.accounts["mine"].jobs[JOB].events}
        assert {f"metric:{word}" for word in reply.content["metrics"]} <= paid, "a metric left uncharged"
        assert spent(mine) == pytest.approx(rdp(Event.all_of_round(PLAN), ORDER)), "a metric left under another price"
    return reply


def test_g8_every_metric_that_leaves_is_in_the_ledger(tmp_path):
    assert "metrics" in require_paid(tmp_path).content


def test_g8_an_uncharged_metric_does_not_leave(tmp_path, monkeypatch):
    # Planted bug: a ledger that prices the update alone.
    monkeypatch.setattr(
        "privacy.ledger.Event",
        type("Lax", (Event,), {"all_of_round": classmethod(lambda _, plan: (Event.of_round(plan),))}),
    )
    assert word_of(require_paid(tmp_path / "guarded")) == "unavailable"
    # And with the client's last door open it is seen to leave.
    monkeypatch.setattr(clients_app, "require_allowed", lambda *_: None)
    with pytest.raises(AssertionError, match="uncharged"):
        require_paid(tmp_path / "open")


def test_g8_a_charge_for_less_than_was_asked_releases_nothing(tmp_path):
    mine = holder(tmp_path)

    def pay(asked):
        return mine.book.charge([dataclasses.replace(asked, plan=BARE)])[0]

    def never():
        raise AssertionError("data was read")

    assert word_of(send(dataclasses.replace(mine, pay=pay, load=never), request())) == "unavailable"


def test_g8_the_gate_refuses_update_and_metrics_together(tmp_path):
    price, update = rdp(Event.all_of_round(PLAN), ORDER), rdp(Event.of_round(PLAN), ORDER)
    grant = Grant(epsilon=3.0, delta=1e-5, order=ORDER, records_bound=1000)
    between = grant.epsilon_of((price + update) / 2)

    def never():
        raise AssertionError("data was read")

    mine = holder(tmp_path / "metrics", epsilon=between, load=never)
    assert word_of(send(mine, request())) == "declined"
    assert spent(mine) == 0
    assert "arrays" in send(holder(tmp_path / "bare", epsilon=between), request(plan=BARE)).content


# -- repeated ---------------------------------------------------------------------------------------------------


def require_repeatable(mine, *, lose=None):
    """Fails where two replies to one request differ without a charge for each."""
    first = send(mine, request())
    if lose is not None:
        lose()
    again = send(mine, request())
    bytes_of = [
        [array.data for name in ("arrays", "metrics") for array in reply.content[name].values()]
        for reply in (first, again)
    ]
    charges = mine.book.accounts["mine"].charges
    if bytes_of[0] != bytes_of[1]:
        assert charges == 2, "two draws of noise under one charge"
        assert receipt_of(first) != receipt_of(again)
    else:
        assert charges == 1, "one release was charged twice"
        assert first.content["receipt"] == again.content["receipt"]
    return bytes_of[0] == bytes_of[1]


def test_g9_the_same_request_again_gets_the_same_metrics_byte_for_byte_and_costs_nothing(tmp_path):
    assert require_repeatable(holder(tmp_path))
    # Also by another process, after a restart.
    first, again = send(holder(tmp_path), request()), send(holder(tmp_path), request())
    assert [a.data for a in first.content["metrics"].values()] == [a.data for a in again.content["metrics"].values()]


def test_g9_killed_before_keep_metrics_are_charged_anew_with_fresh_noise(tmp_path):
    mine = holder(tmp_path)

    def lose():
        for path in (tmp_path / "kept").iterdir():
            path.unlink()

    assert not require_repeatable(mine, lose=lose)
    assert spent(mine) == pytest.approx(2 * rdp(Event.all_of_round(PLAN), ORDER), rel=1e-12)


def test_g9_planted_bug_a_repeated_request_with_fresh_noise_under_one_charge_is_caught(tmp_path, monkeypatch):
    # Kept as usual, but the metrics are measured again for every reply.
    honest = clients_app.reply_of

    def fresh(asked, release, classes):
        judge = clients_app._workers[asked.plan, asked.local, asked.seed, "cpu"].judge
        one = judge.outcomes(clients_app.decode(asked.arrays, clients_app._shapes(asked)), records())
        again = privacy_metrics.release(asked.plan.metrics, one, SecureSources()(holder="", job="", round=1))
        return honest(asked, dataclasses.replace(release, metrics=again), classes)

    monkeypatch.setattr(clients_app, "reply_of", fresh)
    with pytest.raises(AssertionError, match="two draws"):
        require_repeatable(holder(tmp_path))


def test_g9_a_kept_release_keeps_its_metrics_apart_from_its_parameters(tmp_path):
    mine = holder(tmp_path)
    reply = send(mine, request())
    receipt = receipt_of(reply)
    kept = mine.kept.get(JOB, receipt.account, receipt.request)
    assert np.array_equal(kept.metrics, np.concatenate(list(sums_of(reply).values())))
    assert kept.parameters.size == sum(array.numpy().size for array in reply.content["arrays"].values())


@pytest.mark.parametrize("count", [-1, 10**6, "2", 1.5, None])
def test_a_kept_release_that_lies_about_its_metrics_counts_as_lost(tmp_path, count):
    kept = Kept(tmp_path / "kept", durable=False)
    mine = dataclasses.replace(holder(tmp_path), kept=kept, simulated=True)
    receipt = receipt_of(send(mine, request()))
    (path,) = (tmp_path / "kept").iterdir()
    magic, header, body = path.read_bytes().split(b"\n", 2)
    path.write_bytes(b"\n".join((magic, json.dumps(json.loads(header) | {"metrics": count}).encode(), body)))
    assert kept.get(JOB, receipt.account, receipt.request) is None


# -- measured ---------------------------------------------------------------------------------------------------


def test_g1_what_a_client_releases_is_the_noised_sum_over_all_its_records(tmp_path, monkeypatch):
    drawn = []
    honest = privacy_metrics.release

    class Silent:
        def gaussian(self, n):
            return torch.zeros(n, dtype=torch.float64)

    def watched(asked, one, source):
        drawn.append(honest(asked, one, Silent()))
        return honest(asked, one, source)

    monkeypatch.setattr(clients_app, "release_metrics", watched)
    data = records(200)
    model = TASK.fresh(SHAPE, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
        outputs = model.eval()(data.inputs)
    message = request()
    message.content["arrays"] = ArrayRecord({n: Array(p.detach().numpy()) for n, p in model.named_parameters()})
    reply = send(holder(tmp_path, load=lambda: data), message)
    # The incoming model, not the trained one; every record, not a sample.
    right = int((outputs.argmax(1) == data.targets).sum())
    losses = nn.functional.cross_entropy(outputs, data.targets, reduction="none").clamp(max=5.0)
    expected = [right, 200 - right, float(losses.sum()) / 5, 200 - float(losses.sum()) / 5]
    assert drawn[0][:4] == pytest.approx(expected, abs=1e-3)
    assert drawn[0][4:].tolist() == torch.bincount(data.targets, minlength=10).tolist()
    noise = np.concatenate(list(sums_of(reply).values())) - drawn[0]
    assert 5 < np.abs(noise).max() < 20 * 8.7
    assert len(set(noise.tolist())) == len(noise)


def require_alone(judge, start, data):
    """Fails where a record's outcome depends on which other records there are."""
    whole = judge.outcomes(start, data)
    for keep in ([0], [5], [3, 2, 1, 0], [*range(1, len(data))]):
        part = judge.outcomes(start, data.take(torch.tensor(keep)))
        assert torch.equal(part.right, whole.right[keep]), "another record changed who is right"
        assert torch.equal(part.losses, whole.losses[keep]), "another record changed a loss"


@pytest.mark.parametrize("name", ["digits", "digits-mlp", "digits-cnn"])
def test_g10_a_records_outcome_does_not_depend_on_the_other_records_bit_for_bit(name):
    judge = Judge(TASKS[name], SHAPE, 1, "cpu")
    start = torch.cat([p.detach().flatten() for p in TASKS[name].fresh(SHAPE, 2).parameters()])
    require_alone(judge, start + 0.01, records(12))


class _InBatches(Judge):
    """Planted bug: all records in one pass, through whatever the model does with a batch."""

    def outcomes(self, start, data):
        outputs = data.inputs.flatten(1) - data.inputs.flatten(1).mean(0)
        return privacy_metrics.Outcomes(outputs[:, 0] > 0, outputs[:, 1].double(), data.targets, data.valid, 10)


def test_g10_planted_bug_a_judge_that_looks_at_a_batch_is_caught():
    with pytest.raises(AssertionError, match="another record"):
        require_alone(_InBatches(TASK, SHAPE, 1, "cpu"), torch.zeros(650), records(12))


class _Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.last = 0.0

    def forward(self, x):
        # A factor: one number added to all logits would change no softmax.
        out = self.linear(x.flatten(1)) * (1 + self.last)
        self.last = float(x.mean())
        return out


def test_g10_a_model_that_remembers_is_refused_before_any_charge(tmp_path):
    task = dataclasses.replace(TASK, build=lambda shape: _Remembers())
    judge = Judge(task, SHAPE, 1, "cpu")
    with pytest.raises(PlanError, match="by itself"):
        judge.rehearse(lambda count: TASK.synthetic(SHAPE, count, torch.Generator().manual_seed(0)))
    with pytest.raises(AssertionError, match="another record"):
        require_alone(judge, torch.cat([p.detach().flatten() for p in _Remembers().parameters()]), records(12))


def test_g12_a_task_that_chokes_on_one_record_counts_it_as_wrong_and_shows_nothing(tmp_path):
    def loss(output, target):
        if int(target[0]) == 3:
            raise ValueError("patient 4711")
        return TASK.loss(output, target)

    judge = Judge(dataclasses.replace(TASK, loss=loss), SHAPE, 1, "cpu")
    data = records(30)
    one = judge.outcomes(torch.zeros(650), data)
    choked = data.targets == 3
    assert choked.any()
    assert torch.equal(one.losses.isnan(), choked)
    assert not one.right[choked].any()


def test_a_task_without_one_loss_a_record_is_refused_before_any_charge():
    task = dataclasses.replace(TASK, loss=lambda output, target: output[0])
    with pytest.raises(PlanError, match="one loss for one record"):
        Judge(task, SHAPE, 1, "cpu").rehearse(
            lambda count: TASK.synthetic(SHAPE, count, torch.Generator().manual_seed(0))
        )


def test_a_plan_without_metrics_builds_no_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(clients_metrics, "Judge", None)
    monkeypatch.setattr(clients_app, "Judge", None)
    monkeypatch.setattr(clients_app, "_workers", {})
    assert set(send(holder(tmp_path), request(plan=BARE)).content) == {"arrays", "receipt"}
