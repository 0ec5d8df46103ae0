"""The ledger's later kinds of entries: terms of a commitment, the holder's own budget, older versions, odd clocks."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privacy.accounting import Event, rdp
from privacy.errors import LedgerError, PlanError
from privacy.ledger import Book, Law, Receipt, Word
from privacy.noise import SECURE_SOURCE
from privacy.plan import canonical
from privacy.transcript import holders_grant, read_ledger
from tests.oracles import ACCOUNT, as_version_2, make_grant, make_plan, make_request, open_book, rechain, remark

OLD = Path(__file__).parent / "ledgers"
# What the old program printed when it wrote these ledgers: spend of three rounds at order 8, and the last heads.
SPENT_RDP = 0.6307196418613521
HEADS = {
    1: "39d589114d86465a1bf8af3362de30a90ba498daad54ab627ebb3c3def3a9d31",
    2: "122ec0ae9321dc87e68f00a27ff06cd6fda5e6f63d4076315fb0eee36447c53d",
}


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "ledger.jsonl").read_bytes()[:-1].split(b"\n")


def entries_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines_of(folder)]


def charged(book: Book, *numbers: int, **changes: Any) -> Receipt:
    for number in numbers:
        receipt = book.charge([make_request(number, **changes)])[0]
        assert isinstance(receipt, Receipt)
    return receipt


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The holder itself writes something else and signs it."""
    data = rechain(lines_of(folder), change, folder / "ledger.key")
    (folder / "ledger.jsonl").write_bytes(data)
    remark(folder)


# -- older versions ------------------------------------------------------------


@pytest.fixture(params=[1, 2])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[int, Path]:
    """A ledger that an older version of this program wrote, not one made to look like it."""
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(OLD / f"version-{request.param}.jsonl", folder / "ledger.jsonl")
    shutil.copy(OLD / f"version-{request.param}.key", folder / "ledger.key")
    (folder / "ledger.key").chmod(0o600)
    # It left the last batch, of one line, as an intent of the first format beside it.
    *lines, last = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    intent = canonical([sum(map(len, lines)), hashlib.sha256(last).hexdigest()]) + b"\n" + last
    (folder / "ledger.intent").write_bytes(intent)
    return request.param, folder


def test_a_ledger_that_an_older_version_wrote_verifies_and_goes_on_with_its_spend(old: tuple[int, Path]) -> None:
    version, folder = old
    before = (folder / "ledger.jsonl").read_bytes()
    with Book(folder) as book:
        account = book.accounts[ACCOUNT]
        assert (account.spent_rdp, account.charges, account.heads[-1]) == (SPENT_RDP, 3, HEADS[version])
        assert charged(book, 4).charges == 4
        book.set_budget(ACCOUNT, 2.9)
    with Book(folder) as book:
        assert book.accounts[ACCOUNT].spent_rdp == pytest.approx(4 / 3 * SPENT_RDP)
        assert book.accounts[ACCOUNT].grant.epsilon == 2.9
        assert book.accounts[ACCOUNT].unsigned == (5 if version == 1 else 0)
    assert (folder / "ledger.jsonl").read_bytes().startswith(before)


def test_an_older_ledger_reads_without_its_key(old: tuple[int, Path]) -> None:
    version, folder = old
    ledger = read_ledger(folder)
    assert [line.round for line in ledger.lines] == [1, 2, 3, 1]
    assert ledger.accounts[ACCOUNT].spent_rdp == SPENT_RDP
    assert all((line.receipt is None) == (version == 1) for line in ledger.lines)


@pytest.mark.parametrize("position", range(40, 4000, 397))
def test_a_changed_byte_of_an_older_ledger_is_seen(old: tuple[int, Path], position: int) -> None:
    _, folder = old
    data = bytearray((folder / "ledger.jsonl").read_bytes())
    data[position] ^= 1
    (folder / "ledger.jsonl").write_bytes(data)
    for read in (Book, read_ledger):
        with pytest.raises(LedgerError):
            read(folder)


