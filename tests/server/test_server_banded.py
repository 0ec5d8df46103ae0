"""Rounds with banded noise (G16): one drawing for all rounds, turns instead of coins, and no second start."""

import contextlib
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from clients.app import parse_request
from privacy.accounting import Event, Kind
from privacy.central import Contribution, clipped_sum
from privacy.errors import PlanError, RunError
from privacy.identity import Secret
from privacy.ledger import Receipt, Word
from privacy.matrix import CorrelatedNoise, Turns, matrix_of
from privacy.noise import SECURE_SOURCE, Keystream
from privacy.plan import Banded
from privacy.vault import Safe
from server import central
from server.app import CHECKPOINT, RECEIPTS, Ending, ask, run
from server.checkpoint import load
from tests.server.test_server_central import (
    CLIENTS,
    FIRST,
    Killed,
    Silent,
    Story,
    _identity,
    broken,
    central_plan,
    flat,
    honest,
    hostile,
    lines,
    make_job,
    open_book,
    play,
)

__all__ = ["_identity"]

LAW = Banded(separation=3, coefficients=(1.0, 0.6, 0.4))
ROUNDS = 7
TURNS = math.ceil(ROUNDS / LAW.separation)


def banded_plan(**changes):
    fields = {
        "client_rate": 1.0,
        "expected_batch": CLIENTS / LAW.separation,
        "rounds": ROUNDS,
        "turns": TURNS,
        "joins": TURNS,
        "banded": LAW,
    }
    return central_plan(**fields | changes)


def banded_job(folder, **changes):
    return make_job(folder, **{"plan": banded_plan(), "simulated": True} | changes)


class Died(BaseException):
    """The server's process ends here."""


def receipts_of(folder):
    text = (folder / RECEIPTS).read_text() if (folder / RECEIPTS).exists() else ""
    return [Receipt.from_json(json.loads(line)["receipt"]) for line in text.splitlines()]


# -- a whole job ------------------------------------------------------------------------------------------------


def test_a_banded_job_deals_classes_once_charges_each_client_once_and_leaves_no_noise_behind(tmp_path):
    job = banded_job(tmp_path, evaluate_every=7)
    with open_book(tmp_path) as book:
        assert play(job, honest(book, tmp_path)) is Ending.FINISHED
        rounds = {name: sorted(account.jobs[job.id].rounds) for name, account in book.accounts.items()}
        assert {account.charges for account in book.accounts.values()} == {1}
    assert [line["replies"] for line in lines(tmp_path)] == [2] * ROUNDS
    assert all(later - earlier == 3 for joined in rounds.values() for earlier, later in itertools.pairwise(joined))
    assert sorted(joined[0] for joined in rounds.values()) == [1, 1, 2, 2, 3, 3]
    (event,) = {receipt.event for receipt in receipts_of(tmp_path)}
    assert event == Event.of_schedule(job.plan)
    assert (event.kind, event.steps) == (Kind.MATRIX_GAUSSIAN, 1)
    # What could take the noise off the last releases is gone with the last of them.
    assert not (tmp_path / "noise").exists()
    assert not np.array_equal(flat(load(tmp_path / CHECKPOINT).model), FIRST)
    # A finished job is told again without its noise.
    assert play(banded_job(tmp_path), broken) is Ending.FINISHED


def test_an_interrupted_banded_job_goes_on_with_the_drawing_it_began(tmp_path):
    with open_book(tmp_path) as book:
        assert play(banded_job(tmp_path, stopping=lambda: True), honest(book, tmp_path)) is Ending.INTERRUPTED
        rows = load(tmp_path / CHECKPOINT).central.rows
        assert (rows.row, sorted(rows.dealt)) == (1, list(range(1, CLIENTS + 1)))
        # Outside the state there is nothing that is secret, and the state is private.
        assert (tmp_path / "noise/noise.state").stat().st_mode & 0o077 == 0
        assert play(banded_job(tmp_path), honest(book, tmp_path)) is Ending.FINISHED
    after = load(tmp_path / CHECKPOINT).central.rows
    assert (after.identity, after.dealt, after.row) == (rows.identity, rows.dealt, ROUNDS)
    assert [line["round"] for line in lines(tmp_path)] == list(range(1, ROUNDS + 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan": banded_plan(expected_batch=3.0)}, "clients / separation"),
        ({"nodes": 2}, "one client in each of 3 classes"),
        ({"simulated": False}, "expected a safe"),
    ],
)
def test_a_banded_job_with_other_constants_or_a_readable_state_is_refused(tmp_path, changes, words):
    with open_book(tmp_path) as book, pytest.raises(PlanError, match=words):
        play(banded_job(tmp_path, **changes), honest(book, tmp_path))
    assert not (tmp_path / "noise").exists()


