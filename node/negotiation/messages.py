"""Signed statements to and from bytes: what is read here was really signed by those it names as signers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from node.domain.ids import PeerId
from node.domain.negotiation import (
    AGREEMENT_TYPE,
    OFFER_TYPE,
    REFUSAL_TYPE,
    Agreement,
    Offer,
    Refusal,
)
from node.errors import VerificationFailed
from node.identity.envelopes import Envelope, open_envelope, seal
from node.identity.keys import HostKey, host_verifier

MAX_BYTES = 60 << 10
"""Bytes of one signed statement: it has to fit into one message between peers."""

Statement: TypeAlias = Offer | Agreement | Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A statement, who signed it, and the envelope that proves it."""

    statement: Statement
    signers: frozenset[PeerId]
    envelope: Envelope


def sign(statement: Statement, key: HostKey) -> Envelope:
    """Put a statement into an envelope that `key` signs."""
    return seal(_type_of(statement), statement.to_bytes(), key)


def countersign(envelope: Envelope, key: HostKey) -> Envelope:
    """Add the signature of `key` to an envelope."""
    own = seal(envelope.payload_type, envelope.payload, key).signatures
    return replace(envelope, signatures={**envelope.signatures, **own})


def read(data: bytes) -> Signed:
    """Read a message that may come from anybody; every signature on it must hold, be it of which peer it may.

    Raises VerificationFailed or ValueError.
    """
    envelope = Envelope.parse(data, limit=MAX_BYTES)
    parse = _PARSERS.get(envelope.payload_type)
    if parse is None:
        raise ValueError(f"a message of type {envelope.payload_type[:80]!r}")
    statement = parse(envelope.payload)
    signers = frozenset(PeerId(key_id) for key_id in envelope.signatures)
    if not signers <= {statement.requester, statement.provider}:
        raise VerificationFailed("somebody else signed the message too")
    open_envelope(envelope, envelope.payload_type, *(host_verifier(peer) for peer in sorted(signers)))
    return Signed(statement=statement, signers=signers, envelope=envelope)


def _type_of(statement: Statement) -> str:
    return next(name for name, kind in _TYPES.items() if isinstance(statement, kind))


_TYPES: Mapping[str, type[Statement]] = {
    OFFER_TYPE: Offer,
    AGREEMENT_TYPE: Agreement,
    REFUSAL_TYPE: Refusal,
}
_PARSERS: Mapping[str, Callable[[bytes], Statement]] = {
    OFFER_TYPE: Offer.parse,
    AGREEMENT_TYPE: Agreement.parse,
    REFUSAL_TYPE: Refusal.parse,
}
