"""The two tasks of a search: `evolve` decides and journals, `candidates` evaluates, one process of many.

    evolve      {recipe, shape, seed, budget, tasks, reported, processes, inputs, journal, stop?}
                -> {recipe, record, generations, of, evaluated, cost, start_cost, tasks, reported}
    candidates  {recipe, shape, seed, inputs, tasks, reported, rank}; then questions, until the pipe is closed

`inputs` has the models of the recipe by reference, as other tasks are told of them. A task is a name or the
path of a file; evaluators read what `evolve` wrote down of them, so that all are asked the same. With `stop`
nothing new is tried: the best of what the journal has is settled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from merge_core import recipe as recipes
from merge_core.checkpoint.reader import Checkpoint, FileStamp
from merge_core.digest import canonical, sha256
from merge_core.evaluation import tasks as evaluation
from merge_core.evaluation.tasks import Task
from merge_core.evolution import fitness, search
from merge_core.evolution.fitness import Readings
from merge_core.evolution.genome import Genome, Shape
from merge_core.evolution.journal import Journal, Question
from merge_core.evolution.record import Judged, SearchRecord
from merge_core.evolution.run import Evolution, Found, Generation
from merge_core.recipe import Recipe, rename
from merge_core.resolve import ModelHeader, header_of
from node.worker.claims import Claims
from node.worker.crew import Crew, questions
from node.worker.messages import Emit

Request = dict[str, Any]


def evolve(request: Request, emit: Emit) -> Request:
    """Search, or go on where the journal ends; raises InvalidTask, InvalidRecipe or Unmergeable."""
    recipe, shape = recipes.parse(request["recipe"]), Shape.parse(request["shape"])
    headers, ids = _known(request["inputs"])
    genome = Genome.of(recipe, headers, shape)
    tasks, reported = [_tasks(request[key]) for key in ("tasks", "reported")]
    fitness.refuse_shared(tasks, reported)
    seed, budget = request["seed"], request["budget"]
    published = rename(recipe, ids)
    with (
        TemporaryDirectory(prefix="weft-tasks-", dir=Path(request["journal"]).parent) as folder,
        Crew(_to_evaluate(request, Path(folder), tasks, reported), processes=request["processes"]) as crew,
        Journal(
            Path(request["journal"]),
            _identity(published, shape, seed, budget, tasks) | {"device": crew.device},
            tasks=len(tasks),
        ) as journal,
    ):
        evolution = Evolution(genome, crew.ask, journal, seed=seed, budget=budget)
        stop = request.get("stop", False)
        for generation in evolution.generations(known_only=stop):
            if not stop:
                emit(_told(generation, genome))
        emit({"kind": "settling"})
        found = evolution.settle()
        readings = _reported(crew, genome, found) if reported else []
    made = genome.recipe(found.values)
    record = SearchRecord(
        start=published.to_yaml(),
        recipe=sha256(rename(made, ids).to_yaml().encode()),
        shape=shape,
        seed=seed,
        budget=budget,
        evaluated=found.evaluated,
        fitness=fitness.definition(tasks, seed),
        trajectory=found.trajectory,
        tools=search.tools(),
        tasks=_judged(tasks, found.base, found.start, found.readings),
        reported=_judged(reported, *readings) if readings else (),
    )
    return {
        "recipe": made.to_yaml(),
        "record": record.to_bytes().decode(),
        "generations": found.generations,
        "of": evolution.of,
        "cost": found.cost,
        "start_cost": found.start_cost,
    }


def candidates(request: Request, emit: Emit) -> Request:
    """Answer questions about candidates until there are no more."""
    from merge_core.evolution.evaluator import Evaluator

    recipe, shape = recipes.parse(request["recipe"]), Shape.parse(request["shape"])
    tasks, reported = ([_written(item) for item in request[key]] for key in ("tasks", "reported"))
    with _opened(request["inputs"]) as models:
        genome = Genome.of(recipe, {name: model.header for name, model in models.items()}, shape)
        device = _device(request["rank"])
        evaluator = Evaluator(
            genome,
            models,
            tasks,
            reported=reported,
            seed=request["seed"],
            device=device,
        )
        emit({"kind": "ready", "device": device.partition(":")[0]})
        for question, is_reported in questions(sys.stdin.buffer):
            readings = evaluator.read(question, reported=is_reported)
            emit({"kind": "answer", "readings": [reading.to_value() for reading in readings]})
    return {}


def _known(inputs: Mapping[str, Request]) -> tuple[dict[str, ModelHeader], dict[str, str]]:
    """The headers and ids of the models by reference."""
    headers, ids = {}, {}
    for reference, described in inputs.items():
        with Checkpoint.open(Path(described["directory"])) as checkpoint:
            headers[reference] = header_of(checkpoint)
        ids[reference] = str(Claims(described).manifest.model_id)
    return headers, ids


def _identity(
    published: Recipe, shape: Shape, seed: int, budget: int, tasks: Sequence[Task]
) -> dict[str, str]:
    """What a journal belongs to: all that decides what is asked and how it is answered, but the device."""
    return {
        "the recipe": sha256(published.to_yaml().encode()),
        "the shape": canonical(shape.to_value()).decode(),
        "the seed": str(seed),
        "the budget": str(budget),
        "the tasks": fitness.definition(tasks, seed),
        **search.tools(),
    }


def _tasks(references: Sequence[str]) -> list[Task]:
    from merge_core.evaluation.named import find

    return [find(reference) for reference in references]


def _to_evaluate(
    request: Request, folder: Path, tasks: Sequence[Task], reported: Sequence[Task]
) -> dict[str, Any]:
    """The request to an evaluator, with the tasks written down."""
    kept = {key: request[key] for key in ("recipe", "shape", "seed", "inputs")}
    listed = [(key, task) for key, group in (("tasks", tasks), ("reported", reported)) for task in group]
    told: dict[str, list[dict[str, str]]] = {"tasks": [], "reported": []}
    for number, (key, task) in enumerate(listed):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(f"{line}\n" for line in task.lines()))
        told[key].append({"name": task.name, "path": str(path)})
    return kept | told


def _written(item: Mapping[str, str]) -> Task:
    return replace(evaluation.read(Path(item["path"])), name=item["name"])


def _reported(crew: Crew, genome: Genome, found: Found) -> list[Readings | None]:
    """The readings of base, start and result at the tasks that are only reported."""
    asked = [Question(share=1.0), Question(share=1.0, values=found.values)]
    if genome.base is not None:
        asked.append(Question(share=1.0, model=genome.base))
    answers = dict(crew.ask(asked, reported=True))
    return [answers.get(2), answers[0], answers[1]]


def _judged(
    tasks: Sequence[Task], base: Readings | None, start: Readings | None, found: Readings | None
) -> tuple[Judged, ...]:
    assert start is not None and found is not None
    return tuple(
        Judged.of(task, None if base is None else base[i], start[i], found[i]) for i, task in enumerate(tasks)
    )


def _told(generation: Generation, genome: Genome) -> dict[str, Any]:
    """A generation as an event; `left` are the generations to come, each as its share of the items.

    `rows` are the coefficients of its best, for each expert one for each layer.
    """
    return {
        "kind": "generation",
        "number": generation.number,
        "of": generation.of,
        "share": generation.share,
        "left": sum(
            fitness.share_of(number, generation.of) for number in range(generation.number, generation.of)
        ),
        "best": generation.best,
        "mean": generation.mean,
        "evaluated": generation.evaluated,
        "replayed": generation.replayed,
        "rows": [
            {"model": model, "weights": list(weights)}
            for model, weights in zip(genome.rows, genome.weights(generation.values), strict=True)
        ],
    }


@contextmanager
def _opened(inputs: Mapping[str, Request]) -> Iterator[dict[str, Any]]:
    """The models of a recipe, their weights mapped, by reference."""
    from merge_core.evolution.evaluator import Model
    from merge_core.evolution.mapped import MappedSource
    from merge_core.execute import Material

    with ExitStack() as stack:
        models: dict[str, Model] = {}
        for reference, described in inputs.items():
            directory = Path(described["directory"])
            claims = Claims(described)
            checkpoint = stack.enter_context(Checkpoint.open(directory))
            hashed = [FileStamp(*stamp) for stamp in described.get("hashed", ())]
            models[reference] = Model(
                header=header_of(checkpoint),
                model_id=claims.manifest.model_id,
                material=Material(
                    tensors=MappedSource(checkpoint, claims.leaves, hashed=hashed),
                    files=partial(claims.files, directory),
                ),
                directory=directory,
            )
        yield models


def _device(rank: int) -> str:
    """A GPU of its own where there are enough; evaluators beyond that share them."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{rank % count}" if count else "cpu"
