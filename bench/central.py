"""What protecting whole clients costs a recommender and a game agent: final figures over seeds, with and without noise.

Each run is one ``tacit simulate`` with the task's own defaults. Its folder lies under ``$TACIT_BENCH_RUNS``, where that
is set: then a run that was stopped is gone on with, and one that is finished is only read.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Noise that hides nothing and a clip that is never reached: the same job without privacy.
OPEN = ("--epsilon=0", "--noise-multiplier=0.001", "--l2-clip=1000")


def finished(folder: Path, run: Callable[..., object], *flags: str) -> tuple[Mapping[str, float], object]:
    """Runs a job to its end, or reads one that is there; returns its last metrics, and its report's epsilon."""
    status = folder / "status.json"
    if not status.exists() or json.loads(status.read_text())["status"] != "finished":
        run("simulate", *([f"--resume={folder}"] if (folder / "config.json").exists() else [*flags, f"--out={folder}"]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = next(line["metrics"] for line in reversed(lines) if line["metrics"])
    return metrics, json.loads((folder / "report.json").read_text())["headline"]["epsilon"]


def rows(
    tasks: Sequence[str], repeat: int, folder: Path, run: Callable[..., object], opened: Mapping[str, Sequence[str]]
) -> dict[str, object]:
    """Returns each task's headline over seeds, its epsilon, and the same without privacy."""
    place = Path(os.environ.get("TACIT_BENCH_RUNS") or folder)
    found: dict[str, object] = {}
    for task in tasks:
        runs = [finished(place / f"{task}-{seed}", run, f"--task={task}", f"--seed={seed}") for seed in range(repeat)]
        for name in runs[0][0]:
            values = [metrics[name] for metrics, _ in runs]
            found[f"{task}: {name}, median"] = statistics.median(values)
            found[f"{task}: {name}, all seeds"] = [round(value, 4) for value in values]
        found[f"{task}: epsilon of a client, at most"] = max(float(str(epsilon)) for _, epsilon in runs)
        flags = (f"--task={task}", *OPEN, *opened.get(task, ()))
        found[f"{task}: without privacy, one seed"] = dict(finished(place / f"{task}-open", run, *flags)[0])
    return found
