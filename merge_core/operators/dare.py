"""DARE: drop each element of a task vector by chance, and rescale the rest (arXiv:2311.03099).

`δ → δ/p` with the probability p = density, else 0: the mean stays what it was. `rescale: false` leaves out
the division, `rescale_l1` restores the L1 norm instead (which a Trace then holds), as mergekit does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from merge_core.operators.base import Array, Exactness, Parameter, single
from merge_core.operators.chance import draws, halves, limit
from merge_core.operators.task_vectors import DENSITY, TaskVector, Thinning, operator

if TYPE_CHECKING:
    from torch import Tensor


def _scale(vector: TaskVector) -> float:
    """What a kept element is multiplied by: its weight, over the probability to be kept."""
    rescaled = vector.parameters["rescale"] and not vector.parameters["rescale_l1"]
    density = vector.own("density")
    return vector.factor / density if rescaled and density else vector.factor


def _apply(vector: TaskVector) -> Tensor:
    """Keep an element when it draws less than its probability asks for."""
    delta, chunk = vector.delta, vector.chunk
    keep = draws(chunk.keys[vector.expert], delta, chunk.start) < limit(vector.own("density"))
    return delta * (keep.to(delta.dtype) * single(_scale(vector)))


def _compiled(vector: TaskVector, out: Array) -> None:
    from merge_core.operators import kernels

    scale, below = np.float32(_scale(vector)), limit(vector.own("density"))
    if below >> 32:
        kernels.scale_delta(*vector.operands, scale, out)
        return
    low, high = map(np.uint32, halves(vector.chunk.keys[vector.expert]))
    kernels.keep_by_chance(*vector.operands, low, high, vector.chunk.start, np.uint32(below), scale, out)


RESCALE = (
    Parameter(name="rescale", default=True, flag=True),
    Parameter(name="rescale_l1", default=False, flag=True),
)

_DARE = Thinning(
    cite="arXiv:2311.03099",
    exactness=Exactness.ELEMENTWISE,
    apply=_apply,
    compiled=_compiled,
    parameters=(DENSITY, *RESCALE),
    norm="rescale_l1",
    chance=True,
)

DARE_LINEAR = operator("dare_linear", _DARE, consensus=False, normalize=False)
DARE_TIES = operator("dare_ties", _DARE, consensus=True, normalize=False)
