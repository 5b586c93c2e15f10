"""Small checkpoints with weights that are the same on every machine and in every version of every library.

And tokenizers that the tokenizers library trained.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure
from merge_core.checkpoint.source import TensorInfo
from merge_core.execute import Material
from merge_core.plan import MergePlan
from merge_core.recipe import parse
from merge_core.resolve import draft, header_of

if TYPE_CHECKING:
    from merge_core.zoo.build import Zoo

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


class Held:
    """Arrays in memory as a TensorSource; uint16 arrays are the bits of bfloat16."""

    DTYPES: ClassVar = {
        "float16": "F16",
        "float32": "F32",
        "float64": "F64",
        "int64": "I64",
        "uint16": "BF16",
    }

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = dict(sorted(arrays.items()))
        self.tensors = {
            name: TensorInfo(dtype=self.DTYPES[str(array.dtype)], shape=array.shape)
            for name, array in self._arrays.items()
        }

    def read(self, tensor: str, offset: int, length: int, into: memoryview | None = None) -> bytes:
        return self._arrays[tensor].tobytes()[offset : offset + length]


@pytest.fixture
def held() -> type[Held]:
    """`held({"model.norm.weight": array})`: weights in memory, to be read as those of a checkpoint are."""
    return Held


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


@pytest.fixture
def sealed() -> Iterator[Callable[..., tuple[MergePlan, list[Material]]]]:
    """`sealed(recipe)`: its plan over the directories that it names, which stay open, and the plan's inputs.

    `within` is the folder of directories that are named without one.
    """
    with ExitStack() as stack:

        def seal(text: str, within: Path = Path()) -> tuple[MergePlan, list[Material]]:
            recipe = parse(text)
            opened = {m: stack.enter_context(Checkpoint.open(within / m)) for m in recipe.models}
            measured = {m: measure(checkpoint) for m, checkpoint in opened.items()}
            drafted = draft(recipe, {m: header_of(checkpoint) for m, checkpoint in opened.items()})
            plan = drafted.seal({m: found.manifest.model_id for m, found in measured.items()})
            return plan, [
                Material(
                    tensors=VerifiedSource(opened[m], measured[m].leaves), files=opened[m].functional_files
                )
                for m in recipe.models
            ]

        yield seal


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """The fixture size, seed 0: about 15 CPU seconds, once for all test processes; only to be read."""
    from merge_core.zoo.build import build  # brings transformers, which few tests need

    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    return build(shared / "zoo" / "seed-0", seed=0, size="fixture")


@pytest.fixture
def train() -> Callable[..., dict[str, bytes]]:
    """`train("BPE", "some text", 300, "<s>", added=("<x>",))`: the files of a tokenizer of at most 300."""

    def make(
        kind: str, text: str, size: int, *special: str, added: tuple[str, ...] = (), **config: object
    ) -> dict[str, bytes]:
        unknown = special[0]
        options = {"vocab_size": size, "special_tokens": list(special), "show_progress": False}
        if kind == "BPE":
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(**options)
        elif kind == "WordPiece":
            tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            trainer = trainers.WordPieceTrainer(**options)
        else:
            tokenizer = Tokenizer(models.Unigram())
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
            tokenizer.decoder = decoders.Metaspace()
            trainer = trainers.UnigramTrainer(**options, unk_token=unknown)
        tokenizer.train_from_iterator(text.split("\n"), trainer)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
        made = tokenizer.to_str().encode()
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": unknown} | config
        return {"tokenizer.json": made, "tokenizer_config.json": json.dumps(told).encode()}

    return make
