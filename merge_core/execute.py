"""Execution: a MergePlan streamed, chunk by chunk, into a new checkpoint, and done again to audit one.

    run    write the weights of the output, with memory for a few chunks, whatever the size of a tensor
    leaf   one leaf of the output alone
    audit  every leaf again, compared with what was claimed

Each tensor is measured first where its operator asks for it (the Trace), then computed. Chunks are whole
leaves from the start of the tensor, and every step is elementwise or a fixed tree, so threads and chunk sizes
do not show in the bits.

`run` leaves the weights in the partial folder of the target, and the journal where the caller wanted it. To
finish, open the writer again, add the functional files and records, and commit:

    merged = run(plan, sources, donor_files, target, journal=journal)
    with CheckpointWriter.create(target, plan.layout) as writer:
        for name, data in (output_files(plan, donor_files) | records).items():
            writer.add_file(name, data)
        writer.commit()
    journal.unlink()

So the process that computes needs no keys, and the one that signs needs no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from merge_core.checkpoint import dtypes, merkle
from merge_core.checkpoint.finite import finite
from merge_core.checkpoint.manifest import LeafTable, Manifest, TensorRecord, tensor_root_of
from merge_core.checkpoint.reader import file_record, tensor_record
from merge_core.checkpoint.source import TensorSource
from merge_core.checkpoint.writer import CheckpointWriter
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.functional import output_files
from merge_core.journal import Finished, Journal
from merge_core.operators import OPERATORS, arithmetic
from merge_core.operators.base import Chunk, Traced
from merge_core.plan import CHUNK_ELEMENTS, THREADS, MergePlan, TensorPlan
from merge_core.trace import Trace, close

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_BLOCK_ELEMENTS = 1 << 16
"""Elements that a kernel computes at once: its temporaries then fit the cache."""

Progress = Callable[[int], None]
"""Called with the number of output bytes that are done since the last call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What came out: the manifest (and so the ModelId), its leaves, and what had to be traced."""

    manifest: Manifest
    leaves: LeafTable
    trace: Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """How a claimed merge compares with its re-execution: `failed` lists (tensor, leaf) that differ."""

    checked: int
    failed: tuple[tuple[str, int], ...]
    trace_ok: bool
    files_ok: bool

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return self.trace_ok and self.files_ok and not self.failed


def run(
    plan: MergePlan,
    sources: Sequence[TensorSource],
    donor_files: Mapping[str, bytes],
    target: Path,
    *,
    journal: Path,
    threads: int = THREADS,
    on_progress: Progress | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Merged:
    """Write the weights of the output beside `target`; a run that was killed is taken up where it stopped.

    `sources` are the plan's inputs in order, `donor_files` the functional files of the donor. Raises
    CorruptCheckpoint when an input is not what its digest says, Unmergeable when a tensor cannot be merged
    after all or would hold NaN or infinity, CannotWrite when the disk fails.
    """
    _check_sources(plan, sources, plan.tensors)
    files = output_files(plan, donor_files)
    finished: dict[str, Finished] = {}
    with (
        CheckpointWriter.create(target, plan.layout) as writer,
        Journal(journal, plan, fresh=not writer.resumed) as log,
        _pool(threads) as pool,
    ):
        for tensor in plan.tensors:
            work = _Work(tensor, sources, pool, chunk_elements)
            claimed = log.finished.get(tensor.name)
            if claimed is None or not _still_there(writer, work, claimed):
                claimed = _produce(plan, writer, work)
                log.add(tensor.name, claimed)
            finished[tensor.name] = claimed
            if on_progress:
                on_progress(tensor.info.length)
    manifest = Manifest(
        architecture=plan.architecture,
        files=tuple(file_record(name, data) for name, data in files.items()),
        tensors=tuple(tensor_record(t.name, t.info, list(finished[t.name].leaves)) for t in plan.tensors),
    )
    return Merged(
        manifest=manifest,
        leaves=LeafTable({name: item.leaves for name, item in finished.items()}),
        trace=Trace(tensors={name: item.traced for name, item in finished.items() if item.traced}),
    )


def leaf(plan: MergePlan, trace: Trace, sources: Sequence[TensorSource], tensor: str, index: int) -> bytes:
    """Compute one leaf of the output from the plan, the Trace and as many elements of the inputs.

    Raises KeyError on an unknown tensor, ValueError on a leaf that it does not have.
    """
    planned = {t.name: t for t in plan.tensors}[tensor]
    if not 0 <= index < merkle.leaf_count(planned.info.length):
        raise ValueError(f"leaf {index} of {tensor}, which has {merkle.leaf_count(planned.info.length)}")
    _check_sources(plan, sources, (planned,))
    with _pool(1) as pool:
        work = _Work(planned, sources, pool, CHUNK_ELEMENTS)
        piece, within = divmod(index, work.leaves_per_piece)
        data = work.compute(piece, trace[tensor])
    return bytes(data[within * merkle.LEAF_SIZE : (within + 1) * merkle.LEAF_SIZE])


def audit(
    plan: MergePlan,
    trace: Trace,
    sources: Sequence[TensorSource],
    donor_files: Mapping[str, bytes],
    manifest: Manifest,
    leaves: LeafTable,
    *,
    threads: int = THREADS,
    on_progress: Progress | None = None,
) -> AuditReport:
    """Execute the plan again and compare every leaf, the Trace and the functional files with the claims.

    Nothing is written. `donor_files` must be known to be the donor's. The traced values are measured again;
    where the claimed ones do not agree, every leaf of the tensor has failed.
    """
    _check_sources(plan, sources, plan.tensors)
    checked = 0
    trace_ok = trace.tensors.keys() <= plan.layout.keys()
    records = {t.name: t for t in manifest.tensors}
    failed = [(name, 0) for name in sorted(records.keys() - plan.layout.keys())]
    with _pool(threads) as pool:
        for tensor in plan.tensors:
            work = _Work(tensor, sources, pool, CHUNK_ELEMENTS)
            claimed = _claimed_leaves(tensor, records.get(tensor.name), leaves)
            agrees = close(trace[tensor.name], work.measure())
            trace_ok = trace_ok and agrees
            computed = work.digests(trace[tensor.name]) if agrees else iter([])
            mine = [digest for digests in computed for digest in digests] or [b""] * work.leaves
            failed += [
                (tensor.name, index)
                for index in range(work.leaves)
                if index >= len(claimed) or mine[index] != claimed[index]
            ]
            checked += work.leaves
            if on_progress:
                on_progress(tensor.info.length)
    files = tuple(file_record(name, data) for name, data in output_files(plan, donor_files).items())
    files_ok = files == manifest.files and manifest.architecture == plan.architecture
    return AuditReport(checked=checked, failed=tuple(failed), trace_ok=trace_ok, files_ok=files_ok)


class _Work:
    """One tensor of a plan in pieces: chunks of elements, or single leaves where bytes are passed through."""

    def __init__(
        self,
        tensor: TensorPlan,
        sources: Sequence[TensorSource],
        pool: _Pool,
        chunk_elements: int,
    ) -> None:
        if chunk_elements < CHUNK_ELEMENTS or chunk_elements % CHUNK_ELEMENTS:
            raise ValueError(f"a chunk is a multiple of {CHUNK_ELEMENTS} elements")
        self.tensor = tensor
        self.leaves = merkle.leaf_count(tensor.info.length)
        self._sources = tuple(sources[i] for i in tensor.inputs)
        self._operator = OPERATORS[tensor.operator]
        self._pool = pool
        self._chunk = chunk_elements
        size = dtypes.SIZES[tensor.dtype]
        self.length = tensor.info.length // size
        self._copied = tensor.operator == "passthrough"
        self.leaves_per_piece = 1 if self._copied else chunk_elements * size // merkle.LEAF_SIZE
        self.pieces = -(-self.leaves // self.leaves_per_piece)

    def map(self, function: Callable[[Chunk], T]) -> Iterator[T]:
        """Pass over the inputs, chunk by chunk, in index order: what makes this a Stream."""

        def on_chunk(piece: int) -> T:
            start, inputs = self._read(piece)
            return function(Chunk(tensors=tuple(map(arithmetic.widen, inputs)), start=start))

        return self._pool.ordered(on_chunk, self.pieces)

    def measure(self) -> Traced:
        """What the operator must know of the whole tensor; empty where that is nothing."""
        try:
            return self._operator.measure(self, self.tensor.parameters) if self._operator.measure else {}
        except Unmergeable as error:
            raise Unmergeable(f"{self.tensor.name}: {error.why}", hint=error.hint) from error

    def compute(self, piece: int, traced: Traced) -> memoryview:
        """The bytes of one piece of the output."""
        if self._copied:
            return memoryview(bytes(self._sources[0].read(self.tensor.name, piece, 1)))
        start, inputs = self._read(piece)
        size = dtypes.SIZES[self.tensor.dtype]
        output = memoryview(bytearray(len(inputs[0]) * size))
        for at in range(0, len(inputs[0]), _BLOCK_ELEMENTS):
            tensors = tuple(arithmetic.widen(stored[at : at + _BLOCK_ELEMENTS]) for stored in inputs)
            chunk = Chunk(tensors=tensors, start=start + at)
            data = arithmetic.narrow(
                self._operator.apply(chunk, self.tensor.parameters, traced), self.tensor.dtype
            )
            output[at * size : at * size + len(data)] = data
        return output

    def digests(
        self, traced: Traced, store: Callable[[int, memoryview], None] | None = None
    ) -> Iterator[list[bytes]]:
        """The leaf digests of the output, piece by piece; `store` gets (offset in bytes, data) of each."""

        def produce(piece: int) -> list[bytes]:
            data = self.compute(piece, traced)
            if store:
                store(piece * self.leaves_per_piece * merkle.LEAF_SIZE, data)
            return _leaf_digests(data)

        return self._pool.ordered(produce, self.pieces)

    def damaged(self, piece: int) -> int | None:
        """The first input of the plan with NaN or infinity in a piece; None where all hold numbers."""
        if self._copied:
            data = self._sources[0].read(self.tensor.name, piece, 1)
            return None if finite(data, self.tensor.dtype) else self.tensor.inputs[0]
        _, inputs = self._read(piece)
        pairs = zip(self.tensor.inputs, inputs, strict=True)
        return next((index for index, elements in pairs if not elements.isfinite().all()), None)

    def check(self, claimed: Sequence[bytes], load: Callable[[int, int], bytes]) -> bool:
        """Whether the bytes that `load(offset, length)` gives have the claimed leaf digests."""

        def holds(index: int) -> bool:
            size = merkle.leaf_size(self.tensor.info.length, index)
            return merkle.leaf_digest(load(index * merkle.LEAF_SIZE, size)) == claimed[index]

        return all(self._pool.ordered(holds, self.leaves))

    def _read(self, piece: int) -> tuple[int, list[Tensor]]:
        """The index of the first element of a piece, and the piece of every input as it is stored."""
        start = piece * self._chunk
        count = min(self._chunk, self.length - start)
        tensors = []
        for source in self._sources:
            dtype = source.tensors[self.tensor.name].dtype
            size = dtypes.SIZES[dtype]
            first = start * size // merkle.LEAF_SIZE
            data = source.read(self.tensor.name, first, merkle.leaf_count(count * size))
            if len(data) != count * size:
                raise CorruptCheckpoint(f"{self.tensor.name}: {len(data)} bytes where {count * size} belong")
            tensors.append(arithmetic.stored(data, dtype))
        return start, tensors


class _Pool:
    """Threads that work on pieces in order, a few at a time."""

    def __init__(self, executor: ThreadPoolExecutor, window: int) -> None:
        self._executor = executor
        self._window = window

    def ordered(self, function: Callable[[int], T], count: int) -> Iterator[T]:
        """Call `function` on 0..count-1; results come in order, at most `window` wait at once.

        A caller that stops early, or an error, leaves nothing running behind.
        """
        if count == 1:
            yield function(0)
            return
        pending: deque[Future[T]] = deque()
        try:
            for index in range(count):
                pending.append(self._executor.submit(function, index))
                if len(pending) == self._window:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            wait(pending)


@contextmanager
def _pool(threads: int) -> Iterator[_Pool]:
    with (
        arithmetic.one_thread_each(),
        ThreadPoolExecutor(max_workers=threads, thread_name_prefix="merge") as executor,
    ):
        yield _Pool(executor, threads + 1)


def _produce(plan: MergePlan, writer: CheckpointWriter, work: _Work) -> Finished:
    """Measure, compute and write one tensor; raises Unmergeable rather than write NaN or infinity."""
    name = work.tensor.name
    traced = work.measure()

    def store(offset: int, data: memoryview) -> None:
        if not finite(data, work.tensor.dtype):
            raise _not_finite(plan, work, offset // (work.leaves_per_piece * merkle.LEAF_SIZE))
        writer.write(name, offset, data)

    digests = work.digests(traced, store=store)
    return Finished(leaves=tuple(d for piece in digests for d in piece), traced=traced)


def _not_finite(plan: MergePlan, work: _Work, piece: int) -> Unmergeable:
    index = work.damaged(piece)
    why = f"{work.tensor.name} would hold NaN or infinity"
    if index is None:
        return Unmergeable(why, hint="give the models less weight, or dtype: bfloat16, which holds more")
    return Unmergeable(why, hint=f"leave out {plan.inputs[index]}, whose {work.tensor.name} does already")


def _still_there(writer: CheckpointWriter, work: _Work, claimed: Finished) -> bool:
    """Whether the bytes of an earlier run are what its journal says."""
    name = work.tensor.name
    return work.check(claimed.leaves, lambda offset, length: writer.read(name, offset, length))


def _leaf_digests(data: memoryview) -> list[bytes]:
    return [
        merkle.leaf_digest(data[i : i + merkle.LEAF_SIZE]) for i in range(0, len(data) or 1, merkle.LEAF_SIZE)
    ]


def _claimed_leaves(tensor: TensorPlan, record: TensorRecord | None, leaves: LeafTable) -> Sequence[bytes]:
    """The leaves claimed for a planned tensor; none where its record or the leaves do not belong to it."""
    if record is None or (record.dtype, record.shape) != (tensor.dtype, tensor.shape):
        return ()
    try:
        claimed = leaves[tensor.name]
    except KeyError:
        return ()
    return claimed if tensor_root_of(tensor.dtype, tensor.shape, claimed).hex() == record.root else ()


def _check_sources(plan: MergePlan, sources: Sequence[TensorSource], tensors: Sequence[TensorPlan]) -> None:
    """Raise CorruptCheckpoint unless every input has the tensors that the plan takes from it."""
    if len(sources) != len(plan.inputs):
        raise ValueError(f"{len(sources)} sources for a plan of {len(plan.inputs)} inputs")
    for tensor in tensors:
        for index in tensor.inputs:
            info = sources[index].tensors.get(tensor.name)
            copied = tensor.operator == "passthrough"
            if info is None or info.shape != tensor.shape:
                what = "lacks" if info is None else f"has shape {list(info.shape)} for"
            elif info.dtype != tensor.dtype if copied else info.dtype not in dtypes.MERGEABLE:
                what = f"has type {info.dtype} for"
            else:
                continue
            raise CorruptCheckpoint(
                f"input {index} of the plan ({plan.inputs[index]}) {what} {tensor.name}",
                hint="weft plan RECIPE",
            )
