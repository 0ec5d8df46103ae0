"""One run over a virtual population, in a process of its own: ``python -m bench.population CLIENTS``.

Prints, as JSON: the median round in seconds, the largest memory in MB, and the seconds from here to the first round,
imports not counted.
"""

import json
import resource
import sys
import time

import dp_accounting.pld.pld_privacy_accountant  # noqa: F401 -- what a run imports is not part of its start-up
import sklearn.datasets  # noqa: F401
import torch

import simulations.engine
import simulations.run  # noqa: F401
from bench.__main__ import scratch, simulate_here
from server import app

torch.set_num_threads(1)
began = time.perf_counter()
first: list[float] = []
run = app.run


def watched(*args):  # type: ignore[no-untyped-def]
    """Notes when the first round begins."""
    first.append(time.perf_counter() - began)
    return run(*args)


app.run = watched
with scratch() as folder:
    keys = {
        "task": "bench.tasks:WIDE",
        "clients": int(sys.argv[1]),
        "cohort": 50,
        "rounds": 12,
        "partition": "virtual",
        "records-per-client": 50,
        "mode": "hooks",
    }
    lines = simulate_here(keys, folder / "run")
seconds = sorted(line["seconds"] for line in lines[2:])
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([seconds[len(seconds) // 2], memory, first[0]]))
