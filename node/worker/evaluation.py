"""The worker's side of an evaluation: models opened one after the other, each scored on every task.

    evaluate {models: [[name, directory]], tasks: [reference], limit?, batch_size?, device?,
              tasks_path?, download?, run_code?}
        -> {rows: [{task, metric, items, digest, higher_is_better, values, nats_per_byte}]}

`values` are in the order of `models`, null where a metric was not read of one; `limit` takes the first
items of each task; the device `auto`, which is the default, is a GPU where there is one. What begins with
`lm-eval:` is lm-eval's: it is looked up in `tasks_path` too, fetches data only with `download`, and runs
what a model writes only with `run_code`; its rows have neither digest nor nats.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_core.errors import MergeCoreError
from merge_core.evaluation.named import LM_EVAL
from node.errors import LimitReached, LocalError
from node.worker.messages import Emit

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from merge_core.evaluation.harness import Harness
    from merge_core.evaluation.tasks import Task

Row = dict[str, Any]
Scorer = Callable[["Scored", Emit], list[Row]]


def evaluate(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Score models side by side; raises InvalidTask on a task that there is not, else as scoring does."""
    if request.get("download"):  # before anything reads them
        os.environ |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    device, scorers = device_of(request.get("device", "auto")), _scorers(request)
    _look(request["models"])
    columns = []
    for name, directory in request["models"]:
        scored = _opened(name, Path(directory), device)
        columns.append([row for scorer in scorers for row in scorer(scored, emit)])
        del scored  # two models at once may be more than fits
    return {"rows": joined(columns)}


def _look(models: Sequence[Sequence[str]]) -> None:
    """Raise what a later model would be refused for before the first one is scored."""
    from merge_core.evaluation.loading import expect_model

    for name, directory in models:
        with telling(name):
            expect_model(Path(directory))


def _opened(name: str, directory: Path, device: str) -> Scored:
    from merge_core.evaluation.loading import load_model, load_tokenizer

    with telling(name):
        tokenizer = load_tokenizer(directory)
        return Scored(name, load_model(directory).to(device), tokenizer, device)


@dataclass(frozen=True, slots=True)
class Scored:
    """The model that is scored."""

    name: str
    model: Any
    tokenizer: Tokenizer
    device: str


def _scorers(request: dict[str, Any]) -> list[Scorer]:
    """A function for each task that is asked for, in order, once all of them are found."""
    from merge_core.evaluation import named
    from merge_core.evaluation.scoring import BATCH

    limit, batch_size = request.get("limit"), request.get("batch_size") or BATCH
    foreign = [name.removeprefix(LM_EVAL) for name in request["tasks"] if name.startswith(LM_EVAL)]
    harness: Harness | None = None
    if foreign:
        from merge_core.evaluation.harness import Harness as Found

        folder = Path(request["tasks_path"]) if request.get("tasks_path") else None
        options = {"limit": limit, "batch_size": batch_size, "runs_code": request.get("run_code", False)}
        harness = Found.find(foreign, folder, **options)
    scorers: list[Scorer] = []
    for reference in request["tasks"]:
        if harness is not None and reference.startswith(LM_EVAL):
            scorers.append(partial(_ask_harness, harness, reference))
        else:
            task = named.find(reference)
            scorers.append(partial(_score, task if limit is None else task.first(limit), batch_size))
    return scorers


def device_of(wanted: str) -> str:
    """The device of torch that a person means; raises LocalError where there is no GPU and one is wanted."""
    import torch

    there = torch.cuda.is_available()
    if wanted.startswith("cuda") and not there:
        raise LocalError("torch finds no GPU here", hint="the same command with --device cpu")
    return ("cuda" if there else "cpu") if wanted == "auto" else wanted


def _score(task: Task, batch_size: int, scored: Scored, emit: Emit) -> list[Row]:
    from merge_core.evaluation.scoring import score

    what = f"{scored.name} at {task.name}"

    def count(done: int, total: int) -> None:
        emit({"kind": "progress", "what": what, "done": done, "total": total})

    with telling(what):
        found = score(
            scored.model,
            scored.tokenizer,
            task,
            batch_size=batch_size,
            device=scored.device,
            on_progress=count,
        )
    return [
        {
            "task": task.name,
            "metric": task.metric.value,
            "items": len(task.items),
            "digest": task.digest,
            "higher_is_better": task.metric.higher_is_better,
            "value": found.value,
            "nats_per_byte": sum(found.losses) / sum(found.bytes),
        }
    ]


def _ask_harness(harness: Harness, reference: str, scored: Scored, emit: Emit) -> list[Row]:
    what = f"{scored.name} at {reference}"
    emit({"kind": "progress", "what": what, "done": 0, "total": 0})
    with telling(what):
        found = harness.measure(reference.removeprefix(LM_EVAL), scored.model, scored.tokenizer)
    return [
        {
            "task": LM_EVAL + reading.task,
            "metric": LM_EVAL + reading.metric,
            "items": reading.items,
            "digest": None,
            "higher_is_better": reading.higher_is_better,
            "value": reading.value,
            "nats_per_byte": None,
        }
        for reading in found
    ]


def joined(columns: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of all models, one for each task and metric that was read of some."""
    by_name = [{(row["task"], row["metric"]): row for row in column} for column in columns]
    firsts: dict[tuple[str, str], Row] = {}
    for column in by_name:
        firsts = column | firsts
    names = dict.fromkeys(name for column in by_name for name in column)
    rows = []
    for name in names:
        told = {key: value for key, value in firsts[name].items() if key not in ("value", "nats_per_byte")}
        for key, plural in (("value", "values"), ("nats_per_byte", "nats_per_byte")):
            told[plural] = [column[name][key] if name in column else None for column in by_name]
        rows.append(told)
    return rows


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
