"""RecordBook: the signed statements of one kind that this node knows, bounded, each once, in no order.

A record is its author's own word, under its host key, in one network: what it is worth is for whoever reads
it to judge. What the book keeps is a function of what has come, not of the order in which it came: of each
author its newest, and where authors are too many, everybody's newest before anybody's second (`leaving`).
So two nodes that were told the same hold the same, but that each keeps what it said itself.

Authors are names and names are free: the bounds keep memory and disk small, and no author heavier than
another. They do not tell honest authors from made-up ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, Generic, TypeVar

from merge_core.digest import Digest, canonical, check_version, parse_canonical, sha256
from node.domain import text
from node.domain.ids import PeerId
from node.errors import VerificationFailed
from node.identity.envelopes import Envelope, open_envelope, seal
from node.identity.keys import HostKey, host_verifier
from node.store import Store

MAX_PAYLOAD = 10 << 10
"""Bytes of one statement."""
MAX_RECORD = 15 << 10
"""Bytes of its envelope: base64 and the signature come on top."""
MAX_CLOCK_SKEW = 300
_KEYS = {"version", "network", "author", "at", "body"}

T = TypeVar("T")
Order = tuple[int, Digest]
"""A record's place among its author's: the newest first, equal times by digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind(Generic[T]):
    """One kind of record: `read` makes its value of the JSON body, or raises ValueError.

    `of_one` records of one author are kept, `of_all` of all of them together.
    """

    name: str
    read: Callable[[Any], T]
    of_one: int
    of_all: int

    @property
    def payload_type(self) -> str:
        """As what the bytes are signed: no record of one kind can be shown as another."""
        return f"application/vnd.weft.record.{self.name}+json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(Generic[T]):
    """What one peer said at `at` (Unix seconds, by its own clock), and the digest of what it signed."""

    author: PeerId
    at: int
    digest: Digest
    value: T


class Outcome(Enum):
    """What became of a record; `counts_against` says whether its sender should have known better."""

    NEW = "new"
    KNOWN = "known"
    FULL = "older than what is kept"
    MALFORMED = "malformed, or not signed by its author"
    FUTURE = "said in the future"
    WRONG_NETWORK = "of another network"

    @property
    def counts_against(self) -> bool:
        """Whether only a faulty or hostile node passes such a record on."""
        return self in (Outcome.MALFORMED, Outcome.FUTURE, Outcome.WRONG_NETWORK)


class Judgement(Enum):
    """What this node itself found when it looked into a record."""

    HOLDS = "holds"
    REFUTED = "refuted"


