"""What a fingerprint tells of two models without their weights, and what it costs.

    python tests/bench/fingerprint.py --seeds 10 11

Every two experts of the catalogues are compared twice: by all of their weights and all that they say to the
probes, and by their fingerprints. `error` is the mean absolute error over pairs and groups of weights, of the
groups that a fingerprint does not hold whole (a larger model has no others); `errors` tells how it is spread,
and what features read. `kl_rank_correlation` is Spearman's, the mean over the features that are made of
Kullback-Leibler divergences. Costs: a fingerprint of a Llama of 7 B by its shapes; sketching beside hashing
and reading the same bytes, in turns, medians; feature vectors of ordered pairs of fingerprints of that shape;
partners by minis. All are CPU seconds of one thread, which others on the machine hardly show in. The story
goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import checkpoints
import numpy as np
import numpy.typing as npt
import platformdirs
from checkpoints import BASE, MEDIUM, Shape

from merge_core.checkpoint.reader import Checkpoint, measure
from merge_core.digest import ModelId, sha256
from merge_core.evolution.mapped import MappedSource
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.functional import probes, probing
from merge_core.simmerge.functional.behaviour import Behaviour, Observation
from merge_core.simmerge.index import Index
from merge_core.simmerge.mini import Mini
from merge_core.simmerge.pairs import behaviours as panel
from merge_core.simmerge.pairs import compiled as matching
from merge_core.simmerge.pairs import divergence
from merge_core.simmerge.pairs.exact import compare
from merge_core.simmerge.pairs.features import NAMES, vector
from merge_core.simmerge.pairs.statistics import OVERALL, PairStatistics, StructuralStatistics
from merge_core.simmerge.pairs.structures import StructurePanel
from merge_core.simmerge.pairs.survey import Survey
from merge_core.simmerge.structural.sketcher import compute
from merge_core.simmerge.structural.structure import (
    GROUPS,
    WIDTH,
    Group,
    LayerNorms,
    Structure,
    grouped,
    layer_rows,
    sampled,
)
from merge_core.zoo.recipes import RECIPES
from merge_core.zoo.threads import one_thread_each
from node.worker import process

SEVEN = Shape(layers=32, hidden=4096, inner=11008, heads=32, key_value_heads=32, vocabulary=32000)
"""7 billion parameters: Llama's."""
ESTIMATED = ("weight_cosine", "task_cosine", "sign_agreement", "overlap")
DIVERGENCES = tuple(name for name in NAMES if name.partition(".")[0] in ("kl", "reverse_kl"))
PANEL = 128
"""Fingerprints that are compared with each other for `pairs_per_s`."""
SHELVES = (100, 1_000, 10_000)

