"""Why an offer is refused: the same numbers as `weft.v1.Reason` on the wire, a sentence for each."""

from __future__ import annotations

from enum import IntEnum


class Reason(IntEnum):
    """A refusal that programs can act on; `sentence` is for the human."""

    UNSPECIFIED = 0
    UNKNOWN_MODEL = 1
    LICENCE_NOT_GRANTED = 2
    PURPOSE_NOT_ALLOWED = 3
    PEER_NOT_ALLOWED = 4
    QUOTA_EXCEEDED = 5
    NOT_ENTITLED = 6
    EXPIRED = 7
    MALFORMED = 8
    BUSY = 9
    WRONG_NETWORK = 10

    @property
    def sentence(self) -> str:
        """What a stranger understands."""
        return _SENTENCES[self]


_SENTENCES = {
    Reason.UNSPECIFIED: "The peer gave no reason.",
    Reason.UNKNOWN_MODEL: "The peer does not hold this model, or no longer shares it.",
    Reason.LICENCE_NOT_GRANTED: "The peer's policy does not grant the licence of this model to others.",
    Reason.PURPOSE_NOT_ALLOWED: "The peer does not serve this model for that purpose.",
    Reason.PEER_NOT_ALLOWED: "The peer does not serve this node.",
    Reason.QUOTA_EXCEEDED: "The peer's quota of bytes for this node is used up for today.",
    Reason.NOT_ENTITLED: "No live agreement entitles this node to these bytes.",
    Reason.EXPIRED: "The message or agreement has expired.",
    Reason.MALFORMED: "The peer could not read the message.",
    Reason.BUSY: "The peer is busy; try again later.",
    Reason.WRONG_NETWORK: "The peer belongs to another network.",
}
