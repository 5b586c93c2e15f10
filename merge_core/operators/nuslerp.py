"""NuSLERP: between two models along the great circle, as far as their weights say (Shoemake 1985).

    t = w₁ / (w₀ + w₁)      sin((1−t)θ)/sin θ · W₀ + sin(tθ)/sin θ · W₁

θ is the angle between two tensors, each taken as one vector. Where the recipe has a base_model these are the
task vectors, and the result is added to the base: a formula of its own, which a plan calls nuslerp_deltas.
mergekit's angles for each row or column are not offered: the Trace would hold two factors of every row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from merge_core.operators.base import (
    LIBM,
    Array,
    Chunk,
    Exactness,
    Operator,
    Parameter,
    Parameters,
    Stream,
    Traced,
    each,
)
from merge_core.operators.slerp import along
from merge_core.operators.weighted import by_factors, by_factors_into, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

COLLINEAR = 2.0**-24
"""The squared sine up to which the circle is a line: there mergekit's float32 cosine rounds to one."""

VANISHING = 1e-7
"""The least norm that is divided by: mergekit's epsilon."""


def share(weights: Sequence[float]) -> float:
    """How far from the first model to the second; half way where the weights cancel, as mergekit has it."""
    total = weights[0] + weights[1]
    return 0.5 if abs(total) < 1e-6 else weights[1] / total


def factors(dot: float, square_a: float, square_b: float, t: float) -> tuple[float, float]:
    """The factors (float32 values) of a and b at `t` for their inner product and squared norms."""
    norms = max(math.sqrt(square_a), VANISHING) * max(math.sqrt(square_b), VANISHING)
    cosine = max(-1.0, min(1.0, dot / norms))
    return along(cosine, t, straight=(1.0 - cosine) * (1.0 + cosine) <= COLLINEAR)


def _measure(stream: Stream, parameters: Parameters, *, deltas: bool = False) -> Traced:
    """Find the factors of the two from their inner products."""
    from merge_core.operators.reductions import gram

    (square_a, dot), (_, square_b) = gram(stream, deltas=deltas)
    return {"factors": factors(dot, square_a, square_b, share(each(parameters, "weight")))}


def _measure_deltas(stream: Stream, parameters: Parameters) -> Traced:
    return _measure(stream, parameters, deltas=True)


def _apply_deltas(chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
    """Add the two task vectors, each times its traced factor, to the base."""
    base, *experts = chunk.tensors
    return base + weighted_sum(tuple(expert - base for expert in experts), traced["factors"])


def _compiled_deltas(chunk: Chunk, parameters: Parameters, traced: Traced, out: Array) -> None:
    from merge_core.operators import kernels

    kernels.weighted_deltas(chunk.arrays, np.array(traced["factors"], np.float32), out)
    kernels.add_to_base(chunk.arrays[0], np.float32(1.0), out)


_DELTAS = Operator(
    name="nuslerp_deltas",
    cite="doi:10.1145/325165.325242",
    exactness=Exactness.GIVEN_TRACE,
    needs_base=True,
    experts=(2, 2),
    parameters=(Parameter(name="weight", each=True),),
    apply=_apply_deltas,
    compiled=_compiled_deltas,
    measure=_measure_deltas,
    passes=lambda parameters: 1,
    slack=LIBM,
    traces=lambda parameters, experts: {"factors": (2, float)},
    fixed={"nuslerp_flatten": True, "nuslerp_row_wise": False},
)

NUSLERP = Operator(
    name="nuslerp",
    cite="doi:10.1145/325165.325242",
    exactness=Exactness.GIVEN_TRACE,
    needs_base=False,
    experts=(2, 2),
    parameters=_DELTAS.parameters,
    apply=by_factors,
    compiled=by_factors_into,
    measure=_measure,
    passes=lambda parameters: 1,
    slack=LIBM,
    traces=_DELTAS.traces,
    fixed=_DELTAS.fixed,
    over_base=_DELTAS,
)
