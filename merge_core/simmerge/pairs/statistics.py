"""PairStatistics: all that is known of ordered pairs of models, measured or estimated, in one shape.

The same fields come from two checkpoints and their base (`exact`) and from fingerprints (`estimated`), for
one pair or for many at once: every field has the pairs' axes in front, `...` below, none for a single pair.
NaN says that something is not known: a group that a model lacks or has in another shape, task vectors
without a base, a direction of nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merge_core.simmerge.pairs.divergence import FunctionalStatistics
from merge_core.simmerge.structural.structure import GROUPS

Floats = npt.NDArray[np.float64]

OVERALL = len(GROUPS)
"""The column behind those of GROUPS: all groups that can be compared, taken together."""
COLUMNS = OVERALL + 1
TOP_SHARE = 0.2
"""The share of a group's coordinates that counts as its largest."""


def kept(coordinates: int) -> int:
    """How many of so many coordinates are the largest: a fifth, at least one."""
    return max(1, int(TOP_SHARE * coordinates))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StructuralStatistics:
    """What the weights of ordered pairs (a, b) say; [..., COLUMNS] where nothing else is said.

    W are the weights of a group as one vector, τ = W − W_base its task vector.
    """

    weight_cosine: Floats
    """⟨W_a, W_b⟩ / ‖W_a‖‖W_b‖."""
    weight_distance: Floats
    """‖W_a − W_b‖ / max(‖W_a‖, ‖W_b‖)."""
    weight_norm_ratio: Floats
    """‖W_a‖ / ‖W_b‖."""
    task_cosine: Floats
    """⟨τ_a, τ_b⟩ / ‖τ_a‖‖τ_b‖."""
    task_norm_ratio: Floats
    """‖τ_a‖ / ‖τ_b‖."""
    task_norm_a: Floats
    """‖τ_a‖ / ‖W_base‖."""
    task_norm_b: Floats
    """‖τ_b‖ / ‖W_base‖."""
    sign_agreement: Floats
    """Of the coordinates where neither τ is 0, the share where their signs are equal. Overall, this and
    `overlap` are means over the groups, weighed by their elements."""
    overlap: Floats
    """Of the largest fifth of either τ by magnitude, the share that both have in common, which is where TIES
    sees them collide: coordinates that equal the least of it included, zeros not."""
    layer_norm_ratio: Floats
    """[..., 2]: mean and standard deviation of ln(‖W_a‖ / ‖W_b‖) over layers and roles."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairStatistics:
    """Ordered pairs of models."""

    structural: StructuralStatistics
    functional: FunctionalStatistics
    """NaN, or of no positions, where a model has no behaviour that can be compared; see `divergence`."""
