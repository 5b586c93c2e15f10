"""Audits: verdicts over a real re-execution, signed, in a file that neither crash nor stranger can spoil."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope as TheirEnvelope
from securesystemslib.signer import SSlibKey

from merge_core import execute
from merge_core.checkpoint.published import PROVENANCE_FILE
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure
from merge_core.digest import Digest, ModelId, canonical, sha256
from node.errors import VerificationFailed
from node.identity.binding import bind
from node.identity.envelopes import seal
from node.provenance import audit
from node.provenance.audit import Claim, Verdict
from node.provenance.proven import Proven
from node.provenance.statement import PAYLOAD_TYPE

NOW = 1_800_000_000.0


def reexecute(family, merged: Path) -> audit.Outcome:
    """Run the family's merge again over its parents, and compare it with a directory."""
    opened = [Checkpoint.open(directory) for directory in family.parents.values()]
    try:
        inputs = [
            execute.Material(tensors=VerifiedSource(c, measure(c).leaves), files=c.functional_files)
            for c in opened
        ]
        with Checkpoint.open(merged) as claimed:
            found = measure(claimed)
        report = execute.audit(family.plan, family.trace, inputs, found.manifest, found.leaves)
        return audit.Outcome(
            checked=report.checked,
            failed=len(report.failed),
            listed=report.failed,
            trace_ok=report.trace_ok,
            files_ok=report.files_ok,
        )
    finally:
        for checkpoint in opened:
            checkpoint.close()


def verdict_of(family, outcome: audit.Outcome) -> Verdict:
    """The owner of the parents as the auditor."""
    return audit.judge(
        outcome,
        model_id=family.manifest.model_id,
        provenance=sha256((family.merged / PROVENANCE_FILE).read_bytes()),
        plan=family.plan.digest,
        auditor=family.owner.peer_id,
        now=NOW,
    )


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def test_an_honest_merge_passes_and_its_verdict_survives_the_file(family, tmp_path: Path) -> None:
    verdict = verdict_of(family, reexecute(family, family.merged))
    assert verdict.passed and verdict.checked == 4
    claim = audit.claim(verdict, family.owner)
    audit.append(tmp_path / "claims.jsonl", claim)
    audit.append(tmp_path / "claims.jsonl", claim)
    assert list(audit.read_claims(tmp_path / "claims.jsonl")) == [claim, claim]


def test_one_flipped_bit_of_the_weights_fails_the_audit(family) -> None:
    flip(family.merged / "model.safetensors")
    verdict = verdict_of(family, reexecute(family, family.merged))
    assert not verdict.passed
    assert (verdict.failed, len(verdict.first_failed)) == (1, 1)
    statement = json.loads(verdict.to_bytes())
    assert statement["predicate"]["verificationResult"] == "FAILED"
    assert statement["predicate"]["verifiedLevels"] == []


def passing(family) -> Claim:
    outcome = audit.Outcome(checked=4, failed=0, listed=(), trace_ok=True, files_ok=True)
    return audit.claim(verdict_of(family, outcome), family.owner)


@pytest.mark.parametrize(
    "outcome",
    [
        audit.Outcome(checked=0, failed=0, listed=(), trace_ok=True, files_ok=True),
        audit.Outcome(checked=4, failed=0, listed=(), trace_ok=False, files_ok=True),
        audit.Outcome(checked=4, failed=0, listed=(), trace_ok=True, files_ok=False),
        audit.Outcome(checked=4, failed=500, listed=(("a.weight", 3),) * 500, trace_ok=True, files_ok=True),
    ],
)
def test_whatever_differs_or_was_not_looked_at_fails(pristine, outcome: audit.Outcome) -> None:
    verdict = verdict_of(pristine, outcome)
    assert not verdict.passed
    assert verdict.failed == outcome.failed and len(verdict.first_failed) <= audit.MAX_LISTED
    assert Verdict.parse(verdict.to_bytes()) == verdict


