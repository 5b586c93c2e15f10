"""Claims that must meet before a leaf is fetched: manifest, signature, headers."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from merge_core.checkpoint.header import parse_header
from merge_core.checkpoint.manifest import Manifest
from merge_core.digest import Digest, sha256
from node.errors import PeerError, Unreachable, VerificationFailed
from node.exchange.blueprint import check_headers, read_header, signed_files
from node.exchange.lookup import collect
from node.identity.binding import bind
from node.identity.keys import HostKey, PublisherKey
from node.provenance.oms import make_bundle

pytestmark = pytest.mark.anyio
WEIGHTS = "model.safetensors"


@pytest.fixture
def manifest(published: Any) -> Manifest:
    return Manifest.parse(published.shelf.open(published.expert.model_id).manifest)


def header_bytes(published: Any) -> bytes:
    data = (published.expert.directory / WEIGHTS).read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def header(published: Any, change: dict[str, dict[str, Any]], drop: str = "") -> Any:
    """The expert's header with some fields of some tensors changed, and maybe one tensor left out."""
    value = json.loads(header_bytes(published)[8:])
    for tensor, fields in change.items():
        value[tensor] = {**value[tensor], **fields}
    value.pop(drop, None)
    text = json.dumps(value).encode()
    return parse_header(len(text).to_bytes(8, "little") + text)


def test_the_publishers_own_header_agrees_with_the_manifest(published: Any, manifest: Manifest) -> None:
    check_headers(manifest, {WEIGHTS: header(published, {})})


def test_a_header_that_reads_the_same_bytes_otherwise_is_refused(published: Any, manifest: Manifest) -> None:
    last = "c.odd"
    for lie in (
        header(published, {"a.bias": {"dtype": "I32"}}),
        header(published, {"model.layers.0.weight": {"shape": [1280, 1024]}}),
        header(published, {}, drop=last),
    ):
        with pytest.raises(PeerError):
            check_headers(manifest, {WEIGHTS: lie})
    twice = {WEIGHTS: header(published, {}), "more.safetensors": header(published, {})}
    with pytest.raises(PeerError):
        check_headers(manifest, twice)


def test_a_header_for_another_size_or_with_bytes_behind_it_is_refused(published: Any) -> None:
    data, size = header_bytes(published), (published.expert.directory / WEIGHTS).stat().st_size
    assert read_header(WEIGHTS, data, size).length == len(data)
    for wrong, length in ((data, size + 1), (data, size - 1), (data + b" ", size), (data[:-1], size)):
        with pytest.raises(PeerError):
            read_header(WEIGHTS, wrong, length)


def test_a_signature_over_another_model_is_refused(manifest: Manifest) -> None:
    key = PublisherKey.generate()
    record = bind(HostKey.generate(), key, now=0.0).to_bytes()
    good = {file.path: file.sha256 for file in manifest.files} | {
        WEIGHTS: Digest("sha256:" + "1" * 64),
        "weft.publisher.json": sha256(record),
        "weft.manifest.json": Digest(manifest.model_id),
    }
    publisher = Digest(key.key_id)
    assert signed_files(manifest, make_bundle(good, key), record, publisher) == good

    other = Digest("sha256:" + "2" * 64)
    for change in (
        {"config.json": other},
        {"generation_config.json": other},
        {"weft.manifest.json": other},
        {"weft.publisher.json": other},
        {"config.json": None},
        {"weft.publisher.json": None},
        {"weft.manifest.json": None},
        {WEIGHTS: None},
    ):
        files = {path: digest for path, digest in {**good, **change}.items() if digest}
        with pytest.raises(VerificationFailed):
            signed_files(manifest, make_bundle(files, key), record, publisher)
    with pytest.raises(VerificationFailed):
        signed_files(manifest, make_bundle(good, PublisherKey.generate()), record, publisher)
    with pytest.raises(VerificationFailed):
        signed_files(manifest, make_bundle(good, key), record, other)


async def test_no_more_is_read_than_belongs() -> None:
    sent = 0

    async def endless() -> AsyncGenerator[bytes, None]:
        nonlocal sent
        while sent < 100:
            sent += 1
            yield bytes(10)

    with pytest.raises(PeerError):
        await collect(endless(), 35)
    assert sent == 4


async def test_what_does_not_come_is_not_waited_for() -> None:
    async def silent() -> AsyncGenerator[bytes, None]:
        yield b"a"
        await asyncio.Event().wait()

    with pytest.raises(Unreachable):
        await collect(silent(), 35, deadline=0.01)
