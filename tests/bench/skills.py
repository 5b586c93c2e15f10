"""Do skills combine? Two experts have one half each of what a task asks for; how is it had from the two?

    python tests/bench/skills.py --seeds 40 41 42

One expert has learned to reverse, the other to move letters on; `rev+caesar` is trained nowhere. Each way
gets no labelled example of it or the same LABELS of them, from its dev split, and is scored on its test
split: the models as they are, their sum, the best uniform merge of a grid, CMA-ES with one coefficient for
each expert and with coefficients by layer and component, and, as the control, fine-tuning on the very same
examples from each model and merge. The story goes to stderr; the last line of stdout is one JSON object.
Intervals are percentile bootstraps over seeds and items.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from transformers.utils import logging

from merge_core.evaluation.scoring import Score, score
from merge_core.evolution.evaluator import Evaluator
from merge_core.evolution.fitness import Reading, Readings, cost, refuse_shared
from merge_core.evolution.genome import Genome, Shape
from merge_core.evolution.journal import Journal, Question
from merge_core.evolution.run import Evolution
from merge_core.recipe import Recipe, parse
from merge_core.zoo.build import build
from merge_core.zoo.tasks import task
from merge_core.zoo.threads import one_thread_each
from merge_core.zoo.training import fine_tune, sequences
from merge_core.zoo.workbench import Workbench, workbench

TARGET = "rev+caesar"
LABELS = 32
BUDGET = 400
SEARCHES = {
    "per_expert": Shape(layers=0, components=False),
    "layer_wise": Shape(layers=2, components=True),
}
UNIFORM = tuple(
    (method, {"weight": weight, **density})
    for method, densities in (("task_arithmetic", (None,)), ("ties", (0.2, 0.5, 0.8)), ("linear", (None,)))
    for density in ({} if value is None else {"density": value} for value in densities)
    for weight in ((0.5,) if method == "linear" else (0.3, 0.5, 0.7, 0.9, 1.0, 1.1, 1.3))
)
BOOTSTRAP_SEED = 20_240_917
REPLICATES = 10_000
AT_ONCE = 2

Row = tuple[int, str]
"""Labelled examples used, and a character for each test item: `1` where it was answered exactly."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[40, 41, 42])
    cache = Path(platformdirs.user_cache_dir("weft")) / "skills"
    parser.add_argument("--directory", type=Path, default=cache, help=f"keep models there, not in {cache}")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(study(arguments.directory, arguments.seeds[0])))
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(lambda seed: in_a_process(arguments.directory, seed), arguments.seeds))
    print(json.dumps(report(arguments.seeds, rows)))


