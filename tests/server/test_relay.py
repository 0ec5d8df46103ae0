"""The relay and the roster as the server uses them: a bundle that nobody runs, and who is let in."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import GetNodesRequest
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from privacy.errors import IdentityError, RunError
from privacy.identity.loopback import write_loopback
from privacy.vault import private
from server import relay, services
from server.enrol import State
from server.relay import Control, Relay, make_bundle
from server.sealed import Member, RunOverError, SealedGrid, _papers_of
from server.services import Places, Roster
from tests.enrolling import make_home
from tests.test_sealed_federation import SERVER, FakeRelay, make_terms, make_worker, members_of

# Flower's own way of choosing files is one that its library warns of.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


def test_g22_the_bundle_of_every_run_is_the_same_bytes() -> None:
    assert make_bundle() == make_bundle()
    program = "import hashlib; from server.relay import make_bundle; print(hashlib.sha256(make_bundle()).hexdigest())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.strip() == hashlib.sha256(make_bundle()).hexdigest()


def test_g15_the_bundle_of_a_run_holds_no_code_that_anybody_runs(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(make_bundle())) as bundle:
        names = set(bundle.namelist())
        assert {name for name in names if name.endswith(".py")} == {"nobody.py"}
        assert not {"tacit.py", "clients", "server"} & {name.split("/")[0] for name in names}
        bundle.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "import nobody; print('it ran')"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "expected 'tacit client start'" in done.stderr
    assert "it ran" not in done.stdout


class Answering(BaseHTTPRequestHandler):
    """A SuperLink that answers everything with what a test wants."""

    status, body = 200, b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def superlink() -> Any:
    handler = type("Handler", (Answering,), {})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield SimpleNamespace(address=f"127.0.0.1:{server.server_port}", handler=handler)
    server.shutdown()
    thread.join(10)
    server.server_close()


@pytest.mark.parametrize(("status", "body"), [(500, b""), (403, b"no"), (404, b""), (200, b"\xff\xff\xff\xff")])
def test_a_superlink_that_answers_something_else_is_one_sentence(superlink: Any, status: int, body: bytes) -> None:
    superlink.handler.status, superlink.handler.body = status, body
    control = Control(superlink.address)
    for ask in (
        control.nodes,
        control.online,
        lambda: control.register(b"key"),
        lambda: control.unregister(5),
        lambda: control.start(b"bundle", "signature"),
    ):
        with pytest.raises(RunError, match="expected an answer of the SuperLink"):
            ask()


def test_no_superlink_is_one_sentence_and_a_run_that_is_not_opened_says_so() -> None:
    with pytest.raises(RunError, match="tacit server start"):
        Control("127.0.0.1:9").nodes()
    run = Relay("127.0.0.1:9", b"s" * 32, SERVER)
    with pytest.raises(RunError, match="an answer of the SuperLink"), run:
        pytest.fail("it opened")
    with pytest.raises(RunError, match="open it first"):
        run.nodes()
    assert run.pull([]) == []
    run.close()


def test_a_superlink_that_starts_no_run_is_one_sentence(superlink: Any) -> None:
    with pytest.raises(RunError, match="to start a run"):
        Control(superlink.address).start(make_bundle(), "signature")


@pytest.mark.parametrize("body", [b"\xff\xff\xff\xff", b"\x0a\x7f", b"<html>busy</html>"])
def test_an_open_run_whose_superlink_answers_nonsense_has_one_sentence_for_it_and_tries_again(
    superlink: Any, body: bytes
) -> None:
    superlink.handler.body = body
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    made = Relay(superlink.address, b"s" * 32, SERVER)
    made._grid = HttpGrid(superlink.address, insecure=True, token="t")  # noqa: S106 -- nobody's
    vars(made._grid)["_retry_invoker"] = None
    made._grid.set_run(Run.create_empty(7))
    message = Message(RecordDict(), dst_node_id=5, message_type="train")
    for ask in (made.nodes, lambda: made.push([message]), lambda: made.pull(["m1"])):
        # Twin: Flower's own reader raises what is nobody's to handle.
        with pytest.raises(RunError, match="in Flower's format"):
            ask()
    with pytest.raises(ValueError, match="Invalid protobuf"):
        made.grid._runtime_client.GetNodes(GetNodesRequest())
    made.close()


@pytest.mark.parametrize(
    "content", [b"", b"no head", b"Message 9 \x00" + b"\xff" * 9, b"RecordDict 2 \x00\xff\xff", b"\xff" * 50]
)
def test_a_reply_that_is_no_message_is_let_fall_whatever_flowers_reader_says(content: bytes) -> None:
    # It has one reply, whose bytes a member made.
    head = SimpleNamespace(metadata=SimpleNamespace(message_id="r", reply_to_message_id="m1"))
    listed = SimpleNamespace(messages_list=[head], message_object_trees=[ObjectTree(object_id="r")])
    found = SimpleNamespace(object_found=True, object_available=True, object_content=content)
    client = SimpleNamespace(
        PullMessages=lambda request: listed,
        PullObject=lambda request: found,
        ConfirmMessageReceived=lambda request: None,
    )
    made = Relay("127.0.0.1:9", b"s" * 32, SERVER)
    made._grid = SimpleNamespace(_runtime_client=client, node=Node(node_id=1))  # type: ignore[assignment]
    assert made.pull(["m1"]) == []
    assert made._coming == {}
    # Twin: the reader itself ends a program that lets it.
    with pytest.raises(Exception, match=r"."):
        inflate_object_from_contents("r", {"r": content})


def test_a_run_whose_superlink_was_started_anew_is_over_and_one_that_is_only_away_is_not(tmp_path: Path) -> None:
    _, authority = write_loopback(tmp_path, now=1_800_000_000.0)
    made = Relay("127.0.0.1:9", b"s" * 32, SERVER, authority=authority)
    made._root = authority.read_bytes()

    def away() -> None:
        with made._serving():
            raise httpx.ConnectError("connection refused")

    with pytest.raises(httpx.ConnectError):
        away()
    write_loopback(tmp_path, now=1_800_000_000.0)
    with pytest.raises(RunOverError, match="started anew"):
        away()


# -- the list of nodes --------------------------------------------------------------------------------------------


class FakeControl:
    """The relay's list of nodes."""

    nodes_: dict[bytes, int]
    broken: set[bytes]

    def __init__(self, *_: object) -> None: ...

    def nodes(self) -> dict[bytes, int]:
        return dict(self.nodes_)

    def register(self, key: bytes) -> int:
        if key in self.broken:
            raise RunError("expected a key, got one that the SuperLink refuses")
        self.nodes_[key] = max(self.nodes_.values(), default=0) + 1
        return self.nodes_[key]

    def unregister(self, node: int) -> None:
        (key,) = [key for key, number in self.nodes_.items() if number == node]
        if key in self.broken:
            raise RunError("expected a node, got none")
        del self.nodes_[key]


