"""Measures, and compares within one run: ``python -m bench [NAME...] [--repeat 5] [--json FILE]``.

Every comparison interleaves the two sides, so that both see the same machine, and reports medians and their ratio.
The peers' scripts are looked for in ``$TACIT_PEERS`` or beside the repository in ``../shared/peers``; without them
their rows are skipped and say so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from privacy.ledger import Book, ChargeRequest
    from privacy.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(os.environ.get("TACIT_PEERS") or ROOT.parent / "shared" / "peers")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

# The peers' job: 2 clients, 10 rounds, batch 32 of 718 records, an epoch of 23 steps, noise 1, clip 1, rate 0.5.
PEER_JOB = {
    "task": "bench.tasks:PEER",
    "clients": 2,
    "rounds": 10,
    "steps-per-round": 23,
    "sample-rate": 32 / 718,
    "noise-multiplier": 1.0,
    "l2-clip": 1.0,
    "lr": 0.5,
}


class Skipped(Exception):  # noqa: N818 -- no error, an answer
    """A benchmark that cannot run here; its text says why."""


def tacit(*arguments: str, code: str = "") -> tuple[float, str]:
    """Runs the command, or a piece of code that uses the library, in a process of its own; seconds and output."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "tacit", *arguments]
    return timed(command, cwd=ROOT, env=os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)})


def timed(command: list[str], *, cwd: Path, env: dict[str, str]) -> tuple[float, str]:
    """Runs a command; returns its wall time in seconds and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{command[:4]} failed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return seconds, done.stdout


def simulate_here(
    keys: dict[str, object], folder: Path, on_round: Callable[[Mapping[str, object]], None] = lambda line: None
) -> list[dict[str, float]]:
    """Runs one job in this process; returns its rounds' lines."""
    from simulations.run import simulate
    from tacit import Scenario

    class Quiet:
        round = staticmethod(on_round)

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: None

    simulate(Scenario.layered(None, keys), out=folder, observer=Quiet())
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="tacit-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _peer_only(mode: str) -> str:
    """The peers' loop in one mode only, as a program: their file runs every mode when it is imported."""
    source = (PEERS / "opacus_bare_loop.py").read_text()
    return source.partition("run(); run(mode=")[0] + f'\nrun(mode="{mode}")\n'


def _need_peers() -> None:
    if not (PEERS / "opacus_bare_loop.py").exists():
        raise Skipped(f"no peers at {PEERS}; set TACIT_PEERS")


def dp_job(repeat: int) -> dict[str, object]:
    """The peers' private job: our rounds against theirs, and our whole process against theirs."""
    _need_peers()
    flags = [f"--{name}={value}" for name, value in PEER_JOB.items()]
    theirs, their_process, ours, our_process = [], [], [], []
    for _ in range(repeat):
        seconds, output = timed(
            [sys.executable, "-c", _peer_only("hooks")],
            cwd=PEERS / "flower_app",
            env=os.environ | ONE_THREAD | {"PYTHONPATH": str(PEERS / "flower_app")},
        )
        theirs.append(float(output.split()[2]))
        their_process.append(seconds)
        with scratch() as folder:
            seconds, _ = tacit("simulate", *flags, "--quiet", f"--out={folder / 'run'}")
            lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        ours.append(sum(line["seconds"] for line in lines))
        our_process.append(seconds)
    return {
        "ten rounds, hooks bare (s)": statistics.median(theirs),
        "ten rounds, tacit (s)": statistics.median(ours),
        "rounds, ratio (at most 1.0, target 0.7)": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "process, hooks bare (s)": statistics.median(their_process),
        "process, tacit (s)": statistics.median(our_process),
        "process, ratio (at most 1.5)": statistics.median(
            a / b for a, b in zip(our_process, their_process, strict=True)
        ),
    }


def deployed(repeat: int) -> dict[str, object]:
    """The peers' private job on two deployed clients, against a plain Flower app over SuperLink and SuperNodes."""
    from bench.deployed import compared

    _need_peers()
    # Each deployed client holds the whole data set; the expected batch is the peers'.
    job = PEER_JOB | {"records-per-client": 2 * 718, "sample-rate": 32 / (2 * 718)}
    with scratch() as folder:
        return compared(PEERS / "flower_app", folder, job, min(repeat, 2))


