"""The exact k-th largest magnitude of a tensor, without a sort and in the memory of a chunk.

Magnitudes are float32, whose patterns order as they do: a histogram of the upper 16 bits, one of the
lower 16 within the bin of the cut, and, only if the cut falls among ties, a pass to locate it. Where several
tie at the threshold the lowest indices are taken. What comes out is a Cut: two integers for the Trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from merge_core.errors import CorruptCheckpoint
from merge_core.operators.base import Chunk, Order, Stored, Stream, Traced
from merge_core.operators.scratch import scratch

if TYPE_CHECKING:
    from torch import Tensor

Magnitudes = Callable[[Chunk], tuple[Stored, Stored | None]]
"""What is compared in a chunk: the distances of two arrays, element by element, or of one from zero."""

_Counts = NDArray[Any]
_BINS = 1 << 15
"""The patterns of the upper 16 bits of what has no sign."""
_INFINITY = 0x7F800000


class Cut(NamedTuple):
    """What separates the elements that are taken: the least magnitude (its bits) and the last index at it."""

    threshold: int
    last: int

    def within(self, chunk: Chunk) -> tuple[np.float32, int]:
        """The least magnitude, and how many elements from the start of a chunk are taken when they equal it.

        Raises CorruptCheckpoint when the threshold cannot be a magnitude.
        """
        if not 0 <= self.threshold < 1 << 31:
            raise CorruptCheckpoint(f"{self.threshold} in the trace is not the bits of a magnitude")
        ties = min(max(self.last + 1 - chunk.start, 0), len(chunk))
        return np.uint32(self.threshold).view(np.float32), ties


def above(level: np.float32) -> np.float32:
    """The least magnitude above a level: of infinity, and of what is none, NaN, which nothing reaches."""
    bits = level.view(np.uint32)
    return np.uint32(min(int(bits), _INFINITY) + 1).view(np.float32)


NOTHING = Cut(_INFINITY, -1)
"""The cut that nothing lies above."""


def trace_cuts(found: Sequence[Cut], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Cuts as a Trace holds them."""
    return {prefix + name: tuple(getattr(cut, name) for cut in found) for name in Cut._fields}


def cut_at(traced: Traced, index: int, prefix: str = "") -> Cut:
    """One of the cuts that a Trace holds."""
    return Cut(*(int(traced[prefix + name][index]) for name in Cut._fields))


def taken(magnitude: Tensor, chunk: Chunk, cut: Cut) -> Tensor:
    """Which elements of a chunk lie above a cut; a NaN does not."""
    level, ties = cut.within(chunk)
    keep = magnitude > float(level)
    keep[:ties] |= magnitude[:ties] == float(level)
    return keep


def kept(density: float, length: int) -> int:
    """How many of `length` elements a density keeps: ⌊density·length⌋, but none only if the density is 0."""
    return min(length, max(1, int(density * length))) if density > 0 else 0


@dataclass(frozen=True, slots=True)
class DeltaMagnitudes:
    """|expert − base| of one expert, counted from 0."""

    expert: int

    def __call__(self, chunk: Chunk) -> tuple[Stored, Stored]:
        return chunk.arrays[1 + self.expert], chunk.arrays[0]


class Uppers(NamedTuple):
    """How often each pattern of the upper 16 bits occurs in what is compared, and zero itself."""

    counts: _Counts
    zeros: int


def uppers(stream: Stream, compared: Iterable[Magnitudes]) -> dict[Magnitudes, Uppers]:
    """Count, in one pass, the upper halves of the bits of each of `compared`."""
    from merge_core.operators import kernels

    totals = {magnitudes: Uppers(np.zeros(_BINS, np.int64), 0) for magnitudes in compared}

    def count(chunk: Chunk) -> dict[Magnitudes, Uppers]:
        found = {magnitudes: Uppers(np.zeros(_BINS, np.int32), 0) for magnitudes in totals}
        for block in chunk.blocks():
            for magnitudes, (counts, zeros) in found.items():
                more = kernels.count_upper(*magnitudes(block), counts)
                found[magnitudes] = Uppers(counts, zeros + more)
        return found

    for found in stream.map(count):
        for magnitudes, (counts, zeros) in found.items():
            total = totals[magnitudes]
            total.counts[:] += counts
            totals[magnitudes] = Uppers(total.counts, total.zeros + zeros)
    return totals


def cuts(
    stream: Stream,
    compared: Sequence[Magnitudes],
    keep: Sequence[int],
    counted: Mapping[Magnitudes, Uppers] | None = None,
) -> list[Cut]:
    """Find, for each of `compared`, the cut above which its `keep` largest elements lie.

    Where all or none are kept nothing is read. What stands in `compared` twice is counted once; `counted`
    are its `uppers`, if they are known.
    """
    found = [Cut(0, stream.length - 1) if count else NOTHING for count in keep]
    sought = {at: compared[at] for at, count in enumerate(keep) if 0 < count < stream.length}
    for at, cut in _known(stream, sought, keep).items():
        found[at] = cut
        del sought[at]
    if not sought:
        return found
    counted = counted or uppers(stream, sought.values())
    selected = {at: _select(counted[magnitudes].counts, keep[at]) for at, magnitudes in sought.items()}
    lowers = _lowers(stream, sought, {at: upper for at, (upper, _) in selected.items()})
    among_ties = {}
    for at, counts in lowers.items():
        upper, rank = selected[at]
        lower, rank = _select(counts, rank)
        found[at] = Cut(upper << 16 | lower, stream.length - 1)
        if rank < counts[lower]:
            among_ties[at] = rank
    if among_ties:
        thresholds = {at: found[at].threshold for at in among_ties}
        for at, index in _locate(stream, sought, thresholds, among_ties).items():
            found[at] = Cut(found[at].threshold, index)
    return found


