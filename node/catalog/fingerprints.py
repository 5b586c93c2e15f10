"""Fingerprints and minis by digest over the network: how alike models are, before any agreement.

An advert names the digests, so whoever answers is as good as any: the holder, or somebody who asked before.
Minis come in batches, a fingerprint in pieces, since a message has at most 64 KiB. `on_bytes` is told of
every byte that such a question and its answer take.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from merge_core.digest import Digest, sha256
from merge_core.simmerge.mini import MAX_MINI
from node.catalog.expert import FINGERPRINT, SKETCH, Expert
from node.catalog.fingerprint_cache import FingerprintCache
from node.catalog.shelf import Shelf
from node.domain import sketches
from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import PeerError, Refused, VerificationFailed
from node.network.base import Network
from node.provenance.fingerprint import MAX_SIGNED, SignedFingerprint

SKETCHES = "/weft/sketches/2"
WHOLE = "/weft/fingerprint/2"
DEADLINE = 15.0
"""Seconds that a peer has for one answer."""

OnBytes = Callable[[int], None]


class Known:
    """Every signed fingerprint and mini on this machine: of the shelf's experts, and in the cache."""

    def __init__(self, shelf: Shelf, cache: FingerprintCache) -> None:
        self._shelf = shelf
        self.cache = cache

    def fingerprint(self, digest: Digest) -> bytes | None:
        """The signed fingerprint of this digest."""
        own = _file(self._shelf.experts(), digest, FINGERPRINT, lambda expert: expert.fingerprint)
        return own or self.cache.get(digest, limit=MAX_SIGNED)

    def sketches(self, digests: Sequence[Digest]) -> list[bytes | None]:
        """The mini of each digest, None where it is not here."""
        here = self._shelf.experts()
        return [
            _file(here, digest, SKETCH, lambda expert: expert.sketch)
            or self.cache.get(digest, limit=MAX_MINI)
            for digest in digests
        ]


class Fingerprints:
    """Answers peers from what is known here, and asks them for what is not."""

    def __init__(self, network: Network, known: Known) -> None:
        self._network = network
        self.known = known

    def start(self) -> None:
        """Begin to answer."""
        self._network.handle(SKETCHES, self._answer_sketches)
        self._network.handle(WHOLE, self._answer_whole)

    def connected(self, peer: PeerId) -> bool:
        """Whether a peer can be asked without dialling it."""
        return any(info.peer == peer for info in self._network.peers())

    async def fetch(
        self,
        peer: PeerId,
        digest: Digest,
        *,
        deadline: float = DEADLINE,
        on_bytes: OnBytes = lambda count: None,
    ) -> bytes:
        """Ask a connected peer for a signed fingerprint, piece by piece, and keep it.

        Raises PeerError when its answer is another one or none at all, Refused when it holds none such.
        """
        data = b""
        total = 1
        while len(data) < total:
            request = sketches.ask_piece(digest, len(data))
            reply = await self._network.request(peer, WHOLE, request, deadline=deadline)
            on_bytes(len(request) + len(reply))
            try:
                total, piece = sketches.read_piece(reply, MAX_SIGNED)
            except ValueError as error:
                raise PeerError(f"peer {peer.short} sent {error}") from error
            data += piece
            if len(data) > total:
                raise PeerError(f"peer {peer.short} sent more than it said it would")
        check(data, digest, peer)
        self.known.cache.put(data)
        return data

    async def fetch_sketches(
        self,
        peer: PeerId,
        digests: Sequence[Digest],
        *,
        deadline: float = DEADLINE,
        on_bytes: OnBytes = lambda count: None,
    ) -> Mapping[Digest, bytes]:
        """Ask a connected peer for minis, in batches, and keep them; those that it lacks are left out.

        Raises PeerError where one is another than was asked for.
        """
        found: dict[Digest, bytes] = {}
        for at in range(0, len(digests), sketches.BATCH):
            batch = digests[at : at + sketches.BATCH]
            request = sketches.ask_sketches(batch)
            reply = await self._network.request(peer, SKETCHES, request, deadline=deadline)
            on_bytes(len(request) + len(reply))
            try:
                found.update(sketches.unpack(reply, batch))
            except ValueError as error:
                raise PeerError(f"peer {peer.short} sent {error}") from error
        for mini in found.values():
            self.known.cache.put(mini)
        return found

    async def _answer_sketches(self, peer: PeerId, payload: bytes) -> bytes:
        try:
            digests = sketches.asked_sketches(payload)
        except (ValueError, TypeError, RecursionError) as error:
            raise Refused(Reason.MALFORMED, "digests are asked for") from error
        return sketches.pack(await asyncio.to_thread(self.known.sketches, digests))

    async def _answer_whole(self, peer: PeerId, payload: bytes) -> bytes:
        try:
            digest, offset = sketches.asked_piece(payload)
        except (ValueError, TypeError, RecursionError) as error:
            raise Refused(Reason.MALFORMED, "a digest and an offset are asked for") from error
        whole = await asyncio.to_thread(self.known.fingerprint, digest)
        if whole is None:
            raise Refused(Reason.UNKNOWN_MODEL)
        try:
            return sketches.piece(whole, offset)
        except ValueError as error:
            raise Refused(Reason.MALFORMED, str(error)) from error


def check(data: bytes, digest: Digest, peer: PeerId) -> SignedFingerprint:
    """The fingerprint in what a peer sent; raises PeerError unless it is the one of this digest."""
    if sha256(data) != digest:
        raise PeerError(f"peer {peer.short} sent another fingerprint than its advert names")
    try:
        return SignedFingerprint.parse(data)
    except VerificationFailed as error:
        raise PeerError(f"peer {peer.short} advertises something that is {error.why}") from error


def _file(
    experts: Iterable[Expert], digest: Digest, name: str, of: Callable[[Expert], Digest]
) -> bytes | None:
    """A record of the one expert whose digest this is."""
    found = next((expert for expert in experts if of(expert) == digest), None)
    if found is None:
        return None
    with (found.folder / name).open("rb") as file:
        return file.read(MAX_SIGNED)
