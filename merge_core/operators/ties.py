"""TIES: trim each task vector, elect a sign per weight, average those that agree (arXiv:2306.01708).

Trimming keeps exactly the k = ⌊density·n⌋ (at least one) largest magnitudes of a task vector; where several
tie at the threshold the lowest indices win. The threshold is found on the bit patterns of the float32
magnitudes, which order as the magnitudes do: a histogram of the upper 16 bits, one of the lower 16, and, only
if the cut falls among ties, a pass to locate it. So it is exact, without a sort, in the memory of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merge_core.errors import CorruptCheckpoint
from merge_core.operators.base import (
    Chunk,
    Exactness,
    Operator,
    Parameter,
    Parameters,
    Stream,
    Traced,
    each,
    number,
    single,
)

if TYPE_CHECKING:
    from torch import Tensor

_Bits = NDArray[Any]
_Counts = NDArray[np.int64]
_LOW = (1 << 16) - 1
_CACHEFUL = 1 << 17


def kept(density: float, length: int) -> int:
    """How many of `length` elements a density keeps: ⌊density·length⌋, but never none."""
    return min(length, max(1, int(density * length)))


def _measure(stream: Stream, parameters: Parameters) -> Traced:
    """Find, for every expert, the bit pattern of the least magnitude kept and the last index kept at it.

    A task vector that is kept whole has threshold 0 and the last index of the tensor.
    """
    keep = [kept(density, stream.length) for density in each(parameters, "density")]
    threshold, last = [0] * len(keep), [stream.length - 1] * len(keep)
    trimmed = [expert for expert, count in enumerate(keep) if count < stream.length]
    among_ties = []
    if trimmed:
        upper = _histograms(stream, trimmed, lambda expert, bits: bits >> 16)
        for expert in trimmed:
            threshold[expert], keep[expert] = _select(upper[expert], keep[expert])
        lower = _histograms(
            stream, trimmed, lambda expert, bits: bits[bits >> 16 == threshold[expert]] & _LOW
        )
        for expert in trimmed:
            low, keep[expert] = _select(lower[expert], keep[expert])
            threshold[expert] = threshold[expert] << 16 | low
            if keep[expert] < lower[expert][low]:
                among_ties.append(expert)
    if among_ties:
        for expert, index in _locate(stream, {e: (threshold[e], keep[e]) for e in among_ties}).items():
            last[expert] = index
    return {"threshold": tuple(threshold), "last": tuple(last)}


def _magnitudes(chunk: Chunk, expert: int) -> Iterator[tuple[int, _Bits]]:
    """The bit patterns of |expert − base| (uint32, ordered as the magnitudes), a cacheful at a time.

    Each comes with its offset in the chunk.
    """
    base, other = chunk.tensors[0], chunk.tensors[1 + expert]
    for at in range(0, len(base), _CACHEFUL):
        delta = other[at : at + _CACHEFUL] - base[at : at + _CACHEFUL]
        yield at, delta.abs().numpy().view(np.uint32)


def _histograms(
    stream: Stream, experts: Sequence[int], key: Callable[[int, _Bits], _Bits]
) -> dict[int, _Counts]:
    """Count, in one pass and for every expert, how often each of 2^16 keys occurs."""
    totals = {expert: np.zeros(_LOW + 1, np.int64) for expert in experts}

    def count(chunk: Chunk) -> list[_Counts]:
        counts = [np.zeros(_LOW + 1, np.int64) for _ in experts]
        for expert, counted in zip(experts, counts, strict=True):
            for _, bits in _magnitudes(chunk, expert):
                counted += np.bincount(key(expert, bits), minlength=_LOW + 1)
        return counts

    for counts in stream.map(count):
        for expert, counted in zip(experts, counts, strict=True):
            totals[expert] += counted
    return totals


def _select(counts: _Counts, keep: int) -> tuple[int, int]:
    """The bin in which the `keep`-th largest value lies, and how many of that bin's values stay."""
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, keep))
    return _LOW - place, keep - (int(from_above[place - 1]) if place else 0)


def _locate(stream: Stream, cuts: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """The index of the n-th element at the threshold, for every expert -> (threshold bits, n)."""
    rest = {expert: n for expert, (_, n) in cuts.items()}
    found: dict[int, int] = {}

    def at_threshold(chunk: Chunk) -> tuple[int, list[NDArray[np.uint32]]]:
        hits = [
            [at + np.flatnonzero(bits == cuts[expert][0]) for at, bits in _magnitudes(chunk, expert)]
            for expert in cuts
        ]
        return chunk.start, [np.concatenate(parts).astype(np.uint32) for parts in hits]

    for start, hits in stream.map(at_threshold):
        for expert, indices in zip(cuts, hits, strict=True):
            if expert not in found and rest[expert] <= len(indices):
                found[expert] = start + int(indices[rest[expert] - 1])
            rest[expert] -= len(indices)
        if len(found) == len(cuts):
            break
    return found


def _trim(delta: Tensor, start: int, threshold: int, last: int) -> Tensor:
    """Zero what lies below the threshold, or at it behind index `last`."""
    if not 0 <= threshold < 1 << 31:
        raise CorruptCheckpoint(f"{threshold} in the trace is not the bits of a magnitude")
    magnitude = delta.abs()
    level = float(np.array(threshold, np.uint32).view(np.float32))
    ties = min(max(last + 1 - start, 0), delta.numel())
    keep = magnitude > level
    keep[:ties] |= magnitude[:ties] == level
    return delta.where(keep, 0.0)


def _apply(chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
    """Trim, weigh, elect the sign of the sum (zero counts as plus), and average the agreeing experts.

    The average divides by the weights of those that agree; with `normalize` off it is their sum.
    """
    base, *experts = chunk.tensors
    weights = each(parameters, "weight")
    cuts = zip(traced["threshold"], traced["last"], strict=True)
    weighted = [
        _trim(expert - base, chunk.start, int(threshold), int(last)) * single(weight)
        for expert, weight, (threshold, last) in zip(experts, weights, cuts, strict=True)
    ]
    total = weighted[0]
    for delta in weighted[1:]:
        total = total + delta
    positive = total >= 0
    mixed, divisor = base.new_zeros(base.shape), base.new_zeros(base.shape)
    for delta, weight in zip(weighted, weights, strict=True):
        agrees = (delta > 0).where(positive, delta < 0)
        mixed = mixed + delta.where(agrees, 0.0)
        divisor = divisor + agrees.to(delta.dtype) * single(weight)
    if parameters["normalize"]:
        mixed = mixed / divisor.where(divisor != 0, 1.0)
    return base + mixed * single(number(parameters, "lambda"))


TIES = Operator(
    name="ties",
    cite="arXiv:2306.01708",
    exactness=Exactness.GIVEN_TRACE,
    needs_base=True,
    experts=(1, None),
    parameters=(
        Parameter(name="weight", each=True),
        Parameter(name="density", each=True, default=1.0, low=0.0, high=1.0, open_low=True),
        Parameter(name="lambda", default=1.0),
        Parameter(name="normalize", default=True, flag=True),
    ),
    apply=_apply,
    measure=_measure,
    passes=3,
    traces=lambda parameters, experts: {"threshold": (experts, int), "last": (experts, int)},
)
