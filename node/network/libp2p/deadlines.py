"""How long the trio side waits, and cleaning up that neither fails nor takes longer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

READ_DEADLINE = 10.0
"""Seconds that a peer has for sending a message, or for taking one."""

STOP_DEADLINE = 8.0
"""Seconds for closing everything."""


def shielded(seconds: float) -> trio.CancelScope:
    """A scope for cleaning up, which only its own deadline cancels."""
    scope = trio.move_on_after(seconds)
    scope.shield = True
    return scope


async def quietly(function: Callable[[], Awaitable[object]]) -> None:
    """Await what may fail without consequence."""
    with suppress(Exception):
        await function()
