"""The guarantee chain at a client: its order (G8), its retries (G9), and what leaves it (G12)."""

import dataclasses
import io
import json
import logging
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from clients import app as clients_app
from clients import holder as clients_holder
from clients.app import client_app, decode, encode
from clients.holder import Holder, Kept, Release, SecureSources, noise_name
from clients.records import Records
from models.catalog import TASKS
from models.shape import Shape
from privacy.accounting import Event, Grant, rdp, solve_noise
from privacy.dpsgd import PrivateTrainer
from privacy.errors import DataError, PlanError
from privacy.identity import Secret
from privacy.ledger import Book, Receipt, Word
from privacy.noise import SECURE_SOURCE, Keystream
from privacy.plan import Local, Mode, Plan
from privacy.vault import Safe, SealedLog, read_log
from tests.apps.seeded import SeededSources

SHAPE = Shape(inputs=(1, 8, 8), classes=10)
TASK = TASKS["digits"]
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
JOB = "0123456789abcdef" * 2
SECRET = Secret(bytes(range(32)))


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


def holder(folder, *, load=records, simulated=False, epsilon=3.0, sources=None):
    book = Book(folder / "ledgers")
    grant = Grant(epsilon=epsilon, delta=1e-5, order=ORDER, records_bound=1000)
    book.grant({"mine": grant}, population="mine")
    return Holder(
        name="mine",
        task=TASK,
        shape=SHAPE,
        load=load,
        book=book,
        kept=Kept(folder / "kept", durable=True, safe=None if simulated else Safe(SECRET, "kept")),
        sources=sources or SecureSources(),
        simulated=simulated,
    )


def request(round=1, *, plan=PLAN, lr=0.5, scale=0.0, witness="", job=JOB, task="digits", **extra):
    torch.manual_seed(1)
    model = TASK.build(SHAPE)
    arrays = ArrayRecord({n: Array(p.detach().numpy() + np.float32(scale)) for n, p in model.named_parameters()})
    config = {
        "job": job,
        "round": round,
        "task": task,
        "plan": plan.to_json(),
        "local": Local(lr=0.5).to_json(),
        "lr": lr,
        "seed": 1,
        "witness": witness,
    } | extra
    return Message(RecordDict({"arrays": arrays, "job": ConfigRecord(config)}), dst_node_id=2, message_type="train")


def send(holder, message):
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    return client_app(lambda _: holder, simulated=holder.simulated)(message, context)


def word_of(reply):
    return reply.content["refusal"]["word"]


def spent(holder):
    return holder.book.accounts["mine"].spent_rdp


def test_a_request_is_answered_with_parameters_and_a_receipt_and_nothing_else(tmp_path):
    mine = holder(tmp_path)
    reply = send(mine, request())
    assert set(reply.content) == {"arrays", "receipt"}
    assert set(reply.content["receipt"]) == {"receipt"}
    assert not reply.content.metric_records
    receipt = Receipt.from_json(reply.content["receipt"]["receipt"])
    assert (receipt.job, receipt.round, receipt.charges, receipt.test) == (JOB, 1, 1, False)
    assert list(reply.content["arrays"]) == list(request().content["arrays"])


def test_g8_the_charge_is_on_disk_before_any_record_is_read_and_the_release_is_kept_before_it_leaves(
    tmp_path,
):
    seen = []

    def load():
        # The file itself, not the book's memory: the charge must have reached the disk.
        seen.append(("load", (tmp_path / "ledgers/ledger.jsonl").read_text().count('"kind":"charge"')))
        return records()

    mine = holder(tmp_path, load=load)
    put = mine.kept.put
    mine.kept.put = lambda release: (seen.append(("keep", release.receipt.round)), put(release))
    send(mine, request())
    assert seen == [("load", 1), ("keep", 1)]
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_g8_planted_bug_loading_before_the_charge_is_caught(tmp_path, monkeypatch):
    charges_when_loaded = []

    def load():
        charges_when_loaded.append((tmp_path / "ledgers/ledger.jsonl").read_text().count('"kind":"charge"'))
        return records()

    mine = holder(tmp_path, load=load)
    charge = Holder.charge
    monkeypatch.setattr(Holder, "charge", lambda self, asked: (self.load(), charge(self, asked))[1])
    send(mine, request())
    assert charges_when_loaded[0] == 0


