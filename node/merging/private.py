"""PrivateShelves: what each job has fetched for itself, under agreements that are for that job alone.

    parents/<job>/           a shelf of whole models: the parents of a merge, the subject of an audit
    incoming/<job>/<model>/  a fetch under construction, whatever shelf it is for

An agreement for a merge or an audit names its plan and is no licence for anything else. So no other job finds
these models by name; one that needs the same tensors comes to its own agreement first and then copies them
from here instead of fetching them. All of it goes when its job has succeeded or failed for good; what a
failed or cancelled job may still be resumed with is kept for a day.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from merge_core.digest import Digest, ModelId
from node.catalog.hashes import HashCache
from node.catalog.shelf import Content, Shelf
from node.domain.job import JobState
from node.errors import LocalError
from node.jobs.journal import Journal

KEEP_SECONDS = 24 * 3600.0


class PrivateShelves:
    """The folders of all jobs; what a crash left there is found again."""

    def __init__(self, parents: Path, incoming: Path, *, hashes: HashCache | None = None) -> None:
        self._parents = parents
        self._incoming = incoming
        self._hashes = hashes
        self._shelves: dict[str, Shelf] = {}
        for job in _names(parents):
            self.of(job)

    def of(self, job: str) -> Shelf:
        """The shelf of one job; its folder appears with the first model."""
        if job not in self._shelves:
            self._shelves[job] = Shelf(self._parents / job, hashes=self._hashes)
        return self._shelves[job]

    def incoming(self, job: str, model_id: ModelId, publisher: Digest) -> Path:
        """Where a job's fetch of a model builds up."""
        return self._incoming / job / f"{model_id.hex}-{publisher.hex[:16]}"

    def locate(self, content_root: str, length: int) -> Content | None:
        """Where a tensor lies that any job has fetched; raises OSError or CorruptCheckpoint."""
        found = (shelf.locate(content_root, length) for shelf in list(self._shelves.values()))
        return next((content for content in found if content is not None), None)

    def remove(self, job: str) -> None:
        """Remove whatever a job has fetched for itself (blocking)."""
        self._shelves.pop(job, None)
        for folder in (self._parents, self._incoming):
            shutil.rmtree(folder / job, ignore_errors=True)

    def sweep(self, is_over: Callable[[str], bool]) -> None:
        """Remove what belongs to jobs that are over (blocking)."""
        for job in _names(self._parents) | _names(self._incoming) | set(self._shelves):
            if is_over(job):
                self.remove(job)


def is_over(journal: Journal, job_id: str, now: float) -> bool:
    """Whether nobody will take up a job again; so it is with one that is not in the journal."""
    try:
        job = journal.load(job_id)
    except LocalError:
        return True
    return job.state is JobState.SUCCEEDED or (job.state.ended and job.since < now - KEEP_SECONDS)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
