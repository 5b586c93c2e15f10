"""Between stored bytes and float32: what comes before every formula, and after it.

Widening is exact but for F64, which is rounded; narrowing rounds to nearest, to even. Subnormals are kept; a
NaN is written as one pattern, since vector units disagree about its payload.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge_core.operators import kernels
from merge_core.operators.base import Array, Stored

_STORED: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}

Bytes = bytes | bytearray | memoryview | NDArray[Any]


def elements(data: Bytes, dtype: str) -> NDArray[Any]:
    """Stored bytes as an array of their elements, bfloat16 as uint16; raises KeyError on a non-float type."""
    return np.frombuffer(data, _STORED[dtype])


def widen(stored: NDArray[Any], dtype: str, out: Array) -> Array:
    """Elements as float32: in `out`, or where they lie when that is what they are."""
    if dtype == "F32":
        return stored
    if dtype == "BF16":
        kernels.widen(stored, out)
    else:
        with np.errstate(over="ignore"):
            np.copyto(out, stored, casting="same_kind")
    return out


def finite(array: Stored) -> bool:
    """Whether elements that kernels take are numbers, all of them."""
    bits: NDArray[Any] = array if array.dtype == np.uint16 else array.view(np.uint32)
    infinity = 0x7F80 if bits.itemsize == 2 else 0x7F800000
    return not np.any(bits & infinity == infinity)


def seal(out: Array) -> bool:
    """What `narrow` makes of float32 values in float32, where they lie; whether all are finite."""
    return bool(kernels.seal_f32(out.view(np.uint32)))


def narrow(values: Array, dtype: str, out: NDArray[Any]) -> bool:
    """Store float32 values in `out`, an array as `elements` gives it; whether all are finite there."""
    if dtype == "BF16":
        return bool(kernels.narrow_bf16(values.view(np.uint32), out))
    if dtype == "F32":
        return bool(kernels.store_f32(values.view(np.uint32), out.view(np.uint32)))
    with np.errstate(over="ignore"):
        np.copyto(out, values, casting="same_kind")
    finite = np.isfinite(out)
    if finite.all():
        return True
    out[np.isnan(out)] = np.nan
    return False
