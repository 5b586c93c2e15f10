"""Kill a merge at random points, resume it, and compare with one that nobody disturbed.

    python tests/bench/kill.py --kills 20

Base and two experts (ties, float32, 243 MB, one tensor of 72 MiB) are merged by the real command with an
identity, so that hashing, merging, recording and signing are all there to be hit. Points are spread over the
duration of an undisturbed run. SIGKILL goes to the command, to its worker, or to both; some outputs are
killed again while they resume. The story goes to stderr; the last line of stdout is one JSON object:

    {"kills": ..., "same_model_id": ..., "stray_files": ..., "orphans": ..., "output_bytes": ...}

`same_model_id` counts kills after which the output, hashed anew, is the same model under the same printed id,
in the same files. Exits with 1 where a kill did harm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from merge_core.checkpoint.reader import Checkpoint, measure

WEFT = Path(sys.executable).with_name("weft")
RECIPE = """
merge_method: ties
base_model: base
models:
  - {model: math, parameters: {weight: 1.0, density: 0.5}}
  - {model: code, parameters: {weight: 0.5, density: 0.3}}
"""
SHAPES = {
    "model.embed_tokens.weight": (18_432, 1024),
    **{f"model.layers.{i}.mlp.up_proj.weight": (4096, 1024) for i in range(8)},
    **{f"model.layers.{i}.self_attn.q_proj.weight": (1024, 1024) for i in range(8)},
    "model.norm.weight": (1024,),
}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 8}
SIGNED_ANEW = {"model.sig", "provenance.dsse.json"}
"""Files that hold a time or a random signature; all others are the same, byte for byte, in every run."""
POLL_SECONDS = 0.01
DEAD_SECONDS = 1.0
"""Within which the children of a killed command must be gone."""
RUN_SECONDS = 300.0


class Victim(StrEnum):
    """Whom the signal goes to."""

    COMMAND = "command"
    WORKER = "worker"
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where to strike: at this share of an undisturbed run; after the `last` one an output may finish."""

    at: float
    victim: Victim
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    """A run that nobody killed: how long it took, when its worker lived, and what came out."""

    seconds: float
    worker: tuple[float, float]
    model_id: str
    files: dict[str, str]
    output_bytes: int


@dataclass(slots=True)
class Tally:
    """What is counted over all kills."""

    kills: int = 0
    same: int = 0
    stray: int = 0
    orphans: int = 0


@dataclass(slots=True)
class Arena:
    """The folders of one benchmark: parents and recipe, the home of the command, and where outputs grow."""

    root: Path
    home: Path = field(init=False)
    outputs: Path = field(init=False)
    temporary: Path = field(init=False)
    told: Path = field(init=False)
    complained: Path = field(init=False)

    def __post_init__(self) -> None:
        self.home, self.outputs, self.temporary = (self.root / n for n in ("home", "outputs", "tmp"))
        self.told, self.complained = self.root / "stdout", self.root / "stderr"
        (self.root / "models").mkdir()
        self.temporary.mkdir()
        for seed, name in enumerate(("base", "math", "code")):
            write_model(self.root / "models" / name, seed)
        (self.root / "models" / "recipe.yml").write_text(RECIPE)
        subprocess.run([WEFT, "init"], env=self.environment, check=True, capture_output=True)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "WEFT_HOME": str(self.home), "TMPDIR": str(self.temporary)}

    @property
    def target(self) -> Path:
        return self.outputs / "out"

    def clear(self) -> None:
        """Forget the last output and what was hashed: the next run does all of its work."""
        for folder in (self.outputs, self.home / "cache"):
            shutil.rmtree(folder, ignore_errors=True)
        self.outputs.mkdir()

    def begin(self, *, resume: bool) -> subprocess.Popen[bytes]:
        """Start the command."""
        words = [str(WEFT), "--json", "merge", "recipe.yml", "-o", str(self.target)]
        with self.told.open("w") as told, self.complained.open("w") as complained:
            return subprocess.Popen(
                words + ["--resume"] * resume,
                cwd=self.root / "models",
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=complained,
            )

    def processes(self) -> set[int]:
        """Every live process that belongs to this home, by what it inherited."""
        mark = f"WEFT_HOME={self.home}".encode()
        return {pid for pid in pids() if mark in read(pid, "environ").split(b"\0")}

    def workers(self) -> set[int]:
        """Those of them that compute."""
        return {pid for pid in self.processes() if b"node.worker" in read(pid, "cmdline").split(b"\0")}

    def stray(self) -> list[str]:
        """Whatever lies beside the output, or in the folder for temporary files."""
        beside = [path for path in self.outputs.iterdir() if path != self.target]
        return [str(path) for path in (*beside, *self.temporary.iterdir())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="work below this folder, on the disk to be tested")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weft-kill-", dir=arguments.directory) as folder:
        arena = Arena(Path(folder).resolve())
        reference = undisturbed(arena)
        tally = strike(arena, reference, points(arguments.kills, random.Random(arguments.seed)))
    found = {
        "kills": tally.kills,
        "same_model_id": tally.same,
        "stray_files": tally.stray,
        "orphans": tally.orphans,
        "output_bytes": reference.output_bytes,
    }
    print(json.dumps(found))
    sys.exit(0 if tally.same == tally.kills and not tally.stray and not tally.orphans else 1)


