"""What keeps a node's connections alive: pings that notice silent peers, and redialling with backoff.

Both work on the port alone, so they are the same for every implementation. A peer whose process is stopped
keeps its TCP connection open for many minutes; only an unanswered ping tells.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import anyio

from node.domain.address import Address
from node.domain.ids import PeerId
from node.errors import LocalError, PeerError, Unreachable, WeftError
from node.network.base import PeerInfo, parse_address
from node.network.flow import Limits

FIRST_DELAY = 1.0
LONGEST_DELAY = 60.0
CHECK_EVERY = 2.0

Sleep = Callable[[float], Awaitable[None]]

log = logging.getLogger(__name__)


class Pinger(Protocol):
    """The part of a network that notices silent peers."""

    def peers(self) -> tuple[PeerInfo, ...]: ...
    async def ping(self, peer: PeerId, *, deadline: float) -> float: ...
    async def disconnect(self, peer: PeerId) -> None: ...


class Dialler(Protocol):
    """The part of a network that connects."""

    @property
    def peer_id(self) -> PeerId: ...
    def peers(self) -> tuple[PeerInfo, ...]: ...
    async def connect(self, address: str) -> PeerId: ...


async def watch_peers(network: Pinger, limits: Limits, *, sleep: Sleep = anyio.sleep) -> None:
    """Ping every connected peer for ever, and disconnect those that miss several pings in a row."""
    missed: Counter[PeerId] = Counter()
    while True:
        await sleep(limits.ping_interval)
        peers = [info.peer for info in network.peers()]
        for gone in missed.keys() - set(peers):
            del missed[gone]
        async with anyio.create_task_group() as group:
            for peer in peers:
                group.start_soon(_ping_once, network, limits, peer, missed)


async def _ping_once(network: Pinger, limits: Limits, peer: PeerId, missed: Counter[PeerId]) -> None:
    try:
        await network.ping(peer, deadline=limits.ping_deadline)
        missed.pop(peer, None)
    except (Unreachable, PeerError):
        missed[peer] += 1
        if missed[peer] >= limits.ping_misses:
            log.info("peer %s is silent: disconnecting", peer.short)
            del missed[peer]
            await network.disconnect(peer)


def delay_after(failures: int, jitter: float) -> float:
    """Seconds to wait after so many failures in a row: doubling, capped, spread by `jitter` in [0, 1)."""
    full = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(max(failures - 1, 0), 16))
    return full * (0.5 + jitter / 2)


async def stay_connected(
    network: Dialler,
    addresses: Sequence[str],
    *,
    sleep: Sleep = anyio.sleep,
    jitter: Callable[[], float] = random.random,
) -> None:
    """Dial each bootstrap address, and again whenever its peer is lost, until cancelled.

    Our own address is skipped, so that every node of a network can carry the same list; raises LocalError
    at once for a malformed address.
    """
    parsed = {str(address): address for address in map(parse_address, addresses)}
    async with anyio.create_task_group() as group:
        for address in parsed.values():
            if address.peer != network.peer_id:
                group.start_soon(_stay_connected_to, network, address, sleep, jitter)


async def _stay_connected_to(
    network: Dialler, address: Address, sleep: Sleep, jitter: Callable[[], float]
) -> None:
    failures = 0
    while True:
        if any(info.peer == address.peer for info in network.peers()):
            failures = 0
            await sleep(CHECK_EVERY)
            continue
        try:
            await network.connect(str(address))
            log.info("connected to %s", address)
        except LocalError:
            return  # the network was stopped, or the address turned out to be our own
        except WeftError as error:
            failures += 1
            if failures == 1:
                log.info("cannot reach %s: %s; trying again", address, error.why)
            await sleep(delay_after(failures, jitter()))
