"""Embeddings with the rows of the output: a TensorSource for each operand of a tensor with a row per token.

Rows are gathered as they are read, in float32, so that an average is rounded once, with the result; a tensor
that is only copied keeps its type. What is read of the models is kept for a moment, in leaves, since rows
that follow each other in the output mostly do so there too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
from numpy.typing import NDArray

from merge_core.checkpoint import dtypes, merkle
from merge_core.checkpoint.source import TensorInfo, TensorSource
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.operators import COPY, convert
from merge_core.plan import Operand, Step, TensorPlan
from merge_core.tokenizer.plan import MAX_WIDTH
from merge_core.tokenizer.rows import AVERAGE, NO_TOKEN, ZERO, Index, Owner, Rows, map_rows
from merge_core.tokenizer.union import Files, Tokenizers

_LEAVES = 64
"""Leaves of the models that are kept."""
_BLOCK = 32
"""Rows that are summed by halves; a power of two."""

Raw = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Alignment:
    """The tensors of one step that have a row for each token, and what their operands read from."""

    def __init__(self, step: Step, sources: Sequence[TensorSource], files: Sequence[Files]) -> None:
        """`sources` and `files` are those that the step may take from, in the plan's order."""
        assert step.tokenizer is not None
        self._plan = step.tokenizer
        self._base = step.base
        self._sources = sources
        self._tokenizers = Tokenizers(step.tokenizer, files)
        self._leaves = _Leaves(sources)
        self._lock = threading.Lock()
        self._made: dict[str, tuple[TensorSource, ...]] = {}

    def operands(self, planned: TensorPlan) -> Sequence[TensorSource]:
        """The sources of a tensor's operands, with the output's rows where it has one for each token.

        Raises CorruptCheckpoint where a model lacks the tensor.
        """
        if planned.name not in self._plan.tensors:
            return [self._sources[operand.source] for operand in planned.operands]
        with self._lock:
            if planned.name not in self._made:
                aligned = _Aligned(self, planned)
                self._made[planned.name] = tuple(_View(aligned, n) for n in range(len(planned.operands)))
            return self._made[planned.name]

    def stored(self, operand: Operand) -> TensorInfo:
        """The type and shape of an operand as its model has it."""
        info = self._sources[operand.source].tensors.get(operand.tensor)
        if info is None or not info.shape or prod(info.shape[1:]) > MAX_WIDTH:
            raise CorruptCheckpoint(
                f"source {operand.source} of the plan has no {operand.tensor} with a row for each token",
                hint="weft plan RECIPE",
            )
        return info

    def map(self, operands: Sequence[Operand]) -> Rows:
        """Where the rows of a tensor come from; reads the tokenizers."""
        owners = [
            Owner(source=o.source, tokens=self._tokenizers.of(o.source).ids, rows=self.stored(o).shape[0])
            for o in operands
        ]
        output = self._tokenizers.vocabulary.ids
        return map_rows(output, self._plan.rows, owners, self._base, self._plan.rules)

    def read(self, operand: Operand, begin: int, out: memoryview) -> None:
        """Fill `out` with the bytes of an operand from `begin` on."""
        self._leaves.read(operand, begin, out)

    @property
    def rows(self) -> int:
        """The number of rows of the output."""
        return self._plan.rows


