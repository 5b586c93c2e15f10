"""What a merged model says to people: its recipe and its model card. Both name parents by ModelId only."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from merge_core.checkpoint.published import RECIPE_FILE
from merge_core.digest import ModelId
from merge_core.plan import MergePlan
from merge_core.recipe import Recipe, rename
from node.catalog import licences
from node.merging.parents import Parent
from node.merging.terms import together

CARD_FILE = "README.md"


def files(recipe: Recipe, plan: MergePlan, parents: Sequence[Parent], model_id: ModelId) -> dict[str, bytes]:
    """The two files, by name."""
    published = rename(recipe, {parent.reference: str(parent.model_id) for parent in parents}).to_yaml()
    return {
        RECIPE_FILE: published.encode(),
        CARD_FILE: _card(recipe, published, plan, parents, model_id).encode(),
    }


def combined_licence(parents: Sequence[Parent]) -> str:
    """The SPDX expression that satisfies every parent; NOASSERTION when one of them says nothing."""
    return together([parent.licence for parent in parents])


def _card(
    recipe: Recipe, published: str, plan: MergePlan, parents: Sequence[Parent], model_id: ModelId
) -> str:
    front = {
        "library_name": "transformers",
        "tags": ["merge", "weft"],
        "base_model": [str(parent.model_id) for parent in parents],
        "base_model_relation": "merge",
        **_licence_fields(combined_licence(parents)),
    }
    listed = "\n".join(
        f"- {'base' if position == plan.base else 'expert'} `{parent.model_id}` ({parent.licence})"
        for position, parent in enumerate(parents)
    )
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# A merge by {recipe.methods}\n\n"
        f"Model `{model_id}`, made by plan `{plan.digest}` of:\n\n{listed}\n\n"
        f"```yaml\n{published}```\n\n"
        "Anybody can re-execute this merge and compare every byte: `weft verify . --audit full`.\n"
    )


def _licence_fields(licence: str) -> dict[str, str]:
    if licence == licences.NO_LICENCE:
        return {}
    if licence in licences.KNOWN:
        return {"license": licence.lower()}
    return {"license": "other", "license_name": licence}
