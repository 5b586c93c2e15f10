"""Whose certificates the peer port accepts now: few, and each for a limited time after its last use.

A TLS handshake verifies against all of them at once, which costs 4 ms with 100 and 177 ms with 1000
(measured): so the set forgets the least recently used beyond its limit, and everybody after a while.
"""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from node.domain.ids import PeerId
from node.errors import PeerError

LIFETIME = 3600.0
LIMIT = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    peer: PeerId
    pem: bytes
    expires: float


class Admitted:
    """Certificates by peer, which the caller has checked to be that peer's; safe to use from any thread."""

    def __init__(self, *, clock: Callable[[], float], lifetime: float = LIFETIME, limit: int = LIMIT) -> None:
        self._clock = clock
        self._lifetime = lifetime
        self._limit = limit
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, peer: PeerId, pem: bytes) -> None:
        """Accept a peer's certificate from now on, in place of its earlier one."""
        with self._lock:
            self._forget(lambda entry: entry.peer == peer)
            key = fingerprint(pem)
            self._entries[key] = _Entry(peer=peer, pem=pem, expires=self._clock() + self._lifetime)
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)

    def dismiss(self, peer: PeerId) -> None:
        """Accept a peer no longer, not even on the connections it has."""
        with self._lock:
            self._forget(lambda entry: entry.peer == peer)

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
            self._entries[key] = replace(entry, expires=self._clock() + self._lifetime)
            self._entries.move_to_end(key)
            return entry.peer

    def certificates(self) -> tuple[bytes, ...]:
        """The admitted certificates (PEM), in an order that changes only with the set."""
        with self._lock:
            self._expire()
            return tuple(sorted(entry.pem for entry in self._entries.values()))

    def _expire(self) -> None:
        now = self._clock()
        self._forget(lambda entry: entry.expires <= now)

    def _forget(self, which: Callable[[_Entry], bool]) -> None:
        for key in [key for key, entry in self._entries.items() if which(entry)]:
            del self._entries[key]


def fingerprint(pem: bytes) -> str:
    """The SHA-256 of a certificate's DER: PEM has several spellings. Raises PeerError."""
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode("ascii").strip())).hexdigest()
    except ValueError as error:
        raise PeerError("the peer's certificate is not PEM") from error
