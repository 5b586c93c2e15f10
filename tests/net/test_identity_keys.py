"""Keys, and what binds them: names that other implementations agree with, signatures that hold or do not."""

import hashlib
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from merge_core.digest import canonical, sha256
from node.domain.ids import PeerId
from node.errors import LocalError, VerificationFailed
from node.identity import keyring
from node.identity.binding import PAYLOAD_TYPE, Binding, bind
from node.identity.envelopes import seal
from node.identity.keys import (
    HostKey,
    PublicPublisherKey,
    PublisherKey,
    host_verifier,
    peer_id_of_public,
    public_of_peer_id,
)

NOW = 1_800_000_000.0
HOST, PUBLISHER = HostKey.generate(), PublisherKey.generate()
BINDING = bind(HOST, PUBLISHER, now=NOW)


@given(seed=st.binary(min_size=32, max_size=32))
def test_peer_ids_are_those_of_libp2p(seed: bytes) -> None:
    host = HostKey.from_private_bytes(seed)
    theirs = ID.from_pubkey(create_new_key_pair(seed).public_key)
    assert host.peer_id == str(theirs)
    assert peer_id_of_public(public_of_peer_id(host.peer_id)) == host.peer_id
    assert HostKey.from_private_bytes(host.private_bytes).peer_id == host.peer_id


def test_a_peer_id_of_another_key_type_is_no_verifier() -> None:
    with pytest.raises(ValueError, match="no Ed25519 key"):
        host_verifier(PeerId("12D3KooW" + "z" * 44))


def test_the_publisher_key_is_named_by_its_spki_and_survives_pem() -> None:
    public = serialization.load_pem_public_key(PUBLISHER.public_pem.encode())
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert PUBLISHER.key_id == "sha256:" + hashlib.sha256(der).hexdigest()
    assert PublicPublisherKey.from_pem(PUBLISHER.public_pem).public_pem == PUBLISHER.public_pem
    assert PublisherKey.from_pem(PUBLISHER.private_pem).key_id == PUBLISHER.key_id


@pytest.mark.parametrize(
    "pem", [b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", b"x" * 9999]
)
def test_what_is_no_public_key_is_refused(pem: bytes) -> None:
    with pytest.raises(ValueError):
        PublicPublisherKey.from_pem(pem)


def test_other_curves_are_refused() -> None:
    other = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(ValueError, match="P-256"):
        PublicPublisherKey.from_pem(pem)


@pytest.mark.parametrize(
    ("signer", "verifier", "stranger"),
    [
        (HOST, host_verifier(HOST.peer_id), host_verifier(HostKey.generate().peer_id)),
        (PUBLISHER, PUBLISHER.public, PublisherKey.generate().public),
    ],
    ids=["host", "publisher"],
)
def test_a_signature_holds_for_its_bytes_and_key_only(signer, verifier, stranger) -> None:
    signature = signer.sign(b"one two")
    verifier.verify(signature, b"one two")
    for data, what, who in [
        (b"one twO", signature, verifier),
        (b"one two", b"", verifier),
        (b"one two", signature, stranger),
    ]:
        with pytest.raises(VerificationFailed):
            who.verify(what, data)


def test_a_binding_proves_itself_in_its_time() -> None:
    parsed = Binding.parse(BINDING.to_bytes())
    assert parsed.to_bytes() == BINDING.to_bytes()
    assert (parsed.peer_id, parsed.publisher.key_id) == (HOST.peer_id, PUBLISHER.key_id)
    parsed.verify(NOW)
    for moment in (NOW - 7200, NOW + 11 * 365 * 86400):
        with pytest.raises(VerificationFailed, match="at this time"):
            parsed.verify(moment)


def test_a_rotated_binding_names_what_it_replaces() -> None:
    newer = bind(HOST, PublisherKey.generate(), now=NOW + 60, previous=BINDING.digest)
    assert Binding.parse(newer.to_bytes()).previous == sha256(BINDING.envelope.payload)


def test_a_publisher_cannot_claim_a_peer_that_did_not_sign() -> None:
    stranger = HostKey.generate()
    payload = BINDING.envelope.payload
    forged = seal(PAYLOAD_TYPE, payload, PUBLISHER, stranger)
    record = {"version": 1, "publicKey": PUBLISHER.public_pem, "binding": forged.to_json()}
    with pytest.raises(VerificationFailed, match="not signed by 12D3"):
        Binding.parse(canonical(record))


@given(at=st.integers(0, len(BINDING.to_bytes()) - 1), bit=st.integers(0, 7))
def test_no_bit_of_a_binding_can_be_flipped(at: int, bit: int) -> None:
    data = bytearray(BINDING.to_bytes())
    data[at] ^= 1 << bit
    with pytest.raises(VerificationFailed):
        Binding.parse(bytes(data))


def test_an_identity_is_stored_for_its_owner_alone_and_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "identity"
    created = keyring.create(folder, NOW)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o600}
    loaded = keyring.load(folder)
    assert (loaded.peer_id, loaded.publisher.key_id) == (created.peer_id, created.publisher.key_id)
    assert loaded.binding.to_bytes() == created.binding.to_bytes()
    assert [p.name for p in folder.parent.iterdir()] == ["identity"]


