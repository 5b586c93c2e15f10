"""A fault: a peer was found to have sworn to a fingerprint that the weights do not have.

It holds what the author signed, and the digest of the structure that the finder computed from the weights of
that very ModelId; the record around it is signed by the finder. So it is one word against another, and
anybody who has the weights can settle it: the structure is exact to the bit on every machine
(`weft get ID` does). Until then a node shows it and names who says so, and believes neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from merge_core.digest import Digest
from node.domain import text
from node.domain.ids import PeerId
from node.errors import VerificationFailed
from node.provenance.fingerprint import SignedFingerprint, Sworn
from node.records.book import Judgement, Kind, Record, RecordBook


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`found` is the digest of the structure of the weights, which is not what was sworn to."""

    sworn: Sworn
    found: Digest

    def to_json(self) -> dict[str, Any]:
        """The body of a record."""
        return {"sworn": self.sworn.to_json(), "found": self.found}

    @classmethod
    def from_json(cls, value: Any) -> Fault:
        """Read what may come from anybody; raises ValueError."""
        text.fields(value, {"sworn", "found"})
        try:
            sworn = Sworn.from_json(value["sworn"])
        except VerificationFailed as error:
            raise ValueError(error.why) from error
        found = Digest(value["found"])
        if found == sworn.structure:
            raise ValueError("what was found is what was sworn to: no fault")
        return cls(sworn=sworn, found=found)


FAULTS: Kind[Fault] = Kind(name="faults", read=Fault.from_json, of_one=64, of_all=2048)


def between(signed: SignedFingerprint, found: Digest) -> Fault | None:
    """The fault of a fingerprint whose weights have the structure `found`; None where it told the truth."""
    return None if found == signed.sworn.structure else Fault(sworn=signed.sworn, found=found)


class Standing(StrEnum):
    """What this node makes of what is said about a fingerprint."""

    FOUND = "found"
    """It has had the weights and found so itself."""
    REFUTED = "refuted"
    """It has had the weights, and the fingerprint is theirs: who said otherwise was wrong."""
    SAID = "said"
    """It has only heard so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accusation:
    """One fingerprint that is said to be false, and by which peers."""

    sworn: Sworn
    finders: tuple[PeerId, ...]
    standing: Standing


def accusations(book: RecordBook[Fault]) -> tuple[Accusation, ...]:
    """Everything that is said about fingerprints, each once, ordered by their digests."""
    judged = book.judged()
    by_fingerprint: dict[Digest, list[Record[Fault]]] = {}
    for record in book.records():
        by_fingerprint.setdefault(record.value.sworn.fingerprint, []).append(record)
    return tuple(
        Accusation(
            sworn=records[0].value.sworn,
            finders=tuple(sorted({record.author for record in records})),
            standing=_standing({judged.get(record.digest) for record in records}),
        )
        for _, records in sorted(by_fingerprint.items())
    )


def _standing(found: set[Judgement | None]) -> Standing:
    if Judgement.HOLDS in found:
        return Standing.FOUND
    return Standing.REFUTED if Judgement.REFUTED in found else Standing.SAID
