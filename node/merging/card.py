"""What a merged model says to people: its recipe, its model card and its sanity report.

All three are published, so they name parents by ModelId, or by hub id where they were downloaded from there;
never by where they lie on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from merge_core.checkpoint.published import RECIPE_FILE, REPORT_FILE
from merge_core.digest import ModelId
from merge_core.plan import MergePlan
from merge_core.recipe import Recipe, rename
from merge_core.report import Report
from node.catalog.licence_table import licence as row_of
from node.catalog.licences import NO_LICENCE
from node.merging.inherited import Inherited, alternatives
from node.merging.parents import Parent

CARD_FILE = "README.md"


def files(
    recipe: Recipe,
    plan: MergePlan,
    parents: Sequence[Parent],
    inherited: Inherited,
    model_id: ModelId,
    report: Report,
) -> dict[str, bytes]:
    """The three files, by name."""
    published = rename(recipe, {parent.reference: str(parent.model_id) for parent in parents}).to_yaml()
    front = {
        "library_name": "transformers",
        "tags": ["merge", "weft", *plan.operators],
        "base_model": list(dict.fromkeys(parent.label for parent in parents)),
        "base_model_relation": "merge",
        **licence_fields(inherited.licence),
    }
    listed = [_parent(parent, is_base=position == plan.base) for position, parent in enumerate(parents)]
    card = (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# A merge by {', '.join(plan.operators) or 'copying'}\n\n"
        f"Model `{model_id}`, made by plan `{plan.digest}` of:\n\n{_bullets(listed)}\n"
        f"## Licence\n\n{_bullets(_licence_lines(inherited))}\n"
        f"## Recipe\n\n```yaml\n{published}```\n\n"
        f"## Sanity report\n\n{_bullets(report.summary)}{_table(report)}\n"
        f"All figures are in `{REPORT_FILE}`. Anybody can re-execute this merge and compare every byte: "
        "`weft verify . --audit full`.\n"
    )
    return {RECIPE_FILE: published.encode(), CARD_FILE: card.encode(), REPORT_FILE: report.to_bytes()}


def told(report: Report, parents: Sequence[Parent]) -> dict[str, Any]:
    """What the person who merged is told of the report; here parents go by the names of their recipe."""
    names = {parent.label: parent.reference for parent in parents}
    readings = [
        {
            "model": names.get(reading.model, reading.model),
            "bits_per_byte": reading.bits_per_byte,
            "perplexity": reading.perplexity,
            "tokens": reading.tokens,
        }
        for reading in report.readings
    ]
    return {
        "lines": list(report.summary),
        "flags": list(report.flags),
        "tensors": report.tensors,
        "measured": report.measured,
        "zeros": report.zeros,
        "text": report.text,
        "readings": readings,
    }


def licence_fields(expression: str) -> dict[str, str]:
    """The front matter's fields for a licence, in the hub's words where it has one."""
    if expression == NO_LICENCE:
        return {}
    row = row_of(expression)
    if row.hub:
        return {"license": row.hub}
    fields = {"license": "other", "license_name": expression}
    if row.known and not row.name.startswith("LicenseRef-"):
        fields["license_link"] = f"https://spdx.org/licenses/{row.name}.html"
    return fields


def _parent(parent: Parent, *, is_base: bool) -> str:
    role, found = "base" if is_base else "expert", parent.on_hub
    hub = f" `{found.repository}` at `{found.revision}`:" if found else ""
    return f"{role}{hub} `{parent.model_id}` ({parent.licence})"


def _licence_lines(inherited: Inherited) -> list[str]:
    """What the result is under, what that asks for, and what to mind."""
    if inherited.licence == NO_LICENCE:
        return ["Nothing is said about the licence of this model.", *inherited.warnings]
    names = sorted(set().union(*alternatives(inherited.licence)))
    return [f"{name}: {row_of(name).sentence}" for name in names] + list(inherited.warnings)


def _table(report: Report) -> str:
    """How well the models predict a text, where that was asked for."""
    if not report.readings:
        return f"- text: {report.text}\n" if report.text else ""
    rows = "".join(
        f"| `{reading.model}` | {reading.bits_per_byte:.4f} | {reading.perplexity:.4g} |\n"
        for reading in report.readings
    )
    return f"\nPredicting {report.text}:\n\n| model | bits per byte | perplexity |\n|---|---|---|\n{rows}"


def _bullets(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)
