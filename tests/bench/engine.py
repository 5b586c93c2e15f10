"""Compare `weft merge` with mergekit 0.1.5: whole processes on the same files, in turns, with warm caches.

    python tests/bench/engine.py [--quick] [--operators linear ties]

Writes trios of checkpoints with seeded weights into a temporary folder, which goes again, whatever happens:
in memory where that has room for all, else where TMPDIR says. 1.1 billion parameters in bfloat16, 100
million for della, whose incumbent is slow,
and 20,000 tiny tensors. mergekit lives in an environment of its own, `.cache/mergekit`, made once. The ties
family computes in float32 in both, everything else in mergekit in bfloat16. Ours alone waits until its output
is durable, so on a disk (TMPDIR=FOLDER) it is the disk's speed that shows. Ours use ModelIds hashed before:
hashing is timed apart. An operator for which mergekit needs more than two minutes is run once, the others
three times, and the median counts.

The story goes to stderr; the last line of stdout is one JSON object. Ratios are mergekit's ÷ ours; rss is
what the tree of processes keeps in RAM beside mapped files, the largest of samples 20 ms apart: mergekit maps
its inputs, which would add their whole size to it (`footprint` says more; stderr has the plain RSS too).
over_copy_limit is the executor's time ÷ that of reading the inputs and writing the output.

    {"operators": {NAME: {"wall_ratio", "cpu_ratio", "rss_ratio", "rss_mb", "over_copy_limit"}},
     "hash_s": ..., "moe_20k": {"weft_s": ..., "mergekit_s": ...}}
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import checkpoints
from checkpoints import BASE, EXPERTS, MODELS, Shape
from footprint import Cost, cost

ROOT = Path(__file__).resolve().parents[2]
ORACLE = ROOT / ".cache" / "mergekit"
WEFT = Path(sys.executable).with_name("weft")
SEED = 0
PAIRS = 3
SLOW_SECONDS = 120.0
MOE_LIMIT_SECONDS = 180.0
HEADROOM = 1 << 30
IN_MEMORY = Path("/dev/shm")
FOR_PROCESSES = 8 << 30
"""Memory that is left to mergekit, which takes 4 GiB, and to ourselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operator: the rest of its recipe, and which trio it is measured on."""

    head: str
    models: tuple[str, ...] = EXPERTS
    each: str = "weight: 0.5"
    trio: str = "large"

    def recipe(self, method: str, folder: Path) -> str:
        """The recipe, which both tools read, over the trio in `folder`."""
        listed = "".join(f"  - {{model: {folder / m}, parameters: {{{self.each}}}}}\n" for m in self.models)
        return f"merge_method: {method}\n{self.head.format(base=folder / BASE)}models:\n{listed}"


PLAIN = "base_model: {base}\ndtype: bfloat16\n"
IN_FLOAT32 = "base_model: {base}\ndtype: float32\nout_dtype: bfloat16\n"
CASES = {
    "linear": Case(head="dtype: bfloat16\n", models=MODELS),
    "slerp": Case(head=PLAIN + "parameters: {{t: 0.4}}\n", models=MODELS[:2], each=""),
    "task_arithmetic": Case(head=PLAIN),
    "ties": Case(head=IN_FLOAT32, each="weight: 0.5, density: 0.5"),
    "dare_ties": Case(head=IN_FLOAT32, each="weight: 0.5, density: 0.5"),
    "sce": Case(head=IN_FLOAT32 + "parameters: {{select_topk: 0.5}}\n", each=""),
    "della": Case(head=IN_FLOAT32, each="weight: 0.5, density: 0.5, epsilon: 0.1", trio="medium"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny models: does everything run?")
    parser.add_argument("--operators", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--no-moe", action="store_true", help="leave the 20,000 tensors out")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    mergekit = install()
    shapes = {"warm": checkpoints.TINY} | (
        {"large": checkpoints.TINY, "medium": checkpoints.TINY, "moe": checkpoints.FEW}
        if arguments.quick
        else {"large": checkpoints.LARGE, "medium": checkpoints.MEDIUM, "moe": checkpoints.MANY}
    )
    used = {
        "warm",
        *(CASES[name].trio for name in arguments.operators),
        *(() if arguments.no_moe else ("moe",)),
    }
    shapes = {name: shape for name, shape in shapes.items() if name in used}
    require_space(shapes)
    with tempfile.TemporaryDirectory(prefix="weft-engine-") as folder:
        bench = Bench(Path(folder), mergekit)
        for name, shape in shapes.items():
            bench.write(name, shape)
        report = {
            "operators": {name: bench.compare(name) for name in arguments.operators},
            "hash_s": bench.hash_s,
            "moe_20k": None if arguments.no_moe else bench.many_tensors(),
        }
    print(json.dumps(report))


def install() -> Path:
    """The command mergekit-yaml of an environment of its own, made once."""
    command = ORACLE / "bin" / "mergekit-yaml"
    if not command.exists():
        say(f"making {ORACLE} with mergekit 0.1.5")
        subprocess.run([sys.executable, "-m", "venv", ORACLE], check=True)
        pip = [ORACLE / "bin" / "python", "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "mergekit==0.1.5", "torch==2.13.0"], check=True, stdout=sys.stderr)
    return command


def require_space(shapes: dict[str, Shape]) -> None:
    """Choose the temporary folder; exit where it is too small for the trios and one output."""
    sizes = [shape.size for shape in shapes.values()]
    needed = len(MODELS) * sum(sizes) + max(sizes) + HEADROOM
    if "TMPDIR" not in os.environ and memory_left() > needed + FOR_PROCESSES:
        tempfile.tempdir = str(IN_MEMORY)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    say(f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free")
    if free < needed:
        sys.exit("not enough disk; next: TMPDIR=FOLDER make bench-engine, where FOLDER has more")


def memory_left() -> int:
    """Bytes that files in memory may take, as far as the kernel can tell; 0 where there are none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        return min(available, shutil.disk_usage(IN_MEMORY).free)
    except OSError:
        return 0


