"""Norms: how large merged tensors and their operands are, taken while a merge runs.

norms.observe("model.norm.weight", 0, (a, b), merged)     # every piece of every tensor, from any thread
norms.taken()                                              -> {"model.norm.weight": (own, of a, of b)}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Norms:
    """Sums of squares of merged tensors and of their operands.

    Threads may observe different pieces at once. The pieces of a tensor are added in their order, so that the
    order in which threads finish does not show.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, dict[int, list[float]]] = {}
        self._recalled: dict[str, tuple[float, ...]] = {}

    def observe(
        self, tensor: str, piece: int, operands: Sequence[NDArray[Any]], output: NDArray[Any]
    ) -> None:
        """Take in a piece: the operands as they were merged, and what came of them."""
        from merge_core.operators import kernels

        squares = np.empty(1 + len(operands), np.float64)
        kernels.square_sums((output,), squares[:1])
        kernels.square_sums(tuple(operands), squares[1:])
        self._pieces.setdefault(tensor, {})[piece] = squares.tolist()

    def recall(self, tensor: str, squares: tuple[float, ...]) -> None:
        """Take what `squares` said of a tensor in an earlier run; nothing where it was not observed."""
        if squares:
            self._recalled[tensor] = squares

    def squares(self, tensor: str) -> tuple[float, ...]:
        """The sums of a tensor: its own, then its operands'; none where it was not observed."""
        if tensor in self._recalled:
            return self._recalled[tensor]
        pieces = self._pieces.get(tensor, {})
        total: list[float] = []
        for piece in sorted(pieces):
            total = [a + b for a, b in zip(total, pieces[piece], strict=True)] if total else pieces[piece]
        return tuple(total)

    def taken(self) -> dict[str, tuple[float, ...]]:
        """The norms of each tensor that was observed or recalled: its own, then its operands'."""
        names = sorted(self._pieces.keys() | self._recalled.keys())
        return {name: tuple(map(math.sqrt, self.squares(name))) for name in names}
