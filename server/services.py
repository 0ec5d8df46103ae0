"""The processes of a server's machine: relay, gateway, enrolment; and who is let in at the relay.

    relay        Flower's SuperLink on loopback; it holds sealed messages and nothing else
    gateway      the one door that data holders reach: `server.gateway`; keeps the relay's list of SuperNodes too
    enrolment    the door where invitations are redeemed: `server.enrol`

The server application is not among them: it runs while a job does (``tacit server run``), and its keys are apart.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from privacy.errors import IdentityError, RunError, TacitError
from privacy.exposition import Figure, one
from privacy.files import write_whole
from privacy.identity.loopback import write_loopback
from privacy.identity.supernode import supernode_pem
from privacy.processes import Part
from privacy.vault import private
from privacy.vault.unlock import handed_on
from server.enrol import Member, Registry, State
from server.gateway import Door, Gateway
from server.home import ServerHome
from server.relay import Control

# The bell of a gateway that runs as another user; see `server.units`.
BELL: Final = Path("/run/tacit-gateway/bell")

_log = logging.getLogger("tacit.server")
_ROSTER_S: Final = 1.0
_COUNTED_S: Final = 5.0


class Places:
    """Files and ports that the processes of one machine meet at; all of them on loopback, or for this user alone."""

    def __init__(self, home: ServerHome) -> None:
        """Reads where a home's relay listens; the port is chosen once, at its first start."""
        self.home, self.folder = home, home.folder / "relay"
        self.secret = self.folder / "runtime.secret"
        self.database = self.folder / "state.db"
        self.loopback, self.loopback_authority = self.folder / "loopback.pem", self.folder / "loopback-ca.pem"
        # Where the gateway hears that there are messages: here, or where units of another user put it.
        self.bell = self.folder / "bell"
        self.bells = (self.bell, BELL)
        self.counters = self.folder / "gateway.json"
        self.job = home.folder / "application" / "running.json"
        self.status = home.folder / "status.json"
        self.logs = home.folder / "logs"
        self._port = self.folder / "port"

    @property
    def port(self) -> int:
        """The relay's port.

        Raises:
            RunError: It was never started.
        """
        try:
            return int(self._port.read_text())
        except (OSError, ValueError):
            raise RunError(f"expected a relay at {self.home.folder}, got none; start it: tacit server start") from None

    @property
    def address(self) -> str:
        """The relay's "HOST:PORT"."""
        return f"127.0.0.1:{self.port}"

    def prepare(self) -> None:
        """Makes what a start needs: a port, the secret of the runtime interface, a certificate for loopback.

        Raises:
            RunError, VaultError: A folder cannot be written, or its keyring does not open.
        """
        # Keys of a home that an older Tacit made are sealed now, before anything reads them.
        self.home.seal()
        if not self.secret.exists():
            private.write(self.secret, os.urandom(32))
        private.seal(self.secret)
        if not self._port.exists() or not _free(self.port):
            write_whole(self._port, str(_free_port()).encode())
        write_loopback(self.folder, now=time.time())


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def answers(host: str, port: int) -> bool:
    """Says whether somebody listens."""
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def parts_of(places: Places, *, environment: Mapping[str, str]) -> list[Part]:
    """Returns the processes of a server's machine, in the order in which they start.

    Args:
        places: Where they meet; prepared.
        environment: What they get beside the common variables: the passphrase of the authority, if it has one, for the
            enrolment alone.
    """
    home = places.home
    tacit = [sys.executable, "-m", "tacit", "server"]
    # Where sealed files are opened, and nowhere else: the relay gets what it needs, opened.
    opens = handed_on()
    port, gateway = places.port, home.settings.addresses[0].port
    relay = [
        str(Path(sys.executable).with_name("flower-superlink")),
        *("--ssl-certfile", str(places.loopback), "--ssl-keyfile", str(places.loopback)),
        *("--ssl-ca-certfile", str(places.loopback_authority), "--enable-supernode-auth"),
        *("--isolation", "process", "--superexec-auth-secret-file", str(places.secret)),
        *("--database", str(places.database), "--host", "127.0.0.1", "--port", str(port)),
        "--disable-runtime-dependency-installation",
    ]
    flower = {"FLWR_HOME": str(places.folder / "flower"), "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return [
        Part(
            name="relay",
            command=relay,
            environment=flower,
            opened=(places.loopback, places.secret),
            ready=lambda: answers("127.0.0.1", port),
        ),
        Part(
            name="gateway",
            command=[*tacit, "gateway", "--home", str(home.folder)],
            environment=flower | opens,
            ready=lambda: answers("127.0.0.1", gateway),
        ),
        Part(
            name="enrolment",
            command=[*tacit, "enrol", "--home", str(home.folder)],
            environment=opens | dict(environment),
            ready=lambda: answers("127.0.0.1", home.settings.enrol[0].port),
        ),
    ]