def test_an_account_never_goes_back_to_an_older_version(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        charged(book, 1)
    rewritten(tmp_path, lambda e: e.update(v=2) if e["kind"] == "charge" else None)
    with pytest.raises(LedgerError, match="older version"):
        Book(tmp_path)


# -- terms ------------------------------------------------------------


def test_a_commitment_names_the_code_the_settings_and_the_sampling_law(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        charged(book, 1, code="c0" * 32, settings="5e" * 32)
        charged(book, 1, job="cd" * 16, noise="test:Seeded")
        whole = make_plan(sample_rate=1.0, noise_multiplier=20.0)
        charged(book, 1, job="ef" * 16, plan=whole)
    bodies = [entry["body"] for entry in entries_of(tmp_path) if entry["kind"] == "commit"]
    assert [body["sampling"] for body in bodies] == [Law.POISSON, Law.TEST, Law.NONE]
    assert [(body["code"], body["settings"]) for body in bodies] == [("c0" * 32, "5e" * 32), ("", ""), ("", "")]
    # A charge stays as small as it was: the terms are said once per job.
    assert all("sampling" not in entry["body"] for entry in entries_of(tmp_path) if entry["kind"] == "charge")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("sampling"),
        lambda body: body.update(sampling="fixed-size batches"),
        lambda body: body.update(sampling=Law.NONE.value),
        lambda body: body.pop("code"),
        lambda body: body.update(code="main"),
        lambda body: body.update(settings=7),
    ],
)
def test_g6_a_commitment_without_terms_that_can_be_priced_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    with open_book(tmp_path) as book:
        charged(book, 1)
    rewritten(tmp_path, lambda e: change(e["body"]) if e["kind"] == "commit" else None)
    with pytest.raises(LedgerError):
        Book(tmp_path)


