"""Verification of published and merged directories: what is green, and that each line can turn red."""

import base64
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope as TheirEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from merge_core.checkpoint.manifest import Manifest
from merge_core.checkpoint.published import AGREEMENTS_FILE, PROVENANCE_FILE, PUBLISHER_FILE
from merge_core.digest import canonical, sha256
from merge_core.files import replace as put
from merge_core.plan import MergePlan
from node.domain.negotiation import Purpose
from node.errors import VerificationFailed
from node.identity.binding import bind
from node.identity.keys import PublisherKey
from node.provenance import agreements, oms
from node.provenance.statement import MergeProvenance, open_provenance
from node.provenance.verify import Report, verify

NOW = 1_800_000_000.0
ALL = {
    "structure",
    "publisher",
    "known publisher",
    "signature",
    "manifest",
    "provenance",
    "subjects",
    "files",
    "plan",
    "trace",
    "agreements",
}


def lines(report: Report) -> dict[str, bool | None]:
    return {check.name: check.ok for check in report.checks}


def red(report: Report) -> set[str]:
    assert report.ok == (not any(check.ok is False for check in report.checks))
    return {check.name for check in report.checks if check.ok is False}


def statement_of(family: Any) -> MergeProvenance:
    return open_provenance((family.merged / PROVENANCE_FILE).read_bytes(), family.builder.publisher.public)


def resign(family: Any, change: Callable[[MergeProvenance], MergeProvenance] = lambda s: s) -> Report:
    """Let the builder lie: change the statement, put its subjects right, sign all, verify."""
    files = {p.name: sha256(p.read_bytes()) for p in family.merged.iterdir()}
    subjects = tuple(sorted((n, d) for n, d in files.items() if n not in (PROVENANCE_FILE, "model.sig")))
    statement = change(replace(statement_of(family), subjects=subjects))
    put(family.merged / PROVENANCE_FILE, statement.seal(family.builder.publisher))
    oms.sign_directory(family.merged, family.builder.publisher)
    report = verify(family.merged, now=NOW)
    assert lines(report)["signature"] is True
    return report


def test_a_merged_model_is_green_and_pinned(family) -> None:
    hashed: list[int] = []
    pin = family.builder.publisher.public
    report = verify(family.merged, publisher=pin, now=NOW, on_progress=hashed.append)
    assert lines(report) == dict.fromkeys(ALL, True)
    assert (report.ok, report.model_id) == (True, family.manifest.model_id)
    assert (report.publisher, report.peer) == (pin.key_id, family.builder.peer_id)
    sizes = sum(p.stat().st_size for p in family.merged.iterdir() if p.name != "model.sig")
    assert sum(hashed) == sizes + family.manifest.size
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_a_published_model_has_no_merge_to_check(family) -> None:
    report = verify(family.parents["math"], now=NOW)
    assert lines(report) == {
        "structure": True,
        "publisher": True,
        "known publisher": None,
        "signature": True,
        "manifest": True,
    }
    assert report.ok


def test_an_unknown_publisher_is_a_warning_and_another_one_is_red(family) -> None:
    assert lines(verify(family.merged, now=NOW))["known publisher"] is None
    other = verify(family.merged, publisher=family.owner.publisher.public, now=NOW)
    assert {"known publisher", "signature", "provenance"} <= red(other)


def test_one_flipped_bit_in_any_file_is_red(family) -> None:
    for path in sorted(family.merged.iterdir()):
        original = path.read_bytes()
        data = bytearray(original)
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        report = verify(family.merged, now=NOW)
        assert red(report) & {"signature", "structure"}, path.name
        path.write_bytes(original)
    assert verify(family.merged, now=NOW).ok


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda d: (d / "model.sig").unlink(), {"signature", "subjects"}),
        (lambda d: (d / PUBLISHER_FILE).unlink(), {"publisher", "signature", "provenance"}),
        (
            lambda d: (d / "weft.manifest.json").unlink(),
            {"signature", "manifest", "subjects", "plan", "trace"},
        ),
        (lambda d: (d / PROVENANCE_FILE).unlink(), {"signature", "provenance"}),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"), {"structure"}),
        (lambda d: (d / "config.json").unlink(), {"structure"}),
        (lambda d: (d / "setup.py").write_text("import os"), {"signature", "subjects", "files"}),
    ],
)
def test_what_is_missing_or_added_is_red(family, harm: Callable[[Path], Any], expected: set[str]) -> None:
    harm(family.merged)
    assert red(verify(family.merged, now=NOW)) == expected


def test_nothing_is_raised_for_what_is_no_model(tmp_path: Path) -> None:
    assert red(verify(tmp_path, now=NOW)) == {"structure"}
    assert red(verify(tmp_path / "nowhere", now=NOW)) == {"structure"}
    (tmp_path / "file").write_text("x")
    assert red(verify(tmp_path / "file", now=NOW)) == {"structure"}


