"""Lies about weights: whoever swears to another structure than they have is found out, and nobody else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import Checkpoint, Measured, VerifiedSource, measure
from merge_core.digest import Digest, sha256
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.mini import Mini
from merge_core.simmerge.structural.sketcher import compute
from merge_core.simmerge.structural.structure import Structure
from node.catalog.book import Listing
from node.catalog.shelf import Measurable
from node.domain.advert import AdvertisedModel
from node.domain.ids import PeerId
from node.errors import FalseFingerprint
from node.exchange.fetch import Fetched
from node.identity import keyring
from node.identity.keyring import Identity
from node.merging import acquire
from node.merging.terms import Offered
from node.merging.vetting import Vetting
from node.provenance.fault import FAULTS, Fault, Standing, accusations, between
from node.provenance.fingerprint import SignedFingerprint, sign
from node.records.book import Outcome, RecordBook
from node.store import Store

NOW = 1_760_000_000.0
SHAPES = {
    "model.embed_tokens.weight": (64, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (40, 16),
    "model.norm.weight": (16,),
}


def write(directory: Path, tensors: dict[str, Any]) -> Path:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text('{"architectures":["LlamaForCausalLM"]}')
    return directory


def weights(seed: int) -> dict[str, Any]:
    """A small model in float16, as it may be published."""
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(shape).astype(np.float16) for name, shape in SHAPES.items()}


def another(tensors: dict[str, Any], seed: int) -> dict[str, Any]:
    return weights(10_000 + seed)


def noisy(tensors: dict[str, Any], seed: int) -> dict[str, Any]:
    """Noise of 1 % of each tensor's standard deviation."""
    draw = np.random.default_rng(20_000 + seed)
    return {
        name: (t + 0.01 * t.std() * draw.standard_normal(t.shape)).astype(t.dtype)
        for name, t in tensors.items()
    }


def scaled(tensors: dict[str, Any], seed: int) -> dict[str, Any]:
    return {name: (t * np.float32(1.01)).astype(t.dtype) for name, t in tensors.items()}


def structure_of(directory: Path) -> Structure:
    with Checkpoint.open(directory) as checkpoint:
        return compute(VerifiedSource(checkpoint, measure(checkpoint).leaves))


def measured(directory: Path) -> Measured:
    with Checkpoint.open(directory) as checkpoint:
        return measure(checkpoint)


def swear(identity: Identity, model: Measured, structure: Structure) -> SignedFingerprint:
    """What a publisher signs for a model, true or not."""
    made = Fingerprint(model_id=model.manifest.model_id, structure=structure, behaviour=None)
    return SignedFingerprint.parse(sign(made.to_bytes(), identity))


@pytest.fixture
def alice(tmp_path: Path) -> Identity:
    return keyring.create(tmp_path / "alice", NOW)


@pytest.fixture
def bob(tmp_path: Path) -> Identity:
    return keyring.create(tmp_path / "bob", NOW)


def test_a_hundred_liars_are_caught_and_of_a_hundred_honest_ones_none(
    tmp_path: Path, alice: Identity
) -> None:
    lies: tuple[Callable[[dict[str, Any], int], dict[str, Any]], ...] = (another, noisy, scaled)
    caught = accused = 0
    for seed in range(100):
        honest = write(tmp_path / f"{seed}" / "honest", weights(seed))
        lie = write(tmp_path / f"{seed}" / "lie", lies[seed % 3](weights(seed), seed))
        model, found = measured(honest), structure_of(honest)
        caught += between(swear(alice, model, structure_of(lie)), found.digest) is not None
        accused += between(swear(alice, model, found), found.digest) is not None
    assert (caught, accused) == (100, 0)


