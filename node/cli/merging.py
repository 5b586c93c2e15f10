"""Verbs that make models of models: check, plan, merge."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.cli import follow, render
from node.cli.output import out
from node.cli.selection import Base, Learned, Probes, Tasks, plan_auto, words

if TYPE_CHECKING:
    from merge_core.recipe import Recipe
    from node.home import Home
    from node.merging.how import How

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)")


def register(app: typer.Typer, panel: str) -> None:
    """Hang these verbs on the command."""
    verbs: tuple[Callable[..., None], ...] = (check, plan, merge)
    for verb in verbs:
        app.command(rich_help_panel=panel)(verb)


def bytes_of(text: str) -> int:
    """A number of bytes as people write it: 512MB, 1.5GiB, 4000000."""
    found = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise typer.BadParameter(f"{text[:40]!r} is no size; write it as 512MB or 2GiB")
    return int(float(found[1]) * unit)


RecipeFile = Annotated[Path, typer.Argument(help="A mergekit YAML file.")]


def check(recipe: RecipeFile) -> None:
    """Tell whether models on this machine can be merged, and what it takes; nothing is hashed or asked."""
    from node import app
    from node.home import Home

    checked = app.check_here(Home.default(), app.read_recipe(recipe))
    data, error = checked.to_json(), checked.error()
    if error is None:
        out.result(data, lambda console: render.checked(console, data))
        return
    render.checked(out.story_console, data | {"problems": []})  # the error lists them
    error.problems = checked.problems  # type: ignore[union-attr]
    error.report = data  # type: ignore[union-attr]
    raise error


def plan(
    models: Annotated[
        list[str], typer.Argument(metavar="RECIPE | MODEL…", help="A recipe; with --auto the models.")
    ],
    auto: Annotated[
        bool, typer.Option("--auto", help="Choose operators and order by the models' fingerprints.")
    ] = False,
    tasks: Tasks = "",
    subsets: Annotated[
        bool, typer.Option("--subsets", help="With --auto: leave out models where that looks better.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="With --auto: what was rejected, and what each feature said.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="With --auto: write the recipe here.")
    ] = None,
    base: Base = None,
    probes: Probes = None,
    predictor: Learned = None,
) -> None:
    """Resolve a recipe and show its cost; or write one, with --auto. No weights move."""
    from node.errors import UsageError

    if auto:
        plan_auto(
            models,
            base=base,
            probes=probes,
            tasks=words(tasks),
            subsets=subsets,
            predictor=predictor,
            explain=explain,
            output=output,
        )
        return
    for flag, given in (
        ("--tasks", tasks),
        ("--subsets", subsets),
        ("--explain", explain),
        ("-o", output),
        ("--base", base),
        ("--probes", probes),
        ("--predictor", predictor),
    ):
        if given:
            raise UsageError(f"{flag} goes with --auto", hint=f"weft plan --auto {flag} … A B")
    if len(models) > 1:
        raise UsageError("one recipe is planned at a time", hint=f"weft plan --auto {' '.join(models)}")
    resolve(Path(models[0]))


def resolve(recipe: Path) -> None:
    """Show what a recipe would read, move, need and write."""
    from node import app
    from node.home import Home

    home, wanted = Home.default(), app.read_recipe(recipe)
    if app.needs_no_node(home, wanted):
        data = app.plan_here(home, wanted)
    else:
        data = follow.ask(home, lambda node: node.plan(wanted.to_yaml()))
    out.result(data, lambda console: render.plan(console, data))


def merge(
    recipe: RecipeFile,
    directory: Annotated[Path, typer.Option("-o", "--out", help="Where the merged model goes.")],
    publish: Annotated[str, typer.Option(help="Share the result under this name.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Take up an interrupted merge.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, max=256, show_default="2", help="Threads that compute.")
    ] = None,
    max_memory: Annotated[
        int | None,
        typer.Option(parser=bytes_of, metavar="SIZE", help="What the merge may take of memory: 512MB, 2GiB."),
    ] = None,
    perplexity: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Then see how well the models predict this text.")
    ] = None,
) -> None:
    """Merge experts as RECIPE says, and print the new model's id."""
    from node import app
    from node.home import Home

    if dry_run:
        resolve(recipe)
        return
    home, wanted = Home.default(), app.read_recipe(recipe)
    how = app.how(threads=threads, max_memory=max_memory, perplexity=perplexity)
    if app.needs_no_node(home, wanted):
        data = _merge_here(home, wanted, directory, publish, how, resume=resume)
    else:
        text = wanted.to_yaml()
        data = follow.to_the_end(
            home,
            lambda node: node.start_merge(
                text, directory, publish_as=publish, how=how.to_json(), resume=resume
            ),
        )
    out.result(data, lambda console: render.merged(console, out, data))


def _merge_here(
    home: Home, recipe: Recipe, directory: Path, publish: str, how: How, *, resume: bool
) -> dict[str, Any]:
    """Merge in the foreground, and share the result where that is wanted."""
    from node import app

    if publish:
        app.identity(home)  # without one nothing can be shared: say so before the work
    with render.live(out) as show:
        data = app.merge_here(
            home, recipe, directory, how=how, resume=resume, on_view=lambda view: show(render.view_data(view))
        )
    if publish:
        app.add(home, Path(data["directory"]), name=publish, licence=None, on_progress=lambda count: None)
        app.announce_if_running(home)
    return data
