"""Execution: the same bits however it is run, killed and taken up, and audited; in bounded memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_core.checkpoint import merkle
from merge_core.checkpoint.manifest import LeafTable
from merge_core.checkpoint.reader import Checkpoint, Measured, VerifiedSource, measure, tensor_record
from merge_core.checkpoint.source import TensorInfo
from merge_core.checkpoint.writer import CheckpointWriter, partial_path
from merge_core.digest import sha256
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.execute import Material, Merged, audit, leaf, run, trace
from merge_core.execute.work import Work
from merge_core.functional import result_files
from merge_core.memory import CHUNK_ELEMENTS
from merge_core.plan import MergePlan
from merge_core.recipe import parse
from merge_core.resolve import draft, header_of
from merge_core.trace import Trace

GOLDEN = Path(__file__).parents[1] / "golden" / "merges.json"

HEAD = "base_model: base\ndtype: bfloat16\nmodels:\n"
MATH_AND_CODE = (
    "  - {model: math, parameters: {weight: 1.0}}\n"
    "  - {model: code, parameters: {weight: [{filter: mlp, value: [0.25, 1.0]}, {value: 0.5}]}}\n"
)
RECIPES = {
    "linear": "merge_method: linear\nbase_model: base\nmodels:\n"
    "  - {model: base, parameters: {weight: 0.2}}\n" + MATH_AND_CODE,
    "slerp": "merge_method: slerp\n" + HEAD + "  - {model: math}\nparameters: {t: [0.25, 0.75]}\n",
    "task_arithmetic": "merge_method: task_arithmetic\n"
    + HEAD
    + MATH_AND_CODE
    + "parameters: {lambda: 0.8}\n",
    "ties": "merge_method: ties\n" + HEAD + MATH_AND_CODE + "parameters: {density: 0.3}\n",
}
MODELS = ("base", "math", "code")
LONG = 2 * CHUNK_ELEMENTS + 300_007


@dataclass(frozen=True)
class World:
    """Three models on disk, opened and verified, in the plan's order."""

    plan: MergePlan
    inputs: Sequence[Material]

    def run(self, target: Path, **options: object) -> Merged:
        journal = target.with_suffix(".journal")
        return run(self.plan, self.inputs, target, journal=journal, **options)  # type: ignore[arg-type]

    def finish(self, target: Path) -> Path:
        with CheckpointWriter.create(target, self.plan.layout) as writer:
            for name, data in result_files(self.plan, [material.files for material in self.inputs]).items():
                writer.add_file(name, data)
            return writer.commit()


def shapes(long: int) -> dict[str, tuple[int, ...]]:
    return {
        "lm_head.weight": (long,),
        "model.embed_tokens.weight": (16, 8),
        "model.layers.0.mlp.up_proj.weight": (129, 65),
        "model.layers.1.self_attn.q_proj.weight": (64, 64),
        "model.layers.2.mlp.up_proj.weight": (3, 7, 11),
        "model.norm.weight": (1,),
        "model.nothing.weight": (0, 8),
    }


def material(checkpoint: Checkpoint, measured: Measured) -> Material:
    return Material(tensors=VerifiedSource(checkpoint, measured.leaves), files=checkpoint.functional_files)


@pytest.fixture
def world(
    save: Callable[..., Path],
    weights: Callable[..., torch.Tensor],
    sealed: Callable[..., tuple[MergePlan, list[Material]]],
    tmp_path: Path,
) -> Callable[..., World]:
    """`world("ties")`: three models with a tensor of several chunks; base in float32, the rest in bf16."""

    def build(method: str, long: int = LONG) -> World:
        for model in MODELS:
            dtype = torch.float32 if model == "base" else torch.bfloat16
            tensors = {
                name: weights(f"{model} {name}", *shape, dtype=dtype) for name, shape in shapes(long).items()
            }
            tensors["model.position_ids"] = torch.arange(5)
            save(f"{method}/{model}", tensors)
        plan, inputs = sealed(RECIPES[method], tmp_path / method)
        return World(plan=plan, inputs=inputs)

    return build


@pytest.mark.parametrize("method", RECIPES)
def test_threads_and_chunks_do_not_show_in_the_bits(
    method: str, world: Callable[..., World], tmp_path: Path
) -> None:
    built = world(method)
    results = {
        (threads, chunk): built.run(tmp_path / f"{threads}-{chunk}", threads=threads, chunk_elements=chunk)
        for threads, chunk in [
            (1, CHUNK_ELEMENTS),
            (2, CHUNK_ELEMENTS),
            (4, 2 * CHUNK_ELEMENTS),
            (1, 8 * CHUNK_ELEMENTS),
        ]
    }
    golden = json.loads(GOLDEN.read_text())[method]
    for merged in results.values():
        assert {
            "plan": built.plan.digest,
            "trace": merged.trace.digest,
            "model": merged.manifest.model_id,
        } == golden


