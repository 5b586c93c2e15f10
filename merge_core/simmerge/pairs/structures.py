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

from merge_core.simmerge.pairs.products import Products, log_ratio, logarithms, statistics
from merge_core.simmerge.pairs.statistics import Floats, StructuralStatistics, kept
from merge_core.simmerge.structural.structure import GROUPS, Group, Structure

Words = npt.NDArray[np.uint64]


class StructurePanel:
    """N structures that can be compared with each other, and with their base where it is known."""

    def __init__(self, structures: Sequence[Structure], *, base: Structure | None = None) -> None:
        by_key = [{group.key: group for group in structure.groups} for structure in structures]
        origin = {group.key: group for group in base.groups} if base else {}
        columns = [_column([groups.get(key) for groups in by_key], origin.get(key)) for key in GROUPS]
        self._shape, self._based, self._elements, self._norms, self._squares, self._lengths, self._tops = (
            np.stack([getattr(column, name) for column in columns], axis=-1)
            for name in ("shape", "based", "elements", "norms", "squares", "lengths", "tops")
        )
        self._columns = columns
        self._base_norms = np.array([origin[key].l2 if key in origin else np.nan for key in GROUPS])
        self._layers, self._layouts = _layers(structures)

    def pairs(self, rows: Sequence[int]) -> StructuralStatistics:
        """Statistics of (i, j) for every i of `rows` and every j of the panel: [rows, N, …].

        Many rows at once take less time for each.
        """
        chosen = np.asarray(rows, np.int64)
        same = self._layouts[chosen][:, None] == self._layouts[None, :]
        ratio = log_ratio(self._layers[chosen][:, None], self._layers[None, :])
        return statistics(self._products(chosen), np.where(same[..., None], ratio, np.nan))

    def _products(self, rows: npt.NDArray[np.int64]) -> Products:
        seen = [_seen(column, rows) for column in self._columns]
        inner, both, differ, shared = (np.stack(found, axis=-1) for found in zip(*seen, strict=True))
        alike = (self._shape[rows][:, None] == self._shape) & (self._shape[rows] >= 0)[:, None]
        based = alike & self._based[rows][:, None]
        unknown, unbased = np.where(alike, 0.0, np.nan), np.where(based, 0.0, np.nan)
        a, b = self._lengths[rows][:, None], self._lengths
        apart = np.maximum(a + b - 2 * inner, 0.0)
        tops = self._tops[rows][:, None] + self._tops
        top = (self._tops[rows][:, None] > 0) & (self._tops > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return Products(
                elements=unknown + self._elements,
                square_a=unknown + self._squares[rows][:, None],
                square_b=unknown + self._squares,
                apart=unknown + apart,
                norm_a=unknown + self._norms[rows][:, None],
                norm_b=unknown + self._norms,
                task_square_a=unbased + a,
                task_square_b=unbased + b,
                task_apart=unbased + apart,
                norm_base=unbased + self._base_norms,
                sign_agreement=unbased + np.where(both > 0, 1 - differ / both, np.nan),
                overlap=unbased + np.where(top, 2 * shared / tops, np.nan),
            )


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
    differences: npt.NDArray[np.float32]
    """[N, k]: sketches of W − W_reference."""
    lengths: Floats
    """[N]: their squared norms."""
    positive: Words
    """[words, N]: bit by bit, which sampled coordinates are above the reference's."""
    changed: Words
    """[words, N]: which are not equal to it."""
    top: Words
    """[words, N]: which are of the largest fifth of the differences."""
    tops: Floats
    """[N]: how many these are."""


def _column(groups: Sequence[Group | None], base: Group | None) -> _Column:
    known = [group for group in groups if group is not None]
    classes = {layout: number for number, layout in enumerate(dict.fromkeys(g.layout for g in known))}
    # The reference of a layout: the base where it has that one, else the first that came.
    references = {group.layout: group for group in reversed(known)} | ({base.layout: base} if base else {})
    width = max((len(_projection(group)) for group in known), default=0)
    sample = max((len(group.sample) for group in known), default=0)
    differences = np.zeros((len(groups), width), np.float32)
    sampled = np.zeros((len(groups), sample), np.float32)
    squares, elements, norms = np.zeros(len(groups)), np.zeros(len(groups)), np.zeros(len(groups))
    for row, group in enumerate(groups):
        if group is not None:
            reference, own = references[group.layout], _projection(group)
            differences[row, : len(own)] = own - _projection(reference)
            sampled[row, : len(group.sample)] = group.sample - reference.sample
            squares[row], elements[row], norms[row] = _square(own), group.elements, group.l2
    top = _largest(np.abs(sampled), np.array([len(group.sample) if group else 0 for group in groups]))
    return _Column(
        shape=np.array([classes[group.layout] if group else -1 for group in groups], np.int64),
        based=np.array([bool(group and base and group.layout == base.layout) for group in groups]),
        elements=elements,
        norms=norms,
        squares=squares,
        differences=differences,
        lengths=np.array([_square(row) for row in differences]),
        positive=_packed(sampled > 0),
        changed=_packed(sampled != 0),
        top=_packed(top),
        tops=top.sum(axis=1).astype(np.float64),
    )


def _seen(column: _Column, rows: npt.NDArray[np.int64]) -> tuple[Floats, Floats, Floats, Floats]:
    """[rows, N] each: the product of differences; of the sampled coordinates how many changed in both, in
    how many of these the signs differ, and how many are of the largest in both."""
    inner = (column.differences[rows] @ column.differences.T).astype(np.float64)
    counts = np.zeros((3, *inner.shape))
    for at, row in enumerate(rows.tolist()):
        changed = column.changed[:, row, None] & column.changed
        counts[0, at] = _count(changed)
        counts[1, at] = _count((column.positive[:, row, None] ^ column.positive) & changed)
        counts[2, at] = _count(column.top[:, row, None] & column.top)
    return inner, counts[0], counts[1], counts[2]


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
    """[N, coordinates] to [words, N]."""
    padded = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 64)))
    return np.ascontiguousarray(np.packbits(padded, axis=1).view(np.uint64).T)


def _count(words: Words) -> npt.NDArray[np.uint16]:
    """How many bits are set in each column: a sample has fewer than 2^16."""
    return np.asarray(np.bitwise_count(words).sum(axis=0, dtype=np.uint16))


def _layers(structures: Sequence[Structure]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """ln l2 by layer and role [N, R], and a number for each layout: rows of equal numbers can be compared."""
    keys = [tuple((row.layer, row.role, row.elements) for row in one.layers) for one in structures]
    numbers = {layout: number for number, layout in enumerate(dict.fromkeys(keys))}
    norms = np.zeros((len(structures), max(map(len, keys), default=0)))
    for at, one in enumerate(structures):
        norms[at, : len(one.layers)] = [row.l2 for row in one.layers]
    return logarithms(norms), np.array([numbers[layout] for layout in keys], np.int64)
