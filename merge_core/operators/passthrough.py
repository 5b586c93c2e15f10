"""Passthrough: one tensor as it is. What a plan uses for integer tensors, which no arithmetic is defined on.

The executor copies bytes and never calls a kernel, so every element type survives, NaN payloads included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_core.operators.base import Chunk, Exactness, Operator, Parameters, Traced

if TYPE_CHECKING:
    from torch import Tensor


def _apply(chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
    return chunk.tensors[0]


PASSTHROUGH = Operator(
    name="passthrough",
    cite="",
    exactness=Exactness.ELEMENTWISE,
    needs_base=False,
    experts=(1, 1),
    parameters=(),
    apply=_apply,
)
