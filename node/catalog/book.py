"""AdvertBook: the newest valid announcement of every peer, kept across restarts.

The rule is a pure function of what is known of a peer and what arrives (`judge`); the book carries it out in
one transaction. What it keeps to, whatever the order of arrival:

- an advert counts under its own signature, in its own network, and until it expires;
- an older number than the newest announcement's is never taken (replay, rollback), nor after a restart;
- parts of the newest announcement may arrive in any order;
- two adverts that contradict each other (`node.domain.advert.contradict`) are kept as a proof, and the peer
  that signed both is no longer listened to;
- when it is full, room is shared among connections (`node.catalog.room`): nobody is kept out by a crowd.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from merge_core.digest import Digest, ModelId
from node.catalog.room import ROOM, Connected, Ledger, Tenant, leaving, side
from node.domain import advert as adverts
from node.domain.advert import Advert, AdvertisedModel, Link, announcement, contradict
from node.domain.ids import PeerId
from node.domain.negotiation import Purpose
from node.errors import LimitReached, VerificationFailed
from node.identity.envelopes import Envelope, open_envelope, seal
from node.identity.keys import HostKey, host_verifier
from node.store import Store

MAX_TOLD = 4096
"""Adverts that are told at once."""
FORGET_AFTER = 2 * adverts.MAX_LIFETIME
"""Seconds after its expiry when a number may be forgotten: whatever was older has expired long before."""

ASK_AGAIN = 10.0
"""Seconds for which a connection that found no room is not looked at again: looking takes milliseconds."""
_PROOF = -1

Place = tuple[str, int]
"""Where an advert comes among all that are told: by peer, then by number."""
START: Place = ("", 0)


class Outcome(Enum):
    """What became of an advert; `counts_against` says whether its sender should have known better."""

    NEW = "new"
    KNOWN = "known"
    OLD = "older than what the peer said since"
    EXPIRED = "expired"
    OWN = "signed by this node itself"
    BANNED = "of a peer that contradicted itself"
    FULL = "no room for another peer"
    CONTRADICTION = "contradicts another advert of the peer"
    MALFORMED = "malformed, or not signed by its peer"
    FUTURE = "issued in the future"
    WRONG_NETWORK = "of another network"

    @property
    def counts_against(self) -> bool:
        """Whether only a faulty or hostile node passes such an advert on."""
        return self in (Outcome.MALFORMED, Outcome.FUTURE, Outcome.WRONG_NETWORK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The highest number taken from a peer, the announcement it belongs to, and when the last one expires."""

    seq: int
    first_seq: int
    parts: int
    expires_at: int

    @classmethod
    def of(cls, advert: Advert, before: Head | None) -> Head:
        """The head that an advert makes of the one before."""
        return cls(
            seq=advert.seq,
            first_seq=advert.first_seq,
            parts=advert.parts,
            expires_at=max(advert.expires_at, before.expires_at if before else 0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What became of an advert, and the advert where it could be read."""

    outcome: Outcome
    advert: Advert | None = None
    proof: tuple[bytes, bytes] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One model as one peer advertises it."""

    peer: PeerId
    model: AdvertisedModel
    seq: int
    expires_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is looked for; what is None or empty does not narrow the search. `text` matches within names."""

    text: str = ""
    model_id: ModelId | None = None
    architecture: str = ""
    base: ModelId | None = None
    licence: str = ""
    publisher: str = ""
    purpose: Purpose | None = None
    peer: PeerId | None = None


def judge(head: Head | None, known: Iterable[Advert], advert: Advert) -> tuple[Outcome, Advert | None]:
    """Decide what an intact, unexpired advert means after `head` and the adverts still `known` of its peer.

    With CONTRADICTION comes the advert that it contradicts.
    """
    for other in known:
        if other.digest == advert.digest:
            return Outcome.KNOWN, None
        if contradict(other, advert):
            return Outcome.CONTRADICTION, other
    if head is None or advert.first_seq >= head.first_seq + head.parts:
        return Outcome.NEW, None
    if (advert.first_seq, advert.parts) == (head.first_seq, head.parts):
        return Outcome.NEW, None
    return Outcome.OLD, None


def matches(query: Query, listing: Listing) -> bool:
    """Whether a listing is what the query looks for."""
    model = listing.model
    words = query.text.casefold().split()
    haystack = f"{model.name} {model.model_id} {model.architecture} {model.licence}".casefold()
    return (
        all(word in haystack for word in words)
        and query.model_id in (None, model.model_id)
        and query.architecture.casefold() in ("", model.architecture.casefold())
        and query.base in (None, model.base)
        and query.licence.casefold() in ("", model.licence.casefold())
        and query.publisher in ("", model.publisher)
        and (query.purpose is None or query.purpose in model.purposes)
        and query.peer in (None, listing.peer)
    )


class AdvertBook:
    """The adverts of one network in a store; usable from every thread."""

    def __init__(self, store: Store, *, network: str, me: PeerId, room: int = ROOM) -> None:
        """`room` is how many bytes are kept of others, each of whom counts for LEAST at least."""
        self._room = room
        self._store = store
        self._network = network
        self._me = me
        self._lock = threading.RLock()
        self._heads: dict[PeerId, Head] = {}
        self._adverts: dict[PeerId, dict[int, Advert]] = {}
        self._banned: set[PeerId] = set()
        self._told_by: dict[PeerId, PeerId] = {}
        self._ledger = Ledger()
        self._full_until: dict[PeerId | None, float] = {}
        self._load()

    def admit(
        self,
        data: bytes,
        now: float,
        *,
        told_by: PeerId | None = None,
        connected: Connected = lambda peer: False,
    ) -> Admission:
        """Take one signed advert from anybody; nothing that comes in raises.

        `told_by` is the peer that sent it, and `connected` says who is: what decides when there is no room.
        """
        try:
            advert = read(data)
        except (VerificationFailed, ValueError):
            return Admission(outcome=Outcome.MALFORMED)
        if advert.network != self._network:
            return Admission(outcome=Outcome.WRONG_NETWORK, advert=advert)
        if advert.issued_at > now + adverts.MAX_CLOCK_SKEW:
            return Admission(outcome=Outcome.FUTURE, advert=advert)
        if advert.peer == self._me:
            return Admission(outcome=Outcome.OWN, advert=advert)
        if advert.expires_at <= now:
            return Admission(outcome=Outcome.EXPIRED, advert=advert)
        with self._lock:
            return self._take(advert, data, now, told_by, connected)

    def announce(
        self,
        models: Iterable[AdvertisedModel],
        key: HostKey,
        now: float,
        *,
        addresses: Sequence[str] = (),
        lifetime: int = adverts.MAX_LIFETIME,
    ) -> tuple[bytes, ...]:
        """Sign what this node holds and remember it as said; publish what comes back."""
        with self._lock, self._store.transaction():
            said = announcement(
                models,
                network=self._network,
                peer=key.peer_id,
                last=self._last(key.peer_id),
                now=now,
                addresses=addresses,
                lifetime=lifetime,
            )
            sealed = tuple(seal(adverts.PAYLOAD_TYPE, advert.to_bytes(), key).to_bytes() for advert in said)
            for advert, data in zip(said, sealed, strict=True):
                self._keep(advert, data)
        return sealed

    def search(self, query: Query, now: float) -> tuple[Listing, ...]:
        """Every live listing that matches, this node's own too, by name, id and peer."""
        found = [listing for listing in self.listings(now) if matches(query, listing)]
        return tuple(sorted(found, key=lambda x: (x.model.name, x.model.model_id, x.peer, x.model.publisher)))

    def listings(self, now: float) -> tuple[Listing, ...]:
        """Everything that somebody offers at this time."""
        with self._lock:
            live = [advert for advert in self._newest() if advert.expires_at > now]
        return tuple(
            Listing(peer=advert.peer, model=model, seq=advert.seq, expires_at=advert.expires_at)
            for advert in live
            for model in advert.models
        )

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Where a peer says that it listens, whether or not that still holds."""
        with self._lock:
            said = [advert.addresses for advert in self._newest() if advert.peer == peer]
        return said[0] if said else ()

    def envelopes(
        self, now: float, *, after: Place = START, limit: int = MAX_TOLD
    ) -> tuple[tuple[Place, bytes], ...]:
        """The signed bytes of live adverts, which another peer can check itself, in order from `after` on."""
        rows = self._store.rows(
            "SELECT a.peer, a.seq, a.envelope FROM adverts AS a JOIN heads AS h USING (network, peer)"
            " WHERE a.network = ? AND (a.peer, a.seq) > (?, ?) AND a.seq >= h.first_seq AND a.expires_at > ?"
            " AND NOT EXISTS (SELECT 1 FROM contradictions WHERE network = a.network AND peer = a.peer)"
            " ORDER BY a.peer, a.seq LIMIT ?",
            *(self._network, *after, int(now), limit),
        )
        told = [((str(row["peer"]), int(row["seq"])), bytes(row["envelope"])) for row in rows]
        # Of a peer that contradicted itself both stories are told: whoever reads them finds out too.
        proofs = self._store.rows(
            "SELECT peer, one, other FROM contradictions WHERE network = ? AND peer >= ?"
            " ORDER BY peer LIMIT ?",
            *(self._network, after[0], limit),
        )
        for row in proofs:
            pair = (((str(row["peer"]), n), bytes(row[name])) for n, name in ((1, "one"), (2, "other")))
            told += [half for half in pair if half[0] > after]
        return tuple(sorted(told)[:limit])

    def contradictions(self) -> Mapping[PeerId, tuple[bytes, bytes]]:
        """The proof against every peer that contradicted itself."""
        rows = self._store.rows(
            "SELECT peer, one, other FROM contradictions WHERE network = ?", self._network
        )
        return {PeerId(row["peer"]): (bytes(row["one"]), bytes(row["other"])) for row in rows}

    def banned(self, peer: PeerId) -> bool:
        """Whether a peer contradicted itself."""
        return peer in self._banned

    def forget(self, now: float) -> None:
        """Drop adverts that have expired, and what is known of peers that have been gone for days."""
        gone = int(now) - FORGET_AFTER
        with self._lock:
            with self._store.transaction():
                self._store.change(
                    "DELETE FROM adverts WHERE network = ? AND expires_at <= ?", self._network, int(now)
                )
                self._store.change(
                    "DELETE FROM heads WHERE network = ? AND expires_at <= ? AND peer != ?",
                    *(self._network, gone, self._me),
                )
                # A new name costs a liar nothing: a ban need not outlive the adverts that prove it.
                self._store.change(
                    "DELETE FROM contradictions WHERE network = ?"
                    " AND peer NOT IN (SELECT peer FROM heads WHERE network = ?)",
                    *(self._network, self._network),
                )
            self._heads = {
                peer: head for peer, head in self._heads.items() if head.expires_at > gone or peer == self._me
            }
            self._banned &= self._heads.keys()
            live = {
                peer: {seq: advert for seq, advert in known.items() if advert.expires_at > int(now)}
                for peer, known in self._adverts.items()
                if peer in self._heads
            }
            self._adverts = {peer: known for peer, known in live.items() if known}
            self._recount()
            self._told_by = {peer: who for peer, who in self._told_by.items() if peer in self._heads}
            self._full_until.clear()

    def _take(
        self, advert: Advert, data: bytes, now: float, told_by: PeerId | None, connected: Connected
    ) -> Admission:
        if advert.peer in self._banned:
            return Admission(outcome=Outcome.BANNED, advert=advert)
        with self._store.transaction():
            head = self._heads.get(advert.peer)
            known = self._adverts.get(advert.peer, {})
            outcome, other = judge(head, known.values(), advert)
            if other is not None:
                proof = (self._envelope(other), data)
                self._ban(advert.peer, *proof, now)
                return Admission(outcome=outcome, advert=advert, proof=proof)
            if outcome is Outcome.NEW:
                if not self._make_room(advert, len(data), now, told_by, connected):
                    return Admission(outcome=Outcome.FULL, advert=advert)
                self._keep(advert, data)
        if told_by is not None and not connected(self._told_by.get(advert.peer, self._me)):
            self._told_by[advert.peer] = told_by  # the first one stands for it while it is connected
        return Admission(outcome=outcome, advert=advert)

    def _keep(self, advert: Advert, data: bytes) -> None:
        """Store an advert; of what came before only the last one stays, to check the chain against."""
        head = self._heads.get(advert.peer)
        if head is None or advert.seq > head.seq:
            self._store.change(
                "INSERT INTO heads (network, peer, seq, first_seq, parts, digest, expires_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (network, peer) DO UPDATE SET seq = excluded.seq,"
                " first_seq = excluded.first_seq, parts = excluded.parts, digest = excluded.digest,"
                " expires_at = max(expires_at, excluded.expires_at)",
                *(self._network, advert.peer, advert.seq, advert.first_seq, advert.parts, advert.digest),
                advert.expires_at,
            )
            self._heads[advert.peer] = Head.of(advert, head)
        known = self._adverts.setdefault(advert.peer, {})
        before = [seq for seq in known if seq < advert.first_seq]
        for seq in sorted(before)[:-1]:
            del known[seq]
            self._store.change(
                "DELETE FROM adverts WHERE network = ? AND peer = ? AND seq = ?",
                *(self._network, advert.peer, seq),
            )
        known[advert.seq] = advert
        if advert.peer != self._me:
            self._ledger.retain(advert.peer, known)
            self._ledger.add(advert.peer, advert.seq, len(data))
        self._store.change(
            "INSERT OR REPLACE INTO adverts (network, peer, seq, digest, expires_at, envelope)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            *(self._network, advert.peer, advert.seq, advert.digest, advert.expires_at, data),
        )

    def _ban(self, peer: PeerId, one: bytes, other: bytes, now: float) -> None:
        self._store.change(
            "INSERT OR IGNORE INTO contradictions (network, peer, one, other, at) VALUES (?, ?, ?, ?, ?)",
            *(self._network, peer, one, other, now),
        )
        self._store.change("DELETE FROM adverts WHERE network = ? AND peer = ?", self._network, peer)
        self._adverts.pop(peer, None)
        self._ledger.put(peer, {_PROOF: len(one) + len(other)})
        self._banned.add(peer)

    def _newest(self) -> list[Advert]:
        """The adverts of every peer's newest announcement, those left out that contradicted themselves."""
        return [
            advert
            for peer, known in self._adverts.items()
            if peer not in self._banned
            for advert in known.values()
            if advert.first_seq == self._heads[peer].first_seq
        ]

    def _last(self, peer: PeerId) -> Link | None:
        row = self._store.row(
            "SELECT seq, digest FROM heads WHERE network = ? AND peer = ?", self._network, peer
        )
        return Link(seq=row["seq"], digest=Digest(row["digest"])) if row else None

    def _envelope(self, advert: Advert) -> bytes:
        row = self._store.row(
            "SELECT envelope FROM adverts WHERE network = ? AND peer = ? AND seq = ?",
            *(self._network, advert.peer, advert.seq),
        )
        if row is None:
            raise LimitReached(f"advert {advert.seq} of {advert.peer} is no longer stored")
        return bytes(row["envelope"])

    def _make_room(
        self, advert: Advert, size: int, now: float, told_by: PeerId | None, connected: Connected
    ) -> bool:
        """Whether an advert fits, perhaps after others have left."""
        told_by = told_by or self._told_by.get(advert.peer)
        before = self._tenant(advert.peer) if advert.peer in self._heads else None
        wanted = Tenant(
            size=size + (before.size if before else 0), expires_at=advert.expires_at, told_by=told_by
        )
        more = wanted.cost - (before.cost if before else 0)
        if more <= 0 or self._ledger.cost + more <= self._room:
            return True
        where = side(advert.peer, told_by, connected)
        if now < self._full_until.get(where, 0.0):
            return False
        tenants = {peer: self._tenant(peer) for peer in self._heads if peer != self._me}
        gone = leaving(tenants, advert.peer, wanted, now=now, connected=connected, room=self._room)
        if gone is None:
            soonest = min((t.expires_at for t in tenants.values() if t.expires_at > now), default=now)
            self._full_until[where] = min(now + ASK_AGAIN, soonest)
            return False
        for peer in gone:
            self._evict(peer)
        return True

    def _tenant(self, peer: PeerId) -> Tenant:
        return Tenant(
            size=self._ledger.size(peer),
            expires_at=self._heads[peer].expires_at,
            told_by=self._told_by.get(peer),
        )

    def _evict(self, peer: PeerId) -> None:
        """Forget a peer, its adverts and its contradiction."""
        for table in ("heads", "contradictions"):
            self._store.change(f"DELETE FROM {table} WHERE network = ? AND peer = ?", self._network, peer)
        for known in (self._heads, self._adverts, self._told_by):
            known.pop(peer, None)
        self._banned.discard(peer)
        self._ledger.remove(peer)

    def _recount(self) -> None:
        """Count what is stored of others."""
        self._ledger = Ledger()
        for peer in self._heads.keys() - {self._me}:
            self._ledger.put(peer, {})
        rows = self._store.rows(
            "SELECT peer, seq, length(envelope) AS size FROM adverts WHERE network = ? UNION ALL"
            " SELECT peer, ?, length(one) + length(other) FROM contradictions WHERE network = ?",
            *(self._network, _PROOF, self._network),
        )
        for row in rows:
            if row["peer"] != self._me:
                self._ledger.add(PeerId(row["peer"]), int(row["seq"]), int(row["size"]))

    def _load(self) -> None:
        """Read what earlier runs verified; an advert that cannot be read any more is left out."""
        found: dict[PeerId, dict[int, Advert]] = {}
        for row in self._store.rows("SELECT envelope FROM adverts WHERE network = ?", self._network):
            try:
                advert = read(bytes(row["envelope"]))
            except (VerificationFailed, ValueError):
                continue
            found.setdefault(advert.peer, {})[advert.seq] = advert
        heads = self._store.rows(
            "SELECT peer, seq, first_seq, parts, expires_at FROM heads WHERE network = ?", self._network
        )
        with self._lock:
            self._adverts = found
            self._heads = {
                PeerId(row["peer"]): Head(**{name: row[name] for name in Head.__dataclass_fields__})
                for row in heads
            }
            self._banned = set(self.contradictions())
            self._recount()


def read(data: bytes) -> Advert:
    """The advert in an envelope, signed by the peer that it names and nobody else.

    Raises VerificationFailed or ValueError.
    """
    envelope = Envelope.parse(data, limit=adverts.MAX_ENVELOPE)
    advert = Advert.parse(envelope.payload)
    if len(envelope.signatures) != 1:
        raise VerificationFailed("an advert has one signature")
    open_envelope(envelope, adverts.PAYLOAD_TYPE, host_verifier(advert.peer))
    return advert
