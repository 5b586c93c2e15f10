"""Adverts: a peer's signed, expiring statement of the experts it holds, and what proves that it lied.

An advert names its peer, carries a sequence number and the digest of the advert before it. What does not
fit into one envelope is spread over `parts` adverts with consecutive sequence numbers; together they are
one announcement, and the newest announcement of a peer is all that it says.

Two adverts of one peer contradict each other when they share a sequence number but not their bytes, or
when one directly follows the other and names another predecessor. Both are signed, so the pair is a proof
that anybody can check.

The bytes are canonical JSON: `Advert.parse(a.to_bytes()) == a`. Times are whole seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from merge_core.digest import Digest, ModelId, canonical, check_version, parse_canonical, sha256
from node.domain import text
from node.domain.ids import PeerId
from node.domain.negotiation import Purpose

PAYLOAD_TYPE = "application/vnd.weft.advert+json"
VERSION = 2
MAX_ENVELOPE = (32 << 10) - 256
"""Bytes of one signed advert on the wire: two of them, as a proof, fit into one message."""
MAX_PAYLOAD = 23_000
"""Bytes of the statement itself: base64 and the signature make an envelope of it."""
MAX_LIFETIME = 24 * 3600
MAX_PARTS = 64
MAX_CLOCK_SKEW = 300
MAX_ADDRESSES = 8
"""Multiaddrs of at most 400 characters each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvertisedModel:
    """One expert that a peer holds: what it is called, who published it, and what it may be used for.

    `licence` is an SPDX expression or NOASSERTION; `size` bytes of all tensors; `publisher` a key id.
    `fingerprint` is the digest of the signed whole, `sketch` that of its mini.
    """

    model_id: ModelId
    name: str
    licence: str
    architecture: str
    base: ModelId | None
    size: int
    fingerprint: Digest
    sketch: Digest
    publisher: Digest
    purposes: tuple[Purpose, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON object inside an advert."""
        return {
            "modelId": self.model_id,
            "name": self.name,
            "licence": self.licence,
            "architecture": self.architecture,
            "base": self.base,
            "size": self.size,
            "fingerprint": self.fingerprint,
            "sketch": self.sketch,
            "publisher": self.publisher,
            "purposes": list(self.purposes),
        }

    @classmethod
    def from_json(cls, value: Any) -> AdvertisedModel:
        """Read one model; raises ValueError."""
        text.fields(value, _MODEL_KEYS)
        purposes = text.items(value["purposes"], len(Purpose), "purposes", Purpose)
        text.ascending(list(purposes), "purposes")
        return cls(
            model_id=ModelId(value["modelId"]),
            name=text.text(value["name"], 96, "a model's name", empty=False),
            licence=text.matching(value["licence"], text.LICENCE, "licence"),
            architecture=text.text(value["architecture"], 128, "an architecture"),
            base=None if value["base"] is None else ModelId(value["base"]),
            size=text.integer(value["size"], "size"),
            fingerprint=Digest(value["fingerprint"]),
            sketch=Digest(value["sketch"]),
            publisher=Digest(value["publisher"]),
            purposes=purposes,
        )


@dataclass(frozen=True, kw_only=True)
class Advert:
    """What one peer holds in one network, and where it listens (complete multiaddrs).

    `previous` is the digest of the advert it published before.
    """

    network: str
    peer: PeerId
    seq: int
    issued_at: int
    expires_at: int
    previous: Digest | None
    models: tuple[AdvertisedModel, ...]
    addresses: tuple[str, ...] = ()
    part: int = 0
    parts: int = 1

    @property
    def first_seq(self) -> int:
        """The sequence number with which this announcement begins."""
        return self.seq - self.part

    @cached_property
    def digest(self) -> Digest:
        """The digest of the canonical bytes: what the next advert names as its predecessor."""
        return sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The canonical bytes that the host key signs."""
        return canonical(
            {
                "version": VERSION,
                "network": self.network,
                "peerId": self.peer,
                "seq": self.seq,
                "issuedAt": self.issued_at,
                "expiresAt": self.expires_at,
                "prevAdvertSha256": self.previous,
                "part": self.part,
                "parts": self.parts,
                "addresses": list(self.addresses),
                "models": [model.to_json() for model in self.models],
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Advert:
        """Read an advert that may come from anybody; raises ValueError on whatever is not exact."""
        if len(data) > MAX_PAYLOAD:
            raise ValueError(f"an advert of {len(data)} bytes; at most {MAX_PAYLOAD} are read")
        try:
            return cls._from_json(text.fields(parse_canonical(data), _ADVERT_KEYS))
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not an advert: {error}") from error

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> Advert:
        check_version(value["version"], VERSION, "advert")
        issued = text.integer(value["issuedAt"], "issuedAt")
        parts = text.integer(value["parts"], "parts", low=1, high=MAX_PARTS)
        part = text.integer(value["part"], "part", high=parts - 1)
        models = text.items(value["models"], MAX_PAYLOAD, "models", AdvertisedModel.from_json)
        text.ascending([(m.model_id, m.publisher) for m in models], "models")
        previous = value["prevAdvertSha256"]
        return cls(
            network=text.matching(value["network"], text.NETWORK, "network name"),
            peer=PeerId(value["peerId"]),
            seq=text.integer(value["seq"], "seq", low=1 + part),
            issued_at=issued,
            expires_at=text.integer(
                value["expiresAt"], "expiresAt", low=issued + 1, high=issued + MAX_LIFETIME
            ),
            previous=None if previous is None else Digest(previous),
            models=models,
            addresses=text.items(
                value["addresses"], MAX_ADDRESSES, "addresses", lambda a: text.text(a, 400, "an address")
            ),
            part=part,
            parts=parts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The end of a peer's chain: the number and digest of its last advert."""

    seq: int
    digest: Digest


def announcement(
    models: Iterable[AdvertisedModel],
    *,
    network: str,
    peer: PeerId,
    last: Link | None,
    now: float,
    addresses: Sequence[str] = (),
    lifetime: int = MAX_LIFETIME,
) -> tuple[Advert, ...]:
    """Say what `peer` holds and where it listens in as few adverts as it takes, chained to `last`.

    The sequence starts at the clock when that is ahead, so that a node restored from a backup is neither
    taken for a replay nor contradicts what it said before. Raises ValueError beyond MAX_PARTS parts.
    """
    pages = _pages(sorted(models, key=lambda m: (m.model_id, m.publisher)))
    if len(pages) > MAX_PARTS:
        raise ValueError(f"{len(pages)} parts of an announcement; at most {MAX_PARTS} are read")
    issued = int(now)
    seq = max(issued, 1, last.seq + 1 if last else 1)
    previous = last.digest if last else None
    adverts: list[Advert] = []
    for part, page in enumerate(pages):
        advert = Advert(
            network=network,
            peer=peer,
            seq=seq + part,
            issued_at=issued,
            expires_at=issued + lifetime,
            previous=previous,
            models=page,
            addresses=tuple(addresses)[:MAX_ADDRESSES],
            part=part,
            parts=len(pages),
        )
        previous = advert.digest
        adverts.append(advert)
    return tuple(adverts)


def contradict(one: Advert, other: Advert) -> bool:
    """Whether two adverts, both signed by their peer, prove that it told different stories."""
    if one.peer != other.peer or one.network != other.network or one.digest == other.digest:
        return False
    first, second = sorted((one, other), key=lambda advert: advert.seq)
    if first.seq == second.seq:
        return True
    return second.seq == first.seq + 1 and second.previous != first.digest


def _pages(models: list[AdvertisedModel]) -> list[tuple[AdvertisedModel, ...]]:
    budget = MAX_PAYLOAD - 1024 - MAX_ADDRESSES * 400
    pages: list[list[AdvertisedModel]] = [[]]
    used = 0
    for model in models:
        size = len(canonical(model.to_json())) + 1
        if pages[-1] and used + size > budget:
            pages.append([])
            used = 0
        pages[-1].append(model)
        used += size
    return [tuple(page) for page in pages]


_MODEL_KEYS = {
    "modelId",
    "name",
    "licence",
    "architecture",
    "base",
    "size",
    "fingerprint",
    "sketch",
    "publisher",
    "purposes",
}
_ADVERT_KEYS = {
    "version",
    "network",
    "peerId",
    "seq",
    "issuedAt",
    "expiresAt",
    "prevAdvertSha256",
    "part",
    "parts",
    "addresses",
    "models",
}
