"""Rounds of a trusted server (G16): what is stored before what, what a crash may repeat, and what a reply may do."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients.app import client_app, encode
from clients.holder import Holder, Kept, SecureSources
from clients.records import Records
from models.catalog import TASKS
from models.shape import Shape
from privacy.accounting import Event, Grant
from privacy.errors import PlanError, RunError
from privacy.identity import Secret
from privacy.ledger import Book, Receipt
from privacy.noise import Keystream
from privacy.plan import Local, Plan, Unit
from privacy.vault import Safe
from server import app as server_app_module
from server import central
from server.aggregate import Aggregator, Strategy
from server.app import CHECKPOINT, METRICS, RECEIPTS, Ending, Job, Schedule, run, trainable
from server.checkpoint import State, load, save
from simulations.engine import LocalGrid

SHAPE = Shape(inputs=(1, 8, 8), classes=10)
TASK = TASKS["digits"]
CLIENTS, ROUNDS = 6, 3


@pytest.fixture(autouse=True)
def _identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


class Silent:
    """Coins are real, noise is none: shows what the noise would have to hide."""

    name = "silent"

    def coins(self, n, rate):
        return Keystream().coins(n, rate)

    def gaussian(self, n):
        return torch.zeros(n, dtype=torch.float64)


def central_plan(**changes):
    fields = {
        "unit": Unit.CLIENT,
        "sample_rate": 1.0,
        "expected_batch": CLIENTS * 0.5,
        "client_rate": 0.5,
        "l2_clip": 0.5,
        "noise_multiplier": 1.0,
        "steps": 1,
        "rounds": ROUNDS,
        "joins": 3 * ROUNDS,
        "turns": ROUNDS,
        "epsilon": 100.0,
        "delta": 1e-5,
        "records_bound": 1000,
    }
    return Plan(**fields | changes)


def make_job(folder, *, plan=None, aggregator=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(
        id="ab" * 16,
        plan=plan or central_plan(),
        local=Local(lr=0.5),
        task=TASK,
        shape=SHAPE,
        aggregator=aggregator or Aggregator(),
        nodes=CLIENTS,
        cohort=CLIENTS,
        seed=0,
        schedule=Schedule.CONSTANT,
        warmup=0,
        weights=lambda node: 1.0,
        min_replies=1,
        timeout_s=None,
        evaluate_every=1,
        test=TASK.synthetic(SHAPE, 50, torch.Generator().manual_seed(1)),
        identity=Secret.load_or_create(folder / "server.key").identity("server"),
        folder=folder,
    )
    return dataclasses.replace(job, **changes)


def open_book(folder, unit=Unit.CLIENT):
    book = Book(folder / "ledgers")
    grant = Grant(epsilon=100.0, delta=1e-5, order=1.5, unit=unit, records_bound=1000)
    book.grant({f"c{node}": grant for node in range(1, CLIENTS + 1)}, population="test")
    return book


def honest(book, folder, *, allow_central=True):
    def find(context):
        node = context.node_id
        x, y = TASK.synthetic(SHAPE, 20, torch.Generator().manual_seed(node))
        return Holder(
            name=f"c{node}",
            task=TASK,
            shape=SHAPE,
            load=lambda: Records(x, y, torch.ones(20, dtype=torch.bool)),
            book=book,
            kept=Kept(folder / "kept", durable=False, safe=Safe(Secret(bytes(32)), "kept")),
            sources=SecureSources(),
            allow_central=allow_central,
        )

    return client_app(find)


def play(job, app):
    with LocalGrid(app, nodes=CLIENTS, run_config={}) as grid:
        return run(job, grid)


def lines(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def flat(model):
    return np.concatenate([value.reshape(-1) for value in model.values()]).astype(np.float64)


FIRST = flat(trainable(TASK.fresh(SHAPE, 0)))


def test_a_job_for_clients_plays_its_rounds_and_leaves_lines_receipts_and_a_checkpoint(tmp_path):
    job = make_job(tmp_path)
    with open_book(tmp_path) as book:
        assert play(job, honest(book, tmp_path)) is Ending.FINISHED
        charges = {account.name: account.charges for account in book.accounts.values()}
    told = lines(tmp_path)
    assert [line["round"] for line in told] == [1, 2, 3]
    assert all(line["missing"] == 0 and line["metrics"] for line in told)
    receipts = [Receipt.from_json(json.loads(t)["receipt"]) for t in (tmp_path / RECEIPTS).read_text().splitlines()]
    assert {receipt.event for receipt in receipts} <= {Event.of_round(job.plan)}
    state = load(tmp_path / CHECKPOINT)
    assert sum(line["replies"] for line in told) == len(receipts) == sum(charges.values())
    assert sum(state.central.counted.values()) == len(receipts)
    assert state.central.pending is None
    assert not np.array_equal(flat(state.model), FIRST)


@pytest.mark.parametrize("how", ["lost", "rolled back"])
def test_g16_no_round_that_was_told_is_drawn_again_from_a_lost_or_an_older_checkpoint(tmp_path, monkeypatch, how):
    """New coins and new noise for a finished round would be a second release of it."""
    with open_book(tmp_path) as book:
        assert play(make_job(tmp_path, stopping=lambda: True), honest(book, tmp_path)) is Ending.INTERRUPTED
        older = (tmp_path / CHECKPOINT).read_bytes()
        assert play(make_job(tmp_path), honest(book, tmp_path)) is Ending.FINISHED
        (tmp_path / CHECKPOINT).write_bytes(older)
        if how == "lost":
            (tmp_path / CHECKPOINT).unlink()
        told, charges = lines(tmp_path), [account.charges for account in book.accounts.values()]
        with pytest.raises(RunError, match="newest checkpoint of 3 rounds"):
            play(make_job(tmp_path), honest(book, tmp_path))
        assert lines(tmp_path) == told
        assert [account.charges for account in book.accounts.values()] == charges
        # The planted bug: a server that takes whatever checkpoint it finds tells finished rounds again.
        monkeypatch.setattr(server_app_module, "_require_newest", lambda *_, **__: None)
        assert play(make_job(tmp_path), honest(book, tmp_path)) is Ending.FINISHED
        assert lines(tmp_path) != told


@pytest.mark.parametrize("strategy", [Strategy.FEDAVGM, Strategy.FEDADAM])
def test_the_servers_rules_run_on_the_noised_mean_and_an_interrupted_job_goes_on(tmp_path, strategy):
    with open_book(tmp_path) as book:
        stopped = make_job(tmp_path, aggregator=Aggregator(strategy=strategy), stopping=lambda: True)
        assert play(stopped, honest(book, tmp_path)) is Ending.INTERRUPTED
        again = make_job(tmp_path, aggregator=Aggregator(strategy=strategy))
        assert play(again, honest(book, tmp_path)) is Ending.FINISHED
    assert [line["round"] for line in lines(tmp_path)] == [1, 2, 3]
    assert np.isfinite(flat(load(tmp_path / CHECKPOINT).model)).all()


def test_a_divisor_that_is_not_the_expected_cohort_is_refused(tmp_path):
    job = make_job(tmp_path, plan=central_plan(expected_batch=4.0))
    with open_book(tmp_path) as book, pytest.raises(PlanError, match="divisor"):
        play(job, honest(book, tmp_path))


def test_g16_a_holder_without_the_policy_is_never_charged_and_the_job_plays_on(tmp_path):
    with open_book(tmp_path) as book:
        assert play(make_job(tmp_path), honest(book, tmp_path, allow_central=False)) is Ending.FINISHED
        assert all(account.charges == 0 for account in book.accounts.values())
    assert [line["replies"] for line in lines(tmp_path)] == [0, 0, 0]


def test_g16_a_ledger_for_records_declines_and_the_job_plays_on(tmp_path):
    with open_book(tmp_path, Unit.RECORD) as book:
        assert play(make_job(tmp_path), honest(book, tmp_path)) is Ending.FINISHED
        assert all(account.charges == 0 for account in book.accounts.values())


# -- what a reply may do ----------------------------------------------------------------------------------------


def hostile(value):
    """A client that pays and sends something else instead of its clipped update."""

    def wrap(app):
        def call(message, context):
            reply = app(message, context)
            shapes = {name: array.shape for name, array in message.content["arrays"].items()}
            size = sum(math.prod(shape) for shape in shapes.values())
            content = RecordDict(
                {
                    "arrays": encode(np.full(size, value, dtype=np.float32), shapes),
                    "receipt": reply.content["receipt"],
                }
            )
            return Message(content, reply_to=message)

        return call

    return wrap


def require_bounded(folder):
    for number, value in enumerate((3e38, -1e10, math.nan, math.inf, 0.0)):
        home = folder / str(number)
        job = make_job(home, plan=central_plan(client_rate=1.0, expected_batch=6.0, rounds=1))
        job = dataclasses.replace(job, sources=lambda use, round: Silent())
        with open_book(home) as book:
            play(job, hostile(value)(honest(book, home)))
        moved = np.linalg.norm(flat(load(home / CHECKPOINT).model) - FIRST)
        assert moved <= job.plan.l2_clip * 1.0001, f"all clients together moved the mean by {moved}"


def test_g16_whatever_clients_send_the_server_clips_it(tmp_path):
    require_bounded(tmp_path)


def test_g16_planted_bug_a_server_that_trusts_its_clients_to_clip_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr("privacy.central.clip_update", lambda update, clip: (update.astype(np.float64), True))
    with pytest.raises(AssertionError, match="moved the mean"):
        require_bounded(tmp_path)


class Twice(LocalGrid):
    """A relay that delivers every reply twice."""

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        return [*replies, *replies]


def test_g16_a_reply_that_is_delivered_twice_counts_once(tmp_path):
    job = make_job(tmp_path, plan=central_plan(client_rate=1.0, expected_batch=6.0, rounds=1))
    with open_book(tmp_path) as book, Twice(honest(book, tmp_path), nodes=CLIENTS, run_config={}) as grid:
        run(job, grid)
    assert lines(tmp_path)[0]["replies"] == CLIENTS


def copied(app):
    """A relay that answers in every node's name with the first node's reply; the first round's requests are equal."""
    first = []

    def call(message, context):
        if not first:
            first.append(app(message, context).content)
        return Message(first[0], reply_to=message)

    return call


