"""How two nodes hand each other their certificates: one request over the authenticated libp2p stream.

The stream proves who is at the other end. A certificate is admitted only when it names that same peer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from merge_core.digest import canonical, parse_canonical
from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import PeerError, Refused, Unreachable
from node.identity.certificates import TlsCertificate, read_certificate
from node.network.base import Network
from node.peer.admitted import Admitted
from node.peer.client import Endpoint

PROTOCOL = "/weft/credentials/1"
MAX_CREDENTIALS = 32 << 10
DEADLINE = 10.0


class CredentialExchange:
    """Gives our certificate for a peer's; admits each that proves to be its sender's."""

    def __init__(
        self,
        *,
        network: Network,
        admitted: Admitted,
        certificate: TlsCertificate,
        port: int,
        clock: Callable[[], float],
    ) -> None:
        self._network = network
        self._admitted = admitted
        self._own = encode(certificate.pem, port)
        self._clock = clock

    async def answer(self, peer: PeerId, payload: bytes) -> bytes:
        """Take a peer's certificate and answer with ours: the handler of PROTOCOL; raises Refused."""
        try:
            certificate, _ = self._check(peer, payload)
        except PeerError as error:
            raise Refused(Reason.MALFORMED, error.why) from error
        self._admitted.admit(peer, certificate)
        return self._own

    async def ask(self, peer: PeerId, *, deadline: float = DEADLINE) -> Endpoint:
        """Exchange certificates with a connected peer and say where its data port is.

        Raises Refused, Unreachable or PeerError.
        """
        reply = await self._network.request(peer, PROTOCOL, self._own, deadline=deadline)
        certificate, port = self._check(peer, reply)
        with suppress(Refused):  # whom we do not serve may serve us all the same
            self._admitted.admit(peer, certificate)
        hosts = self._hosts(peer)
        if not hosts:
            raise Unreachable(f"peer {peer.short} has no address any more", hint="weft peers")
        return Endpoint(peer=peer, hosts=hosts, port=port, certificate=certificate)

    def _check(self, peer: PeerId, payload: bytes) -> tuple[bytes, int]:
        pem, port = parse(payload)
        certificate = read_certificate(pem, self._clock())
        if certificate.peer != peer:
            raise PeerError(f"peer {peer.short} shows the certificate of {certificate.peer.short}")
        return certificate.pem, port

    def _hosts(self, peer: PeerId) -> tuple[str, ...]:
        known = (info.addresses for info in self._network.peers() if info.peer == peer)
        parts = [address.split("/") for addresses in known for address in addresses]
        return tuple(dict.fromkeys(part[2] for part in parts if len(part) > 2 and part[1] != "p2p"))


def encode(certificate: bytes, port: int) -> bytes:
    """Write a certificate (PEM) and the port of the data plane."""
    return canonical({"version": 1, "certificate": certificate.decode("ascii"), "port": port})


def parse(data: bytes) -> tuple[bytes, int]:
    """Read a certificate and a port that may come from anybody; raises PeerError."""
    try:
        if len(data) > MAX_CREDENTIALS:
            raise ValueError(f"{len(data)} bytes")
        value: Any = parse_canonical(data)
        if set(value) != {"version", "certificate", "port"} or value["version"] != 1:
            raise ValueError("expected version 1 with certificate and port")
        if type(value["port"]) is not int or not 0 < value["port"] < 65536:
            raise ValueError("not a port")
        return value["certificate"].encode("ascii"), value["port"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PeerError(f"the peer's credentials are malformed: {error}") from error
