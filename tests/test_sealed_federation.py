"""A federation over sealed sessions in one process: the server's grid, a relay that may do anything, the workers."""

import random
import time

import httpx
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from clients.courier import content_of, pieces_of
from clients.holder import Holder, Kept, SecureSources
from clients.jobs import Decision, Jobs, Policy
from clients.post import LOST, Letter
from clients.records import Records
from clients.worker import Worker, reply_bytes
from models.catalog import TASKS
from models.shape import Shape
from privacy.accounting import Grant, solve_noise
from privacy.errors import RunError
from privacy.identity import Secret
from privacy.ledger import Book
from privacy.plan import Local, Mode, Plan
from privacy.seal import sealed_bytes
from privacy.terms import Terms, cost_of
from privacy.vault import Safe
from server import sealed
from server.aggregate import Aggregator, Strategy
from server.app import RECEIPTS, Ending, Job, Schedule, run
from server.sealed import Member, SealedGrid
from tests.apps.seeded import SeededSources

SHAPE = Shape(inputs=(1, 8, 8), classes=10)
TASK = TASKS["digits"]
CODE, BUNDLE = "c" * 64, "b" * 64
SERVER = Secret(bytes(range(32))).identity("server")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    for name in ("_POLL_S", "_PAUSE_S", "_WAITING_S", "_LOOK_S"):
        monkeypatch.setattr(sealed, name, 0.002)
    monkeypatch.setattr(sealed, "_FIRST_PATIENCE_S", 0.2)
    monkeypatch.setattr(sealed, "_LONGEST_PATIENCE_S", 0.5)


