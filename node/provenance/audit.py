"""Audits: the signed verdict of somebody who ran a merge again, as a SLSA Verification Summary (VSA).

It lies outside the model, in `claims.jsonl`: a verdict comes after publication and must not change what was
published. A line holds the DSSE envelope and the auditor's publisher record, so it proves itself.
`Verdict.parse(v.to_bytes()) == v`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from merge_core.checkpoint.manifest import TENSOR_NAME
from merge_core.checkpoint.published import MANIFEST_FILE, PROVENANCE_FILE
from merge_core.digest import Digest, ModelId, canonical, parse_canonical
from node.domain import text
from node.domain.ids import PeerId
from node.errors import VerificationFailed
from node.identity.keyring import Identity
from node.provenance.files import append_line
from node.provenance.proven import MAX_LINE, Proven
from node.provenance.statement import PAYLOAD_TYPE, STATEMENT_TYPE

PREDICATE_TYPE = "https://slsa.dev/verification_summary/v1"
POLICY = "urn:weft:audit:full:v1"
"""The policy: execute the plan again, and every leaf, traced value and functional file must agree."""
LEVEL = "WEFT_REEXECUTED"
MAX_LISTED = 100
"""Failed leaves that a verdict names; `failed` counts all of them."""
MAX_CLAIMS = 10_000

_ROLE = "auditor"
_MODEL = "urn:weft:model:"
_PEER = "urn:weft:peer:"
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What re-execution found: how many leaves were compared and differ; `listed` names some of those."""

    checked: int
    failed: int
    listed: tuple[tuple[str, int], ...]
    trace_ok: bool
    files_ok: bool

    @property
    def passed(self) -> bool:
        """Whether everything agreed, and there was something to agree."""
        return self.checked > 0 and self.failed == 0 and self.trace_ok and self.files_ok


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an auditor says of one model: `checked` and `failed` count leaves, `first_failed` names some.

    `provenance` is the digest of the statement's file (None where there was none to audit against).
    """

    model_id: ModelId
    provenance: Digest | None
    plan: Digest
    auditor: PeerId
    checked: int
    failed: int
    first_failed: tuple[tuple[str, int], ...]
    trace_ok: bool
    files_ok: bool
    audited_at: int

    @property
    def passed(self) -> bool:
        """Whether everything agreed, and there was something to agree."""
        return self.checked > 0 and self.failed == 0 and self.trace_ok and self.files_ok

    def to_bytes(self) -> bytes:
        """The canonical bytes of the statement."""
        inputs = (
            [] if self.provenance is None else [{"uri": PROVENANCE_FILE, "digest": _set(self.provenance)}]
        )
        return canonical(
            {
                "_type": STATEMENT_TYPE,
                "subject": [{"name": MANIFEST_FILE, "digest": _set(self.model_id)}],
                "predicateType": PREDICATE_TYPE,
                "predicate": {
                    "verifier": {"id": _PEER + self.auditor},
                    "timeVerified": datetime.fromtimestamp(self.audited_at, UTC).strftime(_TIME),
                    "resourceUri": _MODEL + self.model_id.hex,
                    "policy": {"uri": POLICY},
                    "inputAttestations": inputs,
                    "verificationResult": "PASSED" if self.passed else "FAILED",
                    "verifiedLevels": [LEVEL] if self.passed else [],
                    "slsaVersion": "1.0",
                    "weftAudit": {
                        "plan": _set(self.plan),
                        "checked": self.checked,
                        "failed": self.failed,
                        "firstFailed": [[tensor, leaf] for tensor, leaf in self.first_failed],
                        "traceOk": self.trace_ok,
                        "filesOk": self.files_ok,
                    },
                },
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Verdict:
        """Read a verdict that may come from anybody; raises VerificationFailed on whatever is not exact."""
        try:
            verdict = _read(parse_canonical(data))
            # Every field that was not read, or was read as something else, makes a difference here.
            if verdict.to_bytes() != data:
                raise ValueError("it says more than an audit does, or another result than its counts")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise VerificationFailed(f"not the verdict of an audit: {error}") from error
        except (OverflowError, OSError, RecursionError) as error:
            raise VerificationFailed(f"not the verdict of an audit: {error}") from error
        return verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A verdict with the auditor who signed it; one that exists is verified."""

    verdict: Verdict
    proven: Proven

    def to_bytes(self) -> bytes:
        """One line of claims.jsonl."""
        return self.proven.to_bytes(_ROLE)

    @classmethod
    def parse(cls, data: bytes) -> Claim:
        """Read a claim that may come from anybody, signatures verified; raises VerificationFailed."""
        proven = Proven.parse(data, PAYLOAD_TYPE, _ROLE)
        verdict = Verdict.parse(proven.payload)
        if verdict.auditor != proven.signer.peer_id:
            raise VerificationFailed("the verdict is signed by another peer than its auditor")
        if not proven.signer.covers(verdict.audited_at):
            raise VerificationFailed("the auditor's key was not valid at the time of the audit")
        return cls(verdict=verdict, proven=proven)


