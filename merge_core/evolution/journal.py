"""The journal of a search: JSON lines of what was asked and read, so that a killed search can go on.

    {"search":{"seed":"0","torch":"2.13.0",…},"version":2}
    {"generation":3,"number":0,"question":{"model":null,"share":"0x1.0p-2","values":["0x1.8p-1"]},"readings":[…]}

What a model reads is a function of the question alone. So nothing of the strategy is stored: a search that is
taken up runs from its seed again, and what lies here is not evaluated twice. Each line is on the disk before
the next is asked; one that was cut short is the end, and is evaluated again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from merge_core.digest import canonical
from merge_core.errors import MergeCoreError
from merge_core.evolution.fitness import Reading, Readings

MAX_LINE = 1 << 20
MAX_LINES = 1 << 20
_BEFORE_CANDIDATES = 3
"""Lines that come first: the head, the base, the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is evaluated, at a share of the items: a candidate by its settled values, or a `model`.

    With neither the recipe that the search began with, as it stands.
    """

    share: float
    values: tuple[float, ...] = ()
    model: str | None = None

    def to_value(self) -> dict[str, Any]:
        """As JSON without floats; `Question.parse` reads it."""
        return {"share": self.share.hex(), "values": [v.hex() for v in self.values], "model": self.model}

    @classmethod
    def parse(cls, value: Any) -> Question:
        """Read what `to_value` writes; raises ValueError, TypeError or KeyError on anything else."""
        share, model = float.fromhex(value["share"]), value["model"]
        values = tuple(float.fromhex(v) for v in value["values"])
        if not 0 < share <= 1 or not all(map(math.isfinite, values)):
            raise ValueError("a share, or a value, out of range")
        if model is not None and not isinstance(model, str):
            raise TypeError("the model")
        return cls(share=share, values=values, model=model)


def holds_candidates(path: Path) -> bool:
    """Whether a journal holds more than its head and what base and start read: what took time to find out."""
    try:
        with path.open("rb") as file:
            first = [file.readline(MAX_LINE) for _ in range(_BEFORE_CANDIDATES + 1)]
    except FileNotFoundError:
        return False
    return bool(first[-1])


class Journal:
    """The open journal of one search; a context manager that closes the file.

    `search` is all that decides what is asked and how it is answered, by what people call it. Opening cuts
    off a torn last line; raises MergeCoreError, and touches nothing, where a file is another search's.
    """

    def __init__(self, path: Path, search: Mapping[str, str], *, tasks: int) -> None:
        self._path = path
        self._tasks = tasks
        self._search = dict(search)
        self._head = canonical({"version": 2, "search": self._search}) + b"\n"
        self._file: BinaryIO = path.open("r+b" if path.exists() else "w+b")
        self._readings: dict[Question, Readings] = {}
        try:
            self._load()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def readings(self) -> Mapping[Question, Readings]:
        """What was read so far."""
        return self._readings

    def add(self, question: Question, readings: Readings, *, generation: int, number: int) -> None:
        """Append what was read; it outlives the machine from here on."""
        line = {
            "generation": generation,
            "number": number,
            "question": question.to_value(),
            "readings": [reading.to_value() for reading in readings],
        }
        self._file.write(canonical(line) + b"\n")
        self._sync()
        self._readings[question] = readings

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _load(self) -> None:
        good, head = 0, self._file.readline(MAX_LINE)
        if head.endswith(b"\n"):
            self._expect(head)
            good = len(head)
            while len(self._readings) < MAX_LINES and (line := self._file.readline(MAX_LINE)):
                try:
                    question, readings = self._entry(line)
                except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                    break
                self._readings[question] = readings
                good += len(line)
        self._file.seek(good)
        self._file.truncate()
        if good == 0:
            self._file.write(self._head)
        self._sync()

    def _expect(self, head: bytes) -> None:
        """Raise MergeCoreError, naming what differs, where a head is not that of this search."""
        if head == self._head:
            return
        try:
            known = dict(json.loads(head)["search"])
            names = sorted({*known, *self._search})
            told = [f"{name} was {known.get(name)}, is {self._search.get(name)}" for name in names]
            differ = [
                words
                for name, words in zip(names, told, strict=True)
                if known.get(name) != self._search.get(name)
            ]
        except (ValueError, TypeError, KeyError, RecursionError):
            differ = []
        raise MergeCoreError(
            f"{self._path} is the journal of another search: {'; '.join(differ) or 'a strange first line'}",
            hint="put that back as it was, or choose another -o and leave out --resume",
        )

    def _entry(self, line: bytes) -> tuple[Question, Readings]:
        if not line.endswith(b"\n"):
            raise ValueError("a torn line")
        value: Any = json.loads(line)
        readings = tuple(map(Reading.parse, value["readings"]))
        if len(readings) != self._tasks:
            raise ValueError("the number of tasks")
        return Question.parse(value["question"]), readings
