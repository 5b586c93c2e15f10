"""Tiny checkpoints as publishers have them, and a family of them: a base, two experts, and their merge."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from merge_core import execute, functional, plan, recipe, resolve
from merge_core.checkpoint.manifest import Manifest
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure
from merge_core.checkpoint.writer import CheckpointWriter
from merge_core.digest import ModelId
from merge_core.trace import Trace
from node.domain.negotiation import AGREEMENT_TYPE, Agreement, Purpose
from node.identity import keyring
from node.identity.envelopes import Envelope, seal
from node.identity.keyring import Identity
from node.provenance import attest

NOW = 1_800_000_000.0
CONFIG = '{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":16,"num_hidden_layers":1}'
TIES = """
merge_method: ties
base_model: base
models:
  - {model: math, parameters: {weight: 1.0, density: 0.4}}
  - {model: code, parameters: {weight: 0.5, density: 0.6}}
"""


def write_model(directory: Path, seed: int) -> Path:
    """Three tensors in two dtypes (one of two leaves), config, tokenizer, card and licence."""
    directory.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": draw.standard_normal((64, 16)).astype(np.float32),
        "model.layers.0.mlp.up_proj.weight": draw.standard_normal((600_000,)).astype(np.float16),
        "model.norm.weight": np.ones(16, dtype=np.float32),
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(CONFIG)
    (directory / "tokenizer_config.json").write_text('{"model_max_length":64}')
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\nA tiny model.\n")
    (directory / "LICENSE").write_text("Apache License 2.0\n")
    return directory


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory that nobody has signed yet."""
    return write_model(tmp_path / "tiny", 7)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Parents by name, all published by `owner`; `merged` is their merge by `builder`."""

    parents: dict[str, Path]
    merged: Path
    owner: Identity
    builder: Identity
    plan: plan.MergePlan
    trace: Trace
    manifest: Manifest

    def of(self, model_id: ModelId) -> Path | None:
        """The directory of a parent."""
        ids = dict(zip(self.plan.inputs, self.parents.values(), strict=True))
        return ids.get(model_id)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A family that no test may change: use `family`."""
    root = tmp_path_factory.mktemp("family")
    owner, builder = (keyring.create(root / who, NOW) for who in ("owner", "builder"))
    parents = {name: write_model(root / name, seed) for seed, name in enumerate(("base", "math", "code"))}
    for directory in parents.values():
        with Checkpoint.open(directory) as checkpoint:
            attest.publish(directory, owner, measure(checkpoint).manifest)
    checkpoints = {name: Checkpoint.open(directory) for name, directory in parents.items()}
    measured = {name: measure(checkpoint) for name, checkpoint in checkpoints.items()}
    headers = {name: resolve.header_of(checkpoint) for name, checkpoint in checkpoints.items()}
    sealed = resolve.draft(recipe.parse(TIES), headers).seal(
        {name: found.manifest.model_id for name, found in measured.items()}
    )
    inputs = [
        execute.Material(
            tensors=VerifiedSource(checkpoints[name], measured[name].leaves),
            files=checkpoints[name].functional_files,
        )
        for name in parents
    ]
    donor = checkpoints["base"].functional_files()
    merged = execute.run(sealed, inputs, root / "merged", journal=root / "journal")
    terms = attest.Terms(licence="Apache-2.0", publisher=owner.publisher.key_id)
    merge = attest.Merge(
        plan=sealed,
        trace=merged.trace,
        manifest=merged.manifest,
        terms=dict.fromkeys(sealed.inputs, terms),
        agreements=(agree(owner, builder, sealed),),
    )
    with CheckpointWriter.create(root / "merged", sealed.layout) as writer:
        for name, data in functional.output_files(sealed.result, donor).items():
            writer.add_file(name, data)
        attest.attest(writer.path, builder, merge, engine="0.1.0", finished_at=NOW)
        writer.commit()
    for checkpoint in checkpoints.values():
        checkpoint.close()
    return Family(
        parents=parents,
        merged=root / "merged",
        owner=owner,
        builder=builder,
        plan=sealed,
        trace=merged.trace,
        manifest=merged.manifest,
    )


@pytest.fixture
def family(pristine: Family, tmp_path: Path) -> Family:
    """A copy of the family for one test."""
    shutil.copytree(pristine.merged.parent, tmp_path / "family")
    moved = {name: tmp_path / "family" / name for name in pristine.parents}
    return Family(**(pristine.__dict__ | {"parents": moved, "merged": tmp_path / "family" / "merged"}))


def agree(
    provider: Identity,
    requester: Identity,
    merge_plan: plan.MergePlan,
    *,
    purpose: Purpose = Purpose.MERGE,
) -> Envelope:
    """An Agreement for all parents of a plan, signed by both sides."""
    agreement = Agreement(
        network="test",
        offer=merge_plan.digest,
        provider=provider.peer_id,
        requester=requester.peer_id,
        models=tuple(sorted(set(merge_plan.inputs))),
        purpose=purpose,
        plan=merge_plan.digest,
        max_bytes=1 << 30,
        not_before=int(NOW) - 60,
        expires_at=int(NOW) + 60,
    )
    return seal(AGREEMENT_TYPE, agreement.to_bytes(), provider.host, requester.host)


@pytest.fixture
def agreed() -> Callable[..., Envelope]:
    """`agree`, for tests that need another Agreement."""
    return agree