def judge(
    outcome: Outcome,
    *,
    model_id: ModelId,
    provenance: Digest | None,
    plan: Digest,
    auditor: PeerId,
    now: float,
) -> Verdict:
    """Put the outcome of a re-execution into words; `now` in Unix seconds."""
    return Verdict(
        model_id=model_id,
        provenance=provenance,
        plan=plan,
        auditor=auditor,
        checked=outcome.checked,
        failed=outcome.failed,
        first_failed=outcome.listed[:MAX_LISTED],
        trace_ok=outcome.trace_ok,
        files_ok=outcome.files_ok,
        audited_at=int(now),
    )


def claim(verdict: Verdict, identity: Identity) -> Claim:
    """Sign a verdict; raises ValueError when it is somebody else's."""
    if verdict.auditor != identity.peer_id:
        raise ValueError("a verdict is signed by its auditor")
    return Claim(verdict=verdict, proven=Proven.sign(PAYLOAD_TYPE, verdict.to_bytes(), identity))


def append(path: Path, signed: Claim) -> None:
    """Add a claim to a claims file, durably."""
    append_line(path, signed.to_bytes())


def read_claims(path: Path) -> Iterator[Claim]:
    """The claims of a file that hold, in order, at most MAX_CLAIMS; a line that does not is passed over."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for _ in range(MAX_CLAIMS):
            line = file.readline(MAX_LINE + 2)
            if not line:
                return
            try:
                found = Claim.parse(line.rstrip(b"\n"))
            except VerificationFailed:
                continue
            yield found


def claims_about(path: Path, model_id: ModelId) -> tuple[Claim, ...]:
    """The claims of a file that hold and speak of one model, in order."""
    return tuple(found for found in read_claims(path) if found.verdict.model_id == model_id)


def _read(value: Any) -> Verdict:
    predicate = value["predicate"]
    audit = predicate["weftAudit"]
    audited = datetime.strptime(predicate["timeVerified"], _TIME).replace(tzinfo=UTC)
    inputs = text.items(
        predicate["inputAttestations"], 1, "input attestations", lambda i: _digest(i["digest"])
    )
    return Verdict(
        model_id=ModelId(_digest(value["subject"][0]["digest"])),
        provenance=inputs[0] if inputs else None,
        plan=_digest(audit["plan"]),
        auditor=PeerId(predicate["verifier"]["id"].removeprefix(_PEER)),
        checked=text.integer(audit["checked"], "checked"),
        failed=text.integer(audit["failed"], "failed"),
        first_failed=text.items(audit["firstFailed"], MAX_LISTED, "failed leaves", _leaf),
        trace_ok=audit["traceOk"] is True,
        files_ok=audit["filesOk"] is True,
        audited_at=int(audited.timestamp()),
    )


def _leaf(item: Any) -> tuple[str, int]:
    tensor, leaf = item
    if not isinstance(tensor, str) or not TENSOR_NAME.fullmatch(tensor):
        raise ValueError(f"tensor name {str(tensor)[:80]!r}")
    return tensor, text.integer(leaf, "leaf")


def _set(digest: Digest) -> dict[str, str]:
    return {"sha256": digest.hex}


def _digest(value: Any) -> Digest:
    return Digest("sha256:" + value["sha256"])
