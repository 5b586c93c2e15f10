"""Our errors as google.rpc.Status and back: the class as ErrorInfo's reason, hint and exit code beside it."""

from __future__ import annotations

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from merge_core.errors import MergeCoreError, Unmergeable
from node.errors import NodeNotRunning, VerificationFailed, WeftError, exit_code_of

DOMAIN = "weft"

_CODES = {
    2: code_pb2.INVALID_ARGUMENT,
    3: code_pb2.UNAVAILABLE,
    4: code_pb2.UNAVAILABLE,
    5: code_pb2.DATA_LOSS,
    6: code_pb2.FAILED_PRECONDITION,
    7: code_pb2.RESOURCE_EXHAUSTED,
}


class ControlError(WeftError):
    """An error that the node reported; its class name and exit code are those it had there."""

    def __init__(self, why: str, *, hint: str, kind: str, exit_code: int, problems: tuple[str, ...]) -> None:
        super().__init__(why, hint=hint)
        self.kind = kind
        self.exit_code = exit_code
        self.problems = problems


def to_status(error: WeftError | MergeCoreError) -> grpc.Status:
    """Describe an error for the wire; every problem of an Unmergeable travels along."""
    code = exit_code_of(error)
    details = [
        error_details_pb2.ErrorInfo(
            reason=type(error).__name__, domain=DOMAIN, metadata={"hint": error.hint, "exit_code": str(code)}
        )
    ]
    status = status_pb2.Status(code=_CODES.get(code, code_pb2.UNKNOWN), message=error.why)
    for detail in details:
        status.details.add().Pack(detail)
    if isinstance(error, Unmergeable) and error.problems:
        status.details.add().Pack(error_details_pb2.DebugInfo(stack_entries=error.problems))
    return rpc_status.to_status(status)


def from_rpc_error(error: grpc.RpcError) -> WeftError:
    """The typed error that a failed call stands for."""
    status = rpc_status.from_call(error)
    if status is None:
        return _without_status(error)
    info, debug = error_details_pb2.ErrorInfo(), error_details_pb2.DebugInfo()
    problems: tuple[str, ...] = ()
    for detail in status.details:
        if detail.Is(debug.DESCRIPTOR):
            detail.Unpack(debug)
            problems = tuple(debug.stack_entries)
        elif detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
    return ControlError(
        status.message,
        hint=info.metadata.get("hint", ""),
        kind=info.reason or "WeftError",
        exit_code=int(info.metadata.get("exit_code", "1")),
        problems=problems,
    )


def _without_status(error: grpc.RpcError) -> WeftError:
    code = error.code()
    if code == grpc.StatusCode.UNAVAILABLE:
        return NodeNotRunning("the node does not answer", hint="weft up -d")
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return VerificationFailed("the node refused this token", hint="weft down && weft up -d")
    return WeftError(f"the node failed: {error.details() or code.name}", hint="weft doctor")
