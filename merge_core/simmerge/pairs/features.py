"""Features: PairStatistics as the vector that a predictor reads.

    values, missing = vector(statistics, "maths")       float32[..., m], bool[..., m], m = len(NAMES)

One table says what each number is and which of three kinds it belongs to: `similarity` needs the models
alone, `probe_loss` adds how sure they are of texts without answers, `dev_scores` what their publishers
measured. What is not known is 0 in `values` and True in `missing`: never a silent zero.

Divergences enter as ln(KL + 0.001), ratios of norms as logarithms. The pair is ordered: swapping a and b
swaps `…_a` with `…_b`, and `kl` with `reverse_kl`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.checkpoint.layout import Role
from merge_core.simmerge.pairs.divergence import MODEL, PAIR, FunctionalStatistics
from merge_core.simmerge.pairs.statistics import OVERALL, PairStatistics, StructuralStatistics
from merge_core.simmerge.structural.structure import GROUPS

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
Columns = dict[str, Array]

SIMILARITY, PROBE_LOSS, DEV_SCORES = "similarity", "probe_loss", "dev_scores"

_QUANTILES = {"q10": 0.1, "median": 0.5, "q90": 0.9}
_DIVERGENCES = ("kl", "reverse_kl", "js")
_LOGARITHMS = frozenset({"kl", "reverse_kl", "mean_from_a", "mean_from_b", "sum_from_a", "sum_from_b"})
_LEAST_KL = 1e-3
_UNKNOWN: Array = np.asarray(np.nan, np.float32)
_ROLES = (Role.EMBED, Role.ATTN, Role.MLP, Role.NORM)
_THIRDS = ("early", "mid", "late")


@dataclass(frozen=True, slots=True, kw_only=True)
class DevScores:
    """What a, b and their base score on labelled items of the task, the more the better; NaN: unknown.

    Numbers, or arrays [...] for many pairs.
    """

    a: npt.ArrayLike = np.nan
    b: npt.ArrayLike = np.nan
    base: npt.ArrayLike = np.nan


def vector(
    statistics: PairStatistics, task: str | None = None, *, scores: DevScores | None = None
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The features of ordered pairs for one task, or over all of the probe set where `task` is None.

    A task that the probe set does not have leaves missing what would have been read of it.
    """
    structural, functional = statistics.structural, statistics.functional
    columns = {
        **_of_predictions(functional, task),
        **_of_models(functional, task),
        **_of_layers(functional),
        **_of_weights(structural),
        **_of_scores(scores or DevScores()),
    }
    shape = np.shape(structural.weight_cosine)[:-1]
    values = np.empty((*shape, len(NAMES)), np.float32)
    for number, name in enumerate(NAMES):
        values[..., number] = columns[name]
    missing = ~np.isfinite(values)
    values[missing] = 0.0
    return values, missing


def _of_predictions(found: FunctionalStatistics, task: str | None) -> Columns:
    """What is read position by position: means, and how divergences are spread."""
    rows = _rows(found, task)
    if not rows.any():
        return dict.fromkeys(_PREDICTIONS, _UNKNOWN)
    pair = found.pair if rows.all() else np.ascontiguousarray(found.pair[..., rows])
    mean = {name: pair[..., number, :].mean(-1) for number, name in enumerate(PAIR)}
    columns = {name: _log(value) if name in _LOGARITHMS else value for name, value in mean.items()}
    for name in _DIVERGENCES:
        values = np.sort(pair[..., PAIR.index(name), :], axis=-1)
        told = {label: _quantile(values, share) for label, share in _QUANTILES.items()}
        told["std"] = values.std(-1)
        columns |= {
            f"{name}.{label}": _log(one) if name in _LOGARITHMS else one for label, one in told.items()
        }
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.sqrt(columns.pop("shift_square_a") * columns.pop("shift_square_b"))
        columns["shift_cosine"] = columns.pop("shift_product") / size
    return columns


