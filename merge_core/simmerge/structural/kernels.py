"""The compiled formula of `sketch`: the same additions in the same order, in one pass over what is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt
from numba.extending import overload

from merge_core.simmerge.structural.sketch import BLOCK, HIGH, LARGEST, LOW, WIDTH, Sums, signs, widened

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:

    def kernel(function: F) -> F: ...

    def wide(stored: Any) -> Any:
        """A stored element as float64; in kernels only."""

else:
    # No fused multiply-add and no reassociation: numba does neither unless it is asked to.
    kernel = numba.njit(nogil=True, cache=True)

    def wide(stored):
        raise NotImplementedError

    @overload(wide, inline="always")
    def _wide(stored):
        if stored == numba.types.uint16:
            return lambda stored: np.float64(np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32))
        return lambda stored: np.float64(stored)


def measure(stored: npt.NDArray[Any], draws: npt.NDArray[np.uint16]) -> Sums:
    """As `sketch.formula`."""
    count = len(draws)
    l1, squares, limbs = np.zeros(count), np.zeros(count), np.zeros((2, WIDTH), np.int64)
    fits = bool(_measure(stored, draws, signs(), l1, squares, limbs))
    # Patterns of magnitudes are ordered as the magnitudes are, and integers compare in vector code.
    patterns = stored.view(f"u{stored.itemsize}")
    largest = _largest(patterns, patterns.dtype.type((1 << 8 * stored.itemsize - 1) - 1))
    found = widened(np.array([largest], patterns.dtype).view(stored.dtype))
    return Sums(l1=l1, squares=squares, largest=float(found[0]), limbs=limbs, fits=fits)


@kernel
def _measure(stored: Any, draws: Any, table: Any, l1: Any, squares: Any, limbs: Any) -> Any:
    magnitudes, powers, sketch = np.empty(WIDTH), np.empty(WIDTH), np.empty(WIDTH)
    fits = True
    for index in range(draws.shape[0]):
        magnitudes[:], powers[:], sketch[:] = 0.0, 0.0, 0.0
        block = stored[index * BLOCK : (index + 1) * BLOCK]
        for row in range(-(-block.size // WIDTH)):
            elements, signed = block[row * WIDTH : (row + 1) * WIDTH], table[row]
            sign = 1.0 if draws[index, row] & WIDTH else -1.0
            rotation = np.int64(draws[index, row]) & (WIDTH - 1)
            cut = min(elements.size, WIDTH - rotation)
            _add(elements[:cut], signed, sign, magnitudes, powers, sketch[rotation:])
            _add(elements[cut:], signed[cut:], sign, magnitudes[cut:], powers[cut:], sketch)
        l1[index], squares[index] = _fold(magnitudes), _fold(powers)
        for i in range(WIDTH):
            fits = fits and abs(sketch[i]) <= LARGEST
            high = np.rint(sketch[i] * HIGH)
            limbs[0, i] += np.int64(high)
            limbs[1, i] += np.int64(np.rint((sketch[i] - high / HIGH) * LOW))
    return fits


@kernel
def _add(elements: Any, signed: Any, sign: Any, magnitudes: Any, powers: Any, sketch: Any) -> None:
    for i in range(elements.size):
        value = wide(elements[i])
        magnitudes[i] += abs(value)
        powers[i] += value * value
        sketch[i] += value * signed[i] * sign


@kernel
def _largest(patterns: Any, magnitude: Any) -> Any:
    largest = patterns[0] & magnitude
    for i in range(patterns.size):
        largest = max(largest, patterns[i] & magnitude)
    return largest


@kernel
def _fold(lanes: Any) -> Any:
    half = WIDTH // 2
    while half > 0:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    return lanes[0]