Floats = npt.NDArray[np.floating[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    cache = Path(platformdirs.user_cache_dir("weft")) / "catalogue"
    parser.add_argument(
        "--directory", type=Path, default=cache, help=f"keep catalogues there, not in {cache}"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    folders = [asyncio.run(trained(arguments.directory, seed)) for seed in arguments.seeds]
    with one_thread_each():
        found = [accuracy(folder) for folder in folders]
        sketched = speed(arguments.rounds)
        large = fingerprint_of(SEVEN, 0)
        told = {
            **joined(found),
            "seeds": arguments.seeds,
            "bytes_7b": len(large.to_bytes()),
            "mini_bytes": len(Mini.of(large).to_bytes()),
            **sketched,
            "pairs_per_s": vectors_per_second(large, arguments.rounds),
            **partners(arguments.rounds),
        }
    print(json.dumps(told))


async def trained(root: Path, seed: int) -> Path:
    """The folder of the catalogue of a seed, trained in a worker unless it lies there."""
    folder = root / f"seed-{seed}" / "catalogue"
    size = "catalogue"
    total = len(RECIPES[size].experts)
    tell(f"seed {seed}: base and {total} experts in {folder}")
    request = {"directory": str(folder), "seed": seed, "size": size}
    await process.run("zoo", request, on_event=lambda event: None)
    return folder


def accuracy(folder: Path) -> dict[str, Any]:
    """Compare every two experts of a catalogue by all there is and by fingerprints."""
    names = ["base", *sorted(path.parent.name for path in folder.glob("e*/config.json"))]
    asked = probes.find("zoo")
    opened = {name: Checkpoint.open(folder / name) for name in names}
    sources = {name: MappedSource(opened[name], measure(opened[name]).leaves) for name in names}
    structures = {name: compute(source) for name, source in sources.items()}
    whole = {name: probing.observe(folder / name, asked, positions=None) for name in names}
    published = {name: Behaviour.of(probing.observe(folder / name, asked)) for name in names}
    experts = names[1:]
    side_by_side = StructurePanel([structures[name] for name in experts], base=structures["base"])
    rows = panel.Panel.of([published[name] for name in experts], published["base"], key=published["base"].key)
    estimated = side_by_side.pairs(range(len(experts)))
    exact, told, truths = [], [], []
    for i, one in enumerate(experts):
        tell(f"{folder.parent.name}: {one} with each")
        functional = panel.estimated(published[one], rows)
        structural = _row(estimated, i)
        values, _ = vector(PairStatistics(structural=structural, functional=functional))
        for j, other in enumerate(experts):
            if i == j:
                continue
            if i < j:
                exact.append((i, j, compare(sources[one], sources[other], sources["base"])))
            truth = divergence.measured(whole[one], whole[other], whole["base"])
            truths.append(vector(PairStatistics(structural=_pair(estimated, i, j), functional=truth))[0])
            told.append(values[j])
    for checkpoint in opened.values():
        checkpoint.close()
    held = [len(group.sketch) == 0 for group in structures["base"].groups]
    known = [GROUPS.index(group.key) for group in structures["base"].groups]
    return {
        "errors": {name: _errors(estimated, exact, name) for name in ESTIMATED},
        "sampled": [at for at, is_whole in zip(known, held, strict=True) if not is_whole],
        "known": known,
        "told": np.stack(told),
        "truth": np.stack(truths),
        "pairs": len(exact),
    }


def _errors(
    estimated: StructuralStatistics, exact: Sequence[tuple[int, int, StructuralStatistics]], field: str
) -> Floats:
    """[pair, column]: absolute errors."""
    told = getattr(estimated, field)
    return np.stack([np.abs(told[i, j] - getattr(truth, field)) for i, j, truth in exact])


def _row(found: StructuralStatistics, i: int) -> StructuralStatistics:
    fields = StructuralStatistics.__dataclass_fields__
    return StructuralStatistics(**{name: getattr(found, name)[i] for name in fields})


def _pair(found: StructuralStatistics, i: int, j: int) -> StructuralStatistics:
    return _row(_row(found, i), j)


def joined(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of all catalogues together."""
    errors = {name: np.concatenate([one["errors"][name] for one in found]) for name in ESTIMATED}
    sampled_groups, known = found[0]["sampled"], found[0]["known"]
    told, truth = (np.concatenate([one[name] for one in found]) for name in ("told", "truth"))
    at = [NAMES.index(name) for name in DIVERGENCES]
    ranks = {
        name: spearman(told[:, column], truth[:, column])
        for name, column in zip(DIVERGENCES, at, strict=True)
    }
    return {
        "pairs": sum(one["pairs"] for one in found),
        "error": {name: float(np.nanmean(each[:, sampled_groups])) for name, each in errors.items()},
        "errors": {
            name: {
                "p95": float(np.nanpercentile(each[:, sampled_groups], 95)),
                "largest": float(np.nanmax(each[:, sampled_groups])),
                "overall": float(np.nanmean(each[:, OVERALL])),
                "all_groups": float(np.nanmean(each[:, known])),
                "by_group": {str(GROUPS[column]): float(np.nanmean(each[:, column])) for column in known},
            }
            for name, each in errors.items()
        },
        "kl_rank_correlation": float(np.mean(list(ranks.values()))),
        "kl_rank_correlations": ranks,
    }


def spearman(a: Floats, b: Floats) -> float:
    """The correlation of ranks."""
    return float(np.corrcoef(ranked(a), ranked(b))[0, 1])


def ranked(values: Floats) -> Floats:
    """Ranks, of equals their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def speed(rounds: int) -> dict[str, Any]:
    """Seconds for a gigabyte in bfloat16: sketching, and hashing and reading the same bytes."""
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as temporary:
        checkpoints.write_trio(Path(temporary), MEDIUM, seed=1)
        with Checkpoint.open(Path(temporary) / BASE) as checkpoint:
            source = MappedSource(checkpoint, measure(checkpoint).leaves)
            arms: dict[str, Callable[[], object]] = {
                "seconds_per_gb": lambda: compute(source),
                "hashing_seconds_per_gb": lambda: measure(checkpoint, threads=1),
                "reading_seconds_per_gb": lambda: _read(checkpoint),
            }
            seconds = alternately(arms, rounds)
    found = {name: taken / (MEDIUM.size / 1e9) for name, taken in seconds.items()}
    return {**found, "of_hashing": found["seconds_per_gb"] / found["hashing_seconds_per_gb"]}


def _read(checkpoint: Checkpoint) -> None:
    buffer = memoryview(bytearray(1 << 20))
    for name, info in checkpoint.tensors.items():
        for start in range(0, info.length, len(buffer)):
            checkpoint.read_bytes(name, start, min(len(buffer), info.length - start), into=buffer)


def alternately(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median CPU seconds of each, in turns; the first round of all is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            started = time.process_time()
            arm()
            if number:
                taken[name].append(time.process_time() - started)
    return {name: median(seconds) for name, seconds in taken.items()}


def fingerprint_of(shape: Shape, seed: int) -> Fingerprint:
    """The fingerprint that a model of a shape has, of numbers drawn by chance: as large as the real one."""
    draw = np.random.default_rng(seed)
    tensors = shape.tensors()
    groups, rows = grouped(tensors), layer_rows(tensors)
    found = []
    for key, names in groups.items():
        elements = sum(prod(tensors[name].shape) for name in names)
        sample, has_sketch = sampled(elements, len(groups))
        found.append(
            Group(
                key=key,
                elements=elements,
                shapes=sha256(str(key).encode()),
                l1=0.02 * elements,
                l2=0.02 * elements**0.5,
                largest=1.0,
                sketch=draw.standard_normal(WIDTH if has_sketch else 0).astype(np.float32),
                sample=draw.standard_normal(sample).astype(np.float32),
            )
        )
    layers = tuple(
        LayerNorms(
            layer=layer, role=role, elements=1, l1=1.0, l2=float(np.float32(draw.uniform(1, 2))), largest=1.0
        )
        for layer, role in sorted(set(rows.values()))
    )
    return Fingerprint(
        model_id=ModelId(sha256(b"model %d" % seed)),
        structure=Structure(groups=tuple(found), layers=layers),
        behaviour=Behaviour.of(observation(shape, draw)),
    )


def observation(shape: Shape, draw: np.random.Generator) -> Observation:
    """512 positions of a model of a shape, by chance."""
    positions = probes.MAX_POSITIONS
    logits = draw.standard_normal((positions, shape.vocabulary)).astype(np.float32) * 3
    attention = draw.random((shape.layers, positions, 1, 8)).astype(np.float32)
    return Observation(
        probes=sha256(b"probes"),
        tokenizer=sha256(b"tokens"),
        asked=sha256(b"asked"),
        tasks=("one", "two", "three", "four"),
        task=np.arange(positions, dtype=np.uint8) % 4,
        logp=logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)),
        bits_per_byte=np.ones(4, np.float32),
        hidden=draw.standard_normal((shape.layers + 1, positions, 8)).astype(np.float32),
        attention=attention / attention.sum(axis=-1, keepdims=True),
    )


def vectors_per_second(base: Fingerprint, rounds: int) -> float:
    """Feature vectors of ordered pairs of fingerprints of one shape, from parsed ones to numbers."""
    models = [_near(base, seed) for seed in range(1, PANEL + 1)]
    taken = alternately(
        {"survey": lambda: Survey.of(models, base, tasks=("one",), how=matching.compare)}, rounds
    )
    return PANEL * PANEL / taken["survey"]


def _near(base: Fingerprint, seed: int) -> Fingerprint:
    """A fingerprint as of a model that was trained from the base's."""
    draw = np.random.default_rng(seed)

    def moved(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return values + (0.02 * draw.standard_normal(values.shape)).astype(np.float32)

    assert base.behaviour is not None
    groups = tuple(
        replace(group, sketch=moved(group.sketch), sample=moved(group.sample))
        for group in base.structure.groups
    )
    ids = np.roll(base.behaviour.ids, seed, axis=0)
    ids = np.where(draw.random((len(ids), 1)) < 0.3, ids, base.behaviour.ids)
    return Fingerprint(
        model_id=ModelId(sha256(b"model %d" % seed)),
        structure=Structure(groups=groups, layers=base.structure.layers),
        behaviour=replace(base.behaviour, ids=ids),
    )


def partners(rounds: int) -> dict[str, Any]:
    """Seconds to find the 20 best partners among so many experts, and to lay their minis out before."""
    draw = np.random.default_rng(3)
    origin = draw.standard_normal(128)
    minis = [_mini(number, origin + 0.05 * draw.standard_normal(128)) for number in range(max(SHELVES) + 2)]
    raw = [mini.to_bytes() for mini in minis[2:]]
    curve = {}
    for size in SHELVES:
        index = Index(Mini.parse(data) for data in raw[:size])
        found = index.partners(minis[0], 20, base=minis[1])
        assert len(found) == 20
        curve[str(size)] = alternately(
            {
                "top20_s": lambda index=index: index.partners(minis[0], 20, base=minis[1]),
                "parse_and_index_s": lambda size=size: Index(Mini.parse(data) for data in raw[:size]),
            },
            rounds,
        )
    return {"top20_of_10000_s": curve[str(max(SHELVES))]["top20_s"], "top20_curve": curve}


def _mini(number: int, sketch: Floats) -> Mini:
    return Mini(
        fingerprint=sha256(b"fingerprint %d" % number),
        model_id=ModelId(sha256(b"model %d" % number)),
        shapes=sha256(b"shapes"),
        questions=sha256(b"questions"),
        l2=1.0,
        largest=1.0,
        sketch=sketch.astype(np.float32),
        behaviour=(sketch / np.linalg.norm(sketch)).astype(np.float16),
    )


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
