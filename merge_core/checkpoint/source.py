"""The port through which arithmetic reads weights: TensorSource.

A checkpoint on disk is one; a set of remote holders is another. What comes out is verified.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from merge_core.checkpoint import dtypes


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """The type (safetensors name) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def length(self) -> int:
        """Size in bytes."""
        return dtypes.byte_length(self.dtype, self.shape)


class TensorSource(Protocol):
    """Verified tensor bytes by name and place."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, sorted by name."""
        ...

    def read(
        self, tensor: str, offset: int, length: int, into: memoryview | None = None
    ) -> bytes | memoryview:
        """`length` bytes of a tensor from `offset` on, both in whole elements.

        They lie in the start of `into` where it is given, unless the source has them in memory of its own:
        what is returned counts. Without it a memoryview stays valid until the next read on this source by the
        same thread. Raises KeyError on an unknown tensor, ValueError outside of it, CorruptCheckpoint when
        the bytes do not match their digest.
        """
        ...


class ResidentSource(ABC):
    """What a TensorSource is besides, if all of its tensors lie in memory, to be looked at without a copy."""

    @abstractmethod
    def view(self, tensor: str) -> memoryview:
        """All of a tensor, as long as the source is open; it counts once `expect_unchanged` is called.

        Raises KeyError on an unknown tensor.
        """

    @abstractmethod
    def expect_unchanged(self) -> None:
        """Raise CorruptCheckpoint if any byte may have changed since the source was made."""
