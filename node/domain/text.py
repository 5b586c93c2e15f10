"""Checks that hostile JSON passes before it becomes a domain value; each raises ValueError with a reason."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

MAX_INTEGER = 2**53 - 1
NETWORK = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+:_ ()-]{0,95}")

T = TypeVar("T")


def fields(value: Any, names: set[str]) -> dict[str, Any]:
    """An object with exactly these keys."""
    if not isinstance(value, dict) or set(value) != names:
        raise ValueError(f"expected exactly the keys {sorted(names)}")
    return value


def matching(value: Any, pattern: re.Pattern[str], what: str) -> str:
    """Text that matches `pattern` from end to end."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"not a {what}: {str(value)[:80]!r}")
    return value


def text(value: Any, limit: int, what: str, *, empty: bool = True) -> str:
    """At most `limit` characters of NFC text on one line, which no terminal takes for a command."""
    if not isinstance(value, str) or len(value) > limit or (not value and not empty):
        raise ValueError(f"{what} is not text of at most {limit} characters")
    if unicodedata.normalize("NFC", value) != value or not _is_line(value):
        raise ValueError(f"{what} holds control or unnormalised characters")
    return value


def printable(value: str) -> str:
    """Any text on one line, with U+FFFD in place of what could steer a terminal or end the line."""
    return "".join(char if char.isprintable() else "\ufffd" for char in value)


def _is_line(value: str) -> bool:
    """Whether there are no control characters in it and no line or paragraph separators."""
    found = (unicodedata.category(char) for char in value)
    return not any(category[0] == "C" or category in ("Zl", "Zp") for category in found)


def integer(value: Any, what: str, *, low: int = 0, high: int = MAX_INTEGER) -> int:
    """A whole number within bounds (true and false are none)."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is not a whole number from {low} to {high}")
    return value


def items(value: Any, limit: int, what: str, read: Callable[[Any], T]) -> tuple[T, ...]:
    """A list of at most `limit` items, each read."""
    if not isinstance(value, list) or len(value) > limit:
        raise ValueError(f"{what} is not a list of at most {limit}")
    return tuple(read(item) for item in value)


def ascending(keys: list[Any], what: str) -> None:
    """Sorted, without repeats."""
    if any(a >= b for a, b in pairwise(keys)):
        raise ValueError(f"{what} are not sorted, or one is repeated")
