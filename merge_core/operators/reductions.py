"""Sums over a tensor whose bits do not depend on threads, chunks or vector width.

Blocks of 4096 elements from the start of the tensor are folded by halves in float64 (a fixed tree of
elementwise additions, which every machine rounds alike); the blocks are added in index order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, combinations_with_replacement

import numpy as np

from merge_core.errors import Unmergeable
from merge_core.operators import kernels
from merge_core.operators.base import Chunk, Stored, Stream
from merge_core.operators.scratch import scratch

BLOCK = kernels.BLOCK


def block_dots(x: Stored, y: Stored) -> list[float]:
    """⟨x, y⟩ of each block of 4096 elements, the last one counted as padded with zeros."""
    sums = np.empty(-(-len(x) // BLOCK), np.float64)
    kernels.block_dots(x, y, sums)
    listed: list[float] = sums.tolist()
    return listed


def gram(stream: Stream, *, deltas: bool = False) -> list[list[float]]:
    """⟨xᵢ, xⱼ⟩ for every two operands; with `deltas`, of the experts' differences from the base.

    Raises Unmergeable when one is not finite: nothing can be measured then.
    """

    def products(chunk: Chunk) -> list[list[float]]:
        parts = []
        for block in chunk.blocks():
            vectors = _deltas(block) if deltas else block.arrays
            parts.append([block_dots(x, y) for x, y in combinations_with_replacement(vectors, 2)])
        return [list(chain(*pair)) for pair in zip(*parts, strict=True)]

    return _square(totals(stream, products))


def totals(stream: Stream, of: Callable[[Chunk], Sequence[Sequence[float]]]) -> list[float]:
    """Add up, each from left to right, what `of` lists of every chunk for some quantities.

    Raises Unmergeable when one is not finite.
    """
    sums: list[float] = []
    for found in stream.map(of):
        sums = sums or [0.0] * len(found)
        for quantity, values in enumerate(found):
            for value in values:
                sums[quantity] += value
    require_finite(sums)
    return sums


def require_finite(sums: Iterable[float]) -> None:
    """Raise Unmergeable unless all sums over the weights are finite: nothing can be measured then."""
    if not all(map(math.isfinite, sums)):
        raise Unmergeable(
            "its weights hold NaN or infinity, and their lengths and angles are needed",
            hint="leave out the model whose weights are damaged",
        )


def _deltas(chunk: Chunk) -> tuple[Stored, ...]:
    base, *experts = chunk.arrays
    rows = tuple(scratch(f"delta {index}", len(chunk), np.float32) for index in range(len(experts)))
    for expert, row in zip(experts, rows, strict=True):
        kernels.delta(expert, base, row)
    return rows


def _square(upper: Sequence[float]) -> list[list[float]]:
    """The symmetric matrix whose upper triangle, row by row, is given."""
    size = int((math.isqrt(8 * len(upper) + 1) - 1) / 2)
    matrix = [[0.0] * size for _ in range(size)]
    for (i, j), value in zip(combinations_with_replacement(range(size), 2), upper, strict=True):
        matrix[i][j] = matrix[j][i] = value
    return matrix
