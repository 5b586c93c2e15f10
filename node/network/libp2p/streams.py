"""Requests, replies and pings in the trio thread, each on a stream of its own.

On the wire a message is its length, 4 bytes in big-endian order, and its bytes.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.ping import ID as PING
from libp2p.host.ping import PING_LENGTH
from libp2p.io.utils import read_exactly
from libp2p.peer.id import ID

from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import PeerError, Refused, Unreachable
from node.network.base import MAX_FRAME, MAX_MESSAGE, encode_refusal
from node.network.flow import Admission, Gate, Limits, Slots
from node.network.libp2p.bridge import Bridge
from node.network.libp2p.callbacks import Callbacks
from node.network.libp2p.deadlines import READ_DEADLINE, quietly, shielded
from node.network.libp2p.errors import stream_error

LENGTH_BYTES = 4

T = TypeVar("T")


class Streams:
    """The streams of one host: ours to others, and the answers to theirs."""

    def __init__(self, host: BasicHost, bridge: Bridge, callbacks: Callbacks, limits: Limits) -> None:
        self._host = host
        self._swarm = host.get_network()
        self._bridge = bridge
        self._callbacks = callbacks
        self._requests = Gate(rate=limits.request_rate, burst=limits.request_burst, debt=limits.request_burst)
        self._slots = Slots(total=limits.running_requests, per_peer=limits.running_requests_per_peer)

    async def ping(self, peer: PeerId, deadline: float) -> float:
        """One round trip over a stream of its own, in seconds."""
        challenge = secrets.token_bytes(PING_LENGTH)

        async def roundtrip(stream: INetStream) -> float:
            begun = time.perf_counter()
            await stream.write(challenge)
            if await read_exactly(stream, PING_LENGTH) != challenge:
                raise PeerError(f"peer {peer.short} answers pings with something else")
            return time.perf_counter() - begun

        return await self._with_stream(peer, PING, deadline, roundtrip)

    async def request(self, peer: PeerId, protocol: str, payload: bytes, deadline: float) -> bytes:
        """Send one message, read one frame."""

        async def exchange(stream: INetStream) -> bytes:
            await _write_message(stream, payload)
            return await _read_message(stream, MAX_FRAME)

        return await self._with_stream(peer, TProtocol(protocol), deadline, exchange)

    async def _with_stream(
        self,
        peer: PeerId,
        protocol: TProtocol,
        deadline: float,
        use: Callable[[INetStream], Awaitable[T]],
    ) -> T:
        """Open a stream to a connected peer, use it, and close it, all within the deadline."""
        identity = ID.from_base58(peer)
        if not self._swarm.get_connections(identity):
            raise Unreachable(f"peer {peer.short} is not connected", hint="weft peers")
        stream: INetStream | None = None
        try:
            with trio.fail_after(deadline):
                stream = await self._host.new_stream(identity, [protocol])
                result = await use(stream)
        except trio.TooSlowError as error:
            raise Unreachable(f"peer {peer.short} did not answer within {deadline:g} s") from error
        except PeerError:
            raise
        except Exception as error:
            raise stream_error(peer, protocol, error) from error
        else:
            with trio.move_on_after(1.0):
                await quietly(stream.close)
            stream = None
            return result
        finally:
            if stream is not None:
                with shielded(1.0):
                    await quietly(stream.reset)

    def serve(self, protocol: str) -> None:
        """Accept streams of a protocol."""
        self._host.set_stream_handler(TProtocol(protocol), partial(self._answer, protocol))

    async def _answer(self, protocol: str, stream: INetStream) -> None:
        """Read one request, have it answered on the event loop, and send the reply."""
        peer = PeerId(str(stream.muxed_conn.peer_id))
        frame = encode_refusal(Refused(Reason.BUSY, "too many requests"))
        try:
            if self._requests.admit(peer, trio.current_time()) is Admission.ADMIT:
                with self._slots.taken(peer):
                    with trio.fail_after(READ_DEADLINE):
                        payload = await _read_message(stream, MAX_MESSAGE)
                    respond = partial(self._callbacks.respond, peer, protocol, payload)
                    frame = await self._bridge.ask(self._callbacks.spawn, respond)
        except Refused as refused:
            frame = encode_refusal(refused)
        with trio.fail_after(READ_DEADLINE):
            await _write_message(stream, frame)
            await stream.close()


async def _write_message(stream: INetStream, message: bytes) -> None:
    await stream.write(len(message).to_bytes(LENGTH_BYTES, "big") + message)


async def _read_message(stream: INetStream, limit: int) -> bytes:
    """Read a length and that many bytes; raises PeerError before reading more than `limit`."""
    length = int.from_bytes(await read_exactly(stream, LENGTH_BYTES), "big")
    if length > limit:
        raise PeerError(f"a message of {length} bytes is over the limit of {limit}")
    return bytes(await read_exactly(stream, length)) if length else b""
