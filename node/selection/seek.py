"""Seeking experts by reference, and minis of all that is advertised, from whoever can be reached.

What a peer sends is held against the digests of the adverts that name it, and the mini against the
fingerprint: whoever advertises two that do not belong together is not listened to for that model. What only
the weights can tell is found out when they come (`node.merging.vetting`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from merge_core.digest import Digest, ModelId, sha256
from merge_core.errors import CorruptCheckpoint, InvalidRecipe
from merge_core.simmerge.mini import Mini
from node.catalog.book import AdvertBook, Listing, Query
from node.catalog.fingerprints import Fingerprints, OnBytes
from node.domain.ids import PeerId
from node.errors import NotEnoughPeers, PeerError, Refused, Unreachable, WeftError
from node.merging.canvass import Pace, canvass
from node.merging.references import LocalDirectory, Published, parse_reference
from node.merging.terms import by_publisher
from node.provenance.fingerprint import SignedFingerprint
from node.selection.candidate import Candidate

MAX_MINIS = 20_000
"""Experts of the catalogue that are ranked at once: 20 MB of minis."""
MAX_ASKED = 8
"""Peers that are asked for one fingerprint."""
PACE = Pace(turn=10.0, total=60.0)

Reach = Callable[[PeerId], Awaitable[None]]


class Seeker:
    """Finds fingerprints for one node; `distrusted` are digests of those that it has found to be false."""

    def __init__(
        self,
        book: AdvertBook,
        fingerprints: Fingerprints,
        *,
        reach: Reach,
        distrusted: Callable[[], frozenset[Digest]],
        clock: Callable[[], float],
        pace: Pace = PACE,
    ) -> None:
        self._book = book
        self._fingerprints = fingerprints
        self._reach = reach
        self._distrusted = distrusted
        self._clock = clock
        self._pace = pace

    async def find(self, reference: str) -> Candidate:
        """The expert of a name, an id or a peer's id. Raises InvalidRecipe, NotEnoughPeers, PeerError."""
        listings = self._listings(reference)
        moved: list[int] = []
        signed, listing = await self._whole(listings, moved.append)
        return Candidate(
            reference=str(listing.model.model_id),
            name=listing.model.name,
            fingerprint=signed.fingerprint,
            base=listing.model.base,
            author=Digest(signed.author.publisher.key_id),
            moved=sum(moved),
        )

    def known(self) -> dict[Digest, Listing]:
        """Whose fingerprint is which, by its digest without signature and as minis here tell (blocking)."""
        listings = self._book.listings(self._clock())[:MAX_MINIS]
        found = self._here(list({listing.model.sketch for listing in listings}))
        minis = ((_parsed(found.get(x.model.sketch), x.model.model_id), x) for x in listings)
        return {mini.fingerprint: listing for mini, listing in minis if mini is not None}

    async def minis(self, on_bytes: OnBytes = lambda count: None) -> tuple[Mini, ...]:
        """Every mini that somebody advertises a model with; those that nobody gives in time are left out."""
        listings = self._book.listings(self._clock())[:MAX_MINIS]
        wanted: dict[Digest, list[PeerId]] = {}
        for listing in listings:
            wanted.setdefault(listing.model.sketch, []).append(listing.peer)
        found = await asyncio.to_thread(self._here, list(wanted))
        await self._ask_for(
            {digest: peers for digest, peers in wanted.items() if digest not in found}, found, on_bytes
        )
        advertised = dict.fromkeys((listing.model.sketch, listing.model.model_id) for listing in listings)
        parsed = (_parsed(found.get(sketch), model_id) for sketch, model_id in advertised)
        return tuple(mini for mini in parsed if mini is not None)

    def _listings(self, reference: str) -> tuple[Listing, ...]:
        """Everybody who advertises the one model that a reference names."""
        wanted = parse_reference(reference, None)
        if isinstance(wanted, LocalDirectory):
            raise InvalidRecipe(f"{reference[:120]} is a directory, which nobody advertises", hint="weft add")
        if isinstance(wanted, Published):
            query = Query(model_id=wanted.model_id, peer=wanted.peer)
            found = list(self._book.search(query, self._clock()))
        else:
            found = [x for x in self._book.listings(self._clock()) if x.model.name == wanted.name]
        models = {listing.model.model_id for listing in found}
        if len(models) != 1:
            why = f"{len(models)} models are called" if models else "nobody advertises"
            hint = "weft search; then use the model id" if models else "weft search; weft peers"
            raise NotEnoughPeers(f"{why} {reference[:120]}", hint=hint)
        return tuple(found)

    async def _whole(
        self, listings: Sequence[Listing], on_bytes: OnBytes
    ) -> tuple[SignedFingerprint, Listing]:
        """The fingerprint of a model from whoever has it, here first; raises NotEnoughPeers.

        One that the model's own publisher swears to comes before one of anybody else.
        """
        failed: list[str] = []
        stranger: tuple[SignedFingerprint, Listing] | None = None
        for listing in self._in_turn(listings):
            try:
                signed = await self._read(listing, on_bytes)
            except (Refused, Unreachable, PeerError) as error:
                failed.append(f"{listing.peer.short}: {error.why}")
                continue
            if signed.author.publisher.key_id == listing.model.publisher:
                return signed, listing
            stranger = stranger or (signed, listing)
        if stranger is None:
            name, told = listings[0].model.name, "; ".join(failed[:4])
            raise NotEnoughPeers(f"nobody gave us the fingerprint of {name} ({told})", hint="weft peers")
        return stranger

    def _in_turn(self, listings: Sequence[Listing]) -> list[Listing]:
        """Whom to ask: by publisher as terms are taken, of each what is here first, then who is connected."""
        ordered = [
            listing
            for offered in by_publisher(listings)
            for listing in sorted(
                offered.listings,
                key=lambda x: (self._known(x) is None, not self._fingerprints.connected(x.peer)),
            )
        ]
        return ordered[:MAX_ASKED]

    async def _read(self, listing: Listing, on_bytes: OnBytes) -> SignedFingerprint:
        """What one peer advertises; raises PeerError where this node has found it to be false before."""
        data = self._known(listing)
        if data is None:
            try:
                async with asyncio.timeout(self._pace.turn):
                    data = await self._fetch(listing, on_bytes)
            except TimeoutError as error:
                raise Unreachable("it does not answer in time") from error
        signed = await asyncio.to_thread(_agreeing, data, listing)
        if signed.sworn.fingerprint in self._distrusted():
            raise PeerError("this node found that fingerprint to be false")
        return signed

    def _known(self, listing: Listing) -> bytes | None:
        return self._fingerprints.known.fingerprint(listing.model.fingerprint)

    async def _fetch(self, listing: Listing, on_bytes: OnBytes) -> bytes:
        await self._reach(listing.peer)
        return await self._fingerprints.fetch(listing.peer, listing.model.fingerprint, on_bytes=on_bytes)

    def _here(self, digests: Sequence[Digest]) -> dict[Digest, bytes]:
        here = self._fingerprints.known.sketches(digests)
        return {digest: data for digest, data in zip(digests, here, strict=True) if data is not None}

    async def _ask_for(
        self, missing: Mapping[Digest, Sequence[PeerId]], found: dict[Digest, bytes], on_bytes: OnBytes
    ) -> None:
        """Ask each peer for what it advertises and nobody has given yet."""
        by_peer: dict[PeerId, list[Digest]] = {}
        for digest, peers in missing.items():
            for peer in dict.fromkeys(peers):
                by_peer.setdefault(peer, []).append(digest)

        async def ask(peer: PeerId) -> None:
            left = [digest for digest in by_peer[peer] if digest not in found]
            if left:
                await self._reach(peer)
                found.update(await self._fingerprints.fetch_sketches(peer, left, on_bytes=on_bytes))

        await canvass(
            list(by_peer),
            ask,
            some=lambda: False,
            enough=lambda: missing.keys() <= found.keys(),
            pace=self._pace,
        )


def _agreeing(data: bytes, listing: Listing) -> SignedFingerprint:
    """The fingerprint of an advert; raises PeerError where it is another model's, or its mini another one."""
    try:
        signed = SignedFingerprint.parse(data)
    except WeftError as error:
        raise PeerError(error.why) from error
    if signed.fingerprint.model_id != listing.model.model_id:
        raise PeerError("it advertises another model's fingerprint")
    if sha256(Mini.of(signed.fingerprint).to_bytes()) != listing.model.sketch:
        raise PeerError("the mini that it advertises is not that of its fingerprint")
    return signed


def _parsed(data: bytes | None, model_id: ModelId) -> Mini | None:
    """A mini of just this model; None for any other bytes."""
    if data is None:
        return None
    with suppress(CorruptCheckpoint):
        mini = Mini.parse(data)
        return mini if mini.model_id == model_id else None
    return None
