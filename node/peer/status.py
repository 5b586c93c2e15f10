"""Errors between peers: node.errors as google.rpc.Status with an ErrorInfo of the domain "weft", and back.

What travels of our own faults is only that there was one: texts may hold paths.
"""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from node.domain.reasons import Reason
from node.errors import PeerError, Refused, Unreachable, WeftError

DOMAIN = "weft"
DETAILS = "grpc-status-details-bin"
MAX_DETAIL = 500

_CODES = {
    Reason.UNKNOWN_MODEL: grpc.StatusCode.NOT_FOUND,
    Reason.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.QUOTA_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.EXPIRED: grpc.StatusCode.FAILED_PRECONDITION,
}

_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""What is told of a peer that is not there, and by one that stops in the middle of an answer."""


def code_of(reason: Reason) -> grpc.StatusCode:
    """The gRPC code under which a reason travels, for clients that know only that."""
    return _CODES.get(reason, grpc.StatusCode.PERMISSION_DENIED)


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """End a call with an error; raises what `context.abort` raises, so that nothing follows."""
    if isinstance(error, Refused):
        code, text, reason = code_of(error.reason), error.why, f"REASON_{error.reason.name}"
        metadata = {"detail": error.detail[:MAX_DETAIL]} if error.detail else {}
    else:
        code, text, reason = grpc.StatusCode.DATA_LOSS, "The peer cannot read its own copy.", "DAMAGED"
        metadata = {}
    packed = AnyMessage()
    packed.Pack(ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata))
    status = Status(code=code.value[0], message=text[:MAX_DETAIL], details=[packed])
    await context.abort(code, text[:MAX_DETAIL], ((DETAILS, status.SerializeToString()),))


def error_of(error: grpc.aio.AioRpcError) -> WeftError:
    """What a failed call means for us: Refused, PeerError or Unreachable."""
    info = _info(error)
    if info is not None and info.reason.startswith("REASON_"):
        name = info.reason.removeprefix("REASON_")
        reason = Reason[name] if name in Reason.__members__ else Reason.UNSPECIFIED
        return Refused(reason, _printable(info.metadata.get("detail", "")))
    if error.code() in _AWAY:
        return Unreachable("the peer's data port does not answer", hint="weft peers")
    if error.code() == grpc.StatusCode.DATA_LOSS:
        return PeerError("the peer's own copy is damaged")
    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Refused(Reason.BUSY)
    return PeerError(f"the peer answered {error.code().name}")


def _info(error: grpc.aio.AioRpcError) -> ErrorInfo | None:
    trailing = error.trailing_metadata() or ()
    data = next((value for key, value in trailing if key == DETAILS), None)
    if not isinstance(data, bytes):
        return None
    try:
        for packed in Status.FromString(data).details:
            info = ErrorInfo()
            if packed.Unpack(info) and info.domain == DOMAIN:
                return info
    except DecodeError:
        return None
    return None


def _printable(text: str) -> str:
    return "".join(char for char in text[:MAX_DETAIL] if char.isprintable())
