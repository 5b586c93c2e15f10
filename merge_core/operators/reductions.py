"""Sums over a tensor whose bits do not depend on threads, chunks or vector width.

Blocks of 4096 elements from the start of the tensor are folded by halves in float64 (a fixed tree of
elementwise additions, which every library rounds alike); the caller adds the blocks in index order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4096


def block_sums(values: Tensor) -> list[float]:
    """Sum each block of a one-dimensional float64 tensor; the last block counts as padded with zeros."""
    whole = values.numel() // BLOCK * BLOCK
    sums: list[float] = _fold(values[:whole].view(-1, BLOCK)) if whole else []
    if whole < values.numel():
        padded = values.new_zeros(BLOCK)
        padded[: values.numel() - whole] = values[whole:]
        sums += _fold(padded.view(1, BLOCK))
    return sums


def _fold(blocks: Tensor) -> list[float]:
    while blocks.shape[1] > 1:
        half = blocks.shape[1] // 2
        blocks = blocks[:, :half] + blocks[:, half:]
    folded: list[float] = blocks[:, 0].tolist()
    return folded
