"""The Fingerprint: norms and a seeded sketch of a model's weights, per layer group, in at most 60 KiB.

Sketches are linear: the sketch of a difference is the difference of the sketches. So distance and cosine of
any two models, and of their task vectors when the base has a fingerprint too, are estimated from fingerprints
alone. It fits one message between peers; a 7 B model has 99 groups of 64 buckets.

Bit-exact everywhere (see sketch.py); what is stored is rounded to fp32 once.

Law: `Fingerprint.parse(f.to_bytes()) == f`.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from merge_core.checkpoint import dtypes
from merge_core.checkpoint.layout import Role, place
from merge_core.checkpoint.source import TensorInfo, TensorSource
from merge_core.digest import Digest, ModelId, canonical, check_version, parse_canonical, sha256
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.simmerge.version1_sketch import GroupSums, Vector, blocks, tree_sum

VERSION = 1
MAX_FINGERPRINT = 60 << 10
MAX_GROUPS = 256

_WIDTHS = (256, 128, 64, 32)
_GROUP_OVERHEAD = 176
_ENVELOPE = 256
_MAX_LAYER = 1_000_000
_HEX_FLOAT = re.compile(r"0x[01]\.[0-9a-f]{1,13}p[+-][0-9]{1,4}")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class GroupKey:
    """Which tensors belong together: a run of layers (by its first; -1 outside of the layers) and a role."""

    first_layer: int
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What is known of one group: element count, norms, and the sketch (fp32 values as Python floats)."""

    key: GroupKey
    elements: int
    l1: float
    l2: float
    largest: float
    sketch: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """A model's fingerprint; `groups` sorted by key, all sketches `width` wide."""

    model_id: ModelId
    width: int
    groups: tuple[Group, ...]

    @property
    def digest(self) -> Digest:
        """The digest of the canonical bytes: what an advert carries."""
        return sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Canonical JSON; norms as hex floats, sketches as little-endian fp32 in base64."""
        return canonical(
            {
                "version": VERSION,
                "modelId": self.model_id,
                "width": self.width,
                "groups": [_group_to_json(group) for group in self.groups],
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Fingerprint:
        """Read a fingerprint from anybody; raises CorruptCheckpoint on whatever is not exact."""
        if len(data) > MAX_FINGERPRINT:
            raise CorruptCheckpoint(f"a fingerprint of {len(data)} bytes; at most {MAX_FINGERPRINT} are read")
        try:
            value = parse_canonical(data)
            _keys(value, {"version", "modelId", "width", "groups"})
            check_version(value["version"], VERSION, "fingerprint")
            width = value["width"]
            if type(width) is not int or width not in _WIDTHS:
                raise ValueError("width")
            if not isinstance(value["groups"], list) or not 0 < len(value["groups"]) <= MAX_GROUPS:
                raise ValueError("number of groups")
            groups = tuple(_group_from_json(item, width) for item in value["groups"])
            if any(a.key >= b.key for a, b in pairwise(groups)):
                raise ValueError("groups are not sorted, or one is repeated")
            return cls(model_id=ModelId(value["modelId"]), width=width, groups=groups)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise CorruptCheckpoint(
                f"not a fingerprint: {error}", hint="ask another holder for it"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """Estimates for one group or for all: cosine in [-1, 1]; distance ||a - b|| / max(||a||, ||b||)."""

    cosine: float
    distance: float
    elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """How alike two models are, by group and overall; a cosine c of a group errs by about (1 - c²)/√width."""

    overall: Likeness
    groups: Mapping[GroupKey, Likeness]


def compute(
    source: TensorSource, model_id: ModelId, *, on_progress: Callable[[int], None] | None = None
) -> Fingerprint:
    """Sketch a model in one pass with a few MiB of memory; tensors that are not floating point are left out.

    `on_progress` gets the bytes read since its last call.
    Raises CorruptCheckpoint on NaN or infinity, Unmergeable where no tensor is floating point.
    """
    floating = {name: info for name, info in source.tensors.items() if info.dtype in dtypes.MERGEABLE}
    if not floating:
        raise Unmergeable("the model has no floating-point tensor", hint="export it unquantised")
    keys, width = _shape_of(floating)
    sums = {key: GroupSums() for key in sorted(set(keys.values()))}
    for name, info in floating.items():
        for index, block in blocks(source, name, info, on_progress):
            if not np.isfinite(block).all():
                raise CorruptCheckpoint(f"tensor {name} holds NaN or infinity", hint="export it again")
            sums[keys[name]].add(name, index, block)
    groups = tuple(_group(key, total, width) for key, total in sums.items())
    return Fingerprint(model_id=model_id, width=width, groups=groups)


def similarity(a: Fingerprint, b: Fingerprint, *, base: Fingerprint | None = None) -> Similarity:
    """Estimate how alike two models are; with `base`, how alike their task vectors are.

    Raises Unmergeable where the fingerprints are of different shapes.
    """
    shapes = {(f.width, tuple((g.key, g.elements) for g in f.groups)) for f in (a, b, base or a)}
    if len(shapes) > 1:
        raise Unmergeable("the fingerprints are of models of different shapes", hint="weft search")
    one, other = _matrix(a), _matrix(b)
    if base is not None:
        one, other = one - _matrix(base), other - _matrix(base)
    elements = [group.elements for group in a.groups]
    groups = {group.key: _likeness(one[i], other[i], elements[i]) for i, group in enumerate(a.groups)}
    return Similarity(overall=_likeness(one.ravel(), other.ravel(), sum(elements)), groups=groups)


def _group(key: GroupKey, sums: GroupSums, width: int) -> Group:
    with np.errstate(over="ignore"):
        sketch = sums.sketch(width).astype(np.float32)
    l2 = math.sqrt(sums.squares)
    if not (math.isfinite(l2) and math.isfinite(sums.l1) and np.isfinite(sketch).all()):
        raise CorruptCheckpoint(f"the weights of {key.role} are too large to measure", hint="export it again")
    return Group(
        key=key,
        elements=sums.elements,
        l1=sums.l1,
        l2=l2,
        largest=sums.largest,
        sketch=tuple(float(value) for value in sketch),
    )


def _shape_of(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, GroupKey], int]:
    """The group of every tensor, and the widest sketch with which all groups fit; from names alone.

    Where even narrow sketches do not fit, 2, 4, … neighbouring layers share a group.
    """
    places = {name: place(name) for name in tensors}
    stride = 1
    while True:
        keys = {
            name: GroupKey(
                first_layer=-1 if p.layer is None else min(p.layer, _MAX_LAYER) // stride * stride,
                role=p.role.value,
            )
            for name, p in places.items()
        }
        count = len(set(keys.values()))
        for width in _WIDTHS:
            if (
                count <= MAX_GROUPS
                and _ENVELOPE + count * (_GROUP_OVERHEAD + _base64_length(width)) <= MAX_FINGERPRINT
            ):
                return keys, width
        stride *= 2


def _base64_length(width: int) -> int:
    return 4 * -(-4 * width // 3)


def _matrix(fingerprint: Fingerprint) -> Vector:
    return np.array([group.sketch for group in fingerprint.groups], dtype=np.float64)


def _likeness(one: Vector, other: Vector, elements: int) -> Likeness:
    """Cosine and relative distance; a zero vector is at cosine 1 from another zero vector, else at 0."""
    norms = math.sqrt(_dot(one, one)), math.sqrt(_dot(other, other))
    largest = max(norms)
    if min(norms) == 0.0:
        alike = largest == 0.0
        return Likeness(cosine=float(alike), distance=float(not alike), elements=elements)
    cosine = _dot(one, other) / norms[0] / norms[1]
    apart = one - other
    return Likeness(
        cosine=max(-1.0, min(1.0, cosine)),
        distance=math.sqrt(_dot(apart, apart)) / largest,
        elements=elements,
    )


def _dot(a: Vector, b: Vector) -> float:
    return tree_sum(a * b)


def _group_to_json(group: Group) -> dict[str, Any]:
    packed = np.array(group.sketch, dtype="<f4").tobytes()
    return {
        "layer": group.key.first_layer,
        "role": group.key.role,
        "elements": group.elements,
        "l1": group.l1.hex(),
        "l2": group.l2.hex(),
        "largest": group.largest.hex(),
        "sketch": base64.b64encode(packed).decode(),
    }


def _group_from_json(item: Any, width: int) -> Group:
    _keys(item, {"layer", "role", "elements", "l1", "l2", "largest", "sketch"})
    layer, role, elements = item["layer"], item["role"], item["elements"]
    if type(layer) is not int or not -1 <= layer <= _MAX_LAYER or role not in list(Role):
        raise ValueError("layer or role of a group")
    if type(elements) is not int or not 0 <= elements < 2**53:
        raise ValueError("element count of a group")
    packed = base64.b64decode(item["sketch"], validate=True)
    if len(packed) != 4 * width or base64.b64encode(packed).decode() != item["sketch"]:
        raise ValueError("sketch of a group")
    sketch = np.frombuffer(packed, dtype="<f4")
    if not np.isfinite(sketch).all():
        raise ValueError("sketch of a group is not finite")
    return Group(
        key=GroupKey(first_layer=layer, role=str(role)),
        elements=elements,
        l1=_norm(item["l1"]),
        l2=_norm(item["l2"]),
        largest=_norm(item["largest"]),
        sketch=tuple(float(value) for value in sketch),
    )


def _norm(text: Any) -> float:
    if not isinstance(text, str) or not _HEX_FLOAT.fullmatch(text):
        raise ValueError("a norm is a non-negative hex float")
    value = float.fromhex(text)
    if not math.isfinite(value) or value.hex() != text:
        raise ValueError("a norm is a finite hex float as float.hex writes it")
    return value


def _keys(item: Any, expected: set[str]) -> None:
    if not isinstance(item, dict) or set(item) != expected:
        raise ValueError(f"expected exactly the keys {sorted(expected)}")
