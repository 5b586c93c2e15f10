"""The exactness matrix: an operator gives one digest, whatever the threads, the chunks and the vector units.

    python tests/merge/test_exactness.py            print the matrix; fail where digests differ
    python tests/merge/test_exactness.py --golden   write the golden digests anew

Every operator runs in two child processes: with the vector units that this machine has, and with generic
code from torch and numba. The trio has a matrix of several chunks whose rows have an odd length, and tensors
of odd sizes, of one element and of none. tests/golden/operators.json holds what each operator gives on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import pytest

from merge_core import recipe
from merge_core.checkpoint import merkle
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure
from merge_core.checkpoint.source import TensorInfo
from merge_core.checkpoint.writer import CheckpointWriter
from merge_core.digest import sha256
from merge_core.execute import Material, Merged, leaf, run
from merge_core.memory import CHUNK_ELEMENTS
from merge_core.operators import METHODS, find
from merge_core.operators.base import Exactness
from merge_core.plan import MergePlan
from merge_core.resolve import draft, header_of

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "operators.json"
MODELS = ("base", "math", "code")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "vocab_size": 16,
}
SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.mlp.up_proj.weight": (1201, 997),
    "model.layers.1.mlp.down_proj.weight": (129, 65),
    "model.layers.1.self_attn.q_proj.weight": (3, 7, 11),
    "model.layers.2.input_layernorm.weight": (4099,),
    "model.norm.weight": (1,),
    "model.nothing.weight": (0, 8),
}
VALUES: Mapping[str, str] = {
    "weight": "[0.9, 0.35, 0.7]",
    "t": "[0.23, 0.7]",
    "density": "0.41",
    "epsilon": "0.1",
    "gamma": "0.05",
    "lambda": "0.83",
    "select_topk": "0.3",
    "scale": "0.7",
}
"""What the recipes say where an operator knows the setting; a list is a gradient over the layers."""

LAST_WEIGHT = "0.57"
"""What the last model says itself where weights are given for each."""

RUNS = ((1, 1), (2, 1), (4, 2), (1, 8))
"""(threads, chunk size in units of the usual one)."""
UNITS: Mapping[str, Mapping[str, str]] = {
    "this machine's": {},
    "generic": {
        "ATEN_CPU_CAPABILITY": "default",
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(ROOT / ".cache" / "numba-generic"),
    },
}
CHANGES = 200
OVER_BASE = {o.over_base.name: method for method, o in METHODS.items() if o.over_base}
"""What a plan calls the formulas that methods have over a base, and the methods."""

OPERATORS = (*METHODS, *OVER_BASE)


def draw(words: str, count: int) -> np.ndarray:
    """Float32 of about ±0.07 with full mantissas, bell-shaped, drawn from the words alone."""
    raw = hashlib.shake_256(words.encode()).digest(4 * count)
    halves = np.frombuffer(raw, "<i2").astype(np.float32).reshape(2, count)
    return (halves[0] + halves[1]) * np.float32(1.1 / 2**20)


def write_trio(folder: Path) -> None:
    """A base in float32 and two experts near it in bfloat16."""
    for model in MODELS:
        dtype = "F32" if model == "base" else "BF16"
        layout = {name: TensorInfo(dtype=dtype, shape=shape) for name, shape in SHAPES.items()}
        with CheckpointWriter.create(folder / model, layout) as writer:
            for name, shape in SHAPES.items():
                values = draw(f"base {name}", prod(shape))
                if model != "base":
                    values = values + draw(f"{model} {name}", prod(shape)) / np.float32(8)
                bits = np.ascontiguousarray(values).view(np.uint32)
                writer.write(name, 0, (bits if dtype == "F32" else (bits >> 16).astype(np.uint16)).tobytes())
            writer.add_file("config.json", json.dumps(CONFIG).encode())
            writer.commit()


def recipe_of(name: str, folder: Path) -> str:
    """A recipe for an operator that gives it as many models as it takes, and a value for what it knows."""
    operator = find(name)
    _, most = operator.experts
    experts = (MODELS[1:] if operator.needs_base else MODELS)[:most]
    settings = "".join(f"  {p.name}: {VALUES[p.name]}\n" for p in operator.parameters if p.name in VALUES)
    last = f"    parameters: {{weight: {LAST_WEIGHT}}}\n" if operator.parameter("weight") else ""
    return (
        f"merge_method: {OVER_BASE.get(name, name)}\n"
        + (f"base_model: {folder / 'base'}\n" if operator.needs_base else "")
        + "dtype: bfloat16\nmodels:\n"
        + "".join(f"  - model: {folder / model}\n" for model in experts)
        + last
        + (f"parameters:\n{settings}" if settings else "")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A sealed plan and what it reads."""

    plan: MergePlan
    inputs: Sequence[Material]

    def run(self, target: Path, **options: int) -> Merged:
        journal = target.with_name(f"{target.name}.journal")
        return run(self.plan, self.inputs, target, journal=journal, **options)


