"""A checkpoint as a model that can be run, without running anything that the directory says.

    load_model   a Llama
    load_any     whatever transformers itself has a class for

The config is rebuilt from keys that are known, and the class is fixed or comes from transformers' own table,
so nothing in the directory chooses code: not `auto_map`, not `architectures`, not a tokenizer class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from merge_core.checkpoint.reader import Checkpoint
from merge_core.config_keys import CONFIG_KEYS
from merge_core.errors import CorruptCheckpoint, Unmergeable

_KEYS = (
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
)


def load_model(directory: Path) -> LlamaForCausalLM:
    """Load a Llama in float32, ready to predict.

    Raises CorruptCheckpoint where tensors are missing or misshapen, Unmergeable on another architecture.
    """
    with Checkpoint.open(directory) as checkpoint:
        config, files = checkpoint.config, checkpoint.survey.weights
        if checkpoint.architecture != "LlamaForCausalLM":
            raise Unmergeable(
                f"{directory} is a {checkpoint.architecture}; only LlamaForCausalLM can be evaluated",
                hint="evaluate it with the tools of its own library",
            )
    weights: dict[str, torch.Tensor] = {}
    for name in files:
        weights.update(load_file(directory / name))
    return _filled(directory, config, weights)


def load_any(directory: Path) -> Any:
    """Load a language model in float32, ready to predict; raises as `load_model` does."""
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


def _filled(directory: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    hint = "fetch or export the checkpoint again, then: weft add DIR"
    try:
        # The constructor draws initial weights; the process's own random stream must not notice.
        with torch.random.fork_rng(devices=[]):
            model = LlamaForCausalLM(LlamaConfig(**{key: config[key] for key in _KEYS if key in config}))
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise CorruptCheckpoint(f"{directory}: config and weights disagree: {error}", hint=hint) from error
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    wrong = [*sorted(set(missing) - tied), *unexpected]
    if wrong:
        raise CorruptCheckpoint(f"{directory}: tensors missing or unknown: {', '.join(wrong[:5])}", hint=hint)
    return model.eval()
