"""Matching: the comparison of listed distributions, compiled, for thousands of pairs a second.

    Panel.of(behaviours, base, key=key, how=matching.compare)

The formulas of `divergence.pair_measures` over the tokens that somebody lists, in float32. What the base
lists is looked up once for each model and not for each pair; of a pair there remain the few tokens that only
its two models list. All that is listed at a position goes into lanes, as many as three lists can fill, so
that sums are vector code. The same values as `panel.compare` but for roundings of 1e-3, relative, or 1e-5.

It brings numba: nothing but the worker and commands that compare many models import it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from merge_core.simmerge.functional.behaviour import TOP
from merge_core.simmerge.pairs.behaviours import Top
from merge_core.simmerge.pairs.divergence import NEEDS_BASE, PAIR, Floats

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:

    def _kernel(function: F) -> F: ...

    def _parallel(function: F) -> F: ...

else:
    _FAST = {"nsz", "arcp", "contract", "reassoc", "nnan"}
    # Checks for a division by 0, of which there is none, would keep sums from becoming vector code.
    _HOW = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": _FAST}
    _kernel = numba.njit(**_HOW)
    _parallel = numba.njit(**_HOW, parallel=True)

_N, _K = 32, TOP
"""Lanes, one for all other tokens beside three lists, the base's in front; and how long a list is."""
assert 3 * _K < _N
# Where each row of lanes begins, in one array: logarithms and probabilities of a, b and the base, how many
# tokens a lane stands for, and what is worked out.
_LA, _LB, _LZ, _PA, _PB, _PZ, _W, _MEAN, _SUM = (_N * row for row in range(9))
_ROWS = 9 * _N

_TILE = 64
"""Positions that are written at once: what is known of each lies far apart in the end."""

_TINY, _ZERO, _HALF, _ONE, _TWO, _THREE = map(np.float32, (1e-37, 0, 0.5, 1, 2, 3))
_F3, _F5, _F7, _F9, _F11, _F13, _F15 = (np.float32(1 / n) for n in range(3, 16, 2))

Array = npt.NDArray[Any]


class _Base(NamedTuple):
    """What the base lists: [P, TOP], of which there are `listed`, 0 without a base."""

    listed: int
    ids: Array
    log: Array
    mass: Array
    share: Array
    share_mass: Array

    @classmethod
    def of(cls, base: Top | None, positions: int) -> _Base:
        ids, log = np.zeros((positions, _K), np.uint32), np.zeros((positions, _K), np.float32)
        share = np.zeros(positions, np.float32)
        listed = 0 if base is None else base.ids.shape[1]
        if base is not None:
            ids[:, :listed], log[:, :listed], share = base.ids, base.logp, base.share.astype(np.float32)
        return cls(listed, ids, log, np.exp(log), share, np.exp(share))


class _Models(NamedTuple):
    """Lists of N models beside the base's, [N, P, …]: their values for what the base lists (`listed`), for
    tokens that only they list (`own` of `ids`, `owned` of them), and for all others.

    `best` is the likeliest token, `best_at` its place in the base's list, or TOP and that in their own.
    """

    best: Array
    best_at: Array
    owned: Array
    ids: Array
    own: Array
    own_mass: Array
    listed: Array
    listed_mass: Array
    share: Array
    share_mass: Array

    @classmethod
    def of(cls, many: Sequence[Top], base: _Base) -> _Models:
        shape = (len(many), len(base.ids), _K)
        best_at, owned = np.zeros(shape[:2], np.int64), np.zeros(shape[:2], np.int64)
        ids, own, listed = (np.zeros(shape, kind) for kind in (np.uint32, np.float32, np.float32))
        share = np.stack([one.share for one in many]).astype(np.float32)
        for n, one in enumerate(many):
            _sort(one.ids, one.logp, share[n], base, best_at[n], owned[n], ids[n], own[n], listed[n])
        best = np.stack([one.ids[:, 0] for one in many])
        return cls(best, best_at, owned, ids, own, np.exp(own), listed, np.exp(listed), share, np.exp(share))


def compare(many: Sequence[Top], base: Top | None) -> Callable[[Top], Floats]:
    """A function from a model to float32[N, PAIR, P], as `panel.compare` gives it."""
    positions, size = many[0].ids.shape
    origin = _Base.of(base, positions)
    theirs = _Models.of(many, origin)
    vocabulary = np.float32(many[0].others + size)

    def against(a: Top) -> Floats:
        mine = _Models.of([a], origin)
        found = np.empty((len(many), len(PAIR), positions), np.float32)
        _against(mine, theirs, origin, vocabulary, found)
        if base is None:
            found[:, NEEDS_BASE:] = np.nan
        return found

    return against


@_kernel
def _sort(
    ids: Array,
    logp: Array,
    share: Array,
    base: _Base,
    best_at: Array,
    owned: Array,
    own_ids: Array,
    own: Array,
    listed: Array,
) -> None:
    """Tell apart what the base lists and what it does not, position by position."""
    for p in range(ids.shape[0]):
        for j in range(base.listed):
            listed[p, j] = share[p]
        for i in range(ids.shape[1]):
            at = -1
            for j in range(base.listed):
                at = j if base.ids[p, j] == ids[p, i] else at
            if at >= 0:
                listed[p, at] = logp[p, i]
            else:
                at = _K + owned[p]
                own_ids[p, owned[p]], own[p, owned[p]] = ids[p, i], logp[p, i]
                owned[p] += 1
            best_at[p] = at if i == 0 else best_at[p]


