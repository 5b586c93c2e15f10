"""Passthrough: one model's tensor, times `scale`; and COPY, its bytes as they are.

COPY is what a plan uses where nothing is computed, for integer tensors above all, which no arithmetic is
defined on. The executor copies the bytes, so every element type survives, NaN payloads included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_core.operators.base import (
    Array,
    Chunk,
    Exactness,
    Operator,
    Parameter,
    Parameters,
    Traced,
    each,
    single,
)
from merge_core.operators.weighted import weighted_sum_into

if TYPE_CHECKING:
    from torch import Tensor


def _apply(chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
    return chunk.tensors[0] * single(each(parameters, "scale")[0])


def _compiled(chunk: Chunk, parameters: Parameters, traced: Traced, out: Array) -> None:
    weighted_sum_into(chunk.arrays, each(parameters, "scale"), out)


PASSTHROUGH = Operator(
    name="passthrough",
    cite="arXiv:2312.15166",
    exactness=Exactness.ELEMENTWISE,
    needs_base=False,
    experts=(1, 1),
    parameters=(Parameter(name="scale", each=True, default=1.0),),
    apply=_apply,
    compiled=_compiled,
)

COPY = Operator(
    name="copy",
    cite="",
    exactness=Exactness.ELEMENTWISE,
    needs_base=False,
    experts=(1, 1),
    parameters=(),
    apply=lambda chunk, parameters, traced: chunk.tensors[0],
)
