"""`weft eval --tasks lm-eval:NAME`: lm-eval judges a local task, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

import node
from merge_core.evaluation.loading import load_model, load_tokenizer
from merge_core.evaluation.scoring import score
from merge_core.evaluation.tasks import Item, Metric, Task
from node import evaluation

FOREIGN = Path(__file__).parents[2] / ".cache" / "lm-eval"
LETTERS = "abcdefgh ="
PICK = """
task: weft_pick
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(answer)}}"
target_delimiter: ""
metric_list:
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITE = """
task: weft_write
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["="], max_gen_toks: 3, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ITEMS = [
    Item(prompt=f"{a}{b} =", answer=answer, choices=("a", "bad", "cafe"))
    for a in "abcdefgh"
    for b, answer in zip("abc", ("a", "bad", "cafe"), strict=True)
]


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment that has lm-eval and sees this one's packages, made once."""
    found = FOREIGN / "bin" / "python"
    if not (FOREIGN / "bin" / "lm-eval").exists():
        subprocess.run([sys.executable, "-m", "venv", FOREIGN], check=True)
        (packages,) = (FOREIGN / "lib").glob("python*/site-packages")
        seen = {Path(tokenizers.__file__).parents[1], Path(node.__file__).parents[1]}
        (packages / "weft.pth").write_text("".join(f"{path}\n" for path in sorted(seen)))
        subprocess.run([found, "-m", "pip", "install", "-q", "lm-eval[hf]>=0.4.13"], check=True)
    return found


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A model of ten letters, and a folder with two tasks of lm-eval over one file."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        ids = {"bos_token_id": 0, "eos_token_id": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=12, max_position_embeddings=32, **shape, **ids))
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(20)
        model.save_pretrained(tmp_path / "model")
    words = ["<bos>", "<eos>", *LETTERS.replace(" ", "Ġ")]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<bos>", "<eos>"])
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "tasks").mkdir()
    file = tmp_path / "tasks" / "items.jsonl"
    lines = [json.dumps({"prompt": i.prompt, "answer": i.answer, "choices": i.choices}) for i in ITEMS]
    file.write_text("\n".join(lines) + "\n")
    for name, text in (("pick", PICK), ("write", WRITE)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text % json.dumps(str(file)))
    return tmp_path


def run(python: Path, table: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [python, "-m", "node.cli", "--json", "eval", "model", *words],
        cwd=table,
        env={**os.environ, "WEFT_HOME": str(table / "home"), "HF_HOME": str(table / "hf")},
        stdout=subprocess.PIPE,
        text=True,
    )
    envelope: dict[str, Any] = json.loads(done.stdout)
    return envelope


@pytest.mark.foreign
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lm_eval_judges_a_local_task_by_its_name_and_agrees_with_ours(python: Path, table: Path) -> None:
    ours = Task(name="pick", metric=Metric.CHOICE, items=tuple(ITEMS))
    (table / "pick.jsonl").write_text("".join(f"{line}\n" for line in ours.lines()))
    names = "lm-eval:weft_pick,pick.jsonl,lm-eval:weft_write"
    found = run(python, table, "--tasks", names, "--tasks-path", "tasks")
    assert found["ok"], found
    theirs, own, written = found["data"]["tasks"]
    assert (theirs["task"], theirs["metric"]) == ("lm-eval:weft_pick", "lm-eval:acc_norm")
    assert theirs["items"] == len(ITEMS) and theirs["digest"] is None
    assert theirs["values"] == own["values"] and 0 < own["values"][0] < 1
    model, tokenizer = load_model(table / "model"), load_tokenizer(table / "model")
    assert own["values"] == [score(model, tokenizer, ours).value]
    assert written["metric"].startswith("lm-eval:exact_match") and 0 <= written["values"][0] <= 1
    few = run(python, table, "--tasks", "lm-eval:weft_pick", "--tasks-path", "tasks", "--limit", "5")
    assert few["data"]["tasks"][0]["items"] == 5


@pytest.mark.foreign
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_lm_eval_cannot_do_is_one_line_and_the_next_step(python: Path, table: Path) -> None:
    for path in ("tasks/pick.yaml", "weft_*"):
        refused = run(python, table, "--tasks", f"lm-eval:{path}", "--tasks-path", "tasks")["error"]
        assert (refused["exit_code"], refused["hint"]) == (2, "lm-eval ls tasks")
        assert "there is no task 'lm-eval:" in refused["why"]
    (table / "tasks" / "items.jsonl").unlink()
    failed = run(python, table, "--tasks", "lm-eval:weft_pick", "--tasks-path", "tasks")["error"]
    assert failed["exit_code"] == 1 and "lm-eval fails at weft_pick" in failed["why"] and failed["hint"]


@pytest.mark.parametrize(
    ("words", "code", "why", "hint"),
    [
        (("--tasks", "lm-eval:gsm8k"), 1, "not installed", "pip install 'weftmerge[eval]'"),
        (
            ("--tasks", "lm-eval:gsm8k", "--attest"),
            2,
            "no digest of what they ask",
            "weft eval DIR --tasks FILE",
        ),
        (("--tasks", "rev:test", "--tasks-path", "nowhere"), 2, "no folder of tasks", "weft eval --help"),
    ],
)
def test_a_missing_extra_is_said_before_any_work(
    words: tuple[str, ...], code: int, why: str, hint: str, weft: Any, table: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    assert weft("init").code == 0
    said = weft("--json", "eval", table / "model", *words)
    assert said.code == code and why in said.error["why"] and said.error["hint"].startswith(hint), said
