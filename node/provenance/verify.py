"""Verify a published directory: a green and red list that needs neither a node nor an identity.

    structure    a safetensors checkpoint whose headers, index and config agree
    publisher    who says that he published it, bound to a peer; pinned by the caller or unknown
    signature    every file is as the publisher signed it, none added, none missing
    manifest     every tensor and functional file hashed again gives the ModelId
    provenance   for a merge: the builder's statement; subjects, plan, trace, recipe, agreements fit it
    measured     what others measured of the model: signatures hold and speak of it; nothing is measured again
    search       where the recipe was sought: the record is of the recipe that lies here

A merge that nobody signed is a warning and no failure: its records are held against its bytes, and an audit
can still execute it again. A signature of which a part is missing is one that is broken.

Nothing here raises for a bad model: what cannot be read is a red line. What a check needs of an earlier one
that failed is not checked, and says so. Whether the plan really gives these bytes is for an audit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from merge_core import recipe as recipes
from merge_core.checkpoint.manifest import MAX_MANIFEST, Manifest
from merge_core.checkpoint.published import (
    AGREEMENTS_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    PROVENANCE_FILE,
    PUBLISHER_FILE,
    RECIPE_FILE,
    SEARCH_FILE,
    SIGNATURE_FILE,
    TRACE_FILE,
)
from merge_core.checkpoint.reader import Checkpoint, measure
from merge_core.digest import Digest, ModelId, sha256
from merge_core.errors import MergeCoreError
from merge_core.evolution.record import MAX_RECORD, SearchRecord
from merge_core.plan import MAX_PLAN, MergePlan
from merge_core.recipe import MAX_RECIPE
from merge_core.resolve import tells_of
from merge_core.trace import MAX_TRACE, Trace
from node.domain.ids import PeerId
from node.domain.negotiation import Agreement, Purpose
from node.errors import VerificationFailed, WeftError
from node.identity.binding import MAX_BINDING, Binding
from node.identity.keys import PublicPublisherKey
from node.provenance import agreements as negotiated
from node.provenance import measurement, oms
from node.provenance.files import read_record
from node.provenance.statement import MAX_PROVENANCE, MergeProvenance, open_provenance, origins

_BESIDE = ("README.md", "model.safetensors.index.json")
_NAMED = 5

T = TypeVar("T")
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of a report: `ok` is True, False, or None for what the reader has to judge."""

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What verification found; `model_id` is computed from the bytes, `publisher` is a key id."""

    checks: tuple[Check, ...]
    model_id: ModelId | None
    publisher: Digest | None
    peer: PeerId | None

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.ok is not False for check in self.checks)

    def and_check(self, check: Check) -> Report:
        """The report with one more line, as an audit adds it."""
        return replace(self, checks=(*self.checks, check))

    def to_json(self) -> dict[str, Any]:
        """The report for `--json`."""
        return {
            "ok": self.ok,
            "model_id": self.model_id,
            "publisher": self.publisher,
            "peer_id": self.peer,
            "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in self.checks],
        }


def verify(
    directory: Path,
    *,
    publisher: PublicPublisherKey | None = None,
    now: float,
    on_progress: Progress | None = None,
) -> Report:
    """Check everything that a published directory says about itself; `publisher` is who must have signed it.

    `on_progress` gets bytes hashed, possibly from other threads; every byte is hashed twice (SHA-256 and
    BLAKE3).
    """
    ledger = _Ledger()
    checkpoint = ledger.attempt("structure", lambda: _structure(directory))
    if checkpoint is None:
        return ledger.report(None, None)
    with checkpoint:
        if publisher is None and _claims_nothing(checkpoint):
            return _unsigned(ledger, checkpoint, on_progress)
        binding = ledger.attempt("publisher", lambda: _publisher(checkpoint))
        if binding is not None or publisher is not None:
            ledger.add(_pin(binding, publisher, now))
        key = publisher or (binding.publisher if binding else None)
        signed = ledger.attempt("signature", lambda: _signature(directory, key, on_progress))
        manifest = ledger.attempt("manifest", lambda: _manifest(checkpoint, on_progress))
        if _claims_merge(checkpoint):
            _merge(ledger, checkpoint, key, binding, signed, manifest)
        _measured(ledger, checkpoint, manifest)
    return ledger.report(manifest, binding)


class _Ledger:
    """Collects checks: each step gives a value and a sentence, or fails with one."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def add(self, check: Check) -> None:
        self.checks.append(check)

    def attempt(self, name: str, step: Callable[[], tuple[T, str]]) -> T | None:
        """The step's value, its line added; None and a red line when it fails."""
        try:
            value, detail = step()
        except (WeftError, MergeCoreError) as error:
            self.add(Check(name=name, ok=False, detail=error.why))
            return None
        except (OSError, ValueError) as error:
            self.add(Check(name=name, ok=False, detail=f"{type(error).__name__}: {error}"))
            return None
        self.add(Check(name=name, ok=True, detail=detail))
        return value

    def report(self, manifest: Manifest | None, binding: Binding | None) -> Report:
        return Report(
            checks=tuple(self.checks),
            model_id=manifest.model_id if manifest else None,
            publisher=binding.publisher.key_id if binding else None,
            peer=binding.peer_id if binding else None,
        )


