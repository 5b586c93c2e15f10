"""PeerId: the name of a peer, which is its Ed25519 host key in libp2p's base58 spelling."""

from __future__ import annotations

import re

_ED25519_PEER_ID = re.compile(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}")


class PeerId(str):
    """An Ed25519 libp2p peer id (`12D3KooW…`); raises ValueError on any other text."""

    __slots__ = ()

    def __new__(cls, text: str) -> PeerId:
        if not _ED25519_PEER_ID.fullmatch(text):
            raise ValueError(f"not an Ed25519 peer id: {text[:80]!r}")
        return super().__new__(cls, text)

    @property
    def short(self) -> str:
        """The last six characters: enough for a human, never for a decision."""
        return self[-6:]
