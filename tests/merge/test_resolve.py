"""Slices, tied heads and merges of merges: which tensor of which layer of which model ends up where."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.checkpoint.reader import Checkpoint
from merge_core.checkpoint.source import TensorInfo
from merge_core.digest import ModelId, sha256
from merge_core.errors import Unmergeable
from merge_core.functional import output_config
from merge_core.plan import MergePlan, Operand, TensorPlan
from merge_core.recipe import parse, rename
from merge_core.resolve import ModelHeader, check, draft, header_of, tells_of

GOLDEN = Path(__file__).parents[1] / "golden" / "frankenmerge.json"

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def header(
    layers: int, *, dtype: str = "F32", head: bool = True, width: int = 8, **config: Any
) -> ModelHeader:
    """A model of this many layers, each with a matrix and a vector."""
    shapes: dict[str, tuple[int, ...]] = {EMBED: (16, width), NORM: (width,)}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (width, width)
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (width, width)
    if head:
        shapes[HEAD] = (16, width)
    return ModelHeader(
        tensors={name: TensorInfo(dtype=dtype, shape=shape) for name, shape in sorted(shapes.items())},
        config={"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers}
        | config,
        files=(),
    )


def planned(text: str, **headers: ModelHeader) -> MergePlan:
    """The plan of a recipe over these models."""
    ids = {name: ModelId(sha256(name.encode())) for name in headers}
    plan = draft(parse(text), headers).seal(ids)
    assert MergePlan.parse(plan.to_bytes()) == plan
    return plan


def tensors(plan: MergePlan, step: int = -1) -> Mapping[str, TensorPlan]:
    return {tensor.name: tensor for tensor in plan.steps[step].tensors}


def taken(tensor: TensorPlan) -> list[tuple[int, str]]:
    return [(o.source, o.tensor) for o in tensor.operands]


KEYS = (
    *("text_config", "num_hidden_layers", "n_layer", "layer_types", "mlp_only_layers", "no_rope_layers"),
    *("tie_word_embeddings", "architectures", "vocab_size", "moe_layer_freq", "num_key_value_heads"),
)
NAMES = (
    *(EMBED, NORM, HEAD, "x", "model.layers.0.x", "model.layers.1.x", "model.layers.3.x"),
    *("other.layers.0.x", "model.layers.999999.x", "lm_head.layers.0.weight", "a.lm_head.weight"),
)

FRANKEN = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 3], parameters: {scale: [{filter: q_proj, value: 0.5}]}}]
  - sources: [{model: a, layer_range: [2, 4]}]
"""


def test_layers_of_models_are_laid_on_each_other() -> None:
    made = tensors(planned(FRANKEN, a=header(4), b=header(3)))
    layers = [taken(made[f"model.layers.{n}.mlp.up_proj.weight"]) for n in range(7)]
    assert layers == [
        [(source, f"model.layers.{layer}.mlp.up_proj.weight")]
        for source, layer in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (0, 2), (0, 3))
    ]
    assert "model.layers.7.mlp.up_proj.weight" not in made
    assert made["model.layers.3.mlp.up_proj.weight"].operator == "copy"
    assert made["model.layers.3.self_attn.q_proj.weight"].operator == "passthrough"
    assert made["model.layers.3.self_attn.q_proj.weight"].parameters == {"scale": (0.5,)}


def test_what_lies_before_the_layers_is_of_the_first_slice_and_the_rest_of_the_last() -> None:
    slices = [("a", 0, 2), ("b", 1, 3)]
    listed = ", ".join(f"{{sources: [{{model: {m}, layer_range: [{x}, {y}]}}]}}" for m, x, y in slices)
    made = tensors(planned(f"merge_method: passthrough\nslices: [{listed}]", a=header(4), b=header(3)))
    assert [taken(made[name]) for name in (EMBED, NORM, HEAD)] == [[(0, EMBED)], [(1, NORM)], [(1, HEAD)]]


