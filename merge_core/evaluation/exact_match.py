"""Exact match: an item counts when greedy decoding gives its whole answer and then stops.

Deterministic: one thread, fixed batches, ties to the lowest token id.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from merge_core.errors import MergeCoreError, Unmergeable
from merge_core.evaluation.loading import load_model
from merge_core.zoo.domains import BOS, DOMAINS, EOS, LENGTH, SPLITS, VOCABULARY, Domain, Item, encode, items
from merge_core.zoo.domains import decode as text_of
from merge_core.zoo.threads import one_thread_each

_BATCH = 128


def score(
    directory: Path, domains: Sequence[str], *, split: str = "test", limit: int | None = None
) -> dict[str, float]:
    """The share of exactly answered items per domain; `limit` takes the first items of the split.

    Raises MergeCoreError on an unknown domain or split, Unmergeable where the vocabulary is not the zoo's,
    CorruptCheckpoint on a damaged model.
    """
    judged = verdicts(directory, domains, split=split, limit=limit)
    return {domain: sum(right) / len(right) for domain, right in judged.items()}


def verdicts(
    directory: Path, domains: Sequence[str], *, split: str = "test", limit: int | None = None
) -> dict[str, tuple[bool, ...]]:
    """Right or wrong for each item, in the split's order; raises as `score` does."""
    unknown = [name for name in domains if name not in DOMAINS]
    if unknown or split not in SPLITS:
        raise MergeCoreError(
            f"no domain {unknown[0]!r}" if unknown else f"no split {split!r}",
            hint=f"domains: {', '.join(DOMAINS)}; splits: {', '.join(SPLITS)}",
        )
    model = load_model(directory)
    if model.config.vocab_size != VOCABULARY:
        raise Unmergeable(f"{directory} has {model.config.vocab_size} tokens; the domains need {VOCABULARY}")
    with one_thread_each():
        return {name: _judge(model, DOMAINS[name], items(DOMAINS[name], split)[:limit]) for name in domains}


def _judge(model: LlamaForCausalLM, domain: Domain, asked: Sequence[Item]) -> tuple[bool, ...]:
    answers: list[str | None] = []
    for start in range(0, len(asked), _BATCH):
        questions = [domain.question(item) for item in asked[start : start + _BATCH]]
        answers += answer(model, questions)
    return tuple(given == item.answer for given, item in zip(answers, asked, strict=True))


@torch.no_grad()
def answer(model: LlamaForCausalLM, questions: Sequence[str]) -> list[str | None]:
    """Continue each question greedily up to EOS; None where a sequence of LENGTH has not ended.

    All questions must have the same length, so that no padding comes between question and answer.
    """
    ids = torch.tensor([[BOS, *encode(question)] for question in questions])
    asked = ids.shape[1]
    while ids.shape[1] < LENGTH:
        following = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
        if bool((ids[:, asked:] == EOS).any(dim=1).all()):
            break
    rows: list[list[int]] = ids[:, asked:].tolist()
    return [text_of(row) if EOS in row else None for row in rows]
