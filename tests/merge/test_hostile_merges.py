"""Merges whose author lies, or means to keep whoever looks at them busy: plans, traces and recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from merge_core.checkpoint import merkle
from merge_core.checkpoint.manifest import LeafTable
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure, tensor_record
from merge_core.checkpoint.source import TensorInfo
from merge_core.digest import ModelId
from merge_core.errors import CorruptCheckpoint
from merge_core.execute import Material, Merged, audit, leaf, run
from merge_core.memory import CHUNK_ELEMENTS
from merge_core.operators import COPY
from merge_core.plan import (
    MAX_ROW,
    MAX_TAKEN,
    PIECE,
    MergePlan,
    Operand,
    Step,
    TensorPlan,
    most_taken,
)
from merge_core.recipe import parse
from merge_core.resolve import ModelHeader, check, draft, header_of
from merge_core.tokenizer.plan import TokenizerPlan
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


MODEL = ModelId("sha256:" + "0" * 64)
DELLA = {"density": (0.5,), "epsilon": (0.1,), "weight": (1.0,), "lambda": 1.0}
DELLA |= {"normalize": False, "rescale": True, "rescale_l1": False}


def rounds(
    *made: tuple[str, str], shape: tuple[int, ...], tokenizer: TokenizerPlan | None = None
) -> MergePlan:
    """Steps of one tensor, each made by an (operator, dtype) of the one before it."""
    steps = []
    for source, (operator, dtype) in enumerate(made):
        della = operator == "della_linear"
        tensor = TensorPlan(
            name=NAME,
            dtype=dtype,
            shape=shape,
            operator=operator,
            operands=tuple(Operand(source=s, tensor=NAME) for s in ([0, source] if della else [source])),
            parameters=DELLA if della else {"scale": (2.0,)} if operator == "passthrough" else {},
        )
        base = 0 if della else None
        steps.append(Step(base=base, donor=0, architecture="X", tensors=(tensor,), tokenizer=tokenizer))
    return MergePlan(inputs=(MODEL,), steps=tuple(steps))


class Counted:
    """A model of ones that counts how many bytes are read of it."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.tensors = {NAME: TensorInfo(dtype=dtype, shape=shape)}
        self.bytes = 0
        self._data = np.ones(shape, {"F32": np.float32, "F64": np.float64}[dtype]).tobytes()

    def read(self, tensor: str, offset: int, length: int, into: memoryview | None = None) -> memoryview:
        self.bytes += length
        data = self._data[offset : offset + length]
        if into is None:
            return memoryview(data)
        into[: len(data)] = data
        return into[: len(data)]


WIDE = (("passthrough", "F64"), (COPY.name, "F64")) * 2
RANKED = (("della_linear", "F64"),) * 3


@pytest.mark.parametrize(
    ("made", "shape"),
    [
        pytest.param(WIDE, (CHUNK_ELEMENTS + 5,), id="leaves of pieces of four"),
        pytest.param(RANKED, (3, 400_000), id="rows over the edges of pieces"),
    ],
)
def test_no_round_takes_more_than_it_is_said_to(
    made: tuple[tuple[str, str], ...], shape: tuple[int, ...], tmp_path: Path
) -> None:
    assert PIECE == CHUNK_ELEMENTS
    plan = rounds(*made, shape=shape)
    source = Counted("F64", shape)
    files = {"config.json": b'{"architectures": ["X"]}'}
    run(plan, [Material(tensors=source, files=lambda: files)], tmp_path / "out", journal=tmp_path / "journal")
    # A piece and the rest of its rows: whatever takes no round takes as much.
    alone = Counted("F64", shape)
    once = rounds(made[0], shape=shape)
    run(once, [Material(tensors=alone, files=lambda: files)], tmp_path / "one", journal=tmp_path / "journal1")
    assert plan.tensors[0].info.length <= alone.bytes <= source.bytes
    assert source.bytes <= most_taken(1, plan.steps) * alone.bytes


@pytest.mark.parametrize(
    ("made", "shape"),
    [
        pytest.param((("passthrough", "F64"), (COPY.name, "F64")) * 9, (1 << 22,), id="wide types"),
        pytest.param((("della_linear", "BF16"),) * 16, (3, 400_000), id="rows"),
    ],
)
def test_rounds_that_multiply_what_they_read_are_no_plan(
    made: tuple[tuple[str, str], ...], shape: tuple[int, ...]
) -> None:
    with pytest.raises(CorruptCheckpoint, match=f"takes more than {MAX_TAKEN}"):
        MergePlan.parse(rounds(*made, shape=shape).to_bytes())
    few = rounds(*made[:4], shape=shape)
    assert MergePlan.parse(few.to_bytes()) == few


