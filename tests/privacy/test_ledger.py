"""The ledger: no spend is lost, no budget is passed, no edit goes unseen, whatever the disk and the peers do."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import stat
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy.accounting import Event, pld_epsilon, rdp
from privacy.errors import LedgerError, PlanError, TacitError
from privacy.identity import Identity
from privacy.ledger import INTENTS, Book, ChargeRequest, Receipt, Word, _Intent
from privacy.noise import SECURE_SOURCE
from privacy.plan import Metric, Metrics, canonical
from privacy.wire import request_digest
from tests.oracles import (
    ACCOUNT,
    as_version_1,
    charge_until_refused,
    make_grant,
    make_plan,
    make_request,
    open_book,
    rechain,
)


def charged(book: Book, request: ChargeRequest) -> Receipt:
    """Charges one request, which must be admitted."""
    receipt = book.charge([request])[0]
    assert isinstance(receipt, Receipt), receipt
    return receipt


def state(book: Book, name: str = ACCOUNT) -> dict[str, Any]:
    """Returns everything an account knows, to compare."""
    return dataclasses.asdict(book.accounts[name])


def reopened(folder: Path, name: str = ACCOUNT) -> dict[str, Any]:
    with Book(folder) as book:
        return state(book, name)


def is_refused(folder: Path, cls: type[Book] = Book) -> bool:
    """Whether a book cannot be opened; it must say so with its own error and leave the file as it is."""
    path = folder / "ledger.jsonl"
    before = path.read_bytes()
    try:
        cls(folder).close()
    except LedgerError:
        assert path.read_bytes() == before
        return True
    return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A book with one account and three charges; the last charge is the whole of its intent."""
    with open_book(tmp_path / "book") as book:
        for number in (1, 2, 3):
            charged(book, make_request(number))
    return tmp_path / "book"


# -- what a charge is -------------------------------------------------------------------------------------------------


def test_g3_spend_is_the_filters_price_of_all_charges(folder: Path) -> None:
    plan, grant = make_plan(), make_grant()
    with Book(folder) as book:
        spent = book.accounts[ACCOUNT].spent
    once = grant.epsilon_of(rdp(Event(sample_rate=0.1, noise_multiplier=1.3, steps=3 * plan.steps), grant.order))
    assert spent == pytest.approx(once, rel=1e-9)
    assert spent >= pld_epsilon(Event(sample_rate=0.1, noise_multiplier=1.3, steps=3 * plan.steps), grant.delta)


def test_g3_spend_survives_restarts_and_composes_over_jobs_and_models(tmp_path: Path) -> None:
    """Trap T1: an accountant made anew each round shows one round. Here each round has a fresh book object."""
    plans = [make_plan(), make_plan(sample_rate=0.2, noise_multiplier=2.0, steps=5)]
    total = 0.0
    with open_book(tmp_path):
        pass
    for number in range(1, 7):
        with Book(tmp_path) as book:
            plan = plans[number % 2]
            receipt = charged(book, make_request(number, plan, job=f"{number % 2:032x}"))
        total += rdp(Event.of_round(plan), 8.0)
        assert receipt.spent == pytest.approx(make_grant().epsilon_of(total), rel=1e-9)
    composed = _pld_of_all([Event.of_round(plans[n % 2]) for n in range(1, 7)])
    assert receipt.spent >= composed
    # The planted bug: one book per round, as if nothing had been spent before.
    with open_book(tmp_path / "fresh") as book:
        forgetful = charged(book, make_request(6, plans[0], job="0" * 32)).spent
    assert forgetful < receipt.spent


def _pld_of_all(events: list[Event]) -> float:
    from dp_accounting import dp_event
    from dp_accounting.pld import pld_privacy_accountant

    other = pld_privacy_accountant.PLDAccountant()
    for event in events:
        noise = dp_event.GaussianDpEvent(event.noise_multiplier)
        other.compose(dp_event.PoissonSampledDpEvent(event.sample_rate, noise), event.steps)
    return float(other.get_epsilon(1e-5))


def test_g3_no_account_passes_its_budget(tmp_path: Path) -> None:
    plan = make_plan(joins=10_000)
    with open_book(tmp_path, make_grant(epsilon=2.3)) as book:
        outcomes = [book.charge([make_request(number, plan)])[0] for number in range(1, 30)]
        admitted = sum(isinstance(outcome, Receipt) for outcome in outcomes)
        account = book.accounts[ACCOUNT]
        assert 1 < admitted < 29
        assert outcomes[admitted:] == [Word.DECLINED] * (29 - admitted)
        assert account.spent <= 2.3 < account.grant.epsilon_of(account.spent_rdp + rdp(Event.of_round(plan), 8.0))
        # What is refused writes nothing: the file says only what was spent.
        size = (tmp_path / "ledger.jsonl").stat().st_size
        assert book.charge([make_request(99, plan)]) == [Word.DECLINED]
        assert (tmp_path / "ledger.jsonl").stat().st_size == size


