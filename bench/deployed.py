"""A deployed round of the peers' job, beside the same job as a plain Flower app over a SuperLink and SuperNodes.

Both run as processes on loopback, two clients each, one thread for torch. Flower's side is what its documentation
shows: no TLS, no authentication, apps in subprocesses; ours is ``tacit server start`` and ``tacit client start`` with
everything on. A round is measured from broadcast to aggregate; the first one of each, which warms up, is not counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# The peers' server application trains and evaluates; here only what both sides do is measured.
_SERVER_APP = """\
import os, time
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from dpfl.task import net
app = ServerApp()
class Timed(FedAvg):
    def configure_train(self, *args, **kwargs):
        self.began = time.perf_counter()
        return super().configure_train(*args, **kwargs)
    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        done = super().aggregate_train(server_round, replies)
        with open(os.environ["TACIT_BENCH_ROUNDS"], "a") as file:
            file.write(f"{time.perf_counter() - self.began} {len([r for r in replies if not r.has_error()])}\\n")
        return done
@app.main()
def main(grid, context):
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(net().state_dict()), num_rounds=int(os.environ["ROUNDS"]))
"""


def plain_rounds(app: Path, folder: Path, rounds: int, patience_s: float = 900.0) -> list[float]:
    """Runs the peers' app over a SuperLink and two SuperNodes; returns the seconds of its rounds.

    Args:
        app: The peers' app, which is only read.
        folder: A scratch folder.
        rounds: How many.
        patience_s: Longest wait for all of them.
    """
    from flwr.cli.build import build_fab_from_disk
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.control.control_http_client import ControlHttpClient
    from flwr.supercore.fab import Fab
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    from tests.deploying import free_ports

    shutil.copytree(app, folder / "app")
    (folder / "app" / "dpfl" / "server_app.py").write_text(_SERVER_APP)
    told = folder / "rounds"
    told.touch()
    binaries = Path(sys.executable).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")} | {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "TACIT_BENCH_ROUNDS": str(told),
        "ROUNDS": str(rounds),
    }
    link, *nodes = free_ports(3)
    with contextlib.ExitStack() as stack:

        def start(*words: str) -> None:
            stack.enter_context(_process([str(binaries / words[0]), *words[1:]], folder, environment))

        start(
            *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link)),
            "--disable-runtime-dependency-installation",
        )
        _listens(link)
        for number, port in enumerate(nodes):
            start(
                *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}"),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--node-config", f"partition-id={number} num-partitions=2"),
            )
        for port in nodes:
            _listens(port)
        time.sleep(5)
        bundle = build_fab_from_disk(folder / "app")
        bundle = bundle[0] if isinstance(bundle, tuple) else bundle
        version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
        control = ControlHttpClient.from_server_address(f"127.0.0.1:{link}", True, None, interceptors=[version])
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        control.StartRun(StartRunRequest(fab=fab_to_proto(fab), federation=""))
        deadline = time.monotonic() + patience_s
        while len(lines := told.read_text().splitlines()) < rounds:
            if time.monotonic() > deadline:
                raise SystemExit(f"expected {rounds} rounds of the plain app, got {lines}: {_tail(folder)}")
            time.sleep(0.5)
    if any(line.split()[1] != "2" for line in lines):
        raise SystemExit(f"expected two replies in every round of the plain app, got {lines}: {_tail(folder)}")
    return [float(line.split()[0]) for line in lines]


def our_rounds(folder: Path, job: dict[str, object], rounds: int) -> list[float]:
    """Runs the same job deployed by Tacit; returns the seconds of its rounds."""
    from tests.deploying import Federation

    task = str(job["task"])
    words = [word for name, value in job.items() if name not in ("task", "rounds") for word in (f"--{name}", value)]
    with Federation(folder, task=task) as federation:
        for client in federation.clients:
            client.join("--epsilon", 1000, "--delta", 1e-5, "--records-bound", 20_000)
        federation.start_clients()
        run = federation.run("job", *words, "--rounds", rounds, "--evaluate-every", rounds)
        federation.finished(run, patience_s=900.0)
        lines = federation.rounds("job")
    if any(line["replies"] != 2 for line in lines):
        raise SystemExit(f"expected two replies in every round, got {json.dumps(lines)}")
    return [float(line["seconds"]) for line in lines]


def compared(app: Path, folder: Path, job: dict[str, object], repeat: int) -> dict[str, object]:
    """Measures both, in turn."""
    ours: list[float] = []
    theirs: list[float] = []
    loads: list[float] = []
    for turn in range(repeat):
        loads.append(os.getloadavg()[0])
        ours += our_rounds(folder / f"ours-{turn}", job, 9)[1:]
        loads.append(os.getloadavg()[0])
        (folder / f"plain-{turn}").mkdir()
        theirs += plain_rounds(app, folder / f"plain-{turn}", 4)[1:]
    loads.append(os.getloadavg()[0])
    return {
        "a round deployed by tacit, median (s, at most 5)": statistics.median(ours),
        "a round of the plain Flower app, median (s)": statistics.median(theirs),
        "tacit / plain": statistics.median(ours) / statistics.median(theirs),
        "rounds measured, tacit": " ".join(f"{seconds:.2f}" for seconds in ours),
        "rounds measured, plain": " ".join(f"{seconds:.2f}" for seconds in theirs),
        "load of the machine at start, between and at the end": " ".join(f"{load:.1f}" for load in loads),
    }


@contextlib.contextmanager
def _process(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Runs a process and what it starts, in a session of its own that ends with the block."""
    with (folder / f"{Path(command[0]).name}.log").open("a") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def _listens(port: int) -> None:
    import socket

    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"expected somebody to listen on port {port} within 2 min, got nobody")
        time.sleep(0.1)


def _tail(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
