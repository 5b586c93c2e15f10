"""Check: what stands against a merge and what it would take, from the headers of models on this machine.

Nothing is hashed, nobody is asked and nothing is written, so it works before `weft init` and takes a moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.checkpoint.reader import Checkpoint
from merge_core.digest import ModelId
from merge_core.errors import MergeCoreError, Unmergeable
from merge_core.recipe import Recipe
from merge_core.resolve import Estimate, ModelHeader, check, header_of
from node.catalog import licences
from node.errors import WeftError
from node.merging import hub
from node.merging.inherited import Inherited, inherit
from node.merging.references import LocalDirectory, Published, nowhere_here, parse_reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """One model of a recipe: where it lies and what its header and card say, or why nobody knows."""

    reference: str
    directory: Path | None = None
    header: ModelHeader | None = None
    licence: str = licences.NO_LICENCE
    fault: MergeCoreError | WeftError | None = None

    @property
    def problem(self) -> str:
        """Why nobody knows, with the model's name."""
        why = self.fault.why if self.fault else ""
        return why if self.reference in why else f"{self.reference}: {why}"

    def to_json(self) -> dict[str, Any]:
        """The model for `--json`."""
        found = hub.origin(self.directory) if self.directory else None
        tensors = self.header.tensors.values() if self.header else ()
        return {
            "reference": self.reference,
            "hub": f"{found.repository}@{found.revision}" if found else "",
            "here": self.header is not None,
            "licence": self.licence,
            "size": sum(info.length for info in tensors),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What looking at every model of a recipe found."""

    recipe: Recipe
    models: tuple[Looked, ...]
    estimate: Estimate
    inherited: Inherited

    @property
    def faults(self) -> tuple[MergeCoreError | WeftError, ...]:
        """Why models could not be looked at."""
        return tuple(model.fault for model in self.models if model.fault is not None)

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that stands against the merge."""
        missing = {model.reference for model in self.models if model.fault}
        unread = {f"{base}{name} was not found" for name in missing for base in ("", "the base ")}
        found = [problem for problem in self.estimate.problems if problem not in unread]
        unseen = [model.problem for model in self.models if model.fault is not None]
        return (*unseen, *found, *self.inherited.problems)

    def error(self) -> MergeCoreError | WeftError | None:
        """What this check ends in: the first model that cannot be read, else that they do not go together."""
        problems = self.problems
        if not problems:
            return None
        if len(problems) == len(self.faults):
            return self.faults[0]
        return Unmergeable.of(
            problems, hint="choose models that fit, or correct the recipe, then: weft check RECIPE"
        )

    def to_json(self) -> dict[str, Any]:
        """The check for `--json`."""
        cost = self.estimate
        return {
            "ok": not self.problems,
            "problems": list(self.problems),
            "warnings": [*cost.warnings, *self.inherited.warnings],
            "models": [model.to_json() for model in self.models],
            "operator": self.recipe.methods,
            "licence": self.inherited.licence,
            "tensors": cost.tensors,
            "read_bytes": cost.read_bytes,
            "fetch_bytes": 0,
            "output_bytes": cost.output_bytes,
            "peak_ram_bytes": cost.peak_ram_bytes,
        }


def examine(recipe: Recipe, folder: Path, known: Callable[[ModelId], Path | None]) -> Checked:
    """Look at every model of a recipe; paths are relative to `folder`, ids are looked up in `known`."""
    models = tuple(_look(reference, folder, known) for reference in recipe.models)
    headers = {model.reference: model.header for model in models if model.header is not None}
    return Checked(
        recipe=recipe,
        models=models,
        estimate=check(recipe, headers),
        inherited=inherit({model.reference: model.licence for model in models if model.header}),
    )


def _look(reference: str, folder: Path, known: Callable[[ModelId], Path | None]) -> Looked:
    try:
        found = parse_reference(reference, folder)
        path = found.path if isinstance(found, LocalDirectory) else None
        if isinstance(found, Published):
            path = known(found.model_id)
        if path is None:
            raise nowhere_here(reference)
        with Checkpoint.open(path) as checkpoint:
            header, licence = header_of(checkpoint), licences.of_card(path)
    except (MergeCoreError, WeftError) as error:
        return Looked(reference=reference, fault=error)
    return Looked(reference=reference, directory=path, header=header, licence=licence)
