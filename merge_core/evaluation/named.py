"""Named: a task by what a person types, the name of a built-in one or a file.

find("rev:test")     one of the zoo's
find("sums.jsonl")   a file, in the format of `tasks`
"""

from __future__ import annotations

from pathlib import Path

from merge_core.evaluation import tasks
from merge_core.zoo.tasks import task


def find(reference: str) -> tasks.Task:
    """The task that a reference names; raises InvalidTask where there is none, or it cannot be scored."""
    return tasks.read(Path(reference)) if reference.endswith(".jsonl") else task(reference)
