"""The structure of a model: the same bits in any order and on every machine, and nothing hostile is read."""

import hashlib
import math
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.checkpoint.source import TensorInfo, TensorSource
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.simmerge.structural import kernels, sketch
from merge_core.simmerge.structural.sketcher import Sketcher, compute
from merge_core.simmerge.structural.structure import FEWER, SAMPLE, WIDTH, Structure, first_difference

Arrays = dict[str, np.ndarray]
Hold = Callable[[Mapping[str, np.ndarray]], TensorSource]


def llama(seed: int, *, layers: int = 3, width: int = 64) -> Arrays:
    draw = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (200, width), "model.norm.weight": (width,)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (width, width),
            f"model.layers.{i}.mlp.up_proj.weight": (2 * width, width),
            f"model.layers.{i}.input_layernorm.weight": (width,),
        }
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def pieces(arrays: Arrays, size: int = sketch.BLOCK) -> list[tuple[str, int, bytes]]:
    """Every tensor in runs of `size` elements."""
    return [
        (name, start * array.itemsize, array.ravel()[start : start + size].tobytes())
        for name, array in arrays.items()
        for start in range(0, array.size, size)
    ]


def sketched(arrays: Arrays, cut: list[tuple[str, int, bytes]], hold: Hold) -> Structure:
    sketcher = Sketcher(hold(arrays).tensors)
    for piece in cut:
        sketcher.add(*piece)
    return sketcher.finish()


def ramp(count: int, scale: float = 4096.0) -> np.ndarray:
    """Numbers from integers alone: the same on every machine."""
    return (np.arange(count) * 2654435761 % 2_000_003 - 1_000_001) / scale


def cut_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32, as bits."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


MIXED: Arrays = {
    "model.embed_tokens.weight": ramp(280_003).astype(np.float32),
    "model.layers.0.self_attn.q_proj.weight": ramp(300_000),
    "model.layers.0.mlp.up_proj.weight": (ramp(140_000) / 8).astype(np.float16),
    "model.layers.1.mlp.up_proj.weight": (ramp(270_001).astype(np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    ),
    "model.layers.1.input_layernorm.weight": ramp(64, 1e6).astype(np.float32),
}
GOLDEN = "sha256:292071c5e00a91694f397fb673028c21b22d9e1a37f5b0918a4ba3114fe77025"


def test_the_bits_are_the_same_on_every_machine(held: Hold) -> None:
    assert compute(held(MIXED)).digest == GOLDEN


@settings(max_examples=25, deadline=None)
@given(chance=st.randoms(use_true_random=False), run=st.integers(1, 4))
def test_any_order_and_any_split_of_the_leaves_gives_the_same_bits(chance: random.Random, run: int) -> None:
    cut = pieces(MIXED, run * sketch.BLOCK)
    chance.shuffle(cut)
    assert sketched(MIXED, cut, Tensors).digest == GOLDEN


class Tensors:
    """What a Sketcher asks of a source: names, types and shapes."""

    def __init__(self, arrays: Arrays) -> None:
        names = {"float16": "F16", "float32": "F32", "float64": "F64", "uint16": "BF16"}
        self.tensors = {
            name: TensorInfo(dtype=names[str(array.dtype)], shape=array.shape)
            for name, array in arrays.items()
        }


def test_threads_do_not_show(held: Hold) -> None:
    sketcher = Sketcher(held(MIXED).tensors)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda piece: sketcher.add(*piece), pieces(MIXED)))
    assert sketcher.finish().digest == GOLDEN


@settings(max_examples=30, deadline=None)
@given(
    count=st.one_of(st.integers(1, 5000), st.integers(130_000, 135_000)),
    kind=st.sampled_from(["<f8", "<f4", "bf16"]),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-140, 20),
)
def test_the_kernel_gives_the_bits_of_the_formula(count: int, kind: str, seed: int, exponent: int) -> None:
    drawn = np.random.default_rng(seed).standard_normal(count) * 2.0**exponent
    stored = cut_to_bfloat16(drawn) if kind == "bf16" else drawn.astype(kind)
    drawn_rows = sketch.draws("model.norm.weight", seed % 7, -(-count // sketch.BLOCK))
    formula, compiled = sketch.formula(stored, drawn_rows), kernels.measure(stored, drawn_rows)
    assert (formula.l1.tobytes(), formula.squares.tobytes()) == (
        compiled.l1.tobytes(),
        compiled.squares.tobytes(),
    )
    assert (formula.largest, formula.fits) == (compiled.largest, compiled.fits)
    assert formula.limbs.tobytes() == compiled.limbs.tobytes()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=30), st.randoms())
def test_a_total_is_exact_in_any_order(values: list[float], chance: random.Random) -> None:
    one, other = sketch.Total(), sketch.Total()
    shuffled = chance.sample(values, len(values))
    for value, again in zip(values, shuffled, strict=True):
        one.add(value)
        other.add(again)
    try:
        expected = math.fsum(values)
    except OverflowError:
        return
    assert float(one) == float(other) == expected


