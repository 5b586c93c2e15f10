"""Whether a recipe that was published beside a plan tells of that plan, as far as no header is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from merge_core.checkpoint import dtypes
from merge_core.checkpoint.layout import around_layer
from merge_core.operators import COPY
from merge_core.operators.base import Value
from merge_core.operators.passthrough import PASSTHROUGH
from merge_core.plan import MergePlan, Step, TensorPlan
from merge_core.recipe import Merge, Recipe, Slice
from merge_core.recipe.settings import Plain
from merge_core.tokenizer import resolve as tokens
from merge_core.tokenizer import templates

_Taken: TypeAlias = list[tuple[int, int | None]]
"""The sources that a tensor is made of, in order, and the layers there."""
_Stated: TypeAlias = list[list[Plain | None]]
"""What is said of each parameter of an operator: for all experts, or for each."""

_MAX_LOOKS = 1 << 25
"""Filters times names: a recipe with more of them was not written to be read."""
_ROUNDING = 2.0**-40


def numbered(recipe: Recipe) -> dict[str, int]:
    """The number of every model and of every merge that has a name, as operands count them."""
    models = (*recipe.models, *(merge.name for merge in recipe.merges if merge.name is not None))
    return {model: number for number, model in enumerate(models)}


def tells_of(recipe: Recipe, plan: MergePlan) -> bool:
    """Whether a recipe that calls models by ModelId tells of this plan.

    That is: its inputs, and of each step its base, its donor, its tokens and, tensor by tensor, the operator,
    the models, the layers, the type and the parameters. How far along a gradient a layer lies, and the type
    where none is said, depend on headers.
    """
    if recipe.models != plan.inputs or len(recipe.merges) != len(plan.steps):
        return False
    sources = numbered(recipe)
    return all(_tells_of(merge, step, sources) for merge, step in zip(recipe.merges, plan.steps, strict=True))


def _tells_of(merge: Merge, step: Step, sources: Mapping[str, int]) -> bool:
    base = merge.single_base
    if step.base != (None if base is None else sources[base]) or step.donor != sources[merge.donor]:
        return False
    models = {model: sources[model] for model in (merge.donor, *merge.models)}
    if not tokens.tells_of(merge.tokenizer, step.tokenizer, models):
        return False
    if not templates.tells_of(merge.chat_template, step.chat_template):
        return False
    parts = [_Part(merge, part, sources) for part in merge.slices]
    looks = max(len(part.filters) for part in parts) * sum(len(t.operands) for t in step.tensors)
    return looks <= _MAX_LOOKS and all(_is_made_so(parts, tensor) for tensor in step.tensors)


def _is_made_so(parts: list[_Part], tensor: TensorPlan) -> bool:
    layer, below = _layer(tensor.name), 0
    if layer is None or parts[0].layers is None:
        return any(part.makes(tensor, layer) for part in (parts[0], parts[-1]))
    for part in parts:
        count = part.layers or 0
        if layer < below + count:
            return part.makes(tensor, layer - below)
        below += count
    return False


class _Part:
    """A slice, and what it says of tensors; of settings once for all that its filters do not tell apart.

    `layers` is how many it has, None where whole models are merged.
    """

    def __init__(self, merge: Merge, part: Slice, sources: Mapping[str, int]) -> None:
        self.layers = None if (first := part.inputs[0].layers) is None else first[1] - first[0]
        self.filters = tuple(sorted(merge.filters(part)))
        self._merge, self._slice = merge, part
        self._operator, self._operands = merge.operator(part), merge.operands(part)
        self._sources = [sources[item.model] for item in self._operands]
        base = merge.base_of(part)
        self._leader = next((at for at, item in enumerate(self._operands) if item.model == base), 0)
        self._dtype = merge.out_dtype or merge.dtype
        self._known: dict[tuple[bool, ...], _Stated] = {}

    def makes(self, tensor: TensorPlan, offset: int | None) -> bool:
        """Whether a tensor, in a layer so far above the first of the slice, is made as the slice says."""
        taken = [(operand.source, _layer(operand.tensor)) for operand in tensor.operands]
        said: _Taken = [
            (source, offset if i.layers is None or offset is None else i.layers[0] + offset)
            for source, i in zip(self._sources, self._operands, strict=True)
        ]
        if tensor.dtype not in dtypes.MERGEABLE:
            return tensor.operator == COPY.name and taken == [said[self._leader]]
        if taken != said or self._dtype not in (None, tensor.dtype):
            return False
        if tensor.operator == COPY.name:
            return self._operator is PASSTHROUGH and self._gives(tensor, {"scale": (1.0,)})
        return tensor.operator == self._operator.name and self._gives(tensor, tensor.parameters)

    def _gives(self, tensor: TensorPlan, parameters: Mapping[str, Value]) -> bool:
        """Whether the slice gives a tensor these parameters."""
        # Outside of the layers a tensor may stand in for another, whose name filters go by.
        within = _layer(tensor.name) is not None
        names = [operand.tensor if within else tensor.name for operand in tensor.operands]
        found = tuple(text in name for name in (tensor.name, *names) for text in self.filters)
        if found not in self._known:
            self._known[found] = self._stated(tensor.name, names)
        return all(
            len(stated) == len(values) and all(map(_lies_on, values, stated))
            for stated, values in zip(self._known[found], map(_listed, parameters.values()), strict=True)
        )

    def _stated(self, name: str, names: list[str]) -> _Stated:
        """What is said of every parameter, in the order of the operator's declarations."""
        experts = list(zip(self._operands, names, strict=True))[self._operator.needs_base :]
        return [
            [self._merge.stated(p.name, self._slice, i, n) for i, n in experts]
            if p.each
            else [self._merge.stated(p.name, self._slice, None, name)]
            for p in self._operator.parameters
        ]


def _lies_on(value: bool | float, stated: Plain | None) -> bool:
    """Whether a value is what was stated, or lies on that gradient."""
    if not isinstance(stated, tuple):
        return value == stated
    rounding = _ROUNDING * max(map(abs, stated))
    return min(stated) - rounding <= value <= max(stated) + rounding


def _listed(value: Value) -> tuple[bool | float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _layer(name: str) -> int | None:
    found = around_layer(name)
    return None if found is None else found[1]
