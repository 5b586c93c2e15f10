"""Model breadcrumbs: drop the largest and the smallest of a task vector (arXiv:2312.06795).

Of n magnitudes the ⌊γ·n⌋ largest are outliers and dropped, and the next ⌊density·n⌋ are kept; where fewer
than that are left below the outliers, fewer outliers are dropped. A density of 1 keeps all, outliers too.
Among equals the lowest indices count as the largest. `rescale` restores the L1 norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_core.operators.base import Exactness, Parameter, Parameters, Stream, Traced, each, single
from merge_core.operators.task_vectors import DENSITY, TaskVector, Thinning, operator
from merge_core.operators.trimming import Cut, DeltaMagnitudes, cut_at, cuts, taken, trace_cuts

if TYPE_CHECKING:
    from torch import Tensor


def counts(density: float, gamma: float, length: int) -> tuple[int, int]:
    """How many of the largest magnitudes are outliers, and how many are kept with them counted in."""
    keep = int(density * length)
    outliers = min(int(gamma * length), length - keep)
    return outliers, outliers + keep


def _measure(stream: Stream, parameters: Parameters) -> Traced:
    """Find two cuts for every expert: that of the outliers and that of all which are not too small."""
    wanted = [
        counts(density, gamma, stream.length)
        for density, gamma in zip(each(parameters, "density"), each(parameters, "gamma"), strict=True)
    ]
    magnitudes = [DeltaMagnitudes(expert) for expert in range(len(wanted))]
    outliers, keep = zip(*wanted, strict=True)
    found = cuts(stream, magnitudes * 2, keep + outliers)
    return trace_cuts(found[: len(wanted)]) | trace_cuts(found[len(wanted) :], "outlier_")


def _apply(vector: TaskVector) -> Tensor:
    """Keep what lies above the lower cut and not above the upper."""
    delta = vector.delta
    above, below = (cut_at(vector.traced, vector.expert, prefix) for prefix in ("", "outlier_"))
    keep = taken(delta.abs(), vector.chunk, above) & ~taken(delta.abs(), vector.chunk, below)
    return delta * (keep.to(delta.dtype) * single(vector.factor))


def _cuts(vector: TaskVector) -> tuple[Cut, Cut]:
    return cut_at(vector.traced, vector.expert), cut_at(vector.traced, vector.expert, "outlier_")


_BREADCRUMBS = Thinning(
    cite="arXiv:2312.06795",
    exactness=Exactness.GIVEN_TRACE,
    apply=_apply,
    cuts=_cuts,
    parameters=(
        DENSITY,
        Parameter(name="gamma", each=True, default=0.01, low=0.0, high=1.0),
        Parameter(name="rescale", default=False, flag=True),
    ),
    norm="rescale",
    measure=_measure,
    passes=lambda parameters: 3 if any(d < 1.0 for d in each(parameters, "density")) else 0,
    traces=("threshold", "last", "outlier_threshold", "outlier_last"),
)

BREADCRUMBS = operator("breadcrumbs", _BREADCRUMBS, consensus=False, normalize=False)
BREADCRUMBS_TIES = operator("breadcrumbs_ties", _BREADCRUMBS, consensus=True, normalize=False)