@dataclass(kw_only=True)
class Finder:
    """One node's vetting, which measures in this process and tells a list."""

    book: RecordBook[Fault]
    identity: Identity
    said: list[Any]
    cache: dict[Digest, bytes]

    @property
    def vetting(self) -> Vetting:
        async def say(body: Any) -> None:
            self.said.append(self.book.say(body, self.identity.host, NOW))

        async def here(model: Measurable) -> Structure:
            manifest = Manifest.parse(model.manifest.read_bytes())
            leaves = LeafTable.parse(manifest, model.leaves.read_bytes())
            with Checkpoint.open(model.directory) as checkpoint:
                return compute(VerifiedSource(checkpoint, leaves))

        return Vetting(self.book, self.identity.peer_id, say=say, known=self.cache.get, measure=here)

    def vet(self, signed: SignedFingerprint, model: Measured, directory: Path) -> None:
        """Vet what came, signed by the fingerprint's author, and all that was cached."""
        (directory / "weft.manifest.json").write_bytes(model.manifest.to_bytes())
        fetched = Fetched(
            directory=directory,
            manifest=model.manifest,
            leaves=model.leaves,
            publisher=signed.author.publisher.key_id,
            received={},
            copied=0,
            dropped={},
        )
        asyncio.run(self.vetting.vet(signed, fetched, self.cache))


@pytest.fixture
def finder(tmp_path: Path, bob: Identity) -> Finder:
    return Finder(
        book=RecordBook(Store(tmp_path / "node.db"), FAULTS, network="test", me=bob.peer_id),
        identity=bob,
        said=[],
        cache={},
    )


def test_who_is_found_out_is_named_told_of_and_not_asked_again(
    tmp_path: Path, alice: Identity, finder: Finder
) -> None:
    honest = write(tmp_path / "honest", weights(1))
    model = measured(honest)
    signed = swear(alice, model, structure_of(write(tmp_path / "lie", scaled(weights(1), 1))))
    finder.vetting.expect_honest(signed)
    with pytest.raises(FalseFingerprint, match=alice.peer_id) as caught:
        finder.vet(signed, model, honest)
    assert caught.value.publisher == alice.publisher.key_id and caught.value.exit_code == 5
    with pytest.raises(FalseFingerprint, match="found before"):
        finder.vetting.expect_honest(signed)
    assert finder.vetting.distrusted() == {signed.sworn.fingerprint}

    (accusation,) = accusations(finder.book)
    assert (accusation.standing, accusation.finders) == (Standing.FOUND, (finder.identity.peer_id,))
    (evidence,) = finder.said
    elsewhere = RecordBook(Store(tmp_path / "elsewhere.db"), FAULTS, network="test", me=alice.peer_id)
    assert elsewhere.admit(evidence, NOW) is Outcome.NEW
    (heard,) = accusations(elsewhere)
    assert (heard.standing, heard.sworn) == (Standing.SAID, accusation.sworn)
    assert heard.sworn.author.peer_id == alice.peer_id and len(evidence) < 8 << 10


@pytest.mark.parametrize("by_the_publisher", [True, False])
def test_a_fingerprint_that_a_plan_may_have_been_made_by_is_held_against_the_weights_too(
    tmp_path: Path, alice: Identity, finder: Finder, by_the_publisher: bool
) -> None:
    honest = write(tmp_path / "honest", weights(1))
    model, lie = measured(honest), structure_of(write(tmp_path / "lie", noisy(weights(1), 1)))
    signed = swear(alice, model, structure_of(honest))
    author = alice if by_the_publisher else keyring.create(tmp_path / "mallory", NOW)
    made = Fingerprint(model_id=model.manifest.model_id, structure=lie, behaviour=None)
    false = sign(made.to_bytes(), author)
    mini = Mini.of(signed.fingerprint).to_bytes()  # advertised as a fingerprint, it is none
    finder.cache = {sha256(mini): mini, sha256(false): false}
    if by_the_publisher:
        with pytest.raises(FalseFingerprint, match=author.peer_id):
            finder.vet(signed, model, honest)
    else:
        finder.vet(signed, model, honest)
    (accusation,) = accusations(finder.book)
    assert accusation.sworn.author.peer_id == author.peer_id and accusation.standing is Standing.FOUND
    assert finder.vetting.distrusted() == {made.digest} and len(finder.said) == 1


class Shows:
    """A holder, as far as it shows fingerprints."""

    def __init__(self, *shown: bytes) -> None:
        self._shown = {sha256(data): data for data in shown}

    async def fingerprint(self, digest: Digest) -> AsyncGenerator[bytes, None]:
        yield self._shown[digest]