def require_one_share(folder):
    job = make_job(folder, plan=central_plan(client_rate=1.0, expected_batch=6.0, rounds=1))
    job = dataclasses.replace(job, sources=lambda use, round: Silent())
    with open_book(folder) as book:
        play(job, copied(hostile(3e38)(honest(book, folder))))
    moved = np.linalg.norm(flat(load(folder / CHECKPOINT).model) - FIRST) * job.plan.expected_batch
    assert moved <= job.plan.l2_clip * 1.0001, f"one client moved the sum by {moved}"
    assert lines(folder)[0]["replies"] == 1


def test_g16_a_reply_copied_under_other_nodes_numbers_counts_once(tmp_path):
    require_one_share(tmp_path)


def test_g16_planted_bug_a_server_that_counts_nodes_instead_of_data_sets_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(central, "_keep_one_each", lambda updates: None)
    with pytest.raises(AssertionError, match="one client moved"):
        require_one_share(tmp_path)


# -- drop-outs and empty cohorts --------------------------------------------------------------------------------


def broken(message, context):
    raise RuntimeError("this client crashed")


def noise_of_a_round(folder, app, plan):
    """Returns the standard deviation of what a round without any update added, times the public divisor."""
    job = make_job(folder, plan=plan)
    play(job, app)
    return float((flat(load(folder / CHECKPOINT).model) - FIRST).std() * plan.expected_batch)


