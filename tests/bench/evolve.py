"""Do coefficients by layer pay? Searches against the best uniform operator, at the same budget of candidates.

    python tests/bench/evolve.py --seeds 40 41 42

Two kinds of zoo, of experts that were trained with different care, as those of different people are:
`exact_match` (five tasks on characters) and `text` (source code, prose, tables; bits per byte). Everything
below was fixed before a seed was run:

    uniform              of the operators and settings of GRID the one that costs least, all experts alike;
                         each is asked *all* dev items, more than the searches ask on the way
    per_expert           CMA-ES, one coefficient for each expert
    layer_wise           CMA-ES, a coefficient for each expert at each layer
    layer_wise_component the same for attention, feed-forward blocks and the rest apart
    operator_per_group   the same by groups of layers, of which each chooses its operator

Searches go from coarse to fine: the weights of COARSE by task arithmetic, all experts alike; from the best,
a coefficient for each expert; from what that finds, those of the method. All together a method asks for no
more evaluations than the grid has, BUDGET, and costs are those of `merge_core.evolution.fitness`, on the dev
items. Controls: base, experts, and fine-tuning on FEW labelled dev examples of each domain from base, from
each expert and from two merges. Figures are of test items, which nothing above has seen.

The story goes to stderr, a row for each seed and method; the last line of stdout is one JSON object, with the
combination of skills as `tests/bench/skills.py` studies it. A positive difference means that the layer-wise
merge is better. Intervals are percentile bootstraps, paired, over seeds and, by domain, items.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs

from merge_core.evaluation.scoring import Score, score
from merge_core.evaluation.tasks import Metric, Task
from merge_core.evolution import fitness
from merge_core.evolution.evaluator import Evaluator
from merge_core.evolution.fitness import Reading, Readings
from merge_core.evolution.genome import Genome, Shape
from merge_core.evolution.journal import Journal, Question
from merge_core.evolution.run import FINALISTS, Evolution
from merge_core.evolution.search import SIGMA
from merge_core.recipe import Recipe, parse
from merge_core.zoo.build import build
from merge_core.zoo.recipes import RECIPES
from merge_core.zoo.tasks import task
from merge_core.zoo.threads import one_thread_each
from merge_core.zoo.training import fine_tune, joined, sequences
from merge_core.zoo.workbench import Workbench, workbench

KINDS = {"exact_match": "mixed", "text": "mixed_text"}
"""The size of the zoo for each kind of task."""
SCALES = tuple(round(0.3 + 0.05 * step, 2) for step in range(35))
GRID: tuple[tuple[str, Mapping[str, float]], ...] = (
    *(("task_arithmetic", {"lambda": scale}) for scale in SCALES),
    *(
        (method, {"lambda": scale, "density": density})
        for method in ("ties", "dare_ties", "breadcrumbs")
        for density in (0.2, 0.4, 0.6, 0.8, 0.9)
        for scale in SCALES[2::3]
    ),
    *(("ties", {"lambda": scale, "density": 1.0}) for scale in SCALES[2::3]),
    *(("sce", {"select_topk": share}) for share in (0.25, 0.5, 1.0)),
    *((method, {}) for method in ("linear", "model_stock", "karcher")),
)
BUDGET = len(GRID)
COARSE = (0.4, 0.6, 0.8, 1.0, 1.2)
PER_EXPERT = Shape(components=False)
FIRST = BUDGET // 4
"""What a finer search spends on one coefficient for each expert."""
SPREAD = 0.08
"""By how much the coefficients of a finer search stray at first."""
OPERATORS = ("task_arithmetic", "ties", "dare_ties")
FEW = 32
FINE_TUNING: Mapping[str, Mapping[str, Any]] = {
    "exact_match": {"steps": 60, "rate": 3e-4},
    "text": {"steps": 15, "rate": 1e-4},
}
COMPARED = (
    ("per_expert", "uniform"),
    ("layer_wise", "uniform"),
    ("layer_wise_component", "uniform"),
    ("operator_per_group", "uniform"),
    ("layer_wise", "per_expert"),
)
BOOTSTRAP_SEED = 20_240_917
REPLICATES = 10_000
AT_ONCE = 2

Row = dict[str, list[list[float]]]
"""[METHOD][domain][item]: 1 or 0 for a right or wrong answer; bits per byte, negated, of a text."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[40, 41, 42])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    cache = Path(platformdirs.user_cache_dir("weft")) / "evolve"
    parser.add_argument("--directory", type=Path, default=cache, help=f"keep zoos there, not in {cache}")
    parser.add_argument("--without-skills", action="store_true", help="leave the combination of skills out")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(study(arguments.directory, arguments.kinds[0], arguments.seeds[0])))
        return
    started = time.monotonic()
    studies = [(kind, seed) for kind in arguments.kinds for seed in arguments.seeds]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(lambda s: in_a_process(arguments.directory, *s), studies))
    found: dict[str, Any] = {"seeds": arguments.seeds, "budget": BUDGET}
    for kind in arguments.kinds:
        found[kind] = report([row for (of, _), row in zip(studies, rows, strict=True) if of == kind], kind)
    if not arguments.without_skills:
        found["combination"] = skills(arguments.directory, arguments.seeds)
    print(json.dumps(found | {"minutes": round((time.monotonic() - started) / 60, 1)}))