def _of_models(found: FunctionalStatistics, task: str | None) -> Columns:
    """How sure each of the two is, how far it has gone from the base, and what that is like elsewhere."""
    a, b, base = (_means(found, one, task) for one in (found.a, found.b, found.base))
    columns: Columns = {}
    for side, one, by_task in (("a", a, found.a), ("b", b, found.b)):
        columns |= {
            f"to_base_{side}": _log(one["to_base"]),
            f"from_base_{side}": _log(one["from_base"]),
            f"base_agreement_{side}": one["base_agreement"],
            f"entropy_change_{side}": one["entropy"] - base["entropy"],
            f"bits_per_byte_{side}": one["bits_per_byte"],
            f"entropy_{side}": one["entropy"],
            f"confidence_{side}": one["confidence"],
        }
        away = _log(by_task[..., MODEL.index("from_base"), :])
        for label, summary in _DRIFT.items():
            columns[f"drift_{side}.{label}"] = _known(summary, away)
    columns["entropy_difference"] = a["entropy"] - b["entropy"]
    columns["bits_per_byte_base"] = base["bits_per_byte"]
    return columns


def _of_layers(found: FunctionalStatistics) -> Columns:
    """What goes on inside: the embeddings apart, by thirds of the layers."""
    layers = found.layers
    cosine = layers.hidden_cosine[..., 1:]
    columns = {
        "hidden_cosine": _known(np.nanmean, cosine),
        "hidden_cosine.min": _known(np.nanmin, cosine),
        "hidden_task_cosine": _known(np.nanmean, layers.hidden_task_cosine[..., 1:]),
        "hidden_task_cosine.last": _known(np.nanmean, layers.hidden_task_cosine[..., 1:][..., -1:]),
        "hidden_shift_a": _known(np.nanmean, layers.hidden_shift_a[..., 1:]),
        "hidden_shift_b": _known(np.nanmean, layers.hidden_shift_b[..., 1:]),
        "attention_cosine": _known(np.nanmean, layers.attention_cosine),
        "attention_cosine.min": _known(np.nanmin, layers.attention_cosine),
    }
    count = cosine.shape[-1]
    third = np.arange(count) * 3 // max(1, count)
    for number, name in enumerate(_THIRDS):
        columns[f"hidden_cosine.{name}"] = _known(np.nanmean, cosine[..., third == number])
    return columns


def _of_weights(found: StructuralStatistics) -> Columns:
    """Of all weights; of task vectors also by role, and by thirds of the depth."""
    with np.errstate(invalid="ignore", divide="ignore"):
        columns = {name: np.asarray(getattr(found, name))[..., OVERALL] for name in _RATIOS | _COSINES}
        columns |= {name: np.log(columns[name]) for name in _RATIOS}
    columns["layer_norm_ratio"] = found.layer_norm_ratio[..., 0]
    columns["layer_norm_ratio.std"] = found.layer_norm_ratio[..., 1]
    for role in _ROLES:
        of_role = [index for index, key in enumerate(GROUPS) if key.role == role]
        for name in ("task_cosine", "sign_agreement", "overlap"):
            columns[f"{name}.{role}"] = _known(np.nanmean, getattr(found, name)[..., of_role])
    for number, third in enumerate(_THIRDS):
        of_third = [index for index, key in enumerate(GROUPS) if key.third == number]
        columns[f"task_cosine.{third}"] = _known(np.nanmean, found.task_cosine[..., of_third])
    return columns


def _of_scores(scores: DevScores) -> Columns:
    return {
        f"score_{side}": np.asarray(value, np.float64)
        for side, value in (("a", scores.a), ("b", scores.b), ("base", scores.base))
    }


def _rows(found: FunctionalStatistics, task: str | None) -> npt.NDArray[np.bool_]:
    if task is None:
        return np.ones(len(found.task), dtype=bool)
    return np.equal(found.task, found.tasks.index(task) if task in found.tasks else -1)


