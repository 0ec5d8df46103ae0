"""A whole round through sealed messages: the relay carries them, and knows nothing afterwards but their lengths."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients.app import client_app, parse_request
from clients.holder import Holder, Kept, SecureSources
from clients.records import Records
from models.catalog import TASKS
from models.shape import Shape
from privacy.accounting import Grant, solve_noise
from privacy.errors import PlanError, SealError
from privacy.identity import Identity, Secret
from privacy.ledger import Book, Receipt, Word
from privacy.plan import Local, Mode, Plan
from privacy.seal import ClientEpoch, ServerEpoch
from privacy.vault import Safe
from privacy.wire import array_of, floats_by_name, pack, packed_bytes, unpack

SHAPE, TASK, JOB = Shape(inputs=(1, 8, 8), classes=10), TASKS["digits"], "0123456789abcdef" * 2
NOISE, ORDER = solve_noise(epsilon=3.0, delta=1e-5, sample_rate=0.2, steps=2 * 5)
PLAN = Plan(
    sample_rate=0.2,
    expected_batch=7.0,
    l2_clip=1.0,
    noise_multiplier=NOISE,
    steps=2,
    rounds=4,
    joins=5,
    epsilon=3.0,
    delta=1e-5,
    records_bound=1000,
    mode=Mode.HOOKS,
)
SERVER, CLIENT, FELLOW = (Identity(bytes((number,)) * 32) for number in (1, 2, 3))
BUNDLE, TERMS, MOST = "0b" * 32, "0c" * 32, 10_000_000
# The longest receipt that a reply is padded for; its own is some 1,500 bytes.
RECEIPT_BYTES = 8 * 1024


@pytest.fixture(autouse=True)
def _identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def packed(content):
    assert not content.metric_records
    return pack(
        content.config_records, {name: floats_by_name(record) for name, record in content.array_records.items()}
    )


def unpacked(data):
    configs, arrays = unpack(data, max_bytes=MOST)
    content = RecordDict({name: ConfigRecord(config) for name, config in configs.items()})
    for name, record in arrays.items():
        content[name] = ArrayRecord(
            {key: Array("float32", floats.shape, "numpy.ndarray", array_of(floats)) for key, floats in record.items()}
        )
    return content


def holder(folder, epsilon=3.0, order=ORDER):
    book = Book(folder / "ledgers")
    book.grant({"mine": Grant(epsilon=epsilon, delta=1e-5, order=order, records_bound=1000)}, population="mine")
    return Holder(
        name="mine",
        task=TASK,
        shape=SHAPE,
        load=records,
        book=book,
        kept=Kept(folder / "kept", durable=True, safe=Safe(Secret(bytes(range(32))), "kept")),
        sources=SecureSources(),
        simulated=False,
    )


def records():
    import torch

    generator = torch.Generator().manual_seed(3)
    inputs = torch.rand(40, *SHAPE.inputs, generator=generator)
    return Records(inputs, torch.randint(0, 10, (40,), generator=generator), torch.ones(40, dtype=torch.bool))


def request(round=1):
    arrays = {name: Array(parameter.detach().numpy()) for name, parameter in TASK.fresh(SHAPE, 1).named_parameters()}
    job = {
        "job": JOB,
        "round": round,
        "task": "digits",
        "plan": PLAN.to_json(),
        "local": Local(lr=0.5).to_json(),
        "lr": 0.5,
        "seed": 1,
        "witness": "",
    }
    return RecordDict({"arrays": ArrayRecord(arrays), "job": ConfigRecord(job)})


def joined(epoch, identity=CLIENT):
    client = ClientEpoch(identity, SERVER.public_key, run=7, bundle=BUNDLE, job=JOB, terms=TERMS)
    session, accept = epoch.accept(identity.public_key, client.offer(epoch.hello(identity.public_key)))
    return session, client.accept(accept)


def say(session, epoch, content, round=1):
    """What the server sends: the model once for all, all else to this client."""
    arrays = {name: floats_by_name(record) for name, record in content.array_records.items()}
    broadcast = epoch.broadcast(round, *pack({}, arrays))
    wrapped = session.wrap(broadcast)
    return bytes(wrapped), bytes(session.seal("round", round, *pack(content.config_records, {}))), bytes(broadcast.body)


def serve(session, mine, said, round=1):
    """What a client does with it, from opening to sealing."""
    wrapped, data, body = said
    content = unpacked(session.open("round", round, data, max_bytes=MOST))
    content["arrays"] = unpacked(session.unwrap(round, wrapped, body, max_bytes=MOST))["arrays"]
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    reply = client_app(lambda _: mine)(Message(content, dst_node_id=2, message_type="train"), context)
    shapes = {"arrays": {name: tuple(array.shape) for name, array in content["arrays"].items()}}
    longest = packed_bytes({"receipt": {"receipt": "x" * RECEIPT_BYTES}}, shapes)
    return bytes(session.seal("reply", round, *packed(reply.content), pad_to=longest))


def test_a_round_is_the_same_with_and_without_sealing_and_shows_the_relay_nothing(tmp_path):
    epoch = ServerEpoch(SERVER, job=JOB, run=7, bundle=BUNDLE, terms=TERMS)
    server, client = joined(epoch)
    content, mine = request(), holder(tmp_path)
    said = say(server, epoch, content)
    answered = serve(client, mine, said)
    reply = unpacked(server.open("reply", 1, answered, max_bytes=MOST))
    assert set(reply) == {"arrays", "receipt"}
    # The digest of the request, to which the charge is bound, is that of what the server asked.
    asked = parse_request(Message(content, dst_node_id=2, message_type="train"))
    assert Receipt.from_json(reply["receipt"]["receipt"]).request == asked.digest
    model = b"".join(array.data[-64:] for array in content["arrays"].values())
    update = b"".join(array.data[-64:] for array in reply["arrays"].values())
    clear = (
        model,
        update,
        JOB.encode(),
        bytes.fromhex(JOB),
        reply["receipt"]["receipt"].encode(),
        b"receipt",
        b"digits",
    )
    for data in (*said, answered):
        for marker in clear:
            assert not any(marker[at : at + 8] in data for at in range(0, len(marker) - 7, 8))
            assert marker not in data
    # Twin: what is not sealed shows all of it.
    assert all(
        marker[:8] in b"".join((*map(bytes, packed(content)), bytes.fromhex(JOB), *map(bytes, packed(reply))))
        for marker in clear
    )


def test_g9_a_request_that_is_said_again_gets_the_kept_release_sealed_anew(tmp_path):
    epoch = ServerEpoch(SERVER, job=JOB, run=7, bundle=BUNDLE, terms=TERMS)
    mine = holder(tmp_path)
    replies, answers = [], []
    # The first answer is lost. Then the same session says it again; then, after a restart, another epoch does.
    ends = joined(epoch)
    later = ServerEpoch(SERVER, job=JOB, run=7, bundle=BUNDLE, terms=TERMS)
    for one, (server, client) in ((epoch, ends), (epoch, ends), (later, joined(later))):
        said = say(server, one, request())
        answers.append(serve(client, mine, said))
        replies.append(b"".join(packed(unpacked(server.open("reply", 1, answers[-1], max_bytes=MOST)))))
        # What the relay repeats is not even looked at.
        with pytest.raises(SealError):
            serve(client, mine, said)
    assert replies[0] == replies[1] == replies[2]
    assert len(set(answers)) == 3
    assert mine.book.accounts["mine"].charges == 1
    # The old epoch's answer is no answer in the new one.
    with pytest.raises(SealError):
        server.open("reply", 1, answers[0], max_bytes=MOST)


def test_g12_a_refusal_is_as_long_as_a_release_on_the_wire(tmp_path):
    epoch = ServerEpoch(SERVER, job=JOB, run=7, bundle=BUNDLE, terms=TERMS)
    (server, client), (second, fellow) = joined(epoch), joined(epoch, FELLOW)
    release = serve(client, holder(tmp_path / "a"), say(server, epoch, request()))
    refusal = serve(fellow, holder(tmp_path / "b", epsilon=0.3, order=60.0), say(second, epoch, request()))
    assert unpacked(second.open("reply", 1, refusal))["refusal"]["word"] == Word.DECLINED
    assert len(release) == len(refusal)
    # Twin: unpadded, a word is far shorter than a release.
    word = RecordDict({"refusal": ConfigRecord({"word": Word.DECLINED.value})})
    assert len(fellow.seal("reply", 1, *packed(word))) < len(release) / 2


def test_only_float32_arrays_as_they_are_written_go_into_a_packet():
    fine = Array(np.zeros((2, 3), np.float32))
    assert floats_by_name({"w": fine})["w"].shape == (2, 3)
    for wrong in (
        Array(np.zeros((2, 3))),
        Array("float32", (3, 2), "numpy.ndarray", fine.data),
        Array("float32", (2, 3), "torch", fine.data),
    ):
        with pytest.raises(PlanError):
            floats_by_name({"w": wrong})
