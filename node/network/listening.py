"""Where a node listens, as texts: wildcards made concrete, and ports that somebody else has."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence

from node.errors import LocalError

_WILDCARDS = ((4, "/ip4/0.0.0.0/"), (6, "/ip6/::/"))
_NOT_DIALABLE = ("127.", "169.254.", "::1", "fe80:")
_LOOPBACK = {4: "127.0.0.1", 6: "::1"}
_FAMILY = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}


def concrete(addresses: Iterable[str], interfaces: Callable[[int], Sequence[str]]) -> list[str]:
    """Replace wildcards by the addresses that `interfaces(4 or 6)` returns, keeping order, without repeats.

    Loopback stands in only where there is nothing else; link-local addresses are left out, since dialling
    them needs a zone that nobody else knows.
    """
    found: list[str] = []
    for address in addresses:
        for version, wildcard in _WILDCARDS:
            if address.startswith(wildcard):
                hosts = [host for host in interfaces(version) if not host.lower().startswith(_NOT_DIALABLE)]
                rest = address[len(wildcard) :]
                found += [f"/ip{version}/{host}/{rest}" for host in hosts or [_LOOPBACK[version]]]
                break
        else:
            found.append(address)
    return list(dict.fromkeys(found))


def check_free(address: str) -> None:
    """Raise LocalError when somebody listens at a TCP multiaddr, or nobody on this machine can.

    libp2p opens its sockets with SO_REUSEPORT and would share the port without a word.
    """
    kind, host, _, port = address.split("/")[1:5]
    if kind not in _FAMILY:
        raise LocalError(f"cannot listen on a name: {address}", hint="write an IP address")
    with socket.socket(_FAMILY[kind], socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise LocalError(
                f"cannot listen on {address}: {error.strerror}",
                hint=f"see who uses it: ss -ltnp 'sport = :{port}'; or listen elsewhere: weft up --help",
            ) from error
