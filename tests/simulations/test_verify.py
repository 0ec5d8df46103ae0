"""What `tacit verify` finds: every changed byte, and every lie of an operator or a holder that signs it anew."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privacy import verify as verify_module
from privacy.accounting import Event, pld_epsilon, prv_epsilon
from privacy.errors import RunError
from privacy.identity import Secret
from privacy.ledger import Book, Receipt
from privacy.plan import Adjacency, Plan, canonical
from privacy.report import odds_of, render, report_id, sentence_of, sign, tier_words, to_json, tpr_bound
from privacy.transcript import export
from privacy.verify import Check, Result, passed, verify_files
from simulations.run import simulate
from simulations.scenario import Scenario
from tests.oracles import make_plan, make_request, rechain, remark

CLIENTS, ROUNDS = 3, 3
SMALL = {"clients": CLIENTS, "rounds": ROUNDS, "steps-per-round": 1, "mode": "hooks", "seed": 5, "epsilon": 2.5}
FILES = ("report.json", "report.html", "receipts.jsonl", "ledgers/ledger.jsonl")


class Quiet:
    """Watches nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "run"
    simulate(Scenario.layered(None, SMALL), out=folder, observer=Quiet())
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(autouse=True, scope="module")
def one_price() -> Any:
    """PRV's figure of one schedule takes seconds and never changes: it is computed once for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "prv_epsilon", functools.lru_cache(prv_epsilon))
        yield


def failures(*places: Path, keys: tuple[str, ...] = ()) -> list[Check]:
    checks = verify_files(places, keys)
    assert passed(checks) == (not [check for check in checks if check.result is Result.FAILS])
    return [check for check in checks if check.result is Result.FAILS]


def answers(*places: Path, keys: tuple[str, ...] = ()) -> dict[str, Result]:
    return {check.name: check.result for check in verify_files(places, keys)}


def report_of(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


def rewrite(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The operator changes its report, and makes id, signature and page anew."""
    report = report_of(run)
    change(report)
    report["report_id"] = report_id(report)
    signed = sign(report, Secret.load_or_create(run / "server.key").identity("server"))
    (run / "report.json").write_text(to_json(signed))
    (run / "report.html").unlink()
    # What cannot be drawn is still a report that somebody may hand over.
    with contextlib.suppress(RunError):
        (run / "report.html").write_text(render(signed))


# -- an honest run ------------------------------------------------------------------------


def test_an_honest_run_fails_nothing_and_says_what_cannot_be_proven(run: Path) -> None:
    assert failures(run) == []
    found = answers(run)
    assert {name for name, result in found.items() if result is Result.OPEN} == {
        "report signer",
        "client keys",
        "this code",
        "all clients",
        "words of the report",
    }
    assert len(found) > 20


def test_g6_a_figure_beside_an_audit_that_contradicts_it_is_found(run: Path) -> None:
    code = report_of(run)["software"]["code_hash"]
    row = {"audit": "gradient canaries", "holds": True, "epsilon_lower": 1.0, "epsilon_upper": 2.0}

    def audited(**changes: Any) -> None:
        found = {"code_hash": code, "holds": True, "bounds": [row]} | changes
        rewrite(run, lambda report: report["empirical"].update(audit=found))

    audited()
    assert answers(run / "report.json")["audit"] is Result.OPEN
    # The verdict is worked out from the bounds, whatever the operator writes beside them.
    for changes in ({"holds": False}, {"bounds": [row | {"epsilon_lower": 2.5}]}, {"contradicted": 1}):
        audited(**changes)
        assert [check.name for check in failures(run / "report.json")] == ["audit"]
    audited(holds=False, code_hash="0" * 64)
    assert answers(run / "report.json")["audit"] is Result.OPEN


