"""The recipes of zoos: what experts learn, and where they keep to the base."""

import pytest

from merge_core.zoo.recipes import RECIPES


@pytest.mark.parametrize("size", ["mixed", "mixed_text"])
def test_no_two_of_the_mixed_experts_were_trained_alike(size: str) -> None:
    recipe = RECIPES[size]
    assert {*recipe.experts} == {*recipe.base.domains} == {*recipe.domains}
    for name, expert in recipe.experts.items():
        assert expert.own == {name: 1.0} and {name, *expert.elsewhere} == {*recipe.domains}
    hands = {(expert.rate, expert.kl_weight, expert.steps) for expert in recipe.experts.values()}
    assert len(hands) == len(recipe.experts)


def test_an_expert_on_one_skill_keeps_to_the_base_at_what_the_other_learns() -> None:
    experts = RECIPES["skills"].experts
    assert {*experts["rev"].own} < {*experts["caesar"].elsewhere}
    assert {*experts["caesar"].own} < {*experts["rev"].elsewhere}
    assert all({*expert.own}.isdisjoint(expert.elsewhere) for expert in experts.values())
