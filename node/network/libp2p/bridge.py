"""The bridge between the event loop and the trio thread: calls cross it without blocking either side.

The event loop `call`s and `post`s, the trio side `ask`s and `tell`s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import trio

from node.errors import Unreachable

T = TypeVar("T")


class Bridge:
    """Calls between the event loop and one trio run; neither side ever blocks on the other."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._waiting: set[asyncio.Future[Any]] = set()

    def open(self, nursery: trio.Nursery) -> None:
        """Accept calls into this nursery; in the trio thread."""
        self._nursery, self._token = nursery, trio.lowlevel.current_trio_token()

    def close(self) -> None:
        """Fail what still waits; on the event loop, once the trio run is over."""
        self._token = None
        for future in self._waiting:
            if not future.done():
                future.set_exception(Unreachable("the network was stopped"))

    def post(self, function: Callable[..., object], *arguments: object) -> None:
        """Run a plain function in the trio thread soon; from any thread."""
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(function, *arguments)

    def tell(self, function: Callable[..., object], *arguments: object) -> None:
        """Run a plain function on the event loop soon; from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function, *arguments)

    async def call(self, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """Await an async function of the trio side from the event loop; cancelling it crosses over."""
        if self._token is None:
            raise Unreachable("the network is not running yet, or no longer")
        future: asyncio.Future[T] = self._loop.create_future()
        scope = trio.CancelScope()
        self._waiting.add(future)
        self.post(self._begin, scope, future, partial(function, *arguments))
        try:
            return await future
        except asyncio.CancelledError:
            self.post(scope.cancel)
            raise
        finally:
            self._waiting.discard(future)

    def _begin(
        self, scope: trio.CancelScope, future: asyncio.Future[T], function: Callable[[], Awaitable[T]]
    ) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._run, scope, future, function)

    async def _run(
        self, scope: trio.CancelScope, future: asyncio.Future[T], function: Callable[[], Awaitable[T]]
    ) -> None:
        try:
            with scope:
                self.tell(settle, future, await function(), None)
        except Exception as error:
            self.tell(settle, future, None, error)

    async def ask(self, spawn: Callable[..., None], function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Await an async function of the event loop from the trio side; it runs to its end in any case."""
        done = trio.Event()
        results: list[T] = []

        async def run() -> None:
            try:
                results.append(await function())
            finally:
                self.post(done.set)

        self.tell(spawn, run)
        await done.wait()
        if not results:
            raise Unreachable("the network was stopped")
        return results[0]


def settle(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    """Complete a future that may have been cancelled meanwhile; on the event loop."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
