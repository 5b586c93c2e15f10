"""The search: CMA-ES (Hansen 2016, arXiv:1604.00772) over a list of numbers, asked and told.

    search = Search(start, seed=0)
    search.tell([cost(values) for values in search.ask()])

All chance comes from the seed, drawn here; one state follows from the costs that were told so far and from
nothing else, so whoever tells the same costs again is where the search was. The strategy is cma's; nothing of
it is stored.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGMA = 1 / 6
"""The standard deviation that a search begins with, in units of a weight."""

Values = tuple[float, ...]


def population(dimensions: int) -> int:
    """How many candidates a generation has: 4 + 3 ln d."""
    return 4 + int(3 * math.log(max(2, dimensions)))


def tools() -> dict[str, str]:
    """The versions of what decides a trajectory."""
    return {name: metadata.version(name) for name in ("cma", "numpy", "torch", "transformers")}


class Search:
    """One run of the strategy from `start`, for non-negative seeds."""

    def __init__(self, start: Sequence[float], *, seed: int, sigma: float = SIGMA) -> None:
        self.population = population(len(start))
        self._dimensions = len(start)
        self._asked: list[NDArray[np.float64]] = []
        random = np.random.Generator(np.random.PCG64(seed))
        # cma knows no line, only planes: a second number that means nothing makes one of it.
        padded = [*start, 0.0][: max(2, len(start))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would plot
            import cma
        self._strategy: Any = cma.CMAEvolutionStrategy(
            padded,
            sigma,
            {
                "popsize": self.population,
                "randn": lambda *shape: random.standard_normal(shape),
                "seed": math.nan,  # leaves numpy's own random numbers alone
                "verbose": -9,
                "verb_log": 0,
                "signals_filename": "",
            },
        )

    def ask(self) -> list[Values]:
        """The candidates of the next generation."""
        self._asked = self._strategy.ask()
        return [self._plain(values) for values in self._asked]

    def tell(self, costs: Sequence[float]) -> None:
        """What each of them costs, in order."""
        self._strategy.tell(self._asked, list(costs))

    @property
    def mean(self) -> Values:
        """The middle of what would be asked next."""
        return self._plain(self._strategy.mean)

    def _plain(self, values: Any) -> Values:
        return tuple(float(value) for value in values[: self._dimensions])
