"""Jobs and the policy: what is accepted unasked, what waits, and that no decision is ever lost."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clients import jobs as module
from clients.jobs import Decision, Jobs, Policy
from privacy.accounting import Event, Grant, rdp, solve_noise
from privacy.errors import PlanError, RunError, VaultError
from privacy.ledger import Account, Book, ChargeRequest, Receipt
from privacy.plan import Adjacency, Local, Metric, Metrics, Mode, Plan, Unit, canonical
from privacy.terms import Terms, cost_of
from privacy.vault import private
from privacy.wire import settings_digest

NOISE, ORDER = solve_noise(epsilon=3.0, delta=1e-5, sample_rate=0.2, steps=2 * 5)
PLAN = Plan(
    sample_rate=0.2,
    expected_batch=7.0,
    l2_clip=1.0,
    noise_multiplier=NOISE,
    steps=2,
    rounds=3,
    joins=5,
    epsilon=3.0,
    delta=1e-5,
    records_bound=1000,
    mode=Mode.HOOKS,
)
GRANT = Grant(epsilon=3.0, delta=1e-5, order=ORDER, records_bound=1000)
POLICY = Policy(tasks=frozenset({"digits"}), epsilon=3.0)


def make_terms(number: int = 1, **changed: Any) -> Terms:
    fields: dict[str, Any] = {
        "job": f"{number:032x}",
        "task": "digits",
        "code": "c" * 64,
        "plan": PLAN,
        "local": Local(lr=0.5),
        "seed": 1,
        "inputs": (1, 8, 8),
        "classes": 10,
        "clients": 2,
    }
    return Terms(**fields | changed)


def account(grant: Grant = GRANT, **changed: Any) -> Account:
    return Account(identity="a" * 32, name="mine", grant=grant, population="mine", **changed)


def charged(folder: Path, terms: Terms, times: int) -> Account:
    """Returns an account in a ledger that has paid for some rounds of a job."""
    book = Book(folder / "ledger")
    if "mine" not in book.accounts:
        book.grant({"mine": GRANT}, population="mine")
    for round in range(1, times + 1):
        (paid,) = book.charge(
            [
                ChargeRequest(
                    name="mine",
                    job=terms.job,
                    round=round,
                    request=f"{round:064x}",
                    plan=terms.plan,
                    commitment="",
                    noise="test",
                    witness=None,
                    code="",
                    settings=settings_digest(terms.task, terms.plan.digest(), terms.local.to_json(), terms.seed),
                )
            ]
        )
        assert isinstance(paid, Receipt)
    return book.accounts["mine"]


# -- what a policy covers ---------------------------------------------------------------------------------------------

MEASURED = dataclasses.replace(
    PLAN, noise_multiplier=9.0, metrics=Metrics(words=(Metric.ACCURACY,), noise=20.0, loss_bound=5.0)
)


def test_a_policy_covers_what_it_says() -> None:
    assert POLICY.covers(make_terms(), account())
    measured = dataclasses.replace(POLICY, metrics=frozenset({Metric.ACCURACY}))
    assert measured.covers(make_terms(plan=MEASURED), account())


@pytest.mark.parametrize(
    ("policy", "terms", "granted"),
    [
        (Policy(), {}, 3.0),
        (Policy(tasks=frozenset({"digits"})), {}, 3.0),
        (Policy(epsilon=3.0), {}, 3.0),
        (dataclasses.replace(POLICY, tasks=frozenset({"breast-cancer"})), {}, 3.0),
        (dataclasses.replace(POLICY, epsilon=1.5), {}, 3.0),
        # What the ledger cannot pay in all is for a person to decide.
        (POLICY, {}, 2.5),
        (POLICY, {"plan": dataclasses.replace(PLAN, joins=6)}, 3.0),
        (POLICY, {"plan": MEASURED}, 3.0),
        (dataclasses.replace(POLICY, metrics=frozenset({Metric.LOSS})), {"plan": MEASURED}, 3.0),
    ],
)
def test_g2_a_policy_covers_nothing_else(policy: Policy, terms: dict[str, Any], granted: float) -> None:
    assert not policy.covers(make_terms(**terms), account(dataclasses.replace(GRANT, epsilon=granted)))


def test_g16_a_plan_that_trusts_the_server_is_never_covered_without_the_word_for_it() -> None:
    plan = Plan(
        sample_rate=1.0,
        expected_batch=1.0,
        l2_clip=1.0,
        noise_multiplier=20.0,
        steps=1,
        rounds=3,
        joins=3,
        epsilon=3.0,
        delta=1e-5,
        records_bound=2,
        unit=Unit.CLIENT,
        client_rate=0.5,
        turns=2,
    )
    terms = make_terms(plan=plan)
    trusting = account(Grant(epsilon=3.0, delta=1e-5, order=ORDER, unit=Unit.CLIENT, records_bound=2))
    assert dataclasses.replace(POLICY, central=True).covers(terms, trusting)
    assert not POLICY.covers(terms, trusting)
    # A budget for records pays for no plan of another unit, whatever the policy says.
    assert not dataclasses.replace(POLICY, central=True).covers(terms, account())
    with pytest.raises(PlanError, match="declined"):
        cost_of(terms, account())


def test_g2_a_budget_of_another_adjacency_pays_for_nothing() -> None:
    other = account(dataclasses.replace(GRANT, adjacency=Adjacency.REPLACE_ONE))
    assert not POLICY.covers(make_terms(), other)


def test_what_a_job_costs_is_counted_whole_even_when_most_of_it_is_charged(tmp_path: Path) -> None:
    """A server could otherwise bring a job under the limit by beginning it, where the list of decisions was lost."""
    terms = make_terms()
    mine = charged(tmp_path, terms, 4)
    limit = dataclasses.replace(POLICY, epsilon=2.5)
    assert not limit.covers(terms, mine)
    # Twin: what is left alone would pass.
    left = cost_of(terms, dataclasses.replace(mine, spent_rdp=0.0)).after
    assert left <= 2.5


# -- costs ------------------------------------------------------------------------------------------------------------


def test_a_job_that_has_begun_is_counted_once(tmp_path: Path) -> None:
    terms = make_terms()
    fresh = cost_of(terms, charged(tmp_path, terms, 0))
    assert (fresh.spent, fresh.affordable) == (0.0, True)
    for times in (1, 2):
        mine = charged(tmp_path / str(times), terms, times)
        cost = cost_of(terms, mine)
        assert 0 < cost.spent < cost.after
        assert cost.after == pytest.approx(fresh.after)
        assert cost.affordable
        # Twin: counted from the start again it would be more than the budget.
        twice = mine.grant.epsilon_of(mine.spent_rdp + rdp(Event.all_of_schedule(terms.plan), ORDER))
        assert twice > cost.after
    done = charged(tmp_path / "all", terms, 5)
    assert cost_of(terms, done).after == cost_of(terms, done).spent == pytest.approx(fresh.after)
    # Another job of the same account is counted beside it.
    assert cost_of(make_terms(2), done).after > fresh.after
    assert not cost_of(make_terms(2), done).affordable


# -- decisions --------------------------------------------------------------------------------------------------------


def test_without_a_policy_an_offer_waits_and_a_decision_by_hand_stands(tmp_path: Path) -> None:
    jobs, terms = Jobs(tmp_path / "jobs"), make_terms()
    assert jobs.get(terms.job) is None
    assert jobs.offer(terms, account(), Policy()).decision is Decision.WAITING
    # A policy that was set later covers it; a decision by hand is never changed by one.
    assert jobs.offer(terms, account(), POLICY).by == "policy"
    refused, other = make_terms(2), make_terms(3)
    for each in (refused, other):
        jobs.offer(each, account(), Policy())
    jobs.decide(refused.job, Decision.REFUSED)
    jobs.decide(other.job, Decision.APPROVED)
    assert jobs.offer(refused, account(), POLICY).decision is Decision.REFUSED
    assert jobs.offer(other, account(), Policy()).decision is Decision.APPROVED
    assert {job.terms.job for job in jobs} == {terms.job, refused.job, other.job} == {*jobs.names()}


def test_by_hand_a_person_may_approve_what_the_policy_does_not_cover(tmp_path: Path) -> None:
    jobs, terms = Jobs(tmp_path / "jobs"), make_terms()
    poor = account(dataclasses.replace(GRANT, epsilon=2.0))
    assert jobs.offer(terms, poor, POLICY).decision is Decision.WAITING
    assert jobs.decide(terms.job, Decision.APPROVED).by == "hand"
    assert jobs.offer(terms, poor, POLICY).decision is Decision.APPROVED


def test_withdrawn_stays_withdrawn_until_a_person_says_otherwise(tmp_path: Path) -> None:
    jobs, terms = Jobs(tmp_path / "jobs"), make_terms()
    assert jobs.offer(terms, account(), POLICY).decision is Decision.APPROVED
    assert jobs.decide(terms.job, Decision.REFUSED).decision is Decision.WITHDRAWN
    for _ in range(2):
        assert jobs.offer(terms, account(), POLICY).decision is Decision.WITHDRAWN
        assert jobs.decide(terms.job, Decision.REFUSED).decision is Decision.WITHDRAWN
    assert jobs.decide(terms.job, Decision.APPROVED).decision is Decision.APPROVED


def test_terms_that_changed_for_a_known_job_are_refused(tmp_path: Path) -> None:
    jobs, terms = Jobs(tmp_path / "jobs"), make_terms()
    jobs.offer(terms, account(), POLICY)
    for changed in ({"purpose": "another"}, {"plan": dataclasses.replace(PLAN, noise_multiplier=50.0)}, {"clients": 3}):
        with pytest.raises(PlanError, match="offered first"):
            jobs.offer(dataclasses.replace(terms, **changed), account(), POLICY)
    assert jobs.get(terms.job) == jobs.offer(terms, account(), POLICY)


def test_a_decision_about_a_job_that_was_never_offered_is_refused(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / "jobs")
    with pytest.raises(PlanError, match="offered here"):
        jobs.decide("f" * 32, Decision.APPROVED)
    for name in ("", "../../etc/passwd", "F" * 32, "f" * 31, "f" * 32 + "\n"):
        with pytest.raises(PlanError, match="32 hex digits"):
            jobs.get(name)


def _race(jobs: Jobs, terms: Terms, monkeypatch: pytest.MonkeyPatch) -> Decision:
    """Refuses by hand while an offer that the policy covers is between its reading and its writing."""
    reading, go_on = threading.Event(), threading.Event()
    put, hand = Jobs._put, threading.Thread(target=lambda: jobs.decide(terms.job, Decision.REFUSED))

    def slow(self: Jobs, job: Any) -> Any:
        if job.by == "policy":
            reading.set()
            go_on.wait(0.3)
        return put(self, job)

    monkeypatch.setattr(Jobs, "_put", slow)
    offering = threading.Thread(target=lambda: jobs.offer(terms, account(), POLICY))
    offering.start()
    assert reading.wait(10)
    hand.start()
    hand.join(0.1)
    go_on.set()
    for thread in (offering, hand):
        thread.join(10)
        assert not thread.is_alive()
    monkeypatch.undo()
    found = jobs.get(terms.job)
    assert found is not None
    return found.decision


def test_a_refusal_survives_an_offer_at_the_same_moment_and_a_planted_one_without_the_lock_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = make_terms()
    for folder in ("locked", "planted"):
        Jobs(tmp_path / folder).offer(terms, account(), Policy())
    assert _race(Jobs(tmp_path / "locked"), terms, monkeypatch) is Decision.WITHDRAWN
    monkeypatch.setattr(module.fcntl, "flock", lambda *_: None)
    assert _race(Jobs(tmp_path / "planted"), terms, monkeypatch) is Decision.APPROVED


def test_many_writers_leave_whole_files(tmp_path: Path) -> None:
    terms = make_terms()
    Jobs(tmp_path / "jobs").offer(terms, account(), Policy())

    def decide(decision: Decision) -> None:
        mine = Jobs(tmp_path / "jobs")
        for _ in range(20):
            mine.decide(terms.job, decision)
            assert mine.get(terms.job) is not None

    threads = [threading.Thread(target=decide, args=(d,)) for d in (Decision.APPROVED, Decision.REFUSED) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = Jobs(tmp_path / "jobs").get(terms.job)
    assert found is not None
    assert found.decision in (Decision.APPROVED, Decision.WITHDRAWN)
    assert [path.name for path in (tmp_path / "jobs").iterdir() if path.name.endswith(".new")] == []


# -- bounds and damage ------------------------------------------------------------------------------------------------


def test_a_server_cannot_fill_the_disk_with_offers_whoever_accepts_them(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_MOST_OPEN", 4)
    for policy in (Policy(), POLICY):
        jobs = Jobs(tmp_path / f"jobs-{len(policy.tasks)}")
        for number in range(4):
            jobs.offer(make_terms(number), account(), policy)
        with pytest.raises(PlanError, match="fewer than 4 open offers"):
            jobs.offer(make_terms(99), account(), policy)
        # Those that are known are answered all the same.
        assert jobs.offer(make_terms(0), account(), policy)
        jobs.decide(make_terms(1).job, Decision.REFUSED)
        jobs.offer(make_terms(99), account(), policy)
        with pytest.raises(PlanError):
            jobs.offer(make_terms(100), account(), policy)


def test_a_job_that_was_charged_is_no_open_offer(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_MOST_OPEN", 1)
    jobs, terms = Jobs(tmp_path / "jobs"), make_terms()
    cheap = dataclasses.replace(PLAN, noise_multiplier=50.0)
    jobs.offer(terms, account(), POLICY)
    with pytest.raises(PlanError):
        jobs.offer(make_terms(2, plan=cheap), account(), POLICY)
    assert jobs.offer(make_terms(2, plan=cheap), charged(tmp_path, terms, 1), POLICY)


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"5",
    b"null",
    b"\xff\xfe",
    b"[" * 100_000,
    canonical({"terms": 5, "decision": "approved", "by": "hand", "time": 1}),
    canonical({"terms": "{}", "decision": "approved", "by": "hand", "time": 1}),
    canonical({"terms": make_terms().to_json(), "decision": "maybe", "by": "hand", "time": 1}),
    canonical({"terms": make_terms().to_json(), "decision": "approved", "by": "hand"}),
    json.dumps({"terms": make_terms().to_json(), "decision": "approved", "by": "hand", "time": float("inf")}).encode(),
    # The file of another job, which was approved.
    canonical({"terms": make_terms(2).to_json(), "decision": "approved", "by": "hand", "time": 1}),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_job_is_never_approved_and_hinders_no_other(tmp_path: Path, content: bytes) -> None:
    jobs, terms, other = Jobs(tmp_path / "jobs"), make_terms(), make_terms(3)
    jobs.offer(terms, account(), POLICY)
    (tmp_path / "jobs" / f"{terms.job}.json").write_bytes(content)
    for act in (
        lambda: jobs.get(terms.job),
        lambda: jobs.offer(terms, account(), POLICY),
        lambda: jobs.decide(terms.job, Decision.APPROVED),
        lambda: list(jobs),
    ):
        with pytest.raises(RunError, match="expected a job in"):
            act()
    assert jobs.offer(other, account(), POLICY).decision is Decision.APPROVED
    assert jobs.decide(other.job, Decision.REFUSED).decision is Decision.WITHDRAWN
    assert jobs.names() == [terms.job, other.job]
    assert (tmp_path / "jobs" / f"{terms.job}.json").read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"5",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        canonical({"tasks": "digits", "epsilon": 3.0, "metrics": [], "central": False}),
        canonical({"tasks": ["digits"], "epsilon": True, "metrics": [], "central": False}),
        canonical({"tasks": ["digits"], "epsilon": -1.0, "metrics": [], "central": False}),
        canonical({"tasks": ["digits"], "epsilon": "3", "metrics": [], "central": False}),
        json.dumps({"tasks": ["digits"], "epsilon": float("inf"), "metrics": [], "central": False}).encode(),
        json.dumps({"tasks": ["digits"], "epsilon": float("nan"), "metrics": [], "central": False}).encode(),
        canonical({"tasks": [["digits"]], "epsilon": 3.0, "metrics": [], "central": False}),
        canonical({"tasks": ["digits"], "epsilon": 3.0, "metrics": ["f1"], "central": False}),
        canonical({"tasks": ["digits"], "epsilon": 3.0, "metrics": "loss", "central": False}),
        canonical({"tasks": ["digits"], "epsilon": 3.0, "metrics": [], "central": 1}),
        canonical({"tasks": ["digits"], "epsilon": 3.0, "metrics": [], "central": False, "more": 1}),
    ],
)
def test_a_policy_that_cannot_be_read_accepts_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "policy.json"
    assert Policy.load(path) == Policy()
    path.write_bytes(content)
    with pytest.raises(PlanError, match="expected a"):
        Policy.load(path)
    path.write_bytes(POLICY.to_json())
    assert Policy.load(path) == POLICY
    if os.geteuid():
        path.chmod(0)
        with pytest.raises(PlanError):
            Policy.load(path)


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    jobs, terms = Jobs(tmp_path / "jobs"), make_terms()
    jobs.offer(terms, account(), POLICY)
    assert (tmp_path / "jobs").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "jobs").iterdir())
    found = jobs.get(terms.job)
    assert found is not None
    assert abs(found.time - time.time()) < 60


# -- sealed ----------------------------------------------------------------------------------------------------------


def sealed_jobs(folder: Path) -> Jobs:
    folder.mkdir(mode=0o700, exist_ok=True)
    private.make_ring(folder)
    return Jobs(folder)


def test_jobs_are_sealed_where_a_keyring_is_and_a_decision_cannot_be_put_back(tmp_path: Path) -> None:
    folder, terms, other = tmp_path / "jobs", make_terms(purpose="triage"), make_terms(3)
    jobs = sealed_jobs(folder)
    jobs.offer(terms, account(), Policy())
    jobs.offer(other, account(), Policy())
    jobs.decide(terms.job, Decision.APPROVED)
    assert not [path for path in folder.iterdir() if path.is_file() and b"triage" in path.read_bytes()]
    approved = {path: path.read_bytes() for path in folder.glob("*-*.sealed")}
    jobs.decide(terms.job, Decision.WITHDRAWN)
    assert Jobs(folder).get(terms.job).decision is Decision.WITHDRAWN  # type: ignore[union-attr]
    assert Jobs(folder).names() == sorted((terms.job, other.job))
    # The approval is put back, under its own name and under the name of what came after it.
    (gone,) = [path for path in approved if not path.exists()]
    (newest,) = [path for path in folder.glob("*-*.sealed") if path not in approved]
    gone.write_bytes(approved[gone])
    assert Jobs(folder).get(terms.job).decision is Decision.WITHDRAWN  # type: ignore[union-attr]
    withdrawn = newest.read_bytes()
    newest.write_bytes(approved[gone])
    with pytest.raises(RunError, match="another version"):
        Jobs(folder).get(terms.job)
    newest.write_bytes(withdrawn)
    # Without its keyring the folder is none in clear, where nobody had decided anything.
    ring = folder / private.RING
    ring.rename(tmp_path / "away")
    with pytest.raises(VaultError, match="restore it"):
        Jobs(folder)
    (tmp_path / "away").rename(ring)
    # Two jobs exchanged.
    (others,) = [path for path in folder.glob("*-*.sealed") if path not in (newest, gone)]
    newest.write_bytes(others.read_bytes())
    with pytest.raises(RunError):
        Jobs(folder).get(terms.job)
    # Twin: in clear, as without a keyring, an approval that is put back is an approval.
    plain = Jobs(tmp_path / "plain")
    plain.offer(terms, account(), Policy())
    plain.decide(terms.job, Decision.APPROVED)
    content = (tmp_path / "plain" / f"{terms.job}.json").read_bytes()
    plain.decide(terms.job, Decision.WITHDRAWN)
    (tmp_path / "plain" / f"{terms.job}.json").write_bytes(content)
    assert plain.get(terms.job).decision is Decision.APPROVED  # type: ignore[union-attr]


def test_jobs_in_clear_are_taken_in_once_and_one_that_is_planted_later_is_none(tmp_path: Path) -> None:
    folder, terms, planted = tmp_path / "jobs", make_terms(), make_terms(3)
    before = Jobs(folder)
    before.offer(terms, account(), Policy())
    before.decide(terms.job, Decision.APPROVED)
    before.offer(planted, account(), Policy())
    content = (folder / f"{planted.job}.json").read_bytes()
    jobs = sealed_jobs(folder)
    # Not taken in yet, they are read where they are.
    assert jobs.names() == sorted((terms.job, planted.job))
    jobs.take_in()
    assert not list(folder.glob("*.json"))
    assert jobs.get(terms.job).decision is Decision.APPROVED  # type: ignore[union-attr]
    third = make_terms(5)
    (folder / f"{third.job}.json").write_bytes(content.replace(planted.job.encode(), third.job.encode()))
    Jobs(folder).take_in()
    assert Jobs(folder).get(third.job) is None
    assert Jobs(folder).names() == sorted((terms.job, planted.job))
