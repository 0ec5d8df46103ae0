"""Reading, exporting and importing ledgers: with public keys alone, and without ever losing or forking spend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from privacy.errors import LedgerError
from privacy.identity import Secret
from privacy.ledger import Book, Receipt
from privacy.transcript import Transcript, export, import_into, read_ledger
from tests.oracles import ACCOUNT, make_request, open_book, rechain

OTHER = "clinic-8"


def charge(folder: Path, *numbers: int) -> list[Receipt]:
    with Book(folder) as book:
        found = [book.charge([make_request(number)])[0] for number in numbers]
    assert all(isinstance(receipt, Receipt) for receipt in found)
    return found  # type: ignore[return-value]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A book of two accounts with charges in one of them, and a changed budget."""
    with open_book(tmp_path / "book", names=(ACCOUNT, OTHER)) as book:
        book.charge([make_request(1), make_request(1, name=OTHER)])
        book.charge([make_request(2)])
        book.set_budget(OTHER, 2.5)
    return tmp_path / "book"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    with Book(folder) as book:
        export(book, tmp_path / "copy.tacit")
    return tmp_path / "copy.tacit"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- reading without the key ------------------------------------------------------------


def test_a_reader_without_the_key_knows_what_the_holder_knows_and_changes_nothing(folder: Path) -> None:
    before = content(folder)
    with Book(folder) as book:
        known = dict(book.accounts)
    (folder / "ledger.key").unlink()
    ledger = read_ledger(folder)
    assert dict(ledger.accounts) == known
    assert content(folder) == {name: data for name, data in before.items() if name != "ledger.key"}
    told = ledger.tell()
    assert [(row["name"], row["round"], row["released"]) for row in told["charges"]] == [
        (ACCOUNT, 1, "update"),
        (OTHER, 1, "update"),
        (ACCOUNT, 2, "update"),
    ]
    assert [row["granted"] for row in told["accounts"]] == [3.0, 2.5]
    assert told["verdict"] == "Chains and signatures hold."


