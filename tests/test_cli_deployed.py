"""The verbs of a deployment: what they print, what they refuse, and how fast they open. No process is started here."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tacit
from clients.home import ClientHome, Settings
from clients.home import Policy as JoinPolicy
from clients.jobs import Decision, Jobs, Policy
from clients.services import Places
from privacy.enrolment import Address
from privacy.ledger import Book
from privacy.plan import Metric
from tests.clients.test_jobs import GRANT, charged, make_terms
from tests.enrolling import make_home

ROOT = Path(__file__).parents[1]
CLIENT = (
    "start",
    "stop",
    "status",
    "jobs",
    "plan",
    "approve",
    "refuse",
    "policy",
    "worker",
    "tunnel",
    "courier",
)
SERVER = ("start", "stop", "status", "run", "gateway")
HEAVY = "torch,flwr,opacus,ray,sklearn,numpy,scipy,dp_accounting,cryptography,pyarrow,rich,httpx"


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = tacit.main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A client's home that has joined, as far as these verbs look into it."""
    folder = tmp_path / "client"
    made = ClientHome(folder)
    made.make()
    made.save(
        Settings(
            name="hospital-a",
            federation="demo",
            addresses=(Address("127.0.0.1", 29443),),
            enrol=(Address("127.0.0.1", 29444),),
            server="ab" * 32,
            authority="cd" * 32,
            task="digits",
            data="",
            data_set="mine",
            ledger=str(folder / "ledger"),
            policy=JoinPolicy(epsilon=3.0, delta=1e-5, records_bound=1000, allow_metrics=(Metric.LOSS,)),
        )
    )
    with Book(folder / "ledger") as book:
        book.grant({"mine": GRANT}, population="mine")
    return folder


@pytest.fixture
def offered(home: Path) -> Path:
    """As `home`, with two jobs that were offered."""
    account = Book(home / "ledger").accounts["mine"]
    jobs = Jobs(Places(ClientHome(home)).jobs)
    jobs.offer(make_terms(0xA << 124, purpose="triage", curator="A. N. Other"), account, Policy())
    jobs.offer(make_terms(0xB << 124), account, Policy(tasks=frozenset({"digits"}), epsilon=3.0))
    return home


# -- opening --------------------------------------------------------------------------------------------------------


def test_every_page_opens_in_under_a_second_without_the_heavy_libraries() -> None:
    program = (
        "import sys, time, contextlib, io, tacit\n"
        f"pages = [('client', name) for name in {CLIENT}] + [('server', name) for name in {SERVER}]\n"
        "began, codes, texts = time.monotonic(), [], []\n"
        "for page in pages:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as text:\n"
        "        codes.append(tacit.main([*page, '--help']))\n"
        "    texts.append(text.getvalue())\n"
        f"loaded = [name for name in '{HEAVY}'.split(',') if name in sys.modules]\n"
        "print(loaded, set(codes), min(map(len, texts)) > 100, sum('--home' in text for text in texts), len(texts))\n"
    )
    seconds = []
    for _ in range(3):  # The fastest of three: other processes can only slow it down.
        began = os.times()
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
        )
        ended = os.times()
        seconds.append(ended.children_user + ended.children_system - began.children_user - began.children_system)
        assert done.stdout.strip() == "[] {0} True 16 16"
    # All of them together; processor time, because the machine is shared.
    assert min(seconds) < 1.0


@pytest.mark.parametrize("page", [*(("client", name) for name in CLIENT), *(("server", name) for name in SERVER)])
def test_without_a_home_every_verb_is_one_sentence(says: Any, tmp_path: Path, page: tuple[str, str]) -> None:
    job = ["a"] if page[1] in ("plan", "approve", "refuse") else []
    code, out, error = says(*page, *job, "--home", tmp_path / "nowhere", "--json")
    # A courier may not read the home, so it cannot say more than that nobody was started.
    assert (code, out) == ({"courier": 6, "run": code}.get(page[1], 10), "")
    assert error.startswith("tacit: expected ")
    assert error.count("\n") == 1
    assert "unexpected" not in error
    assert not (tmp_path / "nowhere").exists()


# -- the client -----------------------------------------------------------------------------------------------------


def test_plan_says_what_a_job_asks_and_would_cost(says: Any, offered: Path) -> None:
    code, out, _ = says("client", "plan", "a", "--home", offered)
    assert code == 0
    assert "triage" in out
    assert "A. N. Other" in out
    assert "epsilon 0" in out
    assert "of 3" in out
    assert "waiting" in out
    code, out, _ = says("client", "plan", "a", "--home", offered, "--json")
    told = json.loads(out)
    assert (code, out.count("\n")) == (0, 1)
    assert told["cost"]["spent"] == 0
    assert 2.5 < told["cost"]["after"] <= 3.0
    assert told["cost"]["affordable"] is True
    assert (told["decision"], told["by"], told["charged"], told["joins"]) == ("waiting", "", 0, 5)