def test_the_config_says_how_many_layers_there_are() -> None:
    plan = planned(FRANKEN, a=header(4), b=header(3))
    assert plan.result.config == {"num_hidden_layers": 7}
    nested = {"text_config": {"num_hidden_layers": 4, "rope_theta": 1e6, "layer_types": ["x", "y", "x", "y"]}}
    other = {"text_config": {"num_hidden_layers": 3, "rope_theta": 1e6, "layer_types": ["x", "z", "z"]}}
    a, b = header(4), header(3)
    a.config.pop("num_hidden_layers"), b.config.pop("num_hidden_layers")  # type: ignore[attr-defined]
    a.config.update(nested), b.config.update(other)  # type: ignore[attr-defined]
    plan = planned(FRANKEN, a=a, b=b)
    assert plan.result.config == {
        "text_config.num_hidden_layers": 7,
        "text_config.layer_types": ["x", "y", "x", "z", "z", "x", "y"],
    }
    assert output_config(a.config, plan.result)["text_config"] == {
        "num_hidden_layers": 7,
        "layer_types": ["x", "y", "x", "z", "z", "x", "y"],
        "rope_theta": 1e6,
    }


def test_what_a_config_says_layer_by_layer_follows_the_layers() -> None:
    a = header(4, no_rope_layers=[1, 0, 1, 0], mlp_only_layers=[2], eos_token_id=[1, 2, 3, 4])
    b = header(3, no_rope_layers=[1, 1, 1], mlp_only_layers=[])
    assert planned(FRANKEN, a=a, b=b).result.config == {
        "num_hidden_layers": 7,
        "no_rope_layers": [1, 0, 1, 1, 1, 1, 0],
        "mlp_only_layers": [2, 5],
    }
    problems = check(parse(FRANKEN), {"a": a, "b": header(3)}).problems
    assert problems == ("no_rope_layers of b is not a list for each of its layers, as that of a is",)


def test_a_pattern_over_layers_is_a_warning() -> None:
    a, b = header(4, first_k_dense_replace=2, decoder_sparse_step=1, max_window_layers=3), header(3)
    assert check(parse(FRANKEN), {"a": a, "b": b}).warnings == (
        "first_k_dense_replace of a goes by the numbers of layers, which the slices change",
    )
    whole = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 4]}]}]"
    assert check(parse(whole), {"a": a}).warnings == ()


GRADIENTS = """
merge_method: linear
slices:
  - sources:
      - model: a
        layer_range: [0, 3]
        parameters: {weight: [{filter: layers.1., value: 8.0}, {value: [0.0, 1.0]}]}
      - {model: b, layer_range: [1, 4]}
    parameters: {weight: [1.0, 0.0]}
  - sources:
      - {model: b, layer_range: [0, 1], parameters: {weight: [3.0, 4.0]}}
      - {model: a, layer_range: [3, 4], parameters: {weight: [{filter: lm_head, value: 7.0}]}}
parameters: {weight: [5.0, 6.0], normalize: [{filter: layers.1., value: false}]}
"""


def test_gradients_run_over_the_layers_of_a_slice_and_filters_see_the_names_of_the_inputs() -> None:
    made = tensors(planned(GRADIENTS, a=header(4), b=header(4)))
    weights = {name: tensor.parameters["weight"] for name, tensor in made.items() if "q_proj" not in name}
    assert weights == {
        EMBED: (0.0, 1.0),
        "model.layers.0.mlp.up_proj.weight": (0.0, 1.0),
        "model.layers.1.mlp.up_proj.weight": (8.0, 0.5),
        "model.layers.2.mlp.up_proj.weight": (1.0, 0.0),
        "model.layers.3.mlp.up_proj.weight": (4.0, 6.0),
        NORM: (3.0, 5.0),
        HEAD: (3.0, 7.0),
    }
    assert [n for n, t in made.items() if not t.parameters["normalize"]] == [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]


