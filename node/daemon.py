"""The running node: every service put together, in the order in which they need each other.

One event loop in the main thread; libp2p in a thread of its own; heavy work in child processes. What was
opened first is closed last, and work that is interrupted is taken up at the next start.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from merge_core.simmerge.functional import probes
from node import config
from node.catalog.book import AdvertBook
from node.catalog.expert import Origin
from node.catalog.fingerprint_cache import FingerprintCache
from node.catalog.fingerprints import Fingerprints, Known
from node.catalog.gossip import Gossip
from node.catalog.hashes import HashCache
from node.catalog.shelf import Shelf
from node.catalog.sketching import sketch_in_worker
from node.config import Config
from node.control import running, server
from node.domain.ids import PeerId
from node.domain.job import JobKind
from node.domain.ticket import Ticket
from node.errors import LocalError, Unreachable, WeftError
from node.home import Home
from node.identity import keyring
from node.identity.certificates import TlsCertificate, make_certificate
from node.identity.keyring import Identity
from node.jobs.journal import Journal
from node.jobs.runner import Jobs, Work
from node.merging.audit import Auditing
from node.merging.evolve import Evolving
from node.merging.known import KnownPlaces
from node.merging.merge import Merging
from node.merging.overlay import Overlay
from node.merging.parents import LocalParents
from node.merging.private import PrivateShelves, is_over
from node.merging.remote import NetworkParents
from node.merging.vetting import Vetting
from node.merging.work import AuditWork, FetchWork, Tidy
from node.negotiation import policy as policies
from node.negotiation.policy import Policy
from node.negotiation.provider import Provider
from node.negotiation.requester import Requester
from node.negotiation.service import Negotiation
from node.network.base import Network, parse_address
from node.network.upkeep import stay_connected
from node.peer import credentials
from node.peer.admitted import Admitted
from node.peer.credentials import CredentialExchange
from node.peer.links import Links
from node.peer.server import PeerServer
from node.provenance.fault import FAULTS
from node.records.book import Kind, RecordBook
from node.records.gossip import RecordGossip
from node.selection.outcomes import OUTCOMES
from node.selection.seek import Seeker
from node.store import Store

log = logging.getLogger(__name__)
TIDY_SECONDS = 3600.0
DIAL_SECONDS = 5.0
"""For each address of a peer: some of them may lead nowhere, and the peer has one turn for all."""
Clock = Callable[[], float]
T = TypeVar("T")


async def serve(home: Home, settings: Config, *, on_up: Callable[[], None], clock: Clock = time.time) -> None:
    """Run the node of a home until it is asked to stop by the control API, SIGTERM or SIGINT.

    Raises LocalError when there is no identity, a node runs already, a port is in use, a bootstrap address
    is malformed, or a part of the node crashed; InvalidTask when there are no such probes.
    """
    for address in settings.bootstrap:
        parse_address(address)
    probes.find(settings.probes)  # now, and not when the first merge is to be shared
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    identity = keyring.load(home.checked().identity)
    with running.alone(home):
        network = _network(settings, identity)
        async with running_node(home, settings, identity, network, stop=stop.set, clock=clock):
            on_up()
            await stop.wait()
            log.info("stopping")


@asynccontextmanager
async def running_node(
    home: Home,
    settings: Config,
    identity: Identity,
    network: Network,
    *,
    stop: Callable[[], None],
    clock: Clock,
) -> AsyncIterator[server.Services]:
    """A node that is up for as long as the context lasts; `stop` is called when it is asked to end.

    Raises LocalError when a port is in use.
    """
    async with AsyncExitStack() as stack:
        store = stack.enter_context(closing(Store(home.database)))
        shelf = Shelf(home.experts, hashes=HashCache(home.cache / "hashes"))
        book = AdvertBook(store, network=settings.network, me=identity.peer_id)
        policy = policies.load(home.policy)
        negotiation, provider = _negotiation(store, settings, identity, network, shelf, book, policy, clock)
        known = Known(shelf, FingerprintCache(home.fingerprints))
        port, exchange, certificate = await _peer_plane(
            stack, settings, identity, network, shelf, known, provider, clock
        )
        gossip = Gossip(
            network,
            book,
            shelf,
            identity.host,
            name=settings.network,
            purposes=policy.purposes_of,
            clock=clock,
        )
        gossip.start()
        fingerprints = Fingerprints(network, known)
        fingerprints.start()
        faults = _told(store, FAULTS, settings, identity, network, clock)
        outcomes = _told(store, OUTCOMES, settings, identity, network, clock)
        await stack.enter_async_context(network)
        reach = _reaching(network, book)
        links = Links(exchange, certificate, reach=reach)
        stack.push_async_callback(links.close)
        vetting = Vetting(faults.book, identity.peer_id, say=faults.say, known=known.fingerprint)
        overlay = _overlay(home, identity, book, negotiation, links, shelf, vetting, clock)
        merging, jobs = _jobs(home, identity, overlay, gossip, store, settings.probes, clock)
        await stack.enter_async_context(jobs)
        tasks = await stack.enter_async_context(_Tasks(on_crash=stop))
        tasks.add(gossip.run())
        tasks.add(faults.run())
        tasks.add(outcomes.run())
        tasks.add(_tidy(provider, overlay.private, Journal(store), clock))
        tasks.add(stay_connected(network, settings.bootstrap))
        services = server.Services(
            home=home,
            settings=settings,
            identity=identity,
            network=network,
            peer_api=f"{settings.peer_api.rpartition(':')[0]}:{port}",
            shelf=shelf,
            book=book,
            gossip=gossip,
            faults=faults.book,
            outcomes=outcomes,
            seeker=Seeker(book, fingerprints, reach=reach, distrusted=vetting.distrusted, clock=clock),
            merging=merging,
            jobs=jobs,
            join=_joiner(home, settings, network, tasks),
            stop=stop,
            clock=clock,
            started_at=clock(),
        )
        await _open_control(stack, home, services)
        await gossip.announce()
        resumed = jobs.resume_unfinished()
        log.info("up: %s, %d experts, %d jobs resumed", identity.peer_id, len(shelf.experts()), resumed)
        yield services


async def _open_control(stack: AsyncExitStack, home: Home, services: server.Services) -> None:
    """Answer the control API, and say where; from here on `weft status` finds this node."""
    control = await server.start(services, running.new_token(home))
    stack.push_async_callback(control.stop)
    running.announce(home, running.Running(pid=os.getpid(), control_api=control.address))


def _negotiation(
    store: Store,
    settings: Config,
    identity: Identity,
    network: Network,
    shelf: Shelf,
    book: AdvertBook,
    policy: Policy,
    clock: Clock,
) -> tuple[Negotiation, Provider]:
    provider = Provider(
        store,
        key=identity.host,
        network=settings.network,
        experts=shelf,
        policy=policy,
        clock=clock,
        banned=book.banned,
    )
    requester = Requester(
        store,
        key=identity.host,
        network=settings.network,
        clock=clock,
        nonce=lambda: secrets.token_hex(16),
    )
    negotiation = Negotiation(network=network, provider=provider, requester=requester)
    negotiation.start()
    return negotiation, provider


async def _peer_plane(
    stack: AsyncExitStack,
    settings: Config,
    identity: Identity,
    network: Network,
    shelf: Shelf,
    known: Known,
    provider: Provider,
    clock: Clock,
) -> tuple[int, CredentialExchange, TlsCertificate]:
    """Serve bytes to peers, and hand out our certificate for theirs; the port comes first."""
    certificate = make_certificate(identity.host, clock())
    admitted = Admitted(clock=clock, allowed=provider.serves, engaged=provider.engaged)
    peers = PeerServer(
        shelf=shelf, similarity=known, entitlements=provider, admitted=admitted, certificate=certificate
    )
    port = await peers.start(settings.peer_api)
    stack.push_async_callback(peers.stop)
    exchange = CredentialExchange(
        network=network, admitted=admitted, certificate=certificate, port=port, clock=clock
    )
    network.handle(credentials.PROTOCOL, exchange.answer)
    return port, exchange, certificate


def _network(settings: Config, identity: Identity) -> Network:
    from node.network.libp2p import Libp2pNetwork  # takes a second to import: nobody else needs it

    return Libp2pNetwork(identity.host.private_bytes, settings.listen, announce=settings.announce)


def _told(
    store: Store, kind: Kind[T], settings: Config, identity: Identity, network: Network, clock: Clock
) -> RecordGossip[T]:
    """The records of one kind, told and heard from now on."""
    book = RecordBook(store, kind, network=settings.network, me=identity.peer_id)
    gossip = RecordGossip(network, book, identity.host, clock=clock)
    gossip.start()
    return gossip


def _reaching(network: Network, book: AdvertBook) -> Callable[[PeerId], Awaitable[None]]:
    async def reach(peer: PeerId) -> None:
        """Connect to a peer that is known from its advert; raises Unreachable."""
        if any(info.peer == peer for info in network.peers()):
            return
        for address in book.addresses(peer):
            try:
                await network.connect(address, deadline=DIAL_SECONDS)
                return
            except WeftError as error:
                log.info("peer %s does not answer at %s: %s", peer.short, address, error.why)
        raise Unreachable(f"peer {peer.short} does not answer at any address that it gave", hint="weft peers")

    return reach


def _overlay(
    home: Home,
    identity: Identity,
    book: AdvertBook,
    negotiation: Negotiation,
    links: Links,
    shelf: Shelf,
    vetting: Vetting,
    clock: Clock,
) -> Overlay:
    hashes = HashCache(home.cache / "hashes")
    return Overlay(
        me=identity.peer_id,
        book=book,
        negotiation=negotiation,
        links=links,
        shelf=shelf,
        private=PrivateShelves(home.parents, home.incoming, hashes=hashes),
        hashes=hashes,
        clock=clock,
        vetting=vetting,
    )


def _jobs(
    home: Home,
    identity: Identity,
    overlay: Overlay,
    gossip: Gossip,
    store: Store,
    probes: str,
    clock: Clock,
) -> tuple[Merging, Jobs]:
    def on_shelf(model_id: Any) -> Path | None:
        expert = overlay.shelf.find(model_id)
        return expert.directory if expert else None

    async def publish(directory: Path, name: str, licence: str) -> None:
        await asyncio.to_thread(
            overlay.shelf.add,
            directory,
            identity=identity,
            sketch=partial(sketch_in_worker, probes=probes),
            now=clock(),
            name=name,
            licence=licence,
            origin=Origin.MERGED,
        )
        await gossip.announce()

    known = KnownPlaces(home.cache / "known", on_shelf)
    parents = NetworkParents(overlay, LocalParents(overlay.hashes, known, None))
    merging = Merging(parents, identity, clock=clock, known=known, publish=publish)
    auditing = Auditing(parents, identity, claims=home.claims, clock=clock)
    work: dict[JobKind, Work] = {
        JobKind.MERGE: Tidy(merging.merge, overlay.private),
        JobKind.EVOLVE: Tidy(Evolving(merging).evolve, overlay.private),
        JobKind.FETCH: Tidy(FetchWork(overlay, gossip), overlay.private),
        JobKind.AUDIT: Tidy(AuditWork(overlay, auditing), overlay.private),
    }
    return merging, Jobs(Journal(store), work, clock=clock)


async def _tidy(provider: Provider, private: PrivateShelves, journal: Journal, clock: Clock) -> None:
    """Forget what is over, once an hour, until cancelled."""
    while True:
        provider.forget()
        await asyncio.to_thread(private.sweep, lambda job: is_over(journal, job, clock()))
        await asyncio.sleep(TIDY_SECONDS)


def _joiner(
    home: Home, settings: Config, network: Network, tasks: _Tasks
) -> Callable[[Ticket], Awaitable[None]]:
    async def join(ticket: Ticket) -> None:
        """Connect to a ticket's peer and remember it; raises LocalError for another network."""
        if ticket.network != settings.network:
            raise LocalError(
                f"the ticket is for network {ticket.network!r}, this node runs in {settings.network!r}",
                hint="weft down && weft join TICKET && weft up -d",
            )
        last: WeftError | None = None
        for address in ticket.addresses:
            try:
                await network.connect(address)
            except WeftError as error:
                last = error
                continue
            config.remember(home.config, ticket)
            tasks.add(stay_connected(network, (address,)))
            return
        raise last or Unreachable("the ticket names no address", hint="ask for a new one: weft invite")

    return join


class _Tasks:
    """What runs as long as the node does; one that crashes takes the node down, in the open."""

    def __init__(self, *, on_crash: Callable[[], None]) -> None:
        self._on_crash = on_crash
        self._crash: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> _Tasks:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._crash is not None:
            raise LocalError(
                f"a part of the node crashed: {self._crash}", hint="weft doctor"
            ) from self._crash

    def add(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something until it ends or the node does."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("the node stops: %s", task, exc_info=task.exception())
            self._crash = task.exception()
            self._on_crash()
