"""Sign consensus: of the weighted task vectors, average only those that pull in the elected direction.

The second half of TIES (arXiv:2306.01708), which other operators share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merge_core.operators.base import Array, single

if TYPE_CHECKING:
    from torch import Tensor


def agreeing(weighted: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """The sum of those that have, element by element, the sign of the sum of all; zero counts as plus.

    With `normalize` it is divided by the sum of their weights, where anybody agrees and that is not zero.
    """
    total = weighted[0]
    for delta in weighted[1:]:
        total = total + delta
    positive = total >= 0
    mixed, divisor = total.new_zeros(total.shape), total.new_zeros(total.shape)
    for delta, weight in zip(weighted, weights, strict=True):
        agrees = (delta > 0).where(positive, delta < 0)
        mixed = mixed + delta.where(agrees, 0.0)
        divisor = divisor + agrees.to(delta.dtype) * single(weight)
    return mixed / divisor.where(divisor != 0, 1.0) if normalize else mixed


def agreeing_into(weighted: NDArray[Any], weights: Sequence[float], normalize: bool, out: Array) -> None:
    """`agreeing`, compiled; `weighted` is float32 of shape (experts, elements)."""
    from merge_core.operators import kernels

    kernels.agree(weighted, np.array(weights, np.float32), normalize, out)
