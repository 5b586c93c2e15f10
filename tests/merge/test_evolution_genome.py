"""The genome: every list of numbers is an ordinary recipe, and the plan of that recipe has those numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.checkpoint.layout import Role, place
from merge_core.checkpoint.source import TensorInfo
from merge_core.digest import ModelId, sha256
from merge_core.errors import InvalidRecipe, MergeCoreError, Unmergeable
from merge_core.evolution.genome import Gene, Genome, Shape
from merge_core.plan import MergePlan
from merge_core.recipe import parse
from merge_core.resolve import ModelHeader, draft

TASKS = """
merge_method: task_arithmetic
base_model: base
models:
  - {model: math, parameters: {weight: 0.75}}
  - {model: code, parameters: {weight: [0.0, 1.0]}}
parameters: {lambda: 0.5}
"""
TIES = """
merge_method: ties
base_model: base
models:
  - {model: math, parameters: {weight: 1.0, density: 0.25}}
  - {model: code}
parameters: {weight: 0.5, normalize: false}
dtype: bfloat16
"""
SLERP = """
merge_method: slerp
base_model: math
models: [{model: math}, {model: code}]
parameters:
  t:
    - {filter: self_attn, value: [0, 1]}
    - {value: 0.5}
"""
LINEAR = """
merge_method: linear
models:
  - {model: math, parameters: {weight: 0.25}}
  - {model: code, parameters: {weight: 0.75}}