def test_a_pipe_in_place_of_a_record_does_not_hang(family) -> None:
    (family.merged / PUBLISHER_FILE).unlink()
    os.mkfifo(family.merged / PUBLISHER_FILE)
    assert {"publisher", "signature"} <= red(verify(family.merged, now=NOW))


def test_a_binding_out_of_its_time_is_a_warning(family) -> None:
    old = bind(family.builder.host, family.builder.publisher, now=NOW - 10_000, lifetime=5000)
    put(family.merged / PUBLISHER_FILE, old.to_bytes())
    report = resign(family)
    assert report.ok
    assert "not valid at this time" in next(c.detail for c in report.checks if c.name == "known publisher")


def test_signed_weights_that_the_manifest_does_not_name_are_red(family) -> None:
    path = family.merged / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    report = resign(family)
    assert {"manifest", "plan"} <= red(report)
    assert any("tensor model." in check.detail for check in report.checks if check.name == "manifest")
    assert report.model_id != family.manifest.model_id


def test_a_manifest_of_other_weights_is_red_even_when_it_is_well_formed(family) -> None:
    put(family.merged / "weft.manifest.json", (family.parents["base"] / "weft.manifest.json").read_bytes())
    assert red(resign(family)) == {"manifest", "plan", "trace"}


def swap_builder(family: Any) -> Callable[[MergeProvenance], MergeProvenance]:
    return lambda s: replace(s, builder=family.owner.peer_id)


@pytest.mark.parametrize(
    ("lie", "expected"),
    [
        (lambda s: replace(s, subjects=s.subjects[1:]), {"subjects"}),
        (lambda s: replace(s, plan=sha256(b"")), {"plan", "trace", "agreements"}),
        (lambda s: replace(s, trace=sha256(b"")), {"trace"}),
        (lambda s: replace(s, agreements=sha256(b"")), {"agreements"}),
        (lambda s: replace(s, agreements=None), {"agreements"}),
        (lambda s: replace(s, parents=s.parents[::-1]), {"plan", "trace"}),
        (
            lambda s: replace(s, parents=(replace(s.parents[0], role="expert"), *s.parents[1:])),
            {"plan", "trace"},
        ),
        (
            lambda s: replace(s, tensors=(replace(s.tensors[0], operator="linear"), *s.tensors[1:])),
            {"plan", "trace"},
        ),
        (
            lambda s: replace(s, tensors=(replace(s.tensors[0], root="0" * 64), *s.tensors[1:])),
            {"plan", "trace"},
        ),
    ],
)
def test_each_lie_of_a_builder_is_red(
    family, lie: Callable[[Any], MergeProvenance], expected: set[str]
) -> None:
    assert red(resign(family, lie)) == expected


def test_a_builder_cannot_name_another_peer(family) -> None:
    assert red(resign(family, swap_builder(family))) == {"provenance"}


def test_a_plan_of_other_parents_is_red(family) -> None:
    other = replace(family.plan, inputs=family.plan.inputs[::-1])
    put(family.merged / "weft.plan.json", other.to_bytes())
    report = resign(family, lambda s: replace(s, plan=other.digest))
    assert red(report) == {"plan", "trace", "agreements"}
    assert MergePlan.parse(other.to_bytes()).digest == other.digest


def test_agreements_for_something_else_are_red(family, agreed) -> None:
    for envelope, why in (
        (agreed(family.owner, family.owner, family.plan), "another peer"),
        (agreed(family.owner, family.builder, family.plan, purpose=Purpose.AUDIT), "something else"),
        (
            agreed(
                family.owner,
                family.builder,
                replace(family.plan, steps=(replace(family.plan.result, donor=1),)),
            ),
            "something else",
        ),
    ):
        data = agreements.pack([envelope])
        put(family.merged / AGREEMENTS_FILE, data)
        report = resign(family, lambda s, data=data: replace(s, agreements=sha256(data)))
        assert red(report) == {"agreements"}
        assert why in next(c.detail for c in report.checks if c.name == "agreements")


def test_agreements_need_both_signatures(family, agreed) -> None:
    envelope = agreed(family.owner, family.builder, family.plan)
    for party in envelope.signatures:
        alone = replace(envelope, signatures={party: envelope.signatures[party]})
        with pytest.raises(VerificationFailed, match="not signed by"):
            agreements.pack([alone])
        with pytest.raises(VerificationFailed, match="not signed by"):
            agreements.parse(canonical({"version": 1, "agreements": [alone.to_json()]}))
    assert [a.plan for a in agreements.parse(agreements.pack([envelope, envelope]))] == [family.plan.digest]


