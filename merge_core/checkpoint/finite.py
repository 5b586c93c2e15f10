"""Whether stored weights are numbers: one NaN in one tensor makes a model say nothing but nonsense."""

from __future__ import annotations

import numpy as np

from merge_core.checkpoint import dtypes

# All bits of the exponent set means NaN or infinity; F8_E4M3 has no infinity, and one NaN of either sign.
_EXPONENTS = {
    "F64": 0x7FF0_0000_0000_0000,
    "F32": 0x7F80_0000,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F8_E5M2": 0x7C,
    "F8_E4M3": 0x7F,
}


def finite(data: bytes | bytearray | memoryview, dtype: str) -> bool:
    """Say whether little-endian elements hold neither NaN nor infinity; integers never do.

    `data` must be whole elements, as every leaf is; needs a temporary of the same size.
    """
    if dtype not in _EXPONENTS or len(data) == 0:
        return True
    mask = _EXPONENTS[dtype]
    bits = np.frombuffer(data, dtype=f"<u{dtypes.SIZES[dtype]}")
    return int((bits & mask).max()) != mask
