"""What the library's errors mean to us; it has few types, so their texts are read."""

from __future__ import annotations

from multiaddr import Multiaddr

from node.domain.ids import PeerId
from node.errors import PeerError, Unreachable


def dial_error(peer: PeerId, transport: Multiaddr, error: Exception) -> PeerError | Unreachable:
    """Say why a peer could not be dialled."""
    text = chain_text(error)
    if "mismatch" in text.lower():
        return PeerError(
            f"the node at {transport} is not {peer}", hint="ask for its present address: weft invite"
        )
    if "connections limit" in text:
        return Unreachable("no connection is free", hint="try again later")
    return Unreachable(f"cannot reach {transport}", hint="check that the other node is up: weft status")


def stream_error(peer: PeerId, protocol: str, error: Exception) -> PeerError | Unreachable:
    """Say why a stream to a connected peer failed."""
    if "protocols not supported" in chain_text(error):
        return PeerError(f"peer {peer.short} does not speak {protocol}")
    return Unreachable(f"peer {peer.short} closed the connection")


def chain_text(error: BaseException | None) -> str:
    """The texts and types of an error and of all its causes."""
    parts: list[str] = []
    while error is not None and len(parts) < 10:
        parts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "; ".join(parts)


def sole(error: BaseException) -> BaseException:
    """The one error inside nested groups of one, else the group."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
