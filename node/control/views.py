"""Domain values as the messages of the control API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from node.catalog.book import Listing
from node.domain.ids import PeerId
from node.domain.job import Job, JobKind, JobState
from node.domain.negotiation import Agreement
from node.identity.envelopes import Envelope
from node.jobs.runner import JobView
from node.merging.merge import Planned
from node.network.base import PeerInfo
from node.provenance.fault import Accusation, Standing
from node.selection.candidate import Candidate
from node.wire.v1 import control_pb2 as pb
from node.wire.v1 import selection_pb2 as selection_pb

_BY_WEIGHT = (Standing.FOUND, Standing.SAID, Standing.REFUTED)
_KINDS = {
    JobKind.MERGE: pb.JOB_KIND_MERGE,
    JobKind.FETCH: pb.JOB_KIND_FETCH,
    JobKind.AUDIT: pb.JOB_KIND_AUDIT,
    JobKind.EVOLVE: pb.JOB_KIND_EVOLVE,
}


def job(view: JobView) -> pb.Job:
    """A job with its live progress and what its steps came to."""
    found = view.job
    result: Mapping[str, Any] = found.result or {}
    message = pb.Job(
        id=found.id,
        kind=_KINDS[found.kind],
        state=f"JOB_STATE_{found.state.value}",
        since=found.since,
        waiting_on=found.waiting_on,
        subject=found.title,
        directory=str(result.get("directory") or found.request.get("directory", "")),
        plan=str(found.steps.get("plan", "")),
        agreements=[_agreement(item) for item in found.steps.get("agreements", [])],
        transfers=_transfers(found.steps.get("received", {})),
        model_id=str(result.get("model_id", "")),
        warnings=result.get("warnings", ()),
        licence=result.get("licence", ""),
    )
    if "report" in result:
        message.report.CopyFrom(_report(result["report"]))
    if view.progress is not None:
        message.progress.CopyFrom(
            pb.Progress(what=view.progress.what, done=view.progress.done, total=view.progress.total)
        )
    if view.generation is not None:
        message.generation.CopyFrom(_generation(view.generation))
    if "search" in result:
        message.search.CopyFrom(pb.SearchResult(**result["search"]))
    if "checked" in result:
        message.audit.CopyFrom(
            pb.AuditResult(
                checked=result["checked"],
                failed=result["failed"],
                statement=result["statement"],
                passed=result["passed"],
            )
        )
    if found.state is JobState.FAILED:
        message.error.CopyFrom(_error(found))
    return message


def peer(info: PeerInfo, experts: int, said: Sequence[Accusation] = ()) -> pb.PeerView:
    """A connected peer, how many experts it advertises, and what is said of its fingerprints."""
    return pb.PeerView(
        peer_id=info.peer,
        addresses=info.addresses,
        direction=info.direction.value,
        latency_ms=-1.0 if info.latency is None else info.latency * 1000,
        experts=experts,
        fault=_worst(a for a in said if a.sworn.author.peer_id == info.peer),
    )


def _worst(said: Iterable[Accusation]) -> str:
    """The one standing that a person should know of; empty where nothing is said."""
    found = {accusation.standing for accusation in said}
    return next((standing.value for standing in _BY_WEIGHT if standing in found), "")


def fault(accusation: Accusation) -> selection_pb.FaultView:
    """What is said of one fingerprint."""
    sworn = accusation.sworn
    return selection_pb.FaultView(
        model_id=sworn.model_id,
        fingerprint=sworn.fingerprint,
        publisher=sworn.author.publisher.key_id,
        peer_id=sworn.author.peer_id,
        finders=accusation.finders,
        standing=accusation.standing.value,
    )


def candidate(found: Candidate) -> selection_pb.Candidate:
    """A model as far as its fingerprint tells of it."""
    return selection_pb.Candidate(
        model_id=found.model_id,
        name=found.name,
        base=found.base or "",
        author=found.author or "",
        fingerprint=found.fingerprint.to_bytes(),
        moved=found.moved,
    )


def _report(told: Mapping[str, Any]) -> pb.MergeReport:
    readings = [pb.Reading(**reading) for reading in told["readings"]]
    return pb.MergeReport(**{**told, "readings": readings})


def _generation(told: Mapping[str, Any]) -> pb.Generation:
    rows = [pb.Coefficients(**row) for row in told["rows"]]
    known = pb.Generation.DESCRIPTOR.fields_by_name
    return pb.Generation(**{key: value for key, value in told.items() if key in known} | {"rows": rows})


def _agreement(envelope: Any) -> pb.AgreementView:
    agreement = Agreement.parse(Envelope.from_json(envelope).payload)
    return pb.AgreementView(
        digest=agreement.digest,
        provider=agreement.provider,
        requester=agreement.requester,
        purpose=agreement.purpose.value,
        models=agreement.models,
        expires_at=agreement.expires_at,
    )


def _transfers(received: Mapping[str, Any]) -> list[pb.Transfer]:
    return [
        pb.Transfer(peer_id=peer_id, bytes=count, seconds=seconds)
        for peer_id, (count, seconds) in sorted(received.items())
    ]


def _error(found: Job) -> pb.JobError:
    error = found.error or {}
    return pb.JobError(
        reason=error.get("kind", ""),
        why=error.get("why", ""),
        hint=error.get("hint", ""),
        exit_code=error.get("exit_code", 1),
        problems=error.get("problems", ()),
    )


def plan(planned: Planned) -> pb.PlanMergeResponse:
    """A sealed plan and what it costs."""
    inputs = [
        pb.PlanInput(
            reference=parent.reference,
            model_id=parent.model_id,
            role="base" if position == planned.plan.base else "expert",
            licence=parent.licence,
            size=parent.manifest.size,
            local=parent.directory is not None,
            holders=parent.holders,
        )
        for position, parent in enumerate(planned.parents)
    ]
    return pb.PlanMergeResponse(
        plan=planned.plan.digest,
        operator=planned.recipe.methods,
        inputs=inputs,
        tensors=planned.estimate.tensors,
        output_bytes=planned.estimate.output_bytes,
        fetch_bytes=sum(item.size for item in inputs if not item.local),
        peak_ram_bytes=planned.estimate.peak_ram_bytes,
        warnings=planned.warnings,
        read_bytes=planned.estimate.read_bytes,
        licence=planned.inherited.licence,
    )


def experts(listings: Sequence[Listing], me: PeerId, said: Sequence[Accusation] = ()) -> list[pb.Expert]:
    """Listings as one entry for each model and publisher, with everybody who holds it."""
    found: dict[tuple[str, str], pb.Expert] = {}
    for listing in listings:
        model = listing.model
        entry = found.setdefault(
            (model.model_id, model.publisher),
            pb.Expert(
                model_id=model.model_id,
                name=model.name,
                licence=model.licence,
                architecture=model.architecture,
                base=model.base or "",
                size=model.size,
                publisher=model.publisher,
                fault=_worst(
                    a
                    for a in said
                    if (a.sworn.model_id, a.sworn.author.publisher.key_id)
                    == (model.model_id, model.publisher)
                ),
            ),
        )
        if listing.peer == me:
            entry.local = True
        elif listing.peer not in entry.holders:
            entry.holders.append(listing.peer)
    return list(found.values())
