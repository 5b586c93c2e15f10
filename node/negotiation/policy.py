"""Policy: what a node grants to whom, as data. The default ships as `policy.toml` beside this module."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from node.catalog import licences
from node.domain.ids import PeerId
from node.domain.negotiation import MAX_AGREEMENT_LIFETIME, Purpose
from node.errors import LocalError

ANYBODY = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Who gets what for which purpose, and how many bytes of it in a day."""

    allow: frozenset[str]
    deny: frozenset[str]
    licences: frozenset[str]
    purposes: frozenset[Purpose]
    bytes_per_peer_per_day: int
    agreements_per_peer: int
    agreement_seconds: int

    def serves(self, peer: PeerId) -> bool:
        """Whether a peer gets anything at all."""
        return peer not in self.deny and (ANYBODY in self.allow or peer in self.allow)

    def grants(self, licence: str) -> bool:
        """Whether an expert under this SPDX expression is given away."""
        return licences.granted(licence, self.licences)

    def purposes_of(self, licence: str) -> tuple[Purpose, ...]:
        """What an advert says an expert under this licence may be asked for."""
        return tuple(sorted(self.purposes)) if self.grants(licence) else ()


def default() -> Policy:
    """The policy of a node that was told nothing."""
    return _policy(_shipped(), "the default policy")


def load(path: Path) -> Policy:
    """The policy in a file, the default where it is silent or missing; raises LocalError naming the key."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default()
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LocalError(f"{path} cannot be read: {error}", hint=f"edit it, or: rm {path}") from error
    merged = _shipped()
    for section, values in found.items():
        if section not in merged or not isinstance(values, dict):
            raise _wrong(path, section, f"known sections: {', '.join(merged)}")
        for key, value in values.items():
            if key not in merged[section]:
                raise _wrong(path, f"{section}.{key}", f"known: {', '.join(merged[section])}")
            merged[section][key] = value
    return _policy(merged, path)


def _shipped() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files(__package__).joinpath("policy.toml").read_text(encoding="utf-8"))


def _policy(value: Mapping[str, Mapping[str, Any]], where: Path | str) -> Policy:
    who, what, limits = value["who"], value["what"], value["limits"]
    seconds = _count(where, limits, "limits.agreement_seconds")
    if not 0 < seconds <= MAX_AGREEMENT_LIFETIME:
        raise _wrong(where, "limits.agreement_seconds", f"from 1 to {MAX_AGREEMENT_LIFETIME}")
    try:
        purposes = frozenset(Purpose(name) for name in _names(where, what, "what.purposes"))
        peers = _names(where, who, "who.allow") | _names(where, who, "who.deny")
        for peer in peers - {ANYBODY}:
            PeerId(peer)
    except ValueError as error:
        raise LocalError(f"{where}: {error}", hint=f"edit it, or: rm {where}") from error
    return Policy(
        allow=_names(where, who, "who.allow"),
        deny=_names(where, who, "who.deny"),
        licences=_names(where, what, "what.licences"),
        purposes=purposes,
        bytes_per_peer_per_day=_count(where, limits, "limits.bytes_per_peer_per_day"),
        agreements_per_peer=_count(where, limits, "limits.agreements_per_peer"),
        agreement_seconds=seconds,
    )


def _names(where: Path | str, section: Mapping[str, Any], key: str) -> frozenset[str]:
    value = section[key.partition(".")[2]]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _wrong(where, key, "a list of names")
    return frozenset(value)


def _count(where: Path | str, section: Mapping[str, Any], key: str) -> int:
    value = section[key.partition(".")[2]]
    if type(value) is not int or not 0 <= value < 2**53:
        raise _wrong(where, key, "a whole number that is not negative")
    return value


def _wrong(where: Path | str, key: str, expected: str) -> LocalError:
    return LocalError(f"{where}: {key}: expected {expected}", hint=f"edit it, or: rm {where}")
