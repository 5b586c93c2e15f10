"""What a worker is told of a model: the manifest and the leaf table that lie beside the request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_core.checkpoint.manifest import MAX_MANIFEST, LeafTable, Manifest, files_of
from merge_core.checkpoint.published import read_bounded
from merge_core.checkpoint.reader import read_recorded
from merge_core.digest import ModelId, sha256


class Claims:
    """A manifest and a leaf table, parsed when they are asked: files that are as they were need neither.

    Raises CorruptCheckpoint then, where they are not exact or do not belong together.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        self.data = read_bounded(Path(described["manifest"]), MAX_MANIFEST)
        self.model_id = ModelId(sha256(self.data))
        self._leaves = Path(described["leaves"])

    def __getitem__(self, tensor: str) -> Sequence[bytes]:
        return self.leaves[tensor]

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest, every check done."""
        return Manifest.parse(self.data)

    @cached_property
    def leaves(self) -> LeafTable:
        """The leaf table, which proves every root of the manifest."""
        return LeafTable.parse(self.manifest, read_bounded(self._leaves, LeafTable.size(self.manifest)))

    def files(self, directory: Path) -> dict[str, bytes]:
        """The functional files, once it is known that the manifest is the one that a plan names."""
        return read_recorded(directory, files_of(self.data))
