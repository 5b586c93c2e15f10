"""Journal: the events of every job, appended and never changed, and who works on a job right now.

A job is the fold over its events (`node.domain.job`), so what cannot follow is refused before it is written.
The lock of a job belongs to a process and goes with it: `kill -9` leaves no lock behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from node.domain.job import (
    Created,
    Event,
    Job,
    JobState,
    Record,
    advance,
    begin,
    event_from_json,
    event_to_json,
    fold,
)
from node.errors import LocalError
from node.store import Store

MAX_EVENT = 16 << 20
"""Bytes of one event; what is larger belongs into a file that the event names."""

KEEP_ENDED = 1000
_ENDED = tuple(state.value for state in JobState if state.ended)

_held: set[tuple[str, int]] = set()
_held_lock = threading.Lock()


class Journal:
    """The jobs in one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._locks = store.path.with_name(store.path.name + "-lock")

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the journal in a file of its own, or create it; `close` or `remove` it afterwards."""
        return cls(Store(path))

    def close(self) -> None:
        """Close the file."""
        self._store.close()

    def remove(self) -> None:
        """Delete the file and all that lies beside it: the work it was for is done."""
        self._store.remove()

    def create(self, job_id: str, event: Created, now: float) -> Job:
        """Begin a job; raises LocalError when there is one of this id."""
        record = Record(job=job_id, number=0, at=now, event=event)
        job = begin(record)
        with self._store.transaction():
            if self._row(job_id) is not None:
                raise LocalError(f"there is a job {job_id} already", hint=f"weft jobs watch {job_id}")
            self._store.change("INSERT INTO jobs (id, state) VALUES (?, ?)", job_id, job.state.value)
            self._write(record)
        return job

    def append(self, job_id: str, event: Event, now: float) -> Job:
        """Add one event and return the job as it then is.

        Raises ValueError when the event cannot follow, LocalError when there is no such job.
        """
        with self._store.transaction():
            records = self.records(job_id)
            record = Record(job=job_id, number=len(records), at=now, event=event)
            job = advance(fold(records), record)
            self._write(record)
            self._store.change("UPDATE jobs SET state = ? WHERE id = ?", job.state.value, job_id)
        return job

    def load(self, job_id: str) -> Job:
        """The job as its events say; raises LocalError when there is none."""
        return fold(self.records(job_id))

    def find(self, beginning: str) -> Job:
        """The one job whose id begins so; raises LocalError when it is none or several."""
        found = self._store.rows(
            "SELECT id FROM jobs WHERE substr(id, 1, ?) = ? LIMIT 2", len(beginning), beginning
        )
        if len(found) != 1:
            raise LocalError(
                f"{'several jobs begin' if found else 'no job begins'} with {beginning!r}",
                hint="weft jobs ls",
            )
        return self.load(found[0]["id"])

    def records(self, job_id: str) -> tuple[Record, ...]:
        """The events of a job, in order; raises LocalError when there is no such job."""
        row = self._row(job_id)
        if row is None:
            raise LocalError(f"there is no job {job_id}", hint="weft jobs ls")
        found = self._store.rows("SELECT number, at, event FROM events WHERE job = ? ORDER BY number", row)
        return tuple(
            Record(job=job_id, number=r["number"], at=r["at"], event=event_from_json(json.loads(r["event"])))
            for r in found
        )

    def jobs(self, *, limit: int = 100, before: str | None = None) -> tuple[Job, ...]:
        """The newest jobs first; `before` is the id of the last one of the page before."""
        row = self._row(before) if before else None
        found = self._store.rows(
            "SELECT id FROM jobs WHERE ? IS NULL OR row < ? ORDER BY row DESC LIMIT ?", row, row, limit
        )
        return tuple(self.load(r["id"]) for r in found)

    def unfinished(self) -> tuple[Job, ...]:
        """Every job that neither succeeded nor failed nor was cancelled, oldest first: what a crash left."""
        found = self._store.rows(f"SELECT id FROM jobs WHERE state NOT IN {_ENDED} ORDER BY row")
        return tuple(self.load(r["id"]) for r in found)

    def trim(self, keep: int = KEEP_ENDED) -> int:
        """Forget all but the newest jobs that have ended, with their events; returns how many went."""
        return self._store.change(
            f"DELETE FROM jobs WHERE state IN {_ENDED} AND row NOT IN"
            f" (SELECT row FROM jobs WHERE state IN {_ENDED} ORDER BY row DESC LIMIT ?)",
            keep,
        )

    def running(self, job_id: str) -> bool:
        """Whether some process works on the job at this moment."""
        try:
            with self.lock(job_id):
                return False
        except LocalError:
            return True

    @contextmanager
    def lock(self, job_id: str) -> Iterator[None]:
        """Be the only one to work on a job; raises LocalError when somebody does, or there is no such job."""
        row = self._row(job_id)
        if row is None:
            raise LocalError(f"there is no job {job_id}", hint="weft jobs ls")
        busy = LocalError(f"job {job_id} is being worked on", hint=f"weft jobs watch {job_id}")
        key = (str(self._locks.absolute()), row)
        with _held_lock:
            if key in _held:
                raise busy
            _held.add(key)
        try:
            # A lock on the row's byte of one file, not a file per job: a crash leaves nothing to tidy up.
            descriptor = os.open(self._locks, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if not _lock_byte(descriptor, row):
                    raise busy
                yield
            finally:
                os.close(descriptor)
        finally:
            with _held_lock:
                _held.discard(key)

    def _row(self, job_id: str) -> int | None:
        found = self._store.row("SELECT row FROM jobs WHERE id = ?", job_id)
        return None if found is None else int(found["row"])

    def _write(self, record: Record) -> None:
        text = json.dumps(event_to_json(record.event), default=_plain, separators=(",", ":"))
        if len(text) > MAX_EVENT:
            raise ValueError(f"an event of {len(text)} bytes; at most {MAX_EVENT} are journalled")
        self._store.change(
            "INSERT INTO events (job, number, at, event) VALUES (?, ?, ?, ?)",
            self._row(record.job),
            record.number,
            record.at,
            text,
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "items"):
        return dict(value)
    raise TypeError(f"{type(value).__name__} cannot be journalled")


def _lock_byte(descriptor: int, offset: int) -> bool:
    """Lock one byte for as long as `descriptor` is open; False when another process holds it."""
    try:
        if hasattr(fcntl, "F_OFD_SETLK"):
            # Open-file locks, unlike POSIX ones, stay when the process closes another descriptor.
            request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
        else:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
    except (BlockingIOError, PermissionError):
        return False
    return True
