"""DSSE v1 envelopes: bytes, the type they are to be read as, and who signed both.

What is signed is the pre-authentication encoding of (type, payload), so bytes signed as one kind of statement
can never be shown as another. `Envelope.parse(e.to_bytes()) == e`. A key id is the name of the key (a peer
id, or a publisher's digest); a signature counts only under the name of the verifier that checks it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_core.digest import canonical, parse_canonical
from node.errors import VerificationFailed
from node.identity.keys import Signer, Verifier

MAX_ENVELOPE = 1 << 20
MAX_SIGNATURES = 8
_MAX_KEY_ID = 256
_MAX_SIGNATURE = 1024
_MAX_TYPE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A payload with its type and signatures (key id -> signature bytes); nothing is verified yet."""

    payload_type: str
    payload: bytes
    signatures: Mapping[str, bytes]

    def to_json(self) -> dict[str, Any]:
        """The envelope as the JSON object of the DSSE specification, signatures sorted by key id."""
        return {
            "payloadType": self.payload_type,
            "payload": base64.b64encode(self.payload).decode(),
            "signatures": [
                {"keyid": key_id, "sig": base64.b64encode(signature).decode()}
                for key_id, signature in sorted(self.signatures.items())
            ],
        }

    def to_bytes(self) -> bytes:
        """The envelope as canonical JSON."""
        return canonical(self.to_json())

    @classmethod
    def from_json(cls, value: Any) -> Envelope:
        """Read an already decoded object that may come from anybody; raises VerificationFailed."""
        try:
            if set(value) != {"payloadType", "payload", "signatures"}:
                raise ValueError("expected exactly payloadType, payload and signatures")
            signatures = [_signature(item) for item in value["signatures"]]
            if not 1 <= len(signatures) <= MAX_SIGNATURES:
                raise ValueError(f"{len(signatures)} signatures; 1 to {MAX_SIGNATURES} are read")
            if len(dict(signatures)) != len(signatures):
                raise ValueError("one key signs twice")
            return cls(
                payload_type=_text(value["payloadType"], _MAX_TYPE),
                payload=_base64(value["payload"]),
                signatures=dict(signatures),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise VerificationFailed(f"not a DSSE envelope: {error}") from error

    @classmethod
    def parse(cls, data: bytes, *, limit: int = MAX_ENVELOPE) -> Envelope:
        """Read at most `limit` bytes that may come from anybody; raises VerificationFailed."""
        if len(data) > limit:
            raise VerificationFailed(f"an envelope of {len(data)} bytes; at most {limit} are read")
        try:
            value = parse_canonical(data)
        except (ValueError, TypeError, RecursionError) as error:
            raise VerificationFailed(f"not a DSSE envelope: {error}") from error
        return cls.from_json(value)


def seal(payload_type: str, payload: bytes, *signers: Signer) -> Envelope:
    """Put `payload` into an envelope that every signer signs."""
    encoded = pae(payload_type, payload)
    return Envelope(
        payload_type=payload_type,
        payload=payload,
        signatures={signer.key_id: signer.sign(encoded) for signer in signers},
    )


def open_envelope(envelope: Envelope, payload_type: str, *verifiers: Verifier) -> bytes:
    """The payload, once it is of `payload_type` and every one of `verifiers` (at least one) has signed it.

    Raises VerificationFailed.
    """
    if not verifiers:
        raise ValueError("an envelope is opened for at least one verifier")
    if envelope.payload_type != payload_type:
        raise VerificationFailed(f"the envelope holds {envelope.payload_type!r}, not {payload_type!r}")
    encoded = pae(payload_type, envelope.payload)
    for verifier in verifiers:
        signature = envelope.signatures.get(verifier.key_id)
        if signature is None:
            raise VerificationFailed(f"the envelope is not signed by {verifier.key_id}")
        verifier.verify(signature, encoded)
    return envelope.payload


def pae(payload_type: str, payload: bytes) -> bytes:
    """The pre-authentication encoding that is signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _signature(item: Any) -> tuple[str, bytes]:
    if set(item) - {"keyid"} != {"sig"}:
        raise ValueError("a signature holds keyid and sig")
    signature = _base64(item["sig"])
    if len(signature) > _MAX_SIGNATURE:
        raise ValueError(f"a signature of {len(signature)} bytes")
    return _text(item.get("keyid", ""), _MAX_KEY_ID), signature


def _base64(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError("base64 is text")
    try:
        data = base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError(f"base64: {error}") from error
    if base64.b64encode(data).decode() != value:
        raise ValueError("base64 with stray bits")
    return data


def _text(value: Any, limit: int) -> str:
    if not isinstance(value, str) or len(value) > limit:
        raise ValueError(f"expected at most {limit} characters of text")
    return value
