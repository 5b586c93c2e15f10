"""The host, put together from its parts: TCP, Noise and yamux, and nothing that a default would add."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio
from libp2p.abc import INetStream
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from node.network.flow import Limits
from node.network.libp2p.addresses import concrete
from node.network.libp2p.deadlines import READ_DEADLINE, quietly
from node.network.libp2p.swarm import Book, NoAutoConnector, SlotReturningSwarm

STREAMS_PER_PEER = 64
"""Inbound streams of one peer at once."""

HANDSHAKES = 64
"""Inbound connections that may be on their way to being one, beyond those that there are."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Who the host is, where it listens, what it announces (nothing: where it listens), and its limits."""

    keys: KeyPair
    listen: tuple[Multiaddr, ...]
    announce: tuple[Multiaddr, ...]
    limits: Limits


def build_host(settings: Settings, identified: Callable[[ID], None]) -> BasicHost:
    """Build a host that does not run yet; `identified` is called when a peer has said what it speaks."""
    swarm = _build_swarm(settings, identified)
    host = BasicHost(
        swarm,
        negotiate_timeout=int(READ_DEADLINE),
        addrs_factory=lambda candidates: list(settings.announce or concrete(candidates)),
        disable_identify_address_discovery=True,
    )
    swarm.set_stream_handler(_StreamGuard(swarm.common_stream_handler).handle)
    return host


def _build_swarm(settings: Settings, identified: Callable[[ID], None]) -> Swarm:
    noise = Noise(settings.keys, noise_privkey=create_noise_key_pair().private_key)
    upgrader = TransportUpgrader(
        secure_transports_by_protocol={NOISE: noise},
        muxer_transports_by_protocol={TProtocol(YAMUX): Yamux},
    )
    identity = ID.from_pubkey(settings.keys.public_key)
    book = Book(identified)
    book.add_key_pair(identity, settings.keys)
    connections = settings.limits.connections
    swarm = SlotReturningSwarm(
        identity,
        book,
        upgrader,
        transports=[TCP()],
        retry_config=RetryConfig(max_retries=0),
        connection_config=ConnectionConfig(
            max_connections=connections,
            min_connections=0,
            low_watermark=0,
            high_watermark=connections,
            max_connections_per_peer=2,
            grace_period=0.0,
        ),
    )
    swarm.auto_connector = NoAutoConnector(swarm)
    swarm._inbound_limiter = trio.CapacityLimiter(connections + HANDSHAKES)
    return swarm


class _StreamGuard:
    """Stands between the swarm and what peers make of their streams."""

    def __init__(self, handle: Callable[[INetStream], Awaitable[None]]) -> None:
        self._handle = handle
        self._streams: Counter[ID] = Counter()

    async def handle(self, stream: INetStream) -> None:
        """Handle one inbound stream; whatever a peer provokes ends with the stream, not with the swarm."""
        peer = stream.muxed_conn.peer_id
        if self._streams[peer] >= STREAMS_PER_PEER:
            return await quietly(stream.reset)
        self._streams[peer] += 1
        try:
            await self._handle(stream)
        except Exception as error:
            log.debug("a stream of peer %s failed: %r", peer, error)
            await quietly(stream.reset)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
