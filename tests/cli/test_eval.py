"""`weft eval`: models side by side, what a person and a program see, and scores that are signed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from merge_core.errors import Unmergeable
from node import evaluation
from node.cli.evaluation import scores
from node.provenance import measurement
from node.worker import evaluation as worker
from node.worker import process

LETTERS = "abcdefgh ="
RECIPE = """
merge_method: linear
models:
  - {model: ./left, parameters: {weight: 1.0}}
  - {model: ./right, parameters: {weight: 1.0}}
"""


def write_model(directory: Path, seed: int) -> Path:
    """A random Llama that reads ten letters, and its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(LETTERS) + 2,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=1,
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(20)
        model.save_pretrained(directory)
    words = ["<bos>", "<eos>", *LETTERS.replace(" ", "Ġ")]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return directory


@pytest.fixture
def table(weft: Any) -> Path:
    """Where the command runs: two models, two tasks of texts and one of choices."""
    desk = Path.cwd()
    write_model(desk / "left", 1)
    write_model(desk / "right", 2)
    (desk / "one.jsonl").write_text('{"text": "abc def"}\n{"text": "ha ha"}\n')
    (desk / "two.jsonl").write_text('{"text": "gab gab gab"}\n')
    choices = [{"prompt": "ab=", "answer": c, "choices": ["a", "b", "cd"]} for c in ("a", "b", "cd")]
    (desk / "pick.jsonl").write_text("".join(json.dumps(item) + "\n" for item in choices))
    return desk


def test_models_stand_side_by_side_and_the_best_of_a_row_is_marked(weft: Any, table: Path) -> None:
    said = weft("eval", "left", "right", "--tasks", "one.jsonl,two.jsonl,pick.jsonl", "-o", "scores.json")
    assert said.code == 0, said
    head, *rows = said.out.splitlines()
    assert head.split() == ["task", "metric", "items", "left", "right"]
    assert [row.split()[0] for row in rows] == ["one.jsonl", "two.jsonl", "pick.jsonl", "mean", "worst"]
    assert all(row.count("*") >= 1 for row in rows)
    data = json.loads((table / "scores.json").read_text())
    one, two, pick = data["tasks"]
    assert (one["metric"], one["items"], pick["metric"]) == ("bits_per_byte", 2, "choice")
    for row in (one, two):
        assert row["best"] == [row["values"].index(min(row["values"]))]
        told = [f"{value:.4f}" for value in row["values"]]
        line = next(line for line in rows if line.startswith(row["task"]))
        assert line.split()[-2:] == [t + "*" * (i in row["best"]) for i, t in enumerate(told)]
    mean, worst = data["summary"]
    assert mean["values"] == [(a + b) / 2 for a, b in zip(one["values"], two["values"], strict=True)]
    assert worst["values"] == [max(pair) for pair in zip(one["values"], two["values"], strict=True)]
    assert "scores.json" in said.err


def test_a_program_reads_the_same_in_one_envelope(weft: Any, table: Path) -> None:
    data = weft("--json", "eval", "left", "--tasks", "pick.jsonl", "--limit", "2", "--batch-size", "1").data
    (row,) = data["tasks"]
    assert (row["task"], row["items"], row["best"], data["summary"]) == ("pick.jsonl", 2, [], [])
    assert data["models"] == [{"name": "left", "directory": str(table / "left")}]
    assert row["digest"].startswith("sha256:") and row["values"][0] in (0, 0.5, 1)


def test_signed_scores_are_attached_and_a_verification_shows_them(weft: Any, table: Path) -> None:
    assert weft("init").code == 0
    (table / "recipe.yml").write_text(RECIPE)
    merged = weft("--json", "merge", "recipe.yml", "-o", "out").data
    data = weft("--json", "eval", "out", "--tasks", "one.jsonl,pick.jsonl", "--attest").data
    assert data["models"][0]["model_id"] == merged["model_id"]
    assert Path(data["models"][0]["attested"]).parent == table / "out"
    told = [check for check in weft("--json", "verify", "out").data["checks"] if check["name"] == "measured"]
    assert [check["ok"] for check in told] == [None, None]
    assert f"{data['tasks'][0]['values'][0]:.4f}" in told[0]["detail"]
    me = weft("--json", "id", "show").data["peer_id"]
    assert all(me in check["detail"] and "not measured again" in check["detail"] for check in told)
    shown = weft("verify", "out")
    assert shown.code == 0 and "! measured" in shown.out

    lines = (table / "out" / "weft.evaluations.jsonl").read_text()
    (table / "out" / "weft.evaluations.jsonl").write_text(lines.replace("A", "B", 1))
    refused = weft("--json", "verify", "out")
    assert refused.code == 5 and "measured" in refused.error["why"]


