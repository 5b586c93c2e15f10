"""The Genome: which coefficients of a recipe are sought, and the ordinary recipe that a list of numbers is.

    genome = Genome.of(recipe, headers, Shape(layers=4))
    genome.recipe(genome.start)      # what it began with, as far as genes can tell
    genome.recipe(())                # the recipe that it began with, as it stands

A gene is one number: a parameter of one expert, for attention, feed-forward blocks or the rest, at one point
over the depth of the model. It is written in the words that recipes have: a gradient over the layers under a
filter. Groups of layers, which may each have an operator of their own, are merges of the same file whose
layers are stacked. Numbers are rounded to four decimals, so the recipe that is found is the one that
was judged, and people can read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from merge_core.checkpoint.layout import Role, around_layer, place
from merge_core.errors import InvalidRecipe, Unmergeable
from merge_core.operators import find
from merge_core.operators.base import Operator, Parameter
from merge_core.operators.passthrough import PASSTHROUGH
from merge_core.recipe import Conditional, Input, Merge, Recipe, Slice
from merge_core.recipe.settings import Plain, Setting, Settings, interpolate
from merge_core.resolve import ModelHeader
from merge_core.resolve.stack import Stack, stack_of

DECIMALS = 4
MAX_GENES = 4096
MAX_GROUPS = 63
"""Each is a merge of the file that is found, and one more stacks their layers."""
SOUGHT = ("weight", "t")
"""The parameters that are always sought where the operator has them; `density` where the Shape says so."""

_OPERATOR = "operator"
_REACH = 8.0
"""How far from 0 a coefficient may go where its operator sets no bound."""
_LEAST_DENSITY = 0.05
_HEADSTART = 0.25
"""By how much the operator of the recipe leads the others when the search begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How finely coefficients are sought.

    `layers` is the number of points over the depth, with straight lines between them; with `groups` that of
    groups of layers, each with values of its own; 0: one value for all layers. `components` tells attention,
    feed-forward blocks and the rest apart, else only layers and what lies outside of them.
    `operators` are chosen from for each group; none: the recipe's method.
    """

    layers: int = 0
    groups: bool = False
    components: bool = True
    densities: bool = False
    operators: tuple[str, ...] = ()

    def to_value(self) -> dict[str, Any]:
        """As JSON; `Shape.parse` reads it."""
        return {
            "layers": self.layers,
            "groups": self.groups,
            "components": self.components,
            "densities": self.densities,
            "operators": list(self.operators),
        }

    @classmethod
    def parse(cls, value: Any) -> Shape:
        """Read what `to_value` writes; raises ValueError on anything else."""
        try:
            shape = cls(**{**value, "operators": tuple(value["operators"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"the shape of a genome: {error}") from error
        flags = (shape.groups, shape.components, shape.densities)
        if type(shape.layers) is not int or not all(type(flag) is bool for flag in flags):
            raise ValueError("the shape of a genome")
        if not all(isinstance(name, str) and len(name) <= 64 for name in shape.operators):
            raise ValueError("the operators of a genome")
        return shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tensors that share genes: those whose names hold one of `filters`; none: all that no other part has.

    `sample` is the name of one in layer 0, or outside of the layers: what the recipe says of it is the start.
    """

    name: str
    filters: tuple[str, ...]
    sample: str
    deep: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Gene:
    """One number that is sought: `start` lies in `low`..`high`.

    `point` counts the points over the depth from 0; `expert` is None for what all experts share. In a group
    that chooses its operator there is a gene for each, called `operator`, whose `expert` counts operators:
    the greatest is chosen.
    """

    parameter: str
    group: int
    part: str
    point: int
    expert: int | None
    start: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Genome:
    """The genes of one recipe over models with known headers; pure: `recipe` gives the same for the same."""

    origin: Recipe
    shape: Shape
    layers: int
    experts: tuple[Input, ...]
    parts: tuple[Part, ...]
    genes: tuple[Gene, ...]

    @classmethod
    def of(cls, recipe: Recipe, headers: Mapping[str, ModelHeader], shape: Shape) -> Genome:
        """Lay out the genes; raises InvalidRecipe or Unmergeable where nothing can be sought, or too much."""
        merge = _single(recipe)
        stack = stack_of(headers[merge.donor])
        if not 0 <= shape.layers <= stack.count:
            raise InvalidRecipe(
                f"{shape.layers} points over the depth of a model with {stack.count} layers",
                hint=f"weft evolve RECIPE --layers {stack.count}",
            )
        if shape.groups and shape.layers > MAX_GROUPS:
            raise InvalidRecipe(
                f"{shape.layers} groups of layers; a recipe has room for {MAX_GROUPS}",
                hint=f"weft evolve RECIPE --groups --layers {MAX_GROUPS}",
            )
        layout = _Layout(merge, stack, shape)
        genes = tuple(layout.genes())
        if len(genes) > MAX_GENES:
            raise InvalidRecipe(f"{len(genes)} coefficients; at most {MAX_GENES} are sought")
        return cls(
            origin=recipe,
            shape=shape,
            layers=stack.count,
            experts=layout.experts,
            parts=layout.parts,
            genes=genes,
        )

    @property
    def start(self) -> tuple[float, ...]:
        """The genes nearest to the recipe: they know no filters, and no more points than the shape."""
        return tuple(gene.start for gene in self.genes)

    @property
    def base(self) -> str | None:
        """The model that all task vectors start from, if there is one."""
        return self.origin.merges[-1].single_base

    def recipe(self, values: Sequence[float]) -> Recipe:
        """The recipe that these genes are, each rounded and brought within its bounds; none: the origin."""
        if not values:
            return self.origin
        chosen = self.settled(values)
        if self.shape.groups:
            return self._of_groups(chosen)
        merge = self.origin.merges[-1]
        return Recipe(merges=(self._merge(merge, 0, merge.method, chosen),))

    def weights(self, values: Sequence[float]) -> list[list[float]]:
        """The leading coefficient of each expert at each layer, the mean of all parts: [experts][layers]."""
        chosen, leading = self.settled(values), self.genes[-1].parameter
        deep = [part for part in self.parts if part.deep] or self.parts
        experts = range(len(self.experts)) if self._is_each(leading) else (None,)
        return [
            [sum(self._at(chosen, leading, p, e, layer) for p in deep) / len(deep) for layer in self._layers]
            for e in experts
        ]

    @property
    def rows(self) -> tuple[str, ...]:
        """What the rows of `weights` are called: the experts, or what they share."""
        leading = self.genes[-1].parameter
        return tuple(item.model for item in self.experts) if self._is_each(leading) else (leading,)

    @property
    def _layers(self) -> range:
        return range(self.layers)

    @cached_property
    def _index(self) -> Mapping[tuple[str, int, str, int, int | None], int]:
        return {(g.parameter, g.group, g.part, g.point, g.expert): i for i, g in enumerate(self.genes)}

    def settled(self, values: Sequence[float]) -> tuple[float, ...]:
        """The values that are written and judged: rounded, each within its bounds."""
        if len(values) != len(self.genes):
            raise ValueError(f"{len(values)} values for {len(self.genes)} genes")
        pairs = zip(values, self.genes, strict=True)
        # Adding zero makes -0.0 the zero that YAML has.
        return tuple(round(min(max(float(v), g.low), g.high), DECIMALS) + 0.0 for v, g in pairs)

    def _is_each(self, parameter: str) -> bool:
        return any(g.parameter == parameter and g.expert is not None for g in self.genes)

    @cached_property
    def _points(self) -> Mapping[tuple[str, int, str], int]:
        return Counter((g.parameter, g.group, g.part) for g in self.genes if not g.expert)

    def _at(
        self, chosen: Sequence[float], parameter: str, part: Part, expert: int | None, layer: int
    ) -> float:
        group = _group_of(layer, self.layers, self.shape)
        value = self._plain(chosen, parameter, group, part, expert)
        depth = layer / (self.layers - 1) if self.layers > 1 else 1.0
        return interpolate(value, depth) if isinstance(value, tuple) else float(value)

    def _plain(
        self, chosen: Sequence[float], parameter: str, group: int, part: Part, expert: int | None
    ) -> Plain:
        points = range(self._points[parameter, group, part.name])
        values = tuple(chosen[self._index[parameter, group, part.name, p, expert]] for p in points)
        return values if len(values) > 1 else values[0]

    def _setting(self, chosen: Sequence[float], parameter: str, group: int, expert: int | None) -> Setting:
        plain = [(part, self._plain(chosen, parameter, group, part, expert)) for part in self.parts]
        if len(plain) == 1:
            return plain[0][1]
        return tuple(
            Conditional(filter=text, value=value) for part, value in plain for text in part.filters or (None,)
        )

    def _merge(self, merge: Merge, group: int, method: str, chosen: Sequence[float]) -> Merge:
        """A merge of whole models by one operator, with the genes of one group."""
        operator = find(method)
        operator = operator.over_base if operator.over_base and merge.base else operator
        sought = {gene.parameter for gene in self.genes} - {_OPERATOR}
        declared = [parameter for parameter in operator.parameters if parameter.name in sought]
        inputs = {item.model: item for item in (*merge.slices[0].inputs, *self.experts)}
        for number, item in enumerate(self.experts):
            own = {p.name: self._setting(chosen, p.name, group, number) for p in declared if p.each}
            inputs[item.model] = replace(item, parameters=_kept(item.parameters, operator, sought) | own)
        shared = {p.name: self._setting(chosen, p.name, group, None) for p in declared if not p.each}
        return replace(
            merge,
            method=method,
            slices=(Slice(inputs=tuple(inputs.values())),),
            parameters=_kept(merge.parameters, operator, sought) | shared,
            module_parameters=_kept(merge.module_parameters, operator, sought),
        )

    def _of_groups(self, chosen: Sequence[float]) -> Recipe:
        """A merge for each group of layers, and one that stacks their layers."""
        merge = self.origin.merges[-1]
        made, stacked = [], []
        for group, (first, end) in enumerate(_spans(self.layers, self.shape)):
            name = f"layers-{first}-{end - 1}"
            method = self._method(chosen, group)
            made.append(replace(self._merge(merge, group, method, chosen), name=name, chat_template=None))
            stacked.append(Slice(inputs=(Input(model=name, layers=(first, end)),)))
        last = Merge(method=PASSTHROUGH.name, slices=tuple(stacked), chat_template=merge.chat_template)
        return Recipe(merges=(*made, last))

    def _method(self, chosen: Sequence[float], group: int) -> str:
        names = self.shape.operators
        scores = [chosen[self._index[_OPERATOR, group, "", 0, i]] for i in range(len(names))]
        return names[scores.index(max(scores))] if names else self.origin.merges[-1].method


