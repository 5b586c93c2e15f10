"""Where a tensor sits in a transformer, read from its name: which layer, and in which role.

Covers the usual names of decoder models on the Hugging Face hub (Llama, Mistral, Qwen, Gemma, Phi, GPT-2,
GPT-NeoX, Bloom, Falcon, MPT). A name that says nothing is OTHER, with its layer if it has one. All that is
concluded from the names of tensors is concluded here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


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


_DERIVED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attention.masked_bias")
_BEFORE = re.compile(r"embed|(^|\.)w[tp]e\.|rotary|relative_pe")
_NO_TOKENS = re.compile(r"pos|wpe|type|relative|rotary|patch|image|vision")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embeddings)\.weight$"
)


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


def is_derived(tensor_name: str) -> bool:
    """Whether it is a table that some exporters store and every loader computes for itself."""
    return tensor_name.endswith(_DERIVED)


def lies_before(tensor_name: str) -> bool:
    """Whether a tensor outside of the layers belongs to what comes before the first of them."""
    return bool(_BEFORE.search(tensor_name.lower())) and place(tensor_name).role is not Role.HEAD


def may_count_tokens(tensor_name: str) -> bool:
    """Whether a tensor may have a row for each token: an embedding of tokens, the head, its bias."""
    at = place(tensor_name)
    outside = at.layer is None and at.role in (Role.EMBED, Role.HEAD)
    return outside and not _NO_TOKENS.search(tensor_name.lower())


def is_head(tensor_name: str) -> bool:
    """Whether it is the matrix that turns states into tokens."""
    return bool(_HEAD.search(tensor_name)) and around_layer(tensor_name) is None


def is_embedding(tensor_name: str) -> bool:
    """Whether it is the matrix that turns tokens into states, which a head may be tied to."""
    return bool(_EMBEDDING.search(tensor_name)) and around_layer(tensor_name) is None
