"""Every operator against mergekit 0.1.5 on the same recipes: edge cases, and what each tolerance allows.

Deviations are measured against the largest term of an element: the models' values and mergekit's result.
Chance is not comparable draw by draw; test_chance.py compares what it does on the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch

from merge_core.operators import METHODS

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(1200)]

Trio: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Draw: TypeAlias = Callable[..., torch.Tensor]
MODELS = ("base", "math", "code")
CHUNK_EDGE = (725, 727)
"""A little more than the 524,288 elements of a chunk."""


def edges(draw: Draw) -> dict[str, Trio]:
    """Crafted tensors for base, math and code by what is special about them."""

    def near(words: str, *shape: int) -> Trio:
        base = draw(f"base {words}", *shape)
        return base, base + draw(f"math {words}", *shape), base + draw(f"code {words}", *shape)

    signs = torch.tensor([0.0, -0.0]).repeat(13)
    steps = [0.25 * torch.sign(draw(f"{m} steps", 6, 11)) for m in MODELS[1:]]
    tiny = [draw(f"{m} tiny", 27) * 1e-38 for m in MODELS]
    return {
        "bell": near("bell", 33, 31),
        "all equal": (base := draw("base alike", 9, 14), base.clone(), base.clone()),
        "constant": tuple(torch.full((5, 8), v) for v in (1.0, 2.0, -0.75)),  # type: ignore[dict-item]
        "zeros": (torch.zeros(6, 6), torch.zeros(6, 6), torch.zeros(6, 6)),
        "one is zero": (draw("base half", 7, 7), draw("math half", 7, 7), torch.zeros(7, 7)),
        "signed zeros": (signs, signs.roll(1), signs.clone()),
        "subnormal": (tiny[0], tiny[1], tiny[2]),
        "steps": (torch.zeros(6, 11), *steps),  # type: ignore[dict-item]
        "one element": near("one", 1),
        "odd vector": near("vector", 129),
        "one row": near("row", 1, 5),
        "one column": near("column", 5, 1),
        "three dimensions": near("cube", 7, 13, 3),
        "chunk edge": near("long", *CHUNK_EDGE),
    }


def tie_free(draw: Draw) -> dict[str, Trio]:
    """Tensors whose task vectors are exact, with every magnitude once."""

    def distinct(words: str, base: torch.Tensor) -> torch.Tensor:
        ranks = torch.argsort(draw(f"{words} ranks", base.numel())) + 1
        delta = ranks * 2.0**-26 * torch.sign(draw(f"{words} signs", base.numel()))
        return base + delta.reshape(base.shape).float()

    def trio(words: str, *shape: int) -> Trio:
        base = torch.round(draw(f"base {words}", *shape) * 2**10) / 2**10
        return base, distinct(f"math {words}", base), distinct(f"code {words}", base)

    return {
        "one element": trio("one", 1),
        "matrix": trio("matrix", 33, 31),
        "odd vector": trio("vector", 1021),
        "chunk edge": trio("long", *CHUNK_EDGE),
    }


def tied(draw: Draw) -> dict[str, Trio]:
    """Tensors with few magnitudes: many tie at any threshold."""

    def trio(words: str, *shape: int) -> Trio:
        base = torch.round(draw(f"base {words}", *shape) * 2**10) / 2**10
        return tuple(  # type: ignore[return-value]
            base if m == "base" else base + torch.round(draw(f"{m} {words}", *shape) * 64) / 512
            for m in MODELS
        )

    return {"matrix": trio("tied", 33, 31), "chunk edge": trio("tied long", *CHUNK_EDGE)}


# -- what is compared ------------------------------------------------------------------------------------

Terms: TypeAlias = Sequence[torch.Tensor]
Judge: TypeAlias = Callable[[torch.Tensor, torch.Tensor, Terms], float]
"""(ours, theirs, the models' tensors) -> the deviation, in the unit of the tolerance."""


def different(ours: torch.Tensor, theirs: torch.Tensor, terms: Terms) -> float:
    """How many elements differ in any bit."""
    return float((ours.numpy().view(np.uint32) != theirs.numpy().view(np.uint32)).sum())


def bf16_ulps(ours: torch.Tensor, theirs: torch.Tensor, terms: Terms) -> float:
    """The largest distance in units of the last place of bfloat16, of the largest term."""
    _, exponent = np.frexp(np.maximum(_largest(theirs, terms), 2.0**-126))
    return float(np.max(_distance(ours, theirs) / np.ldexp(1.0, exponent - 8), initial=0.0))


def relative(ours: torch.Tensor, theirs: torch.Tensor, terms: Terms) -> float:
    """The largest distance as a share of the largest term."""
    largest = np.maximum(_largest(theirs, terms), 2.0**-126)
    return float(np.max(_distance(ours, theirs) / largest, initial=0.0))


def kept_otherwise(ours: torch.Tensor, theirs: torch.Tensor, terms: Terms) -> float:
    """How many elements of a lone task vector one tool keeps and the other drops."""
    return float(((ours != terms[0]) != (theirs != terms[0])).sum())


def kept_magnitudes(ours: torch.Tensor, theirs: torch.Tensor, terms: Terms) -> float:
    """How many of the magnitudes kept differ, from the largest down: at a tie any index may be kept."""
    mine, other = ((t.double() - terms[0].double()).abs().flatten().sort().values for t in (ours, theirs))
    return float((mine != other).sum())


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> np.ndarray:
    distance: np.ndarray = np.abs(ours.double().numpy() - theirs.double().numpy())
    return distance


def _largest(theirs: torch.Tensor, terms: Terms) -> np.ndarray:
    largest: np.ndarray = np.max([np.abs(t.double().numpy()) for t in (*terms, theirs)], axis=0)
    return largest


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What a deviation is measured in, and how large it may be."""

    says: str
    judge: Judge
    most: float
    out_dtype: str = "float32"


EXACT = Tolerance(says="bit for bit", judge=different, most=0)
ULP = Tolerance(says="1 bf16 ulp of the largest term", judge=bf16_ulps, most=1, out_dtype="bfloat16")
CLOSE = Tolerance(says="1e-4 of the largest term, float32", judge=relative, most=1e-4)
LAST_BITS = Tolerance(says="1e-6 of the largest term, float32", judge=relative, most=1e-6)
KEPT = Tolerance(says="the same elements kept", judge=kept_otherwise, most=0)
KEPT_TIES = Tolerance(says="the same magnitudes kept", judge=kept_magnitudes, most=0)


# -- the table -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One recipe: what each model says, what all say, on which models, and what is allowed.

    `without` names tensors that are left out, and why.
    """

    tolerance: Tolerance
    models: Mapping[str, str] = field(default_factory=dict)
    base: str | None = "base"
    settings: str = ""
    on: str = "edges"
    without: Mapping[str, str] = field(default_factory=dict)

    def recipe(self, method: str, paths: Mapping[str, Path]) -> str:
        """The recipe with paths in place of names."""
        listed = "".join(f"  - {{model: {paths[m]}, parameters: {{{s}}}}}\n" for m, s in self.models.items())
        return (
            f"merge_method: {method}\n"
            + (f"base_model: {paths[self.base]}\n" if self.base else "")
            + f"models:\n{listed}"
            + (f"parameters: {{{self.settings}}}\n" if self.settings else "")
            + f"dtype: float32\nout_dtype: {self.tolerance.out_dtype}\n"
        )


EXPERTS = {"math": "", "code": ""}
WEIGHTED = {"math": "weight: 0.7", "code": "weight: 0.45"}
ALONE = {"math": "weight: 1.0"}
UNIFORM = {"subnormal": "mergekit weighs experts alike where their energy is below 1e-6"}
ANY_INDEX = dict.fromkeys(("steps", "signed zeros", "constant"), "of equal variances mergekit keeps any")
PLUS_ZERO = {"signed zeros": "mergekit adds to +0, so that -0 becomes +0"}

SPARSE = {"math": "weight: 1.0, density: 0.37"}
THINNED = {"math": "weight: 0.7, density: 0.37", "code": "weight: 0.45, density: 0.61"}
DENSE = {"math": "weight: 0.7, density: 1.0", "code": "weight: 0.45, density: 1.0"}

CASES: Mapping[str, Mapping[str, Case]] = {
    "linear": {
        "three weights": Case(
            tolerance=ULP,
            base=None,
            models={"base": "weight: 0.2", "math": "weight: 0.7", "code": "weight: 0.1"},
        ),
        "not normalised": Case(
            tolerance=ULP,
            base=None,
            models={"base": "weight: 0.5", "math": "weight: -0.8"},
            settings="normalize: false",
        ),
        "weights 1 and 0": Case(
            tolerance=EXACT, base=None, models={"base": "weight: 1", "math": "weight: 0", "code": "weight: 0"}
        ),
        "identical models": Case(
            tolerance=EXACT,
            base=None,
            on="twins",
            models=dict.fromkeys(MODELS, "weight: 1"),
            without=PLUS_ZERO,
        ),
    },
    "slerp": {
        "t 0.4": Case(tolerance=ULP, models={"base": "", "math": ""}, settings="t: 0.4"),
        "t 0": Case(tolerance=EXACT, models={"base": "", "math": ""}, settings="t: 0"),
        "t 1": Case(tolerance=EXACT, models={"base": "", "math": ""}, settings="t: 1"),
        "identical models": Case(
            tolerance=ULP, on="twins", models={"base": "", "math": ""}, settings="t: 0.3"
        ),
    },
    "task_arithmetic": {
        "two weights": Case(tolerance=ULP, models=WEIGHTED, settings="lambda: 0.8"),
        "normalised": Case(tolerance=ULP, models=WEIGHTED, settings="normalize: true"),
        "base among the models": Case(
            tolerance=ULP,
            models={"base": "", "math": "weight: 1.0", "code": "weight: -0.25"},
            settings="normalize: true, int8_mask: true",
        ),
        "one expert": Case(tolerance=EXACT, models=ALONE),
        "weights 0": Case(tolerance=EXACT, models={"math": "weight: 0", "code": "weight: 0"}),
        "identical models": Case(
            tolerance=EXACT, on="twins", models={"math": "weight: 1", "code": "weight: 1"}
        ),
    },
    "passthrough": {
        "as it is": Case(tolerance=EXACT, base=None, models={"math": ""}),
        "scaled": Case(tolerance=EXACT, base=None, models={"math": "scale: 0.3"}),
    },
    "nuslerp": {
        "two models": Case(tolerance=CLOSE, base=None, models=WEIGHTED),
        "from a base": Case(tolerance=CLOSE, models=WEIGHTED),
        "weights 1 and 0": Case(
            tolerance=LAST_BITS, base=None, models={"math": "weight: 1", "code": "weight: 0"}
        ),
    },
    "karcher": {
        "three models": Case(tolerance=CLOSE, base=None, models=dict.fromkeys(MODELS, "")),
        "base not among the models": Case(
            tolerance=CLOSE, models=EXPERTS, settings="max_iter: 20, tol: 1.0e-6"
        ),
    },
    "model_stock": {"two experts": Case(tolerance=CLOSE, models=EXPERTS)},
    "nearswap": {"t 0.02": Case(tolerance=CLOSE, models={"math": ""}, settings="t: 0.02")},
    "ram": {"two experts": Case(tolerance=CLOSE, models=EXPERTS)},
    "ramplus_tl": {"two experts": Case(tolerance=CLOSE, models=EXPERTS)},
    "sce": {
        "all positions": Case(tolerance=CLOSE, models=EXPERTS, without=UNIFORM),
        "a third of the positions": Case(
            tolerance=CLOSE, models=EXPERTS, settings="select_topk: 0.3", without=UNIFORM | ANY_INDEX
        ),
    },
    "ties": {
        "density 1": Case(tolerance=LAST_BITS, models=DENSE),
        "kept": Case(tolerance=KEPT, on="tie free", models=SPARSE, settings="normalize: false"),
        "kept at ties": Case(tolerance=KEPT_TIES, on="tied", models=SPARSE, settings="normalize: false"),
        "two experts": Case(tolerance=LAST_BITS, on="tie free", models=THINNED, settings="lambda: 0.8"),
        "summed": Case(tolerance=LAST_BITS, on="tie free", models=THINNED, settings="normalize: false"),
    },
    "breadcrumbs": {
        "density 1": Case(tolerance=LAST_BITS, models=DENSE),
        "kept": Case(
            tolerance=KEPT, on="tie free", models={"math": "weight: 1.0, density: 0.37, gamma: 0.04"}
        ),
        "kept at ties": Case(
            tolerance=KEPT_TIES, on="tied", models={"math": "weight: 1.0, density: 0.37, gamma: 0.04"}
        ),
        "two experts": Case(tolerance=LAST_BITS, on="tie free", models=THINNED),
        "rescaled": Case(tolerance=CLOSE, on="tie free", models=THINNED, settings="rescale: true"),
    },
    "breadcrumbs_ties": {
        "density 1": Case(tolerance=LAST_BITS, models=DENSE),
        "two experts": Case(tolerance=LAST_BITS, on="tie free", models=THINNED),
    },
    "dare_linear": {"density 1": Case(tolerance=LAST_BITS, models=DENSE)},
    "dare_ties": {"density 1": Case(tolerance=LAST_BITS, models=DENSE)},
    "della": {"density 1": Case(tolerance=LAST_BITS, models=DENSE)},
    "della_linear": {"density 1": Case(tolerance=LAST_BITS, models=DENSE)},
}
ROWS = [(method, case) for method, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def sets(draw: Draw) -> dict[str, dict[str, Trio]]:
    """The models by set, word and position in MODELS."""
    crafted = edges(draw)
    return {
        "edges": crafted,
        "twins": {word: (trio[1],) * 3 for word, trio in crafted.items()},
        "tie free": tie_free(draw),
        "tied": tied(draw),
    }


@pytest.fixture(scope="module")
def outcomes(sets, named, llama, both):  # type: ignore[no-untyped-def]
    """What both tools made of every recipe, by (operator, case), and the names of the words."""
    places = {key: named(list(trios)) for key, trios in sets.items()}
    models = {
        key: llama(
            {
                model: {
                    name: sets[key][word][at].clone() if word in sets[key] else torch.ones(2, 2)
                    for word, name in places[key].items()
                }
                for at, model in enumerate(MODELS)
            }
        )
        for key in sets
    }
    jobs = {}
    for method, name in ROWS:
        case = CASES[method][name]
        text = case.recipe(method, models[case.on])
        jobs[method, name] = (text, text)
    return both(jobs), places


@pytest.mark.parametrize(("method", "name"), ROWS)
def test_conforms(method: str, name: str, outcomes, sets, judged) -> None:  # type: ignore[no-untyped-def]
    case, (made, places) = CASES[method][name], outcomes
    ours, theirs = made[method, name]
    tolerance, found = case.tolerance, {}
    if not ours.error and not theirs.error:
        for word, trio in sets[case.on].items():
            if word not in case.without:
                tensor = places[case.on][word]
                terms = [
                    t for model, t in zip(MODELS, trio, strict=True) if model in {*case.models, case.base}
                ]
                found[word] = tolerance.judge(
                    ours.tensors[tensor].float(), theirs.tensors[tensor].float(), terms
                )
    worst = max(found, key=lambda word: found[word], default="")
    judged(
        operator=method,
        case=name,
        tolerance=tolerance.says,
        worst=f"{found[worst]:.3g} ({worst})" if found else ours.error or theirs.error,
        passed=bool(found) and found[worst] <= tolerance.most,
        note="; ".join(
            f"without {', '.join(word for word in case.without if case.without[word] == why)}: {why}"
            for why in dict.fromkeys(case.without.values())
        ),
    )


def test_every_operator_is_held_against_mergekit() -> None:
    by_chance = {"dare_linear", "dare_ties", "della", "della_linear"}
    assert CASES.keys() == METHODS.keys()
    assert {m for m in CASES if len(CASES[m]) == 1 and "density 1" in CASES[m]} == by_chance


@pytest.fixture(scope="module")
def wild(draw: Draw, named, llama, both):  # type: ignore[no-untyped-def]
    """For each operator: what both tools make of models with infinities, by the word for the tensor."""
    names, recipes = named(["bell", "infinity"]), {}
    base, math, code = (draw(f"{model} wild", 6, 5) for model in MODELS)
    math[2, 3] = torch.inf
    plain = {name: torch.ones(2, 2) for name in names.values()}
    models = llama(
        {
            model: plain | {names["infinity"]: tensor}
            for model, tensor in zip(MODELS, (base, math, code), strict=True)
        }
    )
    for method, cases in CASES.items():
        text = next(iter(cases.values())).recipe(method, models)
        recipes[method] = (text, text)
    return both(recipes), names["infinity"]


@pytest.mark.parametrize("method", CASES)
def test_infinity_is_refused_by_name_where_mergekit_writes_it(method: str, wild, judged) -> None:  # type: ignore[no-untyped-def]
    made, tensor = wild
    ours, theirs = made[method]
    wrote = (
        theirs.error or f"mergekit writes {(~theirs.tensors[tensor].isfinite()).sum()} that are not finite"
    )
    judged(
        operator=method,
        case="infinity in one model",
        tolerance="refused, and the tensor named",
        worst=wrote if ours.error else "was written",
        passed=tensor in ours.error
        and "infinity" in ours.error
        and not wrote.startswith("mergekit writes 0"),
    )
