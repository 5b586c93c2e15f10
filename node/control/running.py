"""Which node runs for a home: its process id and control address, and the token that it asks for."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from node.errors import LocalError, NodeNotRunning
from node.home import Home, write_private


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A node that said it is up; `control_api` is host:port."""

    pid: int
    control_api: str


def find(home: Home) -> Running | None:
    """The node that runs for this home; None when there is none, or one that does not answer yet."""
    if not _held(home):
        return None
    try:
        said = json.loads(home.run.read_text())
        return Running(pid=int(said["pid"]), control_api=str(said["control_api"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def alone(home: Home) -> Iterator[None]:
    """Be the only node of a home; raises LocalError when there is one. The lock ends with the process."""
    home.lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LocalError(f"a node runs already for {home.root}", hint="weft status") from error
        home.run.unlink(missing_ok=True)  # of one that was killed
        yield
    finally:
        home.run.unlink(missing_ok=True)
        os.close(descriptor)


def ended(home: Home) -> bool:
    """Whether no node holds this home any more, not even one that is stopping."""
    return not _held(home)


def _held(home: Home) -> bool:
    try:
        descriptor = os.open(home.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def require(home: Home) -> Running:
    """The node that runs for this home; raises NodeNotRunning."""
    running = find(home)
    if running is None:
        raise NodeNotRunning("no node is running here", hint="weft up -d")
    return running


def announce(home: Home, running: Running) -> None:
    """Say where this node answers."""
    write_private(home.run, json.dumps({"pid": running.pid, "control_api": running.control_api}).encode())


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