def test_a_stranger_who_swears_under_a_publishers_name_keeps_nobody_from_the_model(
    tmp_path: Path, alice: Identity, finder: Finder
) -> None:
    honest = write(tmp_path / "honest", weights(1))
    model, mallory = measured(honest), keyring.create(tmp_path / "mallory", NOW)
    lie = structure_of(write(tmp_path / "lie", scaled(weights(1), 1)))
    falsely, truly = (
        sign(Fingerprint(model_id=model.manifest.model_id, structure=s, behaviour=None).to_bytes(), author)
        for s, author in ((lie, mallory), (structure_of(honest), alice))
    )
    offered = Offered(
        publisher=alice.publisher.key_id,
        listings=tuple(
            listing(model, peer.peer_id, alice.publisher.key_id, sha256(data))
            for peer, data in ((mallory, falsely), (alice, truly))
        ),
    )

    def chosen(*shown: bytes) -> bytes:
        holders: Any = [Shows(*shown)]
        told = acquire.shown_fingerprint(offered, model.manifest.model_id, holders, finder.vetting)
        return asyncio.run(told)[0]

    assert chosen(falsely, truly) == truly
    with pytest.raises(FalseFingerprint):
        finder.vet(SignedFingerprint.parse(falsely), model, honest)
    assert chosen(falsely, truly) == truly


def listing(model: Measured, peer: PeerId, publisher: str, fingerprint: Digest) -> Listing:
    advertised = AdvertisedModel(
        model_id=model.manifest.model_id,
        name="math",
        licence="MIT",
        architecture="",
        base=None,
        size=1,
        fingerprint=fingerprint,
        sketch=fingerprint,
        publisher=Digest(publisher),
        purposes=(),
    )
    return Listing(peer=peer, model=advertised, seq=1, expires_at=int(NOW) + 60)


def test_whoever_has_the_weights_settles_what_others_said(
    tmp_path: Path, alice: Identity, bob: Identity, finder: Finder
) -> None:
    honest = write(tmp_path / "honest", weights(1))
    model = measured(honest)
    signed = swear(alice, model, structure_of(honest))
    slander = Fault(sworn=signed.sworn, found=sha256(b"something else"))
    carol = keyring.create(tmp_path / "carol", NOW)
    told = RecordBook(Store(tmp_path / "carol.db"), FAULTS, network="test", me=carol.peer_id).say(
        slander.to_json(), carol.host, NOW
    )
    assert finder.book.admit(told, NOW) is Outcome.NEW
    assert [a.standing for a in accusations(finder.book)] == [Standing.SAID]
    finder.vet(signed, model, honest)
    (accusation,) = accusations(finder.book)
    assert (accusation.standing, accusation.finders) == (Standing.REFUTED, (carol.peer_id,))
    assert finder.said == [] and not finder.vetting.distrusted()


def test_evidence_is_read_only_as_it_was_signed(tmp_path: Path, alice: Identity, bob: Identity) -> None:
    model = measured(write(tmp_path / "honest", weights(1)))
    signed = swear(alice, model, structure_of(tmp_path / "honest"))
    body = Fault(sworn=signed.sworn, found=sha256(b"x")).to_json()
    assert Fault.from_json(body).sworn == signed.sworn
    sworn = body["sworn"]
    lies = [
        {**body, "found": signed.sworn.structure},
        {**body, "found": "sha256:x"},
        {**body, "more": 1},
        {**body, "sworn": {**sworn, "statement": {**sworn["statement"], "structure": sha256(b"y")}}},
        {**body, "sworn": {**sworn, "publisher": json.loads(bob.binding.to_bytes())}},
        {**body, "sworn": {**sworn, "signature": "AAAA"}},
    ]
    for lie in lies:
        with pytest.raises(ValueError):
            Fault.from_json(lie)


def test_a_lie_of_one_bit_in_one_weight_is_a_lie(tmp_path: Path, alice: Identity) -> None:
    honest = write(tmp_path / "honest", weights(1))
    tensors = load_file(honest / "model.safetensors")
    tensors["model.norm.weight"].view(np.uint16)[3] ^= 1
    other = structure_of(write(tmp_path / "lie", tensors))
    signed = swear(alice, measured(honest), other)
    assert between(signed, structure_of(honest).digest) is not None
    assert between(signed, other.digest) is None
    assert replace(signed, sworn=signed.sworn) == signed
