"""Fingerprints of checkpoints that are being added, computed in a worker: nobody else loads torch."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

from node.catalog.shelf import Measurable
from node.worker import process


def sketch_in_worker(measured: Measurable) -> bytes:
    """Compute a fingerprint (blocking, outside of any event loop) and return its canonical bytes."""
    with TemporaryDirectory(prefix="weft-") as folder:
        output = Path(folder) / "fingerprint.json"
        described = {
            "directory": str(measured.directory),
            "manifest": str(measured.manifest),
            "leaves": str(measured.leaves),
        }
        request = {"input": described, "output": str(output)}
        asyncio.run(process.run("fingerprint", request, on_event=lambda event: None))
        return output.read_bytes()