def test_g9_the_same_request_again_gets_the_same_bytes_and_costs_nothing(tmp_path):
    mine = holder(tmp_path)
    first = send(mine, request())
    cost = spent(mine)
    again = send(mine, request())
    assert spent(mine) == cost
    for name, array in first.content["arrays"].items():
        assert again.content["arrays"][name].data == array.data
    assert again.content["receipt"] == first.content["receipt"]


def test_g9_a_kept_release_survives_a_restart(tmp_path):
    first = send(holder(tmp_path), request())
    again = send(holder(tmp_path), request())
    assert [a.data for a in again.content["arrays"].values()] == [a.data for a in first.content["arrays"].values()]


@pytest.mark.parametrize("other", [{"scale": 0.5}, {"lr": 0.25}, {"plan": dataclasses.replace(PLAN, l2_clip=2.0)}])
def test_g9_the_same_round_with_another_model_or_plan_is_refused_and_costs_nothing(tmp_path, other):
    mine = holder(tmp_path)
    send(mine, request())
    cost = spent(mine)
    assert word_of(send(mine, request(**other))) == "conflict"
    assert spent(mine) == cost


def test_g9_killed_between_charge_and_keep_a_retry_is_charged_anew_with_fresh_noise(tmp_path):
    mine = holder(tmp_path)
    first = send(mine, request())
    for path in (tmp_path / "kept").iterdir():
        path.unlink()
    again = send(mine, request())
    once = rdp(Event.of_round(PLAN), ORDER)
    assert spent(mine) == pytest.approx(2 * once, rel=1e-12)
    assert [a.data for a in again.content["arrays"].values()] != [a.data for a in first.content["arrays"].values()]


@pytest.mark.parametrize("safe", [None, Safe(SECRET, "kept")], ids=["simulated", "sealed"])
def test_a_damaged_kept_release_is_never_sent(tmp_path, safe):
    kept = Kept(tmp_path / "kept", durable=True, safe=safe)
    mine = dataclasses.replace(holder(tmp_path), kept=kept, simulated=safe is None)
    send(mine, request())
    (path,) = (tmp_path / "kept").iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    send(mine, request())
    assert mine.book.accounts["mine"].charges == 2


def kept_after_two_rounds(folder, *, safe):
    """Sends two requests; returns the holder, its kept releases by file, and the arguments to ask for each."""
    kept = Kept(folder / "kept", durable=True, safe=safe)
    mine = dataclasses.replace(holder(folder), kept=kept, simulated=safe is None)
    asked = {}
    for round in (1, 2):
        receipt = Receipt.from_json(send(mine, request(round)).content["receipt"]["receipt"])
        key = (receipt.job, receipt.account, receipt.request)
        (path,) = set((folder / "kept").iterdir()) - set(asked)
        asked[path] = key
    return mine, {path: mine.kept.get(*key) for path, key in asked.items()}, asked


def readable(path, release):
    """Returns what of a release can be read in its file."""
    content, parameters = path.read_bytes(), release.parameters.tobytes()
    receipt = release.receipt
    found = {"parameters"} if any(parameters[at : at + 6] in content for at in range(len(parameters) - 6)) else set()
    for name in ("account", "head", "job", "request", "signature", "public_key"):
        text = getattr(receipt, name)
        if text.encode() in content or bytes.fromhex(text) in content:
            found.add(name)
    return found | {word for word in ("spent", "granted", "receipt") if word.encode() in content}


def test_g8_a_real_holders_kept_release_is_ciphertext(tmp_path):
    _, releases, _ = kept_after_two_rounds(tmp_path, safe=Safe(SECRET, "kept"))
    for path, release in releases.items():
        assert len(path.read_bytes()) > release.parameters.nbytes
        assert readable(path, release) == set()


