"""Overlay: what finding and fetching experts takes, as the parts of the node that have a say in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from merge_core.digest import ModelId
from node.catalog.book import AdvertBook, Listing, Query
from node.catalog.hashes import HashCache
from node.catalog.shelf import Content, Shelf
from node.domain.ids import PeerId
from node.errors import NotEnoughPeers
from node.exchange.holder import Holder
from node.locks import KeyedLocks
from node.merging.canvass import Pace, canvass
from node.merging.private import PrivateShelves
from node.merging.vetting import Vetting
from node.negotiation.service import Negotiation

ENOUGH = 4
"""Holders of one model after which no more are looked for."""


class Links(Protocol):
    """The way to the data ports of peers."""

    async def to(self, peer: PeerId) -> Holder:
        """A client for a peer's data port; raises Unreachable, Refused or PeerError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """Adverts, negotiation, links, and where experts lie.

    `shelf` is what this node shares; `private` what its jobs fetched for themselves; `fetching` has a lock
    for each model, so that the second of two jobs copies what the first one fetches.
    """

    me: PeerId
    book: AdvertBook
    negotiation: Negotiation
    links: Links
    shelf: Shelf
    private: PrivateShelves
    hashes: HashCache
    clock: Callable[[], float]
    vetting: Vetting
    pace: Pace = field(default_factory=Pace)
    fetching: KeyedLocks[ModelId] = field(default_factory=KeyedLocks)

    def listings(self, model_id: ModelId, peer: PeerId | None = None) -> tuple[Listing, ...]:
        """Who else advertises a model."""
        found = self.book.search(Query(model_id=model_id, peer=peer), self.clock())
        return tuple(listing for listing in found if listing.peer != self.me)

    def locate(self, content_root: str, length: int) -> Content | None:
        """Where a tensor lies on this machine; raises OSError or CorruptCheckpoint."""
        return self.shelf.locate(content_root, length) or self.private.locate(content_root, length)

    async def holders(self, listings: Sequence[Listing]) -> list[Holder]:
        """Clients for some who advertise a model and can be reached; raises NotEnoughPeers for none."""
        found: list[Holder] = []

        async def ask(peer: PeerId) -> None:
            found.append(await self.links.to(peer))

        failed = await canvass(
            list(dict.fromkeys(listing.peer for listing in listings)),
            ask,
            some=lambda: bool(found),
            enough=lambda: len(found) >= ENOUGH,
            pace=self.pace,
        )
        if not found:
            told = "; ".join(f"{peer.short}: {error.why}" for peer, error in list(failed.items())[:8])
            raise NotEnoughPeers(f"no holder can be reached ({told or 'in time'})", hint="weft peers")
        return found