def test_the_statement_survives_its_bytes_and_names_every_tensor(family) -> None:
    statement = statement_of(family)
    assert MergeProvenance.parse(statement.to_bytes()) == statement
    manifest = Manifest.parse((family.merged / "weft.manifest.json").read_bytes())
    assert [(t.name, t.root) for t in statement.tensors] == [(t.name, t.root) for t in manifest.tensors]
    assert {t.operator for t in statement.tensors} == {"ties"}
    assert [p.role for p in statement.parents] == ["base", "expert", "expert"]


def test_a_statement_that_says_more_is_refused(pristine) -> None:
    value = json.loads(statement_of(pristine).to_bytes())
    for path in (
        [],
        ["predicate"],
        ["predicate", "buildDefinition"],
        ["subject", 0],
        ["predicate", "runDetails"],
    ):
        changed = json.loads(json.dumps(value))
        inner = changed
        for step in path:
            inner = inner[step]
        inner["more"] = "x"
        with pytest.raises(VerificationFailed, match="says more"):
            MergeProvenance.parse(canonical(changed))


@given(data=st.data())
def test_no_bit_of_the_sealed_provenance_can_be_flipped(pristine, data: st.DataObject) -> None:
    sealed = bytearray((pristine.merged / PROVENANCE_FILE).read_bytes())
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(VerificationFailed):
        open_provenance(bytes(sealed), pristine.builder.publisher.public)


@given(
    value=st.recursive(st.none() | st.integers(-9, 9) | st.text(max_size=5), st.lists)
    | st.just({"predicate": {}})
)
def test_rubbish_is_no_statement(value: Any) -> None:
    with pytest.raises(VerificationFailed):
        MergeProvenance.parse(canonical(value))


def test_securesystemslib_verifies_the_provenance_and_reads_in_toto(family) -> None:
    key = family.builder.publisher
    theirs = SSlibKey(key.key_id, "ecdsa", "ecdsa-sha2-nistp256", {"public": key.public_pem})
    envelope = TheirEnvelope.from_dict(json.loads((family.merged / PROVENANCE_FILE).read_bytes()))
    assert list(envelope.verify([theirs], 1)) == [key.key_id]
    statement = json.loads(envelope.payload)
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert {s["name"] for s in statement["subject"]} == {p.name for p in family.merged.iterdir()} - {
        PROVENANCE_FILE,
        "model.sig",
    }
    stranger = PublisherKey.generate()
    other = SSlibKey(key.key_id, "ecdsa", "ecdsa-sha2-nistp256", {"public": stranger.public_pem})
    with pytest.raises(VerificationError):
        envelope.verify([other], 1)
    envelope.payload = base64.b64decode(base64.b64encode(envelope.payload)) + b" "
    with pytest.raises(VerificationError):
        envelope.verify([theirs], 1)


SIGNED = (PUBLISHER_FILE, "model.sig", PROVENANCE_FILE, "weft.agreements.json")


def test_a_merge_that_nobody_signed_is_a_warning_and_its_bytes_still_count(family) -> None:
    for name in SIGNED:
        (family.merged / name).unlink(missing_ok=True)
    report = verify(family.merged, now=NOW)
    assert report.ok and lines(report)["signature"] is None
    assert lines(report)["plan"] and lines(report)["trace"] and report.publisher is None
    assert "known publisher" in red(verify(family.merged, publisher=family.owner.publisher.public, now=NOW))
    weights = family.merged / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes((original[-1] ^ 1,)))
    assert "manifest" in red(verify(family.merged, now=NOW))
    weights.write_bytes(original)
    (family.merged / "evil.py").write_text("import os")
    assert red(verify(family.merged, now=NOW)) == {"files"}


def test_a_signed_file_that_no_merge_writes_is_red(family) -> None:
    (family.merged / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    assert red(resign(family)) == {"files"}


def test_a_recipe_that_tells_of_another_merge_is_red(family) -> None:
    recipe = family.merged / "mergekit_config.yml"
    base, *experts = family.plan.inputs
    told = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [
            {"model": str(model), "parameters": {"weight": weight, "density": density}}
            for model, weight, density in zip(experts, (1.0, 0.5), (0.4, 0.6), strict=True)
        ],
    }
    recipe.write_text(yaml.safe_dump(told))
    assert red(resign(family)) == set()
    recipe.write_text(yaml.safe_dump(told).replace("weight: 1.0", "weight: 0.9"))
    assert red(resign(family)) == {"recipe"}
    recipe.write_text(yaml.safe_dump({**told, "base_model": "sha256:" + "0" * 64}))
    assert red(resign(family)) == {"recipe"}
    recipe.write_text(yaml.safe_dump({**told, "merge_method": "dare_ties"}))
    assert "recipe" in red(resign(family))


@pytest.mark.parametrize("kept", [PUBLISHER_FILE, "model.sig", PROVENANCE_FILE])
def test_a_part_of_a_signature_is_no_unsigned_merge(family, kept: str) -> None:
    for name in set(SIGNED) - {kept}:
        (family.merged / name).unlink(missing_ok=True)
    assert not verify(family.merged, now=NOW).ok
