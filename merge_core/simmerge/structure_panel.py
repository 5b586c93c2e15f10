"""The StructurePanel: structures side by side, so that thousands of pairs are estimated at once.

    panel = StructurePanel(structures, base=base)
    panel.pairs([0])          # StructuralStatistics [1, N, …]: the first with each, as ordered pairs

Sketches and samples of what a model is from the base (without one, from the first of its shape) give the
inner products of differences; norms of the weights are known exactly. With k buckets a cosine c errs by about
(1 − c²)/√k, an agreement p of n coordinates by √(p(1 − p)/n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merge_core.simmerge.products import Products, log_ratio, statistics
from merge_core.simmerge.statistics import Floats, StructuralStatistics, kept
from merge_core.simmerge.structure import GROUPS, Group, Structure

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Column:
    """One group of N models; what a model lacks is 0 in numbers and −1 in `shape`."""

    shape: npt.NDArray[np.int64]
    """[N]: equal where two can be compared."""
    based: npt.NDArray[np.bool_]
    """[N]: whether the differences are task vectors."""
    elements: Floats
    norms: Floats
    squares: Floats
    """[N]: ‖W‖² as the sketch sees it."""
    base_norm: float
    differences: npt.NDArray[np.float32]
    """[N, k]: sketches of W − W_reference."""
    lengths: Floats
    """[N]: their squared norms."""
    positive: Words
    """[N, words]: bit by bit, which sampled coordinates are above the reference's."""
    changed: Words
    """[N, words]: which are not equal to it."""
    top: Words
    """[N, words]: which are of the largest fifth of the differences."""


class StructurePanel:
    """N structures that can be compared with each other, and with their base where it is known."""

    def __init__(self, structures: Sequence[Structure], *, base: Structure | None = None) -> None:
        by_key = [{group.key: group for group in structure.groups} for structure in structures]
        origin = {group.key: group for group in base.groups} if base else {}
        self._columns = [_column([groups.get(key) for groups in by_key], origin.get(key)) for key in GROUPS]
        self._layers, self._layouts = _layers(structures)

    def pairs(self, rows: Sequence[int]) -> StructuralStatistics:
        """Statistics of (i, j) for every i of `rows` and every j of the panel: [rows, N, …]."""
        chosen = np.asarray(rows, np.int64)
        found = [_products(column, chosen) for column in self._columns]
        stacked = {name: np.stack([part[name] for part in found], axis=-1) for name in found[0]}
        same = self._layouts[chosen][:, None] == self._layouts[None, :]
        ratio = log_ratio(self._layers[chosen][:, None], self._layers[None, :])
        return statistics(Products(**stacked), np.where(same[..., None], ratio, np.nan))


def _column(groups: Sequence[Group | None], base: Group | None) -> _Column:
    known = [group for group in groups if group is not None]
    classes = {shapes: number for number, shapes in enumerate(dict.fromkeys(g.shapes for g in known))}
    # The reference of a shape: the base where it has that shape, else the first that came.
    references = {group.shapes: group for group in reversed(known)} | ({base.shapes: base} if base else {})
    width = max((len(_projection(group)) for group in known), default=0)
    sample = max((len(group.sample) for group in known), default=0)
    differences = np.zeros((len(groups), width), np.float32)
    sampled = np.zeros((len(groups), sample), np.float32)
    squares, elements, norms = np.zeros(len(groups)), np.zeros(len(groups)), np.zeros(len(groups))
    for row, group in enumerate(groups):
        if group is not None:
            reference, own = references[group.shapes], _projection(group)
            differences[row, : len(own)] = own - _projection(reference)
            sampled[row, : len(group.sample)] = group.sample - reference.sample
            squares[row], elements[row], norms[row] = _square(own), group.elements, group.l2
    counts = np.array([len(group.sample) if group else 0 for group in groups])
    return _Column(
        shape=np.array([classes[group.shapes] if group else -1 for group in groups], np.int64),
        based=np.array([bool(group and base and group.shapes == base.shapes) for group in groups]),
        elements=elements,
        norms=norms,
        squares=squares,
        base_norm=base.l2 if base else np.nan,
        differences=differences,
        lengths=np.array([_square(row) for row in differences]),
        positive=_packed(sampled > 0),
        changed=_packed(sampled != 0),
        top=_packed(_largest(np.abs(sampled), counts)),
    )


def _products(column: _Column, rows: npt.NDArray[np.int64]) -> dict[str, Floats]:
    """The fields of Products for one group: [rows, N] each."""
    alike = (column.shape[rows][:, None] == column.shape) & (column.shape[rows] >= 0)[:, None]
    based = alike & column.based[rows][:, None]
    inner = (column.differences[rows] @ column.differences.T).astype(np.float64)
    a, b = column.lengths[rows][:, None], column.lengths[None, :]
    apart = np.maximum(a + b - 2 * inner, 0.0)
    changed = column.changed[rows][:, None] & column.changed
    both, differ = _count(changed), _count((column.positive[rows][:, None] ^ column.positive) & changed)
    tops = _count(column.top)
    shared = _count(column.top[rows][:, None] & column.top)
    fewer = np.minimum(tops[rows][:, None], tops)

    def known(values: npt.ArrayLike, where: npt.NDArray[np.bool_] = alike) -> Floats:
        return np.where(where, np.asarray(values, np.float64), np.nan)

    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "elements": known(column.elements[None, :]),
            "square_a": known(column.squares[rows][:, None]),
            "square_b": known(column.squares[None, :]),
            "apart": known(apart),
            "norm_a": known(column.norms[rows][:, None]),
            "norm_b": known(column.norms[None, :]),
            "task_square_a": known(a, based),
            "task_square_b": known(b, based),
            "task_apart": known(apart, based),
            "norm_base": known(column.base_norm, based),
            "sign_agreement": known(1 - differ / both, based & (both > 0)),
            "overlap": known(shared / (tops[rows][:, None] + tops) * 2, based & (fewer > 0)),
        }


def _projection(group: Group) -> npt.NDArray[np.float32]:
    """What inner products are estimated from; a sample that is whole gives them exactly."""
    return group.sketch if len(group.sketch) else group.sample


def _largest(magnitudes: npt.NDArray[np.float32], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of the first `counts` of each row are of the largest fifth, or equal to the least of it."""
    found = np.zeros(magnitudes.shape, np.bool_)
    for row, count in enumerate(counts.tolist()):
        if count:
            of, keep = magnitudes[row, :count], kept(count)
            found[row, :count] = (of >= np.partition(of, count - keep)[count - keep]) & (of > 0)
    return found


def _square(vector: npt.NDArray[np.float32]) -> float:
    wide = vector.astype(np.float64)
    return float(wide @ wide)


def _packed(bits: npt.NDArray[np.bool_]) -> Words:
    padded = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 64)))
    return np.packbits(padded, axis=1).view(np.uint64)


def _count(words: Words) -> Floats:
    return np.asarray(np.bitwise_count(words).sum(axis=-1), np.float64)


def _layers(structures: Sequence[Structure]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """l2 by layer and role [N, R], and a number for each layout: rows of equal numbers can be compared."""
    keys = [tuple((row.layer, row.role, row.elements) for row in one.layers) for one in structures]
    numbers = {layout: number for number, layout in enumerate(dict.fromkeys(keys))}
    norms = np.zeros((len(structures), max(map(len, keys), default=0)))
    for at, one in enumerate(structures):
        norms[at, : len(one.layers)] = [row.l2 for row in one.layers]
    return norms, np.array([numbers[layout] for layout in keys], np.int64)
