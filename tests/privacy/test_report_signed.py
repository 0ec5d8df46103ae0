"""What a report says beside its figures: who signed it, for whom it was made, what changed, what no proof covers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from privacy.accounting import Event, rdp, second_filter, second_rdp
from privacy.errors import LedgerError, RunError
from privacy.identity import Identity, verify
from privacy.ledger_report import over_ledgers
from privacy.plan import Local
from privacy.report import ClientSpend, Prices, RunFacts, Verdict, build, render, report_id, sign, signed_bytes, to_json
from privacy.report_page import render_ledgers
from privacy.transcript import read_ledger
from tests.oracles import make_grant, make_plan, make_request, open_book

SERVER = Identity(bytes(range(32)))
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def a_client(**changes: Any) -> ClientSpend:
    fields: dict[str, Any] = {
        "name": "client-0",
        "granted_epsilon": 3.0,
        "delta": 1e-5,
        "spent_epsilon": 2.0,
        "rounds_joined": 2,
        "charges": 2,
        "declined": 0,
        "runs": 1,
        "other_runs": 0,
        "receipts_missing": 0,
        "undelivered": 0,
        "test_noise": False,
        "history": ((1, 1.5), (2, 2.0)),
        "public_key": "a3" * 32,
        "ledger_head": "5b" * 32,
        "verdict": Verdict.VERIFIED,
    }
    return ClientSpend(**fields | changes)


def a_run(**changes: Any) -> RunFacts:
    prices = Prices(
        schedule="Poisson",
        steps=100,
        gate=2.9,
        gate_order=8.0,
        pld=2.5,
        pld_replace_one=4.9,
        prv=2.51,
        prv_note="",
        rdp=2.8,
        at_deltas=((1e-5, 2.5),),
        tpr=((0.001, 0.0122), (0.01, 0.12)),
        accountant="dp-accounting; opacus",
        unamplified=40.0,
        rho=29.6,
        persons=((2, 5.5),),
    )
    fields: dict[str, Any] = {
        "job": "ab" * 16,
        "task": "digits",
        "task_summary": "Recognise digits.",
        "record": "one digit",
        "started": "2026-09-01T10:00:00+00:00",
        "finished": "2026-09-01T10:00:41+00:00",
        "status": "completed",
        "config": {"epsilon": 3.0, "seed": 0},
        "plan": make_plan(),
        "committed": True,
        "doubts": (),
        "local": Local(),
        "rounds": [],
        "clients": [a_client()],
        "prices": prices,
        "multiplicity": 1,
        "multiplicity_epsilon": None,
        "augmented": False,
        "noise_source": "aes-256-ctr keystream",
        "versions": {},
        "code_hash": "9f" * 32,
        "witness": "",
        "covers": "this run only",
        "simulation": None,
        "engine": "local",
        "device": "cpu",
        "hardware": "2 cores",
    }
    return RunFacts(**fields | changes)


# -- signature ----------------------------------------------------------------------------


def test_a_signed_report_is_the_report_and_its_signature_covers_every_field() -> None:
    report = build(a_run())
    signed = sign(report, SERVER)
    assert {name: value for name, value in signed.items() if name != "signature"} == {
        name: value for name, value in report.items() if name != "signature"
    }
    verify(SERVER.public_key, signed_bytes(signed), signed["signature"]["value"])
    assert report_id(signed) == signed["report_id"] == report["report_id"]
    for name in report:
        if name != "signature":
            with pytest.raises(LedgerError):
                verify(SERVER.public_key, signed_bytes(signed | {name: "other"}), signed["signature"]["value"])
    assert json.loads(to_json(signed)) == signed
    assert SERVER.public_key in render(signed)
    assert "not signed" in render(report)


def test_only_what_a_receipt_signs_is_called_signed_by_the_client() -> None:
    proof = {"receipt": "{}", "grant": None, "commit": None}
    rows = [
        build(a_run(clients=[client]))["clients"][0]["signed"]
        for client in (a_client(proof=proof), a_client(), a_client(proof=proof, verdict=Verdict.LEDGER))
    ]
    assert "spent_epsilon" in rows[0]
    assert rows[1:] == [[], []]


# -- fields -------------------------------------------------------------------------------


def test_what_nobody_stated_is_said_to_be_not_stated_and_never_made_up() -> None:
    assert build(a_run())["product"] == {"curator": "not stated", "purpose": "not stated", "data": "not stated"}
    stated = build(a_run(product={"curator": "City clinic", "purpose": HOSTILE, "data": ""}))
    assert stated["product"] == {"curator": "City clinic", "purpose": HOSTILE, "data": "not stated"}
    page = render(stated)
    assert "City clinic" in page
    assert "<script" not in page


def test_the_tier_is_that_of_the_figure_and_unknown_has_none() -> None:
    tiers = {}
    for pld in (0.9, 2.5, 11.0):
        prices = dataclasses.replace(a_run().prices, pld=pld, prv=pld, rdp=pld + 1)
        tiers[pld] = build(a_run(prices=prices))["headline"]["tier"]
    assert [tiers[pld][:6] for pld in tiers] == ["tier 1", "tier 2", "tier 3"]
    assert build(a_run(doubts=("Something is odd.",)))["headline"]["tier"].startswith("unknown")
    assert build(a_run(clients=[a_client(test_noise=True)]))["headline"]["tier"].startswith("none")


def test_prices_are_given_with_and_without_the_discount_for_sampling() -> None:
    prices = build(a_run())["prices"]
    assert (prices["pld"], prices["unamplified"], prices["zcdp_rho"]) == (2.5, 40.0, 29.6)
    assert prices["delta_times_records"] == pytest.approx(0.05)
    tested = build(a_run(clients=[a_client(test_noise=True)]))["prices"]
    assert (tested["unamplified"], tested["zcdp_rho"]) == ("infinity", "infinity")
    assert build(a_run(committed=False))["prices"]["unamplified"] == "unknown"


def test_g1_a_person_with_several_records_gets_a_figure_only_for_a_schedule_that_is_alone() -> None:
    person = build(a_run())["headline"]["person"]
    assert person[1]["epsilon"] == "none possible"
    assert (person[2]["who"], person[2]["epsilon"]) == ("A person with at most 2 records, all in one data set", 5.5)
    assert len(build(a_run(clients=[a_client(other_runs=1, runs=2)]))["headline"]["person"]) == 2
    assert build(a_run(doubts=("Odd.",)))["headline"]["person"][2]["epsilon"] == "unknown"
    assert build(a_run(clients=[a_client(test_noise=True)]))["headline"]["person"][2]["epsilon"] == "infinity"


def test_g2_a_budget_that_was_raised_is_in_every_report_and_one_that_was_lowered_is_no_warning() -> None:
    raised = build(a_run(clients=[a_client(changes=(("2026-09-01T09:00:00+00:00", 2.0, 3.0),))]))
    assert any("was raised by its holder" in warning for warning in raised["warnings"])
    assert raised["clients"][0]["budget_changes"] == [
        {"time": "2026-09-01T09:00:00+00:00", "before": 2.0, "after": 3.0, "raised": True}
    ]
    assert "was raised by its holder" in render(raised)
    lowered = build(a_run(clients=[a_client(changes=(("2026-09-01T09:00:00+00:00", 4.0, 3.0),))]))
    assert not any("raised" in warning for warning in lowered["warnings"])


def test_a_clock_that_was_set_back_is_told() -> None:
    assert any("set back" in warning for warning in build(a_run(clients=[a_client(clock_set_back=1)]))["warnings"])
    assert not any("set back" in warning for warning in build(a_run())["warnings"])


BOUND = {
    "audit": "gradient canaries",
    "holds": True,
    "verdict": "0.31 <= epsilon <= 1.84",
    "epsilon_lower": 0.31,
    "epsilon_upper": 1.831,
    "guesses": 300,
    "correct": 170,
    "confidence": 0.95,
    "ceiling": 5.09,
    "threat_model": "sees every update",
}


def test_an_audit_counts_only_for_the_code_that_it_audited() -> None:
    assert build(a_run())["empirical"]["status"] == "not audited"
    audit = {"code_hash": "9f" * 32, "holds": True, "bounds": [BOUND | {"verdict": HOSTILE}]}
    found = build(a_run(audit=audit))["empirical"]
    assert (found["status"], found["audit"]["bounds"][0]["epsilon_lower"]) == ("audited", 0.31)
    assert "<script" not in render(build(a_run(audit=audit)))
    assert build(a_run(audit=audit | {"code_hash": "00"}))["empirical"]["status"] == "audit of other code"


def test_g18_of_an_audits_file_only_canary_bounds_enter_a_report() -> None:
    kept = "area under the curve 0.987"
    rows = [
        BOUND | {"auc": kept, "record_7": kept},
        {"audit": "membership inference", "holds": True, "verdict": kept, "auc": 0.987},
        {"audit": "canary clients", "holds": True, "verdict": kept, "kind": "estimate", "epsilon": 2.2},
    ]
    audit = {"code_hash": "9f" * 32, "holds": True, "bounds": rows, "membership": {"verdict": kept}, "note": kept}
    report = build(a_run(audit=audit))
    assert report["empirical"]["audit"] == {"code_hash": "9f" * 32, "holds": True, "bounds": [BOUND]}
    assert kept not in to_json(report)
    assert kept not in render(report)


def test_g6_an_audit_of_a_part_of_the_code_that_ran_counts_against_all_of_it() -> None:
    two = f"{'9f' * 32}, then {'8e' * 32}"
    for code in ("9f" * 32, "8e" * 32):
        audit = {"code_hash": code, "holds": True, "bounds": [BOUND]}
        sound = build(a_run(audit=audit, code_hash=two))
        assert sound["empirical"]["status"] == "audited in part"
        assert sound["headline"]["epsilon"] != "unknown"
        assert build(a_run(audit=audit | {"holds": False}, code_hash=two))["headline"]["epsilon"] == "unknown"


@pytest.mark.parametrize(
    "broken",
    [
        {"holds": None},
        {"holds": True, "contradicted": 1},
        {"holds": True, "bounds": [BOUND | {"holds": False}]},
        {"holds": True, "bounds": [BOUND | {"epsilon_lower": 1.9}]},
        {"holds": True, "bounds": [BOUND | {"epsilon_lower": math.nan}]},
        {"holds": True, "bounds": [BOUND | {"epsilon_lower": "small"}]},
        {"holds": True, "bounds": "none"},
    ],
)
def test_g6_an_audit_whose_bounds_contradict_its_verdict_has_not_held(broken: dict[str, object]) -> None:
    audit = {"code_hash": "9f" * 32, "bounds": [BOUND]}
    report = build(a_run(audit=audit | broken))
    assert report["headline"]["epsilon"] == "unknown"
    render(report)
    assert build(a_run(audit=audit | {"holds": True}))["headline"]["epsilon"] != "unknown"


def test_g6_an_audit_that_contradicts_the_code_that_ran_leaves_no_figure() -> None:
    row = {
        "audit": "gradient canaries",
        "holds": False,
        "epsilon_lower": 4.567,
        "epsilon_upper": 1.831,
        "guesses": 300,
        "correct": 297,
        "confidence": 0.95,
        "ceiling": 5.09,
        "threat_model": "<sees> every update",
    }
    audit = {"code_hash": a_run().code_hash, "holds": False, "bounds": [row]}
    report = build(a_run(audit=audit))
    assert report["headline"]["epsilon"] == "unknown"
    assert "contradicts" in report["headline"]["reasons"][0]
    page = render(report)
    # From below a figure is rounded down, and what is claimed is rounded up.
    assert all(words in page for words in ("4.56", "1.84", "297 of 300", "contradicted", "&lt;sees&gt;"))
    # The planted bug: a report that only looks whether there is an audit.
    assert build(a_run(audit=audit | {"holds": True, "bounds": []}))["headline"]["epsilon"] != "unknown"
    assert build(a_run(audit=audit | {"code_hash": "00"}))["headline"]["epsilon"] != "unknown"


def test_uses_of_data_are_counted_only_where_the_ledgers_are_shared() -> None:
    def counted(covers: str) -> dict[str, str]:
        return {row["access"]: row["accounted"] for row in build(a_run(covers=covers))["accesses"]}

    assert counted("this run only")["choosing hyper-parameters"] == "no"
    assert counted("all runs in ledgers")["choosing hyper-parameters"].startswith("yes")
    assert all(build(a_run())[name] for name in ("accesses", "limits"))


# -- a second accountant --------------------------------------------------------------------


@pytest.mark.parametrize("order", [2.0, 8.0, 32.0])
@pytest.mark.parametrize(("rate", "noise"), [(0.01, 0.8), (0.1, 1.3), (0.5, 4.0), (1.0, 9.0)])
def test_two_implementations_agree_at_whole_orders(rate: float, noise: float, order: float) -> None:
    event = Event(sample_rate=rate, noise_multiplier=noise, steps=7)
    assert second_rdp(event, order) == pytest.approx(rdp(event, order), rel=1e-6)


@pytest.mark.parametrize("order", [1.5, 3.3, 6.7, 8.0, 20.25])
def test_the_filters_figure_lies_between_what_the_second_accountant_allows(order: float) -> None:
    grant = make_grant(epsilon=500.0, order=order)
    history = [Event(sample_rate=0.2, noise_multiplier=2.0, steps=k) for k in (3, 40)]
    history.append(Event(sample_rate=1.0, noise_multiplier=7.0, steps=2))
    low, high = second_filter(history, grant)
    spent = grant.epsilon_of(sum(rdp(event, order) for event in history))
    assert low * (1 - 1e-6) <= spent <= high * (1 + 1e-6)
    # The check is not empty: half of the spend lies outside.
    half = grant.epsilon_of(sum(rdp(event, order) for event in history) / 2)
    assert half < low or order < 2


# -- ledgers alone --------------------------------------------------------------------------


class Page(HTMLParser):
    """Fails on a tag that closes out of order; notes what could load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [tag] if tag in ("script", "link", "img", "iframe") else []
        self.loads += [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def overview(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("overview")
    with open_book(folder, names=("clinic-7", HOSTILE)) as book:
        book.charge([make_request(1), make_request(1, name=HOSTILE)])
        book.set_budget(HOSTILE, 4.0, may_raise=True)
    return over_ledgers([read_ledger(folder)])


def test_the_page_over_ledgers_is_whole_loads_nothing_and_shows_what_was_raised(overview: dict[str, Any]) -> None:
    page = Page(text := render_ledgers(overview))
    assert page.loads == []
    assert text.count("&lt;script&gt;") == 1
    assert "was raised from 3.00 to 4.00" in text
    assert render_ledgers(json.loads(to_json(overview))) == text
    for broken in ({"schema": "x"}, overview | {"data_sets": [{}]}):
        with pytest.raises(RunError):
            render_ledgers(broken)


def test_a_report_over_ledgers_has_no_number_that_json_lacks(overview: dict[str, Any]) -> None:
    def numbers(value: Any) -> Iterator[float]:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from numbers(item)
        elif isinstance(value, float):
            yield value

    assert all(map(math.isfinite, numbers(overview)))