def test_outside_a_simulation_the_state_of_the_noise_is_sealed(tmp_path):
    safe = Safe(Secret(bytes(32)), "noise")
    job = banded_job(tmp_path, simulated=False, safe=safe, stopping=lambda: True)
    with open_book(tmp_path) as book:
        play(job, honest(book, tmp_path))
        content = (tmp_path / "noise/noise.state").read_bytes()
        assert job.id.encode() not in content
        assert job.id.encode() in safe.open("noise.state", content)
        # Another key does not open it, and that is no reason to draw anew.
        stranger = dataclasses.replace(job, safe=Safe(Secret(bytes([1]) * 32), "noise"))
        with pytest.raises(RunError, match="has ended"):
            play(stranger, honest(book, tmp_path))
        assert play(dataclasses.replace(job, stopping=lambda: False), honest(book, tmp_path)) is Ending.FINISHED


def test_g11_a_test_source_at_the_server_names_itself_in_every_line(tmp_path):
    job = banded_job(tmp_path, sources=lambda use, round: Silent(), stopping=lambda: True)
    with open_book(tmp_path) as book:
        play(job, honest(book, tmp_path))
        # Fresh noise from now on: what was released under none stays named.
        play(banded_job(tmp_path), honest(book, tmp_path))
    assert {line["epsilon"] for line in lines(tmp_path)} == {None}
    assert central._sources(banded_job(tmp_path), load(tmp_path / CHECKPOINT)) is Keystream


# -- lost, older and second states ------------------------------------------------------------------------------


def spoil(folder, how, older):
    state = folder / "noise/noise.state"
    match how:
        case "lost":
            state.unlink()
        case "older":
            state.write_bytes(older)
        case "altered":
            state.write_bytes(state.read_bytes()[:-1] + b"\x00")


def require_ended(folder, book, how):
    """Fails where a job goes on whose state of the noise is not the one that its checkpoint names."""
    play(banded_job(folder, stopping=lambda: True), honest(book, folder))
    older = (folder / "noise/noise.state").read_bytes()
    play(banded_job(folder, stopping=lambda: True), honest(book, folder))
    spoil(folder, how, older)
    told, charged = lines(folder), (folder / "ledgers/ledger.jsonl").read_bytes()
    ended = ""
    try:
        play(banded_job(folder), honest(book, folder))
    except RunError as error:
        ended = str(error)
    assert "has ended" in ended, "it went on with other noise"
    assert lines(folder) == told
    assert (folder / "ledgers/ledger.jsonl").read_bytes() == charged


@pytest.mark.parametrize("how", ["lost", "older", "altered"])
def test_g16_lost_or_older_noise_ends_the_job_before_anybody_is_asked(tmp_path, how):
    with open_book(tmp_path) as book:
        require_ended(tmp_path, book, how)


@pytest.mark.parametrize("how", ["lost", "older"])
def test_g16_planted_server_that_begins_anew_where_its_noise_is_lost_is_caught(tmp_path, monkeypatch, how):
    resume = CorrelatedNoise.resume.__func__

    def lenient(cls, folder, drawing, mark, **kept):
        try:
            return resume(cls, folder, drawing, mark, **kept)
        except RunError:
            (folder / "noise.state").unlink(missing_ok=True)
            fresh = cls.begin(folder, drawing.matrix, **kept)
            object.__setattr__(fresh, "_drawing", drawing)
            fresh._keep(dataclasses.replace(fresh._state, row=mark.row, released=np.zeros(fresh._size, np.float32)))
            return fresh

    monkeypatch.setattr(CorrelatedNoise, "resume", classmethod(lenient))
    with open_book(tmp_path) as book, pytest.raises(AssertionError, match="other noise"):
        require_ended(tmp_path, book, how)