class _Layout:
    """The parts and genes of one merge over a stack of layers."""

    def __init__(self, merge: Merge, stack: Stack, shape: Shape) -> None:
        self._merge, self._stack, self._shape = merge, stack, shape
        slice_ = merge.slices[0]
        operator = merge.operator(slice_)
        self._operators = [operator, *map(find, shape.operators)]
        self.experts = merge.operands(slice_)[operator.needs_base :]
        self._check(operator)
        self.parts = tuple(_parts(stack, shape))

    def genes(self) -> Iterator[Gene]:
        """Group by group: the operators, then parameter by parameter; the leading one comes last."""
        sought = [self._declared(name) for name in ("density", *SOUGHT)]
        parameters = [declared for declared in sought if declared is not None]
        if not parameters:
            raise InvalidRecipe(
                f"{self._merge.method} has no coefficients to seek",
                hint="choose a merge_method with weights, such as task_arithmetic",
            )
        for group, span in enumerate(_spans(self._stack.count, self._shape)):
            yield from self._choices(group)
            for declared in parameters:
                for part in self.parts:
                    yield from self._of_part(declared, group, span, part)

    def _declared(self, name: str) -> Parameter | None:
        if name == "density" and not self._shape.densities:
            return None
        found = [operator.parameter(name) for operator in self._operators]
        return next((declared for declared in found if declared is not None), None)

    def _choices(self, group: int) -> Iterator[Gene]:
        for number, name in enumerate(self._shape.operators):
            lead = _HEADSTART if name == self._merge.method else 0.0
            yield Gene(
                parameter=_OPERATOR,
                group=group,
                part="",
                point=0,
                expert=number,
                start=lead,
                low=-_REACH,
                high=_REACH,
            )

    def _of_part(self, declared: Parameter, group: int, span: tuple[int, int], part: Part) -> Iterator[Gene]:
        smooth = part.deep and not self._shape.groups
        points = max(1, self._shape.layers) if smooth else 1
        low, high = _bounds(declared)
        for point in range(points):
            depth = point / (points - 1) if points > 1 else self._middle(span) if part.deep else 0.0
            for expert in range(len(self.experts)) if declared.each else (None,):
                value = self._stated(declared, part, expert, depth)
                yield Gene(
                    parameter=declared.name,
                    group=group,
                    part=part.name,
                    point=point,
                    expert=expert,
                    start=round(min(max(value, low), high), DECIMALS),
                    low=low,
                    high=high,
                )

    def _middle(self, span: tuple[int, int]) -> float:
        return (span[0] + span[1] - 1) / 2 / max(1, self._stack.count - 1)

    def _stated(self, declared: Parameter, part: Part, expert: int | None, depth: float) -> float:
        """What the recipe says of a coefficient; 1 where it leaves one to be found."""
        of = None if expert is None else self.experts[expert]
        name = part.sample
        found = around_layer(name)
        if found is not None:
            name = f"{found[0]}{round(depth * (self._stack.count - 1))}{found[2]}"
        value = self._merge.value(declared.name, self._merge.slices[0], of, name, depth)
        if value is None or isinstance(value, tuple):
            value = declared.default if declared.default is not None else 1.0
        return float(value)

    def _check(self, operator: Operator) -> None:
        for name in self._shape.operators:
            if find(name).needs_base != operator.needs_base:
                raise InvalidRecipe(
                    f"{name} and {operator.name} do not both start from a base: none can choose between them",
                    hint="name operators that need a base_model as the recipe's does, or none that does",
                )
        if self._shape.operators and not self._shape.groups:
            raise InvalidRecipe(
                "operators are chosen for groups of layers", hint="weft evolve RECIPE --groups"
            )
        if self._merge.tokenizer is not None:
            raise InvalidRecipe(
                "candidates are asked with the tokenizer that the models have, not with a choice of tokens",
                hint="merge with the tokenizer first, then: weft evolve RECIPE of what was merged",
            )


