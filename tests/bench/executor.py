"""The executor alone against the copy limit, in a process of its own: what an engine adds to moving bytes.

    python tests/bench/executor.py RECIPE HOME FOLDER

The limit reads every input once and writes as many bytes as the output has: plain pread and pwrite of 4 MiB,
two threads, a preallocated file, no hashing. Then the plan runs on the same inputs, with the digests that the
node with this HOME keeps. Prints {"copy_s": ..., "run_s": ...}; FOLDER is left as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from merge_core import execute, recipe
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource
from merge_core.checkpoint.writer import partial_path
from merge_core.resolve import draft, header_of
from node.catalog.hashes import HashCache
from node.home import Home

BLOCK = 4 << 20
THREADS = 2


def main(path: Path, home: Path, folder: Path) -> dict[str, float]:
    """Time the copy, then the plan."""
    wanted = recipe.parse(path.read_text())
    hashes = HashCache(Home(home).cache / "hashes")
    with ExitStack() as stack:
        opened = {m: stack.enter_context(Checkpoint.open(Path(m))) for m in wanted.models}
        measured = {m: hashes.measure(checkpoint) for m, checkpoint in opened.items()}
        drafted = draft(wanted, {m: header_of(checkpoint) for m, checkpoint in opened.items()})
        plan = drafted.seal({m: item.manifest.model_id for m, item in measured.items()})
        weights = [file for m in wanted.models for file in sorted(Path(m).glob("*.safetensors"))]
        copy = copy_seconds(weights, folder / "copy", plan.output_bytes)
        inputs = [
            execute.Material(
                tensors=VerifiedSource(opened[m], measured[m].leaves), files=opened[m].functional_files
            )
            for m in wanted.models
        ]
        target = folder / "executed"
        try:
            started = time.perf_counter()
            execute.run(plan, inputs, target, journal=folder / "executed.journal", threads=THREADS)
            return {"copy_s": copy, "run_s": time.perf_counter() - started}
        finally:
            shutil.rmtree(partial_path(target), ignore_errors=True)
            (folder / "executed.journal").unlink(missing_ok=True)


def copy_seconds(inputs: Sequence[Path], output: Path, size: int) -> float:
    """Read the inputs and write `size` bytes; the file is removed again."""
    buffers = threading.local()
    with ExitStack() as stack:
        sources = [stack.enter_context(path.open("rb", buffering=0)).fileno() for path in inputs]
        target = stack.enter_context(output.open("wb", buffering=0)).fileno()
        stack.callback(output.unlink)
        longest = max(os.fstat(source).st_size for source in sources)

        def move(at: int) -> None:
            if not hasattr(buffers, "view"):
                buffers.view = memoryview(bytearray(BLOCK))
            for source in sources:
                os.preadv(source, [buffers.view], at)
            if at < size:
                os.pwrite(target, buffers.view[: size - at], at)

        started = time.perf_counter()
        os.posix_fallocate(target, 0, size)
        with ThreadPoolExecutor(max_workers=THREADS) as pool:
            list(pool.map(move, range(0, longest, BLOCK)))
        return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:]))))
