"""The merge job: seven steps from a recipe to a signed model, each taken up again where a crash left it.

    1 find the parents       manifests and headers, no weights
    2 compile and seal       the MergePlan, whose digest names the merge
    3 agree and fetch        whatever is not here yet
    4 execute                in a worker: the only process that loads torch
    5 record and sign        plan, Trace, manifest, report, card, provenance, signature
    6 rename into place      from here on the model exists
    7 publish                if asked for

What a job needs beside its journal lies in one hidden folder next to the target, and goes with it.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from merge_core import recipe as recipes
from merge_core.checkpoint.manifest import Manifest
from merge_core.checkpoint.published import (
    MANIFEST_FILE,
    PLAN_FILE,
    REPORT_FILE,
    SEARCH_FILE,
    SIGNATURE_FILE,
    read_bounded,
)
from merge_core.checkpoint.reader import read_functional
from merge_core.checkpoint.writer import CheckpointWriter, partial_path
from merge_core.digest import ModelId
from merge_core.errors import CannotWrite, MergeCoreError, Unmergeable
from merge_core.functional import result_files
from merge_core.plan import MergePlan
from merge_core.recipe import Recipe
from merge_core.report import MAX_REPORT, MERGED, Reading, Report
from merge_core.resolve import Estimate, draft
from merge_core.trace import Trace
from node.domain.job import JobState
from node.domain.negotiation import Purpose
from node.errors import LocalError, WeftError
from node.identity.keyring import Identity
from node.jobs.runner import Attempt
from node.merging import card
from node.merging.how import How
from node.merging.inherited import Inherited, inherit
from node.merging.known import KnownPlaces
from node.merging.parents import Obtained, OnDisk, Parent, ParentSource
from node.provenance.attest import Merge, Terms, attest, record
from node.worker import process

_RUNNING = 3
"""What a model takes of memory while it runs in float32, in the bytes of its weights: few are stored so."""


class Run(Protocol):
    """Has a worker do its task: a request, and who hears of its events, to a result."""

    async def __call__(self, request: dict[str, Any], *, on_event: process.Event) -> dict[str, Any]: ...


Publish = Callable[[Path, str, str], Awaitable[None]]
"""Shares (directory, name, licence) with the network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A recipe resolved: its parents, what merging costs, and the sealed plan."""

    recipe: Recipe
    parents: tuple[Parent, ...]
    estimate: Estimate
    plan: MergePlan

    @property
    def inherited(self) -> Inherited:
        """The licence of the result, and what its parents' licences have to say."""
        return inherit({parent.reference: parent.licence for parent in self.parents})

    @property
    def warnings(self) -> tuple[str, ...]:
        """What does not stand against the merge, but is for a person to judge."""
        return (*self.estimate.warnings, *self.inherited.warnings)


