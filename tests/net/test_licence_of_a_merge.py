"""The licence of a merge: the most restrictive parent's, or several together, or a refusal."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_core.errors import Unmergeable
from node.catalog.licence_table import TABLE, licence
from node.catalog.licences import NO_LICENCE, granted, of_card, spdx
from node.domain.text import LICENCE
from node.merging.inherited import Inherited, alternatives, inherit

NAMES = [row.name for row in TABLE if not row.forbids_merging]


def of(*licences: str) -> Inherited:
    return inherit({f"model-{index}": name for index, name in enumerate(licences)})


@pytest.mark.parametrize(
    ("parents", "result"),
    [
        (("MIT", "Apache-2.0"), "Apache-2.0"),
        (("Apache-2.0", "Apache-2.0"), "Apache-2.0"),
        (("CC0-1.0", "MIT"), "MIT"),
        (("Apache-2.0", "CC-BY-4.0"), "Apache-2.0 AND CC-BY-4.0"),
        (("Apache-2.0", "CC-BY-NC-4.0"), "CC-BY-NC-4.0"),
        (("CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "MIT"), "CC-BY-NC-SA-4.0"),
        (("CC-BY-SA-3.0", "CC-BY-SA-4.0"), "CC-BY-SA-4.0"),
        (("CC-BY-SA-4.0", "CC-BY-NC-4.0"), "CC-BY-NC-4.0 AND CC-BY-SA-4.0"),
        (("LGPL-3.0-only", "GPL-3.0-only"), "GPL-3.0-only"),
        (("GPL-2.0-or-later", "GPL-3.0-or-later", "AGPL-3.0-only"), "AGPL-3.0-only"),
        (("GPL-2.0-only", "GPL-3.0-only"), "GPL-2.0-only AND GPL-3.0-only"),
        (("LicenseRef-llama3.1", "MIT"), "LicenseRef-llama3.1"),
        (("LicenseRef-llama3.1", "LicenseRef-gemma"), "LicenseRef-gemma AND LicenseRef-llama3.1"),
        (("LicenseRef-house", "MIT"), "LicenseRef-house AND MIT"),
        (("MIT AND Apache-2.0", "ISC"), "Apache-2.0"),
        (("MIT OR GPL-3.0-only",), "GPL-3.0-only OR MIT"),
        (("MIT OR GPL-3.0-only", "Apache-2.0"), "Apache-2.0 AND (GPL-3.0-only OR MIT)"),
        (("(MIT OR CC-BY-ND-4.0) AND Apache-2.0",), "Apache-2.0"),
        (("GPL-2.0-only WITH Classpath-exception-2.0",), "GPL-2.0-only WITH Classpath-exception-2.0"),
        (("MIT", NO_LICENCE), NO_LICENCE),
    ],
)
def test_a_merge_is_under_what_its_most_restrictive_parents_are(
    parents: tuple[str, ...], result: str
) -> None:
    assert of(*parents).licence == result == of(*reversed(parents)).licence


@pytest.mark.parametrize(
    "name",
    [
        "CC-BY-ND-4.0",
        "CC-BY-NC-ND-3.0",
        "CC-BY-NC-ND-4.0",
        spdx("cc-by-nd-2.0"),
        "LicenseRef-house-no-derivatives",
        "CC-BY-ND-4.0 AND MIT",
        "CC-BY-ND-4.0 OR CC-BY-NC-ND-4.0",
    ],
)
def test_a_parent_that_forbids_derivatives_is_refused_by_name(name: str) -> None:
    found = of("MIT", name, name)
    with pytest.raises(Unmergeable, match="model-1 is under") as refused:
        found.refuse()
    assert [line.split()[0] for line in refused.value.problems] == ["model-1", "model-2"]
    assert name in refused.value.why and "weft check" in refused.value.hint
    assert found.licence == NO_LICENCE


def test_a_choice_that_allows_derivatives_is_taken() -> None:
    found = of("MIT OR CC-BY-ND-4.0", "MIT")
    found.refuse()
    assert found.licence == "MIT"


def test_silence_of_a_parent_is_told() -> None:
    (warning,) = of("MIT", NO_LICENCE).warnings
    assert warning.startswith("model-1 says nothing about its licence")
    assert of("MIT", "Apache-2.0").warnings == ()


@pytest.mark.parametrize(
    ("parents", "told"),
    [
        (("GPL-2.0-only", "Apache-2.0"), "contradict each other"),
        (
            ("GPL-3.0-only", "CC-BY-NC-4.0"),
            "GPL-3.0-only allows no terms but its own; CC-BY-NC-4.0 has others",
        ),
        (("CC-BY-NC-4.0", "CC-BY-SA-4.0"), "CC-BY-SA-4.0 allows no terms but its own"),
        (("MIT", "LicenseRef-llama3.1"), 'begin the name of the merged model with "Llama"'),
        (("LicenseRef-gemma",), "Pass Google's terms"),
    ],
)
def test_what_contradicts_or_obliges_is_told_and_not_judged(parents: tuple[str, ...], told: str) -> None:
    found = of(*parents)
    found.refuse()
    assert any(told in warning for warning in found.warnings), found.warnings


@pytest.mark.parametrize(
    "parents", [("GPL-3.0-only", "Apache-2.0"), ("GPL-3.0-only", "MPL-2.0"), ("MIT", "ISC")]
)
def test_licences_that_go_together_are_not_warned_of(parents: tuple[str, ...]) -> None:
    assert of(*parents).warnings == ()


def test_what_an_advert_cannot_carry_becomes_silence_and_is_told() -> None:
    names = [f"LicenseRef-somebodys-own-terms-{index}" for index in range(4)]
    found = of(*names)
    assert found.licence == NO_LICENCE and any(names[3] in warning for warning in found.warnings)


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6))
def test_nothing_that_a_parent_demands_is_lost(parents: list[str]) -> None:
    found = of(*parents)
    if found.licence == NO_LICENCE:
        assert any("no room" in warning for warning in found.warnings)
        return
    kept = [licence(name) for name in found.licence.split(" AND ")]
    assert all(any(row.covers(licence(name)) for row in kept) for name in parents)
    assert {row.name for row in kept} <= set(parents)
    assert of(found.licence).licence == found.licence
    assert granted(found.licence, parents)


@given(st.text(max_size=96))
def test_any_text_is_an_expression_or_one_unknown_licence(text: str) -> None:
    assert all(alternatives(text))
    assert LICENCE.fullmatch(of(text).licence)


def test_the_table_names_each_licence_once_and_says_something_about_it() -> None:
    for names in ([row.name for row in TABLE], [row.hub for row in TABLE if row.hub]):
        assert len(names) == len(set(names)) > 40
    for row in TABLE:
        assert row.sentence.endswith(".") and spdx(row.name) == row.name and row.keep in (0, 1, 2), row
        assert not row.hub or spdx(row.hub) == row.name
    for weaker, stronger in pairwise(
        ["CC0-1.0", "MIT", "Apache-2.0", "GPL-3.0-or-later", "AGPL-3.0-or-later"]
    ):
        assert licence(stronger).covers(licence(weaker)) and not licence(weaker).covers(licence(stronger))


@pytest.mark.parametrize(
    "words",
    [
        "CC BY-ND 4.0",
        "cc by nc nd 4.0",
        "CC BY - ND",
        "CC_BY_ND_4.0",
        "MIT AND LicenseRef-CC--BY--ND",
        "Creative Commons Attribution-No Derivatives",
        "(CC-BY-ND-4.0 WITH nothing) AND MIT",
    ],
)
def test_however_people_write_it_a_licence_without_derivatives_forbids_a_merge(words: str) -> None:
    found = of(spdx(words), "MIT")
    assert found.problems and found.licence == NO_LICENCE


@pytest.mark.parametrize("words", ["noassertion", "(NOASSERTION)", "NoAssertion OR NOASSERTION"])
def test_nothing_said_is_nothing_said_however_it_is_written(words: str) -> None:
    found = of(words, "MIT")
    assert found.licence == NO_LICENCE
    assert any("says nothing about its licence" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    "words", ["'CC-BY-ND-4.0 AND " + "a" * 90 + "'", "[mit, cc-by-nd-4.0]", "(CC-BY-NC-ND-4.0)"]
)
def test_a_card_cannot_hide_that_it_forbids_derivatives(words: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: {words}\n---\n")
    assert of(of_card(tmp_path)).problems
