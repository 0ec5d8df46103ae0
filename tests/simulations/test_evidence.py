"""What a run's files prove: a headline is tied to what the ledgers committed to and to the receipts of what arrived."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

import server.app
from privacy.accounting import Event, Grant, best_order, rdp
from privacy.dpsgd import PrivateTrainer
from privacy.errors import LedgerError, RunError
from privacy.identity import Secret
from privacy.ledger import Account, Book, Receipt
from privacy.report import Verdict, build
from simulations import evidence
from simulations.evidence import composed_epsilon, facts_of, prices_of, render
from simulations.run import simulate
from simulations.scenario import Scenario
from simulations.world import World
from tests.oracles import remark

CLIENTS, ROUNDS = 4, 3
SMALL = {"clients": CLIENTS, "rounds": ROUNDS, "steps-per-round": 1, "mode": "hooks", "seed": 5}


class Quiet:
    """Watches nothing."""

    def __getattr__(self, name):
        return lambda *_: None


def go(folder, **keys):
    scenario = Scenario.layered(None, SMALL | {key.replace("_", "-"): value for key, value in keys.items()})
    return simulate(scenario, out=folder, observer=Quiet())


def resume(folder):
    return simulate(Scenario.from_run(folder), resume=folder, observer=Quiet())


def report_of(folder):
    render(folder)
    return json.loads((folder / "report.json").read_text())


def facts(folder):
    return facts_of(World.open(folder))


def edit(path, change):
    """Changes a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def drop_lines(path, keep):
    """Keeps the lines of a file whose number, from 0, passes."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for number, line in enumerate(lines) if keep(number)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence") / "run"
    go(folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def require_unknown(folder, reason):
    report = report_of(folder)
    headline = report["headline"]
    assert headline["epsilon"] == headline["replace_one"]["epsilon"] == "unknown"
    assert any(reason in text for text in headline["reasons"]), headline["reasons"]
    assert report["budget"]["largest_spent"] == "unknown"


# -- a sound run ----------------------------------------------------------------------------------------------------


def test_an_untouched_run_is_verified_and_priced_as_committed(run):
    report, found = report_of(run), facts(run)
    assert report["headline"]["epsilon"] == pytest.approx(found.prices.pld)
    assert {client.verdict for client in found.clients} == {Verdict.VERIFIED}
    assert {(client.receipts_missing, client.undelivered, client.other_runs) for client in found.clients} == {(0, 0, 0)}
    assert (found.committed, list(found.doubts)) == (True, [])


def test_what_a_crash_tore_off_behind_the_last_checkpoint_is_no_damage(run):
    for name in ("receipts.jsonl", "metrics.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"half of')
    assert isinstance(report_of(run)["headline"]["epsilon"], float)


def test_a_damaged_log_of_rounds_is_told_in_a_sentence(run):
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace('"replies"', '"replied"'))
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        render(run)


def test_no_path_of_this_machine_is_printed(tmp_path):
    go(tmp_path / "run", ledgers=str(tmp_path / "shared"), rounds=1)
    report = report_of(tmp_path / "run")
    assert report["config"]["ledgers"] == "shared"
    assert report["run"]["covers"] == "all runs in shared"
    for name in ("report.json", "report.html"):
        assert str(tmp_path) not in (tmp_path / "run" / name).read_text()


# -- G3: the tight figure is only for what every ledger committed to --------------------------------------------------


def spend_of_another_job(tmp_path):
    """Two jobs ask half of the clients each; the first spends nearly everything, the second little."""
    keys = {"clients": 10, "cohort": 5, "retries": 0, "ledgers": str(tmp_path / "shared")}
    go(tmp_path / "dear", rounds=1, **keys)
    go(tmp_path / "cheap", rounds=2, **keys | {"epsilon": 0.5})
    report, found = report_of(tmp_path / "cheap"), facts(tmp_path / "cheap")
    with Book(tmp_path / "shared") as book:
        dearest = max(account.spent for account in book.accounts.values())
    assert dearest > 2.9
    # The case at hand: an account that has one job, and it is not this one.
    assert any(client.runs == 1 and not client.rounds_joined for client in found.clients)
    assert report["headline"]["epsilon"] == pytest.approx(dearest)


def test_g3_spend_of_another_job_in_the_same_ledgers_is_in_the_headline(tmp_path):
    spend_of_another_job(tmp_path)
    found = facts(tmp_path / "cheap")
    verdicts = {client.verdict: client.rounds_joined for client in found.clients}
    # No receipt of this run covers what the other one spent, and none is claimed to.
    assert verdicts[Verdict.LEDGER] == 0
    assert verdicts[Verdict.VERIFIED] > 0


def test_g3_planted_bug_taking_any_single_run_for_this_one_hides_the_other_jobs_spend(tmp_path, monkeypatch):
    spend = evidence._spend
    monkeypatch.setattr(
        evidence, "_spend", lambda *args: replace(found := spend(*args), other_runs=max(0, found.runs - 1))
    )
    with pytest.raises(AssertionError):
        spend_of_another_job(tmp_path)


EDITS = {
    "more noise": lambda plan: plan.update(noise_multiplier=10 * plan["noise_multiplier"]),
    "fewer joins": lambda plan: plan.update(joins=ROUNDS),
    "a smaller rate": lambda plan: plan.update(sample_rate=plan["sample_rate"] / 10),
    "a larger delta": lambda plan: plan.update(delta=2e-5),
}


@pytest.mark.parametrize("name", EDITS)
def test_g3_an_edited_plan_is_not_believed(run, name):
    edit(run / "job.json", lambda job: EDITS[name](job["plan"]))
    require_unknown(run, "another plan")
    assert report_of(run)["prices"]["pld"] == "unknown"


def test_g3_planted_bug_a_report_that_believes_the_job_file_prints_a_figure(run, monkeypatch):
    monkeypatch.setattr(evidence, "_as_committed", lambda *_: True)
    with pytest.raises(AssertionError):
        test_g3_an_edited_plan_is_not_believed(run, "more noise")
    assert report_of(run)["headline"]["epsilon"] < 0.5


def test_g3_charges_of_another_price_than_committed_are_found(run):
    world = World.open(run)
    account = next(iter(world.book.accounts.values()))
    assert evidence._as_committed(account, world.settled.id, world.settled.plan)
    account.spent_rdp *= 1.5
    assert not evidence._as_committed(account, world.settled.id, world.settled.plan)


def test_g3_the_filters_price_of_a_schedule_is_never_taken_at_a_larger_delta_than_the_plans(run):
    settled = World.open(run).settled
    event = Event.of_schedule(settled.plan)
    order, best = best_order(event, settled.plan.delta)

    def gate(*grants):
        accounts = {str(number): SimpleNamespace(grant=grant) for number, grant in enumerate(grants)}
        return prices_of(settled.plan, [account.grant for account in accounts.values()]).gate

    own = Grant(epsilon=30.0, delta=settled.plan.delta, order=order, records_bound=100)
    assert gate(own) == pytest.approx(best)
    assert gate(own, replace(own, order=2.0)) > best
    loose = replace(own, delta=1e-3)
    assert loose.epsilon_of(rdp(event, order)) < best
    assert gate(loose) == pytest.approx(best)


# -- G6 and G14: what is missing or contradicted is unknown -----------------------------------------------------------


def test_g14_deleted_receipts_make_the_figure_unknown(run):
    (run / "receipts.jsonl").unlink()
    require_unknown(run, "than there are receipts")
    assert {client["receipts_missing"] for client in report_of(run)["clients"]} == {ROUNDS}
    assert {client["verdict"] for client in report_of(run)["clients"]} == {"unknown"}


def test_g14_one_missing_receipt_names_the_client_that_lacks_it(run):
    drop_lines(run / "receipts.jsonl", lambda number: number != 5)
    require_unknown(run, "In 1 rounds")
    assert sorted(client["receipts_missing"] for client in report_of(run)["clients"]) == [0, 0, 0, 1]


def test_g14_a_repeated_receipt_does_not_stand_in_for_a_missing_one(run):
    drop_lines(run / "receipts.jsonl", lambda number: number != 5)
    lines = (run / "receipts.jsonl").read_text().splitlines(keepends=True)
    (run / "receipts.jsonl").write_text("".join([*lines, lines[4]]))
    require_unknown(run, "In 1 rounds")


def test_g14_receipts_and_rounds_deleted_together_are_missed_by_the_checkpoint(run):
    (run / "receipts.jsonl").unlink()
    (run / "metrics.jsonl").unlink()
    require_unknown(run, f"The checkpoint knows of {ROUNDS * CLIENTS} receipts, 0 are here")


@pytest.mark.parametrize(
    ("blind", "test"),
    [
        ("_lost", test_g14_one_missing_receipt_names_the_client_that_lacks_it),
        ("_doubts", test_g14_receipts_and_rounds_deleted_together_are_missed_by_the_checkpoint),
    ],
)
def test_g14_planted_bug_a_report_that_counts_no_receipts_calls_the_run_proven(run, monkeypatch, blind, test):
    empty = {"_lost": set(), "_doubts": []}[blind]
    doubts = evidence._doubts
    monkeypatch.setattr(evidence, blind, lambda *_: empty)
    if blind == "_lost":
        monkeypatch.setattr(evidence, "_doubts", lambda *args: [t for t in doubts(*args) if "checkpoint" not in t])
    with pytest.raises(AssertionError):
        test(run)
    assert isinstance(report_of(run)["headline"]["epsilon"], float)


def ledgers_deleted_between_runs(tmp_path):
    keys = {"ledgers": str(tmp_path / "shared"), "rounds": 2}
    go(tmp_path / "first", **keys)
    shutil.rmtree(tmp_path / "shared")
    go(tmp_path / "second", **keys)
    require_unknown(tmp_path / "first", "ledgers are gone")
    # The second run's own receipts are in order; nothing in its folder can know of the first.
    assert isinstance(report_of(tmp_path / "second")["headline"]["epsilon"], float)


def test_g14_a_receipt_of_an_account_that_no_ledger_has_makes_the_figure_unknown(tmp_path):
    ledgers_deleted_between_runs(tmp_path)


def test_g14_planted_bug_passing_over_receipts_of_unknown_accounts_goes_unnoticed(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "_doubts", lambda *_: [])
    with pytest.raises(AssertionError):
        ledgers_deleted_between_runs(tmp_path)


@pytest.mark.parametrize("keep", ["grants alone", "one round"])
def test_g14_a_ledger_that_was_rolled_back_contradicts_its_receipts(run, keep):
    # Grants come first, then a commitment and a charge each; both files are rolled back together.
    lines = CLIENTS if keep == "grants alone" else 3 * CLIENTS
    drop_lines(run / "ledgers/ledger.jsonl", lambda number: number < lines)
    remark(run / "ledgers")
    require_unknown(run, "contradict each other")
    assert {client["verdict"] for client in report_of(run)["clients"]} == {"unknown"}


@pytest.mark.parametrize("name", ["job.json", "checkpoint"])
def test_g14_files_of_two_jobs_are_not_taken_for_one(run, tmp_path, name):
    if name == "job.json":
        edit(run / "job.json", lambda job: job.update(id="0" * 32))
    else:
        go(tmp_path / "other")
        shutil.copy(tmp_path / "other/checkpoints/latest.ckpt", run / "checkpoints/latest.ckpt")
    require_unknown(run, "another job")


def test_g14_receipts_must_be_countersigned_by_this_runs_own_server(run, tmp_path):
    go(tmp_path / "other", rounds=1)
    shutil.copy(tmp_path / "other/server.key", run / "server.key")
    with pytest.raises(LedgerError, match="own server"):
        render(run)


def test_g14_a_missing_server_key_is_told_and_never_made_anew(run):
    (run / "server.key").unlink()
    with pytest.raises(LedgerError, match=r"server\.key"):
        render(run)
    assert not (run / "server.key").exists()


# -- charges whose update never arrived -------------------------------------------------------------------------------


def fail_once(monkeypatch, at):
    """Makes one training call fail, after its charge."""
    calls, train = [0], PrivateTrainer.train

    def flaky(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            raise RuntimeError("a client that is gone")
        return train(*args, **kwargs)

    monkeypatch.setattr(PrivateTrainer, "train", flaky)


@pytest.mark.parametrize(
    ("at", "verdict"),
    [(1, Verdict.VERIFIED), (CLIENTS * ROUNDS, Verdict.LEDGER)],
    ids=["before a later receipt", "at the end"],
)
def test_a_charge_whose_update_never_arrived_is_spent_and_counted(tmp_path, monkeypatch, at, verdict):
    fail_once(monkeypatch, at)
    go(tmp_path / "run")
    found = facts(tmp_path / "run")
    assert sorted(client.undelivered for client in found.clients) == [0] * (CLIENTS - 1) + [1]
    odd = next(client for client in found.clients if client.undelivered)
    assert (odd.verdict, odd.receipts_missing, odd.rounds_joined, odd.charges) == (verdict, 0, ROUNDS - 1, ROUNDS)
    assert odd.spent_epsilon == max(client.spent_epsilon for client in found.clients)
    assert report_of(tmp_path / "run")["headline"]["epsilon"] == pytest.approx(found.prices.pld)


@pytest.mark.parametrize("kept", [True, False], ids=["kept releases are sent again", "kept releases are lost"])
def test_a_run_that_died_in_mid_round_has_a_finite_figure_before_and_after_it_is_resumed(tmp_path, monkeypatch, kept):
    evaluate = server.app.evaluate
    calls = [0]

    def dies(*args):
        calls[0] += 1
        if calls[0] == 2:
            raise OSError("the server's machine is gone")
        return evaluate(*args)

    monkeypatch.setattr(server.app, "evaluate", dies)
    with pytest.raises(OSError, match="gone"):
        go(tmp_path / "run", retries=3)
    before = facts(tmp_path / "run")
    assert {(client.undelivered, client.verdict) for client in before.clients} == {(1, Verdict.LEDGER)}
    assert isinstance(report_of(tmp_path / "run")["headline"]["epsilon"], float)
    if not kept:
        shutil.rmtree(tmp_path / "run/kept")
    resume(tmp_path / "run")
    after = facts(tmp_path / "run")
    assert {(client.undelivered, client.verdict) for client in after.clients} == {(int(not kept), Verdict.VERIFIED)}
    assert {client.charges for client in after.clients} == {ROUNDS + int(not kept)}
    assert isinstance(report_of(tmp_path / "run")["headline"]["epsilon"], float)


def test_a_client_that_was_never_charged_is_not_in_the_report(tmp_path):
    go(tmp_path / "run", cohort=2, rounds=1)
    assert len(facts(tmp_path / "run").clients) == 2


# -- G4: one person in several data sets ------------------------------------------------------------------------------


def an_account(spent_rdp, *, order=8.0, delta=1e-5):
    grant = Grant(epsilon=30.0, delta=delta, order=order, records_bound=100)
    return Account(identity="0" * 32, name="a", grant=grant, population="", spent_rdp=spent_rdp, charges=1)


def test_g4_a_multiplicity_edited_after_the_fact_is_not_believed(tmp_path):
    go(tmp_path / "run", multiplicity=2)
    assert isinstance(report_of(tmp_path / "run")["headline"]["epsilon"], float)
    edit(tmp_path / "run/config.json", lambda config: config.update(multiplicity=1))
    require_unknown(tmp_path / "run", "multiplicity")


def test_g4_equal_orders_compose_by_adding_the_largest_divergences():
    accounts = [an_account(1.0), an_account(3.0), an_account(2.0)]
    assert composed_epsilon(accounts, 2, 1e-5) == pytest.approx(accounts[0].grant.epsilon_of(5.0))
    assert composed_epsilon(accounts, 1, 1e-5) is None
    assert composed_epsilon([], 2, 1e-5) is None


@pytest.mark.parametrize(
    "other", [an_account(1.0, order=2.0), an_account(1.0, delta=1e-6)], ids=["another order", "another delta"]
)
def test_g4_ledgers_that_count_differently_are_not_added_up(other):
    assert composed_epsilon([an_account(1.0), other], 2, 1e-5) is None
    # What adding them up regardless would print depends on which account comes first: no bound at all.
    naive = {first.grant.epsilon_of(2.0) for first in (an_account(1.0), other)}
    assert max(naive) - min(naive) > 0.1


def test_g4_ledgers_at_another_delta_than_the_plans_are_not_added_up():
    assert composed_epsilon([an_account(1.0), an_account(1.0)], 2, 1e-6) is None


def test_g4_a_composition_that_is_refused_makes_the_headline_unknown(tmp_path):
    run = tmp_path / "run"
    go(run, multiplicity=2)
    assert math.isfinite(report_of(run)["headline"]["epsilon"])
    world = World.open(run)
    account = next(iter(world.book.accounts.values()))
    account.grant = replace(account.grant, order=account.grant.order + 1)
    headline = build(facts_of(world))["headline"]
    assert headline["epsilon"] == "unknown"
    assert any("one order" in reason for reason in headline["reasons"])


# -- what a report is signed with and checked by ----------------------------------------------------------------------


def test_a_report_is_signed_by_the_runs_server_and_carries_what_each_client_signed(run):
    report = report_of(run)
    key = Secret.load_or_create(run / "server.key").identity("server").public_key
    assert report["signature"]["public_key"] == key
    assert report["evidence"]["receipts"]["lines"] == ROUNDS * CLIENTS
    for client in report["clients"]:
        receipt = Receipt.from_json(client["proof"]["receipt"])
        assert (receipt.spent, receipt.head) == (client["spent_epsilon"], client["ledger_head"])
        assert client["proof"]["peer"] == key
        terms = client["proof"]["commit"]["body"]
        assert (terms["code"], terms["sampling"]) == (
            report["software"]["code_hash"],
            "poisson, secret coins, keystream",
        )
        assert terms["settings"] == report["software"]["settings_hash"]


def test_an_audit_in_the_run_folder_is_quoted_and_a_damaged_one_is_told(run):
    found = {"code_hash": World.open(run).settled.code, "holds": True, "date": "2026-01-01"}
    (run / "audit.json").write_text(json.dumps(found))
    assert report_of(run)["empirical"]["audit"] == found | {"bounds": []}
    (run / "audit.json").write_text("[")
    with pytest.raises(RunError, match="audit"):
        render(run)


def test_g2_a_holder_that_raises_its_budget_is_named_in_the_report(run):
    with Book(run / "ledgers") as book:
        book.set_budget("client-00001", 9.0, may_raise=True)
    report = report_of(run)
    assert any("client-00001 was raised" in warning for warning in report["warnings"])
    assert report["clients"][1]["granted_epsilon"] == 9.0
    # The last receipt does not cover the new budget: the ledger alone tells it.
    assert report["clients"][1]["verdict"] == "ledger only"
