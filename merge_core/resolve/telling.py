"""Whether a recipe that was published beside a plan tells of that plan, as far as no header is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from merge_core.checkpoint.layout import around_layer
from merge_core.operators import COPY
from merge_core.plan import MergePlan, Step, TensorPlan
from merge_core.recipe import Merge, Recipe, Slice
from merge_core.tokenizer import resolve as tokens
from merge_core.tokenizer import templates

_Taken: TypeAlias = list[tuple[int, int | None]]
"""The sources that a tensor is made of, in order, and the layers there."""


def numbered(recipe: Recipe) -> dict[str, int]:
    """The number of every model and of every merge that has a name, as operands count them."""
    models = (*recipe.models, *(merge.name for merge in recipe.merges if merge.name is not None))
    return {model: number for number, model in enumerate(models)}


def tells_of(recipe: Recipe, plan: MergePlan) -> bool:
    """Whether a recipe that calls models by ModelId tells of this plan.

    That is: its inputs, and of each step its base, its donor, its tokens and, tensor by tensor, the
    operator, the models and the layers. What its parameters are in numbers depends on headers.
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
    return all(_is_made_so(merge, tensor, sources) for tensor in step.tensors)


def _made(merge: Merge, layer: int | None) -> list[tuple[Slice, int | None]]:
    """The slices that may make a layer of the output, or what has none, and how far above their first."""
    if merge.is_whole or layer is None:
        return [(merge.slices[0], layer), (merge.slices[-1], layer)]
    below = 0
    for part in merge.slices:
        first, end = part.inputs[0].layers or (0, 0)
        if layer < below + end - first:
            return [(part, layer - below)]
        below += end - first
    return []


def _is_made_so(merge: Merge, tensor: TensorPlan, sources: Mapping[str, int]) -> bool:
    taken = [(operand.source, _layer(operand.tensor)) for operand in tensor.operands]
    for part, offset in _made(merge, _layer(tensor.name)):
        said: _Taken = [
            (sources[i.model], offset if i.layers is None or offset is None else i.layers[0] + offset)
            for i in merge.operands(part)
        ]
        if taken == said and tensor.operator == merge.operator(part).name:
            return True
        if tensor.operator == COPY.name and taken[0] in said:
            return True
    return False


def _layer(name: str) -> int | None:
    found = around_layer(name)
    return None if found is None else found[1]
