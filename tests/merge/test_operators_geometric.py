"""nuslerp, karcher, model_stock, nearswap, ram: by hand, by definition in float64, and to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.errors import Unmergeable
from merge_core.operators import METHODS, find, names
from merge_core.operators.base import Array, Parameters, Traced
from merge_core.operators.karcher import mean_on_sphere
from merge_core.operators.testing import Held, computed, trial

Wide = np.ndarray[Any, np.dtype[np.float64]]


def merged(name: str, inputs: Sequence[Sequence[float] | Array], p: Parameters, chunk: int = 4096) -> Array:
    """The output, by formula and kernel."""
    return trial(find(name), [np.asarray(i, np.float32) for i in inputs], p, chunk=chunk)


SETTINGS: dict[str, Parameters] = {
    "nuslerp": {"weight": (1.0, 0.5)},
    "nuslerp_deltas": {"weight": (0.25, 1.0)},
    "karcher": {"max_iter": 10.0, "tol": 1e-5},
    "model_stock": {},
    "nearswap": {"t": 0.002},
    "ram": {"epsilon": 1e-3},
    "ramplus_tl": {"r": 0.4, "alpha": 0.8, "epsilon": 1e-3},
    "passthrough": {"scale": (0.7,)},
}
COUNTS = {"nuslerp": 2, "nuslerp_deltas": 3, "nearswap": 2, "passthrough": 1}
OPERATORS = list(SETTINGS)


# -- by hand ---------------------------------------------------------------------------------------------

HALF = math.sqrt(0.5)
BY_HAND: dict[str, tuple[str, list[list[float]], Parameters, list[float]]] = {
    "nuslerp, half way": ("nuslerp", [[2, 0], [0, 2]], {"weight": (1.0, 1.0)}, [2 * HALF, 2 * HALF]),
    "nuslerp, by weight": (
        "nuslerp",
        [[1, 0], [0, 1]],
        {"weight": (2.0, 1.0)},
        [math.sin(math.pi / 3), math.sin(math.pi / 6)],
    ),
    "nuslerp, weights that cancel": ("nuslerp", [[1, 0], [0, 1]], {"weight": (3.0, -3.0)}, [HALF, HALF]),
    "nuslerp, one line": ("nuslerp", [[1, 1], [3, 3]], {"weight": (3.0, 1.0)}, [1.5, 1.5]),
    "nuslerp, opposite": ("nuslerp", [[1, 1], [-3, -3]], {"weight": (3.0, 1.0)}, [0, 0]),
    "nuslerp, one is zero": ("nuslerp", [[0, 0], [0, 1]], {"weight": (1.0, 1.0)}, [0, HALF]),
    "nuslerp, all zero": ("nuslerp", [[0, 0], [0, 0]], {"weight": (1.0, 1.0)}, [0, 0]),
    "nuslerp over a base": (
        "nuslerp_deltas",
        [[1, 1], [3, 1], [1, 3]],
        {"weight": (1.0, 1.0)},
        [1 + 2 * HALF, 1 + 2 * HALF],
    ),
    "karcher of one": ("karcher", [[2e-6, -4e-6]], SETTINGS["karcher"], [2e-6, -4e-6]),
    "karcher of two": ("karcher", [[1, 0], [0, 3]], SETTINGS["karcher"], [2 * HALF, 2 * HALF]),
    "karcher of three": (
        "karcher",
        [[3, 0, 0], [0, 3, 0], [0, 0, 3]],
        SETTINGS["karcher"],
        [math.sqrt(3)] * 3,
    ),
    "karcher on a circle": (  # of angles 0°, 0° and 90° the mean is 30°
        "karcher",
        [[1, 0], [1, 0], [0, 1]],
        {"max_iter": 100.0, "tol": 1e-9},
        [math.cos(math.pi / 6), 0.5],
    ),
    "karcher without iterations": (
        "karcher",
        [[1, 0], [1, 0], [0, 1]],
        {"max_iter": 0.0, "tol": 1e-9},
        [2 / math.sqrt(5), 1 / math.sqrt(5)],
    ),
    "karcher of opposites": ("karcher", [[1, 0], [-3, 0]], {"max_iter": 50.0, "tol": 0.0}, [2, 0]),
    "karcher, one is zero": ("karcher", [[0, 0], [3, 4]], SETTINGS["karcher"], [1.5, 2]),
    "karcher, all zero": ("karcher", [[0, 0], [0, 0]], SETTINGS["karcher"], [0, 0]),
    "model_stock at a right angle": ("model_stock", [[1, 1], [3, 1], [1, 3]], {}, [1, 1]),
    "model_stock of equals": ("model_stock", [[1, 1], [3, 2], [3, 2]], {}, [3, 2]),
    "model_stock at 60°": (  # t = 2·½ / (1 + ½)
        "model_stock",
        [[0, 0], [2, 0], [1, math.sqrt(3)]],
        {},
        [1, math.sqrt(3) / 3],
    ),
    "model_stock of three at 60°": (  # t = 3·½ / (1 + 2·½)
        "model_stock",
        [[0, 0, 0], [0, 4, 4], [4, 0, 4], [4, 4, 0]],
        {},
        [2, 2, 2],
    ),
    "model_stock at 120°": (  # t = 2·(−½) / (1 − ½): the papers' t is not clamped, neither is mergekit's
        "model_stock",
        [[0, 0], [2, 0], [-1, math.sqrt(3)]],
        {},
        [-1, -math.sqrt(3)],
    ),
    "model_stock of next to nothing": (  # cos = 1e-8 / 1e-6 for experts so close to the base
        "model_stock",
        [[0, 0], [1e-4, 0], [1e-4, 0]],
        {},
        [0.02 / 1.01 * 1e-4, 0],
    ),
    "model_stock of opposites": ("model_stock", [[5, 5], [6, 6], [4, 4]], {}, [5, 5]),
    "nearswap": (
        "nearswap",
        [[1, 1, 1, 1, 1], [1, 1.25, 1.5, 0.75, 5]],
        {"t": 0.25},
        [1, 1.25, 1.25, 0.75, 1.25],
    ),
    "nearswap of nothing": ("nearswap", [[1, 2], [1.5, 7]], {"t": 0.0}, [1, 2]),
    "nearswap below nothing": ("nearswap", [[1, 2], [1.5, 7]], {"t": -1.0}, [1, 2]),
    "nearswap of all": ("nearswap", [[1, 2], [1.5, 7]], {"t": 100.0}, [1.5, 7]),
    "ram": (  # nobody, one, two, three; the last change is too small to count
        "ram",
        [[8, 8, 8, 8, 8], [8, 10, 10, 10, 8.5], [8, 8, 12, 12, 8], [8, 8, 8, 5, 10]],
        {"epsilon": 0.5},
        [8, 10, 11, 9, 10],
    ),
    "ram without a threshold": ("ram", [[0, 0], [-0.0, 2], [1, 4]], {"epsilon": 0.0}, [1, 3]),
    "ramplus_tl": (  # the first shares 1 and has 2 alone, the second shares 1 and has none: ρ = ½ and alpha
        "ramplus_tl",
        [[8, 8, 8, 8], [10, 10, 10, 8], [8, 8, 12, 8]],
        {"r": 0.5, "alpha": 0.75, "epsilon": 0.5},
        [10.5, 10.5, 11, 8],
    ),
    "ramplus_tl without a threshold": (
        "ramplus_tl",
        [[0, 0, 0], [1, 2, 4], [1, 0, 0]],
        {"r": 0.5, "alpha": 0.5, "epsilon": 0.0},
        [1, 2.5, 5],
    ),
    "ramplus_tl of one": (
        "ramplus_tl",
        [[1, 1], [2, 3]],
        {"r": 0.5, "alpha": 0.75, "epsilon": 0.0},
        [2, 3],
    ),
    "passthrough": ("passthrough", [[1.5, -0.0, 4]], {"scale": (1.0,)}, [1.5, -0.0, 4]),
    "passthrough, scaled": ("passthrough", [[1.5, -2, 4]], {"scale": (0.5,)}, [0.75, -1, 2]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_what_one_can_compute_by_hand(case: str) -> None:
    name, inputs, parameters, expected = BY_HAND[case]
    assert np.allclose(merged(name, inputs, parameters), expected, rtol=3e-7, atol=1e-9)


# -- by definition ---------------------------------------------------------------------------------------


def drawn(words: str, size: int, count: int, weights: Callable[..., Any], *, near: bool) -> list[Array]:
    """A base and experts: near it, as fine-tuned models are, or each with a direction of its own."""
    base = weights(f"{words} base", size).numpy()
    others = [weights(f"{words} {i}", size).numpy() for i in range(1, count)]
    return [base, *((base + np.float32(0.125) * other) if near else other for other in others)]


def circle(a: Wide, b: Wide, t: float) -> Wide:
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    if abs(cosine) == 1:
        return np.asarray((1 - t) * a + t * b)
    angle = np.arccos(cosine)
    return np.asarray((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle))


def karcher(models: Sequence[Wide], rounds: int, tol: float) -> Wide:
    """On the vectors themselves, by exp and log."""
    norms = [np.linalg.norm(m) for m in models]
    units = [m / norm for m, norm in zip(models, norms, strict=True)]
    mean = np.mean(units, axis=0)
    mean /= np.linalg.norm(mean)
    for _ in range(rounds):
        tangent = np.zeros_like(mean)
        for unit in units:
            angle = np.arccos(np.clip(unit @ mean, -1, 1))
            if angle > 1e-7:
                tangent += angle / np.sin(angle) * (unit - (unit @ mean) * mean) / len(units)
        step = np.linalg.norm(tangent)
        if step < tol:
            break
        mean = np.cos(step) * mean + np.sin(step) * tangent / step
    return np.asarray(np.mean(norms) * mean)


def model_stock(base: Wide, experts: Sequence[Wide]) -> Wide:
    pairs = combinations([e - base for e in experts], 2)
    cosine = np.mean([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs])
    t = len(experts) * cosine / (1 + (len(experts) - 1) * cosine)
    return np.asarray(t * np.mean(experts, axis=0) + (1 - t) * base)


def reinforced(base: Wide, experts: Sequence[Wide], p: Parameters) -> Wide:
    deltas = np.stack(experts) - base
    changed = np.abs(deltas) > p["epsilon"]
    count = changed.sum(axis=0)
    alone, together = changed & (count == 1), changed & (count > 1)
    factors = np.ones(len(experts))
    if "r" in p:
        ratio = together.sum(axis=1) / np.maximum(alone.sum(axis=1), p["epsilon"])
        factors = 1 + p["r"] * np.clip(ratio, 0, p["alpha"])
    kept = deltas * alone * factors[:, None] + deltas * together / np.maximum(count, 1)
    return np.asarray(base + kept.sum(axis=0))


def by_definition(name: str, inputs: Sequence[Array], p: Any) -> Wide:
    base, *experts = wide = [i.astype(np.float64) for i in inputs]
    if name == "nuslerp":
        return circle(*wide, t=p["weight"][1] / sum(p["weight"]))
    if name == "nuslerp_deltas":
        first, second = experts
        return base + circle(first - base, second - base, t=p["weight"][1] / sum(p["weight"]))
    if name == "karcher":
        return karcher(wide, int(p["max_iter"]), p["tol"])
    if name == "model_stock":
        return model_stock(base, experts)
    if name == "nearswap":
        weight = np.clip(p["t"] / np.maximum(np.abs(experts[0] - base), 1e-6), 0, 1)
        return weight * experts[0] + (1 - weight) * base
    if name == "passthrough":
        return base * p["scale"][0]
    return reinforced(base, experts, p)


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("size", [2, 15, 4096, 10_007])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_its_definition(
    name: str, size: int, near: bool, weights: Callable[..., Any]
) -> None:
    inputs = drawn(f"{name} {size}", size, COUNTS.get(name, 4), weights, near=near)
    expected = by_definition(name, inputs, SETTINGS[name])
    scale = np.max(np.abs(inputs))
    assert np.allclose(merged(name, inputs, SETTINGS[name]), expected, rtol=1e-6, atol=1e-6 * scale)


def test_a_mean_on_the_sphere_is_where_the_ways_to_all_points_cancel(weights: Callable[..., Any]) -> None:
    units = [
        u / np.linalg.norm(u) for u in (weights(f"sphere {i}", 50).numpy().astype(float) for i in range(5))
    ]
    cosines = [[float(a @ b) for b in units] for a in units]
    mean = sum(c * u for c, u in zip(mean_on_sphere(cosines, 200, 1e-11), units, strict=True))
    assert math.isclose(float(np.linalg.norm(mean)), 1.0, rel_tol=1e-12)
    angles = [math.acos(float(mean @ u)) for u in units]
    ways = [a / math.sin(a) * (u - (u @ mean) * mean) for a, u in zip(angles, units, strict=True)]
    assert float(np.linalg.norm(sum(ways))) < 1e-9 < min(angles)


# -- the bits --------------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -3e-42, 1.1754944e-38, 3.4e38, -3.4e38, 1e-6, 1.0]
ANY_FLOAT = st.one_of(
    st.floats(width=32), st.sampled_from(SPECIAL), st.floats(-0.0078125, 0.0078125, width=32)
)
TRACED: dict[str, Callable[[int], Traced]] = {
    "nuslerp": lambda experts: {"factors": (0.3, -1.7)},
    "nuslerp_deltas": lambda experts: {"factors": (0.3, 1.0)},
    "karcher": lambda experts: {"factors": tuple(0.1 * i - 0.3 for i in range(experts))},
    "model_stock": lambda experts: {"t": (0.37,)},
    "ramplus_tl": lambda experts: {"shared": tuple(range(experts)), "unique": (2,) * experts},
}


@pytest.mark.parametrize("name", OPERATORS)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_the_kernel_has_the_bits_of_the_formula_whatever_it_is_given(name: str, data: st.DataObject) -> None:
    count, size = COUNTS.get(name) or data.draw(st.integers(3, 5)), data.draw(st.integers(0, 40))
    rows = [data.draw(st.lists(ANY_FLOAT, min_size=size, max_size=size)) for _ in range(count)]
    traced = TRACED.get(name, lambda experts: {})(count - find(name).needs_base)
    computed(Held(find(name), [np.array(row, np.float32) for row in rows]), SETTINGS[name], traced)


@pytest.mark.parametrize("name", OPERATORS)
def test_chunks_do_not_show_in_the_bits(name: str, weights: Callable[..., Any]) -> None:
    inputs = drawn(f"chunks {name}", 50_021, COUNTS.get(name, 4), weights, near=True)
    results = [merged(name, inputs, SETTINGS[name], chunk) for chunk in (4096, 12_288, 65_536)]
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_tensor_may_be_as_small_as_it_likes(name: str, size: int) -> None:
    inputs = [np.full(size, 0.5 + i, np.float32) for i in range(COUNTS.get(name, 3))]
    result = merged(name, inputs, SETTINGS[name])
    assert result.shape == (size,) and np.isfinite(result).all()


# -- laws ------------------------------------------------------------------------------------------------

MODEL = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=60)


@pytest.mark.parametrize("name", [n for n in OPERATORS if n != "passthrough"])
@given(values=MODEL)
@settings(max_examples=60, deadline=None)
def test_a_model_merged_with_itself_is_that_model(name: str, values: list[float]) -> None:
    model = np.array(values, np.float32)
    if name in ("nuslerp", "karcher") and np.linalg.norm(model.astype(float)) < 2e-5:
        model = model + np.float32(1.0)  # mergekit knows no direction of what is shorter
    result = merged(name, [model] * COUNTS.get(name, 4), SETTINGS[name])
    if name in ("nuslerp_deltas", "model_stock", "ram", "ramplus_tl"):
        assert np.array_equal(result, model)
    assert np.allclose(result, model, rtol=4e-7, atol=1e-44)


def test_two_equal_models_stay_as_they_are_to_the_bit(weights: Callable[..., Any]) -> None:
    model = weights("same", 5000).numpy()
    assert np.array_equal(merged("karcher", [model] * 2, SETTINGS["karcher"]), model)
    assert np.array_equal(merged("nuslerp", [model] * 2, {"weight": (1.0, 1.0)}), model)
    assert np.array_equal(merged("model_stock", [model * 0, model, model], {}), model)


@pytest.mark.parametrize("name", ["karcher", "model_stock", "ram"])
@given(
    rows=st.integers(1, 40).flatmap(
        lambda n: st.tuples(*[st.lists(st.integers(-9, 9), min_size=n, max_size=n)] * 4)
    )
)
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_experts_does_not_matter(name: str, rows: tuple[list[int], ...]) -> None:
    base = np.float32([7.5, 0.25] * 20)[: len(rows[0])]
    experts = [base + np.array(row, np.float32) / np.float32(8) for row in rows[:3]]
    orders = [merged(name, [base, *order], SETTINGS[name]) for order in permutations(experts)]
    for result in orders[1:]:
        assert np.allclose(result, orders[0], rtol=2e-6, atol=2e-5)


def test_nuslerp_is_the_same_from_either_side(weights: Callable[..., Any]) -> None:
    base, a, b = drawn("sides", 9000, 3, weights, near=True)
    there = merged("nuslerp_deltas", [base, a, b], {"weight": (0.2, 0.5)})
    back = merged("nuslerp_deltas", [base, b, a], {"weight": (0.5, 0.2)})
    assert np.allclose(there, back, rtol=4e-7, atol=1e-8) and not np.allclose(there, base, rtol=1e-2)


@pytest.mark.parametrize(("weight", "index"), [((1.0, 0.0), 0), ((0.0, 1.0), 1), ((0.0, 0.25), 1)])
def test_weights_one_and_zero_give_an_input_to_the_bit(
    weight: tuple[float, float], index: int, weights: Callable[..., Any]
) -> None:
    base, *models = drawn("ends", 9000, 3, weights, near=False)
    assert np.array_equal(merged("nuslerp", models, {"weight": weight}), models[index])
    over = merged("nuslerp_deltas", [base, *models], {"weight": weight})
    assert np.array_equal(over, base + (models[index] - base))


@given(
    apart=st.floats(-7, -3), weight=st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)), opposite=st.booleans()
)
@settings(max_examples=200, deadline=None)
def test_nuslerp_stays_between_its_ends_near_a_line_too(
    apart: float, weight: tuple[float, float], opposite: bool
) -> None:
    a = np.array([1.0, 0.5, -0.25, 0.0], np.float32)
    b = a + np.array([0, 0, 0, 10**apart], np.float32)
    result = merged("nuslerp", [a, -b if opposite else b], {"weight": weight})
    assert np.linalg.norm(result) <= 1.003 * np.linalg.norm(b)


@pytest.mark.parametrize("draw", range(8))
def test_karcher_takes_the_first_of_two_opposites(draw: int, weights: Callable[..., Any]) -> None:
    model = weights(f"opposites {draw}", 301).numpy()
    result = merged("karcher", [model, np.float32(-3) * model], {"max_iter": 9.0, "tol": 1e-9})
    assert np.allclose(result, 2 * model, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["nuslerp", "nuslerp_deltas", "karcher", "model_stock"])
@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_angles_of_weights_that_are_not_finite_are_refused(name: str, damage: float) -> None:
    inputs = [np.ones(5, np.float32) for _ in range(COUNTS.get(name, 3))]
    inputs[-1][3] = damage
    with pytest.raises(Unmergeable, match="NaN or infinity"):
        merged(name, inputs, SETTINGS[name])


@pytest.mark.parametrize("name", ["nearswap", "ram", "ramplus_tl", "passthrough"])
@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
def test_damage_in_any_input_shows_in_the_output(name: str, damage: float) -> None:
    for damaged in range(COUNTS.get(name, 4)):
        inputs = [np.ones(5, np.float32) for _ in range(COUNTS.get(name, 4))]
        inputs[damaged][3] = damage
        assert [*np.isfinite(merged(name, inputs, SETTINGS[name]))] == [True, True, True, False, True]


# -- what is declared ------------------------------------------------------------------------------------


def test_nuslerp_over_a_base_is_known_to_plans_but_is_no_merge_method() -> None:
    over_base = METHODS["nuslerp"].over_base
    assert over_base is not None and find("nuslerp_deltas") is over_base and over_base.needs_base
    assert "nuslerp_deltas" not in names() and "nuslerp" in names()
    assert over_base.parameters == METHODS["nuslerp"].parameters
