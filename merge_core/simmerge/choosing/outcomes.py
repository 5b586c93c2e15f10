"""The Outcome: what a merge of two models turned out to be worth at a task, as a record that nodes exchange.

    outcome = Outcome.of(pair=(a.digest, b.digest), operator="ties", plan=plan.digest, task="maths",
                         items=task.digest, values=values, missing=missing, names=NAMES, utility=0.81)
    Outcome.parse(outcome.to_bytes()) == outcome

Numbers are whole ones of 1/UNIT, so that every machine adds up the same. Who says so is not in it: a record
is signed, and what a peer may count for is bounded where records are used (see `bandit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from merge_core.digest import Digest, canonical, check_version, parse_canonical, sha256
from merge_core.errors import CorruptCheckpoint

UNIT = 1 << 16
"""Values and utilities are told in whole numbers of 1/UNIT."""
MAX_OUTCOME = 16 << 10
MAX_VALUE = 1 << 30
"""Of a feature, in 1/UNIT."""
MAX_VALUES = 1024
MAX_NAME = 120

_VERSION = 1
_KEYS = {"version", "pair", "operator", "plan", "task", "items", "names", "values", "utility"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One measurement; one that exists is sound. Raises ValueError on what none can be."""

    pair: tuple[Digest, Digest]
    """The fingerprints of the two models, in the plan's order."""
    operator: str
    plan: Digest
    """Of the MergePlan that was executed."""
    task: str
    """As the probe set names it."""
    items: Digest
    """Of the task whose items were scored."""
    names: Digest
    """Of the names of the features: `digest_of`."""
    values: tuple[int | None, ...]
    """The features of the pair for the task, in 1/UNIT; None where one is missing."""
    utility: int
    """The score in 1/UNIT: 0 is the worst, UNIT the best there can be."""

    def __post_init__(self) -> None:
        texts = (self.operator, self.task)
        if any(not 0 < len(text) <= MAX_NAME or not text.isprintable() for text in texts):
            raise ValueError("operator and task are names")
        if len(self.pair) != 2 or self.pair[0] == self.pair[1]:
            raise ValueError("a pair is of two models")
        if not 1 <= len(self.values) <= MAX_VALUES:
            raise ValueError(f"{len(self.values)} features")
        if any(v is not None and (type(v) is not int or abs(v) > MAX_VALUE) for v in self.values):
            raise ValueError("a feature is a whole number, or missing")
        if type(self.utility) is not int or not 0 <= self.utility <= UNIT:
            raise ValueError("a utility lies between 0 and 1")

    @classmethod
    def of(
        cls,
        *,
        pair: tuple[Digest, Digest],
        operator: str,
        plan: Digest,
        task: str,
        items: Digest,
        values: npt.NDArray[Any],
        missing: npt.NDArray[np.bool_],
        names: Sequence[str],
        utility: float,
    ) -> Self:
        """Round what was measured; `values` and `missing` are [features]."""
        rounded = np.rint(np.clip(values.astype(np.float64) * UNIT, -MAX_VALUE, MAX_VALUE))
        told = [None if lost else int(value) for value, lost in zip(rounded, missing, strict=True)]
        return cls(
            pair=pair,
            operator=operator,
            plan=plan,
            task=task,
            items=items,
            names=digest_of(names),
            values=tuple(told),
            utility=round(utility * UNIT),
        )

    @property
    def vector(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """The features as a predictor reads them, and which are missing."""
        missing = np.array([value is None for value in self.values])
        return np.array([value or 0 for value in self.values], np.float64) / UNIT, missing

    @cached_property
    def claim(self) -> Digest:
        """Of what was asked, without the answer: somebody who answers twice is counted once."""
        asked = [*sorted(self.pair), self.operator, self.task, self.items]
        return sha256(canonical(asked))

    @cached_property
    def digest(self) -> Digest:
        """Of the bytes."""
        return sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical(
            {
                "version": _VERSION,
                "pair": self.pair,
                "operator": self.operator,
                "plan": self.plan,
                "task": self.task,
                "items": self.items,
                "names": self.names,
                "values": self.values,
                "utility": self.utility,
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read an outcome from anybody; raises CorruptCheckpoint on whatever is not exact."""
        try:
            if len(data) > MAX_OUTCOME:
                raise ValueError(f"{len(data)} bytes; at most {MAX_OUTCOME} are read")
            told = parse_canonical(data)
            if not isinstance(told, dict) or set(told) != _KEYS:
                raise ValueError("keys")
            check_version(told["version"], _VERSION, "outcome")
            first, second = told["pair"]
            return cls(
                pair=(Digest(first), Digest(second)),
                operator=_text(told["operator"]),
                plan=Digest(told["plan"]),
                task=_text(told["task"]),
                items=Digest(told["items"]),
                names=Digest(told["names"]),
                values=tuple(told["values"]),
                utility=told["utility"],
            )
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CorruptCheckpoint(f"not an outcome: {error}", hint="ask another peer for it") from error


def digest_of(names: Sequence[str]) -> Digest:
    """Of the names of features, in their order: values of equal digests mean the same."""
    return sha256(canonical(list(names)))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name is text")
    return value
