"""The evolve job: which coefficients of a recipe merge best, sought in a worker, then the merge by them.

    1 find and plan          as a merge does: the plan of the recipe as it stands
    2 agree and fetch        as for that merge, which the agreements name
    3 search                 in a worker; it ends by itself, or when the job is told to settle for its best
    4 merge                  the recipe that was found; what peers gave is agreed on again, for its plan

What an interrupted search leaves lies in one hidden folder beside the target, above all its journal, with
which it goes on as if nothing had been. The folder goes when the merged model is in its place, or where a
search fails before a candidate was read.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_core import recipe as recipes
from merge_core.errors import MergeCoreError, Unmergeable
from merge_core.evaluation.named import expect
from merge_core.evolution.genome import Shape
from merge_core.evolution.journal import holds_candidates
from merge_core.evolution.record import SearchRecord
from merge_core.recipe import Recipe
from merge_core.resolve.stack import stack_of
from node.domain.job import BEGUN, FOUND, SETTLE, JobState
from node.errors import LocalError, WeftError
from node.jobs.runner import Attempt
from node.merging.merge import Merging, Planned, lay_out, worker_input
from node.merging.parents import Obtained
from node.worker import process

MOST_LAYERS = 4
"""Points over the depth where nobody says how many: more coefficients need more candidates."""

MOST_PROCESSES = 8
_PROCESS = 1 << 29
"""What an evaluator takes beside its model."""

_TOLD = ("generations", "of", "cost", "start_cost")
"""What a result says of its search; the rest lies beside the model."""


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

    def to_json(self) -> dict[str, Any]:
        """The keys of a job's request, but for `processes`; `Search.of` reads them."""
        return {
            "tasks": list(self.tasks),
            "reported": list(self.reported),
            "shape": self.shape.to_value(),
            "layers": self.layers,
            "seed": self.seed,
            "budget": self.budget,
        }

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> Search:
        """What a job's request says."""
        return cls(
            tasks=tuple(request["tasks"]),
            reported=tuple(request["reported"]),
            shape=Shape.parse(request["shape"]),
            layers=request["layers"],
            seed=request["seed"],
            budget=request["budget"],
            processes=request.get("processes"),
        )

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


class Evolving:
    """Seeks coefficients, and merges by what it finds."""

    def __init__(self, merging: Merging) -> None:
        self._merging = merging

    async def evolve(self, attempt: Attempt, processes: int | None = None) -> dict[str, Any]:
        """Do the job {recipe, directory, …} with what `Search.to_json` says.

        The result is that of a merge, and `search`: {generations, of, cost, start_cost}. Raises LocalError
        where another process searches for the same target, Unmergeable where models changed meanwhile.
        """
        target = Path(attempt.request["directory"])
        recipe = recipes.parse(attempt.request["recipe"])
        if attempt.reached(FOUND) is None:
            search = Search.of(attempt.request)
            if processes is not None:
                search = replace(search, processes=processes)
            for task in (*search.tasks, *search.reported):  # before anything is fetched or hashed
                await asyncio.to_thread(expect, task)
            attempt.reach(FOUND, await self._seek(attempt, recipe, target, search))
        await self._plan(recipe, attempt)  # names may mean something else by now
        found = attempt.reached(FOUND)
        asked = {"recipe": found["recipe"], "directory": str(target), "search": found["record"]}
        made = await self._merging.merge(attempt, asked=asked)
        await asyncio.to_thread(discard, target)
        return made | {"search": {key: found[key] for key in _TOLD}}

    async def _plan(self, recipe: Recipe, attempt: Attempt) -> Planned:
        """The plan of the recipe as it stands, the same in every attempt."""
        planned = await self._merging.plan(recipe, attempt)
        if attempt.reached("start") not in (None, planned.plan.digest):
            raise Unmergeable(
                "the models of this recipe have changed since the search began",
                hint="weft evolve RECIPE -o another directory",
            )
        attempt.reach("start", planned.plan.digest)
        return planned

    async def _seek(self, attempt: Attempt, recipe: Recipe, target: Path, search: Search) -> dict[str, Any]:
        """Search, or go on where the journal ends: {recipe, record, …} as the worker says."""
        planned, obtained = await self._merging.obtain(await self._plan(recipe, attempt), attempt)
        attempt.enter(JobState.SEARCHING)
        folder = folder_of(target)
        folder.mkdir(exist_ok=True)
        with _held(folder, target):
            request = {
                "recipe": recipe.to_yaml(),
                "shape": search.shaped(planned).to_value(),
                "seed": search.seed,
                "budget": search.budget,
                "tasks": list(search.tasks),
                "reported": list(search.reported),
                "processes": search.at_once(planned),
                "journal": str(folder / "journal"),
                "stop": bool(attempt.reached(SETTLE)),
            }
            try:
                request["inputs"] = await asyncio.to_thread(_laid_out, folder, planned, obtained)
                found = await process.run("evolve", request, on_event=_teller(attempt))
            except (MergeCoreError, WeftError):
                if not holds_candidates(folder / "journal"):
                    discard(target)  # what was read is dear; nothing was
                raise
        SearchRecord.parse(found["record"].encode())
        return found


def folder_of(target: Path) -> Path:
    """Where a search for `target` keeps what a resume needs."""
    return target.parent / f".{target.name}.weft-search"


def discard(target: Path) -> None:
    """Remove what a search has left, once its result is in place."""
    shutil.rmtree(folder_of(target), ignore_errors=True)


def _laid_out(folder: Path, planned: Planned, obtained: Obtained) -> dict[str, Any]:
    """The models of the recipe, by reference, as the worker is told of them."""
    inputs = [obtained.parents[parent.model_id] for parent in planned.parents]
    lay_out(folder, planned.plan, inputs)
    return {
        parent.reference: {**worker_input(folder, position, here), "hashed": here.hashed}
        for position, (parent, here) in enumerate(zip(planned.parents, inputs, strict=True))
    }


def _teller(attempt: Attempt) -> Callable[[dict[str, Any]], None]:
    """Pass what a search tells on to the job's watchers."""

    def tell(event: dict[str, Any]) -> None:
        if event["kind"] == "generation":
            attempt.reach(BEGUN, True)
            attempt.show(event)
        elif event["kind"] == "settling":
            attempt.progress("the best are asked all items", 0, 0)

    return tell


@contextmanager
def _held(folder: Path, target: Path) -> Iterator[None]:
    """Be the only search in a folder; raises LocalError where another process is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalError(
                f"{target} is being sought by another search", hint=f"weft evolve RECIPE -o {target}-2"
            ) from None
        yield
    finally:
        os.close(descriptor)
