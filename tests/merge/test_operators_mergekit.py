"""mergekit 0.1.5 as the oracle, in an environment and process of its own: the same recipe, the same weights.

At most one bf16 ulp of the largest term for what is elementwise; for TIES the kept sets agree where no
magnitudes tie. Constant tensors reveal how gradients, filters and scopes were resolved.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure
from merge_core.checkpoint.writer import CheckpointWriter
from merge_core.execute import Material, run
from merge_core.functional import result_files
from merge_core.recipe import parse
from merge_core.resolve import draft, header_of

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(900)]

ORACLE = Path(__file__).parents[2] / ".cache" / "mergekit"
LAYERS, WIDTH, VOCABULARY, INNER = 4, 32, 48, 64


@pytest.fixture(scope="session")
def mergekit() -> Path:
    """The command mergekit-yaml of an environment of its own, made once."""
    command = ORACLE / "bin" / "mergekit-yaml"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", ORACLE], check=True)
        pip = [ORACLE / "bin" / "python", "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "mergekit==0.1.5", "torch==2.13.0"], check=True)
    return command


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a small Llama."""
    named: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCABULARY, WIDTH),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        named |= {f"{prefix}.self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"}
        named |= {f"{prefix}.mlp.{p}_proj.weight": (INNER, WIDTH) for p in ("gate", "up")}
        named[f"{prefix}.mlp.down_proj.weight"] = (WIDTH, INNER)
        named |= {f"{prefix}.{p}_layernorm.weight": (WIDTH,) for p in ("input", "post_attention")}
    return named


@pytest.fixture
def models(save: Callable[..., Path], weights: Callable[..., torch.Tensor]) -> dict[str, Path]:
    """A base and two experts close to it, and three whose tensors are constant."""
    config = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
    }
    paths = {}
    for index, model in enumerate(("base", "math", "code")):
        tensors = {
            name: weights(f"base {name}", *shape) + index * 0.125 * weights(f"{model} {name}", *shape)
            for name, shape in shapes().items()
        }
        paths[model] = save(model, tensors, **config)
        constant = {name: torch.full(shape, float(4**index)) for name, shape in shapes().items()}
        paths[f"{model}-constant"] = save(f"{model}-constant", constant, **config)
    return paths


def both(
    text: str, models: dict[str, Path], mergekit: Path, folder: Path
) -> tuple[dict[str, torch.Tensor], ...]:
    """Run one recipe, with {names} for paths, through weft and through mergekit; the two sets of tensors."""
    text = text.format(**{name.replace("-", "_"): path for name, path in models.items()})
    (folder / "recipe.yml").write_text(text)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            mergekit,
            folder / "recipe.yml",
            folder / "theirs",
            "-j",
            "1",
            "--random-seed",
            "1",
            "--no-copy-tokenizer",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    recipe = parse(text)
    with ExitStack() as stack:
        opened = {m: stack.enter_context(Checkpoint.open(Path(m))) for m in recipe.models}
        measured = {m: measure(c) for m, c in opened.items()}
        plan = draft(recipe, {m: header_of(c) for m, c in opened.items()}).seal(
            {m: x.manifest.model_id for m, x in measured.items()}
        )
        inputs = [
            Material(tensors=VerifiedSource(opened[m], measured[m].leaves), files=opened[m].functional_files)
            for m in recipe.models
        ]
        run(plan, inputs, folder / "ours", journal=folder / "journal")
        with CheckpointWriter.create(folder / "ours", plan.layout) as writer:
            for name, data in result_files(plan, [material.files for material in inputs]).items():
                writer.add_file(name, data)
            writer.commit()
    theirs = {k: v for path in (folder / "theirs").glob("*.safetensors") for k, v in load_file(path).items()}
    return load_file(folder / "ours" / "model.safetensors"), theirs


EXACT = {
    "linear": """
merge_method: linear
models:
  - {{model: {base}, parameters: {{weight: 0.2}}}}
  - {{model: {math}, parameters: {{weight: 0.7}}}}
  - {{model: {code}, parameters: {{weight: [0.1, 0.9]}}}}
dtype: float32
out_dtype: bfloat16
""",
    "linear, not normalised": """
merge_method: linear
models:
  - {{model: {base}, parameters: {{weight: 0.5}}}}
  - {{model: {math}, parameters: {{weight: 0.75}}}}
parameters: {{normalize: false, int8_mask: true}}
dtype: float32
out_dtype: bfloat16
""",
    "slerp": """
merge_method: slerp
base_model: {base}
slices:
  - sources:
      - {{model: {base}, layer_range: [0, 4]}}
      - {{model: {math}, layer_range: [0, 4]}}
parameters:
  t:
    - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}
    - {{filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}}
    - {{value: 0.5}}
dtype: float32
out_dtype: bfloat16
""",
    "task arithmetic": """
merge_method: task_arithmetic
base_model: {base}
models:
  - {{model: {math}, parameters: {{weight: 1.0}}}}
  - {{model: {code}, parameters: {{weight: 0.5}}}}
parameters: {{lambda: 0.7}}
dtype: float32
out_dtype: bfloat16
""",
    "task arithmetic, normalised, base listed": """
merge_method: task_arithmetic
base_model: {base}
models:
  - {{model: {base}}}
  - {{model: {math}, parameters: {{weight: 1.0}}}}
  - {{model: {code}, parameters: {{weight: -0.25}}}}
parameters: {{normalize: true}}
dtype: float32
out_dtype: bfloat16
""",
    "ties": """
merge_method: ties
base_model: {base}
models:
  - {{model: {math}, parameters: {{weight: 1.0, density: 0.3}}}}
  - {{model: {code}, parameters: {{weight: 0.5, density: [0.5, 0.9]}}}}
dtype: float32
out_dtype: bfloat16
""",
    "ties, summed and scaled": """
merge_method: ties
base_model: {base}
models:
  - {{model: {math}, parameters: {{weight: 1.0}}}}
  - {{model: {code}, parameters: {{weight: 0.6}}}}
parameters: {{normalize: false, lambda: 0.8, density: 0.6, rescale: false}}
dtype: float32
out_dtype: bfloat16
""",
}


