"""Messages of the peer port: node.domain.holding to protobuf and back.

Reading raises Refused(MALFORMED) for a request and PeerError for a response: each names who must act.
"""

from __future__ import annotations

from collections.abc import Sequence

from merge_core.checkpoint.manifest import TENSOR_NAME
from merge_core.checkpoint.published import name_problem
from merge_core.digest import Digest, ModelId
from node.domain.holding import ByteRange, HeldFile, Holding, ModelRef
from node.domain.reasons import Reason
from node.errors import PeerError, Refused
from node.wire.v1 import peer_pb2 as pb

MAX_RANGES = 4096
MAX_REQUESTED = 256 << 20
"""Bytes that one call may ask for; a longer transfer is several calls."""


def model_ref(ref: ModelRef) -> pb.ModelRef:
    """Write a reference to a model."""
    return pb.ModelRef(model_id=ref.model_id, publisher=ref.publisher or "")


def parse_model_ref(message: pb.ModelRef) -> ModelRef:
    """Read a reference to a model."""
    try:
        publisher = Digest(message.publisher) if message.publisher else None
        return ModelRef(model_id=ModelId(message.model_id), publisher=publisher)
    except ValueError as error:
        raise Refused(Reason.MALFORMED, str(error)) from error


def read_file_request(ref: ModelRef, path: str, offset: int, length: int) -> pb.ReadFileRequest:
    """Write a request for bytes of a file."""
    return pb.ReadFileRequest(model=model_ref(ref), path=path, offset=offset, length=length)


def parse_read_file_request(message: pb.ReadFileRequest) -> tuple[ModelRef, str, int, int]:
    """Read (model, path, offset, length)."""
    if name_problem(message.path):
        raise Refused(Reason.MALFORMED, "a file name")
    if message.offset < 0 or not 0 <= message.length <= MAX_REQUESTED:
        raise Refused(Reason.MALFORMED, f"at most {MAX_REQUESTED} bytes of a file in one call")
    return parse_model_ref(message.model), message.path, message.offset, message.length


def read_leaves_request(ref: ModelRef, ranges: Sequence[ByteRange]) -> pb.ReadLeavesRequest:
    """Write a request for ranges of tensors."""
    return pb.ReadLeavesRequest(
        model=model_ref(ref),
        ranges=[pb.TensorRange(tensor=r.tensor, offset=r.offset, length=r.length) for r in ranges],
    )


def parse_read_leaves_request(message: pb.ReadLeavesRequest) -> tuple[ModelRef, tuple[ByteRange, ...]]:
    """Read a model and ranges of its tensors."""
    if len(message.ranges) > MAX_RANGES or sum(max(0, r.length) for r in message.ranges) > MAX_REQUESTED:
        raise Refused(Reason.MALFORMED, f"at most {MAX_RANGES} ranges and {MAX_REQUESTED} bytes in one call")
    if not all(TENSOR_NAME.fullmatch(r.tensor) for r in message.ranges):
        raise Refused(Reason.MALFORMED, "a tensor name")
    try:
        ranges = tuple(ByteRange(tensor=r.tensor, offset=r.offset, length=r.length) for r in message.ranges)
    except ValueError as error:
        raise Refused(Reason.MALFORMED, str(error)) from error
    return parse_model_ref(message.model), ranges


def holding(value: Holding) -> pb.DescribeResponse:
    """Write what is held."""
    return pb.DescribeResponse(
        publisher=value.publisher,
        files=[pb.HeldFile(path=file.path, size=file.size) for file in value.files],
    )


def parse_holding(message: pb.DescribeResponse) -> Holding:
    """Read what a peer says it holds."""
    try:
        return Holding(
            publisher=Digest(message.publisher),
            files=tuple(HeldFile(path=file.path, size=file.size) for file in message.files),
        )
    except ValueError as error:
        raise PeerError(f"the peer's description of a model is malformed: {error}") from error
