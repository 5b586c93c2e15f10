"""stdout is data, stderr is the story.

With `--json` the data is one envelope `{"schema": "weft.cli/v1", "ok": …, "data": …}` and nobody is prompted;
without it the data is what a person came for (an id, a table), and the story around it goes to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from rich import markup
from rich.console import Console
from rich.table import Table

SCHEMA = "weft.cli/v1"
WIDE = 400
MOST = 20
"""Problems that a person is shown at once."""


def escape(text: str) -> str:
    """Text that may come from anybody, for a terminal: neither our markup nor the terminal's commands."""
    return markup.escape("".join(c if c.isprintable() else "\ufffd" for c in text))


def _width(stream: TextIO) -> int | None:
    return None if stream.isatty() else WIDE


class Output:
    """Where a verb puts its result and its story. `as_json` is set once, by the entry point."""

    def __init__(self) -> None:
        self.as_json = False
        # A pipe or a log file has no right edge at which a model id would have to be broken.
        self.data_console = Console(highlight=False, emoji=False, soft_wrap=True, width=_width(sys.stdout))
        self.story_console = Console(
            stderr=True, highlight=False, emoji=False, soft_wrap=True, width=_width(sys.stderr)
        )

    def result(self, data: Any, show: Callable[[Console], None]) -> None:
        """Print the verb's one result: `data` as the envelope, or what `show` draws."""
        if self.as_json:
            sys.stdout.write(json.dumps({"schema": SCHEMA, "ok": True, "data": data}) + "\n")
            sys.stdout.flush()
        else:
            show(self.data_console)

    def failure(self, error: dict[str, Any]) -> None:
        """Print a failure: one line why, the first things that are wrong in detail, the next command."""
        if self.as_json:
            sys.stdout.write(json.dumps({"schema": SCHEMA, "ok": False, "error": error}) + "\n")
        self.say(f"[bold red]error:[/] {escape(error['why'])}")
        problems = [problem for problem in error.get("problems", ()) if problem != error["why"]]
        for problem in problems[:MOST]:
            self.say(f"  - {escape(problem)}")
        if len(problems) > MOST:
            self.say(f"  - and {len(problems) - MOST} more; --json lists all")
        if error.get("hint"):
            self.say(f"[bold]next:[/]  {escape(error['hint'])}")

    def say(self, words: str = "") -> None:
        """Tell one line of the story, in rich markup; what others wrote is passed through `escape` first."""
        self.story_console.print(words)


out = Output()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table: the first column is the name of a row, numbers are right-aligned."""
    drawn = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
    )
    body = [[str(cell) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        numeric = bool(body) and all(_is_number(row[index]) for row in body)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in body:
        drawn.add_row(*(escape(cell) for cell in row))
    return drawn


def size(count: float) -> str:
    """Bytes as a person reads them: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("-", "", 1).rstrip("%").strip().isdigit()
