"""`audit`: every leaf again, compared with what was claimed; `leaf` and `trace`: one of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_core.checkpoint import merkle
from merge_core.checkpoint.manifest import LeafTable, Manifest, TensorRecord, tensor_root_of
from merge_core.checkpoint.reader import file_record
from merge_core.execute.materials import Material, Materials
from merge_core.execute.pool import INLINE, pool_of
from merge_core.execute.run import Progress
from merge_core.memory import THREADS
from merge_core.operators.base import Traced
from merge_core.plan import MergePlan, TensorPlan
from merge_core.trace import Trace


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


def leaf(plan: MergePlan, trace: Trace, inputs: Sequence[Material], tensor: str, index: int) -> bytes:
    """Compute one leaf of the output from the plan, the Trace and as many elements of the inputs.

    An operator that ranks within rows reads those to their ends. The Trace is believed. Raises KeyError on an
    unknown tensor, ValueError on a leaf that it does not have.
    """
    materials = Materials(plan, inputs, claimed=trace)
    step = len(plan.steps) - 1
    work = materials.work(step, tensor)
    if not 0 <= index < work.leaves:
        raise ValueError(f"leaf {index} of {tensor}, which has {work.leaves}")
    materials.believe()
    piece, within = divmod(index, work.leaves_per_piece)
    out = memoryview(bytearray(work.piece_bytes(piece)))
    work.compute(piece, trace.of(step, tensor), out)
    return bytes(out[within * merkle.LEAF_SIZE : (within + 1) * merkle.LEAF_SIZE])


def trace(plan: MergePlan, inputs: Sequence[Material], tensor: str) -> Traced:
    """Measure again what the Trace says of one tensor of the output; raises KeyError on an unknown one."""
    return Materials(plan, inputs).measured(len(plan.steps) - 1, tensor, INLINE)


def audit(
    plan: MergePlan,
    claims: Trace,
    inputs: Sequence[Material],
    manifest: Manifest,
    leaves: LeafTable,
    *,
    threads: int = THREADS,
    on_progress: Progress | None = None,
) -> AuditReport:
    """Execute the plan again and compare every leaf, the Trace and the functional files with the claims.

    Nothing is written. The functional files of the inputs must be known to be theirs. Traced values are
    measured again; where the claimed ones do not agree, every leaf of the tensor has failed.
    """
    materials = Materials(plan, inputs, claimed=claims)
    step = len(plan.steps) - 1
    records = {t.name: t for t in manifest.tensors}
    failed = [(name, 0) for name in sorted(records.keys() - plan.layout.keys())]
    checked = 0
    with pool_of(threads) as pool:
        for tensor in plan.tensors:
            work = materials.work(step, tensor.name)
            claimed = _claimed_leaves(tensor, records.get(tensor.name), leaves)
            doubts = len(materials.doubted)
            traced = materials.measured(step, tensor.name, pool, work=work)
            agrees = len(materials.doubted) == doubts
            computed = work.digests(traced, pool) if agrees else iter([])
            mine = [digest for digests in computed for digest in digests] or [b""] * work.leaves
            failed += [
                (tensor.name, index)
                for index in range(work.leaves)
                if index >= len(claimed) or mine[index] != claimed[index]
            ]
            checked += work.leaves
            if on_progress:
                on_progress(tensor.info.length)
        measured = materials.trace(pool)
    files = tuple(file_record(name, data) for name, data in materials.files().items())
    return AuditReport(
        checked=checked,
        failed=tuple(failed),
        trace_ok=not materials.doubted and measured == claims,
        files_ok=files == manifest.files and manifest.architecture == plan.result.architecture,
    )


def _claimed_leaves(tensor: TensorPlan, record: TensorRecord | None, leaves: LeafTable) -> Sequence[bytes]:
    """The leaves claimed for a planned tensor; none where its record or the leaves do not belong to it."""
    if record is None or (record.dtype, record.shape) != (tensor.dtype, tensor.shape):
        return ()
    try:
        claimed = leaves[tensor.name]
    except KeyError:
        return ()
    return claimed if tensor_root_of(tensor.dtype, tensor.shape, claimed).hex() == record.root else ()
