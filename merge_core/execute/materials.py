"""Materials: what a plan's operands read from, be it a model or what an earlier step makes of models.

The result of an earlier step is a TensorSource like any other: its bytes are computed when they are read
and never lie on a disk. What such a step must know of whole tensors is measured before anybody reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from merge_core.checkpoint import dtypes
from merge_core.checkpoint.source import TensorInfo, TensorSource
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.execute.aligned import Alignment
from merge_core.execute.pool import Pool
from merge_core.execute.work import Work
from merge_core.functional import result_files, source_files
from merge_core.memory import CHUNK_ELEMENTS
from merge_core.operators import COPY, find
from merge_core.operators.base import Orders, Traced
from merge_core.plan import MergePlan, Step, TensorPlan
from merge_core.seeding import key
from merge_core.tokenizer.union import Files
from merge_core.trace import Trace, close


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """One input of a plan: its weights, and its config, tokenizer and chat template when asked."""

    tensors: TensorSource
    files: Files


class Materials:
    """The inputs of a plan and the steps made of them; raises CorruptCheckpoint where one does not fit.

    With `claimed` the traced values are those of a Trace, but for the (step, tensor) that `doubted` lists:
    measuring again gave others there, and a lie must not decide what comes after it.
    """

    def __init__(
        self,
        plan: MergePlan,
        inputs: Sequence[Material],
        *,
        claimed: Trace | None = None,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        if len(inputs) != len(plan.inputs):
            raise ValueError(f"{len(inputs)} materials for a plan of {len(plan.inputs)} inputs")
        self._plan = plan
        self._inputs = tuple(inputs)
        self._claimed = claimed
        self._chunk = chunk_elements
        self._sources: list[TensorSource] = [material.tensors for material in inputs]
        self._traced: list[dict[str, Traced]] = [{} for _ in plan.steps]
        self._planned = [{tensor.name: tensor for tensor in step.tensors} for step in plan.steps]
        self.doubted: list[tuple[int, str]] = []
        files = source_files(plan, [material.files for material in inputs])
        self._aligned = [
            Alignment(step, self._sources, files) if step.tokenizer else None for step in plan.steps
        ]
        for index, step in enumerate(plan.steps):
            self._check(index, step)
            self._sources.append(_Computed(self, index, step))

    def vary(self, plan: MergePlan) -> bool:
        """Go on with a plan that differs in parameters alone; False, where it does not, and nothing happens.

        What was measured is forgotten.
        """
        if plan.inputs != self._plan.inputs or len(plan.steps) != len(self._plan.steps):
            return False
        if not all(map(_vary, self._plan.steps, plan.steps)):
            return False
        self._plan = plan
        self._planned = [{tensor.name: tensor for tensor in step.tensors} for step in plan.steps]
        self._traced = [{} for _ in plan.steps]
        return True

    def work(self, step: int, tensor: str) -> Work:
        """The work on one tensor of a step."""
        planned = self._planned[step][tensor]
        return Work(
            planned,
            self._taken(step, planned),
            keys=self._keys(planned),
            depth=step,
            chunk_elements=self._chunk,
        )

    def measured(
        self,
        step: int,
        tensor: str,
        pool: Pool,
        *,
        work: Work | None = None,
        known: Traced | None = None,
        orders: Orders | None = None,
    ) -> Traced:
        """What is traced of one tensor, after all that it is computed from; `known` spares measuring it.

        `work` is the work on it, if it goes on after this; `orders` keep what helps to measure it again.
        """
        planned = self._planned[step][tensor]
        for operand in planned.operands:
            below = operand.source - len(self._inputs)
            if below >= 0 and operand.tensor not in self._traced[below]:
                self.measured(below, operand.tensor, pool)
        if known is None:
            measures = find(planned.operator).measure is not None
            known = self._measure(step, work or self.work(step, tensor), pool, orders) if measures else {}
        if self._claimed is not None:
            claim = self._claimed.of(step, tensor)
            if close(claim, known, find(planned.operator).slack):
                known = claim
            else:
                self.doubted.append((step, tensor))
        self._traced[step][tensor] = known
        return known

    def damaged(self, step: int, tensor: str, pieces: Iterable[int]) -> Unmergeable | None:
        """What to raise for pieces of a tensor that are not finite; None where what they are made of is."""
        work = self.work(step, tensor)
        for index in map(work.damaged, pieces):
            if index is not None:
                operand = work.tensor.operands[index]
                whose = self._id(operand.source)
                return Unmergeable(
                    f"{tensor} would hold NaN or infinity: {operand.tensor} of {whose} does",
                    hint=f"leave out {whose}, then: weft plan RECIPE",
                )
        return None

    def trace(self, pool: Pool) -> Trace:
        """The Trace of the whole plan: what was not measured yet is measured now."""
        for step, tensors in enumerate(self._planned):
            for name in tensors:
                if name not in self._traced[step]:
                    self.measured(step, name, pool)
        return Trace(
            steps=tuple(
                {name: traced[name] for name in sorted(traced) if traced[name]} for traced in self._traced
            )
        )

    def traced(self, step: int, tensor: str) -> Traced:
        """What was measured of a tensor before."""
        return self._traced[step][tensor]

    def believe(self) -> None:
        """Take every claimed value for what would have been measured."""
        assert self._claimed is not None
        for step, tensors in enumerate(self._planned):
            self._traced[step] = {name: self._claimed.of(step, name) for name in tensors}

    def files(self) -> dict[str, bytes]:
        """The functional files of the result, by name, sorted."""
        return result_files(self._plan, [material.files for material in self._inputs])

    def _measure(self, step: int, work: Work, pool: Pool, orders: Orders | None) -> Traced:
        try:
            return work.measure(pool, orders)
        except Unmergeable as error:
            raise self.damaged(step, work.tensor.name, range(work.pieces)) or error from error

    def _keys(self, planned: TensorPlan) -> list[int]:
        """The keys of chance of a tensor's experts; none where its operator leaves nothing to chance."""
        if not find(planned.operator).chance:
            return []
        experts = planned.operands[-planned.experts :]
        return [key(self._plan.digest, self._id(o.source), o.tensor, planned.name) for o in experts]

    def _id(self, source: int) -> str:
        step = source - len(self._inputs)
        return f"step {step}" if step >= 0 else self._plan.inputs[source]

    def _taken(self, step: int, planned: TensorPlan) -> Sequence[TensorSource]:
        """What the operands of a tensor read from: the models, or their rows in the order of the output's."""
        aligned = self._aligned[step]
        if aligned is not None:
            return aligned.operands(planned)
        return [self._sources[operand.source] for operand in planned.operands]

    def _check(self, index: int, step: Step) -> None:
        """Raise CorruptCheckpoint unless every source has the tensors that a step takes from it."""
        for planned in step.tensors:
            for operand, source in zip(planned.operands, self._taken(index, planned), strict=True):
                fault = _fault(planned, source.tensors.get(operand.tensor))
                if fault:
                    raise CorruptCheckpoint(
                        f"{self._name(operand.source)} {fault} {operand.tensor}", hint="weft plan RECIPE"
                    )

    def _name(self, source: int) -> str:
        step = source - len(self._inputs)
        return f"step {step} of the plan" if step >= 0 else f"input {source} ({self._plan.inputs[source]})"


