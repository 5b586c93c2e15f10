"""What is wrong with a node, each finding with the command that mends it: the substance of `weft doctor`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from node import config
from node.control import running
from node.control.client import ControlClient
from node.errors import WeftError
from node.home import Home
from node.identity import keyring
from node.store import integrity

LOW_DISK = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: `ok` is None where a person has to judge; `fix` is a command."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """The finding as `--json` prints it."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail, "fix": self.fix}


def examine(home: Home) -> tuple[Finding, ...]:
    """Look at everything that a node needs, from the ground up."""
    looks: tuple[Callable[[Home], Finding], ...] = (_identity, _settings, _database, _disk, _node, _peers)
    return tuple(_look(look, home) for look in looks)


def health(home: Home) -> tuple[Finding, ...]:
    """Look only at whether the node serves: what a container asks every few seconds."""
    return (_look(_node, home, missing=False),)


def _look(look: Callable[[Home], Finding], home: Home, *, missing: bool | None = None) -> Finding:
    """The finding; an error that names its own fix is one too. `missing` is what no node at all counts as."""
    try:
        finding = look(home)
    except WeftError as error:
        return Finding(name=look.__name__.strip("_"), ok=False, detail=error.why, fix=error.hint)
    if finding.ok is None and missing is False:
        return Finding(name=finding.name, ok=False, detail=finding.detail, fix=finding.fix)
    return finding


def _identity(home: Home) -> Finding:
    identity = keyring.load(home.identity)
    return Finding(name="identity", ok=True, detail=f"peer {identity.peer_id}")


def _settings(home: Home) -> Finding:
    settings = config.load(home.config)
    return Finding(name="settings", ok=True, detail=f"network {settings.network}")


def _database(home: Home) -> Finding:
    if not home.database.exists():
        return Finding(name="database", ok=True, detail="none yet")
    said = integrity(home.database)
    fix = "" if said == "ok" else f"mv {home.database} {home.database}.damaged"
    return Finding(name="database", ok=said == "ok", detail=said, fix=fix)


def _disk(home: Home) -> Finding:
    place = next(path for path in (home.root, *home.root.parents) if path.exists())
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.1f} GB free below {place}"
    if not os.access(place, os.W_OK):
        return Finding(name="disk", ok=False, detail=f"{place} is not writable", fix=f"ls -ld {place}")
    return Finding(name="disk", ok=True if free > LOW_DISK else None, detail=detail, fix="weft ls; weft rm")


def _node(home: Home) -> Finding:
    if running.find(home) is None:
        return Finding(name="node", ok=None, detail="not running", fix="weft up -d")
    with ControlClient.connect(home) as node:
        status = node.status()
    return Finding(name="node", ok=True, detail=f"serves, pid {status.pid}, {status.addresses[:1]}")


def _peers(home: Home) -> Finding:
    if running.find(home) is None:
        return Finding(name="peers", ok=None, detail="unknown while no node runs", fix="weft up -d")
    with ControlClient.connect(home) as node:
        count = len(node.peers())
    if count == 0:
        return Finding(name="peers", ok=None, detail="none", fix="weft invite; or: weft join TICKET")
    return Finding(name="peers", ok=True, detail=f"{count} connected")
