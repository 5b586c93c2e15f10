"""Connections to the data ports of other peers: made when they are needed, kept while they are good.

A link begins on the authenticated libp2p stream, where certificates change hands; it lasts about as long as
the other side admits ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from node.domain.ids import PeerId
from node.identity.certificates import TlsCertificate
from node.peer.admitted import LIFETIME
from node.peer.client import PeerClient
from node.peer.credentials import CredentialExchange


@dataclass(frozen=True, slots=True)
class _Link:
    client: PeerClient
    expires: float


class Links:
    """Clients by peer; `close` them when the node ends. `reach` connects to a peer over the overlay first."""

    def __init__(
        self,
        credentials: CredentialExchange,
        own: TlsCertificate,
        *,
        reach: Callable[[PeerId], Awaitable[None]],
        clock: Callable[[], float],
    ) -> None:
        self._credentials = credentials
        self._own = own
        self._reach = reach
        self._clock = clock
        self._links: dict[PeerId, _Link] = {}
        self._lock = asyncio.Lock()

    async def to(self, peer: PeerId) -> PeerClient:
        """A client for a peer's data port; raises Unreachable, Refused or PeerError."""
        async with self._lock:
            link = self._links.get(peer)
            if link is not None and link.expires > self._clock():
                return link.client
            if link is not None:
                await link.client.close()
            await self._reach(peer)
            client = PeerClient(await self._credentials.ask(peer), self._own)
            self._links[peer] = _Link(client, self._clock() + LIFETIME / 2)
            return client

    async def drop(self, peer: PeerId) -> None:
        """Forget a peer, which has gone or lied: the next `to` begins anew."""
        async with self._lock:
            link = self._links.pop(peer, None)
        if link is not None:
            await link.client.close()

    async def close(self) -> None:
        """Close every connection."""
        async with self._lock:
            links, self._links = list(self._links.values()), {}
        for link in links:
            await link.client.close()
