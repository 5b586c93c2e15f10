"""The Stack: where the tensors of a model stand, layer by layer, and what lies before and after the layers.

Names decide; there is no table of architectures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from merge_core.checkpoint.layout import around_layer, is_derived, lies_before
from merge_core.config_keys import layer_count
from merge_core.resolve.header import ModelHeader

Member: TypeAlias = tuple[str, str]
"""A tensor of a layer: what stands before the layer's number, and what stands after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The names of a model's tensors by place; `count` layers, of which each has members.

    `prefixes` is what stands before the number of a layer: one text, where the model has one stack of layers.
    """

    count: int
    layers: Mapping[int, Mapping[Member, str]]
    before: frozenset[str]
    after: frozenset[str]
    prefixes: frozenset[str]

    @property
    def names(self) -> frozenset[str]:
        """Every tensor that a merge makes."""
        return self.before | self.after | {n for members in self.layers.values() for n in members.values()}


def stack_of(header: ModelHeader) -> Stack:
    """Read the names of a model's tensors; those that every loader computes for itself are left out."""
    layers: dict[int, dict[Member, str]] = {}
    loose: dict[bool, set[str]] = {True: set(), False: set()}
    for name in header.tensors:
        if is_derived(name):
            continue
        found = around_layer(name)
        if found is None:
            loose[lies_before(name)].add(name)
        else:
            head, number, tail = found
            layers.setdefault(number, {})[head, tail] = name
    return Stack(
        count=layer_count(header.config) or 1 + max(layers, default=0),
        layers=layers,
        before=frozenset(loose[True]),
        after=frozenset(loose[False]),
        prefixes=frozenset(head for members in layers.values() for head, _ in members),
    )
