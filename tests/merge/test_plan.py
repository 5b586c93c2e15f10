"""Plans: what a recipe becomes, what stands against it, and plans that lie."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.checkpoint.reader import Checkpoint, measure
from merge_core.checkpoint.source import TensorInfo
from merge_core.digest import ModelId, canonical, parse_canonical, sha256
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.plan import MergePlan
from merge_core.recipe import parse
from merge_core.resolve import ModelHeader, check, draft, header_of, header_of_manifest
from merge_core.trace import Trace

RECIPE = """
merge_method: ties
base_model: base
models:
  - {model: math, parameters: {weight: 1.0}}
  - {model: code, parameters: {weight: [0.0, 1.0], density: [{filter: mlp, value: 0.25}, {value: 0.75}]}}
dtype: bfloat16
"""
SHAPES = {
    "lm_head.weight": (16, 8),
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.mlp.up_proj.weight": (8, 8),
    "model.layers.1.mlp.up_proj.weight": (8, 8),
    "model.layers.2.self_attn.q_proj.weight": (8, 8),
    "model.norm.weight": (8,),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
}
IDS = {name: ModelId(sha256(name.encode())) for name in ("base", "math", "code")}


def header(shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: str = "F32", **config: Any) -> ModelHeader:
    tensors = {name: TensorInfo(dtype=dtype, shape=shape) for name, shape in sorted(shapes.items())}
    return ModelHeader(tensors=tensors, config=CONFIG | config, files=())


HEADERS = {"base": header(), "math": header(), "code": header(dtype="BF16")}
PLAN = draft(parse(RECIPE), HEADERS).seal(IDS)


def test_every_parameter_of_every_tensor_is_in_the_plan() -> None:
    tensors = {t.name: t for t in PLAN.tensors}
    assert list(tensors) == sorted(SHAPES)
    weights = {name: tensor.parameters["weight"] for name, tensor in tensors.items()}
    assert weights == {
        "lm_head.weight": (1.0, 0.0),
        "model.embed_tokens.weight": (1.0, 0.0),
        "model.layers.0.mlp.up_proj.weight": (1.0, 0.0),
        "model.layers.1.mlp.up_proj.weight": (1.0, 0.5),
        "model.layers.2.self_attn.q_proj.weight": (1.0, 1.0),
        "model.norm.weight": (1.0, 0.0),
    }
    assert tensors["model.layers.1.mlp.up_proj.weight"].parameters["density"] == (1.0, 0.25)
    assert tensors["model.norm.weight"].parameters["density"] == (1.0, 0.75)
    assert tensors["model.norm.weight"].dtype == PLAN.result.dtype == "BF16"
    operands = tensors["model.norm.weight"].operands
    assert [(o.source, o.tensor) for o in operands] == [(i, "model.norm.weight") for i in range(3)]
    assert PLAN.inputs == (IDS["base"], IDS["math"], IDS["code"])


def test_a_plan_survives_its_bytes() -> None:
    assert MergePlan.parse(PLAN.to_bytes()) == PLAN
    assert MergePlan.parse(PLAN.to_bytes()).digest == PLAN.digest


def test_a_plan_names_no_reference() -> None:
    assert not any(f'"{name}"'.encode() in PLAN.to_bytes() for name in ("math", "code"))


def test_the_order_of_keys_does_not_change_the_plan_but_the_order_of_models_does() -> None:
    reordered = parse("dtype: bfloat16\n" + RECIPE.replace("dtype: bfloat16", ""))
    assert draft(reordered, HEADERS).seal(IDS).digest == PLAN.digest
    lines = RECIPE.splitlines()
    lines[4], lines[5] = lines[5], lines[4]
    assert draft(parse("\n".join(lines)), HEADERS).seal(IDS).digest != PLAN.digest


def test_without_a_dtype_the_output_is_as_the_donor() -> None:
    recipe = parse(RECIPE.replace("dtype: bfloat16", ""))
    assert {t.dtype for t in draft(recipe, HEADERS).steps[0].tensors} == {"F32"}
    assert {t.dtype for t in draft(recipe, HEADERS | {"base": header(dtype="F16")}).steps[0].tensors} == {
        "F16"
    }


def test_every_incompatibility_is_reported_at_once() -> None:
    smaller = {**SHAPES, "lm_head.weight": (12, 8)}
    del smaller["model.norm.weight"]
    headers = {
        "math": header(smaller, num_attention_heads=4, quantization_config={"bits": 4}),
        "base": header({**SHAPES, "extra.weight": (2,)}, rope_theta=1e6),
    }
    estimate = check(parse(RECIPE), headers)
    assert estimate.problems == (
        "code was not found",
        "math is quantised; merging needs its weights in a floating-point type",
        "num_attention_heads of math is 4, of base it is 2",
        "math lacks the tensor extra.weight, which base has",
        "the shapes of lm_head.weight differ: base [16, 8], math [12, 8]",
        "math lacks the tensor model.norm.weight, which base has",
    )
    assert estimate.warnings == ("rope_theta of math is absent, of base it is 1000000.0",)
    with pytest.raises(Unmergeable) as raised:
        draft(parse(RECIPE), headers)
    assert len(raised.value.problems) == 6
    assert "and 5 more" in raised.value.why


def test_a_missing_base_is_named() -> None:
    assert check(parse(RECIPE), {k: v for k, v in HEADERS.items() if k != "base"}).problems == (
        "the base base was not found",
    )


def test_a_weight_that_covers_no_tensor_is_a_problem() -> None:
    recipe = parse(RECIPE.replace("{weight: 1.0}", "{weight: [{filter: mlp, value: 1.0}]}"))
    assert "the recipe gives no weight of math for model.norm.weight" in check(recipe, HEADERS).problems


def test_a_weight_that_nothing_is_said_of_is_one_problem_and_not_one_for_each_tensor() -> None:
    recipe = parse("merge_method: linear\nmodels: [{model: math}, {model: code}]")
    assert check(recipe, HEADERS).problems == ("the recipe gives no weight of math, code",)
    recipe = parse("merge_method: linear\nmodels: [{model: math, parameters: {weight: 1}}, {model: code}]")
    assert check(recipe, HEADERS).problems == ("the recipe gives no weight of code",)


def test_a_stored_copy_of_tied_weights_and_derived_tables_are_no_obstacle() -> None:
    tied = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    math = header({**SHAPES, "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}, tie_word_embeddings=True)
    headers = {"base": header(tied), "math": math, "code": header(tied)}
    assert check(parse(RECIPE), headers).problems == ()
    assert not any("inv_freq" in tensor.name for tensor in draft(parse(RECIPE), headers).steps[0].tensors)


def test_integer_tensors_are_taken_as_they_are() -> None:
    def with_table(dtype: str) -> ModelHeader:
        table = {"model.position_ids": TensorInfo(dtype=dtype, shape=(1, 4))}
        return ModelHeader(tensors={**header().tensors, **table}, config=CONFIG, files=())

    headers = {name: with_table("I64") for name in IDS}
    tensor = next(t for t in draft(parse(RECIPE), headers).steps[0].tensors if t.name == "model.position_ids")
    assert (tensor.operator, [o.source for o in tensor.operands], tensor.dtype) == ("copy", [0], "I64")
    mixed = headers | {"code": with_table("I32")}
    assert any("model.position_ids cannot be merged" in p for p in check(parse(RECIPE), mixed).problems)


def test_the_estimate_says_what_the_merge_costs() -> None:
    estimate = check(parse(RECIPE), HEADERS)
    elements = 16 * 8 * 2 + 8 * 8 * 3 + 8
    assert estimate.problems == ()
    assert draft(parse(RECIPE), HEADERS).estimate == estimate
    assert (estimate.tensors, estimate.output_bytes) == (6, 2 * elements)
    assert estimate.read_bytes == (1 + 3) * elements * (4 + 4 + 2)
    assert estimate.peak_ram_bytes < 400 << 20


def test_a_header_is_the_same_from_disk_and_from_a_manifest(
    save: Callable[..., Path], weights: Callable[..., torch.Tensor]
) -> None:
    directory = save("m", {"model.norm.weight": weights("m", 8)})
    with Checkpoint.open(directory) as checkpoint:
        manifest = measure(checkpoint).manifest
        assert header_of(checkpoint) == header_of_manifest(manifest, checkpoint.config)


def lies() -> list[tuple[str, Callable[[dict[str, Any]], object]]]:
    def first(plan: dict[str, Any]) -> Any:
        return tensors(plan)[0]

    def tensors(plan: dict[str, Any]) -> Any:
        return plan["steps"][0]["tensors"]

    def later(plan: dict[str, Any], operand: Any) -> None:
        """Another step, whose tensors begin with one that the first step makes, or should."""
        plan["steps"].append(copy.deepcopy(plan["steps"][0]))
        plan["steps"][1].update(base=3)
        for tensor in plan["steps"][1]["tensors"]:
            tensor["operands"][0] = operand

    def doubled(plan: dict[str, Any]) -> None:
        """Rounds that take the one before three times each: 3^12 tensors for one."""
        for number in range(12):
            step = copy.deepcopy(plan["steps"][0])
            step["base"] = 3 + number
            for tensor in step["tensors"]:
                tensor["operands"] = [3 + number] * 3
            plan["steps"].append(step)

    return [
        ("rounds upon rounds", doubled),
        ("version", lambda p: p.update(version=1)),
        ("version true", lambda p: p.update(version=True)),
        ("unknown key", lambda p: p.update(holder="here")),
        ("no inputs", lambda p: p.update(inputs=[])),
        ("bad id", lambda p: p["inputs"].__setitem__(0, "sha256:00")),
        ("no steps", lambda p: p.update(steps=[])),
        ("base out of range", lambda p: p["steps"][0].update(base=3)),
        ("donor is no index", lambda p: p["steps"][0].update(donor=True)),
        ("no tensors", lambda p: p["steps"][0].update(tensors=[])),
        ("unsorted", lambda p: tensors(p).reverse()),
        ("repeated", lambda p: tensors(p).insert(0, first(p))),
        ("name", lambda p: first(p).update(name="../x")),
        ("dtype", lambda p: first(p).update(dtype="I8")),
        ("shape", lambda p: first(p).update(shape=[-1])),
        ("huge shape", lambda p: first(p).update(shape=[2**40, 2**40])),
        ("operator", lambda p: first(p).update(operator="eval")),
        ("input out of range", lambda p: first(p).update(operands=[0, 1, 3])),
        ("base not first", lambda p: first(p).update(operands=[1, 0, 2])),
        ("no experts", lambda p: first(p).update(operands=[0])),
        ("spelled out", lambda p: first(p).update(operands=[[0, first(p)["name"]], 1, 2])),
        ("a step that is not there", lambda p: tensors(p)[0].update(operands=[3, 1, 2])),
        ("a tensor that no step makes", lambda p: later(p, [3, "other.weight"])),
        ("missing parameter", lambda p: first(p)["parameters"].pop("lambda")),
        ("too few weights", lambda p: first(p)["parameters"]["weight"].pop()),
        ("a float", lambda p: first(p)["parameters"].update({"lambda": 1})),
        ("decimal", lambda p: first(p)["parameters"].update({"lambda": "1.0"})),
        ("nan", lambda p: first(p)["parameters"].update({"lambda": "nan"})),
        ("density", lambda p: first(p)["parameters"].update(density=[(2.0).hex()] * 2)),
        ("flag", lambda p: first(p)["parameters"].update(normalize="yes")),
    ]


@pytest.mark.parametrize("lie", lies(), ids=lambda lie: lie[0])
def test_a_plan_that_is_not_exact_is_refused(lie: tuple[str, Callable[[dict[str, Any]], object]]) -> None:
    value = parse_canonical(PLAN.to_bytes())
    lie[1](value)
    with pytest.raises(CorruptCheckpoint, match="not a merge plan"):
        MergePlan.parse(canonical(value))


@given(st.binary(max_size=60), st.integers(0, len(PLAN.to_bytes())))
@settings(deadline=None)
def test_damaged_bytes_are_no_plan(noise: bytes, at: int) -> None:
    data = PLAN.to_bytes()
    damaged = data[:at] + noise + data[at + len(noise) :]
    if damaged == data:
        return
    with contextlib.suppress(CorruptCheckpoint):
        assert MergePlan.parse(damaged).to_bytes() == damaged


def ties_trace() -> dict[str, Any]:
    values = {"threshold": [0, 1065353216], "last": [127, 5]}
    return {"version": 2, "steps": [{name: dict(values) for name in SHAPES}]}


def test_a_trace_survives_its_bytes() -> None:
    data = canonical(ties_trace())
    trace = Trace.parse(PLAN, data)
    assert trace.of(0, "lm_head.weight") == {"threshold": (0, 1065353216), "last": (127, 5)}
    assert trace.to_bytes() == data
    assert trace.digest == sha256(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(version=1),
        lambda t: t.update(version=True),
        lambda t: t["steps"][0].pop("lm_head.weight"),
        lambda t: t["steps"][0].update(other={"threshold": [0, 0], "last": [0, 0]}),
        lambda t: t["steps"][0]["lm_head.weight"].update(threshold=[0]),
        lambda t: t["steps"][0]["lm_head.weight"].update(threshold=["0x1p0", 0]),
        lambda t: t["steps"][0]["lm_head.weight"].update(last=[-2, 0]),
        lambda t: t["steps"][0]["lm_head.weight"].update(last=[True, 0]),
        lambda t: t["steps"][0]["lm_head.weight"].update(angle=[0, 0]),
    ],
)
def test_a_trace_that_does_not_fit_its_plan_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    value = ties_trace()
    change(value)
    with pytest.raises(CorruptCheckpoint, match="not the trace"):
        Trace.parse(PLAN, canonical(value))
