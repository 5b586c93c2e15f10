"""Carries out a schedule: streams of leaves from several holders at once, verified before they are written.

Hashing and writing run in threads; the event loop only moves pieces. A holder that sends one wrong leaf is
dropped there and then; one that stalls or dies rests while others take over its leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from typing import Any, TypeVar

from node.domain.holding import ByteRange, ModelRef
from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import LocalError, PeerError, Refused, Unreachable, WeftError
from node.exchange.blueprint import Leaf
from node.exchange.holder import Holder
from node.exchange.partial import Partial
from node.exchange.schedule import Schedule, Shard

T = TypeVar("T")

TICK = 0.1
"""Seconds after which a lane without work looks again: rests end and shards grow late without an event."""


class Transfer:
    """One run of a schedule; `received` counts verified bytes by peer."""

    def __init__(
        self,
        *,
        ref: ModelRef,
        leaves: Sequence[Leaf],
        partial: Partial,
        schedule: Schedule,
        clock: Callable[[], float],
        pool: Executor,
        on_leaf: Callable[[PeerId, int], None],
    ) -> None:
        self._ref = ref
        self._leaves = leaves
        self._partial = partial
        self._schedule = schedule
        self._clock = clock
        self._pool = pool
        self._on_leaf = on_leaf
        self._ended = asyncio.Event()
        self._failure: LocalError | None = None

    async def run(self, holders: Sequence[Holder]) -> Mapping[PeerId, WeftError]:
        """Fetch until every leaf is there or nobody is left; return who was dropped and why."""
        self._look()
        async with asyncio.TaskGroup() as group:
            lanes = [group.create_task(self._lane(holder)) for holder in holders for _ in range(holder.lanes)]
            await self._ended.wait()
            for lane in lanes:
                lane.cancel()
        if self._failure:
            raise self._failure
        return self._schedule.dropped

    def _look(self) -> None:
        if self._schedule.done or self._schedule.stuck:
            self._ended.set()

    async def _lane(self, holder: Holder) -> None:
        while holder.peer not in self._schedule.dropped:
            shard = self._schedule.next(holder.peer, self._clock(), lanes=holder.lanes)
            if shard is None:
                await asyncio.sleep(TICK)
                continue
            try:
                await self._stream(holder, shard)
            except TimeoutError:
                late = Unreachable(f"peer {holder.peer.short} sent nothing for too long")
                self._schedule.outage(shard, late, self._clock())
            except Unreachable as error:
                self._schedule.outage(shard, error, self._clock())
            except Refused as error:
                if error.reason is Reason.BUSY:
                    self._schedule.outage(shard, error, self._clock())
                else:
                    self._schedule.drop(holder.peer, error)
            except PeerError as error:
                self._schedule.drop(holder.peer, error)
            except LocalError as error:
                self._failure = error
                self._ended.set()
                return
            finally:
                self._schedule.release(shard)
            self._look()

    async def _stream(self, holder: Holder, shard: Shard) -> None:
        leaves = [self._leaves[number] for number in shard.leaves]
        patience = self._schedule.patience(holder.peer)
        async with aclosing(holder.leaves(self._ref, _ranges(leaves))) as pieces:
            for leaf in leaves:
                async with asyncio.timeout(patience):
                    piece = await anext(pieces, None)
                if piece is None:
                    raise PeerError(f"peer {holder.peer.short} ended its answer too early")
                await self._take(holder.peer, shard, leaf, piece)
                if leaf is not leaves[-1] and not self._schedule.wanted(shard):
                    return
            async with asyncio.timeout(patience):
                if await anext(pieces, None) is not None:
                    raise PeerError(f"peer {holder.peer.short} sent more than was asked")

    async def _take(self, peer: PeerId, shard: Shard, leaf: Leaf, piece: bytes) -> None:
        if not await to_the_end(self._pool, self._partial.accept, leaf, piece):
            raise PeerError(f"peer {peer.short} sent bytes that do not match their digest (HASH_MISMATCH)")
        if self._schedule.arrived(shard, leaf.number, self._clock()):
            self._on_leaf(peer, leaf.size)


async def to_the_end(pool: Executor | None, function: Callable[..., T], *args: Any) -> T:
    """Run a function in a thread, and when cancelled wait for it all the same.

    What it works on, such as open files, is safe to close afterwards.
    """
    future = asyncio.get_running_loop().run_in_executor(pool, function, *args)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        future.exception()
        raise


def _ranges(leaves: Sequence[Leaf]) -> list[ByteRange]:
    """The ranges that give exactly these leaves in this order."""
    ranges: list[ByteRange] = []
    for leaf in leaves:
        last = ranges[-1] if ranges else None
        if last and last.tensor == leaf.tensor and last.offset + last.length == leaf.begin:
            ranges[-1] = ByteRange(tensor=last.tensor, offset=last.offset, length=last.length + leaf.size)
        else:
            ranges.append(ByteRange(tensor=leaf.tensor, offset=leaf.begin, length=leaf.size))
    return ranges
