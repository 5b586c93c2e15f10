"""The network as a source of parents: found in adverts, granted by agreements, fetched from their holders.

What lies on this machine for everybody to use is never asked for. What is fetched belongs to the job that
fetched it (`node.merging.private`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from merge_core.checkpoint.manifest import Manifest
from merge_core.plan import MergePlan
from merge_core.resolve import header_of_manifest
from node.catalog import licences
from node.catalog.book import Query
from node.catalog.expert import Expert
from node.catalog.hashes import HashCache
from node.catalog.shelf import Shelf
from node.domain.negotiation import Purpose
from node.errors import NotEnoughPeers
from node.exchange.lookup import read_config, read_manifest, read_tokenizer
from node.jobs.runner import Attempt
from node.merging import hub
from node.merging.acquire import Acquisition
from node.merging.overlay import Overlay
from node.merging.parents import LocalParents, Obtained, OnDisk, Parent, local_parent, on_disk
from node.merging.references import LocalDirectory, Named, Published, parse_reference
from node.merging.terms import by_publisher, licence_of


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
        private = self._overlay.private.of(attempt.job.id)
        acquisition = Acquisition(self._overlay, attempt)
        for expert in await acquisition.acquire(missing, purpose=purpose, plan=plan.digest, into=private):
            here[expert.model_id] = await asyncio.to_thread(_of_shelf, private, expert)
        return Obtained(parents=here, agreements=acquisition.agreements(purpose, plan.digest))

    async def _one(self, reference: str, attempt: Attempt | None) -> Parent:
        wanted = parse_reference(reference, self._local.folder)
        if isinstance(wanted, LocalDirectory):
            return (await self._local.find([reference], attempt))[0]
        if isinstance(wanted, Named):
            wanted = self._by_name(wanted.name)
        expert = self._overlay.shelf.find(wanted.model_id)
        if expert is not None:
            return await asyncio.to_thread(_held_parent, reference, expert, self._overlay.hashes, attempt)
        with suppress(NotEnoughPeers):
            return (await self._local.find([str(wanted.model_id)], attempt))[0]
        if attempt is not None:
            own = self._overlay.private.of(attempt.job.id).find(wanted.model_id)
            if own is not None:
                found = await asyncio.to_thread(_held_parent, reference, own, self._overlay.hashes, attempt)
                # Here for this job alone: `obtain` finds it again, and nobody else is told of it.
                return replace(found, directory=None, leaves=None)
        return await self._remote(reference, wanted)

    async def _remote(self, reference: str, wanted: Published) -> Parent:
        listings = self._overlay.listings(wanted.model_id, wanted.peer)
        if not listings:
            raise NotEnoughPeers(f"nobody advertises {reference}", hint="weft search; weft peers")
        holders = await self._overlay.holders(listings)
        offered = by_publisher(listings)[0]
        manifest = await read_manifest(holders, wanted.model_id)
        config = await read_config(holders, manifest)
        loop = asyncio.get_running_loop()

        def contents() -> dict[str, bytes]:
            # Plans are compiled in threads, and few of them ask.
            return asyncio.run_coroutine_threadsafe(read_tokenizer(holders, manifest), loop).result()

        return Parent(
            reference=reference,
            header=replace(header_of_manifest(manifest, config), contents=contents),
            manifest=manifest,
            licence=licence_of(offered, publisher_peer=None, card=licences.NO_LICENCE),
            publisher=offered.publisher,
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
            on_hub = None if found else hub.parse(name)
            hint = on_hub.download if on_hub else f"weft search {name}; then use the model id"
            raise NotEnoughPeers(why, hint=hint)
        return Published(found.pop())


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
    return OnDisk(
        directory=expert.directory,
        manifest=Manifest.parse(held.manifest),
        leaves=held.leaves,
        licence=expert.licence,
        publisher=expert.publisher,
    )
