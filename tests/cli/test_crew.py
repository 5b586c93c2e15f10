"""A crew whose children end without a last word: why they did is told."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from node.errors import LocalError
from node.worker.crew import Crew, _Child


def test_a_crash_is_told_by_its_last_words_and_not_as_want_of_memory() -> None:
    strange: dict[str, Any] = {"recipe": 4}
    with (
        pytest.raises(LocalError, match="an evaluator failed: it ended with exit code 1: ") as caught,
        Crew(strange, processes=1),
    ):
        pass
    assert "Error" in caught.value.why and "memory" not in caught.value.why
    assert caught.value.hint == "weft doctor"
    assert "Traceback" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("number", "why"),
    [(signal.SIGKILL, "killed .SIGKILL., most often because memory"), (signal.SIGABRT, "died of SIGABRT")],
)
def test_memory_is_spoken_of_where_the_kernel_killed(number: signal.Signals, why: str) -> None:
    child = _Child({"rank": 0})
    os.kill(child._process.pid, number)
    try:
        with pytest.raises(LocalError, match=why) as caught:
            child.expect("ready")
    finally:
        child.end()
    assert ("memory" in caught.value.why) == (number == signal.SIGKILL)
