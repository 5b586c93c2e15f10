"""Expert: what this node knows of a published model that it holds, and how that is written down.

`record.json` lies beside the model directory, is this node's own note and is never sent; what others may
rely on is signed and lies inside. `Expert.from_json(e.to_json(), e.folder) == e`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_core.checkpoint.header import Span, read_header
from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.published import MANIFEST_FILE, survey
from merge_core.digest import Digest, ModelId, check_version
from node.domain.advert import AdvertisedModel
from node.domain.negotiation import Purpose

MODEL, LEAVES, RECORD = "model", "leaves.bin", "record.json"
FINGERPRINT, SKETCH = "fingerprint.bin", "sketch.bin"
_VERSION = 2
MAX_NAME = 96


class Origin(StrEnum):
    """How an expert came here."""

    ADDED = "added"
    FETCHED = "fetched"
    MERGED = "merged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What tells without reading whether a weight file was written to since; time in nanoseconds."""

    name: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Look at a file."""
        status = path.stat()
        return cls(name=path.name, size=status.st_size, mtime_ns=status.st_mtime_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One model as one publisher signed it, in `folder` of the shelf; `size` in bytes of all tensors."""

    folder: Path
    model_id: ModelId
    publisher: Digest
    name: str
    licence: str
    architecture: str
    base: ModelId | None
    size: int
    fingerprint: Digest
    sketch: Digest
    origin: Origin
    source: str
    added_at: float
    stamps: tuple[Stamp, ...]

    @property
    def directory(self) -> Path:
        """The model directory: an ordinary checkpoint with its signature."""
        return self.folder / MODEL

    @property
    def changed(self) -> bool:
        """Whether a weight file is gone or was written to: then it is no longer what was signed."""
        try:
            return any(Stamp.of(self.directory / stamp.name) != stamp for stamp in self.stamps)
        except OSError:
            return True

    def advertised(self, purposes: Sequence[Purpose]) -> AdvertisedModel:
        """The expert as an advert names it."""
        return AdvertisedModel(
            model_id=self.model_id,
            name=self.name,
            licence=self.licence,
            architecture=self.architecture,
            base=self.base,
            size=self.size,
            fingerprint=self.fingerprint,
            sketch=self.sketch,
            publisher=self.publisher,
            purposes=tuple(sorted(set(purposes))),
        )

    def to_json(self) -> dict[str, Any]:
        """The content of record.json."""
        return {
            "version": _VERSION,
            "model_id": self.model_id,
            "publisher": self.publisher,
            "name": self.name,
            "licence": self.licence,
            "architecture": self.architecture,
            "base": self.base,
            "size": self.size,
            "fingerprint": self.fingerprint,
            "sketch": self.sketch,
            "origin": self.origin.value,
            "source": self.source,
            "added_at": self.added_at,
            "stamps": [[stamp.name, stamp.size, stamp.mtime_ns] for stamp in self.stamps],
        }

    @classmethod
    def from_json(cls, value: Any, folder: Path) -> Expert:
        """Read record.json; raises ValueError, TypeError or KeyError when it is damaged."""
        check_version(value["version"], _VERSION, "record")
        return cls(
            folder=folder,
            model_id=ModelId(value["model_id"]),
            publisher=Digest(value["publisher"]),
            name=value["name"],
            licence=value["licence"],
            architecture=value["architecture"],
            base=None if value["base"] is None else ModelId(value["base"]),
            size=value["size"],
            fingerprint=Digest(value["fingerprint"]),
            sketch=Digest(value["sketch"]),
            origin=Origin(value["origin"]),
            source=value["source"],
            added_at=value["added_at"],
            stamps=tuple(Stamp(name=n, size=s, mtime_ns=m) for n, s, m in value["stamps"]),
        )


class Held:
    """An expert opened for serving: what `node.peer.ports.HeldModel` asks for, read once and kept."""

    def __init__(self, expert: Expert) -> None:
        self.expert = expert
        self.model_id = expert.model_id
        self.publisher = expert.publisher
        self.directory = expert.directory

    @cached_property
    def manifest(self) -> bytes:
        """The canonical manifest."""
        return (self.directory / MANIFEST_FILE).read_bytes()

    @cached_property
    def leaf_table(self) -> bytes:
        """The leaf digests, as LeafTable.to_bytes writes them."""
        return (self.expert.folder / LEAVES).read_bytes()

    @cached_property
    def files(self) -> dict[str, int]:
        """Size in bytes of every file of the directory: weights, small files and records."""
        return dict(survey(self.directory).sizes)

    @cached_property
    def tensors(self) -> dict[str, tuple[str, Span]]:
        """The weight file and the span of every tensor."""
        return {
            tensor: (name, span)
            for name in survey(self.directory).weights
            for tensor, span in read_header(self.directory / name).tensors.items()
        }

    @cached_property
    def leaves(self) -> LeafTable:
        """The leaf table, proven against the manifest; raises CorruptCheckpoint."""
        return LeafTable.parse(Manifest.parse(self.manifest), self.leaf_table)


def display_name(wanted: str) -> str:
    """A name as adverts may carry it: printable, normalised, at most 96 characters, never empty."""
    name = unicodedata.normalize("NFC", " ".join(wanted.split()))
    name = "".join(c for c in name if unicodedata.category(c)[0] != "C")[:MAX_NAME].strip()
    return name or "unnamed"
