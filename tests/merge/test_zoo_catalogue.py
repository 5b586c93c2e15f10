"""The catalogue: drawn the same everywhere, kept on the disk, and every merge really made and scored."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from merge_core.errors import CorruptCheckpoint
from merge_core.evaluation.loading import load_model, load_tokenizer
from merge_core.evaluation.scoring import score
from merge_core.evolution.fitness import refuse_shared
from merge_core.simmerge.choosing.chains import OPERATORS, Chain
from merge_core.zoo import labels
from merge_core.zoo.build import Zoo
from merge_core.zoo.catalogue import ROLES, Catalogue, items, open_catalogue
from merge_core.zoo.labels import Labels, measure, measure_chains, sampled, utility
from merge_core.zoo.recipes import RECIPES, catalogue
from merge_core.zoo.tasks import task

LIMIT = 12


@pytest.fixture(scope="module")
def small(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """The three experts of the fixture as a catalogue."""
    directory = tmp_path_factory.mktemp("catalogue") / "zoo"
    shutil.copytree(zoo.base.parent, directory)
    return open_catalogue(directory, seed=0, size="fixture")


@pytest.fixture(scope="module")
def measured(small: Catalogue) -> Labels:
    return measure(small, limit=LIMIT)


def test_a_larger_catalogue_begins_with_the_smaller_and_every_domain_has_its_experts() -> None:
    recipe, larger = catalogue(20), catalogue(25)
    assert list(larger.experts.items())[:20] == list(recipe.experts.items())
    assert recipe == RECIPES["catalogue"] and len(recipe.experts) == 20
    for domain in recipe.base.domains:
        assert sum(domain in expert.own for expert in recipe.experts.values()) >= 4
    for expert in recipe.experts.values():
        assert sum(expert.own.values()) == 1.0
        assert {*expert.own} | {*expert.elsewhere} == {*recipe.base.domains}
        assert {*expert.own}.isdisjoint(expert.elsewhere)
    varied = [{getattr(e, name) for e in recipe.experts.values()} for name in ("steps", "rate", "kl_weight")]
    assert [len(values) for values in varied] == [3, 3, 4]


def test_the_roles_share_no_item() -> None:
    for domain in RECIPES["catalogue"].base.domains:
        asked = [task(items(role, domain)) for role in ROLES]
        for number, one in enumerate(asked):
            refuse_shared([one, task(f"{domain}:dev")], asked[number + 1 :])


def test_the_record_says_what_each_expert_was_trained_on_and_which_weights_that_gave(
    small: Catalogue, zoo: Zoo
) -> None:
    told = json.loads((small.directory / "catalogue.json").read_text())
    assert [expert["name"] for expert in told["experts"]] == list(zoo.experts)
    weights = json.loads((zoo.base.parent / "zoo.json").read_text())["weights"]
    for expert in told["experts"]:
        assert expert["weights"] == weights[expert["name"]] == small.experts[expert["name"]].weights
        assert expert["own"] == {expert["name"]: 1.0} and expert["kl_weight"] == 1.0 and expert["seed"] == 0
    assert told["items"]["final"]["rev"] == task("rev:test").digest


def test_every_pair_is_merged_by_every_operator(measured: Labels) -> None:
    pairs = [("rev", "sort"), ("rev", "brk"), ("sort", "brk")]
    assert [(m.experts, m.operator) for m in measured.merges] == [(p, o) for p in pairs for o in OPERATORS]
    for merged in measured.merges:
        assert {*merged.right} == {"labels", "final"}
        for right in merged.right.values():
            assert tuple(right) == merged.experts and all(len(marks) == LIMIT for marks in right.values())
    assert {*measured.alone} == {"base", "rev", "sort", "brk"}
    assert {*measured.alone["base"]} == {*ROLES}


def test_what_is_scored_is_the_merge(small: Catalogue, measured: Labels) -> None:
    pair = ("rev", "sort")
    merge = next(m for m in measured.merges if m.experts == pair and m.operator == "linear")
    weights = [load_file(small.experts[name].directory / "model.safetensors") for name in pair]
    model = load_model(small.base)
    model.load_state_dict({name: (a + weights[1][name]) / 2 for name, a in weights[0].items()}, strict=False)
    for domain in pair:
        found = score(model, load_tokenizer(small.base), task(items("final", domain)).first(LIMIT))
        assert merge.right["final"][domain] == "".join("01"[hit] for hit in found.hits)
    summed = next(m for m in measured.merges if m.experts == pair and m.operator == "task_arithmetic")
    assert utility(summed.right["final"]) > utility(measured.alone["base"]["final"]) + 0.3


def test_a_chain_is_merged_step_by_step(small: Catalogue) -> None:
    averaged = Chain(experts=("rev", "sort", "brk"), operators=("linear", "linear"))
    found = measure_chains(small, [averaged], limit=LIMIT)
    assert [each.chain for each in found] == [averaged]
    weights = [load_file(listed.directory / "model.safetensors") for listed in small.experts.values()]
    model = load_model(small.base)
    averages = {name: sum(each[name] for each in weights) / 3 for name in weights[0]}
    model.load_state_dict(averages, strict=False)
    for domain in ("rev", "sort", "brk"):
        scored = score(model, load_tokenizer(small.base), task(items("final", domain)).first(LIMIT))
        assert found[0].right["final"][domain] == "".join("01"[hit] for hit in scored.hits)


def test_what_was_measured_of_other_chains_is_not_taken_for_these(small: Catalogue) -> None:
    one, other = (
        Chain(experts=("rev", "sort", "brk"), operators=operators)
        for operators in (("task_arithmetic", "task_arithmetic"), ("linear", "task_arithmetic"))
    )
    assert measure_chains(small, [one], limit=4) == measure_chains(small, [one], limit=4)
    assert (
        measure_chains(small, [other, one], limit=4)[0].right
        != measure_chains(small, [one], limit=4)[0].right
    )


def test_a_merge_can_be_asked_for_what_none_of_its_experts_was_trained_on(small: Catalogue) -> None:
    pair = Chain(experts=("rev", "sort"), operators=("task_arithmetic",))
    (home,), (away,) = (measure_chains(small, [pair], limit=LIMIT, everywhere=e) for e in (False, True))
    assert {*home.right["final"]} == {"rev", "sort"} and {*away.right["final"]} == {"rev", "sort", "brk"}
    assert home.right["final"]["rev"] == away.right["final"]["rev"]
    assert utility({"brk": away.right["final"]["brk"]}) < utility(home.right["final"])


def test_the_sample_of_chains_holds_every_operator_alone_and_no_chain_twice() -> None:
    names = tuple(RECIPES["catalogue"].experts)
    found = sampled(names)
    assert found == sampled(names) and len(found) == len(set(found)) == 26 * 24
    sets = {frozenset(chain.experts) for chain in found}
    assert sorted(map(len, sets)) == [3] * 16 + [4] * 10
    for experts in sets:
        among = [chain for chain in found if set(chain.experts) == experts]
        assert {chain.operators[0] for chain in among if len(set(chain.operators)) == 1} == {*OPERATORS}


def test_a_model_alone_answers_what_it_was_trained_for(measured: Labels) -> None:
    for name in ("rev", "sort", "brk"):
        right = measured.alone[name]["final"]
        assert utility({name: right[name]}) > 0.7 > utility(measured.alone["base"]["final"])


def test_what_was_measured_is_read_and_not_measured_again(
    small: Catalogue, measured: Labels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("merged again")

    monkeypatch.setattr(labels, "workbench", never)
    assert measure(small, limit=LIMIT) == measured
    other = dataclasses.replace(small, record=small.record.replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(AssertionError, match="merged again"):
        measure(other, limit=LIMIT)


@pytest.mark.parametrize("torn", [b"", b'{"labels": {"re', b"\n"])
def test_an_interrupted_measurement_goes_on_where_it_was(
    small: Catalogue, measured: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes
) -> None:
    before = (small.directory / "labels.json").read_bytes()
    shutil.copytree(small.directory, tmp_path / "zoo")
    again = open_catalogue(tmp_path / "zoo", seed=0, size="fixture")
    (tmp_path / "zoo" / "labels.json").unlink()
    told: list[int] = []

    def interrupt(what: str, done: int, total: int) -> None:
        told.append(done)
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(again, limit=LIMIT, on_progress=interrupt)
    (begun,) = (tmp_path / "zoo").glob(".labels*")
    with begun.open("ab") as file:
        file.write(torn)

    def never(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(labels._Examiner, "alone", never)
    assert measure(again, limit=LIMIT, on_progress=lambda what, done, total: told.append(done)) == measured
    assert told == [*range(7), *range(6, 4 + len(measured.merges))]
    assert (tmp_path / "zoo" / "labels.json").read_bytes() == before
    assert not begun.exists()


def test_a_catalogue_with_an_altered_expert_is_not_opened(small: Catalogue, tmp_path: Path) -> None:
    shutil.copytree(small.directory, tmp_path / "zoo")
    path = tmp_path / "zoo" / "sort" / "model.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(CorruptCheckpoint, match="sort were altered"):
        open_catalogue(tmp_path / "zoo", seed=0, size="fixture")


def test_utility_is_the_mean_over_domains() -> None:
    assert utility({"rev": "1111", "sort": "10"}) == 0.75
