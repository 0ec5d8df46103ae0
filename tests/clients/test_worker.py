"""The worker: what it answers to a server that says anything, and that nothing of it depends on its data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from clients import worker as module
from clients.jobs import Decision, Policy
from clients.post import LOST, Letter
from clients.records import Records
from clients.worker import PAPERS, REPLY, ROUND, TERMS, WORD, Worker
from privacy.accounting import Grant
from privacy.errors import PlanError, RunError
from privacy.ledger import Receipt, Word, require_signed_entry
from privacy.plan import Local, Metric, Metrics
from privacy.seal import MOST_BYTES, Opened, ServerEpoch, sealed_bytes
from privacy.terms import Terms
from privacy.wire import Floats, pack, unpack
from tests.clients.test_jobs import charged
from tests.test_sealed_federation import ALL, BUNDLE, SERVER, SHAPE, TASK, make_plan, make_terms, make_worker

METRICS = Metrics(words=(Metric.ACCURACY, Metric.LOSS), noise=20.0, loss_bound=5.0)
MEASURED = dataclasses.replace(make_plan(3)[0], noise_multiplier=9.0, metrics=METRICS)
MEASURING = dataclasses.replace(ALL, metrics=frozenset(METRICS.words))


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


class Server:
    """A server application that says what a test wants it to say, in a session of its own with one worker."""

    def __init__(self, worker: Worker, terms: Terms, run: int = 7) -> None:
        self.worker, self.terms, self.run = worker, terms, run
        self.epoch = ServerEpoch(SERVER, job=terms.job, run=run, bundle=BUNDLE, terms=terms.digest())
        key = worker._identity.public_key
        offer = bytes(worker.answer(Letter(run, BUNDLE, {"hello": self.epoch.hello(key)}))["offer"])
        self.session, self.accept = self.epoch.accept(key, offer)
        self.last: dict[str, Any] = {}

    def say(self, kind: str, number: int, *body: Any, **pieces: bytes) -> Opened | None:
        """Says something; returns what was answered, or None where that was the word for nothing."""
        pieces = {"accept": self.accept, "message": bytes(self.session.seal(kind, number, *body))} | pieces
        self.last = self.worker.answer(Letter(self.run, BUNDLE, pieces))
        if set(self.last) == {LOST}:
            return None
        assert set(self.last) == {"message"}
        return self.session.read(bytes(self.last["message"]))

    def agree(self) -> str:
        opened = self.say(TERMS, 0, self.terms.to_json().encode())
        assert opened is not None
        assert opened.kind == WORD
        return bytes(opened.body).decode()

    def round(self, number: int = 1, sealed: int | None = None, arrays: Any = None, **changed: Any) -> dict[str, Any]:
        """Asks for a round; returns the reply's records, or nothing where there was none."""
        job = {
            "job": self.terms.job,
            "round": number,
            "task": self.terms.task,
            "plan": self.terms.plan.to_json(),
            "local": self.terms.local.to_json(),
            "lr": 0.5,
            "seed": self.terms.seed,
            "witness": "",
        } | changed
        shared = {"arrays": model() if arrays is None else arrays}
        opened = self.say(ROUND, number if sealed is None else sealed, *pack({"job": job}, shared))
        if opened is None:
            return {}
        assert (opened.kind, opened.round) == (REPLY, number if sealed is None else sealed)
        packet = unpack(opened.body, max_bytes=MOST_BYTES)
        return {**packet.configs, **packet.arrays}


def model() -> dict[str, Floats]:
    parameters = TASK.fresh(SHAPE, 1).named_parameters()
    return {name: floats(p.detach()) for name, p in parameters}


def floats(tensor: torch.Tensor) -> Floats:
    return Floats(tuple(tensor.shape), tensor.numpy().astype("<f4").tobytes())


def charges(worker: Worker) -> int:
    return worker._holder.book.accounts["mine"].charges


def word_of(reply: dict[str, Any]) -> Word:
    return Word(reply["refusal"]["word"])


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return make_worker(tmp_path / "a", 1)


# -- terms first --------------------------------------------------------------------------------------------------