def test_pinned_keys_are_taken_and_others_are_not(run: Path) -> None:
    report = report_of(run)
    keys = (report["signature"]["public_key"], *(client["public_key"] for client in report["clients"]))
    found = answers(run, keys=keys)
    assert found["report signer"] is found["client keys"] is Result.HOLDS
    assert answers(run, keys=keys[:-1])["client keys"] is Result.OPEN
    assert answers(run, keys=keys[1:])["report signer"] is Result.OPEN


def test_each_file_can_be_checked_alone(run: Path) -> None:
    for name in FILES:
        assert failures(run / name) == []
    assert answers(run / "report.json")["receipts file"] is Result.OPEN
    assert answers(run / "ledgers/ledger.jsonl")["rollback"] is Result.OPEN
    assert answers(run / "report.html")["page report.html"] is Result.OPEN
    # A report alone proves each client's spend, and counts nothing it has no evidence for.
    assert answers(run / "report.json")["client receipts"] is Result.HOLDS


def test_an_export_serves_as_a_ledger(run: Path, tmp_path: Path) -> None:
    with Book(run / "ledgers") as book:
        export(book, tmp_path / "copy")
    assert answers(run / "report.json", tmp_path / "copy")["report and ledgers"] is Result.HOLDS


def test_a_run_that_two_jobs_paid_from_is_checked_by_the_filter(tmp_path: Path) -> None:
    keys = SMALL | {"ledgers": str(tmp_path / "shared"), "rounds": 2, "retries": 12}
    simulate(Scenario.layered(None, keys), out=tmp_path / "first", observer=Quiet())
    later = Scenario.layered(None, keys | {"rounds": 1, "retries": 0, "epsilon": 1.9})
    simulate(later, out=tmp_path / "second", observer=Quiet())
    assert failures(tmp_path / "second", tmp_path / "shared") == []
    assert "over all their runs" in report_of(tmp_path / "second")["headline"]["basis"]
    # The first report is older than the ledger: it is checked against the state that it names.
    assert answers(tmp_path / "first", tmp_path / "shared")["report and ledgers"] is Result.HOLDS


# -- any changed byte ---------------------------------------------------------------------


def flips(run: Path, name: str, step: int, masks: tuple[int, ...]) -> None:
    data = (run / name).read_bytes()
    for position in range(0, len(data), step):
        for mask in masks:
            (run / name).write_bytes(data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])
            assert failures(run / name), (position, mask, data[max(0, position - 30) : position + 30])


@pytest.mark.parametrize("name", ["report.json", "receipts.jsonl"])
def test_a_changed_byte_is_found(run: Path, name: str) -> None:
    flips(run, name, max(1, (run / name).stat().st_size // 60), (0x01,))


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0x01, 0x04, 0x20])
@pytest.mark.parametrize("name", ["report.json", "receipts.jsonl"])
def test_every_changed_byte_is_found(run: Path, name: str, mask: int) -> None:
    flips(run, name, 1, (mask,))


def test_a_changed_space_is_found_though_it_means_nothing(run: Path) -> None:
    text = (run / "report.json").read_text()
    (run / "report.json").write_text(text.replace("\n", "\n ", 1))
    assert [check.name for check in failures(run / "report.json")] == ["file report.json"]


