"""The compiled steps of the formulas that many merges use: float32, one dimension, no fused multiply-add.

Each is a plain loop, which the compiler turns into vector code; it may not contract or reorder anything, so
the bits are those of the same steps in torch. The machine code is kept in numba's cache folder. Scalars
arrive as float32 (`np.float32`), or numba would compute in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:

    def kernel(function: F) -> F: ...

else:
    kernel = numba.njit(nogil=True, cache=True)

BLOCK = 4096


@kernel
def widen_bf16(stored: Any, out: Any) -> None:
    """Bfloat16 (as uint16) to float32 (as uint32)."""
    for i in range(stored.size):
        out[i] = np.uint32(stored[i]) << np.uint32(16)


@kernel
def narrow_bf16(bits: Any, out: Any) -> Any:
    """Float32 (as uint32) to bfloat16 (as uint16), to nearest, to even; whether all of it is finite."""
    largest = np.uint16(0)
    for i in range(bits.size):
        b = bits[i]
        rounded = np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
        nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        stored = np.uint16(0x7FC0) if nan else rounded
        out[i] = stored
        largest = max(largest, stored & np.uint16(0x7FFF))
    return largest < np.uint16(0x7F80)


@kernel
def store_f32(bits: Any, out: Any) -> Any:
    """Float32 to float32, both as uint32, a NaN as one pattern; whether all of it is finite."""
    largest = np.uint32(0)
    for i in range(bits.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        out[i] = np.uint32(0x7FC00000) if magnitude > np.uint32(0x7F800000) else bits[i]
        largest = max(largest, magnitude)
    return largest < np.uint32(0x7F800000)


@kernel
def scale(x: Any, weight: Any, out: Any) -> None:
    """out = x·w."""
    for i in range(out.size):
        out[i] = x[i] * weight


@kernel
def add_scaled(x: Any, weight: Any, out: Any) -> None:
    """out = out + x·w, a product and a sum."""
    for i in range(out.size):
        out[i] = out[i] + x[i] * weight


@kernel
def scale_delta(x: Any, base: Any, weight: Any, out: Any) -> None:
    """out = (x − base)·w."""
    for i in range(out.size):
        out[i] = (x[i] - base[i]) * weight


@kernel
def add_scaled_delta(x: Any, base: Any, weight: Any, out: Any) -> None:
    """out = out + (x − base)·w."""
    for i in range(out.size):
        out[i] = out[i] + (x[i] - base[i]) * weight


@kernel
def divide(out: Any, divisor: Any) -> None:
    """out = out / divisor."""
    for i in range(out.size):
        out[i] = out[i] / divisor


@kernel
def add_to_base(base: Any, weight: Any, out: Any) -> None:
    """out = base + out·w."""
    for i in range(out.size):
        out[i] = base[i] + out[i] * weight


@kernel
def keep_above(x: Any, base: Any, level: Any, ties: Any, weight: Any, out: Any) -> None:
    """out = (x − base)·w where |x − base| is above `level`, or equal and among the first `ties`; else 0·w."""
    for i in range(out.size):
        delta = x[i] - base[i]
        magnitude = abs(delta)
        kept = (magnitude > level) | ((magnitude == level) & (i < ties))
        out[i] = (delta if kept else np.float32(0.0)) * weight


@kernel
def agree(weighted: Any, weights: Any, normalize: bool, out: Any) -> None:
    """The sum of those rows of `weighted` that have the sign of the sum of all, over their `weights`.

    A sum of zero counts as plus; without `normalize`, and where nobody agrees, nothing is divided.
    """
    experts, length = weighted.shape
    positive = np.empty(BLOCK, np.bool_)
    divisor = np.empty(BLOCK, np.float32)
    for start in range(0, length, BLOCK):
        size = min(BLOCK, length - start)
        total = out[start : start + size]
        total[:] = weighted[0, start : start + size]
        for k in range(1, experts):
            row = weighted[k, start : start + size]
            for i in range(size):
                total[i] = total[i] + row[i]
        for i in range(size):
            positive[i] = total[i] >= 0
            total[i] = 0.0
            divisor[i] = 0.0
        for k in range(experts):
            row, weight = weighted[k, start : start + size], weights[k]
            for i in range(size):
                agrees = (row[i] > 0) if positive[i] else (row[i] < 0)
                total[i] = total[i] + (row[i] if agrees else np.float32(0.0))
                divisor[i] = divisor[i] + (weight if agrees else np.float32(0.0))
        if normalize:
            for i in range(size):
                total[i] = total[i] / (divisor[i] if divisor[i] != 0 else np.float32(1.0))


@kernel
def delta_magnitude(x: Any, base: Any, out: Any) -> None:
    """out = |x − base|."""
    for i in range(out.size):
        out[i] = abs(x[i] - base[i])


@kernel
def count_upper(bits: Any, counts: Any) -> None:
    """Count 32 bit patterns by their upper 16 bits."""
    for i in range(bits.size):
        counts[bits[i] >> np.uint32(16)] += 1


@kernel
def count_lower(bits: Any, upper: Any, counts: Any) -> None:
    """Count 32 bit patterns whose upper 16 bits are `upper` by their lower 16."""
    for i in range(bits.size):
        if bits[i] >> np.uint32(16) == upper:
            counts[bits[i] & np.uint32(0xFFFF)] += 1


@kernel
def block_dots(x: Any, y: Any, out: Any) -> None:
    """The inner product of each block of 4096 elements in float64, folded by halves; the last one padded."""
    terms = np.empty(BLOCK, np.float64)
    for block in range(out.size):
        start = block * BLOCK
        size = min(BLOCK, x.size - start)
        for i in range(size):
            terms[i] = np.float64(x[start + i]) * np.float64(y[start + i])
        for i in range(size, BLOCK):
            terms[i] = 0.0
        half = BLOCK // 2
        while half:
            for i in range(half):
                terms[i] = terms[i] + terms[half + i]
            half //= 2
        out[block] = terms[0]


@kernel
def swap_near(x: Any, base: Any, t: Any, least: Any, out: Any) -> None:
    """out = w·x + (1−w)·base, w = t over |base − x| but at least `least`, between 0 and 1."""
    zero, one = np.float32(0.0), np.float32(1.0)
    for i in range(out.size):
        distance = abs(base[i] - x[i])
        weight = t / (least if distance < least else distance)
        weight = zero if weight < zero else (one if weight > one else weight)
        out[i] = weight * x[i] + (one - weight) * base[i]


@kernel
def count_changed(x: Any, base: Any, epsilon: Any, count: Any) -> None:
    """count = count + 1 where |x − base| is not within `epsilon`."""
    for i in range(count.size):
        within = abs(x[i] - base[i]) <= epsilon
        count[i] = count[i] + (np.float32(0.0) if within else np.float32(1.0))


@kernel
def add_changed(x: Any, base: Any, epsilon: Any, count: Any, factor: Any, out: Any) -> None:
    """out = out + (x − base) where that is not within `epsilon`; times `factor` where `count` is 1."""
    for i in range(out.size):
        delta = x[i] - base[i]
        kept = np.float32(0.0) if abs(delta) <= epsilon else delta
        out[i] = out[i] + (kept * factor if count[i] == 1 else kept)


@kernel
def add_mean_to_base(base: Any, count: Any, out: Any) -> None:
    """out = base + out / count, where `count` is over 1."""
    for i in range(out.size):
        out[i] = base[i] + out[i] / (count[i] if count[i] > 1 else np.float32(1.0))