def test_g16_a_lost_checkpoint_does_not_begin_a_second_drawing(tmp_path):
    """Killed in its first round, before a line was told: rows were released all the same."""
    job = banded_job(tmp_path)
    with open_book(tmp_path) as book:
        die_after_the_row(tmp_path, honest(book, tmp_path))
        (tmp_path / CHECKPOINT).unlink()
        with pytest.raises(RunError, match="1 rows were released"):
            play(job, honest(book, tmp_path))
        # With both of them gone, the ledgers still commit to the drawing that they paid for.
        (tmp_path / "noise/noise.state").unlink()
        play(job, honest(book, tmp_path))
    told = lines(tmp_path)
    assert told[0]["replies"] == 0
    assert told[0]["missing"] == 2
    # Nobody else had paid for anything: they join the new drawing.
    assert [line["replies"] for line in told[1:3]] == [2, 2]


# -- a row is drawn once ----------------------------------------------------------------------------------------


def die_after_the_row(folder, app):
    """Plays a job until its first row is on disk, and dies before the checkpoint hears of it."""
    with pytest.MonkeyPatch.context() as patch:
        release = CorrelatedNoise.release

        def dying(self, row, total, request):
            release(self, row, total, request)
            raise Died

        patch.setattr(CorrelatedNoise, "release", dying)
        with pytest.raises(Died):
            play(banded_job(folder), app)


def models_of_row_1(folder, *, silent_again):
    """Returns the mean that a row gave before a crash, and the one after it, when other clients reply."""
    with open_book(folder) as book:
        seen = []
        release = CorrelatedNoise.release
        with pytest.MonkeyPatch.context() as patch:

            def watching(self, row, total, request):
                seen.append((row, np.array(release(self, row, total, request))))
                if len(seen) == 1:
                    raise Died
                return seen[-1][1]

            patch.setattr(CorrelatedNoise, "release", watching)
            with pytest.raises(Died):
                play(banded_job(folder), honest(book, folder))
            play(banded_job(folder, stopping=lambda: True), broken if silent_again else honest(book, folder))
    assert [row for row, _ in seen] == [1, 1]
    return seen[0][1], seen[1][1]


def require_one_release(folder):
    first, again = models_of_row_1(folder, silent_again=True)
    assert np.array_equal(first, again), "one row was released over two sums"


@pytest.mark.filterwarnings("ignore")
def test_g16_a_round_that_is_asked_again_gets_the_row_that_was_kept_whoever_replies(tmp_path):
    require_one_release(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_g16_planted_server_that_draws_a_row_twice_is_caught(tmp_path, monkeypatch):
    """The same noise over two sums shows their difference in the clear; fresh noise is a second release."""
    release = CorrelatedNoise.release

    def forgetful(self, row, total, request):
        if row == self._state.row:
            self._state = dataclasses.replace(self._state, row=row - 1)
        return release(self, row, total, request)

    monkeypatch.setattr(CorrelatedNoise, "release", forgetful)
    with pytest.raises(AssertionError, match="two sums"):
        require_one_release(tmp_path)


def test_g16_a_row_belongs_to_its_round_its_model_and_its_cohort_not_to_who_replied(tmp_path, monkeypatch):
    asked = []
    release = CorrelatedNoise.release

    def noting(self, row, total, request):
        asked.append(request)
        return release(self, row, total, request)

    monkeypatch.setattr(CorrelatedNoise, "release", noting)
    with open_book(tmp_path) as book:
        play(banded_job(tmp_path, stopping=lambda: True), honest(book, tmp_path))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                central, "save", lambda state, path: (_ for _ in ()).throw(Died()) if state.round == 2 else None
            )
            with pytest.raises(Died):
                play(banded_job(tmp_path), honest(book, tmp_path))
        play(banded_job(tmp_path, stopping=lambda: True), honest(book, tmp_path))
    assert len(asked) == 3
    assert asked[1] == asked[2] != asked[0]


# -- turns ------------------------------------------------------------------------------------------------------


