"""HashCache: the leaf digests of checkpoints that were hashed before, so that nobody hashes 16 GB twice.

The key is where each weight file lies and what identifies its contents without reading them: path and stamp,
in which the time of the last change of whatever kind (ctime) moves with every byte and cannot be set. Only
leaf digests are kept; small files are read again each time. The folder may be deleted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from merge_core import files
from merge_core.checkpoint import merkle
from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import Checkpoint, Measured, file_record, measure, tensor_record
from merge_core.digest import canonical, sha256

MAX_ENTRIES = 512


class HashCache:
    """One file per checkpoint, the oldest dropped beyond MAX_ENTRIES; None as a folder keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def measure(
        self, checkpoint: Checkpoint, *, threads: int = 2, on_progress: Callable[[int], None] | None = None
    ) -> Measured:
        """`merge_core.checkpoint.reader.measure`, without the hashing where that was done before."""
        known = self._recall(checkpoint)
        if known is not None:
            if on_progress:
                on_progress(sum(info.length for info in checkpoint.tensors.values()))
            return known
        measured = measure(checkpoint, threads=threads, on_progress=on_progress)
        self.remember(checkpoint, measured.leaves)
        return measured

    def remember(self, checkpoint: Checkpoint, leaves: LeafTable) -> None:
        """Keep the digests of a checkpoint; a full disk is no reason to fail."""
        if self._folder is None:
            return
        data = leaves.to_bytes()
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            files.replace(self._path(checkpoint), hashlib.sha256(data).digest() + data)
            self._drop_oldest()

    def _recall(self, checkpoint: Checkpoint) -> Measured | None:
        if self._folder is None:
            return None
        expected = {name: merkle.leaf_count(info.length) for name, info in checkpoint.tensors.items()}
        size = merkle.DIGEST_SIZE * (1 + sum(expected.values()))
        try:
            with self._path(checkpoint).open("rb") as file:
                data = file.read(size + 1)
        except OSError:
            return None
        if len(data) != size or hashlib.sha256(data[merkle.DIGEST_SIZE :]).digest() != data[:32]:
            return None
        leaves: dict[str, list[bytes]] = {}
        at = merkle.DIGEST_SIZE
        for name, count in expected.items():
            end = at + count * merkle.DIGEST_SIZE
            leaves[name] = [data[i : i + merkle.DIGEST_SIZE] for i in range(at, end, merkle.DIGEST_SIZE)]
            at = end
        return Measured(manifest=_manifest(checkpoint, leaves), leaves=LeafTable(leaves))

    def _path(self, checkpoint: Checkpoint) -> Path:
        assert self._folder is not None
        stamps = [[name, *map(str, stamp)] for name, stamp in sorted(checkpoint.stamps.items())]
        return self._folder / sha256(canonical([os.fsdecode(checkpoint.path.absolute()), stamps])).hex

    def _drop_oldest(self) -> None:
        assert self._folder is not None
        entries = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in entries[:-MAX_ENTRIES]:
            path.unlink(missing_ok=True)


def _manifest(checkpoint: Checkpoint, leaves: dict[str, list[bytes]]) -> Manifest:
    return Manifest(
        architecture=checkpoint.architecture,
        files=tuple(file_record(name, data) for name, data in checkpoint.functional_files().items()),
        tensors=tuple(tensor_record(name, info, leaves[name]) for name, info in checkpoint.tensors.items()),
    )
