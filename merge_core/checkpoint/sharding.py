"""How tensors are divided into weight files: the same tensors and limits always give the same files.

The division is outside the ModelId; it is deterministic all the same, so that two runs of one plan can be
compared file by file and a resumed run finds its bytes where it left them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from merge_core.checkpoint.header import MAX_HEADER, Header, build_header
from merge_core.checkpoint.published import WEIGHTS
from merge_core.checkpoint.source import TensorInfo

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
    built = [build_header(shard, metadata) for shard in shards]
    return tuple(
        WeightFile(name=name, head=head, header=header)
        for name, (head, header) in zip(names, built, strict=True)
    )


def index_of(files: tuple[WeightFile, ...]) -> bytes:
    """The shard index (`model.safetensors.index.json`) of several weight files."""
    spans = {name: span for file in files for name, span in file.header.tensors.items()}
    homes = {name: file.name for file in files for name in file.header.tensors}
    value = {
        "metadata": {"total_size": sum(span.end - span.begin for span in spans.values())},
        "weight_map": {name: homes[name] for name in sorted(homes)},
    }
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
