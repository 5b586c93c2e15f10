"""Features: PairStatistics as the vector that a predictor reads.

    values, missing = vector(statistics, "maths")       float32[..., m], bool[..., m]

`NAMES` says what each number is, `GROUP_OF` which of the three kinds it belongs to: `similarity` needs the
models alone, `probe_loss` how well they predict texts without answers, `dev_scores` what their publishers
measured. What is not known is 0 in `values` and True in `missing`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merge_core.simmerge.statistics import PairStatistics

NAMES: tuple[str, ...] = ()
GROUP_OF: tuple[str, ...] = ()
"""`similarity`, `probe_loss` or `dev_scores`, for each of NAMES."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevScores:
    """What a, b and their base score on labelled items of the task, in [0, 1] or as one chooses; NaN: unknown.

    Numbers, or arrays [...] for many pairs.
    """

    a: npt.ArrayLike
    b: npt.ArrayLike
    base: npt.ArrayLike = np.nan


def vector(
    statistics: PairStatistics, task: str | None = None, *, scores: DevScores | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """The features of ordered pairs for one task, or over all of the probe set where `task` is None."""
    raise NotImplementedError