def _single(recipe: Recipe) -> Merge:
    """The only merge of a recipe; raises InvalidRecipe where there are several, or slices."""
    merge = recipe.merges[-1]
    if len(recipe.merges) > 1 or not merge.is_whole:
        raise InvalidRecipe(
            "coefficients are sought for one merge of whole models",
            hint="write a recipe with models, without slices or further merges",
        )
    return merge


def _parts(stack: Stack, shape: Shape) -> Iterator[Part]:
    """The parts of a model, the one without a filter last."""
    outside = sorted(stack.before | stack.after)
    if shape.layers:
        if shape.components:
            yield from _components(stack)
        elif outside:
            first = min(stack.layers[min(stack.layers)].values())
            yield _told_apart(
                Part(name="layers", filters=tuple(sorted(stack.prefixes)), sample=first, deep=True), outside
            )
    if not shape.layers or outside or shape.components:
        sample = outside[0] if outside and not shape.groups else min(stack.names)
        yield Part(name="rest", filters=(), sample=sample, deep=shape.groups or not shape.layers)
    else:
        yield Part(name="layers", filters=(), sample=min(stack.names), deep=True)


def _components(stack: Stack) -> Iterator[Part]:
    """Attention and feed-forward blocks, by the part of a tensor's name behind the number of its layer."""
    for name, role in (("attention", Role.ATTN), ("mlp", Role.MLP)):
        found = sorted(
            tensor
            for members in stack.layers.values()
            for tensor in members.values()
            if place(tensor).role is role
        )
        if not found:
            raise Unmergeable(
                f"no tensor is called as those of the {name} are",
                hint="weft evolve RECIPE --no-components",
            )
        tails = {around[2] for tensor in found if (around := around_layer(tensor)) is not None}
        segments = sorted({f".{tail.split('.')[1]}." for tail in tails})
        yield _told_apart(
            Part(name=name, filters=tuple(segments), sample=found[0], deep=True),
            sorted(stack.before | stack.after),
        )


