"""The worker's side of an evaluation: models opened one after the other, each scored on every task.

    evaluate {models: [[name, directory]], tasks: [reference], limit?, batch_size?, device?}
        -> {rows: [{task, metric, items, digest, higher_is_better, values, nats_per_byte}]}

`values` are in the order of `models`; `limit` takes the first items of each task; the device `auto`, which is
the default, is a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_core.errors import MergeCoreError
from node.errors import LimitReached, LocalError
from node.worker.messages import Emit

if TYPE_CHECKING:
    from merge_core.evaluation.scoring import Score
    from merge_core.evaluation.tasks import Task


def evaluate(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Score models side by side; raises InvalidTask on a task that there is not, else as scoring does."""
    from merge_core.evaluation import named
    from merge_core.evaluation.scoring import BATCH

    tasks = [named.find(reference) for reference in request["tasks"]]
    if request.get("limit") is not None:
        tasks = [task.first(request["limit"]) for task in tasks]
    device = device_of(request.get("device", "auto"))
    batch_size = request.get("batch_size") or BATCH
    scores = [
        _score_all(name, Path(directory), tasks, batch_size, device, emit)
        for name, directory in request["models"]
    ]
    return {"rows": [_row(task, [by[i] for by in scores]) for i, task in enumerate(tasks)]}


def device_of(wanted: str) -> str:
    """The device of torch that a person means; raises LocalError where there is no GPU and one is wanted."""
    import torch

    there = torch.cuda.is_available()
    if wanted.startswith("cuda") and not there:
        raise LocalError("torch finds no GPU here", hint="the same command with --device cpu")
    return ("cuda" if there else "cpu") if wanted == "auto" else wanted


def _score_all(
    name: str, directory: Path, tasks: Sequence[Task], batch_size: int, device: str, emit: Emit
) -> list[Score]:
    from merge_core.evaluation.loading import load_model, load_tokenizer
    from merge_core.evaluation.scoring import score

    with telling(name):
        tokenizer = load_tokenizer(directory)
        model = load_model(directory)
    found = []
    for task in tasks:

        def count(done: int, total: int, what: str = f"{name} at {task.name}") -> None:
            emit({"kind": "progress", "what": what, "done": done, "total": total})

        with telling(f"{name} at {task.name}"):
            found.append(
                score(model, tokenizer, task, batch_size=batch_size, device=device, on_progress=count)
            )
    return found


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Say of an error which model and task it is about; raises LimitReached where a GPU's memory ran out."""
    import torch

    try:
        yield
    except MergeCoreError as error:
        error.why = f"{what}: {error.why}"
        raise
    except torch.OutOfMemoryError as error:
        hint = "the same command with --batch-size 1, or with --device cpu"
        raise LimitReached(f"{what}: the memory of the GPU ran out", hint=hint) from error


def _row(task: Task, scores: Sequence[Score]) -> dict[str, Any]:
    return {
        "task": task.name,
        "metric": task.metric.value,
        "items": len(task.items),
        "digest": task.digest,
        "higher_is_better": task.metric.higher_is_better,
        "values": [score.value for score in scores],
        "nats_per_byte": [sum(score.losses) / sum(score.bytes) for score in scores],
    }
