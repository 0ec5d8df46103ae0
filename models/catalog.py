"""The tasks that come with Tacit, each from the file of its family, and how one is found by name.

A new family is a new file with a tuple ``TASKS`` and one line here.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from models import games, gpt2, image, language, ratings, table, words
from models.task import Task

__all__ = ["TASKS", "find_task"]

_FAMILIES = (table, image, words, language, gpt2, ratings, games)
TASKS: dict[str, Task] = {task.name: task for family in _FAMILIES for task in family.TASKS}


def find_task(name: str) -> Task:
    """Returns a built-in task by its name, or anybody's as ``package.module:attribute``.

    Modules are looked for where Python looks, and then in the current folder.

    Raises:
        LookupError: No such task; one sentence that names the nearest built-in name or says what failed to
            import.
    """
    if name in TASKS:
        return TASKS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, TASKS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(TASKS)}"
        raise LookupError(f"expected a task, got {name!r}; {hint} (your own task is written package.module:attribute)")
    module_name, _, attribute = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        # Last, so that a file lying in the current folder never shadows an installed module.
        sys.path.append(folder)
    try:
        task = getattr(importlib.import_module(module_name), attribute)
    except AttributeError as error:
        raise LookupError(
            f"expected a task {name!r}, got an AttributeError ({error}); check the attribute's name"
        ) from error
    except Exception as error:  # Somebody else's module may fail in any way; the caller needs one sentence.
        raise LookupError(
            f"expected a task {name!r}, but importing {module_name!r} failed with {type(error).__name__}: "
            f"{error}; "
            "run from the folder that holds it, or install it"
        ) from error
    if not isinstance(task, Task):
        raise LookupError(
            f"expected {name!r} to be a models.task.Task, got {type(task).__name__}; export the Task itself"
        )
    return task
