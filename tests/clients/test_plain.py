"""A client of a trusted server (G16): it joins by its own policy alone, pays first, and sends what is bounded."""

import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch.nn import functional

from clients.app import client_app
from clients.holder import Holder, Kept, SecureSources
from clients.plain import PlainTrainer
from clients.records import Records
from models.catalog import TASKS
from models.shape import Shape
from privacy.accounting import Event, Grant
from privacy.central import BIT
from privacy.identity import Secret
from privacy.ledger import Book, Receipt
from privacy.noise import Keystream
from privacy.plan import Local, Plan, Unit
from privacy.vault import Safe

SHAPE = Shape(inputs=(1, 8, 8), classes=10)
TASK = TASKS["digits"]
JOB = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def _identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


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


FOLLOWING = {"quantile": 0.5, "clip_lr": 0.2, "bit_noise": 4.0}


def records(n=40, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    return Records(
        torch.rand(n, *SHAPE.inputs, generator=generator) * scale,
        torch.randint(0, 10, (n,), generator=generator),
        torch.ones(n, dtype=torch.bool),
    )


def trainer(of, local=None):
    return PlainTrainer(TASK.fresh(SHAPE, 1), TASK, plan=of, local=local or Local(lr=0.5))


def start_of(of):
    return torch.cat([p.detach().flatten() for p in TASK.fresh(SHAPE, 1).parameters()])


# -- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [Local(lr=0.5), Local(lr=0.5, momentum=0.9, weight_decay=0.01)])
def test_plain_steps_are_those_of_torchs_own_optimiser(local):
    given, model = records(), TASK.fresh(SHAPE, 1)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay
    )
    for _ in range(2):
        optimiser.zero_grad()
        functional.cross_entropy(model(given.inputs), given.targets).backward()
        optimiser.step()
    wanted = torch.cat([p.detach().flatten() for p in model.parameters()]) - start_of(plan())
    found = trainer(plan(), local).update(start_of(plan()), given, Keystream(), lr=local.lr, clip=1e6, simulated=True)
    assert np.allclose(found, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e3])
@pytest.mark.parametrize("scale", [1.0, 1e20])
def test_g16_an_update_is_within_the_clip_and_says_whether_it_was(clip, scale):
    of = plan(**FOLLOWING)
    sent = trainer(of).update(start_of(of), records(scale=scale), Keystream(), lr=0.5, clip=clip, simulated=False)
    whole = trainer(of).update(start_of(of), records(scale=scale), Keystream(), lr=0.5, clip=1e30, simulated=False)
    norm = np.linalg.norm(whole[:-1].astype(np.float64))
    assert sent.shape == (651,)
    assert np.isfinite(sent).all()
    assert np.linalg.norm(sent[:-1].astype(np.float64)) <= clip * (1 + 1e-6)
    # Training on enormous records gives NaN, which counts as beyond any clip and is sent as nothing.
    assert norm > 0 or scale > 1
    assert sent[-1] == float(0 < norm <= clip)


class Broken:
    """Data on which training raises."""

    def __getattr__(self, name):
        raise RuntimeError("a private number: 4711")


def test_g16_whatever_a_real_holders_records_hold_the_update_has_the_same_shape():
    of = plan(**FOLLOWING)
    unusable = records()
    unusable.valid[:] = False
    for given in (records(), records(0), unusable, Broken()):
        sent = trainer(of).update(start_of(of), given, Keystream(), lr=0.5, clip=0.5, simulated=False)
        assert (sent.shape, sent.dtype) == ((651,), np.float32)
    assert not sent[:-1].any()
    with pytest.raises(RuntimeError):
        trainer(of).update(start_of(of), Broken(), Keystream(), lr=0.5, clip=0.5, simulated=True)


def test_records_that_are_not_valid_do_not_move_the_update():
    given = records()
    given.valid[20:] = False
    half = Records(given.inputs[:20], given.targets[:20], given.valid[:20])
    one, other = (
        trainer(plan()).update(start_of(plan()), data, Keystream(), lr=0.5, clip=1e6, simulated=True)
        for data in (given, half)
    )
    assert np.allclose(one, other, atol=1e-6)


# -- the chain --------------------------------------------------------------------------------------------------


def holder(folder, *, load=records, allow_central=True, unit=Unit.CLIENT, **changes):
    book = Book(folder / "ledgers")
    book.grant({"mine": Grant(epsilon=50.0, delta=1e-5, order=2.0, unit=unit, records_bound=1000)}, population="mine")
    policy = {} if allow_central is None else {"allow_central": allow_central}
    fields = {
        "name": "mine",
        "task": TASK,
        "shape": SHAPE,
        "load": load,
        "book": book,
        "kept": Kept(folder / "kept", durable=True, safe=Safe(Secret(bytes(range(32))), "kept")),
        "sources": SecureSources(),
    }
    return Holder(**fields | policy | changes)


