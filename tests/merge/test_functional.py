"""The files beside the weights: what of a donor's config a merged model takes over, and what never."""

from __future__ import annotations

import json
from typing import Any

import pytest

from merge_core.checkpoint.source import TensorInfo
from merge_core.config_keys import dropped
from merge_core.digest import ModelId, sha256
from merge_core.errors import CorruptCheckpoint
from merge_core.functional import output_files
from merge_core.plan import MergePlan
from merge_core.recipe import parse
from merge_core.resolve import ModelHeader, check, draft

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "evil/repo--modeling.Model"},
    "attn_implementation": "evil/kernel",
    "_name_or_path": "/home/somebody/model",
    "eos_token_id": [2, 3],
    "hidden_size": 8,
    "model_type": "llama",
    "num_hidden_layers": 1,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
ARCHITECTURES = """
Albert Bert Bloom Cohere2 DebertaV2 DeepseekV2 DeepseekV3 DistilBert Electra Ernie4_5 Exaone4 Falcon Gemma
Gemma2 Glm4 GPT2 GPTBigCode GPTJ GPTNeoX GptOss Granite GraniteMoe HunYuanDenseV1 Lfm2 Llama Llama4Text MPNet
MiniMax Mistral Mixtral Olmo2 OPT Phi Phi3 Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next Roberta SeedOss SmolLM3
StableLm Starcoder2 T5 XGLM XLMRoberta
"""
RECIPE = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\ndtype: bfloat16\n"


def header(config: dict[str, Any]) -> ModelHeader:
    tensors = {"model.norm.weight": TensorInfo(dtype="F32", shape=(8,))}
    return ModelHeader(tensors=tensors, config=config, files=())


def plan() -> MergePlan:
    return draft(parse(RECIPE), {"a": header(CONFIG)}).seal({"a": ModelId(sha256(b"a"))})


def files(**others: bytes) -> dict[str, bytes]:
    named = {name.replace("__", "."): data for name, data in others.items()}
    return {"config.json": json.dumps(CONFIG).encode(), **named}


def test_config_keeps_what_a_model_computes_with_and_nothing_that_names_code() -> None:
    config = json.loads(output_files(plan().result, files())["config.json"])
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "eos_token_id": [2, 3],
        "hidden_size": 8,
        "model_type": "llama",
        "num_hidden_layers": 1,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def test_the_dtype_is_written_under_the_key_that_the_donor_uses() -> None:
    config = {k: v for k, v in CONFIG.items() if k != "torch_dtype"} | {"dtype": "float32"}
    written = json.loads(
        output_files(plan().result, {"config.json": json.dumps(config).encode()})["config.json"]
    )
    assert (written["dtype"], "torch_dtype" in written) == ("bfloat16", False)


def test_what_is_lost_is_said_before_the_merge() -> None:
    assert dropped(CONFIG) == ("attn_implementation",)
    assert check(parse(RECIPE), {"a": header(CONFIG)}).warnings == (
        "config keys of a that are not kept: attn_implementation",
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES.split())
def test_what_an_architecture_computes_with_is_kept(architecture: str) -> None:
    """A RoBERTa without its type_vocab_size does not open; a DeepSeek without rope_interleave is another."""
    import transformers

    common = transformers.PretrainedConfig().to_dict()
    config = getattr(transformers, f"{architecture}Config")().to_dict()
    lost = set(dropped({key: value for key, value in config.items() if key not in common}))
    assert lost <= {"slow_but_exact"}  # of Bloom: not what is computed, but how


def test_tokenizers_and_templates_are_copied_and_other_files_are_not() -> None:
    given = files(
        tokenizer__json=b'{"x": 1}',
        chat_template__jinja=b"{{ messages }}",
        README__md=b"# card",
        modeling_evil__py=b"import os",
    )
    given["tokenizer_config.json"] = b'{"model_max_length":   512}'
    written = output_files(plan().result, given)
    assert sorted(written) == [
        "chat_template.jinja",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert written["tokenizer.json"] == b'{"x": 1}'
    assert written["chat_template.jinja"] == b"{{ messages }}"
    assert written["tokenizer_config.json"] == b'{"model_max_length":   512}'


def test_a_tokenizer_config_that_names_code_loses_it() -> None:
    given = files(
        tokenizer_config__json=b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}, "model_max_length": 512}',
        generation_config__json=b'{"custom_generate": "evil/repo", "temperature": 0.5, "eos_token_id": [1]}',
    )
    written = output_files(plan().result, given)
    assert json.loads(written["tokenizer_config.json"]) == {"model_max_length": 512}
    assert json.loads(written["generation_config.json"]) == {"temperature": 0.5, "eos_token_id": [1]}


def test_a_tokenizer_config_that_leads_elsewhere_loses_its_paths() -> None:
    elsewhere = {
        "vocab_file": "/etc/passwd",
        "spm_file": "../x",
        "name_or_path": "a/b",
        "tokenizer_file": "c",
    }
    given = files(tokenizer_config__json=json.dumps({**elsewhere, "model_max_length": 512}).encode())
    written = output_files(plan().result, given)
    assert json.loads(written["tokenizer_config.json"]) == {"model_max_length": 512}


def test_the_bytes_do_not_depend_on_the_order_of_keys() -> None:
    shuffled = json.dumps(dict(reversed(CONFIG.items()))).encode()
    assert output_files(plan().result, {"config.json": shuffled}) == output_files(plan().result, files())


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"[]",
        b"{",
        b'{"hidden_size": 1, "hidden_size": 2}',
        b'{"rms_norm_eps": NaN}',
        b'{"model_type": "\\ud800"}',
        b'{"a":' * 100_000,
        b"\xff\xfe{}",
        b'{"x": "' + b"y" * (5 << 20) + b'"}',
    ],
)
def test_a_config_that_is_not_plain_json_is_refused(config: bytes) -> None:
    with pytest.raises(CorruptCheckpoint):
        output_files(plan().result, {"config.json": config})


def test_a_donor_without_config_is_refused() -> None:
    with pytest.raises(CorruptCheckpoint, match=r"no config\.json"):
        output_files(plan().result, {})
