"""From a run to a running inference service, and the whole flow on one machine: train, publish, ask, compare.

The service is the server's and the questions are a client's; what lies here is what needs both: reading a data set's
public shape and preprocessing (`clients.data`) to publish a head with (`server.heads`), and the demonstration.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from clients.data import load_source
from clients.home import ClientHome, Policy
from clients.inference import Asker, Reply, Service
from clients.join import Choices, join
from clients.question import preparation
from models.catalog import find_task
from privacy.asking import ANSWER_OVERHEAD, QUERY_OVERHEAD
from privacy.enrolment import Address
from privacy.errors import PlanError, RunError
from privacy.he import HeadDescription
from privacy.identity import Secret
from privacy.identity.authority import Authority
from privacy.vault.keys import Opener
from privacy.vault.unlock import keyring_at
from server import inference as service_room
from server.checkpoint import load
from server.door import Threshold
from server.enrol import Registry, invite, listen, serve
from server.heads import Published, Terms, publish, split_of
from server.home import ServerHome
from simulations.evidence import SERVER_KEY
from simulations.scenario import Scenario
from simulations.world import vault_of

Floats: TypeAlias = NDArray[np.float64]
_START_S: Final = 120.0


def published_of(
    folder: Path,
    home: ServerHome,
    *,
    name: str = "",
    terms: Terms | None = None,
    feature_range: float | None = None,
    force: bool = False,
) -> Published:
    """Publishes the head of a run, simulated or deployed, under a server's home.

    Args:
        folder: The run folder.
        home: The server's home. The report of a deployed run must be signed by its application.
        name: Of the head; the task's by default.
        terms: How it may be asked.
        feature_range: Bound on the features; by default what the layers promise.
        force: Publishes a head that no report vouches for too (guarantee G23).

    Raises:
        TacitError: As `server.heads.publish`; or the data set's public facts cannot be read.
    """
    scenario = Scenario.from_run(folder)
    try:
        task = find_task(scenario.task)
    except LookupError as error:
        raise PlanError(str(error)) from None
    source = load_source(task, data=scenario.data or None)
    own = folder / SERVER_KEY
    return publish(
        folder,
        shape=source.shape,
        classes=source.classes,
        prepare=preparation(task, scenario.data),
        secret=home.application_secret().derive("tacit/infer/models"),
        name=name,
        terms=terms,
        feature_range=feature_range,
        keys=_openers(folder, scenario, home),
        signer=Secret.load_or_create(own).identity("server").public_key if own.exists() else home.settings.application,
        force=force,
    )


def _openers(folder: Path, scenario: Scenario, home: ServerHome) -> list[Opener]:
    """What must open the checkpoint of a run: its own keyring, or for a deployed run the home's; none if not sealed."""
    if scenario.vault:
        return vault_of(scenario)
    # A simulated run has a key of its own, and its checkpoint is in clear.
    ring = None if (folder / SERVER_KEY).exists() else keyring_at(str(home.folder / "application" / "vault.keys"))
    return [] if ring is None else [ring]


def service_of(
    published: Sequence[Published], home: ServerHome, *, host: str = "", port: int = 0, evaluators: int = 1
) -> service_room.Service:
    """Returns the service of a home, not started yet; it lets in who is enrolled, at every request.

    Args:
        published: The heads.
        home: The server's home.
        host: Address to listen on; empty for all of IPv4.
        port: TCP port; 0 for any free one.
        evaluators: Number of processes that evaluate.
    """
    registry = Registry.of(home)

    def key_of(name: str) -> str | None:
        member = registry.members().get(name)
        return member.application if member is not None else None

    return service_room.Service(
        Threshold(
            host=host,
            port=port,
            certificate=home.relay_tls,
            key=home.relay_tls,
            authority=home.folder / "relay" / "ca.pem",
            limits=service_room.limits_of(published),
        ),
        registry.name_of,
        key_of,
        published,
        home.application_identity(),
        home.folder / "application" / "infer",
        home.application_secret(),
        evaluators=evaluators,
    )


# -- the demonstration ------------------------------------------------------------------------------------------------


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def federation(folder: Path, names: Sequence[str] = ("clinic-a",)) -> tuple[ServerHome, list[ClientHome]]:
    """Makes a server's home on loopback and enrols clients with it, by invitation and join as on separate machines.

    Args:
        folder: Where their homes are made.
        names: Of the clients.
    """
    gateway, enrolment = _free_ports(2)
    home = ServerHome.create(
        folder / "server",
        name="demo",
        addresses=[Address("127.0.0.1", gateway)],
        enrol=[Address("127.0.0.1", enrolment)],
    )
    listener, stop = listen("127.0.0.1", enrolment), threading.Event()
    desk = threading.Thread(
        target=serve, args=(home, Authority.read(home.folder / "authority"), listener), kwargs={"stop": stop}
    )
    desk.start()
    clients = []
    try:
        for name in names:
            client = ClientHome(folder / name)
            choices = Choices(task="digits", data="", policy=Policy(epsilon=1.0, delta=1e-5, records_bound=1000))
            join(invite(home, name), client, choices, version="0.1.0")
            clients.append(client)
    finally:
        stop.set()
        desk.join(20)
    return home, clients


