"""Small checkpoints with weights that are the same on every machine and in every version of every library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "vocab_size": 16,
}


@pytest.fixture
def weights() -> Callable[..., torch.Tensor]:
    """`weights("math q_proj", 8, 8)`: float32 of about ±0.06, bell-shaped, drawn from the words alone."""

    def draw(words: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        count = int(np.prod(shape, dtype=np.int64))
        raw = hashlib.shake_256(words.encode()).digest(4 * count)
        halves = np.frombuffer(raw, "<i2").astype(np.float32).reshape(2, count)
        values = (halves[0] + halves[1]) / np.float32(2**20)
        return torch.from_numpy(values.reshape(shape)).to(dtype)

    return draw


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write a model directory by name: weights, config.json, a tokenizer, and returns its path."""

    def write(name: str, tensors: Mapping[str, torch.Tensor], **config: object) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(LLAMA | config))
        (directory / "tokenizer.json").write_text('{"version": "1.0"}')
        return directory

    return write