def eager(monkeypatch):
    """The planted bug: a server that asks everybody in every round."""
    monkeypatch.setattr(central, "class_of_round", lambda dealt, turns, round: sorted(dealt))


def require_apart(folder):
    """Fails where a client's ledger let it join two rounds that are nearer than its matrix was priced for."""
    with open_book(folder) as book:
        play(banded_job(folder, evaluate_every=7), honest(book, folder))
        joined = [sorted(account.jobs["ab" * 16].rounds) for account in book.accounts.values()]
    moved = matrix_of(banded_plan()).dense()
    most = max(np.linalg.norm(moved[:, [round - 1 for round in rounds]].sum(axis=1)) for rounds in joined)
    assert most <= matrix_of(banded_plan()).sensitivity * (1 + 1e-12), f"a client moved the whole by {most}"


def test_g16_participation_before_its_separation_is_refused_by_the_clients_own_ledger(tmp_path, monkeypatch):
    eager(monkeypatch)
    require_apart(tmp_path)
    told = lines(tmp_path)
    # Everybody joins rounds 1, 4 and 7; in between they answer with a word and count as missing.
    assert [line["replies"] for line in told] == [6, 0, 0, 6, 0, 0, 6]
    assert {line["declined"] for line in told} == {0}


def test_g16_planted_ledger_that_admits_every_round_is_caught(tmp_path, monkeypatch):
    eager(monkeypatch)
    monkeypatch.setattr(Turns, "admits", lambda *_: True)
    monkeypatch.setattr("privacy.ledger._JobState.joins", property(lambda _: 99, lambda *_: None), raising=False)
    with pytest.raises(AssertionError, match="moved the whole"):
        require_apart(tmp_path)


def test_g16_a_thin_class_is_never_dealt_again(tmp_path):
    """One class never answers: its rounds are noise alone, and nobody else is asked for it."""
    dealt = []

    def absent(app):
        def call(message, context):
            dealt.append((message.content["job"]["round"], context.node_id))
            if message.content["job"]["round"] % 3 == 1:
                raise RuntimeError("this class is away")
            return app(message, context)

        return call

    with open_book(tmp_path) as book:
        play(banded_job(tmp_path, evaluate_every=7), absent(honest(book, tmp_path)))
    assert [line["replies"] for line in lines(tmp_path)] == [0, 2, 2, 0, 2, 2, 0]
    classes = {round: {node for at, node in dealt if at == round} for round in range(1, ROUNDS + 1)}
    assert classes[1] == classes[4] == classes[7]
    assert len(classes[1]) == 2
    assert not classes[1] & (classes[2] | classes[3])


# -- the sum and its noise --------------------------------------------------------------------------------------


def moved_by(folder, app):
    """Returns how far each round moved the model, times the public divisor, float64 of shape (n, P)."""
    models = [FIRST]
    job = banded_job(
        folder, evaluate_every=7, on_round=lambda line: models.append(flat(load(folder / CHECKPOINT).model))
    )
    play(job, app)
    return np.diff(np.array(models), axis=0) * job.plan.expected_batch


@pytest.mark.statistical
@pytest.mark.filterwarnings("ignore")
def test_g16_missing_replies_leave_the_full_noise_in_every_row(tmp_path):
    """Whitened by the matrix, the moves of a job that nobody answers are its fresh rows: full noise in each.

    False alarms below 1e-5: 7 rows, 5 sigma of 650 draws.
    """
    plan = banded_plan()
    matrix = matrix_of(plan)
    rows = matrix.dense() @ moved_by(tmp_path, broken) / matrix.stddev(plan.noise_multiplier, plan.l2_clip)
    assert np.abs(rows.std(axis=1) - 1).max() < 5 / math.sqrt(2 * rows.shape[1])
    # The rows are fresh: no two of them go together.
    corner = np.abs(np.corrcoef(rows) - np.eye(ROUNDS)).max()
    assert corner < 5.5 / math.sqrt(rows.shape[1])