"""


def header(layers: int, **config: Any) -> ModelHeader:
    """A small Llama: norms that are called after attention, an embedding and a head."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for layer in range(layers):
        inner = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "post_attention_layernorm")
        names += [f"model.layers.{layer}.{name}.weight" for name in inner]
    return ModelHeader(
        tensors={name: TensorInfo(dtype="F32", shape=(16, 8)) for name in sorted(names)},
        config={"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers}
        | config,
        files=(),
    )


def headers(layers: int) -> dict[str, ModelHeader]:
    return {name: header(layers) for name in ("base", "math", "code")}


def genome_of(text: str, layers: int, /, **shape: Any) -> Genome:
    return Genome.of(parse(text), headers(layers), Shape(**shape))


def plan_of(genome: Genome, values: Sequence[float], layers: int) -> MergePlan:
    """The plan of what a person would write to the disk and read again."""
    recipe = parse(genome.recipe(values).to_yaml())
    ids = {name: ModelId(sha256(name.encode())) for name in recipe.models}
    return draft(recipe, {name: header(layers) for name in recipe.models}).seal(ids)


def expected(
    genome: Genome, values: Sequence[float], tensor: str, parameter: str, layers: int
) -> list[float]:
    """What the genes say of a tensor, worked out from their names alone."""
    at, shape = place(tensor), genome.shape
    part, point = "rest", 0.0
    if shape.layers and at.layer is not None:
        if not shape.components:
            part = "layers"
        elif ".self_attn." in tensor or ".mlp." in tensor:
            part = "attention" if at.role is Role.ATTN else "mlp"
    group = 0
    if shape.groups:
        count = max(1, shape.layers)
        layer = at.layer if at.layer is not None else 0 if "embed" in tensor else layers - 1
        group = sum(layer >= layers * g // count for g in range(1, count))
    elif part != "rest" and shape.layers > 1:
        point = at.layer / (layers - 1) * (shape.layers - 1)
    found = []
    for expert in sorted({g.expert for g in genome.genes if g.parameter == parameter}, key=str):
        own = [
            round(value, 4)
            for g, value in zip(genome.genes, values, strict=True)
            if (g.parameter, g.group, g.part, g.expert) == (parameter, group, part, expert)
        ]
        low = min(int(point), len(own) - 1)
        high = min(low + 1, len(own) - 1)
        found.append(own[low] + (point - low) * (own[high] - own[low]))
    return found


def inner(gene: Gene, share: float) -> float:
    return max(gene.low, -2.0) + share * (min(gene.high, 2.0) - max(gene.low, -2.0))


SHAPES = st.builds(
    Shape,
    layers=st.integers(0, 4),
    groups=st.booleans(),
    components=st.booleans(),
    densities=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    text=st.sampled_from([TASKS, TIES, SLERP, LINEAR]),
    shape=SHAPES,
    layers=st.integers(4, 6),
    shares=st.lists(st.floats(0, 1), min_size=400, max_size=400),
)
def test_the_plan_of_a_genome_has_the_numbers_of_its_genes(
    text: str, shape: Shape, layers: int, shares: list[float]
) -> None:
    genome = Genome.of(parse(text), headers(layers), shape)
    values = [inner(gene, share) for gene, share in zip(genome.genes, shares, strict=False)]
    plan = plan_of(genome, values, layers)
    of = {tensor.name: tensor for step in plan.steps for tensor in step.tensors if tensor.parameters}
    assert len(of) == 3 + 4 * layers
    for parameter in {gene.parameter for gene in genome.genes}:
        for name, tensor in of.items():
            given_ = tensor.parameters[parameter]
            stated = list(given_) if isinstance(given_, tuple) else [given_]
            assert stated == pytest.approx(expected(genome, values, name, parameter, layers), abs=1e-12)
    assert "t" in of[name].parameters or "weight" in of[name].parameters


@pytest.mark.parametrize("text", [TASKS, TIES, LINEAR, SLERP])
@pytest.mark.parametrize("groups", [False, True])
def test_the_start_is_what_the_recipe_says(text: str, groups: bool) -> None:
    """With as many points as layers nothing that a recipe says of layers is lost."""
    layers = 3
    genome = genome_of(text, layers, layers=layers, groups=groups, densities=True)
    plan = plan_of(genome, genome.start, layers)
    wanted = draft(parse(text), headers(layers))
    assert plan.tensors[0].dtype == wanted.steps[0].tensors[0].dtype
    of = {tensor.name: tensor for step in plan.steps for tensor in step.tensors if tensor.parameters}
    for tensor in wanted.steps[0].tensors:
        if ".mlp." in tensor.name or ".self_attn." in tensor.name:
            assert of[tensor.name].parameters == tensor.parameters
            assert [o.tensor for o in of[tensor.name].operands] == [o.tensor for o in tensor.operands]


def test_the_found_recipe_is_a_start_that_gives_itself() -> None:
    genome = genome_of(TIES, 4, layers=2, densities=True)
    values = [inner(gene, 0.37 + 0.001 * i) for i, gene in enumerate(genome.genes)]
    found = genome.recipe(values)
    again = Genome.of(found, headers(4), genome.shape)
    assert again.recipe(again.start) == found
    assert parse(found.to_yaml()) == found


def test_one_number_for_each_expert_is_written_as_a_plain_weight() -> None:
    genome = genome_of(TASKS, 4)
    assert "weight: 0.25\n" in genome.recipe([0.25, 1.5]).to_yaml()
    assert "filter" not in genome.recipe([0.25, 1.5]).to_yaml()
    assert "lambda: 0.5" in genome.recipe([0.25, 1.5]).to_yaml()


def test_numbers_are_rounded_and_kept_within_their_bounds() -> None:
    genome = genome_of(TIES, 4, densities=True)
    wild = [1e9 if gene.parameter == "density" else 0.123456 for gene in genome.genes]
    (merge,) = genome.recipe(wild).merges
    assert [dict(item.parameters) for item in merge.slices[0].inputs] == [
        {"weight": 0.1235, "density": 1.0},
        {"weight": 0.1235, "density": 1.0},
    ]


def test_a_group_chooses_its_operator_and_the_layers_are_stacked() -> None:
    shape = {"layers": 2, "groups": True, "operators": ("task_arithmetic", "ties"), "densities": True}
    genome = genome_of(TASKS, 4, **shape)
    values = list(genome.start)
    assert {t.operator for s in plan_of(genome, values, 4).steps for t in s.tensors} == {
        "task_arithmetic",
        "copy",
    }
    for index, gene in enumerate(genome.genes):
        if gene.parameter == "operator" and gene.group == 1:
            values[index] = float(gene.expert or 0)
    plan = plan_of(genome, values, 4)
    by = {t.name: t.operator for step in plan.steps for t in step.tensors if t.parameters}
    for name, operator in by.items():
        layer = place(name).layer
        late = layer >= 2 if layer is not None else "embed" not in name
        assert operator == ("ties" if late else "task_arithmetic"), name
    assert len(plan.tensors) == len(header(4).tensors)


def test_the_heat_map_has_a_row_for_each_expert_and_a_column_for_each_layer() -> None:
    genome = genome_of(TASKS, 3, layers=2)
    values = [
        {"attention": 1.0, "mlp": 0.5, "rest": 9.0}[g.part] * (g.point + (g.expert or 0))
        for g in genome.genes
    ]
    assert genome.rows == ("math", "code")
    assert genome.weights(values) == [[0.0, 0.375, 0.75], [0.75, 1.125, 1.5]]
    slerp = genome_of(SLERP, 3, layers=3)
    assert slerp.rows == ("t",)
    assert slerp.weights(slerp.start) == [[0.25, 0.5, 0.75]]


@pytest.mark.parametrize(
    ("text", "shape", "why"),
    [
        (TASKS, {"layers": 5}, "5 points over the depth of a model with 4 layers"),
        (TASKS, {"layers": 2, "groups": True, "operators": ("linear",)}, "do not both start from a base"),
        (TASKS, {"layers": 2, "operators": ("ties",)}, "chosen for groups"),
        (TASKS + "---\n" + TASKS.replace("base_model", "name: x\nbase_model"), {}, "one merge"),
        (
            "merge_method: model_stock\nbase_model: base\nmodels: [{model: math}, {model: code}]\n",
            {},
            "no coefficients",
        ),
        (TASKS + "tokenizer_source: union\n", {"layers": 2, "groups": True}, "choice of tokens"),
        (TASKS + "tokenizer_source: code\n", {"layers": 2}, "choice of tokens"),
        (TASKS + "tokenizer: {source: union}\n", {}, "choice of tokens"),
    ],
)
def test_what_cannot_be_sought_is_refused_with_what_to_do(text: str, shape: dict[str, Any], why: str) -> None:
    if "---" in text:
        text = text.replace("{model: code, parameters: {weight: [0.0, 1.0]}}", "{model: x}", 1)
    with pytest.raises(InvalidRecipe, match=why) as caught:
        genome_of(text, 4, **shape)
    assert "{" not in str(caught.value)


def test_there_are_as_many_groups_as_a_recipe_has_room_for() -> None:
    genome = genome_of(TASKS, 70, layers=63, groups=True, components=False)
    assert parse(genome.recipe(genome.start).to_yaml()) == genome.recipe(genome.start)
    with pytest.raises(InvalidRecipe, match="64 groups of layers"):
        genome_of(TASKS, 70, layers=64, groups=True)


def test_names_that_say_nothing_are_refused() -> None:
    odd = {
        name: ModelHeader(
            tensors={f"layers.{n}.thing.weight": TensorInfo(dtype="F32", shape=(2, 2)) for n in range(2)},
            config={"architectures": ["Odd"], "num_hidden_layers": 2},
            files=(),
        )
        for name in ("base", "math", "code")
    }
    with pytest.raises(Unmergeable, match="attention") as caught:
        Genome.of(parse(TASKS), odd, Shape(layers=2))
    assert "--no-components" in caught.value.hint
    plain = Genome.of(parse(TASKS), odd, Shape(layers=2, components=False))
    assert {gene.part for gene in plain.genes} == {"layers"}


@pytest.mark.parametrize("layers", [1, 12])
def test_filters_are_found_in_the_names_of_other_architectures(layers: int) -> None:
    tails = ("attention.dense", "mlp.dense_h_to_4h", "post_attention_layernorm", "input_layernorm")
    names = [f"gpt_neox.layers.{n}.{tail}.weight" for n in range(layers) for tail in tails]
    names += ["gpt_neox.embed_in.weight", "embed_out.weight"]
    neox = ModelHeader(
        tensors={name: TensorInfo(dtype="F32", shape=(4, 4)) for name in sorted(names)},
        config={"architectures": ["GPTNeoXForCausalLM"], "num_hidden_layers": layers},
        files=(),
    )
    genome = Genome.of(parse(TASKS), dict.fromkeys(("base", "math", "code"), neox), Shape(layers=1))
    assert [part.filters for part in genome.parts] == [(".attention.",), (".mlp.",), ()]


@given(value=st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda v: st.lists(v, max_size=3)))
def test_a_shape_is_read_as_it_was_written_and_nothing_else(value: Any) -> None:
    shape = Shape(layers=3, groups=True, operators=("ties",))
    assert Shape.parse(shape.to_value()) == shape
    for wrong in (value, {**shape.to_value(), "layers": str(value)}, {**shape.to_value(), "more": value}):
        with pytest.raises((ValueError, MergeCoreError)):
            Shape.parse(wrong)
