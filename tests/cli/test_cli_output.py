"""What others wrote reaches the terminal as text: no markup of ours, no commands to the terminal."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from node.cli import render
from node.cli.output import MOST, Output, escape, size, table
from node.home import Home


# rich doubles a backslash at the very end, in case markup follows it.
@given(st.text().filter(lambda text: not text.endswith("\\")))
def test_no_control_character_survives_and_no_markup_is_obeyed(text: str) -> None:
    console = Console(file=io.StringIO(), width=10_000, color_system=None, highlight=False, emoji=False)
    console.print(escape(text), end="")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(c.isprintable() for c in shown)
    assert shown == "".join(c if c.isprintable() else "\ufffd" for c in text)


def test_a_file_name_cannot_rewrite_the_red_list() -> None:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    name = "\x1b[1A\x1b[2K\x1b[32mall good"
    report = {"checks": [{"name": "signature", "ok": False, "detail": f"not signed: {name}"}]}
    render.report(console, report)
    console.print(table("", ("name",), [[name]]))
    assert "\x1b" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_failure_says_one_problem_once_and_of_very_many_how_many(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Output().failure({"why": "it does not fit", "problems": ["it does not fit"], "hint": "weft --help"})
    assert capsys.readouterr().err.splitlines() == ["error: it does not fit", "next:  weft --help"]
    Output().failure({"why": "nothing fits", "problems": [f"tensor {n}" for n in range(MOST + 3)]})
    *_, last, end = capsys.readouterr().err.splitlines()
    assert (last, end) == (f"  - tensor {MOST - 1}", "  - and 3 more; --json lists all")


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_400_000, "2.4 MB"), (5e12, "5.0 TB")],
)
def test_sizes_are_read_by_people(count: float, words: str) -> None:
    assert size(count) == words


def test_a_home_is_private_whatever_the_umask(tmp_path: Path, weft) -> None:
    import os

    before = os.umask(0)
    try:
        assert weft("init").code == 0
    finally:
        os.umask(before)
    root = Home.default().root
    assert root.stat().st_mode & 0o077 == 0
    root.chmod(0o777)
    refused = weft("id", "show", "--json").error
    assert "others" in refused["why"] and refused["hint"] == f"chmod 700 {root}"
