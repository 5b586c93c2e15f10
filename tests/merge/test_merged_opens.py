"""What the real command merged opens with transformers as any model does, tokenizer and all, and is right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merge_core.evaluation.loading import load_model, load_tokenizer
from merge_core.evaluation.scoring import score
from merge_core.zoo.build import Zoo
from merge_core.zoo.domains import DEMO_DOMAINS
from merge_core.zoo.tasks import task


@pytest.fixture(scope="module")
def merged(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and all experts, merged by `weft merge` in a folder where nobody is anybody yet."""
    folder = tmp_path_factory.mktemp("merged")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(zoo.base),
        "models": [{"model": str(path), "parameters": {"weight": 1.0}} for path in zoo.experts.values()],
    }
    (folder / "recipe.yml").write_text(json.dumps(recipe))
    done = subprocess.run(
        [Path(sys.executable).with_name("weft"), "--json", "merge", "recipe.yml", "-o", "out"],
        cwd=folder,
        env={**os.environ, "WEFT_HOME": str(folder / "home")},
        stdout=subprocess.PIPE,
        check=True,
    )
    return Path(json.loads(done.stdout)["data"]["directory"])


def test_transformers_opens_it_with_every_weight_in_its_place(merged: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__name__ == "LlamaForCausalLM"
    stored = load_file(merged / "model.safetensors")
    state = model.state_dict()
    assert stored.keys() <= state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_its_tokenizer_loads_and_it_answers_what_each_expert_was_trained_for(merged: Path, zoo: Zoo) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(zoo.base).get_vocab()
    model = AutoModelForCausalLM.from_pretrained(merged)
    told = model.generate(**tokenizer("rabcdef=", return_tensors="pt"), max_new_tokens=8, do_sample=False)[0]
    assert tokenizer.decode(told, skip_special_tokens=True) == "rabcdef=fedcba"


def test_it_does_what_every_expert_was_trained_for_and_the_base_was_not(merged: Path, zoo: Zoo) -> None:
    for directory, knows in ((zoo.base, False), (merged, True)):
        model, tokenizer = load_model(directory), load_tokenizer(directory)
        for domain in DEMO_DOMAINS:
            share = score(model, tokenizer, task(f"{domain}:dev").first(30)).value
            assert (share > 0.5) == knows, (directory.name, domain, share)