@pytest.mark.statistical
@pytest.mark.filterwarnings("ignore")
def test_g16_planted_row_without_its_sensitivity_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "privacy.matrix.Matrix.stddev", lambda self, noise_multiplier, l2_clip: noise_multiplier * l2_clip
    )
    plan = banded_plan()
    rows = matrix_of(plan).dense() @ moved_by(tmp_path, broken)
    stated = plan.noise_multiplier * matrix_of(plan).sensitivity * plan.l2_clip
    assert (rows.std(axis=1) < 0.75 * stated).all()


def require_bounded(folder):
    for number, value in enumerate((3e38, math.nan)):
        home = folder / str(number)
        job = banded_job(home, sources=lambda use, round: Silent(), stopping=lambda: True)
        with open_book(home) as book:
            play(job, hostile(value)(honest(book, home)))
        moved = np.linalg.norm(flat(load(home / CHECKPOINT).model) - FIRST)
        assert moved <= job.plan.l2_clip * 1.0001, f"a class moved the mean by {moved}"


def test_g16_whatever_a_class_sends_the_server_clips_it(tmp_path):
    require_bounded(tmp_path)


def test_a_clipped_sum_is_the_one_that_both_noises_are_added_to():
    rows = np.random.default_rng(3).normal(size=(5, 40)).astype(np.float32)
    total, bits = clipped_sum([*(Contribution(row, 1.0) for row in rows), Contribution(rows[0, :7])], 40, 0.5)
    assert np.linalg.norm(total) <= 5 * 0.5
    assert bits == 2.5
    assert not clipped_sum([], 40, 0.5)[0].any()


# -- killed anywhere --------------------------------------------------------------------------------------------

SHORT = Banded(separation=2, coefficients=(1.0, 0.5))


class Tale(Story):
    """A story whose server has banded noise; it may die around each row's release too."""

    def __init__(self, monkeypatch, folder):
        super().__init__(monkeypatch, folder)
        self.rows = {}
        release, story = self.counted(CorrelatedNoise.release), self

        def watched(noise, row, total, request):
            released = release(noise, row, total, request)
            story.rows.setdefault(row, set()).add(released.tobytes())
            return released

        monkeypatch.setattr(CorrelatedNoise, "release", watched)

    def live(self, book, kill_at):
        self.kill_at, self.step = kill_at, 0
        plan = banded_plan(rounds=3, turns=2, joins=2, banded=SHORT, expected_batch=CLIENTS / 2)
        with contextlib.suppress(Killed), self.grid(honest(book, self.folder), nodes=CLIENTS, run_config={}) as grid:
            return run(banded_job(self.folder, plan=plan), grid)
        return None


def tell(folder, kills):
    """Lets a job live and die at the given steps, then to its end; returns how many steps its last life had."""
    with pytest.MonkeyPatch.context() as patches, open_book(folder) as book:
        story = Tale(patches, folder)
        for kill_at in (*kills, 0):
            if story.live(book, kill_at) is Ending.FINISHED:
                break
        story.check()
        assert all(len(seen) == 1 for seen in story.rows.values()), "a row was released twice"
        joined = {account.identity: account.jobs["ab" * 16].rounds for account in book.accounts.values()}
    # Whoever was charged and killed before it could keep what it had is not asked to pay again: it misses the round.
    told = [(receipt.account, receipt.round) for receipt in receipts_of(folder)]
    assert len(set(told)) == len(told) <= sum(map(len, joined.values()))
    assert {account.charges for account in book.accounts.values()} == {1}
    assert not (folder / "noise").exists()
    return story.step


