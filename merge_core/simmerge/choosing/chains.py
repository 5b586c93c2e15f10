"""Chains: what SimMerge chooses among, each two or more experts that are merged one after the other.

    Chain(experts=("a", "b", "c"), operators=("ties", "linear")).recipe(base="w0", dtype="bfloat16")

The first operator merges the first two experts, each further one what came of that and the next expert. An
expert counts as much as every other: an average gives what k experts came to k of k + 1 shares. The settings
are those that the operators' papers or mergekit give them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

SETTINGS: Mapping[str, Mapping[str, float]] = {
    "linear": {},
    "slerp": {},
    "task_arithmetic": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": 0.5},
    "sce": {},
}
"""What each operator is told of every expert."""
OPERATORS = tuple(SETTINGS)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Chain:
    """Experts in their order, and one operator fewer; raises ValueError where there are not."""

    experts: tuple[str, ...]
    operators: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.experts) < 2 or len(self.operators) != len(self.experts) - 1:
            raise ValueError(f"{len(self.operators)} operators for {len(self.experts)} experts")
        if len(set(self.experts)) < len(self.experts):
            raise ValueError("an expert is merged with itself")

    def __str__(self) -> str:
        told = self.experts[0]
        for operator, expert in zip(self.operators, self.experts[1:], strict=True):
            told = f"{operator}({told}, {expert})"
        return told

    def recipe(self, *, base: str, dtype: str) -> str:
        """The text of the recipe: a document for each step, the one without a name last."""
        merged = [*(f"step-{number}" for number in range(1, len(self.operators))), None]
        steps, left = [], self.experts[0]
        for count, (operator, expert, name) in enumerate(
            zip(self.operators, self.experts[1:], merged, strict=True), 1
        ):
            step = _step(operator, base, (left, expert), count, dtype)
            steps.append(json.dumps(step | ({"name": name} if name else {})))
            left = name or left
        return "\n---\n".join(steps)


def _step(operator: str, base: str, models: Sequence[str], count: int, dtype: str) -> dict[str, Any]:
    """One merge, the first of whose models stands for `count` experts."""
    shares = [count / (count + 1), 1 / (count + 1)]
    told = [{"weight": share} if operator == "linear" else SETTINGS[operator] for share in shares]
    listed = [{"model": model, "parameters": of} for model, of in zip(models, told, strict=True)]
    step: dict[str, Any] = {"merge_method": operator, "models": listed, "dtype": dtype}
    if operator == "slerp":
        return step | {"base_model": models[0], "parameters": {"t": shares[1]}}
    return step if operator == "linear" else step | {"base_model": base}


def chains(experts: Sequence[str], operators: Sequence[str] = OPERATORS) -> Iterator[Chain]:
    """Every chain of all of these experts, each once: who comes first of the first two does not matter."""
    for order in permutations(experts):
        if experts.index(order[0]) < experts.index(order[1]):
            for chosen in product(operators, repeat=len(experts) - 1):
                yield Chain(experts=order, operators=chosen)
