"""One life of the trio thread: the parts that it is made of, from its start to its end."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import AsyncExitStack
from functools import partial

import trio
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from node.errors import LocalError
from node.network.libp2p.bridge import Bridge, settle
from node.network.libp2p.callbacks import Callbacks
from node.network.libp2p.connections import Connections
from node.network.libp2p.deadlines import STOP_DEADLINE, shielded
from node.network.libp2p.errors import sole
from node.network.libp2p.gossip import Gossip
from node.network.libp2p.host import Settings, build_host
from node.network.libp2p.logs import quieten
from node.network.libp2p.streams import Streams
from node.network.libp2p.swarm import Notifee

log = logging.getLogger(__name__)


class Core:
    """A host, its connections, streams and gossip, and the thread that they live in.

    `connections`, `streams` and `gossip` are made by the thread and used in it only, by way of the bridge.
    """

    connections: Connections
    streams: Streams
    gossip: Gossip

    def __init__(self, settings: Settings, callbacks: Callbacks, loop: asyncio.AbstractEventLoop) -> None:
        self._settings = settings
        self._callbacks = callbacks
        self.bridge = Bridge(loop)
        self._ready: asyncio.Future[list[Multiaddr]] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._thread = threading.Thread(target=self._live, name="libp2p", daemon=True)
        self._stopping = False

    # -- on the event loop: the life of the thread -----------------------------------------------------

    async def start(self) -> list[Multiaddr]:
        """Start the thread and return what it listens on; on the event loop."""
        quieten()
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
            self._callbacks.crashed(self, error)
        if not self._ended.done():
            self._ended.set_result(None)

    def _live(self) -> None:
        """The whole life of the thread."""
        error: BaseException | None = None
        try:
            trio.run(self._main)
        except BaseException as raised:
            error = sole(raised)
        self.bridge.tell(self._note_end, error)

    # -- in the trio thread ----------------------------------------------------------------------------

    async def _main(self) -> None:
        self._stop = trio.Event()
        self._host = build_host(self._settings, self._identified)
        self._swarm = self._host.get_network()
        self._make_parts(self._host)
        self._swarm.register_notifee(Notifee(self.connections))
        async with AsyncExitStack() as stack:
            # Services run before the first connection: a connection waits for all of them to take note of it.
            await stack.enter_async_context(self._host.run([]))
            await stack.enter_async_context(self.gossip.running())
            stack.push_async_callback(self._shut_down)
            async with trio.open_nursery() as nursery:
                self.bridge.open(nursery)
                # Only now: what is handled or subscribed from here on comes through the bridge as well.
                for protocol in tuple(self._callbacks.handlers):
                    self.streams.serve(protocol)
                for topic in tuple(self._callbacks.topics):
                    await self.gossip.join(topic)
                self.bridge.tell(settle, self._ready, await self._open_ports(), None)
                if not self._stopping:  # set before the bridge was open, the event would never come
                    await self._stop.wait()
                nursery.cancel_scope.cancel()

    def _make_parts(self, host: BasicHost) -> None:
        self.connections = Connections(
            host,
            self.bridge,
            learn=partial(self._callbacks.learn, self),
            forget=partial(self._callbacks.forget, self),
        )
        limits = self._settings.limits
        self.streams = Streams(host, self.bridge, self._callbacks, limits)
        self.gossip = Gossip(
            host, self.bridge, self._callbacks, limits, hang_up=self.connections.hang_up_soon
        )

    def _identified(self, identity: ID) -> None:
        self.connections.identified(identity)

    def _request_stop(self) -> None:
        self._stop.set()

    async def _open_ports(self) -> list[Multiaddr]:
        listen = self._settings.listen
        if not await self._swarm.listen(*listen) or len(self._swarm.listeners) < len(listen):
            raise LocalError(
                f"cannot listen on {', '.join(map(str, listen))}",
                hint="choose another address: weft up --help",
            )
        return [address for listener in self._swarm.listeners.values() for address in listener.get_addrs()]

    async def _shut_down(self) -> None:
        """Close all connections, then the rest of the host."""
        with shielded(STOP_DEADLINE):
            await self.connections.close()
            await self._host.close()
        self.gossip.close()
