"""Weighted sums, in torch and compiled: what most formulas end in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from merge_core.operators.base import Array, Chunk, Parameters, Stored, Traced, single

if TYPE_CHECKING:
    from torch import Tensor


def weighted_sum(tensors: tuple[Tensor, ...], weights: tuple[float, ...]) -> Tensor:
    """Σ wᵢ·xᵢ, left to right; each product and each sum is rounded to float32."""
    total = tensors[0] * single(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + tensor * single(weight)
    return total


def weighted_sum_into(arrays: tuple[Stored, ...], weights: tuple[float, ...], out: Array) -> None:
    """`weighted_sum`, compiled."""
    from merge_core.operators import kernels

    kernels.weighted_sum(arrays, np.array(weights, np.float32), out)


def divide_by(divisor: float, out: Array) -> None:
    """Divide by a float32 in place, compiled."""
    from merge_core.operators import kernels

    if divisor != 1.0:
        kernels.divide(out, np.float32(divisor))


def sum_of(weights: tuple[float, ...]) -> float:
    """Σ wᵢ left to right in float64, then float32; 1 where it vanishes, as mergekit has it.

    A loop, because from Python 3.12 on `sum` compensates and so rounds differently.
    """
    total = 0.0
    for weight in weights:
        total += weight
    return 1.0 if abs(total) < 1e-8 else single(total)


def by_factors(chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
    """Add all operands, each times its traced factor: the `apply` of operators that measure factors."""
    return weighted_sum(chunk.tensors, traced["factors"])


def by_factors_into(chunk: Chunk, parameters: Parameters, traced: Traced, out: Array) -> None:
    """`by_factors`, compiled."""
    weighted_sum_into(chunk.arrays, traced["factors"], out)
