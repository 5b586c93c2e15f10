"""TIES: trim each task vector, elect a sign per weight, average those that agree (arXiv:2306.01708).

Trimming keeps exactly the k = ⌊density·n⌋ (at least one) largest magnitudes of a task vector; where several
tie at the threshold the lowest indices win.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from merge_core.operators.base import (
    Array,
    Chunk,
    Exactness,
    Operator,
    Parameter,
    Parameters,
    Stream,
    Traced,
    each,
    number,
    single,
)
from merge_core.operators.consensus import agreeing, agreeing_into
from merge_core.operators.scratch import scratch
from merge_core.operators.trimming import Cut, cuts, delta_magnitudes, kept

if TYPE_CHECKING:
    from torch import Tensor


def _measure(stream: Stream, parameters: Parameters) -> Traced:
    """Find, for every expert, the bit pattern of the least magnitude kept and the last index kept at it."""
    keep = [kept(density, stream.length) for density in each(parameters, "density")]
    found = cuts(stream, [delta_magnitudes(expert) for expert in range(len(keep))], keep)
    return {"threshold": tuple(cut.threshold for cut in found), "last": tuple(cut.last for cut in found)}


def _cuts(traced: Traced) -> list[Cut]:
    pairs = zip(traced["threshold"], traced["last"], strict=True)
    return [Cut(int(threshold), int(last)) for threshold, last in pairs]


def _trim(delta: Tensor, chunk: Chunk, cut: Cut) -> Tensor:
    """Zero what lies below the threshold, or at it behind the last index."""
    level, ties = float(cut.level), cut.ties(chunk)
    magnitude = delta.abs()
    keep = magnitude > level
    keep[:ties] |= magnitude[:ties] == level
    return delta.where(keep, 0.0)


def _apply(chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
    """Trim, weigh, elect the sign of the sum, and average the agreeing experts."""
    base, *experts = chunk.tensors
    weights = each(parameters, "weight")
    weighted = [
        _trim(expert - base, chunk, cut) * single(weight)
        for expert, weight, cut in zip(experts, weights, _cuts(traced), strict=True)
    ]
    mixed = agreeing(weighted, weights, normalize=bool(parameters["normalize"]))
    return base + mixed * single(number(parameters, "lambda"))


def _compiled(chunk: Chunk, parameters: Parameters, traced: Traced, out: Array) -> None:
    from merge_core.operators import kernels

    base, *experts = chunk.arrays
    weights = each(parameters, "weight")
    weighted = scratch("weighted", len(experts) * len(base), np.float32).reshape(len(experts), len(base))
    for expert, weight, cut, row in zip(experts, weights, _cuts(traced), weighted, strict=True):
        kernels.keep_above(expert, base, cut.level, cut.ties(chunk), np.float32(weight), row)
    agreeing_into(weighted, weights, bool(parameters["normalize"]), out)
    kernels.add_to_base(base, np.float32(number(parameters, "lambda")), out)


TIES = Operator(
    name="ties",
    cite="arXiv:2306.01708",
    exactness=Exactness.GIVEN_TRACE,
    needs_base=True,
    experts=(1, None),
    parameters=(
        Parameter(name="weight", each=True),
        Parameter(name="density", each=True, default=1.0, low=0.0, high=1.0, open_low=True),
        Parameter(name="lambda", default=1.0),
        Parameter(name="normalize", default=True, flag=True),
    ),
    apply=_apply,
    compiled=_compiled,
    measure=_measure,
    passes=3,
    traces=lambda parameters, experts: {"threshold": (experts, int), "last": (experts, int)},
)
