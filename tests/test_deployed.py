"""Jobs over real processes: relay, gateway, enrolment, workers, tunnels, SuperNodes, couriers, server application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from privacy.hop import present
from privacy.identity.loopback import write_loopback
from privacy.verify import Result, verify_files
from server.app import CHECKPOINT
from tests.deploying import LOOPBACK, Client, Federation, until
from tests.replaying import distance, model_of, played, replay

OWN = ("--epsilon", 3, "--delta", 1e-5, "--records-bound", 2000)
RICH = ("--epsilon", 60, "--delta", 1e-5, "--records-bound", 2000)


def verified(federation: Federation, name: str) -> None:
    """Checks a job's report together with the ledgers that its clients hold."""
    ledgers = [client.home / "ledger" for client in federation.clients]
    checks = verify_files([federation.folder / name, *ledgers])
    assert checks
    assert not [(check.name, check.words) for check in checks if check.result is Result.FAILS]


# -- from invitation to report, watched ------------------------------------------------------------------------------


class Recorder:
    """A proxy on loopback that keeps every byte it passes on; with a certificate, the bytes inside TLS."""

    def __init__(self, upstream: int, certificate: Path | None = None, authority: Path | None = None) -> None:
        self._upstream = upstream
        self._inside = self._outside = None
        if certificate is not None:
            self._inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            present(self._inside, certificate, certificate)
            self._outside = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._outside.load_verify_locations(authority)
        # One entry for each direction of each connection: a marker that is cut by a read is found all the same.
        self.streams: list[bytearray] = []
        self.port = 0
        listening, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(listening,), daemon=True)
        self._thread.start()
        assert listening.wait(20)

    def _run(self, listening: threading.Event) -> None:
        async def main() -> None:
            server = await asyncio.start_server(self._carry, LOOPBACK, 0, ssl=self._inside)
            self.port = server.sockets[0].getsockname()[1]
            self._stop = asyncio.Event()
            listening.set()
            await self._stop.wait()
            server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(main())
        self._loop.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            back, away = await asyncio.open_connection(LOOPBACK, self._upstream, ssl=self._outside)
            ways = [asyncio.ensure_future(self._pump(reader, away)), asyncio.ensure_future(self._pump(back, writer))]
            try:
                # Neither side of TLS can be half closed.
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                away.transport.abort()
        writer.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        stream = bytearray()
        self.streams.append(stream)
        with contextlib.suppress(OSError):
            while part := await source.read(1 << 16):
                stream += part
                sink.write(part)
                await sink.drain()

    @property
    def seen(self) -> bytes:
        """All that passed."""
        return b"\0".join(self.streams)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)


class Watch:
    """Reads every file of a folder again and again, and keeps which of the words it ever found there."""

    def __init__(self, folder: Path, words: dict[str, bytes]) -> None:
        self._folder, self._words = folder, words
        self.found: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.3):
            self.look()

    def look(self) -> None:
        for path in self._folder.rglob("*"):
            with contextlib.suppress(OSError):
                content = path.read_bytes() if path.is_file() and not path.is_socket() else b""
                self.found.update(found_in(content, self._words))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.look()


def found_in(content: bytes, words: dict[str, bytes]) -> list[str]:
    return [name for name, word in words.items() if word in content]


