"""A tiny checkpoint as a publisher has it: three tensors in two dtypes, config, tokenizer, card, licence."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory that nobody has signed yet."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    draw = np.random.default_rng(7)
    tensors = {
        "model.embed_tokens.weight": draw.standard_normal((64, 16)).astype(np.float32),
        "model.layers.0.mlp.up_proj.weight": draw.standard_normal((600_000,)).astype(np.float16),
        "model.norm.weight": np.ones(16, dtype=np.float32),
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text('{"architectures":["LlamaForCausalLM"],"hidden_size":16}')
    (directory / "tokenizer_config.json").write_text('{"model_max_length":64}')
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\nA tiny model.\n")
    (directory / "LICENSE").write_text("Apache License 2.0\n")
    return directory
