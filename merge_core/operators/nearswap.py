"""NearSwap: take over from the second model what lies near the base (alchemonaut, QuartetAnemoi-70B-t0.0001).

    w = clamp(t / |W₁ − W₀|, 0, 1)      w·W₁ + (1−w)·W₀

Elements up to `t` apart become those of the expert; the further apart, the more of the base stays.
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
    Traced,
    number,
    single,
)

if TYPE_CHECKING:
    from torch import Tensor

VANISHING = 1e-6
"""The least distance that is divided by: mergekit's epsilon."""


def _apply(chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
    """Weigh the expert by `t` over its distance from the base."""
    base, expert = chunk.tensors
    distance = (base - expert).abs().clamp(min=single(VANISHING))
    # A tensor on top: of a number torch would make a reciprocal and a product, which round twice.
    weight = (distance.new_tensor(single(number(parameters, "t"))) / distance).clamp(min=0.0, max=1.0)
    return weight * expert + (1.0 - weight) * base


def _compiled(chunk: Chunk, parameters: Parameters, traced: Traced, out: Array) -> None:
    from merge_core.operators import kernels

    base, expert = chunk.arrays
    kernels.swap_near(expert, base, np.float32(number(parameters, "t")), np.float32(VANISHING), out)


NEARSWAP = Operator(
    name="nearswap",
    cite="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    exactness=Exactness.ELEMENTWISE,
    needs_base=True,
    experts=(1, 1),
    parameters=(Parameter(name="t"),),
    apply=_apply,
    compiled=_compiled,
)
