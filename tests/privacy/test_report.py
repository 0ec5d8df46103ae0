"""The report: what it says, what it must not say, and that nothing in it passes for a small number."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from privacy import report as report_module
from privacy.errors import PlanError, RunError
from privacy.plan import Local, Mode, Plan
from privacy.report import (
    ClientSpend,
    Prices,
    RunFacts,
    Verdict,
    build,
    partition_picture,
    render,
    to_json,
    write,
)
from privacy.report_page import figure_words

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&\x00\u202e{0}%s"


def a_plan(**changes: Any) -> Plan:
    fields = {
        "sample_rate": 0.111,
        "expected_batch": 15.951,
        "l2_clip": 1.2718,
        "noise_multiplier": 2.1314,
        "steps": 9,
        "rounds": 30,
        "joins": 32,
        "epsilon": 3.0,
        "delta": 1e-5,
        "records_bound": 1437,
        "mode": Mode.HOOKS,
    }
    return Plan(**(fields | changes))


def a_client(name: str = "client-0", rounds: int = 30, **changes: Any) -> ClientSpend:
    history = tuple((moment, 2.8731 * math.sqrt(moment / rounds)) for moment in range(1, rounds + 1))
    fields: dict[str, Any] = {
        "name": name,
        "granted_epsilon": 3.0,
        "delta": 1e-5,
        "spent_epsilon": history[-1][1],
        "rounds_joined": rounds,
        "charges": rounds,
        "declined": 0,
        "runs": 1,
        "other_runs": 0,
        "receipts_missing": 0,
        "undelivered": 0,
        "test_noise": False,
        "history": history,
        "public_key": "a3" * 32,
        "ledger_head": "5b" * 32,
        "verdict": Verdict.VERIFIED,
    }
    return ClientSpend(**(fields | changes))


def some_prices(**changes: Any) -> Prices:
    fields: dict[str, Any] = {
        "schedule": "Poisson q=0.111, sigma=2.1314, 288 steps",
        "steps": 288,
        "gate": 2.9987,
        "gate_order": 8.5,
        "pld": 2.7134,
        "pld_replace_one": 5.0221,
        "saddle_replace_one": 5.0219,
        "saddle_note": "saddle-point integral",
        "rdp_replace_one": 5.4113,
        "prv": 2.7239,
        "prv_note": "",
        "rdp": 2.9761,
        "at_deltas": ((1e-4, 2.2413), (1e-6, 3.1427)),
        "tpr": ((0.001, 0.01532), (0.01, 0.0912)),
        "accountant": "dp-accounting 0.6.0; Opacus 1.6.0",
    }
    return Prices(**(fields | changes))


_PRICED = ("gate", "rdp", "pld", "pld_replace_one", "saddle_replace_one", "rdp_replace_one", "prv")


def a_run(clients: int = 3, rounds: int = 30, **changes: Any) -> RunFacts:
    fields: dict[str, Any] = {
        "job": "digits-2f6a",
        "task": "digits",
        "task_summary": "Recognise handwritten digits.",
        "record": "one digit with its label",
        "started": "2026-09-01T10:00:00+00:00",
        "finished": "2026-09-01T10:00:41+00:00",
        "status": "completed",
        "config": {"clients": clients, "epsilon": 3.0},
        "plan": a_plan(rounds=rounds, joins=rounds + 2),
        "committed": True,
        "doubts": (),
        "local": Local(lr=2.0),
        "rounds": [
            {
                "round": moment,
                "metrics": {"accuracy": moment / (moment + 3)},
                "replies": clients,
                "declined": 0,
                "missing": 0,
                "epsilon": 2.8731 * math.sqrt(moment / rounds),
                "seconds": 0.21,
            }
            for moment in range(1, rounds + 1)
        ],
        "clients": [a_client(f"client-{index}", rounds) for index in range(clients)],
        "prices": some_prices(),
        "multiplicity": 1,
        "multiplicity_epsilon": None,
        "augmented": False,
        "noise_source": "aes-256-ctr keystream",
        "versions": {"opacus": "1.6.0"},
        "code_hash": "9f" * 32,
        "witness": "",
        "covers": "this run only",
        "simulation": None,
        "engine": "local engine",
        "device": "CPU",
        "hardware": "2 cores",
    }
    return RunFacts(**(fields | changes))


def a_simulation(**changes: Any) -> dict[str, Any]:
    return {
        "label_table": [[10, 20], [30, 5], [7, 7]],
        "class_names": ["zero", "one"],
        "sizes": [30, 35, 14],
        "partition": "IID",
        "truth": {"records in all": 79},
    } | changes


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def svg(picture: str) -> ET.Element:
    return ET.fromstring(picture)  # noqa: S314 (our own picture; the point is that it parses)


class Page(html.parser.HTMLParser):
    """Collects the tags and attributes of a page, and checks that tags close in order."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


