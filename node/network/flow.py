"""What one peer may ask of us at once: token buckets for messages, slots for running requests.

Pure: the time is handed in, nothing here waits. Memory is bounded by the number of peers remembered, and a
peer that reconnects finds its bucket as it left it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of one node; rates are per second and peer, times in seconds."""

    connections: int = 32
    running_requests: int = 64
    running_requests_per_peer: int = 8
    request_rate: float = 50.0
    request_burst: float = 400.0
    gossip_rate: float = 20.0
    gossip_burst: float = 100.0
    gossip_debt: float = 1000.0
    """How far above its burst a peer may flood before its connection is closed."""
    rejection_cost: float = 10.0
    """Tokens that a forwarder loses for a message that our validator rejects."""
    undelivered: int = 256
    """Accepted gossip messages per topic that wait for `deliver`; the newest are dropped beyond."""
    handler_deadline: float = 30.0
    ping_interval: float = 15.0
    ping_deadline: float = 5.0
    ping_misses: int = 3


class Admission(Enum):
    """What becomes of a message."""

    ADMIT = "admit"
    DROP = "drop"
    FLOOD = "flood"
    """Drop it, and its sender too."""


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class Gate:
    """One token bucket per peer, the longest silent ones forgotten first.

    A message always costs, admitted or not: whoever goes on flooding stays out, and runs into debt.
    """

    def __init__(self, *, rate: float, burst: float, debt: float, peers: int = 1024) -> None:
        self._rate, self._burst, self._debt, self._peers = rate, burst, debt, peers
        self._buckets: OrderedDict[PeerId, _Bucket] = OrderedDict()

    def admit(self, peer: PeerId, now: float, *, cost: float = 1.0) -> Admission:
        """Take `cost` tokens of a peer at time `now` and say what its message gets."""
        bucket = self._refilled(peer, now)
        admitted = bucket.tokens >= cost
        bucket.tokens = max(bucket.tokens - cost, -self._debt)
        if admitted:
            return Admission.ADMIT
        return Admission.FLOOD if bucket.tokens <= -self._debt else Admission.DROP

    def charge(self, peer: PeerId, now: float, *, cost: float) -> None:
        """Take tokens for something that turned out badly after it was admitted."""
        self.admit(peer, now, cost=cost)

    def __len__(self) -> int:
        return len(self._buckets)

    def _refilled(self, peer: PeerId, now: float) -> _Bucket:
        bucket = self._buckets.setdefault(peer, _Bucket(self._burst, now))
        self._buckets.move_to_end(peer)
        while len(self._buckets) > self._peers:
            self._buckets.popitem(last=False)
        bucket.tokens = min(self._burst, bucket.tokens + max(0.0, now - bucket.at) * self._rate)
        bucket.at = now
        return bucket


class Slots:
    """How many requests run now, in all and for each peer."""

    def __init__(self, *, total: int, per_peer: int) -> None:
        self._total, self._per_peer = total, per_peer
        self._running: Counter[PeerId] = Counter()

    @contextmanager
    def taken(self, peer: PeerId) -> Iterator[None]:
        """Hold a slot for one request of a peer; raises Refused(BUSY) when there is none."""
        if self._running.total() >= self._total or self._running[peer] >= self._per_peer:
            raise Refused(Reason.BUSY, "too many requests at once")
        self._running[peer] += 1
        try:
            yield
        finally:
            self._running[peer] -= 1
            self._running += Counter()  # forget peers without a running request
