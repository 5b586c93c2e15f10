"""The container: arrays and what is said of them as one safetensors file, with one spelling.

    data = write({"version": 2}, {"structure.sketch": array}, name="fingerprint")
    told, arrays = read(data, name="fingerprint")

The metadata of the file has one entry, canonical JSON. A reader must write again what it understood and
compare: `read` refuses what is no such file, not every other spelling of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.checkpoint.header import build_header, parse_header
from merge_core.checkpoint.source import TensorInfo
from merge_core.digest import canonical, parse_canonical

Arrays = Mapping[str, npt.NDArray[Any]]

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U32": "<u4", "U16": "<u2", "U8": "|u1"}
_NAMES = {kind: name for name, kind in _DTYPES.items()}


def write(told: Any, arrays: Arrays, *, name: str) -> bytes:
    """The bytes; raises KeyError on a type of number that a container does not have."""
    infos = {key: TensorInfo(dtype=_dtype(array), shape=array.shape) for key, array in sorted(arrays.items())}
    text, header = build_header(infos, {name: canonical(told).decode()})
    return text + b"".join(
        arrays[key].astype(_DTYPES[span.dtype]).tobytes() for key, span in header.tensors.items()
    )


def read(data: bytes, *, name: str) -> tuple[Any, dict[str, npt.NDArray[Any]]]:
    """What is said, and the arrays as views of `data`; raises ValueError, KeyError or CorruptCheckpoint."""
    header = parse_header(data, len(data))
    if set(header.metadata) != {name}:
        raise ValueError("metadata")
    arrays = {
        key: np.frombuffer(data[span.begin : span.end], dtype=_DTYPES[span.dtype]).reshape(span.shape)
        for key, span in header.tensors.items()
    }
    return parse_canonical(header.metadata[name].encode()), arrays


def _dtype(array: npt.NDArray[Any]) -> str:
    return _NAMES[array.dtype.newbyteorder("<").str]
