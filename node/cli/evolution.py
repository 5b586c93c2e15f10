"""The verb that seeks: `weft evolve`, and what it looks like while it does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from node.cli import render
from node.cli.merging import RecipeFile
from node.cli.output import Output, escape, out, table

Data = dict[str, Any]

_SHOWN = 8
"""Generations that are on the screen at once."""
_LABEL, _CELL = 21, 6
"""Columns of the screen that the name of an expert and one coefficient take."""


def register(app: typer.Typer, panel: str) -> None:
    """Hang the verb on the command."""
    app.command(rich_help_panel=panel)(evolve)


def evolve(
    recipe: RecipeFile,
    directory: Annotated[Path, typer.Option("-o", "--out", help="Where the merged model goes.")],
    tasks: Annotated[
        str, typer.Option(metavar="TASK,…", help="What to be good at: rev:dev of the zoo, or FILE.jsonl.")
    ],
    report_tasks: Annotated[
        str, typer.Option(metavar="TASK,…", help="Tasks that are only reported; no item may be in --tasks.")
    ] = "",
    budget: Annotated[int, typer.Option(min=1, max=1_000_000, help="Candidates that are tried.")] = 200,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="The same seed finds the same recipe.")] = 0,
    layers: Annotated[
        int | None,
        typer.Option(min=0, show_default="up to 4", help="Points over the depth; 0: all layers alike."),
    ] = None,
    groups: Annotated[
        bool, typer.Option("--groups", help="Groups of layers in place of straight lines between points.")
    ] = False,
    operators: Annotated[
        str, typer.Option(metavar="METHOD,…", help="Choose the merge_method of each group among these.")
    ] = "",
    components: Annotated[
        bool, typer.Option(help="Tell attention, feed-forward blocks and the rest apart.")
    ] = True,
    densities: Annotated[bool, typer.Option("--densities", help="Seek densities too.")] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=256, show_default="as cores and memory allow", help="Candidates at once."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up an interrupted search.")] = False,
) -> None:
    """Seek the coefficients that merge experts best, and merge by them; Ctrl-C keeps the best so far."""
    from merge_core.evolution.genome import Shape
    from node import app
    from node.home import Home
    from node.merging.evolve import Search

    chosen = _listed(operators)
    search = Search(
        tasks=_named(tasks, needed=True),
        reported=_named(report_tasks),
        shape=Shape(
            groups=groups or bool(chosen), components=components, densities=densities, operators=chosen
        ),
        layers=layers,
        seed=seed,
        budget=budget,
        processes=processes,
    )
    home, wanted = Home.default(), app.read_recipe(recipe)
    with _watching(out) as view:
        data = app.evolve_here(
            home, wanted, directory, search, resume=resume, on_event=view, on_view=lambda _: None
        )
    data["search"] = _search_data(data["search"], Path(data["directory"]))
    out.result(data, lambda console: _found(console, data))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _named(text: str, *, needed: bool = False) -> tuple[str, ...]:
    """Tasks as they are named; files by where they lie, wherever the worker stands."""
    names = tuple(str(Path(n).absolute()) if n.endswith(".jsonl") else n for n in _listed(text))
    if needed and not names:
        raise typer.BadParameter("no tasks are named; write --tasks rev:dev,FILE.jsonl")
    return names


def _search_data(found: Data, directory: Path) -> Data:
    """What `--json` tells of a search."""
    from merge_core.checkpoint.published import RECIPE_FILE
    from merge_core.evolution.record import Judged, SearchRecord

    record = SearchRecord.parse(found["record"].encode())

    def judged(tasks: Sequence[Judged]) -> list[Data]:
        return [
            {
                "task": task.name,
                "metric": task.metric.value,
                "items": task.items,
                **{
                    who: None if reading is None else {"nats_per_byte": reading.loss, "right": reading.right}
                    for who, reading in (("base", task.base), ("start", task.start), ("found", task.found))
                },
            }
            for task in tasks
        ]

    return {
        "recipe": str(directory / RECIPE_FILE),
        "recipe_digest": record.recipe,
        "trajectory": record.trajectory,
        "seed": record.seed,
        "budget": record.budget,
        "evaluated": record.evaluated,
        "generations": found["generations"],
        "cost": found["cost"],
        "start_cost": found["start_cost"],
        "tasks": judged(record.tasks),
        "reported": judged(record.reported),
    }


def _found(console: Console, data: Data) -> None:
    """How the result does, and its id."""
    search = data["search"]
    for title, tasks in (("sought", search["tasks"]), ("reported", search["reported"])):
        if tasks:
            rows = [(t["task"], *(_reading(t[who]) for who in ("base", "start", "found"))) for t in tasks]
            out.story_console.print(table(title, ("task", "base", "start", "found"), rows))
    out.say(
        f"{search['evaluated']} of {search['budget']} candidates tried: "
        f"cost {search['start_cost']:.4f} → [bold]{search['cost']:.4f}[/]"
    )
    if search["cost"] >= search["start_cost"]:
        out.say("[yellow]mind:[/] nothing better than the recipe itself was found; try a larger --budget")
    out.say(f"The recipe: [bold]{escape(search['recipe'])}[/]")
    render.merged(console, out, data)


def _reading(reading: Data | None) -> str:
    if reading is None:
        return "-"
    loss = f"{reading['nats_per_byte']:.4f} nats/byte"
    return loss if reading["right"] is None else f"{100 * reading['right']:.1f} % right, {loss}"


@contextmanager
def _watching(output: Output) -> Iterator[Callable[[Data], None]]:
    """The live view on a terminal; a line for each generation elsewhere; silence with `--json`."""
    if output.as_json:
        yield lambda event: None
    elif not sys.stderr.isatty():
        yield lambda event: _tell(output, event)
    else:
        with Live(console=output.story_console, transient=True, refresh_per_second=4) as live:
            view = _View(live, time.monotonic)
            yield view


def _tell(output: Output, event: Data) -> None:
    if event["kind"] == "generation":
        output.say(
            f"generation {event['number']} of {event['of']}: best {event['best']:.4f}, "
            f"mean {event['mean']:.4f}, {event['evaluated']} candidates"
        )
    elif event["kind"] == "stopping":
        output.say("stopping: the best so far is merged")


class _View:
    """Best and mean cost by generation, coefficients by expert and layer, and how long it may take."""

    def __init__(self, live: Live, clock: Callable[[], float]) -> None:
        self._live = live
        self._clock = clock
        self._generations: list[Data] = []
        self._told_at = clock()
        self._live.update(Text("models are opened …", style="dim"))

    def __call__(self, event: Data) -> None:
        if event["kind"] == "generation":
            self._generations.append(event)
            now = self._clock()
            took = now - self._told_at
            left = None if event["replayed"] else took / event["share"] * event["left"]
            self._told_at = now
            self._live.update(
                Group(
                    self._costs(left),
                    heat_map(event["rows"], event["weights"], width=self._live.console.width),
                )
            )
        elif event["kind"] in ("settling", "stopping"):
            words = {"settling": "the best are asked all items …", "stopping": "stopping …"}
            self._live.update(Text(words[event["kind"]], style="dim"))

    def _costs(self, left: float | None) -> Table:
        rows = [
            (f"{g['number']}/{g['of']}", f"{g['best']:.4f}", f"{g['mean']:.4f}", f"{g['share']:.0%}")
            for g in self._generations[-_SHOWN:]
        ]
        return table(_time(left), ("generation", "best", "mean", "of the items"), rows)


def _time(left: float | None) -> str:
    if left is None:
        return "taken up"
    return f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"


def heat_map(rows: Sequence[str], weights: Sequence[Sequence[float]], *, width: int) -> Table:
    """Coefficients as numbers on colours: blue below 0, red above, the deeper the farther from it.

    Of more layers than a screen of `width` columns has room for, some are left out.
    """
    count, room = len(weights[0]), max(1, (width - _LABEL) // _CELL)
    shown = range(count) if count <= room else [count * i // room for i in range(room)]
    drawn = Table(box=None, pad_edge=False, padding=0, header_style="dim")
    drawn.add_column("layer")
    for layer in shown:
        drawn.add_column(str(layer), justify="right")
    most = max((abs(value) for row in weights for value in row), default=0.0) or 1.0
    for name, row in zip(rows, weights, strict=True):
        label = Path(name).name or name
        drawn.add_row(escape(f"{label[: _LABEL - 1]} "), *(_cell(row[layer], most) for layer in shown))
    return drawn


def _cell(value: float, most: float) -> Text:
    depth = int(40 + 160 * min(abs(value) / most, 1.0))
    colour = f"rgb({depth},40,40)" if value >= 0 else f"rgb(40,40,{depth})"
    return Text(f"{value:5.2f} ", style=f"white on {colour}")