def write_model(directory: Path, seed: int) -> None:
    """Float32 weights that differ from seed to seed by a little noise."""
    directory.mkdir()
    base, noise = np.random.default_rng(0), np.random.default_rng(seed)
    tensors = {
        name: base.standard_normal(shape, dtype=np.float32)
        + np.float32(0.01 * seed) * noise.standard_normal(shape, dtype=np.float32)
        for name, shape in SHAPES.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")


def points(count: int, draw: random.Random) -> deque[Point]:
    """One point in each of `count` equal parts of the run, in random order; victims and lives in turn."""
    shares = [(i + draw.random()) / count for i in range(count)]
    draw.shuffle(shares)
    victims = (Victim.COMMAND, Victim.COMMAND, Victim.WORKER, Victim.COMMAND, Victim.BOTH)
    lasts = (True, True, False, True, False, False, True)
    return deque(
        Point(
            at=share,
            victim=victims[i % len(victims)],
            last=lasts[i % len(lasts)] or i == count - 1,
        )
        for i, share in enumerate(shares)
    )


def undisturbed(arena: Arena) -> Undisturbed:
    """Run once to the end; raises CalledProcessError where that fails."""
    arena.clear()
    started = time.monotonic()
    seen: list[float] = []
    process = arena.begin(resume=False)
    while process.poll() is None:
        if arena.workers():
            seen.append(time.monotonic() - started)
        time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - started
    model_id = result(arena, process)
    if model_id is None or model_id != measured(arena.target) or arena.stray():
        sys.exit(f"the undisturbed merge is broken already: {arena.stray()}")
    files = contents(arena.target)
    size = (arena.target / "model.safetensors").stat().st_size
    say(f"undisturbed: {seconds:.1f} s, worker from {seen[0]:.1f} to {seen[-1]:.1f} s, {size} bytes")
    return Undisturbed(
        seconds=seconds, worker=(seen[0], seen[-1]), model_id=model_id, files=files, output_bytes=size
    )


def strike(arena: Arena, reference: Undisturbed, todo: deque[Point]) -> Tally:
    """Kill at every point, resume each output to its end, and count what is wrong then."""
    tally = Tally()
    hits: list[str] = []
    arena.clear()
    while todo:
        point = todo[0]
        process = arena.begin(resume=bool(hits))
        hit = kill(arena, process, reference, point)
        if hit:
            tally.kills += 1
            tally.orphans += survivors(arena)
            hits.append(hit)
            todo.popleft()
        else:  # it was faster than the point: the same one again, a little earlier, on a fresh output
            todo[0] = replace(point, at=point.at * 0.9)
        if hit and not point.last:
            continue
        if hits:
            ended = arena.begin(resume=True) if hit else process
            judge(arena, reference, ended, hits, tally)
        hits = []
        arena.clear()
    return tally


def kill(arena: Arena, process: subprocess.Popen[bytes], reference: Undisturbed, point: Point) -> str:
    """Strike when the time has come; what was hit, or nothing when the command ended before."""
    start = time.monotonic()
    if point.victim is Victim.COMMAND:
        due = reference.seconds * point.at
        if not wait_until(lambda: time.monotonic() >= start + due, process):
            return ""
        victims = [process.pid]
    else:
        if not wait_until(lambda: bool(arena.workers()), process):
            return ""
        born = time.monotonic()
        due = (reference.worker[1] - reference.worker[0]) * point.at
        if not wait_until(lambda: time.monotonic() >= born + due, process):
            return ""
        workers = sorted(arena.workers())
        victims = [*workers, process.pid] if point.victim is Victim.BOTH else workers
    stage = stage_of(arena)
    struck = [pid for pid in victims if send_kill(pid)]
    after = time.monotonic() - start
    process.wait(RUN_SECONDS)
    expected = 1 if point.victim is Victim.WORKER else -signal.SIGKILL
    if not struck or process.returncode != expected:
        return ""
    return f"{point.victim} at {after:.2f} s ({stage})"


def stage_of(arena: Arena) -> str:
    """What lies on the disk at this moment: how far the merge is, for the story."""
    names = {path.name for path in arena.outputs.iterdir()}
    shown = [word for word in ("out", ".out.partial", ".out.weft", ".out.weft.db") if word in names]
    return ", ".join(shown) or "nothing on the disk yet"


def judge(
    arena: Arena, reference: Undisturbed, process: subprocess.Popen[bytes], hits: list[str], tally: Tally
) -> None:
    """Compare a resumed output with the undisturbed one; all that was hit on its way shares the verdict."""
    printed = result(arena, process)
    stray = arena.stray()
    same = False
    if printed == reference.model_id:
        files = contents(arena.target)
        stray += sorted(files.keys() - reference.files.keys())
        same = files == reference.files and measured(arena.target) == reference.model_id
    tally.orphans += survivors(arena)
    tally.same += len(hits) if same else 0
    tally.stray += len(stray)
    say(f"{tally.kills:3}  {'; '.join(hits)}: {'same model' if same else 'BROKEN'} {stray or ''}")


def survivors(arena: Arena) -> int:
    """How many processes are left when none should be; they are ended."""
    deadline = time.monotonic() + DEAD_SECONDS
    while (left := arena.processes()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for pid in left:
        say(f"     pid {pid} survived: {read(pid, 'cmdline').replace(bytes(1), b' ').decode()}")
        send_kill(pid)
    return len(left)


def result(arena: Arena, process: subprocess.Popen[bytes]) -> str | None:
    """The model id that the command printed, None (and its error in the story) where it failed."""
    if process.wait(RUN_SECONDS) != 0:
        say(arena.complained.read_text().strip())
        return None
    return str(json.loads(arena.told.read_text())["data"]["model_id"])


def measured(directory: Path) -> str:
    """The ModelId that the bytes have, whatever the records say."""
    with Checkpoint.open(directory) as checkpoint:
        return str(measure(checkpoint).manifest.model_id)


def contents(directory: Path) -> dict[str, str]:
    """Every file below a directory, hidden ones too, with its SHA-256 where that is fixed."""
    return {
        str(path.relative_to(directory)): "" if path.name in SIGNED_ANEW else digest(path)
        for path in sorted(directory.rglob("*"))
    }


def digest(path: Path) -> str:
    if not path.is_file():
        return "not a file"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wait_until(met: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Wait for a condition; False when the process ends first."""
    while not met():
        if process.poll() is not None:
            return False
        time.sleep(POLL_SECONDS)
    return True


def send_kill(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def pids() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())


def read(pid: int, name: str) -> bytes:
    """A file of /proc; nothing of a process that is dead."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