def test_limbs_hold_a_sketch_to_its_last_bit() -> None:
    values = ramp(WIDTH, 2.0**35)
    assert (sketch.sketch_of(sketch._limbs(values)) == values.astype(np.float32)).all()


def test_the_type_that_weights_are_stored_in_does_not_show(held: Hold) -> None:
    values = (np.arange(400_000) % 255 - 127).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    stored = [values, values.astype(np.float64), values.astype(np.float16), bits]
    name = "model.layers.0.mlp.up_proj.weight"
    assert len({compute(held({name: array})).digest for array in stored}) == 1


def test_norms_are_those_of_the_weights(held: Hold) -> None:
    arrays = llama(0)
    structure = compute(held(arrays))
    late = next(group for group in structure.groups if str(group.key) == "late attn")
    weights = arrays["model.layers.2.self_attn.q_proj.weight"].astype(np.float64)
    assert late.elements == 64 * 64
    assert math.isclose(late.l2, np.linalg.norm(weights), rel_tol=1e-13)
    assert math.isclose(late.l1, np.abs(weights).sum(), rel_tol=1e-13)
    assert late.largest == np.abs(weights).max()
    row = next(row for row in structure.layers if (row.layer, row.role) == (2, "attn"))
    assert row.l2 == np.float32(late.l2)


def test_groups_are_thirds_of_the_depth_and_roles(held: Hold) -> None:
    keys = [str(group.key) for group in compute(held(llama(0, layers=7))).groups]
    assert keys == [
        "embed",
        "norm",
        *(f"{t} {role}" for t in ("early", "mid", "late") for role in ("attn", "mlp", "norm")),
    ]


