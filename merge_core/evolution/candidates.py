"""Candidates: merges in the memory of a live model, tensor by tensor, without a checkpoint.

    live = LiveModel(load_any(base))
    live.fill(plan, inputs)          # the bits that `execute.run` would write, and a loader widen

The engine computes every piece straight into the memory of a parameter where types agree; where they do not,
or the model lies on a GPU, a piece of the output is held first, rounded as it would have been stored.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_core.checkpoint import merkle
from merge_core.checkpoint.source import ResidentSource
from merge_core.digest import ModelId
from merge_core.errors import Unmergeable
from merge_core.execute import Material
from merge_core.execute.materials import Materials
from merge_core.execute.pool import INLINE
from merge_core.execute.work import Work
from merge_core.operators import find
from merge_core.operators.base import Order, Traced, Value
from merge_core.plan import MergePlan, TensorPlan

_MOST_ORDERED = 1 << 27
"""Elements of task vectors whose order is kept: 512 MiB."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """Where a parameter lies, and its bytes."""

    address: int
    memory: memoryview


class LiveModel:
    """A transformers model that merges are written into, one after the other; each replaces the last."""

    def __init__(self, model: Any) -> None:
        """Take over a model; its parameters get memory of their own, which nothing else may map."""
        self.model = model
        with torch.no_grad():
            for parameter in _tensors(model).values():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self._targets = _tensors(model)
        self._held = bytearray()
        self._inputs: tuple[Material, ...] = ()
        self._materials: Materials | None = None
        self._works: dict[tuple[int, str], Work] = {}
        self._outputs: dict[str, _Output] = {}
        self._measured: dict[tuple[int, str], tuple[_Seen, Traced]] = {}
        self._orders: dict[tuple[Hashable, Hashable], Order] = {}
        self._room_for_orders = _MOST_ORDERED

    def fill(self, plan: MergePlan, inputs: Sequence[Material]) -> bool:
        """Make the model what a plan makes of its inputs; whether every number of it is finite.

        Where one is not, the model holds part of the merge. Raises Unmergeable where the plan makes another
        kind of model, CorruptCheckpoint where an input was written to.
        """
        materials = self._taken_up(plan, inputs)
        for step, made in enumerate(plan.steps):
            for tensor in made.tensors:
                self._measure(materials, plan, step, tensor)
        sound = all(self._fill(materials, len(plan.steps) - 1, tensor) for tensor in plan.tensors)
        for item in inputs:
            if isinstance(item.tensors, ResidentSource):
                item.tensors.expect_unchanged()
        return sound

    def _taken_up(self, plan: MergePlan, inputs: Sequence[Material]) -> Materials:
        """The materials of the last candidate where a plan varies its parameters alone; else new ones."""
        same = len(inputs) == len(self._inputs) and all(map(operator.is_, inputs, self._inputs))
        if not same or self._materials is None or not self._materials.vary(plan):
            self._check(plan)
            self._materials, self._inputs = Materials(plan, inputs), tuple(inputs)
            self._works.clear()
        return self._materials

    def _work(self, materials: Materials, step: int, tensor: TensorPlan) -> Work:
        """The work on a tensor: the last candidate's, where it lasts."""
        work = self._works.get((step, tensor.name))
        if work is not None:
            work.vary(tensor)
            return work
        work = materials.work(step, tensor.name)
        if work.lasts:
            self._works[step, tensor.name] = work
        return work

    def _measure(self, materials: Materials, plan: MergePlan, step: int, tensor: TensorPlan) -> None:
        """Trace a tensor, or remember what was traced of it for the last candidate.

        Thresholds of ties, for one, follow from densities alone, and finding them costs more than merging.
        """
        known = _seen_by_measure(plan, step, tensor)
        if known is None:
            materials.measured(step, tensor.name, INLINE)
            return
        seen, traced = self._measured.get((step, tensor.name), (None, None))
        if seen != known:
            # Whoever asks a second time goes on asking: then an order pays.
            orders = None if seen is None else partial(self._order, known.operands)
            work = self._work(materials, step, tensor)
            traced = materials.measured(step, tensor.name, INLINE, work=work, orders=orders)
            self._measured[step, tensor.name] = known, traced
            return
        materials.measured(step, tensor.name, INLINE, known=traced)

    def _order(
        self, operands: Hashable, by: Hashable, length: int, make: Callable[[], Order]
    ) -> Order | None:
        """The order of a tensor, while there is room for it."""
        if (operands, by) not in self._orders:
            if length > self._room_for_orders:
                return None
            self._orders[operands, by] = make()
            self._room_for_orders -= length
        return self._orders[operands, by]

    def _fill(self, materials: Materials, step: int, tensor: TensorPlan) -> bool:
        target = self._targets[tensor.name]
        work = self._work(materials, step, tensor)
        traced = materials.traced(step, tensor.name)
        straight = target.device.type == "cpu" and target.dtype == _DTYPES.get(tensor.dtype)
        out = self._memory(tensor.name, target) if straight else self._room(tensor.info.length)
        size = work.leaves_per_piece * merkle.LEAF_SIZE
        for piece in range(work.pieces):
            start = piece * size
            if not work.compute(piece, traced, out[start : start + work.piece_bytes(piece)]):
                return False
        if not straight:
            stored = torch.frombuffer(out, dtype=_DTYPES[tensor.dtype]).reshape(tensor.shape)
            with torch.no_grad():
                target.copy_(stored)
        return True

    def _memory(self, name: str, target: Tensor) -> memoryview:
        """The memory of a parameter, which who evaluates it may have replaced."""
        known = self._outputs.get(name)
        if known is None or known.address != target.data_ptr():
            known = self._outputs[name] = _Output(address=target.data_ptr(), memory=_bytes(target))
        return known.memory

    def _room(self, length: int) -> memoryview:
        if len(self._held) < length:
            self._held = bytearray(length)
        return memoryview(self._held)[:length]

    def _check(self, plan: MergePlan) -> None:
        made = {tensor.name: tensor.shape for tensor in plan.tensors}
        mine = {name: tuple(target.shape) for name, target in self._targets.items()}
        tied = _aliases(self._targets)
        odd = [name for name, shape in made.items() if mine.get(name) != shape]
        # Of a tied head and its embedding exactly one is made: two would be written to the same memory.
        odd += [name for name in mine if len(tied[name] & made.keys()) != 1]
        odd += [tensor.name for tensor in plan.tensors if tensor.dtype not in _DTYPES]
        if odd:
            raise Unmergeable(
                f"{min(odd)}: the merge makes another kind of model than can be run here",
                hint="evolve models that transformers loads as they are stored",
            )