def test_no_round_and_no_papers_before_terms_in_this_session(worker: Worker) -> None:
    server = Server(worker, make_terms())
    assert server.round() == {}
    assert server.say(PAPERS, 0) is None
    assert charges(worker) == 0
    assert server.agree() == "ready"
    assert "receipt" in server.round()
    # Approved as they are, a new session hears them first all the same.
    later = Server(worker, make_terms(), run=8)
    assert later.round() == {}
    assert later.say(PAPERS, 0) is None
    assert later.agree() == "ready"
    assert "receipt" in later.round(2)
    assert charges(worker) == 2


@pytest.mark.parametrize("decision", [None, Decision.REFUSED])
def test_a_holder_that_did_not_approve_shows_no_papers_and_plays_no_round(
    tmp_path: Path, decision: Decision | None
) -> None:
    worker = make_worker(tmp_path / "a", 1, policy=Policy())
    server = Server(worker, make_terms())
    assert server.agree() == "waiting"
    if decision is not None:
        worker._jobs.decide(server.terms.job, decision)
        assert server.agree() == "refused"
    assert word_of(server.round()) is Word.CONFLICT
    assert server.say(PAPERS, 0) is None
    assert charges(worker) == 0
    # Twin: approved, both are answered.
    worker._jobs.decide(server.terms.job, Decision.APPROVED)
    assert "receipt" in server.round()
    assert server.say(PAPERS, 0) is not None


def test_approved_terms_that_are_withdrawn_end_with_the_next_round(worker: Worker) -> None:
    server = Server(worker, make_terms())
    server.agree()
    released = len(server.last["message"]) and server.round() and len(server.last["message"])
    worker._jobs.decide(server.terms.job, Decision.REFUSED)
    assert word_of(server.round(2)) is Word.CONFLICT
    assert len(server.last["message"]) == released
    # Not even what was released before is said again.
    assert word_of(server.round(1)) is Word.CONFLICT
    assert charges(worker) == 1
    assert server.agree() == "refused"
    # What it signed is not taken back: the report needs it.
    assert server.say(PAPERS, 0) is not None


@pytest.mark.parametrize(
    "changed",
    [
        {"job": "f" * 32},
        {"task": "breast-cancer"},
        {"plan": make_plan(4)[0].to_json()},
        {"local": Local(lr=0.25).to_json()},
        {"seed": 2},
        {"round": 2},
    ],
)
def test_a_round_that_says_anything_else_than_the_terms_and_its_own_seal_is_refused(
    worker: Worker, changed: dict[str, Any]
) -> None:
    server = Server(worker, make_terms())
    server.agree()
    assert word_of(server.round(**changed, sealed=1)) is Word.CONFLICT
    assert charges(worker) == 0
    assert not worker._holder.book.accounts["mine"].jobs
    assert "receipt" in server.round()


def test_another_jobs_round_inside_a_session_is_refused_though_its_holder_approved_that_job_too(worker: Worker) -> None:
    one, other = make_terms(), make_terms(job="f" * 32)
    Server(worker, other).agree()
    server = Server(worker, one)
    assert server.agree() == "ready"
    assert word_of(server.round(job=other.job)) is Word.CONFLICT
    assert charges(worker) == 0


def test_g19_terms_that_the_session_is_not_bound_to_are_lost(worker: Worker) -> None:
    server = Server(worker, make_terms())
    other = make_terms(purpose="another")
    assert server.say(TERMS, 0, other.to_json().encode()) is None
    assert server.say(TERMS, 0, b"{}") is None
    assert server.say(TERMS, 0, b" " * 70_000) is None
    assert worker._jobs.names() == []


# -- papers -----------------------------------------------------------------------------------------------------------