def test_a_sample_holds_values_of_the_weights_at_places_that_the_shape_decides(held: Hold) -> None:
    places: Arrays = {"model.embed_tokens.weight": np.arange(100_000, dtype=np.float32)}
    drawn = compute(held(places)).groups[0].sample.astype(int)
    assert len(set(drawn.tolist())) == SAMPLE and (np.diff(drawn) > 0).all()
    # One in each of as many equal runs, and not always the first of it.
    assert (drawn * SAMPLE // 100_000 == np.arange(SAMPLE)).mean() > 0.98
    assert 10 < np.std(drawn % (100_000 // SAMPLE)) < 20
    other = {"model.embed_tokens.weight": -places["model.embed_tokens.weight"]}
    assert (compute(held(other)).groups[0].sample == -drawn).all()


def test_a_group_that_a_sketch_would_not_shorten_is_there_whole(held: Hold) -> None:
    values = ramp(SAMPLE + WIDTH).astype(np.float32)
    whole = compute(held({"model.norm.weight": values})).groups[0]
    assert (whole.sample == values).all() and len(whole.sketch) == 0
    sampled = compute(held({"model.norm.weight": np.append(values, np.float32(1))})).groups[0]
    assert (len(sampled.sample), len(sampled.sketch)) == (SAMPLE, WIDTH)


def test_sketches_are_linear_and_tell_inner_products_without_bias(held: Hold) -> None:
    """Constant tensors are the worst case: a sign or a turn that rows had in common would show as a bias."""
    errors = []
    for i in range(60):
        ones = {f"model.layers.0.mlp.w{i}.weight": np.ones((3, sketch.BLOCK), np.float32)}
        group = compute(held(ones)).groups[0]
        errors.append(float((group.sketch.astype(np.float64) ** 2).sum()) / group.l2**2 - 1)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / math.sqrt(len(errors))
    assert np.std(errors) < 2 * math.sqrt(2 / WIDTH)


def test_the_name_of_a_tensor_decides_how_it_is_turned(held: Hold) -> None:
    values = ramp(9000).astype(np.float32)
    first, second = (
        compute(held({f"model.layers.0.mlp.{name}_proj.weight": values})).groups[0] for name in ("up", "down")
    )
    assert first.l2 == second.l2
    assert abs(float(first.sketch @ second.sketch)) < 0.1 * first.l2**2


def test_integers_and_empty_tensors_are_left_out(held: Hold) -> None:
    none = {"model.layers.0.attn.mask": np.arange(8), "model.layers.0.mlp.bias": np.zeros((0,), np.float32)}
    assert compute(held(llama(7) | none)).digest == compute(held(llama(7))).digest
    with pytest.raises(Unmergeable, match="no floating-point"):
        compute(held(none))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_one_bad_number_is_found(bad: float, dtype: type, held: Hold) -> None:
    arrays = {name: array.astype(dtype) for name, array in llama(8).items()}
    arrays["model.layers.1.mlp.up_proj.weight"][100, 63] = bad
    with pytest.raises(CorruptCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        compute(held(arrays))


@pytest.mark.parametrize("size", [1e300, 1e30])
def test_weights_too_large_to_add_up_are_refused_not_written_as_something_else(
    size: float, held: Hold
) -> None:
    with pytest.raises(CorruptCheckpoint, match="too large"):
        compute(held({"model.layers.0.mlp.w": np.full(5000, size)}))


def test_a_piece_that_is_no_whole_block_or_comes_twice_is_refused(held: Hold) -> None:
    arrays: Arrays = {"model.embed_tokens.weight": np.ones(300_000, np.float32)}
    data = arrays["model.embed_tokens.weight"].tobytes()
    sketcher = Sketcher(held(arrays).tensors)
    block = 4 * sketch.BLOCK
    for offset, length in [(0, 4 * 1000), (4, block), (2, block), (block, block + 4), (2 * block, len(data))]:
        with pytest.raises(ValueError, match="not whole blocks"):
            sketcher.add("model.embed_tokens.weight", offset, data[:length])
    sketcher.add("model.embed_tokens.weight", block, data[block : 2 * block])
    with pytest.raises(ValueError, match="came twice"):
        sketcher.add("model.embed_tokens.weight", 0, data[: 2 * block])
    with pytest.raises(KeyError):
        sketcher.add("lm_head.weight", 0, data)
    assert not sketcher.is_whole
    with pytest.raises(ValueError, match=r"some of model\.embed_tokens\.weight"):
        sketcher.finish()


def test_models_of_many_kinds_of_groups_have_smaller_samples(held: Hold) -> None:
    roles = ("self_attn", "mlp", "input_layernorm")
    arrays = {
        f"model.layers.{i}.{role}.weight": ramp(5000).astype(np.float32) for i in range(3) for role in roles
    }
    outside = ("attn.pos", "mlp.extra", "norm", "embed", "lm_head", "logit_scale")
    arrays |= {f"{name}.weight": ramp(5000).astype(np.float32) for name in outside}
    groups = compute(held(arrays)).groups
    assert len(groups) == 15
    assert {(len(group.sketch), len(group.sample)) for group in groups} == {(WIDTH, FEWER)}


# What a publisher may do to weights that it has promised.
LIES: dict[str, Callable[[Arrays, int], Arrays]] = {
    "another model": lambda arrays, seed: llama(10_000 + seed),
    "noise": lambda arrays, seed: {name: noisy(array, seed) for name, array in arrays.items()},
    "scaled": lambda arrays, seed: {name: array * np.float32(1.01) for name, array in arrays.items()},
    "one bit of one weight": lambda arrays, seed: one_bit(arrays, seed),
}


def noisy(array: np.ndarray, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return array + (0.01 * array.std() * draw.standard_normal(array.shape)).astype(np.float32)


def one_bit(arrays: Arrays, seed: int) -> Arrays:
    name = sorted(arrays)[seed % len(arrays)]
    bits = arrays[name].copy().view(np.uint32)
    bits.ravel()[seed * 7919 % bits.size] ^= np.uint32(1)
    return arrays | {name: bits.view(np.float32)}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_lie_about_weights_is_caught_a_hundred_times_of_a_hundred(lie: str, held: Hold) -> None:
    caught = 0
    for seed in range(100):
        arrays = llama(seed, layers=1, width=32)
        advertised = compute(held(arrays))
        caught += first_difference(advertised, compute(held(LIES[lie](arrays, seed)))) is not None
    assert caught == 100


def test_an_honest_publisher_is_never_accused(held: Hold) -> None:
    accused = 0
    for seed in range(100):
        arrays = llama(seed, layers=1, width=32)
        advertised = compute(held(arrays))
        received = Structure.read(advertised.described(), advertised.arrays())
        cut = pieces(arrays)
        random.Random(seed).shuffle(cut)
        accused += first_difference(received, sketched(arrays, cut, held)) is not None
    assert accused == 0


def test_the_difference_is_named_by_the_first_group_that_has_it(held: Hold) -> None:
    arrays = llama(1)
    changed = arrays | {"model.layers.1.mlp.up_proj.weight": -arrays["model.layers.1.mlp.up_proj.weight"]}
    honest, other = compute(held(arrays)), compute(held(changed))
    assert first_difference(honest, other) == "mid mlp"
    fewer = compute(held({name: array for name, array in arrays.items() if "embed" not in name}))
    assert first_difference(honest, fewer) == "embed"
    layers = (*honest.layers[:4], other.layers[3], *honest.layers[5:])
    assert first_difference(Structure(groups=honest.groups, layers=layers), honest) == "layer 1 mlp"


def test_a_structure_survives_being_written(held: Hold) -> None:
    found = compute(held(llama(1)))
    again = Structure.read(found.described(), found.arrays())
    assert again.digest == found.digest
    assert hashlib.sha256(again.groups[0].sketch).digest() == hashlib.sha256(found.groups[0].sketch).digest()
