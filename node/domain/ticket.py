"""Ticket: one line of text with which a node joins a network; `Ticket.parse(str(t)) == t`.

It names the network and the addresses of one peer. It holds no secret: who has it can find the peer, no more.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from merge_core.digest import canonical, parse_canonical
from node.domain import text
from node.domain.address import MAX_ADDRESS, Address
from node.domain.ids import PeerId

_PREFIX = "weft1:"
_MAX_TICKET = 4096
_MAX_ADDRESSES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Where a network can be joined: complete multiaddrs (`…/p2p/PEER`) of one peer, at least one."""

    network: str
    addresses: tuple[str, ...]

    @property
    def peer(self) -> PeerId:
        """The peer that all addresses lead to."""
        return Address.parse(self.addresses[0]).peer

    def __str__(self) -> str:
        data = canonical({"network": self.network, "addresses": list(self.addresses)})
        return _PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")

    @classmethod
    def parse(cls, ticket: str) -> Ticket:
        """Read a ticket that may come from anybody; raises ValueError."""
        ticket = ticket.strip()
        if not ticket.startswith(_PREFIX) or len(ticket) > _MAX_TICKET:
            raise ValueError(f"a ticket begins with {_PREFIX} and has at most {_MAX_TICKET} characters")
        encoded = ticket.removeprefix(_PREFIX)
        try:
            data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
            value = text.fields(parse_canonical(data), {"network", "addresses"})
        except (ValueError, RecursionError, TypeError) as error:
            raise ValueError(f"the ticket is damaged: {error}") from error
        addresses = text.items(value["addresses"], _MAX_ADDRESSES, "addresses", _address)
        if len({address.peer for address in addresses}) != 1:
            raise ValueError("the addresses of a ticket lead to one peer")
        return cls(
            network=text.matching(value["network"], text.NETWORK, "network name"),
            addresses=tuple(map(str, addresses)),
        )


def _address(item: Any) -> Address:
    return Address.parse(text.text(item, MAX_ADDRESS, "an address"))