def test_g8_planted_bug_a_kept_release_in_the_clear_is_found(tmp_path):
    _, releases, _ = kept_after_two_rounds(tmp_path, safe=None)
    for path, release in releases.items():
        assert {"parameters", "account", "signature", "spent"} <= readable(path, release)


def test_g9_a_kept_release_that_was_altered_or_swapped_is_not_sent_and_its_retry_is_charged_anew(tmp_path):
    mine, releases, asked = kept_after_two_rounds(tmp_path, safe=Safe(SECRET, "kept"))
    (first, one), (second, two) = ((path, path.read_bytes()) for path in releases)
    assert mine.kept.get(*asked[first]) is not None
    for at in (*range(80), *range(80, len(one) - 17, 13), *range(len(one) - 17, len(one))):
        first.write_bytes(one[:at] + bytes([one[at] ^ 1]) + one[at + 1 :])
        assert mine.kept.get(*asked[first]) is None
    for other in (*(one[:length] for length in range(0, len(one), 37)), one + b"\0", two):
        first.write_bytes(other)
        assert mine.kept.get(*asked[first]) is None
    second.write_bytes(one)
    assert mine.kept.get(*asked[second]) is None
    charges = mine.book.accounts["mine"].charges
    for round, path in ((1, first), (2, second)):
        again = send(mine, request(round)).content["arrays"]
        data = b"".join(array.numpy().tobytes() for array in again.values())
        assert data != releases[path].parameters.tobytes()
    assert mine.book.accounts["mine"].charges == charges + 2


def test_g8_a_real_holder_without_a_safe_is_refused(tmp_path):
    real = holder(tmp_path)
    with pytest.raises(PlanError, match="safe"):
        dataclasses.replace(real, kept=Kept(tmp_path / "kept", durable=True))


def test_a_spare_file_is_filled_again_and_keeps_nothing_of_what_it_held(tmp_path):
    """Filling a file again costs a tenth of making one; a shorter release must not end in a longer one's tail."""
    mine, releases, asked = kept_after_two_rounds(tmp_path, safe=None)
    mine.kept.clear()
    assert [mine.kept.get(*key) for key in asked.values()] == [None, None]
    spares = {path.stat().st_ino for path in (tmp_path / "kept").iterdir()}
    release = next(iter(releases.values()))
    short = Release(release.parameters[:3], release.receipt)
    other = Kept(tmp_path / "kept", durable=False)
    other.put(short)
    (path,) = (tmp_path / "kept").glob("*.release")
    assert path.stat().st_ino in spares
    key = (release.receipt.job, release.receipt.account, release.receipt.request)
    again = other.get(*key)
    assert again is not None
    assert again.parameters.tolist() == short.parameters.tolist()
    # Whoever believes that the spare is still there makes a file of its own.
    mine.kept._spares = [path.with_name("gone.spare")]
    mine.kept.put(release)
    assert mine.kept.get(*key).parameters.tolist() == release.parameters.tolist()


@pytest.mark.parametrize("where", ["loading", "training"])
def test_g12_a_program_that_exits_in_a_holders_loader_or_model_says_nothing(tmp_path, monkeypatch, where):
    """Libraries call sys.exit with a text; it would pass every handler of exceptions and end up at the relay."""

    def leave(*_, **__):
        raise SystemExit("patient 271828")

    mine = holder(tmp_path, load=leave if where == "loading" else records)
    if where == "training":
        monkeypatch.setattr(PrivateTrainer, "train", leave)
    reply = send(mine, request())
    assert reply.has_content()
    assert ("receipt" if where == "loading" else "refusal") in reply.content
    assert "271828" not in str(reply.content)


