"""The work of jobs that are not merges, and what becomes of the private folder of any job."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from merge_core.checkpoint.published import PLAN_FILE, read_bounded
from merge_core.digest import Digest, ModelId, sha256
from merge_core.errors import CorruptCheckpoint, InvalidRecipe, Unmergeable
from merge_core.plan import MAX_PLAN
from node.catalog.expert import Expert
from node.catalog.gossip import Gossip
from node.domain.negotiation import Purpose
from node.errors import NotEnoughPeers, VerificationFailed
from node.exchange.lookup import read_plan
from node.jobs.runner import Attempt, Work
from node.merging.acquire import Acquisition
from node.merging.audit import Auditing
from node.merging.overlay import Overlay
from node.merging.private import PrivateShelves

FOR_GOOD = (CorruptCheckpoint, InvalidRecipe, Unmergeable, VerificationFailed)
"""Errors that another attempt at the same job would only meet again."""


class Tidy:
    """Work after which nothing is left of what its job fetched for itself, unless it may be resumed."""

    def __init__(self, work: Work, private: PrivateShelves) -> None:
        self._work = work
        self._private = private

    async def __call__(self, attempt: Attempt) -> dict[str, Any]:
        """The result is the work's."""
        try:
            result = await self._work(attempt)
        except FOR_GOOD:
            await asyncio.to_thread(self._private.remove, attempt.job.id)
            raise
        await asyncio.to_thread(self._private.remove, attempt.job.id)
        return result


class FetchWork:
    """Fetch {model_id, publisher} as its publisher signed it, and become a holder of it."""

    def __init__(self, overlay: Overlay, gossip: Gossip) -> None:
        self._overlay = overlay
        self._gossip = gossip

    async def __call__(self, attempt: Attempt) -> dict[str, Any]:
        """The result is {model_id, directory}."""
        model_id = ModelId(attempt.request["model_id"])
        publisher = Digest(attempt.request["publisher"]) if attempt.request["publisher"] else None
        expert = self._overlay.shelf.find(model_id, publisher)
        if expert is None:
            (expert,) = await Acquisition(self._overlay, attempt).acquire(
                [model_id], purpose=Purpose.MIRROR, plan=None, into=self._overlay.shelf, publisher=publisher
            )
            await self._gossip.announce()
        return {"model_id": expert.model_id, "directory": str(expert.directory)}


class AuditWork:
    """Audit {subject}: a directory on this machine, or a model id, which is fetched first."""

    def __init__(self, overlay: Overlay, auditing: Auditing) -> None:
        self._overlay = overlay
        self._auditing = auditing

    async def __call__(self, attempt: Attempt) -> dict[str, Any]:
        """The result is what `Auditing.audit` says; without a directory where it was fetched for this."""
        subject = attempt.request["subject"]
        if not subject.startswith("sha256:"):
            return await self._auditing.audit(attempt, Path(subject))
        shelved = self._overlay.shelf.find(ModelId(subject))
        if shelved is not None:
            return await self._auditing.audit(attempt, shelved.directory)
        expert = await self._fetch(ModelId(subject), attempt)
        return {**await self._auditing.audit(attempt, expert.directory), "directory": ""}

    async def _fetch(self, subject: ModelId, attempt: Attempt) -> Expert:
        """Bring the subject here, under an agreement to audit the plan that a holder names.

        Raises VerificationFailed when that was not its plan.
        """
        private = self._overlay.private.of(attempt.job.id)
        expert = private.find(subject)
        if expert is None:
            listings = self._overlay.listings(subject)
            if not listings:
                raise NotEnoughPeers(f"nobody advertises {subject}", hint="weft search; weft peers")
            plan = await read_plan(await self._overlay.holders(listings), subject)
            attempt.reach("plan", plan.digest)
            (expert,) = await Acquisition(self._overlay, attempt).acquire(
                [subject], purpose=Purpose.AUDIT, plan=plan.digest, into=private
            )
        own = await asyncio.to_thread(read_bounded, expert.directory / PLAN_FILE, MAX_PLAN)
        if sha256(own) != attempt.reached("plan"):
            raise VerificationFailed(f"a holder of {subject} named another plan than its own")
        return expert
