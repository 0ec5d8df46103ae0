"""Turns in a matrix: one charge for all of it, and a ledger that admits only what the charge was computed for (G16).

The oracle is the matrix itself: whatever rounds a ledger admitted, the client's columns for them must not be longer
together than the sensitivity that was paid for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy.accounting import Event, Kind, rdp
from privacy.errors import LedgerError
from privacy.identity import COUNTERSIGN, Secret
from privacy.ledger import Book, ChargeRequest, Receipt, Word
from privacy.matrix import CorrelatedNoise, Drawing, Matrix, Turns, matrix_event
from privacy.plan import Metric, Metrics, Mode, Unit
from privacy.verify import Result, verify_files
from tests.oracles import ACCOUNT, as_version_1, make_grant, make_plan, make_request, open_book, rechain, remark

MATRIX = Matrix(rounds=12, separation=3, participations=3, coefficients=(1.0, 0.6, 0.5))
DRAWING = Drawing(matrix=MATRIX, identity="12" * 16)
PLAN = make_plan(sample_rate=1.0, steps=1, noise_multiplier=2.2)
EVENT = matrix_event(2.2, unit=PLAN.unit)


def turn(round: int, **changes: Any) -> ChargeRequest:
    return make_request(round, **{"plan": PLAN, "matrix": DRAWING} | changes)


def asked(book: Book, *rounds: int, **changes: Any) -> list[Receipt | Word]:
    return [book.charge([turn(round, **changes)])[0] for round in rounds]


def admitted(outcomes: Sequence[Receipt | Word]) -> list[int]:
    return [outcome.round for outcome in outcomes if isinstance(outcome, Receipt)]


def is_covered(rounds: Sequence[int], matrix: Matrix = MATRIX) -> bool:
    """Whether contributions in these rounds, repeated ones included, move C x by no more than was paid for."""
    moved = matrix.dense()[:, [round - 1 for round in rounds]].sum(axis=1)
    return bool(np.linalg.norm(moved) <= matrix.sensitivity * (1 + 1e-12))


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "ledger.jsonl").read_bytes().splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A book whose one account joined rounds 2 and 5 of the matrix."""
    with open_book(tmp_path / "book") as book:
        assert admitted(asked(book, 2, 5)) == [2, 5]
    return tmp_path / "book"


# -- one price --------------------------------------------------------------------------------------------------------


def is_priced_once(folder: Path) -> bool:
    """Whether a ledger's spend is that of one whole matrix and nothing else."""
    with Book(folder) as book:
        account = book.accounts[ACCOUNT]
        return account.charges == 1 and math.isclose(account.spent_rdp, rdp(EVENT, account.grant.order))