def test_g9_planted_bug_without_a_safe_a_forged_release_would_be_sent(tmp_path):
    mine, releases, asked = kept_after_two_rounds(tmp_path, safe=None)
    path = next(iter(releases))
    magic, header, body = path.read_bytes().split(b"\n", 2)
    forged = bytes(len(body))
    header = json.dumps(json.loads(header) | {"sum": 0}).encode()
    path.write_bytes(b"\n".join((magic, header, forged)))
    assert not mine.kept.get(*asked[path]).parameters.any()


@pytest.mark.parametrize("other", [None, Safe(SECRET, "log"), Safe(Secret(bytes(32)), "kept")])
def test_a_kept_release_of_another_key_counts_as_lost(tmp_path, other):
    mine, releases, asked = kept_after_two_rounds(tmp_path, safe=Safe(SECRET, "kept"))
    for path in releases:
        assert Kept(tmp_path / "kept", durable=True, safe=other).get(*asked[path]) is None
    _, releases, asked = kept_after_two_rounds(tmp_path / "plain", safe=None)
    for path in releases:
        assert Kept(tmp_path / "plain" / "kept", durable=True, safe=mine.kept._safe).get(*asked[path]) is None


def test_an_exhausted_budget_is_answered_with_a_fixed_word_and_reads_no_data(tmp_path):
    def never():
        raise AssertionError("data was read without a charge")

    mine = holder(tmp_path, epsilon=1.95, load=never)
    assert word_of(send(mine, request())) == "declined"


def test_a_job_cannot_join_more_rounds_than_its_plan_committed(tmp_path):
    mine = holder(tmp_path, epsilon=30.0)
    answers = [send(mine, request(round)) for round in range(1, PLAN.joins + 2)]
    assert all("arrays" in reply.content for reply in answers[:-1])
    assert word_of(answers[-1]) == "declined"


def test_g14_a_ledger_behind_the_last_receipt_refuses_to_train(tmp_path):
    mine = holder(tmp_path)
    assert word_of(send(mine, request(witness=f"5:{'a' * 64}"))) == "behind"
    receipt = Receipt.from_json(send(mine, request()).content["receipt"]["receipt"])
    assert "arrays" in send(mine, request(2, witness=f"{receipt.seq}:{receipt.head}")).content


def _unreadable():
    raise DataError("row 7 of patients.csv is broken")


HOSTILE = {
    "clean": records,
    "unreadable": _unreadable,
    "targets of no shape": lambda: dataclasses.replace(records(), targets=torch.tensor(3)),
    "empty": lambda: records(0),
    "one record": lambda: records(1),
    "NaN": lambda: _spoil(math.nan),
    "infinity": lambda: _spoil(math.inf),
    "huge": lambda: _spoil(3e38),
    "label out of range": lambda: dataclasses.replace(records(), targets=torch.full((40,), 99)),
}


def _spoil(value):
    spoilt = records()
    spoilt.inputs[7] = value
    return spoilt


def _wire(reply):
    """Everything that a watcher of the wire sees, lengths included, besides the numbers and digests themselves."""
    shape = {name: (type(record).__name__, sorted(record)) for name, record in reply.content.items()}
    sizes = {name: len(array.data) for name, array in reply.content["arrays"].items()}
    return shape, sizes, len(reply.content["receipt"]["receipt"]) // 16


def test_g12_at_a_real_holder_hostile_data_looks_on_the_wire_like_any_other(tmp_path):
    seen = {}
    for number, (kind, load) in enumerate(HOSTILE.items()):
        mine = holder(tmp_path / str(number), load=load)
        reply = send(mine, request())
        seen[kind] = _wire(reply)
        for array in reply.content["arrays"].values():
            assert np.isfinite(array.numpy()).all(), kind
    assert all(wire == seen["clean"] for wire in seen.values()), seen


def _crash(*_, **__):
    raise RuntimeError("patient 4711")


FAULTS = {"unreadable records": {"load": _crash}, "a crash in training": {}}


