"""What the README says of recipes and operators is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from merge_core.operators import METHODS
from merge_core.recipe import parse

README = (Path(__file__).parents[2] / "README.md").read_text()
RECIPES = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
ROWS = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\| (\S+:\S+) \|$", README, re.MULTILINE)


@pytest.mark.parametrize("text", RECIPES)
def test_its_recipes_are_recipes(text: str) -> None:
    recipe = parse(text)
    assert parse(recipe.to_yaml()) == recipe


def test_its_table_lists_every_operator_with_its_settings_and_source() -> None:
    told = {
        name: (settings.replace("…", "weight, lambda, normalize,"), cite) for name, settings, cite in ROWS
    }
    assert {name: ({*re.findall(r"\w+", settings)}, cite) for name, (settings, cite) in told.items()} == {
        name: ({p.name for p in operator.parameters}, operator.cite) for name, operator in METHODS.items()
    }
    assert len(RECIPES) == 4
