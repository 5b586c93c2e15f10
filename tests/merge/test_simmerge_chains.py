"""Chains of merges: which there are, and the recipes that they are."""

import pytest

from merge_core.recipe import parse
from merge_core.simmerge.choosing.chains import OPERATORS, Chain, chains


def test_every_chain_comes_once_and_the_first_two_in_one_order() -> None:
    found = list(chains(("a", "b", "c"), ("linear", "ties")))
    assert len(found) == len(set(found)) == 3 * 2**2
    assert {chain.experts for chain in found} == {("a", "b", "c"), ("a", "c", "b"), ("b", "c", "a")}
    assert len(list(chains("abcd"))) == 12 * len(OPERATORS) ** 3


def test_a_recipe_names_its_steps_and_uses_each_in_the_next() -> None:
    chain = Chain(experts=("a", "b", "c", "d"), operators=("slerp", "linear", "ties"))
    recipe = parse(chain.recipe(base="w0", dtype="bfloat16"))
    assert [merge.method for merge in recipe.merges] == ["slerp", "linear", "ties"]
    assert [merge.name for merge in recipe.merges] == ["step-1", "step-2", None]
    assert [merge.models for merge in recipe.merges] == [("a", "b"), ("step-1", "c"), ("w0", "step-2", "d")]
    assert recipe.models == ("a", "b", "c", "w0", "d")
    assert str(chain) == "ties(linear(slerp(a, b), c), d)"


def test_in_an_average_every_expert_counts_as_much_as_the_others() -> None:
    chain = Chain(experts=("a", "b", "c", "d"), operators=("linear", "slerp", "linear"))
    _, second, last = parse(chain.recipe(base="w0", dtype="float32")).merges
    assert "t: 0.3333333333333333" in parse(chain.recipe(base="w0", dtype="float32")).to_yaml()
    assert second.base == "step-1"
    told = [part.parameters for part in last.slices[0].inputs]
    assert ["0.75" in str(told[0]), "0.25" in str(told[1])] == [True, True]


@pytest.mark.parametrize(
    ("experts", "operators"), [(("a",), ()), (("a", "b"), ()), (("a", "a"), ("linear",)), ((), ())]
)
def test_what_is_no_chain_is_refused(experts: tuple[str, ...], operators: tuple[str, ...]) -> None:
    with pytest.raises(ValueError):
        Chain(experts=experts, operators=operators)
