"""The parent's side of a worker: start it, feed it, listen to it, never outlive or orphan it.

Each run is one child in a process group of its own. Cancelling the caller kills the group; the child
asks the kernel to kill it when the thread that started it ends (PR_SET_PDEATHSIG), so `run` must be
awaited on a loop that lasts as long as the work, as the daemon's does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from node.errors import LocalError
from node.worker.messages import MAX_LINE, decode, encode, rebuild_error

_STDERR_TAIL = 8 << 10
_EXIT_SECONDS = 30.0

Event = Callable[[dict[str, Any]], None]


async def run(task: str, request: dict[str, Any], *, on_event: Event) -> dict[str, Any]:
    """Run one task of `node.worker.tasks` in a child process and return its result.

    `on_event` is called on this loop with each event, the first being `{"kind": "started", "pid": ...}`;
    what it raises stops the work. Raises the typed error that the task ended in, or LocalError with
    the end of the child's stderr when it died or broke the protocol.
    """
    async with started(task) as worker:
        return await worker.run(request, on_event=on_event)


@asynccontextmanager
async def started(task: str) -> AsyncIterator[Worker]:
    """A worker that loads what it needs while its request is made; asked or not, it ends with the block."""
    child = await _spawn(task)
    try:
        yield Worker(task, child)
    finally:
        await _bury(child)


class Worker:
    """A child that waits for its one request."""

    def __init__(self, task: str, child: Process) -> None:
        self._task = task
        self._child = child
        self.pid = child.pid

    async def run(self, request: dict[str, Any], *, on_event: Event) -> dict[str, Any]:
        """Hand over the request and return the result; events and errors are those of `run`."""
        child, tail = self._child, bytearray()
        feeding = asyncio.ensure_future(_feed(child, encode(request)))
        draining = asyncio.ensure_future(_drain(child, tail))
        try:
            outcome = await _listen(child, on_event)
            await asyncio.wait_for(asyncio.gather(feeding, draining, child.wait()), _EXIT_SECONDS)
        except TimeoutError:
            raise LocalError(
                f"the worker for {self._task} did not end after its last word", hint="weft doctor"
            ) from None
        finally:
            feeding.cancel()
            draining.cancel()
            await _bury(child)
        if outcome is None:
            raise _death(self._task, child, bytes(tail))
        if "error" in outcome:
            raise rebuild_error(outcome["error"])
        result: dict[str, Any] = outcome["result"]
        return result


async def _spawn(task: str) -> Process:
    # -P: the directory the user stands in must never provide a module (it may be a downloaded model).
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "node.worker", task, str(os.getpid())),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        limit=MAX_LINE,
        process_group=0,
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # The threads of a merge are enough: numpy's own would only be in their way.
    return {**os.environ, **offline, "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


async def _feed(child: Process, document: bytes) -> None:
    assert child.stdin is not None
    # A child that died early says why elsewhere.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        child.stdin.write(document)
        await child.stdin.drain()
    child.stdin.close()


async def _drain(child: Process, tail: bytearray) -> None:
    assert child.stderr is not None
    while piece := await child.stderr.read(4096):
        tail += piece
        del tail[:-_STDERR_TAIL]


async def _listen(child: Process, on_event: Event) -> dict[str, Any] | None:
    """Pass events on until the last word; None when the child ends without one."""
    assert child.stdout is not None
    while True:
        try:
            line = await child.stdout.readline()
            if not line.endswith(b"\n"):
                return None
            message = decode(line)
        except ValueError as error:
            raise LocalError(f"the worker broke its protocol: {error}", hint="weft doctor") from error
        if "event" in message:
            on_event(message["event"])
        elif "result" in message or "error" in message:
            return message
        else:
            raise LocalError(f"the worker broke its protocol: {sorted(message)}", hint="weft doctor")


async def _bury(child: Process) -> None:
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await asyncio.shield(child.wait())


def _death(task: str, child: Process, tail: bytes) -> LocalError:
    code = child.returncode or 0
    if code == -signal.SIGKILL:
        why = "it was killed (SIGKILL), most often because memory ran out"
    elif code < 0:
        why = f"it died of {signal.Signals(-code).name}"
    else:
        lines = tail.decode(errors="replace").strip().splitlines()
        why = lines[-1][:500] if lines else f"it ended with exit code {code} and no word"
    error = LocalError(f"the worker for {task} failed: {why}", hint="weft doctor")
    error.add_note(tail.decode(errors="replace"))
    return error
