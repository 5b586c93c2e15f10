"""Negotiation over the network: one protocol, two rounds (offer, then the agreement with both signatures)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from merge_core.digest import Digest, ModelId
from node.domain.ids import PeerId
from node.domain.negotiation import Purpose
from node.errors import Unreachable
from node.negotiation.provider import Provider
from node.negotiation.requester import Concluded, Requester

PROTOCOL = "/weft/negotiate/1"
DEADLINE = 15.0
"""Seconds that a peer has for each answer."""


class Requests(Protocol):
    """The part of a network that a negotiation needs."""

    def handle(self, protocol: str, handler: Callable[[PeerId, bytes], Awaitable[bytes]]) -> None:
        """Answer requests of a protocol."""

    async def request(self, peer: PeerId, protocol: str, payload: bytes, *, deadline: float) -> bytes:
        """Ask a connected peer."""


class Negotiation:
    """Both sides of one node."""

    def __init__(self, *, network: Requests, provider: Provider, requester: Requester) -> None:
        self._network = network
        self._provider = provider
        self._requester = requester

    def start(self) -> None:
        """Begin to answer offers."""
        self._network.handle(PROTOCOL, self._respond)

    async def propose(
        self,
        peer: PeerId,
        *,
        purpose: Purpose,
        models: Sequence[ModelId],
        plan: Digest | None,
        deadline: float = DEADLINE,
        fresh: bool = False,
    ) -> Concluded:
        """Come to an agreement with a provider; one that is live already is used, unless it must be `fresh`.

        A live one may be used up: the provider then says NOT_ENTITLED, and a fresh one is needed.
        Raises Refused with its reason, Unreachable, or PeerError when the peer answers nonsense.
        """
        known = self._requester.usable(peer, purpose=purpose, models=models, plan=plan)
        if known is not None and not fresh:
            return known
        offer, message = self._requester.offer(peer, purpose=purpose, models=models, plan=plan)
        accepted = self._requester.accept(offer, await self._ask(peer, message, deadline))
        return self._requester.conclude(offer, await self._ask(peer, accepted, deadline))

    async def _respond(self, peer: PeerId, data: bytes) -> bytes:
        return self._provider.respond(peer, data)

    async def _ask(self, peer: PeerId, message: bytes, deadline: float) -> bytes:
        """Ask twice: the answer may have been lost, and the same message has the same answer."""
        try:
            return await self._network.request(peer, PROTOCOL, message, deadline=deadline)
        except Unreachable:
            return await self._network.request(peer, PROTOCOL, message, deadline=deadline)
