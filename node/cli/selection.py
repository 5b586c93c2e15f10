"""Verbs that choose before anything moves, or learn from what came of it: sim, partners, outcome(s)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from node.cli import render
from node.cli.output import escape, out, size, table

if TYPE_CHECKING:
    from node.selection.candidate import Candidate

Data = dict[str, Any]

_COLUMN = 12
"""Characters of a model's name above a column."""


def register(app: typer.Typer, panel: str) -> None:
    """Hang these verbs on the command."""
    verbs: tuple[Callable[..., None], ...] = (sim, partners, outcome, outcomes)
    for verb in verbs:
        app.command(rich_help_panel=panel)(verb)


Base = Annotated[
    str | None,
    typer.Option(help="What they were trained from; else what all of them name.", show_default=False),
]
Probes = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE", show_default=False, help="Texts to compare directories on; else the settings'."
    ),
]


Tasks = Annotated[str, typer.Option(metavar="TASK,…", help="What to be good at, of the probes' tasks.")]
Learned = Annotated[
    Path | None, typer.Option(metavar="FILE", help="What was learned elsewhere, in place of what ships.")
]


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def silent(directory: Path, why: str) -> None:
    """Tell why a model is compared by its weights alone."""
    out.say(f"[dim]{escape(directory.name)} is compared by its weights alone: {escape(why)}[/]")


def sim(
    models: Annotated[list[str], typer.Argument(help="Directories, names on the shelf or of peers, ids.")],
    base: Base = None,
    probes: Probes = None,
) -> None:
    """Show how alike models are, estimated from their fingerprints: no weights move."""
    from node import app
    from node.errors import UsageError
    from node.home import Home
    from node.selection import similarity

    if len(models) < 2:
        raise UsageError("one model alone is like nothing", hint=f"weft partners {models[0]}")
    found, known = app.candidates(Home.default(), models, base=base, probes=probes, silent=silent)
    compared = similarity.compare(found, known)
    data = {
        "models": [candidate_data(candidate) for candidate in found],
        "base": candidate_data(known) if known else None,
        **compared.to_json(),
        "missing": list(compared.missing),
        "moved": sum(candidate.moved for candidate in (*found, *filter(None, [known]))),
    }
    out.result(data, lambda console: _matrices(console, data))


def partners(
    expert: Annotated[str, typer.Argument(help="A directory, a name on the shelf or of a peer, an id.")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=100, help="How many to show.")] = 10,
    tasks: Tasks = "",
    base: Base = None,
    probes: Probes = None,
    predictor: Learned = None,
) -> None:
    """Find who fits an expert best among all that is advertised: minis first, then whole fingerprints."""
    from node import app
    from node.home import Home
    from node.selection import auto, similarity

    home = Home.default()
    learned, _ = app.informed(home, app.predictor(predictor))
    mine, known, found, compared, moved = app.partners(home, expert, count, base=base, probes=probes)
    told = similarity.compare([mine, *found], known) if found else None
    rows = [
        candidate_data(other)
        | auto.best_of(mine, other, known, learned, tasks=words(tasks))
        | {name: cells[0][number] for name, cells in (told.cells if told else {}).items()}
        for number, other in enumerate(found, 1)
    ]
    rows.sort(key=lambda row: -math.inf if row["predicted"] is None else row["predicted"], reverse=True)
    data = {
        "expert": candidate_data(mine),
        "base": candidate_data(known) if known else None,
        "compared": compared,
        "missing": list(similarity.unheard([mine, *found])),
        "moved": moved + sum(candidate.moved for candidate in (mine, *found)),
        "partners": rows,
    }
    out.result(data, lambda console: _partners(console, data))


