"""Behaviours and how they diverge: textbook formulas, estimates against measurements, bad bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from merge_core.digest import sha256
from merge_core.errors import Unmergeable
from merge_core.simmerge.functional.behaviour import FLOOR, MAX_BEHAVIOUR, Behaviour, Observation
from merge_core.simmerge.pairs.behaviours import Panel, compare, estimated
from merge_core.simmerge.pairs.divergence import MODEL, PAIR, measured
from merge_core.simmerge.pairs.features import DEV_SCORES, GROUP_OF, NAMES, PROBE_LOSS, DevScores, vector
from merge_core.simmerge.pairs.statistics import COLUMNS, PairStatistics, StructuralStatistics

POSITIONS, VOCABULARY = 60, 40


def logs(rng: np.random.Generator, near: np.ndarray | None = None, by: float = 1.0) -> np.ndarray:
    """Logarithms of distributions with few likely tokens."""
    drawn = rng.normal(size=(POSITIONS, VOCABULARY)) * (3.0 if near is None else by)
    drawn = drawn if near is None else near + drawn
    return (drawn - np.log(np.exp(drawn).sum(1, keepdims=True))).astype(np.float32)


def seen(logp: np.ndarray, seed: int = 0, layers: int = 2) -> Observation:
    rng = np.random.default_rng(seed)
    looks = rng.random(size=(layers, len(logp), 2, 9)).astype(np.float32)
    return Observation(
        probes=sha256(b"probes"),
        tokenizer=sha256(b"tokens"),
        asked=sha256(b"asked"),
        tasks=("x", "y", "unspelled"),
        task=(np.arange(len(logp)) % 3 == 0).astype(np.uint8),
        logp=logp,
        bits_per_byte=np.array([2.0, 3.0, np.nan], np.float32),
        hidden=rng.normal(size=(layers + 1, len(logp), 16)).astype(np.float32),
        attention=looks / looks.sum(-1, keepdims=True),
    )


@pytest.fixture
def family() -> list[Observation]:
    """A base, and three that have gone from it by more and more."""
    rng = np.random.default_rng(7)
    base = logs(rng)
    found = [seen(base)]
    for number, by in enumerate((0.3, 1.0, 2.0), 1):
        other = seen(logs(rng, base, by), number)
        found.append(replace(other, hidden=found[0].hidden + by * other.hidden / 2))
    return found


def of(found: Any, name: str) -> np.ndarray:
    return found.pair[..., PAIR.index(name), :]


def structural(*pairs: int, fill: float = np.nan) -> StructuralStatistics:
    names = set(StructuralStatistics.__dataclass_fields__) - {"layer_norm_ratio"}
    return StructuralStatistics(
        layer_norm_ratio=np.full((*pairs, 2), fill), **{n: np.full((*pairs, COLUMNS), fill) for n in names}
    )


def test_measured_divergences_are_those_of_the_textbook(family: list[Observation]) -> None:
    base, a, b, _ = family
    found = measured(a, b, base)
    p, q, z = (np.exp(one.logp.astype(np.float64)) for one in (a, b, base))
    middle = (p + q) / 2
    together = p * q / z / (p * q / z).sum(1, keepdims=True)
    np.testing.assert_allclose(of(found, "kl"), (p * np.log(p / q)).sum(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(of(found, "reverse_kl"), (q * np.log(q / p)).sum(1), rtol=1e-4, atol=1e-6)
    js = ((p * np.log(p / middle)).sum(1) + (q * np.log(q / middle)).sum(1)) / 2
    np.testing.assert_allclose(of(found, "js"), js, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(of(found, "agreement"), p.argmax(1) == q.argmax(1))
    np.testing.assert_allclose(
        of(found, "sum_from_b"), (q * np.log(q / together)).sum(1), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(of(found, "sum_entropy"), -(together * np.log(together)).sum(1), rtol=1e-4)
    np.testing.assert_array_equal(of(found, "sum_as_a"), together.argmax(1) == p.argmax(1))
    np.testing.assert_allclose(
        of(found, "shift_product"), (z * np.log(p / z) * np.log(q / z)).sum(1), rtol=1e-3, atol=1e-5
    )
    for task, rows in ((0, a.task == 0), (1, a.task == 1)):
        expected = [
            -(p * np.log(p)).sum(1)[rows].mean(),
            p.max(1)[rows].mean(),
            (2.0, 3.0)[task],
            (p * np.log(p / z)).sum(1)[rows].mean(),
            (z * np.log(z / p)).sum(1)[rows].mean(),
            (p.argmax(1) == z.argmax(1))[rows].mean(),
        ]
        np.testing.assert_allclose(found.a[:, task], expected, rtol=1e-4)
    assert np.isnan(found.a[:, 2]).all() and list(found.counts) == [40, 20, 0]


def test_to_swap_a_pair_swaps_its_sides(family: list[Observation]) -> None:
    base, a, b, _ = family
    one, other = measured(a, b, base), measured(b, a, base)
    for name, swapped in (("kl", "reverse_kl"), ("sum_from_a", "sum_from_b"), ("mean_as_a", "mean_as_b")):
        np.testing.assert_allclose(of(one, name), of(other, swapped), atol=1e-6)
    np.testing.assert_array_equal(one.a, other.b)
    np.testing.assert_allclose(one.layers.hidden_cosine, other.layers.hidden_cosine, atol=1e-6)


def test_without_a_base_what_needs_one_is_not_known(family: list[Observation]) -> None:
    _, a, b, _ = family
    found = measured(a, b)
    assert np.isfinite(found.pair[:9]).all() and np.isnan(found.pair[9:]).all()
    assert np.isfinite(found.a[:3, :2]).all() and np.isnan(found.a[3:]).all() and np.isnan(found.base).all()
    assert np.isnan(found.layers.hidden_task_cosine).all() and np.isfinite(found.layers.hidden_cosine).all()
    listed = [Behaviour.of(one) for one in (a, b)]
    told = estimated(listed[0], Panel.of(listed, None, key=listed[0].key))
    assert np.isfinite(told.pair[:, :9]).all() and np.isnan(told.pair[:, 9:]).all()


def test_estimates_are_near_what_is_measured(family: list[Observation]) -> None:
    base, *models = family
    told = [Behaviour.of(one) for one in models]
    panel = Panel.of(told, Behaviour.of(base), key=told[0].key)
    for a, mine in zip(models, told, strict=True):
        found = estimated(mine, panel)
        for number, b in enumerate(models):
            wanted = measured(a, b, base)
            for name, within in (("kl", 0.1), ("js", 0.01), ("agreement", 0.0), ("sum_as_a", 0.1)):
                assert abs(of(found, name)[number].mean() - of(wanted, name).mean()) <= within, name
            np.testing.assert_allclose(found.b[number, :3], wanted.b[:3], rtol=2e-3)
            layers, exact = found.layers, wanted.layers
            np.testing.assert_allclose(layers.hidden_cosine[number], exact.hidden_cosine, atol=0.1)
            np.testing.assert_allclose(layers.attention_cosine[number], exact.attention_cosine, atol=0.05)
            np.testing.assert_allclose(layers.hidden_shift_b[number], exact.hidden_shift_b, rtol=0.1)
            if a is not b:
                np.testing.assert_allclose(
                    layers.hidden_task_cosine[number], exact.hidden_task_cosine, atol=0.1
                )


def test_of_a_vocabulary_that_is_listed_whole_nothing_is_estimated() -> None:
    rng = np.random.default_rng(3)
    base = logs(rng)[:, :9]
    base -= np.log(np.exp(base).sum(1, keepdims=True))
    whole = [seen(base + rng.normal(size=(1, 9)).astype(np.float32)) for _ in range(2)]
    whole = [replace(one, logp=one.logp - np.log(np.exp(one.logp).sum(1, keepdims=True))) for one in whole]
    told = [Behaviour.of(one) for one in whole]
    found = estimated(told[0], Panel.of(told, Behaviour.of(seen(base)), key=told[0].key))
    wanted = measured(*whole, seen(base))
    np.testing.assert_allclose(found.pair[1], wanted.pair, rtol=0.02, atol=0.01)
    assert of(found, "kl")[0].max() < 1e-6


def test_models_that_were_not_asked_the_same_are_not_compared(family: list[Observation]) -> None:
    base, a, b, c = family
    other = replace(b, tokenizer=sha256(b"other"))
    with pytest.raises(Unmergeable, match="same probes"):
        measured(a, other, base)
    mine, theirs = Behaviour.of(a), [Behaviour.of(other), None, Behaviour.of(c)]
    found = estimated(mine, Panel.of(theirs, None, key=mine.key))
    assert np.isnan(found.pair[:2]).all() and np.isfinite(found.pair[2, 0]).all()
    assert np.isnan(found.layers.hidden_cosine[:2]).all() and np.isfinite(found.layers.hidden_cosine[2]).all()
    assert estimated(None, Panel.of(theirs, None, key=mine.key)).pair.shape == (3, len(PAIR), 0)


def test_layers_of_another_number_are_not_compared_and_predictions_are(family: list[Observation]) -> None:
    base, a, _, _ = family
    deep = Behaviour.of(seen(a.logp, 5, layers=3))
    mine = Behaviour.of(a)
    found = estimated(mine, Panel.of([deep, mine], Behaviour.of(base), key=mine.key))
    assert np.isnan(found.layers.hidden_cosine[0]).all() and np.isfinite(found.layers.hidden_cosine[1]).all()
    assert of(found, "kl").max() < 1e-6


def test_one_task_alone_is_that_task_of_all(family: list[Observation]) -> None:
    base, *models = family
    told = [Behaviour.of(one) for one in models]
    options = {"behaviours": told, "base": Behaviour.of(base), "key": told[0].key}
    whole, part = (estimated(told[0], Panel.of(**options, task=task)) for task in (None, "y"))
    np.testing.assert_array_equal(part.pair, whole.pair[..., whole.task == 1])
    weights = structural(3)
    for one in (part, whole):
        statistics = PairStatistics(structural=weights, functional=one)
        values, missing = vector(statistics, "y")
        np.testing.assert_allclose(
            values[:, 0], np.log(whole.pair[:, 0, whole.task == 1].mean(-1) + 1e-3), rtol=1e-5
        )
        assert not missing[:, 0].any()


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 9])
def test_what_is_compiled_gives_what_the_formulas_give(
    family: list[Observation], based: bool, vocabulary: int
) -> None:
    from merge_core.simmerge.pairs import compiled as matching

    cut = [replace(one, logp=one.logp[:, :vocabulary]) for one in family]
    cut = [replace(one, logp=one.logp - np.log(np.exp(one.logp).sum(1, keepdims=True))) for one in cut]
    base, *told = [Behaviour.of(one) for one in cut]
    options = {"base": base if based else None, "key": base.key}
    by_formula, compiled = (
        estimated(told[0], Panel.of(told, **options, how=how)) for how in (compare, matching.compare)
    )
    np.testing.assert_allclose(compiled.pair, by_formula.pair, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(compiled.b, by_formula.b, rtol=1e-3, atol=1e-4)
    assert np.isfinite(compiled.pair[:, :9]).all() and bool(np.isnan(compiled.pair[:, 9:]).any()) is not based


def test_a_panel_at_a_task_is_one_of_that_task(family: list[Observation]) -> None:
    base, *told = [Behaviour.of(one) for one in family]
    whole = Panel.of(told, base, key=base.key)
    part = estimated(told[1], whole.at("x"))
    np.testing.assert_array_equal(
        part.pair, estimated(told[1], Panel.of(told, base, key=base.key, task="x")).pair
    )
    np.testing.assert_array_equal(part.b, whole.models)
    alone = estimated(Behaviour.of(family[2]), whole)  # equal, and not one of them
    np.testing.assert_array_equal(alone.a, estimated(told[1], whole).a)


def test_a_feature_is_known_or_flagged_never_silently_zero(family: list[Observation]) -> None:
    base, a, b, _ = family
    statistics = PairStatistics(structural=structural(fill=0.5), functional=measured(a, b, base))
    values, missing = vector(statistics, "x", scores=DevScores(a=0.75))
    kinds = np.array(GROUP_OF)
    assert values.shape == missing.shape == (len(NAMES),) and values.dtype == np.float32
    assert {n for n, gone in zip(NAMES, missing, strict=True) if gone} == {
        "score_b",
        "score_base",
        "hidden_cosine.late",  # of two layers, none is in the last third
    }
    assert values[NAMES.index("score_a")] == 0.75 and not values[missing].any()
    everything, gone = vector(PairStatistics(structural=structural(), functional=measured(a, b)), "none")
    assert gone[kinds == PROBE_LOSS].all() and gone[kinds == DEV_SCORES].all() and not everything[gone].any()
    assert {n.split(".")[0] for n, lost in zip(NAMES, gone, strict=True) if not lost} == {
        "hidden_cosine",
        "attention_cosine",
    }


def test_what_is_told_of_all_tasks_is_the_mean_over_all_positions(family: list[Observation]) -> None:
    base, a, b, _ = family
    found = measured(a, b, base)
    values, _ = vector(PairStatistics(structural=structural(), functional=found))
    at = {name: number for number, name in enumerate(NAMES)}
    entropy = -(np.exp(a.logp) * a.logp).sum(1).mean()
    assert values[at["entropy_a"]] == pytest.approx(entropy, rel=1e-4)
    assert values[at["agreement"]] == pytest.approx((a.logp.argmax(1) == b.logp.argmax(1)).mean(), rel=1e-5)
    drift = np.log(found.a[MODEL.index("from_base"), :2] + 1e-3)
    told = [values[at[f"drift_a.{label}"]] for label in ("mean", "min", "max")]
    np.testing.assert_allclose(told, [drift.mean(), drift.min(), drift.max()], rtol=1e-5)
    shifts = [of(found, name).mean() for name in ("shift_product", "shift_square_a", "shift_square_b")]
    assert values[at["shift_cosine"]] == pytest.approx(shifts[0] / np.sqrt(shifts[1] * shifts[2]), rel=1e-4)
    assert values[at["kl.q90"]] == pytest.approx(np.log(np.quantile(of(found, "kl"), 0.9) + 1e-3), rel=1e-4)


def test_a_behaviour_is_read_as_it_was_described(family: list[Observation]) -> None:
    told = Behaviour.of(family[1])
    read = Behaviour.read(told.described(), told.arrays())
    assert read.key == told.key and read.tasks == told.tasks
    for name, array in told.arrays().items():
        np.testing.assert_array_equal(getattr(read, name), array)
    bare = Behaviour.of(replace(family[1], attention=np.zeros((0, POSITIONS, 0, 0), np.float32)))
    assert "attention" not in bare.arrays()
    assert not Behaviour.read(bare.described(), bare.arrays()).attention.size


def changed(arrays: Mapping[str, Any], name: str, at: Any, value: float) -> dict[str, Any]:
    copy = {key: array.copy() for key, array in arrays.items()}
    copy[name][at] = value
    return copy


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("task", 0, 3),
        ("ids", (0, 0), VOCABULARY),
        ("logp", (0, 0), 0.25),
        ("logp", (0, 0), np.nan),
        ("logp", (5, 9), -61.0),
        ("logp", (0, slice(None)), -0.5),
        ("logp", (0, 3), 0.0),
        ("rest", 0, 0.0),
        ("rest", 1, np.inf),
        ("entropy", 0, -0.5),
        ("entropy", 0, 4.0),
        ("entropy", 0, np.nan),
        ("bits_per_byte", 0, -1.0),
        ("bits_per_byte", 0, np.inf),
        ("hidden", (0, 0), np.nan),
        ("hidden", (1, 1), 9.0),
        ("hidden_norm", 0, -1.0),
        ("hidden_norm", 0, np.inf),
        ("attention", (0, 0), -9.0),
    ],
)
def test_nonsense_is_no_behaviour(family: list[Observation], name: str, at: Any, value: float) -> None:
    told = Behaviour.of(family[1])
    with pytest.raises(ValueError, match="behaviour"):
        Behaviour.read(told.described(), changed(told.arrays(), name, at, value))


def test_a_token_is_listed_once(family: list[Observation]) -> None:
    told = Behaviour.of(family[1])
    with pytest.raises(ValueError, match="tokens"):
        Behaviour.read(told.described(), changed(told.arrays(), "ids", (0, 1), int(told.ids[0, 0])))


@pytest.mark.parametrize(
    "changes",
    [
        {"vocabulary": True},
        {"vocabulary": 5},
        {"vocabulary": 1 << 32},
        {"tasks": ["x"]},
        {"tasks": ["x", "x", "y"]},
        {"tasks": ["x", "y", ""]},
        {"tasks": "xyz"},
        {"tasks": ["x", "y", 3]},
        {"probes": "sha256:0"},
        {"more": 1},
    ],
)
def test_a_description_is_read_strictly(family: list[Observation], changes: dict[str, Any]) -> None:
    told = Behaviour.of(family[1])
    with pytest.raises(ValueError, match=r"behaviour|sha256"):
        Behaviour.read(told.described() | changes, told.arrays())


def test_arrays_are_those_that_a_behaviour_has_and_no_others(family: list[Observation]) -> None:
    told = Behaviour.of(family[1])
    arrays = dict(told.arrays())
    for wrong in (
        arrays | {"more": arrays["task"]},
        {name: array for name, array in arrays.items() if name != "rest"},
        arrays | {"rest": arrays["rest"].astype(np.float32)},
        arrays | {"rest": arrays["rest"][1:]},
        arrays | {"ids": arrays["ids"][:, :9]},
        arrays | {"hidden": arrays["hidden"][:, :1000]},
        arrays | {"hidden": np.zeros((600, 64), np.float16), "hidden_norm": np.zeros(600, np.float32)},
    ):
        with pytest.raises(ValueError, match="behaviour"):
            Behaviour.read(told.described(), wrong)


def test_the_shape_of_7_billion_fits_its_share_of_a_fingerprint() -> None:
    rng = np.random.default_rng(0)
    spiky = rng.normal(size=(512, 1000)).astype(np.float32) * 2
    spiky -= np.log(np.exp(spiky).sum(1, keepdims=True))
    deep = Observation(
        probes=sha256(b""),
        tokenizer=sha256(b""),
        asked=sha256(b""),
        tasks=("x",),
        task=np.zeros(512, np.uint8),
        logp=np.maximum(spiky, FLOOR),
        bits_per_byte=np.ones(1, np.float32),
        hidden=np.ones((33, 512, 4), np.float32),
        attention=np.ones((32, 512, 1, 2), np.float32) / 2,
    )
    told = Behaviour.of(deep)
    assert told.hidden.shape == (33, 256) and told.attention.shape == (32, 128)
    assert sum(array.nbytes for array in told.arrays().values()) < MAX_BEHAVIOUR - 2048
