"""RAM: average what several experts have changed, keep what one has changed (arXiv:2601.13572).

An expert has changed an element where it lies more than `epsilon` from the base. What one alone has changed
keeps its full size, what several have changed is averaged over those, and the rest stays the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from merge_core.operators.base import (
    Array,
    Chunk,
    Exactness,
    Operator,
    Parameter,
    Parameters,
    Traced,
    number,
    single,
)
from merge_core.operators.scratch import scratch

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = Parameter(name="epsilon", default=1e-5, low=0.0)


def reinforced(chunk: Chunk, epsilon: float, factors: Sequence[float]) -> Tensor:
    """The base plus the averaged changes; what one expert alone has changed is first taken times its factor.

    A NaN counts as a change, so that it shows in the result.
    """
    base, *experts = chunk.tensors
    deltas = [expert - base for expert in experts]
    changed = [~(delta.abs() <= single(epsilon)) for delta in deltas]
    count = base.new_zeros(base.shape)
    for mask in changed:
        count = count + mask.to(base.dtype)
    total = base.new_zeros(base.shape)
    for delta, mask, factor in zip(deltas, changed, factors, strict=True):
        kept = delta.where(mask, 0.0)
        total = total + (kept * single(factor)).where(count == 1, kept)
    return base + total / count.clamp(min=1.0)


def reinforced_into(chunk: Chunk, epsilon: float, factors: Sequence[float], out: Array) -> None:
    """`reinforced`, compiled."""
    from merge_core.operators import kernels

    base, *experts = chunk.arrays
    least, count = np.float32(epsilon), scratch("count", len(base), np.float32)
    count[:] = out[:] = 0.0
    for expert in experts:
        kernels.count_changed(expert, base, least, count)
    for expert, factor in zip(experts, factors, strict=True):
        kernels.add_changed(expert, base, least, count, np.float32(factor), out)
    kernels.add_mean_to_base(base, count, out)


def _apply(chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
    return reinforced(chunk, number(parameters, "epsilon"), [1.0] * (len(chunk.arrays) - 1))


def _compiled(chunk: Chunk, parameters: Parameters, traced: Traced, out: Array) -> None:
    reinforced_into(chunk, number(parameters, "epsilon"), [1.0] * (len(chunk.arrays) - 1), out)


RAM = Operator(
    name="ram",
    cite="arXiv:2601.13572",
    exactness=Exactness.ELEMENTWISE,
    needs_base=True,
    experts=(1, None),
    parameters=(EPSILON,),
    apply=_apply,
    compiled=_compiled,
)
