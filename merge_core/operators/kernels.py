"""The compiled steps of the formulas that many merges use: float32, one dimension, no fused multiply-add.

Each is a plain loop, which the compiler turns into vector code; it may not contract or reorder anything, so
the bits are those of the same steps in torch. What a model stores is widened where it is used (`f32`), never
in memory: arrays named `x` or `base` are float32 or bfloat16, and a variant is compiled for each. The machine
code is kept in numba's cache folder. Scalars arrive as float32 (`np.float32`), or numba would compute in
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np
from numba.extending import overload

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:

    def kernel(function: F) -> F: ...

    def f32(stored: Any) -> Any:
        """A stored element, float32 or the pattern of a bfloat16 (uint16), as float32; in kernels only."""

    def distances(x: Any, base: Any, start: int, out: Any) -> None:
        """out = |x − base| from `start` on, or |x| where the base is None; in kernels only."""

else:
    kernel = numba.njit(nogil=True, cache=True)

    def f32(stored):
        raise NotImplementedError

    @overload(f32, inline="always")
    def _f32(stored):
        if stored == numba.types.uint16:
            return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
        return lambda stored: stored

    def distances(x, base, start, out):
        raise NotImplementedError

    @overload(distances)
    def _distances(x, base, start, out):
        def from_zero(x, base, start, out):
            row = x[start : start + out.size]
            for i in range(out.size):
                out[i] = abs(f32(row[i]))

        def from_base(x, base, start, out):
            row, origin = x[start : start + out.size], base[start : start + out.size]
            for i in range(out.size):
                out[i] = abs(f32(row[i]) - f32(origin[i]))

        return from_zero if isinstance(base, numba.types.NoneType) else from_base


BLOCK = 4096


@kernel
def widen(x: Any, out: Any) -> None:
    """Stored elements as float32."""
    for i in range(out.size):
        out[i] = f32(x[i])


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
def seal_f32(bits: Any) -> Any:
    """`store_f32` where the values lie."""
    finite = True
    for start in range(0, bits.size, BLOCK):
        block, largest = bits[start : start + BLOCK], np.uint32(0)
        for i in range(block.size):
            largest = max(largest, block[i] & np.uint32(0x7FFFFFFF))
        if largest >= np.uint32(0x7F800000):
            finite = False
            for i in range(block.size):
                if block[i] & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
                    block[i] = np.uint32(0x7FC00000)
    return finite


@kernel
def weighted_sum(arrays: Any, weights: Any, out: Any) -> None:
    """out = Σ x·w over the `arrays`, from left to right, each a product and a sum."""
    for start in range(0, out.size, BLOCK):
        total = out[start : start + BLOCK]
        x, weight = arrays[0][start:], weights[0]
        for i in range(total.size):
            total[i] = f32(x[i]) * weight
        for k in range(1, len(arrays)):
            x, weight = arrays[k][start:], weights[k]
            for i in range(total.size):
                total[i] = total[i] + f32(x[i]) * weight


@kernel
def square_sums(arrays: Any, out: Any) -> None:
    """Σx² of each of the `arrays` in float64, of sums in float32 of at most 16 squares in 256 lanes."""
    lanes = np.empty(256, np.float32)
    for k in range(len(arrays)):
        x, total = arrays[k], 0.0
        for start in range(0, x.size, BLOCK):
            block = x[start : start + BLOCK]
            lanes[:] = 0.0
            whole = block.size // 256 * 256
            for at in range(0, whole, 256):
                part = block[at : at + 256]
                for i in range(256):
                    value = f32(part[i])
                    lanes[i] = lanes[i] + value * value
            for i in range(whole, block.size):
                lanes[i - whole] = lanes[i - whole] + f32(block[i]) * f32(block[i])
            for i in range(256):
                total += np.float64(lanes[i])
        out[k] = total


@kernel
def scale_delta(x: Any, base: Any, weight: Any, out: Any) -> None:
    """out = (x − base)·w."""
    for i in range(out.size):
        out[i] = (f32(x[i]) - f32(base[i])) * weight


@kernel
def weighted_deltas(arrays: Any, weights: Any, out: Any) -> None:
    """out = Σ (x − base)·w over the `arrays` behind the first, which is the base, from left to right."""
    origin = np.empty(BLOCK, np.float32)
    for start in range(0, out.size, BLOCK):
        total, base = out[start : start + BLOCK], arrays[0][start:]
        for i in range(total.size):
            origin[i] = f32(base[i])
        x, weight = arrays[1][start:], weights[0]
        for i in range(total.size):
            total[i] = (f32(x[i]) - origin[i]) * weight
        for k in range(2, len(arrays)):
            x, weight = arrays[k][start:], weights[k - 1]
            for i in range(total.size):
                total[i] = total[i] + (f32(x[i]) - origin[i]) * weight


@kernel
def divide(out: Any, divisor: Any) -> None:
    """out = out / divisor."""
    for i in range(out.size):
        out[i] = out[i] / divisor


@kernel
def add_to_base(base: Any, weight: Any, out: Any) -> None:
    """out = base + out·w."""
    for i in range(out.size):
        out[i] = f32(base[i]) + out[i] * weight


@kernel
def agree(rows: Any, factors: Any, weights: Any, normalize: bool, out: Any) -> None:
    """Σ rows·factors over those rows that have the sign of the sum of all, over the sum of their `weights`.

    A sum of zero counts as plus; without `normalize`, and where nobody agrees, nothing is divided. Those who
    do not agree are multiplied by zero, so that a NaN among them shows.
    """
    experts, length = rows.shape
    elected = np.empty(BLOCK, np.float32)
    divisor = np.empty(BLOCK, np.float32)
    for start in range(0, length, BLOCK):
        size = min(BLOCK, length - start)
        total = out[start : start + size]
        for i in range(size):
            elected[i] = rows[0, start + i]
            total[i] = divisor[i] = 0.0
        for k in range(1, experts):
            row = rows[k, start : start + size]
            for i in range(size):
                elected[i] = elected[i] + row[i]
        for k in range(experts):
            row, factor, weight = rows[k, start : start + size], factors[k], weights[k]
            for i in range(size):
                positive = elected[i] >= 0
                agrees = ((row[i] > 0) & positive) | ((row[i] < 0) & (not positive))
                total[i] = total[i] + row[i] * (factor if agrees else np.float32(0.0))
                divisor[i] = divisor[i] + (weight if agrees else np.float32(0.0))
        if normalize:
            for i in range(size):
                total[i] = total[i] / (divisor[i] if divisor[i] != 0 else np.float32(1.0))


@kernel
def delta(x: Any, base: Any, out: Any) -> None:
    """out = x − base."""
    for i in range(out.size):
        out[i] = f32(x[i]) - f32(base[i])


@kernel
def delta_magnitude(x: Any, base: Any, out: Any) -> None:
    """out = |x − base|."""
    for i in range(out.size):
        out[i] = abs(f32(x[i]) - f32(base[i]))


@kernel
def count_upper(x: Any, base: Any, counts: Any) -> Any:
    """Count |x − base| by the upper 16 bits of its pattern but the sign; how many are zero as a whole.

    A NaN can have a sign though what is compared has none.
    """
    zeros, values = 0, np.empty(BLOCK, np.float32)
    for start in range(0, x.size, BLOCK):
        block = values[: min(BLOCK, x.size - start)]
        distances(x, base, start, block)
        bits = block.view(np.uint32)
        for i in range(bits.size):
            counts[bits[i] >> np.uint32(16) & np.uint32(0x7FFF)] += 1
        for i in range(bits.size):
            zeros += bits[i] == np.uint32(0)
    return zeros


@kernel
def count_lower(x: Any, base: Any, upper: Any, counts: Any) -> None:
    """Count those |x − base| whose upper 16 bits but the sign are `upper` by their lower 16."""
    values = np.empty(BLOCK, np.float32)
    for start in range(0, x.size, BLOCK):
        block = values[: min(BLOCK, x.size - start)]
        distances(x, base, start, block)
        bits = block.view(np.uint32)
        for i in range(bits.size):
            if bits[i] >> np.uint32(16) & np.uint32(0x7FFF) == upper:
                counts[bits[i] & np.uint32(0xFFFF)] += 1


@kernel
def equal_to(x: Any, base: Any, level: Any, out: Any) -> None:
    """Whether |x − base| equals `level`."""
    values = np.empty(BLOCK, np.float32)
    for start in range(0, x.size, BLOCK):
        block, equal = values[: min(BLOCK, x.size - start)], out[start : start + BLOCK]
        distances(x, base, start, block)
        for i in range(block.size):
            equal[i] = block[i] == level


@kernel
def block_dots(x: Any, y: Any, out: Any) -> None:
    """The inner product of each block of 4096 elements in float64, folded by halves; the last one padded."""
    eighth = BLOCK // 8
    terms, padded_x, padded_y = (
        np.empty(eighth, np.float64),
        np.zeros(BLOCK, x.dtype),
        np.zeros(BLOCK, y.dtype),
    )
    for block in range(out.size):
        start = block * BLOCK
        a, b = x[start : start + BLOCK], y[start : start + BLOCK]
        if a.size < BLOCK:
            padded_x[: a.size] = a
            padded_y[: a.size] = b
            a, b = padded_x, padded_y
        for i in range(eighth):
            # Three folds at once.
            p0 = np.float64(f32(a[i])) * np.float64(f32(b[i]))
            p1 = np.float64(f32(a[i + eighth])) * np.float64(f32(b[i + eighth]))
            p2 = np.float64(f32(a[i + 2 * eighth])) * np.float64(f32(b[i + 2 * eighth]))
            p3 = np.float64(f32(a[i + 3 * eighth])) * np.float64(f32(b[i + 3 * eighth]))
            p4 = np.float64(f32(a[i + 4 * eighth])) * np.float64(f32(b[i + 4 * eighth]))
            p5 = np.float64(f32(a[i + 5 * eighth])) * np.float64(f32(b[i + 5 * eighth]))
            p6 = np.float64(f32(a[i + 6 * eighth])) * np.float64(f32(b[i + 6 * eighth]))
            p7 = np.float64(f32(a[i + 7 * eighth])) * np.float64(f32(b[i + 7 * eighth]))
            terms[i] = ((p0 + p4) + (p2 + p6)) + ((p1 + p5) + (p3 + p7))
        half = eighth // 2
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
        distance = abs(f32(base[i]) - f32(x[i]))
        weight = t / (least if distance < least else distance)
        weight = zero if weight < zero else (one if weight > one else weight)
        out[i] = weight * f32(x[i]) + (one - weight) * f32(base[i])


@kernel
def count_changed(x: Any, base: Any, epsilon: Any, count: Any) -> None:
    """count = count + 1 where |x − base| is not within `epsilon`."""
    for i in range(count.size):
        within = abs(f32(x[i]) - f32(base[i])) <= epsilon
        count[i] = count[i] + (np.float32(0.0) if within else np.float32(1.0))


@kernel
def add_changed(x: Any, base: Any, epsilon: Any, count: Any, factor: Any, out: Any) -> None:
    """out = out + (x − base) where that is not within `epsilon`; times `factor` where `count` is 1."""
    for i in range(out.size):
        delta = f32(x[i]) - f32(base[i])
        kept = np.float32(0.0) if abs(delta) <= epsilon else delta
        out[i] = out[i] + (kept * factor if count[i] == 1 else kept)


@kernel
def add_mean_to_base(base: Any, count: Any, out: Any) -> None:
    """out = base + out / count, where `count` is over 1."""
    for i in range(out.size):
        out[i] = f32(base[i]) + out[i] / (count[i] if count[i] > 1 else np.float32(1.0))


@kernel
def add(x: Any, out: Any) -> None:
    """out = out + x."""
    for i in range(out.size):
        out[i] = out[i] + f32(x[i])


@kernel
def philox(low: Any, high: Any, first: int, out: Any) -> None:
    """Philox4x32-10: four draws of 32 bits for each counter from `first` on; whole counters only."""
    m0, m1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    for quad in range(out.size // 4):
        counter = np.uint64(first + quad)
        c0, c1 = np.uint32(counter), np.uint32(counter >> np.uint64(32))
        c2, c3 = np.uint32(0), np.uint32(0)
        k0, k1 = low, high
        for _ in range(10):
            p0, p1 = m0 * np.uint64(c0), m1 * np.uint64(c2)
            c0 = np.uint32(p1 >> np.uint64(32)) ^ c1 ^ k0
            c2 = np.uint32(p0 >> np.uint64(32)) ^ c3 ^ k1
            c1, c3 = np.uint32(p1), np.uint32(p0)
            k0, k1 = np.uint32(k0 + np.uint32(0x9E3779B9)), np.uint32(k1 + np.uint32(0xBB67AE85))
        out[4 * quad] = c0
        out[4 * quad + 1] = c1
        out[4 * quad + 2] = c2
        out[4 * quad + 3] = c3


@kernel
def keep_by_chance(
    x: Any, base: Any, low: Any, high: Any, start: int, limit: Any, scale: Any, out: Any
) -> None:
    """out = (x − base)·s where an element's draw is below `limit`, else (x − base)·0."""
    dropped = np.float32(0.0) * scale
    draws = np.empty(BLOCK + 8, np.uint32)
    skip = start % 4
    for at in range(0, out.size, BLOCK):
        size = min(BLOCK, out.size - at)
        philox(low, high, (start + at) // 4, draws[: (skip + size + 3) // 4 * 4])
        drawn, row, origin, target = draws[skip:], x[at:], base[at:], out[at:]
        for i in range(size):
            target[i] = (f32(row[i]) - f32(origin[i])) * (scale if drawn[i] < limit else dropped)


@kernel
def rank_keys(x: Any, base: Any, width: int, out: Any) -> None:
    """What sorts each row of `width` elements by |x − base|, ties by index: its bits, then the index.

    A NaN lies above all; they tie.
    """
    bits = np.empty(BLOCK, np.uint32)
    delta = bits.view(np.float32)
    for row in range(0, out.size, width):
        for at in range(0, width, BLOCK):
            size, start = min(BLOCK, width - at), row + at
            for i in range(size):
                delta[i] = f32(x[start + i]) - f32(base[start + i])
            for i in range(size):
                magnitude = min(bits[i] & np.uint32(0x7FFFFFFF), np.uint32(0x7F800001))
                out[start + i] = np.uint64(magnitude) << np.uint64(32) | np.uint64(at + i)


@kernel
def descending_keys(x: Any, base: Any, start: int, out: Any) -> None:
    """What sorts by |x − base|, the largest first, ties by index: its bits' complement, then the index."""
    largest = np.uint32(0x7FFFFFFF)
    values = np.empty(BLOCK, np.float32)
    for at in range(0, out.size, BLOCK):
        keys = out[at : at + BLOCK]
        block = values[: keys.size]
        distances(x, base, at, block)
        bits = block.view(np.uint32)
        for i in range(keys.size):
            keys[i] = np.uint64(largest - (bits[i] & largest)) << np.uint64(32) | np.uint64(start + at + i)


@kernel
def keep_by_rank(
    x: Any, base: Any, ranked: Any, low: Any, high: Any, start: int, limits: Any, scales: Any, out: Any
) -> None:
    """out = (x − base)·scales[r] where an element's draw is below limits[r], else (x − base)·0.

    r counts the smaller elements of its row, which is as long as `limits`; `ranked` are sorted `rank_keys`.
    """
    width = limits.size
    draws = np.empty(width + 8, np.uint32)
    kept = np.empty(width, np.float32)
    for row in range(0, out.size, width):
        skip = (start + row) % 4
        philox(low, high, (start + row) // 4, draws[: (skip + width + 3) // 4 * 4])
        for rank in range(width):
            at = np.uint32(ranked[row + rank])
            # A product, not a choice: nobody predicts a branch on chance.
            kept[at] = scales[rank] * np.float32(draws[skip + at] < limits[rank])
        for i in range(width):
            out[row + i] = (f32(x[row + i]) - f32(base[row + i])) * kept[i]


@kernel
def keep_between(
    x: Any, base: Any, level: Any, ties: Any, outlier: Any, outlier_ties: Any, scale: Any, out: Any
) -> None:
    """out = (x − base)·s where |x − base| is above `level` but not above `outlier`, else (x − base)·0.

    What equals one of the two counts as above it when it is among the first `ties`.
    """
    dropped = np.float32(0.0) * scale
    for i in range(out.size):
        delta = f32(x[i]) - f32(base[i])
        magnitude = abs(delta)
        kept = (magnitude > level) | ((magnitude == level) & (i < ties))
        kept &= not ((magnitude > outlier) | ((magnitude == outlier) & (i < outlier_ties)))
        out[i] = delta * (scale if kept else dropped)


@kernel
def spread(rows: Any, out: Any) -> None:
    """Σ(xₖ − mean)² over the `rows` of each column, one row after the other, as Welford does."""
    count, length = rows.shape
    mean = np.empty(BLOCK, np.float32)
    for start in range(0, length, BLOCK):
        size = min(BLOCK, length - start)
        target = out[start : start + size]
        for i in range(size):
            mean[i] = rows[0, start + i]
            target[i] = 0.0
        for k in range(1, count):
            row, share = rows[k, start : start + size], np.float32(1.0) / np.float32(k + 1)
            for i in range(size):
                off = row[i] - mean[i]
                mean[i] = mean[i] + off * share
                target[i] = target[i] + off * (row[i] - mean[i])


@kernel
def select(measure: Any, level: Any, ties: Any, rows: Any) -> None:
    """Multiply `rows` by 1 in columns where `measure` is above `level`, or equal and early enough; else 0."""
    for k in range(rows.shape[0]):
        row = rows[k]
        for i in range(measure.size):
            kept = (measure[i] > level) | ((measure[i] == level) & (i < ties))
            row[i] = row[i] * (np.float32(1.0) if kept else np.float32(0.0))


@kernel
def magnitude_sums(x: Any, width: int, out: Any) -> None:
    """Σ|x| of each run of `width` elements, from left to right in float64."""
    for run in range(out.size):
        total = 0.0
        for i in range(run * width, min((run + 1) * width, x.size)):
            total += np.float64(abs(f32(x[i])))
        out[run] = total
