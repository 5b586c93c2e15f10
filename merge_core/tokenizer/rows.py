"""Which row of which operand every row of an aligned tensor is taken from: arithmetic on vocabularies.

A model that has a token gives its own row. Where it lacks one, the token's fill stands in, the same for all
models: what the rule says; else zeros where no model has the token, the base's row, the only model's row, or
the average of those that have it. Rows that belong to no token hold the average of all rows that do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merge_core.errors import Unmergeable
from merge_core.tokenizer.plan import FromToken, Rule

ZERO, AVERAGE, NO_TOKEN = -1, -2, -3
"""Where a row comes from when it is no operand's."""

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """An operand: the source it is of, the tokens of that model, and how many rows its tensor has."""

    source: int
    tokens: Mapping[str, int]
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """For every row of the output: `own[operand]` is the operand's row of that token, or negative.

    `origin` and `fill` say what stands in where it has none: the number of an operand and its row there.
    `forced` rows take the fill in every operand.
    """

    own: tuple[Index, ...]
    origin: Index
    fill: Index
    forced: NDArray[np.bool_]

    def taken(self, operand: int, first: int, stop: int) -> tuple[Index, Index]:
        """From which operand, or ZERO, AVERAGE, NO_TOKEN, and from which row there, rows are taken."""
        mine = self.own[operand][first:stop]
        has = (mine >= 0) & ~self.forced[first:stop]
        origin = np.where(has, operand, self.origin[first:stop])
        return origin, np.where(has, mine, self.fill[first:stop])


def map_rows(
    output: Mapping[str, int], rows: int, operands: Sequence[Owner], base: int | None, rules: Sequence[Rule]
) -> Rows:
    """Say where the rows of the output come from; `base` is a source.

    Raises Unmergeable where the output has more tokens than rows, or a rule asks for a row that is not there.
    """
    if max(output.values(), default=0) >= rows:
        raise Unmergeable(
            f"the tokenizers give more than the {rows} tokens of the plan", hint="weft plan RECIPE"
        )
    own = tuple(_own(output, rows, operand) for operand in operands)
    origin = np.full(rows, NO_TOKEN, np.int64)
    fill = np.zeros(rows, np.int64)
    forced = np.zeros(rows, np.bool_)
    tokens = np.fromiter(output.values(), np.int64, len(output))
    origin[tokens] = AVERAGE
    at = next((number for number, operand in enumerate(operands) if operand.source == base), None)
    _automatic(own, tokens, origin, fill, at)
    for rule in rules:
        row = output[rule.token]
        forced[row] = rule.force
        if rule.fill == "zero":
            origin[row] = ZERO
        elif isinstance(rule.fill, FromToken):
            origin[row], fill[row] = _ruled(rule.token, rule.fill, operands)
    return Rows(own=own, origin=origin, fill=fill, forced=forced)


def _own(output: Mapping[str, int], rows: int, operand: Owner) -> Index:
    own = np.full(rows, -1, np.int64)
    for token, row in output.items():
        found = operand.tokens.get(token, -1)
        if found < operand.rows:
            own[row] = found
    return own


def _automatic(own: Sequence[Index], tokens: Index, origin: Index, fill: Index, base: int | None) -> None:
    """Settle the tokens without rules: one owner, none, the base; the others are averages already."""
    has = np.stack([column[tokens] >= 0 for column in own])
    count = has.sum(axis=0)
    origin[tokens[count == 0]] = ZERO
    for operand, column in enumerate(own):
        single = (count == 1) & has[operand]
        settled = tokens[single if operand != base else has[operand]]
        origin[settled], fill[settled] = operand, column[settled]


def _ruled(token: str, wanted: FromToken, operands: Sequence[Owner]) -> tuple[int, int]:
    """The operand and the row that a rule names."""
    for number, operand in enumerate(operands):
        if operand.source == wanted.source:
            row = wanted.row if wanted.token is None else operand.tokens.get(wanted.token)
            if row is not None and row < operand.rows:
                return number, row
    named = wanted.row if wanted.token is None else repr(wanted.token)
    raise Unmergeable(
        f"the row of {token!r} is that of token {named}, which the model named for it does not have",
        hint="correct `tokens` in the recipe, then: weft plan RECIPE",
    )
