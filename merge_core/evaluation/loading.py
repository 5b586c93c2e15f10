"""A checkpoint as a model that can be run, without running anything that the directory says.

    model, tokenizer = load_model(directory), load_tokenizer(directory)

The config is rebuilt from keys that are known, and the class comes from transformers' own table, so nothing
in the directory chooses code: not `auto_map`, not `architectures`, not a tokenizer class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import CONFIG_MAPPING, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from merge_core.checkpoint.published import read_bounded
from merge_core.checkpoint.reader import MAX_CONFIG, Checkpoint
from merge_core.config_keys import CONFIG_KEYS, LAYER_COUNTS, TOKEN_IDS
from merge_core.errors import CorruptCheckpoint, Unmergeable

MAX_TOKENIZER = 256 << 20

_GENERATION = "generation_config.json"
_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_TABLES = 256 << 20
"""Bytes of what a model works out from its config, as masks and angles, beyond the size of its weights."""
_PROBED = 8
"""Tokens of the rows that show whether a model looks ahead."""
_MOVED = 1e-3
"""What logits move by, beside the largest of them, when a later token is seen; roundings are far smaller."""


def load_model(directory: Path) -> Any:
    """Load a causal language model in float32 and eval mode, of the weights that the checkpoint consists of.

    Raises CorruptCheckpoint where tensors are missing or misshapen, before memory is taken for what a config
    claims; Unmergeable on another kind of model, and on one that looks at later tokens.
    """
    with Checkpoint.open(directory) as checkpoint:
        kind, class_name = _class_of(checkpoint)
        try:
            model, told = _filled(checkpoint, CONFIG_MAPPING[kind], getattr(transformers, class_name))
        except (OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise CorruptCheckpoint(f"{directory}: config and weights disagree: {error}") from error
    wrong = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
    if wrong:
        raise CorruptCheckpoint(f"{directory}: tensors missing or misshapen: {', '.join(wrong[:5])}")
    if _looks_ahead(model):
        raise Unmergeable(
            f"{directory} looks at the tokens that it is to predict: no score would mean anything",
            hint="evaluate a causal model, or this one with the tools of its own library",
        )
    return model


def expect_model(directory: Path) -> None:
    """Raise what can be seen without reading weights of a model that cannot be opened, or its tokenizer."""
    with Checkpoint.open(directory) as checkpoint:
        _class_of(checkpoint)
    load_tokenizer(directory)


def _class_of(checkpoint: Checkpoint) -> tuple[str, str]:
    """The type of a model and the name of its class; raises Unmergeable where it has none."""
    kind = checkpoint.config.get("model_type")
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) if isinstance(kind, str) else None
    # An adapter's config would have another model loaded, from wherever it says.
    if not isinstance(class_name, str) or (checkpoint.path / "adapter_config.json").exists():
        raise Unmergeable(
            f"{checkpoint.path} is a {str(kind)[:40]}, which cannot be opened as a language model",
            hint="evaluate it with the tools of its own library",
        )
    return str(kind), class_name


def _filled(checkpoint: Checkpoint, config_class: Any, model_class: Any) -> tuple[Any, dict[str, Any]]:
    """The model with its weights in place, and what transformers says of tensors that did not fit."""
    kept = {key: value for key, value in checkpoint.config.items() if key in CONFIG_KEYS}
    for key in LAYER_COUNTS:
        if isinstance(kept.get(key), int) and kept[key] > len(checkpoint.tensors):
            raise CorruptCheckpoint(
                f"{checkpoint.path}: {kept[key]} layers are claimed of {len(checkpoint.tensors)} tensors"
            )
    config = config_class.from_dict(kept)
    with torch.device("meta"), _at_most(4 * len(checkpoint.tensors) + 64):
        _expect_room(model_class(config), checkpoint)
    model, told = model_class.from_pretrained(
        None,
        config=config,
        generation_config=_generation(checkpoint),
        state_dict={name: _tensor(checkpoint, name) for name in checkpoint.tensors},
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told, and refused by name
    )
    return model.eval(), told


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Raise ValueError where more parameters than that are made, of any size."""
    left = count

    def take(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"the config asks for more than {count} tensors")

    hook = register_module_parameter_registration_hook(take)
    try:
        yield
    finally:
        hook.remove()


def _expect_room(claimed: Any, checkpoint: Checkpoint) -> None:
    """Raise CorruptCheckpoint where a model, made without memory, would have more weights than there are."""
    numbers = {name: _numbers(info.shape) for name, info in checkpoint.tensors.items()}
    wanted = dict(claimed.named_parameters())
    tables = sum(one.numel() * one.element_size() for one in claimed.buffers())
    if sum(one.numel() for one in wanted.values()) > sum(numbers.values()):
        wrong = [
            name
            for name, one in wanted.items()
            if name not in numbers or tuple(one.shape) != checkpoint.tensors[name].shape
        ]
        raise CorruptCheckpoint(
            f"{checkpoint.path}: tensors missing or misshapen: {', '.join(wrong[:5]) or 'more than one'}"
        )
    if tables > _TABLES + 4 * sum(numbers.values()):
        raise CorruptCheckpoint(f"{checkpoint.path}: the config asks for {tables} bytes beside the weights")


def _numbers(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor in memory of its own; what has fractions as float32."""
    info = checkpoint.tensors[name]
    stored = torch.empty(info.shape, dtype=_TORCH[info.dtype])
    if info.length:
        flat: NDArray[np.uint8] = stored.view(-1).view(torch.uint8).numpy()
        checkpoint.read_bytes(name, 0, info.length, into=flat.data)
    return stored.float() if stored.is_floating_point() else stored


def _generation(checkpoint: Checkpoint) -> GenerationConfig | None:
    """Which tokens open and end texts, where the model says so apart from its config."""
    if _GENERATION not in checkpoint.survey.functional:
        return None
    found = json.loads(read_bounded(checkpoint.path / _GENERATION, MAX_CONFIG))
    if not isinstance(found, Mapping):
        raise ValueError(f"{_GENERATION} is no object")
    return GenerationConfig(**{key: found[key] for key in TOKEN_IDS if key in found})


@torch.inference_mode()
def _looks_ahead(model: Any) -> bool:
    """Whether logits move with a later token, in rows that differ in the last one only."""
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    length = min(_PROBED, getattr(model.config, "max_position_embeddings", None) or _PROBED)
    ids = torch.arange(length).mul(7).remainder(vocabulary).repeat(4, 1)
    ids[:, -1] = torch.arange(4) * vocabulary // 4
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    moved = (logits - logits[:1]).abs().nan_to_num(0.0)  # what is no number, scoring refuses
    return bool(moved.numel() and moved.max() > _MOVED * logits.abs().nan_to_num(0.0).max().clamp(min=1e-6))


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read tokenizer.json, which alone decides how text becomes tokens, without truncation or padding.

    Raises Unmergeable where there is none, CorruptCheckpoint where it cannot be read.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise Unmergeable(f"{directory} has no tokenizer.json", hint="save it with a fast tokenizer")
    try:
        tokenizer = Tokenizer.from_str(read_bounded(path, MAX_TOKENIZER).decode("utf-8"))
    except Exception as error:  # the library raises this very class
        raise CorruptCheckpoint(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