def test_layers_of_one_model_are_merged_with_each_other() -> None:
    text = """
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: a, layer_range: [2, 4]}]
parameters: {t: 0.5}
"""
    plan = planned(text, a=header(4))
    assert len(plan.inputs) == 1
    assert taken(tensors(plan)["model.layers.1.mlp.up_proj.weight"]) == [
        (0, "model.layers.1.mlp.up_proj.weight"),
        (0, "model.layers.3.mlp.up_proj.weight"),
    ]
    assert taken(tensors(plan)[NORM]) == [(0, NORM), (0, NORM)]


def test_slices_start_from_bases_of_their_own() -> None:
    text = """
merge_method: task_arithmetic
base_model: a
slices:
  - sources: [{model: b, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]
  - base_model: b
    sources: [{model: b, layer_range: [1, 2]}, {model: a, layer_range: [2, 3]}]
parameters: {weight: 1.0}
"""
    plan = planned(text, a=header(3), b=header(3))
    made = tensors(plan)
    assert plan.inputs == (ModelId(sha256(b"b")), ModelId(sha256(b"a")))
    assert [o.source for o in made["model.layers.0.mlp.up_proj.weight"].operands] == [1, 0]
    assert [o.source for o in made["model.layers.1.mlp.up_proj.weight"].operands] == [0, 1]
    assert (plan.base, plan.result.donor) == (None, 1)


def test_a_slice_of_everything_is_a_merge_of_whole_models() -> None:
    whole = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: [0.0, 1.0]}"
    sliced = (
        "merge_method: linear\nparameters: {weight: [0.0, 1.0]}\n"
        "slices: [{sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]}]"
    )
    models = {"a": header(4), "b": header(4)}
    assert planned(whole, **models).digest == planned(sliced, **models).digest


def test_everything_that_slices_cannot_be_laid_from_is_a_problem() -> None:
    deeper = header(3)
    deeper.tensors.update({"model.layers.3.mlp.up_proj.weight": TensorInfo(dtype="F32", shape=(8, 8))})  # type: ignore[attr-defined]
    towers = header(4)
    towers.tensors.update({"vision.layers.0.mlp.weight": TensorInfo(dtype="F32", shape=(8, 8))})  # type: ignore[attr-defined]
    found = {
        "b has 2 layers: there is no layer_range [1, 3]": header(2),
        "b has layers beyond its 3, which no slice can place": deeper,
        "b has layers called model.layers.N, vision.layers.N: "
        "slices need one stack, named as the others'": towers,
    }
    for problem, b in found.items():
        assert check(parse(FRANKEN), {"a": header(4), "b": b}).problems == (problem,)


def test_layers_that_differ_are_told_with_their_names() -> None:
    narrow, other = header(4, width=4), header(4)
    del other.tensors["model.layers.1.self_attn.q_proj.weight"]  # type: ignore[attr-defined]
    other.tensors["model.layers.1.bias"] = TensorInfo(dtype="F32", shape=(8,))  # type: ignore[index]
    sliced = """
merge_method: linear
parameters: {weight: 1.0}
slices: [{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [1, 2]}]}]
"""
    assert check(parse(sliced), {"a": header(4), "b": other}).problems == (
        "b has the tensor model.layers.1.bias, which a lacks",
        "b lacks the tensor model.layers.1.self_attn.q_proj.weight, which a has",
    )
    assert (
        "the shapes of model.layers.0.mlp.up_proj.weight differ: "
        "a [8, 8], b (model.layers.1.mlp.up_proj.weight) [4, 4]"
    ) in check(parse(sliced), {"a": header(4), "b": narrow}).problems


def test_a_recipe_of_many_slices_is_bounded() -> None:
    sources = ", ".join("{sources: [{model: a, layer_range: [0, 400]}]}" for _ in range(300))
    problems = check(parse(f"merge_method: passthrough\nslices: [{sources}]"), {"a": header(400)}).problems
    assert problems == ("the slices have more than 100000 tensors together",)


# -- heads ---------------------------------------------------------------------------------------------------

LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1.0}"


def test_copies_of_a_tied_head_are_left_out_where_all_tie_it() -> None:
    models = {"a": header(1, tie_word_embeddings=True), "b": header(1, head=False)}
    plan = planned(LINEAR, **models)
    assert HEAD not in tensors(plan) and plan.result.config == {}


