"""What a peer says it holds of one model, and the parts of it that another peer asks for."""

from __future__ import annotations

from dataclasses import dataclass

from merge_core.checkpoint.published import MAX_FILES, name_problem
from merge_core.digest import Digest, ModelId

MAX_FILE_SIZE = 1 << 46


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """A model as one publisher signed it; None stands for any publisher."""

    model_id: ModelId
    publisher: Digest | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """Bytes [offset, offset + length) of one tensor."""

    tensor: str
    offset: int
    length: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length < 0:
            raise ValueError(f"a range that starts at {self.offset} and has {self.length} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFile:
    """One file of a flat published directory; its name can be written to disk as it is."""

    path: str
    size: int

    def __post_init__(self) -> None:
        if name_problem(self.path) or not 0 <= self.size <= MAX_FILE_SIZE:
            raise ValueError(f"a file {self.path[:80]!r} of {self.size} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """The files that a peer says it has, sorted by name; a claim until each is checked."""

    publisher: Digest
    files: tuple[HeldFile, ...]

    def __post_init__(self) -> None:
        folded = [file.path.casefold() for file in self.files]
        if len(folded) > MAX_FILES or len(set(folded)) != len(folded):
            raise ValueError("too many files, or two with one name")

    def size_of(self, path: str) -> int | None:
        """The claimed size of a file in bytes; None when it is not listed."""
        return next((file.size for file in self.files if file.path == path), None)
