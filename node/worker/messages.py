"""What travels between a node and its worker: one JSON line each way, and errors by class name.

    parent -> child   the request, one JSON document, then end of file
    child -> parent   {"event": {...}}*  then exactly one of  {"result": {...}}  {"error": {...}}

An error crosses as the name of its class with its fields; only the classes in the table come back as
themselves, so that a line can never name a class of its own choosing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from merge_core.errors import (
    CannotWrite,
    CorruptCheckpoint,
    InvalidRecipe,
    InvalidTask,
    MergeCoreError,
    Unmergeable,
)
from node.errors import LimitReached, LocalError, UsageError, VerificationFailed, WeftError, of_system

Emit = Callable[[dict[str, Any]], None]
"""Takes one event; events are small JSON objects with a `kind`."""

MAX_LINE = 16 << 20
"""Longest line in bytes, newline included: whatever is larger belongs in a file."""

ERRORS: dict[str, type[MergeCoreError] | type[WeftError]] = {
    kind.__name__: kind
    for kind in (
        MergeCoreError,
        InvalidRecipe,
        InvalidTask,
        Unmergeable,
        CorruptCheckpoint,
        CannotWrite,
        LocalError,
        UsageError,
        LimitReached,
        VerificationFailed,
    )
}


def encode(message: dict[str, Any]) -> bytes:
    """One message as one line; raises ValueError when it is longer than MAX_LINE."""
    line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(line) > MAX_LINE:
        raise ValueError(f"a worker message of {len(line)} bytes; at most {MAX_LINE} are sent")
    return line


def decode(line: bytes) -> dict[str, Any]:
    """Read one line; raises ValueError unless it is a JSON object with exactly one key."""
    message = json.loads(line)
    if not isinstance(message, dict) or len(message) != 1:
        raise ValueError("a worker message is a JSON object with one key")
    return message


def describe_error(error: Exception) -> dict[str, Any] | None:
    """What crosses to the parent; None for an error that nobody raised on purpose."""
    if isinstance(error, OSError):
        error = of_system(error)
    if not isinstance(error, MergeCoreError | WeftError) or type(error).__name__ not in ERRORS:
        return None
    described: dict[str, Any] = {"class": type(error).__name__, "why": error.why, "hint": error.hint}
    if isinstance(error, Unmergeable):
        described["problems"] = list(error.problems)
    return described


def rebuild_error(described: dict[str, Any]) -> Exception:
    """The error that a child described; one of an unknown class comes back as LocalError."""
    kind = ERRORS.get(str(described.get("class")), LocalError)
    why, hint = str(described.get("why", "")), str(described.get("hint", ""))
    if kind is Unmergeable:
        return Unmergeable(why, problems=tuple(str(p) for p in described.get("problems", ())), hint=hint)
    return kind(why, hint=hint)
