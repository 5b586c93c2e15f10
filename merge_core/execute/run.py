"""`run`: the weights of a plan's result, written beside the target, however often it is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from pathlib import Path

from merge_core.checkpoint import merkle
from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import file_record, tensor_record
from merge_core.checkpoint.writer import CheckpointWriter
from merge_core.errors import Unmergeable
from merge_core.execute.materials import Material, Materials
from merge_core.execute.pool import INLINE, Pool, pool_of
from merge_core.execute.work import Work
from merge_core.journal import Finished, Journal
from merge_core.memory import CHUNK_ELEMENTS, THREADS
from merge_core.norms import Norms
from merge_core.plan import MergePlan, TensorPlan
from merge_core.trace import Trace

_TINY = 128 << 10
"""Bytes of a tensor that is not worth a thread."""

Progress = Callable[[int], None]
"""Called with the number of output bytes that are done since the last call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What came out: the manifest (and so the ModelId), its leaves, and what had to be traced."""

    manifest: Manifest
    leaves: LeafTable
    trace: Trace


def run(
    plan: MergePlan,
    inputs: Sequence[Material],
    target: Path,
    *,
    journal: Path,
    threads: int = THREADS,
    on_progress: Progress | None = None,
    norms: Norms | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Merged:
    """Write the weights of the output beside `target`; a run that was killed is taken up where it stopped.

    `inputs` are the plan's, in order; `norms` take in what is computed, or was by earlier runs. Raises
    CorruptCheckpoint when an input is not what its digest says, Unmergeable when a tensor cannot be merged
    after all or would hold NaN or infinity, CannotWrite when the disk fails.
    """
    materials = Materials(plan, inputs, chunk_elements=chunk_elements)
    files = materials.files()
    finished: dict[str, Finished] = {}
    with (
        CheckpointWriter.create(target, plan.layout) as writer,
        Journal(journal, plan, fresh=not writer.resumed) as log,
        pool_of(threads) as pool,
    ):
        production = _Production(plan, materials, writer, log.finished, norms)
        for tensor, made, fresh in production.make_all(pool):
            if fresh:
                log.add(tensor.name, made)
            finished[tensor.name] = made
            if on_progress:
                on_progress(tensor.info.length)
        trace = materials.trace(pool)
    manifest = Manifest(
        architecture=plan.result.architecture,
        files=tuple(file_record(name, data) for name, data in files.items()),
        tensors=tuple(tensor_record(t.name, t.info, list(finished[t.name].leaves)) for t in plan.tensors),
    )
    leaves = LeafTable({name: item.leaves for name, item in finished.items()})
    return Merged(manifest=manifest, leaves=leaves, trace=trace)


class _Production:
    """The tensors of the result on their way into a writer, or found there from an earlier run."""

    def __init__(
        self,
        plan: MergePlan,
        materials: Materials,
        writer: CheckpointWriter,
        earlier: Mapping[str, Finished],
        norms: Norms | None,
    ) -> None:
        self._plan = plan
        self._step = len(plan.steps) - 1
        self._materials = materials
        self._writer = writer
        self._earlier = earlier
        self._norms = norms

    def make_all(self, pool: Pool) -> Iterator[tuple[TensorPlan, Finished, bool]]:
        """Every tensor in the plan's order, with whether it was made just now.

        The threads share the pieces of a tensor that has several, and take turns at those that have one. Tiny
        ones are made here: there is so little to compute that threads would only wait for each other.
        """
        for share, run in groupby(self._plan.tensors, key=_share):
            if share is _Share.TENSORS:
                yield from self._in_turns(list(run), pool)
            else:
                for tensor in run:
                    yield tensor, *self._make(tensor, pool if share is _Share.PIECES else INLINE)

    def _in_turns(
        self, tensors: Sequence[TensorPlan], pool: Pool
    ) -> Iterator[tuple[TensorPlan, Finished, bool]]:
        made = pool.ordered(lambda index: self._make(tensors[index], INLINE), len(tensors))
        for tensor, (finished, fresh) in zip(tensors, made, strict=True):
            yield tensor, finished, fresh

    def _make(self, tensor: TensorPlan, pool: Pool) -> tuple[Finished, bool]:
        work = self._materials.work(self._step, tensor.name)
        claimed = self._earlier.get(tensor.name)
        if claimed is not None and work.check(claimed.leaves, self._load(tensor.name), pool):
            self._materials.measured(self._step, tensor.name, pool, known=claimed.traced)
            if self._norms:
                self._norms.recall(tensor.name, claimed.squares)
            return claimed, False
        traced = self._materials.measured(self._step, tensor.name, pool, work=work)
        observe = self._norms.observe if self._norms else None
        pieces = work.digests(traced, pool, self._store(work), observe)
        leaves = tuple(digest for piece in pieces for digest in piece)
        squares = self._norms.squares(tensor.name) if self._norms else ()
        return Finished(leaves=leaves, traced=traced, squares=squares), True

    def _load(self, name: str) -> Callable[[int, int], bytes]:
        return lambda offset, length: self._writer.read(name, offset, length)

    def _store(self, work: Work) -> Callable[[int, memoryview, bool], None]:
        """Write a piece; raises Unmergeable rather than write NaN or infinity."""

        def store(piece: int, data: memoryview, sound: bool) -> None:
            if not sound:
                raise self._not_finite(work, piece)
            self._writer.write(work.tensor.name, piece * work.leaves_per_piece * merkle.LEAF_SIZE, data)

        return store

    def _not_finite(self, work: Work, piece: int) -> Unmergeable:
        return self._materials.damaged(self._step, work.tensor.name, [piece]) or Unmergeable(
            f"{work.tensor.name} would hold NaN or infinity",
            hint="give the models less weight, or dtype: bfloat16, which holds more",
        )


class _Share(Enum):
    """What the threads divide between them."""

    NOTHING = 0
    TENSORS = 1
    PIECES = 2


def _share(tensor: TensorPlan) -> _Share:
    if tensor.info.length <= _TINY:
        return _Share.NOTHING
    return _Share.TENSORS if tensor.info.length <= merkle.LEAF_SIZE else _Share.PIECES