def test_papers_hold_this_accounts_grant_and_budgets_and_this_jobs_commitment_and_nothing_else(
    tmp_path: Path, worker: Worker
) -> None:
    book, terms = worker._holder.book, make_terms()
    other = make_terms(job="e" * 32, plan=dataclasses.replace(make_plan(3)[0], noise_multiplier=60.0))
    book.grant({"theirs": Grant(epsilon=5.0, delta=1e-5, order=8.0, records_bound=10)}, population="mine")
    charged(tmp_path / "a", other, 2)
    book.refresh()
    book.set_budget("mine", 2.95)
    book.set_budget("theirs", 4.5)
    server = Server(worker, terms)
    worker._jobs.offer(terms, book.accounts["mine"], ALL)
    worker._jobs.decide(terms.job, Decision.APPROVED)
    assert server.agree() == "ready"
    before = server.say(PAPERS, 0)
    assert before is not None
    assert set(json.loads(bytes(before.body))) == {"grant", "changes"}
    assert "receipt" in server.round()
    opened = server.say(PAPERS, 0)
    assert opened is not None
    text = bytes(opened.body)
    papers = json.loads(text)
    mine = book.accounts["mine"]
    assert set(papers) == {"grant", "changes", "commit"}
    assert [change["body"]["epsilon"] for change in papers["changes"]] == [2.95]
    entries = [papers["grant"], papers["commit"], *papers["changes"]]
    for entry in entries:
        require_signed_entry(entry, mine.public_key)
        assert entry["account"] == mine.identity
    assert papers["commit"]["body"]["job"] == terms.job
    secrets = [other.job, other.plan.digest(), book.accounts["theirs"].identity, "theirs"]
    for secret in secrets:
        assert secret.encode() not in text
    # Twin: the ledger itself holds all of them, so that the search could have found them.
    assert all(secret.encode() in book.content() for secret in secrets)
    assert other.job in mine.jobs


# -- whatever happens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyError("x"), MemoryError(), RecursionError(), OSError(5, "x")])
def test_whatever_goes_wrong_is_one_word_and_the_worker_goes_on(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    for place, name in ((worker._jobs, "get"), (worker._jobs, "offer"), (worker, "_papers"), (worker, "_policy")):
        server = Server(worker, make_terms())
        if name in ("get", "_papers"):
            server.agree()
        with monkeypatch.context() as patched:
            patched.setattr(place, name, fail)
            answered = server.say(PAPERS, 0) if name == "_papers" else server.say(TERMS, 0, b"{}")
            assert answered is None
            if name in ("offer", "_policy"):
                assert server.say(TERMS, 0, server.terms.to_json().encode()) is None
            if name == "get":
                assert server.round() == {}
        assert worker.last_error
    server = Server(worker, make_terms())
    assert server.agree() == "ready"
    assert "receipt" in server.round()


def test_letters_that_are_no_conversation_are_one_word(worker: Worker) -> None:
    server = Server(worker, make_terms())
    server.agree()
    message = bytes(server.session.seal(ROUND, 1, b"x" * 100))
    for letter in (
        Letter(7, BUNDLE, {}),
        Letter(7, BUNDLE, {"hello": b""}),
        Letter(7, BUNDLE, {"hello": b"x" * 5000}),
        Letter(7, BUNDLE, {"accept": b"x"}),
        Letter(7, BUNDLE, {"message": b""}),
        Letter(7, BUNDLE, {"offer": b"x"}),
        Letter(8, BUNDLE, {"message": message}),
        Letter(7, "d" * 64, {"message": message}),
        Letter(7, BUNDLE, {"message": message, "broadcast": b"x"}),
        Letter(7, BUNDLE, {LOST: b""}),
    ):
        assert worker.answer(letter) == {LOST: b""}
    assert charges(worker) == 0


# -- alike --------------------------------------------------------------------------------------------------------


def broken() -> Records:
    raise OSError("the disk is gone")


def empty() -> Records:
    return Records(torch.zeros((0, *SHAPE.inputs)), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))


def faulty() -> Records:
    return Records(torch.full((40, *SHAPE.inputs), torch.nan), torch.full((40,), 99), torch.ones(40, dtype=torch.bool))


def full_disk(*_: Any) -> None:
    raise RunError("expected to write, got: No space left on device")


Case = Callable[[Server, Worker], None]


def nothing(server: Server, worker: Worker) -> None:
    """A release."""


def no_records(server: Server, worker: Worker) -> None:
    worker._holder = dataclasses.replace(worker._holder, load=empty)


def unreadable(server: Server, worker: Worker) -> None:
    worker._holder = dataclasses.replace(worker._holder, load=broken)


def bad_records(server: Server, worker: Worker) -> None:
    worker._holder = dataclasses.replace(worker._holder, load=faulty)


