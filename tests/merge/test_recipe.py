"""Recipes: what is read as mergekit reads it, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.errors import InvalidRecipe
from merge_core.recipe import Input, Merge, Recipe, Slice, parse, rename

TIES = """
merge_method: ties
base_model: base
models:
  - model: math
    parameters:
      weight: 1.0
      density: [0.2, 0.8]
  - model: base
  - model: code
    parameters:
      weight:
        - {filter: mlp, value: [0.0, 1.0]}
        - filter: self_attn
          value: 0.25
parameters:
  weight: 0.5
  density: 0.9
  normalize: false
  int8_mask: true
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
"""

SLERP = """
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 24]}
      - {model: b, layer_range: [0, 24]}
    parameters: {t: [{filter: mlp, value: 0.25}]}
parameters: {t: 1e-1}
"""

FRANKEN = """
merge_method: task_arithmetic
base_model: a
modules:
  default:
    parameters: {weight: 0.5, lambda: [0.0, 1.0]}
    slices:
      - sources:
          - {model: a, layer_range: [0, 4]}
          - {model: b, layer_range: [2, 6], parameters: {weight: {filter: layers.2., value: 3.0}}}
          - {model: b, layer_range: [4, 8]}
        parameters: {weight: [{filter: mlp, value: 2.0}]}
      - base_model: c
        sources:
          - {model: b, layer_range: [0, 1]}
          - {model: c, layer_range: [7, 8]}
