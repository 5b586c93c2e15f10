"""Models that transformers can run though nobody trained them: small, and the same everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models

LETTERS = "abcdefgh="
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-06,
    "vocab_size": 12,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def llama(seed: int, near: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """The tensors of a Llama: drawn anew, or a step away from another."""
    draw = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (12, 16), "model.norm.weight": (16,)}
    for layer in range(3):
        place = f"model.layers.{layer}."
        shapes |= {f"{place}self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"}
        shapes |= {f"{place}mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")}
        shapes[f"{place}mlp.down_proj.weight"] = (16, 24)
        shapes |= {f"{place}{name}_layernorm.weight": (16,) for name in ("input", "post_attention")}
    made = {}
    for name, shape in shapes.items():
        drawn = draw.standard_normal(shape).astype(np.float32)
        start = np.ones(shape, np.float32) if len(shape) == 1 else 0.3 * drawn
        made[name] = start if near is None else near[name] + np.float32(0.15) * drawn
    return made


def write_llamas(folder: Path) -> None:
    """`base`, and `math` and `code` that are near it, each with a tokenizer of letters."""
    tokenizer = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", *LETTERS])}, merges=[])
    )
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    tokenizer.decoder = decoders.Fuse()
    base = llama(0)
    for name, tensors in {"base": base, "math": llama(1, base), "code": llama(2, base)}.items():
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(LLAMA))
        (folder / name / "tokenizer.json").write_text(tokenizer.to_str())
        (folder / name / "README.md").write_text("---\nlicense: apache-2.0\n---\nSmall.\n")


@pytest.fixture(scope="session")
def llamas() -> Callable[[Path], None]:
    """`write_llamas`, which fills a folder."""
    return write_llamas
