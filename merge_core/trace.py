"""The Trace: what execution had to compute from the weights before it could merge them.

Angles and thresholds, tensor by tensor. An attestation binds its digest; an audit computes the values again,
allows those that come from libm the last bits of a float32, and then applies the claimed ones exactly, so
that every leaf follows from the plan, the Trace and the inputs.
`Trace.parse(plan, trace.to_bytes()) == trace`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from merge_core.digest import Digest, canonical, check_version, parse_canonical, sha256
from merge_core.errors import CorruptCheckpoint
from merge_core.operators.base import Traced
from merge_core.plan import MergePlan, Step, TensorPlan, trace_shape

MAX_TRACE = 64 << 20
_NOISE = 2.0**-40
"""What libm leaves of a zero, beside the largest value of the tensor."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The traced values of each step by tensor; tensors that needed none do not appear."""

    steps: tuple[Mapping[str, Traced], ...]

    def of(self, step: int, tensor: str) -> Traced:
        """The values of one tensor: empty where it needed none."""
        return self.steps[step].get(tensor, {})

    def __len__(self) -> int:
        """How many tensors have values."""
        return sum(map(len, self.steps))

    @cached_property
    def digest(self) -> Digest:
        """The digest of the canonical bytes."""
        return sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The canonical bytes: floats as hex, integers as they are."""
        return canonical(
            {
                "version": 2,
                "steps": [
                    {name: write_values(traced) for name, traced in step.items()} for step in self.steps
                ],
            }
        )

    @classmethod
    def parse(cls, plan: MergePlan, data: bytes) -> Trace:
        """Read a trace that may come from anybody; raises CorruptCheckpoint unless it fits the plan."""
        if len(data) > MAX_TRACE:
            raise CorruptCheckpoint(f"a trace of {len(data)} bytes; at most {MAX_TRACE} are read")
        try:
            value = parse_canonical(data)
            if not isinstance(value, dict) or set(value) != {"version", "steps"}:
                raise ValueError("expected exactly the keys steps and version")
            check_version(value["version"], 2, "trace")
            steps = zip(plan.steps, value["steps"], strict=True)
            return cls(steps=tuple(_step(step, claimed) for step, claimed in steps))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise CorruptCheckpoint(f"not the trace of this plan: {error}") from error


def _step(step: Step, claimed: Any) -> dict[str, Traced]:
    needed = [tensor for tensor in step.tensors if trace_shape(tensor)]
    if not isinstance(claimed, dict) or claimed.keys() != {tensor.name for tensor in needed}:
        raise ValueError("it lists other tensors than the plan needs")
    return {t.name: read_values(t, claimed[t.name]) for t in needed}


def write_values(traced: Traced) -> dict[str, list[Any]]:
    """The JSON value of one tensor's traced values."""
    return {
        name: [item.hex() if isinstance(item, float) else item for item in values]
        for name, values in traced.items()
    }


def read_values(tensor: TensorPlan, value: Any) -> Traced:
    """One tensor's traced values from JSON; raises ValueError or TypeError unless they fit its plan."""
    shape = trace_shape(tensor)
    if not isinstance(value, dict) or value.keys() != shape.keys():
        raise ValueError(f"{tensor.name} needs exactly {sorted(shape)}")
    traced: dict[str, Any] = {}
    for name, (count, kind) in shape.items():
        items = value[name]
        if not isinstance(items, list) or len(items) != count:
            raise ValueError(f"{name} of {tensor.name} needs {count} values")
        traced[name] = tuple(_float(item) if kind is float else _integer(item) for item in items)
    return traced


def close(claimed: Traced, computed: Traced, slack: float) -> bool:
    """Whether two traces of one tensor agree: exactly, or floats by the `slack` of their operator."""
    return claimed.keys() == computed.keys() and all(
        _agree(claimed[name], computed[name], slack) for name in claimed
    )


def _agree(claimed: Sequence[float], computed: Sequence[float], slack: float) -> bool:
    if len(claimed) != len(computed):
        return False
    noise = _NOISE * max(map(abs, computed), default=0.0) if slack else 0.0
    return all(
        c == d or (isinstance(d, float) and math.isclose(c, d, rel_tol=slack, abs_tol=noise))
        for c, d in zip(claimed, computed, strict=True)
    )


def _float(item: Any) -> float:
    if not isinstance(item, str) or len(item) > 32:
        raise ValueError("a hex float is needed")
    value = float.fromhex(item)
    if value.hex() != item or not math.isfinite(value):
        raise ValueError("a finite hex float, as float.hex writes it, is needed")
    return value


def _integer(item: Any) -> int:
    if type(item) is not int or not -1 <= item < 2**53:
        raise ValueError("an integer from -1 to 2^53 - 1 is needed")
    return item
