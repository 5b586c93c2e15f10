"""Merges and searches without a node: the same jobs in the foreground, their journal beside the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from merge_core.errors import MergeCoreError
from merge_core.recipe import Recipe
from node.domain.job import FOUND, SETTLE, Created, Job, JobKind, JobState, Reached, Resumed
from node.errors import LocalError, WeftError
from node.jobs.journal import Journal
from node.jobs.runner import JobView, Work, perform
from node.merging.audit import Auditing
from node.merging.evolve import Evolving, Search, folder_of
from node.merging.how import How
from node.merging.merge import Merging, leftovers

_JOB = "merge"


def journal_path(target: Path) -> Path:
    """Where the journal of a job that makes `target` lies while it is unfinished."""
    return target.parent / f".{target.name}.weft.db"


async def merge(
    merging: Merging,
    recipe: Recipe,
    target: Path,
    *,
    how: How | None = None,
    resume: bool,
    clock: Callable[[], float],
    on_view: Callable[[JobView], None],
) -> dict[str, Any]:
    """Merge into `target` and return the job's result; what was left by a killed run needs `resume`.

    Ctrl-C and kill -9 leave what a resume needs, hidden beside the target; so does a worker that was killed.
    Any other error leaves nothing. Resuming what is finished gives its result again.
    """
    request = {"recipe": recipe.to_yaml(), "directory": str(target)}
    title = f"{recipe.methods} into {target.name}"
    place = _Place(target=target, verb="merge", left=lambda: leftovers(target))
    return await place.perform(
        Created(kind=JobKind.MERGE, title=title, request=request),
        lambda attempt: merging.merge(attempt, how or How()),
        resume=resume,
        clock=clock,
        on_view=on_view,
    )


async def evolve(
    merging: Merging,
    recipe: Recipe,
    target: Path,
    search: Search,
    *,
    resume: bool,
    settle: bool = False,
    clock: Callable[[], float],
    on_view: Callable[[JobView], None],
) -> dict[str, Any]:
    """Search, merge into `target` and return the job's result; resumed as a merge is.

    With `settle` an interrupted search ends with the best that it has found.
    """
    request = {"recipe": recipe.to_yaml(), "directory": str(target), **search.to_json()}
    place = _Place(
        target=target,
        verb="evolve",
        left=lambda: (*leftovers(target), *(path for path in (folder_of(target),) if path.exists())),
    )
    return await place.perform(
        Created(kind=JobKind.EVOLVE, title=f"search for {target.name}", request=request),
        lambda attempt: Evolving(merging).evolve(attempt, search.processes),
        resume=resume,
        steps={SETTLE: True} if settle else {},
        clock=clock,
        on_view=on_view,
    )


async def audit(
    auditing: Auditing, directory: Path, *, clock: Callable[[], float], on_view: Callable[[JobView], None]
) -> dict[str, Any]:
    """Audit a directory in the foreground; nothing of it is worth resuming, so nothing is kept."""
    with (
        TemporaryDirectory(prefix="weft-audit-") as folder,
        closing(Journal.open(Path(folder) / "audit.db")) as journal,
    ):
        request = {"directory": str(directory)}
        created = Created(kind=JobKind.AUDIT, title=f"audit of {directory.name}", request=request)
        job = journal.create("audit", created, clock())
        with journal.lock(job.id):
            ended = await perform(
                journal,
                job,
                lambda attempt: auditing.audit(attempt, directory),
                clock=clock,
                on_change=on_view,
            )
    result: dict[str, Any] = ended.result
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a job of the foreground works: `verb` makes `target`, and `left` is what it leaves unfinished."""

    target: Path
    verb: str
    left: Callable[[], tuple[Path, ...]]

    async def perform(
        self,
        created: Created,
        work: Work,
        *,
        resume: bool,
        steps: Mapping[str, Any] = MappingProxyType({}),
        clock: Callable[[], float],
        on_view: Callable[[JobView], None],
    ) -> dict[str, Any]:
        """Begin the job, or take it up where it was interrupted, as if it had reached `steps` too."""
        self._check(resume=resume)
        with ExitStack() as stack:
            journal = stack.enter_context(closing(Journal.open(journal_path(self.target))))
            fresh = self._begin(journal, created, clock())
            # Whoever holds the lock owns what lies there; before that nothing is written and nothing removed.
            stack.enter_context(journal.lock(_JOB))
            job = journal.load(_JOB) if fresh else _take_up(journal, created, clock())
            for step, value in steps.items():
                job = journal.append(job.id, Reached(step=step, value=value), clock())
            try:
                ended = await perform(journal, job, work, clock=clock, on_change=on_view)
            except (MergeCoreError, WeftError):
                if not self.left():
                    journal.remove()
                raise
            journal.remove()
        result: dict[str, Any] = ended.result
        return result

    def _check(self, *, resume: bool) -> None:
        """Raise LocalError where the job must not begin."""
        target, unfinished = self.target, journal_path(self.target).exists()
        if not target.parent.is_dir():
            raise LocalError(f"{target.parent} is not a directory", hint=f"mkdir -p {target.parent}")
        if not resume and (unfinished or self.left()):
            raise LocalError(
                f"an interrupted {self.verb} into {target} lies here",
                hint=f"weft {self.verb} RECIPE -o {target} --resume",
            )
        if target.exists() and not (unfinished or resume):
            raise LocalError(f"{target} exists", hint=f"weft {self.verb} RECIPE -o {target}-2")

    def _begin(self, journal: Journal, created: Created, now: float) -> bool:
        """Journal a new job, True; False where an interrupted run of the same left one."""
        before = journal.jobs(limit=1)
        if not before:
            journal.create(_JOB, created, now)
            return True
        if dict(before[0].request) != created.request:
            remains = [*map(str, self.left()), f"{journal_path(self.target)}*"]
            raise LocalError(
                f"the interrupted {before[0].kind} into {self.target} was another one",
                hint=f"weft {before[0].kind} as it was first called, or rm -r {' '.join(remains)}",
            )
        return False


def _take_up(journal: Journal, created: Created, now: float) -> Job:
    """The job that a killed run left, to go on with."""
    left = journal.jobs()
    if left[0].state is not JobState.SUCCEEDED:
        return journal.append(left[0].id, Resumed(), now)
    # Killed before the journal was removed: a job that finds the result there, or makes it again.
    job = journal.create(f"{_JOB}-{len(left)}", created, now)
    if FOUND in left[0].steps:
        job = journal.append(job.id, Reached(step=FOUND, value=left[0].steps[FOUND]), now)
    return job