def _places_that_tell(folder, monkeypatch, capfd, *, fault, handlers):
    """Lets a real holder meet a fault and returns where the text of it can be read afterwards.

    ``handlers`` are those of the client's logger, instead of what pytest attaches to it.
    """
    mine = holder(folder, **FAULTS[fault])
    if fault == "a crash in training":
        monkeypatch.setattr(PrivateTrainer, "train", _crash)
    streams = {"root logger": io.StringIO(), "flwr's logger": io.StringIO()}
    monkeypatch.setattr(clients_app._log, "handlers", handlers)
    # A plain program has no handler at the root, and Python then prints; one with a handler there gets its records.
    for number, at_root in enumerate(([], [logging.StreamHandler(streams["root logger"])])):
        monkeypatch.setattr(logging.getLogger(), "handlers", at_root)
        flower = logging.getLogger("flwr")
        monkeypatch.setattr(flower, "handlers", [*flower.handlers, logging.StreamHandler(streams["flwr's logger"])])
        reply = send(mine, request(number + 1))
        streams[f"reply {number}"] = io.StringIO(repr(reply.content) + repr(reply.metadata))
        arrays = reply.content.array_records.values()
        assert not any(b"patient" in array.data for record in arrays for array in record.values())
    printed = capfd.readouterr()
    texts = {name: stream.getvalue() for name, stream in streams.items()} | {"out": printed.out, "err": printed.err}
    files = {path.name: path.read_text("latin-1") for path in folder.rglob("*") if path.is_file()}
    return {name for name, text in (texts | files).items() if "patient" in text}


@pytest.mark.parametrize("fault", FAULTS)
def test_g12_details_of_a_fault_reach_nobody_where_no_log_is_attached(tmp_path, monkeypatch, capfd, fault):
    nothing = [logging.NullHandler()]
    assert _places_that_tell(tmp_path, monkeypatch, capfd, fault=fault, handlers=nothing) == set()


@pytest.mark.parametrize("fault", FAULTS)
def test_g12_details_of_a_fault_stay_in_the_holders_sealed_log(tmp_path, monkeypatch, capfd, fault):
    sealed = SealedLog(tmp_path / "client.log", SECRET)
    assert _places_that_tell(tmp_path, monkeypatch, capfd, fault=fault, handlers=[sealed]) == set()
    first, second = read_log(tmp_path / "client.log", SECRET)
    assert "RuntimeError: patient 4711" in first
    assert "RuntimeError: patient 4711" in second


@pytest.mark.parametrize("fault", FAULTS)
def test_g12_planted_bug_an_ordinary_logger_prints_details(tmp_path, monkeypatch, capfd, fault):
    monkeypatch.setattr(clients_app._log, "propagate", True)
    told = _places_that_tell(tmp_path, monkeypatch, capfd, fault=fault, handlers=[])
    assert told == {"root logger", "err"}


def test_g12_the_clients_logger_is_private_from_its_import_on():
    for module in (clients_app, clients_holder):
        assert module._log is logging.getLogger("tacit.client")
    assert not clients_app._log.propagate
    assert any(isinstance(handler, logging.NullHandler) for handler in clients_app._log.handlers)


def test_g12_a_crash_at_a_real_holder_leaves_as_a_fixed_word_without_its_text(tmp_path, monkeypatch):
    mine = holder(tmp_path)
    monkeypatch.setattr(PrivateTrainer, "train", _crash)
    reply = send(mine, request())
    assert word_of(reply) == "unavailable"
    assert "patient" not in repr(reply.content)


def test_g12_a_log_that_cannot_be_written_changes_nothing_on_the_wire(tmp_path, monkeypatch, capfd):
    sealed = SealedLog(tmp_path / "logs" / "client.log", SECRET)
    monkeypatch.setattr(clients_app._log, "handlers", [sealed])
    seen = []
    for name in ("writable", "gone"):
        if name == "gone":
            (tmp_path / "logs").rename(tmp_path / "away")
        seen.append(_wire(send(holder(tmp_path / name, load=_crash), request())))
    assert seen[0] == seen[1]
    assert sealed.lost == 1
    assert capfd.readouterr() == ("", "")


