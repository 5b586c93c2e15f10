"""One peer's Peer service from the other side: what node.exchange calls a Holder.

The connection is pinned: the only certificate that its TLS accepts is the one that the peer handed over on
the authenticated libp2p stream. What arrives is unchecked; whoever asked for it checks it.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from merge_core.checkpoint.merkle import LEAF_SIZE
from node.domain.holding import ByteRange, Holding, ModelRef
from node.domain.ids import PeerId
from node.errors import PeerError
from node.identity.certificates import TARGET_NAME, TlsCertificate
from node.peer.status import error_of
from node.peer.transport import OPTIONS, SERVICE
from node.wire import peer as wire
from node.wire.v1 import peer_pb2 as pb

LANES = 4
"""Connections to one peer: on a long path one carries 185 MB/s and four 405 (measured)."""
DESCRIBE_DEADLINE = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a peer's data port answers, and the certificate it has to show (PEM)."""

    peer: PeerId
    hosts: tuple[str, ...]
    port: int
    certificate: bytes


class PeerClient:
    """A peer that may hold models; `close` it when done. Calls raise Refused, PeerError or Unreachable."""

    def __init__(self, endpoint: Endpoint, own: TlsCertificate, *, lanes: int = LANES) -> None:
        self.peer = endpoint.peer
        self.lanes = lanes
        credentials = grpc.ssl_channel_credentials(endpoint.certificate, own.key_pem, own.pem)
        options = (
            *OPTIONS,
            ("grpc.ssl_target_name_override", TARGET_NAME),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        )
        self._channels = [
            grpc.aio.secure_channel(target(endpoint), credentials, options=options) for _ in range(lanes)
        ]
        self._turn = itertools.cycle(self._channels)

    async def close(self) -> None:
        """Close the connections; calls that run are cancelled."""
        for channel in self._channels:
            await channel.close()

    async def describe(self, ref: ModelRef) -> Holding:
        """Ask which files the peer has of a model."""
        call = self._channels[0].unary_unary(
            f"/{SERVICE}/Describe",
            request_serializer=pb.DescribeRequest.SerializeToString,
            response_deserializer=pb.DescribeResponse.FromString,
        )
        try:
            answer = await call(pb.DescribeRequest(model=wire.model_ref(ref)), timeout=DESCRIBE_DEADLINE)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return wire.parse_holding(answer)

    def manifest(self, ref: ModelRef) -> AsyncGenerator[bytes, None]:
        """Stream the canonical manifest."""
        return self._stream("ReadManifest", pb.ReadManifestRequest(model=wire.model_ref(ref)))

    def leaf_table(self, ref: ModelRef) -> AsyncGenerator[bytes, None]:
        """Stream the leaf table."""
        return self._stream("ReadLeafTable", pb.ReadLeafTableRequest(model=wire.model_ref(ref)))

    def fingerprint(self, ref: ModelRef) -> AsyncGenerator[bytes, None]:
        """Stream the fingerprint."""
        return self._stream("ReadFingerprint", pb.ReadFingerprintRequest(model=wire.model_ref(ref)))

    def file(self, ref: ModelRef, path: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Stream bytes [offset, offset + length) of a file."""
        return self._stream("ReadFile", wire.read_file_request(ref, path, offset, length))

    def leaves(self, ref: ModelRef, ranges: Sequence[ByteRange]) -> AsyncGenerator[bytes, None]:
        """Stream ranges of tensors, one message for each leaf that they touch."""
        return self._stream("ReadLeaves", wire.read_leaves_request(ref, ranges))

    async def _stream(self, method: str, request: Any) -> AsyncGenerator[bytes, None]:
        serialize: Callable[[Any], bytes] = type(request).SerializeToString
        call = next(self._turn).unary_stream(f"/{SERVICE}/{method}", request_serializer=serialize)(request)
        try:
            while (piece := await call.read()) is not grpc.aio.EOF:
                if not piece or len(piece) > LEAF_SIZE:
                    raise PeerError(f"a piece of {len(piece)} bytes; pieces have 1 byte to 1 MiB")
                yield piece
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()


def target(endpoint: Endpoint) -> str:
    """The name under which gRPC dials: all addresses of one family, tried in order."""
    for scheme, wanted in (("ipv4", _is_ipv4), ("ipv6", _is_ipv6)):
        hosts = [host for host in endpoint.hosts if wanted(host)]
        if hosts:
            bracket = "[{}]:{}" if scheme == "ipv6" else "{}:{}"
            return f"{scheme}:" + ",".join(bracket.format(host, endpoint.port) for host in hosts)
    return f"dns:{endpoint.hosts[0]}:{endpoint.port}"


def _is_ipv6(host: str) -> bool:
    return ":" in host


def _is_ipv4(host: str) -> bool:
    return host.replace(".", "").isdigit()
