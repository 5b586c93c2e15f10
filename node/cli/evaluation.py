"""The verb that measures: `weft eval`, models side by side."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from node.cli.output import Output, escape, out

Data = dict[str, Any]

_HELP = """Score models side by side on TASKs.

A TASK is rev:test and the like of the zoo, lm-eval:NAME, or FILE.jsonl with one item a line:

  {"prompt": "2+2=", "answer": "4"}  decoded greedily, right or wrong

  {"prompt": "2+2 is", "answer": " 4", "choices": [" 3", " 4"]}  the likeliest choice for its bytes

  {"text": "Once upon a time …"}  bits per byte

An answer follows its prompt as it stands. A line may also say "metric": exact_match, choice, bits_per_byte.
"""
_METRICS = {
    "exact_match": "exact match, %",
    "choice": "choice, %",
    "bits_per_byte": "bits per byte",
}
_SHARES = ("exact_match", "choice")
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")


def register(app: typer.Typer) -> None:
    """Hang the verb on the command."""
    app.command("eval", rich_help_panel="Experts", help=_HELP)(evaluate)


def _known_device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise typer.BadParameter(f"{text[:40]!r} is no device; write auto, cpu, cuda or cuda:1")
    return text


def evaluate(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Model directories.")],
    tasks: Annotated[str, typer.Option(metavar="TASK,…", help="What to measure.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write the scores there, as JSON.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items of each task.")] = None,
    attest: Annotated[
        bool, typer.Option("--attest", help="Sign the scores and attach them; weft verify DIR shows them.")
    ] = False,
    tasks_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="lm-eval tasks of your own; Python there is run.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Let lm-eval fetch its data.")] = False,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Let lm-eval run what a model writes: use a sandbox.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=4096, show_default="64", help="Items at once; shows in no score.")
    ] = None,
    device: Annotated[
        str, typer.Option(parser=_known_device, metavar="DEVICE", help="auto, cpu, cuda or cuda:1.")
    ] = "auto",
) -> None:
    """Score models side by side."""
    from node import app, evaluation
    from node.home import Home

    how = evaluation.Measuring(
        tasks=references(tasks),
        limit=limit,
        batch_size=batch_size,
        device=device,
        tasks_path=tasks_path,
        download=download,
        run_code=run_code,
    )
    models = evaluation.named(directories)
    if output is not None:
        app.expect_writable(output)
    with _counting(out) as on_event:
        data = app.evaluate(Home.default(), models, how, attest=attest, output=output, on_event=on_event)
    for model in data["models"]:
        if "attested" in model:
            out.say(f"Attested: [bold]weft verify {escape(model['directory'])}[/] shows it")
    if output is not None:
        out.say(f"The scores lie in [bold]{escape(str(output))}[/]")
    out.result(data, lambda console: console.print(scores(data)))


def references(text: str) -> tuple[str, ...]:
    """Tasks as a person lists them, between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def scores(data: Data) -> Table:
    """A row for each task, a column for each model, a star on the best; then means and worst tasks."""
    drawn = Table(box=None, pad_edge=False, header_style="dim")
    drawn.add_column("task")
    drawn.add_column("metric")
    drawn.add_column("items", justify="right")
    for model in data["models"]:
        drawn.add_column(escape(model["name"]), justify="right", overflow="fold")
    for row in data["tasks"]:
        drawn.add_row(escape(row["task"]), _metric(row), str(row["items"]), *_cells(row))
    for row in data["summary"]:
        drawn.add_row(f"[dim]{row['over']}[/]", _metric(row), "", *_cells(row))
    return drawn


def _metric(row: Data) -> str:
    return _METRICS.get(row["metric"]) or escape(row["metric"])


def _cells(row: Data) -> Iterator[str]:
    for place, value in enumerate(row["values"]):
        if value is None:
            yield "– "
            continue
        told = f"{100 * value:.1f}" if row["metric"] in _SHARES else f"{value:.4f}"
        yield f"[bold]{told}[/]*" if place in row["best"] else f"{told} "


@contextmanager
def _counting(output: Output) -> Iterator[Callable[[Data], None]]:
    """A bar on stderr that says which model is at which task."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        console=output.story_console,
        transient=True,
        disable=output.as_json or not sys.stderr.isatty(),
    ) as bar:
        shown = bar.add_task("opening the models", total=None)

        def follow(event: Data) -> None:
            if event["kind"] == "progress":
                what, done, total = escape(event["what"]), event["done"], event["total"]
                bar.update(shown, description=what, completed=done, total=total)

        yield follow