def test_g12_planted_bug_dropping_bad_records_by_refusing_shows_on_the_wire(tmp_path, monkeypatch):
    # A holder that refuses to train on bad data answers a word where others answer a model.
    monkeypatch.setattr("clients.holder.sanitize", lambda records, shape: _only_sound(records))
    monkeypatch.setattr(Holder, "records", lambda self: _only_sound(self.load()))
    replies = {kind: send(holder(tmp_path / kind, load=HOSTILE[kind]), request()) for kind in ("clean", "NaN")}
    assert "receipt" in replies["clean"].content
    assert "receipt" not in replies["NaN"].content


def _only_sound(records):
    if not records.inputs.isfinite().all():
        raise DataError("bad records")
    return records


def test_g12_in_a_simulation_a_fault_is_a_plain_error(tmp_path):
    mine = holder(tmp_path, load=HOSTILE["NaN"], simulated=True)
    with pytest.raises(DataError, match="mine"):
        send(mine, request())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m.content["job"].__setitem__("round", 0),
        lambda m: m.content["job"].__setitem__("round", 1.0),
        lambda m: m.content["job"].__setitem__("lr", math.nan),
        lambda m: m.content["job"].__setitem__("job", "../../etc"),
        lambda m: m.content["job"].__setitem__("plan", "{}"),
        lambda m: m.content["job"].__setitem__("plan", "x" * 10_000),
        lambda m: m.content["job"].__setitem__("witness", "1:zz"),
        lambda m: m.content["job"].__setitem__("more", 1),
        lambda m: m.content["job"].__delitem__("lr"),
        lambda m: m.content.__delitem__("arrays"),
        lambda m: m.content["arrays"].__delitem__(next(iter(m.content["arrays"]))),
        lambda m: m.content["arrays"].__setitem__(next(iter(m.content["arrays"])), Array(np.zeros((3, 3), np.float32))),
        lambda m: m.content["arrays"].__setitem__(
            next(iter(m.content["arrays"])),
            Array(np.full(request().content["arrays"][next(iter(m.content["arrays"]))].shape, np.nan, np.float32)),
        ),
    ],
)
def test_malformed_requests_are_answered_with_a_fixed_word_before_any_charge(tmp_path, spoil):
    mine, message = holder(tmp_path), request()
    spoil(message)
    assert word_of(send(mine, message)) == "malformed"
    assert spent(mine) == 0


def test_another_task_than_the_holders_is_refused(tmp_path):
    mine = holder(tmp_path)
    assert word_of(send(mine, request(task="digits-mlp"))) == "conflict"
    assert spent(mine) == 0


def test_evaluating_on_private_data_is_not_offered(tmp_path):
    message = Message(request().content, dst_node_id=2, message_type="evaluate")
    with pytest.raises(ValueError, match="evaluate"):
        send(holder(tmp_path), message)


def test_g11_only_the_production_type_gets_the_production_name(tmp_path):
    class Liar:
        name = SECURE_SOURCE

        def __call__(self, **_):
            return Keystream()

    assert noise_name(SecureSources()) == SECURE_SOURCE
    assert noise_name(Liar()).startswith("test:")
    mine = holder(tmp_path, sources=SeededSources())
    receipt = Receipt.from_json(send(mine, request()).content["receipt"]["receipt"])
    assert receipt.test
    assert holder(tmp_path).book.accounts["mine"].test


def test_encode_and_decode_are_inverse_and_refuse_other_shapes():
    shapes = {"weight": (3, 4), "scalar": (), "bias": (3,)}
    flat = np.random.default_rng(2).standard_normal(16).astype(np.float32)
    record = encode(flat, shapes)
    assert np.array_equal(decode(record, shapes).numpy(), flat)
    assert np.array_equal(record["weight"].numpy(), flat[:12].reshape(3, 4))
    with pytest.raises(PlanError):
        decode(record, {"weight": (4, 3), "scalar": (), "bias": (3,)})


