"""YAML as people write it: mappings, lists and plain scalars; no tag, and nothing that grows without bound.

An alias (`*name`) stands for a copy of what it names, and `<<` for the entries of mappings that are not given
themselves; what they multiply is bounded. Plain scalars are null, true, false, whole numbers, decimals, and
text. A quoted scalar is text, and so is whatever YAML 1.1 would take for more: dates, times of day,
hexadecimal, octal and binary numbers.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_VALUES = 1 << 20
"""Scalars, lists and mappings of one document, those that aliases repeat counted each time."""

_MERGE = "<<"
_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"yes|Yes|YES|true|True|TRUE|on|On|ON")
_FALSE = re.compile(r"no|No|NO|false|False|FALSE|off|Off|OFF")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"([-+]?[0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def parse(text: str) -> Any:
    """Read one document: dict with text as keys, list, str, int, float, bool or None; raises ValueError."""
    documents = parse_all(text)
    if len(documents) > 1:
        raise ValueError(f"{len(documents)} documents, of which one is read")
    return documents[0] if documents else None


def parse_all(text: str) -> list[Any]:
    """Read the documents that lines of `---` separate, as `parse` reads one; raises ValueError."""
    loader = None
    try:
        loader = _Loader(text)
        documents = []
        while loader.check_node():
            node = loader.get_node()
            documents.append(None if node is None else _Reader().value(node))
        return documents
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        told = " ".join(str(error).split()).replace(' in "<unicode string>"', "")
        raise ValueError(told[:300]) from error
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.BaseLoader):
    """Composes nodes; refuses what names a type."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise yaml.YAMLError(f"tags ({tag[:80]}) are not read; write the value alone")
        return super().compose_node(parent, index)


class _Reader:
    """Turns the nodes of one document into values."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def value(self, node: yaml.Node) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"more than {MAX_VALUES} values, counting those that aliases repeat")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item) for item in node.value]
        return self._mapping(node)

    def _mapping(self, node: yaml.Node) -> dict[str, Any]:
        own: dict[str, Any] = {}
        others: list[Any] = []
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError("a key that is not text")
            name = _text(key)
            if name == _MERGE and key.style is None:
                merged = self.value(item)
                others += merged if isinstance(merged, list) else [merged]
            elif name in own:
                raise ValueError(f"the key {name[:80]!r} occurs twice")
            else:
                own[name] = self.value(item)
        if not all(isinstance(other, dict) for other in others):
            raise ValueError(f"{_MERGE} takes mappings")
        return {name: item for other in reversed(others) for name, item in other.items()} | own


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text = _text(node)
    if node.style is not None:
        return text
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return _TRUE.fullmatch(text) is not None
    if _INTEGER.fullmatch(text):
        return int(text)
    if _DECIMAL.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def _text(node: yaml.ScalarNode) -> str:
    """The text of a scalar; raises ValueError where no file could hold it: an escaped half of a pair."""
    text = str(node.value)
    text.encode("utf-8")
    return text