def test_scores_are_not_attached_to_what_has_no_record_or_by_nobody(weft: Any, table: Path) -> None:
    nobody = weft("--json", "eval", "left", "--tasks", "one.jsonl", "--attest")
    assert (nobody.code, nobody.error["hint"]) == (1, "weft init")
    assert weft("init").code == 0
    plain = weft("--json", "eval", "left", "--tasks", "one.jsonl", "--attest")
    assert plain.code == 5 and "no record" in plain.error["why"] and "weft add left" in plain.error["hint"]
    (table / "left" / "weft.manifest.json").write_text("{}")
    other = weft("--json", "eval", "left", "--tasks", "one.jsonl", "--attest")
    assert other.code == 5 and other.error["hint"] == "weft verify left"
    assert not (table / "left" / "weft.evaluations.jsonl").exists()


def test_scores_outlive_what_cannot_be_attached(weft: Any, table: Path, monkeypatch: Any) -> None:
    """What is seen to fail is not measured; what fails after was written first."""
    assert weft("init").code == 0
    (table / "recipe.yml").write_text(RECIPE)
    assert weft("merge", "recipe.yml", "-o", "out").code == 0
    words = ("--json", "eval", "out", "--tasks", "one.jsonl", "--attest", "-o", "scores.json")
    attach = measurement.attach
    monkeypatch.setattr(measurement, "attach", lambda folder, line: attach(folder / "gone", line))
    assert weft(*words).code != 0
    kept = json.loads((table / "scores.json").read_text())
    assert kept["tasks"][0]["task"] == "one.jsonl"
    monkeypatch.setattr(process, "run", untouched)
    (table / "out" / "weft.evaluations.jsonl").write_text("{}\n")
    assert "line 1" in weft(*words).error["why"]


def test_a_later_model_is_looked_at_before_the_first_is_scored(table: Path) -> None:
    (table / "right" / "tokenizer.json").unlink()
    seen: list[Any] = []
    models = [[name, str(table / name)] for name in ("left", "right")]
    with pytest.raises(Unmergeable, match="right"):
        worker.evaluate({"models": models, "tasks": ["one.jsonl"]}, seen.append)
    assert seen == []


def untouched(*_: object, **__: object) -> None:
    raise AssertionError("a worker was started for what needs none to be seen")