def test_a_recorder_finds_what_passes_in_clear_inside_tls_and_outside_it_does_not(tmp_path: Path) -> None:
    write_loopback(tmp_path, now=time.time())
    certificate, authority = tmp_path / "loopback.pem", tmp_path / "loopback-ca.pem"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with socket.create_server((LOOPBACK, 0)) as listener:

        def echo() -> None:
            connection, _ = listener.accept()
            with context.wrap_socket(connection, server_side=True) as inside:
                inside.sendall(inside.recv(1000))

        thread = threading.Thread(target=echo)
        thread.start()
        inner = Recorder(listener.getsockname()[1], certificate, authority)
        outer = Recorder(inner.port)
        trusting = ssl.create_default_context(cafile=str(authority))
        with (
            socket.create_connection((LOOPBACK, outer.port)) as raw,
            trusting.wrap_socket(raw, server_hostname=LOOPBACK) as client,
        ):
            client.sendall(MARKER.encode())
            assert client.recv(1000) == MARKER.encode()
        thread.join()
    outer.close()
    inner.close()
    assert found_in(inner.seen, {"note": MARKER.encode()}) == ["note"]
    assert inner.seen.count(MARKER.encode()) == 2
    assert not found_in(outer.seen, {"note": MARKER.encode()})
    assert outer.seen


def test_a_watch_finds_a_word_that_was_in_a_file_for_a_moment_only(tmp_path: Path) -> None:
    watch = Watch(tmp_path, {"note": MARKER.encode(), "never": b"never"})
    (tmp_path / "state.db-wal").write_bytes(b"..." + MARKER.encode())
    until(lambda: watch.found["note"], "the word")
    (tmp_path / "state.db-wal").unlink()
    watch.close()
    assert set(watch.found) == {"note"}


MARKER, VALUE = "zebra-marker-in-a-note", "71.23456789"
SCHEMA = """\
target = "outcome"
classes = ["well", "ill"]
[columns.age]
kind = "number"
min = 0
max = 120
[columns.pulse]
kind = "number"
min = 30
max = 220
[columns.note]
kind = "ignored"
"""


def write_table(folder: Path, name: str, rows: int, seed: int, note: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "schema.toml").write_text(SCHEMA)
    dice = random.Random(seed)
    lines = ["age,pulse,note,outcome"]
    for row in range(rows):
        age = VALUE if row % 2 == 0 and note else f"{dice.uniform(20, 90):.2f}"
        lines.append(f"{age},{dice.uniform(50, 120):.2f},{note},{'ill' if float(age) > 55 else 'well'}")
    (folder / name).write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_g19_from_invitation_to_report_and_neither_records_nor_updates_are_on_the_relays_disk_or_wire(
    tmp_path: Path,
) -> None:
    with Federation(tmp_path / "all", task="table") as federation:
        public = tmp_path / "public"
        write_table(public, "train.csv", 50, 1, "")
        write_table(public, "test.csv", 60, 2, "")
        gateway = int(json.loads((federation.home / "server.json").read_bytes())["addresses"][0].rpartition(":")[2])
        outer = Recorder(gateway)
        relay = federation.home / "relay"
        loopback, authority = relay / "loopback.pem", relay / "loopback-ca.pem"
        inner = Recorder(int((relay / "port").read_text()), loopback, authority)
        # From here on the gateway and the server application reach the relay through the recorder.
        (relay / "port").write_text(str(inner.port))
        before = federation.pids["gateway"]
        os.kill(before, signal.SIGKILL)
        until(lambda: federation.pids.get("gateway", before) != before, "another gateway")
        for number, client in enumerate(federation.clients):
            write_table(tmp_path / client.name, "train.csv", 400, 10 + number, MARKER)
            client.join("--data", tmp_path / client.name, *OWN)
            settings = client.home / "client.json"
            settings.write_text(settings.read_text().replace(f":{gateway}", f":{outer.port}"))
        federation.start_clients()
        words = {"note": MARKER.encode(), "value": VALUE.encode(), "receipt": b'"charges":', "terms": b'"sample_rate"'}
        watch = Watch(relay, words | {"wire": b"broadcast"})
        job = ("--clients", 2, "--rounds", 3, "--records-per-client", 400, "--data", public)
        summary = federation.finished(federation.run("job", *job))
        assert (summary["status"], summary["rounds"]) == ("finished", 3)
        assert [line["replies"] for line in federation.rounds("job")] == [2, 2, 2]
        verified(federation, "job")
        for client in federation.clients:
            assert client.charges(federation.job_of("job")) == {1: 1, 2: 1, 3: 1}
        watch.close()
        # The last model is the mean of what the clients sent; each of its numbers came and went by the relay.
        model = model_of(federation, "job")
        weights = max(model.values(), key=lambda value: value.size).astype("<f4").tobytes()
        words |= {"update": weights[:8], "update, in full": weights}
    outer.close()
    inner.close()
    wire = inner.seen
    assert not found_in(wire, words)
    assert not found_in(outer.seen, words | {"fleet": b"/v1/fleet/"})
    assert set(watch.found) == {"wire"}
    disk = b"\0".join(path.read_bytes() for path in sorted(relay.rglob("*")) if path.is_file())
    assert not found_in(disk, words)
    # The same search finds each where it must be, so it could have failed: what is not secret is on the wire and disk,
    # records are at their holder, what was released is at the server.
    assert b"/v1/fleet/pull-messages" in wire
    assert b"/v1/runtime/" in wire
    assert b"broadcast" in wire
    assert len(outer.seen) > 10_000
    held = (tmp_path / "clinic-1" / "train.csv").read_bytes()
    assert set(found_in(held, words)) == {"note", "value"}
    # The checkpoint is sealed where it lies; what it holds is the server's, under the server's keys.
    assert weights not in (federation.folder / "job" / CHECKPOINT).read_bytes()
    opened = b"".join(value.astype("<f4").tobytes() for value in model.values())
    kept = opened + (federation.folder / "job/job.json").read_bytes()
    assert set(found_in(kept, words)) == {"update", "update, in full", "terms"}
    assert b'\\"charges\\":' in (federation.folder / "job/receipts.jsonl").read_bytes()


