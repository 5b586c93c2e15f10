"""Which leaves from whom next: a pure state machine over leaf numbers, peers and the time it is told.

Rules:
- a leaf is asked of one peer at a time, unless somebody else would finish it in half the time (`_steal`);
- a peer that lied is never asked again; one that stalled or died rests, twice as long each time, and is
  dropped after MAX_OUTAGES outages between which nothing arrived;
- how long to wait for a leaf follows what the peer showed: median + 8 MAD of its own leaves, but never more
  than 20 times what the best peer needs, so that nobody makes himself the measure of his own slowness.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from node.domain.ids import PeerId
from node.errors import WeftError

SHARD_LEAVES = 16
MAX_OUTAGES = 3
HISTORY = 64
UNKNOWN_INTERVAL = 0.5
"""Seconds per leaf that a peer is credited with before it showed any."""
HEAD_START = 0.25
"""Seconds that a theft must gain: less is not worth the bytes that come twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds to wait for the next leaf: at least, before anything is known, at most; and to rest."""

    floor: float = 5.0
    initial: float = 15.0
    ceiling: float = 30.0
    rest: float = 1.0


@dataclass(slots=True, kw_only=True, eq=False)
class Shard:
    """Leaves that one peer was asked for, in the order in which they will arrive."""

    peer: PeerId
    leaves: tuple[int, ...]
    started: float
    last: float
    pending: set[int] = field(default_factory=set)


@dataclass(slots=True, kw_only=True)
class _Record:
    intervals: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    outages: int = 0
    rests_until: float = float("-inf")
    rested_at: float = float("-inf")
    error: WeftError | None = None


class Schedule:
    """The state of one transfer."""

    def __init__(
        self, missing: Iterable[int], peers: Sequence[PeerId], *, patience: Patience | None = None
    ) -> None:
        self._missing = set(missing)
        self._pool = sorted(self._missing)
        self._peers = {peer: _Record() for peer in peers}
        self._shards: list[Shard] = []
        self._patience = patience or Patience()

    @property
    def done(self) -> bool:
        """Whether every leaf has arrived."""
        return not self._missing

    @property
    def stuck(self) -> bool:
        """Whether leaves are missing and nobody is left to ask."""
        return bool(self._missing) and all(record.error for record in self._peers.values())

    @property
    def dropped(self) -> dict[PeerId, WeftError]:
        """Who is not asked any more, and why."""
        return {peer: record.error for peer, record in self._peers.items() if record.error}

    def next(self, peer: PeerId, now: float, *, lanes: int = 1) -> Shard | None:
        """Assign leaves to one of a peer's lanes; None when there is nothing for it to do now."""
        record = self._peers[peer]
        if record.error or now < record.rests_until or not self._missing:
            return None
        leaves = self._take(lanes) or self._steal(peer, now)
        if not leaves:
            return None
        shard = Shard(peer=peer, leaves=leaves, started=now, last=now, pending=set(leaves))
        self._shards.append(shard)
        return shard

    def arrived(self, shard: Shard, leaf: int, now: float) -> bool:
        """Note a leaf that verified; False when another peer had brought it first."""
        record = self._peers[shard.peer]
        record.intervals.append(now - shard.last)
        record.outages = 0
        shard.last = now
        shard.pending.discard(leaf)
        new = leaf in self._missing
        self._missing.discard(leaf)
        return new

    def wanted(self, shard: Shard) -> bool:
        """Whether going on with a shard still brings something, from a peer that is still trusted."""
        return not self._peers[shard.peer].error and not shard.pending.isdisjoint(self._missing)

    def release(self, shard: Shard) -> None:
        """End a shard; what it did not bring, and nobody else is bringing, is assigned anew."""
        self._shards.remove(shard)
        elsewhere = set().union(*(other.pending for other in self._shards))
        for leaf in (shard.pending & self._missing) - elsewhere:
            heapq.heappush(self._pool, leaf)
        shard.pending.clear()

    def outage(self, shard: Shard, error: WeftError, now: float) -> None:
        """Note that a shard stalled or its connection died: its peer rests, or is dropped at last."""
        record = self._peers[shard.peer]
        if record.error or shard.started < record.rested_at:
            return  # another lane has reported this outage
        record.outages += 1
        record.rested_at = now
        record.rests_until = now + self._patience.rest * 2 ** (record.outages - 1)
        if record.outages >= MAX_OUTAGES:
            record.error = error

    def drop(self, peer: PeerId, error: WeftError) -> None:
        """Ask a peer for nothing more: it lied, or it said no."""
        record = self._peers[peer]
        record.error = record.error or error

    def patience(self, peer: PeerId) -> float:
        """How many seconds to wait for the next leaf of a peer."""
        limits = self._patience
        own = self._peers[peer].intervals
        if not own:
            return limits.initial
        middle = median(own)
        wait = middle + 8 * median(abs(interval - middle) for interval in own)
        best = min(median(r.intervals) for r in self._peers.values() if r.intervals)
        return min(max(limits.floor, min(wait, 20 * best)), limits.ceiling)

    def _take(self, lanes: int) -> tuple[int, ...]:
        asking = lanes * sum(1 for record in self._peers.values() if not record.error)
        count = min(SHARD_LEAVES, -(-len(self._pool) // max(1, asking)))
        taken: list[int] = []
        while self._pool and len(taken) < count:
            leaf = heapq.heappop(self._pool)
            if leaf in self._missing:
                taken.append(leaf)
        return tuple(taken)

    def _steal(self, peer: PeerId, now: float) -> tuple[int, ...]:
        """Leaves at the far end of the shard that would gain most, if `peer` needs half the time for them."""
        mine = median(self._peers[peer].intervals or (UNKNOWN_INTERVAL,))
        helped = {leaf for shard in self._shards if shard.peer == peer for leaf in shard.pending}
        best: tuple[float, tuple[int, ...]] = (0.0, ())
        for shard in self._shards:
            left = sorted((shard.pending & self._missing) - helped, reverse=True)
            if shard.peer == peer or not left:
                continue
            pace = median(self._peers[shard.peer].intervals or (0.0,))
            theirs = max(pace, now - shard.last) + (len(left) - 1) * pace
            gain = theirs - 2 * len(left) * mine - HEAD_START
            if gain > best[0]:
                best = (gain, tuple(left[:SHARD_LEAVES]))
        return best[1]