def test_plan_says_that_a_budget_does_not_hold_a_job_and_counts_what_was_charged_once(says: Any, offered: Path) -> None:
    charged(offered, make_terms(0xB << 124), 2)
    told = json.loads(says("client", "plan", "b", "--home", offered, "--json")[1])
    assert told["charged"] == 2
    assert 0 < told["cost"]["spent"] < told["cost"]["after"] <= 3.0
    # The other job comes on top of it, and does not fit.
    code, out, _ = says("client", "plan", "a", "--home", offered)
    assert code == 0
    assert "later rounds will be declined" in " ".join(out.split())
    assert json.loads(says("client", "plan", "a", "--home", offered, "--json")[1])["cost"]["affordable"] is False


def test_jobs_are_listed_and_decided_by_their_first_digits(says: Any, offered: Path) -> None:
    told = json.loads(says("client", "jobs", "--home", offered, "--json")[1])
    assert {(job["decision"], job["by"]) for job in told["jobs"]} == {("waiting", ""), ("approved", "policy")}
    assert "waiting" in says("client", "jobs", "--home", offered)[1]
    code, out, _ = says("client", "approve", "a0", "--home", offered, "--json")
    assert (code, json.loads(out)) == (0, {"job": f"{0xA << 124:032x}", "decision": "approved"})
    code, out, _ = says("client", "refuse", "b", "--home", offered)
    assert (code, out) == (0, "job b00000000000 is withdrawn\n")
    code, out, _ = says("client", "refuse", "b", "--home", offered, "--json")
    assert json.loads(out)["decision"] == "withdrawn"
    for digits, count in (("", 0), ("c", 0), ("../..", 0)):
        code, out, error = says("client", "approve", digits, "--home", offered)
        assert (code, out) == (2, "")
        assert f"which {count} jobs begin with" in error


def test_a_job_whose_file_is_damaged_keeps_nobody_from_withdrawing_from_another(says: Any, offered: Path) -> None:
    damaged, shelf = f"{0xA << 124:032x}", Jobs(offered / "jobs")._shelf
    assert shelf is not None
    entry = shelf._entries()[damaged]
    shelf._path(entry["object"], entry["generation"]).write_bytes(b"{")
    assert says("client", "refuse", "b", "--home", offered)[0] == 0
    job = Jobs(offered / "jobs").get(f"{0xB << 124:032x}")
    assert job is not None
    assert job.decision is Decision.WITHDRAWN
    for verb in (("approve", "a"), ("plan", "a"), ("jobs",), ("status",)):
        code, out, error = says("client", *verb, "--home", offered)
        assert (code, out) == (6, "")
        assert damaged in error


def test_policy_is_shown_set_and_taken_back(says: Any, home: Path) -> None:
    assert says("client", "policy", "--home", home)[1] == "accepts nothing without asking\n"
    code, out, _ = says("client", "policy", "--accept", "digits", "--epsilon", "0.5", "--home", home, "--json")
    assert (code, json.loads(out)) == (
        0,
        {"accepts": ["digits"], "epsilon": 0.5, "metrics": ["loss"], "central": False},
    )
    assert Policy.load(home / "policy.json") == Policy(tasks=frozenset({"digits"}), epsilon=0.5)
    assert (home / "policy.json").stat().st_mode & 0o777 == 0o600
    assert "epsilon 0.5" in says("client", "policy", "--home", home)[1]
    # One of the two changes alone once both are there.
    assert json.loads(says("client", "policy", "--epsilon", "0.7", "--home", home, "--json")[1])["epsilon"] == 0.7
    assert says("client", "policy", "--nothing", "--home", home)[0] == 0
    assert Policy.load(home / "policy.json") == Policy()


@pytest.mark.parametrize(
    "flags",
    [
        ("--accept", "digits"),
        ("--epsilon", "1"),
        ("--accept", "digits", "--epsilon", "0"),
        ("--accept", "digits", "--epsilon", "nan"),
        ("--accept", "digits", "--epsilon", "inf"),
        ("--accept", "digits", "--epsilon", "-1"),
        ("--accept", "nothing-like-it", "--epsilon", "1"),
        ("--nothing", "--accept", "digits", "--epsilon", "1"),
        ("--nothing", "--epsilon", "1"),
    ],
)
def test_a_policy_that_cannot_be_meant_changes_nothing(says: Any, home: Path, flags: tuple[str, ...]) -> None:
    code, out, error = says("client", "policy", *flags, "--home", home)
    assert (code, out) == (2, "")
    assert error.startswith("tacit: expected ")
    assert not (home / "policy.json").exists()


def test_a_policy_that_cannot_be_read_can_be_written_again(says: Any, home: Path) -> None:
    (home / "policy.json").write_bytes(b"{")
    assert says("client", "policy", "--home", home)[0] == 2
    assert says("client", "policy", "--nothing", "--home", home)[0] == 0
    assert says("client", "policy", "--home", home)[0] == 0


def test_status_says_what_runs_and_what_is_left(says: Any, offered: Path) -> None:
    code, out, _ = says("client", "status", "--home", offered, "--json")
    told = json.loads(out)
    assert (code, out.count("\n")) == (0, 1)
    assert (told["name"], told["running"], told["parts"], told["spent"], told["budget"]) == (
        "hospital-a",
        False,
        {},
        0.0,
        3.0,
    )
    assert [job["decision"] for job in told["jobs"]].count("waiting") == 1
    assert "no; start it with: tacit client start" in says("client", "status", "--home", offered)[1]


