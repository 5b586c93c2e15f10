"""Divergence: how differently two models behave, measured or estimated, in one shape.

    measured(a, b, base)         from Observations: whole distributions
    estimated(a, many, base)     from Behaviours: one model against many

The pairs' axes come in front, `...` below, none for a single pair. NaN says that something is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merge_core.simmerge.behaviour import Behaviour, Observation

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FunctionalStatistics:
    """What the predictions of ordered pairs (a, b) say, at P positions of T tasks; logarithms are natural.

    Without a base, and for whatever else is not known, NaN; with nothing to compare P, T and L are 0.
    """

    tasks: tuple[str, ...]
    task: npt.NDArray[np.uint8]
    """[P]: which of `tasks` a position belongs to."""
    kl: Floats
    """[..., P]: KL(p_a ‖ p_b)."""
    reverse_kl: Floats
    """[..., P]: KL(p_b ‖ p_a)."""
    js: Floats
    """[..., P]: Jensen-Shannon divergence, at most ln 2."""
    agreement: Floats
    """[..., P]: 1 where both find the same token most likely, else 0."""
    entropy_a: Floats
    """[..., P]."""
    entropy_b: Floats
    """[..., P]."""
    entropy_base: Floats
    """[..., P]."""
    from_base_a: Floats
    """[..., P]: KL(p_a ‖ p_base)."""
    from_base_b: Floats
    """[..., P]: KL(p_b ‖ p_base)."""
    bits_per_byte_a: Floats
    """[..., T]: of the probes' texts."""
    bits_per_byte_b: Floats
    """[..., T]."""
    bits_per_byte_base: Floats
    """[..., T]."""
    hidden_cosine: Floats
    """[..., L + 1]: of the hidden states of all positions as one vector, by layer, the embeddings first."""
    hidden_task_cosine: Floats
    """[..., L + 1]: of what training changed of them: h_a − h_base with h_b − h_base."""
    hidden_shift_a: Floats
    """[..., L + 1]: ‖h_a − h_base‖ / ‖h_base‖."""
    hidden_shift_b: Floats
    """[..., L + 1]."""
    attention_cosine: Floats
    """[..., L]: of the attention maps of all heads and positions as one vector."""


def measured(a: Observation, b: Observation, base: Observation | None = None) -> FunctionalStatistics:
    """Compare two models at every position; raises Unmergeable where they were not asked the same."""
    raise NotImplementedError


def estimated(
    a: Behaviour | None, many: Sequence[Behaviour | None], base: Behaviour | None = None
) -> FunctionalStatistics:
    """Compare one model with many ([N, …]); NaN where one of the two has no behaviour, or of another key."""
    raise NotImplementedError