def test_the_finished_directory_is_what_the_manifest_says(
    world: Callable[..., World], tmp_path: Path
) -> None:
    built = world("ties")
    merged = built.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with Checkpoint.open(built.finish(tmp_path / "out")) as checkpoint:
        measured = measure(checkpoint)
    assert measured.manifest == merged.manifest
    assert measured.leaves == merged.leaves
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.position_ids"].tolist() == [0, 1, 2, 3, 4]
    assert {t.dtype for n, t in tensors.items() if n != "model.position_ids"} == {torch.bfloat16}


def test_progress_counts_every_output_byte(world: Callable[..., World], tmp_path: Path) -> None:
    built = world("linear", 1000)
    seen: list[int] = []
    built.run(tmp_path / "out", on_progress=seen.append)
    assert sum(seen) == built.plan.output_bytes


@pytest.mark.parametrize("method", ["slerp", "ties"])
def test_a_run_that_is_killed_after_any_tensor_gives_the_same_model(
    method: str, world: Callable[..., World], tmp_path: Path
) -> None:
    built = world(method, 4000)
    whole = built.run(tmp_path / "whole")
    lines = (tmp_path / "whole.journal").read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + len(built.plan.tensors)
    for finished in range(len(built.plan.tensors)):
        target = tmp_path / f"killed-{finished}"
        with pytest.raises(KilledError):
            built.run(target, on_progress=kill_after(finished + 1))
        journal = target.with_suffix(".journal")
        assert journal.read_bytes() == b"".join(lines[: finished + 2])
        # The line was being written when the power went.
        journal.write_bytes(journal.read_bytes() + lines[-1][: 10 + 3 * finished])
        assert built.run(target) == whole
        assert journal.read_bytes() == b"".join(lines)


class KilledError(Exception):
    """Stands for the end of the process."""


def kill_after(count: int) -> Callable[[int], None]:
    left = [count]

    def progress(done: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise KilledError

    return progress


def test_a_journal_is_not_believed_about_bytes_that_are_not_there(
    world: Callable[..., World], tmp_path: Path
) -> None:
    built = world("ties", 4000)
    whole = built.run(tmp_path / "out")
    weights_file = partial_path(tmp_path / "out") / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-3] ^= 0x40
    weights_file.write_bytes(data)
    assert built.run(tmp_path / "out") == whole
    with Checkpoint.open(built.finish(tmp_path / "out")) as checkpoint:
        assert measure(checkpoint).manifest == whole.manifest


