"""Measurements: signed lines beside a model, which show in a verification and cannot be forged or moved."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_core.checkpoint.published import EVALUATIONS_FILE
from merge_core.digest import ModelId, canonical, sha256
from merge_core.evaluation.tasks import Metric
from node.errors import LimitReached, VerificationFailed
from node.identity.binding import bind
from node.identity.envelopes import seal
from node.provenance import measurement, verify
from node.provenance.measurement import Measurement, Result, open_line
from node.provenance.proven import Proven
from node.provenance.statement import PAYLOAD_TYPE

NOW = 1_800_000_000
STOCK = Path(__file__).parents[2] / ".cache" / "model-signing"
RIGHT = Result(task="rev:test", digest=sha256(b"rev"), metric=Metric.EXACT_MATCH, items=400, value=0.9825)
TEXT = Result(task="notes.jsonl", digest=sha256(b"n"), metric=Metric.BITS_PER_BYTE, items=3, value=2.25)


def measured(family, **changes: object) -> Measurement:
    """What the owner of the parents found of their merge."""
    found = Measurement(
        model_id=family.manifest.model_id,
        measurer=family.owner.peer_id,
        results=(RIGHT, TEXT),
        tools={"torch": "2.13.0+cpu", "weftmerge": "0.1.0"},
        measured_at=NOW,
    )
    return replace(found, **changes)


def told(directory: Path, now: float = NOW) -> list[tuple[bool | None, str]]:
    report = verify.verify(directory, now=now)
    others = [check for check in report.checks if check.name != "measured"]
    assert all(check.ok is not False for check in others), others
    return [(check.ok, check.detail) for check in report.checks if check.name == "measured"]


def test_a_verification_tells_who_measured_what_and_that_it_is_their_word(family) -> None:
    assert told(family.merged) == []
    path = measurement.attach(family.merged, measurement.sign(measured(family), family.owner))
    assert path == family.merged / EVALUATIONS_FILE
    (first, words), (second, _) = told(family.merged)
    assert first is second is None
    assert "rev:test" in words and "exact_match 98.2 %" in words and "400 items" in words
    assert family.owner.peer_id in words and "2027-01-15" in words and "not measured again" in words
    assert verify.verify(family.merged, now=NOW).ok


def test_several_people_measure_one_model(family) -> None:
    measurement.attach(family.merged, measurement.sign(measured(family), family.owner))
    again = measured(family, measurer=family.builder.peer_id, results=(replace(RIGHT, value=0.5),))
    measurement.attach(family.merged, measurement.sign(again, family.builder))
    assert [open_line(line) for line in measurement.lines(family.merged)] == [measured(family), again]
    assert len(told(family.merged)) == 3


def test_no_signature_is_lost_when_many_attach_at_once(family) -> None:
    signed = [measurement.sign(measured(family, measured_at=NOW + i), family.owner) for i in range(12)]
    with ThreadPoolExecutor(max_workers=12) as pool:
        list(pool.map(lambda line: measurement.attach(family.merged, line), signed))
    assert sorted(measurement.lines(family.merged)) == sorted(signed)


def test_a_model_that_nobody_merged_can_be_measured_too(family) -> None:
    base = family.parents["base"]
    found = measured(family, model_id=ModelId(family.plan.inputs[0]))
    measurement.attach(base, measurement.sign(found, family.owner))
    assert [ok for ok, _ in told(base)] == [None, None]


def test_a_measurement_of_another_model_is_red(family) -> None:
    line = measurement.sign(measured(family), family.owner)
    measurement.attach(family.parents["math"], line)
    ((ok, words),) = told(family.parents["math"])
    assert ok is False and "another model" in words
    assert not verify.verify(family.parents["math"], now=NOW).ok


def test_no_byte_of_a_line_can_be_changed(family) -> None:
    line = measurement.sign(measured(family), family.owner)
    assert open_line(line) == measured(family)
    for at in range(0, len(line), 7):
        changed = bytearray(line)
        changed[at] ^= 1
        with pytest.raises(VerificationFailed):
            open_line(bytes(changed))


def test_a_forged_line_is_red_and_nothing_is_added_to_it(family) -> None:
    line = json.loads(measurement.sign(measured(family), family.owner))
    line["measurer"] = json.loads(family.builder.binding.to_bytes())
    path = family.merged / EVALUATIONS_FILE
    path.write_bytes(canonical(line) + b"\n")
    ((ok, words),) = told(family.merged)
    assert ok is False and "line 1" in words and "not signed by" in words
    with pytest.raises(VerificationFailed, match="line 1"):
        measurement.attach(family.merged, measurement.sign(measured(family), family.owner))


def test_nobody_measures_in_the_name_of_another(family) -> None:
    with pytest.raises(ValueError, match="signed by its measurer"):
        measurement.sign(measured(family), family.builder)
    other = Proven.sign(PAYLOAD_TYPE, measured(family).to_bytes(), family.builder)
    with pytest.raises(VerificationFailed, match="another peer than its measurer"):
        open_line(other.to_bytes("measurer"))


def test_a_key_that_was_not_valid_then_measured_nothing(family) -> None:
    late = bind(family.owner.host, family.owner.publisher, now=NOW + 10 * 24 * 3600)
    line = Proven.sign(PAYLOAD_TYPE, measured(family).to_bytes(), family.owner)
    with pytest.raises(VerificationFailed, match="not valid at the time"):
        open_line(replace(line, signer=late).to_bytes("measurer"))


def test_a_verdict_is_no_measurement(family) -> None:
    envelope = seal("application/vnd.weft.binding+json", measured(family).to_bytes(), family.owner.publisher)
    line = Proven(payload=b"", signer=family.owner.binding, envelope=envelope).to_bytes("measurer")
    with pytest.raises(VerificationFailed, match=r"the envelope holds"):
        open_line(line)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("predicate", "results", 0, "value"), "0x1.8p+0"),
        (("predicate", "results", 0, "value"), "nan"),
        (("predicate", "results", 0, "value"), "inf"),
        (("predicate", "results", 0, "value"), "-0x1.0p-1"),
        (("predicate", "results", 0, "value"), "0.5"),
        (("predicate", "results", 0, "value"), 1),
        (("predicate", "results", 0, "items"), 0),
        (("predicate", "results", 0, "items"), True),
        (("predicate", "results", 0, "metric"), "bleu"),
        (("predicate", "results", 0, "task", "name"), "rev\u001b[2J"),
        (("predicate", "results", 0, "task", "name"), ""),
        (("predicate", "results", 0, "task", "digest", "sha256"), "00"),
        (("predicate", "results"), {}),
        (("predicate", "tools"), {"torch": "\u001b[2J"}),
        (("predicate", "tools"), {f"t{i}": "1" for i in range(9)}),
        (("predicate", "timeMeasured"), "yesterday"),
        (("predicate", "note"), "trust me"),
        (("predicate", "measurer", "id"), "urn:weft:peer:me"),
        (("predicateType",), "urn:weft:other:v1"),
        (("subject",), []),
        (("subject", 0, "digest", "sha256"), "../../etc"),
    ],
)
def test_what_a_statement_says_wrongly_is_refused(
    pristine, where: tuple[str | int, ...], value: object
) -> None:
    statement = json.loads(measured(pristine).to_bytes())
    inner = statement
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(VerificationFailed, match="not a measurement"):
        Measurement.parse(canonical(statement))


results = st.builds(
    Result,
    task=st.text(st.sampled_from("abc:.-_ "), min_size=1, max_size=12).filter(str.strip),
    digest=st.binary(max_size=4).map(sha256),
    metric=st.sampled_from(Metric),
    items=st.integers(1, 100_000),
    value=st.floats(0, 1),
)


@given(st.lists(results, max_size=5), st.integers(0, 2**32))
def test_what_is_stated_is_read_again(pristine, found: list[Result], when: int) -> None:
    stated = measured(pristine, results=tuple(found), measured_at=when)
    assert Measurement.parse(stated.to_bytes()) == stated


@given(st.binary(max_size=200))
def test_any_bytes_are_a_measurement_or_refused(data: bytes) -> None:
    with pytest.raises(VerificationFailed):
        open_line(data)


def test_a_link_in_place_of_the_file_is_not_followed(family, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (family.merged / EVALUATIONS_FILE).symlink_to(tmp_path / "secret")
    report = verify.verify(family.merged, now=NOW)
    wrong = {check.name: check.detail for check in report.checks if check.ok is False}
    assert "signature" in wrong and "a link" in wrong["measured"]


def test_neither_lines_nor_bytes_are_unbounded(family) -> None:
    line = measurement.sign(measured(family), family.owner)
    path = family.merged / EVALUATIONS_FILE
    path.write_bytes((line + b"\n") * measurement.MAX_MEASUREMENTS)
    rows = told(family.merged)
    assert len(rows) == measurement.MAX_TOLD + 1 and rows[-1][1].startswith("and 88 more")
    with pytest.raises(LimitReached):
        measurement.attach(family.merged, line)
    path.write_bytes((line + b"\n") * (measurement.MAX_MEASUREMENTS + 1))
    assert [ok for ok, _ in told(family.merged)] == [False]
    path.write_bytes(b"x" * (measurement.MAX_FILE + 1))
    assert [ok for ok, _ in told(family.merged)] == [False]


def test_an_unsigned_merge_shows_its_measurements_too(family) -> None:
    for name in ("model.sig", "weft.publisher.json", "provenance.dsse.json", "weft.agreements.json"):
        (family.merged / name).unlink()
    measurement.attach(family.merged, measurement.sign(measured(family), family.owner))
    assert [ok for ok, _ in told(family.merged)] == [None, None]


@pytest.mark.foreign
@pytest.mark.slow
def test_the_stock_tool_still_accepts_a_measured_model(family, tmp_path: Path) -> None:
    if not (STOCK / "bin" / "model_signing").exists():
        pytest.skip("the tests of model.sig make its environment")
    (tmp_path / "key.pem").write_text(family.builder.publisher.public_pem)
    measurement.attach(family.merged, measurement.sign(measured(family), family.owner))
    command = ["verify", "key", family.merged, "--signature", family.merged / "model.sig"]
    done = subprocess.run(
        [STOCK / "bin" / "model_signing", *command, "--public_key", tmp_path / "key.pem"],
        env={**os.environ},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