class FakeRelay:
    """Delivers at once. ``spoil`` sees each message on its way and returns what is delivered: none, one or several."""

    def __init__(self, workers, spoil=lambda way, pieces: [pieces], run_id=7):
        self.run_id, self.bundle, self.workers, self.spoil = run_id, BUNDLE, workers, spoil
        self.waiting, self.seen, self.count, self.away = {}, [], 0, set()
        self.arrivals = {}

    def nodes(self):
        return {node: self.arrivals.get(node, "") or "first" for node in self.workers if node not in self.away}

    def push(self, messages):
        ids = []
        for message in messages:
            self.count += 1
            ids.append(f"m{self.count}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            pieces = pieces_of(message)
            self.seen.append(("down", pieces))
            for delivered in self.spoil("down", pieces):
                worker = self.workers[message.metadata.dst_node_id]
                letter = Letter(self.run_id, self.bundle, delivered)
                answer = {name: bytes(piece) for name, piece in worker.answer(letter).items()}
                self.seen.append(("up", answer))
                for returned in self.spoil("up", answer):
                    self.waiting.setdefault(ids[-1], []).append(Message(content_of(returned), reply_to=message))
        return ids

    def pull(self, ids):
        return [reply for message_id in ids for reply in self.waiting.pop(message_id, [])[:1]]


def records(seed):
    generator = torch.Generator().manual_seed(seed)
    return Records(
        torch.rand(40, *SHAPE.inputs, generator=generator),
        torch.randint(0, 10, (40,), generator=generator),
        torch.ones(40, dtype=torch.bool),
    )


def make_plan(rounds, clients=2):
    noise, order = solve_noise(epsilon=3.0, delta=1e-5, sample_rate=0.2, steps=2 * (rounds + 2))
    plan = Plan(
        sample_rate=0.2,
        expected_batch=7.0,
        l2_clip=1.0,
        noise_multiplier=noise,
        steps=2,
        rounds=rounds,
        joins=rounds + 2,
        epsilon=3.0,
        delta=1e-5,
        records_bound=1000,
        mode=Mode.HOOKS,
    )
    return plan, order


def make_terms(rounds=3, clients=2, **changed):
    fields = {
        "job": "0123456789abcdef" * 2,
        "task": "digits",
        "code": CODE,
        "plan": make_plan(rounds)[0],
        "local": Local(lr=0.5),
        "seed": 1,
        "inputs": SHAPE.inputs,
        "classes": SHAPE.classes,
        "clients": clients,
    }
    return Terms(**fields | changed)


ALL = Policy(tasks=frozenset({"digits"}), epsilon=3.0)


def make_worker(folder, number, *, rounds=3, policy=ALL, sources=None, epsilon=3.0):
    secret = Secret.load_or_create(folder / "client.key") if folder.exists() else None
    if secret is None:
        folder.mkdir(parents=True)
        secret = Secret.load_or_create(folder / "client.key")
    book = Book(folder / "ledger")
    if "mine" not in book.accounts:
        grant = Grant(epsilon=epsilon, delta=1e-5, order=make_plan(rounds)[1], records_bound=1000)
        book.grant({"mine": grant}, population="mine")
    holder = Holder(
        name="mine",
        task=TASK,
        shape=SHAPE,
        load=lambda: records(number),
        book=book,
        kept=Kept(folder / "kept", durable=True, safe=Safe(book.secret, "kept")),
        sources=sources or SecureSources(),
    )
    return Worker(
        holder,
        identity=secret.identity("client"),
        server=SERVER.public_key,
        jobs=Jobs(folder / "jobs"),
        policy=lambda: policy,
        code=CODE,
    )


def members_of(workers):
    return [
        Member(number=n, name=f"hospital-{n}", public_key=worker._identity.public_key, node_id=node)
        for n, (node, worker) in enumerate(workers.items(), start=1)
    ]


def make_job(folder, terms, **changed):
    generator = torch.Generator().manual_seed(9)
    fields = {
        "id": terms.job,
        "plan": terms.plan,
        "local": terms.local,
        "task": TASK,
        "shape": SHAPE,
        "aggregator": Aggregator(strategy=Strategy.FEDAVG, lr=1.0, momentum=0.9),
        "nodes": terms.clients,
        "cohort": terms.clients,
        "seed": terms.seed,
        "schedule": Schedule.CONSTANT,
        "warmup": 0,
        "weights": lambda node: 1.0,
        "min_replies": 1,
        "timeout_s": 30.0,
        "evaluate_every": terms.plan.rounds,
        "test": (torch.rand(20, *SHAPE.inputs, generator=generator), torch.randint(0, 10, (20,), generator=generator)),
        "identity": SERVER,
        "folder": folder,
    }
    return Job(**fields | changed)


def federate(folder, spoil=lambda way, pieces: [pieces], *, workers=None, terms=None, run_id=7, sources=None, **job):
    terms = terms or make_terms()
    if workers is None:
        workers = {
            node: make_worker(folder / f"client-{node}", n, sources=sources)
            for n, node in enumerate((501, 502), start=1)
        }
    relay = FakeRelay(workers, spoil, run_id)
    grid = SealedGrid(relay, members_of(workers), SERVER, terms)
    grid.keep(grid.gather(terms.clients, patience_s=30.0))
    lines = []
    ending = run(make_job(folder / "run", terms, on_round=lines.append, **job), grid)
    return relay, lines, ending, workers


def model_of(folder):
    from server.app import CHECKPOINT
    from server.checkpoint import load

    return load(folder / "run" / CHECKPOINT).model


def test_a_job_runs_over_sealed_sessions_to_its_end(tmp_path):
    relay, lines, ending, workers = federate(tmp_path)
    assert ending is Ending.FINISHED
    assert [line["replies"] for line in lines] == [2, 2, 2]
    assert len((tmp_path / "run" / RECEIPTS).read_text().splitlines()) == 6
    for worker in workers.values():
        assert worker._holder.book.accounts["mine"].charges == 3
    assert all(set(pieces) <= {"hello", "offer", "accept", "message", "wrap", "broadcast"} for _, pieces in relay.seen)


def test_the_relay_holds_no_plaintext_of_an_update_a_model_or_a_receipt(tmp_path):
    relay, *_ = federate(tmp_path)
    carried = b"".join(piece for _, pieces in relay.seen for piece in pieces.values())
    model = model_of(tmp_path)
    weights = max(model.values(), key=lambda value: value.size).tobytes()
    receipt = (tmp_path / "run" / RECEIPTS).read_text()[:400].encode()
    for secret in (weights[:64], receipt[40:100], b"receipt", b"digits", b"noise_multiplier"):
        assert secret not in carried
    # The same search finds them where nothing is sealed, so it could have failed.
    assert weights[:64] in (tmp_path / "run/checkpoints/latest.ckpt").read_bytes()


def test_the_broadcast_is_encrypted_once_for_all_members(tmp_path):
    relay, *_ = federate(tmp_path)
    bodies = [pieces["broadcast"] for way, pieces in relay.seen if "broadcast" in pieces]
    assert len(bodies) == 6
    assert len(set(bodies)) == 3


def test_g12_a_refusal_is_as_long_as_a_release_and_the_planted_short_one_is_not(tmp_path, monkeypatch):
    def lengths(folder, epsilon):
        workers = {501: make_worker(folder, 1, epsilon=epsilon)}
        relay = FakeRelay(workers)
        terms = make_terms(clients=1)
        grid = SealedGrid(relay, members_of(workers), SERVER, terms)
        # By hand: a policy does not cover what a ledger cannot pay.
        workers[501]._jobs.offer(terms, workers[501]._holder.book.accounts["mine"], ALL)
        workers[501]._jobs.decide(terms.job, Decision.APPROVED)
        grid.keep(grid.gather(1, patience_s=5.0))
        lines = []
        run(make_job(folder / "run", terms, on_round=lines.append), grid)
        replies = [len(pieces["message"]) for way, pieces in relay.seen if way == "up" and "message" in pieces]
        return lines[0]["replies"], lines[0]["declined"], replies[1]

    released = lengths(tmp_path / "rich", 3.0)
    declined = lengths(tmp_path / "poor", 1.9)
    assert (released[:2], declined[:2]) == ((1, 0), (0, 1))
    assert released[2] == declined[2]
    model = {name: tuple(p.shape) for name, p in TASK.fresh(SHAPE, 1).named_parameters()}
    assert released[2] == sealed_bytes(reply_bytes(make_plan(3)[0], model, 10))
    monkeypatch.setattr("clients.worker.reply_bytes", lambda plan, shapes, classes: 0)
    assert lengths(tmp_path / "planted-rich", 3.0)[2] != lengths(tmp_path / "planted-poor", 1.9)[2]


def lossy(seed, share):
    dice = random.Random(seed)

    def spoil(way, pieces):
        fate = dice.random()
        if fate < share:
            return []
        if fate < 2 * share:
            return [pieces, pieces]
        if fate < 3 * share:
            name = dice.choice(sorted(pieces))
            piece = bytearray(pieces[name])
            if piece:
                piece[dice.randrange(len(piece))] ^= 1 << dice.randrange(8)
            return [{**pieces, name: bytes(piece)}]
        if fate < 4 * share:
            return [{LOST: b""}] if way == "up" else [{"message": b"garbage"}]
        return [pieces]

    return spoil


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))])
def test_g9_a_relay_that_drops_doubles_and_alters_costs_no_charge_and_changes_no_model(tmp_path, seed):
    _, _, _, calm = federate(tmp_path / "calm", sources=SeededSources())
    _, lines, ending, workers = federate(tmp_path / "wild", lossy(seed, 0.08), sources=SeededSources())
    assert ending is Ending.FINISHED
    assert [line["replies"] for line in lines] == [2, 2, 2]
    charges = [worker._holder.book.accounts["mine"].charges for worker in workers.values()]
    assert charges == [3, 3] == [worker._holder.book.accounts["mine"].charges for worker in calm.values()]
    # Accounts have random identities, which test sources do not use; so the same noise gives the same model.
    quiet, loud = model_of(tmp_path / "calm"), model_of(tmp_path / "wild")
    assert all(np.array_equal(quiet[name], loud[name]) for name in quiet)