def test_rounds_that_gather_rows_of_each_other_are_no_plan() -> None:
    """Rows of tokens in any order: each may lie in another leaf, which has to be computed for it."""
    steps = []
    for number in range(4):
        (step,) = rounds(("passthrough", "F32"), shape=(1 << 18, 1 << 10)).steps
        (tensor,) = step.tensors
        tensor = replace(tensor, operands=(Operand(source=number, tensor=NAME),))
        tokenizer = TokenizerPlan(source=number, models=(number,), rows=1 << 18, tensors=(NAME,))
        steps.append(replace(step, tensors=(tensor,), tokenizer=tokenizer))
    two = MergePlan(inputs=(MODEL,), steps=tuple(steps[:2]))
    assert MergePlan.parse(two.to_bytes()) == two
    with pytest.raises(CorruptCheckpoint, match=f"takes more than {MAX_TAKEN}"):
        MergePlan.parse(MergePlan(inputs=(MODEL,), steps=tuple(steps)).to_bytes())


def test_no_row_is_ranked_that_is_a_whole_model() -> None:
    plan = rounds(("della_linear", "BF16"), shape=(MAX_ROW + 1,))
    with pytest.raises(CorruptCheckpoint, match="ranks within rows of at most"):
        MergePlan.parse(plan.to_bytes())
    recipe = parse(
        "merge_method: della_linear\nbase_model: a\n"
        "models: [{model: b, parameters: {weight: 1, density: 0.5}}]"
    )
    config = {"architectures": ["X"]}
    header = ModelHeader(
        tensors={NAME: TensorInfo(dtype="BF16", shape=(MAX_ROW + 1,))}, config=config, files=()
    )
    assert "ranks within rows" in check(recipe, {"a": header, "b": header}).problems[0]


def test_a_plan_cannot_have_settings_that_no_recipe_may_have() -> None:
    plan = rounds(("della_linear", "BF16"), shape=(4, 4))
    bad = TensorPlan(
        name=NAME,
        dtype="BF16",
        shape=(4, 4),
        operator="della_linear",
        operands=plan.tensors[0].operands,
        parameters=DELLA | {"epsilon": (0.5,)},
    )
    data = replace(plan, steps=(replace(plan.steps[0], tensors=(bad,)),)).to_bytes()
    with pytest.raises(CorruptCheckpoint, match="must lie between 0 and 1"):
        MergePlan.parse(data)


def test_a_number_beyond_all_floats_is_no_plan() -> None:
    data = rounds(("passthrough", "BF16"), shape=(4, 4)).to_bytes()
    assert b"0x1.0000000000000p+1" in data
    with pytest.raises(CorruptCheckpoint, match="not a merge plan"):
        MergePlan.parse(data.replace(b"0x1.0000000000000p+1", b"0x1.0000000000000p+9999"))


@pytest.mark.parametrize("key", ["rope_theta", "hidden_act", "auto_map", "text_config.rope_theta"])
def test_a_plan_changes_nothing_of_a_config_that_no_merge_changes(key: str) -> None:
    (step,) = rounds(("passthrough", "BF16"), shape=(4, 4)).steps
    for name, sound in ((key, False), ("num_hidden_layers", True), ("text_config.vocab_size", True)):
        plan = MergePlan(inputs=(MODEL,), steps=(replace(step, config={name: 1}),))
        if sound:
            assert MergePlan.parse(plan.to_bytes()) == plan
        else:
            with pytest.raises(CorruptCheckpoint, match="no merge changes"):
                MergePlan.parse(plan.to_bytes())


def test_a_plan_holds_no_chat_template_that_no_recipe_may_have() -> None:
    (step,) = rounds(("passthrough", "BF16"), shape=(4, 4)).steps
    for length, sound in ((1 << 18, True), ((1 << 18) + 1, False)):
        plan = MergePlan(inputs=(MODEL,), steps=(replace(step, chat_template="{" * length),))
        if sound:
            assert MergePlan.parse(plan.to_bytes()) == plan
        else:
            with pytest.raises(CorruptCheckpoint, match="the chat template"):
                MergePlan.parse(plan.to_bytes())


def test_no_plan_fills_the_memory_with_rows_of_tokens() -> None:
    """The parents may have a few rows, and the output many, for each of which all of them are asked."""
    rows = 1 << 20
    (step,) = rounds(("passthrough", "BF16"), shape=(rows, 1)).steps
    (tensor,) = step.tensors
    operands = tuple(Operand(source=n, tensor=NAME) for n in range(65))
    weights = {"weight": (1.0,) * 65, "normalize": True}
    tensor = replace(tensor, operator="linear", operands=operands, parameters=weights)
    models = tuple(ModelId(f"sha256:{n:064}") for n in range(65))
    for count, sound in ((64, True), (65, False)):
        wide = replace(tensor, operands=operands[:count], parameters=weights | {"weight": (1.0,) * count})
        tokenizer = TokenizerPlan(source=0, models=tuple(range(65)), rows=rows, tensors=(NAME,))
        plan = MergePlan(inputs=models, steps=(replace(step, tensors=(wide,), tokenizer=tokenizer),))
        if sound:
            assert MergePlan.parse(plan.to_bytes()) == plan
        else:
            with pytest.raises(CorruptCheckpoint, match="rows would be told apart"):
                MergePlan.parse(plan.to_bytes())
