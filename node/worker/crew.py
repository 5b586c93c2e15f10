"""A crew: children of a worker that evaluate candidates, each with one thread and one device.

    worker -> child   the request, then {"question": {…}} lines, then end of file
    child -> worker   {"event": {"kind": "ready", "device": "cpu"}}
                      {"event": {"kind": "answer", …}} for each, a last word

They are workers themselves and die with the one that started them. What a child answers follows from the
question alone, so it does not matter which child answers it, or when.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, BinaryIO, Self

from merge_core.evolution.fitness import Reading, Readings
from merge_core.evolution.journal import Question
from node.errors import LocalError
from node.worker.messages import MAX_LINE, decode, encode, rebuild_error

_LAST_WORDS = 4 << 10
"""Bytes of a child's stderr that are kept to explain its end."""


class Crew:
    """A context manager; must be used by the thread that entered it, whose end is that of the children."""

    def __init__(self, request: Mapping[str, Any], *, processes: int) -> None:
        """Answer questions as the task `candidates` does for `request`, in so many processes."""
        self._requests = [{**request, "rank": rank} for rank in range(processes)]
        self._children: list[_Child] = []
        self.device = ""
        """The kind of device that the children evaluate on: cpu or cuda."""

    def __enter__(self) -> Self:
        try:
            for request in self._requests:
                self._children.append(_Child(request))
            for child in self._children:
                self.device = child.expect("ready")["device"]
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, questions: Sequence[Question], *, reported: bool = False) -> Iterator[tuple[int, Readings]]:
        """Answer all, in any order; `reported` about the tasks that are only reported.

        Raises the error that a child ended in, LocalError where one died.
        """
        waiting = list(enumerate(questions))[::-1]
        with selectors.DefaultSelector() as ready:
            busy: dict[_Child, int] = {}
            for child in self._children:
                ready.register(child.voice, selectors.EVENT_READ, child)
            while waiting or busy:
                for child in self._children:
                    if child not in busy and waiting:
                        busy[child], question = waiting.pop()
                        child.say({"question": question.to_value() | {"reported": reported}})
                for key, _ in ready.select():
                    answer = key.data.expect("answer")
                    yield busy.pop(key.data), tuple(map(Reading.parse, answer["readings"]))

    def _end(self) -> None:
        for child in self._children:
            child.end()
        self._children.clear()


class _Child:
    """One process and its pipes."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        # A file, not a pipe: nobody has to read along lest it fill up.
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "node.worker", "candidates", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._ear: BinaryIO = self._process.stdin  # type: ignore[assignment]
        self.voice: BinaryIO = self._process.stdout  # type: ignore[assignment]
        self.say(dict(request))

    def say(self, message: dict[str, Any]) -> None:
        # A child that died says why elsewhere.
        with contextlib.suppress(BrokenPipeError):
            self._ear.write(encode(message))
            self._ear.flush()

    def expect(self, kind: str) -> dict[str, Any]:
        """The next event of a kind; raises what the child ended in."""
        while True:
            line = self.voice.readline(MAX_LINE)
            if not line.endswith(b"\n"):
                raise self._death()
            message = decode(line)
            if "error" in message:
                raise rebuild_error(message["error"])
            event = message.get("event", {})
            if event.get("kind") == kind:
                found: dict[str, Any] = event
                return found

    def _death(self) -> LocalError:
        """Why the child ended without a last word."""
        self.voice.close()  # nobody listens any more: it must not wait for that
        code = self._process.wait()
        size = self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, size - _LAST_WORDS))
        tail = self._words.read().decode(errors="replace")
        if code == -signal.SIGKILL:
            return LocalError(
                "an evaluator was killed (SIGKILL), most often because memory ran out",
                hint="weft evolve RECIPE --processes 1",
            )
        lines = tail.strip().splitlines()
        why = f"it died of {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
        error = LocalError(
            f"an evaluator failed: {why}{': ' + lines[-1][:500] if lines else ' and no word'}",
            hint="weft doctor",
        )
        error.add_note(tail)
        return error

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._ear.close()
        self.voice.close()
        self._words.close()


def questions(ear: BinaryIO) -> Iterator[tuple[Question, bool]]:
    """The child's side: what it is asked until the pipe is closed, and whether that is about reports."""
    while line := ear.readline(MAX_LINE):
        value = json.loads(line)["question"]
        yield Question.parse(value), bool(value["reported"])
