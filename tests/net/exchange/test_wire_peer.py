"""What crosses the peer port: numbers that agree, values that survive, requests that are refused."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_core.checkpoint.published import name_problem
from merge_core.digest import Digest, ModelId
from node.domain.holding import ByteRange, HeldFile, Holding, ModelRef
from node.domain.reasons import Reason
from node.errors import PeerError, Refused
from node.wire import peer as wire
from node.wire.v1 import peer_pb2 as pb

ROOT = Path(__file__).parents[3]
digests = st.binary(min_size=32, max_size=32).map(lambda raw: "sha256:" + raw.hex())
refs = st.builds(ModelRef, model_id=digests.map(ModelId), publisher=st.none() | digests.map(Digest))
names = st.text(min_size=1, max_size=40).filter(lambda name: not name_problem(name))


def test_reasons_on_the_wire_are_the_reasons_of_the_node() -> None:
    assert dict(pb.Reason.items()) == {f"REASON_{reason.name}": reason.value for reason in Reason}
    proto = (ROOT / "protos/node/wire/v1/peer.proto").read_text()
    for reason in Reason:
        assert f"// {reason.sentence}\n  REASON_{reason.name} = {reason.value};" in proto


def test_the_generated_modules_are_what_the_proto_files_give(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "protos/generate.py"), "--check"]
    assert subprocess.run(script, check=False, capture_output=True, text=True).stderr == ""


@given(refs)
def test_a_reference_survives(ref: ModelRef) -> None:
    assert wire.parse_model_ref(pb.ModelRef.FromString(wire.model_ref(ref).SerializeToString())) == ref


@given(refs, st.lists(st.tuples(st.integers(0, 2**50), st.integers(0, 1 << 15)), max_size=50))
def test_a_request_for_leaves_survives(ref: ModelRef, spans: list[tuple[int, int]]) -> None:
    ranges = tuple(ByteRange(tensor=f"t.{i}", offset=o, length=n) for i, (o, n) in enumerate(spans))
    sent = wire.read_leaves_request(ref, ranges).SerializeToString()
    assert wire.parse_read_leaves_request(pb.ReadLeavesRequest.FromString(sent)) == (ref, ranges)


@given(digests.map(Digest), st.dictionaries(names.map(str.casefold), st.integers(0, 2**46), max_size=20))
def test_a_holding_survives(publisher: Digest, sizes: dict[str, int]) -> None:
    files = tuple(HeldFile(path=p, size=s) for p, s in sorted(sizes.items()) if not name_problem(p))
    value = Holding(publisher=publisher, files=files)
    sent = wire.holding(value).SerializeToString()
    assert wire.parse_holding(pb.DescribeResponse.FromString(sent)) == value


@given(st.binary(max_size=300))
def test_whatever_bytes_come_the_request_is_read_or_refused(data: bytes) -> None:
    for message, parse in (
        (pb.ReadLeavesRequest, wire.parse_read_leaves_request),
        (pb.ReadFileRequest, wire.parse_read_file_request),
    ):
        try:
            request = message.FromString(data)
        except Exception:
            continue
        try:
            parse(request)
        except Refused as refused:
            assert refused.reason is Reason.MALFORMED


@pytest.mark.parametrize("path", ["../x", "a/b", "", ".hidden", "a\0b", "con.json", "x" * 300])
def test_a_peer_cannot_name_a_file_that_is_no_plain_name(path: str) -> None:
    publisher = "sha256:" + "0" * 64
    with pytest.raises(PeerError):
        wire.parse_holding(pb.DescribeResponse(publisher=publisher, files=[pb.HeldFile(path=path, size=1)]))


def test_a_peer_cannot_name_one_file_twice() -> None:
    files = [pb.HeldFile(path=path, size=1) for path in ("a.json", "A.json")]
    with pytest.raises(PeerError):
        wire.parse_holding(pb.DescribeResponse(publisher="sha256:" + "0" * 64, files=files))


def test_more_than_one_call_may_ask_for_is_refused() -> None:
    ref = ModelRef(model_id=ModelId("sha256:" + "0" * 64), publisher=None)
    for request in (
        wire.read_leaves_request(ref, [ByteRange(tensor="t", offset=0, length=wire.MAX_REQUESTED + 1)]),
        wire.read_leaves_request(ref, [ByteRange(tensor="t", offset=0, length=1)] * 5000),
    ):
        with pytest.raises(Refused) as caught:
            wire.parse_read_leaves_request(request)
        assert caught.value.reason is Reason.MALFORMED
    with pytest.raises(Refused):
        wire.parse_read_file_request(wire.read_file_request(ref, "a.json", 0, wire.MAX_REQUESTED + 1))
