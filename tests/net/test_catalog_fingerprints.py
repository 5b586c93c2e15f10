"""Fingerprints travel by digest: what an advert names is what arrives, or nobody believes it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource
from merge_core.digest import canonical, sha256
from merge_core.simmerge.version1 import compute, similarity
from node.catalog.fingerprints import Fingerprints
from node.catalog.shelf import Measurable, Shelf
from node.domain.reasons import Reason
from node.errors import PeerError, Refused, VerificationFailed
from node.identity import keyring
from node.network.memory import Fabric, MemoryNetwork
from node.provenance.sketch import MAX_SIGNED, SignedFingerprint

NOW = 1_760_000_000.0


def sketch(measured: Measurable) -> bytes:
    leaves = LeafTable.parse(Manifest.parse(measured.manifest.read_bytes()), measured.leaves.read_bytes())
    with Checkpoint.open(measured.directory) as checkpoint:
        return compute(VerifiedSource(checkpoint, leaves), measured.model_id).to_bytes()


def test_a_fingerprint_is_fetched_by_its_digest(model_dir: Path, tmp_path: Path) -> None:
    alice = keyring.create(tmp_path / "alice" / "identity", NOW)
    bob = keyring.create(tmp_path / "bob" / "identity", NOW)
    shelf = Shelf(tmp_path / "alice" / "experts")
    expert = shelf.add(model_dir, identity=alice, sketch=sketch, now=NOW).expert
    fabric = Fabric(seed=1)

    async def story() -> None:
        async with (
            MemoryNetwork(fabric, alice.peer_id) as theirs,
            MemoryNetwork(fabric, bob.peer_id) as ours,
        ):
            Fingerprints(theirs, shelf).start()
            asking = Fingerprints(ours, Shelf(tmp_path / "bob" / "experts"))
            await ours.connect(theirs.addresses()[0])
            found = await asking.fetch(alice.peer_id, expert.fingerprint)
            assert found.fingerprint.model_id == expert.model_id
            assert found.author.peer_id == alice.peer_id
            assert similarity(found.fingerprint, found.fingerprint).overall.cosine == pytest.approx(1.0)
            with pytest.raises(Refused) as refused:
                await asking.fetch(alice.peer_id, sha256(b"unknown"))
            assert refused.value.reason is Reason.UNKNOWN_MODEL
            with pytest.raises(Refused) as refused:
                await ours.request(alice.peer_id, "/weft/fingerprint/1", b"\xff", deadline=5.0)
            assert refused.value.reason is Reason.MALFORMED
            path = expert.folder / "fingerprint.json"
            path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":2'))
            with pytest.raises(PeerError, match="another fingerprint"):
                await asking.fetch(alice.peer_id, expert.fingerprint)

    asyncio.run(story())


def test_a_fingerprint_is_believed_only_as_it_was_signed(model_dir: Path, tmp_path: Path) -> None:
    alice = keyring.create(tmp_path / "alice" / "identity", NOW)
    bob = keyring.create(tmp_path / "bob" / "identity", NOW)
    expert = Shelf(tmp_path / "experts").add(model_dir, identity=alice, sketch=sketch, now=NOW).expert
    data = (expert.folder / "fingerprint.json").read_bytes()
    assert SignedFingerprint.parse(data).fingerprint.model_id == expert.model_id
    value = json.loads(data)
    claims = (
        {**value, "fingerprint": {**value["fingerprint"], "modelId": sha256(b"another")}},
        {**value, "publisher": json.loads(bob.binding.to_bytes())},
        {**value, "signature": value["signature"][:-8] + "AAAAAAA="},
        {**value, "version": 2},
        {**value, "more": 1},
    )
    for claim in claims:
        with pytest.raises(VerificationFailed):
            SignedFingerprint.parse(canonical(claim))
    with pytest.raises(VerificationFailed, match="at most"):
        SignedFingerprint.parse(data + b" " * MAX_SIGNED)
