"""Statistics of weights: exact ones by hand, and estimates from structures that come near them."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from merge_core.checkpoint.source import TensorSource
from merge_core.simmerge.pairs.exact import compare
from merge_core.simmerge.pairs.statistics import COLUMNS, OVERALL
from merge_core.simmerge.pairs.statistics import StructuralStatistics as Statistics
from merge_core.simmerge.pairs.structures import StructurePanel
from merge_core.simmerge.structural.sketcher import compute
from merge_core.simmerge.structural.structure import GROUPS, GroupKey, Structure

Arrays = dict[str, np.ndarray]
Hold = Callable[[Mapping[str, np.ndarray]], TensorSource]
FIELDS = tuple(Statistics.__dataclass_fields__)
ATTN = "model.layers.{}.self_attn.q_proj.weight"
MLP = "model.layers.{}.mlp.up_proj.weight"
SHAPES = {
    "model.embed_tokens.weight": (120, 64),
    "model.norm.weight": (64,),
    **{ATTN.format(layer): (80, 80) for layer in range(3)},
    **{MLP.format(layer): (160, 80) for layer in range(3)},
}


def drawn(seed: int, scale: float = 1.0) -> Arrays:
    draw = np.random.default_rng(seed)
    return {name: (scale * draw.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


def plus(*models: Arrays) -> Arrays:
    return {name: np.sum([model[name] for model in models], axis=0, dtype=np.float32) for name in SHAPES}


def family(count: int, *, seed: int, shared: float) -> tuple[Arrays, list[Arrays]]:
    """A base, and experts whose task vectors have something in common."""
    base, common = drawn(seed), drawn(seed + 1, shared)
    return base, [plus(base, common, drawn(seed + 2 + i, 0.03)) for i in range(count)]


def column(third: int, role: str) -> int:
    return GROUPS.index(GroupKey(third=third, role=role))


def both(a: Arrays, b: Arrays, base: Arrays | None, hold: Hold) -> tuple[Statistics, Statistics]:
    """Exact and estimated."""
    origin = None if base is None else compute(hold(base))
    panel = StructurePanel([compute(hold(a)), compute(hold(b))], base=origin)
    estimated = panel.pairs([0])
    told = Statistics(**{name: getattr(estimated, name)[0, 1] for name in FIELDS})
    return compare(hold(a), hold(b), None if base is None else hold(base)), told


def test_exact_statistics_are_what_their_names_say(held: Hold) -> None:
    base, (a, b) = family(2, seed=1, shared=0.02)
    found = compare(held(a), held(b), held(base))
    name, at = ATTN.format(1), column(1, "attn")
    x, y, origin = (m[name].ravel().astype(np.float64) for m in (a, b, base))
    s, t = x - origin, y - origin
    norm = np.linalg.norm
    assert found.weight_cosine[at] == pytest.approx(x @ y / norm(x) / norm(y))
    assert found.weight_distance[at] == pytest.approx(norm(x - y) / max(norm(x), norm(y)))
    assert found.weight_norm_ratio[at] == pytest.approx(norm(x) / norm(y))
    assert found.task_cosine[at] == pytest.approx(s @ t / norm(s) / norm(t))
    assert found.task_norm_ratio[at] == pytest.approx(norm(s) / norm(t))
    assert found.task_norm_a[at] == pytest.approx(norm(s) / norm(origin))
    assert found.task_norm_b[at] == pytest.approx(norm(t) / norm(origin))
    assert found.sign_agreement[at] == pytest.approx(np.mean(s * t > 0))
    tops = [set(np.argsort(-np.abs(v), kind="stable")[: len(v) // 5].tolist()) for v in (s, t)]
    assert found.overlap[at] == pytest.approx(len(tops[0] & tops[1]) / len(tops[0]), abs=1e-3)


def test_overall_is_all_groups_taken_together(held: Hold) -> None:
    base, (a, b) = family(2, seed=5, shared=0.02)
    found = compare(held(a), held(b), held(base))
    x, y = (np.concatenate([(m[n] - base[n]).ravel().astype(np.float64) for n in SHAPES]) for m in (a, b))
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert found.task_cosine[OVERALL] == pytest.approx(cosine, rel=1e-6)
    sizes = {GROUPS.index(group.key): group.elements for group in compute(held(a)).groups}
    agreed = sum(size * found.sign_agreement[i] for i, size in sizes.items()) / sum(sizes.values())
    assert found.sign_agreement[OVERALL] == pytest.approx(agreed)


def test_estimates_come_near_what_is_measured(held: Hold) -> None:
    """Over 45 pairs of three families: mean absolute errors as two thousand coordinates promise them."""
    errors: dict[str, list[float]] = {name: [] for name in FIELDS}
    for seed, shared in ((10, 0.0), (40, 0.02), (70, 0.05)):
        base, experts = family(6, seed=seed, shared=shared)
        panel = StructurePanel([compute(held(e)) for e in experts], base=compute(held(base)))
        estimated = panel.pairs(range(len(experts)))
        for i in range(6):
            for j in range(i + 1, 6):
                exact = compare(held(experts[i]), held(experts[j]), held(base))
                for name in FIELDS:
                    told, truth = getattr(estimated, name)[i, j], getattr(exact, name)
                    assert (np.isnan(told) == np.isnan(truth)).all()
                    errors[name] += np.abs(told - truth)[~np.isnan(truth)].tolist()
    means = {name: np.mean(found) for name, found in errors.items()}
    assert means["weight_cosine"] < 0.001 and means["layer_norm_ratio"] < 1e-6
    assert max(means[name] for name in ("task_cosine", "sign_agreement", "overlap")) < 0.02
    assert max(means.values()) < 0.03 and max(errors["task_cosine"]) > 0.005


def test_a_group_that_lies_in_a_structure_whole_is_not_estimated(held: Hold) -> None:
    base, (a, near) = family(2, seed=3, shared=0.02)
    b = {name: array * np.float32(1.5) for name, array in near.items()}
    exact, told = both(a, b, base, held)
    at = column(-1, "norm")
    for name in FIELDS[:-1]:
        assert getattr(told, name)[at] == pytest.approx(getattr(exact, name)[at], rel=1e-4, abs=1e-5), name


def test_pairs_are_ordered(held: Hold) -> None:
    base, (a, b) = family(2, seed=7, shared=0.02)
    panel = StructurePanel([compute(held(a)), compute(held(b))], base=compute(held(base)))
    found = panel.pairs([0, 1])
    assert found.task_norm_ratio[0, 1, OVERALL] == pytest.approx(1 / found.task_norm_ratio[1, 0, OVERALL])
    assert found.task_norm_a[0, 1, OVERALL] == found.task_norm_b[1, 0, OVERALL]
    assert found.task_cosine[0, 1, OVERALL] == pytest.approx(found.task_cosine[1, 0, OVERALL], abs=1e-6)
    assert (found.layer_norm_ratio[0, 1, 0], found.layer_norm_ratio[0, 1, 1]) == pytest.approx(
        (-found.layer_norm_ratio[1, 0, 0], found.layer_norm_ratio[1, 0, 1])
    )


@pytest.mark.parametrize("exact", [True, False])
def test_what_cannot_be_known_is_said_to_be_missing(exact: bool, held: Hold) -> None:
    base, (a, b) = family(2, seed=9, shared=0.02)

    def found(*given: Arrays | None) -> Statistics:
        return both(*given, held)[0 if exact else 1]  # type: ignore[arg-type]

    without = found(a, b, None)
    assert np.isnan(without.task_cosine).all() and np.isnan(without.overlap).all()
    assert not np.isnan(without.weight_cosine[OVERALL])
    assert np.isnan(without.weight_cosine[column(-1, "head")])
    longer = a | {"model.embed_tokens.weight": np.ones((121, 64), np.float32)}
    partly = found(longer, b, base)
    at = column(-1, "embed")
    for name in FIELDS[:-1]:
        assert np.isnan(getattr(partly, name)[at]) and not np.isnan(getattr(partly, name)[OVERALL]), name
    unchanged = found(base, b, base)
    assert np.isnan(unchanged.task_cosine).all() and np.isnan(unchanged.overlap).all()
    assert unchanged.task_norm_a[OVERALL] == 0 and np.isnan(unchanged.sign_agreement).all()
    shallow = {name: array for name, array in a.items() if "layers.2" not in name}
    assert np.isnan(found(shallow, b, base).layer_norm_ratio).all()


@pytest.mark.parametrize("exact", [True, False])
def test_coordinates_that_nobody_moved_neither_agree_nor_collide(exact: bool, held: Hold) -> None:
    """Both move one row early on, the same one, in opposite directions; later each one of its own."""
    base = drawn(11)
    a, b = ({name: array.copy() for name, array in base.items()} for _ in range(2))
    for layer, row in ((0, 5), (1, 6)):
        a[MLP.format(layer)][5] += np.float32(0.5)
        b[MLP.format(layer)][row] -= np.float32(0.5)
    found = both(a, b, base, held)[0 if exact else 1]
    at = column(0, "mlp")
    assert found.sign_agreement[at] == 0.0
    assert found.overlap[at] == 1.0
    apart, still = column(1, "mlp"), column(0, "attn")
    assert found.overlap[apart] == 0.0 and np.isnan(found.sign_agreement[apart])
    assert np.isnan(found.overlap[still]) and np.isnan(found.sign_agreement[still])
    assert found.task_cosine[at] == pytest.approx(-1, abs=1e-4)


def test_nearly_equal_models_keep_their_distance(held: Hold) -> None:
    """A millionth apart: the cosine is one less what single precision of the sketch can still tell."""
    base = drawn(12)
    near = plus(base, drawn(13, 1e-4))
    exact, told = both(base, near, None, held)
    assert exact.weight_distance[OVERALL] == pytest.approx(1e-4, rel=0.02)
    assert told.weight_distance[OVERALL] == pytest.approx(1e-4, rel=0.06)
    assert 0 < 1 - told.weight_cosine[OVERALL] < 1e-7


def test_the_type_that_one_of_two_is_stored_in_does_not_matter(held: Hold) -> None:
    values = {name: np.round(array * 8) / 8 for name, array in drawn(14).items()}
    halves = {name: array.astype(np.float16) for name, array in values.items()}
    found = compare(held(values), held(halves))
    assert found.weight_distance[OVERALL] == 0.0 and found.weight_cosine[OVERALL] == pytest.approx(1)


def test_models_of_several_shapes_share_a_panel(held: Hold) -> None:
    base, (a, b) = family(2, seed=15, shared=0.02)
    other = {name: np.ones((3, *array.shape[1:]), np.float32) for name, array in a.items()}
    panel = StructurePanel([compute(held(m)) for m in (other, a, other, b)], base=compute(held(base)))
    found = panel.pairs([1])
    assert found.weight_cosine.shape == (1, 4, COLUMNS)
    assert np.isnan(found.weight_cosine[0, [0, 2]]).all()
    alone = StructurePanel([compute(held(m)) for m in (a, b)], base=compute(held(base))).pairs([0])
    for name in FIELDS:
        assert np.allclose(getattr(found, name)[0, 3], getattr(alone, name)[0, 1], equal_nan=True), name
    unrelated = panel.pairs([0])
    assert np.isnan(unrelated.task_cosine).all()
    assert unrelated.weight_cosine[0, 2, OVERALL] == pytest.approx(1)


@pytest.mark.parametrize("size", [1, 3, 60])
def test_who_copies_the_shapes_of_others_is_compared_with_nobody(size: int, held: Hold) -> None:
    honest, other = compute(held(drawn(1))), compute(held(drawn(1)))
    copied = Structure(
        groups=tuple(
            replace(group, elements=size, sketch=group.sketch[:0], sample=group.sample[:size])
            for group in honest.groups
        ),
        layers=honest.layers,
    )
    for base in (honest, copied):
        found = StructurePanel([honest, copied, other], base=base).pairs([0])
        assert np.isnan(found.weight_cosine[0, 1]).all() and found.weight_cosine[
            0, 2, OVERALL
        ] == pytest.approx(1.0)