def test_words_do_not_depend_on_data_and_are_a_closed_set():
    assert {word.value for word in Word} == {"declined", "conflict", "behind", "malformed", "unavailable"}
    assert clients_app.REQUEST_KEYS == {"job", "round", "task", "plan", "local", "lr", "seed", "witness"}


# -- what a hostile server or a hostile local process may try --------------------------------------------------------


def test_a_shape_that_lies_is_refused_before_any_charge(tmp_path):
    mine, message = holder(tmp_path), request()
    name = next(iter(message.content["arrays"]))
    true = message.content["arrays"][name]
    message.content["arrays"][name] = Array("float32", (10**6,), "numpy.ndarray", true.data)
    assert word_of(send(mine, message)) == "malformed"
    assert spent(mine) == 0


def test_g8_a_forged_receipt_releases_nothing(tmp_path):
    foreign = holder(tmp_path / "foreign")

    def pay(asked):
        return foreign.book.charge([asked])[0]

    mine = dataclasses.replace(holder(tmp_path / "mine"), pay=pay)
    assert word_of(send(mine, request())) == "unavailable"
    assert spent(mine) == 0


def test_g8_a_receipt_of_another_request_releases_nothing(tmp_path):
    mine = holder(tmp_path)
    old = Receipt.from_json(send(mine, request()).content["receipt"]["receipt"])
    lazy = dataclasses.replace(mine, pay=lambda asked: old)
    assert word_of(send(lazy, request(2))) == "unavailable"


def test_g11_noise_of_another_source_than_was_charged_releases_nothing(tmp_path):
    mine = holder(tmp_path, sources=SeededSources())
    book = mine.book

    def pay(asked):
        return book.charge([dataclasses.replace(asked, noise=SECURE_SOURCE)])[0]

    assert word_of(send(dataclasses.replace(mine, pay=pay), request())) == "unavailable"


def test_the_same_seed_makes_the_same_frozen_parameters_wherever_the_model_is_built():
    def build(shape):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        model[1].weight.requires_grad_(False)
        return model

    task = dataclasses.replace(TASK, name="frozen", build=build)
    here, there = task.fresh(SHAPE, 5), task.fresh(SHAPE, 5)
    assert torch.equal(here[1].weight, there[1].weight)
    assert not torch.equal(here[1].weight, task.fresh(SHAPE, 6)[1].weight)


def test_a_redefined_task_of_the_same_name_is_not_trained_with_the_old_model(tmp_path):
    send(holder(tmp_path / "one"), request())
    other = dataclasses.replace(TASK, loss=lambda output, target: 0.0 * output.sum(1))
    built = []
    mine = dataclasses.replace(
        holder(tmp_path / "two"), task=dataclasses.replace(other, build=lambda s: built.append(1) or TASK.build(s))
    )
    send(mine, request())
    assert built


def test_g12_a_plan_that_does_not_fit_in_memory_is_refused_before_any_record_is_read(tmp_path, monkeypatch):
    def never():
        raise AssertionError("data was read")

    mine = holder(tmp_path, load=never)
    assert word_of(send(mine, request(plan=dataclasses.replace(PLAN, physical_batch=10**9)))) == "malformed"
    monkeypatch.setattr(PrivateTrainer, "rehearse", lambda *_: (_ for _ in ()).throw(PlanError("does not fit")))
    assert word_of(send(mine, request())) == "malformed"
    assert spent(mine) == 0


def test_g12_a_task_that_chokes_on_one_record_looks_on_the_wire_like_any_other(tmp_path):
    def augment(views, generator):
        assert float(views.max()) <= 1.5, "a record that the task did not expect"
        return views

    task, seen = dataclasses.replace(TASK, augment=augment), []
    for number, spoilt in enumerate((1.0, 2.0)):
        data = records()
        data.inputs[0] = spoilt
        mine = dataclasses.replace(holder(tmp_path / str(number), load=lambda data=data: data), task=task)
        plan = dataclasses.replace(PLAN, sample_rate=1.0, noise_multiplier=100.0)
        seen.append(_wire(send(mine, request(plan=plan))))
    assert seen[0] == seen[1]
