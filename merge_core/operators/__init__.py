"""Operators: one file per formula, listed in one table.

    find("ties").apply(chunk, parameters, traced)

base         what an operator declares and the rules that keep its bits
convert      stored bytes to float32 and back
kernels      the compiled steps of the formulas that many merges use
reductions   sums over a tensor with fixed bits
weighted     weighted sums
scratch      memory that a thread uses again for every chunk
testing      an operator held to its declaration, for the tests of whoever writes one
task_vectors, trimming, chance, consensus     what the operators on task vectors share
breadcrumbs  dare  della  karcher  linear  model_stock  nearswap  nuslerp  passthrough  ram  ramplus_tl
sce  slerp  task_arithmetic  ties             the formulas

A package of yours adds an operator with an entry point of the group `weft.operators`, whose name is the
operator's. The declarations import neither torch nor numba.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from merge_core.errors import InvalidRecipe
from merge_core.operators.base import Operator
from merge_core.operators.breadcrumbs import BREADCRUMBS, BREADCRUMBS_TIES
from merge_core.operators.dare import DARE_LINEAR, DARE_TIES
from merge_core.operators.della import DELLA, DELLA_LINEAR
from merge_core.operators.karcher import KARCHER
from merge_core.operators.linear import LINEAR
from merge_core.operators.model_stock import MODEL_STOCK
from merge_core.operators.nearswap import NEARSWAP
from merge_core.operators.nuslerp import NUSLERP
from merge_core.operators.passthrough import COPY, PASSTHROUGH
from merge_core.operators.ram import RAM
from merge_core.operators.ramplus_tl import RAMPLUS_TL
from merge_core.operators.sce import SCE
from merge_core.operators.slerp import SLERP
from merge_core.operators.task_arithmetic import TASK_ARITHMETIC
from merge_core.operators.ties import TIES

_GROUP = "weft.operators"

__all__ = ["COPY", "METHODS", "find", "installed", "names"]

METHODS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        BREADCRUMBS,
        BREADCRUMBS_TIES,
        DARE_LINEAR,
        DARE_TIES,
        DELLA,
        DELLA_LINEAR,
        KARCHER,
        LINEAR,
        MODEL_STOCK,
        NEARSWAP,
        NUSLERP,
        PASSTHROUGH,
        RAM,
        RAMPLUS_TL,
        SCE,
        SLERP,
        TASK_ARITHMETIC,
        TIES,
    )
}
"""What a recipe's `merge_method` can say, without what other packages add."""


def find(name: str) -> Operator:
    """The operator that a plan or a recipe names; raises InvalidRecipe where nobody here knows it."""
    known = METHODS.get(name) or _others().get(name)
    if known is None:
        raise InvalidRecipe(
            f"merge_method {name[:80]}: not supported; it is one of: {', '.join(names())}",
            hint="correct the name, or install the package that defines it",
        )
    return known


@cache
def _others() -> dict[str, Operator]:
    """What a plan can name beyond METHODS: COPY, other packages' operators, and what acts over a base."""
    methods = METHODS | installed()
    over_base = {o.over_base.name: o.over_base for o in methods.values() if o.over_base}
    return over_base | installed() | {COPY.name: COPY}


def names() -> tuple[str, ...]:
    """Every name that `merge_method` can say here, sorted."""
    return tuple(sorted(METHODS.keys() | installed().keys()))


@cache
def installed() -> dict[str, Operator]:
    """The operators that other packages define, by name; raises InvalidRecipe on one that is none."""
    found: dict[str, Operator] = {}
    for entry in entry_points(group=_GROUP):
        operator = entry.load()
        taken = entry.name in METHODS or entry.name in found or entry.name == COPY.name
        if not isinstance(operator, Operator) or operator.name != entry.name or taken:
            raise InvalidRecipe(
                f"{entry.value} is no operator that can be called {entry.name}",
                hint=f"pip uninstall {entry.dist.name if entry.dist else 'the package that defines it'}",
            )
        found[entry.name] = operator
    return found
