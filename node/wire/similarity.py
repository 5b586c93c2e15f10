"""Messages of the SimilarityService: digests to protobuf and back; reading raises Refused(MALFORMED)."""

from __future__ import annotations

from collections.abc import Sequence

from merge_core.digest import Digest
from node.domain.reasons import Reason
from node.domain.sketches import MAX_BATCH
from node.errors import Refused
from node.wire.v1 import similarity_pb2 as pb


def read_sketches_request(digests: Sequence[Digest]) -> pb.ReadSketchesRequest:
    """Write a request for minis."""
    return pb.ReadSketchesRequest(digests=digests)


def parse_read_sketches_request(message: pb.ReadSketchesRequest) -> tuple[Digest, ...]:
    """Read which minis are wanted."""
    if not 1 <= len(message.digests) <= MAX_BATCH:
        raise Refused(Reason.MALFORMED, f"1 to {MAX_BATCH} sketches in one call")
    try:
        return tuple(Digest(digest) for digest in message.digests)
    except ValueError as error:
        raise Refused(Reason.MALFORMED, str(error)) from error


def read_fingerprint_request(digest: Digest, offset: int) -> pb.ReadFingerprintRequest:
    """Write a request for a fingerprint from an offset on."""
    return pb.ReadFingerprintRequest(digest=digest, offset=offset)


def parse_read_fingerprint_request(message: pb.ReadFingerprintRequest) -> tuple[Digest, int]:
    """Read which fingerprint is wanted, and from where on."""
    if message.offset < 0:
        raise Refused(Reason.MALFORMED, "an offset below 0")
    try:
        return Digest(message.digest), message.offset
    except ValueError as error:
        raise Refused(Reason.MALFORMED, str(error)) from error
