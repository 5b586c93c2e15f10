"""The verb that seeks: `weft evolve RECIPE --tasks … -o DIR`.

Models that all lie here are searched with in this process; others are fetched by the node, which searches as
one of its jobs. To a person both look alike: a line for each state, costs by generation and a heat map of the
coefficients, then the model's id. Ctrl-C settles for the best so far and merges that; pressed again it
interrupts (`--resume` goes on) or, where the node does the work, leaves the job to the node.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from node.cli import follow, render
from node.cli.merging import RecipeFile
from node.cli.output import escape, out, table

if TYPE_CHECKING:
    from merge_core.recipe import Recipe
    from node.home import Home
    from node.merging.evolve import Search

Data = dict[str, Any]


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
    if app.needs_no_node(home, wanted):
        data = _evolve_here(home, wanted, directory, search, resume=resume)
    else:
        asked = {**search.to_json(), "processes": processes}
        data = follow.to_the_end(
            home,
            lambda node: node.start_evolve(wanted.to_yaml(), directory, asked, resume=resume),
            settle=True,
        )
    data["search"] = _search_data(data["search"], Path(data["directory"]))
    out.result(data, lambda console: _found(console, data))


def _evolve_here(
    home: Home, recipe: Recipe, directory: Path, search: Search, *, resume: bool
) -> dict[str, Any]:
    """Search and merge in the foreground."""
    from node import app

    with render.live(out) as show:
        return app.evolve_here(
            home,
            recipe,
            directory,
            search,
            resume=resume,
            on_view=lambda view: show(render.view_data(view)),
            on_settle=lambda: out.say(follow.SETTLING),
        )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _named(text: str, *, needed: bool = False) -> tuple[str, ...]:
    """Tasks as they are named; files by where they lie, wherever the worker stands."""
    names = tuple(str(Path(n).absolute()) if n.endswith(".jsonl") else n for n in _listed(text))
    if needed and not names:
        raise typer.BadParameter("no tasks are named; write --tasks rev:dev,FILE.jsonl")
    return names


def _search_data(found: Data, directory: Path) -> Data:
    """What `--json` tells of a search: how it ended, and what lies beside the model."""
    from merge_core.checkpoint.published import RECIPE_FILE, SEARCH_FILE, read_bounded
    from merge_core.evolution.record import MAX_RECORD, Judged, SearchRecord

    record = SearchRecord.parse(read_bounded(directory / SEARCH_FILE, MAX_RECORD))

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
