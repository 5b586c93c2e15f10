"""Recipes: what is read as mergekit reads it, and what is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.errors import InvalidRecipe
from merge_core.recipe import parse, rename

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


def test_the_narrowest_scope_that_says_something_wins() -> None:
    recipe = parse(TIES)
    assert recipe.value("weight", "math", "model.norm.weight", 1.0) == 1.0
    assert recipe.value("weight", "code", "layers.0.self_attn.q_proj.weight", 0.0) == 0.25
    assert recipe.value("weight", "code", "layers.1.mlp.up_proj.weight", 0.75) == 0.75
    assert recipe.value("weight", "code", "model.norm.weight", 1.0) == 0.5
    assert recipe.value("density", "code", "model.norm.weight", 1.0) == 0.9
    assert recipe.value("lambda", None, "model.norm.weight", 1.0) == 1.0
    assert recipe.value("normalize", None, "model.norm.weight", 1.0) is False


def test_a_gradient_is_interpolated_over_depth() -> None:
    recipe = parse(TIES)
    assert [recipe.value("density", "math", "x", d) for d in (0.0, 0.5, 1.0)] == [0.2, 0.5, 0.8]


def test_the_base_comes_first_unless_it_is_listed() -> None:
    assert parse(TIES).models == ("math", "base", "code")
    assert parse(TIES).experts == ("math", "code")
    unlisted = parse(TIES.replace("  - model: base\n", ""))
    assert unlisted.models == ("base", "math", "code")
    assert unlisted.donor == "base"


def test_types_are_kept_by_their_safetensors_names() -> None:
    recipe = parse(TIES)
    assert (recipe.dtype, recipe.out_dtype, recipe.tokenizer) == ("F32", "BF16", "base")


def test_slerp_reads_a_slice_as_mergekit_writes_it() -> None:
    recipe = parse(SLERP)
    assert recipe.models == ("a", "b")
    assert recipe.inputs[0].layer_range == (0, 24)
    assert recipe.value("t", None, "layers.0.mlp.w", 0.0) == 0.25
    assert recipe.value("t", None, "layers.0.attn.w", 0.0) == 0.1


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


@pytest.mark.parametrize("text", [TIES, SLERP])
def test_writing_a_recipe_and_reading_it_gives_the_same(text: str) -> None:
    recipe = parse(text)
    assert parse(recipe.to_yaml()) == recipe


def test_references_become_model_ids() -> None:
    renamed = rename(parse(TIES), {"math": "sha256:" + "a" * 64, "base": "sha256:" + "b" * 64})
    assert renamed.models == ("sha256:" + "a" * 64, "sha256:" + "b" * 64, "code")
    assert renamed.donor == renamed.tokenizer == "sha256:" + "b" * 64
    assert "math" not in renamed.to_yaml()


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(InvalidRecipe) as raised:
        parse("""
merge_method: ties
models:
  - {model: a, parameters: {density: 0, weight: heavy, gamma: 1}}
  - {model: a}
  - {model: b+lora}
parameters: {normalize: 1, rescale: true}
dtype: float64
tokenizer_source: union
chat_template: auto
""")
    faults = raised.value.why.splitlines()
    for word in (
        "chat_template: not supported",
        "density is 0; it must be above 0 and at most 1",
        "weight: a number is needed",
        "gamma: not a setting of ties",
        "a is listed twice",
        "adapters (model+adapter) are not supported: b+lora",
        "normalize: true or false is needed",
        "rescale: not a setting of ties",
        "dtype float64: not supported",
        "tokenizer_source union: not supported",
        "ties needs a base_model",
    ):
        assert any(word in fault for fault in faults), word


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a recipe is a mapping"),
        ("- 1", "a recipe is a mapping"),
        ("merge_method: dare_ties\nmodels: [{model: a}]", "merge_method dare_ties: not supported"),
        ("models: [{model: a}]", "merge_method is missing"),
        ("merge_method: linear\nmodels: [{model: a, weight: 1}]", "weight: not supported"),
        ("merge_method: linear\nmodels: []", "a list of 1 to 64 models"),
        ("merge_method: linear", "either models or slices"),
        ("merge_method: linear\nmerge_method: linear\nmodels: [{model: a}]", "occurs twice"),
        ("merge_method: &x linear\nbase_model: *x\nmodels: [{model: a}]", "aliases"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]", "finite"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {normalize: true}}]",
            "holds for the whole merge",
        ),
        ("merge_method: linear\nbase_model: b\nmodels: [{model: a}]", "gives base_model no weight"),
        (
            "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: c}]",
            "exactly 1 model beside its base",
        ),
        ("merge_method: linear\nslices: [{sources: []}, {sources: []}]", "exactly one slice"),
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
        ("merge_method: 0x" + "f" * 800_000, "not supported"),
        ("merge_method: 1" + ":59" * 60_000, "not supported"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 010}}]", "a number is needed"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1:30}}]", "a number is needed"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 0x10}}]", "a number is needed"),
        ("merge_method: linear\nmodels: [{model: a}]\n" + "#" * 2**20, "at most"),
    ],
)
def test_what_cannot_be_merged_as_written_is_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidRecipe, match=r"(?s).*" + why.replace("(", r"\(")):
        parse(text)


@given(
    st.text(max_size=200) | st.from_regex(r"merge_method: (slerp|ties)\n(models|slices|parameters): .{0,60}")
)
@settings(deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        recipe = parse(text)
    except InvalidRecipe:
        return
    assert parse(recipe.to_yaml()) == recipe
