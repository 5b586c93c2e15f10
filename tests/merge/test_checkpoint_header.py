"""The strict header parser: what it reads, what it refuses, and that the public library agrees with it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from merge_core.checkpoint import dtypes
from merge_core.checkpoint.header import (
    MAX_HEADER,
    build_header,
    header_length,
    parse_header,
    read_header,
)
from merge_core.checkpoint.source import TensorInfo
from merge_core.errors import CorruptCheckpoint

NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_./\-]{0,20}", fullmatch=True).filter(
    lambda name: name != "__metadata__"
)
TENSORS = st.dictionaries(
    NAMES,
    st.builds(
        lambda dtype, shape: TensorInfo(dtype=dtype, shape=tuple(shape)),
        st.sampled_from(sorted(dtypes.SIZES)),
        st.lists(st.integers(0, 5), max_size=3),
    ),
    max_size=6,
)


def file_of(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def refused(data: bytes) -> str:
    with pytest.raises(CorruptCheckpoint) as caught:
        parse_header(data, len(data))
    assert caught.value.hint
    return caught.value.why


def test_two_tensors_are_found_at_their_file_offsets() -> None:
    data = file_of({"b": tensor(offsets=(4, 12)), "a": tensor("F16", (2, 1), (0, 4))}, bytes(12))
    header = parse_header(data, len(data))
    assert list(header.tensors) == ["a", "b"]
    assert header.tensors["b"].end == len(data)
    assert header.tensors["a"].begin == header.length == len(data) - 12
    assert header.tensors["a"].info == TensorInfo(dtype="F16", shape=(2, 1))


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        (b'{"a":1,"a":2}', b"", "twice"),
        (b'{"__metadata__":{"x":"1","x":"2"}}', b"", "twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "twice"),
        ({"a": tensor()}, bytes(7), "the file at byte"),
        ({"a": tensor()}, bytes(9), "the file at byte"),
        ({"a": tensor(offsets=(1, 9))}, bytes(9), "a gap"),
        ({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20), "a gap"),
        ({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12), "overlap"),
        ({"a": tensor(), "b": tensor()}, bytes(8), "overlap"),
        ({"a": tensor(), "b": tensor(shape=(0,), offsets=(4, 4))}, bytes(8), "overlap"),
        ({"a": tensor(offsets=(8, 0))}, bytes(8), "claims"),
        ({"a": tensor(shape=(3,))}, bytes(8), "claims"),
        ({"a": tensor("F4", (16,))}, bytes(8), "dtype"),
        ({"a": tensor(["F32"])}, bytes(8), "dtype"),  # type: ignore[arg-type]
        ({"a": tensor(extra=1)}, bytes(8), "exactly the fields"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "exactly the fields"),
        ({"a": tensor(offsets=(0, 8, 8))}, bytes(8), "data_offsets"),
        ({"a": tensor(shape=(True, 2))}, bytes(8), "shape"),
        ({"a": tensor(shape=(-2, -1))}, bytes(8), "number -2"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', bytes(8), "number -0"),
        (b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', bytes(8), "number 2.0"),
        (b'{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', bytes(8), "number 2e0"),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8), "number NaN"),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', b"", "number 999"),
        ({"a": tensor(shape=(2**50, 2**50, 0), offsets=(0, 0))}, b"", "too large"),
        ({"a": tensor(shape=(1,) * 15 + (2, 1))}, bytes(8), "shape"),
        ({"../a": tensor()}, bytes(8), "tensor name"),
        ({"": tensor()}, bytes(8), "tensor name"),
        ({"a\n": tensor()}, bytes(8), "tensor name"),
        ({"x" * 513: tensor()}, bytes(8), "tensor name"),
        ({"ä": tensor()}, bytes(8), "tensor name"),
        ({"__metadata__": {"a": 1}}, b"", "text to text"),
        ({"__metadata__": None}, b"", "text to text"),
        (b'{"__metadata__":{"a":"\\ud800"}}', b"", "surrogates"),
        (b'["a"]', b"", "begin with an object"),
        (b" {}", b"", "begin with an object"),
        (b"\xef\xbb\xbf{}", b"", "begin with an object"),
        ('{"a":1}'.encode("utf-16"), b"", "utf-8"),
        (b"{}{}", b"", "Extra data"),
        (b"{", b"", "not a safetensors header"),
        (b'{"a":' + b"[" * 100_000, b"", "recursion"),
        (b"", b"", "begin with an object"),
    ],
)
def test_a_header_that_is_not_exact_is_refused(header: Any, data: bytes, why: str) -> None:
    assert why in refused(file_of(header, data))


def test_a_length_is_checked_before_it_is_believed() -> None:
    assert "at most 8388608" in refused((MAX_HEADER + 1).to_bytes(8, "little") + b"{}")
    assert "at most 8388608" in refused(b"\xff" * 8 + b"{}")
    assert "truncated" in refused((3).to_bytes(8, "little") + b"{}")
    assert "no header" in refused(b"\x02\0\0\0\0\0\0")
    with pytest.raises(CorruptCheckpoint, match="truncated: 9 of 10"):
        parse_header(file_of(b"{}")[:9], 10)
    assert header_length(file_of(b"{}"), 10) == 10


def test_more_tensors_than_anybody_needs_are_refused() -> None:
    entry = ":{"
    text = "{" + ",".join(f'"{i}"{entry}}}' for i in range(100_001)) + "}"
    assert "at most 100000" in refused(file_of(text.encode()))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"a": tensor()}, bytes(5)))
    with pytest.raises(CorruptCheckpoint, match=r"^model\.safetensors: not a safetensors header"):
        read_header(path)


@given(TENSORS, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
@settings(max_examples=150, deadline=None)
def test_what_is_built_is_read_back_and_the_library_reads_the_same(
    tensors: dict[str, TensorInfo], metadata: dict[str, str]
) -> None:
    metadata = {k: v for k, v in metadata.items() if _encodes(k + v)}
    head, header = build_header(tensors, metadata)
    assert parse_header(head) == header
    assert {name: span.info for name, span in header.tensors.items()} == tensors
    assert header.metadata == metadata
    assert len(head) % 8 == 0
    assert all(span.begin % dtypes.SIZES[span.dtype] == 0 for span in header.tensors.values())
    assert build_header(dict(reversed(tensors.items())), metadata) == (head, header)
    _agrees_with_the_library(head + bytes(header.file_size - len(head)))


def test_a_file_of_mixed_types_loads_with_the_library(tmp_path: Path) -> None:
    tensors = {"odd": TensorInfo(dtype="F16", shape=(3,)), "wide": TensorInfo(dtype="F32", shape=(2,))}
    values = {"odd": np.arange(3, dtype=np.float16), "wide": np.array([0.5, -2.0], dtype=np.float32)}
    head, _ = build_header(tensors, {"format": "pt"})
    order = list(parse_header(head).tensors)
    path = tmp_path / "model.safetensors"
    path.write_bytes(head + b"".join(values[name].tobytes() for name in order))
    loaded = load_file(path)
    assert all(np.array_equal(loaded[name], values[name]) for name in values)


@pytest.mark.parametrize("name", ["__metadata__", "a b", ""])
def test_a_name_that_could_not_be_read_back_is_not_written(name: str) -> None:
    with pytest.raises(ValueError, match="tensor"):
        build_header({name: TensorInfo(dtype="F32", shape=(1,))}, {"format": "pt"})


@given(st.binary(max_size=80), st.integers(0, 40))
@example(b"{}", 2)
@settings(max_examples=300, deadline=None)
def test_no_bytes_do_worse_than_a_refusal(noise: bytes, length: int) -> None:
    data = length.to_bytes(8, "little") + noise
    try:
        parse_header(data, len(data))
    except CorruptCheckpoint:
        return
    _agrees_with_the_library(data)


def test_whatever_passes_here_passes_the_library_with_the_same_meaning() -> None:
    """Differential fuzz: 6,000 small damages to valid files, by structure and by byte."""
    rng = random.Random(20240607)
    accepted = refusals = library_only = 0
    for _ in range(6000):
        data = _damage(rng)
        try:
            parse_header(data, len(data))
        except CorruptCheckpoint:
            refusals += 1
            library_only += _library_accepts(data)
        else:
            accepted += 1
            _agrees_with_the_library(data)
    # The fuzz is worth something only if it reaches all three kinds.
    assert accepted > 300
    assert refusals > 3000
    assert library_only > 100


def _damage(rng: random.Random) -> bytes:
    pairs = [
        ["__metadata__", {"format": "pt"}],
        ["a", tensor("BF16", (2, 2), (0, 8))],
        ["b", tensor("I64", (), (8, 16))],
        ["c", tensor("U8", (0, 3), (16, 16))],
        ["d", tensor("F8_E4M3", (3,), (16, 19))],
    ]
    numbers = [
        "0",
        "1",
        "2",
        "3",
        "8",
        "16",
        "19",
        "-0",
        "1.0",
        "true",
        '"1"',
        "null",
        "18446744073709551616",
        "[]",
    ]
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        entry = rng.choice(pairs)
        match rng.randrange(7):
            case 0:
                entry[0] = rng.choice(["a", "b", "__metadata__", "x y", "ü", "e", ""])
            case 1:
                pairs.append([entry[0], dict(entry[1])])
            case 2:
                pairs.remove(entry)
            case 3:
                entry[1][rng.choice(["dtype", "more"])] = rng.choice([*dtypes.SIZES, "F4", "", 7, None])
            case 4:
                entry[1]["data_offsets"] = [rng.choice((0, 8, 16, 19)), rng.choice((0, 8, 16, 19))]
            case 5:
                entry[1]["shape"] = [rng.choice((0, 1, 2, 3, 4, 2**40)) for _ in range(rng.randrange(4))]
            case 6:
                rng.shuffle(pairs)
        if not pairs:
            break
    text = "{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs) + "}"
    if rng.random() < 0.3:
        digits = [i for i, c in enumerate(text) if c.isdigit()]
        if digits:
            i = rng.choice(digits)
            text = text[:i] + rng.choice(numbers) + text[i + 1 :]
    raw = bytearray(text.encode() + b" " * rng.choice((0, 0, 1, 5)))
    if rng.random() < 0.3:
        raw[rng.randrange(len(raw))] = rng.choice(b' \t\n"\\{}[],:09a\x00\x80\xff')
    body = rng.choice((19, 19, 19, 19, 16, 8, 20, 0))
    length = len(raw) + rng.choice((0,) * 12 + (1, -1))
    return length.to_bytes(8, "little") + bytes(raw) + bytes(body)


def _agrees_with_the_library(data: bytes) -> None:
    ours = parse_header(data, len(data)).tensors
    theirs = dict(safetensors.deserialize(data))
    assert ours.keys() == theirs.keys()
    for name, span in ours.items():
        assert theirs[name]["dtype"] == span.dtype
        assert theirs[name]["shape"] == list(span.shape)
        assert bytes(theirs[name]["data"]) == data[span.begin : span.end]


def _library_accepts(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