def test_a_worker_that_restarts_in_mid_run_rejoins_and_is_charged_once_for_each_round(tmp_path):
    workers = {501: make_worker(tmp_path / "a", 1), 502: make_worker(tmp_path / "b", 2)}
    rounds_seen = []

    def spoil(way, pieces):
        if way == "up" and "message" in pieces and len(rounds_seen) < 99:
            rounds_seen.append(1)
            if len(rounds_seen) == 5:
                # Killed after the release was kept, before its reply left: memory is gone, the files are not.
                relay_workers[501] = make_worker(tmp_path / "a", 1)
                return []
        return [pieces]

    relay_workers = workers
    _, lines, ending, _ = federate(tmp_path, spoil, workers=workers)
    assert ending is Ending.FINISHED
    assert [line["replies"] for line in lines] == [2, 2, 2]
    assert [worker._holder.book.accounts["mine"].charges for worker in workers.values()] == [3, 3]


def test_a_node_that_comes_anew_is_told_again_at_once_what_it_was_carrying(tmp_path, monkeypatch):
    def seconds(folder, comes):
        lost = []

        def spoil(way, pieces):
            if way == "down" and "broadcast" in pieces and not lost:
                lost.append(pieces)
                if comes:
                    # Killed with the message in its hands, and started again.
                    relays[0].arrivals[501] = "second"
                return []
            return [pieces]

        relays = []
        first = FakeRelay.__init__

        def noted(self, *arguments):
            first(self, *arguments)
            relays.append(self)

        with monkeypatch.context() as patch:
            patch.setattr(FakeRelay, "__init__", noted)
            _, lines, ending, workers = federate(folder, spoil)
        assert ending is Ending.FINISHED
        assert [line["replies"] for line in lines] == [2, 2, 2]
        assert [worker._holder.book.accounts["mine"].charges for worker in workers.values()] == [3, 3]
        return lines[0]["seconds"]

    monkeypatch.setattr(sealed, "_FIRST_PATIENCE_S", 5.0)
    monkeypatch.setattr(sealed, "_LONGEST_PATIENCE_S", 5.0)
    assert seconds(tmp_path / "comes", True) < 5.0 <= seconds(tmp_path / "stays", False)