# --------------------------------------------------------------------------------------------- what is in it


def test_a_report_has_every_section_of_the_schema() -> None:
    report = build(a_run(simulation=a_simulation()))
    assert report["schema"] == "tacit-report/2"
    assert list(report) == [
        "schema", "report_id", "signature", "headline", "run", "product", "warnings", "budget", "rounds", "clients",
        "prices", "assumptions", "covered", "not_covered", "adversaries", "witness", "mechanism", "sampling",
        "empirical", "accesses", "limits", "plan", "local", "config", "software", "evidence", "simulation_only",
    ]  # fmt: skip
    assert {
        "epsilon",
        "delta",
        "unit",
        "adjacency",
        "replace_one",
        "odds_factor",
        "tpr",
        "person",
        "federation",
    } < set(report["headline"])
    assert report["plan"]["digest"] == a_run().plan.digest()


def test_a_report_is_plain_json_and_reads_back_equal() -> None:
    report = build(a_run(simulation=a_simulation()))
    assert json.loads(to_json(report)) == report
    assert render(json.loads(to_json(report))) == render(report)


def test_equal_facts_give_equal_reports_and_another_fact_another_id() -> None:
    assert to_json(build(a_run())) == to_json(build(a_run()))
    assert build(a_run())["report_id"] != build(a_run(status="stopped"))["report_id"]


def test_the_headline_quotes_the_whole_committed_schedule_and_refunds_nothing() -> None:
    stopped = [a_client(rounds=3, spent_epsilon=0.71)]
    early = build(dataclasses.replace(a_run(), clients=stopped))["headline"]
    assert early["epsilon"] == 2.7134
    assert early["replace_one"] == {
        "epsilon": 5.0221,
        "delta": 1e-5,
        "basis": "the same schedule, priced by PLD",
    }
    assert early["odds_factor"] == pytest.approx(math.exp(2.7134))
    assert early["tpr"] == [{"fpr": 0.001, "tpr": 0.01532}, {"fpr": 0.01, "tpr": 0.0912}]


def test_several_runs_in_a_ledger_are_priced_by_the_filter_not_by_one_runs_pld() -> None:
    clients = [a_client("a"), a_client("b", runs=2, other_runs=1, charges=77, spent_epsilon=2.9412)]
    headline = build(a_run(clients=2, covers="all runs in ledgers"))["headline"]
    assert headline["epsilon"] == 2.7134
    headline = build(dataclasses.replace(a_run(), clients=clients))["headline"]
    assert headline["epsilon"] == 2.9412
    assert headline["replace_one"]["epsilon"] == pytest.approx(2 * 2.9412)
    assert headline["replace_one"]["delta"] == pytest.approx(1e-5 * (1 + math.exp(2.9412)))


