"""Tiny experts on the disk, and the real command: in this process, as a person sees it come out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from node.cli import main

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
RECIPE = """
merge_method: task_arithmetic
base_model: ./base
models:
  - {model: ./math, parameters: {weight: 1.0}}
  - {model: ./code, parameters: {weight: 0.5}}
"""


def write_expert(directory: Path, seed: int, *, licence: str = "apache-2.0", rows: int = 64) -> Path:
    """Four tensors in two dtypes, config, tokenizer settings and a card that states a licence."""
    directory.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": draw.standard_normal((rows, 16)).astype(np.float32),
        "model.layers.0.mlp.up_proj.weight": draw.standard_normal((40, 16)).astype(np.float16),
        "model.layers.0.mlp.down_proj.weight": draw.standard_normal((16, 40)).astype(np.float16),
        "model.norm.weight": np.ones(16, dtype=np.float32),
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": rows}))
    (directory / "tokenizer_config.json").write_text('{"model_max_length":64}')
    (directory / "README.md").write_text(f"---\nlicense: {licence}\n---\nA tiny expert.\n")
    return directory


def write_merging(folder: Path) -> None:
    """A base, two experts of it, and a recipe."""
    for seed, name in enumerate(("base", "math", "code")):
        write_expert(folder / name, seed)
    (folder / "recipe.yml").write_text(RECIPE)


def tree(folder: Path) -> dict[str, str]:
    """Every path below a folder, hidden ones too: what kind it is and the digest of what it holds."""
    return {
        str(path.relative_to(folder)): "folder"
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the command ended with and wrote."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The data of the one envelope on stdout."""
        envelope = json.loads(self.out)
        assert self.code == 0 and self.out.count("\n") == 1, self
        assert (envelope["schema"], envelope["ok"]) == ("weft.cli/v1", True)
        return envelope["data"]

    @property
    def error(self) -> dict[str, Any]:
        """The error of the one envelope on stdout."""
        envelope = json.loads(self.out)
        assert self.code != 0 and self.out.count("\n") == 1, self
        assert set(envelope) == {"schema", "ok", "error"} and envelope["ok"] is False
        error: dict[str, Any] = envelope["error"]
        return error


Weft = Callable[..., Said]


@pytest.fixture
def weft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Weft:
    """`weft("id", "show")`, run in a folder of its own with a home that does not exist yet."""
    for name in os.environ:
        if name.startswith("WEFT_"):
            monkeypatch.delenv(name)
    desk = tmp_path / "desk"
    desk.mkdir()
    monkeypatch.chdir(desk)
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "home"))

    def run(*words: object) -> Said:
        capsys.readouterr()
        code = main.run([str(word) for word in words])
        said = capsys.readouterr()
        return Said(code=code, out=said.out, err=said.err)

    return run


@pytest.fixture
def desk(weft: Weft) -> Path:
    """Where the command runs: a base, two experts of it and a recipe for them."""
    write_merging(Path.cwd())
    return Path.cwd()


@pytest.fixture(scope="session")
def merging() -> Callable[[Path], None]:
    """`write_merging`, for fixtures of a wider scope."""
    return write_merging


@pytest.fixture
def expert() -> Callable[..., Path]:
    """`write_expert`, for tests that need another one."""
    return write_expert


@pytest.fixture
def listing() -> Callable[[Path], dict[str, str]]:
    """`tree`, to compare a folder before and after."""
    return tree