# -- kill -9, each in turn -------------------------------------------------------------------------------------------

# Sums of several threads differ in the last bit; one round's noise, drawn anew, would differ by far more.
SAME = 1e-6


def require_right_model(federation: Federation, name: str, scratch: Path, calm: str = "") -> str:
    """Checks a job's model: that of a calm run where every reply came, else what the recorded answers make.

    Args:
        federation: Where it was run.
        name: Of the job.
        scratch: A new folder.
        calm: A job that nothing befell; without one, it is played again in one process in either case.

    Returns:
        Which of the two it was.
    """
    asked, rounds = len(federation.clients), federation.rounds(name)
    model = model_of(federation, name)
    assert max(np.abs(value).max() for value in model.values()) > 1e-2
    if calm and all(line["replies"] == asked for line in rounds):
        assert [line["replies"] for line in federation.rounds(calm)] == [asked] * len(rounds)
        assert distance(model, model_of(federation, calm)) < SAME
        return "as in calm"
    assert distance(model, replay(federation, name, played(federation, name), scratch)) < SAME
    return "as played again"


def require_sound_charges(federation: Federation, name: str, killed: Mapping[str, int], missed: int = 0) -> None:
    """Checks that each client paid once for each round, and once more at most where its worker died between.

    Args:
        federation: Where it was run.
        name: Of the job.
        killed: How often a client's worker was killed, by the client's name.
        missed: Rounds that a client may not have been asked for.
    """
    rounds = len(federation.rounds(name))
    for client in federation.clients:
        charges = client.charges(federation.job_of(name))
        assert set(charges) <= set(range(1, rounds + 1))
        assert len(charges) >= rounds - missed
        assert charges.total() <= len(charges) + killed.get(client.name, 0), (client.name, charges)


