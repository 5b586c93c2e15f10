"""Probe sets: texts without answers, on which models are compared by what they would say next.

    probes = find("general")          # or "zoo", or FILE.jsonl
    probes.digest                     # what makes two measurements comparable

One object a line, `{"task": "maths", "prompt": "", "text": "The sum of …"}`. The positions that predict the
tokens of `text`, given `prompt`, are those whose next-token distributions are measured. A text is anybody's
writing, not an answer that is right: a probe set tells nobody what a model should say, so that it can be made
for any task before a single item of it has been labelled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from merge_core.checkpoint.published import read_bounded
from merge_core.digest import Digest, canonical, sha256
from merge_core.errors import CorruptCheckpoint, InvalidTask

MAX_POSITIONS = 512
"""Positions whose distributions a fingerprint publishes."""
MAX_FILE = 1 << 20
MAX_PROBES = 512
MAX_TEXT = 4096
"""Characters of a prompt or a text."""
MAX_TASKS = 64
MAX_NAME = 120
BUILT_IN = ("general", "zoo")

_KEYS = frozenset({"task", "prompt", "text"})
_HINT = 'a line is {"task": "maths", "prompt": "", "text": "The sum of two odd numbers is even."}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One text of a task, read after a prompt that may be empty."""

    task: str
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class ProbeSet:
    """Probes in their order; raises InvalidTask on what cannot be asked. `name` is for people."""

    name: str
    probes: tuple[Probe, ...]

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise InvalidTask(f"{self.name[:40]!r} is no name of at most {MAX_NAME} printable characters")
        if not 1 <= len(self.probes) <= MAX_PROBES:
            raise InvalidTask(f"{self.name} has {len(self.probes)} probes; 1 to {MAX_PROBES} are asked")
        for number, probe in enumerate(self.probes, 1):
            why = _problem(probe)
            if why:
                raise InvalidTask(f"{self.name}, probe {number}: {why}", hint=_HINT)
        if len(self.tasks) > MAX_TASKS:
            raise InvalidTask(f"{self.name} has {len(self.tasks)} tasks; at most {MAX_TASKS} are told apart")

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in the order in which they come up."""
        return tuple(dict.fromkeys(probe.task for probe in self.probes))

    @cached_property
    def digest(self) -> Digest:
        """Of the probes in their order, whatever the set is called."""
        listed = [[probe.task, probe.prompt, probe.text] for probe in self.probes]
        return sha256(canonical({"version": 1, "probes": listed}))

    def lines(self) -> Iterable[str]:
        """The set as JSONL, without line ends: `parse(s.name, s.lines()) == s`."""
        for probe in self.probes:
            yield json.dumps({"task": probe.task, "prompt": probe.prompt, "text": probe.text})


def find(reference: str) -> ProbeSet:
    """The built-in set of a name, or the one in a file `….jsonl`; raises InvalidTask."""
    if reference in BUILT_IN:
        text = (
            resources.files("merge_core.simmerge.functional")
            .joinpath(f"probes_{reference}.jsonl")
            .read_text("utf-8")
        )
        return parse(reference, text.split("\n"))
    if not reference.endswith(".jsonl"):
        raise InvalidTask(
            f"there is no probe set {reference[:80]!r}",
            hint=f"weft add DIR --probes {BUILT_IN[0]}; or {', '.join(BUILT_IN[1:])}, or FILE.jsonl",
        )
    return read(Path(reference))


def read(path: Path) -> ProbeSet:
    """Read a JSONL file, named as the file is; raises InvalidTask."""
    try:
        text = read_bounded(path, MAX_FILE).decode("utf-8-sig")
    except (OSError, CorruptCheckpoint, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidTask(f"the probe set {path} cannot be read: {why}", hint=f"ls -l {path}") from error
    return parse(path.name, text.split("\n"))


def parse(name: str, lines: Iterable[str]) -> ProbeSet:
    """Read lines that may come from anybody; raises InvalidTask naming the line that is wrong."""
    probes: list[Probe] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            probe = _line(line)
            problem = _problem(probe)
            if problem or len(probes) == MAX_PROBES:
                raise ValueError(problem or f"more than {MAX_PROBES} probes")
        except (ValueError, RecursionError) as error:
            raise InvalidTask(f"{name}, line {number}: {error}", hint=_HINT) from error
        probes.append(probe)
    return ProbeSet(name=name, probes=tuple(probes))


def _line(line: str) -> Probe:
    value = json.loads(line, object_pairs_hook=_unique)
    if not isinstance(value, dict) or value.keys() != _KEYS:
        raise ValueError("not an object of task, prompt and text")
    for key, text in value.items():
        if not isinstance(text, str):
            raise ValueError(f"{key} is not text")
    return Probe(**value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is repeated")
    return value


def _problem(probe: Probe) -> str | None:
    """Why a probe cannot be asked; None where it can."""
    if not is_name(probe.task):
        return f"{probe.task[:40]!r} is no name of a task"
    if not probe.text or len(probe.text) > MAX_TEXT or len(probe.prompt) > MAX_TEXT:
        return f"a text has 1 to {MAX_TEXT} characters, a prompt at most as many"
    try:
        (probe.prompt + probe.text).encode()
    except UnicodeEncodeError:
        return "half a surrogate pair is no text"
    return None


def is_name(text: str) -> bool:
    """Whether a set or a task may be called so."""
    return 0 < len(text) <= MAX_NAME and text.isprintable() and text.strip() == text
