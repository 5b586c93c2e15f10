"""Merges of models with different tokens: every row where its token wants it, however the merge is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer

from merge_core.checkpoint import merkle
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure
from merge_core.checkpoint.writer import CheckpointWriter
from merge_core.digest import ModelId, sha256
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.execute import Material, leaf, run
from merge_core.functional import result_files
from merge_core.memory import CHUNK_ELEMENTS
from merge_core.operators import COPY
from merge_core.plan import MergePlan, Operand, Step, TensorPlan
from merge_core.recipe import parse, rename
from merge_core.resolve import check, draft, header_of, tells_of
from merge_core.resolve.header import absent
from merge_core.tokenizer import choice as choices
from merge_core.tokenizer.resolve import config_changes, settle

Train = Callable[..., dict[str, bytes]]
Matrix = NDArray[np.float32]

ENGLISH = "the cat sat on the mat and the other cat ran to the hat\nwhat the cat ate"
CODE = "def main ( ) : return the_cat\nfor cat in range ( ten ) : print ( cat )"
OTHER = "zebras on a plain\ngazelles on the plain"
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WIDTH = 8


class World:
    """Models with tokenizers of their own, whose merges are planned by hand."""

    def __init__(self, folder: Path, save: Callable[..., Path], weights: Callable[..., torch.Tensor]) -> None:
        self.folder = folder
        self.vocabularies: list[dict[str, int]] = []
        self.matrices: list[dict[str, Matrix]] = []
        self.materials: list[Material] = []
        self.ids: list[ModelId] = []
        self._save, self._weights = save, weights
        self.stack = ExitStack()

    def add(
        self,
        files: Mapping[str, bytes],
        *,
        rows: int | None = None,
        stated: int | None = None,
        width: int = WIDTH,
        dtype: torch.dtype = torch.float32,
        config: Mapping[str, Any] | None = None,
    ) -> World:
        """Add a model with one row for each of its tokens, or `rows` of them, where `stated` may differ."""
        vocabulary = Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab()
        count = 1 + max(vocabulary.values()) if rows is None else rows
        name = f"m{len(self.ids)}"
        tensors = {n: self._weights(f"{name} {n}", count, width, dtype=dtype) for n in (EMBED, HEAD)}
        tensors[NORM] = self._weights(f"{name} norm", width, dtype=dtype)
        path = self._save(name, tensors, vocab_size=stated or count, hidden_size=width, **(config or {}))
        for file, data in files.items():
            (path / file).write_bytes(data)
        checkpoint = self.stack.enter_context(Checkpoint.open(path))
        measured = measure(checkpoint)
        self.materials.append(
            Material(tensors=VerifiedSource(checkpoint, measured.leaves), files=checkpoint.functional_files)
        )
        self.ids.append(measured.manifest.model_id)
        self.vocabularies.append({token: n for token, n in vocabulary.items() if n < count})
        self.matrices.append({n: tensor.float().numpy() for n, tensor in tensors.items()})
        return self

    def plan(
        self,
        told: Mapping[str, Any],
        weights: Sequence[float] | None,
        *,
        base: int | None = 0,
        dtype: str = "F32",
        **step: Any,
    ) -> MergePlan:
        """A weighted sum of all models, or a copy of the first, with the tokens that were asked for."""
        choice = choices.read(told, pytest.fail, lambda where, value: str(value))
        assert choice is not None
        models = range(len(self.ids) if weights is not None else 1)
        files = [material.files for material in self.materials]
        tokens = settle(choice, {f"m{n}": n for n in range(len(self.ids))}, base, files).plan
        tokens = replace(tokens, tensors=(HEAD, EMBED))
        operator = "linear" if weights is not None else COPY.name
        parameters = {"weight": tuple(weights), "normalize": False} if weights is not None else {}
        width = self.matrices[0][EMBED].shape[1]
        shapes = {HEAD: (tokens.rows, width), EMBED: (tokens.rows, width), NORM: (width,)}
        planned = tuple(
            TensorPlan(
                name=name,
                dtype=dtype,
                shape=shape,
                operator=operator,
                operands=tuple(Operand(source=m, tensor=name) for m in models),
                parameters=parameters,
            )
            for name, shape in shapes.items()
        )
        config = json.loads(files[0]()["config.json"])
        made = Step(
            base=base,
            donor=0,
            architecture="LlamaForCausalLM",
            tensors=planned,
            config=config_changes(tokens, config, json.loads(files[tokens.donor]()["config.json"])),
            tokenizer=tokens,
            **step,
        )
        plan = MergePlan(inputs=tuple(self.ids), steps=(made,))
        assert MergePlan.parse(plan.to_bytes()) == plan
        return plan

    def merge(self, plan: MergePlan, name: str = "out", **options: Any) -> Path:
        """Run a plan and finish the directory."""
        target = self.folder / name
        run(plan, self.materials, target, journal=self.folder / f"{name}.journal", **options)
        with CheckpointWriter.create(target, plan.layout) as writer:
            for file, data in result_files(plan, [m.files for m in self.materials]).items():
                writer.add_file(file, data)
            writer.commit()
        return target


@pytest.fixture
def world(save: Callable[..., Path], weights: Callable[..., torch.Tensor], tmp_path: Path):  # type: ignore[no-untyped-def]
    made = World(tmp_path, save, weights)
    with made.stack:
        yield made


def tokens_of(path: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab()


def rows_of(path: Path, name: str = EMBED) -> Matrix:
    return load_file(path / "model.safetensors")[name].float().numpy()


def definition(world: World, tensor: str, output: Mapping[str, int], model: int, base: int | None) -> Matrix:
    """One model's matrix with the rows of the output, token by token as the definition has it."""
    made = np.zeros((1 + max(output.values()), world.matrices[0][tensor].shape[1]), np.float32)
    for token, row in output.items():
        have = [m for m, vocabulary in enumerate(world.vocabularies) if token in vocabulary]
        rows = {m: world.matrices[m][tensor][world.vocabularies[m][token]] for m in have}
        if model in have:
            made[row] = rows[model]
        elif len(have) == 1 or base in have:
            made[row] = rows[base if base in have else have[0]]
        elif have:
            total = np.zeros_like(made[row])
            for m in have:
                total = total + rows[m]
            made[row] = total / np.float32(len(have))
    return made


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "Unigram"])
def test_the_rows_of_a_union_are_those_of_the_definition_and_it_opens(
    kind: str, world: World, train: Train
) -> None:
    world.add(train(kind, ENGLISH, 60, "<unk>", "<s>"))
    world.add(train(kind, CODE, 70, "<unk>", "<pad>", added=("<code>",)))
    world.add(train(kind, OTHER, 50, "<unk>"))
    seen = []
    for model in range(3):
        plan = world.plan({"tokenizer_source": "union"}, [float(model == m) for m in range(3)])
        path = world.merge(plan, f"only {model}")
        output = tokens_of(path)
        assert plan.result.tokenizer is not None and plan.result.tokenizer.rows == len(output)
        assert {t: output[t] for t in world.vocabularies[0]} == world.vocabularies[0]
        for tensor in (EMBED, HEAD):
            expected = definition(world, tensor, output, model, base=0)
            np.testing.assert_array_equal(rows_of(path, tensor), expected)
        seen.append(rows_of(path))
    assert not np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[1], seen[2])
    evenly = world.merge(world.plan({"tokenizer_source": "union"}, [0.25, 0.5, 0.25]), "evenly")
    np.testing.assert_allclose(rows_of(evenly), (seen[0] + 2 * seen[1] + seen[2]) / 4, rtol=1e-6, atol=1e-9)
    opens(evenly, len(output))


