"""Stopping and upgrading: no round is lost, and a client with another program is refused by name of the fault."""

import threading
import time
from types import SimpleNamespace

import pytest
from flwr.supercore.task_identity import TaskIdentity

from clients import courier
from clients.courier import Courier
from clients.services import ROUND_S, Places, parts_of
from server import sealed
from server.app import Ending, run
from server.sealed import SealedGrid
from tests.test_sealed_federation import SERVER, FakeRelay, make_job, make_terms, make_worker, members_of
from tests.test_units import client_home


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    for name in ("_POLL_S", "_PAUSE_S", "_WAITING_S"):
        monkeypatch.setattr(sealed, name, 0.002)
    monkeypatch.setattr(sealed, "_FIRST_PATIENCE_S", 0.2)
    monkeypatch.setattr(sealed, "_LONGEST_PATIENCE_S", 0.5)


def test_a_client_that_comes_back_with_a_newer_program_is_refused_and_the_operator_sees_why(tmp_path):
    workers = {node: make_worker(tmp_path / f"client-{node}", n) for n, node in enumerate((501, 502), start=1)}
    terms = make_terms()
    grid = SealedGrid(FakeRelay(workers), members_of(workers), SERVER, terms)
    grid.keep(grid.gather(2, patience_s=30.0))
    lines, words = [], []

    def on_round(line):
        lines.append(line)
        words.append({member.name: word for member, word in grid.words})
        if line["round"] == 1:
            workers[502] = make_worker(tmp_path / "client-502", 2)
            workers[502]._code = "d" * 64

    assert run(make_job(tmp_path / "run", terms, on_round=on_round), grid) is Ending.FINISHED
    assert [line["replies"] for line in lines] == [2, 1, 1]
    assert words[0]["hospital-2"] == "answered"
    assert words[2] == {"hospital-1": "answered", "hospital-2": "other-program"}
    # The refusal comes before any charge.
    assert workers[502]._holder.book.accounts["mine"].charges == 1
    assert workers[501]._holder.book.accounts["mine"].charges == 3


def test_a_client_that_was_stopped_and_comes_back_with_the_same_program_goes_on(tmp_path):
    workers = {node: make_worker(tmp_path / f"client-{node}", n) for n, node in enumerate((501, 502), start=1)}
    terms = make_terms()
    grid = SealedGrid(FakeRelay(workers), members_of(workers), SERVER, terms)
    grid.keep(grid.gather(2, patience_s=30.0))
    lines = []

    def on_round(line):
        lines.append(line)
        workers[502] = make_worker(tmp_path / "client-502", 2)

    assert run(make_job(tmp_path / "run", terms, on_round=on_round), grid) is Ending.FINISHED
    assert [line["replies"] for line in lines] == [2, 2, 2]
    assert workers[502]._holder.book.accounts["mine"].charges == 3


def carrying(monkeypatch, tmp_path, sent_s):
    """A courier that is told to stop while it carries its first message; returns it, and when what was over."""
    monkeypatch.setattr(courier, "_SENT_S", sent_s)
    made, stop, over = Courier("127.0.0.1:1", bytes(32), tmp_path / "sock"), threading.Event(), {}
    made._tasks = SimpleNamespace(AcquireTask=lambda request: SimpleNamespace(token="t"))  # noqa: S106 -- of no account

    def carry(token):
        stop.set()
        time.sleep(0.3)
        over["carried"] = time.monotonic()

    monkeypatch.setattr(made, "carry", carry)
    made.run(stop.is_set)
    over["ended"] = time.monotonic()
    return made, over


def test_a_courier_that_is_told_to_stop_ends_its_message_and_leaves_time_to_send_it(monkeypatch, tmp_path):
    made, over = carrying(monkeypatch, tmp_path, 0.4)
    assert made.carried == 1
    assert over["ended"] - over["carried"] >= 0.39
    # The same measure finds one that leaves at once.
    _, over = carrying(monkeypatch, tmp_path, 0.0)
    assert over["ended"] - over["carried"] < 0.3


def test_the_courier_gets_a_round_to_end_and_is_ended_before_what_it_needs(tmp_path):
    places = Places(client_home(tmp_path))
    places.prepare()
    parts = parts_of(places)
    assert [part.name for part in parts] == ["worker", "tunnel", "supernode", "courier"]
    assert parts[-1].grace_s == ROUND_S >= 300
