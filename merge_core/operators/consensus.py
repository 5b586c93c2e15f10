"""Sign consensus: of the weighted task vectors, add only those that pull in the elected direction.

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


def agreeing(
    rows: Sequence[Tensor], weights: Sequence[float], *, normalize: bool, factors: Sequence[float] = ()
) -> Tensor:
    """The sum of those that have, element by element, the sign of the sum of all; zero counts as plus.

    They are added times their `factors`, or as they are. With `normalize` the sum is divided by that of
    their weights, where anybody agrees and that is not zero. A NaN shows even in those that do not agree.
    """
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    positive = total >= 0
    mixed, divisor = total.new_zeros(total.shape), total.new_zeros(total.shape)
    for row, factor, weight in zip(rows, factors or [1.0] * len(rows), weights, strict=True):
        agrees = (row > 0).where(positive, row < 0).to(row.dtype)
        mixed = mixed + row * (agrees * single(factor))
        divisor = divisor + agrees * single(weight)
    return mixed / divisor.where(divisor != 0, 1.0) if normalize else mixed


def agreeing_into(
    rows: NDArray[Any],
    weights: Sequence[float],
    out: Array,
    *,
    normalize: bool,
    factors: Sequence[float] = (),
) -> None:
    """`agreeing`, compiled; `rows` is float32 of shape (experts, elements)."""
    from merge_core.operators import kernels

    taken = np.array(factors or [1.0] * len(rows), np.float32)
    kernels.agree(rows, taken, np.array(weights, np.float32), normalize, out)