@contextmanager
def prepared(method: str, folder: Path) -> Iterator[Prepared]:
    """The recipe of an operator, sealed over the trio in `folder`."""
    wanted = recipe.parse(recipe_of(method, folder))
    with ExitStack() as stack:
        opened = {m: stack.enter_context(Checkpoint.open(Path(m))) for m in wanted.models}
        measured = {m: measure(checkpoint) for m, checkpoint in opened.items()}
        drafted = draft(wanted, {m: header_of(checkpoint) for m, checkpoint in opened.items()})
        yield Prepared(
            plan=drafted.seal({m: found.manifest.model_id for m, found in measured.items()}),
            inputs=[
                Material(
                    tensors=VerifiedSource(opened[m], measured[m].leaves), files=opened[m].functional_files
                )
                for m in wanted.models
            ],
        )


def digests(trio: Path) -> dict[str, dict[str, str]]:
    """For every operator and run: the digest of weights and Trace."""
    found: dict[str, dict[str, str]] = {}
    for method in OPERATORS:
        with prepared(method, trio) as merge, tempfile.TemporaryDirectory() as folder:
            for threads, chunks in RUNS:
                merged = merge.run(
                    Path(folder) / f"{threads}-{chunks}",
                    threads=threads,
                    chunk_elements=chunks * CHUNK_ELEMENTS,
                )
                both = f"{merged.manifest.tensor_set_root} {merged.trace.digest}"
                found.setdefault(method, {})[f"{threads} x{chunks}"] = sha256(both.encode())
    return found


def matrix(trio: Path) -> dict[str, dict[tuple[str, str], str]]:
    """The digests by operator, then by vector units and run, each kind of units in a process of its own."""
    found: dict[str, dict[tuple[str, str], str]] = {method: {} for method in OPERATORS}
    for units, settings in UNITS.items():
        done = subprocess.run(
            [sys.executable, __file__, "--digests", trio],
            env={**os.environ, **settings},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        for method, runs in json.loads(done.stdout).items():
            found[method] |= {(units, run): digest for run, digest in runs.items()}
    return found


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trio")
    write_trio(folder)
    return folder


@pytest.mark.timeout(600)
def test_every_operator_gives_its_golden_digest_on_any_threads_chunks_and_vector_units(trio: Path) -> None:
    expected = json.loads(GOLDEN.read_text())
    assert {m: set(found.values()) for m, found in matrix(trio).items()} == {
        method: {digest} for method, digest in expected.items()
    }


@pytest.mark.parametrize("method", [o for o in OPERATORS if find(o).exactness is not Exactness.WHOLE_TENSOR])
def test_one_changed_leaf_is_found_by_computing_it_again(method: str, trio: Path, tmp_path: Path) -> None:
    choose = random.Random(method)
    with prepared(method, trio) as merge:
        merged = merge.run(tmp_path / "out")
        records = {t.name: t for t in merged.manifest.tensors if t.length}
        places = [(name, index) for name, t in records.items() for index in range(t.leaf_count)]
        computed = {place: leaf(merge.plan, merged.trace, merge.inputs, *place) for place in places}
        assert {(n, i): merged.leaves[n][i] for n, i in places} == {
            place: merkle.leaf_digest(data) for place, data in computed.items()
        }
        found = 0
        for _ in range(CHANGES):
            place = choose.choice(places)
            changed = bytearray(computed[place])
            changed[choose.randrange(len(changed))] ^= 1 << choose.randrange(8)
            found += merkle.leaf_digest(changed) != merkle.leaf_digest(
                leaf(merge.plan, merged.trace, merge.inputs, *place)
            )
    assert found == CHANGES


def main() -> None:
    if sys.argv[1:2] == ["--digests"]:
        print(json.dumps(digests(Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory(prefix="weft-exactness-") as folder:
        write_trio(Path(folder))
        found = matrix(Path(folder))
    if sys.argv[1:] == ["--golden"]:
        golden = {method: one for method, (one, *_) in ((m, list(f.values())) for m, f in found.items())}
        GOLDEN.write_text(json.dumps(golden, indent=2, sort_keys=True) + "\n")
    golden = json.loads(GOLDEN.read_text())
    columns = [
        (units, run) for units in UNITS for run in (f"{threads} x{chunks}" for threads, chunks in RUNS)
    ]
    print(
        f"{'operator':<18}" + "".join(f"{units.split()[0]:>9} {run}" for units, run in columns) + "   golden"
    )
    for method, digests_of in found.items():
        row = "".join(f"{digests_of[column].removeprefix('sha256:')[:12]:>14}" for column in columns)
        print(f"{method:<18}{row}   {'=' if set(digests_of.values()) == {golden.get(method)} else 'DIFFERS'}")
    if any(set(digests_of.values()) != {golden.get(method)} for method, digests_of in found.items()):
        sys.exit("digests differ")


if __name__ == "__main__":
    main()
