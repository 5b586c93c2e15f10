"""The safetensors header: a strict parser for files that may come from anybody, and the writer of ours.

A file is 8 bytes of little-endian length, that many bytes of JSON, then the tensors' bytes. The public
library accepts repeated keys, unknown fields and any tensor name; here everything that is not exact is
refused. What this parser accepts that library accepts too, with the same meaning:

- at most 8 MiB of header and 100,000 tensors, checked before anything of that size is allocated;
- no key twice, no unknown field, no number but plain non-negative integers below 2^53;
- known dtypes, plain names, and spans that agree with dtype and shape;
- no gap, no overlap: the tensors cover the file to its last byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from merge_core.checkpoint import dtypes
from merge_core.checkpoint.manifest import MAX_DIMENSIONS, MAX_TENSORS, TENSOR_NAME
from merge_core.checkpoint.source import TensorInfo
from merge_core.errors import CorruptCheckpoint

MAX_HEADER = 8 << 20
PREFIX = 8
METADATA = "__metadata__"

_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_MAX_INTEGER = 2**53 - 1
_ODD_NUMBER = re.compile(r"-|[0-9]{16}")
"""What is in any text with a number that is negative or not below 2^53."""
_HINT = "fetch or export the checkpoint again, then: weft add DIR"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where one tensor lies: `begin` and `end` are offsets in bytes from the start of the file."""

    info: TensorInfo
    begin: int
    end: int

    @property
    def dtype(self) -> str:
        """The element type."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.info.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What one weight file holds: tensors in the order of their bytes, and free text metadata."""

    tensors: Mapping[str, Span]
    metadata: Mapping[str, str]
    length: int
    """Bytes of the length prefix and the JSON together: where the first tensor begins."""

    @property
    def file_size(self) -> int:
        """The size in bytes of the file that has this header."""
        return max((span.end for span in self.tensors.values()), default=self.length)


def header_length(prefix: bytes, file_size: int) -> int:
    """The length of the whole header, prefix included, that the first 8 bytes of a file claim.

    Raises CorruptCheckpoint above MAX_HEADER or beyond the file, so the answer is safe to allocate.
    """
    if file_size < PREFIX or len(prefix) < PREFIX:
        raise CorruptCheckpoint(f"a safetensors file of {file_size} bytes has no header", hint=_HINT)
    length = int.from_bytes(prefix[:PREFIX], "little")
    if length > MAX_HEADER:
        raise CorruptCheckpoint(f"a header of {length} bytes; at most {MAX_HEADER} are read", hint=_HINT)
    if PREFIX + length > file_size:
        raise CorruptCheckpoint(
            f"truncated: a header of {length} bytes in a file of {file_size} bytes", hint=_HINT
        )
    return PREFIX + length


def parse_header(data: bytes, file_size: int | None = None) -> Header:
    """Read the header at the start of `data`, which may hold more of the file.

    `file_size` is that of the whole file in bytes; None where only the header is known, and then the caller
    must check `Header.file_size`. Raises CorruptCheckpoint on whatever is not exact.
    """
    length = header_length(data[:PREFIX], len(data) if file_size is None else file_size)
    if len(data) < length:
        raise CorruptCheckpoint(f"truncated: {len(data)} of {length} bytes of header", hint=_HINT)
    try:
        header = _header(_parse_json(bytes(data[PREFIX:length])), length)
        if file_size is not None and header.file_size != file_size:
            raise ValueError(f"the tensors end at byte {header.file_size}, the file at byte {file_size}")
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(f"not a safetensors header: {error}", hint=_HINT) from error
    return header


def read_header(path: Path) -> Header:
    """Read the header of a file; raises CorruptCheckpoint with the file's name, or OSError."""
    with path.open("rb") as file:
        file_size = file.seek(0, 2)
        file.seek(0)
        try:
            prefix = file.read(PREFIX)
            return parse_header(prefix + file.read(header_length(prefix, file_size) - PREFIX), file_size)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{path.name}: {error.why}", hint=error.hint) from error


