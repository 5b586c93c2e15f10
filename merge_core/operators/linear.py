"""Linear: the weighted mean of the models, `Σ wᵢ·Wᵢ / Σ wᵢ` (model soups, arXiv:2203.05482)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_core.operators.base import Array, Chunk, Exactness, Operator, Parameter, Parameters, Traced, each
from merge_core.operators.weighted import divide_by, sum_of, weighted_sum, weighted_sum_into

if TYPE_CHECKING:
    from torch import Tensor


def _apply(chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
    """Sum the weighted models, then divide by the sum of the weights unless `normalize` is off."""
    weights = each(parameters, "weight")
    total = weighted_sum(chunk.tensors, weights)
    return total / sum_of(weights) if parameters["normalize"] else total


def _compiled(chunk: Chunk, parameters: Parameters, traced: Traced, out: Array) -> None:
    weights = each(parameters, "weight")
    weighted_sum_into(chunk.arrays, weights, out)
    if parameters["normalize"]:
        divide_by(sum_of(weights), out)


LINEAR = Operator(
    name="linear",
    cite="arXiv:2203.05482",
    exactness=Exactness.ELEMENTWISE,
    needs_base=False,
    experts=(1, None),
    parameters=(
        Parameter(name="weight", each=True),
        Parameter(name="normalize", default=True, flag=True),
    ),
    apply=_apply,
    compiled=_compiled,
)
