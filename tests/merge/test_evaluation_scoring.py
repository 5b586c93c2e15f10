"""Scoring: what a plain loop finds item by item, whatever the batch, the architecture and the tokenizer."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from merge_core.errors import Unmergeable
from merge_core.evaluation import prediction, scoring
from merge_core.evaluation.prediction import Predictor
from merge_core.evaluation.scoring import Score, score
from merge_core.evaluation.spelling import Speller, is_answer
from merge_core.evaluation.tasks import Item, Metric, Task
from merge_core.zoo.threads import one_thread_each

CONTEXT = 48
BOS, EOS = 1, 2
MERGES = [("a", "b"), ("c", "d"), ("ab", "cd"), ("a", "a"), ("b", "Ċ")]
WORDS = ["<pad>", "<bos>", "<eos>", *"abcdĠĊÃ¼", *(a + b for a, b in MERGES)]
KINDS = ("llama", "gpt2", "mamba")


def spelled(*, opens: bool = True) -> Tokenizer:
    """Letters, and tokens of several of them: most texts have many spellings; ü takes two tokens."""
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    if opens:
        opening = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
        made.post_processor = opening
    return made


@cache
def model(kind: str, *, eos: int | None = EOS, context: int = CONTEXT) -> Any:
    """Random weights, large enough that the model has preferences: rotary, learned or no positions."""
    ids = {"bos_token_id": BOS, "eos_token_id": eos, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed({"llama": 10, "gpt2": 6, "mamba": 2}[kind])
        if kind == "llama":
            shape = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": context}
            heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
            made = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **shape, **heads, **ids))
        elif kind == "gpt2":
            shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": context}
            made = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), **shape, **ids))
        else:
            shape = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
            made = MambaForCausalLM(MambaConfig(vocab_size=len(WORDS), **shape, **ids))
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim == 2:
                weight.mul_({"llama": 15, "gpt2": 10, "mamba": 2}[kind])
    return made.eval()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small wait for threads longer than they compute."""
    with one_thread_each():
        yield


def text(rng: random.Random, most: int) -> str:
    return "".join(rng.choice("aabbccdd ü") for _ in range(rng.randint(1, most)))