@pytest.fixture
def roster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    control = type("Nodes", (FakeControl,), {"nodes_": {}, "broken": set()})
    monkeypatch.setattr(services, "Control", control)

    def pem(key: str) -> bytes:
        if key == "damaged":
            raise IdentityError("expected a key, got a damaged one")
        return key.encode()

    monkeypatch.setattr(services, "supernode_pem", pem)
    home = make_home(tmp_path / "server")
    Places(home).prepare()
    made = Roster(Places(home))
    listed: dict[str, Any] = {}
    monkeypatch.setattr(made._registry, "members", lambda: dict(listed))
    return SimpleNamespace(settle=made.settle, control=control, listed=listed)


def member(key: str, state: State = State.ENROLLED) -> Any:
    return SimpleNamespace(name=key, supernode=key, state=state)


def test_who_is_enrolled_is_let_in_and_who_is_revoked_is_shut_out(roster: Any) -> None:
    roster.listed |= {"a": member("a"), "b": member("b"), "c": member("c", State.INVITED)}
    roster.settle()
    assert set(roster.control.nodes_) == {b"a", b"b"}
    roster.listed["a"] = member("a", State.REVOKED)
    # One whom nobody enrolled, such as somebody who registered at the relay itself.
    roster.control.nodes_[b"stranger"] = 99
    roster.settle()
    assert set(roster.control.nodes_) == {b"b"}


@pytest.mark.parametrize("fault", ["damaged", "refused"])
def test_a_node_that_cannot_be_let_in_keeps_nobody_from_being_shut_out(roster: Any, fault: str) -> None:
    roster.listed |= {"a": member("a"), "z": member("z")}
    roster.settle()
    roster.listed |= {"a": member("a", State.REVOKED), fault: member(fault), "y": member("y")}
    roster.control.broken = {b"refused"}
    with pytest.raises((RunError, IdentityError)):
        roster.settle()
    assert set(roster.control.nodes_) == {b"y", b"z"}
    # It is tried again, since not all of it is done.
    roster.control.broken = set()
    del roster.listed["damaged" if fault == "damaged" else "y"]
    roster.settle()
    assert b"a" not in roster.control.nodes_


# -- loopback -----------------------------------------------------------------------------------------------------


