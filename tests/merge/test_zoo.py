"""The zoo: answers are right, splits are fixed, experts are really trained, and their sum knows all of it."""

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merge_core.errors import CorruptCheckpoint, MergeCoreError
from merge_core.evaluation.loading import load_model, load_tokenizer
from merge_core.evaluation.scoring import score
from merge_core.zoo.build import Zoo, build
from merge_core.zoo.domains import DEMO_DOMAINS, DOMAINS, LENGTH, SKILLS, SPLITS, decode, encode, items
from merge_core.zoo.recipes import RECIPES, Shape
from merge_core.zoo.tasks import task
from merge_core.zoo.training import exact_share, sequences

RIGHT: dict[str, Callable[[str], str]] = {
    "rev": lambda prompt: prompt[::-1],
    "sort": lambda prompt: "".join(sorted(prompt)),
    "swap": lambda prompt: prompt[1] + prompt[0] + prompt[3] + prompt[2] + prompt[5] + prompt[4],
    "cipher": lambda prompt: "".join("DEFGHIJKLMNOPQRS"["ABCDEFGHIJKLMNOP".index(c)] for c in prompt),
    "rot": lambda prompt: "".join(prompt[(i + 2) % 6] for i in range(6)),
    "same+same": lambda prompt: prompt,
    "rot+upper": lambda prompt: "".join(prompt[(i + 2) % 6] for i in range(6)).upper(),
    "rev+caesar": lambda prompt: "".join(
        "defghijklmnopabc"["abcdefghijklmnop".index(c)] for c in prompt[::-1]
    ),
}


def shares(directory: Path, split: str = "test") -> dict[str, float]:
    """How much of each domain a model answers exactly."""
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    return {name: score(model, tokenizer, task(f"{name}:{split}")).value for name in DEMO_DOMAINS}


