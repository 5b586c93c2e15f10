"""Partners by a first ranking: the experts nearest to one, among thousands of minis, without all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_core.simmerge.mini import Mini


@dataclass(frozen=True, slots=True, kw_only=True)
class Partner:
    """One that was found; cosines in [-1, 1], NaN where the two cannot be compared in that."""

    mini: Mini
    weights: float
    """Cosine of the task vectors where the base's mini is known, else of the weights."""
    behaviour: float
    """Cosine of the projected behaviours."""


class Index:
    """Minis, laid out so that one is compared with all in a few products of matrices."""

    @classmethod
    def build(cls, minis: Sequence[Mini]) -> Index:
        """Take minis in; of several of one model the first counts."""
        raise NotImplementedError

    def nearest(self, mini: Mini, n: int, *, base: Mini | None = None) -> tuple[Partner, ...]:
        """The `n` that are most alike, best first; not the model itself. Ties go to the lesser ModelId."""
        raise NotImplementedError
