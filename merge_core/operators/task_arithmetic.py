"""Task arithmetic: the base plus weighted task vectors, `W₀ + λ·Σ wᵢ·(Wᵢ − W₀)` (arXiv:2212.04089)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_core.operators.base import Exactness, single
from merge_core.operators.task_vectors import TaskVector, Thinning, operator

if TYPE_CHECKING:
    from torch import Tensor


def _apply(vector: TaskVector) -> Tensor:
    """Keep all."""
    return vector.delta * single(vector.factor)


TASK_ARITHMETIC = operator(
    "task_arithmetic",
    Thinning(
        cite="arXiv:2212.04089",
        exactness=Exactness.ELEMENTWISE,
        apply=_apply,
        fixed={"rescale": False},
    ),
    consensus=False,
    normalize=False,
)
