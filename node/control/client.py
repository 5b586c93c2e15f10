"""The control API from a command line: one blocking call each, errors typed, answers as protobuf messages.

with ControlClient.connect(Home.default()) as node:
    node.status().peer_id
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from node.control import running
from node.control.status import from_rpc_error
from node.home import Home
from node.wire.v1 import control_pb2 as pb
from node.wire.v1 import control_pb2_grpc, selection_pb2_grpc
from node.wire.v1 import selection_pb2 as selection_pb

DEADLINE = 30.0
"""Seconds for a call that only looks; what talks to peers may take PEERS_DEADLINE."""
PEERS_DEADLINE = 120.0
PAGE = 500


class ControlClient:
    """A connection to the node of one home; close it, or use it as a context manager."""

    def __init__(self, control_api: str, token: str) -> None:
        self._channel = grpc.insecure_channel(control_api)
        self._stub = control_pb2_grpc.NodeStub(self._channel)  # type: ignore[no-untyped-call]
        self._selection = selection_pb2_grpc.SelectionStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = (("authorization", f"Bearer {token}"),)

    @classmethod
    def connect(cls, home: Home) -> Self:
        """Reach the node that runs for `home`; raises NodeNotRunning."""
        return cls(running.require(home).control_api, running.read_token(home))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

    def status(self) -> pb.GetStatusResponse:
        """Who the node is, where it listens and how it does."""
        answer: pb.GetStatusResponse = self._call(self._stub.GetStatus, pb.GetStatusRequest())
        return answer

    def shutdown(self) -> None:
        """Ask the node to stop; it answers before it does."""
        self._call(self._stub.Shutdown, pb.ShutdownRequest())

    def peers(self) -> list[pb.PeerView]:
        """Every connected peer."""
        pages = self._pages(self._stub.ListPeers, pb.ListPeersRequest)
        return [peer for page in pages for peer in page.peers]

    def invite(self) -> str:
        """A ticket with which another node joins."""
        ticket: str = self._call(self._stub.CreateInvite, pb.CreateInviteRequest()).ticket
        return ticket

    def join(self, ticket: str) -> pb.JoinNetworkResponse:
        """Connect to the node that made the ticket, now and after every restart."""
        answer: pb.JoinNetworkResponse = self._call(
            self._stub.JoinNetwork, pb.JoinNetworkRequest(ticket=ticket), PEERS_DEADLINE
        )
        return answer

    def announce(self) -> pb.AnnounceResponse:
        """Tell the peers what lies on the shelf now."""
        answer: pb.AnnounceResponse = self._call(self._stub.Announce, pb.AnnounceRequest())
        return answer

    def search(self, query: str) -> list[pb.Expert]:
        """Experts in the catalogue whose words match."""
        pages = self._pages(self._stub.SearchExperts, pb.SearchExpertsRequest, query=query)
        return [expert for page in pages for expert in page.experts]

    def plan(self, recipe: str) -> pb.PlanMergeResponse:
        """Resolve and seal a recipe (YAML) without moving anything."""
        answer: pb.PlanMergeResponse = self._call(
            self._stub.PlanMerge, pb.PlanMergeRequest(recipe=recipe), PEERS_DEADLINE
        )
        return answer

    def start_merge(
        self,
        recipe: str,
        directory: Path,
        *,
        publish_as: str = "",
        how: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> pb.Job:
        """Start a merge of a recipe (YAML) into `directory`, or take up the unfinished one.

        `how` may say threads, max_memory (bytes) and perplexity (the path of a text).
        """
        request = pb.StartMergeRequest(
            request_id=uuid.uuid4().hex,
            recipe=recipe,
            directory=str(directory.absolute()),
            publish_as=publish_as,
            resume=resume,
            **(how or {}),
        )
        return self._job(self._stub.StartMerge, request)

    def start_evolve(
        self, recipe: str, directory: Path, search: Mapping[str, Any], *, resume: bool = False
    ) -> pb.Job:
        """Start a search for the coefficients of a recipe (YAML), or take up the unfinished one.

        `search` says tasks, reported, shape, layers, seed, budget and processes, as the node's jobs do.
        """
        shape = {**search["shape"], "layers": search["layers"]}
        request = pb.StartEvolveRequest(
            request_id=uuid.uuid4().hex,
            recipe=recipe,
            directory=str(directory.absolute()),
            resume=resume,
            tasks=search["tasks"],
            reported=search["reported"],
            shape=pb.Shape(**shape),
            seed=search["seed"],
            budget=search["budget"],
            processes=search.get("processes"),
        )
        return self._job(self._stub.StartEvolve, request)

    def start_get(self, model: str, *, publisher: str = "") -> pb.Job:
        """Start to fetch an expert, by its name or the beginning of its id."""
        request = pb.StartGetRequest(request_id=uuid.uuid4().hex, model_id=model, publisher=publisher)
        return self._job(self._stub.StartGet, request)

    def start_audit(self, subject: str) -> pb.Job:
        """Start to re-execute a merge: an absolute directory, or a model that a peer holds."""
        request = pb.StartAuditRequest(request_id=uuid.uuid4().hex, subject=subject)
        return self._job(self._stub.StartAudit, request)

    def candidates(self, references: Sequence[str]) -> list[selection_pb.Candidate]:
        """Models as far as their fingerprints tell, from this node's shelf or from peers."""
        request = selection_pb.ReadCandidatesRequest(references=references)
        return [answer.candidate for answer in self._stream(self._selection.ReadCandidates, request)]

    def partners(
        self, sketch: bytes, count: int, *, base: bytes = b""
    ) -> list[selection_pb.FindPartnersResponse]:
        """The advertised models that are nearest to the one of a mini, best first."""
        request = selection_pb.FindPartnersRequest(sketch=sketch, base=base, count=count)
        return list(self._stream(self._selection.FindPartners, request))

    def outcomes(self) -> list[selection_pb.ListOutcomesResponse]:
        """What merges turned out to be worth, as peers and this node say."""
        return list(self._stream(self._selection.ListOutcomes, selection_pb.ListOutcomesRequest()))

    def record_outcome(self, outcome: bytes) -> str:
        """Sign an outcome as this node's and tell everybody; its digest."""
        request = selection_pb.RecordOutcomeRequest(outcome=outcome)
        digest: str = self._call(self._selection.RecordOutcome, request).digest
        return digest

    def faults(self) -> list[selection_pb.FaultView]:
        """What is said about fingerprints."""
        pages = self._pages(self._selection.ListFaults, selection_pb.ListFaultsRequest)
        return [fault for page in pages for fault in page.faults]

    def jobs(self) -> list[pb.Job]:
        """Every job, newest first."""
        return [job for page in self._pages(self._stub.ListJobs, pb.ListJobsRequest) for job in page.jobs]

    def watch(self, job_id: str) -> Iterator[pb.Job]:
        """The job now and whenever it changes, until it has ended."""
        try:
            for update in self._stub.WatchJob(pb.WatchJobRequest(id=job_id), metadata=self._metadata):
                yield update.job
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def cancel(self, job_id: str) -> pb.Job:
        """Stop a job."""
        return self._job(self._stub.CancelJob, pb.CancelJobRequest(id=job_id))

    def settle(self, job_id: str) -> pb.Job:
        """End a search with the best that it has found."""
        return self._job(self._stub.SettleJob, pb.SettleJobRequest(id=job_id))

    def resume(self, job_id: str) -> pb.Job:
        """Take up a job that failed or was cancelled."""
        return self._job(self._stub.ResumeJob, pb.ResumeJobRequest(id=job_id))

    def _stream(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        try:
            yield from method(request, metadata=self._metadata, timeout=PEERS_DEADLINE)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def _call(self, method: Callable[..., Any], request: Any, deadline: float = DEADLINE) -> Any:
        try:
            return method(request, metadata=self._metadata, timeout=deadline)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def _job(self, method: Callable[..., Any], request: Any) -> pb.Job:
        job: pb.Job = self._call(method, request, PEERS_DEADLINE).job
        return job

    def _pages(self, method: Callable[..., Any], request: type, **fields: Any) -> Iterator[Any]:
        token = ""
        while True:
            page = self._call(method, request(page_size=PAGE, page_token=token, **fields))
            yield page
            token = page.next_page_token
            if not token:
                return
