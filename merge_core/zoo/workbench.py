"""The Workbench: models of one shape on the disk, merged in the memory of a live one, and scored there.

with workbench({"base": zoo.base, **zoo.experts}) as bench:
    bench.make(recipe)
    bench.score(task("rev:test")).value
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from merge_core.checkpoint.reader import Checkpoint, measure
from merge_core.errors import Unmergeable
from merge_core.evaluation.loading import load_model, load_tokenizer
from merge_core.evaluation.scoring import Score, score
from merge_core.evaluation.tasks import Task
from merge_core.evolution.candidates import LiveModel
from merge_core.evolution.evaluator import Model
from merge_core.evolution.mapped import MappedSource
from merge_core.execute import Material
from merge_core.recipe import Recipe
from merge_core.resolve import draft, header_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Workbench:
    """`models` by the names that recipes have for them; `live` is what was made last."""

    models: Mapping[str, Model]
    live: LiveModel
    tokenizer: Tokenizer

    def make(self, recipe: Recipe) -> None:
        """Let the live model be what a recipe makes; raises as `draft` does, and Unmergeable on NaN."""
        models = {name: self.models[name] for name in recipe.models}
        drafted = draft(recipe, {name: model.header for name, model in models.items()})
        plan = drafted.seal({name: model.model_id for name, model in models.items()})
        if not self.live.fill(plan, [model.material for model in models.values()]):
            raise Unmergeable("the merge holds NaN or infinity", hint="give the models less weight")

    def score(self, task: Task) -> Score:
        """The live model's score."""
        return score(self.live.model, self.tokenizer, task)


@contextmanager
def workbench(directories: Mapping[str, Path]) -> Iterator[Workbench]:
    """Open and hash the models in these directories, the first of which gives shape and tokenizer.

    Raises CorruptCheckpoint where a directory holds no sound model.
    """
    first = next(iter(directories.values()))
    with ExitStack() as stack:
        models = {}
        for name, directory in directories.items():
            checkpoint = stack.enter_context(Checkpoint.open(directory))
            measured = measure(checkpoint)
            models[name] = Model(
                header=header_of(checkpoint),
                model_id=measured.manifest.model_id,
                material=Material(
                    tensors=MappedSource(checkpoint, measured.leaves), files=checkpoint.functional_files
                ),
                directory=directory,
            )
        yield Workbench(models=models, live=LiveModel(load_model(first)), tokenizer=load_tokenizer(first))