def in_a_process(directory: Path, seed: int) -> dict[str, Row]:
    """The rows of one seed, computed in a process with one thread."""
    command = [sys.executable, __file__, "--one", "--seeds", str(seed), "--directory", str(directory)]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=alone)
    rows: dict[str, Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def study(directory: Path, seed: int) -> dict[str, Row]:
    """Every way to the target with the models of one seed."""
    logging.disable_progress_bar()
    zoo = build(directory / f"skills-{seed}" / "zoo", seed=seed, size="skills")
    directories = {"base": zoo.base, **zoo.experts}
    labelled = task(f"{TARGET}:dev").first(LABELS)
    refuse_shared([labelled], [task(f"{TARGET}:test")])
    rows: dict[str, Row] = {}
    with one_thread_each(), workbench(directories) as bench:
        recipes = {name: (0, alone(name)) for name in directories}
        recipes["sum"] = 0, summed(zoo.experts)
        recipes["best_uniform"] = LABELS, best_uniform(bench, zoo.experts, labelled)
        for name, shape in SEARCHES.items():
            recipes[name] = LABELS, searched(bench, summed(zoo.experts), shape, labelled, seed)
        for name, (labels, recipe) in recipes.items():
            bench.make(recipe)
            rows[name] = labels, marks(bench.score(task(f"{TARGET}:test")))
            tell(seed, name, rows[name])
            if name != "per_expert":
                tuned = fine_tune(bench.live.model, sequences(TARGET, "dev").first(LABELS)).eval()
                found = score(tuned, bench.tokenizer, task(f"{TARGET}:test"))
                rows[f"fine_tuned_from_{name}"] = LABELS, marks(found)
                tell(seed, f"fine_tuned_from_{name}", rows[f"fine_tuned_from_{name}"])
    return rows


def alone(model: str) -> Recipe:
    """A model as it is."""
    return parse(json.dumps({"merge_method": "passthrough", "models": [{"model": model}]}))


def summed(experts: Mapping[str, Path]) -> Recipe:
    """The base and all task vectors."""
    return merged(experts, "task_arithmetic", {"weight": 1.0})


def merged(experts: Mapping[str, Path], method: str, parameters: Mapping[str, float]) -> Recipe:
    """All experts by one operator, every one alike."""
    models = [{"model": name, "parameters": parameters} for name in experts]
    base = {} if method == "linear" else {"base_model": "base"}
    return parse(json.dumps({"merge_method": method, **base, "models": models, "dtype": "float32"}))


def best_uniform(bench: Workbench, experts: Mapping[str, Path], labelled: Any) -> Recipe:
    """Of a grid of operators and weights the merge that costs least on the labelled examples."""
    recipes = [merged(experts, method, parameters) for method, parameters in UNIFORM]
    costs = []
    for recipe in recipes:
        bench.make(recipe)
        found = bench.score(labelled)
        costs.append(cost((Reading(loss=sum(found.losses) / sum(found.bytes), right=found.value),), (1.0,)))
    return recipes[costs.index(min(costs))]


def searched(bench: Workbench, start: Recipe, shape: Shape, labelled: Any, seed: int) -> Recipe:
    """What CMA-ES finds on the labelled examples with BUDGET candidates."""
    models = {name: bench.models[name] for name in start.models}
    genome = Genome.of(start, {name: model.header for name, model in models.items()}, shape)
    evaluator = Evaluator(genome, models, [labelled], seed=seed)

    def evaluate(questions: Sequence[Question]) -> Iterator[tuple[int, Readings]]:
        return ((number, evaluator.read(question)) for number, question in enumerate(questions))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        with Journal(path, {"shape": str(shape), "seed": str(seed)}, tasks=1) as journal:
            evolution = Evolution(genome, evaluate, journal, seed=seed, budget=BUDGET)
            for _ in evolution.generations():
                pass
            return genome.recipe(evolution.settle().values)


def marks(found: Score) -> str:
    return "".join(str(int(hit)) for hit in found.hits)


def report(seeds: Sequence[int], rows: Sequence[Mapping[str, Row]]) -> dict[str, Any]:
    """[METHOD]: the mean over seeds with its interval, every seed, and the labels used."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    names = list(rows[0])
    right = np.array([[list(map(int, row[name][1])) for name in names] for row in rows], dtype=np.float32)
    count = right.shape[-1]
    drawn = np.empty((REPLICATES, len(names)))
    for replicate in range(REPLICATES):
        weights = np.bincount(rng.integers(count, size=count), minlength=count) / count
        drawn[replicate] = (right @ weights)[rng.integers(len(seeds), size=len(seeds))].mean(axis=0)
    found = {
        name: {
            "mean": float(right[:, i].mean()),
            "ci95": np.percentile(drawn[:, i], [2.5, 97.5]).tolist(),
            "by_seed": right[:, i].mean(axis=-1).tolist(),
            "labels": rows[0][name][0],
        }
        for i, name in enumerate(names)
    }
    return {"seeds": list(seeds), "task": f"{TARGET}:test", "items": count, "combination": found}


def tell(seed: int, name: str, row: Row) -> None:
    labels, right = row
    share = right.count("1") / len(right)
    print(f"seed {seed}  {name:30} {labels:3} labels  {share:6.1%}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
