"""Verbs that need no running node: init, id, add, ls, rm, check, verify, lineage, doctor, version."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from node.cli.output import out, table

identity_verbs = typer.Typer(no_args_is_help=True, help="Show, back up or restore who this node is.")


def register(app: typer.Typer) -> None:
    """Hang these verbs on the command."""
    app.add_typer(identity_verbs, name="id", rich_help_panel="This node")
    app.command(rich_help_panel="This node")(init)
    app.command(rich_help_panel="This node")(version)


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
    from node.control.running import write_private
    from node.errors import LocalError
    from node.home import Home
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
    identity = keyring.import_(Home.default().identity, data, passphrase=passphrase)
    out.result({"peer_id": identity.peer_id}, lambda console: console.print(identity.peer_id))


def version() -> None:
    """Print the versions of weft and of what decides its results."""
    from importlib import metadata

    names = ("weftmerge", "torch", "safetensors", "libp2p", "grpcio")
    versions = {name: metadata.version(name) for name in names}
    out.result(versions, lambda console: console.print(table("", ("package", "version"), versions.items())))
