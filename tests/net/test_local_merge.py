"""A merge without a node: what a crash leaves is taken up, and nothing lies beside the output at the end."""

import asyncio
import shutil
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from merge_core import recipe, resolve
from merge_core.checkpoint.published import RECORD_FILES
from merge_core.checkpoint.reader import Checkpoint, measure
from merge_core.checkpoint.writer import CheckpointWriter
from merge_core.digest import ModelId
from merge_core.errors import Unmergeable
from node.catalog.hashes import HashCache
from node.domain.job import Created
from node.errors import LocalError
from node.jobs.journal import Journal
from node.merging import local, merge
from node.merging.known import KnownPlaces
from node.merging.merge import Merging
from node.merging.parents import LocalParents

Run = Callable[..., dict[str, Any]]
LINEAR = """
merge_method: linear
models:
  - {model: ./math, parameters: {weight: WEIGHT}}
  - {model: ./code, parameters: {weight: 0.5}}
"""


class Killed(BaseException):
    """What a SIGKILL is to the code that it hits: nothing behind it runs."""


@pytest.fixture(scope="module")
def models(pristine: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `math` and `code`, as their trainers left them."""
    folder = tmp_path_factory.mktemp("models")
    for name, directory in pristine.parents.items():
        shutil.copytree(directory, folder / name, ignore=shutil.ignore_patterns(*RECORD_FILES))
    return folder


class Waiting(LocalParents):
    """Parents that are found once the test says so."""

    asked: asyncio.Event
    go: asyncio.Event

    async def find(self, references: Any, attempt: Any = None) -> Any:
        self.asked.set()
        await self.go.wait()
        return await super().find(references, attempt)


def merge_into(target: Path, models: Path, *, resume: bool = False, weight: float = 1.0) -> dict[str, Any]:
    """Merge as the command does, unsigned."""
    known = KnownPlaces(target.parent.with_name("known"), lambda _: None)
    merging = Merging(LocalParents(HashCache(None), known, models), None, clock=lambda: 1.8e9)

    async def once() -> dict[str, Any]:
        return await local.merge(
            merging,
            recipe.parse(LINEAR.replace("WEIGHT", str(weight))),
            target,
            resume=resume,
            clock=lambda: 1.8e9,
            on_view=lambda _: None,
        )

    return anyio.run(once)


@pytest.fixture
def run(models: Path, tmp_path: Path) -> Run:
    """Merge into tmp_path/outputs/out."""
    (tmp_path / "outputs").mkdir()
    return partial(merge_into, tmp_path / "outputs" / "out", models)


@pytest.fixture(scope="module")
def undisturbed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelId:
    """What a run gives that nobody killed."""
    target = tmp_path_factory.mktemp("undisturbed") / "out"
    result = merge_into(target, models)
    assert result["directory"] == str(target)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    return ModelId(result["model_id"])


def listing(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "outputs").iterdir())


def killed_at(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, *, before: bool = True) -> None:
    """Let the first call of `place.name` be the last thing that happens (before or after its work)."""
    real = getattr(place, name)

    def strike(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(place, name, real)
        if not before:
            real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(place, name, strike)


MOMENTS = {
    "the journal is new": (Journal, "create", True),
    "the job is new": (Journal, "create", False),
    "the worker has its orders": (merge, "lay_out", False),
    "the weights are there": (merge, "_read_back", True),
    "the records are there": (CheckpointWriter, "commit", True),
    "the output is in place": (CheckpointWriter, "commit", False),
    "the job has succeeded": (Journal, "remove", True),
    "all is done": (Journal, "remove", False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_whatever_the_moment_of_the_kill_a_resume_gives_the_same_model_and_nothing_else(
    run: Run, undisturbed: ModelId, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    place, name, before = MOMENTS[moment]
    killed_at(monkeypatch, place, name, before=before)
    with pytest.raises(Killed):
        run()
    assert run(resume=True)["model_id"] == undisturbed
    assert listing(tmp_path) == ["out"]
    with Checkpoint.open(tmp_path / "outputs" / "out") as checkpoint:
        assert measure(checkpoint).manifest.model_id == undisturbed


@pytest.mark.parametrize("suffix", ["-lock", ""])
def test_a_kill_while_the_journal_is_removed_leaves_what_a_resume_removes(
    run: Run,
    undisturbed: ModelId,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
) -> None:
    journal = tmp_path / "outputs" / f".out.weft.db{suffix}"
    real = Path.unlink

    def strike(self: Path, missing_ok: bool = False) -> None:
        if self == journal:
            monkeypatch.setattr(Path, "unlink", real)
            raise Killed
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", strike)
    with pytest.raises(Killed):
        run()
    assert run(resume=True)["model_id"] == undisturbed
    assert listing(tmp_path) == ["out"]


def test_a_result_that_was_removed_after_the_kill_is_made_again(
    run: Run, undisturbed: ModelId, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(monkeypatch, Journal, "remove")
    with pytest.raises(Killed):
        run()
    shutil.rmtree(tmp_path / "outputs" / "out")
    assert run(resume=True)["model_id"] == undisturbed
    assert listing(tmp_path) == ["out"]


def test_resuming_does_not_take_another_model_for_the_result(
    run: Run, undisturbed: ModelId, tmp_path: Path
) -> None:
    run(weight=0.25)
    with pytest.raises(LocalError, match="exists"):
        run(resume=True)
    assert listing(tmp_path) == ["out"]
    assert run(resume=True, weight=0.25)["model_id"] != undisturbed


def test_without_resume_an_interrupted_merge_is_not_touched(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(monkeypatch, merge, "_read_back")
    with pytest.raises(Killed):
        run()
    left = listing(tmp_path)
    assert len(left) >= 3
    with pytest.raises(LocalError, match="interrupted") as caught:
        run()
    assert caught.value.hint.endswith("--resume")
    assert listing(tmp_path) == left


def test_a_recipe_is_resolved_once_and_not_on_the_event_loop(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved: list[int] = []
    walk = resolve.merging.Merging.run

    def run(self: Any) -> None:
        resolved.append(threading.get_ident())
        walk(self)

    monkeypatch.setattr(resolve.merging.Merging, "run", run)
    parents = LocalParents(HashCache(None), KnownPlaces(tmp_path / "known", lambda _: None), models)
    linear = recipe.parse(LINEAR.replace("WEIGHT", "1.0"))
    planned = asyncio.run(Merging(parents, None, clock=lambda: 1.8e9).plan(linear))
    assert len(resolved) == 1 and threading.get_ident() not in resolved
    assert planned.estimate.tensors == len(planned.plan.tensors)


def test_a_resume_beside_a_run_that_works_neither_writes_nor_removes_anything(
    models: Path, undisturbed: ModelId, tmp_path: Path
) -> None:
    target = tmp_path / "outputs" / "out"
    target.parent.mkdir()
    parents = Waiting(HashCache(None), KnownPlaces(tmp_path / "known", lambda _: None), models)
    merging = Merging(parents, None, clock=lambda: 1.8e9)

    def run(resume: bool) -> Any:
        linear = recipe.parse(LINEAR.replace("WEIGHT", "1.0"))
        return local.merge(
            merging, linear, target, resume=resume, clock=lambda: 1.8e9, on_view=lambda _: None
        )

    async def story() -> None:
        parents.asked, parents.go = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(run(False))
        await parents.asked.wait()
        before = listing(tmp_path)
        with pytest.raises(LocalError, match="being worked on"):
            await run(True)
        assert listing(tmp_path) == before
        with closing(Journal.open(local.journal_path(target))) as journal:
            assert [type(record.event) for record in journal.records("merge")] == [Created]
        parents.go.set()
        assert (await first)["model_id"] == undisturbed

    asyncio.run(story())
    assert listing(tmp_path) == ["out"]


def test_the_hint_for_another_recipe_names_all_that_has_to_go(
    run: Run, undisturbed: ModelId, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(monkeypatch, merge, "_read_back")
    with pytest.raises(Killed):
        run(weight=0.25)
    with pytest.raises(LocalError, match="another one") as caught:
        run(resume=True)
    for pattern in caught.value.hint.partition("rm -r ")[2].split():
        path = Path(pattern)
        for found in list(path.parent.glob(path.name)):
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    assert listing(tmp_path) == []
    assert run()["model_id"] == undisturbed


def test_parents_that_changed_end_the_merge_and_leave_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing = shutil.copytree(models, tmp_path / "changing")
    target = tmp_path / "outputs" / "out"
    target.parent.mkdir()
    killed_at(monkeypatch, merge, "lay_out")
    with pytest.raises(Killed):
        merge_into(target, changing)
    shutil.rmtree(changing / "math")
    (changing / "base").rename(changing / "math")
    with pytest.raises(Unmergeable, match="changed") as caught:
        merge_into(target, changing, resume=True)
    assert caught.value.hint == f"weft merge RECIPE -o {target}"
    assert listing(tmp_path) == []


def test_an_error_of_the_models_leaves_nothing(models: Path, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "models").mkdir()
    for name in ("math", "code"):
        shutil.copytree(models / "math", tmp_path / "models" / name)
    with pytest.raises(Unmergeable, match="the same model"):
        merge_into(tmp_path / "outputs" / "out", tmp_path / "models")
    assert listing(tmp_path) == []
