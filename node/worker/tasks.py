"""What a worker can do: TASKS, a table of functions from a request to a result.

Requests and results are small JSON objects; whatever is large (plans, leaf tables, weights) is passed as a
path. Heavy modules are imported inside the task that needs them, so that hashing never pays for torch.

    zoo          {directory, seed, size}                       -> {base, experts: {domain: directory}}
    evaluate     {models: {name: directory}, domains, split?, limit?} -> {scores: {name: {domain: share}}}
    fingerprint  {input, model_id, output}                     -> {digest, size}

An `input` is {directory, manifest, leaves}: a checkpoint, and the paths of its manifest and leaf table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from node.worker.messages import Emit

Request = dict[str, Any]
Result = dict[str, Any]


def zoo(request: Request, emit: Emit) -> Result:
    """Train the base and the experts of one seed, or find them complete in `directory`."""
    from merge_core import zoo

    built = zoo.build(
        Path(request["directory"]),
        seed=request["seed"],
        size=request.get("size", "demo"),
        on_progress=lambda what, done, total: emit(
            {"kind": "progress", "what": what, "done": done, "total": total}
        ),
    )
    return {"base": str(built.base), "experts": {name: str(path) for name, path in built.experts.items()}}


def evaluate(request: Request, emit: Emit) -> Result:
    """Score each model by exact match on each domain."""
    from merge_core.evaluation import score

    scores: dict[str, dict[str, float]] = {}
    models: dict[str, str] = request["models"]
    for done, (name, directory) in enumerate(models.items()):
        emit({"kind": "progress", "what": f"score {name}", "done": done, "total": len(models)})
        scores[name] = score(
            Path(directory),
            tuple(request["domains"]),
            split=request.get("split", "test"),
            limit=request.get("limit"),
        )
    return {"scores": scores}


TASKS: dict[str, Callable[[Request, Emit], Result]] = {
    "zoo": zoo,
    "evaluate": evaluate,
}
