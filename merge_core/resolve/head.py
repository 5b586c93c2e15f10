"""The Head: whether the output stores the matrix that turns states into tokens, or ties it to the embedding.

All inputs tie it: the output does too, and copies that some store are left out. One does not: the output
stores it, and the inputs that tie it give their embedding for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from merge_core.checkpoint.layout import is_embedding, is_head
from merge_core.resolve.header import ModelHeader

TIE = "tie_word_embeddings"


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
        name = _only(headers[model], is_head)
        if name is not None and tied:
            embeddings = {m: _only(header, is_embedding) for m, header in tied.items()}
            return Head(name=name, is_stored=len(tied) < len(headers), embeddings=embeddings)
    return None


def _ties(header: ModelHeader) -> bool:
    """Whether a model's head is its embedding: its config says so, or says nothing and no head is stored."""
    stated = header.stated(TIE)
    return stated if isinstance(stated, bool) else _only(header, is_head) is None


def _only(header: ModelHeader, fits: Callable[[str], bool]) -> str | None:
    """The one tensor whose name fits."""
    found = list(filter(fits, header.tensors))
    return found[0] if len(found) == 1 else None