def request(of=None, *, round=1, clip=0.5, **extra):
    of = of or plan()
    arrays = ArrayRecord({n: Array(p.detach().numpy()) for n, p in TASK.fresh(SHAPE, 1).named_parameters()})
    config = {
        "job": JOB,
        "round": round,
        "task": "digits",
        "plan": of.to_json(),
        "local": Local(lr=0.5).to_json(),
        "lr": 0.5,
        "seed": 1,
        "witness": "",
    }
    config |= {} if clip is None else {"clip": clip}
    content = RecordDict({"arrays": arrays, "job": ConfigRecord(config | extra)})
    return Message(content, dst_node_id=2, message_type="train")


def send(of, message):
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    return client_app(lambda _: of, simulated=of.simulated)(message, context)


def charges(of):
    return of.book.accounts["mine"].charges


def test_g16_a_holder_sends_its_clipped_update_and_its_receipt_and_nothing_else(tmp_path):
    mine = holder(tmp_path)
    reply = send(mine, request())
    assert set(reply.content) == {"arrays", "receipt"}
    assert list(reply.content["arrays"]) == list(request().content["arrays"])
    sent = np.concatenate([array.numpy().reshape(-1) for array in reply.content["arrays"].values()])
    assert 0 < np.linalg.norm(sent) <= 0.5 * (1 + 1e-6)
    receipt = Receipt.from_json(reply.content["receipt"]["receipt"])
    assert receipt.event == Event(unit=Unit.CLIENT, sample_rate=1.0, noise_multiplier=2.0, steps=1)


def require_policy_first(mine):
    """Fails where a holder that did not say yes is charged, reads a record, or sends anything but the word."""
    reply = send(mine, request())
    assert charges(mine) == 0, "a holder was charged against its policy"
    assert reply.content["refusal"]["word"] == "conflict"
    assert set(reply.content) == {"refusal"}


def never():
    raise AssertionError("a record was read")


@pytest.mark.parametrize("policy", [None, False])
def test_g16_a_holder_joins_only_by_its_own_policy_which_says_no_by_default(tmp_path, policy):
    require_policy_first(holder(tmp_path, allow_central=policy, load=never))


def test_g16_planted_bug_a_holder_that_trusts_every_server_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(Holder, "allows", lambda self, plan: True)
    with pytest.raises(AssertionError, match="against its policy"):
        require_policy_first(holder(tmp_path, allow_central=False))


def test_g16_a_policy_that_was_withdrawn_does_not_even_repeat_an_update(tmp_path):
    send(holder(tmp_path), request())
    reply = send(holder(tmp_path, allow_central=False), request())
    assert reply.content["refusal"]["word"] == "conflict"


def test_g16_a_budget_for_records_declines_a_plan_for_clients_uncharged(tmp_path):
    mine = holder(tmp_path, unit=Unit.RECORD, load=never)
    assert send(mine, request()).content["refusal"]["word"] == "conflict"
    assert charges(mine) == 0


def test_g8_the_charge_is_on_disk_before_any_record_is_read_at_unit_client_too(tmp_path):
    seen = []

    def load():
        seen.append((tmp_path / "ledgers/ledger.jsonl").read_text().count('"kind":"charge"'))
        return records()

    send(holder(tmp_path, load=load), request())
    assert seen == [1]


def test_g9_a_retry_gets_the_same_update_and_the_same_bit_for_one_charge(tmp_path):
    of = plan(**FOLLOWING, sample_rate=0.5)
    first = send(holder(tmp_path), request(of, clip=0.123))
    mine = holder(tmp_path)
    again = send(mine, request(of, clip=0.123))
    assert list(first.content["arrays"]) == [*request().content["arrays"], BIT]
    assert [a.data for a in again.content["arrays"].values()] == [a.data for a in first.content["arrays"].values()]
    assert charges(mine) == 1
    # The same round with another clip is another request.
    assert send(mine, request(of, clip=0.2)).content["refusal"]["word"] == "conflict"


@pytest.mark.parametrize(
    ("of", "clip"),
    [
        (plan(), None),
        (plan(), 0.6),
        (plan(), 1),
        (plan(), math.nan),
        (plan(**FOLLOWING), 0.0),
        (plan(**FOLLOWING), -1.0),
        (plan(**FOLLOWING), math.inf),
        (plan(**FOLLOWING), "0.5"),
        (plan(**FOLLOWING), None),
    ],
)
def test_a_request_without_the_right_clip_is_malformed_and_costs_nothing(tmp_path, of, clip):
    mine = holder(tmp_path, load=never)
    assert send(mine, request(of, clip=clip)).content["refusal"]["word"] == "malformed"
    assert charges(mine) == 0


def test_a_clip_beside_a_plan_for_records_is_malformed(tmp_path):
    from tests.oracles import make_plan

    mine = holder(tmp_path, unit=Unit.RECORD, load=never)
    assert send(mine, request(make_plan())).content["refusal"]["word"] == "malformed"
    assert charges(mine) == 0
