"""The formulas, against their definitions in float64, and the bits, over chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.errors import Unmergeable
from merge_core.operators import METHODS
from merge_core.operators.base import Parameters, single
from merge_core.operators.reductions import block_dots
from merge_core.operators.slerp import factors
from merge_core.operators.testing import trial
from merge_core.operators.trimming import kept

Array = np.ndarray[Any, np.dtype[np.float64]]


def merged(name: str, tensors: list[torch.Tensor], parameters: Parameters, chunk: int = 4096) -> torch.Tensor:
    """The output, by formula and kernel."""
    return torch.from_numpy(trial(METHODS[name], [t.numpy() for t in tensors], parameters, chunk=chunk))


def ties_by_definition(base: Array, experts: list[Array], p: Parameters) -> Array:
    """mergekit's: stable argsort for the k largest, sign of the sum, mean of those that agree."""
    deltas = []
    for expert, weight, density in zip(experts, p["weight"], p["density"], strict=True):  # type: ignore[arg-type]
        delta = (expert.astype(np.float32) - base.astype(np.float32)).astype(np.float64)
        mask = np.zeros(delta.shape)
        mask[np.argsort(-np.abs(delta), kind="stable")[: kept(density, delta.size)]] = 1
        deltas.append(delta * mask * weight)
    stacked, weights = np.stack(deltas), np.array(p["weight"])[:, None]
    agree = np.sign(stacked) == np.where(stacked.sum(axis=0) >= 0, 1, -1)
    mixed = (stacked * agree).sum(axis=0)
    if p["normalize"]:
        divisor = (weights * agree).sum(axis=0)
        mixed = mixed / np.where(divisor == 0, 1, divisor)
    result: Array = base + p["lambda"] * mixed  # type: ignore[operator]
    return result


def by_definition(name: str, inputs: list[Array], p: Parameters) -> Array:
    base, *experts = inputs
    weights: Any = p.get("weight")
    if name == "linear":
        total = sum(w * x for w, x in zip(weights, inputs, strict=True))
        return np.asarray(total / sum(weights) if p["normalize"] else total)
    if name == "task_arithmetic":
        delta = sum(w * (x - base) for w, x in zip(weights, experts, strict=True))
        delta = delta / sum(weights) if p["normalize"] else delta
        return np.asarray(base + p["lambda"] * delta)
    if name == "ties":
        return ties_by_definition(base, experts, p)
    t: Any = p["t"]
    a, b = base, experts[0]
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return np.asarray((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle))


CASES: dict[str, tuple[str, int, Parameters]] = {
    "linear": ("linear", 3, {"weight": (0.5, 0.3, 0.2), "normalize": True}),
    "linear, not normalised": ("linear", 2, {"weight": (0.7, 0.9), "normalize": False}),
    "slerp": ("slerp", 2, {"t": 0.3}),
    "task arithmetic": (
        "task_arithmetic",
        4,
        {"weight": (1.0, 0.5, -0.25), "lambda": 0.8, "normalize": False},
    ),
    "task arithmetic, normalised": (
        "task_arithmetic",
        3,
        {"weight": (1.0, 0.5), "lambda": 1.0, "normalize": True},
    ),
    "ties": ("ties", 3, {"weight": (1.0, 0.5), "density": (0.2, 0.6), "lambda": 1.0, "normalize": True}),
    "ties, summed": (
        "ties",
        4,
        {"weight": (1.0, 0.5, 0.7), "density": (0.5,) * 3, "lambda": 0.7, "normalize": False},
    ),
}


def bf16_ulp(values: Array) -> Array:
    """The distance of neighbouring bf16 numbers at each magnitude."""
    _, exponent = np.frexp(np.maximum(np.abs(values), 2.0**-126))
    return np.ldexp(1.0, exponent - 8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 15, 4096, 10_007])
def test_every_operator_is_within_one_bf16_ulp_of_its_definition(
    case: str, size: int, weights: Callable[..., torch.Tensor]
) -> None:
    name, count, parameters = CASES[case]
    tensors = [weights(f"{case} {i}", size) for i in range(count)]
    inputs = [t.numpy().astype(np.float64) for t in tensors]
    expected = by_definition(name, inputs, parameters)
    result = merged(name, tensors, parameters).to(torch.bfloat16).to(torch.float64).numpy()
    largest = np.max(np.abs([*inputs, expected]), axis=0)
    assert np.all(np.abs(result - expected) <= bf16_ulp(largest))
    assert size == 1 or not np.array_equal(result, inputs[0])


