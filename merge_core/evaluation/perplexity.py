"""Perplexity: how well a model predicts a text, in bits per byte too, which no tokenizer changes.

    predict(Path("merged"), "It was a dark …")  ->  Prediction(tokens=812, bytes=3110, nats=2467.3)

The text is read through a window of the model's context that moves on by half of itself, so that all but the
first tokens are predicted from at least half a window, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from merge_core.checkpoint.published import read_bounded
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.evaluation.loading import load_any

MAX_WINDOW = 2048
_MAX_TOKENIZER = 256 << 20


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
    directory: Path, text: str, *, on_progress: Callable[[int, int], None] | None = None
) -> Prediction:
    """Let a model predict a text; `on_progress` gets (tokens done, tokens).

    Raises Unmergeable where the model or its tokenizer cannot be opened as data, CorruptCheckpoint where it
    is damaged.
    """
    ids, ends = _tokens(directory, text)
    model = load_any(directory)
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    if max(ids) >= vocabulary:
        raise Unmergeable(f"the tokenizer of {directory} knows tokens that the model does not")
    start = getattr(model.config, "bos_token_id", None)
    given = [start, *ids] if isinstance(start, int) and 0 <= start < vocabulary else ids
    nats = 0.0
    for done, loss in _losses(model, given, _window(model)):
        nats += loss
        if on_progress:
            on_progress(done, len(given))
    if not math.isfinite(nats):
        raise Unmergeable(f"{directory} finds a token impossible, or computes no numbers")
    skipped = len(text[: ends[0]].encode()) if given is ids else 0
    return Prediction(tokens=len(given) - 1, bytes=len(text.encode()) - skipped, nats=nats)


def _tokens(directory: Path, text: str) -> tuple[list[int], list[int]]:
    """The tokens of a text and where each ends; nothing is added to them."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise Unmergeable(f"{directory} has no tokenizer.json", hint="save it with a fast tokenizer")
    try:
        tokenizer: Any = Tokenizer.from_str(read_bounded(path, _MAX_TOKENIZER).decode("utf-8"))
    except Exception as error:  # the library raises this very class
        raise CorruptCheckpoint(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found = tokenizer.encode(text, add_special_tokens=False)
    if len(found.ids) < 2:
        raise Unmergeable(f"the tokenizer of {directory} finds no two tokens in the text")
    return list(found.ids), [end for _, end in found.offsets]


def _window(model: Any) -> int:
    stated = getattr(model.config, "max_position_embeddings", None) or getattr(
        model.config, "n_positions", None
    )
    return min(stated, MAX_WINDOW) if type(stated) is int and stated >= 2 else MAX_WINDOW


@torch.no_grad()
def _losses(model: Any, ids: Sequence[int], window: int) -> Iterator[tuple[int, float]]:
    """The surprise at each stretch of tokens but the first, in nats, with how far the text is read."""
    done = 1
    while done < len(ids):
        begin = max(0, done - window // 2) if done > 1 else 0
        end = min(begin + window, len(ids))
        logits = model(input_ids=torch.tensor([ids[begin:end]])).logits[0, done - begin - 1 : -1].float()
        wanted = torch.tensor(ids[done:end])
        yield end, float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        done = end
