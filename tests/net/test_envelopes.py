"""DSSE envelopes: what is signed, who has to sign, and what an independent implementation says to them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope as TheirEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from node.errors import VerificationFailed
from node.identity.envelopes import Envelope, open_envelope, pae, seal
from node.identity.keys import HostKey, PublisherKey, host_verifier

TYPE = "application/vnd.weft.test+json"
HOST, PUBLISHER = HostKey.generate(), PublisherKey.generate()
HOST_VERIFIER = host_verifier(HOST.peer_id)


@given(payload=st.binary(max_size=300), kind=st.text(max_size=40))
def test_an_envelope_survives_its_bytes_and_opens(payload: bytes, kind: str) -> None:
    sealed = seal(kind, payload, HOST)
    parsed = Envelope.parse(sealed.to_bytes())
    assert parsed == sealed
    assert open_envelope(parsed, kind, HOST_VERIFIER) == payload


def test_the_encoding_is_that_of_the_specification() -> None:
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "


def test_every_verifier_must_have_signed() -> None:
    both = seal(TYPE, b"{}", HOST, PUBLISHER)
    assert open_envelope(both, TYPE, PUBLISHER.public, HOST_VERIFIER) == b"{}"
    one = seal(TYPE, b"{}", HOST)
    with pytest.raises(VerificationFailed, match="not signed by sha256"):
        open_envelope(one, TYPE, HOST_VERIFIER, PUBLISHER.public)
    with pytest.raises(ValueError, match="at least one"):
        open_envelope(one, TYPE)


def test_an_envelope_of_another_type_is_not_opened() -> None:
    with pytest.raises(VerificationFailed, match="advert"):
        open_envelope(seal("advert", b"{}", HOST), "offer", HOST_VERIFIER)


def test_a_type_cannot_be_exchanged_after_signing() -> None:
    sealed = seal("advert", b"{}", HOST)
    relabelled = Envelope(payload_type="offer", payload=b"{}", signatures=sealed.signatures)
    with pytest.raises(VerificationFailed):
        open_envelope(relabelled, "offer", HOST_VERIFIER)


def test_a_signature_under_another_name_does_not_count() -> None:
    stranger = HostKey.generate()
    signature = stranger.sign(pae(TYPE, b"{}"))
    forged = Envelope(payload_type=TYPE, payload=b"{}", signatures={HOST.peer_id: signature})
    with pytest.raises(VerificationFailed):
        open_envelope(forged, TYPE, HOST_VERIFIER)


SEALED = seal(TYPE, b'{"n":1}', HOST, PUBLISHER).to_bytes()


@given(at=st.integers(0, len(SEALED) - 1), bit=st.integers(0, 7))
def test_no_bit_of_an_envelope_can_be_flipped(at: int, bit: int) -> None:
    data = bytearray(SEALED)
    data[at] ^= 1 << bit
    with pytest.raises(VerificationFailed):
        open_envelope(Envelope.parse(bytes(data)), TYPE, HOST_VERIFIER, PUBLISHER.public)


@given(
    data=st.binary(max_size=100)
    | st.recursive(st.none() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_rubbish_is_no_envelope(data: bytes) -> None:
    with pytest.raises(VerificationFailed):
        Envelope.parse(data)


@pytest.mark.parametrize(
    "change",
    [
        {"payload": "e30"},
        {"payload": "e31="},
        {"payload": "e3 0="},
        {"payload": 7},
        {"signatures": []},
        {"signatures": [{"sig": "AAAA"}] * 2},
        {"signatures": [{"keyid": str(n), "sig": "AAAA"} for n in range(9)]},
        {"signatures": [{"keyid": "a", "sig": "AAAA", "cert": ""}]},
        {"signatures": [{"keyid": "a", "sig": "A" * 4000}]},
        {"payloadType": "x" * 300},
        {"extra": 1},
    ],
)
def test_a_malformed_envelope_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(VerificationFailed):
        Envelope.from_json(json.loads(SEALED) | change)


def test_a_large_or_deep_envelope_is_refused() -> None:
    with pytest.raises(VerificationFailed, match="at most 100"):
        Envelope.parse(SEALED, limit=100)
    with pytest.raises(VerificationFailed):
        Envelope.parse(b'{"payload":' + b"[" * 500_000)


def test_securesystemslib_verifies_what_we_seal_and_refuses_what_was_changed() -> None:
    key = SSlibKey(PUBLISHER.key_id, "ecdsa", "ecdsa-sha2-nistp256", {"public": PUBLISHER.public_pem})
    theirs = TheirEnvelope.from_dict(json.loads(SEALED))
    assert list(theirs.verify([key], 1)) == [PUBLISHER.key_id]
    theirs.payload += b" "
    with pytest.raises(VerificationError):
        theirs.verify([key], 1)
