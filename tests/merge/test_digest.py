"""The canonical encoding: what is said has one spelling, and no spelling costs more than it is worth."""

from __future__ import annotations

import json
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core import digest
from merge_core.digest import canonical, parse_bounded, parse_canonical

LEAVES = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@given(VALUES)
def test_what_is_written_is_read_back_and_no_other_spelling_is(value: Any) -> None:
    try:
        data = canonical(value)
    except ValueError as error:
        assert "nested deeper" in str(error)
        return
    assert parse_canonical(data) == value
    spaced = json.dumps(value, indent=1).encode()
    if spaced != data:
        with pytest.raises(ValueError, match="canonical form"):
            parse_canonical(spaced)


def test_nothing_is_nested_deeper_than_anything_of_ours() -> None:
    deepest = nested(digest.MAX_DEPTH)
    assert parse_canonical(canonical(deepest)) == deepest
    for depth in (digest.MAX_DEPTH + 1, 900, 200_000):
        with pytest.raises(ValueError, match="nested deeper"):
            parse_canonical(b"[" * depth + b"0" + b"]" * depth)
    with pytest.raises(ValueError, match="nested deeper"):
        canonical([deepest])


@pytest.mark.parametrize("filler", [b"[],", b"{},", b"0,"])
def test_small_things_that_grow_in_memory_are_refused_unread(
    filler: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"[" + filler * digest.MAX_VALUES + b"0]"
    monkeypatch.delattr(digest.json, "loads")
    with pytest.raises(ValueError, match="more than 4194304 values"):
        parse_canonical(data)


def test_a_caller_who_expects_less_reads_less() -> None:
    assert parse_bounded(b"[1,2,3]", max_values=3) == [1, 2, 3]
    with pytest.raises(ValueError, match="more than 2 values"):
        parse_bounded(b"[1,2,3]", max_values=2)


TEXT = st.text(st.characters(codec="utf-8"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_the_encoding_is_that_of_the_standard(value: object) -> None:
    assert canonical(value) == rfc8785.dumps(value)


@pytest.mark.parametrize("key", ["\x7f", "é", "\uffff", "\U0001f600"])
def test_keys_are_ordered_as_the_standard_says(key: str) -> None:
    value = {key: 1, "\x80": 2, "a": 3, "\ue000": 4}
    assert canonical(value) == rfc8785.dumps(value)


@pytest.mark.parametrize("value", [2**53, -(2**53), {"a": [2**60]}])
def test_an_integer_that_others_would_round_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="2\\^53"):
        canonical(value)
