"""The Sketcher: takes the leaves of a model in any order, from any thread, and says its Structure.

    structure = compute(source)                            # reads all of a TensorSource

    sketcher = Sketcher(tensors)                           # or on the way, where the leaves pass by
    sketcher.add("model.norm.weight", 0, data)
    structure = sketcher.finish()

What is added is measured at once and forgotten: a few MiB, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.checkpoint import dtypes, merkle
from merge_core.checkpoint.source import TensorInfo, TensorSource
from merge_core.digest import Digest, canonical, sha256
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.simmerge.structural.sketch import (
    BLOCK,
    MAX_BLOCKS,
    WIDTH,
    Measure,
    Sums,
    Total,
    as_stored,
    draws,
    sketch_of,
    widened,
)
from merge_core.simmerge.structural.structure import (
    LARGEST,
    Group,
    GroupKey,
    LayerNorms,
    Structure,
    grouped,
    is_measured,
    layer_rows,
    sampled,
)

Floats = npt.NDArray[np.float32]


def compute(
    source: TensorSource, *, measure: Measure | None = None, on_progress: Callable[[int], None] | None = None
) -> Structure:
    """Sketch a model in one pass over its leaves.

    `on_progress` gets the bytes read since its last call. Raises as `Sketcher` and `source.read` do.
    """
    sketcher = Sketcher(source.tensors, measure=measure)
    for name, info in source.tensors.items():
        for leaf in range(merkle.leaf_count(info.length) if is_measured(info) else 0):
            offset = leaf * merkle.LEAF_SIZE
            data = source.read(name, offset, merkle.leaf_size(info.length, leaf))
            sketcher.add(name, offset, data)
            if on_progress:
                on_progress(len(data))
    return sketcher.finish()


class Sketcher:
    """The sums of one model in the making.

    `measure` is `sketch.formula` or, the same bits many times as fast, `kernels.measure`: the default, which
    loads numba.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], *, measure: Measure | None = None) -> None:
        """Prepare for a model; raises Unmergeable where it has no floating-point tensor, or too many."""
        self._measure = measure or _compiled()
        self._lock = Lock()
        self._infos = dict(tensors)
        groups = grouped(tensors)
        if not groups:
            raise Unmergeable("the model has no floating-point tensor", hint="export it unquantised")
        rows = layer_rows(tensors)
        self._layers = {row: _Layer() for row in sorted(set(rows.values()))}
        self._groups: dict[GroupKey, _Group] = {}
        self._tensors: dict[str, _Tensor] = {}
        for key, names in groups.items():
            counts = [prod(tensors[name].shape) for name in names]
            shapes = sha256(canonical([[name, list(tensors[name].shape)] for name in names]))
            group = self._groups[key] = _Group(shapes, sum(counts), len(groups))
            for name, count, (coordinates, at) in zip(names, counts, group.parts(counts), strict=True):
                row = rows.get(name)
                layer = None if row is None else self._layers[row]
                self._tensors[name] = _Tensor(
                    count, group, layer, coordinates, at, bytearray(-(-count // BLOCK))
                )
        if sum(len(tensor.seen) for tensor in self._tensors.values()) > MAX_BLOCKS:
            raise Unmergeable(f"the model has more than {MAX_BLOCKS} blocks of weights")

    def add(self, tensor: str, offset: int, data: bytes | memoryview) -> None:
        """Take bytes of a tensor in: whole blocks of 131,072 elements (so, whole leaves), or up to its end.

        What is not measured is passed over. Raises KeyError on a tensor that the model has not, ValueError on
        any other piece and on one that was added before; CorruptCheckpoint on NaN, infinity, and weights too
        large to measure.
        """
        info = self._infos[tensor]
        if tensor not in self._tensors or not data:
            return
        found, stored = self._tensors[tensor], as_stored(data, info.dtype)
        start, rest = divmod(offset, dtypes.SIZES[info.dtype])
        first, beside = divmod(start, BLOCK)
        end = start + len(stored)
        if (
            rest
            or beside
            or start < 0
            or not (end == found.count or (end < found.count and end % BLOCK == 0))
        ):
            raise ValueError(f"bytes {offset} to {offset + len(data)} of {tensor} are not whole blocks")
        blocks = -(-len(stored) // BLOCK)
        sums = self._measure(stored, draws(tensor, first, blocks))
        _require_sound(tensor, stored, sums)
        with self._lock:
            if any(found.seen[first : first + blocks]):
                raise ValueError(f"bytes {offset} to {offset + len(data)} of {tensor} came twice")
            found.seen[first : first + blocks] = b"\1" * blocks
            found.add(start, stored, sums)

    @property
    def is_whole(self) -> bool:
        """Whether all of the model was added."""
        return all(all(tensor.seen) for tensor in self._tensors.values())

    def finish(self) -> Structure:
        """What all of it adds up to.

        Raises ValueError where some is missing, CorruptCheckpoint where it is too large to be written.
        """
        if not self.is_whole:
            missing = next(name for name, tensor in self._tensors.items() if not all(tensor.seen))
            raise ValueError(f"some of {missing} was not added")
        return Structure(
            groups=tuple(group.told(key) for key, group in self._groups.items()),
            layers=tuple(layer.told(*row) for row, layer in self._layers.items()),
        )


class _Norms:
    """Exact sums of magnitudes and of block sums of squares."""

    def __init__(self) -> None:
        self._l1, self._squares, self._largest = Total(), Total(), 0.0

    def add(self, sums: Sums) -> None:
        for l1, squares in zip(sums.l1.tolist(), sums.squares.tolist(), strict=True):
            self._l1.add(l1)
            self._squares.add(squares)
        self._largest = max(self._largest, sums.largest)

    def told(self, what: str) -> dict[str, float]:
        if self._largest > LARGEST:
            raise _too_large(what)
        try:
            return {
                "l1": float(self._l1),
                "l2": math.sqrt(float(self._squares)),
                "largest": self._largest,
            }
        except OverflowError as error:
            raise _too_large(what) from error


class _Layer:
    def __init__(self) -> None:
        self.elements = 0
        self.norms = _Norms()

    def told(self, layer: int, role: str) -> LayerNorms:
        norms = self.norms.told(f"layer {layer}")
        with np.errstate(over="ignore"):
            rounded = {name: float(np.float32(value)) for name, value in norms.items()}
        if not math.isfinite(rounded["l1"]):
            raise _too_large(f"layer {layer}")
        return LayerNorms(layer=layer, role=role, elements=self.elements, **rounded)


class _Group:
    """Norms, limbs and the sample of one group."""

    def __init__(self, shapes: Digest, elements: int, groups: int) -> None:
        size, has_sketch = sampled(elements, groups)
        self.shapes, self.elements = shapes, elements
        self.norms = _Norms()
        self.limbs = np.zeros((2, WIDTH), np.int64) if has_sketch else None
        self.coordinates = _coordinates(shapes, elements, size)
        self.sample: Floats = np.zeros(len(self.coordinates), np.float32)

    def parts(self, counts: Sequence[int]) -> list[tuple[npt.NDArray[np.int64], int]]:
        """Of each tensor the sampled coordinates within it, and where their values go in the sample."""
        starts = list(accumulate(counts, initial=0))
        cuts = np.searchsorted(self.coordinates, starts).tolist()
        return [(self.coordinates[cuts[i] : cuts[i + 1]] - starts[i], cuts[i]) for i in range(len(counts))]

    def told(self, key: GroupKey) -> Group:
        sketch = np.zeros(0, np.float32) if self.limbs is None else sketch_of(self.limbs)
        if not ((np.abs(sketch) <= LARGEST).all() and (np.abs(self.sample) <= LARGEST).all()):
            raise _too_large(str(key))
        return Group(
            key=key,
            elements=self.elements,
            shapes=self.shapes,
            sketch=sketch,
            sample=self.sample,
            **self.norms.told(str(key)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """Where the parts of one tensor go."""

    count: int
    group: _Group
    layer: _Layer | None
    coordinates: npt.NDArray[np.int64]
    at: int
    seen: bytearray

    def add(self, start: int, stored: npt.NDArray[Any], sums: Sums) -> None:
        """Add elements from `start` on, whose sums these are."""
        self.group.norms.add(sums)
        if self.group.limbs is not None:
            self.group.limbs += sums.limbs
        if self.layer is not None:
            self.layer.norms.add(sums)
            self.layer.elements += len(stored)
        first, last = np.searchsorted(self.coordinates, (start, start + len(stored))).tolist()
        with np.errstate(over="ignore"):
            values = widened(stored[self.coordinates[first:last] - start]).astype(np.float32)
        self.group.sample[self.at + first : self.at + last] = values


def _compiled() -> Measure:
    from merge_core.simmerge.structural.kernels import measure

    return measure


def _coordinates(shapes: Digest, elements: int, count: int) -> npt.NDArray[np.int64]:
    """One place in each of `count` equal runs of a group's elements, drawn for its shapes; all if as many.

    Runs instead of places anywhere: every tensor has its share, and no place comes twice.
    """
    if count == elements:
        return np.arange(elements)
    bits = np.frombuffer(
        hashlib.shake_128(b"weft sample v2\0" + shapes.encode()).digest(8 * count), dtype="<u8"
    )
    edges = np.arange(count + 1, dtype=np.uint64) * np.uint64(elements) // np.uint64(count)
    drawn: npt.NDArray[np.int64] = (edges[:-1] + bits % np.diff(edges)).astype(np.int64)
    return drawn


def _require_sound(tensor: str, stored: npt.NDArray[Any], sums: Sums) -> None:
    """Raise CorruptCheckpoint unless all was finite, and small enough to be added."""
    if np.isfinite(sums.squares).all() and np.isfinite(sums.l1).all() and sums.fits:
        return
    if not np.isfinite(widened(stored)).all():
        raise CorruptCheckpoint(f"tensor {tensor} holds NaN or infinity", hint="export it again")
    raise _too_large(tensor)


def _too_large(what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"the weights of {what} are too large to measure", hint="export it again")