@_parallel
def _against(a: _Models, b: _Models, base: _Base, vocabulary: np.float32, found: Array) -> None:
    """Every model b beside a, which is the only one of its kind."""
    for n in numba.prange(found.shape[0]):
        rows = np.zeros(_ROWS, np.float32)
        rows[_PZ : _PZ + _N] = 1
        told = np.empty((_TILE, found.shape[1]), np.float32)
        for begin in range(0, found.shape[2], _TILE):
            size = min(_TILE, found.shape[2] - begin)
            for i in range(size):
                first, second = _gather(a, b, base, n, begin + i, vocabulary, rows)
                _add(rows, first, second, told[i])
                told[i, 3] = 1 if a.best[0, begin + i] == b.best[n, begin + i] else 0
            for m in range(found.shape[1]):
                for i in range(size):
                    found[n, m, begin + i] = told[i, m]


@_kernel
def _gather(
    a: _Models, b: _Models, base: _Base, n: int, p: int, vocabulary: np.float32, rows: Array
) -> tuple[int, int]:
    """Fill the lanes for one position; returns those of a's and of b's likeliest token."""
    for i in range(_K):
        rows[_LA + i], rows[_PA + i] = a.listed[0, p, i], a.listed_mass[0, p, i]
    for i in range(_K):
        rows[_LB + i], rows[_PB + i] = b.listed[n, p, i], b.listed_mass[n, p, i]
    for i in range(_K):
        rows[_LZ + i], rows[_PZ + i] = base.log[p, i], base.mass[p, i]
    for i in range(_K):
        rows[_LB + _K + i], rows[_PB + _K + i] = b.own[n, p, i], b.own_mass[n, p, i]
    for i in range(_K, _N):
        rows[_LA + i], rows[_PA + i] = a.share[0, p], a.share_mass[0, p]
        rows[_LZ + i], rows[_PZ + i] = base.share[p], base.share_mass[p]
    owned = b.owned[n, p]
    size = _K + owned
    first = a.best_at[0, p]
    for i in range(a.owned[0, p]):
        at = size
        for j in range(owned):
            at = _K + j if b.ids[n, p, j] == a.ids[0, p, i] else at
        rows[_LA + at], rows[_PA + at] = a.own[0, p, i], a.own_mass[0, p, i]
        rows[_LB + size], rows[_PB + size] = b.share[n, p], b.share_mass[n, p]
        first = at if a.best_at[0, p] == _K + i else first
        size += 1 if at == size else 0
    rows[_LA + size], rows[_PA + size] = a.share[0, p], a.share_mass[0, p]
    rows[_LB + size], rows[_PB + size] = b.share[n, p], b.share_mass[n, p]
    for i in range(_N):
        rows[_W + i] = 1 if i < base.listed or _K <= i < size else 0
    rows[_W + size] = vocabulary - (base.listed + size - _K)
    return first, b.best_at[n, p]


@_kernel
def _series(square: np.float32) -> np.float32:
    """artanh(s)/s of s², up to 1/9, to 1e-8."""
    high = _F9 + square * (_F11 + square * (_F13 + square * _F15))
    return _ONE + square * (_F3 + square * (_F5 + square * (_F7 + square * high)))


@_kernel
def _most(rows: Array, begin: int, at: int) -> np.float32:
    """1 where no lane of a row has more than this one, else 0."""
    least = rows[begin + at]
    more = _ZERO
    for i in range(_N):
        more += _ONE if rows[begin + i] > least else _ZERO
    return _ZERO if more > 0 else _ONE


@_kernel
def _add(rows: Array, first: int, second: int, told: Array) -> None:
    """PAIR of what lies in the lanes, all but the agreement."""
    kl = reverse = js = product = square_a = square_b = a_total = b_total = np.float32(0)
    mean = mean_log = total = total_log = np.float32(0)
    for i in range(_N):
        la, lb, lz = rows[_LA + i], rows[_LB + i], rows[_LZ + i]
        p, q, z = rows[_PA + i], rows[_PB + i], rows[_PZ + i]
        w = rows[_W + i]
        kl += w * p * (la - lb)
        reverse += w * q * (lb - la)
        a_total += w * p * (lb - lz)
        b_total += w * q * (la - lz)
        product += w * z * (la - lz) * (lb - lz)
        square_a += w * z * (la - lz) * (la - lz)
        square_b += w * z * (lb - lz) * (lb - lz)
        # The middle's logarithm is the larger one's and that of (1 + r)/2, a series of the inverse
        # hyperbolic tangent.
        more, less = (p, q) if p > q else (q, p)
        r = less / (more + _TINY)
        s = (r - _ONE) / (r + _THREE)
        middle = (la if la > lb else lb) + _TWO * s * _series(s * s)
        js += w * (p * (la - middle) + q * (lb - middle))
        between, added = math.sqrt(p * q), p * q / z
        rows[_MEAN + i] = between if w > 0 else _ZERO
        rows[_SUM + i] = added if w > 0 else _ZERO
        mean += w * between
        mean_log += w * between * (la + lb)
        total += w * added
        total_log += w * added * (la + lb - lz)
    mean_size, total_size = math.log(mean), math.log(total)
    told[0], told[1], told[2] = kl, reverse, _HALF * js
    told[4], told[5] = _HALF * kl + mean_size, _HALF * reverse + mean_size
    told[6], told[7] = _most(rows, _MEAN, first), _most(rows, _MEAN, second)
    told[8] = mean_size - _HALF * mean_log / mean
    told[9], told[10] = total_size - a_total, total_size - b_total
    told[11], told[12] = _most(rows, _SUM, first), _most(rows, _SUM, second)
    told[13] = total_size - total_log / total
    told[14], told[15], told[16] = product, square_a, square_b
