"""The Index: who may fit an expert best, among thousands of minis, without all pairs.

    index = Index(minis)
    index.partners(mine, 20, base=base)

A first ranking, to be followed by the features of whole fingerprints. What merges gain grows with how little
the task vectors of their experts have in common, as long as both come from one base: so it ranks by cosine
of the weights less the magnitude of the cosine of the task vectors. Where the base is not known the median
of all models with nearly the same weights stands for it, which few that were made up do not move. Experts of
other shapes come after those of the same one, by how alike their predictions are, and those of which nothing
can be compared are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merge_core.simmerge.mini import WIDTH, Mini

Floats = npt.NDArray[np.float64]

_KIN = 0.9
"""Cosine of weights above which two models are taken to come from one base: unrelated ones are near 0."""
_FEWEST = 3
"""Kin that have to be known before their median stands for a base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partner:
    """One that was found; cosines in [-1, 1] as minis tell them, NaN where they cannot."""

    mini: Mini
    weights: float
    task: float
    """Of the task vectors."""
    behaviour: float
    """Of the predictions: about the mean Bhattacharyya coefficient."""


class Index:
    """Minis, laid out so that one is compared with all in a few products of matrices.

    Of several for one model, of which all but one are lies, the one that ranks it best counts: a mini can
    be made up to praise a model, never to hide it.
    """

    def __init__(self, minis: Iterable[Mini]) -> None:
        known = {(mini.model_id, mini.digest): mini for mini in minis}
        self._minis: Sequence[Mini] = [known[key] for key in sorted(known)]
        self._shapes = np.array([mini.shapes for mini in self._minis], dtype=object)
        self._questions = np.array([mini.questions or "" for mini in self._minis], dtype=object)
        self._sketches = _stacked([mini.sketch for mini in self._minis])
        self._behaviours = _stacked([mini.behaviour for mini in self._minis])

    def __len__(self) -> int:
        """How many models there are."""
        return len({mini.model_id for mini in self._minis})

    def partners(self, mini: Mini, n: int, *, base: Mini | None = None) -> tuple[Partner, ...]:
        """The `n` that come first, best first, without the model itself and its base; ties by ModelId."""
        weights, task = self._compared(mini, base)
        behaviour = np.full(len(self._minis), np.nan)
        if mini.questions is not None:
            alike = np.flatnonzero(self._questions == mini.questions)
            behaviour[alike] = _cosines(self._behaviours[alike], mini.behaviour)
        kept = ~(np.isnan(weights) & np.isnan(behaviour))
        own = {mini.model_id, mini.model_id if base is None else base.model_id}
        kept &= np.array([one.model_id not in own for one in self._minis], np.bool_)
        chosen = np.flatnonzero(kept)
        score = weights - np.where(np.isnan(task), 1.0, np.abs(task))
        # All of one shape first: none of their scores is below -2.
        score = np.where(np.isnan(score), behaviour - 4.0, score)
        order: dict[str, int] = {}
        for i in chosen[np.argsort(-score[chosen], kind="stable")].tolist():
            if len(order) == n:
                break
            order.setdefault(self._minis[i].model_id, i)
        return tuple(
            Partner(
                mini=self._minis[i],
                weights=float(weights[i]),
                task=float(task[i]),
                behaviour=float(behaviour[i]),
            )
            for i in order.values()
        )

    def _compared(self, mini: Mini, base: Mini | None) -> tuple[Floats, Floats]:
        """[N] twice: the cosines of weights and of task vectors."""
        weights, task = np.full((2, len(self._minis)), np.nan)
        alike = np.flatnonzero(self._shapes == mini.shapes)
        weights[alike] = _cosines(self._sketches[alike], mini.sketch)
        kin = alike[weights[alike] > _KIN]
        if base is not None and base.shapes == mini.shapes:
            origin = base.sketch
        elif len(kin) >= _FEWEST:
            origin = np.median(self._sketches[kin], axis=0)
        else:
            return weights, task
        task[kin] = _cosines(self._sketches[kin] - origin, mini.sketch - origin)
        return weights, task


def _stacked(rows: Sequence[npt.NDArray[np.floating]]) -> npt.NDArray[np.float64]:
    return np.stack(rows).astype(np.float64) if rows else np.zeros((0, WIDTH))


def _cosines(rows: Floats, vector: npt.NDArray[np.floating]) -> Floats:
    """NaN where one of the two is zero."""
    wide = vector.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = rows @ wide / (np.sqrt((rows * rows).sum(axis=1)) * np.sqrt(wide @ wide))
    return np.clip(np.where(np.isfinite(found), found, np.nan), -1.0, 1.0)
