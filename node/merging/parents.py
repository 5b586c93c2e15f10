"""Parents: the models of a merge, found before a byte of weights moves, on disk before it starts.

`ParentSource` is the port: directories on this machine are one, the network another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import Checkpoint, FileStamp
from merge_core.digest import Digest, ModelId
from merge_core.plan import MergePlan
from merge_core.resolve import ModelHeader, header_of
from node.catalog import licences
from node.catalog.hashes import HashCache
from node.domain.ids import PeerId
from node.domain.negotiation import Purpose
from node.errors import NotEnoughPeers
from node.identity.envelopes import Envelope
from node.jobs.runner import Attempt
from node.merging import hub
from node.merging.hub import HubModel
from node.merging.references import LocalDirectory, Published, nowhere_here, parse_reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """A model that a recipe refers to, by what is known without its weights.

    `directory` is where it lies on this machine, None when it has to be fetched from `holders`; `hashed` are
    the stamps that its weight files had when the leaves were made of them.
    """

    reference: str
    header: ModelHeader
    manifest: Manifest
    licence: str
    publisher: Digest | None = None
    directory: Path | None = None
    leaves: LeafTable | None = None
    hashed: tuple[FileStamp, ...] = ()
    holders: tuple[PeerId, ...] = ()

    @property
    def model_id(self) -> ModelId:
        """Its name everywhere."""
        return self.manifest.model_id

    @property
    def on_hub(self) -> HubModel | None:
        """The model of the hub, by commit, whose download it is."""
        return hub.origin(self.directory) if self.directory is not None else None

    @property
    def label(self) -> str:
        """What others may know it by: its name on the hub, else its model id; never where it lies here."""
        return self.on_hub.repository if self.on_hub else str(self.model_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDisk:
    """A parent whose bytes are here: a checkpoint, its manifest and the digest of every leaf.

    `licence` and `publisher` are what is known now that its signature is here; None: nothing new. `hashed`
    are the stamps of weight files that the leaves are known to be of.
    """

    directory: Path
    manifest: Manifest
    leaves: LeafTable
    hashed: tuple[FileStamp, ...] = ()
    licence: str | None = None
    publisher: Digest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Obtained:
    """Every parent on disk, and under which agreements they came."""

    parents: Mapping[ModelId, OnDisk]
    agreements: tuple[Envelope, ...] = ()

    def settle(self, parent: Parent) -> Parent:
        """A parent with the terms that are known since it lies here."""
        here = self.parents[parent.model_id]
        if here.licence is None:
            return parent
        return replace(parent, licence=here.licence, publisher=here.publisher)


class ParentSource(Protocol):
    """Where the models of a recipe come from."""

    async def find(self, references: Sequence[str], attempt: Attempt | None) -> tuple[Parent, ...]:
        """Resolve references, in order; raises InvalidRecipe, CorruptCheckpoint or NotEnoughPeers."""
        ...

    async def obtain(
        self, parents: Sequence[Parent], plan: MergePlan, purpose: Purpose, attempt: Attempt
    ) -> Obtained:
        """Bring every parent to this disk; raises Refused, Unreachable, NotEnoughPeers, LimitReached."""
        ...


class Known(Protocol):
    """What this machine remembers of where models lie."""

    def find(self, model_id: ModelId) -> Path | None:
        """A directory that held this model when it was last looked at."""
        ...


class LocalParents:
    """Checkpoints on this machine: hashed once, remembered by what identifies the files unread."""

    def __init__(self, hashes: HashCache, known: Known, folder: Path | None) -> None:
        """Relative references are read from `folder`, if there is one; model ids are looked up in `known`."""
        self._hashes = hashes
        self._known = known
        self.folder = folder

    async def find(self, references: Sequence[str], attempt: Attempt | None) -> tuple[Parent, ...]:
        """Measure each checkpoint; raises NotEnoughPeers where one is not on this machine."""
        return tuple([await self._one(reference, attempt) for reference in references])

    async def obtain(
        self, parents: Sequence[Parent], plan: MergePlan, purpose: Purpose, attempt: Attempt
    ) -> Obtained:
        """Nothing has to move."""
        return Obtained(parents={parent.model_id: on_disk(parent) for parent in parents})

    async def _one(self, reference: str, attempt: Attempt | None) -> Parent:
        found = parse_reference(reference, self.folder)
        path = found.path if isinstance(found, LocalDirectory) else None
        if isinstance(found, Published):
            path = self._known.find(found.model_id)
        if path is None:
            raise nowhere_here(reference)
        parent = await asyncio.to_thread(local_parent, reference, path, self._hashes, attempt)
        if isinstance(found, Published) and parent.model_id != found.model_id:
            raise NotEnoughPeers(f"{path} no longer holds {found.model_id}", hint=f"weft verify {path}")
        return parent


def local_parent(reference: str, directory: Path, hashes: HashCache, attempt: Attempt | None) -> Parent:
    """Measure a checkpoint on this machine (blocking)."""
    with Checkpoint.open(directory) as checkpoint:
        total = sum(info.length for info in checkpoint.tensors.values())
        done = 0

        def on_progress(count: int) -> None:
            nonlocal done
            done += count
            if attempt is not None:
                attempt.progress_from_thread(f"hashing {directory.name}", done, total)

        measured = hashes.measure(checkpoint, on_progress=on_progress)
        return Parent(
            reference=reference,
            header=header_of(checkpoint),
            manifest=measured.manifest,
            licence=licences.of_card(directory),
            directory=directory,
            leaves=measured.leaves,
            hashed=tuple(checkpoint.stamps.values()),
        )


def on_disk(parent: Parent) -> OnDisk:
    """A parent that was found here; a programming error for any other."""
    assert parent.directory is not None and parent.leaves is not None
    return OnDisk(
        directory=parent.directory, manifest=parent.manifest, leaves=parent.leaves, hashed=parent.hashed
    )
