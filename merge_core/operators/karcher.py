"""Karcher mean: the point of the sphere with the least squared distances to all models (Karcher 1977).

Each tensor is taken as one vector of length one. From their normalised mean, `exp(Σ αᵢ·log(Wᵢ/‖Wᵢ‖))` is
repeated until the step is shorter than `tol`; the result gets the mean of the norms (for models:
arXiv:2603.04972). A point on the way is a combination of the models, so all of it happens on the
coefficients: the Gram matrix is read from the weights, once, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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

CANCELLED = 1e-7
"""The length below which a sum of unit vectors, or an angle, is what float64 leaves of zero in products."""

SETTLED = 1e-12
"""The step below which nothing moves that float32 can hold, however small `tol` is."""


def _measure(stream: Stream, parameters: Parameters) -> Traced:
    """Find the coefficient of every model."""
    from merge_core.operators.reductions import gram

    most, tol = int(number(parameters, "max_iter")), number(parameters, "tol")
    return {"factors": tuple(map(single, factors(gram(stream), most, tol)))}


def factors(gram: Sequence[Sequence[float]], max_iter: int, tol: float) -> list[float]:
    """The coefficients of the models in their mean, from their inner products.

    As in mergekit, a model shorter than `tol` counts for the mean of the norms alone.
    """
    count = len(gram)
    if count == 1:
        return [1.0]
    norms = [math.sqrt(gram[i][i]) for i in range(count)]
    long = [i for i in range(count) if norms[i] > tol]
    if not long:
        return [0.0] * count
    cosines = [[gram[i][j] / (norms[i] * norms[j]) for j in long] for i in long]
    length = 0.0
    for norm in norms:
        length += norm / count
    found = [0.0] * count
    for i, coefficient in zip(long, mean_on_sphere(cosines, max_iter, tol), strict=True):
        found[i] = length * (coefficient / norms[i])
    return found


def mean_on_sphere(cosines: Sequence[Sequence[float]], max_iter: int, tol: float) -> list[float]:
    """The coefficients of the mean of unit vectors, all of one weight, from the cosines between them."""
    count = len(cosines)
    mean = [1.0 / count] * count
    norm = _norm(mean, cosines)
    mean = _scaled(mean, 1.0 / norm) if norm >= max(tol, CANCELLED) else [1.0] + [0.0] * (count - 1)
    for _ in range(max_iter):
        tangent = _tangent(mean, cosines, tol)
        step = _norm(tangent, cosines)
        if step < max(tol, SETTLED):
            break
        along, aside = math.cos(step), math.sin(step) / step
        mean = [along * m + aside * t for m, t in zip(mean, tangent, strict=True)]
        norm = _norm(mean, cosines)
        if norm > max(tol, CANCELLED):
            mean = _scaled(mean, 1.0 / norm)
    return mean


def _tangent(mean: Sequence[float], cosines: Sequence[Sequence[float]], tol: float) -> list[float]:
    """The mean of the logarithms at `mean`: which way, and how far, the points lie from there.

    A point opposite to it lies in no direction, or in all, and is left out.
    """
    count = len(mean)
    tangent, back = [0.0] * count, 0.0
    for i, row in enumerate(cosines):
        cosine = max(-1.0, min(1.0, _dot(row, mean)))
        angle = math.acos(cosine)
        if angle < tol or math.pi - angle < CANCELLED:
            continue
        weight = angle / (math.sin(angle) or 1.0) / count
        tangent[i] += weight
        back += weight * cosine
    return [t - back * m for t, m in zip(tangent, mean, strict=True)]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Σ aᵢ·bᵢ, left to right: `sum` and `math.sumprod` round otherwise, from version to version."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total


def _norm(coefficients: Sequence[float], cosines: Sequence[Sequence[float]]) -> float:
    """The length of a combination of unit vectors."""
    return math.sqrt(max(0.0, _dot(coefficients, [_dot(row, coefficients) for row in cosines])))


def _scaled(values: Sequence[float], factor: float) -> list[float]:
    return [value * factor for value in values]


KARCHER = Operator(
    name="karcher",
    cite="doi:10.1002/cpa.3160300502",
    exactness=Exactness.GIVEN_TRACE,
    needs_base=False,
    experts=(1, None),
    parameters=(
        Parameter(name="max_iter", default=10.0, low=0.0, high=10_000.0),
        Parameter(name="tol", default=1e-5, low=0.0),
    ),
    apply=by_factors,
    compiled=by_factors_into,
    measure=_measure,
    passes=lambda parameters: 1,
    slack=LIBM,
    traces=lambda parameters, experts: {"factors": (experts, float)},
)
