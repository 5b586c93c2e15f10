"""Products: the inner products and counts of pairs, from which all structural statistics follow.

Whoever measures two checkpoints and whoever has two fingerprints ends here, so that a cosine is the same
formula of exact and of estimated products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merge_core.simmerge.pairs.statistics import Floats, StructuralStatistics


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Products:
    """Of ordered pairs (a, b), by group: [..., G]; NaN where a pair cannot be compared in a group.

    `square_a`, `square_b` and `apart` are ‖W_a‖², ‖W_b‖² and ‖W_a − W_b‖² seen by one measure, `norm_a` and
    `norm_b` the exact norms; `task_*` are of the task vectors, NaN where there is no base to compare.
    """

    elements: Floats
    square_a: Floats
    square_b: Floats
    apart: Floats
    norm_a: Floats
    norm_b: Floats
    task_square_a: Floats
    task_square_b: Floats
    task_apart: Floats
    norm_base: Floats
    sign_agreement: Floats
    overlap: Floats


def statistics(products: Products, layer_norm_ratio: Floats) -> StructuralStatistics:
    """Turn products by group into statistics by group and overall."""
    p = products
    square_a, square_b, apart = _summed(p.square_a), _summed(p.square_b), _summed(p.apart)
    norm_a, norm_b = _norm(p.norm_a), _norm(p.norm_b)
    task_a, task_b, task_apart = _summed(p.task_square_a), _summed(p.task_square_b), _summed(p.task_apart)
    # The base counts where the task vectors do: in the groups of which all three are comparable.
    norm_base = _norm(np.where(np.isnan(p.task_square_a), np.nan, p.norm_base))
    with np.errstate(divide="ignore", invalid="ignore"):
        return StructuralStatistics(
            weight_cosine=_cosine(square_a, square_b, apart),
            weight_distance=_finite(np.sqrt(apart) / np.maximum(norm_a, norm_b)),
            weight_norm_ratio=_finite(norm_a / norm_b),
            task_cosine=_cosine(task_a, task_b, task_apart),
            task_norm_ratio=_finite(np.sqrt(task_a) / np.sqrt(task_b)),
            task_norm_a=_finite(np.sqrt(task_a) / norm_base),
            task_norm_b=_finite(np.sqrt(task_b) / norm_base),
            sign_agreement=_averaged(p.sign_agreement, p.elements),
            overlap=_averaged(p.overlap, p.elements),
            layer_norm_ratio=layer_norm_ratio,
        )


def logarithms(norms: Floats) -> Floats:
    """NaN of zero: such a layer says nothing of a ratio."""
    return np.log(np.where(norms > 0, norms, np.nan))


def log_ratio(logs_a: Floats, logs_b: Floats) -> Floats:
    """[..., 2]: mean and standard deviation of ln(a / b) over layers [..., R], of those that both have."""
    ratio = logs_a - logs_b
    known = ~np.isnan(ratio)
    count = known.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(known, ratio, 0.0).sum(axis=-1) / count
        spread = np.where(known, ratio - mean[..., None], 0.0)
        return np.stack([mean, np.sqrt((spread * spread).sum(axis=-1) / count)], axis=-1)


def _cosine(square_a: Floats, square_b: Floats, apart: Floats) -> Floats:
    """By the distance: in the inner product of two nearly equal vectors what tells them apart is lost."""
    norms = np.sqrt(square_a) * np.sqrt(square_b)
    return np.clip(_finite((square_a + square_b - apart) / (2 * norms)), -1.0, 1.0)


def _summed(by_group: Floats) -> Floats:
    """[..., G + 1]: with the sum over the groups that are known, NaN where none is."""
    return np.concatenate([by_group, _total(by_group)[..., None]], axis=-1)


def _norm(by_group: Floats) -> Floats:
    return np.sqrt(_summed(by_group * by_group))


def _averaged(by_group: Floats, elements: Floats) -> Floats:
    known = np.where(np.isnan(by_group), np.nan, elements)
    overall = _finite(_total(by_group * elements) / _total(known))
    return np.concatenate([by_group, overall[..., None]], axis=-1)


def _total(by_group: Floats) -> Floats:
    known = ~np.isnan(by_group)
    total: Floats = np.where(known, by_group, 0.0).sum(axis=-1)
    return np.where(known.any(axis=-1), total, np.nan)


def _finite(values: npt.NDArray[np.float64]) -> Floats:
    return np.where(np.isfinite(values), values, np.nan)
