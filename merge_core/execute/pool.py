"""Threads that work on numbered pieces: results come in order, only a few are under way at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Pool:
    """A window over an executor; without one everything happens in the caller's thread."""

    def __init__(self, executor: ThreadPoolExecutor | None, window: int) -> None:
        self._executor = executor
        self._window = window

    def ordered(self, function: Callable[[int], T], count: int) -> Iterator[T]:
        """Call `function` on 0..count-1; results come in order, at most `window` wait at once.

        A caller that stops early, or an error, leaves nothing running behind.
        """
        if count == 1 or self._executor is None:
            yield from map(function, range(count))
            return
        pending: deque[Future[T]] = deque()
        try:
            for index in range(count):
                pending.append(self._executor.submit(function, index))
                if len(pending) == self._window:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            wait(pending)


INLINE = Pool(None, 1)
"""For what runs inside a thread of a pool already."""


@contextmanager
def pool_of(threads: int) -> Iterator[Pool]:
    """A pool of so many threads, which end with the block."""
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="merge") as executor:
        yield Pool(executor, threads + 1)
