"""What an operator is: a formula with a name, its parameters, and what it must know of a whole tensor first.

Rules that keep the bits of the result the same on every machine, thread count and chunk size:

- all arithmetic is on float32 tensors, element by element, models in plan order from left to right;
- a product and a sum are two roundings: no fused multiply-add, `alpha=`, addcmul, lerp, `stack().sum(0)`;
- a scalar meets a tensor as a float32 (`single`), so that no library decides how to round it;
- what depends on a whole tensor is measured first, over chunks in index order, and lands in the Trace;
  `apply` then needs one chunk and the traced values alone;
- chance is a function of a key and the index of the element (`Chunk.keys`), never of what came before.

An operator that cannot be split so declares WHOLE_TENSOR; none here does, and audits compare leaves anyway.

`apply` is the formula, in torch, readable beside the paper and good for any device. Where `compiled` is given
it computes the same bits faster on a CPU, and a test holds the two equal. Nothing here imports torch: a
formula uses the methods of the tensors that it is handed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Value: TypeAlias = bool | float | tuple[float, ...]
"""A resolved parameter: one for the merge, or one for each expert in plan order."""

Parameters: TypeAlias = Mapping[str, Value]

Traced: TypeAlias = Mapping[str, tuple[int, ...] | tuple[float, ...]]
"""What `measure` found in the weights of one tensor; the names are the operator's `traces`."""

Array: TypeAlias = NDArray[np.float32]

Stored: TypeAlias = NDArray[np.float32] | NDArray[np.uint16]
"""Elements as kernels take them: float32, or the patterns of bfloat16, which `kernels.f32` widens."""

Order: TypeAlias = NDArray[np.uint32]
"""The indices of all elements of a tensor, sorted by something."""

Orders: TypeAlias = Callable[[Hashable, int, Callable[[], Order]], Order | None]
"""Keeps orders: (by what, of how many elements, how to make it) to the order, None where it has no room."""

T = TypeVar("T")

_BLOCK = 1 << 17

LIBM = 2.0**-22
"""The slack of a traced float32 that was computed with libm, whose last bits differ: two of its roundings."""


class Exactness(Enum):
    """What an audit can demand of an operator's output."""

    ELEMENTWISE = "elementwise"
    GIVEN_TRACE = "elementwise given the Trace"
    WHOLE_TENSOR = "whole tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One setting of an operator; `default` None means that the recipe must give it.

    `each` is true for a setting that every expert has for itself. A value lies in `low`..`high`, both
    included, or above `low` where `open_low` says so.
    """

    name: str
    default: float | bool | None = None
    each: bool = False
    flag: bool = False
    low: float | None = None
    high: float | None = None
    open_low: bool = False

    def fault(self, value: float) -> str | None:
        """Why `value` is out of range, or None."""
        below = self.low is not None and (value <= self.low if self.open_low else value < self.low)
        above = self.high is not None and value > self.high
        if not below and not above:
            return None
        low = "" if self.low is None else f"{'above' if self.open_low else 'at least'} {self.low:g}"
        high = "" if self.high is None else f"at most {self.high:g}"
        return f"{self.name} is {value:g}; it must be {' and '.join(filter(None, (low, high)))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A run of elements of every operand: one dimension, equal lengths, one type, only to be read.

    They are in plan order, the base first where the operator needs one: `tensors` for formulas, in float32,
    and `arrays` for kernels, which widen what is stored as bfloat16 as they go. `start` is the
    index of the first element in the whole tensor. `row` is the length of a row: the last dimension of a
    matrix, all of a vector; an operator that declares `rows` gets whole rows. `keys` holds a 64 bit key for
    each expert of an operator that declares `chance`.
    """

    arrays: tuple[Stored, ...]
    start: int
    row: int
    keys: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.arrays[0])

    def blocks(self) -> Iterator[Chunk]:
        """The parts of a chunk, one after the other: what is made of one stays in the cache for a while."""
        for at in range(0, len(self) or 1, _BLOCK):
            arrays = tuple(array[at : at + _BLOCK] for array in self.arrays)
            yield Chunk(arrays=arrays, start=self.start + at, row=self.row, keys=self.keys)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The elements as float32; they share the memory of arrays that are float32."""
        import torch  # here, so that a merge with compiled operators alone never loads it

        return tuple(
            torch.from_numpy(array)
            if array.dtype == np.float32
            else torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(torch.float32)
            for array in self.arrays
        )


class Stream(Protocol):
    """One tensor's inputs, readable as often as a measurement needs."""

    @property
    def length(self) -> int:
        """The number of elements."""
        ...

    @property
    def orders(self) -> Orders | None:
        """What keeps orders for whoever measures the same weights again; None where nobody will."""
        ...

    def map(self, function: Callable[[Chunk], T]) -> Iterator[T]:
        """Pass over all chunks; results come in index order, `function` may run on several threads.

        Every chunk but the last holds a multiple of 4096 elements.
        """
        ...


