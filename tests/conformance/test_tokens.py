"""Rows of tokens against mergekit 0.1.5: each token of the output has the very row that mergekit gives it.

mergekit numbers the tokens that a union adds by the order of a hash table, so rows are compared by token.
Its average row for padding is summed in another order. Left out: with `source: base` it adds the tokens of
rules to the base's tokenizer in place, and then takes whatever the base has in its unused rows for them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(900)]

WIDTH = 8
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXTS = {
    "base": "the cat sat on the mat and the other cat ran to the hat\nwhat the cat ate",
    "math": "the cat that counted to ten and then to twenty\nten and ten are twenty",
    "code": "def main ( ) : return the_cat\nfor cat in range ( ten ) : print ( cat )",
}
ADDED = {"base": ["<s>"], "math": ["<s>", "<sum>"], "code": ["<s>", "<call>", "<sum>"]}
LINEAR = """
merge_method: linear
models:
  - {{model: {base}, parameters: {{weight: {0}}}}}
  - {{model: {math}, parameters: {{weight: {1}}}}}
  - {{model: {code}, parameters: {{weight: {2}}}}}
dtype: float32
"""
TASK = """
merge_method: task_arithmetic
base_model: {base}
models:
  - {{model: {math}, parameters: {{weight: {1}}}}}
  - {{model: {code}, parameters: {{weight: {2}}}}}
dtype: float32
"""
COPY = "merge_method: passthrough\nmodels: [{{model: {math}}}]\ndtype: float32\n"
RULES = """
tokenizer:
  source: union
  pad_to_multiple_of: 32
  tokens:
    <call>: {{source: {code}, force: true}}
    <sum>: {{source: {{kind: model_token, model: {base}, token: <s>}}}}
    <void>: {{source: {{kind: zero}}}}
    <five>: {{source: {{kind: model_token, model: {math}, token_id: 5}}}}
"""
BASED = "base_model: {base}\n"
CASES = {
    "union with a base": LINEAR + BASED + "tokenizer_source: union\n",
    "union without a base": LINEAR + "tokenizer_source: union\n",
    "the base's tokens": LINEAR + BASED + "tokenizer_source: base\n",
    "another model's tokens": LINEAR + BASED + "tokenizer_source: {math}\n",
    "rules and padding": LINEAR + BASED + RULES,
    "union, task vectors": TASK + "tokenizer: {{source: union}}\n",
    "a copy with a new token": COPY
    + "tokenizer: {{source: union, tokens: {{<void>: {{source: {{kind: zero}}}}}}}}\n",
}
WEIGHTS = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]


def write(folder: Path, model: str, draw: Callable[..., torch.Tensor]) -> Path:
    """A Llama of one layer with a byte-level BPE of its own, and a few rows more than tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS[model].split("\n"), trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED[model][1:]])
    rows = tokenizer.get_vocab_size() + 3
    path = folder / model
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}'
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "vocab_size": rows,
    }
    (path / "config.json").write_text(json.dumps(config))
    shapes = {EMBED: (rows, WIDTH), HEAD: (rows, WIDTH), "model.norm.weight": (WIDTH,)}
    layer = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    shapes |= {f"model.layers.0.{part}.weight": (WIDTH, WIDTH) for part in layer}
    norms = ("input_layernorm", "post_attention_layernorm")
    shapes |= {f"model.layers.0.{part}.weight": (WIDTH,) for part in norms}
    tensors = {name: draw(f"{model} {name}", *shape) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def merged(
    mergekit: Path,
    ours: Callable[[str, Path], None],
    draw: Callable[..., torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[tuple[str, int], tuple[Path, Path]]:
    """The directories that both made, by case and by the model whose weight is 1."""
    folder = tmp_path_factory.mktemp("tokens")
    paths = {model: write(folder, model, draw) for model in TEXTS}
    made, jobs = {}, []
    for case, text in CASES.items():
        for number, weights in enumerate(WEIGHTS):
            target = folder / f"{len(jobs)}"
            target.with_suffix(".yml").write_text(text.format(*weights, **paths))
            jobs.append({"recipe": str(target.with_suffix(".yml")), "out": f"{target}-theirs"})
            made[case, number] = target, Path(f"{target}-theirs")
    done = subprocess.run(
        [mergekit, Path(__file__).with_name("oracle.py")],
        input=json.dumps(jobs),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not any(json.loads(done.stdout.splitlines()[-1])), done.stdout[-3000:]
    for target, _ in made.values():
        ours(target.with_suffix(".yml").read_text(), target)
    return made


@pytest.mark.parametrize("case", CASES)
def test_every_token_has_the_row_that_mergekit_gives_it(
    case: str, merged: Mapping[tuple[str, int], tuple[Path, Path]], judged: Callable[..., None]
) -> None:
    rows = off = 0
    for number in range(len(WEIGHTS)):
        mine, theirs = merged[case, number]
        ids, known = ({**Tokenizer.from_file(str(p / "tokenizer.json")).get_vocab()} for p in (mine, theirs))
        assert ids.keys() == known.keys()
        config = json.loads((mine / "config.json").read_text())["vocab_size"]
        assert config == json.loads((theirs / "config.json").read_text())["vocab_size"]
        left, right = (load_file(p / "model.safetensors") for p in (mine, theirs))
        for name in (EMBED, HEAD):
            assert left[name].shape == right[name].shape and len(left[name]) == config
            for token, row in ids.items():
                rows += 1
                off += not torch.equal(left[name][row], right[name][known[token]])
            padding = left[name][len(ids) :], right[name][len(ids) :]
            assert torch.allclose(*padding, rtol=1e-5, atol=1e-8)
    judged(
        operator="tokenizer",
        case=case,
        tolerance="bit for bit, by token",
        worst=f"{off} of {rows} rows differ",
        passed=off == 0,
    )
