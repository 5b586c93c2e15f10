"""A merge without a node: the same job in the foreground, its journal beside the output."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from merge_core.errors import MergeCoreError
from merge_core.recipe import Recipe
from node.domain.job import Created, Job, JobKind, JobState, Resumed
from node.errors import LocalError, WeftError
from node.jobs.journal import Journal
from node.jobs.runner import JobView, perform
from node.merging.audit import Auditing
from node.merging.how import How
from node.merging.merge import Merging, leftovers

_JOB = "merge"


def journal_path(target: Path) -> Path:
    """Where the journal of a merge into `target` lies while it is unfinished."""
    return target.parent / f".{target.name}.weft.db"


async def merge(
    merging: Merging,
    recipe: Recipe,
    target: Path,
    *,
    how: How | None = None,
    search: str = "",
    resume: bool,
    clock: Callable[[], float],
    on_view: Callable[[JobView], None],
) -> dict[str, Any]:
    """Merge into `target` and return the job's result; what was left by a killed run needs `resume`.

    `search` is what the model records of the search that found its recipe.

    Ctrl-C and kill -9 leave what a resume needs, hidden beside the target; so does a worker that was killed.
    Any other error leaves nothing. Resuming what is finished gives its result again.
    """
    _check_place(target, resume=resume)
    request = {"recipe": recipe.to_yaml(), "directory": str(target)}
    request |= {"search": search} if search else {}
    created = Created(kind=JobKind.MERGE, title=f"{recipe.methods} into {target.name}", request=request)
    with ExitStack() as stack:
        journal = stack.enter_context(closing(Journal.open(journal_path(target))))
        fresh = _begin(journal, created, target, clock())
        # Whoever holds the lock owns what lies there; before that nothing is written and nothing removed.
        stack.enter_context(journal.lock(_JOB))
        job = journal.load(_JOB) if fresh else _take_up(journal, created, clock())
        try:
            ended = await perform(
                journal,
                job,
                lambda attempt: merging.merge(attempt, how or How()),
                clock=clock,
                on_change=on_view,
            )
        except (MergeCoreError, WeftError):
            if not leftovers(target):
                journal.remove()
            raise
        journal.remove()
    result: dict[str, Any] = ended.result
    return result


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


def _check_place(target: Path, *, resume: bool) -> None:
    """Raise LocalError where a merge into `target` must not begin."""
    unfinished = journal_path(target).exists()
    if not target.parent.is_dir():
        raise LocalError(f"{target.parent} is not a directory", hint=f"mkdir -p {target.parent}")
    if not resume and (unfinished or leftovers(target)):
        raise LocalError(
            f"an interrupted merge into {target} lies here", hint=f"weft merge RECIPE -o {target} --resume"
        )
    if target.exists() and not (unfinished or resume):
        raise LocalError(f"{target} exists", hint=f"weft merge RECIPE -o {target}-2")


def _begin(journal: Journal, created: Created, target: Path, now: float) -> bool:
    """Journal a new job, True; False where an interrupted run of the same merge left one."""
    left = journal.jobs(limit=1)
    if not left:
        journal.create(_JOB, created, now)
        return True
    if dict(left[0].request) != created.request:
        remains = [*map(str, leftovers(target)), f"{journal_path(target)}*"]
        raise LocalError(
            f"the interrupted merge into {target} was another one",
            hint=f"weft merge with the first recipe, or rm -r {' '.join(remains)}",
        )
    return False


def _take_up(journal: Journal, created: Created, now: float) -> Job:
    """The job that a killed run left, to go on with."""
    left = journal.jobs()
    if left[0].state is JobState.SUCCEEDED:
        # Killed before the journal was removed: a job that finds the result there, or makes it again.
        return journal.create(f"{_JOB}-{len(left)}", created, now)
    return journal.append(left[0].id, Resumed(), now)
