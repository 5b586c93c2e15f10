"""Whose word counts for a model: licence and name are claims, and a ModelId says nothing about either.

Anybody can advertise anybody's model. So listings are taken by publisher, never first come first served, and
what a model may be used for is, in this order: what the publisher's own peer advertises; what the card says,
which the publisher signed; what every holder says, all of it together. Doubt never widens a licence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_core.digest import Digest
from node.catalog import licences
from node.catalog.book import Listing
from node.domain.ids import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A model as one publisher signed it, and everybody who advertises it so."""

    publisher: Digest
    listings: tuple[Listing, ...]

    def by(self, peer: PeerId) -> Listing | None:
        """What one peer says of it."""
        return next((listing for listing in self.listings if listing.peer == peer), None)

    def named_by(self, peer: PeerId | None) -> str:
        """What it is called: by the publisher's own peer where that is known, else by whoever comes first."""
        own = self.by(peer) if peer else None
        return (own or self.listings[0]).model.name


def by_publisher(listings: Sequence[Listing]) -> tuple[Offered, ...]:
    """Listings of one model in groups, the most advertised first; ties by the publisher's digest."""
    groups: dict[Digest, list[Listing]] = {}
    for listing in listings:
        groups.setdefault(listing.model.publisher, []).append(listing)
    offered = [Offered(publisher=key, listings=tuple(group)) for key, group in groups.items()]
    return tuple(sorted(offered, key=lambda group: (-len({x.peer for x in group.listings}), group.publisher)))


def licence_of(offered: Offered, *, publisher_peer: PeerId | None, card: str) -> str:
    """What the licence of a model is taken to be; `card` is NOASSERTION where it says nothing."""
    own = offered.by(publisher_peer) if publisher_peer else None
    if own is not None and own.model.licence != licences.NO_LICENCE:
        return own.model.licence
    if card != licences.NO_LICENCE:
        return card
    return together([listing.model.licence for listing in offered.listings])


def together(said: Sequence[str]) -> str:
    """The SPDX expression that satisfies every one of several licences; NOASSERTION when one says nothing."""
    names = sorted(set(said))
    if not names or licences.NO_LICENCE in names:
        return licences.NO_LICENCE
    return names[0] if len(names) == 1 else " AND ".join(f"({n})" if " OR " in n else n for n in names)