def test_g3_planted_gate_that_forgets_other_jobs_overspends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above is not vacuous: a gate that starts from zero lets the budget be passed."""
    real = type(make_grant()).affords
    monkeypatch.setattr("privacy.accounting.Grant.affords", lambda self, spent, event: real(self, 0.0, event))
    with open_book(tmp_path, make_grant(epsilon=2.3)) as book:
        for number in range(1, 30):
            charged(book, make_request(number))
        assert book.accounts[ACCOUNT].spent > 2.3


def test_g3_joins_that_a_plan_committed_are_enforced_retries_included(tmp_path: Path) -> None:
    plan = make_plan(joins=3)
    with open_book(tmp_path) as book:
        charged(book, make_request(1, plan))
        charged(book, make_request(1, plan))
    with open_book(tmp_path) as book:
        charged(book, make_request(2, plan))
        assert book.charge([make_request(3, plan)]) == [Word.DECLINED]
        assert book.charge([make_request(2, plan)]) == [Word.DECLINED]
        # Another job has joins of its own, and pays from the same budget.
        assert charged(book, make_request(1, plan, job="cd" * 16)).charges == 4


def test_g2_everything_is_priced_at_the_holders_delta(tmp_path: Path) -> None:
    spends = []
    for index, delta in enumerate((1e-9, 1e-5, 1.9e-4)):
        with open_book(tmp_path / str(index)) as book:
            receipt = charged(book, make_request(1, make_plan(delta=delta)))
        assert receipt.delta == 1e-5
        spends.append(receipt.spent)
    assert len(set(spends)) == 1
    # The planted bug: the job's own delta would have made the same release look cheaper.
    priced_by_job = make_grant(delta=1.9e-4).epsilon_of(rdp(Event.of_round(make_plan()), 8.0))
    assert priced_by_job < spends[0]


def test_g2_a_grant_cannot_be_made_twice(tmp_path: Path) -> None:
    with open_book(tmp_path, make_grant(epsilon=2.0)) as book:
        charged(book, make_request(1))
        before = state(book)
        book.grant({ACCOUNT: make_grant(epsilon=99.0, delta=1e-7)}, population="one clinic")
        assert state(book) == before
    assert reopened(tmp_path)["grant"]["epsilon"] == 2.0


def test_g2_another_split_of_the_same_records_needs_another_book(tmp_path: Path) -> None:
    with open_book(tmp_path) as book, pytest.raises(LedgerError, match="another split"):
        book.grant({"clinic-8": make_grant()}, population="two clinics")


def test_g7_only_a_signed_statement_that_no_person_is_in_both_starts_another_ledger(tmp_path: Path) -> None:
    with open_book(tmp_path / "book") as book:
        charged(book, make_request(1))
        with pytest.raises(LedgerError, match="no-person-in-common"):
            book.grant({ACCOUNT: make_grant()}, population="other patients")
        book.grant({ACCOUNT: make_grant()}, population="other patients", no_person_in_common=True)
        assert book.accounts[ACCOUNT].apart == ("one clinic",)
        assert book.accounts[ACCOUNT].charges == 0
        charged(book, make_request(1))
        charged(book, make_request(2))
        # Once stated, the statement stands: the same population may be opened, and extended, without it.
        book.grant({"more": make_grant()}, population="other patients")
        assert book.accounts["more"].apart == ("one clinic",)
    for population, charges in (("one clinic", 1), ("other patients", 2)):
        with Book(tmp_path / "book", population) as book:
            assert book.accounts[ACCOUNT].charges == charges
    with Book(tmp_path / "book") as book, pytest.raises(LedgerError, match="which of the populations"):
        assert book.accounts
    # The statement is signed, and no ledger with two populations is believed without it.
    lines = (tmp_path / "book/ledger.jsonl").read_bytes()[:-1].split(b"\n")

    def unsaid(entry: dict[str, Any]) -> None:
        if entry["kind"] == "grant":
            entry["body"]["apart"] = []

    key = tmp_path / "book/ledger.key"
    for forged in (rechain(lines, unsaid, key), rechain(lines, unsaid)):
        with copied(tmp_path / "book", forged, intent=False) as copy:
            assert is_refused(copy)


def test_g7_planted_ledger_that_opens_itself_to_anybody_hides_spend(tmp_path: Path) -> None:
    """Without the statement, a second name for the same persons would start at zero."""
    with open_book(tmp_path) as book:
        spent = charged(book, make_request(1)).spent
        book.grant({ACCOUNT: make_grant()}, population="the same persons, renamed", no_person_in_common=True)
        assert book.accounts[ACCOUNT].spent == 0 < spent


def test_g9_a_charge_pays_for_one_release_only(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        request = make_request(1)
        first = charged(book, request)
        book.claim(first, request)
        with pytest.raises(LedgerError, match="already used"):
            book.claim(first, request)
        # Charged anew after a crash: the earlier charge of the same request pays for nothing any more.
        older, newer = charged(book, make_request(2)), charged(book, make_request(2))
        with pytest.raises(LedgerError, match="holds"):
            book.claim(older, make_request(2))
        book.claim(newer, make_request(2))


@pytest.mark.parametrize("change", [{"job": "cd" * 16}, {"round": 2}, {"request": "0" * 64}])
def test_g9_a_charge_pays_for_its_own_request_only(tmp_path: Path, change: dict[str, Any]) -> None:
    with open_book(tmp_path) as book:
        request = make_request(1)
        receipt = charged(book, request)
        with pytest.raises(LedgerError, match="for this request"):
            book.claim(receipt, dataclasses.replace(request, **change))
        with pytest.raises(LedgerError, match="for this request"):
            book.claim(dataclasses.replace(receipt, **change), request)
        with pytest.raises(LedgerError, match="holds"):
            book.claim(dataclasses.replace(receipt, head="0" * 64), request)
        with pytest.raises(LedgerError, match="test noise"):
            book.claim(receipt, dataclasses.replace(request, noise="test:Seeded"))


def test_g14_the_signature_in_a_charge_entry_is_its_receipts(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        receipt = charged(book, make_request(1))
    entry = json.loads((tmp_path / "ledger.jsonl").read_bytes().splitlines()[-1])
    assert (entry["sig"], entry["hash"]) == (receipt.signature, receipt.head)
    Receipt.from_json(receipt.to_json())


def test_an_account_without_a_grant_is_refused_and_charges_nobody(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        with pytest.raises(LedgerError, match="grant"):
            book.charge([make_request(1), make_request(1, name="stranger")])
        assert book.accounts[ACCOUNT].charges == 0


def test_one_account_twice_in_a_cohort_is_refused_and_leaves_the_book_whole(tmp_path: Path) -> None:
    """Two entries after the same one would fork the chain and lock the ledger for ever."""
    with open_book(tmp_path) as book:
        with pytest.raises(LedgerError, match="one request per account"):
            book.charge([make_request(1), make_request(2)])
        charged(book, make_request(1))
    assert reopened(tmp_path)["charges"] == 1


def test_a_server_cannot_win_back_a_spent_budget(tmp_path: Path) -> None:
    """With q = 0.9 and huge noise, rounding makes one step's raw price negative; a plan may ask for many steps."""
    with open_book(tmp_path) as book:
        spent = charged(book, make_request(1)).spent
        for job, steps in enumerate((1, 10**6, 10**12)):
            plan = make_plan(sample_rate=0.9, noise_multiplier=1e8, steps=steps)
            book.charge([make_request(1, plan, job=f"{job:032x}")])
            assert book.accounts[ACCOUNT].spent >= spent
            spent = book.accounts[ACCOUNT].spent
    with pytest.raises(PlanError, match="steps"):
        make_plan(steps=10**18)


def test_planted_raw_price_would_win_back_a_spent_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.accountants.analysis.rdp import compute_rdp

    def raw(releases: Sequence[Event], order: float) -> float:
        return sum(
            event.steps
            * float(compute_rdp(q=event.sample_rate, noise_multiplier=event.noise_multiplier, steps=1, orders=order))
            for event in releases
        )

    with open_book(tmp_path, make_grant(order=6.9)) as book:
        spent = charged(book, make_request(1)).spent
        monkeypatch.setattr("privacy.ledger.rdp", raw)
        monkeypatch.setattr("privacy.accounting.rdp", raw)
        charged(book, make_request(1, make_plan(sample_rate=0.5, noise_multiplier=1e8, steps=10**12), job="0" * 32))
        assert book.accounts[ACCOUNT].spent < spent


@pytest.mark.parametrize("change", [{"job": "j" * 20_000}, {"commitment": "c" * 20_000}, {"noise": "n" * 20_000}])
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, change: dict[str, str]) -> None:
    """A server names the job; an overlong name must not lock the ledger."""
    with open_book(tmp_path) as book:
        with pytest.raises(LedgerError, match="bytes"):
            book.charge([make_request(1, **change)])
        charged(book, make_request(1))
    assert reopened(tmp_path)["charges"] == 1


def test_odd_but_legal_names_are_read_back(tmp_path: Path) -> None:
    names = ["é\n\r\u2028 ", "", '"}', "\ud800", "\x85\x1c", "a" * 2000]
    with open_book(tmp_path, names=names) as book:
        book.charge([make_request(1, name=name) for name in names])
        before = {name: state(book, name) for name in names}
    for name in names:
        assert reopened(tmp_path, name) == before[name]


# -- G9: what a charge is bound to ---------------------------------------------------------------------------------


