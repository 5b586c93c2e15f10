"""weft evolve: from a recipe and tasks to a merged model, which anybody can merge again and verify."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

Weft = Callable[..., Any]

RECIPE = """
merge_method: task_arithmetic
base_model: ./base
models:
  - {model: ./math, parameters: {weight: 1.0}}
  - {model: ./code, parameters: {weight: 1.0}}
"""
NAMES = ("base", "math", "code")
SMALL = ("--budget", 24, "--processes", 1)


def write_task(path: Path, seed: int, count: int = 40) -> Path:
    """Words of four letters, backwards; those of one seed are asked by no other."""
    draw = random.Random(seed)
    words = ["".join(draw.choice("abcdefgh") for _ in range(4)) + "hgfedcba"[seed] for _ in range(count)]
    path.write_text("".join(json.dumps({"prompt": f"{w}=", "answer": w[::-1]}) + "\n" for w in words))
    return path


@pytest.fixture
def desk(weft: Weft, llamas: Callable[[Path], None]) -> Path:
    """Where the command runs: models that run, a recipe, and tasks of which one is only reported."""
    desk = Path.cwd()
    llamas(desk)
    (desk / "recipe.yml").write_text(RECIPE)
    for seed, name in enumerate(("words", "more", "test")):
        write_task(desk / f"{name}.jsonl", seed)
    return desk


def published(model: Path) -> str:
    return (model / "mergekit_config.yml").read_text()


def test_a_recipe_is_found_merged_and_verified_by_somebody_else(
    weft: Weft, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weft("init")
    said = weft(
        *("--json", "evolve", "recipe.yml", "-o", "found", *SMALL),
        *("--tasks", "words.jsonl,more.jsonl", "--report-tasks", "test.jsonl"),
    )
    search = said.data["search"]
    assert said.data["signed"] and search["evaluated"] == search["budget"] - 2
    assert search["cost"] < search["start_cost"]
    assert [task["task"] for task in search["tasks"]] == ["words.jsonl", "more.jsonl"]
    assert [task["items"] for task in search["reported"]] == [40]
    assert set(search["tasks"][0]) >= {"base", "start", "found"}
    assert [path.name for path in desk.glob(".*")] == []
    assert "search" in [check["name"] for check in weft("--json", "verify", "found").data["checks"]]

    # Somebody else: another home, and the models in other places, which is all that the recipe there says.
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "another"))
    weft("init")
    elsewhere, found = tmp_path / "elsewhere", published(desk / "found")
    for name in NAMES:
        shutil.copytree(desk / name, elsewhere / name)
        model_id = weft("--json", "add", elsewhere / name, "--licence", "apache-2.0").data["model_id"]
        assert model_id in found
        found = found.replace(model_id, str(elsewhere / name))
    (elsewhere / "recipe.yml").write_text(found)
    again = weft("--json", "merge", elsewhere / "recipe.yml", "-o", elsewhere / "again").data
    assert again["model_id"] == said.data["model_id"]
    assert published(elsewhere / "again") == published(desk / "found")
    parents = [word for name in NAMES for word in ("--parent", elsewhere / name)]
    report = weft("--json", "verify", "found", "--audit", "full", *parents).data
    assert report["ok"] and report["checks"][-1]["name"] == "audit"

    # The record of another search is noticed, and not only because a signature is broken.
    record = json.loads((desk / "found" / "weft.search.json").read_text())
    changed = json.dumps(record | {"recipe": "sha256:" + "0" * 64}, sort_keys=True, separators=(",", ":"))
    (desk / "found" / "weft.search.json").write_text(changed)
    checks = {c["name"]: c for c in weft("--json", "verify", "found").error["report"]["checks"]}
    assert not checks["search"]["ok"] and "another recipe" in checks["search"]["detail"]


def test_items_that_are_sought_by_are_not_reported(weft: Weft, desk: Path) -> None:
    lines = (desk / "words.jsonl").read_text().splitlines(keepends=True)
    (desk / "mixed.jsonl").write_text((desk / "test.jsonl").read_text() + lines[7])
    said = weft(
        *("--json", "evolve", "recipe.yml", "-o", "found", *SMALL),
        *("--tasks", "words.jsonl", "--report-tasks", "mixed.jsonl"),
    )
    assert said.code == 2
    assert "mixed.jsonl shares 1 items with words.jsonl" in said.error["why"]
    assert [path.name for path in desk.glob(".*")] == []


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("--tasks", "word.jsonl"), 2, "no task 'word.jsonl': did you mean words.jsonl?"),
        (("--tasks", "words.jsonl", "--report-tasks", "rev:tset"), 2, "did you mean rev:test?"),
        (("--tasks", "lm-eval:gsm8k"), 2, "weft eval alone"),
        (("--tasks", "words.jsonl", "--budget", 3), 2, "a budget of 3"),
        (("--tasks", "words.jsonl", "--layers", 9), 2, "9 points over the depth"),
        (("--tasks", "words.jsonl", "--operators", "magic"), 2, "magic"),
        (("--tasks", ","), 2, "no tasks"),
    ],
)
def test_what_cannot_be_sought_leaves_nothing_behind(
    weft: Weft, desk: Path, words: tuple[Any, ...], code: int, why: str
) -> None:
    said = weft("--json", "evolve", "recipe.yml", "-o", "found", "--processes", 1, *words)
    assert (said.code, why in said.error["why"]) == (code, True), said
    assert [path.name for path in desk.glob(".*")] == [] and not (desk / "found").exists()


def test_where_nothing_can_be_compared_nothing_is_left(weft: Weft, desk: Path) -> None:
    path = desk / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, path, metadata={"format": "pt"})
    said = weft("--json", "evolve", "recipe.yml", "-o", "found", "--tasks", "words.jsonl", *SMALL)
    assert said.code == 6 and "nothing to compare with" in said.error["why"]
    assert [path.name for path in desk.glob(".*")] == []


def test_nothing_is_written_over(weft: Weft, desk: Path) -> None:
    (desk / "found").mkdir()
    said = weft("--json", "evolve", "recipe.yml", "-o", "found", "--tasks", "words.jsonl", *SMALL)
    assert said.error["why"].endswith("found exists") and said.error["hint"].startswith("weft evolve")
    assert list((desk / "found").iterdir()) == []


def test_a_failure_on_the_way_keeps_what_was_read(weft: Weft, desk: Path) -> None:
    """Weights that change while it seeks, and a task that is elsewhere when it goes on, cost no reading."""
    from merge_core.errors import MergeCoreError
    from merge_core.evolution.genome import Shape
    from node import app
    from node.home import Home
    from node.jobs.runner import JobView
    from node.merging.evolve import Search

    search = Search(tasks=(str(desk / "words.jsonl"),), shape=Shape(), budget=60, processes=1, layers=0)
    home, recipe = Home.default(), app.read_recipe(desk / "recipe.yml")
    told = 0

    def go_on(*, resume: bool, spoil: bool = False) -> dict[str, Any]:
        def hear(view: JobView) -> None:
            nonlocal told
            told += view.generation is not None
            if spoil and told:
                os.utime(desk / "math" / "model.safetensors", (told, told))

        return app.evolve_here(home, recipe, desk / "found", search, resume=resume, on_view=hear)

    with pytest.raises(MergeCoreError):
        go_on(resume=False, spoil=True)
    journal = desk / ".found.weft-search" / "journal"
    lines = journal.read_bytes().count(b"\n")
    assert told and lines > 4
    (desk / "words.jsonl").rename(desk / "elsewhere.jsonl")
    with pytest.raises(MergeCoreError, match="there is no task"):
        go_on(resume=True)
    assert journal.read_bytes().count(b"\n") == lines
    (desk / "elsewhere.jsonl").rename(desk / "words.jsonl")
    assert go_on(resume=True)["model_id"]
    assert [path.name for path in desk.glob(".*")] == []


# -- interrupted -------------------------------------------------------------------------------------

WEFT = """
import signal
from node.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
main()
"""
SOUGHT = ("evolve", "recipe.yml", "--tasks", "words.jsonl", "--report-tasks", "test.jsonl")


@pytest.fixture
def begun(desk: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`begun("evolve", …, until="generation 2")`: a search in its own process, once it has said so."""
    children: list[subprocess.Popen[str]] = []

    def begin(*words: str, until: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", WEFT, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ.copy(),
            start_new_session=True,
        )
        children.append(child)
        assert child.stderr is not None
        assert any(line.startswith(until) for line in child.stderr), "it ended before"
        return child

    yield begin
    for child in children:
        child.kill()
        child.communicate()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_and_resume_give_the_trajectory_of_a_search_that_nobody_killed(
    weft: Weft, desk: Path, begun: Callable[..., subprocess.Popen[str]]
) -> None:
    sought = (*SOUGHT, "--budget", "104")
    whole = weft("--json", *sought, "-o", "whole", "--processes", 1).data
    child = begun(*sought, "-o", "killed", "--processes", "2", until="generation 2")
    child.kill()
    child.communicate()
    left = (desk / ".killed.weft-search" / "journal").read_bytes().count(b"\n")
    refused = weft("--json", *sought, "-o", "killed")
    assert refused.error["hint"].startswith(f"weft evolve RECIPE -o {desk / 'killed'} --resume")
    other = weft("--json", *sought, "-o", "killed", "--resume", "--seed", 1)
    assert "another one" in other.error["why"]
    taken_up = weft("--json", *sought, "-o", "killed", "--processes", 2, "--resume").data
    assert left > 20
    assert taken_up["model_id"] == whole["model_id"]
    for key in ("recipe_digest", "trajectory", "evaluated", "tasks", "reported"):
        assert taken_up["search"][key] == whole["search"][key]
    assert [path.name for path in desk.glob(".*")] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_keeps_the_best_so_far(
    weft: Weft, desk: Path, begun: Callable[..., subprocess.Popen[str]]
) -> None:
    child = begun(*SOUGHT, "-o", "stopped", "--budget", "100000", until="generation 1")
    child.send_signal(signal.SIGINT)
    assert child.stderr is not None and child.stdout is not None
    told, printed = child.stderr.read(), child.stdout.read()
    child.wait()
    assert child.returncode == 0, told
    assert "stopping: the best so far is merged" in told
    record = json.loads((desk / "stopped" / "weft.search.json").read_text())
    assert 0 < record["evaluated"] < record["budget"]
    assert weft("--json", "verify", "stopped", "--audit", "full").data["model_id"] == printed.strip()
    assert [path.name for path in desk.glob(".*")] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_seed_finds_another_recipe_and_operators_are_chosen_by_group(weft: Weft, desk: Path) -> None:
    found = [
        weft(
            "--json",
            *SOUGHT,
            "-o",
            f"found-{seed}",
            "--seed",
            seed,
            "--budget",
            48,
            "--operators",
            "task_arithmetic,ties",
        ).data
        for seed in (0, 1)
    ]
    assert found[0]["search"]["recipe_digest"] != found[1]["search"]["recipe_digest"]
    for seed in (0, 1):
        assert "name: layers-0-0" in published(desk / f"found-{seed}")
        assert weft("--json", "verify", f"found-{seed}", "--audit", "full").data["ok"]
