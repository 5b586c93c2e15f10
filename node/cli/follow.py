"""Asking the running node, and following its jobs to their end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.cli import render
from node.cli.output import out

SETTLING = "stopping: the best so far is merged"
"""What is said when a search is told to make do with what it has."""

if TYPE_CHECKING:
    from node.control.client import ControlClient
    from node.home import Home


@contextmanager
def running_node(home: Home) -> Iterator[ControlClient]:
    """A connection to the node that runs; raises NodeNotRunning."""
    from node.control.client import ControlClient

    with ControlClient.connect(home) as node:
        yield node


def ask(home: Home, question: Callable[[ControlClient], Any]) -> dict[str, Any]:
    """The answer to one question, as data."""
    from node.wire.view import to_data

    with running_node(home) as node:
        return to_data(question(node))


def ask_all(home: Home, question: Callable[[ControlClient], Any]) -> list[dict[str, Any]]:
    """The answers of a list, as data."""
    from node.wire.view import to_data

    with running_node(home) as node:
        return [to_data(message) for message in question(node)]


def to_the_end(home: Home, begin: Callable[[ControlClient], Any], *, settle: bool = False) -> dict[str, Any]:
    """Start or find a job and follow it; its last state as data. Raises what it failed with.

    Ctrl-C leaves it to the node and raises Interrupted; with `settle` the first one asks the node to make do
    with what its search has found, and waits on.
    """
    from node.control.status import ControlError
    from node.errors import LocalError
    from node.wire.view import to_data

    with running_node(home) as node, render.live(out) as show:
        job = to_data(begin(node))
        while True:
            try:
                for message in node.watch(job["id"]):
                    job = to_data(message)
                    show(job)
                break
            except KeyboardInterrupt:
                _settle(node, job["id"], may=settle)
                settle = False
    error = job["error"]
    if error:
        raise ControlError(
            error["why"],
            hint=error["hint"] or f"weft jobs resume {job['id'][:8]}",
            kind=error["reason"],
            exit_code=error["exit_code"],
            problems=tuple(error["problems"]),
        )
    if job["state"] == "cancelled":
        raise LocalError("the job was cancelled", hint=f"weft jobs resume {job['id'][:8]}")
    return job


def _settle(node: ControlClient, job_id: str, *, may: bool) -> None:
    """Ask a search to end with its best; raises Interrupted unless it may and can."""
    from node.errors import Interrupted, WeftError

    refused = ""
    if may:
        try:
            node.settle(job_id)
            out.say(SETTLING)
            return
        except WeftError as error:
            refused = f" ({error.why})"
    short = job_id[:8]
    raise Interrupted(
        f"interrupted; the node goes on with the job{refused}",
        hint=f"weft jobs watch {short}, or weft jobs cancel {short}",
    )


def audit(home: Home, directory: Path) -> dict[str, Any]:
    """Let the node audit a directory, parents fetched where they are missing; the job's result."""
    job = to_the_end(home, lambda node: node.start_audit(str(directory.absolute())))
    found: dict[str, Any] = job["audit"]
    return found