def require_full_noise(folder):
    """Fails where a round has less noise because fewer replied. False alarms below 1e-6 (5 sigma of 650 draws)."""
    for name, rate in (("all missing", 1.0), ("nobody drawn", 1e-9)):
        plan = central_plan(client_rate=rate, expected_batch=CLIENTS * rate, rounds=1)
        stated = plan.noise_multiplier * plan.l2_clip
        found = noise_of_a_round(folder / name, broken, plan)
        assert abs(found / stated - 1) < 5 / math.sqrt(2 * len(FIRST)), f"{name}: noise {found}, not {stated}"


@pytest.mark.statistical
@pytest.mark.filterwarnings("ignore")
def test_g16_missing_replies_and_an_empty_cohort_leave_the_full_noise(tmp_path):
    require_full_noise(tmp_path)


@pytest.mark.statistical
@pytest.mark.filterwarnings("ignore")
def test_g16_planted_bug_a_round_without_replies_that_leaves_the_model_is_caught(tmp_path, monkeypatch):
    make = central.central.aggregate

    def skipping(contributions, size, plan, clip, source):
        if not contributions:
            return central.central.Aggregate(np.zeros(size, dtype=np.float32), clip)
        return make(contributions, size, plan, clip, source)

    monkeypatch.setattr("privacy.central.aggregate", skipping)
    with pytest.raises(AssertionError, match="not"):
        require_full_noise(tmp_path)


