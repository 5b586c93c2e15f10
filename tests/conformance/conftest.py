"""Both tools on the same recipes, and the table of what came out, which the end of the run prints."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_core import execute, recipe
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure
from merge_core.checkpoint.writer import CheckpointWriter
from merge_core.errors import MergeCoreError
from merge_core.functional import result_files
from merge_core.resolve import draft, header_of

ORACLE = Path(__file__).parents[2] / ".cache" / "mergekit"
LAYER = (
    *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
    *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    *(f"{p}_layernorm.weight" for p in ("input", "post_attention")),
)
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a tool made of a recipe: tensors, or why not."""

    tensors: Tensors
    error: str = ""


Both: TypeAlias = dict[Any, tuple[Outcome, Outcome]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table."""

    operator: str
    case: str
    tolerance: str
    worst: str
    passed: bool
    note: str = ""


_ROWS: list[Row] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _ROWS:
        return
    terminalreporter.section("conformance with mergekit 0.1.5")
    line = "{:<18}{:<37}{:<40}{:<43}{}"
    terminalreporter.write_line(line.format("operator", "case", "tolerance", "worst", "pass"))
    for row in sorted(_ROWS, key=lambda row: (row.operator, row.case)):
        passed = "yes" if row.passed else "NO"
        terminalreporter.write_line(line.format(row.operator, row.case, row.tolerance, row.worst, passed))
        if row.note:
            terminalreporter.write_line(f"{'':<18}{row.note}")


@pytest.fixture
def judged() -> Callable[..., None]:
    """Put a row into the table, and fail where it does: `judged(operator=…, case=…, …)`."""

    def judge(**fields: Any) -> None:
        row = Row(**fields)
        _ROWS.append(row)
        assert row.passed, row

    return judge


@pytest.fixture(scope="session")
def mergekit() -> Path:
    """The interpreter of an environment with mergekit, made once."""
    python = ORACLE / "bin" / "python"
    if not (ORACLE / "bin" / "mergekit-yaml").exists():
        subprocess.run([sys.executable, "-m", "venv", ORACLE], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "mergekit==0.1.5", "torch==2.13.0"], check=True)
    return python


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    """`llama({"base": {...}, "math": {...}})`: models of whatever tensors, under a Llama's names."""

    def write(models: Mapping[str, Tensors]) -> dict[str, Path]:
        folder, paths = tmp_path_factory.mktemp("models"), {}
        for model, tensors in models.items():
            layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
            config = {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 8,
                "num_attention_heads": 2,
                "num_hidden_layers": layers,
                "tie_word_embeddings": False,
                "vocab_size": 16,
            }
            paths[model] = folder / model
            paths[model].mkdir()
            save_file(dict(tensors), paths[model] / "model.safetensors", metadata={"format": "pt"})
            (paths[model] / "config.json").write_text(json.dumps(config))
        return paths

    return write


@pytest.fixture(scope="session")
def named() -> Callable[[Sequence[str]], dict[str, str]]:
    """A tensor name for each of some words, and names enough to make whole layers of them."""

    def give(words: Sequence[str]) -> dict[str, str]:
        layers = -(-len(words) // len(LAYER))
        names = [f"model.layers.{layer}.{part}" for layer in range(layers) for part in LAYER]
        padded = [*words, *(f"filler {i}" for i in range(len(names) - len(words)))]
        return dict(zip(padded, names, strict=True)) | {f"filler {name}": name for name in OUTSIDE}

    return give


@pytest.fixture(scope="session")
def both(mergekit: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Both]:
    """Run (our recipe, mergekit's) through weft and mergekit, which starts once; (ours, theirs) by key."""

    def run(recipes: Mapping[Any, tuple[str, str]]) -> Both:
        folder = tmp_path_factory.mktemp("merged")
        theirs = _theirs(mergekit, {key: text for key, (_, text) in recipes.items()}, folder)
        return {
            key: (_ours(text, folder / f"ours-{index}"), theirs[key])
            for index, (key, (text, _)) in enumerate(recipes.items())
        }

    return run


def _theirs(python: Path, recipes: Mapping[Any, str], folder: Path) -> dict[Any, Outcome]:
    jobs = []
    for index, text in enumerate(recipes.values()):
        (folder / f"{index}.yml").write_text(text)
        jobs.append({"recipe": str(folder / f"{index}.yml"), "out": str(folder / f"theirs-{index}")})
    done = subprocess.run(
        [python, Path(__file__).with_name("oracle.py")],
        input=json.dumps(jobs),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    return {
        key: Outcome(tensors={} if error else _load(Path(job["out"])), error=error)
        for key, job, error in zip(recipes, jobs, errors, strict=True)
    }


def _ours(text: str, target: Path) -> Outcome:
    try:
        merge(text, target)
    except MergeCoreError as error:
        return Outcome(tensors={}, error=error.why)
    return Outcome(tensors=_load(target))


def merge(text: str, target: Path) -> None:
    """Merge by the engine alone, without a node, into a directory that can be opened."""
    wanted = recipe.parse(text)
    with ExitStack() as stack:
        opened = {m: stack.enter_context(Checkpoint.open(Path(m))) for m in wanted.models}
        measured = {m: measure(checkpoint) for m, checkpoint in opened.items()}
        drafted = draft(wanted, {m: header_of(checkpoint) for m, checkpoint in opened.items()})
        plan = drafted.seal({m: found.manifest.model_id for m, found in measured.items()})
        inputs = [
            execute.Material(
                tensors=VerifiedSource(opened[m], measured[m].leaves), files=opened[m].functional_files
            )
            for m in wanted.models
        ]
        execute.run(plan, inputs, target, journal=target.with_suffix(".journal"))
        with CheckpointWriter.create(target, plan.layout) as writer:
            for name, data in result_files(plan, [material.files for material in inputs]).items():
                writer.add_file(name, data)
            writer.commit()


@pytest.fixture(scope="session")
def ours() -> Callable[[str, Path], None]:
    """`ours(recipe, target)`: merge with this engine."""
    return merge


def _load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.fixture(scope="session")
def draw() -> Callable[..., torch.Tensor]:
    """`draw("math bell", 3, 4)`: float32 of about ±0.1 with full mantissas, seeded by the words."""

    def seeded(words: str, *shape: int) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest())
        generator = np.random.Generator(np.random.SFC64(seed))
        return torch.from_numpy(generator.standard_normal(shape, np.float32) * np.float32(0.03))

    return seeded