def opens(path: Path, size: int) -> None:
    """The directory's tokenizer, as transformers opens it, has these tokens and reads and writes text."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == size == AutoConfig.from_pretrained(path).vocab_size
    assert tokenizer.get_vocab() == tokens_of(path)
    ids = tokenizer("the cat sat", add_special_tokens=False).input_ids
    assert ids and max(ids) < size
    assert tokenizer.decode(ids).replace(" ", "").replace("##", "") == "thecatsat"


def test_averages_are_made_where_there_is_no_base(world: World, train: Train) -> None:
    for text in (ENGLISH, CODE, CODE):
        world.add(train("BPE", text, 60, "<s>"))
    path = world.merge(world.plan({"tokenizer_source": "union"}, [1.0, 0.0, 0.0], base=None))
    output = tokens_of(path)
    expected = definition(world, EMBED, output, 0, base=None)
    np.testing.assert_array_equal(rows_of(path), expected)
    both = [t for t in output if t in world.vocabularies[1] and t not in world.vocabularies[0]]
    row = both[0]
    mine = [world.matrices[m][EMBED][world.vocabularies[m][row]] for m in (1, 2)]
    np.testing.assert_array_equal(rows_of(path)[output[row]], (mine[0] + mine[1]) / np.float32(2))


def test_an_average_is_rounded_once_with_the_result(world: World, train: Train) -> None:
    for text in (ENGLISH, CODE, CODE):
        world.add(train("BPE", text, 60, "<s>"), dtype=torch.bfloat16)
    plan = world.plan({"tokenizer_source": "union"}, [1.0, 0.0, 0.0], base=None, dtype="BF16")
    path = world.merge(plan)
    exact = torch.from_numpy(definition(world, EMBED, tokens_of(path), 0, base=None)).to(torch.bfloat16)
    assert torch.equal(load_file(path / "model.safetensors")[EMBED], exact)


def test_the_tokens_of_another_model_take_its_files_and_the_names_of_its_tokens(
    world: World, train: Train
) -> None:
    world.add(train("BPE", ENGLISH, 60, "<s>"), config={"eos_token_id": 0})
    world.add(
        train("BPE", CODE, 70, "<s>", "</s>") | {"chat_template.jinja": b"{{ 1 }}"},
        config={"eos_token_id": 1},
    )
    plan = world.plan({"tokenizer_source": "m1"}, [1.0, 0.0])
    path = world.merge(plan)
    theirs = world.materials[1].files()
    assert (path / "tokenizer.json").read_bytes() == theirs["tokenizer.json"]
    assert (path / "chat_template.jinja").read_bytes() == b"{{ 1 }}"
    assert json.loads((path / "config.json").read_text())["eos_token_id"] == 1
    np.testing.assert_array_equal(rows_of(path), definition(world, EMBED, tokens_of(path), 0, base=0))


def test_rules_for_tokens(world: World, train: Train) -> None:
    world.add(train("BPE", ENGLISH, 60, "<s>", "<end>"))
    world.add(train("BPE", CODE, 60, "<s>", "<end>", added=("<code>",)))
    rules = {
        "<end>": {"source": "m1", "force": True},
        "<code>": {"source": {"kind": "model_token", "model": "m0", "token": "<s>"}},
        "<new>": {"source": {"kind": "model_token", "model": "m1", "token_id": 5}},
        "<zero>": {"source": {"kind": "zero"}, "force": True},
        "<nobody>": {},
    }
    told = {"tokenizer": {"source": "union", "tokens": rules}}
    first, second = (world.merge(world.plan(told, w), str(w)) for w in ([1.0, 0.0], [0.0, 1.0]))
    output, mine, theirs = tokens_of(first), rows_of(first), rows_of(second)
    left, right = (m[EMBED] for m in world.matrices)
    end = world.vocabularies[1]["<end>"]
    assert [output["<new>"], output["<zero>"], output["<nobody>"]] == list(
        range(len(output) - 3, len(output))
    )
    for made in (mine, theirs):
        np.testing.assert_array_equal(made[output["<end>"]], right[end])
        np.testing.assert_array_equal(made[output["<new>"]], right[5])
        assert not made[[output["<zero>"], output["<nobody>"]]].any()
    np.testing.assert_array_equal(mine[output["<code>"]], left[world.vocabularies[0]["<s>"]])
    np.testing.assert_array_equal(theirs[output["<code>"]], right[world.vocabularies[1]["<code>"]])


def test_padding_holds_the_average_row(world: World, train: Train) -> None:
    world.add(train("BPE", ENGLISH, 60, "<s>"), rows=200).add(train("BPE", CODE, 60, "<s>"))
    told = {"tokenizer": {"source": "union", "pad_to_multiple_of": 64}}
    for model in range(2):
        path = world.merge(world.plan(told, [float(m == model) for m in range(2)]), str(model))
        output, made = tokens_of(path), rows_of(path)
        assert len(made) % 64 == 0 and len(output) < len(made) < len(output) + 64
        expected = definition(world, EMBED, output, model, base=0)
        np.testing.assert_array_equal(made[: len(output)], expected)
        mean = expected.astype(np.float64).mean(axis=0).astype(np.float32)
        np.testing.assert_allclose(
            made[len(output) :], np.tile(mean, (len(made) - len(output), 1)), rtol=1e-6
        )
        assert json.loads((path / "config.json").read_text())["vocab_size"] == len(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_keeps_its_type(dtype: torch.dtype, world: World, train: Train) -> None:
    world.add(train("BPE", ENGLISH, 60, "<s>"), dtype=dtype)
    told = {"tokenizer": {"source": "base", "tokens": {"<new>": {}}, "pad_to_multiple_of": 64}}
    short = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    path = world.merge(world.plan(told, None, dtype=short))
    made, size = rows_of(path), len(world.vocabularies[0])
    np.testing.assert_array_equal(made[:size], world.matrices[0][EMBED])
    assert not made[size].any() and made[size + 1 :].any()


def listed(words: Sequence[str]) -> dict[str, bytes]:
    """A tokenizer of whole words, in this order."""
    model = {"type": "WordLevel", "vocab": {w: n for n, w in enumerate(words)}, "unk_token": "w0"}
    whole = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    return {"tokenizer.json": json.dumps(whole).encode()}


def test_rows_that_a_copied_model_lacks_lie_between_those_it_has(world: World) -> None:
    world.add(listed(["w0", "w1", "w2", "w3"]), dtype=torch.bfloat16)
    world.add(listed(["w0", "w1", "new", "w2", "w9", "w3"]), dtype=torch.bfloat16)
    path = world.merge(world.plan({"tokenizer_source": "m1"}, None, dtype="BF16"))
    mine = world.matrices[0][EMBED]
    nothing = np.zeros(WIDTH, np.float32)
    expected = np.stack([mine[0], mine[1], nothing, mine[2], nothing, mine[3]])
    np.testing.assert_array_equal(rows_of(path), expected)


def test_a_token_beyond_the_rows_of_a_tensor_is_missing(world: World) -> None:
    world.add(listed(["w0", "w1", "w2"]), rows=2, stated=3).add(listed(["w0", "w1", "w2"]))
    path = world.merge(world.plan({"tokenizer_source": "union"}, [1.0, 0.0]))
    np.testing.assert_array_equal(rows_of(path)[2], world.matrices[1][EMBED][2])
    np.testing.assert_array_equal(rows_of(path)[:2], world.matrices[0][EMBED])


def shuffled(world: World, dtype: torch.dtype = torch.bfloat16) -> World:
    """Two vocabularies of several leaves that share most of their words, in other orders."""
    draw = np.random.default_rng(7)
    words = [f"w{n}" for n in range(9000)]
    world.add(listed(words[:8000]), width=300, dtype=dtype)
    return world.add(listed([words[n] for n in 500 + draw.permutation(8500)]), width=300, dtype=dtype)


def test_threads_and_chunks_do_not_show_in_the_bits(world: World) -> None:
    plan = shuffled(world).plan(
        {"tokenizer": {"source": "union", "pad_to_multiple_of": 4096}}, [0.75, 0.25], dtype="BF16"
    )
    options = [(1, CHUNK_ELEMENTS), (2, CHUNK_ELEMENTS), (4, 2 * CHUNK_ELEMENTS), (3, 8 * CHUNK_ELEMENTS)]
    made = [world.merge(plan, f"{t} {c}", threads=t, chunk_elements=c) for t, c in options]
    assert len({sha256((path / "model.safetensors").read_bytes()) for path in made}) == 1
    views = [definition(world, EMBED, tokens_of(made[0]), model, base=0) for model in range(2)]
    expected = torch.from_numpy(views[0] * np.float32(0.75) + views[1] * np.float32(0.25)).to(torch.bfloat16)
    assert torch.equal(load_file(made[0] / "model.safetensors")[EMBED][: len(views[0])], expected)


def test_one_leaf_alone_is_the_leaf_of_the_whole(world: World) -> None:
    plan = shuffled(world).plan({"tokenizer_source": "union"}, [0.75, 0.25], dtype="BF16")
    target = world.folder / "out"
    merged = run(plan, world.materials, target, journal=world.folder / "journal")
    for index in (0, 2, len(merged.leaves[HEAD]) - 1):
        data = leaf(plan, merged.trace, world.materials, HEAD, index)
        assert merkle.leaf_digest(data) == merged.leaves[HEAD][index]


def test_the_result_of_a_step_is_aligned_like_a_model(world: World, train: Train) -> None:
    world.add(train("BPE", ENGLISH, 60, "<s>")).add(train("BPE", CODE, 60, "<s>"))
    first = world.plan({"tokenizer_source": "union"}, [0.5, 0.5]).steps[0]
    assert first.tokenizer is not None
    merged = world.merge(MergePlan(inputs=tuple(world.ids), steps=(first,)), "first")
    back = replace(first.tokenizer, source=0, models=(0, 2), rows=len(world.vocabularies[0]))
    sizes = {HEAD: (back.rows, WIDTH), EMBED: (back.rows, WIDTH), NORM: (WIDTH,)}
    second = replace(
        first,
        tensors=tuple(
            replace(
                t,
                shape=sizes[t.name],
                operands=(Operand(source=0, tensor=t.name), Operand(source=2, tensor=t.name)),
                parameters={"weight": (0.0, 1.0), "normalize": False},
            )
            for t in first.tensors
        ),
        tokenizer=back,
        config={"vocab_size": back.rows},
    )
    path = world.merge(MergePlan(inputs=tuple(world.ids), steps=(first, second)), "second", threads=2)
    np.testing.assert_array_equal(rows_of(path), rows_of(merged)[: back.rows])
    assert tokens_of(path) == world.vocabularies[0]


def test_a_chosen_template_is_the_only_one(world: World, train: Train) -> None:
    world.add(train("BPE", ENGLISH, 60, "<s>", chat_template="{{ 'old' }}"))
    path = world.merge(world.plan({"tokenizer_source": "base"}, None, chat_template="{{ 'new' }}"))
    assert (path / "chat_template.jinja").read_text() == "{{ 'new' }}"
    assert "chat_template" not in json.loads((path / "tokenizer_config.json").read_text())
    from transformers import AutoTokenizer

    talk = [{"role": "user", "content": "x"}]
    assert AutoTokenizer.from_pretrained(path).apply_chat_template(talk, tokenize=False) == "new"


def test_a_plan_with_fewer_rows_than_tokens_is_refused(world: World, train: Train) -> None:
    world.add(train("BPE", ENGLISH, 60, "<s>")).add(train("BPE", CODE, 60, "<s>"))
    plan = world.plan({"tokenizer_source": "union"}, [0.5, 0.5])
    step = plan.steps[0]
    assert step.tokenizer is not None
    less = step.tokenizer.rows - 1
    tensors = tuple(replace(t, shape=(less, *t.shape[1:])) if t.name != NORM else t for t in step.tensors)
    lying = replace(step, tokenizer=replace(step.tokenizer, rows=less), tensors=tensors)
    with pytest.raises(Unmergeable, match=f"more than the {less} tokens"):
        world.merge(MergePlan(inputs=plan.inputs, steps=(lying,)))


LIES: list[Callable[[dict[str, Any]], Any]] = [
    lambda step: step["tokenizer"].update(tensors=[HEAD, NORM]),
    lambda step: step["tokenizer"].update(tensors=[HEAD, "missing"]),
    lambda step: step["tokenizer"].update(rows=7),
    lambda step: step["tokenizer"].update(models=[0]),
    lambda step: step["tokenizer"].update(source=5),
    lambda step: step.update(tokenizer=None),
    lambda step: step["tokenizer"].update(
        models=[0, 1, 2], rules=[{"token": "x", "force": False, "fill": {"source": 2, "row": 0}}]
    ),
]


@pytest.mark.parametrize("lie", LIES)
def test_plans_that_lie_about_tokens_are_refused(
    lie: Callable[[dict[str, Any]], Any], world: World, train: Train
) -> None:
    for text in (ENGLISH, CODE, ENGLISH + CODE):
        world.add(train("BPE", text, 60, "<s>"))
    plan = world.plan({"tokenizer_source": "union"}, [0.5, 0.5, 0.0])
    value = json.loads(plan.to_bytes())
    for tensor in value["steps"][0]["tensors"]:
        tensor["operands"] = tensor["operands"][:2]
        tensor["parameters"]["weight"] = tensor["parameters"]["weight"][:2]
    honest = json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
    assert MergePlan.parse(honest)
    lie(value["steps"][0])
    with pytest.raises(CorruptCheckpoint):
        MergePlan.parse(json.dumps(value, separators=(",", ":"), sort_keys=True).encode())


def test_a_model_without_the_tensor_is_refused(world: World, train: Train) -> None:
    world.add(train("BPE", ENGLISH, 60, "<s>")).add(train("BPE", CODE, 60, "<s>"))
    plan = world.plan({"tokenizer_source": "union"}, [0.5, 0.5])
    step = plan.steps[0]
    tensors = tuple(
        replace(t, operands=(t.operands[0], Operand(source=1, tensor="other"))) if t.name == HEAD else t
        for t in step.tensors
    )
    with pytest.raises(CorruptCheckpoint, match="source 1 of the plan has no other"):
        world.merge(MergePlan(inputs=plan.inputs, steps=(replace(step, tensors=tensors),)))


# -- from recipes --------------------------------------------------------------------------------------------

LAYER = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture
def model(save: Callable[..., Path], weights: Callable[..., torch.Tensor], train: Train):  # type: ignore[no-untyped-def]
    """`model("math", CODE)`: a Llama of two layers with a tokenizer that was trained on a text."""

    def make(name: str, text: str, *added: str, tied: bool = False, **options: Any) -> Path:
        files = train("BPE", text, 60, "<s>", added=added, **options)
        count = Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab_size()
        shapes = {EMBED: (count, WIDTH), NORM: (WIDTH,)} | ({} if tied else {HEAD: (count, WIDTH)})
        for layer in range(2):
            shapes |= {f"model.layers.{layer}.{part}.weight": (WIDTH, WIDTH) for part in LAYER}
            shapes |= {f"model.layers.{layer}.{part}.weight": (WIDTH,) for part in NORMS}
        tensors = {n: weights(f"{name} {n}", *shape, dtype=torch.bfloat16) for n, shape in shapes.items()}
        sizes = {"vocab_size": count, "intermediate_size": WIDTH, "num_hidden_layers": 2}
        path = save(name, tensors, **sizes, num_key_value_heads=2, tie_word_embeddings=tied)
        for file, data in files.items():
            (path / file).write_bytes(data)
        return path

    return make


def merged(text: str, folder: Path, **paths: Path) -> tuple[MergePlan, Path]:
    """Plan a recipe over models by name, run it, and finish the directory."""
    wanted = parse(text)
    with ExitStack() as stack:
        opened = {m: stack.enter_context(Checkpoint.open(paths[m])) for m in wanted.models}
        measured = {m: measure(checkpoint) for m, checkpoint in opened.items()}
        drafted = draft(wanted, {m: header_of(checkpoint) for m, checkpoint in opened.items()})
        plan = drafted.seal({m: found.manifest.model_id for m, found in measured.items()})
        assert MergePlan.parse(plan.to_bytes()) == plan
        inputs = [
            Material(tensors=VerifiedSource(opened[m], measured[m].leaves), files=opened[m].functional_files)
            for m in wanted.models
        ]
        run(plan, inputs, folder / "made", journal=folder / "made.journal")
        with CheckpointWriter.create(folder / "made", plan.layout) as writer:
            for file, data in result_files(plan, [material.files for material in inputs]).items():
                writer.add_file(file, data)
            writer.commit()
    return plan, folder / "made"


def test_a_recipe_with_a_union_makes_a_model_that_speaks(model: Callable[..., Path], tmp_path: Path) -> None:
    base, math = model("base", ENGLISH, chat_template="{{ 'hello' }}"), model("math", CODE, "<call>")
    plan, path = merged(
        "merge_method: linear\nbase_model: base\nslices:\n"
        "- sources:\n"
        "  - {model: base, layer_range: [0, 2], parameters: {weight: [0.25, 0.75]}}\n"
        "  - {model: math, layer_range: [0, 2], parameters: "
        "{weight: [{filter: mlp, value: 0.5}, {value: 1}]}}\n"
        "dtype: bfloat16\nchat_template: auto\n"
        "tokenizer: {source: union, pad_to_multiple_of: 8, tokens: {<new>: {source: {kind: zero}}}}\n",
        tmp_path,
        base=base,
        math=math,
    )
    tokens = plan.result.tokenizer
    assert tokens is not None and tokens.tensors == (HEAD, EMBED) and tokens.rows % 8 == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert opened.get_input_embeddings().num_embeddings == opened.config.vocab_size == tokens.rows
    assert {"<new>", "<call>"} <= tokenizer.get_vocab().keys()
    assert tokenizer.chat_template == "{{ 'hello' }}" == (path / "chat_template.jinja").read_text()
    ids = tokenizer("the cat <call> sat", return_tensors="pt").input_ids
    assert torch.isfinite(opened(ids).logits).all()
    left, right = (load_file(p / "model.safetensors")[EMBED].float() for p in (base, math))
    (mine, theirs) = (tokens_of(p).get("the") for p in (base, math))
    assert mine is not None and theirs is None
    row = load_file(path / "model.safetensors")[EMBED].float()[tokenizer.get_vocab()["the"]]
    assert torch.equal(row, left[mine].bfloat16().float()), "both take the base's row, and weights sum to one"
    assert not torch.equal(left[mine], right[mine])


def test_the_tokens_of_a_merge_within_a_recipe_are_those_of_its_result(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    paths = {"a": model("a", ENGLISH), "b": model("b", CODE, "<call>"), "c": model("c", OTHER, "<graze>")}
    plan, path = merged(
        "name: both\nmerge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, "
        "{model: b, parameters: {weight: 1}}]\ntokenizer_source: union\n---\n"
        "merge_method: linear\nmodels: [{model: both, parameters: {weight: 1}}, "
        "{model: c, parameters: {weight: 1}}]\ntokenizer_source: union\n",
        tmp_path,
        **paths,
    )
    union = set().union(*(tokens_of(p).keys() for p in paths.values()))
    assert tokens_of(path).keys() == union and len(rows_of(path)) == len(union)
    assert [step.tokenizer is not None for step in plan.steps] == [True, True]
    own, row = tokens_of(paths["c"])["<graze>"], rows_of(path)[tokens_of(path)["<graze>"]]
    np.testing.assert_array_equal(row, rows_of(paths["c"])[own])


def test_tied_embeddings_stay_tied(model: Callable[..., Path], tmp_path: Path) -> None:
    paths = {"a": model("a", ENGLISH, tied=True), "b": model("b", CODE, tied=True)}
    recipe = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    plan, path = merged(recipe + "tokenizer_source: union\n", tmp_path, **paths)
    assert plan.result.tokenizer is not None and plan.result.tokenizer.tensors == (EMBED,)
    from transformers import AutoModelForCausalLM

    opened = AutoModelForCausalLM.from_pretrained(path)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight


def problems(text: str, **paths: Path) -> tuple[str, ...]:
    """What stands against a recipe."""
    with ExitStack() as stack:
        opened = {m: stack.enter_context(Checkpoint.open(p)) for m, p in paths.items()}
        return check(parse(text), {m: header_of(checkpoint) for m, checkpoint in opened.items()}).problems


def test_what_stands_against_tokens_is_said_before_the_merge(model: Callable[..., Path]) -> None:
    a, b = model("a", ENGLISH), model("b", CODE)
    both = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
    assert problems(both + "tokenizer_source: union\n", a=a, b=b) == ()
    assert "c is not one of the models" in problems(both + "tokenizer_source: c\n", a=a, b=b)[0]
    stacked = (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 1]}]\n"
        "- sources: [{model: b, layer_range: [1, 2]}]\n"
    )
    rule = "tokenizer: {source: union, tokens: {<x>: {source: {kind: model_token, model: b, token_id: 1}}}}\n"
    assert "not made of the same models" in problems(stacked + rule, a=a, b=b)[0]
    (b / "tokenizer.json").unlink()
    assert (
        problems(both + "tokenizer_source: union\n", a=a, b=b)[0] == "b: it has no tokenizer that can be read"
    )


def test_a_config_that_counts_other_rows_than_there_are_is_said(model: Callable[..., Path]) -> None:
    a, b = model("a", ENGLISH), model("b", ENGLISH)
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    recipe = "merge_method: linear\nparameters: {weight: 1}\ntokenizer_source: base\nmodels: [{model: b}]\n"
    assert "no tensor has a row for each token" in problems(recipe, b=b)[0]
    recipe = recipe.replace("[{model: b}]", "[{model: a}, {model: b}]")
    assert problems(recipe, a=a, b=b) == tuple(
        f"{name} of b has no row for each token, as {name} has" for name in (HEAD, EMBED)
    )


def test_a_model_whose_tokenizer_is_elsewhere_is_named(model: Callable[..., Path]) -> None:
    wanted = parse(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\ntokenizer_source: base\n"
    )
    with Checkpoint.open(model("a", ENGLISH)) as checkpoint:
        header = replace(header_of(checkpoint), contents=absent)
    assert check(wanted, {"a": header}).problems == ("a: its tokenizer is not here yet",)
    plain = parse("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    assert check(plain, {"a": header}).problems == ()


def test_a_union_begins_with_the_tokens_of_the_base_wherever_it_is_listed(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    paths = {"a": model("a", CODE), "b": model("b", ENGLISH, "<end>")}
    recipe = (
        "merge_method: linear\nbase_model: b\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    )
    _, path = merged(recipe + "tokenizer_source: union\n", tmp_path, **paths)
    output, mine = tokens_of(path), tokens_of(paths["b"])
    assert {token: output[token] for token in mine} == mine and len(output) > len(mine)


BOTH = (
    "name: both\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    "tokenizer_source: union\n---\n"
)


def test_a_head_that_nobody_takes_leaves_the_tokens_of_its_step(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    paths = {"a": model("a", ENGLISH), "b": model("b", CODE)}
    stacked = (
        "merge_method: passthrough\nslices:\n- sources: [{model: both, layer_range: [0, 1]}]\n"
        "- sources: [{model: a, layer_range: [1, 2]}]\ntokenizer_source: union\n"
    )
    plan, path = merged(BOTH + stacked, tmp_path, **paths)
    assert [step.tokenizer and step.tokenizer.tensors for step in plan.steps] == [(EMBED,), (HEAD, EMBED)]
    head, lost = (
        rows_of(path, HEAD),
        [tokens_of(path)[t] for t in tokens_of(path).keys() - tokens_of(paths["a"])],
    )
    assert lost and not head[lost].any() and rows_of(path)[lost].all(axis=1).any()


def test_the_tokenizer_of_a_result_is_compared_with_those_it_meets(model: Callable[..., Path]) -> None:
    paths = {"a": model("a", ENGLISH), "b": model("b", CODE)}
    wanted = parse(
        BOTH + "merge_method: linear\nmodels: [{model: both}, {model: a}]\nparameters: {weight: 1}\n"
    )
    with ExitStack() as stack:
        opened = {m: stack.enter_context(Checkpoint.open(p)) for m, p in paths.items()}
        found = check(wanted, {m: header_of(checkpoint) for m, checkpoint in opened.items()})
    assert any("the tokenizer of a differs from that of both" in warning for warning in found.warnings)


def test_a_recipe_tells_of_the_tokens_of_its_plan_and_of_no_others(model: Callable[..., Path]) -> None:
    paths = {"a": model("a", ENGLISH, chat_template="{{ 'old' }}"), "b": model("b", CODE)}
    plain = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    padded = (
        plain + "tokenizer: {source: union, pad_to_multiple_of: 16, tokens: {<x>: {source: {kind: zero}}}}\n"
    )
    texts = [
        padded,
        padded.replace("16", "48"),
        padded.replace("union", "base"),
        padded.replace("zero", "model_token, model: b, token_id: 3"),
        padded.replace("<x>", "<y>"),
        plain + "tokenizer_source: b\n",
        plain,
        plain + "chat_template: auto\n",
        plain + "chat_template: chatml\n",
        plain + "chat_template: '{{ 1 }}'\n",
    ]
    with ExitStack() as stack:
        opened = {m: stack.enter_context(Checkpoint.open(p)) for m, p in paths.items()}
        headers = {m: header_of(checkpoint) for m, checkpoint in opened.items()}
    ids = {m: ModelId(sha256(m.encode())) for m in paths}
    same = replace(headers["b"], tensors=headers["a"].tensors, config=headers["a"].config)
    plans = [draft(parse(t), headers if "tokenizer" in t else headers | {"b": same}).seal(ids) for t in texts]
    told = [rename(parse(text), ids) for text in texts]
    found = [
        (i, j) for i, recipe in enumerate(told) for j, plan in enumerate(plans) if tells_of(recipe, plan)
    ]
    # A multiple of 48 is one of 16, and what `auto` finds may be any template, or none.
    assert set(found) == {(n, n) for n in range(len(texts))} | {(0, 1), (7, 6), (7, 8), (7, 9)}
