"""Acquisition: bringing models here under agreements, step by step in one job's journal.

Nothing is fetched before every model is granted by somebody, and no weights before everything small is here:
an error in between costs what can be had again, never the model.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_core.checkpoint.published import PUBLISHER_FILE, read_bounded
from merge_core.digest import Digest, ModelId
from node.catalog import licences
from node.catalog.book import Listing
from node.catalog.expert import Expert
from node.catalog.shelf import Shelf
from node.domain.ids import PeerId
from node.domain.job import JobState
from node.domain.negotiation import Agreement, Purpose
from node.errors import FalseFingerprint, KnownFalse, NotEnoughPeers, Refused, Unreachable, WeftError
from node.exchange.fetch import Fetched, fetch
from node.exchange.holder import Holder, Progress
from node.exchange.lookup import read_fingerprint
from node.identity.binding import MAX_BINDING, Binding
from node.identity.envelopes import Envelope
from node.jobs.runner import Attempt
from node.merging.canvass import canvass
from node.merging.overlay import ENOUGH, Overlay
from node.merging.terms import Offered, by_publisher, licence_of
from node.merging.vetting import Vetting
from node.provenance.fingerprint import SignedFingerprint

MAX_SHOWN = 32
"""Fingerprints of one publisher's model that are looked at: a name to advertise under costs nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A model that is to come here, and who advertises it."""

    model_id: ModelId
    listings: tuple[Listing, ...]

    @property
    def name(self) -> str:
        """What the first of them calls it."""
        return self.listings[0].model.name

    def of(self, publisher: Digest) -> tuple[Listing, ...]:
        """Everybody who advertises it as one publisher signed it."""
        return tuple(listing for listing in self.listings if listing.model.publisher == publisher)

    def offered_by(self, holders: Sequence[Holder]) -> tuple[Offered, ...]:
        """The model as these advertise it, in groups by its publisher."""
        peers = {holder.peer for holder in holders}
        return by_publisher([listing for listing in self.listings if listing.peer in peers])


