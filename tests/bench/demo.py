"""Does merging pay? Train the zoo from several seeds, merge with the engine, score all on the test split.

    python tests/bench/demo.py --seeds 0 1 2

The story goes to stderr; the last line of stdout is one JSON object. Intervals are percentile bootstraps,
paired: a replicate draws seeds, and per domain items, with replacement, and every model answers the same
items. The best expert is chosen anew in each replicate, in the experts' favour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core import recipe
from merge_core.checkpoint.reader import Checkpoint, measure
from merge_core.checkpoint.writer import CheckpointWriter
from merge_core.digest import ModelId
from merge_core.evaluation.loading import load_model, load_tokenizer
from merge_core.evaluation.scoring import score
from merge_core.functional import output_files
from merge_core.plan import MergePlan
from merge_core.resolve import ModelHeader, draft, header_of
from merge_core.zoo.tasks import task
from node.worker import process

BOOTSTRAP_SEED = 20_240_917
REPLICATES = 10_000
AT_ONCE = 2

Judged = Mapping[str, Mapping[str, Sequence[bool]]]
"""Right or wrong by model, domain and item."""
Answers = npt.NDArray[np.bool_]
"""[seed, model, domain, item]: the base first, the merge last, the experts between."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--directory", type=Path, help="keep zoos and merges there, and use them again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as temporary:
        root = arguments.directory or Path(temporary)
        models = asyncio.run(all_models(root, arguments.seeds))
        print(json.dumps(report(arguments.seeds, [judge(seed, models[seed]) for seed in arguments.seeds])))


async def all_models(root: Path, seeds: Sequence[int]) -> dict[int, dict[str, Path]]:
    """Train and merge for every seed, two seeds at a time, each in a worker of its own."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> dict[str, Path]:
        async with turn:
            # A parent folder for each: one zoo is built below one parent at a time.
            folder = root / f"seed-{seed}"
            request = {"directory": str(folder / "zoo"), "seed": seed, "size": "demo"}
            built = await process.run("zoo", request, on_event=lambda _: None)
            experts = {name: Path(path) for name, path in built["experts"].items()}
            tell(f"seed {seed}: trained {', '.join(experts)}")
            merged = folder / "merged"
            if not merged.exists():
                await merge(Path(built["base"]), experts, merged, folder / "work")
            return {"base": Path(built["base"]), **experts, "merged": merged}

    return dict(zip(seeds, await asyncio.gather(*map(one, seeds)), strict=True))


async def merge(base: Path, experts: Mapping[str, Path], target: Path, work: Path) -> None:
    """Task arithmetic with every weight 1, as anybody would run it: recipe, plan, worker, commit."""
    plan, request, donor = prepare({"base": base, **experts}, target, work)
    result = await process.run("merge", request, on_event=lambda _: None)
    with Checkpoint.open(donor) as checkpoint:
        files = output_files(plan.result, checkpoint.functional_files())
    with CheckpointWriter.create(target, plan.layout) as writer:
        for name, data in files.items():
            writer.add_file(name, data)
        writer.commit()
    tell(f"merged {', '.join(experts)} into {result['model_id']}")


def prepare(models: Mapping[str, Path], target: Path, work: Path) -> tuple[MergePlan, dict[str, Any], Path]:
    """Measure the models, seal the plan and lay out what the worker reads: plan, request, donor."""
    work.mkdir(exist_ok=True)
    headers: dict[str, ModelHeader] = {}
    ids: dict[str, ModelId] = {}
    for name, directory in models.items():
        with Checkpoint.open(directory) as checkpoint:
            measured = measure(checkpoint)
            headers[name], ids[name] = header_of(checkpoint), measured.manifest.model_id
        (work / f"{name}.manifest").write_bytes(measured.manifest.to_bytes())
        (work / f"{name}.leaves").write_bytes(measured.leaves.to_bytes())
    text = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": 1.0}} for name in models if name != "base"],
        "dtype": "float32",
    }
    drafted = draft(recipe.parse(json.dumps(text)), headers)
    plan = drafted.seal(ids)
    (work / "plan").write_bytes(plan.to_bytes())
    inputs = [
        {
            "directory": str(models[name]),
            "manifest": str(work / f"{name}.manifest"),
            "leaves": str(work / f"{name}.leaves"),
        }
        for name in drafted.models
    ]
    places = {"plan": work / "plan", "target": target, "journal": work / "journal", "output": work}
    request = {**{name: str(path) for name, path in places.items()}, "inputs": inputs}
    return plan, request, models[drafted.models[plan.result.donor]]


def judge(seed: int, models: Mapping[str, Path]) -> Judged:
    """Right or wrong for every test item of every domain that there is an expert for."""
    domains = tuple(name for name in models if name not in ("base", "merged"))
    judged = {name: verdicts(path, models["base"], domains) for name, path in models.items()}
    for name, answers in judged.items():
        shares = "  ".join(f"{domain} {np.mean(right):6.1%}" for domain, right in answers.items())
        tell(f"seed {seed}  {name:8} {shares}  mean {np.mean([np.mean(r) for r in answers.values()]):6.1%}")
    return judged


def verdicts(directory: Path, base: Path, domains: Sequence[str]) -> dict[str, tuple[bool, ...]]:
    """Right or wrong for each item by domain; the base has the tokenizer of all."""
    model, tokenizer = load_model(directory), load_tokenizer(base)
    return {domain: score(model, tokenizer, task(f"{domain}:test")).hits for domain in domains}


def report(
    seeds: Sequence[int], judged: Sequence[Mapping[str, Mapping[str, Sequence[bool]]]]
) -> dict[str, Any]:
    """The scores, and what the merge gains with 95 % intervals."""
    answers: Answers = np.array([[list(by.values()) for by in models.values()] for models in judged])
    gains = gain(answers.mean(axis=-1))
    drawn = bootstrap(answers)
    wins = int((gains > 0).all(axis=0).sum())
    tell(f"on {wins} of {len(seeds)} seeds the merge beats base and every expert on the mean over domains")
    names = ("merged_minus_best_expert", "merged_minus_base")
    return {
        "seeds": list(seeds),
        "scores": {
            str(seed): {
                model: {domain: float(np.mean(right)) for domain, right in by.items()}
                for model, by in models.items()
            }
            for seed, models in zip(seeds, judged, strict=True)
        },
        **{
            name: {"mean": float(gains[i].mean()), "ci95": np.percentile(drawn[i], [2.5, 97.5]).tolist()}
            for i, name in enumerate(names)
        },
    }


def gain(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[seed, model, domain] -> [2, seed]: the merge's mean less the best expert's, and less the base's."""
    means = shares.mean(axis=-1)
    return np.stack([means[:, -1] - means[:, 1:-1].max(axis=1), means[:, -1] - means[:, 0]])


def bootstrap(answers: Answers) -> npt.NDArray[np.float64]:
    """[2, replicate]: the gains, mean over the drawn seeds."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    seeds, _, domains, items = answers.shape
    found = np.empty((2, REPLICATES))
    for replicate in range(REPLICATES):
        drawn = rng.integers(seeds, size=seeds)
        weights = np.stack([counts(rng, items) for _ in range(domains)])
        shares = (answers[drawn] * weights).sum(axis=-1) / items
        found[:, replicate] = gain(shares).mean(axis=1)
    return found


def counts(rng: np.random.Generator, items: int) -> npt.NDArray[np.int64]:
    """How often each item is drawn."""
    return np.bincount(rng.integers(items, size=items), minlength=items)


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