# The peers' own command runs their two clients one after the other; told otherwise, Flower runs both at once.
FLOWER_WAYS = {
    "as the peers run it": (),
    "clients at once": ("--federation-config", "num-supernodes=2 client-resources-num-cpus=1"),
}


def flower(repeat: int) -> dict[str, object]:
    """The peers' private job as a plain Flower app under ``flwr run``; needs no network, installs nothing."""
    _need_peers()
    flags = [f"--{name}={value}" for name, value in PEER_JOB.items()]
    ratios: dict[str, list[float]] = {}
    for _ in range(repeat):
        with scratch() as folder:
            our_seconds, _ = tacit("simulate", *flags, "--quiet", f"--out={folder / 'run'}")
            lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        for way, words in FLOWER_WAYS.items():
            seconds, train_seconds = _flwr_run(words)
            ours = sum(line["seconds"] for line in lines)
            ratios.setdefault(f"TRAIN_SECONDS / our rounds, {way} (at least 10)", []).append(train_seconds / ours)
            ratios.setdefault(f"whole process, {way} (at least 4)", []).append(seconds / our_seconds)
    return {row: statistics.median(values) for row, values in ratios.items()}


def _flwr_run(words: Sequence[str]) -> tuple[float, float]:
    """Runs the peers' app once; returns the seconds of the whole process, and what it prints as TRAIN_SECONDS."""
    with scratch() as folder:
        # Flower's run uses the app folder's own name; the peers' folder is only read.
        shutil.copytree(PEERS / "flower_app", folder / "app")
        env = os.environ | {
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        try:
            command = [str(Path(sys.executable).parent / "flwr"), "run", ".", "--stream", *words]
            seconds, output = timed(command, cwd=folder / "app", env=env)
        finally:
            _stop_superlink(folder / "home")
        found = re.search(r"TRAIN_SECONDS ([0-9.]+)", output)
        if not found:
            raise Skipped(f"flwr run printed no TRAIN_SECONDS: {output[-300:]}")
        return seconds, float(found[1])


def _stop_superlink(home: Path) -> None:
    """Ends the SuperLink that ``flwr run`` left running under this home."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "environ").read_bytes().split(b"\0")
            if f"FLWR_HOME={home}".encode() in words:
                os.kill(int(entry.name), signal.SIGTERM)


def engine(repeat: int) -> dict[str, object]:
    """What a client's round of a 100,000-parameter model costs beyond training, its noise, loading data and evaluating.

    The first round is not counted: there a process rehearses its training once, and files are made that later rounds
    fill again.
    """
    from clients import holder as clients_holder
    from privacy.dpsgd import PrivateTrainer
    from privacy.ledger import Book, Receipt
    from server import app as server_app
    from server.aggregate import Aggregator

    spent: dict[str, float] = {}

    def watch(owner: object, name: str, row: str) -> Callable[[], None]:
        function = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> object:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[row] = spent.get(row, 0.0) + time.perf_counter() - began

        setattr(owner, name, call)
        return lambda: setattr(owner, name, function)

    undo = [
        watch(PrivateTrainer, "train", "other"),
        watch(clients_holder.SecureSources, "__call__", "other"),
        watch(clients_holder.Holder, "records", "other"),
        watch(server_app, "evaluate", "other"),
        watch(Aggregator, "step", "mean"),
        watch(Book, "charge", "chain"),
        watch(clients_holder.Kept, "put", "chain"),
        watch(clients_holder.Kept, "get", "chain"),
        watch(server_app, "countersign", "chain"),
        watch(server_app, "write_lines", "chain"),
        watch(server_app, "save", "chain"),
    ]
    from_json = Receipt.from_json
    Receipt.from_json = lambda text: _added(spent, "chain", from_json, text)  # type: ignore[method-assign,assignment]
    clients, rounds = 50, 9
    engines: list[float] = []
    means: list[float] = []
    chains: list[float] = []
    try:
        for _ in range(repeat):
            spent.clear()
            with scratch() as folder:
                keys = {"task": "bench.tasks:WIDE", "clients": clients, "rounds": rounds, "steps-per-round": 1}
                counted: list[dict[str, float]] = []

                def on_round(line: Mapping[str, object], counted: list[dict[str, float]] = counted) -> None:
                    counted.append(dict(spent))

                lines = simulate_here(keys | {"mode": "hooks"}, folder / "run", on_round)
            first, last = counted[0], counted[-1]
            other, mean, chain = (
                (last[row] - first[row]) * 1e3 / (clients * (rounds - 1)) for row in ("other", "mean", "chain")
            )
            total = 1e3 * sum(line["seconds"] for line in lines[1:]) / (clients * (rounds - 1))
            engines.append(total - other - mean - chain)
            means.append(mean)
            chains.append(chain)
    finally:
        for restore in undo:
            restore()
        Receipt.from_json = from_json  # type: ignore[method-assign]
    return {
        "engine, messages and record conversion (ms per client, at most 1)": statistics.median(engines),
        "the mean of the updates (ms per client)": statistics.median(means),
        "ledger, keep, receipts and checkpoint (ms per client)": statistics.median(chains),
        "all three together (ms per client)": statistics.median(map(sum, zip(engines, means, chains, strict=True))),
    }


def _added(spent: dict[str, float], row: str, function: Callable[[str], object], text: str) -> object:
    began = time.perf_counter()
    try:
        return function(text)
    finally:
        spent[row] = spent.get(row, 0.0) + time.perf_counter() - began


def scale(repeat: int) -> dict[str, object]:
    """1,000 against 100,000 virtual clients, cohort 50: round time, memory, start-up."""
    rows: dict[int, list[list[float]]] = {1000: [], 100_000: []}
    for _ in range(repeat):
        for clients, row in rows.items():
            _, output = timed(
                [sys.executable, "-m", "bench.population", str(clients)],
                cwd=ROOT,
                env=os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)},
            )
            row.append(json.loads(output.splitlines()[-1]))
    small, large = ([statistics.median(column) for column in zip(*row, strict=True)] for row in rows.values())
    return {
        "round, 1,000 clients (s)": small[0],
        "round, 100,000 clients (s)": large[0],
        "round, ratio (below 1.1)": statistics.median(
            b[0] / a[0] for a, b in zip(rows[1000], rows[100_000], strict=True)
        ),
        "memory, difference (MB, below 50)": large[1] - small[1],
        "start-up beyond imports, 100,000 clients (s, below 5)": large[2],
    }


def startup(repeat: int) -> dict[str, object]:
    """How long ``tacit --help`` takes, against a Python that does nothing."""
    help_s = [tacit("--help")[0] for _ in range(repeat)]
    empty_s = [tacit(code="pass")[0] for _ in range(repeat)]
    return {"tacit --help (s, below 1)": statistics.median(help_s), "python -c pass (s)": statistics.median(empty_s)}


def accuracy(repeat: int) -> dict[str, object]:
    """The main job's test accuracy over seeds, its epsilon, and its wall time as a process."""
    accuracies, seconds, epsilons = [], [], []
    for seed in range(repeat):
        with scratch() as folder:
            took, output = tacit("simulate", f"--seed={seed}", "--json", f"--out={folder / 'run'}")
        summary = json.loads(output.splitlines()[-1])
        accuracies.append(summary["metrics"]["accuracy"])
        epsilons.append(summary["epsilon"])
        seconds.append(took)
    return {
        "accuracy, median (at least 0.85)": statistics.median(accuracies),
        "accuracy, all seeds": [round(value, 4) for value in accuracies],
        "epsilon, add/remove, at most": max(epsilons),
        "whole process (s, below 60)": statistics.median(seconds),
    }


def _grown(folder: Path, names: Sequence[str], rounds: int, joins: int) -> tuple[Book, Plan]:
    """Returns an open book in which every name was charged for so many rounds of one job, and its plan."""
    from privacy.accounting import Grant
    from privacy.ledger import Book
    from privacy.plan import Plan

    noise, delta, bound = 20.0, 1e-5, 5000
    plan = Plan(
        sample_rate=0.1,
        expected_batch=10.0,
        l2_clip=1.0,
        noise_multiplier=noise,
        steps=1,
        rounds=joins,
        joins=joins,
        epsilon=50.0,
        delta=delta,
        records_bound=bound,
    )
    book = Book(folder)
    book.grant(
        {name: Grant(epsilon=50.0, delta=delta, order=4.0, records_bound=bound) for name in names}, population="bench"
    )
    for moment in range(1, rounds + 1):
        book.charge([_asked(name, moment, plan) for name in names])
    return book, plan


def _asked(name: str, moment: int, plan: Plan) -> ChargeRequest:
    from privacy.ledger import ChargeRequest

    return ChargeRequest(name=name, job="ab" * 16, round=moment, request=f"{moment:064x}", plan=plan)


def ledger(repeat: int) -> dict[str, object]:
    """One charge against a plain write and fsync of the same bytes, in a short ledger and in a long one."""
    ratios: dict[str, list[float]] = {"short": [], "long": []}
    ours: dict[str, list[float]] = {"short": [], "long": []}
    with scratch() as folder:
        books = {
            "short": _grown(folder / "short", ["clinic"], 10, 10**6),
            "long": _grown(folder / "long", [f"clinic-{index}" for index in range(100)] + ["clinic"], 100, 10**6),
        }
        with (folder / "plain").open("ab", buffering=0) as plain:
            for moment in range(1000, 1000 + 40 * repeat):
                for which, (book, plan) in books.items():
                    path = folder / which / "ledger.jsonl"
                    before = path.stat().st_size
                    began = time.perf_counter()
                    book.charge([_asked("clinic", moment, plan)])
                    took = time.perf_counter() - began
                    with path.open("rb") as file:
                        file.seek(before)
                        data = file.read()
                    began = time.perf_counter()
                    plain.write(data)
                    os.fsync(plain.fileno())
                    ratios[which].append(took / (time.perf_counter() - began))
                    ours[which].append(took)
    return {
        "a charge / a plain write and fsync, 10 charges before (at most 2)": statistics.median(ratios["short"]),
        "a charge / a plain write and fsync, 10,000 charges before (at most 2)": statistics.median(ratios["long"]),
        "a charge, 10,000 charges before (ms)": 1e3 * statistics.median(ours["long"]),
        "long ledger / short ledger (about 1)": statistics.median(ours["long"]) / statistics.median(ours["short"]),
    }


def report(repeat: int) -> dict[str, object]:
    """What reading, pricing, reporting and verifying 1,000 clients takes."""
    from privacy.accounting import Event, best_order
    from privacy.ledger import Book
    from privacy.ledger_report import over_ledgers, write_over_ledgers
    from privacy.transcript import read_ledger

    rows: dict[str, list[float]] = {}

    def clock(row: str, act: Callable[[], object]) -> None:
        began = time.perf_counter()
        act()
        rows.setdefault(row, []).append(time.perf_counter() - began)

    with scratch() as folder:
        _grown(folder / "book", [f"client-{index:04d}" for index in range(1000)], 100, 100)
        for _ in range(min(repeat, 3)):
            clock("100,000 charges, opened with the key (s)", lambda: Book(folder / "book"))
            clock("100,000 charges, read without it (s)", lambda: read_ledger(folder / "book"))
            copies = [read_ledger(folder / "book")]
            clock("1,000 equal histories of 100 rounds, all accountants (s, below 10)", partial(over_ledgers, copies))
            clock("report over 1,000 ledgers, read and written (s)", lambda: _made(write_over_ledgers, folder))
        size = sum((folder / name).stat().st_size for name in ("report.json", "report.html"))
    events = [Event(sample_rate=0.1, noise_multiplier=1 + index / 1000, steps=100) for index in range(1000)]
    clock("1,000 distinct histories, RDP (s, below 60)", lambda: [best_order(event, 1e-5) for event in events])
    with scratch() as folder:
        keys = {"clients": 1000, "rounds": 3, "steps-per-round": 1, "mode": "hooks"}
        simulate_here(keys, folder / "run")
        from simulations.evidence import render

        for _ in range(min(repeat, 3)):
            clock("report of a run with 1,000 clients (s, below 15)", lambda: render(folder / "run"))
        run_size = sum((folder / "run" / name).stat().st_size for name in ("report.json", "report.html"))
        from privacy.verify import passed, verify_files

        clock("verify of it (s)", lambda: _require(passed(verify_files([folder / "run"]))))
    with scratch() as folder:
        long_run(folder / "run", 1000, 100)
        row = "100,000 receipts: report of a run, {} (s, below 15)"
        for _ in range(min(repeat, 3)):
            began = time.process_time()
            clock(row.format("wall"), lambda: render(folder / "run"))
            # What other processes do meanwhile is not in it, and what is has to come one after the other.
            rows.setdefault(row.format("its own processor time"), []).append(time.process_time() - began)
        long_size = sum((folder / "run" / name).stat().st_size for name in ("report.json", "report.html"))
        clock("100,000 receipts: verify of it (s)", lambda: _require(passed(verify_files([folder / "run"]))))
    return {row: statistics.median(seconds) for row, seconds in rows.items()} | {
        "report over 1,000 ledgers (MB)": size / 1e6,
        "report of a run with 1,000 clients (MB, below 10)": run_size / 1e6,
        "100,000 receipts: report of a run (MB, below 10)": long_size / 1e6,
    }


def long_run(folder: Path, clients: int, rounds: int) -> None:
    """Makes the folder of a run that is as long as one likes: all charges and receipts of it, and no training."""
    import numpy as np

    from privacy.files import write_whole
    from privacy.identity import Secret
    from privacy.ledger import ChargeRequest, Receipt
    from server.app import CHECKPOINT, METRICS, RECEIPTS, countersign, write_lines
    from server.checkpoint import State, save
    from simulations.evidence import SERVER_KEY, STATUS
    from simulations.scenario import Scenario
    from simulations.world import World

    keys = {"clients": clients, "rounds": rounds, "steps-per-round": 1, "mode": "hooks"}
    world = World.create(Scenario.layered(None, keys), folder)
    settled, server = world.settled, Secret.load_or_create(folder / SERVER_KEY).identity("server")
    names = [world.name_of(index) for index in range(clients)]
    for moment in range(1, rounds + 1):
        asked = [
            ChargeRequest(
                name=name,
                job=settled.id,
                round=moment,
                request=f"{moment:064x}",
                plan=settled.plan,
                commitment=world.commitments[name],
                code=settled.code,
            )
            for name in names
        ]
        receipts = [receipt for receipt in world.book.charge(asked) if isinstance(receipt, Receipt)]
        _require(len(receipts) == clients)
        write_lines(folder / RECEIPTS, [countersign(server, receipt) for receipt in receipts])
        line = {"round": moment, "metrics": {}, "replies": clients, "declined": 0, "missing": 0, "seconds": 0.0}
        write_lines(folder / METRICS, [json.dumps(line | {"epsilon": max(each.spent for each in receipts)})])
    (folder / CHECKPOINT).parent.mkdir(exist_ok=True)
    save(
        State(
            job=settled.id,
            round=rounds,
            model={"w": np.zeros(1, np.float32)},
            lines={METRICS: rounds, RECEIPTS: clients * rounds},
        ),
        folder / CHECKPOINT,
    )
    write_whole(folder / STATUS, json.dumps({"status": "completed"}).encode())
    world.book.close()


def seal(repeat: int) -> dict[str, object]:
    """Sealed messages of 45 MB and handshakes, beside the cipher alone."""
    import numpy as np
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    from privacy.identity import Identity
    from privacy.seal import ClientEpoch, ClientSession, ServerEpoch, ServerSession

    server, client = Identity(bytes(32)), Identity(bytes([1]) * 32)
    epoch, busier = (ServerEpoch(server, job="0" * 32, run=1, bundle="0" * 64, terms="0" * 64) for _ in range(2))
    content, cipher = os.urandom(45_000_000), AESGCM(bytes(32))
    wall: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}

    def clock(row: str, act: Callable[[], object], times: int = 1) -> None:
        began, before = time.perf_counter(), time.process_time()
        for _ in range(times):
            act()
        wall.setdefault(row, []).append((time.perf_counter() - began) / times)
        busy.setdefault(row, []).append((time.process_time() - before) / times)

    def joined(epoch: ServerEpoch) -> tuple[ServerSession, ClientSession]:
        end = ClientEpoch(client, server.public_key, run=1, bundle="0" * 64)
        session, accept = epoch.accept(client.public_key, end.offer(epoch.hello(client.public_key)))
        return session, end.accept(accept)

    def plain() -> None:
        sealed, opened = np.empty(len(content) + 16, np.uint8).data, np.empty(len(content), np.uint8).data
        cipher.encrypt_into(bytes(12), content, b"", sealed)
        cipher.decrypt_into(bytes(12), sealed, b"", opened)

    here, there = joined(epoch)

    def broadcast(clients: int) -> None:
        body = epoch.broadcast(1, content)
        for _ in range(clients):
            here.wrap(body)

    for _ in range(4 * repeat):
        clock("plain", plain)
        clock("both", lambda: here.open("reply", 1, there.seal("reply", 1, content)))
        clock("one", lambda: broadcast(1))
        clock("hundred", lambda: broadcast(100))
        clock("handshake", lambda: joined(busier), 20)
    return {
        "sealing and opening 45 MB (ms, below 50)": 1e3 * statistics.median(wall["both"]),
        "sealing and opening 45 MB, processor time (ms)": 1e3 * statistics.median(busy["both"]),
        "the same / the cipher alone, processor time": statistics.median(
            a / b for a, b in zip(busy["both"], busy["plain"], strict=True)
        ),
        "a handshake, both ends (ms, below 5)": 1e3 * statistics.median(wall["handshake"]),
        "a handshake, both ends, processor time (ms)": 1e3 * statistics.median(busy["handshake"]),
        "broadcasting 45 MB to 1 client (ms)": 1e3 * statistics.median(wall["one"]),
        "to 100 clients / to 1, processor time (at most 2)": statistics.median(
            a / b for a, b in zip(busy["hundred"], busy["one"], strict=True)
        ),
    }


