"""The element types a checkpoint may hold, by their safetensors names, and their sizes in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
MERGEABLE = frozenset({"F64", "F32", "F16", "BF16"})
"""The types that arithmetic is defined on; the others can only be passed through."""


def byte_length(dtype: str, shape: Sequence[int]) -> int:
    """How many bytes a tensor takes. Raises KeyError on an unknown dtype."""
    return SIZES[dtype] * prod(shape)
