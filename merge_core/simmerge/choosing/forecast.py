"""The Forecast: what chains of some experts would be worth, each step of them worked out once.

    forecast = Forecast(experts, base=base, tasks=("maths", "code"), predictor=default())
    forecast.scored(Chain(experts=("a", "b"), operators=("ties",))).utility

A chain is worth what its steps are predicted to be worth, mean over steps and tasks: what a step spoils no
later one mends, and predictions of late ones are the less sure. What they merge has no fingerprint yet: a
blend of its parents' stands for it (see `blending`), and its scores are missing. On chains of a catalogue for
tuning the mean closed more of the gap than the last step alone: of three experts .54 against .44, of four .52
against .29. Predictions in place of the scores of merges made it worse (of four .07).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merge_core.errors import Unmergeable
from merge_core.simmerge.choosing.blending import blended
from merge_core.simmerge.choosing.chains import Chain
from merge_core.simmerge.choosing.predictor import Prediction, Predictor
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.pairs.behaviours import Compare, compare
from merge_core.simmerge.pairs.features import NAMES
from merge_core.simmerge.pairs.survey import Survey

MAX_EXPERTS = 16

_AVERAGING = frozenset({"linear", "slerp"})
_SUMMING = frozenset({"task_arithmetic"})
_CONSENSUS = (0.63, 0.32)
"""What ties and sce keep of a task vector: this share, and so much more for each unit of the logarithm of how
much longer it is than the other. Fitted to merges of a catalogue for tuning, of which it explains 0.8."""

Floats = npt.NDArray[np.float64]
Features = tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]
Known = Mapping[str, float]
"""What a model scores on labelled items, by task."""

_Begun = tuple[tuple[str, ...], tuple[str, ...]]
"""Experts, and the kinds of operators that merged them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """A chain and what it is predicted to be worth."""

    chain: Chain
    members: Floats
    """[members, tasks]: what each member of the predictor says."""

    @property
    def utility(self) -> float:
        """The mean over tasks and members."""
        return float(self.members.mean())

    @property
    def by_task(self) -> Floats:
        """[tasks]."""
        found: Floats = self.members.mean(axis=0)
        return found

    def width(self, other: Scored | None = None) -> float:
        """How much members disagree, on this chain or on its lead over another."""
        told = self.members.mean(axis=1)
        return float((told if other is None else told - other.members.mean(axis=1)).std())


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """What one feature did: `effect` is how much of the best operator's lead over the next it is good for."""

    feature: str
    value: float
    effect: float