def _means(found: FunctionalStatistics, model: Floats, task: str | None) -> Columns:
    """What is known of a model at a task, or over all positions, by name."""
    if task is not None:
        if task not in found.tasks:
            return dict.fromkeys(MODEL, _UNKNOWN)
        return dict(zip(MODEL, np.moveaxis(model[..., found.tasks.index(task)], -1, 0), strict=True))
    read = found.counts > 0
    if not read.any():
        return dict.fromkeys(MODEL, _UNKNOWN)
    share = (found.counts[read] / found.counts.sum()).astype(np.float32)
    return dict(zip(MODEL, np.moveaxis(model[..., read] @ share, -1, 0), strict=True))


def _quantile(ordered: Floats, share: float) -> Array:
    """Of sorted values, between the two nearest."""
    at = share * (ordered.shape[-1] - 1)
    low = int(at)
    high = min(low + 1, ordered.shape[-1] - 1)
    return np.asarray(ordered[..., low] + (at - low) * (ordered[..., high] - ordered[..., low]))


def _log(divergence: Array) -> Array:
    return np.asarray(np.log(np.maximum(divergence, 0.0) + _LEAST_KL))


def _known(summary: Callable[..., Array], values: Array) -> Array:
    """A summary of the last axis that leaves out what is not known; NaN where nothing is."""
    if not values.shape[-1]:
        return _UNKNOWN
    nothing = np.asarray(np.isnan(values).all(-1))
    return np.where(nothing, np.nan, summary(np.where(nothing[..., None], 0.0, values), axis=-1))


_DRIFT: Mapping[str, Callable[..., Array]] = {
    "mean": np.nanmean,
    "min": np.nanmin,
    "max": np.nanmax,
}
_RATIOS = {"weight_norm_ratio", "task_norm_ratio", "task_norm_a", "task_norm_b"}
_COSINES = {"weight_cosine", "weight_distance", "task_cosine", "sign_agreement", "overlap"}
_PREDICTIONS = (
    *PAIR[: PAIR.index("shift_product")],
    "shift_cosine",
    *(f"{name}.{label}" for name in _DIVERGENCES for label in (*_QUANTILES, "std")),
)
_SIDES = ("a", "b")
_GROUPED: Mapping[str, Sequence[str]] = {
    SIMILARITY: (
        *_PREDICTIONS,
        *(f"{n}_{side}" for side in _SIDES for n in ("to_base", "from_base", "base_agreement")),
        *(f"entropy_change_{side}" for side in _SIDES),
        "entropy_difference",
        *(f"drift_{side}.{label}" for side in _SIDES for label in _DRIFT),
        *("hidden_cosine", "hidden_cosine.min", *(f"hidden_cosine.{third}" for third in _THIRDS)),
        *("hidden_task_cosine", "hidden_task_cosine.last", "hidden_shift_a", "hidden_shift_b"),
        *("attention_cosine", "attention_cosine.min"),
        *sorted(_COSINES | _RATIOS),
        *("layer_norm_ratio", "layer_norm_ratio.std"),
        *(f"{n}.{role}" for n in ("task_cosine", "sign_agreement", "overlap") for role in _ROLES),
        *(f"task_cosine.{third}" for third in _THIRDS),
    ),
    PROBE_LOSS: (
        *("bits_per_byte_a", "bits_per_byte_b", "bits_per_byte_base"),
        *(f"{n}_{side}" for side in _SIDES for n in ("entropy", "confidence")),
    ),
    DEV_SCORES: ("score_a", "score_b", "score_base"),
}
NAMES: tuple[str, ...] = tuple(name for names in _GROUPED.values() for name in names)
"""What the numbers are, in their order."""
GROUP_OF: tuple[str, ...] = tuple(group for group, names in _GROUPED.items() for _ in names)
"""`similarity`, `probe_loss` or `dev_scores`, for each of NAMES."""