def _known(stream: Stream, sought: Mapping[int, Magnitudes], keep: Sequence[int]) -> dict[int, Cut]:
    """The cuts of task vectors whose order is kept."""
    if stream.orders is None:
        return {}
    around: dict[int, tuple[DeltaMagnitudes, int, int]] = {}
    for at, magnitudes in sought.items():
        if isinstance(magnitudes, DeltaMagnitudes):
            order = stream.orders(magnitudes, stream.length, partial(_order, stream, magnitudes))
            if order is not None:
                around[at] = magnitudes, int(order[keep[at] - 1]), int(order[keep[at]])
    return {
        at: Cut(least, around[at][1] if least == left else stream.length - 1)
        for at, (least, left) in _bits_at(stream, around).items()
    }


def _order(stream: Stream, magnitudes: Magnitudes) -> Order:
    """The elements from the largest magnitude down, the lowest index first among equals."""
    from merge_core.operators import kernels

    keys = np.empty(stream.length, np.uint64)

    def write(chunk: Chunk) -> None:
        kernels.descending_keys(*magnitudes(chunk), chunk.start, keys[chunk.start : chunk.start + len(chunk)])

    for _ in stream.map(write):
        pass
    keys.sort()
    return keys.astype(np.uint32)


def _bits_at(
    stream: Stream, wanted: Mapping[int, tuple[DeltaMagnitudes, int, int]]
) -> dict[int, tuple[int, int]]:
    """The bits of two magnitudes each, by their indices; a pass that looks at nothing else."""
    from merge_core.operators import kernels

    found = {at: np.empty(2, np.float32) for at in wanted}

    def look(chunk: Chunk) -> None:
        for at, (magnitudes, *places) in wanted.items():
            x, base = magnitudes(chunk)
            for out, place in enumerate(places):
                here = place - chunk.start
                if 0 <= here < len(chunk):
                    one = slice(here, here + 1)
                    kernels.delta_magnitude(x[one], base[one], found[at][out : out + 1])

    for _ in stream.map(look) if wanted else ():
        pass
    bits = {at: (values.view(np.uint32) & np.uint32(0x7FFFFFFF)).tolist() for at, values in found.items()}
    return {at: (pair[0], pair[1]) for at, pair in bits.items()}


def _lowers(stream: Stream, sought: Mapping[int, Magnitudes], bins: Mapping[int, int]) -> dict[int, _Counts]:
    """Count, in one pass, the lower halves of those bits whose upper half is the bin of a cut."""
    from merge_core.operators import kernels

    totals = {at: np.zeros(1 << 16, np.int64) for at in sought}

    def count(chunk: Chunk) -> dict[int, _Counts]:
        found = {at: np.zeros(1 << 16, np.int32) for at in sought}
        for block in chunk.blocks():
            for magnitudes in dict.fromkeys(sought.values()):
                compared = magnitudes(block)
                for at in (at for at, same in sought.items() if same is magnitudes):
                    kernels.count_lower(*compared, np.uint32(bins[at]), found[at])
        return found

    for found in stream.map(count):
        for at, counts in found.items():
            totals[at] += counts
    return totals


def _select(counts: _Counts, keep: int) -> tuple[int, int]:
    """The bin in which the `keep`-th largest value lies, and how many of that bin's values stay."""
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, keep))
    return len(counts) - 1 - place, keep - (int(from_above[place - 1]) if place else 0)


def _locate(
    stream: Stream, sought: Mapping[int, Magnitudes], thresholds: Mapping[int, int], nth: Mapping[int, int]
) -> dict[int, int]:
    """The index of the n-th (from 1) element whose bits are the threshold."""
    from merge_core.operators import kernels

    rest, found = dict(nth), {}

    def at_threshold(chunk: Chunk) -> dict[int, NDArray[np.int64]]:
        hits: dict[int, list[NDArray[np.int64]]] = {at: [] for at in thresholds}
        for block in chunk.blocks():
            for at, bits in thresholds.items():
                equal = scratch("equal", len(block), np.bool_)
                kernels.equal_to(*sought[at](block), np.uint32(bits).view(np.float32), equal)
                hits[at].append(np.flatnonzero(equal) + block.start)
        return {at: np.concatenate(indices) for at, indices in hits.items()}

    for hits in stream.map(at_threshold):
        for at, indices in hits.items():
            if at not in found and rest[at] <= len(indices):
                found[at] = int(indices[rest[at] - 1])
            rest[at] -= len(indices)
        if len(found) == len(thresholds):
            break
    return found
