"""Labels: what every merge of two experts of a catalogue scores, by each operator, merged in memory.

    labels = measure(open_catalogue(Path("catalogue-0"), seed=0))
    labels.merges[0].operator, utility(labels.merges[0].right["final"])

A merge is judged on the domains that its two experts were trained on. Its utility is the share of items that
it answers exactly, mean over these domains. The operators are `recipe_of`'s, with the settings that their
papers or mergekit give them; nothing about them was chosen by what they score here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tokenizers import Tokenizer

from merge_core import files
from merge_core.checkpoint.published import read_bounded
from merge_core.digest import sha256
from merge_core.evaluation.loading import load_model, load_tokenizer
from merge_core.evaluation.scoring import score
from merge_core.evaluation.tasks import Task
from merge_core.evolution.candidates import LiveModel
from merge_core.evolution.evaluator import Model
from merge_core.recipe import parse
from merge_core.resolve import draft
from merge_core.zoo.catalogue import ROLES, Catalogue, items
from merge_core.zoo.opened import opened
from merge_core.zoo.tasks import task
from merge_core.zoo.threads import one_thread_each
from merge_core.zoo.training import Progress

OPERATORS = ("linear", "slerp", "task_arithmetic", "ties", "sce")
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
    models: list[dict[str, Any]] = [{"model": expert} for expert in experts]
    recipe: dict[str, Any] = {"merge_method": operator, "models": models, "dtype": "float32"}
    if operator == "slerp":
        return json.dumps({**recipe, "base_model": experts[0], "parameters": {"t": 0.5}})
    given = {"linear": {"weight": 0.5}, "task_arithmetic": {"weight": 1.0}, "sce": {}}
    given["ties"] = {"weight": 1.0, "density": 0.5}
    for model in models:
        model["parameters"] = given[operator]
    if operator == "ties":
        recipe["parameters"] = {"normalize": True}
    return json.dumps(recipe if operator == "linear" else {**recipe, "base_model": base})


def measure(catalogue: Catalogue, *, on_progress: Progress = lambda *_: None) -> Labels:
    """Merge and score every pair by every operator, or read what was measured of the same models."""
    path, origin = catalogue.directory / _RECORD, _origin(catalogue)
    if path.is_file():
        told = json.loads(read_bounded(path, _MAX_RECORD))
        if told["origin"] == origin:
            return _parsed(told)
    pairs = [(pair, operator) for pair in combinations(catalogue.experts, 2) for operator in OPERATORS]
    with one_thread_each(), _workbench(catalogue) as bench:
        alone = {name: bench.alone(name) for name in ("base", *catalogue.experts)}
        merges = []
        for done, (pair, operator) in enumerate(pairs):
            on_progress("merge and score", done, len(pairs))
            merges.append(Merged(experts=pair, operator=operator, right=bench.merged(pair, operator)))
    labels = Labels(alone=alone, merges=tuple(merges))
    listed = [[*merged.experts, merged.operator, merged.right] for merged in merges]
    files.replace(path, json.dumps({"origin": origin, "alone": alone, "merges": listed}).encode())
    return labels


def _origin(catalogue: Catalogue) -> dict[str, Any]:
    recipes = {operator: recipe_of(operator, "base", ("a", "b")) for operator in OPERATORS}
    return {"version": _VERSION, "catalogue": sha256(catalogue.record), "recipes": recipes}


def _parsed(told: Mapping[str, Any]) -> Labels:
    merges = [
        Merged(experts=(first, second), operator=operator, right=right)
        for first, second, operator, right in told["merges"]
    ]
    return Labels(alone=told["alone"], merges=tuple(merges))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Workbench:
    """One live model that all merges are made in, and the tasks that they are judged by."""

    catalogue: Catalogue
    models: Mapping[str, Model]
    live: LiveModel
    tokenizer: Tokenizer
    tasks: Mapping[tuple[str, str], Task]

    def merged(self, pair: tuple[str, str], operator: str) -> Right:
        """What a merge answers in the domains of its experts."""
        self._fill(recipe_of(operator, "base", pair))
        owned = (self.catalogue.experts[name].training.own for name in pair)
        domains = dict.fromkeys(domain for own in owned for domain in own)
        return {role: {name: self._marks(role, name) for name in domains} for role in JUDGED}

    def alone(self, name: str) -> Right:
        """What a model answers in all domains."""
        self._fill(
            json.dumps({"merge_method": "passthrough", "models": [{"model": name}], "dtype": "float32"})
        )
        return {role: {d: self._marks(role, d) for d in self.catalogue.domains} for role in ROLES}

    def _fill(self, text: str) -> None:
        recipe = parse(text)
        models = {name: self.models[name] for name in recipe.models}
        drafted = draft(recipe, {name: model.header for name, model in models.items()})
        plan = drafted.seal({name: model.model_id for name, model in models.items()})
        self.live.fill(plan, [model.material for model in models.values()])

    def _marks(self, role: str, domain: str) -> str:
        found = score(self.live.model, self.tokenizer, self.tasks[role, domain])
        return "".join(map(str, map(int, found.hits)))


@contextmanager
def _workbench(catalogue: Catalogue) -> Iterator[_Workbench]:
    directories = {"base": catalogue.base} | {name: one.directory for name, one in catalogue.experts.items()}
    with opened(directories) as models:
        yield _Workbench(
            catalogue=catalogue,
            models=models,
            live=LiveModel(load_model(catalogue.base)),
            tokenizer=load_tokenizer(catalogue.base),
            tasks={
                (role, domain): task(items(role, domain)) for role in ROLES for domain in catalogue.domains
            },
        )
