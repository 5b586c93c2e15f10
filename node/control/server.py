"""The control API's server: gRPC on loopback, behind a token; health and reflection for tools.

It translates and nothing else: each method asks one service and says the answer as a message.
"""

from __future__ import annotations

import hmac
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from merge_core import recipe as recipes
from merge_core.digest import Digest
from merge_core.errors import MergeCoreError
from merge_core.evolution.genome import Shape
from merge_core.evolution.record import MAX_TASKS
from merge_core.simmerge.choosing.outcomes import Outcome
from node.catalog.book import AdvertBook, Query
from node.catalog.gossip import Gossip
from node.catalog.shelf import Shelf
from node.config import Config
from node.control import views
from node.control.selection import SelectionServicer
from node.control.status import to_status
from node.domain.job import Created, JobKind, JobState
from node.domain.ticket import Ticket
from node.errors import LocalError, NotEnoughPeers, UsageError, WeftError
from node.home import Home
from node.identity.keyring import Identity
from node.jobs.runner import Jobs, JobView
from node.merging.evolve import Search, folder_of
from node.merging.how import How
from node.merging.merge import Merging
from node.network.base import Network
from node.provenance.fault import Fault, accusations
from node.records.book import RecordBook
from node.records.gossip import RecordGossip
from node.selection.seek import Seeker
from node.wire.v1 import control_pb2 as pb
from node.wire.v1 import control_pb2_grpc, selection_pb2_grpc

SERVICE, SELECTION = "weft.v1.Node", "weft.v1.Selection"
MAX_MESSAGE = 4 << 20
MAX_PAGE = 500
MAX_THREADS = 256
_REQUEST_ID = re.compile(r"[0-9A-Za-z-]{8,64}")
_OPEN_TO_ALL = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the control API puts into a person's hands; `stop` asks the node to end."""

    home: Home
    settings: Config
    identity: Identity
    network: Network
    peer_api: str
    shelf: Shelf
    book: AdvertBook
    gossip: Gossip
    faults: RecordBook[Fault]
    outcomes: RecordGossip[Outcome]
    seeker: Seeker
    merging: Merging
    jobs: Jobs
    join: Callable[[Ticket], Awaitable[None]]
    stop: Callable[[], None]
    clock: Callable[[], float]
    started_at: float


