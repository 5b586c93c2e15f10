"""Evaluation: models side by side on tasks, what a table of that says, and scores that are signed.

The worker scores; what is best of a row, and how models do over all tasks of one metric, is worked out here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge_core.checkpoint.manifest import MAX_MANIFEST
from merge_core.checkpoint.published import MANIFEST_FILE
from merge_core.checkpoint.reader import Checkpoint
from merge_core.digest import Digest, ModelId
from merge_core.evaluation.named import LM_EVAL, SUFFIX, expect
from merge_core.evaluation.tasks import Metric
from node.catalog.hashes import HashCache
from node.errors import LocalError, UsageError, VerificationFailed
from node.identity.keyring import Identity
from node.provenance import measurement
from node.provenance.files import read_record
from node.provenance.measurement import MAX_RESULTS, Measurement, Result

Data = dict[str, Any]

_TOOLS = ("weftmerge", "torch", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """What to measure: tasks by name or file; `limit` takes the first items of each.

    The last three are lm-eval's: a folder with tasks, whose Python is run; whether data may be fetched;
    whether a task may run what a model writes.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    tasks_path: Path | None = None
    download: bool = False
    run_code: bool = False

    @property
    def foreign(self) -> list[str]:
        """The tasks that are lm-eval's."""
        return [name for name in self.tasks if name.startswith(LM_EVAL)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attesting:
    """Who signs what is measured, and when (Unix seconds); `hashes` spares hashing a model twice."""

    identity: Identity
    hashes: HashCache
    now: float


def named(directories: Sequence[Path]) -> dict[str, Path]:
    """Directories by their own names, or as they were written where two have one name.

    Raises UsageError where one is named twice.
    """
    names = [path.resolve().name for path in directories]
    found = {
        name if names.count(name) == 1 else str(path): path
        for name, path in zip(names, directories, strict=True)
    }
    if len(found) < len(directories):
        raise UsageError("one model is named twice", hint="weft eval --help")
    return found


async def evaluate(
    models: Mapping[str, Path],
    how: Measuring,
    *,
    attesting: Attesting | None = None,
    on_event: Callable[[Data], None],
    keep: Callable[[Data], None] = lambda data: None,
) -> Data:
    """Score models in a worker; the data that `weft eval --json` prints.

    With `attesting` the scores are signed, and attached to each model, after `keep` got them. Raises
    InvalidTask on a task that there is not, CorruptCheckpoint and Unmergeable on models, VerificationFailed
    on one that nothing can be attached to.
    """
    from node.worker import process

    _look(models, how, attested=attesting is not None)
    if attesting:
        for path in models.values():
            measurement.expect_room(path)
    subjects = {name: _subject(path, attesting.hashes) for name, path in models.items()} if attesting else {}
    request = {
        "models": [[name, str(path.absolute())] for name, path in models.items()],
        "tasks": list(how.tasks),
        "limit": how.limit,
        "batch_size": how.batch_size,
        "device": how.device,
        "tasks_path": None if how.tasks_path is None else str(how.tasks_path.absolute()),
        "download": how.download,
        "run_code": how.run_code,
    }
    rows = (await process.run("evaluate", request, on_event=on_event))["rows"]
    told = [{"name": name, "directory": str(path.absolute())} for name, path in models.items()]
    data = {"models": told, "tasks": [row | {"best": best(row)} for row in rows], "summary": summary(rows)}
    keep(data)
    if attesting:
        for place, (name, path) in enumerate(models.items()):
            results = tuple(_result(row, place) for row in rows)
            file = _attest(path, subjects[name], results, attesting)
            told[place] |= {"model_id": str(subjects[name]), "attested": str(file.absolute())}
    return data


def _look(models: Mapping[str, Path], how: Measuring, *, attested: bool) -> None:
    """Raise early what needs no worker to be seen: a directory that is no model, a file that is no task."""
    for path in models.values():
        Checkpoint.open(path).close()
    if how.foreign and attested:
        raise UsageError(
            f"{how.foreign[0]} cannot be attested: lm-eval's tasks have no digest of what they ask",
            hint="weft eval DIR --tasks FILE.jsonl --attest",
        )
    if how.foreign and find_spec("lm_eval") is None:
        raise LocalError("lm-eval is not installed", hint="pip install 'weftmerge[eval]'")
    if how.tasks_path is not None and not how.tasks_path.is_dir():
        raise UsageError(f"{how.tasks_path} is no folder of tasks", hint="weft eval --help")
    for wanted in how.tasks:
        if wanted not in how.foreign:
            expect(wanted)
    names = [Path(wanted).name if wanted.endswith(SUFFIX) else wanted for wanted in how.tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice or not 1 <= len(names) <= MAX_RESULTS:
        count = f"{len(names)} tasks are named, not 1 to {MAX_RESULTS}"
        raise UsageError(f"two tasks are called {twice}" if twice else count, hint="weft eval --help")


def best(row: Data) -> list[int]:
    """Which models are best at a task, by their places; none where there is only one."""
    values = row["values"]
    known = [value for value in values if value is not None]
    most = (max if row["higher_is_better"] else min)(known, default=None)
    return (
        [place for place, value in enumerate(values) if value == most is not None] if len(values) > 1 else []
    )


def summary(rows: Sequence[Data]) -> list[Data]:
    """For each metric of two tasks or more: each model's mean and its worst task, and who is best at both."""
    found = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        same = [row for row in rows if row["metric"] == metric]
        if len(same) < 2:
            continue
        higher = same[0]["higher_is_better"]
        by_model = list(zip(*(row["values"] for row in same), strict=True))
        for name, over in (("mean", _mean), ("worst", min if higher else max)):
            row = {"over": name, "metric": metric, "higher_is_better": higher}
            row["values"] = [None if None in values else over(values) for values in by_model]
            found.append(row | {"best": best(row)})
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _subject(directory: Path, hashes: HashCache) -> ModelId:
    """Which model this is by its bytes; raises VerificationFailed unless its record says the same."""
    with Checkpoint.open(directory) as checkpoint:
        manifest = hashes.measure(checkpoint).manifest
        if MANIFEST_FILE not in checkpoint.survey.records:
            raise VerificationFailed(
                f"{directory} has no record to attach scores to",
                hint=f"weft add {directory} --json names a copy that has one",
            )
        if read_record(directory, checkpoint.survey, MANIFEST_FILE, MAX_MANIFEST) != manifest.to_bytes():
            raise VerificationFailed(
                f"{directory} is another model than its record", hint=f"weft verify {directory}"
            )
    return manifest.model_id


def _result(row: Data, place: int) -> Result:
    return Result(
        task=unicodedata.normalize("NFC", row["task"]),
        digest=Digest(row["digest"]),
        metric=Metric(row["metric"]),
        items=row["items"],
        value=row["values"][place],
    )


def _attest(directory: Path, subject: ModelId, results: tuple[Result, ...], attesting: Attesting) -> Path:
    """Sign the scores of one model and attach them; the file that holds them."""
    if _subject(directory, attesting.hashes) != subject:
        raise VerificationFailed(f"{directory} was changed while it was measured", hint="weft eval again")
    found = Measurement(
        model_id=subject,
        measurer=attesting.identity.peer_id,
        results=results,
        tools={tool: metadata.version(tool) for tool in _TOOLS},
        measured_at=int(attesting.now),
    )
    return measurement.attach(directory, measurement.sign(found, attesting.identity))
