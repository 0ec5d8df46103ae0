"""Charges and receipts that are read by their shape are read as JSON would read them, and nothing else is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import pytest

from privacy import ledger
from privacy.errors import LedgerError
from privacy.ledger import Receipt
from privacy.plan import Metric, Metrics, canonical
from tests.oracles import make_grant, make_plan, make_request, open_book


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A charge of one event, and one of several."""
    found = []
    for metrics in (None, Metrics(words=(Metric.LOSS, Metric.COUNT), noise=20.0, loss_bound=5.0)):
        folder = tmp_path_factory.mktemp("plain")
        with open_book(folder, make_grant(epsilon=8.0)) as book:
            book.charge([make_request(plan=make_plan(noise_multiplier=40.0, metrics=metrics))])
        found.append((folder / "ledger.jsonl").read_bytes().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def receipts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("receipts")
    with open_book(folder, make_grant(epsilon=8.0)) as book:
        (receipt,) = book.charge([make_request(plan=make_plan(noise_multiplier=40.0))])
    assert isinstance(receipt, Receipt)
    return [receipt.to_json()]


def variants(text: str) -> Iterator[str]:
    """Other texts, of which some say the same and most say something else or nothing."""
    for place in range(len(text)):
        for other in (chr(ord(text[place]) ^ 1), chr(ord(text[place]) ^ 0x10), text[place] * 2, ""):
            yield text[:place] + other + text[place + 1 :]
    for old, new in (
        (",", ", "),
        ('"v":3', '"v":3.0'),
        ('"round":1', '"round":01'),
        ('"round":1', '"round":1e0'),
        ('"round":1', '"round":-0'),
        ('"round":1', '"round":true'),
        ('"steps":2', '"steps":2.0'),
        ('"steps":2', '"steps":2,"steps":2'),
        ('"kind":"poisson', '"kind":"\\u0070oisson'),
        ('"noise_multiplier":40.0', '"noise_multiplier":40'),
        ('"noise_multiplier":40.0', '"noise_multiplier":40.00'),
        ('"noise_multiplier":40.0', '"noise_multiplier":4e1'),
        ('"noise_multiplier":40.0', '"noise_multiplier":NaN'),
        ('"spent":', '"spent":0'),
        ('"spent":', '"spent":+'),
        ('"spent":', '"spent":1e999,"spent":'),
        ('"test":false', '"test":0'),
        ('"job":"ab', '"job":"\\u0061b'),
        ('"job":"ab', '"job":"ab\x7f'),
        ('"job":"ab', '"job":"é'),
        ('{"account"', ' {"account"'),
    ):
        yield text.replace(old, new, 1)
    yield text + "\n"
    yield text + " "
    fields = json.loads(text)
    yield json.dumps(fields, separators=(",", ":"))
    yield canonical({name: fields[name] for name in list(fields)[1:]}).decode()


def test_a_line_of_the_plain_shape_is_read_as_json_reads_it(lines: list[bytes]) -> None:
    for line in lines:
        own = ledger._paid_entry(line.decode())
        assert own is not None, "a charge of this program must be of the plain shape, or it is read slowly"
        entry, hashed, event = own
        assert entry == json.loads(line)
        assert canonical(entry) == line
        assert hashlib.sha256(hashed).hexdigest() == ledger._digest(entry) == entry["hash"]
        assert event == canonical(entry["body"]["event"]).decode()


def test_whatever_the_shape_lets_in_is_the_one_text_of_what_json_reads(lines: list[bytes]) -> None:
    taken = 0
    for line in lines:
        for text in variants(line.decode()):
            if (own := ledger._paid_entry(text)) is not None:
                taken += 1
                entry = json.loads(text)
                assert own[0] == entry
                assert [type(value) for value in own[0]["body"].values()] == [type(v) for v in entry["body"].values()]
                assert canonical(entry).decode() == text
                # Another content has another hash, which the entry does not say.
                assert hashlib.sha256(own[1]).hexdigest() == ledger._digest(entry)
                sound = ledger._digest(entry) == entry["hash"]
                assert ledger._entry_of(text.encode())[1] == sound
    assert taken > 100


def test_planted_bug_a_shape_without_its_comparison_of_floats_takes_a_second_text(
    lines: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = lines[0].decode()
    spent = json.loads(text)["body"]["spent"]
    second = text.replace(f'"spent":{spent}', f'"spent":{spent}0')
    assert second != text
    assert ledger._paid_entry(second) is None
    monkeypatch.setattr(ledger, "repr", lambda value: f"{spent}0", raising=False)
    assert ledger._paid_entry(second) is not None


def long_way(text: str) -> Receipt | None:
    try:
        return Receipt._from_any_text(text)
    except (ValueError, TypeError, KeyError, AttributeError, LedgerError):
        return None


def test_a_receipt_that_is_read_by_its_shape_is_what_the_long_way_reads(receipts: list[str]) -> None:
    taken = 0
    for text in receipts:
        assert Receipt._from_own_text(text) == Receipt._from_any_text(text)
        for other in variants(text):
            if (own := Receipt._from_own_text(other)) is not None:
                taken += 1
                assert own == long_way(other)
                assert own.to_json() == other == canonical(own._fields()).decode()
    assert taken > 100


def test_what_a_receipt_signs_is_all_of_it_but_the_signature(receipts: list[str]) -> None:
    for text in receipts:
        fields = json.loads(text)
        del fields["signature"]
        assert Receipt.from_json(text).signed_bytes() == b"tacit/receipt/1\n" + canonical(fields)