def in_a_process(directory: Path, kind: str, seed: int) -> Row:
    """The rows of one zoo, computed in a process with one thread."""
    command = [sys.executable, __file__, "--one", "--kinds", kind, "--seeds", str(seed)]
    return json_of([*command, "--directory", str(directory)])


def skills(directory: Path, seeds: Sequence[int]) -> Mapping[str, Any]:
    """{METHOD: {mean, labels, …}} of the study beside this one."""
    command = [sys.executable, str(Path(__file__).with_name("skills.py")), "--directory", str(directory)]
    found: Mapping[str, Any] = json_of([*command, "--seeds", *map(str, seeds)])["combination"]
    return found


def json_of(command: Sequence[str]) -> Any:
    """The last line that a process prints."""
    alone = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=alone)
    return json.loads(done.stdout.splitlines()[-1])


def study(directory: Path, kind: str, seed: int) -> Row:
    """Every method with the models of one seed."""
    size = KINDS[kind]
    # A parent folder for each: one zoo is built below one parent at a time.
    zoo = build(directory / f"{size}-{seed}" / "zoo", seed=seed, size=size)
    domains, layers = list(zoo.experts), RECIPES[size].shape.layers
    dev, test = [[task(f"{domain}:{split}") for domain in domains] for split in ("dev", "test")]
    fitness.refuse_shared(dev, test)
    shapes = {
        "layer_wise": Shape(layers=layers, components=False),
        "layer_wise_component": Shape(layers=layers),
        "operator_per_group": Shape(layers=layers, groups=True, operators=OPERATORS, densities=True),
    }
    row: Row = {}
    with one_thread_each(), workbench({"base": zoo.base, **zoo.experts}) as bench:

        def tell(name: str, scores: Sequence[Score]) -> None:
            row[name] = [of_items(found) for found in scores]
            values = " ".join(f"{found.task} {found.value:.4f}" for found in scores)
            print(f"{kind}  seed {seed}  {name:34} {values}", file=sys.stderr, flush=True)

        def scored(name: str, recipe: Recipe) -> None:
            bench.make(recipe)
            tell(name, [bench.score(one) for one in test])

        def tuned(name: str, recipe: Recipe) -> None:
            bench.make(recipe)
            examples = joined([sequences(domain, "dev").first(FEW) for domain in domains])
            model = fine_tune(bench.live.model, examples, **FINE_TUNING[kind]).eval()
            tell(f"fine_tuned_from_{name}", [score(model, bench.tokenizer, one) for one in test])

        recipes = {name: alone(name) for name in ("base", *domains)}
        recipes["uniform"] = best_uniform(bench, domains, dev)
        begun = coarse(bench, domains, dev)
        recipes["per_expert"] = searched(bench, begun, PER_EXPERT, dev, seed, until=BUDGET).recipe
        begun = searched(bench, begun, PER_EXPERT, dev, seed, until=FIRST)
        for name, shape in shapes.items():
            recipes[name] = searched(bench, begun, shape, dev, seed, until=BUDGET, sigma=SPREAD).recipe
        for name, recipe in recipes.items():
            scored(name, recipe)
        for name in ("base", *domains, "uniform", "layer_wise_component"):
            tuned(name, recipes[name])
    return row


def alone(model: str) -> Recipe:
    """A model as it is."""
    return parse(json.dumps({"merge_method": "passthrough", "models": [{"model": model}]}))


