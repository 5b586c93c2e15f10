"""A fingerprint with the signature of whoever computed it: what lies on a shelf and travels between peers.

The fingerprint stands in it as the JSON object that it is, not in base64, so that it fits into one message;
what is signed is DSSE's pre-authentication encoding of its canonical bytes. An advert names the digest of the
whole. It is a claim: whoever fetches the weights can compute the fingerprint again.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

from merge_core.digest import canonical, check_version, parse_canonical
from merge_core.errors import CorruptCheckpoint
from merge_core.simmerge.version1 import MAX_FINGERPRINT, Fingerprint
from node.domain import text
from node.errors import VerificationFailed
from node.identity.binding import Binding
from node.identity.envelopes import pae
from node.identity.keyring import Identity

PAYLOAD_TYPE = "application/vnd.weft.fingerprint+json"
MAX_SIGNED = MAX_FINGERPRINT + (3 << 10)
"""Bytes of the whole; below the 64 KiB of a libp2p message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedFingerprint:
    """A fingerprint and who computed it; one that exists is verified."""

    fingerprint: Fingerprint
    author: Binding

    @classmethod
    def parse(cls, data: bytes) -> SignedFingerprint:
        """Read bytes that may come from anybody; raises VerificationFailed on whatever is not exact."""
        if len(data) > MAX_SIGNED:
            raise VerificationFailed(f"a fingerprint of {len(data)} bytes; at most {MAX_SIGNED} are read")
        try:
            value = text.fields(parse_canonical(data), {"version", "fingerprint", "publisher", "signature"})
            check_version(value["version"], 1, "signed fingerprint")
            payload = canonical(value["fingerprint"])
            author = Binding.parse(canonical(value["publisher"]))
            signature = base64.b64decode(value["signature"], validate=True)
            author.publisher.verify(signature, pae(PAYLOAD_TYPE, payload))
            return cls(fingerprint=Fingerprint.parse(payload), author=author)
        except (ValueError, TypeError, RecursionError, CorruptCheckpoint) as error:
            raise VerificationFailed(f"not a signed fingerprint: {error}") from error


def sign(fingerprint: bytes, identity: Identity) -> bytes:
    """Sign the canonical bytes of a fingerprint; raises ValueError when they are not canonical JSON."""
    signature = identity.publisher.sign(pae(PAYLOAD_TYPE, fingerprint))
    return canonical(
        {
            "version": 1,
            "fingerprint": parse_canonical(fingerprint),
            "publisher": parse_canonical(identity.binding.to_bytes()),
            "signature": base64.b64encode(signature).decode(),
        }
    )
