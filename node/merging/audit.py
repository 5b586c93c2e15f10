"""The audit job: execute a merge again from its parents, compare every leaf, and sign the verdict.

The directory must verify first, and is hashed anew: neither a cache nor an earlier look counts. The auditor's
own copy of the parents is what is merged again, wherever it came from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.published import (
    MANIFEST_FILE,
    PLAN_FILE,
    PROVENANCE_FILE,
    TRACE_FILE,
    read_bounded,
)
from merge_core.checkpoint.reader import Checkpoint, measure
from merge_core.digest import Digest, ModelId, sha256
from merge_core.plan import MAX_PLAN, MergePlan
from node.domain.job import JobState
from node.domain.negotiation import Purpose
from node.errors import VerificationFailed
from node.identity.keyring import Identity
from node.jobs.runner import Attempt
from node.merging.merge import lay_out, teller, worker_input
from node.merging.parents import OnDisk, ParentSource
from node.provenance import audit as verdicts
from node.provenance.audit import Outcome
from node.provenance.verify import verify
from node.worker import process


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A merged directory as its records describe it."""

    directory: Path
    plan: MergePlan
    manifest: Manifest
    leaves: LeafTable
    provenance: Digest | None

    @property
    def model_id(self) -> ModelId:
        """The model's name."""
        return self.manifest.model_id


class Auditing:
    """Audits with parents from one source; the verdict is signed where there is an identity."""

    def __init__(
        self,
        parents: ParentSource,
        identity: Identity | None,
        *,
        claims: Path,
        clock: Callable[[], float],
    ) -> None:
        """Verdicts are appended to the file `claims`."""
        self._parents = parents
        self._identity = identity
        self._claims = claims
        self._clock = clock

    async def audit(self, attempt: Attempt, directory: Path) -> dict[str, Any]:
        """Audit a directory; the result is {model_id, directory, checked, failed, passed, statement}."""
        claimed = await asyncio.to_thread(read_claimed, directory, self._clock())
        attempt.reach("plan", claimed.plan.digest)
        parents = await self._parents.find(claimed.plan.inputs, attempt)
        obtained = await self._parents.obtain(parents, claimed.plan, Purpose.AUDIT, attempt)
        attempt.enter(JobState.VERIFYING)
        inputs = [obtained.parents[model_id] for model_id in claimed.plan.inputs]
        outcome = await self._execute(attempt, claimed, inputs)
        statement = await asyncio.to_thread(self._testify, claimed, outcome)
        return {
            "model_id": claimed.model_id,
            "directory": str(directory),
            "checked": outcome.checked,
            "failed": outcome.failed,
            "passed": outcome.passed,
            "statement": statement,
        }

    async def _execute(self, attempt: Attempt, claimed: Claimed, inputs: list[OnDisk]) -> Outcome:
        with TemporaryDirectory(prefix="weft-audit-") as folder:
            work = Path(folder)
            await asyncio.to_thread(lay_out, work, claimed.plan, inputs)
            (work / "leaves.bin").write_bytes(claimed.leaves.to_bytes())
            request = {
                "plan": str(work / "plan.json"),
                "trace": str(claimed.directory / TRACE_FILE),
                "manifest": str(claimed.directory / MANIFEST_FILE),
                "leaves": str(work / "leaves.bin"),
                "inputs": [worker_input(work, position, parent) for position, parent in enumerate(inputs)],
            }
            found = await process.run("audit", request, on_event=teller(attempt))
        return Outcome(
            checked=found["checked"],
            failed=found["failures"],
            listed=tuple((tensor, leaf) for tensor, leaf in found["failed"]),
            trace_ok=found["trace_ok"],
            files_ok=found["files_ok"],
        )

    def _testify(self, claimed: Claimed, outcome: Outcome) -> str:
        """Sign the verdict and keep it; the path of the claims file, empty where nobody can sign."""
        if self._identity is None:
            return ""
        verdict = verdicts.judge(
            outcome,
            model_id=claimed.model_id,
            provenance=claimed.provenance,
            plan=claimed.plan.digest,
            auditor=self._identity.peer_id,
            now=self._clock(),
        )
        self._claims.parent.mkdir(parents=True, exist_ok=True)
        verdicts.append(self._claims, verdicts.claim(verdict, self._identity))
        return str(self._claims)


def read_claimed(directory: Path, now: float) -> Claimed:
    """What a merged directory says of itself, once it verifies; every byte is hashed anew (blocking).

    Raises VerificationFailed where it is no merge or does not verify: a verdict must not vouch for a lie.
    """
    for name in (PLAN_FILE, TRACE_FILE, MANIFEST_FILE):
        if not (directory / name).is_file():
            raise VerificationFailed(
                f"{directory} is not a merge: it has no {name}", hint=f"weft lineage {directory}"
            )
    report = verify(directory, now=now)
    wrong = next((check for check in report.checks if check.ok is False), None)
    if wrong is not None:
        raise VerificationFailed(f"{wrong.name}: {wrong.detail}", hint=f"weft verify {directory}")
    with Checkpoint.open(directory) as checkpoint:
        measured = measure(checkpoint)
    sealed = directory / PROVENANCE_FILE
    return Claimed(
        directory=directory,
        plan=MergePlan.parse(read_bounded(directory / PLAN_FILE, MAX_PLAN)),
        manifest=measured.manifest,
        leaves=measured.leaves,
        provenance=sha256(sealed.read_bytes()) if sealed.is_file() else None,
    )
