"""Task arithmetic: the base plus weighted task vectors, `W₀ + λ·Σ wᵢ·(Wᵢ − W₀)` (arXiv:2212.04089)."""

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
    Traced,
    divide_by,
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


def _compiled(chunk: Chunk, parameters: Parameters, traced: Traced, out: Array) -> None:
    from merge_core.operators import kernels

    base, *experts = chunk.arrays
    weights = each(parameters, "weight")
    kernels.scale_delta(experts[0], base, np.float32(weights[0]), out)
    for expert, weight in zip(experts[1:], weights[1:], strict=True):
        kernels.add_scaled_delta(expert, base, np.float32(weight), out)
    if parameters["normalize"]:
        divide_by(sum_of(weights), out)
    kernels.add_to_base(base, np.float32(number(parameters, "lambda")), out)


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
    compiled=_compiled,
)
