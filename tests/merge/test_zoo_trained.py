"""The zoos of full size, trained: text that merges, and a skill that is learned best from the sum of two."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from merge_core.evaluation.scoring import score
from merge_core.recipe import Recipe, parse
from merge_core.zoo.build import Zoo, build
from merge_core.zoo.tasks import task
from merge_core.zoo.text import TEXT_DOMAINS
from merge_core.zoo.training import fine_tune, sequences
from merge_core.zoo.workbench import workbench

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def recipes(zoo: Zoo) -> Mapping[str, Recipe]:
    """Base, experts and their sum."""
    models = [{"model": name, "parameters": {"weight": 1.0}} for name in zoo.experts]
    told = {name: {"merge_method": "passthrough", "models": [{"model": name}]} for name in zoo.experts}
    told["base"] = {"merge_method": "passthrough", "models": [{"model": "base"}]}
    told["sum"] = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    return {name: parse(json.dumps(recipe)) for name, recipe in told.items()}


def test_the_sum_of_experts_on_text_predicts_all_of_it_better_than_any_of_them(tmp_path: Path) -> None:
    zoo = build(tmp_path / "zoo", seed=3, size="text")
    bits = {}
    with workbench({"base": zoo.base, **zoo.experts}) as bench:
        for name, recipe in recipes(zoo).items():
            bench.make(recipe)
            bits[name] = [bench.score(task(f"{domain}:test")).value for domain in TEXT_DOMAINS]
    mean = {name: sum(each) / len(each) for name, each in bits.items()}
    for number, domain in enumerate(TEXT_DOMAINS):
        assert bits[domain][number] == min(each[number] for name, each in bits.items() if name != "sum")
    assert mean["sum"] + 0.03 < min(mean[name] for name in TEXT_DOMAINS) < mean["base"] < 3.0


def test_two_skills_at_once_are_learned_best_from_the_sum_of_those_who_have_one(tmp_path: Path) -> None:
    zoo = build(tmp_path / "zoo", seed=3, size="skills")
    wanted, few = task("rev+caesar:test"), sequences("rev+caesar", "dev").first(32)
    untouched, tuned = {}, {}
    with workbench({"base": zoo.base, **zoo.experts}) as bench:
        for name, recipe in recipes(zoo).items():
            bench.make(recipe)
            untouched[name] = bench.score(wanted).value
            tuned[name] = score(fine_tune(bench.live.model, few).eval(), bench.tokenizer, wanted).value
    assert max(untouched.values()) < 0.1
    assert tuned["sum"] > max(tuned[name] for name in ("base", "rev", "caesar")) + 0.1
