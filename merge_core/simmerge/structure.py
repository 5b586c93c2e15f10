"""The Structure: a model's weights as norms, sketches and samples of coordinates, by depth and role.

Groups are {attn, mlp, norm} by thirds of the depth, and embed, head, other: of each the norms, a count sketch
and the values at coordinates that are equal for all models of one shape. Sketch and sample are linear: those
of a task vector are the model's less the base's, so nobody needs the base to make one.

Exact to the bit on any machine, whatever order the leaves come in (see sketch.py), so that whoever has the
weights can tell whether a Structure is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.checkpoint.layout import Role
from merge_core.digest import Digest

Floats = npt.NDArray[np.float32]

WIDTH = 2048
"""Buckets of a sketch."""
SAMPLE = 2048
"""Coordinates of a sample; a group of no more elements is sampled whole, and has no sketch."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class GroupKey:
    """Which tensors belong together: a third of the depth (0 is next to the embedding; -1 for all of it or
    outside of the layers) and a role."""

    third: int
    role: str


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """What is known of one group. Sketches and samples of equal `shapes` can be compared, others cannot."""

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
    """float32[min(elements, the sample's size)]: values of W in the order of the coordinates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorms:
    """Norms of the tensors of one role in one layer."""

    layer: int
    role: str
    elements: int
    l1: float
    l2: float
    largest: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """Groups sorted by key, and the norms of layers sorted by layer and role."""

    groups: tuple[Group, ...]
    layers: tuple[LayerNorms, ...]

    @cached_property
    def digest(self) -> Digest:
        """Of all that it holds: equal digests are equal structures."""
        raise NotImplementedError

    def described(self) -> Any:
        """What goes into canonical JSON; `arrays` hold the rest."""
        raise NotImplementedError

    def arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """The numbers, by name."""
        raise NotImplementedError

    @classmethod
    def read(cls, described: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> Structure:
        """The inverse of `described` and `arrays`; raises ValueError on whatever is not exact."""
        raise NotImplementedError


def first_difference(advertised: Structure, computed: Structure) -> GroupKey | None:
    """The first group in which two structures differ in any bit; None where they are equal."""
    raise NotImplementedError