class Bench:
    """The trios in one folder, and runs of both tools on them."""

    def __init__(self, folder: Path, mergekit: Path) -> None:
        self._folder = folder
        self._mergekit = mergekit
        self._home = folder / "home" / "weft"
        self._out = folder / "out"
        # Both run from bytecode, as what is installed does.
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        self._environment = {
            **{name: value for name, value in inherited.items() if not name.startswith("WEFT_")},
            "HOME": str(folder / "home"),
            "WEFT_HOME": str(self._home),
            "TMPDIR": str(folder),
            "HF_HUB_OFFLINE": "1",
        }
        (folder / "home").mkdir()
        self._buffer = bytearray(8 << 20)
        self.hash_s: float | None = None

    def write(self, trio: str, shape: Shape) -> None:
        """Write a trio and hash it once, as the first `weft plan` does; that of the large one is `hash_s`."""
        folder = self._folder / trio
        folder.mkdir()
        started = time.perf_counter()
        checkpoints.write_trio(folder, shape, seed=SEED)
        wrote = time.perf_counter() - started
        os.sync()
        hashing = self._run([WEFT, "plan", self._recipe("linear", trio)]).wall
        if trio == "large":
            self.hash_s = round(hashing, 2)
        say(f"{trio}: {3 * shape.size / 1e9:.2f} GB written in {wrote:.1f} s, hashed in {hashing:.1f} s")

    def compare(self, name: str) -> dict[str, float]:
        """Run an operator with both tools in turns, and the executor against the copy limit."""
        recipe, warm = self._recipe(name, CASES[name].trio), self._recipe(name, "warm")
        self._ours(warm)
        self._theirs(warm)
        self._executor(warm)
        ours, theirs, over = [], [], []
        while len(ours) < PAIRS:
            ours.append(self._ours(recipe))
            theirs.append(self._theirs(recipe))
            over.append(self._executor(recipe))
            say(f"{name}: weft {_shown(ours[-1])}; mergekit {_shown(theirs[-1])}; {_limit(over[-1])}")
            if theirs[-1].wall > SLOW_SECONDS:
                break
        return {
            "wall_ratio": _ratio([c.wall for c in theirs], [c.wall for c in ours]),
            "cpu_ratio": _ratio([c.cpu for c in theirs], [c.cpu for c in ours]),
            "rss_ratio": _ratio([c.private for c in theirs], [c.private for c in ours]),
            "rss_mb": round(median(c.private for c in ours) / 1e6, 1),
            "over_copy_limit": round(median(o["run_s"] / o["copy_s"] for o in over), 2),
        }

    def many_tensors(self) -> dict[str, float]:
        """The linear merge of 20,000 tensors; mergekit's counts as the limit when it is stopped there."""
        recipe = self._recipe("linear", "moe")
        ours = self._ours(recipe)
        theirs = self._theirs(recipe, limit=MOE_LIMIT_SECONDS)
        stopped = f" (stopped at {MOE_LIMIT_SECONDS:.0f} s)" if theirs.stopped else ""
        say(f"20,000 tensors: weft {_shown(ours)}; mergekit {_shown(theirs)}{stopped}")
        return {
            "weft_s": round(ours.wall, 2),
            "mergekit_s": MOE_LIMIT_SECONDS if theirs.stopped else round(theirs.wall, 2),
        }

    def _recipe(self, name: str, trio: str) -> Path:
        path = self._folder / f"{name}-{trio}.yml"
        path.write_text(CASES[name].recipe(name, self._folder / trio))
        return path

    def _ours(self, recipe: Path) -> Cost:
        self._warm(recipe)
        return self._run([WEFT, "merge", recipe, "-o", self._out])

    def _theirs(self, recipe: Path, limit: float | None = None) -> Cost:
        self._warm(recipe)
        # The models have no tokenizer to copy; all other options are what its users get.
        return self._run([self._mergekit, recipe, self._out, "--no-copy-tokenizer"], limit)

    def _run(self, command: Sequence[str | Path], limit: float | None = None) -> Cost:
        """Run once, and leave neither an output nor dirty pages behind."""
        try:
            return cost(command, self._environment, self._folder / "log", limit=limit)
        finally:
            shutil.rmtree(self._out, ignore_errors=True)
            os.sync()

    def _warm(self, recipe: Path) -> None:
        """Read the weights into the page cache: the kernel may have dropped some since the last run."""
        for weights in (self._folder / recipe.stem.partition("-")[2]).glob("*/*.safetensors"):
            with weights.open("rb", buffering=0) as file:
                while file.readinto(self._buffer):
                    pass

    def _executor(self, recipe: Path) -> dict[str, float]:
        self._warm(recipe)
        script = Path(__file__).with_name("executor.py")
        done = subprocess.run(
            [sys.executable, script, recipe, self._home, self._folder],
            env=self._environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        os.sync()
        return dict(json.loads(done.stdout))


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return round(median(theirs) / median(ours), 2)


def _shown(cost: Cost) -> str:
    return (
        f"{cost.wall:.1f} s, CPU {cost.cpu:.1f} s, {cost.private / 1e6:.0f} MB"
        f" (RSS with mapped files {cost.rss / 1e6:.0f} MB)"
    )


def _limit(over: dict[str, float]) -> str:
    return f"executor {over['run_s']:.2f} s, copy {over['copy_s']:.2f} s"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
