"""Digests and the one canonical encoding that they are taken over.

Everything that is digested or signed is RFC 8785 JSON. Floats never appear in it: they are written as
hex-float strings (`float.hex`), so that a value survives every parser to the bit. Integers stay below 2^53.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import rfc8785

MAX_DEPTH = 12
"""Lists and objects within each other; nothing of ours is nested deeper, so nothing of a peer's is."""
MAX_VALUES = 1 << 22
"""Lists, objects and commas of one document: each costs memory and time, whatever its bytes are."""

_LARGEST = 2**53
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Digest(str):
    """`sha256:` followed by 64 lower-case hex digits; a value that exists is well-formed.

    Raises ValueError on anything else.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Digest:
        if not _DIGEST.fullmatch(text):
            raise ValueError(f"not a sha256 digest: {text[:80]!r}")
        return super().__new__(cls, text)

    @property
    def hex(self) -> str:
        """The 64 hex digits alone: safe as a file name."""
        return self[7:]


class ModelId(Digest):
    """The digest of a checkpoint's manifest: its name everywhere."""

    __slots__ = ()

    def __new__(cls, text: str) -> ModelId:
        return super().__new__(cls, text)  # type: ignore[return-value]


def sha256(data: bytes | bytearray | memoryview) -> Digest:
    """Digest bytes."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def canonical(value: Any) -> bytes:
    """Encode JSON-like `value` (no floats) as RFC 8785 bytes.

    Raises TypeError on a float (write it with `float.hex` first), ValueError beyond MAX_DEPTH or 2^53. Where
    every key is ASCII the standard library's encoder writes the same bytes, fifty times as fast: without
    floats the two can only differ in the order of other keys.
    """
    if _check(value, MAX_DEPTH):
        return _ENCODER.encode(value).encode()
    return rfc8785.dumps(value)


def parse_canonical(data: bytes) -> Any:
    """Decode bytes that must be exactly what `canonical` writes; raises ValueError on any other spelling."""
    value = parse_bounded(data)
    if canonical(value) != data:
        raise ValueError("JSON is not in canonical form (RFC 8785)")
    return value


def parse_bounded(data: bytes, *, max_values: int = MAX_VALUES) -> Any:
    """Decode JSON that may come from anybody, for a caller who compares what it understood with `data`.

    Raises ValueError. What would become many times its size in memory is refused by counting bytes, which
    takes those within strings for more; that many are in no document of ours.
    """
    if sum(map(data.count, (b"[", b"{", b","))) > max_values:
        raise ValueError(f"JSON with more than {max_values} values")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError(f"JSON nested deeper than {MAX_DEPTH} levels") from error


def check_version(value: Any, version: int, what: str) -> None:
    """Raise ValueError unless `value` is that very number: `true` equals 1, in bytes of another digest."""
    if type(value) is not int or value != version:
        raise ValueError(f"{what} version {str(value)[:20]}; this weft reads version {version}")


def _check(value: Any, depth: int) -> bool:
    """Raise unless a value may be digested; whether every key is ASCII text."""
    if isinstance(value, str) or value is None:
        return True
    if isinstance(value, int):
        if abs(value) >= _LARGEST:
            raise ValueError(f"the integer {value} in digested JSON is not below 2^53")
        return True
    if isinstance(value, float):
        raise TypeError(f"a float in digested JSON: {value!r}; write value.hex()")
    if depth == 0:
        raise ValueError(f"JSON nested deeper than {MAX_DEPTH} levels")
    plain = True
    if isinstance(value, dict):
        try:
            plain = "".join(value).isascii()
        except TypeError:  # not even text: rfc8785 says so
            plain = False
        value = value.values()
    elif not isinstance(value, list | tuple):
        raise TypeError(f"a {type(value).__name__} is no JSON")
    for item in value:
        kind = type(item)  # text and small numbers are most of what there is
        if kind is not str and not (kind is int and -_LARGEST < item < _LARGEST):
            plain = _check(item, depth - 1) and plain
    return plain