def vault(repeat: int) -> dict[str, object]:
    """What sealing costs: in memory, a checkpoint of 45 MB beside a plain atomic one, and a change of keys."""
    from privacy.files import write_whole
    from privacy.vault.container import Header, Wanted, open_into, read_file, rewrap, seal_into, sealed_bytes_of
    from privacy.vault.container import write_file as write_sealed
    from privacy.vault.keys import Keyring, Passphrase
    from privacy.vault.rotation import to_active

    ring, header, wanted = Keyring(), Header(purpose="checkpoint"), Wanted(purpose="checkpoint")
    rows: dict[str, list[float]] = {}

    def clock(row: str, act: Callable[[], object], scale: float = 1.0) -> float:
        began = time.perf_counter()
        act()
        seconds = time.perf_counter() - began
        rows.setdefault(row, []).append(scale * seconds)
        return seconds

    content = os.urandom(64 * 2**20)
    sealed, back = bytearray(sealed_bytes_of(len(content))), bytearray(len(content))
    checkpoint = memoryview(content)[:45_000_000]
    with scratch() as folder:
        for _ in range(4 * repeat):
            # By the processor's clock: what other programs do to this core is not what sealing costs.
            for act, row in (
                (lambda: seal_into(sealed, header, [ring], content), "sealed"),
                (lambda: open_into(back, sealed, [ring], wanted), "opened"),
            ):
                began = time.process_time()
                act()
                speed = len(content) / (time.process_time() - began) / 1e9
                rows.setdefault(f"{row} in memory, one core (GB/s, at least 2)", []).append(speed)
            plain = clock("45 MB, plain atomic write (ms)", lambda: write_whole(folder / "plain", checkpoint), 1e3)
            path = folder / "sealed"
            ours = clock(
                "45 MB, sealed atomic write (ms)",
                lambda path=path: write_sealed(path, header, [ring], checkpoint, replace=True),
                1e3,
            )
            rows.setdefault("sealed write / plain write (at most 1.25)", []).append(ours / plain)
        for _ in range(repeat):
            clock("45 MB, read and verified (ms)", lambda path=path: read_file(path, [ring], wanted), 1e3)
            ring.add()
            clock("keys of a 45 MB file changed (ms)", lambda path=path: rewrap(path, [ring], to_active(ring)), 1e3)
        small = folder / "small"
        write_sealed(small, header, [ring], b"x")
        for _ in range(4 * repeat):
            ring.add()
            clock("keys of a 1-byte file changed (ms)", lambda: rewrap(small, [ring], to_active(ring)), 1e3)
    for _ in range(repeat):
        phrase = Passphrase("correct horse battery staple")
        clock("a passphrase stretched (ms)", lambda phrase=phrase: phrase.wrap(bytes(32), b""), 1e3)
    return {row: statistics.median(values) for row, values in rows.items()}


