"""The Head: whether the output stores the matrix that turns states into tokens, or ties it to the embedding.

All inputs tie it: the output does too, and copies that some store are left out. One does not: the output
stores it, and the inputs that tie it give their embedding for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from merge_core.checkpoint.layout import around_layer
from merge_core.resolve.header import ModelHeader

TIE = "tie_word_embeddings"

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embeddings)\.weight$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The output's head where inputs tie theirs; `embeddings` names the embedding of each that does.

    `is_stored` says whether the output stores `name`; of an input without a known embedding it says None.
    """

    name: str
    is_stored: bool
    embeddings: Mapping[str, str | None]


def head_of(headers: Mapping[str, ModelHeader]) -> Head | None:
    """The head of a merge of these models; None where none ties it, or none stores one."""
    tied = {model: header for model, header in headers.items() if _ties(header)}
    # One that is untied says its name; else some copy does.
    for model in sorted(headers, key=lambda m: m in tied):
        name = _only(headers[model], _HEAD)
        if name is not None and tied:
            embeddings = {m: _only(header, _EMBEDDING) for m, header in tied.items()}
            return Head(name=name, is_stored=len(tied) < len(headers), embeddings=embeddings)
    return None


def _ties(header: ModelHeader) -> bool:
    """Whether a model's head is its embedding: its config says so, or says nothing and no head is stored."""
    stated = header.stated(TIE)
    return stated if isinstance(stated, bool) else _only(header, _HEAD) is None


def _only(header: ModelHeader, pattern: re.Pattern[str]) -> str | None:
    """The one tensor outside of the layers whose name fits."""
    found = [name for name in header.tensors if pattern.search(name) and around_layer(name) is None]
    return found[0] if len(found) == 1 else None
