"""Gossip: this node's adverts go out to its peers, theirs come in; a newcomer asks for what was said before.

Two ways lead into the book, and both end in `AdvertBook.admit`: GossipSub, for what is said now, and one
request at each new connection, in pages, for what is still valid from before. What a peer tells of itself in
answer to such a request is passed on: others may have asked everybody just before that peer came.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from merge_core.digest import canonical, parse_canonical
from node.catalog.book import START, Admission, AdvertBook, Outcome, Place
from node.catalog.shelf import Shelf
from node.domain import text
from node.domain.advert import MAX_LIFETIME, AdvertisedModel
from node.domain.ids import PeerId
from node.domain.negotiation import Purpose
from node.domain.reasons import Reason
from node.errors import PeerError, Refused, VerificationFailed, WeftError
from node.identity.envelopes import Envelope
from node.identity.keys import HostKey
from node.network.base import MAX_MESSAGE, Change, Network, PeerEvent, Verdict

PROTOCOL = "/weft/adverts/1"
DEADLINE = 15.0
RENEW_AFTER = MAX_LIFETIME / 2
MAX_PAGES = 1024
_PAGE = MAX_MESSAGE - 1024
_AT_ONCE = 64
"""Adverts that are read from the book for one page, so that no page costs more than another."""

Sleep = Callable[[float], Awaitable[None]]

log = logging.getLogger(__name__)


class Gossip:
    """The adverts of one node in one network; an owner awaits `run`."""

    def __init__(
        self,
        network: Network,
        book: AdvertBook,
        shelf: Shelf,
        key: HostKey,
        *,
        name: str,
        purposes: Callable[[str], Sequence[Purpose]],
        clock: Callable[[], float],
    ) -> None:
        """`name` is the network's; `purposes` says what the policy grants experts of a licence for."""
        self._network = network
        self._book = book
        self._shelf = shelf
        self._key = key
        self._name = name
        self._purposes = purposes
        self._clock = clock
        self._topic = f"/weft/{name}/adverts/1"
        self._joined: asyncio.Queue[PeerId] = asyncio.Queue()
        self._connected: set[PeerId] = set()

    def start(self) -> None:
        """Listen to what peers say; call it before any of them is dialled."""
        self._network.subscribe(self._topic, self._validate, self._deliver)
        self._network.handle(PROTOCOL, self._answer)
        self._network.on_peer(self._notice)

    async def announce(self) -> tuple[int, int]:
        """Say what lies on the shelf now; returns the last sequence number and how many experts."""
        models = self._models()
        said = self._book.announce(models, self._key, self._clock(), addresses=self._network.addresses())
        for data in said:
            await self._network.publish(self._topic, data)
        seq = json.loads(Envelope.parse(said[-1]).payload)["seq"]
        return int(seq), len(models)

    async def run(self, sleep: Sleep = asyncio.sleep) -> None:
        """Ask every peer that joins, and renew the adverts before they expire, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew(sleep))
            while True:
                group.create_task(self._ask(await self._joined.get()))

    async def _renew(self, sleep: Sleep) -> None:
        while True:
            await sleep(RENEW_AFTER)
            self._book.forget(self._clock())
            await self.announce()

    def _models(self) -> list[AdvertisedModel]:
        intact = [expert for expert in self._shelf.experts() if not expert.changed]
        return [expert.advertised(self._purposes(expert.licence)) for expert in intact]

    def _notice(self, event: PeerEvent) -> None:
        if event.change is Change.CONNECTED:
            self._connected.add(event.peer)
        elif event.change is Change.DISCONNECTED:
            self._connected.discard(event.peer)
        else:
            self._joined.put_nowait(event.peer)

    def _validate(self, author: PeerId, data: bytes) -> Verdict:
        outcome = self._admit(data, author).outcome
        if outcome.counts_against:
            return Verdict.REJECT
        # A contradiction is passed on too: whoever has the other half then holds the proof.
        news = outcome in (Outcome.NEW, Outcome.CONTRADICTION)
        own = outcome is Outcome.OWN
        return Verdict.ACCEPT if news or own else Verdict.IGNORE

    def _admit(self, data: bytes, told_by: PeerId) -> Admission:
        connected = self._connected.__contains__
        return self._book.admit(data, self._clock(), told_by=told_by, connected=connected)

    async def _deliver(self, author: PeerId, data: bytes) -> None:
        log.debug("an advert of %s", author.short)

    async def _answer(self, peer: PeerId, payload: bytes) -> bytes:
        try:
            asked = text.fields(parse_canonical(payload), {"network", "after"})
            after = _place(asked["after"])
        except (ValueError, TypeError, RecursionError) as error:
            raise Refused(Reason.MALFORMED, str(error)[:200]) from error
        if asked["network"] != self._name:
            raise Refused(Reason.WRONG_NETWORK)
        return _page(self._book.envelopes(self._clock(), after=after, limit=_AT_ONCE))

    async def _ask(self, peer: PeerId) -> None:
        """Take every advert that a peer knows; a peer that answers nonsense is left alone."""
        after: Place | None = START
        try:
            for _ in range(MAX_PAGES):
                request = canonical({"network": self._name, "after": after})
                adverts, after = _read(
                    await self._network.request(peer, PROTOCOL, request, deadline=DEADLINE)
                )
                for data in adverts:
                    admission = self._admit(data, peer)
                    if (
                        admission.outcome is Outcome.NEW
                        and admission.advert
                        and admission.advert.peer == peer
                    ):
                        await self._network.publish(self._topic, data)
                    await asyncio.sleep(0)  # a page takes long enough for others to want their turn
                if after is None:
                    return
        except WeftError as error:
            log.info("peer %s told no adverts: %s", peer.short, error)


def _page(listed: Sequence[tuple[Place, bytes]]) -> bytes:
    """As many adverts as fit into one message, and the place of the last where there may be more."""
    chosen: list[Any] = []
    last: Place | None = None
    used = 0
    for place, data in listed:
        used += len(data) + 1
        if used > _PAGE:
            break
        chosen.append(json.loads(data))
        last = place
    return canonical({"adverts": chosen, "next": last})


def _read(reply: bytes) -> tuple[list[bytes], Place | None]:
    """A page as a peer sent it; raises PeerError."""
    try:
        value = text.fields(parse_canonical(reply), {"adverts", "next"})
        adverts = [Envelope.from_json(item).to_bytes() for item in value["adverts"]]
        return adverts, None if value["next"] is None else _place(value["next"])
    except (ValueError, TypeError, RecursionError, VerificationFailed) as error:
        raise PeerError(f"the peer's adverts cannot be read: {error}") from error


def _place(value: Any) -> Place:
    peer, seq = value
    return text.text(peer, 128, "a place"), text.integer(seq, "a place")