class Counting:
    """Counts how often coins are thrown and noise is drawn."""

    name = "counting"

    def __init__(self, seen, use, round):
        self._seen, self._key, self._real = seen, (use, round), Keystream()

    def coins(self, n, rate):
        self._seen.append((*self._key, "coins"))
        return self._real.coins(n, rate)

    def gaussian(self, n):
        self._seen.append((*self._key, "noise"))
        return self._real.gaussian(n)


def require_one_draw(folder):
    """Fails where a round throws its coins twice, or leaves out its noise."""
    seen = []
    plan = central_plan(client_rate=1e-9, expected_batch=CLIENTS * 1e-9)
    job = make_job(folder, plan=plan, sources=lambda use, round: Counting(seen, use, round), min_replies=4)
    play(job, broken)
    wanted = [(use, number, what) for number in (1, 2, 3) for use, what in (("cohort", "coins"), ("noise", "noise"))]
    assert seen == wanted, f"drawn: {seen}"


def test_g16_one_draw_a_round_however_thin_the_cohort(tmp_path):
    require_one_draw(tmp_path)


def test_g16_planted_bug_a_server_that_redraws_a_thin_cohort_is_caught(tmp_path, monkeypatch):
    draw = central.central.draw_cohort

    def redrawn(*arguments):
        return draw(*arguments) or draw(*arguments)

    monkeypatch.setattr("privacy.central.draw_cohort", redrawn)
    with pytest.raises(AssertionError, match="drawn"):
        require_one_draw(tmp_path)


# -- killed anywhere --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends the server's process, as far as the server can tell."""


