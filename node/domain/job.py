"""Jobs: one machine for all long work; a job's state is a fold over its journalled events.

    QUEUED ─► WAITING_FOR_PEERS ─► FETCHING ─► SEARCHING ─► MERGING ─► VERIFYING ─► SUCCEEDED
       └────────────────── any of them may be skipped, or end in ─────────────────► FAILED | CANCELLED
                                                               (either may be resumed: QUEUED) ◄─┘

A search asks peers twice: for what it searches with, and after it for what its result is merged from.

Events: `Created` once, `Entered` a state, `Reached` a step (the frozen value that an arrow of the main job
produced, so that a resume starts at the first missing one), `Resumed`, `Ended`. Live progress is not an
event: it is not worth a journal. Times are float seconds since the epoch; values are JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeAlias


class JobKind(StrEnum):
    """Which long work a job is."""

    MERGE = "merge"
    FETCH = "fetch"
    AUDIT = "audit"
    EVOLVE = "evolve"


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "QUEUED"
    WAITING_FOR_PEERS = "WAITING_FOR_PEERS"
    FETCHING = "FETCHING"
    SEARCHING = "SEARCHING"
    MERGING = "MERGING"
    VERIFYING = "VERIFYING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself."""
        return self in _ENDED


_ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

BEGUN = "begun"
"""The step of a search that has something to show: it may be told to make do with that."""
SETTLE = "settle"
"""The step of a search that was told so."""
FOUND = "found"
"""The step of a search that is over, and has a recipe to merge by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    """Somebody asked for the job; `request` is all that a resume needs to know."""

    kind: JobKind
    title: str
    request: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entered:
    """The job is now in `state`, and waits for `waiting_on` (text for a human, empty when it is working)."""

    state: JobState
    waiting_on: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """The step produced its value."""

    step: str
    value: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The job starts again where it stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The job is over: with a result, or with an error ({kind, why, hint}) when it FAILED."""

    state: JobState
    result: Any = None
    error: Mapping[str, Any] | None = None


Event: TypeAlias = Created | Entered | Reached | Resumed | Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of a journal: the `number`-th event of a job (from 0) and when it happened."""

    job: str
    number: int
    at: float
    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Where one piece of long work stands: in which state, since when, waiting on what."""

    id: str
    kind: JobKind
    title: str
    request: Mapping[str, Any]
    created: float
    state: JobState
    since: float
    waiting_on: str = ""
    attempts: int = 1
    steps: Mapping[str, Any] = field(default_factory=dict)
    result: Any = None
    error: Mapping[str, Any] | None = None

    @property
    def can_settle(self) -> bool:
        """Whether it is a search that goes on, and has something to show."""
        return self.state is JobState.SEARCHING and BEGUN in self.steps and FOUND not in self.steps

    def to_json(self) -> dict[str, Any]:
        """What the control API and `weft jobs` show."""
        return {
            "id": self.id,
            "kind": self.kind.value,
            "title": self.title,
            "state": self.state.value,
            "created": self.created,
            "since": self.since,
            "waiting_on": self.waiting_on,
            "attempts": self.attempts,
            "steps": list(self.steps),
            "result": self.result,
            "error": dict(self.error) if self.error is not None else None,
        }


def fold(records: Iterable[Record]) -> Job:
    """The job that its events, in order, add up to.

    Raises ValueError on an order that no job can have had (an event after the end, two beginnings, a gap).
    """
    job: Job | None = None
    for expected, record in enumerate(records):
        if record.number != expected:
            raise ValueError(f"event {record.number} of job {record.job} where {expected} belongs")
        job = begin(record) if job is None else advance(job, record)
    if job is None:
        raise ValueError("no events")
    return job


def begin(record: Record) -> Job:
    """The job that its first event makes."""
    event = record.event
    if not isinstance(event, Created):
        raise ValueError(f"job {record.job} begins with {type(event).__name__}")
    return Job(
        id=record.job,
        kind=event.kind,
        title=event.title,
        request=event.request,
        created=record.at,
        state=JobState.QUEUED,
        since=record.at,
    )


def advance(job: Job, record: Record) -> Job:
    """The job after one more event; raises ValueError when that cannot follow."""
    event = record.event
    if record.job != job.id:
        raise ValueError(f"an event of job {record.job} in job {job.id}")
    if isinstance(event, Resumed):
        return _resumed(job, record.at)
    if job.state.ended or isinstance(event, Created):
        raise ValueError(f"{type(event).__name__} cannot follow {job.state} in job {job.id}")
    if isinstance(event, Reached):
        return replace(job, steps={**job.steps, event.step: event.value})
    if isinstance(event, Entered):
        if event.state.ended:
            raise ValueError(f"a job ends with Ended, not by entering {event.state}")
        since = job.since if event.state is job.state else record.at
        return replace(job, state=event.state, since=since, waiting_on=event.waiting_on)
    if not event.state.ended:
        raise ValueError(f"a job does not end in {event.state}")
    return replace(
        job, state=event.state, since=record.at, waiting_on="", result=event.result, error=event.error
    )


def _resumed(job: Job, at: float) -> Job:
    if job.state is JobState.SUCCEEDED:
        raise ValueError(f"job {job.id} has succeeded; there is nothing to resume")
    return replace(job, state=JobState.QUEUED, since=at, waiting_on="", attempts=job.attempts + 1, error=None)


_KINDS: dict[str, type[Event]] = {
    "created": Created,
    "entered": Entered,
    "reached": Reached,
    "resumed": Resumed,
    "ended": Ended,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def event_to_json(event: Event) -> dict[str, Any]:
    """An event as JSON; `event_from_json(event_to_json(e)) == e`."""
    body = {name: getattr(event, name) for name in type(event).__dataclass_fields__}
    return {"event": _NAMES[type(event)], **body}


def event_from_json(value: Mapping[str, Any]) -> Event:
    """Read what `event_to_json` wrote; raises ValueError on anything else."""
    body = dict(value)
    kind = _KINDS.get(body.pop("event", ""))
    if kind is None:
        raise ValueError(f"unknown event {str(value)[:80]}")
    if "state" in body:
        body["state"] = JobState(body["state"])
    if "kind" in body:
        body["kind"] = JobKind(body["kind"])
    try:
        return kind(**body)
    except TypeError as error:
        raise ValueError(f"not a {kind.__name__}: {error}") from error
