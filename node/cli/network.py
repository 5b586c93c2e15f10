"""Verbs that talk to the node: up, down, status, peers, invite, join, search, get, jobs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

import typer

from node.cli import follow, render
from node.cli.output import escape, out

jobs_verbs = typer.Typer(help="List, watch, settle, cancel or resume long-running work.")


def register(app: typer.Typer, merging: str) -> None:
    """Hang these verbs on the command; jobs belong to the panel `merging`."""
    panels: dict[str, tuple[Callable[..., None], ...]] = {
        "This node": (up, down, status),
        "The network": (peers, invite, join, search, get),
    }
    for panel, verbs in panels.items():
        for verb in verbs:
            app.command(rich_help_panel=panel)(verb)
    app.add_typer(jobs_verbs, name="jobs", rich_help_panel=merging)


def up(
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Return once the node answers.")] = False,
    init: Annotated[bool, typer.Option("--init", help="Make the identity first if there is none.")] = False,
    network: Annotated[str | None, typer.Option(help="The network's name.")] = None,
    listen: Annotated[list[str] | None, typer.Option(help="libp2p multiaddr, repeatable.")] = None,
    announce: Annotated[
        list[str] | None, typer.Option(help="Multiaddr that others are told instead, behind a port mapping.")
    ] = None,
    peer_api: Annotated[str | None, typer.Option(help="host:port of the peer data plane.")] = None,
    control_api: Annotated[str | None, typer.Option(help="host:port of the local API.")] = None,
    bootstrap: Annotated[list[str] | None, typer.Option(help="Peer to dial first, repeatable.")] = None,
    probes: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Texts on which models are compared.")
    ] = None,
) -> None:
    """Start the node: discovery, the peer port and the local API."""
    from node import app, config
    from node.home import Home

    home = Home.default()
    if init:
        app.ensure_initialised(home)
    flags = {
        "network": network,
        "listen": listen,
        "announce": announce,
        "peer_api": peer_api,
        "control_api": control_api,
        "bootstrap": bootstrap,
        "probes": probes,
    }
    settings = config.load(home.config, flags)
    if detach:
        app.start_detached(home, settings)
        status()
        return

    def say_up() -> None:
        out.say("[green]up[/]  stop with Ctrl-C or: weft down")
        out.result({"pid": os.getpid(), "home": str(home.root)}, lambda console: None)

    app.serve(home, settings, on_up=say_up)


def down() -> None:
    """Stop the node gracefully; work in progress is taken up at the next start."""
    from node import app
    from node.home import Home

    app.stop(Home.default())
    out.result({"stopped": True}, lambda console: console.print("down"))


def status() -> None:
    """Show who this node is, where it listens and how it does."""
    from node.home import Home

    data = follow.ask(Home.default(), lambda node: node.status())
    out.result(data, lambda console: render.status(console, data))


def peers() -> None:
    """List the peers that this node is connected to."""
    from node.home import Home

    data = follow.ask_all(Home.default(), lambda node: node.peers())
    out.result({"peers": data}, lambda console: render.peers(console, data))


def invite() -> None:
    """Print a ticket; who runs `weft join TICKET` joins this network through this node."""
    from node.home import Home

    with follow.running_node(Home.default()) as node:
        ticket = node.invite()
    out.say("Give it to whoever should join: [bold]weft join TICKET[/]")
    out.result({"ticket": ticket}, lambda console: console.print(ticket))


def join(ticket: str) -> None:
    """Join the network of the node that made TICKET, now and at every start."""
    from node import app, config
    from node.home import Home

    home = Home.default()
    before = config.stored(home.config).network
    joined = app.join(home, ticket)
    if before not in (joined.network, config.Config().network):
        out.say(f"[yellow]note:[/] this home was set to network {escape(before)}, and no longer is")
    data = {"network": joined.network, "peer_id": joined.peer}
    out.result(data, lambda console: console.print(f"joined {joined.network} through {joined.peer}"))


def search(
    query: Annotated[str, typer.Argument(help="Words in name, architecture or licence.")] = "",
) -> None:
    """Search the experts that this node and its peers advertise."""
    from node.home import Home

    data = follow.ask_all(Home.default(), lambda node: node.search(query))
    out.result({"experts": data}, lambda console: render.experts(console, data))


def get(
    model_id: Annotated[str, typer.Argument(help="The id or name that `weft search` shows.")],
    publisher: Annotated[str, typer.Option(help="Only as signed by this publisher key id.")] = "",
) -> None:
    """Fetch an expert as its publisher signed it, verified, and become a second holder of it."""
    from node.home import Home

    data = follow.to_the_end(Home.default(), lambda node: node.start_get(model_id, publisher=publisher))
    out.result(data, lambda console: console.print(data["directory"]))


@jobs_verbs.command("ls")
def jobs_ls() -> None:
    """List jobs, newest first."""
    from node.home import Home

    data = follow.ask_all(Home.default(), lambda node: node.jobs())
    out.result({"jobs": data}, lambda console: render.jobs(console, data))


@jobs_verbs.command("watch")
def jobs_watch(job: str) -> None:
    """Follow a job to its end."""
    from node.home import Home

    data = follow.to_the_end(Home.default(), lambda node: next(node.watch(job)))
    out.result(data, lambda console: render.job(console, data))


@jobs_verbs.command("cancel")
def jobs_cancel(job: str) -> None:
    """Stop a job; what it has fetched stays for a resume."""
    from node.home import Home

    data = follow.ask(Home.default(), lambda node: node.cancel(job))
    out.result(data, lambda console: render.job(console, data))


@jobs_verbs.command("settle")
def jobs_settle(job: str) -> None:
    """End a search with the best that it has found; the job goes on with the merge by that."""
    from node.home import Home

    data = follow.ask(Home.default(), lambda node: node.settle(job))
    out.result(data, lambda console: render.job(console, data))


@jobs_verbs.command("resume")
def jobs_resume(job: str) -> None:
    """Take up a job that failed or was cancelled, and follow it to its end."""
    from node.home import Home

    data = follow.to_the_end(Home.default(), lambda node: node.resume(job))
    out.result(data, lambda console: render.job(console, data))
