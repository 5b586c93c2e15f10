"""Fingerprints and minis travel by digest: what an advert names is what arrives, or nobody believes it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource
from merge_core.digest import canonical, sha256
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.mini import Mini
from merge_core.simmerge.structural.sketcher import compute
from node.catalog.expert import FINGERPRINT, Expert
from node.catalog.fingerprint_cache import LEAST, FingerprintCache
from node.catalog.fingerprints import SKETCHES, WHOLE, Fingerprints, Known
from node.catalog.shelf import Measurable, Shelf, Sketched
from node.domain import sketches
from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import PeerError, Refused, VerificationFailed
from node.identity import keyring
from node.identity.envelopes import pae
from node.identity.keyring import Identity
from node.network.memory import Fabric, MemoryNetwork
from node.provenance.fingerprint import MAX_SIGNED, PAYLOAD_TYPE, SignedFingerprint

NOW = 1_760_000_000.0


def sketch(measured: Measurable) -> Sketched:
    leaves = LeafTable.parse(Manifest.parse(measured.manifest.read_bytes()), measured.leaves.read_bytes())
    with Checkpoint.open(measured.directory) as checkpoint:
        structure = compute(VerifiedSource(checkpoint, leaves))
    made = Fingerprint(model_id=measured.model_id, structure=structure, behaviour=None)
    return Sketched(fingerprint=made.to_bytes())


def known(folder: Path, shelf: Shelf | None = None) -> Known:
    return Known(shelf or Shelf(folder / "experts"), FingerprintCache(folder / "cache"))


def whole(expert: Expert) -> bytes:
    return (expert.folder / FINGERPRINT).read_bytes()


@dataclass(frozen=True, kw_only=True)
class Trio:
    """Alice shares an expert, Bob asks her, Carol asks Bob alone."""

    alice: Identity
    bob: Identity
    carol: Identity
    expert: Expert
    folder: Path


@pytest.fixture
def trio(model_dir: Path, tmp_path: Path) -> Trio:
    people = {name: keyring.create(tmp_path / name / "identity", NOW) for name in ("alice", "bob", "carol")}
    shelf = Shelf(tmp_path / "alice" / "experts")
    expert = shelf.add(model_dir, identity=people["alice"], sketch=sketch, now=NOW).expert
    return Trio(expert=expert, folder=tmp_path, **people)


def play(trio: Trio, story: Callable[..., Awaitable[None]]) -> None:
    """Let the three meet, each with a Fingerprints of its own."""

    async def run() -> None:
        fabric = Fabric(seed=1)
        async with AsyncExitStack() as stack:
            nodes = []
            for name in ("alice", "bob", "carol"):
                network = MemoryNetwork(fabric, getattr(trio, name).peer_id)
                made = Fingerprints(network, known(trio.folder / name))
                made.start()
                nodes.append((await stack.enter_async_context(network), made))
            (one, _), (two, _), (three, _) = nodes
            await two.connect(one.addresses()[0])
            await three.connect(two.addresses()[0])
            await story(*(made for _, made in nodes))

    asyncio.run(run())


def test_a_fingerprint_comes_in_pieces_and_whoever_asked_passes_it_on(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sketches, "PIECE", 1000)
    digest = trio.expert.fingerprint

    async def story(alice: Fingerprints, bob: Fingerprints, carol: Fingerprints) -> None:
        with pytest.raises(Refused) as refused:
            await carol.fetch(trio.bob.peer_id, digest)
        assert refused.value.reason is Reason.UNKNOWN_MODEL
        moved: list[int] = []
        data = await bob.fetch(trio.alice.peer_id, digest, on_bytes=moved.append)
        assert data == whole(trio.expert) and len(moved) == -(-len(data) // 1000)
        assert len(data) < sum(moved) < len(data) * 1.2
        assert await carol.fetch(trio.bob.peer_id, digest) == data == carol.known.fingerprint(digest)
        signed = SignedFingerprint.parse(data)
        assert signed.fingerprint.model_id == trio.expert.model_id
        assert signed.author.peer_id == trio.alice.peer_id

    play(trio, story)


def test_minis_come_in_batches_and_one_that_a_peer_lacks_is_left_out(trio: Trio) -> None:
    unknown = [sha256(str(number).encode()) for number in range(130)]
    wanted = [*unknown[:100], trio.expert.sketch, *unknown[100:]]

    async def story(alice: Fingerprints, bob: Fingerprints, carol: Fingerprints) -> None:
        moved: list[int] = []
        found = await bob.fetch_sketches(trio.alice.peer_id, wanted, on_bytes=moved.append)
        assert len(moved) == 3 and found.keys() == {trio.expert.sketch}
        mini = Mini.parse(found[trio.expert.sketch])
        assert mini.model_id == trio.expert.model_id
        assert mini.fingerprint == SignedFingerprint.parse(whole(trio.expert)).sworn.fingerprint
        assert await carol.fetch_sketches(trio.bob.peer_id, wanted) == found

    play(trio, story)


def test_a_peer_that_sends_anything_else_is_not_believed(trio: Trio) -> None:
    digest, mini = trio.expert.fingerprint, trio.expert.sketch
    data = whole(trio.expert)
    answers = {
        WHOLE: [
            sketches.piece(data[:-1] + b"?", 0),
            b"",
            (5).to_bytes(4, "big") + b"123456",
            (1 << 31).to_bytes(4, "big") + b"1",
            len(data).to_bytes(4, "big"),
        ],
        SKETCHES: [b"", sketches.pack([b"another"]), sketches.pack([None, None]), b"\xff\xff" + b"1" * 65000],
    }

    async def story(alice: Fingerprints, bob: Fingerprints, carol: Fingerprints) -> None:
        for protocol, replies in answers.items():
            for reply in replies:

                async def answer(peer: PeerId, payload: bytes, reply: bytes = reply) -> bytes:
                    return reply

                alice._network._handlers[protocol] = answer  # type: ignore[attr-defined]
                with pytest.raises(PeerError):
                    if protocol == WHOLE:
                        await bob.fetch(trio.alice.peer_id, digest)
                    else:
                        await bob.fetch_sketches(trio.alice.peer_id, [mini])
        for payload in (b"", b"[]", b'{"digest":"x","offset":0}', b'{"digests":["x"]}'):
            for protocol in (WHOLE, SKETCHES):
                with pytest.raises(Refused) as refused:
                    await carol._network.request(trio.bob.peer_id, protocol, payload, deadline=5.0)
                assert refused.value.reason is Reason.MALFORMED

    play(trio, story)
    assert not list((trio.folder / "bob" / "cache").glob("*"))


def test_a_fingerprint_is_believed_only_as_it_was_signed(trio: Trio) -> None:
    data = whole(trio.expert)
    size = 4 + int.from_bytes(data[:4], "big")
    head, body = json.loads(data[4:size]), data[size:]
    statement = head["statement"]
    claims = [
        {**head, "statement": {**statement, "modelId": sha256(b"another")}},
        {**head, "statement": {**statement, "structure": sha256(b"another")}},
        {**head, "statement": {**statement, "version": 3}},
        {**head, "publisher": json.loads(trio.bob.binding.to_bytes())},
        {**head, "signature": head["signature"][:-8] + "AAAAAAA="},
        {**head, "more": 1},
    ]
    changed = [len(canonical(c)).to_bytes(4, "big") + canonical(c) + body for c in claims]
    changed += [data[:-1], data + b" ", data[:200], b"", b"\xff" * 100, data + b" " * MAX_SIGNED]
    for each in changed:
        with pytest.raises(VerificationFailed):
            SignedFingerprint.parse(each)
    with pytest.raises(VerificationFailed, match="another model than its author says"):
        SignedFingerprint.parse(sworn_falsely(data, trio.alice))


def sworn_falsely(data: bytes, identity: Identity) -> bytes:
    """What an author signs that swears to another structure than lies in the fingerprint."""
    size = 4 + int.from_bytes(data[:4], "big")
    statement = json.loads(data[4:size])["statement"] | {"structure": sha256(b"better")}
    signature = identity.publisher.sign(pae(PAYLOAD_TYPE, canonical(statement)))
    head = canonical(
        {
            "statement": statement,
            "publisher": json.loads(identity.binding.to_bytes()),
            "signature": base64.b64encode(signature).decode(),
        }
    )
    return len(head).to_bytes(4, "big") + head + data[size:]


def test_the_cache_forgets_what_was_not_used_for_longest(tmp_path: Path) -> None:
    cache = FingerprintCache(tmp_path / "cache", room=10 * LEAST)
    entries = [bytes([number]) * 100 for number in range(10)]
    for entry in entries:
        cache.put(entry)
    assert cache.get(sha256(entries[0]), limit=1 << 20) == entries[0]
    assert cache.get(sha256(entries[0]), limit=len(entries[0]) - 1) is None
    old = time.time() - 3600
    for number, entry in enumerate(entries[1:]):
        os.utime(tmp_path / "cache" / sha256(entry).hex, (old + number, old + number))
    cache.put(b"more")
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {sha256(entry).hex for entry in (entries[0], *entries[3:], b"more")}

    damaged = tmp_path / "cache" / sha256(b"more").hex
    damaged.write_bytes(b"less")
    assert FingerprintCache(tmp_path / "cache").get(sha256(b"more"), limit=4) is None and not damaged.exists()
    assert FingerprintCache(tmp_path / "nothing").get(sha256(b"more"), limit=4) is None
