"""The provider's side of a negotiation, as a function: (state, signed message, facts) -> (state, reply).

    Unheard ── offer, granted ──► Proposed ── agreement with both signatures ──► Agreed
       └────── offer, refused ──► Unheard

A state belongs to one offer. Only Agreed entitles. The same message again gets the same answer and changes
nothing, so a requester may repeat itself, and whoever replays its words gains nothing. A refused offer leaves
no state: nothing was granted, and it may be decided otherwise while it is valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from merge_core.digest import Digest, ModelId
from node.domain.ids import PeerId
from node.domain.negotiation import Agreement, Offer, Purpose, Refusal
from node.domain.reasons import Reason
from node.negotiation.messages import Signed
from node.negotiation.policy import Policy

MAX_CLOCK_SKEW = 300
SPARE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Unheard:
    """Nothing is known of the offer."""


@dataclass(frozen=True, slots=True)
class Proposed:
    """The provider has signed; nobody is entitled yet."""

    agreement: Agreement


@dataclass(frozen=True, slots=True)
class Agreed:
    """Both have signed."""

    agreement: Agreement


State: TypeAlias = Unheard | Proposed | Agreed
Reply: TypeAlias = Agreement | Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a held model comes with: the licence of each publisher's copy, and its size in bytes."""

    licences: tuple[str, ...]
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a decision rests on.

    `held` has the models of the offer that are here; `served_today` counts bytes, `open` the requester's
    other agreements and proposals that have not expired; `nonce_of` is the offer that used this nonce before;
    `trusted` is false for a peer that contradicted itself.
    """

    me: PeerId
    network: str
    now: float
    policy: Policy
    held: Mapping[ModelId, Terms]
    served_today: int = 0
    open: int = 0
    nonce_of: Digest | None = None
    trusted: bool = True


def step(state: State, message: Signed, facts: Facts) -> tuple[State, Reply]:
    """Answer one message whose signatures were verified; raises ValueError on a Refusal: it asks nothing."""
    statement = message.statement
    if isinstance(statement, Offer):
        return _on_offer(state, statement, message.signers, facts)
    if isinstance(statement, Agreement):
        return _on_acceptance(state, statement, message.signers, facts)
    raise ValueError("a refusal asks nothing of a provider")


def _on_offer(state: State, offer: Offer, signers: frozenset[PeerId], facts: Facts) -> tuple[State, Reply]:
    objection = _form(offer, signers, facts)
    if objection is None and not isinstance(state, Unheard):
        if state.agreement.expires_at > facts.now:
            return state, state.agreement
        objection = (Reason.EXPIRED, "the agreement to this offer is over")
    if objection is None:
        objection = _substance(offer, facts)
    if objection is not None:
        return state, _refusal(offer, facts.me, *objection)
    agreement = _agreement(offer, facts)
    return Proposed(agreement), agreement


def _on_acceptance(
    state: State, agreement: Agreement, signers: frozenset[PeerId], facts: Facts
) -> tuple[State, Reply]:
    objection: tuple[Reason, str] | None = None
    if isinstance(state, Unheard) or state.agreement.digest != agreement.digest:
        objection = (Reason.NOT_ENTITLED, "this agreement was not proposed here")
    elif not {agreement.provider, agreement.requester} <= signers:
        objection = (Reason.NOT_ENTITLED, "the agreement is not signed by both")
    elif agreement.expires_at <= facts.now:
        objection = (Reason.EXPIRED, "the agreement is over")
    elif not facts.trusted or not facts.policy.serves(agreement.requester):
        objection = (Reason.PEER_NOT_ALLOWED, "")
    if objection is not None:
        return state, Refusal(
            offer=agreement.offer,
            provider=facts.me,
            requester=agreement.requester,
            reason=objection[0],
            detail=objection[1],
        )
    return Agreed(agreement), agreement


def _form(offer: Offer, signers: frozenset[PeerId], facts: Facts) -> tuple[Reason, str] | None:
    """What is wrong with an offer whatever it asks for."""
    if offer.requester not in signers:
        return Reason.MALFORMED, "the offer is not signed by its requester"
    if offer.network != facts.network:
        return Reason.WRONG_NETWORK, offer.network
    if offer.provider != facts.me:
        return Reason.MALFORMED, "the offer is addressed to another peer"
    if offer.expires_at <= facts.now:
        return Reason.EXPIRED, "the offer is over"
    if offer.issued_at > facts.now + MAX_CLOCK_SKEW:
        return Reason.EXPIRED, "the offer is dated in the future: compare the clocks"
    if facts.nonce_of not in (None, offer.digest):
        return Reason.MALFORMED, "the nonce was used for another offer"
    if offer.plan is None and offer.purpose is not Purpose.MIRROR:
        return Reason.MALFORMED, f"an offer for {offer.purpose} names its plan"
    return None


def _substance(offer: Offer, facts: Facts) -> tuple[Reason, str] | None:
    """Why the policy does not grant an offer."""
    policy = facts.policy
    if not facts.trusted or not policy.serves(offer.requester):
        return Reason.PEER_NOT_ALLOWED, ""
    missing = [model for model in offer.models if model not in facts.held]
    if missing:
        return Reason.UNKNOWN_MODEL, missing[0]
    if offer.purpose not in policy.purposes:
        return Reason.PURPOSE_NOT_ALLOWED, offer.purpose
    for model in offer.models:
        # The bytes are the same whoever signed them, so the strictest licence stands.
        for licence in facts.held[model].licences:
            if not policy.grants(licence):
                return Reason.LICENCE_NOT_GRANTED, licence
    if facts.open >= policy.agreements_per_peer:
        return Reason.BUSY, f"{facts.open} agreements are open"
    wanted = sum(facts.held[model].size for model in offer.models)
    if facts.served_today + wanted > policy.bytes_per_peer_per_day:
        return Reason.QUOTA_EXCEEDED, f"{policy.bytes_per_peer_per_day} bytes a day"
    return None


def _agreement(offer: Offer, facts: Facts) -> Agreement:
    size = sum(facts.held[model].size for model in offer.models)
    begin = int(facts.now)
    return Agreement(
        network=offer.network,
        offer=offer.digest,
        provider=offer.provider,
        requester=offer.requester,
        models=offer.models,
        purpose=offer.purpose,
        plan=offer.plan,
        # A quarter more than the models have: an interrupted stream sends some bytes twice.
        max_bytes=size + size // 4 + SPARE_BYTES,
        not_before=begin,
        expires_at=begin + facts.policy.agreement_seconds,
    )


def _refusal(offer: Offer, me: PeerId, reason: Reason, detail: str) -> Refusal:
    return Refusal(offer=offer.digest, provider=me, requester=offer.requester, reason=reason, detail=detail)