def test_planted_verifier_that_looks_at_the_meaning_alone_misses_a_space(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (run / "report.json").read_text().replace("\n", "\n ", 1)
    (run / "report.json").write_text(text)
    monkeypatch.setattr(verify_module, "to_json", lambda report: text)
    assert failures(run / "report.json") == []


def test_a_changed_page_is_found(run: Path) -> None:
    text = (run / "report.html").read_text()
    (run / "report.html").write_text(text.replace("Privacy report", "Privacy  report", 1))
    assert [check.name for check in failures(run)] == ["page report.html"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"{}\n", b'{"schema":"x"}', b"[" * 99999, b'{"a":NaN}']
)
def test_what_is_no_file_of_ours_is_an_answer_and_not_a_traceback(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert len(failures(tmp_path / "file")) >= 1
    assert failures(tmp_path / "absent")
    assert failures(tmp_path)


# -- an operator that lies and signs it -----------------------------------------------------


def smaller_headline(report: dict[str, Any]) -> None:
    headline = report["headline"]
    headline["epsilon"] = headline["federation"]["epsilon"] = headline["federation"]["one_data_set"] = 0.5
    headline["person"][0]["epsilon"] = 0.5
    headline["sentence"] = sentence_of(0.5, headline["delta"], headline["protects"], [])


def smaller_price(report: dict[str, Any]) -> None:
    smaller_headline(report)
    report["prices"]["pld"] = 0.5


def smaller_spend(report: dict[str, Any]) -> None:
    report["clients"][0]["spent_epsilon"] /= 2
    report["clients"][0]["history"] = [[step, spent / 2] for step, spent in report["clients"][0]["history"]]


def unsigned_spend(report: dict[str, Any]) -> None:
    smaller_spend(report)
    report["clients"][0].update(verdict="ledger only", signed=[])


def another_plan(report: dict[str, Any]) -> None:
    plan = {name: value for name, value in report["plan"].items() if name != "digest"} | {"noise_multiplier": 99.0}
    report["plan"] = plan | {"digest": Plan.from_json(canonical(plan)).digest()}


def sentence_alone(report: dict[str, Any]) -> None:
    report["headline"]["sentence"] = report["headline"]["sentence"].replace("a factor of ", "a factor of 1.0")


def power_alone(report: dict[str, Any]) -> None:
    report["prices"]["tpr"][0]["tpr"] = report["headline"]["tpr"][0]["tpr"] = 0.0011


def replacing_priced_as_removing(report: dict[str, Any]) -> None:
    swapped(report, report["prices"]["pld"])


def replacing_at_sensitivity_1(report: dict[str, Any]) -> None:
    plan = Plan.from_json(canonical({name: value for name, value in report["plan"].items() if name != "digest"}))
    schedule = Event.all_of_schedule(plan)
    half = [dataclasses.replace(event, noise_multiplier=2 * event.noise_multiplier) for event in schedule]
    swapped(report, pld_epsilon(half, plan.delta, Adjacency.REPLACE_ONE))


def replacing_a_little_cheaper(report: dict[str, Any]) -> None:
    swapped(report, report["prices"]["pld_replace_one"] * 0.999)


def swapped(report: dict[str, Any], epsilon: float) -> None:
    """Makes every place say one figure for replacing, but the one that is RDP's."""
    assert report["prices"]["pld_replace_one"] == report["headline"]["replace_one"]["epsilon"] > epsilon
    report["prices"].update(pld_replace_one=epsilon, saddle_replace_one=epsilon)
    report["headline"]["replace_one"]["epsilon"] = epsilon


def no_price_but_for_replacing(report: dict[str, Any]) -> None:
    report["prices"]["pld"] = "unknown"


def set_in(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        inner: Any = report
        for key in path[:-1]:
            inner = inner[key]
        assert inner[path[-1]] != value
        inner[path[-1]] = value

    return change


LIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "headline": (smaller_headline, "headline"),
    "headline and price": (smaller_price, "PLD price"),
    "spend": (smaller_spend, "client receipts"),
    "spend said to be unsigned": (unsigned_spend, "client receipts"),
    "history": (set_in("clients", 0, "history", value=[]), "none"),
    "history made smaller": (set_in("clients", 0, "history", 1, 1, value=0.1), "spend by round"),
    "a client left out": (lambda report: report["clients"].pop(), "spend by round"),
    "plan": (another_plan, "commitments"),
    "code": (set_in("software", "code_hash", value="0" * 64), "commitments"),
    "task": (set_in("run", "task", value="other"), "commitments"),
    "seed": (set_in("config", "seed", value=6), "commitments"),
    "granted": (set_in("clients", 0, "granted_epsilon", value=9.0), "client receipts"),
    "key": (set_in("clients", 0, "public_key", value="0" * 64), "client receipts"),
    "charges": (set_in("clients", 0, "charges", value=1), "client receipts"),
    "filter's price": (set_in("prices", "gate", value=0.9), "filter's price"),
    "RDP price": (set_in("prices", "rdp", value=1.9), "RDP price"),
    "unamplified": (set_in("prices", "unamplified", value=1.0), "RDP price"),
    "replace-one": (set_in("prices", "pld_replace_one", value=1.0), "replace-one price"),
    "replace-one as add/remove": (replacing_priced_as_removing, "replace-one price"),
    "replace-one at sensitivity 1": (replacing_at_sensitivity_1, "replace-one price"),
    "replace-one a little cheaper": (replacing_a_little_cheaper, "replace-one price"),
    "replace-one alone": (no_price_but_for_replacing, "replace-one price"),
    "replace-one, second figure": (set_in("prices", "saddle_replace_one", value=1.0), "replace-one price"),
    "replace-one, RDP": (set_in("prices", "rdp_replace_one", value=1.0), "replace-one price"),
    "other delta": (set_in("prices", "at_deltas", 1, "epsilon", value=1.0), "other deltas"),
    "power": (power_alone, "power of attackers"),
    "sentence": (sentence_alone, "headline"),
    "tier": (set_in("headline", "tier", value="tier 1, strong: epsilon at most 1"), "headline"),
    "delta": (set_in("headline", "delta", value=1e-9), "headline"),
    "replies": (set_in("rounds", 0, "replies", value=9), "every update has a receipt"),
    "receipts file": (set_in("evidence", "receipts", "lines", value=1), "receipts file"),
    "steps": (set_in("prices", "steps", value=1), "price of the schedule"),
    "ledger head": (set_in("clients", 0, "ledger_head", value="0" * 64), "client receipts"),
    "verdict": (set_in("clients", 0, "verdict", value="unknown"), "the headline, from the figures below it"),
    "unit": (set_in("headline", "unit", value="client"), "headline"),
    "protects": (set_in("headline", "protects", value="one person with all records"), "headline"),
    "largest spend": (set_in("budget", "largest_spent", value=0.1), "sums and remainders"),
    "least remainder": (set_in("budget", "least_remaining", value=2.0), "sums and remainders"),
    "all charges": (set_in("budget", "charges", value=1), "sums and remainders"),
    "remainder": (set_in("clients", 0, "remaining_epsilon", value=2.0), "sums and remainders"),
    "rounds joined": (set_in("clients", 0, "rounds_joined", value=1), "sums and remainders"),
    "undelivered": (set_in("clients", 0, "undelivered", value=1), "sums and remainders"),
    "clock": (set_in("clients", 0, "clock_set_back", value=1), "sums and remainders"),
    "spend of a round": (set_in("rounds", 1, "epsilon", value=0.1), "sums and remainders"),
    "fewer replies": (set_in("rounds", 0, "replies", value=1), "sums and remainders"),
    "persons": (set_in("headline", "person", 1, "epsilon", value=0.1), "sums and remainders"),
    "delta times records": (set_in("prices", "delta_times_records", value=1e-9), "sums and remainders"),
    "a curve without end": (
        lambda report: report["prices"].update(at_deltas=report["prices"]["at_deltas"] * 9),
        "price of the schedule",
    ),
    "not whole": (lambda report: report["prices"].pop("rdp"), "what the schedule costs, computed anew"),
}


def claim(report: dict[str, Any], epsilon: float, swap: float) -> None:
    """Makes every place of the headline say one figure, as an operator would that knows what is compared."""
    headline, delta = report["headline"], report["plan"]["delta"]
    headline.update(
        epsilon=epsilon,
        delta=delta,
        basis="the whole committed schedule, priced by PLD; no refund for stopping",
        sentence=sentence_of(epsilon, delta, headline["protects"], []),
        odds_factor=odds_of(epsilon),
        tier=tier_words(epsilon),
        tpr=[{"fpr": row["fpr"], "tpr": tpr_bound(row["fpr"], epsilon, delta)} for row in headline["tpr"]],
    )
    headline["replace_one"].update(epsilon=swap, delta=delta)
    headline["federation"].update(epsilon=epsilon, one_data_set=epsilon)
    headline["person"][0]["epsilon"] = epsilon


def test_g1_the_line_on_replacing_says_what_was_compared(run: Path) -> None:
    prices = report_of(run)["prices"]
    words = next(check.words for check in verify_files([run]) if check.name == "replace-one price")
    for figure in ("pld_replace_one", "saddle_replace_one", "rdp_replace_one", "pld"):
        assert f"{prices[figure]:.4g}" in words
    assert "saddle-point integral" in words
    assert prices["pld"] < prices["saddle_replace_one"] <= prices["pld_replace_one"] < prices["rdp_replace_one"]


def test_a_report_of_before_there_was_a_second_figure_is_checked_all_the_same_and_says_so(run: Path) -> None:
    def older(report: dict[str, Any]) -> None:
        for name in ("saddle_replace_one", "saddle_note", "rdp_replace_one"):
            del report["prices"][name]

    rewrite(run, older)
    assert "Second method" not in (run / "report.html").read_text()
    checks = {check.name: check for check in verify_files([run])}
    assert [check.name for check in checks.values() if check.result is Result.FAILS] == []
    assert "the report is of before there were others" in checks["replace-one price"].words
    assert "saddle-point integral says" in checks["replace-one price"].words
    rewrite(run, set_in("prices", "pld_replace_one", value=1.0))
    assert "replace-one price" in {check.name for check in failures(run)}


@pytest.mark.parametrize("second", [True, False], ids=["with a second accountant", "planted: PLD anew alone"])
def test_g1_a_library_that_prices_replacing_as_removing_is_found(
    run: Path, monkeypatch: pytest.MonkeyPatch, second: bool
) -> None:
    """The report's maker and its reader use one library; a fault of it is seen by what shares nothing with it."""
    from simulations import evidence

    def faulty(releases: Any, delta: float, adjacency: Adjacency = Adjacency.ADD_REMOVE) -> float:
        return pld_epsilon(releases, delta)

    monkeypatch.setattr(evidence, "pld_epsilon", faulty)
    monkeypatch.setattr(verify_module, "pld_epsilon", faulty)
    if second:
        evidence.render(run)
        # The report itself quotes a figure that holds, and says why.
        report = report_of(run)
        assert "group privacy" in report["headline"]["replace_one"]["basis"]
        assert any("disagree on what replacing" in warning for warning in report["warnings"])
        assert {check.name for check in failures(run)} == {"replace-one price"}
        return
    for module in (evidence, verify_module):
        monkeypatch.setattr(module, "replace_epsilon", lambda *_: (None, "not asked"))
    evidence.render(run)
    assert failures(run) == []


def test_g1_a_report_over_ledgers_has_its_replace_one_figures_checked_by_a_second_accountant(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privacy import ledger_report
    from privacy.transcript import read_ledger

    def overview() -> Path:
        (run / "over.json").write_text(to_json(ledger_report.over_ledgers([read_ledger(run / "ledgers/ledger.jsonl")])))
        return run / "over.json"

    found = answers(overview(), run / "ledgers")
    assert found["replace-one price"] is Result.HOLDS
    ledger_report._price.cache_clear()
    monkeypatch.setattr(ledger_report, "pld_epsilon", lambda releases, delta, _=None: pld_epsilon(releases, delta))
    assert {check.name for check in failures(overview(), run / "ledgers")} == {"replace-one price"}
    ledger_report._price.cache_clear()


def test_g14_a_forged_plan_is_found_though_its_commitments_claim_to_be_of_the_unsigned_version(run: Path) -> None:
    """Version 1 was never signed, so a paper that says "version 1" proves nothing."""

    def forge(report: dict[str, Any]) -> None:
        fields = {name: value for name, value in report["plan"].items() if name != "digest"} | {
            "noise_multiplier": 40.0
        }
        plan = Plan.from_json(json.dumps(fields))
        report["plan"] = json.loads(plan.to_json()) | {"digest": plan.digest()}
        report["software"]["settings_hash"] = ""
        for client in report["clients"]:
            client["proof"]["commit"] = {"v": 1}
        history, delta = Event.all_of_schedule(plan), plan.delta
        report["prices"]["pld"] = pld_epsilon(history, delta)
        report["prices"]["pld_replace_one"] = pld_epsilon(history, delta, Adjacency.REPLACE_ONE)
        claim(report, report["prices"]["pld"], report["prices"]["pld_replace_one"])

    rewrite(run, forge)
    for places in ([run], [run / "report.json"], [run / "report.json", run / "receipts.jsonl"]):
        assert {"commitments", "headline"} <= {check.name for check in failures(*places)}


def test_g3_other_runs_cannot_be_denied_to_quote_one_schedule(tmp_path: Path) -> None:
    """The number of runs is the operator's word; what the clients signed does not fit one schedule."""
    keys = SMALL | {"ledgers": str(tmp_path / "shared"), "rounds": 2, "retries": 4, "epsilon": 12.0}
    simulate(Scenario.layered(None, keys), out=tmp_path / "first", observer=Quiet())
    del keys["epsilon"]
    later = Scenario.layered(None, keys | {"rounds": 1, "retries": 3, "noise-multiplier": 6.0})
    simulate(later, out=tmp_path / "second", observer=Quiet())
    assert failures(tmp_path / "second") == []

    def deny(report: dict[str, Any]) -> None:
        for client in report["clients"]:
            client["runs"] = 1
        claim(report, report["prices"]["pld"], report["prices"]["pld_replace_one"])

    rewrite(tmp_path / "second", deny)
    assert "headline" in {check.name for check in failures(tmp_path / "second")}


def test_g14_a_receipt_left_out_of_the_report_still_speaks_from_the_receipts_file(run: Path) -> None:
    def silence(report: dict[str, Any]) -> None:
        for client in report["clients"]:
            client.update(runs=2, verdict="ledger only", spent_epsilon=0.2, history=[])
            for name in ("receipt", "peer", "countersignature"):
                client["proof"].pop(name)
        claim(report, 0.2, 0.4)

    rewrite(run, silence)
    assert "client receipts" in {check.name for check in failures(run / "report.json", run / "receipts.jsonl")}


def test_g2_a_raise_that_is_hidden_contradicts_the_signed_grant(run: Path) -> None:
    from simulations.evidence import render as render_run

    with Book(run / "ledgers") as book:
        book.set_budget("client-00001", 9.0, may_raise=True)
    render_run(run)
    assert failures(run / "report.json") == []

    def hide(report: dict[str, Any]) -> None:
        report["clients"][1]["budget_changes"] = []

    rewrite(run, hide)
    # Without the ledger: the grant and the figure that the report itself prints do not fit.
    assert "client receipts" in {check.name for check in failures(run / "report.json")}


@pytest.mark.parametrize("lie", LIES)
def test_g14_an_operator_that_signs_a_lie_is_found(run: Path, lie: str) -> None:
    change, name = LIES[lie]
    rewrite(run, change)
    names = [check.name for check in failures(run)]
    # A shorter history hides nothing: the spend is in the receipt.
    assert name in names if name != "none" else names == []
    assert "report signature" not in names


@pytest.mark.parametrize("lie", ["headline", "headline and price", "plan", "history made smaller"])
def test_g14_planted_verifier_that_checks_signatures_alone_believes_it(
    run: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(run, LIES[lie][0])
    monkeypatch.setattr(verify_module, "_QUESTIONS", (verify_module._identity, verify_module._page))
    assert failures(run) == []


def test_a_report_signed_by_somebody_else_is_found_against_its_receipts(run: Path, tmp_path: Path) -> None:
    other = Secret.load_or_create(tmp_path / "other.key").identity("server")
    signed = sign(report_of(run), other)
    (run / "report.json").write_text(to_json(signed))
    (run / "report.html").write_text(render(signed))
    assert {check.name for check in failures(run)} == {"client receipts", "countersignatures"}


def test_an_unsigned_report_is_not_called_signed(run: Path) -> None:
    report = report_of(run) | {"signature": None}
    (run / "report.json").write_text(to_json(report))
    assert failures(run / "report.json") == []
    assert answers(run / "report.json")["report signature"] is Result.OPEN


def test_g6_an_unknown_figure_claims_nothing_and_does_not_fail(run: Path) -> None:
    from simulations.evidence import render as render_run

    lines = (run / "receipts.jsonl").read_text().splitlines(keepends=True)
    (run / "receipts.jsonl").write_text("".join(lines[:-1]))
    render_run(run)
    assert report_of(run)["headline"]["epsilon"] == "unknown"
    assert failures(run) == []


# -- ledgers against receipts ----------------------------------------------------------------


def ledger_lines(run: Path) -> list[bytes]:
    return (run / "ledgers/ledger.jsonl").read_bytes()[:-1].split(b"\n")


def keep_lines(run: Path, lines: list[bytes]) -> None:
    (run / "ledgers/ledger.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    remark(run / "ledgers")


def roll_back(run: Path) -> None:
    keep_lines(run, ledger_lines(run)[:-CLIENTS])


def fork(run: Path) -> None:
    roll_back(run)
    plan = Plan.from_json(canonical({k: v for k, v in report_of(run)["plan"].items() if k != "digest"}))
    with Book(run / "ledgers") as book:
        requests = [make_request(ROUNDS, plan, name=name, job=report_of(run)["run"]["job"]) for name in book.accounts]
        assert all(isinstance(outcome, Receipt) for outcome in book.charge(requests))


def sign_again(run: Path) -> None:
    def noisier(entry: dict[str, Any]) -> None:
        if entry["kind"] in ("commit", "charge"):
            entry["body"]["event"]["noise_multiplier"] = 99.0

    keep_lines(run, rechain(ledger_lines(run), noisier, run / "ledgers/ledger.key")[:-1].split(b"\n"))


@pytest.mark.parametrize("act", [roll_back, fork, sign_again])
def test_g14_a_ledger_that_was_rolled_back_forked_or_signed_again_is_found_against_receipts(
    run: Path, act: Callable[[Path], None]
) -> None:
    act(run)
    names = {check.name for check in failures(run / "receipts.jsonl", run / "ledgers")}
    assert "receipts and ledgers" in names
    assert "receipts and ledgers" in {check.name for check in failures(run)}


@pytest.mark.parametrize("act", [roll_back, fork])
def test_g14_without_a_receipt_the_answer_is_not_detectable(run: Path, act: Callable[[Path], None]) -> None:
    act(run)
    assert failures(run / "ledgers") == []
    assert answers(run / "ledgers")["rollback"] is Result.OPEN


def test_g14_planted_verifier_that_only_looks_whether_a_number_exists_misses_a_fork(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork(run)
    questions = tuple(q for q in verify_module._QUESTIONS if q is not verify_module._ledgers)
    monkeypatch.setattr(verify_module, "_QUESTIONS", questions)
    assert failures(run / "receipts.jsonl", run / "ledgers") == []


def test_two_states_of_one_ledger_agree_and_two_forks_do_not(run: Path, tmp_path: Path) -> None:
    whole = shutil.copy(run / "ledgers/ledger.jsonl", tmp_path / "whole.jsonl")
    roll_back(run)
    assert failures(Path(whole), run / "ledgers") == []
    fork(run)
    assert "ledgers agree" in {check.name for check in failures(Path(whole), run / "ledgers")}


def test_g14_a_holder_whom_the_operator_left_out_can_show_it(run: Path) -> None:
    def leave_out(report: dict[str, Any]) -> None:
        report["clients"].pop()

    rewrite(run, leave_out)
    assert "report and ledgers" in {check.name for check in failures(run / "report.json", run / "ledgers")}


def test_g2_a_raised_budget_that_a_report_hides_is_found_beside_the_ledger(run: Path) -> None:
    from simulations.evidence import render as render_run

    with Book(run / "ledgers") as book:
        book.set_budget("client-00001", 9.0, may_raise=True)
    render_run(run)
    assert failures(run) == []

    def hide(report: dict[str, Any]) -> None:
        report["clients"][1]["budget_changes"] = []

    rewrite(run, hide)
    assert {check.name for check in failures(run)} == {"client receipts", "report and ledgers"}


def test_g4_a_figure_for_fewer_data_sets_than_the_holders_signed_is_found(tmp_path: Path) -> None:
    simulate(Scenario.layered(None, SMALL | {"multiplicity": 2}), out=tmp_path / "run", observer=Quiet())
    assert failures(tmp_path / "run") == []

    def in_one(report: dict[str, Any]) -> None:
        report["headline"]["federation"]["multiplicity"] = 1

    rewrite(tmp_path / "run", in_one)
    assert "persons in several data sets" in {check.name for check in failures(tmp_path / "run")}


def test_g16_every_adversary_of_a_client_level_run_keeps_its_figure(tmp_path: Path) -> None:
    keys = {"unit": "client", "clients": 8, "client-rate": 0.5, "rounds": 2, "steps-per-round": 1}
    simulate(Scenario.layered(None, keys), out=tmp_path / "run", observer=Quiet())
    assert failures(tmp_path / "run") == []
    report = report_of(tmp_path / "run")
    places = [("adversaries", row) for row, entry in enumerate(report["adversaries"]) if "epsilon" in entry]
    for *path, found in [(*place, "adversaries") for place in places] + [
        ("headline", "adversaries", 1, "adversaries"),
        ("headline", "person", 1, "adversaries"),
        ("headline", "person", 3, "sums and remainders"),
    ]:
        with contextlib.ExitStack() as undo:
            before = (tmp_path / "run/report.json").read_bytes()
            undo.callback(lambda before=before: (tmp_path / "run/report.json").write_bytes(before))
            rewrite(tmp_path / "run", set_in(*path, "epsilon", value=0.1))
            assert found in {check.name for check in failures(tmp_path / "run")}, path


def test_receipts_that_contradict_each_other_are_found(run: Path, tmp_path: Path) -> None:
    """Two servers each hold a receipt for the same place of one account's chain."""
    fork(run)
    with Book(run / "ledgers") as book:
        book.charge(
            [make_request(9, make_plan(noise_multiplier=60.0), name=name, job="cd" * 16) for name in book.accounts]
        )
    server = Secret.load_or_create(tmp_path / "other.key").identity("server")
    from privacy.transcript import read_ledger
    from server.app import countersign

    receipts = [line.receipt for line in read_ledger(run / "ledgers").lines[-2 * CLIENTS :] if line.receipt]
    (tmp_path / "theirs.jsonl").write_text("".join(countersign(server, receipt) + "\n" for receipt in receipts))
    assert failures(tmp_path / "theirs.jsonl") == []
    names = {check.name for check in failures(run / "receipts.jsonl", tmp_path / "theirs.jsonl")}
    assert "receipts agree" in names


@pytest.mark.parametrize("how", ["cut", "torn", "empty"])
def test_a_receipts_file_that_was_shortened_is_found(run: Path, how: str) -> None:
    path = run / "receipts.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + {"cut": "", "torn": lines[-1][:-9]}.get(how, "") if how != "empty" else "")
    assert failures(run)