def outcome(
    directory: Annotated[Path, typer.Argument(help="A merge of two experts.")],
    tasks: Annotated[str, typer.Option(metavar="TASK,…", help="What to measure it at; as for weft eval.")],
    predictor: Learned = None,
) -> None:
    """Measure what a merge turned out to be worth, and tell the network: later plans are better for it."""
    from merge_core.simmerge.choosing.outcomes import UNIT
    from node import app
    from node.errors import UsageError
    from node.home import Home

    wanted = words(tasks)
    if not wanted:
        raise UsageError("no tasks are named", hint=f"weft outcome {directory} --tasks rev:dev")
    learned = app.predictor(predictor)
    found = app.outcome(Home.default(), directory, wanted, learned, on_event=lambda event: None)
    data = [
        {
            "task": each.task,
            "operator": each.operator,
            "utility": each.utility / UNIT,
            "plan": str(each.plan),
            "digest": str(each.digest),
        }
        for each in found
    ]
    rows = [(each.task, each.operator, f"{100 * each.utility / UNIT:.1f} %") for each in found]
    out.result(
        {"outcomes": data}, lambda console: console.print(table("", ("task", "operator", "right"), rows))
    )


def outcomes() -> None:
    """List what merges turned out to be worth, as peers and this node have measured them."""
    from merge_core.simmerge.choosing.outcomes import UNIT, Outcome
    from node.cli import follow
    from node.home import Home

    with follow.running_node(Home.default()) as node:
        records = node.outcomes()
    data = [
        {
            "author": record.author,
            "at": record.at,
            "digest": record.digest,
            "models": list(record.models),
            "task": told.task,
            "operator": told.operator,
            "utility": told.utility / UNIT,
            "judged": record.judged,
            "again": record.again,
        }
        for record in records
        for told in [Outcome.parse(record.outcome)]
    ]
    out.result({"outcomes": data}, lambda console: _outcomes(console, data))


def _outcomes(console: Console, data: list[Data]) -> None:
    if not data:
        console.print("nobody has told of a merge yet; measure one with: weft outcome DIR --tasks TASK")
        return
    rows = [
        (
            d["author"][-6:],
            " + ".join(render.short(model) for model in d["models"]) or "unknown here",
            d["operator"],
            d["task"],
            f"{100 * d['utility']:.1f} %",
            d["judged"] or "-",
        )
        for d in data
    ]
    console.print(table("", ("by", "models", "operator", "task", "right", "checked here"), rows))
    for d in data:
        if d["again"]:
            pair = " and ".join(render.short(model) for model in d["models"])
            out.say(
                f"To check one of them: merge {escape(pair)} by {escape(d['operator'])}, then:"
                f" [bold]weft outcome DIR --tasks {escape(d['task'])}:…[/]"
            )


def plan_auto(
    models: list[str],
    *,
    base: str | None,
    probes: str | None,
    tasks: list[str],
    subsets: bool,
    predictor: Path | None,
    explain: bool,
    output: Path | None,
) -> None:
    """Advise on a merge, and write its recipe."""
    from node import app
    from node.errors import UsageError
    from node.home import Home
    from node.selection import auto, similarity

    if len(models) < 2:
        raise UsageError("a merge is of two models or more", hint=f"weft partners {models[0]}")
    if output is not None:
        app.expect_writable(output)
    home = Home.default()
    found, known = app.candidates(home, models, base=base, probes=probes, silent=silent)
    if known is None:
        out.say("[yellow]mind:[/] no base is known, so operators on task vectors are left out: --base MODEL")
    learned, heard = app.informed(home, app.predictor(predictor))
    advised = auto.plan(found, known, learned, tasks=tasks, subsets=subsets)
    data = {
        "models": [candidate_data(candidate) for candidate in found],
        "base": candidate_data(known) if known else None,
        **advised.to_json(),
        "missing": list(similarity.unheard(found)),
        "outcomes": heard,
        "written": [],
        "moved": sum(candidate.moved for candidate in (*found, *filter(None, [known]))),
    }
    if output is not None:
        files = [output, output.with_stem(f"{output.stem}-2")]
        for path, text in zip(files, advised.recipes, strict=False):
            app.write(path, text)
            data["written"].append(str(path))
    out.result(data, lambda console: _advice(console, data, explain))


