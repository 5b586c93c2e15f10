"""Is there something to choose? Train catalogues of experts, merge every pair by every operator, and compare.

    python tests/bench/catalogue.py --seeds 10 11 12

The story goes to stderr; the last line of stdout is one JSON object. The best fixed operator and the oracle's
operator for each pair are chosen on the labels' items and reported on the final items; an oracle that has
seen the final items is reported beside it, as a bound that no choice can reach. Intervals are percentile
bootstraps: a replicate draws seeds, and per domain items of either role, with replacement, and chooses anew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs

from merge_core.zoo.catalogue import open_catalogue
from merge_core.zoo.labels import JUDGED, OPERATORS, Labels, measure, utility
from node.worker import process

BOOTSTRAP_SEED = 20_240_917
REPLICATES = 2_000
AT_ONCE = 2

Floats = npt.NDArray[np.float32]
Marks = Mapping[str, Mapping[str, Floats]]
"""By role and domain: [pair, operator, item], 1 for right, NaN where a pair is not judged by the domain."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    cache = Path(platformdirs.user_cache_dir("weft")) / "catalogue"
    parser.add_argument(
        "--directory", type=Path, default=cache, help=f"keep catalogues there, not in {cache}"
    )
    parser.add_argument("--build", action="store_true", help="train and label only; print where they lie")
    arguments = parser.parse_args()
    folders = asyncio.run(all_labelled(arguments.directory, arguments.seeds))
    if arguments.build:
        print("\n".join(map(str, folders)))
        return
    labels = [
        measure(open_catalogue(path, seed=seed)) for path, seed in zip(folders, arguments.seeds, strict=True)
    ]
    print(json.dumps(report(arguments.seeds, labels)))


async def all_labelled(root: Path, seeds: Sequence[int], *, chains: bool = False) -> list[Path]:
    """The catalogue of every seed, trained and labelled, two seeds at a time, each in a worker of its own.

    With `chains` the sample of merges of three and four experts is labelled too.
    """
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> Path:
        async with turn:
            folder = root / f"seed-{seed}" / "catalogue"
            said: set[tuple[str, int]] = set()

            def tell_of(event: dict[str, Any]) -> None:
                if event["kind"] == "progress":
                    tenth = 10 * event["done"] // event["total"] if event["what"].startswith("merge") else 0
                    if (event["what"], tenth) not in said:
                        said.add((event["what"], tenth))
                        tell(f"seed {seed}: {event['what']}, {event['done']} of {event['total']}")

            wanted = {"directory": str(folder), "seed": seed, "chains": chains}
            await process.run("catalogue", wanted, on_event=tell_of)
            tell(f"seed {seed}: trained and labelled in {folder}")
            return folder

    return list(await asyncio.gather(*map(one, seeds)))


def report(seeds: Sequence[int], labels: Sequence[Labels]) -> dict[str, Any]:
    """What the operators, the best of them and the oracles are worth."""
    marks = [marks_of(each) for each in labels]
    labelled, final = [np.stack([utilities(each[role]) for each in marks]) for role in JUDGED]
    for each, seed in zip(labels, seeds, strict=True):
        tell_alone(seed, each)
    fixed = int(labelled.mean(axis=(0, 1)).argmax())
    choices = Counter(OPERATORS[i] for i in labelled.argmax(axis=2).ravel())
    drawn = bootstrap(marks)
    names = ("gap", "gap_in_hindsight")
    values = [honest(labelled, final), hindsight(labelled, final)]
    experts = len(labels[0].alone) - 1
    return {
        "experts": experts,
        "pairs": labelled.shape[1],
        "seeds": list(seeds),
        "best_fixed": {"operator": OPERATORS[fixed], "utility": float(final[..., fixed].mean())},
        "oracle": float(final[..., fixed].mean() + values[0]),
        "oracle_in_hindsight": float(final[..., fixed].mean() + values[1]),
        **{
            name: {"mean": float(values[i]), "ci95": np.percentile(drawn[i], [2.5, 97.5]).tolist()}
            for i, name in enumerate(names)
        },
        "gap_by_seed": [float(honest(labelled[i : i + 1], final[i : i + 1])) for i in range(len(seeds))],
        "by_operator": {name: float(final[..., i].mean()) for i, name in enumerate(OPERATORS)},
        "chosen_by_oracle": {name: choices[name] for name in OPERATORS},
    }


def marks_of(labels: Labels) -> Marks:
    """The marks of all merges as arrays."""
    pairs = list(dict.fromkeys(merged.experts for merged in labels.merges))
    found: dict[str, dict[str, Floats]] = {role: {} for role in JUDGED}
    for merged in labels.merges:
        at = pairs.index(merged.experts), OPERATORS.index(merged.operator)
        for role in JUDGED:
            for domain, marks in merged.right[role].items():
                empty = np.full((len(pairs), len(OPERATORS), len(marks)), np.nan, np.float32)
                row = found[role].setdefault(domain, empty)
                row[at] = np.frombuffer(marks.encode(), np.uint8) - ord("0")
    return found


def utilities(marks: Mapping[str, Floats], weights: Mapping[str, Floats] | None = None) -> Floats:
    """[pair, operator]: the share of right answers, mean over the domains of a pair."""
    shares = [
        row.mean(axis=-1) if weights is None else row @ weights[domain] for domain, row in marks.items()
    ]
    return np.asarray(np.nanmean(np.stack(shares), axis=0), np.float32)


def honest(labelled: Floats, final: Floats) -> float:
    """[seed, pair, operator] twice: what choosing per pair is worth beyond the best fixed operator."""
    chosen = np.take_along_axis(final, labelled.argmax(axis=2)[..., None], axis=2)
    return float(chosen.mean() - final[..., labelled.mean(axis=(0, 1)).argmax()].mean())


def hindsight(labelled: Floats, final: Floats) -> float:
    """The same of an oracle that has seen what it is judged by."""
    return float(final.max(axis=2).mean() - final[..., labelled.mean(axis=(0, 1)).argmax()].mean())


def bootstrap(marks: Sequence[Marks]) -> npt.NDArray[np.float64]:
    """[2, replicate]: the honest gap and the one in hindsight."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    found = np.empty((2, REPLICATES))
    for replicate in range(REPLICATES):
        drawn = [marks[i] for i in rng.integers(len(marks), size=len(marks))]
        weights = {role: {name: counts(rng, row) for name, row in marks[0][role].items()} for role in JUDGED}
        labelled, final = [
            np.stack([utilities(each[role], weights[role]) for each in drawn]) for role in JUDGED
        ]
        found[:, replicate] = honest(labelled, final), hindsight(labelled, final)
    return found


def counts(rng: np.random.Generator, row: Floats) -> Floats:
    """The share of a resample that each item has."""
    items = row.shape[-1]
    return (np.bincount(rng.integers(items, size=items), minlength=items) / items).astype(np.float32)


def tell_alone(seed: int, labels: Labels) -> None:
    for name, right in labels.alone.items():
        shares = "  ".join(f"{d} {m.count('1') / len(m):4.0%}" for d, m in right["final"].items())
        tell(f"seed {seed}  {name:5} {shares}  mean {utility(right['final']):4.0%}")


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
