"""Canvass: ask many peers at once, and stop soon after enough of them have answered.

An advert costs its author nothing, so any number of peers may lead nowhere. A silent one takes its own turn
and nobody else's, and all of them together no more than a fixed time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from node.domain.ids import PeerId
from node.errors import PeerError, Refused, Unreachable, WeftError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How many peers are asked at once, and seconds: for each, for more once there is one, for all."""

    at_once: int = 32
    turn: float = 30.0
    grace: float = 3.0
    total: float = 150.0


async def canvass(
    peers: Sequence[PeerId],
    ask: Callable[[PeerId], Awaitable[None]],
    *,
    some: Callable[[], bool],
    enough: Callable[[], bool],
    pace: Pace,
) -> dict[PeerId, WeftError]:
    """Ask peers in order until there is `enough`, or for a little longer once there are `some`.

    Returns who failed, and how; whatever else `ask` raises ends it all.
    """
    failed: dict[PeerId, WeftError] = {}
    gate = asyncio.Semaphore(pace.at_once)

    async def turn(peer: PeerId) -> None:
        async with gate:
            try:
                async with asyncio.timeout(pace.turn):
                    await ask(peer)
            except (Refused, Unreachable, PeerError) as error:
                failed[peer] = error
            except TimeoutError:
                failed[peer] = Unreachable(f"peer {peer.short} did not answer in time", hint="weft peers")

    tasks = [asyncio.create_task(turn(peer)) for peer in peers]
    try:
        await _wait(tasks, some, enough, pace)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return failed


async def _wait(
    tasks: Sequence[asyncio.Task[None]], some: Callable[[], bool], enough: Callable[[], bool], pace: Pace
) -> None:
    now = asyncio.get_running_loop().time
    until = now() + pace.total
    pending, hurried = set(tasks), False
    while pending and not enough() and now() < until:
        done, pending = await asyncio.wait(
            pending, timeout=until - now(), return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            task.result()
        if some() and not hurried:
            hurried, until = True, min(until, now() + pace.grace)