def test_terms_are_not_asked_of_a_version_that_had_none(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        charged(book, 1, 2)
    data = as_version_2(lines_of(tmp_path), tmp_path / "ledger.key")
    (tmp_path / "ledger.jsonl").write_bytes(data)
    remark(tmp_path)
    with Book(tmp_path) as book:
        assert charged(book, 3).charges == 3


def test_g6_an_unknown_kind_of_entry_is_refused_and_never_priced_as_zero(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        charged(book, 1)
    rewritten(tmp_path, lambda e: e.update(kind="gift") if e["kind"] == "charge" else None)
    with pytest.raises(LedgerError, match="unknown kind 'gift'"):
        Book(tmp_path)


# -- the holder's own budget ------------------------------------------------------------


def test_g2_a_budget_is_lowered_freely_and_the_gate_obeys_at_once(tmp_path: Path) -> None:
    with open_book(tmp_path) as book, Book(tmp_path) as other:
        spent = charged(book, 1, 2).spent
        order, delta = book.accounts[ACCOUNT].grant.order, book.accounts[ACCOUNT].grant.delta
        assert other.set_budget(ACCOUNT, spent).grant.epsilon == spent
        assert book.charge([make_request(3)]) == [Word.DECLINED]
    with Book(tmp_path) as book:
        account = book.accounts[ACCOUNT]
        assert (account.grant.epsilon, account.grant.order, account.grant.delta) == (spent, order, delta)
        assert [(change.before, change.after) for change in account.changes] == [(3.0, spent)]
        assert book.charge([make_request(3)]) == [Word.DECLINED]


def test_g2_planted_gate_that_keeps_the_first_budget_overspends_the_lowered_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(make_grant()).affords
    first = make_grant()
    monkeypatch.setattr("privacy.accounting.Grant.affords", lambda self, spent, event: real(first, spent, event))
    with pytest.raises(AssertionError):
        test_g2_a_budget_is_lowered_freely_and_the_gate_obeys_at_once(tmp_path)


def test_g2_raising_a_budget_needs_a_word_and_stays_on_record(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        before = lines_of(tmp_path)
        with pytest.raises(PlanError, match="--raise"):
            book.set_budget(ACCOUNT, 4.0)
        assert lines_of(tmp_path) == before
        book.set_budget(ACCOUNT, 4.0, may_raise=True)
        assert book.set_budget(ACCOUNT, 4.0) is book.accounts[ACCOUNT]
        receipt = charged(book, 1)
        assert receipt.granted == 4.0
        book.set_budget(ACCOUNT, 3.5)
    with Book(tmp_path) as book:
        assert [(c.before, c.after) for c in book.accounts[ACCOUNT].changes] == [(3.0, 4.0), (4.0, 3.5)]
    body = next(entry["body"] for entry in entries_of(tmp_path) if entry["kind"] == "budget")
    assert body == {"epsilon": 4.0, "before": 3.0, "raised": True}
    # Receipts that were given before a change verify as what they said then.
    assert [line.granted for line in read_ledger(tmp_path).lines] == [4.0]
    assert read_ledger(tmp_path).lines[0].receipt == receipt


def test_g3_what_is_spent_cannot_be_taken_back_by_a_smaller_budget(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        spent = charged(book, 1, 2).spent
        with pytest.raises(LedgerError, match="cannot be taken back"):
            book.set_budget(ACCOUNT, spent * 0.99)
        with pytest.raises(PlanError, match="order was fixed"):
            book.set_budget(ACCOUNT, 0.01)
        with pytest.raises(LedgerError, match="got none"):
            book.set_budget("stranger", 1.0)
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(PlanError):
                book.set_budget(ACCOUNT, value, may_raise=True)
        assert (book.accounts[ACCOUNT].spent, book.accounts[ACCOUNT].changes) == (spent, [])


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(before=9.0),
        lambda body: body.update(raised=True),
        lambda body: body.update(epsilon=0.5),
        lambda body: body.update(epsilon=5.0),
        lambda body: body.update(epsilon="2"),
    ],
)
def test_g2_a_change_of_budget_that_hides_something_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    with open_book(tmp_path) as book:
        charged(book, 1, 2)
        book.set_budget(ACCOUNT, 2.8)
    rewritten(tmp_path, lambda e: change(e["body"]) if e["kind"] == "budget" else None)
    with pytest.raises(LedgerError):
        Book(tmp_path)


def test_g2_nobody_but_the_holder_changes_a_budget(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        book.set_budget(ACCOUNT, 4.0, may_raise=True)
    data = rechain(lines_of(tmp_path), lambda e: e["body"].update(epsilon=40.0) if e["kind"] == "budget" else None)
    (tmp_path / "ledger.jsonl").write_bytes(data)
    remark(tmp_path)
    for read in (Book, read_ledger):
        with pytest.raises(LedgerError, match="signature"):
            read(tmp_path)


def test_g2_a_jobs_grant_never_overrides_the_budget_that_a_holder_set(tmp_path: Path) -> None:
    with Book(tmp_path) as book:
        own = holders_grant(epsilon=1.5, delta=1e-6, records_bound=5000)
        book.grant({ACCOUNT: own}, population="one clinic")
        book.grant({ACCOUNT: make_grant(epsilon=50.0, delta=1e-5)}, population="one clinic")
        assert book.accounts[ACCOUNT].grant == own
        # A job that asks for more than the holder allows is declined, whatever its plan says it may spend.
        assert book.charge([make_request(1, make_plan(epsilon=50.0, noise_multiplier=0.7, steps=40))]) == [
            Word.DECLINED
        ]


def test_g2_planted_ledger_that_lets_a_job_set_the_budget_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overriding(self: Book, grants: Any, **_: Any) -> None:
        real(self, grants, population="one clinic")
        for name, grant in grants.items():
            self.accounts[name].grant = grant

    real = Book.grant
    monkeypatch.setattr(Book, "grant", overriding)
    with pytest.raises(AssertionError):
        test_g2_a_jobs_grant_never_overrides_the_budget_that_a_holder_set(tmp_path)


def test_g3_the_order_of_a_budget_without_a_job_affords_the_most_noised_sums() -> None:
    own = holders_grant(epsilon=3.0, delta=1e-5, records_bound=100)
    sum_of_all = Event(sample_rate=1.0, noise_multiplier=50.0, steps=1)
    affords = {order: make_grant(order=order).budget_rdp / rdp(sum_of_all, order) for order in (5.0, own.order, 16.0)}
    assert max(affords, key=affords.__getitem__) == own.order
    assert holders_grant(epsilon=3.0, delta=1e-5, records_bound=100, order=16.0).order == 16.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 0.01, 2.0, float("nan")])
def test_g2_a_delta_of_nothing_of_all_or_of_a_whole_record_is_refused(delta: float) -> None:
    with pytest.raises(PlanError):
        holders_grant(epsilon=3.0, delta=delta, records_bound=100)
    with pytest.raises(PlanError):
        make_grant(delta=delta, records_bound=100)


# -- clocks ------------------------------------------------------------


def test_a_clock_that_goes_backwards_is_flagged_and_loses_no_spend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_book(tmp_path) as book:
        charged(book, 1)
        monkeypatch.setattr("privacy.ledger.time.time", lambda: 1e9)
        charged(book, 2)
        monkeypatch.undo()
        charged(book, 3)
    with Book(tmp_path) as book:
        account = book.accounts[ACCOUNT]
        assert (account.charges, account.backwards) == (3, 1)
        assert account.spent_rdp == pytest.approx(SPENT_RDP)
    assert "clock was set back" in read_ledger(tmp_path).tell()["verdict"]


@pytest.mark.parametrize("time", ["now", None, 1.5, True])
def test_a_time_that_is_no_number_of_seconds_is_refused(tmp_path: Path, time: object) -> None:
    with open_book(tmp_path) as book:
        charged(book, 1)
    rewritten(tmp_path, lambda e: e.update(time=time) if e["kind"] == "charge" else None)
    with pytest.raises(LedgerError):
        Book(tmp_path)


def test_the_production_source_alone_has_secret_coins() -> None:
    event = Event(sample_rate=0.1, noise_multiplier=1.0, steps=1)
    assert Law.of(event, SECURE_SOURCE) is Law.POISSON
    assert Law.of(event, "aes-256-ctr keystream ") is Law.TEST
