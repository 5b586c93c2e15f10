"""Slices, tied heads and merges of merges as mergekit 0.1.5 makes them: constant tensors tell them apart.

Layer n of the short model is 1 + n everywhere, of the tall one 16 + 2n, of the tied one 256 + 4n; what lies
outside of the layers is a half, a quarter and an eighth more than the first of them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(1200)]

OUTSIDE = {"model.embed_tokens.weight": 0.5, "model.norm.weight": 0.25, "lm_head.weight": 0.125}
DEPTHS = {"short": 4, "tall": 6, "tied": 4}

RECIPES = {
    ("passthrough", "a frankenmerge with scales"): """
merge_method: passthrough
slices:
  - sources: [{{model: {short}, layer_range: [0, 3]}}]
  - sources:
      - model: {tall}
        layer_range: [1, 5]
        parameters:
          scale: [{{filter: layers.2.mlp, value: 0}}, {{filter: o_proj, value: [0.25, 2]}}, {{value: 1}}]
  - sources: [{{model: {short}, layer_range: [2, 4]}}]
    parameters: {{scale: {{filter: norm, value: 0.5}}}}
""",
    ("linear", "ranges, filters by layer, all scopes"): """
merge_method: linear
modules:
  default:
    slices:
      - sources:
          - model: {short}
            layer_range: [0, 3]
            parameters: {{weight: [{{filter: layers.1., value: 8}}, {{filter: mlp, value: [0, 1]}}]}}
          - {{model: {tall}, layer_range: [3, 6]}}
        parameters: {{weight: [{{filter: self_attn, value: [1, 0.25]}}]}}
      - sources:
          - {{model: {tall}, layer_range: [0, 1], parameters: {{weight: [3, 4]}}}}
          - {{model: {short}, layer_range: [3, 4], parameters: {{weight: [{{filter: lm_head, value: 7}}]}}}}
    parameters: {{weight: [{{filter: norm, value: 0.5}}]}}
parameters: {{weight: [5, 6], normalize: [{{filter: layers.3., value: true}}, {{value: false}}]}}
""",
    ("task_arithmetic", "slices with bases of their own"): """
merge_method: task_arithmetic
base_model: {short}
slices:
  - sources:
      - {{model: {short}, layer_range: [0, 2], parameters: {{weight: 100}}}}
      - {{model: {tall}, layer_range: [2, 4]}}
    parameters: {{weight: [0.25, 0.5]}}
  - base_model: {tall}
    sources:
      - {{model: {short}, layer_range: [1, 4]}}
      - {{model: {tall}, layer_range: [0, 3]}}
parameters: {{weight: [0.5, 1.5], lambda: [{{filter: layers.4., value: 2}}, {{value: [1, 0.5]}}]}}
""",
    ("slerp", "gradients over each slice"): """
merge_method: slerp
base_model: {tall}
slices:
  - sources:
      - {{model: {tall}, layer_range: [0, 5]}}
      - {{model: {tied}, layer_range: [0, 5]}}
    parameters: {{t: [{{filter: mlp, value: [0, 1]}}, {{value: [1, 0]}}]}}
  - sources:
      - {{model: {tied}, layer_range: [1, 2]}}
      - {{model: {tall}, layer_range: [5, 6]}}
parameters: {{t: [0.25, 0.75]}}
""".replace("[0, 5]", "[0, 4]"),
    ("linear", "one head that is tied"): """
merge_method: linear
models:
  - {{model: {short}, parameters: {{weight: 0.75}}}}
  - {{model: {tied}, parameters: {{weight: 0.5}}}}
parameters: {{normalize: false}}
""",
    ("linear", "a base that is not listed"): """
merge_method: linear
base_model: {tied}
models: [{{model: {short}, parameters: {{weight: 2}}}}]
parameters: {{weight: [{{filter: mlp, value: 0.5}}, {{value: 4}}], normalize: false}}
""",
}

ROUNDS = """
name: soup
merge_method: linear
models: [{{model: {short}}}, {{model: {tied}}}]
parameters: {{weight: 0.5}}
dtype: float32
---
merge_method: passthrough
slices:
  - sources: [{{model: pile, layer_range: [1, 4]}}]
  - sources: [{{model: soup, layer_range: [0, 2], parameters: {{scale: {{filter: mlp, value: 2}}}}}}]
dtype: float32
---
name: pile
merge_method: passthrough
slices:
  - sources: [{{model: soup, layer_range: [1, 3]}}]
  - sources: [{{model: {tall}, layer_range: [2, 5]}}]
dtype: float32
"""


@pytest.fixture(scope="module")
def models(llama: Callable[..., dict[str, Path]], named: Callable[..., dict[str, str]]) -> dict[str, Path]:
    """The three models."""
    tensors = {}
    for at, (model, depth) in enumerate(DEPTHS.items()):
        first, step = 16.0**at, 2.0**at
        inside = [n for n in named([str(w) for w in range(9 * depth)]).values() if ".layers." in n]
        tensors[model] = {n: torch.full((3, 5), first + step * int(n.split(".")[2])) for n in inside}
        tensors[model] |= {n: torch.full((3, 5), first * (1 + more)) for n, more in OUTSIDE.items()}
    del tensors["tied"]["lm_head.weight"]
    paths: dict[str, Path] = llama(tensors)
    config = paths["tied"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    return paths


@pytest.fixture(scope="module")
def outcomes(models: dict[str, Path], both):  # type: ignore[no-untyped-def]
    filled = {key: f"dtype: float32{text.format(**models)}" for key, text in RECIPES.items()}
    return both(
        {key: (text, text) for key, text in filled.items()} | {"rounds": (ROUNDS.format(**models),) * 2}
    )


def deviation(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float(((t - ours[name]).abs() / t.abs().clamp_min(1)).max()) for name, t in theirs.items())


@pytest.mark.parametrize(("method", "case"), RECIPES)
def test_the_same_layers_are_merged_with_the_same_weights(method: str, case: str, outcomes, judged) -> None:  # type: ignore[no-untyped-def]
    ours, theirs = outcomes[method, case]
    assert not ours.error and not theirs.error
    off = deviation(ours.tensors, theirs.tensors)
    values = {round(float(tensor.flatten()[0]), 5) for tensor in ours.tensors.values()}
    judged(
        operator=method,
        case=case,
        tolerance="1e-6, constant tensors",
        worst=f"{off:.3g} ({len(values)} values)",
        passed=off <= 1e-6 and len(values) > 3,
    )


def test_merges_of_merges_are_those_of_its_command_for_several(  # type: ignore[no-untyped-def]
    models: dict[str, Path], outcomes, mergekit: Path, tmp_path: Path, judged
) -> None:
    (tmp_path / "rounds.yml").write_text(ROUNDS.format(**models))
    done = subprocess.run(
        [
            *(mergekit.with_name("mergekit-multi"), tmp_path / "rounds.yml", "--out-path", tmp_path / "out"),
            *("-I", tmp_path / "rounds", "--no-copy-tokenizer", "--quiet"),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    off = deviation(outcomes["rounds"][0].tensors, load_file(tmp_path / "out" / "model.safetensors"))
    judged(
        operator="mergekit-multi",
        case="several merges in one file",
        tolerance="1e-6, constant tensors",
        worst=f"{off:.3g}",
        passed=off <= 1e-6,
    )