def test_g3_a_ledger_whose_only_run_is_another_one_is_not_taken_for_this_schedule() -> None:
    clients = [a_client("a"), a_client("b", rounds_joined=0, runs=1, other_runs=1, charges=4, spent_epsilon=2.9997)]
    report = build(dataclasses.replace(a_run(), clients=clients))
    assert report["headline"]["epsilon"] == 2.9997
    assert "over all their runs" in report["headline"]["basis"]
    assert report["covered"][2].startswith("Every run")


def test_a_spend_that_only_the_ledger_tells_counts_in_full_and_is_not_called_proven() -> None:
    facts = with_client(verdict=Verdict.LEDGER, undelivered=2)
    report = build(facts)
    assert report["headline"]["epsilon"] == 2.7134
    assert (report["clients"][-1]["verdict"], report["clients"][-1]["undelivered"]) == ("ledger only", 2)
    assert report["budget"]["undelivered"] == 2
    standings = {row["name"]: row["standing"] for row in report["assumptions"]}
    assert standings["receipts"] == "declared by holder"
    page = render(report)
    assert "never delivered" in page
    assert '<span class="chip word">ledger only</span>' in page


def test_augmentation_is_said_to_be_record_by_record_and_only_where_there_is_some() -> None:
    words = {
        augmented: next(
            row["words"] for row in build(a_run(augmented=augmented))["assumptions"] if "alone" in row["name"]
        )
        for augmented in (False, True)
    }
    assert "augmentation gets one record at a time" in words[True]
    assert "augmentation" not in words[False]


def test_only_a_simulation_claims_to_have_probed_the_model() -> None:
    for simulation in (None, a_simulation()):
        rows = build(a_run(simulation=simulation))["assumptions"]
        words = next(row["words"] for row in rows if row["name"] == "examples alone")
        assert ("probed" in words) == (simulation is not None)


def test_a_holder_with_a_smaller_delta_is_not_priced_at_the_plans_delta() -> None:
    clients = [a_client("a", delta=1e-6, spent_epsilon=2.99)]
    headline = build(dataclasses.replace(a_run(), clients=clients))["headline"]
    assert headline["epsilon"] == 2.99


def test_disagreeing_accountants_fall_back_to_the_filter_and_say_so() -> None:
    report = build(a_run(prices=some_prices(pld=1.9)))
    assert report["headline"]["epsilon"] == 2.9987
    assert any("disagree" in warning for warning in report["warnings"])
    assert not any("disagree" in warning for warning in build(a_run())["warnings"])


@pytest.mark.parametrize("planted", [2.7134, 5.0217, 4.0])
def test_g1_a_replace_one_figure_that_a_second_accountant_contradicts_is_not_quoted(planted: float) -> None:
    """Priced as adding or removing, a little too small, and at too small a sensitivity."""
    report = build(a_run(prices=some_prices(pld_replace_one=planted)))
    headline = report["headline"]
    assert headline["epsilon"] == 2.7134
    assert headline["replace_one"]["epsilon"] == pytest.approx(2 * 2.7134)
    assert headline["replace_one"]["basis"].startswith("group privacy")
    assert any("disagree on what replacing a record costs" in warning for warning in report["warnings"])
    assert not any("replacing" in warning for warning in build(a_run())["warnings"])


def test_g6_a_replace_one_figure_without_a_tight_cross_check_says_so() -> None:
    prices = some_prices(saddle_replace_one=None, saddle_note="not resolved: few steps, a low rate or little noise")
    report = build(a_run(prices=prices))
    assert report["headline"]["replace_one"]["epsilon"] == 5.0221
    assert report["prices"]["saddle_replace_one"] == "unknown"
    assert any("but for RDP's bound: not resolved" in warning for warning in report["warnings"])


def test_both_accountants_stand_beside_each_other_at_both_adjacencies() -> None:
    report = build(a_run())
    page = render(report)
    for words in ("Second method", "saddle-point integral", "5.4"):
        assert words in page
    # Reports of before there was a second figure have the page that they had.
    for name in ("saddle_replace_one", "saddle_note", "rdp_replace_one"):
        del report["prices"][name]
    assert "Second method" not in render(report)


