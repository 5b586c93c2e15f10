"""The Survey: the features of every ordered pair of some models, at every task that one asks about.

survey = Survey.of(fingerprints, base, tasks=("maths", "code"), scores=scores)
survey.values[a, b, t], survey.missing[a, b, t]       # what `predictor` reads
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merge_core.digest import Digest
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.functional.behaviour import Behaviour
from merge_core.simmerge.pairs.behaviours import Compare, Panel, compare, estimated
from merge_core.simmerge.pairs.divergence import nothing
from merge_core.simmerge.pairs.features import NAMES, DevScores, vector
from merge_core.simmerge.pairs.statistics import PairStatistics
from merge_core.simmerge.pairs.structures import StructurePanel

Scores = Sequence[Mapping[str, float]]
"""For each model what it scores on labelled items of tasks, as far as that is known."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survey:
    """`values` float32[N, N, tasks, features] and `missing` bool alike; of a model with itself too."""

    tasks: tuple[str, ...]
    values: npt.NDArray[np.float32]
    missing: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        models: Sequence[Fingerprint],
        base: Fingerprint | None,
        *,
        tasks: Sequence[str],
        scores: Scores = (),
        base_scores: Mapping[str, float] | None = None,
        how: Compare = compare,
    ) -> Survey:
        """Estimate from fingerprints; `scores` has an entry for each model, or is empty."""
        origin = base.structure if base else None
        structures = StructurePanel([model.structure for model in models], base=origin)
        behaviours = [model.behaviour for model in models]
        panels = _panels(behaviours, base.behaviour if base else None, tasks, how)
        known = [*scores] or [{} for _ in models]
        theirs = {task: np.array([score.get(task, np.nan) for score in known]) for task in tasks}
        size = (len(models), len(models), len(tasks), len(NAMES))
        values, missing = np.zeros(size, np.float32), np.ones(size, np.bool_)
        for a, behaviour in enumerate(behaviours):
            structural = structures.pairs([a])
            for t, task in enumerate(tasks):
                panel = panels.get((behaviour.key, task)) if behaviour else None
                functional = estimated(behaviour, panel) if panel else nothing(len(models))
                floor = (base_scores or {}).get(task, np.nan)
                told = vector(
                    PairStatistics(structural=structural, functional=functional),
                    task,
                    scores=DevScores(a=theirs[task][a], b=theirs[task], base=floor),
                )
                values[a, :, t], missing[a, :, t] = told[0][0], told[1][0]
        return cls(tasks=tuple(tasks), values=values, missing=missing)


def _panels(
    behaviours: Sequence[Behaviour | None], base: Behaviour | None, tasks: Sequence[str], how: Compare
) -> dict[tuple[Digest, str], Panel]:
    """For each way in which models were asked, and each task."""
    keys = {behaviour.key for behaviour in behaviours if behaviour is not None}
    whole = {key: Panel.of(behaviours, base, key=key, how=how) for key in keys}
    return {(key, task): panel.at(task) for key, panel in whole.items() for task in tasks}