def _structure(directory: Path) -> tuple[Checkpoint, str]:
    checkpoint = Checkpoint.open(directory)
    count, files = len(checkpoint.tensors), len(checkpoint.survey.weights)
    return checkpoint, f"{checkpoint.architecture}, {count} tensors in {files} safetensors file(s)"


def _claims_nothing(checkpoint: Checkpoint) -> bool:
    """Whether this is a merge that nobody signed; a part of a signature is a signature that is broken."""
    signed = {PUBLISHER_FILE, SIGNATURE_FILE, PROVENANCE_FILE, AGREEMENTS_FILE}
    recorded = {MANIFEST_FILE, PLAN_FILE, TRACE_FILE}
    records = set(checkpoint.survey.records)
    return signed.isdisjoint(records) and recorded <= records


def _unsigned(ledger: _Ledger, checkpoint: Checkpoint, on_progress: Progress | None) -> Report:
    """What can be said of a merge on a machine without an identity: whether its records fit its bytes."""
    ledger.attempt("files", lambda: _only_known(checkpoint))
    detail = "unsigned: nobody vouches for these files; weft init, then merging again, signs them"
    ledger.add(Check(name="signature", ok=None, detail=detail))
    manifest = ledger.attempt("manifest", lambda: _manifest(checkpoint, on_progress))
    plan = ledger.attempt("plan", lambda: _unsigned_plan(checkpoint, manifest))
    ledger.attempt("trace", lambda: _unsigned_trace(checkpoint, plan))
    if RECIPE_FILE in checkpoint.survey.records:
        ledger.attempt("recipe", lambda: _recipe(checkpoint, plan))
    if SEARCH_FILE in checkpoint.survey.records:
        ledger.attempt("search", lambda: _search(checkpoint))
    _measured(ledger, checkpoint, manifest)
    return ledger.report(manifest, None)


def _measured(ledger: _Ledger, checkpoint: Checkpoint, manifest: Manifest | None) -> None:
    """What was measured of the model after it was published: who says so is checked, what is said is not."""
    for ok, detail in measurement.told(checkpoint.path, manifest.model_id if manifest else None):
        ledger.add(Check(name="measured", ok=ok, detail=detail))


def _unsigned_plan(checkpoint: Checkpoint, manifest: Manifest | None) -> tuple[MergePlan, str]:
    if manifest is None:
        raise VerificationFailed("not checked: the manifest does not hold")
    plan = MergePlan.parse(read_record(checkpoint.path, checkpoint.survey, PLAN_FILE, MAX_PLAN))
    origins(plan, manifest)
    return plan, f"{plan.digest}: {_operators(plan)} over {len(plan.inputs)} models"


def _unsigned_trace(checkpoint: Checkpoint, plan: MergePlan | None) -> tuple[None, str]:
    if plan is None:
        raise VerificationFailed("not checked: the plan does not hold")
    data = read_record(checkpoint.path, checkpoint.survey, TRACE_FILE, MAX_TRACE)
    return None, f"values for {len(Trace.parse(plan, data))} tensors"


def _only_known(checkpoint: Checkpoint) -> tuple[None, str]:
    """A merge is made of nothing that its plan does not account for, but for card and licences."""
    found = checkpoint.survey
    odd = [name for name in found.other if name not in _BESIDE and not name.startswith(("LICENSE", "NOTICE"))]
    odd += [*found.links, *(item.name for item in found.strays)]
    if odd:
        raise VerificationFailed(f"nothing that a merge writes: {', '.join(sorted(odd)[:5])}")
    return None, "no file that a merge does not write"


def _recipe(checkpoint: Checkpoint, plan: MergePlan | None) -> tuple[None, str]:
    """The recipe that people read names the operators and the parents of the plan that was executed."""
    if plan is None:
        raise VerificationFailed("not checked: the plan does not hold")
    data = read_record(checkpoint.path, checkpoint.survey, RECIPE_FILE, MAX_RECIPE)
    recipe = recipes.parse(data.decode("utf-8", "replace"))
    if not tells_of(recipe, plan):
        raise VerificationFailed(f"{RECIPE_FILE} tells of another merge than the plan")
    return None, f"{RECIPE_FILE} names the operators and the parents of the plan"