def test_a_round_waits_a_while_for_a_member_that_is_not_connected_and_no_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "_MOST_AWAY_S", 0.5)
    told = []

    def on_round(line):
        told.append(line)
        relays[0].away = {501} if 1 <= len(told) < 3 else set()

    relays = []
    first = FakeRelay.__init__

    def noted(self, *arguments):
        first(self, *arguments)
        relays.append(self)

    monkeypatch.setattr(FakeRelay, "__init__", noted)
    terms = make_terms(rounds=5)
    workers = {node: make_worker(tmp_path / f"client-{node}", n, rounds=5) for n, node in enumerate((501, 502), 1)}
    relay = FakeRelay(workers)
    grid = SealedGrid(relay, members_of(workers), SERVER, terms)
    grid.keep(grid.gather(2, patience_s=30.0))
    run(make_job(tmp_path / "run", terms, on_round=on_round, timeout_s=60.0), grid)
    assert [line["replies"] for line in told] == [2, 1, 1, 2, 2]
    # The first of them waits for it to come back; the second knows already, and the one after has it again.
    assert 0.5 <= told[1]["seconds"] < 30.0
    assert told[2]["seconds"] < told[1]["seconds"]


def test_a_round_is_not_over_because_nobody_is_connected(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "_MOST_AWAY_S", 0.1)
    nodes, asked = FakeRelay.nodes, []

    def none_there_for_a_second(self):
        asked.append(time.monotonic())
        # Once all have answered to the terms.
        if any("wrap" in pieces for _, pieces in self.seen) or asked[-1] - asked[0] < 0.5 or asked[-1] - asked[0] > 2.0:
            return nodes(self)
        return {}

    monkeypatch.setattr(FakeRelay, "nodes", none_there_for_a_second)
    workers = {node: make_worker(tmp_path / f"client-{node}", n) for n, node in enumerate((501, 502), 1)}
    grid = SealedGrid(FakeRelay(workers), members_of(workers), SERVER, make_terms())
    grid.keep(grid.gather(2, patience_s=30.0))
    while time.monotonic() - asked[0] < 0.6:
        time.sleep(0.05)
    lines = []
    run(make_job(tmp_path / "run", make_terms(), on_round=lines.append, timeout_s=60.0), grid)
    assert [line["replies"] for line in lines] == [2, 2, 2]
    assert lines[0]["seconds"] > 0.5