parameters: {weight: 9.0, normalize: true}
"""

ROUNDS = """
merge_method: slerp
base_model: soup
models: [{model: soup}, {model: ./code}]
parameters: {t: 0.5}
---
name: unused-order
merge_method: linear
models: [{model: ./math}, {model: half, parameters: {weight: 2}}]
parameters: {weight: 1}
---
name: half
merge_method: passthrough
models: [{model: ./code, parameters: {scale: 0.5}}]
---
name: soup
merge_method: linear
models: [{model: ./rev, parameters: {weight: 1}}, {model: unused-order, parameters: {weight: 1}}]
"""


def only(text: str) -> Merge:
    """The merge of a recipe that has one."""
    (merge,) = parse(text).merges
    return merge


def said(text: str, name: str, at: int | None, tensor: str, depth: float, part: int = 0) -> Any:
    """The value of a setting for the input at a position, or for all."""
    merge = only(text)
    inputs = merge.slices[part].inputs
    return merge.value(name, merge.slices[part], None if at is None else inputs[at], tensor, depth)


def test_the_narrowest_scope_that_says_something_wins() -> None:
    assert said(TIES, "weight", 0, "model.norm.weight", 1.0) == 1.0
    assert said(TIES, "weight", 2, "layers.0.self_attn.q_proj.weight", 0.0) == 0.25
    assert said(TIES, "weight", 2, "layers.1.mlp.up_proj.weight", 0.75) == 0.75
    assert said(TIES, "weight", 2, "model.norm.weight", 1.0) == 0.5
    assert said(TIES, "density", 2, "model.norm.weight", 1.0) == 0.9
    assert said(TIES, "lambda", None, "model.norm.weight", 1.0) == 1.0
    assert said(TIES, "normalize", None, "model.norm.weight", 1.0) is False


def test_a_source_wins_over_its_slice_that_over_the_module_and_that_over_the_merge() -> None:
    assert said(FRANKEN, "weight", 1, "layers.2.mlp.w", 0.0) == 3.0
    assert said(FRANKEN, "weight", 1, "layers.3.mlp.w", 0.0) == 2.0
    assert said(FRANKEN, "weight", 2, "layers.2.mlp.w", 0.0) == 2.0
    assert said(FRANKEN, "weight", 2, "layers.4.attn.w", 0.0) == 0.5
    assert said(FRANKEN, "weight", 0, "layers.4.mlp.w", 0.0, part=1) == 0.5
    assert said(FRANKEN, "lambda", None, "layers.4.attn.w", 0.25) == 0.25
    assert said(FRANKEN, "normalize", None, "layers.4.attn.w", 0.25) is True


def test_a_gradient_is_interpolated_over_depth() -> None:
    assert [said(TIES, "density", 0, "x", d) for d in (0.0, 0.5, 1.0)] == [0.2, 0.5, 0.8]


def test_the_base_comes_first_unless_it_is_listed() -> None:
    assert parse(TIES).models == ("math", "base", "code")
    unlisted = parse(TIES.replace("  - model: base\n", ""))
    assert unlisted.models == ("base", "math", "code")
    (merge,) = unlisted.merges
    assert merge.donor == "base"
    assert [i.model for i in merge.operands(merge.slices[0])] == ["base", "math", "code"]


def test_a_base_that_no_operator_needs_is_merged_like_the_others() -> None:
    merge = only("merge_method: linear\nbase_model: b\nmodels: [{model: a}]\nparameters: {weight: 1.0}")
    assert [i.model for i in merge.operands(merge.slices[0])] == ["a", "b"]


def test_a_base_turns_a_method_that_has_two_formulas() -> None:
    text = "merge_method: nuslerp\nmodels: [{model: a}, {model: c}]\nparameters: {weight: 1.0}"
    plain, over = only(text), only(f"base_model: b\n{text}")
    assert plain.operator(plain.slices[0]).name == "nuslerp"
    assert over.operator(over.slices[0]).needs_base
    assert [i.model for i in over.operands(over.slices[0])] == ["b", "a", "c"]


def test_types_are_kept_by_their_safetensors_names() -> None:
    merge = only(TIES)
    assert (merge.dtype, merge.out_dtype, merge.name) == ("F32", "BF16", None)


def test_slerp_reads_a_slice_as_mergekit_writes_it() -> None:
    assert parse(SLERP).models == ("a", "b")
    assert [i.layers for i in only(SLERP).slices[0].inputs] == [(0, 24), (0, 24)]
    assert said(SLERP, "t", None, "layers.0.mlp.w", 0.0) == 0.25
    assert said(SLERP, "t", None, "layers.0.attn.w", 0.0) == 0.1


def test_each_slice_can_have_a_base_of_its_own() -> None:
    merge = only(FRANKEN)
    assert [merge.base_of(part) for part in merge.slices] == ["a", "c"]
    assert merge.models == ("a", "b", "c")
    first, second = (merge.operands(part) for part in merge.slices)
    assert [(i.model, i.layers) for i in first] == [("a", (0, 4)), ("b", (2, 6)), ("b", (4, 8))]
    assert [(i.model, i.layers) for i in second] == [("c", (7, 8)), ("b", (0, 1))]


def test_merges_come_after_those_whose_results_they_use_however_the_file_has_them() -> None:
    recipe = parse(ROUNDS)
    assert [merge.name for merge in recipe.merges] == ["half", "unused-order", "soup", None]
    assert recipe.models == ("./code", "./math", "./rev")
    assert recipe.methods == "passthrough → linear → slerp"
    documents = ROUNDS.split("---")
    assert parse("---".join(reversed(documents))) == recipe


def test_a_lone_merge_is_written_as_mergekit_reads_it() -> None:
    value = yaml.safe_load(parse(FRANKEN).to_yaml())
    assert value["modules"]["default"]["slices"][1]["base_model"] == "c"
    assert list(yaml.safe_load(parse(TIES).to_yaml()))[:3] == ["merge_method", "base_model", "models"]


@pytest.mark.parametrize("text", [TIES, SLERP, FRANKEN, ROUNDS])
def test_writing_a_recipe_and_reading_it_gives_the_same(text: str) -> None:
    recipe = parse(text)
    assert parse(recipe.to_yaml()) == recipe


def test_references_become_model_ids() -> None:
    renamed = rename(parse(TIES), {"math": "sha256:" + "a" * 64, "base": "sha256:" + "b" * 64})
    assert renamed.models == ("sha256:" + "a" * 64, "sha256:" + "b" * 64, "code")
    assert renamed.merges[0].donor == "sha256:" + "b" * 64
    assert "math" not in renamed.to_yaml()


def test_references_of_every_merge_are_renamed_but_not_the_names_of_results() -> None:
    renamed = rename(parse(ROUNDS), {"./code": "x", "./math": "y", "./rev": "z", "soup": "not this"})
    assert renamed.models == ("x", "y", "z")
    assert renamed.merges[-1].models == ("soup", "x")
    assert rename(renamed, {"x": "./code", "y": "./math", "z": "./rev"}) == parse(ROUNDS)


@pytest.mark.parametrize("target", ["./math", "soup"])
def test_two_references_do_not_become_one(target: str) -> None:
    with pytest.raises(InvalidRecipe, match="the same model"):
        rename(parse(ROUNDS), {"./code": target})


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(InvalidRecipe) as raised:
        parse("""