class NodeServicer(control_pb2_grpc.NodeServicer):
    """One method an RPC; errors are raised typed and described by the interceptor."""

    def __init__(self, services: Services) -> None:
        self._node = services

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        node = self._node
        return pb.GetStatusResponse(
            pid=os.getpid(),
            peer_id=node.identity.peer_id,
            publisher=node.identity.publisher.key_id,
            network=node.settings.network,
            addresses=node.network.addresses(),
            peer_api=node.peer_api,
            version=metadata.version("weftmerge"),
            home=str(node.home.root),
            up_seconds=node.clock() - node.started_at,
            peers=len(node.network.peers()),
            experts=len(node.shelf.experts()),
            jobs_running=node.jobs.running,
        )

    async def Shutdown(self, request: pb.ShutdownRequest, context: Any) -> pb.ShutdownResponse:
        self._node.stop()
        return pb.ShutdownResponse()

    async def ListPeers(self, request: pb.ListPeersRequest, context: Any) -> pb.ListPeersResponse:
        node = self._node
        held = Counter(listing.peer for listing in node.book.listings(node.clock()))
        said = accusations(node.faults)
        found = [views.peer(info, held[info.peer], said) for info in node.network.peers()]
        page, token = _page(found, request)
        return pb.ListPeersResponse(peers=page, next_page_token=token)

    async def CreateInvite(self, request: pb.CreateInviteRequest, context: Any) -> pb.CreateInviteResponse:
        addresses = self._node.network.addresses()
        if not addresses:
            raise LocalError("this node listens on no address", hint="weft up --listen /ip4/0.0.0.0/tcp/9350")
        ticket = Ticket(network=self._node.settings.network, addresses=addresses)
        return pb.CreateInviteResponse(ticket=str(ticket))

    async def JoinNetwork(self, request: pb.JoinNetworkRequest, context: Any) -> pb.JoinNetworkResponse:
        ticket = _ticket(request.ticket)
        await self._node.join(ticket)
        return pb.JoinNetworkResponse(network=ticket.network, peer_id=ticket.peer)

    async def Announce(self, request: pb.AnnounceRequest, context: Any) -> pb.AnnounceResponse:
        self._node.shelf.refresh()
        sequence, experts = await self._node.gossip.announce()
        return pb.AnnounceResponse(sequence=sequence, experts=experts)

    async def SearchExperts(self, request: pb.SearchExpertsRequest, context: Any) -> pb.SearchExpertsResponse:
        node = self._node
        found = node.book.search(Query(text=request.query), node.clock())
        page, token = _page(views.experts(found, node.identity.peer_id, accusations(node.faults)), request)
        return pb.SearchExpertsResponse(experts=page, next_page_token=token)

    async def PlanMerge(self, request: pb.PlanMergeRequest, context: Any) -> pb.PlanMergeResponse:
        return views.plan(await self._node.merging.plan(recipes.parse(request.recipe)))

    async def StartMerge(self, request: pb.StartMergeRequest, context: Any) -> pb.StartMergeResponse:
        recipe = recipes.parse(request.recipe).to_yaml()
        created = Created(
            kind=JobKind.MERGE,
            title=f"merge into {Path(request.directory).name}",
            request={
                "recipe": recipe,
                "directory": _absolute(request.directory),
                "publish_as": request.publish_as,
                **_how(request).to_json(),
            },
        )
        if request.resume:
            return pb.StartMergeResponse(job=self._resume(created, ("recipe",)))
        _refuse_existing(request.directory, created.kind)
        return pb.StartMergeResponse(job=self._start(request.request_id, created))

    async def StartEvolve(self, request: pb.StartEvolveRequest, context: Any) -> pb.StartEvolveResponse:
        recipe, search = recipes.parse(request.recipe).to_yaml(), _search(request)
        created = Created(
            kind=JobKind.EVOLVE,
            title=f"search for {Path(request.directory).name}",
            request={
                "recipe": recipe,
                "directory": _absolute(request.directory),
                **search.to_json(),
                "processes": search.processes,
            },
        )
        if request.resume:
            return pb.StartEvolveResponse(job=self._resume(created, ("recipe", *search.to_json())))
        _refuse_existing(request.directory, created.kind)
        return pb.StartEvolveResponse(job=self._start(request.request_id, created))

    async def StartGet(self, request: pb.StartGetRequest, context: Any) -> pb.StartGetResponse:
        model_id = self._one_model(request.model_id)
        if request.publisher:
            _publisher(request.publisher)
        created = Created(
            kind=JobKind.FETCH,
            title=model_id,
            request={"model_id": model_id, "publisher": request.publisher},
        )
        return pb.StartGetResponse(job=self._start(request.request_id, created))

    async def StartAudit(self, request: pb.StartAuditRequest, context: Any) -> pb.StartAuditResponse:
        subject = request.subject
        if not Path(subject).is_absolute():
            subject = self._one_model(subject)
        created = Created(kind=JobKind.AUDIT, title=f"audit of {subject}", request={"subject": subject})
        return pb.StartAuditResponse(job=self._start(request.request_id, created))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        size = _page_size(request)
        found = self._node.jobs.newest(size, request.page_token or None)
        token = found[-1].id if len(found) == size else ""
        return pb.ListJobsResponse(jobs=[views.job(JobView(job=j)) for j in found], next_page_token=token)

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> AsyncIterator[pb.WatchJobResponse]:
        async for view in self._node.jobs.watch(self._node.jobs.find(request.id).id):
            yield pb.WatchJobResponse(job=views.job(view))

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        job = await self._node.jobs.cancel(self._node.jobs.find(request.id).id)
        return pb.CancelJobResponse(job=views.job(JobView(job=job)))

    async def SettleJob(self, request: pb.SettleJobRequest, context: Any) -> pb.SettleJobResponse:
        job = await self._node.jobs.settle(self._node.jobs.find(request.id).id)
        return pb.SettleJobResponse(job=views.job(JobView(job=job)))

    async def ResumeJob(self, request: pb.ResumeJobRequest, context: Any) -> pb.ResumeJobResponse:
        job = self._node.jobs.resume(self._node.jobs.find(request.id).id)
        return pb.ResumeJobResponse(job=views.job(JobView(job=job)))

    def _resume(self, created: Created, same: tuple[str, ...]) -> pb.Job:
        """Take up the newest unfinished job of this kind into the same directory; raises LocalError for none,
        or one in whose request a key of `same` says something else."""
        wanted, verb = created.request["directory"], created.kind.value
        for job in self._node.jobs.newest(MAX_PAGE):
            unfinished = job.kind is created.kind and job.state is not JobState.SUCCEEDED
            if unfinished and job.request["directory"] == wanted:
                differ = [key for key in same if job.request[key] != created.request[key]]
                if differ:
                    raise LocalError(
                        f"the unfinished {verb} into {wanted} has another {differ[0]}",
                        hint=f"weft jobs resume {job.id[:8]}, or name another output",
                    )
                return views.job(JobView(job=self._node.jobs.resume(job.id)))
        raise LocalError(f"there is no unfinished {verb} into {wanted}", hint="weft jobs ls")

    def _one_model(self, beginning: str) -> str:
        """The id of the one advertised model that begins so, or is called so."""
        node = self._node
        digits = beginning.removeprefix("sha256:")
        found = {
            str(listing.model.model_id)
            for listing in node.book.listings(node.clock())
            if listing.model.name == beginning or (digits and listing.model.model_id.hex.startswith(digits))
        }
        if len(found) != 1:
            why = f"{len(found)} models begin with" if found else "nobody advertises"
            raise NotEnoughPeers(f"{why} {beginning[:80]}", hint="weft search")
        return found.pop()

    def _start(self, job_id: str, created: Created) -> pb.Job:
        if not _REQUEST_ID.fullmatch(job_id):
            raise UsageError("request_id is 8 to 64 letters and digits", hint="weft jobs ls")
        return views.job(JobView(job=self._node.jobs.start(job_id, created)))


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Let nobody in without the token, and describe typed errors; health and reflection are open."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], details: Any) -> Any:
        """Replace the method by one that refuses, or by one that explains what it raises."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(_OPEN_TO_ALL):
            return handler
        said = dict(details.invocation_metadata or ()).get("authorization", "")
        allowed = hmac.compare_digest(str(said).encode(), self._expected)
        if handler.response_streaming:
            return handler._replace(unary_stream=_streaming(handler.unary_stream, allowed))
        return handler._replace(unary_unary=_unary(handler.unary_unary, allowed))


def _unary(method: Callable[..., Awaitable[Any]], allowed: bool) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        if not allowed:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")
        try:
            return await method(request, context)
        except (WeftError, MergeCoreError) as error:
            return await context.abort_with_status(to_status(error))

    return guarded


def _streaming(method: Callable[..., AsyncIterator[Any]], allowed: bool) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        if not allowed:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")
        try:
            async for message in method(request, context):
                yield message
        except (WeftError, MergeCoreError) as error:
            await context.abort_with_status(to_status(error))

    return guarded


@dataclass(frozen=True, slots=True)
class ControlServer:
    """A server that answers; `address` is host:port as it was bound."""

    address: str
    _server: grpc.aio.Server

    async def stop(self) -> None:
        """Refuse new calls, give running ones a second, and end."""
        await self._server.stop(grace=1.0)


async def start(services: Services, token: str) -> ControlServer:
    """Answer on the loopback address of the settings; raises LocalError when the port is in use."""
    server = grpc.aio.server(
        interceptors=(Guard(token),),
        options=(
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
        ),
    )
    control_pb2_grpc.add_NodeServicer_to_server(NodeServicer(services), server)  # type: ignore[no-untyped-call]
    selection_pb2_grpc.add_SelectionServicer_to_server(  # type: ignore[no-untyped-call]
        SelectionServicer(services.identity.peer_id, services.seeker, services.faults, services.outcomes),
        server,
    )
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection(
        (SERVICE, SELECTION, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    host, _, _ = services.settings.control_api.rpartition(":")
    try:
        port = server.add_insecure_port(services.settings.control_api)
    except RuntimeError as error:
        raise LocalError(
            f"the control API cannot listen on {services.settings.control_api}: the port is in use",
            hint="weft up --control-api 127.0.0.1:0",
        ) from error
    await server.start()
    for name in ("", SERVICE):
        await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    return ControlServer(address=f"{host}:{port}", _server=server)


def _absolute(directory: str) -> str:
    if not Path(directory).is_absolute():
        raise UsageError(f"{directory} is not an absolute path", hint="weft merge RECIPE -o DIR")
    if not Path(directory).parent.is_dir():
        raise LocalError(
            f"{Path(directory).parent} is not a directory", hint=f"mkdir -p {Path(directory).parent}"
        )
    return directory


def _how(request: pb.StartMergeRequest) -> How:
    if request.threads < 0 or request.threads > MAX_THREADS or request.max_memory < 0:
        raise UsageError(f"threads are 0 to {MAX_THREADS}, memory is not negative", hint="weft merge --help")
    if request.perplexity:
        _absolute(request.perplexity)
    return How(threads=request.threads, max_memory=request.max_memory, perplexity=request.perplexity)


def _search(request: pb.StartEvolveRequest) -> Search:
    """What a request seeks; raises UsageError where that cannot be."""
    usage = "weft evolve --help"
    for named in (*request.tasks, *request.reported):
        if named.endswith(".jsonl") and not Path(named).is_absolute():
            raise UsageError(f"{named} is not an absolute path", hint=usage)
    if not 1 <= len(request.tasks) <= MAX_TASKS or len(request.reported) > MAX_TASKS:
        raise UsageError(f"1 to {MAX_TASKS} tasks are sought by", hint=usage)
    if request.budget < 1 or min(request.seed, request.processes, request.shape.layers) < 0:
        raise UsageError("budget, seed, layers and processes are counts", hint=usage)
    shape = request.shape
    return Search(
        tasks=tuple(request.tasks),
        reported=tuple(request.reported),
        shape=Shape(
            groups=shape.groups,
            components=shape.components,
            densities=shape.densities,
            operators=tuple(shape.operators),
        ),
        layers=shape.layers if shape.HasField("layers") else None,
        seed=request.seed,
        budget=request.budget,
        processes=request.processes or None,
    )


def _refuse_existing(directory: str, kind: JobKind) -> None:
    if Path(directory).exists():
        raise LocalError(f"{directory} exists", hint=f"weft {kind} RECIPE -o {directory}-2")
    if kind is JobKind.EVOLVE and folder_of(Path(directory)).exists():
        raise LocalError(
            f"an interrupted search for {directory} lies here",
            hint=f"weft evolve RECIPE -o {directory} --resume, or rm -r {folder_of(Path(directory))}",
        )


def _page(found: list[Any], request: Any) -> tuple[list[Any], str]:
    """One page of a list: the token is the number of items before it."""
    begin = int(request.page_token) if request.page_token.isdigit() else 0
    end = begin + _page_size(request)
    return found[begin:end], str(end) if end < len(found) else ""


def _page_size(request: Any) -> int:
    return min(MAX_PAGE, request.page_size) if request.page_size > 0 else MAX_PAGE


def _publisher(text: str) -> Digest:
    try:
        return Digest(text)
    except ValueError as error:
        raise UsageError(f"not a publisher key id: {error}", hint="weft --json search") from error


def _ticket(text: str) -> Ticket:
    try:
        return Ticket.parse(text)
    except ValueError as error:
        raise UsageError(f"not a ticket: {error}", hint="ask the other node for: weft invite") from error
