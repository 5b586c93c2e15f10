"""How many candidates a minute are merged and made ready to be run, against writing and loading checkpoints.

    python tests/bench/candidates.py

A population of 12 over a Llama of 5 M parameters in float32: a base and three experts, four points over the
depth, attention, feed-forward blocks and the rest apart. Three arms, each in processes of one thread that
opened the models before the clock starts; nothing is evaluated:

    one       candidates in memory, one process
    two       candidates in memory, two processes that share the work
    written   `execute.run` into a new checkpoint, files and commit as a merge does them, then `load_model`

Arms take turns, the best round of each counts; the first round of each is not counted. What was written is
removed when the clock has stopped. The story goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

METHODS = {"task_arithmetic": False, "ties": False, "ties with densities": True}
"""Whether densities are sought too: thresholds have to be found anew then."""
POPULATION = 12
EXPERTS = ("a", "b", "c")
LAYERS, WIDTH, INNER, TOKENS = 6, 256, 704, 512
ARMS = {"one": 1, "two": 2, "written": 1}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--directory", type=Path, help="where checkpoints are written")
    parser.add_argument("--serve", nargs=3, metavar=("ARM", "METHOD", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], arguments.serve[1], Path(arguments.serve[2]))
        return
    with tempfile.TemporaryDirectory(prefix="weft-bench-", dir=arguments.directory) as temporary:
        parameters = write_models(Path(temporary))
        found = {method: measure(method, Path(temporary), arguments.rounds) for method in arguments.methods}
    first = found[arguments.methods[0]]
    print(
        json.dumps(
            {
                "parameters": parameters,
                "population": POPULATION,
                "cores": os.cpu_count(),
                "methods": found,
                "ratio": first["ratio"],
                "two_processes": first["two_processes"],
            }
        )
    )


def measure(method: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Candidates a minute of every arm, and how they compare."""
    best: dict[str, float] = {}
    with ExitStack() as stack:
        crews = {
            arm: [stack.enter_context(server(arm, method, folder)) for _ in range(processes)]
            for arm, processes in ARMS.items()
        }
        for number in range(rounds + 1):
            for arm, crew in crews.items():
                rate = 60 * POPULATION / once(crew, number)
                print(f"{method}, round {number}, {arm}: {rate:.0f} a minute", file=sys.stderr)
                if number:
                    best[arm] = max(best.get(arm, 0.0), rate)
    return {
        "per_minute": {arm: round(rate, 1) for arm, rate in best.items()},
        "ratio": round(best["one"] / best["written"], 2),
        "two_processes": round(best["two"] / best["one"], 2),
    }


def once(crew: Sequence[subprocess.Popen[str]], number: int) -> float:
    """Seconds for a population, divided evenly; who wrote has cleared away what it wrote."""
    started = time.perf_counter()
    for rank, child in enumerate(crew):
        assert child.stdin is not None
        child.stdin.write(json.dumps([number, list(range(rank, POPULATION, len(crew)))]) + "\n")
        child.stdin.flush()
    for child in crew:
        assert child.stdout is not None and child.stdout.readline() == "done\n"
    taken = time.perf_counter() - started
    for child in crew:
        assert child.stdout is not None and child.stdout.readline() == "cleared\n"
    return taken


@contextmanager
def server(arm: str, method: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of one arm, once it has opened the models."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, __file__, "--serve", arm, method, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **threads},
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n", f"{arm} did not begin"
        yield child
    finally:
        child.kill()
        child.communicate()


def serve(arm: str, method: str, folder: Path) -> None:
    """Make the candidates that lines of stdin name."""
    with ExitStack() as stack:
        make = maker(stack, arm, method, folder)
        print("ready", flush=True)
        for line in sys.stdin:
            generation, numbers = json.loads(line)
            for number in numbers:
                make(generation, number)
            print("done", flush=True)
            for target in folder.glob(f"written-{os.getpid()}-*"):
                shutil.rmtree(target) if target.is_dir() else target.unlink()
            print("cleared", flush=True)


def maker(stack: ExitStack, arm: str, method: str, folder: Path) -> Callable[[int, int], None]:
    """What makes one candidate ready: (generation, number)."""
    import torch

    from merge_core import execute, recipe
    from merge_core.checkpoint.reader import Checkpoint, VerifiedSource
    from merge_core.checkpoint.reader import measure as hashed
    from merge_core.checkpoint.writer import CheckpointWriter
    from merge_core.evaluation.loading import load_model
    from merge_core.evolution.candidates import LiveModel
    from merge_core.evolution.genome import Genome, Shape
    from merge_core.evolution.mapped import MappedSource
    from merge_core.functional import result_files
    from merge_core.resolve import draft, header_of

    torch.set_num_threads(1)
    start = recipe.parse((folder / f"{method}.yml").read_text())
    opened = {name: stack.enter_context(Checkpoint.open(Path(name))) for name in start.models}
    known = {name: hashed(checkpoint) for name, checkpoint in opened.items()}
    headers = {name: header_of(checkpoint) for name, checkpoint in opened.items()}
    genome = Genome.of(start, headers, Shape(layers=4, densities=METHODS[method]))
    source = VerifiedSource if arm == "written" else MappedSource
    inputs = [
        execute.Material(
            tensors=source(opened[name], known[name].leaves), files=opened[name].functional_files
        )
        for name in start.models
    ]
    live = LiveModel(load_model(folder / "base"))

    def make(generation: int, number: int) -> None:
        draw = np.random.default_rng([generation, number]).standard_normal(len(genome.genes))
        values = [gene.start + step / 6 for gene, step in zip(genome.genes, draw, strict=True)]
        drafted = draft(genome.recipe(values), headers)
        plan = drafted.seal({name: item.manifest.model_id for name, item in known.items()})
        if arm != "written":
            assert live.fill(plan, inputs)
            return
        target = folder / f"written-{os.getpid()}-{number}"
        execute.run(plan, inputs, target, journal=target.with_suffix(".journal"), threads=1)
        with CheckpointWriter.create(target, plan.layout) as writer:
            for name, data in result_files(plan, [item.files for item in inputs]).items():
                writer.add_file(name, data)
            writer.commit()
        load_model(target)

    return make


def write_models(folder: Path) -> int:
    """A base and experts near it, and the recipes; returns the number of parameters."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (TOKENS, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        place = f"model.layers.{layer}."
        shapes |= {f"{place}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{place}mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes[f"{place}mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes |= {f"{place}{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "vocab_size": TOKENS,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    for seed, name in enumerate(("base", *EXPERTS)):
        draw = np.random.default_rng(seed)
        (folder / name).mkdir()
        tensors = {key: draw.standard_normal(shape).astype(np.float32) / 50 for key, shape in shapes.items()}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))
    listed = "".join(f"  - {{model: {folder / name}, parameters: {{weight: 0.5}}}}\n" for name in EXPERTS)
    for method in METHODS:
        operator = method.split()[0]
        density = "parameters: {density: 0.5}\n" if operator == "ties" else ""
        (folder / f"{method}.yml").write_text(
            f"merge_method: {operator}\nbase_model: {folder / 'base'}\nmodels:\n{listed}{density}"
        )
    return sum(int(np.prod(shape)) for shape in shapes.values())


if __name__ == "__main__":
    main()