@pytest.mark.parametrize("case", CASES)
def test_chunks_do_not_show_in_the_bits(case: str, weights: Callable[..., torch.Tensor]) -> None:
    name, count, parameters = CASES[case]
    # bf16 inputs tie at the threshold of TIES, so that the rule for ties is at work.
    tensors = [weights(f"chunks {i}", 50_021, dtype=torch.bfloat16).float() for i in range(count)]
    results = [merged(name, tensors, parameters, chunk).numpy().tobytes() for chunk in (4096, 12_288, 65_536)]
    assert results[0] == results[1] == results[2]


@given(
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=80),
    density=st.floats(0.01, 1.0),
    chunk=st.sampled_from([7, 16, 100]),
)
@settings(max_examples=150, deadline=None)
def test_ties_keeps_exactly_k_and_the_lowest_indices_among_equals(
    values: list[int], density: float, chunk: int
) -> None:
    expert = torch.tensor(values, dtype=torch.float32)
    parameters: Parameters = {"weight": (1.0,), "density": (density,), "lambda": 1.0, "normalize": True}
    result = merged("ties", [torch.zeros_like(expert), expert], parameters, chunk)
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[: kept(density, len(values))]
    assert result.tolist() == [float(v) if i in order else 0.0 for i, v in enumerate(values)]


def test_ties_elects_plus_when_the_experts_cancel() -> None:
    tensors = [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])]
    parameters: Parameters = {"weight": (1.0, 1.0), "density": (1.0, 1.0), "lambda": 1.0, "normalize": True}
    assert merged("ties", tensors, parameters).tolist() == [1.0, 0.0]


def test_identical_models_stay_as_they_are(weights: Callable[..., torch.Tensor]) -> None:
    model = weights("same", 5000)
    equal: Parameters = {"weight": (1.0, 1.0), "normalize": True}
    assert torch.equal(merged("linear", [model] * 2, equal), model)
    assert torch.equal(merged("ties", [model] * 3, CASES["ties"][2]), model)
    assert torch.allclose(merged("slerp", [model] * 2, {"t": 0.3}), model, rtol=2e-7, atol=0)


@pytest.mark.parametrize(("t", "index"), [(0.0, 0), (1.0, 1)])
def test_slerp_at_its_ends_is_an_input_to_the_bit(
    t: float, index: int, weights: Callable[..., torch.Tensor]
) -> None:
    tensors = [weights("end a", 9000), weights("end b", 9000)]
    assert torch.equal(merged("slerp", tensors, {"t": t}), tensors[index])


@pytest.mark.parametrize(
    ("dot", "a", "b", "expected"),
    [
        (1.0, 1.0, 1.0, (0.75, 0.25)),
        (-1.0, 1.0, 1.0, (0.75, 0.25)),
        (0.0, 0.0, 0.0, (math.sin(0.375 * math.pi), math.sin(0.125 * math.pi))),
        (0.0, 2.0, 3.0, (math.sin(0.375 * math.pi), math.sin(0.125 * math.pi))),
    ],
)
def test_slerp_falls_back_to_the_line_where_there_is_no_circle(
    dot: float, a: float, b: float, expected: tuple[float, float]
) -> None:
    assert factors(dot, a, b, 0.25) == tuple(map(single, expected))


def test_slerp_refuses_weights_that_are_not_finite() -> None:
    with pytest.raises(Unmergeable, match="NaN or infinity"):
        merged("slerp", [torch.tensor([1.0, math.nan]), torch.ones(2)], {"t": 0.5})


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9000))
@settings(max_examples=25, deadline=None)
def test_block_dots_are_inner_products(values: list[float]) -> None:
    x = np.array(values, np.float32)
    sums = block_dots(x, np.ones_like(x))
    assert len(sums) == -(-len(values) // 4096)
    assert math.isclose(math.fsum(sums), math.fsum(x.tolist()), rel_tol=1e-9, abs_tol=1e-7)


def test_a_block_is_folded_by_halves() -> None:
    values = np.zeros(4096 + 3, np.float32)
    values[[0, 1, 2048]] = [1e16, 1.0, -1e16]
    values[4096:] = [1e16, -1e16, 1.0]
    # Any other tree loses the 1 in the first block; in the second it has a neighbour that swallows it.
    assert block_dots(values, np.ones_like(values)) == [1.0, 0.0]


def test_weights_meet_tensors_as_float32() -> None:
    assert single(0.1) == float(np.float32(0.1)) != 0.1
    assert single(1e300) == math.inf
