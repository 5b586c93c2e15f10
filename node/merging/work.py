"""The work of jobs that are not merges: fetching an expert to hold it, and auditing a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merge_core.digest import Digest, ModelId
from node.catalog.gossip import Gossip
from node.domain.negotiation import Purpose
from node.jobs.runner import Attempt
from node.merging.audit import Auditing
from node.merging.remote import Acquisition, Overlay


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
        """The result is what `Auditing.audit` says."""
        subject = attempt.request["subject"]
        if not subject.startswith("sha256:"):
            return await self._auditing.audit(attempt, Path(subject))
        expert = self._overlay.held(ModelId(subject))
        if expert is None:
            (expert,) = await Acquisition(self._overlay, attempt).acquire(
                [ModelId(subject)], purpose=Purpose.MIRROR, plan=None, into=self._overlay.private
            )
        return await self._auditing.audit(attempt, expert.directory)
