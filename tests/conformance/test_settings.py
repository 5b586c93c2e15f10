"""Gradients, filters and scopes as mergekit 0.1.5 resolves them: constant tensors reveal each resolved value.

base is 1 everywhere, math 4, code 16. Densities show in which elements are kept of task vectors without ties.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(1200)]

MODELS = ("base", "math", "code")
LAYERS, PARTS = 4, 9

CONSTANT = {
    ("linear", "gradients, filters, scopes"): """
models:
  - model: {base}
    parameters:
      weight:
        - {{filter: self_attn, value: [1.0, 0.25]}}
        - {{filter: down_proj, value: 2.0}}
        - {{value: [3.0, 5.0, 1.0]}}
  - model: {math}
    parameters: {{weight: [{{filter: mlp, value: 0.5}}]}}
  - {{model: {code}}}
parameters: {{weight: [0.5, 2.0], normalize: false}}
""",
    ("linear", "filter on normalize"): """
models:
  - {{model: {base}, parameters: {{weight: 0.5}}}}
  - {{model: {math}, parameters: {{weight: [0.25, 1.0, 0.125]}}}}
parameters: {{normalize: [{{filter: mlp, value: false}}, {{value: true}}]}}
""",
    ("task_arithmetic", "slices, filters, lambda gradient"): """
base_model: {base}
slices:
  - sources:
      - {{model: {base}, layer_range: [0, 4]}}
      - model: {math}
        layer_range: [0, 4]
        parameters: {{weight: [{{filter: mlp, value: [0, 1]}}]}}
      - {{model: {code}, layer_range: [0, 4]}}
    parameters: {{weight: [{{filter: norm, value: 0.125}}]}}
parameters: {{weight: [0.25, 0.5], lambda: [1.0, 2.0]}}
""",
    ("slerp", "gradients under filters"): """
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
""",
    ("nuslerp", "weights by layer and by filter"): """
models:
  - {{model: {math}, parameters: {{weight: [0.2, 0.9]}}}}
  - {{model: {code}, parameters: {{weight: [{{filter: q_proj, value: 2}}, {{value: [1, 0.5, 1]}}]}}}}
""",
    ("nearswap", "t by layer"): """
base_model: {base}
models:
  - {{model: {math}}}
parameters: {{t: [{{filter: mlp, value: [0.3, 2.4]}}, {{value: [1.5, 0.6]}}]}}
""",
    ("passthrough", "scale by filter"): """
models:
  - model: {math}
    parameters:
      scale: [{{filter: o_proj, value: 0}}, {{filter: down_proj, value: [0.25, 2]}}, {{value: 1}}]
""",
    ("ram", "epsilon by layer"): """
base_model: {base}
models:
  - {{model: {math}}}
  - {{model: {code}}}
parameters: {{epsilon: [{{filter: mlp, value: [1, 20]}}, {{value: [20, 1]}}]}}
""",
} | {
    (method, "weights by layer, lambda by filter"): """
base_model: {base}
models:
  - {{model: {math}, parameters: {{weight: [0.5, 1.5]}}}}
  - {{model: {code}, parameters: {{weight: [{{filter: norm, value: 0.25}}, {{value: [1, 0.125, 1]}}]}}}}
parameters: {{density: 1, lambda: [{{filter: self_attn, value: [0.5, 2]}}, {{value: 0.75}}]}}
"""
    for method in (
        *("ties", "breadcrumbs", "breadcrumbs_ties"),
        *("dare_linear", "dare_ties", "della", "della_linear"),
    )
}
RANKED = {
    ("ties", "density by layer and by filter"): """
base_model: {base}
models:
  - model: {math}
    parameters:
      weight: 1
      density: [{{filter: mlp, value: [0.15, 0.95]}}, {{filter: k_proj, value: 0.5}}, {{value: [0.9, 0.1]}}]
parameters: {{normalize: false}}
""",
    ("breadcrumbs", "density and gamma by layer"): """
