"""Candidates: merges in the memory of a live model, tensor by tensor, without a checkpoint.

    live = LiveModel(load_any(base))
    live.fill(plan, inputs)          # the bits that `execute.run` would write, and a loader widen

The engine computes every piece straight into the memory of a parameter where types agree; where they do not,
or the model lies on a GPU, a piece of the output is held first, rounded as it would have been stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_core.checkpoint import merkle
from merge_core.errors import Unmergeable
from merge_core.execute import Material
from merge_core.execute.materials import Materials
from merge_core.execute.pool import INLINE
from merge_core.operators import find
from merge_core.operators.base import Traced
from merge_core.plan import MergePlan, TensorPlan

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        self._measured: dict[tuple[int, str], tuple[Any, Traced]] = {}

    def fill(self, plan: MergePlan, inputs: Sequence[Material]) -> bool:
        """Make the model what a plan makes of its inputs; whether every number of it is finite.

        Where one is not, the model holds part of the merge. Raises Unmergeable where the plan makes another
        kind of model.
        """
        self._check(plan)
        materials = Materials(plan, inputs)
        for step, made in enumerate(plan.steps):
            for tensor in made.tensors:
                self._measure(materials, plan, step, tensor)
        return all(self._fill(materials, len(plan.steps) - 1, tensor) for tensor in plan.tensors)

    def _measure(self, materials: Materials, plan: MergePlan, step: int, tensor: TensorPlan) -> None:
        """Trace a tensor, or remember what was traced of it for the last candidate.

        Thresholds of ties, for one, follow from densities alone, and finding them costs more than merging.
        """
        known = _seen_by_measure(plan, step, tensor)
        if known is None:
            materials.measured(step, tensor.name, INLINE)
            return
        seen, traced = self._measured.get((step, tensor.name), (None, None))
        found = materials.measured(step, tensor.name, INLINE, known=traced if seen == known else None)
        self._measured[step, tensor.name] = known, found

    def _fill(self, materials: Materials, step: int, tensor: TensorPlan) -> bool:
        target = self._targets[tensor.name]
        work = materials.work(step, tensor.name)
        traced = materials.traced(step, tensor.name)
        straight = target.device.type == "cpu" and target.dtype == _DTYPES.get(tensor.dtype)
        out = _bytes(target) if straight else self._room(tensor.info.length)
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


def _seen_by_measure(plan: MergePlan, step: int, tensor: TensorPlan) -> Any:
    """All that decides what is measured of a tensor; None where that is more than its own inputs say."""
    operator = find(tensor.operator)
    earlier = any(operand.source >= len(plan.inputs) for operand in tensor.operands)
    if operator.measure is None or operator.chance or earlier or plan.steps[step].tokenizer is not None:
        return None
    operands = [(plan.inputs[operand.source], operand.tensor) for operand in tensor.operands]
    seen = {name: value for name, value in tensor.parameters.items() if name not in operator.unmeasured}
    return operator.name, operands, seen


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
