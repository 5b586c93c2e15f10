"""Gossip in the trio thread: publishing, and judging what neighbours pass on.

A message passes two doors: `admit` before any work is done for it (rate, sizes, form), then, once the library
has checked its signature, the validator of its topic on the event loop.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.tools.anyio_service import background_trio_service

from node.domain.ids import PeerId
from node.network.base import MAX_MESSAGE, Verdict
from node.network.flow import Admission, Gate, Limits
from node.network.libp2p.addresses import peer_id
from node.network.libp2p.bridge import Bridge
from node.network.libp2p.callbacks import Callbacks
from node.network.libp2p.pubsub import GuardedPubsub, build_router

log = logging.getLogger(__name__)


class Gossip:
    """The gossip of one host; `hang_up` closes the connections of a peer that floods."""

    def __init__(
        self,
        host: BasicHost,
        bridge: Bridge,
        callbacks: Callbacks,
        limits: Limits,
        *,
        hang_up: Callable[[ID], None],
    ) -> None:
        self._own = host.get_id()
        self._bridge = bridge
        self._callbacks = callbacks
        self._limits = limits
        self._hang_up = hang_up
        self._gate = Gate(rate=limits.gossip_rate, burst=limits.gossip_burst, debt=limits.gossip_debt)
        self._publishing = trio.Lock()
        self._pubsub = GuardedPubsub(self, host, build_router())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the services that gossip consists of."""
        async with background_trio_service(self._pubsub), background_trio_service(self._pubsub.router):
            await self._pubsub.wait_until_ready()
            yield

    def close(self) -> None:
        """End the thread that forgets seen messages, which nobody else ends."""
        self._pubsub.seen_messages.stop()

    async def join(self, topic: str) -> None:
        """Subscribe to a topic with our validator."""
        self._pubsub.set_topic_validator(topic, self._validate, True)
        await self._pubsub.subscribe(topic)

    async def publish(self, topic: str, data: bytes) -> int:
        """Send a message of our own to every neighbour on a topic; return how many there are."""
        async with self._publishing:  # else many at once would all find the same room
            await self._pubsub.wait_for_room(topic)
            await self._pubsub.publish(topic, data)
        return len(self._pubsub.reachable(topic))

    def admit(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        """Decide, before any signature is checked, whether a neighbour's message is looked at."""
        peer = peer_id(forwarder)
        if peer is None:
            return False
        admission = self._gate.admit(peer, trio.current_time())
        if admission is Admission.FLOOD:
            log.info("peer %s floods: disconnecting", peer.short)
            self._hang_up(forwarder)
        return (
            admission is Admission.ADMIT
            and len(message.data) <= MAX_MESSAGE
            and len(message.seqno) == 8
            and len(message.topicIDs) == 1
            and message.from_id != self._own.to_bytes()
            and _author_of(message) is not None
        )

    def joined(self, identity: ID) -> None:
        """Take note of a peer that can be reached on a topic of ours."""
        peer = peer_id(identity)
        if peer is not None:
            self._bridge.tell(self._callbacks.joined, peer)

    async def _validate(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        """Have a message with a valid signature judged on the event loop."""
        author = _author_of(message)
        if author is None or author == str(self._own):
            return author is not None

        async def judge() -> Verdict:
            return self._callbacks.judge(
                message.topicIDs[0], message.from_id + message.seqno, author, message.data
            )

        verdict = await self._bridge.ask(self._callbacks.spawn, judge)
        peer = peer_id(forwarder)
        if verdict is Verdict.REJECT and peer is not None:
            self._gate.charge(peer, trio.current_time(), cost=self._limits.rejection_cost)
        return verdict is Verdict.ACCEPT


def _author_of(message: rpc_pb2.Message) -> PeerId | None:
    return peer_id(ID(message.from_id)) if len(message.from_id) <= 64 else None
