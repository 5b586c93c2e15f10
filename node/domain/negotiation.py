"""Offer, Agreement, Refusal: what two peers say to each other before any weights move.

The requester signs an Offer; the provider answers with a Refusal that it signs, or with an Agreement that
it signs and that the requester signs too. Only an Agreement with both signatures entitles: to the shards
of the models it names, up to `max_bytes`, from `not_before` until `expires_at`.

The bytes are canonical JSON, `parse(v.to_bytes()) == v`. Times are whole seconds since the epoch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from merge_core.digest import Digest, ModelId, canonical, check_version, parse_canonical, sha256
from node.domain import text
from node.domain.ids import PeerId
from node.domain.reasons import Reason

OFFER_TYPE = "application/vnd.weft.offer+json"
AGREEMENT_TYPE = "application/vnd.weft.agreement+json"
REFUSAL_TYPE = "application/vnd.weft.refusal+json"

MAX_MESSAGE = 32 << 10
"""Bytes of one statement."""
MAX_MODELS = 128
MAX_OFFER_LIFETIME = 3600
MAX_AGREEMENT_LIFETIME = 7 * 24 * 3600
NONCE = re.compile(r"[0-9a-f]{32}")


class Purpose(StrEnum):
    """What the requester wants the shards for."""

    AUDIT = "audit"
    MERGE = "merge"
    MIRROR = "mirror"


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A requester asks one provider for models; a merge or an audit names its plan by digest."""

    network: str
    requester: PeerId
    provider: PeerId
    purpose: Purpose
    models: tuple[ModelId, ...]
    plan: Digest | None
    nonce: str
    issued_at: int
    expires_at: int

    @cached_property
    def digest(self) -> Digest:
        """The digest of the canonical bytes."""
        return sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The canonical bytes that the requester signs."""
        return canonical(
            {
                "version": 1,
                "network": self.network,
                "requester": self.requester,
                "provider": self.provider,
                "purpose": self.purpose,
                "models": list(self.models),
                "plan": self.plan,
                "nonce": self.nonce,
                "issuedAt": self.issued_at,
                "expiresAt": self.expires_at,
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Offer:
        """Read an offer that may come from anybody; raises ValueError."""
        value = _document(
            data,
            "offer",
            {
                "network",
                "requester",
                "provider",
                "purpose",
                "models",
                "plan",
                "nonce",
                "issuedAt",
                "expiresAt",
            },
        )
        issued = text.integer(value["issuedAt"], "issuedAt")
        return cls(
            network=text.matching(value["network"], text.NETWORK, "network name"),
            requester=_peer(value["requester"]),
            provider=_peer(value["provider"]),
            purpose=Purpose(value["purpose"]),
            models=_models(value["models"]),
            plan=None if value["plan"] is None else _digest(value["plan"]),
            nonce=text.matching(value["nonce"], NONCE, "nonce"),
            issued_at=issued,
            expires_at=text.integer(
                value["expiresAt"], "expiresAt", low=issued + 1, high=issued + MAX_OFFER_LIFETIME
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What a provider grants to a requester, in answer to the offer with digest `offer`."""

    network: str
    offer: Digest
    provider: PeerId
    requester: PeerId
    models: tuple[ModelId, ...]
    purpose: Purpose
    plan: Digest | None
    max_bytes: int
    not_before: int
    expires_at: int

    @cached_property
    def digest(self) -> Digest:
        """The digest of the canonical bytes."""
        return sha256(self.to_bytes())

    def live(self, now: float) -> bool:
        """Whether it may be used at this time."""
        return self.not_before <= now < self.expires_at

    def answers(self, offer: Offer) -> bool:
        """Whether it grants to both parties of `offer` exactly what was asked."""
        return (
            self.offer == offer.digest
            and self.network == offer.network
            and self.provider == offer.provider
            and self.requester == offer.requester
            and self.models == offer.models
            and self.purpose == offer.purpose
            and self.plan == offer.plan
        )

    def to_bytes(self) -> bytes:
        """The canonical bytes that both sign."""
        return canonical(
            {
                "version": 1,
                "network": self.network,
                "offer": self.offer,
                "provider": self.provider,
                "requester": self.requester,
                "models": list(self.models),
                "purpose": self.purpose,
                "plan": self.plan,
                "maxBytes": self.max_bytes,
                "notBefore": self.not_before,
                "expiresAt": self.expires_at,
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Agreement:
        """Read an agreement that may come from anybody; raises ValueError."""
        value = _document(
            data,
            "agreement",
            {
                "network",
                "offer",
                "provider",
                "requester",
                "models",
                "purpose",
                "plan",
                "maxBytes",
                "notBefore",
                "expiresAt",
            },
        )
        begin = text.integer(value["notBefore"], "notBefore")
        return cls(
            network=text.matching(value["network"], text.NETWORK, "network name"),
            offer=_digest(value["offer"]),
            provider=_peer(value["provider"]),
            requester=_peer(value["requester"]),
            models=_models(value["models"]),
            purpose=Purpose(value["purpose"]),
            plan=None if value["plan"] is None else _digest(value["plan"]),
            max_bytes=text.integer(value["maxBytes"], "maxBytes"),
            not_before=begin,
            expires_at=text.integer(
                value["expiresAt"], "expiresAt", low=begin + 1, high=begin + MAX_AGREEMENT_LIFETIME
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A provider says no to the offer with digest `offer`; `detail` adds to the reason's sentence."""

    offer: Digest
    provider: PeerId
    requester: PeerId
    reason: Reason
    detail: str = ""

    def to_bytes(self) -> bytes:
        """The canonical bytes that the provider signs."""
        return canonical(
            {
                "version": 1,
                "offer": self.offer,
                "provider": self.provider,
                "requester": self.requester,
                "reason": self.reason.name,
                "detail": self.detail,
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Refusal:
        """Read a refusal that may come from anybody; an unknown reason becomes UNSPECIFIED.

        Raises ValueError.
        """
        value = _document(data, "refusal", {"offer", "provider", "requester", "reason", "detail"})
        name = text.text(value["reason"], 64, "reason")
        return cls(
            offer=_digest(value["offer"]),
            provider=_peer(value["provider"]),
            requester=_peer(value["requester"]),
            reason=Reason[name] if name in Reason.__members__ else Reason.UNSPECIFIED,
            detail=text.text(value["detail"], 512, "detail"),
        )


def _document(data: bytes, what: str, names: set[str]) -> dict[str, Any]:
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"an {what} of {len(data)} bytes; at most {MAX_MESSAGE} are read")
    try:
        value = text.fields(parse_canonical(data), names | {"version"})
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not an {what}: {error}") from error
    check_version(value["version"], 1, what)
    return value


def _models(value: Any) -> tuple[ModelId, ...]:
    models = text.items(value, MAX_MODELS, "models", lambda item: ModelId(_string(item)))
    text.ascending(list(models), "models")
    if not models:
        raise ValueError("no models are named")
    return models


def _peer(value: Any) -> PeerId:
    return PeerId(_string(value))


def _digest(value: Any) -> Digest:
    return Digest(_string(value))


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, not {type(value).__name__}")
    return value
