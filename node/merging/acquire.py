"""Acquisition: bringing models here under agreements, step by step in one job's journal.

Nothing is fetched before every model is granted by somebody, and no weights before everything small is here:
an error in between costs what can be had again, never the model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_core.digest import Digest, ModelId
from node.catalog.book import Listing
from node.catalog.expert import Expert
from node.catalog.shelf import Shelf
from node.domain.advert import AdvertisedModel
from node.domain.holding import ModelRef
from node.domain.ids import PeerId
from node.domain.job import JobState
from node.domain.negotiation import Purpose
from node.errors import NotEnoughPeers, Refused, Unreachable, WeftError
from node.exchange.fetch import Fetched, fetch
from node.exchange.holder import Holder, Progress
from node.exchange.lookup import read_fingerprint
from node.identity.envelopes import Envelope
from node.jobs.runner import Attempt
from node.merging.canvass import canvass
from node.merging.overlay import ENOUGH, Overlay


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A model that is to come here, and who advertises it."""

    model_id: ModelId
    listings: tuple[Listing, ...]

    @property
    def name(self) -> str:
        """What the first of them calls it."""
        return self.listings[0].model.name

    def said_by(self, holders: Sequence[Holder]) -> list[AdvertisedModel]:
        """What these say of the model, each once."""
        by_peer = {listing.peer: listing.model for listing in self.listings}
        return list(dict.fromkeys(by_peer[holder.peer] for holder in holders))


class Acquisition:
    """What one attempt at a job does to have its models here."""

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
        """Agree on, fetch and shelve models, but for those that an earlier attempt has brought `into` there.

        Raises Refused, Unreachable, NotEnoughPeers, LimitReached.
        """
        here = {model_id: into.find(model_id, publisher) for model_id in models}
        wanted = [self._wanted(model_id, publisher) for model_id, found in here.items() if found is None]
        if wanted:
            names = ", ".join(item.name for item in wanted)
            self._attempt.enter(JobState.WAITING_FOR_PEERS, f"an agreement on {names}")
            granted = await self._agree(wanted, purpose, plan)
            self._attempt.enter(JobState.FETCHING, names)
            for item in wanted:
                here[item.model_id] = await self._fetch(item, granted[item.model_id], into)
        return [expert for expert in here.values() if expert is not None]

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

        async def ask(peer: PeerId) -> None:
            holder = await self._overlay.links.to(peer)
            for bundle in _bundles(has[peer]):
                left = [m for m in bundle if holder not in granted[m] and len(granted[m]) < ENOUGH]
                try:
                    if left:
                        await self._propose(peer, left, purpose, plan)
                except Refused as refused:
                    said.update(dict.fromkeys(left, refused))
                    continue
                for model in left:
                    granted[model].append(holder)

        failed = await canvass(
            list(has),
            ask,
            some=lambda: all(granted.values()),
            enough=lambda: all(len(holders) >= ENOUGH for holders in granted.values()),
            pace=self._overlay.pace,
        )
        for item in wanted:
            if not granted[item.model_id]:
                raise said.get(item.model_id) or _nobody(item, failed)
        return granted

    async def _propose(
        self, peer: PeerId, models: Sequence[ModelId], purpose: Purpose, plan: Digest | None
    ) -> None:
        """Come to an agreement and journal it; raises Refused, Unreachable or PeerError."""
        concluded = await self._overlay.negotiation.propose(
            peer, purpose=purpose, models=models, plan=plan, fresh=self._attempt.job.attempts > 1
        )
        signed = concluded.envelope.to_json()
        known = self._attempt.reached("agreements") or []
        if signed not in known:
            self._attempt.reach("agreements", [*known, signed])

    async def _fetch(self, wanted: _Wanted, holders: Sequence[Holder], into: Shelf) -> Expert:
        overlay, job = self._overlay, self._attempt.job.id
        async with overlay.fetching.of(wanted.model_id):
            offered, sketch = await _described(wanted, holders)
            held = await asyncio.to_thread(into.find, wanted.model_id, offered.publisher)
            if held is not None:
                return held
            begun = time.monotonic()
            fetched = await fetch(
                wanted.model_id,
                holders,
                overlay.private.incoming(job, wanted.model_id, offered.publisher),
                clock=time.monotonic,
                publisher=offered.publisher,
                have=overlay,
                on_progress=lambda progress: self._tell(offered.name, progress),
            )
            self._tally(fetched, time.monotonic() - begun)
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


def _bundles(models: list[ModelId]) -> list[list[ModelId]]:
    """All at once, then one by one."""
    return [models, *([model] for model in models)] if len(models) > 1 else [models]


def _nobody(wanted: _Wanted, failed: Mapping[PeerId, WeftError]) -> WeftError:
    """Why nobody grants a model."""
    errors = [failed[listing.peer] for listing in wanted.listings if listing.peer in failed]
    return errors[0] if errors else Unreachable(f"nobody answers for {wanted.name}", hint="weft peers")


async def _described(wanted: _Wanted, holders: Sequence[Holder]) -> tuple[AdvertisedModel, bytes]:
    """What a holder says of the model, and the fingerprint that bears it out.

    Raises Refused or NotEnoughPeers where no holder's word is borne out.
    """
    last: WeftError | None = None
    for offered in wanted.said_by(holders):
        ref = ModelRef(model_id=wanted.model_id, publisher=offered.publisher)
        try:
            return offered, await read_fingerprint(holders, ref, offered.fingerprint)
        except (Refused, NotEnoughPeers) as error:
            last = error
    raise last or NotEnoughPeers(f"nobody describes {wanted.name}", hint="weft search")
