"""TIES: trim each task vector, elect a sign per weight, average those that agree (arXiv:2306.01708).

Trimming keeps exactly the k = ⌊density·n⌋ (at least one, unless the density is 0) largest magnitudes of a
task vector; where several tie at the threshold the lowest indices win. `rescale` restores its L1 norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_core.operators.base import Exactness, Parameter, Parameters, Stream, Traced, each, single
from merge_core.operators.task_vectors import DENSITY, TaskVector, Thinning, operator
from merge_core.operators.trimming import NOTHING, DeltaMagnitudes, cut_at, cuts, kept, taken, trace_cuts

if TYPE_CHECKING:
    from torch import Tensor


def _measure(stream: Stream, parameters: Parameters) -> Traced:
    """Find, for every expert, the bit pattern of the least magnitude kept and the last index kept at it."""
    keep = [kept(density, stream.length) for density in each(parameters, "density")]
    found = cuts(stream, [DeltaMagnitudes(expert) for expert in range(len(keep))], keep)
    return trace_cuts(found)


def _apply(vector: TaskVector) -> Tensor:
    """Zero what lies below the threshold, or at it behind the last index."""
    delta, cut = vector.delta, cut_at(vector.traced, vector.expert)
    keep = taken(delta.abs(), vector.chunk, cut)
    return delta * (keep.to(delta.dtype) * single(vector.factor))


TIES = operator(
    "ties",
    Thinning(
        cite="arXiv:2306.01708",
        exactness=Exactness.GIVEN_TRACE,
        apply=_apply,
        cuts=lambda vector: (cut_at(vector.traced, vector.expert), NOTHING),
        parameters=(DENSITY, Parameter(name="rescale", default=False, flag=True)),
        norm="rescale",
        measure=_measure,
        passes=lambda parameters: 3 if any(0.0 < d < 1.0 for d in each(parameters, "density")) else 0,
        traces=("threshold", "last"),
    ),
    consensus=True,
    normalize=True,
)