def test_g14_every_charge_that_is_read_is_the_receipt_that_was_given(folder: Path) -> None:
    given = charge(folder, 3, 4)
    read = [line.receipt for line in read_ledger(folder).lines if line.round > 2]
    assert read == given
    assert all(Receipt.from_json(receipt.to_json()) == receipt for receipt in read if receipt)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:-1], lines[-1][:-40]],
        lambda lines: lines[1:],
        lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines[:4], lines[4].replace(b'"steps":2', b'"steps":1'), *lines[5:]],
        lambda lines: [*lines, b'{"v":3}'],
    ],
    ids=["torn", "beheaded", "reordered", "repeated", "edited", "foreign"],
)
def test_a_ledger_that_was_changed_is_refused_without_its_key_too(
    folder: Path, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    lines = (folder / "ledger.jsonl").read_bytes()[:-1].split(b"\n")
    (folder / "ledger.jsonl").write_bytes(b"\n".join(change(lines)) + b"\n")
    with pytest.raises(LedgerError):
        read_ledger(folder)


def test_a_ledger_whose_hashes_were_repaired_lacks_the_holders_signature(folder: Path) -> None:
    lines = (folder / "ledger.jsonl").read_bytes()[:-1].split(b"\n")
    cheaper = rechain(lines, lambda e: e["body"]["event"].update(steps=1) if "event" in e["body"] else None)
    (folder / "ledger.jsonl").write_bytes(cheaper)
    with pytest.raises(LedgerError, match="signature"):
        read_ledger(folder)


def test_planted_reader_without_a_signature_check_believes_the_repaired_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privacy.ledger.verify", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        test_a_ledger_whose_hashes_were_repaired_lacks_the_holders_signature(folder)


def test_a_missing_ledger_is_a_sentence_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="expected a ledger at"):
        read_ledger(tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- exports ----------------------------------------------------------------------------


def test_an_export_says_what_the_ledger_says_and_holds_no_secret(folder: Path, copy: Path) -> None:
    ledger, text = read_ledger(copy), copy.read_bytes()
    assert ledger.data == (folder / "ledger.jsonl").read_bytes()
    assert ledger.exported is not None
    secret = (folder / "ledger.key").read_bytes()
    derived = [Secret(secret).derive(f"tacit/identity/1/{identity}") for identity in ledger.everyone]
    for key in (secret, *derived):
        assert key not in text
        assert key.hex().encode() not in text


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_an_export_that_was_cut_at_a_line_is_refused(copy: Path, lines: int) -> None:
    whole = copy.read_bytes()[:-1].split(b"\n")
    copy.write_bytes(b"\n".join(whole[:-lines]) + b"\n")
    with pytest.raises(LedgerError, match="cut or changed"):
        read_ledger(copy)
    # The planted bug: without its first line the same cut looks like an honest, younger ledger.
    copy.write_bytes(b"\n".join(whole[1:-lines]) + b"\n")
    assert read_ledger(copy).exported is None


def test_any_changed_byte_of_an_export_is_seen(copy: Path) -> None:
    data = copy.read_bytes()
    for position in range(0, len(data), 13):
        copy.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(LedgerError):
            read_ledger(copy)


def test_a_header_that_the_holder_did_not_sign_is_refused(folder: Path, copy: Path) -> None:
    charge(folder, 3)
    header = json.loads(copy.read_bytes().split(b"\n")[0])
    with Book(folder) as book:
        newer = export(book, copy)
    text = copy.read_bytes().split(b"\n", 1)
    forged = json.loads(text[0]) | {"signatures": header["signatures"]}
    copy.write_bytes(json.dumps(forged, sort_keys=True, separators=(",", ":")).encode() + b"\n" + newer.data)
    with pytest.raises(LedgerError, match="signature"):
        read_ledger(copy)


# -- imports ----------------------------------------------------------------------------


def test_an_import_continues_a_ledger_that_is_behind_its_copy(folder: Path, tmp_path: Path) -> None:
    behind = shutil.copytree(folder, tmp_path / "behind")
    charge(folder, 3, 4)
    with Book(folder) as book:
        copy = export(book, tmp_path / "copy")
    assert import_into(behind, copy) == 2
    assert (behind / "ledger.jsonl").read_bytes() == (folder / "ledger.jsonl").read_bytes()
    with Book(behind) as book:
        assert book.accounts[ACCOUNT].charges == 4
    charge(behind, 5)


def test_an_import_restores_a_lost_ledger_beside_its_key(folder: Path, copy: Path, tmp_path: Path) -> None:
    home = tmp_path / "restored"
    home.mkdir()
    with pytest.raises(LedgerError, match=r"ledger\.key"):
        import_into(home, read_ledger(copy))
    assert list(home.iterdir()) == []
    shutil.copy(folder / "ledger.key", home / "ledger.key")
    assert import_into(home, read_ledger(copy)) == len(read_ledger(copy).data.splitlines())
    with Book(home) as book:
        assert book.accounts[ACCOUNT].charges == 2


def test_g3_an_older_copy_never_takes_back_spend(folder: Path, copy: Path) -> None:
    charge(folder, 3)
    before = content(folder)
    assert import_into(folder, read_ledger(copy)) == 0
    assert content(folder) == before


def forks(folder: Path, copy: Path, tmp_path: Path) -> None:
    behind = shutil.copytree(folder, tmp_path / "behind")
    charge(folder, 3)
    charge(behind, 4, 5)
    before = content(folder)
    with Book(behind) as book:
        fork = export(book, copy)
    with pytest.raises(LedgerError, match="another way"):
        import_into(folder, fork)
    assert content(folder) == before


def test_g3_a_fork_is_not_imported(folder: Path, copy: Path, tmp_path: Path) -> None:
    forks(folder, copy, tmp_path)


def test_g3_planted_import_that_takes_the_longer_one_loses_spend(
    folder: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def longer(home: Path, other: Transcript) -> int:
        (home / "ledger.jsonl").write_bytes(other.data)
        return 0

    monkeypatch.setitem(globals(), "import_into", longer)
    with pytest.raises(pytest.fail.Exception):
        forks(folder, copy, tmp_path)


def test_a_copy_of_another_holder_is_not_imported(folder: Path, copy: Path, tmp_path: Path) -> None:
    Book(tmp_path / "other").close()
    before = content(tmp_path / "other")
    with pytest.raises(LedgerError, match=r"another ledger\.key"):
        import_into(tmp_path / "other", read_ledger(copy))
    assert content(tmp_path / "other") == before
