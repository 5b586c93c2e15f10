"""The library's classes that keep connections and peers, changed where they do not fit a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from libp2p.abc import INetConn, INetStream, INotifee
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from multiaddr import Multiaddr


class ConnectionWatcher(Protocol):
    """Takes note of connections and of their ends."""

    def connected(self, connection: INetConn) -> None: ...

    def disconnected(self, connection: INetConn) -> None: ...


class SlotReturningSwarm(Swarm):  # type: ignore[misc]
    """A Swarm that gives an inbound slot back when the connection ends, not when the swarm does."""

    async def upgrade_inbound_raw_conn(self, raw_conn: Any, maddr: Multiaddr) -> Any:
        """Upgrade, then wait for the end: the caller would otherwise wait for the end of the swarm."""
        muxed = await super().upgrade_inbound_raw_conn(raw_conn, maddr)
        for connection in self.get_connections(muxed.peer_id):
            if connection.muxed_conn is muxed:
                await connection.event_closed.wait()
        raise SwarmException("the connection has ended")


class NoAutoConnector(AutoConnector):  # type: ignore[misc]
    """Dials nobody: whom to be connected to is the node's decision, and a peer that was dropped stays so."""

    async def maybe_connect(self) -> None:
        """Do nothing."""


class Book(PeerStore):  # type: ignore[misc]
    """A PeerStore that tells when a peer has said what it speaks: the last step of identify."""

    def __init__(self, identified: Callable[[ID], None]) -> None:
        super().__init__()
        self._identified = identified

    def add_protocols(self, peer_id: ID, protocols: Sequence[str]) -> None:
        """Remember, and tell."""
        super().add_protocols(peer_id, protocols)
        self._identified(peer_id)


class Notifee(INotifee):  # type: ignore[misc]
    """Passes connections and their ends on."""

    def __init__(self, watcher: ConnectionWatcher) -> None:
        self._watcher = watcher

    async def connected(self, network: Any, conn: INetConn) -> None:
        self._watcher.connected(conn)

    async def disconnected(self, network: Any, conn: INetConn) -> None:
        self._watcher.disconnected(conn)

    async def opened_stream(self, network: Any, stream: INetStream) -> None: ...
    async def closed_stream(self, network: Any, stream: INetStream) -> None: ...
    async def listen(self, network: Any, multiaddr: Multiaddr) -> None: ...
    async def listen_close(self, network: Any, multiaddr: Multiaddr) -> None: ...
