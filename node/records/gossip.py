"""RecordGossip: this node's records go out to its peers, theirs come in; who was apart asks for the rest.

As adverts do: GossipSub for what is said now, one request in pages for what was said before, and both end in
`RecordBook.admit`. What an answer brings is not gossiped again, since records do not expire and there may be
thousands: instead every node asks its peers again now and then.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

from merge_core.digest import canonical, parse_canonical
from node.domain import text
from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import PeerError, Refused, VerificationFailed, WeftError
from node.identity.envelopes import Envelope
from node.identity.keys import HostKey
from node.network.base import MAX_MESSAGE, Change, Network, PeerEvent, Verdict
from node.records.book import Outcome, RecordBook

DEADLINE = 15.0
ASK_AGAIN = 6 * 3600.0
"""Seconds after which every peer is asked once more for what did not reach us."""
MAX_PAGES = 1024
_PAGE = MAX_MESSAGE - 1024
_AT_ONCE = 64

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]

log = logging.getLogger(__name__)


class RecordGossip(Generic[T]):
    """The records of one kind as one node tells and hears them; an owner awaits `run`."""

    def __init__(
        self, network: Network, book: RecordBook[T], key: HostKey, *, clock: Callable[[], float]
    ) -> None:
        self._network = network
        self.book = book
        self._key = key
        self._clock = clock
        self._topic = f"/weft/{book.network}/{book.kind.name}/1"
        self._protocol = f"/weft/{book.kind.name}/1"
        self._wanted: asyncio.Queue[PeerId] = asyncio.Queue()
        self._asking: set[PeerId] = set()

    def start(self) -> None:
        """Listen to what peers say; call it before any of them is dialled."""
        self._network.subscribe(self._topic, self._validate, self._deliver)
        self._network.handle(self._protocol, self._answer)
        self._network.on_peer(self._notice)

    async def say(self, body: Any) -> None:
        """Sign a statement, keep it and tell everybody."""
        await self._network.publish(self._topic, self.book.say(body, self._key, self._clock()))

    async def run(self, sleep: Sleep = asyncio.sleep) -> None:
        """Ask every peer that joins, and all of them again at long intervals, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._again(sleep))
            while True:
                group.create_task(self._ask(await self._wanted.get()))

    async def _again(self, sleep: Sleep) -> None:
        while True:
            await sleep(ASK_AGAIN)
            for info in self._network.peers():
                self._want(info.peer)

    def _notice(self, event: PeerEvent) -> None:
        if event.change is Change.JOINED:
            self._want(event.peer)

    def _want(self, peer: PeerId) -> None:
        """Have a peer asked, once at a time, however often it comes and goes."""
        if peer not in self._asking:
            self._asking.add(peer)
            self._wanted.put_nowait(peer)

    def _validate(self, author: PeerId, data: bytes) -> Verdict:
        if author == self._key.peer_id:
            return Verdict.ACCEPT
        outcome = self.book.admit(data, self._clock())
        if outcome.counts_against:
            return Verdict.REJECT
        return Verdict.ACCEPT if outcome is Outcome.NEW else Verdict.IGNORE

    async def _deliver(self, author: PeerId, data: bytes) -> None:
        log.debug("a record of %s for %s", author.short, self.book.kind.name)

    async def _answer(self, peer: PeerId, payload: bytes) -> bytes:
        try:
            asked = text.fields(parse_canonical(payload), {"network", "after"})
            after = text.text(asked["after"], 80, "a place")
        except (ValueError, TypeError, RecursionError) as error:
            raise Refused(Reason.MALFORMED, str(error)[:200]) from error
        if asked["network"] != self.book.network:
            raise Refused(Reason.WRONG_NETWORK)
        return _page(self.book.envelopes(after=after, limit=_AT_ONCE))

    async def _ask(self, peer: PeerId) -> None:
        """Take every record that a peer knows; a peer that answers nonsense is left alone."""
        after = ""
        try:
            for _ in range(MAX_PAGES):
                request = canonical({"network": self.book.network, "after": after})
                reply = await self._network.request(peer, self._protocol, request, deadline=DEADLINE)
                records, after = _read(reply, after)
                for data in records:
                    if self.book.admit(data, self._clock()) is Outcome.MALFORMED:
                        raise PeerError("a record that is none")
                    await asyncio.sleep(0)  # a page takes long enough for others to want their turn
                if not after:
                    return
        except WeftError as error:
            log.info("peer %s told no %s: %s", peer.short, self.book.kind.name, error)
        finally:
            self._asking.discard(peer)


def _page(listed: Sequence[tuple[str, bytes]]) -> bytes:
    """As many records as fit into one message, and the place of the last where there may be more."""
    chosen: list[Any] = []
    last: str | None = None
    used = 0
    for place, data in listed:
        used += len(data) + 1
        if used > _PAGE:
            break
        chosen.append(json.loads(data))
        last = place
    return canonical({"records": chosen, "next": last})


def _read(reply: bytes, after: str) -> tuple[list[bytes], str]:
    """A page as a peer sent it, and the place of the next one, empty after the last; raises PeerError."""
    try:
        value = text.fields(parse_canonical(reply), {"records", "next"})
        records = [Envelope.from_json(item).to_bytes() for item in value["records"]]
        place = "" if value["next"] is None else text.text(value["next"], 80, "a place")
        if place and place <= after:
            raise ValueError("the next page is no later one")
        return records, place
    except (ValueError, TypeError, RecursionError, VerificationFailed) as error:
        raise PeerError(f"the peer's records cannot be read: {error}") from error
