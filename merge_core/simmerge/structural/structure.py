"""The Structure: a model's weights as norms, sketches and samples of coordinates, by depth and role.

Groups are {attn, mlp, norm} by thirds of the depth, and embed, head, other: of each the norms, a count sketch
and the values at coordinates that are equal for all models of one shape. Sketch and sample are linear: those
of a task vector are the model's less the base's, so nobody needs the base to make one.

Exact to the bit on any machine, whatever order the leaves come in (see sketch.py), so that whoever has the
weights can tell whether a Structure is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.checkpoint import dtypes
from merge_core.checkpoint.layout import Role, place
from merge_core.checkpoint.source import TensorInfo
from merge_core.digest import Digest, canonical, sha256
from merge_core.simmerge.structural.sketch import WIDTH

Floats = npt.NDArray[np.float32]

SAMPLE = 1792
"""Coordinates of a sample, in a model of up to USUAL_GROUPS groups; of more, FEWER."""
FEWER = 1024
USUAL_GROUPS = 12
"""What a decoder with a head of its own has. Structures of 190 KB leave 64 KiB for behaviour."""
MAX_LAYER_ROWS = 256
"""Rows of layer norms; where a model has more, neighbouring layers share one."""

LARGEST = 2.0**48
"""No weight and no bucket of a sketch is larger: what is worked out from two of them fits into a float32."""

_LARGEST_NORM = 2.0**120
_MAX_LAYER = 999_999
_NO_SKETCH: Floats = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class GroupKey:
    """Which tensors belong together: a third of the depth (0 is next to the embedding; -1 for all of it or
    outside of the layers) and a role."""

    third: int
    role: str

    def __str__(self) -> str:
        return self.role if self.third == -1 else f"{('early', 'mid', 'late')[self.third]} {self.role}"


_BY_DEPTH = (Role.ATTN, Role.MLP, Role.NORM)
GROUPS = tuple(
    sorted(
        GroupKey(third=third, role=role.value)
        for third in (-1, 0, 1, 2)
        for role in Role
        if third == -1 or role in _BY_DEPTH
    )
)
"""Every key there is."""


def grouped(tensors: Mapping[str, TensorInfo]) -> dict[GroupKey, tuple[str, ...]]:
    """The names of the tensors that are measured, by group, both sorted: floating point, and not empty."""
    places = {name: place(name) for name, info in sorted(tensors.items()) if is_measured(info)}
    depth = 1 + max((at.layer for at in places.values() if at.layer is not None), default=0)
    groups: dict[GroupKey, list[str]] = {}
    for name, at in places.items():
        inside = at.layer is not None and at.role in _BY_DEPTH
        third = at.layer * 3 // depth if inside and at.layer is not None else -1
        groups.setdefault(GroupKey(third=third, role=at.role.value), []).append(name)
    return {key: tuple(groups[key]) for key in sorted(groups)}


def layer_rows(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, str]]:
    """The row of layer norms, (first layer, role), of each measured tensor that lies in a layer."""
    places = {name: place(name) for name, info in tensors.items() if is_measured(info)}
    layers = {name: (at.layer, at.role.value) for name, at in places.items() if at.layer is not None}
    stride = 1
    while True:
        rows = {name: (layer // stride * stride, role) for name, (layer, role) in layers.items()}
        if len(set(rows.values())) <= MAX_LAYER_ROWS:
            return rows
        stride *= 2


def is_measured(info: TensorInfo) -> bool:
    """Whether a tensor takes part: integers are no weights, and nothing cannot be measured."""
    return info.dtype in dtypes.MERGEABLE and info.length > 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """What is known of one group. Sketches and samples of equal `layout` can be compared, others cannot."""

    key: GroupKey
    elements: int
    shapes: Digest
    """Of the names and shapes of its tensors."""
    l1: float
    l2: float
    largest: float
    sketch: Floats
    """float32[WIDTH], or empty where the sample is whole."""
    sample: Floats
    """float32: values of W in the order of the coordinates; all of them where a sketch would take no less."""

    @property
    def layout(self) -> tuple[Digest, int, int, int]:
        """What is where: `shapes` are anybody's to copy, and the size of a sample is another's to choose."""
        return self.shapes, self.elements, len(self.sample), len(self.sketch)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorms:
    """Norms of the tensors of one role in one layer, or in a run of layers from it on; float32 values."""

    layer: int
    role: str
    elements: int
    l1: float
    l2: float
    largest: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """Groups sorted by key, and the norms of layers sorted by layer and role; `sketcher` makes it."""

    groups: tuple[Group, ...]
    layers: tuple[LayerNorms, ...]

    @cached_property
    def digest(self) -> Digest:
        """Of all that it holds: equal digests are equal structures."""
        arrays = sorted(self.arrays().items())
        return sha256(canonical(self.described()) + b"".join(_little(array) for _, array in arrays))

    def described(self) -> Any:
        """What goes into canonical JSON; `arrays` hold the rest."""
        return {
            "groups": [[g.key.third, g.key.role, g.elements, g.shapes] for g in self.groups],
            "layers": [[row.layer, row.role, row.elements] for row in self.layers],
        }

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """`norms` float64[·, 3] of l1, l2, largest; float32 `layers` alike, `sketch` [·, WIDTH], `sample`."""
        norms = [[group.l1, group.l2, group.largest] for group in self.groups]
        layers = [[row.l1, row.l2, row.largest] for row in self.layers]
        return {
            "norms": np.array(norms, np.float64).reshape(-1, 3),
            "layers": np.array(layers, np.float32).reshape(-1, 3),
            "sketch": np.concatenate([group.sketch for group in self.groups]).reshape(-1, WIDTH),
            "sample": np.concatenate([group.sample for group in self.groups]),
        }

    @classmethod
    def read(cls, described: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> Structure:
        """The inverse of `described` and `arrays`; raises ValueError on whatever is not exact."""
        if not isinstance(described, dict) or set(described) != {"groups", "layers"}:
            raise ValueError("a structure is groups and layers")
        groups, layers = described["groups"], described["layers"]
        if not isinstance(groups, list) or not 0 < len(groups) <= len(GROUPS):
            raise ValueError("number of groups")
        if not isinstance(layers, list) or len(layers) > MAX_LAYER_ROWS:
            raise ValueError("number of layers")
        heads = [_head(item) for item in groups]
        places = [_layer(item) for item in layers]
        if any(a.key >= b.key for a, b in pairwise(heads)) or any(
            a[:2] >= b[:2] for a, b in pairwise(places)
        ):
            raise ValueError("groups or layers are not sorted, or one is repeated")
        found = _shaped(arrays, heads, len(places))
        rows = zip(places, found["layers"].tolist(), strict=True)
        return cls(
            groups=_groups(heads, found),
            layers=tuple(
                LayerNorms(layer=layer, role=role, elements=elements, l1=l1, l2=l2, largest=largest)
                for (layer, role, elements), (l1, l2, largest) in rows
            ),
        )


def sampled(elements: int, groups: int) -> tuple[int, bool]:
    """How many coordinates of a group are sampled, in a structure of `groups`, and whether it has a sketch.

    One that takes no more than sample and sketch together is sampled whole, and needs no sketch.
    """
    size = SAMPLE if groups <= USUAL_GROUPS else FEWER
    return (elements, False) if elements <= size + WIDTH else (size, True)


def first_difference(advertised: Structure, computed: Structure) -> str | None:
    """Where two structures differ in any bit, named for people; None where they are equal.

    The first group that differs, in the order of the keys, then the first layer.
    """
    ours = {group.key: group for group in computed.groups}
    theirs = {group.key: group for group in advertised.groups}
    for key in sorted({*ours, *theirs}):
        if key not in ours or key not in theirs or _bits(ours[key]) != _bits(theirs[key]):
            return str(key)
    for mine, other in zip_longest(computed.layers, advertised.layers):
        if mine != other:
            row = mine or other
            return f"layer {row.layer} {row.role}"
    return None


def _bits(group: Group) -> bytes:
    norms = np.array([group.l1, group.l2, group.largest])
    head = f"{group.elements} {group.shapes} {len(group.sketch)} ".encode()
    return head + _little(norms) + _little(group.sketch) + _little(group.sample)


def _little(array: npt.NDArray[Any]) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    key: GroupKey
    elements: int
    shapes: Digest


def _head(item: Any) -> _Head:
    third, role, elements, shapes = _listed(item, 4)
    if type(third) is not int or not isinstance(role, str):
        raise ValueError("the key of a group")
    key = GroupKey(third=third, role=role)
    if key not in GROUPS:
        raise ValueError("the key of a group")
    return _Head(key=key, elements=_count(elements), shapes=Digest(shapes))


def _layer(item: Any) -> tuple[int, str, int]:
    layer, role, elements = _listed(item, 3)
    if type(layer) is not int or not 0 <= layer <= _MAX_LAYER or role not in list(Role):
        raise ValueError("the key of a layer")
    return layer, str(role), _count(elements)


def _listed(item: Any, length: int) -> list[Any]:
    if not isinstance(item, list) or len(item) != length:
        raise ValueError(f"not a list of {length}")
    return item


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**53:
        raise ValueError("a number of elements")
    return value


def _shaped(
    arrays: Mapping[str, npt.NDArray[Any]], heads: Sequence[_Head], layers: int
) -> Mapping[str, npt.NDArray[Any]]:
    """The arrays, which have exactly the types and shapes that the heads call for, and no bad number."""
    sizes = [sampled(head.elements, len(heads)) for head in heads]
    expected: dict[str, tuple[type, tuple[int, ...]]] = {
        "norms": (np.float64, (len(heads), 3)),
        "layers": (np.float32, (layers, 3)),
        "sketch": (np.float32, (sum(has_sketch for _, has_sketch in sizes), WIDTH)),
        "sample": (np.float32, (sum(size for size, _ in sizes),)),
    }
    if {name: (array.dtype.type, array.shape) for name, array in arrays.items()} != expected:
        raise ValueError("arrays of other types or shapes than the groups have")
    if not all((np.abs(array) <= _BOUNDS[name]).all() for name, array in arrays.items()):  # nor is NaN
        raise ValueError("a number that no weights have")
    if any(np.signbit(arrays[name]).any() for name in ("norms", "layers")):
        raise ValueError("a negative norm")
    return arrays


_BOUNDS = {"norms": _LARGEST_NORM, "layers": _LARGEST_NORM, "sketch": LARGEST, "sample": LARGEST}


def _groups(heads: Sequence[_Head], arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[Group, ...]:
    groups, sketches, at = [], iter(arrays["sketch"]), 0
    for head, (l1, l2, largest) in zip(heads, arrays["norms"].tolist(), strict=True):
        count, has_sketch = sampled(head.elements, len(heads))
        groups.append(
            Group(
                key=head.key,
                elements=head.elements,
                shapes=head.shapes,
                l1=l1,
                l2=l2,
                largest=largest,
                sketch=next(sketches) if has_sketch else _NO_SKETCH,
                sample=arrays["sample"][at : at + count],
            )
        )
        at += count
    return tuple(groups)
