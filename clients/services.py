"""The processes of a data holder's machine: worker, tunnel, SuperNode, courier.

    worker      holds records, keys and ledger, and answers sealed messages: `clients.worker`
    tunnel      speaks TLS with the holder's certificate to the gateway: `clients.tunnel`
    supernode   Flower's SuperNode on loopback
    courier     carries sealed messages between the SuperNode and the worker: `clients.courier`

Started together (``tacit client start``) they run under one user of the machine, and the report then says that the
guarantee depends on Flower's processes leaving the worker's files alone (guarantee G15). Started apart, each under a
user of its own, only the worker can read data, ledger and keys; ``--courier-group`` lets the courier reach its socket.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Final

from clients.data import load_source
from clients.holder import Holder, Kept, SecureSources, content_of
from clients.home import ClientHome
from clients.isolation import read_note
from clients.jobs import Jobs, Policy
from clients.tunnel import Tunnel, Way
from clients.worker import Worker
from models.catalog import find_task
from privacy.errors import PlanError, RunError
from privacy.exposition import Figure, one
from privacy.files import write_whole
from privacy.identity.authority import facts_of, read_certificate
from privacy.identity.loopback import write_loopback
from privacy.ledger import Book
from privacy.processes import Part
from privacy.transcript import read_ledger
from privacy.vault import Safe, SealedLog, private, private_logger
from privacy.vault.unlock import handed_on

# Seconds that a round which is on gets where the client is told to stop.
ROUND_S: Final = 600.0


class Places:
    """Files and ports that the processes of one machine meet at; all of them on loopback, or for this user alone."""

    def __init__(self, home: ClientHome) -> None:
        """Names the places of a home."""
        self.home, self.folder = home, home.folder / "run"
        self.worker = self.folder / "worker.sock"
        self.secret = self.folder / "runtime.secret"
        self.loopback, self.loopback_authority = self.folder / "loopback.pem", self.folder / "loopback-ca.pem"
        self.status = self.folder / "status.json"
        self.logs = home.folder / "logs"
        self.jobs = home.folder / "jobs"
        self.policy = home.folder / "policy.json"
        self._ports = self.folder / "ports"

    @property
    def ports(self) -> tuple[int, int]:
        """The tunnel's port and that of the SuperNode's runtime interface.

        Raises:
            RunError: The client was never started.
        """
        try:
            tunnel, runtime = map(int, self._ports.read_text().split())
        except (OSError, ValueError):
            raise RunError(f"expected a client at {self.home.folder}, got none; start it: tacit client start") from None
        return tunnel, runtime

    def prepare(self) -> None:
        """Makes what a start needs: ports, the secret of the runtime interface, a certificate for loopback.

        Raises:
            IdentityError: The client has not joined, or another process joins or renews there.
            RunError, VaultError: A folder cannot be written, or the keyring does not open.
        """
        # Keys of a home that an older Tacit made are sealed now, before anything reads them.
        self.home.seal()
        self.home.share_ring(self.folder)
        Jobs(self.jobs).take_in()
        private.write(self.secret, os.urandom(32))
        write_whole(self._ports, " ".join(map(str, _free_ports(2))).encode())
        write_loopback(self.folder, now=time.time())


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def parts_of(places: Places, *, device: str = "cpu") -> list[Part]:
    """Returns the processes of a data holder's machine, in the order in which they start.

    Args:
        places: Where they meet; prepared.
        device: Where training runs.
    """
    tunnel, runtime = places.ports
    tacit = [sys.executable, "-m", "tacit", "client"]
    home = ["--home", str(places.home.folder)]
    supernode = [
        str(Path(sys.executable).with_name("flower-supernode")),
        *("--superlink", f"127.0.0.1:{tunnel}", "--root-certificates", str(places.loopback_authority)),
        *("--auth-supernode-private-key", str(places.home.supernode_key)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(places.secret)),
        *("--host", "127.0.0.1", "--port", str(runtime)),
    ]
    flower = {"FLWR_HOME": str(places.folder / "flower"), "FLWR_DISABLE_UPDATE_CHECK": "1"}
    # Where sealed files are opened, and nowhere else: Flower's processes and the courier get what they need, opened.
    opens = handed_on()
    return [
        Part(
            name="worker",
            command=[*tacit, "worker", *home, "--device", device],
            environment=opens,
            ready=lambda: _serves(places.worker),
            grace_s=60.0,
        ),
        Part(name="tunnel", command=[*tacit, "tunnel", *home], environment=opens, ready=lambda: _answers(tunnel)),
        Part(
            name="supernode",
            command=supernode,
            environment=flower,
            opened=(places.home.supernode_key, places.secret),
            ready=lambda: _answers(runtime),
        ),
        # It is ended first, and ends when the round that is on has been answered. A SuperNode waits a minute for the
        # answer of a courier that is gone, and takes no other message meanwhile.
        Part(
            name="courier",
            command=[*tacit, "courier", *home, "--secret", str(places.secret)],
            environment=flower,
            opened=(places.secret,),
            grace_s=ROUND_S,
            takes_along=("supernode",),
        ),
    ]


def _serves(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def tunnel_of(places: Places) -> Tunnel:
    """Returns the tunnel of a home; it trusts bundles that the pinned server application signed (guarantee G22)."""
    settings, home = places.home.settings, places.home
    gateway = settings.addresses[0]
    return Tunnel(
        Way(
            gateway_host=gateway.host,
            gateway_port=gateway.port,
            authority=home.authority_file,
            certificate=home.tls,
            key=home.tls,
            trusted=[settings.server],
            port=places.ports[0],
            local_certificate=places.loopback,
            local_key=places.loopback,
        )
    )


def policy_of(places: Places) -> Policy:
    """Returns the standing policy of a home: what it accepts unasked, within what the holder allowed when it joined.

    Raises:
        PlanError: The policy cannot be read.
    """
    joined, standing = places.home.settings.policy, Policy.load(places.policy)
    # The join bounds what may be asked at all; what is accepted without asking is a choice of its own.
    return Policy(
        tasks=standing.tasks,
        epsilon=standing.epsilon,
        metrics=frozenset(joined.allow_metrics),
        central=joined.allow_central,
    )


def worker_of(places: Places, *, code: str, device: str = "cpu") -> Worker:
    """Returns the worker of a home; from here on details of faults go to its sealed log (guarantee G12).

    Args:
        places: The home's places.
        code: SHA-256 of this program; terms for another program are refused.
        device: Where training runs.

    Raises:
        TacitError: The client has not joined, its keys or its ledger are damaged, or there is no such device.
    """
    home, settings = places.home, places.home.settings
    _require_device(device)
    secret = home.secret()
    task = find_task(settings.task)
    source = load_source(task, data=settings.data or None, strict=False, opens=lambda: home.openers(settings.keys))
    book = Book(Path(settings.ledger))
    logger = private_logger("tacit.client")
    logger.addHandler(SealedLog(home.folder / "log", secret))
    holder = Holder(
        name=settings.data_set,
        task=task,
        shape=source.shape,
        load=lambda: source.train,
        book=book,
        kept=Kept(home.folder / "kept", durable=True, safe=Safe(secret, "kept")),
        sources=SecureSources(),
        commitment=book.secret.commitment(settings.data_set, content_of(source.train)),
        code=code,
        device=device,
    )
    return Worker(
        holder,
        identity=home.identity(),
        server=settings.server,
        jobs=Jobs(places.jobs),
        policy=lambda: policy_of(places),
        code=code,
    )


def _require_device(device: str) -> None:
    """Finds before any job, and so before any charge, that nothing can be trained there."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PlanError(
            f"expected a device that PyTorch can use here, got {device!r} ({str(error).splitlines()[0]}); look with: "
            "tacit client preflight, or train on the CPU with --device cpu"
        ) from None


def figures_of(home: ClientHome) -> list[Figure]:
    """Returns what a holder may watch on its own machine, and nobody else: what was spent is its own affair.

    Raises:
        TacitError: The client has not joined, or its ledger is damaged.
    """
    settings, note = home.settings, read_note(home)
    account = read_ledger(Path(settings.ledger)).accounts[settings.data_set]
    until = facts_of(read_certificate(home.tls)).until
    return [
        one("tacit_rounds_answered_total", "Rounds answered since the worker was started.", note.rounds if note else 0),
        one("tacit_epsilon_spent", "Spent of the data set's budget, by the holder's own filter.", account.spent),
        one("tacit_epsilon_granted", "The data set's budget.", account.grant.epsilon),
        one("tacit_charges_total", "Charges in the ledger.", account.charges),
        one("tacit_certificate_until_seconds", "When the certificate expires, in seconds since 1970.", until),
    ]
