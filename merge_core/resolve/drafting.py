"""All merges of a recipe, one after the other: the Draft of a plan, or everything that stands against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from merge_core.checkpoint.manifest import MAX_TENSORS
from merge_core.checkpoint.source import TensorInfo
from merge_core.digest import ModelId
from merge_core.errors import Unmergeable
from merge_core.memory import THREADS
from merge_core.plan import MAX_TAKEN, MergePlan, Step, TensorPlan, most_taken
from merge_core.recipe import Recipe
from merge_core.resolve.estimate import Estimate, estimate
from merge_core.resolve.header import ModelHeader, absent, header_of_step
from merge_core.resolve.merging import Merging
from merge_core.resolve.telling import numbered

MAX_PROBLEMS = 200


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A plan whose inputs are still references (`models`, in order); `seal` names them by ModelId.

    `inputs` are the tensors of the models; it makes no plan where there are `problems`.
    """

    models: tuple[str, ...]
    inputs: tuple[Mapping[str, TensorInfo], ...]
    steps: tuple[Step, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    threads: int

    @cached_property
    def estimate(self) -> Estimate:
        """What the merge will cost; a search that drafts thousands asks of few."""
        return estimate(
            [] if self.problems else self.inputs,
            [] if self.problems else self.steps,
            problems=self.problems,
            warnings=self.warnings,
            threads=self.threads,
        )

    def seal(self, model_ids: Mapping[str, ModelId]) -> MergePlan:
        """The MergePlan; raises KeyError where the id of a reference is missing."""
        return MergePlan(inputs=tuple(model_ids[model] for model in self.models), steps=self.steps)


def check(recipe: Recipe, headers: Mapping[str, ModelHeader], *, threads: int = THREADS) -> Estimate:
    """Report everything that stands against a merge, and what it costs; never raises for a bad model."""
    return _resolve(recipe, headers, threads).estimate


def draft(recipe: Recipe, headers: Mapping[str, ModelHeader]) -> Draft:
    """Resolve a recipe; raises Unmergeable with every incompatibility in `problems`."""
    drafted = _resolve(recipe, headers, THREADS)
    if drafted.problems:
        raise Unmergeable.of(
            drafted.problems, hint="choose models that fit, or correct the recipe, then: weft plan RECIPE"
        )
    return drafted


def _resolve(recipe: Recipe, headers: Mapping[str, ModelHeader], threads: int) -> Draft:
    """A draft of what can be resolved, with all problems."""
    known = {model: headers[model] for model in recipe.models if model in headers}
    problems = _missing(recipe, known)
    warnings: list[str] = []
    steps: list[Step] = []
    sources = numbered(recipe)
    for merge in recipe.merges:
        usable = [model for model in merge.models if model in known]
        if merge.donor not in known or (len(usable) < len(merge.models) and not merge.is_whole):
            continue
        whose = f"{merge.name}: " if merge.name else ""
        files = [known[model].contents if model in known else absent for model in sources]
        merging = Merging(merge, {model: known[model] for model in usable}, sources, files)
        merging.run()
        problems += [whose + problem for problem in merging.problems]
        warnings += [whose + warning for warning in merging.warnings]
        if len(usable) < len(merge.models) or merging.problems:
            continue
        step = merging.step()
        steps.append(step)
        if merge.name is not None:
            known[merge.name] = header_of_step(step, files, known[merge.donor])
    if not problems:
        steps = _pruned(steps, len(recipe.models))
        problems += _unfit(recipe, steps)
    return Draft(
        models=recipe.models,
        inputs=tuple(headers[model].tensors for model in recipe.models if model in headers),
        steps=tuple(steps),
        problems=tuple(_limited(problems)),
        warnings=tuple(warnings),
        threads=threads,
    )


def _missing(recipe: Recipe, known: Mapping[str, ModelHeader]) -> list[str]:
    bases = {merge.base_of(part) for merge in recipe.merges for part in merge.slices}
    return [
        f"{'the base ' if model in bases else ''}{model} was not found"
        for model in recipe.models
        if model not in known
    ]


def _pruned(steps: Sequence[Step], inputs: int) -> list[Step]:
    """The steps without tensors that no later step takes."""
    taken: set[tuple[int, str]] = set()
    kept: list[Step] = []
    for number, step in reversed([*enumerate(steps)]):
        tensors = step.tensors
        if number < len(steps) - 1:
            tensors = tuple(t for t in tensors if (inputs + number, t.name) in taken)
        taken |= {(o.source, o.tensor) for t in tensors for o in t.operands}
        kept.insert(0, _with_tensors(step, tensors))
    return kept


def _with_tensors(step: Step, tensors: tuple[TensorPlan, ...]) -> Step:
    tokenizer, names = step.tokenizer, {tensor.name for tensor in tensors}
    if tokenizer is not None:
        tokenizer = replace(tokenizer, tensors=tuple(name for name in tokenizer.tensors if name in names))
    return replace(step, tensors=tensors, tokenizer=tokenizer)


def _unfit(recipe: Recipe, steps: Sequence[Step]) -> list[str]:
    """Why steps that are sound one by one make no plan."""
    total = sum(len(step.tensors) for step in steps)
    problems = (
        [f"the plan has {total} tensors; at most {MAX_TENSORS} are merged"] if total > MAX_TENSORS else []
    )
    if most_taken(len(recipe.models), steps) > MAX_TAKEN:
        problems.append(
            f"rounds upon rounds take more than {MAX_TAKEN} tensors for one: merge in several files"
        )
    return problems + [
        f"{merge.name}: no tensor of its result is used"
        for merge, step in zip(recipe.merges, steps, strict=True)
        if not step.tensors
    ]


def _limited(problems: Sequence[str]) -> list[str]:
    rest = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], *([f"and {rest} problems more"] if rest > 0 else [])]
