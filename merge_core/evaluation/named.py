"""Named: a task by what a person types, the name of a built-in one or a file.

find("rev:test")     one of the zoo's
find("sums.jsonl")   a file, in the format of `tasks`
"""

from __future__ import annotations

from pathlib import Path

from merge_core.errors import InvalidTask
from merge_core.evaluation import tasks
from merge_core.zoo.tasks import names, task

SUFFIX = ".jsonl"
"""What the names of files end with, and no other name."""
LM_EVAL = "lm-eval:"
"""What the names of lm-eval's tasks begin with; `harness` asks them."""


def find(reference: str) -> tasks.Task:
    """The task that a reference names; raises InvalidTask where there is none, or it cannot be scored."""
    if reference.startswith(LM_EVAL):
        why = f"{reference[:80]} is lm-eval's, and asked by weft eval alone"
        raise InvalidTask(why, hint="weft eval --help")
    return tasks.read(Path(reference)) if reference.endswith(SUFFIX) else task(reference)


def expect(reference: str) -> None:
    """Raise what `find` would, without making a built-in task, which may take seconds."""
    if reference not in names():
        find(reference)
