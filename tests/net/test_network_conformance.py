"""One suite for every implementation of the network port: what a node may rely on, whoever carries it."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import LimitReached, LocalError, PeerError, Refused, Unreachable
from node.identity.keys import HostKey
from node.network.base import MAX_MESSAGE, Change, Direction, Network, PeerEvent, Verdict, parse_address
from node.network.flow import Limits
from node.network.libp2p import Libp2pNetwork
from node.network.memory import Fabric, MemoryNetwork
from node.network.upkeep import CHECK_EVERY, stay_connected

pytestmark = pytest.mark.anyio

ECHO = "/weft/echo/1"
TOPIC = "weft/test/adverts"
SOON = 10.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class World:
    """Makes networks of one kind, and ends them."""

    kind: str
    fabric: Fabric = field(default_factory=Fabric)
    made: list[Network] = field(default_factory=list)

    def make(self, *, key: HostKey | None = None, listen: str = "", limits: Limits | None = None) -> Network:
        key = key or HostKey.generate()
        network: Network
        if self.kind == "memory":
            network = MemoryNetwork(self.fabric, key.peer_id, listen=listen, limits=limits)
        else:
            network = Libp2pNetwork(key.private_bytes, [listen or "/ip4/127.0.0.1/tcp/0"], limits=limits)
        self.made.append(network)
        return network

    async def start(self, *, limits: Limits | None = None) -> Network:
        network = self.make(limits=limits)
        await network.start()
        return network


@pytest.fixture(params=["memory", "libp2p"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    world = World(request.param)
    yield world
    for network in world.made:
        await network.stop()


class Witness:
    """Collects what happens to a network, and waits for it."""

    def __init__(self, network: Network) -> None:
        self.events: asyncio.Queue[PeerEvent] = asyncio.Queue()
        network.on_peer(self.events.put_nowait)

    async def sees(self, change: Change) -> PeerId:
        async with asyncio.timeout(SOON):
            while (event := await self.events.get()).change is not change:
                pass
        return event.peer


class Listener:
    """Subscribes a network to TOPIC, judges by the first word, and collects what is delivered."""

    def __init__(self, network: Network) -> None:
        self.judged: list[bytes] = []
        self.delivered: asyncio.Queue[tuple[PeerId, bytes]] = asyncio.Queue()
        network.subscribe(TOPIC, self.validate, self.deliver)

    def validate(self, author: PeerId, data: bytes) -> Verdict:
        self.judged.append(data)
        return {b"bad": Verdict.REJECT, b"old": Verdict.IGNORE}.get(data[:3], Verdict.ACCEPT)

    async def deliver(self, author: PeerId, data: bytes) -> None:
        await self.delivered.put((author, data))

    async def hears(self) -> tuple[PeerId, bytes]:
        async with asyncio.timeout(SOON):
            return await self.delivered.get()


async def echo(peer: PeerId, payload: bytes) -> bytes:
    return payload


async def joined(*networks: Network) -> None:
    """Connect networks in a line, each with a topic, and wait until gossip can flow along it."""
    witnesses = [Witness(network) for network in networks]
    for left, right in itertools.pairwise(networks):
        await left.connect(right.addresses()[0])
    for index, witness in enumerate(witnesses):
        for _ in range((index > 0) + (index < len(networks) - 1)):
            await witness.sees(Change.JOINED)


async def flood(network: Network, victim: Witness, data: bytes) -> None:
    """Publish until the victim has had enough."""
    enough = asyncio.create_task(victim.sees(Change.DISCONNECTED))
    while not enough.done():
        await network.publish(TOPIC, data)
        await asyncio.sleep(0)
    assert await enough == network.peer_id


async def connected_pair(world: World, limits: Limits | None = None) -> tuple[Network, Network]:
    """Two networks that both know of their connection: the side that is dialled learns of it last."""
    asker, answerer = await world.start(), await world.start(limits=limits)
    seen = Witness(answerer)
    await asker.connect(answerer.addresses()[0])
    assert await seen.sees(Change.CONNECTED) == asker.peer_id
    return asker, answerer


# -- peers -----------------------------------------------------------------------------------------------


async def test_the_peer_id_is_that_of_the_host_key(world: World) -> None:
    key = HostKey.generate()
    assert world.make(key=key).peer_id == key.peer_id


async def test_connected_peers_see_each_other(world: World) -> None:
    alice, bob = await world.start(), await world.start()
    seen_by_alice, seen_by_bob = Witness(alice), Witness(bob)

    assert await alice.connect(bob.addresses()[0]) == bob.peer_id
    assert await seen_by_alice.sees(Change.CONNECTED) == bob.peer_id
    assert await seen_by_bob.sees(Change.CONNECTED) == alice.peer_id

    (bob_info,), (alice_info,) = alice.peers(), bob.peers()
    assert (bob_info.peer, bob_info.direction) == (bob.peer_id, Direction.OUTBOUND)
    assert (alice_info.peer, alice_info.direction) == (alice.peer_id, Direction.INBOUND)
    assert parse_address(bob_info.addresses[0]).peer == bob.peer_id


async def test_connecting_again_keeps_the_connection(world: World) -> None:
    alice, bob = await connected_pair(world)
    seen = Witness(alice)
    assert await alice.connect(bob.addresses()[0]) == bob.peer_id
    assert len(alice.peers()) == 1
    assert seen.events.empty()


async def test_both_ends_are_told_of_a_disconnect_once(world: World) -> None:
    alice, bob = await connected_pair(world)
    seen_by_alice, seen_by_bob = Witness(alice), Witness(bob)
    await alice.disconnect(bob.peer_id)
    assert await seen_by_alice.sees(Change.DISCONNECTED) == bob.peer_id
    assert await seen_by_bob.sees(Change.DISCONNECTED) == alice.peer_id
    assert alice.peers() == bob.peers() == ()
    await alice.disconnect(bob.peer_id)
    assert seen_by_alice.events.empty()


async def test_a_listener_that_fails_harms_nobody(world: World, caplog: pytest.LogCaptureFixture) -> None:
    alice, bob = await world.start(), await world.start()

    def fail(event: PeerEvent) -> None:
        raise RuntimeError("listener")

    alice.on_peer(fail)
    seen = Witness(alice)
    await alice.connect(bob.addresses()[0])
    assert await seen.sees(Change.CONNECTED) == bob.peer_id
    assert "a listener failed" in caplog.text


async def test_nobody_at_the_address_is_unreachable(world: World) -> None:
    alice, bob = await world.start(), await world.start()
    (address,) = bob.addresses()
    await bob.stop()
    with pytest.raises(Unreachable) as caught:
        await alice.connect(address)
    assert caught.value.hint


async def test_somebody_else_at_the_address_is_a_peer_error(world: World) -> None:
    alice, bob = await world.start(), await world.start()
    address = parse_address(bob.addresses()[0])
    stranger = HostKey.generate().peer_id
    with pytest.raises(PeerError):
        await alice.connect(f"{address.transport}/p2p/{stranger}")
    assert alice.peers() == ()
    assert await alice.connect(str(address)) == bob.peer_id


async def test_our_own_address_and_malformed_ones_are_refused(world: World) -> None:
    alice = await world.start()
    for address in (alice.addresses()[0], "", "/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1/p2p/Qm", "\0"):
        with pytest.raises(LocalError):
            await alice.connect(address)


async def test_no_more_connections_than_allowed(world: World) -> None:
    hub = await world.start(limits=Limits(connections=1))
    first, second = await world.start(), await world.start()
    await first.connect(hub.addresses()[0])
    with pytest.raises(Unreachable):
        await hub.connect(second.addresses()[0])
    assert [info.peer for info in hub.peers()] == [first.peer_id]


async def test_a_slot_is_free_again_when_its_connection_ends(world: World) -> None:
    hub = await world.start(limits=Limits(connections=2))
    seen = Witness(hub)
    caller = await world.start()
    for _ in range(5):
        assert await caller.connect(hub.addresses()[0]) == hub.peer_id
        await seen.sees(Change.CONNECTED)
        await caller.disconnect(hub.peer_id)
        await seen.sees(Change.DISCONNECTED)


async def test_a_ping_measures_the_round_trip(world: World) -> None:
    alice, bob = await connected_pair(world)
    assert alice.peers()[0].latency is None
    latency = await alice.ping(bob.peer_id)
    assert 0 <= latency < SOON
    assert alice.peers()[0].latency == latency
    with pytest.raises(Unreachable):
        await alice.ping(HostKey.generate().peer_id)


# -- requests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1000, MAX_MESSAGE])
async def test_a_request_is_answered(world: World, size: int) -> None:
    alice, bob = await connected_pair(world)
    callers: list[PeerId] = []

    async def answer(peer: PeerId, payload: bytes) -> bytes:
        callers.append(peer)
        return payload[::-1]

    bob.handle(ECHO, answer)
    payload = bytes(index % 251 for index in range(size))
    assert await alice.request(bob.peer_id, ECHO, payload, deadline=SOON) == payload[::-1]
    assert callers == [alice.peer_id]


async def test_requests_go_both_ways_and_at_the_same_time(world: World) -> None:
    alice, bob = await connected_pair(world)
    alice.handle(ECHO, echo)
    bob.handle(ECHO, echo)
    asked = [
        asker.request(other.peer_id, ECHO, b"%d" % index, deadline=SOON)
        for index in range(4)
        for asker, other in ((alice, bob), (bob, alice))
    ]
    assert await asyncio.gather(*asked) == [b"%d" % index for index in range(4) for _ in range(2)]


async def test_a_refusal_arrives_with_its_reason_and_sentence(world: World) -> None:
    alice, bob = await connected_pair(world)

    async def refuse(peer: PeerId, payload: bytes) -> bytes:
        raise Refused(Reason.QUOTA_EXCEEDED, "3 GiB of 3 GiB — voll")

    bob.handle(ECHO, refuse)
    with pytest.raises(Refused) as caught:
        await alice.request(bob.peer_id, ECHO, b"", deadline=SOON)
    assert caught.value.reason is Reason.QUOTA_EXCEEDED
    assert caught.value.detail == "3 GiB of 3 GiB — voll"


async def test_a_failure_keeps_its_secrets(world: World, caplog: pytest.LogCaptureFixture) -> None:
    alice, bob = await connected_pair(world)

    async def fail(peer: PeerId, payload: bytes) -> bytes:
        raise RuntimeError("cannot open /home/bob/secret")

    bob.handle(ECHO, fail)
    with pytest.raises(Unreachable) as caught:
        await alice.request(bob.peer_id, ECHO, b"", deadline=SOON)
    assert "secret" not in str(caught.value)
    assert "secret" in caplog.text


async def test_too_large_a_request_is_not_sent(world: World) -> None:
    alice, bob = await connected_pair(world)
    bob.handle(ECHO, echo)
    with pytest.raises(LimitReached):
        await alice.request(bob.peer_id, ECHO, bytes(MAX_MESSAGE + 1), deadline=SOON)


async def test_too_large_an_answer_is_not_sent(world: World, caplog: pytest.LogCaptureFixture) -> None:
    alice, bob = await connected_pair(world)

    async def ramble(peer: PeerId, payload: bytes) -> bytes:
        return bytes(MAX_MESSAGE + 1)

    bob.handle(ECHO, ramble)
    with pytest.raises(Unreachable):
        await alice.request(bob.peer_id, ECHO, b"", deadline=SOON)
    assert "over the limit" in caplog.text


async def test_a_handler_that_hangs_meets_the_deadline(world: World) -> None:
    alice, bob = await connected_pair(world)

    async def hang(peer: PeerId, payload: bytes) -> bytes:
        await asyncio.Event().wait()
        return b""

    bob.handle(ECHO, hang)
    begun = asyncio.get_running_loop().time()
    with pytest.raises(Unreachable):
        await alice.request(bob.peer_id, ECHO, b"", deadline=0.2)
    assert asyncio.get_running_loop().time() - begun < 2.0
    assert alice.peers() != ()


async def test_a_handler_that_hangs_is_cancelled_by_its_own_node(world: World) -> None:
    alice, bob = await connected_pair(world, Limits(handler_deadline=0.1))
    cancelled = asyncio.Event()

    async def hang(peer: PeerId, payload: bytes) -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return b""

    bob.handle(ECHO, hang)
    with pytest.raises(Refused) as caught:
        await alice.request(bob.peer_id, ECHO, b"", deadline=SOON)
    assert caught.value.reason is Reason.BUSY
    assert cancelled.is_set()


async def test_a_request_can_be_cancelled(world: World) -> None:
    alice, bob = await connected_pair(world)
    begun = asyncio.Event()

    async def hang(peer: PeerId, payload: bytes) -> bytes:
        begun.set()
        await asyncio.Event().wait()
        return b""

    bob.handle(ECHO, hang)
    asking = asyncio.create_task(alice.request(bob.peer_id, ECHO, b"", deadline=SOON))
    await asyncio.wait_for(begun.wait(), SOON)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert await alice.ping(bob.peer_id) >= 0


async def test_a_peer_has_a_number_of_requests_at_once(world: World) -> None:
    alice, bob = await connected_pair(world, Limits(running_requests_per_peer=2))
    running, released = asyncio.Queue[None](), asyncio.Event()

    async def wait(peer: PeerId, payload: bytes) -> bytes:
        running.put_nowait(None)
        await released.wait()
        return b"done"

    bob.handle(ECHO, wait)
    first = [asyncio.create_task(alice.request(bob.peer_id, ECHO, b"", deadline=SOON)) for _ in range(2)]
    async with asyncio.timeout(SOON):
        for _ in first:
            await running.get()
    with pytest.raises(Refused) as caught:
        await alice.request(bob.peer_id, ECHO, b"", deadline=SOON)
    assert caught.value.reason is Reason.BUSY
    released.set()
    assert await asyncio.gather(*first) == [b"done", b"done"]
    assert await alice.request(bob.peer_id, ECHO, b"", deadline=SOON) == b"done"


async def test_a_peer_has_a_rate_of_requests(world: World) -> None:
    alice, bob = await connected_pair(world, Limits(request_rate=0.0, request_burst=3))
    bob.handle(ECHO, echo)
    for _ in range(3):
        await alice.request(bob.peer_id, ECHO, b"", deadline=SOON)
    with pytest.raises(Refused) as caught:
        await alice.request(bob.peer_id, ECHO, b"", deadline=SOON)
    assert caught.value.reason is Reason.BUSY


async def test_a_protocol_that_the_peer_does_not_speak(world: World) -> None:
    alice, bob = await connected_pair(world)
    with pytest.raises(PeerError):
        await alice.request(bob.peer_id, "/weft/unknown/1", b"", deadline=SOON)


async def test_a_peer_that_is_not_connected(world: World) -> None:
    alice, bob = await world.start(), await world.start()
    bob.handle(ECHO, echo)
    with pytest.raises(Unreachable):
        await alice.request(bob.peer_id, ECHO, b"", deadline=SOON)


async def test_a_peer_that_stops_while_it_answers(world: World) -> None:
    alice, bob = await connected_pair(world)
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hang(peer: PeerId, payload: bytes) -> bytes:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return b""

    bob.handle(ECHO, hang)
    asking = asyncio.create_task(alice.request(bob.peer_id, ECHO, b"", deadline=SOON))
    await asyncio.wait_for(begun.wait(), SOON)
    await bob.stop()
    assert ended.is_set()
    with pytest.raises(Unreachable):
        await asking


# -- gossip ----------------------------------------------------------------------------------------------


async def test_gossip_crosses_a_neighbour_and_is_delivered_once(world: World) -> None:
    alice, bob, carol = [await world.start() for _ in range(3)]
    ears = [Listener(network) for network in (alice, bob, carol)]
    await joined(alice, bob, carol)

    assert await alice.publish(TOPIC, b"first") == 1
    assert await ears[1].hears() == (alice.peer_id, b"first")
    assert await ears[2].hears() == (alice.peer_id, b"first")
    assert await carol.publish(TOPIC, b"second") == 1
    assert await ears[1].hears() == (carol.peer_id, b"second")
    assert await ears[0].hears() == (carol.peer_id, b"second")
    assert all(ear.delivered.empty() for ear in ears)


async def test_a_burst_arrives_whole(world: World) -> None:
    alice, bob = await world.start(), await world.start()
    Listener(alice)
    at_bob = Listener(bob)
    await joined(alice, bob)
    sent = {b"%d" % index for index in range(90)}
    await asyncio.gather(*(alice.publish(TOPIC, data) for data in sent))
    assert {(await at_bob.hears())[1] for _ in sent} == sent


async def test_what_a_neighbour_rejects_or_ignores_goes_no_further(world: World) -> None:
    alice, bob, carol = [await world.start() for _ in range(3)]
    alice.subscribe(TOPIC, lambda author, data: Verdict.ACCEPT, lambda author, data: asyncio.sleep(0))
    at_bob, at_carol = Listener(bob), Listener(carol)
    await joined(alice, bob, carol)

    for data in (b"bad news", b"old news", b"good news"):
        await alice.publish(TOPIC, data)
    assert await at_carol.hears() == (alice.peer_id, b"good news")
    assert sorted(at_bob.judged) == [b"bad news", b"good news", b"old news"]
    assert at_carol.judged == [b"good news"]
    assert await at_bob.hears() == (alice.peer_id, b"good news")
    assert at_bob.delivered.empty()


async def test_what_our_own_validator_rejects_is_not_published(world: World) -> None:
    alice = await world.start()
    Listener(alice)
    with pytest.raises(LocalError):
        await alice.publish(TOPIC, b"bad news")
    with pytest.raises(LocalError):
        await alice.publish("weft/other", b"news")
    with pytest.raises(LimitReached):
        await alice.publish(TOPIC, bytes(MAX_MESSAGE + 1))
    assert await alice.publish(TOPIC, b"to nobody") == 0


async def test_the_largest_message_arrives(world: World) -> None:
    alice, bob = await world.start(), await world.start()
    Listener(alice)
    at_bob = Listener(bob)
    await joined(alice, bob)
    await alice.publish(TOPIC, bytes(MAX_MESSAGE))
    assert await at_bob.hears() == (alice.peer_id, bytes(MAX_MESSAGE))


async def test_a_topic_can_be_joined_after_connecting(world: World) -> None:
    alice, bob = await connected_pair(world)
    seen = Witness(alice)
    Listener(alice)
    at_bob = Listener(bob)
    assert await seen.sees(Change.JOINED) == bob.peer_id
    assert await alice.publish(TOPIC, b"late") == 1
    assert await at_bob.hears() == (alice.peer_id, b"late")


async def test_a_flood_is_bounded_before_the_validator_and_ends_the_connection(world: World) -> None:
    alice = await world.start()
    bob = await world.start(limits=Limits(gossip_rate=0.0, gossip_burst=20, gossip_debt=100))
    Listener(alice)
    at_bob = Listener(bob)
    await joined(alice, bob)
    await flood(alice, Witness(bob), b"news")
    assert 0 < len(at_bob.judged) <= 20


async def test_rejected_messages_cost_their_forwarder_more(world: World) -> None:
    alice = await world.start()
    bob = await world.start(limits=Limits(gossip_rate=0.0, gossip_burst=20, gossip_debt=30, rejection_cost=9))
    alice.subscribe(TOPIC, lambda author, data: Verdict.ACCEPT, lambda author, data: asyncio.sleep(0))
    at_bob = Listener(bob)
    await joined(alice, bob)
    await flood(alice, Witness(bob), b"bad news")
    assert 0 < len(at_bob.judged) < 20


async def test_a_validator_or_receiver_that_fails_harms_nobody(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = await world.start(), await world.start()
    Listener(alice)
    seen = asyncio.Queue[bytes]()

    def validate(author: PeerId, data: bytes) -> Verdict:
        if data == b"odd":
            seen.put_nowait(data)
            raise RuntimeError("validator")
        return Verdict.ACCEPT

    async def deliver(author: PeerId, data: bytes) -> None:
        seen.put_nowait(data)
        if data == b"sour":
            raise RuntimeError("receiver")

    bob.subscribe(TOPIC, validate, deliver)
    await joined(alice, bob)
    async with asyncio.timeout(SOON):
        for data in (b"odd", b"sour", b"sweet"):
            await alice.publish(TOPIC, data)
            assert await seen.get() == data
    assert "the validator of" in caplog.text
    assert "delivery on" in caplog.text


# -- life ------------------------------------------------------------------------------------------------


async def test_start_and_stop_can_be_repeated(world: World) -> None:
    network = world.make()
    assert network.addresses() == ()
    await network.stop()
    async with network:
        await network.start()
        assert len(network.addresses()) == 1
    await network.stop()
    assert network.addresses() == ()
    with pytest.raises(LocalError):
        await network.connect("/ip4/127.0.0.1/tcp/1/p2p/" + HostKey.generate().peer_id)


async def test_a_restart_keeps_address_handlers_and_topics(world: World) -> None:
    alice, bob = await world.start(), await world.start()
    bob.handle(ECHO, echo)
    at_bob = Listener(bob)
    Listener(alice)
    (address,) = bob.addresses()
    await joined(alice, bob)
    await bob.stop()
    await bob.start()
    assert bob.addresses() == (address,)

    seen = Witness(alice)
    await alice.connect(address)
    assert await alice.request(bob.peer_id, ECHO, b"again", deadline=SOON) == b"again"
    await seen.sees(Change.JOINED)
    await alice.publish(TOPIC, b"again")
    assert await at_bob.hears() == (alice.peer_id, b"again")


async def test_another_object_takes_over_key_and_address(world: World) -> None:
    key = HostKey.generate()
    first = world.make(key=key)
    await first.start()
    (address,) = first.addresses()
    alice = await world.start()
    await alice.connect(address)
    seen = Witness(alice)
    await first.stop()
    await seen.sees(Change.DISCONNECTED)

    second = world.make(key=key, listen=parse_address(address).transport)
    await second.start()
    assert second.addresses() == (address,)
    assert await alice.connect(address) == key.peer_id


async def test_a_taken_address_is_reported(world: World) -> None:
    first = await world.start()
    second = world.make(listen=parse_address(first.addresses()[0]).transport)
    with pytest.raises(LocalError):
        await second.start()
    assert second.addresses() == ()
    await second.stop()


async def test_a_lost_bootstrap_peer_is_dialled_again(world: World) -> None:
    alice, bob = await world.start(), await world.start()
    seen = Witness(alice)
    waits = asyncio.Queue[float]()

    async def hurried(seconds: float) -> None:
        if seconds != CHECK_EVERY:
            waits.put_nowait(seconds)
        await asyncio.sleep(0)

    addresses = [bob.addresses()[0], alice.addresses()[0]]
    keeping = asyncio.create_task(stay_connected(alice, addresses, sleep=hurried, jitter=lambda: 0.5))
    assert await seen.sees(Change.CONNECTED) == bob.peer_id
    await bob.stop()
    assert await seen.sees(Change.DISCONNECTED) == bob.peer_id
    async with asyncio.timeout(SOON):
        assert [await waits.get() for _ in range(3)] == [0.75, 1.5, 3.0]
    await bob.start()
    assert await seen.sees(Change.CONNECTED) == bob.peer_id
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping


async def test_starting_and_stopping_is_silent(
    world: World, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        alice, bob = await connected_pair(world)
        await alice.stop()
        await bob.stop()
    assert [record.getMessage() for record in caplog.records if record.name != "asyncio"] == []
    assert capfd.readouterr() == ("", "")
