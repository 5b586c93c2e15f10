"""SCE: select where the experts differ, calculate weights by energy, erase minority signs (arXiv:2408.07990).

Of the task vectors δᵢ only the positions with the largest variance over the experts stay: a share
`select_topk` of those where it is not zero, the lowest indices among equals. An expert weighs
`wᵢ = Σδᵢ² / ΣΣδ²` in a tensor. The result is `W₀ + Σ wᵢ·δᵢ / Σ wᵢ` over those who agree with the sign of Σδᵢ.

The weights are a ratio, so only an exact zero of all energies makes them equal (and then all δ are zero).
mergekit compares the sum of the mean squares with 1e-6, which fine-tuning rarely reaches: it then weighs all
alike, and where the agreeing weigh less than 1e-6 it divides by that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from merge_core.operators.base import (
    Array,
    Chunk,
    Exactness,
    Operator,
    Parameter,
    Parameters,
    Stream,
    Traced,
    number,
    single,
)
from merge_core.operators.consensus import agreeing, agreeing_into
from merge_core.operators.scratch import scratch
from merge_core.operators.trimming import NOTHING, Cut, cut_at, cuts, taken, trace_cuts, uppers

if TYPE_CHECKING:
    from torch import Tensor


def spread(deltas: Sequence[Tensor]) -> Tensor:
    """Their variance, times their number: Welford's recurrence, in which equal ones give exactly zero."""
    mean, squares = deltas[0], deltas[0].new_zeros(deltas[0].shape)
    for count, delta in enumerate(deltas[1:], 2):
        off = delta - mean
        mean = mean + off * single(1.0 / count)
        squares = squares + off * (delta - mean)
    return squares


def _deltas(chunk: Chunk) -> NDArray[np.float32]:
    from merge_core.operators import kernels

    base, *experts = chunk.arrays
    rows = scratch("task vectors", len(experts) * len(base), np.float32).reshape(len(experts), -1)
    for expert, row in zip(experts, rows, strict=True):
        kernels.delta(expert, base, row)
    return rows


def _spread(rows: NDArray[np.float32]) -> Array:
    """`spread`, compiled."""
    from merge_core.operators import kernels

    out = scratch("spread", rows.shape[1], np.float32)
    kernels.spread(rows, out)
    return out


def _selected(chunk: Chunk, parameters: Parameters, cut: Cut) -> NDArray[np.float32]:
    """The task vectors, zero where the variance lies below the cut."""
    from merge_core.operators import kernels

    rows = _deltas(chunk)
    if number(parameters, "select_topk") < 1.0:
        kernels.select(_spread(rows), *cut.within(chunk), rows)
    return rows


def _measure(stream: Stream, parameters: Parameters) -> Traced:
    """Find the cut in the variances, and then the energies of what it selects."""
    cut = _cut(stream, number(parameters, "select_topk"))
    return trace_cuts([cut]) | {"weights": _weights(stream, parameters, cut)}


def _cut(stream: Stream, share: float) -> Cut:
    if share >= 1.0:
        return Cut(0, stream.length - 1)
    if share <= 0.0:
        return NOTHING
    counted = uppers(stream, [_spread_of])
    keep = int((stream.length - counted[_spread_of].zeros) * share)
    return cuts(stream, [_spread_of], [keep], counted)[0]


def _spread_of(chunk: Chunk) -> tuple[Array, None]:
    return _spread(_deltas(chunk)), None


def _weights(stream: Stream, parameters: Parameters, cut: Cut) -> tuple[float, ...]:
    """Each expert's share of Σδ², in float64."""
    from merge_core.operators.reductions import block_dots, totals

    def squares(chunk: Chunk) -> list[list[float]]:
        sums: list[list[float]] = [[] for _ in chunk.arrays[1:]]
        for block in chunk.blocks():
            for expert, row in enumerate(_selected(block, parameters, cut)):
                sums[expert] += block_dots(row, row)
        return sums

    energies = totals(stream, squares)
    total = 0.0
    for energy in energies:
        total += energy
    return tuple(energy / total if total else 1.0 / len(energies) for energy in energies)


def _apply(chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
    """Select, erase, and average by weight."""
    base, *experts = chunk.tensors
    deltas = [expert - base for expert in experts]
    if number(parameters, "select_topk") < 1.0:
        selected = taken(spread(deltas), chunk, cut_at(traced, 0)).to(base.dtype)
        deltas = [delta * selected for delta in deltas]
    weights = traced["weights"]
    return base + agreeing(deltas, weights, normalize=True, factors=weights)


def _compiled(chunk: Chunk, parameters: Parameters, traced: Traced, out: Array) -> None:
    from merge_core.operators import kernels

    weights = traced["weights"]
    rows = _selected(chunk, parameters, cut_at(traced, 0))
    agreeing_into(rows, weights, out, normalize=True, factors=weights)
    kernels.add_to_base(chunk.arrays[0], np.float32(1.0), out)


SCE = Operator(
    name="sce",
    cite="arXiv:2408.07990",
    exactness=Exactness.GIVEN_TRACE,
    needs_base=True,
    experts=(1, None),
    parameters=(Parameter(name="select_topk", default=1.0, low=0.0, high=1.0),),
    apply=_apply,
    compiled=_compiled,
    measure=_measure,
    passes=lambda parameters: 4 if 0.0 < number(parameters, "select_topk") < 1.0 else 1,
    traces=lambda parameters, experts: {
        "threshold": (1, int),
        "last": (1, int),
        "weights": (experts, float),
    },
)
