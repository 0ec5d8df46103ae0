"""The inference service over TLS on loopback: a head of 512 features and 10 classes, server and clients as processes.

The service is the one that ``tacit infer serve`` runs, with its log, limits and evaluator, in a process of its own. Its
head has random weights: no run trains 512 features here, and what they are changes no time.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FEATURES, CLASSES = 512, 10


def _published() -> Any:
    """Returns a head of random weights under terms that stop no benchmark."""
    import hashlib

    import numpy as np

    from models.catalog import find_task
    from models.head import split
    from models.shape import Shape
    from privacy.asking import Offer
    from server.heads import Published, Terms, planned

    shape = Shape(inputs=(FEATURES,), classes=CLASSES)
    model = find_task("table").fresh(shape, 0)
    coins = np.random.default_rng(0)
    parts = split(model, shape)
    parts.weights[...] = coins.normal(size=parts.weights.shape)
    parts.bias[...] = coins.normal(size=parts.bias.shape)
    terms = Terms(queries=1_000_000, rate=1e6, allowance=1_000_000_000, weight_bits=8)
    loaded, description, plan = planned(parts, terms, 1.0)
    offer = Offer(
        name="bench",
        task="table",
        seed=0,
        inputs=shape.inputs,
        classes=tuple(map(str, range(CLASSES))),
        features=parts.digest,
        feature_range=1.0,
        prepare={"kind": "array"},
        description=description,
        plan=plan.digest,
        query_bytes=plan.query_bytes,
        answer_bytes=plan.answer_bytes,
        model=hashlib.sha256(b"bench").hexdigest(),
        privacy={"guarantee": False, "words": "random weights"},
        job="",
        round=0,
        queries=terms.queries,
        session_s=terms.session_s,
        rate=terms.rate,
    )
    return Published(offer, loaded, terms, parts)


def serve(home_folder: str) -> None:
    """Runs the service of a home until it is told to stop; prints its port."""
    from server.door import run
    from server.home import ServerHome
    from simulations.inference import service_of

    service = service_of([_published()], ServerHome.open(Path(home_folder)), host="127.0.0.1")
    run(service, lambda: print(json.dumps({"port": service.port}), flush=True))


@contextlib.contextmanager
def _served(home: Any) -> Iterator[tuple[Any, int]]:
    from privacy.enrolment import Address

    root = str(Path(__file__).resolve().parent.parent)
    code = f"from bench.inference import serve; serve({str(home.folder)!r})"
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield Address("127.0.0.1", int(json.loads(process.stdout.readline())["port"])), process.pid
        finally:
            process.terminate()


def _cpu_s(pid: int) -> float:
    """Returns the CPU seconds of a process and of its children that live."""
    ticks = os.sysconf("SC_CLK_TCK")
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    return (
        sum(sum(map(int, Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[11:13])) for one in pids)
        / ticks
    )


def measured(folder: Path, queries: int = 400, threads: int = 4) -> dict[str, object]:
    """Measures latency with one client and one connection, then queries a second over several.

    Args:
        folder: A scratch folder.
        queries: How many of each.
        threads: Connections at once, for the second.
    """
    import numpy as np

    from clients.inference import Asker, Service
    from privacy.asking import ANSWER_OVERHEAD
    from simulations.inference import federation

    home, (client,) = federation(folder)
    features = np.random.default_rng(1).uniform(-1, 1, (queries, FEATURES))
    with _served(home) as (address, pid):
        asker = Asker.begin(Service.of(client, address), client.identity())
        for row in features[:20]:
            asker.open(*asker.exchange(asker.seal(row)))
        whole, asking = [], []
        for row in features:
            began = time.perf_counter()
            query = asker.seal(row)
            sealed = time.perf_counter()
            pair = asker.exchange(query)
            answered = time.perf_counter()
            asker.open(*pair)
            whole.append(1000 * (time.perf_counter() - began))
            asking.append(1000 * (answered - sealed))
        # Encrypting is the clients' work, on machines of their own: what is counted here is the service's.
        askers = [Asker.begin(Service.of(client, address), client.identity()) for _ in range(threads)]
        ready = [[one.seal(row) for row in features] for one in askers]
        for one in askers:
            one.service.heads()
        before, mine = _cpu_s(pid), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        began = time.perf_counter()
        work = [
            threading.Thread(target=lambda one, mine: [one.exchange(query) for query in mine], args=pair)
            for pair in zip(askers, ready, strict=True)
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        seconds = time.perf_counter() - began
        count = queries * threads
        cpu, own = _cpu_s(pid) - before, sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - mine
        for one in (asker, *askers):
            one.service.close()
    whole.sort()
    asking.sort()
    return {
        "one client: encrypt, ask, decrypt, p50 (ms, target 5)": whole[queries // 2],
        "one client: encrypt, ask, decrypt, p99 (ms, target 15)": whole[99 * queries // 100],
        "one client: the service's part and TLS, p50 (ms)": asking[queries // 2],
        "one client: the service's part and TLS, p99 (ms)": asking[99 * queries // 100],
        f"{threads} connections, queries a second (target 300)": count / seconds,
        "CPU of service and evaluator (ms a query)": 1000 * cpu / count,
        "CPU of who asks, TLS alone (ms a query)": 1000 * own / count,
        "bytes up": len(ready[0][0]),
        "bytes down": asker.offer.answer_bytes + ANSWER_OVERHEAD,
    }
