"""A fingerprint with what its author swears to: what lies on a shelf and travels between peers.

    4 bytes   the length of the head, most significant first
    head      canonical JSON: the statement {modelId, fingerprint, structure}, the author, the signature
    body      the fingerprint, whose digest the statement names

What is signed is DSSE's pre-authentication encoding of the statement alone. So the head without the body is
evidence that fits into a message: this author swore that the weights of that model have this structure. The
structure follows from the weights to the bit, so whoever has them can tell whether that is true. An advert
names the digest of the whole.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from merge_core.digest import Digest, ModelId, canonical, check_version, parse_canonical, sha256
from merge_core.errors import CorruptCheckpoint
from merge_core.simmerge.fingerprint import MAX_FINGERPRINT, Fingerprint
from node.domain import text
from node.errors import VerificationFailed
from node.identity.binding import Binding
from node.identity.envelopes import pae
from node.identity.keyring import Identity

PAYLOAD_TYPE = "application/vnd.weft.fingerprint+json"
MAX_HEAD = 8 << 10
MAX_SIGNED = MAX_FINGERPRINT + MAX_HEAD + 4
"""Bytes of the whole."""
_VERSION = 2
_PREFIX = 4
_STATEMENT = {"version", "modelId", "fingerprint", "structure"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sworn:
    """What an author says of a model, signed: the digests of its fingerprint, and of the structure in that.

    One that exists is verified.
    """

    model_id: ModelId
    fingerprint: Digest
    structure: Digest
    author: Binding
    signature: bytes

    def statement(self) -> dict[str, Any]:
        """What is signed."""
        return {
            "version": _VERSION,
            "modelId": self.model_id,
            "fingerprint": self.fingerprint,
            "structure": self.structure,
        }

    def to_json(self) -> dict[str, Any]:
        """The statement with its author and signature."""
        return {
            "statement": self.statement(),
            "publisher": parse_canonical(self.author.to_bytes()),
            "signature": base64.b64encode(self.signature).decode(),
        }

    @classmethod
    def from_json(cls, value: Any) -> Sworn:
        """Read what may come from anybody; raises VerificationFailed or ValueError."""
        text.fields(value, {"statement", "publisher", "signature"})
        statement = text.fields(value["statement"], _STATEMENT)
        check_version(statement["version"], _VERSION, "fingerprint")
        author = Binding.parse(canonical(value["publisher"]))
        signature = base64.b64decode(text.text(value["signature"], 200, "a signature"), validate=True)
        author.publisher.verify(signature, pae(PAYLOAD_TYPE, canonical(statement)))
        return cls(
            model_id=ModelId(statement["modelId"]),
            fingerprint=Digest(statement["fingerprint"]),
            structure=Digest(statement["structure"]),
            author=author,
            signature=signature,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedFingerprint:
    """A fingerprint and who swears to it; one that exists is verified, but for what only the weights tell."""

    fingerprint: Fingerprint
    sworn: Sworn

    @property
    def author(self) -> Binding:
        """Who computed and signed it."""
        return self.sworn.author

    @classmethod
    def parse(cls, data: bytes) -> SignedFingerprint:
        """Read bytes that may come from anybody; raises VerificationFailed on whatever is not exact."""
        if len(data) > MAX_SIGNED:
            raise VerificationFailed(f"a fingerprint of {len(data)} bytes; at most {MAX_SIGNED} are read")
        try:
            size = int.from_bytes(data[:_PREFIX], "big")
            head, body = data[_PREFIX : _PREFIX + size], data[_PREFIX + size :]
            if len(head) != size or size > MAX_HEAD:
                raise ValueError("its head has another length")
            sworn = Sworn.from_json(parse_canonical(head))
            if head != canonical(sworn.to_json()):
                raise ValueError("its head is spelled in another way than ours")
            if sha256(body) != sworn.fingerprint:
                raise ValueError("its author signed another one")
            fingerprint = Fingerprint.parse(body)
        except (ValueError, TypeError, KeyError, RecursionError, CorruptCheckpoint) as error:
            raise VerificationFailed(f"not a signed fingerprint: {error}") from error
        if (fingerprint.model_id, fingerprint.structure.digest) != (sworn.model_id, sworn.structure):
            raise VerificationFailed("a signed fingerprint of another model than its author says")
        return cls(fingerprint=fingerprint, sworn=sworn)


def sign(body: bytes, identity: Identity) -> bytes:
    """Swear to a fingerprint; raises CorruptCheckpoint when the bytes are none."""
    fingerprint = Fingerprint.parse(body)
    statement = {
        "version": _VERSION,
        "modelId": fingerprint.model_id,
        "fingerprint": sha256(body),
        "structure": fingerprint.structure.digest,
    }
    head = canonical(
        {
            "statement": statement,
            "publisher": parse_canonical(identity.binding.to_bytes()),
            "signature": base64.b64encode(
                identity.publisher.sign(pae(PAYLOAD_TYPE, canonical(statement)))
            ).decode(),
        }
    )
    return len(head).to_bytes(_PREFIX, "big") + head + body
