"""The child's side of a worker: `python -m node.worker TASK PARENT_PID`, not for people.

It ties its life to its parent's before it imports anything heavy, keeps the real stdout for messages
(whatever a library prints goes to stderr), reads one request and says one last word.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from typing import Any, BinaryIO

from node.worker.messages import describe_error, encode

_PR_SET_PDEATHSIG = 1
_COLLECT_EVERY = 100_000
"""Objects between two looks for cycles: many tensors are many objects, which nearly all stay to the end."""


def main(arguments: list[str]) -> int:
    """Run the task that the arguments name; 0 when a last word was said."""
    task, parent = arguments
    _die_with(int(parent))
    gc.set_threshold(_COLLECT_EVERY)
    voice = _take_stdout()

    def say(message: dict[str, Any]) -> None:
        voice.write(encode(message))
        voice.flush()

    say({"event": {"kind": "started", "pid": os.getpid()}})
    try:
        from node.worker.tasks import TASKS, load  # after the parent check: this may take seconds

        load(task)
        request = json.loads(sys.stdin.buffer.readline())
        say({"result": TASKS[task](request, lambda event: say({"event": event}))})
    except Exception as error:
        described = describe_error(error)
        if described is None:
            traceback.print_exc()
            return 1
        say({"error": described})
    return 0


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have died before the call above, and the kernel only tells of deaths to come.
    if os.getppid() != parent:
        os._exit(1)


def _take_stdout() -> BinaryIO:
    voice = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return voice


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
