"""The Recipe: what a person wrote, in mergekit's YAML, for the methods of this engine.

    merge_method: task_arithmetic
    base_model: ./base
    models:
      - model: ./math
        parameters: {weight: 1.0}
      - model: ./code
        parameters: {weight: [0.2, 1.0]}          # a gradient over the layers
    parameters: {lambda: 0.8}
    dtype: bfloat16

Kept from mergekit: a setting is a scalar, a gradient or a list of {filter, value}; the narrowest scope that
says something about a tensor wins (model, then slice, then whole merge). Refused by name: everything that
would be ignored or understood otherwise. `parse` lists all faults of a text at once, and
`parse(recipe.to_yaml()) == recipe`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import yaml

from merge_core import plain_yaml
from merge_core.errors import InvalidRecipe
from merge_core.operators import find, names
from merge_core.operators.base import Operator, Parameter, Value

MAX_RECIPE = 1 << 20
MAX_MODELS = 64
MAX_LIST = 1024
MAX_TEXT = 1024

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What `dtype` and `out_dtype` may say, and the safetensors name of each."""

IGNORED = frozenset({"int8_mask"})
"""Settings of mergekit's that only trade its memory for speed; they do not change the result here."""

_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
)
_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditional:
    """One entry of a {filter, value} list; no filter or `*` means every tensor, else those containing it."""

    filter: str | None
    value: float | bool | tuple[float, ...]


Setting: TypeAlias = float | bool | tuple[float, ...] | tuple[Conditional, ...]
Settings: TypeAlias = Mapping[str, Setting]


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One model as it is listed; `layer_range` is (first, end) where the recipe is written as a slice."""

    model: str
    parameters: Settings
    layer_range: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A merge as it was asked for: checked for sense, not yet against any checkpoint.

    `dtype` and `out_dtype` are safetensors names; `tokenizer` is the reference that the recipe names for it.
    """

    method: str
    base: str | None
    inputs: tuple[Input, ...]
    parameters: Settings
    slice_parameters: Settings
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: str | None = None

    @property
    def operator(self) -> Operator:
        """The declaration of the method."""
        return find(self.method)

    @property
    def models(self) -> tuple[str, ...]:
        """Every reference once, in order; the base comes first where it is not among the models."""
        listed = tuple(i.model for i in self.inputs)
        return listed if self.base is None or self.base in listed else (self.base, *listed)

    @property
    def experts(self) -> tuple[str, ...]:
        """The references that the operator takes beside the base, in order."""
        return tuple(m for m in self.models if not (self.operator.needs_base and m == self.base))

    @property
    def donor(self) -> str:
        """The reference whose config, tokenizer and tensor names the result has: the base, else the first."""
        return self.base if self.base is not None else self.models[0]

    def value(self, name: str, model: str | None, tensor: str, depth: float) -> Value | None:
        """What the recipe says about one setting for one tensor, its default included.

        `model` is the expert for a setting that each has; `depth` runs from 0, the first layer, to 1.
        None where the setting is required and nothing that was written covers this tensor.
        """
        scopes = [i.parameters for i in self.inputs if i.model == model]
        for scope in (*scopes, self.slice_parameters, self.parameters):
            value = _evaluate(scope[name], tensor, depth) if name in scope else None
            if value is not None:
                return value
        declared = self.operator.parameter(name)
        return declared.default if declared else None

    def to_yaml(self) -> str:
        """The recipe as mergekit reads it: what goes into `mergekit_config.yml`."""
        names = {short: long for long, short in DTYPES.items()}
        items = [_write_input(i) for i in self.inputs]
        value: dict[str, Any] = {"merge_method": self.method}
        if self.base is not None:
            value["base_model"] = self.base
        if any(i.layer_range for i in self.inputs):
            value["slices"] = [{"sources": items} | _write_settings(self.slice_parameters)]
        else:
            value["models"] = items
        value |= _write_settings(self.parameters)
        value |= {
            key: names[dtype]
            for key, dtype in (("dtype", self.dtype), ("out_dtype", self.out_dtype))
            if dtype is not None
        }
        if self.tokenizer is not None:
            value["tokenizer_source"] = "base" if self.tokenizer == self.base else self.tokenizer
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def rename(recipe: Recipe, mapping: Mapping[str, str]) -> Recipe:
    """Replace references, paths by model ids for instance; those that `mapping` lacks stay.

    Raises InvalidRecipe when two references become one.
    """
    base = None if recipe.base is None else mapping.get(recipe.base, recipe.base)
    renamed = tuple(replace(i, model=mapping.get(i.model, i.model)) for i in recipe.inputs)
    if len({i.model for i in renamed}) < len(renamed):
        raise InvalidRecipe(
            "two references name the same model", hint="list each model once, then: weft plan RECIPE"
        )
    tokenizer = None if recipe.tokenizer is None else mapping.get(recipe.tokenizer, recipe.tokenizer)
    return replace(recipe, base=base, inputs=renamed, tokenizer=tokenizer)