def test_the_certificate_for_loopback_is_for_loopback_alone_and_new_at_every_start(tmp_path: Path) -> None:
    import ssl

    first, root = write_loopback(tmp_path, now=1_800_000_000.0)
    before = (first.read_bytes(), root.read_bytes())
    assert first.stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE KEY" in before[0]
    assert b"PRIVATE KEY" not in before[1]
    write_loopback(tmp_path, now=1_800_000_000.0)
    assert (first.read_bytes(), root.read_bytes()) != before
    # The key of the authority is nowhere: nothing else can be signed with it.
    assert {path.name for path in tmp_path.iterdir()} == {"loopback.pem", "loopback-ca.pem"}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(root)
    (issued,) = context.get_ca_certs()
    assert dict(pair for name in issued["subject"] for pair in name)
    with pytest.raises(ssl.SSLError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(root)


# -- a relay that says anything -----------------------------------------------------------------------------------


class Hostile(FakeRelay):
    """Hands over replies to nothing that was asked, and others whose content is none of ours, beside the real ones."""

    def pull(self, ids: Any) -> list[Message]:
        real = super().pull(ids)
        strange = []
        for reply in real:
            for content in (
                RecordDict(),
                RecordDict({"sealed": ArrayRecord()}),
                RecordDict({"sealed": ArrayRecord({"message": Array("uint8", (1,), "numpy.ndarray", b"x")})}),
            ):
                asked = Message(RecordDict(), dst_node_id=1, message_type="train")
                asked.metadata.__dict__["_message_id"] = f"never-asked-{len(strange)}"
                made = Message(content, reply_to=asked)
                strange.append(made)
            assert reply.metadata.reply_to_message_id
        return strange + real


def test_replies_to_nothing_that_was_asked_are_let_fall_and_the_job_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server import sealed

    monkeypatch.setattr(sealed, "_POLL_S", 0.002)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    workers = {501: make_worker(tmp_path / "a", 1)}
    grid = SealedGrid(Hostile(workers), members_of(workers), SERVER, make_terms(clients=1))
    assert grid.gather(1, patience_s=10.0) == [1]
    # The agreed member shows papers, though nothing was charged yet.
    assert set(grid.papers(patience_s=5.0)["hospital-1"]) == {"grant", "changes"}
    assert isinstance(grid.words[0][0], Member)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"\xff\xfe",
        b'{"grant": NaN}',
        b'{"grant":Infinity}',
        b'{"a":1,"a":2}',
        b"[" * 50_000,
        b'{"grant":{"body":' * 3000,
        b'{"a":"' + b"x" * 70_000 + b'"}',
        b'{"a":1e999}',
        b'{"b":1,"a":2}',
    ],
)
def test_papers_that_are_none_are_no_papers_and_break_nothing(body: bytes) -> None:
    assert _papers_of(body) == {}
    assert _papers_of(b'{"changes":[],"grant":{}}') == {"changes": [], "grant": {}}


def test_a_server_listens_for_its_relay_on_a_port_that_stays(tmp_path: Path) -> None:
    places = Places(make_home(tmp_path / "server"))
    with pytest.raises(RunError, match="tacit server start"):
        _ = places.port
    places.prepare()
    port, secret = places.port, private.read(places.secret)
    assert places.secret.stat().st_mode & 0o777 == 0o600
    places.prepare()
    assert (places.port, private.read(places.secret)) == (port, secret)
    assert len(secret) == 32
    assert secret not in places.secret.read_bytes()
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        places.prepare()
        assert places.port != port
    (places.folder / "port").write_text("x")
    with pytest.raises(RunError):
        _ = places.port


def test_g15_no_part_of_a_server_has_a_secret_in_its_command_line_and_only_the_enrolment_gets_the_passphrase(
    tmp_path: Path,
) -> None:
    places = Places(make_home(tmp_path / "server"))
    places.prepare()
    parts = services.parts_of(places, environment={"TACIT_PASSPHRASE": "correct horse"})
    assert [part.name for part in parts] == ["relay", "gateway", "enrolment"]
    assert [part.name for part in parts if "TACIT_PASSPHRASE" in part.environment] == ["enrolment"]
    assert not any("correct horse" in word for part in parts for word in part.command)
    (superlink,) = [part.command for part in parts if part.name == "relay"]
    assert "--enable-supernode-auth" in superlink
    assert "--insecure" not in superlink
    assert superlink[superlink.index("--host") + 1] == "127.0.0.1"
    assert relay._ACQUIRE == {"/flwr.proto.Runtime/AcquireTask"}
