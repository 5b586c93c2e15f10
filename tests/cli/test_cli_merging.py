"""What a person gets around a merge: the check before it, limits, the report, the card and the licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from node.cli.merging import bytes_of

COMMIT = "c" * 40


def state_licence(model: Path, licence: str) -> None:
    (model / "README.md").write_text(f"---\nlicense: {licence}\n---\n")


def front_matter(model: Path) -> dict[str, object]:
    found = yaml.safe_load((model / "README.md").read_text().split("---\n")[1])
    assert isinstance(found, dict)
    return found


def download(model: Path, repository: str, cache: Path) -> None:
    """Move a model to where a download from the hub lies: files are links to blobs."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    for file in model.iterdir():
        (home / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    shutil.rmtree(model)


# -- check -------------------------------------------------------------------------------------------------


def test_a_check_needs_no_home_hashes_nothing_and_says_what_a_merge_takes(
    weft, desk: Path, listing: Callable[[Path], dict[str, str]]
) -> None:
    before = listing(desk.parent)
    data = weft("check", "recipe.yml", "--json").data
    assert listing(desk.parent) == before  # neither a home nor a cache of digests

    size = sum(array.nbytes for array in load_file(desk / "base" / "model.safetensors").values())
    assert (data["ok"], data["problems"], data["tensors"], data["licence"]) == (True, [], 4, "Apache-2.0")
    assert (data["read_bytes"], data["fetch_bytes"], data["output_bytes"]) == (3 * size, 0, size)
    assert 100e6 < data["peak_ram_bytes"] < 600e6
    assert [Path(model["reference"]).name for model in data["models"]] == ["base", "math", "code"]
    assert all(model["here"] and model["size"] == size for model in data["models"])

    said = weft("check", "recipe.yml")
    assert (said.code, said.err) == (0, "") and "They can be merged" in said.out
    planned = weft("plan", "recipe.yml", "--json").data
    for figure in ("read_bytes", "fetch_bytes", "output_bytes", "peak_ram_bytes", "licence", "warnings"):
        assert planned[figure] == data[figure], figure


def test_a_check_tells_every_problem_of_every_model_at_once(weft, desk: Path, expert) -> None:
    shutil.rmtree(desk / "math")
    expert(desk / "math", 1, rows=80)
    state_licence(desk / "math", "cc-by-nc-nd-4.0")
    (desk / "code" / "model.safetensors").write_bytes(b"")
    recipe = (desk / "recipe.yml").read_text() + "  - {model: org/gone, parameters: {weight: 1.0}}\n"
    (desk / "recipe.yml").write_text(recipe)

    error = weft("check", "recipe.yml", "--json").error
    assert (error["exit_code"], error["kind"]) == (6, "Unmergeable")
    for told in (
        "code: model.safetensors: a safetensors file of 0",
        "org/gone is not in",
        "embed_tokens",
        "CC-BY-NC-ND-4.0",
    ):
        assert len([problem for problem in error["problems"] if told in problem]) == 1, told
    assert not any("was not found" in problem for problem in error["problems"])
    assert error["report"]["problems"] == error["problems"] and error["report"]["ok"] is False

    said = weft("check", "recipe.yml")
    assert (said.code, said.out) == (6, "") and "weft check RECIPE" in said.err
    assert sum(line.startswith("  - ") for line in said.err.splitlines()) == len(error["problems"])


@pytest.mark.parametrize(
    ("spoil", "code", "why", "then"),
    [
        (lambda at: shutil.rmtree(at / "code"), 5, "is not a directory", "ls"),
        (
            lambda at: (at / "code" / "model.safetensors").write_bytes(b""),
            5,
            "of 0 bytes has no header",
            "weft add",
        ),
        (lambda at: (at / "code" / "config.json").unlink(), 5, "no config.json", "ls"),
    ],
)
def test_a_model_that_cannot_be_read_ends_a_check_as_it_ends_a_merge(
    spoil: Callable[[Path], None], code: int, why: str, then: str, weft, desk: Path
) -> None:
    spoil(desk)
    for words in (("check", "recipe.yml"), ("merge", "recipe.yml", "-o", "out")):
        error = weft(*words, "--json").error
        assert error["exit_code"] == code and why in error["why"] and then in error["hint"], error


def test_a_check_warns_of_what_a_person_has_to_judge(weft, desk: Path) -> None:
    state_licence(desk / "math", "llama3.1")
    (desk / "code" / "README.md").unlink()
    data = weft("check", "recipe.yml", "--json").data
    assert data["licence"] == "NOASSERTION"
    (built, silent) = sorted(data["warnings"])
    assert "code says nothing about its licence" in built and "Built with Llama" in silent
    said = weft("check", "recipe.yml").out
    assert said.count("mind:") == 2 and "Built with Llama" in said


# -- licences ----------------------------------------------------------------------------------------------


def test_a_parent_that_forbids_derivatives_is_refused_before_anything_is_written(
    weft, desk: Path, listing
) -> None:
    state_licence(desk / "math", "cc-by-nd-4.0")
    before = listing(desk)
    for words in ("check recipe.yml", "plan recipe.yml", "merge recipe.yml -o out"):
        error = weft(*words.split(), "--json").error
        assert error["exit_code"] == 6 and "math is under CC-BY-ND-4.0" in error["why"], error
        assert "weft check" in error["hint"]
    assert listing(desk) == before


@pytest.mark.parametrize(
    ("parents", "fields"),
    [
        (("mit", "apache-2.0"), {"license": "apache-2.0"}),
        (("apache-2.0", "cc-by-nc-4.0"), {"license": "cc-by-nc-4.0"}),
        (("cc-by-sa-4.0", "gpl-3.0"), {"license": "other", "license_name": "CC-BY-SA-4.0 AND GPL-3.0-only"}),
        (("llama3.1", "mit"), {"license": "llama3.1"}),
        (("mit", "house"), {"license": "other", "license_name": "LicenseRef-house AND MIT"}),
        (
            ("gpl-3.0-or-later", "mit"),
            {
                "license": "other",
                "license_name": "GPL-3.0-or-later",
                "license_link": "https://spdx.org/licenses/GPL-3.0-or-later.html",
            },
        ),
    ],
)
def test_the_card_states_the_licence_as_the_hub_writes_it_and_reads_back(
    parents: tuple[str, str], fields: dict[str, str], weft, desk: Path
) -> None:
    state_licence(desk / "base", "mit")
    for name, licence in zip(("math", "code"), parents, strict=True):
        state_licence(desk / name, licence)
    data = weft("merge", "recipe.yml", "-o", "out", "--json").data
    front = front_matter(desk / "out")
    assert {key: value for key, value in front.items() if key.startswith("license")} == fields

    (desk / "again.yml").write_text(
        "merge_method: linear\nmodels:\n  - {model: ./out, parameters: {weight: 1}}\n"
    )
    assert weft("check", "again.yml", "--json").data["licence"] == data["licence"]


# -- the report --------------------------------------------------------------------------------------------


def test_a_merge_ends_with_two_lines_about_its_norms_and_keeps_the_figures(weft, desk: Path) -> None:
    weft("init")
    said = weft("merge", "recipe.yml", "-o", "out")
    assert (
        "norms of 4 tensors: 1 to 1.2" in said.err
        and "times their parents'\nnothing stands out\n" in said.err
    )
    report = json.loads((desk / "out" / "weft.report.json").read_text())
    assert (report["tensors"], report["measured"], report["flags"]) == (4, 4, [])

    loaded = {name: load_file(desk / name / "model.safetensors") for name in ("base", "math", "code", "out")}
    for part in report["parts"]:
        for extreme in (part["smallest"], part["largest"]):
            lengths = {
                n: float(np.linalg.norm(t[extreme["tensor"]].astype(float))) for n, t in loaded.items()
            }
            mean = (lengths["base"] + lengths["math"] + lengths["code"]) / 3
            assert extreme["ratio"] == pytest.approx(lengths["out"] / mean, rel=2e-3), extreme
    assert [part["name"] for part in report["parts"]] == ["embedding", "layer 0", "norm"]

    data = weft("merge", "recipe.yml", "-o", "out-2", "--json").data
    assert data["report"]["lines"][1] == "nothing stands out" and data["report"]["measured"] == 4
    signed = weft("verify", "out", "--json").data
    assert signed["ok"] is True
    (desk / "out" / "weft.report.json").write_text("{}")
    assert weft("verify", "out").code == 5


def test_what_has_become_much_longer_than_its_parents_is_named(weft, desk: Path) -> None:
    recipe = (desk / "recipe.yml").read_text()
    (desk / "recipe.yml").write_text(recipe.replace("weight: 0.5", "weight: -8.0"))
    said = weft("merge", "recipe.yml", "-o", "out")
    assert said.code == 0 and "mind: model.embed_tokens.weight is " in said.err
    assert "(and 2 more)" in said.err and "times as long" in (desk / "out" / "README.md").read_text()


# -- limits ------------------------------------------------------------------------------------------------


def test_threads_and_memory_do_not_show_in_the_model(weft, desk: Path) -> None:
    plain = weft("merge", "recipe.yml", "-o", "one", "--threads", 1).out
    assert weft("merge", "recipe.yml", "-o", "four", "--threads", 4, "--max-memory", "1GiB").out == plain


def test_a_merge_that_needs_more_memory_than_it_may_take_is_refused(weft, desk: Path, listing) -> None:
    before = listing(desk)
    error = weft("merge", "recipe.yml", "-o", "out", "--max-memory", "20MB", "--json").error
    assert error["exit_code"] == 7 and "one thread needs" in error["why"] and "--max-memory" in error["hint"]
    assert listing(desk) == before
    needed = error["hint"].rpartition(" ")[2]
    assert weft("merge", "recipe.yml", "-o", "out", "--max-memory", needed).code == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [("512MB", 512_000_000), ("2GiB", 2 << 30), ("1.5 kb", 1500), ("4096", 4096), ("1b", 1)],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize("words", ["--threads 0", "--max-memory much", "--max-memory 0", "--max-memory -5MB"])
def test_a_limit_that_is_none_is_a_usage_error(words: str, weft, desk: Path) -> None:
    assert weft("merge", "recipe.yml", "-o", "out", *words.split()).code == 2
    assert not (desk / "out").exists()


# -- the hub -----------------------------------------------------------------------------------------------


def test_a_card_names_what_was_downloaded_by_its_name_and_commit_on_the_hub(
    weft, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(desk / "hub"))
    plain = weft("merge", "recipe.yml", "-o", "plain").out
    for name in ("base", "math"):
        download(desk / name, f"org/{name}", desk / "hub")
    recipe = (desk / "recipe.yml").read_text()
    (desk / "recipe.yml").write_text(recipe.replace("./base", "org/base").replace("./math", "org/math@main"))

    models = weft("check", "recipe.yml", "--json").data["models"]
    assert [model["hub"] for model in models] == [f"org/base@{COMMIT}", f"org/math@{COMMIT}", ""]
    assert weft("merge", "recipe.yml", "-o", "out").out == plain

    front = front_matter(desk / "out")
    code = str(weft("plan", "recipe.yml", "--json").data["inputs"][2]["model_id"])
    assert front["base_model"] == ["org/base", "org/math", code]
    assert front["base_model_relation"] == "merge" and front["library_name"] == "transformers"
    assert front["tags"] == ["merge", "weft", "task_arithmetic"]
    card = (desk / "out" / "README.md").read_text()
    assert f"base `org/base` at `{COMMIT}`: `sha256:" in card and "merge_method: task_arithmetic" in card
    for file in ("README.md", "weft.report.json", "mergekit_config.yml"):
        assert str(desk) not in (desk / "out" / file).read_text()


def test_a_hub_id_that_was_never_downloaded_says_how_to_download_it(weft, desk: Path) -> None:
    recipe = (desk / "recipe.yml").read_text()
    (desk / "recipe.yml").write_text(recipe.replace("./math", "org/math@v2"))
    for words in ("check recipe.yml", "plan recipe.yml", "merge recipe.yml -o out"):
        error = weft(*words.split(), "--json").error
        assert error["exit_code"] == 4 and "org/math@v2 is not in the Hugging Face cache" in error["why"]
        assert error["hint"] == "hf download org/math --revision v2"
    (desk / "recipe.yml").write_text(recipe.replace("./math", "org/math+adapter"))
    error = weft("check", "recipe.yml", "--json").error
    assert error["exit_code"] == 2 and "org/math+adapter" in error["why"] and "adapter" in error["why"]


# -- perplexity --------------------------------------------------------------------------------------------


@pytest.fixture
def llamas(desk: Path) -> Path:
    """The models of the recipe as Llamas that run, the text that they read, and no tokenizer with `code`."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abcdefgh \n")}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    for seed, name in enumerate(("base", "math", "code")):
        shutil.rmtree(desk / name)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=10,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=32,
            bos_token_id=9,
        )
        LlamaForCausalLM(config).save_pretrained(desk / name)
        if name != "code":
            tokenizer.save(str(desk / name / "tokenizer.json"))
        state_licence(desk / name, "mit")
    (desk / "text").write_text("abc abc hgf\n" * 9)
    return desk


def test_a_text_is_predicted_by_the_result_and_every_parent_that_can(weft, llamas: Path) -> None:
    data = weft("merge", "recipe.yml", "-o", "out", "--perplexity", "text", "--json").data
    readings = {Path(reading["model"]).name: reading for reading in data["report"]["readings"]}
    assert list(readings) == ["merged", "base", "math"]
    for reading in readings.values():
        assert reading["tokens"] == 108 and 5 < reading["perplexity"] < 15
        assert reading["bits_per_byte"] == pytest.approx(np.log2(reading["perplexity"]))
    assert (
        "108 bytes of text, sha256:" in data["report"]["text"]
        and "no tokenizer.json" in data["report"]["text"]
    )
    kept = json.loads((llamas / "out" / "weft.report.json").read_text())
    assert kept["readings"][0] == data["report"]["readings"][0] and "bits per byte" in _card(llamas / "out")
    assert str(llamas) not in json.dumps(kept) + _card(llamas / "out")

    from merge_core.evaluation.perplexity import predict

    assert (
        predict(llamas / "out", (llamas / "text").read_text()).bits_per_byte
        == kept["readings"][0]["bits_per_byte"]
    )


def test_a_merge_is_not_lost_for_want_of_a_figure(weft, desk: Path) -> None:
    (desk / "text").write_text("abc")
    said = weft("merge", "recipe.yml", "-o", "out", "--perplexity", "text")
    assert said.code == 0 and "not by merged: it has no tokenizer.json" in said.err
    assert "no tokenizer.json" in _card(desk / "out")


def test_no_model_is_run_that_takes_more_memory_than_the_merge_may(
    weft, llamas: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.merging.merge._RUNNING", 1 << 20)
    words = ("merge", "recipe.yml", "-o", "out", "--perplexity", "text", "--max-memory", "1GB", "--json")
    report = weft(*words).data["report"]
    assert report["readings"] == [] and "not measured: running a model takes" in report["text"]


@pytest.mark.parametrize("data", [None, b"", b"\xff\xfe", b"x" * ((1 << 20) + 1)])
def test_a_text_that_is_none_is_refused_before_the_work(data: bytes | None, weft, desk: Path) -> None:
    if data is not None:
        (desk / "text").write_bytes(data)
    error = weft("merge", "recipe.yml", "-o", "out", "--perplexity", "text", "--json").error
    assert error["exit_code"] == 1 and "text" in error["why"] and "--perplexity FILE" in error["hint"]
    assert not (desk / "out").exists()


def _card(model: Path) -> str:
    return (model / "README.md").read_text()


def test_a_damaged_input_is_named_and_nothing_is_reported(weft, desk: Path) -> None:
    tensors = load_file(desk / "math" / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, desk / "math" / "model.safetensors", metadata={"format": "pt"})
    error = weft("merge", "recipe.yml", "-o", "out", "--json").error
    assert "model.norm.weight would hold NaN" in error["why"] and "sha256:" not in error["why"]
    assert error["why"].endswith("/math does") and "/math, then: weft plan" in error["hint"]
    assert not (desk / "out").exists()
