"""DARE and DELLA against mergekit 0.1.5: the draws differ, what they do on the whole does not.

Shares and means are compared in standard errors of what chance allows; the seeds are fixed, so a row passes
or fails for good. mergekit restores the L1 norm where it rescales: ours does with `rescale_l1`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(1200)]

SHAPES = {"matrix": (725, 727), "vector": (200_003,)}
DENSITY, EPSILON, STEPS = 0.3, 0.12, 10
METHODS = ("dare_linear", "dare_ties", "della", "della_linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A recipe's models and settings; what we are told beside them."""

    models: tuple[str, ...]
    settings: str
    ours: str = ""

    def recipe(self, method: str, paths: dict[str, object], more: str) -> str:
        """The recipe for one of the tools."""
        own = f"weight: 1, density: {DENSITY}" + (f", epsilon: {EPSILON}" if "della" in method else "")
        listed = "".join(f"  - {{model: {paths[m]}, parameters: {{{own}}}}}\n" for m in self.models)
        return (
            f"merge_method: {method}\nbase_model: {paths['base']}\nmodels:\n{listed}"
            f"parameters: {{{self.settings}{more}}}\ndtype: float32\n"
        )


CASES = {
    "kept": Case(models=("math",), settings="normalize: false, rescale: false"),
    "norm": Case(models=("math",), settings="normalize: false", ours=", rescale_l1: true"),
    "two": Case(models=("math", "code"), settings="normalize: false", ours=", rescale_l1: true"),
}


@pytest.fixture(scope="module")
def world(draw, named, llama, both):  # type: ignore[no-untyped-def]
    """(task vectors of math by tensor, what both tools add to a base of zeros by (method, case))."""
    names = named(list(SHAPES))
    deltas = {
        model: {
            name: draw(f"{model} {word}", *SHAPES[word]) if word in SHAPES else torch.ones(2, 2)
            for word, name in names.items()
        }
        for model in ("math", "code")
    }
    paths = llama({"base": {n: torch.zeros_like(t) for n, t in deltas["math"].items()}, **deltas})
    recipes = {
        (method, name): (case.recipe(method, paths, case.ours), case.recipe(method, paths, ""))
        for method in METHODS
        for name, case in CASES.items()
    }
    made = both(recipes)
    assert not [key for key, outcomes in made.items() for outcome in outcomes if outcome.error]
    return {word: deltas["math"][names[word]] for word in SHAPES}, {
        key: [{word: outcome.tensors[names[word]] for word in SHAPES} for outcome in outcomes]
        for key, outcomes in made.items()
    }


def errors_of_share(kept: np.ndarray, expected: float) -> float:
    """How many standard errors the share of what is kept lies from what was asked for."""
    return float(abs(kept.mean() - expected) / np.sqrt(expected * (1 - expected) / kept.size))


@pytest.mark.parametrize("method", METHODS)
def test_the_share_that_is_kept_is_the_density(method: str, world, judged) -> None:  # type: ignore[no-untyped-def]
    deltas, made = world
    off = [
        errors_of_share((tool[word] != 0).numpy(), DENSITY)
        for tool in made[method, "kept"]
        for word in deltas
    ]
    kept_as_they_are = all(
        torch.equal(tool[word][tool[word] != 0], deltas[word][tool[word] != 0])
        for tool in made[method, "kept"]
        for word in deltas
    )
    judged(
        operator=method,
        case=f"density {DENSITY}",
        tolerance="share kept within 4 standard errors",
        worst=f"{max(off):.2g}",
        passed=max(off) <= 4 and kept_as_they_are,
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_chance_of_each_rank_is_the_same(method: str, world, judged) -> None:  # type: ignore[no-untyped-def]
    deltas, made = world
    rows = deltas["matrix"].abs().numpy()
    ranks = rows.argsort(axis=1).argsort(axis=1) * STEPS // rows.shape[1]
    off = []
    for tool in made[method, "kept"]:
        kept = (tool["matrix"] != 0).numpy()
        for step in range(STEPS):
            spread = 2 * EPSILON * ((step + 0.5) / STEPS - 0.5) if "della" in method else 0.0
            off.append(errors_of_share(kept[ranks == step], DENSITY + spread))
    judged(
        operator=method,
        case="by tenths of a row's ranks",
        tolerance="share kept within 4 standard errors",
        worst=f"{max(off):.2g}",
        passed=max(off) <= 4,
    )


@pytest.mark.parametrize("method", METHODS)
def test_rescaling_restores_the_norm(method: str, world, judged) -> None:  # type: ignore[no-untyped-def]
    deltas, made = world
    off = [
        abs(float(tool[word].double().abs().sum() / deltas[word].double().abs().sum()) - 1)
        for tool in made[method, "norm"]
        for word in deltas
    ]
    judged(
        operator=method,
        case="L1 norm restored",
        tolerance="1e-4 of the norm",
        worst=f"{max(off):.2g}",
        passed=max(off) <= 1e-4,
    )


@pytest.mark.parametrize("method", METHODS)
def test_two_experts_give_the_same_distribution(method: str, world, judged) -> None:  # type: ignore[no-untyped-def]
    deltas, made = world
    off = []
    for word in deltas:
        ours, theirs = (tool[word].double().abs().flatten() for tool in made[method, "two"])
        for power in (1, 2):
            mine, other = ours**power, theirs**power
            error = torch.sqrt((mine.var() + other.var()) / mine.numel())
            off.append(float((mine.mean() - other.mean()).abs() / error))
        off.append(errors_of_share((ours != 0).numpy(), float((theirs != 0).double().mean())) / np.sqrt(2))
    judged(
        operator=method,
        case="two experts",
        tolerance="moments within 4 standard errors",
        worst=f"{max(off):.2g}",
        passed=max(off) <= 4,
    )
