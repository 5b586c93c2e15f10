"""Formulas on task vectors as one loop: what an element needs stays in registers from operands to result.

The steps of `kernels` write a row of the task vectors of each expert and read it again; here weights are read
once and the result is written once. Element by element the arithmetic is the same, in the same order, so the
bits are. A loop is compiled for each number of experts, at most MOST of them: beyond that registers run out.
Each tells whether all that it wrote is finite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba.extending import overload

from merge_core.operators.kernels import f32, kernel

MOST = 8
"""Experts that a loop is compiled for."""

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_INFINITY = np.uint32(0x7F800000)

if TYPE_CHECKING:

    def weighted(experts: Any, weights: Any, base: Any, i: int) -> Any:
        """Σ (x − base)·w at element `i`, from left to right; in kernels only."""

    def trimmed(experts: Any, lows: Any, highs: Any, factors: Any, base: Any, i: int) -> Any:
        """(x − base)·factor of each expert at element `i`, or ·0 outside of low..high; in kernels only."""

    def magnitude(value: Any) -> Any:
        """The bits of a float32 but its sign; in kernels only."""

    def total(rows: Any) -> Any:
        """The sum from left to right; in kernels only."""

    def agreeing(rows: Any, positive: Any) -> Any:
        """The sum of those that have the elected sign; in kernels only."""

    def votes(rows: Any, weights: Any, positive: Any) -> Any:
        """The sum of the weights of those that have the elected sign; in kernels only."""

else:

    def weighted(experts, weights, base, i):
        raise NotImplementedError

    @overload(weighted)
    def _weighted(experts, weights, base, i):
        if len(experts) == 1:
            return lambda experts, weights, base, i: (f32(experts[0][i]) - base) * weights[0]

        def go(experts, weights, base, i):
            before = weighted(experts[:-1], weights[:-1], base, i)
            return before + (f32(experts[-1][i]) - base) * weights[-1]

        return go

    def trimmed(experts, lows, highs, factors, base, i):
        raise NotImplementedError

    @overload(trimmed)
    def _trimmed(experts, lows, highs, factors, base, i):
        if len(experts) == 0:
            return lambda experts, lows, highs, factors, base, i: ()

        def go(experts, lows, highs, factors, base, i):
            delta = f32(experts[-1][i]) - base
            distance = abs(delta)
            kept = (distance >= lows[-1]) & (not (distance >= highs[-1]))
            row = delta * (factors[-1] if kept else _ZERO * factors[-1])
            before = trimmed(experts[:-1], lows[:-1], highs[:-1], factors[:-1], base, i)
            return before + (row,)  # noqa: RUF005, numba unpacks no tuples

        return go

    def magnitude(value):
        raise NotImplementedError

    @overload(magnitude)
    def _magnitude(value):
        return lambda value: np.float32(value).view(np.uint32) & np.uint32(0x7FFFFFFF)

    def total(rows):
        raise NotImplementedError

    @overload(total)
    def _total(rows):
        if len(rows) == 1:
            return lambda rows: rows[0]
        return lambda rows: total(rows[:-1]) + rows[-1]

    def agreeing(rows, positive):
        raise NotImplementedError

    @overload(agreeing)
    def _agreeing(rows, positive):
        if len(rows) == 0:
            return lambda rows, positive: _ZERO

        def go(rows, positive):
            agrees = ((rows[-1] > 0) & positive) | ((rows[-1] < 0) & (not positive))
            return agreeing(rows[:-1], positive) + rows[-1] * (_ONE if agrees else _ZERO)

        return go

    def votes(rows, weights, positive):
        raise NotImplementedError

    @overload(votes)
    def _votes(rows, weights, positive):
        if len(rows) == 0:
            return lambda rows, weights, positive: _ZERO

        def go(rows, weights, positive):
            agrees = ((rows[-1] > 0) & positive) | ((rows[-1] < 0) & (not positive))
            return votes(rows[:-1], weights[:-1], positive) + (weights[-1] if agrees else _ZERO)

        return go


@kernel
def add_all(base: Any, experts: Any, weights: Any, divisor: Any, scale: Any, out: Any) -> Any:
    """out = base + Σ (x − base)·w / divisor · scale, the experts from left to right."""
    largest = np.uint32(0)
    for i in range(out.size):
        origin = f32(base[i])
        mixed = weighted(experts, weights, origin, i)
        value = origin + (mixed if divisor == _ONE else mixed / divisor) * scale
        out[i] = value
        largest = max(largest, magnitude(value))
    return largest < _INFINITY


@kernel
def add_agreeing(
    base: Any,
    experts: Any,
    lows: Any,
    highs: Any,
    factors: Any,
    weights: Any,
    normalize: bool,
    scale: Any,
    out: Any,
) -> Any:
    """out = base + scale · what `kernels.agree` makes of those whose |x − base| is at least low, below high.

    Each is multiplied by its factor, and by zero where it is left out; a high of NaN leaves out nothing.
    """
    largest = np.uint32(0)
    for i in range(out.size):
        origin = f32(base[i])
        rows = trimmed(experts, lows, highs, factors, origin, i)
        positive = total(rows) >= 0
        mixed = agreeing(rows, positive)
        if normalize:
            divisor = votes(rows, weights, positive)
            mixed = mixed / (divisor if divisor != 0 else _ONE)
        value = origin + mixed * scale
        out[i] = value
        largest = max(largest, magnitude(value))
    return largest < _INFINITY


@kernel
def add_trimmed(
    base: Any, experts: Any, lows: Any, highs: Any, factors: Any, divisor: Any, scale: Any, out: Any
) -> Any:
    """out = base + scale · the sum over `divisor` of the same."""
    largest = np.uint32(0)
    for i in range(out.size):
        origin = f32(base[i])
        mixed = total(trimmed(experts, lows, highs, factors, origin, i))
        value = origin + (mixed if divisor == _ONE else mixed / divisor) * scale
        out[i] = value
        largest = max(largest, magnitude(value))
    return largest < _INFINITY