base_model: {base}
models:
  - {{model: {math}, parameters: {{weight: 1, density: [0.2, 0.8], gamma: [0.1, 0.02]}}}}
""",
    ("breadcrumbs_ties", "density and gamma by filter"): """
base_model: {base}
models:
  - model: {math}
    parameters:
      weight: 1
      density: [{{filter: mlp, value: 0.35}}, {{value: 0.55}}]
      gamma: [{{filter: norm, value: 0.2}}, {{value: 0.05}}]
""",
    ("sce", "select_topk by layer"): """
base_model: {base}
models:
  - {{model: {math}}}
  - {{model: {code}}}
parameters: {{select_topk: [{{filter: mlp, value: [0.13, 0.71]}}, {{value: 0.4}}]}}
""",
}
RECIPES = CONSTANT | RANKED


@pytest.fixture(scope="module")
def outcomes(draw, named, llama, both):  # type: ignore[no-untyped-def]
    """What both tools made of every recipe, and the base of the ranked ones."""
    names = named([str(word) for word in range(LAYERS * PARTS)])
    constant = {
        model: {name: torch.full((3, 5), 4.0**at) for name in names.values()}
        for at, model in enumerate(MODELS)
    }
    bases = {name: torch.round(draw(f"base {name}", 12, 17) * 2**10) / 2**10 for name in names.values()}
    ranked = {
        "base": bases,
        "math": {name: base + _distinct(name, base, draw) for name, base in bases.items()},
        "code": {name: base + draw(f"code {name}", *base.shape) for name, base in bases.items()},
    }
    recipes = {}
    for group, models in ((CONSTANT, llama(constant)), (RANKED, llama(ranked))):
        for (method, case), text in group.items():
            filled = f"merge_method: {method}\ndtype: float32{text.format(**models)}"
            recipes[method, case] = (filled, filled)
    return both(recipes), bases


def _distinct(name: str, base: torch.Tensor, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """A task vector that is exact, with every magnitude once."""
    ranks = torch.argsort(draw(f"ranks {name}", base.numel())) + 1
    return (ranks * 2.0**-20 * torch.sign(draw(f"signs {name}", base.numel()))).reshape(base.shape).float()


@pytest.mark.parametrize(("method", "case"), CONSTANT)
def test_the_same_values_are_resolved(method: str, case: str, outcomes, judged) -> None:  # type: ignore[no-untyped-def]
    ours, theirs = outcomes[0][method, case]
    assert ours.tensors.keys() == theirs.tensors.keys(), (ours.error, theirs.error)
    off = {
        name: float(((ours.tensors[name] - other).abs() / other.abs().clamp_min(1)).max())
        for name, other in theirs.tensors.items()
    }
    values = {round(float(tensor.flatten()[0]), 5) for tensor in ours.tensors.values()}
    worst = max(off, key=lambda name: off[name])
    judged(
        operator=method,
        case=case,
        tolerance="1e-6, constant tensors",
        worst=f"{off[worst]:.3g} ({len(values)} values)",
        passed=off[worst] <= 1e-6 and len(values) > 2,
    )


@pytest.mark.parametrize(("method", "case"), RANKED)
def test_the_same_elements_are_kept(method: str, case: str, outcomes, judged) -> None:  # type: ignore[no-untyped-def]
    made, bases = outcomes
    ours, theirs = made[method, case]
    assert ours.tensors.keys() == theirs.tensors.keys(), (ours.error, theirs.error)
    kept = {name: ours.tensors[name] != base for name, base in bases.items()}
    off = sum(int((kept[name] != (theirs.tensors[name] != base)).sum()) for name, base in bases.items())
    counts = {int(mask.sum()) for mask in kept.values()}
    judged(
        operator=method,
        case=case,
        tolerance="the same elements kept",
        worst=f"{off} ({len(counts)} densities)",
        passed=off == 0 and len(counts) > 1,
    )
