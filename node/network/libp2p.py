"""The real network: py-libp2p over TCP with Noise and yamux, in a trio thread of its own.

Two loops, one rule: what belongs to libp2p is touched in the trio thread only, what belongs to the node on
the event loop only, and a _Bridge carries calls between them without ever blocking either. Should the trio
thread end by itself, its connections are reported as closed and another one is started.

What py-libp2p 0.8.1 does that is guarded against here:
- `new_host()` accepts plaintext and mplex, so the host is put together from its parts: Noise and yamux only;
- an exception in a stream handler (for example a malformed pubsub frame) stops the whole swarm;
- a slot of the inbound limiter is held until the swarm ends, not until the connection does;
- listening sockets are opened with SO_REUSEPORT, so a port that is taken is noticed by nobody;
- a failed dial blocks further dials of that peer for a minute, and dialling prefers remembered addresses;
- an auto-connector dials remembered peers whatever the watermarks say, also those that we dropped;
- gossip is dropped silently above 10 messages a second, and behind an outbound queue of 32 frames;
- a message of our own reaches the mesh only, not every neighbour on the topic;
- it logs through the root logger, which prints to stderr when nobody configured logging.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import trio
from libp2p.abc import INetConn, INetStream, INotifee
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.ping import ID as PING
from libp2p.host.ping import PING_LENGTH
from libp2p.io.utils import read_exactly
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr
from multiaddr.utils import get_network_addrs

from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import LocalError, PeerError, Refused, Unreachable
from node.network import listening
from node.network.base import (
    MAX_FRAME,
    MAX_MESSAGE,
    Direction,
    PeerInfo,
    Verdict,
    check_size,
    decode_reply,
    encode_refusal,
    parse_address,
)
from node.network.flow import Admission, Gate, Limits, Slots
from node.network.switchboard import Switchboard
from node.network.upkeep import delay_after, watch_peers

LENGTH_BYTES = 4
READ_DEADLINE = 10.0
STOP_DEADLINE = 8.0
HEARTBEAT = 1
STREAMS_PER_PEER = 64
BACKPRESSURE = 1.0
HALF_FULL = 16
KNOWN_ADDRESSES = 16
MAX_GOSSIP_FRAME = 4 * MAX_MESSAGE
ADDRESS_LIFETIME = 7200
HANDSHAKES = 64

T = TypeVar("T")

log = logging.getLogger(__name__)


class Libp2pNetwork(Switchboard):
    """A Network over TCP.

    `private_key` is the raw 32 byte Ed25519 host key, `listen` are TCP multiaddrs without a peer id (port 0:
    any free one, which a restart of the same object keeps), `announce` replaces what others are told.
    """

    def __init__(
        self,
        private_key: bytes,
        listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",),
        *,
        announce: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> None:
        if len(private_key) != 32:
            raise ValueError("an Ed25519 private key has 32 bytes")
        self._keys = create_new_key_pair(private_key)
        super().__init__(PeerId(str(ID.from_pubkey(self._keys.public_key))), limits or Limits())
        self._listen = tuple(_parsed(address) for address in listen)
        self._announce = tuple(_parsed(address) for address in announce)
        self._addresses: tuple[str, ...] = ()
        self._infos: dict[PeerId, PeerInfo] = {}
        self._core: _Core | None = None
        self._lifecycle = asyncio.Lock()

    async def start(self) -> None:
        """Listen; raises LocalError when the port is taken."""
        async with self._lifecycle:
            if self.running:
                return
            self._open()
            try:
                await self._launch()
            except BaseException:
                await self._close()
                raise
            self._spawn(watch_peers, self, self._limits)

    async def stop(self) -> None:
        """Close every connection and listener, and end the thread."""
        async with self._lifecycle:
            core, self._core = self._core, None
            if core is not None:
                await core.stop()
            await self._close()
            self._addresses = ()
            self._infos.clear()

    def addresses(self) -> tuple[str, ...]:
        """Complete multiaddrs under which others can dial us; none when stopped."""
        return self._addresses

    def peers(self) -> tuple[PeerInfo, ...]:
        """The connected peers, ordered by peer id."""
        return tuple(
            replace(info, latency=self._latency.get(peer)) for peer, info in sorted(self._infos.items())
        )

    async def connect(self, address: str, *, deadline: float = 10.0) -> PeerId:
        """Dial a complete multiaddr, or keep the connection that there is."""
        wanted = parse_address(address)
        if wanted.peer == self._peer_id:
            raise LocalError("that is this node's own address")
        core = self._running_core()
        await core.bridge.call(core.dial, wanted.peer, _parsed(wanted.transport), deadline)
        return wanted.peer

    async def disconnect(self, peer: PeerId) -> None:
        """Close the connection to a peer, if there is one."""
        if self._core is not None:
            with suppress(Unreachable):
                await self._core.bridge.call(self._core.hang_up, peer)

    async def ping(self, peer: PeerId, *, deadline: float = 5.0) -> float:
        """Measure the round trip to a connected peer in seconds."""
        core = self._running_core()
        latency = await core.bridge.call(core.ping, peer, deadline)
        if peer in self._present:
            self._latency[peer] = latency
        return latency

    async def request(self, peer: PeerId, protocol: str, payload: bytes, *, deadline: float) -> bytes:
        """Ask a connected peer and return its answer within `deadline` seconds."""
        check_size(payload)
        core = self._running_core()
        return decode_reply(await core.bridge.call(core.request, peer, protocol, bytes(payload), deadline))

    async def publish(self, topic: str, data: bytes) -> int:
        """Send to everybody on a topic; return how many neighbours are on it now."""
        self._check_publishable(topic, data)
        try:
            core = self._running_core()
            return await core.bridge.call(core.publish, topic, bytes(data))
        except Unreachable:  # starting again, or about to: nobody is connected
            return 0

    def handle(self, protocol: str, handler: Callable[[PeerId, bytes], Awaitable[bytes]]) -> None:
        """Answer requests of a protocol with a handler."""
        super().handle(protocol, handler)
        if self._core is not None:
            self._core.bridge.post(self._core.serve, protocol)

    def subscribe(
        self,
        topic: str,
        validate: Callable[[PeerId, bytes], Verdict],
        deliver: Callable[[PeerId, bytes], Awaitable[None]],
    ) -> None:
        """Join a topic; one subscription per topic."""
        super().subscribe(topic, validate, deliver)
        if self._core is not None:
            self._spawn(self._core.bridge.call, self._core.join, topic)

    # -- the thread ------------------------------------------------------------------------------------

    async def _launch(self) -> None:
        """Start a trio thread and wait until it listens."""
        for address in self._listen:
            listening.check_free(str(address))
        self._core = _Core(self, asyncio.get_running_loop())
        try:
            bound = await self._core.start()
        except BaseException:
            self._core = None
            raise
        # A restart, also one after a crash, comes back under the addresses that others know.
        self._listen = tuple(bound)
        self._addresses = tuple(
            f"{address}/p2p/{self._peer_id}" for address in self._announce or _concrete(bound)
        )

    def _running_core(self) -> _Core:
        if not self.running:
            raise LocalError("the network is not started", hint="weft up")
        if self._core is None:
            raise Unreachable("the network is starting again", hint="try again in a moment")
        return self._core

    def _crashed(self, core: _Core, error: BaseException | None) -> None:
        """Take note that the thread ended by itself, and start another one."""
        if self._core is not core:
            return
        self._core = None
        log.error("the libp2p thread ended unexpectedly; starting it again", exc_info=error)
        self._infos.clear()
        for peer in sorted(self._present):
            self._peer_disconnected(peer)
        self._spawn(self._relaunch)

    async def _relaunch(self) -> None:
        failures = 0
        while self._core is None:
            failures += 1
            await asyncio.sleep(delay_after(failures, 0.0))
            try:
                async with self._lifecycle:
                    await self._launch()
            except LocalError as error:
                log.error("cannot listen again: %s", error.why)

    # -- told by the thread, on the event loop ---------------------------------------------------------

    def _learn(self, core: _Core, info: PeerInfo) -> None:
        if self._core is core:
            self._infos[info.peer] = info
            self._peer_connected(info.peer)

    def _forget(self, core: _Core, peer: PeerId) -> None:
        if self._core is core:
            self._infos.pop(peer, None)
            self._peer_disconnected(peer)

    def _settings(self) -> tuple[KeyPair, tuple[Multiaddr, ...], tuple[Multiaddr, ...], Limits]:
        return self._keys, self._listen, self._announce, self._limits


class _Bridge:
    """Calls between the event loop and one trio run; neither side ever blocks on the other."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._waiting: set[asyncio.Future[Any]] = set()

    def open(self, nursery: trio.Nursery) -> None:
        """Accept calls into this nursery; in the trio thread."""
        self._nursery, self._token = nursery, trio.lowlevel.current_trio_token()

    def close(self) -> None:
        """Fail what still waits; on the event loop, once the trio run is over."""
        self._token = None
        for future in self._waiting:
            if not future.done():
                future.set_exception(Unreachable("the network was stopped"))

    def post(self, function: Callable[..., object], *arguments: object) -> None:
        """Run a plain function in the trio thread soon; from any thread."""
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(function, *arguments)

    def tell(self, function: Callable[..., object], *arguments: object) -> None:
        """Run a plain function on the event loop soon; from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function, *arguments)

    async def call(self, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """Await an async function of the trio side from the event loop; cancelling it crosses over."""
        if self._token is None:
            raise Unreachable("the network is not running yet, or no longer")
        future: asyncio.Future[T] = self._loop.create_future()
        scope = trio.CancelScope()
        self._waiting.add(future)
        self.post(self._begin, scope, future, partial(function, *arguments))
        try:
            return await future
        except asyncio.CancelledError:
            self.post(scope.cancel)
            raise
        finally:
            self._waiting.discard(future)

    def _begin(
        self, scope: trio.CancelScope, future: asyncio.Future[T], function: Callable[[], Awaitable[T]]
    ) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._run, scope, future, function)

    async def _run(
        self, scope: trio.CancelScope, future: asyncio.Future[T], function: Callable[[], Awaitable[T]]
    ) -> None:
        try:
            with scope:
                self.tell(_settle, future, await function(), None)
        except Exception as error:
            self.tell(_settle, future, None, error)

    async def ask(self, spawn: Callable[..., None], function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Await an async function of the event loop from the trio side; it runs to its end in any case."""
        done = trio.Event()
        results: list[T] = []

        async def run() -> None:
            try:
                results.append(await function())
            finally:
                self.post(done.set)

        self.tell(spawn, run)
        await done.wait()
        if not results:
            raise Unreachable("the network was stopped")
        return results[0]


