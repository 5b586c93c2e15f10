"""The sites of a merge: each tensor of its output, and what the tensors that belong there are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from merge_core.checkpoint.layout import around_layer
from merge_core.checkpoint.manifest import MAX_TENSORS
from merge_core.operators.base import Operator, Value
from merge_core.recipe import Input, Merge, Slice
from merge_core.resolve.stack import Stack


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A slice, its operator, its operands in order, and which of them says what tensors there are.

    `resolved` keeps the parameters by depth and by what `filters` find in the names.
    """

    slice: Slice
    operator: Operator
    operands: tuple[Input, ...]
    leader: int
    filters: tuple[str, ...]
    resolved: dict[tuple[float, tuple[bool, ...]], dict[str, Value]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A tensor of the output, how deep in its slice (0 to 1), and what filters call it at each operand."""

    name: str
    part: Part
    depth: float
    names: tuple[str, ...]


class Sites:
    """The sites of one merge over models with these stacks; what does not go together is told as a problem.

    `layers` says afterwards which layer of which model says what each layer of the output consists of; it is
    empty where whole models are merged.
    """

    def __init__(self, merge: Merge, stacks: Mapping[str, Stack], problem: Callable[[str], None]) -> None:
        self.layers: list[tuple[str, int]] = []
        self._merge = merge
        self._stacks = stacks
        self._problem = problem

    def find(self) -> list[Site]:
        """Every site, sorted by name."""
        parts = [self._part(part) for part in self._merge.slices]
        found = self._whole(parts[0]) if self._merge.is_whole else self._sliced(parts)
        return sorted(found, key=lambda site: site.name)

    def _part(self, part: Slice) -> Part:
        operands = tuple(item for item in self._merge.operands(part) if item.model in self._stacks)
        base = self._merge.base_of(part)
        leader = next((at for at, item in enumerate(operands) if item.model == base), 0)
        return Part(
            slice=part,
            operator=self._merge.operator(part),
            operands=operands,
            leader=leader,
            filters=tuple(self._merge.filters(part)),
        )

    def _whole(self, part: Part) -> Iterator[Site]:
        """The tensors of whole models."""
        layers = self._stacks[part.operands[part.leader].model].count
        named = [self._stacks[item.model].names for item in part.operands]
        for name in self._of_all(part, named):
            found = around_layer(name)
            # What lies outside of the layers counts as the first of them, the head too: so does mergekit.
            depth = 0.0 if found is None else min(found[1] / (layers - 1), 1.0) if layers > 1 else 1.0
            yield Site(name=name, part=part, depth=depth, names=(name,) * len(part.operands))

    def _sliced(self, parts: Sequence[Part]) -> list[Site]:
        """The tensors of slices: the first has those before the layers, the last those after them."""
        items = [item for part in parts for item in part.operands]
        misfits = dict.fromkeys(why for item in items if (why := self._misfit(item)) is not None)
        for why in misfits:
            self._problem(why)
        if misfits:
            return []
        first, last = parts[0], parts[-1]
        before = self._of_all(first, [self._stacks[item.model].before for item in first.operands])
        after = self._of_all(last, [self._stacks[item.model].after for item in last.operands])
        sites = [
            Site(name=name, part=part, depth=0.0, names=(name,) * len(part.operands))
            for part, names in ((first, before), (last, after))
            for name in names
        ]
        for part in parts:
            start, end = part.operands[0].layers or (0, 0)
            for offset in range(end - start):
                depth = offset / (end - start - 1) if end - start > 1 else 1.0
                sites += self._layer(part, offset, depth)
                if len(sites) > MAX_TENSORS:
                    self._problem(f"the slices have more than {MAX_TENSORS} tensors together")
                    return []
        return sites

    def _misfit(self, item: Input) -> str | None:
        """Why the layers that a source names cannot be taken: they are not there, or not as the donor's."""
        stack, donor = self._stacks[item.model], self._stacks[self._merge.donor]
        first, end = item.layers or (0, 0)
        if len(stack.prefixes) != 1 or stack.prefixes != donor.prefixes:
            called = ", ".join(sorted(f"{prefix}N" for prefix in stack.prefixes)) or "nothing"
            return f"{item.model} has layers called {called}: slices need one stack, named as the others'"
        if max(stack.layers) >= stack.count:
            return f"{item.model} has layers beyond its {stack.count}, which no slice can place"
        if end - first > len(stack.layers) or not stack.layers.keys() >= {*range(first, end)}:
            return f"{item.model} has {len(stack.layers)} layers: there is no layer_range [{first}, {end}]"
        return None

    def _layer(self, part: Part, offset: int, depth: float) -> Iterator[Site]:
        """The tensors of one layer of a slice, which becomes the next layer of the output."""
        at = [(item, item.layers[0] + offset) for item in part.operands if item.layers]
        members = [self._stacks[item.model].layers[layer] for item, layer in at]
        for (item, _), mine in zip(at, members, strict=True):
            self._tell_extra(part, item, (mine[m] for m in mine.keys() - members[part.leader].keys()))
        for head, tail in members[part.leader]:
            names = tuple(f"{head}{layer}{tail}" for _, layer in at)
            yield Site(name=f"{head}{len(self.layers)}{tail}", part=part, depth=depth, names=names)
        leader, layer = at[part.leader]
        self.layers.append((leader.model, layer))

    def _of_all(self, part: Part, named: Sequence[frozenset[str]]) -> frozenset[str]:
        """The names that the leader of a slice has; those that only others have are problems."""
        for item, names in zip(part.operands, named, strict=True):
            self._tell_extra(part, item, names - named[part.leader])
        return named[part.leader]

    def _tell_extra(self, part: Part, item: Input, names: Iterable[str]) -> None:
        leader = part.operands[part.leader].model
        for name in sorted(names):
            self._problem(f"{item.model} has the tensor {name}, which {leader} lacks")
