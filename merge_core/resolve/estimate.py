"""The Estimate: what checking a recipe found, and what the merge will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_core.checkpoint.source import TensorInfo
from merge_core.memory import peak
from merge_core.operators import find
from merge_core.plan import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Sizes in bytes, upper bounds for memory and reading; the disk holds `output_bytes`.

    A merge with `problems` cannot be done; `warnings` are for the person to judge.
    """

    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    tensors: int
    output_bytes: int
    peak_ram_bytes: int
    read_bytes: int


def estimate(
    inputs: Sequence[Mapping[str, TensorInfo]],
    steps: Sequence[Step],
    *,
    problems: Sequence[str],
    warnings: Sequence[str],
    threads: int,
) -> Estimate:
    """What steps over these inputs cost: each tensor that a step takes of an earlier one is computed anew."""
    reading = _Reading(inputs)
    for step in steps:
        reading.add(step)
    made = steps[-1].tensors if steps else ()
    return Estimate(
        problems=tuple(problems),
        warnings=tuple(warnings),
        tensors=len(made),
        output_bytes=sum(t.info.length for t in made),
        peak_ram_bytes=peak(steps, inputs, threads=threads),
        read_bytes=reading.measured + (sum(reading.once[-1].values()) if made else 0),
    )


class _Reading:
    """The bytes that are read to compute each tensor of each source once: of an input, its own."""

    def __init__(self, inputs: Sequence[Mapping[str, TensorInfo]]) -> None:
        self.once = [{name: info.length for name, info in tensors.items()} for tensors in inputs]
        self.measured = 0

    def add(self, step: Step) -> None:
        """Count a step, which takes from the sources so far, as one more; `measured` grows with it."""
        once = {}
        for tensor in step.tensors:
            once[tensor.name] = sum(self.once[o.source][o.tensor] for o in tensor.operands)
            self.measured += find(tensor.operator).passes(tensor.parameters) * once[tensor.name]
        self.once.append(once)
