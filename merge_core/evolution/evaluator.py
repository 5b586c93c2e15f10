"""The Evaluator: answers questions about candidates with one live model, one thread and one device.

evaluator = Evaluator(genome, models, opened, tasks, seed=0)
evaluator.read(Question(share=0.25, values=genome.start))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from merge_core.digest import ModelId
from merge_core.errors import Unmergeable
from merge_core.evaluation.loading import load_model, load_tokenizer
from merge_core.evaluation.scoring import score
from merge_core.evaluation.spelling import Speller
from merge_core.evaluation.tasks import Metric, Task
from merge_core.evolution.candidates import LiveModel
from merge_core.evolution.fitness import BROKEN, Reading, Readings, portion
from merge_core.evolution.genome import Genome
from merge_core.evolution.journal import Question
from merge_core.execute import Material
from merge_core.plan import MergePlan
from merge_core.recipe import Input, Merge, Recipe, Slice
from merge_core.resolve import ModelHeader, draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model of the recipe: what is known of it, its weights, and where it lies."""

    header: ModelHeader
    model_id: ModelId
    material: Material
    directory: Path


class Evaluator:
    """One live model, in which candidates replace each other; `models` are the recipe's, by reference."""

    def __init__(
        self,
        genome: Genome,
        models: Mapping[str, Model],
        tasks: Sequence[Task],
        *,
        reported: Sequence[Task] = (),
        seed: int,
        device: str = "cpu",
    ) -> None:
        """Load the donor; raises Unmergeable or CorruptCheckpoint where it cannot be run."""
        donor = models[genome.origin.merges[-1].donor].directory
        torch.set_num_threads(1)
        self._genome = genome
        self._models = models
        self._live = LiveModel(load_model(donor).to(device))
        self._tokenizer = load_tokenizer(donor)
        self._device = device
        self._reported = list(reported)
        self._check([*tasks, *reported])
        # The portions are made once: the same items are asked hundreds of times.
        self._portions = cache(lambda share: [portion(task, share, seed) for task in tasks])

    def read(self, question: Question, *, reported: bool = False) -> Readings:
        """How a candidate, or a model of the recipe as it is, does at its share of each task.

        With `reported` at all items of the tasks that are only reported.
        """
        tasks: list[Task] = self._reported if reported else self._portions(question.share)
        if not self.prepare(question):
            return tuple(BROKEN for _ in tasks)
        return tuple(self._score(task) for task in tasks)

    def prepare(self, question: Question) -> bool:
        """Make the live model what is asked about; whether it holds numbers alone."""
        model = question.model
        recipe = self._genome.recipe(question.values) if model is None else _alone(model)
        try:
            plan, inputs = self._planned(recipe)
        except Unmergeable:  # the start makes a plan: these values do not go together, as an operator says
            return False
        return self._live.fill(plan, inputs)

    def _check(self, tasks: Sequence[Task]) -> None:
        """Raise Unmergeable where the tokenizer cannot spell an item in tokens that the model has."""
        model = self._live.model
        speller = Speller(self._tokenizer, model, model.get_input_embeddings().num_embeddings)
        for task in tasks:
            speller.texts([(i.prompt, text) for i in task.items for text in i.choices or (i.answer,)])

    def _planned(self, recipe: Recipe) -> tuple[MergePlan, list[Material]]:
        known = {model: self._models[model] for model in recipe.models}
        drafted = draft(recipe, {model: item.header for model, item in known.items()})
        plan = drafted.seal({model: item.model_id for model, item in known.items()})
        return plan, [known[model].material for model in recipe.models]

    def _score(self, task: Task) -> Reading:
        try:
            found = score(self._live.model, self._tokenizer, task, device=self._device)
        except Unmergeable:  # the items can be spelled: it is the candidate that computes no numbers
            return BROKEN
        loss = math.fsum(found.losses) / sum(found.bytes)
        return Reading(loss=loss, right=None if task.metric is Metric.BITS_PER_BYTE else found.value)


def _alone(model: str) -> Recipe:
    """The recipe of a model as it is."""
    return Recipe(merges=(Merge(method="passthrough", slices=(Slice(inputs=(Input(model=model),)),)),))
