"""The exact k-th largest magnitude of a tensor, without a sort and in the memory of a chunk.

Magnitudes are float32, whose bit patterns order as they do: a histogram of the upper 16 bits, one of the
lower 16 within the bin of the cut, and, only if the cut falls among ties, a pass to locate it. Where several
tie at the threshold the lowest indices are taken. What comes out is a Cut: two integers for the Trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from merge_core.errors import CorruptCheckpoint
from merge_core.operators.base import Array, Chunk, Stream
from merge_core.operators.scratch import scratch

Magnitudes = Callable[[Chunk], Array]
"""What is compared, for the elements of one chunk: float32, none negative; its memory may be used again."""

_Counts = NDArray[np.int64]
_BINS = 1 << 16


class Cut(NamedTuple):
    """What separates the elements that are taken: the least magnitude (its bits) and the last index at it."""

    threshold: int
    last: int

    @property
    def level(self) -> np.float32:
        """The threshold as a number; raises CorruptCheckpoint when it cannot be a magnitude."""
        if not 0 <= self.threshold < 1 << 31:
            raise CorruptCheckpoint(f"{self.threshold} in the trace is not the bits of a magnitude")
        return np.uint32(self.threshold).view(np.float32)

    def ties(self, chunk: Chunk) -> int:
        """How many elements of a chunk, from its start, are taken when they are equal to the threshold."""
        return min(max(self.last + 1 - chunk.start, 0), len(chunk.arrays[0]))


def kept(density: float, length: int) -> int:
    """How many of `length` elements a density keeps: ⌊density·length⌋, but never none."""
    return min(length, max(1, int(density * length)))


def delta_magnitudes(expert: int) -> Magnitudes:
    """|expert − base| of one expert, counted from 0."""
    from merge_core.operators import kernels

    def of(chunk: Chunk) -> Array:
        out = scratch("magnitudes", len(chunk.arrays[0]), np.float32)
        kernels.delta_magnitude(chunk.arrays[1 + expert], chunk.arrays[0], out)
        return out

    return of


def cuts(stream: Stream, compared: Sequence[Magnitudes], keep: Sequence[int]) -> list[Cut]:
    """Find, for each of `compared`, the cut above which its `keep` largest elements lie.

    Where all are kept the threshold is 0 and the last index that of the tensor, and nothing is read.
    """
    found = [Cut(0, stream.length - 1)] * len(compared)
    sought = {at: count for at, count in enumerate(keep) if count < stream.length}
    if not sought:
        return found
    uppers = {at: _select(counts, sought[at]) for at, counts in _histograms(stream, compared, sought).items()}
    bins = {at: upper for at, (upper, _) in uppers.items()}
    among_ties = {}
    for at, counts in _histograms(stream, compared, sought, bins).items():
        lower, rank = _select(counts, uppers[at][1])
        found[at] = Cut(bins[at] << 16 | lower, stream.length - 1)
        if rank < counts[lower]:
            among_ties[at] = rank
    if among_ties:
        thresholds = {at: found[at].threshold for at in among_ties}
        for at, index in _locate(stream, compared, thresholds, among_ties).items():
            found[at] = Cut(found[at].threshold, index)
    return found


def _histograms(
    stream: Stream,
    compared: Sequence[Magnitudes],
    sought: Mapping[int, Any],
    bins: Mapping[int, int] | None = None,
) -> dict[int, _Counts]:
    """Count, in one pass, the upper halves of the bits; the lower halves of those in the `bins`, if given."""
    from merge_core.operators import kernels

    totals = {at: np.zeros(_BINS, np.int64) for at in sought}

    def count(chunk: Chunk) -> dict[int, _Counts]:
        counts = {at: np.zeros(_BINS, np.int64) for at in sought}
        for at, counted in counts.items():
            bits = compared[at](chunk).view(np.uint32)
            if bins is None:
                kernels.count_upper(bits, counted)
            else:
                kernels.count_lower(bits, np.uint32(bins[at]), counted)
        return counts

    for counts in stream.map(count):
        for at, counted in counts.items():
            totals[at] += counted
    return totals


def _select(counts: _Counts, keep: int) -> tuple[int, int]:
    """The bin in which the `keep`-th largest value lies, and how many of that bin's values stay."""
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, keep))
    return _BINS - 1 - place, keep - (int(from_above[place - 1]) if place else 0)


def _locate(
    stream: Stream, compared: Sequence[Magnitudes], thresholds: Mapping[int, int], nth: Mapping[int, int]
) -> dict[int, int]:
    """The index of the n-th (from 1) element whose bits are the threshold."""
    rest, found = dict(nth), {}

    def at_threshold(chunk: Chunk) -> tuple[int, dict[int, NDArray[np.intp]]]:
        hits = {
            at: np.flatnonzero(compared[at](chunk).view(np.uint32) == bits) for at, bits in thresholds.items()
        }
        return chunk.start, hits

    for start, hits in stream.map(at_threshold):
        for at, indices in hits.items():
            if at not in found and rest[at] <= len(indices):
                found[at] = start + int(indices[rest[at] - 1])
            rest[at] -= len(indices)
        if len(found) == len(thresholds):
            break
    return found
