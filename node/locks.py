"""KeyedLocks: one asyncio lock for each key, so that work on one thing does not wait for work on another."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

K = TypeVar("K", bound=Hashable)


class KeyedLocks(Generic[K]):
    """Locks by key; each is forgotten when nobody holds it or waits for it. `async with locks.of(key): …`"""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[K, asyncio.Lock] = WeakValueDictionary()

    def of(self, key: K) -> asyncio.Lock:
        """The lock of a key; keep it no longer than it is used."""
        return self._locks.setdefault(key, asyncio.Lock())
