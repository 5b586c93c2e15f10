"""Three real nodes and really trained experts: a merge is chosen before a byte of weights moves, and pays."""

from __future__ import annotations

import json
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from merge_core.simmerge.choosing.chains import OPERATORS, Chain
from node import app
from node.cli import follow, main
from node.config import Config
from node.evaluation import Measuring
from node.home import Home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
PATIENCE = 300.0
SHARES = {"one": ("base", "rev"), "two": ("sort", "brk"), "three": ()}
EXPERTS = ("rev", "sort", "brk")
Data = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class World:
    """Two nodes hold what the demo trains, the third one nothing."""

    homes: dict[str, Home]
    models: dict[str, Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    zoo = app.zoo(0, on_event=lambda event: None)
    models = {"base": Path(zoo["base"])} | {name: Path(path) for name, path in zoo["experts"].items()}
    network = f"test-{secrets.token_hex(4)}"
    homes = {name: Home(folder / name) for name in SHARES}
    try:
        for name, home in homes.items():
            app.initialise(home, now=time.time())
            settings = Config(
                network=network, listen=("/ip4/127.0.0.1/tcp/0",), peer_api="127.0.0.1:0", probes="zoo"
            )
            app.write_settings(home, settings)
            for model in SHARES[name]:
                base = None if model == "base" else str(models["base"])
                app.add(
                    home,
                    models[model],
                    name=model,
                    licence="MIT",
                    base=base,
                    on_progress=lambda count: None,
                )
            app.start_detached(home, settings)
        with follow.running_node(homes["one"]) as node:
            ticket = node.invite()
        for name in ("two", "three"):
            app.join(homes[name], ticket)
        until(lambda: {"base", *EXPERTS} <= {e["name"] for e in search(homes["three"])})
        yield World(homes=homes, models=models)
    finally:
        for home in homes.values():
            if app.node_runs(home):
                app.stop(home)


def search(home: Home) -> list[Data]:
    return follow.ask_all(home, lambda node: node.search(""))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def exact_match(home: Home, models: dict[str, Path]) -> dict[str, float]:
    """The mean over the experts' tasks, on items that nothing was trained on."""
    tasks = tuple(f"{expert}:test" for expert in EXPERTS)
    found = app.evaluate(home, models, Measuring(tasks=tasks), on_event=lambda event: None)
    shares = [row["values"] for row in found["tasks"]]
    return {
        model["name"]: statistics.mean(values[place] for values in shares)
        for place, model in enumerate(found["models"])
    }


def test_a_plan_of_what_two_other_nodes_hold_moves_little_and_beats_the_median_alternative(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = world.homes["three"]
    monkeypatch.setenv("WEFT_HOME", str(home.root))

    def weft(*words: object) -> Data:
        capsys.readouterr()
        code = main.run(["--json", *map(str, words)])
        said = capsys.readouterr()
        assert code == 0, said
        data: Data = json.loads(said.out)["data"]
        return data

    recipe = tmp_path / "recipe.yaml"
    advised = weft("plan", "--auto", *EXPERTS, "--tasks", ",".join(EXPERTS), "-o", recipe, "--explain")
    assert advised["base"]["name"] == "base" and 0 < advised["moved"] < 1_000_000
    assert not list(home.parents.glob("*")) and not list(home.incoming.glob("*"))
    assert not list(home.experts.glob("*/*"))

    merged = weft("merge", recipe, "-o", tmp_path / "merged")
    assert merged["state"] == "succeeded"
    alternatives = {}
    for operator in OPERATORS:  # one merge each, of the same experts: what one may try for the same money
        chain = Chain(experts=EXPERTS, operators=(operator, operator))
        text = chain.recipe(base="base", dtype="float32")
        for name, path in world.models.items():
            text = text.replace(json.dumps(name), json.dumps(str(path)))
        other = tmp_path / f"{operator}.yaml"
        other.write_text(text)
        weft("merge", other, "-o", tmp_path / operator)
        alternatives[operator] = tmp_path / operator
    scores = exact_match(home, {"merged": tmp_path / "merged", **alternatives})
    best = scores.pop("merged")
    print(
        json.dumps({"advised": advised["best"]["chain"], "score": best, "moved": advised["moved"], **scores})
    )
    assert best > statistics.median(scores.values()), os.linesep.join(map(str, scores.items()))
