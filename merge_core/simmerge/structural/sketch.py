"""The arithmetic of a structure: norms and a count sketch of pieces of tensors, the same bits everywhere.

Every tensor is cut into blocks of 131,072 elements, so any float type fills whole blocks from whole leaves;
a block into 64 rows of 2048. An element has a sign, drawn for its place within a block; a row has a sign and
a rotation, drawn for (tensor name, block, row). The sketch of a block is the sum of its rows, signed and
rotated: a count sketch (Charikar, Chen, Farach-Colton 2002) whose hash is a permutation within each row.
Two elements of one row never share a bucket, two of different rows do with probability 1/2048, so estimates
of inner products are unbiased with no more than a count sketch's variance; and adding rows is vector code.

Any order gives the same bits. Within a block every sum is fp64 in a written-down order: rows from the first
to the last, lanes by halves. Across blocks nothing is rounded: norms are added as exact integers, sketches as
fixed point in two int64 limbs, in units of 2^-14 and 2^-53. Draws come from SHAKE-128, and no library chooses
how to add: no dot product, no reduction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH = 2048
ROWS = 64
BLOCK = WIDTH * ROWS
MAX_BLOCKS = 1 << 24
"""Blocks that fit into one total: a limb of a block has at most 39 bits."""

HIGH, LOW = 2.0**14, 2.0**53
LARGEST = 2.0**24
"""No bucket of a block may be larger: then its high limb still leaves room for MAX_BLOCKS of them."""

Doubles = npt.NDArray[np.float64]
Limbs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sums:
    """What some blocks of one tensor add up to: `l1` and `squares` of each block, the largest magnitude, and
    int64[2, WIDTH], the limbs of the sketch. `fits` says that no bucket was larger than LARGEST."""

    l1: Doubles
    squares: Doubles
    largest: float
    limbs: Limbs
    fits: bool


Measure = Callable[[npt.NDArray[Any], npt.NDArray[np.uint16]], Sums]
"""From stored elements (float64, float32, or bfloat16 as uint16) of whole blocks, of which only the last may
be short, and the draws of these blocks, to their sums."""


def formula(stored: npt.NDArray[Any], draws: npt.NDArray[np.uint16]) -> Sums:
    """The definition of `Sums`; `kernels.measure` gives the same bits, several times as fast."""
    values, table = widened(stored).astype(np.float64), signs()
    count = len(draws)
    l1, squares, limbs, fits = np.zeros(count), np.zeros(count), np.zeros((2, WIDTH), np.int64), True
    with np.errstate(over="ignore", invalid="ignore"):
        for index in range(count):
            magnitudes, powers, sketch = np.zeros(WIDTH), np.zeros(WIDTH), np.zeros(WIDTH)
            block = values[index * BLOCK : (index + 1) * BLOCK]
            for row in range(-(-len(block) // WIDTH)):
                elements = block[row * WIDTH : (row + 1) * WIDTH]
                sign, rotation = _drawn(draws[index, row])
                magnitudes[: len(elements)] += np.abs(elements)
                powers[: len(elements)] += elements * elements
                signed = np.zeros(WIDTH)
                signed[: len(elements)] = elements * table[row, : len(elements)] * sign
                sketch += np.roll(signed, rotation)
            l1[index], squares[index] = fold(magnitudes), fold(powers)
            fits = fits and bool((np.abs(sketch) <= LARGEST).all())
            limbs += _limbs(sketch)
        largest = float(np.abs(values).max(initial=0.0))
    return Sums(l1=l1, squares=squares, largest=largest, limbs=limbs, fits=fits)


def _limbs(sketch: Doubles) -> Limbs:
    """Every bucket as high / 2^14 + low / 2^53, to the nearest; the remainder after `high` is exact."""
    high = np.rint(sketch * HIGH)
    low = np.rint((sketch - high / HIGH) * LOW)
    return np.stack([high, low]).astype(np.int64)


def fold(lanes: Doubles) -> float:
    """Sum a power of two of lanes by adding the upper half onto the lower until one is left; in place."""
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes[:half] += lanes[half:]
        lanes = lanes[:half]
    return float(lanes[0])


def widened(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Patterns of bfloat16 as float32; what is stored as floats as it is."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored


def as_stored(data: bytes | memoryview, dtype: str) -> npt.NDArray[Any]:
    """Bytes of a tensor as what `Measure` takes; float16 is widened to float32."""
    array = np.frombuffer(data, dtype={"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
    return array.astype(np.float32) if dtype == "F16" else array


@lru_cache(maxsize=1)
def signs() -> npt.NDArray[np.float32]:
    """[ROWS, WIDTH] of 1 and -1: the sign of a place within a block."""
    bits = np.frombuffer(hashlib.shake_128(b"weft sketch v2").digest(BLOCK // 8), dtype=np.uint8)
    return np.where(np.unpackbits(bits), np.float32(1), np.float32(-1)).reshape(ROWS, WIDTH)


def draws(name: str, first: int, count: int) -> npt.NDArray[np.uint16]:
    """uint16[count, ROWS] for the blocks of a tensor from `first` on: 11 bits of rotation, one of sign."""
    drawn = b"".join(
        hashlib.shake_128(b"weft sketch v2\0" + name.encode() + b"\0" + str(index).encode()).digest(2 * ROWS)
        for index in range(first, first + count)
    )
    return np.frombuffer(drawn, dtype="<u2").reshape(count, ROWS)


def _drawn(bits: np.uint16) -> tuple[float, int]:
    return (1.0 if int(bits) & WIDTH else -1.0), int(bits) & (WIDTH - 1)


class Total:
    """An exact sum of floats: an integer that counts 2^-1074. Any order gives the same."""

    def __init__(self) -> None:
        self._units = 0

    def add(self, value: float) -> None:
        """Add a finite float; raises OverflowError or ValueError on another."""
        numerator, denominator = value.as_integer_ratio()
        self._units += numerator << (1075 - denominator.bit_length())

    def __iadd__(self, other: Total) -> Total:
        self._units += other._units
        return self

    def __float__(self) -> float:
        """The nearest float; raises OverflowError beyond the largest."""
        return self._units / (1 << 1074)


def sketch_of(limbs: Limbs) -> npt.NDArray[np.float32]:
    """The sketch that summed limbs stand for."""
    high, low = limbs.tolist()
    return np.array([((a << 39) + b) / 2**53 for a, b in zip(high, low, strict=True)], dtype=np.float32)
