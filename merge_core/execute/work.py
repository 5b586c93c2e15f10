"""Work: one tensor of a plan, measured and computed in pieces of whole leaves.

A piece is read into memory that its thread uses again, computed, and narrowed into the output. Where an
operator wants whole rows a piece reads as much further as its first and last row reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from merge_core.checkpoint import dtypes, merkle
from merge_core.checkpoint.finite import finite
from merge_core.checkpoint.source import ResidentSource, TensorInfo, TensorSource
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.execute.pool import Pool
from merge_core.memory import CHUNK_ELEMENTS, held
from merge_core.operators import COPY, convert, find
from merge_core.operators.base import Array, Chunk, Orders, Stored, Traced
from merge_core.operators.scratch import scratch
from merge_core.plan import TensorPlan

T = TypeVar("T")
Observe = Callable[[str, int, Sequence[Stored], Array], None]
"""Called in the thread that computes, with the tensor, the piece, its operands and the output."""


class Work:
    """One tensor of a plan; it is the Stream that its operator measures.

    `sources` and `keys` belong to the operands, `depth` tells apart works that compute inside each other.
    """

    def __init__(
        self,
        tensor: TensorPlan,
        sources: Sequence[TensorSource],
        *,
        keys: Sequence[int],
        depth: int = 0,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        if chunk_elements < CHUNK_ELEMENTS or chunk_elements % CHUNK_ELEMENTS:
            raise ValueError(f"a chunk is a multiple of {CHUNK_ELEMENTS} elements")
        self.tensor = tensor
        self.leaves = merkle.leaf_count(tensor.info.length)
        self._size = dtypes.SIZES[tensor.dtype]
        self.length = tensor.info.length // self._size
        self._operator = find(tensor.operator)
        self._copied = self._operator is COPY
        self._operands = [
            (operand.tensor, source, source.tensors[operand.tensor].dtype)
            for operand, source in zip(tensor.operands, sources, strict=True)
        ]
        self._patterns = all(dtype == "BF16" for _, _, dtype in self._operands)
        self._keys = tuple(keys)
        self._resident = self._in_memory()
        self._depth = depth
        self._row = tensor.row
        self._chunk = chunk_elements
        self.leaves_per_piece = 1 if self._copied else chunk_elements * self._size // merkle.LEAF_SIZE
        self.pieces = -(-self.leaves // self.leaves_per_piece)

    @property
    def lasts(self) -> bool:
        """Whether `vary` may be called: nothing that is read moves, and nothing is left to chance."""
        return self._resident is not None and not self._operator.chance

    def vary(self, tensor: TensorPlan) -> None:
        """Go on with the plan of the same tensor that differs in parameters alone."""
        self.tensor = tensor

    # -- measuring -----------------------------------------------------------------------------------

    def measure(self, pool: Pool, orders: Orders | None = None) -> Traced:
        """What the operator must know of the whole tensor; empty where that is nothing."""
        if self._operator.measure is None:
            return {}
        self._hold()
        try:
            return self._operator.measure(_Stream(self, pool, orders), self.tensor.parameters)
        except Unmergeable as error:
            raise Unmergeable(f"{self.tensor.name}: {error.why}", hint=error.hint) from error

    def chunk(self, piece: int) -> Chunk:
        """A piece of every operand."""
        start = piece * self._chunk
        start, stop = self._rows_around(start, min(start + self._chunk, self.length))
        return Chunk(arrays=self._read(start, stop), start=start, row=self._row, keys=self._keys)

    # -- computing -----------------------------------------------------------------------------------

    def piece_bytes(self, piece: int) -> int:
        """How long a piece of the output is."""
        start = piece * self.leaves_per_piece * merkle.LEAF_SIZE
        return min(self.leaves_per_piece * merkle.LEAF_SIZE, self.tensor.info.length - start)

    def compute(self, piece: int, traced: Traced, out: memoryview, *, observe: Observe | None = None) -> bool:
        """Write one piece of the output into `out`; whether all of it is finite."""
        see = partial(observe, self.tensor.name, piece) if observe else None
        return self.fill(out, piece * self.leaves_per_piece * merkle.LEAF_SIZE, traced, see=see)

    def fill(
        self,
        out: memoryview,
        offset: int,
        traced: Traced,
        *,
        see: Callable[[Sequence[Stored], Array], None] | None = None,
    ) -> bool:
        """Fill `out` with the output from byte `offset` on; whether all of it is finite."""
        if self._copied:
            (name, source, _), *_ = self._operands
            data = source.read(name, offset, len(out), into=out)
            if memoryview(data).obj is not out.obj:  # the source has it in memory of its own
                out[:] = data
            return finite(out, self.tensor.dtype)
        stored = convert.elements(out, self.tensor.dtype)
        first = offset // self._size
        start, stop = self._rows_around(first, first + len(stored))
        chunk = Chunk(arrays=self._read(start, stop), start=start, row=self._row, keys=self._keys)
        if self._operator.compiled and self.tensor.dtype == "F32" and len(chunk) == len(stored):
            sound = self._operator.compiled(chunk, self.tensor.parameters, traced, stored)
            if see:
                see(chunk.arrays, stored)
            return bool(sound) or convert.seal(stored)
        own = slice(first - start, first - start + len(stored))
        values = self._apply(chunk, traced)[own]
        if see:
            see([array[own] for array in chunk.arrays], values)
        return convert.narrow(values, self.tensor.dtype, stored)

    def digests(
        self,
        traced: Traced,
        pool: Pool,
        store: Callable[[int, memoryview, bool], None] | None = None,
        observe: Observe | None = None,
    ) -> Iterator[list[bytes]]:
        """The leaf digests of the output, piece by piece; `store` gets (piece, data, is it finite)."""

        def produce(piece: int) -> list[bytes]:
            out = scratch(f"output {self._depth}", self.piece_bytes(piece), np.uint8).data
            sound = self.compute(piece, traced, out, observe=observe)
            if store:
                store(piece, out, sound)
            return leaf_digests(out)

        return pool.ordered(produce, self.pieces)

    def damaged(self, piece: int) -> int | None:
        """The operand with NaN or infinity in a piece; None where all hold numbers."""
        if self._copied:
            (name, source, _), *_ = self._operands
            data = source.read(name, piece * merkle.LEAF_SIZE, self.piece_bytes(piece))
            return None if finite(data, self.tensor.dtype) else 0
        arrays = enumerate(self.chunk(piece).arrays)
        return next((index for index, array in arrays if not convert.finite(array)), None)

    def check(self, claimed: Sequence[bytes], load: Callable[[int, int], bytes], pool: Pool) -> bool:
        """Whether the bytes that `load(offset, length)` gives have the claimed leaf digests."""

        def holds(index: int) -> bool:
            size = merkle.leaf_size(self.tensor.info.length, index)
            return merkle.leaf_digest(load(index * merkle.LEAF_SIZE, size)) == claimed[index]

        return all(pool.ordered(holds, self.leaves))

    # -- the pieces of both --------------------------------------------------------------------------

    def _hold(self) -> None:
        """From now on read every operand once, where all of them are small enough to stay in memory."""
        size = sum(source.tensors[name].length for name, source, _ in self._operands)
        if self.pieces > 1 and self._resident is None and held(self.tensor, size):
            self._operands = [
                (name, _Held(source, name, f"held {self._depth}.{index}"), dtype)
                for index, (name, source, dtype) in enumerate(self._operands)
            ]

    def _apply(self, chunk: Chunk, traced: Traced) -> Array:
        """The output for a chunk, as float32."""
        if self._operator.compiled is None:
            values: Array = self._operator.apply(chunk, self.tensor.parameters, traced).contiguous().numpy()
            return values
        out = scratch(f"result {self._depth}", len(chunk), np.float32)
        self._operator.compiled(chunk, self.tensor.parameters, traced, out)
        return out

    def _rows_around(self, first: int, end: int) -> tuple[int, int]:
        """The elements that are needed for `first` to `end`: with the rest of their rows if rows matter."""
        if not self._operator.rows:
            return first, end
        return first // self._row * self._row, -(-end // self._row) * self._row

    def _in_memory(self) -> tuple[Stored, ...] | None:
        """All of every operand, where sources have them in memory as kernels take them."""
        arrays = []
        for name, source, dtype in self._operands:
            if dtype != ("BF16" if self._patterns else "F32") or not isinstance(source, ResidentSource):
                return None
            arrays.append(convert.elements(source.view(name), dtype))
        return _sealed(arrays)

    def _read(self, start: int, stop: int) -> tuple[Stored, ...]:
        """Elements of every operand: as they are stored if all are bfloat16, else as float32."""
        if self._resident is not None:
            return tuple(array[start:stop] for array in self._resident)
        found = []
        for index, (name, source, dtype) in enumerate(self._operands):
            size = dtypes.SIZES[dtype]
            offset, length = start * size, (stop - start) * size
            into = scratch(f"raw {self._depth}.{index}", length, np.uint8).data
            data = source.read(name, offset, length, into=into)
            if len(data) != length:
                raise CorruptCheckpoint(f"{name}: {len(data)} bytes where {length} belong")
            stored = convert.elements(data, dtype)
            if not self._patterns:
                out = scratch(f"float32 {self._depth}.{index}", stop - start, np.float32)
                stored = convert.widen(stored, dtype, out)
            found.append(stored)
        return tuple(found) if len({array.flags.writeable for array in found}) == 1 else _sealed(found)


def _sealed(arrays: Sequence[Stored]) -> tuple[Stored, ...]:
    """The same, none of which can be written to: a kernel takes no mapped pages beside computed ones."""
    views = tuple(array.view() for array in arrays)
    for view in views:
        view.flags.writeable = False
    return views


class _Held:
    """One tensor of a source, which stays in memory of the thread that made this once it is read."""

    def __init__(self, source: TensorSource, tensor: str, use: str) -> None:
        self.tensors: Mapping[str, TensorInfo] = source.tensors
        self._source = source
        self._length = source.tensors[tensor].length
        self._memory = scratch(use, self._length, np.uint8).data
        self._present = [False] * merkle.leaf_count(self._length)

    def read(self, tensor: str, offset: int, length: int, into: memoryview | None = None) -> memoryview:
        """Bytes of the tensor, whose leaves are read where they are not here yet; never into `into`."""
        for leaf in range(offset // merkle.LEAF_SIZE, -(-(offset + length) // merkle.LEAF_SIZE)):
            if not self._present[leaf]:
                begin = leaf * merkle.LEAF_SIZE
                view = self._memory[begin : begin + merkle.LEAF_SIZE]
                data = memoryview(self._source.read(tensor, begin, len(view), into=view))
                if data.obj is not self._memory.obj:
                    view[:] = data
                self._present[leaf] = True
        return self._memory[offset : offset + length]


class _Stream:
    """A Work as its operator sees it while measuring."""

    def __init__(self, work: Work, pool: Pool, orders: Orders | None) -> None:
        self.length = work.length
        self.orders = orders
        self._work = work
        self._pool = pool

    def map(self, function: Callable[[Chunk], T]) -> Iterator[T]:
        """Pass over the operands, chunk by chunk, in index order."""
        return self._pool.ordered(lambda piece: function(self._work.chunk(piece)), self._work.pieces)


def leaf_digests(data: memoryview) -> list[bytes]:
    """The digests of the leaves that `data`, whole leaves but for the last, consists of."""
    return [
        merkle.leaf_digest(data[i : i + merkle.LEAF_SIZE]) for i in range(0, len(data) or 1, merkle.LEAF_SIZE)
    ]