def test_g16_killed_at_any_step_a_row_is_released_once_and_the_job_goes_on(tmp_path):
    steps = tell(tmp_path / "undisturbed", [])
    assert steps > 20
    for kill_at in range(1, steps + 1, 3):
        tell(tmp_path / str(kill_at), [kill_at, kill_at // 2 + 3])


@pytest.mark.slow
def test_g16_killed_at_every_step_and_at_every_other_while_it_goes_on(tmp_path):
    steps = tell(tmp_path / "undisturbed", [])
    for kill_at in range(1, steps + 1):
        for again in (2, kill_at // 2 + 3, kill_at):
            tell(tmp_path / f"{kill_at}-{again}", [kill_at, again])


def test_g16_planted_server_whose_rows_are_not_kept_is_caught(tmp_path, monkeypatch):
    """A row that lives in memory alone is drawn anew after a crash: its noise was seen by nobody, or by somebody."""
    keep = CorrelatedNoise._keep

    def in_memory(self, state):
        on_disk = self._path.read_bytes() if self._path.exists() and state.row else None
        keep(self, state)
        if on_disk is not None:
            self._path.write_bytes(on_disk)

    monkeypatch.setattr(CorrelatedNoise, "_keep", in_memory)

    def live_and_die():
        for kill_at in range(4, 60):
            tell(tmp_path / str(kill_at), [kill_at])

    with pytest.raises(AssertionError, match="released twice"):
        live_and_die()


# -- the request ------------------------------------------------------------------------------------------------


def request_of(folder, **changes):
    """Returns one request of a banded job, with fields of its record changed; None drops one."""
    job = banded_job(folder)
    with open_book(folder) as book:
        play(dataclasses.replace(job, stopping=lambda: True), honest(book, folder))
    (message, *_) = ask(job, load(folder / CHECKPOINT), 2, [1])
    record = message.content["job"]
    for name, value in changes.items():
        if value is None:
            del record[name]
        else:
            record[name] = value
    return message


def test_a_request_names_the_drawing_and_its_hash_covers_it(tmp_path):
    message = request_of(tmp_path)
    request = parse_request(message)
    assert request.drawing.matrix == matrix_of(request.plan)
    assert request.drawing.identity == load(tmp_path / CHECKPOINT).central.rows.identity
    message.content["job"]["drawing"] = "0" * 32
    assert parse_request(message).digest != request.digest
    assert request.charge_of("c1", noise=SECURE_SOURCE).matrix == request.drawing


@pytest.mark.parametrize(
    "changes",
    [
        {"drawing": None},
        {"drawing": ""},
        {"drawing": "g" * 32},
        {"drawing": 7},
        {"drawing": ["0" * 32]},
        {"plan": central_plan().to_json()},
    ],
)
def test_a_request_whose_drawing_is_not_its_plans_is_refused(tmp_path, changes):
    with pytest.raises(PlanError, match="expected"):
        parse_request(request_of(tmp_path, **changes))


def test_g16_a_ledger_declines_a_banded_plan_without_its_drawing_or_with_another_matrix(tmp_path):
    request = parse_request(request_of(tmp_path))
    charge = dataclasses.replace(request.charge_of("c1", noise=SECURE_SOURCE), witness=None)
    other = dataclasses.replace(charge.matrix.matrix, coefficients=(1.0, 0.1))
    with open_book(tmp_path / "fresh") as book:
        for wrong in (None, dataclasses.replace(charge.matrix, matrix=other)):
            assert book.charge([dataclasses.replace(charge, matrix=wrong)]) == [Word.CONFLICT]
        (receipt,) = book.charge([charge])
        assert isinstance(receipt, Receipt)


# -- checkpoints ------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_rows_has_the_text_that_it_always_had(tmp_path):
    with open_book(tmp_path) as book:
        play(make_job(tmp_path, stopping=lambda: True), honest(book, tmp_path))
    header = json.loads((tmp_path / CHECKPOINT).read_bytes().split(b"\n")[1])
    assert set(header["central"]) == {"clip", "round", "cohort", "counted", "pending"}
    assert load(tmp_path / CHECKPOINT).central.rows is None


@pytest.mark.parametrize("wrong", [{"row": 1.0}, {"identity": 7}, {"more": 1}, {"dealt": ["1"]}, {"digest": None}])
def test_a_checkpoint_with_damaged_rows_is_refused(tmp_path, wrong):
    with open_book(tmp_path) as book:
        play(banded_job(tmp_path, stopping=lambda: True), honest(book, tmp_path))
    magic, header, body = (tmp_path / CHECKPOINT).read_bytes().split(b"\n", 2)
    fields = json.loads(header)
    fields["central"]["rows"] |= wrong
    (tmp_path / CHECKPOINT).write_bytes(b"\n".join((magic, json.dumps(fields).encode(), body)))
    with pytest.raises(RunError, match="damaged"):
        load(tmp_path / CHECKPOINT)
