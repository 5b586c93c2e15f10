"""Labels: what every merge of two experts of a catalogue scores, by each operator, merged in memory.

    labels = measure(open_catalogue(Path("catalogue-0"), seed=0))
    labels.merges[0].operator, utility(labels.merges[0].right["final"])
    measure_chains(catalogue, sampled(names))[0].chain, …     merges of three and of four

A merge is judged on the domains that its experts were trained on. Its utility is the share of items that
it answers exactly, mean over these domains. The operators are those of `simmerge.chains`, with the settings
that their papers or mergekit give them; nothing about them was chosen by what they score here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO

from merge_core import files
from merge_core.checkpoint.published import read_bounded
from merge_core.digest import sha256
from merge_core.evaluation.tasks import MAX_ITEMS, Task
from merge_core.recipe import parse
from merge_core.simmerge.choosing.chains import OPERATORS, Chain, chains
from merge_core.zoo.catalogue import ROLES, Catalogue, items
from merge_core.zoo.tasks import task
from merge_core.zoo.threads import one_thread_each
from merge_core.zoo.training import Progress
from merge_core.zoo.workbench import Workbench, workbench

JUDGED = ("labels", "final")
"""The roles of the items that merges are judged by; the others are for whoever predicts that."""

Right = Mapping[str, Mapping[str, str]]
"""By role and domain: a character for each item, `1` where it was answered exactly and else `0`."""

_RECORD = "labels.json"
_CHAINS = "chains.json"
_EVERYWHERE = "everywhere.json"
_SAMPLED = {3: 16, 4: 10}
"""How many threes and fours of experts are labelled."""
_CHAINS_EACH = 24
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Chained:
    """Three or four experts merged in a chain, and which items of their domains the result answers."""

    chain: Chain
    right: Right


def utility(right: Mapping[str, str]) -> float:
    """The share of right answers, mean over domains."""
    return sum(marks.count("1") / len(marks) for marks in right.values()) / len(right)


def recipe_of(operator: str, base: str, experts: Sequence[str]) -> str:
    """The recipe by which an operator merges experts one after the other, each as much as the others."""
    chain = Chain(experts=tuple(experts), operators=(operator,) * (len(experts) - 1))
    return chain.recipe(base=base, dtype="float32")


def sampled(experts: Sequence[str]) -> tuple[Chain, ...]:
    """A fixed sample of threes and fours: of each the chains of one operator, and others by chance."""
    rng = random.Random("weft chains")
    found: dict[Chain, None] = {}
    for size, sets in _SAMPLED.items():
        for _ in range(sets):
            chosen = sorted(rng.sample(experts, size))
            alike = [Chain(experts=tuple(chosen), operators=(o,) * (size - 1)) for o in OPERATORS]
            others = [chain for chain in chains(chosen) if chain not in alike]
            found |= dict.fromkeys(alike + rng.sample(others, _CHAINS_EACH - len(alike)))
    return tuple(found)


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
    labels = _examined(catalogue, limit, _begun(path), origin, on_progress)
    listed = [[*merged.experts, merged.operator, merged.right] for merged in labels.merges]
    files.replace(path, json.dumps({"origin": origin, "alone": labels.alone, "merges": listed}).encode())
    _begun(path).unlink(missing_ok=True)
    return labels


def measure_chains(
    catalogue: Catalogue,
    wanted: Sequence[Chain],
    *,
    everywhere: bool = False,
    limit: int | None = None,
    on_progress: Progress = lambda *_: None,
) -> tuple[Chained, ...]:
    """Merge and score chains, or read what was measured of the same chains of the same models.

    `everywhere` asks for all domains of the catalogue, also those that none of the experts was trained on.
    """
    told_of = [[*chain.experts, *chain.operators] for chain in wanted]
    path = catalogue.directory / (_EVERYWHERE if everywhere else _CHAINS)
    origin = _origin(catalogue, limit) | {"chains": told_of}
    rights: list[Right] = []
    if path.is_file():
        told = json.loads(read_bounded(path, _MAX_RECORD))
        rights = told["right"] if told["origin"] == origin else []
    if not rights:
        with _examiner(catalogue, limit) as examiner:
            domains = catalogue.domains if everywhere else ()
            asked = [partial(examiner.merged, chain, domains) for chain in wanted]
            rights = _answered(asked, _begun(path), origin, "merge and score chains", on_progress)
        files.replace(path, json.dumps({"origin": origin, "right": rights}).encode())
        _begun(path).unlink(missing_ok=True)
    return tuple(Chained(chain=c, right=r) for c, r in zip(wanted, rights, strict=True))


def _examined(
    catalogue: Catalogue, limit: int | None, begun: Path, origin: Mapping[str, Any], on_progress: Progress
) -> Labels:
    names = ("base", *catalogue.experts)
    wanted = [(pair, operator) for pair in combinations(catalogue.experts, 2) for operator in OPERATORS]
    with _examiner(catalogue, limit) as examiner:
        asked = [partial(examiner.alone, name) for name in names]
        asked += [partial(examiner.merged, Chain(experts=p, operators=(o,))) for p, o in wanted]
        rights = _answered(asked, begun, origin, "merge and score", on_progress)
    merges = [
        Merged(experts=pair, operator=operator, right=right)
        for (pair, operator), right in zip(wanted, rights[len(names) :], strict=True)
    ]
    return Labels(alone=dict(zip(names, rights, strict=False)), merges=tuple(merges))


def _begun(path: Path) -> Path:
    """Where the answers lie that an interrupted measurement got, until `path` holds all."""
    return path.with_name(f".{path.name}l.partial")


def _answered(
    asked: Sequence[Callable[[], Right]],
    begun: Path,
    origin: Mapping[str, Any],
    what: str,
    on_progress: Progress,
) -> list[Right]:
    """Every answer in order; each is a line of `begun`, so that nothing is asked twice."""
    head = json.dumps({"origin": origin}).encode() + b"\n"
    with begun.open("a+b") as file:
        file.seek(0)
        rights = _rights(file, head)
        if not rights:
            file.truncate(0)
            file.write(head)
        for done, answer in enumerate(asked[len(rights) :], len(rights)):
            on_progress(what, done, len(asked))
            rights.append(answer())
            file.write(json.dumps(rights[-1]).encode() + b"\n")
            file.flush()
    return rights


def _rights(file: BinaryIO, head: bytes) -> list[Right]:
    """The whole lines that follow `head`, and nothing after them any more."""
    rights: list[Right] = []
    if file.readline(_MAX_RECORD) != head:
        return rights
    good = len(head)
    with suppress(ValueError):
        while (line := file.readline(_MAX_RECORD)).endswith(b"\n"):
            rights.append(json.loads(line))
            good += len(line)
    file.truncate(good)
    return rights


@contextmanager
def _examiner(catalogue: Catalogue, limit: int | None) -> Iterator[_Examiner]:
    directories = {"base": catalogue.base} | {name: one.directory for name, one in catalogue.experts.items()}
    asked = {
        (role, domain): task(items(role, domain)).first(limit or MAX_ITEMS)
        for role in ROLES
        for domain in catalogue.domains
    }
    with one_thread_each(), workbench(directories) as bench:
        yield _Examiner(catalogue=catalogue, bench=bench, tasks=asked)


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

    def merged(self, chain: Chain, domains: Sequence[str] = ()) -> Right:
        """What a merge answers in some domains, those of its experts where none are named."""
        self.bench.make(parse(chain.recipe(base="base", dtype="float32")))
        owned = (self.catalogue.experts[name].training.own for name in chain.experts)
        judged = domains or tuple(dict.fromkeys(domain for own in owned for domain in own))
        return {role: {name: self._marks(role, name) for name in judged} for role in JUDGED}

    def alone(self, name: str) -> Right:
        """What a model answers in all domains."""
        model = {"merge_method": "passthrough", "models": [{"model": name}], "dtype": "float32"}
        self.bench.make(parse(json.dumps(model)))
        return {role: {d: self._marks(role, d) for d in self.catalogue.domains} for role in ROLES}

    def _marks(self, role: str, domain: str) -> str:
        return "".join(str(int(hit)) for hit in self.bench.score(self.tasks[role, domain]).hits)