def test_g9_a_round_is_bound_to_one_request_and_a_job_to_one_plan(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        charged(book, make_request(1))
    with Book(tmp_path) as book:
        other = make_request(1, request=hashlib.sha256(b"another model").hexdigest())
        assert book.charge([other]) == [Word.CONFLICT]
        for change in ({"noise_multiplier": 1.2}, {"joins": 51}, {"steps": 3}, {"delta": 2e-5}, {"l2_clip": 0.8}):
            assert book.charge([make_request(2, make_plan(**change))]) == [Word.CONFLICT]
        assert book.accounts[ACCOUNT].charges == 1
        # The same request again, because the process died before it kept its release: charged anew.
        first, again = book.accounts[ACCOUNT].spent, charged(book, make_request(1))
        assert again.spent > first
        assert again.charges == 2


def test_g9_planted_binding_to_the_round_alone_is_caught(tmp_path: Path) -> None:
    """With a digest that leaves the model out, another model in the same round would pass as the same request."""
    fields: dict[str, str | int | float] = {"job": "ab" * 16, "round": 1, "lr": 0.1}
    bound = [request_digest(fields, model) for model in ("m1", "m2")]
    unbound = [request_digest(fields, "") for _ in ("m1", "m2")]
    with open_book(tmp_path) as book:
        charged(book, make_request(1, request=bound[0]))
        assert book.charge([make_request(1, request=bound[1])]) == [Word.CONFLICT]
        charged(book, make_request(2, request=unbound[0]))
        assert isinstance(book.charge([make_request(2, request=unbound[1])])[0], Receipt)


def test_g9_a_request_digest_covers_every_field() -> None:
    fields: dict[str, str | int | float] = {"job": "ab", "round": 3, "lr": 0.1, "witness": ""}
    digests = {request_digest(fields, "m")} | {request_digest(fields, "n")}
    for name, value in {"job": "ac", "round": 4, "lr": math.nextafter(0.1, 1), "witness": "0:aa"}.items():
        digests.add(request_digest(fields | {name: value}, "m"))
    digests.add(request_digest({k: v for k, v in fields.items() if k != "witness"}, "m"))
    assert len(digests) == 7


# -- G7: which data set, and what is never written -----------------------------------------------------------------


def test_g7_appending_one_record_keeps_the_account_and_its_spend(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        before = book.secret.commitment(ACCOUNT, b"record one\nrecord two")
        first = charged(book, make_request(1, commitment=before))
    with open_book(tmp_path) as book:
        after = book.secret.commitment(ACCOUNT, b"record one\nrecord two\nrecord three")
        second = charged(book, make_request(2, commitment=after))
        assert book.accounts[ACCOUNT].commitment == after != before
    assert second.account == first.account
    assert second.spent > first.spent
    # The planted bug: a ledger named by its content starts anew when a record is added.
    with open_book(tmp_path, names=(before, after)) as book:
        spends = [charged(book, make_request(1, name=name)).spent for name in (before, after)]
    assert spends[0] == spends[1] < second.spent


def leaks(folder: Path, content: bytes, records: int, histogram: list[int]) -> set[str]:
    """Returns which secrets about the data any file of a book gives away."""
    text = b"".join(path.read_bytes() for path in folder.iterdir() if path.name != "ledger.key").decode()
    bare = {hashlib.new(name, content).hexdigest() for name in ("sha256", "sha1", "md5", "sha512", "blake2b")}
    found = {"bare hash"} if any(digest in text for digest in bare) else set()
    found |= {"exact number"} if str(records) in text else set()
    found |= {"histogram"} if json.dumps(histogram, separators=(",", ":"))[1:-1] in text else set()
    return found | ({"content"} if content.decode() in text else set())


def test_g7_no_bare_hash_number_or_histogram_is_written(tmp_path: Path) -> None:
    content, records, histogram = b"marker of a record 271828", 98317, [98311, 6]
    with open_book(tmp_path) as book:
        commitment = book.secret.commitment(ACCOUNT, content)
        charged(book, make_request(1, commitment=commitment))
    assert leaks(tmp_path, content, records, histogram) == set()
    bodies = [json.loads(line)["body"] for line in (tmp_path / "ledger.jsonl").read_bytes().splitlines()]
    assert [set(body) for body in bodies] == [
        {"epsilon", "delta", "order", "unit", "adjacency", "records_bound", "name", "population", "apart", "key"},
        # The two hashes are of public things: of this program's code, and of the job's settings.
        {"job", "plan", "joins", "event", "code", "settings", "sampling"},
        {"job", "round", "request", "event", "commitment", "noise", "nonce", "spent", "charges", "test"},
    ]


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (hashlib.sha256(b"marker of a record 271828").hexdigest(), "bare hash"),
        ("n=98317", "exact number"),
        ("98311,6", "histogram"),
        ("marker of a record 271828", "content"),
    ],
)
def test_g7_planted_leaks_are_found(tmp_path: Path, planted: str, found: str) -> None:
    with open_book(tmp_path) as book:
        charged(book, make_request(1, commitment=planted))
    assert leaks(tmp_path, b"marker of a record 271828", 98317, [98311, 6]) == {found}


def test_files_of_a_book_are_private(folder: Path) -> None:
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.iterdir()} == {"ledger.jsonl", "ledger.key", *INTENTS}


# -- G8: on disk before anything else ------------------------------------------------------------------------------


