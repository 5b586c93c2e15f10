"""Fingerprints of checkpoints that are being added, computed in a worker: nobody else loads torch."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

from node.catalog.shelf import Measurable, Sketched
from node.worker import process


def sketch_in_worker(measured: Measurable, *, probes: str) -> Sketched:
    """Compute a fingerprint (blocking, outside of any event loop), structure and behaviour.

    `probes` is a built-in set or an absolute FILE.jsonl; empty: the structure alone. A model that cannot be
    run has no behaviour, which is no failure. Raises InvalidTask, CorruptCheckpoint, LocalError.
    """
    return asyncio.run(sketch(measured, probes=probes))


async def sketch(measured: Measurable, *, probes: str) -> Sketched:
    """As `sketch_in_worker`, on an event loop that lasts as long as the work."""
    with TemporaryDirectory(prefix="weft-") as folder:
        output = Path(folder) / "fingerprint"
        described = {
            "directory": str(measured.directory),
            "manifest": str(measured.manifest),
            "leaves": str(measured.leaves),
        }
        request = {"input": described, "output": str(output), "probes": probes}
        made = await process.run("fingerprint", request, on_event=lambda event: None)
        return Sketched(fingerprint=await asyncio.to_thread(output.read_bytes), silent=made["silent"])
