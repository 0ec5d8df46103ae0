"""Text from a trained language model: what ``tacit generate`` prints.

A model is post-processing of releases that were paid for, so text drawn from it costs no privacy, however long it is.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from clients.data import load_source, published
from models.task import Codec, Task
from privacy.errors import PlanError, RunError
from privacy.plan import require
from server.app import CHECKPOINT
from server.checkpoint import load
from simulations.scenario import Scenario
from simulations.world import _task, vault_of

MOST_TOKENS = 100_000


def generate(run: Path, *, prompt: str, length: int, temperature: float, seed: int) -> str:
    """Returns text that a run's model writes after a prompt.

    Args:
        run: Run folder of a task that writes text; its latest checkpoint is used, sealed or not.
        prompt: What the text begins with; not repeated in the result. At least one token.
        length: Tokens to write, 1 to `MOST_TOKENS`.
        temperature: 1 draws as the model predicts, less is bolder about what is likely, 0 takes the likeliest always.
        seed: Public seed >= 0; equal arguments give equal text.

    Raises:
        PlanError: The run's task writes no text, or an argument is out of range or cannot be encoded.
        RunError: There is no checkpoint, or it is another model's.
        VaultError: The checkpoint is sealed, and does not open.
    """
    require(1 <= length <= MOST_TOKENS, f"expected a length of 1 to {MOST_TOKENS}, got {length}")
    require(
        math.isfinite(temperature) and temperature >= 0,
        f"expected a finite temperature >= 0, got {temperature:g}; 0 takes the likeliest, 1 draws as predicted",
    )
    require(0 <= seed < 2**63, f"expected a seed from 0, got {seed}")
    scenario = Scenario.from_run(run)
    task = _task(scenario.task)
    if task.text is None:
        raise PlanError(f"expected the run of a task that writes text, got {task.name!r}; shakespeare-lstm is one")
    codec = task.text()
    try:
        tokens = codec.encode(prompt)
    except ValueError as error:
        raise PlanError(f"{error}; write the prompt in the model's own alphabet") from error
    require(bool(tokens), "expected a prompt of at least one character, got none; a line break will do")
    model, context = _model(run, scenario, task, codec)
    return codec.decode(draw(model, tokens, length=length, temperature=temperature, seed=seed, context=context))


def _model(run: Path, scenario: Scenario, task: Task, codec: Codec) -> tuple[nn.Module, int]:
    """Returns a run's model, ready to predict, and how many tokens it reads at a time."""
    shape, _ = published(task, scenario.data or None)
    if shape is None:
        shape = load_source(task, data=scenario.data or None).shape
    require(
        shape.tokens == shape.classes == codec.size and len(shape.inputs) == 1,
        f"expected a task whose inputs and classes are {codec.size} tokens, got {shape}; mend the task",
    )
    model = task.fresh(shape, scenario.seed)
    arrays = load(run / CHECKPOINT, vault_of(scenario)).model
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if {name: value.shape for name, value in arrays.items()} != wanted:
        raise RunError(
            f"expected a checkpoint of task {task.name!r} in {run}, got another model's; is it this program's?"
        )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in arrays.items():
            parameters[name].copy_(torch.from_numpy(value))
    return model.eval(), shape.inputs[0]


@torch.no_grad()
def draw(model: nn.Module, tokens: list[int], *, length: int, temperature: float, seed: int, context: int) -> list[int]:
    """Returns ``length`` tokens that a model writes after some others.

    Args:
        model: Tokens ``(1, l)`` to logits ``(1, l, classes)``, l <= ``context``.
        tokens: What comes before; at least one.
        length: How many to write.
        temperature: As for `generate`.
        seed: As for `generate`.
        context: The most tokens that the model reads.

    Raises:
        RunError: The model's prediction is no number: its training diverged.
    """
    generator = torch.Generator().manual_seed(seed)
    known, written = list(tokens), []
    for _ in range(length):
        logits: Tensor = model(torch.tensor([known[-context:]]))[0, -1].double()
        if not bool(logits.isfinite().all()):
            raise RunError("expected a model that predicts, got one whose training diverged; train it with a lower lr")
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
        known.append(token)
        written.append(token)
    return written
