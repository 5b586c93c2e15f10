"""Connections in the trio thread: dialling, hanging up, and telling the event loop who is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import trio
from libp2p.abc import INetConn
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from node.domain.ids import PeerId
from node.errors import Unreachable
from node.network.base import Direction, PeerInfo
from node.network.libp2p.addresses import is_address, peer_id
from node.network.libp2p.bridge import Bridge
from node.network.libp2p.deadlines import quietly
from node.network.libp2p.errors import dial_error

KNOWN_ADDRESSES = 16
"""Addresses of one peer that are passed on."""

ADDRESS_LIFETIME = 7200
"""Seconds that the address of a dialled peer is remembered."""


class Connections:
    """The connections of one host; `learn` and `forget` are called on the event loop."""

    def __init__(
        self,
        host: BasicHost,
        bridge: Bridge,
        *,
        learn: Callable[[PeerInfo], None],
        forget: Callable[[PeerId], None],
    ) -> None:
        self._host = host
        self._swarm = host.get_network()
        self._bridge = bridge
        self._learn = learn
        self._forget = forget
        self._dialling: Counter[ID] = Counter()
        self._dial_lock: dict[ID, trio.Lock] = {}

    async def dial(self, peer: PeerId, transport: Multiaddr, deadline: float) -> None:
        """Connect, unless connected; see Network.connect."""
        identity = ID.from_base58(peer)
        lock = self._dial_lock.setdefault(identity, trio.Lock())
        self._dialling[identity] += 1
        try:
            with trio.fail_after(deadline):
                async with lock:
                    if not self._swarm.get_connections(identity):
                        await self._swarm.dial_addr(transport, identity)
                        self._host.get_peerstore().add_addr(identity, transport, ADDRESS_LIFETIME)
        except trio.TooSlowError as error:
            raise Unreachable(f"nobody answers at {transport} within {deadline:g} s") from error
        except Exception as error:
            raise dial_error(peer, transport, error) from error
        finally:
            self._dialling[identity] -= 1
            if not self._dialling[identity]:
                del self._dialling[identity], self._dial_lock[identity]

    async def hang_up(self, peer: PeerId) -> None:
        """Close every connection to a peer."""
        async with trio.open_nursery() as nursery:
            for connection in self._swarm.get_connections(ID.from_base58(peer)):
                nursery.start_soon(quietly, connection.close)

    def hang_up_soon(self, identity: ID) -> None:
        """Close every connection to a peer without waiting for it."""
        for connection in self._swarm.get_connections(identity):
            self._swarm.manager.run_task(quietly, connection.close)

    async def close(self) -> None:
        """Close all connections at once: each takes its time."""
        async with trio.open_nursery() as nursery:
            for connection in self._swarm.get_connections():
                nursery.start_soon(quietly, connection.close)

    # -- told by the host ------------------------------------------------------------------------------

    def connected(self, connection: INetConn) -> None:
        """Take note of a new connection."""
        self._tell_about(connection.muxed_conn.peer_id)

    def identified(self, identity: ID) -> None:
        """Take note of what a connected peer says about itself."""
        if self._swarm.get_connections(identity):
            self._tell_about(identity)

    def disconnected(self, connection: INetConn) -> None:
        """Take note of a closed connection; a peer may have another one."""
        identity = connection.muxed_conn.peer_id
        peer = peer_id(identity)
        if peer is not None and not self._swarm.get_connections(identity):
            self._bridge.tell(self._forget, peer)

    def _tell_about(self, identity: ID) -> None:
        peer = peer_id(identity)
        if peer is None:  # RSA and other keys have no place in our network
            self._bridge.post(self.hang_up_soon, identity)
            return
        connections = self._swarm.get_connections(identity)
        if not connections:
            return
        inbound = "inbound" in str(connections[0].direction).lower()
        info = PeerInfo(
            peer=peer,
            addresses=self._addresses_of(identity, peer, connections[0]),
            direction=Direction.INBOUND if inbound else Direction.OUTBOUND,
            latency=None,
        )
        self._bridge.tell(self._learn, info)

    def _addresses_of(self, identity: ID, peer: PeerId, connection: INetConn) -> tuple[str, ...]:
        try:
            found = self._host.get_peerstore().addrs(identity)
        except Exception:
            found = []
        if not found:
            found = connection.get_transport_addresses()
        texts = [str(address).removesuffix(f"/p2p/{peer}") for address in found[:KNOWN_ADDRESSES]]
        return tuple(address for text in texts if (address := f"{text}/p2p/{peer}") and is_address(address))
