"""The Fingerprint: a model's structure and, where it could be run, its behaviour, in at most 256 KiB.

The bytes are a safetensors file: the arrays of both parts under `structure.` and `behaviour.`, and one entry
of metadata, canonical JSON with the rest. Both parts give `described()` and `arrays()`, and have a `read`
that takes the two, strictly (ValueError). The structure is exact, the behaviour a measurement.

Law: `Fingerprint.parse(data).to_bytes() == data`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.checkpoint.header import build_header, parse_header
from merge_core.checkpoint.source import TensorInfo
from merge_core.digest import Digest, ModelId, canonical, check_version, parse_canonical, sha256
from merge_core.errors import CorruptCheckpoint
from merge_core.simmerge.behaviour import Behaviour
from merge_core.simmerge.structure import Structure

VERSION = 2
MAX_FINGERPRINT = 256 << 10

_METADATA = "fingerprint"
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U32": "<u4", "U16": "<u2", "U8": "|u1"}
_NAMES = {kind: name for name, kind in _DTYPES.items()}

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fingerprint:
    """What a model publishes of itself."""

    model_id: ModelId
    structure: Structure
    behaviour: Behaviour | None

    @cached_property
    def digest(self) -> Digest:
        """The digest of the bytes."""
        return sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The one spelling of this fingerprint; raises CorruptCheckpoint where it is too large."""
        told = {
            "version": VERSION,
            "modelId": self.model_id,
            "structure": self.structure.described(),
            "behaviour": self.behaviour and self.behaviour.described(),
        }
        arrays = _named("structure", self.structure.arrays())
        if self.behaviour:
            arrays |= _named("behaviour", self.behaviour.arrays())
        return _written(canonical(told).decode(), arrays)

    @classmethod
    def parse(cls, data: bytes) -> Fingerprint:
        """Read a fingerprint from anybody; raises CorruptCheckpoint on whatever is not exact."""
        if len(data) > MAX_FINGERPRINT:
            raise CorruptCheckpoint(f"a fingerprint of {len(data)} bytes; at most {MAX_FINGERPRINT} are read")
        try:
            told, arrays = _read(data)
            if not isinstance(told, dict) or set(told) != {"version", "modelId", "structure", "behaviour"}:
                raise ValueError("keys")
            check_version(told["version"], VERSION, "fingerprint")
            behaviour, measured = told["behaviour"], arrays["behaviour"]
            if behaviour is None and measured:
                raise ValueError("a behaviour without a description")
            found = cls(
                model_id=ModelId(told["modelId"]),
                structure=Structure.read(told["structure"], arrays["structure"]),
                behaviour=None if behaviour is None else Behaviour.read(behaviour, measured),
            )
            if found.to_bytes() != data:
                raise ValueError("it is spelled in another way than weft spells it")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise CorruptCheckpoint(
                f"not a fingerprint: {error}", hint="ask another holder for it"
            ) from error
        return found


def _written(told: str, arrays: Arrays) -> bytes:
    infos = {
        name: TensorInfo(dtype=_dtype(array), shape=array.shape) for name, array in sorted(arrays.items())
    }
    text, header = build_header(infos, {_METADATA: told})
    data = text + b"".join(
        arrays[name].astype(_DTYPES[span.dtype]).tobytes() for name, span in header.tensors.items()
    )
    if len(data) > MAX_FINGERPRINT:
        raise CorruptCheckpoint(f"the fingerprint takes {len(data)} bytes of {MAX_FINGERPRINT}")
    return data


def _read(data: bytes) -> tuple[Any, dict[str, dict[str, npt.NDArray[Any]]]]:
    """The metadata, and the arrays of both parts by name, as views of `data`."""
    header = parse_header(data, len(data))
    if set(header.metadata) != {_METADATA}:
        raise ValueError("metadata")
    parts: dict[str, dict[str, npt.NDArray[Any]]] = {"structure": {}, "behaviour": {}}
    for name, span in header.tensors.items():
        part, _, rest = name.partition(".")
        array = np.frombuffer(data[span.begin : span.end], dtype=_DTYPES[span.dtype])
        parts[part][rest] = array.reshape(span.shape)
    return parse_canonical(header.metadata[_METADATA].encode()), parts


def _named(part: str, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
    return {f"{part}.{name}": array for name, array in arrays.items()}


def _dtype(array: npt.NDArray[Any]) -> str:
    """The safetensors name of an array's type; raises KeyError on one that no part has."""
    return _NAMES[array.dtype.newbyteorder("<").str]
