"""How long `weft --help` takes, and how much memory an idle node holds.

    python tests/bench/startup.py

The command is started 10 times after one that warms the disk cache; the interval is a percentile bootstrap of
the median. Then a node with a home of its own comes up on loopback, on free ports, and is asked for its
status until its memory has stopped growing. The last line of stdout is one JSON object (MB are 10^6 bytes):

    {"help_s": ..., "help_ci95": [..., ...], "idle_rss_mb": ...}
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WEFT = Path(sys.executable).with_name("weft")
BOOTSTRAP_SEED = 20_240_917
REPLICATES = 10_000
SETTLED_BYTES = 1_000_000
SETTLED_POLLS = 5
MAX_POLLS = 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    times = [help_seconds() for _ in range(arguments.runs + 1)][1:]
    say(f"weft --help: {', '.join(f'{t:.3f}' for t in times)} s")
    found = {
        "help_s": round(float(np.median(times)), 3),
        "help_ci95": [round(bound, 3) for bound in interval(times)],
        "idle_rss_mb": round(idle_rss() / 1e6, 1),
    }
    print(json.dumps(found))


def help_seconds() -> float:
    """Wall time of one `weft --help`, from fork to exit."""
    started = time.perf_counter()
    subprocess.run([WEFT, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def interval(times: Sequence[float]) -> list[float]:
    """The 95 % interval of the median."""
    draw = np.random.default_rng(BOOTSTRAP_SEED)
    medians = np.median(draw.choice(times, size=(REPLICATES, len(times))), axis=1)
    return [float(bound) for bound in np.percentile(medians, [2.5, 97.5])]


def idle_rss() -> int:
    """Bytes in RAM of a node without peers and experts, and of its children, once that has settled."""
    with tempfile.TemporaryDirectory(prefix="weft-startup-") as folder:
        environment = {**os.environ, "WEFT_HOME": folder}
        flags = ["--listen", "/ip4/127.0.0.1/tcp/0", "--peer-api", "127.0.0.1:0", "--network", "startup"]
        weft(environment, "up", "-d", "--init", *flags)
        try:
            return settle(environment)
        finally:
            weft(environment, "down")


def settle(environment: dict[str, str]) -> int:
    """Ask for the status until the memory is the same, to a megabyte, several times in a row."""
    seen: list[int] = []
    for _ in range(MAX_POLLS):
        status = json.loads(weft(environment, "--json", "status"))["data"]
        seen.append(sum(rss(pid) for pid in family(status["pid"])))
        recent = seen[-SETTLED_POLLS:]
        if len(recent) == SETTLED_POLLS and max(recent) - min(recent) < SETTLED_BYTES:
            say(f"idle node, pid {status['pid']}: {', '.join(f'{n / 1e6:.1f}' for n in seen)} MB")
            return seen[-1]
    sys.exit(f"the memory of the idle node does not settle: {seen}")


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = (
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    )
    return [pid, *(member for child in children for member in family(child))]


def rss(pid: int) -> int:
    """Resident bytes of one process, as the kernel counts them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def weft(environment: dict[str, str], *words: str) -> str:
    """What the command says on stdout; raises CalledProcessError where it fails."""
    return subprocess.run(
        [WEFT, *words], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
