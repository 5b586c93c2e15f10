"""The fingerprint: what is estimated holds, the bits hold everywhere, and nothing hostile is read."""

import base64
import json
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.checkpoint.source import TensorInfo
from merge_core.digest import ModelId, canonical
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.simmerge.version1 import MAX_FINGERPRINT, Fingerprint, GroupKey, compute, similarity
from merge_core.simmerge.version1_sketch import WIDTH, tree_sum

MODEL = ModelId("sha256:" + "5" * 64)
DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64", "uint16": "BF16"}


class Weights:
    """Arrays as a TensorSource; uint16 arrays are the bits of bfloat16."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = dict(sorted(arrays.items()))
        self.tensors = {
            name: TensorInfo(dtype=DTYPES[str(array.dtype)], shape=array.shape)
            for name, array in self._arrays.items()
        }

    def read(self, tensor: str, offset: int, length: int) -> bytes:
        return self._arrays[tensor].tobytes()[offset : offset + length]


def llama(seed: int, *, layers: int = 2, width: int = 96, scale: float = 1.0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (500, width), "model.norm.weight": (width,)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (width, width),
            f"model.layers.{i}.mlp.up_proj.weight": (2 * width, width),
            f"model.layers.{i}.input_layernorm.weight": (width,),
        }
    return {name: (scale * draw.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def plus(*models: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: sum(model[name] for model in models) for name in models[0]}


def fingerprint(arrays: Mapping[str, np.ndarray]) -> Fingerprint:
    return compute(Weights(arrays), MODEL)


def exact_cosine(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    x, y = (np.concatenate([m[name].ravel() for name in sorted(m)]).astype(np.float64) for m in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_groups_are_layers_and_roles_and_their_norms_are_exact() -> None:
    arrays = llama(0)
    found = fingerprint(arrays)
    assert [(g.key.first_layer, g.key.role) for g in found.groups] == [
        *((-1, role) for role in ("embed", "norm")),
        *((layer, role) for layer in (0, 1) for role in ("attn", "mlp", "norm")),
    ]
    attention = next(g for g in found.groups if g.key == GroupKey(first_layer=1, role="attn"))
    weights = arrays["model.layers.1.self_attn.q_proj.weight"].astype(np.float64)
    assert attention.elements == 96 * 96
    assert math.isclose(attention.l2, np.linalg.norm(weights), rel_tol=1e-13)
    assert math.isclose(attention.l1, np.abs(weights).sum(), rel_tol=1e-13)
    assert attention.largest == np.abs(weights).max()


def test_the_same_weights_are_at_cosine_one_and_unrelated_ones_near_zero() -> None:
    one, other = fingerprint(llama(1)), fingerprint(llama(2))
    assert similarity(one, one).overall.cosine == pytest.approx(1.0, abs=1e-12)
    assert similarity(one, one).overall.distance == 0.0
    apart = similarity(one, other)
    assert abs(apart.overall.cosine) < 4 / math.sqrt(8 * WIDTH)
    assert apart.overall.distance == pytest.approx(math.sqrt(2), rel=0.1)
    assert similarity(
        fingerprint(llama(1)), fingerprint(llama(1, scale=-1.0))
    ).overall.cosine == pytest.approx(-1)


@pytest.mark.parametrize("seed", [11, 12, 13, 14])
def test_estimates_of_related_models_are_close_to_the_truth(seed: int) -> None:
    base = llama(seed)
    first, second = plus(base, llama(seed + 100, scale=0.5)), plus(base, llama(seed + 200, scale=0.8))
    estimated = similarity(fingerprint(first), fingerprint(second)).overall.cosine
    assert estimated == pytest.approx(exact_cosine(first, second), abs=0.06)


def test_task_vectors_are_compared_through_the_base() -> None:
    """Two experts that moved alike by a hundredth of the base: W says 1, the task vectors say 0.5."""
    base, shared = llama(3), llama(4, scale=0.01)
    first, second = plus(base, shared, llama(5, scale=0.01)), plus(base, shared, llama(6, scale=0.01))
    prints = fingerprint(first), fingerprint(second)
    assert similarity(*prints).overall.cosine > 0.999
    assert similarity(*prints, base=fingerprint(base)).overall.cosine == pytest.approx(0.5, abs=0.08)


def test_the_estimate_is_unbiased_over_many_pairs() -> None:
    """Constant blocks are the worst case: a sign or rotation shared by all blocks would show as a bias."""
    errors = []
    for i in range(40):
        arrays = {f"model.layers.0.mlp.w{i}.weight": np.ones((5, 1 << 17), dtype=np.float32)}
        found = fingerprint(arrays).groups[0]
        errors.append(sum(v * v for v in found.sketch) / found.l2**2 - 1)
    mean, spread = np.mean(errors), np.std(errors)
    assert abs(mean) < 4 * spread / math.sqrt(len(errors))
    assert spread < 0.2


def test_the_bits_are_the_same_on_every_machine() -> None:
    """The golden digest: weights from integers alone, across a block edge and in four types."""
    ramp = (np.arange(200_003) * 2654435761 % 2_000_003 - 1_000_001) / 4096
    bits = ramp.astype(np.float32).view(np.uint32) >> 16
    arrays = {
        "model.embed_tokens.weight": ramp.astype(np.float32),
        "model.layers.0.self_attn.q_proj.weight": ramp,
        "model.layers.0.mlp.up_proj.weight": (ramp / 8).astype(np.float16),
        "model.layers.1.mlp.up_proj.weight": bits.astype(np.uint16),
    }
    assert fingerprint(arrays).digest == GOLDEN


GOLDEN = "sha256:ef555b963e3888328641242b8919b15d7d056654f32c49a56cedd9aac683f9d6"


def test_the_type_that_weights_are_stored_in_does_not_show() -> None:
    values = (np.arange(400_000) % 255 - 127).astype(np.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    stored = [values, values.astype(np.float64), values.astype(np.float16), bits]
    assert len({fingerprint({name: array}).digest for array in stored}) == 1


def test_integers_are_left_out_and_a_model_of_integers_has_no_fingerprint() -> None:
    counts = {"model.layers.0.attn.mask": np.arange(8)}
    assert fingerprint(llama(7) | counts) == fingerprint(llama(7))
    with pytest.raises(Unmergeable, match="no floating-point"):
        fingerprint(counts)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_is_found(bad: float) -> None:
    arrays = llama(8)
    arrays["model.layers.1.mlp.up_proj.weight"][190, 95] = bad
    with pytest.raises(CorruptCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        fingerprint(arrays)


def test_weights_too_large_to_square_are_refused_not_written_as_infinity() -> None:
    with pytest.raises(CorruptCheckpoint, match="too large"):
        fingerprint({"model.layers.0.mlp.w": np.full(4, 1e300)})


def test_an_empty_tensor_adds_nothing() -> None:
    empty = {"model.layers.0.mlp.bias": np.zeros((0,), dtype=np.float32)}
    assert fingerprint(llama(9) | empty) == fingerprint(llama(9))


def test_models_of_other_shapes_are_not_compared() -> None:
    with pytest.raises(Unmergeable, match="different shapes"):
        similarity(fingerprint(llama(1)), fingerprint(llama(1, layers=3)))
    with pytest.raises(Unmergeable, match="different shapes"):
        similarity(fingerprint(llama(1)), fingerprint(llama(1)), base=fingerprint(llama(1, width=64)))


@pytest.mark.parametrize("layers", [1, 32, 80, 126, 1000])
def test_any_depth_fits_into_one_message(layers: int) -> None:
    arrays = llama(10, layers=layers, width=4)
    data = fingerprint(arrays).to_bytes()
    assert len(data) <= MAX_FINGERPRINT
    assert Fingerprint.parse(data).to_bytes() == data
    assert sum(g.elements for g in Fingerprint.parse(data).groups) == sum(a.size for a in arrays.values())


def test_a_fingerprint_survives_the_wire() -> None:
    found = fingerprint(llama(1))
    assert Fingerprint.parse(found.to_bytes()) == found
    assert Fingerprint.parse(found.to_bytes()).digest == found.digest


HOSTILE = {
    "another version": lambda v: v | {"version": 2},
    "true as version": lambda v: v | {"version": True},
    "an unknown key": lambda v: v | {"terms": "mine"},
    "no groups": lambda v: v | {"groups": []},
    "a repeated group": lambda v: v | {"groups": [v["groups"][0], *v["groups"]]},
    "unsorted groups": lambda v: v | {"groups": v["groups"][::-1]},
    "an odd width": lambda v: v | {"width": 100},
    "a width that the sketches do not have": lambda v: v | {"width": 128},
    "a model id that is none": lambda v: v | {"modelId": "md5:1"},
    "infinity as a norm": lambda v: group(v, l2="inf"),
    "a norm in another spelling": lambda v: group(v, l2="0x1.0p+0000"),
    "a negative norm": lambda v: group(v, l2="-0x1.0000000000000p+0"),
    "a norm beyond any float": lambda v: group(v, l2="0x1.0p+9999"),
    "a negative count": lambda v: group(v, elements=-1),
    "an unknown role": lambda v: group(v, role="king"),
    "NaN in a sketch": lambda v: group(v, sketch=base64.b64encode(b"\xff" * 4 * WIDTH).decode()),
    "base64 with rubbish": lambda v: group(v, sketch="!" + v["groups"][0]["sketch"]),
    "a group that is a list": lambda v: v | {"groups": [[]]},
}


def group(value: dict, **changes: object) -> dict:
    return value | {"groups": [value["groups"][0] | changes, *value["groups"][1:]]}


@pytest.mark.parametrize("attack", sorted(HOSTILE))
def test_a_hostile_fingerprint_is_refused(attack: str) -> None:
    value = json.loads(fingerprint(llama(1)).to_bytes())
    with pytest.raises(CorruptCheckpoint):
        Fingerprint.parse(canonical(HOSTILE[attack](value)))


def test_a_large_fingerprint_is_refused_unread() -> None:
    with pytest.raises(CorruptCheckpoint, match="at most"):
        Fingerprint.parse(b"[" * (MAX_FINGERPRINT + 1))


@given(st.binary(max_size=300))
def test_bytes_from_anywhere_give_a_typed_error(data: bytes) -> None:
    with pytest.raises(CorruptCheckpoint):
        Fingerprint.parse(data)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=70))
def test_the_written_down_sum_is_a_sum(values: list[float]) -> None:
    exact = math.fsum(values)
    assert tree_sum(np.array(values)) == pytest.approx(exact, rel=1e-12, abs=1e-9)