def encrypted(repeat: int) -> dict[str, object]:
    """Encrypted linear heads beside TenSEAL's documented product, SEAL's multiply-add loop and Concrete-ML."""
    from bench.encrypted import compared

    return compared(repeat)


def _made(write: Callable[[Sequence[Path], Path], Path], folder: Path) -> Path:
    return write([folder / "book"], folder)


def _require(sound: bool) -> None:
    assert sound


def inference(repeat: int) -> dict[str, object]:
    """Encrypted queries over TLS on loopback to a head of 512 features and 10 classes."""
    from bench.inference import measured

    with scratch() as folder:
        return measured(folder, queries=80 * repeat)


def recommender(repeat: int) -> dict[str, object]:
    """Recommenders on MovieLens 100K with the client as the unit, beside the item-mean baseline without privacy."""
    from bench.central import rows
    from clients.data import load_source
    from models.catalog import TASKS
    from models.ratings import item_mean_rmse
    from privacy.errors import DataError

    names = ("movielens-mf", "movielens-ncf", "movielens-context")
    try:
        test = load_source(TASKS[names[0]]).test
    except DataError as missing:
        raise Skipped(str(missing)) from None
    base = {"item means, computed centrally without privacy: rmse": item_mean_rmse(test.inputs, test.targets)}
    with scratch() as folder:
        return base | rows(names, repeat, folder, tacit, dict.fromkeys(names, ("--lr=2", "--rounds=40")))


