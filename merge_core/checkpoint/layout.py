"""Where a tensor sits in a transformer, read from its name: which layer, and in which role.

Covers the usual names of decoder models on the Hugging Face hub (Llama, Mistral, Qwen, Gemma, Phi, GPT-2,
GPT-NeoX, Bloom, Falcon, MPT). A name that says nothing is OTHER, with its layer if it has one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from merge_core.config_keys import NESTED


class Role(StrEnum):
    """What a tensor is for."""

    EMBED = "embed"
    ATTN = "attn"
    MLP = "mlp"
    NORM = "norm"
    HEAD = "head"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The layer (0 is next to the embedding; None outside of the layers) and the role."""

    layer: int | None
    role: Role


_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.([0-9]{1,6})\.")

# In this order: `self_attn.q_norm` is a norm, `attention.dense` is no feed-forward, `embed_out` is a head.
_ROLES = (
    (Role.HEAD, re.compile(r"(?:^|[._])(lm_head|embed_out|output_projection)(?:$|[._])")),
    (Role.NORM, re.compile(r"norm|(?:^|[._])ln(?:_?[0-9a-z]+)?(?:$|[._])")),
    (Role.ATTN, re.compile(r"attn|attention|(?:^|\.)[qkvo]_proj(?:$|\.)|query_key_value")),
    (
        Role.MLP,
        re.compile(
            r"mlp|feed_forward|ffn|experts?(?:$|\.)|moe|(?:^|\.)(?:gate|up|down)_proj(?:$|\.)|(?:^|\.)fc_?[0-9]"
        ),
    ),
    (Role.EMBED, re.compile(r"embed|(?:^|\.)w[tp]e(?:$|\.)")),
)


LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""The keys of config.json, or of its text_config, that state the number of layers."""


def place(tensor_name: str) -> Place:
    """Say where a tensor sits; never fails, whatever the name."""
    found = _LAYER.search(tensor_name)
    inside = tensor_name[found.end() :] if found else tensor_name
    role = next((role for role, pattern in _ROLES if pattern.search(inside.lower())), Role.OTHER)
    return Place(layer=int(found[1]) if found else None, role=role)


def around_layer(tensor_name: str) -> tuple[str, int, str] | None:
    """What stands before a tensor's layer number, the number, and what stands after it; None without one."""
    found = _LAYER.search(tensor_name)
    return (
        None if found is None else (tensor_name[: found.start(1)], int(found[1]), tensor_name[found.end(1) :])
    )


def layer_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers that config.json states, or None where it states none that makes sense."""
    nested = config.get(NESTED)
    for source in (config, nested if isinstance(nested, Mapping) else {}):
        for key in LAYER_COUNTS:
            value = source.get(key)
            if type(value) is int and 0 < value < 1_000_000:
                return value
    return None