def merged(
    experts: Sequence[str], method: str, parameters: Mapping[str, float], weight: float = 1.0
) -> Recipe:
    """All experts by one operator, every one alike."""
    based = method not in ("linear", "karcher")
    weighed = {"weight": weight} if method not in ("sce", "model_stock", "karcher") else {}
    models = [{"model": name, "parameters": weighed} if weighed else {"model": name} for name in experts]
    base = {"base_model": "base"} if based else {}
    return parse(
        json.dumps({"merge_method": method, **base, "models": models, "parameters": dict(parameters)})
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What is best so far, and after how many evaluations."""

    recipe: Recipe
    asked: int


def best_uniform(bench: Workbench, experts: Sequence[str], dev: Sequence[Task]) -> Recipe:
    """Of GRID the merge that costs least on all dev items."""
    return cheapest(bench, experts, dev, [merged(experts, *choice) for choice in GRID])


def coarse(bench: Workbench, experts: Sequence[str], dev: Sequence[Task]) -> Begun:
    """Task arithmetic with the best weight of COARSE."""
    recipes = [merged(experts, "task_arithmetic", {}, weight) for weight in COARSE]
    return Begun(recipe=cheapest(bench, experts, dev, recipes), asked=len(recipes))


def cheapest(
    bench: Workbench, experts: Sequence[str], dev: Sequence[Task], recipes: Sequence[Recipe]
) -> Recipe:
    """The recipe that costs least on all dev items, in terms of the base and of the sum."""

    def readings(recipe: Recipe) -> Readings:
        bench.make(recipe)
        return tuple(reading_of(bench.score(one)) for one in dev)

    yardsticks = fitness.yardsticks(readings(alone("base")), readings(merged(experts, "task_arithmetic", {})))
    costs = [fitness.cost(readings(recipe), yardsticks) for recipe in recipes]
    return recipes[costs.index(min(costs))]


def searched(
    bench: Workbench,
    begun: Begun,
    shape: Shape,
    dev: Sequence[Task],
    seed: int,
    *,
    until: int,
    sigma: float = SIGMA,
) -> Begun:
    """What CMA-ES finds from there on, when `until` evaluations have been made with those before."""
    models = {name: bench.models[name] for name in begun.recipe.models}
    genome = Genome.of(begun.recipe, {name: model.header for name, model in models.items()}, shape)
    evaluator = Evaluator(genome, models, dev, seed=seed)

    def evaluate(questions: Sequence[Question]) -> Iterator[tuple[int, Readings]]:
        return ((number, evaluator.read(question)) for number, question in enumerate(questions))

    # Beyond the candidates base and start are asked at each share, and the finalists everything.
    budget = until - begun.asked - 2 * len(fitness.SHARES) - FINALISTS - 1
    with tempfile.TemporaryDirectory() as folder:
        identity = {"shape": str(shape), "seed": str(seed)}
        with Journal(Path(folder) / "journal", identity, tasks=len(dev)) as journal:
            evolution = Evolution(genome, evaluate, journal, seed=seed, budget=budget, sigma=sigma)
            for _ in evolution.generations():
                pass
            recipe = genome.recipe(evolution.settle().values)
            return Begun(recipe=recipe, asked=begun.asked + len(journal.readings))


def reading_of(found: Score) -> Reading:
    right = None if found.metric is Metric.BITS_PER_BYTE else found.value
    return Reading(loss=math.fsum(found.losses) / sum(found.bytes), right=right)


def of_items(found: Score) -> list[float]:
    if found.hits:
        return [float(hit) for hit in found.hits]
    return [-loss / math.log(2) / size for loss, size in zip(found.losses, found.bytes, strict=True)]


def report(rows: Sequence[Row], kind: str) -> dict[str, Any]:
    """Mean and worst domain of every method, over seeds, and what searching by layer is worth."""
    sign = -1.0 if kind == "text" else 1.0
    names = list(rows[0])
    values = np.array([[row[name] for name in names] for row in rows])  # [seed, method, domain, item]
    found: dict[str, Any] = {}
    for i, name in enumerate(names):
        domains = values[:, i].mean(axis=-1)
        found[name] = {
            "mean": sign * float(domains.mean()),
            "worst": sign * float(domains.min(axis=-1).mean()),
            "by_seed": (sign * domains.mean(axis=-1)).tolist(),
        }
    for name, other in COMPARED:
        gain = values[:, names.index(name)] - values[:, names.index(other)]
        found[f"{name}_over_{other}"] = {"mean": float(gain.mean()), "ci95": interval(gain)}
    return found


def interval(gain: npt.NDArray[np.float64]) -> list[float]:
    """The 95 % interval of the mean of [seed, domain, item]."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    seeds, domains, items = gain.shape
    drawn = np.empty(REPLICATES)
    for replicate in range(REPLICATES):
        chosen = gain[rng.integers(seeds, size=seeds)]
        drawn[replicate] = np.mean(
            [chosen[:, d, rng.integers(items, size=items)].mean() for d in range(domains)]
        )
    return [float(bound) for bound in np.percentile(drawn, [2.5, 97.5])]


if __name__ == "__main__":
    main()
