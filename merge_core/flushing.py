"""Flusher: sends to the disk what was written while more is made, so that the last fsync has little left.

An error of the disk is told to one fsync only. So it is kept here, and raised by the next call.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor

FLUSH_EVERY = 64 << 20
"""Bytes of one file between two flushes."""


class Flusher:
    """One thread that syncs open files; close it before them."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush")
        self._lock = threading.Lock()
        self._unflushed: dict[int, int] = {}
        self._flushing: Future[None] | None = None

    def wrote(self, descriptor: int, count: int) -> None:
        """Note that bytes were written; raises the OSError that an earlier flush met."""
        with self._lock:
            total = self._unflushed[descriptor] = self._unflushed.get(descriptor, 0) + count
            if total < FLUSH_EVERY or not (self._flushing is None or self._flushing.done()):
                return
            if self._flushing is not None:
                self._flushing.result()
            self._unflushed[descriptor] = 0
            self._flushing = self._executor.submit(os.fdatasync, descriptor)

    def close(self) -> None:
        """Wait for the flush under way; raises the OSError that it met."""
        self._executor.shutdown()
        flushing, self._flushing = self._flushing, None
        if flushing is not None:
            flushing.result()