@pytest.mark.parametrize(("donor", "other"), [(True, False), (False, True)])
def test_one_model_that_stores_its_head_makes_the_others_give_their_embedding(
    donor: bool, other: bool
) -> None:
    a = header(1, head=not donor, tie_word_embeddings=donor)
    b = header(1, head=True, tie_word_embeddings=other)
    plan = planned(LINEAR, a=a, b=b)
    assert taken(tensors(plan)[HEAD]) == [(0, EMBED if donor else HEAD), (1, EMBED if other else HEAD)]
    assert output_config(a.config, plan.result)["tie_word_embeddings"] is False
    (warning,) = check(parse(LINEAR), {"a": a, "b": b}).warnings
    assert warning == (
        "lm_head.weight is stored, for not all tie it: "
        f"the embedding of {'a' if donor else 'b'} stands in for it"
    )


def test_a_nested_config_is_untied_where_it_says_so() -> None:
    a = header(1, head=False, text_config={"tie_word_embeddings": True})
    plan = planned(LINEAR, a=a, b=header(1, tie_word_embeddings=False))
    assert plan.result.config == {"text_config.tie_word_embeddings": False}


def test_a_model_that_neither_ties_nor_stores_its_head_lacks_it() -> None:
    models = {"a": header(1), "b": header(1, head=False, tie_word_embeddings=False)}
    assert check(parse(LINEAR), models).problems == ("b lacks the tensor lm_head.weight, which a has",)


# -- copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "operator", "dtype"),
    [
        ("", "copy", "BF16"),
        ("parameters: {scale: 1.0}\ndtype: bfloat16", "copy", "BF16"),
        ("parameters: {scale: 2.0}", "passthrough", "BF16"),
        ("dtype: float32", "passthrough", "F32"),
        ("dtype: float32\nout_dtype: bfloat16", "copy", "BF16"),
        ("dtype: bfloat16\nout_dtype: float16", "passthrough", "F16"),
    ],
)
def test_bytes_are_copied_where_nothing_is_computed(lines: str, operator: str, dtype: str) -> None:
    plan = planned(f"merge_method: passthrough\nmodels: [{{model: a}}]\n{lines}", a=header(1, dtype="BF16"))
    assert {(t.operator, t.dtype) for t in plan.tensors} == {(operator, dtype)}


# -- merges of merges ----------------------------------------------------------------------------------------

ROUNDS = """
name: soup
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1.0}
dtype: bfloat16
---
name: tall
merge_method: passthrough
slices:
  - sources: [{model: soup, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [1, 3]}]
---
merge_method: slerp
base_model: tall
slices:
  - sources: [{model: tall, layer_range: [1, 4]}, {model: b, layer_range: [0, 3]}]
parameters: {t: 0.5}
"""


def test_a_result_is_an_input_by_its_name() -> None:
    plan = planned(ROUNDS, a=header(3), b=header(3))
    assert len(plan.inputs) == 2 and [step.donor for step in plan.steps] == [0, 2, 3]
    assert [step.config for step in plan.steps] == [{}, {"num_hidden_layers": 4}, {"num_hidden_layers": 3}]
    assert taken(tensors(plan)["model.layers.0.mlp.up_proj.weight"]) == [
        (3, "model.layers.1.mlp.up_proj.weight"),
        (1, "model.layers.0.mlp.up_proj.weight"),
    ]
    assert plan.result.base == 3 and plan.base is None
    assert tensors(plan, 0)["model.layers.1.mlp.up_proj.weight"].dtype == "BF16"


def test_what_no_later_merge_takes_is_not_made() -> None:
    plan = planned(ROUNDS, a=header(3), b=header(3))
    assert sorted(tensors(plan, 0)) == [
        EMBED,
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]
    assert "model.layers.0.mlp.up_proj.weight" not in tensors(plan, 1)


