"""What the references of a recipe with several merges become."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_core import recipe
from merge_core.errors import InvalidRecipe
from node.merging.references import LocalDirectory, absolute, is_local, parse_reference

ROUNDS = """
name: soup
merge_method: linear
models: [{model: ./math}, {model: code}]
parameters: {weight: 1.0}
---
merge_method: slerp
base_model: soup
models: [{model: ./math}, {model: soup}]
parameters: {t: 0.5}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("math", "code"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_directories_are_spelled_absolutely_and_results_are_not(folder: Path) -> None:
    wanted = recipe.parse(ROUNDS)
    assert is_local(wanted, folder)
    spelled = absolute(wanted, folder)
    assert spelled.models == (str(folder / "math"), str(folder / "code"))
    assert spelled.merges[-1].base == "soup"


def test_a_merge_that_is_called_as_a_directory_is_refused(folder: Path) -> None:
    (folder / "soup").mkdir()
    with pytest.raises(InvalidRecipe, match="soup is a merge of this recipe and a directory here"):
        absolute(recipe.parse(ROUNDS), folder)


def test_a_way_up_is_spelled_out_only_where_it_leads_there(folder: Path) -> None:
    (folder / "recipes").mkdir()
    (folder / "code" / "math").mkdir()
    (folder / "link").symlink_to(folder / "code" / "math")
    assert parse_reference("../math", folder / "recipes") == LocalDirectory(folder / "math")
    assert parse_reference("../math", folder / "link") == LocalDirectory(folder / "link" / ".." / "math")
