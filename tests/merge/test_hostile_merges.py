"""Merges whose author lies, or means to keep whoever looks at them busy: plans, traces and recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from merge_core.checkpoint import merkle
from merge_core.checkpoint.manifest import LeafTable
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure, tensor_record
from merge_core.checkpoint.source import TensorInfo
from merge_core.execute import Material, Merged, audit, leaf, run
from merge_core.plan import MergePlan
from merge_core.recipe import parse
from merge_core.resolve import draft, header_of
from merge_core.trace import Trace

NAME = "model.layers.0.mlp.up_proj.weight"

Merge = Callable[[str, Mapping[str, torch.Tensor]], tuple[MergePlan, list[Material], Merged]]


@pytest.fixture
def merge(save: Callable[..., Path], tmp_path: Path) -> Iterator[Merge]:
    """Merge a recipe over models of one tensor each, which lie in directories of their names."""
    with ExitStack() as stack:

        def do(text: str, tensors: Mapping[str, torch.Tensor]) -> tuple[MergePlan, list[Material], Merged]:
            recipe = parse(text)
            opened = {
                model: stack.enter_context(Checkpoint.open(save(model, {NAME: tensors[model]})))
                for model in recipe.models
            }
            measured = {model: measure(checkpoint) for model, checkpoint in opened.items()}
            plan = draft(recipe, {model: header_of(c) for model, c in opened.items()}).seal(
                {model: found.manifest.model_id for model, found in measured.items()}
            )
            inputs = [
                Material(tensors=VerifiedSource(c, measured[m].leaves), files=c.functional_files)
                for m, c in opened.items()
            ]
            merged = run(plan, inputs, tmp_path / "out", journal=tmp_path / "out.journal")
            return plan, inputs, merged

        yield do


def published(plan: MergePlan, inputs: list[Material], honest: Merged, lie: Trace) -> tuple[Merged, bytes]:
    """What somebody publishes who applies another trace, and the bytes of its one tensor."""
    data = leaf(plan, lie, inputs, NAME, 0)
    (planned,) = plan.tensors
    leaves = [merkle.leaf_digest(data)]
    info = TensorInfo(dtype=planned.dtype, shape=planned.shape)
    manifest = replace(honest.manifest, tensors=(tensor_record(NAME, info, leaves),))
    return Merged(manifest=manifest, leaves=LeafTable({NAME: leaves}), trace=lie), data


def test_an_audit_allows_no_lie_about_small_weights(
    merge: Merge, weights: Callable[..., torch.Tensor]
) -> None:
    base = weights("base", 64, 64)
    loud = torch.zeros(64, 64)
    loud[0] = 4.0
    models = {
        "base": base,
        "loud": base + loud,
        "one": base + weights("one", 64, 64) / 1024,
        "two": base + weights("two", 64, 64) / 1024,
    }
    plan, inputs, honest = merge(
        "merge_method: sce\nbase_model: base\nmodels: [{model: loud}, {model: one}, {model: two}]\n", models
    )
    (values,) = honest.trace.steps
    first, one, two = values[NAME]["weights"]
    assert max(one, two) < 1e-7
    # Close to what is true, beside the sum of all, and nearly cancelling each other.
    false = (first, 5e-7, -4.999e-7)
    lie, data = published(plan, inputs, honest, Trace(steps=({NAME: {**values[NAME], "weights": false}},)))
    told = torch.frombuffer(bytearray(data), dtype=torch.float32)
    true = torch.frombuffer(bytearray(leaf(plan, honest.trace, inputs, NAME, 0)), dtype=torch.float32)
    assert (told - true).abs().max() > 0.01
    report = audit(plan, lie.trace, inputs, lie.manifest, lie.leaves)
    assert not report.ok
    assert not report.trace_ok


def test_an_audit_allows_no_lie_about_a_model_that_is_left_out(merge: Merge) -> None:
    """At t = 0 nothing of the expert is taken, however large it is."""
    models = {"base": torch.ones(64, 64), "large": torch.eye(64) * 1e9}
    plan, inputs, honest = merge(
        "merge_method: slerp\nbase_model: base\nmodels: [{model: large}]\nparameters: {t: 0}\n", models
    )
    assert honest.trace.of(0, NAME)["factors"] == (1.0, 0.0)
    lie, _ = published(plan, inputs, honest, Trace(steps=({NAME: {"factors": (1.0, 1e-6)}},)))
    assert not audit(plan, lie.trace, inputs, lie.manifest, lie.leaves).ok


ROUNDS = """name: first
merge_method: ties
base_model: base
models: [{model: one, parameters: {weight: 1, density: 0.5}}]
---
merge_method: slerp
base_model: base
models: [{model: first}]
parameters: {t: 0.5}
"""


@pytest.mark.parametrize("threshold", [-1, 1 << 31, 2**53 - 1])
def test_a_lie_about_a_round_ends_in_a_verdict(
    threshold: int, merge: Merge, weights: Callable[..., torch.Tensor]
) -> None:
    """What comes after the lie is measured all the same, over what is true."""
    models = {model: weights(model, 64, 64) for model in ("base", "one")}
    plan, inputs, honest = merge(ROUNDS, models)
    first, last = honest.trace.steps
    false = Trace(steps=({NAME: {**first[NAME], "threshold": (threshold,)}}, last))
    report = audit(plan, Trace.parse(plan, false.to_bytes()), inputs, honest.manifest, honest.leaves)
    assert not report.trace_ok
    assert report.failed == ((NAME, 0),)
