"""A checkpoint as a model that can be run, without running anything that the directory says.

    model, tokenizer = load_model(directory), load_tokenizer(directory)

The config is rebuilt from keys that are known, and the class comes from transformers' own table, so nothing
in the directory chooses code: not `auto_map`, not `architectures`, not a tokenizer class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from merge_core.checkpoint.published import read_bounded
from merge_core.checkpoint.reader import Checkpoint
from merge_core.config_keys import CONFIG_KEYS
from merge_core.errors import CorruptCheckpoint, Unmergeable

MAX_TOKENIZER = 256 << 20


def load_model(directory: Path) -> Any:
    """Load a causal language model in float32 and eval mode.

    Raises CorruptCheckpoint where tensors are missing or misshapen, Unmergeable on another kind of model.
    """
    with Checkpoint.open(directory) as checkpoint:
        config = checkpoint.config
    kind = config.get("model_type")
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) if isinstance(kind, str) else None
    # An adapter's config would have another model loaded, from wherever it says.
    if not isinstance(class_name, str) or (directory / "adapter_config.json").exists():
        raise Unmergeable(
            f"{directory} is a {str(kind)[:40]}, which cannot be opened as a language model",
            hint="evaluate it with the tools of its own library",
        )
    try:
        kept = {key: value for key, value in config.items() if key in CONFIG_KEYS}
        model, told = getattr(transformers, class_name).from_pretrained(
            directory,
            config=CONFIG_MAPPING[kind].from_dict(kept),
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CorruptCheckpoint(f"{directory}: config and weights disagree: {error}") from error
    wrong = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
    if wrong:
        raise CorruptCheckpoint(f"{directory}: tensors missing or misshapen: {', '.join(wrong[:5])}")
    return model.eval()


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