class Story:
    """Counts the steps of a server, kills it at one of them, and writes down what left it, over all its lives."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.kill_at, self.step = folder, 0, 0
        self.cohorts, self.models, self.stored = {}, {}, []
        for module, name in ((central, "save"), (central, "write_lines"), (server_app_module, "save")):
            monkeypatch.setattr(module, name, self.counted(getattr(module, name)))
        monkeypatch.setattr(central, "evaluate", self.counted(self.told(central.evaluate)))
        story = self

        class Grid(LocalGrid):
            def send_and_receive(self, messages, *, timeout=None):
                sent = list(messages)
                story.asked(sent)
                story.tick()
                replies = super().send_and_receive(sent, timeout=timeout)
                story.tick()
                return replies

        self.grid = Grid

    def tick(self):
        self.step += 1
        if self.step == self.kill_at:
            raise Killed

    def counted(self, function):
        def call(*args, **kwargs):
            self.tick()
            result = function(*args, **kwargs)
            self.tick()
            return result

        return call

    def asked(self, messages):
        """A request leaves: it names a cohort, and shows the model of the round before."""
        number = messages[0].content["job"]["round"]
        self.cohorts.setdefault(number, set()).add(tuple(m.metadata.dst_node_id for m in messages))
        model = hashlib.sha256(b"".join(a.data for a in messages[0].content["arrays"].values())).hexdigest()
        self.models.setdefault(number - 1, set()).add(("asked", model))
        memory = load(self.folder / CHECKPOINT).central
        self.stored.append(memory is not None and (memory.round, memory.cohort) == (number, [*self.cohort(messages)]))

    def cohort(self, messages):
        return [m.metadata.dst_node_id for m in messages]

    def told(self, evaluate):
        def call(job, model, arrays):
            digest = hashlib.sha256(b"".join(value.tobytes() for value in arrays.values())).hexdigest()
            number = load(self.folder / CHECKPOINT).round
            self.models.setdefault(number, set()).add(("told", digest))
            return evaluate(job, model, arrays)

        return call

    def live(self, book, kill_at):
        self.kill_at, self.step = kill_at, 0
        with contextlib.suppress(Killed), self.grid(honest(book, self.folder), nodes=CLIENTS, run_config={}) as grid:
            # Rate 1/2: an empty cohort of six (one in 64) asks nobody, which `asked` never sees.
            return run(make_job(self.folder), grid)
        return None

    def check(self):
        assert all(self.stored), "a message left before its cohort was stored"
        assert all(len(cohorts) == 1 for cohorts in self.cohorts.values()), "a cohort was drawn again"
        for kind in ("asked", "told"):
            for number, seen in self.models.items():
                models = {model for what, model in seen if what == kind}
                assert len(models) <= 1, f"two noised models of round {number} left"
        assert [line["round"] for line in lines(self.folder)] == [1, 2, 3]
        assert len(load(self.folder / CHECKPOINT).model) == 2


def tell(monkeypatch, folder, kills, plant=lambda: None):
    """Lets a job live and die at the given steps, then to its end; returns how many steps an undisturbed life has."""
    with monkeypatch.context() as patches:
        plant(patches)
        story = Story(patches, folder)
        with open_book(folder) as book:
            for kill_at in (*kills, 0):
                if story.live(book, kill_at) is Ending.FINISHED:
                    break
            charges = {account.identity: account.charges for account in book.accounts.values()}
        steps = story.step
        story.check()
        receipts = [Receipt.from_json(json.loads(t)["receipt"]) for t in (folder / RECEIPTS).read_text().splitlines()]
        assert len({(receipt.account, receipt.round) for receipt in receipts}) == len(receipts)
        assert sum(charges.values()) >= len(receipts)
    return steps


def nothing(patches):
    """Plants nothing."""


def test_g16_killed_at_any_step_one_cohort_is_asked_and_one_noised_model_leaves(tmp_path, monkeypatch):
    steps = tell(monkeypatch, tmp_path / "undisturbed", [], nothing)
    assert steps > 20
    for kill_at in range(1, steps + 1):
        tell(monkeypatch, tmp_path / str(kill_at), [kill_at, kill_at // 2 + 3], nothing)


def cohort_not_stored(patches):
    """Planted bug: the cohort is stored with the round, after everybody was asked."""
    real = save

    def skipping(state, path):
        if state.central.pending is not None:
            real(state, path)

    patches.setattr(central, "save", skipping)


def noise_not_kept(patches):
    """Planted bug: the round is evaluated and written down before its noised model is stored."""
    real = save

    def skipping(state, path):
        if state.central.pending is None:
            real(state, path)

    patches.setattr(central, "save", skipping)


@pytest.mark.parametrize(("bug", "found"), [(cohort_not_stored, "cohort"), (noise_not_kept, "two noised models")])
def test_g16_planted_bugs_in_what_is_stored_before_what_are_caught(tmp_path, monkeypatch, bug, found):
    def live_and_die():
        for kill_at in itertools.count(1):
            if kill_at > tell(monkeypatch, tmp_path / str(kill_at), [kill_at], bug):
                return

    with pytest.raises(AssertionError, match=found):
        live_and_die()


# -- checkpoints ------------------------------------------------------------------------------------------------


def test_a_checkpoint_keeps_coins_and_a_pending_round_and_one_without_them_reads_as_before(tmp_path):
    model = trainable(TASK.fresh(SHAPE, 0))
    plain = State(job="j", round=1, model=model)
    save(plain, tmp_path / "plain")
    assert b"central" not in (tmp_path / "plain").read_bytes()
    assert load(tmp_path / "plain").central is None
    memory = central.Central(
        clip=0.1, round=2, cohort=[3, 5], counted={3: 1, 5: 2}, pending={"line": {"round": 2}, "receipts": ["x"]}
    )
    save(dataclasses.replace(plain, central=memory), tmp_path / "central")
    assert load(tmp_path / "central").central == memory
    content = (tmp_path / "central").read_bytes()
    (tmp_path / "cut").write_bytes(content.replace(b'"cohort":[3,5]', b'"cohort":7777'))
    with pytest.raises(RunError, match="damaged"):
        load(tmp_path / "cut")
