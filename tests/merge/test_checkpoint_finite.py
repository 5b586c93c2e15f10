"""One element that is no number is found among half a million."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.checkpoint.finite import finite

MIB = 1 << 20


@pytest.mark.parametrize(
    ("dtype", "bits", "width"),
    [
        ("F64", 0x7FF0000000000000, 8),
        ("F64", 0xFFF8000000000001, 8),
        ("F32", 0x7F800000, 4),
        ("F32", 0xFFC00001, 4),
        ("F16", 0x7C00, 2),
        ("F16", 0xFE01, 2),
        ("BF16", 0xFF80, 2),
        ("BF16", 0x7FC0, 2),
        ("F8_E5M2", 0x7C, 1),
        ("F8_E5M2", 0xFF, 1),
        ("F8_E4M3", 0xFF, 1),
    ],
)
def test_one_bad_number_in_a_leaf_is_found(dtype: str, bits: int, width: int) -> None:
    data = bytearray(MIB)
    assert finite(data, dtype)
    data[-width:] = bits.to_bytes(width, "little")
    assert not finite(memoryview(data), dtype)
    assert finite(memoryview(data), "U8")
    assert finite(b"", dtype)


@given(st.lists(st.floats(width=32), max_size=40), st.sampled_from(["F16", "F32", "F64"]))
@settings(max_examples=200, deadline=None)
def test_finite_agrees_with_numpy(values: list[float], dtype: str) -> None:
    kind = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    with np.errstate(over="ignore"):
        array = np.array(values, dtype=np.float64).astype(kind)
    assert finite(array.tobytes(), dtype) == bool(np.isfinite(array).all())
