"""Evaluation: models side by side on tasks, and what a table of that says.

The worker scores; what is best of a row, and how models do over all tasks of one metric, is worked out here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.checkpoint.reader import Checkpoint
from merge_core.evaluation import tasks
from node.errors import UsageError

Data = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """What to measure: tasks by name or file; `limit` takes the first items of each."""

    tasks: tuple[str, ...]
    limit: int | None = None
    batch_size: int | None = None
    device: str = "auto"


def named(directories: Sequence[Path]) -> dict[str, Path]:
    """Directories by their own names, or as they were written where two have one name."""
    names = [path.resolve().name for path in directories]
    found = {
        name if names.count(name) == 1 else str(path): path
        for name, path in zip(names, directories, strict=True)
    }
    if len(found) < len(directories):
        raise UsageError("one model is named twice", hint="weft eval --help")
    return found


async def evaluate(models: Mapping[str, Path], how: Measuring, *, on_event: Callable[[Data], None]) -> Data:
    """Score models in a worker; the data that `weft eval --json` prints.

    Raises InvalidTask on a task that there is not, CorruptCheckpoint and Unmergeable on models.
    """
    from node.worker import process

    _look(models, how)
    request = {
        "models": [[name, str(path.absolute())] for name, path in models.items()],
        "tasks": list(how.tasks),
        "limit": how.limit,
        "batch_size": how.batch_size,
        "device": how.device,
    }
    rows = (await process.run("evaluate", request, on_event=on_event))["rows"]
    return {
        "models": [{"name": name, "directory": str(path.absolute())} for name, path in models.items()],
        "tasks": [row | {"best": best(row)} for row in rows],
        "summary": summary(rows),
    }


def _look(models: Mapping[str, Path], how: Measuring) -> None:
    """Raise early what needs no worker to be seen: a directory that is no model, a file that is no task."""
    for path in models.values():
        Checkpoint.open(path).close()
    names = [tasks.read(Path(wanted)).name if wanted.endswith(".jsonl") else wanted for wanted in how.tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice or not names:
        why = f"two tasks are called {twice}" if twice else "no task is named"
        raise UsageError(why, hint="weft eval --help")


def best(row: Data) -> list[int]:
    """Which models are best at a task, by their places; none where there is only one."""
    values = row["values"]
    most = max(values) if row["higher_is_better"] else min(values)
    return [place for place, value in enumerate(values) if value == most] if len(values) > 1 else []


def summary(rows: Sequence[Data]) -> list[Data]:
    """For each metric of two tasks or more: each model's mean and its worst task, and who is best at both."""
    found = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        same = [row for row in rows if row["metric"] == metric]
        if len(same) < 2:
            continue
        higher = same[0]["higher_is_better"]
        by_model = list(zip(*(row["values"] for row in same), strict=True))
        for name, over in (("mean", _mean), ("worst", min if higher else max)):
            row = {"over": name, "metric": metric, "higher_is_better": higher}
            row["values"] = [over(values) for values in by_model]
            found.append(row | {"best": best(row)})
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
