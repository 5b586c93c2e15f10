"""Licences by their SPDX names: how an expert's licence is read from its card, and what an expression grants.

A card says `license: apache-2.0` in the YAML between the dashes at its top; SPDX says `Apache-2.0`. What
SPDX has no name for becomes a LicenseRef, what nobody said becomes NOASSERTION.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection
from pathlib import Path

from merge_core import plain_yaml
from node.catalog.licence_table import TABLE, licence
from node.domain.text import LICENCE
from node.errors import UsageError

NO_LICENCE = "NOASSERTION"
_FORBIDDEN = "LicenseRef-no-derivatives"
CARD = "README.md"
MAX_FRONT_MATTER = 64 << 10

_BY_FOLDED = (
    {licence.hub: licence.name for licence in TABLE if licence.hub}
    | {licence.name.casefold(): licence.name for licence in TABLE}
    | {name.casefold(): NO_LICENCE for name in (NO_LICENCE, "cc", "unknown", "")}
)
_COMPOUND_OR_REFERENCE = re.compile(r"(?i)licenseref-.+|.*[ ()].*")


def spdx(text: str) -> str:
    """The SPDX spelling of a licence as people write it: `mit` is MIT, `llama3` is LicenseRef-llama3."""
    name = " ".join(text.split())
    known = _BY_FOLDED.get(name.casefold())
    if known is not None:
        return known
    # What has no room for its words is not said, but for the one that must not be lost.
    unsaid = _FORBIDDEN if licence(name).forbids_merging else NO_LICENCE
    if _COMPOUND_OR_REFERENCE.fullmatch(name):
        return name if LICENCE.fullmatch(name) else unsaid
    reference = "LicenseRef-" + re.sub(r"[^A-Za-z0-9.\-]+", "-", name).strip("-")
    return reference if LICENCE.fullmatch(reference) and len(reference) > 11 else unsaid


def stated(text: str) -> str:
    """The SPDX spelling of a licence that the user named; raises UsageError when it can be none."""
    name = spdx(text)
    if not LICENCE.fullmatch(" ".join(text.split())):
        raise UsageError(f"{text[:80]!r} is not an SPDX licence", hint="weft add DIR --licence Apache-2.0")
    return name


def of_card(directory: Path) -> str:
    """The licence in the front matter of a directory's README.md; NOASSERTION when it says none."""
    head = _head(directory / CARD).decode("utf-8", "replace").replace("\r\n", "\n")
    found = re.match(r"\ufeff?---\n(.*?)\n---(\n|$)", head, re.DOTALL)
    if found is None:
        return NO_LICENCE
    try:
        matter = plain_yaml.parse(found[1])
    except ValueError:
        return NO_LICENCE
    told = matter.get("license") if isinstance(matter, dict) else None
    if isinstance(told, list):
        # All of them, or one of them? One that forbids is heard either way.
        names = (name for name in told if isinstance(name, str))
        told = told[0] if len(told) == 1 else next(filter(_forbids, names), None)
    if told == "other" and isinstance(matter, dict):
        told = matter.get("license_name", "other")
    return spdx(told) if isinstance(told, str) else NO_LICENCE


def _forbids(name: str) -> bool:
    return licence(spdx(name)).forbids_merging


def _head(card: Path) -> bytes:
    """The first bytes of a card; none where it is no regular file, which could keep us waiting forever."""
    try:
        descriptor = os.open(card, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        return os.read(descriptor, MAX_FRONT_MATTER) if regular else b""
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def granted(expression: str, allowed: Collection[str]) -> bool:
    """Whether an SPDX expression can be satisfied with allowed licences: one side of OR, both sides of AND.

    `*` allows everything, even NOASSERTION. What is not understood (brackets) must be allowed as written.
    """
    folded = {name.casefold() for name in allowed}
    whole = expression.casefold()
    if "*" in folded or whole in folded:
        return True
    if any(mark in whole for mark in "()") or whole == NO_LICENCE.casefold():
        return False
    return any(all(part.strip() in folded for part in side.split(" and ")) for side in whole.split(" or "))
