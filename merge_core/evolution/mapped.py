"""MappedSource: the tensors of a checkpoint as pages of its files, which all processes of a machine share.

A merge streams every weight once and reads into buffers that it uses again. Candidates are made of the same
weights many times over: here nothing is copied but what does not lie as kernels need it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from merge_core.checkpoint import dtypes, merkle
from merge_core.checkpoint.manifest import LeafTable
from merge_core.checkpoint.reader import Checkpoint, FileStamp
from merge_core.checkpoint.source import ResidentSource, TensorInfo
from merge_core.errors import CorruptCheckpoint


class MappedSource(ResidentSource):
    """A TensorSource over a checkpoint that stays as it is: a file written to meanwhile is refused."""

    def __init__(
        self, checkpoint: Checkpoint, leaves: LeafTable, *, hashed: Collection[FileStamp] = ()
    ) -> None:
        """Map an open checkpoint, which the caller closes, and hash what `hashed` does not vouch for.

        Raises CorruptCheckpoint where bytes are not those of the leaf table.
        """
        self._checkpoint = checkpoint
        self._stamps = {name: checkpoint.stamp(name) for name in checkpoint.tensors}
        self._one_of_each_file = {(s.device, s.inode): name for name, s in self._stamps.items()}.values()
        self._views = {name: checkpoint.view(name) for name in checkpoint.tensors}
        for name, stamp in self._stamps.items():
            if stamp not in hashed:
                self._verify(name, leaves)
            if not _fits(self._views[name], checkpoint.tensors[name].dtype):
                self._views[name] = memoryview(bytearray(self._views[name]))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, sorted by name."""
        return self._checkpoint.tensors

    def read(self, tensor: str, offset: int, length: int, into: memoryview | None = None) -> memoryview:
        """The bytes where they lie; `into` stays as it is. Raises CorruptCheckpoint if the file changed."""
        view = self._views[tensor]
        if not 0 <= offset <= offset + length <= len(view):
            raise ValueError(f"bytes {offset} to {offset + length} of {tensor}, which has {len(view)}")
        self._expect_unchanged(tensor)
        return view[offset : offset + length]

    def view(self, tensor: str) -> memoryview:
        """All of a tensor where it lies; whoever has looked at it calls `expect_unchanged` afterwards."""
        return self._views[tensor]

    def expect_unchanged(self) -> None:
        """Raise CorruptCheckpoint if a file was written to since this was made."""
        for tensor in self._one_of_each_file:
            self._expect_unchanged(tensor)

    def _expect_unchanged(self, tensor: str) -> None:
        if self._checkpoint.stamp(tensor) != self._stamps[tensor]:
            raise CorruptCheckpoint(
                f"{self._checkpoint.path} was written to while it was read", hint="weft verify DIR"
            )

    def _verify(self, name: str, leaves: LeafTable) -> None:
        view = self._views[name]
        try:
            expected = leaves[name]
        except KeyError:
            expected = ()
        found = [
            merkle.leaf_digest(view[i * merkle.LEAF_SIZE : (i + 1) * merkle.LEAF_SIZE])
            for i in range(merkle.leaf_count(len(view)))
        ]
        if found != list(expected):
            raise CorruptCheckpoint(
                f"{self._checkpoint.path}: {name} is not what was published",
                hint=f"weft verify {self._checkpoint.path}",
            )


def _fits(view: memoryview, dtype: str) -> bool:
    """Whether elements begin where the machine reads them best, as vector code demands."""
    import numpy as np

    return len(view) == 0 or np.frombuffer(view, np.uint8).ctypes.data % dtypes.SIZES[dtype] == 0