@pytest.mark.parametrize("case", EXACT)
def test_weft_is_within_one_bf16_ulp_of_mergekit(
    case: str, models: dict[str, Path], mergekit: Path, tmp_path: Path
) -> None:
    ours, theirs = both(EXACT[case], models, mergekit, tmp_path)
    assert ours.keys() == theirs.keys()
    inputs = [load_file(models[name] / "model.safetensors") for name in ("base", "math", "code")]
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype == torch.bfloat16
        mine, other = ours[name].double().numpy(), theirs[name].double().numpy()
        largest = np.max([np.abs(i[name].numpy()) for i in inputs] + [np.abs(other)], axis=0)
        _, exponent = np.frexp(np.maximum(largest, 2.0**-126))
        off = np.abs(mine - other) > np.ldexp(1.0, exponent - 8)
        # The draws are made of 17 bits: a few magnitudes tie, and mergekit's sort keeps any of them.
        assert off.mean() <= (0.002 if case.startswith("ties") else 0), name


TOLERANT = {
    "nuslerp": """
merge_method: nuslerp
models:
  - {{model: {math}, parameters: {{weight: 1.0}}}}
  - {{model: {code}, parameters: {{weight: [0.25, 2.0]}}}}
parameters: {{nuslerp_flatten: true, nuslerp_row_wise: false}}
dtype: float32
""",
    "nuslerp over a base": """
merge_method: nuslerp
base_model: {base}
models:
  - {{model: {math}, parameters: {{weight: 1.0}}}}
  - {{model: {code}, parameters: {{weight: 0.4}}}}
dtype: float32
""",
    "karcher": """
merge_method: karcher
models: [{{model: {base}}}, {{model: {math}}}, {{model: {code}}}]
parameters: {{max_iter: 20, tol: 1.0e-6}}
dtype: float32
""",
    "karcher, base not listed": """
merge_method: karcher
base_model: {base}
models: [{{model: {math}}}, {{model: {code}}}]
dtype: float32
""",
    "model_stock": """
merge_method: model_stock
base_model: {base}
models: [{{model: {math}}}, {{model: {code}}}]
parameters: {{filter_wise: false}}
dtype: float32
""",
    "nearswap": """
merge_method: nearswap
base_model: {base}
models: [{{model: {code}}}]
parameters: {{t: [0.0005, 0.004]}}
dtype: float32
""",
    "ram": """
merge_method: ram
base_model: {base}
models: [{{model: {math}}}, {{model: {code}}}]
parameters: {{epsilon: 2.0e-3}}
dtype: float32
""",
    "ramplus_tl": """
merge_method: ramplus_tl
base_model: {base}
models: [{{model: {math}}}, {{model: {code}}}]
parameters: {{epsilon: 3.0e-3, r: 0.5, alpha: 2.0}}
dtype: float32
""",
    "passthrough": """
merge_method: passthrough
models:
  - model: {math}
    parameters: {{scale: [{{filter: o_proj, value: 0.3}}, {{value: 1.0}}]}}
dtype: float32
""",
}


@pytest.mark.parametrize("case", TOLERANT)
def test_weft_is_within_1e_4_of_mergekit_in_float32(
    case: str, models: dict[str, Path], mergekit: Path, tmp_path: Path
) -> None:
    ours, theirs = both(TOLERANT[case], models, mergekit, tmp_path)
    assert ours.keys() == theirs.keys()
    inputs = [load_file(models[name] / "model.safetensors") for name in ("base", "math", "code")]
    for name in ours:
        scale = float(theirs[name].abs().max())
        assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6 * scale), name
        assert all(not torch.allclose(ours[name], i[name]) for i in inputs) or case == "passthrough", name


REVEALING = {
    "gradients, filters and scopes": """
merge_method: linear
models:
  - model: {base_constant}
    parameters:
      weight:
        - {{filter: self_attn, value: [1.0, 0.25]}}
        - {{filter: down_proj, value: 2.0}}
        - {{value: [3.0, 5.0, 1.0]}}
  - model: {math_constant}
    parameters:
      weight: [{{filter: mlp, value: 0.5}}]
  - {{model: {code_constant}}}
parameters: {{weight: [0.5, 2.0], normalize: false}}
dtype: float32
""",
    "slices": """
merge_method: task_arithmetic
base_model: {base_constant}
slices:
  - sources:
      - {{model: {base_constant}, layer_range: [0, 4]}}
      - model: {math_constant}
        layer_range: [0, 4]
        parameters: {{weight: [{{filter: mlp, value: [0, 1]}}]}}
      - {{model: {code_constant}, layer_range: [0, 4]}}
    parameters: {{weight: [{{filter: norm, value: 0.125}}]}}
parameters: {{weight: [0.25, 0.5], lambda: [1.0, 2.0]}}
dtype: float32
""",
}


@pytest.mark.parametrize("case", REVEALING)
def test_every_setting_is_resolved_as_mergekit_does(
    case: str, models: dict[str, Path], mergekit: Path, tmp_path: Path
) -> None:
    ours, theirs = both(REVEALING[case], models, mergekit, tmp_path)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=0), (name, ours[name], theirs[name])
    assert len({float(tensor.flatten()[0]) for tensor in ours.values()}) > 8
