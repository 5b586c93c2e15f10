"""How many calls the peer port answers at once: few of one peer, so that there is room for the others.

gRPC's own limit knows no peers, and a call counts there until its stream has ended, which is when its caller
has read everything: one that does not read would take places from everybody. Here they come out of its own.
"""

from __future__ import annotations

from collections import Counter

from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import Refused

OF_ONE_PEER = 32
OF_ALL = 512
"""A call that is not read holds a piece of 1 MiB."""


class Calls:
    """Calls that run, counted by peer; belongs to one event loop."""

    def __init__(self, *, of_one_peer: int = OF_ONE_PEER, of_all: int = OF_ALL) -> None:
        self._of_one_peer = of_one_peer
        self._of_all = of_all
        self._running: Counter[PeerId] = Counter()

    def begin(self, peer: PeerId) -> None:
        """Count a call, to be ended; raises Refused(BUSY) where there is no place for it."""
        if self._running[peer] >= self._of_one_peer:
            raise Refused(Reason.BUSY, f"at most {self._of_one_peer} calls of a peer at once")
        if self._running.total() >= self._of_all:
            raise Refused(Reason.BUSY)
        self._running[peer] += 1

    def end(self, peer: PeerId) -> None:
        """Count a call no longer."""
        self._running -= Counter((peer,))
