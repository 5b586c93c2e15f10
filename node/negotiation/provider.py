"""Provider: answers offers, remembers agreements, and counts what is sent under them.

Deciding is `machine.step`; here its facts are gathered and its states kept, one transaction for each message.
It is also what the peer server asks before it sends anything (`node.peer.ports.Entitlements`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from merge_core.digest import Digest, ModelId
from node.domain.ids import PeerId
from node.domain.negotiation import Agreement, Offer, Refusal
from node.domain.reasons import Reason
from node.errors import Refused, VerificationFailed
from node.identity.envelopes import Envelope
from node.identity.keys import HostKey
from node.negotiation import machine
from node.negotiation.machine import Agreed, Facts, Proposed, State, Terms, Unheard
from node.negotiation.messages import Signed, read, sign
from node.negotiation.policy import Policy
from node.store import Store

DAY = 24 * 3600
KEEP_DAYS = 31


class HeldExpert(Protocol):
    """What a policy looks at in an expert."""

    @property
    def licence(self) -> str:
        """Its SPDX expression."""

    @property
    def size(self) -> int:
        """Bytes of its tensors."""


class Experts(Protocol):
    """The experts that this node holds."""

    def all(self, model_id: ModelId) -> Sequence[HeldExpert]:
        """The model as each of its publishers signed it; empty when it is not here."""


class Provider:
    """The granting side of one node; usable from every thread."""

    def __init__(
        self,
        store: Store,
        *,
        key: HostKey,
        network: str,
        experts: Experts,
        policy: Policy,
        clock: Callable[[], float],
        banned: Callable[[PeerId], bool] = lambda peer: False,
    ) -> None:
        self._store = store
        self._key = key
        self._network = network
        self._experts = experts
        self._policy = policy
        self._clock = clock
        self._banned = banned

    def respond(self, peer: PeerId, data: bytes) -> bytes:
        """Answer a message that came over the connection of `peer`: a signed Agreement or Refusal.

        Raises Refused where there is nothing to sign an answer to.
        """
        try:
            message = read(data)
        except (VerificationFailed, ValueError) as error:
            raise Refused(Reason.MALFORMED, str(error)[:200]) from error
        if message.statement.requester != peer:
            raise Refused(Reason.PEER_NOT_ALLOWED, "the message is signed by another peer than sends it")
        with self._store.transaction():
            state = self._state(message)
            try:
                after, reply = machine.step(state, message, self._facts(message))
            except ValueError as error:
                raise Refused(Reason.MALFORMED, str(error)) from error
            if isinstance(reply, Refusal):
                return sign(reply, self._key).to_bytes()
            if after == state:
                return self._answer(reply.offer)
            envelope = message.envelope if isinstance(after, Agreed) else sign(reply, self._key)
            self._keep(message, after, envelope)
        return envelope.to_bytes()

    def serves(self, peer: PeerId) -> bool:
        """Whether a peer gets anything at all: it is not banned, and the policy has nothing against it."""
        return self._policy.serves(peer) and not self._banned(peer)

    def engaged(self) -> frozenset[PeerId]:
        """Who has an agreement with us that is not over."""
        rows = self._store.rows(
            "SELECT DISTINCT requester FROM negotiations"
            " WHERE provider = ? AND stage = 'agreed' AND expires_at > ?",
            *(self._key.peer_id, int(self._clock())),
        )
        return frozenset(PeerId(row["requester"]) for row in rows)

    def covers(self, peer: PeerId, model_id: ModelId, nbytes: int) -> None:
        """Count bytes that are about to be sent; raises Refused when no live agreement covers them."""
        now = self._clock()
        if not self.serves(peer):
            raise Refused(Reason.PEER_NOT_ALLOWED)
        with self._store.transaction():
            live = [row for row in self._agreed(peer, now) if model_id in row[1].models]
            chosen = next((row for row in live if row[2] + nbytes <= row[1].max_bytes), None)
            if chosen is None:
                detail = "the bytes of the agreement are used up" if live else ""
                raise Refused(Reason.NOT_ENTITLED, detail, hint="negotiate again")
            if self.served(peer, now) + nbytes > self._policy.bytes_per_peer_per_day:
                raise Refused(Reason.QUOTA_EXCEEDED)
            self._store.change("UPDATE negotiations SET sent = sent + ? WHERE offer = ?", nbytes, chosen[0])
            self._store.change(
                "INSERT INTO served (peer, day, bytes) VALUES (?, ?, ?)"
                " ON CONFLICT (peer, day) DO UPDATE SET bytes = bytes + excluded.bytes",
                *(peer, _day(now), nbytes),
            )

    def served(self, peer: PeerId, now: float) -> int:
        """How many bytes went to a peer on this day (UTC)."""
        row = self._store.row("SELECT bytes FROM served WHERE peer = ? AND day = ?", peer, _day(now))
        return int(row["bytes"]) if row else 0

    def forget(self) -> None:
        """Drop negotiations of either side that are over, nonces of offers that expired, and old counts.

        A job that was granted something keeps its own copy of the agreement.
        """
        now = self._clock()
        with self._store.transaction():
            self._store.change("DELETE FROM negotiations WHERE expires_at <= ?", int(now))
            self._store.change("DELETE FROM served WHERE day < ?", _day(now) - KEEP_DAYS)

    def _facts(self, message: Signed) -> Facts:
        statement, now = message.statement, self._clock()
        held: dict[ModelId, Terms] = {}
        nonce_of = None
        if isinstance(statement, Offer):
            held = {model: terms for model in statement.models if (terms := self._terms(model))}
            row = self._store.row(
                "SELECT offer FROM negotiations WHERE provider = ? AND requester = ? AND nonce = ?",
                *(self._key.peer_id, statement.requester, statement.nonce),
            )
            nonce_of = Digest(row["offer"]) if row else None
        counted = self._store.row(
            "SELECT count(*) AS n FROM negotiations WHERE provider = ? AND requester = ? AND expires_at > ?",
            *(self._key.peer_id, statement.requester, int(now)),
        )
        return Facts(
            me=self._key.peer_id,
            network=self._network,
            now=now,
            policy=self._policy,
            held=held,
            served_today=self.served(statement.requester, now),
            open=int(counted["n"]) if counted else 0,
            nonce_of=nonce_of,
            trusted=not self._banned(statement.requester),
        )

    def _terms(self, model: ModelId) -> Terms | None:
        experts = self._experts.all(model)
        if not experts:
            return None
        return Terms(licences=tuple(e.licence for e in experts), size=max(e.size for e in experts))

    def _state(self, message: Signed) -> State:
        statement = message.statement
        offer = statement.digest if isinstance(statement, Offer) else statement.offer
        row = self._store.row(
            "SELECT stage, answer FROM negotiations WHERE offer = ? AND provider = ?",
            *(offer, self._key.peer_id),
        )
        if row is None:
            return Unheard()
        agreement = _agreement(row["answer"])
        return Agreed(agreement) if row["stage"] == "agreed" else Proposed(agreement)

    def _keep(self, message: Signed, state: State, envelope: Envelope) -> None:
        statement = message.statement
        if isinstance(state, Proposed) and isinstance(statement, Offer):
            # An open proposal is worth no longer than its offer: it only holds the nonce and a place.
            self._store.change(
                "INSERT INTO negotiations"
                " (offer, provider, requester, nonce, stage, agreement, expires_at, offered, answer)"
                " VALUES (?, ?, ?, ?, 'proposed', ?, ?, ?, ?)",
                *(statement.digest, statement.provider, statement.requester, statement.nonce),
                *(state.agreement.digest, statement.expires_at),
                *(message.envelope.to_bytes(), envelope.to_bytes()),
            )
        elif isinstance(state, Agreed):
            self._store.change(
                "UPDATE negotiations SET stage = 'agreed', answer = ?, expires_at = max(expires_at, ?)"
                " WHERE offer = ?",
                *(envelope.to_bytes(), state.agreement.expires_at, state.agreement.offer),
            )

    def _answer(self, offer: Digest) -> bytes:
        row = self._store.row("SELECT answer FROM negotiations WHERE offer = ?", offer)
        assert row is not None
        return bytes(row["answer"])

    def _agreed(self, peer: PeerId, now: float) -> list[tuple[str, Agreement, int]]:
        """The offer, agreement and bytes sent of everything that `peer` may use now, oldest first."""
        rows = self._store.rows(
            "SELECT offer, answer, sent FROM negotiations"
            " WHERE provider = ? AND requester = ? AND stage = 'agreed' AND expires_at > ?",
            *(self._key.peer_id, peer, int(now)),
        )
        found = [(row["offer"], _agreement(row["answer"]), int(row["sent"])) for row in rows]
        return sorted((item for item in found if item[1].live(now)), key=lambda item: item[1].not_before)


def _agreement(answer: bytes) -> Agreement:
    return Agreement.parse(Envelope.parse(answer).payload)


def _day(now: float) -> int:
    return int(now // DAY)
