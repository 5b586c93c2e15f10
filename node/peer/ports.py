"""What serving asks of the rest of the node: what do I hold, and who may have it.

The peer server knows no store and no policy. It is handed these three ports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from merge_core.digest import Digest, ModelId
from node.domain.ids import PeerId


class Span(Protocol):
    """Where a tensor lies: bytes [begin, end) of its file."""

    @property
    def begin(self) -> int:
        """Offset of the first byte from the start of the file."""

    @property
    def end(self) -> int:
        """Offset after the last byte."""


class HeldModel(Protocol):
    """One expert on this machine as one publisher signed it: a flat directory and its measure."""

    @property
    def model_id(self) -> ModelId:
        """The digest of `manifest`."""

    @property
    def publisher(self) -> str:
        """The key id of the publisher whose signature lies in the directory."""

    @property
    def directory(self) -> Path:
        """Where the files of `files` lie as regular files."""

    @property
    def manifest(self) -> bytes:
        """The canonical manifest."""

    @property
    def leaf_table(self) -> bytes:
        """The leaf table of `manifest` as LeafTable.to_bytes writes it."""

    @property
    def files(self) -> Mapping[str, int]:
        """Size in bytes of every published file by name: weights, small files, records, model.sig."""

    @property
    def tensors(self) -> Mapping[str, tuple[str, Span]]:
        """The file and the span of every tensor by its name."""


class Shelf(Protocol):
    """The experts that this node holds."""

    def open(self, model_id: ModelId, publisher: str | None) -> HeldModel:
        """Find an expert, by any publisher when that is None; called often, so it should be a look-up.

        Raises Refused(UNKNOWN_MODEL).
        """


class Similarity(Protocol):
    """What this node can tell of how alike models are; whatever it has, it tells anybody."""

    def fingerprint(self, digest: Digest) -> bytes | None:
        """The signed fingerprint of this digest."""

    def sketches(self, digests: Sequence[Digest]) -> list[bytes | None]:
        """The mini of each digest, None where it is not here."""


class Entitlements(Protocol):
    """Who may have which bytes: the live agreements."""

    def covers(self, peer: PeerId, model_id: ModelId, nbytes: int) -> None:
        """Count `nbytes` that are about to be sent against what `peer` was granted.

        Raises Refused, usually NOT_ENTITLED, when no live agreement covers them.
        """