def test_a_person_in_several_data_sets_gets_the_composed_figure_on_the_first_line() -> None:
    headline = build(a_run(multiplicity=3, multiplicity_epsilon=5.4321))["headline"]
    assert headline["epsilon"] == headline["person"][0]["epsilon"] == 5.4321
    assert headline["federation"]["one_data_set"] == 2.7134
    assert "up to 3 data sets" in headline["person"][0]["who"]
    assert headline["person"][1]["epsilon"] == "none possible"


def test_the_membership_bound_is_the_one_of_epsilon_and_delta_where_no_schedule_was_priced() -> None:
    headline = build(a_run(multiplicity=2, multiplicity_epsilon=4.0))["headline"]
    expected = [min(1.0, math.exp(4) * fpr + 1e-5, 1 - (1 - 1e-5 - fpr) * math.exp(-4)) for fpr in (0.001, 0.01)]
    assert [entry["tpr"] for entry in headline["tpr"]] == pytest.approx(expected)


def test_rollback_is_not_detectable_without_a_witness() -> None:
    assert "Not detectable without a witness" in build(a_run())["witness"]["rollback"]
    assert build(a_run(witness="the server"))["witness"]["rollback"].startswith("Detectable")


def test_other_runs_are_named_as_not_covered_only_where_ledgers_live_in_the_run_folder() -> None:
    assert any("Other runs" in gap for gap in build(a_run())["not_covered"])
    assert not any("Other runs" in gap for gap in build(a_run(covers="all runs in x"))["not_covered"])


# ------------------------------------------------------------------------------ unknown is not small (G6)


def with_client(**changes: Any) -> RunFacts:
    facts = a_run()
    return dataclasses.replace(facts, clients=[*facts.clients, a_client("odd", **changes)])


DOUBTS = {
    "a client's spend is unknown": with_client(spent_epsilon=None),
    "a client's spend is not a number": with_client(spent_epsilon=math.nan),
    "a receipt is missing": with_client(receipts_missing=1),
    "receipts do not verify": with_client(verdict=Verdict.UNKNOWN),
    "more charges than committed": with_client(charges=33),
    "more spent than granted": with_client(granted_epsilon=1.0),
    "no ledger was read": a_run(clients=0),
    "another plan was committed": a_run(committed=False),
    "the files contradict each other": a_run(doubts=("The checkpoint is that of another job.",)),
    "multiplicity without a figure": a_run(multiplicity=2),
    "multiplicity cheaper than one": a_run(multiplicity=2, multiplicity_epsilon=0.3),
    "no accountant gave a figure": a_run(prices=some_prices(pld=None, gate=math.nan)),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_one_unproven_assumption_makes_every_headline_figure_unknown(doubt: str) -> None:
    report = build(DOUBTS[doubt])
    headline = report["headline"]
    figures = [
        headline["epsilon"],
        headline["replace_one"]["epsilon"],
        headline["odds_factor"],
        headline["federation"]["epsilon"],
        headline["person"][0]["epsilon"],
        *(entry["tpr"] for entry in headline["tpr"]),
    ]
    assert figures == ["unknown"] * len(figures)
    assert "unknown" in headline["sentence"]
    assert headline["reasons"]
    assert 'class="headline open"' in render(report)


def test_without_a_doubt_the_same_run_has_a_finite_headline() -> None:
    # The twin of the test above: it fails on a report that always prints "unknown".
    report = build(a_run())
    assert isinstance(report["headline"]["epsilon"], float)
    assert report["headline"]["reasons"] == []
    assert 'class="headline known"' in render(report)


def test_the_doubt_test_fails_on_a_report_that_ignores_unproven_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report_module, "_reasons", lambda facts: [])
    with pytest.raises(AssertionError):
        test_one_unproven_assumption_makes_every_headline_figure_unknown("a client's spend is unknown")


