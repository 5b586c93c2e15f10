"""Requester: makes offers, believes no answer that it did not check, and keeps the agreements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merge_core.digest import Digest, ModelId
from node.domain.ids import PeerId
from node.domain.negotiation import MAX_MODELS, Agreement, Offer, Purpose, Refusal
from node.errors import LimitReached, PeerError, Refused, VerificationFailed
from node.identity.envelopes import Envelope
from node.identity.keys import HostKey
from node.negotiation.messages import Signed, countersign, read, sign
from node.store import Store

OFFER_SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Concluded:
    """An agreement, and the envelope with both signatures that proves it to anybody."""

    agreement: Agreement
    envelope: Envelope


class Requester:
    """The asking side of one node; usable from every thread. `nonce` draws 32 hex digits."""

    def __init__(
        self,
        store: Store,
        *,
        key: HostKey,
        network: str,
        clock: Callable[[], float],
        nonce: Callable[[], str],
    ) -> None:
        self._store = store
        self._key = key
        self._network = network
        self._clock = clock
        self._nonce = nonce

    def offer(
        self, provider: PeerId, *, purpose: Purpose, models: Sequence[ModelId], plan: Digest | None
    ) -> tuple[Offer, bytes]:
        """A fresh offer and its signed bytes; raises LimitReached on more models than one offer names."""
        wanted = tuple(sorted(set(models)))
        if not 0 < len(wanted) <= MAX_MODELS:
            raise LimitReached(f"an offer for {len(wanted)} models; it names 1 to {MAX_MODELS}")
        issued = int(self._clock())
        offer = Offer(
            network=self._network,
            requester=self._key.peer_id,
            provider=provider,
            purpose=purpose,
            models=wanted,
            plan=plan,
            nonce=self._nonce(),
            issued_at=issued,
            expires_at=issued + OFFER_SECONDS,
        )
        return offer, sign(offer, self._key).to_bytes()

    def accept(self, offer: Offer, data: bytes) -> bytes:
        """Sign the agreement that answers `offer`, once it says what was asked; the bytes go back.

        Raises Refused when the provider refuses, PeerError when its answer is none.
        """
        return countersign(self._checked(offer, data).envelope, self._key).to_bytes()

    def conclude(self, offer: Offer, data: bytes) -> Concluded:
        """Keep the agreement that both have signed; raises as `accept` does."""
        signed = self._checked(offer, data)
        agreement = signed.statement
        assert isinstance(agreement, Agreement)
        if signed.signers != {offer.provider, offer.requester}:
            raise PeerError(f"peer {offer.provider.short} returned an agreement that lacks a signature")
        self._store.change(
            "INSERT OR REPLACE INTO negotiations"
            " (offer, provider, requester, nonce, stage, agreement, expires_at, offered, answer)"
            " VALUES (?, ?, ?, ?, 'agreed', ?, ?, ?, ?)",
            *(offer.digest, offer.provider, offer.requester, offer.nonce),
            *(agreement.digest, agreement.expires_at, offer.to_bytes(), signed.envelope.to_bytes()),
        )
        return Concluded(agreement=agreement, envelope=signed.envelope)

    def usable(
        self, provider: PeerId, *, purpose: Purpose, models: Sequence[ModelId], plan: Digest | None
    ) -> Concluded | None:
        """The newest agreement that is live and was made for exactly this: what a resumed job asks first."""
        wanted, now = tuple(sorted(set(models))), self._clock()
        rows = self._store.rows(
            "SELECT answer FROM negotiations WHERE requester = ? AND provider = ? AND stage = 'agreed'"
            " AND expires_at > ?",
            *(self._key.peer_id, provider, int(now)),
        )
        envelopes = [Envelope.parse(bytes(row["answer"])) for row in rows]
        found = [Concluded(agreement=Agreement.parse(e.payload), envelope=e) for e in envelopes]
        fitting = [
            concluded
            for concluded in found
            if (concluded.agreement.purpose, concluded.agreement.models, concluded.agreement.plan)
            == (purpose, wanted, plan)
            and concluded.agreement.live(now)
        ]
        return max(fitting, key=lambda c: c.agreement.not_before, default=None)

    def _checked(self, offer: Offer, data: bytes) -> Signed:
        """The provider's agreement to `offer`; raises Refused or PeerError."""
        who = f"peer {offer.provider.short}"
        try:
            signed = read(data)
        except (VerificationFailed, ValueError) as error:
            raise PeerError(f"{who} answered an offer with something unreadable: {error}") from error
        answer = signed.statement
        if isinstance(answer, Offer) or answer.offer != offer.digest or offer.provider not in signed.signers:
            raise PeerError(f"{who} answered another offer, or did not sign its answer")
        if isinstance(answer, Refusal):
            raise Refused(answer.reason, answer.detail, hint="weft search")
        if not answer.answers(offer) or answer.expires_at <= self._clock():
            raise PeerError(f"{who} agreed to something else than was offered")
        return signed
