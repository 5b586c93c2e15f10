"""Perplexity: the figures of the formula, whatever the window, and nothing of the directory is run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from merge_core.errors import CorruptCheckpoint, MergeCoreError, Unmergeable
from merge_core.evaluation.perplexity import predict

TEXT = "The quick brown fox jumps over the lazy dog. Ünïcödé counts by bytes.\n" * 3
CONTEXT = 32


def tiny(directory: Path, *, bos: int | None = 0, flat: bool = False) -> Path:
    """A random Llama that reads bytes, 32 at a time; a flat one finds every token equally likely."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=bos,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(20)
        if flat:
            model.lm_head.weight.zero_()
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def ids_of(directory: Path, text: str) -> list[int]:
    found: list[int] = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    return found


def by_hand(directory: Path, ids: list[int]) -> float:
    """Every token but the first predicted from what its window shows before it, in nats."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    nats = 0.0
    for position in range(1, len(ids)):
        half = CONTEXT // 2
        begin = 0 if position < CONTEXT else (position - CONTEXT) // half * half + half
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[begin:position]])).logits[0, -1]
        nats -= float(torch.log_softmax(logits.double(), -1)[ids[position]])
    return nats


@pytest.mark.parametrize("text", [TEXT[:20], TEXT])
def test_it_is_the_mean_surprise_at_each_token_seen_from_its_window(text: str, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    found = predict(model, text)
    ids = [0, *ids_of(model, text)]
    assert (found.tokens, found.bytes) == (len(ids) - 1, len(text.encode()))
    assert found.nats == pytest.approx(by_hand(model, ids), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nats / found.tokens))
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.bytes)
    assert predict(model, text) == found


def test_without_a_first_token_the_first_character_is_not_counted(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", bos=None)
    found = predict(model, TEXT)
    assert (found.tokens, found.bytes) == (len(TEXT.encode()) - 1,) * 2
    assert found.nats == pytest.approx(by_hand(model, ids_of(model, TEXT)), rel=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_it_has_tokens(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = tiny(tmp_path / "model", flat=True)
    found = predict(model, TEXT, on_progress=lambda done, total: seen.append((done, total)))
    assert found.perplexity == pytest.approx(257) and found.bits_per_byte == pytest.approx(math.log2(257))
    assert len(seen) > 5 and seen[-1] == (found.tokens,) * 2


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    before = predict(model, TEXT[:50])
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
    config["_attn_implementation"] = "somebody/kernels"
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert predict(model, TEXT[:50]) == before
    assert not (tmp_path / "ran").exists()


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def larger_tokenizer(model: Path) -> None:
    found = json.loads((model / "tokenizer.json").read_text())
    found["model"]["vocab"]["T"] = 900
    (model / "tokenizer.json").write_text(json.dumps(found))


def adapter(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")


def another_kind(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))


def wider(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": 24, "head_dim": 12}))


@pytest.mark.parametrize(
    ("spoil", "kind", "why"),
    [
        (no_tokenizer, Unmergeable, "has no tokenizer.json"),
        (broken_tokenizer, CorruptCheckpoint, "tokenizer.json cannot be read"),
        (larger_tokenizer, Unmergeable, "knows tokens that the model does not"),
        (adapter, Unmergeable, "cannot be opened as a language model"),
        (another_kind, Unmergeable, "is a nonesuch"),
        (wider, CorruptCheckpoint, "tensors missing or misshapen|disagree"),
    ],
)
def test_what_cannot_be_opened_as_data_is_refused(
    spoil: Callable[[Path], None], kind: type[MergeCoreError], why: str, tmp_path: Path
) -> None:
    model = tiny(tmp_path / "model")
    spoil(model)
    with pytest.raises(kind, match=why):
        predict(model, TEXT)
