"""Candidates in memory: the bits of a merge that was written to the disk and loaded again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from merge_core import execute
from merge_core.checkpoint import merkle
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure
from merge_core.checkpoint.writer import CheckpointWriter
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.evaluation.loading import load_model
from merge_core.evaluation.tasks import Item, Metric, Task
from merge_core.evolution import candidates
from merge_core.evolution.candidates import LiveModel
from merge_core.evolution.evaluator import Evaluator, Model
from merge_core.evolution.fitness import BROKEN
from merge_core.evolution.genome import Genome, Shape
from merge_core.evolution.journal import Question
from merge_core.evolution.mapped import MappedSource
from merge_core.execute import Material
from merge_core.functional import result_files
from merge_core.operators import METHODS
from merge_core.plan import MergePlan
from merge_core.recipe import Recipe, parse
from merge_core.resolve import draft, header_of

MODELS = ("base", "math", "code")
TASKS = """
merge_method: METHOD
base_model: base
models:
  - {model: math, parameters: {weight: 0.75}}
  - {model: code, parameters: {weight: 0.5}}
"""
SLERP = """
merge_method: slerp
base_model: math
models: [{model: math}, {model: code}]
parameters: {t: 0.3}
"""
REVERSE = Task(
    name="reverse",
    metric=Metric.EXACT_MATCH,
    items=tuple(Item(prompt=f"{a}{b}=", answer=f"{b}{a}") for a in "abcdefgh" for b in "abcdefgh"),
)


@pytest.fixture(scope="module")
def folder(llamas: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llamas")
    llamas(made)
    return made


@pytest.fixture
def models(folder: Path) -> Iterator[dict[str, Model]]:
    """The three models, their weights mapped."""
    with ExitStack() as stack:
        yield {name: opened(stack, folder / name) for name in MODELS}


def opened(stack: ExitStack, directory: Path) -> Model:
    checkpoint = stack.enter_context(Checkpoint.open(directory))
    found = measure(checkpoint)
    return Model(
        header=header_of(checkpoint),
        model_id=found.manifest.model_id,
        material=Material(tensors=MappedSource(checkpoint, found.leaves), files=checkpoint.functional_files),
        directory=directory,
    )


def planned(recipe: Recipe, models: Mapping[str, Model]) -> tuple[MergePlan, list[Material]]:
    known = {name: models[name] for name in recipe.models}
    drafted = draft(recipe, {name: model.header for name, model in known.items()})
    plan = drafted.seal({name: model.model_id for name, model in known.items()})
    return plan, [model.material for model in known.values()]


def written(plan: MergePlan, inputs: list[Material], target: Path) -> Any:
    """The model that a merge on the disk is, loaded as anybody loads it."""
    execute.run(plan, inputs, target, journal=target.with_suffix(".journal"))
    with CheckpointWriter.create(target, plan.layout) as writer:
        for name, data in result_files(plan, [item.files for item in inputs]).items():
            writer.add_file(name, data)
        writer.commit()
    return load_model(target)


def bits(model: Any) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in model.state_dict().items()
    }


SHAPES = {
    "one number for each expert": Shape(),
    "smooth over the depth": Shape(layers=2, densities=True),
    "an operator for each group": Shape(layers=2, groups=True, operators=("task_arithmetic", "ties", "sce")),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "breadcrumbs"])
def test_a_candidate_has_the_bits_of_the_merge_that_is_written_and_loaded(
    folder: Path, models: dict[str, Model], tmp_path: Path, method: str, shape: str, dtype: str
) -> None:
    recipe = parse(TASKS.replace("METHOD", method) + f"dtype: {dtype}\n")
    genome = Genome.of(recipe, {name: model.header for name, model in models.items()}, SHAPES[shape])
    draw = np.random.default_rng(7)
    values = [gene.start + 0.2 * draw.standard_normal() for gene in genome.genes]
    plan, inputs = planned(genome.recipe(values), models)
    live = LiveModel(load_model(folder / "base"))
    before = bits(live.model)
    assert live.fill(plan, inputs)
    assert bits(live.model) == bits(written(plan, inputs, tmp_path / "written")) != before


def test_the_bits_of_slerp_too(folder: Path, models: dict[str, Model], tmp_path: Path) -> None:
    plan, inputs = planned(parse(SLERP), models)
    live = LiveModel(load_model(folder / "base"))
    assert live.fill(plan, inputs)
    assert bits(live.model) == bits(written(plan, inputs, tmp_path / "written"))


def test_a_candidate_leaves_nothing_behind_in_the_next_one(folder: Path, models: dict[str, Model]) -> None:
    recipes = [parse(TASKS.replace("METHOD", "ties") + f"parameters: {{density: {d}}}\n") for d in (0.1, 0.9)]
    live, found = LiveModel(load_model(folder / "base")), []
    for recipe in (*recipes, *recipes[::-1]):
        assert live.fill(*planned(recipe, models))
        found.append(bits(live.model))
    assert found[0] == found[3] != found[1] == found[2]


REMEMBERED = [
    name for name, found in METHODS.items() if found.measure and found.unmeasured and not found.chance
]


@pytest.mark.parametrize("method", REMEMBERED)
def test_what_was_measured_for_one_candidate_serves_the_next(
    folder: Path, models: dict[str, Model], tmp_path: Path, method: str
) -> None:
    text = TASKS.replace("METHOD", method)
    settings = (
        "{density: 0.5, rescale: true, lambda: 0.5}",
        "{density: 0.5, rescale: true, normalize: true}",
    )
    recipes = [
        parse(f"{text.replace('0.75', weight)}parameters: {said}\n")
        for weight, said in zip(("0.75", "-2.0"), settings, strict=True)
    ]
    live = LiveModel(load_model(folder / "base"))
    for number, recipe in enumerate(recipes):
        plan, inputs = planned(recipe, models)
        assert live.fill(plan, inputs)
        assert bits(live.model) == bits(written(plan, inputs, tmp_path / f"written-{number}"))


@pytest.mark.parametrize("room", [1 << 20, 20_000, 0])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_densities_that_are_looked_up_give_the_bits_of_those_that_are_counted(
    folder: Path,
    models: dict[str, Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    room: int,
) -> None:
    monkeypatch.setattr(candidates, "_MOST_ORDERED", room)
    live = LiveModel(load_model(folder / "base"))
    for number, density in enumerate((0.5, 0.31, 0.9, 0.05)):
        text = f"{TASKS.replace('METHOD', method)}parameters: {{density: {density}}}\n"
        plan, inputs = planned(parse(text), models)
        assert live.fill(plan, inputs)
        assert bits(live.model) == bits(written(plan, inputs, tmp_path / f"written-{number}"))


def test_candidates_of_any_form_follow_each_other(
    folder: Path, models: dict[str, Model], tmp_path: Path
) -> None:
    plain, turned = TASKS.replace("METHOD", "task_arithmetic"), TASKS.replace("METHOD", "ties")
    turned = turned.replace("math", "other").replace("code", "math").replace("other", "code")
    recipes = [plain, plain.replace("0.75", "-0.25"), turned, SLERP, plain + "dtype: bfloat16\n", plain]
    live = LiveModel(load_model(folder / "base"))
    for number, text in enumerate(recipes):
        plan, inputs = planned(parse(text), models)
        assert live.fill(plan, inputs)
        assert bits(live.model) == bits(written(plan, inputs, tmp_path / f"written-{number}"))


def test_parameters_may_get_other_memory_between_candidates(folder: Path, models: dict[str, Model]) -> None:
    plan, inputs = planned(parse(TASKS.replace("METHOD", "task_arithmetic")), models)
    live = LiveModel(load_model(folder / "base"))
    assert live.fill(plan, inputs)
    first = bits(live.model)
    for parameter in live.model.parameters():
        parameter.data = torch.zeros_like(parameter.data)
    assert live.fill(plan, inputs)
    assert bits(live.model) == first


def test_a_model_that_is_written_to_makes_no_more_candidates(folder: Path, tmp_path: Path) -> None:
    for name in MODELS:
        shutil.copytree(folder / name, tmp_path / name)
    with ExitStack() as stack:
        models = {name: opened(stack, tmp_path / name) for name in MODELS}
        plan, inputs = planned(parse(TASKS.replace("METHOD", "task_arithmetic")), models)
        live = LiveModel(load_model(tmp_path / "base"))
        assert live.fill(plan, inputs)
        with (tmp_path / "code" / "model.safetensors").open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\x3f")
        with pytest.raises(CorruptCheckpoint, match="written to while"):
            live.fill(plan, inputs)


def test_the_models_of_a_recipe_are_not_written_to(folder: Path, models: dict[str, Model]) -> None:
    before = {name: (folder / name / "model.safetensors").read_bytes() for name in MODELS}
    live = LiveModel(load_model(folder / "math"))
    copied = parse("merge_method: passthrough\nmodels: [{model: code}]\n")
    assert live.fill(*planned(copied, models))
    assert (
        bits(live.model)["model.norm.weight"]
        == load_file(folder / "code" / "model.safetensors")["model.norm.weight"].tobytes()
    )
    for parameter in live.model.parameters():
        parameter.data.zero_()
    assert before == {name: (folder / name / "model.safetensors").read_bytes() for name in MODELS}


def test_infinity_makes_no_candidate(folder: Path, models: dict[str, Model]) -> None:
    recipe = parse(
        TASKS.replace("METHOD", "task_arithmetic") + "parameters: {lambda: 1.0e+18}\ndtype: float16\n"
    )
    assert not LiveModel(load_model(folder / "base")).fill(*planned(recipe, models))


def test_a_merge_of_another_kind_of_model_is_refused(
    folder: Path, models: dict[str, Model], tmp_path: Path
) -> None:
    shutil.copytree(folder / "base", tmp_path / "untied")
    tensors = load_file(folder / "base" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, tmp_path / "untied" / "model.safetensors")
    config = json.loads((folder / "base" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "untied" / "config.json").write_text(json.dumps(config))
    with ExitStack() as stack:
        untied = opened(stack, tmp_path / "untied")
        plan, inputs = planned(
            parse(
                "merge_method: linear\nmodels: [{model: untied, parameters: {weight: 1}}, "
                "{model: math, parameters: {weight: 1}}]\n"
            ),
            {**models, "untied": untied},
        )
        assert "lm_head.weight" in {tensor.name for tensor in plan.tensors}
        with pytest.raises(Unmergeable, match="the merge makes another kind of model"):
            LiveModel(load_model(folder / "base")).fill(plan, inputs)


# -- where they are read from ------------------------------------------------------------------------


def test_mapped_bytes_are_those_that_are_read(folder: Path) -> None:
    with Checkpoint.open(folder / "math") as checkpoint:
        leaves = measure(checkpoint).leaves
        mapped, plain = MappedSource(checkpoint, leaves), VerifiedSource(checkpoint, leaves)
        assert mapped.tensors == plain.tensors
        for name in mapped.tensors:
            length = mapped.tensors[name].length
            assert mapped.read(name, 0, length) == plain.read(name, 0, length)
            with pytest.raises(ValueError, match="bytes 4 to"):
                mapped.read(name, 4, length)


def test_several_leaves_and_bytes_that_lie_askew_are_read_alike(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "large")
    tensors = {"a": np.arange(7, dtype=np.uint8), "b": np.arange(600_000, dtype=np.float32)}
    save_file(tensors, tmp_path / "large" / "model.safetensors")
    path = tmp_path / "large" / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    path.write_bytes((size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :])
    with Checkpoint.open(tmp_path / "large") as checkpoint:
        source = MappedSource(checkpoint, measure(checkpoint).leaves)
        whole = tensors["b"].tobytes()
        assert source.read("b", 8, merkle.LEAF_SIZE) == whole[8 : 8 + merkle.LEAF_SIZE]
        assert source.read("b", 0, len(whole)) == whole
        assert np.frombuffer(source.read("b", 0, len(whole)), np.float32).ctypes.data % 4 == 0


def test_bytes_that_are_not_those_of_the_leaf_table_are_refused(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder / "math", tmp_path / "math")
    with Checkpoint.open(tmp_path / "math") as checkpoint:
        leaves = measure(checkpoint).leaves
        source = MappedSource(checkpoint, leaves)
        path = tmp_path / "math" / "model.safetensors"
        with path.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\x7f")
        with pytest.raises(CorruptCheckpoint, match="written to while"):
            source.read("model.norm.weight", 0, 1)
        with pytest.raises(CorruptCheckpoint, match="not what was published"):
            MappedSource(checkpoint, leaves)
        stamps = set(checkpoint.stamps.values())
    with (
        Checkpoint.open(tmp_path / "math") as changed,
        pytest.raises(CorruptCheckpoint, match="not what was published"),
    ):
        MappedSource(changed, leaves, hashed=stamps)


# -- what they are asked -----------------------------------------------------------------------------


def test_an_evaluator_reads_what_scoring_the_written_model_gives(
    folder: Path, models: dict[str, Model], tmp_path: Path
) -> None:
    from merge_core.evaluation.loading import load_tokenizer
    from merge_core.evaluation.scoring import score

    recipe = parse(TASKS.replace("METHOD", "task_arithmetic"))
    genome = Genome.of(recipe, {name: model.header for name, model in models.items()}, Shape(layers=3))
    evaluator = Evaluator(genome, models, [REVERSE], seed=0)
    (reading,) = evaluator.read(Question(share=1.0, values=genome.start))
    plan, inputs = planned(genome.recipe(genome.start), models)
    found = score(written(plan, inputs, tmp_path / "written"), load_tokenizer(folder / "base"), REVERSE)
    assert reading.loss == pytest.approx(sum(found.losses) / sum(found.bytes), rel=1e-9)
    assert reading.right == found.value
    (base,) = evaluator.read(Question(share=1.0, model="base"))
    alone = score(load_model(folder / "base"), load_tokenizer(folder / "base"), REVERSE)
    assert base.loss == pytest.approx(sum(alone.losses) / sum(alone.bytes), rel=1e-9)
    (less,) = evaluator.read(Question(share=0.5, values=genome.start))
    assert less != reading
    assert evaluator.read(Question(share=1.0, values=genome.start)) == (reading,)


def test_a_candidate_that_computes_no_numbers_is_broken(models: dict[str, Model]) -> None:
    recipe = parse(
        TASKS.replace("METHOD", "task_arithmetic") + "parameters: {lambda: 1.0e+18}\ndtype: float16\n"
    )
    genome = Genome.of(recipe, {name: model.header for name, model in models.items()}, Shape())
    evaluator = Evaluator(genome, models, [REVERSE], seed=0)
    assert evaluator.read(Question(share=1.0, values=(8.0, 8.0))) == (BROKEN,)
    (sound,) = evaluator.read(Question(share=1.0, values=(0.0, 0.0)))
    (base,) = evaluator.read(Question(share=1.0, model="base"))
    assert sound.loss == pytest.approx(base.loss, rel=1e-3)


def test_values_that_an_operator_does_not_take_together_are_broken(models: dict[str, Model]) -> None:
    genome = Genome.of(
        parse(TASKS.replace("METHOD", "della") + "parameters: {density: 0.5, epsilon: 0.2}\n"),
        {name: model.header for name, model in models.items()},
        Shape(densities=True),
    )
    evaluator = Evaluator(genome, models, [REVERSE], seed=0)
    assert evaluator.read(Question(share=1.0, values=(0.95, 0.5, 1.0, 1.0))) == (BROKEN,)
    assert evaluator.read(Question(share=1.0, values=genome.start)) != (BROKEN,)


def test_a_recipe_that_says_more_than_genes_can_is_asked_as_it_stands(
    folder: Path, models: dict[str, Model], tmp_path: Path
) -> None:
    from merge_core.evaluation.loading import load_tokenizer
    from merge_core.evaluation.scoring import score

    by_name = "[{filter: q_proj, value: 0.2}, {filter: v_proj, value: 0.9}, {value: 0.5}]"
    recipe = parse(
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
        f"  - {{model: math, parameters: {{weight: {by_name}}}}}\n"
        "  - {model: code, parameters: {weight: [0, 1]}}\n"
    )
    genome = Genome.of(recipe, {name: model.header for name, model in models.items()}, Shape())
    evaluator = Evaluator(genome, models, [REVERSE], seed=0)
    plan, inputs = planned(recipe, models)
    found = score(written(plan, inputs, tmp_path / "written"), load_tokenizer(folder / "base"), REVERSE)
    (reading,) = evaluator.read(Question(share=1.0))
    assert reading.loss == pytest.approx(sum(found.losses) / sum(found.bytes), rel=1e-9)
    assert evaluator.read(Question(share=1.0, values=genome.start)) != (reading,)


def test_text_that_the_tokenizer_cannot_spell_is_told_at_once(models: dict[str, Model]) -> None:
    genome = Genome.of(
        parse(TASKS.replace("METHOD", "task_arithmetic")),
        {name: model.header for name, model in models.items()},
        Shape(),
    )
    strange = Task(name="strange", metric=Metric.EXACT_MATCH, items=(Item(prompt="a=", answer="ü"),))
    with pytest.raises(Unmergeable, match="the tokenizer"):
        Evaluator(genome, models, [strange], seed=0)
    assert torch.get_num_threads() == 1
