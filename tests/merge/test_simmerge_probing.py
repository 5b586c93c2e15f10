"""Probing: models of several shapes read probe sets, and what is kept is what they say one text at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from merge_core.errors import Unmergeable
from merge_core.evaluation.perplexity import predict
from merge_core.simmerge.functional import probing
from merge_core.simmerge.functional.behaviour import Behaviour
from merge_core.simmerge.functional.probes import Probe, ProbeSet
from merge_core.simmerge.functional.probing import observe
from merge_core.simmerge.pairs.divergence import PAIR, measured

TEXT = "the cat sat on the mat and the dog lay on the rug near the old red chair by the fire"
PROBES = ProbeSet(
    name="small",
    probes=(
        Probe(task="pets", prompt="", text=TEXT),
        Probe(task="rest", prompt="the rug ", text="lay there"),
        Probe(task="pets", prompt="a", text=" cat"),
    ),
)
WIDE = {"vocab_size": 120, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 24}
HEADS = {"num_attention_heads": 2, "intermediate_size": 24}


def made(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(**WIDE, **HEADS))
        elif kind == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=120, n_embd=16, n_layer=2, n_head=2, n_positions=24)
            )
        elif kind == "neox":
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE, **HEADS))
        else:
            model = MambaForCausalLM(
                MambaConfig(vocab_size=120, hidden_size=16, num_hidden_layers=2, state_size=4)
            )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 if weight.ndim == 2 else 1)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path, train: Callable[..., dict[str, bytes]]) -> Callable[[str], Path]:
    files = train("BPE", TEXT, 110, "<s>")

    def save(kind: str) -> Path:
        directory = tmp_path / kind
        made(kind).save_pretrained(directory)
        (directory / "tokenizer.json").write_bytes(files["tokenizer.json"])
        return directory

    return save


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "mamba"])
def test_what_is_kept_is_what_the_model_says_one_window_at_a_time(
    saved: Callable[[str], Path], kind: str
) -> None:
    directory, model = saved(kind), made(kind)
    seen = observe(directory, PROBES, positions=None)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode("the rug lay there", add_special_tokens=False).ids
    before = len(tokenizer.encode("the rug ", add_special_tokens=False).ids)
    with torch.no_grad():
        told = model(torch.tensor([ids]), output_hidden_states=True)
    rest = seen.task == PROBES.tasks.index("rest")
    assert 0 < rest.sum() <= len(ids) - before + 1
    wanted = told.logits[0].log_softmax(-1)[-1 - int(rest.sum()) : -1].numpy()
    np.testing.assert_allclose(seen.logp[rest], wanted, atol=1e-4)
    states = np.stack([state[0, -1 - int(rest.sum()) : -1].numpy() for state in told.hidden_states])
    np.testing.assert_allclose(seen.hidden[:, rest], states, atol=1e-3)
    np.testing.assert_allclose(np.exp(seen.logp).sum(1), 1.0, atol=1e-4)
    if kind == "mamba":
        assert not seen.attention.size and not Behaviour.of(seen).attention.size
    else:
        np.testing.assert_allclose(seen.attention.sum(-1), 1.0, atol=1e-5)


def test_bits_per_byte_are_those_of_an_evaluation(saved: Callable[[str], Path]) -> None:
    directory = saved("llama")
    alone = ProbeSet(name="one", probes=(Probe(task="pets", prompt="", text=TEXT),))
    seen = observe(directory, alone, positions=7)
    assert seen.bits_per_byte[0] == pytest.approx(predict(directory, TEXT).bits_per_byte, rel=1e-5)


def test_no_more_positions_are_kept_than_asked_spread_over_all_probes(saved: Callable[[str], Path]) -> None:
    directory = saved("llama")
    whole, few = observe(directory, PROBES, positions=None), observe(directory, PROBES, positions=9)
    assert len(whole.task) > len(few.task) == 9 and whole.key != few.key
    assert min(np.bincount(few.task)) >= 3
    kept = [np.flatnonzero((abs(whole.logp - row) < 1e-5).all(1)) for row in few.logp]
    assert all(map(len, kept)) and max(int(found[-1]) for found in kept[:4]) >= 10
    np.testing.assert_allclose(whole.bits_per_byte, few.bits_per_byte, rtol=1e-5)


def test_sizes_of_batches_do_not_show_and_a_second_time_gives_the_same(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved("gpt2")
    together, again = observe(directory, PROBES), observe(directory, PROBES)
    np.testing.assert_array_equal(together.logp, again.logp)
    monkeypatch.setattr(probing, "_BATCH", 1)
    alone = observe(directory, PROBES)
    assert alone.key == together.key
    np.testing.assert_allclose(alone.logp, together.logp, atol=1e-5)
    np.testing.assert_allclose(alone.attention, together.attention, atol=1e-5)


def test_a_probe_that_cannot_be_spelled_is_left_out_and_a_set_of_such_is_refused(zoo: Any) -> None:
    odd = Probe(task="odd", prompt="", text="grün")
    plain = Probe(task="plain", prompt="r", text="abc")
    seen = observe(zoo.base, ProbeSet(name="x", probes=(odd, plain)))
    assert set(seen.task) == {1} and np.isnan(seen.bits_per_byte[0]) and np.isfinite(seen.bits_per_byte[1])
    told = Behaviour.of(seen)
    assert Behaviour.read(told.described(), told.arrays()).key == told.key
    with pytest.raises(Unmergeable, match="no probe of x can be spelled"):
        observe(zoo.base, ProbeSet(name="x", probes=(odd,)))


def test_a_model_that_does_not_fit_is_refused_before_it_is_opened(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved("llama")
    observe(directory, PROBES, max_memory=2 << 30)
    monkeypatch.setattr(probing, "load_model", lambda _: pytest.fail("opened"))
    with pytest.raises(Unmergeable, match=r"MiB, and 64 MiB are allowed"):
        observe(directory, PROBES, max_memory=64 << 20)


def test_a_model_without_a_tokenizer_says_nothing(saved: Callable[[str], Path]) -> None:
    directory = saved("llama")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(Unmergeable, match=r"tokenizer\.json"):
        observe(directory, PROBES)


def test_experts_of_the_zoo_differ_where_they_were_trained(zoo: Any) -> None:
    from merge_core.simmerge.functional import probes

    asked = probes.find("zoo")
    base, rev, sort = (observe(path, asked) for path in (zoo.base, zoo.experts["rev"], zoo.experts["sort"]))
    assert len(rev.task) == 510
    kl = measured(rev, sort, base).pair[PAIR.index("kl")]
    by_task = {name: kl[rev.task == n].mean() for n, name in enumerate(asked.tasks)}
    assert min(by_task["rev"], by_task["sort"]) > 2 * by_task["brk"]


def test_tokens_that_are_called_otherwise_are_another_vocabulary(saved: Callable[[str], Path]) -> None:
    directory = saved("llama")
    other = directory.with_name("other")
    shutil.copytree(directory, other)
    text = (other / "tokenizer.json").read_text()
    assert '"<s>"' in text
    (other / "tokenizer.json").write_text(text.replace('"<s>"', '"<t>"'))
    with pytest.raises(Unmergeable):
        measured(observe(directory, PROBES), observe(other, PROBES))
