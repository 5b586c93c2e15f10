"""Structural statistics of two checkpoints and their base, every element counted: what panels estimate.

Three passes over the weights in pieces of 512 Ki elements, whatever the size of the models: inner products
and the upper halves of the magnitudes, the lower halves where the least of the largest fifth lies, and what
both have in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
import numpy.typing as npt

from merge_core.checkpoint import dtypes
from merge_core.checkpoint.source import TensorSource
from merge_core.simmerge.pairs.products import Products, log_ratio, logarithms, statistics
from merge_core.simmerge.pairs.statistics import Floats, StructuralStatistics, kept
from merge_core.simmerge.structural.sketch import as_stored, widened
from merge_core.simmerge.structural.structure import GROUPS, GroupKey, grouped, layer_rows

_PIECE = 1 << 19
_HALF = 16
_LOWER = np.uint32((1 << _HALF) - 1)
_FIELDS = tuple(Products.__dataclass_fields__)

Doubles = npt.NDArray[np.float64]
Patterns = npt.NDArray[np.uint32]


def compare(a: TensorSource, b: TensorSource, base: TensorSource | None = None) -> StructuralStatistics:
    """Measure an ordered pair; task vectors where all three have a group alike."""
    alike = _alike(a, b)
    based = _alike(a, base) if base else {}
    squares: dict[str, tuple[float, float]] = {}
    found = []
    for key in GROUPS:
        if key in alike:
            found.append(_group(alike[key], a, b, base if key in based else None, squares))
        else:
            found.append(dict.fromkeys(_FIELDS, np.nan))
    products = Products(**{name: np.array([part[name] for part in found]) for name in _FIELDS})
    return statistics(products, _by_layer(a, b, squares))


def _alike(a: TensorSource, b: TensorSource) -> dict[GroupKey, tuple[str, ...]]:
    """The groups that have the same names and shapes in both."""
    others = grouped(b.tensors)
    return {
        key: names
        for key, names in grouped(a.tensors).items()
        if others.get(key) == names and all(a.tensors[name].shape == b.tensors[name].shape for name in names)
    }


def _group(
    names: tuple[str, ...],
    a: TensorSource,
    b: TensorSource,
    base: TensorSource | None,
    squares: dict[str, tuple[float, float]],
) -> dict[str, float]:
    """The fields of Products for one group; notes the squared norms of each tensor in `squares`."""
    sums, tops = np.zeros(8), (_Top(), _Top())
    for name in names:
        before = sums.copy()
        for x, y, origin in _pieces(name, a, b, base):
            sums[:3] += _dot(x, x), _dot(y, y), _dot(x - y, x - y)
            if origin is not None:
                task_x, task_y = x - origin, y - origin
                both = (task_x != 0) & (task_y != 0)
                agree = both & ((task_x > 0) == (task_y > 0))
                sums[3:] += (
                    *(_dot(task_x, task_x), _dot(task_y, task_y), _dot(origin, origin)),
                    *(both.sum(), agree.sum()),
                )
                tops[0].see_upper(task_x)
                tops[1].see_upper(task_y)
        squares[name] = tuple((sums - before)[:2].tolist())
    square_a, square_b, apart, task_a, task_b, origin_square, both, agree = sums.tolist()
    nothing = np.nan if base is None else 1.0
    return {
        "elements": float(sum(prod(a.tensors[name].shape) for name in names)),
        "square_a": square_a,
        "square_b": square_b,
        "apart": apart,
        "norm_a": np.sqrt(square_a),
        "norm_b": np.sqrt(square_b),
        "task_square_a": task_a * nothing,
        "task_square_b": task_b * nothing,
        "task_apart": apart * nothing,
        "norm_base": np.sqrt(origin_square) * nothing,
        "sign_agreement": agree / both if both else np.nan,
        "overlap": _overlap(names, a, b, base, tops) if base else np.nan,
    }


class _Top:
    """The least magnitude, rounded to float32, of the largest fifth: found by counting halves of patterns."""

    def __init__(self) -> None:
        self._upper = np.zeros(1 << _HALF, np.int64)
        self._lower = np.zeros(1 << _HALF, np.int64)
        self._bin = self._above = 0

    def see_upper(self, values: Doubles) -> None:
        self._upper += np.bincount(_pattern(values) >> np.uint32(_HALF), minlength=1 << _HALF)

    def turn(self) -> None:
        """All was seen once: in which upper half the least lies, and how many lie above it."""
        keep = kept(int(self._upper.sum()))
        from_above = np.cumsum(self._upper[::-1])
        at = int(np.searchsorted(from_above, keep))
        self._bin, self._above = len(self._upper) - 1 - at, keep - int(from_above[at] - self._upper[::-1][at])

    def see_lower(self, values: Doubles) -> None:
        patterns = _pattern(values)
        inside = patterns[patterns >> np.uint32(_HALF) == self._bin] & _LOWER
        self._lower += np.bincount(inside, minlength=1 << _HALF)

    @property
    def least(self) -> np.uint32:
        """The pattern; of zero, where less than a fifth is anything else, the next above."""
        at = int(np.searchsorted(np.cumsum(self._lower[::-1]), self._above))
        return np.uint32(max(1, (self._bin << _HALF) + len(self._lower) - 1 - at))


def _overlap(
    names: tuple[str, ...], a: TensorSource, b: TensorSource, base: TensorSource, tops: tuple[_Top, _Top]
) -> float:
    """The share of their largest fifths that two task vectors have in common."""
    for top in tops:
        top.turn()
    for x, y in _task_vectors(names, a, b, base):
        tops[0].see_lower(x)
        tops[1].see_lower(y)
    counts = np.zeros(3)
    for x, y in _task_vectors(names, a, b, base):
        in_a, in_b = _pattern(x) >= tops[0].least, _pattern(y) >= tops[1].least
        counts += in_a.sum(), in_b.sum(), (in_a & in_b).sum()
    one, other, shared = counts.tolist()
    return 2 * shared / (one + other) if one and other else np.nan


def _task_vectors(
    names: tuple[str, ...], a: TensorSource, b: TensorSource, base: TensorSource
) -> Iterator[tuple[Doubles, Doubles]]:
    for name in names:
        for x, y, origin in _pieces(name, a, b, base):
            assert origin is not None
            yield x - origin, y - origin


def _pieces(
    name: str, a: TensorSource, b: TensorSource, base: TensorSource | None
) -> Iterator[tuple[Doubles, Doubles, Doubles | None]]:
    """The elements of one tensor in both models and in the base, as float64."""
    count = prod(a.tensors[name].shape)
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        origin = None if base is None else _read(base, name, start, size)
        yield _read(a, name, start, size), _read(b, name, start, size), origin


def _read(source: TensorSource, name: str, start: int, count: int) -> Doubles:
    dtype = source.tensors[name].dtype
    size = dtypes.SIZES[dtype]
    return widened(as_stored(source.read(name, start * size, count * size), dtype)).astype(np.float64)


def _pattern(values: Doubles) -> Patterns:
    return np.abs(values).astype(np.float32).view(np.uint32)


def _dot(x: Doubles, y: Doubles) -> float:
    return float(x @ y)


def _by_layer(a: TensorSource, b: TensorSource, squares: Mapping[str, tuple[float, float]]) -> Floats:
    """[2], NaN where the two have not the same layers."""
    rows = layer_rows(a.tensors)
    if rows != layer_rows(b.tensors) or not rows.keys() <= squares.keys():
        return np.full(2, np.nan)
    sums = {row: np.zeros(2) for row in rows.values()}
    for name, row in rows.items():
        sums[row] += squares[name]
    logs = logarithms(np.sqrt(np.array(list(sums.values())).reshape(-1, 2)))
    return log_ratio(logs[:, 0], logs[:, 1])