def disk_full(server: Server, worker: Worker) -> None:
    worker._holder.kept.put = full_disk  # type: ignore[method-assign]


def spent(server: Server, worker: Worker) -> None:
    grant = worker._holder.book.accounts["mine"].grant
    worker._holder.book.set_budget("mine", grant.epsilon - grant.budget_rdp + 1e-9)


def withdrawn(server: Server, worker: Worker) -> None:
    worker._jobs.decide(server.terms.job, Decision.REFUSED)


def no_policy(server: Server, worker: Worker) -> None:
    def damaged() -> Policy:
        raise PlanError("expected a policy, got something else")

    worker._policy = damaged


def no_metrics(server: Server, worker: Worker) -> None:
    worker._policy = lambda: ALL


CASES: list[tuple[Case, Word | None]] = [
    (nothing, None),
    (no_records, None),
    (unreadable, None),
    (bad_records, None),
    (disk_full, Word.UNAVAILABLE),
    (spent, Word.DECLINED),
    (withdrawn, Word.CONFLICT),
    (no_policy, Word.MALFORMED),
    (no_metrics, Word.CONFLICT),
]


@pytest.fixture(params=[None, MEASURED], ids=["updates", "metrics"])
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], tuple[Server, Worker]]:
    """Makes a session with a worker of its own, under a plan with metrics or without."""

    def make(name: str) -> tuple[Server, Worker]:
        worker = make_worker(tmp_path / name, 1, policy=MEASURING)
        terms = make_terms() if request.param is None else make_terms(plan=request.param)
        server = Server(worker, terms)
        worker._jobs.offer(terms, worker._holder.book.accounts["mine"], MEASURING)
        worker._jobs.decide(terms.job, Decision.APPROVED)
        assert server.agree() == "ready"
        return server, worker

    return make


def test_g12_every_answer_to_a_round_is_as_long_as_a_release_whatever_happened(
    servers: Callable[[str], tuple[Server, Worker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lengths(twin: str = "") -> dict[str, int]:
        found = {}
        for case, word in CASES:
            server, worker = servers(case.__name__ + twin)
            if case is no_metrics and server.terms.plan.metrics is None:
                continue
            case(server, worker)
            reply = server.round()
            assert (word_of(reply) if "refusal" in reply else None) is word, case.__name__
            assert (word is None) == (set(reply) >= {"arrays", "receipt"})
            found[case.__name__] = len(server.last["message"])
        return found

    found = lengths()
    assert len(set(found.values())) == 1, found
    monkeypatch.setattr(module, "reply_bytes", lambda *_: 0)
    assert len(set(lengths("-twin").values())) > 1


def test_g12_a_retry_of_a_release_is_as_long_too(servers: Callable[[str], tuple[Server, Worker]]) -> None:
    server, worker = servers("a")
    first = server.round()
    length = len(server.last["message"])
    again = server.round()
    assert len(server.last["message"]) == length
    assert first["receipt"] == again["receipt"]
    assert charges(worker) == 1


def test_g12_a_request_that_no_model_fits_is_answered_at_a_length_that_its_own_bytes_decide(tmp_path: Path) -> None:
    lengths = []
    for load in (empty, faulty):
        worker = make_worker(tmp_path / load.__name__, 1)
        worker._holder = dataclasses.replace(worker._holder, load=load)
        server = Server(worker, make_terms())
        server.agree()
        odd = {"w": floats(torch.zeros(3, 5))}
        assert word_of(server.round(arrays=odd)) is Word.MALFORMED
        lengths.append(len(server.last["message"]))
        assert charges(worker) == 0
    assert lengths[0] == lengths[1]


def test_a_reply_has_room_for_the_longest_receipt(worker: Worker) -> None:
    server = Server(worker, make_terms())
    server.agree()
    reply = server.round()
    assert len(reply["receipt"]["receipt"]) < len(module._MOST_RECEIPT) / 4
    assert Receipt.from_json(reply["receipt"]["receipt"]).charges == 1
    shapes = {name: tuple(array.shape) for name, array in reply["arrays"].items()}
    assert len(server.last["message"]) == sealed_bytes(module.reply_bytes(server.terms.plan, shapes, 10))
