"""Which node runs for a home: its process id and control address, and the token that it asks for."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass

from node.errors import LocalError, NodeNotRunning
from node.home import Home, write_private


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A node that said it is up; `control_api` is host:port."""

    pid: int
    control_api: str


def find(home: Home) -> Running | None:
    """The node that runs for this home; None when there is none or the one that was has died."""
    try:
        said = json.loads(home.run.read_text())
        running = Running(pid=int(said["pid"]), control_api=str(said["control_api"]))
        os.kill(running.pid, 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return running


def require(home: Home) -> Running:
    """The node that runs for this home; raises NodeNotRunning."""
    running = find(home)
    if running is None:
        raise NodeNotRunning("no node is running here", hint="weft up -d")
    return running


def announce(home: Home, running: Running) -> None:
    """Say where this node answers."""
    write_private(home.run, json.dumps({"pid": running.pid, "control_api": running.control_api}).encode())


def withdraw(home: Home) -> None:
    """Say that this node no longer runs; only the process that announced itself may."""
    running = find(home)
    if running is not None and running.pid == os.getpid():
        home.run.unlink(missing_ok=True)


def new_token(home: Home) -> str:
    """Draw the token that this node asks for from now on, readable by its owner alone."""
    token = secrets.token_urlsafe(32)
    write_private(home.token, token.encode())
    return token


def read_token(home: Home) -> str:
    """The token of the running node. Raises LocalError when it cannot be read."""
    try:
        return home.token.read_text().strip()
    except OSError as error:
        raise LocalError(
            f"the node's token cannot be read: {error.strerror}", hint="run as the user that started the node"
        ) from error
