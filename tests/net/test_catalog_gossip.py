"""Adverts spread: everybody hears, newcomers catch up, a liar is found out by all who are honest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource
from merge_core.digest import canonical, sha256
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.structural.sketcher import compute
from node.catalog.book import AdvertBook, Query, read
from node.catalog.gossip import PROTOCOL, Gossip
from node.catalog.room import LEAST, ROOM
from node.catalog.shelf import Measurable, Shelf, Sketched
from node.domain.advert import PAYLOAD_TYPE, announcement
from node.domain.negotiation import Purpose
from node.domain.reasons import Reason
from node.errors import Refused
from node.identity import keyring
from node.identity.envelopes import seal
from node.identity.keys import HostKey
from node.network.memory import Fabric, MemoryNetwork
from node.store import Store

NOW = 1_760_000_000.0


def sketch(measured: Measurable) -> Sketched:
    leaves = LeafTable.parse(Manifest.parse(measured.manifest.read_bytes()), measured.leaves.read_bytes())
    with Checkpoint.open(measured.directory) as checkpoint:
        structure = compute(VerifiedSource(checkpoint, leaves))
    made = Fingerprint(model_id=measured.model_id, structure=structure, behaviour=None)
    return Sketched(fingerprint=made.to_bytes())


async def never(seconds: float) -> None:
    """A sleep that renewal waits in for ever."""
    await asyncio.Event().wait()


class Node:
    """One node's catalogue on a memory network."""

    def __init__(self, fabric: Fabric, folder: Path, *, room: int = ROOM) -> None:
        self.identity = keyring.create(folder / "identity", NOW)
        self.store = Store(folder / "node.db")
        self.shelf = Shelf(folder / "experts")
        self.network = MemoryNetwork(fabric, self.identity.peer_id)
        self.book = AdvertBook(self.store, network="demo", me=self.identity.peer_id, room=room)
        self.now = NOW
        self.gossip = Gossip(
            self.network,
            self.book,
            self.shelf,
            self.identity.host,
            name="demo",
            purposes=lambda licence: (Purpose.MERGE,),
            clock=lambda: self.now,
        )

    async def join(self, stack: AsyncExitStack, *others: Node) -> None:
        self.gossip.start()
        await stack.enter_async_context(self.network)
        task = asyncio.create_task(self.gossip.run(never))
        stack.callback(task.cancel)
        for other in others:
            await self.network.connect(other.network.addresses()[0])

    def names(self) -> list[str]:
        return [listing.model.name for listing in self.book.search(Query(), self.now)]


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop and its threads run until something holds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.to_thread(lambda: None)


def play(story: Callable[[AsyncExitStack], object]) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            await story(stack)  # type: ignore[misc]

    asyncio.run(run())


def test_everybody_hears_and_a_newcomer_catches_up(model_dir: Path, tmp_path: Path) -> None:
    fabric = Fabric(seed=3)
    one, two, three, late = (Node(fabric, tmp_path / name) for name in ("one", "two", "three", "late"))
    one.shelf.add(model_dir, identity=one.identity, sketch=sketch, now=NOW, name="tiny")

    async def story(stack: AsyncExitStack) -> None:
        await one.join(stack)
        await two.join(stack, one)
        await three.join(stack, two)
        await one.gossip.announce()
        await until(lambda: three.names() == ["tiny"])
        await late.join(stack, three)
        await until(lambda: late.names() == ["tiny"])
        (listing,) = late.book.search(Query(purpose=Purpose.MERGE), NOW)
        assert listing.peer == one.identity.peer_id and listing.model.licence == "Apache-2.0"
        one.shelf.remove(listing.model.model_id)
        await one.gossip.announce()
        await until(lambda: late.names() == [])

    play(story)


