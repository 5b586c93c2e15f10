"""An operator of another package: the one in the README, installed for one process and not for another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

README = Path(__file__).parents[2] / "README.md"
WEFT = Path(sys.executable).with_name("weft")
MODELS = ("one", "two", "three")
SHAPES = {"model.embed_tokens.weight": (16, 8), "model.layers.0.mlp.up_proj.weight": (65, 8)}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder as pip leaves it, with the package that the README shows."""
    section = README.read_text().partition("## Write an operator")[2].partition("\n## ")[0]
    code, project = re.findall(r"```(?:python|toml)\n(.*?)```", section, re.DOTALL)
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) <= 15
    folder = tmp_path / "site"
    metadata = folder / "my_merges-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "my_merges.py").write_text(code)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-merges\nVersion: 1.0\n")
    entry = re.search(r'^(\w+) = "(.*)"$', project, re.MULTILINE)
    assert entry is not None
    (metadata / "entry_points.txt").write_text(f"[weft.operators]\n{entry[1]} = {entry[2]}\n")
    return folder


@pytest.fixture
def models(save: Callable[..., Path], weights: Callable[..., torch.Tensor]) -> Mapping[str, Path]:
    """Three models in float32."""
    return {
        model: save(model, {name: weights(f"{model} {name}", *shape) for name, shape in SHAPES.items()})
        for model in MODELS
    }


@pytest.fixture
def weft(tmp_path: Path) -> Callable[..., tuple[int, Any]]:
    """`weft("plan", recipe, site=package)`: the command in a process of its own; exit code and envelope."""
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH" and not n.startswith("WEFT_")}
    environment["WEFT_HOME"] = str(tmp_path / "home")

    def run(*words: object, site: Path | None = None) -> tuple[int, Any]:
        done = subprocess.run(
            [WEFT, "--json", *map(str, words)],
            env=environment | ({"PYTHONPATH": str(site)} if site else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        return done.returncode, json.loads(done.stdout)

    return run


def test_an_installed_operator_merges_and_is_audited_and_where_it_is_missing_the_error_says_so(
    package: Path, models: Mapping[str, Path], weft: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
    listed = "".join(f"  - model: {path}\n" for path in models.values())
    recipe.write_text(f"merge_method: median\nmodels:\n{listed}")

    code, said = weft("merge", recipe, "-o", out, site=package)
    assert code == 0, said
    merged = load_file(out / "model.safetensors")
    parts = [load_file(path / "model.safetensors") for path in models.values()]
    for name in SHAPES:
        assert torch.equal(merged[name], torch.stack([p[name] for p in parts]).median(dim=0).values)
    code, said = weft("verify", out, "--audit", "full", site=package)
    assert code == 0, said

    for words in (["merge", recipe, "-o", tmp_path / "other"], ["verify", out, "--audit", "full"]):
        code, said = weft(*words)
        assert code != 0
        assert "merge_method median: not supported" in said["error"]["why"]
        assert said["error"]["hint"]
    assert not (tmp_path / "other").exists()


def test_what_is_no_operator_is_refused_with_the_package_that_claims_it(
    package: Path, models: Mapping[str, Path], weft: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    (package / "my_merges.py").write_text("MEDIAN = 'not an operator'\n")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: median\nmodels: [{{model: {models['one']}}}]\n")
    code, said = weft("plan", recipe, site=package)
    assert code != 0
    assert said["error"]["hint"] == "pip uninstall my-merges"