class _Computed:
    """The result of a step as a source: leaves are computed in the thread that reads them."""

    def __init__(self, materials: Materials, step: int, planned: Step) -> None:
        self.tensors: Mapping[str, TensorInfo] = planned.layout
        self._materials = materials
        self._step = step

    def read(self, tensor: str, offset: int, length: int, into: memoryview | None = None) -> memoryview:
        """Some bytes of a tensor; they need no check, they were made here."""
        view = memoryview(bytearray(length)) if into is None else into[:length]
        self._materials.work(self._step, tensor).fill(
            view, offset, self._materials.traced(self._step, tensor)
        )
        return view


def _vary(mine: Step, theirs: Step) -> bool:
    """Whether two steps differ in parameters alone, and their rows are those of the models."""
    return (
        mine.tokenizer is theirs.tokenizer is None
        and len(mine.tensors) == len(theirs.tensors)
        and all(
            a.name == b.name
            and a.operator == b.operator
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.operands == b.operands
            for a, b in zip(mine.tensors, theirs.tensors, strict=True)
        )
    )


def _fault(planned: TensorPlan, info: TensorInfo | None) -> str | None:
    """What is wrong with a tensor that a plan takes as an operand, or None."""
    if info is None:
        return "lacks"
    if info.shape != planned.shape:
        return f"has shape {list(info.shape)} for"
    copied = planned.operator == COPY.name
    if info.dtype != planned.dtype if copied else info.dtype not in dtypes.MERGEABLE:
        return f"has type {info.dtype} for"
    return None