class Apply(Protocol):
    """Compute one chunk of the output, float32, from the same chunk of every input."""

    def __call__(self, chunk: Chunk, parameters: Parameters, traced: Traced) -> Tensor: ...


class Compiled(Protocol):
    """Compute what `apply` does, to the bit, into `out`: float32, as long as the arrays of the chunk.

    What comes back is true where it is known that all of it is finite.
    """

    def __call__(self, chunk: Chunk, parameters: Parameters, traced: Traced, out: Array) -> bool | None: ...


class Measure(Protocol):
    """Compute what `apply` must know of the whole tensor."""

    def __call__(self, stream: Stream, parameters: Parameters) -> Traced: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """The declaration of one operator with its kernel.

    `experts` bounds the number of operands that are not the base. `fixed` holds settings of mergekit's that a
    recipe may spell out but not change. `over_base` takes this operator's place where a recipe has a
    base_model: the same parameters, another formula. `passes` is how often `measure` reads the tensors with
    the given parameters, at most. `traces` names what `measure` returns for the given parameters and number
    of experts, with the number of values and whether they are ints; `slack` is how far, relatively, floats
    may lie from what an audit measures: LIBM where sin, acos, exp or log gave them, and else not at all. With
    `rows` every chunk consists of whole rows, with `chance` it comes with keys. `conflict` says why values
    that are each in range do not fit together. `unmeasured` names parameters that `measure` does not look at.
    """

    name: str
    cite: str
    exactness: Exactness
    needs_base: bool
    experts: tuple[int, int | None]
    parameters: tuple[Parameter, ...]
    apply: Apply
    compiled: Compiled | None = None
    measure: Measure | None = None
    passes: Callable[[Parameters], int] = lambda parameters: 0
    traces: Callable[[Parameters, int], Mapping[str, tuple[int, type]]] = lambda parameters, experts: {}
    slack: float = 0.0
    rows: bool = False
    chance: bool = False
    conflict: Callable[[Parameters], str | None] = lambda parameters: None
    fixed: Mapping[str, bool] = field(default_factory=dict, hash=False)
    over_base: Operator | None = None
    unmeasured: frozenset[str] = frozenset()

    def parameter(self, name: str) -> Parameter | None:
        """The declaration of one parameter, or None."""
        return next((p for p in self.parameters if p.name == name), None)


def single(value: float) -> float:
    """Round to the nearest float32, to even, and return it as the Python float of the same value."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def number(parameters: Parameters, name: str) -> float:
    """A parameter that holds for all experts."""
    value = parameters[name]
    if isinstance(value, tuple):
        raise TypeError(f"{name} is given for each expert")
    return float(value)


def each(parameters: Parameters, name: str) -> tuple[float, ...]:
    """A parameter that every expert has for itself, in plan order."""
    value = parameters[name]
    if not isinstance(value, tuple):
        raise TypeError(f"{name} is given once for all experts")
    return value
