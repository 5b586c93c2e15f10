"""The network as a source of parents: found in adverts, granted by agreements, fetched from their holders.

What lies on this machine is never asked for. What is fetched for a merge or an audit goes to a private shelf:
an agreement for that purpose is no licence to pass the weights on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from merge_core.checkpoint.manifest import Manifest
from merge_core.digest import Digest, ModelId
from merge_core.plan import MergePlan, header_of_manifest
from node.catalog.book import AdvertBook, Listing, Query
from node.catalog.expert import Expert
from node.catalog.hashes import HashCache
from node.catalog.shelf import Shelf
from node.domain.advert import AdvertisedModel
from node.domain.holding import ModelRef
from node.domain.ids import PeerId
from node.domain.job import JobState
from node.domain.negotiation import Purpose
from node.errors import NotEnoughPeers, PeerError, Refused, Unreachable, WeftError
from node.exchange.fetch import Fetched, fetch
from node.exchange.holder import Holder, LocalContent, Progress
from node.exchange.lookup import read_config, read_fingerprint, read_manifest
from node.identity.envelopes import Envelope
from node.jobs.runner import Attempt
from node.merging.parents import LocalParents, Obtained, OnDisk, Parent, local_parent, on_disk
from node.merging.references import LocalDirectory, Named, Published, parse_reference
from node.negotiation.service import Negotiation
from node.peer.links import Links


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """What finding and fetching experts takes: adverts, negotiation, links, and where experts lie.

    `shelf` is what this node shares; `private` what it fetched for its own merges and audits.
    """

    me: PeerId
    book: AdvertBook
    negotiation: Negotiation
    links: Links
    shelf: Shelf
    private: Shelf
    hashes: HashCache
    incoming: Path
    have: LocalContent
    clock: Callable[[], float]

    def listings(self, model_id: ModelId, peer: PeerId | None = None) -> tuple[Listing, ...]:
        """Who else advertises a model."""
        found = self.book.search(Query(model_id=model_id, peer=peer), self.clock())
        return tuple(listing for listing in found if listing.peer != self.me)

    def held(self, model_id: ModelId) -> Expert | None:
        """The expert where this node has it."""
        return self.shelf.find(model_id) or self.private.find(model_id)

    async def holders(self, listings: Sequence[Listing]) -> list[Holder]:
        """Clients for those who advertise a model and can be reached; raises NotEnoughPeers for none."""
        found: list[Holder] = []
        told: list[str] = []
        for peer in dict.fromkeys(listing.peer for listing in listings):
            try:
                found.append(await self.links.to(peer))
            except (Unreachable, Refused, PeerError) as error:
                told.append(f"{peer.short}: {error.why}")
        if not found:
            raise NotEnoughPeers(f"no holder can be reached ({'; '.join(told)})", hint="weft peers")
        return found


class NetworkParents:
    """Parents from this machine where they are here, else from peers."""

    def __init__(self, overlay: Overlay, local: LocalParents) -> None:
        self._overlay = overlay
        self._local = local

    async def find(self, references: Sequence[str], attempt: Attempt | None) -> tuple[Parent, ...]:
        """Resolve each reference; raises NotEnoughPeers where nobody has what it names."""
        return tuple([await self._one(reference, attempt) for reference in references])

    async def obtain(
        self, parents: Sequence[Parent], plan: MergePlan, purpose: Purpose, attempt: Attempt
    ) -> Obtained:
        """Agree with the holders of what is missing, then fetch it."""
        here = {parent.model_id: on_disk(parent) for parent in parents if parent.directory is not None}
        missing = [parent.model_id for parent in parents if parent.directory is None]
        acquisition = Acquisition(self._overlay, attempt)
        acquired = await acquisition.acquire(
            missing, purpose=purpose, plan=plan.digest, into=self._overlay.private
        )
        for expert in acquired:
            here[expert.model_id] = await asyncio.to_thread(_of_shelf, self._overlay.private, expert)
        return Obtained(parents=here, agreements=acquisition.agreements())

    async def _one(self, reference: str, attempt: Attempt | None) -> Parent:
        wanted = parse_reference(reference, Path.cwd())
        if isinstance(wanted, LocalDirectory):
            return (await self._local.find([reference], attempt))[0]
        if isinstance(wanted, Named):
            wanted = self._by_name(wanted.name)
        expert = self._overlay.held(wanted.model_id)
        if expert is not None:
            return await asyncio.to_thread(_held_parent, reference, expert, self._overlay.hashes, attempt)
        with suppress(NotEnoughPeers):
            return (await self._local.find([str(wanted.model_id)], attempt))[0]
        return await self._remote(reference, wanted)

    async def _remote(self, reference: str, wanted: Published) -> Parent:
        listings = self._overlay.listings(wanted.model_id, wanted.peer)
        if not listings:
            raise NotEnoughPeers(f"nobody advertises {reference}", hint="weft search; weft peers")
        holders = await self._overlay.holders(listings)
        manifest = await read_manifest(holders, wanted.model_id)
        config = await read_config(holders, manifest)
        return Parent(
            reference=reference,
            header=header_of_manifest(manifest, config),
            manifest=manifest,
            licence=listings[0].model.licence,
            publisher=listings[0].model.publisher,
            holders=tuple(holder.peer for holder in holders),
        )

    def _by_name(self, name: str) -> Published:
        """The one model of this name, here or advertised; raises NotEnoughPeers."""
        overlay = self._overlay
        found = {expert.model_id for expert in overlay.shelf.experts() if expert.name == name}
        advertised = overlay.book.search(Query(text=name), overlay.clock())
        found |= {listing.model.model_id for listing in advertised if listing.model.name == name}
        if len(found) != 1:
            why = f"{len(found)} models are called {name!r}" if found else f"no model is called {name!r}"
            raise NotEnoughPeers(why, hint=f"weft search {name}; then use the model id")
        return Published(found.pop())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A model that is to come here, and who advertises it, the first of them as who describes it."""

    model_id: ModelId
    listings: tuple[Listing, ...]

    @property
    def offered(self) -> AdvertisedModel:
        """What the first holder says of it."""
        return self.listings[0].model


