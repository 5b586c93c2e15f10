"""Settings: what a recipe says about one parameter: a value, a gradient over the layers, or values by filter.

`read(write(settings)) == settings`, where reading collects every fault and raises nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, TypeAlias

from merge_core.operators.base import Operator, Parameter

MAX_LIST = 1024
MAX_FILTER = 1024

IGNORED = frozenset({"int8_mask"})
"""Settings of mergekit's that only trade its memory for speed; they do not change the result here."""

_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditional:
    """One entry of a {filter, value} list; no filter or `*` means every tensor, else those containing it."""

    filter: str | None
    value: float | bool | tuple[float, ...]


Plain: TypeAlias = float | bool | tuple[float, ...]
"""A value, or a gradient of several."""
Setting: TypeAlias = Plain | tuple[Conditional, ...]
Settings: TypeAlias = Mapping[str, Setting]

NOTHING: Settings = MappingProxyType({})


def chosen(setting: Setting, tensor: str) -> Plain | None:
    """The value or the gradient of a setting for one tensor; None where no filter takes it."""
    if not isinstance(setting, tuple):
        return setting
    for entry in setting:
        if not isinstance(entry, Conditional):
            return tuple(n for n in setting if not isinstance(n, Conditional))
        if entry.filter is None or entry.filter == "*" or entry.filter in tensor:
            return entry.value
    return None


def meant(word: str, known: Iterable[str]) -> str:
    """The end of a fault about a word that nobody knows: the known word that it looks like, if any does."""
    likely = get_close_matches(word[:80], sorted(known), n=1)
    return f" (is {likely[0]} meant?)" if likely else ""


def filters(*scopes: Settings) -> frozenset[str]:
    """All texts that filters of these settings look for in the names of tensors."""
    entries = [
        entry for scope in scopes for value in scope.values() if isinstance(value, tuple) for entry in value
    ]
    return frozenset(e.filter for e in entries if isinstance(e, Conditional) and e.filter is not None)


def interpolate(gradient: tuple[float, ...], depth: float) -> float:
    """The value at `depth` (0 to 1) on the straight lines between evenly spaced points."""
    scaled = depth * (len(gradient) - 1)
    low = int(scaled)
    high = min(len(gradient) - 1, low + 1)
    fraction = scaled - low
    return (1 - fraction) * gradient[low] + fraction * gradient[high]


def write(settings: Settings) -> dict[str, Any]:
    """The key `parameters` as YAML has it, or nothing."""
    written = {name: _write(setting) for name, setting in settings.items()}
    return {"parameters": written} if written else {}


def _write(setting: Setting) -> Any:
    if not isinstance(setting, tuple):
        return setting
    return [
        ({} if item.filter is None else {"filter": item.filter}) | {"value": _write(item.value)}
        if isinstance(item, Conditional)
        else item
        for item in setting
    ]


def read(
    value: Any, operator: Operator | None, where: str, fault: Callable[[str], None], *, of_model: bool = False
) -> Settings:
    """Read `parameters`; `of_model` where they stand beside one model and so hold for that one alone."""
    if value is None:
        return NOTHING
    if not isinstance(value, dict):
        fault(f"{where}: a mapping is needed")
        return NOTHING
    settings: dict[str, Setting] = {}
    for name, item in value.items():
        if name in IGNORED or operator is None:
            continue
        declared = operator.parameter(name)
        if declared is None:
            _check_fixed(name, item, operator, where, fault)
        elif of_model and not declared.each:
            fault(f"{where}: {name} holds for the whole merge; write it under parameters")
        else:
            setting = _Reader(declared, f"{where}: {name}", fault).setting(item)
            if setting is not None:
                settings[name] = setting
    return MappingProxyType(settings)


def _check_fixed(name: str, item: Any, operator: Operator, where: str, fault: Callable[[str], None]) -> None:
    if name not in operator.fixed:
        known = [declared.name for declared in operator.parameters]
        fault(
            f"{where}: {name[:80]}: not a setting of {operator.name}, "
            + (f"which has {', '.join(known)}" if known else "which has none")
        )
    elif item is not operator.fixed[name]:
        fault(f"{where}: {name}: only {str(operator.fixed[name]).lower()} is supported for {operator.name}")


@dataclass(frozen=True, slots=True)
class _Reader:
    """Read one setting of a parameter; None, and a fault, where it cannot be understood."""

    declared: Parameter
    where: str
    _fault: Callable[[str], None]

    def setting(self, value: Any) -> Setting | None:
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            return self._plain(value)
        if len(value) > MAX_LIST:
            self.fault(f"at most {MAX_LIST} entries are read")
            return None
        entries = [self._conditional(item) for item in value]
        return tuple(entry for entry in entries if entry is not None)

    def fault(self, why: str) -> None:
        self._fault(f"{self.where}: {why}")

    def _conditional(self, item: dict[str, Any]) -> Conditional | None:
        pattern = item.get("filter")
        if item.keys() - {"filter", "value"} or "value" not in item:
            self.fault("an entry has the keys filter and value")
            return None
        if pattern is not None and (not isinstance(pattern, str) or len(pattern) > MAX_FILTER):
            self.fault("a filter is text that tensor names contain")
            return None
        value = self._plain(item["value"])
        return None if value is None else Conditional(filter=pattern, value=value)

    def _plain(self, value: Any) -> float | bool | tuple[float, ...] | None:
        if self.declared.flag:
            if isinstance(value, int | float) and value in (0, 1):  # mergekit writes 1.0 for true
                return bool(value)
            self.fault("true or false is needed")
            return None
        if not isinstance(value, list):
            return self._number(value)
        if not 1 <= len(value) <= MAX_LIST:
            self.fault(f"a gradient has 1 to {MAX_LIST} numbers")
            return None
        numbers = [self._number(item) for item in value]
        return tuple(n for n in numbers if n is not None)

    def _number(self, value: Any) -> float | None:
        # YAML 1.1 reads 1e-3 as text, and 010 as eight: that one nobody should write.
        if isinstance(value, str) and len(value) < 64 and _NUMBER.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 2**63:
            self.fault("a number is needed")
            return None
        if not math.isfinite(value):
            self.fault("a finite number is needed")
            return None
        fault = self.declared.fault(float(value))
        if fault:
            self.fault(fault)
        return float(value)
