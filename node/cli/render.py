"""How results look to a person: plain tables on stdout, a live line for long work on stderr.

Every function takes the data that `--json` prints, so that the two can never disagree.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.tree import Tree

from node.cli.output import Output, escape, size, table
from node.cli.searching import Generations, told

if TYPE_CHECKING:
    from node.catalog.expert import Expert
    from node.jobs.runner import JobView
    from node.provenance.lineage import Lineage

Data = dict[str, Any]
Show = Callable[[Data], None]

_WORDS = {
    "queued": "waiting to start",
    "waiting_for_peers": "waiting for peers",
    "fetching": "fetching",
    "searching": "searching",
    "merging": "merging",
    "verifying": "verifying",
}


_FAULTS = {"": "-", "found": "FALSE", "said": "false, some say", "refuted": "true, checked here"}
"""What is said of fingerprints: as this node found, or as others say."""


@contextmanager
def live(out: Output) -> Iterator[Show]:
    """What a job does, on stderr for as long as it takes: one line for each state that it enters.

    On a terminal there is also a bar for the step at hand, or what a search has found.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(compact=True),
        console=out.story_console,
    )
    if out.as_json or not sys.stderr.isatty():
        yield _Follower(out, bar, None)
        return
    with Live(bar, console=out.story_console, transient=True, refresh_per_second=4) as screen:
        yield _Follower(out, bar, screen)