def test_a_result_of_which_nothing_is_taken_is_a_problem() -> None:
    text = """
name: soup
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1.0}
---
merge_method: passthrough
base_model: soup
slices: [{sources: [{model: a, layer_range: [0, 1]}]}]
"""
    assert check(parse(text), {"a": header(3), "b": header(3)}).problems == (
        "soup: no tensor of its result is used",
    )


def test_problems_of_each_merge_are_told_with_its_name() -> None:
    with pytest.raises(Unmergeable) as raised:
        planned(ROUNDS, a=header(1), b=header(3, width=4))
    assert "soup: b has the tensor model.layers.1.mlp.up_proj.weight, which a lacks" in raised.value.problems
    assert check(parse(ROUNDS), {"a": header(3)}).problems == ("b was not found",)


def test_an_intermediate_result_is_checked_from_its_header_alone() -> None:
    text = ROUNDS.replace("layer_range: [1, 4]", "layer_range: [2, 5]")
    assert check(parse(text), {"a": header(3), "b": header(3)}).problems == (
        "tall has 4 layers: there is no layer_range [2, 5]",
    )


def test_reading_counts_what_is_computed_again() -> None:
    a, b = header(3), header(3)
    estimate = check(parse(ROUNDS), {"a": a, "b": b})
    plan = planned(ROUNDS, a=a, b=b)
    size = {name: info.length for name, info in a.tensors.items()}
    # Each tensor of `tall` that comes from `soup` costs a and b; slerp reads everything twice.
    once = 0
    for tensor in plan.tensors:
        tall = tensors(plan, 1)[tensor.operands[0].tensor]
        once += size[tensor.operands[1].tensor]
        once += size[tall.operands[0].tensor] * (2 if tall.operands[0].source == 2 else 1)
    assert estimate.read_bytes == 2 * once
    assert estimate.output_bytes == sum(t.info.length for t in plan.tensors)


# -- tokens --------------------------------------------------------------------------------------------------


def speaking(words: list[str], template: str = "", **header_fields: Any) -> ModelHeader:
    """A model of one layer with these words, and perhaps a chat template."""
    vocabulary = {word: number for number, word in enumerate(words)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": words[0]}
    made = header(1, vocab_size=len(words), **header_fields)
    tensors = dict(made.tensors)
    for name in {EMBED, HEAD} & tensors.keys():
        tensors[name] = TensorInfo(dtype="F32", shape=(len(words), 8))
    files = {
        "config.json": json.dumps(made.config).encode(),
        "tokenizer.json": json.dumps({"model": model, "added_tokens": []}).encode(),
    } | ({"chat_template.jinja": template.encode()} if template else {})
    return replace(made, tensors=tensors, contents=lambda: files)


TALK = """
name: soup
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1.0}
tokenizer_source: union
---
merge_method: passthrough
models: [{model: soup}]
chat_template: auto
"""


def test_embeddings_get_a_row_for_each_token_of_the_union() -> None:
    a, b = speaking(["?", "x", "y"], "A"), speaking(["?", "z"], "B", head=False, tie_word_embeddings=True)
    plan = planned(TALK, a=a, b=b)
    soup = plan.steps[0]
    assert soup.tokenizer is not None and soup.tokenizer.rows == 4
    assert soup.tokenizer.tensors == (HEAD, EMBED)
    assert soup.config == {"vocab_size": 4, "tie_word_embeddings": False}
    assert {t.name: t.shape for t in plan.tensors} == {t.name: t.shape for t in soup.tensors}
    assert tensors(plan)[EMBED].shape == tensors(plan)[HEAD].shape == (4, 8)
    assert plan.result.chat_template == "A"
    assert output_config(output_config(a.config, soup), plan.result)["vocab_size"] == 4


def test_without_a_choice_vocabularies_of_two_sizes_are_a_problem() -> None:
    text = TALK.replace("tokenizer_source: union\n", "")
    problems = check(parse(text), {"a": speaking(["?", "x", "y"]), "b": speaking(["?", "z"])}).problems
    assert problems == (
        f"soup: the shapes of {HEAD} differ: a [3, 8], b [2, 8]",
        f"soup: the shapes of {EMBED} differ: a [3, 8], b [2, 8]",
    )


def test_tokenizers_that_are_not_at_hand_are_a_problem() -> None:
    models = {"a": speaking(["?", "x", "y"]), "b": replace(speaking(["?", "z"]), contents=header(1).contents)}
    assert check(parse(TALK), models).problems[0] == "soup: b: its tokenizer is not here yet"


def test_tokens_of_a_result_follow_the_tensors_that_are_used_of_it() -> None:
    text = TALK.replace(
        "models: [{model: soup}]\nchat_template: auto",
        """slices:
  - sources: [{model: soup, layer_range: [0, 1]}]
  - sources: [{model: a, layer_range: [0, 1]}]
base_model: a""",
    )
    plan = planned(text, a=speaking(["?", "x"]), b=speaking(["?", "z"]))
    assert plan.steps[0].tokenizer is not None
    assert plan.steps[0].tokenizer.tensors == (EMBED,)


# -- lies --------------------------------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=20,
)


