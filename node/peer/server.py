"""The Peer service: the bytes of this node's experts, for admitted peers, over mutual TLS.

Rules: the caller is who its certificate says, looked up again on every call, so that a dismissed peer is
refused on the connection it has; weights and files go only where an agreement covers them, everything else
(description, manifest, leaf table, FREE_FILES, all of SimilarityService) to any admitted peer; every write
has a deadline, so that a reader which stops reading costs no more than that; only regular files are served.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from merge_core.checkpoint.merkle import LEAF_SIZE
from merge_core.digest import Digest
from merge_core.errors import MergeCoreError
from merge_core.tokenizer.vocabulary import TOKENIZER_FILES
from node.domain import sketches
from node.domain.holding import ByteRange, HeldFile, Holding, ModelRef
from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import LocalError, Refused
from node.identity.certificates import TlsCertificate
from node.peer.admitted import Admitted
from node.peer.calls import Calls
from node.peer.memory import keep_freed_pieces
from node.peer.ports import Entitlements, HeldModel, Shelf, Similarity
from node.peer.status import abort
from node.peer.transport import SERVER_OPTIONS, SERVICE, SIMILARITY
from node.wire import peer as wire
from node.wire import similarity as similarity_wire
from node.wire.v1 import peer_pb2 as pb
from node.wire.v1 import similarity_pb2 as similarity_pb

FREE_FILES = TOKENIZER_FILES | {"weft.plan.json"}
"""Files that an offer rests on: planning a merge takes those, naming the plan to audit the last."""
_EXPECTED = (Refused, OSError, ValueError, MergeCoreError, LocalError)
"""What may go wrong with a held model; none of it reaches the caller but a Refused."""
Methods = dict[str, tuple[Any, type[Message]]]
REQUEST_DEADLINE = 10.0
"""Seconds that a caller may take from opening a call to having sent its request."""
WRITE_DEADLINE = 60.0
"""Seconds that a caller may take to accept one piece of 1 MiB."""


class ServedFile:
    """A regular file open for reading in threads; closing it waits for the read that runs.

    A descriptor closed under a running read could by then be another file's.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly these bytes; raises OSError when the file is shorter, or closed."""
        with self._lock:
            data = os.pread(self._fd, length, offset) if self._fd >= 0 else b""
        if len(data) != length:
            raise OSError("a published file is shorter than it was")
        return data

    def close(self) -> None:
        """Close, once."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes to read at an offset of an open file."""

    file: ServedFile
    offset: int
    length: int

    def read(self) -> bytes:
        """Read them; raises OSError."""
        return self.file.read(self.offset, self.length)


