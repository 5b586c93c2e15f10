"""Task arithmetic: the base plus weighted task vectors, `W₀ + λ·Σ wᵢ·(Wᵢ − W₀)` (arXiv:2212.04089)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_core.operators.base import (
    Chunk,
    Exactness,
    Operator,
    Parameter,
    Parameters,
    Traced,
    each,
    number,
    single,
    sum_of,
    weighted_sum,
)

if TYPE_CHECKING:
    from torch import Tensor


def _apply(chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
    """Add the scaled sum of the task vectors to the base; `normalize` divides by the sum of the weights."""
    base, *experts = chunk.tensors
    weights = each(parameters, "weight")
    delta = weighted_sum(tuple(expert - base for expert in experts), weights)
    if parameters["normalize"]:
        delta = delta / sum_of(weights)
    return base + delta * single(number(parameters, "lambda"))


TASK_ARITHMETIC = Operator(
    name="task_arithmetic",
    cite="arXiv:2212.04089",
    exactness=Exactness.ELEMENTWISE,
    needs_base=True,
    experts=(1, None),
    parameters=(
        Parameter(name="weight", each=True),
        Parameter(name="lambda", default=1.0),
        Parameter(name="normalize", default=False, flag=True),
    ),
    apply=_apply,
)
