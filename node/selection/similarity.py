"""How alike models are, pair by pair, estimated from fingerprints: what `weft sim` prints.

Rows and columns are in the order of the models; row i, column j is of the ordered pair (i, j). What is not
known, of models of two shapes, without a base or without a behaviour, is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.simmerge.pairs.behaviours import Panel, estimated
from merge_core.simmerge.pairs.divergence import PAIR, FunctionalStatistics, nothing
from merge_core.simmerge.pairs.statistics import OVERALL, PairStatistics, StructuralStatistics
from merge_core.simmerge.pairs.structures import StructurePanel
from node.selection.candidate import Candidate

Cells = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One figure of pairs: `name` in data, `words` for a person."""

    name: str
    words: str
    read: Callable[[PairStatistics], npt.NDArray[Any]]


def _weights(name: str) -> Callable[[PairStatistics], npt.NDArray[Any]]:
    def read(found: PairStatistics) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = getattr(found.structural, name)[..., OVERALL]
        return values

    return read


def _predictions(name: str) -> Callable[[PairStatistics], npt.NDArray[Any]]:
    def read(found: PairStatistics) -> npt.NDArray[Any]:
        pair = found.functional.pair[..., PAIR.index(name), :]
        return pair.mean(-1) if pair.shape[-1] else np.full(pair.shape[:-1], np.nan)

    return read


def _hidden(found: PairStatistics) -> npt.NDArray[Any]:
    cosine = found.functional.layers.hidden_cosine
    return cosine.mean(-1) if cosine.shape[-1] else np.full(cosine.shape[:-1], np.nan)


MEASURES = (
    Measure(name="weight_cosine", words="cosine of weights", read=_weights("weight_cosine")),
    Measure(name="task_cosine", words="cosine of task vectors", read=_weights("task_cosine")),
    Measure(name="sign_agreement", words="task vectors of one sign", read=_weights("sign_agreement")),
    Measure(name="overlap", words="overlap of the largest fifth", read=_weights("overlap")),
    Measure(name="kl", words="KL(row ‖ column), nats", read=_predictions("kl")),
    Measure(name="js", words="Jensen-Shannon divergence", read=_predictions("js")),
    Measure(name="agreement", words="same most likely token", read=_predictions("agreement")),
    Measure(name="hidden_cosine", words="cosine of hidden states", read=_hidden),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """The measures of all ordered pairs, by name; `missing` says what could not be compared, and why."""

    cells: dict[str, Cells]
    missing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"measures": {name: [list(row) for row in cells] for name, cells in self.cells.items()}}


def compare(candidates: Sequence[Candidate], base: Candidate | None) -> Similarity:
    """Estimate every measure of every pair."""
    structures = [candidate.fingerprint.structure for candidate in candidates]
    weights = StructurePanel(structures, base=base.fingerprint.structure if base else None)
    rows = weights.pairs(range(len(candidates)))
    found = [
        PairStatistics(structural=_row(rows, number), functional=_behaviour(candidates, number, base))
        for number in range(len(candidates))
    ]
    return Similarity(
        cells={
            measure.name: tuple(_cells(measure.read(row), len(candidates)) for row in found)
            for measure in MEASURES
        },
        missing=(*([_NO_BASE] if base is None else []), *unheard(candidates)),
    )


def _row(rows: StructuralStatistics, number: int) -> StructuralStatistics:
    """The pairs of one model with each."""
    return StructuralStatistics(**{field.name: getattr(rows, field.name)[number] for field in fields(rows)})


def _behaviour(candidates: Sequence[Candidate], number: int, base: Candidate | None) -> FunctionalStatistics:
    mine = candidates[number].fingerprint.behaviour
    if mine is None:
        return nothing(len(candidates))
    others = [candidate.fingerprint.behaviour for candidate in candidates]
    return estimated(mine, Panel.of(others, base.fingerprint.behaviour if base else None, key=mine.key))


def _cells(values: npt.NDArray[Any], count: int) -> tuple[float | None, ...]:
    """Numbers as data, None for what is not one."""
    told = np.broadcast_to(values, (count,)).astype(np.float64).tolist()
    return tuple(value if math.isfinite(value) else None for value in told)


_NO_BASE = "no base is known: there are no task vectors to compare (--base MODEL names one)"


def unheard(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Why the words of some are not compared, for people."""
    told = []
    silent = [c.name for c in candidates if c.fingerprint.behaviour is None]
    if silent:
        told.append(f"nothing is known of what these say: {', '.join(silent)}")
    keys = {c.fingerprint.behaviour.key for c in candidates if c.fingerprint.behaviour is not None}
    if len(keys) > 1:
        told.append(
            "they were asked different probes, or have different tokens: their words are not compared"
        )
    return tuple(told)