def test_g16_a_matrix_is_charged_whole_with_its_first_round(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        receipts = [outcome for outcome in asked(book, 1, 4, 9) if isinstance(outcome, Receipt)]
    assert [receipt.round for receipt in receipts] == [1, 4, 9]
    price = make_grant().epsilon_of(rdp(EVENT, 8.0))
    for receipt in receipts:
        assert Receipt.from_json(receipt.to_json()) == receipt
        assert (receipt.event, receipt.event.kind, receipt.charges) == (EVENT, Kind.MATRIX_GAUSSIAN, 1)
        assert receipt.spent == pytest.approx(price, rel=1e-12)
    assert len({receipt.head for receipt in receipts}) == 3
    kinds = [json.loads(line)["kind"] for line in lines_of(tmp_path)]
    assert kinds == ["grant", "commit", "charge", "participation", "participation"]
    assert is_priced_once(tmp_path)


def test_g16_a_matrix_that_the_budget_cannot_pay_is_declined_before_its_first_round(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        assert asked(book, 1, plan=dataclasses.replace(PLAN, noise_multiplier=0.5)) == [Word.DECLINED]
        assert len(lines_of(tmp_path)) == 1
        # One fits, and with it gone a second job does not; the first one's rounds go on all the same.
        (first,) = asked(book, 1, plan=dataclasses.replace(PLAN, noise_multiplier=1.6))
        assert isinstance(first, Receipt)
        assert asked(book, 1, job="cd" * 16) == [Word.DECLINED]
        assert admitted(asked(book, 4, plan=dataclasses.replace(PLAN, noise_multiplier=1.6))) == [4]


def test_g16_a_matrix_adds_to_what_other_jobs_spent(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        book.charge([make_request(1, job="cd" * 16)])
        asked(book, 1, 4)
        book.charge([make_request(2, job="cd" * 16)])
        asked(book, 7)
        account = book.accounts[ACCOUNT]
        spent = 2 * rdp(Event.of_round(make_plan()), 8.0) + rdp(EVENT, 8.0)
        assert account.spent_rdp == pytest.approx(spent, rel=1e-12)
        assert account.charges == 3


def free(entry: dict[str, Any]) -> None:
    """The planted bug: the first round is priced like the later ones, at nothing, as if it had no steps."""
    if entry["kind"] == "charge":
        entry["kind"] = "participation"
    if entry["kind"] == "participation":
        entry["body"] |= {"charges": 0, "spent": 0.0}


def test_g16_planted_matrix_that_was_never_charged_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "ledger.jsonl").write_bytes(rechain(lines_of(folder), free, folder / "ledger.key"))
    remark(folder)
    with pytest.raises(LedgerError, match="out of turn"):
        Book(folder)
    # Without that check the ledger would open, and only the price would tell.
    monkeypatch.setattr("privacy.ledger._require_turn", lambda *_: None)
    assert not is_priced_once(folder)


# -- turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("round", "changes", "word"),
    [
        (5, {}, Word.CONFLICT),
        (5, {"request": "0" * 64}, Word.CONFLICT),
        (2, {}, Word.CONFLICT),
        (1, {}, Word.CONFLICT),
        (6, {}, Word.CONFLICT),
        (7, {}, Word.CONFLICT),
        (13, {}, Word.CONFLICT),
        (0, {}, Word.CONFLICT),
        (8, {"matrix": dataclasses.replace(DRAWING, identity="34" * 16)}, Word.CONFLICT),
        (8, {"matrix": dataclasses.replace(DRAWING, matrix=dataclasses.replace(MATRIX, rounds=13))}, Word.CONFLICT),
        (8, {"matrix": None}, Word.CONFLICT),
        (8, {"plan": dataclasses.replace(PLAN, noise_multiplier=2.0)}, Word.CONFLICT),
        (8, {"plan": dataclasses.replace(PLAN, l2_clip=9.0)}, Word.CONFLICT),
        (8, {"witness": (9, "0" * 64)}, Word.BEHIND),
        (8, {}, None),
        (12, {}, None),
    ],
    ids=str,
)
def test_g16_after_rounds_2_and_5_only_what_was_priced_is_admitted(
    folder: Path, round: int, changes: dict[str, Any], word: Word | None
) -> None:
    before = lines_of(folder)
    with Book(folder) as book:
        (outcome,) = asked(book, round, **changes)
    assert (outcome if isinstance(outcome, Word) else None) == word
    # What is declined writes nothing.
    assert len(lines_of(folder)) == len(before) + (word is None)


def test_g16_no_more_participations_than_were_priced(folder: Path) -> None:
    with Book(folder) as book:
        assert admitted(asked(book, 8)) == [8]
        assert asked(book, 11, 12) == [Word.DECLINED] * 2
        assert sorted(book.accounts[ACCOUNT].jobs["ab" * 16].rounds) == [2, 5, 8]


ASKS_MORE = Metrics(words=(Metric.COUNT,), noise=20.0, loss_bound=1.0)


def test_g16_a_clip_that_moves_is_no_part_of_a_matrix(tmp_path: Path) -> None:
    fixed = dataclasses.replace(PLAN, unit=Unit.CLIENT, mode=Mode.AUTO, turns=1)
    moving = dataclasses.replace(fixed, quantile=0.5, clip_lr=0.2, bit_noise=9.0)
    with open_book(tmp_path, make_grant(epsilon=9.0, unit=Unit.CLIENT)) as book:
        assert asked(book, 1, plan=moving) == [Word.CONFLICT]
        # It is the clip that is declined, not the unit.
        assert admitted(asked(book, 1, plan=fixed)) == [1]


@pytest.mark.parametrize("change", [{"sample_rate": 0.5}, {"steps": 2}, {"metrics": ASKS_MORE}], ids=str)
def test_g16_a_plan_that_samples_or_steps_often_is_no_matrix(tmp_path: Path, change: dict[str, Any]) -> None:
    with open_book(tmp_path) as book:
        assert asked(book, 1, plan=dataclasses.replace(PLAN, **change)) == [Word.CONFLICT]


def test_g16_a_job_without_a_matrix_never_gets_one(tmp_path: Path) -> None:
    with open_book(tmp_path, make_grant(epsilon=9.0)) as book:
        assert admitted(asked(book, 1, matrix=None)) == [1]
        assert asked(book, 4) == [Word.CONFLICT]


@given(st.lists(st.tuples(st.integers(0, 14), st.booleans()), max_size=14))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_g16_whatever_is_asked_the_admitted_rounds_are_covered(
    tmp_path_factory: pytest.TempPathFactory, asks: list[tuple[int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("book")
    rounds: list[int] = []
    book = open_book(folder)
    for round, restart in asks:
        if restart:
            book.close()
            book = Book(folder)
        rounds += admitted(asked(book, round))
    book.close()
    assert is_covered(rounds)
    assert rounds == sorted(set(rounds))
    assert len(rounds) <= 3


@pytest.mark.parametrize(
    ("bug", "asks"),
    [
        ("separation ignored", (1, 2, 3)),
        ("row reused", (1, 1)),
        ("one too many", (1, 4, 7, 10)),
        ("backwards", (7, 6, 5)),
    ],
)
def test_g16_planted_ledger_without_turns_admits_more_than_was_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str, asks: tuple[int, ...]
) -> None:
    with open_book(tmp_path / "sound") as book:
        assert is_covered(admitted(asked(book, *asks)))
    monkeypatch.setattr(Turns, "admits", lambda *_: True)
    if bug == "one too many":
        # How often a client may join stands in its commitment too: there the bug must be planted as well.
        monkeypatch.setattr("privacy.ledger._JobState.joins", property(lambda _: 99, lambda *_: None), raising=False)
    with open_book(tmp_path / "planted") as book:
        assert not is_covered(admitted(asked(book, *asks)))


# -- it is a ledger entry like any other ------------------------------------------------------------------------------


def at(
    kind: str, number: int, change: Callable[[dict[str, Any]], Any]
) -> Callable[[], Callable[[dict[str, Any]], None]]:
    """Makes a change of the n-th entry of a kind."""

    def fresh() -> Callable[[dict[str, Any]], None]:
        seen = itertools.count()

        def edit(entry: dict[str, Any]) -> None:
            if entry["kind"] == kind and next(seen) == number:
                change(entry)

        return edit

    return fresh


@pytest.mark.parametrize(
    "change",
    [
        at("participation", 0, lambda e: e["body"].update(round=4)),
        at("participation", 0, lambda e: e["body"].update(round=2)),
        at("participation", 0, lambda e: e["body"].update(round=13)),
        at("participation", 0, lambda e: e["body"].update(round=5.0)),
        at("participation", 0, lambda e: e["body"].update(round=True)),
        at("participation", 0, lambda e: e.update(kind="charge")),
        at("participation", 0, lambda e: e.update(kind="charge") or e["body"].update(charges=2)),
        at("participation", 0, lambda e: e.update(kind="attendance")),
        at("participation", 0, lambda e: e["body"].update(charges=2)),
        at("participation", 0, lambda e: e["body"].update(test=True)),
        at("participation", 0, lambda e: e["body"].update(job="cd" * 16)),
        at("participation", 0, lambda e: e["body"]["event"].update(noise_multiplier=2.3)),
        at("charge", 0, lambda e: e["body"]["event"].update(noise_multiplier=2.3)),
        at("commit", 0, lambda e: e["body"].pop("matrix")),
        at("commit", 0, lambda e: e["body"].update(matrix={})),
        at("commit", 0, lambda e: e["body"].update(matrix=None)),
        at("commit", 0, lambda e: e["body"]["matrix"].update(separation=4)),
        at("commit", 0, lambda e: e["body"]["matrix"].update(participations=1)),
        at("commit", 0, lambda e: e["body"]["matrix"].update(rounds=4)),
        at("commit", 0, lambda e: e["body"]["matrix"].update(digest="x")),
        at("commit", 0, lambda e: e["body"]["matrix"].update(more=1)),
        at("commit", 0, lambda e: e["body"]["event"].update(kind="poisson-gaussian")),
        at("commit", 0, lambda e: e["body"]["event"].update(steps=2)),
    ],
)
def test_g16_a_ledger_that_says_what_no_gate_admits_is_refused_even_from_its_holder(
    folder: Path, change: Callable[[], Callable[[dict[str, Any]], None]]
) -> None:
    forged = rechain(lines_of(folder), change(), folder / "ledger.key")
    assert forged.splitlines() != lines_of(folder)
    (folder / "ledger.jsonl").write_bytes(forged)
    remark(folder)
    with pytest.raises(LedgerError, match="ledger"):
        Book(folder)
    assert (folder / "ledger.jsonl").read_bytes() == forged


def test_the_forger_of_these_tests_writes_sound_ledgers(folder: Path) -> None:
    before = lines_of(folder)
    (folder / "ledger.jsonl").write_bytes(rechain(before, lambda _: None, folder / "ledger.key"))
    assert lines_of(folder) == before
    # Without the key, the last participation's signature gives a rewrite away.
    later = at("participation", 0, lambda e: e["body"].update(round=6))()
    (folder / "ledger.jsonl").write_bytes(rechain(before, later))
    remark(folder)
    with pytest.raises(LedgerError, match="signature"):
        Book(folder)


def test_g9_a_participation_pays_for_one_release_of_its_own_request(folder: Path) -> None:
    with Book(folder) as book:
        (receipt,) = asked(book, 8)
        assert isinstance(receipt, Receipt)
        for wrong in (turn(9), turn(8, request="0" * 64), turn(8, job="cd" * 16)):
            with pytest.raises(LedgerError, match="another"):
                book.claim(receipt, wrong)
        book.claim(receipt, turn(8))
        with pytest.raises(LedgerError, match="already used"):
            book.claim(receipt, turn(8))


def test_g11_test_noise_in_a_later_round_marks_the_account(folder: Path) -> None:
    with Book(folder) as book:
        assert not book.accounts[ACCOUNT].test
        (receipt,) = asked(book, 8, noise="test:Recorded")
        assert isinstance(receipt, Receipt)
        assert receipt.test
    with Book(folder) as book:
        assert book.accounts[ACCOUNT].test


def test_g14_a_rolled_back_ledger_would_join_a_round_again_and_its_receipt_shows_it(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "old")
    with Book(folder) as book:
        (receipt,) = asked(book, 8)
        assert isinstance(receipt, Receipt)
    with Book(tmp_path / "old") as rolled_back:
        assert asked(rolled_back, 9, witness=(receipt.seq, receipt.head)) == [Word.BEHIND]
        # Nobody who holds the receipt: nothing here can tell, which is why peers keep receipts.
        (again,) = asked(rolled_back, 9)
        assert isinstance(again, Receipt)
        assert not is_covered([2, 5, receipt.round, again.round])
        assert (again.seq, again.head) != (receipt.seq, receipt.head)


def test_g14_a_ledger_cut_by_one_participation_is_refused_through_its_mark(folder: Path) -> None:
    path = folder / "ledger.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines_of(folder)[:-1]))
    with pytest.raises(LedgerError, match="cut"):
        Book(folder)
    # The planted bug: a mark that is made to fit lets round 5 be drawn again; only a receipt tells.
    remark(folder)
    with Book(folder) as book:
        assert sorted(book.accounts[ACCOUNT].jobs["ab" * 16].rounds) == [2]


def test_g16_books_open_at_once_share_the_turns(folder: Path) -> None:
    """Whoever opened the ledger earlier reads what others added before it admits anything."""
    with Book(folder) as one, Book(folder) as two:
        assert admitted(asked(one, 8)) == [8]
        assert asked(two, 8, request="0" * 64) == [Word.CONFLICT]
        assert admitted(asked(two, 9, 12)) == []
        assert asked(two, 12) == [Word.DECLINED]


def test_g16_planted_book_that_does_not_catch_up_breaks_the_chain(folder: Path) -> None:
    class Stale(Book):
        def _catch_up(self) -> None:
            if not self._size:
                super()._catch_up()

    with Stale(folder) as stale, Book(folder) as book:
        rounds = admitted(asked(book, 8)) + admitted(asked(stale, 9))
        assert not is_covered([2, 5, *rounds])
    with pytest.raises(LedgerError):
        Book(folder)


class Crash(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("where", ["pwrite 1", "fdatasync 1", "write 1", "half write 1", "return"])
def test_g16_a_crash_at_any_step_admits_no_round_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    book, calls = Book(folder), dict.fromkeys(("pwrite", "fdatasync", "write"), 0)
    real = {name: getattr(os, name) for name in calls}

    def dying(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            if where.endswith(f"{name} {calls[name]}"):
                if where.startswith("half"):
                    real["write"](arguments[0], arguments[1][:300])
                raise Crash
            return real[name](*arguments)

        return call

    left: list[int] = []
    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(f"privacy.ledger.os.{name}", dying(name))
        with pytest.raises(Crash) if where != "return" else contextlib.nullcontext():
            left += admitted(asked(book, 8))
    book.close()
    with Book(folder) as again:
        # Only where nothing was written is the round asked for again; then it had not left either.
        left += admitted(asked(again, 8))
        stands = 8 in again.accounts[ACCOUNT].jobs["ab" * 16].rounds
    assert left.count(8) <= 1
    assert stands
    assert is_covered([2, 5, *left])
    assert is_priced_once(folder)


def test_a_ledger_of_version_1_goes_on_with_a_matrix(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        book.charge([make_request(1, job="cd" * 16)])
    (tmp_path / "ledger.jsonl").write_bytes(as_version_1(lines_of(tmp_path)))
    remark(tmp_path)
    with Book(tmp_path) as book:
        assert admitted(asked(book, 1, 4)) == [1, 4]
    with Book(tmp_path) as book:
        account = book.accounts[ACCOUNT]
        assert account.charges == 2
        assert account.spent_rdp == pytest.approx(rdp(Event.of_round(make_plan()), 8.0) + rdp(EVENT, 8.0), rel=1e-12)


# -- the whole mechanism ----------------------------------------------------------------------------------------------


class Replayed:
    """The same fresh numbers every time, so that two worlds differ by their contributions alone."""

    name = "replayed"

    def __init__(self) -> None:
        self.rng = np.random.default_rng(7)

    def __call__(self) -> Replayed:
        return self

    def gaussian(self, n: int) -> torch.Tensor:
        return torch.from_numpy(self.rng.normal(size=n))


def power_against_one_client(folder: Path, *rounds: int) -> float:
    """Returns how many standard deviations one client's presence moves everything that a job releases.

    The client contributes a full clip wherever its ledger lets it; the rows of the matrix whiten the noise.
    """
    with open_book(folder / "book") as book:
        joined = admitted(asked(book, *rounds))
    worlds = []
    for name, there in (("with", 1.0), ("without", 0.0)):
        noise = CorrelatedNoise.begin(
            folder / name,
            MATRIX,
            job="ab" * 16,
            size=3,
            noise_multiplier=PLAN.noise_multiplier,
            l2_clip=PLAN.l2_clip,
            sources=Replayed(),
        )
        with noise:
            totals = [np.array([there * PLAN.l2_clip * (row in joined), 0, 0]) for row in range(1, 13)]
            worlds.append(np.array([noise.release(row, total, f"{row:064x}") for row, total in enumerate(totals, 1)]))
    difference = worlds[0].astype(np.float64) - worlds[1]
    return float(np.linalg.norm(MATRIX.dense() @ difference)) / noise.stddev


@pytest.mark.parametrize("rounds", [(1, 4, 7), tuple(range(1, 13)), (3, 9), (12, 1, 6, 6)], ids=str)
def test_g16_all_releases_together_tell_no_more_of_a_client_than_the_one_event_says(
    tmp_path: Path, rounds: tuple[int, ...]
) -> None:
    power = power_against_one_client(tmp_path, *rounds)
    assert 0 < power <= (1 + 1e-5) / EVENT.noise_multiplier
    if rounds == (1, 4, 7):
        # The price is exact: this pattern uses all of it.
        assert power == pytest.approx(1 / EVENT.noise_multiplier, rel=1e-5)


@pytest.mark.parametrize("bug", ["one participation", "turns ignored"])
def test_g16_planted_underpriced_mechanism_tells_more_than_the_one_event_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    if bug == "one participation":
        monkeypatch.setattr(Matrix, "sensitivity", property(lambda self: float(np.linalg.norm(self.coefficients))))
    else:
        monkeypatch.setattr(Turns, "admits", lambda *_: True)
    assert power_against_one_client(tmp_path, *range(1, 13)) > 1.2 / EVENT.noise_multiplier


def test_g14_an_honest_matrix_ledger_is_not_called_forked(tmp_path: Path) -> None:
    """Later rounds of a matrix are receipts that spend nothing; a receipt that spends less is still a fork."""
    with open_book(tmp_path / "book") as book:
        receipts = [receipt for receipt in asked(book, 1, 4, 9) if isinstance(receipt, Receipt)]
    assert len({(receipt.charges, receipt.spent) for receipt in receipts}) == 1
    server = Secret.load_or_create(tmp_path / "server.key").identity("server")

    def verdict(told: Sequence[Receipt]) -> set[str]:
        texts = [receipt.to_json() for receipt in told]
        peers = [{"peer": server.public_key, "countersignature": server.sign(COUNTERSIGN + t.encode())} for t in texts]
        lines = [json.dumps({"receipt": text} | peer) for text, peer in zip(texts, peers, strict=True)]
        (tmp_path / "receipts.jsonl").write_text("".join(f"{line}\n" for line in lines))
        checks = verify_files([tmp_path / "receipts.jsonl", tmp_path / "book" / "ledger.jsonl"])
        return {check.name for check in checks if check.result is Result.FAILS}

    assert verdict(receipts) == set()
    with open_book(tmp_path / "other") as other:
        (forked,) = [receipt for receipt in asked(other, 1) if isinstance(receipt, Receipt)]
    key = Book(tmp_path / "book").secret.identity(receipts[0].account)
    cheaper = dataclasses.replace(
        receipts[2], spent=receipts[2].spent / 2, head=forked.head, public_key=key.public_key, signature=""
    )
    cheaper = dataclasses.replace(cheaper, signature=key.sign(cheaper.signed_bytes()))
    assert "receipts agree" in verdict([*receipts[:2], cheaper])


def test_g16_a_turn_is_measured_from_the_latest_round_in_whatever_order_they_are_named() -> None:
    turns = Turns(digest="ab" * 32, rounds=20, separation=3, participations=5)
    for joined in ([2, 9], [9, 2], [5, 9, 2]):
        assert not turns.admits(joined, 11)
        assert not turns.admits(joined, 6)
        assert turns.admits(joined, 12)
