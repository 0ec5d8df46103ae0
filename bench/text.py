"""Text: the tasks of words and of characters under privacy, beside the same models without it and counting models.

Real data is needed (``TACIT_DATA``); what is absent is skipped and said. Runs lie in ``runs/bench-text`` and are gone
on with where they were left, so that a slow machine may be stopped.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from clients.data import Source, load_source
from models.catalog import TASKS
from models.task import Task
from privacy.errors import DataError
from privacy.plan import require

# For each task its clients, epsilon, and how long the model without privacy trains.
ROWS: dict[str, tuple[int, float, int]] = {
    "sst2-embedding": (10, 3.0, 5),
    "sst2-transformer": (10, 3.0, 5),
    "shakespeare-lstm": (36, 8.0, 5),
    "shakespeare-gpt": (36, 8.0, 5),
}


def counting(source: Source) -> dict[str, float]:
    """Returns the perplexity per place of the unigram and the bigram model of a source's training windows.

    Both are smoothed by one tenth of a count a token, and are judged on the places that a model is judged on. They are
    not private.
    """
    size = source.shape.classes
    before, after = source.train.inputs.flatten(), source.train.targets.flatten()
    pairs = torch.bincount(before * size + after, minlength=size * size).view(size, size).double() + 0.1
    singles = torch.bincount(after, minlength=size).double() + 0.1
    test_before, test_after = source.test.inputs.flatten(), source.test.targets.flatten()
    unigram = (singles / singles.sum()).log()[test_after]
    bigram = (pairs / pairs.sum(1, keepdim=True)).log()[test_before, test_after]
    return {"unigram": math.exp(-unigram.mean().item()), "bigram": math.exp(-bigram.mean().item())}


def plain(task: Task, source: Source, epochs: int, seed: int) -> float:
    """Returns the headline of a task's model trained on all records at once, by Adam and without privacy."""
    model = task.fresh(source.shape, seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(source.train), generator=generator), 64):
            optimizer.zero_grad()
            loss = task.loss(model(source.train.inputs[rows]), source.train.targets[rows]).mean()
            for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                parameter.grad = gradient
            optimizer.step()
    with torch.no_grad():
        outputs = torch.cat([model.eval()(part) for part in torch.split(source.test.inputs, 256)])
    return next(iter(task.metrics(outputs, source.test.targets).values()))


def private(task: str, clients: int, epsilon: float, seed: int, folder: Path) -> dict[str, Any]:
    """Runs one private job as a process, or goes on with it; returns its summary."""
    from bench.__main__ import tacit

    where = folder / f"{task}-{seed}"
    how = (
        ("--resume", str(where))
        if (where / "config.json").exists()
        else (f"--task={task}", f"--clients={clients}", f"--epsilon={epsilon}", f"--seed={seed}", f"--out={where}")
    )
    summary: dict[str, Any] = json.loads(tacit("simulate", *how, "--json")[1].splitlines()[-1])
    require(summary["status"] == "finished", f"expected {where} to finish, got {summary['status']}; run it again")
    return summary


def text(repeat: int, folder: Path) -> dict[str, object]:
    """Headline of every text task over seeds, with privacy and without."""
    found: dict[str, object] = {}
    for name, (clients, epsilon, epochs) in ROWS.items():
        task = TASKS[name]
        try:
            source = load_source(task)
        except DataError as error:
            found[name] = f"skipped: {error}"
            continue
        runs = [private(name, clients, epsilon, seed, folder) for seed in range(repeat)]
        headline = next(iter(runs[0]["metrics"]))
        figures = [run["metrics"][headline] for run in runs]
        found[f"{name}: {headline}, median, epsilon {epsilon:g} over {clients} clients"] = statistics.median(figures)
        found[f"{name}: all seeds"] = [round(figure, 4) for figure in figures]
        found[f"{name}: epsilon, at most"] = max(run["epsilon"] for run in runs)
        found[f"{name}: without privacy, all records together"] = plain(task, source, epochs, 0)
        if source.shape.targets and task.text is not None:
            found |= {f"{name}: {model} model, without privacy": value for model, value in counting(source).items()}
    return found