class RecordBook(Generic[T]):
    """The records of one kind in one network, in a store; usable from every thread."""

    def __init__(self, store: Store, kind: Kind[T], *, network: str, me: PeerId) -> None:
        """What `me` said itself makes room for nobody: it counts for `of_one` alone."""
        self.kind = kind
        self.network = network
        self._me = me
        self._store = store
        self._lock = threading.RLock()
        self._records: dict[Digest, Record[T]] = {}
        self._of: dict[PeerId, list[Order]] = {}
        self._judged: dict[Digest, Judgement] = {}
        self._load()

    def admit(self, data: bytes, now: float) -> Outcome:
        """Take one signed record from anybody; nothing that comes in raises."""
        try:
            network, record = read(self.kind, data)
        except (VerificationFailed, ValueError):
            return Outcome.MALFORMED
        if network != self.network:
            return Outcome.WRONG_NETWORK
        if record.at > now + MAX_CLOCK_SKEW:
            return Outcome.FUTURE
        with self._lock, self._store.transaction():
            return self._take(record, data)

    def say(self, body: Any, key: HostKey, now: float) -> bytes:
        """Sign a statement of this node's and keep it; publish what comes back. Raises ValueError."""
        payload = canonical(
            {"version": 1, "network": self.network, "author": key.peer_id, "at": int(now), "body": body}
        )
        data = seal(self.kind.payload_type, payload, key).to_bytes()
        _, record = read(self.kind, data)
        with self._lock, self._store.transaction():
            self._take(record, data)
        return data

    def records(self) -> tuple[Record[T], ...]:
        """Every record that is kept, ordered by digest."""
        with self._lock:
            return tuple(self._records[digest] for digest in sorted(self._records))

    def judge(self, digest: Digest, judgement: Judgement) -> None:
        """Note what this node itself found about a record."""
        with self._lock:
            if digest in self._records:
                self._judged[digest] = judgement
                self._store.change(
                    "UPDATE records SET judged = ? WHERE network = ? AND kind = ? AND digest = ?",
                    *(judgement.value, self.network, self.kind.name, digest),
                )

    def judged(self) -> Mapping[Digest, Judgement]:
        """What this node itself found about records, by digest."""
        with self._lock:
            return dict(self._judged)

    def envelopes(self, *, after: str = "", limit: int = 1024) -> tuple[tuple[str, bytes], ...]:
        """Signed bytes, which another peer can check itself, in order of digest from `after` on."""
        rows = self._store.rows(
            "SELECT digest, envelope FROM records WHERE network = ? AND kind = ? AND digest > ?"
            " ORDER BY digest LIMIT ?",
            *(self.network, self.kind.name, after, limit),
        )
        return tuple((str(row["digest"]), bytes(row["envelope"])) for row in rows)

    def _take(self, record: Record[T], data: bytes) -> Outcome:
        if record.digest in self._records:
            return Outcome.KNOWN
        self._keep(record)
        gone = leaving(self._of, of_one=self.kind.of_one, of_all=self.kind.of_all, spared=self._me)
        for digest in gone:
            self._drop(digest)
        if record.digest in gone:
            return Outcome.FULL
        self._store.change(
            "INSERT INTO records (network, kind, digest, envelope) VALUES (?, ?, ?, ?)",
            *(self.network, self.kind.name, record.digest, data),
        )
        return Outcome.NEW

    def _keep(self, record: Record[T]) -> None:
        self._records[record.digest] = record
        orders = self._of.setdefault(record.author, [])
        orders.append((-record.at, record.digest))
        orders.sort()

    def _drop(self, digest: Digest) -> None:
        record = self._records.pop(digest)
        self._judged.pop(digest, None)
        self._of[record.author].remove((-record.at, digest))
        if not self._of[record.author]:
            del self._of[record.author]
        self._store.change(
            "DELETE FROM records WHERE network = ? AND kind = ? AND digest = ?",
            *(self.network, self.kind.name, digest),
        )

    def _load(self) -> None:
        """Read what earlier runs verified; a record that cannot be read any more is left out."""
        rows = self._store.rows(
            "SELECT digest, envelope, judged FROM records WHERE network = ? AND kind = ?",
            *(self.network, self.kind.name),
        )
        for row in rows:
            try:
                _, record = read(self.kind, bytes(row["envelope"]))
            except (VerificationFailed, ValueError):
                continue
            self._keep(record)
            if row["judged"] is not None:
                self._judged[record.digest] = Judgement(row["judged"])


def read(kind: Kind[T], data: bytes) -> tuple[str, Record[T]]:
    """The network and the record in an envelope, signed by the author that it names and nobody else.

    Raises VerificationFailed or ValueError.
    """
    envelope = Envelope.parse(data, limit=MAX_RECORD)
    if len(envelope.payload) > MAX_PAYLOAD or len(envelope.signatures) != 1:
        raise VerificationFailed("a record has one signature and a bounded statement")
    try:
        value = text.fields(parse_canonical(envelope.payload), _KEYS)
        check_version(value["version"], 1, "record")
        author = PeerId(value["author"])
        network = text.matching(value["network"], text.NETWORK, "network name")
        at = text.integer(value["at"], "at")
        open_envelope(envelope, kind.payload_type, host_verifier(author))
        body = kind.read(value["body"])
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a record: {error}") from error
    return network, Record(author=author, at=at, digest=sha256(envelope.payload), value=body)


def leaving(
    of: Mapping[PeerId, Sequence[Order]], *, of_one: int, of_all: int, spared: PeerId
) -> tuple[Digest, ...]:
    """Which records go, of authors whose records are sorted: the same ones in whatever order all came.

    First what an author has beyond `of_one`. Then, until `of_all` are left, the oldest of whoever has most;
    of several who have as many, of the last by the digest of its name. `spared` is not counted among all.
    """
    gone: list[Digest] = [digest for orders in of.values() for _, digest in orders[of_one:]]
    counts = {author: min(len(orders), of_one) for author, orders in of.items() if author != spared}
    excess = sum(counts.values()) - of_all
    while excess > 0:
        most = max(counts, key=lambda author: (counts[author], _place(author)))
        counts[most] -= 1
        gone.append(of[most][counts[most]][1])
        excess -= 1
    return tuple(gone)


@lru_cache(maxsize=1 << 14)
def _place(author: PeerId) -> Digest:
    """Where a name stands among others: asked of thousands of them for each record that comes."""
    return sha256(author.encode())
