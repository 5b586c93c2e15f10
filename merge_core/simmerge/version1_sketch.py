"""The arithmetic of a fingerprint: a count sketch and norms of a group of tensors, the same bits everywhere.

Every tensor is cut into blocks of 131,072 elements (so any float type fills whole blocks from whole leaves).
Within a block a count sketch: element i is added, with a sign, to one of 256 buckets, both from a table
that is the same for all blocks. Across blocks: a sign and a rotation of the buckets, drawn from (tensor name,
block index). Estimates of inner products are unbiased, and their variance is at most about twice that of a
count sketch that hashes every element (Charikar, Chen, Farach-Colton 2002), without a hash per element.
A narrower sketch is the 256 buckets folded in halves.

Tables come from SHAKE-128 and SHA-256, every sum is fp64 in a written-down order, and no library chooses
how to add: no dot product, no reduction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from merge_core.checkpoint import merkle
from merge_core.checkpoint.source import TensorInfo, TensorSource

WIDTH = 256

_BLOCK = 1 << 17

Vector = npt.NDArray[np.float64]


class GroupSums:
    """The running sums of one group, in fp64, in the order in which blocks are added."""

    def __init__(self) -> None:
        self.elements = 0
        self.l1 = 0.0
        self.squares = 0.0
        self.largest = 0.0
        self._sketch: Vector = np.zeros(WIDTH)

    def add(self, name: str, index: int, block: Vector) -> None:
        """Add one block of at most 131,072 elements."""
        # One temporary, used three times: fresh pages cost more here than the arithmetic.
        work = np.abs(block)
        self.elements += len(block)
        self.largest = max(self.largest, float(work.max()))
        self.l1 += tree_sum(work)
        with np.errstate(over="ignore"):
            self.squares += tree_sum(np.multiply(block, block, out=work))
        buckets, signs = _tables()
        signed = np.multiply(block, signs[: len(block)], out=work)
        # bincount adds one element after the other, in order.
        counts = np.bincount(buckets[: len(block)], weights=signed, minlength=WIDTH)
        sign, rotation = _draw(name, index)
        self._sketch = self._sketch + sign * np.roll(counts, rotation)

    def sketch(self, width: int) -> Vector:
        """The sketch folded in halves down to `width` buckets, a power of two of at most WIDTH."""
        folded = self._sketch
        while len(folded) > width:
            half = len(folded) // 2
            folded = folded[:half] + folded[half:]
        return folded


def blocks(
    source: TensorSource, name: str, info: TensorInfo, on_progress: Callable[[int], None] | None
) -> Iterator[tuple[int, Vector]]:
    """The blocks of one tensor in order, as fp64."""
    index = 0
    if info.length == 0:
        return
    for leaf in range(merkle.leaf_count(info.length)):
        data = source.read(name, leaf * merkle.LEAF_SIZE, merkle.leaf_size(info.length, leaf))
        values = _as_float64(data, info.dtype)
        for start in range(0, len(values), _BLOCK):
            yield index, values[start : start + _BLOCK]
            index += 1
        if on_progress:
            on_progress(len(data))


def _as_float64(data: bytes | memoryview, dtype: str) -> Vector:
    with np.errstate(invalid="ignore"):  # a NaN is for the caller to name, with its tensor
        return _widened(data, dtype)


def _widened(data: bytes | memoryview, dtype: str) -> Vector:
    if dtype == "BF16":
        bits = np.frombuffer(data, dtype="<u2").astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).astype(np.float64)
    kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
    return np.frombuffer(data, dtype=kind).astype(np.float64)


def tree_sum(values: Vector) -> float:
    """Sum by adding the upper half onto the lower half until one value is left: an order of our own.

    As if padded with zeros to a power of two; done in place: what `values` held is lost.
    """
    count = len(values)
    while count > 1:
        half = 1 << (count - 1).bit_length() - 1
        values[: count - half] += values[half:count]
        count = half
    return float(values[0])


@lru_cache(maxsize=1)
def _tables() -> tuple[npt.NDArray[np.int64], Vector]:
    """Bucket and sign of each element of a block."""
    bits = np.frombuffer(hashlib.shake_128(b"weft fingerprint v1").digest(2 * _BLOCK), dtype="<u2")
    buckets = (bits & 0xFF).astype(np.int64)
    signs = np.where(bits & 0x100, 1.0, -1.0)
    return buckets, signs


def _draw(name: str, index: int) -> tuple[float, int]:
    """Sign and rotation of one block."""
    key = hashlib.sha256(b"weft fingerprint v1\0" + name.encode() + b"\0" + str(index).encode()).digest()
    return (1.0 if key[0] & 1 else -1.0), key[1]
