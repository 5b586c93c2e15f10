"""Plans before merging: blends that stand for merges, chains that are ranked, and why one is the best."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from merge_core.checkpoint.reader import Checkpoint, measure
from merge_core.digest import sha256
from merge_core.errors import Unmergeable
from merge_core.evolution.mapped import MappedSource
from merge_core.recipe import parse
from merge_core.simmerge.choosing import plans
from merge_core.simmerge.choosing.blending import blended
from merge_core.simmerge.choosing.chains import OPERATORS, Chain
from merge_core.simmerge.choosing.forecast import Forecast
from merge_core.simmerge.choosing.plans import advise
from merge_core.simmerge.choosing.predictor import Layer, Predictor
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.functional import probes
from merge_core.simmerge.functional.behaviour import Behaviour
from merge_core.simmerge.functional.probes import ProbeSet
from merge_core.simmerge.functional.probing import observe
from merge_core.simmerge.pairs.features import NAMES
from merge_core.simmerge.structural.sketcher import compute
from merge_core.zoo.build import Zoo

FEW = ProbeSet(name="few", probes=probes.find("zoo").probes[::8])
TASKS = ("rev", "sort")


def fingerprint(directory: Path) -> Fingerprint:
    with Checkpoint.open(directory) as checkpoint:
        measured = measure(checkpoint)
        structure = compute(MappedSource(checkpoint, measured.leaves))
    behaviour = Behaviour.of(observe(directory, FEW))
    return Fingerprint(model_id=measured.manifest.model_id, structure=structure, behaviour=behaviour)


@pytest.fixture(scope="module")
def base(zoo: Zoo) -> Fingerprint:
    return fingerprint(zoo.base)


@pytest.fixture(scope="module")
def experts(zoo: Zoo) -> Mapping[str, Fingerprint]:
    return {name: fingerprint(directory) for name, directory in zoo.experts.items()}


def predictor(
    heads: Mapping[str, Mapping[str, float]], *, members: int = 1, spread: float = 0.0
) -> Predictor:
    """One linear layer: `heads` say what each feature counts for; `1` is a constant."""
    names = tuple(name for name in NAMES if any(name in head for head in heads.values())) or NAMES[:1]
    weights = np.zeros((members, len(names), len(heads)), np.float32)
    bias = np.zeros((members, len(heads)), np.float32)
    for column, head in enumerate(heads.values()):
        for name, weight in head.items():
            if name == "1":
                bias[:, column] = weight + spread * np.linspace(-1, 1, members) * (column % 2 * 2 - 1)
            else:
                weights[:, names.index(name), column] = weight
    return Predictor(
        names=names,
        operators=tuple(heads),
        centre=np.zeros(len(names), np.float32),
        spread=np.ones(len(names), np.float32),
        flags=(),
        layers=(Layer(weights=weights, bias=bias),),
        provenance={},
    )


def constant(**heads: float) -> Predictor:
    return predictor({operator: {"1": height} for operator, height in heads.items()})


def test_the_blend_of_an_average_is_the_average(
    zoo: Zoo, base: Fingerprint, experts: Mapping[str, Fingerprint], tmp_path: Path
) -> None:
    rev, sort = (load_file(zoo.experts[name] / "model.safetensors") for name in ("rev", "sort"))
    for path in zoo.base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(
        {name: (rev[name] + sort[name]) / 2 for name in rev}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    made = fingerprint(tmp_path)
    blend = blended((experts["rev"], experts["sort"]), weights=(0.5, 0.5), base=base)
    assert [group.key for group in blend.structure.groups] == [group.key for group in made.structure.groups]
    for mine, true in zip(blend.structure.groups, made.structure.groups, strict=True):
        assert np.allclose(mine.sample, true.sample, atol=1e-6)
        assert np.allclose(mine.sketch, true.sketch, atol=1e-3)
        assert mine.l2 == pytest.approx(true.l2, rel=0.05)
    assert blend.behaviour and made.behaviour and base.behaviour
    same = (blend.behaviour.ids[:, 0] == made.behaviour.ids[:, 0]).mean()
    assert same > (base.behaviour.ids[:, 0] == made.behaviour.ids[:, 0]).mean() and same > 0.8


def test_made_up_numbers_that_add_up_to_no_behaviour_leave_the_weights(
    base: Fingerprint, experts: Mapping[str, Fingerprint]
) -> None:
    def looking(model: Fingerprint, where: float) -> Fingerprint:
        assert model.behaviour
        attention = np.full_like(model.behaviour.attention, where)
        return replace(model, behaviour=replace(model.behaviour, attention=attention))

    pair = tuple(looking(experts[name], 8.0) for name in ("rev", "sort"))
    blend = blended(pair, weights=(1.0, 1.0), base=looking(base, -8.0))
    assert blend.behaviour is None and len(blend.structure.groups) == len(base.structure.groups)


def test_a_blend_of_one_model_behaves_like_that_model(
    base: Fingerprint, experts: Mapping[str, Fingerprint]
) -> None:
    rev, sort = experts["rev"], experts["sort"]
    for weights, like in (((1.0, 0.0), rev), ((0.0, 0.0), base)):
        found = blended((rev, sort), weights=weights, base=base).behaviour
        assert found and like.behaviour
        assert (found.ids[:, 0] == like.behaviour.ids[:, 0]).all()
        assert np.abs(found.logp[:, 0].astype(float) - like.behaviour.logp[:, 0]).max() < 0.1
        assert np.abs(found.entropy.astype(float) - like.behaviour.entropy).max() < 0.35


def test_models_that_were_not_run_blend_as_weights_alone(
    base: Fingerprint, experts: Mapping[str, Fingerprint]
) -> None:
    unread = replace(experts["rev"], behaviour=None)
    found = blended((unread, experts["sort"]), weights=(1.0, 1.0), base=base)
    assert found.behaviour is None and len(found.structure.groups) == len(base.structure.groups)


def test_all_chains_of_the_experts_are_ranked_and_the_best_is_a_recipe(
    base: Fingerprint, experts: Mapping[str, Fingerprint]
) -> None:
    told = constant(**dict.fromkeys(OPERATORS, 0.5) | {"ties": 0.9})
    advice = advise(experts, base=base, tasks=TASKS, predictor=told)
    assert advice.considered == len(advice.ranked) == 3 * len(OPERATORS) ** 2
    assert [scored.chain.operators for scored in advice.ranked[:3]] == [("ties", "ties")] * 3
    assert advice.ranked[3].utility == pytest.approx(0.7)
    assert advice.best.utility == pytest.approx(0.9) and advice.ranked[-1].utility == pytest.approx(0.5)
    recipe = parse(advice.best.chain.recipe(base="w0", dtype="bfloat16"))
    assert {*recipe.models} == {"w0", *experts}
    assert advise(experts, base=base, tasks=TASKS, predictor=told, least=2).considered == 75 + 15


def test_what_is_equal_is_told_apart_by_the_models_and_not_by_how_they_are_listed(
    base: Fingerprint, experts: Mapping[str, Fingerprint]
) -> None:
    told = constant(linear=0.5)
    turned = dict(reversed(experts.items()))
    best = [advise(each, base=base, tasks=TASKS, predictor=told).best.chain for each in (experts, turned)]
    ids = [experts[name].model_id for name in best[0].experts]
    assert best[0] == best[1] and ids == sorted(ids)


def test_a_pair_is_worth_the_same_in_either_order(
    base: Fingerprint, experts: Mapping[str, Fingerprint]
) -> None:
    told = predictor({"linear": {"from_base_a": 0.1, "entropy_b": 0.2}, "ties": {"task_norm_a": 1.0}})
    forecast = Forecast(experts, base=base, tasks=TASKS, predictor=told)
    for operator in told.operators:
        one, other = (
            forecast.scored(Chain(experts=pair, operators=(operator,))).utility
            for pair in (("rev", "sort"), ("sort", "rev"))
        )
        assert one == pytest.approx(other, abs=1e-6)


def test_two_are_advised_where_the_lead_is_within_its_width(
    base: Fingerprint, experts: Mapping[str, Fingerprint]
) -> None:
    pair = {name: experts[name] for name in ("rev", "sort")}
    heads = {"linear": {"1": 0.60}, "ties": {"1": 0.55}}
    sure, unsure = (predictor(heads, members=5, spread=spread) for spread in (0.0, 0.2))
    assert advise(pair, base=base, tasks=TASKS, predictor=sure).undecided == ()
    both = advise(pair, base=base, tasks=TASKS, predictor=unsure).undecided
    assert [scored.chain.operators for scored in both] == [("linear",), ("ties",)]


def test_reasons_say_which_feature_made_the_lead(
    base: Fingerprint, experts: Mapping[str, Fingerprint]
) -> None:
    pair = {name: experts[name] for name in ("rev", "sort")}
    told = predictor(
        {"linear": {"1": 0.5, "task_cosine": 0.1}, "task_arithmetic": {"1": 0.4, "agreement": 0.5, "kl": 0.0}}
    )
    advice = advise(pair, base=base, tasks=TASKS, predictor=told)
    effects = {reason.feature: reason.effect for reason in advice.reasons}
    values = {reason.feature: reason.value for reason in advice.reasons}
    assert advice.best.chain.operators == ("task_arithmetic",)
    assert advice.reasons[0].feature == "agreement" and 0 < values["agreement"] < 1
    assert effects["agreement"] == pytest.approx(0.5 * values["agreement"], abs=1e-5)
    assert effects["task_cosine"] == pytest.approx(-0.1 * values["task_cosine"], abs=1e-5)
    assert effects["kl"] == 0.0


def test_scores_of_experts_count_and_those_of_merges_are_missing(
    base: Fingerprint, experts: Mapping[str, Fingerprint]
) -> None:
    told = predictor({"linear": {"1": 0.25, "score_a": 0.25}})
    scores = {"rev": {"rev": 1.0}, "sort": {"rev": 0.6}, "brk": {"rev": 0.2}}
    forecast = Forecast(experts, base=base, tasks=("rev",), predictor=told, scores=scores)
    first = forecast.scored(Chain(experts=("rev", "sort"), operators=("linear",))).utility
    assert first == pytest.approx(0.25 + 0.25 * 0.8)
    last = forecast.scored(Chain(experts=("rev", "sort", "brk"), operators=("linear", "linear"))).utility
    assert last == pytest.approx((first + 0.25 + 0.25 * (0.0 + 0.2) / 2) / 2)


def test_of_many_experts_only_the_best_beginnings_are_followed(
    base: Fingerprint, experts: Mapping[str, Fingerprint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "EXHAUSTIVE", 2)
    monkeypatch.setattr(plans, "BEAM", 2)
    advice = advise(experts, base=base, tasks=TASKS, predictor=constant(linear=0.5, ties=0.9))
    assert advice.considered == 2 * 1 * 2
    assert {scored.chain.operators[0] for scored in advice.ranked} == {"ties"}


def test_what_cannot_be_chosen_among_is_refused(
    base: Fingerprint, experts: Mapping[str, Fingerprint]
) -> None:
    told = constant(linear=0.5)
    with pytest.raises(Unmergeable, match="1 experts"):
        advise({"rev": experts["rev"]}, base=base, tasks=TASKS, predictor=told)
    with pytest.raises(Unmergeable, match="0 tasks"):
        advise(experts, base=base, tasks=(), predictor=told)
    with pytest.raises(Unmergeable, match="ties"):
        advise(experts, base=base, tasks=TASKS, predictor=told, operators=("ties",))
    with pytest.raises(Unmergeable, match="without their base"):
        advise(experts, base=None, tasks=TASKS, predictor=told)
    with pytest.raises(Unmergeable, match="later_feature"):
        advise(experts, base=base, tasks=TASKS, predictor=replace(told, names=("later_feature",)))
    alien = replace(
        experts["rev"],
        behaviour=None,
        structure=replace(
            experts["rev"].structure,
            layers=(),
            groups=tuple(
                replace(group, shapes=sha256(b"other")) for group in experts["rev"].structure.groups
            ),
        ),
    )
    with pytest.raises(Unmergeable, match="can be compared"):
        advise({"rev": alien, "sort": experts["sort"]}, base=base, tasks=TASKS, predictor=told)
