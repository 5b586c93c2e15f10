"""The Merkle tree, the manifest and the leaf table: proofs hold, lies do not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.checkpoint import merkle
from merge_core.checkpoint.manifest import (
    TENSOR_NAME,
    FileRecord,
    LeafTable,
    Manifest,
    TensorRecord,
    tensor_root_of,
)
from merge_core.digest import canonical, sha256
from merge_core.errors import CorruptCheckpoint

LEAVES = st.lists(st.binary(min_size=1, max_size=4).map(merkle.leaf_digest), min_size=1, max_size=40)
MIB = 1 << 20


def manifest() -> tuple[Manifest, LeafTable]:
    sizes = {"a": 3 * MIB + 1, "b": 0, "c": MIB}
    leaves = {
        name: [
            merkle.leaf_digest(bytes([i]) * merkle.leaf_size(size, i)) for i in range(merkle.leaf_count(size))
        ]
        for name, size in sizes.items()
    }
    tensors = tuple(
        TensorRecord(
            name=name, dtype="U8", shape=(size,), root=tensor_root_of("U8", (size,), leaves[name]).hex()
        )
        for name, size in sizes.items()
    )
    config = FileRecord(path="config.json", size=2, sha256=sha256(b"{}"))
    return Manifest(architecture="LlamaForCausalLM", files=(config,), tensors=tensors), LeafTable(leaves)


@given(LEAVES, st.data())
@settings(deadline=None)
def test_every_leaf_can_be_proved_and_no_other(leaves: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1))
    proof = merkle.prove(leaves, index)
    root = merkle.content_root(leaves)
    assert merkle.root_from_proof(leaves[index], index, len(leaves), proof) == root
    lie = merkle.leaf_digest(b"another leaf")
    assert merkle.root_from_proof(lie, index, len(leaves), proof) != root
    with pytest.raises(ValueError, match="too long"):
        merkle.root_from_proof(leaves[index], index, len(leaves), (*proof, lie))
    if proof:
        with pytest.raises(ValueError, match="too short"):
            merkle.root_from_proof(leaves[index], index, len(leaves), proof[:-1])


@given(LEAVES, LEAVES)
@settings(deadline=None)
def test_different_leaves_have_different_roots(one: list[bytes], two: list[bytes]) -> None:
    assert (merkle.content_root(one) == merkle.content_root(two)) == (one == two)


def test_the_tree_is_the_published_one() -> None:
    """Written out by hand from the definition, so that a change of the format shows."""

    def key(context: str) -> bytes:
        return blake3(b"", derive_key_context=context).digest()

    a, b, c = (blake3(bytes([i]), key=key("weft leaf v1")).digest() for i in range(3))
    assert merkle.leaf_digest(b"\x01") == b
    left = blake3(a + b, key=key("weft node v1")).digest()
    root = blake3(left + c, key=key("weft node v1")).digest()
    assert merkle.content_root([a, b, c]) == root
    bound = blake3(f'["U8",[3],3,"{root.hex()}"]'.encode(), key=key("weft tensor v1")).digest()
    assert merkle.tensor_root("U8", (3,), 3, root) == bound
    assert merkle.tensor_set_root([("t", bound)]) == merkle.leaf_digest(f'["t","{bound.hex()}"]'.encode())


def test_type_and_shape_are_bound() -> None:
    leaves = [merkle.leaf_digest(bytes(8))]
    roots = {tensor_root_of("F32", s, leaves) for s in ((2,), (1, 2), (2, 1))}
    assert len(roots | {tensor_root_of("I32", (2,), leaves)}) == 4


def test_a_manifest_survives_the_round_trip() -> None:
    made, leaves = manifest()
    assert Manifest.parse(made.to_bytes()) == made
    assert made.model_id == sha256(made.to_bytes())
    assert LeafTable.parse(made, leaves.to_bytes()) == leaves


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"architecture": "x" * 129},
        {"architecture": None},
        {"more": 1},
        {"tensorSetRoot": "0" * 64},
        {"files": [{"path": "../config.json", "size": 2, "sha256": sha256(b"{}")}]},
        {"files": [{"path": "config.json", "size": -1, "sha256": sha256(b"{}")}]},
        {"files": [{"path": "config.json", "size": 2, "sha256": "sha256:1"}]},
        {"files": [{"path": "config.json", "size": 2, "sha256": sha256(b"{}")}] * 2},
        {"tensors": [{"name": "a", "dtype": "F4", "shape": [1], "root": "0" * 64}]},
        {"tensors": [{"name": "../a b", "dtype": "U8", "shape": [1], "root": "0" * 64}]},
        {"tensors": [{"name": "a", "dtype": "U8", "shape": [True], "root": "0" * 64}]},
        {"tensors": [{"name": "a", "dtype": "U8", "shape": [2**40, 2**40], "root": "0" * 64}]},
        {"tensors": "a"},
        {"tensors": [[]]},
    ],
)
def test_a_manifest_that_is_not_exact_is_refused(change: dict[str, Any]) -> None:
    value = json.loads(manifest()[0].to_bytes())
    with pytest.raises(CorruptCheckpoint, match="not a manifest"):
        Manifest.parse(canonical({**value, **change}))


@pytest.mark.parametrize("change", [{"version": True}, {"files": {}}])
def test_a_manifest_that_would_be_written_otherwise_is_refused(change: dict[str, Any]) -> None:
    value = json.loads(manifest()[0].to_bytes())
    with pytest.raises(CorruptCheckpoint, match="not a manifest"):
        Manifest.parse(canonical({**value, **change}))


def test_another_spelling_of_a_manifest_is_refused() -> None:
    data = manifest()[0].to_bytes()
    for spelling in (
        json.dumps(json.loads(data)).encode(),
        data + b"\n",
        b"[" * 100_000,
        b"",
        b"\xff",
        b"null",
    ):
        with pytest.raises(CorruptCheckpoint, match="not a manifest"):
            Manifest.parse(spelling)


def test_a_manifest_of_nested_lists_is_refused_before_it_is_read() -> None:
    data = b'{"architecture":"L","files":[' + b"[]," * 2_200_000 + b"[]]}"
    with pytest.raises(CorruptCheckpoint, match="more than 2101000 values"):
        Manifest.parse(data)


def test_a_manifest_that_was_read_knows_its_name() -> None:
    made = manifest()[0]
    assert Manifest.parse(made.to_bytes()).model_id == made.model_id == sha256(made.to_bytes())


@given(st.integers(0, 6 * 32 - 1), st.integers(0, 7))
@settings(deadline=None)
def test_a_leaf_table_with_a_flipped_bit_is_refused(at: int, bit: int) -> None:
    made, leaves = manifest()
    data = bytearray(leaves.to_bytes())
    assert len(data) == 6 * 32
    data[at] ^= 1 << bit
    with pytest.raises(CorruptCheckpoint, match="does not belong"):
        LeafTable.parse(made, bytes(data))


def test_a_leaf_table_of_another_length_is_refused() -> None:
    made, leaves = manifest()
    for data in (b"", leaves.to_bytes()[:-1], leaves.to_bytes() + bytes(32)):
        with pytest.raises(CorruptCheckpoint, match="belong"):
            LeafTable.parse(made, data)


@given(
    st.dictionaries(
        st.text(max_size=20) | st.from_regex(TENSOR_NAME, fullmatch=True), st.binary(min_size=32, max_size=32)
    )
)
@settings(max_examples=100, deadline=None)
def test_roots_are_over_canonical_arrays_however_they_are_spelled(tensors: dict[str, bytes]) -> None:
    tensors = {name: root for name, root in tensors.items() if name.isprintable()}
    leaves = [merkle.leaf_digest(canonical([name, root.hex()])) for name, root in sorted(tensors.items())]
    expected = merkle.content_root(leaves or [merkle.leaf_digest(b"")])
    assert merkle.tensor_set_root(tensors.items()) == expected
    key = blake3(b"", derive_key_context="weft tensor v1").digest()
    for root in tensors.values():
        bound = canonical(["BF16", [3, 4], 24, root.hex()])
        assert merkle.tensor_root("BF16", (3, 4), 24, root) == blake3(bound, key=key).digest()
