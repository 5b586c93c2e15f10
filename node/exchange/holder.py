"""What a fetch asks for: Holders, who may lie, and LocalContent, which is checked all the same."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from merge_core.digest import Digest
from node.domain.holding import ByteRange, Holding, ModelRef
from node.domain.ids import PeerId


class Holder(Protocol):
    """A peer that says it holds a model; streams are unchecked. Raises Refused, PeerError or Unreachable."""

    @property
    def peer(self) -> PeerId:
        """Who it is."""

    @property
    def lanes(self) -> int:
        """How many streams to run at once."""

    async def describe(self, ref: ModelRef) -> Holding:
        """Which files it has of a model, and whose signature."""

    def manifest(self, ref: ModelRef) -> AsyncGenerator[bytes, None]:
        """The canonical manifest."""

    def leaf_table(self, ref: ModelRef) -> AsyncGenerator[bytes, None]:
        """The leaf table."""

    def fingerprint(self, digest: Digest) -> AsyncGenerator[bytes, None]:
        """The signed fingerprint of this digest."""

    def file(self, ref: ModelRef, path: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Bytes [offset, offset + length) of a file."""

    def leaves(self, ref: ModelRef, ranges: Sequence[ByteRange]) -> AsyncGenerator[bytes, None]:
        """Ranges of tensors, one piece for each leaf that they touch."""


class Place(Protocol):
    """Where the first byte of a tensor lies."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def offset(self) -> int:
        """Bytes from its start."""


class LocalContent(Protocol):
    """The tensors on this machine by content; what is read there is verified again."""

    def locate(self, content_root: str, length: int) -> Place | None:
        """Where `length` bytes with this content root (hex) should lie; called from threads.

        Raises OSError or CorruptCheckpoint where it cannot tell.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a fetch is, in bytes: verified of all, and what each peer sent of that."""

    total: int
    done: int
    received: Mapping[PeerId, int]
