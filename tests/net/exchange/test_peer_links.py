"""Links outlive admissions, restarts and silent neighbours: real peer ports, certificates exchanged."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from merge_core.digest import Digest
from node.domain.holding import ByteRange, ModelRef
from node.domain.ids import PeerId
from node.errors import Unreachable
from node.exchange.fetch import fetch
from node.exchange.schedule import Patience
from node.identity.keys import HostKey
from node.network.memory import Fabric, MemoryNetwork
from node.peer import credentials
from node.peer.credentials import CredentialExchange
from node.peer.links import Links
from node.peer.status import error_of

pytestmark = pytest.mark.anyio
MIB = 1 << 20
Reach = Callable[[PeerId], Awaitable[None]]


async def connected(peer: PeerId) -> None:
    """Nothing to do: the members are neighbours already."""


@dataclass(kw_only=True)
class Member:
    """A node with its peer port, on a network of its own."""

    host: HostKey
    node: Any
    network: MemoryNetwork

    @property
    def peer(self) -> PeerId:
        return self.network.peer_id

    def exchange(self) -> CredentialExchange:
        return CredentialExchange(
            network=self.network,
            admitted=self.node.admitted,
            certificate=self.node.certificate,
            port=self.node.port,
            clock=time.time,
        )

    async def answer(self, peer: PeerId, payload: bytes) -> bytes:
        return await self.exchange().answer(peer, payload)


@dataclass(kw_only=True)
class Town:
    """Members that can all reach each other; what they have started is stopped."""

    world: Any
    published: Any
    fabric: Fabric
    networks: list[MemoryNetwork]
    links: list[Links]

    async def member(self) -> Member:
        host = HostKey.generate()
        network = MemoryNetwork(self.fabric, host.peer_id)
        await network.start()
        for other in self.networks:
            await network.connect(other.addresses()[0])
        self.networks.append(network)
        node = await self.world.node(self.published.shelf, host=host)
        member = Member(host=host, node=node, network=network)
        network.handle(credentials.PROTOCOL, member.answer)
        self.grant(member)
        return member

    async def restart(self, member: Member) -> None:
        """Let a member come back on another port with another certificate, having forgotten everybody."""
        await member.node.server.stop(0)
        member.node = await self.world.node(self.published.shelf, host=member.host)
        self.grant(member)

    def grant(self, member: Member) -> None:
        for network in self.networks:
            member.node.ledger.granted.add((network.peer_id, self.published.expert.model_id))

    def link(self, member: Member, reach: Reach = connected, **options: Any) -> Links:
        self.links.append(Links(member.exchange(), member.node.certificate, reach=reach, **options))
        return self.links[-1]


@pytest.fixture
async def town(world: Any, published: Any) -> AsyncIterator[Town]:
    made = Town(world=world, published=published, fabric=Fabric(), networks=[], links=[])
    yield made
    for links in made.links:
        await links.close()
    for network in made.networks:
        await network.stop()


def ref(published: Any) -> ModelRef:
    return ModelRef(model_id=published.expert.model_id, publisher=Digest(published.expert.publisher))


def five(layer: int = 0) -> list[ByteRange]:
    return [ByteRange(tensor=f"model.layers.{layer}.weight", offset=0, length=5 * MIB)]


async def test_who_is_being_served_stays_admitted(town: Town, published: Any) -> None:
    asker, holder = await town.member(), await town.member()
    client = await town.link(asker).to(holder.peer)
    known = holder.node.admitted
    for _ in range(5):
        assert (await client.describe(ref(published))).files
        holder.node.now += 3000
        assert len(known.certificates()) == 1
    holder.node.now += 601
    assert not known.certificates()


async def test_a_client_that_was_forgotten_makes_itself_known_again(town: Town, published: Any) -> None:
    asker, holder = await town.member(), await town.member()
    client = await town.link(asker).to(holder.peer)
    assert (await client.describe(ref(published))).files
    holder.node.now += 3601
    assert (await client.describe(ref(published))).files
    holder.node.now += 3601
    assert len([piece async for piece in client.leaves(ref(published), five())]) == 5


async def test_a_holder_that_was_restarted_is_reached_again(town: Town, published: Any) -> None:
    asker, holder = await town.member(), await town.member()
    links = town.link(asker)
    client = await links.to(holder.peer)
    assert (await client.describe(ref(published))).files
    before = holder.node.certificate.pem
    await town.restart(holder)
    assert holder.node.certificate.pem != before
    assert await links.to(holder.peer) is client
    assert len([piece async for piece in client.leaves(ref(published), five())]) == 5


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"])
def test_a_peer_that_stops_in_the_middle_of_an_answer_is_away_and_not_to_blame(code: str) -> None:
    nothing = grpc.aio.Metadata()
    assert isinstance(error_of(grpc.aio.AioRpcError(grpc.StatusCode[code], nothing, nothing)), Unreachable)


async def test_a_holder_restarted_in_a_fetch_goes_on_with_it(
    town: Town, published: Any, tmp_path: Path
) -> None:
    asker, holder = await town.member(), await town.member()
    client = await town.link(asker).to(holder.peer)
    restarting: list[asyncio.Task[None]] = []

    def restart(progress: Any) -> None:
        if progress.done > 4 * MIB and not restarting:
            restarting.append(asyncio.create_task(town.restart(holder)))

    fetched = await fetch(
        published.expert.model_id,
        [client],
        tmp_path / "got",
        clock=time.monotonic,
        patience=Patience(rest=0.2),
        on_progress=restart,
    )
    assert restarting and not fetched.dropped
    assert sum(fetched.received.values()) >= fetched.manifest.size


async def test_a_silent_peer_keeps_nobody_else_waiting(town: Town, published: Any) -> None:
    asker, silent, holder = [await town.member() for _ in range(3)]
    waits = asyncio.Event()

    async def reach(peer: PeerId) -> None:
        if peer == silent.peer:
            waits.set()
            await asyncio.Event().wait()

    links = town.link(asker, reach)
    stuck = asyncio.create_task(links.to(silent.peer))
    await waits.wait()
    async with asyncio.timeout(5):
        assert (await (await links.to(holder.peer)).describe(ref(published))).files
    stuck.cancel()


async def test_two_jobs_share_the_client_of_a_peer(town: Town) -> None:
    asker, holder = await town.member(), await town.member()
    dials: list[PeerId] = []

    async def reach(peer: PeerId) -> None:
        dials.append(peer)

    links = town.link(asker, reach)
    one, other = await asyncio.gather(links.to(holder.peer), links.to(holder.peer))
    assert one is other and dials == [holder.peer]


async def test_a_client_in_use_is_not_closed_and_an_idle_one_opens_again(town: Town, published: Any) -> None:
    asker, holder, other, third = [await town.member() for _ in range(4)]
    links = town.link(asker, limit=2)
    used = await links.to(holder.peer)
    stream = used.leaves(ref(published), [r for layer in range(4) for r in five(layer)] * 4)
    pieces = [await anext(stream)]
    idle = await links.to(other.peer)
    await links.to(third.peer)
    pieces += [piece async for piece in stream]
    assert len(pieces) == 80, "it ran on"
    assert await links.to(holder.peer) is used
    assert await links.to(other.peer) is not idle
    assert (await idle.describe(ref(published))).files, "whoever still has it may use it"


async def test_closing_under_a_call_is_unreachable_and_nothing_else(town: Town, published: Any) -> None:
    asker, holder = await town.member(), await town.member()
    client = await town.link(asker).to(holder.peer)
    stream = client.leaves(ref(published), [*five(0), *five(1), *five(2), *five(3)])
    assert await anext(stream)
    await client.close()
    with pytest.raises(Unreachable):
        async for _ in stream:
            pass
    bare = town.world.client(asker.node, holder.node, lanes=1)
    await bare.close()
    with pytest.raises(Unreachable):
        await bare.describe(ref(published))
    with pytest.raises(Unreachable):
        await anext(bare.manifest(ref(published)))