@pytest.fixture
def supervised(offered: Path) -> Iterator[Path]:
    """As `offered`, with a status whose writer lives: this process, which is never told to end."""
    places = Places(ClientHome(offered))
    places.folder.mkdir()
    part = {"pid": os.getpid(), "running": True, "since": 1_700_000_000, "restarts": 2, "last_end": "ended with 1: why"}
    places.status.write_text(json.dumps({"pid": os.getpid(), "parts": {"worker": part}}))
    lock = os.open(places.status.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield offered
    os.close(lock)


def test_status_shows_each_process_and_a_second_start_is_refused(says: Any, supervised: Path) -> None:
    told = json.loads(says("client", "status", "--home", supervised, "--json")[1])
    assert (told["running"], told["parts"]["worker"]["restarts"]) == (True, 2)
    out = says("client", "status", "--home", supervised)[1]
    assert f"yes, pid {os.getpid()}" in out
    assert "ended with 1: why" in out
    code, out, error = says("client", "start", "--home", supervised)
    assert (code, out) == (6, "")
    assert "tacit client stop ends it" in error


def test_stop_without_a_start_is_one_sentence_and_ends_nobody(says: Any, offered: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("somebody was ended"))
    code, _, error = says("client", "stop", "--home", offered)
    assert (code, "nothing to stop" in error) == (6, True)
    # A status that a killed start left, whose process id is now this test's.
    places = Places(ClientHome(offered))
    places.folder.mkdir()
    places.status.write_text(json.dumps({"pid": os.getpid(), "parts": {}}))
    code, _, error = says("client", "stop", "--home", offered)
    assert (code, "nothing to stop" in error) == (6, True)


def test_a_worker_for_a_group_that_is_not_there_is_one_sentence(says: Any, home: Path) -> None:
    code, _, error = says("client", "worker", "--courier-group", "no-such-group", "--home", home)
    assert (code, "make it first" in error) == (2, True)


def test_a_worker_on_a_device_that_is_not_there_is_one_sentence_before_any_job(says: Any, offered: Path) -> None:
    code, _, error = says("client", "worker", "--device", "cuda:77", "--home", offered)
    assert (code, "expected a device that PyTorch can use" in error) == (2, True)
    assert error.count("\n") == 1
    from clients.services import parts_of

    Places(ClientHome(offered)).prepare()
    (worker, *others) = parts_of(Places(ClientHome(offered)), device="cuda:1")
    assert list(worker.command)[-2:] == ["--device", "cuda:1"]
    assert all("--device" not in part.command for part in others)


def test_a_holder_is_told_once_of_each_job_that_waits_for_it(offered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = Places(ClientHome(offered))
    look, silent = tacit._tells_of_offers(places, False), tacit._tells_of_offers(places, True)
    for _ in range(3):
        look()
        silent()
    told = capsys.readouterr().out
    # The other job was accepted by the policy.
    assert told.count("waits for your decision") == told.count("\n") == 1
    assert f"tacit client plan {0xA << 124:032x}"[:30] in told


def test_a_courier_of_a_client_that_was_never_started_is_one_sentence(says: Any, home: Path) -> None:
    code, _, error = says("client", "courier", "--home", home)
    assert (code, "tacit client start" in error) == (6, True)


# -- the server -----------------------------------------------------------------------------------------------------


def test_server_status_without_a_start(says: Any, tmp_path: Path) -> None:
    make_home(tmp_path / "server")
    code, out, _ = says("server", "status", "--home", tmp_path / "server", "--json")
    nothing = {"running": False, "parts": {}, "faults": {}, "members": [], "job": None}
    assert (code, json.loads(out)) == (0, {"federation": "demo", **nothing})
    assert "no; start it with: tacit server start" in says("server", "status", "--home", tmp_path / "server")[1]
    assert says("server", "stop", "--home", tmp_path / "server")[0] == 6


def test_server_run_without_a_relay_and_with_what_it_cannot_do(says: Any, tmp_path: Path) -> None:
    make_home(tmp_path / "server")
    home, out = tmp_path / "server", tmp_path / "run"
    began = time.monotonic()
    code, printed, error = says("server", "run", "--out", out, "--clients", 2, "--home", home, "--json")
    assert (code, printed) == (6, "")
    assert "tacit server start" in error
    assert time.monotonic() - began < 60
    for flags in (("--unit", "client"), ("--rounds", "0"), ("--wait", "soon"), ("--resume", tmp_path / "nowhere")):
        code, printed, error = says("server", "run", "--out", tmp_path / "other", *flags, "--home", home)
        assert code in (2, 6)
        assert (printed, error.count("\n")) == ("", 1)
        assert "unexpected" not in error
    # A machine's own keys mean nothing for clients that bring machines of their own.
    for flag in ("--partition", "--workers", "--engine"):
        assert says("server", "run", flag, "1", "--home", home)[0] == 2
