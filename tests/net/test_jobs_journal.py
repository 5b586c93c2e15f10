"""Jobs survive what kills their process: events fold, illegal orders are refused, locks go with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.domain.job import (
    Created,
    Ended,
    Entered,
    Event,
    JobKind,
    JobState,
    Reached,
    Record,
    Resumed,
    event_from_json,
    event_to_json,
    fold,
)
from node.errors import LocalError
from node.jobs.journal import Journal
from node.store import Store

CREATED = Created(kind=JobKind.MERGE, title="ties of three", request={"recipe": "merge_method: ties"})


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.open(tmp_path / "node.db")


def test_a_job_says_its_state_since_when_and_what_it_waits_for(journal: Journal) -> None:
    journal.create("a1", CREATED, 100.0)
    journal.append("a1", Entered(state=JobState.WAITING_FOR_PEERS, waiting_on="a holder of expert x"), 105.0)
    job = journal.append("a1", Entered(state=JobState.WAITING_FOR_PEERS, waiting_on="an answer"), 107.5)
    assert (job.state, job.since, job.waiting_on) == (JobState.WAITING_FOR_PEERS, 105.0, "an answer")
    job = journal.append("a1", Ended(state=JobState.FAILED, error={"why": "nobody answered"}), 110.0)
    assert (job.state, job.since, job.waiting_on) == (JobState.FAILED, 110.0, "")


def test_a_resumed_job_keeps_the_steps_it_has_reached(tmp_path: Path, journal: Journal) -> None:
    journal.create("a1", CREATED, 1.0)
    journal.append("a1", Reached(step="plan", value={"digest": "sha256:00"}), 2.0)
    journal.close()
    again = Journal.open(tmp_path / "node.db")
    assert [job.id for job in again.unfinished()] == ["a1"]
    job = again.append("a1", Resumed(), 9.0)
    assert job.steps == {"plan": {"digest": "sha256:00"}}
    assert (job.state, job.attempts, job.request) == (JobState.QUEUED, 2, CREATED.request)
    again.append("a1", Ended(state=JobState.SUCCEEDED, result={"model_id": "x"}), 10.0)
    assert again.unfinished() == ()
    assert again.load("a1").result == {"model_id": "x"}


def test_what_cannot_follow_is_not_written(journal: Journal) -> None:
    journal.create("a1", CREATED, 1.0)
    journal.append("a1", Ended(state=JobState.SUCCEEDED), 2.0)
    for event in (Entered(state=JobState.MERGING), Resumed(), CREATED, Ended(state=JobState.CANCELLED)):
        with pytest.raises(ValueError, match=r"cannot follow|succeeded"):
            journal.append("a1", event, 3.0)
    with pytest.raises(LocalError, match="already"):
        journal.create("a1", CREATED, 3.0)
    assert len(journal.records("a1")) == 2


def test_jobs_are_listed_newest_first_and_in_pages(journal: Journal) -> None:
    for name in ("a1", "a2", "b3"):
        journal.create(name, CREATED, 1.0)
    assert [job.id for job in journal.jobs(limit=2)] == ["b3", "a2"]
    assert [job.id for job in journal.jobs(limit=2, before="a2")] == ["a1"]
    assert journal.find("b").id == "b3"
    with pytest.raises(LocalError, match="several"):
        journal.find("a")
    with pytest.raises(LocalError, match="no job"):
        journal.load("zz")


def test_of_the_jobs_that_have_ended_only_the_newest_are_kept(tmp_path: Path, journal: Journal) -> None:
    for number in range(6):
        journal.create(f"a{number}", CREATED, 1.0)
    for number in (0, 2, 3, 5):
        journal.append(f"a{number}", Ended(state=JobState.FAILED), 2.0)
    assert journal.trim(keep=2) == 2 and journal.trim(keep=2) == 0
    assert [job.id for job in journal.jobs()] == ["a5", "a4", "a3", "a1"]
    store = Store(tmp_path / "node.db")
    (left,) = store.rows("SELECT count(*) AS n, count(DISTINCT job) AS jobs FROM events")
    assert (left["n"], left["jobs"]) == (6, 4)


def test_only_one_works_on_a_job(tmp_path: Path, journal: Journal) -> None:
    journal.create("a1", CREATED, 1.0)
    journal.create("a2", CREATED, 1.0)
    other = Journal.open(tmp_path / "node.db")
    with journal.lock("a1"):
        assert other.running("a1") and not other.running("a2")
        with pytest.raises(LocalError, match="being worked on"), other.lock("a1"):
            pass
    with other.lock("a1"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path: Path, journal: Journal) -> None:
    journal.create("a1", CREATED, 1.0)
    script = (
        "import sys, pathlib\nfrom node.jobs.journal import Journal\n"
        "with Journal.open(pathlib.Path(sys.argv[1])).lock('a1'):\n    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "node.db")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None and owner.stdin is not None
    assert owner.stdout.readline() == "locked\n"
    assert journal.running("a1")
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdin.close()
    owner.stdout.close()
    assert not journal.running("a1")
    journal.remove()
    assert list(tmp_path.iterdir()) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
working = st.sampled_from([state for state in JobState if not state.ended])
ending = st.sampled_from([state for state in JobState if state.ended])
events = st.one_of(
    st.builds(Created, kind=st.sampled_from(JobKind), title=st.text(), request=st.just({"a": 1})),
    st.builds(Entered, state=working, waiting_on=st.text()),
    st.builds(Reached, step=st.text(), value=json_values),
    st.just(Resumed()),
    st.builds(Ended, state=ending, result=json_values, error=st.none()),
)


@given(events)
def test_an_event_survives_its_json(event: Event) -> None:
    assert event_from_json(event_to_json(event)) == event


@given(st.lists(events, max_size=12))
def test_nothing_but_a_resume_follows_an_end_and_success_is_final(sequence: list[Event]) -> None:
    records = [Record(job="j", number=i, at=float(i), event=e) for i, e in enumerate([CREATED, *sequence])]
    try:
        job = fold(records)
    except ValueError:
        return
    seen = [JobState.QUEUED]
    for number in range(1, len(records)):
        before = fold(records[:number])
        if before.state.ended:
            assert before.state is not JobState.SUCCEEDED
            assert isinstance(records[number].event, Resumed)
        seen.append(before.state)
    reached = {e.step: e.value for e in sequence if isinstance(e, Reached)}
    assert job.steps == reached
    assert job.attempts == 1 + sum(isinstance(e, Resumed) for e in sequence)