def test_what_a_relay_that_was_away_may_have_lost_is_said_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "_FIRST_PATIENCE_S", 600.0)
    asked = []
    push = FakeRelay.push

    def pushed(self, messages):
        asked.append(self)
        if len(asked) == 3:
            # A round's request: half of it was there when the relay fell.
            raise httpx.ConnectError("connection refused")
        return push(self, messages)

    monkeypatch.setattr(FakeRelay, "push", pushed)
    _, lines, ending, _ = federate(tmp_path)
    assert ending is Ending.FINISHED
    assert [line["replies"] for line in lines] == [2, 2, 2]


def relay_away(monkeypatch, error, seconds):
    """The relay does not answer for so long, once a round was asked for."""
    push, fell = FakeRelay.push, []

    def pushed(self, messages):
        if fell and time.monotonic() - fell[0] < seconds:
            raise error
        sent = push(self, messages)
        if not fell and any("broadcast" in pieces for _, pieces in self.seen):
            # Its answers are lost with it.
            fell.append(time.monotonic())
            self.waiting.clear()
        return sent

    monkeypatch.setattr(FakeRelay, "push", pushed)


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("connection refused"), RunError("expected Flower's format, got something else")]
)
def test_nobody_is_late_because_the_relay_is_away_and_the_log_says_what_is_waited_for(
    tmp_path, monkeypatch, caplog, error
):
    relay_away(monkeypatch, error, 1.2)
    _, lines, ending, workers = federate(tmp_path, timeout_s=0.8)
    assert ending is Ending.FINISHED
    # Twin: with a clock that goes on, the first round would have been over with no reply.
    assert lines[0]["seconds"] > 1.2
    assert [line["replies"] for line in lines] == [2, 2, 2]
    assert [worker._holder.book.accounts["mine"].charges for worker in workers.values()] == [3, 3]
    said = [record.message for record in caplog.records if "the relay" in record.message]
    assert len(said) == 2
    assert str(error) in said[0]
    assert "tacit server start" in said[0]
    assert "answers again" in said[1]


def test_a_relay_that_stays_away_ends_the_job_to_be_resumed_and_so_does_who_stops_it(tmp_path, monkeypatch):
    relay_away(monkeypatch, httpx.ConnectError("connection refused"), 600.0)
    grid_of, ends = SealedGrid.__init__, []

    def given(**options):
        monkeypatch.setattr(SealedGrid, "__init__", lambda self, *fields: grid_of(self, *fields, **options))
        ends[:] = [time.monotonic() + 0.5]

    given(relay_wait_s=0.3)
    with pytest.raises(RunError, match="--resume"):
        federate(tmp_path / "away")
    given(stopping=lambda: time.monotonic() > ends[0])
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "stopped")
    assert 0.0 < time.monotonic() - ends[0] < 30.0


def test_who_is_told_to_stop_while_it_waits_for_clients_stops_and_calls_it_no_failure(tmp_path):
    asked = []
    workers = {501: make_worker(tmp_path / "client", 1)}
    relay = FakeRelay(workers)
    relay.away = {501}
    grid = SealedGrid(relay, members_of(workers), SERVER, make_terms(), stopping=lambda: len(asked) > 2)
    with pytest.raises(KeyboardInterrupt):
        grid.gather(1, patience_s=30.0, seen=lambda: asked.append(1))
    assert len(asked) == 3
    # Twin: who is not told to stop hears who is not there.
    with pytest.raises(RunError, match="hospital-1: not connected"):
        SealedGrid(relay, members_of(workers), SERVER, make_terms()).gather(1, patience_s=0.1)


def test_a_run_that_the_relay_has_ended_ends_the_job_to_be_resumed_and_is_not_waited_for(tmp_path, monkeypatch):
    push = FakeRelay.push

    def pushed(self, messages):
        if any("broadcast" in pieces for _, pieces in self.seen):
            raise sealed.RunOverError("expected a run, got none; go on with: tacit server run --resume")
        return push(self, messages)

    monkeypatch.setattr(FakeRelay, "push", pushed)
    with pytest.raises(RunError, match="--resume"):
        federate(tmp_path)


