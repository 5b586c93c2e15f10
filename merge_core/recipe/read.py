"""Reading a recipe: YAML to values, every fault at once, each with the place where it stands."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from merge_core import plain_yaml
from merge_core.errors import InvalidRecipe
from merge_core.operators import find, names
from merge_core.operators.base import Operator
from merge_core.recipe import settings
from merge_core.recipe.graph import in_order
from merge_core.recipe.settings import NOTHING, Settings
from merge_core.recipe.values import DTYPES, Input, Merge, Recipe, Slice
from merge_core.tokenizer import choice, templates

MAX_RECIPE = 1 << 20
MAX_MERGES = 64
MAX_MODELS = 64
MAX_SLICES = 1024
MAX_LAYERS = 1_000_000
MAX_TEXT = 1024

_KEYS = frozenset(
    {"name", "merge_method", "base_model", "models", "slices", "modules"}
    | {"parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template"}
)
_HINT = "correct the recipe and run: weft plan RECIPE"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def parse(text: str) -> Recipe:
    """Read a recipe; raises InvalidRecipe whose message lists every fault, one a line."""
    if len(text) > MAX_RECIPE:
        raise InvalidRecipe(f"a recipe of {len(text)} characters; at most {MAX_RECIPE} are read")
    try:
        documents = plain_yaml.parse_all(text)
    except ValueError as error:
        raise InvalidRecipe(f"the recipe is not YAML: {error}", hint=_HINT) from error
    found: dict[str, None] = {}
    merges = _merges([d for d in documents if d is not None] or [None], found.setdefault)
    if found:
        raise InvalidRecipe("\n".join(found), hint=_HINT)
    return Recipe(merges=merges)


def _merges(documents: list[Any], fault: Callable[[str], None]) -> tuple[Merge, ...]:
    if len(documents) > MAX_MERGES:
        fault(f"{len(documents)} merges; at most {MAX_MERGES} are read")
        return ()
    merges = []
    for position, document in enumerate(documents, start=1):
        name = document.get("name") if isinstance(document, dict) else None
        whose = "" if len(documents) == 1 else f"{str(name)[:80] if name else f'merge {position}'}: "
        merge = _Reader(fault, whose).merge(document)
        if merge is not None:
            merges.append(merge)
    if len(merges) < len(documents):
        return ()
    ordered = in_order(merges, fault)
    models = len(Recipe(merges=ordered).models)
    if models > MAX_MODELS + 1:
        fault(f"{models} models; at most {MAX_MODELS + 1} are merged")
    return ordered


class _Reader:
    """Turn one YAML document into a Merge; faults are told, never raised."""

    def __init__(self, fault: Callable[[str], None], whose: str) -> None:
        """Tell faults to `fault`, each with `whose` before it."""
        self._tell = fault
        self._whose = whose

    def _fault(self, why: str) -> None:
        self._tell(self._whose + why)

    def merge(self, value: Any) -> Merge | None:
        if not isinstance(value, dict):
            self._fault("a recipe is a mapping with the keys merge_method and models")
            return None
        operator = self._operator(value.get("merge_method"))
        known = [parameter.name for parameter in operator.parameters] if operator else []
        for key in sorted(value.keys() & known):
            self._fault(f"{key} is a setting of {value['merge_method']}: write it under parameters")
        self._unknown(value, _KEYS.union(known), "")
        made = self._made(value)
        merge = Merge(
            name=self._name(value.get("name")),
            method=operator.name if operator else "",
            base=self._reference("base_model", value.get("base_model")),
            slices=self._slices(made, operator),
            parameters=self._settings("parameters", value, operator),
            module_parameters=NOTHING
            if made is value
            else self._settings("modules: default", made, operator),
            dtype=self._dtype("dtype", value.get("dtype")),
            out_dtype=self._dtype("out_dtype", value.get("out_dtype")),
            tokenizer=choice.read(value, self._fault, partial(self._reference, needed=True)),
            chat_template=templates.read(value.get("chat_template"), self._fault),
        )
        if operator is None or not all(part.inputs for part in merge.slices) or not merge.slices:
            return None
        for position, part in enumerate(merge.slices):
            self._check(merge, part, "" if merge.is_whole else f"slices[{position}]: ")
        return merge

    def _unknown(self, value: dict[str, Any], known: frozenset[str], where: str) -> None:
        for key in value:
            if key not in known:
                self._fault(f"{where}{key[:80]}: not supported{settings.meant(key, known)}")

    def _name(self, value: Any) -> str | None:
        if value is None or (isinstance(value, str) and _NAME.fullmatch(value)):
            return value
        self._fault(
            f"name {str(value)[:80]}: a merge is called by letters, digits, '.', '_' and '-', as no path is"
        )
        return None

    def _operator(self, method: Any) -> Operator | None:
        known = names()
        if isinstance(method, str) and method in known:
            return find(method)
        listed = f"it is one of: {', '.join(known)}"
        if method is None:
            self._fault(f"merge_method is missing; {listed}")
        else:
            likely = settings.meant(str(method), known)
            self._fault(f"merge_method {str(method)[:80]}: not supported{likely}; {listed}")
        return None

    def _reference(self, where: str, value: Any, *, needed: bool = False) -> str | None:
        if value is None and not needed:
            return None
        if not isinstance(value, str) or not value or len(value) > MAX_TEXT or not value.isprintable():
            self._fault(f"{where}: a model is named by one line of text")
            return None
        if "+" in value:
            self._fault(
                f"{where}: adapters (model+adapter) are not supported: {value}; "
                "save the model with its adapter merged in (merge_and_unload of peft)"
            )
        return value

    def _made(self, value: dict[str, Any]) -> dict[str, Any]:
        """The mapping that holds models or slices: the document, or its one module."""
        if len(value.keys() & {"models", "slices", "modules"}) != 1:
            self._fault("a recipe has either models or slices")
            return {}
        if "modules" not in value:
            return value
        modules = value["modules"]
        if not isinstance(modules, dict) or not isinstance(modules.get("default"), dict):
            self._fault("modules: only the module default is supported, with models or slices")
            return {}
        self._unknown(modules, frozenset({"default"}), "modules: ")
        made: dict[str, Any] = modules["default"]
        self._unknown(made, frozenset({"models", "slices", "parameters"}), "modules: default: ")
        if len(made.keys() & {"models", "slices"}) != 1:
            self._fault("modules: default: a module has either models or slices")
            return {}
        return made

    def _slices(self, made: dict[str, Any], operator: Operator | None) -> tuple[Slice, ...]:
        if "models" in made:
            return (Slice(inputs=self._inputs("models", made["models"], operator, layers=False)),)
        if "slices" not in made:
            return ()
        slices = made["slices"]
        if not isinstance(slices, list) or not 1 <= len(slices) <= MAX_SLICES:
            self._fault(f"slices: a list of 1 to {MAX_SLICES} slices is needed")
            return ()
        return tuple(
            self._slice(f"slices[{position}]", item, operator) for position, item in enumerate(slices)
        )

    def _slice(self, where: str, value: Any, operator: Operator | None) -> Slice:
        if not isinstance(value, dict):
            self._fault(f"{where}: a mapping with the key sources is needed")
            return Slice(inputs=())
        self._unknown(value, frozenset({"sources", "base_model", "parameters"}), f"{where}: ")
        part = Slice(
            inputs=self._inputs(f"{where}: sources", value.get("sources"), operator, layers=True),
            parameters=self._settings(where, value, operator),
            base=self._reference(f"{where}: base_model", value.get("base_model")),
        )
        if len({i.layers[1] - i.layers[0] for i in part.inputs if i.layers}) > 1:
            self._fault(f"{where}: every source needs as many layers as the others")
        return part

    def _inputs(
        self, where: str, value: Any, operator: Operator | None, *, layers: bool
    ) -> tuple[Input, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_MODELS:
            self._fault(f"{where}: a list of 1 to {MAX_MODELS} models is needed")
            return ()
        allowed = frozenset({"model", "parameters", "layer_range"} if layers else {"model", "parameters"})
        inputs = []
        for position, item in enumerate(value):
            if not isinstance(item, dict):
                self._fault(f"{where}[{position}]: a mapping with the key model is needed")
                continue
            self._unknown(item, allowed, f"{where}[{position}]: ")
            model = self._reference(f"{where}[{position}]: model", item.get("model"), needed=True)
            if model is not None:
                inputs.append(
                    Input(
                        model=model,
                        parameters=self._settings(model, item, operator, of_model=True),
                        layers=self._layers(f"{where}[{position}]", item.get("layer_range"))
                        if layers
                        else None,
                    )
                )
        return tuple(inputs)

    def _layers(self, where: str, value: Any) -> tuple[int, int]:
        if isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value):
            first, end = value
            if 0 <= first < end <= MAX_LAYERS:
                return first, end
        self._fault(f"{where}: layer_range is a pair of layer numbers, [first, end], with first < end")
        return 0, 1

    def _settings(
        self, where: str, value: dict[str, Any], operator: Operator | None, *, of_model: bool = False
    ) -> Settings:
        within = where if where == "parameters" else f"{where}: parameters"
        return settings.read(value.get("parameters"), operator, within, self._fault, of_model=of_model)

    def _dtype(self, key: str, value: Any) -> str | None:
        if value is None:
            return None
        if isinstance(value, str) and (name := value.removeprefix("torch.")) in DTYPES:
            return DTYPES[name]
        self._fault(f"{key} {str(value)[:80]}: not supported; it is one of: {', '.join(DTYPES)}")
        return None

    def _check(self, merge: Merge, part: Slice, where: str) -> None:
        """Tell what is wrong with the inputs of a slice and its base."""
        listed = [(i.model, i.layers) for i in part.inputs]
        for model in sorted({model for model, layers in listed if listed.count((model, layers)) > 1}):
            self._fault(f"{where}{model} is listed twice")
        operator, base = merge.operator(part), merge.base_of(part)
        is_listed = base in [i.model for i in part.inputs]
        if operator.needs_base and base is None:
            self._fault(f"{where}{operator.name} needs a base_model")
            return
        if operator.needs_base and not merge.is_whole and not is_listed:
            self._fault(f"{where}{operator.name} needs the layers of its base: list {base} under sources")
            return
        if part.base is not None and not is_listed:
            self._fault(f"{where}base_model: {base} is not among the sources")
        required = [p.name for p in operator.parameters if p.each and p.default is None]
        given = merge.parameters.keys() | merge.module_parameters.keys()
        if (
            merge.is_whole
            and base is not None
            and not (operator.needs_base or is_listed or given >= {*required})
        ):
            self._fault(f"{operator.name} gives base_model no weight: list it under models, or leave it out")
        self._check_count(operator, len(merge.operands(part)) - operator.needs_base, where)

    def _check_count(self, operator: Operator, count: int, where: str) -> None:
        least, most = operator.experts
        if least <= count and (most is None or count <= most):
            return
        bound = (
            f"exactly {least}"
            if most == least
            else f"at least {least}"
            if count < least
            else f"at most {most}"
        )
        noun, beside = (
            "model" if bound.endswith(" 1") else "models",
            " beside its base" if operator.needs_base else "",
        )
        self._fault(f"{where}{operator.name} takes {bound} {noun}{beside}; there are {count}")
