"""Memory that a thread uses again for every chunk, so that a merge allocates once and not a million times."""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)


class _Held(threading.local):
    def __init__(self) -> None:
        self.arrays: dict[tuple[str, type], NDArray[Any]] = {}


_held = _Held()


def scratch(use: str, length: int, dtype: type[Scalar]) -> NDArray[Scalar]:
    """An array of `length` elements with whatever was left in it; this thread's own until it asks again.

    Each `use` has memory of its own, which grows to the largest length that was asked for.
    """
    array = _held.arrays.get((use, dtype))
    if array is None or len(array) < length:
        array = _held.arrays[(use, dtype)] = np.empty(length, dtype)
    return array[:length]