@dataclass(frozen=True, slots=True)
class _Seen:
    """What decides what is measured of a tensor."""

    operator: str
    operands: tuple[tuple[ModelId, str], ...]
    parameters: Mapping[str, Value]


def _seen_by_measure(plan: MergePlan, step: int, tensor: TensorPlan) -> _Seen | None:
    """All that decides what is measured of a tensor; None where that is more than its own inputs say."""
    formula = find(tensor.operator)
    if formula.measure is None or formula.chance or plan.steps[step].tokenizer is not None:
        return None
    if any(operand.source >= len(plan.inputs) for operand in tensor.operands):
        return None
    operands = tuple((plan.inputs[operand.source], operand.tensor) for operand in tensor.operands)
    seen = {name: value for name, value in tensor.parameters.items() if name not in formula.unmeasured}
    return _Seen(formula.name, operands, seen)


def _tensors(model: Any) -> Mapping[str, Tensor]:
    """What a checkpoint of a model holds, by name: the live tensors themselves."""
    found: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    return found


def _aliases(targets: Mapping[str, Tensor]) -> Mapping[str, set[str]]:
    """The names that each tensor goes by: a tied head is the embedding."""
    by: dict[int, set[str]] = {}
    for name, target in targets.items():
        by.setdefault(id(target), set()).add(name)
    return {name: by[id(target)] for name, target in targets.items()}


def _bytes(target: Tensor) -> memoryview:
    flat: NDArray[np.uint8] = target.detach().view(-1).view(torch.uint8).numpy()
    return flat.data
