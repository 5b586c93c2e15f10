"""What a search looks like while it goes on: costs by generation, a heat map, the time left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from node.cli.output import escape, table

Data = dict[str, Any]

_SHOWN = 8
"""Generations that are on the screen at once."""
_LABEL, _CELL = 21, 6
"""Columns of the screen that the name of an expert and one coefficient take."""


def told(generation: Data) -> str:
    """A generation as one line."""
    return (
        f"generation {generation['number']} of {generation['of']}: best {generation['best']:.4f}, "
        f"mean {generation['mean']:.4f}, {generation['evaluated']} candidates"
    )


class Generations:
    """The generations of one search as they come, each once."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` tells seconds since whenever; the first are asked for now."""
        self._clock = clock
        self._seen: list[Data] = []
        self._left: float | None = None
        self._told_at = clock()

    def add(self, generation: Data) -> bool:
        """Take one in; False where it is the last one again."""
        if self._seen and self._seen[-1]["number"] == generation["number"]:
            return False
        now = self._clock()
        took, skipped = now - self._told_at, generation["number"] - len(self._seen) != 1
        self._told_at = now
        # Of one that was not watched from its beginning nobody knows how long it took.
        unknown = generation["replayed"] or (skipped and not self._seen)
        self._left = None if unknown else took / generation["share"] * generation["left"]
        self._seen.append(generation)
        return True

    def drawn(self, *, width: int) -> Group:
        """The last of them, for a screen of so many columns."""
        return Group(self._costs(), heat_map(self._seen[-1]["rows"], width=width))

    def _costs(self) -> Table:
        rows = [
            (f"{g['number']}/{g['of']}", f"{g['best']:.4f}", f"{g['mean']:.4f}", f"{g['share']:.0%}")
            for g in self._seen[-_SHOWN:]
        ]
        return table(self._title, ("generation", "best", "mean", "of the items"), rows)

    @property
    def _title(self) -> str:
        if self._left is None:
            return "taken up" if self._seen[-1]["replayed"] else ""
        if self._left >= 90:
            return f"about {self._left / 60:.0f} min left"
        return f"about {self._left:.0f} s left"


def heat_map(rows: Sequence[Data], *, width: int) -> Table:
    """Coefficients as numbers on colours: blue below 0, red above, the deeper the farther from it.

    Of more layers than a screen of `width` columns has room for, some are left out.
    """
    count, room = len(rows[0]["weights"]), max(1, (width - _LABEL) // _CELL)
    shown = range(count) if count <= room else [count * i // room for i in range(room)]
    drawn = Table(box=None, pad_edge=False, padding=0, header_style="dim")
    drawn.add_column("layer")
    for layer in shown:
        drawn.add_column(str(layer), justify="right")
    most = max((abs(value) for row in rows for value in row["weights"]), default=0.0) or 1.0
    for row in rows:
        label = Path(row["model"]).name or row["model"]
        cells = (_cell(row["weights"][layer], most) for layer in shown)
        drawn.add_row(escape(f"{label[: _LABEL - 1]} "), *cells)
    return drawn


def _cell(value: float, most: float) -> Text:
    depth = int(40 + 160 * min(abs(value) / most, 1.0))
    colour = f"rgb({depth},40,40)" if value >= 0 else f"rgb(40,40,{depth})"
    return Text(f"{value:5.2f} ", style=f"white on {colour}")
