"""What can go wrong in a node: one class for each answer to "who must act?".

    WeftError
    ├── PeerError       a peer broke the protocol: drop it, never retry there
    ├── Refused         a peer said no: a reason and its sentence
    ├── Unreachable     a peer did not answer: try another one, or later
    ├── LocalError      this machine: disk, configuration, a missing file: tell the user
    │   ├── NodeNotRunning
    │   ├── NotEnoughPeers
    │   ├── LimitReached
    │   └── Interrupted
    └── VerificationFailed   the bytes or signatures are not what they claim
        └── FalseFingerprint   a publisher signed the fingerprint of other weights
            └── KnownFalse

`why` is one line for the human, `hint` the next command to run, `exit_code` what the CLI ends with.
Errors of merge_core (InvalidRecipe, InvalidTask, Unmergeable, CorruptCheckpoint, CannotWrite) keep their own
tree; `exit_code_of` knows both.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from merge_core.errors import (
    CannotWrite,
    CorruptCheckpoint,
    InvalidRecipe,
    InvalidTask,
    MergeCoreError,
    Unmergeable,
)
from node.domain.reasons import Reason

_PASSING = (Reason.BUSY, Reason.QUOTA_EXCEEDED, Reason.EXPIRED, Reason.NOT_ENTITLED)
"""Refusals that the same peer may not repeat later."""


class WeftError(Exception):
    """Base of everything that a node raises on purpose."""

    exit_code = 1

    def __init__(self, why: str, *, hint: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.hint = hint


class PeerError(WeftError):
    """The peer broke the protocol or sent bytes that do not match their digest."""


class Refused(WeftError):
    """The peer declined; `reason` says why in a way that programs understand."""

    def __init__(self, reason: Reason, detail: str = "", *, hint: str = "") -> None:
        if not hint and reason not in _PASSING:
            hint = "weft search"
        super().__init__(f"{reason.sentence}{f' ({detail})' if detail else ''}", hint=hint)
        self.reason = reason
        self.detail = detail


class Unreachable(WeftError):
    """The peer did not answer before the deadline, or could not be dialled."""

    exit_code = 4


class LocalError(WeftError):
    """Something on this machine has to change."""


class UsageError(LocalError):
    """The command line does not say something that can be done."""

    exit_code = 2


class NodeNotRunning(LocalError):
    """The verb needs a running node."""

    exit_code = 3


class NotEnoughPeers(LocalError):
    """Nobody who is reachable holds what is needed."""

    exit_code = 4


class LimitReached(LocalError):
    """A bound on disk, memory or transfer was reached."""

    exit_code = 7


class Interrupted(LocalError):
    """A person stopped waiting for what goes on without them."""

    exit_code = 130


class VerificationFailed(WeftError):
    """A signature, a digest or an audit did not hold; `report` holds all checks, where there were several."""

    exit_code = 5

    def __init__(self, why: str, *, hint: str = "", report: dict[str, Any] | None = None) -> None:
        super().__init__(why, hint=hint)
        self.report = report


class FalseFingerprint(VerificationFailed):
    """The weights are not those whose fingerprint `publisher` (a key id) signed."""

    def __init__(self, why: str, *, publisher: str, hint: str = "weft search; weft peers") -> None:
        super().__init__(why, hint=hint)
        self.publisher = publisher


class KnownFalse(FalseFingerprint):
    """This node found that before."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a disk or a quota takes no more."""


def of_system(error: OSError, *, where: Path | None = None) -> LocalError:
    """What the system refused, as an error for the person; `where` is told when the error names no file."""
    name = error.filename or where
    why = f"{name}: {error.strerror or error}" if name else str(error.strerror or error)
    if error.errno in FULL:
        return LimitReached(why, hint="df -h; free some space, then run the same command again")
    return LocalError(why, hint=f"ls -ld {name}" if name else "weft doctor")


_CORE_EXIT_CODES: dict[type[MergeCoreError], int] = {
    InvalidRecipe: 2,
    InvalidTask: 2,
    Unmergeable: 6,
    CorruptCheckpoint: 5,
    CannotWrite: 7,
}


def exit_code_of(error: Exception) -> int:
    """The exit code of the CLI for an error: 1 where nothing more precise is known."""
    if isinstance(error, WeftError):
        return error.exit_code
    return next((code for kind, code in _CORE_EXIT_CODES.items() if isinstance(error, kind)), 1)
