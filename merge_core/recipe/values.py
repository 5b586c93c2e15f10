"""The values of a recipe: the Recipe, its Merges, their Slices, and the Inputs of a slice.

They have been checked for sense, not yet against any checkpoint. A model is a reference: a line of text that
somebody else resolves, or the name of another merge of the same recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from merge_core.errors import InvalidRecipe
from merge_core.operators import find
from merge_core.operators.base import Operator, Value
from merge_core.recipe.settings import NOTHING, Plain, Settings, chosen, filters, interpolate, write
from merge_core.tokenizer import choice
from merge_core.tokenizer.choice import TokenizerChoice

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What `dtype` and `out_dtype` may say, and the safetensors name of each."""


def _nothing() -> Settings:
    return NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One model as it is listed; `layers` is (first, end), None where all of the model is meant."""

    model: str
    parameters: Settings = field(default_factory=_nothing)
    layers: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A run of layers of the result: what they are made of, one by one; `base` is in place of the merge's.

    A merge of whole models is one slice whose inputs have no layers.
    """

    inputs: tuple[Input, ...]
    parameters: Settings = field(default_factory=_nothing)
    base: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """One merge of a recipe: a method over slices that lie on each other; no `name` for the last one.

    `dtype` and `out_dtype` are safetensors names; `chat_template` is a name or text of tokenizer.templates.
    """

    method: str
    slices: tuple[Slice, ...]
    base: str | None = None
    name: str | None = None
    parameters: Settings = field(default_factory=_nothing)
    module_parameters: Settings = field(default_factory=_nothing)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerChoice | None = None
    chat_template: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether whole models are merged, and not layers of them."""
        return all(i.layers is None for part in self.slices for i in part.inputs)

    @property
    def models(self) -> tuple[str, ...]:
        """Every reference once, in order of use; a base that is not among the inputs comes first."""
        listed = [i.model for part in self.slices for i in part.inputs]
        unlisted = [self.base] if self.base is not None and self.base not in listed else []
        return tuple(dict.fromkeys([*unlisted, *listed]))

    @property
    def donor(self) -> str:
        """The reference whose config and tokenizer the result has: the base, else the first."""
        return self.base if self.base is not None else self.models[0]

    def base_of(self, part: Slice) -> str | None:
        """The base of a slice."""
        return self.base if part.base is None else part.base

    @property
    def single_base(self) -> str | None:
        """The base that all slices have; None where they have none, or several."""
        bases = {self.base_of(part) for part in self.slices}
        return bases.pop() if len(bases) == 1 else None

    def operator(self, part: Slice) -> Operator:
        """The operator of a slice: a method may have another one where there is a base."""
        named = find(self.method)
        return named if named.over_base is None or self.base_of(part) is None else named.over_base

    def operands(self, part: Slice) -> tuple[Input, ...]:
        """What a tensor of a slice is made of, in order: the base first where the operator needs one.

        A base that whole models are listed without takes part all the same, as in mergekit.
        """
        base, inputs = self.base_of(part), part.inputs
        if base is None:
            return inputs
        found = next((i for i in inputs if i.model == base), None)
        if not self.operator(part).needs_base:
            return inputs if found or not self.is_whole else (*inputs, Input(model=base))
        rest = tuple(i for i in inputs if i is not found)
        return (found or Input(model=base), *rest)

    def filters(self, part: Slice) -> frozenset[str]:
        """What filters look for in the names of a slice's tensors; without it names do not matter."""
        inputs = (i.parameters for i in part.inputs)
        return filters(*inputs, part.parameters, self.module_parameters, self.parameters)

    def speaks_of(self, name: str, part: Slice, of: Input | None) -> bool:
        """Whether anything is said of one setting, of an input where it has its own, for whatever tensors."""
        scopes = (part.parameters, self.module_parameters, self.parameters)
        return any(name in scope for scope in (scopes if of is None else (of.parameters, *scopes)))

    def value(self, name: str, part: Slice, of: Input | None, tensor: str, depth: float) -> Value | None:
        """What is said of one setting for one tensor of a slice, its default included.

        `of` is the input, for a setting that each has; `depth` runs from 0, the slice's first layer, to 1.
        None where the setting is required and nothing that was written covers this tensor.
        """
        found = self.stated(name, part, of, tensor)
        return interpolate(found, depth) if isinstance(found, tuple) else found

    def stated(self, name: str, part: Slice, of: Input | None, tensor: str) -> Plain | None:
        """The value or the gradient that `value` goes by."""
        scopes = (part.parameters, self.module_parameters, self.parameters)
        for scope in scopes if of is None else (of.parameters, *scopes):
            value = chosen(scope[name], tensor) if name in scope else None
            if value is not None:
                return value
        declared = self.operator(part).parameter(name)
        return declared.default if declared else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe file: merges, each after those whose results it uses; the last makes the model."""

    merges: tuple[Merge, ...]

    @property
    def names(self) -> frozenset[str]:
        """The names of results that are used within the recipe."""
        return frozenset(m.name for m in self.merges if m.name is not None)

    @property
    def models(self) -> tuple[str, ...]:
        """Every reference to a model that this recipe does not make, once, in order of use."""
        used = [model for merge in self.merges for model in merge.models]
        return tuple(dict.fromkeys(model for model in used if model not in self.names))

    @property
    def methods(self) -> str:
        """The methods as people read them, in order, each once."""
        return " → ".join(dict.fromkeys(merge.method for merge in self.merges))

    def to_yaml(self) -> str:
        """The recipe as mergekit reads it: what goes into `mergekit_config.yml`."""
        documents = map(_document, self.merges)
        return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)


def rename(recipe: Recipe, mapping: Mapping[str, str]) -> Recipe:
    """Replace references, paths by model ids for instance; those that `mapping` lacks stay.

    Raises InvalidRecipe when two references become one.
    """
    known = {model: mapping.get(model, model) for model in recipe.models}
    targets = [*known.values(), *recipe.names]
    repeated = [model for model, target in known.items() if targets.count(target) > 1]
    if repeated:
        raise InvalidRecipe(
            f"{' and '.join(repeated)} name the same model",
            hint="call each model by one name, then: weft plan RECIPE",
        )

    def new(model: str | None) -> str | None:
        return None if model is None else known.get(model, model)

    def renamed(part: Slice) -> Slice:
        inputs = tuple(replace(i, model=known.get(i.model, i.model)) for i in part.inputs)
        return replace(part, inputs=inputs, base=new(part.base))

    return Recipe(
        merges=tuple(
            replace(
                merge,
                base=new(merge.base),
                slices=tuple(map(renamed, merge.slices)),
                tokenizer=merge.tokenizer and choice.rename(merge.tokenizer, known),
            )
            for merge in recipe.merges
        )
    )


def _document(merge: Merge) -> dict[str, Any]:
    head = {"name": merge.name, "merge_method": merge.method, "base_model": merge.base}
    made: dict[str, Any] = {}
    if merge.is_whole:
        made["models"] = [_input(i) for i in merge.slices[0].inputs]
    else:
        made["slices"] = [_slice(part) for part in merge.slices]
    if merge.module_parameters:
        made = {"modules": {"default": made | write(merge.module_parameters)}}
    spelled = {short: long for long, short in DTYPES.items()}
    tail = {
        "dtype": merge.dtype and spelled[merge.dtype],
        "out_dtype": merge.out_dtype and spelled[merge.out_dtype],
    }
    tokens = {} if merge.tokenizer is None else merge.tokenizer.to_value()
    value = head | made | write(merge.parameters) | tail | tokens | {"chat_template": merge.chat_template}
    return {key: item for key, item in value.items() if item is not None}


def _slice(part: Slice) -> dict[str, Any]:
    base = {} if part.base is None else {"base_model": part.base}
    return {"sources": [_input(i) for i in part.inputs]} | base | write(part.parameters)


def _input(item: Input) -> dict[str, Any]:
    layers = {} if item.layers is None else {"layer_range": list(item.layers)}
    return {"model": item.model} | layers | write(item.parameters)