def test_an_identity_is_never_overwritten(tmp_path: Path) -> None:
    first = keyring.create(tmp_path / "identity", NOW)
    exported = keyring.export(tmp_path / "identity")
    with pytest.raises(LocalError, match="already holds"):
        keyring.create(tmp_path / "identity", NOW)
    with pytest.raises(LocalError, match="already holds"):
        keyring.import_(tmp_path / "identity", exported)
    assert keyring.load(tmp_path / "identity").peer_id == first.peer_id
    assert [p.name for p in tmp_path.iterdir()] == ["identity"]


def test_a_missing_identity_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="no identity") as caught:
        keyring.load(tmp_path / "identity")
    assert caught.value.hint == "weft init"


def test_an_identity_that_others_can_read_is_refused(tmp_path: Path) -> None:
    keyring.create(tmp_path / "identity", NOW)
    (tmp_path / "identity" / "host.pem").chmod(0o644)
    with pytest.raises(LocalError, match="read by others"):
        keyring.load(tmp_path / "identity")


def test_keys_of_two_nodes_do_not_make_an_identity(tmp_path: Path) -> None:
    keyring.create(tmp_path / "a", NOW)
    keyring.create(tmp_path / "b", NOW)
    (tmp_path / "b" / "host.pem").replace(tmp_path / "a" / "host.pem")
    with pytest.raises(LocalError, match="do not belong together"):
        keyring.load(tmp_path / "a")


@pytest.mark.parametrize("passphrase", ["", "correct horse"])
def test_an_export_moves_the_identity(tmp_path: Path, passphrase: str) -> None:
    created = keyring.create(tmp_path / "old", NOW)
    exported = keyring.export(tmp_path / "old", passphrase=passphrase)
    assert (b"PRIVATE KEY" in exported) == (passphrase == "")
    moved = keyring.import_(tmp_path / "new", exported, passphrase=passphrase)
    assert moved.peer_id == created.peer_id
    assert keyring.load(tmp_path / "new").publisher.key_id == created.publisher.key_id


def test_a_wrong_passphrase_imports_nothing(tmp_path: Path) -> None:
    keyring.create(tmp_path / "old", NOW)
    exported = keyring.export(tmp_path / "old", passphrase="correct horse")
    for passphrase in ("", "battery staple"):
        with pytest.raises(LocalError, match="passphrase"):
            keyring.import_(tmp_path / "new", exported, passphrase=passphrase)
    assert not (tmp_path / "new").exists()


@given(
    data=st.binary(max_size=200)
    | st.just(b'{"format":"weft.identity/v1","content":[]}')
    | st.just(b"[" * 9000)
)
def test_what_is_no_export_is_refused(data: bytes) -> None:
    with pytest.raises(LocalError, match="not an exported identity"):
        keyring.import_(Path("/nonexistent/weft"), data)
