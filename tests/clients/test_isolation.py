"""Isolation: whether Flower's processes run apart from a data holder's data is found, and said (guarantee G15)."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients import isolation
from clients.home import ClientHome, Policy, Settings
from clients.isolation import NOTE, Apart, Noted, WorkerNote, listener_of, look, may_read, read_note
from clients.post import LOST, Letter, hand_over
from clients.preflight import Verdict, apart
from clients.worker import Doorway
from privacy.enrolment import Address
from privacy.processes import _lock_of

# A user that owns nothing here; where these tests run under it, its neighbour.
OTHER = 65534 if os.getuid() != 65534 else 65533


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture
def home(folder: Path) -> ClientHome:
    made = ClientHome(folder / "home")
    made.make()
    (folder / "data").mkdir(mode=0o700)
    (made.folder / "keys" / "application.key").write_bytes(bytes(32))
    made.save(
        Settings(
            name="north",
            federation="demo",
            addresses=(Address("localhost", 1),),
            enrol=(Address("localhost", 2),),
            server="0" * 64,
            authority="0" * 64,
            task="digits",
            data=str(folder / "data"),
            data_set="data",
            ledger=str(made.folder / "ledger"),
            policy=Policy(epsilon=1.0, delta=1e-5, records_bound=100),
        )
    )
    return made


def both(user: int) -> dict[str, int]:
    return {"courier": user, "supernode": user}


def test_g15_processes_of_another_user_who_can_read_nothing_run_apart(home: ClientHome) -> None:
    found = look(home, processes=both(OTHER))
    assert (found.apart, found.fix) == (Apart.YES, "")


@pytest.mark.parametrize("planted", ["courier", "supernode"])
def test_g15_one_process_under_the_owner_is_not_apart_and_the_fix_is_named(home: ClientHome, planted: str) -> None:
    found = look(home, processes=both(OTHER) | {planted: os.getuid()})
    assert found.apart is Apart.NO
    assert planted in found.words
    assert "guarantee depends on Flower's processes" in found.fix
    assert look(home, processes=both(OTHER) | {planted: 0}).apart is Apart.NO


@pytest.mark.parametrize("what", ["data", "home", "home/keys/application.key"])
def test_g15_another_user_who_can_read_what_is_secret_is_not_apart(home: ClientHome, folder: Path, what: str) -> None:
    (folder / what).chmod(0o755)
    if what.startswith("home/"):
        (folder / "home").chmod(0o711)
        (folder / "home" / "keys").chmod(0o711)
    found = look(home, processes=both(OTHER))
    assert found.apart is Apart.NO
    assert str(folder / what) in found.words
    assert "chmod go-rwx" in found.fix


@pytest.mark.parametrize("missing", ["courier", "supernode"])
def test_g15_what_was_not_seen_is_unknown_and_not_apart(home: ClientHome, missing: str) -> None:
    users = both(OTHER)
    del users[missing]
    found = look(home, processes=users)
    assert found.apart is Apart.UNKNOWN
    assert missing in found.words


def test_g15_the_preflight_warns_of_what_is_not_apart(home: ClientHome, monkeypatch: pytest.MonkeyPatch) -> None:
    for users, verdict in ((both(OTHER), Verdict.OK), (both(os.getuid()), Verdict.WARNING), ({}, Verdict.WARNING)):
        monkeypatch.setattr(isolation, "_running", lambda home, users=users: users)
        (finding,) = apart(home)
        assert (finding.check, finding.verdict) == ("isolation", verdict)
        assert bool(finding.fix) == (verdict is not Verdict.OK)


def test_g15_the_users_of_running_processes_are_those_of_the_kernel(home: ClientHome) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert listener_of(port) == os.getuid()
        run = home.folder / "run"
        run.mkdir()
        (run / "ports").write_text(f"1 {port}")
        assert isolation._running(home) == {"supernode": os.getuid()}
        part = {"pid": os.getpid()}
        (run / "status.json").write_text(json.dumps({"pid": os.getpid(), "parts": {"courier": part}}))
        keeper = os.open(_lock_of(run / "status.json"), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(keeper, fcntl.LOCK_EX)
        assert isolation._running(home) == both(os.getuid())
    assert listener_of(port) is None


def test_a_group_counts_where_a_user_is_in_it_or_nobody_knows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "file"
    file.write_bytes(b"")
    file.chmod(0o640)
    group = file.stat().st_gid
    for groups, may in ((frozenset({group}), True), (frozenset({group + 1}), False), (None, True)):
        monkeypatch.setattr(isolation, "_groups", lambda user, groups=groups: groups)
        assert may_read(file, OTHER) is may
    file.chmod(0o600)
    assert not may_read(file, OTHER)
    assert may_read(file, 0)
    file.chmod(0o644)
    assert may_read(file, OTHER)
    folder.chmod(0o700)
    assert not may_read(file, OTHER)
    assert not may_read(folder / "gone", OTHER)


# -- what the worker notes ---------------------------------------------------------------------------------------------


class Answering:
    """A worker that knows no session."""

    def __init__(self) -> None:
        self.rounds, self.last_error = 0, ""

    def answer(self, letter: Letter) -> dict[str, bytes]:
        self.rounds += 1
        return {LOST: b""}


@pytest.fixture
def door(home: ClientHome, folder: Path) -> Iterator[tuple[Path, Noted]]:
    noted, stop = Noted(home), threading.Event()
    door = Doorway(folder / "sock", group=os.getgid())
    worker = Answering()
    thread = threading.Thread(target=door.serve, args=(noted.around(worker), stop.is_set, noted.called))
    thread.start()
    yield folder / "sock", noted
    stop.set()
    thread.join(10)
    door.close()
    noted.close()
    assert not (home.folder / NOTE).exists()


LETTER = Letter(1, "0" * 64, {"hello": b"x"})


def test_g15_the_worker_notes_who_calls_and_that_it_is_the_owner(home: ClientHome, door: tuple[Path, Noted]) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        # Who only looks whether somebody is there is no courier.
        probe.connect(str(door[0]))
    hand_over(door[0], LETTER)
    assert hand_over(door[0], LETTER) == {LOST: b""}
    note = read_note(home)
    assert note is not None
    assert (note.callers, note.pid) == ([os.getuid()], os.getpid())
    assert (home.folder / NOTE).stat().st_mode & 0o777 == 0o600
    assert look(home, processes={"supernode": OTHER}).apart is Apart.NO


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to call as another user")
def test_g15_a_courier_of_another_user_reaches_the_socket_and_nothing_else(
    home: ClientHome, door: tuple[Path, Noted]
) -> None:
    os.chown(door[0], -1, OTHER)
    program = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))\n"
        "for path in sys.argv[3:]:\n"
        "    try: os.listdir(path)\n"
        "    except PermissionError: pass\n"
        "    else: sys.exit(f'read {path}')\n"
        "from pathlib import Path\n"
        "channel = socket.socket(socket.AF_UNIX); channel.connect(sys.argv[1])\n"
        'head = b\'{"bundle":"\' + b\'0\' * 64 + b\'","pieces":[["hello",1]],"run":1}\'\n'
        "channel.sendall(len(head).to_bytes(4, 'big') + head + b'x'); channel.recv(10)\n"
    )
    secret = [str(home.folder), str(home.folder.parent / "data")]
    subprocess.run([sys.executable, "-c", program, str(door[0]), str(OTHER), *secret], check=True, timeout=30)
    assert door[1].note.callers == [OTHER]
    assert look(home, processes={"supernode": OTHER}).apart is Apart.YES


def test_a_note_of_a_process_that_ended_is_none(home: ClientHome) -> None:
    assert read_note(home) is None
    noted = Noted(home)
    assert isinstance(read_note(home), WorkerNote)
    noted.note.began += 1
    noted._tell()
    assert read_note(home) is None
    (home.folder / NOTE).write_bytes(b"{")
    assert read_note(home) is None
