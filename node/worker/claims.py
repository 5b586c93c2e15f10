"""What a worker is told of a model: the manifest and the leaf table that lie beside the request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_core.checkpoint import merkle
from merge_core.checkpoint.manifest import MAX_MANIFEST, LeafTable, Manifest
from merge_core.checkpoint.published import read_bounded


def claims(described: Mapping[str, Any]) -> tuple[Manifest, LeafTable]:
    """Read both; raises CorruptCheckpoint where they are not what they should be."""
    manifest = Manifest.parse(read_bounded(Path(described["manifest"]), MAX_MANIFEST))
    size = merkle.DIGEST_SIZE * sum(tensor.leaf_count for tensor in manifest.tensors)
    return manifest, LeafTable.parse(manifest, read_bounded(Path(described["leaves"]), size))
