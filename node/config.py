"""Settings: by flag, else `WEFT_*`, else `config.toml`, else the default, in that order.

WEFT_NETWORK  WEFT_LISTEN  WEFT_ANNOUNCE  WEFT_PEER_API  WEFT_CONTROL_API  WEFT_BOOTSTRAP
WEFT_PROBES
(lists are comma-separated)
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from merge_core import files
from node.domain.address import Address
from node.domain.text import NETWORK
from node.domain.ticket import Ticket
from node.errors import LocalError

_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s:/]+):\d{1,5}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a node is told; a value that exists is valid (LocalError otherwise).

    `listen` are libp2p multiaddrs, `peer_api` and `control_api` are host:port (port 0: any free one).
    `probes` are the texts on which models are compared: a built-in set, or an absolute FILE.jsonl.
    `announce` is what others are told instead of `listen`, for a node behind a port mapping: multiaddrs too.
    """

    network: str = "weft"
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/9350",)
    announce: tuple[str, ...] = ()
    peer_api: str = "0.0.0.0:9351"
    control_api: str = "127.0.0.1:0"
    bootstrap: tuple[str, ...] = ()
    probes: str = "general"

    def __post_init__(self) -> None:
        if not NETWORK.fullmatch(self.network):
            raise _invalid(f"network {self.network!r}: use lower-case letters, digits and any of . - _")
        for name in ("peer_api", "control_api"):
            if not _HOST_PORT.fullmatch(getattr(self, name)):
                raise _invalid(f"{name} {getattr(self, name)!r} is not host:port")
        if not self.control_api.startswith(("127.", "localhost:", "[::1]:")):
            raise _invalid(f"control_api {self.control_api!r} is not a loopback address")
        for address in (*self.listen, *self.announce):
            if not address.startswith("/"):
                raise _invalid(f"{address!r} is not a multiaddr such as /ip4/0.0.0.0/tcp/9350")
        for address in self.announce:
            if "/p2p/" in address:
                raise _invalid(f"announce {address!r}: leave out /p2p/…, the node adds its own peer id")
        for address in self.bootstrap:
            try:
                Address.parse(address)
            except ValueError as error:
                raise _invalid(f"bootstrap: {error}") from error


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read the settings; `overrides` are the flags (None: not given). Raises LocalError naming the key."""
    values = {**_from_file(path), **_from_environment(), **_given(overrides or {})}
    return replace(Config(), **values)


def stored(path: Path) -> Config:
    """What the file alone says, whatever the flags and the environment are; raises LocalError."""
    return replace(Config(), **_from_file(path))


def remember(path: Path, ticket: Ticket) -> None:
    """Put a ticket's network and addresses into the settings, for every start from now on."""
    settings = stored(path)
    addresses = dict.fromkeys((*settings.bootstrap, *ticket.addresses))
    save(replace(settings, network=ticket.network, bootstrap=tuple(addresses)), path)


def save(config: Config, path: Path) -> None:
    """Write `config` so that `load(path) == config`."""
    lines = ["# Settings of this weft node; `weft up --help` says what each one means.\n"]
    for field in fields(config):
        value = getattr(config, field.name)
        lines.append(f"{field.name} = {_toml(list(value) if isinstance(value, tuple) else value)}\n")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    files.replace(path, "".join(lines).encode())


def _toml(value: str | list[str]) -> str:
    """A string or a list of them as TOML: JSON, but for surrogate pairs and the one control it leaves."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _from_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        written = path.read_text(encoding="utf-8")
        found = tomllib.loads(written)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise LocalError(f"{path} cannot be read: {error}", hint=f"edit it, or: rm {path}") from error
    kinds = {field.name: type(getattr(Config(), field.name)) for field in fields(Config)}
    for key, value in found.items():
        wanted = list if kinds.get(key) is tuple else kinds.get(key)
        if wanted is None:
            raise LocalError(
                f"{path}: unknown setting {key!r}; known: {', '.join(kinds)}", hint="weft up --help"
            )
        texts = value if isinstance(value, list) else [value]
        if not isinstance(value, wanted) or not all(isinstance(text, str) for text in texts):
            wanted_name = "list of strings" if wanted is list else "string"
            raise LocalError(f"{path}: {key} must be a {wanted_name}", hint=f"edit it, or: rm {path}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    for key in values:
        try:
            replace(Config(), **{key: values[key]})
        except LocalError as error:
            line = _line_of(key, written)
            why = f"{path}, line {line}: {error.why}"
            raise LocalError(why, hint=f"edit line {line} of {path}") from error
    return values


def _line_of(key: str, written: str) -> int:
    """Where in a TOML text a top-level key is set, counted from 1."""
    lines = written.splitlines()
    found = (n for n, line in enumerate(lines, 1) if re.match(rf"\s*[\"']?{key}[\"']?\s*=", line))
    return next(found, 1)


def _from_environment() -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in fields(Config):
        text = os.environ.get(f"WEFT_{field.name.upper()}")
        if text is not None:
            is_list = isinstance(getattr(Config(), field.name), tuple)
            values[field.name] = tuple(filter(None, text.split(","))) if is_list else text
    return values


def _given(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in overrides.items()
        if value is not None and value != []
    }


def _invalid(why: str) -> LocalError:
    return LocalError(f"setting {why}", hint="weft up --help")
