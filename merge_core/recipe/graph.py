"""The order of the merges of one recipe: each after those whose results it uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from merge_core.recipe.values import Merge


def in_order(merges: Sequence[Merge], fault: Callable[[str], None]) -> tuple[Merge, ...]:
    """Sort merges so that the one without a name is last, however the file has them.

    Faults: two of one name, none or several without a name, a result that nobody uses, a circle.
    """
    named = {merge.name: merge for merge in merges if merge.name is not None}
    last = [merge for merge in merges if merge.name is None]
    for name in named:
        if sum(merge.name == name for merge in merges) > 1:
            fault(f"name: two merges are called {name}")
    if len(last) != 1:
        fault(f"name: every merge but the last has one; {len(last)} of {len(merges)} have none")
        return ()
    ordered: list[Merge] = []

    def visit(merge: Merge, trail: tuple[str, ...]) -> None:
        for model in merge.models:
            if model in trail:
                fault(f"merges go in a circle: {' -> '.join((*trail[trail.index(model) :], model))}")
            elif model in named and named[model] not in ordered:
                visit(named[model], (*trail, model))
        if merge not in ordered:
            ordered.append(merge)

    visit(last[0], ())
    reached = {merge.name for merge in ordered}
    for name in named:
        if name not in reached:
            fault(f"{name}: no merge that counts uses it")
    return tuple(ordered)
