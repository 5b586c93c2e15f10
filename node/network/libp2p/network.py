"""Libp2pNetwork: the network port on the event loop, over whichever life of the trio thread there is.

What is called here is carried into the thread as a function without arguments, which looks up the part that
it needs only there: the parts do not exist before the thread does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from node.domain.ids import PeerId
from node.errors import LocalError, Unreachable
from node.network import listening
from node.network.base import PeerInfo, Verdict, check_size, decode_reply, parse_address
from node.network.flow import Limits
from node.network.libp2p.addresses import concrete, parse_transport
from node.network.libp2p.callbacks import Callbacks
from node.network.libp2p.core import Core
from node.network.libp2p.host import Settings
from node.network.switchboard import Switchboard
from node.network.upkeep import delay_after, watch_peers

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
        self._listen = tuple(parse_transport(address) for address in listen)
        self._announce = tuple(parse_transport(address) for address in announce)
        self._addresses: tuple[str, ...] = ()
        self._infos: dict[PeerId, PeerInfo] = {}
        self._core: Core | None = None
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
        core, transport = self._running_core(), parse_transport(wanted.transport)
        await core.bridge.call(lambda: core.connections.dial(wanted.peer, transport, deadline))
        return wanted.peer

    async def disconnect(self, peer: PeerId) -> None:
        """Close the connection to a peer, if there is one."""
        core = self._core
        if core is not None:
            with suppress(Unreachable):
                await core.bridge.call(lambda: core.connections.hang_up(peer))

    async def ping(self, peer: PeerId, *, deadline: float = 5.0) -> float:
        """Measure the round trip to a connected peer in seconds."""
        core = self._running_core()
        latency = await core.bridge.call(lambda: core.streams.ping(peer, deadline))
        if peer in self._present:
            self._latency[peer] = latency
        return latency

    async def request(self, peer: PeerId, protocol: str, payload: bytes, *, deadline: float) -> bytes:
        """Ask a connected peer and return its answer within `deadline` seconds."""
        check_size(payload)
        core, copied = self._running_core(), bytes(payload)
        return decode_reply(
            await core.bridge.call(lambda: core.streams.request(peer, protocol, copied, deadline))
        )

    async def publish(self, topic: str, data: bytes) -> int:
        """Send to everybody on a topic; return how many neighbours are on it now."""
        self._check_publishable(topic, data)
        try:
            core, copied = self._running_core(), bytes(data)
            return await core.bridge.call(lambda: core.gossip.publish(topic, copied))
        except Unreachable:  # starting again, or about to: nobody is connected
            return 0

    def handle(self, protocol: str, handler: Callable[[PeerId, bytes], Awaitable[bytes]]) -> None:
        """Answer requests of a protocol with a handler."""
        super().handle(protocol, handler)
        core = self._core
        if core is not None:
            core.bridge.post(lambda: core.streams.serve(protocol))

    def subscribe(
        self,
        topic: str,
        validate: Callable[[PeerId, bytes], Verdict],
        deliver: Callable[[PeerId, bytes], Awaitable[None]],
    ) -> None:
        """Join a topic; one subscription per topic."""
        super().subscribe(topic, validate, deliver)
        core = self._core
        if core is not None:
            self._spawn(core.bridge.call, lambda: core.gossip.join(topic))

    # -- the thread ------------------------------------------------------------------------------------

    async def _launch(self) -> None:
        """Start a trio thread and wait until it listens."""
        for address in self._listen:
            listening.check_free(str(address))
        self._core = Core(self._settings(), self._callbacks(), asyncio.get_running_loop())
        try:
            bound = await self._core.start()
        except BaseException:
            self._core = None
            raise
        # A restart, also one after a crash, comes back under the addresses that others know.
        self._listen = tuple(bound)
        self._addresses = tuple(
            f"{address}/p2p/{self._peer_id}" for address in self._announce or concrete(bound)
        )

    def _settings(self) -> Settings:
        return Settings(keys=self._keys, listen=self._listen, announce=self._announce, limits=self._limits)

    def _callbacks(self) -> Callbacks:
        return Callbacks(
            handlers=self._handlers,
            topics=self._topics,
            spawn=self._spawn,
            respond=self._respond,
            judge=self._judge,
            learn=self._learn,
            forget=self._forget,
            joined=self._peer_joined,
            crashed=self._crashed,
        )

    def _running_core(self) -> Core:
        if not self.running:
            raise LocalError("the network is not started", hint="weft up")
        if self._core is None:
            raise Unreachable("the network is starting again", hint="try again in a moment")
        return self._core

    def _crashed(self, core: object, error: BaseException | None) -> None:
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
            except Exception:
                log.exception("libp2p cannot start again")

    # -- told by the thread, on the event loop ---------------------------------------------------------

    def _learn(self, core: object, info: PeerInfo) -> None:
        if self._core is core:
            self._infos[info.peer] = info
            self._peer_connected(info.peer)

    def _forget(self, core: object, peer: PeerId) -> None:
        if self._core is core:
            self._infos.pop(peer, None)
            self._peer_disconnected(peer)
