"""Measurements: what somebody measured of a model, as a signed in-toto statement.

They lie in `weft.evaluations.jsonl` in the model's directory, a line for each evaluation. A measurement comes
after publication and must not change what was published, so the publisher's signature does not cover that
file: each line carries its own signature and the record of who made it. A value is the measurer's word; the
digest of a task says what to ask to measure it again. `Measurement.parse(m.to_bytes()) == m`.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from merge_core import files
from merge_core.checkpoint.published import EVALUATIONS_FILE, MANIFEST_FILE, read_bounded
from merge_core.digest import Digest, ModelId, canonical, parse_canonical
from merge_core.errors import MergeCoreError
from merge_core.evaluation.tasks import MAX_ITEMS, MAX_NAME, Metric
from node.domain import text
from node.domain.ids import PeerId
from node.errors import LimitReached, LocalError, VerificationFailed
from node.identity.keyring import Identity
from node.provenance.proven import Proven
from node.provenance.statement import PAYLOAD_TYPE, STATEMENT_TYPE

PREDICATE_TYPE = "urn:weft:evaluation:v1"
MAX_RESULTS = 64
MAX_MEASUREMENTS = 64
MAX_FILE = 1 << 20
MAX_TOLD = 40

_ROLE = "measurer"
_PEER = "urn:weft:peer:"
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_TOOL = re.compile(r"[a-z][a-z0-9_-]{0,40}")
_VERSION = re.compile(r"[0-9A-Za-z.+!_-]{1,60}")
_MAX_TOOLS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One score: the task by name (the measurer's) and digest, the metric, how many items, the value."""

    task: str
    digest: Digest
    metric: Metric
    items: int
    value: float

    def to_value(self) -> dict[str, Any]:
        """The result within a statement."""
        return {
            "task": {"name": self.task, "digest": {"sha256": self.digest.hex}},
            "metric": self.metric.value,
            "items": self.items,
            "value": self.value.hex(),
        }

    @classmethod
    def of(cls, value: Any) -> Result:
        """Read a result; raises ValueError, TypeError or KeyError."""
        item = text.fields(value, {"task", "metric", "items", "value"})
        task = text.fields(item["task"], {"name", "digest"})
        metric = Metric(text.text(item["metric"], 40, "metric"))
        found = float.fromhex(text.text(item["value"], 40, "value"))
        most = 1.0 if metric.higher_is_better else math.inf
        if not math.isfinite(found) or not 0 <= found <= most:
            raise ValueError(f"{found} is no value of {metric.value}")
        return cls(
            task=text.text(task["name"], MAX_NAME, "task", empty=False),
            digest=Digest("sha256:" + text.fields(task["digest"], {"sha256"})["sha256"]),
            metric=metric,
            items=text.integer(item["items"], "items", low=1, high=MAX_ITEMS),
            value=found,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What `measurer` found of a model at `measured_at` (Unix seconds); `tools` are versions by name."""

    model_id: ModelId
    measurer: PeerId
    results: tuple[Result, ...]
    tools: Mapping[str, str]
    measured_at: int

    def to_bytes(self) -> bytes:
        """The canonical bytes of the statement."""
        return canonical(
            {
                "_type": STATEMENT_TYPE,
                "subject": [{"name": MANIFEST_FILE, "digest": {"sha256": self.model_id.hex}}],
                "predicateType": PREDICATE_TYPE,
                "predicate": {
                    "measurer": {"id": _PEER + self.measurer},
                    "timeMeasured": datetime.fromtimestamp(self.measured_at, UTC).strftime(_TIME),
                    "tools": dict(self.tools),
                    "results": [result.to_value() for result in self.results],
                },
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Measurement:
        """Read a statement that may come from anybody; raises VerificationFailed on whatever is not exact."""
        try:
            found = _read(parse_canonical(data))
            # Every field that was not read, or was read as something else, makes a difference here.
            if found.to_bytes() != data:
                raise ValueError("it says more than a measurement does")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise VerificationFailed(f"not a measurement: {error}") from error
        except (OverflowError, OSError, RecursionError) as error:
            raise VerificationFailed(f"not a measurement: {error}") from error
        return found


def sign(measurement: Measurement, identity: Identity) -> bytes:
    """A measurement as a signed line; raises ValueError where nobody would read it, or it is another's."""
    if measurement.measurer != identity.peer_id:
        raise ValueError("a measurement is signed by its measurer")
    line = Proven.sign(PAYLOAD_TYPE, measurement.to_bytes(), identity).to_bytes(_ROLE)
    try:
        open_line(line)
    except VerificationFailed as error:
        raise ValueError(error.why) from error
    return line


def open_line(line: bytes) -> Measurement:
    """Read a signed line that may come from anybody, its signatures verified; raises VerificationFailed."""
    proven = Proven.parse(line, PAYLOAD_TYPE, _ROLE)
    found = Measurement.parse(proven.payload)
    if found.measurer != proven.signer.peer_id:
        raise VerificationFailed("the measurement is signed by another peer than its measurer")
    if not proven.signer.covers(found.measured_at):
        raise VerificationFailed("the measurer's key was not valid at the time of the measurement")
    return found


def lines(directory: Path) -> list[bytes]:
    """The lines of a model's evaluations file, nothing verified; none where there is no file.

    Raises VerificationFailed where there are too many or the file is a link, CorruptCheckpoint where it is
    too large.
    """
    path = directory / EVALUATIONS_FILE
    if path.is_symlink():
        raise VerificationFailed(f"{EVALUATIONS_FILE} is a link, which may lead anywhere")
    if not path.exists():
        return []
    found = read_bounded(path, MAX_FILE).removesuffix(b"\n").split(b"\n")
    if len(found) > MAX_MEASUREMENTS:
        raise VerificationFailed(f"{EVALUATIONS_FILE} has more than {MAX_MEASUREMENTS} lines")
    return found


def attach(directory: Path, line: bytes) -> Path:
    """Add a signed line to a model's evaluations file, at once and durably; the file.

    Who attaches at the same time waits. Raises VerificationFailed where what lies there does not hold,
    LimitReached where it is full.
    """
    path = directory / EVALUATIONS_FILE
    with _alone(directory):
        data = b"".join(one + b"\n" for one in (*_kept(path), line))
        if len(data) > MAX_FILE:
            raise _full(path)
        files.replace(path, data)
    return path


def expect_room(directory: Path) -> None:
    """Raise before a model is measured what `attach` would raise after; LocalError where it cannot write."""
    if not os.access(directory, os.W_OK | os.X_OK):
        raise LocalError(f"{directory} cannot be written to", hint=f"ls -ld {directory}")
    _kept(directory / EVALUATIONS_FILE)


def _kept(path: Path) -> list[bytes]:
    """The lines of a file that has room for one more, each verified."""
    kept = lines(path.parent)
    for number, other in enumerate(kept, 1):
        try:
            open_line(other)
        except VerificationFailed as error:
            raise VerificationFailed(f"{path}, line {number}: {error.why}", hint=f"rm {path}") from error
    if len(kept) == MAX_MEASUREMENTS:
        raise _full(path)
    return kept


def _full(path: Path) -> LimitReached:
    return LimitReached(f"{path} holds as many measurements as are read", hint=f"mv {path} {path}.old")


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a lock on the directory itself, since the file in it is replaced; it ends with the process."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def told(directory: Path, model_id: ModelId | None) -> list[tuple[bool | None, str]]:
    """What a reader is told of a model's measurements: a sentence each, False with one that does not hold.

    None stands with the values: their signatures were checked, and that is all. At most MAX_TOLD are listed.
    """
    try:
        signed = lines(directory)
    except (VerificationFailed, MergeCoreError) as error:
        return [(False, error.why)]
    found: list[tuple[bool | None, str]] = []
    for number, line in enumerate(signed, 1):
        try:
            measurement = open_line(line)
            if measurement.model_id != model_id:
                raise VerificationFailed(f"measured of another model, {measurement.model_id}")
        except VerificationFailed as error:
            found.append((False, f"line {number} of {EVALUATIONS_FILE}: {error.why}"))
            continue
        day = datetime.fromtimestamp(measurement.measured_at, UTC).date()
        by = f"measured by {measurement.measurer} on {day}, not measured again here"
        found += [(None, f"{_words(result)}; {by}") for result in measurement.results]
    wrong = [row for row in found if row[0] is False]
    if len(found) <= MAX_TOLD or wrong:
        return wrong or found
    return [*found[:MAX_TOLD], (None, f"and {len(found) - MAX_TOLD} more in {EVALUATIONS_FILE}")]


def _words(result: Result) -> str:
    share, digest = result.metric.higher_is_better, result.digest[:19]
    value = f"{100 * result.value:.1f} %" if share else f"{result.value:.4f}"
    return f"{result.task} ({digest}…, {result.items} items): {result.metric.value} {value}"


def _read(value: Any) -> Measurement:
    predicate = value["predicate"]
    measured = datetime.strptime(predicate["timeMeasured"], _TIME).replace(tzinfo=UTC)
    return Measurement(
        model_id=ModelId("sha256:" + value["subject"][0]["digest"]["sha256"]),
        measurer=PeerId(predicate["measurer"]["id"].removeprefix(_PEER)),
        results=text.items(predicate["results"], MAX_RESULTS, "results", Result.of),
        tools=_tools(predicate["tools"]),
        measured_at=int(measured.timestamp()),
    )


def _tools(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > _MAX_TOOLS:
        raise ValueError(f"tools are not at most {_MAX_TOOLS} versions by name")
    return {
        text.matching(name, _TOOL, "tool"): text.matching(version, _VERSION, "version")
        for name, version in value.items()
    }
