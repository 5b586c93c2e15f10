"""Trios of checkpoints with seeded bell-shaped weights in bfloat16: a base and two experts close to it.

Llama-shaped, so that any merge tool knows them; one shape has 20,000 tiny tensors. Tensors are drawn one at a
time and written as they are drawn, so that a trio takes seconds and little memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from merge_core.checkpoint.source import TensorInfo
from merge_core.checkpoint.writer import CheckpointWriter
from merge_core.operators import convert

BASE, EXPERTS = "base", ("math", "code")
MODELS = (BASE, *EXPERTS)
WEIGHT_SPREAD, DELTA_SPREAD = 0.02, 0.002
_DRAWN = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a Llama; with `experts` each layer has that many MLPs, named as in AfMoE."""

    layers: int
    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    vocabulary: int
    experts: int = 0

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name."""
        named = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }
        for layer in range(self.layers):
            named |= self._layer(f"model.layers.{layer}")
        return {name: TensorInfo(dtype="BF16", shape=shape) for name, shape in named.items()}

    def _layer(self, prefix: str) -> dict[str, tuple[int, ...]]:
        narrow = self.hidden // self.heads * self.key_value_heads
        named: dict[str, tuple[int, ...]] = {
            f"{prefix}.self_attn.{p}_proj.weight": (rows, self.hidden)
            for p, rows in (("q", self.hidden), ("k", narrow), ("v", narrow), ("o", self.hidden))
        }
        named |= {f"{prefix}.{p}_layernorm.weight": (self.hidden,) for p in ("input", "post_attention")}
        if self.experts:
            named |= {f"{prefix}.{p}_mlp_layernorm.weight": (self.hidden,) for p in ("pre", "post")}
            named |= {f"{prefix}.self_attn.{p}_norm.weight": (self.hidden // self.heads,) for p in "qk"}
            named[f"{prefix}.self_attn.gate_proj.weight"] = (self.hidden, self.hidden)
            named[f"{prefix}.mlp.router.gate.weight"] = (self.experts, self.hidden)
        mlps = [f"mlp.experts.{e}" for e in range(self.experts)] or ["mlp"]
        for mlp in mlps:
            named |= {f"{prefix}.{mlp}.{p}_proj.weight": (self.inner, self.hidden) for p in ("gate", "up")}
            named[f"{prefix}.{mlp}.down_proj.weight"] = (self.hidden, self.inner)
        return named

    def config(self) -> dict[str, object]:
        """The config.json."""
        return {
            "architectures": ["AfmoeForCausalLM" if self.experts else "LlamaForCausalLM"],
            "model_type": "afmoe" if self.experts else "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        } | ({"num_experts": self.experts, "num_dense_layers": 0} if self.experts else {})

    @property
    def size(self) -> int:
        """Bytes of one checkpoint."""
        return sum(info.length for info in self.tensors().values())


LARGE = Shape(layers=22, hidden=2048, inner=5632, heads=32, key_value_heads=4, vocabulary=32000)
"""1.1 billion parameters: TinyLlama's."""
MEDIUM = Shape(layers=12, hidden=768, inner=2048, heads=12, key_value_heads=4, vocabulary=16000)
"""100 million parameters."""
MANY = Shape(layers=26, hidden=16, inner=8, heads=4, key_value_heads=2, vocabulary=64, experts=253)
"""20,000 tensors of at most 4,048 elements."""
TINY = Shape(layers=2, hidden=64, inner=128, heads=4, key_value_heads=2, vocabulary=512)
"""What warms up, and what a smoke run takes for the large ones."""
FEW = Shape(layers=2, hidden=16, inner=8, heads=4, key_value_heads=2, vocabulary=64, experts=4)
"""What a smoke run takes for the many tensors."""


def write_trio(folder: Path, shape: Shape, *, seed: int) -> None:
    """Write base and experts into `folder`, each under its own name; the same bytes for the same seed."""
    tensors = shape.tensors()
    with ExitStack() as stack:
        writers = {
            model: stack.enter_context(CheckpointWriter.create(folder / model, tensors)) for model in MODELS
        }
        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(partial(_write_tensor, writers, seed=seed), tensors.items()))
        for writer in writers.values():
            writer.add_file("config.json", json.dumps(shape.config(), indent=2).encode())
            writer.add_file("README.md", b"---\nlicense: apache-2.0\n---\nSeeded noise.\n")
            writer.commit()


def _write_tensor(
    writers: Mapping[str, CheckpointWriter], named: tuple[str, TensorInfo], *, seed: int
) -> None:
    name, info = named
    draw = np.random.Generator(
        np.random.SFC64(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()))
    )
    for start, count in _runs(prod(info.shape)):
        base = draw.standard_normal(count, np.float32) * np.float32(WEIGHT_SPREAD)
        if name.endswith("norm.weight"):
            base += np.float32(1.0)
        for model, writer in writers.items():
            values = base
            if model != BASE:
                values = base + draw.standard_normal(count, np.float32) * np.float32(DELTA_SPREAD)
            stored = np.empty(count, np.uint16)
            convert.narrow(values, info.dtype, stored)
            writer.write(name, start * stored.itemsize, stored.data)


def _runs(elements: int) -> Iterator[tuple[int, int]]:
    """(start, count) of what is drawn at once."""
    for start in range(0, elements, _DRAWN):
        yield start, min(_DRAWN, elements - start)