@given(
    st.dictionaries(st.sampled_from(KEYS), anything),
    st.dictionaries(st.sampled_from(KEYS), anything),
    st.dictionaries(st.sampled_from(NAMES), st.lists(st.integers(0, 9), max_size=3), max_size=8),
    st.sampled_from([FRANKEN, GRADIENTS, LINEAR, ROUNDS, TALK]),
)
@settings(deadline=None)
def test_whatever_a_model_claims_is_judged(
    config: dict[str, Any], other: dict[str, Any], shapes: dict[str, list[int]], text: str
) -> None:
    made = {name: TensorInfo(dtype="F32", shape=tuple(shape)) for name, shape in shapes.items()}
    a, b = header(4, **config), header(4, **other)
    for models in (
        {"a": a, "b": b},
        {"a": a, "b": replace(b, tensors=made)},
        {"a": replace(a, tensors=made), "b": b},
    ):
        if not check(parse(text), models).problems:
            planned(text, **models)


# -- what is published ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [FRANKEN, GRADIENTS, LINEAR, ROUNDS])
def test_a_recipe_tells_of_its_plan_and_of_no_other(text: str) -> None:
    models = {"a": header(4), "b": header(4)}
    ids = {name: str(sha256(name.encode())) for name in models}
    plan = planned(text, **models)
    told = parse(rename(parse(text), ids).to_yaml())
    assert tells_of(told, plan)
    swapped = rename(parse(text), {"a": ids["b"], "b": ids["a"]})
    assert not tells_of(swapped, plan)
    for other in {FRANKEN, GRADIENTS, LINEAR, ROUNDS} - {text}:
        assert not tells_of(rename(parse(other), ids), plan)


def test_a_recipe_of_very_many_layers_is_judged_at_once() -> None:
    plan = planned(FRANKEN, a=header(4), b=header(3))
    slices = ", ".join(
        f"{{sources: [{{model: '{i}', layer_range: [0, 1000000]}}]}}" for i in plan.inputs * 500
    )
    assert not tells_of(parse(f"merge_method: passthrough\nslices: [{slices}]"), plan)


def test_a_recipe_of_another_base_does_not_tell_of_the_plan() -> None:
    text = LINEAR.replace("linear", "task_arithmetic\nbase_model: a")
    models = {"a": header(1), "b": header(1)}
    ids = {name: str(sha256(name.encode())) for name in models}
    plan = planned(text, **models)
    assert tells_of(rename(parse(text), ids), plan)
    assert not tells_of(rename(parse(text.replace("base_model: a", "base_model: b")), ids), plan)


