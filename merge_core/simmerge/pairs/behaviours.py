"""The Panel: many models' behaviours, read once, to compare one model with all of them.

    panel = Panel.of(behaviours, base, key=mine.key)
    estimated(mine, panel).pair            [N, PAIR, P]

A Behaviour lists the most likely tokens; the mass of the others is taken to be spread evenly over them. So
what one model lists and another does not has, for the other, the mean probability of the tokens that it does
not list: divergences come out too large where models disagree about unlikely tokens, in much the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.digest import Digest
from merge_core.simmerge.functional.behaviour import FLOOR, Behaviour
from merge_core.simmerge.pairs.divergence import (
    MODEL,
    Float64,
    Floats,
    FunctionalStatistics,
    LayerStatistics,
    Stack,
    compared,
    counts,
    model_measures,
    nothing,
    pair_measures,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Top:
    """The distributions of a Behaviour, whose probabilities add up to 1 again: P positions, K tokens listed.

    `share` is the logarithm of the mean probability of a token that is not listed; `others` how many are not.
    """

    ids: npt.NDArray[np.uint32]
    logp: Float64
    share: Float64
    others: int

    @classmethod
    def of(cls, behaviour: Behaviour, rows: Any = slice(None)) -> Top:
        """Read the distributions at some positions."""
        logs = np.column_stack([behaviour.logp, behaviour.rest])[rows].astype(np.float64)
        logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
        others = behaviour.vocabulary - behaviour.ids.shape[1]
        share = logs[:, -1] - np.log(others) if others else np.full(len(logs), FLOOR)
        return cls(ids=behaviour.ids[rows], logp=logs[:, :-1], share=share, others=others)

    def at(self, ids: npt.NDArray[np.uint32]) -> Float64:
        """The logarithms for tokens [P, S]."""
        same = ids[:, :, None] == self.ids[:, None, :]
        found = np.where(same, self.logp[:, None, :], 0.0).sum(2)
        return np.where(same.any(2), found, self.share[:, None])


Compare = Callable[[Sequence[Top], Top | None], Callable[[Top], Floats]]
"""(many, base) to a function from a model to float32[N, PAIR, P]."""


def compare(many: Sequence[Top], base: Top | None) -> Callable[[Top], Floats]:
    """The formulas, pair by pair, over the tokens that somebody lists and one entry for all others."""
    return lambda a: np.stack([_listed(a, b, base) for b in many]).astype(np.float32)


def _listed(a: Top, b: Top, base: Top | None) -> Float64:
    told = [a, b, *([] if base is None else [base])]
    ids = np.concatenate([one.ids for one in told], axis=1)
    earlier = np.tril(np.ones((ids.shape[1],) * 2, dtype=bool), -1)
    first = ~((ids[:, :, None] == ids[:, None, :]) & earlier).any(2)
    others = a.others + a.ids.shape[1] - first.sum(1)
    logs = [np.column_stack([one.at(ids), one.share]) for one in told]
    return pair_measures(logs[0], logs[1], logs[2] if base else None, np.column_stack([first, others]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """Models to compare with; those without a behaviour of `key`, the base too, are as good as unknown.

    `task` keeps the positions of one task alone, and all positions where it is None.
    """

    key: Digest
    behaviours: tuple[Behaviour | None, ...]
    base: Behaviour | None
    task: str | None
    how: Compare

    @classmethod
    def of(
        cls,
        behaviours: Iterable[Behaviour | None],
        base: Behaviour | None,
        *,
        key: Digest,
        task: str | None = None,
        how: Compare = compare,
    ) -> Panel:
        """Take what can be compared with behaviours of a key; `how` may be `matching.compare`."""

        def alike(one: Behaviour | None) -> Behaviour | None:
            return one if one is not None and one.key == key else None

        return cls(key=key, behaviours=tuple(map(alike, behaviours)), base=alike(base), task=task, how=how)

    @cached_property
    def known(self) -> npt.NDArray[np.int64]:
        """Indices of the models that can be compared."""
        return np.array([i for i, one in enumerate(self.behaviours) if one is not None], dtype=np.int64)

    @cached_property
    def against(self) -> Callable[[Top], Floats]:
        """Compare a model with these: float32[known, PAIR, P]."""
        tops = [self.top(one) for one in self.behaviours if one is not None]
        return self.how(tops, None if self.base is None else self.top(self.base))

    @cached_property
    def models(self) -> Floats:
        """[N, MODEL, T]."""
        return self.spread(self.measure([one for one in self.behaviours if one is not None]))

    @cached_property
    def base_model(self) -> Floats | None:
        """[MODEL, T]."""
        return None if self.base is None else self.measure([self.base])[0]

    @cached_property
    def stacks(self) -> dict[tuple[str, tuple[int, ...]], tuple[npt.NDArray[np.int64], Stack]]:
        """By name and shape of a sketch: indices of models that have such a one, and the sketches."""
        groups: dict[tuple[str, tuple[int, ...]], dict[int, Floats]] = {}
        for index, one in enumerate(self.behaviours):
            for name, sketch in () if one is None else (("hidden", states(one)), ("attention", maps(one))):
                groups.setdefault((name, sketch.shape), {})[index] = sketch
        origin = None if self.base is None else states(self.base)
        found = {}
        for key, sketches in groups.items():
            of_base = origin if key[0] == "hidden" and origin is not None and origin.shape == key[1] else None
            found[key] = (np.array(list(sketches)), Stack.of(np.stack(list(sketches.values())), of_base))
        return found

    def rows(self, behaviour: Behaviour) -> npt.NDArray[np.int64]:
        """The positions that pairs are compared at."""
        if self.task is None:
            return np.arange(len(behaviour.task))
        wanted = behaviour.tasks.index(self.task) if self.task in behaviour.tasks else -1
        return np.flatnonzero(behaviour.task == wanted)

    def top(self, behaviour: Behaviour) -> Top:
        """A model's distributions at these positions."""
        return Top.of(behaviour, self.rows(behaviour))

    def measure(self, models: Sequence[Behaviour]) -> Floats:
        """[models, MODEL, T]: each by itself, and beside the base."""
        tops = [Top.of(one) for one in models]
        beside = None if self.base is None or not tops else self.how(tops, None)(Top.of(self.base))
        found = [
            model_measures(
                one.entropy.astype(np.float32),
                np.exp(top.logp[:, 0]),
                one.bits_per_byte,
                one.task,
                None if beside is None else beside[number][[1, 0, 2, 3]],
            )
            for number, (one, top) in enumerate(zip(models, tops, strict=True))
        ]
        tasks = 0 if not models else len(models[0].tasks)
        return np.stack(found) if found else np.zeros((0, len(MODEL), tasks), np.float32)

    def model(self, behaviour: Behaviour) -> Floats:
        """[MODEL, T], looked up where it is one of these."""
        mine = next((n for n, one in enumerate(self.behaviours) if one is behaviour), None)
        found: Floats = self.measure([behaviour])[0] if mine is None else self.models[mine]
        return found

    def at(self, task: str) -> Panel:
        """The same models at one task's positions; what is known of each by itself is not measured again."""
        part = replace(self, task=task)
        for name in ("known", "models", "base_model", "stacks"):
            part.__dict__[name] = getattr(self, name)
        return part

    def spread(self, found: Floats) -> Floats:
        """[known, …] to [N, …], NaN for the others."""
        if len(found) == len(self.behaviours):
            return found
        whole = np.full((len(self.behaviours), *found.shape[1:]), np.nan, np.float32)
        whole[self.known] = found
        return whole