def gateway_of(places: Places, *, bell: Path | None = None, group: int | None = None) -> Gateway:
    """Returns the gateway of a home; it lets in who is enrolled, as the list of members says at every request.

    Args:
        places: The home's places.
        bell: Where it hears that there are messages, if not in the home.
        group: Group whose members may ring too, where the server application runs as another user.
    """
    home = places.home
    registry = Registry.of(home)
    return Gateway(
        Door(
            host="",
            port=home.settings.addresses[0].port,
            certificate=home.relay_tls,
            key=home.relay_tls,
            authority=home.folder / "relay" / "ca.pem",
            upstream_port=places.port,
            upstream_authority=places.loopback_authority,
            wake=bell or places.bell,
            wake_group=group,
        ),
        registry.name_of,
        registry.node_key,
    )


class Roster:
    """Keeps the relay's list of SuperNodes to the list of members: enrolled ones are let in, revoked ones shut out."""

    def __init__(self, places: Places) -> None:
        """Prepares; `keep` runs it in a thread of its own."""
        self._places = places
        self._registry = Registry.of(places.home)
        self._settled: Mapping[str, Member] | None = None

    def settle(self) -> None:
        """Makes the two lists agree, once.

        Who is shut out comes first, and one node that cannot be let in or shut out holds up no other.

        Raises:
            RunError: The relay does not answer, or refuses a node.
            IdentityError: The list of members is damaged, or a key in it.
        """
        members = self._registry.members()
        if members is self._settled:
            return
        control = Control(self._places.address, self._places.loopback_authority)
        faults: list[TacitError] = []
        wanted = set()
        for member in members.values():
            try:
                wanted |= {supernode_pem(member.supernode)} if member.state is State.ENROLLED else set()
            except IdentityError as error:
                faults.append(error)
        there = control.nodes()
        out, new = sorted(there.keys() - wanted), sorted(wanted - there.keys())
        steps: list[Callable[[], object]] = [functools.partial(control.unregister, there[key]) for key in out]
        steps += [functools.partial(control.register, key) for key in new]
        for step in steps:
            try:
                step()
            except RunError as error:
                faults.append(error)
        if faults:
            raise faults[0]
        self._settled = members

    def keep(self, stop: threading.Event) -> None:
        """Settles again and again, until told to stop; whatever fails is tried again."""
        while not stop.wait(_ROSTER_S):
            try:
                self.settle()
            except (TacitError, OSError) as error:
                _log.warning("the relay's list of nodes is not up to date yet: %s", error)


def members_of(places: Places) -> list[tuple[Member, int]]:
    """Returns the enrolled members with Flower's ids of their SuperNodes, by name.

    Raises:
        RunError: The relay does not answer.
        IdentityError: The list of members is damaged.
    """
    there = Control(places.address, places.loopback_authority).nodes()
    found = []
    for _, member in sorted(Registry.of(places.home).members().items()):
        if member.state is State.ENROLLED:
            try:
                found.append((member, there.get(supernode_pem(member.supernode), 0)))
            except IdentityError:
                _log.warning("the key of %s is damaged", member.name)
    return found


def connected(places: Places) -> list[dict[str, object]]:
    """Returns the enrolled members and whether their SuperNodes are connected, by name.

    Raises:
        RunError: The relay does not answer.
    """
    online = Control(places.address, places.loopback_authority).online()
    return [
        {"name": member.name, "node": str(node), "connected": node in online} for member, node in members_of(places)
    ]