def _told_apart(part: Part, outside: Sequence[str]) -> Part:
    """The part, unless its filters find tensors outside of the layers, of which other genes tell."""
    if any(text in name for text in part.filters for name in outside):
        raise Unmergeable(
            f"the names of tensors do not tell {part.name} from what lies outside of the layers",
            hint="weft evolve RECIPE --layers 0",
        )
    return part


def _spans(layers: int, shape: Shape) -> list[tuple[int, int]]:
    """The groups of layers, (first, end) each; one of all where there are none."""
    count = max(1, shape.layers) if shape.groups else 1
    return [(layers * g // count, layers * (g + 1) // count) for g in range(count)]


def _group_of(layer: int, layers: int, shape: Shape) -> int:
    return next(g for g, (first, end) in enumerate(_spans(layers, shape)) if first <= layer < end)


def _bounds(declared: Parameter) -> tuple[float, float]:
    low = -_REACH if declared.low is None else declared.low
    if declared.name == "density":
        low = max(low, _LEAST_DENSITY)
    elif declared.open_low:
        low += 10.0**-DECIMALS
    return low, _REACH if declared.high is None else declared.high


def _kept(settings: Settings, operator: Operator, sought: set[str]) -> dict[str, Setting]:
    """What else a recipe says, as far as the operator knows it."""
    return {
        name: value
        for name, value in settings.items()
        if name not in sought and operator.parameter(name) is not None
    }
