"""Plain YAML: what is read agrees with YAML 1.1 or is text, and nothing that can be written crashes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from merge_core import plain_yaml

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**18) + 1, 10**18 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029"), max_size=20)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc yn1~", max_size=4), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(VALUES)
@settings(deadline=None)
@example("2001-01-01")
@example("0x10")
@example("no")
def test_what_the_library_writes_is_read_as_it_was_meant(value: Any) -> None:
    assert plain_yaml.parse(yaml.safe_dump(value, allow_unicode=True)) == value


@pytest.mark.parametrize("word", ["1", "-0", "1.5", "-1.", ".5e+3", "yes", "OFF", "~", "", "-.INF"])
def test_a_plain_word_means_what_it_means_elsewhere(word: str) -> None:
    assert plain_yaml.parse(f"a: {word}") == yaml.safe_load(f"a: {word}")


@pytest.mark.parametrize("word", ["010", "0x1f", "0b1", "1_0", "1:30", "2001-01-01", "1e3", "9" * 19, "="])
def test_what_only_yaml_1_1_takes_for_more_than_text_is_text(word: str) -> None:
    assert plain_yaml.parse(f"a: {word}") == {"a": word}


@given(st.text(max_size=80) | st.text("!&*?:-[]{}\"'\\|>%@`~ \nu0d8aU", max_size=40))
@settings(deadline=None)
@example("[" * 3000)
@example("- " * 3000)
@example("%YAML 9.9\n---\n")
@example('"\\UFFFFFFFF"')
@example("\ud800")
def test_any_text_is_read_or_refused_with_one_line(text: str) -> None:
    try:
        plain_yaml.parse(text)
    except ValueError as error:
        assert "\n" not in str(error)


def test_an_alias_is_a_copy_and_entries_of_others_give_way_to_ones_own() -> None:
    text = "a: &a {weight: 1, density: 0.5}\nb: *a\nc: {<<: *a, weight: 2}\nd: {<<: [{x: 1}, {x: 2, y: 3}]}"
    assert plain_yaml.parse(text) == yaml.safe_load(text)
    assert plain_yaml.parse(text)["c"] == {"weight": 2, "density": 0.5}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: *b", "undefined alias"),
        ("a: &a [*a]", "recursi"),
        ("a: {<<: 3}", "takes mappings"),
        (
            "a: &a [0,0,0,0,0,0,0,0,0]\n"
            + "".join(
                f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(8)
            ),
            "counting those that aliases repeat",
        ),
    ],
)
def test_what_aliases_multiply_is_bounded(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        plain_yaml.parse(text)