def _settle(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


class _Core:
    """One life of the trio thread: a host, its gossip, and what is asked of them.

    Methods without a word about it run in the trio thread.
    """

    def __init__(self, network: Libp2pNetwork, loop: asyncio.AbstractEventLoop) -> None:
        self._network = network
        self._loop = loop
        self.bridge = _Bridge(loop)
        self._keys, self._listen, self._announce, self._limits = network._settings()
        self._ready: asyncio.Future[list[Multiaddr]] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._thread = threading.Thread(target=self._live, name="libp2p", daemon=True)
        self._stopping = False
        self._dialling: Counter[ID] = Counter()
        self._dial_lock: dict[ID, trio.Lock] = {}
        self._streams: Counter[ID] = Counter()
        limits = self._limits
        self._requests = Gate(rate=limits.request_rate, burst=limits.request_burst, debt=limits.request_burst)
        self._slots = Slots(total=limits.running_requests, per_peer=limits.running_requests_per_peer)
        self.gossip = Gate(rate=limits.gossip_rate, burst=limits.gossip_burst, debt=limits.gossip_debt)

    # -- on the event loop: the life of the thread -----------------------------------------------------

    async def start(self) -> list[Multiaddr]:
        """Start the thread and return what it listens on; on the event loop."""
        _quieten()
        self._thread.start()
        try:
            return await self._ready
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End the thread and wait for it; on the event loop."""
        self._stopping = True
        self.bridge.post(self._request_stop)
        try:
            async with asyncio.timeout(STOP_DEADLINE + 2):
                await asyncio.shield(self._ended)
        except TimeoutError:
            log.error("the libp2p thread does not end; leaving it behind")
            self.bridge.close()
        else:
            self._thread.join(STOP_DEADLINE)

    def _note_end(self, error: BaseException | None) -> None:
        self.bridge.close()
        if not self._ready.done():
            wrapped = error if isinstance(error, Exception) else LocalError("libp2p did not start")
            self._ready.set_exception(wrapped)
        elif not self._stopping:
            self._network._crashed(self, error)
        if not self._ended.done():
            self._ended.set_result(None)

    def _live(self) -> None:
        """The whole life of the thread."""
        error: BaseException | None = None
        try:
            trio.run(self._main)
        except BaseException as raised:
            error = _sole(raised)
        self.bridge.tell(self._note_end, error)

    # -- in the trio thread ----------------------------------------------------------------------------

    async def _main(self) -> None:
        self._stop, self._publishing = trio.Event(), trio.Lock()
        self._host = self._build_host()
        self._swarm = self._host.get_network()
        self._pubsub = _Pubsub(self, self._host, _build_router())
        self._swarm.register_notifee(_Notifee(self))
        async with AsyncExitStack() as stack:
            # Services run before the first connection: a connection waits for all of them to take note of it.
            await stack.enter_async_context(self._host.run([]))
            await stack.enter_async_context(background_trio_service(self._pubsub))
            await stack.enter_async_context(background_trio_service(self._pubsub.router))
            await self._pubsub.wait_until_ready()
            stack.push_async_callback(self._shut_down)
            async with trio.open_nursery() as nursery:
                self.bridge.open(nursery)
                # Only now: what is handled or subscribed from here on comes through the bridge as well.
                for protocol in tuple(self._network._handlers):
                    self.serve(protocol)
                for topic in tuple(self._network._topics):
                    await self.join(topic)
                self.bridge.tell(_settle, self._ready, await self._open_ports(), None)
                if not self._stopping:  # set before the bridge was open, the event would never come
                    await self._stop.wait()
                nursery.cancel_scope.cancel()

    def _request_stop(self) -> None:
        self._stop.set()

    async def _open_ports(self) -> list[Multiaddr]:
        if not await self._swarm.listen(*self._listen) or len(self._swarm.listeners) < len(self._listen):
            raise LocalError(
                f"cannot listen on {', '.join(map(str, self._listen))}",
                hint="choose another address: weft up --help",
            )
        return [address for listener in self._swarm.listeners.values() for address in listener.get_addrs()]

    async def _shut_down(self) -> None:
        """Close all connections at once (each takes its time), then the rest of the host."""
        with _shielded(STOP_DEADLINE):
            async with trio.open_nursery() as nursery:
                for connection in self._swarm.get_connections():
                    nursery.start_soon(_quietly, connection.close)
            await self._host.close()
        self._pubsub.seen_messages.stop()  # a thread of its own, which nobody else ends

    def _build_host(self) -> BasicHost:
        noise = Noise(self._keys, noise_privkey=create_noise_key_pair().private_key)
        upgrader = TransportUpgrader(
            secure_transports_by_protocol={NOISE: noise},
            muxer_transports_by_protocol={TProtocol(YAMUX): Yamux},
        )
        identity = ID.from_pubkey(self._keys.public_key)
        book = _Book(self)
        book.add_key_pair(identity, self._keys)
        swarm = _Swarm(
            identity,
            book,
            upgrader,
            transports=[TCP()],
            retry_config=RetryConfig(max_retries=0),
            connection_config=ConnectionConfig(
                max_connections=self._limits.connections,
                min_connections=0,
                low_watermark=0,
                high_watermark=self._limits.connections,
                max_connections_per_peer=2,
                grace_period=0.0,
            ),
        )
        swarm.auto_connector = _NoAutoConnector(swarm)
        swarm._inbound_limiter = trio.CapacityLimiter(self._limits.connections + HANDSHAKES)
        host = BasicHost(
            swarm,
            negotiate_timeout=int(READ_DEADLINE),
            addrs_factory=lambda candidates: list(self._announce or _concrete(candidates)),
            disable_identify_address_discovery=True,
        )
        swarm.set_stream_handler(partial(self._guard_stream, swarm.common_stream_handler))
        return host

    async def _guard_stream(
        self, handle: Callable[[INetStream], Awaitable[None]], stream: INetStream
    ) -> None:
        """Handle one inbound stream; whatever a peer provokes ends with the stream, not with the swarm."""
        peer = stream.muxed_conn.peer_id
        if self._streams[peer] >= STREAMS_PER_PEER:
            return await _quietly(stream.reset)
        self._streams[peer] += 1
        try:
            await handle(stream)
        except Exception as error:
            log.debug("a stream of peer %s failed: %r", peer, error)
            await _quietly(stream.reset)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    # -- peers -----------------------------------------------------------------------------------------

    async def dial(self, peer: PeerId, transport: Multiaddr, deadline: float) -> None:
        """Connect, unless connected; see Network.connect."""
        identity = ID.from_base58(peer)
        lock = self._dial_lock.setdefault(identity, trio.Lock())
        self._dialling[identity] += 1
        try:
            with trio.fail_after(deadline):
                async with lock:
                    if not self._swarm.get_connections(identity):
                        await self._swarm.dial_addr(transport, identity)
                        self._host.get_peerstore().add_addr(identity, transport, ADDRESS_LIFETIME)
        except trio.TooSlowError as error:
            raise Unreachable(f"nobody answers at {transport} within {deadline:g} s") from error
        except Exception as error:
            raise _dial_error(peer, transport, error) from error
        finally:
            self._dialling[identity] -= 1
            if not self._dialling[identity]:
                del self._dialling[identity], self._dial_lock[identity]

    async def hang_up(self, peer: PeerId) -> None:
        """Close every connection to a peer."""
        async with trio.open_nursery() as nursery:
            for connection in self._swarm.get_connections(ID.from_base58(peer)):
                nursery.start_soon(_quietly, connection.close)

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

    def connected(self, connection: INetConn) -> None:
        """Take note of a new connection."""
        self._tell_about(connection.muxed_conn.peer_id)

    def identified(self, identity: ID) -> None:
        """Take note of what a connected peer says about itself."""
        if self._swarm.get_connections(identity):
            self._tell_about(identity)

    def disconnected(self, connection: INetConn) -> None:
        """Take note of a closed connection; a peer may have another one."""
        identity = connection.muxed_conn.peer_id
        peer = _peer_id(identity)
        if peer is not None and not self._swarm.get_connections(identity):
            self.bridge.tell(self._network._forget, self, peer)

    def joined(self, identity: ID) -> None:
        """Take note of a peer that can be reached on a topic of ours."""
        peer = _peer_id(identity)
        if peer is not None:
            self.bridge.tell(self._network._peer_joined, peer)

    def _tell_about(self, identity: ID) -> None:
        peer = _peer_id(identity)
        if peer is None:  # RSA and other keys have no place in our network
            self.bridge.post(self._nursery_close, identity)
            return
        connections = self._swarm.get_connections(identity)
        if not connections:
            return
        inbound = "inbound" in str(connections[0].direction).lower()
        info = PeerInfo(
            peer=peer,
            addresses=self._addresses_of(identity, peer, connections[0]),
            direction=Direction.INBOUND if inbound else Direction.OUTBOUND,
            latency=None,
        )
        self.bridge.tell(self._network._learn, self, info)

    def _nursery_close(self, identity: ID) -> None:
        for connection in self._swarm.get_connections(identity):
            self._swarm.manager.run_task(_quietly, connection.close)

    def _addresses_of(self, identity: ID, peer: PeerId, connection: INetConn) -> tuple[str, ...]:
        try:
            found = self._host.get_peerstore().addrs(identity)
        except Exception:
            found = []
        if not found:
            found = connection.get_transport_addresses()
        texts = [str(address).removesuffix(f"/p2p/{peer}") for address in found[:KNOWN_ADDRESSES]]
        return tuple(address for text in texts if (address := f"{text}/p2p/{peer}") and _is_address(address))

    # -- requests --------------------------------------------------------------------------------------

    def serve(self, protocol: str) -> None:
        """Accept streams of a protocol."""
        self._host.set_stream_handler(TProtocol(protocol), partial(self._answer, protocol))

    async def request(self, peer: PeerId, protocol: str, payload: bytes, deadline: float) -> bytes:
        """Send one message, read one frame."""

        async def exchange(stream: INetStream) -> bytes:
            await stream.write(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)
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
            if "protocols not supported" in _chain_text(error):
                raise PeerError(f"peer {peer.short} does not speak {protocol}") from error
            raise Unreachable(f"peer {peer.short} closed the connection") from error
        else:
            with trio.move_on_after(1.0):
                await _quietly(stream.close)
            stream = None
            return result
        finally:
            if stream is not None:
                with _shielded(1.0):
                    await _quietly(stream.reset)

    async def _answer(self, protocol: str, stream: INetStream) -> None:
        """Read one request, have it answered on the event loop, and send the reply."""
        peer = PeerId(str(stream.muxed_conn.peer_id))
        frame = encode_refusal(Refused(Reason.BUSY, "too many requests"))
        try:
            if self._requests.admit(peer, trio.current_time()) is Admission.ADMIT:
                with self._slots.taken(peer):
                    with trio.fail_after(READ_DEADLINE):
                        payload = await _read_message(stream, MAX_MESSAGE)
                    frame = await self.bridge.ask(
                        self._network._spawn, partial(self._network._respond, peer, protocol, payload)
                    )
        except Refused as refused:
            frame = encode_refusal(refused)
        with trio.fail_after(READ_DEADLINE):
            await stream.write(len(frame).to_bytes(LENGTH_BYTES, "big") + frame)
            await stream.close()

    # -- gossip ----------------------------------------------------------------------------------------

    async def join(self, topic: str) -> None:
        """Subscribe to a topic with our validator."""
        self._pubsub.set_topic_validator(topic, self._validate, True)
        await self._pubsub.subscribe(topic)

    async def publish(self, topic: str, data: bytes) -> int:
        """Send a message of our own to every neighbour on a topic; return how many there are."""
        async with self._publishing:  # else many at once would all find the same room
            await self._pubsub.wait_for_room(topic)
            await self._pubsub.publish(topic, data)
        return len(self._pubsub.reachable(topic))

    def admit(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        """Decide, before any signature is checked, whether a neighbour's message is looked at."""
        peer = _peer_id(forwarder)
        if peer is None:
            return False
        admission = self.gossip.admit(peer, trio.current_time())
        if admission is Admission.FLOOD:
            log.info("peer %s floods: disconnecting", peer.short)
            self._nursery_close(forwarder)
        return (
            admission is Admission.ADMIT
            and len(message.data) <= MAX_MESSAGE
            and len(message.seqno) == 8
            and len(message.topicIDs) == 1
            and message.from_id != self._host.get_id().to_bytes()
            and _peer_id_of(message) is not None
        )

    async def _validate(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        """Have a message with a valid signature judged on the event loop."""
        author = _peer_id_of(message)
        if author is None or author == self._network.peer_id:
            return author is not None

        async def judge() -> Verdict:
            return self._network._judge(
                message.topicIDs[0], message.from_id + message.seqno, author, message.data
            )

        verdict = await self.bridge.ask(self._network._spawn, judge)
        peer = _peer_id(forwarder)
        if verdict is Verdict.REJECT and peer is not None:
            self.gossip.charge(peer, trio.current_time(), cost=self._limits.rejection_cost)
        return verdict is Verdict.ACCEPT


class _Swarm(Swarm):  # type: ignore[misc]
    """A Swarm that gives an inbound slot back when the connection ends, not when the swarm does."""

    async def upgrade_inbound_raw_conn(self, raw_conn: Any, maddr: Multiaddr) -> Any:
        """Upgrade, then wait for the end: the caller would otherwise wait for the end of the swarm."""
        muxed = await super().upgrade_inbound_raw_conn(raw_conn, maddr)
        for connection in self.get_connections(muxed.peer_id):
            if connection.muxed_conn is muxed:
                await connection.event_closed.wait()
        raise SwarmException("the connection has ended")


class _NoAutoConnector(AutoConnector):  # type: ignore[misc]
    """Dials nobody: whom to be connected to is the node's decision, and a peer that was dropped stays so."""

    async def maybe_connect(self) -> None:
        """Do nothing."""


class _Book(PeerStore):  # type: ignore[misc]
    """A PeerStore that tells when a peer has said what it speaks: the last step of identify."""

    def __init__(self, core: _Core) -> None:
        super().__init__()
        self._core = core

    def add_protocols(self, peer_id: ID, protocols: Sequence[str]) -> None:
        """Remember, and tell."""
        super().add_protocols(peer_id, protocols)
        self._core.identified(peer_id)


class _Notifee(INotifee):  # type: ignore[misc]
    """Passes connections and their ends on."""

    def __init__(self, core: _Core) -> None:
        self._core = core

    async def connected(self, network: Any, conn: INetConn) -> None:
        self._core.connected(conn)

    async def disconnected(self, network: Any, conn: INetConn) -> None:
        self._core.disconnected(conn)

    async def opened_stream(self, network: Any, stream: INetStream) -> None: ...
    async def closed_stream(self, network: Any, stream: INetStream) -> None: ...
    async def listen(self, network: Any, multiaddr: Multiaddr) -> None: ...
    async def listen_close(self, network: Any, multiaddr: Multiaddr) -> None: ...


class _Pubsub(Pubsub):  # type: ignore[misc]
    """A Pubsub that asks before it looks at a message, survives what it finds there, and tells who joined."""

    def __init__(self, core: _Core, host: BasicHost, router: GossipSub) -> None:
        super().__init__(host, router, strict_signing=True, max_inbound_rpc_size=MAX_GOSSIP_FRAME)
        self._core = core

    def reachable(self, topic: str) -> set[ID]:
        """The neighbours on a topic that have a stream of ours."""
        return set(self.peer_topics.get(topic, ())) & set(self.peers)

    def _fullest(self, topic: str) -> int:
        queues = [self.peer_queues[peer] for peer in self.reachable(topic) if peer in self.peer_queues]
        return max(map(len, queues), default=0)

    async def wait_for_room(self, topic: str) -> None:
        """Let the outbound queues drain: a full one (32 frames) drops what comes next without a word.

        A neighbour that does not read for a second is not waited for.
        """
        with trio.move_on_after(BACKPRESSURE):
            while self._fullest(topic) >= HALF_FULL:  # noqa: ASYNC110 - the queues tell nobody of their room
                await trio.sleep(0.002)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        try:
            if msg_forwarder == self.my_id or self._core.admit(msg_forwarder, msg):
                await super().push_msg(msg_forwarder, msg)
        except Exception as error:  # it runs as a task of the service, which an exception would end
            log.debug("a gossip message by way of %s failed: %r", msg_forwarder, error)

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        """Deliver nothing here: what the validator accepts is queued on the event loop already."""

    def handle_subscription(self, origin_id: ID, sub_message: Any) -> None:
        super().handle_subscription(origin_id, sub_message)
        self._tell_joined(origin_id)

    async def _handle_new_peer(self, peer_id: ID) -> None:
        await super()._handle_new_peer(peer_id)
        self._tell_joined(peer_id)

    def _tell_joined(self, peer_id: ID) -> None:
        if any(peer_id in self.reachable(topic) for topic in self.topic_ids):
            self._core.joined(peer_id)


class _Router(GossipSub):  # type: ignore[misc]
    """A GossipSub that sends what we publish ourselves to every neighbour on the topic, as go-libp2p does."""

    def _get_peers_to_send(
        self, topic_ids: Iterable[str], msg_forwarder: ID, origin: ID, msg_id: bytes | None = None
    ) -> Iterable[ID]:
        if msg_forwarder == self.pubsub.my_id:
            return {peer for topic in topic_ids for peer in self.pubsub.reachable(topic)}
        return super()._get_peers_to_send(topic_ids, msg_forwarder, origin, msg_id)  # type: ignore[no-any-return]


def _build_router() -> _Router:
    """GossipSub without its own rate limit (10 a second, silent) and without exchanging peers.

    Version 1.1, since 1.2 sends an IDONTWANT for every message: worth it for large ones in dense meshes only.
    """
    return _Router(
        protocols=[PROTOCOL_ID_V11],
        degree=6,
        degree_low=4,
        degree_high=12,
        heartbeat_interval=HEARTBEAT,
        do_px=False,
        adaptive_gossip_enabled=False,
        spam_protection_enabled=False,
        eclipse_protection_enabled=False,
        max_messages_per_topic_per_second=math.inf,
    )


def _concrete(addresses: Iterable[Multiaddr]) -> list[Multiaddr]:
    """Replace wildcard addresses by those of this machine's interfaces."""
    return [Multiaddr(text) for text in listening.concrete(map(str, addresses), _interfaces)]


def _interfaces(version: int) -> list[str]:
    try:
        return [str(host) for host in get_network_addrs(version)]
    except Exception:
        return []


def _parsed(address: str) -> Multiaddr:
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


async def _read_message(stream: INetStream, limit: int) -> bytes:
    """Read a length and that many bytes; raises PeerError before reading more than `limit`."""
    length = int.from_bytes(await read_exactly(stream, LENGTH_BYTES), "big")
    if length > limit:
        raise PeerError(f"a message of {length} bytes is over the limit of {limit}")
    return bytes(await read_exactly(stream, length)) if length else b""


def _shielded(seconds: float) -> trio.CancelScope:
    """A scope for cleaning up, which only its own deadline cancels."""
    scope = trio.move_on_after(seconds)
    scope.shield = True
    return scope


async def _quietly(function: Callable[[], Awaitable[object]]) -> None:
    with suppress(Exception):
        await function()


def _is_address(text: str) -> bool:
    """Whether we could dial it: peers announce what they like."""
    try:
        return bool(parse_address(text))
    except LocalError:
        return False


def _peer_id(identity: ID) -> PeerId | None:
    try:
        return PeerId(str(identity))
    except ValueError:
        return None


def _peer_id_of(message: rpc_pb2.Message) -> PeerId | None:
    return _peer_id(ID(message.from_id)) if len(message.from_id) <= 64 else None


def _dial_error(peer: PeerId, transport: Multiaddr, error: Exception) -> PeerError | Unreachable:
    text = _chain_text(error)
    if "mismatch" in text.lower():
        return PeerError(
            f"the node at {transport} is not {peer}", hint="ask for its present address: weft invite"
        )
    if "connections limit" in text:
        return Unreachable("no connection is free", hint="try again later")
    return Unreachable(f"cannot reach {transport}", hint="check that the other node is up: weft status")


def _chain_text(error: BaseException | None) -> str:
    """The texts and types of an error and of all its causes."""
    parts: list[str] = []
    while error is not None and len(parts) < 10:
        parts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "; ".join(parts)


def _sole(error: BaseException) -> BaseException:
    """The one error inside nested groups of one, else the group."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _quieten() -> None:
    """Keep libp2p out of stderr and out of the root logger; LIBP2P_DEBUG turns its own logging on."""
    if not os.environ.get("LIBP2P_DEBUG"):
        for name in [name for name in logging.root.manager.loggerDict if name.startswith("libp2p.")]:
            logging.getLogger(name).setLevel(logging.NOTSET)  # some modules set a level of their own
        logger = logging.getLogger("libp2p")
        logger.setLevel(logging.CRITICAL)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
    root = logging.getLogger()
    if _not_libp2p not in root.filters:
        root.addFilter(_not_libp2p)
    if not root.handlers:
        # The functions of the logging module install a handler on stderr when there is none.
        root.addHandler(logging.NullHandler())


def _not_libp2p(record: logging.LogRecord) -> bool:
    """Drop what libp2p says through the root logger itself; loggers with a name are not asked."""
    return f"{os.sep}libp2p{os.sep}" not in record.pathname