def parse(text: str) -> Recipe:
    """Read a recipe; raises InvalidRecipe whose message lists every fault, one a line."""
    if len(text) > MAX_RECIPE:
        raise InvalidRecipe(f"a recipe of {len(text)} characters; at most {MAX_RECIPE} are read")
    try:
        value = plain_yaml.parse(text)
    except ValueError as error:
        raise InvalidRecipe(f"the recipe is not YAML: {error}", hint="weft merge --help") from error
    faults = _Faults()
    recipe = _Reader(faults).recipe(value)
    if faults.found or recipe is None:
        raise InvalidRecipe("\n".join(faults.found), hint="correct the recipe and run: weft plan RECIPE")
    return recipe


class _Faults:
    """What is wrong with a recipe so far."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, fault: str) -> None:
        if fault not in self.found:
            self.found.append(fault)


class _Reader:
    """Turn the YAML value into a Recipe; faults are collected, never raised."""

    def __init__(self, faults: _Faults) -> None:
        self._faults = faults

    def recipe(self, value: Any) -> Recipe | None:
        if not isinstance(value, dict):
            self._faults.add("a recipe is a mapping with the keys merge_method and models")
            return None
        for key in value:
            if key not in _KEYS:
                self._faults.add(f"{key[:80]}: not supported")
        operator = self._operator(value.get("merge_method"))
        base = self._reference("base_model", value["base_model"]) if value.get("base_model") else None
        inputs, slice_parameters = self._inputs(value, operator)
        recipe = Recipe(
            method=operator.name if operator else "",
            base=base,
            inputs=inputs,
            parameters=self._settings("parameters", value.get("parameters"), operator, None),
            slice_parameters=slice_parameters,
            dtype=self._dtype("dtype", value.get("dtype")),
            out_dtype=self._dtype("out_dtype", value.get("out_dtype")),
        )
        if operator is None or not inputs:
            return None
        self._check_models(recipe, operator)
        return replace(recipe, tokenizer=self._tokenizer(value.get("tokenizer_source"), recipe))

    def _operator(self, method: Any) -> Operator | None:
        known = names()
        if isinstance(method, str) and method in known:
            return find(method)
        if method is None:
            self._faults.add(f"merge_method is missing; it is one of: {', '.join(known)}")
        else:
            self._faults.add(
                f"merge_method {str(method)[:80]}: not supported; it is one of: {', '.join(known)}"
            )
        return None

    def _reference(self, where: str, value: Any) -> str | None:
        if not isinstance(value, str) or not value or len(value) > MAX_TEXT or not value.isprintable():
            self._faults.add(f"{where}: a model is named by one line of text")
            return None
        if "+" in value:
            self._faults.add(f"{where}: adapters (model+adapter) are not supported: {value}")
        return value

    def _inputs(self, value: dict[str, Any], operator: Operator | None) -> tuple[tuple[Input, ...], Settings]:
        if ("models" in value) == ("slices" in value):
            self._faults.add("a recipe has either models or slices")
            return (), _settings({})
        if "models" in value:
            return self._list("models", value["models"], {"model", "parameters"}, operator), _settings({})
        slices = value["slices"]
        if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
            self._faults.add("slices: exactly one slice is supported, which covers every layer")
            return (), _settings({})
        for key in slices[0].keys() - {"sources", "parameters"}:
            self._faults.add(f"slices: {key[:80]}: not supported")
        allowed = {"model", "layer_range", "parameters"}
        inputs = self._list("slices: sources", slices[0].get("sources"), allowed, operator)
        if len({i.layer_range for i in inputs}) > 1 or any(i.layer_range is None for i in inputs):
            self._faults.add("slices: every source needs the same layer_range")
        return inputs, self._settings("slices: parameters", slices[0].get("parameters"), operator, None)

    def _list(
        self, where: str, value: Any, allowed: set[str], operator: Operator | None
    ) -> tuple[Input, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_MODELS:
            self._faults.add(f"{where}: a list of 1 to {MAX_MODELS} models is needed")
            return ()
        inputs = []
        for position, item in enumerate(value):
            if not isinstance(item, dict):
                self._faults.add(f"{where}[{position}]: a mapping with the key model is needed")
                continue
            for key in item.keys() - allowed:
                self._faults.add(f"{where}[{position}]: {key[:80]}: not supported")
            model = self._reference(f"{where}[{position}]: model", item.get("model"))
            if model is not None:
                settings = self._settings(f"{model}: parameters", item.get("parameters"), operator, model)
                layers = self._layer_range(model, item.get("layer_range"))
                inputs.append(Input(model=model, parameters=settings, layer_range=layers))
        return tuple(inputs)

    def _layer_range(self, model: str, value: Any) -> tuple[int, int] | None:
        if value is None:
            return None
        if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n >= 0 for n in value):
            return value[0], value[1]
        self._faults.add(f"{model}: layer_range is a pair of layer numbers, [first, end]")
        return None

    def _settings(self, where: str, value: Any, operator: Operator | None, model: str | None) -> Settings:
        if value is None:
            return _settings({})
        if not isinstance(value, dict):
            self._faults.add(f"{where}: a mapping is needed")
            return _settings({})
        settings: dict[str, Setting] = {}
        for name, item in value.items():
            if name in IGNORED or operator is None:
                continue
            declared = operator.parameter(name)
            if declared is None:
                if not (name == "rescale" and item is False):
                    self._faults.add(f"{where}: {name[:80]}: not a setting of {operator.name}")
            elif model is not None and not declared.each:
                self._faults.add(f"{where}: {name} holds for the whole merge; write it under parameters")
            else:
                setting = self._setting(f"{where}: {name}", item, declared)
                if setting is not None:
                    settings[name] = setting
        return _settings(settings)

    def _setting(self, where: str, value: Any, declared: Parameter) -> Setting | None:
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            if len(value) > MAX_LIST:
                self._faults.add(f"{where}: at most {MAX_LIST} entries are read")
                return None
            entries = [self._conditional(where, item, declared) for item in value]
            return tuple(entry for entry in entries if entry is not None)
        return self._plain(where, value, declared)

    def _conditional(self, where: str, item: dict[str, Any], declared: Parameter) -> Conditional | None:
        pattern = item.get("filter")
        if item.keys() - {"filter", "value"} or "value" not in item:
            self._faults.add(f"{where}: an entry has the keys filter and value")
            return None
        if pattern is not None and (not isinstance(pattern, str) or len(pattern) > MAX_TEXT):
            self._faults.add(f"{where}: a filter is text that tensor names contain")
            return None
        value = self._plain(where, item["value"], declared)
        return None if value is None else Conditional(filter=pattern, value=value)

    def _plain(self, where: str, value: Any, declared: Parameter) -> float | bool | tuple[float, ...] | None:
        if declared.flag:
            if isinstance(value, bool):
                return value
            self._faults.add(f"{where}: true or false is needed")
            return None
        if isinstance(value, list):
            if not 1 <= len(value) <= MAX_LIST:
                self._faults.add(f"{where}: a gradient has 1 to {MAX_LIST} numbers")
                return None
            numbers = [self._number(where, item, declared) for item in value]
            return tuple(n for n in numbers if n is not None)
        return self._number(where, value, declared)

    def _number(self, where: str, value: Any, declared: Parameter) -> float | None:
        # YAML 1.1 reads 1e-3 as text, and 010 as eight: that one nobody should write.
        if isinstance(value, str) and len(value) < 64 and _NUMBER.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 2**63:
            self._faults.add(f"{where}: a number is needed")
            return None
        if not math.isfinite(value):
            self._faults.add(f"{where}: a finite number is needed")
            return None
        fault = declared.fault(float(value))
        if fault:
            self._faults.add(f"{where}: {fault}")
        return float(value)

    def _dtype(self, key: str, value: Any) -> str | None:
        if value is None:
            return None
        if isinstance(value, str) and value in DTYPES:
            return DTYPES[value]
        self._faults.add(f"{key} {str(value)[:80]}: not supported; it is one of: {', '.join(DTYPES)}")
        return None

    def _tokenizer(self, value: Any, recipe: Recipe) -> str | None:
        if value is None:
            return None
        if (value == "base" and recipe.base is not None) or value == recipe.donor:
            return recipe.donor
        self._faults.add(
            f"tokenizer_source {str(value)[:80]}: not supported; the tokenizer is that of {recipe.donor}"
        )
        return None

    def _check_models(self, recipe: Recipe, operator: Operator) -> None:
        listed = [i.model for i in recipe.inputs]
        for model in sorted({m for m in listed if listed.count(m) > 1}):
            self._faults.add(f"{model} is listed twice")
        if operator.needs_base and recipe.base is None:
            self._faults.add(f"{operator.name} needs a base_model")
            return
        if not operator.needs_base and recipe.base is not None and recipe.base not in listed:
            self._faults.add(
                f"{operator.name} gives base_model no weight: list it under models, or leave it out"
            )
        least, most = operator.experts
        noun = "model" if least == 1 else "models"
        count, beside = len(recipe.experts), " beside its base" if operator.needs_base else ""
        if count < least or (most is not None and count > most):
            bound = f"exactly {least}" if most == least else f"at least {least}"
            self._faults.add(f"{operator.name} takes {bound} {noun}{beside}; there are {count}")


def _settings(settings: Mapping[str, Setting]) -> Settings:
    return MappingProxyType(dict(settings))


def _evaluate(setting: Setting, tensor: str, depth: float) -> Value | None:
    """The value of a setting for one tensor; None where no filter takes it."""
    if not isinstance(setting, tuple):
        return setting
    for entry in setting:
        if not isinstance(entry, Conditional):
            return _interpolate(tuple(n for n in setting if not isinstance(n, Conditional)), depth)
        if entry.filter is None or entry.filter == "*" or entry.filter in tensor:
            return _evaluate(entry.value, tensor, depth)
    return None


def _interpolate(gradient: tuple[float, ...], depth: float) -> float:
    """The value at `depth` (0 to 1) on the straight lines between evenly spaced points."""
    scaled = depth * (len(gradient) - 1)
    low = int(scaled)
    high = min(len(gradient) - 1, low + 1)
    fraction = scaled - low
    return (1 - fraction) * gradient[low] + fraction * gradient[high]


def _write_input(item: Input) -> dict[str, Any]:
    layers = {"layer_range": list(item.layer_range)} if item.layer_range else {}
    return {"model": item.model} | layers | _write_settings(item.parameters)


def _write_settings(settings: Settings) -> dict[str, Any]:
    written = {name: _write_setting(setting) for name, setting in settings.items()}
    return {"parameters": written} if written else {}


def _write_setting(setting: Setting) -> Any:
    if not isinstance(setting, tuple):
        return setting
    return [
        ({} if item.filter is None else {"filter": item.filter}) | {"value": _write_setting(item.value)}
        if isinstance(item, Conditional)
        else item
        for item in setting
    ]