class Acquisition:
    """What one attempt at a job does to have its models here."""

    def __init__(self, overlay: Overlay, attempt: Attempt) -> None:
        self._overlay = overlay
        self._attempt = attempt

    def agreements(self, purpose: Purpose, plan: Digest | None) -> tuple[Envelope, ...]:
        """Every agreement of this job for one plan, as both sides signed it."""
        envelopes = [Envelope.from_json(item) for item in self._attempt.reached("agreements") or []]
        return tuple(
            envelope
            for envelope, agreement in zip(envelopes, map(_agreed, envelopes), strict=True)
            if (agreement.purpose, agreement.plan) == (purpose, plan)
        )

    async def acquire(
        self,
        models: Sequence[ModelId],
        *,
        purpose: Purpose,
        plan: Digest | None,
        into: Shelf,
        publisher: Digest | None = None,
    ) -> list[Expert]:
        """Agree on, fetch and shelve models, but for what earlier attempts have agreed on and brought `into`.

        What lies there for another plan of this job is agreed on again, and not fetched again.
        Raises Refused, Unreachable, NotEnoughPeers, LimitReached.
        """
        here = {model_id: into.find(model_id, publisher) for model_id in models}
        covered = {m for item in self.agreements(purpose, plan) for m in _agreed(item).models}
        wanted = [
            self._wanted(model_id, publisher)
            for model_id, found in here.items()
            if found is None or model_id not in covered
        ]
        if wanted:
            self._attempt.enter(JobState.WAITING_FOR_PEERS, f"an agreement on {_names(wanted)}")
            granted = await self._agree(wanted, purpose, plan)
        missing = [item for item in wanted if here[item.model_id] is None]
        if missing:
            self._attempt.enter(JobState.FETCHING, _names(missing))
        for item in missing:
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
        """Fetch a model as the first publisher signed it whom its holders can show; raises as `acquire`.

        Whose fingerprint was found false before is passed over: anybody can advertise a model as their own.
        """
        last: WeftError | None = None
        async with self._overlay.fetching.of(wanted.model_id):
            for offered in wanted.offered_by(holders):
                try:
                    return await self._fetch_as(offered, wanted, holders, into)
                except (Refused, NotEnoughPeers, KnownFalse) as error:
                    last = error
        raise last or NotEnoughPeers(f"nobody describes {wanted.name}", hint="weft search")

    async def _fetch_as(
        self, offered: Offered, wanted: _Wanted, holders: Sequence[Holder], into: Shelf
    ) -> Expert:
        overlay, job = self._overlay, self._attempt.job.id
        sketch, signed = await shown_fingerprint(offered, wanted.model_id, holders, overlay.vetting)
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
            on_progress=lambda progress: self._tell(wanted.name, progress),
        )
        self._tally(fetched, time.monotonic() - begun)
        try:
            advertised = [listing.model.fingerprint for listing in wanted.listings]
            await overlay.vetting.vet(signed, fetched, advertised)
        except FalseFingerprint:
            await asyncio.to_thread(shutil.rmtree, fetched.directory, ignore_errors=True)
            raise
        all_said = Offered(publisher=offered.publisher, listings=wanted.of(offered.publisher))
        name, licence = await asyncio.to_thread(_terms, all_said, fetched.directory)
        return await asyncio.to_thread(
            into.adopt,
            fetched.directory,
            leaves=fetched.leaves,
            publisher=fetched.publisher,
            fingerprint=sketch,
            name=name,
            licence=licence,
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


def _names(wanted: Sequence[_Wanted]) -> str:
    return ", ".join(item.name for item in wanted)


def _agreed(envelope: Envelope) -> Agreement:
    """What an agreement in our own journal says."""
    return Agreement.parse(envelope.payload)


def _bundles(models: list[ModelId]) -> list[list[ModelId]]:
    """All at once, then one by one."""
    return [models, *([model] for model in models)] if len(models) > 1 else [models]


def _nobody(wanted: _Wanted, failed: Mapping[PeerId, WeftError]) -> WeftError:
    """Why nobody grants a model."""
    errors = [failed[listing.peer] for listing in wanted.listings if listing.peer in failed]
    return errors[0] if errors else Unreachable(f"nobody answers for {wanted.name}", hint="weft peers")


async def shown_fingerprint(
    offered: Offered, model_id: ModelId, holders: Sequence[Holder], vetting: Vetting
) -> tuple[bytes, SignedFingerprint]:
    """A fingerprint that is advertised, can be shown and was not found false: the publisher's, if there is.

    Anybody can advertise a model under its publisher's name with a fingerprint of their own. Raises Refused,
    NotEnoughPeers or KnownFalse.
    """
    last: WeftError | None = None
    strangers: tuple[bytes, SignedFingerprint] | None = None
    for digest in list(dict.fromkeys(listing.model.fingerprint for listing in offered.listings))[:MAX_SHOWN]:
        try:
            sketch = await read_fingerprint(holders, model_id, digest)
            signed = SignedFingerprint.parse(sketch)
            vetting.expect_honest(signed)
        except (Refused, NotEnoughPeers, KnownFalse) as error:
            last = error
            continue
        if signed.author.publisher.key_id == offered.publisher:
            return sketch, signed
        strangers = strangers or (sketch, signed)
    if strangers is None:
        raise last or NotEnoughPeers(f"nobody has the fingerprint of {model_id}", hint="weft search")
    return strangers


def _terms(offered: Offered, directory: Path) -> tuple[str, str]:
    """Name and licence of a fetched model, by whose word counts (blocking)."""
    binding = Binding.parse(read_bounded(directory / PUBLISHER_FILE, MAX_BINDING))
    card = licences.of_card(directory)
    licence = licence_of(offered, publisher_peer=binding.peer_id, card=card)
    return offered.named_by(binding.peer_id), licence