@contextlib.contextmanager
def served(run: Path, home: ServerHome, *flags: str) -> Iterator[Address]:
    """Runs ``tacit infer serve`` on loopback, in a process of its own, while the block lasts; yields its address.

    Raises:
        RunError: It does not come up.
    """
    command = [sys.executable, "-m", "tacit", "infer", "serve", str(run), "--home", str(home.folder), "--json"]
    command += ["--listen", "127.0.0.1:0", *flags]
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH", "")) if path)
    with subprocess.Popen(  # noqa: S603 -- our own program
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    ) as process:
        try:
            assert process.stdout is not None  # noqa: S101 -- it was asked for
            line = process.stdout.readline()
            if not line:
                words = process.communicate(timeout=_START_S)[1].strip().rpartition("\n")[2]
                raise RunError(f"expected the inference service to start, got: {words}")
            yield Address("127.0.0.1", int(json.loads(line)["port"]))
        finally:
            process.terminate()
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def demonstrate(
    folder: Path,
    *,
    run: Path | None = None,
    records: int = 0,
    note: Callable[[str], None] = lambda text: None,
    train: Callable[[Path], object],
) -> dict[str, object]:
    """Shows the whole flow: a head that was trained with federated DP, asked under encryption, against plaintext.

    Args:
        folder: Where everything is kept.
        run: A run folder to publish; None trains the main job first.
        records: How many of the public test set to ask about; 0 for all.
        note: Gets a sentence at each step.
        train: Trains the main job into a folder.

    Returns:
        Facts: records, for how many every decrypted logit equals the plaintext integer's, how many predictions agree
        with the plaintext float head, accuracy, privacy, latencies in ms and bytes.

    Raises:
        TacitError: Anything that goes wrong on the way.
    """
    if run is None:
        run = folder / "run"
        note("training: digits, softmax regression, federated, each client with DP-SGD and a ledger")
        train(run)
    home, (client,) = federation(folder)
    note(f"publishing {run.name} on loopback over TLS 1.3; its report is checked first")
    scenario = Scenario.from_run(run)
    task = find_task(scenario.task)
    source = load_source(task, data=scenario.data or None)
    count = min(records or len(source.test), len(source.test))
    inputs, targets = source.test.inputs[:count], source.test.targets[:count]
    with served(run, home, "--queries", str(count), "--rate", "100000") as address:
        service = Service.of(client, address)
        began = time.perf_counter()
        asker = Asker.begin(service, client.identity(), queries=count)
        opened_ms = 1000 * (time.perf_counter() - began)
        note(f"asking about {count} records of the public test set, one encrypted query each")
        replies, parts = _asked(asker, inputs)
        service.close()
    state = load(run / "checkpoints" / "latest.ckpt", _openers(run, scenario, home))
    plain = split_of(task, source.shape, scenario.seed, state)
    features = plain(inputs)
    floats = features @ plain.weights.T + plain.bias
    labels = np.array([reply.label for reply in replies])
    logits = np.stack([reply.logits for reply in replies])
    offer = asker.offer
    whole = _integers(HeadDescription.from_bytes(offer.description), features, plain.weights, plain.bias)
    return {
        "task": scenario.task,
        "records": count,
        "exact": int((np.abs(logits - whole) < 1e-9 * np.abs(whole).max()).all(1).sum()),
        "agree": int((labels == floats.argmax(1)).sum()),
        "largest_difference": float(np.abs(logits - floats).max()),
        "accuracy": float((torch.from_numpy(labels) == targets).double().mean()),
        "accuracy_plaintext": float((torch.from_numpy(floats.argmax(1)) == targets).double().mean()),
        "privacy": dict(offer.privacy),
        "features": int(features.shape[1]),
        "classes": len(offer.classes),
        "session_ms": opened_ms,
        "latency_ms": parts,
        "bytes_up": offer.query_bytes + QUERY_OVERHEAD,
        "bytes_down": offer.answer_bytes + ANSWER_OVERHEAD,
        "keys_at_server": 0,
        "run": str(run),
    }


def _integers(description: HeadDescription, features: Floats, weights: Floats, bias: Floats) -> Floats:
    """Returns the logits of the head as integers, in plaintext, divided by their scale as a client does."""
    steps, scale = description.feature_scale, description.weight_scale
    shift = np.array([round(float(one) * steps * scale) for one in bias + description.centre * weights.sum(1)])
    whole = np.vstack([description.quantise(row) for row in features]) @ np.rint(weights * scale).T + shift
    return np.asarray(whole / (steps * scale), dtype=np.float64)


def _asked(asker: Asker, inputs: torch.Tensor) -> tuple[list[Reply], Mapping[str, Any]]:
    """Asks one by one, taking the time of each part; decrypts after the last answer, as `Asker.ask_many` does."""
    features = asker.features(inputs)
    asker.require_features(features)
    sealing, asking, opening = [], [], []
    answers = []
    for row in features:
        began = time.perf_counter()
        query = asker.seal(row)
        sealed = time.perf_counter()
        answers.append(asker.exchange(query))
        asking.append(1000 * (time.perf_counter() - sealed))
        sealing.append(1000 * (sealed - began))
    # Nothing more goes out once something was decrypted, not even the end of the connection (guarantee G25).
    asker.service.close()
    replies = []
    for pair in answers:
        began = time.perf_counter()
        replies.append(asker.open(*pair))
        opening.append(1000 * (time.perf_counter() - began))
    whole = sorted(sum(parts) for parts in zip(sealing, asking, opening, strict=True))
    return replies, {
        "p50": whole[len(whole) // 2],
        "p99": whole[min(len(whole) - 1, (99 * len(whole)) // 100)],
        "encrypt": statistics.median(sealing),
        "ask": statistics.median(asking),
        "decrypt": statistics.median(opening),
    }
