"""Loading: the weights that a checkpoint consists of, in the memory they need, of causal models only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.evaluation.loading import load_model

WIDE = {"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 32, "intermediate_size": 12}
INDEX = "model.safetensors.index.json"


def made(kind: str, seed: int = 0) -> Any:
    """A small model with random weights, strong enough for its attention to show."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(**WIDE, **HEADS))
        elif kind == "tied":
            model = LlamaForCausalLM(LlamaConfig(**WIDE, **HEADS, tie_word_embeddings=True))
        elif kind == "mixtral":
            model = MixtralForCausalLM(
                MixtralConfig(**WIDE, **HEADS, num_local_experts=3, num_key_value_heads=1)
            )
        elif kind == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_embd=8, n_layer=2, n_head=2, n_positions=32))
        elif kind == "mamba":
            model = MambaForCausalLM(MambaConfig(**WIDE, state_size=4))
        else:
            model = BertLMHeadModel(BertConfig(**WIDE, **HEADS, is_decoder=kind == "bert decoder"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 if weight.ndim == 2 else 1)
    return model.eval()


def saved(directory: Path, kind: str = "llama", seed: int = 0) -> Path:
    made(kind, seed).save_pretrained(directory)
    return directory


def configure(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("kind", ["llama", "tied", "mixtral", "gpt2", "mamba", "bert decoder"])
def test_a_model_computes_what_it_did_when_it_was_saved(kind: str, tmp_path: Path) -> None:
    ids = torch.arange(12).remainder(13).view(2, 6)
    model = load_model(saved(tmp_path / "m", kind))
    assert not model.training and {weight.dtype for weight in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, made(kind)(input_ids=ids).logits)


def test_halves_are_widened_and_the_end_token_is_the_one_that_generation_names(tmp_path: Path) -> None:
    made("llama").bfloat16().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [3, 4], "do_sample": true}')
    model = load_model(tmp_path / "m")
    wanted = made("llama").lm_head.weight.bfloat16().float()
    assert torch.equal(model.lm_head.weight, wanted)
    assert model.generation_config.eos_token_id == [3, 4] and not model.generation_config.do_sample


def test_the_weights_are_those_of_the_index_whatever_lies_beside_them(tmp_path: Path) -> None:
    directory = saved(tmp_path / "m", seed=1)
    shard = directory / "model-00001-of-00001.safetensors"
    shutil.move(directory / "model.safetensors", shard)
    tensors = load_file(shard)
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))
    shutil.copy(saved(tmp_path / "other", seed=2) / "model.safetensors", directory)
    assert torch.equal(load_model(directory).lm_head.weight, tensors["lm_head.weight"])


def test_what_a_config_claims_takes_no_memory_before_it_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path / "m")

    def untouched(*_: object, **__: object) -> None:
        raise AssertionError("a model was made of what is only claimed")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", untouched)
    for claim in (
        {"intermediate_size": 4_000_000},
        {"vocab_size": 10**9},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 20},
    ):
        shutil.copytree(directory, tmp_path / "claimed", dirs_exist_ok=True)
        configure(tmp_path / "claimed", **claim)
        with pytest.raises(CorruptCheckpoint, match="claimed"):
            load_model(tmp_path / "claimed")


def test_misshapen_tensors_are_named(tmp_path: Path) -> None:
    directory = saved(tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].repeat(2, 1)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=r"lm_head\.weight"):
        load_model(directory)


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unmergeable, match="looks at the tokens"):
        load_model(saved(tmp_path / "bert", "bert"))
    configure(saved(tmp_path / "m"), is_causal=False)
    with pytest.raises(Unmergeable, match="looks at the tokens"):
        load_model(tmp_path / "m")
