"""What a command costs: wall time, CPU time and memory of the process and all that it starts.

CPU comes from the kernel's accounts (`wait4`, which counts children that were waited for). Memory is sampled
every 20 ms over the tree, and the largest sum counts. Two sums are kept. `rss` is VmRSS of every process:
what `top` shows, mapped files included, a page that two processes share counted twice. `private` leaves file
pages out (RssAnon): neither mapped checkpoints nor libraries count, only what must stay in RAM.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds and bytes; `stopped` says that the time limit ended it."""

    wall: float
    cpu: float
    rss: int
    private: int
    stopped: bool = False


def cost(
    command: Sequence[str | Path], environment: Mapping[str, str], log: Path, *, limit: float | None = None
) -> Cost:
    """Run a command to its end, or to `limit` seconds; exits with the end of its output where it fails."""
    with log.open("wb") as output:
        started = time.perf_counter()
        child = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, process_group=0
        )
        watch = _Watch(child.pid, limit)
        try:
            _, status, usage = os.wait4(child.pid, 0)
            wall = time.perf_counter() - started
            child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            watch.end()
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if child.returncode and not watch.stopped:
        tail = log.read_text(errors="replace")[-2000:]
        sys.exit(f"{tail}\n{' '.join(map(str, command))}: exit code {child.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(wall=wall, cpu=cpu, rss=watch.rss, private=watch.private, stopped=watch.stopped)


class _Watch:
    """A thread that samples a tree of processes, and kills it when its time is over."""

    def __init__(self, pid: int, limit: float | None) -> None:
        self.rss = self.private = 0
        self.stopped = False
        self._pid = pid
        self._limit = limit
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        deadline = None if self._limit is None else time.monotonic() + self._limit
        while not self._over.wait(SAMPLE_SECONDS):
            sampled = [_memory(pid) for pid in family(self._pid)]
            self.rss = max(self.rss, sum(rss for rss, _ in sampled))
            self.private = max(self.private, sum(private for _, private in sampled))
            if deadline is not None and time.monotonic() > deadline:
                self.stopped = True
                os.killpg(self._pid, signal.SIGKILL)
                return


def family(pid: int) -> list[int]:
    """A process and all that descend from it; what ends meanwhile is left out."""
    try:
        tasks = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    children = (int(child) for task in tasks for child in task.split())
    return [pid, *(member for child in children for member in family(child))]


def _memory(pid: int) -> tuple[int, int]:
    """(VmRSS, of which private) in bytes; zeros for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = {
        name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines) if rest.split()
    }
    kib = {name: int(fields.get(name, 0)) for name in ("VmRSS", "RssAnon")}
    return 1024 * kib["VmRSS"], 1024 * kib["RssAnon"]
