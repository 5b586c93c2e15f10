"""Signing what this node publishes: the records go into the directory, then the signature over all of it.

    publish  a checkpoint as it is: manifest, publisher, model.sig
    attest   a merge: plan, Trace, agreements and provenance too
    record   a merge on a machine without an identity: the same files, nothing signed

`attest` and `record` run on the hidden folder of a CheckpointWriter, before it is renamed into place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from merge_core.checkpoint.manifest import Manifest
from merge_core.checkpoint.published import (
    AGREEMENTS_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    PROVENANCE_FILE,
    PUBLISHER_FILE,
    SIGNATURE_FILE,
    TRACE_FILE,
    survey,
)
from merge_core.digest import Digest, ModelId, sha256
from merge_core.files import replace
from merge_core.plan import MergePlan
from merge_core.trace import Trace
from node.identity.envelopes import Envelope
from node.identity.keyring import Identity
from node.provenance import agreements as negotiated
from node.provenance import oms
from node.provenance.statement import MergeProvenance, Parent, origins

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is known of a parent besides its bytes: licence (SPDX or NOASSERTION) and publisher's key id."""

    licence: str
    publisher: Digest | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """A merge that was run: what went in by plan and terms, and what came out."""

    plan: MergePlan
    trace: Trace
    manifest: Manifest
    terms: Mapping[ModelId, Terms]
    agreements: tuple[Envelope, ...] = ()


def publish(
    directory: Path,
    identity: Identity,
    manifest: Manifest,
    digests: Mapping[str, Digest] | None = None,
    *,
    on_progress: Progress | None = None,
) -> None:
    """Add manifest, publisher record and signature to a checkpoint; `digests` are SHA-256s known already.

    Raises LocalError or CorruptCheckpoint where the directory cannot be signed.
    """
    _write(directory, {MANIFEST_FILE: manifest.to_bytes(), PUBLISHER_FILE: identity.binding.to_bytes()})
    oms.sign_directory(
        directory, identity.publisher, digests, name=manifest.model_id, on_progress=on_progress
    )


def attest(
    directory: Path,
    identity: Identity,
    merge: Merge,
    *,
    engine: str,
    finished_at: float,
    on_progress: Progress | None = None,
) -> MergeProvenance:
    """Record a merge in its directory, state where it comes from, and sign all of it.

    `engine` is the version of this package. `on_progress` gets bytes hashed. Raises VerificationFailed where
    plan, Trace, manifest and agreements do not fit each other.
    """
    files = _files(merge) | {PUBLISHER_FILE: identity.binding.to_bytes()}
    _write(directory, files)
    found = survey(directory)
    names = {*found.published, *found.records} - {PROVENANCE_FILE, SIGNATURE_FILE}
    digests = oms.hash_files(directory, sorted(names), on_progress)
    agreed = files.get(AGREEMENTS_FILE)
    provenance = MergeProvenance(
        subjects=tuple(sorted(digests.items())),
        plan=merge.plan.digest,
        trace=merge.trace.digest,
        agreements=None if agreed is None else sha256(agreed),
        parents=parents_of(merge.plan, merge.terms),
        tensors=origins(merge.plan, merge.manifest),
        builder=identity.peer_id,
        engine=engine,
        finished_at=int(finished_at),
    )
    _write(directory, {PROVENANCE_FILE: provenance.seal(identity.publisher)})
    oms.sign_directory(directory, identity.publisher, digests, name=merge.manifest.model_id)
    return provenance


def record(directory: Path, merge: Merge) -> None:
    """Record a merge in its directory without signing anything."""
    _write(directory, _files(merge))


def parents_of(plan: MergePlan, terms: Mapping[ModelId, Terms]) -> tuple[Parent, ...]:
    """The inputs in the plan's order; raises KeyError where the terms of one are missing."""
    return tuple(
        Parent(
            model_id=model_id,
            role="base" if index == plan.base else "expert",
            licence=terms[model_id].licence,
            publisher=terms[model_id].publisher,
        )
        for index, model_id in enumerate(plan.inputs)
    )


def _files(merge: Merge) -> dict[str, bytes]:
    files = {
        MANIFEST_FILE: merge.manifest.to_bytes(),
        PLAN_FILE: merge.plan.to_bytes(),
        TRACE_FILE: merge.trace.to_bytes(),
    }
    if merge.agreements:
        files[AGREEMENTS_FILE] = negotiated.pack(merge.agreements)
    return files


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        replace(directory / name, data)