merge_method: ties
models:
  - {model: a, parameters: {density: -1, weight: heavy, gamma: 1}}
  - {model: a}
  - {model: b+lora}
parameters: {normalize: 2, epsilon: true}
dtype: float64
residual: auto
""")
    faults = raised.value.why.splitlines()
    for word in (
        "residual: not supported",
        "density is -1; it must be at least 0 and at most 1",
        "weight: a number is needed",
        "gamma: not a setting of ties",
        "a is listed twice",
        "adapters (model+adapter) are not supported: b+lora",
        "normalize: true or false is needed",
        "epsilon: not a setting of ties",
        "dtype float64: not supported",
        "ties needs a base_model",
    ):
        assert any(word in fault for fault in faults), word


@pytest.mark.parametrize(("spelled", "meant"), [("true", True), ("1.0", True), ("0", False), ("no", False)])
def test_a_flag_may_be_a_number(spelled: str, meant: bool) -> None:
    (merge,) = parse(
        f"merge_method: linear\nmodels: [{{model: a}}]\nparameters: {{normalize: {spelled}}}"
    ).merges
    assert merge.parameters["normalize"] is meant


@pytest.mark.parametrize("spelled", ["bfloat16", "torch.bfloat16"])
def test_a_type_is_read_as_torch_prints_it_too(spelled: str) -> None:
    (merge,) = parse(f"merge_method: passthrough\nmodels: [{{model: a}}]\ndtype: {spelled}").merges
    assert merge.dtype == "BF16"


KEYS = {
    "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]": [
        ("allow_crimes: true", "allow_crimes: not supported"),
        ("slices: []", "a recipe has either models or slices"),
        ("modules: {}", "a recipe has either models or slices"),
        ("dtype: int8", "dtype int8: not supported"),
        ("out_dtype: float8", "out_dtype float8: not supported"),
        ("name: ./soup", "name ./soup: a merge is called by letters"),
        ("name: soup", "every merge but the last has one"),
        ("parameters: {scale: 1}", "scale: not a setting of linear, which has weight, normalize"),
        ("normalize: false", "normalize is a setting of linear: write it under parameters"),
        ("dytpe: float16", "dytpe: not supported (is dtype meant?)"),
        ("merge_mehtod: slerp", "merge_mehtod: not supported (is merge_method meant?)"),
    ],
    "merge_method: passthrough": [
        (
            "slices: [{sources: [{model: a, layer_range: [0, 1]}], residual_weight: 1}]",
            "residual_weight: not",
        ),
        ("slices: [{sources: [{model: a, layer_range: [0, 1], scale: 1}]}]", r"sources[0]: scale: not"),
        ("slices: [{sources: [{model: a, layer_range: [1, 1]}]}]", "first < end"),
        ("slices: [{sources: [{model: a, layer_range: [0, 1000001]}]}]", "first < end"),
        ("slices: [{sources: [{model: a}]}]", "layer_range is a pair"),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 1]}], base_model: b}]",
            "b is not among the sources",
        ),
        ("slices: [{sources: []}]", "slices[0]: sources: a list of 1 to 64"),
        ("slices: []", "slices: a list of 1 to 1024"),
        ("slices: [a]", "slices[0]: a mapping with the key sources"),
        ("modules: {text_decoder: {models: [{model: a}]}}", "only the module default is supported"),
        ("modules: {default: {models: [{model: a}]}, vision: {}}", "modules: vision: not supported"),
        ("modules: {default: {models: [{model: a}], dtype: float16}}", "modules: default: dtype: not"),
        ("modules: {default: {}}", "a module has either models or slices"),
        ("models: [{model: a, layer_range: [0, 1]}]", "models[0]: layer_range: not supported"),
        ("models: [{model: a}, {model: b}]", "exactly 1 model; there are 2"),
    ],
    "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}": [
        (
            "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 2]}]}]",
            "slices[0]: every source needs as many layers as the others",
        ),
        (
            "slices: [{sources: [{model: c, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]}]",
            "slices[0]: slerp needs the layers of its base: list a under sources",
        ),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]}]",
            "slices[0]: a is listed twice",
        ),
        ("models: [{model: b}, {model: c}]", "exactly 1 model beside its base"),
    ],
}


@pytest.mark.parametrize(("text", "line", "why"), [(t, *case) for t, cases in KEYS.items() for case in cases])
def test_every_key_that_is_not_read_is_named(text: str, line: str, why: str) -> None:
    with pytest.raises(InvalidRecipe) as raised:
        parse(f"{text}\n{line}")
    assert why in raised.value.why


LINEAR = "merge_method: linear\nparameters: {weight: 1}\n"


CROWD = {
    name: f"name: {name}\nmodels: [{', '.join(f'{{model: {name}{n}}}' for n in range(33))}]" for name in "xy"
}


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["models: [{model: a}]", "models: [{model: b}]"], "2 of 2 have none"),
        (["name: x\nmodels: [{model: a}]", "name: y\nmodels: [{model: x}]"], "0 of 2 have none"),
        (["name: x\nmodels: [{model: a}]", "models: [{model: b}]"], "x: no merge that counts uses it"),
        (
            ["name: x\nmodels: [{model: y}]", "name: y\nmodels: [{model: x}]", "models: [{model: x}]"],
            "merges go in a circle: x -> y -> x",
        ),
        (["name: x\nmodels: [{model: x}]", "models: [{model: x}]"], "merges go in a circle: x -> x"),
        (
            ["name: x\nmodels: [{model: a}]", "name: x\nmodels: [{model: b}]", "models: [{model: x}]"],
            "two merges are called x",
        ),
        (["name: ../x\nmodels: [{model: a}]", "models: [{model: ../x}]"], "name ../x: a merge is called by"),
        (["name: x\nmodels: [{model: a}]\ncolour: 1", "models: [{model: x}]"], "x: colour: not supported"),
        (["models: [{model: x}]\ncolour: 1", "name: x\nmodels: [{model: a}]"], "merge 1: colour: not"),
        (["models: [{model: a}]"] * 65, "65 merges; at most 64"),
        ([*CROWD.values(), "models: [{model: x}, {model: y}]"], "66 models; at most 65"),
    ],
)
def test_merges_that_make_no_graph_are_refused(texts: list[str], why: str) -> None:
    with pytest.raises(InvalidRecipe) as raised:
        parse("---\n".join(f"{LINEAR}{text}\n" for text in texts))
    assert why in raised.value.why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a recipe is a mapping"),
        ("- 1", "a recipe is a mapping"),
        ("merge_method: soup\nmodels: [{model: a}]", "merge_method soup: not supported"),
        ("models: [{model: a}]", "merge_method is missing"),
        ("merge_method: linear\nmodels: [{model: a, weight: 1}]", "weight: not supported"),
        ("merge_method: linear\nmodels: []", "a list of 1 to 64 models"),
        ("merge_method: linear", "either models or slices"),
        ("merge_method: linear\nmerge_method: linear\nmodels: [{model: a}]", "occurs twice"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]", "finite"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {normalize: true}}]",
            "holds for the whole merge",
        ),
        ("merge_method: linear\nbase_model: b\nmodels: [{model: a}]", "gives base_model no weight"),
        ("merge_method: linear\nmodels: [{model: {path: a}}]", "one line of text"),
        ("merge_method: !!python/object/apply:os.getpid []", "not YAML"),
        ("{" * 1000, "not YAML"),
        ("merge_method: !!bool x", "not YAML: tags"),
        ("merge_method: !!int ''", "not YAML: tags"),
        ("merge_method: !!timestamp x", "not YAML: tags"),
        ("merge_method: ! x", "not YAML: tags"),
        ('merge_method: "\\ud800"', "not YAML"),
        ('merge_method: "\\UFFFFFFFF"', "not YAML"),
        ("? [a]\n: 1", "not YAML: a key that is not text"),
        ("merge_method: linear\n\tmodels: []", "that cannot start any token, line 2, column 1"),
        ("merge_method: 0x" + "f" * 800_000, "not supported"),
        ("merge_method: 1" + ":59" * 60_000, "not supported"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 010}}]", "a number is needed"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1:30}}]", "a number is needed"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 0x10}}]", "a number is needed"),
        ("merge_method: linear\nmodels: [{model: a}]\n" + "#" * 2**20, "at most"),
    ],
)
def test_what_cannot_be_merged_as_written_is_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidRecipe) as raised:
        parse(text)
    assert why in raised.value.why


@given(
    st.text(max_size=200)
    | st.from_regex(r"merge_method: (slerp|ties)\n(models|slices|modules|parameters): .{0,60}")
)
@settings(deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        recipe = parse(text)
    except InvalidRecipe:
        return
    assert parse(recipe.to_yaml()) == recipe


numbers = st.floats(-100, 100)
plain = numbers | st.lists(numbers, min_size=1, max_size=3)
entries = st.fixed_dictionaries({"value": plain}, optional={"filter": st.sampled_from(["mlp", "*", "attn"])})
weights = plain | entries | st.lists(entries, min_size=1, max_size=3)
scopes = st.fixed_dictionaries({}, optional={"weight": weights})
top = st.fixed_dictionaries({"weight": weights}, optional={"normalize": st.booleans()})


@st.composite
def documents(draw: st.DrawFn, models: list[str]) -> dict[str, Any]:
    """One merge by linear, of whole models or of slices, over some of these models and all of the last."""
    chosen = [*draw(st.lists(st.sampled_from(models), unique=True)), models[-1]]
    chosen = list(dict.fromkeys(chosen))
    value: dict[str, Any] = {"merge_method": "linear", "parameters": draw(top)}
    value |= draw(
        st.fixed_dictionaries({}, optional={"dtype": st.just("float16"), "out_dtype": st.just("bfloat16")})
    )
    if draw(st.booleans()):
        made: dict[str, Any] = {"models": [{"model": m, "parameters": draw(scopes)} for m in chosen]}
    else:
        made = {"slices": draw(st.lists(slices(chosen), min_size=1, max_size=3))}
    if draw(st.booleans()):
        value["base_model"] = draw(st.sampled_from(chosen))
    value |= draw(tokens(chosen))
    if draw(st.booleans()):
        return value | {"modules": {"default": made | {"parameters": draw(scopes)}}}
    return value | made


def tokens(models: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """What a recipe says of tokens and chat templates."""
    source = st.sampled_from(["union", "base", *models])
    row = st.sampled_from(
        [{"kind": "zero"}, models[0], {"kind": "model_token", "model": models[0], "token_id": 3}]
    )
    rule = st.fixed_dictionaries({"source": row}, optional={"force": st.booleans()})
    rules = st.dictionaries(st.sampled_from(["<s>", "ÿ", "yes"]), rule, max_size=2)
    chosen = st.fixed_dictionaries(
        {"source": source, "tokens": rules}, optional={"pad_to_multiple_of": st.just(8)}
    )
    plain = st.fixed_dictionaries({}, optional={"tokenizer_source": source, "chat_template": st.just("auto")})
    return plain | st.fixed_dictionaries({"tokenizer": chosen})


@st.composite
def slices(draw: st.DrawFn, models: list[str]) -> dict[str, Any]:
    length = draw(st.integers(1, 9))
    sources = []
    for start, model in enumerate(models):
        sources.append({"model": model, "layer_range": [start, start + length], "parameters": draw(scopes)})
    base = {"base_model": draw(st.sampled_from(models))} if draw(st.booleans()) else {}
    return {"sources": sources, "parameters": draw(scopes)} | base


@st.composite
def files(draw: st.DrawFn) -> str:
    """Merges of which each uses the one before."""
    models, texts = ["./a", "b-1", "peer://x/y", "ÿ y"], []
    rounds = draw(st.integers(0, 2))
    for number in range(rounds + 1):
        name = {"name": f"round-{number}"} if number < rounds else {}
        texts.append(json.dumps(draw(documents(models)) | name, ensure_ascii=False) + "\n")
        models = [*models, f"round-{number}"]
    return "---\n".join(texts)


@given(files())
@settings(deadline=None)
def test_a_recipe_is_the_same_after_writing_and_reading(text: str) -> None:
    recipe = parse(text)
    assert parse(recipe.to_yaml()) == recipe
    back = {f"id {number}": model for number, model in enumerate(recipe.models)}
    assert rename(rename(recipe, {v: k for k, v in back.items()}), back) == recipe


def test_values_that_say_the_same_are_equal() -> None:
    made = Recipe(merges=(Merge(method="linear", slices=(Slice(inputs=(Input(model="a"),)),)),))
    assert parse("merge_method: linear\nmodels: [{model: a}]") == made
