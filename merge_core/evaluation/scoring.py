"""Scoring: a model in memory on a task.

    score(model, tokenizer, task)  ->  Score(value=0.98, losses=(0.02, …), hits=(True, …), …)

exact_match    greedy decoding gives the whole answer and then ends: with the model's end token, or with a
               line break where the answer has none of its own
choice         the right choice has the highest likelihood per byte (Gao 2021,
               https://blog.eleuther.ai/multiple-choice-normalization/; lm-eval's acc_norm counts characters)
bits_per_byte  what a compressor with this model would need for a byte of the answers

One pass over the right answers is nearly all of exact match: greedy decoding leaves them at the first token
where the model prefers another one, and what it has written by then mostly cannot become the answer any more.
Only where it still can, since text has several spellings in tokens, the model is let go on.

Sizes of batches move logits by roundings. What is decided by less than `CLOSE` is decided again with the item
alone, so that no size of batch shows in a hit. That holds for float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from tokenizers import Tokenizer

from merge_core.errors import Unmergeable
from merge_core.evaluation.prediction import Predictor, Progress, Told
from merge_core.evaluation.spelling import Spelled, Speller, is_answer
from merge_core.evaluation.tasks import Metric, Task

BATCH = 64
MAX_WINDOW = 2048
"""Tokens of a text that a model sees at once; prompts and answers may fill its whole context."""
CLOSE = 1e-3
"""Logits, or nats per byte, that lie nearer are as good as equal until the item is run alone."""

_SPELLINGS = 8
"""Tokens beyond one for each byte of an answer after which a model has not given it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A model's score on a task; the tuples have one entry for each item, in the task's order.

    `value` is the share of right items, or bits per byte over all of them. `losses` are nats of the right
    answer, for exact match with the token that ends it; they fall on `tokens` tokens, which spell `bytes`
    bytes. `hits` is empty for bits per byte.
    """

    task: str
    metric: Metric
    value: float
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    hits: tuple[bool, ...]


@torch.inference_mode()
def score(
    model: Any,
    tokenizer: Tokenizer,
    task: Task,
    *,
    batch_size: int = BATCH,
    device: str = "cpu",
    on_progress: Progress = lambda done, total: None,
) -> Score:
    """Score a causal language model of transformers that is in eval mode; it is moved to `device`.

    `on_progress` gets (tokens predicted, tokens). Raises Unmergeable where the tokenizer does not fit the
    model or lacks tokens for an item, or the model computes no numbers.
    """
    predictor = Predictor(
        model=model.to(device), batch_size=batch_size, device=device, on_progress=on_progress
    )
    speller = Speller(tokenizer, model, predictor.vocabulary)
    how = {Metric.EXACT_MATCH: _exact_match, Metric.CHOICE: _choice, Metric.BITS_PER_BYTE: _bits_per_byte}
    found = how[task.metric](predictor, speller, task)
    if not all(map(math.isfinite, found.losses)):
        raise Unmergeable("the model finds a token impossible, or computes no numbers")
    return found


def _exact_match(predictor: Predictor, speller: Speller, task: Task) -> Score:
    spelled = speller.answers([(item.prompt, item.answer) for item in task.items])
    told = predictor.predict([one.asked for one in spelled], picking=True)
    hits = []
    for item, one, found in zip(task.items, spelled, told, strict=True):
        decided = _until_decided(one, found)
        if min(decided.margins) < CLOSE:
            decided = _until_decided(one, predictor.alone().predict([one.asked], picking=True)[0])
        hits.append(_gives(predictor, speller, one, decided.picks, item.answer))
    if not speller.ends:  # the last token only stood where one would be written
        told = [found.upto(len(found.nats) - 1) for found in told]
    return _scored(task, spelled, told, hits)


def _until_decided(one: Spelled, told: Told) -> Told:
    """What the model says up to the first token that it would write otherwise, or the end."""
    answer = one.asked.ids[one.asked.start : -1]
    other = (i for i, token in enumerate(answer) if told.picks[i] != token)
    return told.upto(next(other, len(answer)) + 1)


def _gives(predictor: Predictor, speller: Speller, one: Spelled, picks: list[int], answer: str) -> bool:
    """Whether greedy decoding, which begins with `picks`, gives the answer and ends."""
    context = one.asked.ids[: one.asked.start]
    limit = one.bytes + _SPELLINGS
    written = picks[:-1]
    for token in chain(picks[-1:], predictor.follow([*context, *picks], limit)):
        ended = token in speller.ends
        written += [] if ended else [token]
        verdict = is_answer(answer, speller.text(context, written), ended=ended)
        if verdict is not None:
            return verdict
    return False


def _choice(predictor: Predictor, speller: Speller, task: Task) -> Score:
    spelled = speller.texts([(item.prompt, choice) for item in task.items for choice in item.choices])
    told = predictor.predict([one.asked for one in spelled])
    right, hits, at = [], [], 0
    for item in task.items:
        mine = spelled[at : at + len(item.choices)]
        surprise = _per_byte(mine, told[at : at + len(item.choices)])
        least, second = sorted(surprise)[:2]
        if second - least < CLOSE:
            surprise = _per_byte(mine, predictor.alone().predict([one.asked for one in mine]))
        answer = item.choices.index(item.answer)
        hits.append(surprise.index(min(surprise)) == answer)
        right.append(at + answer)
        at += len(item.choices)
    return _scored(task, [spelled[i] for i in right], [told[i] for i in right], hits)


def _per_byte(spelled: Sequence[Spelled], told: Sequence[Told]) -> list[float]:
    return [math.fsum(found.nats) / one.bytes for one, found in zip(spelled, told, strict=True)]


def _bits_per_byte(predictor: Predictor, speller: Speller, task: Task) -> Score:
    spelled = speller.texts([(item.prompt, item.answer) for item in task.items])
    told = predictor.predict([one.asked for one in spelled], window=MAX_WINDOW)
    return _scored(task, spelled, told, [])


def _scored(task: Task, spelled: Sequence[Spelled], told: Sequence[Told], hits: Sequence[bool]) -> Score:
    losses = tuple(math.fsum(found.nats) for found in told)
    sizes = tuple(one.bytes for one in spelled)
    return Score(
        task=task.name,
        metric=task.metric,
        value=sum(hits) / len(hits) if hits else math.fsum(losses) / math.log(2) / sum(sizes),
        losses=losses,
        tokens=tuple(len(found.nats) for found in told),
        bytes=sizes,
        hits=tuple(hits),
    )
