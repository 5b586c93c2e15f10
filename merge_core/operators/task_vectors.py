"""What the operators on task vectors share: `W₀ + λ·Σ wᵢ·thin(Wᵢ − W₀)`, the sum plain or by consensus.

Each of them says in its own file how it thins out a task vector: a Thinning. `operator` makes an Operator of
it: thin, weigh, add all (or those that agree in sign, `consensus`), divide by the weights if asked, and add
to the base. A thinning multiplies what it drops by zero, so that a NaN or an infinity shows in the result.

A thinned vector can be scaled back to the L1 norm that it had, by one traced factor for each expert: that is
what mergekit calls `rescale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merge_core.operators.base import (
    Array,
    Chunk,
    Exactness,
    Measure,
    Operator,
    Parameter,
    Parameters,
    Stored,
    Stream,
    Traced,
    each,
    number,
    single,
)
from merge_core.operators.consensus import agreeing, agreeing_into
from merge_core.operators.scratch import scratch
from merge_core.operators.trimming import Cut, above
from merge_core.operators.weighted import divide_by, sum_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskVector:
    """One expert's difference from the base in a chunk, and the `factor` that it is merged with.

    `expert` counts from 0.
    """

    chunk: Chunk
    expert: int
    parameters: Parameters
    traced: Traced
    factor: float

    def own(self, name: str) -> float:
        """A parameter of this expert."""
        return each(self.parameters, name)[self.expert]

    @property
    def delta(self) -> Tensor:
        """Wᵢ − W₀."""
        return self.chunk.tensors[1 + self.expert] - self.chunk.tensors[0]

    @property
    def operands(self) -> tuple[Stored, Stored]:
        """Wᵢ and W₀."""
        return self.chunk.arrays[1 + self.expert], self.chunk.arrays[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinning:
    """How a family of operators thins out a task vector.

    `apply` gives δ·factor where an element is kept and δ·0 elsewhere, `compiled` writes the same bits. It is
    None where what is kept follows from `cuts`: it lies above the first and not above the second; without
    those, all are kept.
    `norm` names the flag that asks for the L1 norm to be restored, `traces` what `measure` returns: integers,
    one for each expert. The rest is as in Operator.
    """

    cite: str
    exactness: Exactness
    apply: Callable[[TaskVector], Tensor]
    compiled: Callable[[TaskVector, Array], None] | None = None
    cuts: Callable[[TaskVector], tuple[Cut, Cut]] | None = None
    parameters: tuple[Parameter, ...] = ()
    norm: str | None = None
    measure: Measure | None = None
    passes: Callable[[Parameters], int] = lambda parameters: 0
    traces: tuple[str, ...] = ()
    rows: bool = False
    chance: bool = False
    conflict: Callable[[Parameters], str | None] = lambda parameters: None
    fixed: Mapping[str, bool] = field(default_factory=dict)

    def restores_norm(self, parameters: Parameters) -> bool:
        """Whether the L1 norm of what is thinned out is restored."""
        return self.norm is not None and bool(parameters.get(self.norm, False))

    def thin(self, vector: TaskVector, out: Array) -> None:
        """Write δ·factor where an element is kept, and δ·0 elsewhere."""
        from merge_core.operators import kernels

        if self.compiled is not None:
            self.compiled(vector, out)
        elif self.cuts is None:
            kernels.scale_delta(*vector.operands, np.float32(vector.factor), out)
        else:
            above, below = (cut.within(vector.chunk) for cut in self.cuts(vector))
            kernels.keep_between(*vector.operands, *above, *below, np.float32(vector.factor), out)


DENSITY = Parameter(name="density", each=True, default=1.0, low=0.0, high=1.0)
"""The share of the elements that is kept; 1 keeps all as they are."""


def operator(name: str, thinning: Thinning, *, consensus: bool, normalize: bool) -> Operator:
    """The operator that adds what `thinning` leaves; `normalize` is the default of that parameter."""
    family = _Family(thinning=thinning, consensus=consensus)
    return Operator(
        name=name,
        cite=thinning.cite,
        exactness=thinning.exactness,
        needs_base=True,
        experts=(1, None),
        parameters=(
            Parameter(name="weight", each=True),
            *thinning.parameters,
            Parameter(name="lambda", default=1.0),
            Parameter(name="normalize", default=normalize, flag=True),
        ),
        apply=family.apply,
        compiled=family.compiled,
        measure=family.measure if thinning.measure or thinning.norm else None,
        passes=lambda parameters: thinning.passes(parameters) + thinning.restores_norm(parameters),
        traces=family.traces,
        rows=thinning.rows,
        chance=thinning.chance,
        conflict=thinning.conflict,
        fixed=thinning.fixed,
        unmeasured=frozenset({"weight", "lambda", "normalize"}),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What an operator does with the task vectors that a thinning leaves: add all, or those that agree."""

    thinning: Thinning
    consensus: bool

    def apply(self, chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor:
        weights, normal = each(parameters, "weight"), bool(parameters["normalize"])
        vectors = [self.thinning.apply(vector) for vector in _vectors(chunk, parameters, traced)]
        if self.consensus:
            mixed = agreeing(vectors, weights, normalize=normal)
        else:
            mixed = vectors[0]
            for vector in vectors[1:]:
                mixed = mixed + vector
            mixed = mixed / sum_of(weights) if normal else mixed
        return chunk.tensors[0] + mixed * single(number(parameters, "lambda"))

    def compiled(self, chunk: Chunk, parameters: Parameters, traced: Traced, out: Array) -> bool | None:
        from merge_core.operators import fused

        vectors = list(_vectors(chunk, parameters, traced))
        if self.thinning.compiled is None and len(vectors) <= fused.MOST:
            return self._at_once(vectors, parameters, out)
        self._in_steps(vectors, parameters, out)
        return None

    def _at_once(self, vectors: Sequence[TaskVector], parameters: Parameters, out: Array) -> bool:
        """Loop once over the elements, or over each run of them in which equal magnitudes count alike."""
        from merge_core.operators import fused

        base, *experts = vectors[0].chunk.arrays
        weights, normal = each(parameters, "weight"), bool(parameters["normalize"])
        scale = np.float32(number(parameters, "lambda"))
        divisor = np.float32(sum_of(weights) if normal else 1.0)
        factors = _singles(vector.factor for vector in vectors)
        if self.thinning.cuts is None:
            return bool(fused.add_all(base, tuple(experts), factors, divisor, scale, out))
        finite = True
        cuts = [[cut.within(v.chunk) for cut in self.thinning.cuts(v)] for v in vectors]
        for start, stop in pairwise(sorted({0, len(out), *(ties for pair in cuts for _, ties in pair)})):
            lows, highs = (
                tuple(level if start < ties else above(level) for level, ties in side)
                for side in zip(*cuts, strict=True)
            )
            run = base[start:stop], tuple(expert[start:stop] for expert in experts), lows, highs, factors
            if self.consensus:
                finite &= fused.add_agreeing(*run, _singles(weights), normal, scale, out[start:stop])
            else:
                finite &= fused.add_trimmed(*run, divisor, scale, out[start:stop])
        return finite

    def _in_steps(self, vectors: Sequence[TaskVector], parameters: Parameters, out: Array) -> None:
        """Thin out one expert after the other, add, and add to the base."""
        from merge_core.operators import kernels

        weights, normal = each(parameters, "weight"), bool(parameters["normalize"])
        thin = self.thinning.thin
        if self.consensus:
            rows = scratch("task vectors", len(weights) * len(out), np.float32).reshape(len(weights), -1)
            for vector, row in zip(vectors, rows, strict=True):
                thin(vector, row)
            agreeing_into(rows, weights, out, normalize=normal)
        else:
            thin(vectors[0], out)
            row = scratch("task vectors", len(out), np.float32)
            for vector in vectors[1:]:
                thin(vector, row)
                kernels.add(row, out)
            if normal:
                divide_by(sum_of(weights), out)
        kernels.add_to_base(vectors[0].chunk.arrays[0], np.float32(number(parameters, "lambda")), out)

    def measure(self, stream: Stream, parameters: Parameters) -> Traced:
        thinning = self.thinning
        traced = dict(thinning.measure(stream, parameters)) if thinning.measure else {}
        if thinning.restores_norm(parameters):
            traced["norm"] = _norm_factors(stream, parameters, traced, thinning)
        return traced

    def traces(self, parameters: Parameters, experts: int) -> Mapping[str, tuple[int, type]]:
        found: dict[str, tuple[int, type]] = dict.fromkeys(self.thinning.traces, (experts, int))
        return found | ({"norm": (experts, float)} if self.thinning.restores_norm(parameters) else {})


def _vectors(chunk: Chunk, parameters: Parameters, traced: Traced) -> Iterator[TaskVector]:
    """The task vectors of a chunk, each with its weight times the factor that restores its norm."""
    weights = each(parameters, "weight")
    norms = traced.get("norm") or (1.0,) * len(weights)
    for expert, (weight, norm) in enumerate(zip(weights, norms, strict=True)):
        yield TaskVector(
            chunk=chunk, expert=expert, parameters=parameters, traced=traced, factor=weight * norm
        )


def _singles(values: Iterable[float]) -> tuple[np.float32, ...]:
    return tuple(map(np.float32, values))


def _norm_factors(
    stream: Stream, parameters: Parameters, traced: Traced, thinning: Thinning
) -> tuple[float, ...]:
    """Σ|δ| / Σ|thinned δ| of every expert, float64 from left to right; 1 where nothing is left."""
    from merge_core.operators import kernels
    from merge_core.operators.reductions import require_finite

    experts = len(each(parameters, "weight"))
    alone = {**parameters, "weight": (1.0,) * experts}

    def sums(chunk: Chunk) -> tuple[int, NDArray[Any]]:
        # Chunks of whole rows overlap, so that rows are what is summed, and known by their number.
        unit, length = chunk.row if thinning.rows else kernels.BLOCK, len(chunk)
        found = np.empty((2 * experts, -(-length // unit)), np.float64)
        values = scratch("task vectors", length, np.float32)
        for vector in _vectors(chunk, alone, traced):
            kernels.delta_magnitude(*vector.operands, values)
            kernels.magnitude_sums(values, unit, found[2 * vector.expert])
            thinning.thin(vector, values)
            kernels.magnitude_sums(values, unit, found[2 * vector.expert + 1])
        return chunk.start // unit, found

    totals, counted = [0.0] * (2 * experts), 0
    for first, found in stream.map(sums):
        for index, runs in enumerate(found):
            for run in runs[counted - first :].tolist():
                totals[index] += run
        counted = max(counted, first + found.shape[1])
    require_finite(totals)
    return tuple(
        before / after if after else 1.0 for before, after in zip(totals[::2], totals[1::2], strict=True)
    )
