"""Merges of merges: an earlier round is computed when it is read, to the same bits as from a disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merge_core.checkpoint import merkle
from merge_core.checkpoint.reader import Checkpoint, measure
from merge_core.checkpoint.writer import CheckpointWriter
from merge_core.errors import CorruptCheckpoint
from merge_core.execute import Material, Merged, audit, leaf, run
from merge_core.functional import result_files
from merge_core.memory import CHUNK_ELEMENTS
from merge_core.plan import MergePlan
from merge_core.trace import Trace

LONG = CHUNK_ELEMENTS + 70_001

FIRST = """merge_method: slerp
base_model: {base}
models: [{{model: {math}}}]
parameters: {{t: 0.3}}
dtype: bfloat16
"""
SECOND = """merge_method: task_arithmetic
base_model: {base}
models: [{{model: {code}, parameters: {{weight: 0.5}}}}]
dtype: float32
"""
LAST = """merge_method: ties
base_model: {base}
models:
  - {{model: {first}, parameters: {{weight: 0.6, density: 0.4}}}}
  - {{model: {second}, parameters: {{weight: 0.4, density: 0.7}}}}
dtype: bfloat16
"""
PATHS = {name: name for name in ("base", "math", "code", "first", "second")}
TOGETHER = "---\n".join(
    ("name: first\n" + FIRST, "name: second\n" + SECOND, LAST),
).format(**PATHS)

Merge = Callable[..., tuple[MergePlan, list[Material], Merged]]


@pytest.fixture
def models(save: Callable[..., Path], weights: Callable[..., torch.Tensor]) -> None:
    shapes = {
        "lm_head.weight": (LONG,),
        "model.layers.0.mlp.up_proj.weight": (65, 33),
        "model.norm.weight": (7,),
    }
    for model in ("base", "math", "code"):
        save(model, {name: weights(f"{model} {name}", *shape) for name, shape in shapes.items()})


@pytest.fixture
def merge(models: None, sealed: Callable[..., tuple[MergePlan, list[Material]]], tmp_path: Path) -> Merge:
    """Merge a recipe over the directories that it names, and put the result among them."""

    def do(text: str, target: str, **options: object) -> tuple[MergePlan, list[Material], Merged]:
        plan, inputs = sealed(text, tmp_path)
        journal = tmp_path / f"{target}.journal"
        merged = run(plan, inputs, tmp_path / target, journal=journal, **options)  # type: ignore[arg-type]
        finish(plan, inputs, tmp_path / target)
        return plan, inputs, merged

    return do


def finish(plan: MergePlan, inputs: Sequence[Material], target: Path) -> None:
    with CheckpointWriter.create(target, plan.layout) as writer:
        for name, data in result_files(plan, [material.files for material in inputs]).items():
            writer.add_file(name, data)
        writer.commit()


def weights_of(directory: Path) -> Mapping[str, torch.Tensor]:
    tensors: Mapping[str, torch.Tensor] = load_file(directory / "model.safetensors")
    return tensors


def test_rounds_in_one_file_give_the_bits_of_rounds_one_after_another(merge: Merge, tmp_path: Path) -> None:
    plan, _, together = merge(TOGETHER, "together")
    assert [step.architecture for step in plan.steps] == ["LlamaForCausalLM"] * 3
    for name, text in (("first", FIRST), ("second", SECOND), ("last", LAST)):
        merge(text.format(**PATHS), name)
    apart = weights_of(tmp_path / "last")
    for name, tensor in weights_of(tmp_path / "together").items():
        assert torch.equal(tensor, apart[name])
    with Checkpoint.open(tmp_path / "last") as checkpoint:
        assert measure(checkpoint).manifest == together.manifest
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_threads_and_chunks_do_not_show_in_rounds(merge: Merge) -> None:
    results = [
        merge(TOGETHER, f"{threads}-{chunks}", threads=threads, chunk_elements=chunks * CHUNK_ELEMENTS)[2]
        for threads, chunks in ((1, 1), (2, 1), (4, 2))
    ]
    assert results[0] == results[1] == results[2]


def test_every_leaf_of_the_last_round_can_be_computed_alone(merge: Merge) -> None:
    plan, inputs, merged = merge(TOGETHER, "together")
    trace = Trace.parse(plan, merged.trace.to_bytes())
    assert [len(step) for step in trace.steps] == [3, 0, 3]
    for record in merged.manifest.tensors:
        for index in range(record.leaf_count):
            data = leaf(plan, trace, inputs, record.name, index)
            assert merkle.leaf_digest(data) == merged.leaves[record.name][index]


def test_an_audit_measures_every_round(merge: Merge) -> None:
    plan, inputs, merged = merge(TOGETHER, "together")
    assert audit(plan, merged.trace, inputs, merged.manifest, merged.leaves).ok
    first, *rest = merged.trace.steps
    name = "model.norm.weight"
    nudged = {name: {"factors": tuple(value * 1.01 for value in first[name]["factors"])}}
    false = Trace(steps=({**first, **nudged}, *rest))
    report = audit(plan, false, inputs, merged.manifest, merged.leaves)
    assert not report.trace_ok
    assert (name, 0) in report.failed
    assert not [leaf for tensor, leaf in report.failed if tensor != name]


class KilledError(Exception):
    """Stands for the end of the process."""


def test_an_interrupted_round_goes_on_where_it_was(merge: Merge, tmp_path: Path) -> None:
    plan, inputs, whole = merge(TOGETHER, "whole")
    seen = []

    def die(done: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise KilledError

    target, journal = tmp_path / "killed", tmp_path / "killed.journal"
    with pytest.raises(KilledError):
        run(plan, inputs, target, journal=journal, on_progress=die)
    assert run(plan, inputs, target, journal=journal) == whole


def test_a_round_that_would_take_what_no_round_makes_is_no_plan(merge: Merge) -> None:
    plan, _, _ = merge(TOGETHER, "together")
    first, second, last = plan.steps
    short = replace(first, tensors=first.tensors[:1])
    data = MergePlan(inputs=plan.inputs, steps=(short, second, last)).to_bytes()
    with pytest.raises(CorruptCheckpoint, match="step 0 makes no"):
        MergePlan.parse(data)
