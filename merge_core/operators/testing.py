"""Hold an operator to what it declares, on arrays in memory: for the tests of whoever writes one.

    result = trial(MEDIAN, [a, b, c], {})

`trial` measures and computes as the engine does, chunk by chunk. It asserts that the Trace has the declared
shape, that no more passes were read than declared, and that a compiled kernel gives the bits of its formula,
on float32 and on the same arrays cut to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from merge_core.operators.base import Array, Chunk, Operator, Orders, Parameters, Traced

T = TypeVar("T")

_GOLDEN_RATIO = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


class Held:
    """Arrays in memory as a Stream of chunks: of whole rows for operators that declare `rows`.

    Chunks of whole rows overlap, as the engine's do; an empty tensor is one empty chunk. `keys` are made up
    where none are given, and `passes` counts how often all has been read.
    """

    def __init__(
        self,
        operator: Operator,
        arrays: Sequence[Array],
        *,
        chunk: int = 4096,
        row: int | None = None,
        keys: Sequence[int] | None = None,
        orders: Orders | None = None,
    ) -> None:
        self.operator = operator
        self.arrays = tuple(arrays)
        self.length = len(self.arrays[0])
        self.experts = len(self.arrays) - operator.needs_base
        self.row = row or max(1, self.length)
        self.passes = 0
        self.orders = orders
        made_up = [_GOLDEN_RATIO * (expert + 1) & _WORD for expert in range(self.experts)]
        self._keys = tuple(made_up if keys is None else keys[: self.experts])
        self._chunk = chunk

    def at(self, start: int, stop: int) -> Chunk:
        """The elements from `start` to `stop`."""
        arrays = tuple(array[start:stop] for array in self.arrays)
        return Chunk(arrays=arrays, start=start, row=self.row, keys=self._keys)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Where the chunks begin and end."""
        for start in range(0, self.length or 1, self._chunk):
            stop = min(start + self._chunk, self.length)
            if self.operator.rows:
                start, stop = start // self.row * self.row, -(-stop // self.row) * self.row
            yield start, stop

    def map(self, function: Callable[[Chunk], T]) -> Iterator[T]:
        """Pass over all chunks."""
        self.passes += 1
        for start, stop in self.spans():
            yield function(self.at(start, stop))


def trial(
    operator: Operator,
    arrays: Sequence[Array],
    parameters: Parameters,
    *,
    chunk: int = 4096,
    row: int | None = None,
    keys: Sequence[int] | None = None,
) -> Array:
    """Measure and compute float32 arrays, the base first where the operator needs one.

    Raises AssertionError where the operator is not what it declares.
    """
    stream = Held(operator, arrays, chunk=chunk, row=row, keys=keys)
    traced = operator.measure(stream, parameters) if operator.measure else {}
    declared = operator.traces(parameters, stream.experts)
    found = {name: (len(values), {*map(type, values)}) for name, values in traced.items()}
    assert found == {name: (count, {kind}) for name, (count, kind) in declared.items()}, found
    assert stream.passes <= operator.passes(parameters), f"{stream.passes} passes"
    return computed(stream, parameters, traced)


def computed(stream: Held, parameters: Parameters, traced: Traced) -> Array:
    """The output for traced values; raises AssertionError where a kernel is not its formula."""
    operator, result = stream.operator, np.full(stream.length, np.float32(7.0))
    for start, stop in stream.spans():
        chunk = stream.at(start, stop)
        result[start:stop] = _applied(operator, chunk, parameters, traced)
        patterns = tuple((array.view(np.uint32) >> np.uint32(16)).astype(np.uint16) for array in chunk.arrays)
        _applied(operator, replace(chunk, arrays=patterns), parameters, traced)
    return result


def _applied(operator: Operator, chunk: Chunk, parameters: Parameters, traced: Traced) -> Array:
    """The formula; raises AssertionError where the kernel, if there is one, gives other bits."""
    formula: Array = operator.apply(chunk, parameters, traced).contiguous().numpy()
    if operator.compiled is not None:
        out = np.full(len(chunk), np.float32(8.0))
        operator.compiled(chunk, parameters, traced, out)
        assert same_bits(out, formula), f"the kernel of {operator.name} is not its formula"
    return formula


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same bits, but for what a NaN carries."""
    return bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))