def build_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """Write the header of a file that holds `tensors`, and say what it says: equal tensors give equal bytes.

    The bytes lie in the order of `data_order`, without gaps; spaces pad the header to a multiple of 8 bytes.
    Raises ValueError where `parse_header` would refuse the result.
    """
    value: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in data_order(tensors):
        info = tensors[name]
        value[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [at, at + info.length],
        }
        at += info.length
    if len(value) != len(tensors) + bool(metadata):
        raise ValueError(f"no tensor can be called {METADATA}")
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"a header of {len(text)} bytes; at most {MAX_HEADER} are read")
    return len(text).to_bytes(PREFIX, "little") + text, _header(value, PREFIX + len(text))


def data_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The names in the order of their bytes in a file: wider elements first, then by name.

    Names alone would be simpler, but then an odd number of 2-byte elements puts the 4-byte ones behind it on
    an odd address, and torch refuses to view those.
    """
    return sorted(tensors, key=lambda name: (-dtypes.SIZES[tensors[name].dtype], name))


def _parse_json(text: bytes) -> dict[str, Any]:
    decoded = text.decode("utf-8")
    if not decoded.startswith("{"):
        raise ValueError("it does not begin with an object")
    value = json.loads(
        decoded,
        object_pairs_hook=_object,
        # A call for each number takes as long as all the rest, and is not needed where none can be odd.
        parse_int=_integer if _ODD_NUMBER.search(decoded) else int,
        parse_float=_refuse_number,
        parse_constant=_refuse_number,
    )
    assert isinstance(value, dict)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _integer(text: str) -> int:
    # json reads "-0" as 0; the library's parser refuses it.
    if text.startswith("-") or len(text) > 16 or int(text) > _MAX_INTEGER:
        _refuse_number(text)
    return int(text)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"the number {text[:24]}; only integers from 0 to 2^53 - 1 are read")


def _header(value: dict[str, Any], length: int) -> Header:
    """What a header of so many bytes says; raises ValueError or TypeError on whatever is not exact."""
    tensors = {name: item for name, item in value.items() if name != METADATA}
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{len(tensors)} tensors; at most {MAX_TENSORS} are read")
    spans = {name: _span(name, item, length) for name, item in tensors.items()}
    return Header(
        tensors=_in_order(spans, length), metadata=_metadata(value.get(METADATA, {})), length=length
    )


def _metadata(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{METADATA} is not a map from text to text")
    for text in (*value, *value.values()):
        text.encode("utf-8")  # a lone surrogate, which only an escape can spell, raises ValueError
    return MappingProxyType(value)


def _span(name: str, item: Any, base: int) -> Span:
    if not TENSOR_NAME.fullmatch(name):
        raise ValueError(f"tensor name {name[:80]!r}")
    if not isinstance(item, dict) or item.keys() != _FIELDS:
        raise ValueError(f"{name} does not have exactly the fields dtype, shape, data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.SIZES:
        raise ValueError(f"dtype {str(dtype)[:20]!r} of {name}")
    if not _integers(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"shape of {name}")
    # Zeros count as ones here: [2^40, 2^40, 0] has no bytes and still overflows who multiplies from the left.
    if dtypes.SIZES[dtype] * prod(filter(None, shape)) > _MAX_INTEGER:
        raise ValueError(f"shape of {name} is too large")
    if not _integers(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets of {name}")
    begin, end = offsets
    info = TensorInfo(dtype=dtype, shape=tuple(shape))
    if end - begin != info.length:
        raise ValueError(f"{name} claims {end - begin} bytes; {dtype} {shape} takes another number")
    return Span(info=info, begin=base + begin, end=base + end)


def _integers(value: Any) -> bool:
    return isinstance(value, list) and {*map(type, value)} <= {int} and min(value, default=0) >= 0


def _in_order(spans: dict[str, Span], at: int) -> Mapping[str, Span]:
    ordered = dict(sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end, item[0])))
    for name, span in ordered.items():
        if span.begin != at:
            raise ValueError(f"a gap or an overlap before {name}: byte {span.begin} instead of {at}")
        at = span.end
    return MappingProxyType(ordered)
