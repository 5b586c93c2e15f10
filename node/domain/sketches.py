"""How minis and fingerprints travel, over libp2p as over gRPC: asked for by digest, checked against it.

Minis: two bytes of length each, most significant first, in the order in which they were asked for; a length
of 0 stands for one that the peer does not have. A fingerprint: four bytes of its length, then a piece of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge_core.digest import Digest, canonical, parse_canonical, sha256
from merge_core.simmerge.mini import MAX_MINI
from node.domain import text

BATCH = 60
"""Minis in one message of 64 KiB."""
MAX_BATCH = 1000
"""Minis in one answer of 1 MiB."""
PIECE = 60 << 10
"""Bytes of a fingerprint in one message."""
_COUNT, _LENGTH = 2, 4


def ask_sketches(digests: Sequence[Digest]) -> bytes:
    """A request for at most BATCH minis."""
    return canonical({"digests": list(digests)})


def asked_sketches(payload: bytes) -> tuple[Digest, ...]:
    """Read such a request; raises ValueError."""
    value = text.fields(parse_canonical(payload), {"digests"})
    return text.items(value["digests"], BATCH, "digests", Digest)


def pack(minis: Sequence[bytes | None]) -> bytes:
    """The answer: every mini, or None for one that is not here."""
    return b"".join(len(mini or b"").to_bytes(_COUNT, "big") + (mini or b"") for mini in minis)


def unpack(data: bytes, wanted: Sequence[Digest]) -> Mapping[Digest, bytes]:
    """The minis in an answer, those left out that the peer lacks; raises ValueError where one is another."""
    found: dict[Digest, bytes] = {}
    at = 0
    for digest in wanted:
        size = int.from_bytes(data[at : at + _COUNT], "big")
        mini = data[at + _COUNT : at + _COUNT + size]
        if len(data) < at + _COUNT + size or size > MAX_MINI:
            raise ValueError("an answer that ends too early, or a mini that is too large")
        at += _COUNT + size
        if size:
            if sha256(mini) != digest:
                raise ValueError("another mini than was asked for")
            found[digest] = mini
    if at != len(data):
        raise ValueError("more minis than were asked for")
    return found


def ask_piece(digest: Digest, offset: int) -> bytes:
    """A request for the piece of a fingerprint that begins at `offset`."""
    return canonical({"digest": digest, "offset": offset})


def asked_piece(payload: bytes) -> tuple[Digest, int]:
    """Read such a request; raises ValueError."""
    value = text.fields(parse_canonical(payload), {"digest", "offset"})
    return Digest(value["digest"]), text.integer(value["offset"], "offset")


def piece(whole: bytes, offset: int) -> bytes:
    """The answer; raises ValueError where nothing begins there."""
    if offset >= len(whole):
        raise ValueError("nothing begins there")
    return len(whole).to_bytes(_LENGTH, "big") + whole[offset : offset + PIECE]


def read_piece(data: bytes, limit: int) -> tuple[int, bytes]:
    """The length of the whole and a piece of it, as a peer sent them; raises ValueError."""
    total, rest = int.from_bytes(data[:_LENGTH], "big"), data[_LENGTH:]
    if not rest or not len(rest) <= total <= limit:
        raise ValueError(f"a piece of {len(rest)} bytes of {total}; at most {limit} are read")
    return total, rest