class Merging:
    """Merges with parents from one source, signed by one identity; without one they stay unsigned."""

    def __init__(
        self,
        parents: ParentSource,
        identity: Identity | None,
        *,
        clock: Callable[[], float],
        known: KnownPlaces | None = None,
        publish: Publish | None = None,
        run: Run | None = None,
    ) -> None:
        """`known` is told where parents and results lie; `run` is a worker that waits for its one merge."""
        self._parents = parents
        self._identity = identity
        self._clock = clock
        self._known = known
        self._publish = publish
        self._run: Run = run or partial(process.run, "merge")

    async def plan(self, recipe: Recipe, attempt: Attempt | None = None) -> Planned:
        """Resolve a recipe from headers; raises Unmergeable with every incompatibility, or for a licence."""
        parents = await self._parents.find(recipe.models, attempt)
        _refuse_repeats(parents)
        planned = await asyncio.to_thread(_compile, recipe, parents)
        planned.inherited.refuse()
        return planned

    async def obtain(self, planned: Planned, attempt: Attempt) -> tuple[Planned, Obtained]:
        """Bring the parents here; raises Unmergeable where a signed card forbids what an advert did not."""
        obtained = await self._parents.obtain(planned.parents, planned.plan, Purpose.MERGE, attempt)
        planned = replace(planned, parents=tuple(obtained.settle(p) for p in planned.parents))
        planned.inherited.refuse()
        return planned, obtained

    async def merge(
        self, attempt: Attempt, how: How | None = None, *, asked: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Do what is `asked`, {recipe, directory, publish_as?, search?}, else what the job's request does.

        So too with `how`. `search` is what the model records of the search that found its recipe.
        The result is {model_id, directory, signed, licence, warnings, report}.
        """
        asked = attempt.request if asked is None else asked
        how = How.of(attempt.request) if how is None else how
        target = Path(asked["directory"])
        planned = await self.plan(recipes.parse(asked["recipe"]), attempt)
        if attempt.reached("plan") not in (None, planned.plan.digest):
            raise Unmergeable(
                "the models of this recipe have changed since the merge began",
                hint=f"weft merge RECIPE -o {target}",
            )
        attempt.reach("plan", planned.plan.digest)
        threads = how.fitting(planned.plan, tuple(parent.header for parent in planned.parents))
        if _is_there(target, planned.plan):
            manifest = Manifest.parse((target / MANIFEST_FILE).read_bytes())
        else:
            try:
                planned, obtained = await self.obtain(planned, attempt)
                fitting = replace(how, threads=threads)
                search = asked.get("search", "").encode()
                manifest = await self._execute(attempt, planned, obtained, target, fitting, search)
            except MergeCoreError as error:
                await asyncio.to_thread(discard, target)  # trying again would end the same way
                _call_by_reference(error, planned.parents)
                raise
        await asyncio.to_thread(shutil.rmtree, work_folder(target), ignore_errors=True)
        self._remember(planned, manifest.model_id, target)
        if self._publish and asked.get("publish_as"):
            await self._publish(target, asked["publish_as"], planned.inherited.licence)
        found = Report.parse(await asyncio.to_thread(read_bounded, target / REPORT_FILE, MAX_REPORT))
        return {
            "model_id": manifest.model_id,
            "directory": str(target),
            "signed": (target / SIGNATURE_FILE).is_file(),
            "licence": planned.inherited.licence,
            "warnings": list(planned.warnings),
            "report": card.told(found, planned.parents),
        }

    def _remember(self, planned: Planned, model_id: ModelId, target: Path) -> None:
        if self._known is not None:
            self._known.remember(model_id, target)
            for parent in planned.parents:
                if parent.directory is not None:
                    self._known.remember(parent.model_id, parent.directory)

    async def _execute(
        self,
        attempt: Attempt,
        planned: Planned,
        obtained: Obtained,
        target: Path,
        how: How,
        search: bytes,
    ) -> Manifest:
        """Have the weights made, and put all together; the manifest of the result."""
        attempt.enter(JobState.MERGING)
        work = work_folder(target)
        inputs = [obtained.parents[model_id] for model_id in planned.plan.inputs]
        await asyncio.to_thread(lay_out, work, planned.plan, inputs)
        request = _request(work, inputs, target) | {"threads": how.threads, "max_memory": how.max_memory}
        made = await self._run(request, on_event=teller(attempt))
        attempt.enter(JobState.VERIFYING)
        merged = await asyncio.to_thread(_read_back, planned, obtained, made)
        found = Report.parse(await asyncio.to_thread(Path(made["report"]).read_bytes))
        files = await asyncio.to_thread(_functional, planned.plan, inputs)
        if how.perplexity:
            await asyncio.to_thread(_lay_beside, target, planned.plan, files)
            found = await _predicted(attempt, planned, inputs, target, found, how)
        files |= card.files(
            planned.recipe,
            planned.plan,
            planned.parents,
            planned.inherited,
            merged.manifest.model_id,
            found,
        )
        if search:
            files[SEARCH_FILE] = search
        await asyncio.to_thread(self._finish, target, merged, files)
        return merged.manifest

    def _finish(self, target: Path, merged: Merge, files: Mapping[str, bytes]) -> None:
        """Add what belongs beside the weights, sign and rename; up to the rename it can be done again."""
        with _taken_up(target, merged.plan) as writer:
            for name, data in files.items():
                writer.add_file(name, data)
            if self._identity is None:
                record(partial_path(target), merged)
            else:
                engine = metadata.version("weftmerge")
                attest(partial_path(target), self._identity, merged, engine=engine, finished_at=self._clock())
            writer.commit()


def work_folder(target: Path) -> Path:
    """Where a merge keeps what it needs while it runs: hidden, beside the target."""
    return target.parent / f".{target.name}.weft"


def leftovers(target: Path) -> tuple[Path, ...]:
    """What an unfinished merge into `target` has left on the disk."""
    return tuple(path for path in (work_folder(target), partial_path(target)) if path.exists())


def _compile(recipe: Recipe, parents: tuple[Parent, ...]) -> Planned:
    """Resolve the recipe against its parents' headers, and name the plan."""
    drafted = draft(recipe, {parent.reference: parent.header for parent in parents})
    plan = drafted.seal({parent.reference: parent.model_id for parent in parents})
    assert plan.digest  # kept with the plan: its bytes are many
    return Planned(recipe=recipe, parents=parents, estimate=drafted.estimate, plan=plan)


def _is_there(target: Path, plan: MergePlan) -> bool:
    """Whether an earlier attempt got as far as the rename; raises LocalError when something else is there."""
    if not target.exists():
        return False
    record = target / PLAN_FILE
    if not record.is_file() or record.read_bytes() != plan.to_bytes():
        raise LocalError(f"{target} exists", hint=f"weft merge RECIPE -o {target}-2")
    return True


@contextmanager
def _taken_up(target: Path, plan: MergePlan) -> Iterator[CheckpointWriter]:
    """The partial checkpoint that the worker wrote; raises CannotWrite where it is gone."""
    with CheckpointWriter.create(target, plan.layout) as writer:
        if not writer.resumed:
            writer.discard()
            raise CannotWrite(f"what was merged into {target} is gone", hint="free disk space, merge again")
        yield writer


def _lay_beside(target: Path, plan: MergePlan, files: Mapping[str, bytes]) -> None:
    """Make the partial checkpoint one that can be opened."""
    with _taken_up(target, plan) as writer:
        for name, data in files.items():
            writer.add_file(name, data)


def _functional(plan: MergePlan, inputs: Sequence[OnDisk]) -> dict[str, bytes]:
    """The files that the result has from its parents, by name."""
    return result_files(plan, [partial(read_functional, item.directory, item.manifest) for item in inputs])


async def _predicted(
    attempt: Attempt,
    planned: Planned,
    inputs: Sequence[OnDisk],
    target: Path,
    found: Report,
    how: How,
) -> Report:
    """The report with how well the result and its parents predict a text, or why nobody knows.

    A merge that is done is worth more than a figure about it, so no failure here is one of the merge.
    """
    models = [[MERGED, str(partial_path(target))]]
    models += [
        [parent.label, str(item.directory)] for parent, item in zip(planned.parents, inputs, strict=True)
    ]
    largest = max(sum(info.length for info in parent.header.tensors.values()) for parent in planned.parents)
    if how.max_memory and _RUNNING * largest > how.max_memory:
        why = f"running a model takes {_RUNNING * largest >> 20} MiB, more than a merge may take here"
        return replace(found, text=f"not measured: {why}")
    request = {"text": how.perplexity, "models": models}
    try:
        answer = await process.run("perplexity", request, on_event=teller(attempt))
    except (MergeCoreError, WeftError) as error:
        return replace(found, text=f"not measured: {error.why}")
    readings = tuple(Reading(**reading) for reading in answer["readings"])
    return replace(found, text=answer["text"], readings=readings)


def _read_back(planned: Planned, obtained: Obtained, made: Mapping[str, Any]) -> Merge:
    """What the worker left on the disk, parsed once more on this side."""
    return Merge(
        plan=planned.plan,
        trace=Trace.parse(planned.plan, Path(made["trace"]).read_bytes()),
        manifest=Manifest.parse(Path(made["manifest"]).read_bytes()),
        terms={p.model_id: Terms(licence=p.licence, publisher=p.publisher) for p in planned.parents},
        agreements=obtained.agreements,
    )


def discard(target: Path) -> None:
    """Remove what an unfinished merge has left on the disk."""
    for path in leftovers(target):
        shutil.rmtree(path, ignore_errors=True)


def _request(work: Path, inputs: Sequence[OnDisk], target: Path) -> dict[str, Any]:
    return {
        "plan": str(work / "plan.json"),
        "inputs": [
            {**worker_input(work, position, parent), "hashed": parent.hashed}
            for position, parent in enumerate(inputs)
        ],
        "target": str(target),
        "journal": str(work / "journal"),
        "output": str(work),
    }


def worker_input(work: Path, position: int, parent: OnDisk) -> dict[str, str]:
    """How a worker is told of one parent, with the paths that `lay_out` writes."""
    return {
        "directory": str(parent.directory),
        "manifest": str(work / f"{position}.manifest.json"),
        "leaves": str(work / f"{position}.leaves.bin"),
    }


def lay_out(work: Path, plan: MergePlan, inputs: Sequence[OnDisk]) -> None:
    """Write down for a worker what is too large for a message."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "plan.json").write_bytes(plan.to_bytes())
    for position, parent in enumerate(inputs):
        paths = worker_input(work, position, parent)
        Path(paths["manifest"]).write_bytes(parent.manifest.to_bytes())
        Path(paths["leaves"]).write_bytes(parent.leaves.to_bytes())


def teller(attempt: Attempt) -> Callable[[dict[str, Any]], None]:
    """Pass a worker's progress on to the job's watchers."""

    def tell(event: dict[str, Any]) -> None:
        if event.get("kind") == "progress":
            attempt.progress(event["what"], event["done"], event["total"])

    return tell


def _call_by_reference(error: MergeCoreError, parents: Sequence[Parent]) -> None:
    """Let an error call parents as the recipe does: whoever executed the plan knows their ids alone."""
    for parent in parents:
        error.why = error.why.replace(parent.model_id, parent.reference)
        error.hint = error.hint.replace(parent.model_id, parent.reference)


def _refuse_repeats(parents: Sequence[Parent]) -> None:
    seen: dict[ModelId, str] = {}
    for parent in parents:
        if parent.model_id in seen:
            raise Unmergeable(
                f"{seen[parent.model_id]} and {parent.reference} are the same model",
                hint="list each model once, then: weft plan RECIPE",
            )
        seen[parent.model_id] = parent.reference
