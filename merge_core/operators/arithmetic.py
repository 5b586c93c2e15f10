"""Between stored bytes and float32: the only file beside the kernels where the bits of a merge are made.

Widening is exact but for F64, which is rounded; narrowing rounds to nearest, to even. Subnormals are kept; a
NaN is written as one pattern, since vector units disagree about its payload.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAN = {
    "F64": (torch.int64, 0x7FF8_0000_0000_0000),
    "F32": (torch.int32, 0x7FC0_0000),
    "F16": (torch.int16, 0x7E00),
    "BF16": (torch.int16, 0x7FC0),
}


def stored(data: bytes | memoryview, dtype: str) -> Tensor:
    """Copy stored elements into a tensor of their own type. Raises KeyError on a non-float dtype."""
    copy = torch.empty(len(data), dtype=torch.uint8)
    np.copyto(copy.numpy(), np.frombuffer(data, dtype=np.uint8))
    return copy.view(_TYPES[dtype])


def widen(elements: Tensor) -> Tensor:
    """Stored elements as float32."""
    return elements.to(torch.float32)


def narrow(values: Tensor, dtype: str) -> memoryview:
    """The stored bytes of a float32 tensor of one dimension."""
    rounded = values.to(_TYPES[dtype])
    nan = rounded.isnan()
    integer, pattern = _NAN[dtype]
    bits = rounded.view(integer)
    if bool(nan.any()):
        bits = bits.masked_fill(nan, pattern)
    return bits.contiguous().view(torch.uint8).numpy().data


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep torch from starting threads of its own: the caller's are enough, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