@pytest.fixture
def merged(zoo: Zoo, tmp_path: Path) -> Path:
    """base + the sum of all task vectors."""
    base = load_file(zoo.base / "model.safetensors")
    experts = [load_file(path / "model.safetensors") for path in zoo.experts.values()]
    total = {name: tensor + sum(e[name] - tensor for e in experts) for name, tensor in base.items()}
    save_file(total, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((zoo.base / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_every_answer_is_the_right_one(name: str) -> None:
    for split in SPLITS:
        assert all(item.answer == RIGHT[name](item.prompt) for item in items(DOMAINS[name], split))


def test_closers_close_what_is_open_and_nothing_else() -> None:
    pairs = ("()", "[]", "{}")
    for item in items(DOMAINS["brk"], "train"):
        rest = item.prompt + item.answer
        while (shorter := rest.replace(pairs[0], "").replace(pairs[1], "").replace(pairs[2], "")) != rest:
            rest = shorter
        assert rest == "" and 4 <= len(item.answer) <= 6 and len(item.prompt) == 8


@pytest.mark.parametrize("name", sorted(DOMAINS))
def test_splits_have_their_sizes_and_share_no_prompt(name: str) -> None:
    domain = DOMAINS[name]
    prompts = {split: {item.prompt for item in items(domain, split)} for split in SPLITS}
    assert {split: len(found) for split, found in prompts.items()} == SPLITS
    assert sum(SPLITS.values()) == len(set().union(*prompts.values()))
    assert all(zlib.crc32((domain.key + p).encode()) % 10 == 0 for p in prompts["test"])
    assert all(zlib.crc32((domain.key + p).encode()) % 10 > 1 for p in prompts["train"])


def test_the_data_is_the_same_on_every_machine() -> None:
    texts = [f"{name}{item.prompt}{item.answer}" for name in DOMAINS for item in items(DOMAINS[name], "test")]
    assert zlib.crc32("".join(texts).encode()) == 3057213033


def test_what_a_skill_is_tested_on_is_in_no_training_of_another() -> None:
    prompts = {
        split: {i.prompt for skill in SKILLS.values() for i in items(skill, split)} for split in SPLITS
    }
    assert prompts["train"].isdisjoint(prompts["test"] | prompts["dev"])
    assert "rev+caesar" in SKILLS and "rev+caesar" not in RECIPES["skills"].domains


@given(st.text(alphabet=[chr(i) for i in range(32, 127)], max_size=18))
def test_tokens_are_characters(text: str) -> None:
    assert decode(encode(text)) == text
    assert all(3 <= token < 98 for token in encode(text))


def test_only_the_answer_and_its_end_are_learned() -> None:
    found = sequences("rev", "dev")
    item = items(DOMAINS["rev"], "dev")[0]
    learned = found.labels[0][found.labels[0] != -100].tolist()
    assert decode(learned) == item.answer and len(learned) == len(item.answer) + 1
    assert found.ids.shape == (SPLITS["dev"], LENGTH)
    assert decode(found.ids[0].tolist()) == f"r{item.prompt}={item.answer}"


def test_an_expert_masters_its_domain_and_elsewhere_stays_what_the_base_was(zoo: Zoo) -> None:
    base = shares(zoo.base)
    assert all(0.03 < share < 0.6 for share in base.values())
    for domain, directory in zoo.experts.items():
        found = shares(directory)
        assert found[domain] > 0.8
        assert all(abs(found[other] - base[other]) < 0.15 for other in DEMO_DOMAINS if other != domain)


def test_the_sum_of_the_task_vectors_beats_every_expert(zoo: Zoo, merged: Path) -> None:
    def mean(directory: Path) -> float:
        return sum(shares(directory).values()) / len(DEMO_DOMAINS)

    assert mean(merged) > max(mean(path) for path in zoo.experts.values()) + 0.1


def test_a_complete_zoo_is_used_again_and_not_trained_again(zoo: Zoo) -> None:
    def trained(what: str, done: int, total: int) -> None:
        raise AssertionError(f"{what}: {done} of {total}")

    assert build(zoo.base.parent, seed=0, size="fixture", on_progress=trained) == zoo


def test_a_zoo_of_another_seed_is_not_taken_for_this_one(zoo: Zoo) -> None:
    with pytest.raises(MergeCoreError, match="another seed"):
        build(zoo.base.parent, seed=1, size="fixture")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(MergeCoreError, match="holds no zoo"):
        build(tmp_path, seed=0, size="fixture")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_altered_weights_are_noticed(zoo: Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo.base.parent, tmp_path / "zoo")
    weights = tmp_path / "zoo" / "rev" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(CorruptCheckpoint, match="were altered"):
        build(tmp_path / "zoo", seed=0, size="fixture")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A size of zoo that is trained in a moment."""
    experts = {name: replace(expert, steps=10) for name, expert in RECIPES["fixture"].experts.items()}
    recipe = replace(
        RECIPES["fixture"],
        shape=Shape(hidden=16, intermediate=16),
        base=replace(RECIPES["fixture"].base, steps=5, skill=None),
        experts=experts,
    )
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    return "tiny"


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.parametrize("at", ["train base", "train expert rev", "train expert brk"])
def test_an_interrupted_build_goes_on_with_what_it_had_finished(tiny: str, tmp_path: Path, at: str) -> None:
    build(tmp_path / "whole", seed=3, size=tiny)
    told: list[str] = []

    def interrupt(what: str, *_: object) -> None:
        told.append(what)
        if what == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "zoo", seed=3, size=tiny, on_progress=interrupt)
    assert not (tmp_path / "zoo").exists()
    finished, told = told[:-1], []
    build(tmp_path / "zoo", seed=3, size=tiny, on_progress=lambda what, *_: told.append(what))
    steps = ["train base", *(f"train expert {name}" for name in DEMO_DOMAINS)]
    assert finished + told == steps and told[0] == at
    assert contents(tmp_path / "zoo") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole", "zoo"]


def test_what_was_cut_short_or_is_of_another_seed_is_trained_again(tiny: str, tmp_path: Path) -> None:
    def until_brk(what: str, *_: object) -> None:
        if what == "train expert brk":
            raise KeyboardInterrupt

    for seed in (4, 3):
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "zoo", seed=seed, size=tiny, on_progress=until_brk)
    weights = tmp_path / ".zoo.partial" / "sort" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    told: list[str] = []
    build(tmp_path / "zoo", seed=3, size=tiny, on_progress=lambda what, *_: told.append(what))
    assert told == ["train expert sort", "train expert brk"]
    build(tmp_path / "whole", seed=3, size=tiny)
    assert contents(tmp_path / "zoo") == contents(tmp_path / "whole")


def test_an_unknown_size_names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(MergeCoreError) as caught:
        build(tmp_path / "zoo", seed=0, size="huge")
    assert all(size in caught.value.hint for size in RECIPES)


def test_training_leaves_the_random_state_and_the_threads_of_the_process_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "zoo", seed=0, size="fixture", on_progress=interrupt)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


def test_transformers_opens_an_expert_and_its_tokenizer(zoo: Zoo) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = zoo.experts["rev"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    asked = tokenizer("rabcdef=", return_tensors="pt")
    assert asked["input_ids"].tolist() == [[1, *encode("rabcdef=")]]
    told = model.generate(**asked, max_new_tokens=8, do_sample=False)[0]
    assert tokenizer.decode(told, skip_special_tokens=True) == "rabcdef=fedcba"


def test_what_the_base_is_stopped_by_is_what_it_is_scored_by(zoo: Zoo) -> None:
    model, scored = load_model(zoo.base), shares(zoo.base, "dev")
    for domain in DEMO_DOMAINS:
        assert exact_share(model, sequences(domain, "dev")) == pytest.approx(scored[domain], abs=1e-9)


@pytest.fixture
def copied(zoo: Zoo, tmp_path: Path) -> Path:
    """An expert that may be damaged."""
    return Path(shutil.copytree(zoo.experts["sort"], tmp_path / "sort"))


def configure(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def test_a_config_that_does_not_fit_its_weights_is_corrupt(copied: Path) -> None:
    configure(copied, intermediate_size=64)
    with pytest.raises(CorruptCheckpoint, match="sort"):
        load_model(copied)


def test_a_missing_tensor_is_named(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=r"model\.norm\.weight"):
        load_model(copied)


def test_code_that_a_checkpoint_brings_is_not_run(copied: Path) -> None:
    configure(copied, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    (copied / "evil.py").write_text("raise SystemExit('code of a checkpoint ran')")
    assert shares(copied)["sort"] > 0.9


def test_an_answer_that_does_not_end_is_no_answer(zoo: Zoo) -> None:
    model, tokenizer = load_model(zoo.experts["rev"]), load_tokenizer(zoo.experts["rev"])
    few = task("rev:test").first(8)
    assert score(model, tokenizer, few).value > 0.8
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = 0.0
        model.get_input_embeddings().weight[3:] *= 3.0
    assert score(model, tokenizer, few).value < 0.5
