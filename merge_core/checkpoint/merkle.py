"""The tensor Merkle tree: one digest per MiB, one root per tensor, one root per model.

    leaf         keyed BLAKE3 of at most 1 MiB of tensor bytes
    node         keyed BLAKE3 of left || right; an odd node is promoted unchanged
    content root of the bytes alone: equal bytes have it in common whatever they are called (dedup)
    tensor root  keyed BLAKE3 of the RFC 8785 array [dtype, shape, length, content root]
    set root     the same tree over the RFC 8785 arrays [name, tensor root], sorted by name

Keys come from BLAKE3's derive_key with the contexts below, so that a leaf can never pass for a node.
An empty tensor is one empty leaf. Digests are 32 raw bytes here and hex in JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from blake3 import blake3

from merge_core.digest import canonical

LEAF_SIZE = 1 << 20
DIGEST_SIZE = 32


_PLAIN = re.compile(r"[A-Za-z0-9_./\-]*")


def _key(context: str) -> bytes:
    return blake3(b"", derive_key_context=context).digest()


_LEAF_KEY = _key("weft leaf v1")
_NODE_KEY = _key("weft node v1")
_TENSOR_KEY = _key("weft tensor v1")


def leaf_count(length: int) -> int:
    """How many leaves `length` bytes have: never fewer than one."""
    return max(1, -(-length // LEAF_SIZE))


def leaf_size(length: int, index: int) -> int:
    """The size in bytes of leaf `index` of a tensor of `length` bytes."""
    return min(LEAF_SIZE, length - index * LEAF_SIZE)


def leaf_digest(data: bytes | bytearray | memoryview) -> bytes:
    """Digest one leaf."""
    return blake3(data, key=_LEAF_KEY).digest()


def content_root(leaves: Sequence[bytes]) -> bytes:
    """Fold leaf digests, in order, into the root of the bytes."""
    level = leaves
    while len(level) > 1:
        level = [_join(level[i : i + 2]) for i in range(0, len(level), 2)]
    return level[0]


def tensor_root(dtype: str, shape: Sequence[int], length: int, content: bytes) -> bytes:
    """Bind a content root to the type and shape under which its bytes are read."""
    bound = f'["{dtype}",[{",".join(map(str, shape))}],{length},"{content.hex()}"]'
    return blake3(bound.encode(), key=_TENSOR_KEY).digest()


def tensor_set_root(tensors: Iterable[tuple[str, bytes]]) -> bytes:
    """Fold (name, tensor root) pairs into the root of a model's weights, whatever order they come in."""
    leaves = [leaf_digest(_entry(name, root)) for name, root in sorted(tensors)]
    return content_root(leaves or [leaf_digest(b"")])


def _entry(name: str, root: bytes) -> bytes:
    """The array [name, root], spelled here where no character needs care: models have many tensors."""
    if _PLAIN.fullmatch(name):
        return f'["{name}","{root.hex()}"]'.encode()
    return canonical([name, root.hex()])


def prove(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """The siblings, from the bottom up, that lead from leaf `index` to the content root."""
    siblings: list[bytes] = []
    level = list(leaves)
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            siblings.append(level[sibling])
        level = [_join(level[i : i + 2]) for i in range(0, len(level), 2)]
        index //= 2
    return tuple(siblings)


def root_from_proof(leaf: bytes, index: int, count: int, siblings: Sequence[bytes]) -> bytes:
    """The content root that a proof claims for leaf `index` of `count`.

    Raises ValueError when the number of siblings cannot belong to that position.
    """
    if not 0 <= index < count:
        raise ValueError(f"leaf {index} of {count}")
    node, rest = leaf, list(siblings)
    while count > 1:
        if index ^ 1 < count:
            if not rest:
                raise ValueError("the proof is too short")
            sibling = rest.pop(0)
            node = _join([sibling, node] if index & 1 else [node, sibling])
        index, count = index // 2, -(-count // 2)
    if rest:
        raise ValueError("the proof is too long")
    return node


def _join(pair: Sequence[bytes]) -> bytes:
    return pair[0] if len(pair) == 1 else blake3(pair[0] + pair[1], key=_NODE_KEY).digest()