def test_a_verdict_cannot_pass_against_its_own_counts(pristine) -> None:
    value = json.loads(
        verdict_of(
            pristine, audit.Outcome(checked=4, failed=1, listed=(("a", 0),), trace_ok=True, files_ok=True)
        ).to_bytes()
    )
    value["predicate"]["verificationResult"] = "PASSED"
    with pytest.raises(VerificationFailed, match="another result"):
        Verdict.parse(canonical(value))


def test_nobody_signs_the_verdict_of_another(pristine) -> None:
    claim = passing(pristine)
    with pytest.raises(ValueError, match="by its auditor"):
        audit.claim(claim.verdict, pristine.builder)
    line = json.loads(claim.to_bytes())
    line["auditor"] = json.loads(pristine.builder.binding.to_bytes())
    with pytest.raises(VerificationFailed):
        Claim.parse(canonical(line))
    forged = audit.claim(replace(claim.verdict, auditor=pristine.builder.peer_id), pristine.builder)
    envelope = seal(PAYLOAD_TYPE, claim.verdict.to_bytes(), pristine.builder.publisher)
    borrowed = replace(forged, proven=replace(forged.proven, envelope=envelope))
    with pytest.raises(VerificationFailed, match="another peer"):
        Claim.parse(borrowed.to_bytes())


def test_a_key_out_of_its_time_audits_nothing(pristine) -> None:
    owner = pristine.owner
    late = replace(owner, binding=bind(owner.host, owner.publisher, now=NOW + 10_000))
    with pytest.raises(VerificationFailed, match="time of the audit"):
        Claim.parse(audit.claim(passing(pristine).verdict, late).to_bytes())


@pytest.fixture(scope="module")
def line(pristine) -> bytes:
    """A claim, signed once: no two signatures are equally long."""
    return passing(pristine).to_bytes()


@given(data=st.data())
def test_no_bit_of_a_claim_can_be_flipped(line: bytes, data: st.DataObject) -> None:
    line = bytearray(line)
    line[data.draw(st.integers(0, len(line) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(VerificationFailed):
        Claim.parse(bytes(line))


def test_a_torn_or_foreign_line_spoils_no_other(pristine, tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    assert list(audit.read_claims(path)) == []
    claim = passing(pristine)
    audit.append(path, claim)
    with path.open("ab") as file:
        file.write(b"x" * 600_000 + b"\n" + b'{"version":1}\n' + claim.to_bytes()[:100])
    audit.append(path, claim)
    assert list(audit.read_claims(path)) == [claim, claim]


def test_a_signed_claim_about_nothing_spoils_no_other(pristine, tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    claim = passing(pristine)
    value = json.loads(claim.verdict.to_bytes())
    value["subject"] = []
    nothing = Proven.sign(PAYLOAD_TYPE, canonical(value), pristine.owner)
    audit.append(path, replace(claim, proven=nothing))
    audit.append(path, claim)
    assert list(audit.read_claims(path)) == [claim]


def test_the_claims_about_a_model_are_those_that_hold_and_name_it(pristine, tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    claim = passing(pristine)
    other = ModelId(sha256(b"another model"))
    audit.append(path, audit.claim(replace(claim.verdict, model_id=other), pristine.owner))
    audit.append(path, claim)
    assert audit.claims_about(path, claim.verdict.model_id) == (claim,)
    assert audit.claims_about(tmp_path / "none", other) == ()


def test_securesystemslib_verifies_a_verdict(pristine) -> None:
    claim = passing(pristine)
    key = pristine.owner.publisher
    theirs = SSlibKey(key.key_id, "ecdsa", "ecdsa-sha2-nistp256", {"public": key.public_pem})
    envelope = TheirEnvelope.from_dict(claim.proven.envelope.to_json())
    assert list(envelope.verify([theirs], 1)) == [key.key_id]
    predicate = json.loads(envelope.payload)["predicate"]
    assert predicate["verificationResult"] == "PASSED"
    assert Digest("sha256:" + predicate["weftAudit"]["plan"]["sha256"]) == pristine.plan.digest
