"""A recipe written for mergekit, with slices, gradients, filters and tokens, through both commands as it is.

Both slices have two sources: mergekit gives the tensors after the layers as many inputs as the first one has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(900)]

WEFT = Path(sys.executable).with_name("weft")
WIDTH, LAYERS = 8, 4
WORDS = {
    "base": ["<unk>", "a", "cat", "sat"],
    "math": ["<unk>", "cat", "one", "a", "two"],
    "code": ["<unk>", "a", "def", "cat"],
}
RECIPE = """
merge_method: linear
base_model: ./base
slices:
  - sources:
      - model: ./base
        layer_range: [0, 3]
        parameters: {weight: [{filter: self_attn, value: [1.0, 0.5, 0.75]}, {value: 0.5}]}
      - {model: ./math, layer_range: [1, 4]}
    parameters: {weight: [{filter: mlp, value: [0.0, 1.0]}]}
  - sources:
      - {model: ./code, layer_range: [2, 4]}
      - {model: ./base, layer_range: [1, 3], parameters: {weight: 0.125}}
parameters:
  weight: [{filter: layers.3., value: 2.0}, {value: [0.25, 0.75]}]
  normalize: [{filter: down_proj, value: false}, {value: true}]
dtype: float32
tokenizer:
  source: union
  tokens:
    a: {source: ./base, force: true}
    cat: {source: {kind: zero}, force: true}
"""


@pytest.fixture
def folder(tmp_path: Path, draw: Callable[..., torch.Tensor]) -> Path:
    """Three small Llamas with words of their own, and the recipe."""
    for model, words in WORDS.items():
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (WIDTH,)}
        shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (len(words), WIDTH))
        for layer in range(LAYERS):
            parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [
                f"mlp.{p}_proj" for p in ("gate", "up", "down")
            ]
            shapes |= {f"model.layers.{layer}.{part}.weight": (WIDTH, WIDTH) for part in parts}
            norms = ("input_layernorm", "post_attention_layernorm")
            shapes |= {f"model.layers.{layer}.{part}.weight": (WIDTH,) for part in norms}
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": LAYERS,
            "tie_word_embeddings": False,
            "vocab_size": len(words),
        }
        path = tmp_path / model
        path.mkdir()
        tokenizer.save(str(path / "tokenizer.json"))
        (path / "config.json").write_text(json.dumps(config))
        (path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
        )
        tensors = {name: draw(f"{model} {name}", *shape) for name, shape in shapes.items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return tmp_path


def run(words: list[object], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in the folder of the recipe, with a home of its own."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "WEFT_HOME": str(folder / "home"),
    }
    return subprocess.run(list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True)


def test_a_recipe_for_mergekit_runs_unchanged(
    folder: Path, mergekit: Path, judged: Callable[..., None]
) -> None:
    theirs = run([mergekit.with_name("mergekit-yaml"), "recipe.yml", "theirs", "--quiet"], folder)
    assert theirs.returncode == 0, theirs.stderr[-3000:]
    ours = run([WEFT, "merge", "recipe.yml", "-o", "ours"], folder)
    assert ours.returncode == 0, ours.stderr[-3000:]
    left, right = (load_file(folder / made / "model.safetensors") for made in ("ours", "theirs"))
    assert left.keys() == right.keys()
    ids, known = (
        Tokenizer.from_file(str(folder / made / "tokenizer.json")).get_vocab() for made in ("ours", "theirs")
    )
    assert ids.keys() == known.keys() == {word for words in WORDS.values() for word in words}
    off = 0.0
    for name, tensor in left.items():
        other = right[name]
        if len(tensor) == len(ids):  # tokens that a union adds are numbered otherwise
            other = other[[known[token] for token in sorted(ids, key=ids.__getitem__)]]
        off = max(off, float((tensor - other).abs().max()))
    configs = [json.loads((folder / made / "config.json").read_text()) for made in ("ours", "theirs")]
    stated = [(c["num_hidden_layers"], c["vocab_size"]) for c in configs]
    judged(
        operator="recipe",
        case="slices, gradients, filters, union",
        tolerance="1e-7",
        worst=f"{off:.3g} over {len(left)} tensors",
        passed=off <= 1e-7 and stated == [(LAYERS + 1, len(ids))] * 2,
    )


def test_a_key_that_is_not_supported_is_named(folder: Path) -> None:
    text = RECIPE.replace("  - sources:", "  - residual_weight: 0.5\n    sources:", 1)
    (folder / "recipe.yml").write_text(text)
    done = run([WEFT, "merge", "recipe.yml", "-o", "ours"], folder)
    assert done.returncode == 2 and "slices[0]: residual_weight: not supported" in done.stderr