def test_an_unproven_client_also_hides_its_history_and_the_rounds_largest_epsilon() -> None:
    report = build(with_client(receipts_missing=2))
    odd = report["clients"][-1]
    assert odd["spent_epsilon"] == odd["remaining_epsilon"] == "unknown"
    assert {spent for _, spent in odd["history"]} == {"unknown"}
    assert {record["epsilon"] for record in report["rounds"]} == {"unknown"}
    assert report["budget"]["largest_spent"] == report["budget"]["least_remaining"] == "unknown"


@pytest.mark.parametrize("doubt", ["another plan was committed", "the files contradict each other"])
def test_a_doubt_about_the_whole_run_hides_every_total(doubt: str) -> None:
    report = build(DOUBTS[doubt])
    assert report["budget"]["largest_spent"] == report["budget"]["least_remaining"] == "unknown"
    assert {record["epsilon"] for record in report["rounds"]} == {"unknown"}
    assert build(a_run())["budget"]["largest_spent"] == pytest.approx(2.8731)


def test_the_price_of_a_plan_that_nobody_committed_to_is_not_printed() -> None:
    prices = build(a_run(committed=False))["prices"]
    assert {prices[name] for name in _PRICED} == {"unknown"}
    assert (
        {entry["epsilon"] for entry in prices["at_deltas"]} == {entry["tpr"] for entry in prices["tpr"]} == {"unknown"}
    )
    assert build(a_run())["prices"]["pld"] == 2.7134


def test_test_noise_at_one_client_prints_infinity_everywhere() -> None:
    report = build(with_client(test_noise=True, spent_epsilon=0.01))
    headline, prices = report["headline"], report["prices"]
    assert headline["epsilon"] == headline["odds_factor"] == headline["federation"]["one_data_set"] == "infinity"
    assert headline["replace_one"]["epsilon"] == headline["person"][0]["epsilon"] == "infinity"
    assert {entry["tpr"] for entry in headline["tpr"]} == {1.0}
    assert {prices[name] for name in _PRICED} == {"infinity"}
    assert {entry["epsilon"] for entry in prices["at_deltas"]} == {"infinity"}
    assert {record["epsilon"] for record in report["rounds"]} == {"infinity"}
    assert {spent for _, spent in report["clients"][-1]["history"]} == {"infinity"}
    assert report["budget"]["largest_spent"] == "infinity"
    assert 'class="headline none"' in render(report)


def test_test_noise_outweighs_an_unknown_client() -> None:
    facts = with_client(test_noise=True, receipts_missing=3, verdict=Verdict.UNKNOWN)
    assert build(facts)["headline"]["epsilon"] == "infinity"


@pytest.mark.parametrize("facts", [a_run(), with_client(test_noise=True), *DOUBTS.values()])
def test_a_finite_headline_and_a_rule_that_is_not_enforced_never_meet(facts: RunFacts) -> None:
    report = build(facts)
    broken = [row["name"] for row in report["assumptions"] if row["standing"] == "not enforced"]
    assert not (broken and isinstance(report["headline"]["epsilon"], float))


def test_no_number_in_the_json_is_nan_or_infinite() -> None:
    facts = with_client(spent_epsilon=math.inf, history=((1, math.nan), (2, math.inf)))
    facts = dataclasses.replace(
        facts,
        rounds=[{"round": 1, "metrics": {"accuracy": math.nan, "loss": -math.inf}, "epsilon": math.nan}],
        prices=some_prices(pld=math.nan, prv=math.inf, rdp=math.inf, tpr=((0.01, math.nan),)),
        config={"lr": math.nan},
        simulation=a_simulation(truth={"entropy": math.nan}),
    )
    report = build(facts)
    assert all(math.isfinite(value) for value in leaves(report) if isinstance(value, float))
    assert not re.search(r"\b(NaN|Infinity)\b", to_json(report))
    assert report["rounds"][0]["metrics"] == {"accuracy": "unknown", "loss": "-infinity"}
    assert "nan" not in {word.lower() for word in Page(render(report)).words}