class Counted:
    """Keeps a file with a gateway's counters, for the supervisor's metrics: words and numbers, no names."""

    def __init__(self, places: Places, gateway: Gateway) -> None:
        """Prepares; `keep` runs it in a thread of its own."""
        self._path, self._gateway = places.counters, gateway

    def tell(self) -> None:
        """Writes the file; raises RunError where the disk is full."""
        told = {"pid": os.getpid(), "counters": dict(self._gateway.counters)}
        write_whole(self._path, json.dumps(told).encode(), durable=False)

    def keep(self, stop: threading.Event) -> None:
        """Writes it again and again, until told to stop."""
        while not stop.wait(_COUNTED_S):
            try:
                self.tell()
            except TacitError as error:
                _log.warning("the gateway's counters are not up to date: %s", error)


def counters_of(places: Places) -> dict[str, int]:
    """Returns a gateway's counters, or none where there are none yet."""
    try:
        counters = json.loads(places.counters.read_bytes())["counters"]
        return {str(word): int(count) for word, count in counters.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


class Progress:
    """What the server application says of the job that is on, to the operator's other commands.

    Public facts alone: rounds, and each member's last fixed word. No figure of a model, no number of replies.
    """

    def __init__(self, places: Places, **facts: object) -> None:
        """Begins: ``facts`` are the job's identity, its run folder, its task and its rounds."""
        self._path = places.job
        self._told: dict[str, object] = {"pid": os.getpid(), "status": "waiting", "round": 0, "members": {}} | facts
        self.tell()

    def tell(self, **changes: object) -> None:
        """Takes down what has changed; a disk that is full stops no job here."""
        changed = self._told | changes
        if changed != self._told or "updated" not in self._told:
            self._told = changed | {"updated": int(time.time())}
            try:
                write_whole(self._path, json.dumps(self._told).encode(), durable=False)
            except TacitError as error:
                _log.warning("the job's progress could not be written: %s", error)


# What an operator does where a client answers a job with one of these words.
_REMEDIES: Final = {
    "other-program": "runs another Tacit than this server; bring both to one version",
    "other-task": "joined with another task, or its data has another shape",
    "refused": "was refused by its holder",
    "waiting": "waits for its holder's decision; there: tacit client jobs",
    "not connected": "is it started? there: tacit client start",
}


def told_by(members: Mapping[str, str]) -> str:
    """Returns what each member of a job said last, in words for an operator."""
    return "; ".join(
        f"{name}: {word}" + f" ({_REMEDIES.get(word)})" * (word in _REMEDIES) for name, word in members.items()
    )


def job_of(places: Places) -> dict[str, Any] | None:
    """Returns what the server application said of its last job, or None where it had none; ``on`` says if it runs."""
    try:
        told: dict[str, Any] = json.loads(places.job.read_bytes())
        if type(told["pid"]) is not int or not isinstance(told["members"], dict):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        os.kill(told["pid"], 0)
        alive = True
    except ProcessLookupError:
        alive = False
    except PermissionError:
        alive = True
    return told | {"on": alive and told["status"] in ("waiting", "running")}


def figures_of(places: Places) -> list[Figure]:
    """Returns what an operator may watch: who is there, how far the job is, what the gateway saw; nothing of data."""
    members = Registry.of(places.home).members().values()
    figures = [
        Figure(
            "tacit_members",
            "Data holders by their state.",
            [({"state": state.value}, sum(member.state is state for member in members)) for state in State],
        ),
    ]
    with contextlib.suppress(RunError):
        there = sum(bool(member["connected"]) for member in connected(places))
        figures.append(one("tacit_members_connected", "Enrolled data holders whose SuperNode is connected.", there))
    job = job_of(places)
    on = job is not None and job["on"]
    figures.append(one("tacit_job_running", "Whether a job is on.", float(on)))
    if job is not None:
        figures.append(one("tacit_job_round", "Rounds that the last job has finished.", int(job["round"])))
        figures.append(one("tacit_job_rounds", "Rounds that the last job has in all.", int(job.get("rounds", 0))))
    figures.append(
        Figure(
            "tacit_gateway_events_total",
            "What happened at the gateway.",
            [({"event": word}, count) for word, count in sorted(counters_of(places).items())],
        )
    )
    return figures
