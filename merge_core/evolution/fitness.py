"""Fitness: what a candidate costs, less being better, and which items it is asked.

    cost = mean over the tasks of c + WORST · the worst c,  c = loss / yardstick + share of wrong answers

The loss is nats per byte of the right answers; its yardstick is the better of base and start at the same task
and items, so 1 means no gain at all, and no task counts more for being harder. The worst task counts again:
a merge that forgets one skill for another is no good one. Bits per byte has no wrong answers.

Early generations are asked a quarter of the items, later ones half, the last all of them (as MERGE³ reduces
them, arXiv:2502.10436). Which items those are follows from the seed and their digests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_core.digest import Digest, canonical, sha256
from merge_core.errors import InvalidTask, Unmergeable
from merge_core.evaluation.tasks import Item, Metric, Task

WORST = 0.5
"""What the worst task counts beside the mean."""
MOST = 10.0
"""The loss, in yardsticks, beyond which nothing gets worse: broken candidates are all alike."""
SHARES = (0.25, 0.5, 1.0)
"""The shares of the items that the thirds of a search are asked."""
FEWEST = 32
"""A task is asked so many of its items at least."""

_FLOOR = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a model did at a task: nats per byte of the right answers, and the share of right ones if any."""

    loss: float
    right: float | None = None

    def to_value(self) -> list[str | None]:
        """As JSON without floats; `Reading.parse` reads it."""
        return [self.loss.hex(), None if self.right is None else self.right.hex()]

    @classmethod
    def parse(cls, value: Any) -> Reading:
        """Read what `to_value` writes; raises ValueError or TypeError on anything else."""
        loss, right = value
        reading = cls(loss=float.fromhex(loss), right=None if right is None else float.fromhex(right))
        if math.isnan(reading.loss) or reading.loss < 0 or not 0 <= (reading.right or 0) <= 1:
            raise ValueError(f"a reading of {value}")
        return reading


BROKEN = Reading(loss=math.inf, right=0.0)
"""What is read of a candidate that holds NaN or infinity."""

Readings = tuple[Reading, ...]
"""One for each task, in order."""


def cost(readings: Readings, yardsticks: Sequence[float]) -> float:
    """What a candidate costs; finite, as yardsticks are."""
    each = [_cost(reading, yardstick) for reading, yardstick in zip(readings, yardsticks, strict=True)]
    return sum(each) / len(each) + WORST * max(each)


def yardsticks(*references: Readings) -> tuple[float, ...]:
    """The least loss of several models at each task: what counts as 1.

    Raises Unmergeable where none of them computes numbers: nothing can be told in their terms.
    """
    least = [min(reading.loss for reading in task) for task in zip(*references, strict=True)]
    if not all(map(math.isfinite, least)):
        raise Unmergeable(
            "neither the base nor the recipe as it stands computes numbers: there is nothing to compare with",
            hint="weft eval BASE --tasks TASK; or begin with smaller weights",
        )
    return tuple(max(loss, _FLOOR) for loss in least)


def portion(task: Task, share: float, seed: int) -> Task:
    """The items of a task that candidates are asked at a share: each portion contains the smaller ones."""
    wanted = max(min(FEWEST, len(task.items)), math.ceil(share * len(task.items)))
    keys = [sha256(f"{seed}/{digest}".encode()) for digest in task.item_digests]
    chosen = sorted(range(len(keys)), key=lambda i: (keys[i], i))[:wanted]
    return Task(name=task.name, metric=task.metric, items=tuple(task.items[i] for i in sorted(chosen)))


def share_of(generation: int, generations: int) -> float:
    """The share of the items that a generation, counted from 0, is asked."""
    return SHARES[min(generation * len(SHARES) // generations, len(SHARES) - 1)]


def definition(tasks: Sequence[Task], seed: int) -> Digest:
    """The digest of all that a cost is worked out from, but the models."""
    terms = {"worst": WORST.hex(), "most": MOST.hex(), "fewest": FEWEST}
    shares = [share.hex() for share in SHARES]
    return sha256(
        canonical({"terms": terms, "shares": shares, "seed": seed, "tasks": [task.digest for task in tasks]})
    )


def refuse_shared(sought: Sequence[Task], reported: Sequence[Task]) -> None:
    """Raise InvalidTask where an item is both sought by and reported: such a report would tell nothing.

    Items are the same where their text is, wherever the prompt ends, or where one question has two answers;
    what text goes on from is no question, and may come twice.
    Tasks of one name are refused too: nobody could tell them apart.
    """
    asked = {
        digest: task.name for task in sought for item in task.items for digest in _traits(item, task.metric)
    }
    for task in reported:
        known = [
            [asked[digest] for digest in _traits(item, task.metric) if digest in asked] for item in task.items
        ]
        shared = [names[0] for names in known if names]
        if shared:
            raise InvalidTask(
                f"{task.name} shares {len(shared)} items with {shared[0]}, by which was sought",
                hint="report on items that the search has not seen, such as those of a :test split",
            )
    names = [task.name for task in (*sought, *reported)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        raise InvalidTask(f"two tasks are called {name}", hint="name each task once")


def by_name(tasks: Sequence[Task], readings: Readings) -> Mapping[str, Reading]:
    """Readings by the names of their tasks."""
    return {task.name: reading for task, reading in zip(tasks, readings, strict=True)}


def _traits(item: Item, metric: Metric) -> Iterator[Digest]:
    """By what an item is known again: all its text, and its prompt where that is a question."""
    yield sha256(f"text/{item.prompt}{item.answer}".encode())
    if metric is not Metric.BITS_PER_BYTE:
        yield sha256(f"prompt/{item.prompt}".encode())


def _cost(reading: Reading, yardstick: float) -> float:
    wrong = 0.0 if reading.right is None else 1.0 - reading.right
    return min(reading.loss, MOST * yardstick) / yardstick + wrong
