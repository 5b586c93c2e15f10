"""Verbs that need no running node: init, id, add, ls, rm, verify, lineage, doctor, version."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from node.cli import follow, render
from node.cli.output import escape, out, table

if TYPE_CHECKING:
    from node.provenance.verify import Report

identity_verbs = typer.Typer(help="Show, back up or restore who this node is.")


def register(app: typer.Typer) -> None:
    """Hang these verbs on the command."""
    app.add_typer(identity_verbs, name="id", rich_help_panel="This node")
    panels: dict[str, tuple[Callable[..., None], ...]] = {
        "This node": (init, doctor, version),
        "Experts": (add, ls, rm),
        "Provenance": (verify, lineage),
    }
    for panel, verbs in panels.items():
        for verb in verbs:
            app.command(rich_help_panel=panel)(verb)


def init() -> None:
    """Make an identity and a configuration, and say how to back them up."""
    from node import app, config
    from node.home import Home

    home = Home.default()
    identity = app.initialise(home, now=time.time())
    data = {
        "peer_id": identity.peer_id,
        "publisher": identity.publisher.key_id,
        "home": str(home.root),
        "network": config.load(home.config).network,
    }
    out.say(f"This node keeps its things in {home.root}")
    out.say("Back up who it is, somewhere safe: [bold]weft id export weft-identity.json[/]")
    out.say("Next: [bold]weft up -d[/], then [bold]weft add DIR[/] or [bold]weft join TICKET[/]")
    out.result(data, lambda console: console.print(identity.peer_id))


@identity_verbs.command("show")
def id_show() -> None:
    """Print the peer id and the publisher key."""
    from node import app
    from node.home import Home

    identity = app.identity(Home.default())
    data = {
        "peer_id": identity.peer_id,
        "publisher": identity.publisher.key_id,
        "publisher_key": identity.publisher.public_pem,
    }

    def show(console: Console) -> None:
        console.print(f"peer id    {identity.peer_id}")
        console.print(f"publisher  {identity.publisher.key_id}")
        console.print(identity.publisher.public_pem.strip())

    out.result(data, show)


Passphrase = Annotated[
    str, typer.Option(envvar="WEFT_PASSPHRASE", help="Encrypts the file; without it the keys are readable.")
]


@identity_verbs.command("export")
def id_export(file: Path, passphrase: Passphrase = "") -> None:
    """Write the whole identity to FILE (0600): whoever has it is this node."""
    from node.errors import LocalError
    from node.home import Home, write_private
    from node.identity import keyring

    if file.exists():
        raise LocalError(f"{file} exists", hint=f"weft id export {file.stem}-2{file.suffix}")
    write_private(file.absolute(), keyring.export(Home.default().identity, passphrase=passphrase))
    out.result({"file": str(file.absolute())}, lambda console: console.print(str(file)))


@identity_verbs.command("import")
def id_import(file: Path, passphrase: Passphrase = "") -> None:
    """Become the node whose identity FILE holds; refuses when there is one already."""
    from node.errors import LocalError
    from node.home import Home
    from node.identity import keyring

    try:
        data = file.read_bytes()
    except OSError as error:
        raise LocalError(f"{file} cannot be read: {error.strerror}", hint="weft id export FILE") from error
    identity = keyring.import_(Home.default().make().identity, data, passphrase=passphrase)
    out.result({"peer_id": identity.peer_id}, lambda console: console.print(identity.peer_id))


def add(
    directory: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors.")],
    name: Annotated[str | None, typer.Option(help="What others see; else the directory's name.")] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="SPDX name; else the model card's.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="What it was trained from: DIR, a name on the shelf, or an id.")
    ] = None,
    probes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            show_default="the settings'",
            help="Texts on which it can be compared: general, zoo, or FILE.jsonl.",
        ),
    ] = None,
) -> None:
    """Share a checkpoint: hash, sign and fingerprint it; the directory itself is never written to."""
    from node import app
    from node.catalog.licences import NO_LICENCE
    from node.home import Home

    home = Home.default()
    with render.hashing(out, f"hashing {directory.name}") as on_progress:
        added = app.add(
            home, directory, name=name, licence=licence, base=base, probes=probes, on_progress=on_progress
        )
    announced = app.announce_if_running(home)
    for item in added.left_out:
        out.say(f"[yellow]left out[/] {escape(item.name)}: {escape(item.why)}")
    if added.replaced:
        out.say(
            f"[yellow]signed anew[/]: the signature that lay there does not hold ({escape(added.replaced)})"
        )
    if added.silent:
        out.say(f"[dim]compared by its weights alone[/]: {escape(added.silent)}")
    if added.expert.licence == NO_LICENCE:
        out.say("[yellow]no licence[/]: peers are not granted it; state one with --licence SPDX")
    out.say("announced to the peers" if announced else "it is announced at the next: weft up")
    data = {
        **render.expert_data(added.expert),
        "directory": str(added.expert.directory),
        "announced": announced,
        "behaviour": not added.silent,
        "left_out": [{"name": item.name, "why": item.why} for item in added.left_out],
    }
    out.result(data, lambda console: console.print(added.expert.model_id))


def ls() -> None:
    """List the experts that this node holds."""
    from node import app
    from node.home import Home

    data = [render.expert_data(expert) for expert in app.shelf(Home.default()).experts()]
    out.result({"experts": data}, lambda console: render.shelf(console, data))


def rm(expert: Annotated[str, typer.Argument(help="Its name, or the beginning of its id.")]) -> None:
    """Withdraw an expert: it is no longer shared, and the node's copy is deleted."""
    from node import app
    from node.home import Home

    home = Home.default()
    shelf = app.shelf(home)
    removed = shelf.remove(shelf.resolve(expert).model_id)
    app.announce_if_running(home)
    data = {"removed": [render.expert_data(item) for item in removed]}
    out.result(data, lambda console: console.print(removed[0].model_id))


