"""The Fingerprint: a model's structure and, where it could be run, its behaviour, in at most 256 KiB.

The bytes are a safetensors file: the arrays of both parts under `structure.` and `behaviour.`, and one entry
of metadata, canonical JSON with the rest. Both parts give `described()` and `arrays()`, and have a `read`
that takes the two, strictly (ValueError). The structure is exact, the behaviour a measurement.

Law: `Fingerprint.parse(data).to_bytes() == data`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy.typing as npt

from merge_core.digest import Digest, ModelId, check_version, sha256
from merge_core.errors import CorruptCheckpoint
from merge_core.simmerge import container
from merge_core.simmerge.container import Arrays
from merge_core.simmerge.functional.behaviour import Behaviour
from merge_core.simmerge.structural.structure import Structure

VERSION = 2
MAX_FINGERPRINT = 256 << 10

_METADATA = "fingerprint"


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
        data = container.write(told, arrays, name=_METADATA)
        if len(data) > MAX_FINGERPRINT:
            raise CorruptCheckpoint(f"the fingerprint takes {len(data)} bytes of {MAX_FINGERPRINT}")
        return data

    @classmethod
    def parse(cls, data: bytes) -> Fingerprint:
        """Read a fingerprint from anybody; raises CorruptCheckpoint on whatever is not exact."""
        if len(data) > MAX_FINGERPRINT:
            raise CorruptCheckpoint(f"a fingerprint of {len(data)} bytes; at most {MAX_FINGERPRINT} are read")
        try:
            told, found_arrays = container.read(data, name=_METADATA)
            arrays = _parts(found_arrays)
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


def _parts(arrays: Arrays) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """The arrays of both parts, by the names that these have for them."""
    parts: dict[str, dict[str, npt.NDArray[Any]]] = {"structure": {}, "behaviour": {}}
    for name, array in arrays.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = array
    return parts


def _named(part: str, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
    return {f"{part}.{name}": array for name, array in arrays.items()}
