"""RAM+: RAM that makes up for what averaging takes away (arXiv:2601.13572), with ratios for each tensor.

    ρᵢ = shared / unique      λᵢ = 1 + r·clamp(ρᵢ, 0, alpha)

What an expert alone has changed is taken times its λ. `shared` and `unique` count, over the whole tensor, the
elements that it has changed together with others and alone: they are the Trace.
"""

from __future__ import annotations

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
)
from merge_core.operators.ram import EPSILON, reinforced, reinforced_into
from merge_core.operators.scratch import scratch

if TYPE_CHECKING:
    from torch import Tensor


def _measure(stream: Stream, parameters: Parameters) -> Traced:
    """Count, for every expert, the changed elements that it shares and those that it does not."""
    from merge_core.operators import kernels

    epsilon = np.float32(number(parameters, "epsilon"))

    def count(chunk: Chunk) -> NDArray[np.int64]:
        base, *experts = chunk.arrays
        distance = scratch("magnitudes", len(chunk), np.float32)
        changed = np.empty((len(experts), len(chunk)), bool)
        for expert, differs in zip(experts, changed, strict=True):
            kernels.delta_magnitude(expert, base, distance)
            np.logical_not(distance <= epsilon, out=differs)
        among = changed.sum(axis=0)
        return np.stack([(changed & (among > 1)).sum(axis=1), (changed & (among == 1)).sum(axis=1)])

    shared, unique = np.sum(list(stream.map(count)), axis=0).tolist()
    return {"shared": tuple(shared), "unique": tuple(unique)}


def _factors(parameters: Parameters, traced: Traced) -> list[float]:
    """λ of every expert; 1 for one that has nothing for itself."""
    r, alpha, epsilon = (number(parameters, name) for name in ("r", "alpha", "epsilon"))
    counts = zip(traced["shared"], traced["unique"], strict=True)
    # The same floor as mergekit's, which tells only where `epsilon` is above 1.
    return [1.0 + r * min(s / max(u, epsilon), alpha) if u > 0 else 1.0 for s, u in counts]


def _apply(chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
    return reinforced(chunk, number(parameters, "epsilon"), _factors(parameters, traced))


def _compiled(chunk: Chunk, parameters: Parameters, traced: Traced, out: Array) -> None:
    reinforced_into(chunk, number(parameters, "epsilon"), _factors(parameters, traced), out)


RAMPLUS_TL = Operator(
    name="ramplus_tl",
    cite="arXiv:2601.13572",
    exactness=Exactness.GIVEN_TRACE,
    needs_base=True,
    experts=(1, None),
    parameters=(
        Parameter(name="r", default=0.1),
        Parameter(name="alpha", default=0.2, low=0.0),
        EPSILON,
    ),
    apply=_apply,
    compiled=_compiled,
    measure=_measure,
    passes=lambda parameters: 1,
    traces=lambda parameters, experts: {"shared": (experts, int), "unique": (experts, int)},
)