def _search(checkpoint: Checkpoint) -> tuple[None, str]:
    """The search that is recorded found the recipe that lies here."""
    path, survey = checkpoint.path, checkpoint.survey
    record = SearchRecord.parse(read_record(path, survey, SEARCH_FILE, MAX_RECORD))
    if sha256(read_record(path, survey, RECIPE_FILE, MAX_RECIPE)) != record.recipe:
        raise VerificationFailed(f"{SEARCH_FILE} tells of a search that found another recipe")
    names = few([task.name for task in record.tasks])
    return (
        None,
        f"{record.evaluated} candidates tried for {names}, seed {record.seed}; the searcher's own word",
    )


def few(names: Sequence[str]) -> str:
    """The first names, and how many there are beside them."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _operators(plan: MergePlan) -> str:
    return ", ".join(plan.operators) or "copy"


def _publisher(checkpoint: Checkpoint) -> tuple[Binding, str]:
    data = read_record(checkpoint.path, checkpoint.survey, PUBLISHER_FILE, MAX_BINDING)
    binding = Binding.parse(data)
    return binding, f"{binding.publisher.key_id}, bound to peer {binding.peer_id} by both signatures"


def _pin(binding: Binding | None, publisher: PublicPublisherKey | None, now: float) -> Check:
    name = "known publisher"
    if publisher is not None and (binding is None or binding.publisher.key_id != publisher.key_id):
        return Check(name=name, ok=False, detail=f"not published by {publisher.key_id}, who was asked for")
    if binding is not None and not binding.covers(now):
        return Check(name=name, ok=None, detail="the binding of key and peer is not valid at this time")
    if publisher is None:
        return Check(name=name, ok=None, detail="nobody vouches for this key; pin it with --publisher KEY")
    return Check(name=name, ok=True, detail="the publisher who was asked for")


def _signature(
    directory: Path, key: PublicPublisherKey | None, on_progress: Progress | None
) -> tuple[oms.SignedFiles, str]:
    if key is None:
        raise VerificationFailed("not checked: there is no publisher key to check it with")
    signed = oms.verify_directory(directory, key, on_progress=on_progress)
    return signed, f"all {len(signed.files)} files are as signed (OpenSSF Model Signing)"


def _manifest(checkpoint: Checkpoint, on_progress: Progress | None) -> tuple[Manifest, str]:
    manifest = measure(checkpoint, on_progress=on_progress).manifest
    data = read_record(checkpoint.path, checkpoint.survey, MANIFEST_FILE, MAX_MANIFEST)
    if data != manifest.to_bytes():
        raise VerificationFailed(f"{MANIFEST_FILE} names other bytes: {_difference(data, manifest)}")
    return manifest, f"{len(manifest.tensors)} tensors, {manifest.size} bytes: {manifest.model_id}"


def _difference(data: bytes, found: Manifest) -> str:
    """The first thing that a claimed manifest says otherwise than the bytes."""
    claimed = Manifest.parse(data)
    tensors = {record.name: record for record in found.tensors}
    files = {record.path: record for record in found.files}
    for tensor in claimed.tensors:
        if tensors.get(tensor.name) != tensor:
            return f"tensor {tensor.name}"
    for file in claimed.files:
        if files.get(file.path) != file:
            return f"file {file.path}"
    return "architecture, or a tensor or file that it does not list"


def _claims_merge(checkpoint: Checkpoint) -> bool:
    traces = {PROVENANCE_FILE, PLAN_FILE, TRACE_FILE, AGREEMENTS_FILE}
    return not traces.isdisjoint(checkpoint.survey.records)


def _merge(
    ledger: _Ledger,
    checkpoint: Checkpoint,
    key: PublicPublisherKey | None,
    binding: Binding | None,
    signed: oms.SignedFiles | None,
    manifest: Manifest | None,
) -> None:
    """The checks of a directory that claims to be a merge."""
    statement = ledger.attempt("provenance", lambda: _provenance(checkpoint, key, binding))
    if statement is None:
        return
    ledger.attempt("subjects", lambda: _subjects(statement, signed))
    ledger.attempt("files", lambda: _only_known(checkpoint))
    plan = ledger.attempt("plan", lambda: _plan(checkpoint, statement, manifest))
    ledger.attempt("trace", lambda: _trace(checkpoint, statement, plan))
    if RECIPE_FILE in checkpoint.survey.records:
        ledger.attempt("recipe", lambda: _recipe(checkpoint, plan))
    if SEARCH_FILE in checkpoint.survey.records:
        ledger.attempt("search", lambda: _search(checkpoint))
    ledger.attempt("agreements", lambda: _agreements(checkpoint, statement))


def _provenance(
    checkpoint: Checkpoint, key: PublicPublisherKey | None, binding: Binding | None
) -> tuple[MergeProvenance, str]:
    if key is None:
        raise VerificationFailed("not checked: there is no publisher key to check it with")
    data = read_record(checkpoint.path, checkpoint.survey, PROVENANCE_FILE, MAX_PROVENANCE)
    statement = open_provenance(data, key)
    if binding is not None and statement.builder != binding.peer_id:
        raise VerificationFailed(f"built by {statement.builder}, which is not the publisher's peer")
    parents = ", ".join(f"{p.role} {p.model_id[:19]}… ({p.licence})" for p in statement.parents)
    return statement, f"merged from {parents}; the builder's own word until audited"


def _subjects(statement: MergeProvenance, signed: oms.SignedFiles | None) -> tuple[None, str]:
    if signed is None:
        raise VerificationFailed("not checked: the signature does not hold")
    present = {name: digest for name, digest in signed.files.items() if name != PROVENANCE_FILE}
    if dict(statement.subjects) != present:
        wrong = sorted(dict(statement.subjects).items() ^ present.items())
        raise VerificationFailed(f"the provenance is that of other files: {wrong[0][0]}")
    return None, f"{len(present)} files are those that the builder states"


def _plan(
    checkpoint: Checkpoint, statement: MergeProvenance, manifest: Manifest | None
) -> tuple[MergePlan, str]:
    data = _as_stated(checkpoint, PLAN_FILE, MAX_PLAN, statement.plan)
    plan = MergePlan.parse(data)
    roles = tuple("base" if index == plan.base else "expert" for index in range(len(plan.inputs)))
    if tuple((p.model_id, p.role) for p in statement.parents) != tuple(zip(plan.inputs, roles, strict=True)):
        raise VerificationFailed("the plan merges other parents than the provenance states")
    if manifest is None:
        raise VerificationFailed("not checked: the manifest does not hold")
    if plan.result.architecture != manifest.architecture:
        raise VerificationFailed(f"the plan makes a {plan.result.architecture}")
    if origins(plan, manifest) != statement.tensors:
        raise VerificationFailed("the provenance names other tensors, operators or parents than the plan")
    return plan, f"{plan.digest}: {_operators(plan)} over {len(plan.inputs)} models"


def _trace(checkpoint: Checkpoint, statement: MergeProvenance, plan: MergePlan | None) -> tuple[None, str]:
    data = _as_stated(checkpoint, TRACE_FILE, MAX_TRACE, statement.trace)
    if plan is None:
        raise VerificationFailed("not checked: the plan does not hold")
    trace = Trace.parse(plan, data)
    return None, f"{trace.digest}: values for {len(trace)} tensors"


def _agreements(checkpoint: Checkpoint, statement: MergeProvenance) -> tuple[None, str]:
    if statement.agreements is None:
        if AGREEMENTS_FILE in checkpoint.survey.records:
            raise VerificationFailed("there are agreements that the provenance does not state")
        return None, "none: the builder had every parent"
    limit = negotiated.MAX_FILE
    data = _as_stated(checkpoint, AGREEMENTS_FILE, limit, statement.agreements)
    agreed = negotiated.parse(data)
    for agreement in agreed:
        _entitles(agreement, statement)
    parents = {parent.model_id for parent in statement.parents}
    covered = {model for agreement in agreed for model in agreement.models}
    return None, f"{len(agreed)} signed by both sides, for {len(covered)} of {len(parents)} parents"


def _entitles(agreement: Agreement, statement: MergeProvenance) -> None:
    if agreement.requester != statement.builder:
        raise VerificationFailed(f"agreement {agreement.digest} was made with another peer than the builder")
    if agreement.purpose is not Purpose.MERGE or agreement.plan != statement.plan:
        raise VerificationFailed(f"agreement {agreement.digest} was made for something else than this plan")
    if not set(agreement.models) <= {parent.model_id for parent in statement.parents}:
        raise VerificationFailed(f"agreement {agreement.digest} names models that are not parents")


def _as_stated(checkpoint: Checkpoint, name: str, limit: int, stated: Digest) -> bytes:
    data = read_record(checkpoint.path, checkpoint.survey, name, limit)
    if sha256(data) != stated:
        raise VerificationFailed(f"{name} is not the one that the provenance states")
    return data