def verify(
    directory: Annotated[Path, typer.Argument(help="A model directory.")],
    publisher: Annotated[Path | None, typer.Option(help="PEM file of who must have signed it.")] = None,
    audit: Annotated[str, typer.Option(help="full: execute the merge again, compare every leaf.")] = "",
    parent: Annotated[list[Path] | None, typer.Option(help="Where a parent lies, for the audit.")] = None,
) -> None:
    """Check signatures, digests and provenance: a green and red list; exit code 5 if anything fails."""
    from node import app
    from node.errors import UsageError, VerificationFailed
    from node.home import Home

    if audit not in ("", "full"):
        raise UsageError(f"--audit {audit} is not known", hint=f"weft verify {directory} --audit full")
    with render.hashing(out, "verifying") as on_progress:
        report = app.verify(directory, publisher, on_progress=on_progress)
    if audit and report.ok:
        report = _audited(report, directory, parent or [])
    else:
        report = app.with_verdicts(Home.default(), report)
    data = report.to_json()
    if report.ok and report.publisher is None and not audit:
        render.report(out.story_console, data)
        raise VerificationFailed(
            f"nobody signed {directory}: only executing the merge again tells what it is",
            hint=f"weft verify {directory} --audit full",
            report=data,
        )
    if report.ok:
        out.result(data, lambda console: render.report(console, data))
        return
    render.report(out.story_console, data)
    failed = next(check for check in report.checks if check.ok is False)
    raise VerificationFailed(
        f"{directory} does not hold: {failed.name}: {failed.detail}",
        hint="fetch it again: weft get ID",
        report=data,
    )


def _audited(report: Report, directory: Path, parents: list[Path]) -> Report:
    """The report with one more line: what re-execution found."""
    from node import app
    from node.errors import NotEnoughPeers
    from node.home import Home
    from node.provenance.verify import Check

    home = Home.default()
    try:
        with render.live(out) as show:
            found = app.audit_here(
                home, directory, parents, on_view=lambda view: show(render.view_data(view))
            )
    except NotEnoughPeers as error:
        if not app.node_runs(home):
            raise
        out.say(f"[dim]·[/] {escape(error.why)}: the node fetches it")
        found = follow.audit(home, directory)
    sentence = f"{found['checked']} leaves computed again, {found['failed']} differ"
    if found["passed"] or found["failed"]:
        return report.and_check(Check(name="audit", ok=found["passed"], detail=sentence))
    return report.and_check(Check(name="audit", ok=False, detail=f"{sentence}, but Trace or files do"))


def lineage(
    directory: Annotated[Path, typer.Argument(help="A model directory.")],
    dot: Annotated[bool, typer.Option("--dot", help="Graphviz instead of a tree.")] = False,
) -> None:
    """Show the family tree of a model, to its roots."""
    from node import app
    from node.home import Home

    tree = app.lineage(Home.default(), directory)
    out.result(tree.to_json(), lambda console: console.print(tree.to_dot() if dot else render.lineage(tree)))


def doctor(
    healthy: Annotated[bool, typer.Option("--healthy", help="Only tell whether the node serves.")] = False,
) -> None:
    """Find out what is wrong, each line with its fix; exit code 1 if anything is."""
    from node import diagnosis
    from node.errors import LocalError
    from node.home import Home

    findings = diagnosis.health(Home.default()) if healthy else diagnosis.examine(Home.default())
    data = {"checks": [finding.to_json() for finding in findings]}
    if all(finding.ok is not False for finding in findings):
        out.result(data, lambda console: render.report(console, data))
        return
    render.report(out.story_console, data)
    first = next(finding for finding in findings if finding.ok is False)
    raise LocalError(f"{first.name}: {first.detail}", hint=first.fix)


def version() -> None:
    """Print the versions of weft and of what decides its results."""
    from importlib import metadata

    names = ("weftmerge", "torch", "safetensors", "libp2p", "grpcio")
    versions = {name: metadata.version(name) for name in names}
    out.result(versions, lambda console: console.print(table("", ("package", "version"), versions.items())))
