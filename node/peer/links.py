"""Connections to the data ports of other peers: made when they are needed, renewed when they stop working.

A link begins on the authenticated libp2p stream, where certificates change hands. It has no end of its own:
a client that cannot get through exchanges certificates again by itself (`PeerClient.ready`), so whoever works
with one need not mind that the peer was restarted or has forgotten us. Only idle clients are closed, the
least recently asked for, when there are too many.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial

from node.domain.ids import PeerId
from node.identity.certificates import TlsCertificate
from node.locks import KeyedLocks
from node.peer.client import Endpoint, PeerClient
from node.peer.credentials import CredentialExchange

LIMIT = 64
"""Clients that are kept open while nobody uses them."""


class Links:
    """Clients by peer; `close` them when the node ends. `reach` connects to a peer over the overlay first."""

    def __init__(
        self,
        credentials: CredentialExchange,
        own: TlsCertificate,
        *,
        reach: Callable[[PeerId], Awaitable[None]],
        limit: int = LIMIT,
    ) -> None:
        self._credentials = credentials
        self._own = own
        self._reach = reach
        self._limit = limit
        self._clients: OrderedDict[PeerId, PeerClient] = OrderedDict()
        self._locks: KeyedLocks[PeerId] = KeyedLocks()

    async def to(self, peer: PeerId) -> PeerClient:
        """A client for a peer's data port; raises Unreachable, Refused or PeerError.

        A peer that does not answer keeps nobody waiting who asks for another one.
        """
        async with self._locks.of(peer):
            client = self._clients.get(peer)
            if client is None:
                client = PeerClient(await self._dial(peer), self._own, renew=partial(self._dial, peer))
                self._clients[peer] = client
            else:
                await client.ready()
            self._clients.move_to_end(peer)
        await self._close_idle()
        return client

    async def close(self) -> None:
        """Close every connection."""
        clients, self._clients = list(self._clients.values()), OrderedDict()
        for client in clients:
            await client.close()

    async def _dial(self, peer: PeerId) -> Endpoint:
        await self._reach(peer)
        return await self._credentials.ask(peer)

    async def _close_idle(self) -> None:
        for peer, client in list(self._clients.items()):
            if len(self._clients) <= self._limit:
                return
            if not client.busy:
                del self._clients[peer]
                await client.close()