class Acquisition:
    """Bringing models here under agreements, step by step in one job's journal."""

    def __init__(self, overlay: Overlay, attempt: Attempt) -> None:
        self._overlay = overlay
        self._attempt = attempt

    def agreements(self) -> tuple[Envelope, ...]:
        """Every agreement of this job, as both sides signed it."""
        return tuple(Envelope.from_json(item) for item in self._attempt.reached("agreements") or [])

    async def acquire(
        self,
        models: Sequence[ModelId],
        *,
        purpose: Purpose,
        plan: Digest | None,
        into: Shelf,
        publisher: Digest | None = None,
    ) -> list[Expert]:
        """Agree on, fetch and shelve models. Raises Refused, Unreachable, NotEnoughPeers, LimitReached.

        Nothing is fetched before every model is granted by somebody.
        """
        wanted = [self._wanted(model_id, publisher) for model_id in models]
        names = ", ".join(item.offered.name for item in wanted)
        if wanted:
            self._attempt.enter(JobState.WAITING_FOR_PEERS, f"an agreement on {names}")
        granted = await self._agree(wanted, purpose, plan)
        if wanted:
            self._attempt.enter(JobState.FETCHING, names)
        return [await self._fetch(item, granted[item.model_id], into) for item in wanted]

    def _wanted(self, model_id: ModelId, publisher: Digest | None) -> _Wanted:
        found = self._overlay.listings(model_id)
        listings = tuple(item for item in found if publisher in (None, item.model.publisher))
        if not listings:
            signed = f" as signed by {publisher}" if publisher else ""
            raise NotEnoughPeers(f"nobody advertises {model_id}{signed}", hint="weft search; weft peers")
        return _Wanted(model_id=model_id, listings=listings)

    async def _agree(
        self, wanted: Sequence[_Wanted], purpose: Purpose, plan: Digest | None
    ) -> dict[ModelId, list[Holder]]:
        """Who grants what: one offer to each holder for all that it has, else one for each model."""
        granted: dict[ModelId, list[Holder]] = {item.model_id: [] for item in wanted}
        said: dict[ModelId, WeftError] = {}
        has: dict[PeerId, list[ModelId]] = {}
        for item in wanted:
            for peer in dict.fromkeys(listing.peer for listing in item.listings):
                has.setdefault(peer, []).append(item.model_id)
        for peer, models in has.items():
            for bundle in (models, *([model] for model in models)):
                open_ones = [model for model in bundle if peer not in {h.peer for h in granted[model]}]
                if not open_ones:
                    continue
                try:
                    holder = await self._propose(peer, open_ones, purpose, plan)
                except (Refused, Unreachable, PeerError) as error:
                    said |= dict.fromkeys(open_ones, error)
                    continue
                for model in open_ones:
                    granted[model].append(holder)
        for model, holders in granted.items():
            if not holders:
                raise said[model]
        return granted

    async def _propose(
        self, peer: PeerId, models: Sequence[ModelId], purpose: Purpose, plan: Digest | None
    ) -> Holder:
        """Come to an agreement and journal it; raises Refused, Unreachable or PeerError."""
        holder = await self._overlay.links.to(peer)
        concluded = await self._overlay.negotiation.propose(
            peer, purpose=purpose, models=models, plan=plan, fresh=self._attempt.job.attempts > 1
        )
        signed = concluded.envelope.to_json()
        known = self._attempt.reached("agreements") or []
        if signed not in known:
            self._attempt.reach("agreements", [*known, signed])
        return holder

    async def _fetch(self, wanted: _Wanted, holders: Sequence[Holder], into: Shelf) -> Expert:
        overlay, offered = self._overlay, wanted.offered
        begun = time.monotonic()
        fetched = await fetch(
            wanted.model_id,
            holders,
            overlay.incoming / wanted.model_id.hex,
            clock=time.monotonic,
            publisher=offered.publisher,
            have=overlay.have,
            on_progress=lambda progress: self._tell(offered.name, progress),
        )
        self._tally(fetched, time.monotonic() - begun)
        ref = ModelRef(model_id=wanted.model_id, publisher=fetched.publisher)
        sketch = await read_fingerprint(holders, ref, offered.fingerprint)
        return await asyncio.to_thread(
            into.adopt,
            fetched.directory,
            leaves=fetched.leaves,
            publisher=fetched.publisher,
            fingerprint=sketch,
            name=offered.name,
            licence=offered.licence,
            base=offered.base,
            now=overlay.clock(),
            source=f"peer://{holders[0].peer}/{wanted.model_id}",
        )

    def _tell(self, name: str, progress: Progress) -> None:
        self._attempt.progress(f"fetching {name}", progress.done, progress.total)

    def _tally(self, fetched: Fetched, seconds: float) -> None:
        """Add what each peer sent to the job's account: peer -> [bytes, seconds]."""
        known: Mapping[str, Sequence[float]] = self._attempt.reached("received") or {}
        account = {peer: list(pair) for peer, pair in known.items()}
        for peer, count in fetched.received.items():
            before = account.get(peer, [0, 0.0])
            account[peer] = [before[0] + count, before[1] + seconds]
        self._attempt.reach("received", account)


def _held_parent(reference: str, expert: Expert, hashes: HashCache, attempt: Attempt | None) -> Parent:
    """A parent that lies on a shelf, with the terms that are known of it (blocking)."""
    found = local_parent(reference, expert.directory, hashes, attempt)
    return Parent(
        reference=reference,
        header=found.header,
        manifest=found.manifest,
        licence=expert.licence,
        publisher=expert.publisher,
        directory=expert.directory,
        leaves=found.leaves,
    )


def _of_shelf(shelf: Shelf, expert: Expert) -> OnDisk:
    """A shelved expert as an input of a worker (blocking)."""
    held = shelf.open(expert.model_id, expert.publisher)
    return OnDisk(directory=expert.directory, manifest=Manifest.parse(held.manifest), leaves=held.leaves)
