"""What weft evolve looks like while it seeks: costs, time left, and a heat map of coefficients."""

from __future__ import annotations

import io
import os
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from merge_core.evolution.genome import Shape
from node.cli import render
from node.cli.output import Output
from node.cli.searching import Generations, heat_map
from node.merging.evolve import Search
from node.provenance.verify import few

ROWS = [
    {"model": "/models/math", "weights": [0.5, 1.0]},
    {"model": "/models/[red]code", "weights": [0.25, -1.0]},
]


def console() -> Console:
    return Console(file=io.StringIO(), width=200, force_terminal=False)


def drawn(thing: Any) -> str:
    screen = console()
    screen.print(thing)
    return screen.file.getvalue()  # type: ignore[attr-defined]


def generation(number: int, **more: Any) -> dict[str, Any]:
    told = {
        "kind": "generation",
        "number": number,
        "of": 4,
        "share": 0.25,
        "left": 2.5,
        "evaluated": 12 * number,
        "replayed": False,
    }
    return {
        **told,
        "best": 1.5 / number,
        "mean": 2.0,
        "rows": ROWS,
        **more,
    }


def test_a_heat_map_has_experts_and_layers() -> None:
    shown = drawn(heat_map(ROWS, width=200))
    first, math, code = (line.split() for line in shown.splitlines()[:3])
    assert first == ["layer", "0", "1"]
    assert math == ["math", "0.50", "1.00"]
    assert code == ["[red]code", "0.25", "-1.00"]


def test_a_deep_model_still_fits() -> None:
    for width in (40, 80, 200):
        screen = Console(file=io.StringIO(), width=width, force_terminal=False)
        screen.print(heat_map([{"model": "a-long-name-of-an-expert", "weights": [-0.25] * 80}], width=width))
        header, row = (line.split() for line in screen.file.getvalue().splitlines())  # type: ignore[attr-defined]
        assert header[:2] == ["layer", "0"] and int(header[-1]) < 80 and "…" not in "".join(row[1:])
        assert row[1:] == ["-0.25"] * (len(header) - 1) and len(header) == 1 + (width - 21) // 6


def test_a_view_tells_costs_and_the_time_that_is_left() -> None:
    ticks = iter([0.0, 0.01, 10.01, 30.01])
    view = Generations(lambda: next(ticks))
    assert view.add(generation(1, replayed=True))
    shown = drawn(view.drawn(width=200))
    assert "taken up" in shown and "left" not in shown
    assert view.add(generation(2))
    assert "about 2 min left" in drawn(view.drawn(width=200))
    assert not view.add(generation(2))
    assert view.add(generation(3, left=1.0))
    shown = drawn(view.drawn(width=200))
    assert "about 80 s left" in shown and "2/4" in shown and "0.7500" in shown and "25%" in shown


def test_who_looks_in_later_is_not_told_a_time_that_nobody_knows() -> None:
    ticks = iter([0.0, 0.01, 20.01])
    view = Generations(lambda: next(ticks))
    view.add(generation(3))
    assert "left" not in drawn(view.drawn(width=200))
    view.add(generation(4, left=1.0))
    assert "about 80 s left" in drawn(view.drawn(width=200))


def test_a_search_is_followed_like_any_job_and_each_generation_told_once() -> None:
    out = Output()
    out.story_console = console()
    searching = {"state": "searching", "waiting_on": "", "progress": None, "generation": None}
    with render.live(out) as show:
        show(searching | {"state": "fetching", "waiting_on": "math"})
        show(searching)
        for number in (1, 1, 2):
            show(searching | {"generation": generation(number)})
        show(searching | {"progress": {"what": "the best are asked all items", "done": 0, "total": 0}})
        show(searching | {"state": "merging"})
    told = out.story_console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert told[:2] == ["· fetching: math", "· searching"] and told[-1] == "· merging"
    assert told[2] == "generation 1 of 4: best 1.5000, mean 2.0000, 12 candidates"
    assert len(told) == 5


def test_no_more_processes_evaluate_than_this_one_may_use_cores() -> None:
    planned: Any = SimpleNamespace(parents=[SimpleNamespace(header=SimpleNamespace(tensors={}))])
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert Search(tasks=("rev:dev",), shape=Shape()).at_once(planned) == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_of_many_tasks_few_are_named() -> None:
    names = [str(number) for number in range(256)]
    assert few(names) == "0, 1, 2, 3, 4 and 251 more"
    assert few(names[:5]) == "0, 1, 2, 3, 4"