def test_who_comes_last_is_heard_of_by_those_who_have_asked_already(model_dir: Path, tmp_path: Path) -> None:
    fabric = Fabric(seed=8)
    hub, early, last = (Node(fabric, tmp_path / name) for name in ("hub", "early", "last"))
    last.shelf.add(model_dir, identity=last.identity, sketch=sketch, now=NOW, name="tiny")

    async def story(stack: AsyncExitStack) -> None:
        await hub.join(stack)
        await early.join(stack, hub)
        await last.join(stack)
        await last.gossip.announce()  # before anybody can hear it
        await last.network.connect(hub.network.addresses()[0])
        await until(lambda: early.names() == ["tiny"])

    play(story)


def test_a_liar_is_found_out_by_everybody_even_by_who_comes_later(tmp_path: Path) -> None:
    fabric = Fabric(seed=4)
    liar, left, right, late = (Node(fabric, tmp_path / name) for name in ("liar", "left", "right", "late"))
    honest = (left, right, late)
    (said,) = liar.book.announce([], liar.identity.host, NOW)
    twin = replace(read(said), models=(), previous=sha256(b"another history"))
    other = seal(PAYLOAD_TYPE, twin.to_bytes(), liar.identity.host).to_bytes()

    async def story(stack: AsyncExitStack) -> None:
        await liar.join(stack)
        await left.join(stack, liar)
        await right.join(stack, liar)
        left.book.admit(said, NOW)
        right.book.admit(other, NOW)
        assert not left.book.banned(liar.identity.peer_id)
        await right.network.connect(left.network.addresses()[0])
        await until(lambda: left.book.banned(liar.identity.peer_id))
        await until(lambda: right.book.banned(liar.identity.peer_id))
        await late.join(stack, right)
        await until(lambda: late.book.banned(liar.identity.peer_id))
        assert all(node.names() == [] for node in honest)
        assert all(not node.book.banned(peer.identity.peer_id) for node in honest for peer in honest)

    play(story)


def test_a_crowd_of_made_up_peers_does_not_hide_who_is_here(model_dir: Path, tmp_path: Path) -> None:
    fabric = Fabric(seed=6)
    hub, one = (Node(fabric, tmp_path / name, room=4 * LEAST) for name in ("hub", "one"))
    late = Node(fabric, tmp_path / "late", room=8 * LEAST)
    one.shelf.add(model_dir, identity=one.identity, sketch=sketch, now=NOW, name="tiny")
    # Both are full; what the hub tells stays below the half of its newcomer's room that is its share.
    for node, crowd in ((hub, 4), (late, 8)):
        for number in range(100, 100 + crowd):
            key = HostKey.from_private_bytes(number.to_bytes(32, "big"))
            (advert,) = announcement([], network="demo", peer=key.peer_id, last=None, now=NOW)
            node.book.admit(seal(PAYLOAD_TYPE, advert.to_bytes(), key).to_bytes(), NOW)

    async def story(stack: AsyncExitStack) -> None:
        await hub.join(stack)
        await one.join(stack, hub)
        await one.gossip.announce()
        await until(lambda: hub.names() == ["tiny"])
        await late.join(stack, hub)
        await until(lambda: late.names() == ["tiny"])

    play(story)


def test_pages_are_given_in_one_network_and_to_who_asks_properly(tmp_path: Path) -> None:
    fabric = Fabric(seed=5)
    one, other = Node(fabric, tmp_path / "one"), Node(fabric, tmp_path / "other")

    async def story(stack: AsyncExitStack) -> None:
        await one.join(stack)
        await other.join(stack, one)
        for request, reason in (
            (canonical({"network": "elsewhere", "after": ["", 0]}), Reason.WRONG_NETWORK),
            (canonical({"network": "demo", "after": ["", -1]}), Reason.MALFORMED),
            (canonical({"network": "demo", "after": 0}), Reason.MALFORMED),
            (canonical({"network": "demo", "after": [0, ""]}), Reason.MALFORMED),
            (canonical({"network": "demo"}), Reason.MALFORMED),
            (b"[" * 10_000, Reason.MALFORMED),
            (b"\xff", Reason.MALFORMED),
        ):
            with pytest.raises(Refused) as refused:
                await other.network.request(one.identity.peer_id, PROTOCOL, request, deadline=5.0)
            assert refused.value.reason is reason

    play(story)
