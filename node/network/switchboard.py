"""What every network does on the event loop: handlers, topics, listeners, and the task that owns the rest.

An implementation inherits from it, reports what arrives (`_peer_connected`, `_respond`, `_judge`) and carries
what leaves. Everything here runs on the loop that called `start`; nothing is shared with other threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from node.domain.ids import PeerId
from node.errors import LocalError
from node.network.base import (
    Change,
    Deliver,
    Handler,
    OnPeer,
    PeerEvent,
    Validate,
    Verdict,
    answer,
    check_size,
    encode_failure,
)
from node.network.flow import Limits

REMEMBERED_VERDICTS = 4096

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Topic:
    """One subscription: who judges, who receives, and what waits for it."""

    validate: Validate
    deliver: Deliver
    queue: asyncio.Queue[tuple[PeerId, bytes]]
    verdicts: OrderedDict[bytes, Verdict] = field(default_factory=OrderedDict)


class Switchboard:
    """Connects what arrives with who asked for it; the parts of a Network that need no wire."""

    def __init__(self, peer_id: PeerId, limits: Limits) -> None:
        self._peer_id = peer_id
        self._limits = limits
        self._handlers: dict[str, Handler] = {}
        self._topics: dict[str, _Topic] = {}
        self._listeners: list[OnPeer] = []
        self._present: set[PeerId] = set()
        self._joined: set[PeerId] = set()
        self._latency: dict[PeerId, float] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._running = False

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        return self._peer_id

    @property
    def running(self) -> bool:
        """Whether the network is started."""
        return self._running

    async def start(self) -> None:
        """Listen; the implementation says how."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Close; the implementation says how."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def handle(self, protocol: str, handler: Handler) -> None:
        """Answer requests of a protocol with a handler; a second one for the same protocol is a mistake."""
        if protocol in self._handlers:
            raise ValueError(f"{protocol} has a handler already")
        self._handlers[protocol] = handler

    def subscribe(self, topic: str, validate: Validate, deliver: Deliver) -> None:
        """Join a topic; a second subscription to the same topic is a mistake."""
        if topic in self._topics:
            raise ValueError(f"{topic} is subscribed already")
        self._topics[topic] = _Topic(validate, deliver, asyncio.Queue(self._limits.undelivered))
        self._spawn(self._pump, topic)

    def on_peer(self, listener: OnPeer) -> None:
        """Call `listener` at each change of a peer."""
        self._listeners.append(listener)

    # -- the owner of every task ---------------------------------------------------------------------

    def _open(self) -> None:
        """Become the owner of tasks, beginning with the delivery of every topic."""
        self._running = True
        for topic in self._topics:
            self._spawn(self._pump, topic)

    async def _close(self) -> None:
        """Cancel everything that was spawned, wait for it, and report the peers as gone."""
        self._running = False
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for peer in sorted(self._present):
            self._peer_disconnected(peer)

    def _spawn(self, function: Callable[..., Coroutine[Any, Any, Any]], *arguments: object) -> None:
        """Run a task until it ends or the network stops; a stopped network runs nothing.

        Not a task group: those cannot be added to from a plain callback, which is what other threads send.
        """
        if self._running:
            task = asyncio.get_running_loop().create_task(function(*arguments))
            self._tasks.add(task)
            task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the network failed", exc_info=error)

    # -- peers -----------------------------------------------------------------------------------------

    def _peer_connected(self, peer: PeerId) -> None:
        if peer not in self._present:
            self._present.add(peer)
            self._emit(PeerEvent(peer=peer, change=Change.CONNECTED))

    def _peer_joined(self, peer: PeerId) -> None:
        if peer in self._present and peer not in self._joined:
            self._joined.add(peer)
            self._emit(PeerEvent(peer=peer, change=Change.JOINED))

    def _peer_disconnected(self, peer: PeerId) -> None:
        if peer in self._present:
            self._present.discard(peer)
            self._joined.discard(peer)
            self._latency.pop(peer, None)
            self._emit(PeerEvent(peer=peer, change=Change.DISCONNECTED))

    def _emit(self, event: PeerEvent) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed at %s of peer %s", event.change.value, event.peer.short)

    # -- requests ----------------------------------------------------------------------------------------

    async def _respond(self, peer: PeerId, protocol: str, payload: bytes) -> bytes:
        """The framed reply to a request; raises nothing but cancellation."""
        handler = self._handlers.get(protocol)
        if handler is None:
            return encode_failure()
        return await answer(handler, peer, payload, deadline=self._limits.handler_deadline)

    # -- gossip ------------------------------------------------------------------------------------------

    def _check_publishable(self, topic: str, data: bytes) -> None:
        """Raise LimitReached or LocalError where our neighbours would drop the message and blame us."""
        check_size(data)
        found = self._topics.get(topic)
        if found is None:
            raise LocalError(f"not subscribed to {topic}")
        if found.validate(self._peer_id, data) is Verdict.REJECT:
            raise LocalError(f"our own validator of {topic} rejects the message: nobody would pass it on")

    def _judge(self, topic: str, message_id: bytes, author: PeerId, data: bytes) -> Verdict:
        """Validate a message once, queue it for delivery if accepted, and remember the verdict."""
        found = self._topics.get(topic)
        if found is None:
            return Verdict.IGNORE
        known = found.verdicts.get(message_id)
        if known is not None:
            return known
        verdict = self._validated(found, topic, author, data)
        found.verdicts[message_id] = verdict
        while len(found.verdicts) > REMEMBERED_VERDICTS:
            found.verdicts.popitem(last=False)
        if verdict is Verdict.ACCEPT:
            try:
                found.queue.put_nowait((author, data))
            except asyncio.QueueFull:
                log.warning("%s: too many messages wait for delivery; dropping one", topic)
        return verdict

    def _validated(self, found: _Topic, topic: str, author: PeerId, data: bytes) -> Verdict:
        try:
            return found.validate(author, data)
        except Exception:
            log.exception("the validator of %s failed on a message of peer %s", topic, author.short)
            return Verdict.IGNORE

    async def _pump(self, topic: str) -> None:
        """Deliver the accepted messages of one topic in order, for ever."""
        found = self._topics[topic]
        while True:
            author, data = await found.queue.get()
            try:
                await found.deliver(author, data)
            except Exception:
                log.exception("delivery on %s failed for a message of peer %s", topic, author.short)
