"""The courier before a SuperNode that answers anything: a message is lost at most, and never the courier."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.proto.runtime_pb2 import AcquireTaskResponse

from clients import courier
from clients.courier import Courier


@pytest.fixture
def supernode(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A SuperNode that has a task each time, and answers all else with what a test wants."""
    monkeypatch.setattr(courier, "_AWAY_S", 0.01)
    monkeypatch.setattr(courier, "_SENT_S", 0.0)
    task = AcquireTaskResponse(token="t").SerializeToString()  # noqa: S106 -- nobody's
    state = SimpleNamespace(acquired=0, body=b"", task=task, asked=[])

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            state.asked.append(self.path)
            acquires = self.path.endswith("acquire-task")
            state.acquired += acquires
            body = state.task if acquires else state.body
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.address = f"127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    thread.join(10)
    server.server_close()


def carry(supernode: Any, tmp_path: Path, enough: Callable[[], bool]) -> Courier:
    made = Courier(supernode.address, bytes(32), tmp_path / "worker.sock")
    late = threading.Event()
    timer = threading.Timer(20.0, late.set)
    timer.start()
    made.run(lambda: enough() or late.is_set())
    timer.cancel()
    assert not late.is_set()
    return made


@pytest.mark.parametrize("body", [b"\xff\xff\xff\xff", b"\x0a\x7f", b"<html>busy</html>"])
def test_a_supernode_that_answers_nonsense_costs_a_message_and_neither_the_courier_nor_a_thread(
    supernode: Any, tmp_path: Path, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    supernode.body = body
    before = threading.active_count()
    made = carry(supernode, tmp_path, lambda: supernode.acquired >= 4)
    assert made.carried == 0
    assert supernode.acquired >= 4
    # Nothing goes on beating for a task that is over: with a fault in the last step alone, each left one behind.
    assert threading.active_count() <= before + 1
    said = [record for record in caplog.records if "not carried" in record.message]
    assert len(said) >= 3
    assert all(record.levelno == logging.WARNING and record.exc_info is None for record in said)
    assert "the server sends it again" in said[0].message


def test_a_supernode_whose_tasks_are_nonsense_is_asked_again(
    supernode: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    supernode.task = b"\xff\xff\xff\xff"
    assert carry(supernode, tmp_path, lambda: supernode.acquired >= 3).carried == 0
    assert sum("asking again" in record.message for record in caplog.records) >= 3
