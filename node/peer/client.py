"""One peer's Peer service from the other side: what node.exchange calls a Holder.

The connection is pinned: the only certificate that its TLS accepts is the one that the peer handed over on
the authenticated libp2p stream. Where a call cannot get through, or is refused because the peer has forgotten
us, certificates are exchanged again and the call is made once more, unless it has brought something already.
What arrives is unchecked; whoever asked for it checks it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from merge_core.checkpoint.merkle import LEAF_SIZE
from merge_core.digest import Digest
from node.domain.holding import ByteRange, Holding, ModelRef
from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import PeerError, Refused, Unreachable, WeftError
from node.identity.certificates import TARGET_NAME, TlsCertificate
from node.peer.status import error_of
from node.peer.transport import OPTIONS, SERVICE, SIMILARITY
from node.wire import peer as wire
from node.wire import similarity
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
    """A peer that may hold models; `close` it when done. Calls raise Refused, PeerError or Unreachable.

    `renew` exchanges certificates with the peer once more; without it what does not work stays so.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        own: TlsCertificate,
        *,
        lanes: int = LANES,
        renew: Callable[[], Awaitable[Endpoint]] | None = None,
    ) -> None:
        self.peer = endpoint.peer
        self.lanes = lanes
        self._own = own
        self._renew = renew
        self._endpoint = endpoint
        self._channels = self._open(endpoint)
        self._turn = itertools.count()
        self._running = 0
        self._stale = False
        self._renewing = asyncio.Lock()

    @property
    def busy(self) -> bool:
        """Whether a call runs."""
        return self._running > 0

    async def ready(self) -> None:
        """Exchange certificates again if a call did not get through; raises as that does.

        Connections are made anew only to another port or certificate.
        """
        async with self._renewing:
            if not self._stale or self._renew is None:
                return
            endpoint = await self._renew()
            if not self._channels or _differ(endpoint, self._endpoint):
                old, self._channels = self._channels, self._open(endpoint)
                self._endpoint = endpoint
                await _close(old)
            self._stale = False

    async def close(self) -> None:
        """Close the connections; calls that run become Unreachable."""
        old, self._channels, self._stale = self._channels, [], True
        await _close(old)

    async def describe(self, ref: ModelRef) -> Holding:
        """Ask which files the peer has of a model."""
        await self.ready()
        try:
            return await self._describe(ref)
        except (Refused, Unreachable):
            if not self._renewable:
                raise
        await self.ready()
        return await self._describe(ref)

    def manifest(self, ref: ModelRef) -> AsyncGenerator[bytes, None]:
        """Stream the canonical manifest."""
        return self._stream("ReadManifest", pb.ReadManifestRequest(model=wire.model_ref(ref)))

    def leaf_table(self, ref: ModelRef) -> AsyncGenerator[bytes, None]:
        """Stream the leaf table."""
        return self._stream("ReadLeafTable", pb.ReadLeafTableRequest(model=wire.model_ref(ref)))

    def fingerprint(self, digest: Digest, offset: int = 0) -> AsyncGenerator[bytes, None]:
        """Stream a signed fingerprint from an offset on."""
        request = similarity.read_fingerprint_request(digest, offset)
        return self._stream("ReadFingerprint", request, service=SIMILARITY)

    def sketches(self, digests: Sequence[Digest]) -> AsyncGenerator[bytes, None]:
        """Stream minis in one piece, as `node.domain.sketches` reads it."""
        request = similarity.read_sketches_request(digests)
        return self._stream("ReadSketches", request, service=SIMILARITY)

    def file(self, ref: ModelRef, path: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Stream bytes [offset, offset + length) of a file."""
        return self._stream("ReadFile", wire.read_file_request(ref, path, offset, length))

    def leaves(self, ref: ModelRef, ranges: Sequence[ByteRange]) -> AsyncGenerator[bytes, None]:
        """Stream ranges of tensors, one message for each leaf that they touch."""
        return self._stream("ReadLeaves", wire.read_leaves_request(ref, ranges))

    async def _stream(
        self, method: str, request: Any, *, service: str = SERVICE
    ) -> AsyncGenerator[bytes, None]:
        """Stream an answer; ask once more after renewing, where nothing has come yet."""
        for last in (False, True):
            await self.ready()
            begun = False
            try:
                async with aclosing(self._read(f"/{service}/{method}", request)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
                return
            except (Refused, Unreachable):
                if last or begun or not self._renewable:
                    raise

    async def _read(self, method: str, request: Any) -> AsyncGenerator[bytes, None]:
        serialize: Callable[[Any], bytes] = type(request).SerializeToString
        with self._calling() as channel:
            call = channel.unary_stream(method, request_serializer=serialize)(request)
            try:
                while (piece := await call.read()) is not grpc.aio.EOF:
                    if not piece or len(piece) > LEAF_SIZE:
                        raise PeerError(f"a piece of {len(piece)} bytes; pieces have 1 byte to 1 MiB")
                    yield piece
            finally:
                call.cancel()

    async def _describe(self, ref: ModelRef) -> Holding:
        with self._calling() as channel:
            call = channel.unary_unary(
                f"/{SERVICE}/Describe",
                request_serializer=pb.DescribeRequest.SerializeToString,
                response_deserializer=pb.DescribeResponse.FromString,
            )
            answer = await call(pb.DescribeRequest(model=wire.model_ref(ref)), timeout=DESCRIBE_DEADLINE)
        return wire.parse_holding(answer)

    @contextmanager
    def _calling(self) -> Iterator[grpc.aio.Channel]:
        """The channel whose turn it is, for one call whose errors become ours."""
        try:
            self._running += 1
            if not self._channels:
                raise Unreachable(f"the connection to peer {self.peer.short} was closed")
            yield self._channels[next(self._turn) % len(self._channels)]
        except grpc.aio.AioRpcError as error:
            raise self._failed(error_of(error)) from error
        except Unreachable as error:
            self._failed(error)
            raise
        except asyncio.CancelledError as error:
            # gRPC says so too when the channel is closed under a call: then nobody has cancelled us.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise self._failed(Unreachable(f"the connection to peer {self.peer.short} was closed")) from error
        finally:
            self._running -= 1

    def _failed(self, error: WeftError) -> WeftError:
        """Remember whether an error is of the kind that new certificates may mend."""
        forgotten = isinstance(error, Refused) and error.reason is Reason.PEER_NOT_ALLOWED
        self._stale = self._stale or forgotten or isinstance(error, Unreachable)
        return error

    @property
    def _renewable(self) -> bool:
        return self._stale and self._renew is not None

    def _open(self, endpoint: Endpoint) -> list[grpc.aio.Channel]:
        credentials = grpc.ssl_channel_credentials(endpoint.certificate, self._own.key_pem, self._own.pem)
        options = (
            *OPTIONS,
            ("grpc.ssl_target_name_override", TARGET_NAME),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        )
        return [
            grpc.aio.secure_channel(target(endpoint), credentials, options=options) for _ in range(self.lanes)
        ]


def _differ(one: Endpoint, other: Endpoint) -> bool:
    """Whether two endpoints need different connections."""
    return (one.certificate, target(one)) != (other.certificate, target(other))


async def _close(channels: Sequence[grpc.aio.Channel]) -> None:
    for channel in channels:
        await channel.close()


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
