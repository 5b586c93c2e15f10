"""Running jobs: every attempt has an owner, journals what it reached, and can be watched and cancelled.

    async with Jobs(journal, {JobKind.MERGE: merge}, clock=time.time) as jobs:
        jobs.start(job_id, Created(kind=JobKind.MERGE, title="…", request={…}))
        async for view in jobs.watch(job_id): ...

A job that a person cancels ends as CANCELLED; one that the node's end interrupts stays unfinished in the
journal, and `resume_unfinished` takes it up again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from merge_core.errors import MergeCoreError
from node.domain.job import (
    FOUND,
    SETTLE,
    Created,
    Ended,
    Entered,
    Event,
    Job,
    JobKind,
    JobState,
    Reached,
    Resumed,
)
from node.errors import LocalError, WeftError, exit_code_of, of_system
from node.jobs.journal import Journal

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the step at hand is: `done` of `total`, in whatever `what` counts."""

    what: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A job as its journal says, with the live progress that no journal keeps.

    `generation` is the newest one of a search, as `node.worker.evolution` tells it.
    """

    job: Job
    progress: Progress | None = None
    generation: Mapping[str, Any] | None = None


OnChange = Callable[[JobView], None]


class Attempt:
    """One attempt at a job: what the work may learn of it and say about it."""

    def __init__(self, journal: Journal, job: Job, clock: Callable[[], float], on_change: OnChange) -> None:
        self.job = job
        self._journal = journal
        self._clock = clock
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()

    @property
    def request(self) -> Mapping[str, Any]:
        """What was asked for."""
        return self.job.request

    def reached(self, step: str) -> Any:
        """The value of a step that this or an earlier attempt reached, else None."""
        return self.job.steps.get(step)

    def reach(self, step: str, value: Any) -> None:
        """Journal the value of a step, unless it is journalled already."""
        if self.job.steps.get(step) != value:
            self.record(Reached(step=step, value=value))

    def enter(self, state: JobState, waiting_on: str = "") -> None:
        """Say in which state the job is now, and what it waits for."""
        if (self.job.state, self.job.waiting_on) != (state, waiting_on):
            self.record(Entered(state=state, waiting_on=waiting_on))

    def progress(self, what: str, done: int, total: int) -> None:
        """Tell watchers how far the step at hand is; not journalled."""
        self._on_change(JobView(job=self.job, progress=Progress(what=what, done=done, total=total)))

    def show(self, generation: Mapping[str, Any]) -> None:
        """Tell watchers of a generation of a search; not journalled."""
        self._on_change(JobView(job=self.job, generation=generation))

    def progress_from_thread(self, what: str, done: int, total: int) -> None:
        """The same from a thread that computes."""
        self._loop.call_soon_threadsafe(self.progress, what, done, total)

    def record(self, event: Event) -> None:
        """Journal one event and tell watchers."""
        self.job = self._journal.append(self.job.id, event, self._clock())
        self._on_change(JobView(job=self.job))


Work = Callable[[Attempt], Awaitable[dict[str, Any]]]
"""Does a job from wherever its steps say it stands; returns the result, JSON."""


async def perform(
    journal: Journal, job: Job, work: Work, *, clock: Callable[[], float], on_change: OnChange
) -> Job:
    """Attempt one job to its end; raises what the work raised, after journalling it.

    The caller holds the job's lock. Cancellation leaves the job unfinished.
    """
    attempt = Attempt(journal, job, clock, on_change)
    try:
        result = await work(attempt)
    except Exception as error:
        attempt.record(Ended(state=JobState.FAILED, error=describe(error)))
        raise
    attempt.record(Ended(state=JobState.SUCCEEDED, result=result))
    return attempt.job


def describe(error: Exception) -> dict[str, Any]:
    """An error as a job keeps it: {kind, why, hint, exit_code, problems}."""
    if isinstance(error, OSError) and error.errno is not None:
        error = of_system(error)
    known = isinstance(error, WeftError | MergeCoreError)
    return {
        "kind": type(error).__name__,
        "why": str(error) or type(error).__name__,
        "hint": getattr(error, "hint", "") if known else "weft doctor",
        "exit_code": exit_code_of(error),
        "problems": list(getattr(error, "problems", ())),
    }


class Jobs:
    """The jobs that this process works on; an async context manager that owns their tasks."""

    def __init__(self, journal: Journal, work: Mapping[JobKind, Work], *, clock: Callable[[], float]) -> None:
        self._journal = journal
        self._work = work
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._views: dict[str, JobView] = {}
        self._changed = asyncio.Condition()
        self._notices: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._notices, return_exceptions=True)

    @property
    def running(self) -> int:
        """How many jobs are worked on now."""
        return len(self._tasks)

    def start(self, job_id: str, created: Created) -> Job:
        """Begin a job, or return the one of this id: asking twice starts once."""
        try:
            return self._journal.load(job_id)
        except LocalError:
            job = self._journal.create(job_id, created, self._clock())
        self._spawn(job)
        return job

    def resume(self, job_id: str) -> Job:
        """Take up a job that failed, was cancelled or was interrupted; raises LocalError when it runs."""
        if job_id in self._tasks:
            raise LocalError(f"job {job_id} is running", hint=f"weft jobs watch {job_id}")
        job = self._journal.load(job_id)
        if job.state is JobState.SUCCEEDED:
            return job
        job = self._journal.append(job_id, Resumed(), self._clock())
        self._spawn(job)
        return job

    def resume_unfinished(self) -> int:
        """Take up whatever an earlier process of this node left unfinished; returns how many."""
        left = [job for job in self._journal.unfinished() if not self._journal.running(job.id)]
        for job in left:
            self.resume(job.id)
        return len(left)

    async def cancel(self, job_id: str) -> Job:
        """Stop a job and end it as CANCELLED; one that has ended stays as it is."""
        job = await self._interrupt(job_id)
        if not job.state.ended:
            job = self._journal.append(job_id, Ended(state=JobState.CANCELLED), self._clock())
            self._announce()
        return job

    async def settle(self, job_id: str) -> Job:
        """Let a search make do with the best that it has found: it is interrupted, and taken up to end so.

        Raises LocalError where nothing is sought, or nothing found yet.
        """
        job = self._journal.load(job_id)
        if job.kind is not JobKind.EVOLVE or job.state.ended:
            raise LocalError(f"job {job_id} is no search that goes on", hint="weft jobs ls")
        if job.steps.keys() & {SETTLE, FOUND}:
            return job
        if not job.can_settle:
            raise LocalError(
                f"search {job_id} has found nothing yet", hint=f"weft jobs cancel {job_id}, or ask later"
            )
        job = await self._interrupt(job_id)
        if job.state.ended or SETTLE in job.steps:
            return job
        self._journal.append(job_id, Reached(step=SETTLE, value=True), self._clock())
        return self.resume(job_id)

    async def _interrupt(self, job_id: str) -> Job:
        """Stop working on a job; as it then is."""
        task = self._tasks.get(job_id)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return self._journal.load(job_id)

    def find(self, beginning: str) -> Job:
        """The one job whose id begins so."""
        return self._journal.find(beginning)

    def newest(self, limit: int, before: str | None = None) -> tuple[Job, ...]:
        """A page of jobs, newest first."""
        return self._journal.jobs(limit=limit, before=before)

    async def watch(self, job_id: str) -> AsyncIterator[JobView]:
        """The job now and after every change, ending with its end; a slow watcher misses what was between."""
        shown: JobView | None = None
        while True:
            async with self._changed:
                while (view := self._view(job_id)) == shown:
                    await self._changed.wait()
            shown = view
            yield view
            if view.job.state.ended:
                return

    def _view(self, job_id: str) -> JobView:
        return self._views.get(job_id) or JobView(job=self._journal.load(job_id))

    def _spawn(self, job: Job) -> None:
        self._views[job.id] = JobView(job=job)
        task = asyncio.create_task(self._run(job), name=f"job {job.id}")
        self._tasks[job.id] = task
        # Not a `finally` in the task: one that is cancelled before its first step never gets there.
        task.add_done_callback(lambda _: self._ended(job.id))

    async def _run(self, job: Job) -> None:
        try:
            work = self._work[job.kind]
            with self._journal.lock(job.id):
                job = self._journal.load(job.id)
                await perform(self._journal, job, work, clock=self._clock, on_change=self._notice)
        except (WeftError, MergeCoreError) as error:
            log.info("job %s failed: %s", job.id, error)
        except Exception:
            log.exception("job %s failed", job.id)

    def _ended(self, job_id: str) -> None:
        del self._tasks[job_id]
        self._views.pop(job_id, None)
        self._announce()

    def _notice(self, view: JobView) -> None:
        self._views[view.job.id] = view
        self._announce()

    def _announce(self) -> None:
        notice = asyncio.get_running_loop().create_task(self._wake())
        self._notices.add(notice)
        notice.add_done_callback(self._notices.discard)

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()
