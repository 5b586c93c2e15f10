"""Execution: a MergePlan streamed, chunk by chunk, into a new checkpoint, and done again to audit one.

    run    write the weights of the output, with memory for a few chunks, whatever the size of a tensor
    leaf   one leaf of the output alone
    trace  what was measured of one tensor
    audit  every leaf again, compared with what was claimed
    load   what a process does before its first merge, and may do while it waits for one

Each tensor is measured first where its operator asks for it (the Trace), then computed. Chunks are whole
leaves from the start of the tensor, and every step is elementwise or a fixed tree, so threads and chunk sizes
do not show in the bits.

`run` leaves the weights in the partial folder of the target, and the journal where the caller wanted it. To
finish, open the writer again, add the functional files and records, and commit:

    merged = run(plan, inputs, target, journal=journal)
    with CheckpointWriter.create(target, plan.layout) as writer:
        for name, data in (result_files(plan, files_of_inputs) | records).items():
            writer.add_file(name, data)
        writer.commit()
    journal.unlink()

So the process that computes needs no keys, and the one that signs needs no kernels.

materials  what operands read from: models, and the results of earlier steps
aligned    a model's embedding with the rows of the output, where a recipe chooses its tokens
work       one tensor in pieces
pool       threads that take pieces in order
"""

from __future__ import annotations

import numpy as np

from merge_core.execute.audit import AuditReport, audit, leaf, trace
from merge_core.execute.materials import Material
from merge_core.execute.run import Merged, Progress, run
from merge_core.operators import convert

__all__ = ["AuditReport", "Material", "Merged", "Progress", "audit", "leaf", "load", "run", "trace"]


def load() -> None:
    """Load what every merge needs: numba takes as long for its first kernel as for being imported."""
    convert.narrow(np.empty(0, np.float32), "BF16", np.empty(0, np.uint16))
