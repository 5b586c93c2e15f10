"""Merging and auditing in a worker: real inputs on disk, hashed again as they are read."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from merge_core import recipe
from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import Checkpoint, measure
from merge_core.checkpoint.writer import CheckpointWriter, partial_path
from merge_core.errors import CorruptCheckpoint
from merge_core.functional import output_files
from merge_core.plan import MergePlan
from merge_core.resolve import draft, header_of
from merge_core.trace import Trace
from node.errors import LocalError
from node.worker import process

RECIPE = """
merge_method: ties
base_model: base
models:
  - {model: one, parameters: {weight: 1.0, density: 0.5}}
  - {model: two, parameters: {weight: 0.5, density: 0.5}}
"""
TENSORS = 12


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A base, two experts of 12 tensors of 1.25 MiB, measured, and a sealed TIES plan."""
    headers, ids = {}, {}
    for seed, name in enumerate(("base", "one", "two")):
        directory = tmp_path / name
        directory.mkdir()
        draw = np.random.default_rng(seed)
        weights = {
            f"model.layers.{i}.mlp.up_proj.weight": draw.standard_normal((320, 1024)).astype(np.float32)
            for i in range(TENSORS)
        }
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": TENSORS}
        (directory / "config.json").write_text(json.dumps(config))
        with Checkpoint.open(directory) as checkpoint:
            measured = measure(checkpoint)
            headers[name], ids[name] = header_of(checkpoint), measured.manifest.model_id
        (tmp_path / f"{name}.manifest.json").write_bytes(measured.manifest.to_bytes())
        (tmp_path / f"{name}.leaves.bin").write_bytes(measured.leaves.to_bytes())
    plan = draft(recipe.parse(RECIPE), headers).seal(ids)
    (tmp_path / "plan.json").write_bytes(plan.to_bytes())
    return tmp_path


def merge_request(work: Path, out: str) -> dict[str, Any]:
    plan = MergePlan.parse((work / "plan.json").read_bytes())
    names = {
        Manifest.parse((work / f"{n}.manifest.json").read_bytes()).model_id: n for n in ("base", "one", "two")
    }
    inputs = [
        {
            "directory": str(work / names[model_id]),
            "manifest": str(work / f"{names[model_id]}.manifest.json"),
            "leaves": str(work / f"{names[model_id]}.leaves.bin"),
        }
        for model_id in plan.inputs
    ]
    return {
        "plan": str(work / "plan.json"),
        "inputs": inputs,
        "target": str(work / out),
        "journal": str(work / f"{out}.journal"),
        "output": str(work / f"{out}.output"),
    }


def run(task: str, request: dict[str, Any], on_event: Any = lambda _: None) -> dict[str, Any]:
    return asyncio.run(asyncio.wait_for(process.run(task, request, on_event=on_event), 100))


def commit(work: Path, out: str) -> Path:
    """What the parent does once the worker is done."""
    plan = MergePlan.parse((work / "plan.json").read_bytes())
    with Checkpoint.open(work / "base") as base:
        files = output_files(plan.result, base.functional_files())
    with CheckpointWriter.create(work / out, plan.layout) as writer:
        for name, data in files.items():
            writer.add_file(name, data)
        return writer.commit()


def audit_request(work: Path, out: str) -> dict[str, Any]:
    request = merge_request(work, out)
    claims = {name: str(work / f"{out}.output" / file) for name, file in CLAIMS.items()}
    return {"plan": request["plan"], "inputs": request["inputs"], **claims}


CLAIMS = {"trace": "trace.json", "manifest": "manifest.json", "leaves": "leaves.bin"}


def test_what_the_worker_says_it_made_is_what_lies_on_the_disk(work: Path) -> None:
    events: list[dict[str, Any]] = []
    result = run("merge", merge_request(work, "out"), events.append)
    with Checkpoint.open(commit(work, "out")) as checkpoint:
        measured = measure(checkpoint)
    assert result["model_id"] == measured.manifest.model_id
    assert Path(result["manifest"]).read_bytes() == measured.manifest.to_bytes()
    assert LeafTable.parse(measured.manifest, Path(result["leaves"]).read_bytes()) == measured.leaves
    plan = MergePlan.parse((work / "plan.json").read_bytes())
    assert len(Trace.parse(plan, Path(result["trace"]).read_bytes())) == TENSORS
    assert (events[-1]["what"], events[-1]["done"]) == ("merge", plan.output_bytes)


def test_a_worker_killed_half_way_goes_on_and_gives_the_same_model(work: Path) -> None:
    whole = run("merge", merge_request(work, "whole"))
    child = 0

    def kill_half_way(event: dict[str, Any]) -> None:
        nonlocal child
        child = event.get("pid", child)
        if event["kind"] == "progress" and event["done"] * 2 > event["total"]:
            os.kill(child, 9)

    with pytest.raises(LocalError, match="SIGKILL"):
        run("merge", merge_request(work, "out"), kill_half_way)
    finished = (work / "out.journal").read_bytes().count(b"\n") - 1
    assert TENSORS / 2 <= finished < TENSORS
    assert not (work / "out").exists() and partial_path(work / "out").exists()
    assert run("merge", merge_request(work, "out"))["model_id"] == whole["model_id"]


def test_an_audit_confirms_an_honest_merge(work: Path) -> None:
    run("merge", merge_request(work, "out"))
    assert run("audit", audit_request(work, "out")) == {
        "checked": 2 * TENSORS,
        "failed": [],
        "failures": 0,
        "trace_ok": True,
        "files_ok": True,
    }


def test_an_audit_names_the_leaf_that_a_cheat_altered(work: Path) -> None:
    run("merge", merge_request(work, "out"))
    merged = commit(work, "out")
    weights = merged / "model.safetensors"
    altered = bytearray(weights.read_bytes())
    altered[-1] ^= 1
    weights.write_bytes(altered)
    with Checkpoint.open(merged) as checkpoint:
        claimed = measure(checkpoint)
    (work / "out.output" / "manifest.json").write_bytes(claimed.manifest.to_bytes())
    (work / "out.output" / "leaves.bin").write_bytes(claimed.leaves.to_bytes())
    report = run("audit", audit_request(work, "out"))
    last = max(checkpoint.tensors)
    assert (report["failed"], report["failures"]) == ([[last, 1]], 1)


def test_an_audit_sees_another_config(work: Path) -> None:
    run("merge", merge_request(work, "out"))
    merged = commit(work, "out")
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.0}))
    with Checkpoint.open(merged) as checkpoint:
        claimed = measure(checkpoint)
    (work / "out.output" / "manifest.json").write_bytes(claimed.manifest.to_bytes())
    report = run("audit", audit_request(work, "out"))
    assert (report["failures"], report["files_ok"]) == (0, False)


def test_an_input_that_the_plan_does_not_name_is_refused(work: Path) -> None:
    request = merge_request(work, "out")
    request["inputs"][1] = request["inputs"][2]
    with pytest.raises(CorruptCheckpoint, match="the plan names sha256:"):
        run("merge", request)
    assert not partial_path(work / "out").exists()


def test_a_flipped_bit_in_an_expert_stops_the_merge(work: Path) -> None:
    weights = work / "one" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CorruptCheckpoint, match="not what was published"):
        run("merge", merge_request(work, "out"))
    assert not (work / "out").exists()


def test_a_config_that_is_not_the_donors_is_refused(work: Path) -> None:
    config = work / "base" / "config.json"
    config.write_text(config.read_text().replace("12", "13"))
    with pytest.raises(CorruptCheckpoint, match=r"config\.json is not what was published"):
        run("merge", merge_request(work, "out"))
