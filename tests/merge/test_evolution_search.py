"""A search without models: costs, portions, trajectories, and what a kill leaves of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_core.checkpoint.source import TensorInfo
from merge_core.digest import canonical, sha256
from merge_core.errors import CorruptCheckpoint, InvalidRecipe, InvalidTask, MergeCoreError, Unmergeable
from merge_core.evaluation.tasks import Item, Metric, Task
from merge_core.evolution import fitness
from merge_core.evolution.fitness import BROKEN, MOST, Reading, Readings, cost, portion, yardsticks
from merge_core.evolution.genome import Genome, Shape
from merge_core.evolution.journal import Journal, Question, holds_candidates
from merge_core.evolution.record import Judged, SearchRecord
from merge_core.evolution.run import Evolution, Found, Generation
from merge_core.evolution.search import Search, population, tools
from merge_core.recipe import parse
from merge_core.resolve import ModelHeader

RECIPE = """
merge_method: task_arithmetic
base_model: base
models:
  - {model: math, parameters: {weight: 1.0}}
  - {model: code, parameters: {weight: 1.0}}
"""
IDENTITY = {"the seed": "0", "torch": "2.13.0"}


def genome(layers: int = 2) -> Genome:
    names = [
        f"model.layers.{n}.{part}.weight" for n in range(4) for part in ("self_attn.q_proj", "mlp.up_proj")
    ]
    header = ModelHeader(
        tensors={name: TensorInfo(dtype="F32", shape=(4, 4)) for name in [*names, "model.norm.weight"]},
        config={"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4},
        files=(),
    )
    headers = dict.fromkeys(("base", "math", "code"), header)
    return Genome.of(parse(RECIPE), headers, Shape(layers=layers))


START = genome().start


class Bowl:
    """Evaluates by a formula: the best values are 0.3 everywhere; answers come last question first.

    Dies of `patience`, where it is not None, after so many answers.
    """

    def __init__(self, *, patience: int | None = None, backwards: bool = True) -> None:
        self.asked: list[Question] = []
        self._patience = patience
        self._backwards = backwards

    def __call__(self, questions: Sequence[Question]) -> Iterator[tuple[int, Readings]]:
        order = list(enumerate(questions))
        for number, question in order[::-1] if self._backwards else order:
            if self._patience is not None and len(self.asked) == self._patience:
                raise KeyboardInterrupt
            self.asked.append(question)
            values = question.values or ((0.3,) if question.model else START)
            away = math.fsum((value - 0.3) ** 2 for value in values) + (2.0 if question.model else 0.0)
            yield number, (Reading(loss=0.1 + away), Reading(loss=0.2 + away, right=1 / (1 + away)))


def search(
    journal: Path, evaluate: Bowl, *, seed: int = 0, budget: int = 60, known_only: bool = False
) -> tuple[Found, list[Generation]]:
    with Journal(journal, IDENTITY, tasks=2) as opened:
        evolution = Evolution(genome(), evaluate, opened, seed=seed, budget=budget)
        generations = list(evolution.generations(known_only=known_only))
        return evolution.settle(), generations


# -- the search --------------------------------------------------------------------------------------


def test_a_search_finds_better_values_and_tells_how_it_goes(tmp_path: Path) -> None:
    found, generations = search(tmp_path / "journal", Bowl(), budget=200)
    size = population(len(genome().genes))
    assert size == 4 + int(3 * math.log(10)) and len(generations) == 200 // size
    assert [g.number for g in generations] == list(range(1, 200 // size + 1))
    assert [g.evaluated for g in generations] == [size * g.number for g in generations]
    assert all(g.best <= g.mean and not g.replayed for g in generations)
    assert {g.share for g in generations} == set(fitness.SHARES)
    assert found.cost < 0.5 * found.start_cost
    assert found.evaluated == generations[-1].evaluated
    assert found.base is not None and found.base[0].loss == pytest.approx(2.1)


def test_the_result_is_never_worse_than_the_start(tmp_path: Path) -> None:
    class Stubborn(Bowl):
        """Nothing but the start is any good."""

        def __call__(self, questions: Sequence[Question]) -> Iterator[tuple[int, Readings]]:
            for number, question in enumerate(questions):
                good = not question.values and question.model is None
                yield number, (Reading(loss=0.1 if good else 1.0),) * 2

    found, _ = search(tmp_path / "journal", Stubborn())
    assert found.values == () and found.cost == found.start_cost
    assert genome().recipe(found.values) == parse(RECIPE)


def test_a_candidate_that_comes_again_is_not_counted_again(tmp_path: Path) -> None:
    wide = genome(0)
    narrow = replace(wide, genes=tuple(replace(gene, start=8.0, low=7.9999) for gene in wide.genes))
    bowl = Bowl()
    with Journal(tmp_path / "journal", IDENTITY, tasks=2) as opened:
        evolution = Evolution(narrow, bowl, opened, seed=0, budget=300)
        *_, last = evolution.generations()
        candidates = {question for question in bowl.asked if question.values}
        assert last.evaluated == len(candidates) <= 12
        assert evolution.settle().evaluated == len(candidates)


def test_a_smaller_sigma_stays_nearer_to_the_start(tmp_path: Path) -> None:
    def strayed(sigma: float) -> float:
        bowl = Bowl()
        with Journal(tmp_path / f"journal-{sigma}", IDENTITY, tasks=2) as opened:
            evolution = Evolution(genome(), bowl, opened, seed=0, budget=20, sigma=sigma)
            next(evolution.generations())
        asked = [question.values for question in bowl.asked if question.values]
        return max(abs(value - begun) for values in asked for value, begun in zip(values, START, strict=True))

    assert strayed(0.4) > 4 * strayed(0.02) > 0


def test_one_seed_is_one_trajectory_in_whatever_order_answers_come(tmp_path: Path) -> None:
    first, _ = search(tmp_path / "1", Bowl())
    second, _ = search(tmp_path / "2", Bowl(backwards=False))
    other, _ = search(tmp_path / "3", Bowl(), seed=1)
    assert first == second
    assert other.trajectory != first.trajectory and other.values != first.values


def test_the_random_numbers_of_the_process_are_left_alone() -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    strategy = Search([1.0], seed=0)
    asked = strategy.ask()
    strategy.tell([value[0] ** 2 for value in asked])
    assert {len(value) for value in asked} == {1} and len(strategy.mean) == 1
    assert before == np.random.get_state()[1].tolist()  # type: ignore[union-attr]


def test_a_budget_below_one_generation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match="a budget of 5") as caught:
        search(tmp_path / "journal", Bowl(), budget=5)
    assert caught.value.hint == "weft evolve RECIPE --budget 10"


# -- killed and taken up -----------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [0, 1, 2, 3, 9, 25, 40, 59])
def test_a_search_that_was_killed_goes_on_as_if_nothing_had_been(tmp_path: Path, answers: int) -> None:
    whole = Bowl()
    undisturbed, _ = search(tmp_path / "undisturbed", whole)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "journal", Bowl(patience=answers))
    rest = Bowl()
    found, _ = search(tmp_path / "journal", rest)
    assert found == undisturbed
    assert len(rest.asked) == len(whole.asked) - answers


@pytest.mark.parametrize("damage", [b"", b"\n", b"x", b'{"question":{}}\n', b"[1]\n", b"\xff\n"])
def test_a_torn_or_strange_line_is_the_end_of_a_journal(tmp_path: Path, damage: bytes) -> None:
    undisturbed, _ = search(tmp_path / "journal", Bowl())
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal").write_bytes(b"".join(lines[:20]) + lines[20][:-7] + damage + b"".join(lines[21:]))
    rest = Bowl()
    found, _ = search(tmp_path / "journal", rest)
    assert found == undisturbed and len(rest.asked) == len(lines) - 20
    assert sorted((tmp_path / "journal").read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_the_journal_of_another_search_is_neither_believed_nor_lost(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    search(path, Bowl())
    whole = path.read_bytes()
    with pytest.raises(MergeCoreError, match=r"torch was 2\.13\.0, is 2\.14\.0$") as caught:
        Journal(path, IDENTITY | {"torch": "2.14.0"}, tasks=2)
    assert "the seed" not in caught.value.why and "--resume" in caught.value.hint
    assert path.read_bytes() == whole
    path.write_bytes(b"[]\n" + whole)
    with pytest.raises(MergeCoreError, match="strange"):
        Journal(path, IDENTITY, tasks=2)
    assert path.read_bytes() == b"[]\n" + whole


def test_what_base_and_start_read_is_not_worth_keeping(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert not holds_candidates(path)
    search(path, Bowl())
    lines = path.read_bytes().splitlines(keepends=True)
    for count in range(5):
        path.write_bytes(b"".join(lines[:count]))
        assert holds_candidates(path) == (count == 4)


def test_a_head_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    search(tmp_path / "whole", Bowl())
    (tmp_path / "journal").write_bytes((tmp_path / "whole").read_bytes()[:20])
    search(tmp_path / "journal", Bowl())
    assert (tmp_path / "journal").read_bytes() == (tmp_path / "whole").read_bytes()


def test_stopping_settles_for_whole_generations_that_the_journal_has(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "journal", Bowl(patience=35))
    stopped = Bowl()
    found, generations = search(tmp_path / "journal", stopped, known_only=True)
    assert generations and found.generations == len(generations)
    assert all(generation.replayed for generation in generations)
    assert found.evaluated == generations[-1].evaluated < 60
    assert found.cost <= found.start_cost
    assert {question.share for question in stopped.asked} == {1.0}


def test_lines_of_a_journal_are_for_people_too(tmp_path: Path) -> None:
    search(tmp_path / "journal", Bowl())
    head, *lines = map(json.loads, (tmp_path / "journal").read_bytes().splitlines())
    assert head == {"search": IDENTITY, "version": 2}
    assert {(line["generation"], line["number"]) for line in lines} >= {(1, 0), (6, 9)}


# -- what a candidate costs --------------------------------------------------------------------------

LOSSES = st.floats(0, 50)
READINGS = st.builds(Reading, loss=LOSSES, right=st.none() | st.floats(0, 1))


def test_a_cost_is_the_mean_and_the_worst_again() -> None:
    readings = (Reading(loss=1.0, right=0.75), Reading(loss=3.0))
    assert cost(readings, (2.0, 2.0)) == pytest.approx((0.75 + 1.5) / 2 + fitness.WORST * 1.5)


@given(readings=st.lists(READINGS, min_size=1, max_size=4), at=st.integers(0, 3), more=st.floats(0.01, 5))
def test_more_loss_never_costs_less_and_a_broken_candidate_costs_most(
    readings: list[Reading], at: int, more: float
) -> None:
    given_ = tuple(readings)
    marks = (1.0,) * len(given_)
    worse = list(given_)
    worse[at % len(worse)] = replace(worse[at % len(worse)], loss=worse[at % len(worse)].loss + more)
    assert cost(given_, marks) <= cost(tuple(worse), marks) <= cost((BROKEN,) * len(given_), marks)
    assert cost((BROKEN,), (1.0,)) == pytest.approx((MOST + 1.0) * (1 + fitness.WORST))


def test_yardsticks_are_the_least_losses() -> None:
    base, start = (Reading(loss=1.0), Reading(loss=0.2)), (Reading(loss=0.5), Reading(loss=0.4))
    assert yardsticks(base, start) == (0.5, 0.2)
    assert min(yardsticks((Reading(loss=0.0),))) > 0


def test_nothing_is_sought_where_base_and_start_are_broken(tmp_path: Path) -> None:
    class Broken(Bowl):
        """Nothing computes numbers."""

        def __call__(self, questions: Sequence[Question]) -> Iterator[tuple[int, Readings]]:
            yield from ((number, (BROKEN, BROKEN)) for number, _ in enumerate(questions))

    with pytest.raises(Unmergeable, match="neither the base nor the recipe"):
        search(tmp_path / "journal", Broken())
    with pytest.raises(Unmergeable):
        yardsticks((Reading(loss=1.0), BROKEN), (Reading(loss=1.0), BROKEN))
    assert yardsticks((BROKEN,), (Reading(loss=0.5),)) == (0.5,)
    assert math.isfinite(cost((BROKEN,), (1e300,)))


@given(reading=READINGS)
def test_a_reading_is_read_as_it_was_written(reading: Reading) -> None:
    assert Reading.parse(json.loads(json.dumps(reading.to_value()))) == reading


@pytest.mark.parametrize(
    "value", [["nan", None], ["-0x1p0", None], ["0x1p0", "0x1p1"], ["0x1p0"], None, [1, 2]]
)
def test_no_other_reading_is_read(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        Reading.parse(value)


# -- the items ---------------------------------------------------------------------------------------


def task(name: str, *numbers: int) -> Task:
    items = tuple(Item(prompt=f"{n}=", answer=str(n)) for n in numbers)
    return Task(name=name, metric=Metric.EXACT_MATCH, items=items)


def test_portions_grow_and_follow_from_the_seed_and_the_items() -> None:
    whole = task("count", *range(200))
    small, half, full = (portion(whole, share, 0) for share in fitness.SHARES)
    assert (len(small.items), len(half.items), full) == (50, 100, whole)
    assert set(small.items) < set(half.items)
    assert portion(whole, 0.25, 1) != small == portion(whole, 0.25, 0)
    assert set(portion(task("count", *reversed(range(200))), 0.25, 0).items) == set(small.items)
    assert len(portion(task("few", *range(20)), 0.25, 0).items) == 20
    assert len(portion(task("some", *range(60)), 0.25, 0).items) == fitness.FEWEST


def test_items_that_are_sought_by_cannot_be_reported() -> None:
    fitness.refuse_shared([task("a", 1, 2)], [task("b", 3, 4)])
    with pytest.raises(InvalidTask, match="b shares 1 items with a"):
        fitness.refuse_shared([task("a", 1, 2)], [task("b", 2, 3)])
    other = Task(name="b", metric=Metric.BITS_PER_BYTE, items=(Item(prompt="2=", answer="2"),))
    with pytest.raises(InvalidTask, match="shares"):
        fitness.refuse_shared([task("a", 1, 2)], [other])
    for prompt, answer in (("2", "=2"), ("", "2=2")):
        spelled = Task(name="b", metric=Metric.BITS_PER_BYTE, items=(Item(prompt=prompt, answer=answer),))
        with pytest.raises(InvalidTask, match="b shares 1 items with a"):
            fitness.refuse_shared([task("a", 1, 2)], [spelled])
    answered = Task(name="b", metric=Metric.EXACT_MATCH, items=(Item(prompt="2=", answer="3"),))
    with pytest.raises(InvalidTask, match="b shares 1 items with a"):
        fitness.refuse_shared([task("a", 1, 2)], [answered])
    texts = [
        Task(name=name, metric=Metric.BITS_PER_BYTE, items=(Item(prompt="if ", answer=name),))
        for name in "ab"
    ]
    fitness.refuse_shared(texts[:1], texts[1:])
    with pytest.raises(InvalidTask, match="two tasks"):
        fitness.refuse_shared([task("a", 1)], [task("a", 3)])


# -- the record --------------------------------------------------------------------------------------


def record() -> SearchRecord:
    reading = Reading(loss=0.25, right=0.5)
    return SearchRecord(
        start=parse(RECIPE).to_yaml(),
        recipe=sha256(b"found"),
        shape=Shape(layers=2),
        seed=3,
        budget=200,
        evaluated=190,
        fitness=fitness.definition([task("a", 1)], 3),
        trajectory=sha256(b"trajectory"),
        tools=tools(),
        tasks=(Judged.of(task("a", 1), None, reading, reading),),
        reported=(Judged.of(task("b", 2), reading, reading, reading),),
    )


def test_a_record_is_read_as_it_was_written() -> None:
    assert SearchRecord.parse(record().to_bytes()) == record()


CHANGES: dict[str, Callable[[dict[str, object]], object]] = {
    "another version": lambda value: value.update(version=2),
    "a key more": lambda value: value.update(more=1),
    "no budget": lambda value: value.pop("budget"),
    "a negative seed": lambda value: value.update(seed=-1),
    "a seed that is true": lambda value: value.update(seed=True),
    "no tasks": lambda value: value.update(tasks=[]),
    "tasks without end": lambda value: value.update(reported=[{}] * 300),
    "a start that is no recipe": lambda value: value.update(start="merge_method: magic"),
    "tools that are numbers": lambda value: value.update(tools={"cma": 4}),
    "tools without end": lambda value: value.update(tools={f"t{n}": "1" for n in range(40)}),
    "a tool of escapes": lambda value: value.update(tools={"cma": "\x1b[2J"}),
    "a task of escapes": lambda value: value["tasks"][0].update(name="\x1b[2J"),  # type: ignore[index]
    "more than its budget": lambda value: value.update(evaluated=201),
    "what was sought by is reported": lambda value: value.update(
        reported=[{**value["tasks"][0], "name": "b"}]  # type: ignore[index]
    ),
    "one name twice": lambda value: value["reported"][0].update(name="a"),  # type: ignore[index]
    "a shape of anything": lambda value: value.update(shape={"layers": "many", "operators": []}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_other_record_is_read(change: str) -> None:
    value = json.loads(record().to_bytes())
    CHANGES[change](value)
    with pytest.raises(CorruptCheckpoint, match="not the record of a search"):
        SearchRecord.parse(canonical(value))


@given(data=st.binary(max_size=40))
def test_bytes_of_anybody_are_refused_in_one_way(data: bytes) -> None:
    with pytest.raises(CorruptCheckpoint):
        SearchRecord.parse(data)
