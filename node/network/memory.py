"""Networks inside one process, joined by a Fabric that can lose, cut and freeze: for tests.

Nothing here waits for time to pass: what would be lost or late on a wire fails at once, and chance comes from
the seed. Messages still go hop by hop between connected neighbours, so partitions and forged gossip behave as
they would outside.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import LocalError, PeerError, Refused, Unreachable
from node.network.base import (
    Deliver,
    Direction,
    PeerInfo,
    Validate,
    Verdict,
    check_size,
    decode_reply,
    encode_refusal,
    parse_address,
)
from node.network.flow import Admission, Gate, Limits, Slots
from node.network.switchboard import Switchboard
from node.network.upkeep import watch_peers

FIRST_PORT = 4001


@dataclass(slots=True)
class Fabric:
    """The wire between memory networks: who listens where, and what is broken.

    `loss` is the probability in [0, 1] that a request or one copy of a gossip message vanishes.
    """

    seed: int = 0
    loss: float = 0.0
    listening: dict[str, MemoryNetwork] = field(default_factory=dict)
    _frozen: set[PeerId] = field(default_factory=set)
    _side: dict[PeerId, int] = field(default_factory=dict)
    _ports: int = FIRST_PORT
    _chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    def partition(self, *sides: Iterable[MemoryNetwork]) -> None:
        """Cut every connection between networks of different sides; those not named stay with the first."""
        self._side = {network.peer_id: index for index, side in enumerate(sides) for network in side}
        for network in list(self.listening.values()):
            for peer in list(network.links):
                if not self.joined(network.peer_id, peer):
                    network.cut(peer)

    def heal(self) -> None:
        """Let everybody dial everybody again; cut connections stay cut until somebody dials."""
        self._side = {}

    def freeze(self, network: MemoryNetwork) -> None:
        """Let a peer fall silent while its connections stay open, as a stopped process does."""
        self._frozen.add(network.peer_id)

    def thaw(self, network: MemoryNetwork) -> None:
        """Let a frozen peer answer again."""
        self._frozen.discard(network.peer_id)

    def joined(self, one: PeerId, other: PeerId) -> bool:
        """Whether two peers lie on the same side."""
        return self._side.get(one, 0) == self._side.get(other, 0)

    def passes(self, sender: PeerId, receiver: PeerId) -> bool:
        """Whether a message arrives now."""
        if not self.joined(sender, receiver) or self._frozen & {sender, receiver}:
            return False
        return self.loss == 0.0 or self._chance.random() >= self.loss

    def new_transport(self) -> str:
        """An address that nobody has yet."""
        self._ports += 1
        return f"/ip4/127.0.0.1/tcp/{self._ports - 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Link:
    other: MemoryNetwork
    direction: Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    """A gossip message on its way; `author` is proven by the fabric, as a signature proves it outside."""

    topic: str
    message_id: bytes
    author: PeerId
    data: bytes


class MemoryNetwork(Switchboard):
    """A Network whose wire is a Fabric."""

    def __init__(
        self,
        fabric: Fabric,
        peer_id: PeerId,
        *,
        listen: str = "",
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = limits or Limits()
        super().__init__(peer_id, limits)
        self._fabric = fabric
        self._clock = clock
        self._transport = listen or fabric.new_transport()
        self._published = 0
        self.links: dict[PeerId, _Link] = {}
        self._requests = Gate(rate=limits.request_rate, burst=limits.request_burst, debt=limits.request_burst)
        self._gossip = Gate(rate=limits.gossip_rate, burst=limits.gossip_burst, debt=limits.gossip_debt)
        self._slots = Slots(total=limits.running_requests, per_peer=limits.running_requests_per_peer)

    async def start(self) -> None:
        """Listen; raises LocalError when another network has our address."""
        if self.running:
            return
        if self._transport in self._fabric.listening:
            raise LocalError(f"{self._transport} is in use")
        self._open()
        self._fabric.listening[self._transport] = self
        self._spawn(watch_peers, self, self._limits)

    async def stop(self) -> None:
        """Close every connection, cancel every handler, and stop listening."""
        if self._fabric.listening.get(self._transport) is self:
            del self._fabric.listening[self._transport]
        for peer in list(self.links):
            self.cut(peer)
        await self._close()

    def addresses(self) -> tuple[str, ...]:
        """The one address under which others can dial us, none when stopped."""
        return (f"{self._transport}/p2p/{self._peer_id}",) if self.running else ()

    async def connect(self, address: str, *, deadline: float = 10.0) -> PeerId:
        """Dial a complete multiaddr, or keep the connection that there is."""
        wanted = parse_address(address)
        self._require_running()
        if wanted.peer == self._peer_id:
            raise LocalError("that is this node's own address")
        if wanted.peer in self.links:
            return wanted.peer
        other = self._fabric.listening.get(wanted.transport)
        if other is None or not self._fabric.passes(self._peer_id, other.peer_id):
            raise Unreachable(f"nobody answers at {wanted.transport}", hint="check that the other node is up")
        if other.peer_id != wanted.peer:
            raise PeerError(f"the node at {wanted.transport} is not {wanted.peer}")
        if min(self._free(), other._free()) <= 0:
            raise Unreachable("no connection is free, here or there", hint="try again later")
        self.links[wanted.peer] = _Link(other=other, direction=Direction.OUTBOUND)
        other.links[self._peer_id] = _Link(other=self, direction=Direction.INBOUND)
        for network, peer in ((self, wanted.peer), (other, self._peer_id)):
            network._peer_connected(peer)
        self._meet(other)
        return wanted.peer

    async def disconnect(self, peer: PeerId) -> None:
        """Close the connection to a peer, if there is one."""
        self.cut(peer)

    def cut(self, peer: PeerId) -> None:
        """Close a connection now, on both sides."""
        link = self.links.pop(peer, None)
        if link is not None:
            link.other.links.pop(self._peer_id, None)
            link.other._peer_disconnected(self._peer_id)
            self._peer_disconnected(peer)

    def peers(self) -> tuple[PeerInfo, ...]:
        """The connected peers, ordered by peer id."""
        return tuple(
            PeerInfo(
                peer=peer,
                addresses=link.other.addresses(),
                direction=link.direction,
                latency=self._latency.get(peer),
            )
            for peer, link in sorted(self.links.items())
        )

    async def ping(self, peer: PeerId, *, deadline: float = 5.0) -> float:
        """Measure the round trip to a connected peer in seconds."""
        begun = self._clock()
        self._reach(peer)
        self._latency[peer] = self._clock() - begun
        return self._latency[peer]

    async def request(self, peer: PeerId, protocol: str, payload: bytes, *, deadline: float) -> bytes:
        """Ask a connected peer and return its answer within `deadline` seconds."""
        check_size(payload)
        other = self._reach(peer)
        if protocol not in other._handlers:
            raise PeerError(f"peer {peer.short} does not speak {protocol}")
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        other._spawn(other._serve, self._peer_id, protocol, payload, reply)
        try:
            async with asyncio.timeout(deadline):
                frame = await reply
        except TimeoutError as error:
            raise Unreachable(f"peer {peer.short} did not answer within {deadline:g} s") from error
        return decode_reply(frame)

    async def publish(self, topic: str, data: bytes) -> int:
        """Send to everybody on a topic; return how many neighbours are on it now."""
        self._check_publishable(topic, data)
        self._require_running()
        self._published += 1
        message_id = f"{self._peer_id}/{self._published}".encode()
        message = _Message(topic=topic, message_id=message_id, author=self._peer_id, data=bytes(data))
        return self._pass_on(message, came_from=self._peer_id)

    # -- behind the port -----------------------------------------------------------------------------------

    def subscribe(self, topic: str, validate: Validate, deliver: Deliver) -> None:
        """Join a topic, and tell the neighbours."""
        super().subscribe(topic, validate, deliver)
        for link in list(self.links.values()):
            self._meet(link.other)

    def _meet(self, other: MemoryNetwork) -> None:
        """Tell each side of a connection that the other is on a topic of its own."""
        if self._topics.keys() & other._topics.keys():
            self._peer_joined(other.peer_id)
            other._peer_joined(self._peer_id)

    async def _serve(self, peer: PeerId, protocol: str, payload: bytes, reply: asyncio.Future[bytes]) -> None:
        frame = encode_refusal(Refused(Reason.BUSY, "too many requests"))
        try:
            if self._requests.admit(peer, self._clock()) is Admission.ADMIT:
                with self._slots.taken(peer):
                    frame = await self._respond(peer, protocol, payload)
        except Refused as refused:
            frame = encode_refusal(refused)
        except asyncio.CancelledError:
            if not reply.done():
                reply.set_exception(Unreachable(f"peer {self._peer_id.short} closed the connection"))
            raise
        if not reply.done():
            reply.set_result(frame)

    def _pass_on(self, message: _Message, *, came_from: PeerId) -> int:
        """Hand a message to every neighbour on its topic except where it came from."""
        neighbours = [
            link.other
            for peer, link in sorted(self.links.items())
            if peer not in {came_from, message.author} and message.topic in link.other._topics
        ]
        for other in neighbours:
            if self._fabric.passes(self._peer_id, other.peer_id):
                other._spawn(other._receive, self._peer_id, message)
        return len(neighbours)

    async def _receive(self, forwarder: PeerId, message: _Message) -> None:
        admission = self._gossip.admit(forwarder, self._clock())
        if admission is Admission.FLOOD:
            self.cut(forwarder)
        if admission is not Admission.ADMIT or message.author == self._peer_id:
            return
        topic = self._topics[message.topic]
        if message.message_id in topic.verdicts:
            return
        verdict = self._judge(message.topic, message.message_id, message.author, message.data)
        if verdict is Verdict.ACCEPT:
            self._pass_on(message, came_from=forwarder)
        elif verdict is Verdict.REJECT:
            self._gossip.charge(forwarder, self._clock(), cost=self._limits.rejection_cost)

    def _reach(self, peer: PeerId) -> MemoryNetwork:
        """The connected network of a peer; raises Unreachable when there is none or the message is lost."""
        link = self.links.get(peer)
        if link is None:
            raise Unreachable(f"peer {peer.short} is not connected", hint="weft peers")
        if not (self._fabric.passes(self._peer_id, peer) and self._fabric.passes(peer, self._peer_id)):
            raise Unreachable(f"peer {peer.short} did not answer")
        return link.other

    def _require_running(self) -> None:
        if not self.running:
            raise LocalError("the network is not started")

    def _free(self) -> int:
        return self._limits.connections - len(self.links)
