"""Slerp: from the base to one expert along the great circle (Shoemake 1985), tensor by tensor.

`sin((1−t)θ)/sin θ · W₀ + sin(tθ)/sin θ · W₁`, θ the angle between the two tensors seen as vectors; the
straight line where they are nearly collinear. The two factors are the Trace: they come from three sums over
the whole tensor in float64 and from libm, and are applied as float32.
"""

from __future__ import annotations

import math

from merge_core.operators.base import (
    LIBM,
    Exactness,
    Operator,
    Parameter,
    Parameters,
    Stream,
    Traced,
    number,
    single,
)
from merge_core.operators.weighted import by_factors, by_factors_into

COLLINEAR = 0.9995
"""The cosine, either way, beyond which the circle is a line: mergekit's threshold."""

VANISHING = 1e-8
"""A norm up to this is not divided by: mergekit's epsilon."""


def _measure(stream: Stream, parameters: Parameters) -> Traced:
    """Find the factors of base and expert from ⟨a,b⟩, ⟨a,a⟩ and ⟨b,b⟩."""
    from merge_core.operators.reductions import gram

    (square_a, dot), (_, square_b) = gram(stream)
    return {"factors": factors(dot, math.sqrt(square_a), math.sqrt(square_b), number(parameters, "t"))}


def factors(dot: float, norm_a: float, norm_b: float, t: float) -> tuple[float, float]:
    """The factors (float32 values) of a and b at `t` for their inner product and norms."""
    cosine = dot / (norm_a if norm_a > VANISHING else 1.0) / (norm_b if norm_b > VANISHING else 1.0)
    return along(cosine, t, straight=abs(cosine) > COLLINEAR)


def along(cosine: float, t: float, *, straight: bool) -> tuple[float, float]:
    """The factors of two vectors on the great circle between them, or on the straight line."""
    if straight:
        return single(1.0 - t), single(t)
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return single(math.sin((1.0 - t) * angle) / sine), single(math.sin(t * angle) / sine)


SLERP = Operator(
    name="slerp",
    cite="doi:10.1145/325165.325242",
    exactness=Exactness.GIVEN_TRACE,
    needs_base=True,
    experts=(1, 1),
    parameters=(Parameter(name="t"),),
    apply=by_factors,
    compiled=by_factors_into,
    measure=_measure,
    passes=lambda parameters: 1,
    slack=LIBM,
    traces=lambda parameters, experts: {"factors": (2, float)},
)
