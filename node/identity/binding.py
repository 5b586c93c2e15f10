"""Binding: the statement of a host key and a publisher key that they belong to one node.

Both sign it, so neither can be claimed by a stranger. With the publisher's public key it is the content of
`weft.publisher.json`, which lies in every published model and is signed with it: a model can be checked
without a node. `Binding.parse(b.to_bytes()) == b`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merge_core.digest import Digest, canonical, check_version, parse_canonical, sha256
from node.domain.ids import PeerId
from node.errors import VerificationFailed
from node.identity.envelopes import Envelope, open_envelope, seal
from node.identity.keys import HostKey, PublicPublisherKey, PublisherKey, host_verifier

PAYLOAD_TYPE = "application/vnd.weft.binding+json"
MAX_BINDING = 64 << 10
LIFETIME = 10 * 365 * 24 * 3600
"""Seconds. A binding ends by rotation; its date only stops one that was forgotten."""
CLOCK_SKEW = 3600
"""Seconds by which a binding is dated back, since clocks of peers differ."""
_LAST_SECOND = 2**53 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """Who a publisher is in the network, from when to when (Unix seconds); `previous` is what it replaces."""

    peer_id: PeerId
    publisher: PublicPublisherKey
    not_before: int
    not_after: int
    previous: Digest | None
    envelope: Envelope

    @property
    def digest(self) -> Digest:
        """The digest of the signed statement."""
        return sha256(self.envelope.payload)

    def verify(self, now: float) -> None:
        """Return when both keys signed and `now` lies in its time; raises VerificationFailed."""
        open_envelope(self.envelope, PAYLOAD_TYPE, host_verifier(self.peer_id), self.publisher)
        if not self.covers(now):
            raise VerificationFailed("the publisher's binding to its peer is not valid at this time")

    def covers(self, now: float) -> bool:
        """Whether `now` lies in its time."""
        return self.not_before <= now < self.not_after

    def to_bytes(self) -> bytes:
        """The content of weft.publisher.json."""
        return canonical(
            {"version": 1, "publicKey": self.publisher.public_pem, "binding": self.envelope.to_json()}
        )

    @classmethod
    def parse(cls, data: bytes) -> Binding:
        """Read bytes that may come from anybody, both signatures verified; raises VerificationFailed."""
        try:
            if len(data) > MAX_BINDING:
                raise ValueError(f"{len(data)} bytes; at most {MAX_BINDING} are read")
            value = parse_canonical(data)
            if set(value) != {"version", "publicKey", "binding"}:
                raise ValueError("expected publicKey and binding")
            check_version(value["version"], 1, "publisher record")
            publisher = PublicPublisherKey.from_pem(value["publicKey"])
            if publisher.public_pem != value["publicKey"]:
                raise ValueError("the public key is not written as openssl writes it")
            binding = _statement(publisher, Envelope.from_json(value["binding"]))
            peer = host_verifier(binding.peer_id)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise VerificationFailed(f"not a publisher record: {error}") from error
        open_envelope(binding.envelope, PAYLOAD_TYPE, peer, publisher)
        return binding


def bind(
    host: HostKey,
    publisher: PublisherKey,
    *,
    now: float,
    previous: Digest | None = None,
    lifetime: int = LIFETIME,
) -> Binding:
    """Let both keys sign that they belong together, from `now` on for `lifetime` seconds."""
    not_before, not_after = int(now) - CLOCK_SKEW, int(now) + lifetime
    payload = canonical(
        {
            "version": 1,
            "peerId": host.peer_id,
            "publisherKey": publisher.key_id,
            "notBefore": not_before,
            "notAfter": not_after,
            "previous": previous,
        }
    )
    return Binding(
        peer_id=host.peer_id,
        publisher=publisher.public,
        not_before=not_before,
        not_after=not_after,
        previous=previous,
        envelope=seal(PAYLOAD_TYPE, payload, host, publisher),
    )


def _statement(publisher: PublicPublisherKey, envelope: Envelope) -> Binding:
    value = parse_canonical(envelope.payload)
    if set(value) != {"version", "peerId", "publisherKey", "notBefore", "notAfter", "previous"}:
        raise ValueError("the statement has other keys than a binding")
    check_version(value["version"], 1, "binding")
    if value["publisherKey"] != publisher.key_id:
        raise ValueError("the statement binds another publisher key")
    return Binding(
        peer_id=PeerId(value["peerId"]),
        publisher=publisher,
        not_before=_second(value["notBefore"]),
        not_after=_second(value["notAfter"]),
        previous=None if value["previous"] is None else Digest(value["previous"]),
        envelope=envelope,
    )


def _second(value: Any) -> int:
    if type(value) is not int or abs(value) > _LAST_SECOND:
        raise ValueError("a time is a whole number of Unix seconds")
    return value
