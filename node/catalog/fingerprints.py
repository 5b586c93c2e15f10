"""Fingerprints by digest over the network: similarity before any agreement, without the peer's gRPC port.

An advert names the digest, so whoever answers is as good as any. A signed fingerprint fits into one message.
"""

from __future__ import annotations

from collections.abc import Iterable

from merge_core.digest import Digest, sha256
from node.catalog.expert import FINGERPRINT, Expert
from node.catalog.shelf import Shelf
from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import PeerError, Refused, VerificationFailed
from node.network.base import Network
from node.provenance.sketch import MAX_SIGNED, SignedFingerprint

PROTOCOL = "/weft/fingerprint/1"
DEADLINE = 15.0
"""Seconds that a peer has to answer."""


class Fingerprints:
    """Answers for the fingerprints on one shelf, and asks peers for theirs."""

    def __init__(self, network: Network, shelf: Shelf) -> None:
        self._network = network
        self._shelf = shelf

    def start(self) -> None:
        """Begin to answer."""
        self._network.handle(PROTOCOL, self._answer)

    async def fetch(self, peer: PeerId, digest: Digest, *, deadline: float = DEADLINE) -> SignedFingerprint:
        """Ask a connected peer for the fingerprint that an advert names.

        Raises PeerError when its answer is another one or none at all, Refused when it holds none such.
        """
        data = await self._network.request(peer, PROTOCOL, digest.encode(), deadline=deadline)
        if sha256(data) != digest:
            raise PeerError(f"peer {peer.short} sent another fingerprint than was asked for")
        try:
            return SignedFingerprint.parse(data)
        except VerificationFailed as error:
            raise PeerError(f"peer {peer.short} advertises something that is {error.why}") from error

    async def _answer(self, peer: PeerId, payload: bytes) -> bytes:
        try:
            digest = Digest(payload.decode("ascii"))
        except (ValueError, UnicodeDecodeError) as error:
            raise Refused(Reason.MALFORMED, "a digest is asked for") from error
        expert = _with(self._shelf.experts(), digest)
        if expert is None:
            raise Refused(Reason.UNKNOWN_MODEL)
        with (expert.folder / FINGERPRINT).open("rb") as file:
            return file.read(MAX_SIGNED)


def _with(experts: Iterable[Expert], digest: Digest) -> Expert | None:
    return next((expert for expert in experts if expert.fingerprint == digest), None)
