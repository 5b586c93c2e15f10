"""The library's gossip, changed where it drops messages silently or lets a peer end it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any, Protocol

import trio
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub

from node.network.base import MAX_MESSAGE

HEARTBEAT = 1
"""Seconds between two rounds of maintaining the mesh."""

BACKPRESSURE = 1.0
"""Seconds that a publisher waits for a neighbour that does not read."""

HALF_FULL = 16
"""Frames in an outbound queue, of 32, above which a publisher waits."""

MAX_GOSSIP_FRAME = 4 * MAX_MESSAGE
"""Bytes of a pubsub frame: messages with their signatures, and control."""

log = logging.getLogger(__name__)


class Doorkeeper(Protocol):
    """Decides what is looked at, and takes note of who can be reached."""

    def admit(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        """Decide, before any signature is checked, whether a neighbour's message is looked at."""

    def joined(self, identity: ID) -> None:
        """Take note of a peer that can be reached on a topic of ours."""


class GuardedPubsub(Pubsub):  # type: ignore[misc]
    """A Pubsub that asks before it looks at a message, survives what it finds there, and tells who joined."""

    def __init__(self, doorkeeper: Doorkeeper, host: BasicHost, router: GossipSub) -> None:
        super().__init__(host, router, strict_signing=True, max_inbound_rpc_size=MAX_GOSSIP_FRAME)
        self._doorkeeper = doorkeeper

    def reachable(self, topic: str) -> set[ID]:
        """The neighbours on a topic that have a stream of ours."""
        return set(self.peer_topics.get(topic, ())) & set(self.peers)

    def _fullest(self, topic: str) -> int:
        queues = [self.peer_queues[peer] for peer in self.reachable(topic) if peer in self.peer_queues]
        return max(map(len, queues), default=0)

    async def wait_for_room(self, topic: str) -> None:
        """Let the outbound queues drain: a full one (32 frames) drops what comes next without a word.

        A neighbour that does not read for a second is not waited for.
        """
        with trio.move_on_after(BACKPRESSURE):
            while self._fullest(topic) >= HALF_FULL:  # noqa: ASYNC110 - the queues tell nobody of their room
                await trio.sleep(0.002)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        try:
            if msg_forwarder == self.my_id or self._doorkeeper.admit(msg_forwarder, msg):
                await super().push_msg(msg_forwarder, msg)
        except Exception as error:  # it runs as a task of the service, which an exception would end
            log.debug("a gossip message by way of %s failed: %r", msg_forwarder, error)

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        """Deliver nothing here: what the validator accepts is queued on the event loop already."""

    def handle_subscription(self, origin_id: ID, sub_message: Any) -> None:
        super().handle_subscription(origin_id, sub_message)
        self._tell_joined(origin_id)

    async def _handle_new_peer(self, peer_id: ID) -> None:
        await super()._handle_new_peer(peer_id)
        self._tell_joined(peer_id)

    def _tell_joined(self, peer_id: ID) -> None:
        if any(peer_id in self.reachable(topic) for topic in self.topic_ids):
            self._doorkeeper.joined(peer_id)


class FloodingRouter(GossipSub):  # type: ignore[misc]
    """A GossipSub that sends what we publish ourselves to every neighbour on the topic, as go-libp2p does."""

    def _get_peers_to_send(
        self, topic_ids: Iterable[str], msg_forwarder: ID, origin: ID, msg_id: bytes | None = None
    ) -> Iterable[ID]:
        if msg_forwarder == self.pubsub.my_id:
            return {peer for topic in topic_ids for peer in self.pubsub.reachable(topic)}
        return super()._get_peers_to_send(topic_ids, msg_forwarder, origin, msg_id)  # type: ignore[no-any-return]


def build_router() -> FloodingRouter:
    """GossipSub without its own rate limit (10 a second, silent) and without exchanging peers.

    Version 1.1, since 1.2 sends an IDONTWANT for every message: worth it for large ones in dense meshes only.
    """
    return FloodingRouter(
        protocols=[PROTOCOL_ID_V11],
        degree=6,
        degree_low=4,
        degree_high=12,
        heartbeat_interval=HEARTBEAT,
        do_px=False,
        adaptive_gossip_enabled=False,
        spam_protection_enabled=False,
        eclipse_protection_enabled=False,
        max_messages_per_topic_per_second=math.inf,
    )
