"""Perplexity: how well a model predicts a text, in bits per byte too, which no tokenizer changes.

predict(Path("merged"), "It was a dark …")  ->  Prediction(tokens=812, bytes=3110, nats=2467.3)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from merge_core.evaluation.loading import load_model, load_tokenizer
from merge_core.evaluation.scoring import score
from merge_core.evaluation.tasks import Item, Metric, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How surprised a model was: nats over `tokens`, which spell `bytes` of the text."""

    tokens: int
    bytes: int
    nats: float

    @property
    def perplexity(self) -> float:
        """The number of equally likely tokens that would surprise as much, or e^700 of them."""
        return math.exp(min(self.nats / self.tokens, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits that a compressor with this model would need for a byte of the text."""
        return self.nats / math.log(2) / self.bytes


def predict(
    directory: Path, text: str, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Prediction:
    """Let a model predict a text, one window at a time; `on_progress` gets (tokens done, tokens).

    Raises InvalidTask on a text without a character, Unmergeable where the model or its tokenizer cannot be
    opened as data, CorruptCheckpoint where it is damaged.
    """
    task = Task(name="text", metric=Metric.BITS_PER_BYTE, items=(Item(prompt="", answer=text),))
    tokenizer = load_tokenizer(directory)
    found = score(load_model(directory), tokenizer, task, batch_size=1, on_progress=on_progress)
    return Prediction(tokens=sum(found.tokens), bytes=sum(found.bytes), nats=sum(found.losses))
