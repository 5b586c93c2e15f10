"""Plans before merging: which experts, by which operators, in which order, told from fingerprints.

    advice = advise(experts, base=base, tasks=("maths", "code"), predictor=default())
    advice.best.chain.recipe(base="w0", dtype="bfloat16"), advice.undecided, advice.reasons

All chains of up to four experts are looked at, of more those that the best beginnings lead to. Chains that
are worth the same are told apart by the ids of their models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from merge_core.errors import Unmergeable
from merge_core.simmerge.choosing.chains import Chain
from merge_core.simmerge.choosing.forecast import Forecast, Known, Reason, Scored
from merge_core.simmerge.choosing.predictor import Predictor
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.pairs.behaviours import Compare, compare

EXHAUSTIVE = 4
"""Experts of which every chain is looked at."""
BEAM = 32
"""Beginnings of each length that are followed where there are more."""
MAX_TOLD = 100
"""Chains that an advice ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The best first; `considered` says how many chains were looked at."""

    tasks: tuple[str, ...]
    ranked: tuple[Scored, ...]
    considered: int
    reasons: tuple[Reason, ...]
    """Why the last step of the best chain has its operator: the weightiest feature first."""

    @property
    def best(self) -> Scored:
        """What is advised."""
        return self.ranked[0]

    @property
    def undecided(self) -> tuple[Scored, ...]:
        """The first two, to be merged and evaluated both, where the lead is within its width; else none."""
        if len(self.ranked) < 2:
            return ()
        first, second = self.ranked[:2]
        lead = first.utility - second.utility
        return (first, second) if first.width(second) > lead else ()


def advise(
    experts: Mapping[str, Fingerprint],
    *,
    base: Fingerprint | None,
    tasks: Sequence[str],
    predictor: Predictor,
    scores: Mapping[str, Known] | None = None,
    base_scores: Known | None = None,
    operators: Sequence[str] = (),
    least: int | None = None,
    how: Compare = compare,
) -> Advice:
    """Rank the chains of `least` experts or more (None: of all) at `tasks` of the probe set.

    `operators` are those of the predictor where none are named. Raises Unmergeable where there is nothing to
    choose among, or where nothing can be told of models of other shapes.
    """
    forecast = Forecast(
        experts, base=base, tasks=tasks, predictor=predictor, scores=scores, base_scores=base_scores, how=how
    )
    chosen = tuple(operators) or predictor.operators
    unknown = sorted({*chosen} - {*predictor.operators})
    if unknown:
        raise Unmergeable(
            f"nobody has learned what {unknown[0]} is worth", hint=f"one of {', '.join(predictor.operators)}"
        )
    smallest = len(experts) if least is None else least
    ids = {name: expert.model_id for name, expert in experts.items()}
    # Nothing may depend on how the experts are listed, and of a chain its first two are in any order.
    listed = tuple(sorted(experts, key=ids.__getitem__))
    scored = [forecast.scored(chain) for chain in _searched(forecast, listed, chosen, smallest)]
    scored.sort(key=lambda s: (-s.utility, [ids[name] for name in s.chain.experts], s.chain.operators))
    return Advice(
        tasks=tuple(tasks),
        ranked=tuple(scored[:MAX_TOLD]),
        considered=len(scored),
        reasons=forecast.reasons(scored[0].chain, chosen),
    )


def _searched(
    forecast: Forecast, experts: tuple[str, ...], operators: Sequence[str], least: int
) -> Iterator[Chain]:
    """The chains that are looked at: all beginnings, or of many experts the best ones of each length."""
    front = [
        Chain(experts=pair, operators=(operator,))
        for pair in combinations(experts, 2)
        for operator in operators
    ]
    for length in range(2, len(experts) + 1):
        if length >= least:
            yield from front
        if len(experts) > EXHAUSTIVE:
            front = sorted(front, key=lambda chain: (-forecast.scored(chain).utility, chain))[:BEAM]
        front = [
            Chain(experts=(*chain.experts, expert), operators=(*chain.operators, operator))
            for chain in front
            for expert in experts
            if expert not in chain.experts
            for operator in operators
        ]
