"""Operators: one file per formula, listed in one table.

    find("ties").apply(chunk, parameters, traced)

base         what an operator declares and the rules that keep its bits
convert      stored bytes to float32 and back
kernels      the compiled steps of the formulas that many merges use
reductions   sums over a tensor with fixed bits
scratch      memory that a thread uses again for every chunk
linear  slerp  task_arithmetic  ties  passthrough     the formulas

A package of yours adds an operator with an entry point of the group `weft.operators`, whose name is the
operator's. The declarations import neither torch nor numba.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from merge_core.errors import InvalidRecipe
from merge_core.operators.base import Operator
from merge_core.operators.linear import LINEAR
from merge_core.operators.passthrough import COPY, PASSTHROUGH
from merge_core.operators.slerp import SLERP
from merge_core.operators.task_arithmetic import TASK_ARITHMETIC
from merge_core.operators.ties import TIES

GROUP = "weft.operators"

__all__ = ["COPY", "GROUP", "METHODS", "find", "installed", "names"]

METHODS: dict[str, Operator] = {
    operator.name: operator for operator in (LINEAR, PASSTHROUGH, SLERP, TASK_ARITHMETIC, TIES)
}
"""What a recipe's `merge_method` can say, without what other packages add."""


def find(name: str) -> Operator:
    """The operator that a plan or a recipe names; raises InvalidRecipe where nobody here knows it."""
    known = METHODS.get(name) or (COPY if name == COPY.name else None) or installed().get(name)
    if known is None:
        raise InvalidRecipe(
            f"merge_method {name[:80]}: not supported; it is one of: {', '.join(names())}",
            hint="correct the name, or install the package that defines it",
        )
    return known


def names() -> tuple[str, ...]:
    """Every name that `merge_method` can say here, sorted."""
    return tuple(sorted(METHODS.keys() | installed().keys()))


@cache
def installed() -> dict[str, Operator]:
    """The operators that other packages define, by name; raises InvalidRecipe on one that is none."""
    found: dict[str, Operator] = {}
    for entry in entry_points(group=GROUP):
        operator = entry.load()
        taken = entry.name in METHODS or entry.name in found or entry.name == COPY.name
        if not isinstance(operator, Operator) or operator.name != entry.name or taken:
            raise InvalidRecipe(
                f"{entry.value} is no operator that can be called {entry.name}",
                hint=f"pip uninstall {entry.dist.name if entry.dist else 'the package that defines it'}",
            )
        found[entry.name] = operator
    return found
