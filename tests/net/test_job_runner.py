"""A job survives what interrupts it: its steps are kept, its watchers see every state, its end is final."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from node.domain.job import BEGUN, FOUND, SETTLE, Created, Job, JobKind, JobState
from node.errors import LocalError, Unreachable
from node.jobs.journal import Journal
from node.jobs.runner import Attempt, Jobs, Work

MERGE = Created(kind=JobKind.MERGE, title="linear of 2", request={"recipe": "r.yml"})


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal.open(tmp_path / "node.db")
    yield journal
    journal.close()


def jobs_of(journal: Journal, work: Work) -> Jobs:
    ticks = iter(range(1, 10_000))
    return Jobs(journal, {JobKind.MERGE: work}, clock=lambda: float(next(ticks)))


async def ended(jobs: Jobs, job_id: str) -> Job:
    return [view async for view in jobs.watch(job_id)][-1].job


@pytest.mark.anyio
async def test_a_job_runs_to_its_result_and_its_watcher_sees_the_end(journal: Journal) -> None:
    seen = asyncio.Event()

    async def work(attempt: Attempt) -> dict[str, Any]:
        attempt.enter(JobState.MERGING)
        attempt.progress("tensors", 1, 2)
        await seen.wait()
        return {"recipe": attempt.request["recipe"]}

    async with jobs_of(journal, work) as jobs:
        jobs.start("a", MERGE)
        async for view in jobs.watch("a"):
            if view.progress:
                assert (view.job.state, view.progress.done) == (JobState.MERGING, 1)
                seen.set()
    assert view.job.state is JobState.SUCCEEDED
    assert view.job.result == {"recipe": "r.yml"}


@pytest.mark.anyio
async def test_asking_twice_with_one_id_starts_once(journal: Journal) -> None:
    runs = []

    async def work(attempt: Attempt) -> dict[str, Any]:
        runs.append(attempt.job.id)
        return {}

    async with jobs_of(journal, work) as jobs:
        jobs.start("a", MERGE)
        jobs.start("a", MERGE)
        await ended(jobs, "a")
        jobs.start("a", MERGE)
    assert runs == ["a"]


@pytest.mark.anyio
async def test_an_interrupted_job_is_taken_up_with_the_steps_it_had_reached(journal: Journal) -> None:
    interrupted, computed = asyncio.Event(), []

    async def work(attempt: Attempt) -> dict[str, Any]:
        if attempt.reached("plan") is None:
            computed.append("plan")
            attempt.reach("plan", "sha256:1")
            interrupted.set()
            await asyncio.Event().wait()
        return {"plan": attempt.reached("plan")}

    async with jobs_of(journal, work) as jobs:
        jobs.start("a", MERGE)
        await interrupted.wait()
    assert journal.load("a").state is JobState.QUEUED

    async with jobs_of(journal, work) as jobs:
        assert jobs.resume_unfinished() == 1
        job = await ended(jobs, "a")
    assert (job.result, job.attempts, computed) == ({"plan": "sha256:1"}, 2, ["plan"])


@pytest.mark.anyio
async def test_a_cancelled_job_has_ended_and_can_be_resumed(journal: Journal) -> None:
    started = asyncio.Event()

    async def work(attempt: Attempt) -> dict[str, Any]:
        if attempt.job.attempts == 1:
            started.set()
            await asyncio.Event().wait()
        return {}

    async with jobs_of(journal, work) as jobs:
        jobs.start("a", MERGE)
        await started.wait()
        assert (await jobs.cancel("a")).state is JobState.CANCELLED
        assert (await jobs.cancel("a")).state is JobState.CANCELLED
        jobs.resume("a")
        assert (await ended(jobs, "a")).state is JobState.SUCCEEDED


@pytest.mark.anyio
async def test_a_job_that_is_cancelled_before_its_first_step_can_be_resumed(journal: Journal) -> None:
    async def work(attempt: Attempt) -> dict[str, Any]:
        return {}

    async with jobs_of(journal, work) as jobs:
        jobs.start("a", MERGE)
        assert (await jobs.cancel("a")).state is JobState.CANCELLED
        assert jobs.running == 0
        jobs.resume("a")
        assert (await ended(jobs, "a")).state is JobState.SUCCEEDED


@pytest.mark.anyio
async def test_a_failure_says_why_and_what_to_do_next(journal: Journal) -> None:
    async def work(attempt: Attempt) -> dict[str, Any]:
        raise Unreachable("nobody answers", hint="weft peers")

    async with jobs_of(journal, work) as jobs:
        jobs.start("a", MERGE)
        job = await ended(jobs, "a")
    assert job.error == {
        "kind": "Unreachable",
        "why": "nobody answers",
        "hint": "weft peers",
        "exit_code": 4,
        "problems": [],
    }


@pytest.mark.anyio
async def test_a_running_job_is_not_resumed_beside_itself(journal: Journal) -> None:
    async def work(attempt: Attempt) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async with jobs_of(journal, work) as jobs:
        jobs.start("a", MERGE)
        await asyncio.sleep(0)
        with pytest.raises(LocalError, match="is running"):
            jobs.resume("a")
        watcher: AsyncIterator[Any] = jobs.watch("a")
        assert (await anext(watcher)).job.state is JobState.QUEUED


SEARCH = Created(kind=JobKind.EVOLVE, title="search for found", request={})


@pytest.mark.anyio
async def test_a_search_that_is_told_to_settle_is_taken_up_to_end_with_what_it_has(journal: Journal) -> None:
    searching = asyncio.Event()

    async def work(attempt: Attempt) -> dict[str, Any]:
        if attempt.reached(SETTLE):
            return {"settled": attempt.job.attempts}
        attempt.enter(JobState.SEARCHING)
        attempt.reach(BEGUN, True)
        attempt.show({"number": 1})
        searching.set()
        await asyncio.Event().wait()
        return {}

    async with Jobs(journal, {JobKind.EVOLVE: work}, clock=lambda: 1.0) as jobs:
        jobs.start("a", SEARCH)
        await searching.wait()
        assert [view.generation async for view in _first(jobs.watch("a"))] == [{"number": 1}]
        asked = await asyncio.gather(jobs.settle("a"), jobs.settle("a"))
        assert [SETTLE in job.steps for job in asked] == [True, True]
        job = await ended(jobs, "a")
        assert (job.state, job.result) == (JobState.SUCCEEDED, {"settled": 2})
        with pytest.raises(LocalError, match="no search that goes on"):
            await jobs.settle("a")


async def _first(views: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield await anext(views)


@pytest.mark.anyio
async def test_only_a_search_that_has_found_something_settles(journal: Journal) -> None:
    at = asyncio.Event()

    async def work(attempt: Attempt) -> dict[str, Any]:
        attempt.enter(JobState.SEARCHING)
        at.set()
        await asyncio.Event().wait()
        return {}

    kinds = {JobKind.EVOLVE: work, JobKind.MERGE: work}
    async with Jobs(journal, kinds, clock=lambda: 1.0) as jobs:
        jobs.start("a", SEARCH)
        await at.wait()
        with pytest.raises(LocalError, match="found nothing yet"):
            await jobs.settle("a")
        jobs.start("b", MERGE)
        with pytest.raises(LocalError, match="no search"):
            await jobs.settle("b")
        assert (jobs.running, journal.load("a").attempts) == (2, 1)


@pytest.mark.anyio
async def test_a_search_that_merges_already_is_left_alone(journal: Journal) -> None:
    at, go_on = asyncio.Event(), asyncio.Event()

    async def work(attempt: Attempt) -> dict[str, Any]:
        attempt.enter(JobState.SEARCHING)
        attempt.reach(BEGUN, True)
        attempt.reach(FOUND, {"recipe": "r"})
        at.set()
        await go_on.wait()
        return {"attempts": attempt.job.attempts}

    async with Jobs(journal, {JobKind.EVOLVE: work}, clock=lambda: 1.0) as jobs:
        jobs.start("a", SEARCH)
        await at.wait()
        assert SETTLE not in (await jobs.settle("a")).steps
        go_on.set()
        assert (await ended(jobs, "a")).result == {"attempts": 1}
