"""A predictor that has heard what merges turned out to be worth: its word, and what outcomes add to it.

Whoever says so may have made it up, under as many names as they like: so all outcomes together move no
prediction by more than MOST.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from merge_core.simmerge.choosing.bandit import Bandit
from merge_core.simmerge.choosing.predictor import UNIT, Prediction, Predictor

MOST = 0.1
"""What outcomes correct a prediction by at most, in shares of right answers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Informed(Predictor):
    """Every member is corrected by what the bandit learned that the predictor was wrong by."""

    bandit: Bandit

    @classmethod
    def by(cls, predictor: Predictor, bandit: Bandit) -> Self:
        """`bandit` was taught with this very predictor."""
        return cls(
            names=predictor.names,
            operators=predictor.operators,
            centre=predictor.centre,
            spread=predictor.spread,
            flags=predictor.flags,
            layers=predictor.layers,
            provenance=predictor.provenance,
            bandit=bandit,
        )

    def predict(self, values: npt.NDArray[Any], missing: npt.NDArray[np.bool_]) -> Prediction:
        """Predict for features [..., len(names)]; what is missing may hold any number."""
        told = super().predict(values, missing)
        judged = self.bandit.judge(values, missing, self.operators).utility
        wrong = judged - self.settle(values, missing).utility / UNIT
        return Prediction(members=told.members + np.clip(wrong, -MOST, MOST))