def test_g19_a_resumed_job_opens_a_new_epoch_and_messages_of_the_old_one_are_refused(tmp_path):
    terms = make_terms()
    stop = []
    relay, lines, ending, workers = federate(tmp_path, stopping=lambda: not stop.append(1), terms=terms)
    assert ending is Ending.INTERRUPTED
    old = [pieces for way, pieces in relay.seen if way == "down" and "broadcast" in pieces][-1]
    _, lines, ending, _ = federate(tmp_path, workers=workers, terms=terms, run_id=8)
    assert ending is Ending.FINISHED
    assert [line["round"] for line in lines] == [2, 3]
    worker = workers[501]
    before = worker.rounds
    for run_id in (7, 8):
        assert set(worker.answer(Letter(run_id, BUNDLE, old))) == {LOST}
    assert worker.rounds == before


def test_g19_the_hello_of_an_earlier_run_said_again_does_not_close_the_session_that_is_open(tmp_path):
    terms = make_terms()
    relay, _, _, workers = federate(tmp_path, stopping=lambda: True, terms=terms)
    old = [pieces for way, pieces in relay.seen if "hello" in pieces]
    calls = []

    def replaying(way, pieces):
        if way == "down" and "broadcast" in pieces:
            calls.append([set(worker.answer(Letter(7, BUNDLE, hello))) for worker in workers.values() for hello in old])
        return [pieces]

    _, lines, ending, _ = federate(tmp_path, replaying, workers=workers, terms=terms, run_id=8)
    assert ending is Ending.FINISHED
    assert [line["replies"] for line in lines] == [2, 2]
    # Each worker answers the genuine old hello that names it, and loses nothing by it; nothing was asked twice.
    assert all({"offer"} in answers for answers in calls)
    assert len(calls) == 4


def test_a_replayed_round_is_refused_and_a_planted_session_that_forgets_its_count_plays_it(tmp_path, monkeypatch):
    relay, _, _, workers = federate(tmp_path)
    last = [pieces for way, pieces in relay.seen if way == "down" and "broadcast" in pieces][-1]
    owner = next(w for w in workers.values() if w._epoch.ends.session)
    before = [worker.rounds for worker in workers.values()]
    for worker in workers.values():
        assert set(worker.answer(Letter(7, BUNDLE, last))) == {LOST}
    assert [worker.rounds for worker in workers.values()] == before
    for worker in workers.values():
        session = worker._epoch.ends.session
        for lane in (*session._lanes.values(), session._wraps):
            lane._taken = 0
    played = [set(worker.answer(Letter(7, BUNDLE, last))) for worker in workers.values()]
    assert {"message"} in played, owner


@pytest.mark.parametrize(
    "changed",
    [
        {"task": "breast-cancer"},
        {"code": "d" * 64},
        {"inputs": (1, 9, 9)},
        {"classes": 11},
    ],
)
def test_g15_terms_for_other_code_or_another_task_are_refused_before_any_charge(tmp_path, changed):
    workers = {501: make_worker(tmp_path / "a", 1)}
    grid = SealedGrid(FakeRelay(workers), members_of(workers), SERVER, make_terms(clients=1, **changed))
    with pytest.raises(RunError, match="other-"):
        grid.gather(1, patience_s=0.3)
    assert not workers[501]._holder.book.accounts["mine"].jobs


def test_a_job_waits_until_its_holder_approves_it_and_stops_when_that_is_taken_back(tmp_path):
    workers = {501: make_worker(tmp_path / "a", 1, policy=Policy())}
    jobs, terms = Jobs(tmp_path / "a" / "jobs"), make_terms(clients=1)
    grid = SealedGrid(FakeRelay(workers), members_of(workers), SERVER, terms)
    with pytest.raises(RunError, match="waiting"):
        grid.gather(1, patience_s=0.3)
    assert jobs.get(terms.job).decision is Decision.WAITING
    jobs.decide(terms.job, Decision.APPROVED)
    grid.keep(grid.gather(1, patience_s=5.0))
    lines = []

    def withdraw(line):
        lines.append(line)
        jobs.decide(terms.job, Decision.REFUSED)

    run(make_job(tmp_path / "run", terms, on_round=withdraw), grid)
    assert [line["replies"] for line in lines] == [1, 0, 0]
    assert jobs.get(terms.job).decision is Decision.WITHDRAWN
    assert workers[501]._holder.book.accounts["mine"].charges == 1


