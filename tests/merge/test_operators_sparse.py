"""dare, della, breadcrumbs, sce and what they share: by hand, by definition in float64, and to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.checkpoint.source import TensorInfo
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.execute import audit, run
from merge_core.memory import CHUNK_ELEMENTS
from merge_core.operators import convert, find, fused, kernels
from merge_core.operators.base import Array, Chunk, Order, Parameters, Stored
from merge_core.operators.breadcrumbs import counts
from merge_core.operators.chance import draws, halves, limit, philox
from merge_core.operators.della import limits
from merge_core.operators.task_arithmetic import TASK_ARITHMETIC
from merge_core.operators.testing import Held, computed, same_bits, trial
from merge_core.operators.trimming import NOTHING, Cut, DeltaMagnitudes, cut_at, cuts, trace_cuts, uppers
from merge_core.recipe import parse
from merge_core.resolve import ModelHeader, check
from merge_core.trace import Trace

Wide = np.ndarray[Any, np.dtype[np.float64]]

KEYS = (0x0123456789ABCDEF, 0xFEDCBA9876543210, 2**64 - 1, 0)
CHANCE = ("dare_linear", "dare_ties", "della", "della_linear")
TRIMMED = ("ties", "breadcrumbs", "breadcrumbs_ties")
VECTORS = (*CHANCE, *TRIMMED, "task_arithmetic")
OPERATORS = (*VECTORS, "sce")


def complete(name: str, experts: int, given: Parameters) -> Parameters:
    """The parameters of an operator: those given, one value standing for every expert, and the defaults."""
    chosen = {"weight": 1.0} | given
    return {
        p.name: value
        if isinstance(value := chosen.get(p.name, p.default), tuple) or not p.each
        else (float(value),) * experts  # type: ignore[arg-type]
        for p in find(name).parameters
    }


def merged(
    name: str,
    inputs: Sequence[Sequence[float] | Array],
    *,
    chunk: int = 4096,
    row: int | None = None,
    **parameters: Any,
) -> Array:
    """The output, by formula and kernel, for parameters as `complete` takes them."""
    arrays = [np.asarray(i, np.float32) for i in inputs]
    resolved = complete(name, len(arrays) - 1, parameters)
    return trial(find(name), arrays, resolved, chunk=chunk, row=row, keys=KEYS)


def trio(weights: Callable[..., torch.Tensor], length: int, experts: int = 2) -> list[Array]:
    """A base and experts close to it, in bfloat16, so that many magnitudes are equal."""
    base = weights("base", length).numpy()
    close = [base + weights(f"expert {i}", length).numpy() / np.float32(16) for i in range(experts)]
    return [torch.from_numpy(a).to(torch.bfloat16).float().numpy() for a in (base, *close)]


# -- chance ----------------------------------------------------------------------------------------------


# kat_vectors of Random123 1.14: philox4x32 10, counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_its_published_answers(counter: str, key: str, expected: str) -> None:
    low, high = words(key)
    result = philox(tuple(torch.tensor([word]) for word in words(counter)), (low, high))
    assert [int(word) for word in result] == words(expected)


def test_the_kernel_of_philox_gives_the_answer_that_it_can_be_asked_for() -> None:
    out = np.empty(4, np.uint32)
    kernels.philox(np.uint32(0), np.uint32(0), 0, out)
    assert out.tolist() == words(KNOWN[0][2])


@given(
    key=st.integers(0, 2**64 - 1),
    start=st.one_of(st.integers(0, 100), st.integers(2**34 - 50, 2**34 + 50), st.integers(0, 2**45)),
    length=st.integers(0, 30),
)
@settings(max_examples=200, deadline=None)
def test_the_kernel_of_philox_is_the_formula(key: int, start: int, length: int) -> None:
    low, high = map(np.uint32, halves(key))
    out = np.empty((start % 4 + length + 3) // 4 * 4, np.uint32)
    kernels.philox(low, high, start // 4, out)
    assert draws(key, torch.empty(length), start).tolist() == out[start % 4 :][:length].tolist()


def test_a_draw_depends_on_key_and_index_alone() -> None:
    whole = draws(5, torch.empty(100), 0)
    assert torch.equal(whole[37:61], draws(5, torch.empty(24), 37))
    assert not torch.equal(whole, draws(5 + 2**32, torch.empty(100), 0))
    assert not torch.equal(whole, draws(6, torch.empty(100), 0))


@pytest.mark.parametrize(
    ("probability", "expected"),
    [
        (0.0, 0),
        (2.0**-33, 0),
        (2.0**-32, 1),
        (0.5, 2**31),
        (1 - 2.0**-53, 2**32 - 1),
        (1.0, 2**32),
        (1.5, 2**32),
    ],
)
def test_a_probability_becomes_a_whole_number_of_draws(probability: float, expected: int) -> None:
    assert limit(probability) == expected


# -- dropping --------------------------------------------------------------------------------------------


def drops(kept: int, total: int, probability: float) -> float:
    """How many standard deviations of the binomial `kept` is away from what a probability promises."""
    return abs(kept - total * probability) / math.sqrt(total * probability * (1 - probability))


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_as_many_are_kept_as_the_density_says_and_the_mean_stays(name: str, density: float) -> None:
    size, delta = 400_000, np.float32(0.5)
    epsilon = min(0.15, density / 2, (1 - density) / 2)
    extra = {"epsilon": epsilon} if name.startswith("della") else {}
    inputs = [np.zeros(size, np.float32), np.full(size, delta)]
    result = merged(name, inputs, row=1000, chunk=8192, density=density, **extra).astype(np.float64)
    assert drops(np.count_nonzero(result), size, density) < 5
    # One element has the mean δ and the variance δ²(1−p)/p; p is never below that of the smallest rank.
    least = density - extra.get("epsilon", 0.0)
    deviation = delta * math.sqrt((1 - least) / least / size)
    assert abs(result.mean() - delta) < 5 * deviation
    assert len({*result.tolist()}) == 2 if name == "dare_linear" else 900 < len({*result.tolist()}) <= 1001


def test_each_expert_draws_for_itself() -> None:
    inputs = [np.zeros(4000, np.float32), np.full(4000, np.float32(1)), np.full(4000, np.float32(100))]
    result = merged("dare_linear", inputs, density=0.5, rescale=False)
    _, frequencies = np.unique(result, return_counts=True)
    assert {*result.tolist()} == {0.0, 1.0, 100.0, 101.0}
    assert all(drops(int(n), 4000, 0.25) < 5 for n in frequencies)


def test_dare_keeps_what_draws_below_its_limit_and_divides_by_the_density() -> None:
    delta = np.arange(1, 21, dtype=np.float32)
    result = merged("dare_linear", [np.zeros(20, np.float32), delta], density=0.7, weight=0.5)
    drawn = draws(KEYS[0], torch.empty(20), 0).numpy()
    assert 0 < np.count_nonzero(result) < 20
    assert np.array_equal(result, np.where(drawn < limit(0.7), delta * np.float32(0.5 / 0.7), 0))


@pytest.mark.parametrize("name", CHANCE)
def test_a_draw_at_the_limit_is_dropped_and_one_below_is_kept(name: str) -> None:
    (draw,) = draws(KEYS[0], torch.empty(1), 0).tolist()
    given = {"rescale": False} | ({"epsilon": 0.0} if "della" in name else {})
    assert merged(name, [[0.0], [1.0]], density=draw / 2**32, **given).tolist() == [0.0]
    assert merged(name, [[0.0], [1.0]], density=(draw + 1) / 2**32, **given).tolist() == [1.0]


@pytest.mark.parametrize("rescale", [True, False])
def test_della_keeps_the_large_more_often_rank_by_rank(rescale: bool) -> None:
    row, rows, density, epsilon = 11, 40_000, 0.5, 0.3
    order = np.array([4, 0, 7, 10, 1, 9, 3, 2, 8, 6, 5])
    delta = np.tile((order + 1) * np.where(order % 2, -1.0, 1.0), rows).astype(np.float32)
    result = merged(
        "della_linear", [np.zeros_like(delta), delta], row=row, chunk=4096,
        density=density, epsilon=epsilon, rescale=rescale,
    )  # fmt: skip
    table = result.reshape(rows, row)
    for column, rank in enumerate(order):
        probability = (density - epsilon) + 2 * epsilon * rank / (row - 1)
        assert drops(np.count_nonzero(table[:, column]), rows, probability) < 5
        kept = {*table[:, column].tolist()} - {0.0}
        expected = delta[column] / (probability if rescale else 1.0)
        assert len(kept) == 1 and math.isclose(kept.pop(), expected, rel_tol=1e-6)


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=60),
    row=st.integers(1, 9),
    density=st.floats(0.2, 0.8),
    epsilon=st.floats(0.0, 0.19),
)
@settings(max_examples=100, deadline=None)
def test_della_ranks_equal_magnitudes_by_index(
    values: list[int], row: int, density: float, epsilon: float
) -> None:
    values = values * row
    result = merged(
        "della_linear",
        [[0.0] * len(values), values],
        row=row,
        density=density,
        epsilon=epsilon,
        rescale=False,
    )
    drawn = draws(KEYS[0], torch.empty(len(values)), 0).tolist()
    below = [limit(density)] if row == 1 else limits(row, density, epsilon).tolist()
    expected = []
    for at in range(0, len(values), row):
        order = sorted(range(at, at + row), key=lambda i: (abs(values[i]), i))
        expected += [values[i] if drawn[i] < below[order.index(i)] else 0 for i in range(at, at + row)]
    assert result.tolist() == expected


def test_the_limits_of_della_are_a_straight_line_in_whole_numbers() -> None:
    assert limits(3, 0.5, 0.25).tolist() == [2**30, 2**31, 3 * 2**30]
    assert limits(1, 0.5, 0.25).tolist() == [2**31]
    assert limits(2, 0.1, 0.5).tolist() == [0, limit(0.6)]
    assert limits(2, 0.9, 0.5).tolist() == [limit(0.4), 2**32 - 1]
    line = limits(10_000, 0.3, 0.1).astype(np.float64) / 2**32
    assert np.abs(line - np.linspace(0.2, 0.4, 10_000)).max() < 2.0**-31


@pytest.mark.parametrize(
    ("density", "epsilon", "fits"),
    [(0.5, 0.15, True), (0.9, 0.15, False), (0.15, 0.15, False), (1.0, 0.15, True), (0.0, 0.15, True)],
)
def test_probabilities_that_leave_their_range_are_a_problem_of_the_recipe(
    density: float, epsilon: float, fits: bool
) -> None:
    info = TensorInfo(dtype="F32", shape=(4, 4))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
    header = ModelHeader(tensors={"model.norm.weight": info}, config=config, files=())
    text = (
        "merge_method: della\nbase_model: a\n"
        f"models: [{{model: b, parameters: {{weight: 1, density: {density}, epsilon: {epsilon}}}}}]\n"
    )
    problems = check(parse(text), {"a": header, "b": header}).problems
    fault = f"density {density:g} ± epsilon {epsilon:g} must lie between 0 and 1 for model.norm.weight"
    assert problems == (() if fits else (fault,))


# -- trimming --------------------------------------------------------------------------------------------


@given(
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=80),
    density=st.floats(0.0, 1.0),
    gamma=st.floats(0.0, 1.0),
    chunk=st.sampled_from([7, 16, 100]),
)
@settings(max_examples=200, deadline=None)
def test_breadcrumbs_drops_the_largest_and_the_smallest(
    values: list[int], density: float, gamma: float, chunk: int
) -> None:
    inputs = [[0.0] * len(values), values]
    result = merged("breadcrumbs", inputs, chunk=chunk, density=density, gamma=gamma)
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), -i))
    target, top = int(density * len(values)), int(gamma * len(values))
    bottom = max(0, len(values) - target - top)
    keep = order[bottom : bottom + target]
    assert result.tolist() == [float(v) if i in keep else 0.0 for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("density", "gamma", "expected"),
    [
        (0.5, 0.1, (10, 60)),
        (0.95, 0.1, (5, 100)),
        (1.0, 0.1, (0, 100)),
        (0.0, 0.1, (10, 10)),
        (0.9, 0.0, (0, 90)),
    ],
)
def test_fewer_outliers_go_where_the_density_would_not_be_reached(
    density: float, gamma: float, expected: tuple[int, int]
) -> None:
    assert counts(density, gamma, 100) == expected


def test_the_trace_of_breadcrumbs_holds_both_thresholds_and_the_last_tied_indices() -> None:
    expert = np.array([1, -4, 2, 2, 8, -2, 2, 4], np.float32)
    operator = find("breadcrumbs")
    stream = Held(operator, [np.zeros(8, np.float32), expert])
    assert operator.measure is not None
    traced = operator.measure(stream, complete("breadcrumbs", 1, {"density": 0.5, "gamma": 0.25}))
    bits = {value: int(np.float32(value).view(np.uint32)) for value in (2, 4)}
    # Of the two largest (8 and the first 4) none is kept; of the four equal 2 the first three are.
    assert traced == {
        "threshold": (bits[2],),
        "last": (5,),
        "outlier_threshold": (bits[4],),
        "outlier_last": (1,),
    }


def test_a_cut_is_counted_once_for_two_that_compare_the_same() -> None:
    stream = Held(find("ties"), [np.zeros(50, np.float32), np.arange(50, dtype=np.float32)])
    reads = 0
    magnitudes = DeltaMagnitudes(0)

    def counting(chunk: Chunk) -> tuple[Stored, Stored | None]:
        nonlocal reads
        reads += 1
        return magnitudes(chunk)

    found = cuts(stream, [counting, counting, counting, counting], [3, 10, 0, 50])
    assert [cut.within(stream.at(0, 50))[0] for cut in found] == [47, 40, math.inf, 0]
    assert found[2] is NOTHING
    assert reads == 2
    assert uppers(stream, [magnitudes])[magnitudes].zeros == 1


@pytest.mark.parametrize("chunk", [4096, 8192])
@pytest.mark.parametrize("bits", [3, 12, 24])
def test_a_cut_that_is_looked_up_is_the_one_that_is_counted(bits: int, chunk: int) -> None:
    random, orders, asked = np.random.default_rng(bits), dict[Hashable, Order](), 0

    def keep_all(by: Hashable, length: int, make: Callable[[], Order]) -> Order:
        nonlocal asked
        asked += 1
        assert length == 9000
        return orders[by] if by in orders else orders.setdefault(by, make())

    arrays = [random.integers(-(1 << bits), 1 << bits, 9000).astype(np.float32) for _ in range(3)]
    arrays[2][:4000] = arrays[0][:4000]
    counting = Held(find("ties"), arrays, chunk=chunk)
    looking = Held(find("ties"), arrays, chunk=chunk, orders=keep_all)
    both = [DeltaMagnitudes(0), DeltaMagnitudes(1)]
    for keep in ([1, 8999], [17, 4999], [4500, 5001], [8999, 1], [0, 9000], [9000, 100]):
        assert cuts(looking, both, keep) == cuts(counting, both, keep)
    assert (asked, len(orders)) == (9, 2)
    nothing = Held(find("ties"), arrays, chunk=chunk, orders=lambda by, length, make: None)
    assert cuts(nothing, both, [17, 4999]) == cuts(counting, both, [17, 4999])


def test_the_sign_of_a_nan_is_not_counted() -> None:
    values = np.array([0xFFC00001, 0x7FC00001, 0x00000000, 0xFF800000], np.uint32).view(np.float32)
    counted, lower = np.zeros(1 << 15, np.int32), np.zeros(1 << 16, np.int32)
    assert kernels.count_upper(values, None, counted) == 1
    kernels.count_lower(values, None, np.uint32(0x7FC0), lower)
    assert {int(at): int(counted[at]) for at in np.flatnonzero(counted)} == {0: 1, 0x7F80: 1, 0x7FC0: 2}
    assert {int(at): int(lower[at]) for at in np.flatnonzero(lower)} == {1: 2}
    equal = np.zeros(4, bool)
    kernels.equal_to(values, None, np.float32(np.inf), equal)
    assert equal.tolist() == [False, False, False, True]


def test_a_trace_that_is_no_magnitude_is_refused() -> None:
    chunk = Held(find("ties"), [np.zeros(2, np.float32)] * 2).at(0, 2)
    for threshold in (-1, 1 << 31):
        with pytest.raises(CorruptCheckpoint, match="not the bits of a magnitude"):
            Cut(threshold, 0).within(chunk)
    assert cut_at(trace_cuts([Cut(1, 2), Cut(3, 4)], "x_"), 1, "x_") == Cut(3, 4)


# -- norms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "breadcrumbs", "ties"])
@pytest.mark.parametrize("row", [50_000, 1250, 625])
def test_the_l1_norm_is_restored_on_demand(name: str, row: int, weights: Callable[..., torch.Tensor]) -> None:
    base, *experts = trio(weights, 50_000, 1)
    flag = {"rescale_l1": True} if name in CHANCE else {"rescale": True}
    flag |= {"normalize": False}
    result = merged(name, [base, *experts], row=row, chunk=12_288, density=0.4, **flag)
    wide = [a.astype(np.float64) for a in (base, *experts, result)]
    before, after = np.abs(wide[1] - wide[0]).sum(), np.abs(wide[2] - wide[0]).sum()
    assert math.isclose(before, after, rel_tol=1e-5)
    assert 0 < np.count_nonzero(wide[2] - wide[0]) < 0.5 * 50_000


def test_a_norm_of_which_nothing_is_left_stays() -> None:
    inputs = [[1.0, 2.0], [2.0, 3.0]]
    assert merged("dare_linear", inputs, density=0.0, rescale_l1=True).tolist() == [1.0, 2.0]
    assert merged("ties", [[1.0], [1.0]], density=0.5, rescale=True).tolist() == [1.0]


def test_a_norm_that_is_not_finite_is_refused() -> None:
    with pytest.raises(Unmergeable, match="NaN or infinity"):
        merged("ties", [[1.0, 2.0], [math.nan, 3.0]], density=0.5, rescale=True)


# -- sce -------------------------------------------------------------------------------------------------


def sce_by_definition(inputs: Sequence[Wide], share: float) -> Wide:
    base, *experts = inputs
    deltas = np.stack([np.float32(e) - np.float32(base) for e in experts]).astype(np.float64)
    spread = deltas.var(axis=0)
    if share < 1:
        keep = int(np.count_nonzero(spread) * share)
        mask = np.zeros(base.shape)
        mask[np.argsort(-spread, kind="stable")[:keep]] = 1
        deltas = deltas * mask
    energy = (deltas**2).sum(axis=1)
    shares = energy / energy.sum() if energy.sum() else np.full(len(experts), 1 / len(experts))
    agree = np.sign(deltas) == np.where(deltas.sum(axis=0) >= 0, 1, -1)
    divisor = (shares[:, None] * agree).sum(axis=0)
    result: Wide = base + (deltas * shares[:, None] * agree).sum(axis=0) / np.where(divisor == 0, 1, divisor)
    return result


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 15, 10_007])
def test_sce_is_its_definition(
    share: float, experts: int, size: int, weights: Callable[..., torch.Tensor]
) -> None:
    base = weights("sce base", size).numpy()
    inputs = [base] + [base + weights(f"sce {i}", size).numpy() * np.float32(0.1 + i) for i in range(experts)]
    expected = sce_by_definition([i.astype(np.float64) for i in inputs], share)
    assert np.allclose(merged("sce", inputs, select_topk=share), expected, rtol=1e-5, atol=1e-8)


def test_sce_weighs_small_changes_by_their_energy_too() -> None:
    base = np.zeros(8, np.float32)
    small, large = np.full(8, np.float32(1e-6)), np.full(8, np.float32(3e-6))
    # The mean squares sum to 1e-11: mergekit would weigh both alike and give 2e-6.
    assert np.allclose(merged("sce", [base, small, large]), 2.8e-6, rtol=1e-5, atol=0)


def test_sce_scales_with_its_input(weights: Callable[..., torch.Tensor]) -> None:
    base, *experts = trio(weights, 5000, 3)
    plain = merged("sce", [base, *experts], select_topk=0.3)
    scaled = merged("sce", [a * np.float32(2.0**-30) for a in (base, *experts)], select_topk=0.3)
    assert np.array_equal(scaled, plain * np.float32(2.0**-30))


def test_sce_selects_the_lowest_indices_among_equals_and_nothing_without_variance() -> None:
    base = [0.0] * 6
    result = merged("sce", [base, [1, 1, 0, 1, 1, 5], [-1, -1, 0, -1, 1, 5]], select_topk=0.67)
    # Of the three positions with a variance two are taken; at each the sum is zero, so plus wins.
    assert result.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert merged("sce", [base, [3.0] * 6, [3.0] * 6], select_topk=0.9).tolist() == base


def test_sce_refuses_weights_that_are_not_finite() -> None:
    with pytest.raises(Unmergeable, match="NaN or infinity"):
        merged("sce", [[1.0, 2.0], [math.nan, 3.0]])


# -- all of them -----------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "dare_linear": {"density": (0.5, 0.9), "weight": (1.0, 0.3)},
    "dare_ties": {"density": (0.3, 0.8), "weight": (0.7, -0.4), "lambda": 1.3, "normalize": True},
    "della": {"density": (0.5, 0.8), "weight": (1.0, 0.5), "epsilon": (0.15, 0.05), "lambda": 0.9},
    "della_linear": {"density": (0.4, 0.6), "weight": (-1.0, 0.5), "normalize": True, "rescale": False},
    "breadcrumbs": {"density": (0.5, 0.9), "weight": (1.0, 0.3), "gamma": (0.01, 0.2)},
    "breadcrumbs_ties": {"density": (0.4, 0.7), "weight": (1.0, -0.3), "gamma": (0.1, 0.0)},
    "ties": {"density": (0.2, 0.6), "weight": (1.0, 0.5), "lambda": 0.7},
    "task_arithmetic": {"weight": (1.0, 0.5), "lambda": 0.7, "normalize": True},
    "sce": {"select_topk": 0.3},
}
STRANGE = (0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.0, -1.0, 1.5, 3e38, -3e38, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("norm", [False, True])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_kernel_is_the_formula_on_strange_numbers(name: str, norm: bool, data: st.DataObject) -> None:
    row, rows = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 4))
    size, start = row * rows, row * data.draw(st.integers(0, 50))
    seed = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    pool = np.concatenate([np.array(STRANGE), seed.normal(0, 0.1, 20)]).astype(np.float32)
    arrays = [seed.choice(pool, size) for _ in range(3)]
    parameters = complete(name, 2, SETTINGS[name])
    flag = next((f for f in ("rescale_l1", "rescale") if f in parameters), None)
    if flag:
        parameters = {**parameters, flag: norm}
    level = seed.choice([*pool[np.isfinite(pool)], np.float32(np.inf)], 4)
    bits = [int(np.abs(np.float32(x)).view(np.uint32)) for x in level]
    last = [int(start + n) for n in seed.integers(-1, size + 1, 4)]
    known = {
        "threshold": bits, "last": last, "outlier_threshold": bits[2:], "outlier_last": last[2:],
        "weights": [0.25, 0.75], "norm": [1.7, 0.3],
    }  # fmt: skip
    traced = {key: tuple(known[key][:n]) for key, (n, _) in find(name).traces(parameters, 2).items()}
    chunk = Chunk(arrays=tuple(arrays), start=start, row=row, keys=KEYS[:2])
    out = np.full(size, np.float32(7.0))
    operator = find(name)
    assert operator.compiled is not None
    operator.compiled(chunk, parameters, traced, out)
    assert same_bits(out, operator.apply(chunk, parameters, traced).numpy())


@pytest.mark.parametrize("name", [*TRIMMED, "task_arithmetic"])
@pytest.mark.parametrize("experts", [1, 3, fused.MOST, fused.MOST + 1])
def test_any_number_of_experts_is_merged_as_the_formula_says(
    name: str, experts: int, weights: Callable[..., torch.Tensor]
) -> None:
    own = {"weight": tuple((-0.8) ** n for n in range(experts)), "density": (0.4,) * experts}
    merged(name, trio(weights, 5000, experts), **{k: v for k, v in own.items() if find(name).parameter(k)})


@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_kernels_that_tell_what_is_finite_tell_the_truth(damage: float) -> None:
    arrays = [np.ones(9000, np.float32) for _ in range(3)]
    stream, parameters = Held(TASK_ARITHMETIC, arrays), complete("task_arithmetic", 2, {})
    out = np.empty(9000, np.float32)
    assert TASK_ARITHMETIC.compiled is not None
    assert TASK_ARITHMETIC.compiled(stream.at(0, 9000), parameters, {}, out) is True
    arrays[1][8999] = damage
    assert TASK_ARITHMETIC.compiled(stream.at(0, 9000), parameters, {}, out) is False
    out[[0, 4096]] = np.array([0xFFC12345, 0xFF800000], np.uint32).view(np.float32)
    expected = np.empty(9000, np.float32)
    assert not convert.narrow(out, "F32", expected)
    assert not convert.seal(out)
    assert out.tobytes() == expected.tobytes()
    assert convert.seal(np.zeros(9000, np.float32))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("norm", [False, True])
def test_chunks_do_not_show_in_the_bits(name: str, norm: bool, weights: Callable[..., torch.Tensor]) -> None:
    inputs = trio(weights, 49_000)
    flag = {"rescale_l1" if name in CHANCE else "rescale": True} if norm else {}
    results = [
        merged(name, inputs, chunk=chunk, row=700, **(SETTINGS[name] | flag))
        for chunk in (4096, 12_288, 65_536)
    ]
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()
    assert not np.array_equal(results[0], inputs[0])


@pytest.mark.parametrize("name", OPERATORS)
def test_a_run_of_elements_is_the_same_wherever_it_begins(
    name: str, weights: Callable[..., torch.Tensor]
) -> None:
    arrays, row = trio(weights, 14_000), 7
    operator, parameters = find(name), complete(name, 2, SETTINGS[name])
    stream = Held(operator, arrays, row=row)
    traced = operator.measure(stream, parameters) if operator.measure else {}
    assert operator.compiled is not None
    whole = computed(stream, parameters, traced)
    for start, stop in ((0, 7), (7, 9002), (2338, 2345), (8995, 14_000)):
        out = np.empty(stop - start - (stop - start) % row, np.float32)
        start = start // row * row
        stop = start + len(out)
        operator.compiled(stream.at(start, stop), parameters, traced, out)
        assert out.tobytes() == whole[start:stop].tobytes()


@pytest.mark.parametrize("name", [n for n in VECTORS if n != "task_arithmetic"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_with_density_one_nothing_is_left_out(
    name: str, rescale: bool, normalize: bool, weights: Callable[..., torch.Tensor]
) -> None:
    inputs = trio(weights, 9000)
    same = {"weight": (0.7, -0.4), "lambda": 0.9, "normalize": normalize}
    consensus = name in ("dare_ties", "della", "breadcrumbs_ties", "ties")
    plain = merged("ties" if consensus else "task_arithmetic", inputs, **same)
    assert merged(name, inputs, row=90, density=1.0, rescale=rescale, **same).tobytes() == plain.tobytes()
    if name in CHANCE:
        l1 = merged(name, inputs, row=90, density=1.0, rescale_l1=True, **same)
        assert l1.tobytes() == plain.tobytes()


@pytest.mark.parametrize("name", [n for n in VECTORS if n != "task_arithmetic"])
def test_with_density_zero_nothing_is_left(name: str, weights: Callable[..., torch.Tensor]) -> None:
    inputs = trio(weights, 900)
    assert np.array_equal(merged(name, inputs, row=90, density=0.0), inputs[0])


@pytest.mark.parametrize("name", OPERATORS)
def test_a_model_merged_with_itself_stays(name: str, weights: Callable[..., torch.Tensor]) -> None:
    base = trio(weights, 5000)[0]
    assert np.array_equal(merged(name, [base, base, base], row=50, **SETTINGS[name]), base)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 4095, 4097])
@pytest.mark.parametrize("fill", [0.0, 0.25])
def test_constant_tensors_of_any_size(name: str, size: int, fill: float) -> None:
    inputs = [np.full(size, np.float32(1.0)), *[np.full(size, np.float32(1.0 + fill))] * 2]
    result = merged(name, inputs, **SETTINGS[name])
    assert len(result) == size
    assert np.isfinite(result).all()
    assert fill or np.array_equal(result, inputs[0])


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_damage_in_an_input_shows_though_the_element_is_dropped(
    name: str, damage: float, operand: int, weights: Callable[..., torch.Tensor]
) -> None:
    inputs = trio(weights, 64)
    inputs[operand] = inputs[operand].copy()
    inputs[operand][::2] = damage
    if name == "sce":
        with pytest.raises(Unmergeable, match="NaN or infinity"):
            merged(name, inputs, **SETTINGS[name])
        return
    few = {} if name == "task_arithmetic" else {"density": 0.25}
    result = merged(
        name, inputs, row=16, **(SETTINGS[name] | few | ({"epsilon": 0.2} if "della" in name else {}))
    )
    assert not np.isfinite(result[::2]).any()
    assert np.isfinite(result[1::2]).all()


# -- in a merge ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CHANCE, *TRIMMED])
def test_restored_norms_are_the_same_on_any_threads_and_chunks_and_survive_an_audit(
    name: str,
    save: Callable[..., Path],
    weights: Callable[..., torch.Tensor],
    sealed: Callable[..., Any],
    tmp_path: Path,
) -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": (1201, 997), "model.norm.weight": (33,)}
    base = {tensor: weights(tensor, *shape) for tensor, shape in shapes.items()}
    for model in ("base", "math", "code"):
        near = {t: base[t] + weights(f"{model} {t}", *s) / 8 for t, s in shapes.items()}
        save(model, near if model != "base" else base)
    flag = "rescale_l1" if name in CHANCE else "rescale"
    plan, inputs = sealed(
        f"merge_method: {name}\nbase_model: {tmp_path / 'base'}\nparameters: {{density: 0.4, {flag}: true}}\n"
        f"models:\n  - {{model: {tmp_path / 'math'}, parameters: {{weight: 0.7}}}}\n"
        f"  - {{model: {tmp_path / 'code'}, parameters: {{weight: 0.4}}}}\n"
    )
    runs = [
        run(
            plan,
            inputs,
            tmp_path / f"out {n}",
            journal=tmp_path / f"journal {n}",
            threads=n,
            chunk_elements=c,
        )
        for n, c in ((1, CHUNK_ELEMENTS), (2, 2 * CHUNK_ELEMENTS))
    ]
    report = audit(plan, runs[0].trace, inputs, runs[0].manifest, runs[0].leaves)
    assert runs[0].manifest == runs[1].manifest
    assert runs[0].trace == runs[1].trace == Trace.parse(plan, runs[0].trace.to_bytes())
    assert all(len(runs[0].trace.of(0, tensor)["norm"]) == 2 for tensor in shapes)
    assert report.ok