class Forecast:
    """What chains of some experts are predicted to be worth; every step is worked out once."""

    def __init__(
        self,
        experts: Mapping[str, Fingerprint],
        *,
        base: Fingerprint | None,
        tasks: Sequence[str],
        predictor: Predictor,
        scores: Mapping[str, Known] | None = None,
        base_scores: Known | None = None,
        how: Compare = compare,
    ) -> None:
        """Raises Unmergeable on fewer than two experts or more than MAX_EXPERTS, and on no task."""
        if not 2 <= len(experts) <= MAX_EXPERTS or not tasks:
            raise Unmergeable(
                f"{len(experts)} experts and {len(tasks)} tasks; 2 to {MAX_EXPERTS} experts are compared",
                hint="name the experts, and with --tasks what the merge is to be good at",
            )
        unread = sorted({*predictor.names} - {*NAMES})
        if unread:
            raise Unmergeable(
                f"the predictor reads {unread[0]}, which this weft does not know",
                hint="train it again: make predictor",
            )
        self._experts = dict(experts)
        self._base = base
        self._tasks = tuple(tasks)
        self._predictor = predictor
        self._columns = [NAMES.index(name) for name in predictor.names]
        self._scores = {name: dict((scores or {}).get(name, {})) for name in experts}
        self._base_scores = dict(base_scores or {})
        self._how = how
        self._prints: dict[_Begun, Fingerprint] = {}
        self._told: dict[_Begun, tuple[Prediction, Features]] = {}

    def scored(self, chain: Chain) -> Scored:
        """What all steps are predicted to be worth."""
        steps = [
            self._step(Chain(experts=chain.experts[: count + 1], operators=chain.operators[:count]))
            for count in range(1, len(chain.experts))
        ]
        return Scored(chain=chain, members=np.mean(steps, axis=0))

    def _step(self, chain: Chain) -> Floats:
        """[members, tasks]: what the last step is predicted to be worth."""
        prediction, _ = self._last(chain)
        return prediction.members[..., self._predictor.operators.index(chain.operators[-1])]

    def reasons(self, chain: Chain, operators: Sequence[str]) -> tuple[Reason, ...]:
        """What each feature does for the lead of the last operator over the next, the weightiest first."""
        at = self._predictor.operators.index(chain.operators[-1])
        others = [self._predictor.operators.index(o) for o in operators if o != chain.operators[-1]]
        prediction, (values, missing) = self._last(chain)
        if not others:
            return ()
        rival = max(others, key=lambda other: float(prediction.members[..., other].mean()))
        hidden = np.stack(
            [missing, *(missing | _one(missing.shape[-1], i) for i in range(missing.shape[-1]))]
        )
        told = self._predictor.predict(np.broadcast_to(values, hidden.shape), hidden).utility
        leads = (told[..., at] - told[..., rival]).mean(axis=(1, 2))
        known = [i for i in range(missing.shape[-1]) if not missing[..., i].all()]
        found = [
            Reason(
                feature=self._predictor.names[i],
                value=float(values[0][..., i].mean()),
                effect=float(leads[0] - leads[i + 1]),
            )
            for i in known
        ]
        return tuple(sorted(found, key=lambda reason: (-abs(reason.effect), reason.feature)))

    def _last(self, chain: Chain) -> tuple[Prediction, Features]:
        """[members, tasks, operators]: the mean over both orders of what the last step merges."""
        key = (chain.experts, _kinds(chain)[:-1])
        if key not in self._told:
            features = self._features(chain)
            both = self._predictor.predict(*features)
            self._told[key] = Prediction(members=both.members.mean(axis=1)), features
        return self._told[key]

    def _features(self, chain: Chain) -> Features:
        """[2, tasks, features] of what was begun and the last expert, in both orders."""
        *begun, last = chain.experts
        left = self._fingerprint(tuple(begun), _kinds(chain)[:-1])
        survey = Survey.of(
            [left, self._experts[last]],
            self._base,
            tasks=self._tasks,
            scores=[self._scores[begun[0]] if len(begun) == 1 else {}, self._scores[last]],
            base_scores=self._base_scores,
            how=self._how,
        )
        rows = ([0, 1], [1, 0])
        values, missing = survey.values[rows][..., self._columns], survey.missing[rows][..., self._columns]
        if missing.all():
            raise Unmergeable(
                f"nothing that is known of {' and '.join(chain.experts)} can be compared",
                hint="choose experts of one family",
            )
        return values, missing

    def _fingerprint(self, experts: tuple[str, ...], kinds: tuple[str, ...]) -> Fingerprint:
        if len(experts) == 1:
            return self._experts[experts[0]]
        if self._base is None:
            raise Unmergeable("of three experts nothing can be told without their base", hint="name the base")
        made = (experts, kinds)
        if made not in self._prints:
            left = self._fingerprint(experts[:-1], kinds[:-1])
            right = self._experts[experts[-1]]
            weights = _weights(kinds[-1], left, right, self._base, count=len(experts) - 1)
            self._prints[made] = blended((left, right), weights=weights, base=self._base)
        return self._prints[made]


def _kinds(chain: Chain) -> tuple[str, ...]:
    return tuple(map(_kind, chain.operators))


def _kind(operator: str) -> str:
    """Operators of one kind blend alike."""
    return "average" if operator in _AVERAGING else "sum" if operator in _SUMMING else "consensus"


def _weights(
    kind: str, left: Fingerprint, right: Fingerprint, base: Fingerprint, *, count: int
) -> tuple[float, float]:
    """What a merge makes of two task vectors, the first of which stands for `count` experts."""
    if kind == "average":
        return count / (count + 1), 1 / (count + 1)
    if kind == "sum":
        return 1.0, 1.0
    share, slope = _CONSENSUS
    longer = slope * float(np.log(_shift(left, base) / _shift(right, base)))
    return float(np.clip(share + longer, 0.1, 1.0)), float(np.clip(share - longer, 0.1, 1.0))


def _shift(model: Fingerprint, base: Fingerprint) -> float:
    """The length of a task vector, as sketches and samples tell it."""
    origin = {group.key: group for group in base.structure.groups}
    square = 0.0
    for group in model.structure.groups:
        known = origin.get(group.key)
        if known is not None and known.layout == group.layout:
            mine, theirs = (g.sketch if g.sketch.size else g.sample for g in (group, known))
            square += float(np.square(mine.astype(np.float64) - theirs).sum())
    return float(max(square, 1e-24) ** 0.5)


def _one(width: int, column: int) -> npt.NDArray[np.bool_]:
    found = np.zeros(width, np.bool_)
    found[column] = True
    return found