def test_a_round_on_other_terms_than_were_approved_is_refused(tmp_path):
    workers = {501: make_worker(tmp_path / "a", 1)}
    terms = make_terms(clients=1)
    grid = SealedGrid(FakeRelay(workers), members_of(workers), SERVER, terms)
    grid.keep(grid.gather(1, patience_s=5.0))
    lines = []
    run(make_job(tmp_path / "run", terms, local=Local(lr=0.25), on_round=lines.append), grid)
    assert [line["replies"] for line in lines] == [0, 0, 0]
    assert workers[501]._holder.book.accounts["mine"].charges == 0


def test_an_unknown_client_and_a_foreign_server_get_no_session(tmp_path):
    worker = make_worker(tmp_path / "a", 1)
    stranger = Secret(bytes(32)).identity("server")
    for identity, key in ((stranger, worker._identity.public_key), (SERVER, stranger.public_key)):
        member = Member(number=1, name="a", public_key=key, node_id=501)
        grid = SealedGrid(FakeRelay({501: worker}), [member], identity, make_terms(clients=1))
        with pytest.raises(RunError, match="expected 1 clients to be ready, got 0"):
            grid.gather(1, patience_s=0.2)
    assert worker._epoch is None


def test_a_client_that_is_away_is_missing_and_the_round_goes_on(tmp_path):
    workers = {501: make_worker(tmp_path / "a", 1), 502: make_worker(tmp_path / "b", 2)}
    relay = FakeRelay(workers)
    grid = SealedGrid(relay, members_of(workers), SERVER, make_terms())
    grid.keep(grid.gather(2, patience_s=5.0))
    lines = []

    def leave(line):
        lines.append(line)
        relay.away = {502}

    began = time.monotonic()
    run(make_job(tmp_path / "run", make_terms(), on_round=leave, timeout_s=0.5), grid)
    assert [(line["replies"], line["missing"]) for line in lines] == [(2, 0), (1, 1), (1, 1)]
    assert time.monotonic() - began < 20


def test_terms_have_one_text_and_say_what_they_cost(tmp_path):
    terms = make_terms()
    assert Terms.from_json(terms.to_json()) == terms
    worker = make_worker(tmp_path / "a", 1)
    cost = cost_of(terms, worker._holder.book.accounts["mine"])
    assert cost.spent == 0
    assert 2.5 < cost.after <= 3.0
    assert cost.affordable
    half = make_worker(tmp_path / "b", 1, epsilon=2.0)
    assert not cost_of(terms, half._holder.book.accounts["mine"]).affordable


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_pieces_long_and_short_are_carried_whole_and_a_short_message_is_three_objects(size):
    pieces = {"message": bytes(size), "wrap": b"w"}
    message = Message(content_of(pieces), 1, "train")
    assert pieces_of(message) == pieces == sealed._pieces_of(message.content)
    # A message, its records, and what they hold: a relay is asked for each by itself.
    assert len(get_all_nested_objects(message)) == (3 if size <= 1 << 20 else 6)


def test_a_message_with_anything_else_than_sealed_pieces_is_not_handed_on():
    for content in (
        RecordDict(),
        RecordDict({"sealed": ArrayRecord({"secret": Array(np.zeros(3, np.uint8))})}),
        RecordDict({"sealed": ArrayRecord(), "more": ArrayRecord()}),
        RecordDict({"sealed": ConfigRecord({"message": b"x"}), "more": ConfigRecord()}),
        RecordDict({"sealed": ConfigRecord({"message": "text"})}),
        RecordDict({"sealed": ConfigRecord({"secret": b"x"})}),
        RecordDict({"sealed": ConfigRecord({"message": b"x"}), "shared": ConfigRecord({"message": b"y"})}),
    ):
        with pytest.raises(RunError, match="sealed message"):
            pieces_of(Message(content, 1, "train"))
