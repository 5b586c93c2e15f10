"""Licences: cards as people write them, SPDX as policies need it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.catalog.licences import NO_LICENCE, granted, of_card, spdx, stated
from node.domain.text import LICENCE
from node.errors import UsageError


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("apache-2.0", "Apache-2.0"),
        ("MIT", "MIT"),
        ("gpl-3.0", "GPL-3.0-only"),
        ("llama3.1", "LicenseRef-llama3.1"),
        ("LicenseRef-house", "LicenseRef-house"),
        ("MIT OR Apache-2.0", "MIT OR Apache-2.0"),
        ("unknown", NO_LICENCE),
        ("", NO_LICENCE),
        ("\x1b[2J", "LicenseRef-2J"),
    ],
)
def test_a_licence_gets_its_spdx_name(written: str, name: str) -> None:
    assert spdx(written) == name


@given(st.text(max_size=200))
def test_whatever_is_written_becomes_something_an_advert_may_carry(text: str) -> None:
    assert LICENCE.fullmatch(spdx(text))
    assert spdx(spdx(text)) == spdx(text)


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("---\nlicense: cc-by-4.0\ntags: [x]\n---\n# Card", "CC-BY-4.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "MIT"),
        ("---\nlicense: other\nlicense_name: house-rules\n---\n", "LicenseRef-house-rules"),
        ("---\nlicense: [apache-2.0]\n---\n", "Apache-2.0"),
        ("---\nlicense: {a: b}\n---\n", NO_LICENCE),
        ("---\nlicense: !!python/object/apply:os.system ['true']\n---\n", NO_LICENCE),
        ("---\nlicense: !!bool x\n---\n", NO_LICENCE),
        ("---\nlicense: !!timestamp x\n---\n", NO_LICENCE),
        ("---\nlicense: mit\ndate: 2001-99-99\ntime: 1:30\n---\n", "MIT"),
        ("---\nlicense: 2001-99-99\n---\n", "LicenseRef-2001-99-99"),
        ("---\na: &a [x]\nb: *a\nlicense: mit\n---\n", "MIT"),
        ("# license: mit", NO_LICENCE),
        ("---\nlicense: mit", NO_LICENCE),
    ],
)
def test_a_card_states_its_licence_in_its_front_matter(tmp_path: Path, card: str, name: str) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert of_card(tmp_path) == name


def test_no_card_states_nothing(tmp_path: Path) -> None:
    assert of_card(tmp_path) == NO_LICENCE


@pytest.mark.timeout(20)
def test_a_card_that_is_no_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")
    assert of_card(tmp_path) == NO_LICENCE
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert of_card(tmp_path) == NO_LICENCE


def test_a_card_of_a_hub_cache_is_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "README.md").symlink_to(tmp_path / "blob")
    assert of_card(tmp_path) == "MIT"


def test_a_stated_licence_that_is_none_is_refused() -> None:
    assert stated("mit") == "MIT"
    with pytest.raises(UsageError):
        stated("???")


@pytest.mark.parametrize(
    ("expression", "allowed", "answer"),
    [
        ("MIT", ["mit"], True),
        ("MIT", ["Apache-2.0"], False),
        ("MIT OR GPL-3.0-only", ["MIT"], True),
        ("MIT AND GPL-3.0-only", ["MIT"], False),
        ("MIT AND ISC", ["MIT", "ISC"], True),
        ("(MIT AND GPL-3.0-only) OR ISC", ["ISC"], False),
        (NO_LICENCE, [NO_LICENCE + "-not"], False),
        (NO_LICENCE, ["*"], True),
        ("LicenseRef-house", [], False),
    ],
)
def test_an_expression_is_granted_only_when_it_can_be_satisfied(
    expression: str, allowed: list[str], answer: bool
) -> None:
    assert granted(expression, allowed) is answer