class PeerServer:
    """A listening Peer service; `start` and `stop` belong to one event loop."""

    def __init__(
        self,
        *,
        shelf: Shelf,
        similarity: Similarity,
        entitlements: Entitlements,
        admitted: Admitted,
        certificate: TlsCertificate,
        calls: Calls | None = None,
        request_deadline: float = REQUEST_DEADLINE,
        write_deadline: float = WRITE_DEADLINE,
    ) -> None:
        self._shelf = shelf
        self._similarity = similarity
        self._entitlements = entitlements
        self._admitted = admitted
        self._certificate = certificate
        self._calls = calls or Calls()
        self._request_deadline = request_deadline
        self._write_deadline = write_deadline
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="peer-read")
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str) -> int:
        """Listen on host:port (0: any free port) and return the port; raises LocalError when it is taken."""
        server = grpc.aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers(self._handlers())
        try:
            port = int(server.add_secure_port(address, self._credentials()))
        except RuntimeError as error:
            raise LocalError(
                f"cannot listen for peers on {address}: the port is in use or not ours",
                hint="set another one: weft up --peer-api HOST:PORT",
            ) from error
        keep_freed_pieces()
        await server.start()
        self._server = server
        return port

    async def stop(self, grace: float = 1.0) -> None:
        """Take no more calls, give those that run `grace` seconds, then close."""
        if self._server is not None:
            await self._server.stop(grace)
            self._server = None
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _credentials(self) -> Any:
        seen: list[tuple[bytes, ...]] = [()]
        own = (self._certificate.key_pem, self._certificate.pem)

        def configuration() -> Any:
            # A root set must not be empty. Our own certificate opens nothing: it is no admitted peer's.
            roots = self._admitted.certificates() or (self._certificate.pem,)
            if roots == seen[0]:
                return None
            seen[0] = roots
            return grpc.ssl_server_certificate_configuration([own], root_certificates=b"".join(roots))

        return grpc.dynamic_ssl_server_credentials(
            configuration(), configuration, require_client_authentication=True
        )

    def _handlers(self) -> tuple[Any, ...]:
        peer: Methods = {
            "Describe": (self._describe, pb.DescribeRequest),
            "ReadManifest": (self._manifest, pb.ReadManifestRequest),
            "ReadLeafTable": (self._leaf_table, pb.ReadLeafTableRequest),
            "ReadFile": (self._file, pb.ReadFileRequest),
            "ReadLeaves": (self._leaves, pb.ReadLeavesRequest),
        }
        similarity: Methods = {
            "ReadSketches": (self._sketches, similarity_pb.ReadSketchesRequest),
            "ReadFingerprint": (self._fingerprint, similarity_pb.ReadFingerprintRequest),
        }
        return tuple(
            grpc.method_handlers_generic_handler(
                service,
                # As streams of requests they look the same on the wire, but begin before a request has come.
                {
                    name: grpc.stream_stream_rpc_method_handler(self._answer(method, message))
                    for name, (method, message) in methods.items()
                },
            )
            for service, methods in ((SERVICE, peer), (SIMILARITY, similarity))
        )

    def _caller(self, context: Any) -> PeerId:
        pem = next(iter(context.auth_context().get("x509_pem_cert", ())), b"")
        peer = self._admitted.peer_of(pem)
        if peer is None:
            raise Refused(Reason.PEER_NOT_ALLOWED, "exchange certificates first")
        return peer

    def _answer(
        self, method: Callable[[PeerId, Any], AsyncGenerator[bytes, None]], message: type[Message]
    ) -> Any:
        """Wrap a stream of bytes: who calls, room for it, deadlines for the caller, what errors become."""

        async def handler(_: Any, context: Any) -> None:
            try:
                peer = self._caller(context)
                self._calls.begin(peer)
                context.add_done_callback(lambda _: self._calls.end(peer))
                # At once: gRPC would send it a second time, and fail, after a first write that was too late.
                await context.send_initial_metadata(())
                request = await self._request(context, message)
                async with aclosing(method(peer, request)) as pieces:
                    async for data in pieces:
                        async with asyncio.timeout(self._write_deadline):
                            await context.write(data)
            except grpc.aio.InternalError:
                return  # the caller went away, as it does when another holder was faster
            except TimeoutError:
                await abort(context, Refused(Reason.BUSY, "the pieces were not accepted in time"))
            except _EXPECTED as error:
                await abort(context, error)

        return handler

    async def _request(self, context: Any, message: type[Message]) -> Message:
        """Read the one message that a caller has to send; raises Refused."""
        try:
            async with asyncio.timeout(self._request_deadline):
                data = await context.read()
        except TimeoutError as error:
            raise Refused(Reason.MALFORMED, "the request did not come in time") from error
        if data is grpc.aio.EOF:
            raise Refused(Reason.MALFORMED, "a call without a request")
        try:
            return message.FromString(data)
        except DecodeError as error:
            raise Refused(Reason.MALFORMED, "not a request") from error

    async def _describe(self, peer: PeerId, request: pb.DescribeRequest) -> AsyncGenerator[bytes, None]:
        held = self._open(wire.parse_model_ref(request.model))
        files = tuple(HeldFile(path=path, size=size) for path, size in sorted(held.files.items()))
        yield wire.holding(Holding(publisher=Digest(held.publisher), files=files)).SerializeToString()

    async def _manifest(self, peer: PeerId, request: pb.ReadManifestRequest) -> AsyncGenerator[bytes, None]:
        for data in _cut(self._open(wire.parse_model_ref(request.model)).manifest):
            yield data

    async def _leaf_table(
        self, peer: PeerId, request: pb.ReadLeafTableRequest
    ) -> AsyncGenerator[bytes, None]:
        for data in _cut(self._open(wire.parse_model_ref(request.model)).leaf_table):
            yield data

    async def _sketches(
        self, peer: PeerId, request: similarity_pb.ReadSketchesRequest
    ) -> AsyncGenerator[bytes, None]:
        digests = similarity_wire.parse_read_sketches_request(request)
        found = await asyncio.get_running_loop().run_in_executor(
            self._pool, self._similarity.sketches, digests
        )
        yield sketches.pack(found)

    async def _fingerprint(
        self, peer: PeerId, request: similarity_pb.ReadFingerprintRequest
    ) -> AsyncGenerator[bytes, None]:
        digest, offset = similarity_wire.parse_read_fingerprint_request(request)
        whole = self._similarity.fingerprint(digest)
        if whole is None:
            raise Refused(Reason.UNKNOWN_MODEL)
        if offset >= len(whole):
            raise Refused(Reason.MALFORMED, "nothing begins there")
        for data in _cut(whole[offset:]):
            yield data

    async def _file(self, peer: PeerId, request: pb.ReadFileRequest) -> AsyncGenerator[bytes, None]:
        ref, path, offset, length = wire.parse_read_file_request(request)
        held = self._open(ref)
        if path not in held.files or offset + length > held.files[path]:
            raise Refused(Reason.MALFORMED, "no such bytes of a published file")
        if path not in FREE_FILES:
            self._entitlements.covers(peer, ref.model_id, length)
        with closing(ServedFile(held.directory / path)) as file:
            async with aclosing(self._read(list(_pieces(file, offset, offset + length, offset)))) as pieces:
                async for data in pieces:
                    yield data

    async def _leaves(self, peer: PeerId, request: pb.ReadLeavesRequest) -> AsyncGenerator[bytes, None]:
        ref, ranges = wire.parse_read_leaves_request(request)
        held = self._open(ref)
        _check_ranges(held, ranges)
        self._entitlements.covers(peer, ref.model_id, sum(r.length for r in ranges))
        with ExitStack() as stack:
            files: dict[str, ServedFile] = {}
            pieces: list[Piece] = []
            for r in ranges:
                path, span = held.tensors[r.tensor]
                if path not in files:
                    files[path] = stack.enter_context(closing(ServedFile(held.directory / path)))
                start = span.begin + r.offset
                pieces.extend(_pieces(files[path], start, start + r.length, span.begin))
            async with aclosing(self._read(pieces)) as read:
                async for data in read:
                    yield data

    def _open(self, ref: ModelRef) -> HeldModel:
        return self._shelf.open(ref.model_id, ref.publisher)

    async def _read(self, pieces: Sequence[Piece]) -> AsyncGenerator[bytes, None]:
        """Read pieces in order, the next one while the last one is sent; raises OSError on a short file."""
        loop = asyncio.get_running_loop()
        ahead: asyncio.Future[bytes] | None = None
        for i, piece in enumerate(pieces):
            data = await (ahead or loop.run_in_executor(self._pool, piece.read))
            following = pieces[i + 1] if i + 1 < len(pieces) else None
            ahead = loop.run_in_executor(self._pool, following.read) if following else None
            if ahead:
                ahead.add_done_callback(_look_at)
            yield data


def _look_at(future: asyncio.Future[bytes]) -> None:
    """Take notice of an error that nobody waits for any more: the caller went away."""
    if not future.cancelled():
        future.exception()


def _check_ranges(held: HeldModel, ranges: Sequence[ByteRange]) -> None:
    for r in ranges:
        if r.tensor not in held.tensors:
            raise Refused(Reason.MALFORMED, "no such tensor")
        span = held.tensors[r.tensor][1]
        if r.offset + r.length > span.end - span.begin:
            raise Refused(Reason.MALFORMED, "a range beyond the end of its tensor")


def _pieces(file: ServedFile, begin: int, end: int, origin: int) -> Iterator[Piece]:
    """Cut [begin, end) of a file where multiples of 1 MiB after `origin` lie."""
    while begin < end:
        stop = min(end, origin + ((begin - origin) // LEAF_SIZE + 1) * LEAF_SIZE)
        yield Piece(file, begin, stop - begin)
        begin = stop


def _cut(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), LEAF_SIZE):
        yield data[at : at + LEAF_SIZE]
