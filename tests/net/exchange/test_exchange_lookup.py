"""What is asked of peers before any agreement: nobody makes us hold or wait for more than we asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from merge_core.checkpoint import manifest as manifests
from merge_core.checkpoint.manifest import MAX_LEAF_TABLE, FileRecord, LeafTable, Manifest, TensorRecord
from merge_core.digest import sha256
from merge_core.errors import CorruptCheckpoint
from node.domain.holding import ModelRef
from node.errors import NotEnoughPeers
from node.exchange import lookup
from node.identity.keys import HostKey

GIB = 1 << 30


def of_size(length: int) -> Manifest:
    tensor = TensorRecord(name="a", dtype="U8", shape=(length,), root="0" * 64)
    return Manifest(architecture="Llama", files=(), tensors=(tensor,))


class Liar:
    """A holder with a manifest and a leaf table that never ends."""

    peer = HostKey.from_private_bytes(bytes(32)).peer_id
    lanes = 1

    def __init__(self, manifest: Manifest) -> None:
        self.said = manifest
        self.sent = 0

    async def manifest(self, ref: ModelRef) -> AsyncGenerator[bytes, None]:
        yield self.said.to_bytes()

    async def file(self, ref: ModelRef, path: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        self.sent += length
        yield b"x" * length

    async def leaf_table(self, ref: ModelRef) -> AsyncGenerator[bytes, None]:
        while True:
            self.sent += 1 << 20
            yield bytes(1 << 20)


def test_a_manifest_of_a_few_bytes_names_no_leaf_table_that_fills_memory() -> None:
    manifest = Manifest.parse(of_size(2**53 - 1).to_bytes())
    liar = Liar(manifest)
    with pytest.raises(CorruptCheckpoint, match="at most 67108864 are read"):
        asyncio.run(lookup.read_leaf_table([liar], manifest))  # type: ignore[list-item]
    assert liar.sent == 0
    with pytest.raises(CorruptCheckpoint, match="at most 67108864 are read"):
        LeafTable.parse(manifest, b"")


def of_tokenizer(size: int) -> Manifest:
    files = tuple(
        FileRecord(path=path, size=size, sha256=sha256(b"honest"))
        for path in ("tokenizer.json", "vocab.json")
    )
    return replace(of_size(5), files=files)


def test_a_tokenizer_that_is_another_or_too_large_is_refused() -> None:
    liar = Liar(of_tokenizer(6))
    with pytest.raises(NotEnoughPeers, match=r"sent another tokenizer\.json"):
        asyncio.run(lookup.read_tokenizer([liar], liar.said))  # type: ignore[list-item]
    assert liar.sent == 6
    huge = Liar(of_tokenizer(40 << 20))
    with pytest.raises(CorruptCheckpoint, match="has more than 67108864 bytes"):
        asyncio.run(lookup.read_tokenizer([huge], huge.said))  # type: ignore[list-item]
    assert huge.sent == 0


def test_two_tebibytes_of_weights_can_be_held() -> None:
    assert LeafTable.size(of_size(2048 * GIB)) == MAX_LEAF_TABLE


def test_a_manifest_is_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, threads = of_size(5), []
    loads = manifests.parse_bounded

    def noted(data: bytes, *, max_values: int) -> object:
        threads.append(threading.current_thread())
        return loads(data, max_values=max_values)

    monkeypatch.setattr(manifests, "parse_bounded", noted)
    read = asyncio.run(lookup.read_manifest([Liar(manifest)], manifest.model_id))  # type: ignore[list-item]
    assert read == manifest and read.model_id == manifest.model_id
    assert len(threads) == 1 and threads[0] is not threading.main_thread()