@torch.no_grad()
def greedy(kind: str, prompt: str, steps: int = 10) -> tuple[str, bool]:
    """What a model writes after a prompt, one whole pass a token, and whether it ended."""
    ids = spelled().encode(prompt).ids
    before = len(ids)
    for _ in range(steps):
        token = int(model(kind)(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == EOS:
            return spelled().decode(ids[before:], skip_special_tokens=False), True
        ids.append(token)
    return spelled().decode(ids[before:], skip_special_tokens=False), False


def right(answer: str, written: str, ended: bool) -> bool:
    if "\n" in answer:
        return ended and written == answer
    return (ended or "\n" in written) and written.partition("\n")[0] == answer


@cache
def exact(kind: str) -> tuple[Task, tuple[bool, ...]]:
    """Items made of what the model itself writes, right and wrong by little, with the verdicts."""
    rng, items, verdicts = random.Random(7), [], []
    for _ in range(2 if kind == "mamba" else 8):
        prompt = text(rng, 9)
        written, ended = greedy(kind, prompt)
        line = written.partition("\n")[0]
        for answer in {line, written, written + "a", written[:-1], line[:-1] + "d", "ü" + line}:
            if answer.strip("\ufffd") == answer != "":
                items.append(Item(prompt=prompt, answer=answer))
                verdicts.append(right(answer, written, ended))
    return Task(name="own words", metric=Metric.EXACT_MATCH, items=tuple(items)), tuple(verdicts)


@torch.no_grad()
def nats(kind: str, ids: list[int], start: int) -> float:
    """The surprise at the tokens from `start` on, one pass a token."""
    told = 0.0
    for at in range(start, len(ids)):
        logits = model(kind)(input_ids=torch.tensor([ids[:at]])).logits[0, -1].double()
        told -= float(logits.log_softmax(-1)[ids[at]])
    return told


def agree(found: Score, other: Score) -> None:
    assert found.hits == other.hits
    assert found.tokens == other.tokens and found.bytes == other.bytes
    assert found.losses == pytest.approx(other.losses, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_right_when_greedy_decoding_gives_it_and_ends(kind: str) -> None:
    task, verdicts = exact(kind)
    found = score(model(kind), spelled(), task)
    assert found.hits == verdicts and found.value == sum(verdicts) / len(verdicts)
    assert kind == "mamba" or 3 <= sum(verdicts) <= len(verdicts) - 10


def test_transformers_own_generation_gives_the_same_answers() -> None:
    task, _ = exact("llama")
    found = score(model("llama"), spelled(), task.first(60))
    for item, hit in zip(task.items[:60:2], found.hits[::2], strict=True):
        ids = spelled().encode(item.prompt).ids
        told = model("llama").generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)
        made = told[0, len(ids) :].tolist()
        ended = EOS in made
        written = spelled().decode(made[: made.index(EOS)] if ended else made, skip_special_tokens=False)
        assert right(item.answer, written, ended) == hit, item


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_the_surprise_at_the_answer_and_its_end(kind: str) -> None:
    task = exact(kind)[0].first(6)
    found = score(model(kind), spelled(), task)
    for index, item in enumerate(task.items):
        prompt = spelled().encode(item.prompt).ids
        whole = spelled().encode(item.prompt + item.answer).ids
        shared = whole[: len(prompt)] == prompt
        more = whole[len(prompt) :] if shared else spelled(opens=False).encode(item.answer).ids
        assert found.losses[index] == pytest.approx(nats(kind, [*prompt, *more, EOS], len(prompt)), abs=1e-4)
        assert found.tokens[index] == len(more) + 1 and found.bytes[index] == len(item.answer.encode())


def chosen(count: int = 12) -> Task:
    """Choices of very different lengths, some of which share a token with their prompt."""
    rng, items = random.Random(3), []
    for _ in range(count):
        choices = tuple(dict.fromkeys([*(text(rng, 12) for _ in range(3)), "b"]))
        items.append(Item(prompt=text(rng, 14) + "a", answer=rng.choice(choices), choices=choices))
    return Task(name="pick", metric=Metric.CHOICE, items=tuple(items))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_choice_is_the_likeliest_for_its_bytes(kind: str) -> None:
    task = chosen(8)
    found = score(model(kind), spelled(), task)
    for index, item in enumerate(task.items):
        surprise = []
        for choice in item.choices:
            whole = spelled().encode(item.prompt + choice)
            start = next(i for i, (_, end) in enumerate(whole.offsets) if end > len(item.prompt))
            surprise.append(nats(kind, whole.ids, start) / len(choice.encode()))
        assert found.hits[index] == (surprise[item.choices.index(item.answer)] == min(surprise))
        right = surprise[item.choices.index(item.answer)] * len(item.answer.encode())
        assert found.losses[index] == pytest.approx(right, abs=1e-4)
    assert found.value == sum(found.hits) / 8 and 0 < found.value < 1


def told(count: int = 9) -> Task:
    """Texts, of which some are longer than the model's context."""
    rng = random.Random(5)
    items = [Item(prompt="" if i % 3 else text(rng, 9), answer=text(rng, 20 + 25 * i)) for i in range(count)]
    return Task(name="tales", metric=Metric.BITS_PER_BYTE, items=tuple(items))


def test_bits_per_byte_are_those_of_all_texts_together() -> None:
    task = told(6)
    found = score(model("llama"), spelled(), task)
    assert found.hits == ()
    assert found.bytes == tuple(len(item.answer.encode()) for item in task.items)
    bits = sum(found.losses) / math.log(2)
    assert found.value == pytest.approx(bits / sum(found.bytes))
    ids = spelled().encode(task.items[1].answer).ids
    assert len(ids) <= CONTEXT and found.losses[1] == pytest.approx(nats("llama", ids, 1), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", [chosen(), told()], ids=["choice", "bits_per_byte"])
def test_no_size_of_batch_shows_in_a_score(kind: str, task: Task) -> None:
    one = score(model(kind), spelled(), task, batch_size=1)
    for size in (7, 64):
        agree(score(model(kind), spelled(), task, batch_size=size), one)


@pytest.mark.parametrize("kind", KINDS)
def test_no_size_of_batch_shows_in_exact_match(kind: str) -> None:
    one = score(model(kind), spelled(), exact(kind)[0], batch_size=1)
    for size in (7, 64):
        agree(score(model(kind), spelled(), exact(kind)[0], batch_size=size), one)


def test_nor_does_the_order_of_the_items() -> None:
    task = exact("gpt2")[0]
    found = score(model("gpt2"), spelled(), task)
    turned = score(model("gpt2"), spelled(), replace(task, items=task.items[::-1]))
    agree(
        replace(turned, **{f: getattr(turned, f)[::-1] for f in ("hits", "losses", "tokens", "bytes")}), found
    )


def test_what_is_nearly_equal_is_decided_with_the_item_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task = exact("llama")[0].first(30)
    one = score(model("llama"), spelled(), task)
    seen: list[int] = []
    run = Predictor.predict

    def noisy(self: Predictor, asked: Any, **options: Any) -> Any:
        """In company, tokens that lie close are taken for each other, as roundings could do."""
        found = run(self, asked, **options)
        seen.append(self.batch_size)
        if self.batch_size == 1:
            return found
        return [replace(f, picks=[0] * len(f.picks), margins=[0.0] * len(f.margins)) for f in found]

    monkeypatch.setattr(Predictor, "predict", noisy)
    assert score(model("llama"), spelled(), task).hits == one.hits
    assert seen == [64] + [1] * 30


def test_a_batch_has_no_more_logits_than_memory_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run = prediction.Predictor._logits

    def watched(self: Predictor, ids: Any, kept: int) -> Any:
        sizes.append(len(ids) * (kept + 1))
        return run(self, ids, kept)

    monkeypatch.setattr(prediction.Predictor, "_logits", watched)
    monkeypatch.setattr(prediction, "_LOGITS", 60 * len(WORDS))
    score(model("llama"), spelled(), told())
    assert len(sizes) > 10 and max(sizes) <= 60
    sizes.clear()
    asked = [prediction.Asked(ids=[3] * 40, start=39), prediction.Asked(ids=[3] * 4, start=1)]
    Predictor(model=model("llama"), batch_size=64).predict(asked)
    assert sizes == [2, 4]  # together they would take two rows of forty


@pytest.mark.parametrize("length", [CONTEXT - 8, CONTEXT, CONTEXT + 8])
def test_a_model_goes_on_after_all_of_a_prompt_that_fits(length: int) -> None:
    ids = [3 + i * i % 9 for i in range(length)]
    found = list(Predictor(model=model("llama"), batch_size=1).follow(ids, 12))
    for token in found:
        with torch.no_grad():
            logits = model("llama")(input_ids=torch.tensor([ids[-CONTEXT:]])).logits[0, -1]
        assert token == int(logits.argmax())
        ids.append(token)


def test_progress_counts_the_tokens_that_are_predicted() -> None:
    seen: list[tuple[int, int]] = []
    found = score(
        model("llama"), spelled(), told(), batch_size=4, on_progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (sum(found.tokens),) * 2 and len(seen) > 3
    assert seen == sorted(seen)


def test_without_an_end_token_an_answer_ends_with_its_line() -> None:
    free = model("llama", eos=None)
    written = {}
    for prompt in ("ab", "cd", "a b", "dd", "ccb", "bad", "cab", "dab"):
        ids = spelled().encode(prompt).ids
        with torch.no_grad():
            for _ in range(10):
                ids.append(int(free(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        written[prompt] = spelled().decode(ids[1:], skip_special_tokens=False).removeprefix(prompt)
    lines = {p: t.partition("\n")[0] for p, t in written.items() if "\n" in t and not t.startswith("\n")}
    assert lines
    items = tuple(Item(prompt=p, answer=a) for p, line in lines.items() for a in (line, line + "a"))
    found = score(free, spelled(), Task(name="lines", metric=Metric.EXACT_MATCH, items=items))
    assert found.hits == (True, False) * len(lines)
    assert found.tokens[0] == len(spelled(opens=False).encode(items[0].answer).ids)


def test_a_prompt_longer_than_the_context_is_read_from_its_end() -> None:
    long = Item(prompt="ab cd " * 40, answer="dd")
    for kind in ("llama", "gpt2"):
        for item in (long, replace(long, choices=("dd", "ab"))):
            metric = Metric.CHOICE if item.choices else Metric.EXACT_MATCH
            found = score(model(kind), spelled(), Task(name="long", metric=metric, items=(item,)))
            assert math.isfinite(found.losses[0])


def test_a_text_that_nothing_opens_begins_with_its_second_token() -> None:
    bare = LlamaForCausalLM(model("llama").config)
    bare.config.bos_token_id = None
    task = Task(name="tale", metric=Metric.BITS_PER_BYTE, items=(Item(prompt="", answer="ab cd"),))
    found = score(bare.eval(), spelled(opens=False), task)
    assert found.tokens == (2,) and found.bytes == (3,)


@pytest.mark.parametrize(
    ("prompt", "answer"), [("ab", "xyz"), ("xyz", "ab")], ids=["the answer", "the prompt"]
)
def test_texts_that_the_tokenizer_has_no_tokens_for_are_named(prompt: str, answer: str) -> None:
    bare = LlamaForCausalLM(model("llama").config).eval()
    items = (Item(prompt="ab", answer="cd"), Item(prompt=prompt, answer=answer))
    with pytest.raises(Unmergeable, match="item 2"):
        score(bare, spelled(opens=False), Task(name="far", metric=Metric.EXACT_MATCH, items=items))


@pytest.mark.parametrize("text", ["xab", "axb", "abx"])
def test_characters_that_the_tokenizer_drops_are_not_predicted_for_free(text: str) -> None:
    for item in (Item(prompt="", answer=text), Item(prompt="ab", answer=text)):
        task = Task(name="x", metric=Metric.BITS_PER_BYTE, items=(item,))
        with pytest.raises(Unmergeable, match="drops characters of item 1"):
            score(model("llama"), spelled(), task)


def bytewise(*, normal: bool = False) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(trim_offsets=not normal)
    made.decoder = decoders.ByteLevel()
    if normal:
        made.normalizer = normalizers.NFC()
    return made


@pytest.mark.parametrize(("normal", "text"), [(False, "Hello world"), (True, "e\u0301a b")])
def test_what_offsets_leave_out_but_tokens_spell_is_not_dropped(normal: bool, text: str) -> None:
    (found,) = Speller(bytewise(normal=normal), model("llama"), 256).texts([("ab", text)])
    assert found.bytes == len(text.encode())


def test_a_written_special_token_is_seen_unless_it_ends_the_answer() -> None:
    speller = Speller(spelled(), model("llama"), len(WORDS))
    a, b = WORDS.index("a"), WORDS.index("b")
    assert speller.text([BOS, a], [b]) == "b"
    assert speller.text([BOS, a], [0, b]) == "<pad>b"


def test_an_answer_that_the_tokenizer_spells_in_part_is_never_given() -> None:
    kind = "llama"
    task, verdicts = exact(kind)
    item = task.items[verdicts.index(True)]
    unspellable = Task(name="part", metric=task.metric, items=(item, replace(item, answer=item.answer + "x")))
    assert score(model(kind), spelled(), unspellable).hits == (True, False)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    larger = spelled()
    larger.add_tokens(["dcba"])
    task = Task(name="x", metric=Metric.BITS_PER_BYTE, items=(Item(prompt="", answer="ab dcba"),))
    with pytest.raises(Unmergeable, match="tokens that the model does not"):
        score(model("llama"), larger, task)


def test_a_model_that_computes_no_numbers_is_refused() -> None:
    broken = LlamaForCausalLM(model("llama").config).eval()
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    with pytest.raises(Unmergeable, match="no numbers"):
        score(broken, spelled(), chosen(3))


@pytest.mark.parametrize(
    ("wanted", "written", "ended", "verdict"),
    [
        ("42", "42", True, True),
        ("42", "42", False, None),
        ("42", "4", False, None),
        ("42", "", False, None),
        ("42", "4", True, False),
        ("42", "421", False, False),
        ("42", "42\nNext", False, True),
        ("42", "42 \n", False, False),
        ("42", "\n", False, False),
        ("4\n2", "4\n2", True, True),
        ("4\n2", "4\n", False, None),
        ("4\n2", "4\n2\n", False, False),
        ("ü", "\ufffd", False, None),
        ("ü", "a\ufffd", False, False),
        ("\ufffd", "\ufffd", True, True),
    ],
)
def test_an_answer_is_whole_and_ends(wanted: str, written: str, ended: bool, verdict: bool | None) -> None:
    assert is_answer(wanted, written, ended=ended) is verdict


def test_what_is_close_is_far_above_roundings_and_far_below_preferences() -> None:
    one, many = (
        Predictor(model=model("llama"), batch_size=size).predict(
            [
                prediction.Asked(ids=spelled().encode(item.answer).ids[:CONTEXT], start=1)
                for item in told().items
            ],
            picking=True,
        )
        for size in (1, 64)
    )
    moved = max(
        abs(a - b) for x, y in zip(one, many, strict=True) for a, b in zip(x.margins, y.margins, strict=True)
    )
    margins = sorted(margin for found in one for margin in found.margins)
    assert 10 * moved < scoring.CLOSE < margins[len(margins) // 10]