@pytest.mark.slow
def test_g9_a_run_outlives_the_sudden_death_of_each_of_its_processes_and_ends_with_the_model_of_a_calm_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    took: dict[str, float] = {}
    rounds = 32
    job = ("--clients", 2, "--rounds", rounds, "--records-per-client", 720)
    with Federation(tmp_path / "all", seeded=True) as federation:
        for client in federation.clients:
            client.join(*RICH)
        federation.start_clients()
        federation.finished(federation.run("calm", *job))
        first = federation.clients[0]
        run = federation.run("wild", *job)

        def kill(machine: Federation | Client, part: str) -> None:
            # Some time after the end of a round, and never the same, so that not all die while they idle.
            time.sleep(0.1 * len(took))
            until(lambda: part in machine.pids, f"a {part}")
            pid, told, began = machine.pids[part], len(federation.rounds("wild")), time.monotonic()
            os.kill(pid, signal.SIGKILL)
            until(lambda: machine.pids.get(part, pid) != pid, f"another {part}")
            # The reply to the round that is on may be there already; the one after it needs them all.
            federation.await_rounds("wild", told + 2)
            took[part] = time.monotonic() - began
            assert run.poll() is None

        federation.await_rounds("wild", 1)
        for part in ("worker", "courier", "supernode", "tunnel"):
            kill(first, part)
        for part in ("gateway", "relay", "enrolment"):
            kill(federation, part)
        time.sleep(0.5)
        run.kill()
        run.communicate()
        assert len(federation.rounds("wild")) < rounds - 2
        began, told = time.monotonic(), len(federation.rounds("wild"))
        run = federation.run("wild", resume=True)
        federation.await_rounds("wild", told + 1)
        took["server run"] = time.monotonic() - began
        # What keeps the processes of a machine up dies too, and all of them with it.
        machine = first.process
        assert machine is not None
        machine.kill()
        machine.communicate()
        until(lambda: not alive(first.pids.values()), "the end of what it had started", 30.0)
        told, began = len(federation.rounds("wild")), time.monotonic()
        first.begin()
        first.ready()
        federation.await_rounds("wild", told + 1)
        took["client start"] = time.monotonic() - began
        summary = federation.finished(run)
        assert (summary["status"], summary["rounds"]) == ("finished", rounds)
        assert [line["replies"] for line in federation.rounds("wild")] == [2] * rounds
        verified(federation, "wild")
        require_sound_charges(federation, "wild", {first.name: 2})
        assert require_right_model(federation, "wild", tmp_path / "again", "calm") == "as in calm"
    with capsys.disabled():
        usual = usual_s(federation, "calm")
        rounded = {part: round(seconds, 1) for part, seconds in took.items()}
        print(f"\na calm round {usual:.1f} s; seconds from a death to the end of a round: {rounded}")
    assert max(took.values()) < 60 + 30 * usual


