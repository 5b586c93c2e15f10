"""Can the best merge be told beforehand? Predict what operators are worth from fingerprints, and compare.

    python tests/bench/simmerge.py --seeds 20 21 22
    python tests/bench/simmerge.py --write FILE         what `make predictor` does

The story goes to stderr; the last line of stdout is one JSON object. Catalogues are trained and labelled as
by catalogue.py, with a sample of chains of three and four experts; features come from fingerprints, as a node
has them. The predictor learns from the pairs of the tuning seeds and of these, without those that any expert
on trial has a part in: neither it nor, in another catalogue, the one that was trained alike.

gap_closed is (chosen - best fixed operator) / (oracle - best fixed operator), on the final items; the best
fixed operator and the oracle are chosen on the labels' items. Intervals are percentile bootstraps: a
replicate draws seeds, and per domain items of either role, and chooses fixed operator and oracle anew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import catalogue as catalogues
import numpy as np
import numpy.typing as npt
import platformdirs
from catalogue import BOOTSTRAP_SEED, Floats, Marks, counts, marks_of, tell, utilities

from merge_core.checkpoint.reader import Checkpoint, measure
from merge_core.evolution.mapped import MappedSource
from merge_core.simmerge.choosing.chains import OPERATORS, Chain
from merge_core.simmerge.choosing.forecast import Forecast
from merge_core.simmerge.choosing.predictor import Predictor
from merge_core.simmerge.choosing.training import Cells, Training, train, train_folds
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.functional import probes
from merge_core.simmerge.functional.behaviour import Behaviour
from merge_core.simmerge.functional.probing import observe
from merge_core.simmerge.pairs.features import GROUP_OF, NAMES
from merge_core.simmerge.pairs.survey import Survey
from merge_core.simmerge.structural.sketcher import compute
from merge_core.zoo import labels as labelling
from merge_core.zoo.catalogue import Catalogue, open_catalogue
from merge_core.zoo.labels import JUDGED, Chained, Labels, measure_chains, sampled
from merge_core.zoo.threads import one_thread_each

FEATURES = {
    "similarity": ("similarity",),
    "similarity_and_probe_loss": ("similarity", "probe_loss"),
    "with_dev_scores": ("similarity", "probe_loss", "dev_scores"),
}
TUNING = (10, 11)
"""Catalogues on which everything here was chosen."""
SETTINGS = Training(steps=400, batch=128)
"""What a predictor is trained with; chosen on the tuning seeds."""
REPLICATES = 1_000
BASELINES = ("random", "always_task_arithmetic", "merge_and_evaluate_2", "merge_and_evaluate_3")
STRANGERS, FEW_ITEMS = 30, 128
"""Pairs that are merged to see what they make of tasks that neither knows, and items of each task."""
DIVISIONS = 6
"""How often the experts are divided into groups of GROUP, to be on trial together."""
GROUP = 4

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """One catalogue: what is known of its experts, and what their merges are worth."""

    seed: int
    names: tuple[str, ...]
    base: Fingerprint
    experts: Mapping[str, Fingerprint]
    scores: Mapping[str, Mapping[str, float]]
    survey: Survey
    labels: Labels
    chains: tuple[Chained, ...]

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        return list(combinations(self.names, 2))

    @cached_property
    def marks(self) -> Marks:
        """By role and domain: [pair, operator, item]."""
        return marks_of(self.labels)

    @cached_property
    def tasks(self) -> list[tuple[str, ...]]:
        """The domains that each pair is judged by."""
        found = {merged.experts: tuple(merged.right["labels"]) for merged in self.labels.merges}
        return [found[pair] for pair in self.pairs]

    @cached_property
    def rows(self) -> list[tuple[int, str]]:
        """A pair and a domain for each cell."""
        return [(number, task) for number, tasks in enumerate(self.tasks) for task in tasks]

    @cached_property
    def cells(self) -> Cells:
        """One for each of `rows`, and then once more with the pairs turned round."""
        index = {name: at for at, name in enumerate(self.names)}
        told = [
            (index[self.pairs[p][0]], index[self.pairs[p][1]], self.survey.tasks.index(t))
            for p, t in self.rows
        ]
        a, b, t = np.array(told).T
        shares = {task: marks.mean(axis=-1) for task, marks in self.marks["labels"].items()}
        utility = np.array([shares[task][pair] for pair, task in self.rows], np.float32)
        return Cells(
            values=np.concatenate([self.survey.values[a, b, t], self.survey.values[b, a, t]]),
            missing=np.concatenate([self.survey.missing[a, b, t], self.survey.missing[b, a, t]]),
            utility=np.concatenate([utility, utility]),
        )

    def without(self, experts: Sequence[str]) -> Integers:
        """The cells that none of these experts has a part in."""
        clear = np.array([{*self.pairs[pair]}.isdisjoint(experts) for pair, _ in self.rows])
        return np.flatnonzero(np.concatenate([clear, clear]))

    def predicted(self, predictor: Predictor, columns: Integers) -> Floats:
        """[pair, operator]: the mean over the pair's domains and both orders."""
        told = predictor.predict(self.cells.values[:, columns], self.cells.missing[:, columns]).utility
        pairs = np.array([pair for pair, _ in self.rows] * 2)
        total = np.zeros((len(self.pairs), len(OPERATORS)))
        np.add.at(total, pairs, told)
        return np.asarray(total / np.bincount(pairs)[:, None], np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chosen:
    """For each of `rows` of a Table the alternative that was predicted best, and the next."""

    rows: Integers
    first: Integers
    second: Integers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """What alternatives are worth in one world: `marks` by role and domain [row, alternative, item].

    The first alternatives of every row are those of one operator throughout, as OPERATORS has them.
    """

    marks: Marks
    chosen: Mapping[str, Chosen]
    """By what chose."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22])
    cache = Path(platformdirs.user_cache_dir("weft")) / "catalogue"
    parser.add_argument(
        "--directory", type=Path, default=cache, help=f"keep catalogues there, not in {cache}"
    )
    parser.add_argument("--write", type=Path, help="train on the tuning seeds, write the predictor there")
    arguments = parser.parse_args()
    with one_thread_each():
        tuning = opened(arguments.directory, [s for s in TUNING if s not in arguments.seeds], chains=False)
        if arguments.write:
            away = [strangers(world, arguments.directory) for world in tuning]
            arguments.write.write_bytes(shipped(tuning, away).to_bytes())
            print(arguments.write)
            return
        worlds = opened(arguments.directory, arguments.seeds, chains=True)
        print(json.dumps(report(worlds, [*tuning, *worlds])))


def opened(root: Path, seeds: Sequence[int], *, chains: bool) -> list[World]:
    """Every catalogue, trained, labelled and fingerprinted."""
    folders = asyncio.run(catalogues.all_labelled(root, seeds, chains=chains))
    found = []
    for folder, seed in zip(folders, seeds, strict=True):
        found.append(world(open_catalogue(folder, seed=seed), seed, chains=chains))
        tell(f"seed {seed}: fingerprints and features")
    return found


def world(catalogue: Catalogue, seed: int, *, chains: bool) -> World:
    names = tuple(catalogue.experts)
    prints = {name: fingerprint(listed.directory) for name, listed in catalogue.experts.items()}
    base, labels = fingerprint(catalogue.base), labelling.measure(catalogue)
    scores = {
        name: {domain: marks.count("1") / len(marks) for domain, marks in right["features"].items()}
        for name, right in labels.alone.items()
    }
    survey = Survey.of(
        list(prints.values()),
        base,
        tasks=catalogue.domains,
        scores=[scores[name] for name in names],
        base_scores=scores["base"],
    )
    return World(
        seed=seed,
        names=names,
        base=base,
        experts=prints,
        scores=scores,
        survey=survey,
        labels=labels,
        chains=measure_chains(catalogue, sampled(names)) if chains else (),
    )


def fingerprint(directory: Path) -> Fingerprint:
    """As a node computes it, through its bytes."""
    with Checkpoint.open(directory) as checkpoint:
        measured = measure(checkpoint)
        structure = compute(MappedSource(checkpoint, measured.leaves))
    behaviour = Behaviour.of(observe(directory, probes.find("zoo")))
    made = Fingerprint(model_id=measured.manifest.model_id, structure=structure, behaviour=behaviour)
    return Fingerprint.parse(made.to_bytes())


# -- training ------------------------------------------------------------------------------------------


def columns_of(features: str) -> Integers:
    return np.array([i for i, group in enumerate(GROUP_OF) if group in FEATURES[features]])


def trained(worlds: Sequence[World], trials: Sequence[Sequence[str]], features: str) -> list[Predictor]:
    """A predictor for each trial, of everything that no expert on trial has a part in.

    One that reads scores learns to do without them too: those of merges within chains are not known.
    """
    columns = columns_of(features)
    scores = tuple(i for i, column in enumerate(columns) if GROUP_OF[column] == "dev_scores")
    cells = joined([world.cells for world in worlds])
    offsets = np.cumsum([0, *(len(world.cells) for world in worlds)])
    folds = [
        np.concatenate([at + world.without(trial) for at, world in zip(offsets[:-1], worlds, strict=True)])
        for trial in trials
    ]
    return train_folds(
        Cells(values=cells.values[:, columns], missing=cells.missing[:, columns], utility=cells.utility),
        folds,
        names=[NAMES[column] for column in columns],
        operators=OPERATORS,
        provenance={"seeds": [world.seed for world in worlds]},
        hidden=((), scores) if scores else ((),),
        settings=SETTINGS,
    )


def strangers(world: World, root: Path) -> Cells:
    """Cells of a sample of pairs at the domains that neither of the two was trained on."""
    pairs = random.Random("weft strangers").sample(range(len(world.pairs)), STRANGERS)
    catalogue = open_catalogue(root / f"seed-{world.seed}" / "catalogue", seed=world.seed)
    chains = [Chain(experts=world.pairs[pair], operators=(o,)) for pair in pairs for o in OPERATORS]
    measured = measure_chains(catalogue, chains, everywhere=True, limit=FEW_ITEMS)
    rows, utility = [], []
    for number, pair in enumerate(pairs):
        told = measured[number * len(OPERATORS) : (number + 1) * len(OPERATORS)]
        a, b = (world.names.index(name) for name in world.pairs[pair])
        for t, task in enumerate(world.survey.tasks):
            if task not in world.tasks[pair]:
                marks = [each.right["labels"][task] for each in told]
                rows += [(a, b, t), (b, a, t)]
                utility += [[mark.count("1") / len(mark) for mark in marks]] * 2
    at = tuple(np.array(rows).T)
    return Cells(
        values=world.survey.values[at],
        missing=world.survey.missing[at],
        utility=np.array(utility, np.float32),
    )


def shipped(worlds: Sequence[World], away: Sequence[Cells]) -> Predictor:
    """One that also knows what to make of pairs of which less is known, and of tasks new to both."""
    named = np.array(GROUP_OF)
    scores = named == "dev_scores"
    losses = scores | (named == "probe_loss")
    unread, baseless = (absent(worlds[0], base=base) for base in (True, False))
    hidden = [np.zeros(len(NAMES), bool), scores, losses, losses | unread, losses | baseless]
    return train(
        joined([*(world.cells for world in worlds), *away]),
        names=NAMES,
        operators=OPERATORS,
        provenance={
            "catalogue": [world.seed for world in worlds],
            "models": sorted({fp.model_id for world in worlds for fp in world.experts.values()}),
            "probes": str(probes.find("zoo").digest),
        },
        hidden=[tuple(np.flatnonzero(columns).tolist()) for columns in hidden],
        settings=SETTINGS,
    )


def absent(world: World, *, base: bool) -> npt.NDArray[np.bool_]:
    """The features that are missing where models could not be run, or where their base is not known."""
    known = list(world.experts.values())[:2]
    if base:
        known = [replace(each, behaviour=None) for each in known]
    survey = Survey.of(known, world.base if base else None, tasks=world.survey.tasks[:1])
    return np.asarray(survey.missing[0, 1, 0])


def joined(cells: Sequence[Cells]) -> Cells:
    return Cells(
        values=np.concatenate([each.values for each in cells]),
        missing=np.concatenate([each.missing for each in cells]),
        utility=np.concatenate([each.utility for each in cells]),
    )


# -- choosing ------------------------------------------------------------------------------------------


def two_way(worlds: Sequence[World], among: Sequence[World], trials: Sequence[Sequence[str]]) -> list[Table]:
    """Choose an operator for the pairs on trial: with one expert on trial its pairs, else those within."""
    found: list[dict[str, Chosen]] = [{} for _ in worlds]
    for features in FEATURES:
        tell(f"{features}: {len(trials)} trainings without the experts on trial")
        predictors = trained(among, trials, features)
        for world, chosen in zip(worlds, found, strict=True):
            told = []
            for trial, predictor in zip(trials, predictors, strict=True):
                rows = np.array([i for i, pair in enumerate(world.pairs) if on_trial(pair, trial)])
                told.append(best_two(rows, world.predicted(predictor, columns_of(features))[rows]))
            chosen[features] = stacked(told)
    return [Table(marks=world.marks, chosen=each) for world, each in zip(worlds, found, strict=True)]


def on_trial(pair: Sequence[str], trial: Sequence[str]) -> bool:
    return {*pair} <= {*trial} or (len(trial) == 1 and trial[0] in pair)


def multi_way(worlds: Sequence[World], among: Sequence[World], size: int) -> list[Table]:
    """Choose a chain for every set of so many experts, none of which was seen, by what pairs taught."""
    sets = list(dict.fromkeys(tuple(sorted(c.chain.experts)) for c in worlds[0].chains))
    sets = [experts for experts in sets if len(experts) == size]
    found: list[dict[str, Chosen]] = [{} for _ in worlds]
    for features in FEATURES:
        tell(f"{features}: chains of {size}, {len(sets)} trainings without their experts")
        predictors = trained(among, sets, features)
        for world, chosen in zip(worlds, found, strict=True):
            told = [
                best_two(np.array([row]), forecast(world, experts, predictor, features)[None])
                for row, (experts, predictor) in enumerate(zip(sets, predictors, strict=True))
            ]
            chosen[features] = stacked(told)
    return [
        Table(marks=chain_marks(world, sets), chosen=each) for world, each in zip(worlds, found, strict=True)
    ]


def forecast(world: World, experts: Sequence[str], predictor: Predictor, features: str) -> Floats:
    """What the labelled chains of some experts are predicted to be worth, in their order."""
    labelled = chains_of(world, experts)
    scored = features == "with_dev_scores"
    told = Forecast(
        {name: world.experts[name] for name in experts},
        base=world.base,
        tasks=tuple(labelled[0].right["labels"]),
        predictor=predictor,
        scores={name: world.scores[name] for name in experts} if scored else None,
        base_scores=world.scores["base"] if scored else None,
    )
    return np.array([told.scored(each.chain).utility for each in labelled], np.float32)


def chains_of(world: World, experts: Sequence[str]) -> list[Chained]:
    return [each for each in world.chains if {*each.chain.experts} == {*experts}]


def chain_marks(world: World, sets: Sequence[Sequence[str]]) -> Marks:
    """By role and domain: [set, chain, item], NaN where a set is not judged by the domain."""
    alternatives = len(chains_of(world, sets[0]))
    found: dict[str, dict[str, Floats]] = {role: {} for role in JUDGED}
    for row, experts in enumerate(sets):
        for at, each in enumerate(chains_of(world, experts)):
            for role in JUDGED:
                for domain, marks in each.right[role].items():
                    empty = np.full((len(sets), alternatives, len(marks)), np.nan, np.float32)
                    told = np.frombuffer(marks.encode(), np.uint8) - ord("0")
                    found[role].setdefault(domain, empty)[row, at] = told
    return found


def best_two(rows: Integers, predicted: Floats) -> Chosen:
    order = np.argsort(-predicted, axis=1, kind="stable")
    return Chosen(rows=rows, first=order[:, 0], second=order[:, 1])


def stacked(parts: Sequence[Chosen]) -> Chosen:
    return Chosen(
        rows=np.concatenate([part.rows for part in parts]),
        first=np.concatenate([part.first for part in parts]),
        second=np.concatenate([part.second for part in parts]),
    )


def divisions(names: Sequence[str]) -> list[tuple[str, ...]]:
    """The experts in groups, divided anew several times."""
    rng, found = random.Random("weft simmerge"), []
    for _ in range(DIVISIONS):
        shuffled = rng.sample(names, len(names))
        found += [tuple(shuffled[at : at + GROUP]) for at in range(0, len(names), GROUP)]
    return found


# -- judging -------------------------------------------------------------------------------------------


def judged(
    labelled: Sequence[Floats], final: Sequence[Floats], chosen: Sequence[Mapping[str, Chosen]]
) -> dict[str, float]:
    """The share of the gap that is closed by everything that chooses; `gap` itself in utility.

    [row, alternative] for each world. What follows `then evaluated` makes two and keeps the better on labels.
    """
    fixed = int(np.mean([world[:, : len(OPERATORS)].mean(axis=0) for world in labelled], axis=0).argmax())
    gain: dict[str, float] = {}
    gap: dict[str, float] = {}

    def count(name: str, values: Floats, floor: Floats, ceiling: Floats) -> None:
        gain[name] = gain.get(name, 0.0) + float((values - floor).sum())
        gap[name] = gap.get(name, 0.0) + float((ceiling - floor).sum())

    rows_in_all = 0
    for shares, worth, choices in zip(labelled, final, chosen, strict=True):
        oracle = at(worth, shares.argmax(axis=1))
        bounds = worth[:, fixed], oracle
        rows_in_all += len(worth)
        count("random", worth.mean(axis=1), *bounds)
        count("always_task_arithmetic", worth[:, OPERATORS.index("task_arithmetic")], *bounds)
        for budget in (2, 3):
            count(f"merge_and_evaluate_{budget}", best_of(shares, worth, budget), *bounds)
        for name, each in choices.items():
            rows = each.rows
            count(name, worth[rows, each.first], worth[rows, fixed], oracle[rows])
            better = np.where(shares[rows, each.first] >= shares[rows, each.second], each.first, each.second)
            count(f"{name}, the first two evaluated", worth[rows, better], worth[rows, fixed], oracle[rows])
    return {name: gain[name] / max(gap[name], 1e-9) for name in gain} | {"gap": gap["random"] / rows_in_all}


def at(worth: Floats, columns: Integers) -> Floats:
    return np.asarray(np.take_along_axis(worth, columns[:, None], axis=1)[:, 0])


def best_of(shares: Floats, worth: Floats, budget: int) -> Floats:
    """What the best on labels of `budget` random alternatives is worth, in expectation."""
    count = worth.shape[1]
    ranked = np.take_along_axis(worth, np.argsort(-shares, axis=1, kind="stable"), axis=1)
    chance = [comb(count - 1 - rank, budget - 1) / comb(count, budget) for rank in range(count)]
    return np.asarray(ranked @ np.array(chance))


def intervals(tables: Sequence[Table]) -> dict[str, dict[str, Any]]:
    """{name: {mean, ci95, by_seed}} of everything that `judged` judges."""

    def values(
        worlds: Sequence[Table], weights: Mapping[str, Mapping[str, Floats]] | None
    ) -> dict[str, float]:
        labelled, final = (
            [utilities(table.marks[role], weights and weights[role]) for table in worlds] for role in JUDGED
        )
        return judged(labelled, final, [table.chosen for table in worlds])

    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = []
    for _ in range(REPLICATES):
        worlds = [tables[i] for i in rng.integers(len(tables), size=len(tables))]
        marks = tables[0].marks
        weights = {role: {name: counts(rng, row) for name, row in marks[role].items()} for role in JUDGED}
        drawn.append(values(worlds, weights))
    seeds = [values([table], None) for table in tables]
    return {
        name: {
            "mean": value,
            "ci95": np.percentile([each[name] for each in drawn], [2.5, 97.5]).tolist(),
            "by_seed": [each[name] for each in seeds],
        }
        for name, value in values(tables, None).items()
    }


def report(worlds: Sequence[World], among: Sequence[World]) -> dict[str, Any]:
    """What was closed of the gap, and by what."""
    names = worlds[0].names
    splits = {"lomo": [(name,) for name in names], "both_unseen": divisions(names)}
    found = {split: intervals(two_way(worlds, among, trials)) for split, trials in splits.items()}
    chains = {str(size): intervals(multi_way(worlds, among, size)) for size in (3, 4)}
    told = {
        "seeds": [world.seed for world in worlds],
        "tuning": list(TUNING),
        "oracle_minus_fixed": found["lomo"]["gap"],
        "gap_closed": {name: {split: each[name] for split, each in found.items()} for name in FEATURES},
        "first_two_evaluated": {
            name: {split: each[f"{name}, the first two evaluated"] for split, each in found.items()}
            for name in FEATURES
        },
        "baselines": {name: found["lomo"][name] for name in BASELINES},
        "multiway": {
            size: {
                "oracle_minus_fixed": each["gap"],
                "gap_closed": {name: each[name] for name in FEATURES},
                "baselines": {name: each[name] for name in BASELINES},
            }
            for size, each in chains.items()
        },
    }
    return rounded(told)


def rounded(told: Any) -> Any:
    if isinstance(told, dict):
        return {name: rounded(value) for name, value in told.items()}
    if isinstance(told, list):
        return [rounded(value) for value in told]
    return round(told, 4) if isinstance(told, float) else told


if __name__ == "__main__":
    main()
