"""Room in the advert book: who leaves it when it is full, so that no one crowd keeps everybody else out.

Names cost nothing, connections do. So room is shared among connections: a peer that is connected stands for
itself and for all that it told of; peers whom no connection stands for share one place. A guest displaces

- first, peers whose adverts have expired, the longest gone before the others;
- if it is connected, any peer that is not;
- whoever came last to a connection that takes more room than the guest's own would with it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass

from node.domain.ids import PeerId

ROOM = 64 << 20
"""Bytes of signed adverts, and of proofs that a peer contradicted itself, that are kept of others."""
LEAST = 16 << 10
"""Bytes that every peer counts for, however little it says: so 4,096 of them fit, for each of whom there is
something to remember beside its adverts."""

Connected = Callable[[PeerId], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """What a peer takes: bytes, until when in Unix seconds, and who told of it (None: nobody remembers)."""

    size: int
    expires_at: int
    told_by: PeerId | None = None

    @property
    def cost(self) -> int:
        """What it counts for, in bytes."""
        return max(self.size, LEAST)


class Ledger:
    """The bytes that are kept for each peer, by the number of the advert; `cost` is of all together."""

    def __init__(self) -> None:
        self._sizes: dict[PeerId, dict[int, int]] = {}
        self.cost = 0

    def size(self, peer: PeerId) -> int:
        """Bytes kept for one peer."""
        return sum(self._sizes.get(peer, {}).values())

    def put(self, peer: PeerId, sizes: Mapping[int, int]) -> None:
        """Note all that is kept for a peer; it is known from now on, even if that is nothing."""
        self.remove(peer)
        self._sizes[peer] = dict(sizes)
        self.cost += max(self.size(peer), LEAST)

    def add(self, peer: PeerId, number: int, size: int) -> None:
        """Note one advert more."""
        self.put(peer, self._sizes.get(peer, {}) | {number: size})

    def retain(self, peer: PeerId, numbers: Container[int]) -> None:
        """Note that a peer's other adverts were dropped."""
        self.put(peer, {n: size for n, size in self._sizes.get(peer, {}).items() if n in numbers})

    def remove(self, peer: PeerId) -> None:
        """Note that a peer was forgotten."""
        if peer in self._sizes:
            self.cost -= max(self.size(peer), LEAST)
            del self._sizes[peer]


def side(peer: PeerId, told_by: PeerId | None, connected: Connected) -> PeerId | None:
    """The connection that stands for a peer; None where it is closed or never was."""
    if connected(peer):
        return peer
    return told_by if told_by is not None and connected(told_by) else None


def leaving(
    tenants: Mapping[PeerId, Tenant],
    guest: PeerId,
    wanted: Tenant,
    *,
    now: float,
    connected: Connected,
    room: int = ROOM,
) -> tuple[PeerId, ...] | None:
    """Who leaves so that `guest` has what it wants, all in all; None where it has to do without.

    `tenants` come in the order of their arrival; the guest may be one of them.
    """
    others = {peer: tenant for peer, tenant in tenants.items() if peer != guest}
    excess = sum(tenant.cost for tenant in others.values()) + wanted.cost - room
    gone: list[PeerId] = []
    for peer in _in_turn(others, guest, wanted, now, connected) if excess > 0 else ():
        gone.append(peer)
        excess -= others[peer].cost
        if excess <= 0:
            break
    return tuple(gone) if excess <= 0 else None


def _in_turn(
    others: Mapping[PeerId, Tenant], guest: PeerId, wanted: Tenant, now: float, connected: Connected
) -> Iterator[PeerId]:
    """Everybody whom the guest displaces, in order, however much room it needs."""
    expired = [peer for peer, tenant in others.items() if tenant.expires_at <= now]
    yield from sorted(expired, key=lambda peer: others[peer].expires_at)
    crowds: dict[PeerId | None, list[PeerId]] = {}
    for peer, tenant in others.items():
        if tenant.expires_at > now:
            crowds.setdefault(side(peer, tenant.told_by, connected), []).append(peer)
    for where, crowd in crowds.items():
        if where in crowd:
            crowd.remove(where)
            crowd.insert(0, where)  # who stands for others leaves after them
    taken = {where: sum(others[peer].cost for peer in crowd) for where, crowd in crowds.items()}
    own = taken.get(side(guest, wanted.told_by, connected), 0) + wanted.cost
    welcome = connected(guest)
    while True:
        yielding = [
            where
            for where, crowd in crowds.items()
            if crowd and (taken[where] > own or (welcome and not connected(crowd[-1])))
        ]
        if not yielding:
            return
        largest = max(yielding, key=lambda where: taken[where])
        peer = crowds[largest].pop()
        taken[largest] -= others[peer].cost
        yield peer