@contextmanager
def hashing(out: Output, what: str) -> Iterator[Callable[[int], None]]:
    """A counter of bytes on stderr for as long as something is hashed, possibly by several threads."""
    with Progress(
        TextColumn("{task.description}"),
        TextColumn("{task.fields[amount]}"),
        console=out.story_console,
        transient=True,
        disable=out.as_json or not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task(escape(what), total=None, amount="")

        def count(more: int) -> None:
            bar.advance(task, more)
            bar.update(task, amount=size(bar.tasks[task].completed))

        yield count


class _Follower:
    """Tell a job's story: one line a state, and on a screen the step at hand."""

    def __init__(self, out: Output, bar: Progress, screen: Live | None) -> None:
        self._out = out
        self._bar = bar
        self._screen = screen
        self._task: TaskID = bar.add_task("", total=None, amount="")
        self._told = ""
        self._generations = Generations(time.monotonic)

    def __call__(self, job: Data) -> None:
        state = str(_WORDS.get(job["state"], job["state"]))
        words = f"{state}: {job['waiting_on']}" if job["waiting_on"] else state
        if words != self._told and job["state"] in _WORDS:
            self._told = words
            self._out.say(f"[dim]·[/] {escape(words)}")
            self._show_bar()
        if job.get("progress"):
            self._advance(job["progress"])
        if job.get("generation") and self._generations.add(job["generation"]):
            if self._screen is None:
                self._out.say(told(job["generation"]))
            else:
                self._screen.update(self._generations.drawn(width=self._out.story_console.width))

    def _advance(self, progress: Data) -> None:
        done, total = progress["done"], progress["total"]
        self._bar.update(
            self._task,
            description=escape(progress["what"]),
            completed=done,
            total=total or None,
            amount=f"{size(done)} of {size(total)}" if total else "",
        )
        self._show_bar()

    def _show_bar(self) -> None:
        if self._screen is not None:
            self._screen.update(self._bar)


def view_data(view: JobView) -> Data:
    """A job of this process as the data that `live` shows."""
    progress = view.progress
    return {
        "state": view.job.state.value.lower(),
        "waiting_on": view.job.waiting_on,
        "progress": None
        if progress is None
        else {"what": progress.what, "done": progress.done, "total": progress.total},
        "generation": view.generation,
    }


def status(console: Console, data: Data) -> None:
    """Who the node is and how it does."""
    rows = [
        ("peer id", data["peer_id"]),
        ("network", data["network"]),
        *(("address", address) for address in data["addresses"]),
        ("peer port", data["peer_api"]),
        ("peers", data["peers"]),
        ("experts", data["experts"]),
        ("jobs running", data["jobs_running"]),
        ("up", _duration(data["up_seconds"])),
        ("home", data["home"]),
        ("pid", data["pid"]),
    ]
    _pairs(console, rows)


def peers(console: Console, rows: list[Data]) -> None:
    """One line a peer."""
    if not rows:
        console.print("no peers yet; another node joins with the ticket of: weft invite")
        return
    console.print(
        table(
            "",
            ("peer", "direction", "round trip", "experts", "fingerprints", "address"),
            (
                (
                    p["peer_id"],
                    p["direction"],
                    f"{p['latency_ms']:.1f} ms" if p["latency_ms"] >= 0 else "-",
                    p["experts"],
                    _FAULTS[p["fault"]],
                    (p["addresses"] or ["-"])[0],
                )
                for p in rows
            ),
        )
    )


def experts(console: Console, rows: list[Data]) -> None:
    """One line an expert, with who holds it."""
    if not rows:
        console.print("nothing found; share an expert with: weft add DIR")
        return
    console.print(
        table(
            "",
            ("name", "model id", "architecture", "licence", "size", "fingerprint", "holders"),
            (
                (
                    e["name"],
                    short(e["model_id"]),
                    e["architecture"],
                    e["licence"],
                    size(e["size"]),
                    _FAULTS[e["fault"]],
                    _holders(e),
                )
                for e in rows
            ),
        )
    )


def expert_data(expert: Expert) -> Data:
    """An expert on this node's shelf as data."""
    return {
        "model_id": expert.model_id,
        "name": expert.name,
        "licence": expert.licence,
        "architecture": expert.architecture,
        "size": expert.size,
        "publisher": expert.publisher,
        "fingerprint": expert.fingerprint,
        "origin": expert.origin.value,
        "intact": not expert.changed,
    }


def shelf(console: Console, rows: list[Data]) -> None:
    """One line an expert that this node holds."""
    if not rows:
        console.print("nothing shared yet; share an expert with: weft add DIR")
        return
    body = (
        (e["name"], short(e["model_id"]), e["architecture"], e["licence"], size(e["size"]), e["origin"])
        for e in rows
    )
    console.print(table("", ("name", "model id", "architecture", "licence", "size", "origin"), body))


def short(model_id: str) -> str:
    """Enough of an id to tell it from others and to type it; `--json` has all of it."""
    return model_id[:19]


def _holders(expert: Data) -> str:
    names = ["this node"] * bool(expert["local"]) + [peer[-6:] for peer in expert["holders"]]
    return ", ".join(names)


def checked(console: Console, data: Data) -> None:
    """What a merge of models on this machine would take, and whether they go together."""
    rows = (
        (
            m["reference"],
            m["hub"] or "-",
            m["licence"] if m["here"] else "-",
            size(m["size"]) if m["here"] else "?",
        )
        for m in data["models"]
    )
    console.print(table("", ("model", "hub", "licence", "size"), rows))
    if data["tensors"]:
        _pairs(console, [("operator", data["operator"]), ("licence", data["licence"]), *_cost(data)])
    _mind(console, data["warnings"])
    if data["ok"]:
        console.print("[green]They can be merged.[/]")


def plan(console: Console, data: Data) -> None:
    """What a merge would read, move, need and write."""
    rows = (
        (
            i["role"],
            i["reference"],
            short(i["model_id"]),
            i["licence"],
            size(i["size"]),
            "here" if i["local"] else ", ".join(p[-6:] for p in i["holders"]) or "nobody",
        )
        for i in data["inputs"]
    )
    console.print(table("", ("role", "model", "model id", "licence", "size", "where"), rows))
    named = [("plan", data["plan"]), ("operator", data["operator"]), ("licence", data["licence"])]
    _pairs(console, [*named, *_cost(data)])
    _mind(console, data["warnings"])


def _cost(data: Data) -> list[tuple[str, object]]:
    return [
        ("tensors", data["tensors"]),
        ("to read", size(data["read_bytes"])),
        ("to fetch", size(data["fetch_bytes"])),
        ("to write", size(data["output_bytes"])),
        ("peak memory", size(data["peak_ram_bytes"])),
    ]


def _mind(console: Console, warnings: Iterable[str]) -> None:
    for warning in warnings:
        console.print(f"[yellow]mind:[/] {escape(warning)}")


def merged(console: Console, out: Output, data: Data) -> None:
    """The new model's id on stdout; what it looks like and what to do with it on stderr."""
    _mind(out.story_console, data["warnings"])
    _sanity(out, data["report"])
    out.say(f"The merged model lies in [bold]{escape(data['directory'])}[/]")
    if data.get("signed") is False:
        out.say("It is [yellow]unsigned[/]: there is no identity here. To sign: weft init, then merge again")
    out.say(f"Check it: [bold]weft verify {escape(data['directory'])} --audit full[/]")
    console.print(data["model_id"])


def _sanity(out: Output, report: Data) -> None:
    norms, verdict = report["lines"]
    out.say(escape(norms))
    out.say(f"[yellow]mind:[/] {escape(verdict)}" if report["flags"] else escape(verdict))
    if report["readings"]:
        rows = (
            (r["model"], f"{r['bits_per_byte']:.4f}", f"{r['perplexity']:.4g}", r["tokens"])
            for r in report["readings"]
        )
        out.story_console.print(table("", ("model", "bits per byte", "perplexity", "tokens"), rows))
    if report["text"]:
        out.say(f"[dim]{escape(report['text'])}[/]")


def jobs(console: Console, rows: list[Data]) -> None:
    """One line a job."""
    if not rows:
        console.print("no jobs; start one with: weft merge RECIPE -o DIR")
        return
    body = ((j["id"][:8], j["kind"], j["state"], j["waiting_on"] or "-", j["subject"]) for j in rows)
    console.print(table("", ("job", "kind", "state", "waiting on", "subject"), body))


def job(console: Console, data: Data) -> None:
    """Where one job stands."""
    rows = [
        (key, data[key]) for key in ("id", "kind", "state", "waiting_on", "subject", "directory", "model_id")
    ]
    _pairs(console, [(key, value) for key, value in rows if value])


def report(console: Console, data: Data) -> None:
    """The green and red list of a verification."""
    marks = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[yellow]![/]"}
    for check in data["checks"]:
        console.print(f"{marks[check['ok']]} {escape(check['name'])}  [dim]{escape(check['detail'])}[/]")


def lineage(model: Lineage) -> Tree:
    """A family tree, the model at the top and its parents below."""
    tree = Tree(_ancestor(model))
    _grow(tree, model)
    return tree


def _grow(tree: Tree, model: Lineage) -> None:
    for parent in model.parents:
        _grow(tree.add(_ancestor(parent)), parent)


def _ancestor(model: Lineage) -> str:
    words = [
        model.role,
        short(model.model_id),
        *model.operators,
        model.licence,
        model.origin.value,
        model.detail,
    ]
    return escape("  ".join(word for word in words if word))


def _pairs(console: Console, rows: Iterable[tuple[str, object]]) -> None:
    for key, value in rows:
        console.print(f"{key:<14}{escape(str(value))}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
