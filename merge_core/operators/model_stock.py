"""Model Stock: from the base towards the mean of the experts, as far as their angle says (arXiv:2403.19522).

    t = N·cos θ / (1 + (N−1)·cos θ)      (1−t)·W₀ + t·mean(Wᵢ)

cos θ is the mean over all pairs of task vectors, each tensor taken as one vector: mergekit's `filter_wise`,
a `t` for every row, would put every row into the Trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from merge_core.operators.base import Array, Chunk, Exactness, Operator, Parameters, Stream, Traced
from merge_core.operators.weighted import weighted_sum, weighted_sum_into

if TYPE_CHECKING:
    from torch import Tensor

VANISHING = 1e-6
"""The least product of norms, and the least denominator, that is divided by: mergekit's epsilon for both."""


def _measure(stream: Stream, parameters: Parameters) -> Traced:
    """Find t from the inner products of the task vectors."""
    from merge_core.operators.reductions import gram

    return {"t": (ratio(gram(stream, deltas=True)),)}


def ratio(gram: Sequence[Sequence[float]]) -> float:
    """How far to go from the base to the mean; not at all where the experts cancel, as mergekit has it."""
    count = len(gram)
    pairs = list(combinations(range(count), 2))
    total = 0.0
    for i, j in pairs:
        norms = math.sqrt(gram[i][i]) * math.sqrt(gram[j][j])
        total += max(-1.0, min(1.0, gram[i][j] / max(norms, VANISHING)))
    cosine = total / len(pairs)
    denominator = 1.0 + (count - 1) * cosine
    return 0.0 if abs(denominator) < VANISHING else count * cosine / denominator


def _factors(traced: Traced, experts: int) -> tuple[float, ...]:
    """The coefficients of the base and of each expert."""
    (t,) = traced["t"]
    return (1.0 - t, *(t / experts for _ in range(experts)))


def _apply(chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
    """Add the base times 1 − t and every expert times t/N."""
    return weighted_sum(chunk.tensors, _factors(traced, len(chunk.arrays) - 1))


def _compiled(chunk: Chunk, parameters: Parameters, traced: Traced, out: Array) -> None:
    weighted_sum_into(chunk.arrays, _factors(traced, len(chunk.arrays) - 1), out)


MODEL_STOCK = Operator(
    name="model_stock",
    cite="arXiv:2403.19522",
    exactness=Exactness.GIVEN_TRACE,
    needs_base=True,
    experts=(2, None),
    parameters=(),
    apply=_apply,
    compiled=_compiled,
    measure=_measure,
    passes=lambda parameters: 1,
    traces=lambda parameters, experts: {"t": (1, float)},
    fixed={"filter_wise": False},
)
