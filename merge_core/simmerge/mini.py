"""The Mini: at most 1 KiB of a fingerprint, to rank thousands of experts before any fingerprint is fetched.

A folded sketch of all of the weights, a projection of the behaviour, and the keys that say whether two of
either can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merge_core.digest import Digest, ModelId
from merge_core.simmerge.fingerprint import Fingerprint

MAX_MINI = 1 << 10
WIDTH = 128
"""Buckets of the folded sketch, and of the projected behaviour."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mini:
    """What ranks: `sketch` float32[WIDTH] of all weights, `behaviour` float32[WIDTH] of length about 1."""

    fingerprint: Digest
    """Of the fingerprint's bytes, without a signature."""
    model_id: ModelId
    shapes: Digest
    """Of the shapes of all groups: sketches of equal shapes can be compared."""
    questions: Digest | None
    """Of probe set and tokenizer: behaviours of equal questions can be compared; None without one."""
    l2: float
    largest: float
    sketch: npt.NDArray[np.float32]
    behaviour: npt.NDArray[np.float32] | None

    @classmethod
    def of(cls, fingerprint: Fingerprint) -> Mini:
        """The one mini of a fingerprint, the same bits everywhere."""
        raise NotImplementedError

    @property
    def digest(self) -> Digest:
        """Of its bytes: what an advert calls `sketch`."""
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """At most MAX_MINI bytes."""
        raise NotImplementedError

    @classmethod
    def parse(cls, data: bytes) -> Mini:
        """Read a mini from anybody; raises CorruptCheckpoint on whatever is not exact."""
        raise NotImplementedError
