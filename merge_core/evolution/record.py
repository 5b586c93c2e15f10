"""SearchRecord: what a result says of the search that found it (`SEARCH_FILE`).

The merge itself follows from its plan, and an audit executes that. The record tells how the numbers of the
recipe came to be: from which start, for which tasks, with which seed and budget. Whoever has the models and
the tasks can search again. `SearchRecord.parse(r.to_bytes()) == r`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_core import recipe as recipes
from merge_core.digest import Digest, canonical, check_version, parse_canonical
from merge_core.errors import CorruptCheckpoint, InvalidRecipe
from merge_core.evaluation.tasks import MAX_NAME, Metric, Task
from merge_core.evolution.fitness import Reading
from merge_core.evolution.genome import Shape

MAX_RECORD = 4 << 20
MAX_TASKS = 256
MAX_TOOLS = 32
MAX_VERSION = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A task by its digest, and how base, start and result did at all of its items; no base: None."""

    name: str
    metric: Metric
    items: int
    digest: Digest
    base: Reading | None
    start: Reading
    found: Reading

    @classmethod
    def of(cls, task: Task, base: Reading | None, start: Reading, found: Reading) -> Judged:
        """What is recorded of a task."""
        return cls(
            name=task.name,
            metric=task.metric,
            items=len(task.items),
            digest=task.digest,
            base=base,
            start=start,
            found=found,
        )

    def to_value(self) -> dict[str, Any]:
        """As JSON without floats."""
        return {
            "name": self.name,
            "metric": self.metric.value,
            "items": self.items,
            "digest": self.digest,
            "base": None if self.base is None else self.base.to_value(),
            "start": self.start.to_value(),
            "found": self.found.to_value(),
        }

    @classmethod
    def parse(cls, value: Any) -> Judged:
        """Read what `to_value` writes."""
        if not _is_name(value["name"], MAX_NAME):
            raise ValueError("the name of a task")
        return cls(
            name=value["name"],
            metric=Metric(value["metric"]),
            items=_count(value["items"]),
            digest=Digest(value["digest"]),
            base=None if value["base"] is None else Reading.parse(value["base"]),
            start=Reading.parse(value["start"]),
            found=Reading.parse(value["found"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRecord:
    """A search: `start` is the recipe it began with, models by ModelId; `recipe` digests the one it found.

    `evaluated` candidates of a `budget`; fewer where somebody stopped it. `fitness` is the digest of what a
    cost is, `trajectory` that of every candidate and its cost, `tools` are the versions that decide it.
    """

    start: str
    recipe: Digest
    shape: Shape
    seed: int
    budget: int
    evaluated: int
    fitness: Digest
    trajectory: Digest
    tools: Mapping[str, str]
    tasks: tuple[Judged, ...]
    reported: tuple[Judged, ...] = ()

    def to_bytes(self) -> bytes:
        """The canonical bytes."""
        return canonical(
            {
                "version": 1,
                "start": self.start,
                "recipe": self.recipe,
                "shape": self.shape.to_value(),
                "seed": self.seed,
                "budget": self.budget,
                "evaluated": self.evaluated,
                "fitness": self.fitness,
                "trajectory": self.trajectory,
                "tools": dict(self.tools),
                "tasks": [task.to_value() for task in self.tasks],
                "reported": [task.to_value() for task in self.reported],
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> SearchRecord:
        """Read a record that may come from anybody; raises CorruptCheckpoint on whatever is not exact."""
        try:
            if len(data) > MAX_RECORD:
                raise ValueError(f"{len(data)} bytes; at most {MAX_RECORD} are read")
            record = _read(parse_canonical(data))
            if record.to_bytes() != data:
                raise ValueError("it says more than a record of a search")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, InvalidRecipe) as error:
            raise CorruptCheckpoint(f"not the record of a search: {error}") from error
        return record


def _read(value: Any) -> SearchRecord:
    check_version(value["version"], 1, "record")
    recipes.parse(value["start"])
    tools, tasks, reported = value["tools"], value["tasks"], value["reported"]
    if len(tools) > MAX_TOOLS or not all(_is_name(word, MAX_VERSION) for kv in tools.items() for word in kv):
        raise ValueError("the tools")
    if not 1 <= len(tasks) <= MAX_TASKS or len(reported) > MAX_TASKS:
        raise ValueError("the number of tasks")
    seen = {task["digest"] for task in tasks} & {task["digest"] for task in reported}
    if seen or len({task["name"] for task in (*tasks, *reported)}) < len(tasks) + len(reported):
        raise ValueError("a task is named twice, or both sought by and reported")
    if _count(value["evaluated"]) > _count(value["budget"]):
        raise ValueError("more candidates than its budget")
    return SearchRecord(
        start=value["start"],
        recipe=Digest(value["recipe"]),
        shape=Shape.parse(value["shape"]),
        seed=_count(value["seed"]),
        budget=_count(value["budget"]),
        evaluated=_count(value["evaluated"]),
        fitness=Digest(value["fitness"]),
        trajectory=Digest(value["trajectory"]),
        tools=tools,
        tasks=tuple(map(Judged.parse, tasks)),
        reported=tuple(map(Judged.parse, reported)),
    )


def _is_name(value: Any, most: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= most and value.isprintable()


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:20]} is no count")
    return value
