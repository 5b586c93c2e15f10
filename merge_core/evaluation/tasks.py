"""Tasks: items with a metric, from anybody's JSONL file.

    task = read(Path("sums.jsonl"))
    task.metric, len(task.items), task.digest

One object a line; what it holds says what is measured:

    {"prompt": "2+2=", "answer": "4"}                                 exact_match
    {"prompt": "2+2 is", "answer": " 4", "choices": [" 3", " 4"]}     choice
    {"text": "Once upon a time …"}                                    bits_per_byte

An answer follows its prompt as it stands: a space between the two belongs to one of them. A line may name
its `metric`, also bits_per_byte for an answer after its prompt; a file has one metric. Blank lines are passed
over, other keys are refused. `parse(task.name, task.lines()) == task`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import Enum
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from merge_core.checkpoint.published import read_bounded
from merge_core.digest import Digest, canonical, sha256
from merge_core.errors import CorruptCheckpoint, InvalidTask

MAX_FILE = 64 << 20
MAX_LINE = 4 << 20
MAX_ITEMS = 100_000
MAX_TEXT = 1 << 20
"""Characters of a prompt, an answer or a choice."""
MAX_CHOICES = 64
MAX_NAME = 120

_KEYS = frozenset({"prompt", "answer", "choices", "text", "metric"})
_MOST = 10_000
"""Files of a folder that are looked at for a name that may have been meant."""
_HINT = "weft eval --help shows what a line looks like"


class Metric(Enum):
    """What is measured; `choice` and `exact_match` are shares of right items."""

    EXACT_MATCH = "exact_match"
    CHOICE = "choice"
    BITS_PER_BYTE = "bits_per_byte"

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it is better."""
        return self is not Metric.BITS_PER_BYTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question and its right answer, which is among `choices` where there are any."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def digest(self) -> Digest:
        """Of what is asked and what is right, whatever wrong choices stand beside it."""
        return sha256(canonical([self.prompt, self.answer]))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Items in their order, and the metric they are scored by; raises InvalidTask where they do not fit it.

    `name` is for people: two tasks of the same items and metric have one digest.
    """

    name: str
    metric: Metric
    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > MAX_NAME or not self.name.isprintable():
            raise InvalidTask(f"{self.name[:40]!r} is no name of at most {MAX_NAME} printable characters")
        if not 1 <= len(self.items) <= MAX_ITEMS:
            raise InvalidTask(f"{self.name} has {len(self.items)} items; 1 to {MAX_ITEMS} are scored")
        for number, item in enumerate(self.items, 1):
            why = _problem(item, self.metric)
            if why:
                raise InvalidTask(f"{self.name}, item {number}: {why}", hint=_HINT)

    @cached_property
    def digest(self) -> Digest:
        """Of metric and items, in their order."""
        listed = [[item.prompt, item.answer, list(item.choices)] for item in self.items]
        return sha256(canonical({"version": 1, "metric": self.metric.value, "items": listed}))

    @cached_property
    def item_digests(self) -> tuple[Digest, ...]:
        """One for each item: tasks that share none ask nothing twice."""
        return tuple(item.digest for item in self.items)

    def first(self, count: int) -> Task:
        """The first `count` items as a task of the same name."""
        return replace(self, items=self.items[:count])

    def lines(self) -> Iterator[str]:
        """The task as JSONL, without line ends."""
        for item in self.items:
            line: dict[str, Any] = {"metric": self.metric.value, "prompt": item.prompt, "answer": item.answer}
            yield json.dumps(line | ({"choices": item.choices} if item.choices else {}))


def unknown(reference: str, known: Iterable[str], *, hint: str = "weft eval --help") -> InvalidTask:
    """The error for a task that there is not, which tells the nearest of those that there are.

    Of names with a colon, the nearest has the same word before it, where one has.
    """
    names = list(known)
    alike = [name for name in names if name.partition(":")[0] == reference.partition(":")[0]]
    among, least = (names, 0.6) if len(alike) in (0, len(names)) else (alike, 0.0)
    near = get_close_matches(reference[:200], among, n=1, cutoff=least)
    said = f"did you mean {near[0]}?" if near else "a task is rev:test and the like, or FILE.jsonl"
    return InvalidTask(f"there is no task {reference[:80]!r}: {said}", hint=hint)


def read(path: Path) -> Task:
    """Read a JSONL file, named as the file is; raises InvalidTask."""
    try:
        text = read_bounded(path, MAX_FILE).decode("utf-8-sig")
    except FileNotFoundError as error:
        beside = islice(path.parent.glob(f"*{path.suffix}"), _MOST)
        raise unknown(path.name, [other.name for other in beside], hint=f"ls -l {path.parent}") from error
    except (OSError, CorruptCheckpoint, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidTask(f"the task {path} cannot be read: {why}", hint=f"ls -l {path}") from error
    return parse(path.name, text.split("\n"))


def parse(name: str, lines: Iterable[str]) -> Task:
    """Read lines that may come from anybody; raises InvalidTask naming the line that is wrong."""
    metric: Metric | None = None
    items: list[Item] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found, item = _line(line)
            if metric not in (None, found):
                raise ValueError(f"{found.value} after lines of {metric.value}; a file has one metric")
            problem = _problem(item, found)
            if problem or len(items) == MAX_ITEMS:
                raise ValueError(problem or f"more than {MAX_ITEMS} items")
        except (ValueError, RecursionError) as error:
            raise InvalidTask(f"{name}, line {number}: {error}", hint=_HINT) from error
        metric = found
        items.append(item)
    if metric is None:
        raise InvalidTask(f"{name} has no items", hint=_HINT)
    return Task(name=name, metric=metric, items=tuple(items))


def _line(line: str) -> tuple[Metric, Item]:
    if len(line) > MAX_LINE:
        raise ValueError(f"{len(line)} characters; at most {MAX_LINE} are read")
    value = json.loads(line, object_pairs_hook=_unique)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    if value.keys() - _KEYS:
        raise ValueError(f"{min(value.keys() - _KEYS)[:40]!r} is not a key of a task")
    keys = value.keys() - {"metric"}
    if keys == {"text"}:
        item, follows = Item(prompt="", answer=_text(value["text"], "text")), Metric.BITS_PER_BYTE
    elif keys in ({"prompt", "answer"}, {"prompt", "answer", "choices"}):
        prompt, answer = _text(value["prompt"], "prompt"), _text(value["answer"], "answer")
        item = Item(prompt=prompt, answer=answer, choices=_choices(value.get("choices", [])))
        follows = Metric.CHOICE if "choices" in keys else Metric.EXACT_MATCH
    else:
        raise ValueError("it holds neither prompt and answer nor text")
    return _metric(value, follows), item


def _metric(value: dict[str, Any], follows: Metric) -> Metric:
    named = value.get("metric", follows.value)
    metric = next((metric for metric in Metric if metric.value == named), None)
    if metric is None:
        raise ValueError(f"no metric {str(named)[:40]!r}; one of {', '.join(m.value for m in Metric)}")
    return metric


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(f"{what} is not text of at most {MAX_TEXT} characters")
    return value


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_CHOICES:
        raise ValueError(f"choices is not a list of at most {MAX_CHOICES}")
    return tuple(_text(choice, "a choice") for choice in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is repeated")
    return value


def _problem(item: Item, metric: Metric) -> str | None:
    """Why an item cannot be scored by a metric; None where it can."""
    try:
        "".join((item.prompt, item.answer, *item.choices)).encode()
    except UnicodeEncodeError:
        return "half a surrogate pair is no text"
    if not item.answer:
        return "the answer is empty"
    if metric is not Metric.BITS_PER_BYTE and not item.prompt:
        return "the prompt is empty"
    if metric is not Metric.CHOICE:
        return f"{metric.value} has no choices" if item.choices else None
    if len(set(item.choices)) != len(item.choices) or "" in item.choices:
        return "a choice is empty or repeated"
    if len(item.choices) < 2 or item.answer not in item.choices:
        return "the answer is not one of at least two choices"
    return None
