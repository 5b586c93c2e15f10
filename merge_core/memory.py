"""What a merge takes of the memory, said before it begins, and how many threads a limit allows.

A thread holds one piece of a tensor: every operand as it is stored, as float32 while it is measured, what the
operator computes beside it, and the output. Weights never lie in memory as a whole, so the size of a model
hardly shows; a tensor of moderate size that is read several times stays in memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from merge_core.checkpoint import dtypes, merkle
from merge_core.checkpoint.source import TensorInfo
from merge_core.errors import Unmergeable
from merge_core.operators import COPY, find
from merge_core.plan import Step, TensorPlan

CHUNK_ELEMENTS = 1 << 19
"""Elements that are in work at once per thread: whole leaves of every type that arithmetic is defined on."""

THREADS = 2
"""Threads of a merge unless it is told otherwise."""

_HELD = 96 << 20
"""Bytes of a tensor's operands, as stored, up to which they may stay in memory from pass to pass."""

_PROCESS = 160 << 20
"""A worker with its kernels loaded."""
_TORCH = 160 << 20
"""What torch adds, where an operator has no compiled kernel."""
_THREAD = 24 << 20
"""What a thread holds whatever it works on: histograms, and what the allocator keeps for it."""
_TENSOR = 4 << 10
"""Names, digests and parameters of one tensor."""
_TOKENS = 224 << 20
"""Tokenizers of some 150,000 tokens while they are read, and the leaves that rows are gathered from."""


def peak(steps: Sequence[Step], inputs: Sequence[Mapping[str, TensorInfo]], *, threads: int) -> int:
    """An upper bound, in bytes, for the process that runs steps over inputs with these tensors."""
    tensors = [tensor for step in steps for tensor in step.tensors]
    compiled = all(find(name).compiled for name in {t.operator for t in tensors} - {COPY.name})
    working, staying = (
        sum(max((of(tensor, inputs, steps) for tensor in step.tensors), default=0) for step in steps)
        for of in (_working_set, _staying)
    )
    fixed = _PROCESS + (0 if compiled else _TORCH) + len(tensors) * _TENSOR
    fixed += _TOKENS if any(step.tokenizer for step in steps) else 0
    return fixed + staying + threads * (_THREAD + working)


def fit(
    steps: Sequence[Step],
    inputs: Sequence[Mapping[str, TensorInfo]],
    *,
    threads: int,
    limit: int | None,
) -> int:
    """The number of threads, at most `threads`, with which a merge stays within `limit` bytes.

    Raises Unmergeable where one thread needs more.
    """
    if limit is None:
        return threads
    for count in range(threads, 0, -1):
        if peak(steps, inputs, threads=count) <= limit:
            return count
    needed = -(-peak(steps, inputs, threads=1) // (1 << 20))
    raise Unmergeable(
        f"one thread needs {needed} MiB, and {limit >> 20} MiB are allowed",
        hint=f"weft merge RECIPE -o DIR --max-memory {needed}MiB",
    )


def held(tensor: TensorPlan, size: int) -> bool:
    """Whether operands of `size` bytes stay in memory from pass to pass; for one pass that does not pay."""
    passes = 0 if tensor.operator == COPY.name else find(tensor.operator).passes(tensor.parameters)
    return passes > 1 and size <= _HELD


def _working_set(
    tensor: TensorPlan, inputs: Sequence[Mapping[str, TensorInfo]], steps: Sequence[Step]
) -> int:
    """What one thread holds for a piece of a tensor, in bytes."""
    if tensor.operator == COPY.name:
        return 2 * merkle.LEAF_SIZE
    operator = find(tensor.operator)
    length = max(1, tensor.info.length // dtypes.SIZES[tensor.dtype])
    elements = min(CHUNK_ELEMENTS, length)
    if operator.rows:
        row = tensor.row
        elements = min(length, elements + 2 * row)
    sizes = [dtypes.SIZES[info.dtype] for info in _operands(tensor, inputs, steps)]
    stored = sum(elements * size + 2 * merkle.LEAF_SIZE for size in sizes)
    measured = 4 * elements * (len(sizes) + 2) if operator.passes(tensor.parameters) else 0
    computed = 4 * elements * (2 * len(sizes) + 6)
    return stored + measured + computed + elements * dtypes.SIZES[tensor.dtype]


def _staying(tensor: TensorPlan, inputs: Sequence[Mapping[str, TensorInfo]], steps: Sequence[Step]) -> int:
    """What all threads hold together of a tensor that is read more than once, in bytes."""
    size = sum(info.length for info in _operands(tensor, inputs, steps))
    return size + len(tensor.operands) * merkle.LEAF_SIZE if held(tensor, size) else 0


def _operands(
    tensor: TensorPlan, inputs: Sequence[Mapping[str, TensorInfo]], steps: Sequence[Step]
) -> Iterator[TensorInfo]:
    for operand in tensor.operands:
        step = operand.source - len(inputs)
        yield (inputs[operand.source] if step < 0 else steps[step].layout)[operand.tensor]
