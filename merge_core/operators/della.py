"""DELLA: drop by chance, the larger of a row more rarely, and rescale (MagPrune, arXiv:2406.11617).

Within a row of n elements the magnitude of rank r, from 0 for the smallest, is kept with the probability
`pᵣ = (density − ε) + 2ε·r/(n−1)` and becomes δ/pᵣ; equal magnitudes rank by index, which is the order that a
stable sort gives them. A row of one element is kept with the probability density. `rescale` and `rescale_l1`
are DARE's. A vector is one row. A density of 1 keeps all.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from merge_core.operators.base import Array, Exactness, Parameter, Parameters, each, single
from merge_core.operators.chance import draws, halves, limit
from merge_core.operators.dare import RESCALE
from merge_core.operators.scratch import scratch
from merge_core.operators.task_vectors import DENSITY, TaskVector, Thinning, operator

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 0x7F800001
"""Bits that every NaN ranks by: one above those of infinity."""


@lru_cache(maxsize=8)
def limits(row: int, density: float, epsilon: float) -> NDArray[np.uint32]:
    """Below how many of the 2³² draws the element of each rank is kept, in whole numbers."""
    if row == 1:
        return np.array([limit(density)], np.uint32)
    low, high = limit(density - epsilon), min(limit(density + epsilon), (1 << 32) - 1)
    rank = np.arange(row, dtype=np.uint64)
    return (np.uint64(low) + np.uint64(high - low) * rank // np.uint64(row - 1)).astype(np.uint32)


@lru_cache(maxsize=8)
def scales(row: int, density: float, epsilon: float, factor: float, rescale: bool) -> Array:
    """What a kept element of each rank is multiplied by: its weight, over its probability."""
    probability = limits(row, density, epsilon).astype(np.float64) * 2.0**-32
    divisor = np.where(probability > 0, probability, 1.0) if rescale else np.ones(row)
    with np.errstate(over="ignore"):
        return (factor / divisor).astype(np.float32)


def _tables(vector: TaskVector) -> tuple[NDArray[np.uint32], Array]:
    row, density, epsilon = vector.chunk.row, vector.own("density"), vector.own("epsilon")
    rescaled = bool(vector.parameters["rescale"] and not vector.parameters["rescale_l1"])
    return limits(row, density, epsilon), scales(row, density, epsilon, vector.factor, rescaled)


def _keeps_all_or_nothing(vector: TaskVector) -> float | None:
    """What every element is multiplied by, where no chance is left."""
    density = vector.own("density")
    return None if 0.0 < density < 1.0 else single(vector.factor * density)


def _apply(vector: TaskVector) -> Tensor:
    """Rank within rows, and keep an element when it draws less than its rank asks for."""
    from torch import from_numpy, int32

    delta, chunk = vector.delta, vector.chunk
    if (factor := _keeps_all_or_nothing(vector)) is not None:
        return delta * factor
    below, scale = _tables(vector)
    limit_of = from_numpy(below.astype(np.int64)).to(delta.device)
    scale_of = from_numpy(scale).to(delta.device)
    rows = delta.reshape(-1, chunk.row)
    bits = rows.abs().view(int32).clamp(max=_LARGEST)
    rank = bits.argsort(dim=1, stable=True).argsort(dim=1)
    keep = draws(chunk.keys[vector.expert], delta, chunk.start).reshape(rows.shape) < limit_of[rank]
    return (rows * (keep.to(delta.dtype) * scale_of[rank])).flatten()


def _compiled(vector: TaskVector, out: Array) -> None:
    from merge_core.operators import kernels

    if (factor := _keeps_all_or_nothing(vector)) is not None:
        kernels.scale_delta(*vector.operands, np.float32(factor), out)
        return
    row, start = vector.chunk.row, vector.chunk.start
    ranked = scratch("ranked", len(out), np.uint64)
    kernels.rank_keys(*vector.operands, row, ranked)
    # numpy's sort has vector code; the keys of a row differ all, so that every sort gives the same.
    ranked.reshape(-1, row).sort(axis=1)
    low, high = map(np.uint32, halves(vector.chunk.keys[vector.expert]))
    kernels.keep_by_rank(*vector.operands, ranked, low, high, start, *_tables(vector), out)


def _conflict(parameters: Parameters) -> str | None:
    """Where a density leaves the probabilities no room, as mergekit has it."""
    for density, epsilon in zip(each(parameters, "density"), each(parameters, "epsilon"), strict=True):
        if 0.0 < density < 1.0 and not (epsilon < density and density + epsilon < 1.0):
            return f"density {density:g} ± epsilon {epsilon:g} must lie between 0 and 1"
    return None


_DELLA = Thinning(
    cite="arXiv:2406.11617",
    exactness=Exactness.ELEMENTWISE,
    apply=_apply,
    compiled=_compiled,
    parameters=(DENSITY, Parameter(name="epsilon", each=True, default=0.15, low=0.0, high=0.5), *RESCALE),
    norm="rescale_l1",
    rows=True,
    chance=True,
    conflict=_conflict,
)

DELLA = operator("della", _DELLA, consensus=True, normalize=True)
DELLA_LINEAR = operator("della_linear", _DELLA, consensus=False, normalize=False)
