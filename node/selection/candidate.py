"""Candidate: a model to choose, as far as its fingerprint tells of it, and how a recipe would call it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_core.digest import Digest, ModelId
from merge_core.errors import Unmergeable
from merge_core.simmerge.fingerprint import Fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model to choose among; `base` is what it says it was trained from.

    `author` is the key id of the publisher who swears to the fingerprint; None: this machine computed it.
    """

    reference: str
    """As a recipe calls it, whoever reads that: a model id, or an absolute path."""
    name: str
    """For people."""
    fingerprint: Fingerprint
    base: ModelId | None = None
    author: Digest | None = None
    moved: int = 0
    """Bytes that it took to learn this, both ways."""

    @property
    def model_id(self) -> ModelId:
        """Its name everywhere."""
        return self.fingerprint.model_id


def base_of(candidates: Sequence[Candidate]) -> ModelId | None:
    """What all of them say they were trained from; None where one does not say, or another says otherwise."""
    named = {candidate.base for candidate in candidates}
    return named.pop() if len(named) == 1 else None


def expect_different(candidates: Sequence[Candidate]) -> None:
    """Raise Unmergeable where two of them are one model."""
    seen: dict[ModelId, str] = {}
    for candidate in candidates:
        if candidate.model_id in seen:
            raise Unmergeable(
                f"{seen[candidate.model_id]} and {candidate.name} are the same model",
                hint="name each model once: weft sim A B",
            )
        seen[candidate.model_id] = candidate.name
