"""The licence of a merge: what its parents demand, all of it together and no more than needed.

The most restrictive parent's licence is the result's. Where neither of two demands what the other does, both
hold (`AND`). A parent that says nothing leaves the result without a word too; one that lets nobody pass on
what is made of it is refused. Comparing is `node.catalog.licence_table`'s; conflicts that the field knows are
told and not judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from itertools import combinations

from merge_core.errors import Unmergeable
from node.catalog.licence_table import Licence, licence
from node.catalog.licences import NO_LICENCE, spdx
from node.domain.text import LICENCE

_PATENTS = ("AFL-3.0", "Apache-2.0", "ECL-2.0")
_TOKEN = re.compile(r"[()]|[A-Za-z0-9.+:_-]+")

Alternatives = frozenset[frozenset[str]]
"""An SPDX expression with its brackets multiplied out: one of these sets of licences has to be kept."""

_UNSAID: Alternatives = frozenset({frozenset({NO_LICENCE})})


@dataclass(frozen=True, slots=True, kw_only=True)
class Inherited:
    """The licence of a merge: an SPDX expression or NOASSERTION; what stands against it, what to mind."""

    licence: str
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def refuse(self) -> None:
        """Raise Unmergeable where a parent forbids merges."""
        if self.problems:
            raise Unmergeable.of(
                self.problems, hint="choose models whose licences allow derivatives, then: weft check RECIPE"
            )


def inherit(parents: Mapping[str, str]) -> Inherited:
    """What a merge inherits from models with these licences; keys are what the models are called."""
    problems: list[str] = []
    warnings: list[str] = []
    whole: set[str] = set()
    unsaid = not parents
    for name, stated in parents.items():
        choices = alternatives(stated)
        allowed = {one for one in choices if not any(licence(x).forbids_merging for x in one)}
        if choices == _UNSAID:
            unsaid = True
            warnings.append(f"{name} says nothing about its licence, so nothing is said about the result's")
        elif not allowed:
            problems.append(f"{name} is under {stated}: nothing that is made of it may be passed on")
        elif len(allowed) == 1:
            whole |= next(iter(allowed))
        else:
            whole.add(f"({' OR '.join(sorted(' AND '.join(sorted(one)) for one in allowed))})")
    kept = sorted(_most_demanding(whole), key=lambda name: (name.startswith("("), name))
    expression = " AND ".join(kept) if len(kept) > 1 else "".join(kept).removeprefix("(").removesuffix(")")
    if unsaid or problems:
        expression = NO_LICENCE
    elif not LICENCE.fullmatch(expression):
        warnings.append(f"the result is under {expression}: an advert has no room for that")
        expression = NO_LICENCE
    return Inherited(
        licence=expression,
        problems=tuple(problems),
        warnings=(*warnings, *_mind(map(licence, sorted(whole)))),
    )


def alternatives(expression: str) -> Alternatives:
    """Multiply out an SPDX expression; what cannot be read is one licence of that name."""
    tokens = _TOKEN.findall(expression)
    if "".join(tokens) == "".join(expression.split()):
        with suppress(IndexError, ValueError):
            found = _any_of(tokens)
            if not tokens:
                return found
    return frozenset({frozenset({expression})})


def _any_of(tokens: list[str]) -> Alternatives:
    """Take `a OR b …` off the front of `tokens`; raises IndexError or ValueError where there is none."""
    found = _all_of(tokens)
    while tokens and tokens[0].upper() == "OR":
        tokens.pop(0)
        found |= _all_of(tokens)
    return found


def _all_of(tokens: list[str]) -> Alternatives:
    factors = [_one(tokens)]
    while tokens and tokens[0].upper() == "AND":
        tokens.pop(0)
        factors.append(_one(tokens))
    return reduce(lambda left, right: frozenset(a | b for a in left for b in right), factors)


def _one(tokens: list[str]) -> Alternatives:
    word = tokens.pop(0)
    if word == "(":
        found = _any_of(tokens)
        if tokens.pop(0) != ")":
            raise ValueError("a bracket is left open")
        return found
    if word == ")" or word.upper() in ("AND", "OR", "WITH"):
        raise ValueError(f"{word} stands where a licence belongs")
    name = spdx(word)
    if tokens and tokens[0].upper() == "WITH":
        name = f"{name} WITH {tokens[1]}"
        del tokens[:2]
    return frozenset({frozenset({name})})


def _most_demanding(names: Iterable[str]) -> list[str]:
    """Those that no other one covers; of equals all stay, since each has a notice of its own."""
    rows = [licence(name) for name in names]
    return [x.name for x in rows if not any(y.covers(x) and not x.covers(y) for y in rows)]


def _mind(rows: Iterable[Licence]) -> Iterator[str]:
    """What to know before such a merge is passed on."""
    found = list(rows)
    for row in found:
        if row.duty:
            yield f"{row.name}: {row.duty}"
    for one, other in combinations(found, 2):
        names = {one.name, other.name}
        if "GPL-2.0-only" in names and not names.isdisjoint(_PATENTS):
            yield f"{one.name} and {other.name} contradict each other: the GPL 2 allows no terms on patents"
        elif not (one.covers(other) or other.covers(one)):
            strict, rest = (one, other) if _shares(one) else (other, one)
            if _shares(strict) and any(not term.startswith("weak:") for term in rest.terms):
                yield f"{strict.name} allows no terms but its own; {rest.name} has others"


def _shares(row: Licence) -> bool:
    return any(term.startswith("share:") for term in row.terms)