def watched(patch: pytest.MonkeyPatch) -> list[str]:
    """Records what is written, synced and renamed, by file name."""
    log: list[str] = []
    real_sync, real_data, real_write, real_place = os.fsync, os.fdatasync, os.write, os.pwrite
    real_replace = os.replace

    def name(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").readlink().name

    def sync(descriptor: int) -> None:
        log.append(f"sync {name(descriptor)}")
        real_sync(descriptor)

    def sync_data(descriptor: int) -> None:
        log.append(f"sync {name(descriptor)}")
        real_data(descriptor)

    def write(descriptor: int, data: bytes) -> int:
        log.append(f"write {name(descriptor)}")
        return real_write(descriptor, data)

    def place(descriptor: int, data: bytes, position: int) -> int:
        log.append(f"overwrite {name(descriptor)}")
        return real_place(descriptor, data, position)

    def replace(source: Any, target: Any) -> None:
        log.append(f"rename {Path(source).name} {Path(target).name}")
        real_replace(source, target)

    patch.setattr("privacy.ledger.os.fsync", sync)
    patch.setattr("privacy.ledger.os.fdatasync", sync_data)
    patch.setattr("privacy.ledger.os.write", write)
    patch.setattr("privacy.ledger.os.pwrite", place)
    patch.setattr("privacy.ledger.os.replace", replace)
    return log


def test_g8_a_charge_is_on_disk_before_it_returns_with_one_sync_per_cohort(tmp_path: Path) -> None:
    names = [f"client-{index}" for index in range(20)]
    with open_book(tmp_path, names=names) as book:
        with pytest.MonkeyPatch.context() as patch:
            log = watched(patch)
            for number in (1, 2, 3):
                receipts = book.charge([make_request(number, name=name) for name in names])
                assert all(isinstance(receipt, Receipt) for receipt in receipts)
                log.append("return")
    append = ["write ledger.jsonl", "sync ledger.jsonl", "return"]
    assert log == [
        # An intent that is missing is made under another name; one that is large enough is overwritten.
        *("sync ledger.new", "rename ledger.new ledger.intent-2", f"sync {tmp_path.name}", *append),
        *("overwrite ledger.intent", "sync ledger.intent", *append),
        *("overwrite ledger.intent-2", "sync ledger.intent-2", *append),
    ]


def test_g8_planted_charge_without_a_sync_is_seen(tmp_path: Path) -> None:
    class Hasty(Book):
        def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
            os.write(self._file, b"".join(canonical(entry) + b"\n" for entry in entries))
            self._catch_up()

    with open_book(tmp_path, cls=Hasty) as book, pytest.MonkeyPatch.context() as patch:
        log = watched(patch)
        charged(book, make_request(1))
    assert "sync ledger.jsonl" not in log


def test_g8_a_new_ledgers_name_is_synced_too(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        log = watched(patch)
        Book(tmp_path / "book").close()
    assert "sync book" in log


class Crash(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("half", [0, 1, 300, None])
@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize(
    "where", ["fsync 1", "replace 1", "fsync 2", "pwrite 1", "fdatasync 1", "write 1", "fdatasync 2", "return"]
)
def test_g8_a_crash_at_any_step_never_loses_a_charge(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, second: bool, half: int | None
) -> None:
    """With both intents, one is overwritten in place; with one, the other is made and renamed."""
    if not second:
        (folder / INTENTS[0]).unlink()
    before = reopened(folder)
    book, calls = Book(folder), dict.fromkeys(("fsync", "fdatasync", "replace", "write", "pwrite"), 0)
    real = {name: getattr(os, name) for name in calls}
    died = []

    def dying(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            if where == f"{name} {calls[name]}":
                died.append(where)
                if name in ("write", "pwrite") and half is not None:
                    real[name](arguments[0], arguments[1][:half], *arguments[2:])
                raise Crash
            return real[name](*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(f"privacy.ledger.os.{name}", dying(name))
        with contextlib.suppress(Crash):
            book.charge([make_request(4)])
    book.close()
    in_place, made = ["pwrite 1", "fdatasync 1", "write 1", "fdatasync 2"], ["fsync 1", "replace 1", "fsync 2"]
    reached = in_place if second else [*made, "write 1", "fdatasync 1"]
    assert died == [where] * (where in reached)
    after = reopened(folder)
    assert after["charges"] in (before["charges"], before["charges"] + 1)
    # Once its intent is whole, the charge stands, though nobody was told.
    if not died or where in ("write 1", "fdatasync 1", "fdatasync 2", "fsync 2"):
        assert after["charges"] == before["charges"] + 1
    with Book(folder) as again:
        charged(again, make_request(5))


# -- torn, cut and edited files ------------------------------------------------------------------------------------


def last_batch(folder: Path) -> int:
    """Returns where the last batch starts in the file, as the newer intent says."""
    return newest(folder)[0]


def newest(folder: Path) -> tuple[int, Path]:
    """Returns where the batch of the newer intent starts, and that intent."""
    paths = [folder / name for name in INTENTS if (folder / name).exists()]
    return max((int(json.loads(path.read_bytes().partition(b"\n")[0])[0]), path) for path in paths)


@contextlib.contextmanager
def copied(folder: Path, data: bytes, *, intent: bool) -> Iterator[Path]:
    """A copy of a book with other bytes as its ledger."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "book"
        shutil.copytree(folder, copy)
        (copy / "ledger.jsonl").write_bytes(data)
        if not intent:
            for path in copy.glob("ledger.intent*"):
                path.unlink()
        yield copy


def test_g8_an_append_torn_at_any_byte_is_finished_and_the_spend_kept(folder: Path) -> None:
    data, whole, base = (folder / "ledger.jsonl").read_bytes(), reopened(folder), last_batch(folder)
    assert 0 < base < len(data)
    for size in range(base, len(data) + 1):
        with copied(folder, data[:size], intent=True) as copy:
            assert reopened(copy) == whole
            assert (copy / "ledger.jsonl").read_bytes() == data


def test_g8_a_torn_append_without_its_intent_is_refused(folder: Path) -> None:
    data, base = (folder / "ledger.jsonl").read_bytes(), last_batch(folder)
    for size in range(base + 1, len(data), 3):
        with copied(folder, data[:size], intent=False) as copy:
            assert is_refused(copy), size


def test_g8_planted_reader_that_drops_a_torn_line_loses_the_spend(folder: Path) -> None:
    class Lenient(Book):
        def _finish_torn_append(self) -> None:
            data = self._path.read_bytes()
            self._path.write_bytes(data[: data.rfind(b"\n") + 1])

    data = (folder / "ledger.jsonl").read_bytes()
    with copied(folder, data[:-1], intent=True) as copy, Lenient(copy) as book:
        assert book.accounts[ACCOUNT].charges == 2


def test_a_ledger_cut_at_a_line_is_refused_through_its_intent(folder: Path) -> None:
    data, base = (folder / "ledger.jsonl").read_bytes(), last_batch(folder)
    ends = [index + 1 for index, byte in enumerate(data) if byte == 10 and index + 1 < base]
    assert len(ends) >= 2
    for end in [0, *ends]:
        with copied(folder, data[:end], intent=True) as copy:
            assert is_refused(copy), end
        # The planted bug: without the intent, a cut at a line looks like an honest, younger ledger.
        with copied(folder, data[:end], intent=False) as copy:
            assert not is_refused(copy)


def flipped(data: bytes, position: int, mask: int) -> bytes:
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


def assert_flips_are_seen(folder: Path, positions: range, masks: tuple[int, ...]) -> None:
    data = (folder / "ledger.jsonl").read_bytes()
    with copied(folder, data, intent=False) as copy:
        for position in positions:
            for mask in masks:
                (copy / "ledger.jsonl").write_bytes(flipped(data, position, mask))
                assert is_refused(copy), (position, mask, data[max(0, position - 20) : position + 20])


def test_a_flipped_byte_anywhere_is_seen(folder: Path) -> None:
    assert_flips_are_seen(folder, range(0, (folder / "ledger.jsonl").stat().st_size, 11), (0x01,))


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0x01, 0x02, 0x07, 0x20, 0x80])
def test_every_flipped_byte_is_seen(folder: Path, mask: int) -> None:
    assert_flips_are_seen(folder, range((folder / "ledger.jsonl").stat().st_size), (mask,))


def test_a_line_end_of_another_kind_is_seen(folder: Path) -> None:
    data = (folder / "ledger.jsonl").read_bytes()
    first = data.index(b"\n")
    for end in (b"\r", b"\r\n", b"\n\n", b"\n\r\n", b" \n"):
        with copied(folder, data[:first] + end + data[first + 1 :], intent=False) as copy:
            assert is_refused(copy), end


def test_planted_reader_that_trusts_the_stated_hash_misses_a_flip(folder: Path) -> None:
    class Gullible(Book):
        def _apply(self, line: bytes, number: int) -> dict[str, Any]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("privacy.ledger._digest", lambda entry: entry["hash"])
                return super()._apply(line, number)

        def _require_signed(self, entry: dict[str, Any], number: int) -> None:
            """Believes."""

    data = (folder / "ledger.jsonl").read_bytes()
    dearer = data.rindex(b'"noise_multiplier":1.3') + len('"noise_multiplier":')
    with copied(folder, flipped(data, dearer, 0x08), intent=False) as copy:
        assert not is_refused(copy, Gullible)
        assert is_refused(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0], lines[1], lines[3], lines[2], *lines[4:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines, lines[0]],
        lambda lines: [*lines, *lines],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: lines[1:],
        lambda lines: [*lines[:2], b"", *lines[2:]],
        lambda lines: [*lines[:2], b"{}", *lines[2:]],
        lambda lines: [*lines, b"[" * 9000],
        lambda lines: [*lines, b'{"v":NaN}'],
        lambda lines: [*lines, b" " * 20_000],
        lambda lines: [lines[0] + b" ", *lines[1:]],
        lambda lines: [lines[0].replace(b'"v":3', b'"v":3,"v":3'), *lines[1:]],
    ],
)
def test_lines_moved_dropped_repeated_or_foreign_are_refused(
    folder: Path, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    lines = (folder / "ledger.jsonl").read_bytes()[:-1].split(b"\n")
    assert len(lines) == 5
    with copied(folder, b"\n".join(change(lines)) + b"\n", intent=False) as copy:
        assert is_refused(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.update(v=0),
        lambda e: e.update(v=4),
        lambda e: e.update(note="more"),
        lambda e: e["body"].update(apart=3) if e["kind"] == "grant" else None,
        lambda e: e["body"].update(charges=1) if e["kind"] == "charge" else None,
        lambda e: e["body"].update(test=True) if e["kind"] == "charge" else None,
        lambda e: e["body"].pop("spent", None),
        lambda e: e.update(v=True),
        lambda e: e.update(v="1"),
        lambda e: e.update(seq=float(e["seq"])),
        lambda e: e.update(seq=True) if e["seq"] == 1 else None,
        lambda e: e.update(account=["x"]),
        lambda e: e.update(kind="refund"),
        lambda e: e.update(body=[]),
        lambda e: e["body"].update(event=None) if e["kind"] == "charge" else None,
        lambda e: e["body"]["event"].update(kind="free") if e["kind"] == "charge" else None,
        lambda e: e["body"]["event"].update(steps=-5) if e["kind"] == "charge" else None,
        lambda e: e["body"]["event"].update(steps=2.0) if e["kind"] == "charge" else None,
        lambda e: e["body"]["event"].update(noise_multiplier=10**400) if e["kind"] == "charge" else None,
        lambda e: e["body"]["event"].update(noise_multiplier=math.inf) if e["kind"] == "charge" else None,
        lambda e: e["body"].update(round=["x"]) if e["kind"] == "charge" else None,
        lambda e: e["body"].update(job="unknown") if e["kind"] == "charge" else None,
        lambda e: e["body"].update(epsilon=math.nan) if e["kind"] == "grant" else None,
        lambda e: e["body"].update(epsilon="9") if e["kind"] == "grant" else None,
        lambda e: e["body"].update(epsilon=True) if e["kind"] == "grant" else None,
        lambda e: e["body"].update(delta=0.5) if e["kind"] == "grant" else None,
        lambda e: e["body"].update(records_bound=0) if e["kind"] == "grant" else None,
        lambda e: e["body"].update(records_bound=0.5) if e["kind"] == "grant" else None,
        lambda e: e["body"].update(order=10**400) if e["kind"] == "grant" else None,
        lambda e: e["body"].update(key="00" * 32) if e["kind"] == "grant" else None,
    ],
)
def test_entries_that_mean_nothing_are_refused_even_with_sound_hashes(
    folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    lines = (folder / "ledger.jsonl").read_bytes()[:-1].split(b"\n")
    with copied(folder, rechain(lines, change, folder / "ledger.key"), intent=False) as copy:
        assert is_refused(copy)


def test_the_forger_of_these_tests_can_write_sound_ledgers(folder: Path) -> None:
    """Otherwise the test above would pass because of its own broken hashes and signatures."""
    data = (folder / "ledger.jsonl").read_bytes()
    assert rechain(data[:-1].split(b"\n"), lambda entry: None) == data
    assert rechain(data[:-1].split(b"\n"), lambda entry: None, folder / "ledger.key") == data


def noisier(entry: dict[str, Any]) -> None:
    """What somebody who wants to look cheap would write."""
    if entry["kind"] == "charge":
        entry["body"]["event"]["noise_multiplier"] = 99.0


def test_a_ledger_rewritten_without_the_holders_key_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (folder / "ledger.jsonl").read_bytes()[:-1].split(b"\n")
    with copied(folder, rechain(lines, noisier), intent=False) as copy:
        assert is_refused(copy)
        # The planted bug: a reader that checks hashes alone.
        monkeypatch.setattr("privacy.ledger.verify", lambda *_: None)
        assert not is_refused(copy)


def test_each_accounts_last_signature_vouches_for_its_whole_chain(tmp_path: Path) -> None:
    with open_book(tmp_path / "book", names=("one", "two")) as book:
        book.charge([make_request(1, name=name) for name in ("one", "two")])
    lines = (tmp_path / "book/ledger.jsonl").read_bytes()[:-1].split(b"\n")
    for index, line in enumerate(lines):
        entry = json.loads(line)
        other = json.loads(lines[index - 1])["sig"]
        forged = json.dumps(entry | {"sig": other}, sort_keys=True, separators=(",", ":")).encode()
        with copied(
            tmp_path / "book", b"\n".join([*lines[:index], forged, *lines[index + 1 :]]) + b"\n", intent=False
        ) as c:
            assert is_refused(c), index


def test_a_ledger_of_version_1_goes_on_with_all_its_spend(folder: Path) -> None:
    before = reopened(folder)
    data = as_version_1((folder / "ledger.jsonl").read_bytes()[:-1].split(b"\n"))
    with copied(folder, data, intent=False) as copy:
        with Book(copy) as book:
            account = book.accounts[ACCOUNT]
            assert (account.spent_rdp, account.charges, account.unsigned) == (before["spent_rdp"], 3, 5)
            receipt = charged(book, make_request(4))
            assert receipt.charges == 4
        assert reopened(copy)["unsigned"] == 5
        lines = (copy / "ledger.jsonl").read_bytes()[:-1].split(b"\n")
        # Signed once, an account never goes back: unsigned entries could be anybody's.
        for intent in copy.glob("ledger.intent*"):
            intent.unlink()
        (copy / "ledger.jsonl").write_bytes(b"\n".join([*lines, _unsigned_after(lines[-1])]) + b"\n")
        assert is_refused(copy)


def _unsigned_after(line: bytes) -> bytes:
    entry = json.loads(line)
    link = hashlib.sha256(f"{entry['hash']}{entry['sig']}".encode()).hexdigest()
    entry = {name: entry[name] for name in entry if name not in ("hash", "sig")}
    entry |= {"v": 1, "seq": entry["seq"] + 1, "prev": link}
    text = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
    entry["hash"] = hashlib.sha256(text).hexdigest()
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()


def spoilt(intent: bytes) -> list[bytes]:
    """Intents that no program of ours wrote, or that are not whole."""
    head, _, rest = intent.partition(b"\n")
    base, length, seal = json.loads(head)
    end = len(head) + 1 + length
    return [
        b"",
        b"nonsense",
        b"5\n",
        b'["a","b"]\n',
        b'[-1,"%s"]\n' % hashlib.sha256(b"").hexdigest().encode(),
        b'[NaN,"x"]\n',
        b"[" * 9000 + b"\n",
        intent[: end - 1],
        flipped(intent, 2, 0x01),
        flipped(intent, end - 9, 0x01),
        # A place or a length that its seal is not of, though the batch is whole: a header that was torn.
        canonical([base - 1, length, seal]) + b"\n" + rest,
        canonical([base, length - 1, seal]) + b"\n" + rest,
        canonical([base, -1, seal]) + b"\n" + rest,
        canonical([base, 1.5, seal]) + b"\n" + rest,
        canonical([base, length, 7, seal]) + b"\n" + rest,
    ]


def test_the_newer_intent_changed_is_refused(folder: Path) -> None:
    """Its append had begun, so no crash explains it: a torn intent is ignored only where its append had not."""
    _, path = newest(folder)
    whole = path.read_bytes()
    for changed in spoilt(whole):
        path.write_bytes(changed)
        assert is_refused(folder), changed[:40]
    path.write_bytes(whole)
    assert not is_refused(folder)


def test_g8_an_intent_torn_at_any_byte_beside_a_whole_one_is_ignored(folder: Path) -> None:
    """The crash came while the older intent was overwritten: nothing was promised, and nothing appended."""
    before = reopened(folder)
    data = (folder / "ledger.jsonl").read_bytes()
    _, path = newest(folder)
    older = next(folder / name for name in INTENTS if folder / name != path)
    stale = older.read_bytes()
    with contextlib.closing(Book(folder)) as book:
        charged(book, make_request(4))
    fresh, grown = older.read_bytes(), (folder / "ledger.jsonl").read_bytes()
    end = len(fresh.partition(b"\n")[0]) + 1 + int(json.loads(fresh.partition(b"\n")[0])[1])
    torn = [fresh[:size] + stale[size:] for size in range(0, end, 7)]
    for content in [*torn, *spoilt(stale)]:
        older.write_bytes(content)
        with copied(folder, data, intent=True) as copy:
            assert reopened(copy) == before
            # The whole one guards the end still: a line less, and a piece less, are finished from it or refused.
            path_of_copy = copy / "ledger.jsonl"
            path_of_copy.write_bytes(data[: last_batch_of(copy, path.name) - 1])
            assert is_refused(copy)
    # The append had begun: whatever it holds, a broken intent explains nothing.
    older.write_bytes(fresh[: end - 1])
    for size in range(len(data) + 1, len(grown) + 1, 5):
        with copied(folder, grown[:size], intent=True) as copy:
            assert is_refused(copy), size


def last_batch_of(folder: Path, name: str) -> int:
    return int(json.loads((folder / name).read_bytes().partition(b"\n")[0])[0])


def test_two_broken_intents_are_refused(folder: Path) -> None:
    for name in INTENTS:
        (folder / name).write_bytes((folder / name).read_bytes()[1:])
    assert is_refused(folder)
    (folder / INTENTS[0]).unlink()
    assert is_refused(folder)


class Forgiving(Book):
    """The planted bug: a broken intent is ignored although its append had begun, and the torn line dropped."""

    def _finish_torn_append(self) -> None:
        data = self._path.read_bytes()
        self._path.write_bytes(data[: data.rfind(b"\n") + 1])


def test_g8_planted_recovery_that_ignores_a_begun_append_is_found(folder: Path) -> None:
    _, path = newest(folder)
    path.write_bytes(flipped(path.read_bytes(), 2, 0x01))
    data = (folder / "ledger.jsonl").read_bytes()
    (folder / "ledger.jsonl").write_bytes(data[:-9])
    assert is_refused(folder)
    with Forgiving(folder) as book:
        assert book.accounts[ACCOUNT].charges == 2


def test_g8_planted_recovery_that_accepts_a_cut_before_the_newest_intent_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (folder / "ledger.jsonl").read_bytes()[:-1].split(b"\n")
    (folder / "ledger.jsonl").write_bytes(b"\n".join(lines[:-2]) + b"\n")
    assert is_refused(folder)
    # The planted bug: only the older one counts.
    real, (_, path) = _Intent.read, newest(folder)
    monkeypatch.setattr("privacy.ledger._Intent.read", lambda of: None if of == path else real(of))
    with Book(folder) as book:
        assert book.accounts[ACCOUNT].charges == 2


def test_an_intent_that_must_grow_is_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overwriting a smaller one would change its size, which its sync need not put on disk with it."""
    for name in INTENTS:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content.rstrip(b"\0"))
    with Book(folder) as book:
        charged(book, make_request(4, job="cd" * 16))
        assert (folder / INTENTS[0]).stat().st_size == 16 * 1024
    assert reopened(folder)["charges"] == 4


@pytest.mark.slow
def test_an_append_is_near_a_plain_write_and_fsync(tmp_path: Path) -> None:
    """The aim is 2 and is missed where a sync takes 0.14 ms (measured: 4, see bench/RESULTS.md); this guards the 4."""
    ratios = []
    with open_book(tmp_path, make_grant(epsilon=50.0)) as book, (tmp_path / "plain").open("ab", buffering=0) as plain:
        plan = make_plan(joins=60)
        for number in range(1, 61):
            before = (tmp_path / "ledger.jsonl").stat().st_size
            began = time.perf_counter()
            charged(book, make_request(number, plan))
            took = time.perf_counter() - began
            data = (tmp_path / "ledger.jsonl").read_bytes()[before:]
            began = time.perf_counter()
            plain.write(data)
            os.fsync(plain.fileno())
            ratios.append(took / (time.perf_counter() - began))
    assert statistics.median(ratios) <= 6


def as_first_format(folder: Path) -> None:
    """Leaves one intent, as the program wrote it when it had one."""
    base = last_batch(folder)
    batch = (folder / "ledger.jsonl").read_bytes()[base:]
    for intent in folder.glob("ledger.intent*"):
        intent.unlink()
    (folder / INTENTS[0]).write_bytes(canonical([base, hashlib.sha256(batch).hexdigest()]) + b"\n" + batch)


def test_g8_an_intent_of_the_first_format_finishes_and_guards(folder: Path) -> None:
    data, whole, base = (folder / "ledger.jsonl").read_bytes(), reopened(folder), last_batch(folder)
    as_first_format(folder)
    intent = folder / INTENTS[0]
    for size in range(base, len(data) + 1, 3):
        with copied(folder, data[:size], intent=True) as copy:
            assert reopened(copy) == whole
    with copied(folder, data[: base - 1], intent=True) as copy:
        assert is_refused(copy)
    kept = intent.read_bytes()
    for changed in (kept[:-1], kept + b"\n", flipped(kept, 2, 0x01), flipped(kept, len(kept) - 9, 0x01)):
        intent.write_bytes(changed)
        assert is_refused(folder)
    intent.write_bytes(kept)
    with Book(folder) as book:
        for number in (4, 5, 6):
            charged(book, make_request(number))
    assert reopened(folder)["charges"] == 6


def test_g8_two_books_take_turns_with_the_intents(folder: Path) -> None:
    """Each must see which intent is the newest, or it overwrites the one that guards the end."""
    with Book(folder) as first, Book(folder) as second:
        for number, book in enumerate((first, second, second, first, first), start=4):
            guard = newest(folder)
            kept = guard[1].read_bytes()
            charged(book, make_request(number))
            assert newest(folder)[0] > guard[0]
            assert guard[1].read_bytes() == kept
    assert reopened(folder)["charges"] == 8


def test_a_ledger_whose_end_differs_from_its_intent_is_refused(folder: Path) -> None:
    """A rewritten last charge, hashes repaired: the intent still knows what was announced."""
    lines = (folder / "ledger.jsonl").read_bytes()[:-1].split(b"\n")

    with copied(folder, rechain(lines, noisier, folder / "ledger.key"), intent=True) as copy:
        assert is_refused(copy)
        for intent in copy.glob("ledger.intent*"):
            intent.unlink()
        assert not is_refused(copy)


def test_a_ledger_under_another_or_a_lost_key_is_refused(folder: Path, tmp_path: Path) -> None:
    key = (folder / "ledger.key").read_bytes()
    Book(tmp_path / "other").close()
    shutil.copy(tmp_path / "other" / "ledger.key", folder / "ledger.key")
    assert is_refused(folder)
    (folder / "ledger.key").unlink()
    assert is_refused(folder)
    (folder / "ledger.key").write_bytes(key)
    assert not is_refused(folder)


def test_a_ledger_that_shrinks_while_open_is_refused(folder: Path) -> None:
    with Book(folder) as book:
        data = (folder / "ledger.jsonl").read_bytes()
        (folder / "ledger.jsonl").write_bytes(data[: last_batch(folder)])
        with pytest.raises(LedgerError, match="cut"):
            book.charge([make_request(4)])


def test_a_folder_that_cannot_be_a_ledger_is_a_sentence_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LedgerError, match="folder"):
        Book(tmp_path / "file")
    (tmp_path / "odd" / "ledger.jsonl").mkdir(parents=True)
    with pytest.raises(LedgerError, match="read and written"):
        Book(tmp_path / "odd")


# -- a full disk ---------------------------------------------------------------------------------------------------


def failing(name: str, *, on: int = 1, half: bool = False) -> Callable[..., Any]:
    real, count = getattr(os, name), 0

    def call(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count < on:
            return real(*arguments)
        if half:
            return real(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
        raise OSError(errno.ENOSPC, "No space left on device")

    return call


IN_PLACE = [("pwrite", 1, False), ("pwrite", 1, True), ("fdatasync", 1, False), ("fdatasync", 2, False)]
MADE = [("fsync", 1, False), ("fsync", 2, False), ("replace", 1, False), ("fdatasync", 1, False)]
APPEND = [("write", 1, False), ("write", 1, True)]
FAULTS = [(*fault, True) for fault in IN_PLACE + APPEND] + [(*fault, False) for fault in MADE + APPEND]


@pytest.mark.parametrize(("name", "on", "half", "second"), FAULTS)
def test_g8_a_full_disk_charges_nothing_and_harms_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, on: int, half: bool, second: bool
) -> None:
    if not second:
        (folder / INTENTS[0]).unlink()
    data, before = (folder / "ledger.jsonl").read_bytes(), reopened(folder)
    with Book(folder) as book:
        with monkeypatch.context() as patch:
            patch.setattr(f"privacy.ledger.os.{name}", failing(name, on=on, half=half))
            with pytest.raises(LedgerError, match="space"):
                book.charge([make_request(4)])
        assert state(book) == before
        assert (folder / "ledger.jsonl").read_bytes() == data
        assert reopened(folder) == before
        # There is room again: the same book goes on.
        assert charged(book, make_request(4)).charges == 4
    assert reopened(folder)["charges"] == 4


def test_g8_planted_half_write_left_in_place_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the failed append were not taken back, the check above would see other bytes."""
    data = (folder / "ledger.jsonl").read_bytes()
    with Book(folder) as book, monkeypatch.context() as patch:
        patch.setattr("privacy.ledger.os.write", failing("write", half=True))
        patch.setattr("privacy.ledger.os.ftruncate", lambda *_: None)
        with pytest.raises(LedgerError):
            book.charge([make_request(4)])
    assert (folder / "ledger.jsonl").read_bytes() != data
    assert is_refused(folder)


def test_a_full_disk_keeps_the_older_intent_that_guards_against_a_cut(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, guard = newest(folder)
    with Book(folder) as book, monkeypatch.context() as patch:
        patch.setattr("privacy.ledger.os.pwrite", failing("pwrite", half=True))
        with pytest.raises(LedgerError):
            book.charge([make_request(4)])
    # The half-written one is left broken, and the whole one is not touched.
    assert last_batch_of(folder, guard.name) == base
    assert not is_refused(folder)


# -- several processes and threads ---------------------------------------------------------------------------------


def run_forked(target: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """Runs a function in forked processes at the same time and returns what each gave back."""
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()

    def child(index: int, given: tuple[Any, ...]) -> None:
        try:
            out.put((index, target(*given)))
        except TacitError as error:
            out.put((index, f"{type(error).__name__}: {error}"))

    processes = [context.Process(target=child, args=pair) for pair in enumerate(arguments)]
    for process in processes:
        process.start()
    results = dict(out.get() for _ in processes)
    for process in processes:
        process.join()
    return [results[index] for index in range(len(arguments))]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_g3_processes_that_charge_at_once_never_pass_the_budget(tmp_path: Path) -> None:
    grant = make_grant(epsilon=2.3)
    with open_book(tmp_path, grant):
        pass
    # The price is cached here, so that the children start at once and meet.
    rdp(Event.of_round(make_plan()), grant.order)
    admitted = run_forked(charge_until_refused, [(tmp_path, f"{index:032x}", 12) for index in range(4)])
    alone = _admitted_alone(tmp_path / "alone", grant)
    assert sum(admitted) == alone < 48
    assert sum(count > 0 for count in admitted) >= 1
    account = reopened(tmp_path)
    assert account["charges"] == alone
    assert make_grant().epsilon_of(account["spent_rdp"]) <= 2.3


def _admitted_alone(folder: Path, grant: Any) -> int:
    with open_book(folder, grant):
        pass
    return charge_until_refused(folder, "0" * 32, 48)


def test_g3_planted_missing_lock_breaks_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the file lock, a second book may charge between another's gate and its append."""
    monkeypatch.setattr("privacy.ledger.fcntl.flock", lambda *_: None)
    with open_book(tmp_path):
        pass
    other = Book(tmp_path)

    class Slow(Book):
        def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
            other.charge([make_request(1, job="cd" * 16)])
            super()._append(entries)

    with Slow(tmp_path) as book:
        book.charge([make_request(1)])
    other.close()
    for intent in tmp_path.glob("ledger.intent*"):
        intent.unlink()
    with pytest.raises(LedgerError, match="chain"):
        Book(tmp_path)


def test_threads_that_share_a_book_take_turns(tmp_path: Path) -> None:
    """A file lock does not keep threads apart: they share it."""
    failures: list[BaseException] = []
    with open_book(tmp_path, make_grant(epsilon=50.0)) as book:

        def work(index: int) -> None:
            try:
                for number in range(1, 6):
                    charged(book, make_request(number, job=f"{index:032x}"))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert reopened(tmp_path)["charges"] == 20


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_copy_of_a_book_charges_nothing(tmp_path: Path) -> None:
    """A forked child shares its parent's lock, so both could charge at once."""
    with open_book(tmp_path) as book:
        (answer,) = run_forked(lambda: book.charge([make_request(1)]), [()])
        assert str(answer).startswith("LedgerError")
        charged(book, make_request(1))
    assert reopened(tmp_path)["charges"] == 1


def test_a_closed_book_charges_nothing_and_touches_no_other_file(tmp_path: Path) -> None:
    book = open_book(tmp_path / "book")
    book.close()
    # The number of the closed descriptor is given to the next file that is opened.
    with (tmp_path / "other").open("wb"):
        for call in (lambda: book.charge([make_request(1)]), book.refresh):
            with pytest.raises(LedgerError, match="closed"):
                call()
    assert (tmp_path / "other").read_bytes() == b""
    assert reopened(tmp_path / "book")["charges"] == 0


def test_a_book_sees_and_respects_what_another_one_charged(tmp_path: Path) -> None:
    with open_book(tmp_path) as one, Book(tmp_path) as two:
        charged(one, make_request(1))
        assert two.charge([make_request(1, request="0" * 64)]) == [Word.CONFLICT]
        receipt = charged(two, make_request(2))
        one.refresh()
        assert state(one) == state(two)
        assert receipt.charges == 2


def test_an_open_book_finishes_what_another_process_tore(folder: Path) -> None:
    with Book(folder) as survivor:
        with Book(folder) as other:
            charged(other, make_request(4))
        data = (folder / "ledger.jsonl").read_bytes()
        (folder / "ledger.jsonl").write_bytes(data[:-100])
        assert charged(survivor, make_request(5)).charges == 5
    assert reopened(folder)["charges"] == 5


# -- G11 and G14: marks and witnesses ------------------------------------------------------------------------------


def test_g11_one_charge_with_test_noise_marks_the_account_for_ever(tmp_path: Path) -> None:
    with open_book(tmp_path) as book:
        assert not charged(book, make_request(1)).test
        assert charged(book, make_request(2, noise="test:Seeded")).test
        assert charged(book, make_request(3, noise=SECURE_SOURCE)).test
    assert reopened(tmp_path)["test"] is True


def test_g14_a_ledger_behind_its_last_receipt_says_so(folder: Path) -> None:
    rolled_back = folder.with_name("old")
    shutil.copytree(folder, rolled_back)
    with Book(folder) as book:
        receipt = charged(book, make_request(4))
        witness = (receipt.seq, receipt.head)
        assert isinstance(charged(book, make_request(5, witness=witness)), Receipt)
    with Book(rolled_back) as book:
        assert book.charge([make_request(5, witness=witness)]) == [Word.BEHIND]
        # A fork is as long as the original, even for the same request in the same second, but it is not the same.
        fork = charged(book, make_request(4))
        assert (fork.seq, fork.request) == (receipt.seq, receipt.request)
        assert book.charge([make_request(5, witness=witness)]) == [Word.BEHIND]
        # Without a witness a rollback is not detectable, as the report says.
        assert isinstance(book.charge([make_request(7)])[0], Receipt)


def test_g14_planted_entries_without_a_nonce_hide_a_fork(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.ledger.os.urandom", bytes)
    monkeypatch.setattr("privacy.ledger.time.time", lambda: 1.8e9)
    shutil.copytree(folder, folder.with_name("old"))
    with Book(folder) as book, Book(folder.with_name("old")) as fork:
        receipt = charged(book, make_request(4))
        # Without the entry's nonce, the fork's entry for the same request in the same second is the same entry.
        assert charged(fork, make_request(4)).head == receipt.head
        assert isinstance(fork.charge([make_request(5, witness=(receipt.seq, receipt.head))])[0], Receipt)


@pytest.mark.parametrize("witness", [(-1, "0" * 64), (10**12, "0" * 64), (0, "0" * 64), (4, ""), (4, "A" * 64)])
def test_g14_a_witness_that_does_not_fit_declines(folder: Path, witness: tuple[int, str]) -> None:
    with Book(folder) as book:
        assert book.charge([make_request(4, witness=witness)]) == [Word.BEHIND]
        assert book.accounts[ACCOUNT].charges == 3


def test_g14_a_rewritten_ledger_is_found_against_a_receipt(folder: Path) -> None:
    """A holder can rewrite its own file and sign it anew; every receipt it ever gave speaks against it."""
    with Book(folder) as book:
        receipt = charged(book, make_request(4))
    lines = (folder / "ledger.jsonl").read_bytes()[:-1].split(b"\n")

    forged = rechain(lines, noisier, folder / "ledger.key")
    with copied(folder, forged, intent=False) as copy, Book(copy) as book:
        assert book.accounts[ACCOUNT].spent < receipt.spent
        assert book.charge([make_request(5, witness=(receipt.seq, receipt.head))]) == [Word.BEHIND]


def test_g14_a_deleted_ledger_is_found_against_a_receipt(folder: Path) -> None:
    with Book(folder) as book:
        receipt = charged(book, make_request(4))
    for path in folder.iterdir():
        path.unlink()
    with open_book(folder) as book:
        assert book.charge([make_request(5, witness=(receipt.seq, receipt.head))]) == [Word.BEHIND]


def test_g14_a_receipt_says_what_was_charged_and_survives_its_text(folder: Path) -> None:
    request = make_request(4)
    with Book(folder) as book:
        receipt = charged(book, request)
        account = book.accounts[ACCOUNT]
        assert receipt.head == account.heads[receipt.seq] == account.heads[-1]
        assert (receipt.spent, receipt.charges) == (account.spent, 4)
    assert Receipt.from_json(receipt.to_json()) == receipt
    assert (receipt.job, receipt.round, receipt.request) == (request.job, 4, request.request)
    assert receipt.event == Event.of_round(request.plan)
    assert (receipt.granted, receipt.delta) == (3.0, 1e-5)


def test_a_grant_in_whole_numbers_gives_sound_receipts(tmp_path: Path) -> None:
    plan = make_plan(sample_rate=1, noise_multiplier=20, l2_clip=1, expected_batch=10)
    with open_book(tmp_path, make_grant(epsilon=3, order=8)) as book:
        receipt = charged(book, make_request(1, plan))
    assert Receipt.from_json(receipt.to_json()) == receipt
    assert reopened(tmp_path)["charges"] == 1


FORGERIES: list[tuple[str, Any]] = [
    ("spent", 0.1),
    ("spent", 0),
    ("spent", "0.1"),
    ("granted", 99.0),
    ("delta", 1e-9),
    ("charges", 1),
    ("charges", True),
    ("charges", 4.0),
    ("seq", 1),
    ("seq", 5.0),
    ("head", "0" * 64),
    ("job", "cd" * 16),
    ("round", 9),
    ("round", "4"),
    ("request", "0" * 64),
    ("account", "0" * 32),
    ("test", True),
    ("test", 0),
    ("test", None),
    ("public_key", Identity(bytes(32)).public_key),
    ("public_key", ""),
    ("public_key", "zz"),
    ("signature", ""),
    ("signature", "0" * 128),
    ("signature", None),
    ("event", None),
    ("event", {}),
    ("event", {"kind": "poisson-gaussian", "sample_rate": 0.1, "noise_multiplier": 9.0, "steps": 2}),
    ("event", {"kind": "poisson-gaussian", "sample_rate": 0.1, "noise_multiplier": 10**400, "steps": 2}),
    ("event", {"kind": "nothing", "sample_rate": 0.1, "noise_multiplier": 1.3, "steps": 2}),
    ("extra", 1),
]


@pytest.mark.parametrize(("field", "value"), FORGERIES)
def test_g14_a_forged_receipt_is_refused(folder: Path, field: str, value: Any) -> None:
    with Book(folder) as book:
        fields = json.loads(charged(book, make_request(4)).to_json())
    assert fields.get(field) is not value
    with pytest.raises(LedgerError):
        Receipt.from_json(json.dumps(fields | {field: value}, sort_keys=True, separators=(",", ":")))


def test_g14_planted_reader_without_a_signature_check_believes_a_forgery(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Book(folder) as book:
        receipt = charged(book, make_request(4))
    forged = dataclasses.replace(receipt, spent=0.1)
    monkeypatch.setattr("privacy.ledger.verify", lambda *_: None)
    assert Receipt.from_json(forged.to_json()).spent == 0.1


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "3", "[]", '"x"', "[" * 9000, "{}", "NaN", "x" * 20_000, '{"event":{}}', '{"spent":1e999}'],
)
def test_g14_text_that_is_no_receipt_is_refused(text: str) -> None:
    with pytest.raises(LedgerError):
        Receipt.from_json(text)


def test_g14_a_receipt_has_one_text(folder: Path) -> None:
    """A repeated key or other spacing verifies, but another reader may see another value in it."""
    with Book(folder) as book:
        text = charged(book, make_request(4)).to_json()
    for other in ('{"spent":0.1,' + text[1:], " " + text, text + "\n", text.replace(":", ": ")):
        assert json.loads(other) == json.loads(text)
        with pytest.raises(LedgerError):
            Receipt.from_json(other)


def test_g14_every_field_of_a_receipt_is_signed(folder: Path) -> None:
    with Book(folder) as book:
        receipt = charged(book, make_request(4))
    signed = receipt.signed_bytes().decode()
    # Metrics are signed in the list of what the charge pays for; the test after this one holds them to it.
    for field in dataclasses.fields(Receipt):
        assert (f'"{field.name}":' in signed) == (field.name not in ("signature", "metrics"))


@pytest.mark.parametrize("change", [lambda events: events[:2], lambda events: events[0], lambda events: events[::-1]])
def test_g14_every_metric_of_a_receipt_is_signed(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    asked = Metrics(words=(Metric.ACCURACY, Metric.LOSS), noise=20.0, loss_bound=5.0)
    with open_book(tmp_path) as book:
        receipt = charged(book, make_request(1, make_plan(metrics=asked)))
    fields = json.loads(receipt.to_json())
    assert [event.get("released") for event in fields["event"]] == [None, "metric:accuracy", "metric:loss"]
    Receipt.from_json(canonical(fields).decode())
    fields["event"] = change(fields["event"])
    with pytest.raises(LedgerError):
        Receipt.from_json(canonical(fields).decode())


def test_g12_the_words_are_few_and_fixed() -> None:
    assert sorted(Word) == ["behind", "conflict", "declined", "malformed", "unavailable"]


# -- anything, in any order ----------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["one", "two"]),
        st.sampled_from(["aa" * 16, "bb" * 16]),
        st.integers(1, 4),
        st.sampled_from(["r1", "r2"]),
        st.sampled_from([0, 1, 2]),
        st.booleans(),
    ),
    max_size=25,
)
PLANS = [
    make_plan(joins=4),
    make_plan(joins=9, noise_multiplier=0.9, steps=4),
    make_plan(joins=9, sample_rate=0.9, noise_multiplier=1e8, steps=10**6),
]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(STEPS)
def test_g3_any_sequence_of_charges_keeps_the_promises(steps: list[tuple[str, str, int, str, int, bool]]) -> None:
    """Against a model of ten lines: spend only grows, stays in budget, and a reopened book knows the same."""
    grant = make_grant(epsilon=2.6)
    spent = {"one": 0.0, "two": 0.0}
    jobs: dict[tuple[str, str], tuple[int, int]] = {}
    rounds: dict[tuple[str, str, int], str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        book = open_book(folder, grant, names=("one", "two"))
        for account, job, number, request, index, again in steps:
            plan, before = PLANS[index], book.accounts[account].spent
            price = rdp(Event.of_round(plan), grant.order)
            committed, count = jobs.get((account, job), (index, 0))
            if committed != index or rounds.get((account, job, number), request) != request:
                expected: Word | None = Word.CONFLICT
            elif count >= plan.joins or spent[account] + price > grant.budget_rdp * (1 + 1e-9):
                expected = Word.DECLINED
            else:
                expected = None
                spent[account] += price
                jobs[account, job] = (index, count + 1)
                rounds[account, job, number] = request
            (outcome,) = book.charge([make_request(number, plan, name=account, job=job, request=request)])
            assert outcome == expected if expected else isinstance(outcome, Receipt)
            assert before <= book.accounts[account].spent <= 2.6 * (1 + 1e-8)
            assert book.accounts[account].spent_rdp == pytest.approx(spent[account], rel=1e-12)
            if again:
                states = {key: state(book, key) for key in spent}
                book.close()
                book = Book(folder)
                assert {key: state(book, key) for key in spent} == states
        book.close()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**9), st.binary(min_size=1, max_size=6), st.sampled_from(["insert", "replace", "remove"]))
def test_random_damage_is_refused_or_harmless(seed: int, junk: bytes, how: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_book(folder) as book:
            charged(book, make_request(1))
            charged(book, make_request(2))
        for intent in folder.glob("ledger.intent*"):
            intent.unlink()
        path, before = folder / "ledger.jsonl", reopened(folder)
        data = path.read_bytes()
        at = seed % len(data)
        cut = at if how == "insert" else at + len(junk)
        path.write_bytes(data[:at] + (b"" if how == "remove" else junk) + data[cut:])
        if path.read_bytes() != data:
            # A piece cut off the very end may leave whole lines; only a witness or the intent can tell.
            assert is_refused(folder) or (how == "remove" and data.startswith(path.read_bytes()))
        else:
            assert reopened(folder) == before
