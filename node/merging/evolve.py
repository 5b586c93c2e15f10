"""A search in the foreground: which coefficients merge best, then the merge by them.

What an interrupted search leaves lies in one hidden folder beside the target: its journal, and what it was
asked. It goes when the merged model is in its place, or where a search fails before anything was read.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_core import files
from merge_core.errors import MergeCoreError
from merge_core.evolution.genome import Shape
from merge_core.evolution.journal import holds_readings
from merge_core.evolution.record import SearchRecord
from merge_core.recipe import Recipe
from merge_core.resolve.stack import stack_of
from node.errors import LocalError, NotEnoughPeers
from node.merging.merge import Merging, Planned, lay_out, worker_input
from node.merging.parents import on_disk
from node.worker import process

MOST_LAYERS = 4
"""Points over the depth where nobody says how many: more coefficients need more candidates."""

MOST_PROCESSES = 8
_PROCESS = 1 << 29
"""What an evaluator takes beside its model."""

Event = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is sought, and by what: tasks are names or paths; `layers` None is left to the depth of the model.

    `processes` do not show in the result; None leaves them to the cores and the memory of this machine.
    """

    tasks: tuple[str, ...]
    reported: tuple[str, ...] = ()
    shape: Shape
    layers: int | None = None
    seed: int = 0
    budget: int = 200
    processes: int | None = None

    def shaped(self, planned: Planned) -> Shape:
        """The shape of the genome over the models of a merge."""
        depth = stack_of(planned.parents[0].header).count
        return replace(self.shape, layers=min(depth, MOST_LAYERS) if self.layers is None else self.layers)

    def at_once(self, planned: Planned) -> int:
        """How many processes evaluate: each holds a model in float32, half the memory is left to others."""
        largest = max(sum(math.prod(i.shape) for i in p.header.tensors.values()) for p in planned.parents)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        room = max(1, memory // (_PROCESS + 4 * largest))
        return self.processes or min(len(os.sched_getaffinity(0)), MOST_PROCESSES, room)


def folder_of(target: Path) -> Path:
    """Where a search for `target` keeps what a resume needs."""
    return target.parent / f".{target.name}.weft-search"


async def seek(
    merging: Merging,
    recipe: Recipe,
    target: Path,
    search: Search,
    *,
    resume: bool,
    stop: bool = False,
    on_event: Event,
) -> dict[str, Any]:
    """Search, or go on with a search that was interrupted; `stop` settles for the best that it has found.

    Returns {recipe, record, generations, of, evaluated, cost, start_cost}. Raises LocalError where
    something else lies, or another search.
    """
    _check_place(target, resume=resume)
    try:
        planned = await merging.plan(recipe)
    except NotEnoughPeers as error:
        raise NotEnoughPeers(error.why, hint="weft get MODEL, then: weft evolve RECIPE") from error
    shape = search.shaped(planned)
    asked = _asked(recipe, search, shape)
    folder = folder_of(target)
    begun = folder.exists()
    folder.mkdir(exist_ok=True)
    with _held(folder, target):
        _begin(folder, asked, target)
        journal = folder / "journal"
        try:
            inputs = _laid_out(folder, planned)
            more = {"inputs": inputs, "processes": search.at_once(planned), "stop": stop}
            found = await process.run("evolve", {**asked, **more, "journal": str(journal)}, on_event=on_event)
        except MergeCoreError:
            if not begun and not holds_readings(journal):
                discard(target)  # what was read is dear; nothing was
            raise
    SearchRecord.parse(found["record"].encode())
    return found


def _laid_out(folder: Path, planned: Planned) -> dict[str, Any]:
    """The models of the recipe, by reference, as the worker is told of them."""
    inputs = [on_disk(parent) for parent in planned.parents]
    lay_out(folder, planned.plan, inputs)
    return {
        parent.reference: {**worker_input(folder, position, here), "hashed": here.hashed}
        for position, (parent, here) in enumerate(zip(planned.parents, inputs, strict=True))
    }


def discard(target: Path) -> None:
    """Remove what a search has left, once its result is in place."""
    shutil.rmtree(folder_of(target), ignore_errors=True)


def _asked(recipe: Recipe, search: Search, shape: Shape) -> dict[str, Any]:
    return {
        "recipe": recipe.to_yaml(),
        "shape": shape.to_value(),
        "seed": search.seed,
        "budget": search.budget,
        "tasks": list(search.tasks),
        "reported": list(search.reported),
    }


def _check_place(target: Path, *, resume: bool) -> None:
    if not target.parent.is_dir():
        raise LocalError(f"{target.parent} is not a directory", hint=f"mkdir -p {target.parent}")
    unfinished = folder_of(target).exists()
    if unfinished and not resume:
        raise LocalError(
            f"an interrupted search for {target} lies here",
            hint=f"weft evolve RECIPE -o {target} --resume, or rm -r {folder_of(target)}",
        )
    if target.exists() and not unfinished:
        raise LocalError(f"{target} exists", hint=f"weft evolve RECIPE -o {target}-2")


def _begin(folder: Path, asked: dict[str, Any], target: Path) -> None:
    """Write down what is asked; raises LocalError where an interrupted search was asked something else."""
    path, data = folder / "asked.json", json.dumps(asked).encode()
    if not path.exists():
        files.replace(path, data)
    elif path.read_bytes() != data:
        raise LocalError(
            f"the interrupted search for {target} was another one",
            hint=f"weft evolve as it was first called, or rm -r {folder}",
        )


@contextmanager
def _held(folder: Path, target: Path) -> Iterator[None]:
    """Be the only search in a folder; raises LocalError where another process is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalError(
                f"{target} is being sought by another process", hint=f"weft evolve RECIPE -o {target}-2"
            ) from None
        yield
    finally:
        os.close(descriptor)
