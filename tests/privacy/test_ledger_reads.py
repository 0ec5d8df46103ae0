"""A ledger that one system call does not return whole: a read gives at most 2 GiB, and may always give less."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from privacy.errors import LedgerError
from privacy.ledger import Account, Book
from tests.oracles import ACCOUNT, make_grant, make_plan, make_request, open_book, remark

CHARGES = 40
BYTES_A_CALL = 100


def a_long_ledger(folder: Path) -> Account:
    """Charges two accounts many times; returns one of them as the book that wrote it knows it."""
    plan = make_plan(noise_multiplier=40.0)
    with open_book(folder, make_grant(epsilon=50.0), names=(ACCOUNT, "clinic-8")) as book:
        for number in range(1, CHARGES + 1):
            book.charge([make_request(number, plan=plan), make_request(number, plan=plan, name="clinic-8")])
        return book.accounts[ACCOUNT]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets every read return a few bytes only, as a kernel may; collects how many each call returned."""
    returned: list[int] = []
    pread = os.pread

    def short(descriptor: int, count: int, start: int) -> bytes:
        part = pread(descriptor, min(count, BYTES_A_CALL), start)
        returned.append(len(part))
        return part

    monkeypatch.setattr(os, "pread", short)
    return returned


def a_single_read(self: Book, count: int, start: int) -> bytes:
    """Planted bug: takes what one call returns for the whole."""
    return os.pread(self._file, count, start)


def require_whole(folder: Path, written: Account) -> None:
    """Fails unless the book opens with everything that was written."""
    with Book(folder) as book:
        account = book.accounts[ACCOUNT]
        assert (account.charges, account.heads) == (written.charges, written.heads)
        assert account.spent_rdp == written.spent_rdp > 0
        assert book.accounts["clinic-8"].charges == CHARGES


def test_a_ledger_that_is_read_in_parts_opens_with_all_its_spend(tmp_path: Path, calls: list[int]) -> None:
    written = a_long_ledger(tmp_path)
    calls.clear()
    require_whole(tmp_path, written)
    size = (tmp_path / "ledger.jsonl").stat().st_size
    assert len(calls) >= size / BYTES_A_CALL > 100
    assert sum(calls) >= size


def test_planted_bug_a_ledger_read_by_a_single_call_is_not_whole(
    tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = a_long_ledger(tmp_path)
    monkeypatch.setattr(Book, "_read", a_single_read)
    # Refused for the wrong reason: nothing was cut.
    with pytest.raises(LedgerError, match="what its mark says"):
        require_whole(tmp_path, written)


def test_planted_bug_without_short_reads_a_single_call_would_go_unnoticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that it is the short reads that tell the two apart."""
    written = a_long_ledger(tmp_path)
    monkeypatch.setattr(Book, "_read", a_single_read)
    require_whole(tmp_path, written)


def test_what_another_process_appended_is_read_in_parts_too(tmp_path: Path, calls: list[int]) -> None:
    plan = make_plan(noise_multiplier=40.0)
    with open_book(tmp_path, make_grant(epsilon=50.0)) as mine, Book(tmp_path) as other:
        for number in range(1, 4):
            other.charge([make_request(number, plan=plan)])
        calls.clear()
        mine.refresh()
        assert len(calls) > 3
        assert mine.accounts[ACCOUNT].charges == 3
        assert mine.accounts[ACCOUNT].spent_rdp == other.accounts[ACCOUNT].spent_rdp


def tear(folder: Path) -> None:
    """Leaves a book as a crash in the middle of a charge does: its last lines were not marked, and one is torn."""
    data = (folder / "ledger.jsonl").read_bytes()
    *_, last = data.splitlines()
    (folder / "ledger.jsonl").write_bytes(data[: data.rfind(b"\n", 0, -6 * len(last)) + 1])
    remark(folder)
    (folder / "ledger.jsonl").write_bytes(data + last[:150])


def test_a_torn_charge_is_settled_from_reads_in_parts(tmp_path: Path, calls: list[int]) -> None:
    written = a_long_ledger(tmp_path)
    tear(tmp_path)
    require_whole(tmp_path, written)


def test_planted_bug_a_torn_charge_is_not_settled_from_a_single_read(
    tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = a_long_ledger(tmp_path)
    tear(tmp_path)
    # It takes bytes that it did not read for missing ones; what it read contradicts the mark, so nothing is dropped.
    monkeypatch.setattr(Book, "_read", a_single_read)
    with pytest.raises(LedgerError):
        require_whole(tmp_path, written)
    monkeypatch.undo()
    require_whole(tmp_path, written)
