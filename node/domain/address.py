"""Address: a complete TCP multiaddr, where a peer listens and who it has to be; `parse(str(a)) == a`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

from node.domain.ids import PeerId

MAX_ADDRESS = 400

_HOST = r"(?:(ip[46])/([0-9a-fA-F:.]{2,45})|dns[46]?/[A-Za-z0-9.-]{1,253})"
_ADDRESS = re.compile(rf"(/{_HOST}/tcp/([0-9]{{1,5}}))/p2p/([A-Za-z0-9]+)")
_VERSIONS: dict[str, Callable[[str], object]] = {"ip4": ipaddress.IPv4Address, "ip6": ipaddress.IPv6Address}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a peer listens (`/ip4/192.0.2.7/tcp/4001`) and who it has to be."""

    transport: str
    peer: PeerId

    def __str__(self) -> str:
        return f"{self.transport}/p2p/{self.peer}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address that may come from anybody; raises ValueError."""
        found = _ADDRESS.fullmatch(text) if len(text) <= MAX_ADDRESS else None
        if found is None or not 0 < int(found[4]) < 65536:
            raise ValueError(f"not a complete TCP multiaddr: {text[:120]!r}")
        if found[2]:
            _VERSIONS[found[2]](found[3])
        return cls(transport=found[1], peer=PeerId(found[5]))
