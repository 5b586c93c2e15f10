"""Labels: what every merge of two experts of a catalogue scores, by each operator, merged in memory.

    labels = measure(open_catalogue(Path("catalogue-0"), seed=0))
    labels.merges[0].operator, utility(labels.merges[0].right["final"])

A merge is judged on the domains that its two experts were trained on. Its utility is the share of items that
it answers exactly, mean over these domains. The operators are `recipe_of`'s, with the settings that their
papers or mergekit give them; nothing about them was chosen by what they score here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from merge_core import files
from merge_core.checkpoint.published import read_bounded
from merge_core.digest import sha256
from merge_core.evaluation.tasks import MAX_ITEMS, Task
from merge_core.recipe import parse
from merge_core.zoo.catalogue import ROLES, Catalogue, items
from merge_core.zoo.tasks import task
from merge_core.zoo.threads import one_thread_each
from merge_core.zoo.training import Progress
from merge_core.zoo.workbench import Workbench, workbench

_EACH: Mapping[str, Mapping[str, float]] = {
    "linear": {"weight": 0.5},
    "slerp": {},
    "task_arithmetic": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": 0.5},
    "sce": {},
}
OPERATORS = tuple(_EACH)
JUDGED = ("labels", "final")
"""The roles of the items that merges are judged by; the others are for whoever predicts that."""

Right = Mapping[str, Mapping[str, str]]
"""By role and domain: a character for each item, `1` where it was answered exactly and else `0`."""

_RECORD = "labels.json"
_MAX_RECORD = 64 << 20
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """Two experts merged by an operator, and which items of their domains the result answers."""

    experts: tuple[str, str]
    operator: str
    right: Right


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """All merges of a catalogue, and what base and experts answer, by name, in all of its domains."""

    alone: Mapping[str, Right]
    merges: tuple[Merged, ...]


def utility(right: Mapping[str, str]) -> float:
    """The share of right answers, mean over domains."""
    return sum(marks.count("1") / len(marks) for marks in right.values()) / len(right)


def recipe_of(operator: str, base: str, experts: Sequence[str]) -> str:
    """The recipe by which an operator merges two experts: as a sum, an average, or halfway on a sphere."""
    models = [{"model": expert, "parameters": _EACH[operator]} for expert in experts]
    recipe: dict[str, Any] = {"merge_method": operator, "models": models, "dtype": "float32"}
    if operator == "slerp":
        recipe |= {"base_model": experts[0], "parameters": {"t": 0.5}}
    elif operator != "linear":
        recipe |= {"base_model": base}
    return json.dumps(recipe)


def measure(
    catalogue: Catalogue, *, limit: int | None = None, on_progress: Progress = lambda *_: None
) -> Labels:
    """Merge and score every pair by every operator, or read what was measured of the same models.

    `limit` takes the first items of each role and domain only.
    """
    path, origin = catalogue.directory / _RECORD, _origin(catalogue, limit)
    if path.is_file():
        told = json.loads(read_bounded(path, _MAX_RECORD))
        if told["origin"] == origin:
            return _parsed(told)
    labels = _examined(catalogue, limit, on_progress)
    listed = [[*merged.experts, merged.operator, merged.right] for merged in labels.merges]
    files.replace(path, json.dumps({"origin": origin, "alone": labels.alone, "merges": listed}).encode())
    return labels


def _examined(catalogue: Catalogue, limit: int | None, on_progress: Progress) -> Labels:
    wanted = [(pair, operator) for pair in combinations(catalogue.experts, 2) for operator in OPERATORS]
    directories = {"base": catalogue.base} | {name: one.directory for name, one in catalogue.experts.items()}
    asked = {
        (role, domain): task(items(role, domain)).first(limit or MAX_ITEMS)
        for role in ROLES
        for domain in catalogue.domains
    }
    with one_thread_each(), workbench(directories) as bench:
        examiner = _Examiner(catalogue=catalogue, bench=bench, tasks=asked)
        alone = {name: examiner.alone(name) for name in directories}
        merges = []
        for done, (pair, operator) in enumerate(wanted):
            on_progress("merge and score", done, len(wanted))
            merges.append(Merged(experts=pair, operator=operator, right=examiner.merged(pair, operator)))
    return Labels(alone=alone, merges=tuple(merges))


def _origin(catalogue: Catalogue, limit: int | None) -> dict[str, Any]:
    recipes = {operator: recipe_of(operator, "base", ("a", "b")) for operator in OPERATORS}
    return {"version": _VERSION, "catalogue": sha256(catalogue.record), "recipes": recipes, "limit": limit}


def _parsed(told: Mapping[str, Any]) -> Labels:
    merges = [
        Merged(experts=(first, second), operator=operator, right=right)
        for first, second, operator, right in told["merges"]
    ]
    return Labels(alone=told["alone"], merges=tuple(merges))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Examiner:
    """Makes merges on a workbench, one after the other, and marks what they answer."""

    catalogue: Catalogue
    bench: Workbench
    tasks: Mapping[tuple[str, str], Task]

    def merged(self, pair: tuple[str, str], operator: str) -> Right:
        """What a merge answers in the domains of its experts."""
        self.bench.make(parse(recipe_of(operator, "base", pair)))
        owned = (self.catalogue.experts[name].training.own for name in pair)
        domains = dict.fromkeys(domain for own in owned for domain in own)
        return {role: {name: self._marks(role, name) for name in domains} for role in JUDGED}

    def alone(self, name: str) -> Right:
        """What a model answers in all domains."""
        model = {"merge_method": "passthrough", "models": [{"model": name}], "dtype": "float32"}
        self.bench.make(parse(json.dumps(model)))
        return {role: {d: self._marks(role, d) for d in self.catalogue.domains} for role in ROLES}

    def _marks(self, role: str, domain: str) -> str:
        return "".join(str(int(hit)) for hit in self.bench.score(self.tasks[role, domain]).hits)