def test_a_recipe_of_other_settings_does_not_tell_of_the_plan() -> None:
    text = """merge_method: ties
base_model: a
models:
  - {model: b, parameters: {weight: 0.75, density: [{filter: mlp, value: [0.25, 0.5]}, {value: 1.0}]}}
parameters: {normalize: false}
dtype: bfloat16
"""
    models = {"a": header(3), "b": header(3)}
    ids = {name: str(sha256(name.encode())) for name in models}
    plan = planned(text, **models)
    assert tells_of(rename(parse(text), ids), plan)
    for said, other in (
        ("0.75", "0.5"),
        ("false", "true"),
        ("[0.25, 0.5]", "[0.25, 0.4]"),
        ("value: 1.0", "value: 0.9"),
        ("filter: mlp", "filter: attn"),
        ("parameters: {normalize: false}", "parameters: {normalize: false, lambda: 2}"),
        ("bfloat16", "float32"),
    ):
        assert said in text
        assert not tells_of(rename(parse(text.replace(said, other)), ids), plan), other


def test_a_plan_that_copies_what_the_recipe_merges_is_another() -> None:
    models = {"a": header(1), "b": header(1)}
    ids = {name: str(sha256(name.encode())) for name in models}
    plan = planned(LINEAR, **models)
    (step,) = plan.steps
    tensors = tuple(
        replace(tensor, operator="copy", operands=tensor.operands[:1], parameters={})
        for tensor in step.tensors
    )
    told = rename(parse(LINEAR), ids)
    assert tells_of(told, plan)
    assert not tells_of(told, replace(plan, steps=(replace(step, tensors=tensors),)))


def test_filters_without_number_tell_of_nothing() -> None:
    """Filters times names is what reading them takes."""
    filters = ", ".join(f"{{filter: no-{n}, value: 2}}" for n in range(1000))
    text = f"""merge_method: linear
models:
  - {{model: a, parameters: {{weight: [{filters}, {{value: 1}}]}}}}
  - {{model: b, parameters: {{weight: 1}}}}
"""
    models = {"a": header(1), "b": header(1)}
    ids = {name: str(sha256(name.encode())) for name in models}
    plan, told = planned(text, **models), rename(parse(text), ids)
    (step,) = plan.steps
    tensor = next(t for t in step.tensors if ".0." in t.name)
    operands = tuple(Operand(source=n, tensor="model.layers.0.up") for n in range(2))
    for count, judged in ((1_000, True), (20_000, False)):
        many = tuple(replace(tensor, name=f"model.layers.0.{n}", operands=operands) for n in range(count))
        assert tells_of(told, replace(plan, steps=(replace(step, tensors=many),))) is judged


def test_the_plan_of_a_frankenmerge_stays_what_it_is() -> None:
    text = """
name: halves
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}]
    parameters: {t: [{filter: mlp, value: [0.25, 0.75]}, {value: 0.5}]}
  - base_model: b
    sources: [{model: b, layer_range: [0, 1]}, {model: a, layer_range: [3, 4]}]
parameters: {t: 0.125}
dtype: bfloat16
---
merge_method: passthrough
slices:
  - sources: [{model: halves, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [1, 4], parameters: {scale: {filter: q_proj, value: 0.5}}}]
  - sources: [{model: halves, layer_range: [2, 3]}]
"""
    plan = planned(text, a=header(4, tie_word_embeddings=False), b=header(3, head=False))
    assert json.loads(GOLDEN.read_text()) == {"digest": plan.digest, "plan": json.loads(plan.to_bytes())}


def test_a_frankenmerge_opens_with_the_layers_that_its_config_states(
    save: Callable[..., Path], weights: Callable[..., torch.Tensor]
) -> None:
    names = [EMBED, NORM, *(f"model.layers.{n}.mlp.up_proj.weight" for n in range(3))]
    path = save("m", {name: weights(name, 8, 8) for name in names}, num_hidden_layers=3)
    text = """
merge_method: passthrough
slices:
  - sources: [{model: m, layer_range: [0, 2]}]
  - sources: [{model: m, layer_range: [1, 3]}]
"""
    with Checkpoint.open(path) as checkpoint:
        found = header_of(checkpoint)
    plan = planned(text, m=found)
    assert output_config(found.config, plan.result)["num_hidden_layers"] == 4
    assert [t.name for t in plan.tensors if "layers.3." in t.name] == ["model.layers.3.mlp.up_proj.weight"]
