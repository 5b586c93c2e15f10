"""What a config says of layers, said again of layers that were chosen anew."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_core.config_keys import LAYER_COUNTS, LAYER_LISTS, LAYER_NUMBERS, LAYER_PATTERNS, NESTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A layer of the result: layer `number` of a `model` with this config, which has `count` layers."""

    model: str
    config: Mapping[str, Any]
    count: int
    number: int


def changes(
    donor: Chosen, chosen: Sequence[Chosen], problem: Callable[[str], None], warn: Callable[[str], None]
) -> dict[str, Any]:
    """The keys of the donor's config that must change for a stack of the chosen layers, and their values."""
    if [c.number for c in chosen] == list(range(donor.count)) and {c.model for c in chosen} <= {donor.model}:
        return {}
    changed = _changes(donor.config, "", donor, chosen, problem, warn)
    nested = donor.config.get(NESTED)
    if isinstance(nested, Mapping):
        inner = _changes(nested, NESTED, donor, chosen, problem, warn)
        changed |= {f"{NESTED}.{key}": value for key, value in inner.items()}
    return changed


def _changes(
    config: Mapping[str, Any],
    within: str,
    donor: Chosen,
    chosen: Sequence[Chosen],
    problem: Callable[[str], None],
    warn: Callable[[str], None],
) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key in sorted(config):
        value = config[key]
        if key in LAYER_COUNTS and value == donor.count:
            changed[key] = len(chosen)
        elif key in LAYER_LISTS and isinstance(value, list) and len(value) == donor.count:
            said = {c.model: _by_layer(key, within, c) for c in _one_of_each(chosen)}
            for model in sorted(model for model, values in said.items() if values is None):
                problem(f"{key} of {model} is not a list for each of its layers, as that of {donor.model} is")
            changed[key] = [values[c.number] for c in chosen if (values := said[c.model]) is not None]
        elif key in LAYER_NUMBERS and isinstance(value, list):
            numbers = {c.model: _numbers(_list(key, within, c)) for c in _one_of_each(chosen)}
            changed[key] = [number for number, c in enumerate(chosen) if c.number in numbers[c.model]]
        elif key in LAYER_PATTERNS and _matters(key, config):
            warn(f"{key} of {donor.model} goes by the numbers of layers, which the slices change")
    return {key: value for key, value in changed.items() if value != config[key]}


def _one_of_each(chosen: Sequence[Chosen]) -> Collection[Chosen]:
    """A layer of every model."""
    return {c.model: c for c in chosen}.values()


def _list(key: str, within: str, chosen: Chosen) -> list[Any]:
    config = chosen.config.get(within) if within else chosen.config
    value = config.get(key) if isinstance(config, Mapping) else None
    return value if isinstance(value, list) else []


def _by_layer(key: str, within: str, chosen: Chosen) -> list[Any] | None:
    """What a model says of each of its layers; None where it does not, or in fractions: no plan holds any."""
    values = _list(key, within, chosen)
    is_plain = all(value is None or isinstance(value, bool | int | str) for value in values)
    return values if is_plain and len(values) == chosen.count else None


def _numbers(values: Sequence[Any]) -> frozenset[int]:
    return frozenset(value for value in values if type(value) is int)


def _matters(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a pattern over layers says anything: the usual values that say nothing are no news."""
    if config[key] in (None, 0, 1) or isinstance(config.get("layer_types"), list):
        return False
    if key == "no_rope_layer_interval":
        return not isinstance(config.get("no_rope_layers"), list)
    return key != "max_window_layers" or config.get("use_sliding_window") is True
