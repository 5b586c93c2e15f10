"""Whose certificates the peer port accepts now: few, and each for a limited time after its last use.

A TLS handshake verifies against all of them at once, which costs 4 ms with 100 and 177 ms with 1000
(measured), and whoever likes makes identities: so everybody is forgotten after a while, and a full set makes
room only at the cost of strangers who do not call. Where there are none, we are busy for somebody new.
"""

from __future__ import annotations

import hashlib
import math
import ssl
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import PeerError, Refused

LIFETIME = 3600.0
LIMIT = 100
IDLE = 300.0
"""Seconds without a call after which a stranger may have to make room."""
_NEVER = -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    peer: PeerId
    pem: bytes
    expires: float
    called: float


class Admitted:
    """Certificates by peer, which the caller has checked to be that peer's; safe to use from any thread.

    `allowed` says whom we have anything to do with, `engaged` who has a live agreement with us.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        allowed: Callable[[PeerId], bool] = lambda peer: True,
        engaged: Callable[[], Collection[PeerId]] = frozenset,
        lifetime: float = LIFETIME,
        limit: int = LIMIT,
    ) -> None:
        self._clock = clock
        self._allowed = allowed
        self._engaged = engaged
        self._lifetime = lifetime
        self._limit = limit
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def admit(self, peer: PeerId, pem: bytes) -> None:
        """Accept a peer's certificate from now on, in place of its earlier one.

        `pem` must be in our own spelling. Raises Refused: PEER_NOT_ALLOWED, or BUSY where nobody makes room.
        """
        if not self._allowed(peer):
            raise Refused(Reason.PEER_NOT_ALLOWED)
        key, now = fingerprint(pem), self._clock()
        with self._lock:
            self._expire()
            earlier = next((entry for entry in self._entries.values() if entry.peer == peer), None)
            if earlier is None and len(self._entries) >= self._limit:
                self._make_room(peer, now)
            self._forget(lambda entry: entry.peer == peer)
            called = earlier.called if earlier else _NEVER
            self._entries[key] = _Entry(peer=peer, pem=pem, expires=now + self._lifetime, called=called)

    def peer_of(self, pem: bytes) -> PeerId | None:
        """Whose certificate this is, admitted anew by being used; None for one that is not admitted."""
        try:
            key = fingerprint(pem)
        except PeerError:
            return None
        with self._lock:
            self._expire()
            entry = self._entries.get(key)
            if entry is None:
                return None
            # Whoever is being served stays: a transfer may take longer than the lifetime of an admission.
            now = self._clock()
            self._entries[key] = replace(entry, expires=now + self._lifetime, called=now)
            return entry.peer

    def certificates(self) -> tuple[bytes, ...]:
        """The admitted certificates (PEM), in an order that changes only with the set."""
        with self._lock:
            self._expire()
            return tuple(sorted(entry.pem for entry in self._entries.values()))

    def _make_room(self, newcomer: PeerId, now: float) -> None:
        """Forget whom we miss least: who called least recently, and of those who never did the newest."""
        engaged = self._engaged()
        strangers = [item for item in self._entries.items() if item[1].peer not in engaged]
        if newcomer not in engaged:
            strangers = [item for item in strangers if now - item[1].called >= IDLE]
        if not strangers:
            raise Refused(Reason.BUSY, "all places are taken by peers that use theirs")
        del self._entries[min(reversed(strangers), key=lambda item: item[1].called)[0]]

    def _expire(self) -> None:
        now = self._clock()
        self._forget(lambda entry: entry.expires <= now or not self._allowed(entry.peer))

    def _forget(self, which: Callable[[_Entry], bool]) -> None:
        for key in [key for key, entry in self._entries.items() if which(entry)]:
            del self._entries[key]


def fingerprint(pem: bytes) -> str:
    """The SHA-256 of a certificate's DER: PEM has several spellings. Raises PeerError."""
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode("ascii").strip())).hexdigest()
    except ValueError as error:
        raise PeerError("the peer's certificate is not PEM") from error
