"""Fingerprints and minis: one spelling, small, nothing hostile is read; partners are ranked by them."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.checkpoint.source import TensorSource
from merge_core.digest import ModelId, sha256
from merge_core.errors import CorruptCheckpoint
from merge_core.simmerge import container
from merge_core.simmerge.fingerprint import MAX_FINGERPRINT, Fingerprint
from merge_core.simmerge.functional.behaviour import Behaviour, Observation
from merge_core.simmerge.index import Index
from merge_core.simmerge.mini import MAX_MINI, WIDTH, Mini
from merge_core.simmerge.structural.sketcher import compute
from merge_core.simmerge.structural.structure import (
    FEWER,
    GROUPS,
    MAX_LAYER_ROWS,
    SAMPLE,
    Group,
    GroupKey,
    LayerNorms,
    Structure,
)
from merge_core.simmerge.structural.structure import WIDTH as SKETCH

Hold = Callable[[Mapping[str, np.ndarray]], TensorSource]
QUESTIONS = sha256(b"probes")


def weights(
    seed: int, *, near: Mapping[str, np.ndarray] | None = None, step: float = 0.05
) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (100, 64),
        "model.layers.0.self_attn.q_proj.weight": (80, 64),
        "model.layers.0.input_layernorm.weight": (64,),
    }
    drawn = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return drawn if near is None else {name: near[name] + np.float32(step) * drawn[name] for name in shapes}


def behaviour(seed: int, *, positions: int = 24, vocabulary: int = 50, layers: int = 3) -> Behaviour:
    draw = np.random.default_rng(seed)
    logits = np.random.default_rng(99).standard_normal((positions, vocabulary)) * 3
    logits += draw.standard_normal(logits.shape)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    attention = draw.random((layers, positions, 2, 8)).astype(np.float32)
    return Behaviour.of(
        Observation(
            probes=QUESTIONS,
            tokenizer=sha256(b"tokens"),
            asked=sha256(b"asked"),
            tasks=("maths", "code"),
            task=np.arange(positions, dtype=np.uint8) % 2,
            logp=logp.astype(np.float32),
            bits_per_byte=np.array([1.5, np.nan], np.float32),
            hidden=draw.standard_normal((layers + 1, positions, 16)).astype(np.float32),
            attention=attention / attention.sum(axis=-1, keepdims=True),
        )
    )


def fingerprint(hold: Hold, seed: int, **given: Any) -> Fingerprint:
    return Fingerprint(
        model_id=ModelId(sha256(b"model %d" % seed)),
        structure=compute(hold(weights(seed, **given))),
        behaviour=behaviour(seed),
    )


@pytest.fixture
def found(held: Hold) -> Fingerprint:
    return fingerprint(held, 1)


def test_a_fingerprint_survives_the_wire(found: Fingerprint) -> None:
    again = Fingerprint.parse(found.to_bytes())
    assert again.to_bytes() == found.to_bytes()
    assert (again.digest, again.structure.digest) == (found.digest, found.structure.digest)
    assert again.behaviour is not None and found.behaviour is not None
    assert again.behaviour.key == found.behaviour.key


def test_a_model_that_cannot_be_run_has_a_fingerprint_without_behaviour(found: Fingerprint) -> None:
    alone = replace(found, behaviour=None)
    assert Fingerprint.parse(alone.to_bytes()).behaviour is None
    assert Mini.of(alone).questions is None


def shaped(keys: list[GroupKey], rows: int) -> Structure:
    """A structure as large as one of so many groups gets, without the weights."""
    sample = SAMPLE if len(keys) <= 12 else FEWER
    made = np.random.default_rng(0).standard_normal(SKETCH).astype(np.float32)
    return Structure(
        groups=tuple(
            Group(
                key=key,
                elements=2**40,
                shapes=sha256(str(key).encode()),
                l1=1e9,
                l2=1e3,
                largest=1.0,
                sketch=made,
                sample=made[:sample],
            )
            for key in keys
        ),
        layers=tuple(
            LayerNorms(
                layer=row // 3,
                role=("attn", "mlp", "norm")[row % 3],
                elements=2**40,
                l1=1.0,
                l2=1.0,
                largest=1.0,
            )
            for row in range(rows)
        ),
    )


@pytest.mark.parametrize("groups", [12, 15])
def test_the_largest_structure_and_behaviour_fit_together(groups: int) -> None:
    usual = [key for key in GROUPS if key.third != -1 or key.role in ("embed", "head", "norm")]
    structure = shaped(usual if groups == 12 else list(GROUPS), MAX_LAYER_ROWS)
    assert len(structure.groups) == groups
    widest = Fingerprint(
        model_id=ModelId(sha256(b"")),
        structure=structure,
        behaviour=behaviour(0, positions=512, layers=40) if groups == 12 else None,
    )
    data = widest.to_bytes()
    assert len(data) <= MAX_FINGERPRINT - (4 << 10)
    assert Fingerprint.parse(data).to_bytes() == data


def told(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any, dict[str, np.ndarray]], tuple[Any, Any]]:
    return lambda value, arrays: (change(value), arrays)


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., tuple[Any, Any]]:
    return lambda value, arrays: (value, arrays | {name: change(arrays[name].copy())})


def at(index: Any, number: float) -> Callable[[np.ndarray], np.ndarray]:
    def changed(values: np.ndarray) -> np.ndarray:
        values[index] = number
        return values

    return changed


def groups(change: Callable[[list[Any]], Any]) -> Callable[..., tuple[Any, Any]]:
    return told(lambda v: v | {"structure": v["structure"] | {"groups": change(v["structure"]["groups"])}})


def layers(change: Callable[[list[Any]], Any]) -> Callable[..., tuple[Any, Any]]:
    return told(lambda v: v | {"structure": v["structure"] | {"layers": change(v["structure"]["layers"])}})


HOSTILE: dict[str, Callable[..., tuple[Any, Any]]] = {
    "another version": told(lambda v: v | {"version": 1}),
    "true as version": told(lambda v: v | {"version": True}),
    "an unknown key": told(lambda v: v | {"terms": "mine"}),
    "no structure": told(lambda v: v | {"structure": None}),
    "a structure that is a list": told(lambda v: v | {"structure": []}),
    "text for all of it": told(lambda v: "fingerprint"),
    "a model id that is none": told(lambda v: v | {"modelId": "md5:1"}),
    "a behaviour that is not described": told(lambda v: v | {"behaviour": None}),
    "a behaviour without arrays": lambda v, a: (v, {n: x for n, x in a.items() if n.startswith("s")}),
    "no groups": groups(lambda g: []),
    "a repeated group": groups(lambda g: [g[0], *g]),
    "unsorted groups": groups(lambda g: g[::-1]),
    "groups for ever": groups(lambda g: g * 20),
    "a group that is a number": groups(lambda g: [7, *g[1:]]),
    "an unknown role": groups(lambda g: [[-1, "king", *g[0][2:]], *g[1:]]),
    "a head by thirds": groups(lambda g: [*g[:2], [2, "head", *g[2][2:]]]),
    "a third that is true": groups(lambda g: [[True, *g[0][1:]], *g[1:]]),
    "no elements": groups(lambda g: [[*g[0][:2], 0, g[0][3]], *g[1:]]),
    "more elements than its arrays say": groups(lambda g: [*g[:2], [*g[2][:2], 65, g[2][3]]]),
    "elements beyond counting": groups(lambda g: [[*g[0][:2], 2**53 - 1 + 1e-9, g[0][3]], *g[1:]]),
    "shapes without a digest": groups(lambda g: [[*g[0][:3], "equal"], *g[1:]]),
    "unsorted layers": layers(lambda rows: rows[::-1]),
    "a negative layer": layers(lambda rows: [[-1, *rows[0][1:]], *rows[1:]]),
    "a role that layers have not": layers(lambda rows: [[0, "a", rows[0][2]], *rows[1:]]),
    "more layers than norms": layers(lambda rows: [*rows, [5, "mlp", 1]]),
    "layers for ever": layers(lambda rows: [[i, "mlp", 1] for i in range(MAX_LAYER_ROWS + 1)]),
    "NaN as a norm": array("structure.norms", at((0, 0), math.nan)),
    "an endless norm": array("structure.norms", at((0, 1), math.inf)),
    "a negative norm": array("structure.layers", at((0, 1), -1.0)),
    "zero with a sign": array("structure.norms", at((0, 0), -0.0)),
    "NaN in a sketch": array("structure.sketch", at((0, 5), math.nan)),
    "infinity in a sample": array("structure.sample", at(5, math.inf)),
    "a bucket that no weights fill": array("structure.sketch", at((0, 5), 2.0**49)),
    "a weight that cannot be measured": array("structure.sample", at(5, -1e20)),
    "a norm that overflows when it is squared": array("structure.norms", at((0, 1), 1e200)),
    "a hidden state that overflows": array("behaviour.hidden_norm", at(0, 3e38)),
    "bits without end": array("behaviour.bits_per_byte", at(0, 3e38)),
    "a layer twice, of another size": layers(
        lambda rows: [rows[0], [*rows[0][:2], rows[0][2] + 1], *rows[2:]]
    ),
    "a sketch too many": array("structure.sketch", lambda x: np.concatenate([x, x[:1]])),
    "a narrow sketch": array("structure.sketch", lambda x: x[:, :1024]),
    "sketches of another type": array("structure.sketch", lambda x: x.astype(np.float64)),
    "a sample that is too short": array("structure.sample", lambda x: x[:-1]),
    "an array that nobody asked for": lambda v, a: (v, a | {"structure.more": a["structure.norms"]}),
    "an array of no part": lambda v, a: (v, a | {"norms": a["structure.norms"]}),
    "tokens beyond the vocabulary": array("behaviour.ids", at((0, 0), 50)),
    "probabilities above one": array("behaviour.logp", at((0, 0), 1.0)),
}


@pytest.mark.parametrize("attack", sorted(HOSTILE))
def test_a_hostile_fingerprint_is_refused(attack: str, found: Fingerprint) -> None:
    value, arrays = container.read(found.to_bytes(), name="fingerprint")
    assert container.write(value, arrays, name="fingerprint") == found.to_bytes()
    try:
        data = container.write(*HOSTILE[attack](value, arrays), name="fingerprint")
    except TypeError:  # a float among what is digested can only be spelled by hand
        data = found.to_bytes().replace(b"6400", b"64.0")
    assert data != found.to_bytes()
    with pytest.raises(CorruptCheckpoint):
        Fingerprint.parse(data)


def test_another_spelling_of_the_same_is_refused(found: Fingerprint) -> None:
    data = found.to_bytes()
    length = int.from_bytes(data[:8], "little")
    spaced = (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :]
    assert container.read(spaced, name="fingerprint")[0] == container.read(data, name="fingerprint")[0]
    with pytest.raises(CorruptCheckpoint, match="another way"):
        Fingerprint.parse(spaced)


def test_a_large_fingerprint_is_refused_unread() -> None:
    with pytest.raises(CorruptCheckpoint, match="at most"):
        Fingerprint.parse(b"[" * (MAX_FINGERPRINT + 1))


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_from_anywhere_give_a_typed_error(data: bytes) -> None:
    for kind in (Fingerprint, Mini):
        with pytest.raises(CorruptCheckpoint):
            kind.parse(data)


@settings(max_examples=60, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_is_refused_or_another_fingerprint(where: float, bit: int) -> None:
    data = bytearray(SPECIMEN)
    data[int(where * len(data))] ^= 1 << bit
    with suppress(CorruptCheckpoint):
        assert Fingerprint.parse(bytes(data)).to_bytes() == bytes(data)


SPECIMEN = Fingerprint(
    model_id=ModelId(sha256(b"")),
    structure=Structure(groups=shaped([GROUPS[0]], 2).groups, layers=shaped([], 2).layers),
    behaviour=behaviour(3),
).to_bytes()


def test_a_mini_is_small_and_survives_the_wire(found: Fingerprint) -> None:
    mini = Mini.of(found)
    data = mini.to_bytes()
    assert len(data) <= MAX_MINI
    again = Mini.parse(data)
    assert again.to_bytes() == data and again.digest == mini.digest == sha256(data)
    assert (again.fingerprint, again.model_id) == (found.digest, found.model_id)
    assert again.l2 == pytest.approx(math.sqrt(sum(group.l2**2 for group in found.structure.groups)))


def test_the_bits_of_a_mini_are_the_same_on_every_machine(held: Hold) -> None:
    """Of numbers that are the same everywhere: integers, and logarithms that are rounded already."""
    ramp = ((np.arange(9000) * 2654435761 % 2_000_003 - 1_000_001) / 4096).astype(np.float32)
    arrays = {"model.embed_tokens.weight": ramp, "model.norm.weight": ramp[:64]}
    plain = behaviour(0)
    tokens = (np.arange(240, dtype=np.uint32).reshape(24, 10) * 7 % 50) + np.uint32(3)
    logs = np.tile(np.array([-0.75, -1.5, *[-3.5] * 8], np.float16), (24, 1))
    rest = np.full(24, np.float16(-2.766))
    answers = replace(plain, vocabulary=60, ids=tokens, logp=logs, rest=rest)
    made = Fingerprint(model_id=ModelId(sha256(b"")), structure=compute(held(arrays)), behaviour=answers)
    found = Mini.of(made)
    told = [found.sketch.tobytes(), found.behaviour.tobytes(), float(found.l2).hex().encode()]
    assert sha256(b"".join(told)) == "sha256:3069f5a7cec01b06c3a32d1775fba027b26f2791d37971fe6e262c735b258613"


def test_no_root_of_a_probability_lies_where_another_exp_would_round_otherwise() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    logs = every[np.isfinite(every) & (every <= 0)]
    scaled = np.exp(logs / 2) * 2.0**16
    assert np.abs(scaled - np.floor(scaled) - 0.5).min() > 1e-6


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d[:-1],
        lambda d: d + b"\0",
        lambda d: b"W" + d[1:],
        lambda d: d[:136] + np.float64(np.nan).tobytes() + d[144:],
        lambda d: d[:144] + np.float64(-0.0).tobytes() + d[152:],
        lambda d: d[:152] + np.float32(np.inf).tobytes() + d[156:],
        lambda d: d[:-2] + np.float16(np.nan).tobytes(),
        lambda d: d[:104] + bytes(32) + d[136:],
    ],
)
def test_a_hostile_mini_is_refused(change: Callable[[bytes], bytes], found: Fingerprint) -> None:
    data = Mini.of(found).to_bytes()
    assert change(data) != data
    with pytest.raises(CorruptCheckpoint):
        Mini.parse(change(data))


def test_minis_tell_how_alike_weights_and_predictions_are(held: Hold) -> None:
    base = weights(0)
    one, other = (Mini.of(fingerprint(held, seed, near=base, step=0.3)) for seed in (1, 2))
    vectors = [np.concatenate([x.ravel() for x in weights(s, near=base, step=0.3).values()]) for s in (1, 2)]
    exact = float(vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1]))
    a, b = one.sketch.astype(np.float64), other.sketch.astype(np.float64)
    assert a @ b / np.sqrt((a @ a) * (b @ b)) == pytest.approx(
        exact, abs=4 * (1 - exact**2) / math.sqrt(WIDTH)
    )
    probabilities = [behaviour(seed) for seed in (1, 2)]
    overlap = np.mean(
        [
            sum(
                math.exp((la + lb) / 2)
                for ta, la in zip(ids_a, logs_a, strict=True)
                for tb, lb in zip(ids_b, logs_b, strict=True)
                if ta == tb
            )
            for ids_a, logs_a, ids_b, logs_b in zip(
                *(x for p in probabilities for x in (p.ids.tolist(), p.logp.tolist())), strict=True
            )
        ]
    )
    told = float(one.behaviour.astype(np.float64) @ other.behaviour.astype(np.float64))
    assert told == pytest.approx(overlap, abs=4 / math.sqrt(WIDTH))


def mini(seed: int, sketch: np.ndarray, **given: Any) -> Mini:
    return Mini(
        **{
            "fingerprint": sha256(b"fingerprint %d" % seed),
            "model_id": ModelId(sha256(b"model %d" % seed)),
            "shapes": sha256(b"shapes"),
            "questions": QUESTIONS,
            "l2": 1.0,
            "largest": 1.0,
            "sketch": sketch.astype(np.float32),
            "behaviour": np.eye(WIDTH, dtype=np.float16)[seed % WIDTH],
        }
        | given
    )


DRAWN = np.random.default_rng(5).standard_normal((8, WIDTH))
BASE = mini(0, DRAWN[0])
MINE = mini(1, DRAWN[0] + 0.1 * DRAWN[1])


def test_partners_of_one_base_with_task_vectors_of_their_own_come_first() -> None:
    twin = mini(2, DRAWN[0] + 0.1 * DRAWN[1] + 0.01 * DRAWN[2])
    apart = mini(3, DRAWN[0] + 0.1 * (DRAWN[3] - DRAWN[3] @ DRAWN[1] / (DRAWN[1] @ DRAWN[1]) * DRAWN[1]))
    stranger = mini(4, DRAWN[4] + 0.6 * DRAWN[0])
    smaller = mini(5, DRAWN[5], shapes=sha256(b"others"), behaviour=MINE.behaviour)
    deaf = mini(6, DRAWN[5], shapes=sha256(b"others"), questions=None)
    found = Index([deaf, smaller, stranger, twin, apart, MINE, BASE, apart]).partners(MINE, 10, base=BASE)
    assert [partner.mini for partner in found] == [apart, twin, stranger, smaller]
    assert found[0].task == pytest.approx(0, abs=1e-6) and found[1].task > 0.9
    assert math.isnan(found[2].task) and math.isnan(found[3].weights) and found[3].behaviour == 1.0


@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_without_the_base_the_median_of_its_kin_stands_for_it(size: float) -> None:
    kin = [mini(10 + i, DRAWN[0] + 0.1 * DRAWN[i]) for i in range(1, 8)]
    twin = mini(2, DRAWN[0] + 0.1 * DRAWN[1] + 0.01 * DRAWN[2])
    made_up = mini(30, size * (DRAWN[0] - 0.1 * DRAWN[1]))
    found = {one.mini.model_id: one.task for one in Index([*kin, twin, made_up]).partners(MINE, 20)}
    assert min(found[twin.model_id], found[kin[0].model_id]) > 0.8
    assert all(abs(found[one.model_id]) < 0.6 for one in kin[1:])
    alone = Index([twin]).partners(MINE, 20)
    assert len(alone) == 1 and math.isnan(alone[0].task)


def test_nobody_hides_a_model_behind_another_mini() -> None:
    honest = mini(2, DRAWN[0] + 0.1 * DRAWN[2])
    others = [mini(10 + i, DRAWN[0] + 0.1 * (DRAWN[1] + DRAWN[i])) for i in range(3, 8)]
    hiding = [mini(2, sketch) for sketch in (DRAWN[4], -DRAWN[0], DRAWN[0] + 0.1 * DRAWN[1])]
    for told in ([honest, *others, *hiding], [*hiding, *others, honest]):
        index = Index(told)
        found = index.partners(MINE, 6, base=BASE)
        assert found[0].mini.digest == honest.digest and len(index) == 6
        assert len({partner.mini.model_id for partner in found}) == 6


def test_an_index_of_nothing_finds_nothing() -> None:
    assert Index([]).partners(MINE, 5) == ()


def test_the_order_in_which_minis_came_does_not_show() -> None:
    minis = [mini(20 + i, DRAWN[0] + 0.1 * np.roll(DRAWN[1], i)) for i in range(30)]
    first, second = Index(minis).partners(MINE, 7), Index(minis[::-1]).partners(MINE, 7)
    assert [p.mini.model_id for p in first] == [p.mini.model_id for p in second]
    assert len(first) == 7
