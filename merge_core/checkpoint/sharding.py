"""How tensors are divided into weight files: the same tensors and limits always give the same files.

The division is outside the ModelId; it is deterministic all the same, so that two runs of one plan can be
compared file by file and a resumed run finds its bytes where it left them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from merge_core.checkpoint.header import MAX_HEADER, Header, build_header, parse_header
from merge_core.checkpoint.published import WEIGHTS, check_names
from merge_core.checkpoint.source import TensorInfo
from merge_core.errors import CorruptCheckpoint

_ENTRY_OVERHEAD = 120
"""An upper bound on what one tensor takes in a header beside its name and shape, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One safetensors file to be: its name, the exact bytes of its header, and what they say."""

    name: str
    head: bytes
    header: Header

    @property
    def size(self) -> int:
        """The size of the whole file in bytes."""
        return self.header.file_size


def divide(
    tensors: Mapping[str, TensorInfo], *, metadata: Mapping[str, str], max_shard_bytes: int
) -> tuple[WeightFile, ...]:
    """Fill weight files with tensors in name order, each up to `max_shard_bytes` of tensor bytes.

    A larger tensor gets a file of its own. Raises ValueError where a header could not be read back.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = entries = 0
    for name in sorted(tensors):
        info = tensors[name]
        entry = len(name) + len(str(info.shape)) + _ENTRY_OVERHEAD
        if shards[-1] and (filled + info.length > max_shard_bytes or entries + entry > MAX_HEADER // 2):
            shards.append({})
            filled = entries = 0
        shards[-1][name] = info
        filled += info.length
        entries += entry
    names = _names(len(shards))
    return tuple(_weight_file(n, build_header(s, metadata)) for n, s in zip(names, shards, strict=True))


def adopt(heads: Mapping[str, bytes]) -> tuple[WeightFile, ...]:
    """The weight files that somebody else laid out: file name -> the exact bytes of its header.

    Raises CorruptCheckpoint on a malformed header, a bad name, or a tensor that lies in two files.
    """
    check_names(heads)
    files = tuple(_weight_file(name, heads[name]) for name in sorted(heads))
    seen: set[str] = set()
    for file in files:
        if not file.name.endswith(".safetensors"):
            raise CorruptCheckpoint(f"{file.name} is not the name of a weight file")
        if len(file.head) != file.header.length:
            raise CorruptCheckpoint(
                f"{file.name}: {len(file.head)} bytes where a header has {file.header.length}"
            )
        twice = seen.intersection(file.header.tensors)
        if twice:
            raise CorruptCheckpoint(f"tensor {min(twice)} lies in two weight files")
        seen.update(file.header.tensors)
    return files


def index_of(files: tuple[WeightFile, ...]) -> bytes:
    """The shard index (`model.safetensors.index.json`) of several weight files."""
    spans = {name: span for file in files for name, span in file.header.tensors.items()}
    homes = {name: file.name for file in files for name in file.header.tensors}
    value = {
        "metadata": {"total_size": sum(span.end - span.begin for span in spans.values())},
        "weight_map": {name: homes[name] for name in sorted(homes)},
    }
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _weight_file(name: str, head: bytes) -> WeightFile:
    return WeightFile(name=name, head=head, header=parse_header(head))


def _names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