def test_a_resumed_run_computes_only_what_is_missing(
    world: Callable[..., World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = world("ties", 4000)
    with pytest.raises(KilledError):
        built.run(tmp_path / "out", on_progress=kill_after(5))
    produced: list[str] = []
    digests = Work.digests

    def counting(work: Work, *arguments: object, **options: object) -> object:
        produced.append(work.tensor.name)
        return digests(work, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Work, "digests", counting)
    built.run(tmp_path / "out")
    assert produced == [t.name for t in built.plan.tensors[5:]]


def test_the_journal_of_another_plan_is_not_used(world: Callable[..., World], tmp_path: Path) -> None:
    built, journal = world("ties", 4000), tmp_path / "out.journal"
    built.run(tmp_path / "out")
    other = world("slerp", 4000)
    merged = other.run(tmp_path / "out")
    assert merged == other.run(tmp_path / "elsewhere")
    assert journal.read_bytes() == (tmp_path / "elsewhere.journal").read_bytes()


@pytest.mark.parametrize("method", RECIPES)
def test_any_leaf_can_be_computed_alone(method: str, world: Callable[..., World], tmp_path: Path) -> None:
    built = world(method)
    merged = built.run(tmp_path / "out")
    trace = Trace.parse(built.plan, merged.trace.to_bytes())
    for record in merged.manifest.tensors:
        for index in range(record.leaf_count):
            data = leaf(built.plan, trace, built.inputs, record.name, index)
            assert merkle.leaf_digest(data) == merged.leaves[record.name][index]
    with pytest.raises(ValueError, match=r"leaf 9 of model\.norm\.weight"):
        leaf(built.plan, trace, built.inputs, "model.norm.weight", 9)


@pytest.mark.parametrize("method", RECIPES)
def test_an_honest_merge_passes_its_audit(method: str, world: Callable[..., World], tmp_path: Path) -> None:
    built = world(method, 4000)
    merged = built.run(tmp_path / "out")
    seen: list[int] = []
    report = audit(
        built.plan,
        merged.trace,
        built.inputs,
        merged.manifest,
        merged.leaves,
        on_progress=seen.append,
    )
    assert report.ok
    assert report.checked == sum(t.leaf_count for t in merged.manifest.tensors)
    assert sum(seen) == built.plan.output_bytes


def forged(merged: Merged, tensor: str, index: int) -> Merged:
    """The same merge with one leaf of other bytes, and a manifest that agrees with it."""
    leaves = {t.name: list(merged.leaves[t.name]) for t in merged.manifest.tensors}
    leaves[tensor][index] = merkle.leaf_digest(b"something else")
    tensors = tuple(
        replace(
            t,
            root=tensor_record(t.name, TensorInfo(dtype=t.dtype, shape=t.shape), leaves[t.name]).root,
        )
        for t in merged.manifest.tensors
    )
    manifest = replace(merged.manifest, tensors=tensors)
    return Merged(manifest=manifest, leaves=LeafTable(leaves), trace=merged.trace)


def test_an_audit_finds_the_one_leaf_that_was_changed(world: Callable[..., World], tmp_path: Path) -> None:
    built = world("ties")
    merged = built.run(tmp_path / "out")
    for index in range(3):
        lie = forged(merged, "lm_head.weight", index)
        report = audit(built.plan, lie.trace, built.inputs, lie.manifest, lie.leaves)
        assert report.failed == (("lm_head.weight", index),)
        assert report.trace_ok
        assert report.files_ok


@pytest.mark.parametrize("method", ["slerp", "ties"])
def test_an_audit_finds_a_false_trace(method: str, world: Callable[..., World], tmp_path: Path) -> None:
    built = world(method, 4000)
    merged = built.run(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    nudged = {
        key: tuple(v + 1 if isinstance(v, int) else v * 1.001 for v in values)
        for key, values in trace(built.plan, built.inputs, name).items()
    }
    (values,) = merged.trace.steps
    false = Trace(steps=({**values, name: nudged},))
    report = audit(built.plan, false, built.inputs, merged.manifest, merged.leaves)
    assert not report.trace_ok
    assert report.failed == ((name, 0),)
    none = Trace(steps=({k: v for k, v in values.items() if k != name},))
    assert not audit(built.plan, none, built.inputs, merged.manifest, merged.leaves).trace_ok


def test_an_audit_allows_a_trace_the_last_bits_of_libm(world: Callable[..., World], tmp_path: Path) -> None:
    built = world("slerp", 4000)
    merged = built.run(tmp_path / "out")
    nudged = {
        name: {"factors": tuple(float(np.nextafter(np.float32(v), np.float32(2))) for v in traced["factors"])}
        for name, traced in merged.trace.steps[0].items()
    }
    report = audit(built.plan, Trace(steps=(nudged,)), built.inputs, merged.manifest, merged.leaves)
    assert report.trace_ok
    # Applied exactly: the other factors may give other bytes, and those are not what was claimed.
    assert {name for name, _ in report.failed} <= set(nudged)


def test_an_audit_finds_foreign_files_and_tensors(world: Callable[..., World], tmp_path: Path) -> None:
    built = world("linear", 4000)
    merged = built.run(tmp_path / "out")
    donor, *rest = built.inputs
    other = replace(donor, files=lambda: {**donor.files(), "tokenizer.json": b"{}"})
    report = audit(built.plan, merged.trace, [other, *rest], merged.manifest, merged.leaves)
    assert (report.files_ok, report.failed) == (False, ())
    extra = replace(merged.manifest.tensors[0], name="zzz.backdoor")
    manifest = replace(merged.manifest, tensors=(*merged.manifest.tensors[1:], extra))
    report = audit(built.plan, merged.trace, built.inputs, manifest, merged.leaves)
    missing = merged.manifest.tensors[0]
    assert report.failed == (
        ("zzz.backdoor", 0),
        *((missing.name, index) for index in range(missing.leaf_count)),
    )


def test_changed_input_bytes_stop_the_merge(world: Callable[..., World], tmp_path: Path) -> None:
    built = world("ties", 4000)
    weights_file = tmp_path / "ties" / "code" / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="not what was published"):
        built.run(tmp_path / "out")


def test_sources_in_the_wrong_order_are_noticed_where_their_tensors_differ(
    world: Callable[..., World], tmp_path: Path
) -> None:
    built, other = world("ties", 4000), world("slerp", 5000)
    with pytest.raises(CorruptCheckpoint, match=r"input 1 .* has shape \[5000\] for lm_head.weight"):
        run(
            built.plan,
            [built.inputs[0], other.inputs[1], built.inputs[2]],
            tmp_path / "out",
            journal=tmp_path / "j",
        )


def test_the_model_and_the_tensor_that_have_no_angle_are_named(
    save: Callable[..., Path], weights: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    good, bad = weights("a", 64), weights("b", 64)
    bad[17] = torch.inf
    paths = [save("base", {"model.norm.weight": good}), save("math", {"model.norm.weight": bad})]
    with ExitStack() as stack:
        opened = [stack.enter_context(Checkpoint.open(path)) for path in paths]
        headers = {name: header_of(c) for name, c in zip(("base", "math"), opened, strict=True)}
        measured = [measure(c) for c in opened]
        ids = {name: m.manifest.model_id for name, m in zip(("base", "math"), measured, strict=True)}
        inputs = [material(c, m) for c, m in zip(opened, measured, strict=True)]
        plan = draft(parse(RECIPES["slerp"]), headers).seal(ids)
        with pytest.raises(Unmergeable, match=r"model\.norm\.weight would hold NaN") as caught:
            run(plan, inputs, tmp_path / "out", journal=tmp_path / "j")
    assert ids["math"] in caught.value.why and ids["base"] not in caught.value.why


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_damaged_number_of_an_input_is_published(
    value: float, save: Callable[..., Path], weights: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    good, bad = weights("a", LONG), weights("b", LONG)
    bad[LONG - 3] = value
    math, code = (save(n, {"model.norm.weight": w}) for n, w in (("math", good), ("code", bad)))
    with pytest.raises(Unmergeable, match=r"model\.norm\.weight would hold NaN or infinity") as caught:
        merge_two(math, code, tmp_path)
    damaged = caught.value.hint.split()[2].rstrip(",")
    with Checkpoint.open(tmp_path / "code") as checkpoint:
        assert damaged == measure(checkpoint).manifest.model_id


def test_numbers_that_grow_too_large_are_not_published(save: Callable[..., Path], tmp_path: Path) -> None:
    large = torch.full((70,), 60_000.0)
    paths = [save(name, {"model.norm.weight": large}) for name in ("math", "code")]
    merge_two(*paths, tmp_path, dtype="bfloat16")
    with pytest.raises(Unmergeable, match="NaN or infinity") as caught:
        merge_two(*paths, tmp_path, dtype="float16")
    assert "bfloat16" in caught.value.hint


def merge_two(math: Path, code: Path, folder: Path, *, dtype: str = "bfloat16") -> Merged:
    """The sum of two models, written beside `folder / dtype`."""
    entry = "{{model: {}, parameters: {{weight: 1}}}}"
    recipe = parse(
        f"merge_method: linear\nmodels: [{entry.format('math')}, {entry.format('code')}]\n"
        f"parameters: {{normalize: false}}\ndtype: {dtype}"
    )
    with Checkpoint.open(math) as one, Checkpoint.open(code) as other:
        opened = {"math": one, "code": other}
        measured = {name: measure(c) for name, c in opened.items()}
        plan = draft(recipe, {name: header_of(c) for name, c in opened.items()}).seal(
            {name: m.manifest.model_id for name, m in measured.items()}
        )
        inputs = [material(c, measured[name]) for name, c in opened.items()]
        return run(plan, inputs, folder / dtype, journal=folder / f"{dtype}.journal")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nan_is_written_as_one_pattern_and_subnormals_are_kept(
    dtype: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    patterns = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 1, 0x80000001, 0x7F800000] * 11, np.uint32)
    values = torch.from_numpy(patterns.view(np.float32).copy())
    path = save("base", {"model.norm.weight": values})
    recipe = parse(
        f"merge_method: linear\nmodels: [{{model: base, parameters: {{weight: 1}}}}]\ndtype: {dtype}"
    )
    with Checkpoint.open(path) as checkpoint:
        measured = measure(checkpoint)
        plan = draft(recipe, {"base": header_of(checkpoint)}).seal({"base": measured.manifest.model_id})
        data = leaf(plan, Trace(steps=({},)), [material(checkpoint, measured)], "model.norm.weight", 0)
    expected = {
        "float32": [0x7FC00000] * 3 + [1, 0x80000001, 0x7F800000],
        "float16": [0x7E00] * 3 + [0, 0x8000, 0x7C00],
        "bfloat16": [0x7FC0] * 3 + [0, 0x8000, 0x7F80],
    }[dtype]
    width = np.uint32 if dtype == "float32" else np.uint16
    assert np.frombuffer(data, width).tolist() == expected * 11


PEAK = """
import json, resource, sys
from contextlib import ExitStack
from pathlib import Path
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure
from merge_core.execute import Material, run
from merge_core.recipe import parse
from merge_core.resolve import check, draft, header_of

folder = Path(sys.argv[1])
recipe = parse((folder / "recipe.yml").read_text())

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if "VmHWM" in line).split()[1]) << 10

with ExitStack() as stack:
    opened = {m: stack.enter_context(Checkpoint.open(folder / m)) for m in recipe.models}
    headers = {m: header_of(c) for m, c in opened.items()}
    measured = {m: measure(c) for m, c in opened.items()}
    plan = draft(recipe, headers).seal({m: x.manifest.model_id for m, x in measured.items()})
    inputs = [
        Material(tensors=VerifiedSource(opened[m], measured[m].leaves), files=opened[m].functional_files)
        for m in recipe.models
    ]
    before = peak()
    run(plan, inputs, folder / "out", journal=folder / "j")
    print(json.dumps([before, peak(), check(recipe, headers).peak_ram_bytes, plan.output_bytes]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_is_bounded_by_chunks_not_by_tensors(tmp_path: Path) -> None:
    shape = (24 << 20,)
    for index, model in enumerate(("base", "math", "code")):
        directory = tmp_path / model
        directory.mkdir()
        tensor = torch.full(shape, 0.5 + index / 8, dtype=torch.bfloat16)
        tensor[:: 7 + index] = -0.25
        save_file({"lm_head.weight": tensor}, directory / "model.safetensors")
        (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "recipe.yml").write_text(RECIPES["ties"])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    before, after, estimate, output = json.loads(done.stdout)
    assert output == 48 << 20
    # The inputs take 144 MiB as they are stored, 288 MiB as float32; a chunk of one takes 2 MiB.
    assert after - before < 112 << 20
    assert after < estimate


MERGE = """
import sys
from contextlib import ExitStack
from pathlib import Path
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure
from merge_core.execute import Material, run
from merge_core.plan import MergePlan

folder = Path(sys.argv[1])
with ExitStack() as stack:
    opened = [stack.enter_context(Checkpoint.open(Path(path))) for path in sys.argv[2:]]
    inputs = [
        Material(tensors=VerifiedSource(c, measure(c).leaves), files=c.functional_files) for c in opened
    ]
    plan = MergePlan.parse((folder / "plan.json").read_bytes())
    run(
        plan,
        inputs,
        folder / "out",
        journal=folder / "out.journal",
        on_progress=lambda done: print(done, flush=True),
    )
"""


def test_a_process_that_is_killed_in_the_middle_of_a_tensor_leaves_nothing_false(
    world: Callable[..., World], tmp_path: Path
) -> None:
    built = world("ties")
    whole = built.run(tmp_path / "whole")
    (tmp_path / "plan.json").write_bytes(built.plan.to_bytes())
    # The long tensor is the first: the process has just begun it, or is in a later one.
    for tensors in (0, 2):
        command = [sys.executable, "-c", MERGE, str(tmp_path), *(str(tmp_path / "ties" / m) for m in MODELS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            if tensors == 0:
                wait_for(partial_path(tmp_path / "out") / "model.safetensors")
            for _ in range(tensors):
                assert process.stdout.readline()
            process.kill()
        assert process.returncode == -signal.SIGKILL
    assert built.run(tmp_path / "out") == whole
    with Checkpoint.open(built.finish(tmp_path / "out")) as checkpoint:
        assert measure(checkpoint).manifest == whole.manifest
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == [".whole.partial"]


def wait_for(path: Path) -> None:
    """Look until a file appears; the test's timeout is the deadline."""
    while not path.exists():
        pass


def test_the_id_follows_from_names_and_numbers_alone(world: Callable[..., World], tmp_path: Path) -> None:
    built = world("linear", 4000)
    merged = built.run(tmp_path / "out")
    assert merged.manifest.model_id == sha256(merged.manifest.to_bytes())
    config = json.loads(
        result_files(built.plan, [material.files for material in built.inputs])["config.json"]
    )
    assert merged.manifest.architecture == config["architectures"][0]