def test_a_multiplicity_below_one_is_refused() -> None:
    with pytest.raises(PlanError, match="expected multiplicity >= 1, got 0"):
        a_run(multiplicity=0)


# ------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (2.7134, "2.72"), (2.71, "2.71"), (3.0000000000000004, "3.00"), (2.9999, "3.00"), (9.999, "10.0"),
        (0.05231, "0.0524"), (99.95, "100"), (1234.0, "1,240"), (0.0, "0"), (1e-5, "1e-5"),
        (2.51e-7, "2.51e-7"), (1.2345e9, "1.24e9"), ("unknown", "unknown"),
    ],
)  # fmt: skip
def test_bounds_are_rounded_up_in_three_digits(value: float | str, words: str) -> None:
    assert figure_words(value) == words


def test_no_rounded_bound_is_below_the_bound() -> None:
    for step in range(1, 4000):
        value = math.exp(step / 97.13 - 15)
        shown = float(figure_words(value).replace(",", ""))
        # Ten digits are kept before rounding up, so only a difference beyond the tenth may be lost.
        assert value * (1 - 1e-9) <= shown <= value * 1.011


def test_the_rounding_test_fails_where_a_bound_is_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.report_page._round", lambda value, towards: float(f"{value:.3g}"))
    with pytest.raises(AssertionError):
        test_no_rounded_bound_is_below_the_bound()


# ---------------------------------------------------------------------------------- simulation only (G12)

MARKER = 8675309


def without_simulation(report: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in report.items() if key not in {"simulation_only", "report_id"}})


def test_a_count_of_the_simulation_is_nowhere_outside_its_section() -> None:
    table = [[MARKER, MARKER], [MARKER, 1], [2, 3]]
    facts = a_run(simulation=a_simulation(label_table=table, sizes=[MARKER] * 3, truth={"records": MARKER}))
    report = build(facts)
    digits = re.compile(rf"{MARKER}|{MARKER:,}|{2 * MARKER:,}")
    assert str(MARKER) in json.dumps(report["simulation_only"])
    assert not digits.search(without_simulation(report))
    page = render(report)
    before, found, rest = page.partition('<section id="simulation"')
    section, _, after = rest.partition("</section>")
    assert found
    assert digits.search(section)
    assert not digits.search(before + after)


def test_the_marker_test_fails_on_a_report_that_tells_a_count_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leak = report_module._warnings
    monkeypatch.setattr(report_module, "_warnings", lambda facts: [*leak(facts), str(facts.simulation)])
    with pytest.raises(AssertionError):
        test_a_count_of_the_simulation_is_nowhere_outside_its_section()


def test_a_report_outside_simulation_has_no_such_section() -> None:
    report = build(a_run(simulation=None))
    assert "simulation_only" not in report
    page = render(report)
    assert 'id="simulation"' not in page
    assert "Simulation only" not in page
    assert "imulat" not in page.partition("</style>")[2]


def test_what_a_caller_adds_to_a_round_or_to_the_simulation_stays_out() -> None:
    facts = a_run(rounds=2, simulation=a_simulation(secret=MARKER))
    facts = dataclasses.replace(facts, rounds=[{"round": 1, "epsilon": 1.0, "loss_of_client_3": MARKER}])
    assert str(MARKER) not in to_json(build(facts))


# -------------------------------------------------------------------------------------------------- the page


def hostile_run() -> RunFacts:
    text = HOSTILE
    return a_run(
        job=text, task=text, task_summary=text, record=text, started=text, finished=text, status=text,
        config={text: text}, noise_source=text, versions={text: text}, code_hash=text, witness=text,
        covers=text, engine=text, device=text, hardware=text,
        clients=1, prices=some_prices(schedule=text, prv_note=text, accountant=text),
        simulation=a_simulation(class_names=[text, text * 2], partition=text, truth={text: text}),
    )  # fmt: skip


