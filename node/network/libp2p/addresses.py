"""Multiaddrs and peer ids, between the library's types and ours."""

from __future__ import annotations

from collections.abc import Iterable

from libp2p.peer.id import ID
from multiaddr import Multiaddr
from multiaddr.utils import get_network_addrs

from node.domain.ids import PeerId
from node.errors import LocalError
from node.network import listening
from node.network.base import parse_address


def parse_transport(address: str) -> Multiaddr:
    """Parse a TCP multiaddr without a peer id; raises LocalError."""
    try:
        parsed = Multiaddr(address)
        port = int(parsed.value_for_protocol("tcp"))
    except Exception as error:
        raise LocalError(
            f"not a TCP multiaddr: {address[:120]!r}", hint="write it like /ip4/0.0.0.0/tcp/9350"
        ) from error
    if not 0 <= port < 65536:
        raise LocalError(f"no such port: {address[:120]!r}")
    return parsed


def concrete(addresses: Iterable[Multiaddr]) -> list[Multiaddr]:
    """Replace wildcard addresses by those of this machine's interfaces."""
    return [Multiaddr(text) for text in listening.concrete(map(str, addresses), _interfaces)]


def is_address(text: str) -> bool:
    """Whether we could dial it: peers announce what they like."""
    try:
        return bool(parse_address(text))
    except LocalError:
        return False


def peer_id(identity: ID) -> PeerId | None:
    """Our form of a peer id, if it is of a kind that we accept: Ed25519."""
    try:
        return PeerId(str(identity))
    except ValueError:
        return None


def _interfaces(version: int) -> list[str]:
    try:
        return [str(host) for host in get_network_addrs(version)]
    except Exception:
        return []