def _advice(console: Console, data: Data, explain: bool) -> None:
    """The recipe on stdout, unless it was written; what speaks for it on stderr."""
    best, story = data["best"], out.story_console
    out.say(f"[bold]{escape(best['chain'])}[/]")
    out.say(
        f"predicted {best['utility']:.3f} ± {best['width']:.3f} at {escape(', '.join(data['tasks']))};"
        f" {data['considered']} ways were compared"
    )
    steps = "" if len(best["experts"]) == 2 else ", the mean over its steps"
    out.say(f"[dim]to compare ways by{steps}; ± is what members of the predictor disagree by[/]")
    for why in data["missing"]:
        out.say(f"[yellow]mind:[/] {escape(why)}")
    if explain:
        rows = [
            (a["chain"], f"{a['utility']:.3f}", f"{a['width']:.3f}", f"{-a['behind']:+.3f}")
            for a in data["alternatives"]
        ]
        story.print(table("rejected", ("merge", "predicted", "±", "beside the best"), rows))
        reasons = [(r["feature"], f"{r['value']:.3f}", f"{r['effect']:+.4f}") for r in data["reasons"]]
        story.print(table("what spoke for the last operator", ("feature", "value", "for its lead"), reasons))
    if data["undecided"]:
        out.say("[yellow]mind:[/] the first two are too close to call: merge both, then: weft eval")
    if data["outcomes"]:
        out.say(f"[dim]{data['outcomes']} outcomes of earlier merges were taken into account[/]")
    moved(data["moved"])
    for path in data["written"]:
        console.print(path)
    if data["written"]:
        out.say(f"Next: [bold]weft merge {escape(data['written'][0])} -o DIR[/]")
    else:
        console.print(data["recipes"][0], markup=False, end="")


def candidate_data(candidate: Candidate) -> Data:
    """A model as `--json` tells of it."""
    return {
        "name": candidate.name,
        "model_id": str(candidate.model_id),
        "reference": candidate.reference,
        "fingerprint": str(candidate.fingerprint.digest),
        "author": candidate.author,
        "behaviour": candidate.fingerprint.behaviour is not None,
    }


def _matrices(console: Console, data: Data) -> None:
    from node.selection.similarity import MEASURES

    names = [model["name"] for model in data["models"]]
    columns = ["", *(_fits(name) for name in names)]
    for measure in MEASURES:
        cells = data["measures"][measure.name]
        if any(value is not None for row in cells for value in row):
            rows = [(name, *map(_figure, row)) for name, row in zip(names, cells, strict=True)]
            console.print(table(measure.words, columns, rows))
    for words in data["missing"]:
        out.say(f"[dim]{escape(words)}[/]")
    moved(data["moved"])


def _partners(console: Console, data: Data) -> None:
    if not data["partners"]:
        console.print("nobody advertises a model that can be compared; see: weft search")
        return
    shown = ("predicted", "task_cosine", "weight_cosine", "js")
    rows = [
        (p["name"], render.short(p["model_id"]), p["operator"] or "-", *(_figure(p[name]) for name in shown))
        for p in data["partners"]
    ]
    columns = ("name", "model id", "best by", "predicted", "task cosine", "weight cosine", "JS")
    console.print(table("", columns, rows))
    for why in data["missing"]:
        out.say(f"[dim]{escape(why)}[/]")
    out.say(f"[dim]{data['compared']} models were compared[/]")
    moved(data["moved"])


def moved(count: int) -> None:
    """Tell what it cost."""
    out.say(f"[dim]{size(count)} moved, no weights[/]")


def _fits(name: str) -> str:
    return name if len(name) <= _COLUMN else f"…{name[1 - _COLUMN :]}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