class _Aligned:
    """One tensor: the rows of its operands as they are stored, and those that no model has."""

    def __init__(self, alignment: Alignment, planned: TensorPlan) -> None:
        self._alignment = alignment
        self._operands = planned.operands
        self._stored = [alignment.stored(operand) for operand in planned.operands]
        self._copied = planned.operator == COPY.name
        self._lock = threading.RLock()
        self._rows: Rows | None = None
        self._means: dict[int, Floats] = {}

    def info(self, operand: int) -> TensorInfo:
        """What the view of an operand looks like."""
        stored = self._stored[operand]
        dtype = stored.dtype if self._copied or stored.dtype not in dtypes.MERGEABLE else "F32"
        return TensorInfo(dtype=dtype, shape=(self._alignment.rows, *stored.shape[1:]))

    def name(self, operand: int) -> str:
        """The name of an operand in its model."""
        return self._operands[operand].tensor

    def raw(self, operand: int, first: int, stop: int) -> Raw:
        """Rows of a view as bytes of its type, one row each."""
        dtype = self.info(operand).dtype
        if dtype == "F32":
            return self.floats(operand, first, stop).view(np.uint8)
        origin, row = self._map().taken(operand, first, stop)
        out = np.zeros((stop - first, self._row_bytes(operand)), np.uint8)
        for taken in self._from_models(origin):
            self._gather(taken, row, np.flatnonzero(origin == taken), out)
        lost = origin == NO_TOKEN
        if lost.any():
            if dtype not in dtypes.MERGEABLE:
                raise Unmergeable(
                    f"{self.name(operand)} is {dtype}: rows that no token has cannot be made",
                    hint="leave out pad_to_multiple_of, then: weft plan RECIPE",
                )
            mean = np.empty(out.shape[1] // dtypes.SIZES[dtype], convert.elements(b"", dtype).dtype)
            convert.narrow(self._mean(operand), dtype, mean)
            out[lost] = mean.view(np.uint8)
        return out

    def floats(self, operand: int, first: int, stop: int, *, padded: bool = True) -> Floats:
        """Rows of a view as float32; those of no token only when `padded`."""
        rows = self._map()
        origin, row = rows.taken(operand, first, stop)
        if origin[0] >= 0 and (origin == origin[0]).all():
            return self._widened(int(origin[0]), row)
        out = np.zeros((stop - first, self._width(operand)), np.float32)
        for taken in self._from_models(origin):
            where = np.flatnonzero(origin == taken)
            out[where] = self._widened(taken, row[where])
        where = np.flatnonzero(origin == AVERAGE)
        if len(where):
            out[where] = self._average(rows, first + where)
        if padded and (origin == NO_TOKEN).any():
            out[origin == NO_TOKEN] = self._mean(operand)
        return out

    def _average(self, rows: Rows, which: Index) -> Floats:
        """The mean over the models that have a token, added in their order."""
        total = np.zeros((len(which), self._width(0)), np.float32)
        count = np.zeros((len(which), 1), np.float32)
        for operand, own in enumerate(rows.own):
            has = np.flatnonzero(own[which] >= 0)
            total[has] += self._widened(operand, own[which[has]])
            count[has] += np.float32(1)
        return total / count

    def _mean(self, operand: int) -> Floats:
        """The mean of all rows that belong to tokens, summed in float64 by a fixed tree, block by block."""
        with self._lock:
            if operand not in self._means:
                rows = self._map()
                total = np.zeros(self._width(operand), np.float64)
                for first in range(0, len(rows.origin), _BLOCK):
                    stop = min(first + _BLOCK, len(rows.origin))
                    total += _folded(self.floats(operand, first, stop, padded=False))
                counted = np.float64((rows.taken(operand, 0, len(rows.origin))[0] != NO_TOKEN).sum())
                self._means[operand] = (total / counted).astype(np.float32)
            return self._means[operand]

    def _widened(self, operand: int, rows: Index) -> Floats:
        """Rows of an operand as float32."""
        dtype = self._stored[operand].dtype
        raw = np.empty((len(rows), self._row_bytes(operand)), np.uint8)
        self._gather(operand, rows, np.arange(len(rows)), raw)
        stored = convert.elements(raw.reshape(-1).data, dtype)
        out = np.empty(len(stored), np.float32)
        return convert.widen(stored, dtype, out).reshape(len(rows), self._width(operand))

    def _gather(self, operand: int, rows: Index, where: Index, out: Raw) -> None:
        """Copy `rows[where]` of an operand into `out[where]`, runs at once, in the operand's order."""
        where = where[np.argsort(rows[where], kind="stable")]
        size = self._row_bytes(operand)
        flat = out.reshape(-1).data
        for start, stop in _runs(rows[where], where):
            target = flat[where[start] * size : (where[stop - 1] + 1) * size]
            self._alignment.read(self._operands[operand], int(rows[where[start]]) * size, target)

    def _from_models(self, origin: Index) -> Iterator[int]:
        return (int(taken) for taken in np.unique(origin) if taken > ZERO)

    def _width(self, operand: int) -> int:
        return prod(self._stored[operand].shape[1:])

    def _row_bytes(self, operand: int) -> int:
        return self._width(operand) * dtypes.SIZES[self._stored[operand].dtype]

    def _map(self) -> Rows:
        with self._lock:
            if self._rows is None:
                self._rows = self._alignment.map(self._operands)
            return self._rows


@dataclass(frozen=True, slots=True)
class _View:
    """One operand of an aligned tensor, as a source that has nothing else."""

    aligned: _Aligned
    operand: int

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {self.aligned.name(self.operand): self.aligned.info(self.operand)}

    def read(self, tensor: str, offset: int, length: int, into: memoryview | None = None) -> memoryview:
        """Some bytes of the rows; they come from verified leaves."""
        info = self.tensors[tensor]
        row = info.length // info.shape[0]
        view = memoryview(bytearray(length)) if into is None else into.cast("B")[:length]
        if row and view:
            first, end = offset // row, offset + length
            rows = self.aligned.raw(self.operand, first, -(-end // row))
            np.frombuffer(view, np.uint8)[:] = rows.reshape(-1)[offset - first * row : end - first * row]
        return view


class _Leaves:
    """The leaves of several sources that were read last, for all threads."""

    def __init__(self, sources: Sequence[TensorSource]) -> None:
        self._sources = sources
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[Operand, int], memoryview] = OrderedDict()

    def read(self, operand: Operand, begin: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a tensor from `begin` on."""
        done = 0
        while done < len(out):
            leaf, skip = divmod(begin + done, merkle.LEAF_SIZE)
            part = self._leaf(operand, leaf)[skip : skip + len(out) - done]
            if not part:
                raise CorruptCheckpoint(f"{operand.tensor} is shorter than its shape says")
            out[done : done + len(part)] = part
            done += len(part)

    def _leaf(self, operand: Operand, leaf: int) -> memoryview:
        with self._lock:
            held = self._held.get((operand, leaf))
            if held is not None:
                self._held.move_to_end((operand, leaf))
                return held
        # Two threads may read the same leaf: that is cheaper than to wait for each other.
        source = self._sources[operand.source]
        size = merkle.leaf_size(source.tensors[operand.tensor].length, leaf)
        own = memoryview(bytearray(size))
        data = source.read(operand.tensor, leaf * merkle.LEAF_SIZE, size, into=own)
        with self._lock:
            self._held[operand, leaf] = held = memoryview(data)
            while len(self._held) > _LEAVES:
                self._held.popitem(last=False)
        return held


def _runs(rows: Index, where: Index) -> list[tuple[int, int]]:
    """Where both rows and places go up by one, as (start, stop)."""
    if not len(rows):
        return []
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(where) != 1)) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    return list(pairwise(edges))


def _folded(rows: Floats) -> NDArray[np.float64]:
    """The sum of at most _BLOCK rows in float64, by halves, missing ones counted as zeros."""
    total = np.zeros((_BLOCK, rows.shape[1]), np.float64)
    total[: len(rows)] = rows
    while len(total) > 1:
        half = len(total) // 2
        total = total[:half] + total[half:]
    folded: NDArray[np.float64] = total[0]
    return folded