def usual_s(federation: Federation, name: str) -> float:
    """Returns the seconds of a round in the middle of all, which tell how busy the machine is."""
    seconds = sorted(line["seconds"] for line in federation.rounds(name))
    return float(seconds[len(seconds) // 2])


def alive(pids: Iterable[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_job_waits_for_a_servers_machine_that_was_off_for_longer_than_the_relay_keeps_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ("--clients", 2, "--rounds", 8, "--records-per-client", 400)
    with Federation(tmp_path / "all", seeded=True) as federation:
        for client in federation.clients:
            client.join(*RICH)
        federation.start_clients()
        run = federation.run("job", *job)
        federation.await_rounds("job", 2)
        server, pids = federation.server, federation.pids
        assert server is not None
        server.kill()
        server.communicate()
        until(lambda: not alive(pids.values()), "the end of what it had started", 30.0)
        told, off = len(federation.rounds("job")), 75.0
        time.sleep(off)
        # A round is neither lost nor played without anybody.
        assert len(federation.rounds("job")) <= told + 1
        assert "is tacit server start on?" in federation.log()
        assert run.poll() is None
        began = time.monotonic()
        federation.begin()
        federation.await_rounds("job", told + 2)
        took = time.monotonic() - began
        summary = federation.finished(run)
        assert (summary["status"], summary["rounds"]) == ("finished", 8)
        verified(federation, "job")
        require_sound_charges(federation, "job", {})
        assert [line["replies"] for line in federation.rounds("job")] == [2] * 8
        assert require_right_model(federation, "job", tmp_path / "again") == "as played again"
    with capsys.disabled():
        print(f"\nafter {off:g} s without a server's machine, a round ended {took:.1f} s after its start")
    assert took < 60 + 30 * usual_s(federation, "job")


# -- clients that are slow, shut out, or gone --------------------------------------------------------------------------


@pytest.mark.slow
def test_rounds_go_on_without_a_client_that_is_slow_one_that_is_revoked_and_one_that_is_gone_for_ever(
    tmp_path: Path,
) -> None:
    def replies() -> list[int]:
        return [line["replies"] for line in federation.rounds("job")]

    def await_a_round_of(count: int, after: int) -> int:
        until(lambda: count in replies()[after:], f"a round with {count} replies after {replies()}")
        return len(replies())

    with Federation(tmp_path / "all", ("slow", "revoked", "gone"), seeded=True) as federation:
        slow, revoked, gone = federation.clients
        for client in federation.clients:
            client.join(*RICH)
        federation.start_clients()
        job = ("--clients", 3, "--rounds", 60, "--records-per-client", 400, "--round-timeout", 12)
        run = federation.run("job", *job)
        done = await_a_round_of(3, 0)
        worker = slow.pids["worker"]
        os.kill(worker, signal.SIGSTOP)
        done = await_a_round_of(2, done)
        os.kill(worker, signal.SIGCONT)
        # It answers what it was asked too late, and takes its part again.
        done = await_a_round_of(3, done)
        federation.tell("server", "revoke", "revoked", "--home", federation.home)
        done = await_a_round_of(2, done)
        paid = revoked.charges()
        gone.vanish()
        done = await_a_round_of(1, done)
        begun = len(replies())
        federation.await_rounds("job", begun + 1)
        assert replies()[begun:] == [1] * len(replies()[begun:])
        # Nobody who is shut out is asked for anything.
        assert revoked.charges() == paid
        run.send_signal(signal.SIGTERM)
        summary = federation.finished(run, code=130)
        assert summary["status"] == "interrupted"
        verified(federation, "job")
        for client in federation.clients:
            assert set(client.charges().values()) == {1}
        report = json.loads((federation.folder / "job" / "report.json").read_bytes())
        assert report["run"]["status"] == "interrupted"
        # The model is what the answers that came make of it, played again in this process.
        model, recorded = model_of(federation, "job"), played(federation, "job")
        assert {len(members) for members in recorded.values()} == {1, 2, 3}
        assert distance(model, replay(federation, "job", recorded, tmp_path / "again")) < SAME
        # Twin: one answer more, or one less, is another model.
        short = next(
            number for number, members in recorded.items() if members == {"slow", "revoked"} or len(members) == 2
        )
        other = {**recorded, short: frozenset({"slow", "revoked", "gone"})}
        assert distance(model, replay(federation, "job", other, tmp_path / "other")) > 1e-3


# -- machines with addresses of their own ------------------------------------------------------------------------------


class Network:
    """Network namespaces on one switch, one for each machine; nothing outside them is touched."""

    def __init__(self, machines: Sequence[str]) -> None:
        self._mark = f"tacit-{os.getpid()}"
        self._switch = f"{self._mark}-switch"
        self._made: list[str] = []
        self.machines = list(machines)

    @staticmethod
    def _ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")

    def _add(self, name: str) -> None:
        self._ip("netns", "add", name)
        self._made.append(name)
        self._ip("-n", name, "link", "set", "lo", "up")

    def __enter__(self) -> Self:
        if shutil.which("ip") is None:
            pytest.skip("no ip command")
        try:
            self._add(self._switch)
            self._ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            self._ip("-n", self._switch, "link", "set", "bridge", "up")
            for number, machine in enumerate(self.machines, start=1):
                name, port = f"{self._mark}-{machine}", f"port{number}"
                self._add(name)
                self._ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._switch)
                self._ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
                self._ip("-n", name, "link", "set", "eth0", "up")
                self._ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
        except OSError as error:
            self.__exit__()
            pytest.skip(f"network namespaces are not permitted here: {error}")
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(self._made):
            with contextlib.suppress(OSError):
                self._ip("netns", "del", name)

    def at(self, machine: str) -> list[str]:
        """Returns the words that run a command on a machine."""
        return ["ip", "netns", "exec", f"{self._mark}-{machine}"]

    def link(self, machine: str, state: str) -> None:
        """Cuts a machine's link ("down") or heals it ("up")."""
        self._ip("-n", self._switch, "link", "set", f"port{self.machines.index(machine) + 1}", state)


@pytest.mark.slow
def test_across_networks_what_is_cut_killed_and_healed_ends_with_the_model_of_the_answers_that_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, rounds = ("north", "east", "south"), 16
    took: dict[str, float] = {}
    with (
        Network(["server", *names]) as network,
        Federation(tmp_path / "all", names, seeded=True, host="10.77.0.1", at=network.at) as federation,
    ):
        for client in federation.clients:
            client.join(*RICH)
        federation.start_clients()
        job = ("--clients", 3, "--rounds", rounds, "--records-per-client", 400)
        run = federation.run("wild", *job)
        _, east, south = federation.clients

        def told() -> int:
            return len(federation.rounds("wild"))

        def go_on(what: str) -> None:
            """Waits for the end of the round that is on and of the one after it, which needs everybody."""
            took[what] = federation.await_rounds("wild", told() + 2)

        def kill(machine: Federation | Client, part: str) -> None:
            # A SuperNode is ended with its courier.
            until(lambda: part in machine.pids, f"a {part}")
            pid = machine.pids[part]
            os.kill(pid, signal.SIGKILL)
            until(lambda: machine.pids.get(part, pid) != pid, f"another {part}")

        federation.await_rounds("wild", 1)
        network.link("east", "down")
        before = told()
        # Each of its processes dies while nobody can reach it.
        for part in ("worker", "courier", "supernode", "tunnel"):
            kill(east, part)
        time.sleep(5)
        # It was asked and could not answer; at most the round that was on when the link was cut is over.
        assert told() <= before + 1
        network.link("east", "up")
        go_on("a client's link, all its processes killed")
        # A machine that is cut off and loses its power comes back too.
        network.link("south", "down")
        south.vanish()
        network.link("south", "up")
        south.begin()
        south.ready()
        go_on("a client's machine")
        network.link("server", "down")
        before = told()
        for part in ("gateway", "relay", "enrolment"):
            kill(federation, part)
        assert told() <= before + 1
        network.link("server", "up")
        go_on("the server's link, all its processes killed")
        network.link("east", "down")
        end_run(run)
        network.link("east", "up")
        assert told() < rounds - 1
        summary = federation.finished(federation.run("wild", resume=True))
        assert (summary["status"], summary["rounds"]) == ("finished", rounds)
        verified(federation, "wild")
        missing = sum(3 - line["replies"] for line in federation.rounds("wild"))
        require_sound_charges(federation, "wild", {east.name: 1, south.name: 1}, missed=missing)
        # Nobody's answer missing, that is the model of an undisturbed run in one process.
        require_right_model(federation, "wild", tmp_path / "again")
    with capsys.disabled():
        rounded = {what: round(seconds, 1) for what, seconds in took.items()}
        print(f"\nreplies missing: {missing}; seconds from healing to two rounds: {rounded}")
    assert max(took.values()) < 60 + 30 * usual_s(federation, "wild")


def end_run(run: subprocess.Popen[str]) -> None:
    """Kills the server application; ``ip netns exec`` becomes its command, so that it is the process itself."""
    assert b"tacit" in Path(f"/proc/{run.pid}/cmdline").read_bytes()
    run.kill()
    run.communicate()
