"""`evolve`: generations of candidates, asked of whatever evaluates them, to the recipe that costs least.

Base and start are asked first, on the same items as the candidates, for costs are told in their terms. The
start is the recipe as it stands, which may say more than genes can. At the end the cheapest candidates, the
middle of the last generation and the start itself are asked all items: what is found is never worse than the
start at what was sought. Evaluators may answer in any order and be any
number; the trajectory is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merge_core.digest import Digest, canonical, sha256
from merge_core.errors import InvalidRecipe
from merge_core.evolution import fitness
from merge_core.evolution.fitness import Readings
from merge_core.evolution.genome import Genome
from merge_core.evolution.journal import Journal, Question
from merge_core.evolution.search import SIGMA, Search, Values, population

FINALISTS = 3

Evaluate = Callable[[Sequence[Question]], Iterator[tuple[int, Readings]]]
"""Answer questions: (its number among them, readings) for each, in any order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How far a search is, told after each generation: `number` of `of`, counted from 1.

    `best` and `mean` are costs in this generation, at its share of the items; `values` are the best's.
    `evaluated` are the candidates so far, of whom none is counted twice at one share. `replayed`: the
    journal knew all of this generation, which took no time.
    """

    number: int
    of: int
    share: float
    best: float
    mean: float
    evaluated: int
    values: Values
    replayed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search ends with: the values that cost least, and readings and costs on all items.

    No values: nothing costs less than the recipe as it stood.

    `trajectory` is the digest of every generation's candidates and costs, in order.
    """

    values: Values
    cost: float
    start_cost: float
    readings: Readings
    start: Readings
    base: Readings | None
    generations: int
    evaluated: int
    trajectory: Digest


class Evolution:
    """One search: `generations()` step by step, then `settle()`; stopping between the two is fine."""

    def __init__(
        self,
        genome: Genome,
        evaluate: Evaluate,
        journal: Journal,
        *,
        seed: int,
        budget: int,
        sigma: float = SIGMA,
    ) -> None:
        """`budget` is the number of candidates; raises InvalidRecipe where that is less than a generation.

        `sigma` is how far candidates lie from the start at first: less pays where the start is a good one.
        """
        size = population(len(genome.genes))
        if budget < size:
            raise InvalidRecipe(
                f"a budget of {budget} is less than one generation of {size} candidates",
                hint=f"weft evolve RECIPE --budget {size}",
            )
        self.of = budget // size
        self._genome = genome
        self._evaluate = evaluate
        self._journal = journal
        self._search = Search(genome.start, seed=seed, sigma=sigma)
        self._base = genome.base
        self._trajectory: list[Any] = []
        self._ranked: list[tuple[float, Values]] = []
        self._done = 0
        self._tried: set[Question] = set()

    def generations(self, *, known_only: bool = False) -> Iterator[Generation]:
        """Every generation of the budget, evaluated and told; `known_only` ends with what the journal has."""
        for number in range(self.of):
            share = fitness.share_of(number, self.of)
            asked = self._search.ask()
            settled = [self._genome.settled(values) for values in asked]
            questions = [Question(share=share, values=values) for values in settled]
            replayed = self._journal.readings.keys() >= {*questions, *self._as_references(share)}
            if known_only and not replayed:
                return
            yardsticks = self._yardsticks(share)
            readings = self._ask(questions)
            self._tried.update(questions)
            costs = [fitness.cost(reading, yardsticks) for reading in readings]
            self._search.tell(costs)
            self._done = number + 1
            self._trajectory.append(
                [[[v.hex() for v in x], c.hex()] for x, c in zip(settled, costs, strict=True)]
            )
            # Costs at other shares are costs in other items: only the latest are compared.
            if number and share != fitness.share_of(number - 1, self.of):
                self._ranked = []
            self._ranked = sorted([*self._ranked, *zip(costs, settled, strict=True)])[:FINALISTS]
            yield Generation(
                number=self._done,
                of=self.of,
                share=share,
                best=min(costs),
                mean=sum(costs) / len(costs),
                evaluated=len(self._tried),
                values=self._ranked[0][1],
                replayed=replayed,
            )

    def settle(self) -> Found:
        """Ask the best so far all items, and choose."""
        yardsticks = self._yardsticks(1.0)
        start: Values = ()
        middle = self._genome.settled(self._search.mean)
        finalists = list(dict.fromkeys([start, *(values for _, values in self._ranked), middle]))
        readings = self._ask([Question(share=1.0, values=values) for values in finalists])
        costs = [fitness.cost(reading, yardsticks) for reading in readings]
        best = costs.index(min(costs))
        return Found(
            values=finalists[best],
            cost=costs[best],
            start_cost=costs[0],
            readings=readings[best],
            start=readings[0],
            base=None if self._base is None else self._references(1.0)[0],
            generations=self._done,
            evaluated=len(self._tried),
            trajectory=sha256(canonical(self._trajectory)),
        )

    def _yardsticks(self, share: float) -> tuple[float, ...]:
        return fitness.yardsticks(*self._references(share))

    def _references(self, share: float) -> list[Readings]:
        """The readings of the base, where there is one, and of the start."""
        return self._ask(self._as_references(share))

    def _as_references(self, share: float) -> list[Question]:
        base = [] if self._base is None else [Question(share=share, model=self._base)]
        return [*base, Question(share=share)]

    def _ask(self, questions: Sequence[Question]) -> list[Readings]:
        """Answers in the order of the questions; what the journal knows is not asked again."""
        known = self._journal.readings
        fresh = list(dict.fromkeys(question for question in questions if question not in known))
        for number, readings in self._evaluate(fresh) if fresh else ():
            self._journal.add(fresh[number], readings, generation=self._done + 1, number=number)
        return [known[question] for question in questions]