def test_no_value_can_become_markup() -> None:
    facts = hostile_run()
    odd = a_client(HOSTILE, public_key=HOSTILE, ledger_head=HOSTILE, receipts_missing=1)
    record = {"round": 1, "metrics": {HOSTILE: 0.5}, "replies": HOSTILE, "epsilon": None, "seconds": HOSTILE}
    for clients in ([a_client(HOSTILE)], [odd, odd]):
        page = render(build(dataclasses.replace(facts, clients=clients, rounds=[record])))
        plain = render(build(a_run(simulation=a_simulation())))
        parsed = Page(page)
        assert set(parsed.tags) <= set(Page(plain).tags) | {
            "li",
            "ul",
            "div",
            "figcaption",
            "circle",
            "p",
            "caption",
        }
        assert not {name for name, _ in parsed.attributes} & {"onerror", "onload", "onclick", "src", "href"}
        assert "\x00" not in page
        assert "\u202e" not in page


def test_the_escaping_test_fails_on_a_page_that_does_not_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.report_page._safe", str)
    with pytest.raises(AssertionError):
        test_no_value_can_become_markup()


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    page = render(build(a_run(simulation=a_simulation())))
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "use", "image"} & set(parsed.tags)
    addresses = set(re.findall(r"[a-z]+://[^\"' <)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "@import" not in page
    assert "url(" not in page
    policy = [value for _, value in parsed.attributes if value and value.startswith("default-src")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_page_shows_both_adjacencies_the_policy_and_each_client() -> None:
    page = render(build(a_run()))
    words = "".join(Page(page).words)
    for text in (
        "2.72",
        "5.03",
        "add or remove one record",
        "replace one record",
        "client-2",
        "this run only",
    ):
        assert text in words
    for text in ("none possible", "Hyper-parameter search", "Not detectable without a witness", "Mironov"):
        assert text in words


def test_every_picture_is_well_formed_and_described() -> None:
    declining = a_run(simulation=a_simulation())
    rounds = [dict(record) | {"declined": 1, "missing": 1} for record in declining.rounds]
    page = render(build(dataclasses.replace(declining, rounds=rounds)))
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 4
    space = "{http://www.w3.org/2000/svg}"
    for picture in pictures:
        root = svg(picture)
        assert root.get("role") == "img"
        assert root.findtext(f"{space}title")
        assert root.findtext(f"{space}desc")
    identifiers = re.findall(r' id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_epsilon_is_drawn_as_a_band_where_there_are_many_clients() -> None:
    assert 'class="band"' not in render(build(a_run(clients=10)))
    assert 'class="band"' in render(build(a_run(clients=60)))


def table_of_rounds(page: str) -> list[str]:
    """Returns the first cell of every row in the table of rounds."""
    (section,) = re.findall(r'<section[^>]* id="rounds".*?</section>', page, re.DOTALL)
    return re.findall(r"<tr><t[dh][^>]*>(\d+)</t[dh]>", section)


@pytest.mark.parametrize("rounds", [0, 1, 2, 13])
def test_a_run_of_few_rounds_still_gives_a_page(rounds: int) -> None:
    facts = a_run(rounds=max(1, rounds))
    if rounds == 0:
        idle = [a_client("idle", history=(), spent_epsilon=0.0, charges=0, rounds_joined=0, runs=0)]
        facts = dataclasses.replace(facts, rounds=[], clients=idle)
    report = build(facts)
    page = render(report)
    words = "".join(Page(page).words)
    assert len(report["rounds"]) == rounds
    # Of up to a dozen rounds the table shows each; of more a dozen, the first and the last among them.
    shown = table_of_rounds(page)
    assert len(shown) == min(rounds, 12)
    assert shown[:1] + shown[-1:] == ([] if rounds == 0 else ["1", str(rounds)])
    assert ("No round was finished." in words) == (rounds == 0)
    for picture in ("What the model learned.", "What it cost, as each client"):
        assert (picture in words) == (rounds > 0)
    # Nothing charged costs nothing; the price of the schedule stays what was committed.
    assert report["headline"]["epsilon"] == 2.7134
    assert [client["spent_epsilon"] for client in report["clients"]] == [
        client.spent_epsilon for client in facts.clients
    ]
    for number in re.findall(r'(?:cx|cy|x|y|d|points)="([^"]*)"', page):
        assert "nan" not in number.lower()
        assert "inf" not in number.lower()


def test_another_schema_and_a_broken_report_are_refused() -> None:
    report = build(a_run())
    with pytest.raises(RunError, match="expected a report of schema tacit-report/2, got 'tacit-report/9'"):
        render(report | {"schema": "tacit-report/9"})
    with pytest.raises(RunError, match="expected a whole report"):
        render({name: value for name, value in report.items() if name != "budget"})


def test_a_thousand_clients_and_a_hundred_rounds_stay_small_and_quick(tmp_path: Path) -> None:
    simulation = a_simulation(label_table=[[k % 7, 3] for k in range(1000)], sizes=[9] * 1000)
    facts = a_run(clients=1000, rounds=100, simulation=simulation)
    started = time.perf_counter()
    data, page = write(facts, tmp_path)
    assert time.perf_counter() - started < 15
    assert data.stat().st_size + page.stat().st_size < 10_000_000
    text = page.read_text()
    assert "80 of 1,000 clients" in text
    assert text.count("<tr>") < 250
    assert len(json.loads(data.read_text())["clients"]) == 1000


def test_of_many_clients_the_table_shows_the_open_questions_and_both_ends() -> None:
    facts = a_run(clients=300)
    clients = [dataclasses.replace(client, spent_epsilon=1 + index / 500) for index, client in enumerate(facts.clients)]
    clients[150] = dataclasses.replace(clients[150], verdict=Verdict.UNKNOWN)
    page = render(build(dataclasses.replace(facts, clients=clients)))
    shown = set(re.findall(r">(client-\d+)<", page))
    assert {"client-150", "client-0", "client-299"} <= shown
    assert "client-149" not in shown


# --------------------------------------------------------------------------------------------- the partition


def test_the_partition_picture_stands_alone_and_tells_every_count() -> None:
    picture = partition_picture([[3, 0, 4], [0, 0, 0]], ["cat", HOSTILE, "dog"])
    root = svg(picture)
    tips = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert tips[1:] == ["client 1, cat: 3 of 7", "client 1, dog: 4 of 7"]


@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (30, 10), (50, 11), (500, 100)])
def test_a_partition_picture_has_room_for_any_numbers(clients: int, classes: int) -> None:
    picture = partition_picture([[1] * classes] * clients, [f"class {index}" for index in range(classes)])
    root = svg(picture)
    height = float(root.attrib["viewBox"].split()[3])
    rectangles = [element for element in root.iter("{http://www.w3.org/2000/svg}rect") if element.get("y")]
    assert max(float(element.attrib["y"]) + float(element.attrib["height"]) for element in rectangles) <= height


# -------------------------------------------------------------------------------------------------- the files


def test_both_files_are_written_whole_and_again_over_old_ones(tmp_path: Path) -> None:
    for status in ("stopped", "completed"):
        data, page = write(a_run(status=status), tmp_path)
        assert json.loads(data.read_text())["run"]["status"] == status
        assert status in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_failed_write_leaves_the_old_report_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(a_run(status="old"), tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_module.os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device; make room"):
        write(a_run(status="new"), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["run"]["status"] == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_report_is_made_without_torch() -> None:
    code = "import sys, privacy.report; sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(report_module.__file__).parents[1]).returncode == 0