@pytest.mark.parametrize(
    ("words", "code", "why", "hint"),
    [
        (("left", "--tasks", "none.jsonl"), 2, "no task 'none.jsonl': did you mean one.jsonl?", "ls -l ."),
        (("left", "--tasks", "folder.jsonl"), 2, "folder.jsonl cannot be read", "ls -l folder.jsonl"),
        (("left", "--tasks", "rv:test"), 2, "no task 'rv:test': did you mean rev:test?", "weft eval --help"),
        (("left", "--tasks", "rev"), 2, "no task 'rev': did you mean rev:", "weft eval --help"),
        (("left", "--tasks", "chess"), 2, "a task is rev:test and the like, or FILE.jsonl", "weft eval"),
        (("left", "--tasks", "bad.jsonl"), 2, "bad.jsonl, line 2", "weft eval --help"),
        (("nowhere", "--tasks", "one.jsonl"), 5, "nowhere is not a directory", "ls"),
        (("empty", "--tasks", "one.jsonl"), 5, "no safetensors", "ls empty"),
        (("left", "left", "--tasks", "one.jsonl"), 2, "named twice", "weft eval --help"),
        (("left", "--tasks", "one.jsonl,sub/one.jsonl"), 2, "two tasks are called one.jsonl", "weft eval"),
        (("left", "--tasks", " , "), 2, "0 tasks are named", "weft eval --help"),
        (("left",), 2, "--tasks", "weft eval --help"),
        (("--tasks", "one.jsonl"), 2, "DIR", "weft eval --help"),
        (("left", "--tasks", "one.jsonl", "-o", "no/where.json"), 1, "cannot be written", "ls -ld"),
        (("left", "--tasks", "one.jsonl", "-o", "sub"), 1, "cannot be written", "ls -ld"),
        (("left", "--tasks", "one.jsonl", "--device", "tpu"), 2, "'tpu' is no device", "weft eval --help"),
        (("left", "--tasks", "one.jsonl", "--limit", "0"), 2, "--limit", "weft eval --help"),
    ],
)
def test_what_can_be_seen_at_once_is_said_at_once(
    words: tuple[str, ...], code: int, why: str, hint: str, weft: Any, table: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(process, "run", untouched)
    (table / "empty").mkdir()
    (table / "folder.jsonl").mkdir()
    (table / "sub").mkdir()
    (table / "sub" / "one.jsonl").write_text('{"text": "abc"}')
    (table / "bad.jsonl").write_text('{"text": "abc"}\n{"text": 1}\n')
    said = weft("--json", "eval", *words)
    assert said.code == code and why in said.error["why"] and said.error["hint"].startswith(hint), said


def test_what_only_the_worker_sees_names_the_model_the_task_and_the_next_step(weft: Any, table: Path) -> None:
    (table / "far.jsonl").write_text('{"text": "xyz"}')
    far = weft("--json", "eval", "left", "--tasks", "far.jsonl")
    assert far.code == 6 and far.error["why"].startswith("left at far.jsonl: ") and far.error["hint"]


@pytest.mark.slow
def test_a_model_without_a_tokenizer_is_named(weft: Any, table: Path) -> None:
    (table / "right" / "tokenizer.json").unlink()
    bare = weft("--json", "eval", "left", "right", "--tasks", "one.jsonl")
    assert bare.code == 6 and "right" in bare.error["why"] and "tokenizer.json" in bare.error["why"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed_at_once(weft: Any, table: Path) -> None:
    said = weft("--json", "eval", "left", "--tasks", "one.jsonl", "--device", "cuda")
    assert said.code == 1 and "no GPU" in said.error["why"] and "--device cpu" in said.error["hint"]


def test_help_shows_what_a_line_of_a_task_looks_like(weft: Any) -> None:
    said = weft("eval", "--help")
    assert said.code == 0 and '{"prompt": "2+2=", "answer": "4"}' in said.out and '{"text":' in said.out


def test_equal_models_are_all_best_and_a_lone_one_is_not_marked() -> None:
    row = {"metric": "choice", "higher_is_better": True, "values": [0.5, 0.7, 0.7]}
    assert evaluation.best(row) == [1, 2]
    assert evaluation.best(row | {"higher_is_better": False}) == [0]
    assert evaluation.best(row | {"values": [0.5]}) == []


def test_rows_are_joined_by_what_they_measure_not_by_their_places() -> None:
    def row(metric: str, value: float) -> dict[str, Any]:
        told = {"task": "lm-eval:x", "metric": metric, "items": 3, "digest": None, "nats_per_byte": None}
        return told | {"higher_is_better": True, "value": value}

    rows = worker.joined(
        [[row("acc", 0.1), row("f1", 0.2)], [row("f1", 0.3)], [row("f1", 0.4), row("em", 1)]]
    )
    found = {row["metric"]: row["values"] for row in rows}
    assert found == {"acc": [0.1, None, None], "f1": [0.2, 0.3, 0.4], "em": [None, None, 1]}
    assert [evaluation.best(row) for row in rows] == [[0], [2], [2]]
    other = [row | {"task": "lm-eval:y"} for row in rows]
    means = [row["values"] for row in evaluation.summary([*rows, *other]) if row["over"] == "mean"]
    assert means == [[0.1, None, None], [0.2, 0.3, 0.4], [None, None, 1]]
    scores({"models": [{"name": n} for n in "abc"], "tasks": [r | {"best": []} for r in rows], "summary": []})


def test_models_of_one_name_are_told_apart_by_where_they_lie(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    named: Callable[..., dict[str, Path]] = evaluation.named
    assert list(named([Path("a/x"), Path("b/x"), Path("y/")])) == ["a/x", "b/x", "y"]
    assert list(named([Path()])) == [tmp_path.name]