def estimated(a: Behaviour | None, panel: Panel) -> FunctionalStatistics:
    """Compare one model with those of a panel, [N, …]; NaN where either has no behaviour of its key."""
    if a is None or a.key != panel.key or not len(panel.known):
        return nothing(len(panel.behaviours))
    mine = panel.model(a)
    return FunctionalStatistics(
        tasks=a.tasks,
        counts=counts(a.task, len(a.tasks)),
        task=a.task[panel.rows(a)],
        pair=panel.spread(panel.against(panel.top(a))),
        a=mine,
        b=panel.models,
        base=np.full_like(mine, np.nan) if panel.base_model is None else panel.base_model,
        layers=_layers(a, panel),
    )


def _layers(a: Behaviour, panel: Panel) -> LayerStatistics:
    """NaN for models of other layers than a's."""
    count = len(panel.behaviours)
    found = []
    for name, sketch in (("hidden", states(a)), ("attention", maps(a))):
        of_base = None if panel.base is None or name == "attention" else states(panel.base)
        of_base = of_base if of_base is not None and of_base.shape == sketch.shape else None
        mine = Stack.of(sketch, of_base)
        indices, theirs = panel.stacks.get((name, sketch.shape), (np.zeros(0, np.int64), None))
        told = np.full((4, count, len(sketch)), np.nan, np.float32)
        if theirs is not None:
            told[:, indices] = compared(mine, theirs)
        found.append(told)
    hidden, attention = found
    return LayerStatistics(
        hidden_cosine=hidden[0],
        hidden_task_cosine=hidden[1],
        hidden_shift_a=hidden[2],
        hidden_shift_b=hidden[3],
        attention_cosine=attention[0],
    )


def states(behaviour: Behaviour) -> Floats:
    """[L + 1, w]: the sketch of hidden states of the length that they had."""
    return behaviour.hidden.astype(np.float32) * behaviour.hidden_norm[:, None]


def maps(behaviour: Behaviour) -> Floats:
    """[L, w]: the sketch of the attention maps."""
    return behaviour.attention.astype(np.float32)