def agent(repeat: int) -> dict[str, object]:
    """Game agents over 200 clients with the client as the unit: mean return on 100 machines that no client has."""
    from bench.central import rows

    with scratch() as folder:
        return rows(("cartpole-dqn", "acrobot-dqn"), repeat, folder, tacit, {})


def text(repeat: int) -> dict[str, object]:
    """Words and characters under privacy, beside the same models without it; an hour or more on two cores."""
    from bench.text import text

    return text(min(repeat, 3), ROOT / "runs" / "bench-text")


BENCHES = {
    "ledger": ledger,
    "report": report,
    "seal": seal,
    "vault": vault,
    "encrypted": encrypted,
    "startup": startup,
    "accuracy": accuracy,
    "text": text,
    "dp-job": dp_job,
    "flower": flower,
    "deployed": deployed,
    "inference": inference,
    "engine": engine,
    "scale": scale,
    "recommender": recommender,
    "agent": agent,
}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    """Runs the benchmarks that are named, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHES)} (default all)")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions, of which medians are reported (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in BENCHES:
            parser.error(f"expected one of {', '.join(BENCHES)}, got {name}")
    import torch

    torch.set_num_threads(1)
    facts = (
        _processor(),
        f"{os.cpu_count()} cores",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
    )
    print(time.strftime("%Y-%m-%d"), *facts, sep="  ")
    figures: dict[str, object] = {}
    for name in arguments.names or BENCHES:
        print(f"\n{name}: {(BENCHES[name].__doc__ or '').strip()}", flush=True)
        try:
            figures[name] = rows = BENCHES[name](arguments.repeat)
        except Skipped as reason:
            figures[name] = f"skipped: {reason}"
            print(f"  skipped: {reason}")
            continue
        for row, value in rows.items():
            print(f"  {row:62s} {value:.4g}" if isinstance(value, float) else f"  {row:62s} {value}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
